"""From pairs to what the loop consumes: the steps of an epoch, each split into packs on the device.

`packing.py` knows how pairs become packs; here is which pairs form a step, on which rank, and
the copy to the device ahead of time. The only randomness is the seeded order of an epoch.
"""

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from .batch import Pack
from .body import pack_lengths
from .config import DPOConfig
from .data import TokenizedPairs
from .errors import ConfigError, DataError, did_you_mean
from .metrics import PackStats, stats_of_step
from .packing import build_pack, plan_packs
from .runtime import prefetch

SAMPLINGS = ("random", "sequential")


@dataclass(frozen=True)
class Packer:
    """Packs in the mode that the model takes, of at most `max_tokens` tokens, on `device`.

    max_seqlen: the longest sequence that the model's rotary embedding takes in a pack, if bounded.
    with_last: whether responses' last tokens, which predict nothing, go through the model too.
    rope_threshold: sequences longer than this get other rotary frequencies, if there are any.
    lengths: what packs are padded to, if anything.
    """

    mode: str
    max_tokens: int
    device: torch.device
    max_seqlen: int | None = None
    with_last: bool = False
    rope_threshold: int | None = None
    lengths: tuple[int, ...] = ()

    def of_tokens(self, max_tokens: int, padded: bool | None = None) -> "Packer":
        """The same with packs of at most `max_tokens`; padded: whether to the few lengths that
        compiled layers take, by default as it is."""
        padded = bool(self.lengths) if padded is None else padded
        lengths = pack_lengths(max_tokens) if padded else ()
        return replace(self, max_tokens=max_tokens, lengths=lengths)

    def plan(self, pairs: TokenizedPairs, pair_ids: np.ndarray) -> list[list[int]]:
        """The pair ids of each pack; `DataError` names the row of a pair that can't fit."""
        if self.max_seqlen is not None and len(pair_ids):
            lengths = pairs.lengths[pair_ids]
            longest = lengths[:, 0] + lengths[:, 1:].max(axis=1) - (not self.with_last)
            worst = int(longest.argmax())
            if longest[worst] > self.max_seqlen:
                raise DataError(
                    f"row {int(pairs.rows[pair_ids[worst]])} takes {int(longest[worst])} tokens; "
                    f"past {self.max_seqlen} this model's rotary embedding would change for every "
                    f"row packed with it: set max_length to {self.max_seqlen}"
                )
        return plan_packs(
            pairs,
            pair_ids,
            max_tokens=self.max_tokens,
            share_prompts=self.mode == "shared",
            padded=self.mode == "padded",
            with_last=self.with_last,
            rope_threshold=self.rope_threshold,
        )

    def packs(self, pairs: TokenizedPairs, pair_ids: np.ndarray) -> Iterator[Pack]:
        """The packs that hold `pair_ids`, one at a time."""
        for ids in self.plan(pairs, pair_ids):
            yield self.pack(pairs, ids)

    def pack(self, pairs: TokenizedPairs, pair_ids: list[int]) -> Pack:
        """One pack of a plan, on the device."""
        pack = build_pack(
            pairs,
            pair_ids,
            mode=self.mode,
            with_last=self.with_last,
            rope_threshold=self.rope_threshold,
            lengths=self.lengths,
        )
        if self.device.type == "cuda":
            pack = pack.pin_memory().to(self.device, non_blocking=True)
        return pack


@dataclass(frozen=True)
class StepPacks:
    """One optimizer step on this rank: its packs on the device, and what they hold."""

    packs: list[Pack]
    n_pairs: int  # over all ranks: what the loss is divided by
    mean_chosen_length: float  # scored tokens, over the pairs of all ranks
    stats: PackStats
    trained: list[Pack] | None = None  # what gradients run through, where that is not `packs`


def mean_chosen_length(pairs: TokenizedPairs, pair_ids: np.ndarray) -> float:
    """Scored tokens of the chosen responses, a mean over `pair_ids`."""
    return float(pairs.scored_lengths[pair_ids, 0].mean())


def steps_of_epoch(pairs: TokenizedPairs, args: DPOConfig) -> int:
    """How many steps an epoch has; 0 where the only one is dropped for being short."""
    full, rest = divmod(len(pairs), args.pairs_per_step)
    return full + (rest > 0 and not args.dataloader_drop_last)


