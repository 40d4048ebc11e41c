"""Wrong labels found by `effray audit` on MiniLM's sentence embeddings, and their removal by DeltaGrad.

Run with: python tests/benchmarks/audit.py --minilm FOLDER --texts FOLDER --root FOLDER [--seeds 0 1 2]. The folder of
texts has trec and sst2; embeddings that are below the root already are not computed again.
"""

import argparse
import io
import json
import re
import shutil
import statistics
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import nn

from raypkg.cli import main

SETS = ("trec", "sst2")
VERDICT = re.compile(
    r"gradients ([\d.]+) s.*a change of (\S+) predicted (\S+) by.*test accuracy\s+([\d.]+)% retrained ([\d.]+)%"
    r".*gradients ([\d.]+) s",
    re.DOTALL,
)
TRAIN = (
    "--dataset.noise 0.2 --dataset.scale standard --train.lr 0.3 --train.epochs 120 --train.weight_decay 0.1"
    " --train.evaluate_every_epochs 0"
)


class SentenceEmbedding(nn.Module):
    """The mean of the last hidden states, of length 1, as the model's card defines its embeddings."""

    def __init__(self, folder):
        super().__init__()
        from transformers import AutoModel

        self.network = AutoModel.from_pretrained(folder, add_pooling_layer=False)

    def forward(self, x):
        tokens, _ = x.unbind(1)
        there = (tokens >= 0).long()
        hidden = self.network(input_ids=tokens.clamp_min(0), attention_mask=there).last_hidden_state
        mean = (hidden * there[..., None]).sum(1) / there.sum(1, keepdim=True)
        return nn.functional.normalize(mean, dim=1)


class Embedder(nn.Module):
    def __init__(self, features, head):
        super().__init__()
        self.features, self.head = features, head

    def forward(self, x):
        return self.head(self.features(x))


def minilm(shape, num_classes, *, folder: str = ""):
    return Embedder(SentenceEmbedding(folder), nn.Linear(384, num_classes))


def effray(line):
    """Return the output of a command without workers."""
    out = io.StringIO()
    try:
        with redirect_stdout(out):
            main([*line.split(), "--cluster.workers", "0"])
    except SystemExit as ended:
        assert not ended.code, line
    return out.getvalue()


def summary(root, kind, name):
    return json.loads((root / kind / name / "summary.json").read_text())


def removal(root, run, count):
    """Delete the worst of the latest audit from a copy of a run; return what was predicted and what came of it."""
    copy = root.parent / "copies" / run
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(root / "deltagrad" / run, copy)
    out = effray(f"deltagrad delete {copy} --from-audit {count} --verify --root {root}")
    names = ("seconds", "actual", "predicted", "accuracy", "retrained", "retraining seconds")
    return dict(zip(names, map(float, VERDICT.search(out.replace(",", "")).groups()), strict=True))


def measure(root, texts, minilm_folder, name, seed):
    rows, run = f"{name}_pooled", f"{name}-{seed}"
    if not (root / "embed" / rows / "summary.json").exists():
        data = f"--dataset text:{texts / name} --set dataset.options.tokenizer={minilm_folder}"
        model = f"--model audit:minilm --set model.options.folder={minilm_folder}"
        effray(f"embed {data} {model} --name {rows} --root {root}")
    for kind in ("deltagrad", "audit"):
        for old in (root / kind).glob(f"{run}*"):
            shutil.rmtree(old)
    table = f"table:{root}/embed/{rows}"
    effray(f"deltagrad train --dataset {table} --seed {seed} --name {run} --root {root} {TRAIN}")
    figures = {"accuracy": 100 * summary(root, "deltagrad", run)["test_accuracy"]}
    for by in ("self", "influence", "loss"):
        start = time.perf_counter()
        effray(f"audit {run} --by {by} --name {run}-{by} --root {root}")
        figures[f"audit by {by}, seconds"] = time.perf_counter() - start
        if by == "influence":
            small = removal(root, run, 50)
            figures |= {f"50 by influence: {key}": small[key] for key in ("predicted", "actual", "accuracy")}
    found = summary(root, "audit", f"{run}-self")
    figures |= {key: found[key] for key in found if key.startswith("auc")}
    planted = round(found["wrong_labels"] * found["samples"])
    for part, count in (("half", planted // 2), ("all", planted)):
        figures |= {f"{part} by loss: {key}": value for key, value in removal(root, run, count).items()}
    print(f"== {run}: {json.dumps(figures)}", flush=True)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for option in ("--minilm", "--texts", "--root"):
        parser.add_argument(option, type=lambda path: Path(path).absolute(), required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chosen = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    for name in SETS:
        found = [measure(chosen.root, chosen.texts, chosen.minilm, name, seed) for seed in chosen.seeds]
        print(f"\n== {name}, seeds {chosen.seeds}")
        for key in found[0]:
            values = [each[key] for each in found]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"== {key:36} {statistics.mean(values):9.4f} ± {spread:.4f}", flush=True)
