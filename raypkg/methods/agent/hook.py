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
from raypkg.phases.samples import Samples
from raypkg.phases.training import Job

from . import plots
from .control_variate import coefficient, correct, cosine_similarity, smoothed
from .repeated_draws import RepeatedDraws, states_of
from .settings import AgentOptions

PROBED = 8  # samples
COLUMNS = ("step", "c", "cosine")  # c, and how alike the gradients of model and snapshot are
FULL_GRADIENT = "full gradient"  # the bill of g̃
CORRECTION = "correction"  # the bill of ∇ℓ_B(θ̃)

DEFAULTS = AgentOptions()


class Correction(Hook):
    """Corrects gradients by a control variate with an adaptive weight (AGENT, arXiv:2301.03573).

        at a snapshot:  c ← (1 − α)·c + α·ĉ,  θ̃ ← θ,  g̃ = mean of ∇ℓ_B(θ̃) over the batches of an epoch
        every step:     ∇ℓ_B(θ) − γc·(∇ℓ_B(θ̃) − g̃)

    It comes after the hooks that use the raw gradient (RigL grows on it) and before `Masked`. Momentum sees the
    corrected gradient; weight decay is the optimiser's and is not corrected. The snapshot normalises by the statistics
    of its batches, as the model does, and keeps its running ones to itself. While c = 0, nothing is added and no
    gradient of the snapshot is computed.

    Differs from the paper: ĉ is taken from the batch losses of the steps since the last snapshot, which are there
    anyway, while θ moves; from their differences from step to step, in which that drift cancels. g̃ is over the very
    batches, augmented, that the coming epoch consists of, unless another hook supplies those. Where the model draws at
    random, as dropout does, the snapshot draws on each batch what the model drew there, m:

        every step:     ∇ℓ_B(θ; m) − γc·(∇ℓ_B(θ̃; m) − g̃)

    and g̃ is taken with draws of its own: an unbiased estimate of the snapshot's mean gradient over all draws.

    The gradients that g̃ is the mean of are those that the steps need, but for such draws. Where those of an epoch's
    corrected steps fit into ``settings.memory`` (4 bytes · parameters · steps) they are kept: a sample costs two
    gradients, not three.

    Args:
        settings: γ, α, and how often.
    """

    order = 10

    def __init__(self, settings: AgentOptions):
        self.settings = settings
        self.c = 0.0
        self.snapshot: nn.Module = nn.Identity()
        self.draws: RepeatedDraws | None = None  # of a model that draws at random
        self.full: list[Tensor] = []  # g̃, one tensor a parameter; empty while c = 0
        self.kept: dict[int, tuple[Tensor, list[Tensor]]] = {}  # ℓ_B(θ̃) and its gradient, of each step to correct
        self.losses: list[Tensor] = []  # (ℓ_B(θ), ℓ_B(θ̃)) of every corrected step since the snapshot, [2]
        self.unsummed: list[Tensor] = []  # this worker's share of the latest of them, [2] each
        self.history: list[tuple[float, ...]] = []  # ``COLUMNS`` of every corrected step

    def on_start(self, run: Run) -> None:
        """Make room for the snapshot.

        Raises:
            UserError: the model draws at random in a way that its snapshot cannot repeat.
        """
        self.snapshot = deepcopy(run.model)
        if not _draws(self.snapshot, run):
            return
        if run.settings.compile:
            raise UserError(
                "agent with a model that draws at random, as dropout does, does not go with train.compile = true: a"
                " compiled model draws by itself"
            )
        self.draws = RepeatedDraws(run.model, run.worker.device)

    def on_epoch(self, run: Run) -> None:
        """Take the epoch's snapshot, unless snapshots are taken by steps."""
        if run.step == 0 or not self.settings.snapshot_every_steps:
            with run.bill(FULL_GRADIENT):
                self._refresh(run)

    def on_gradients(self, run: Run) -> None:
        """Correct the gradients of this step, after a new snapshot where it is due."""
        interval = self.settings.snapshot_every_steps
        if interval and run.step and run.step % interval == 0:
            with run.cost.apart(run.bill(FULL_GRADIENT)):
                self._refresh(run)
        if run.step % self.settings.every_steps == 0:
            # What the snapshot draws leaves the global generators as they were.
            with run.cost.apart(run.bill(CORRECTION)), seeded(run.seed, "correction", run.step, run.worker.rank):
                self._correct(run)

    def on_epoch_end(self, run: Run) -> None:
        """Sum the losses over the workers: a checkpoint is the first worker's."""
        self._sum_losses(run)

    def close(self) -> None:
        """Stop watching the model."""
        if self.draws:
            self.draws.close()

    def results(self, run: Run) -> Results:
        """Return c and the cosine of every corrected step, with their picture."""
        columns = np.array(self.history).T
        table = pa.table(dict(zip(COLUMNS, columns, strict=True)))
        return Results(
            findings=[_finding(table)],
            tables={"correction": table},
            plots={"correction": partial(plots.correction, table.to_pylist())},
        )

    def state_dict(self) -> dict[str, Any]:
        """Return c, the losses, and what outlives an epoch where steps are counted: snapshot and full gradient."""
        state = {
            "c": self.c,
            "losses": list(self.losses),
            "history": torch.tensor(self.history, dtype=torch.float64).view(-1, len(COLUMNS)),
        }
        if self.settings.snapshot_every_steps:
            state["snapshot"] = self.snapshot.state_dict()
            state["full"] = list(self.full)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        device = next(self.snapshot.parameters()).device
        self.c = state["c"]
        self.losses = [loss.to(device) for loss in state["losses"]]
        self.history = [tuple(row) for row in state["history"].tolist()]
        if self.settings.snapshot_every_steps:
            self.snapshot.load_state_dict(state["snapshot"])
            self.full = [gradient.to(device) for gradient in state["full"]]

    def _refresh(self, run: Run) -> None:
        """Update c by the losses since the last snapshot, then θ̃ and g̃."""
        self._sum_losses(run)
        if self.losses:
            self.c = self._updated_c(run)
            self.losses = []
        with torch.no_grad():  # buffers stay: while training, batch norm uses the statistics of its batch
            for snapshot, current in zip(self.snapshot.parameters(), run.model.parameters(), strict=True):
                snapshot.copy_(current)
        self.kept = {}
        damped = self.settings.gamma * self.c
        self.full = self._full_gradient(run) if damped else []

    def _updated_c(self, run: Run) -> float:
        # θ moves between the steps, and both losses fall with it. That common drift would pass for covariance of the
        # batches; from one step to the next it is small, so the differences show the batches' own.
        current, snapshot = torch.stack(self.losses, dim=1).diff()  # [batches − 1] each
        c = smoothed(self.c, coefficient(current, snapshot), self.settings.alpha)
        first, *_ = run.worker.gather(c)  # another processor may round otherwise
        return float(first)

    def _sum_losses(self, run: Run) -> None:
        if self.unsummed:
            self.losses += run.worker.sum(torch.stack(self.unsummed))
            self.unsummed = []

    def _full_gradient(self, run: Run) -> list[Tensor]:
        """Return g̃ at the snapshot, over the samples used for training or a draw of them."""
        coreset = self._drawn(run)
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
        total = [torch.zeros_like(parameter) for parameter in _trained(run.model)]
        kept = self._steps_to_keep(run, steps, total) if coreset is run.coreset else []
        bill = run.bill(FULL_GRADIENT)
        with seeded(run.seed, "full gradient", run.step, run.worker.rank):
            for step, batch in zip(steps, batches.epoch(run.epoch), strict=True):
                loss, gradient = self._gradient(run, batch)
                torch._foreach_add_(total, gradient, alpha=1 / len(batches))
                if step in kept:
                    self.kept[step] = (loss.detach(), gradient)
                bill.forward += len(batch.y)
                bill.backward += len(batch.y)
        return _summed(run, total, bill)

    def _drawn(self, run: Run) -> Coreset:
        """Return the samples of the full gradient: those used for training, or some of them drawn anew."""
        coreset = run.coreset
        count = self.settings.samples
        if not count or count >= len(coreset):
            return coreset
        rng = generator(run.seed, "full gradient", run.step)
        drawn = torch.randperm(len(coreset), generator=rng)[:count]
        return Coreset(coreset.indices[drawn], coreset.weights[drawn])

    def _steps_to_keep(self, run: Run, steps: range, gradient: list[Tensor]) -> list[int]:
        """Return the coming epoch's steps whose gradients at the snapshot are kept: those corrected, or none.

        They can be kept only where the steps will see the same batches, with the same draws, and all of them lie before
        the next snapshot.
        """
        supplied = any(hook.supplies_batches for hook in run.hooks)
        if supplied or self.draws or self.settings.snapshot_every_steps:
            return []
        corrected = [step for step in steps if step % self.settings.every_steps == 0]
        size = len(corrected) * sum(tensor.nbytes for tensor in gradient)
        return corrected if size <= self._room(run.worker.device) else []

    def _room(self, device: torch.device) -> int:
        """Return the bytes that kept gradients may take."""
        if self.settings.memory is None and device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            return free // 4
        return memory_bound(self.settings.memory)

    def _correct(self, run: Run) -> None:
        """Correct the gradients of a step in place, and remember its two losses for the next c."""
        batch = run.batch
        bill = run.bill(CORRECTION)
        damped = self.settings.gamma * self.c
        if self.kept:
            snapshot_loss, snapshot_gradient = self.kept[run.step]
        else:
            if self.draws:
                self.draws.repeat(batch.x)
            with torch.set_grad_enabled(bool(damped)):  # while c = 0, only the loss is needed
                snapshot_loss, snapshot_gradient = self._gradient(run, batch)
            bill.forward += len(batch.y)
            bill.backward += len(batch.y) if damped else 0
        current_loss = run.seen.losses @ batch.weights / batch.total
        self.unsummed.append(torch.stack([current_loss, snapshot_loss.detach()]))
        cosine = float("nan")
        if damped:
            # DDP has averaged the model's gradient over the workers; that of the snapshot is still each worker's own.
            current_gradient = [_gradient_of(parameter) for parameter in _trained(run.model)]
            snapshot_gradient = _summed(run, snapshot_gradient, bill)
            cosine = cosine_similarity(current_gradient, snapshot_gradient)
            correct(current_gradient, snapshot_gradient, self.full, damped)
        self.history.append((run.step, self.c, cosine))

    def _gradient(self, run: Run, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Return this worker's share of ℓ_B(θ̃), and of its gradient where gradients are enabled.

        The batch goes through the snapshot in the parts in which it goes through the model.
        """
        losses = []
        total: list[Tensor] = []
        for part in batch.parts(run.settings.micro_batch):
            loss, gradient = self._gradient_of_part(run, part)
            losses.append(loss)
            total = list(torch._foreach_add(total, gradient)) if total else gradient
        return torch.stack(losses).sum(), total

    def _gradient_of_part(self, run: Run, part: Batch) -> tuple[Tensor, list[Tensor]]:
        with autocast(run.settings.precision, part.x.device):
            logits = self.snapshot(part.x)
        loss = losses_of(logits, part.y) @ part.weights / part.total
        if not loss.requires_grad:
            return loss, []
        objective = loss  # c is of plain losses, the gradient of what is trained
        if smoothing := run.settings.label_smoothing:
            objective = losses_of(logits, part.y, smoothing) @ part.weights / part.total
        gradient = torch.autograd.grad(
            objective,
            _trained(self.snapshot),
            allow_unused=True,  # layers that the forward pass does not use
            materialize_grads=True,
        )
        return loss.detach(), list(gradient)


@torch.no_grad()
def _draws(model: nn.Module, run: Run) -> bool:
    """Say whether a model draws from torch's generators in a pass over a batch; its running statistics move.

    Trying it out finds what no list of layers would: attention's own dropout, and a user's model that draws.

    Raises:
        UserError: it draws from others, which cannot be set back.
    """
    indices = run.coreset.indices[:PROBED]
    x, _ = next(plain_batches(run.split, indices, run.worker.device, len(indices), dtype_of(model)))
    model.train()
    outputs = []
    moved = False
    for _ in range(2):
        with seeded(run.seed, "probe"):
            before = states_of(run.worker.device)
            outputs.append(model(x))
            after = states_of(run.worker.device)
        moved = any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    first, second = outputs
    if not torch.allclose(first, second, equal_nan=True):
        raise UserError(
            "agent: the model gives one batch two outputs with torch's generators set back: its draws are of another"
            " kind, and it would differ from its snapshot by noise"
        )
    return moved


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _gradient_of(parameter: nn.Parameter) -> Tensor:
    """Return a parameter's gradient; zeros, which nothing reads, where the forward pass does not use it."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _summed(run: Run, tensors: list[Tensor], bill: Cost) -> list[Tensor]:
    """Return the sum of the workers' tensors, by one all-reduce."""
    if run.worker.world == 1:
        return tensors
    flat = run.worker.sum(torch.cat([tensor.flatten() for tensor in tensors]))
    bill.sent += flat.nbytes
    pieces = flat.split([tensor.numel() for tensor in tensors])
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]


def _finding(corrections: pa.Table) -> str:
    """Say in a line what the correction did."""
    c = corrections["c"].to_numpy()
    cosine = corrections["cosine"].to_numpy()
    known = cosine[np.isfinite(cosine)]
    if not len(known):
        return "AGENT corrected no step: its weight c stayed 0"
    return (
        f"AGENT corrected {len(known):,} steps; its weight c ended at {c[-1]:.3g}, and the gradients of model and"
        f" snapshot had a cosine of {known.mean():.3f} on average: see plots/correction.png"
    )


@hook("agent", source="arXiv:2301.03573")
def agent(*, job: Job, samples: Samples, options: AgentOptions = DEFAULTS) -> Correction:
    """Correct gradients by those of a snapshot of the model, with an adaptive weight (AGENT)."""
    options.check(job.samples_used(samples), job.training)
    return Correction(options)
