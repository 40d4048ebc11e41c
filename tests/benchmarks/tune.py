"""CPU seconds of `effray tune` and of a bare Ray Tune with reused actors: the same small trainings, two at a time.

    python tests/benchmarks/tune.py                  # 8 and 24 trials, all processes summed
    python tests/benchmarks/tune.py --rounds 3

The bare one trains and measures by a loop of its own: it keeps no run folders, checkpoints, figures or plots.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress

import psutil

EPOCHS = 3
OPTIONS = f"--model mlp --train.epochs {EPOCHS} --scheduler fifo --concurrent 2 --cluster.workers 0"


def ours(trials: int) -> None:
    """Run a sweep."""
    from raypkg.cli import main

    main(["tune", "train", "--samples", str(trials), *OPTIONS.split()])


def bare(trials: int) -> None:
    """Run the trials by Tune alone."""
    from raypkg.cluster.session import connect, prepare

    prepare()
    import torch
    from ray import tune
    from torch.nn.functional import cross_entropy

    from raypkg import build_model, load_data
    from raypkg.core.settings import Cluster

    class Bare(tune.Trainable):
        def setup(self, config):
            torch.set_num_threads(1)
            train, self.test = load_data("digits")
            self.train_set, self.model = train, build_model("mlp", train.shape, train.num_classes, seed=0)
            self.optimizer = torch.optim.SGD(self.model.parameters(), config["lr"], momentum=0.9, nesterov=True)
            self.epoch = 0

        def step(self):
            for rows in torch.randperm(len(self.train_set)).split(128):
                x, y = self.train_set.batch(rows)
                self.optimizer.zero_grad()
                cross_entropy(self.model(self.train_set.inputs(x)), y).backward()
                self.optimizer.step()
            x, y = self.test.batch(torch.arange(len(self.test)))
            self.epoch += 1
            accuracy = (self.model(self.test.inputs(x)).argmax(1) == y).double().mean().item()
            return {"accuracy": accuracy, "done": self.epoch == EPOCHS}

        def reset_config(self, config):
            self.setup(config)
            return True

        def save_checkpoint(self, folder):
            return {}

    connect(Cluster())
    wanted = tune.TuneConfig(num_samples=trials, reuse_actors=True, max_concurrent_trials=2)
    where = tune.RunConfig(storage_path=os.getcwd(), verbose=0)
    space = {"lr": tune.loguniform(0.01, 0.2)}
    trainable = tune.with_resources(Bare, {"CPU": 1})
    if tune.Tuner(trainable, param_space=space, tune_config=wanted, run_config=where).fit().num_errors:
        raise SystemExit(1)


def spent(who: str, trials: int) -> float:
    """Return the CPU seconds of all processes of one sweep in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, os.path.abspath(__file__), who, str(trials)]
        with subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            seconds: dict[int, float] = {}
            root = psutil.Process(process.pid)
            while process.poll() is None:
                with suppress(psutil.Error):
                    for each in [root, *root.children(recursive=True)]:
                        times = each.cpu_times()
                        seconds[each.pid] = times.user + times.system
                time.sleep(0.1)
        if process.returncode:
            raise SystemExit(f"{who} ended with {process.returncode}")
        return sum(seconds.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("who", nargs="?", choices=["ours", "bare"])
    parser.add_argument("trials", nargs="?", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    if chosen.who:
        globals()[chosen.who](chosen.trials)
        sys.exit()
    print(f"{'trials':>8}{'effray':>10}{'bare':>10}   CPU seconds a trial, medians of {chosen.rounds}")
    for trials in (8, 24):
        found = [(spent("ours", trials), spent("bare", trials)) for _ in range(chosen.rounds)]
        each = [statistics.median(values) / trials for values in zip(*found, strict=True)]
        print(f"{trials:8}{each[0]:10.2f}{each[1]:10.2f}   {each[0] / each[1]:.1f} ×")
