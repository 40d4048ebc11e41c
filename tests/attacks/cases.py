"""Cases of bad input: a command as typed, what is wrong about it, and the facts that its one line must name."""

import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

HERE = "{}"  # in a command, the wrong text
GAP = "…"  # in the facts of a line, anything
TRAINS = ("lipt", "train", "crest", "sparse", "select")  # commands that would start Ray
Make = Callable[[Path, Any], object]


class Case(NamedTuple):
    """One bad input."""

    name: str
    words: tuple[str, ...]  # of the command line, after ``effray``
    says: str  # parts that the error line must contain in this order, with gaps
    prepare: Callable[[Path], None]  # makes the bad input in the working folder
    leaves: tuple[str, ...]  # patterns of what may be new in the working folder afterwards
    environment: Mapping[str, str]

    def is_said(self, line: str) -> bool:
        """Return True if a line says all facts in their order."""
        return re.search(".*".join(re.escape(part.strip()) for part in self.says.split(GAP)), line) is not None


class Cases(list[Case]):
    """The ways in which one thing is wrong."""


def cases(
    on: str,
    command: str,
    wrong: Mapping[Any, Any],
    *,
    into: str = "",
    make: Make | None = None,
    leaves: tuple[str, ...] = (),
    variable: str = "",
    environment: Mapping[str, str] | None = None,
) -> Cases:
    """Return the cases in which one thing, ``on``, is wrong in many ways.

    ``wrong`` has each wrong text with what the line must say, or words for it with a pair of the thing and that. The
    text stands in the command for ``{}``, in the file ``into`` or in a ``variable`` of the environment, or ``make``
    makes the wrong thing in the working folder.
    """
    found = Cases()
    for key, answer in wrong.items():
        thing, says = answer if isinstance(answer, tuple) else (key, answer)
        typed = command.replace(HERE, shlex.quote(thing)) if isinstance(thing, str) else command
        words = shlex.split(thing if command == HERE else typed)
        trains = words[:1] in [[name] for name in TRAINS] or words[:2] == ["deltagrad", "train"]
        if trains and "--cluster.workers" not in words:
            words += ["--cluster.workers", "0"]
        shown = re.sub(r"\s+", " ", str(key)).encode("unicode_escape").decode()
        variables = {**(environment or {}), **({variable: thing} if variable else {})}

        def prepare(folder: Path, thing: Any = thing) -> None:
            if into:
                (folder / into).write_bytes(thing if isinstance(thing, bytes) else thing.encode())
            if make:
                make(folder, thing)

        found.append(Case(f"{on}: {shown[:60]}", (*words,), says, prepare, leaves, variables))
    return found
