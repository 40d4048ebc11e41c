"""Capacity of a cluster: the size of a run's workers and of a study's trials."""

from collections.abc import Mapping
from typing import NamedTuple

from raypkg.core.errors import UserError
from raypkg.core.settings import Cluster

MOST_WORKERS = 8  # by default; cluster.workers may ask for more


class Plan(NamedTuple):
    """Number and size of workers: the settings, completed by what the cluster has."""

    workers: int
    cpus: int
    gpus: float
    at_once: int = 1  # trials of a study that run side by side, each with such workers

    @property
    def of_a_trial(self) -> int:
        """The setting ``cluster.workers`` of a trial: 0 if its own process is the only one; others need Ray Train."""
        return self.workers if self.workers > 1 or self.gpus else 0

    @property
    def resources(self) -> dict[str, float]:
        """Ray resources of one worker."""
        request: dict[str, float] = {"CPU": self.cpus}
        if self.gpus:
            request["GPU"] = self.gpus
        return request


def plan(settings: Cluster, most: int | None = None) -> Plan:
    """Complete the number (at most ``most``, if unset) and size of workers by what the cluster has.

    A GPU trains on more samples a second than a CPU decodes: workers with GPUs divide all CPUs of a node among them.
    More than the cluster has is refused: Ray would wait forever.
    """
    nodes = _nodes()
    all_gpus = sum(node.get("GPU", 0.0) for node in nodes)
    gpus = settings.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if all_gpus else 0.0
    bound = min(MOST_WORKERS, most or MOST_WORKERS)
    cpus = settings.cpus_without_gpu
    if gpus and settings.cpus_per_worker is None:
        # A worker's share of its node's CPUs, on the node with the fewest per GPU.
        with_gpus = [node for node in nodes if node.get("GPU", 0.0) >= gpus]
        shares = [node.get("CPU", 0.0) / (node["GPU"] // gpus) for node in with_gpus]
        cpus = max(1, int(min(shares, default=1.0)))
    fit = room(cpus, gpus)
    workers = settings.workers or max(1, min(fit, bound))
    if workers > fit:
        all_cpus = sum(node.get("CPU", 0.0) for node in nodes)
        there = f"{all_cpus:g} CPU and {all_gpus:g} GPU on {len(nodes)} nodes, room for {fit}"
        advice = "lower cluster.workers, cluster.cpus_per_worker or cluster.gpus_per_worker"
        size = f"{cpus} CPU and {gpus:g} GPU"
        raise UserError(f"{workers} workers of {size} do not fit the cluster, which has {there}: {advice}")
    return Plan(workers, cpus, gpus)


def trial_size(cluster: Cluster, concurrent: int | None) -> Plan:
    """Return the workers of a trial, by default one, and how many trials run at once, by default as many as fit."""
    alone = {"gpus_per_worker": 0} if cluster.workers == 0 else {}
    workers = plan(cluster.model_copy(update={"workers": cluster.workers or 1, **alone}))
    fit = room(workers.cpus, workers.gpus) // workers.workers
    if concurrent and concurrent > fit:
        trials = f"{fit} trials of {workers.workers} processes"
        raise UserError(f"--concurrent {concurrent}: the cluster has room for {trials}")
    return workers._replace(at_once=concurrent or fit)


def room(cpus: int, gpus: float) -> int:
    """Return the number of workers of that size that fit the cluster: a worker is never split over two nodes."""
    fit = 0
    for node in _nodes():
        by_cpu = node.get("CPU", 0.0) // cpus
        by_gpu = node.get("GPU", 0.0) // gpus if gpus else by_cpu
        fit += int(min(by_cpu, by_gpu))
    return fit


def _nodes() -> list[Mapping[str, float]]:
    """Return the resources of every living node."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
