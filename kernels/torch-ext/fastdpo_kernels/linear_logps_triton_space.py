"""The workspace of `linear_logps` on a GPU, and operands that are converted into it."""

import torch
from torch import Tensor

from . import tiles
from .linear_logps_triton_math import Matrix


class Space:
    """One buffer for a call's temporaries, handed out from its start; never more than planned."""

    def __init__(self, size: int, device: torch.device):
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self.used = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        start = tiles.round_up(self.used, 256)
        count = 1
        for size in shape:
            count *= size
        self.used = start + count * dtype.itemsize
        if self.used > len(self.buffer):
            raise AssertionError(f"workspace: planned {len(self.buffer)} bytes, need {self.used}")
        return self.buffer[start : self.used].view(dtype).view(shape)

    def mark(self) -> int:
        return self.used

    def release(self, mark: int) -> None:
        self.used = mark

    def clear(self) -> None:
        self.used = 0


def operand(matrix: Tensor, dtype: torch.dtype, space: Space) -> Tensor:
    """The matrix in this dtype with contiguous rows: itself, or a copy in the workspace."""
    if matrix.dtype == dtype and matrix.stride(1) == 1:
        return matrix
    return space.take(tuple(matrix.shape), dtype).copy_(matrix)


def columns(matrix: Matrix, start: int, end: int, dtype: torch.dtype, space: Space) -> Tensor:
    """The matrix of some columns of the logits as a GEMM takes it: [end - start, D]."""
    weight, adapter = matrix.weight[start:end], matrix.adapter
    if adapter is None:
        return operand(weight, dtype, space)
    d, r = weight.shape[1], adapter.shape[1]
    joined = space.take((end - start, d + matrix.parts * r), dtype)
    joined[:, :d].copy_(weight)
    for part in range(matrix.parts):
        joined[:, d + part * r : d + (part + 1) * r].copy_(adapter[start:end])
    return joined
