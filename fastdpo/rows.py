"""Gathering rows that repeat, with a backward pass that gives the same bits every time.

Packs gather a prompt's keys once per response, and its last hidden row once per first response
token. Which rows repeat is known on the host when a pack is built, so the gradient of a gathered
row is a fixed sequence of additions: no atomics, no sorting on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdpo_kernels.impls import why_not_triton


@dataclass(frozen=True)
class RowGather:
    """`source[index]` for a source of `n_source` rows, and how to add its gradient up.

    index [M] int64: the source row of each gathered row.
    order [M] int64: the places in `index`, grouped by source row; bounds [n_source + 1] int64:
        where each row's group starts.
    rows [U] int64: the source rows that occur, ascending; None where all of them do.
    first [U] int64: where in `index` each of them occurs first.
    repeats: rounds of further occurrences, each (source rows, places in `index`), no row twice.
    is_identity: whether `index` is 0..n_source-1, so that nothing has to be gathered.
    """

    index: Tensor
    order: Tensor
    bounds: Tensor
    n_source: int
    rows: Tensor | None
    first: Tensor
    repeats: tuple[tuple[Tensor, Tensor], ...]
    is_identity: bool

    @classmethod
    def plan(cls, index: np.ndarray, n_source: int) -> RowGather:
        """Plans the gather of rows `index` [M] from `n_source` rows."""
        index = index.astype(np.int64, copy=False)
        is_identity = len(index) == n_source and np.array_equal(index, np.arange(n_source))
        order = np.argsort(index, kind="stable")  # places, grouped by source row
        sorted_rows = index[order]
        starts = np.flatnonzero(np.diff(sorted_rows, prepend=-1))  # [U]
        counts = np.diff(starts, append=len(order))
        rank = np.arange(len(order)) - np.repeat(starts, counts)  # how many came before
        repeats = tuple(
            (torch.from_numpy(sorted_rows[rank == r]), torch.from_numpy(order[rank == r]))
            for r in range(1, int(counts.max(initial=0)))
        )
        return cls(
            index=torch.from_numpy(index),
            order=torch.from_numpy(order),
            bounds=torch.from_numpy(np.searchsorted(sorted_rows, np.arange(n_source + 1))),
            n_source=n_source,
            rows=None if len(starts) == n_source else torch.from_numpy(sorted_rows[starts]),
            first=torch.from_numpy(order[starts]),
            repeats=repeats,
            is_identity=is_identity,
        )

    def map_tensors(self, fn: Callable[[Tensor], Tensor]) -> RowGather:
        return replace(
            self,
            index=fn(self.index),
            order=fn(self.order),
            bounds=fn(self.bounds),
            rows=None if self.rows is None else fn(self.rows),
            first=fn(self.first),
            repeats=tuple((fn(rows), fn(places)) for rows, places in self.repeats),
        )


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, gather: RowGather) -> Tensor:
        ctx.gather = gather
        return source.index_select(0, gather.index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = grad_outputs
        return _sum_into_rows(grad, ctx.gather), None


def _sum_into_rows(grad: Tensor, gather: RowGather) -> Tensor:
    """Sums `grad` [M, ...] over the places of each source row, in the order of the places."""
    if why_not_triton(grad.device, grad.dtype) is None:
        from .rows_triton import sum_rows

        return sum_rows(grad, gather.order, gather.bounds)
    dtype = grad.dtype
    if len(gather.repeats) > 1:  # one addition rounds once anyway; longer sums are kept in fp32
        dtype = torch.promote_types(dtype, torch.float32)
    total = grad.index_select(0, gather.first).to(dtype)
    if gather.rows is not None:
        occurring = total
        total = grad.new_zeros((gather.n_source, *grad.shape[1:]), dtype=dtype)
        total.index_copy_(0, gather.rows, occurring)
    for rows, places in gather.repeats:
        added = total.index_select(0, rows) + grad.index_select(0, places)
        total.index_copy_(0, rows, added)  # no row twice: a copy, not a scatter-add
    return total.to(grad.dtype)


def gather_rows(source: Tensor, gather: RowGather) -> Tensor:
    """`source[gather.index]`: [n_source, ...] -> [M, ...], bitwise repeatable in backward too.

    Rows that do not occur get a gradient of zero. An identity returns `source` itself.
    """
    return source if gather.is_identity else _GatherRows.apply(source, gather)  # pyright: ignore
