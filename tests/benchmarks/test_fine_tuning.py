"""Fine-tuning a model of Hugging Face: effray against a plain loop around the same network. pytest -m bench -s."""

import statistics

import pytest
import torch
import torch.nn.functional as F

from plain_loop import Clock
from raypkg.core.settings import Training
from raypkg.data.split import Split
from raypkg.data.tokenizer import padded
from raypkg.engine.loop import fit
from raypkg.engine.run import Run
from raypkg.models import build_model

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.bench, pytest.mark.timeout(900)]
SHAPE, CLASSES, BATCH, SAMPLES, ROUNDS = (64, 8192), 3, 32, 960, 7
SETTINGS = Training(
    epochs=1, batch_size=BATCH, optimizer="adamw", lr=2e-5, momentum=0.9, weight_decay=0.01, precision="float32"
)


def texts():
    """Return tokens and segments of texts of 10 to 40 tokens, [l, 2] each, and labels."""
    draws = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 41, (SAMPLES,), generator=draws).tolist()
    tokens = [torch.randint(SHAPE[1], (length, 2), generator=draws) for length in lengths]
    for each in tokens:
        each[:, 1] = torch.arange(len(each)) >= len(each) // 2
    return [each.numpy() for each in tokens], torch.arange(SAMPLES) % CLASSES


def network(folder):
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder).train()


def plain(folder, tokens, y):
    """Train an epoch as a user of the package does."""
    model = network(folder)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-5, weight_decay=0.01, fused=True)
    clock = Clock()
    for picked in torch.randperm(SAMPLES).split(BATCH):
        longest = max(len(tokens[i]) for i in picked)
        inputs = torch.zeros(3, len(picked), longest, dtype=torch.int64)  # ids, segments, mask
        for row, i in enumerate(picked.tolist()):
            length = len(tokens[i])
            inputs[:2, row, :length] = torch.from_numpy(tokens[i]).T
            inputs[2, row, :length] = 1
        ids, segments, mask = inputs
        logits = model(input_ids=ids, token_type_ids=segments, attention_mask=mask).logits
        loss = F.cross_entropy(logits, y[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return clock.seconds()


def ours(folder, tokens, y):
    """Train an epoch with effray."""
    split = Split(
        take=lambda rows: padded([tokens[i] for i in rows]),
        y=y,
        classes=("0", "1", "2"),
        shape=SHAPE,
        mean=(),
        std=(),
    )
    model = build_model(f"transformers:{folder}", SHAPE, CLASSES, seed=0)
    run = Run.simple(model, split, SETTINGS)
    clock = Clock()
    fit(run)
    return clock.seconds()


def test_an_epoch_of_fine_tuning_against_a_plain_loop(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=SHAPE[1], hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024
    )
    config.num_labels = CLASSES
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokens, y = texts()
    pairs = [(plain(tmp_path, tokens, y), ours(tmp_path, tokens, y)) for _ in range(ROUNDS + 1)][1:]
    print(f"\nBERT of 4 layers and width 256, float32, batch {BATCH}, medians of {ROUNDS} epochs each in turn")
    for kind in ("wall", "processor"):
        ratios = [theirs[kind] / mine[kind] for theirs, mine in pairs]
        rates = [statistics.median(SAMPLES / pair[side][kind] for pair in pairs) for side in (0, 1)]
        print(f"  samples per second of the {kind}: plain {rates[0]:.0f}, effray {rates[1]:.0f}", end="")
        print(f", ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
