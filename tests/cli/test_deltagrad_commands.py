"""`effray deltagrad …` as a user types it: requests, their log, and refusals."""

import json
import os
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from raypkg import load_data, load_model
from raypkg.methods.deltagrad.replay import replay
from raypkg.runs.storage import Storage

RUN = Path("runs/deltagrad/a")
SHORT = "deltagrad train --name a --train.epochs 12 --train.batch_size 400"
EXACT = "--period 1"


@pytest.fixture
def trained(effray, after):
    """Return a function that gives the lines of an effray command, once there is a run ``a`` of 48 steps."""
    after(SHORT)
    return effray


def weights():
    return np.concatenate([value.ravel() for _, value in sorted(load_file(RUN / "model.safetensors").items())])


def entries():
    return [json.loads(line) for line in (RUN / "log.jsonl").read_text().splitlines()]


def distance(text):
    return float(next(line for line in text.splitlines() if "distance of" in line).split()[4])


def test_training_announces_the_size_of_its_history(effray):
    assert "history: 526 kB (48 steps × 650 parameters × 2 × 8 bytes)" in effray(SHORT)
    assert [entry["kind"] for entry in entries()] == ["train"]
    assert sorted(os.listdir(RUN / "versions/00000")) == ["history.arrow", "history.digests"]


def test_a_deletion_ends_near_retraining_and_is_in_the_log(trained):
    before = weights()
    line = trained("deltagrad delete a --ids 0,1,2,3,4,5 --replay.period 4 --burn-in 4").splitlines()[-1]
    assert re.match(r"1: 6 deleted, 0 put back, 0 new; 14 of 48 steps exact", line)
    moved = np.linalg.norm(weights() - before)
    assert 0 < distance(trained("deltagrad verify a")) < 0.3 * moved
    first, last = entries()
    assert (last["deleted"], last["samples"], last["previous"]) == (6, first["samples"] - 6, first["digest"])
    assert last["model"] != first["model"]
    assert pq.read_table(RUN / "requests/00001.parquet").to_pylist()[5] == {"id": 5, "in_use": False}
    assert os.listdir(RUN / "versions") == ["00001"]  # what knew of the deleted samples is gone


def test_deleted_and_put_back_in_a_stream_returns(trained):
    before = weights()
    queue_of({"delete": [4, 5], "id": "x"}, {"restore": [5]}, {"restore": [4]})
    assert trained(f"deltagrad stream a queue.jsonl --together 1 {EXACT}").startswith("3 of 3 requests to answer")
    np.testing.assert_allclose(weights(), before, rtol=0, atol=1e-12)
    assert [len(entry.get("requests", ())) for entry in entries()] == [0, 1, 1, 1]
    assert trained(f"deltagrad stream a queue.jsonl {EXACT}") == "0 of 3 requests to answer\n"


def queue_of(*requests):
    Path("queue.jsonl").write_text("\n".join(json.dumps({"id": i + 1} | r) for i, r in enumerate(requests)))


def test_requests_that_wait_are_one_replay_and_end_as_one_after_another(trained):
    queue_of({"delete": [4, 5]}, {"add": "digits"}, {"restore": [5]}, {"add": "digits"}, {"delete": [1437 + 3]})
    shutil.copytree(RUN, "elsewhere/b")
    trained(f"deltagrad stream a queue.jsonl {EXACT}")
    _, entry = entries()
    assert (entry["deleted"], entry["new"], entry["samples"]) == (2, 2 * 1437, entries()[0]["samples"] + 2 * 1437 - 2)
    counts = [{k: v for k, v in request.items() if k not in ("id", "digest")} for request in entry["requests"]]
    assert counts == [{"deleted": 2}, {"new": 1437}, {"restored": 1}, {"new": 1437}, {"deleted": 1}]
    assert distance(trained("deltagrad verify a")) < 1e-12
    shown = " ".join(trained("deltagrad log a").split())
    assert "2 deleted, 2,874 new 5 together" in shown and "1,437 new 2 1 restored 3" in shown
    together = weights()
    shutil.rmtree(RUN)
    shutil.move("elsewhere/b", RUN)
    trained(f"deltagrad stream a queue.jsonl --together 1 {EXACT}")
    assert len(entries()) == 6
    np.testing.assert_allclose(weights(), together, rtol=0, atol=1e-12)


