"""How many workers of which size a cluster holds, computed from descriptions of its nodes."""

import pytest

from raypkg.cluster import capacity
from raypkg.cluster.capacity import Plan, plan, trial_size
from raypkg.core.errors import UserError
from raypkg.core.settings import Cluster

HEAD = {"CPU": 8.0}
BIG = {"CPU": 96.0, "GPU": 8.0}
SMALL = {"CPU": 16.0, "GPU": 4.0}


@pytest.fixture
def cluster(monkeypatch):
    """Describe the nodes of the cluster."""

    def describe(*nodes):
        monkeypatch.setattr(capacity, "_nodes", lambda: list(nodes))

    return describe


@pytest.mark.parametrize(
    ("nodes", "settings", "size"),
    [
        ([HEAD], {}, Plan(8, 1, 0)),  # without GPUs a worker has one CPU
        ([HEAD], {"cpus_per_worker": 4}, Plan(2, 4, 0)),
        ([BIG], {}, Plan(8, 12, 1)),
        ([BIG], {"workers": 1}, Plan(1, 12, 1)),  # the other GPUs' CPUs are left to other runs
        ([BIG], {"gpus_per_worker": 0.5, "workers": 16}, Plan(16, 6, 0.5)),
        ([BIG], {"gpus_per_worker": 2}, Plan(4, 24, 2)),
        ([BIG], {"gpus_per_worker": 0}, Plan(8, 1, 0)),
        ([BIG], {"cpus_per_worker": 2}, Plan(8, 2, 1)),
        ([HEAD, SMALL, SMALL], {}, Plan(8, 4, 1)),  # a node without GPUs has no say
        ([BIG, SMALL], {"workers": 12}, Plan(12, 4, 1)),  # workers are alike: the poorer node decides
        ([{"CPU": 2.0, "GPU": 4.0}], {}, Plan(2, 1, 1)),  # fewer CPUs than GPUs
        ([{"CPU": 9.0, "GPU": 2.0}], {}, Plan(2, 4, 1)),
    ],
)
def test_the_size_of_workers(cluster, nodes, settings, size):
    cluster(*nodes)
    assert plan(Cluster(**settings)) == size


def test_no_more_workers_than_there_is_work_for(cluster):
    cluster(BIG)
    assert plan(Cluster(), most=3) == Plan(3, 12, 1)


def test_trials_divide_a_node_by_its_gpus(cluster):
    cluster(SMALL)
    size = trial_size(Cluster(), None)
    assert size == Plan(1, 4, 1, at_once=4)
    # What a trial plans for itself, from the settings that it is given, is what it was given room for.
    assert plan(Cluster(workers=size.of_a_trial)) == Plan(1, 4, 1)


def test_a_trial_in_one_process_has_no_gpu_and_one_cpu(cluster):
    cluster(SMALL)
    size = trial_size(Cluster(workers=0), None)
    assert size == Plan(1, 1, 0, at_once=16) and size.of_a_trial == 0


def test_what_does_not_fit_is_refused(cluster):
    cluster(SMALL)
    with pytest.raises(UserError, match=r"5 workers of 4 CPU and 1 GPU do not fit the cluster, .* room for 4"):
        plan(Cluster(workers=5))
    with pytest.raises(UserError, match="17 workers of 1 CPU and 0 GPU do not fit"):
        plan(Cluster(workers=17, gpus_per_worker=0))
