"""`effray instruct`: rows are those of LESS and RDS+, picks those of the rules, and a run that died can be resumed."""

import json
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from forked import effray, kill_at
from raypkg.coresets.record import Rows
from raypkg.coresets.rules import coreset
from raypkg.data import load_data
from raypkg.engine.shards import Shard
from raypkg.experiments import embedding
from raypkg.methods.language import phases as room
from raypkg.methods.language.api import Projection, less_rows, over_checkpoints, state_rows
from raypkg.methods.language.phases import FOLDER, load_checkpoint
from raypkg.models import build_model
from raypkg.runs.checkpoints import StoredCheckpoints
from raypkg.runs.storage import Storage
from run_files import check_whole, files
from tiny_language import instructions, tiny_language

POOL, FEW, WIDTH = 60, 6, 96
MODEL = "--model transformers-lm:tiny --set model.options.rank=2 --set model.options.alpha=4"
COMMON = (
    f"--dataset instructions:pool --select.target instructions:few {MODEL} --set dataset.options.length=64"
    " --dataset.validation 0 --select.fraction 0.25 --train.epochs 1 --train.batch_size 8 --rows.per_part 16"
    " --rows.batch_size 8 --cluster.workers 0"
)
UNAIMED = COMMON.replace("--select.target instructions:few", "")
LESS = f"{COMMON} --rows.width {WIDTH} --warmup.epochs 2 --warmup.fraction 0.2 --warmup.batch_size 4 --warmup.lr 1e-2"
RUN = f"instruct --name one {LESS}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with a tiny language model, a pool of two sources and a target of one of them."""
    pytest.importorskip("peft")
    work = tmp_path_factory.mktemp("instruct") / "work"
    tiny_language(work / "tiny")
    for split in ("train", "test"):
        instructions(work / "pool", POOL, name=f"{split}.jsonl")
        instructions(work / "few", FEW, sources=("sums", "other"), seed=3, name=f"{split}.jsonl")
    return work


@pytest.fixture(scope="module")
def finished(folder):
    """Return the folder of a run by LESS that was not disturbed."""
    ended = effray(RUN, folder)
    assert ended.code == 0, ended
    return folder / "runs/instruct/one"


def samples_of(folder, name):
    options = {"tokenizer": str(folder / "tiny"), "length": 64}
    return load_data(f"instructions:{folder / name}", options).train


def batches(split, size=16):
    return [split.batch(part)[0] for part in torch.arange(len(split)).split(size)]


def built(folder, split, **options):
    return build_model(f"transformers-lm:{folder / 'tiny'}", split.shape, 2, seed=0, options=options)


def picked(run):
    return pq.read_table(run / "coreset.parquet")["index"].to_pylist()


def test_rows_are_projected_gradients_at_each_checkpoint_and_picks_are_those_of_less(folder, finished, tmp_path):
    before = lambda: kill_at(Storage, "delete_folder", lambda calls: calls[-1][1] == FOLDER)  # noqa: E731
    assert effray(f"{RUN} --root {tmp_path}", folder, before).code == -signal.SIGKILL
    storage = Storage(str(tmp_path / "instruct/one"))
    split, target = samples_of(folder, "pool"), samples_of(folder, "few")
    model = built(folder, split, rank=2, alpha=4.0, dropout=0.1)
    checkpoints = [load_checkpoint(storage, number) for number in (0, 1)]
    assert checkpoints[0].rate > checkpoints[1].rate > 0
    found = {}
    for name, each in (("pool", split), ("target", target)):
        rows = []
        for checkpoint in checkpoints:
            model.load_state_dict(checkpoint.part("w"), strict=False)
            moments = checkpoint.moments if name == "pool" else None
            rows.append(less_rows(model, batches(each), Projection(0, WIDTH), moments))
        expected = over_checkpoints(rows, [checkpoint.rate for checkpoint in checkpoints])
        found[name] = torch.from_numpy(np.load(finished / f"{name}.npy").astype(np.float32))
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-3)  # float16, twice
        torch.testing.assert_close(found[name].norm(dim=1), torch.ones(len(each)), rtol=0, atol=2e-3)
    aim = Rows(found["target"], target.y)
    chosen = coreset["less"](Rows(found["pool"]), 15, target=aim)
    assert picked(finished) == chosen.indices.sort().values.tolist()


def test_the_bill_counts_every_pass(finished):
    phases = {cost["phase"]: cost for cost in json.loads((finished / "summary.json").read_text())["phases"]}
    passes = {name: (cost["forward"], cost["backward"]) for name, cost in phases.items() if "evaluate" not in name}
    assert passes == {"warmup": (24, 24), "rows": (132, 132), "select": (0, 0), "train": (15, 15)}
    assert phases["rows"]["memory"] > 0


def test_rds_plus_takes_embeddings_of_the_model_as_it_is_built(folder):
    ended = effray(f"instruct --name states {COMMON} --select.rule rds_plus", folder)
    assert ended.code == 0, ended
    run = folder / "runs/instruct/states"
    split, target = samples_of(folder, "pool"), samples_of(folder, "few")
    model = built(folder, split)
    pool, few = (Rows(state_rows(model, batches(each)), each.y) for each in (split, target))
    torch.testing.assert_close(torch.from_numpy(np.load(run / "pool.npy")), pool.values.half(), rtol=0, atol=1e-3)
    assert picked(run) == sorted(coreset["rds_plus"](Rows(pool.values.half()), 15, target=few[:]).indices.tolist())
    table = pq.read_table(run / "coreset.parquet")
    best = (pool.values @ few.values.T).amax(dim=1)
    np.testing.assert_allclose(table["score"].to_numpy(), best[torch.tensor(table["index"].to_pylist())], atol=2e-3)


