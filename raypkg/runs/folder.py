"""The run folder: settings at the start, metrics while it runs, results by phase, the manifest last; see README.md.

The manifest and the records of phases have checksums that detect lost or changed result files.
"""

import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from importlib import metadata
from typing import Annotated, Any, Self

import pyarrow as pa
from pydantic import Field, model_validator

from raypkg.core.config import Settings, parse_toml, to_toml
from raypkg.core.errors import UserError, redacted

from .storage import PART, Storage, Stored

CONFIG = "config.toml"
SUMMARY = "summary.json"
ENVIRONMENT = "environment.json"
GROWING = "metrics.parquet"  # rewritten until the end of the run
MODEL = "model.safetensors"  # the trained model
CORESET = "coreset.parquet"
SCORES = "scores.parquet"  # of all samples, by which the coreset was chosen
LOG = "log.jsonl"  # changes of the model after the run, as JSON; the last line has the digest of the model in force
RESULTS = (".safetensors", ".parquet")  # endings of files with checksums
UNFINISHED = ("checkpoints", "ray")  # folders that only an unfinished run needs
# A TOML file that was cut short is often valid, and would silently give defaults: hence a digest in the first line.
SEAL = "# The settings of a run; the digest of what follows is "
SEALED = re.compile(re.escape(SEAL).encode() + rb"([0-9a-f]{32})\n")
LONGEST = 100  # characters of a name
NAME = re.compile(r"(?![-.])[\w.+=,@\[\]-]+")  # letters and digits of any script; no signs of shells or URIs
PACKAGES = ("effray", "torch", "torchvision", "ray", "pyarrow", "numpy")
Key = tuple[str, int, int]  # phase, model and epoch of a row; -1 for none

Amount = Annotated[int | float, Field(ge=0, le=1e100, allow_inf_nan=False)]
ResultName = Annotated[str, Field(pattern=r"^[^/]+\.(safetensors|parquet)$")]
Digests = dict[ResultName, Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None]  # of result files
Findings = Annotated[list[Annotated[str, Field(max_length=10_000)]], Field(max_length=1000)]


class Bill(Stored):
    """The cost of a phase or of a part of it: numbers by name."""

    __pydantic_extra__: dict[str, Amount]
    phase: str
    backward: Amount


class PhaseRecord(Stored):
    """The record of a finished phase."""

    costs: list[Bill]
    elapsed: Amount
    findings: Findings = Field([])
    files: Digests = Field({})
    number: int = 0
    donor: str | None = Field(None, alias="from")  # run from which the phase was taken over


class Manifest(Stored):
    """The manifest of a finished run."""

    phases: list[Bill]
    samples: Annotated[int, Field(ge=1, le=2**63)]
    coreset: Annotated[int, Field(ge=0)] | None
    seconds: Amount
    elapsed: Amount
    full_training_backward: Amount
    test_accuracy: Annotated[float, Field(ge=0, le=1)] = 0.0
    test_loss: float = 0.0
    findings: Findings = Field([])
    taken_over: dict[str, str] = Field({})
    files: Digests = Field({})

    @model_validator(mode="after")
    def _check_tested(self) -> Self:
        given = self.model_fields_set
        if "test_accuracy" in given and not ("test_loss" in given and self.full_training_backward):
            raise ValueError("test_accuracy needs test_loss and full_training_backward > 0")
        if (self.coreset or 0) > self.samples:
            raise ValueError(f"coreset = {self.coreset}: there are {self.samples} samples")
        return self


class Environment(Stored):
    """The versions and hardware that a run noted."""

    packages: dict[str, str] = Field({})
    started: str | None = None
    processor: str | None = None


