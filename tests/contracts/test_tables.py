"""The contract of every shipped table, and the checks of a user's own."""

from dataclasses import asdict
from pathlib import Path

import pytest

from raypkg.core.errors import UserError
from raypkg.studies.compare import base_settings, check_comparison
from raypkg.studies.tables import SCALES, Table, narrowed, open_table, read_table, stored_table

FILES = sorted((Path(__file__).parents[2] / "tune_spaces" / "tables").glob("*.py"))
FEWER = {"texts": {"train.batch_size": 4}}  # samples a step: half a per cent of the digits is less than its own
MINE = """
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
    given = {"dataset.name": "digits", "cluster.workers": 0, **FEWER.get(file.stem, {})}
    check_comparison(table, base_settings(table, None, given))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_rows_are_different_runs_and_scales_have_the_same_rows(file):
    small, paper = (open_table(file.stem, scale) for scale in SCALES)
    for case in small.cases:
        assert len({small.identity(case, row, 0) for row in small.rows}) == len(small.rows)
    assert list(small.rows) == list(paper.rows)
    assert small.shared != paper.shared or small.cases != paper.cases


def test_one_in_the_working_folder_wins(tmp_path, monkeypatch):
    folder = tmp_path / "tune_spaces" / "tables"
    folder.mkdir(parents=True)
    (folder / "crest.py").write_text(MINE.format(changes="title='mine'"))
    monkeypatch.chdir(tmp_path)
    assert open_table("crest").title == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "defines no function table"),
        ("def table(scale): return 5", "returned 5, not a raypkg.studies.tables.Table"),
        ("def table(scale): raise SystemExit(3)", "raises SystemExit: 3"),
        (MINE.format(changes="baseline='c'"), "the baseline: unknown row 'c'"),
        (MINE.format(changes="rows={}"), "has no row or no case"),
        (MINE.format(changes="rows={'a': {}, 'b, c': {}}"), "'b, c' is no label: a text without commas is needed"),
        (MINE.format(changes="seeds=(0, 0)"), r"seeds = \[0, 0\]: distinct integers of 0 or more are needed"),
        (MINE.format(changes="seeds=range(9999)"), "has 19,998 trials: at most 10,000"),
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
        ({"goals": {"test_accuracy": [0.5]}}, {}, "test_accuracy is known only at the end of a run"),
        ({"after": {"a": "nowhere:f"}}, {}, "after 'nowhere:f' cannot be imported"),
        ({}, {"seed": 1}, "seed is what the rows or cases of the table differ in and cannot be given: see --seeds"),
    ],
)
def test_invalid_settings_are_refused_before_any_run(changes, values, message):
    table = table_of(**changes)
    with pytest.raises(UserError, match=message):
        check_comparison(table, base_settings(table, None, values))


def test_the_user_wins_over_what_rows_share():
    table = table_of(shared={"train.epochs": 7, "model": "mlp"})
    assert base_settings(table, None, {}).train.epochs == 7
    given = base_settings(table, None, {"train.epochs": 2, "model.name": "linear"})
    assert (given.train.epochs, given.model.name) == (2, "linear")


def test_some_rows_are_chosen_by_label_or_pattern_and_the_baseline_with_them():
    assert list(narrowed(table_of(), ["b*"], None, [5]).rows) == ["a", "b 1", "b 2"]
    assert list(narrowed(table_of(), ["b 2"], None, [5]).rows) == ["a", "b 2"]
    assert narrowed(table_of(), None, None, [5]).seeds == (5,)
    with pytest.raises(UserError, match="unknown row 'b 3', did you mean"):
        narrowed(table_of(), ["b 3"], None, None)
    with pytest.raises(UserError, match="unknown case 'noisy'"):
        narrowed(table_of(), None, ["noisy"], None)


def test_a_table_survives_the_record_and_runs_seed_by_seed():
    assert [seed for _, _, seed in table_of(seeds=(3, 4)).places()] == [3, 3, 3, 4, 4, 4]
    table = open_table("deltagrad")
    assert stored_table(asdict(table)) == table
    with pytest.raises(UserError, match="holds no table"):
        stored_table({"title": "t"})
