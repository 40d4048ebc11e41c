"""What only a GPU shows: the same training as on a processor, NCCL, shared batch statistics, bfloat16, and memory."""

import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist

from raypkg.core.settings import Train, Training
from raypkg.coresets.gradients import head_view
from raypkg.data.augment import compose
from raypkg.data.coreset import Coreset
from raypkg.data.split import Split
from raypkg.engine.batches import MOST_AHEAD, dtype_of, plain_batches, to_device, training_batch
from raypkg.engine.loop import autocast, evaluate, fit
from raypkg.engine.run import Run
from raypkg.engine.worker import Worker, computes_bfloat16, peak_of
from raypkg.experiments.training import synchronised
from raypkg.models import build_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are fewer than two GPUs")
ampere = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
CUDA = torch.device("cuda")
N, C = 256, 4


def images():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (N, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return Split.from_tensors(x, torch.arange(N) % C, augment=("crop", "flip"))


def trained(device, precision, model="resnet8", epochs=2, **settings):
    split = images()
    network = build_model(model, split.shape, C, seed=0)
    settings = Training(epochs=epochs, batch_size=64, precision=precision, lr=0.01, **settings)
    return fit(Run.simple(network, split, settings, worker=Worker(device=device)))


def parameters(run):
    return {name: weight.detach().cpu() for name, weight in run.model.named_parameters()}


def test_it_trains_what_a_processor_trains():
    ours, theirs = parameters(trained(CUDA, "float64")), parameters(trained(torch.device("cpu"), "float64"))
    for name, weight in theirs.items():
        assert torch.allclose(ours[name], weight, rtol=0, atol=1e-8), name


def test_the_bill_has_the_memory_of_the_gpu_and_the_operations_of_one_of_known_peak():
    (bill, *_) = trained(CUDA, "float32", epochs=1).bills()
    assert 0 < bill.device_memory == torch.cuda.max_memory_allocated()
    assert bill.peak == peak_of(CUDA, Training(precision="float32"))
    assert 0 <= bill.operations <= bill.peak * bill.total_seconds and bool(bill.operations) == bool(bill.peak)


def test_a_deterministic_training_gives_the_same_bits_again():
    ours, again = (parameters(trained(CUDA, "auto", deterministic=True)) for _ in range(2))
    assert all(weight.equal(again[name]) for name, weight in ours.items())


@pytest.mark.skipif(not ampere, reason="the GPU has no TF32")
def test_tf32_rounds_products_and_plain_float32_does_not():
    exact, plain, rounded = (
        parameters(trained(CUDA, precision, epochs=1, tf32=tf32))
        for precision, tf32 in (("float64", False), ("float32", False), ("float32", True))
    )
    errors = [
        sum((each[name].double() - w).abs().sum().item() for name, w in exact.items()) for each in (plain, rounded)
    ]
    assert 10 * errors[0] < errors[1]


def test_bfloat16_is_used_where_it_is_computed():
    model = build_model("resnet8", (3, 16, 16), C, seed=0).to(CUDA)
    with autocast("auto", CUDA):
        logits = model(torch.randn(2, 3, 16, 16, device=CUDA))
    expected = torch.bfloat16 if computes_bfloat16(CUDA) else torch.float32
    assert logits.dtype == expected
    exact, rounded = (
        evaluate(trained(CUDA, p).model, images(), worker=Worker(device=CUDA)) for p in ("float32", "auto")
    )
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.05)


def test_copies_are_pinned_and_complete():
    x = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)
    moved = to_device(x, CUDA)
    assert moved.device.type == "cuda" and torch.equal(moved.cpu(), x)
    samples = Coreset.uniform(torch.arange(64))
    augment = compose(["crop", "flip"])
    draws = torch.rand(64, augment.draws, generator=torch.Generator().manual_seed(1))
    batches = [training_batch(images(), samples, augment, draws, Worker(device=d)) for d in (CUDA, torch.device("cpu"))]
    for ours, theirs in zip(*batches, strict=True):
        if isinstance(ours, torch.Tensor):
            assert torch.allclose(ours.cpu(), theirs, atol=1e-6)


def test_pinned_buffers_are_reused():
    x = torch.zeros(64, 3, 16, 16, dtype=torch.uint8)
    for _ in range(MOST_AHEAD):
        to_device(x, CUDA)
    torch.cuda.synchronize()
    pinned = torch.cuda.host_memory_stats()["num_host_alloc"]
    for _ in range(100):
        to_device(x, CUDA)
        torch.cuda.synchronize()
    assert torch.cuda.host_memory_stats()["num_host_alloc"] == pinned


def test_views_leave_the_gpu_and_take_a_batch_of_it():
    split, model = images(), build_model("resnet8", (3, 16, 16), C, seed=0).to(CUDA)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    view = head_view(model, plain_batches(split, torch.arange(N), CUDA, 32, dtype_of(model)))
    assert view.logits.device.type == view.features.device.type == "cpu" and len(view) == N
    one = torch.cuda.max_memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    head_view(model, plain_batches(split, torch.arange(N).repeat(8), CUDA, 32, dtype_of(model)))
    waiting = MOST_AHEAD * 32 * 3 * 16 * 16 * (1 + 4)  # bytes of batches as pixels and as numbers
    assert torch.cuda.max_memory_allocated() - before <= 1.2 * one + waiting  # however many samples there are


def _in_group(rank, world, port, queue):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group("nccl", rank=rank, world_size=world)
    worker = Worker(rank, world, device)
    total = worker.sum(torch.full((3,), float(rank + 1)))  # a tensor of the host goes there and back
    network = build_model("resnet8", (3, 16, 16), C, seed=0)
    model = synchronised(network, Train(sync_bn=True), worker)
    settings = Training(epochs=1, batch_size=64, precision="float64", lr=0.01)
    run = fit(Run.simple(model, images(), settings, worker=worker))
    if rank == 0:
        queue.put((total.tolist(), {name: weight.numpy() for name, weight in parameters(run).items()}))
    dist.destroy_process_group()


def in_group(world):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    port = 29_500 + os.getpid() % 1000
    processes = [context.Process(target=_in_group, args=(rank, world, port, queue)) for rank in range(world)]
    for process in processes:
        process.start()
    results = queue.get(timeout=240)
    for process in processes:
        process.join()
    return results


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=two_gpus)])
def test_workers_sum_by_nccl_and_train_with_shared_statistics_what_one_does(world):
    total, ours = in_group(world)
    assert total == [world * (world + 1) / 2] * 3
    for name, weight in parameters(trained(CUDA, "float64", epochs=1)).items():
        assert torch.allclose(torch.from_numpy(ours[name]), weight, rtol=0, atol=1e-7), name