def step_pair_ids(
    pairs: TokenizedPairs,
    *,
    pairs_per_step: int,
    epoch: int,
    seed: int,
    sampling: str = "random",
    group_by_prompt: bool = False,
) -> list[np.ndarray]:
    """The pair ids of every optimizer step of `epoch`: `pairs_per_step` each, the last maybe fewer.

    `random` orders depend on (seed, epoch) alone; `sequential` keeps the dataset's order.
    `group_by_prompt` puts pairs of one prompt into one step: where random, as far as steps of a
    fixed size allow; where sequential, next to each other from where the prompt occurs first.
    """
    if sampling not in SAMPLINGS:
        raise ConfigError(
            f"train_sampling_strategy {sampling!r} is none of {SAMPLINGS}"
            f"{did_you_mean(sampling, SAMPLINGS)}"
        )
    n = len(pairs)
    order = np.arange(n)
    if sampling == "random":
        order = np.random.default_rng([seed, epoch]).permutation(n)
    if not group_by_prompt:
        return _chop(order, pairs_per_step)
    groups: dict[bytes, list[int]] = {}
    for i in order.tolist():
        groups.setdefault(pairs.prompt(i).tobytes(), []).append(i)
    if sampling == "sequential":
        return _chop(np.array([i for group in groups.values() for i in group]), pairs_per_step)
    steps = _fill_steps(list(groups.values()), n, pairs_per_step)
    # The short step stays last; the others were filled with large groups first, so mix them.
    shuffle = np.random.default_rng([seed, epoch, 1]).permutation(n // pairs_per_step)
    return [steps[k] for k in [*shuffle.tolist(), *range(n // pairs_per_step, len(steps))]]


def _chop(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def _fill_steps(groups: list[list[int]], n: int, size: int) -> list[np.ndarray]:
    """Fills steps of `size` pairs with whole groups, the largest into the emptiest step first.

    A group is divided only where no step has room for all of it.
    """
    rooms = [min(size, n - start) for start in range(0, n, size)]
    steps: list[list[int]] = [[] for _ in rooms]
    emptiest = [(-room, k) for k, room in enumerate(rooms)]
    heapq.heapify(emptiest)
    for group in sorted(groups, key=len, reverse=True):  # stable: ties stay in the epoch's order
        while group:
            negative_room, k = heapq.heappop(emptiest)
            taken, group = group[:-negative_room], group[-negative_room:]
            steps[k] += taken
            if negative_room + len(taken):
                heapq.heappush(emptiest, (negative_room + len(taken), k))
    return [np.array(step) for step in steps]


def order_of_epoch(pairs: TokenizedPairs, args: DPOConfig, epoch: int) -> list[np.ndarray]:
    """The pair ids of each step of `epoch`, those of all ranks."""
    return step_pair_ids(
        pairs,
        pairs_per_step=args.pairs_per_step,
        epoch=epoch,
        seed=args.seed if args.data_seed is None else args.data_seed,
        sampling=args.train_sampling_strategy,
        group_by_prompt=args.group_by_prompt,
    )[: steps_of_epoch(pairs, args)]


class StepPlan:
    """How many steps a run has, and which pairs and packs each of them holds on this rank.

    trained: `pairs` as far as gradients reach them, if no further than a second response: a step of
        several packs, which takes two passes, then has packs of these for the second.
    """

    def __init__(
        self,
        pairs: TokenizedPairs,
        args: DPOConfig,
        packer: Packer,
        trained: TokenizedPairs | None = None,
    ):
        self.pairs, self.args, self.packer, self.trained = pairs, args, packer, trained
        self.steps_per_epoch = steps_of_epoch(pairs, args)
        if self.steps_per_epoch == 0:
            raise DataError(
                f"{len(pairs)} pairs are fewer than one step of {args.pairs_per_step}, and "
                "dataloader_drop_last drops them; lower per_device_train_batch_size"
            )
        by_epochs = math.ceil(args.num_train_epochs * self.steps_per_epoch)
        self.max_steps = args.max_steps if args.max_steps > 0 else by_epochs
        self.n_epochs = math.ceil(self.max_steps / self.steps_per_epoch)
        packer.plan(pairs, np.arange(len(pairs)))  # names a pair that can't fit before step 1

    def packs_of_steps(self, epoch: int) -> list[int]:
        """How many packs each step of `epoch` has, all ranks' pairs taken together."""
        return [len(self.packer.plan(self.pairs, ids)) for ids in self._order(epoch)]

    def _order(self, epoch: int) -> list[np.ndarray]:
        return order_of_epoch(self.pairs, self.args, epoch)

    def steps(self, epoch: int, skip: int) -> Iterator[StepPacks]:
        """The steps of `epoch` from the `skip`-th on; made ahead of time on a GPU."""
        args = self.args
        order = self._order(epoch)[skip:]

        def make() -> Iterator[StepPacks]:
            for pair_ids in order:
                mine = pair_ids[args.process_index :: args.world_size]
                packs = list(self.packer.packs(self.pairs, mine))
                trained = None
                if self.trained is not None and len(packs) > 1:
                    trained = [self.packer.pack(self.trained, p.pair_ids.tolist()) for p in packs]
                yield StepPacks(
                    packs,
                    n_pairs=len(pair_ids),
                    mean_chosen_length=mean_chosen_length(self.pairs, pair_ids),
                    stats=stats_of_step(self.pairs, packs),
                    trained=trained,
                )

        return prefetch(make) if self.packer.device.type == "cuda" else make()
