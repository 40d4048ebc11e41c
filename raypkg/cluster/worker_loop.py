"""The loop on every worker of a Ray Train group: meet the others, then carry out tasks until there are no more.

Workers form their process group by themselves: with Ray's TorchConfig, the group's controller would import PyTorch
before it starts them. The controller imports this file, so it imports little.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

from ray.train.backend import Backend, BackendConfig

from raypkg.core.errors import UserError, user_code

PATIENCE = timedelta(days=7)  # LiPT's workers wait for each other's models; Ray notices dead workers


class _SharedDevices(Backend):
    share_cuda_visible_devices = True


class SharedDevices(BackendConfig):
    """Lets a worker see the GPUs of the others on its node, so that they exchange gradients directly."""

    backend_cls = _SharedDevices  # the class that Ray asks


def work(config: dict[str, Any]) -> None:
    """Carry out tasks on one worker; send a user's error to the mailbox."""
    import ray
    import torch
    import torch.distributed as dist
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    from raypkg.engine.worker import Row, Worker

    mailbox = config["mailbox"]
    torch.set_num_threads(config["threads"])
    device = torch.device("cpu")
    if ray.get_gpu_ids():
        from ray.train.torch import get_device

        device = get_device()
        torch.cuda.set_device(device)
    # A process group whose store, rank 0's, listens on its node's Ray address only.
    context = get_context()
    rank = context.get_world_rank()
    world = context.get_world_size()
    listener = socket.create_server((ray.util.get_node_ip_address(), 0)) if rank == 0 else None
    host, port = broadcast_from_rank_zero(listener.getsockname() if listener else None)
    descriptor = listener.detach() if listener else None
    store = dist.TCPStore(host, port, world, rank == 0, PATIENCE, wait_for_workers=False, master_listen_fd=descriptor)
    dist.init_process_group(config["backend"], store=store, rank=rank, world_size=world, timeout=PATIENCE)

    def report(row: Row) -> None:
        ray.get(mailbox.put.remote("row", dict(row)))  # wait, or the next row might overtake it

    worker = Worker(rank, world, device, report)
    try:
        # Begin with the task that has no answer yet: an earlier group of workers may have been lost. Rank 0 decides.
        number = worker.gather(ray.get(mailbox.next.remote()))[0]
        while task := ray.get(mailbox.task.remote(number)):
            function, arguments = ray.get(task[0])
            with user_code():
                value = function(worker, *arguments)
            worker.gather(None)  # an answer means that every worker is done and its rows have arrived
            if worker.rank == 0:
                ray.get(mailbox.put.remote("answer", value))
            number += 1
    except UserError as error:
        ray.get(mailbox.put.remote("error", str(error)))
        raise
    dist.destroy_process_group()
