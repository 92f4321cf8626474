"""What a run measures: sums kept on the device between logs, counts, and rates.

Nothing here synchronises with the device except `PreferenceMetrics.read`, on logging steps.
"""

import time
from dataclasses import dataclass, field

import torch

from fastdpo_kernels import TokenStats

from .batch import Pack
from .data import TokenizedPairs
from .objective import PackLoss
from .pair_logps import per_response
from .runtime import sum_over_ranks, total_over_ranks

# One column a metric, TRL's names. All are means over pairs.
NAMES = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
# Of unpaired data: means over the desirable or undesirable examples, and KTO's baseline.
UNPAIRED_NAMES = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kl")
# With log_token_stats: means over tokens, of both responses, of chosen, of rejected, of chosen.
TOKEN_NAMES = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")
TOKEN_STATS = ("entropy", "mean_logits", "is_top1")


class PreferenceMetrics:
    """Sums over pairs, fp64, on the device; only `read` and `run_loss` wait for it.

    Two rows: since the last `reset`, and over the whole run. unpaired: chosen and rejected are the
    responses of desirable and of undesirable examples.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        token_stats: bool = False,
        unpaired: bool = False,
        router: bool = False,
    ):
        self.token_stats, self.unpaired, self.router = token_stats, unpaired, router
        n_columns = 2 + (2 + len(UNPAIRED_NAMES) if unpaired else len(NAMES))
        n_columns += router + (2 + len(TOKEN_NAMES) if token_stats else 0)
        self.sums = torch.zeros(2, n_columns, dtype=torch.float64, device=device)

    def add(self, loss: PackLoss, pack: Pack, stats: TokenStats | None) -> None:
        """Adds one pack; `stats`: of its tokens, read if made with `token_stats`."""
        columns = [loss.losses, torch.ones_like(loss.losses)]
        columns += _unpaired_columns(loss, pack) if self.unpaired else _pair_columns(loss)
        if self.token_stats:
            assert stats is not None
            columns += _token_columns(pack, stats, self.unpaired)
        self.sums[:, : len(columns)] += torch.stack([column.double().sum() for column in columns])

    def add_router(self, loss: torch.Tensor, coefficient: float, n_pairs: int) -> None:
        """Adds a step's router loss, for the `n_pairs` of this rank; it is part of `loss`."""
        self.sums[:, -1] += n_pairs * loss
        self.sums[:, 0] += n_pairs * coefficient * loss

    def read(self) -> dict[str, float]:
        """Means over all pairs of all ranks since the last reset; `loss` among them. One sync.

        Of unpaired data what no example stands for is left out.
        """
        loss, n_pairs, *sums = sum_over_ranks(self.sums[0].clone()).tolist()
        if n_pairs == 0:
            return {}
        aux_loss = sums.pop() / n_pairs if self.router else None
        if self.unpaired:
            n_chosen, n_rejected, *sums = sums
            counts = (n_chosen, n_rejected, n_chosen, n_rejected, n_pairs)
            of_names = zip(UNPAIRED_NAMES, sums, counts, strict=False)
            means = {name: value / n for name, value, n in of_names if n}
            if n_chosen and n_rejected:
                means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        else:
            means = {name: value / n_pairs for name, value in zip(NAMES, sums, strict=False)}
        if aux_loss is not None:
            means["aux_loss"] = aux_loss
        if self.token_stats:
            n_chosen, n_rejected, *sums = sums[len(UNPAIRED_NAMES if self.unpaired else NAMES) :]
            counts = (n_chosen + n_rejected, n_chosen, n_rejected, n_chosen)
            for name, value, count in zip(TOKEN_NAMES, sums, counts, strict=True):
                means[name] = value / max(count, 1)
        return {"loss": loss / n_pairs, **means}

    def run_loss(self) -> float:
        """The mean loss over all pairs of the run."""
        loss, n_pairs, *_ = sum_over_ranks(self.sums[1].clone()).tolist()
        return loss / n_pairs if n_pairs else float("nan")

    def reset(self) -> None:
        """Forgets the pairs since the last log; the run's sums go on."""
        self.sums[0].zero_()


def _pair_columns(loss: PackLoss) -> list[torch.Tensor]:
    chosen, rejected = loss.chosen_rewards, loss.rejected_rewards
    margins = chosen - rejected
    logps = [loss.chosen_logps, loss.rejected_logps]
    return [chosen, rejected, chosen > rejected, margins, *logps]


