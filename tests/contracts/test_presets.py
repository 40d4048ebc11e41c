"""Presets: the published ones hold what the papers and released codes state; stored runs keep their old defaults."""

import pytest

from raypkg.core.config import dotted, load_settings, load_stored
from raypkg.core.errors import UserError
from raypkg.core.presets import PUBLISHED, departures, presets_of
from raypkg.coresets.rules import coreset
from raypkg.experiments import experiment, settings_of
from raypkg.experiments.resolve import resolve
from raypkg.experiments.train import SelectSettings, TrainSettings
from raypkg.methods.agent.settings import DAMPING
from raypkg.studies.tables import Table, read_table

SCHEMAS = {name: settings_of(experiment[name]) for name in ("crest", "lipt", "sparse", "deltagrad")}
PRESETS = [(name, preset) for name, schema in SCHEMAS.items() for preset in presets_of(schema)]
SGD = {"train.lr": 0.1, "train.momentum": 0.9, "train.weight_decay": 5e-4, "train.batch_size": 128}
CREST = {  # arXiv:2306.01244: section 4, table 1 and appendix
    **SGD, "crest.tau": 0.05, "crest.h": 1, "crest.b": 5, "crest.exclude_every_steps": 20, "crest.exclude_below": 0.1,
    "crest.order": 2, "crest.checked_on": "fresh", "crest.smoothing": "pool", "crest.model_batches": 0,
    "crest.curvature": 0, "crest.exclude_after": 0, "crest.keep_active": 0, "crest.settle": 0, "budget": 0.1,
    "train.nesterov": False, "train.schedule": "multistep", "train.warmup": 0.1, "train.milestones": [0.6, 0.85],
    "train.lr_drop": 0.1,
}  # fmt: skip
LIPT = {  # PMLR 202:29130: abstract and released defaults
    **SGD, "pretrain.models": 10, "pretrain.epochs": 5, "pretrain.rounds": 1, "pretrain.randaugment": True,
    "pretrain.lr": 0.1, "pretrain.density": 0.05, "pretrain.sparsity": "snip", "select.weighted": False,
    "train.nesterov": True, "train.schedule": "cosine", "train.init": "scratch",
}  # fmt: skip
SPARSE = {  # RigL, ITOP, and AGENT's comparison with them
    **SGD, "density": 0.05, "growth.name": "gradient", "drop.name": "magnitude", "sparse_init.name": "erk",
    "death_rate": 0.5, "train.nesterov": True, "train.schedule": "multistep",
    "train.milestones": [0.5, 0.75], "train.lr_drop": 0.1,
}  # fmt: skip
AGENT = {"agent.form": "published", "agent.alpha": 0.3}
DELTAGRAD = {  # arXiv:2006.14755: the released example on MNIST
    "train.batch_size": 16384, "train.epochs": 20, "train.lr": 0.1, "train.schedule": "multistep",
    "train.milestones": [0.5], "train.lr_drop": 0.5, "train.weight_decay": 1e-4, "train.momentum": 0,
    "replay.period": 5, "replay.pairs": 2, "dataset.scale": "unit", "history.dtype": "float64",
}  # fmt: skip
ON_CIFAR = {"crest.subset": 0.01, "train.epochs": 200}
SNLI = {"crest.h": 4, "crest.subset": 0.005, "train.batch_size": 32, "train.optimizer": "adamw", "train.lr": 1e-5}
CIFAR100 = {"model.name": "resnet18", "crest.tau": 0.01, "crest.h": 10, "crest.subset": 0.01}
FACTS = [
    ("crest", {}, CREST),
    ("crest", {"dataset.name": "cifar10"}, {**CREST, **ON_CIFAR, "model.name": "resnet20", "dataset.validation": 0}),
    ("crest", {"dataset.name": "cifar100"}, {**CREST, **CIFAR100}),
    ("crest", {"preset": "snli"}, SNLI),
    ("crest", {"preset": "released"}, {"crest.checked_on": "pool", "crest.smoothing": "coreset", "crest.tau": 0.05}),
    ("crest", {"preset": "each-step"}, {"crest.tau": 0, "crest.subset": "4m"}),
    ("crest", {"preset": "each-step", "dataset.name": "cifar10"}, {"crest.subset": "4m", "model.name": "resnet20"}),
    ("lipt", {}, LIPT),
    ("lipt", {"dataset.name": "cifar10"}, {**LIPT, "model.name": "resnet18", "train.epochs": 200}),
    ("sparse", {}, {**SPARSE, "agent": None}),
    ("sparse", {"dataset.name": "cifar10"}, {**SPARSE, "train.epochs": 250, "dataset.validation": 0}),
    ("sparse", {"preset": "set"}, {**SPARSE, "growth.name": "random"}),
    ("sparse", {"preset": "rigl-agent"}, {**SPARSE, **AGENT}),
    ("sparse", {"preset": "set-agent"}, {**SPARSE, **AGENT, "growth.name": "random"}),
    ("deltagrad", {}, DELTAGRAD),
]


