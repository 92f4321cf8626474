"""What goes into `preference_loss`: each argument, how they fit each other, and their values.

Values on a CUDA device are looked at later (`late.py`).
"""

import functools
import math

import torch
from torch import Tensor

from .checks import check_number, check_plain, check_range
from .impls import is_transformed
from .late import check_later, looks_later, raise_late

LOSS_TYPES = ("sigmoid", "ipo", "hinge")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TRANSFORMED = (
    "preference_loss does not work under torch.func transforms (vmap, grad, jvp): "
    "call it on the whole pack, its pairs are independent"
)


def check(
    token_logps: Tensor,
    cu_responses: Tensor,
    pairs: Tensor,
    ref_token_logps: Tensor | None,
    ref_logps: Tensor | None,
) -> None:
    if (ref_token_logps is None) == (ref_logps is None):
        given = "neither" if ref_logps is None else "both"
        raise ValueError(
            f"preference_loss: give ref_token_logps [N] or ref_logps [R], got {given}; without a "
            "reference, or to score it itself, give zeros"
        )
    expected = {
        "token_logps": (token_logps, _FLOATS, 1),
        "cu_responses": (cu_responses, (torch.int32,), 1),
        "pairs": (pairs, (torch.int64,), 2),
    }
    if ref_token_logps is not None:
        expected["ref_token_logps"] = (ref_token_logps, _FLOATS, 1)
    if ref_logps is not None:
        expected["ref_logps"] = (ref_logps, _FLOATS, 1)
    for name, (tensor, dtypes, dims) in expected.items():
        check_plain("preference_loss", name, tensor)
        if tensor.dtype not in dtypes:
            wanted = "a float dtype" if dtypes is _FLOATS else dtypes[0]
            raise TypeError(f"preference_loss: {name} must be {wanted}, got {tensor.dtype}")
        if tensor.ndim != dims:
            shape = tuple(tensor.shape)
            raise ValueError(f"preference_loss: {name} must have {dims} dimension(s), got {shape}")
        if tensor.device != token_logps.device:
            raise ValueError(
                f"preference_loss: {name} is on {tensor.device}, token_logps on "
                f"{token_logps.device}; move one to the other's device"
            )
        if not torch.compiler.is_compiling() and is_transformed(tensor):
            raise RuntimeError(TRANSFORMED)
    if token_logps.device.type == "mps":
        raise TypeError(
            "preference_loss: it sums in float64, which mps devices lack; pass all of it .cpu()"
        )
    n, r = len(token_logps), len(cu_responses) - 1
    if r < 0:
        raise ValueError(
            "preference_loss: cu_responses is empty; it holds R + 1 bounds, from 0 to N"
        )
    if pairs.shape[1] != 2:
        raise ValueError(f"preference_loss: pairs must be [P, 2], got {tuple(pairs.shape)}")
    if ref_token_logps is not None and len(ref_token_logps) != n:
        raise ValueError(
            f"preference_loss: expected N={n} ref_token_logps, got {len(ref_token_logps)}"
        )
    if ref_logps is not None and len(ref_logps) != r:
        raise ValueError(
            f"preference_loss: expected {r} ref_logps (responses), got {len(ref_logps)}"
        )


def check_values(cu_responses: Tensor, pairs: Tensor, n: int) -> None:
    """At once on a CPU and wherever else nobody looks later, as on CUDA devices."""
    if looks_later(cu_responses.device):
        raise_late()
        check_later(functools.partial(_look, n), cu_responses, pairs)
    else:
        _look(n, cu_responses, pairs)


def _look(n: int, cu_responses: Tensor, pairs: Tensor) -> None:
    r = len(cu_responses) - 1
    first, last = int(cu_responses[0]), int(cu_responses[-1])
    if first != 0 or last != n:
        raise ValueError(
            f"preference_loss: cu_responses must run from 0 to N={n}, got {first} to {last}"
        )
    steps = cu_responses.diff()
    if r and int(steps.min()) < 0:
        at = int((steps < 0).nonzero()[0])
        raise ValueError(
            f"preference_loss: cu_responses falls from {int(cu_responses[at])} to "
            f"{int(cu_responses[at + 1])} at response {at}"
        )
    least, most = (int(end) for end in pairs.aminmax()) if len(pairs) else (0, r - 1)
    if least < 0 or most >= r:
        at = int(((pairs < 0) | (pairs >= r)).any(1).nonzero()[0])
        raise ValueError(
            f"preference_loss: pairs[{at}] = {pairs[at].tolist()} names a response outside [0, {r})"
        )


def check_options(beta: float, loss_type: str, label_smoothing: float) -> None:
    if loss_type not in LOSS_TYPES:
        raise ValueError(
            f"preference_loss: loss_type={loss_type!r} is not fused; expected one of "
            f"{', '.join(LOSS_TYPES)}"
        )
    check_number("preference_loss", "beta", beta, "write beta=0.1")
    if not 0 < beta < math.inf:
        raise ValueError(f"preference_loss: beta must be positive, got {beta}")
    check_range("preference_loss", "beta", beta, torch.float32)
    way = "write label_smoothing=0.0 for none"
    check_number("preference_loss", "label_smoothing", label_smoothing, way)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"preference_loss: label_smoothing must lie in [0, 0.5), got {label_smoothing}"
        )
    if label_smoothing and loss_type != "sigmoid":
        raise ValueError(
            f"preference_loss: label_smoothing={label_smoothing} has a meaning for sigmoid alone, "
            f"not for {loss_type}"
        )
