"""Counts the bytes of live tensors, by kind, as operations allocate and free them.

Works alike on real tensors and on fake ones (torch's FakeTensorMode), which have sizes but no
memory. It sees what operations return; what a kernel borrows inside, nobody sees from here.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

WORKSPACE = "workspace"
GRADIENTS = "gradients"
BOUNDARIES = "layer boundaries"
ACTIVATIONS = (*("attention", "MLP", "norms", "LoRA"), BOUNDARIES, "log-probs")
_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)
_GROUPED, _SCALED = torch.ops.aten._grouped_mm, torch.ops.aten._scaled_mm


class MemoryTracker(TorchDispatchMode):
    """Peak bytes of tensors made while it is on, and what they were made for.

    kinds: live bytes by kind. peaks: by phase, the kinds at the phase's highest moment. flops: of
    products of matrices, attention's left out. A storage is of the kind that is on top of
    `stack` when it is made. `granularity`: sizes are rounded up to it, as a device's allocator
    does. `standins`: what is called in the place of an operation.
    """

    def __init__(
        self, granularity: int = 1, standins: Mapping[Any, Callable[..., Tensor]] | None = None
    ):
        super().__init__()
        self.standins = standins or {}
        self.granularity = granularity
        self.kinds: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        self.flops = 0
        self.phase = "step"
        self.stack = [WORKSPACE]
        self._now = 0
        self._highest: dict[str, int] = {}
        self._live: dict[int, tuple[str, int, Any]] = {}  # by storage: kind, bytes, weak reference

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leaves storages out that were there before."""
        for tensor in tensors:
            self._add(tensor.untyped_storage(), "", 0)

    def retag(self, tensor: Tensor, kind: str) -> None:
        """Moves the storage of `tensor` to another kind; adds it if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._live:
            self._add(storage, kind, self._size(storage))
            return
        old, size, reference = self._live[key]
        self.kinds[old] -= size
        self.kinds[kind] += size
        self._live[key] = (kind, size, reference)

    def mark(self, phase: str) -> None:
        """From here on peaks belong to `phase`; what is live belongs to its peak too."""
        self.phase = phase
        self._note_peak()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run: Callable[..., Any] = self.standins[func] if func in self.standins else func
        out = run(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._live:
                    self._add(storage, self.stack[-1], self._size(storage))
        packet = func._overloadpacket
        if packet in _PRODUCTS:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif packet is _SCALED:  # of 8 bits, at twice the rate of 16
            self.flops += args[0].numel() * args[1].shape[-1]
        elif packet is _GROUPED:  # every row by one matrix
            self.flops += 2 * args[0].numel() * args[1].shape[-1]
        return out

    def _size(self, storage: torch.UntypedStorage) -> int:
        return -(-storage.nbytes() // self.granularity) * self.granularity

    def _add(self, storage: torch.UntypedStorage, kind: str, size: int) -> None:
        key = storage._cdata
        reference = weakref.ref(storage, lambda _: self._free(key))
        self._live[key] = (kind, size, reference)
        self.kinds[kind] += size
        self._now += size
        self._note_peak()

    def _note_peak(self) -> None:
        if self._now > self._highest.get(self.phase, -1):
            self._highest[self.phase] = self._now
            self.peaks[self.phase] = self.kinds.copy()

    def _free(self, key: int) -> None:
        kind, size, _ = self._live.pop(key)
        self.kinds[kind] -= size
        self._now -= size

    @property
    def peak(self) -> int:
        """The highest number of live bytes so far, over all phases."""
        return max(self._highest.values(), default=0)


def kind_of_module(name: str, module: nn.Module, inside: str) -> str:
    """The kind of what `module` allocates; `inside` is the kind of its parent."""
    cls = type(module).__name__.lower()
    if ".lora_" in name:
        return "LoRA"
    if "norm" in cls:
        return "norms"
    if "attention" in cls or "attn" in cls:
        return "attention"
    if "mlp" in cls or "moe" in cls or "expert" in cls:
        return "MLP"
    return inside


def label_modules(model: nn.Module, tracker: MemoryTracker) -> Callable[[], None]:
    """Hooks that tell `tracker` which module is running; returns what takes them off again."""
    handles = []

    def hooks(kind: str) -> tuple[Callable, Callable]:
        def enter(*_: Any) -> None:
            tracker.stack.append(kind)

        def leave(*_: Any) -> None:
            tracker.stack.pop()

        return enter, leave

    def visit(module: nn.Module, name: str, inside: str) -> None:
        kind = kind_of_module(name, module, inside)
        enter, leave = hooks(kind)
        handles.append(module.register_forward_pre_hook(enter))
        # Also where a recomputation stops halfway, by an exception of torch's own.
        handles.append(module.register_forward_hook(leave, always_call=True))
        for child, of in module.named_children():
            visit(of, f"{name}.{child}", kind)

    visit(model, "", BOUNDARIES)

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove
