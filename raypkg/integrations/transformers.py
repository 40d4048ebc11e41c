"""Hugging Face's ``Trainer``: a mixin that trains on coresets, and a callback for sparse training and AGENT."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from raypkg.core.errors import UserError
from raypkg.coresets.batches import INDICES, WEIGHTS, check_keywords
from raypkg.coresets.loader import CoresetLoader
from raypkg.coresets.per_sample import sample_losses as sample_losses
from raypkg.methods.agent.correction import GradientCorrection
from raypkg.methods.crest.loader import CrestLoader
from raypkg.methods.sparse.training import SparseTraining


class CoresetMixin:
    """A mixin that goes before ``Trainer``: it trains on a ``CoresetLoader`` or a ``CrestLoader`` over the data set.

    The loss is mean(w · ℓ) with the ``sample_losses`` ℓ. Samples are mappings with "labels". Checkpoints hold the
    loader's state, so a run that is resumed from one of ``output_dir`` neither repeats nor loses a sample.

    Of a causal language model, every sample counts by its weight, however long its answer is. The ``Trainer``'s own
    loss is the mean over all answered tokens of a step, in which long answers count more. With all weights 1 and
    answers of equal lengths they are equal. In evaluation, the loss is the ``Trainer``'s.

        class CoresetTrainer(CoresetMixin, Trainer):
            pass

        CoresetTrainer(model, args, train_dataset=samples, coreset={"rule": "gradmatch", "fraction": 0.1}).train()

    Args:
        coreset: arguments of ``CoresetLoader``, or
        crest: arguments of ``CrestLoader``; batch size, epochs, collation and workers are the ``Trainer``'s.
    """

    loss_is_scaled_for_ga = False  # a mean over each micro-batch

    def __init__(
        self,
        *arguments: Any,
        coreset: Mapping[str, Any] | None = None,
        crest: Mapping[str, Any] | None = None,
        **own: Any,
    ):
        if (coreset is None) == (crest is None):
            raise UserError("CoresetMixin takes either coreset or crest")
        self.chosen: dict[str, Any] = {"coreset": coreset, "crest": crest}
        super().__init__(*arguments, **own)
        trainer: Any = self
        self.keeper = KeptState(trainer)
        trainer.add_callback(self.keeper)

    def get_train_dataloader(self) -> Any:
        """Return the loader, and keep its state in checkpoints."""
        trainer: Any = self
        plain = super().get_train_dataloader()  # type: ignore[misc]  # Trainer's
        size = trainer.args.train_batch_size
        options = {"epochs": math.ceil(trainer.args.num_train_epochs), "seed": trainer.args.seed}
        if (crest := self.chosen["crest"]) is not None:
            options |= {"collate_fn": plain.collate_fn, **crest}
            self.loader: Any = CrestLoader(plain.dataset, trainer.model, size, **options)
        else:
            names = ("collate_fn", "num_workers", "pin_memory", "prefetch_factor")
            loader = DataLoader(plain.dataset, size, **{name: getattr(plain, name) for name in names})
            self.loader = CoresetLoader(loader, trainer.model, **options | self.chosen["coreset"])
        trainer.args.ignore_data_skip = True  # the loader continues by itself
        self.keeper.kept["loader"] = self.loader
        return self.loader

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return mean(w · ℓ) in training, and the ``Trainer``'s loss otherwise."""
        if WEIGHTS not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        losses, outputs = sample_losses(model, inputs)
        if isinstance(self.loader, CoresetLoader) and INDICES in inputs:  # not at AGENT's snapshot
            self.loader.record(losses, inputs[INDICES])
        loss: Tensor = (losses * inputs[WEIGHTS]).mean()
        return (loss, outputs) if return_outputs else loss


