"""Errors in what lies on a GPU: looked for without waiting for it, raised by a later call.

The op copies what is to be looked at behind the work that it launches; the first later call (or
backward) that finds the copy complete looks at it on the host. Until then the kernels themselves
stay inside their memory, and what cannot be computed is NaN. Whoever makes the last call, or waits
for the device anyway, asks for what is still under way: `raise_pending`.
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


def looks_later(device: torch.device) -> bool:
    """Whether values there are looked at later, by `check_later`: on CUDA devices, which nobody
    waits for. On others (a CPU, mps, xpu) the op looks at once; meta tensors have no values."""
    return device.type in ("cuda", "meta")


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


def raise_pending(wait: bool = True) -> None:
    """Raises the ValueError of an earlier call on a CUDA device, if values there were bad.

    Targets, bounds and pairs on a GPU are looked at when their copies have arrived on the host; the
    op itself waits for nothing, and a later call raises. Call this where you wait for the device
    anyway (a log, an evaluation's end, a checkpoint, the end of training), so that what was wrong
    in the last calls is named too, and before NaN is blamed on something else:

        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            fastdpo_kernels.raise_pending()
            print(loss.item())

    Args:
        wait: for the copies of all earlier calls, and so for the device up to the last of those
            calls; else only what has arrived is looked at.

    The calls after a bad one are looked at by the next `raise_pending`. It does nothing where no
    GPU was used, and while a CUDA graph is captured: asking an event would spoil that, so reports
    wait until after.
    """
    if _pending and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    while report := _next(wait):
        done, look, copies = report
        if wait:
            done.synchronize()
        try:
            look(*copies)
        except ValueError as error:
            raise ValueError(f"in an earlier call, {error}") from None


def raise_late() -> None:
    """What every call and backward begins with: `raise_pending`, waiting for nothing."""
    raise_pending(wait=False)


def _next(wait: bool) -> tuple[Any, Callable[..., None], tuple[Tensor, ...]] | None:
    """Takes the oldest report, if its copies have arrived or are waited for: whoever asked takes
    that one."""
    with _taking:
        return _pending.popleft() if _pending and (wait or _pending[0][0].query()) else None
