"""Two nodes of one cluster: runs spread over both, and go on when one of them is lost."""

import json
import threading
import time

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from raypkg.cli import main
from raypkg.cluster.mailbox import open_mailbox
from raypkg.cluster.session import prepare

pytestmark = pytest.mark.slow
PLAIN = ["--model", "mlp", "--train.precision", "float32", "--train.batch_size", "64", "--cluster.workers", "2"]
LIPT = [*PLAIN, "--train.epochs", "40", "--pretrain.models", "4", "--pretrain.epochs", "3"]
CREST = [*PLAIN, "--train.epochs", "40", "--budget", "0.5", "--crest.subset", "0.1", "--crest.tau", "0.1"]


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


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code in (0, None)


def losing_a_node(nodes, ready, *arguments):
    """Run a command; once ``ready()``, take a node away that works for it."""
    cluster, others = nodes
    lost = []

    def take():
        while not ready():
            time.sleep(0.05)
        import ray

        free = ray._private.state.available_resources_per_node()
        busy = [node for node in others if free.get(node.node_id, {}).get("CPU", 0) < 1]
        cluster.remove_node((busy or others)[0], allow_graceful=False)
        lost.append(bool(busy))

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    run(*arguments)
    thread.join(10)
    assert lost == [True]


def same(a, b):
    for name, value in load_file(a / "model.safetensors").items():
        torch.testing.assert_close(value, load_file(b / "model.safetensors")[name], rtol=0, atol=1e-4)
    coresets = [folder / "coreset.parquet" for folder in (a, b)]
    assert coresets[0].exists() == coresets[1].exists()
    if coresets[0].exists():  # CREST has none: it trains on batches of all samples
        assert pq.read_table(coresets[0]).equals(pq.read_table(coresets[1]))


def test_the_mailbox_is_where_the_driver_is(nodes):
    import ray

    actors = ray._private.state.actors
    home = ray.get_runtime_context().get_node_id()
    for _ in range(6):  # placed freely, a third of them would be
        mailbox = open_mailbox()
        assert ray.get(mailbox.next.remote()) == 0
        (node,) = (actor["Address"]["NodeID"] for key, actor in actors().items() if key == mailbox._actor_id.hex())
        assert node == home


@pytest.mark.parametrize(("experiment", "options"), [("lipt", LIPT), ("crest", CREST)])
def test_a_lost_node_changes_nothing(nodes, tmp_path, experiment, options):
    run(experiment, "--root", tmp_path, "--name", "whole", *options)
    checkpoints = tmp_path / experiment / "robbed/checkpoints/train"
    losing_a_node(
        nodes,
        lambda: checkpoints.is_dir() and any(checkpoints.iterdir()),
        *(experiment, "--root", tmp_path, "--name", "robbed", *options),
    )
    whole, robbed = (tmp_path / experiment / name for name in ("whole", "robbed"))
    assert json.loads((robbed / "summary.json").read_text())["workers"] == 2
    same(whole, robbed)


def test_a_sweep_goes_on_without_a_node(nodes, tmp_path):
    runs = tmp_path / "crest"
    losing_a_node(
        nodes,
        lambda: any(runs.glob("s-*/checkpoints/train/*")),
        *("tune", "crest", "--root", tmp_path, "--name", "s", "--samples", "6", "--scheduler", "fifo"),
    )
    rows = pq.read_table(tmp_path / "tune/s/results.parquet").to_pylist()
    assert [(row["trial"], row["state"]) for row in rows] == [(number, "done") for number in range(6)]
