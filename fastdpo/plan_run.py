"""The plan inside a run: options settled before step 1, the peak compared, packs made smaller.

`settle` gives every option on `auto` its value. `RunPlan` keeps what was predicted, writes it to
plan.json, compares it with what the first steps took, and re-packs where the estimate was short.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import nn

from .checkpoint import set_rng_state
from .config import DPOConfig
from .data import TokenizedPairs
from .errors import ConfigError, ModelError
from .memory_kinds import by_kind, gradient_bytes, held_bytes
from .model import base_model, is_quantized
from .options import AUTO, parse_bytes
from .packing import longest_pair
from .plan_device import present_device, show_bytes
from .policy import Models
from .reference_logps import AdapterReference, NoReference
from .run_folder import PLAN_FILE
from .training_options import PLANNED

if TYPE_CHECKING:  # what replays a model takes a second to import, and not every run has a plan
    from .plan import Job, Planner, Prediction
    from .plan_replay import TwinSpec
    from .plan_tracker import MemoryTracker
    from .steps import Packer, StepPacks
    from .trainer import DPOTrainer

logger = logging.getLogger(__name__)

FIRST_STEPS = 3  # by then optimizer states are there, and allocators have settled
SMALLER = 0.75  # of the tokens that did not fit


def settle(
    models: Models, pairs: TokenizedPairs | None, packer: Packer, args: DPOConfig
) -> tuple[DPOConfig, RunPlan | None]:
    """`args` with a value for every option on `auto`, and the plan that gave them.

    There is a plan on a GPU, and on a CPU where `gpu_memory` or `measure_memory` asks for one;
    elsewhere `auto` is the usual value. Raises `ConfigError` or `DataError` where nothing fits.
    """
    auto = [name for name in PLANNED if getattr(args, name) == AUTO]
    device = present_device(args.device)
    asked = args.gpu_memory is not None or args.measure_memory
    if pairs is None or not len(pairs) or not (device.cuda or asked):
        return _with_values(args, {name: PLANNED[name] for name in auto}), None
    from .plan import Planner
    from .plan_choose import choose

    memory = device.memory if args.gpu_memory is None else parse_bytes(args.gpu_memory)
    planner = Planner(job_of(models, pairs, packer, args))
    try:
        prediction = choose(planner, memory)
    except ModelError as error:  # a model that can't be replayed can be trained all the same
        if args.gpu_memory is not None:
            raise
        logger.warning("%s; options on auto take their usual values", error)
        return _with_values(args, {name: PLANNED[name] for name in auto}), None
    args = _with_values(args, {name: getattr(prediction.choice, name) for name in auto})
    plan = RunPlan(planner, prediction, memory, auto)
    logger.info("plan: %s", plan.line())
    return args, plan


def _with_values(args: DPOConfig, values: dict[str, Any]) -> DPOConfig:
    """`args` with `values`: a copy where there are any, for `args` is the caller's."""
    if not values:
        return args
    args = copy.copy(args)
    for name, value in values.items():
        setattr(args, name, value)
    return args


def job_of(models: Models, pairs: TokenizedPairs, packer: Packer, args: DPOConfig) -> Job:
    """What a plan needs to know of models that are loaded."""
    from .plan import Job

    policy, reference = models.policy, models.reference
    kind, size = reference.name, 0
    if isinstance(reference, NoReference):
        kind = "none"
    elif args.computes_reference_first:
        kind = "precomputed"
    elif isinstance(reference, AdapterReference):
        if reference.adapter is not None:
            size = sum(
                p.nbytes
                for name, p in policy.named_parameters()
                if f".{reference.adapter}." in f"{name}."
            )
    elif reference.model is not policy:
        own = reference.model
        size = sum(t.nbytes for t in (*own.parameters(), *own.buffers()))
    return Job(
        spec=replace(spec_of(policy), lean_lora=args.lean_lora, fp8=args.base_precision == "fp8"),
        args=args,
        pairs=pairs,
        device=present_device(args.device),
        bf16=bool(args.bf16),
        packer=replace(packer, device=torch.device("cpu")).of_tokens(1, models.compiled),
        reference=kind,
        reference_bytes=size,
        attention=models.packed.backend,
    )


