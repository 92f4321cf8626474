"""Every loss × f-divergence × smoothing × LD-DPO × WPO on random log-probs, apart from any model:
TRL's `_compute_loss` and ours, value, gradient of every token and metrics, in fp64.

Pairs share prompts and responses here, which TRL's batch repeats; tests/test_losses_trl.py has the
same matrix on a model.
"""

import collections
import contextlib
import functools
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastdpo import DPOConfig
from fastdpo.batch import Pack
from fastdpo.data import TokenizedPairs
from fastdpo.metrics import TOKEN_STATS, PreferenceMetrics
from fastdpo.objective import Objective, ScoredPack
from fastdpo.packing import build_pack
from fastdpo.steps import mean_chosen_length
from fastdpo_kernels import TokenStats
from tests.test_losses_trl import F_DIVERGENCES, SMOOTHED, STEP_WIDE, TRL_LOSSES, WITH_F

trl = pytest.importorskip("trl", minversion="1.16", reason="the peer to compare with")

# Responses of one token and of many, ties in length, one response in three pairs.
LENGTHS = [(1, 1), (1, 9), (12, 3), (5, 5), (7, 6), (2, 11), (4, 4)]
P = len(LENGTHS)
# fp64: sums of a dozen numbers of size 5 and some ten functions of them, as slopes up to 100
# (ipo's and sppo_hard's squares at beta 0.1).
RTOL = 1e-11
# TRL's alpha-divergence takes no fp64. In fp32 sums of size 70 err by some 4 eps 70 = 3e-5 nat, and
# losses and gradients by that times beta 0.3 and a score's slope exp((alpha - 1) r) of up to e.
ALPHA_RTOL = 5e-5


def random_pack() -> tuple[TokenizedPairs, Pack]:
    rng = np.random.default_rng(1)
    chosens, rejecteds = (
        [rng.integers(0, 999, lengths[side]).tolist() for lengths in LENGTHS] for side in (0, 1)
    )
    chosens[4] = rejecteds[3] = chosens[3]  # shared, and equal responses in one pair
    prompts = [[i] for i in (0, 1, 2, 3, 3, 4, 5)]
    pairs = TokenizedPairs.from_lists(prompts, chosens, rejecteds)
    return pairs, build_pack(pairs, range(P), mode="shared")


def needs_fp32(options: dict) -> bool:
    is_alpha = options.get("f_divergence_type") == "alpha_divergence"
    return is_alpha and options.get("f_alpha_divergence_coef") != 1.0


class Case:
    """A pack's random token log-probs [N] and statistics, in our form and in TRL's."""

    def __init__(self, seed: int):
        self.pairs, self.pack = random_pack()
        generator = torch.Generator().manual_seed(seed)
        n = len(self.pack.targets)

        def draw(low: float, high: float) -> torch.Tensor:
            return low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)

        self.policy = draw(-6, 0)
        self.reference = self.policy + draw(-1, 1)
        self.squares = draw(-4, 0)
        self.stats = TokenStats(
            entropy=draw(0, 5),
            mean_logits=draw(-3, 3),
            is_top1=draw(0, 1) > 0.5,
            log_sum_sq_probs=self.squares,
        )

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """[N] -> TRL's [2P, L]: every response of every pair in a row of its own, padded."""
        bounds = self.pack.cu_responses.tolist()
        of_pairs = self.pack.pairs.T.reshape(-1).tolist()
        parts = [values[bounds[r] : bounds[r + 1]] for r in of_pairs]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

    def theirs(self, options: dict) -> tuple[float, torch.Tensor, dict[str, float]]:
        dtype = torch.float32 if needs_fp32(options) else torch.float64
        leaf = self.policy.to(dtype, copy=True).requires_grad_()
        policy = SimpleNamespace(
            log_probs=self.rows(leaf),
            **{name: self.rows(getattr(self.stats, name)) for name in (*TOKEN_STATS,)},
            log_sum_sq_probs=self.rows(self.squares.to(dtype)),
        )
        mask = self.rows(torch.ones(len(leaf), dtype=torch.long))
        whole = torch.nn.functional.pad(mask, (1, 0))  # one prompt token
        batch = {
            "input_ids": whole,
            "attention_mask": whole,
            "completion_mask": whole,
            "ref_chosen_logps": None,
            "ref_rejected_logps": None,
        }
        trainer: Any = their_trainer(options, self.rows(self.reference.to(dtype)))
        with pytest.MonkeyPatch.context() as patch:
            # TRL 1.16 raises for hinge with WPO: it multiplies relu's saved output in place.
            patch.setattr(torch, "relu", lambda x: x.clamp(min=0))
            patch.setattr(torch, "tensor", functools.partial(torch.tensor, dtype=dtype))  # epsilon
            loss = trl.DPOTrainer._compute_loss(trainer, lambda **_: policy, batch, False)
        (gradient,) = torch.autograd.grad(loss, leaf)
        metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
        return loss.item(), gradient, metrics

    def ours(self, options: dict) -> tuple[float, torch.Tensor, dict[str, float]]:
        objective = Objective(DPOConfig(output_dir="unused", use_cpu=True, **options))
        scored = ScoredPack(self.pack, self.policy, self.reference, self.stats)
        length = mean_chosen_length(self.pairs, np.arange(P))
        (loss,) = objective([scored], length, grad=True)
        assert loss.token_grad is not None
        metrics = PreferenceMetrics(torch.device("cpu"), token_stats=True)
        metrics.add(loss, self.pack, self.stats)
        read = metrics.read()
        return read.pop("loss"), loss.token_grad / P, read


