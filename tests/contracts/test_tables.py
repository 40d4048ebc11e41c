"""The contract of every shipped table, and the checks of a user's own."""

from pathlib import Path

import pytest

from contracts.test_presets import AGENT, CREST, SPARSE
from raypkg.core.config import dotted
from raypkg.core.errors import UserError
from raypkg.studies.driver import varied
from raypkg.studies.start import base_settings, check_comparison
from raypkg.studies.tables import SCALES, Table, narrowed, open_table, read_table, stored_table, with_data

FILES = sorted((Path(__file__).parents[2] / "tune_spaces" / "tables").glob("*.py"))
# A hundredth of the digits is less than a batch.
LARGER = {"crest": {"dataset.repeat": 10}, "texts": {"dataset.repeat": 5}}
MINE = """
import numpy as np
from raypkg.studies.tables import Table
def table(scale):
    mine = dict(title="t", experiment="train", baseline="a", rows={{"a": {{}}, "b": {{}}}})
    return Table(**dict(mine, {changes}))
"""


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_row_of_a_table_is_a_valid_run(file, scale):
    table = open_table(file.stem, scale)
    assert table.baseline in table.rows
    assert len(table.seeds) >= 3
    assert table.title and not table.title.endswith(".")
    given = {"dataset.name": "digits", "cluster.workers": 0, **LARGER.get(file.stem, {})}
    for data in {case.get("dataset.name") for case in table.cases.values()}:
        alike = [label for label, case in table.cases.items() if case.get("dataset.name") == data]
        part = with_data(narrowed(table, None, alike, None), given)
        check_comparison(part, base_settings(part, None, given))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_rows_are_different_runs_and_scales_have_the_same_rows(file):
    small, paper = (open_table(file.stem, scale) for scale in SCALES)
    for case in small.cases:
        assert len({small.identity(case, row, 0) for row in small.rows}) == len(small.rows)
    assert list(small.rows) == list(paper.rows)
    assert small.shared != paper.shared or small.cases != paper.cases
    assert not small.cases.keys() & small.paper.keys()  # whose figures are at the paper's scale


OF_THE_PAPERS = {
    "crest": {
        "CIFAR-10; ResNet-20": {"model.name": "resnet20", "crest.tau": 0.05, "crest.h": 1.0},
        "CIFAR-100; ResNet-18": {"model.name": "resnet18", "crest.tau": 0.01, "crest.h": 10.0},
        "TinyImageNet; ResNet-50": {"model.name": "resnet50", "crest.tau": 0.005, "crest.h": 1.0},
    },
    "agent": {
        "CIFAR-10; ResNet-50; 10 %": {"dataset.name": "cifar10", "density": 0.1},
        "CIFAR-10; ResNet-50; 1 %": {"dataset.name": "cifar10", "density": 0.01},
        "CIFAR-100; ResNet-50; 10 %": {"dataset.name": "cifar100", "density": 0.1},
        "CIFAR-100; ResNet-50; 1 %": {"dataset.name": "cifar100", "density": 0.01},
    },
    "sparse": {
        "CIFAR-10; VGG-C; 1 %": {"model.name": "vgg-c", "density": 0.01},
        "CIFAR-10; ResNet-34; 1 %": {"model.name": "resnet34", "density": 0.01},
    },
}
LONG = SPARSE | {"train.epochs": 250}
SHARED = {
    "crest": CREST | {"train.epochs": 200, "crest.subset": 0.01},
    "agent": LONG | {"model.name": "resnet50"},
    "sparse": LONG | {"growth.name": "random"},
}
ROWS = {"crest": ["crest"], "agent": ["SGD", "AGENT"], "sparse": ["SET + AGENT"]}


@pytest.mark.parametrize("name", OF_THE_PAPERS)
def test_a_papers_figure_stands_beside_a_row_with_its_settings_only(name):
    table = open_table(name, "paper")
    base = base_settings(table, None, {})
    assert list(table.cases) == list(OF_THE_PAPERS[name]) == list(table.paper)
    for case, facts in OF_THE_PAPERS[name].items():
        assert set(ROWS[name]) <= table.paper[case].keys() <= table.rows.keys()
        for row in ROWS[name]:
            trial = varied(base, table.trial(case, row, 0))
            found = dotted(trial.model_dump(mode="json"))
            expected = SHARED[name] | facts | {"dataset.validation": 0.0}
            if "AGENT" in row:
                expected |= AGENT
            assert {key: found[key] for key in expected} == expected
            if name != "crest":  # ΔT
                assert trial.adaptations(50_000)["update_every_steps"][0] == (1500 if name == "sparse" else 4000)


def test_options_say_where_the_data_of_a_case_are():
    table = open_table("crest", "paper")
    elsewhere = {"dataset.name": "parquet:mine"}
    with pytest.raises(UserError, match="the cases are of cifar10, cifar100, folder:tiny-imagenet-200: choose some"):
        with_data(table, elsewhere)
    one = narrowed(table, None, ["CIFAR-100*"], None)
    assert with_data(one, {"train.lr": 0.2}) == one
    (case,) = with_data(one, elsewhere).cases.values()
    assert "dataset.name" not in case and case["crest.h"] == 10.0


