"""Addresses of folders and files: local paths and URIs, and the file systems that they name.

A URI may have a query, as private S3 servers need: ``s3://bucket/runs?endpoint_override=http://host:9000``. Names of
folders below such a URI follow behind a ``#``, so that they can be appended to the text of any address.
"""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote, unquote

import pyarrow as pa
from pyarrow import fs

from raypkg.core.errors import UserError

SCHEMES = ("abfs:", "abfss:", "file:", "gcs:", "gs:", "hdfs:", "s3:", "viewfs:")
ATTEMPTS = 3  # of a request to an object store
TIMEOUTS = {"connect_timeout": 3, "request_timeout": 5}  # seconds, so that a missing server is reported soon


def is_uri(address: str) -> bool:
    """Return True if an address is a URI, not a local path."""
    return "://" in address


def address_of(base: str, names: Iterable[str]) -> str:
    """Return the address of nested names below a base; further names may be appended to its text.

    >>> address_of("s3://bucket/runs", ["train", "[a]"])
    's3://bucket/runs/train/%5Ba%5D'
    >>> address_of("s3://bucket/runs?region=x", ["train", "[a]"])
    's3://bucket/runs?region=x#/train/[a]'
    """
    if is_uri(base) and "?" in base:
        return "/".join([f"{base}#", *names]) if names else base
    return uri_of(base, names)


def uri_of(base: str, names: Iterable[str]) -> str:
    """Return the same address in the form of other libraries: the query at the end.

    >>> uri_of("s3://bucket/runs?region=x", ["train", "one"])
    's3://bucket/runs/train/one?region=x'
    """
    folder, query = _split_query(base)
    if is_uri(base):
        names = [quote(name, safe="@=+,") for name in names]
    return "/".join([folder.rstrip("/"), *names]) + query


def parted(address: str) -> tuple[str, tuple[str, ...]]:
    """Return the base of an address and the names behind its ``#``; a local path is made absolute.

    >>> parted("s3://bucket/runs?region=x#/train/one")
    ('s3://bucket/runs?region=x', ('train', 'one'))
    """
    try:
        if is_uri(address):
            base, _, below = address.partition("#")
            names = tuple(name for name in below.split("/") if name)
            if ".." in names:
                raise ValueError("names behind # cannot be ..")
            return base, names
        if address.startswith(SCHEMES):
            raise ValueError("a URI has // behind the colon")
        if "\0" in address:
            raise ValueError("a path cannot contain NUL")
        address.encode()
        return str(Path(address).expanduser().absolute()), ()  # workers may run in another folder
    except (ValueError, RuntimeError) as error:  # the second: ~ of an unknown user
        raise UserError(f"cannot use {address!r} as a folder: {error}") from None


def folder_and_name(file: str) -> tuple[str, str]:
    """Return the address of the folder around a file, and the file's name.

    >>> folder_and_name("s3://bucket?region=x#/one/coreset.parquet"), folder_and_name("parquet:/data/cifar10")
    (('s3://bucket?region=x#/one', 'coreset.parquet'), ('parquet:/data', 'cifar10'))
    """
    address, query = (file, "") if "#" in file else _split_query(file)
    folder, slash, name = address.rpartition("/")
    folder = folder or slash or "."
    return folder + query, unquote(name) if is_uri(file) else name


def folder_around(base: str) -> str:
    """Return the parent folder of a base."""
    folder, query = _split_query(base)
    above = folder.rstrip("/").rpartition("/")[0]
    return (above or "/") + query


@lru_cache(maxsize=32)  # one connection for all folders of a base
def opened(base: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of a base, and the path there; refuse a URI without a bucket or folder."""
    if not is_uri(base):
        return fs.LocalFileSystem(), base.rstrip("/")
    try:
        system, path = fs.FileSystem.from_uri(base)
    except (pa.ArrowException, UnicodeEncodeError, OSError) as error:
        raise UserError(f"cannot use {base!r} as a folder: {error}") from None
    if not path:
        raise UserError(f"cannot use {base!r} as a folder: it names neither bucket nor folder")
    if system.type_name == "s3":
        _, (options,) = system.__reduce__()  # a URI has no parameters for timeouts
        retries = fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS)
        system = fs.S3FileSystem(**options | TIMEOUTS | {"retry_strategy": retries})
    return system, path.rstrip("/")


def _split_query(base: str) -> tuple[str, str]:
    """Return a base without its query, and the query with its question mark; in a path, ? is an ordinary character."""
    folder, mark, query = base.partition("?") if is_uri(base) else (base, "", "")
    return folder, mark + query
