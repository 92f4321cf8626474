"""What the tests of `linear_logps` in torch share: variants, and two ways of looking inside."""

from typing import Any

import torch

from fastdpo_kernels import linear_logps_torch
from tests.numerics import Head

TRANSFORMS = {
    "plain": {},
    "scaled": {"scale": 0.3, "temperature": 0.8},
    "softcap": {"softcap": 15.0, "scale": 1.7, "temperature": 1.3},
}
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Small enough for several tiles each way at the sizes here, large enough for the least tile.
SMALL = 2 * 2**20


def saved_kept(head: Head, workspace_bytes: int) -> bool:
    result = linear_logps_torch.forward(
        head.hidden,
        head.weight,
        head.targets,
        rounded=head.hidden.dtype,
        adapter=None,
        bias=None,
        softcap=None,
        scale=1.0,
        temperature=1.0,
        ignore_index=-100,
        stats=(),
        need_hidden_grad=True,
        need_weight_grad=True,
        need_bias_grad=False,
        keep=True,
        workspace_bytes=workspace_bytes,
    )
    return len(result.saved) == 4


def _bytes(event: Any) -> int:
    return event.nbytes()  # of a "[memory]" event: negative when freed


def peak_bytes(run_it) -> int:
    """The largest sum of live allocations that `run_it` made, by the allocator's own account."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run_it()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), _bytes(e)) for e in events if e.name() == "[memory]"]
    live = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        live += change
        peak = max(peak, live)
    return peak
