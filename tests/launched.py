"""Runs for tables of results: each a process of its own on one thread, gone on with if stopped, never run twice."""

import json
import os
import subprocess
import sys
from pathlib import Path


def finished(root: str, experiment: str, name: str, options: str) -> dict | None:
    """Return the manifest of a run, running or resuming it first if there is none; None where it failed."""
    manifest = Path(root, experiment, name, "summary.json")
    if not manifest.exists():
        started = (manifest.parent / "config.toml").exists()
        arguments = ["--resume", name] if started else ["--name", name, "--cluster.workers", "0", *options.split()]
        command = [sys.executable, "-c", "from raypkg.cli import main; main()", experiment, "--root", root, *arguments]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        print(f"{name}: {done.stderr.strip().splitlines()[-1] if done.returncode else 'done'}", flush=True)
    return json.loads(manifest.read_text()) if manifest.exists() else None