def test_requests_that_cancel_are_answered_as_are_those_before_one_that_fails(trained, refusal):
    before = weights()
    queue_of({"delete": [4], "id": "a"}, {"restore": [4]}, {"delete": [5]}, {"delete": [5], "id": "d"})
    for together in ("--together 2", ""):
        message = refusal(f"deltagrad stream a queue.jsonl {together}")
        assert "request 'd': delete: id 5 is deleted already" in message
    assert [entry["samples"] for entry in entries()] == [1295, 1295, 1294]
    assert not np.array_equal(weights(), before)
    queue_of({"delete": [6], "id": "a"})
    assert "the id 'a' belongs to another request, which was answered" in refusal("deltagrad stream a queue.jsonl")


def test_deleted_rows_may_be_blanked_but_no_others(effray, refusal):
    def write(blank=()):
        x, y = np.random.default_rng(0).normal(size=(200, 3)), np.arange(200) % 2
        x[list(blank)] = 0
        pq.write_table(pa.table({**{f"x{i}": x[:, i] for i in range(3)}, "label": y}), "data/train.parquet")

    os.makedirs("data")
    write()
    pq.write_table(pq.read_table("data/train.parquet").slice(0, 20), "data/test.parquet")
    effray("deltagrad train --name a --dataset table:data --train.epochs 5 --dataset.validation 0")
    effray(f"deltagrad delete a --ids 7,8 {EXACT}")
    write(blank=[7, 8])
    assert distance(effray("deltagrad verify a")) < 1e-12
    effray(f"deltagrad delete a --ids 9 {EXACT}")
    assert distance(effray("deltagrad verify a")) < 1e-12
    write(blank=[7, 8, 11])
    assert "sample 11 of the data set is not what it was" in refusal("deltagrad log a")


def test_changed_settings_are_found(trained, refusal):
    config = RUN / "config.toml"
    config.write_text(config.read_text().replace("weight_decay = 0.0001", "weight_decay = 0.5"))
    assert "config.toml' has been changed or cut short" in refusal("deltagrad verify a")
    _, _, without_digest = config.read_text().partition("\n")
    config.write_text(without_digest)
    assert "config.toml is not that of the recorded training" in refusal("deltagrad verify a")


def test_new_samples_are_read_with_the_options_of_the_run(call, effray, refusal):
    Path("rows.svm").write_text("".join(f"{i % 2} {1 + i % 5}:{i % 7}\n" for i in range(100)))
    Path("more.svm").write_text("1 1:2\n0 2:1\n")
    effray("deltagrad train --name a --dataset libsvm:rows.svm --train.epochs 3")
    assert "2 new (ids 80 … 81)" in effray("deltagrad add a --data libsvm:more.svm")
    Path("rows.csv").write_text("a,b,label\n" + "".join(f"{i % 5},{i % 7},{i % 2}\n" for i in range(60)))
    effray("deltagrad train --name b --dataset table:rows.csv --train.epochs 2")
    assert "columns of the new samples have no names" in refusal("deltagrad add b --data libsvm:more.svm")
    Path("rows.csv").rename("moved.csv")  # the log is shown, its checks are not possible
    shown = call("effray deltagrad log b")
    assert "trained" in shown.out and "rows.csv' does not exist" in shown.err and shown.code == 2


def test_tables_are_deleted_by_their_columns(effray, tmp_path):
    rng = np.random.default_rng(0)
    table = pa.table({"age": rng.integers(20, 80, 200), "x": rng.normal(size=200), "label": ["a", "b"] * 100})
    pq.write_table(table, "people.parquet")
    pa.csv.write_csv(table.slice(0, 9), "more.csv")
    effray("deltagrad train --name a --dataset table:people.parquet --train.epochs 5 --dataset.validation 0")
    line = effray(f"deltagrad delete a --where 'age >= 60 and label = b' {EXACT}")
    ids = pq.read_table(RUN / "requests/00001.parquet")["id"].to_pylist()
    assert line.splitlines()[-1].startswith(f"1: {len(ids)} deleted")
    effray(f"deltagrad add a --data table:{tmp_path}/more.csv {EXACT}")
    assert entries()[-1]["new"] == 9
    assert distance(effray("deltagrad verify a")) < 1e-12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("delete a", r"give one of --ids, --where and --from-audit"),
        ("delete a --ids 1 --workers 2", r"--workers is now called --cluster.workers"),
        ("verify a --threads 2", r"--threads is now called --cluster.cpus_per_worker"),
    ],
)
def test_invalid_requests_are_refused_in_one_line_and_change_nothing(trained, refusal, arguments, message):
    before = weights()
    assert re.search(message, refusal(f"deltagrad {arguments}"))
    assert np.array_equal(weights(), before) and len(entries()) == 1


