"""Workers for which a cluster of the run's own has no room end the run in one line, instead of waiting for ever."""

import pytest

from raypkg.cluster import workers
from raypkg.core.errors import Interruption
from raypkg.core.settings import Cluster


def test_workers_that_cannot_start_interrupt_the_run(ray, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")
    monkeypatch.setattr(workers, "owns_cluster", lambda: True)
    cpus = int(ray.cluster_resources()["CPU"])
    leaked = ray.util.placement_group([{"CPU": 1}] * cpus)  # as Ray Train leaves one behind
    ray.get(leaked.ready())
    try:
        with pytest.raises(Interruption, match=r"the workers cannot be started: .*timed out"):
            workers.Workers(Cluster(workers=1), print, str(tmp_path)).run(int)
    finally:
        ray.util.remove_placement_group(leaked)
