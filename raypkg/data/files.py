"""Files of a data source: paths of this machine, or objects of a store that a URI names, which are used alike."""

from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeAlias

import pyarrow as pa
from pyarrow import fs

from raypkg.core.address import address_of, is_uri, opened, parted
from raypkg.core.errors import UserError

Names = tuple[str, ...]  # of folders and a file, from the root of a listing down


class Listing(NamedTuple):
    """What lies at an address or below it.

    Attributes:
        base: the address.
        system: where it is.
        root: its path there.
        files: size and time of each file, by its names below the root; of a root that is a file, by no name.
        folders: the names in each folder.
    """

    base: str
    system: fs.FileSystem
    root: str
    files: dict[Names, fs.FileInfo]
    folders: dict[Names, set[str]]

    @classmethod
    def of(cls, address: str) -> "Listing":
        """List an address: one request for every thousand objects.

        Raises:
            UserError: the address names no file system, or its server is not there or denies the listing.
        """
        base, below = parted(address)
        system, path = opened(base)
        root = "/".join([path, *below])
        try:
            found = system.get_file_info(root)
            is_file = found.type == fs.FileType.File
            entries = [found] if is_file else system.get_file_info(fs.FileSelector(root, recursive=True))
        except FileNotFoundError:
            entries = []
        except OSError as error:
            raise UserError(f"{address!r} cannot be listed: {error}") from None
        files = {_names(entry.path, root): entry for entry in entries if entry.type == fs.FileType.File}
        folders: dict[Names, set[str]] = {}
        for names in files:
            for depth, name in enumerate(names):
                folders.setdefault(names[:depth], set()).add(name)
        return cls(address, system, root, files, folders)


class Remote:
    """A file or folder behind a URI; its attributes and methods are those of the same names of ``Path``.

    Everything below a root is listed once, when the root is made: what changes afterwards is not seen.

    Args:
        listing: of the root.
        names: from the root down to this one.
    """

    def __init__(self, listing: Listing, names: Names = ()):
        self.listing = listing
        self.names = names

    def __str__(self) -> str:
        return address_of(self.listing.base, self.names)

    def __truediv__(self, name: str) -> "Remote":
        return Remote(self.listing, (*self.names, name))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.names[-1] if self.names else PurePosixPath(self.listing.root).name

    @property
    def suffix(self) -> str:
        """The last ending of the name."""
        return PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        """The name without its last ending."""
        return PurePosixPath(self.name).stem

    @property
    def info(self) -> fs.FileInfo:
        """Size and time of this file when it was listed."""
        return self.listing.files[self.names]

    def is_file(self) -> bool:
        """Say whether it is a file."""
        return self.names in self.listing.files

    def is_dir(self) -> bool:
        """Say whether it is a folder in which, or below which, files are: object stores know no others."""
        return self.names in self.listing.folders

    def exists(self) -> bool:
        """Say whether it is a file or folder."""
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator["Remote"]:
        """Yield the files and folders in this folder."""
        for name in sorted(self.listing.folders.get(self.names, ())):
            yield self / name

    def resolve(self) -> "Remote":
        """Return the same: object stores have no links."""
        return self

    def open_input(self) -> pa.NativeFile:
        """Open this file for reading; only what is read is fetched."""
        path = "/".join([self.listing.root, *self.names])
        return self.listing.system.open_input_file(path)


Place: TypeAlias = Path | Remote


def place_of(root: str) -> Place:
    """Return what a source's PATH names.

    Raises:
        UserError: a URI of no file system, or of one that is not there or denies the listing.
    """
    return Remote(Listing.of(root)) if is_uri(root) else Path(root)


def files_below(folder: Place) -> list[Place]:
    """Return the files below a folder, sorted; of a local one folders too, and links that lead nowhere."""
    if isinstance(folder, Path):
        return [*sorted(folder.rglob("*"))]
    return list(_files_below(folder))


def open_input(file: Place) -> pa.NativeFile:
    """Open a file for reading, at any position.

    Raises:
        OSError: it cannot be opened.
    """
    return pa.OSFile(str(file)) if isinstance(file, Path) else file.open_input()


class Identity(NamedTuple):
    """What tells a file from another one or a later one."""

    address: str
    size: int  # bytes
    time: int  # of its last change, nanoseconds


def identity_of(file: Place) -> Identity:
    """Return what tells a file from another one or a later one.

    Raises:
        OSError: it is not there.
    """
    if isinstance(file, Path):
        stat = file.stat()
        return Identity(str(file.resolve()), stat.st_size, stat.st_mtime_ns)
    if not file.is_file():
        raise FileNotFoundError(f"{str(file)!r} is not there any more")
    return Identity(str(file), file.info.size, file.info.mtime_ns)


def relisted(files: Iterable[Place]) -> list[Place]:
    """Return the same files as they are now: those of object stores are listed again, each root once.

    Raises:
        UserError: a root cannot be listed any more.
    """
    listings: dict[str, Listing] = {}
    now: list[Place] = []
    for file in files:
        if isinstance(file, Remote):
            base = file.listing.base
            listings[base] = listings.get(base) or Listing.of(base)
            file = Remote(listings[base], file.names)
        now.append(file)
    return now


def _files_below(folder: Remote) -> Iterator[Remote]:
    for place in folder.iterdir():
        if place.is_file():
            yield place
        yield from _files_below(place)


def _names(path: str, root: str) -> Names:
    return tuple(path.removeprefix(root).strip("/").split("/")) if path != root else ()
