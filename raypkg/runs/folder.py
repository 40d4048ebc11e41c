"""The run folder: settings first, metrics while it runs, results by phase, the manifest last.

    <root>/<experiment>/<name>/  config.toml  environment.json  metrics.parquet  phases/*.json  coreset.parquet
                                 model.safetensors  checkpoints/  plots/*.png  summary.json

``summary.json`` is written last: where it exists, the run is done. It and the records of phases hold a digest of every
file that the run left, by which a reader tells one that has been lost, cut short or changed.
"""

import re
import time
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import pyarrow as pa

from raypkg.core.config import Settings, to_toml
from raypkg.core.errors import UserError, redacted, unknown

from .columns import metric_rows
from .environment import environment
from .sealed import CONFIG, read_settings, write_settings
from .storage import PART, Storage

LONGEST = 100  # characters of a name
NAME = re.compile(r"(?![-.])[\w.+=,@\[\]-]+")  # letters and digits of any script, and few signs: none of a shell or URI
RESULTS = (".safetensors", ".parquet")  # endings of the files whose digests are kept
UNFINISHED = ("checkpoints", "ray")  # folders that a run needs until all its phases are done
MODEL = "model.safetensors"  # the trained model
GROWING = "metrics.parquet"  # written to until the end
Key = tuple[str, int | None, int | None]  # phase, model and epoch of a row
NEEDED = {
    "summary.json": ("phases", "samples", "coreset", "seconds", "elapsed", "full_training_backward"),
    "phases": ("costs", "elapsed"),
}


