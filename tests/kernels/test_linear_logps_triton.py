"""Runs interpreted_*.py, the tests of the Triton `linear_logps`, in an interpreter."""

import pytest

from tests.kernels.interpreter import needs_interpreter, run_interpreted


@needs_interpreter
def test_in_the_interpreter():
    run_interpreted("interpreted_linear_logps.py", marks="not soak")


@pytest.mark.soak
@needs_interpreter
def test_random_shapes_in_the_interpreter():
    run_interpreted("interpreted_linear_logps.py", marks="soak")


@needs_interpreter
def test_blocks_of_rows_and_extremes_in_the_interpreter():
    run_interpreted("interpreted_row_blocks.py", "interpreted_extremes.py", marks="not soak")


@needs_interpreter
def test_every_choice_of_what_is_trained_in_the_interpreter():
    run_interpreted("interpreted_asked.py", marks="not soak")
