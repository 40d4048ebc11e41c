"""What a run pays before its first sample and after its last, with Ray and without.

    python tests/benchmarks/start.py
    python tests/benchmarks/start.py --against ../another-checkout

runs each command in turn, several rounds, and prints medians: seconds to the first batch, of work (the critical path of
all phases), in all, and the processes that were started. With --against, the same of another checkout beside it. Errors
and help are timed as well. Run it on a machine that does nothing else.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from processes import Watch
from sabotage import FIRST

HERE = Path(__file__).parents[1]
DATA = "--dataset sabotage:load_and_note"
COMMANDS = {
    "help": "--help",
    "help of lipt": "lipt --help",
    "a wrong model": "train --model resnet9",
    "train, 1 epoch, no Ray": f"train {DATA} --train.epochs 1 --cluster.workers 0",
    "train, no Ray": f"train {DATA} --cluster.workers 0",
    "train, 2 workers": f"train {DATA} --cluster.workers 2",
    "crest, no Ray": f"crest {DATA} --cluster.workers 0",
    "crest, 2 workers": f"crest {DATA} --cluster.workers 2",
    "lipt, no Ray": f"lipt {DATA} --cluster.workers 0",
    "lipt, 2 workers": f"lipt {DATA} --cluster.workers 2",
    "8 trials, one process each": f"tune train {DATA} --model mlp --train.epochs 3 --samples 8 --cluster.workers 0",
    "8 trials of 2 workers": f"tune train {DATA} --model mlp --train.epochs 3 --samples 8 --cluster.workers 2",
}
MISSING = float("nan")


class Start(NamedTuple):
    """What one command took: seconds, and processes beside its own."""

    first: float
    work: float
    whole: float
    processes: float


def main() -> None:
    """Run the commands in turn, then print the table."""
    chosen = arguments()
    trees = [HERE.parent, *([chosen.against] if chosen.against else [])]
    found: dict[tuple[str, Path], list[Start]] = {}
    for round_ in range(chosen.rounds):
        for name in chosen.commands:
            for tree in trees:
                found.setdefault((name, tree), []).append(timed(COMMANDS[name], tree))
        print(f"round {round_ + 1} of {chosen.rounds}", file=sys.stderr)
    print(f"\nmedians of {chosen.rounds} rounds in turn; seconds to the first batch, of work, in all; processes\n")
    for name in chosen.commands:
        cells = [median(found[name, tree]) for tree in trees]
        print(f"{name:<28}" + "   |".join("".join(map(shown, cell)) for cell in cells))


def timed(command: str, tree: Path) -> Start:
    """Run a command of a checkout in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "first"
        paths = os.pathsep.join([str(tree), str(HERE)])
        environment = os.environ | {"PYTHONPATH": paths, FIRST: str(note), "OMP_NUM_THREADS": "1"}
        begin = time.time()
        process = subprocess.Popen(
            [sys.executable, "-m", "raypkg", *command.split()],
            cwd=folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        with Watch(process.pid) as watch:
            _, said = process.communicate()
        whole = time.time() - begin
        if process.returncode not in (0, 2) or "Traceback" in said:
            raise SystemExit(f"{command}: exit code {process.returncode}: {said}")
        summaries = [json.loads(file.read_text()) for file in Path(folder).glob("runs/*/*/summary.json")]
        work = sum(summary.get("seconds", 0) for summary in summaries) if summaries else MISSING
        first = float(note.read_text()) - begin if note.exists() else MISSING
        return Start(first, work, whole, len(watch.titles))


def median(starts: list[Start]) -> Start:
    """Return the medians of what was measured."""
    return Start(*map(statistics.median, zip(*starts, strict=True)))


def shown(value: float) -> str:
    """Return a cell of the table."""
    return f"{'–':>8}" if value != value else f"{value:8.2f}"


def arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout to measure beside this one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commands", nargs="+", default=[*COMMANDS], choices=COMMANDS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
