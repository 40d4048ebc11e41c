"""The merge of LiPT's models, which any number of workers hold, into one."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.core.seeds import seeded
from raypkg.engine.batches import dtype_of, plain_batches
from raypkg.engine.costs import Cost
from raypkg.engine.loop import autocast
from raypkg.experiments.training import measure_held_out
from raypkg.methods.lipt.batchnorm import reestimate
from raypkg.methods.lipt.merges import merge
from raypkg.methods.lipt.soup import Member, State

from .member import Context


def merged_parameters(context: Context, initial: State, members: Sequence[Member], cost: Cost) -> State:
    """Merge the models of all workers by the rule that the settings name.

    Args:
        context: of this worker.
        initial: w0, the parameters that all models started from.
        members: the models of this worker.
        cost: takes the samples that the rule needs, and the bytes that it sends.

    Raises:
        UserError: the user's own merge returned parameters that are not the model's.
    """
    worker = context.worker
    settings = context.settings.pretrain

    def total(tensor: Tensor) -> Tensor:
        if worker.world > 1:
            cost.sent += tensor.nbytes
        return worker.sum(tensor)

    def gather(members: Sequence[Member]) -> list[Member]:
        if worker.world > 1:
            cost.sent += sum(member.nbytes for member in members)
        by_worker = worker.gather(members)
        everyone = []
        for number in range(settings.models):  # worker r of W trained models r, r + W, …
            theirs = by_worker[number % worker.world]
            everyone.append(theirs[number // worker.world])
        return everyone

    def score(parameters: State) -> float:
        model = context.model()
        model.load_state_dict(parameters, strict=False)  # they are without batch-norm statistics
        cost.forward += estimate_statistics(context, model)
        bill = Cost("evaluate")  # its seconds are the merge's already
        measured = measure_held_out(model, context.samples, context.alone, settings, bill)
        cost.forward += bill.forward
        return measured["accuracy"]

    rule = merge[settings.merge]
    merged = rule(initial, members, total=total, gather=gather, score=score)
    if _shapes(merged) != _shapes(initial):
        raise UserError(f"pretrain.merge = {settings.merge!r} returned other parameters or shapes than {[*initial]}")
    return merged


def estimate_statistics(context: Context, model: nn.Module) -> int:
    """Estimate batch-norm statistics anew on a random part of the training samples; return how many it has."""
    seed = context.settings.seed
    device = context.worker.device
    split, indices = context.statistics_samples
    batch_size = min(256, len(indices))
    batches = plain_batches(split, indices, device, batch_size, dtype_of(model))
    precision = context.settings.pretrain.precision
    with autocast(precision, device), seeded(seed, "statistics dropout"):
        return reestimate(model, (x for x, _ in batches))


def _shapes(state: State) -> dict[str, torch.Size]:
    return {name: w.shape for name, w in state.items()}
