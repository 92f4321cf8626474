"""Which pairs form a pack, and how a pack is laid out.

A pack holds prompt groups: a prompt once, then all its responses. A response's last token predicts
nothing, so it is a target but no input. Everything here runs on the host, in numpy, without
randomness; no model is known here, and which pairs form a step is steps.py's affair.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from .batch import Pack, PackLayout
from .errors import ConfigError, DataError, did_you_mean
from .rows import RowGather

if TYPE_CHECKING:
    from .data import TokenizedPairs

MODES = ("shared", "unshared", "padded")


@dataclass
class _Group:
    """One prompt and its distinct responses, in order of appearance."""

    prompt: np.ndarray
    responses: list[np.ndarray] = field(default_factory=list)
    owners: list[tuple[int, int]] = field(default_factory=list)  # (pair id, side) seen first
    slots: dict[bytes, int] = field(default_factory=dict)  # response bytes -> place in responses
    pairs: list[tuple[int, int, int]] = field(default_factory=list)  # (order, chosen, rejected)

    def slot(self, response: np.ndarray, owner: tuple[int, int]) -> int:
        slot = self.slots.setdefault(response.tobytes(), len(self.responses))
        if slot == len(self.responses):
            self.responses.append(response)
            self.owners.append(owner)
        return slot


def _groups(pairs: TokenizedPairs, pair_ids: Iterable[int]) -> list[_Group]:
    groups: dict[bytes, _Group] = {}
    for order, i in enumerate(pair_ids):
        prompt = pairs.prompt(i)
        key = prompt.tobytes()
        if (group := groups.get(key)) is None:
            group = groups[key] = _Group(prompt)
        chosen = group.slot(pairs.chosen(i), (i, 0))
        rejected = group.slot(pairs.rejected(i), (i, 1))
        group.pairs.append((order, chosen, rejected))
    return list(groups.values())


def _own_length(response: int, with_last: bool) -> int:
    """Input tokens of a response: all but the last, which predicts nothing."""
    return response if with_last else max(response - 1, 0)


def _is_long(length: int, rope_threshold: int | None) -> bool:
    return rope_threshold is not None and length > rope_threshold


# ---- which pairs form a pack -----------------------------------------------------------------


def plan_packs(
    pairs: TokenizedPairs,
    pair_ids: Sequence[int] | np.ndarray,
    *,
    max_tokens: int,
    share_prompts: bool = True,
    padded: bool = False,
    with_last: bool = False,
    rope_threshold: int | None = None,
) -> list[list[int]]:
    """Splits `pair_ids` into few packs of at most `max_tokens` input tokens each, always the same.

    Best-fit decreasing over prompt groups (`share_prompts`; a group larger than a pack is split,
    its prompt repeated) or over single pairs. `padded` counts rows times the longest row instead;
    `with_last` and `rope_threshold` are `build_pack`'s.
    Within a pack the pairs keep the order of `pair_ids`. Raises `DataError` naming the row of a
    pair that exceeds `max_tokens` alone.
    """
    pair_ids = [int(i) for i in pair_ids]
    if padded:
        return _plan_padded(pairs, pair_ids, max_tokens, with_last)
    if share_prompts:
        items = [
            item
            for group in _groups(pairs, pair_ids)
            for item in _split_group(pairs, pair_ids, group, max_tokens, with_last, rope_threshold)
        ]
    else:
        items = [
            (_unshared_cost(pairs, i, max_tokens, with_last), [o]) for o, i in enumerate(pair_ids)
        ]

    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, pack), ascending
    for cost, orders in sorted(items, key=lambda item: (-item[0], item[1])):
        at = bisect.bisect_left(rooms, (cost, -1))  # the fullest pack that still has room
        room, pack = rooms.pop(at) if at < len(rooms) else (max_tokens, len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].extend(orders)
        bisect.insort(rooms, (room - cost, pack))
    return [[pair_ids[order] for order in sorted(orders)] for orders in packs]


def _too_large(pairs: TokenizedPairs, i: int, cost: int, max_tokens: int) -> DataError:
    return DataError(
        f"row {int(pairs.rows[i])}: its pair alone takes {cost} tokens of a pack, but "
        f"max_tokens_per_pack is {max_tokens}; raise max_tokens_per_pack or lower max_length"
    )


def _unshared_cost(pairs: TokenizedPairs, i: int, max_tokens: int, with_last: bool) -> int:
    (group,) = _groups(pairs, [i])
    cost = sum(len(group.prompt) + _own_length(len(r), with_last) for r in group.responses)
    if cost > max_tokens:
        raise _too_large(pairs, i, cost, max_tokens)
    return cost


def _split_group(
    pairs: TokenizedPairs,
    pair_ids: list[int],
    group: _Group,
    max_tokens: int,
    with_last: bool,
    rope_threshold: int | None,
) -> list[tuple[int, list[int]]]:
    """(tokens, places in `pair_ids`) of the pieces of a prompt group, each within `max_tokens`."""
    prompt = len(group.prompt)
    costs = [_own_length(len(r), with_last) for r in group.responses]
    is_long = [_is_long(prompt + cost, rope_threshold) for cost in costs]

    def cost_of(slots: Iterable[int]) -> int:  # those responses, and the prompt for each kind
        slots = list(slots)
        return sum(costs[s] for s in slots) + prompt * len({is_long[s] for s in slots})

    total = cost_of(range(len(costs)))
    if total <= max_tokens:
        return [(total, [order for order, _, _ in group.pairs])]

    pieces: list[tuple[int, list[int], set[int]]] = []  # tokens, places, responses held
    own_cost = {order: cost_of({c, r}) for order, c, r in group.pairs}
    for order, chosen, rejected in sorted(group.pairs, key=lambda p: (-own_cost[p[0]], p[0])):
        if own_cost[order] > max_tokens:
            raise _too_large(pairs, pair_ids[order], own_cost[order], max_tokens)
        for k, (_, orders, held) in enumerate(pieces):
            cost = cost_of(held | {chosen, rejected})
            if cost <= max_tokens:
                pieces[k] = (cost, [*orders, order], held | {chosen, rejected})
                break
        else:
            pieces.append((own_cost[order], [order], {chosen, rejected}))
    return [(cost, sorted(orders)) for cost, orders, _ in pieces]


def _plan_padded(
    pairs: TokenizedPairs, pair_ids: list[int], max_tokens: int, with_last: bool
) -> list[list[int]]:
    """Longest pairs first, so that rows of one batch are of like length."""
    longest, n_rows = [], []
    for i in pair_ids:
        (group,) = _groups(pairs, [i])
        own = max(_own_length(len(r), with_last) for r in group.responses)
        longest.append(len(group.prompt) + own)
        n_rows.append(len(group.responses))
    packs: list[list[int]] = []
    length = rows = 0
    for order in sorted(range(len(pair_ids)), key=lambda o: (-longest[o], o)):
        if n_rows[order] * longest[order] > max_tokens:
            cost = n_rows[order] * longest[order]
            raise _too_large(pairs, pair_ids[order], cost, max_tokens)
        if not packs or (rows + n_rows[order]) * length > max_tokens:
            packs.append([])
            length, rows = longest[order], 0
        packs[-1].append(order)
        rows += n_rows[order]
    return [[pair_ids[order] for order in sorted(orders)] for orders in packs]


def pair_costs(pairs: TokenizedPairs, mode: str, with_last: bool = False) -> np.ndarray:
    """[n] tokens that each pair alone takes of a pack: what `plan_packs` counts where a pair's
    responses differ."""
    lengths = pairs.lengths
    prompt = lengths[:, 0]
    inputs = lengths[:, 1:] if with_last else np.maximum(lengths[:, 1:] - 1, 0)
    if mode == "shared":
        return prompt + inputs.sum(axis=1)
    if mode == "padded":
        return 2 * (prompt + inputs.max(axis=1))
    return 2 * prompt + inputs.sum(axis=1)


def longest_pair(pairs: TokenizedPairs, mode: str, with_last: bool = False) -> tuple[int, int]:
    """(row, tokens) of the pair that takes most tokens of a pack."""
    costs = pair_costs(pairs, mode, with_last)
    worst = int(costs.argmax())
    return int(pairs.rows[worst]), int(costs[worst])


# ---- how a pack is laid out ------------------------------------------------------------------


@dataclass
class _Rows:
    """Token rows as they are laid out, and the attention segments over them."""

    ids: list[np.ndarray] = field(default_factory=list)
    # Of each array in `ids`, for all its rows:
    lengths: list[int] = field(default_factory=list)
    start_positions: list[int] = field(default_factory=list)
    multiplicities: list[int] = field(default_factory=list)
    kinds: list[bool] = field(default_factory=list)  # of rotary frequencies: long?
    kv: list[np.ndarray] = field(default_factory=list)
    q_lengths: list[int] = field(default_factory=list)
    k_lengths: list[int] = field(default_factory=list)
    prompts: list[tuple[int, int]] = field(default_factory=list)
    predict: list[np.ndarray] = field(default_factory=list)
    n: int = 0

    def append(
        self, ids: np.ndarray, start_position: int, multiplicity: int, is_long: bool
    ) -> np.ndarray:
        """Lays `ids` down, which stand for `multiplicity` tokens each; returns their rows."""
        self.ids.append(ids)
        self.lengths.append(len(ids))
        self.start_positions.append(start_position)
        self.multiplicities.append(multiplicity)
        self.kinds.append(is_long)
        rows = np.arange(self.n, self.n + len(ids))
        self.n += len(ids)
        return rows

    @property
    def positions(self) -> np.ndarray:
        ends = np.cumsum(self.lengths)
        shift = np.array(self.start_positions) - (ends - self.lengths)
        return np.arange(self.n) + np.repeat(shift, self.lengths)

    @property
    def multiplicity(self) -> np.ndarray:
        return np.repeat(np.array(self.multiplicities, np.float32), self.lengths)

    @property
    def is_long(self) -> np.ndarray:
        return np.repeat(np.array(self.kinds, np.bool_), self.lengths)

    def segment(self, q_rows: int, k_rows: np.ndarray) -> None:
        if q_rows:
            self.q_lengths.append(q_rows)
            self.k_lengths.append(len(k_rows))
            self.kv.append(k_rows)
            repeated = len(k_rows) - q_rows  # a prompt's rows lie together
            start = int(k_rows[0]) if repeated else 0
            self.prompts.append((start, start + repeated))

    def pad_to(self, length: int) -> None:
        """Appends rows that stand for nothing, in segments no longer than those there are."""
        longest = max(self.k_lengths)
        while self.n < length:
            n = min(longest, length - self.n)
            self.segment(n, self.append(np.zeros(n, np.int32), 0, 0, False))


def _lay_out(
    groups: list[_Group], share: bool, with_last: bool, rope_threshold: int | None
) -> _Rows:
    rows = _Rows()
    for group in groups:
        n_prompt = len(group.prompt)
        used = np.bincount([slot for _, *slots in group.pairs for slot in slots])  # by response
        used *= [len(response) > 0 for response in group.responses]  # unpaired data's empty side
        lengths = [n_prompt + _own_length(len(r), with_last) for r in group.responses]
        is_long = np.array([_is_long(length, rope_threshold) for length in lengths])
        prompts: dict[bool, np.ndarray] = {}  # by kind of rotary frequencies
        for slot, response in enumerate(group.responses):
            kind, uses = bool(is_long[slot]), int(used[slot])
            is_first = kind not in prompts or not share
            if is_first:
                stands_for = int(used[is_long == kind].sum()) if share else uses
                prompts[kind] = rows.append(group.prompt, 0, stands_for, kind)
            own = rows.append(response[: lengths[slot] - n_prompt], n_prompt, uses, kind)
            keys = np.concatenate([prompts[kind], own])
            rows.segment(len(keys) if is_first else len(own), keys)
            first = len(prompts[kind]) - min(n_prompt, 1)  # the prompt's last row, then its own
            rows.predict.append(keys[first : first + len(response) - (n_prompt == 0)])
    if rows.n == 0:  # only single tokens without a prompt: one row that nobody reads keeps a graph
        rows.segment(1, rows.append(np.zeros(1, np.int32), 0, 0, False))
    return rows


def build_pack(
    pairs: TokenizedPairs,
    pair_ids: Sequence[int] | np.ndarray,
    *,
    mode: str,
    with_last: bool = False,
    rope_threshold: int | None = None,
    lengths: Sequence[int] = (),
) -> Pack:
    """Lays out the pairs `pair_ids` as one pack, on the host.

    `shared`: every prompt once. `unshared`: every response after its own copy of the prompt.
    `padded`: one row a response, padded at its right. An empty prompt leaves a response's first
    token without a row that predicts it: that token is neither scored nor counted. `with_last`
    puts responses' last tokens through the model too, for losses of all tokens (router_loss.py).
    Sequences of more than `rope_threshold` tokens share no prompt with shorter ones (rotary.py).
    Packs are padded at their tail to the next of `lengths`, ascending, by rows that nobody reads.
    """
    if mode not in MODES:
        raise ConfigError(f"packing mode {mode!r} is none of {MODES}{did_you_mean(mode, MODES)}")
    pair_ids = np.array([int(i) for i in pair_ids], dtype=np.int64)
    groups = _groups(pairs, pair_ids.tolist())
    rows = _lay_out(groups, mode == "shared", with_last, rope_threshold)

    if mode != "padded":
        rows.pad_to(next((n for n in lengths if n >= rows.n), rows.n))
    pair_responses = np.empty((len(pair_ids), 2), np.int64)
    owners, targets = [], []
    for group in groups:
        for order, chosen, rejected in group.pairs:
            pair_responses[order] = len(owners) + chosen, len(owners) + rejected
        owners += group.owners
        targets += [r[0 if len(group.prompt) else 1 :] for r in group.responses]
    predict = _concatenate(rows.predict, np.int64)
    by_pair = pairs.lengths[pair_ids]  # [P, 3]
    full = by_pair[:, :1] + by_pair[:, 1:]  # [P, 2]
    inputs = full if with_last else by_pair[:, :1] + np.maximum(by_pair[:, 1:] - 1, 0)
    max_seqlen = max(rows.k_lengths)
    is_long = rows.is_long

    if mode == "padded":
        input_ids, attention_mask, predict = _pad(rows, predict, max_seqlen)
        multiplicity = np.zeros(input_ids.shape, np.float32)
        real = attention_mask.numpy() > 0
        multiplicity[real] = rows.multiplicity
        by_row = np.zeros(input_ids.shape, np.bool_)
        by_row[real] = is_long
        is_long = by_row | by_row[:, :1]  # a row's padding is of its kind
        position_ids = layout = None
    else:
        input_ids = _concatenate(rows.ids, np.int64)
        position_ids = torch.from_numpy(rows.positions)
        attention_mask, layout = None, _layout(rows, max_seqlen)
        multiplicity = rows.multiplicity
    return Pack(
        input_ids=torch.from_numpy(input_ids),
        position_ids=position_ids,
        layout=layout,
        attention_mask=attention_mask,
        predict=RowGather.plan(predict, input_ids.size),
        multiplicity=torch.from_numpy(multiplicity),
        targets=torch.from_numpy(_concatenate(targets, np.int64)),
        cu_responses=torch.from_numpy(_cumulative([len(t) for t in targets])),
        pairs=torch.from_numpy(pair_responses),
        pair_ids=pair_ids,
        responses=tuple(owners),
        max_seqlen=max_seqlen,
        n_tokens=input_ids.size,
        n_tokens_unshared=int(inputs.sum()),
        n_tokens_padded=int(full.size * full.max(initial=0)),
        rope_threshold=rope_threshold,
        long_rows=torch.from_numpy(is_long) if is_long.any() else None,
        columns={name: torch.from_numpy(of[pair_ids]) for name, of in pairs.columns.items()},
    )


def _layout(rows: _Rows, max_seqlen_k: int) -> PackLayout:
    cu_q, cu_k = _cumulative(rows.q_lengths), _cumulative(rows.k_lengths)
    bounds = np.stack([cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:]], axis=1)
    return PackLayout(
        kv=RowGather.plan(_concatenate(rows.kv, np.int64), rows.n),
        cu_seqlens_q=torch.from_numpy(cu_q),
        cu_seqlens_k=torch.from_numpy(cu_k),
        segments=tuple(map(tuple, bounds.tolist())),
        prompts=tuple(rows.prompts),
        max_seqlen_q=max(rows.q_lengths),
        max_seqlen_k=max_seqlen_k,
    )


def _pad(
    rows: _Rows, predict: np.ndarray, length: int
) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
    """[B, length] ids and mask of unshared rows, and `predict` moved to the flattened batch."""
    lengths = np.array(rows.q_lengths)
    mask = np.arange(length) < lengths[:, None]
    input_ids = np.zeros(mask.shape, np.int64)  # 0 is a token of every model; the mask hides it
    input_ids[mask] = _concatenate(rows.ids, np.int64)
    return input_ids, torch.from_numpy(mask.astype(np.int64)), np.flatnonzero(mask)[predict]


def _concatenate(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts], dtype=dtype, casting="same_kind")


def _cumulative(lengths: Sequence[int]) -> np.ndarray:
    return np.cumsum([0, *lengths], dtype=np.int32)