def spec_of(model: nn.Module) -> TwinSpec:
    """The twin of a loaded model."""
    from .plan_replay import TwinSpec

    base = base_model(model)
    config: Any = copy.deepcopy(base.config)
    bits, nested = None, False
    if is_quantized(base):
        bits = 4 if getattr(base, "is_loaded_in_4bit", False) else 8
        how = getattr(config, "quantization_config", None)
        nested = bool(getattr(how, "bnb_4bit_use_double_quant", False))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dtype = next(p.dtype for p in base.parameters() if p.is_floating_point())
    if isinstance(model, PeftModel):
        adapter = copy.deepcopy(model.peft_config[model.active_adapters[0]])
        return TwinSpec(config, dtype, adapter, bits, nested)
    names = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
    everything = len(names) == sum(1 for _ in model.parameters())
    trainable = None if everything else names
    return TwinSpec(config, dtype, None, bits, nested, trainable=trainable)


@dataclass
class RunPlan:
    """What was predicted for a run, and what became of it. auto: the options it chose.
    first_steps_peak: predicted for the steps whose peak is measured, which need not hold the run's
    heaviest pack."""

    planner: Planner
    prediction: Prediction
    memory: int | None
    auto: list[str]
    first_steps_peak: int | None = None
    measured_peak: int | None = None
    first_steps_memory: dict[str, int] = field(default_factory=dict)
    measured_memory: dict[str, int] = field(default_factory=dict)
    _gradients: int = 0
    repacked: list[int] = field(default_factory=list)
    _steps: int = 0
    _began: int = 0
    _tracking: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _tracker: MemoryTracker | None = None

    def chose(self, option: str) -> bool:
        """Whether `option` was on auto and got another value than the usual one."""
        return option in self.auto and getattr(self.prediction.choice, option) != PLANNED[option]

    def line(self) -> str:
        """The plan in a line of the log."""
        from .plan_choose import describe

        p = self.prediction
        room = "" if self.memory is None else f" of {show_bytes(self.memory)}"
        row, tokens = self.planner.longest
        return (
            f"{describe(p.choice)}; peak {show_bytes(p.peak)}, with allowance "
            f"{show_bytes(p.total)}{room}; longest pair: row {row}, {tokens} tokens"
        )

    def as_dict(self) -> dict[str, Any]:
        """The content of plan.json."""
        p = self.prediction
        row, tokens = self.planner.longest
        return {
            "chosen": asdict(p.choice),
            "auto": self.auto,
            "memory_bytes": p.memory,
            "peak_bytes": p.peak,
            "allowance_bytes": p.allowance,
            "total_bytes": p.total,
            "budget_bytes": self.memory,
            "host_bytes": p.host_bytes,
            "heaviest_pack_tokens": p.pack_tokens,
            "packs_per_step": p.n_packs,
            "longest_pair": {"row": row, "tokens": tokens},
            "seconds_per_step_at_least": p.seconds,
            "repacked_to": self.repacked,
            "first_steps_peak_bytes": self.first_steps_peak,
            "measured_peak_bytes": self.measured_peak,
            "first_steps_memory_bytes": self.first_steps_memory,
            "measured_memory_bytes": self.measured_memory,
        }

    def write(self, folder: Path) -> None:
        """Writes plan.json, whole or not at all."""
        new = folder / f".{PLAN_FILE}.new"
        new.write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")
        new.replace(folder / PLAN_FILE)

    # ---- the measured peak --------------------------------------------------------------------

    def measuring(self, trainer: DPOTrainer) -> contextlib.ExitStack:
        """A context for the run's steps, in which the peak of the first few is measured."""
        args, self._steps = trainer.args, 0
        self._began = trainer.state.global_step
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)
        elif args.measure_memory:
            from .plan_replay import measured

            self._tracker = self._tracking.enter_context(measured(trainer.model))
        return self._tracking

    def before_update(self, trainer: DPOTrainer) -> None:
        """Counts the gradients of the first few steps, which the update lets go."""
        if self.measured_peak is None and self._steps < FIRST_STEPS:
            self._gradients = max(self._gradients, gradient_bytes(trainer))

    def after_step(self, trainer: DPOTrainer) -> None:
        """Counts a step; after the first few, compares their measured peak with the one predicted
        for these very steps, and says so in one line."""
        args, state = trainer.args, trainer.state
        self._steps += 1
        is_last = state.global_step == state.max_steps
        if self.measured_peak is not None or not (is_last or self._steps == FIRST_STEPS):
            return
        if args.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(args.device)
        elif self._tracker is not None:
            held = self.prediction.memory
            peak = self._tracker.peak + held["weights"] + held["adapters"] + held["reference"]
            self._tracking.close()
        else:
            return
        choice = replace(self.prediction.choice, max_tokens_per_pack=trainer.packer.max_tokens)
        steps = range(self._began, self._began + self._steps)
        prediction = self.planner.predict(choice, steps)
        planned = prediction.peak
        self.measured_peak, self.first_steps_peak = peak, planned
        self.first_steps_memory = prediction.memory
        self.measured_memory = by_kind(peak, held_bytes(trainer), self._gradients)
        short = peak > 1.1 * planned
        logger.log(
            logging.WARNING if short else logging.INFO,
            "memory: %s at the peak of the first %d steps, %s planned for them (%.0f %% %s); %s "
            "planned for the run%s",
            show_bytes(peak),
            self._steps,
            show_bytes(planned),
            100 * abs(peak - planned) / planned,
            "more" if peak > planned else "less",
            show_bytes(self.prediction.peak),
            "; the plan was short: lower max_tokens_per_pack if memory runs out" if short else "",
        )
        if state.is_world_process_zero:
            self.write(trainer.output_dir)

    def packer_of(self, folder: Path, packer: Packer) -> Packer:
        """The packer that a run in `folder` had at last, where its packs were the plan's choice:
        a resumed run makes the same ones."""
        tokens = saved_packs(folder) if "max_tokens_per_pack" in self.auto else None
        return packer if tokens is None else packer.of_tokens(tokens)


