"""Runs interpreted_preference_loss.py, the tests of the Triton kernel, in Triton's interpreter."""

from tests.kernels.interpreter import needs_interpreter, run_interpreted


@needs_interpreter
def test_in_the_interpreter():
    run_interpreted("interpreted_preference_loss.py", marks="not soak")
