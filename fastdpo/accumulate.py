"""Gradients between a backward pass and the optimizer: summed in fp32, or used up at once.

`Fp32Accumulation`: the gradient of a 16-bit parameter is 16-bit; where several packs make a step
their sum is kept in fp32 and rounded once. `StepInBackward`: where one pack makes a step, every
parameter is updated as soon as its gradient is whole, so gradients take no memory.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .config import DPOConfig
from .errors import ConfigError, ModelError

if TYPE_CHECKING:
    from .nonfinite import FiniteGuard
    from .steps import StepPlan

HALF_DTYPES = (torch.float16, torch.bfloat16)


class Fp32Accumulation:
    """Sums gradients of the 16-bit ones among `parameters` in fp32, over the packs of a step.

    Between `begin` with more than one pack and `finish`, such a parameter's `grad` is taken away
    after every backward pass; `finish` puts the sum there, rounded once to the parameter's dtype.
    A step of one pack, and every other parameter, is left as it is.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.sums: dict[Tensor, Tensor | None] = {
            p: None for p in parameters if p.dtype in HALF_DTYPES
        }
        self.is_on = False
        self._hooks = [p.register_post_accumulate_grad_hook(self._add) for p in self.sums]

    def __enter__(self) -> Fp32Accumulation:
        return self

    def begin(self, n_packs: int) -> None:
        self.is_on = n_packs > 1

    def _add(self, parameter: Tensor) -> None:
        if not self.is_on or parameter.grad is None:
            return
        total = self.sums[parameter]
        if total is None:
            self.sums[parameter] = parameter.grad.float()
        else:
            total.add_(parameter.grad)
        parameter.grad = None

    def finish(self) -> None:
        for parameter, total in self.sums.items():
            if total is not None:
                parameter.grad = total.to(parameter.dtype)
                self.sums[parameter] = None
        self.is_on = False

    def discard(self) -> None:
        """Forgets what was summed: the step starts again."""
        for parameter in self.sums:
            self.sums[parameter] = None

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()


class StepInBackward:
    """Steps `optimizer` for one parameter at a time, inside the backward pass.

    The optimizer and its groups stay what they are: learning rates, states and checkpoints are
    those of an ordinary step, which afterwards finds no gradient left. From the first loss or
    gradient that is not finite on nothing is updated any more.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, guard: FiniteGuard):
        self.optimizer, self.guard = optimizer, guard
        # By number: a resume gives the optimizer other groups.
        self._group = {p: n for n, g in enumerate(optimizer.param_groups) for p in g["params"]}
        self._hooks = [p.register_post_accumulate_grad_hook(self._step) for p in self._group]

    def __enter__(self) -> StepInBackward:
        return self

    def begin(self, n_packs: int) -> None:
        assert n_packs <= 1, n_packs  # make_gradients has looked

    def finish(self) -> None:
        """Nothing is left to do."""

    def discard(self) -> None:
        raise ModelError(
            "memory ran out inside a backward pass whose first weights are updated already "
            "(optimizer_in_backward): start again with a smaller max_tokens_per_pack"
        )

    def _step(self, parameter: Tensor) -> None:
        groups = self.optimizer.param_groups
        step: Any = type(self.optimizer).step  # the scheduler counts calls of the instance's own
        assert parameter.grad is not None
        self.guard.judge_gradient(parameter.grad)
        self.optimizer.param_groups = [{**groups[self._group[parameter]], "params": [parameter]}]
        try:
            self.guard.apply(self.optimizer, functools.partial(step, self.optimizer))
        finally:
            self.optimizer.param_groups = groups
        parameter.grad = None

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()


def make_gradients(
    optimizer: torch.optim.Optimizer, args: DPOConfig, plan: StepPlan, guard: FiniteGuard
) -> Fp32Accumulation | StepInBackward:
    """What handles the gradients of `optimizer`'s parameters; a context, as long as it does.

    Raises `ConfigError` where `optimizer_in_backward` meets what needs all gradients at once:
    clipping, skipping non-finite steps, several ranks, or a step of several packs in any epoch.
    """
    if not args.optimizer_in_backward:
        return Fp32Accumulation(p for group in optimizer.param_groups for p in group["params"])
    option = "'optimizer_in_backward'"
    if args.on_nonfinite == "skip":
        raise ConfigError(
            f"{option} uses each gradient at once, and on_nonfinite 'skip' looks at all of them "
            "first; set on_nonfinite: stop, or leave it out"
        )
    if args.world_size > 1:
        raise ConfigError(
            f"{option} uses each gradient at once, and {args.world_size} ranks sum theirs first; "
            "train on one, or leave it out"
        )
    for epoch in range(plan.n_epochs):
        for step, n_packs in enumerate(plan.packs_of_steps(epoch), start=1):
            if n_packs > 1:
                raise ConfigError(
                    f"{option} needs one pack a step, and step {step} of epoch {epoch + 1} has "
                    f"{n_packs}; raise max_tokens_per_pack ({plan.packer.max_tokens}), lower "
                    "per_device_train_batch_size, or leave it out"
                )
    return StepInBackward(optimizer, guard)
