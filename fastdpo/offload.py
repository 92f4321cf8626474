"""Saved activations held in host memory between the forward and the backward pass.

On a GPU copies run on streams of their own, through pinned memory: while a layer computes, the
tensors of the layer before leave, and in the backward pass those of the next one come back. At
most `IN_FLIGHT` wait for their copy each way, so device memory holds no more than that. The host
never waits. On a CPU the copies are plain ones: same code, same bits, nothing gained.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IN_FLIGHT = 2
LEAST_BYTES = 2**20  # smaller ones are not worth a copy's fixed cost


@dataclass(eq=False)
class _Held:
    """A saved tensor on the host: its copy, and on a GPU the event after which it is whole; once
    asked for, or asked for ahead, its copy on the device and that copy's event."""

    host: Tensor
    device: torch.device
    left: torch.cuda.Event | None
    back: Tensor | None = None
    arrived: torch.cuda.Event | None = None


def takes(
    tensor: Tensor, device: torch.device, weights: frozenset[int], least_bytes: int = LEAST_BYTES
) -> bool:
    """Whether `tensor` is worth offloading: large, dense, on `device`, and no view of a weight.

    weights: addresses of the storages of parameters and buffers.
    """
    return (
        tensor.device == device
        and tensor.nbytes >= least_bytes
        and not isinstance(tensor, nn.Parameter)
        and _is_dense(tensor)
        and storage_id(tensor) not in weights
    )


def _is_dense(tensor: Tensor) -> bool:
    """Whether a copy with the same strides is as large: no gaps, nothing expanded."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def storage_id(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def storages_of(tensors: Iterable[Tensor]) -> frozenset[int]:
    return frozenset(storage_id(tensor) for tensor in tensors)


class OffloadActivations(torch.autograd.graph.saved_tensors_hooks):
    """A context for forward passes of `model`: what autograd saves in it goes to the host.

    A tensor that several operations save is held once. Gradients are bitwise those without it.
    """

    def __init__(self, model: nn.Module, *, least_bytes: int | None = None):
        device = next(p.device for p in model.parameters())
        self.device = device
        self.least_bytes = LEAST_BYTES if least_bytes is None else least_bytes
        self.weights = storages_of([*model.parameters(), *model.buffers()])
        self.host_bytes = 0  # held at most, over the passes so far
        self._now = 0
        self._order: list[weakref.ref[_Held]] = []  # as they were saved
        self._places: dict[int, int] = {}  # id of a held tensor -> place in `_order`
        self._known: dict[tuple, tuple[Any, weakref.ref[_Held]]] = {}
        self._leaving: deque[tuple[torch.cuda.Event, Tensor]] = deque()
        self._streams = (
            (torch.cuda.Stream(device), torch.cuda.Stream(device))
            if device.type == "cuda"
            else None
        )
        super().__init__(self._pack, self._unpack)

    def __enter__(self) -> None:
        self._known.clear()
        self._order = [held for held in self._order if held() is not None]
        self._places = {id(held()): place for place, held in enumerate(self._order)}
        super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._known.clear()

    # ---- forward: to the host ---------------------------------------------------------------

    def _pack(self, tensor: Tensor) -> Tensor | _Held:
        if not takes(tensor, self.device, self.weights, self.least_bytes):
            return tensor.detach()  # an output that is saved must not hold its own graph
        storage = tensor.untyped_storage()
        # A storage that is still alive and was not written to since holds the same numbers.
        key = (storage._cdata, tensor._version, tensor.storage_offset(), tensor.dtype)
        key += (tuple(tensor.shape), tensor.stride())
        known = self._known.get(key)
        if known is not None and known[0]() is not None and (held := known[1]()) is not None:
            return held
        held = self._send(tensor)
        self._known[key] = (weakref.ref(storage), weakref.ref(held))
        self._places[id(held)] = len(self._order)
        self._order.append(weakref.ref(held))
        self._now += tensor.nbytes
        self.host_bytes = max(self.host_bytes, self._now)
        weakref.finalize(held, self._release, tensor.nbytes)
        return held

    def _release(self, n_bytes: int) -> None:
        self._now -= n_bytes

    def _send(self, tensor: Tensor) -> _Held:
        source = tensor.detach()
        if self._streams is None:
            return _Held(source.clone(memory_format=torch.preserve_format), self.device, None)
        out, _ = self._streams
        host = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu", pin_memory=True
        )
        while len(self._leaving) >= IN_FLIGHT:  # what follows may reuse its memory after the copy
            event, _left = self._leaving.popleft()
            torch.cuda.current_stream(self.device).wait_event(event)
        out.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(out):
            host.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(out)
        self._leaving.append((event, source))
        return _Held(host, self.device, event)

    # ---- backward: back to the device -------------------------------------------------------

    def _unpack(self, held: Tensor | _Held) -> Tensor:
        if isinstance(held, Tensor):
            return held
        if self._streams is None:
            return held.host
        while self._leaving:
            event, _left = self._leaving.popleft()
            torch.cuda.current_stream(self.device).wait_event(event)
        self._fetch(held)
        place = self._places.get(id(held), 0)
        for earlier in self._order[max(place - IN_FLIGHT + 1, 0) : place]:  # asked for next
            if (ahead := earlier()) is not None:
                self._fetch(ahead)
        assert held.back is not None and held.arrived is not None
        torch.cuda.current_stream(self.device).wait_event(held.arrived)
        return held.back

    def _fetch(self, held: _Held) -> None:
        if held.back is not None:
            return
        assert self._streams is not None and held.left is not None
        _, back = self._streams
        held.back = torch.empty_strided(
            held.host.shape, held.host.stride(), dtype=held.host.dtype, device=held.device
        )
        held.back.record_stream(back)  # should it be let go before anyone waits for it
        back.wait_stream(torch.cuda.current_stream(self.device))
        back.wait_event(held.left)
        with torch.cuda.stream(back):
            held.back.copy_(held.host, non_blocking=True)
            held.arrived = torch.cuda.Event()
            held.arrived.record(back)
