"""Seconds and peak memory, each in a process of its own (Linux)."""

import json
import os
import subprocess
import sys
from pathlib import Path

MEBIBYTE = 2**20


def in_fresh_process(script, *arguments):
    """Run ``script`` with these arguments and return what it prints, which is JSON."""
    command = [sys.executable, script, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def peak():
    """Return the peak resident memory of this process in MiB."""
    return _status("VmHWM")


def _status(field):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024 / MEBIBYTE
