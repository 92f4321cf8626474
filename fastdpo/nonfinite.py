"""Steps whose loss or gradient is not finite: decided on the device, never applied, named later.

No operation here waits for a GPU before `FiniteGuard.read`, which a log or a checkpoint calls. How
a step is held back from an optimizer that can't be told to skip it is held_step.py's affair.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fastdpo_kernels import raise_pending

from .errors import ConfigError, ModelError
from .held_step import mask_gradients, step_unless
from .runtime import sum_over_ranks
from .steps import mean_chosen_length

if TYPE_CHECKING:
    from .trainer import DPOTrainer

logger = logging.getLogger(__name__)

MODES = ("stop", "skip")


@dataclass
class _Step:
    """One step on this rank: the pairs and losses [P] of its packs, in order; `bad` [] is 1 where
    the step's loss or gradient is not finite on any rank."""

    number: int
    packs: list[tuple[np.ndarray, torch.Tensor]] = field(default_factory=list)
    bad: torch.Tensor | None = None


@dataclass(frozen=True)
class BadStep:
    """The first step since the last `read` that was not finite.

    pack, pair_id: whose loss is not finite; None where all losses of this rank are finite.
    pair_ids: those of each pack.
    """

    number: int
    pack: int | None
    pair_id: int | None
    pair_ids: list[list[int]]


