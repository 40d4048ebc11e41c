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
        "my:nothing": "'my:nothing'",
        "my:a_tensor": "'my:a_tensor'",
        "my:a_class": "'my:a_class'",
        "my:no_parameters": "'my:no_parameters'",
        "my:frozen": "'my:frozen'",
        "my:too_few_outputs": "'my:too_few_outputs'",
        "my:no_batch": "'my:no_batch'",
        "my:wrong_input": "'my:wrong_input'",
        "my:exits": "my:exits",
        "my:no_arguments": "'my:no_arguments'",
        "my:one_argument": "'my:one_argument'",
        "my:positional": "'my:positional'",
        "my:untyped": "option 'width'",
        "my:no_default": "option 'width' needs a type and a default",
        "my:starred": "'my:starred'",
        "my:mistyped": "width",
        "my.py:flat": "my.py:flat",
        "./my:flat": "./my:flat",
        "../x:y": "../x:y",
        ".my:flat": ".my:flat",
        "my..x:flat": "my..x:flat",
        "my:flat:x": "my:flat:x",
        "my:torch.nn": "my:torch.nn",
        "my:torch": "'my:torch' is a module, not a function",
        "my flat": "unknown model 'my flat'",
        "builtins:print": "builtins:print",
        "builtins:int": "builtins:int",
        "os:abort": "os:abort",
        "os:getcwd": "os:getcwd",
        "os:_exit": "os:_exit",
        "sys:exit": "sys:exit",
        "torch:nn": "'torch:nn' is a module",
        "antigravitation:fly": "unknown model or module",
        "missing:build": "module needs 'nowhere', which is not installed",
        "quits:build": "quits",
        "rows.csv:build": "rows.csv",
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
        "width=x": "my:shares option width = 'x'",
        "width=1.5": "my:shares option width = 1.5",
        "with=3": "unknown my:shares option 'with', did you mean 'width'",
        "shape=3": "unknown my:shares option 'shape'",
        "num_classes=3": "unknown my:shares option 'num_classes'",
    },
    make=lambda folder, _: write_modules(folder),
)

LOADERS = {
    "None": ("return None", "returned a NoneType, not a raypkg.data.split.Split"),
    "a pair": ("return x, y", "returned a tuple"),
    "a class": ("return Split", "returned a type"),
    "sys.exit": ("import sys; sys.exit(0)", "mine:load"),
    "SystemExit": ("raise SystemExit", "mine:load"),
    "no samples": ("return Split.from_tensors(x[:0], y[:0])", "x is empty"),
    "labels of another length": ("return Split.from_tensors(x, y[:5])", "y is int64 [5], needed are integers [40]"),
    "labels that are floats": ("return Split.from_tensors(x, y.float())", "y is float32 [40], needed are integers"),
    "labels with gaps": ("return Split.from_tensors(x, y * 2)", "none is 1"),
    "negative labels": ("return Split.from_tensors(x, y - 1)", "labels run from -1"),
    "one class": ("return Split.from_tensors(x, y * 0)", "class"),
    "too few names of classes": ("return Split.from_tensors(x, y, classes=['a'])", "has label 1, allowed is 0 … 0"),
    "NaN": ("x[3, 1] = float('nan'); return Split.from_tensors(x, y)", "row 3 of x holds NaN"),
    "infinity": ("x[3, 1] = float('inf'); return Split.from_tensors(x, y)", "row 3 of x holds NaN or infinity"),
    "three dimensions": ("return Split.from_tensors(x[None], y)", "needed is uint8 [n, C, H, W] or float [n, D]"),
    "float images": ("return Split.from_tensors(x.reshape(40, 1, 1, 2), y)", "needed is uint8"),
    "integers as rows": ("return Split.from_tensors(x.long(), y)", "needed is uint8 [n, C, H, W] or float"),
    "lists": ("return Split.from_tensors(x.tolist(), y.tolist())", "x is"),
    "an unknown augmentation": ("return Split.from_tensors(x, y, augment=('flop',))", "unknown augmentation 'flop'"),
    "splits of other shapes": (
        "return Split.from_tensors(x if split == 'train' else x[:, :1], y)",
        "the splits differ in shape: train has (2,), test has (1,)",
    ),
    "splits of other classes": (
        "return Split.from_tensors(x, y, classes=[split + 'a', split + 'b'])",
        "the splits differ in classes",
    ),
    "no test": ("return Split.from_tensors(x, y) if split == 'train' else None", "returned a NoneType"),
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
        "def load(): ...": "mine:load",
        "def load(root): ...": "must take a keyword split",
        "def load(root, split): ...": "mine:load",
        "def load(*, split): ...": "mine:load",
        "def load(root, *, split, size): ...": "option 'size' needs a type and a default",
        "def load(root, *, split, size: int): ...": "option 'size' needs a type and a default",
        "def load(root, *, split, size: int = 'x'): ...": "size",
        "def load(root, *, split, **others): ...": "mine:load",
        "def load(root, *, split): yield 3": "returned a generator",
        "load = 3": "is a int, not a function",
        "class load: ...": "mine:load",
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
        "mine": "unknown hook 'mine'",
        "mine:": "unknown hook or module 'mine:'",
        "mine:Nope": "module 'mine' has no 'Nope'",
        "mine:gives_none": "gave an object of type NoneType, not a raypkg.Hook",
        "mine:gives_three": "gave an object of type int, not a raypkg.Hook",
        "mine:NoHook": "gave an object of type NoHook, not a raypkg.Hook",
        "mine:Needs": "needs 'thing', which nobody gives",
        "mine:Leaves": "results() returned a int, not raypkg.engine.hooks.Results",
        "mine:sys": "is a module, not a function",
        "crest,sparse,crest": "hook 'crest' is named twice",
        "mine:Options,mine:Options": "hook 'mine:Options' is named twice",
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
        "nope": "module 'mine' has no 'nope'",
        "torch": "is a module, not a function",
        "none": "'mine:none' must return a Coreset",
        "indices": "'mine:indices' must return a Coreset",
        "too_many": "'mine:too_many' must return a Coreset",
        "twice": "0",
        "outside": "mine:outside",
        "negative": "weight -1",
        "nan": "weight nan",
        "nothing": "mine:nothing",
        "wants": "mine:wants",
    },
    make=lambda folder, _: (folder / "mine.py").write_text(METHOD),
)