class KeptState(TrainerCallback):
    """Keeps states of objects in the checkpoints of ``output_dir``, a file per object and rank, and restores them.

    Raises:
        UserError: a checkpoint to resume from holds no state of an object, or one of an object that is missing now.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.kept: dict[str, Any] = {}  # by name

    def file(self, args: Any, state: Any, name: str, rank: int) -> Path:
        """Return the place of an object's state on a rank."""
        return Path(args.output_dir, f"checkpoint-{state.global_step}", f"effray-{name}-{rank}.pt")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Store the states with the ``Trainer``'s."""
        for name, kept in self.kept.items():
            if name == "loader":
                kept.finish_epoch()
            torch.save(kept.state_dict(), self.file(args, state, name, args.process_index))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restore the states if training is resumed: this rank's, or the first one's."""
        if not state.global_step:
            return
        callbacks = self.trainer.callback_handler.callbacks
        used = {name for callback in callbacks if isinstance(callback, KeptState) for name in callback.kept}
        for file in self.file(args, state, "", 0).parent.glob("effray-*-0.pt"):
            if file.name.split("-")[1] not in used:
                raise UserError(f"{file} would not be restored: resume with the StepCallback and mixin that saved it")
        for name, kept in self.kept.items():
            files = [self.file(args, state, name, rank) for rank in (args.process_index, 0)]
            found = next((file for file in files if file.is_file()), None)
            if found is None:
                raise UserError(f"no {files[0]}: resume from a checkpoint of output_dir that was saved with {name}")
            kept.load_state_dict(torch.load(found, weights_only=True))
            parts = args.gradient_accumulation_steps
            left = len(kept) % parts if name == "loader" else 0
            if left and state.global_step % -(-len(kept) // parts):
                # The Trainer counts the batches of the resumed epoch from 0, so it would omit their step.
                problem = f"the last {left} batches of an epoch are no {parts} (gradient_accumulation_steps)"
                raise UserError(f"{problem}: resume from a checkpoint at the end of an epoch")


class StepCallback(KeptState):
    """Sparse training and AGENT's correction in a ``Trainer``, in their order: unscale, correct, mask, clip, step.

    It clips by ``max_grad_norm`` itself, since the ``Trainer`` would clip first. Checkpoints hold masks and snapshot.
    A ``Trainer`` without ``CoresetMixin`` that resumes from one without this callback trains densely, in silence.

        trainer.add_callback(StepCallback(trainer, sparse={"density": 0.1}))

    Args:
        trainer: trains with this callback.
        sparse: arguments of ``SparseTraining``; ``total_steps`` are the ``Trainer``'s.
        agent: arguments of ``GradientCorrection``; its loss is the ``Trainer``'s ``compute_loss``.
        batches: of all samples, on the model's device, for AGENT's snapshot at the start of each epoch. Those of a
            causal language model need "weights" of 1 for the loss of ``CoresetMixin``.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        sparse: Mapping[str, Any] | None = None,
        agent: Mapping[str, Any] | None = None,
        batches: Iterable[Any] | None = None,
    ):
        self.options = {name: given for name, given in {"sparse": sparse, "agent": agent}.items() if given is not None}
        if not self.options:
            raise UserError("StepCallback takes sparse, agent or both")
        if (agent is None) != (batches is None):
            raise UserError("StepCallback takes agent and batches together: a snapshot passes over the batches")
        check_keywords(SparseTraining, sparse or ())
        check_keywords(GradientCorrection, agent or ())
        super().__init__(trainer)
        self.kept = dict.fromkeys(self.options)  # made when training begins
        self.batches: Any = batches
        self.clip = 0.0
        self.seen: list[dict[str, Any]] = []  # micro-batches of the coming step
        self.loss = trainer.compute_loss
        if agent is not None:
            trainer.compute_loss = self._noted

    def _noted(self, model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> Any:
        if model.training:
            self.seen.append({name: value for name, value in inputs.items() if name != INDICES})  # recorded once
        return self.loss(model, inputs, *rest, **more)

    def _loss(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        with self.trainer.compute_loss_context_manager():
            return self.loss(model, dict(batch))

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Attach to model and optimiser; of a resumed training, restore masks and snapshot."""
        model, optimizer = objects["model"], objects["optimizer"]
        if (sparse := self.options.get("sparse")) is not None:
            run = {"total_steps": state.max_steps, "resumes": state.global_step > 0}
            self.kept["sparse"] = SparseTraining(model, optimizer, **run, **sparse)
        if "agent" in self.options:
            self.kept["agent"] = GradientCorrection(model, loss=self._loss, **self.options["agent"])
        super().on_train_begin(args, state, control)
        self.sparse, self.agent = self.kept.get("sparse"), self.kept.get("agent")
        self.within_epoch = state.global_step % (state.max_steps // math.ceil(args.num_train_epochs)) > 0
        self.clip, args.max_grad_norm = args.max_grad_norm, 0.0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take AGENT's snapshot, unless the epoch is resumed."""
        if self.agent and not self.within_epoch:
            self.agent.snapshot(self.batches)
        self.seen.clear()
        self.within_epoch = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Unscale, correct, mask and clip the gradients."""
        optimizer = objects["optimizer"]
        if scaler := getattr(optimizer, "scaler", None):
            scaler.unscale_(optimizer.optimizer)
        if self.agent:
            self.agent.correct(lambda snapshot: (self._loss(snapshot, batch) / len(self.seen) for batch in self.seen))
            self.seen.clear()
        if self.sparse:
            self.sparse.mask_gradients()
        if self.clip:
            torch.nn.utils.clip_grad_norm_(objects["model"].parameters(), self.clip)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Detach from the optimiser; pruned weights are zero."""
        if self.sparse:
            self.sparse.finalize()
        args.max_grad_norm = self.clip
