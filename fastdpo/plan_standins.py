"""What stands in, on fake tensors, for kernels that only run on real ones: how much they allocate.

Sizes are those of the implementations named beside each; no numbers are computed here.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo_kernels.impls import is_factored
from fastdpo_kernels.linear_logps_eager import is_tiny
from fastdpo_kernels.linear_logps_torch_tiles import Head, may_keep, tile_bytes, tile_shape

from .batch import PackLayout
from .fp8 import Fp8Linear

# ---- attention on a GPU -----------------------------------------------------------------------


@torch.library.custom_op("fastdpo::planned_attention", mutates_args=())
def planned_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q [T, H, D], k and v [T_k, H_kv, D] -> out [T, H, D] and its log-sum-exps [H, T] fp32, as
    variable-length flash attention returns and saves them."""
    raise NotImplementedError("a plan runs on fake tensors")


@planned_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, *output)


def _attention_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, _, lse = ctx.saved_tensors
    summed = torch.empty_like(lse)  # flash attention 2: rows of dO . O, and dQ summed in fp32
    dq_fp32 = q.new_empty(q.shape, dtype=torch.float32)
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    del summed, dq_fp32
    return gradients


planned_attention.register_autograd(_attention_backward, setup_context=_save)


def run_planned_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, **options: Any
) -> Tensor:
    """In the place of `attention._varlen_attn` and `_flash_attention_2`."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    return planned_attention(q, k, v)[0]


# ---- the head ---------------------------------------------------------------------------------


class PlannedHead(torch.autograd.Function):
    """In the place of `linear_logps`: what it keeps, returns and borrows.

    hidden [N, D], weight [V, D] -> [N]. rounded: the dtype that operands are computed in. With an
    `adapter` [V, r], which is trained in the weight's place, hidden is what `beside_adapter`
    returns.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        adapter: Tensor | None,
        rounded: torch.dtype,
        workspace_bytes: int,
        triton: bool,
    ) -> Tensor:
        n, d = hidden.shape
        out = torch.promote_types(rounded, torch.float32)
        logps = hidden.new_empty(n, dtype=out)
        unscaled = hidden.new_empty(n, d, dtype=rounded) if hidden.requires_grad else None
        of_head = weight if adapter is None else adapter
        trained = of_head.requires_grad
        vectors = [hidden.new_empty(n, dtype=out) for _ in range(2 if triton else 3) if trained]
        if unscaled is not None and is_factored(rounded):
            vectors.append(hidden.new_empty(n, dtype=out))
        kept, borrowed, ctx.borrowed = _head_bytes(
            hidden, weight, adapter, rounded, workspace_bytes, trained, triton
        )
        saved = [hidden.new_empty(kept, dtype=torch.uint8)] if kept else []
        _borrow(hidden, borrowed)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(unscaled, *([hidden, weight] if trained else []), *vectors, *saved)
        ctx.hidden_dtype, ctx.trained = hidden.dtype, trained
        ctx.like, ctx.has_adapter = (of_head.shape, of_head.dtype), adapter is not None
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        unscaled = ctx.saved_tensors[0]
        hidden_grad = (unscaled * 1.0).to(ctx.hidden_dtype) if unscaled is not None else None
        weight_grad = None
        if ctx.trained:
            shape, dtype = ctx.like
            weight_grad = grads[0].new_empty(shape, dtype=dtype)
            _borrow(weight_grad, ctx.borrowed)
        of_head = (None, weight_grad) if ctx.has_adapter else (weight_grad, None)
        return hidden_grad, *of_head, None, None, None


def _borrow(like: Tensor, n_bytes: int) -> None:
    like.new_empty(n_bytes, dtype=torch.uint8)


