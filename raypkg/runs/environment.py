"""What a reader needs to judge a run's figures: versions, commit, hardware."""

import platform
import subprocess
import sys
import time
from importlib import metadata
from typing import Any

from raypkg.core.errors import redacted

PACKAGES = ("effray", "torch", "torchvision", "ray", "pyarrow", "numpy")


def environment() -> dict[str, Any]:
    """Return versions, commit, hardware and the command, without the credentials in its URIs."""
    return {
        "packages": {package: _version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "commit": _commit(),
        "machine": platform.machine(),
        "processor": _processor(),
        "command": [redacted(word) for word in sys.argv],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
