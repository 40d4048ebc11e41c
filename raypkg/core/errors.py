"""Errors that a user can correct: one line with the value, what is allowed and the nearest match."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from reprlib import Repr
from sysconfig import get_path
from traceback import format_exception_only, walk_tb

LONGEST_WORD = 200  # characters of a path or name that an error shows in full
MOST_NAMES = 60  # allowed names that an error lists
NOT_THEIRS = (Path(__file__).parents[1], Path(get_path("stdlib")))  # folders without a user's files
INSTALLED = {"site-packages", "dist-packages"}  # folders of packages, wherever they are
SHOWN = Repr()
SHOWN.maxstring = SHOWN.maxother = 100
SHOWN.maxlong = 50
# User and password, or key and secret, of a URI; also of one that lost its second slash when it became a path. Secrets
# may hold blanks, unless a port follows the colon.
PORT = r"\d{1,5}(?![^\s/?#'\",;)])"
CREDENTIALS = re.compile(rf"(:/)(/?[^\s@/:]+:(?!{PORT}).*|/(?:[^\s@/:]*:\S*|[^\s@/]+)|[^\s@/:]+:\S*)@")
SECRETS = re.compile(r"(?i)([?&][\w-]*(?:key|secret|token|password|signature)[\w-]*=)[^&#\s]+")
IN_SERVER = re.compile(r"(endpoint_override=)[^&#\s]*(%40)")


class UserError(Exception):
    """A mistake in the user's input. Commands print its one line and exit with code 2."""

    def __init__(self, message: str):
        half = LONGEST_WORD // 2
        # Redacted first: a shortened credential would not be recognised.
        words = [printable(word) for word in redacted(message).split()]
        super().__init__(" ".join(w if len(w) <= LONGEST_WORD else f"{w[:half]}…{w[-half:]}" for w in words))


class Interruption(UserError):
    """A run was interrupted by something other than a mistake; it can be resumed."""


class ClusterLost(Interruption):
    """The Ray cluster is gone, so Ray cannot clean up at the end of the process."""


def redacted(text: str) -> str:
    """Return a text without the credentials in its URIs.

    >>> redacted("cannot use s3://KEY:SECRET@bucket/runs")
    'cannot use s3://***@bucket/runs'
    """
    text = SECRETS.sub(r"\1***", IN_SERVER.sub(r"\1***\2", text))
    return CREDENTIALS.sub(lambda found: f"{found[1]}{'/' * found[2].startswith('/')}***@", text)


def printable(text: str) -> str:
    r"""Return a text with escapes for characters that could control a terminal, such as those of a file's name.

    >>> printable("cat\x1b[2J, \u202edog, größe")
    'cat\\x1b[2J, \\u202edog, größe'
    """
    if text.isprintable():
        return text
    kept = "\n\N{NO-BREAK SPACE}"
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def unknown(kind: str, name: str, allowed: Iterable[str]) -> UserError:
    """Return the error for a name that is not among the allowed ones.

    >>> str(unknown("model", "resnt20", ["mlp", "resnet20"]))
    "unknown model 'resnt20', did you mean 'resnet20'? Allowed: mlp, resnet20"
    """
    allowed = sorted(allowed)
    plain = {each.lower(): each for each in allowed}
    match = get_close_matches(name[:LONGEST_WORD].lower(), plain, n=1, cutoff=0.5)
    hint = f", did you mean {plain[match[0]]!r}?" if match else "."
    listed = ", ".join(allowed[:MOST_NAMES]) or "none"
    if more := len(allowed[MOST_NAMES:]):
        listed += f", and {more} more"
    return UserError(f"unknown {kind} {name!r}{hint} Allowed: {listed}")


def shown(value: object) -> str:
    """Return the repr of a value, shortened for an error.

    >>> shown("resnet20"), shown([1] * 1000)
    ("'resnet20'", '[1, 1, 1, 1, 1, 1, ...]')
    """
    try:
        return SHOWN.repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return f"<{type(value).__name__} of too many digits>"


def described(value: object) -> str:
    """Return the kind of a value that a user's code returned: type and shape of an array, otherwise its class.

    >>> described(3), described(bytearray(2))
    ('int', 'bytearray of 2')
    """
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__ + (f" of {len(value)}" if hasattr(value, "__len__") else "")


@contextmanager
def as_arguments(*parts: str) -> Iterator[None]:
    """Name settings of these parts in errors as the arguments of a call that they are: ``tau``, not ``crest.tau``."""
    try:
        yield
    except UserError as error:
        words = re.sub(rf"(?<![\w./])(?:{'|'.join(parts)})\.(?=[a-z])", "", str(error))
        raise type(error)(words) from error.__cause__


@contextmanager
def user_code() -> Iterator[None]:
    """Turn an error or exit of a user's code into one line with the innermost place in his files; a lack of memory too.

    Other errors pass, as do those of lost workers, and exits by Ray or this package.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        frames = [*walk_tb(error.__traceback__)]
        module = f"{frames[-1][0].f_globals.get('__name__')}."
        ends = isinstance(error, SystemExit)
        if module.startswith(("ray.", "torch.distributed.")) or (ends and module.startswith("raypkg.")):
            raise
        # PyTorch has a class of its own on GPUs only.
        if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error)):
            amount = re.search(r"allocate [\d.]+ \w+", str(error))
            wanted = f" to {amount[0]}" if amount else ""
            raise UserError(f"out of memory{wanted}: lower train.batch_size, or set train.micro_batch") from error
        places = [(Path(frame.f_code.co_filename), line, frame.f_code.co_name) for frame, line in frames]
        theirs = [
            f"{file}, line {line}, in {name}"
            for file, line, name in places
            if file.is_file() and not INSTALLED & {*file.parts} and not any(map(file.is_relative_to, NOT_THEIRS))
        ]
        if not (theirs or ends):
            raise
        place = theirs[-1] if theirs else module[:-1]
        raise UserError(f"{place}: {format_exception_only(error)[-1]}") from error
