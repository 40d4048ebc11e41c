"""Data and runs in an object store, nodes that share no folder: the same results as on one machine, after deaths too.

Simulated nodes are processes of one machine, each with a cache folder of its own.
"""

import os
import socket
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import fs
from safetensors.numpy import load

import samples
from ray_runs import wait_for
from raypkg.cluster.session import prepare
from raypkg.cluster.workers import open_mailbox
from raypkg.core.address import opened
from raypkg.data import load_data
from raypkg.runs.storage import Storage

pytestmark = [
    pytest.mark.slow,
    # A group of another module may still wait for the cluster that is shut down here.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]
PLAIN = "--model mlp --train.precision float32 --train.batch_size 64 --train.epochs 12"
LIPT = f"lipt {PLAIN} --preset local-sgd --pretrain.models 4 --pretrain.epochs 3 --name run"
CREST = f"crest {PLAIN} --preset each-step --budget 0.5 --crest.subset 0.1 --name run"
BLOCKS = f"train {PLAIN} --train.lr 0.001 --name run --set dataset.options.size=128 --dataset.window 2"  # 24 MB: three
TOLERANCE = 1e-4  # of weights: other workers add in another order


@pytest.fixture
def digits(tmp_path):
    """Digits as files of encoded images."""
    folder = tmp_path / "digits"
    data = load_data("digits")
    for split, part in {"train": data.train, "test": data.test}.items():
        x, y = part.batch(torch.arange(len(part)))
        images = [samples.encode(image) for image in x.permute(0, 2, 3, 1).numpy()]
        for number, chosen in enumerate(np.array_split(np.arange(len(y)), 3)):
            file = folder / f"{split}-{number}.parquet"
            samples.write_parquet(file, [images[i] for i in chosen], y[chosen].numpy(), classes=part.classes)
    return folder


@pytest.fixture
def bucket_of_digits(digits, bucket):
    """The same files in a bucket."""
    system, path = opened(bucket("digits"))
    fs.copy_files(str(digits), path, destination_filesystem=system)
    return bucket("digits")


@pytest.fixture
def nodes(port, tmp_path):
    """Two nodes of one CPU each, and a function that adds another: nodes know a cache folder of their own alone."""
    prepare()
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()  # of other modules' cluster
    caches = (tmp_path / f"node-{number}" for number in range(9))

    def own():
        return {"num_cpus": 1, "env_vars": {"EFFRAY_CACHE": str(next(caches))}}

    with socket.create_server(("127.0.0.1", 0)) as server:
        dashboard = {"include_dashboard": True, "dashboard_port": server.getsockname()[1]}  # 8265 may be taken
    cluster = Cluster(initialize_head=True, head_node_args={**own(), **dashboard})
    cluster.add_node(**own())
    cluster.wait_for_nodes()
    yield cluster, lambda **others: cluster.add_node(**{**own(), **others})
    ray.shutdown()
    cluster.shutdown()


class Machine:
    """A folder and a cache in which commands are typed, on a Ray cluster if an address is given."""

    def __init__(self, folder, address=None):
        folder.mkdir()
        self.folder = folder
        own = {"EFFRAY_CACHE": str(folder / "cache")} | ({"RAY_ADDRESS": address} if address else {})
        self.workers = 2 if address else 0
        self.options = {"cwd": folder, "env": os.environ | own, "stdout": subprocess.PIPE, "text": True}

    def start(self, line, workers=None):
        count = self.workers if workers is None else workers
        words = [sys.executable, "-m", "raypkg", *line.split(), "--cluster.workers", str(count)]
        return subprocess.Popen(words, stderr=subprocess.STDOUT, **self.options)

    def run(self, line):
        finish(self.start(line))


def finish(process):
    printed, _ = process.communicate()
    assert process.returncode == 0, printed


def kill_when(ready, process):
    wait_for(ready, process, seconds=500)
    process.kill()
    process.communicate()


def same(here, there):
    """Compare model and coreset of two runs, wherever they lie."""
    ours, theirs = (load(storage.read("model.safetensors")) for storage in (here, there))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=0, atol=TOLERANCE)
    coresets = [storage.read("coreset.parquet") for storage in (here, there)]
    tables = [None if content is None else pq.read_table(pa.BufferReader(content)) for content in coresets]
    assert (tables[0] is None) == (tables[1] is None)
    if tables[0] is not None:
        assert tables[0].select(["index", "weight"]).equals(tables[1].select(["index", "weight"]))


@pytest.mark.parametrize(
    ("line", "streamed"),
    [(LIPT, False), (LIPT, True), (CREST, False), (BLOCKS, True)],
    ids=["lipt", "lipt by blocks", "crest", "blocks that no node holds"],
)
def test_a_run_in_a_bucket_survives_its_driver_and_a_node(
    line, streamed, digits, bucket_of_digits, nodes, bucket, tmp_path
):
    cluster, another = nodes
    kind = line.split()[0]
    at_home = Machine(tmp_path / "home")
    by_blocks = "--dataset.streamed {}" if streamed else ""
    at_home.run(f"{line} --dataset parquet:{digits} --root {tmp_path}/runs {by_blocks.format(tmp_path / 'stores')}")

    outside = Machine(tmp_path / "outside", cluster.address)
    store = Storage(bucket("runs"))
    run = store / kind / "run"
    by_blocks = by_blocks.format(bucket("stores"))
    process = outside.start(f"{line} --dataset parquet:{bucket_of_digits} --root {store.root} {by_blocks}")
    kill_when(lambda: run.list("checkpoints/train"), process)

    process = outside.start(f"{kind} --resume run --root {store.root}")
    wait_for(lambda: run.list("checkpoints/train"), process, seconds=500)
    lost = next(node for node in cluster.worker_nodes)
    cluster.remove_node(lost, allow_graceful=False)
    another()
    finish(process)
    same(Storage(f"{tmp_path}/runs/{kind}/run"), run)
    assert not (streamed and list(tmp_path.glob("node-*/*.arrow")))