@pytest.mark.parametrize(("name", "given", "facts"), FACTS)
def test_a_preset_has_the_stated_values(name, given, facts):
    settings = resolve(SCHEMAS[name], None, given)
    values = {"dataset.scale": settings.dataset.scale} | dotted(settings.model_dump(mode="json"))
    assert {key: values.get(key) for key in facts} == facts


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_defaults_are_the_published_method(name):
    schema = SCHEMAS[name]
    preset = load_settings(schema, None, presets_of(schema)[PUBLISHED].values)
    assert preset == schema()
    assert departures(schema()) == {}


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_a_preset_is_stored_by_name_and_reruns(name, preset):
    settings = resolve(SCHEMAS[name], None, {"preset": preset})
    assert settings.preset == preset
    assert departures(settings) == {}
    assert resolve(SCHEMAS[name], settings.model_dump(mode="json"), {}) == settings


def test_options_win_and_are_named_as_changes():
    settings = resolve(SCHEMAS["crest"], {"preset": "each-step"}, {"crest.subset": "0.2", "train.lr": "0.05"})
    assert (settings.crest.tau, settings.crest.subset) == (0, 0.2)
    assert departures(settings) == {"crest.subset": 0.2, "train.lr": 0.05}


ADAPTED = {"crest": {"subset": "4m"}, "adapted": ["crest.subset = 4m"]}


@pytest.mark.parametrize(
    ("stored", "given"), [({}, {"dataset.name": "cifar10"}), ({}, {"preset": "each-step"}), (ADAPTED, {})]
)
def test_a_baseline_may_have_the_options_of_crest_that_nobody_gave(stored, given):
    assert resolve(SCHEMAS["crest"], stored, {"selection": "random", **given}).selection == "random"


def test_a_part_that_a_preset_enables_can_be_disabled():
    agent = resolve(SCHEMAS["sparse"], None, {"preset": "rigl-agent"}).agent
    assert agent.gamma is None and DAMPING[agent.form] == 0.1
    settings = resolve(SCHEMAS["sparse"], None, {"preset": "rigl-agent", "agent": "false"})
    assert settings.agent is None
    assert set(departures(settings)) >= {"agent.form"}


def test_a_preset_excludes_that_of_a_settings_file():
    with pytest.raises(UserError, match=r"preset = released: the settings are those of preset each-step"):
        resolve(SCHEMAS["crest"], {"preset": "each-step"}, {"preset": "released"})


def test_values_are_adapted_to_the_data():
    crest = resolve(SCHEMAS["crest"], None, {})
    assert crest.adaptations(100_000) == {}
    assert crest.adaptations(1_295)["crest.subset"][0] == "4m"
    sparse = resolve(SCHEMAS["sparse"], None, {"train.epochs": 250})
    assert sparse.adaptations(50_000)["update_every_steps"][0] == 4000
    assert sparse.adaptations(1_280)["update_every_steps"][0] == 4000 * 2500 // 97_750
    deltagrad = resolve(SCHEMAS["deltagrad"], None, {})
    cut = {name: value for name, (value, _) in deltagrad.adaptations(1_295).items()}
    assert cut == {"replay.burn_in": 6, "replay.settled": 0.1}
    assert deltagrad.adaptations(60_000) == {}


