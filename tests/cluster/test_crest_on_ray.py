"""CREST on Ray: the same trajectory for any number of workers."""

import pyarrow.parquet as pq

from ray_runs import run, same_weights
from tiny_language import instructions, tiny_language

PLAIN = [
    "--model", "mlp", "--train.precision", "float32", "--train.batch_size", "64", "--train.epochs", "10",
    "--budget", "0.3", "--crest.subset", "0.1",
]  # fmt: skip
MODEL = ("--preset", "fast", "--crest.tau", "0.1", "--crest.h", "3")
EACH_STEP = ("--preset", "each-step")


def crest(root, name, *options, model=MODEL):
    return run(root, "crest", name, *PLAIN, *model, *options)


def same(a, b, tolerance):
    """Compare weights to the tolerance, ρ to ten times that, and picks exactly."""
    same_weights(a, b, tolerance)
    checks = [pq.read_table(folder / "crest.parquet").to_pandas() for folder in (a, b)]
    assert checks[0].step.equals(checks[1].step)
    assert (checks[0].rho - checks[1].rho).abs().max() <= 10 * tolerance
    picks = [pq.read_table(folder / "minibatches.parquet") for folder in (a, b)]
    assert picks[0].equals(picks[1])


def test_two_workers_choose_and_train_as_one_process(ray, tmp_path):
    alone = crest(tmp_path, "alone", "--cluster.workers", "0")
    same(alone, crest(tmp_path, "others", "--cluster.workers", "2"), tolerance=1e-4)


def test_without_a_local_model_too(ray, tmp_path):
    alone = crest(tmp_path, "alone", "--cluster.workers", "0", model=EACH_STEP)
    others = crest(tmp_path, "others", "--cluster.workers", "2", model=EACH_STEP)
    same_weights(alone, others, tolerance=1e-4)
    # Of two medoids with equal gain, either may come first: a step's samples are the same.
    by_step = [("update", "ascending"), ("index", "ascending")]
    picks = [pq.read_table(folder / "minibatches.parquet").sort_by(by_step) for folder in (alone, others)]
    assert picks[0].equals(picks[1])


def test_two_workers_choose_for_a_language_model_as_one_process(ray, tmp_path):
    # By exact gradients: the estimate's difference of two losses magnifies the rounding of weights by 1/2ε.
    model, data = tiny_language(tmp_path / "lm"), instructions(tmp_path, 60)
    options = [
        "--preset", "colm", "--crest.gradient", "exact",
        "--dataset", f"instructions:{data}", "--set", "dataset.options.length=64",
        "--model", f"transformers-lm:{model}", "--train.precision", "float32",
        "--train.batch_size", "6", "--train.epochs", "4", "--budget", "0.5", "--train.lr", "1e-3",
    ]  # fmt: skip
    alone = run(tmp_path, "crest", "alone", *options, "--cluster.workers", "0")
    others = run(tmp_path, "crest", "others", *options, "--cluster.workers", "2")
    same_weights(alone, others, tolerance=1e-6)  # not the picks: some samples are equal, and either may be taken
