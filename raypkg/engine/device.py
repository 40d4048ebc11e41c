"""A device in training: its modes of arithmetic, which a run restores, its peak throughput, and a trace of steps."""

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from raypkg.core.errors import UserError
from raypkg.core.settings import Training
from raypkg.data.split import Split
from raypkg.models.operations import forward_flops

from .batches import Batch

# 10¹² operations a second of dense products, by NVIDIA's data sheets: bfloat16, TF32, float32, float64. A name
# precedes those that it contains. Other devices, such as parts of a GPU (MIG), are unknown.
PEAKS = {
    r"H100 PCIe": (756, 378, 51, 51),
    r"H[12]00 NVL": (835, 417, 60, 60),
    r"H[12]00": (989, 494, 67, 67),
    r"A100": (312, 156, 19.5, 19.5),
    r"A10": (125, 62.5, 31.2, 0),
    r"L40S": (362, 183, 91.6, 0),
    r"L4": (121, 60, 30.3, 0),
}
TRACE = "trace.json.gz"
TRACED = 10  # steps
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACE = ":4096:8"  # with a workspace per stream cuBLAS sums in one order


def computes_bfloat16(device: torch.device) -> bool:
    """Return True if the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def peak_of(device: torch.device, settings: Training) -> float:
    """Return a device's peak, operations a second in the precision of the settings; 0 if it is unknown.

    >>> peak_of(torch.device("cpu"), Training())
    0.0
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peaks = next((peaks for part, peaks in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)
    if peaks is None or "MIG" in name:
        return 0.0
    precision = settings.precision
    if precision == "auto":
        precision = "bfloat16" if computes_bfloat16(device) else "float32"
    kind = "tf32" if settings.tf32 else precision
    return 1e12 * peaks[("bfloat16", "tf32", "float32", "float64").index(kind)]


def training_flops(model: nn.Module, split: Split) -> float:
    """Return the operations of training per number of its input: those of the forward and of the backward pass.

    The gradients of the inputs cost a forward pass, those of trained weights another one (arXiv:2204.02311, appendix
    B). The numbers are those of a sample of the longest kind: shorter texts cost in proportion.

    >>> split = Split.from_tensors(torch.arange(12.0).view(6, 2), torch.arange(6) % 2)
    >>> training_flops(nn.Linear(2, 2), split)
    12.0
    """
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    counts = forward_flops(model, split.shape)
    total = sum(count * (2 if name in frozen else 3) for name, count in counts.items())
    return total / split.kind.example(1, split.shape).numel()


@contextmanager
def arithmetic(settings: Training, device: torch.device, *, fixed_shapes: bool) -> Iterator[None]:
    """Compute in the modes of the settings inside the block; restore those of the process.

    Raises:
        UserError: TF32 without a GPU that has it, or an operation without a deterministic form.
    """
    deterministic = settings.deterministic
    if settings.tf32 and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise UserError(f"train.tf32 = true: {device.type} has no TF32, a GPU of compute capability 8.0 or more has")
    cudnn = torch.backends.cudnn
    modes = [
        (torch.backends.cuda.matmul, "allow_tf32", settings.tf32),
        (cudnn, "allow_tf32", settings.tf32),
        (cudnn, "deterministic", deterministic),
        (cudnn, "benchmark", fixed_shapes and not deterministic),  # the fastest algorithm for each shape, by trials
    ]
    modes = modes if device.type == "cuda" else []
    before = [getattr(place, name) for place, name, _ in modes]
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get(CUBLAS)
    try:
        for place, name, value in modes:
            setattr(place, name, value)
        if deterministic:
            os.environ.setdefault(CUBLAS, WORKSPACE)
            torch.use_deterministic_algorithms(True)
        yield
    except RuntimeError as error:  # PyTorch has no type for it
        if deterministic and "determinis" in str(error):
            raise UserError(f"train.deterministic = true: {str(error).partition('. ')[0]}") from error
        raise
    finally:
        for (place, name, _), value in zip(modes, before, strict=True):
            setattr(place, name, value)
        if deterministic:  # PyTorch imports its compiler to change the mode
            torch.use_deterministic_algorithms(was_deterministic, warn_only=only_warns)
            if workspace is None:
                os.environ.pop(CUBLAS)


def traced(batches: Iterator[Batch], device: torch.device, store: Callable[[bytes], None]) -> Iterator[Batch]:
    """Yield batches; ``store`` receives PyTorch's trace of the first steps, a compressed file for Chrome's viewer."""
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == "cuda")]
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=activities) as trace:
            yield from islice(batches, TRACED)
        path = Path(folder, TRACE)
        trace.export_chrome_trace(str(path))
        store(path.read_bytes())
    yield from batches
