"""Addresses: local paths and URIs, what is joined to them and cut from them, and the file systems that they name.

A URI may have a query, as S3 servers of one's own need: ``s3://bucket/runs?endpoint_override=http://host:9000``. Names
below such a URI follow behind a ``#``, so that in every address the last part of the text is the last part of the path.
"""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote, unquote

import pyarrow as pa
from pyarrow import fs

from raypkg.core.errors import UserError

ATTEMPTS = 3  # at a request to an object store
CONNECTING = 3  # seconds, so that a server which is not there is told of soon
ANSWERING = 5  # seconds without a byte


def is_uri(address: str) -> bool:
    """Say whether an address is a URI, and not a local path."""
    return "://" in address


def address_of(base: str, names: Iterable[str]) -> str:
    """Return the address of what names lead to from a base; further names may be joined to its text.

    >>> address_of("s3://bucket/runs", ["train", "[a]"])
    's3://bucket/runs/train/%5Ba%5D'
    >>> address_of("s3://bucket/runs?region=x", ["train", "[a]"])
    's3://bucket/runs?region=x#/train/[a]'
    """
    if is_uri(base) and "?" in base:
        return "/".join([f"{base}#", *names]) if names else base
    return uri_of(base, names)


def uri_of(base: str, names: Iterable[str]) -> str:
    """Return the same as other libraries take it, with the query at the end.

    >>> uri_of("s3://bucket/runs?region=x", ["train", "one"])
    's3://bucket/runs/train/one?region=x'
    """
    folder, query = _without_query(base)
    if is_uri(base):
        names = [quote(name, safe="@=+,") for name in names]
    return "/".join([folder.rstrip("/"), *names]) + query


def parted(address: str) -> tuple[str, tuple[str, ...]]:
    """Return the base of an address, and the names behind its ``#``.

    Raises:
        UserError: a path that is no text, of nobody's home, or that leads out of the base.

    >>> parted("s3://bucket/runs?region=x#/train/one")
    ('s3://bucket/runs?region=x', ('train', 'one'))
    """
    if not is_uri(address):
        return _absolute(address), ()  # a worker may run in another folder
    base, _, below = address.partition("#")
    names = tuple(name for name in below.split("/") if name)
    if ".." in names:
        raise UserError(f"cannot use {address!r} as a folder: names behind # cannot be ..")
    return base, names


def folder_and_name(file: str) -> tuple[str, str]:
    """Return the address of the folder around a file, and the file's name.

    >>> folder_and_name("s3://bucket/one/coreset.parquet?region=x")
    ('s3://bucket/one?region=x', 'coreset.parquet')
    >>> folder_and_name("s3://bucket?region=x#/one/coreset.parquet")
    ('s3://bucket?region=x#/one', 'coreset.parquet')
    """
    address, query = (file, "") if "#" in file else _without_query(file)
    folder, slash, name = address.rpartition("/")
    folder = folder or slash or "."
    return folder + query, unquote(name) if is_uri(file) else name


def folder_around(base: str) -> str:
    """Return the base of the folder around that of a base."""
    folder, query = _without_query(base)
    above = folder.rstrip("/").rpartition("/")[0]
    return (above or "/") + query


@lru_cache(maxsize=32)  # one connection for all folders of a base
def opened(base: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of a base, and the path there.

    Raises:
        UserError: there is none such.
    """
    if not is_uri(base):
        return fs.LocalFileSystem(), base.rstrip("/")
    try:
        system, path = fs.FileSystem.from_uri(base)
    except (pa.ArrowException, UnicodeEncodeError, OSError) as error:
        raise UserError(f"cannot use {base!r} as a folder: {error}") from None
    if not path:
        raise UserError(f"cannot use {base!r} as a folder: it names neither bucket nor folder")
    if system.type_name == "s3":
        system = _impatient(system)
    return system, path.rstrip("/")


def _impatient(system: fs.FileSystem) -> fs.FileSystem:
    """Return a connection to S3 that gives up within seconds, which no URI can ask for."""
    _, (options,) = system.__reduce__()
    patience = {
        "connect_timeout": CONNECTING,
        "request_timeout": ANSWERING,
        "retry_strategy": fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
    }
    return fs.S3FileSystem(**{**options, **patience})


def _without_query(base: str) -> tuple[str, str]:
    """Return a base without its query, and the query with its question mark."""
    if not is_uri(base):
        return base, ""  # a question mark of a path is one of its characters
    folder, mark, query = base.partition("?")
    return folder, mark + query


def _absolute(path: str) -> str:
    if "\0" in path:
        raise UserError(f"cannot use {path!r} as a folder: no path holds a NUL")
    try:
        path.encode()
        return str(Path(path).expanduser().absolute())
    except UnicodeEncodeError:
        raise UserError(f"cannot use {path!r} as a folder: its name is not UTF-8") from None
    except RuntimeError as error:  # ~ of nobody
        raise UserError(f"cannot use {path!r} as a folder: {error}") from None
