"""Picks and fine-tuning for a target domain that is planted in a mixture: random, RDS+, LESS and all samples.

    EFFRAY_LM=FOLDER PYTHONPATH=tests/benchmarks effray compare tests/benchmarks/planted_domain.py

The pool holds questions with their kind (TREC), pairs of sentences with their relation (SICK), and sums of two numbers,
in equal parts. The target is 20 further questions; the loss is that of 100 held-out ones. All methods train for the
same number of steps. Two rows of random picks spend the passes of RDS+'s and LESS's selections on more steps.
EFFRAY_DATA is the folder with the texts trec and sick; ``planted`` in the working folder receives the samples.
"""

import json
import os
import random
from pathlib import Path

import pyarrow.parquet as pq
import torch

from raypkg.core.config import load_settings
from raypkg.core.settings import RunSettings
from raypkg.experiments.coreset_files import picks_of
from raypkg.experiments.samples import open_samples
from raypkg.studies.tables import Table

DATA = Path(os.environ.get("EFFRAY_DATA", Path(__file__).resolve().parents[3] / "shared/data")) / "text"
KINDS = ("abbreviation", "entity", "description", "person", "place", "number")  # TREC's labels 0 to 5
RELATIONS = ("entailment", "neutral", "contradiction")  # SICK's
DOMAINS = ("trec", "sick", "arithmetic")
TARGET = "trec"
EACH, FRACTION, EPOCHS, WARM_UP = 200, 0.05, 8, 2  # the paper warms up for 4 epochs
LENGTH = 48


def sample(source: str, prompt: str, answer: str) -> dict:
    """Return an instruction as a chat without a system's message of its own."""
    chat = [("system", ""), ("user", prompt), ("assistant", answer)]
    return {"messages": [{"role": role, "content": content} for role, content in chat], "source": source}


def domain(name: str, split: str, count: int, rng: random.Random) -> list[dict]:
    """Draw short samples of a domain."""
    if name == "arithmetic":
        numbers = [(rng.randrange(100), rng.randrange(100)) for _ in range(count)]
        return [sample(name, f"What is {a} plus {b}?", str(a + b)) for a, b in numbers]
    rows = pq.read_table(DATA / name / f"{split}-00000-of-00001.parquet").to_pylist()
    rng.shuffle(rows)
    if name == "trec":
        asked = [(row["text"], KINDS[row["label"]]) for row in rows if len(row["text"].split()) <= 12]
        return [sample(name, f"What does this ask for? {text}", kind) for text, kind in asked[:count]]
    pairs = [(row["premise"], row["hypothesis"], RELATIONS[row["label"]]) for row in rows]
    short = [each for each in pairs if len((each[0] + each[1]).split()) <= 14]
    return [sample(name, f"How are these related? {first}. {second}.", label) for first, second, label in short[:count]]


def write(folder: Path) -> None:
    """Write the pool, and the target as one task and as a task for each kind of answer."""
    rng = random.Random(0)
    pool = [each for name in DOMAINS for each in domain(name, "train", EACH, rng)]
    rng.shuffle(pool)
    few, held_out = (questions := domain(TARGET, "test", 120, rng))[:20], questions[20:]
    kinds = [{**each, "source": each["messages"][-1]["content"]} for each in few]
    for name, train, test in (("pool", pool, held_out), ("target", few, few), ("kinds", kinds, kinds)):
        (folder / name).mkdir(parents=True)
        for split, rows in (("train", train), ("test", test)):
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def of_the_domain(run) -> dict[str, float]:
    """Return the share of a finished run's picks that are of the target's domain, and their different answers."""
    settings = load_settings(RunSettings, {name: run.config[name] for name in ("seed", "dataset")})
    train, picks = open_samples(settings).data.train, torch.tensor(picks_of(run))
    texts = train.batch(picks)[0]
    share = (train.y[picks] == train.classes.index(TARGET)).double().mean()
    return {"share": float(share), "answers": len({tuple(x[0][x[1] == 1].tolist()) for x in texts})}


def table(scale: str) -> Table:
    """Return rows at equal steps, and random picks at the passes of a selection, of which a forward one is a third."""
    folder = Path("planted").absolute()
    if not folder.exists():
        write(folder)
    rate = {"lr": 1e-3, "batch_size": 8}
    training = {**rate, "epochs": EPOCHS, "warmup": 0.1, "evaluate_every_epochs": 0}
    shared = {"dataset": f"instructions:{folder}/pool", "model": f"transformers-lm:{os.environ['EFFRAY_LM']}"}
    shared |= {"model.options.rank": 8, "select.fraction": FRACTION, "dataset.options.length": LENGTH}
    shared["dataset.options.tokenizer"] = os.environ["EFFRAY_LM"]
    shared |= {f"train.{name}": value for name, value in training.items()}

    def aimed(rule, target="target", **more):
        aim = {"select.target": f"instructions:{folder}/{target}", "select.target.options.length": LENGTH}
        aim["select.target.options.tokenizer"] = os.environ["EFFRAY_LM"]
        warm = {**rate, "epochs": WARM_UP, "fraction": FRACTION, "warmup": 0.1, **more} if rule == "less" else {}
        width = {"rows.width": 2048} if warm else {}
        return {"select.rule": rule, **aim, **width, **{f"warmup.{name}": value for name, value in warm.items()}}

    passes = (3 * EACH + 20) / (FRACTION * 3 * EACH)  # of all rows, in those of an epoch on the picks
    rows = {
        "random": {"select.rule": "random"},
        "rds_plus": aimed("rds_plus"),
        "less": aimed("less"),
        "less by kind": aimed("less", "kinds"),
        "less after lipt": aimed("less", by="lipt", models=4),
        "all": {"select.rule": "random", "select.fraction": EPOCHS * FRACTION, "train.epochs": 1},  # as many steps
        "random at rds_plus's work": {"select.rule": "random", "train.epochs": round(EPOCHS + passes / 3)},
        "random at less's work": {"select.rule": "random", "train.epochs": round(EPOCHS + WARM_UP * (1 + passes))},
    }
    return Table(
        title="Picks for a planted domain by RDS+ and LESS against random ones",
        experiment="instruct",
        baseline="random",
        shared=shared,
        rows=rows,
        metric="test_loss",
        columns={"of the domain": "share", "answers": "answers", "rows s": "rows.total_seconds"},
        after=dict.fromkeys(rows, "planted_domain:of_the_domain"),
        as_baseline=[row for row in rows if row.startswith("random at")],
    )
