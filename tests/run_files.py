"""What is in a run's folder, without times and host facts, so that two runs can be compared file by file."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from safetensors.torch import load

HOST = {
    "elapsed",
    "waited",
    "memory",
    "device_memory",
    "time",
    "digest",  # of an entry of DeltaGrad's log, which has a time
    "previous",
}
SECONDS = re.compile(r"\d[\d.,]* s\b")


def files(run: Path) -> dict[str, Any]:
    """Return the content of every file of a run by its name; of its environment only that it is there."""
    found = sorted(path for path in run.rglob("*") if path.is_file())
    return {str(path.relative_to(run)): _content(path) for path in found}


def check_whole(root: Path) -> None:
    """Assert that no file below a folder is half-written."""
    assert not [*root.rglob("*.part")]
    for path in root.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        if path.suffix == ".json":
            json.loads(content)
        elif path.suffix == ".jsonl":
            [json.loads(line) for line in content.splitlines()]
        elif path.suffix == ".toml":
            tomllib.loads(content.decode())
        elif path.suffix == ".parquet":
            pq.read_table(path)
        elif path.suffix == ".safetensors":
            load(content)


def _content(path: Path) -> Any:
    content = path.read_bytes()
    if path.name == "environment.json":
        return None
    if path.suffix == ".json":
        return _timeless(json.loads(content))
    if path.suffix == ".jsonl":
        return [_timeless(json.loads(line)) for line in content.splitlines()]
    return content


def _of_host(name: str) -> bool:
    return name in HOST or name.endswith("seconds")


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _timeless(part) for name, part in value.items() if not _of_host(name)}
    if isinstance(value, list):
        return [_timeless(part) for part in value]
    return SECONDS.sub("… s", value) if isinstance(value, str) else value
