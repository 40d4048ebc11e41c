"""Any JSON value in any field of what is read: a result that can be shown, or an error of one line."""

import json
import math
from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attacks.test_data_parsers import fuzzed, one_line_at_most
from raypkg.methods.crest.settings import CrestSettings
from raypkg.runs.folder import ENVIRONMENT, SUMMARY, RunFolder, write_settings
from raypkg.runs.storage import Storage
from raypkg.studies.driver import varied
from raypkg.studies.show import run_page
from raypkg.studies.start import check_space, read_space
from raypkg.studies.study import RECORD, Order, Study, Trial, create_study
from raypkg.studies.tables import read_table, stored_table

NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 2**63, 10**400, 1e308])
WORDS = st.text(max_size=5) | st.sampled_from(["train", "crest", "accuracy", "max", "a", "../x", "x" * 20_000])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)
BILL = {"phase": "train", "forward": 2, "backward": 1, "seconds": 1.5, "memory": 9, "waited": 0.5, "sent": 3}
FILES = {"a.parquet": "0" * 32}
PHASE = {"costs": [BILL], "elapsed": 2.0, "findings": ["x"], "files": FILES, "number": 0, "main": True}
MANIFEST = {
    **{"phases": [BILL], "samples": 9, "coreset": 3, "seconds": 1.5, "elapsed": 2.0, "full_training_backward": 90},
    **{"test_accuracy": 0.5, "test_loss": 0.7, "findings": ["x"], "taken_over": {"select": "one"}, "files": {}},
}
ENVIRONMENTS = {"packages": {"torch": "2"}, "started": "2026", "processor": "x", "command": ["effray"]}
TABLE = {
    **{"title": "t", "experiment": "crest", "baseline": "a", "rows": {"a": {}, "b": {"crest.b": 2}}},
    **{"cases": {"all": {"dataset.name": "digits"}}, "shared": {"budget": 0.5}, "seeds": [0, 1], "metric": "accuracy"},
    **{"goals": {"accuracy": [0.9]}, "columns": {"x": "b / seconds"}, "paper": {"all": {"b": 3.5}}, "after": {}},
    **{"as_baseline": [], "gain": "seconds", "rates": [0.1, 0.2], "reference": "a"},
}
ORDER = {"experiment": "crest", "metric": "accuracy", "mode": "max", "samples": 1, "search": "random", "varied": []}
SWEEP = {"order": ORDER, "trials": [{"settings": {"crest.b": 1, "seed": 0}, "ended": "failed", "error": "x"}]}
COMPARISON = {**SWEEP, "order": ORDER | {"asked": "t", "scale": "small", "table": TABLE}}


def edited(whole):
    """Return a whole record with any value in one place of it."""

    def places(value):
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return [(key, *place) for key, below in inner for place in [(), *places(below)]]

    def replaced(place, value):
        changed = deepcopy(whole)
        around = changed
        for key in place[:-1]:
            around = around[key]
        around[place[-1]] = value
        return changed

    return st.builds(replaced, st.sampled_from(places(whole)), VALUES)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return Storage(str(tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="module")
def run(root):
    storage = root / "crest/one"
    write_settings(storage, CrestSettings())
    storage.write_json(SUMMARY, MANIFEST)
    return storage


@pytest.fixture(scope="module")
def study(root):
    order = Order(experiment="crest", metric="accuracy", mode="max", samples=1)
    return create_study(root.root, "s", order, CrestSettings(), "", [Trial(settings={"seed": 0})]).storage


@fuzzed
@given(edited(MANIFEST))
def test_any_manifest(run, values):
    run.write_json(SUMMARY, values)
    with one_line_at_most():
        assert run_page(RunFolder(run)) and 0 <= values.get("test_accuracy", 0) <= 1
    run.write_json(SUMMARY, MANIFEST)


@fuzzed
@given(edited(ENVIRONMENTS) | VALUES)
def test_any_environment(run, values):
    run.write_json(ENVIRONMENT, values)
    with one_line_at_most():
        assert run_page(RunFolder(run))


@fuzzed
@given(edited(PHASE) | VALUES)
def test_any_record_of_a_phase(run, values):
    run.write_json("phases/train.json", values)
    with one_line_at_most():
        record = RunFolder(run).phase("train")
        assert math.isfinite(record["elapsed"] + sum(bill["backward"] for bill in record["costs"]))


@fuzzed
@given(edited(SWEEP) | edited(COMPARISON) | VALUES)
def test_any_record_of_a_study(study, values):
    study.write_json(RECORD, values)
    with one_line_at_most():
        found = Study(study)
        assert found.left() >= 0 and len(found.results(found.runs())) <= len(found.trials)
        if found.order.table:
            assert stored_table(found.order.table).rows


NAMES = "nan, inf = float('nan'), float('inf')\n"


@fuzzed
@given(edited(TABLE))
def test_any_table(values):
    text = f"from raypkg.studies.tables import Table\n{NAMES}def table(scale): return Table(**{values!r})\n"
    with one_line_at_most():
        table = read_table(text, "t.py", "small")
        assert table.baseline in table.rows and json.dumps(table.rows)


@fuzzed
@given(edited({"crest.b": 1, "train.lr": 0.1}), st.just("accuracy") | VALUES, st.just("max") | VALUES)
def test_any_space(domains, metric, mode):
    text = f"from ray import tune\n{NAMES}METRIC, MODE = {metric!r}, {mode!r}\ndef space():\n"
    text += f"    return {{name: tune.choice([value, 1]) for name, value in {domains!r}.items()}} | {{'seed': 1}}\n"
    with one_line_at_most():
        space = read_space(text, "s.py")
        check_space(space, lambda values: json.dumps(varied(CrestSettings(), values).seed))
        assert space.domains.keys() == {*domains, "seed"}