def _head_bytes(
    hidden: Tensor,
    weight: Tensor,
    adapter: Tensor | None,
    rounded: torch.dtype,
    workspace_bytes: int,
    trained: bool,
    triton: bool,
) -> tuple[int, int, int]:
    """(bytes of E kept for the weight's gradient, bytes borrowed forward, backward):
    linear_logps_torch.py's own division of its workspace, where a kept E needs no tile backward; a
    tiny head's one matrix [N, V]; for Triton all that a single chunk could use, within the
    bound."""
    (n, v), vector = (len(hidden), len(weight)), 4
    if triton:
        size = vector if rounded == torch.float32 else 2
        whole = n * v * size
        kept = whole if trained and whole + 64 * n + 2**24 <= workspace_bytes else 0
        borrowed = min(workspace_bytes - kept, whole + 64 * n + 2**24)
        return kept, borrowed, borrowed
    joined = adapter is not None
    if is_tiny(hidden, weight, rounded, joined=joined, workspace_bytes=workspace_bytes):
        size = torch.promote_types(rounded, torch.float32).itemsize
        rest = size * 4 * hidden.numel()  # hidden, W[y], their product and the gradient
        whole = size * n * v
        return (whole, rest, rest) if trained else (0, rest + whole, 0)
    head = Head(
        weight=weight,
        bias=None,
        adapter=adapter,
        softcap=None,
        scale=1.0,
        temperature=1.0,
        rounded=rounded,
    )
    size = head.dtype.itemsize
    keep = trained and may_keep(head, n, workspace_bytes, head.tiles)
    kept = n * v * size if keep else 0
    tile = tile_shape(head, n, workspace_bytes - kept, head.tiles)
    borrowed = tile_bytes(head, *tile, head.tiles)
    if not kept:
        return 0, borrowed, borrowed
    tile = tile_shape(head, n, workspace_bytes - kept, 0)
    return kept, borrowed, tile_bytes(head, *tile, 0)


# ---- quantized weights ------------------------------------------------------------------------


class PlannedQuantizedLinear(nn.Linear):
    """In the place of bitsandbytes' Linear4bit and Linear8bitLt: the weight is `stored` bytes, and
    every product, forward and backward, first makes a copy of it in the operands' dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return _QuantizedProduct.apply(input, self.weight, self.bias)  # pyright: ignore


class PlannedFp8Linear(Fp8Linear):
    """`Fp8Linear` as it is where its kernel can run."""

    @property
    def has_kernel(self) -> bool:
        return True


class _QuantizedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = x.dtype
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        ctx.like = (weight.shape, dtype, x.dtype)
        unpacked = x.new_empty(weight.shape, dtype=dtype)
        return nn.functional.linear(x.to(dtype), unpacked, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        shape, dtype, of_input = ctx.like
        unpacked = grads[0].new_empty(shape, dtype=dtype)
        return (grads[0].to(dtype) @ unpacked).to(of_input), None, None


def quantized_bytes(n_in: int, n_out: int, bits: int, nested: bool = False) -> int:
    """Bytes that bitsandbytes holds for a weight [n_out, n_in].

    8 bits: a byte each and an fp32 scale a row. 4 bits: half a byte each and an fp32 scale a block
    of 64; nested: a byte a block, an fp32 scale for 256 of those, and an offset.
    """
    n = n_in * n_out
    if bits == 8:
        return n + 4 * n_out
    blocks = -(-n // 64)
    scales = blocks + 4 * -(-blocks // 256) + 4 + 1024 if nested else 4 * blocks
    return -(-n // 2) + scales + 64  # and the 16 values of the format, fp32


# ---- experts ----------------------------------------------------------------------------------


def _grouped_product(
    a: Tensor,
    b: Tensor,
    offsets: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """In the place of `aten::_grouped_mm`, whose own shape function takes bf16 alone.

    Which expert a row goes to is not asked: the rows are as many wherever they go, and so memory
    does not depend on the route.
    """
    if a.dim() == b.dim() == 2:  # the weights' gradient, whole whoever was chosen
        assert offsets is not None
        shape = (len(offsets), a.shape[0], b.shape[1])
    else:
        shape = (*a.shape[:-1], b.shape[-1])
    return a.new_empty(shape, dtype=out_dtype or a.dtype)


STANDINS = {torch.ops.aten._grouped_mm.default: _grouped_product}


# ---- activations on the host ------------------------------------------------------------------


class PlannedOffload(torch.autograd.graph.saved_tensors_hooks):
    """In the place of offload.OffloadActivations: what it takes is freed, and is back when asked
    for; two tensors are on their way at a time."""

    def __init__(self, takes: Any, in_flight: int):
        self.host_bytes = 0
        going: deque[Tensor] = deque(maxlen=in_flight)

        def pack(tensor: Tensor) -> Any:
            if not takes(tensor):
                return tensor
            self.host_bytes += tensor.nbytes
            going.append(tensor)
            return tensor.shape, tensor.stride(), tensor.dtype

        def unpack(packed: Any) -> Tensor:
            going.clear()
            if isinstance(packed, Tensor):
                return packed
            shape, stride, dtype = packed
            return torch.empty_strided(shape, stride, dtype=dtype)

        super().__init__(pack, unpack)
