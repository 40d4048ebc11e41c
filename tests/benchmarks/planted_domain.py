"""Picks and fine-tuning for a target domain that is planted in a mixture: random, RDS+, LESS and all samples.

    python tests/benchmarks/planted_domain.py --model transformers-lm:FOLDER --texts path/to/text

The pool holds questions with their kind (TREC), pairs of sentences with their relation (SICK), and sums of two numbers,
in equal parts. The target is 20 further questions; the loss is that of 100 held-out ones. All methods train for the
same number of steps. Two rows of random picks spend the passes of RDS+'s and LESS's selections on more steps.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch import Tensor

from raypkg import Coreset, Hook, Run, Split, build_model, evaluate, fit, language, load_data
from raypkg.coresets.record import Rows
from raypkg.coresets.rules.scores import less, rds_plus
from raypkg.methods.language.api import Moments, Projection, moments_of, over_checkpoints
from raypkg.studies.outcomes import half_interval

KINDS = ("abbreviation", "entity", "description", "person", "place", "number")  # TREC's labels 0 to 5
RELATIONS = ("entailment", "neutral", "contradiction")  # SICK's
DOMAINS = ("trec", "sick", "arithmetic")
TARGET = "trec"
LENGTH = 48
BATCH = 8
ROWS_AT_ONCE = 50
WARM_UP = 2  # epochs on a random part, a checkpoint each; the paper has 4


def sample(source: str, prompt: str, answer: str) -> dict:
    """Return an instruction as a chat without a system's message of its own."""
    chat = [("system", ""), ("user", prompt), ("assistant", answer)]
    return {"messages": [{"role": role, "content": content} for role, content in chat], "source": source}


def domain(texts: Path, name: str, split: str, count: int, rng: random.Random) -> list[dict]:
    """Draw short samples of a domain."""
    if name == "arithmetic":
        numbers = [(rng.randrange(100), rng.randrange(100)) for _ in range(count)]
        return [sample(name, f"What is {a} plus {b}?", str(a + b)) for a, b in numbers]
    rows = pq.read_table(texts / name / f"{split}-00000-of-00001.parquet").to_pylist()
    rng.shuffle(rows)
    if name == "trec":
        asked = [(row["text"], KINDS[row["label"]]) for row in rows if len(row["text"].split()) <= 12]
        return [sample(name, f"What does this ask for? {text}", kind) for text, kind in asked[:count]]
    pairs = [(row["premise"], row["hypothesis"], RELATIONS[row["label"]]) for row in rows]
    short = [each for each in pairs if len((each[0] + each[1]).split()) <= 14]
    return [sample(name, f"How are these related? {first}. {second}.", label) for first, second, label in short[:count]]


