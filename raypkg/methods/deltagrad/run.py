"""A recorded run: its settings, samples and history, and the samples that its model is trained on now."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import accumulate, count, islice, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raypkg.core.config import load_settings
from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.data import Data
from raypkg.data.split import Split
from raypkg.engine.batches import shuffled
from raypkg.experiments.resolve import stored_settings
from raypkg.experiments.samples import Samples, new_model, open_samples
from raypkg.runs.checkpoints import load_tensors
from raypkg.runs.folder import CONFIG, LOG, MODEL, RunFolder, write_settings

from .history import History, Layout, digest, history_folder
from .journal import CHANGE_FILE, ROWS_FILE, Entry, Journal, group_sizes
from .objective import Objective, to_vector
from .settings import REPLAYED, DeltaGradSettings

ROWS = "rows.parquet"  # digests of the training split's rows, and its standardisation
BATCHES = "batches.parquet"  # ids of each step, if another loop than effray's chose them
FACTS = ("mean", "std", "shape", "classes")  # metadata of the digests
BLOCK = 1 << 14  # rows read at once
# Settings that may change after training. Those of training have a single value, or did not affect the recorded steps.
FREE: dict[str, Any] = {"cluster": True, "track": True, "replay": True, "train": {*REPLAYED, "from_", "micro_batch"}}


def begin_journal(
    folder: RunFolder,
    settings: DeltaGradSettings,
    samples: Samples,
    history: str,
    labels: np.ndarray | None = None,
    batches: Sequence[Tensor] = (),
) -> None:
    """Write the first entry of a trained run, with the digest of its history, unless it is there.

    A script's run also holds its settings and samples, their ``labels`` by class, and the ``batches`` of another loop.
    """
    journal = Journal(folder.storage)
    if journal.entries:
        return
    storage = folder.storage
    split = samples.data.train
    facts: dict[str, Any] = {name: getattr(split, name) for name in FACTS}
    rows = ROWS
    if labels is None:
        table = pa.table({"digest": row_digests(split)})
        storage.write_table(ROWS, table.replace_schema_metadata({"effray": json.dumps(facts)}))
        facts = {}
    else:
        rows = ROWS_FILE.format(0)
        journal.write_rows(0, split)
        write_settings(storage, settings)
        facts |= {"labels": labels.tolist(), "dtype": labels.dtype.str}
        if batches:
            storage.write_table(BATCHES, pa.table({"ids": [batch.numpy() for batch in batches]}))
            facts["batches"] = storage.digest(BATCHES)
    digests = {"rows": storage.digest(rows), "model": storage.digest(MODEL), "history": history}
    count = len(samples.train_indices)
    journal.append({"kind": "train", "samples": count, "settings": settings_digest(settings), **digests, **facts})


@contextmanager
def open_recorded(folder: RunFolder) -> Iterator["RecordedRun"]:
    """Open a recorded run, locked against other processes; delete what a failure in the block leaves behind."""
    log = folder.storage.read(LOG)
    if log is None:
        if not folder.storage.list("versions"):
            raise UserError(f"run {folder.name!r} has no recorded history: `effray deltagrad train` makes one")
        _check_finished(folder)
    if not log:
        raise UserError(f"{folder.storage.root}/{LOG} is missing or empty: what was done to the run is lost")
    with folder.storage.locked(f"run {folder.name!r}"):
        run = RecordedRun(folder)
        try:
            yield run
        except BaseException:  # also Ctrl-C
            with suppress(UserError):  # the next process that opens the run tries again
                run.journal.clean_up()
            raise


class RecordedRun:
    """A recorded training in a local folder, with everything that was deleted from and added to it since.

    Inside, an id is a position in the training split; added samples are numbered on from its end, in the order of their
    requests. If the split has ids of its own, users give and see those. The journal's last entry describes the run;
    files that it does not name are ignored. A damaged log, and a model or data set that is not that of the log, are
    refused.
    """

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self.storage = folder.storage
        self.journal = journal = Journal(folder.storage)
        first, *changes = journal.entries
        of_a_script = "labels" in first
        if not changes and not of_a_script:
            _check_finished(folder)
        self.settings = load_settings(DeltaGradSettings, stored_settings(folder))
        if settings_digest(self.settings) != first["settings"]:
            where = f"{folder.storage.root}/{CONFIG}"
            raise UserError(f"{where} is not that of the recorded training: it or {LOG} was changed")

        self.batches: Sequence[Tensor] = ()  # ids of the recorded steps, int64, if another loop chose them
        if of_a_script:
            train = replace(journal.added_rows(first), mean=tuple(first["mean"]), std=tuple(first["std"]))
            self.samples = Samples.all_of(train)
            if "batches" in first:
                batches = journal.table(BATCHES, first["batches"])["ids"]
                self.batches = [torch.tensor(ids.values.to_numpy()) for ids in batches]
        else:
            rows = journal.table(ROWS, first["rows"])
            samples = open_samples(self.settings, verify=False)
            split = samples.data.train
            facts = json.loads(rows.schema.metadata[b"effray"])
            for what, was, now in (
                ("samples", len(rows), len(split)),
                ("shape", facts["shape"], list(split.shape)),
                ("classes", facts["classes"], list(split.classes)),
            ):
                if was != now:
                    problem = f"its {what} were {was} and are {now}"
                    raise UserError(f"the data set is not that of the recorded training: {problem}")
            # Standardised as in the recorded training: the statistics of the data set change with deleted rows.
            mean, std = tuple(facts["mean"]), tuple(facts["std"])
            data = Data(*(replace(part, mean=mean, std=std) for part in samples.data))
            self.samples, train = samples._replace(data=data), data.train
        journal.settle()

        self._splits = [train]  # the training split, and the samples that each entry added
        self._sizes = [len(train)]  # of the training split, and of each group of samples that was added
        self.active = torch.zeros(len(train), dtype=torch.bool)  # [ids], True for samples in use
        self.active[self.samples.train_indices] = True
        for entry in changes:
            self.apply(entry)

        if not of_a_script:  # deleted rows of the data set may have been blanked since
            changed = torch.from_numpy(row_digests(train) != rows["digest"].to_numpy())
            changed_in_use = (changed & self.active[: len(train)]).nonzero()
            if len(changed_in_use):
                number = int(changed_in_use[0])
                raise UserError(f"sample {number} of the data set is not what it was in the recorded training")

    @contextmanager
    def exclusively(self) -> Iterator[None]:
        """Keep other processes away; refuse a run that one of them has changed since it was opened."""
        with self.storage.locked(f"run {self.folder.name!r}"):
            if self.journal.stored() != len(self.journal.entries):
                raise UserError(f"the record in {self.storage.root!r} was changed by another process: load it again")
            yield

    @property
    def split(self) -> Split:
        """All samples that were ever in the training split, by id."""
        return joined(*self._splits)

    @property
    def membership(self) -> "Membership":
        """The batch of every sample."""
        ends = list(accumulate(self._sizes))
        added = tuple(torch.arange(start, end) for start, end in pairwise(ends))
        train = self.settings.train
        return Membership(self.samples.train_indices, added, train.batch_size, self.settings.seed, self.batches)

    @property
    def objective(self) -> Objective:
        """The loss of the model."""
        return Objective.of(self.settings.model, self.samples.data.train)

    def history(self) -> History:
        """Open the record of the training as the last entry left it."""
        last = self.journal.entries[-1]
        layout = Layout.of(new_model(self.settings, self.samples.data), self.settings.history.dtype)
        return History(history_folder(self.storage, last["number"]), layout, last["history"])

    def weights(self) -> Tensor:
        """Return the current weights, float64 [p], in the order of ``model.parameters()``."""
        saved = load_tensors(self.storage, MODEL)
        model = new_model(self.settings, self.samples.data)
        return to_vector(saved[name].double() for name, _ in model.named_parameters())

    def apply(self, entry: Entry) -> None:
        """Take the change of an entry that the journal holds."""
        changed = self.journal.table(CHANGE_FILE.format(entry["number"]), entry["changes"])
        if entry["new"]:
            self._splits.append(self.journal.added_rows(entry))
            self._sizes += group_sizes(entry["requests"], entry["new"])
            self.active = torch.cat([self.active, torch.ones(entry["new"], dtype=torch.bool)])
        ids, in_use = (torch.tensor(changed[name].to_numpy()) for name in ("id", "in_use"))
        self.active[ids] = in_use


def _check_finished(folder: RunFolder) -> None:
    if folder.summary is None:
        missing = f"{folder.storage.root}/summary.json is missing: the run is not finished"
        raise UserError(f"{missing}, `effray deltagrad train --resume {folder.name}` resumes it")


def settings_digest(settings: DeltaGradSettings) -> str:
    """Return the digest of all settings that affect the recorded steps."""
    values = settings.model_dump(mode="json", exclude=FREE)
    return digest(json.dumps(values, sort_keys=True).encode()).hex()


def row_digests(split: Split) -> np.ndarray:
    """Return a number for each sample, uint64 [n]: Σ_j r_j·x_j mod 2⁶⁴ with random odd r and x as 64-bit words.

    Its label and its id, if it has one, are among the words. This detects accidental changes, not malicious ones.
    """
    digests = []
    for start in range(0, len(split), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(split)))
        x = np.ascontiguousarray(split.take(rows))
        content = x.reshape(len(rows), -1).view(np.uint8)  # [b, bytes]
        padding = np.zeros((len(rows), -content.shape[1] % 8), np.uint8)  # to whole words
        columns = [np.concatenate([content, padding], axis=1).view(np.uint64)]
        for numbers in (split.y, split.ids):
            if numbers is not None:
                columns.append(numbers.numpy()[rows, None].astype(np.uint64))
        words = np.concatenate(columns, axis=1)  # [b, ⌈bytes/8⌉ + 1 or 2]
        rng = np.random.default_rng(0)  # the same factors for every block
        factors = rng.integers(2**63, size=words.shape[1], dtype=np.uint64) * 2 + 1
        digests.append(words @ factors)
    return np.concatenate(digests)


# The order of the samples


@dataclass(frozen=True)
class Membership:
    """The batch of every sample that was ever in the training.

    Samples of the first training keep the places that the loop gave them. Those added later are drawn a batch per
    epoch, group by group. A place stays reserved: a deleted sample that is added back returns to it.
    """

    trained: Tensor  # samples of the first training, int64 [n]
    added: tuple[Tensor, ...]  # groups of later ones
    batch_size: int  # of the first training
    seed: int  # names every draw
    given: Sequence[Tensor] = ()  # the batches, if another loop has chosen them; added samples have no place there

    def batches(self, steps: int) -> Iterator[Tensor]:
        """Yield all samples with a place in the batch of each step, deleted ones too."""
        if self.given:
            return iter(self.given)
        return islice((batch for epoch in count() for batch in self.epoch(epoch)), steps)

    def epoch(self, epoch: int) -> list[Tensor]:
        """Return all samples with a place in each batch of an epoch, deleted ones too."""
        parts = shuffled(len(self.trained), self.batch_size, self.seed, epoch)
        batches = [self.trained[part] for part in parts]
        for number, group in enumerate(self.added):
            rng = generator(self.seed, "added", number, epoch)
            places = torch.randint(len(batches), (len(group),), generator=rng)  # [group], a batch for each sample
            for place, batch in enumerate(batches):
                batches[place] = torch.cat([batch, group[places == place]])
        return batches


def joined(*splits: Split) -> Split:
    """Return aligned splits as one, their samples one after another.

    If the first has ids, those of the others are numbered on from the largest of them.
    """
    starts = [0, *accumulate(map(len, splits))]  # of each split, and the end

    def take(indices: np.ndarray) -> np.ndarray:
        if not len(indices) or indices.max() < starts[1]:
            return splits[0].take(indices)
        owner = np.searchsorted(starts, indices, side="right") - 1  # [b], the split of each sample
        gathered = [splits[k].take(indices[owner == k] - starts[k]) for k in np.unique(owner)]
        grouped = np.concatenate(gathered)  # split after split
        out = np.empty_like(grouped)
        out[np.argsort(owner, kind="stable")] = grouped  # back to the given order
        return out

    y = torch.cat([split.y for split in splits])
    ids = splits[0].ids
    if ids is not None:
        begin = int(ids.max()) + 1
        ids = torch.cat([ids, torch.arange(begin, begin + len(y) - len(ids))])
    return replace(splits[0], take=take, y=y, ids=ids)
