"""Which implementation of an op can run here and why not, and what each of them returns.

An op `x` has a public file `x.py` and implementation files `x_torch.py`, `x_triton.py`. This file
knows devices and packages, not mathematics, and chooses nothing by speed: `tuning.py` does.
"""

import functools
import importlib.util
import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

logger = logging.getLogger("fastdpo_kernels")

IMPLS = ("auto", "torch", "triton", "reference")
STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
_NATIVE: Any = torch._C
_OLDER_VMAP = _NATIVE._parse_dispatch_key("Batched")  # which the enum's Python side leaves out


@dataclass(frozen=True)
class TokenStats:
    """Non-differentiable statistics of each token's distribution; None for those not asked for.

    `entropy` [N] in nat; `mean_logits` [N], the mean over the vocabulary of the transformed
    logits; `is_top1` [N] bool, whether the target is the first of the largest logits;
    `log_sum_sq_probs` [N], log(sum_v p_v^2). Rows whose target is `ignore_index` hold 0 and False;
    NaN and False where one that was not looked at, on a GPU, is outside the vocabulary.
    """

    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None


@dataclass(frozen=True)
class ForwardResult:
    """What an implementation of `linear_logps` hands back from its forward.

    `token_logps` [N] fp32 (fp64 for fp64 inputs), 0 for ignored rows, NaN where a target that was
    not looked at, on a GPU, is outside the vocabulary. `hidden_grad` [N, D], in the dtype of
    `hidden`: the derivative of each token's log-prob with respect to its own hidden row, not yet
    multiplied by the incoming gradient; None if not asked for. Where `is_factored`, it is that
    divided by `hidden_factor` [N] fp32, slope * (1 - p_y), and 0 where that is 0. `saved`: what
    the implementation's own `weight_grad` wants to see again (empty if no gradient of weight or
    bias is due).
    """

    token_logps: Tensor
    hidden_grad: Tensor | None
    hidden_factor: Tensor | None
    saved: tuple[Tensor, ...]
    stats: TokenStats | None


@dataclass(frozen=True)
class PreferenceForward:
    """What an implementation of `preference_loss` hands back: all [P] but `logps` [R].

    fp32 (fp64 for fp64 inputs).
    `chosen_slope` and `rejected_slope` are the derivatives of each pair's loss with respect to the
    summed log-probs of its chosen and of its rejected response.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    logps: Tensor
    chosen_slope: Tensor
    rejected_slope: Tensor


def is_factored(rounded: torch.dtype) -> bool:
    """Whether an unscaled gradient in this dtype needs a factor per row beside it: the gradient of
    a likely token is below fp16's range, and the loss scale that is to save it comes later."""
    return rounded == torch.float16


def adapter_parts(rounded: torch.dtype) -> int:
    """Numbers of this dtype that hold an adapter's inner product: 16 bits take a second one, the
    rounding error of the first."""
    return 2 if rounded.itemsize == 2 else 1


def is_transformed(tensor: Tensor) -> bool:
    """Whether a torch.func transform (vmap, grad, jvp) is looking at the tensor, or the older vmap
    behind `is_grads_batched` and `jacobian(vectorize=True)`."""
    if _NATIVE._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return _NATIVE._dispatch_keys(tensor).has(_OLDER_VMAP)


def has_tangent(tensor: Tensor | None) -> bool:
    """Whether forward-mode differentiation (torch.autograd.forward_ad) goes through the tensor."""
    return tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is on: all that an op in a graph can see of it."""
    return forward_ad._current_level >= 0


def triton_interprets() -> bool:
    """Whether Triton's interpreter is on: its kernels then run on CPU tensors, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def why_not_triton(device: torch.device, *dtypes: torch.dtype) -> str | None:
    """Returns why Triton cannot serve tensors of these dtypes on this device, None if it can."""
    if not _triton_installed():
        return "the triton package is not installed"
    if any(dtype not in (torch.float32, torch.float16, torch.bfloat16) for dtype in dtypes):
        return f"it serves float32, float16 and bfloat16, not {_names(dtypes)}"
    if device.type == "cpu":
        if not triton_interprets():
            return "it needs a GPU (or TRITON_INTERPRET=1, to test on a CPU)"
        return None
    if device.type != "cuda":
        return f"it serves CUDA devices, not {device.type!r}"
    if torch.version.hip is not None:
        return "AMD GPUs (ROCm) have no table of tiles yet"
    index = torch.cuda.current_device() if device.index is None else device.index
    major, minor = _capability(index)
    if (major, minor) < (8, 0):
        return f"it needs compute capability 8.0 (Ampere, bf16) or newer, this is {major}.{minor}"
    return None


def choose_impl(op: str, requested: str, device: torch.device, *dtypes: torch.dtype) -> str:
    """Returns "torch", "triton" or "reference"; only "auto" chooses, and logs its choice once.

    Raises ValueError for an unknown name and RuntimeError if Triton is asked for by name where it
    cannot run.
    """
    if requested not in IMPLS:
        raise ValueError(f"{op}: impl={requested!r} is unknown; expected one of {', '.join(IMPLS)}")
    if requested in ("torch", "reference"):
        return requested
    reason = why_not_triton(device, *dtypes)
    if requested == "triton":
        if reason is not None:
            raise RuntimeError(
                f'{op}: impl="triton" cannot run here: {reason}; use impl="auto" or "torch"'
            )
        return "triton"
    if device.type == "cpu":
        reason = "CPU tensors"
    chosen = "torch" if reason else "triton"
    log_choice(op, chosen, device, reason, *dtypes)
    return chosen


@functools.cache
def log_choice(
    op: str, impl: str, device: torch.device, reason: str | None, *dtypes: torch.dtype
) -> None:
    """Says once what `impl="auto"` came to."""
    why = f" ({reason})" if reason else ""
    logger.info("%s: impl=auto runs %s on %s %s%s", op, impl, device.type, _names(dtypes), why)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))
