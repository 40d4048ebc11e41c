"""Bad input in code: a user's models, data sets, hooks, methods and spaces; orders of sweeps; the environment."""

from attacks.cases import cases

MODELS = """
import os, sys, torch
from torch import nn
from raypkg import Split

number = 3
text = "build"
def nothing(shape, num_classes): return None
def a_tensor(shape, num_classes): return torch.zeros(3)
def a_class(shape, num_classes): return nn.Linear
def no_parameters(shape, num_classes): return nn.Identity()
def flat(shape, num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
def frozen(shape, num_classes): return flat(shape, num_classes).requires_grad_(False)
def too_few_outputs(shape, num_classes): return flat(shape, num_classes - 1)
def no_batch(shape, num_classes): return nn.Sequential(nn.Flatten(0), nn.Linear(64, num_classes))
def wrong_input(shape, num_classes): return nn.Linear(5, num_classes)
def nan(shape, num_classes):
    model = flat(shape, num_classes)
    nn.init.constant_(model[1].weight, float("nan"))
    return model
def exits(shape, num_classes): sys.exit(3)
def interrupts(shape, num_classes): raise KeyboardInterrupt
def no_arguments(): return None
def one_argument(shape): return None
def positional(shape, num_classes, width): return None
def untyped(shape, num_classes, *, width=3): return None
def no_default(shape, num_classes, *, width: int): return None
def starred(shape, num_classes, **options): return None
def mistyped(shape, num_classes, *, width: int = "x"): return None
def dtype(shape, num_classes): return flat(shape, num_classes).half()
def shares(shape, num_classes, *, width: int = 3): return flat(shape, num_classes)
"""

MODEL_NAMES = cases(
    "a model of the user's",
    "train --model={} --train.epochs 1",
    {
        "my:nope": "module 'my' has no 'nope'",
        "my:": "unknown model or module 'my:'",
        "my:number": "'my:number' is a int, not a function",
        "my:text": "'my:text' is a str, not a function",
        "my:no_default": "option 'width' needs a type and a default",
        "my:torch": "'my:torch' is a module, not a function",
        "my flat": "unknown model 'my flat'",
        "antigravitation:fly": "unknown model or module",
        "missing:build": "module needs 'nowhere', which is not installed",
    },
    make=lambda folder, _: write_modules(folder),
)


def write_modules(folder):
    (folder / "my.py").write_text(MODELS)
    (folder / "missing.py").write_text("import nowhere")
    (folder / "quits.py").write_text("import sys; sys.exit(0)")


MODEL_OPTIONS = cases(
    "an option of a user's model",
    "train --model my:shares --train.epochs 1 --set model.options.{}",
    {
        "with=3": "unknown my:shares option 'with', did you mean 'width'",
        "shape=3": "unknown my:shares option 'shape'",
        "num_classes=3": "unknown my:shares option 'num_classes'",
    },
    make=lambda folder, _: write_modules(folder),
)

LOADERS = {
    "None": ("return None", "returned a NoneType, not a raypkg.data.split.Split"),
    "sys.exit": ("import sys; sys.exit(0)", "mine:load"),
    "no samples": ("return Split.from_tensors(x[:0], y[:0])", "x is empty"),
    "labels of another length": ("return Split.from_tensors(x, y[:5])", "y is int64 [5], needed are integers [40]"),
    "labels with gaps": ("return Split.from_tensors(x, y * 2)", "none is 1"),
    "one class": ("return Split.from_tensors(x, y * 0)", "class"),
    "too few names of classes": ("return Split.from_tensors(x, y, classes=['a'])", "has label 1, allowed is 0 … 0"),
    "NaN": ("x[3, 1] = float('nan'); return Split.from_tensors(x, y)", "row 3 of x holds NaN"),
    "three dimensions": ("return Split.from_tensors(x[None], y)", "needed is uint8 [n, C, H, W] or float [n, D]"),
    "an unknown augmentation": ("return Split.from_tensors(x, y, augment=('flop',))", "unknown augmentation 'flop'"),
    "splits of other shapes": (
        "return Split.from_tensors(x if split == 'train' else x[:, :1], y)",
        "the splits differ in shape: train has (2,), test has (1,)",
    ),
    "splits of other classes": (
        "return Split.from_tensors(x, y, classes=[split + 'a', split + 'b'])",
        "the splits differ in classes",
    ),
}
DATASETS = cases(
    "a data set of the user's that gives",
    "train --dataset mine:load --model linear --train.epochs 1",
    LOADERS,
    make=lambda folder, body: (folder / "mine.py").write_text(
        "import torch\nfrom raypkg import Split\n\ndef load(root, *, split):\n"
        f"    x = torch.arange(80.0).reshape(40, 2)\n    y = torch.arange(40) % 2\n    {body}\n"
    ),
)

SIGNATURES = cases(
    "the signature of a user's data set",
    "data mine:load",
    {
        "def load(root): ...": "must take a keyword split",
        "def load(root, *, split, size): ...": "option 'size' needs a type and a default",
        "import raypkg.no_such": "module needs 'raypkg.no_such'",
    },
    into="mine.py",
)

