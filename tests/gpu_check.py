"""What works on a GPU, with figures, as a table: about eight minutes, without Ray.

    python tests/gpu_check.py --cifar10 parquet:path/to/cifar10
    python tests/gpu_check.py --device cpu --quick        # every check on tiny samples, also without a GPU

Without a data set airbench is left out, and images are noise. Times are medians of 5 rounds after a first one.
The exit code is 1 if a check failed, 2 without a GPU.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from raypkg import DeltaGrad, Run, Split, build_model, fit, load_data
from raypkg.core.config import load_settings, read_toml
from raypkg.core.settings import Training
from raypkg.coresets.budgets import select
from raypkg.coresets.sharded import LiveModel
from raypkg.data import Data
from raypkg.data.coreset import Coreset
from raypkg.engine.loop import autocast
from raypkg.engine.shards import Shard
from raypkg.engine.worker import CPU, Worker
from raypkg.experiments.train import TrainSettings
from raypkg.experiments.training import Job, train_model
from raypkg.methods.agent.hook import Correction
from raypkg.methods.agent.settings import AgentOptions
from raypkg.methods.crest.hook import Crest
from raypkg.methods.crest.settings import CrestOptions
from raypkg.runs.storage import Storage

ROOT = Path(__file__).parents[1]


class Checks:
    """The device, the samples and the sizes of all checks."""

    def __init__(self, device, path, quick):
        self.device, self.path, self.quick = torch.device(device), path, quick
        n, side, self.batch = (256, 16, 32) if quick else (50_000, 32, 512)
        self.steps, self.rounds = (2, 1) if quick else (40, 5)
        self.large, self.small = ("resnet8", "resnet8") if quick else ("resnet18", "resnet20")
        pixels = torch.randint(256, (n, 3, side, side), dtype=torch.uint8)
        noise = Split.from_tensors(pixels, torch.arange(n) % 10, augment=("crop", "flip"))
        self.data = load_data(path) if path else Data(noise, noise)
        self.model = partial(build_model, shape=self.data.train.shape, num_classes=10, seed=0)
        self.indices = torch.arange(len(self.data.train))
        self.shard = Shard(self.data, self.indices, self.indices[:0], self.device)

    def now(self):
        """Return the time once the device has done all its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, work):
        """Return the seconds of some work, the median of the rounds after the first."""
        taken = []
        for _ in range(1 + self.rounds):
            start = self.now()
            work()
            taken.append(self.now() - start)
        return statistics.median(taken[1:])

    def trained(self, name, hooks=(), **training):
        """Return the seconds of an epoch of our loop, of ``steps`` batches, and its last loss."""
        few = Coreset.uniform(self.indices[: self.steps * self.batch])
        settings = Training(epochs=1 + self.rounds, batch_size=self.batch, lr=0.01, **training)
        worker = Worker(device=self.device)
        run = Run.simple(self.model(name), self.data.train, settings, coreset=few, hooks=hooks, worker=worker)

        def epoch():
            run.last = run.epoch + 1
            fit(run)

        return self.seconds(epoch), run.rows[-1]["loss"]

    def tests(self):
        """Run the tests that need a GPU."""
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py", "tests/test_agent.py"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        yield "tests that need a GPU", (done.stdout.splitlines() or [done.stderr])[-1].strip("= "), ""
        done.check_returncode()

    def airbench(self):
        """Time the recipe's way to 92 % and 94 % of the held-out images, with an evaluation after each epoch."""
        if not self.path and not self.quick:
            return  # noise has no accuracy
        given = {"dataset": self.path or "digits", "train.evaluate_every_epochs": 1}
        if self.quick:
            given |= {"model": "mlp", "train.epochs": 1, "dataset.augment": []}
        settings = load_settings(TrainSettings, read_toml(ROOT / "raypkg/models/airbench.toml"), given)
        start, epochs = self.now(), []
        worker = Worker(device=self.device, report=lambda row: epochs.append((self.now() - start, row["accuracy"])))
        with tempfile.TemporaryDirectory() as folder:
            record = train_model(worker, Job(settings, settings.train, Storage(folder)))
        for percent in (92, 94):
            reached = (f"{seconds:.1f} s" for seconds, accuracy in epochs if accuracy >= percent / 100)
            yield f"airbench, to {percent} % held out", next(reached, "not reached"), ""
        yield "airbench, test accuracy", f"{record['test_accuracy']:.2%}", "94 % in arXiv:2404.00498"

    def throughput(self):
        """Compare our loop, whose images come from the host and are augmented, with a plain loop over one batch."""
        for precision in ("bfloat16", "float32"):
            seconds, loss = self.trained(self.large, precision=precision, compile=not self.quick)
            model = self.model(self.large).to(self.device).to(memory_format=torch.channels_last)
            compiled = torch.compile(model, backend="eager" if self.quick else "inductor")
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, fused=True)
            pixels, y = (tensor.to(self.device) for tensor in self.data.train.batch(self.indices[: self.batch]))
            x = self.data.train.inputs(pixels)

            def epoch(kind=precision, forward=compiled, optimizer=optimizer, x=x, y=y):
                for _ in range(self.steps):
                    with autocast(kind, self.device):
                        output = forward(x)
                    F.cross_entropy(output.float(), y).backward()
                    optimizer.step()
                    optimizer.zero_grad()

            rate, plain = (self.steps * self.batch / each for each in (seconds, self.seconds(epoch)))
            beside = f"{plain:,.0f} in a plain compiled loop, {rate / plain:.2f} ×; loss {loss:.4f}"
            yield f"{self.large}, {precision}", f"{rate:,.0f} images/s", beside

    def methods(self):
        """Measure steps of AGENT and CREST beside plain ones."""
        crest = Crest(CrestOptions(), self.indices, self.batch)
        crest.steps = self.steps
        agent = Correction(AgentOptions(form="measured", always=True))
        plain, _ = self.trained(self.small)
        yield f"{self.small}", f"{1e3 * plain / self.steps:.2f} ms a step", ""
        for name, hook in (("AGENT", agent), ("CREST", crest)):
            seconds, _ = self.trained(self.small, [hook])
            beside = f"{seconds / plain:.2f} plain ones"
            yield f"{self.small}, {name}", f"{1e3 * seconds / self.steps:.2f} ms a step", beside

    def selection(self):
        """Select a tenth of the samples, class by class, on the device and on the CPU."""
        start = self.now()
        view = LiveModel(self.model(self.small).to(self.device), "auto").view(self.shard, self.indices)
        yield f"view of {len(view):,} images", f"{self.now() - start:.2f} s", ""
        for rule in ("gradmatch", "gradmatchpb", "craig", "glister", "kcenter", "d2", "gm"):
            seconds, picks = [], []
            for device in (self.device, CPU):
                start = self.now()
                picks.append({*select(view, len(view) // 10, rule, seed=0, device=device).indices.tolist()})
                seconds.append(self.now() - start)
            same = len(picks[0] & picks[1]) / len(picks[0])
            beside = f"{seconds[1]:.2f} s on the CPU, {same:.0%} of the picks the same"
            yield f"select, {rule}", f"{seconds[0]:.2f} s", beside

    def deltagrad(self):
        """Replay DeltaGrad, which computes in float64 on the CPU, beside training."""
        n, width = (500, 10) if self.quick else (60_000, 784)
        start = self.now()
        model = DeltaGrad().fit(np.random.default_rng(0).random((n, width)), np.arange(n) % 10)
        middle = self.now()
        model.delete([*range(n // 500)])
        replayed = self.now() - middle
        beside = f"{middle - start:.2f} s to train and record; distance {model.verify():.1e}"
        yield "DeltaGrad, 0.2 % deleted", f"{replayed:.2f} s", beside


def main():
    """Run all checks and print a row for each figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar10", help="the data set, such as parquet:PATH")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny samples")
    given = parser.parse_args()
    if (on_gpu := given.device == "cuda") and not torch.cuda.is_available():
        print("there is no GPU: python tests/gpu_check.py --device cpu --quick runs every check on tiny samples")
        return 2
    checks, failed = Checks(given.device, given.cifar10, given.quick), False
    print(f"{torch.cuda.get_device_name() if on_gpu else given.device}, PyTorch {torch.__version__}\n")
    print(f"{'what':<28}{'figure':<26}{'beside':<64}peak MiB")
    for name in ("tests", "airbench", "throughput", "methods", "selection", "deltagrad"):
        try:
            for what, figure, beside in getattr(checks, name)():
                peak = f"{torch.cuda.max_memory_allocated() / 2**20:,.0f}" if on_gpu else "-"
                print(f"{what:<28}{figure:<26}{beside:<64}{peak}", flush=True)
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats()
        except Exception as error:
            failed = True
            print(f"{name:<28}FAILED: {type(error).__name__}: {error}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