FIELDS = {
    "nope=3": "unknown setting 'nope'",
    "columns={'x': 'pretrain.secs'}": "unknown cost 'secs', did you mean 'seconds'",
    "experiment='trian'": "unknown experiment 'trian', did you mean 'train'",
    "baseline='c'": "baseline: unknown row 'c'",
    "reference='c'": "reference: unknown row 'c'",
    "rows={}": "rows = {}: dictionary should have at least 1 item",
    "rows={'a': {}, 'b, c': {}}": "'b, c' is no label: a text without commas is needed",
    "rows={'a': {}, 'b': {'seed': 3}}": "seed = 3 in a row or case would do nothing: see seeds",
    "rows={'a': {'train.lr': np.float32(0.1)}}": "raises TypeError: Object of type float32 is not JSON serializable",
    "seeds=range(9999)": "19,998 trials: at most 10,000",
    "metric='test_acuracy'": "unknown metric 'test_acuracy', did you mean 'test_accuracy'",
    "goals={'accuracy': [1e999]}": "goals.accuracy.0 = inf: input should be a finite number",
    "goals={'acuracy': [0.5]}": "unknown metric 'acuracy', did you mean 'accuracy'",
    "goals={'test_accuracy': [0.5]}": "goals: test_accuracy is known only at the end of a run",
    "columns={'x': 'test_acuracy'}": "unknown figure 'test_acuracy', did you mean 'test_accuracy'",
    "columns={'x': 'b / wrk'}": "unknown cost 'wrk', did you mean 'work'",
    "columns={'x': 'c / work'}": "unknown row 'c'",
    "gain='test_acuracy'": "unknown figure 'test_acuracy', did you mean 'test_accuracy'",
    "after={'c': 'x:y'}": "after: unknown row 'c'",
    "as_baseline=('c',)": "as_baseline: unknown row 'c'",
    "rates=(0.1, float('nan'))": "rates.1 = nan: input should be a finite number",
}


class NoText(Exception):
    def __str__(self):
        raise ValueError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "defines no function table"),
        ("async def table(scale): return 5", "returned <coroutine .*, not a"),
        ("def table(scale): return 5", "returned 5, not a raypkg.studies.tables.Table"),
        ("def table(scale): raise SystemExit(3)", "'mine.py', line 1: raises SystemExit: 3"),
        ("def table(scale):\n    raise GeneratorExit", "'mine.py', line 2: raises GeneratorExit"),
        (f"from {__name__} import NoText\ndef table(scale): raise NoText", "line 2: raises .*NoText"),
        ("x = 3\ndef table(:", "'mine.py', line 2: raises SyntaxError: invalid syntax"),
        *((MINE.format(changes=changes), f"table 'mine.py', line 6: {message}") for changes, message in FIELDS.items()),
    ],
)
def test_an_invalid_table_is_refused_in_one_line(text, message):
    with pytest.raises(UserError, match=message) as refused:
        read_table(text, "mine.py", "small")
    assert "\n" not in str(refused.value)


def table_of(**changes):
    rows = {"a": {}, "b 1": {"train.lr": 0.2}, "b 2": {"train.lr": 0.3}}
    return Table(**{"title": "t", "experiment": "train", "baseline": "a", "rows": rows, **changes})


@pytest.mark.parametrize(
    ("changes", "values", "message"),
    [
        ({"rows": {"a": {}, "b": {"train.lr": -1}}}, {}, r"row 'b', case 'all': train\.lr = -1: input should be"),
        ({"rows": {"a": {}, "b": {"model": "mpl"}}}, {}, "row 'b', case 'all': unknown model 'mpl'"),
        ({"after": {"a": "nowhere:f"}}, {}, "unknown after function or module 'nowhere:f'"),
        ({}, {"seed": 1}, "seed is what the rows or cases of the table differ in and cannot be given: see --seeds"),
    ],
)
def test_invalid_settings_are_refused_and_the_users_win_over_what_rows_share(changes, values, message):
    table = table_of(**changes)
    with pytest.raises(UserError, match=message):
        check_comparison(table, base_settings(table, None, values))
    shared = table_of(shared={"train.epochs": 7, "model": "mlp"})
    assert base_settings(shared, None, {}).train.epochs == 7
    given = base_settings(shared, None, {"train.epochs": 2, "model.name": "linear"})
    assert (given.train.epochs, given.model.name) == (2, "linear")


def test_some_rows_are_chosen_by_label_or_pattern_and_the_baseline_with_them():
    assert list(narrowed(table_of(), ["b*"], None, [5]).rows) == ["a", "b 1", "b 2"]
    assert list(narrowed(table_of(), ["b 2"], None, [5]).rows) == ["a", "b 2"]
    assert narrowed(table_of(), None, None, [5]).seeds == (5,)
    with pytest.raises(UserError, match="unknown row 'b 3', did you mean"):
        narrowed(table_of(), ["b 3"], None, None)
    with pytest.raises(UserError, match="unknown case 'noisy'"):
        narrowed(table_of(), None, ["noisy"], None)
    nearest = "unknown case 'cleen; 10 %', of 32 the nearest are 'clean; 10 %; 40 epochs', .*; --help lists all"
    with pytest.raises(UserError, match=nearest) as refused:
        narrowed(open_table("selection"), None, ["cleen; 10 %"], None)
    assert len(str(refused.value)) < 250


def test_a_table_survives_the_record_and_runs_seed_by_seed():
    assert [seed for _, _, seed, _ in table_of(seeds=(3, 4)).places()] == [3, 3, 3, 4, 4, 4]
    table = open_table("deltagrad")
    assert stored_table(table.model_dump()) == table
    with pytest.raises(UserError, match="the table of this comparison: experiment = "):
        stored_table({"title": "t"})
