"""The architecture, checked: imports go strictly downwards, and Ray, W&B and click each have one importer."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "raypkg"
BELOW = {
    "core": set(),
    "data": {"core"},
    "models": {"core"},
    "methods": {"core"},
    "engine": {"core", "data", "models", "methods"},
    "cluster": {"core", "data", "models", "methods", "engine"},
    "runs": {"core"},
    "phases": {"core", "data", "models", "methods", "engine", "cluster", "runs"},
    "experiments": {"core", "data", "models", "methods", "engine", "cluster", "runs", "phases"},
    "sweeps": {"core", "data", "models", "methods", "engine", "cluster", "runs", "phases", "experiments"},
    "cli": {"core", "data", "models", "methods", "engine", "cluster", "runs", "phases", "experiments", "sweeps"},
}
FILES = sorted(ROOT.rglob("*.py"))


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ["raypkg", *file.relative_to(ROOT).parts[:-1]]
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            names.add(".".join(filter(None, [base, node.module])))
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_downwards(file):
    layer = file.relative_to(ROOT).parts[0]
    above = {name for name in imported(file) if name.startswith("raypkg.")}
    reached = {name.split(".")[1] for name in above} - {layer}
    assert reached <= BELOW.get(layer, set())


@pytest.mark.parametrize(
    ("package", "where"),
    [("ray", "cluster/"), ("wandb", "runs/tracking.py"), ("click", "cli/"), ("matplotlib", "runs/plots.py")],
)
def test_one_importer(package, where):
    users = [str(f.relative_to(ROOT)) for f in FILES if any(name.split(".")[0] == package for name in imported(f))]
    assert users
    assert all(user.startswith(where) for user in users)


@pytest.mark.parametrize("layer", ["core", "experiments", "cli"])
def test_what_help_needs_imports_no_torch(layer):
    top = [node for file in (ROOT / layer).glob("*.py") for node in ast.parse(file.read_text()).body]
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
    assert not {name for name in names if name.split(".")[0] in ("torch", "ray", "numpy", "matplotlib")}