def _unpaired_columns(loss: PackLoss, pack: Pack) -> list[torch.Tensor]:
    """How many examples of each label, then the sums that `UNPAIRED_NAMES` are means of."""
    kl = torch.zeros_like(loss.losses) if loss.kl is None else loss.kl
    of_label = [
        _by_label(values, pack).unbind(1)
        for values in (torch.ones_like(loss.losses), loss.chosen_rewards, loss.chosen_logps)
    ]
    return [side for sides in of_label for side in sides] + [kl]


def _by_label(values: torch.Tensor, pack: Pack) -> torch.Tensor:
    """[P] of the examples' own responses -> [P, 2]: of desirable ones, of undesirable ones."""
    desirable = pack.columns["label"]
    return torch.stack([values * desirable, values * (1 - desirable)], 1)


def _token_columns(pack: Pack, stats: TokenStats, unpaired: bool) -> list[torch.Tensor]:
    """Scored tokens of chosen and rejected, then the sums that `TOKEN_NAMES` are means of."""
    assert stats.entropy is not None and stats.mean_logits is not None
    assert stats.is_top1 is not None

    def sides(of_responses: torch.Tensor) -> torch.Tensor:  # [R] -> [P, 2]
        of_pairs = of_responses[pack.pairs]
        return _by_label(of_pairs[:, 0], pack) if unpaired else of_pairs

    lengths = sides(pack.cu_responses.diff())
    entropy, logits, top1 = (
        sides(per_response(of, pack)) for of in (stats.entropy, stats.mean_logits, stats.is_top1)
    )
    return [lengths[:, 0], lengths[:, 1], entropy, logits[:, 0], logits[:, 1], top1[:, 0]]


@dataclass
class PackStats:
    """How many tokens the packs held, and how many other layouts would have held. Counts."""

    n_pairs: int = 0
    n_packs: int = 0
    n_tokens: int = 0  # computed: what the packs held
    n_tokens_unshared: int = 0  # packed, the prompt repeated for every response
    n_tokens_padded: int = 0  # [2 P, longest] batches, padded to the longest of each step
    n_tokens_necessary: int = 0  # every prompt once per step, every response once, no padding

    def __add__(self, other: "PackStats") -> "PackStats":
        return PackStats(**{key: value + getattr(other, key) for key, value in vars(self).items()})

    @property
    def waste(self) -> float:
        """The fraction of computed tokens that was not necessary."""
        return 1 - self.n_tokens_necessary / self.n_tokens if self.n_tokens else 0.0


def stats_of_step(pairs: TokenizedPairs, packs: list[Pack]) -> PackStats:
    """The counts of one step's packs."""
    pair_ids = [pair_id for pack in packs for pair_id in pack.pair_ids.tolist()]
    lengths = pairs.lengths[pair_ids]  # [P, 3]: prompt, chosen, rejected
    longest = int((lengths[:, :1] + lengths[:, 1:]).max()) if pair_ids else 0
    return PackStats(
        n_pairs=len(pair_ids),
        n_packs=len(packs),
        n_tokens=sum(pack.n_tokens for pack in packs),
        n_tokens_unshared=sum(pack.n_tokens_unshared for pack in packs),
        n_tokens_padded=2 * len(pair_ids) * longest,
        n_tokens_necessary=_necessary_tokens(pairs, pair_ids),
    )


def _necessary_tokens(pairs: TokenizedPairs, pair_ids: list[int]) -> int:
    """Every distinct prompt once, and behind it every distinct response but its last token."""
    responses: dict[bytes, dict[bytes, int]] = {}
    for pair_id in pair_ids:
        behind = responses.setdefault(pairs.prompt(pair_id).tobytes(), {})
        for response in (pairs.chosen(pair_id), pairs.rejected(pair_id)):
            behind[response.tobytes()] = max(len(response) - 1, 0)
    return sum(
        len(prompt) // pairs.ids.itemsize + sum(behind.values())
        for prompt, behind in responses.items()
    )


@dataclass
class Throughput:
    """Pairs and tokens per second, of all ranks, since the last `reset`.

    Pauses (evaluation, saving) are left out.
    """

    pairs: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.perf_counter)
    paused: float = 0.0

    def add(self, stats: PackStats) -> None:
        self.pairs += stats.n_pairs
        self.tokens += stats.n_tokens

    def pause(self, seconds: float) -> None:
        self.paused += seconds

    def read(self, device: torch.device) -> dict[str, float]:
        seconds = max(time.perf_counter() - self.started - self.paused, 1e-9)
        return {
            "pairs_per_second": total_over_ranks(self.pairs, device) / seconds,
            "tokens_per_second": total_over_ranks(self.tokens, device) / seconds,
        }

    def reset(self) -> None:
        self.pairs, self.tokens, self.paused = 0, 0, 0.0
        self.started = time.perf_counter()
