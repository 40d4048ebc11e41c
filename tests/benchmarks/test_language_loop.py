"""effray's loop against a plain loop of PyTorch, on pretrained weights: epochs in turn, on one thread.

In samples a second of the processor, the median of each side. EFFRAY_WEIGHTS is a folder with smollm2 (SmolLM2-135M,
which trains LoRA adapters on samples of 48 tokens) and minilm (all-MiniLM-L6-v2, which learns the classes of trec).
Run with: pytest -m bench -s.
"""

import json
import os
import sys
import time
from pathlib import Path
from statistics import median

import pytest
import torch
import torch.nn.functional as F

import measured
from raypkg.data import load_data
from raypkg.data.coreset import Coreset
from raypkg.engine.loop import fit
from raypkg.engine.run import Run
from raypkg.models import build_model
from tiny_language import instructions

pytestmark = pytest.mark.bench
TURNS, BATCH = 5, 16
STEPS = {"smollm2": 2, "minilm": 20}  # a turn
SETTINGS = {"batch_size": BATCH, "optimizer": "adamw", "lr": 1e-4, "schedule": "constant", "precision": "float32"}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", STEPS)
def test_samples_a_second(kind, tmp_path, real_data):
    if "EFFRAY_WEIGHTS" not in os.environ:
        pytest.skip("EFFRAY_WEIGHTS names no folder of pretrained weights")
    found = measured.in_fresh_process(__file__, kind, os.environ["EFFRAY_WEIGHTS"], real_data, tmp_path)
    print("\n{kind}: {plain:.2f} samples a second in a plain loop, {ours:.2f} in effray's: {ratio:.3f}".format(**found))


def in_turn(kind, weights, real_data, folder):
    torch.set_num_threads(1)
    model, split, loss_of = (language if kind == "smollm2" else texts)(Path(weights, kind), real_data, folder)
    n = STEPS[kind] * BATCH
    run = Run.simple(model, split, coreset=Coreset.uniform(torch.arange(n)), epochs=1000, **SETTINGS)
    network, *_ = loss_of
    optimizer = torch.optim.AdamW([w for w in network.parameters() if w.requires_grad], 1e-4, fused=True)
    seconds = {"plain": [], "ours": []}
    for turn in range(TURNS + 1):
        begun = time.process_time()
        for indices in torch.randperm(n).split(BATCH):
            optimizer.zero_grad()
            loss_of[1](*split.batch(indices)).backward()
            optimizer.step()
        seconds["plain"].append(time.process_time() - begun)
        begun = time.process_time()
        run.last = turn + 1
        fit(run)
        seconds["ours"].append(time.process_time() - begun)
    plain, ours = (n / median(each[1:]) for each in seconds.values())  # the first turn warms up
    return {"kind": kind, "plain": plain, "ours": ours, "ratio": ours / plain}


def language(weights, real_data, folder):
    """Return effray's model, its samples, and transformers' own model with its loss of labels outside the prompt."""
    import peft
    import transformers

    options = {"tokenizer": str(weights), "length": 48}
    split = load_data(f"instructions:{instructions(folder, 50)}", options, cache=Path(folder, "cache")).train
    model = build_model(f"transformers-lm:{weights}", split.shape, 2, seed=0, options={"rank": 8})
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    network = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(weights), config).train()

    def loss(x, _):
        there = x[:, 0] >= 0
        labels = torch.where(x[:, 1] == 1, x[:, 0], -100)
        return network(input_ids=x[:, 0].clamp_min(0), attention_mask=there.long(), labels=labels).loss

    return model, split, (network, loss)


def texts(weights, real_data, folder):
    """Return effray's classifier, the questions of trec, and transformers' own classifier with its loss."""
    import transformers

    options = {"tokenizer": str(weights)}
    split = load_data(f"text:{real_data}/text/trec", options, cache=Path(folder, "cache")).train
    model = build_model(f"transformers:{weights}", split.shape, split.num_classes, seed=0)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(weights, num_labels=split.num_classes)
    network.train()

    def loss(x, y):
        there = x[:, 0] >= 0
        inputs = {"attention_mask": there.long(), "token_type_ids": x[:, 1].clamp_min(0)}
        return F.cross_entropy(network(input_ids=x[:, 0].clamp_min(0), **inputs).logits, y)

    return model, split, (network, loss)


if __name__ == "__main__":
    print(json.dumps(in_turn(*sys.argv[1:])))
