"""Trials of a comparison take over the first phases of others: the same results, an honest bill, whoever is killed."""

import json
import shutil
from pathlib import Path

import pytest

from raypkg.core.config import load_settings
from raypkg.core.errors import UserError
from raypkg.experiments.phases import stages_of
from raypkg.methods.lipt.settings import LiptSettings
from raypkg.runs.folder import RunFolder
from raypkg.runs.storage import Storage
from raypkg.studies import driver as trials
from raypkg.studies.driver import donors_first
from raypkg.studies.study import find_study
from run_files import files

TABLE = """
from raypkg.studies.tables import Table

def table(scale):
    return Table(
        title="Selections",
        experiment="lipt",
        baseline="el2n",
        shared={"model": "linear", "pretrain.epochs": 2, "pretrain.method": "dense", "train.batch_size": 256},
        rows={
            "el2n": {"select.rule": "el2n"},
            "craig": {"select.rule": "craig"},
            "craig; anew": {"select.rule": "craig", "select.every_epochs": 1},
            "merged": {"select.rule": "el2n", "train.init": "merged"},
        },
        cases={
            "short": {"train.epochs": 1},
            "long": {"train.epochs": 3},
            "noisy": {"train.epochs": 1, "dataset.noise": 0.4},
            "faster": {"train.epochs": 1, "pretrain.lr": 0.01},
        },
        seeds=(0, 1),
    )
"""
TAKEN = {"from", "taken_over"}


@pytest.fixture(scope="module")
def compare(tmp_path_factory):
    """Return the command that compares the rows of the table."""
    file = tmp_path_factory.mktemp("tables") / "mine.py"
    file.write_text(TABLE)
    return f"compare {file} --cluster.workers 0"


@pytest.fixture
def computed(monkeypatch):
    """Return the phases that are computed and not taken over, as run and phase."""
    done = []
    finish = RunFolder.finish_phase

    def noted(run, name, record):
        done.append((run.name, name))
        return finish(run, name, record)

    monkeypatch.setattr(RunFolder, "finish_phase", noted)
    return done


def taken(run):
    return json.loads(Path(f"runs/lipt/{run}/summary.json").read_text()).get("taken_over", {})


def without_origin(value):
    """Return a run's files without the words on what was taken over."""
    if isinstance(value, dict):
        return {name: without_origin(part) for name, part in value.items() if name not in TAKEN}
    if isinstance(value, list):
        return [without_origin(part) for part in value if "taken over from" not in str(part)]
    return value


def trials_of(name, *places):
    """Return the files of runs of a comparison, without those with times and with names of other runs."""
    runs = [files(Path(f"runs/lipt/{name}-{number:03}")) for number in places]
    return [{file: without_origin(content) for file, content in run.items() if "costs" not in file} for run in runs]


def test_a_trial_that_takes_over_equals_one_that_computes(effray, compare, monkeypatch):
    asked = "--cases short --seeds 0"
    told = effray(f"{compare} --name m {asked}")
    line = "pretrain of 3 and select of 2 of 4 trials are taken over from another one"
    assert line in told and line in effray("show m")
    assert line in Path("runs/tune/m/table.md").read_text() and line in Path("runs/tune/m/report.html").read_text()
    assert "pretrain: taken over from m-000, whose samples and seconds are counted here too" in effray("show m-001")
    costs = [json.loads(Path(f"runs/lipt/m-00{n}/summary.json").read_text())["phases"] for n in range(2)]
    assert costs[0][0]["phase"] == "pretrain" and costs[0][0] == costs[1][0]
    assert costs[0][0]["backward"] == 2 * 1295
    monkeypatch.setattr("raypkg.experiments.phases.take_over", lambda *_: None)
    effray(f"{compare} --name n {asked}")
    assert [bool(taken(f"n-{number:03}")) for number in range(4)] == [False] * 4
    assert [bool(taken(f"m-{number:03}")) for number in range(4)] == [False, True, True, True]
    assert trials_of("m", *range(4)) == trials_of("n", *range(4))


