"""Nobody else reaches a cluster that effray starts: it listens on this machine alone, and wants a token."""

import os
import subprocess
import sys
import time

import pytest

from processes import Watch, is_alive, listeners

pytestmark = pytest.mark.slow
LIPT = "lipt --model mlp --pretrain.models 2 --pretrain.epochs 2 --train.epochs 30 --cluster.workers 2"
STRANGER = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1]).get_all_node_info()"


def environment(**changes):
    kept = {name: value for name, value in os.environ.items() if name not in ("RAY_AUTH_MODE", "RAY_ADDRESS")}
    return kept | changes


@pytest.fixture
def lipt(tmp_path):
    """A running `effray lipt` of a user without any Ray settings, and what is seen of its processes."""
    command = [sys.executable, "-m", "raypkg", *LIPT.split()]
    own = environment(HOME=str(tmp_path))
    with subprocess.Popen(command, cwd=tmp_path, env=own, stdout=subprocess.DEVNULL) as process:
        with Watch(process.pid) as watch:
            yield process, watch
        process.kill()


def test_it_starts_what_it_needs_and_only_this_machine_reaches_it_by_the_token(lipt, tmp_path):
    process, watch = lipt
    seen = {}
    refused = None
    while process.poll() is None:
        for one in [*watch.titles]:
            if is_alive(one):
                seen.setdefault(one, set()).update(listeners(one))
        head = next((places for one, places in seen.items() if watch.titles[one] == "gcs_server"), None)
        if refused is None and head:
            (address,) = head
            refused = subprocess.Popen(
                [sys.executable, "-c", STRANGER, address],
                env=environment(HOME=str(tmp_path / "stranger"), RAY_AUTH_MODE="disabled"),
                stderr=subprocess.PIPE,
                text=True,
            )
        time.sleep(0.3)
    assert process.returncode == 0
    hosts = {}
    for one, places in seen.items():
        hosts.setdefault(watch.titles[one], set()).update(place.rpartition(":")[0] for place in places)
    assert {"gcs_server", "raylet", "RayTrainWorker"} <= hosts.keys()
    titles = list(watch.titles.values())
    assert titles.count("RayTrainWorker") == 2  # for all phases
    assert "Holder" not in titles  # selection uses the group too
    assert {title: places for title, places in hosts.items() if places - {"127.0.0.1"}} == {}
    assert refused is not None
    _, words = refused.communicate(timeout=120)
    assert refused.returncode != 0 and "token" in words.lower()
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o077 == 0
