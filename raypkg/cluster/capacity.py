"""What a cluster has room for: the workers of a run, and the trials of a sweep."""

from collections.abc import Mapping
from dataclasses import dataclass

from raypkg.core.errors import UserError
from raypkg.core.settings import Cluster

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
        request: dict[str, float] = {"CPU": self.cpus}
        if self.gpus:
            request["GPU"] = self.gpus
        return request


@dataclass(frozen=True)
class TrialSize:
    """What a trial takes of the cluster.

    Attributes:
        plan: of its workers.
        nested: whether Ray Train runs them; otherwise the trial's own process is the only one.
        at_once: trials side by side.
    """

    plan: Plan
    nested: bool
    at_once: int

    @property
    def workers(self) -> int:
        """The setting ``cluster.workers`` of a trial: 0 where its own process is the only one."""
        return self.plan.workers if self.nested else 0


def plan(settings: Cluster, most: int | None = None, actors: int = 0) -> Plan:
    """Fill in the number and size of workers from what the cluster has.

    A GPU trains on more samples a second than a CPU decodes: workers with GPUs divide all CPUs of a node among them,
    and leave those that the run's actors take.

    Args:
        settings: ``workers``, ``cpus_per_worker`` and ``gpus_per_worker`` may be left open.
        most: as many workers as there is work for.
        actors: of one CPU each that the run starts beside its workers.

    Raises:
        UserError: the cluster has fewer CPUs or GPUs than asked for; Ray itself would wait for ever.
    """
    nodes = _nodes()
    all_gpus = sum(node.get("GPU", 0.0) for node in nodes)
    gpus = settings.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if all_gpus else 0.0
    bound = min(MOST_WORKERS, most or MOST_WORKERS)
    cpus = settings.cpus_without_gpu
    if gpus and settings.cpus_per_worker is None:
        likely = settings.workers or max(1, min(room(cpus, gpus), bound))
        cpus = _share_of_node(nodes, gpus, actors / likely)
    fit = room(cpus, gpus)
    workers = settings.workers or max(1, min(fit, bound))
    if workers > fit:
        raise UserError(
            f"{workers} workers of {cpus} CPU and {gpus:g} GPU do not fit the cluster, which has {processors():g} CPU"
            f" and {all_gpus:g} GPU on {len(nodes)} nodes, room for {fit}: lower cluster.workers,"
            " cluster.cpus_per_worker or cluster.gpus_per_worker"
        )
    return Plan(workers, cpus, gpus)


def trial_size(cluster: Cluster, actors: int, concurrent: int | None) -> TrialSize:
    """Choose how a trial runs on the cluster that was joined.

    A trial of one process without a GPU runs in the process that Tune gives it; any other needs Ray Train.

    Args:
        cluster: of one trial; workers left out = one.
        actors: that a trial starts beside its workers, of one CPU each.
        concurrent: trials at once; None = as many as fit.

    Raises:
        UserError: one trial does not fit, or not so many.
    """
    if cluster.workers == 0:
        workers = plan(cluster.model_copy(update={"workers": 1, "gpus_per_worker": 0}))
    else:
        workers = plan(cluster.model_copy(update={"workers": cluster.workers or 1}), actors=actors)
    slots = room(workers.cpus, workers.gpus)
    cpus = workers.workers * workers.cpus + actors  # of one trial
    fit = min(slots // workers.workers, int(processors() // cpus))
    processes = workers.workers + actors
    if not fit:
        raise UserError(
            f"a trial of {workers.workers} workers and {actors} actors does not fit the cluster, which has room for"
            f" {slots} workers of {workers.cpus} CPU and {workers.gpus:g} GPU, and {processors():g} CPU in all: lower"
            " one or the other"
        )
    if concurrent and concurrent > fit:
        raise UserError(f"--concurrent {concurrent}: the cluster has room for {fit} trials of {processes} processes")
    nested = processes > 1 or workers.gpus > 0
    return TrialSize(workers, nested, concurrent or fit)


def room(cpus: int, gpus: float) -> int:
    """Return how many workers of that size fit the cluster."""
    return sum(_room_on(node, cpus, gpus) for node in _nodes())


def processors() -> float:
    """Return the CPUs of the cluster."""
    return sum(node.get("CPU", 0.0) for node in _nodes())


def _nodes() -> list[Mapping[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _share_of_node(nodes: list[Mapping[str, float]], gpus: float, beside: float) -> int:
    """Return the CPUs of a worker with so many GPUs: its share of its node's, where nodes differ of the poorest.

    Args:
        nodes: of the cluster.
        gpus: of each worker.
        beside: CPUs that the run's actors take for each worker.
    """
    with_gpus = [node for node in nodes if node.get("GPU", 0.0) >= gpus]
    shares = [node.get("CPU", 0.0) / (node["GPU"] // gpus) for node in with_gpus]
    return max(1, int(min(shares, default=1.0) - beside))


def _room_on(node: Mapping[str, float], cpus: int, gpus: float) -> int:
    """Return how many workers fit one node: a worker is never spread over two."""
    by_cpu = int(node.get("CPU", 0.0) // cpus)
    if not gpus:
        return by_cpu
    by_gpu = int(node.get("GPU", 0.0) // gpus)
    return min(by_cpu, by_gpu)
