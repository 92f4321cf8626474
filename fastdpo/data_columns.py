"""A dataset's own numbers for its pairs: weights, soft labels, scores, labels.

Carried along only where an option asks for them; objective.py says what they mean to a loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import DataError, did_you_mean
from .options import Bound

# Every column that may be asked for, with its domain.
COLUMNS: dict[str, Bound] = {
    "weight": Bound(at_least=0),
    "p_chosen": Bound(at_least=0, at_most=1),
    "score_chosen": Bound(),
    "score_rejected": Bound(),
    "label": Bound(at_least=0, at_most=1),  # of unpaired data: 1, true: desirable
}


def require_columns(wanted: Sequence[str], found: Sequence[str], name: str) -> None:
    """Raises `DataError` for a wanted column that the dataset called `name` lacks."""
    for column in wanted:
        if column not in found:
            raise DataError(
                f"the {name} dataset has no column {column!r}; there are "
                f"{', '.join(found)}{did_you_mean(column, found)}"
            )


def read_columns(
    rows: Any, wanted: Sequence[str], kept: np.ndarray, name: str
) -> dict[str, np.ndarray]:
    """The columns `wanted` at the rows `kept` [n]: [n] fp64 each. Raises `DataError` with the row
    of a value that is no finite number, or none of the column's domain."""
    return {column: _read(rows, column, kept, name) for column in wanted}


def _read(rows: Any, column: str, kept: np.ndarray, name: str) -> np.ndarray:
    if isinstance(rows, Sequence):
        values: Sequence[Any] = [row.get(column) for row in rows]
    else:
        values = rows[column]
    bound = COLUMNS[column]
    result = np.empty(len(kept))
    for at, (row, value) in enumerate((int(i), values[int(i)]) for i in kept):
        if column == "label":
            expected = "true or false"
            good = isinstance(value, bool | np.bool_ | int | float | np.number) and value in (0, 1)
        else:
            expected = f"a finite number {bound}".rstrip()
            is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
            good = is_number and np.isfinite(value) and bound.holds(value)
        if not good:
            raise DataError(
                f"{name} dataset, row {row} (from 0): {column!r} is {value!r}; expected {expected}"
            )
        result[at] = value
    return result
