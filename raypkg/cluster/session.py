"""Connecting to Ray, and refusing at once what the cluster cannot give."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # the default of 2 s delays the end of every phase by as much
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # otherwise each line that a worker prints appears twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process fewer
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune is silent only with its old output engine
    "RAY_USAGE_STATS_ENABLED": "0",
}
for name, value in ENVIRONMENT.items():  # Ray reads these while it is imported
    os.environ.setdefault(name, value)

import ray  # noqa: E402

from raypkg.core.errors import UserError  # noqa: E402
from raypkg.core.settings import Cluster  # noqa: E402

MOST_WORKERS = 8  # chosen by default; more are had by asking


@dataclass(frozen=True)
class Plan:
    """How many workers of which size: settings with the cluster's own numbers filled in."""

    workers: int
    cpus: int
    gpus: float

    @property
    def resources(self) -> dict[str, float]:
        """What one worker asks Ray for."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


def connect(settings: Cluster) -> None:
    """Join the cluster at the address, in RAY_ADDRESS or from ``ray start``; otherwise start one on this machine.

    A cluster that another effray process started for itself is left alone: it ends with that process.

    Raises:
        UserError: an address was given and nothing answers there.
    """
    if ray.is_initialized():
        return
    try:
        ray.init(address=settings.address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError):
        where = settings.address or os.environ.get("RAY_ADDRESS")
        raise UserError(f"no Ray cluster answers at cluster.address = {where!r}") from None


def plan(settings: Cluster, most: int | None = None) -> Plan:
    """Fill in the number and size of workers from what the cluster has.

    Args:
        settings: ``workers`` and ``gpus_per_worker`` may be left open.
        most: as many workers as there is work for.

    Raises:
        UserError: the cluster has fewer CPUs or GPUs than asked for; Ray itself would wait for ever.
    """
    nodes = _nodes()
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    each = settings.gpus_per_worker if settings.gpus_per_worker is not None else float(gpus > 0)
    fit = room(settings.cpus_per_worker, each)
    workers = settings.workers or max(1, min(fit, MOST_WORKERS, most or MOST_WORKERS))
    if workers > fit:
        raise UserError(
            f"{workers} workers of {settings.cpus_per_worker} CPU and {each:g} GPU do not fit the cluster, which has"
            f" {processors():g} CPU and {gpus:g} GPU on {len(nodes)} nodes, room for {fit}: lower cluster.workers,"
            " cluster.cpus_per_worker or cluster.gpus_per_worker"
        )
    return Plan(workers, settings.cpus_per_worker, each)


def room(cpus: int, gpus: float) -> int:
    """Return how many workers of that size fit the cluster."""
    return sum(_room(node, cpus, gpus) for node in _nodes())


def processors() -> float:
    """Return the CPUs of the cluster."""
    return sum(node.get("CPU", 0.0) for node in _nodes())


def _nodes() -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _room(node: Mapping[str, float], cpus: int, gpus: float) -> int:
    """Return how many workers fit one node: a worker is never spread over two."""
    by_cpu = int(node.get("CPU", 0.0) // cpus)
    return min(by_cpu, int(node.get("GPU", 0.0) // gpus)) if gpus else by_cpu