def test_a_replay_that_diverges_changes_nothing(trained, refusal, monkeypatch):
    def diverging(*arguments, **options):
        for step in replay(*arguments, **options):
            yield step._replace(after=step.after / 0)

    before = sorted(RUN.rglob("*"))
    monkeypatch.setattr("raypkg.methods.deltagrad.answer.replay", diverging)
    assert "the replay diverges: take more exact steps" in refusal("deltagrad delete a --ids 1")
    assert len(entries()) == 1 and sorted(RUN.rglob("*")) == before


# The run


@pytest.mark.parametrize("command", ["delete a --ids 1", "log a"])
def test_a_locked_run_is_refused(trained, refusal, command):
    with Storage(str(RUN)).locked("it"):
        assert "run 'a' is being worked on by another process: wait for it" in refusal(f"deltagrad {command}")


def test_an_unfinished_run_names_the_command_that_resumes_it(effray, refusal, monkeypatch):
    places = {"journal": "raypkg.methods.deltagrad.run.begin_journal", "end": "raypkg.experiments.summary.finish"}
    for name, place in places.items():
        with monkeypatch.context() as patch:
            patch.setattr(place, Mock(side_effect=KeyboardInterrupt))
            refusal(SHORT.replace(" a ", f" {name} "), leaves=1)
        message = refusal(f"deltagrad delete {name} --ids 1")
        assert f"summary.json is missing: the run is not finished, `effray deltagrad train --resume {name}`" in message
        effray(f"deltagrad train --resume {name}")
        effray(f"deltagrad delete {name} --ids 1")


def test_opening_a_run_deletes_the_leftovers_of_killed_requests(trained):
    trained("deltagrad delete a --ids 0,1")
    before = sorted(RUN.rglob("*"))
    for folder in ("versions/00002", "added"):
        (RUN / folder).mkdir()
    for name in ("versions/00002/history.arrow", "requests/00002.parquet", "requests/00002.parquet.17.part",
                 "added/00002.arrow.17.part", "added/00002.arrow", "log.jsonl.17.part"):  # fmt: skip
        (RUN / name).touch()
    trained("deltagrad log a")
    assert sorted(RUN.rglob("*")) == before


def test_a_loaded_model_scales_its_inputs_as_in_training(trained, refusal):
    model, test = load_model("a"), load_data("digits").test
    found = (model.predict(test.batch(range(len(test)))[0]).labels == test.y).double().mean()
    summary = json.loads((RUN / "summary.json").read_text())
    assert model.std == (1.0,) and float(found) == pytest.approx(summary["test_accuracy"])
    assert "has scale unit, here" in refusal("select --model-from a --rule el2n --dataset.scale standard")


def test_a_replay_that_takes_longer_than_training_again_says_so_before_it_begins(trained, monkeypatch):
    out = trained("deltagrad delete a --ids 2,3")
    assert re.match(r"estimate: \d\.\d times as long as training again\n1: 2 deleted", out)
    for calls in ("START", "REPLAYED", "TRAINED"):
        monkeypatch.setattr(f"raypkg.methods.deltagrad.answer.{calls}", 0)  # as with samples of more numbers
    assert "estimate" not in trained("deltagrad delete a --ids 0,1")
    assert "estimate: 1." in trained("deltagrad delete a --ids 4,5 --period 1")


def test_the_estimate_counts_the_gradients_that_the_replay_computes(trained):
    from raypkg.methods.deltagrad import answer
    from raypkg.methods.deltagrad.requests import Request, change_of
    from raypkg.methods.deltagrad.run import open_recorded
    from raypkg.methods.deltagrad.settings import RequestSettings
    from raypkg.runs.catalog import locate

    settings = RequestSettings.model_validate({"replay": {"period": 1, "pairs": 2}})
    with open_recorded(locate("runs", "a")) as run:
        change = change_of(run, [Request("delete", [0, 1, 2])])
        expected = answer.estimate(run, change, settings.replay)
        fewer = answer.estimate(run, change, settings.replay.model_copy(update={"period": 5, "burn_in": 4}))
        entry = answer.answer(run, change, settings)
        again = sum(int(run.active[batch].sum()) for batch in run.membership.batches(entry["steps"]))
    steps, per = entry["exact"] + 1, 4 * 650  # steps from the first changed batch on; operations of a gradient
    work = entry["gradients"] + 7 * steps + (answer.START + answer.REPLAYED * steps) / per  # 7 = 2m + 3
    again += entry["steps"] * answer.TRAINED / per
    assert expected == pytest.approx(work / again) and fewer < expected