def their_trainer(options: dict, reference: torch.Tensor) -> SimpleNamespace:
    given = {
        "beta": 0.1,
        "label_smoothing": 0.0,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "use_weighting": False,
        **options,
    }
    losses = given.pop("loss_type")
    tau = given.pop("discopop_tau", 0.05)
    return SimpleNamespace(
        **{key: value for key, value in given.items() if key != "loss_weights"},
        loss_types=losses,
        loss_weights=given.get("loss_weights") or [1.0] * len(losses),
        args=SimpleNamespace(discopop_tau=tau, gradient_checkpointing_kwargs=None),
        model=torch.nn.Identity(),
        ref_model=lambda **_: SimpleNamespace(log_probs=reference),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        _metrics={"train": collections.defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )


@pytest.fixture(autouse=True)
def as_they_are(monkeypatch) -> None:
    """The stand-in for TRL's model has no checkpointing to switch off."""
    where = f"{trl.DPOTrainer.__module__}.disable_gradient_checkpointing"
    monkeypatch.setattr(where, lambda *args: contextlib.nullcontext())


def cases(name: str):
    base: dict = {"loss_type": [name], "beta": 0.3}
    fs = [{}, *F_DIVERGENCES.values()] if name in WITH_F else [{}]
    if name == "exo_pair":
        smoothings = [{"label_smoothing": s} for s in (0.001, 0.3)]
    else:
        smoothings = [{}, {"label_smoothing": 0.2}] if name in SMOOTHED else [{}]
    lds = [{}] if name == "sft" else [{}, *({"ld_alpha": a} for a in (0.0, 0.4))]
    # TRL 1.16 raises for sft with WPO: see below.
    wpos = [{}] if name in (*STEP_WIDE, "sft") else [{}, {"use_weighting": True}]
    taus = [{}, {"discopop_tau": 0.5}] if name == "discopop" else [{}]
    for parts in itertools.product(fs, smoothings, lds, wpos, taus):
        yield {**base, **{key: value for part in parts for key, value in part.items()}}


MIXES = [
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"loss_type": ["robust", "aot"], "label_smoothing": 0.1, "ld_alpha": 0.5},
    {"loss_type": ["aot_unpaired", "nca_pair", "sft"], "ld_alpha": 0.5},
    {"loss_type": ["exo_pair", "robust"], "label_smoothing": 0.3, "use_weighting": True},
    {"loss_type": ["ipo", "sft", "hinge"], "f_divergence_type": "js_divergence"},
    {"loss_type": ["aot", "aot_unpaired", "apo_zero"], "loss_weights": [1, 0, 3]},
]


def assert_same(case: Case, options: dict) -> None:
    found, expected = case.ours(options), case.theirs(options)
    rtol = ALPHA_RTOL if needs_fp32(options) else RTOL
    # exo_pair's loss is a small difference of terms of size 1.
    assert found[0] == pytest.approx(expected[0], rel=rtol, abs=rtol), options
    largest = float(expected[1].abs().max())
    assert largest > 1e-9
    error = float((found[1] - expected[1]).abs().max())
    assert error <= rtol * largest, (options, error / largest)
    for name, value in found[2].items():
        # TRL's are means in fp32 where they are not fp64; 3e-5 nat of fp32 sums.
        atol = 3e-5 if rtol == ALPHA_RTOL else 1e-9
        assert value == pytest.approx(expected[2][name], rel=1e-6, abs=atol), (options, name)
    assert found[2].keys() == expected[2].keys() - {"num_tokens"}


@pytest.mark.parametrize("name", TRL_LOSSES)
def test_the_matrix(name):
    tried = list(cases(name))
    for seed, options in enumerate(tried):
        assert_same(Case(seed), options)


@pytest.mark.parametrize("options", MIXES, ids=lambda o: "+".join(o["loss_type"]))
def test_mixes(options):
    assert_same(Case(0), options)


def test_the_matrix_can_fail():
    """Its cases differ: no option leaves the loss where it was."""
    case = Case(0)
    smoothing = {"exo_pair": 0.1, "robust": 0.1}
    base = {
        n: case.ours({"loss_type": [n], "label_smoothing": smoothing.get(n, 0.0)})[0]
        for n in TRL_LOSSES
    }
    assert min(abs(a - b) for a, b in itertools.combinations(base.values(), 2)) > 1e-4, base
    for options in ({"ld_alpha": 0.4}, {"use_weighting": True}, *list(F_DIVERGENCES.values())[:4]):
        assert abs(case.ours({"loss_type": ["sigmoid"], **options})[0] - base["sigmoid"]) > 1e-4


def test_where_trl_raises_ours_is_the_formula():
    """TRL 1.16 multiplies an expanded tensor in place for sft with WPO."""
    case, options = Case(0), {"loss_type": ["sft"], "use_weighting": True}
    with pytest.raises(RuntimeError, match="single memory location"):
        case.theirs(options)
    logps, squares = case.rows(case.policy), case.rows(case.squares)
    lengths = case.rows(torch.ones_like(case.policy)).sum(1)
    weights = torch.exp((logps - squares).sum(1) / lengths)
    # The step's mean NLL per token is a sum over pairs of their own; each takes its weight.
    shares = -logps[:P].sum(1) / lengths[:P].mean() * weights[:P] * weights[P:]
    assert case.ours(options)[0] == pytest.approx(float(shares.mean()), rel=RTOL)
