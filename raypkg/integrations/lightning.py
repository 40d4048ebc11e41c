"""Lightning: callbacks for coresets that resume within an epoch, for sparse training and for AGENT."""

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Callback

from raypkg.coresets.batches import check_keywords
from raypkg.methods.agent.correction import GradientCorrection
from raypkg.methods.sparse.training import SparseTraining


class CoresetCallback(Callback):
    """Lets a ``CoresetLoader`` or a ``CrestLoader``, as the training data of a fit, resume at any step.

    Lightning keeps the loader's state, but requests no batch beyond the last of an epoch, so the loader has to be told.
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin the next epoch if a checkpoint is from the end of one."""
        trainer.train_dataloader.finish_epoch()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Finish the epoch, before checkpoints are saved."""
        trainer.train_dataloader.finish_epoch()


class SparseCallback(Callback):
    """``SparseTraining`` in Lightning, between unscaling and clipping; its masks are kept in checkpoints.

    Lightning only warns of a checkpoint with this callback that is resumed without it: training is dense then.

    Args:
        density: share of the weights that exist.
        options: further arguments of ``SparseTraining``; ``total_steps`` are by default Lightning's estimate.
    """

    def __init__(self, density: float = 0.05, **options: Any):
        self.options = {"density": density, **options}
        check_keywords(SparseTraining, self.options)
        self.restored: Mapping[str, Any] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the optimiser; of a resumed training, restore the masks."""
        run = {"total_steps": trainer.estimated_stepping_batches, "resumes": self.restored is not None}
        self.sparse = SparseTraining(pl_module, trainer.optimizers[0], **run | self.options)
        if self.restored:
            self.sparse.load_state_dict(self.restored)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Mask the gradients; Lightning has unscaled them and clips them next."""
        self.sparse.mask_gradients()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Detach from the optimiser; pruned weights are zero."""
        self.sparse.finalize()

    def state_dict(self) -> dict[str, Any]:
        """Return the masks for a checkpoint."""
        return self.sparse.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the masks of a checkpoint for the start of training."""
        self.restored = state_dict


class AgentCallback(Callback):
    """``GradientCorrection`` in Lightning, between unscaling and clipping; it stands before ``SparseCallback``.

    Args:
        agent: of the module's model; its loss is that of ``training_step``, for a model and a batch.
        batches: of all samples, on the model's device, for the snapshot at the start of each epoch.
    """

    def __init__(self, agent: GradientCorrection, batches: Iterable[Any]):
        self.agent = agent
        self.batches = batches
        self.seen: list[Any] = []  # micro-batches of the coming step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Take a snapshot before the first batch of an epoch, and note a micro-batch."""
        if batch_idx == 0:  # Lightning calls on_train_epoch_start in no epoch that begins by resuming
            self.agent.snapshot(self.batches)
        self.seen.append(batch)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Correct the gradients; Lightning has unscaled them and clips them next."""
        agent, parts = self.agent, trainer.accumulate_grad_batches
        agent.correct(lambda snapshot: (agent.loss(snapshot, batch) / parts for batch in self.seen))
        self.seen.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the snapshot for a checkpoint."""
        return self.agent.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the snapshot."""
        self.agent.load_state_dict(state_dict)
