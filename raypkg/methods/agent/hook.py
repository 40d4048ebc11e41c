"""AGENT as a hook: every step's gradient is corrected by that of a snapshot of the model."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.core.seeds import generator, seeded
from raypkg.data.coreset import Coreset
from raypkg.engine.batches import Batch, Batches, dtype_of, plain_batches
from raypkg.engine.costs import Cost
from raypkg.engine.loop import autocast, losses_of
from raypkg.engine.run import Hook, Results, Run, hook
from raypkg.engine.worker import memory_bound
from raypkg.phases.training import Job

from . import plots
from .control_variate import coefficient, correct, cosine_similarity, smoothed
from .settings import AgentOptions

PROBED = 8  # samples
COLUMNS = ("step", "c", "cosine")  # c, and how alike the gradients of model and snapshot are


class Correction(Hook):
    """Corrects gradients by a control variate with an adaptive weight (AGENT, arXiv:2301.03573).

        at a snapshot:  c ← (1 − α)·c + α·ĉ,  θ̃ ← θ,  g̃ = mean of ∇ℓ_B(θ̃) over the batches of an epoch
        every step:     ∇ℓ_B(θ) − γc·(∇ℓ_B(θ̃) − g̃)

    It comes after the hooks that look at the raw gradient (RigL grows on it) and before `Masked`. Momentum sees the
    corrected gradient; weight decay is the optimiser's and is not corrected. The snapshot normalises by the statistics
    of its batches, as the model does, and keeps its running ones to itself. While c = 0, nothing is added and no
    gradient of the snapshot is computed.

    Differs from the paper: ĉ is taken from the batch losses of the steps since the last snapshot, which are there
    anyway, while θ moves; from their differences from step to step, in which that drift cancels. g̃ is over the very
    batches, augmented, that the coming epoch consists of, unless another hook supplies those.

    The gradients that g̃ is the mean of are then those that the steps need. Where those of an epoch's corrected steps
    fit into ``settings.memory`` (4 bytes · parameters · steps) they are kept: a sample costs two gradients, not three.

    Args:
        settings: γ, α, and how often.
    """

    def __init__(self, settings: AgentOptions):
        self.settings = settings
        self.c = 0.0
        self.snapshot: nn.Module = nn.Identity()
        self.full: list[Tensor] = []  # g̃, one tensor a parameter; empty while c = 0
        self.kept: dict[int, tuple[Tensor, list[Tensor]]] = {}  # ℓ_B(θ̃) and its gradient, of each step to correct
        self.losses: list[Tensor] = []  # (ℓ_B(θ), ℓ_B(θ̃)) of every corrected step since the snapshot, [2]
        self.mine: list[Tensor] = []  # of the last of them this worker's share
        self.history: list[tuple[float, ...]] = []  # ``COLUMNS`` of every corrected step

    def on_start(self, run: Run) -> None:
        """Make room for the snapshot.

        Raises:
            UserError: the model draws at random, as dropout does: the snapshot would draw otherwise.
        """
        self.snapshot = deepcopy(run.model)
        if _draws(self.snapshot, run):
            raise UserError(
                "agent: the model gives one batch two outputs, as dropout does, and would differ from its"
                " snapshot by noise"
            )

    def on_epoch(self, run: Run) -> None:
        """Take the epoch's snapshot, unless steps are counted."""
        if run.step == 0 or not self.settings.snapshot_every_steps:
            with run.bill("full gradient"):
                self._refresh(run)

    def on_gradients(self, run: Run) -> None:
        """Correct the gradients of this step."""
        if self.settings.snapshot_every_steps and run.step and run.step % self.settings.snapshot_every_steps == 0:
            with run.cost.apart(run.bill("full gradient")):
                self._refresh(run)
        if run.step % self.settings.every_steps == 0:
            with run.cost.apart(run.bill("correction")), seeded(run.seed, "correction", run.step, run.worker.rank):
                self._correct(run)

    def on_epoch_end(self, run: Run) -> None:
        """Sum the losses over the workers: a checkpoint is the first worker's."""
        self._sum(run)

    def results(self, run: Run) -> Results:
        """Return c and the cosine of every corrected step, with their picture."""
        columns = np.array(self.history).T
        table = pa.table(dict(zip(COLUMNS, columns, strict=True)))
        return Results(
            tables={"correction": table},
            plots={"correction": partial(plots.correction, table.to_pylist())},
        )

    def state_dict(self) -> dict[str, Any]:
        """Return c, the losses, and what outlives an epoch where steps are counted: snapshot and full gradient."""
        lasting: dict[str, Any] = {}
        if self.settings.snapshot_every_steps:
            lasting = {"snapshot": self.snapshot.state_dict(), "full": list(self.full)}
        return {
            "c": self.c,
            "losses": list(self.losses),
            "history": torch.tensor(self.history, dtype=torch.float64).view(-1, len(COLUMNS)),
            **lasting,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.c, self.history = state["c"], [tuple(row) for row in state["history"].tolist()]
        device = next(self.snapshot.parameters()).device
        self.losses = [tensor.to(device) for tensor in state["losses"]]
        if self.settings.snapshot_every_steps:
            self.snapshot.load_state_dict(state["snapshot"])
            self.full = [tensor.to(device) for tensor in state["full"]]

    def _refresh(self, run: Run) -> None:
        self._sum(run)
        if self.losses:
            current, snapshot = torch.stack(self.losses, dim=1).diff()  # [batches − 1] each
            c = smoothed(self.c, coefficient(current, snapshot), self.settings.alpha)
            self.c = run.worker.gather(c)[0]  # another processor may round otherwise
            self.losses = []
        with torch.no_grad():
            for mine, theirs in zip(self.snapshot.parameters(), run.model.parameters(), strict=True):
                mine.copy_(theirs)
        self.kept = {}
        self.full = self._full_gradient(run) if self.settings.gamma * self.c else []

    def _sum(self, run: Run) -> None:
        if self.mine:
            self.losses += run.worker.sum(torch.stack(self.mine))
            self.mine = []

    def _full_gradient(self, run: Run) -> list[Tensor]:
        """Return g̃ at the snapshot, over the samples in use or some of them."""
        coreset, bill = run.coreset, run.bill("full gradient")
        total = [torch.zeros_like(parameter) for parameter in _trained(run.model)]
        if self.settings.samples and self.settings.samples < len(coreset):
            rng = generator(run.seed, "full gradient", run.step)
            some = torch.randperm(len(coreset), generator=rng)[: self.settings.samples]
            coreset = Coreset(coreset.indices[some], coreset.weights[some])
        batches = Batches(
            run.split,
            coreset,
            run.settings.batch_size,
            seed=run.seed,
            augment=run.augment,
            worker=run.worker,
            dtype=dtype_of(run.model),
        )
        steps = range(run.step, run.step + len(batches))
        corrected = {step for step in steps if step % self.settings.every_steps == 0}
        if coreset is not run.coreset or not self._keeps(run, len(corrected) * sum(part.nbytes for part in total)):
            corrected = set()
        with seeded(run.seed, "full gradient", run.step, run.worker.rank):
            for step, batch in zip(steps, batches.epoch(run.epoch), strict=True):
                loss, gradient = self._gradient(run, batch)
                torch._foreach_add_(total, gradient, alpha=1 / len(batches))
                if step in corrected:
                    self.kept[step] = loss.detach(), gradient
                bill.forward += len(batch.y)
                bill.backward += len(batch.y)
            return _summed(run, total, bill)

    def _keeps(self, run: Run, size: int) -> bool:
        """Say whether the coming steps are on the same batches, and their gradients fit."""
        supplied = any(hook.supplies_batches for hook in run.hooks)
        return not supplied and not self.settings.snapshot_every_steps and size <= self._room(run.worker.device)

    def _room(self, device: torch.device) -> int:
        if self.settings.memory is None and device.type == "cuda":
            return torch.cuda.mem_get_info(device)[0] // 4
        return memory_bound(self.settings.memory)

    def _correct(self, run: Run) -> None:
        batch, bill, damped = run.batch, run.bill("correction"), self.settings.gamma * self.c
        current = run.seen.losses @ batch.weights / batch.total
        if self.kept:
            snapshot, gradients = self.kept[run.step]
        else:
            with torch.set_grad_enabled(bool(damped)):
                snapshot, gradients = self._gradient(run, batch)
            bill.forward += len(batch.y)
            bill.backward += len(batch.y) if damped else 0
        self.mine.append(torch.stack([current, snapshot.detach()]))
        alike = float("nan")
        if damped:
            mine = [torch.zeros_like(p) if p.grad is None else p.grad for p in _trained(run.model)]
            theirs = _summed(run, gradients, bill)
            alike = cosine_similarity(mine, theirs)
            correct(mine, theirs, self.full, damped)
        self.history.append((run.step, self.c, alike))

    def _gradient(self, run: Run, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Return this worker's share of ℓ_B(θ̃), and of its gradient where gradients are enabled."""
        with autocast(run.settings.precision, batch.x.device):
            logits = self.snapshot(batch.x)
        loss = losses_of(logits, batch.y) @ batch.weights / batch.total
        if not loss.requires_grad:
            return loss, []
        return loss, list(torch.autograd.grad(loss, _trained(self.snapshot), allow_unused=True, materialize_grads=True))


@torch.no_grad()
def _draws(model: nn.Module, run: Run) -> bool:
    """Say whether a model's outputs for one batch depend on random draws; its running statistics move."""
    some, outputs = run.coreset.indices[:PROBED], []
    x, _ = next(plain_batches(run.split, some, run.worker.device, len(some), dtype_of(model)))
    for draw in range(2):
        with seeded(run.seed, "probe", draw):
            outputs.append(model.train()(x))
    return not torch.allclose(outputs[0], outputs[1], equal_nan=True)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _summed(run: Run, tensors: list[Tensor], bill: Cost) -> list[Tensor]:
    """Return the sum of the workers' tensors, by one all-reduce."""
    if run.worker.world == 1:
        return tensors
    flat = run.worker.sum(torch.cat([tensor.flatten() for tensor in tensors]))
    bill.sent += flat.nbytes
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


@hook("agent", source="arXiv:2301.03573")
def agent(*, job: Job) -> Correction:
    """Correct gradients by those of a snapshot of the model, with an adaptive weight (AGENT)."""
    return Correction(getattr(job.experiment, "agent", None) or AgentOptions())
