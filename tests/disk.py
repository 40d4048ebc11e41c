"""A disk that fails, or whose user dies, at a chosen operation; to be installed in a process that ends soon."""

import builtins
import errno
import io
import os
import shutil
from collections.abc import Callable, Collection
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa

from forked import DEATH
from raypkg.runs.storage import Storage

ALL = ("mkdir", "open", "write", "sync", "close", "rename")
STEPS = ("rename", "delete")  # after which the disk holds something else


def quick() -> None:
    """Spare the pictures' time, and write the metrics after each epoch, as slower trainings do."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from raypkg.runs import folder, plots

    os.fsync = lambda descriptor: None
    for name in ("curves", "composition", "scores", "gallery"):
        setattr(plots, name, lambda *data: Path(data[-1]).write_bytes(b"picture"))
    hours = count(step=3600)
    FigureCanvasAgg.print_png = lambda canvas, path, **_: Path(path).write_bytes(b"picture")
    folder.time = SimpleNamespace(monotonic=lambda: next(hours), strftime=folder.time.strftime)


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only() -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def death() -> None:
    os._exit(DEATH)


class Disk:
    """Counts the operations on files below a folder, and acts in place of operation number ``at``, from 1.

    With ``onwards`` it acts in place of all later ones too. Only ``kinds`` count; ``log`` gets a line for each.
    """

    def __init__(
        self,
        folder: Path,
        act: Callable[[], None] = full,
        at: int = 0,
        kinds: Collection[str] = ALL,
        onwards: bool = False,
        log: Path | None = None,
    ):
        self._count = 0
        self._folder = str(folder)
        self._act = act
        self._at = at
        self._kinds = kinds
        self._onwards = onwards
        self._log = None if log is None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def step(self, kind: str, path: Any) -> None:
        """Count an operation, and let it fail if it is the chosen one."""
        path = os.path.abspath(os.fsdecode(path))
        if kind not in self._kinds or not f"{path}/".startswith(f"{self._folder}/"):
            return
        self._count += 1
        if self._log is not None:
            os.write(self._log, f"{kind} {os.path.relpath(path, self._folder)}\n".encode())
        if self._count == self._at or (self._onwards and self._count > self._at):
            self._act()

    def install(self) -> "Disk":
        """Put this disk under the process."""
        kinds = {"mkdir": "mkdir", "replace": "rename", "rename": "rename", "unlink": "delete", "rmdir": "delete"}
        for name, kind in kinds.items():
            self._wrap(name, kind)
        rmtree = shutil.rmtree
        delete = Storage.delete

        def counted_rmtree(path: Any, ignore_errors: bool = False, **options: Any) -> None:
            try:
                self.step("delete", path)
            except OSError:
                if not ignore_errors:
                    raise
            else:
                rmtree(path, ignore_errors, **options)

        def counted_delete(storage: Storage, name: str) -> None:
            self.step("delete", f"{storage.local}/{name}")
            delete(storage, name)

        # No power is lost here, so a sync is only counted.
        os.fsync = lambda descriptor: self.step("sync", os.readlink(f"/proc/self/fd/{descriptor}"))
        shutil.rmtree = counted_rmtree
        Storage.delete = counted_delete
        builtins.open = io.open = self._open(io.open)
        pa.OSFile = lambda path, mode="rb": pa.PythonFile(open(path, mode))
        return self

    def _wrap(self, name: str, kind: str) -> None:
        original = getattr(os, name)

        def counted(path: Any, *others: Any, **options: Any) -> Any:
            self.step(kind, path)
            return original(path, *others, **options)

        setattr(os, name, counted)

    def _open(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(file: Any, mode: str = "r", *others: Any, **options: Any) -> Any:
            if isinstance(file, int) or mode in ("r", "rb", "rt"):
                return original(file, mode, *others, **options)
            self.step("open", file)
            if "b" not in mode:
                return original(file, mode, *others, **options)
            raw = _Raw(file, mode.replace("b", ""), self)
            return io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)

        return counted


class _Raw(io.FileIO):
    """A file whose writes count."""

    def __init__(self, path: Any, mode: str, disk: Disk):
        super().__init__(path, mode)
        self._path = path
        self._disk = disk

    def write(self, content: Any) -> int | None:
        self._disk.step("write", self._path)
        return super().write(content)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._disk.step("close", self._path)
