"""An append-only log in which every entry holds the digest of the one before: none can be changed or lost unseen."""

import json
import time
from collections.abc import Mapping
from functools import partial
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any

from raypkg.core.errors import UserError
from raypkg.runs.storage import Storage

FILE = "log.jsonl"

Entry = dict[str, Any]


class Ledger:
    """The log of a run, one line of JSON an entry.

    Args:
        storage: the run's folder.

    Raises:
        UserError: the log is damaged; the entry is named.
    """

    def __init__(self, storage: Storage):
        self._storage = storage
        self._lines = (storage.read(FILE) or b"").splitlines(keepends=True)
        self.entries: list[Entry] = []
        for line in self._lines:
            self.entries.append(self._checked(line))

    @property
    def head(self) -> str:
        """The digest of the last entry; empty before the first."""
        return self.entries[-1]["digest"] if self.entries else ""

    def append(self, entry: Mapping[str, Any]) -> Entry:
        """Add an entry; once this returns it is on the disk, and before that nothing of it is."""
        body = {
            "number": len(self.entries),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **entry,
            "previous": self.head,
        }
        sealed = {**body, "digest": _digest_of_entry(body)}
        lines = [*self._lines, _line(sealed)]
        self._storage.write(FILE, b"".join(lines))
        self._lines = lines
        self.entries.append(sealed)
        return sealed

    def _checked(self, line: bytes) -> Entry:
        number = len(self.entries)
        where = f"entry {number} of {self._storage.root}/{FILE}"
        try:
            entry = json.loads(line)
            body = {name: value for name, value in entry.items() if name != "digest"}
            sound = _digest_of_entry(body) == entry["digest"] and line == _line(entry)
        except (ValueError, KeyError, AttributeError, RecursionError):
            sound = False
        if not sound:
            raise UserError(f"{where} is corrupt: it does not have the digest that it names")
        if entry.get("previous") != self.head or entry.get("number") != number:
            raise UserError(f"{where} does not follow the one before: entries are missing or changed")
        return entry


def digest(content: bytes) -> str:
    """Return the digest by which contents are compared, 16 bytes of BLAKE2b as hexadecimal."""
    return blake2b(content, digest_size=16).hexdigest()


def stored_digest(storage: Storage, name: str) -> str:
    """Return the digest of a file of a run; that of no content when there is no such file."""
    return digest(storage.read(name) or b"")


def digest_of_file(path: Path) -> str:
    """Return the digest of a file's content, which may be larger than memory; empty where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file_digest(file, partial(blake2b, digest_size=16)).hexdigest()
    except OSError:
        return ""


def _digest_of_entry(body: Mapping[str, Any]) -> str:
    return digest(json.dumps(body, sort_keys=True).encode())


def _line(entry: Entry) -> bytes:
    return json.dumps(entry).encode() + b"\n"
