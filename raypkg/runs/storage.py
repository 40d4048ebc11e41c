"""A folder on a local disk or at any ``pyarrow.fs`` URI. Files are written atomically."""

import errno
import fcntl
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from raypkg.core.address import address_of, folder_and_name, folder_around, opened, parted, uri_of
from raypkg.core.config import first_problem, regular
from raypkg.core.errors import UserError

PART = ".part"  # ends the name of an unfinished file
LEFT_BEHIND = re.compile(r"\.\d+\.part$")  # an unfinished file, with the number of the process that wrote it
CLAIMS = "claims"  # of processes that are creating the same folder of an object store
LOCK_WAIT = 0.5  # seconds; a process that only tests a lock holds it for less


class Stored(BaseModel):
    """Base of the schemas of JSON files: an object, whose other fields may be anything."""

    model_config = ConfigDict(strict=True, extra="allow")


class Storage:
    """Reads and writes whole files below one folder: a file exists entirely or not at all. Picklable.

    ``root`` is a local path, a URI such as ``s3://bucket/runs``, or the ``root`` of another Storage; the names of
    nested folders are never parsed as part of a URI. ``owner`` is a folder that must exist, and its inode; a write
    never recreates it. A later folder of the same name has another inode. Errors of the file system, such as a full
    disk, become a ``UserError``.
    """

    def __init__(self, root: str, *names: str, owner: tuple[str, int | None] | None = None):
        if not root:
            raise UserError("the name of a folder for runs is empty: --root takes a path or a URI")
        self._base, below = parted(root)
        self._names = (*below, *names)
        self._owner = owner
        self._fs, path = opened(self._base)
        self._path = "/".join([path, *self._names])

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Storage, owner=self._owner), (self._base, *self._names)

    def __truediv__(self, name: str) -> "Storage":
        return Storage(self._base, *self._names, *name.split("/"), owner=self._owner)

    @classmethod
    def around(cls, file: str) -> tuple["Storage", str]:
        """Return the folder around a file, given by its path or URI, and the file's name."""
        folder, name = folder_and_name(file)
        return cls(folder), name

    @property
    def root(self) -> str:
        """The folder's address; further names may be appended to the text."""
        return address_of(self._base, self._names)

    @property
    def uri(self) -> str:
        """The folder's address in the form of other libraries: a URI's query at the end."""
        return uri_of(self._base, self._names)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self._path.rpartition("/")[2]

    @property
    def parent(self) -> "Storage":
        """The folder around this one."""
        if self._names:
            return Storage(self._base, *self._names[:-1])
        return Storage(folder_around(self._base))

    @property
    def owned(self) -> "Storage":
        """The same folder, which no write recreates after it has been deleted."""
        return Storage(self._base, *self._names, owner=(self._path, _inode(self._path)))

    @property
    def local(self) -> Path | None:
        """The folder as a local path, or None if it is remote."""
        return Path(self._path) if isinstance(self._fs, fs.LocalFileSystem) else None

    # Exclusive access

    @contextmanager
    def locked(self, what: str) -> Iterator[None]:
        """Hold the folder's lock, if its file system has locks, or refuse the folder, whose content ``what`` names."""
        if self.local is None:
            yield
            return
        with _one_line("open", self._path):
            folder = os.open(self.local, os.O_RDONLY)
        try:
            deadline = time.monotonic() + LOCK_WAIT
            while True:
                try:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        other = "another process: wait for it, or stop it"
                        raise UserError(f"{what} is being worked on by {other}") from None
                    time.sleep(LOCK_WAIT / 10)
                except OSError:  # a file system without locks, as on some clusters
                    break
            yield
        finally:
            os.close(folder)

    @property
    def taken(self) -> bool:
        """Whether the folder exists; object stores keep an empty folder of claims after two processes gave way."""
        return self.local.exists() if self.local else self.list() not in ([], [CLAIMS])

    def claim(self) -> bool:
        """Create the folder; return True if this process is the one that created it.

        Creating a local folder is one atomic system call. Object stores have none: there each process writes a claim,
        and gives way if it finds another one.
        """
        if self.local:
            with _one_line("write", f"{self._path}/"):
                os.makedirs(os.path.dirname(self._path), exist_ok=True)
                try:
                    os.mkdir(self._path)
                except FileExistsError:
                    return False
                return True
        if self.taken or self.list(CLAIMS):
            return False
        mine = uuid.uuid4().hex
        self.write(f"{CLAIMS}/{mine}", b"")
        if self.list() == [CLAIMS] and self.list(CLAIMS) == [mine]:
            return True
        self.delete(f"{CLAIMS}/{mine}")
        return False

    def settle(self) -> None:
        """Drop the claim; the folder now has other files, which keep other processes away."""
        if not self.local:
            self.delete_folder(CLAIMS)

    # Whole files

    def write(self, name: str, content: bytes) -> None:
        """Write a file under a temporary name, then rename it.

        On a local disk the file is synced before the rename and its folder afterwards, so a power loss leaves the old
        file or the new one. This costs 0.3 ms a file and 0.6 ms a megabyte on a disk that writes 1.5 GB/s. An error,
        such as a full disk, leaves nothing half-written.
        """
        with self.replacement(name) as temporary:
            if self.local:
                with open(temporary, "wb") as file:
                    file.write(content)
            else:
                self._upload(temporary, content)

    @contextmanager
    def new_file(self, name: str) -> Iterator[pa.NativeFile]:
        """Open a file to be written in pieces; it appears at the end of the block, or not at all."""
        with self.replacement(name) as temporary, self._fs.open_output_stream(temporary) as sink:
            yield sink

    @contextmanager
    def replacement(self, name: str) -> Iterator[str]:
        """Give a temporary path; at the end of the block its content is synced and renamed to the file."""
        path = self._full(name)
        temporary = f"{path}.{os.getpid()}{PART}"
        with _one_line("write", path):
            if not self.local:
                yield temporary
                self._fs.move(temporary, path)
                return
            folder = os.path.dirname(path)
            if self._owner and (self._owner[1] is None or _inode(self._owner[0]) != self._owner[1]):
                raise FileNotFoundError(errno.ENOENT, "its folder has been deleted")
            if not os.path.isdir(folder):
                os.makedirs(folder, exist_ok=True)
            try:
                yield temporary
                _sync(temporary)
                os.replace(temporary, path)
            except BaseException:  # Ctrl-C as well
                with suppress(OSError):
                    os.unlink(temporary)
                raise
            _sync(folder)

    def _upload(self, path: str, content: bytes) -> None:
        with self._fs.open_output_stream(path) as stream:  # an object store creates folders by itself
            stream.write(content)

    def read(self, name: str) -> bytes | None:
        """Return a file's content, or None if it does not exist."""
        content = self._read(name)
        return None if content is None else content.to_pybytes()

    def _read(self, name: str) -> pa.Buffer | None:
        path = self._full(name)
        with _one_line("read", path), suppress(FileNotFoundError), self._open(path) as stream:
            return stream.read_buffer()
        return None

    def digest(self, name: str) -> str | None:
        """Return the digest of a file, 16 bytes of BLAKE2b in hexadecimal, or None if it does not exist."""
        path = self._full(name)
        with _one_line("read", path), suppress(FileNotFoundError), self._open(path) as stream:
            return file_digest(stream, partial(blake2b, digest_size=16)).hexdigest()
        return None

    def _open(self, path: str) -> pa.NativeFile:
        return self._fs.open_input_stream(str(regular(path)) if self.local else path)

    # Folders

    def list(self, name: str = "") -> list[str]:
        """Return the sorted names in a folder, without unfinished files; an empty list if there is no folder."""
        folder = self._full(name).rstrip("/")
        with _one_line("list", folder):
            if self.local:
                with suppress(FileNotFoundError, NotADirectoryError):
                    return sorted(name for name in os.listdir(folder) if _is_listed(name))
                return []
            return sorted(entry.base_name for entry in self._entries(folder) if _is_listed(entry.base_name))

    def times(self, *, recursive: bool = False) -> dict[str, float]:
        """Return the modification time of every file, in seconds since 1970, by its path below the folder."""
        with _one_line("list", self._path):
            entries = self._entries(self._path, recursive)
        files = [entry for entry in entries if entry.type == fs.FileType.File and entry.mtime is not None]
        return {entry.path.removeprefix(self._path).lstrip("/"): entry.mtime.timestamp() for entry in files}

    def _entries(self, folder: str, recursive: bool = False) -> Sequence[fs.FileInfo]:
        return self._fs.get_file_info(fs.FileSelector(folder, allow_not_found=True, recursive=recursive))

    def delete(self, name: str) -> None:
        """Delete a file."""
        with _one_line("delete", self._full(name)):
            self._fs.delete_file(self._full(name))

    def delete_folder(self, name: str = "", last: str = "") -> None:
        """Delete a folder and its content, if it exists, a file named ``last`` after the others; follow no links."""
        folder = self._full(name).rstrip("/")
        with _one_line("delete", folder), suppress(FileNotFoundError):
            if os.path.islink(folder):
                os.unlink(folder)
            elif self.local:
                for path in Path(folder).iterdir() if last else ():
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path)
                    elif path.name != last:
                        path.unlink()
                shutil.rmtree(folder)
            elif entries := self._entries(folder):
                for entry in entries:
                    if entry.type == fs.FileType.Directory:
                        self._fs.delete_dir(entry.path)
                    elif entry.base_name != last:
                        self._fs.delete_file(entry.path)
                self._fs.delete_dir(folder)

    def delete_unfinished(self) -> None:
        """Delete unfinished files of processes that died, in all folders below; links are not followed."""
        with _one_line("delete files in", self._path):
            if self.local:
                paths = [f"{folder}/{name}" for folder, _, names in os.walk(self._path) for name in names]
            else:
                paths = [entry.path for entry in self._entries(self._path, recursive=True)]
            for path in filter(LEFT_BEHIND.search, paths):
                self._fs.delete_file(path)

    # JSON and tables

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as JSON."""
        text = json.dumps(value, indent=2) + "\n"
        self.write(name, text.encode())

    def read_json(self, name: str, schema: type[BaseModel] | None = None) -> Any | None:
        """Return the value of a JSON file, or None if it does not exist; refuse null and what the schema refuses."""
        content = self.read(name)
        if content is None:
            return None
        try:
            value = from_json(content)  # to a limited depth: `json` may exceed the stack
            if value is None:  # would look like a missing file
                raise ValueError("it holds null")
            if schema:
                schema.model_validate(value)
        except ValueError as error:
            problem = first_problem(error) if isinstance(error, ValidationError) else error
            raise UserError(f"{self.root}/{name} is corrupt: {problem}") from None
        return value

    def write_table(self, name: str, table: pa.Table, **form: Any) -> None:
        """Write an Arrow table as parquet, with pyarrow's options."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, **form)
        self.write(name, sink.getvalue().to_pybytes())

    def read_table(self, name: str) -> pa.Table | None:
        """Return a parquet file as an Arrow table, or None if it does not exist; refuse a corrupt file."""
        # Read as a whole, since another process may replace it. Arrow's own buffer, not Python's: its threads may drop
        # a table's source after the interpreter has ended.
        content = self._read(name)
        if content is None:
            return None
        try:
            return pq.read_table(pa.BufferReader(content))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.root}/{name} is corrupt: {error}") from None

    def _full(self, name: str) -> str:
        return f"{self._path}/{name}"


def _inode(folder: str) -> int | None:
    return os.stat(folder).st_ino if os.path.exists(folder) else None


def _is_listed(name: str) -> bool:
    return name.isprintable() and not name.endswith(PART)  # effray gives no unprintable names


def _sync(path: str) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _one_line(action: str, path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:  # of a name with NUL, and of Azure's file system
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        reason = "the disk is full" if full else getattr(error, "strerror", None) or error
        raise UserError(f"cannot {action} {path!r}: {reason}") from None