SPACES = cases(
    "a space",
    "tune crest --space mine.py",
    {
        "": "defines no space",
        "def space(:": "raises SyntaxError",
        "space = 3\nMETRIC, MODE = 'accuracy', 'max'": "raises TypeError",
        "def space(): return None\nMETRIC, MODE = 'accuracy', 'max'": "raises TypeError",
        "def space(): return [1]\nMETRIC, MODE = 'accuracy', 'max'": "raises TypeError",
        "def space(x): return {}\nMETRIC, MODE = 'accuracy', 'max'": "raises TypeError",
        "def space(): return {}\nMETRIC, MODE = 'accuracy', 'max'": "there is nothing to vary",
        "def space(): return {}\nMETRIC, MODE = 'nope', 'max'": "unknown metric 'nope'",
        "def space(): return {}\nMETRIC, MODE = 'accuracy', 'most'": "unknown mode 'most'",
        "def space(): return {}\nMETRIC = 'accuracy'": "defines no MODE",
        "import os; os.chdir('nowhere')": "raises FileNotFoundError",
        "import sys; sys.exit(3)": "raises SystemExit",
        "def space(): return space()\nMETRIC, MODE = 'accuracy', 'max'": "raises RecursionError",
        "x = " + "[" * 5000: "raises",
        "no text": (b"\xff\xfe\x00", "cannot read the space 'mine.py'"),
        "zero bytes": (b"\0\0", "mine.py"),
    },
    into="mine.py",
)

