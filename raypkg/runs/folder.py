"""The run folder: settings first, metrics while it runs, results by phase, the manifest last.

    <root>/<experiment>/<name>/  config.toml  environment.json  metrics.parquet  phases/*.json  coreset.parquet
                                 model.safetensors  checkpoints/  plots/*.png  summary.json

``summary.json`` is written last: where it exists, the run is done.
"""

import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import pyarrow as pa

from raypkg.core.config import Settings, parse_toml, to_toml
from raypkg.core.errors import UserError, unknown

from .storage import PART, Storage

LONGEST = 100  # characters of a name
PACKAGES = ("effray", "torch", "torchvision", "ray", "pyarrow", "numpy")


class RunFolder:
    """One run's folder.

    Args:
        storage: where it is.
    """

    def __init__(self, storage: Storage):
        self.storage = storage
        self._rows: dict[tuple[Any, ...], dict[str, Any]] = {}  # by phase, model and epoch
        self._saved = time.monotonic()
        if table := storage.read_table("metrics.parquet"):
            for row in table.to_pylist():
                self._keep(row)

    @property
    def name(self) -> str:
        """The run's name: the last part of its path."""
        return self.storage.root.rpartition("/")[2]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The metrics so far, a row for each phase, model and epoch."""
        return list(self._rows.values())

    @property
    def summary(self) -> dict[str, Any] | None:
        """The manifest of a finished run, or None."""
        return self.storage.read_json("summary.json")

    @property
    def config(self) -> dict[str, Any]:
        """The stored settings, not yet validated.

        Raises:
            UserError: they are no TOML.
        """
        return parse_toml((self.storage.read("config.toml") or b"").decode(), f"{self.storage.root}/config.toml")

    @property
    def started(self) -> bool:
        """Whether there is any result yet: a finished phase, or an epoch of one."""
        return bool(self._rows or self.storage.list("phases"))

    def log(self, row: Mapping[str, Any]) -> bool:
        """Add a row of metrics, in the place of one for the same phase, model and epoch; say whether it is new."""
        before = self._rows.get(_key(row))
        self._keep(row)
        if time.monotonic() - self._saved > 1.0:
            self.flush()
        return self._rows[_key(row)] != before

    def _keep(self, row: Mapping[str, Any]) -> None:
        self._rows[_key(row)] = {name: value for name, value in row.items() if value is not None}

    def flush(self) -> None:
        """Write the metrics out."""
        if self._rows:
            names = dict.fromkeys(name for row in self.rows for name in row)  # in the order in which they first occur
            columns = {name: [row.get(name) for row in self.rows] for name in names}
            self.storage.write_table("metrics.parquet", pa.table(columns))
        self._saved = time.monotonic()

    def phase(self, name: str) -> dict[str, Any] | None:
        """Return what a finished phase left, or None."""
        return self.storage.read_json(f"phases/{name}.json")

    def finish_phase(self, name: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Keep a phase's bill and results; a resumed run skips the phase."""
        self.flush()
        self.storage.write_json(f"phases/{name}.json", dict(record))
        return dict(record)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the manifest: the run is done."""
        self.flush()
        self.storage.write_json("summary.json", dict(summary))


def create(root: str, experiment: str, name: str | None, settings: Settings) -> RunFolder:
    """Make a new run folder and write its settings and environment before the first step.

    Raises:
        UserError: a run of that name exists, or the name cannot be one.
    """
    if name is not None:
        check_name(name)
    runs = Storage(root) / experiment
    taken = runs.list()
    if name in taken:
        raise UserError(f"run {name!r} exists in {runs.root}: give another --name, or resume it with --resume {name}")
    storage = runs / (name or _free_name(settings, taken))
    storage.write("config.toml", to_toml(settings).encode())
    storage.write_json("environment.json", environment())
    return RunFolder(storage)


def check_name(name: str) -> None:
    """Refuse a name that no folder, or no shell, takes as it is.

    Raises:
        UserError: it is empty or long, begins with a dot, or has blanks, slashes or signs of the shell.
    """
    if not 0 < len(name) <= LONGEST or re.search(r"""^\.|[\s/\\$`"'*?;&|<>]""", name) or name.endswith(PART):
        raise UserError(
            f"--name {name[:40]!r}: 1 to {LONGEST} characters, no blank, slash, quote or sign of the shell, no dot at"
            f" the start, no {PART} at the end"
        )


def find(root: str, experiment: str, name: str) -> RunFolder:
    """Open an existing run by its name.

    Raises:
        UserError: no such run, the nearest one named.
    """
    runs = Storage(root) / experiment
    if name not in runs.list():
        raise unknown(f"{experiment} run in {runs.root}", name, runs.list())
    return RunFolder(runs / name)


def locate(root: str, run: str) -> RunFolder:
    """Open a run by its path, or by its name in whichever experiment has it.

    Raises:
        UserError: no such run, the nearest one named, or several.
    """
    runs = Storage(root)
    for storage in (Storage(run), runs / run):
        if _is_run(storage):
            return RunFolder(storage)
    kinds = [kind for kind in runs.list() if _is_run(runs / kind / run)]
    if len(kinds) > 1:
        raise UserError(f"there is a run {run!r} of {' and of '.join(kinds)}: give {kinds[0]}/{run}, or another")
    if kinds:
        return RunFolder(runs / kinds[0] / run)
    everyone = [(kind, name) for kind in runs.list() for name in (runs / kind).list()]
    names = {name for kind, name in everyone if _is_run(runs / kind / name)}
    raise unknown(f"run in {root}", run, sorted(names))


def _is_run(storage: Storage) -> bool:
    return "config.toml" in storage.list()


def environment() -> dict[str, Any]:
    """Return what a reader needs to judge a run's figures: versions, commit, hardware."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "packages": versions,
        "python": platform.python_version(),
        "commit": _commit(),
        "machine": platform.machine(),
        "processor": _processor(),
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _free_name(settings: Settings, taken: list[str]) -> str:
    values = settings.model_dump()
    chosen = [values[part]["name"] for part in ("dataset", "model") if part in values]
    kinds = [name.partition(":")[0] for name in chosen]  # without the path or the function
    stem = "-".join([*kinds, time.strftime("%m%d-%H%M%S")])
    return stem if stem not in taken else f"{stem}-{len(taken)}"


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["phase"], row.get("model"), row.get("epoch")


def _commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
