"""Ray's environment, and the connection to a cluster."""

import os

from raypkg.core.errors import UserError
from raypkg.core.settings import Cluster

ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # the default of 2 s delays the end of every phase by as much
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # otherwise each line that a worker prints appears twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process fewer
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune is silent only with its old output engine
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the run folders have it all
}


def prepare() -> None:
    """Set the environment that Ray is to find when it is imported; what the user has set stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def connect(settings: Cluster) -> None:
    """Join the cluster at the address, in RAY_ADDRESS or from ``ray start``; otherwise start one on this machine.

    A cluster that another effray process started for itself is left alone: it ends with that process.

    Raises:
        UserError: an address was given and nothing answers there.
    """
    prepare()
    import ray

    if ray.is_initialized():
        return
    try:
        ray.init(address=settings.address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError):
        where = settings.address or os.environ.get("RAY_ADDRESS")
        raise UserError(f"no Ray cluster answers at cluster.address = {where!r}") from None
