"""Errors that a user can mend: one line that says what, the value, what is allowed and the nearest match."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from reprlib import Repr

LONGEST_WORD = 200  # characters of a path or name that an error shows whole
MOST_NAMES = 60  # allowed ones that an error lists
OURS = ("raypkg", "ray")  # packages whose code may end the process: a stopped trial, a signal
SHOWN = Repr()
SHOWN.maxstring = 100
SHOWN.maxother = 100
SHOWN.maxlong = 50
# User and password, or key and secret, of a URI, also of one whose second slash a path has lost.
CREDENTIALS = re.compile(r"(:/)(/(?:[^\s@/:]*:\S*|[^\s@/]+)|[^\s@/:]+:\S*)@")


class UserError(Exception):
    """A mistake in what the user gave; the CLI prints its one line and exits with code 2."""

    def __init__(self, message: str):
        words = redacted(message).split()  # first: a credential that is cut would not be known as one
        super().__init__(" ".join(map(_cut, words)))


class Interruption(UserError):
    """A run was ended before its time by something that is no mistake; what it has done so far can be resumed."""


class ClusterLost(Interruption):
    """The Ray cluster is gone, so nothing that Ray would do at the end of the process can succeed."""


def redacted(text: str) -> str:
    """Return a text without the credentials of its URIs.

    >>> redacted("cannot use s3://KEY:SECRET@bucket/runs")
    'cannot use s3://***@bucket/runs'
    """
    return CREDENTIALS.sub(lambda found: f"{found[1]}{'/' * found[2].startswith('/')}***@", text)


def unknown(kind: str, name: str, allowed: Iterable[str]) -> UserError:
    """Build the error for a name that is not among the allowed ones.

    >>> str(unknown("model", "resnt20", ["mlp", "resnet20"]))
    "unknown model 'resnt20', did you mean 'resnet20'? Allowed: mlp, resnet20"
    """
    allowed = sorted(allowed)
    match = get_close_matches(name[:LONGEST_WORD], allowed, n=1, cutoff=0.5)
    hint = f", did you mean {match[0]!r}?" if match else "."
    listed = ", ".join(allowed[:MOST_NAMES]) or "none"
    if more := len(allowed[MOST_NAMES:]):
        listed += f", and {more} more"
    return UserError(f"unknown {kind} {name!r}{hint} Allowed: {listed}")


def shown(value: object) -> str:
    """Return a value as errors write it: as Python does, cut where it is long.

    >>> shown("resnet20"), shown([1] * 1000)
    ("'resnet20'", '[1, 1, 1, 1, 1, 1, ...]')
    """
    return SHOWN.repr(value)


@contextmanager
def ending_told(what: str) -> Iterator[None]:
    """Tell when a user's code ends the process, as by ``sys.exit``, which would look like an interruption.

    Args:
        what: runs it, for the error.

    Raises:
        UserError: the user's code did; what Ray or this package ends passes.
    """
    try:
        yield
    except SystemExit as error:
        place = _raised_in(error)
        if place.partition(".")[0] in OURS:
            raise
        raise UserError(f"{what} ended the process by SystemExit({error.code!r}), in {place}") from error


def _raised_in(error: BaseException) -> str:
    """Return the name of the module that raised an error."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__")) if trace else ""


def _cut(word: str) -> str:
    if len(word) <= LONGEST_WORD:
        return word
    half = LONGEST_WORD // 2
    return f"{word[:half]}…{word[-half:]}"