def test_runs_stored_before_presets_keep_their_defaults():
    crest = load_stored(SCHEMAS["crest"], {"crest": {"tau": 0.05}})
    assert (crest.preset, crest.crest.subset, crest.crest.checked_on, crest.crest.curvature) == ("", "4m", "pool", None)
    assert load_stored(SCHEMAS["crest"], {"selection": "random", "crest": {"keep_active": 0.8}}).selection == "random"
    sparse = load_stored(SCHEMAS["sparse"], {"growth": {"name": "random"}, "agent": {"gamma": 0.5}})
    assert (sparse.density, sparse.agent.form, sparse.adaptations(50_000)) == (None, "measured", {})
    assert load_stored(SCHEMAS["lipt"], {"pretrain": {"density": 0.9}}).pretrain.rounds is None
    assert load_stored(SCHEMAS["deltagrad"], {"dataset": {"name": "digits"}}).dataset.scale == "standard"
    trial = resolve(SCHEMAS["sparse"], sparse.model_dump(mode="json"), {"agent": True})
    assert trial.agent.form == "measured"


def test_a_row_names_a_preset_and_stores_its_values():
    text = (
        "from raypkg.studies.tables import Table\n"
        "def table(scale):\n"
        "    rows = {'published': {}, 'each step': {'preset': 'each-step', 'crest.h': 2.0}}\n"
        "    return Table(title='t', experiment='crest', baseline='published', rows=rows)\n"
    )
    table = read_table(text, "t.py", "small")
    assert isinstance(table, Table)
    row = table.rows["each step"]
    assert (row["preset"], row["crest.tau"], row["crest.h"]) == ("each-step", 0.0, 2.0)
    assert not any(name.startswith("train.") for name in row)  # those are shared


OMP = {"weighted": True, "every_epochs": 20, "lam": 0.5, "eps": 1e-10, "relative": False}  # arXiv:2103.00123
RULES = {
    "gradmatch": {**OMP, "balanced": True, "normalise": False},
    "gradmatchpb": OMP,
    "glister": {"weighted": False, "every_epochs": 20, "eta": 0.01, "target": None},  # for the held-out samples
    "craig": {"weighted": True, "every_epochs": 20, "greedy": "lazy"},
    "grand": {"gradients": "full", "pick": "largest"},  # arXiv:2107.07075
}


def chosen(settings, names):
    """Return settings of a selection and options of its rule, defaults included."""
    values = coreset[settings.rule].options(settings.options) | settings.model_dump()
    return {name: values[name] for name in names if name in values}


def test_each_preset_of_a_rule_differs_from_its_defaults():
    assert {name for name in coreset.names if coreset[name].published} == set(RULES)
    for rule in RULES:
        selects = [resolve(SelectSettings, None, {"rule": rule, "preset": given}) for given in ("published", "false")]
        assert selects[0].model_copy(update={"preset": None}) != selects[1]


@pytest.mark.parametrize(("rule", "facts"), RULES.items())
def test_a_rule_as_published_has_the_stated_values(rule, facts):
    train = resolve(TrainSettings, None, {"select.rule": rule, "select.preset": "published", "select.fraction": 0.1})
    assert chosen(train.select, facts) == facts
    assert resolve(TrainSettings, train.model_dump(mode="json"), {}) == train
    once = {name: value for name, value in facts.items() if name != "every_epochs"}
    assert chosen(resolve(SelectSettings, None, {"rule": rule, "preset": "published"}), once) == once


def test_options_win_over_the_preset_of_a_rule():
    given = {"select.rule": "gradmatch", "select.options.lam": 0.1, "select.every_epochs": 5}
    stored = {"select": {"rule": "gradmatch", "preset": "published", "weighted": False}}
    select = resolve(TrainSettings, stored, given).select
    found = (select.options["lam"], select.options["relative"], select.every_epochs, select.weighted)
    assert found == (0.1, False, 5, False)
    # a trial's preset has priority over what all trials share
    shared = resolve(TrainSettings, {"select": {"fraction": 0.1}}, {}).model_dump(mode="json")
    select = resolve(TrainSettings, shared, {"select.rule": "craig", "select.preset": "published"}).select
    assert (select.weighted, select.every_epochs, select.fraction) == (True, 20, 0.1)


def test_a_rule_without_another_form_has_no_preset():
    with pytest.raises(UserError, match=r"preset = published: kcenter has no other form; these have: craig, glister"):
        resolve(SelectSettings, None, {"rule": "kcenter", "preset": "published"})
