"""CoLM's choice beside random samples, by the error of the gradient, and what it costs. Run with: pytest -m bench -s.

Needs a folder with SmolLM2-135M-Instruct (EFFRAY_LM) and the texts trec and sick (EFFRAY_DATA).
"""

import os
import statistics
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from raypkg.core.seeds import generator
from raypkg.engine.worker import threads
from raypkg.methods.crest.algorithm import CHUNK
from raypkg.methods.crest.colm import LastValues, choose, quotas
from raypkg.methods.crest.quadratic import MovingMoments
from raypkg.models.language import ATTENTION, LanguageModel, with_adapters

pytestmark = [pytest.mark.bench, pytest.mark.data]
DATA = Path(os.environ.get("EFFRAY_DATA", Path(__file__).parents[3] / "shared/data"))
FOLDER = os.environ.get("EFFRAY_LM", "")
M, R, LONGEST = 16, 32, 48
EACH = 100  # samples of a source
PLAIN, CHOSEN, DRAWS, SUBSETS, ROUNDS = 24, 10, 24, 20, 8
MIXTURES = {"equal sources": (EACH, EACH, EACH), "a small source": (EACH, EACH, 22)}
KINDS, RANDOM = ("estimate", "exact"), ("random m", "random by source")
TREC = ("abbreviation", "entity", "description", "human", "location", "number")
SICK = ("yes", "maybe", "no")


