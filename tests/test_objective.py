"""A step's loss and gradient: the same however the step is packed, by one pass over it or two."""

import copy
import functools
import math
import tempfile
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from transformers import TrainerCallback

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.data import TokenizedPairs
from fastdpo.loss_specs import LOSSES, SPECS
from fastdpo.losses import OPTIONS, REGISTRY, PairLogps, call, f_scores
from fastdpo.objective import Objective
from tests.test_keystone import fp64_norms, mixed_pairs, padded_unshared
from tests.tiny import tiny_llama
from tests.tiny_trainer import bare_config, trained_on_rows

V = 80


def with_columns(pairs: TokenizedPairs) -> TokenizedPairs:
    rng = np.random.default_rng(7)
    columns = {
        "weight": rng.uniform(0, 2, len(pairs)),
        "p_chosen": rng.uniform(0, 1, len(pairs)),
        "score_chosen": rng.normal(1, 1, len(pairs)),
        "score_rejected": rng.normal(0, 1, len(pairs)),
        # As of unpaired data, whose form is the same.
        "label": (np.arange(len(pairs)) % 3 > 0).astype(float),
    }
    return TokenizedPairs(pairs.ids, pairs.offsets, pairs.rows, columns)


@functools.cache
def models():
    """A policy and a reference near it, all in fp64: norms too, see test_keystone.py."""
    policy = tiny_llama(dtype=torch.float64, vocab_size=V)
    reference = copy.deepcopy(policy)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return fp64_norms(policy), fp64_norms(reference)


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class KeepGradients(TrainerCallback):
    def __init__(self):
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        assert model is not None
        self.found = gradients_of(model)


PACKED = {
    "one pack": {},
    "many packs": {"max_tokens_per_pack": 42},
    "accumulated": {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 7,
        "max_tokens_per_pack": 60,
    },
    "unshared": {"packing_mode": "unshared", "max_tokens_per_pack": 60},
    "padded": {"packing_mode": "padded", "max_tokens_per_pack": 120},
}


@functools.cache
def trainer(name: str) -> DPOTrainer:
    """A trainer whose steps leave the weights where they are; its objective is varied in place."""
    policy, reference = (copy.deepcopy(m) for m in models())
    args = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        optim="sgd",
        learning_rate=0.0,
        max_steps=1,
        max_grad_norm=0.0,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=["none"],
        disable_tqdm=True,
        **{"per_device_train_batch_size": 7, **PACKED[name]},
    )
    made = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=args,
        train_dataset=with_columns(mixed_pairs()),
        callbacks=[KeepGradients()],
    )
    made.train()
    assert (made.pack_stats.n_packs > 1) == (name != "one pack")
    return made