def write(folder: Path, train: list[dict], test: list[dict]) -> Path:
    """Write a data set of the source ``instructions``."""
    folder.mkdir()
    for split, rows in (("train", train), ("test", test)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@dataclass
class Case:
    """Pool, target and settings of all methods."""

    folder: Path
    model: str
    options: dict
    fraction: float
    epochs: int
    width: int
    pool: Split = field(init=False)
    target: Split = field(init=False)
    held_out: Split = field(init=False)

    def __post_init__(self):
        opened = {"tokenizer": self.model.partition(":")[2], "length": LENGTH}
        data = load_data(f"instructions:{self.folder / 'pool'}", opened)
        self.pool, self.held_out = data.train, data.test
        self.target = load_data(f"instructions:{self.folder / 'target'}", opened).train

    @property
    def budget(self) -> int:
        return round(self.fraction * len(self.pool))

    def build(self, seed: int):
        shape = self.pool.shape
        return build_model(self.model, shape, self.pool.num_classes, seed=seed, options=self.options)

    def settings(self, epochs: int) -> dict:
        rate = {"optimizer": "adamw", "lr": 1e-3, "schedule": "linear", "warmup": 0.1, "weight_decay": 0.0}
        return {**rate, "epochs": epochs, "batch_size": BATCH, "precision": "float32", "evaluate_every_epochs": 0}


class KeepMoments(Hook):
    """Keeps adapters, moments and mean rate at the end of every epoch of the warm-up, for LESS."""

    def __init__(self):
        self.checkpoints = []
        self.rates = []

    def on_step(self, run):
        self.rates.append(run.optimizer.param_groups[0]["lr"])

    def on_epoch_end(self, run):
        state = {name: value.clone() for name, value in run.model.state_dict().items()}
        self.checkpoints.append((state, moments_of(run.model, run.optimizer), statistics.mean(self.rates)))
        self.rates = []


def batches(split: Split) -> list[Tensor]:
    return [split.batch(part)[0] for part in torch.arange(len(split)).split(ROWS_AT_ONCE)]


def rds_plus_picks(case: Case, seed: int) -> Coreset:
    model = case.build(seed)
    pool, target = (Rows(language.state_rows(model, batches(split))) for split in (case.pool, case.target))
    return rds_plus(pool, case.budget, target=target)


def less_picks(case: Case, seed: int, by_kind: bool = False, models: int = 1) -> Coreset:
    """Pick by LESS; several models of disjoint shards are merged once into one checkpoint, as with `warmup.by lipt`."""
    some = torch.randperm(len(case.pool), generator=torch.Generator().manual_seed(seed))[: case.budget]
    warmed = []
    for number, shard in enumerate(some.tensor_split(models)):
        kept = KeepMoments()
        warm = {"coreset": Coreset.uniform(shard.sort().values), "seed": seed + 100 * number, "hooks": [kept]}
        fit(Run.simple(case.build(seed), case.pool, **warm, **case.settings(WARM_UP)))
        warmed.append(kept.checkpoints)
    checkpoints = warmed[0] if models == 1 else [averaged([each[-1] for each in warmed])]
    pool, target = [], []
    model = case.build(seed)
    projection = Projection(seed, case.width)
    for state, moments, _ in checkpoints:
        model.load_state_dict(state)
        pool.append(language.less_rows(model, batches(case.pool), projection, moments))
        target.append(language.less_rows(model, batches(case.target), projection))
    rates = [rate for *_, rate in checkpoints]
    aim = Rows(over_checkpoints(target, rates), case.target.y if by_kind else None)
    return less(Rows(over_checkpoints(pool, rates)), case.budget, target=aim)


def averaged(checkpoints: list[tuple]) -> tuple:
    """Return one checkpoint with the mean weights and moments of several."""
    states, moments, rates = zip(*checkpoints, strict=True)
    state = dict(states[0])  # the base's weights and digest are equal
    state |= {name: torch.stack([each[name] for each in states]).mean(0) for name in moments[0]}
    means = {
        name: Moments(*(torch.stack(each).mean(0) for each in zip(*(own[name] for own in moments), strict=True)))
        for name in moments[0]
    }
    return state, means, statistics.mean(rates)


def random_picks(case: Case, seed: int) -> Coreset:
    order = torch.randperm(len(case.pool), generator=torch.Generator().manual_seed(1000 + seed))
    return Coreset.uniform(order[: case.budget].sort().values)


def all_picks(case: Case, seed: int) -> Coreset:
    return Coreset.uniform(torch.arange(len(case.pool)))


PICKS = {
    "random": random_picks,
    "rds_plus": rds_plus_picks,
    "less": less_picks,
    "less by kind": partial(less_picks, by_kind=True),
    "less, warm-up by lipt": partial(less_picks, models=4),
    "all": all_picks,
    "random, work of rds_plus": random_picks,
    "random, work of less": random_picks,
}


def passes(case: Case, method: str) -> float:
    """Samples that the fine-tuning and, for "work of", a selection passes forward and backward; forward is a third."""
    rows = len(case.pool) + len(case.target)
    selection = {"rds_plus": rows / 3, "less": WARM_UP * (case.budget + rows)}
    return case.epochs * case.budget + selection.get(method.partition(", work of ")[2], 0)


def measure(case: Case, method: str, seed: int) -> dict:
    """Select, fine-tune for equally many steps, and evaluate on the target's domain."""
    started = time.perf_counter()
    picks = PICKS[method](case, seed)
    seconds = time.perf_counter() - started
    share = float((case.pool.y[picks.indices] == case.pool.classes.index(TARGET)).double().mean())
    words = case.pool.batch(picks.indices)[0]
    answers = {tuple(x[0][x[1] == 1].tolist()) for x in words}
    model = case.build(seed)
    run = Run.simple(model, case.pool, coreset=picks, seed=seed, **case.settings(case.epochs))
    run.length = passes(case, method) / len(picks)
    fit(run)
    result = evaluate(run.model, case.held_out, precision="float32")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "method": method,
        "seed": seed,
        "share": share,
        "answers": len(answers),
        "select_s": seconds,
        "steps": run.step,
        "MiB": peak,
        **result,
    }


