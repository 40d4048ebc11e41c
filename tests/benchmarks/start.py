"""What a run pays before its first sample and after its last, with Ray and without.

    python tests/benchmarks/start.py
    python tests/benchmarks/start.py --against ../another-checkout

runs each command in turn, several rounds, and prints medians: seconds to the first batch, of work (the critical path of
all phases), in all, and the processes that were started. With --against, the same of another checkout beside it. Errors
and help are timed as well. Run it on a machine that does nothing else.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def timed(command: str, tree: Path) -> tuple[float, ...]:
    """Run a command of a checkout in an empty folder; return seconds to the first batch, of work, in all; processes."""
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "first"
        paths = os.pathsep.join([str(tree), str(HERE)])
        environment = os.environ | {"PYTHONPATH": paths, FIRST: str(note), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-m", "raypkg", *command.split()]
        begin = time.time()
        with subprocess.Popen(
            words, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            with Watch(process.pid) as watch:
                _, said = process.communicate()
        whole = time.time() - begin
        if process.returncode not in (0, 2) or "Traceback" in said:
            raise SystemExit(f"{command}: exit code {process.returncode}: {said}")
        summaries = [json.loads(file.read_text()) for file in Path(folder).glob("runs/*/*/summary.json")]
        work = sum(summary.get("seconds", 0) for summary in summaries) if summaries else math.nan
        first = float(note.read_text()) - begin if note.exists() else math.nan
        return first, work, whole, len(watch.titles)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout to measure beside this one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commands", nargs="+", default=[*COMMANDS], choices=COMMANDS)
    chosen = parser.parse_args()
    trees = [HERE.parent, *([chosen.against] if chosen.against else [])]
    places = [(name, tree) for name in chosen.commands for tree in trees]
    rounds = [{place: timed(COMMANDS[place[0]], place[1]) for place in places} for _ in range(chosen.rounds)]
    print(f"\nmedians of {chosen.rounds} rounds in turn; seconds to the first batch, of work, in all; processes\n")
    for name in chosen.commands:
        cells = []
        for tree in trees:
            medians = [statistics.median(values) for values in zip(*(each[name, tree] for each in rounds), strict=True)]
            cells.append("".join(f"{'–':>8}" if math.isnan(value) else f"{value:8.2f}" for value in medians))
        print(f"{name:<28}" + "   |".join(cells))
