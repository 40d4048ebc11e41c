"""`effray sparse` and `effray export` as typed."""

import json
import os
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from raypkg.methods.sparse.compute import expanded

RUN = Path("runs/sparse/a")
SHORT = "sparse --name a --model mlp --train.epochs 6 --train.batch_size 100 --density 0.1 --update-every-steps 7"


def summary():
    return json.loads((RUN / "summary.json").read_text())


def test_a_run_reports_its_density(effray, rendered_pictures):
    out = effray(f"{SHORT} --growth gradient --agent")
    figures = summary()
    weights = {name: w for name, w in load_file(RUN / "model.safetensors").items() if w.ndim > 1}
    total = sum(w.numel() for w in weights.values())
    assert sum(int((w != 0).sum()) for w in weights.values()) <= round(0.1 * total)
    assert figures["density"] == round(0.1 * total) / total < figures["explored"] < 1
    assert f"{figures['active_parameters']:,} of {figures['parameters']:,} parameters exist" in out.replace("\n", " ")
    assert {"topology.png", "correction.png"} <= set(os.listdir(RUN / "plots"))
    assert pq.read_table(RUN / "correction.parquet").column_names == ["step", "corrected", "c", "left", "line"]
    changes = pq.read_table(RUN / "topology.parquet").to_pylist()
    assert len({row["step"] for row in changes}) == 1 + 77 // 7
    assert {phase["phase"] for phase in figures["phases"]} >= {"train: correction", "train: full gradient"}


def test_a_model_is_exported_without_its_zeros(effray, refusal, after):
    after(SHORT)
    assert effray("export a").startswith("a-csr: csr")
    assert re.search(r"The file holds .* prunable weights \(10\.\d\d%\)", Path("a-csr/README.md").read_text())
    state = load_file(RUN / "model.safetensors")
    back = expanded(load_file("a-csr/model.safetensors"))
    assert all(value.equal(back[name]) for name, value in state.items()) and len(back) == len(state)
    assert Path("a-csr/model.safetensors").stat().st_size < 0.5 * (RUN / "model.safetensors").stat().st_size
    (RUN / "summary.json").unlink()
    assert "run 'a' is not finished: it has no model yet" in refusal("export a")


def test_dense_training_with_a_correction_has_no_masks_to_export(effray, refusal):
    effray("sparse --name a --model mlp --train.epochs 3 --density false --agent.gamma 0.5")
    assert (RUN / "correction.parquet").exists()
    assert "density" not in summary() and not (RUN / "topology.parquet").exists()
    assert "run 'a' is dense: no weight is zero" in refusal("export a --to csr")
    assert not [*Path().glob("*a-csr*")]


REFUSED = {
    "--density 0.1 --drop threshold": r"unknown drop rule 'threshold'",
    "--density 1": r"density = 1 leaves no room to grow",
    "--density 0.1 --death-rate 1": r"death_rate = '1'",
    "--density 0.1 --train.epochs 1 --train.batch_size 4000": r"update_every_steps = 1 is not below the 1 steps",
    # without effect
    "--density false --growth momentum": r"density = false: growth would do nothing",
    "--density 0.1 --growth false --update-every-steps 7": r"growth = false keeps the masks: update_every_steps would",
    "--density 0.1 --growth false --set growth.options.foo=3": r"growth = false: growth.options.foo would do nothing",
    "--agent false --agent.gamma 0.5": r"agent = false: agent.gamma would do nothing",
    # gradual pruning
    "--density 0.1 --growth false --sparse-init dense --fan-in sparse": r"sparse_init = dense begins with all inputs",
    "--density 0.1 --growth false --sparse-init dense --train.epochs 5 --update-every-steps 32": (
        r"update_every_steps = 32: of 55 steps, none in the last quarter would end gradual pruning"
    ),
    # combined
    "--density 0.1 --compute sparse --train.compile true": r"compute = sparse does not go with train.compile = true",
    "--density 0.1 --compute sparse --growth momentum": r"compute = sparse has no dense gradient at every step",
    "--density 0.1 --compute sparse --redistribution momentum": r"which redistribution = momentum needs",
    "--agent --train.batch_size 2000": r"an epoch has 1 steps \(at least 2 with form = published\)",
    "--agent --agent.form measured --train.batch_size 700": r"an epoch has 2 steps \(at least 3 with form = measured\)",
    "--agent --train.epochs 1": r"agent would correct nothing",
    "--agent --agent.form published --agent.alpha 0": r"agent.alpha = 0 with form = published would correct nothing",
    # renamed
    "--density 0.1 --update-every 7": r"--update.every is now called --update.every.steps",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_contradictions_are_refused_in_one_line(refusal, arguments):
    assert re.search(REFUSED[arguments], refusal(f"sparse {arguments}"))
