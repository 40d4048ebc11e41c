"""The merge of LiPT's models, which any number of workers hold, into one."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.core.seeds import generator, seeded
from raypkg.engine.batches import dtype_of, plain_batches
from raypkg.engine.costs import Cost
from raypkg.engine.loop import autocast
from raypkg.methods.lipt.batchnorm import reestimate
from raypkg.methods.lipt.merges import merge
from raypkg.methods.lipt.soup import Member, State
from raypkg.phases.training import measure_held_out

from .member import Context

STATISTICS_SAMPLES = 2048  # enough for the batch-norm statistics of a merged model


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
    others = worker.world > 1  # to whom anything is sent

    def total(tensor: Tensor) -> Tensor:
        cost.sent += tensor.nbytes * others
        return worker.sum(tensor)

    def gather(members: Sequence[Member]) -> list[Member]:
        tensors = chain.from_iterable((*member.parameters.values(), *member.masks.values()) for member in members)
        cost.sent += sum(tensor.nbytes for tensor in tensors) * others
        by_worker = worker.gather(members)
        return [by_worker[number % worker.world][number // worker.world] for number in range(settings.models)]

    def score(parameters: State) -> float:
        model = context.model()
        model.load_state_dict(parameters, strict=False)
        cost.forward += estimate_statistics(context, model)
        bill = Cost("evaluate")  # its seconds are the merge's already
        measured = measure_held_out(model, context.samples, context.alone, settings, bill)
        cost.forward += bill.forward
        return measured["accuracy"]

    merged = merge[settings.merge](initial, members, total=total, gather=gather, score=score)
    if {name: w.shape for name, w in merged.items()} != {name: w.shape for name, w in initial.items()}:
        raise UserError(f"pretrain.merge = {settings.merge!r} returned other parameters or shapes than {[*initial]}")
    return merged


def estimate_statistics(context: Context, model: nn.Module) -> int:
    """Estimate batch-norm statistics anew on a random part of the training samples; return how many it has."""
    kept = context.samples.kept
    seed = context.settings.seed
    device = context.worker.device
    order = torch.randperm(len(kept), generator=generator(seed, "statistics"))
    indices = kept[order[:STATISTICS_SAMPLES]]
    batches = plain_batches(context.samples.data.train, indices, device, min(256, len(indices)), dtype_of(model))
    with autocast(context.settings.pretrain.precision, device), seeded(seed, "statistics dropout"):
        return reestimate(model, (x for x, _ in batches))
