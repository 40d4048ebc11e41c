"""What runs on every worker of a Ray Train group: it meets the others and carries out tasks until there are no more.

Workers meet by themselves: with Ray's TorchConfig, the group's controller would import PyTorch before it starts them.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from raypkg.core.errors import UserError, exit_is_error

if TYPE_CHECKING:
    import torch


PATIENCE = timedelta(days=7)  # LiPT's workers wait for each other's models; Ray notices the dead


def work(config: dict[str, Any]) -> None:
    """Carry out tasks on one worker; what the user did wrong goes to the mailbox.

    Args:
        config: the mailbox, the threads of a worker, and the backend of the process group.
    """
    import ray
    import torch
    import torch.distributed as dist

    mailbox = config["mailbox"]
    torch.set_num_threads(config["threads"])
    device = _device()
    _meet(config["backend"])
    try:
        _carry_out(mailbox, device)
    except UserError as error:
        ray.get(mailbox.fail.remote(str(error)))
        raise
    dist.destroy_process_group()


def _device() -> torch.device:
    import ray
    import torch

    if not ray.get_gpu_ids():
        return torch.device("cpu")
    from ray.train.torch import get_device

    device = get_device()
    torch.cuda.set_device(device)
    return device


def _meet(backend: str) -> None:
    """Join the workers in a process group, by a store that rank 0 keeps, open to its node's address only."""
    import ray
    import torch.distributed as dist
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    context = get_context()
    rank = context.get_world_rank()
    world = context.get_world_size()
    listener = None
    if rank == 0:
        listener = socket.create_server((ray.util.get_node_ip_address(), 0))
    host, port = broadcast_from_rank_zero(listener.getsockname() if listener else None)
    store = dist.TCPStore(
        host,
        port,
        world,
        rank == 0,
        PATIENCE,
        wait_for_workers=False,
        master_listen_fd=listener.detach() if listener else None,
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)


def _carry_out(mailbox: Any, device: torch.device) -> None:
    """Carry out tasks, first the one that has no answer: an earlier group of workers may have been lost."""
    import ray
    import torch.distributed as dist

    from raypkg.engine.worker import Row, Worker

    def report(row: Row) -> None:
        ray.get(mailbox.put.remote(dict(row)))  # wait, or the next row might overtake it

    worker = Worker(dist.get_rank(), dist.get_world_size(), device, report)
    asked = ray.get(mailbox.next.remote())
    number = worker.gather(asked)[0]  # all begin with the same one
    while task := ray.get(mailbox.task.remote(number)):
        function, arguments = ray.get(task[0])
        with exit_is_error("the model, the data or a hook"):
            value = function(worker, *arguments)
        worker.gather(None)  # an answer means that every worker is done, and its rows have arrived
        if worker.rank == 0:
            ray.get(mailbox.answer.remote(value))
        number += 1
