"""LiPT in a script of one's own: pre-train a model as an ensemble on shards of the data, and merge it."""

import tempfile
from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset, default_collate

from raypkg.cluster.workers import Workers
from raypkg.core.config import fields_of, validate
from raypkg.core.errors import UserError, as_arguments
from raypkg.core.seeds import seeded
from raypkg.core.settings import Cluster
from raypkg.coresets.batches import as_dataset, check_keywords, load_batches
from raypkg.data.split import Split
from raypkg.engine.worker import Worker
from raypkg.experiments.samples import Samples
from raypkg.models.classifier import in_mode, probe

from .pretrain import Context, train_and_merge
from .settings import LiptSettings, Pretrain

AT_ONCE = 1024  # samples read together for their labels
MOST_CLASSES = 1 << 20  # as many as a layer of effray's models is wide at most
OF_RUNS = {"method", "joint_epochs", "evaluate_every_epochs", "compile"}  # settings of effray's own runs
Labelled = Split | Dataset[Any] | tuple[Tensor, Tensor]


@as_arguments("pretrain")
def pretrain(
    model: nn.Module,
    dataset: Labelled,
    models: int = 10,
    epochs: int = 5,
    workers: int = 0,
    *,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """Return a copy of a model, pre-trained as an ensemble on disjoint shards and merged (LiPT, PMLR 202:29130).

    The k models start from the given weights w0. Model i trains on its own class-stratified shard under its own random
    mask m_i, and w = Σ_i m_i ⊙ w_i / Σ_i m_i, w0 where no mask has a weight. This is the pre-training of `effray lipt`,
    reconstructed: same settings, same weights. The given model is not changed.

    Args:
        model: any module, x [b, …] → logits [b, C].
        dataset: pairs (x, y) by index, or tensors x [n, …] and y int64 [n]; x are float rows [D] or images [C, H, W],
            trained on as they come. Random augmentation of the data set's own is not seeded. Or a `Split`, normalised
            and augmented as in effray's runs.
        models: k, each with n/k samples; every shard needs samples of each class.
        epochs: passes of each model over its shard.
        workers: Ray workers, which train the models in parallel; 0 = this process, on the model's device. Workers
            import the model's class and open the data by themselves.
        seed: of masks, shards and batches.
        options: ``pretrain.*`` of `effray lipt`: batch_size (32), lr (0.1), density (0.05), sparsity ("snip"; None =
            dense models), merge ("masked_mean"), rounds (1), precision, …

    Raises:
        UserError: unknown or invalid argument, samples of another form, a model without weights to train or with fewer
            outputs than classes, a shard without a class, a loss that diverges.

    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(400, 4)
    >>> merged = pretrain(nn.Linear(4, 2), (x, (x[:, 0] > 0).long()), models=4, epochs=10, density=0.5)
    >>> (merged(x).argmax(1) == (x[:, 0] > 0)).double().mean().item() > 0.9
    True
    """
    check_keywords(pretrain, options, fields_of(Pretrain).keys() - OF_RUNS)
    # The caller may have switched gradients off, and data sets may draw from PyTorch's global generator.
    with torch.inference_mode(False), torch.enable_grad(), seeded(0, "lipt.pretrain"):
        split = as_split(dataset)
        if split is not dataset and options.setdefault("randaugment", False):
            raise UserError("randaugment = True: only the uint8 images of a Split are augmented")
        chosen = validate(Pretrain, {**options, "models": models, "epochs": epochs})
        settings = validate(LiptSettings, {"seed": seed, "pretrain": chosen})
        cluster = validate(Cluster, {"workers": workers})
        merged = deepcopy(model)
        kind = type(model).__name__
        if not isinstance(model, nn.Module) or not any(each.requires_grad for each in model.parameters()):
            raise UserError(f"lipt.pretrain takes an nn.Module with parameters that require gradients, not this {kind}")
        weight = next(merged.parameters())
        stored, _ = split.batch(torch.arange(min(2, len(split))))
        x = split.inputs(stored.to(weight.device))
        with in_mode(merged, training=False):
            probe(merged, kind, x.to(weight.dtype) if x.is_floating_point() else x, split.num_classes, exact=False)
        if workers:
            with tempfile.TemporaryDirectory() as folder, Workers(cluster, lambda row: None, folder) as group:
                saved = group.run(pretrain_given, settings, merged, split)
        else:
            saved = pretrain_given(Worker(device=weight.device), settings, merged, split)
        merged.load_state_dict(load(saved))
        return merged


def pretrain_given(worker: Worker, settings: LiptSettings, model: nn.Module, split: Split) -> bytes:
    """Pre-train a model on all workers; return the merged one's state as safetensors."""
    merged, *_ = train_and_merge(Context(settings, None, Samples.all_of(split), worker, given=model))
    # Copies, because safetensors refuses weights that share memory, such as tied ones.
    state = {
        name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in merged.state_dict().items()
    }
    return save(state)


def as_split(dataset: Labelled) -> Split:
    """Return samples as a split that hands them out as they are, in float32; all are read once for the labels.

    Raises:
        UserError: no pairs (x, y), x are neither rows nor images, or labels are not integers from 0 up.
    """
    if isinstance(dataset, Split):
        return dataset
    pairs = as_dataset(dataset, "lipt.pretrain")
    if not len(pairs):  # type: ignore[arg-type]  # it has a length
        raise UserError("lipt.pretrain takes at least one sample; the data set is empty")
    positions = torch.arange(len(pairs)).split(AT_ONCE)  # type: ignore[arg-type]
    batches = load_batches(pairs, positions, seed=0, collate_fn=default_collate)
    y = torch.cat([labels.cpu() for _, labels, _ in batches])
    if (classes := int(y.max()) + 1) > MOST_CLASSES:
        raise UserError(f"lipt.pretrain takes labels below {MOST_CLASSES}; the largest is {classes - 1}")
    if isinstance(pairs[0], Mapping):
        raise UserError("lipt.pretrain takes samples (x, y), not mappings")
    example = torch.as_tensor(pairs[0][0])
    if example.dim() not in (1, 3) or not example.is_floating_point():
        given = f"{example.dtype} {list(example.shape)}"
        raise UserError(f"lipt.pretrain takes float rows [D] or images [C, H, W], or a Split; a sample is {given}")
    channels = example.shape[0]
    std = 1.0 if example.dim() == 1 else 1 / 255  # the moments of images are in units of 1/255
    return Split(
        take=partial(_take, pairs),
        y=y,
        classes=tuple(str(label) for label in range(classes)),
        shape=tuple(example.shape),
        mean=(0.0,) * channels,
        std=(std,) * channels,
    )


def _take(pairs: Dataset[Any], rows: np.ndarray) -> np.ndarray:
    """Gather float32 samples, images as [b, H, W, C]."""
    if isinstance(pairs, TensorDataset):
        x = pairs.tensors[0][torch.from_numpy(rows)]
    else:
        x = torch.stack([torch.as_tensor(pairs[row][0]) for row in rows.tolist()])
    stored = x.movedim(1, -1) if x.dim() == 4 else x
    return stored.float().contiguous().numpy(force=True)
