"""What of a run's measured peak is what: bytes of tensors that are there, each storage once.

Sizes are read off tensors on the host; nothing waits for a device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .accumulate import Fp32Accumulation
from .reference_logps import AdapterReference

if TYPE_CHECKING:
    from .trainer import DPOTrainer

WEIGHTS, ADAPTERS, GRADIENTS = "weights", "adapters", "gradients"
STATES, REFERENCE = "optimizer states", "reference"
MOVING = "activations and workspace"


def gradient_bytes(trainer: DPOTrainer) -> int:
    """Bytes of whole gradients: called after a step's last backward pass, before its update."""
    sums = trainer.gradients.sums if isinstance(trainer.gradients, Fp32Accumulation) else {}
    tensors = [*(p.grad for p in trainer.trainable), *sums.values()]
    return _Count(trainer.device).add(tensor for tensor in tensors if tensor is not None)


def held_bytes(trainer: DPOTrainer) -> dict[str, int]:
    """Bytes by kind of what lives from one step to the next."""
    count, model = _Count(trainer.device), trainer.model
    live, has_adapter = trainer.live_reference, isinstance(model, PeftModel)
    name = live.adapter if isinstance(live, AdapterReference) else None
    tensors: dict[str, list[Tensor]] = {WEIGHTS: [], ADAPTERS: [], REFERENCE: []}
    for key, parameter in model.named_parameters():
        kind = ADAPTERS if has_adapter and parameter.requires_grad else WEIGHTS
        if name is not None and f".{name}." in f"{key}.":
            kind = REFERENCE
        tensors[kind] += _stored(parameter)
    tensors[WEIGHTS] += model.buffers()
    if live is not None:
        tensors[REFERENCE] += _stored_in(live.model)  # the policy's own are counted already
    found = {kind: count.add(of) for kind, of in tensors.items()}
    assert trainer.optimizer is not None
    states = tree_leaves([dict(state) for state in trainer.optimizer.state.values()])
    found[STATES] = count.add(s for s in states if isinstance(s, Tensor) and not _is_paged(s))
    return found


def by_kind(peak: int, held: dict[str, int], gradients: int) -> dict[str, int]:
    """`held`, whole gradients, and the rest of the `peak`."""
    known = {**held, GRADIENTS: gradients}
    return {**known, MOVING: max(peak - sum(known.values()), 0)}


class _Count:
    """Bytes of storages on `device` that were not counted before."""

    def __init__(self, device: torch.device):
        self.type = device.type
        self.seen: set[int] = set()

    def add(self, tensors: Iterable[Tensor]) -> int:
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if tensor.device.type == self.type and storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                total += storage.nbytes()
        return total


def _stored_in(model: nn.Module) -> list[Tensor]:
    return [*(t for p in model.parameters() for t in _stored(p)), *model.buffers()]


def _stored(parameter: Any) -> Iterator[Tensor]:
    """A parameter, and what bitsandbytes keeps beside one: scales of 4-bit and 8-bit blocks."""
    yield parameter
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        yield from (value for value in vars(state).values() if isinstance(value, Tensor))
        state = getattr(state, "state2", None)
    if isinstance(scales := getattr(parameter, "SCB", None), Tensor):
        yield scales


def _is_paged(tensor: Any) -> bool:
    """In bitsandbytes' managed memory, which torch's allocator doesn't count."""
    return bool(getattr(tensor, "is_paged", False))