class RunFolder:
    """A run's folder."""

    def __init__(self, storage: Storage):
        self.storage = storage.owned  # a run that is deleted while it is going does not come back in parts
        self._rows: dict[Key, dict[str, Any]] = {}
        self._saved = time.monotonic()
        self._has_unsaved = False
        if table := storage.read_table(GROWING):
            try:
                self._rows = {_key(row): _known(row) for row in table.to_pylist()}
            except KeyError as missing:
                raise UserError(f"{storage.root}/{GROWING} is corrupt: it has no column {missing}") from None

    @property
    def name(self) -> str:
        """The run's name: the last part of its path."""
        return self.storage.name

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The metrics so far, a row for each phase, model and epoch, in that order."""
        phases = list(dict.fromkeys(phase for phase, _, _ in self._rows))
        return [self._rows[key] for key in sorted(self._rows, key=lambda key: (phases.index(key[0]), *key[1:]))]

    @property
    def summary(self) -> dict[str, Any] | None:
        """The manifest of a finished run, or None."""
        return self.storage.read_json(SUMMARY, Manifest)

    @property
    def config(self) -> dict[str, Any]:
        """The stored settings, not yet validated. Damaged ones are refused: a run is never resumed with others."""
        return read_settings(self.storage)

    @property
    def started(self) -> bool:
        """Whether there is any result: a finished epoch or phase."""
        return bool(self._rows or self.storage.list("phases"))

    # Metrics

    def log(self, row: Mapping[str, Any]) -> bool:
        """Add a row of metrics, or replace that of the same phase, model and epoch; return True if it is new."""
        key = _key(row)
        is_new = self._rows.get(key) != _known(row)
        self._rows[key] = _known(row)
        self._has_unsaved |= is_new
        if abs(time.monotonic() - self._saved) > 1.0:  # the clock may jump either way
            self.flush()
        return is_new

    def flush(self) -> None:
        """Write the metrics to their file."""
        if self._has_unsaved:
            rows = self.rows
            names = dict.fromkeys(name for row in rows for name in row)  # in the order of their first occurrence
            columns = {name: [row.get(name) for row in rows] for name in names}
            self.storage.write_table(GROWING, pa.table(columns))
            self._has_unsaved = False
        self._saved = time.monotonic()

    # Phases

    def phase(self, name: str) -> dict[str, Any] | None:
        """Return the record of a finished phase, or None; refuse one with missing or changed files."""
        record = self.storage.read_json(f"phases/{name}.json", PhaseRecord)
        latest = self._checksums_of_phases()
        for file, digest in (record or {}).get("files", {}).items():
            if latest[file] == digest:  # otherwise a later phase has replaced the file
                self._check(file, digest, f"phase {name!r}")
        return record

    def finish_phase(self, name: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Store a phase's costs and results with checksums of its files; a resumed run skips the phase."""
        self.flush()
        known = self._checksums_of_phases()
        files = {file: digest for file, digest in self._checksums().items() if known.get(file) != digest}
        stored = {**record, "files": files, "number": len(self.storage.list("phases"))}
        self.storage.write_json(f"phases/{name}.json", stored)
        return stored

    def take_over(self, phases: Sequence[str], donor: "RunFolder") -> bool:
        """Copy finished phases of another run; return False if some of their files are gone or changed.

        The donor has the same settings for these phases and those before. Files and rows come before the records, and
        the last phase's record before those of the phases that are useless without it. A run that is stopped in the
        middle has a phase completely, or computes it again.
        """
        records: dict[str, dict[str, Any]] = {}
        files: dict[str, str] = {}  # checksums as the last of the phases left them
        for name in phases:
            record = donor.storage.read_json(f"phases/{name}.json", PhaseRecord)
            if record is None:
                return False
            records[name] = record
            files |= record.get("files", {})
        if any(donor.storage.digest(file) != digest for file, digest in files.items()):
            return False
        for file in files:
            content = donor.storage.read(file)
            if content is None:  # deleted at this moment
                return False
            self.storage.write(file, content)
        for row in donor.rows:
            if row["phase"] in records:
                self.log(row)
        self.flush()
        for name, record in reversed(records.items()):
            self.storage.write_json(f"phases/{name}.json", {"from": donor.name, **record})
        return True

    # The manifest

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Delete what only an unfinished run needs, then write the manifest with checksums: the run is done."""
        self.flush()
        for leftover in UNFINISHED:
            self.storage.delete_folder(leftover)
        self.storage.delete_unfinished()
        self.storage.write_json(SUMMARY, {**summary, "files": self._checksums()})

    def check(self, file: str) -> None:
        """Refuse a file of a finished run that is missing or changed, or a model that is not the log's last one."""
        files = (self.summary or {}).get("files", {})
        if file not in files:
            return
        log = self.storage.read(LOG) if file == MODEL else None
        if not log:
            self._check(file, files[file], f"run {self.name!r}")
            return
        in_force = None
        with suppress(ValueError, LookupError, TypeError, RecursionError):  # the command below names the damage
            in_force = json.loads(log.splitlines()[-1])["model"]
        if self.storage.digest(file) != in_force:
            root = self.storage.root
            command = f"effray {self.storage.parent.name} log {root}"
            advice = f"`{command}` completes an interrupted request, or names what is damaged"
            raise UserError(f"{root}/{file} is not the model of the last entry of {LOG}: {advice}")

    def check_all(self) -> None:
        """Refuse a finished run if any of its files is missing or changed."""
        for file in (self.summary or {}).get("files", {}):
            self.check(file)

    def _check(self, file: str, digest: str, whose: str) -> None:
        here = self.storage.digest(file)
        if here != digest:
            state = "is missing" if here is None else "has been changed or cut short"
            raise UserError(f"{self.storage.root}/{file} {state}: it is not the one that {whose} left")

    def _checksums(self) -> dict[str, str | None]:
        names = [name for name in self.storage.list() if name.endswith(RESULTS) and name != GROWING]
        return {name: self.storage.digest(name) for name in names}

    def _checksums_of_phases(self) -> dict[str, str]:
        """Return the checksum of every file of the finished phases; a later phase may replace an earlier one's."""
        files = self.storage.list("phases")
        records = [self.storage.read_json(f"phases/{file}", PhaseRecord) or {} for file in files]
        known: dict[str, str] = {}
        for record in sorted(records, key=lambda record: record.get("number", 0)):
            known |= record.get("files", {})
        return known


