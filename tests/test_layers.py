"""The architecture, checked: imports go downwards, a method is one room, outer libraries have one importer each."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "raypkg"
FLOORS = (  # each may import those before it
    "core", "data", "models", "runs", "engine", "coresets", "cluster", "experiments", "methods", "integrations",
    "studies", "cli",
)  # fmt: skip
APART = {"runs": {"core"}, "engine": {"core", "data", "models"}}  # floors that could see more and do not
MATHEMATICS = {"core", "data", "models", "coresets"}  # all that a method's pure files import
REACH = {"hook", "run", "pretrain", "experiment", "plots", "show", "export"}  # files and folders that reach further
REACH_TOO = {
    "lipt": {"api"},
    "language": {"phases"},
    "deltagrad": {"history", "journal", "requests", "answer", "estimator", "folder", "head"},
}  # fmt: skip
ROOMS = {
    ("lipt", "sparse"),
    ("sparse", "crest"),
    ("sparse", "agent"),
    ("language", "lipt"),
    ("audit", "deltagrad"),
    ("deltagrad", "audit"),  # its Hessian
}  # which method may import which
FILES = sorted(ROOT.rglob("*.py"))
TREES = {file: ast.parse(file.read_text()) for file in FILES}


def place(file: Path) -> tuple[str, ...]:
    return file.relative_to(ROOT).with_suffix("").parts


def imported(file: Path, nodes=None) -> set[str]:
    """Return everything that a file imports, ``from raypkg import x`` as raypkg.x."""
    names = set()
    for node in nodes or ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ["raypkg", *file.relative_to(ROOT).parts[:-1]]
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def reached(file: Path) -> set[tuple[str, ...]]:
    return {tuple(name.split(".")[1:]) for name in imported(file) if name.startswith("raypkg.")}


@pytest.mark.parametrize("file", FILES, ids=lambda file: "/".join(place(file)))
def test_imports_go_downwards(file):
    floor = place(file)[0]
    if floor in FLOORS:
        below = APART.get(floor, set(FLOORS[: FLOORS.index(floor)]))
        assert {name[0] for name in reached(file)} - {floor} <= below


@pytest.mark.parametrize(
    "file", sorted((ROOT / "methods").glob("*/**/*.py")), ids=lambda file: "/".join(place(file)[1:])
)
def test_a_method_is_one_room(file):
    _, room, *parts = place(file)
    others = {(room, name[1]) for name in reached(file) if name[0] == "methods"} - {(room, room)}
    assert others <= ROOMS
    reaching = REACH | REACH_TOO.get(room, set())
    if not set(parts) & reaching:
        assert {name[0] for name in reached(file)} - {"methods"} <= MATHEMATICS
    if not set(parts) & (reaching | {"settings"}):  # settings may ask them, within their functions
        assert not {name for name in reached(file) if name[:2] == ("methods", room) and name[2] in reaching}


@pytest.mark.parametrize(
    ("package", "where"),
    [
        ("lightning", "integrations/lightning.py"),
        ("ray", "cluster/"),
        ("wandb", "runs/tracking.py"),
        ("click", "cli/"),
        ("matplotlib", "runs/plots.py"),
    ],
)
def test_one_importer(package, where):
    users = [str(f.relative_to(ROOT)) for f in FILES if any(name.split(".")[0] == package for name in imported(f))]
    assert users
    assert all(user.startswith(where) for user in users)


DECORATED = {("experiments", name) for name in ("__init__", "train")}
LIGHT = [
    f
    for f in FILES
    if place(f)[0] in ("core", "cli") or place(f) in DECORATED or place(f)[-1] in ("settings", "experiment")
]


@pytest.mark.parametrize("file", LIGHT, ids=lambda file: "/".join(place(file)))
def test_what_help_needs_imports_no_torch(file):
    at_import = imported(file, TREES[file].body)
    assert not {name for name in at_import if name.split(".")[0] in ("torch", "ray", "numpy", "matplotlib")}
