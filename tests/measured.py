"""A measurement in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path


def in_fresh_process(script, *arguments):
    """Run ``script`` with these arguments and return what it prints, which is JSON."""
    command = [sys.executable, script, *map(str, arguments)]
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
