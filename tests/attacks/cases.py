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
    """Return the cases in which one thing is wrong in many ways.

    Args:
        on: what is attacked.
        command: as typed, without ``effray``; ``{}`` stands for the wrong text.
        wrong: each wrong text, with what the line must say; or words for it, with a pair of the thing and that.
        into: a file that the wrong text is written to.
        make: makes the wrong thing in the working folder.
        leaves: patterns of what may be new in the working folder afterwards.
        variable: of the environment, that is set to the wrong text.
        environment: further variables.
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
        prepare = _preparation(thing, into, make)
        found.append(Case(f"{on}: {shown[:60]}", (*words,), says, prepare, leaves, variables))
    return found


def _preparation(thing: Any, into: str, make: Make | None) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        if into:
            (folder / into).write_bytes(thing if isinstance(thing, bytes) else thing.encode())
        if make:
            make(folder, thing)

    return prepare


def is_said(says: str, line: str) -> bool:
    """Return True if a line says all parts of a text with gaps, in their order.

    >>> is_said("unknown … did you mean", "unknown model 'a', did you mean 'b'?")
    True
    """
    parts = [re.escape(part.strip()) for part in says.split(GAP)]
    return re.search(".*".join(parts), line) is not None
