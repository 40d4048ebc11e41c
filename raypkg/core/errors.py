"""Errors that a user can mend: one line that says what, the value, what is allowed and the nearest match."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

CREDENTIALS = re.compile(r"(?<=://)[^/@\s'\"]+@")  # user and password, or key and secret, of a URI


class UserError(Exception):
    """A mistake in what the user gave; the CLI prints its one line and exits with code 2."""

    def __init__(self, message: str):
        super().__init__(redacted(" ".join(message.split())))


class Interruption(UserError):
    """A run was ended before its time by something that is no mistake; what it has done so far can be resumed."""


class ClusterLost(Interruption):
    """The Ray cluster is gone, so nothing that Ray would do at the end of the process can succeed."""


def redacted(text: str) -> str:
    """Return a text without the credentials of its URIs.

    >>> redacted("cannot use s3://KEY:SECRET@bucket/runs")
    'cannot use s3://***@bucket/runs'
    """
    return CREDENTIALS.sub("***@", text)


def unknown(kind: str, name: str, allowed: Iterable[str]) -> UserError:
    """Build the error for a name that is not among the allowed ones.

    >>> str(unknown("model", "resnt20", ["mlp", "resnet20"]))
    "unknown model 'resnt20', did you mean 'resnet20'? Allowed: mlp, resnet20"
    """
    allowed = sorted(allowed)
    match = get_close_matches(name, allowed, n=1, cutoff=0.5)
    hint = f", did you mean {match[0]!r}?" if match else "."
    return UserError(f"unknown {kind} {name!r}{hint} Allowed: {', '.join(allowed) or 'none'}")
