"""What a GPU would make the host wait for, refused on a CPU: reading a value, or a size that
depends on values. Copies between host and device look like nothing here; those only a GPU shows."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# By name: overloads are many. `_local_scalar_dense` is item(), float(), bool(), and `if tensor:`.
READS = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "argwhere"),
    *("masked_select", "unique_dim", "unique_consecutive", "_unique", "_unique2", "bincount"),
}
UNSEEN = ("tolist", "numpy", "cpu", "__array__")  # which dispatch nothing on a CPU


class NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        read = name in READS
        if name in ("index", "index_put", "index_put_"):  # by a mask: nonzero() within
            read = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name == "repeat_interleave":  # without output_size the sum of repeats is read
            read = (kwargs or {}).get("output_size") is None
        if read and not _in_kernels():
            raise AssertionError(f"{func.name()} would wait for a GPU")
        return func(*args, **(kwargs or {}))


def _in_kernels() -> bool:
    """Whether fastdpo_kernels reads: what it runs on a CPU, to name a bad target, no GPU runs."""
    frame = sys._getframe(2)
    while frame is not None:
        if "fastdpo_kernels" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def no_reads() -> Iterator[None]:
    """Raises `AssertionError` inside at whatever would make the host wait for the device."""

    def refused(name: str) -> Any:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            if not _in_kernels():
                raise AssertionError(f"Tensor.{name} would wait for a GPU")
            return plain[name](*args, **kwargs)

        return refuse

    plain = {name: getattr(torch.Tensor, name) for name in UNSEEN}

    with pytest.MonkeyPatch.context() as patch, NoReads():
        for name in UNSEEN:
            patch.setattr(torch.Tensor, name, refused(name))
        yield
