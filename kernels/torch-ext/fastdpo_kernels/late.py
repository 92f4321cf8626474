"""Errors in what lies on a GPU: looked for without waiting for it, raised by a later call.

The op copies what is to be looked at behind the work that it launches; the first later call (or
backward) that finds the copy complete looks at it on the host. Until then the kernels themselves
stay inside their memory, and what cannot be computed is NaN.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Copies on their way from a GPU, oldest first: (event, what looks at them, the copies).
_pending: deque[tuple[Any, Callable[..., None], tuple[Tensor, ...]]] = deque()
_taking = threading.Lock()  # autograd has threads of its own, one a device


def check_later(look: Callable[..., None], *tensors: Tensor) -> None:
    """Lets a later `raise_late` call `look` with copies of these CUDA tensors on the host.

    `look` raises ValueError for what it does not like. Nothing is looked at while a CUDA graph is
    captured: its inputs change from replay to replay.
    """
    if tensors[0].device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return
    copies = []
    for tensor in tensors:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        copies.append(copy.copy_(tensor.contiguous(), non_blocking=True))
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(tensors[0].device))
    _pending.append((done, look, tuple(copies)))


def raise_late() -> None:
    """Raises the ValueError of an earlier call whose copies have arrived; waits for none.

    Asking an event would spoil a CUDA graph that is being captured: reports wait until after.
    """
    if _pending and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    while arrived := _arrived():
        _, look, copies = arrived
        try:
            look(*copies)
        except ValueError as error:
            raise ValueError(f"in an earlier call, {error}") from None


def _arrived() -> tuple[Any, Callable[..., None], tuple[Tensor, ...]] | None:
    """Takes the oldest report, if its copies have arrived: whoever asked takes that one."""
    with _taking:
        return _pending.popleft() if _pending and _pending[0][0].query() else None
