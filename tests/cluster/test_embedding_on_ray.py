"""Features computed by actors: the same bytes whoever computes them, also where one is killed."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from raypkg.cli import main
from run_files import files

EMBED = ["embed", "--model", "resnet8", "--draws", "2", "--precision", "float32", "--rows-per-part", "100"]


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code in (0, None)


def tables(folder: Path) -> list[bytes]:
    return [(folder / f"{split}.parquet").read_bytes() for split in ("train", "test")]


def test_no_one_and_two_actors_leave_the_same_bytes(ray, tmp_path):
    for workers in ("0", "1", "2"):
        run(*EMBED, "--root", str(tmp_path), "--name", workers, "--cluster.workers", workers)
    here, one, two = (tmp_path / "embed" / workers for workers in ("0", "1", "2"))
    assert tables(here) == tables(one) == tables(two)
    assert pq.read_table(here / "train.parquet").num_rows == 2 * 1437


def test_an_actor_that_is_killed_goes_on_with_its_share(ray, tmp_path):
    dataset = ["--dataset", "sabotage:load_and_kill_actor", "--set"]
    for name in ("killed", "undisturbed"):
        marker = tmp_path / "marker"
        given = ["--root", str(tmp_path), "--name", name, "--cluster.workers", "2"]
        run(*EMBED, *dataset, f"dataset.options.marker={marker}", *given)
        assert marker.exists()
    killed, undisturbed = (tmp_path / "embed" / name for name in ("killed", "undisturbed"))
    assert tables(killed) == tables(undisturbed)
    bills = [files(folder)["summary.json"]["phases"] for folder in (killed, undisturbed)]
    assert bills[0] == bills[1]
