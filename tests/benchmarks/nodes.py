"""Experiments on simulated clusters of 1, 2, 4 and 8 nodes: who runs where, bytes sent by phase, and memory.

    python tests/benchmarks/nodes.py --folder path/to/empty/folder

A node is a raylet of one CPU with a cache folder of its own; the head has no CPU, so every worker is on a node. All
nodes share this machine: seconds say nothing here, bytes and memory do. Data are made-up images of 64 × 64 pixels.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

NODES = (1, 2, 4, 8)
MODEL = "--model mlp --train.precision float32 --train.epochs 1 --train.lr 0.01 --dataset.validation 0"
COMMANDS = {
    "lipt": f"lipt {MODEL} --pretrain.epochs 1 --pretrain.precision float32 --select.rule craig",
    "crest": f"crest {MODEL} --budget 1",
    "select": "select --rule craig --fraction 0.1 --model-from trained --dataset.validation 0",
    "deltagrad": "deltagrad train --model linear --train.epochs 2 --train.batch_size 4096 --dataset.validation 0",
}
MIB = 1 << 20


def main() -> None:
    """Run every experiment on every cluster, and print a table."""
    from imagenet_size import make  # of the same folder, which is on the path of a script alone

    chosen = arguments()
    data = chosen.folder / f"images-{chosen.images}"
    make(data, chosen.images, chosen.classes)
    os.environ["RAY_AUTH_MODE"] = "disabled"
    print("| nodes | experiment | workers on each node | MB sent by a worker | worker MiB | driver MiB |")
    print("|---|---|---|---|---|---|")
    for nodes in NODES:
        simulated(nodes, chosen.folder, data)


def simulated(nodes: int, folder: Path, data: Path) -> None:
    """Start a cluster, and print a row for each experiment on it."""
    from raypkg.cluster.session import prepare

    prepare()
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": True})
    for number in range(nodes):
        cluster.add_node(num_cpus=1, env_vars={"EFFRAY_CACHE": str(folder / f"cache-{nodes}-{number}")})
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    os.environ["RAY_ADDRESS"] = cluster.address
    root = folder / f"runs-{nodes}"
    typed(f"train {MODEL} --name trained --cluster.workers 0", root, data)
    for name, command in COMMANDS.items():
        before = set(ray._private.state.actors())
        driver = typed(f"{command} --name run --cluster.workers {nodes}", root, data)
        actors = [actor for key, actor in ray._private.state.actors().items() if key not in before]
        summary = json.loads((root / name / "run/summary.json").read_text())
        print(
            f"| {nodes} | {name} | {placed(actors)} | {sent(summary)} | {largest(summary)} | {driver:.0f} |", flush=True
        )
    ray.shutdown()
    cluster.shutdown()


def typed(command: str, root: Path, data: Path) -> float:
    """Run a command; return the MiB that its own process held at most."""
    words = [sys.executable, "-m", "raypkg", *command.split(), "--root", str(root), "--dataset", f"parquet:{data}"]
    environment = {**os.environ, "EFFRAY_CACHE": str(root.parent / "cache-driver")}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"effray {command} ended with {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * 1024 / MIB


def placed(actors: list[dict]) -> str:
    """Return how many of the actors that compute were on each node."""
    computing = [actor for actor in actors if actor["ActorClassName"].split(".")[-1] in ("RayTrainWorker", "Holder")]
    return ", ".join(map(str, sorted(Counter(actor["Address"]["NodeID"] for actor in computing).values())))


def sent(summary: dict) -> str:
    """Return the MB that a worker handed to collectives, by phase."""
    parts = {phase["phase"]: phase["sent"] / 1e6 for phase in summary["phases"] if phase["sent"]}
    return ", ".join(f"{phase} {megabytes:.1f}" for phase, megabytes in parts.items()) or "0"


def largest(summary: dict) -> str:
    """Return the MiB of the largest worker."""
    return f"{max(phase['memory'] for phase in summary['phases']) / MIB:.0f}"


def arguments() -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--classes", type=int, default=100)
    return parser.parse_args()


if __name__ == "__main__":
    main()
