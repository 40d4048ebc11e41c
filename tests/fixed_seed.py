"""Fixed-seed results of every experiment, to hold one commit against another: a restructuring must not change them.

    python tests/fixed_seed.py OUT                   # before: runs everything, keeps each result in OUT
    python tests/fixed_seed.py NEW --against OUT     # after: runs everything again and compares

Runs in the calling process are compared bit for bit; those of two Ray workers, whose sums are added in another order,
by the largest difference relative to the largest value of a result. ``--only`` names a part of them. The exit code is
1 if a result is missing or new, if one of the calling process differs in a bit, or if one of two workers differs by
more than ``--tolerance``.
"""

import argparse
import contextlib
import io
import json
import shlex
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file

from raypkg.cli import main as effray

TINY = "--train.epochs 3 --model mlp --seed 3"
# Defaults before there were presets, so that results stay comparable with those of earlier commits.
CREST = "--crest.exclude_after 5 --crest.keep_active 0.8"
REGION = f"{CREST} --crest.checked_on pool --crest.smoothing coreset --crest.settle 0.05 --crest.model_batches 1"
REGION += " --crest.curvature false --crest.tau 0.05 --crest.subset 0.2196"
EACH_STEP = f"{CREST} --crest.tau 0 --crest.subset 4m --crest.settle 0.05"
ANEW = "--pretrain.rounds false"
PLAIN = "--dataset.scale standard --train.schedule constant --train.weight_decay 0.005 --replay.burn_in 10"
RUNS = {
    "full": f"train {TINY}",
    "reselected": f"train {TINY} --select.rule gradmatch --select.fraction 0.2 --select.weighted true"
    " --select.warm_epochs 1 --select.every_epochs 1",
    "infobatch": f"train {TINY} --select.rule infobatch --select.every_epochs 1",
    "selected": "select --model-from full --rule craig --fraction 0.1 --seed 3",
    "given": f"train {TINY} --coreset {{root}}/select/selected/coreset.parquet",
    "lipt": f"lipt --seed 3 --train.epochs 2 --pretrain.models 3 --pretrain.epochs 1 {ANEW} --pretrain.sparsity false",
    "erk": f"lipt {TINY} --pretrain.models 3 --pretrain.epochs 1 --pretrain.merge mean --pretrain.sparsity erk"
    f" --pretrain.density 0.9 {ANEW}",
    "dense": f"lipt {TINY} --pretrain.method dense --pretrain.epochs 2 --train.init merged"
    f" --pretrain.sparsity false {ANEW}",
    "anew": f"crest --model mlp --seed 3 --train.epochs 12 --budget 0.25 {EACH_STEP}",
    "crest": f"crest --model mlp --seed 3 --train.epochs 12 --budget 0.25 {REGION}",
    "random": "crest --model mlp --seed 3 --train.epochs 12 --budget 0.25 --selection random",
    "glister": "crest --model mlp --seed 3 --train.epochs 4 --budget 0.5 --selection glister",
    "rigl": f"sparse {TINY} --density 0.1 --growth gradient --agent.form measured --update_every_steps 1",
    "momentum": f"sparse {TINY} --density 0.2 --growth momentum --redistribution momentum --drop set"
    " --update_every_steps 1",
    "thin": f"sparse {TINY} --density 0.05 --compute sparse --growth gradient --fan-in sparse --update_every_steps 1",
    "both": "sparse --model mlp --seed 3 --train.epochs 3 --density 0.1 --growth random --update_every_steps 1"
    f" --agent.form measured {EACH_STEP}",
    "recorded": f"deltagrad train --seed 3 --train.epochs 6 --train.batch_size 200 {PLAIN}",
}
AFTERWARDS = (  # requests to the recorded run, answered in order
    "deltagrad delete recorded --ids 3,14,15",
    "deltagrad delete recorded --ids 20,21 --period 3",
    "deltagrad add recorded --ids 14",
)
ON_RAY = ("full", "reselected", "selected", "lipt", "crest", "rigl", "recorded")
TIMES = {"seconds", "total_seconds", "waited", "elapsed", "memory", "device_memory", "time"}  # differ from run to run
SUMMARY = ("test_loss", "test_accuracy", "coreset", "full_training_backward")