def in_process(given: argparse.Namespace, method: str, seed: int) -> dict:
    """Measure in a process of its own: the peak of memory is that of one method."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", f"{seed},{method}", "--folder", str(given.folder)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--each", type=int, default=200, help="samples of a domain in the pool")
    parser.add_argument("--fraction", type=float, default=0.05)
    parser.add_argument("--epochs", type=int, default=8, help="passes over the picks")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--width", type=int, default=2048, help="of LESS's projection")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=PICKS, default=[*PICKS])
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.folder:
        given.folder = Path(tempfile.mkdtemp())
        rng = random.Random(0)
        pool = [each for name in DOMAINS for each in domain(given.texts, name, "train", given.each, rng)]
        rng.shuffle(pool)
        questions = domain(given.texts, TARGET, "test", 120, rng)
        write(given.folder / "pool", pool, questions[20:])
        target = [{**each, "source": each["messages"][-1]["content"]} for each in questions[:20]]  # a task per kind
        write(given.folder / "target", target, target)
    case = Case(given.folder, given.model, {"rank": given.rank}, given.fraction, given.epochs, given.width)
    if given.only:
        seed, method = given.only.split(",", 1)
        print(json.dumps(measure(case, method, int(seed))))
        return
    before = evaluate(case.build(0), case.held_out, precision="float32")
    print(f"pool {len(case.pool)}, budget {case.budget}; before training: {before}", flush=True)
    results = []
    for seed in range(given.seeds):
        for method in given.methods:
            results.append(in_process(given, method, seed))
            print(results[-1], flush=True)
    table(results)


def table(results: list[dict]) -> None:
    """Print a line per method, with the paired difference of its loss from that of random picks, the first method."""
    methods = dict.fromkeys(each["method"] for each in results)
    losses = {name: [each["loss"] for each in results if each["method"] == name] for name in methods}
    print("| method | of the domain | answers | loss on the target | against random | verdict | accuracy | s | MiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in methods:
        of_it = [each for each in results if each["method"] == name]
        share, answers, accuracy, seconds, peak = (
            statistics.mean(each[key] for each in of_it) for key in ("share", "answers", "accuracy", "select_s", "MiB")
        )
        differences = [a - b for a, b in zip(losses[name], losses["random"], strict=True)]
        mean, half = statistics.mean(differences), half_interval(differences, len(methods) - 1)
        verdict = "paid" if mean < -half else "did not pay" if mean > half else "unknown"
        loss = f"{statistics.mean(losses[name]):.3f} ± {statistics.stdev(losses[name]):.3f}"
        found = f"{mean:+.3f} ± {half:.3f} | {verdict} | {accuracy:.1%} | {seconds:.0f} | {peak:.0f}"
        print(f"| {name} | {share:.0%} | {answers:.0f} | {loss} | {found} |")


if __name__ == "__main__":
    main()
