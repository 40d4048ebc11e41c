"""What every registry keeps: its names can be told from the source, before anything is imported."""

import importlib
import sys
from pathlib import Path

import pytest

import raypkg
from raypkg.coresets.rules import coreset
from raypkg.data.sources import dataset
from raypkg.engine import hook
from raypkg.experiments import experiment, export_format
from raypkg.methods.lipt.merges import merge
from raypkg.methods.lipt.pretrain import pretraining
from raypkg.methods.sparse.rules import drop, growth, initial, redistribution
from raypkg.models import model

REGISTRIES = (
    experiment, export_format, coreset, model, dataset, hook, pretraining, merge, initial, drop, growth, redistribution,
)  # fmt: skip


@pytest.fixture(scope="module")
def everything_imported():
    root = Path(raypkg.__file__).parent
    for file in root.rglob("*.py"):
        if not file.name.startswith("__"):
            module = ".".join(["raypkg", *file.relative_to(root).with_suffix("").parts])
            importlib.import_module(module)


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.kind)
def test_the_names_in_the_source_are_those_that_imports_register(everything_imported, registry):
    registered = {name: entry.function.__module__ for name, entry in registry._entries.items()}
    ours = {name: module for name, module in registered.items() if module.startswith("raypkg.")}
    assert ours
    assert registry.modules == ours


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.kind)
def test_every_entry_is_found_by_its_name(registry):
    for name, module in registry.modules.items():
        entry = registry[name]
        assert (entry.name, entry.function.__module__) == (name, module)
        assert entry is registry.entries[name]
        assert module in sys.modules