class FiniteGuard:
    """Applies a step only if its loss and gradient are finite.

    skip: the next step goes on. stop: nothing is applied any more, so that the weights stay those
    that met it until the log says so. n_bad: such steps of the whole run, as of the last `read`.
    """

    def __init__(self, mode: str, device: torch.device):
        self.mode, self.device = mode, device
        self.n_bad = 0
        self._held = torch.zeros((), device=device)  # 1 where the step in hand is not applied
        self._steps: list[_Step] = []
        self._open = _Step(0)

    def note(self, pair_ids: np.ndarray, losses: torch.Tensor) -> None:
        """A pack of the step in hand: its pairs and their losses [P]."""
        self._open.packs.append((pair_ids, losses))

    def forget(self) -> None:
        """Drops the step in hand: it starts again."""
        self._open = _Step(0)

    def judge_gradient(self, grad: torch.Tensor) -> None:
        """For updates inside the backward pass: from the first loss or gradient of the step in hand
        that is not finite on, `apply` holds back."""
        step = self._open
        if step.bad is None:
            step.bad = self._not_finite(torch.zeros((), device=self.device), step)
        largest = torch.linalg.vector_norm(grad, math.inf)  # no copy of a whole gradient
        step.bad = torch.maximum(step.bad, (~largest.isfinite()).float())
        self._held = torch.maximum(self._held, step.bad)

    def judge(self, number: int, grad_norm: torch.Tensor | None) -> torch.Tensor:
        """Ends the step in hand; [] 1 where it is not to be applied, else 0."""
        step, self._open = self._open, _Step(0)
        step.number = number
        total = torch.zeros((), device=self.device) if grad_norm is None else grad_norm.float()
        bad = self._not_finite(total, step)
        if step.bad is not None:
            bad = torch.maximum(bad, step.bad)
        step.bad = sum_over_ranks(bad).clamp(max=1)
        stays = self._held if self.mode == "stop" else torch.zeros_like(self._held)
        self._held = torch.maximum(step.bad, stays)
        self._steps.append(step)
        return self._held

    @staticmethod
    def _not_finite(total: torch.Tensor, step: _Step) -> torch.Tensor:
        """[] 1 where `total` or a loss of `step` is not finite."""
        for _, losses in step.packs:
            total = total + losses.sum()
        return (~total.isfinite()).float()

    def prepare(self, optimizer: torch.optim.Optimizer) -> None:
        """Before the first step: counts of steps go to the device, where `apply` can hold them.

        Raises `ConfigError` where an optimizer's state is out of the device's reach.
        """
        if self.mode != "skip" or _takes_the_decision(optimizer):
            return
        if getattr(optimizer, "is_paged", False):
            raise ConfigError(
                "on_nonfinite 'skip' takes back an optimizer's states on the device, and a paged "
                "optimizer keeps them elsewhere; use adamw_8bit or adamw_torch_fused, or set "
                "on_nonfinite: stop"
            )
        for group in optimizer.param_groups:
            if self.device.type == "cuda" and "capturable" in group:
                group["capturable"] = True  # torch's own: its counts of steps are on the device

    def guards(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether `apply` leaves everything as it was where it holds a step back."""
        return _takes_the_decision(optimizer) or self.mode == "skip" or self.device.type == "cpu"

    def apply(
        self, optimizer: torch.optim.Optimizer, step: Callable[[], Any] | None = None
    ) -> None:
        """`optimizer.step()` (or `step`), unless what is in hand was judged not finite.

        On a GPU, where an optimizer is not fused, `stop` takes the gradients alone away: weights
        stay finite, and move by what momentum and decay do until the run ends.
        """
        step = step or optimizer.step
        if _takes_the_decision(optimizer):
            fused: Any = optimizer  # torch's own way in, made for loss scaling
            fused.grad_scale, fused.found_inf = None, self._held
            try:
                step()
            finally:
                del fused.grad_scale, fused.found_inf
        elif self.device.type == "cpu":
            if not self._held.item():
                step()
        elif self.mode == "skip":
            step_unless(self._held, optimizer)
        else:
            mask_gradients(self._held, optimizer)
            step()

    def read(self) -> BadStep | None:
        """The first bad step since the last `read`, if any. One wait for the device."""
        steps, self._steps = self._steps, []
        if not steps:
            return None
        flags = torch.stack([step.bad for step in steps if step.bad is not None]).tolist()
        self.n_bad += int(sum(flags))
        if 1.0 not in flags:
            return None
        step = steps[flags.index(1.0)]
        pack, pair_id = None, None
        for place, (pair_ids, losses) in enumerate(step.packs):
            finite = losses.isfinite().tolist()
            if not all(finite):
                pack, pair_id = place, int(pair_ids[finite.index(False)])
                break
        return BadStep(step.number, pack, pair_id, [ids.tolist() for ids, _ in step.packs])


def _takes_the_decision(optimizer: torch.optim.Optimizer) -> bool:
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def grad_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor | None:
    """The norm of all gradients together, on the device; None where there is none."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return nn.utils.get_total_norm(grads) if grads else None


def describe(bad: BadStep, rows: np.ndarray, finite_alone: Callable[[int], bool] | None) -> str:
    """One line that names step, pack, pair and dataset row.

    rows: each pair's row. finite_alone: whether a pair's gradient is finite by itself, at the
    weights that met the step; None where those are gone.
    """
    step = f"step {bad.number}: "

    def named(pair_id: int, pack: int | None) -> str:
        return f"pair {pair_id} (dataset row {int(rows[pair_id])}, pack {pack})"

    if bad.pair_id is not None:
        return f"{step}the loss of {named(bad.pair_id, bad.pack)} is not finite"
    step += "the gradient is not finite though the losses are"
    if not bad.pair_ids:
        return f"{step}, or a loss on another rank is not"
    if finite_alone is not None:
        for pack, pair_ids in enumerate(bad.pair_ids):
            for pair_id in pair_ids:
                if not finite_alone(pair_id):
                    return f"{step}, through {named(pair_id, pack)}"
        step += ", and no pair alone makes it so"
    packs = "; ".join(
        f"pack {n}: pairs {_some(ids)}, dataset rows {_some([int(rows[i]) for i in ids])}"
        for n, ids in enumerate(bad.pair_ids)
    )
    return f"{step} ({packs})"


def _some(numbers: list[int], most: int = 16) -> str:
    shown = ", ".join(map(str, numbers[:most]))
    return shown + (", …" if len(numbers) > most else "")


def finite_or_none(value: torch.Tensor | None) -> float | None:
    """The number, if it is one."""
    number = math.nan if value is None else float(value)
    return number if math.isfinite(number) else None


def refuse_nonfinite(trainer: DPOTrainer) -> None:
    """Says which step since the last call was not finite, if one was; `stop` ends the run.

    Waits for the device, and so asks first for what the kernels found wrong with targets or bounds
    there: that is NaN in the loss, and no fault of the step.
    """
    assert trainer.train_pairs is not None and trainer.optimizer is not None
    raise_pending()
    bad = trainer.guard.read()
    if bad is None:
        return
    stops = trainer.guard.mode == "stop"
    kept = stops and trainer.guard.guards(trainer.optimizer)
    kept = kept and not trainer.args.optimizer_in_backward  # the weights that met the bad step
    text = describe(
        bad,
        trainer.train_pairs.rows,
        functools.partial(gradient_is_finite, trainer) if kept else None,
    )
    if trainer.args.f_divergence_type == "forward_kl":
        text += (
            "; it may be forward_kl, whose score 1 - exp(-log-ratio) is beyond fp32 where the "
            "policy makes a response less likely than the reference by 88 nat: f_divergence_type "
            "js_divergence or reverse_kl has no such limit"
        )
    if not stops:
        logger.warning("%s; skipped, as %d steps so far", text, trainer.guard.n_bad)
        return
    raise ModelError(
        f"{text}; look at that row, lower learning_rate or max_grad_norm, or set "
        "on_nonfinite: skip to leave such steps out"
    )


def gradient_is_finite(trainer: DPOTrainer, pair_id: int) -> bool:
    """Whether the gradient of one pair is finite, at the weights as they are."""
    assert trainer.train_pairs is not None
    for pack in trainer.packer.packs(trainer.train_pairs, np.array([pair_id])):
        (reference,) = trainer.train_reference.token_logps([pack])
        scored, output = trainer._score(pack, reference)
        (loss,) = trainer.objective(
            [scored], mean_chosen_length(trainer.train_pairs, pack.pair_ids), grad=True
        )
        output.token_logps.backward(loss.token_grad)
    norm = grad_norm(trainer.trainable)
    trainer.model.zero_grad(set_to_none=True)
    return norm is None or bool(norm.isfinite())