def run(line: str, root: Path, workers: int) -> None:
    """Carry out a command, which must succeed."""
    words = shlex.split(line.format(root=root))
    if words[0] != "deltagrad" or words[1] == "train":
        words += ["--cluster.workers", str(workers)]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            effray([*words, "--root", str(root)])
        except SystemExit as ended:
            if ended.code:
                sys.exit(f"{line}: exit code {ended.code}\n{out.getvalue()}")


def results(folder: Path) -> dict[str, np.ndarray]:
    """Return every number that a run left, by file and name, without its times."""
    arrays: dict[str, np.ndarray] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        place = file.relative_to(folder)
        arrays |= {f"{place}:{name}": tensor for name, tensor in load_file(file).items()}
    for file in sorted(folder.rglob("*.parquet")):
        place = file.relative_to(folder)
        arrays |= {f"{place}:{name}": column for name, column in columns(pq.read_table(file)).items()}
    summary = json.loads((folder / "summary.json").read_text())
    arrays |= {f"summary:{name}": np.array(summary[name]) for name in SUMMARY if summary.get(name) is not None}
    for cost in summary["phases"]:
        for name in cost.keys() - TIMES - {"phase", "sent"}:
            arrays[f"cost:{cost['phase']}:{name}"] = np.array(cost[name])
    return arrays


def columns(table: pa.Table) -> dict[str, np.ndarray]:
    """Return a table's columns of numbers, rows of metrics in an order that does not depend on who was first."""
    keys = [name for name in ("phase", "model", "epoch") if name in table.column_names]
    if "phase" in keys:
        table = table.sort_by([(name, "ascending") for name in keys])
    numbers = [name for name in table.column_names if not pa.types.is_string(table[name].type)]
    return {name: table[name].to_numpy() for name in numbers if name not in TIMES}


def compare(new: dict[str, np.ndarray], old: dict[str, np.ndarray], tolerance: float) -> tuple[bool, str]:
    """Return whether two results are equal within a relative tolerance, and one line on how far apart they are."""
    worst, where = 0.0, ""
    for name in new.keys() & old.keys():
        a, b = np.asarray(new[name], np.float64), np.asarray(old[name], np.float64)
        if a.shape != b.shape:
            return False, f"DIFFERENT: {name} has shape {a.shape}, was {b.shape}"
        if not np.array_equal(np.isfinite(a), np.isfinite(b)):
            return False, f"DIFFERENT: other values of {name} are finite"
        if not np.array_equal(a, b, equal_nan=True):
            a, b = np.nan_to_num(a), np.nan_to_num(b)
            difference = float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-12))
            if difference >= worst:
                worst, where = difference, name
    missing, further = sorted(old.keys() - new.keys()), sorted(new.keys() - old.keys())
    line = f"differs by {worst:.1e} in {where}" if where else f"equal, {len(new.keys() & old.keys())} results"
    line += f"; missing: {', '.join(missing)}" if missing else ""
    line += f"; new: {', '.join(further)}" if further else ""
    return not missing and not further and worst <= tolerance, line


def main() -> None:
    """Run the experiments and keep or compare their results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--only", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--tolerance", type=float, default=1e-5, help="relative, with two workers")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    all_equal = True
    for workers in given.workers:
        with tempfile.TemporaryDirectory() as root:
            for name, line in RUNS.items():
                if name not in given.only or (workers and name not in ON_RAY):
                    continue
                experiment = line.partition(" ")[0]
                run(f"{line} --name {name}", Path(root), workers)
                if name == "recorded" and not workers:
                    for request in AFTERWARDS:
                        run(request, Path(root), workers)
                found = results(Path(root, experiment, name))
                kept = f"{name}-{workers}.npz"
                np.savez(given.out / kept, **found)
                if given.against and not (given.against / kept).exists():
                    all_equal = False
                    print(f"{name}, {workers} workers: MISSING from {given.against}", flush=True)
                elif given.against:
                    with np.load(given.against / kept) as old:
                        is_equal, line = compare(found, dict(old), given.tolerance if workers else 0.0)
                    all_equal &= is_equal
                    print(f"{name}, {workers} workers: {line}", flush=True)
    sys.exit(0 if all_equal else 1)


if __name__ == "__main__":
    main()