DOMAINS = cases(
    "a domain of a space",
    "tune crest --space mine.py",
    {
        "'budget': tune.choice([0.1, 'x'])": "budget = 'x'",
        "'budget': tune.choice([None, 0.1])": "budget",
        "'budget': tune.choice([float('nan'), 0.1])": "budget",
        "'budget': tune.choice([[0.1]])": "budget",
        "'budget': tune.loguniform(0, 1)": "raises ValueError: LogUniform",
        "'budget': tune.uniform(0.1, float('inf'))": "raises ValueError: Uniform",
        "'budget': lambda: 0.1": "budget",
        "'budget': object()": "budget",
        "'': tune.choice([1, 2])": "unknown setting ''",
        "'.': tune.choice([1, 2])": "unknown setting",
        "'crest': tune.choice([1, 2])": "crest",
        "'crest.': tune.choice([1, 2])": "unknown setting",
        "'train.lr.x': tune.choice([1, 2])": "train.lr",
        "'name': tune.choice(['a', 'b'])": "unknown setting 'name'",
        "'root': tune.choice(['a', 'b'])": "unknown setting 'root'",
        "'track.name': tune.choice([None, 'wandb'])": "track.name does not alter the result",
        "'dataset.name': tune.choice(['digits', 'digts'])": "unknown dataset 'digts'",
        "'hooks': tune.choice([['agent'], ['agnt']])": "unknown hook 'agnt'",
    },
    make=lambda folder, domains: (folder / "mine.py").write_text(
        "from ray import tune\nMETRIC, MODE = 'accuracy', 'max'\ndef space():\n    return {" + domains + "}\n"
    ),
)

SWEEPS = cases(
    "the order of a sweep",
    "{}",
    {
        "tune crest --samples 0": "--samples 0: at least 1",
        "tune crest --samples x": "'x' is not a valid integer",
        "tune crest --samples 99999999999": "--samples 99999999999",
        "tune crest --samples 99999999999 --space crest": "--samples 99999999999",
        "tune crest --concurrent -1": "--concurrent -1: at least 1",
        "tune crest --time-budget -1": "--time-budget '-1'",
        "tune crest --time-budget 1d": "--time-budget '1d'",
        "tune crest --time-budget 1e5": "--time-budget '1e5'",
        "tune crest --time-budget ٣": "--time-budget '٣'",
        "tune crest --time-budget ''": "--time-budget ''",
        "tune crest --metric ''": "unknown metric ''",
        "tune crest --mode ''": "unknown mode ''",
        "tune crest --scheduler ''": "unknown scheduler ''",
        "tune crest --search ''": "unknown search ''",
        "tune crest --search bayes": "unknown search 'bayes'",
        "tune crest --proxy 0.5": "--proxy",
        "tune crest --space ''": "unknown space ''",
        "tune crest --space nowhere.py": "there is no space file 'nowhere.py'",
        "tune crest --space runs": "unknown space 'runs'",
        "tune crest --space ../crest": "unknown space '../crest'",
        "tune crest --config nowhere.toml": "nowhere.toml",
        "tune crest --config rows.csv": "rows.csv",
        "tune crest --name ../x": "--name '../x'",
        "tune crest --name sweep": "sweep 'sweep' exists",
        "tune crest --name cr": "run 'cr' exists in",
        "tune crest --resume nope": "unknown sweep in … 'nope' … Allowed: sweep",
        "tune crest --resume cr": "unknown sweep in … 'cr'",
        "tune crest --resume ../crest/cr": "unknown sweep in",
        "tune lipt --resume sweep": "sweep 'sweep' is of crest, not of lipt",
        "tune crest --resume sweep --seed 3": "seed cannot change",
        "tune crest --resume sweep --concurrent 0": "--concurrent 0: at least 1",
        "tune crest --resume sweep --time-budget x": "--time-budget 'x'",
        "tune crest --root s3://": "cannot use 's3://'",
        "tune crest --root rows.csv": "rows.csv",
        "tune deltagrad --hooks agent": "hooks = agent",
        "tune sparse --density 1": "density = 1 leaves no room to grow",
        "tune train --coreset nope.parquet": "there is no coreset file … nope.parquet",
        "tune train --train.lr -1": "train.lr = '-1'",
        "tune lipt --set nope=3": "unknown setting 'nope'",
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
    dict.fromkeys(["a/b", "a:b", "a#b", "a?b", "a%b", "\\", "x" * 200], "Invalid project name"),
    environment={"WANDB_MODE": "offline"},
)

CACHES = cases(
    "EFFRAY_CACHE",
    "data table:rows.csv",
    {
        "/dev/null": "cannot build the data cache '/dev/null/",
        "/proc/x": "cannot build the data cache '/proc/x/",
        "rows.csv": "cannot build the data cache 'rows.csv/",
        "x" * 300: "cannot build the data cache",
        "loop": "cannot build the data cache 'loop/",
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