@pytest.mark.parametrize("line", [LIPT, CREST], ids=["lipt", "crest"])
def test_a_node_that_cannot_import_is_told_in_one_line(line, bucket_of_digits, nodes, bucket, tmp_path):
    cluster, another = nodes
    cluster.remove_node(cluster.worker_nodes.copy().pop())
    (tmp_path / "full").write_text("where no folder can be made")
    another(env_vars={"EFFRAY_CACHE": str(tmp_path / "full" / "cache")})
    outside = Machine(tmp_path / "outside", cluster.address)
    process = outside.start(f"{line} --dataset parquet:{bucket_of_digits} --root {bucket('runs')}")
    printed, _ = process.communicate()
    assert process.returncode == 2, printed
    told = [line for line in printed.splitlines() if "cannot build the data cache" in line]
    assert len(told) == 1 and "Traceback" not in printed, printed


def test_a_selection_on_two_nodes(digits, bucket_of_digits, nodes, bucket, tmp_path):
    cluster, _ = nodes
    at_home = Machine(tmp_path / "home")
    here = Storage(str(tmp_path / "runs"))
    outside = Machine(tmp_path / "outside", cluster.address)
    there = Storage(bucket("runs"))
    train = "train --name full --model mlp --train.epochs 2 --train.precision float32"
    select = "select --name picks --model-from full --rule craig --fraction 0.2"
    for machine, data, root in ((at_home, digits, here.root), (outside, bucket_of_digits, there.root)):
        machine.run(f"{train} --dataset parquet:{data} --root {root}")
    at_home.run(f"{select} --dataset parquet:{digits} --root {here.root}")
    run = there / "select/picks"
    process = outside.start(f"{select} --dataset parquet:{bucket_of_digits} --root {there.root}")
    kill_when(lambda: "config.toml" in run.list(), process)
    outside.run(f"select --resume picks --root {there.root}")
    picks = [pq.read_table(pa.BufferReader((root / "select/picks").read("coreset.parquet"))) for root in (here, there)]
    assert set(picks[0]["index"].to_pylist()) == set(picks[1]["index"].to_pylist())
    for number in (0, 1):  # each node has read the data for itself
        assert list((tmp_path / f"node-{number}").glob("digits-train-*.arrow"))


def test_deltagrad_on_two_nodes(digits, bucket_of_digits, nodes, tmp_path):
    """Its record is mapped into memory, so the run is where the command is typed; data and actors are elsewhere."""
    cluster, _ = nodes
    at_home = Machine(tmp_path / "home")
    outside = Machine(tmp_path / "outside", cluster.address)
    train = "deltagrad train --name people --dataset.repeat 2 --train.epochs 20 --train.batch_size 2500"
    delete = "deltagrad delete people --ids 1,2,3,4,5"
    at_home.run(f"{train} --dataset parquet:{digits}")
    at_home.run(delete)
    run = outside.folder / "runs/deltagrad/people"
    process = outside.start(f"{train} --dataset parquet:{bucket_of_digits}")
    kill_when(lambda: (run / "metrics.parquet").exists() or list(run.glob("versions/*/*")), process)
    outside.run("deltagrad train --resume people")
    process = outside.start(delete)
    kill_when(lambda: (run / "versions/00001").exists() or list(run.glob("versions/*.part")), process)
    outside.run(delete)
    same(*(Storage(f"{machine.folder}/runs/deltagrad/people") for machine in (at_home, outside)))


def test_a_sweep_goes_on_without_a_node(nodes, tmp_path):
    """Trials of one process each, on both nodes at first."""
    cluster, _ = nodes
    outside = Machine(tmp_path / "outside", cluster.address)
    process = outside.start("tune crest --preset fast --name s --samples 6 --scheduler fifo", workers=0)
    checkpoints = outside.folder / "runs/crest"
    wait_for(lambda: len({*checkpoints.glob("s-*/checkpoints/train")}) > 1, process, seconds=500)
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    finish(process)
    rows = pq.read_table(outside.folder / "runs/tune/s/results.parquet").to_pylist()
    assert [(row["trial"], row["state"]) for row in rows] == [(number, "done") for number in range(6)]


def test_the_mailbox_is_where_the_driver_is(nodes):
    import ray

    cluster, _ = nodes
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    home = ray.get_runtime_context().get_node_id()
    for _ in range(6):  # placed freely, half of them would be
        mailbox = open_mailbox()
        assert ray.get(mailbox.next.remote()) == 0
        actors = ray._private.state.actors()
        (node,) = (actor["Address"]["NodeID"] for key, actor in actors.items() if key == mailbox._actor_id.hex())
        assert node == home
