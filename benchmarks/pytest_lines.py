"""A pytest plugin for gpu_tests.py: a line of JSON per event, so that a killed run has told all.

`-p benchmarks.pytest_lines`, with the file's path in $PYTEST_LINES. A test that leaves CUDA broken
(an illegal access outlives the test that made it) ends the process, since all after it would fail.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

BROKEN = ("CUDA error", "AcceleratorError", "illegal memory access", "device-side assert")


def _write(**event: Any) -> None:
    with open(os.environ["PYTEST_LINES"], "a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")


def pytest_runtest_logstart(nodeid: str) -> None:
    _write(event="start", test=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed or report.skipped:
        text = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        _write(event=report.outcome, test=report.nodeid, text=text[-3000:])
    elif report.when == "call":
        _write(event="passed", test=report.nodeid, seconds=round(report.duration, 2))


def pytest_runtest_logfinish(nodeid: str) -> None:
    _write(event="end", test=nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    if call.excinfo is not None and any(word in str(call.excinfo.value) for word in BROKEN):
        item.session.shouldstop = "CUDA is broken in this process"
    return report


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _write(event="failed", test=report.nodeid, text=str(report.longrepr)[-3000:])