def step_of(name: str, options: dict) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, gradients) of the first step under the loss `options`."""
    made = trainer(name)
    made.objective = Objective(bare_config(**options))
    made.plan.trained = made.objective.trained_pairs(made.plan.pairs)
    made.metrics = made._new_metrics()
    made._train_step(next(iter(made.plan.steps(0, skip=0))))
    (kept,) = [c for c in made.callback_handler.callbacks if isinstance(c, KeepGradients)]
    return made.metrics.read()["loss"], kept.found


def by_autograd(options: dict) -> tuple[float, dict[str, torch.Tensor]]:
    """The same by plain autograd: padded forwards with full logits, sums pair by pair."""
    args = bare_config(**options)
    pairs = with_columns(mixed_pairs())
    policy, reference = models()
    policy.zero_grad()
    with torch.no_grad():
        ref = padded_unshared(reference, pairs)
    tokens = padded_unshared(policy, pairs)
    n = [[len(tokens[i, side]) for side in (0, 1)] for i in range(len(pairs))]

    def sums(of: dict, side: int, alpha: float) -> torch.Tensor:
        rows = []
        for i, lengths in enumerate(n):
            shared = min(lengths)
            rows.append(of[i, side][:shared].sum() + alpha * of[i, side][shared:].sum())
        return torch.stack(rows)

    alpha = 1.0 if args.ld_alpha is None else args.ld_alpha
    lengths = torch.tensor(n, dtype=torch.float64)
    logps = PairLogps(
        sums(tokens, 0, alpha),
        sums(tokens, 1, alpha),
        sums(ref, 0, alpha),
        sums(ref, 1, alpha),
        lengths[:, 0].clamp(min=1),
        lengths[:, 1].clamp(min=1),
        chosen_nll=-sums(tokens, 0, 1.0),
        mean_chosen_length=lengths[:, 0].mean(),
        desirable=torch.from_numpy(pairs.columns["label"]).double(),
    )
    column = {k: torch.from_numpy(v) for k, v in pairs.columns.items()}
    total = torch.zeros(len(pairs), dtype=torch.float64)
    for name, weight in zip(args.loss_type, args.loss_weights or [1.0] * 9, strict=False):
        c, r = logps.chosen_logratios, logps.rejected_logratios
        if name != "sft" and args.f_divergence_type != "reverse_kl":
            c, r = (
                f_scores(x, args.f_divergence_type, args.f_alpha_divergence_coef) for x in (c, r)
            )
        if args.score_margin_scale:
            gap = column["score_chosen"] - column["score_rejected"]
            c = c - args.score_margin_scale * gap / args.beta
        plain = args.f_divergence_type == "reverse_kl" and not args.score_margin_scale
        fed = logps if plain or name == "sft" else logps.with_scores(c, r)
        options_of = {k: getattr(args, k) for k in OPTIONS}
        losses = call(REGISTRY[name], fed, options_of)
        if args.use_soft_labels:
            flipped = call(REGISTRY[name], fed.swapped(), options_of)
            losses = column["p_chosen"] * losses + (1 - column["p_chosen"]) * flipped
        total = total + weight * losses
    if args.rpo_alpha:
        total = total + args.rpo_alpha * logps.chosen_nll / logps.chosen_lengths
    if args.use_pair_weights:
        total = total * column["weight"]
    total.mean().backward()
    return total.mean().item(), gradients_of(policy)


def reads_sums(name: str) -> bool:
    return SPECS[name].logps and name not in ("sft", "exo_pair")


MIX = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}

EXACT = {
    **{name: {"loss_type": [name]} for name in LOSSES},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 0.1},
    **{f"{n}-ld": {"loss_type": [n], "ld_alpha": 0.3} for n in LOSSES if reads_sums(n)},
    "exo_pair-ld": {"loss_type": ["exo_pair"], "label_smoothing": 0.1, "ld_alpha": 0.3},
    "mpo": MIX,
    "mpo-ld": {**MIX, "ld_alpha": 0.0},
    "aot-sft": {"loss_type": ["aot", "sft"]},
    "aot-smoothed": {"loss_type": ["aot", "aot_unpaired"], "label_smoothing": 0.1},
    "forward_kl": {"loss_type": ["sigmoid"], "f_divergence_type": "forward_kl"},
    "alpha-ld": {
        "loss_type": ["robust"],
        "label_smoothing": 0.2,
        "f_divergence_type": "alpha_divergence",
        "ld_alpha": 0.5,
    },
    "rpo": {"rpo_alpha": 0.7},
    "weights": {"use_pair_weights": True},
    "weighted-sft": {"loss_type": ["sft"], "use_pair_weights": True},
    "soft": {"loss_type": ["hinge", "ipo"], "use_soft_labels": True},
    "margin": {"score_margin_scale": 0.3, "use_pair_weights": True, "beta": 0.5},
    "cdpo": {"label_smoothing": 0.2},
    "kto-weights": {"loss_type": ["kto"], "desirable_weight": 1.3, "undesirable_weight": 0.4},
    "cpo-smoothed-mix": {
        "loss_type": ["cpo", "simpo"],
        "label_smoothing": 0.1,
        "loss_weights": [0.3, 2.0],
    },
}

# fp64 through two layers: sums of some 1e3 terms in another order leave about 1e-13 of a result.
# The bound.
EXACT_RTOL = 1e-10


def assert_same(found: dict, expected: dict, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 1e-6  # there is something to compare
    for name, g in expected.items():
        error = float((found[name] - g).abs().max()) / max(float(g.abs().max()), 1e-3 * largest)
        assert error <= tolerance, (name, error)


@pytest.mark.parametrize("case", EXACT)
def test_one_gradient_however_a_step_is_packed(case):
    expected_loss, expected = by_autograd(EXACT[case])
    for name in PACKED:
        loss, gradients = step_of(name, EXACT[case])
        assert loss == pytest.approx(expected_loss, rel=EXACT_RTOL), name
        assert_same(gradients, expected, EXACT_RTOL)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "sft"])
def test_wpo_weighs_pairs_however_packed(loss_type):
    """Value by the formula (arXiv 2406.11827 eq. 2, aligned); the weight has no gradient."""
    options = {"loss_type": [loss_type], "use_weighting": True}
    pairs = mixed_pairs()
    policy, reference = models()
    with torch.no_grad():
        ref, tokens = padded_unshared(reference, pairs), padded_unshared(policy, pairs)
        losses = []
        mean_length = float(np.mean([len(tokens[i, 0]) for i in range(len(pairs))]))
        for i in range(len(pairs)):
            c, r = (tokens[i, s].sum() - ref[i, s].sum() for s in (0, 1))
            plain = {
                "sigmoid": -F.logsigmoid(0.1 * (c - r)),
                "hinge": torch.relu(1 - 0.1 * (c - r)),
                "sft": -tokens[i, 0].sum() / mean_length,
            }[loss_type]
            weight = math.prod(aligned_probability(policy, pairs, i, side) for side in (0, 1))
            losses.append(plain * weight)
    expected = float(torch.stack(losses).mean())
    one_loss, one = step_of("one pack", options)
    assert one_loss == pytest.approx(expected, rel=EXACT_RTOL)
    for name in PACKED:
        loss, gradients = step_of(name, options)
        assert loss == pytest.approx(expected, rel=EXACT_RTOL)
        assert_same(gradients, one, EXACT_RTOL)


@pytest.mark.parametrize(
    "name", [n for n in LOSSES if SPECS[n].weighting and n not in ("sigmoid", "hinge", "sft")]
)
def test_wpo_gives_every_loss_one_gradient(name):
    options = {"loss_type": [name], "label_smoothing": 0.1 if name == "exo_pair" else 0.0}
    plain, _ = step_of("one pack", options)
    one_loss, one = step_of("one pack", {**options, "use_weighting": True})
    assert abs(one_loss - plain) > 1e-6
    for packed in PACKED:
        loss, gradients = step_of(packed, {**options, "use_weighting": True})
        assert loss == pytest.approx(one_loss, rel=EXACT_RTOL), packed
        assert_same(gradients, one, EXACT_RTOL)


def aligned_probability(policy, pairs: TokenizedPairs, i: int, side: int) -> float:
    response = (pairs.chosen(i), pairs.rejected(i))[side].tolist()
    prompt = pairs.prompt(i).tolist()
    start = max(len(prompt), 1)
    ids = torch.tensor([prompt + response])
    log_p = policy(ids).logits[0].log_softmax(-1)[start - 1 : -1]
    targets = ids[0, start:]
    own = log_p.gather(1, targets[:, None])[:, 0]
    terms = own - torch.logsumexp(2 * log_p, 1)
    return float(torch.exp(terms.sum() / max(len(terms), 1)))


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired", "kto"])
def test_the_step_wide_losses_would_differ_pack_by_pack(loss_type):
    """The test above can fail: sorted within packs, these are other losses."""
    objective = Objective(bare_config(loss_type=[loss_type]))
    objective.needs_whole_step = False
    whole, _ = step_of("one pack", {"loss_type": [loss_type]})
    found = []
    for name in PACKED:
        made = trainer(name)
        made.objective = objective
        made.metrics = made._new_metrics()
        made._train_step(next(iter(made.plan.steps(0, skip=0))))
        found.append(made.metrics.read()["loss"])
    assert max(abs(loss - whole) for loss in found) > 1e-3
    assert abs(step_of("one pack", {"loss_type": ["sigmoid"]})[0] - whole) > 1e-3


def test_both_passes_draw_the_same_dropout(tmp_path):
    """With disable_dropout off, the gradient belongs to the log-probs that the loss saw."""
    made = trained_on_rows(
        tmp_path,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.5),
        loss_type=["aot"],
        disable_dropout=False,
        first_step_check=False,
        max_tokens_per_pack=64,
    )
    seen: list[torch.Tensor] = []
    forward = made._forward

    class Spy(type(forward)):
        def with_stats(self, model, pack, stats, router=False):
            output = super().with_stats(model, pack, stats, router)
            if model.training:
                seen.append(output.token_logps.detach())
            return output

    made._forward = Spy(**vars(forward))
    made.model.train()
    step = next(iter(made.plan.steps(0, skip=0)))
    made._train_step(step)
    n = len(step.packs)
    assert n > 1 and len(seen) == 2 * n
    for first, second in zip(seen[:n], seen[n:], strict=True):
        # Without a graph the head may sum in another order: fp32 log-probs of size 10.
        assert torch.allclose(first, second, atol=1e-4)
    made._train_step(step)
    assert not torch.allclose(seen[0], seen[2 * n], atol=1e-2)  # there is dropout to speak of


def test_two_passes_hold_one_packs_graph_at_a_time(monkeypatch):
    """Memory is bounded by a pack: the first pass builds no graph, the second drops each."""
    made = trainer("unshared")
    made.objective = Objective(bare_config(loss_type=["aot"]))
    graphs: list[weakref.ref] = []
    alive: list[int] = []
    with_stats = type(made._forward).with_stats

    def spy(self, model, *args):
        if model is made.model:  # and not the reference
            alive.append(sum(of() is not None for of in graphs))
        output = with_stats(self, model, *args)
        if output.token_logps.grad_fn is not None:
            graphs.append(weakref.ref(output.token_logps))
        return output

    monkeypatch.setattr(type(made._forward), "with_stats", spy)
    step = next(iter(made.plan.steps(0, skip=0)))
    made._train_step(step)
    n = len(step.packs)
    assert n > 2 and len(graphs) == n and len(alive) == 2 * n
    assert max(alive) <= 1, alive


def test_evaluation_does_not_depend_on_batches(tmp_path):
    found = []
    for size in (3, 100):
        made = DPOTrainer(
            model=copy.deepcopy(models()[0]),
            ref_model=copy.deepcopy(models()[1]),
            args=DPOConfig(
                output_dir=str(tmp_path),
                use_cpu=True,
                loss_type=["aot", "sft"],
                per_device_eval_batch_size=size,
                log_token_stats=True,
                disable_tqdm=True,
                report_to=["none"],
            ),
            eval_dataset=mixed_pairs(),
        )
        logs = made.evaluate()
        found.append({k: v for k, v in logs.items() if "runtime" not in k and "second" not in k})
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    assert {"eval_entropy", "eval_logits/chosen", "eval_mean_token_accuracy"} <= found[0].keys()


def test_the_fused_loss_is_the_plain_one():
    """sigmoid, ipo and hinge by the kernel and by losses.py, the same through every pack."""
    for name in ("sigmoid", "ipo", "hinge"):
        fused, plain = (
            Objective(bare_config(loss_type=[name])),
            Objective(bare_config(loss_type=[name])),
        )
        assert fused.fused
        plain.fused = False
        found = []
        for objective in (fused, plain):
            made = trainer("many packs")
            made.objective = objective
            made.metrics = made._new_metrics()
            made._train_step(next(iter(made.plan.steps(0, skip=0))))
            (kept,) = [c for c in made.callback_handler.callbacks if isinstance(c, KeepGradients)]
            found.append((made.metrics.read(), kept.found))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
        assert_same(found[0][1], found[1][1], 1e-12)
