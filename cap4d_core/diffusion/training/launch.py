"""Starts the processes that train together, one per GPU, and ends all when one fails."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import (
    ProcessExitedException,
    ProcessRaisedException,
    start_processes,
)

from cap4d_core.child_process import end_with_parent
from cap4d_core.diffusion.training.processes import Group
from cap4d_core.errors import DeadlineError, DivergedError, UserError

# While one process samples pictures the others wait for it.
PATIENCE = timedelta(hours=1)
_ERRORS: dict[str, type[UserError]] = {e.__name__: e for e in (DeadlineError, DivergedError)}

# Called as work(group, device, *arguments) in every process.
Work = Callable[..., None]


def launch(
    work: Work, arguments: tuple[Any, ...], num_processes: int, device: torch.device, threads: int
) -> None:
    """Runs `work` in so many processes that know each other; in this one if it is one.

    Args:
        work: a function of a module.
        arguments: what can be sent to another process.
        num_processes: GPUs 0 to n - 1 of this process are theirs; on the CPU they share the cores.
        device: `cuda` or `cpu`.
        threads: CPU threads of all together.

    Raises:
        UserError: from one of them; the others were ended.
        RuntimeError: any other failure, with its traceback.
    """
    if num_processes == 1:
        _set_up(device)
        work(Group(), device, *arguments)
        return
    context = get_context("spawn")
    errors = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = (num_processes, port, device.type, max(1, threads // num_processes), errors)
    started = start_processes(
        _process, (*shared, work, arguments), num_processes, join=False, start_method="spawn"
    )
    try:
        while not started.join(timeout=5):
            pass
    except (ProcessExitedException, ProcessRaisedException):
        if errors.empty():
            raise
        name, message = errors.get()
        raise _ERRORS.get(name, UserError)(message) from None
    finally:
        for process in started.processes:
            if process.is_alive():
                process.kill()
            process.join()


def _process(
    rank: int, size: int, port: int, device_type: str, threads: int, errors: Any, work: Work,
    arguments: tuple[Any, ...],
) -> None:  # fmt: skip
    end_with_parent()
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.ERROR,
        format=f"%(asctime)s %(levelname)-7s [{rank}] %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
    )
    torch.set_num_threads(threads)
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    _set_up(device)
    # All processes are on this machine; its name need not resolve to an address.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=size,
        timeout=PATIENCE,
    )
    try:
        work(Group(rank, size), device, *arguments)
    except UserError as error:
        errors.put((type(error).__name__, str(error)))
        raise
    dist.destroy_process_group()


def _set_up(device: torch.device) -> None:
    if device.type != "cuda":
        return
    if device.index is not None:
        torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True
    # Convolutions only: TF32 products would move projected heads by half a pixel.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = True
