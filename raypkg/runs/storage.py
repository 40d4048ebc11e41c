"""A folder on a local disk or any ``pyarrow.fs`` URI, written atomically."""

import errno
import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from raypkg.core.errors import UserError

PART = ".part"  # ends the name of a file that is being written
CLAIMS = "claims"  # of those who are about to make the same folder of an object store


class Storage:
    """Reads and writes whole files under one root; a file is there entirely or not at all.

    Args:
        root: a local path, or a URI such as ``s3://bucket/runs``. Picklable: workers open their own.
    """

    def __init__(self, root: str, *names: str):
        if "://" not in root:
            root = str(Path(root).expanduser().absolute())  # a worker may run in another folder
        self._base = root
        self._names = names
        try:
            self._fs, path = fs.FileSystem.from_uri(root)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"cannot use {root!r} as a folder for runs: {error}") from None
        self._path = "/".join([path.rstrip("/"), *names])  # names are never read as part of a URI

    def __reduce__(self) -> tuple[Any, ...]:
        return Storage, (self._base, *self._names)

    def __truediv__(self, name: str) -> "Storage":
        return Storage(self._base, *self._names, name)

    @property
    def root(self) -> str:
        """The folder as it was given, with the names below it."""
        return "/".join([self._base.rstrip("/"), *self._names])

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self._path.rpartition("/")[2]

    @property
    def parent(self) -> "Storage":
        """The folder around this one."""
        if self._names:
            return Storage(self._base, *self._names[:-1])
        return Storage(self._base.rstrip("/").rpartition("/")[0])

    @property
    def local(self) -> Path | None:
        """The folder as a local path, or None when it is remote."""
        return Path(self._path) if isinstance(self._fs, fs.LocalFileSystem) else None

    @contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Hold the folder's lock, where its file system has locks; it keeps out other processes that ask for it.

        Args:
            what: the name of what is locked, for the error.

        Raises:
            UserError: another process holds the lock.
        """
        if self.local is None:
            yield
            return
        folder = os.open(self.local, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends, however it ends
            except BlockingIOError:
                raise UserError(f"{what} is being worked on by another process: wait for it, or stop it") from None
            except OSError:
                pass  # a file system without locks, as some clusters have
            yield
        finally:
            os.close(folder)

    def claim(self) -> bool:
        """Make the folder, and say whether this process is the one that made it.

        A local folder is made by one system call. Object stores have none that only one caller can win: there each
        caller leaves a claim, and who finds another's beside its own gives way.
        """
        if self.local:
            return self._claim_locally(self.local)
        if self.list():
            return False
        mine = uuid.uuid4().hex
        self.write(f"{CLAIMS}/{mine}", b"")
        if self.list() == [CLAIMS] and self.list(CLAIMS) == [mine]:
            return True
        self.delete(f"{CLAIMS}/{mine}")
        return False

    def settle(self) -> None:
        """Drop the claim, once what is in the folder keeps others away."""
        if not self.local:
            self.delete_folder(CLAIMS)

    def delete_if_empty(self) -> None:
        """Delete a local folder in which nothing is."""
        if self.local:
            with suppress(OSError):
                self.local.rmdir()

    def digest(self, name: str) -> str | None:
        """Return the digest of a file's content, 16 bytes of BLAKE2b as hexadecimal, or None when it does not exist."""
        content = self.read(name)
        return None if content is None else blake2b(content, digest_size=16).hexdigest()

    def _claim_locally(self, folder: Path) -> bool:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except FileExistsError:
            return False
        except OSError as error:
            raise UserError(f"cannot write '{folder}/': {error.strerror or error}") from None
        return True

    def write(self, name: str, content: bytes) -> None:
        """Write a file under a temporary name, then rename it.

        Raises:
            UserError: the disk is full or the folder cannot be written; nothing half-written is left.
        """
        path = self._full(name)
        temporary = f"{path}.{os.getpid()}{PART}"
        try:
            self._fs.create_dir(os.path.dirname(path), recursive=True)
            with self._fs.open_output_stream(temporary) as stream:
                stream.write(content)
            self._fs.move(temporary, path)
        except OSError as error:
            if self._is(temporary, fs.FileType.File):
                self._fs.delete_file(temporary)
            reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
            raise UserError(f"cannot write {path!r}: {reason}") from None

    def read(self, name: str) -> bytes | None:
        """Return a file's content, or None when it does not exist.

        Raises:
            UserError: it cannot be read, for instance because it is a folder.
        """
        try:
            with self._fs.open_input_stream(self._full(name)) as stream:
                return stream.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"cannot read {self._full(name)}: {error}") from None

    def list(self, name: str = "") -> list[str]:
        """Return the names in a folder, sorted; an empty list when there is none. Unfinished files are left out."""
        folder = self._full(name).rstrip("/")
        if not self._is(folder, fs.FileType.Directory):
            return []
        entries = self._fs.get_file_info(fs.FileSelector(folder))
        return sorted(entry.base_name for entry in entries if not entry.base_name.endswith(PART))

    def delete(self, name: str) -> None:
        """Delete a file."""
        self._fs.delete_file(self._full(name))

    def delete_folder(self, name: str) -> None:
        """Delete a folder with all it holds, if it exists."""
        folder = self._full(name)
        if self._is(folder, fs.FileType.Directory):
            self._fs.delete_dir(folder)

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as JSON."""
        text = json.dumps(value, indent=2) + "\n"
        self.write(name, text.encode())

    def read_json(self, name: str) -> Any | None:
        """Return a JSON file's value, or None when it does not exist.

        Raises:
            UserError: the file is not JSON.
        """
        content = self.read(name)
        if content is None:
            return None
        try:
            return json.loads(content)
        except ValueError as error:
            raise UserError(f"{self.root}/{name} is corrupt: {error}") from None

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write an Arrow table as parquet."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        self.write(name, sink.getvalue().to_pybytes())

    def read_table(self, name: str) -> pa.Table | None:
        """Return a parquet file as an Arrow table, or None when it does not exist.

        Raises:
            UserError: the file is not parquet.
        """
        try:
            # Arrow's own file, not Python's: its threads may drop a table's source after the interpreter has ended.
            with self._fs.open_input_file(self._full(name)) as file:
                return pq.read_table(file)
        except FileNotFoundError:
            return None
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.root}/{name} is corrupt: {error}") from None

    def _full(self, name: str) -> str:
        return f"{self._path}/{name}"

    def _is(self, path: str, kind: fs.FileType) -> bool:
        return self._fs.get_file_info(path).type == kind
