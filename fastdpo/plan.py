"""The memory and the time of a step, predicted for one choice of options.

`Planner.predict` adds up what is there all the time (weights, adapters, optimizer states, the
reference) and what a replay of the heaviest packs needs at its highest moment. Which options are
chosen is plan_choose.py's; what is printed and checked in a run, plan_cli.py's and plan_run.py's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .batch import Pack
from .data import TokenizedPairs
from .fp8 import Fp8Linear
from .packing import longest_pair, pair_costs
from .plan_device import CUDA_CONTEXT, Device, step_seconds
from .plan_packs import HeavyPack, HeavyPacks, steps_of_run
from .plan_replay import StepMemory, StepSettings, TwinSpec, build_twin, replay, weight_bytes
from .plan_tracker import ACTIVATIONS, GRADIENTS, WORKSPACE
from .steps import Packer

WEIGHTS, ADAPTERS, STATES, REFERENCE = "weights", "adapters", "optimizer states", "reference"
KINDS = (WEIGHTS, ADAPTERS, GRADIENTS, STATES, REFERENCE, *ACTIVATIONS, WORKSPACE)
ALLOWANCE = "fragmentation allowance"

FRAGMENTATION = 0.05  # of what is not weights: blocks that are free but of no use
CUBLAS_WORKSPACE = 32 * 2**20


@dataclass(frozen=True)
class Choice:
    """The options that a plan may choose, each with a definite value.

    base_precision: "bf16", "8bit" or "4bit"; None leaves the model as it was asked for.
    """

    max_tokens_per_pack: int
    gradient_checkpointing: bool | str = True
    activation_offloading: bool = False
    optim: str = "adamw_torch_fused"
    base_precision: str | None = None
    logps_workspace_bytes: int = 256 * 2**20


@dataclass(frozen=True)
class Job:
    """A run, as far as a plan needs to know it.

    args: a DPOConfig; options may be "auto". pairs: what is trained on; `rows_are_real` is False
    where they stand for a dataset that was not named. packer: how packs are made, for any number
    of tokens. bf16: whether it computes in bfloat16. reference: its kind, in words;
    reference_bytes: what it takes beside the policy, None for a whole copy of it. attention: the
    backend; where no model is loaded, what is asked for, or sdpa.
    """

    spec: TwinSpec
    args: Any
    pairs: TokenizedPairs
    device: Device
    bf16: bool
    packer: Packer
    reference: str = "adapters_off"
    reference_bytes: int | None = 0
    rows_are_real: bool = True
    base_precision: str | None = None
    attention: str = "sdpa"


@dataclass(frozen=True)
class Prediction:
    """memory: bytes at the peak of a step, by kind. allowance: what the allocator can't use, and
    CUDA itself. host_bytes: offloaded. pack_tokens, n_packs: of the heaviest pack and step.
    seconds: the least that a mean step takes; None if the device's rate is unknown. making: bytes
    at the highest moment before step 1, where that is more than the model as it then is."""

    choice: Choice
    memory: dict[str, int]
    allowance: int
    host_bytes: int
    pack_tokens: int
    n_packs: int
    seconds: float | None
    making: int = 0

    @property
    def peak(self) -> int:
        """Bytes allocated at the highest moment of the steps."""
        return sum(self.memory.values())

    @property
    def total(self) -> int:
        """What the run needs, from its making to its last step."""
        return max(self.peak + self.allowance, self.making)


@dataclass(frozen=True)
class _Static:
    """Bytes that do not depend on packs; `sizes`: (elements, bytes) of each trained parameter;
    `converted`: elements of each weight that an fp8 base converts."""

    frozen: int
    trainable: int
    sizes: tuple[tuple[int, int], ...]
    converted: tuple[int, ...] = ()


@dataclass
class Planner:
    """Predictions for one job; replays are kept, so that asking again costs nothing."""

    job: Job
    _replays: dict[Any, StepMemory] = field(default_factory=dict)
    _statics: dict[Any, _Static] = field(default_factory=dict)
    _packs: dict[Any, tuple[list[HeavyPack], int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        job = self.job
        self.costs = pair_costs(job.pairs, job.packer.mode, job.packer.with_last)
        self._steps = steps_of_run(job.pairs, job.args)
        self.heavy_packs = self._heavy_packs(range(len(self._steps)))

    @property
    def longest(self) -> tuple[int, int]:
        """(row, tokens) of the pair that takes most tokens of a pack."""
        return longest_pair(self.job.pairs, self.job.packer.mode, self.job.packer.with_last)

    @functools.cached_property
    def heaviest_step(self) -> int:
        """Most tokens that a step of the run holds, as one pack of them counts."""
        if self.job.packer.mode == "padded":  # every row is as long as the longest
            return max(int(len(ids) * self.costs[ids].max(initial=0)) for ids in self._steps)
        return max(int(self.costs[ids].sum()) for ids in self._steps)

    def predict(self, choice: Choice, steps: range | None = None) -> Prediction:
        """The peak of the run, or of those of its `steps` alone.

        A first step has no optimizer states before its update, unless it is a resumed run's.
        Raises `ModelError` for a model that has no plan, `DataError` for a pair too long.
        """
        job, spec = self.job, with_precision(self.job.spec, choice.base_precision)
        heavy, n_packs = self._packs_of(choice.max_tokens_per_pack, steps)
        static = self._static(choice, spec)
        states, paged = state_bytes(choice.optim, static.sizes)
        held = self._held(static)
        gradients, borrowed = self._at_update(choice, static, n_packs)
        moments = [held | {STATES: states, GRADIENTS: gradients, WORKSPACE: borrowed}]
        replays: list[tuple[StepMemory, HeavyPack]] = []
        for one in heavy:
            own_states = states * one.has_states
            most = min(
                (one.at_most(other, step.total, gradients) for step, other in replays),
                default=math.inf,
            )
            highest = max(sum(moment.values()) for moment in moments)
            if sum(held.values()) + own_states + most <= highest:
                continue  # it can't decide
            settings = self._settings(choice, spec, n_packs > 1, one.has_gradients)
            step = self._replay(choice, spec, one.pack, settings)
            replays.append((step, one))
            moments.append(held | step.kinds | {STATES: own_states})
        peak = max(moments, key=lambda moment: sum(moment.values()))
        memory = {kind: peak.get(kind, 0) for kind in KINDS}
        allowance = 0
        if job.device.cuda:
            memory[WORKSPACE] += CUBLAS_WORKSPACE
            allowance = _allowance(memory)
        step, heaviest = max(replays, key=lambda found: found[0].total)
        return Prediction(
            choice,
            memory,
            allowance,
            step.host_bytes + paged,
            heaviest.pack.n_tokens,
            n_packs,
            self._seconds(choice, spec, static, heaviest.pack, step),
            self._making(static),
        )

    def least_static(self, choice: Choice) -> int:
        """Bytes that an update takes whatever the packs are: a bound that needs no replay."""
        spec = with_precision(self.job.spec, choice.base_precision)
        static = self._static(choice, spec)
        states, _ = state_bytes(choice.optim, static.sizes)
        gradients, borrowed = self._at_update(choice, static, n_packs=1)
        memory = self._held(static) | {STATES: states, GRADIENTS: gradients, WORKSPACE: borrowed}
        allowance = 0
        if self.job.device.cuda:
            memory[WORKSPACE] += CUBLAS_WORKSPACE
            allowance = _allowance(memory)
        return max(sum(memory.values()) + allowance, self._making(static))

    def most_saved_by_one_pack(self, choice: Choice) -> int:
        """Bytes that a step of several packs can take at most beyond one of a single pack: the sums
        of gradients, and beside them those of a pack."""
        static = self._static(choice, with_precision(self.job.spec, choice.base_precision))
        gradients, _ = self._at_update(choice, static, n_packs=2)
        return int((1 + FRAGMENTATION) * (gradients + static.trainable))

    # ---- the parts ----------------------------------------------------------------------------

    def _heavy_packs(self, steps: range) -> HeavyPacks:
        """Of `steps` by their places in the run; of a run on assumed pairs all find states."""
        job = self.job
        fresh = steps.start == 0 and job.rows_are_real and not job.args.optimizer_in_backward
        there = self._steps[steps.start : steps.stop] or self._steps[-1:]
        return HeavyPacks(job.pairs, job.packer, there, states_from=int(fresh))

    def _packs_of(self, max_tokens: int, steps: range | None) -> tuple[list[HeavyPack], int]:
        key = (max_tokens, steps)
        if key not in self._packs:
            heavy = self.heavy_packs if steps is None else self._heavy_packs(steps)
            self._packs[key] = heavy.of_tokens(max_tokens)
        return self._packs[key]

    def _held(self, static: _Static) -> dict[str, int]:
        """Bytes by kind that are there in every step from its first moment on."""
        has_adapter = self.job.spec.peft_config is not None
        both = static.frozen + static.trainable
        reference = self.job.reference_bytes
        return {
            WEIGHTS: static.frozen if has_adapter else both,
            ADAPTERS: static.trainable if has_adapter else 0,
            REFERENCE: both if reference is None else reference,
        }

    def _making(self, static: _Static) -> int:
        """Bytes before step 1 where they are more than the base: one in fp8 is in bf16 first, and
        converted layer by layer, through three fp32 copies of a weight."""
        if not static.converted:
            return 0
        context = CUDA_CONTEXT if self.job.device.cuda else 0
        more = sum(static.converted) + 12 * max(static.converted)
        return sum(self._held(static).values()) + more + context

    def _settings(
        self, choice: Choice, spec: TwinSpec, several_packs: bool, has_gradients: bool
    ) -> StepSettings:
        job = self.job
        dtype = torch.bfloat16 if job.bf16 else spec.dtype
        text = spec.config.get_text_config()
        softcap = getattr(text, "attn_logit_softcapping", None)
        return StepSettings(
            cuda=job.device.cuda,
            bf16=job.bf16,
            flash=job.device.cuda
            and dtype != torch.float32
            and softcap is None
            and job.args.attn_implementation != "sdpa",
            triton=job.device.cuda and job.args.logps_impl != "torch",
            padded=job.packer.mode == "padded",
            checkpointing=choice.gradient_checkpointing,
            offload=choice.activation_offloading and job.device.cuda,  # else host is device
            workspace_bytes=choice.logps_workspace_bytes,
            several_packs=several_packs,
            has_gradients=has_gradients,
            in_backward=job.args.optimizer_in_backward,
        )

    def _replay(
        self, choice: Choice, spec: TwinSpec, pack: Pack, settings: StepSettings
    ) -> StepMemory:
        key = (choice.base_precision, settings, tuple(pack.pair_ids.tolist()))
        if key not in self._replays:
            self._replays[key] = replay(spec, pack, settings)
        return self._replays[key]

    def _static(self, choice: Choice, spec: TwinSpec) -> _Static:
        if choice.base_precision not in self._statics:
            twin = build_twin(spec)
            sizes = tuple((p.numel(), p.nbytes) for p in twin.parameters() if p.requires_grad)
            converted = tuple(
                module.weight.numel() for module in twin.modules() if isinstance(module, Fp8Linear)
            )
            found = _Static(*weight_bytes(twin), sizes, converted)
            self._statics[choice.base_precision] = found
        return self._statics[choice.base_precision]

    def _at_update(self, choice: Choice, static: _Static, n_packs: int) -> tuple[int, int]:
        """(gradients, what the optimizer borrows) while weights are updated."""
        largest = max((size for _, size in static.sizes), default=0)
        if self.job.args.optimizer_in_backward:
            return largest, 0
        gradients = static.trainable
        if n_packs > 1:  # those of 16-bit parameters are summed in fp32
            gradients = sum(max(size, 4 * n) for n, size in static.sizes)
        borrowed = 0
        if choice.optim == "adamw_torch":  # all at once on a GPU, one by one on a CPU
            borrowed = static.trainable if self.job.device.cuda else 2 * largest
        return gradients, borrowed

    def _seconds(
        self, choice: Choice, spec: TwinSpec, static: _Static, pack: Pack, step: StepMemory
    ) -> float | None:
        """For a step of mean size: FLOPs and traffic per token, from the heaviest pack's."""
        text = spec.config.get_text_config()
        width = text.num_attention_heads * (
            getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        )
        segments = pack.layout.segments if pack.layout is not None else ()
        seen = sum((q1 - q0) * (k1 - k0 - (q1 - q0 - 1) / 2) for q0, q1, k0, k1 in segments)
        attention = 4 * width * seen * text.num_hidden_layers
        head = 2 * len(pack.targets) * text.vocab_size * text.hidden_size
        again = 1 if choice.gradient_checkpointing is True else 0
        head_trained = spec.peft_config is None
        flops = step.flops + attention * (3.5 + again) + head * (3 if head_trained else 2)
        if self.job.reference not in ("none", "precomputed"):
            flops += step.forward_flops + attention + head
        args = self.job.args
        tokens = float(self.costs.mean()) * (args.pairs_per_step // args.world_size)
        n_packs = max(tokens / choice.max_tokens_per_pack, 1.0)
        both = static.frozen + static.trainable
        moved = n_packs * (3 + (choice.gradient_checkpointing is not False)) * both
        states, paged = state_bytes(choice.optim, static.sizes)
        share = tokens / max(pack.n_tokens, 1)
        return step_seconds(
            self.job.device,
            flops=flops * share,
            bytes_moved=moved + 2 * states + 3 * static.trainable,
            host_bytes=2 * step.host_bytes * share + 2 * paged,
        )


def _allowance(memory: dict[str, int]) -> int:
    """Bytes that PyTorch's allocator can't use beside `memory` by kind, and CUDA itself."""
    moving = sum(memory.values()) - memory[WEIGHTS] - memory[REFERENCE]
    return CUDA_CONTEXT + int(FRAGMENTATION * moving)


def with_precision(spec: TwinSpec, base_precision: str | None) -> TwinSpec:
    """`spec` with its base held in another precision; None: as it is."""
    if base_precision is None:
        return spec
    bits = {"bf16": None, "8bit": 8, "4bit": 4}[base_precision]
    return replace(spec, dtype=torch.bfloat16, bits=bits, fp8=False)


def state_bytes(optim: str, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Bytes of the optimizer's states (on the device, paged to the host) over parameters of the
    given (elements, bytes).

    torch's AdamW holds two states in the parameter's dtype; bitsandbytes' two of 8 bits with an
    fp32 scale a block of 256, or fp32 ones below 4096 elements, and pages those from 100,000 on.
    """
    device = host = 0
    for n, size in sizes:
        if optim == "sgd":
            continue
        if "8bit" in optim:
            state = 2 * (n + 4 * -(-n // 256)) if n >= 4096 else 8 * n
        elif "32bit" in optim:
            state = 8 * n
        else:
            state = 2 * size
        if "paged" in optim and n >= 100_000:
            host += state
        else:
            device += state
    return device, host
