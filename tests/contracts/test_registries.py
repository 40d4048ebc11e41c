"""The contract of every registry: names from the source before any import, options from signatures, user code."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

import raypkg
from raypkg.core.errors import UserError, user_code
from raypkg.core.registry import Registry
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


every_registry = pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.kind)


@every_registry
def test_the_names_in_the_source_are_those_that_imports_register(everything_imported, registry):
    registered = {name: entry.function.__module__ for name, entry in registry._entries.items()}
    ours = {name: module for name, module in registered.items() if module.startswith("raypkg.")}
    assert ours
    assert {name: found.module for name, found in registry.written.items()} == ours


@every_registry
def test_every_entry_is_found_by_its_name(registry):
    for name, found in registry.written.items():
        entry = registry[name]
        assert (entry.name, entry.function.__module__) == (name, found.module)
        assert entry is registry.entries[name]
        assert found.module in sys.modules


PACKAGE = """
from raypkg.core.registry import Registry

kind = Registry("kind", "registry_example", given=("rng",))
"""
ONE = """
from . import kind

@kind("one", source="a paper")
def f(x, *, rng, width: int = 3):
    '''Multiply.

    More.
    '''
    return x * width, rng
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "registry_example"
    folder.mkdir()
    (folder / "__init__.py").write_text(PACKAGE)
    (folder / "one.py").write_text(ONE)
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.startswith("registry_example")]:
        del sys.modules[name]


def test_an_addition_is_one_file(package):
    from registry_example import kind

    (package / "two.py").write_text("from . import kind\n@kind('two')\ndef g(x):\n    return x\n")
    assert list(kind.entries) == ["one", "two"]
    assert (kind["one"].help, kind["one"].source) == ("Multiply.", "a paper")
    assert kind["one"](2, rng="r", options={"width": "5"}) == (10, "r")
    assert kind["two"](2, rng="not declared, not passed") == 2


def test_a_name_imports_its_own_module_only_and_an_unknown_one_none(package):
    from registry_example import kind

    (package / "broken.py").write_text("from . import kind\n@kind('two')\ndef g(x): ...\nraise RuntimeError\n")
    with pytest.raises(UserError, match=r"unknown kind 'onne', did you mean 'one'\? Allowed: one, two"):
        kind["onne"]
    assert "one" in kind and "two" in kind and "three" not in kind
    kind.check("two")
    assert "registry_example.one" not in sys.modules
    assert kind["one"].help == "Multiply."
    assert "registry_example.broken" not in sys.modules
    with pytest.raises(RuntimeError):
        kind["two"]


def test_a_name_stands_in_one_module_only(package):
    from registry_example import kind

    (package / "same.py").write_text(ONE)
    importlib.import_module("registry_example.one")
    with pytest.raises(UserError, match=r"kind 'one' is registered twice, in registry_example\.one and .*\.same"):
        kind["one"]


def test_registration_refuses_an_untyped_option():
    registry = Registry("kind", "nowhere")
    with pytest.raises(UserError, match=r"option 'width' needs a type and a default .*test_registries.py"):

        @registry("bad")
        def bad(x, *, width=3):
            return x


def test_a_lack_of_memory_is_one_line():
    def on_a_gpu():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    for take, wanted in ((on_a_gpu, " to allocate 2.00 GiB"), (lambda: torch.empty(2**50), r" to allocate \d+ bytes")):
        with pytest.raises(UserError, match=f"out of memory{wanted}: lower train.batch_size"), user_code():
            take()


def test_user_code_by_module_and_function(package, tmp_path):
    from registry_example import kind

    (tmp_path / "mine.py").write_text("def g(x, *, rng, scale: float = 2.0):\n    return x * scale\n")
    assert kind["mine:g"](3, rng=None, options={"scale": 4}) == 12
    for name, message in [
        ("mine:h", "module 'mine' has no 'h'"),
        ("nomodule:g", "unknown kind or module 'nomodule:g'"),
        ("sys:path", "is a list, not a function"),
    ]:
        with pytest.raises(UserError, match=message):
            kind[name]
