"""Targets of `linear_logps`: which rows have one, and what is wrong with the others.

[N] vectors are looked at a block of rows at a time: nothing of N bytes is made here.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from .late import check_later, looks_later, raise_late

NO_TARGET = torch.iinfo(torch.int64).min  # an ignore_index that ignores nothing
BLOCK = 2**18  # rows


def left_out(targets: Tensor, v: int, ignore_index: int) -> Tensor:
    """Which rows have no target: [N] bool. Implementations give them 0 and no gradient, ..."""
    return (targets == ignore_index) | (targets < 0) | (targets >= v)


def outside(targets: Tensor, v: int, ignore_index: int) -> Tensor:
    """... but NaN to these, which are neither in the vocabulary nor ignored: [N] bool.

    There are none where `check_targets` raises at once.
    """
    return (targets != ignore_index) & ((targets < 0) | (targets >= v))


def blocks(n: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, n, max(size, 1)):
        yield start, min(start + size, n)


def check_targets(targets: Tensor, v: int, ignore_index: int) -> None:
    """Raises ValueError for a target outside [0, V): at once on a CPU and wherever else nobody
    looks later; on a CUDA device, whose values are not waited for, a later call does."""
    at_once = not looks_later(targets.device)
    if not at_once:
        raise_late()
    reports = []
    for start, end in blocks(len(targets), BLOCK):
        some = targets[start:end]
        bad = outside(some, v, ignore_index)
        if at_once:
            if bad.any():
                row = int(bad.nonzero()[0])
                raise ValueError(_bad_target(start + row, int(some[row]), v, ignore_index))
            continue
        row = bad.int().argmax(0, keepdim=True)  # [1]: gathered, for an index would be waited for
        reports.append(torch.cat([bad.gather(0, row).long(), row, some.gather(0, row)]))
    if reports:
        report = reports[0] if len(reports) == 1 else torch.cat(reports)
        check_later(functools.partial(_look, v, ignore_index), report)


def _look(v: int, ignore_index: int, report: Tensor) -> None:
    """`report`: of each block of rows, whether it has a bad target, where, and which."""
    for block, (found, row, target) in enumerate(report.view(-1, 3).tolist()):
        if found:
            raise ValueError(_bad_target(block * BLOCK + row, target, v, ignore_index))


def _bad_target(row: int, target: int, v: int, ignore_index: int) -> str:
    way_out = f"mark rows to leave out with ignore_index={ignore_index}"
    if ignore_index == NO_TARGET:
        way_out = "pass only the rows to be scored"
    return f"linear_logps: targets[{row}] = {target} is outside [0, V={v}); {way_out}"
