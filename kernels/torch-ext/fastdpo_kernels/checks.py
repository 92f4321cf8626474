"""What a tensor and what a number must be to go into an op, looked at one by one.

An error is one line that names the op, the argument, what was given, and the way out.
"""

import math
import numbers

import torch
from torch import Tensor


def check_plain(op: str, name: str, tensor: object) -> None:
    """Raises TypeError for what is no tensor, or only looks like a plain one."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    kind = type(tensor).__name__
    if kind in ("Params4bit", "Int8Params"):
        raise TypeError(
            f"{op}: {name} is a bitsandbytes {kind}; dequantize it, or keep the head "
            "unquantized (transformers does by default)"
        )
    if kind == "DTensor":
        raise TypeError(f"{op}: {name} is a DTensor; pass its full_tensor()")
    if hasattr(tensor, "ds_id") and tensor.numel() == 0:
        raise TypeError(f"{op}: {name} is a ZeRO-3 shard; gather it around the call")
    if tensor.is_nested:
        raise TypeError(
            f"{op}: {name} is a nested tensor; pass its rows one after the other, "
            f"torch.cat({name}.unbind())"
        )
    if tensor.layout != torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{op}: {name} is of layout {layout}; pass its to_dense()")


def check_number(op: str, name: str, value: object, way: str) -> None:
    """Raises TypeError for what is no number; `way`: what to write instead."""
    # A learned one would get no gradient: tensors are no numbers here, nor are True and False.
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{op}: {name} must be a number, got {_shown(value)}; {way}")


def check_int64(op: str, name: str, value: object, way: str) -> None:
    """Raises TypeError for what is no integer, ValueError for one that int64 can't hold."""
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{op}: {name} must be an integer, got {_shown(value)}; {way}")
    if not -(2**63) <= int(value) < 2**63:
        raise ValueError(f"{op}: {name}={_shown(value)} is outside int64; {way}")


def check_range(op: str, name: str, value: float, dtype: torch.dtype) -> None:
    """Raises ValueError for a finite factor that is neither 0 nor an ordinary number of `dtype`,
    half its range left for what it is multiplied with."""
    least, most = torch.finfo(dtype).tiny, torch.finfo(dtype).max / 2
    if value != 0 and not least <= abs(value) <= most:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{op}: {name}={_shown(value)} leaves {kind}; choose one between {least:.1e} and "
            f"{most:.1e} in size"
        )


def quotient(a: float, b: float) -> float:
    """a / b of floats, infinite where it leaves them."""
    try:
        return float(a) / float(b)
    except (OverflowError, ZeroDivisionError):
        return math.inf


def _shown(value: object) -> str:
    """The value in a few characters, or what kind of thing it is."""
    if isinstance(value, Tensor):
        return "a tensor"
    text = repr(value)
    return text if len(text) <= 40 and "\n" not in text else f"a long {type(value).__name__}"