EL2N, ANEW = ({"pretrain": "m-000", "select": donor} for donor in ("m-000", "m-001"))
JOINT = "--pretrain.method lipt --pretrain.models 2 --pretrain.joint_epochs 1 --pretrain.batch_size 64"
TAKERS = {  # options → what the trials took over, in order
    # each phase once for each of its settings
    "--rows el2n,craig --cases short,noisy": [{}, {"pretrain": "m-000"}, {}, {"pretrain": "m-002"}],
    # A coreset that training replaced gives nothing: anew comes after craig.
    "--rows 'craig; anew,craig' --cases short,long": [{}, {"pretrain": "m-000"}, ANEW, EL2N, ANEW, ANEW],
    f"--cases short --rows craig {JOINT}": [{}, {"pretrain": "m-000", "joint": "m-000"}],
    # a function of the user's, of which nobody said what it depends on
    "--cases short --rows el2n,craig --pretrain.method mine_too:pretrain": [{}, {}],
}


@pytest.mark.parametrize("options", TAKERS)
def test_each_phase_is_computed_once_for_each_of_its_settings(
    effray, compare, computed, tmp_path, monkeypatch, options
):
    (tmp_path / "mine_too.py").write_text(
        "from raypkg.methods.lipt.pretrain import pretrain_dense\n\n"
        "def pretrain(settings, report, *, samples, workers):\n"
        "    pretrain_dense(settings, report, samples=samples, workers=workers)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    effray(f"{compare} --name m {options} --seeds 0")
    expected = TAKERS[options]
    found = [taken(f"m-{number:03}") for number in range(len(expected))]
    assert found == expected
    phases = {"pretrain", "select", "train", *["joint"] * ("joint" in options)}
    for number, given in enumerate(expected):
        assert {phase for run, phase in computed if run == f"m-{number:03}"} == phases - given.keys()


def test_the_run_that_gave_may_be_deleted(effray, compare):
    effray(f"{compare} --name m --cases short --rows craig --seeds 0")
    shutil.rmtree("runs/lipt/m-000")
    RunFolder(Storage("runs/lipt/m-001")).check_all()
    effray("show m-001")
    effray(f"{compare} --name m --cases short --rows merged --seeds 0")
    assert taken("m-000") == {"pretrain": "m-000"}  # it is run again, with what m-001 had taken over
    assert taken("m-002") == {"pretrain": "m-000", "select": "m-000"}


@pytest.mark.parametrize("options", ["", "--cluster.cpus_per_worker 2"])
def test_a_run_with_other_files_or_workers_gives_nothing(effray, after, compare, computed, options):
    after(f"{compare} --name m --cases short --rows el2n --seeds 0")
    if not options:
        Path("runs/lipt/m-000/pretrained_record.parquet").write_bytes(b"changed")
    effray(f"{compare} --name m --cases short --rows el2n,craig --seeds 0 {options}")
    assert taken("m-001") == {}
    assert ("m-001", "pretrain") in computed


@pytest.mark.parametrize(
    ("last", "donor_is_there"), [("coreset.parquet", True), ("metrics.parquet", False), ("phases/select.json", False)]
)
def test_a_killed_take_over_is_resumed(call, effray, after, compare, monkeypatch, last, donor_is_there):
    asked = "--cases short --rows el2n,merged --seeds 0"
    after(f"{compare} --name straight {asked}")
    after(f"{compare} --name m --cases short --rows el2n --seeds 0")
    write = Storage.write

    def killed(storage, name, content):
        if name == last:
            raise KeyboardInterrupt
        write(storage, name, content)

    monkeypatch.setattr(Storage, "write", killed)
    assert call(f"{compare} --name m {asked}").code == 2
    monkeypatch.setattr(Storage, "write", write)
    assert not Path("runs/lipt/m-001", last).exists()
    if not donor_is_there:
        monkeypatch.setattr("raypkg.experiments.phases.take_over", lambda *_: None)
    effray(f"{compare} --name m {asked}")
    assert trials_of("m", 1) == trials_of("straight", 1)
    assert taken("m-001") or not donor_is_there


def test_on_ray_a_trial_that_others_take_over_goes_first(effray, compare, monkeypatch):
    def fail(*_):
        raise UserError("not trained here")

    monkeypatch.setattr(trials, "_train", fail)
    effray(f"{compare} --name m --cases short,faster --rows el2n,craig")
    study = find_study("runs", "m")
    missing = [(number, trial.settings) for number, trial in enumerate(study.trials)]
    stages = stages_of("lipt", load_settings(LiptSettings, study.config))
    assert [number for number, _ in donors_first(missing, stages)] == [0, 2, 1, 3, 4, 6, 5, 7]
    assert donors_first(missing, stages[-1:]) == missing