class RunFolder:
    """One run's folder.

    Args:
        storage: where it is.
    """

    def __init__(self, storage: Storage):
        self.storage = storage.kept  # a run that was deleted while it is going does not come back as a part of itself
        self._rows: dict[Key, dict[str, Any]] = {}  # by phase, model and epoch
        self._saved = time.monotonic()
        self._unsaved = False  # whether there are rows that the file does not have
        if table := storage.read_table(GROWING):
            for row in metric_rows(table, f"{storage.root}/{GROWING}"):
                self._keep(row)

    @property
    def name(self) -> str:
        """The run's name: the last part of its path."""
        return self.storage.name

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The metrics so far: a row for each phase, model and epoch, in that order, whichever worker was first."""
        phases = list(dict.fromkeys(phase for phase, _, _ in self._rows))

        def place(key: Key) -> tuple[int, int, int]:
            phase, model, epoch = key
            return phases.index(phase), -1 if model is None else model, -1 if epoch is None else epoch

        return [self._rows[key] for key in sorted(self._rows, key=place)]

    @property
    def summary(self) -> dict[str, Any] | None:
        """The manifest of a finished run, or None.

        Raises:
            UserError: it is damaged.
        """
        return self._record("summary.json", NEEDED["summary.json"])

    @property
    def config(self) -> dict[str, Any]:
        """The stored settings, not yet validated.

        Raises:
            UserError: they are missing, damaged or no TOML: a run is never resumed with others.
        """
        return read_settings(self.storage)

    @property
    def started(self) -> bool:
        """Whether there is any result yet: a finished phase, or an epoch of one."""
        return bool(self._rows or self.storage.list("phases"))

    def log(self, row: Mapping[str, Any]) -> bool:
        """Add a row of metrics, in the place of one for the same phase, model and epoch; say whether it is new."""
        before = self._rows.get(_key(row))
        self._keep(row)
        is_new = self._rows[_key(row)] != before
        self._unsaved |= is_new
        if abs(time.monotonic() - self._saved) > 1.0:  # whichever way the clock was set
            self.flush()
        return is_new

    def _keep(self, row: Mapping[str, Any]) -> None:
        self._rows[_key(row)] = {name: value for name, value in row.items() if value is not None}

    def flush(self) -> None:
        """Write the metrics out."""
        if self._unsaved:
            rows = self.rows
            names = dict.fromkeys(name for row in rows for name in row)  # in the order in which they first occur
            columns = {name: [row.get(name) for row in rows] for name in names}
            self.storage.write_table(GROWING, pa.table(columns))
            self._unsaved = False
        self._saved = time.monotonic()

    def phase(self, name: str) -> dict[str, Any] | None:
        """Return what a finished phase left, or None.

        Raises:
            UserError: its record is damaged, or a file that it left is not what it was.
        """
        record = self._record(f"phases/{name}.json", NEEDED["phases"])
        latest = self._known_files()
        for file, digest in (record or {}).get("files", {}).items():
            if latest[file] == digest:  # otherwise a later phase has written it anew
                self._check(file, digest, f"phase {name!r}")
        return record

    def finish_phase(self, name: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Keep a phase's bill and results, with digests of its files; a resumed run skips the phase."""
        self.flush()
        known = self._known_files()
        files = {file: digest for file, digest in self._digests().items() if known.get(file) != digest}
        whole = {**record, "files": files, "number": len(self.storage.list("phases"))}
        self.storage.write_json(f"phases/{name}.json", whole)
        return whole

    def take_over(self, phases: Sequence[str], donor: "RunFolder") -> bool:
        """Copy finished phases of another run; say whether it still had all that they left.

        Files and rows come before the records, and the last phase's record before those of phases that are of no use
        without it: a run that is stopped in the midst has a phase whole, or does it again.

        Args:
            phases: the next ones of this run, in their order.
            donor: whose settings for these phases and those before are the same.
        """
        records: dict[str, dict[str, Any]] = {}
        files: dict[str, str] = {}  # as the last of the phases left them
        for name in phases:
            record = donor._record(f"phases/{name}.json", NEEDED["phases"])
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

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Drop what only an unfinished run needs, and write the manifest, with all files' digests: the run is done."""
        self.flush()
        for leftover in UNFINISHED:
            self.storage.delete_folder(leftover)
        self.storage.delete_unfinished()
        self.storage.write_json("summary.json", {**summary, "files": self._digests()})

    def check(self, file: str) -> None:
        """Refuse a file of a finished run that is not what the run left.

        Raises:
            UserError: it is missing or has been changed.
        """
        files = (self.summary or {}).get("files", {})
        if file in files:
            self._check(file, files[file], f"run {self.name!r}")

    def check_all(self) -> None:
        """Refuse a finished run of which any file is not what the run left.

        Raises:
            UserError: which file is missing or has been changed.
        """
        for file in (self.summary or {}).get("files", {}):
            self.check(file)

    def note_change(self, file: str) -> None:
        """Keep the digest of a file that was changed on purpose after the run."""
        summary = self.summary or {}
        files = summary.get("files", {})
        digest = self.storage.digest(file)
        if files and files.get(file) != digest:
            self.storage.write_json("summary.json", {**summary, "files": {**files, file: digest}})

    def _check(self, file: str, digest: str, whose: str) -> None:
        here = self.storage.digest(file)
        if here != digest:
            what = "is missing" if here is None else "has been changed or cut short"
            raise UserError(f"{self.storage.root}/{file} {what}: it is not the one that {whose} left")

    def _digests(self) -> dict[str, str | None]:
        names = [name for name in self.storage.list() if name.endswith(RESULTS) and name != GROWING]
        return {name: self.storage.digest(name) for name in names}

    def _phases(self) -> list[dict[str, Any]]:
        """Return the records of the finished phases in their order."""
        files = self.storage.list("phases")
        records = [self._record(f"phases/{file}", NEEDED["phases"]) or {} for file in files]
        return sorted(records, key=lambda record: record.get("number", 0))

    def _known_files(self) -> dict[str, str]:
        """Return the digest of every file that a finished phase has left, as the last of them left it."""
        known: dict[str, str] = {}
        for record in self._phases():
            known |= record.get("files", {})
        return known

    def _record(self, file: str, needed: tuple[str, ...]) -> dict[str, Any] | None:
        """Return a file of JSON that must have some names, or None where there is none."""
        record = self.storage.read_json(file)
        if record is None:
            return None
        if not isinstance(record, dict) or not record.keys() >= set(needed):
            raise UserError(f"{self.storage.root}/{file} is corrupt: it must have {', '.join(needed)}")
        return record


def check_new(root: str, experiment: str, name: str | None, settings: Settings) -> None:
    """Refuse, before any work, a new run whose folder cannot be made.

    Raises:
        UserError: a run of that name exists, the name is invalid, or the settings contain credentials.
    """
    text = to_toml(settings)
    if redacted(text) != text:
        raise UserError(
            "a setting has credentials in its URI, which the run folder would keep: leave them to the environment, such"
            " as AWS_ACCESS_KEY_ID"
        )
    if name is not None:
        check_name(name)
        runs = Storage(root) / experiment
        if name in runs.list():
            raise _taken(runs, name)


