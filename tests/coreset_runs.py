"""Commands that succeed, called in this process, and the picks that they leave."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from raypkg.cli import main


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code in (0, None)


def picks(folder: Path) -> list[int]:
    return pq.read_table(folder / "coreset.parquet")["index"].to_pylist()
