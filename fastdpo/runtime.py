"""The machine under a run: device, seeds, determinism, memory readings, sums over ranks, prefetch.

Nothing here knows about models, data or losses.
"""

import os
import queue
import resource
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from .errors import ConfigError

Item = TypeVar("Item")


def make_deterministic(device: torch.device) -> None:
    """Asks torch for repeatable kernels; an operation that has none raises when it is called.

    `ConfigError` where cuBLAS can no longer be made so: torch reads its setting once a process, at
    the first product on a GPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS: fixed workspaces
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    one = torch.ones(1, 1, device=device)
    try:
        torch.mm(one, one)
    except RuntimeError as error:
        torch.use_deterministic_algorithms(False)
        raise ConfigError(
            "'deterministic' needs CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment before this "
            "process multiplies on a GPU for the first time; set it where Python starts"
        ) from error


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: allocated on a CUDA device, resident set of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # Linux counts in KiB


def rank_of_ranks() -> tuple[int, int]:
    """(this rank, number of ranks); (0, 1) outside a distributed run."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _is_alone() -> bool:
    return rank_of_ranks()[1] == 1


def wait_for_ranks() -> None:
    """Returns once every rank is here."""
    if not _is_alone():
        dist.barrier()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over all ranks; `tensor` itself where there is one rank."""
    if not _is_alone():
        dist.all_reduce(tensor)
    return tensor


def total_over_ranks(value: int, device: torch.device) -> float:
    """The sum of a host count over all ranks; no device work where there is one rank."""
    if _is_alone():
        return value
    return sum_over_ranks(torch.tensor(value, dtype=torch.float64, device=device)).item()


def sum_gradients_over_ranks(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Adds up every parameter's gradient over the ranks, in buckets, in place.

    Each rank's loss is already divided by the number of pairs of the whole step, so the sum is
    the gradient. A rank without a pair in the step (a short last one) takes part with zeros.
    """
    if _is_alone():
        return
    for bucket in _buckets([p for p in parameters if p.requires_grad], max_bytes=64 * 2**20):
        for parameter in bucket:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.flatten() for p in bucket if p.grad is not None])
        dist.all_reduce(flat)
        for parameter, summed in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad.copy_(summed.view_as(parameter))  # pyright: ignore[reportOptionalMemberAccess]


def _buckets(
    parameters: list[torch.nn.Parameter], max_bytes: int
) -> Iterator[list[torch.nn.Parameter]]:
    """Runs of parameters of one dtype and device, each run at most about `max_bytes`."""
    bucket: list[torch.nn.Parameter] = []
    size = 0
    for parameter in parameters:
        same_kind = bucket and (bucket[0].dtype, bucket[0].device) == (
            parameter.dtype,
            parameter.device,
        )
        n_bytes = parameter.numel() * parameter.element_size()
        if bucket and (not same_kind or size + n_bytes > max_bytes):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += n_bytes
    if bucket:
        yield bucket


def broadcast_from_rank_0(tensors: Iterable[torch.Tensor]) -> None:
    """Gives every rank rank 0's values, so that all start from the same weights."""
    if not _is_alone():
        for tensor in tensors:
            dist.broadcast(tensor.data, src=0)


def prefetch(make: Callable[[], Iterable[Item]], depth: int = 2) -> Iterator[Item]:
    """Runs the iterable `make()` in a thread, `depth` items ahead; its errors are raised here."""
    items: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()
    end = object()

    def put(item: object) -> bool:
        while not stop.is_set():
            try:
                items.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in make():
                if not put(item):
                    return
            put(end)
        except BaseException as error:  # handed to the consumer, which raises it
            put(error)

    thread = threading.Thread(target=work, name="fastdpo-prefetch", daemon=True)
    thread.start()
    try:
        while (item := items.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