def create(root: str, experiment: str, name: str | None, settings: Settings) -> RunFolder:
    """Make a new run folder, which no other process can make too, and write its settings and environment.

    Raises:
        UserError: a run of that name exists, the name cannot be one, the settings have credentials in them, or the
            disk is full: nothing is left behind.
    """
    check_new(root, experiment, name, settings)
    runs = Storage(root) / experiment
    if name is None:
        storage = _claimed_freely(runs, settings)
    else:
        storage = runs / name
        if not storage.claim():
            raise _taken(runs, name)
    try:
        storage.write_json("environment.json", environment())
        write_settings(storage, settings)  # the last: with it, the run can be resumed
        storage.settle()
    except BaseException:
        discard(storage)
        raise
    return RunFolder(storage)


def _taken(runs: Storage, name: str) -> UserError:
    if CONFIG in (runs / name).list():
        way_out = f"give another --name, or resume it with --resume {name}"
    else:  # who made it died, or is about to write them
        way_out = "it has no settings yet; if nobody is starting it, delete the folder"
    return UserError(f"run {name!r} exists in {runs.root}: {way_out}")


def discard(storage: Storage) -> None:
    """Delete a run folder that this process made, and the folder around it where that is empty."""
    storage.delete_folder("")
    storage.parent.delete_if_empty()


def check_name(name: str) -> None:
    """Refuse a name that no folder, shell or URI takes as it is.

    Raises:
        UserError: it is empty or long, or has characters that a name cannot have.

    >>> check_name("lr=0.1,seed=2")
    >>> check_name("a%2F..")
    Traceback (most recent call last):
    raypkg.core.errors.UserError: --name 'a%2F..': 1 to 100 letters, digits or . _ + = , @ [ ] -, no dot or dash at ...
    """
    if len(name) > LONGEST or not NAME.fullmatch(name) or name.endswith(PART):
        raise UserError(
            f"--name {name[:40]!r}: 1 to {LONGEST} letters, digits or . _ + = , @ [ ] -, no dot or dash at the start,"
            f" no {PART} at the end"
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


def locate(root: str, run: str, having: str | None = None) -> RunFolder:
    """Open a run by its path, or by its name in whichever experiment has it.

    Args:
        root: of all runs.
        run: its path or name.
        having: only runs that have this file are named where there is no such run.

    Raises:
        UserError: no such run, the nearest one named, or several.
    """
    runs = Storage(root)
    candidates = [Storage(run)] if run else []
    if all(NAME.fullmatch(part) for part in run.split("/")):  # a name, or experiment/name
        candidates.append(runs / run)
        kinds = [kind for kind in runs.list() if _is_run(runs / kind / run)]
    else:
        kinds = []
    for storage in candidates:
        if _is_run(storage):
            return RunFolder(storage)
    if len(kinds) > 1:
        raise UserError(f"there is a run {run!r} of {' and of '.join(kinds)}: give {kinds[0]}/{run}, or another")
    if kinds:
        return RunFolder(runs / kinds[0] / run)
    everyone = [(kind, name) for kind in runs.list() for name in (runs / kind).list()]
    names = {name for kind, name in everyone if _is_run(runs / kind / name, having)}
    raise unknown(f"run in {root}", run, sorted(names))


def _is_run(storage: Storage, having: str | None = None) -> bool:
    files = set(storage.list())
    if having is not None and having not in files:
        return False
    return bool({CONFIG, "summary.json"} & files)  # one that lost its settings says so


def _claimed_freely(runs: Storage, settings: Settings) -> Storage:
    """Claim a folder named after data, model and time, with a number where another process was faster."""
    values = settings.model_dump()
    chosen = [values[part]["name"] for part in ("dataset", "model") if part in values]
    kinds = [name.partition(":")[0] for name in chosen if name]  # without the path or the function
    stem = "-".join([*kinds, time.strftime("%m%d-%H%M%S")])
    for number in count(1):
        storage = runs / (stem if number == 1 else f"{stem}-{number}")
        if storage.claim():
            return storage
    raise AssertionError


def _key(row: Mapping[str, Any]) -> Key:
    return row["phase"], row.get("model"), row.get("epoch")
