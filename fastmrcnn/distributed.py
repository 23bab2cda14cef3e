"""The little that training and evaluation over several processes need; for one process, every function is for free.

The processes are torchrun's, one per device: `torchrun --nproc-per-node 8 -m fastmrcnn evaluate ...`.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous

__all__ = ["all_gather", "broadcast", "process_group", "rank", "share_buffers", "world_size"]

T = TypeVar("T")


def rank() -> int:
    """This process' number among those of the process group, from 0; 0 without a group."""
    return dist.get_rank() if _grouped() else 0


def world_size() -> int:
    """The number of processes in the process group; 1 without a group."""
    return dist.get_world_size() if _grouped() else 1


def all_gather(value: T) -> list[T]:
    """The values of all processes, by rank; every process must call it. They must be possible to pickle."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return cast(list[T], values)


def broadcast(value: T) -> T:
    """The value of rank 0, in every process; every process must call it. It must be possible to pickle."""
    if world_size() == 1:
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0)
    return cast(T, values[0])


def share_buffers(module: nn.Module) -> None:
    """Give `module` in every process the buffers of rank 0, such as the statistics of batch norms."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


@contextlib.contextmanager
def process_group(device: torch.device | str) -> Iterator[torch.device]:
    """Join the other processes that torchrun started, for the duration of the block.

    Nothing is joined if the process was started alone or if there is a process group already, which then stays.

    Args:
        device: for torchrun's processes cuda, of which each takes one, or cpu; for a process alone any.

    Yields:
        The device that is this process' own.

    Raises:
        ValueError: several processes are to share one device by number, or there are more of them than GPUs.
    """
    chosen = torch.device(device)
    if _grouped() or not _is_one_of_several():
        yield chosen
        return
    if chosen.type == "cuda":
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if chosen.index is not None:
            raise ValueError(f"device: each of several processes takes a GPU of its own; give cuda, not {chosen}")
        if local >= count:
            raise ValueError(f"device: {os.environ['LOCAL_WORLD_SIZE']} processes need as many GPUs, there are {count}")
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
        _join("nccl", device_id=chosen)
    else:
        _join("gloo")
    try:
        yield chosen
    finally:
        dist.destroy_process_group()


def _join(backend: str, **options: Any) -> None:
    """Make a process group with the others.

    Processes that torchrun starts again, after one died, meet in the store of those before them, and now and then find
    the addresses of the dead. So each attempt gets a part of the store of its own; on several nodes, whose attempts
    torchrun does not count together, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 does it.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt != "0" and os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        store, number, processes = next(rendezvous("env://"))
        options |= {"store": dist.PrefixStore(f"attempt {attempt}", store), "rank": number, "world_size": processes}
    dist.init_process_group(backend, **options)


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def _is_one_of_several() -> bool:
    """Whether torchrun started this process along with others."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return dist.is_available() and all(name in os.environ for name in names) and int(os.environ["WORLD_SIZE"]) > 1
