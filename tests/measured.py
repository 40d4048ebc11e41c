"""Seconds and peak memory, each in a process of its own (Linux)."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

MEBIBYTE = 2**20


def in_fresh_process(script, *arguments):
    """Run ``script`` with these arguments and return what it prints, which is JSON."""
    command = [sys.executable, script, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def peak_of(function):
    """Return by how much ``function()`` raises the peak memory in MiB, and its result."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = _status("VmRSS")
    result = function()
    return _status("VmHWM") - before, result


def seconds_of(function, budget=3.0):
    """Return the seconds that ``function()`` takes: the fastest of several calls, if they fit into the budget."""
    found, start = [], time.perf_counter()
    while not found or time.perf_counter() - start < budget:
        before = time.perf_counter()
        function()
        found.append(time.perf_counter() - before)
    return min(found)


def peak():
    """Return the peak resident memory of this process in MiB."""
    return _status("VmHWM")


def _status(field):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024 / MEBIBYTE
