"""Runs interpreted_linear_logps.py, the tests of the Triton `linear_logps`, in an interpreter."""

import pytest

from tests.kernels.interpreter import needs_interpreter, run_interpreted


@needs_interpreter
def test_in_the_interpreter():
    run_interpreted("interpreted_linear_logps.py", "not soak")


@pytest.mark.soak
@needs_interpreter
def test_random_shapes_in_the_interpreter():
    run_interpreted("interpreted_linear_logps.py", "soak")


@needs_interpreter
def test_blocks_of_rows_in_the_interpreter():
    run_interpreted("interpreted_row_blocks.py", "not soak")
