"""Files of raypkg whose functions and classes a command executes: how much of the tree its reader passes.

    python tests/trace_files.py train --train.epochs 1
    python tests/trace_files.py --inside train_epoch crest --budget 0.5   # only what is called within that function

Without Ray unless the command says otherwise. Bodies of classes and decorators, which run at import, count as well;
bodies of modules do not.
"""

import sys
import tempfile
import threading
from collections import defaultdict
from pathlib import Path
from types import CodeType, FrameType

import raypkg
from raypkg.cli import main as effray

ROOT = Path(raypkg.__file__).parent


class Trace:
    """Records the code of raypkg that runs in any thread, optionally only within one function."""

    def __init__(self, inside: str | None):
        self.inside = inside
        self.depth = 0 if inside else 1
        self.functions: dict[str, set[str]] = defaultdict(set)
        self.places: dict[CodeType, str | None] = {}  # by code, the file within raypkg

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if code not in self.places:
            path = Path(code.co_filename)
            is_ours = code.co_name != "<module>" and path.is_relative_to(ROOT)
            self.places[code] = str(path.relative_to(ROOT)) if is_ours else None
        place = self.places[code]
        if place is None:
            return
        if code.co_name == self.inside:
            self.depth += {"call": 1, "return": -1}.get(event, 0)
        if event == "call" and self.depth > 0:
            self.functions[place].add(code.co_qualname)


def main() -> None:
    """Run the command under the trace, and print the files with the number of their functions."""
    words = sys.argv[1:]
    inside = None
    if words[:1] == ["--inside"]:
        _, inside, *words = words
    trace = Trace(inside)
    with tempfile.TemporaryDirectory() as root:
        words += [] if "--root" in words else ["--root", root]
        if words[0] != "deltagrad" and "--cluster.workers" not in words:
            words += ["--cluster.workers", "0"]
        threading.setprofile(trace)
        sys.setprofile(trace)
        try:
            effray(words)
        except SystemExit as ended:
            code = ended.code
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    for place, names in sorted(trace.functions.items()):
        print(f"{len(names):4d} {place}")
    count = sum(map(len, trace.functions.values()))
    print(f"{len(trace.functions)} files, {count} functions and classes; exit code {code or 0}")


if __name__ == "__main__":
    main()