HOOK = """
import sys
from raypkg import Hook
def make(): return None
def gives_none(): return None
def gives_three(): return 3
class NoHook: ...
class Needs(Hook):
    def __init__(self, thing): ...
class Leaves(Hook):
    def results(self, run): return 3
class Exits(Hook):
    def on_epoch(self, run): sys.exit(0)
class Options(Hook):
    def __init__(self, *, norm: float = 1.0): ...
"""
HOOKS = cases(
    "a hook of the user's",
    "train --model linear --train.epochs 1 --hooks={}",
    {
        "mine:gives_none": "gave an object of type NoneType, not a raypkg.Hook",
        "mine:gives_three": "gave an object of type int, not a raypkg.Hook",
        "mine:NoHook": "gave an object of type NoHook, not a raypkg.Hook",
        "mine:Leaves": "results() returned a int, not raypkg.engine.hooks.Results",
    },
    make=lambda folder, _: (folder / "mine.py").write_text(HOOK),
    leaves=("runs/train", "runs/train/digits-*"),
)

METHOD = """
import torch
from raypkg import Coreset
def none(view, budget): return None
def indices(view, budget): return torch.arange(budget)
def too_many(view, budget): return Coreset(torch.arange(len(view.y)), torch.ones(len(view.y)))
def twice(view, budget): return Coreset(torch.zeros(budget, dtype=torch.int64), torch.ones(budget))
def outside(view, budget): return Coreset(torch.arange(budget) + 10**6, torch.ones(budget))
def negative(view, budget): return Coreset(torch.arange(budget), -torch.ones(budget))
def nan(view, budget): return Coreset(torch.arange(budget), torch.full((budget,), float("nan")))
def nothing(): return None
def wants(view, budget, more): return None
"""
METHODS = cases(
    "a coreset rule of the user's",
    "select --model-from t --fraction 0.1 --rule mine:{}",
    {
        "none": "'mine:none' must return a Coreset",
        "indices": "'mine:indices' must return a Coreset",
        "too_many": "'mine:too_many' must return a Coreset",
    },
    make=lambda folder, _: (folder / "mine.py").write_text(METHOD),
)

SPACES = cases(
    "a space",
    "tune crest --space mine.py",
    {
        "def space(): return {}\nMETRIC, MODE = 'accuracy', 'max'": "there is nothing to vary",
        "def space(): return {}\nMETRIC, MODE = 'nope', 'max'": "unknown metric 'nope'",
        "import os; os.chdir('nowhere')": "raises FileNotFoundError",
        "no text": (b"\xff\xfe\x00", "cannot read the space 'mine.py'"),
    },
    into="mine.py",
)

DOMAINS = cases(
    "a domain of a space",
    "tune crest --space mine.py",
    {
        "'budget': tune.loguniform(0, 1)": "raises ValueError: LogUniform",
        "'budget': tune.uniform(0.1, float('inf'))": "raises ValueError: Uniform",
        "'track.name': tune.choice([None, 'wandb'])": "track.name does not alter the result",
        "'dataset.name': tune.choice(['digits', 'digts'])": "unknown dataset 'digts'",
    },
    make=lambda folder, domains: (folder / "mine.py").write_text(
        "from ray import tune\nMETRIC, MODE = 'accuracy', 'max'\ndef space():\n    return {" + domains + "}\n"
    ),
)

SWEEPS = cases(
    "the order of a sweep",
    "{}",
    {
        "tune crest --samples x": "'x' is not a valid integer",
        "tune crest --concurrent -1": "--concurrent -1: at least 1",
        "tune crest --space nowhere.py": "there is no space file 'nowhere.py'",
        "tune crest --space ../crest": "unknown space '../crest'",
        "tune crest --resume nope": "unknown sweep in … 'nope' … Allowed: sweep",
        "tune lipt --resume sweep": "sweep 'sweep' is of crest, not of lipt",
        "tune crest --resume sweep --concurrent 0": "--concurrent 0: at least 1",
        "tune sparse --density 1": "density = 1 leaves no room to grow",
        "tune train --coreset nope.parquet": "there is no coreset file … nope.parquet",
    },
)

NO_CLUSTER = cases(
    "a Ray that is not there",
    "{}",
    {
        "train --model linear --cluster.workers 1 --cluster.address 127.0.0.1:1": "127.0.0.1:1 … --cluster.workers 0",
        "train --model linear --cluster.workers 1 --cluster.address nonsense": "nonsense",
    },
)

TRACKING = cases(
    "WANDB_MODE",
    "train --model linear --train.epochs 1 --track wandb",
    {"nonsense": "WANDB_MODE", "ONLINE ": "WANDB_MODE", "0": "WANDB_MODE"},
    variable="WANDB_MODE",
)

PROJECTS = cases(
    "the project of W&B",
    "train --model linear --train.epochs 1 --track wandb --track.project {}",
    dict.fromkeys(["a/b", "a:b", "x" * 200], "Invalid project name"),
    environment={"WANDB_MODE": "offline"},
)

CACHES = cases(
    "EFFRAY_CACHE",
    "data table:rows.csv",
    {
        "/dev/null": "cannot build the data cache '/dev/null/",
        "/proc/x": "cannot build the data cache '/proc/x/",
        "rows.csv": "cannot build the data cache 'rows.csv/",
    },
    make=lambda folder, _: (folder / "loop").symlink_to("loop"),
    variable="EFFRAY_CACHE",
)

RAY_ADDRESS = cases(
    "RAY_ADDRESS",
    "train --model linear --cluster.workers 1",
    {"127.0.0.1:1": "127.0.0.1:1 … --cluster.workers 0"},
    variable="RAY_ADDRESS",
)

EFFRAY_RUNS = cases(
    "EFFRAY_RUNS",
    "show t",
    {
        "nowhere": "unknown run in nowhere 't'. Allowed: none",
        "ftp://x": "cannot use 'ftp://x' as a folder",
        "file://": "cannot use 'file://' as a folder",
    },
    variable="EFFRAY_RUNS",
    fresh=True,
)
