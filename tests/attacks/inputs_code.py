"""Bad input in code: a user's models, data sets, hooks, rules and spaces; and in the environment."""

from attacks.cases import cases

MODULES = {
    "my": """
import sys, torch
from torch import nn
from raypkg import Hook, Split

def flat(shape, num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
def frozen(shape, num_classes): return flat(shape, num_classes).requires_grad_(False)
def exits(shape, num_classes): sys.exit(3)
def load(root, *, split): raise SystemExit("no data today")
def rows(root, *, split): return Split.from_tensors(torch.arange(80.0).reshape(40, 2), torch.arange(40) % 2)
def convolution(shape, num_classes): return nn.Conv2d(1, 1, 1)
def rule(view, budget): sys.exit(1)
def shares(shape, num_classes, *, width: int = 3): return flat(shape, num_classes)
class Later(nn.Sequential):
    calls = 0
    def forward(self, x):
        self.calls += 1
        return quit() if self.calls > 5 else super().forward(x)
def later(shape, num_classes): return Later(*flat(shape, num_classes))
class Leaves(Hook):
    def on_step(self, run): sys.exit()
""",
    "missing": "import nowhere",
    "broken": "def (:",
}


def write_modules(folder, _):
    for name, code in MODULES.items():
        (folder / f"{name}.py").write_text(code)


MODELS = cases(
    "a model of the user's",
    "train --model={} --train.epochs 1",
    {
        "my:nope": "module 'my' has no 'nope'",
        "my:": "unknown model or module 'my:'",
        "my:exits": "my.py, line 8, in exits: SystemExit: 3",
        "my:later": "my.py, line 18, in forward: SystemExit: None",
        "my:frozen": "has no parameter to train: it has none at all, or all of them are frozen",
        "my flat": "unknown model 'my flat'",
        "antigravitation:fly": "unknown model or module",
        "missing:build": "module needs 'nowhere', which is not installed",
        "broken:build": "'broken:build': its module is not valid Python",
    },
    make=write_modules,
)

OTHER_CODE = cases(
    "code of the user's",
    "{}",
    {
        "train --model my:shares --set model.options.with=3": "unknown my:shares option 'with', did you mean 'width'",
        "train --dataset my:load": "my.py, line 9, in load: SystemExit: no data today",
        "train --model linear --hooks my:Leaves": "my.py, line 21, in on_step: SystemExit",
        "train --model linear --select.rule my:rule --select.fraction 0.5": "my.py, line 12, in rule: SystemExit: 1",
        "train --model my:convolution": "'my:convolution' maps inputs",
        "train --dataset my:rows": "input shape (2,): this model takes images … use 'mlp' or 'linear'",
    },
    make=write_modules,
)

LOADERS = {
    "None": ("return None", "returned a NoneType, not a raypkg.data.split.Split"),
    "sys.exit": ("import sys; sys.exit(0)", "mine.py, line 7, in load: SystemExit: 0"),
    "one class": ("return Split.from_tensors(x, y * 0)", "class"),
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

HOOK = """
def gives_none(): return None
class NoHook: ...
"""
HOOKS = cases(
    "a hook of the user's",
    "train --model linear --train.epochs 1 --hooks={}",
    {
        "mine:gives_none": "gave an object of type NoneType, not a raypkg.Hook",
        "mine:NoHook": "gave an object of type NoHook, not a raypkg.Hook",
    },
    make=lambda folder, _: (folder / "mine.py").write_text(HOOK),
    leaves=("runs/train", "runs/train/digits-*"),
)


TRACKED = "train --model linear --train.epochs 1 --track wandb"
UNREACHABLE = {"WANDB_BASE_URL": "http://127.0.0.1:1", "WANDB_INIT_TIMEOUT": "1"}
MODES = cases(
    "WANDB_MODE",
    TRACKED,
    {"nonsense": "WANDB_MODE", "ONLINE ": "WANDB_MODE", "online": "W&B: No API key configured. Use `wandb login`"},
    variable="WANDB_MODE",
    environment=UNREACHABLE,
)
KEYS = cases(
    "WANDB_API_KEY",
    TRACKED,
    {
        "short": "W&B: WANDB_API_KEY invalid: API key must have 40 … WANDB_MODE=offline",
        "0123456789" * 4: "W&B: … connection refused; see `wandb login`, or go without a server by",
    },
    variable="WANDB_API_KEY",
    environment=UNREACHABLE,
    leaves=(".cache*",),  # W&B's own logs
)
TIMEOUTS = cases(
    "WANDB_INIT_TIMEOUT",
    TRACKED,
    {"soon": "W&B: WANDB_INIT_TIMEOUT = 'soon': Input should be a valid number"},
    variable="WANDB_INIT_TIMEOUT",
)
PROJECTS = cases(
    "the project of W&B",
    f"{TRACKED} --track.project {{}}",
    dict.fromkeys(["a/b", "x" * 200], "Invalid project name"),
    environment={"WANDB_MODE": "offline"},
)

CACHES = cases(
    "EFFRAY_CACHE",
    "data table:rows.csv",
    {"/dev/null": "cannot build the data cache '/dev/null/"},
    variable="EFFRAY_CACHE",
)
