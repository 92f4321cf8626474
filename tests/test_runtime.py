"""Packs are made and sent ahead, in a thread that ends with its consumer."""

import threading
import time

import pytest
import torch

from fastdpo.errors import ConfigError
from fastdpo.runtime import make_deterministic, prefetch


def wait_until(condition) -> bool:
    """Whether it comes true within 5 seconds."""
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def threads() -> int:
    return sum(thread.name == "fastdpo-prefetch" for thread in threading.enumerate())


def test_items_are_made_ahead_and_in_order() -> None:
    made: list[int] = []

    def make():
        for i in range(6):
            made.append(i)
            yield i

    items = prefetch(make, depth=2)
    assert made == []  # nothing before it is asked for
    assert next(items) == 0
    assert wait_until(lambda: made == [0, 1, 2, 3])  # two wait, one is about to: and no more
    time.sleep(0.05)
    assert made == [0, 1, 2, 3]
    assert list(items) == [1, 2, 3, 4, 5]
    assert threads() == 0


def test_its_errors_are_raised_where_the_item_is_wanted() -> None:
    def make():
        yield 1
        raise ValueError("row 7 is bad")

    items = prefetch(make)
    assert next(items) == 1
    with pytest.raises(ValueError, match="row 7 is bad"):
        next(items)
    assert threads() == 0


def test_a_consumer_that_leaves_ends_the_thread() -> None:
    items = prefetch(lambda: iter(range(1000)), depth=1)
    assert next(items) == 0
    items.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert threads() == 0


def test_a_process_that_cublas_binds_already_is_told_so(monkeypatch) -> None:
    """What torch does on a GPU whose first product came before the setting."""

    def product(*_) -> None:
        raise RuntimeError("Deterministic behavior was enabled with either ... it uses CuBLAS")

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch, "mm", product)
    with pytest.raises(ConfigError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment"):
        make_deterministic(torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled()