def _key(row: Mapping[str, Any]) -> Key:
    model, epoch = (-1 if row.get(name) is None else row[name] for name in ("model", "epoch"))
    return row["phase"], model, epoch


def _known(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None}


def write_settings(storage: Storage, settings: Settings) -> None:
    """Store settings as TOML below a line with their digest, 16 bytes of BLAKE2b in hexadecimal."""
    content = to_toml(settings).encode()
    seal = f"{SEAL}{blake2b(content, digest_size=16).hexdigest()}\n"
    storage.write(CONFIG, seal.encode() + content)


def read_settings(storage: Storage) -> dict[str, Any]:
    """Return the settings in a folder, not yet validated; without a digest in the first line they are taken as is."""
    where = f"{storage.root}/{CONFIG}"
    content = storage.read(CONFIG)
    if not (content and content.strip()):
        raise UserError(f"{where!r} is missing or empty: its settings are lost, so start a new run")
    if seal := SEALED.match(content):
        rest = content[seal.end() :]
        if blake2b(rest, digest_size=16).hexdigest() != seal[1].decode():
            raise UserError(f"{where!r} has been changed or cut short: --config takes other settings to a new run")
    return parse_toml(content, where)


def environment() -> dict[str, Any]:
    """Return versions, commit, hardware and command line, without the credentials in its URIs."""
    versions = dict.fromkeys(PACKAGES, "not installed")
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    commit, processor = None, platform.processor()
    with suppress(OSError, subprocess.TimeoutExpired):
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
        commit = git.stdout.strip() or None
    with suppress(OSError, StopIteration), open("/proc/cpuinfo") as lines:
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "packages": versions,
        "python": platform.python_version(),
        "commit": commit,
        "machine": platform.machine(),
        "processor": processor,
        "command": [redacted(word) for word in sys.argv],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def check_new(root: str, experiment: str, name: str | None, settings: Settings) -> None:
    """Refuse, before any work, a new run: its name is taken or invalid, or its settings contain credentials."""
    text = to_toml(settings)
    if redacted(text) != text:
        advice = "leave them to the environment, such as AWS_ACCESS_KEY_ID"
        raise UserError(f"a setting has credentials in its URI, which the run folder would keep: {advice}")
    if name is not None:
        check_name(name)
        runs = Storage(root) / experiment
        if (runs / name).taken:
            raise _taken(runs, name)


def create(root: str, experiment: str, name: str | None, settings: Settings) -> RunFolder:
    """Create a run folder, which only one process can, with settings and environment; an error leaves nothing."""
    check_new(root, experiment, name, settings)
    runs = Storage(root) / experiment
    stem = name
    if stem is None:  # after data, model and time
        values = settings.model_dump()
        chosen = [values[part]["name"] for part in ("dataset", "model") if part in values]
        kinds = [each.partition(":")[0] for each in chosen if each]  # without a path or function
        stem = "-".join([*kinds, time.strftime("%m%d-%H%M%S")])
    storage, number = runs / stem, 1
    while not storage.claim():
        if name is not None:
            raise _taken(runs, name)
        number += 1  # another process was faster
        storage = runs / f"{stem}-{number}"
    try:
        storage.write_json(ENVIRONMENT, environment())
        write_settings(storage, settings)  # last: with them, the run can be resumed
        storage.settle()
    except BaseException:
        storage.delete_folder()
        raise
    return RunFolder(storage)


def _taken(runs: Storage, name: str) -> UserError:
    advice = f"give another --name, or resume it with --resume {name}"
    if CONFIG not in (runs / name).list():  # its process died, or is about to write them
        advice = "it has no settings yet; if no process is starting it, delete the folder"
    return UserError(f"run {name!r} exists in {runs.root}: {advice}")


def check_name(name: str) -> None:
    """Refuse a name that is not plain text for folders, shells and URIs.

    >>> check_name("lr=0.1,seed=2")
    >>> check_name("a%2F..")
    Traceback (most recent call last):
    raypkg.core.errors.UserError: --name 'a%2F..': 1 to 100 letters, digits or . _ + = , @ [ ] -, no dot or dash at ...
    """
    if len(name) > LONGEST or not NAME.fullmatch(name) or name.endswith(PART):
        ends = f"no dot or dash at the start, no {PART} at the end"
        raise UserError(f"--name {name[:40]!r}: 1 to {LONGEST} letters, digits or . _ + = , @ [ ] -, {ends}")