# ---- out of memory ------------------------------------------------------------------------------


def start_over(trainer: DPOTrainer, step: StepPacks, error: torch.OutOfMemoryError) -> None:
    """Makes the packs of `trainer` smaller after `step`, its first, did not fit; what the attempt
    left behind (gradients, sums, random states) is taken back.

    Raises `ModelError` where that can't be done: after an update, on several ranks, or where the
    longest pair leaves no smaller pack.
    """
    packer, pairs = trainer.packer, trainer.train_pairs
    n_tokens = max((pack.n_tokens for pack in step.packs), default=0)
    said = f"out of memory at step {trainer.state.global_step + 1}, on packs of {n_tokens} tokens"
    ways = "gradient_checkpointing, activation_offloading, optim and load_in_4bit"
    if trainer.before_first_step is None or trainer.args.world_size > 1:
        raise ModelError(
            f"{said}: {' '.join(str(error).split())[:200]}; lower max_tokens_per_pack, or see "
            f"{ways}; a checkpoint can be resumed with them"
        ) from error
    assert pairs is not None
    row, longest = longest_pair(pairs, packer.mode, packer.with_last)
    if n_tokens <= longest:
        raise ModelError(
            f"{said}, and row {row} alone takes {longest}: lower max_length, or see {ways}"
        ) from error
    smaller = max(longest, int(SMALLER * n_tokens))
    logger.warning("%s: packing again with max_tokens_per_pack %d", said, smaller)
    trainer.packer = trainer.plan.packer = packer.of_tokens(smaller)
    trainer.args.max_tokens_per_pack = smaller
    trainer.gradients.discard()
    trainer.guard.forget()
    trainer.model.zero_grad(set_to_none=True)
    sums, rng = trainer.before_first_step
    trainer.metrics.sums.copy_(sums)
    set_rng_state(rng)
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()
    if trainer.run_plan is not None:
        trainer.run_plan.repacked.append(smaller)
        trainer.run_plan.write(trainer.output_dir)


def saved_packs(folder: Path) -> int | None:
    """max_tokens_per_pack as the run in `folder` had it at last; None where it had no plan."""
    path = folder / PLAN_FILE
    if not path.is_file():
        return None
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        tokens = [plan["chosen"]["max_tokens_per_pack"], *plan["repacked_to"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{str(path)!r} is not a plan ({error}); remove it to plan anew"
        ) from error
    return int(tokens[-1])
