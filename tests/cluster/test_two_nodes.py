"""Nodes of one cluster: the mailbox is where the driver is, and a sweep goes on when a node is lost."""

import threading
import time

import pyarrow.parquet as pq
import pytest

from ray_runs import effray
from raypkg.cluster.mailbox import open_mailbox
from raypkg.cluster.session import prepare

pytestmark = pytest.mark.slow


@pytest.fixture
def nodes():
    """A cluster of three nodes of one CPU each, so that two workers are on two of them and can do without the third."""
    prepare()
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()  # of other modules' cluster
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": True})
    others = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster, others
    ray.shutdown()
    cluster.shutdown()


def test_the_mailbox_is_where_the_driver_is(nodes):
    import ray

    actors = ray._private.state.actors
    home = ray.get_runtime_context().get_node_id()
    for _ in range(6):  # placed freely, a third of them would be
        mailbox = open_mailbox()
        assert ray.get(mailbox.next.remote()) == 0
        (node,) = (actor["Address"]["NodeID"] for key, actor in actors().items() if key == mailbox._actor_id.hex())
        assert node == home


def test_a_sweep_goes_on_without_a_node(nodes, tmp_path):
    import ray

    cluster, others = nodes
    lost = []

    def take_a_node_that_works():
        while not any(tmp_path.glob("crest/s-*/checkpoints/train/*")):
            time.sleep(0.05)
        free = ray._private.state.available_resources_per_node()
        busy = [node for node in others if free.get(node.node_id, {}).get("CPU", 0) < 1]
        cluster.remove_node((busy or others)[0], allow_graceful=False)
        lost.append(bool(busy))

    thread = threading.Thread(target=take_a_node_that_works, daemon=True)
    thread.start()
    effray("tune", "crest", "--root", tmp_path, "--name", "s", "--samples", "6", "--scheduler", "fifo")
    thread.join(10)
    assert lost == [True]
    rows = pq.read_table(tmp_path / "tune/s/results.parquet").to_pylist()
    assert [(row["trial"], row["state"]) for row in rows] == [(number, "done") for number in range(6)]