def test_a_random_baseline_needs_neither_warm_up_nor_rows(folder):
    ended = effray(f"instruct --name baseline {UNAIMED} --select.rule random", folder)
    assert ended.code == 0, ended
    run = folder / "runs/instruct/baseline"
    assert not [*run.glob("*.npy")] and len(picked(run)) == 15


def test_lipt_merges_models_of_shards_once_and_goes_on_where_it_died(folder, tmp_path):
    line = f"instruct --name merged {LESS} --warmup.by lipt --warmup.models 2"
    ended = effray(line, folder)
    assert ended.code == 0, ended
    assert "warm-up by LiPT (ours, not LESS's): 2 models of disjoint shards, merged once" in ended.out
    run = folder / "runs/instruct/merged"
    assert np.load(run / "pool.npy").shape == (POOL, WIDTH) and len(picked(run)) == 15
    before = lambda: kill_at(StoredCheckpoints, "save", lambda calls: len(calls) == 4)  # noqa: E731
    assert effray(f"{line} --root {tmp_path}", folder, before).code == -signal.SIGKILL
    assert effray(f"instruct --resume merged --cluster.workers 0 --root {tmp_path}", folder).code == 0
    here, there = files(tmp_path / "instruct/merged"), files(run)
    assert [name for name in there if name != "plots/costs.png" and here.get(name) != there[name]] == []


@pytest.mark.parametrize(
    ("owner", "name", "due"),
    [
        (StoredCheckpoints, "save", lambda calls: len(calls) == 2),  # at the end of the second epoch of the warm-up
        (embedding, "write_part", lambda calls: len(calls) == 4),
        (Storage, "delete_folder", lambda calls: calls[-1][1] == embedding.PARTS),
        (room, "save_coreset", lambda calls: True),
    ],
)
def test_killed_at_any_moment_and_resumed_it_leaves_what_an_undisturbed_run_leaves(
    folder, finished, tmp_path, owner, name, due
):
    root = f"--root {tmp_path}"
    ended = effray(f"{RUN} {root}", folder, lambda: kill_at(owner, name, due))
    assert ended.code == -signal.SIGKILL, ended
    ended = effray(f"instruct --resume one --cluster.workers 0 {root}", folder)
    assert ended.code == 0, ended
    check_whole(tmp_path)
    here, there = files(tmp_path / "instruct/one"), files(finished)
    assert here.keys() == there.keys()
    assert [name for name in here if here[name] != there[name]] == []


def test_rows_do_not_depend_on_the_number_of_holders(folder, finished, tmp_path):
    def by_two(worker, plan, parts, digest):
        data, indices, held_out = room.samples_on(worker, plan.settings)
        for rank in (0, 1):
            shard = Shard(data, indices, held_out, rank=rank, world=2)
            embedding.write_parts(shard, plan, parts, digest, plan.storage)

    ended = effray(f"{RUN} --root {tmp_path}", folder, lambda: setattr(room, "write_on_worker", by_two))
    assert ended.code == 0, ended
    run = tmp_path / "instruct/one"
    assert picked(run) == picked(finished)
    assert all((run / name).read_bytes() == (finished / name).read_bytes() for name in ("pool.npy", "target.npy"))


ERRORS = [
    (f"{LESS} --set model.options.rank=0", "rank = 0"),
    (f"{LESS} --select.rule gradmatch", "gradmatch selects by the gradients of a classifier's head: give less"),
    (f"{UNAIMED} --select.rule rds_plus", "rds_plus needs a target: give"),
    (f"{COMMON} --select.rule random", "random selects for no target: select.target = instructions:"),
    (f"{COMMON} --select.rule rds_plus --rows.width 5", "rows.width = 5 would do nothing: select.rule = rds_plus"),
    (f"{LESS} --rows.width 16000000 --rows.per_part 100000000", "rows.width = 16,000,000: needed is"),
    (f"{LESS} --warmup.by lipt --warmup.models 40", "warmup.models = 40: more than the 12 warm-up samples"),
    (f"{LESS} --select.target instructions:nothing", "nothing"),
    (f"{LESS} --set select.target.options.tokenizer=./other", "select.target is cut into the tokens of"),
    (f"{LESS} --dataset digits --model mlp", "digits"),
    (f"{LESS} --select.target valid", "select.target = valid: no samples are held out"),
]


@pytest.mark.parametrize(("line", "problem"), ERRORS, ids=[problem for _, problem in ERRORS])
def test_what_cannot_work_is_one_line(folder, tmp_path, line, problem):
    if "./other" in line and not (folder / "other").exists():
        tiny_language(folder / "other", seed=1)
    assert problem in effray(f"instruct --root {tmp_path} --name bad {line}", folder).line
    assert not [*tmp_path.rglob("pool.npy")]


def test_rules_on_rows_are_refused_elsewhere(folder, tmp_path):
    line = effray(f"train --root {tmp_path} --model linear --select.rule less --select.fraction 0.1", folder).line
    assert "less selects by rows of a language model: only effray instruct computes them" in line


def test_a_disk_without_room_is_one_line(folder, tmp_path):
    def full():
        embedding.shutil.disk_usage = lambda folder: type("", (), {"free": 1000})

    line = effray(f"instruct --root {tmp_path} --name bad {LESS}", folder, full).line
    assert f"rows of 66 samples at 2 checkpoints of {WIDTH} numbers" in line and "a smaller --rows.width" in line
