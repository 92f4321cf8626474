"""What to say where nothing fits: the least that a run takes, and what would fit.

Whatever is advised has been planned first: an option left to the plan, another way to train, or
shorter responses.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from peft import LoraConfig

from .adapters import lora_config
from .errors import ConfigError, DataError, FastDPOError
from .model_config import ModelConfig
from .options import AUTO
from .plan import Job, Planner, Prediction, with_precision
from .plan_choose import describe, least_candidates, options_of
from .plan_device import show_bytes
from .training_options import PLANNED

SHORTEST = 16  # of so many parts of the longest sequence one: to cut further is no advice
HALVINGS = 3  # of the range in which the longest that fits is sought: an eighth is left


def impossible(planner: Planner, least: Prediction, memory: int) -> ConfigError | DataError:
    """The error of a run of which `least` is the least, which is more than `memory` bytes."""
    job = planner.job
    wants = (
        f"the least that this run takes is {show_bytes(least.total, up=True)} "
        f"({describe(least.choice)})"
    )
    ways = []
    static = planner.least_static(least.choice)
    if static > memory:
        ways.append(f"weights, gradients and optimizer alone take {show_bytes(static)}")
    free = _all_on_auto(job)
    given = [name for name in PLANNED if getattr(job.args, name) != getattr(free.args, name)]
    given += ["base_precision"] if free.base_precision != job.base_precision else []
    freed = _least(free) if given else least
    if freed.total < least.total:
        fits = "fits" if freed.total <= memory else f"takes {show_bytes(freed.total, up=True)}"
        changed = [n for n in given if getattr(freed.choice, n) != getattr(least.choice, n)]
        ways.append(f"with {', '.join(changed)} on auto it {fits}")
    if freed.total > memory:
        if job.spec.peft_config is None:
            ways += [f"with {words} it fits" for words in _other_ways(free, memory)]
        tokens = _longest_that_fits(job, memory) if static <= memory else None
        ways += [] if tokens is None else [f"with max_length {tokens} it fits"]
    message = "; ".join([wants, *ways])
    row, longest = planner.longest
    alone = replace(job, pairs=job.pairs.select([int(planner.costs.argmax())]))
    if job.rows_are_real and static <= memory and not _fits(alone, memory):
        room = show_bytes(memory)
        return DataError(f"row {row}: its pair of {longest} tokens can't fit in {room}; {message}")
    return ConfigError(f"'gpu_memory' {show_bytes(memory)}: {message}")


def _least(job: Job) -> Prediction:
    planner = Planner(job)
    return min(least_candidates(planner, options_of(planner)), key=lambda one: one.total)


def _fits(job: Job, memory: int) -> bool:
    """Whether the least does; a step in one pack is looked at only where it can make the odds."""
    planner = Planner(job)
    for one in least_candidates(planner, options_of(planner)):
        if one.total <= memory:
            return True
        if one.total - planner.most_saved_by_one_pack(one.choice) > memory:
            return False
    return False


def _all_on_auto(job: Job) -> Job:
    """The same run with every option left to the plan that it may choose."""
    args = copy.copy(job.args)
    for name in PLANNED:
        if name != "optim" or (job.device.cuda and args.optim != "sgd"):  # auto is AdamW
            setattr(args, name, AUTO)
    is_free = job.spec.peft_config is not None and job.spec.bits is None
    return replace(job, args=args, base_precision=AUTO if is_free else job.base_precision)


def _other_ways(job: Job, memory: int) -> Iterator[str]:
    """Ways to train a whole model that fit, in the words of a config file: without gradients of
    all weights at once, or adapters alone."""
    args = copy.copy(job.args)
    if args.world_size == 1 and args.on_nonfinite != "skip" and not args.optimizer_in_backward:
        args.optimizer_in_backward, args.max_grad_norm = True, 0.0
        if _fits(replace(job, args=args), memory):
            yield "optimizer_in_backward true and max_grad_norm 0"
    args = copy.copy(job.args)
    args.optimizer_in_backward = False
    lora = lora_config(ModelConfig(model_name_or_path="any", use_peft=True))
    assert isinstance(lora, LoraConfig)
    for precision in ("bf16", "4bit"):
        spec = replace(with_precision(job.spec, precision), peft_config=lora, trainable=None)
        adapter = replace(job, spec=spec, args=args)
        if job.reference == "copy":  # the base beneath the adapter is the reference then
            adapter = replace(adapter, reference="adapters_off", reference_bytes=0)
        try:
            fits = _fits(adapter, memory)
        except FastDPOError:  # a model whose adapter can't be planned
            return
        if fits:
            yield f"use_peft true and base_precision {precision}"
            return


def _longest_that_fits(job: Job, memory: int) -> int | None:
    """A max_length with which the run fits, near the largest; None where none is worth a thought:
    one that drops half the pairs, whose prompts leave no room, or cuts to a sixteenth."""
    lengths = job.pairs.lengths
    high = int((lengths[:, 0] + lengths[:, 1:].max(axis=1)).max())
    low = max(high // SHORTEST, int(np.median(lengths[:, 0]))) + 1

    def fits(max_length: int) -> bool:
        return _fits(replace(job, pairs=job.pairs.cut(max_length)), memory)

    if low >= high or not fits(low):
        return None
    for _ in range(HALVINGS):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
