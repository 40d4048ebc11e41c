"""What a user asks of a recorded run: a request, or a queue of them in a file, a JSON object a line."""

import json
from collections import Counter
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, NamedTuple, NoReturn

from raypkg.core.errors import UserError, unknown

from .ids import ALLOWED, is_id

KINDS = ("delete", "delete_where", "restore", "add")
OF_IDS = ("delete", "restore")
LONGEST = 100  # signs of a name that an error shows


class Request(NamedTuple):
    """What one line of a queue asks for.

    Attributes:
        kind: delete or restore (ids), delete_where (a condition) or add (a data set's name).
        value: what of.
        id: by which a queue's request is known, which is answered once; empty on the command line.
    """

    kind: str
    value: Any
    id: str = ""


def read_queue(file: Path) -> list[Request]:
    """Return the requests of a queue: lines of JSON such as {"delete": [3, 7], "id": "ticket 12"}.

    Raises:
        UserError: unreadable, a line that is no request, the same id twice, or no request at all.
    """
    requests = []
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            where = f"line {number} of {str(file)!r}"
            requests.append(_request(line, where))
    if not requests:
        raise UserError(f"the queue {str(file)!r} holds no requests")
    counts = Counter(request.id for request in requests)
    if repeated := next((key for key in counts if counts[key] > 1), None):
        times = counts[repeated]
        raise UserError(f"the queue {str(file)!r} has the id {repeated!r} {times} times")
    return requests


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_text("utf-8-sig")
    except OSError as error:
        raise UserError(f"the queue {str(file)!r} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"the queue {str(file)!r} cannot be read: {error}") from None
    return text.split("\n")  # not splitlines, which also ends a line at signs that a JSON text may hold


def _request(line: str, where: str) -> Request:
    """Return the request of a line; ``where`` names the line in errors."""
    content = _parsed(line, where)
    kinds = [name for name in content if name != "id"] if isinstance(content, dict) else []
    if len(kinds) != 1 or "id" not in content:
        raise UserError(f"{where} must be an object with one of {', '.join(KINDS)}, and an id of its own")
    (kind,) = kinds
    value = content[kind]
    if kind not in KINDS:
        raise unknown(f"request in {where}", kind[:LONGEST], KINDS)
    if kind in OF_IDS:
        if not _are_ids(value):
            raise UserError(f"{where}: {kind} takes a list of ids, not {shortened(value)}; {ALLOWED}")
    elif not isinstance(value, str):
        raise UserError(f"{where}: {kind} takes a text, not {shortened(value)}")
    return Request(kind, value, _name(content["id"], where))


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line, object_pairs_hook=_without_repetition, parse_constant=_refuse_constant)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{where} is no request: its brackets are nested too deeply") from None


def _name(value: Any, where: str) -> str:
    """Return the id of a request, which the log keeps as a text: 12 and "12" are the same."""
    if type(value) is int:  # True is none
        return str(value)
    if isinstance(value, str) and value.strip() and value.isprintable():
        return value
    raise UserError(f"{where}: the id must be a text of printable characters or an integer, not {shortened(value)}")


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_id, value))


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name occurs twice")
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