def instructions(tokenizer):
    """Return samples int64 [n, 2, l] and their sources: questions, pairs of sentences, sums."""
    trec = pq.read_table(DATA / "text/trec/train-00000-of-00001.parquet").to_pylist()
    sick = pq.read_table(DATA / "text/sick/train-00000-of-00001.parquet").to_pylist()
    rng = generator(0, "sums")
    sums = torch.randint(100, (2000, 2), generator=rng).tolist()
    sources = [
        [(f"{row['text']} Kind of answer?", TREC[row["label"]]) for row in trec],
        [(f"{row['premise']}. So {row['hypothesis']}?", SICK[row["label"]]) for row in sick],
        [(f"What is {a} + {b}?", str(a + b)) for a, b in sums],
    ]
    rows, labels = [], []
    for label, pairs in enumerate(sources):
        found = 0
        for position in torch.randperm(len(pairs), generator=rng).tolist():
            prompt, answer = pairs[position]
            asked = tokenizer.encode(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")
            told = tokenizer.encode(f"{answer}<|im_end|>")
            if len(asked) + len(told) > LONGEST or found == EACH:
                continue
            row = torch.full((2, LONGEST), -1)
            row[0, : len(asked) + len(told)] = torch.tensor(asked + told)
            row[1, : len(asked)] = 0
            row[1, len(asked) : len(asked) + len(told)] = 1
            rows.append(row)
            labels.append(label)
            found += 1
    return torch.stack(rows), torch.tensor(labels)


def trimmed(x):
    return x[:, :, : int((x[:, 0] >= 0).sum(1).max())]


def step(model, optimizer, x):
    model(trimmed(x)).losses.mean().backward()
    optimizer.step()
    optimizer.zero_grad()


class Chooser:
    """CoLM's choice with moments of its own."""

    def __init__(self, model, kind):
        self.model, self.kind, self.last = model, kind, LastValues(model)
        self.moments = MovingMoments(torch.zeros(self.last.size), torch.zeros(self.last.size))
        self.number = 0

    def __call__(self, x, sources, *, update=False):
        self.number += 1
        direction = torch.randn(self.last.size, generator=generator(0, "direction", self.number))
        parts = [self.factors(trimmed(part), direction) for part in x.split(CHUNK)]
        z = direction if self.kind == "estimate" else None
        picked, moments = choose(torch.cat(parts), z, sources, M, self.moments)
        if update:
            self.moments = moments
        return picked

    def factors(self, x, direction):
        def losses():
            return self.model(x).losses

        if self.kind == "estimate":
            return self.last.slopes(losses, direction)[1]
        return self.last.exact(losses)[1]


def all_gradients(model, x):
    """Gradients of all adapters, a backward pass per sample, [n, p]."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    rows = x.new_empty(len(x), sum(each.numel() for each in parameters), dtype=torch.float32)
    for row, sample in zip(rows, x, strict=True):
        gradients = torch.autograd.grad(model(trimmed(sample[None])).losses[0], parameters)
        torch.cat([each.flatten() for each in gradients], out=row)
    return rows


def random_by_source(sources, rng):
    """Draw as many of each source as CoLM keeps."""
    shuffled = torch.randperm(len(sources), generator=rng)
    counts, _ = quotas(sources.bincount(), M)
    return torch.cat([shuffled[sources[shuffled] == source][:count] for source, count in enumerate(counts.tolist())])


def error(estimate, target, scale):
    return float(((estimate - target) * scale).norm() / (target * scale).norm())


@pytest.mark.timeout(7200)
@pytest.mark.skipif(not FOLDER, reason="EFFRAY_LM is not set")
def test_gradient_error_and_cost_of_colm():
    import transformers

    x, sources = instructions(transformers.AutoTokenizer.from_pretrained(FOLDER))
    network = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    torch.manual_seed(0)
    model = LanguageModel(with_adapters(network, 8, 16.0, 0.0, ATTENTION))
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, 5e-4, weight_decay=0.0)
    choosers = {kind: Chooser(model, kind) for kind in KINDS}
    rng = generator(0, "draws")
    with threads(1):
        for number in range(PLAIN + CHOSEN):
            drawn = torch.randperm(len(x), generator=rng)[:R]
            if number < PLAIN:
                step(model, optimizer, x[drawn[:M]])
                continue
            picks = [chooser(x[drawn], sources[drawn], update=True) for chooser in choosers.values()]
            step(model, optimizer, x[drawn[picks[0]]])
        rows = all_gradients(model, x)
        second = torch.cat([optimizer.state[each]["exp_avg_sq"].flatten() for each in trained])
        second /= 1 - 0.999 ** (PLAIN + CHOSEN)
        scales = {"plain": torch.ones(()), "Adam": 1 / (second.sqrt() + 1e-8)}
        for name, counts in MIXTURES.items():
            members = torch.cat([(sources == s).nonzero()[:count, 0] for s, count in enumerate(counts)])
            report(name, counts, *errors(x, sources, members, rows, choosers, scales, rng))
        cost(model, optimizer, x, sources, choosers, rng)


def errors(x, sources, members, rows, choosers, scales, rng):
    """Return by (target, scale, way to choose) the errors of every draw, and how CoLM shares a batch."""
    everything = rows[members].mean(0)
    table, shares = {}, {kind: [] for kind in KINDS}
    for _ in range(DRAWS):
        drawn = members[torch.randperm(len(members), generator=rng)[:R]]
        subset = rows[drawn].mean(0)
        ways = {kind: [chooser(x[drawn], sources[drawn])] for kind, chooser in choosers.items()}
        for kind in KINDS:
            shares[kind].append(sources[drawn[ways[kind][0]]].bincount(minlength=3).tolist())
        ways["random m"] = [torch.randperm(R, generator=rng)[:M] for _ in range(SUBSETS)]
        ways["random by source"] = [random_by_source(sources[drawn], rng) for _ in range(SUBSETS)]
        ways["all r"] = [torch.arange(R)]
        for way, picks in ways.items():
            for target_name, target in (("the r samples", subset), ("all samples", everything)):
                for scale_name, scale in scales.items():
                    values = [error(rows[drawn[picked]].mean(0), target, scale) for picked in picks]
                    table.setdefault((target_name, scale_name, way), []).append(statistics.mean(values))
    return table, shares


def report(name, counts, table, shares):
    print(f"\n{name} {counts}: m = {M} of r = {R}, relative error, {DRAWS} draws (± standard deviation)")
    print(f"in brackets: draws in which a choice beats the mean of {SUBSETS} random ones, and of those by source")
    for target, scale in dict.fromkeys(key[:2] for key in table):
        baselines = [table[target, scale, way] for way in RANDOM]
        line = [f"against {target}, {scale}:"]
        for way in (*KINDS, *RANDOM, "all r"):
            values = table[target, scale, way]
            wins = [sum(a < b for a, b in zip(values, baseline, strict=True)) for baseline in baselines]
            won = f" ({wins[0]} and {wins[1]} of {DRAWS})" if way in KINDS else ""
            line.append(f"{way} {statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}{won}")
        print("  ".join(line))
    print(
        "samples of each source:", {kind: torch.tensor(each).float().mean(0).tolist() for kind, each in shares.items()}
    )


def cost(model, optimizer, x, sources, choosers, rng):
    """Print seconds of a choice beside those of a step on m, in turn."""
    seconds = {}

    def timed(name, call):
        start = time.process_time()  # other work disturbs it less than wall time
        call()
        seconds.setdefault(name, []).append(time.process_time() - start)

    for _ in range(ROUNDS):
        drawn = torch.randperm(len(x), generator=rng)[:R]
        timed(f"step on m = {M}", lambda drawn=drawn: step(model, optimizer, x[drawn[:M]]))
        timed(f"step on r = {R}", lambda drawn=drawn: step(model, optimizer, x[drawn]))
        for kind, chooser in choosers.items():
            timed(kind, lambda drawn=drawn, chooser=chooser: chooser(x[drawn], sources[drawn]))
        with torch.no_grad():
            timed("forward pass of r", lambda drawn=drawn: [model(trimmed(part)) for part in x[drawn].split(CHUNK)])
    plain = statistics.median(seconds[f"step on m = {M}"])
    print(f"\nCPU seconds, medians of {ROUNDS} rounds in turn, one thread; in steps on m")
    for name, values in seconds.items():
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"{name:<20}{statistics.median(values):7.2f} s ({spread}){statistics.median(values) / plain:7.2f}")
