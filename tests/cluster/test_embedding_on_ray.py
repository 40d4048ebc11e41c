"""Features computed by actors: the same bytes whoever computes them, also where one is killed."""

from pathlib import Path

import pyarrow.parquet as pq

from ray_runs import run
from run_files import files

EMBED = ["--model", "resnet8", "--draws", "2", "--precision", "float32", "--rows-per-part", "100"]


def tables(folder: Path) -> list[bytes]:
    return [(folder / f"{split}.parquet").read_bytes() for split in ("train", "test")]


def test_no_one_and_two_actors_leave_the_same_bytes(ray, tmp_path):
    here, one, two = (run(tmp_path, "embed", count, *EMBED, "--cluster.workers", count) for count in ("0", "1", "2"))
    assert tables(here) == tables(one) == tables(two)
    assert pq.read_table(here / "train.parquet").num_rows == 2 * 1437


def test_an_actor_that_is_killed_goes_on_with_its_share(ray, tmp_path):
    dataset = ["--dataset", "sabotage:load_and_kill_actor", "--set"]
    given = [*EMBED, *dataset, f"dataset.options.marker={tmp_path / 'marker'}", "--cluster.workers", "2"]
    killed = run(tmp_path, "embed", "killed", *given)
    assert (tmp_path / "marker").exists()
    undisturbed = run(tmp_path, "embed", "undisturbed", *given)
    assert tables(killed) == tables(undisturbed)
    bills = [files(folder)["summary.json"]["phases"] for folder in (killed, undisturbed)]
    assert bills[0] == bills[1]
