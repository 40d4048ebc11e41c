"""`effray audit` as a user types it, deletions from it, and what both refuse."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import reference
from raypkg.experiments.coreset_files import area_under_curve
from raypkg.experiments.trained import load_model
from raypkg.methods.audit.influence import HeadHessian, influence
from raypkg.methods.deltagrad.run import open_recorded
from raypkg.runs.catalog import locate

HERE = "--cluster.workers 0"
TRAINED = "deltagrad train --name a --train.epochs 12 --train.batch_size 400 --dataset.noise 0.2"


@pytest.fixture
def trained(effray, after):
    """Return a function that gives the lines of an effray command, once there is a run ``a`` with wrong labels."""
    after(TRAINED)
    return lambda line: effray(line if line.startswith(("deltagrad", "show", "report")) else f"{line} {HERE}")


def summary(name, kind="audit"):
    return json.loads(Path(f"runs/{kind}/{name}/summary.json").read_text())


def table(name):
    return pq.read_table(f"runs/audit/{name}/audit.parquet").to_pydict()


def deleted():
    with open_recorded(locate("runs", "deltagrad/a")) as run:
        gone = ~run.active
        gone[run.samples.held_out] = False
        return gone.nonzero()[:, 0].tolist()


def test_the_table_ranks_the_training_samples_and_finds_planted_labels(trained):
    out = trained("audit a --name one --by self --listed 5")
    found, result = table("one"), summary("one")
    with open_recorded(locate("runs", "deltagrad/a")) as run:
        samples = run.samples
        split = samples.data.train
    assert sorted(found["id"]) == samples.train_indices.tolist() and found["rank"] == [*range(1, len(found["id"]) + 1)]
    assert found["self_influence"] == sorted(found["self_influence"], reverse=True)
    assert found["class"] == [split.classes[y] for y in split.y[found["id"]]]
    wrong = np.array(found["class"]) != np.array(found["true_class"])
    assert wrong.mean() == pytest.approx(0.2, abs=0.02)
    assert result["auc_loss"] == area_under_curve(np.array(found["loss"]), wrong) > 0.9
    x, y = split.batch(found["id"][:4])
    probabilities = load_model("deltagrad/a").predict(x).probabilities
    np.testing.assert_allclose(found["loss"][:4], -probabilities[range(4), y].log(), rtol=1e-4)
    assert "wrong labels are known" in out and "The 5 worst" in trained("show one")
    trained("report one")
    page = Path("runs/audit/one/report.html").read_text()
    assert "The 5 worst" in page and "self influence" in page and 'alt="worst' in page and 'alt="harm' in page


def test_influences_are_those_of_the_run_at_its_present_weights(trained):
    trained("audit a --name one --by influence --damping 0.01")
    found = table("one")
    with open_recorded(locate("runs", "a")) as run:
        split, w, held_out = run.samples.data.train, run.weights(), run.samples.held_out
    head = torch.cat([w[: 64 * 10].view(10, 64), w[64 * 10 :, None]], 1)
    inputs = {name: split.inputs(split.batch(ids)[0]).flatten(1).double() for name, ids in
              {"train": found["id"], "valid": held_out}.items()}  # fmt: skip
    y = {"train": split.y[found["id"]], "valid": split.y[held_out]}
    view, of_held_out = (reference.Problem(head, inputs[part], y[part]).view for part in ("train", "valid"))
    expected = influence(view, of_held_out, HeadHessian(view, 0.01))
    np.testing.assert_allclose(found["influence"], expected, rtol=1e-3, atol=1e-4)
    assert found["influence"] == sorted(found["influence"], reverse=True)


def test_a_deletion_takes_exactly_the_worst_and_shows_prediction_and_retraining(trained, refusal):
    trained("audit a --name one")
    for count in (0, 1293):
        message = refusal(f"deltagrad delete a --from-audit {count}")
        assert f"--from-audit {count}: audit 'one' ranks 1,293 samples: 1 … 1292" in message
    out = trained("deltagrad delete a --from-audit 40 --verify")
    found = table("one")
    assert deleted() == sorted(found["id"][:40])
    line = r"held-out loss ([\d.]+) → ([\d.]+), a change of ([-+\d.]+), predicted ([-+\d.]+) by audit one"
    loss, then, change, predicted = map(float, re.search(line, out).groups())
    assert loss == pytest.approx(summary("one")["held_out_loss"], abs=1e-4)
    assert change == pytest.approx(then - loss, abs=2e-4)
    assert predicted == pytest.approx(-sum(found["influence"][:40]) / (len(found["id"]) - 40), abs=1e-4)
    assert "test accuracy" in out and "retrained" in out
    line = refusal("deltagrad delete a --from-audit 3")
    assert "run 'a' has changed since its audit 'one': `effray audit a` makes one" in line
    trained("audit a --name two")
    assert set(table("two")["id"]) == set(found["id"][40:])
    trained("deltagrad delete a --from-audit 2")
    assert deleted() == sorted(found["id"][:40] + table("two")["id"][:2])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("audit", "runs ''. Allowed: a"),
        ("audit b", "unknown run in runs 'b'"),
        ("audit a --by los", "by"),
        ("audit a --dataset.scale standard", "run a has scale unit, here it is standard: an audit takes the run's"),
        ("audit a --seed 1", "run a has seed of the run 0, here it is 1"),
        ("deltagrad delete a --from-audit 3", "there is no finished audit of run 'a': `effray audit a` makes one"),
        ("deltagrad delete a --from-audit 3 --ids 1", "give one of --ids, --where and --from-audit"),
    ],
)
def test_requests_that_cannot_be_met_are_one_line(trained, refusal, line, message):
    assert message in refusal(line)


def test_runs_without_held_out_samples_model_or_decay(effray, refusal):
    short = "train --model linear --train.epochs 1"
    effray(f"{short} --name none --dataset.validation 0")
    assert "run none holds out no samples (dataset.validation = 0)" in refusal(f"audit none {HERE}")
    out = effray(f"audit none --name on_test --on test {HERE}")
    assert "the test set was looked at" in out and "test loss" in out
    effray(f"{short} --name plain --train.weight_decay 0")
    assert "run plain has no weight decay" in refusal(f"audit plain {HERE}")
    effray(f"audit plain --damping 0.01 {HERE}")
    effray(f"embed --name rows --model mlp {HERE}")
    assert "run 'rows' has no model.safetensors: it trained no model" in refusal(f"audit embed/rows {HERE}")


def test_a_deep_model_is_audited_by_its_last_layer_and_embedded_rows_show_what_they_are_of(effray):
    Path("texts.jsonl").write_text("".join(f'{{"text": "number {i}", "label": {i % 3}}}\n' for i in range(200)))
    effray("train --name texts --dataset text:texts.jsonl --model transformer --train.epochs 1")
    assert "number " in effray(f"audit texts --name of_texts {HERE}")
    effray("train --name deep --model mlp --train.epochs 1 --dataset.noise 0.2")
    assert "by the last layer's gradients only" in effray(f"audit deep --name deep_one {HERE}")
    effray(f"embed --name rows --model mlp {HERE}")
    effray("deltagrad train --name b --dataset table:runs/embed/rows --train.epochs 2")
    effray(f"audit b --name of_rows --listed 3 {HERE}")
    assert Path("runs/audit/of_rows/plots/worst.png").exists()
