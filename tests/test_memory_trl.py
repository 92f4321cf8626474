"""The peak of training steps beyond the weights, against TRL's on the same pairs."""

import pytest

from benchmarks import bench_memory

pytest.importorskip("trl", minversion="1.16", reason="the peer to compare with")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_steps_take_at_most_half_of_trls_memory(lora):
    """At a vocabulary of 8000, where TRL's logits are still small."""
    case = bench_memory.Case(vocab_size=8000, lora=lora, checkpointing=True, pairs=2)
    ours, theirs = (bench_memory.peak_bytes(name, case) for name in bench_memory.TRAINERS)
    assert 0 < ours <= 0.5 * theirs
