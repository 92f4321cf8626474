"""What the tests of `linear_logps` share: variants, and ways of looking inside."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdpo_kernels import linear_logps_torch
from tests.numerics import Head, peaked_head

TRANSFORMS = {
    "plain": {},
    "scaled": {"scale": 0.3, "temperature": 0.8},
    "softcap": {"softcap": 15.0, "scale": 1.7, "temperature": 1.3},
}
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Small enough for several tiles each way at the sizes here, large enough for the least tile.
SMALL = 2 * 2**20


def saved_kept(head: Head, workspace_bytes: int) -> bool:
    result = linear_logps_torch.forward(
        head.hidden,
        head.weight,
        head.targets,
        rounded=head.hidden.dtype,
        adapter=None,
        bias=None,
        softcap=None,
        scale=1.0,
        temperature=1.0,
        ignore_index=-100,
        stats=(),
        need_hidden_grad=True,
        need_weight_grad=True,
        need_bias_grad=False,
        keep=True,
        workspace_bytes=workspace_bytes,
    )
    return len(result.saved) == 4


def _bytes(event: Any) -> int:
    return event.nbytes()  # of a "[memory]" event: negative when freed


def peak_bytes(run_it) -> int:
    """The largest sum of live allocations that `run_it` made, by the allocator's own account."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run_it()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), _bytes(e)) for e in events if e.name() == "[memory]"]
    live = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        live += change
        peak = max(peak, live)
    return peak


class CountMatmuls(TorchDispatchMode):
    """Adds up the multiplications of every matrix product."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.addmm_, torch.ops.aten.addmm):
            self.products += result.numel() * args[1].shape[1]
        elif func.overloadpacket in (
            torch.ops.aten.mm,
            torch.ops.aten.bmm,
            torch.ops.mkldnn._linear_pointwise,
        ):
            self.products += result.numel() * args[0].shape[-1]
        return result


class Sizes(TorchDispatchMode):
    """The bytes of all memory that operators made, once each."""

    def __init__(self):
        super().__init__()
        self.made: dict[int, Any] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if is_tensor(x)}
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.set_:  # the interpreter's view of an argument
            return result
        for x in filter(is_tensor, tree_leaves(result)):
            storage = x.untyped_storage()
            if storage._cdata not in given:
                self.made[storage._cdata] = storage  # held, so that no other gets its place
        return result


# ---- every choice of what is trained


class Trained:
    """A head with a bias, in fp32, and (r > 0) an adapter of rank r on it; any of it trained."""

    def __init__(self, n: int, d: int, v: int, r: int):
        self.n, self.d, self.v, self.r = n, d, v, r
        self.head = peaked_head(n, d, v, bias=True, ignored=0.1)
        rng = torch.Generator().manual_seed(1)
        of_head = {"hidden": self.head.hidden, "weight": self.head.weight, "bias": self.head.bias}
        self.inputs: dict[str, Any] = of_head | {
            "A": torch.randn(r, d, generator=rng) / d**0.5,
            "B": torch.randn(v, r, generator=rng) / max(r, 1) ** 0.5,
        }

    def subsets(self) -> Iterator[tuple[str, ...]]:
        names = ("hidden", "A", "B", "bias") if self.r else ("hidden", "weight", "bias")
        for size in range(len(names) + 1):
            yield from itertools.combinations(names, size)

    def forward(self, op, wanted: tuple[str, ...], **options) -> tuple[Tensor, list[Tensor]]:
        """Log-probs, and what is trained."""
        leaves = {k: t.detach().requires_grad_(k in wanted) for k, t in self.inputs.items()}
        lora = (leaves["A"], leaves["B"], 2.0) if self.r else None
        logps = op(
            leaves["hidden"], leaves["weight"], self.head.targets, bias=leaves["bias"], lora=lora,
            **options,
        )  # fmt: skip
        assert logps.requires_grad == bool(wanted)
        return logps, [leaves[name] for name in wanted]

    def gradients(self, op, wanted: tuple[str, ...], **options) -> dict[str, Tensor]:
        logps, leaves = self.forward(op, wanted, **options)
        grads = torch.autograd.grad(logps, leaves, self.head.grad) if wanted else ()
        return dict(zip(wanted, grads, strict=True))

    def least_workspace(self, op, wanted: tuple[str, ...], tried: Sequence[int]) -> int:
        """The first that the forward pass takes; raises if it does not do for the backward pass."""
        for workspace in tried:
            try:
                logps, leaves = self.forward(op, wanted, workspace_bytes=workspace)
            except ValueError as error:
                assert "raise workspace_bytes" in str(error)
                continue
            grads = torch.autograd.grad(logps, leaves, self.head.grad)
            assert all(grad.isfinite().all() for grad in grads)
            return workspace
        raise AssertionError(f"none of {tried} was enough")

    def products(self, wanted: tuple[str, ...], *, kept: bool) -> int:
        """Multiplications with the matrix [V, D], or [V, D + r]: the logits; d hidden, through
        which A gets its gradient; for a gradient of the head the logits again, unless E was kept;
        dW or dB. The bias's own gradient takes none."""
        width = self.d + self.r
        columns = width
        columns += width * bool({"hidden", "A"} & {*wanted})
        columns += width * (not kept and bool({"weight", "B", "bias"} & {*wanted}))
        columns += self.d * ("weight" in wanted) + self.r * ("B" in wanted)
        return self.n * self.v * columns

    def result_bytes(self, wanted: tuple[str, ...]) -> int:
        """Of the log-probs, the gradients, and two dozen vectors [N]. Gradients of hidden exist
        unscaled and returned; beside an adapter also the hidden states with u, and so on."""
        floats = 48 * self.n
        floats += 2 * self.n * self.d * ("hidden" in wanted)
        floats += 7 * self.n * (self.d + self.r) * bool(self.r)
        floats += self.v * self.d * ("weight" in wanted) + 2 * self.v * self.r * ("B" in wanted)
        floats += 2 * self.v * ("bias" in wanted)
        return 4 * floats
