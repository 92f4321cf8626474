"""Reference log-probs of a whole dataset, computed before training: once, or never again.

Which packs they are computed in depends on the dataset alone, and a response that is missing is
computed with its whole pack: an interrupted computation ends with the same bits. What is stored
on disk, and how it is trusted, is reference_cache.py's affair.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from fastdpo_kernels import raise_pending

from .batch import Pack
from .data import TokenizedPairs
from .errors import ModelError
from .reference_cache import Health, ReferenceCache, response_key
from .reference_logps import Reference
from .runtime import rank_of_ranks, sum_over_ranks
from .steps import Packer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Precomputation:
    """What it took on this rank: distinct responses, those found on disk, packs, packs computed."""

    n_responses: int
    n_found: int
    n_packs: int
    n_computed: int


class PrecomputedReference:
    """Per-token fp32 log-probs of a dataset's distinct responses, on the host: 4 bytes a token.

    keys: the content hash of each response. slots [n, 2]: the response of each pair and side.
    Response u occupies `logps[starts[u] : starts[u + 1]]`.
    """

    name = "precompute"
    precomputation: Precomputation

    def __init__(self, pairs: TokenizedPairs, source: Reference):
        self.equals_initial_policy = source.equals_initial_policy
        index: dict[bytes, int] = {}
        slots = np.empty((len(pairs), 2), np.int64)
        lengths: list[int] = []
        for i in range(len(pairs)):
            prompt = pairs.prompt(i)
            for side, response in enumerate((pairs.chosen(i), pairs.rejected(i))):
                slot = slots[i, side] = index.setdefault(response_key(prompt, response), len(index))
                if slot == len(lengths):
                    # Behind an empty prompt nothing predicts the first token: it is not scored.
                    unscored = len(prompt) == 0 and len(response) > 0
                    lengths.append(len(response) - unscored)
        self.slots, self.keys = slots, list(index)
        self.starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self.logps = np.zeros(self.starts[-1], dtype=np.float32)

    def __len__(self) -> int:
        return len(self.keys)

    def of_response(self, slot: int) -> np.ndarray:
        """The log-probs of one distinct response: a view."""
        return self.logps[self.starts[slot] : self.starts[slot + 1]]

    def fill(self, found: dict[bytes, np.ndarray]) -> np.ndarray:
        """Takes what fits of `found`; returns which responses [U] have their values."""
        filled = np.zeros(len(self), dtype=bool)
        for slot, key in enumerate(self.keys):
            values, own = found.get(key), self.of_response(slot)
            if values is not None and len(values) == len(own):
                own[:] = values
                filled[slot] = True
        return filled

    def token_logps(self, packs: Sequence[Pack]) -> list[torch.Tensor]:
        return [self._of_pack(pack) for pack in packs]

    def _of_pack(self, pack: Pack) -> torch.Tensor:
        parts = [self.of_response(self.slots[pair_id, side]) for pair_id, side in pack.responses]
        values = np.concatenate(parts) if parts else np.empty(0, dtype=np.float32)
        if np.isnan(values).any():
            raise ModelError(
                f"the reference gave no finite log-prob for a response of pairs "
                f"{pack.pair_ids.tolist()}; check the reference model's weights and dtype"
            )
        return torch.from_numpy(values).to(pack.targets.device, non_blocking=True)


def precompute(
    source: Reference,
    pairs: TokenizedPairs,
    packer: Packer,
    *,
    cache: ReferenceCache | None = None,
    description: str,
    progress: bool,
) -> PrecomputedReference:
    """Runs `source` over all of `pairs`, forward only, but for what `cache` holds already.

    Ranks take the packs in turn and end with the same values. `CheckpointError` if the cache
    can't be written; what was computed until then is in it.
    """
    result = PrecomputedReference(pairs, source)
    found: dict[bytes, np.ndarray] = {}
    if cache is not None:
        found, health = cache.read(set(result.keys))
        _report(cache, health)
    filled = result.fill(found)
    n_found = int(filled.sum())

    rank, n_ranks = rank_of_ranks()
    plan = packer.plan(pairs, np.arange(len(pairs)))
    owned = list(_owned_responses(plan, result.slots))  # a response is its first pack's
    mine = range(rank, len(plan), n_ranks)
    todo = [k for k in mine if not filled[owned[k]].all()]
    with contextlib.closing(cache) if cache is not None else contextlib.nullcontext():
        n_pairs = sum(len(plan[k]) for k in todo)
        with tqdm(total=n_pairs, desc=description, unit="pair", disable=not progress) as bar:
            for k in todo:
                missing = owned[k][~filled[owned[k]]]
                _compute(source, packer.pack(pairs, plan[k]), result, missing)
                if cache is not None:
                    cache.append(_finite(result, missing))
                bar.update(len(plan[k]))
    if n_ranks > 1:
        _exchange(result, np.concatenate([owned[k] for k in mine] or [[]]), packer.device)
    result.precomputation = Precomputation(len(result), n_found, len(plan), len(todo))
    if cache is not None:
        logger.info(
            "%s: %d of %d responses found in %s; %d of %d packs computed",
            *(description, n_found, len(result), cache.root, len(todo), len(mine)),
        )
    return result


def _owned_responses(plan: list[list[int]], slots: np.ndarray) -> Iterator[np.ndarray]:
    """For each pack, the distinct responses that no earlier pack has."""
    taken = np.zeros(int(slots.max(initial=-1)) + 1, dtype=bool)
    for pair_ids in plan:
        held = np.unique(slots[pair_ids])
        yield held[~taken[held]]
        taken[held] = True


def _compute(
    source: Reference, pack: Pack, result: PrecomputedReference, wanted: np.ndarray
) -> None:
    (token_logps,) = source.token_logps([pack])
    assert token_logps is not None  # a source that gives none is never computed first
    values = token_logps.float().cpu().numpy()
    raise_pending()
    bounds = pack.cu_responses.tolist()
    for response, (pair_id, side) in enumerate(pack.responses):
        slot = result.slots[pair_id, side]
        if slot in wanted:
            result.of_response(slot)[:] = values[bounds[response] : bounds[response + 1]]


def _finite(result: PrecomputedReference, slots: np.ndarray) -> Iterator[tuple[bytes, np.ndarray]]:
    """(key, values) to keep; what is not finite is not, so that it is looked at again."""
    for slot in slots.tolist():
        values = result.of_response(slot)
        if np.isfinite(values).all():
            yield result.keys[slot], values


def _exchange(result: PrecomputedReference, mine: np.ndarray, device: torch.device) -> None:
    """Every rank's values of the responses that are its own, to all ranks."""
    values = np.zeros_like(result.logps)
    for slot in mine.astype(np.int64).tolist():
        span = slice(result.starts[slot], result.starts[slot + 1])
        values[span] = result.logps[span]
    result.logps = sum_over_ranks(torch.from_numpy(values).to(device)).cpu().numpy()


def _report(cache: ReferenceCache, health: Health) -> None:
    for where in health.damaged:
        logger.warning(
            "reference cache %s: damaged at %s; what was there is computed again",
            cache.folder,
            where,
        )
    for where in health.torn:
        logger.warning(
            "reference cache %s: incomplete or damaged at the end of %s; what was there is "
            "computed again",
            cache.folder,
            where,
        )
    for name in health.mended:
        logger.warning("reference cache %s: %s was damaged, and is mended", cache.folder, name)
