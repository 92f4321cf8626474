"""The memory and the time of a step, predicted for one choice of options.

`Planner.predict` adds up what is there all the time (weights, adapters, optimizer states, the
reference) and what a replay of the heaviest packs needs at its highest moment. Which options are
chosen is plan_choose.py's; what is printed and checked in a run, plan_cli.py's and plan_run.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from .batch import Pack
from .data import TokenizedPairs
from .packing import longest_pair, pair_costs, step_pair_ids
from .plan_device import CUDA_CONTEXT, Device, step_seconds
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
    reference_bytes: what it takes beside the policy, None for a whole copy of it.
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


@dataclass(frozen=True)
class Prediction:
    """memory: bytes at the peak of a step, by kind. allowance: what the allocator can't use, and
    CUDA itself. host_bytes: offloaded. pack_tokens, n_packs: of the heaviest pack and step.
    seconds: the least that a mean step takes; None if the device's rate is unknown."""

    choice: Choice
    memory: dict[str, int]
    allowance: int
    host_bytes: int
    pack_tokens: int
    n_packs: int
    seconds: float | None

    @property
    def peak(self) -> int:
        """Bytes allocated at the highest moment."""
        return sum(self.memory.values())

    @property
    def total(self) -> int:
        return self.peak + self.allowance


@dataclass(frozen=True)
class _Static:
    """Bytes that do not depend on packs; `sizes`: (elements, bytes) of each trained parameter."""

    frozen: int
    trainable: int
    sizes: tuple[tuple[int, int], ...]


@dataclass
class Planner:
    """Predictions for one job; replays are kept, so that asking again costs nothing."""

    job: Job
    _replays: dict[Any, StepMemory] = field(default_factory=dict)
    _statics: dict[Any, _Static] = field(default_factory=dict)
    _packs: dict[int, tuple[list[Pack], int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.costs = pair_costs(self.job.pairs, self.job.packer.mode, self.job.packer.with_last)

    @property
    def longest(self) -> tuple[int, int]:
        """(row, tokens) of the pair that takes most tokens of a pack."""
        return longest_pair(self.job.pairs, self.job.packer.mode, self.job.packer.with_last)

    @property
    def heaviest_step(self) -> int:
        """Most tokens that a step of the first epoch holds."""
        return max(int(self.costs[ids].sum()) for ids in self._steps())

    def predict(self, choice: Choice) -> Prediction:
        """Raises `ModelError` for a model that has no plan, `DataError` for a pair too long."""
        job, spec = self.job, with_precision(self.job.spec, choice.base_precision)
        packs, n_packs = self._heaviest_packs(choice.max_tokens_per_pack)
        settings = self._settings(choice, spec, n_packs)
        replays = [self._replay(choice, spec, pack, settings) for pack in packs]
        static = self._static(choice, spec)
        states, paged = state_bytes(choice.optim, static.sizes)
        memory = dict.fromkeys(KINDS, 0)
        has_adapter = spec.peft_config is not None
        memory[WEIGHTS] = static.frozen + (0 if has_adapter else static.trainable)
        memory[ADAPTERS] = static.trainable if has_adapter else 0
        memory[STATES] = states
        memory[REFERENCE] = (
            static.frozen + static.trainable if job.reference_bytes is None else job.reference_bytes
        )
        gradients, borrowed = self._at_update(choice, static, n_packs)
        heaviest = max(range(len(packs)), key=lambda i: replays[i].total)
        step = replays[heaviest]
        if step.total >= gradients + borrowed:
            for kind, size in step.kinds.items():
                memory[kind] += size
        else:
            memory[GRADIENTS], memory[WORKSPACE] = gradients, borrowed
        allowance = 0
        if job.device.cuda:
            memory[WORKSPACE] += CUBLAS_WORKSPACE
            moving = sum(memory.values()) - memory[WEIGHTS] - memory[REFERENCE]
            allowance = CUDA_CONTEXT + int(FRAGMENTATION * moving)
        pack = packs[heaviest]
        return Prediction(
            choice,
            memory,
            allowance,
            step.host_bytes + paged,
            pack.n_tokens,
            n_packs,
            self._seconds(choice, spec, static, pack, step),
        )

    def least_static(self, choice: Choice) -> int:
        """Bytes that are there whatever the packs are: a bound that needs no replay."""
        static = self._static(choice, with_precision(self.job.spec, choice.base_precision))
        reference = self.job.reference_bytes
        both = static.frozen + static.trainable
        context = CUDA_CONTEXT if self.job.device.cuda else 0
        states, _ = state_bytes(choice.optim, static.sizes)
        return both + states + (both if reference is None else reference) + context

    # ---- the parts ----------------------------------------------------------------------------

    def _steps(self) -> list[np.ndarray]:
        args = self.job.args
        return step_pair_ids(
            self.job.pairs,
            pairs_per_step=args.pairs_per_step // args.world_size,
            epoch=0,
            seed=args.seed if args.data_seed is None else args.data_seed,
            sampling=args.train_sampling_strategy,
            group_by_prompt=args.group_by_prompt,
        )

    def _heaviest_packs(self, max_tokens: int) -> tuple[list[Pack], int]:
        """The packs that decide, of the first epoch's heaviest steps (the one with most tokens and
        the one with the longest pair): that with most tokens, that with most scored tokens, and
        that with the longest pair; and how many packs such a step has."""
        if max_tokens not in self._packs:
            job, costs = self.job, self.costs
            scored = job.pairs.lengths[:, 1:].sum(axis=1)
            steps = self._steps()
            worst = int(costs.argmax())
            most = max(range(len(steps)), key=lambda k: int(costs[steps[k]].sum()))
            having = next(k for k, ids in enumerate(steps) if worst in ids)
            packer = job.packer.of_tokens(max_tokens)
            planned = {k: packer.plan(job.pairs, steps[k]) for k in {most, having}}
            packs = [ids for of_step in planned.values() for ids in of_step]
            chosen = {
                tuple(max(packs, key=lambda ids: int(costs[ids].sum()))),
                tuple(max(packs, key=lambda ids: int(scored[ids].sum()))),
                tuple(next(ids for ids in packs if worst in ids)),
            }
            built = [packer.pack(job.pairs, list(ids)) for ids in sorted(chosen)]
            self._packs[max_tokens] = built, max(map(len, planned.values()))
        return self._packs[max_tokens]

    def _settings(self, choice: Choice, spec: TwinSpec, n_packs: int) -> StepSettings:
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
            offload=choice.activation_offloading,
            workspace_bytes=choice.logps_workspace_bytes,
            several_packs=n_packs > 1,
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
            self._statics[choice.base_precision] = _Static(*weight_bytes(twin), sizes)
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


def with_precision(spec: TwinSpec, base_precision: str | None) -> TwinSpec:
    """`spec` with its base held in another precision; None: as it is."""
    if base_precision is None:
        return spec
    bits = {"bf16": None, "8bit": 8, "4bit": 4}[base_precision]
    return replace(spec, dtype=torch.bfloat16, bits=bits)


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
