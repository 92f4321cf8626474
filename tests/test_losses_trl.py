"""Every loss, f-divergence, smoothing, LD-DPO and WPO against TRL's own `_compute_loss`: value,
gradients of every parameter and metrics, fp32 on CPU, one batch.

TRL's trainer is made once and its attributes varied. Its batch is padded and unshared, ours one
shared pack; both see the same token ids.
"""

import collections
import copy
import functools
import itertools
import tempfile
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastdpo import DPOConfig
from fastdpo.data import TokenizedPairs, tokenize_pairs
from fastdpo.logps import prepare_packed_forward
from fastdpo.metrics import TOKEN_STATS, PreferenceMetrics
from fastdpo.objective import Objective, ScoredPack
from fastdpo.packing import build_pack
from fastdpo.pair_logps import pair_sums
from fastdpo.steps import mean_chosen_length
from tests.real_pairs import demo_dialogues, dialogues, tokenizer_of
from tests.tiny import tiny_llama, tiny_rows, tiny_tokenizer

trl = pytest.importorskip("trl", minversion="1.16", reason="the peer to compare with")
Dataset = pytest.importorskip("datasets").Dataset

N_PAIRS = 6
# fp32 log-probs of responses of up to 40 tokens, a token's of size 6 to 20: the two sides sum in
# another order and each errs by some 8 eps * 10 * sqrt(40) = 6e-5 nat. Losses follow by their
# slopes: beta for the sigmoid family, 2 (r + 0.5 / beta) of about 20 for squares of log-ratios,
# hence relative to the loss's size rather than absolute.
VALUE_RTOL = 5e-5
# Through two layers backward, relative to the largest gradient of each parameter.
GRADIENT_RTOL = 5e-4


@functools.cache
def pairs():
    """Short real pairs."""
    return short_pairs(dialogues())


def short_pairs(rows: list[dict[str, str]]) -> TokenizedPairs:
    # Responses of like lengths: random models set longer ones so far apart that exp(-margin) is 0.
    rows = [row for row in rows if abs(len(row["chosen"]) - len(row["rejected"])) < 45]
    rows = [row for row in rows if sum(map(len, row.values())) < 160][: 2 * N_PAIRS]
    tokenizer = tokenizer_of(rows, vocab_size=400)
    tokenized, _ = tokenize_pairs(rows, tokenizer, max_length=48, progress=False)
    return tokenized.select(range(N_PAIRS))


@functools.cache
def models():
    """The policy and a reference near it, as training has them: log-ratios of a few nat."""
    policy = tiny_llama(seed=0)
    reference = copy.deepcopy(policy)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator)
    return policy, reference


@functools.cache
def their_trainer():
    policy, reference = models()
    args = trl.DPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        per_device_train_batch_size=N_PAIRS,
        use_weighting=True,  # its patched head then computes log_sum_sq_probs; varied below
    )
    trainer = trl.DPOTrainer(
        model=copy.deepcopy(policy),
        ref_model=copy.deepcopy(reference),
        args=args,
        train_dataset=Dataset.from_list(tiny_rows(4)),
        processing_class=tiny_tokenizer(),
    )
    # Making another config resets accelerate's global state; one process needs none of it.
    trainer.accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    return trainer


def their_batch() -> dict[str, torch.Tensor]:
    """[chosen, rejected] stacked, padded at the right, as TRL's collator makes it."""
    rows, prompts = [], []
    for side in ("chosen", "rejected"):
        for i in range(N_PAIRS):
            prompt = pairs().prompt(i).tolist()
            rows.append(prompt + getattr(pairs(), side)(i).tolist())
            prompts.append(len(prompt))
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    place = torch.arange(width)
    completion = mask * (place >= torch.tensor(prompts)[:, None])
    return {"input_ids": ids, "attention_mask": mask, "completion_mask": completion}


def gradients_of(model) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def theirs(options: dict):
    """(loss, gradients, metrics) of TRL under `options`."""
    trainer = their_trainer()
    neutral = {
        "beta": 0.1,
        "label_smoothing": 0.0,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "use_weighting": False,
    }
    given = {**neutral, **options}
    trainer.loss_types = given.pop("loss_type")
    trainer.loss_weights = given.pop("loss_weights", None) or [1.0] * len(trainer.loss_types)
    trainer.args.discopop_tau = given.pop("discopop_tau", 0.05)
    for name, value in given.items():
        setattr(trainer, name, value)
    trainer._metrics = {
        "train": collections.defaultdict(list),
        "eval": collections.defaultdict(list),
    }
    trainer.model.train()
    trainer.model.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        # TRL 1.16 raises for hinge with WPO: it multiplies relu's saved output in place.
        patch.setattr(torch, "relu", lambda x: x.clamp(min=0))
        loss = trainer._compute_loss(trainer.model, their_batch(), return_outputs=False)
    loss.backward()
    gradients = gradients_of(trainer.model)
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return loss.item(), gradients, metrics


@functools.cache
def prepared():
    policy, reference = (copy.deepcopy(m) for m in models())
    for m in (policy, reference):
        prepare_packed_forward(m, mode="shared")
    return policy, reference


def ours(options: dict):
    policy, reference = prepared()
    args = DPOConfig(output_dir="unused", use_cpu=True, **options)
    objective = Objective(args)
    pack = build_pack(pairs(), range(N_PAIRS), mode="shared")
    policy.zero_grad()
    with torch.no_grad():
        ref = reference(pack=pack).token_logps
    output = policy(pack=pack, token_stats=(*objective.stats, *TOKEN_STATS))
    scored = ScoredPack(pack, output.token_logps.detach(), ref, output.stats)
    (loss,) = objective([scored], mean_chosen_length(pairs(), np.arange(N_PAIRS)), grad=True)
    assert loss.token_grad is not None
    output.token_logps.backward(loss.token_grad / N_PAIRS)
    metrics = PreferenceMetrics(torch.device("cpu"), token_stats=True)
    metrics.add(loss, pack, output.stats)
    return gradients_of(policy), metrics.read()


F_DIVERGENCES = {
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js": {"f_divergence_type": "js_divergence"},
    "alpha0.5": {"f_divergence_type": "alpha_divergence"},
    "alpha1.3": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.3},
    "alpha1": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
}
WITH_F = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")
STEP_WIDE = ("aot", "aot_unpaired")
TRL_LOSSES = (
    *WITH_F,
    *("nca_pair", "bco_pair", "sppo_hard", *STEP_WIDE, "apo_zero", "apo_down", "sft"),
)
SMOOTHED = ("exo_pair", "robust", *STEP_WIDE)


def cases():
    for name in TRL_LOSSES:
        base: dict = {"loss_type": [name]}
        if name == "exo_pair":
            base["label_smoothing"] = 0.001
        smoothings = {"": {}}
        if name in SMOOTHED:
            smoothings["smooth0.2"] = {"label_smoothing": 0.2}
        fs = {"": {}} | (F_DIVERGENCES if name in WITH_F else {})
        lds = (
            {"": {}}
            if name == "sft"
            else {"": {}, "ld0.3": {"ld_alpha": 0.3}, "ld0": {"ld_alpha": 0.0}}
        )
        # TRL 1.16 raises for sft with WPO: it multiplies an expanded tensor in place.
        wpos = {"": {}} if name in (*STEP_WIDE, "sft") else {"": {}, "wpo": {"use_weighting": True}}
        for (s, smoothing), (f, divergence), (d, ld), (w, wpo) in itertools.product(
            smoothings.items(), fs.items(), lds.items(), wpos.items()
        ):
            if d == "ld0" and (s or f or w):
                continue
            label = "-".join(filter(None, (name, s, f, d, w)))
            yield pytest.param({**base, **smoothing, **divergence, **ld, **wpo}, id=label)
    mpo = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    yield pytest.param(mpo, id="mpo")
    yield pytest.param({**mpo, "ld_alpha": 0.5}, id="mpo-ld")
    two = {"loss_type": ["sigmoid", "apo_zero"], "loss_weights": [0.7, 0.3]}
    yield pytest.param({**two, "ld_alpha": 0.5, "use_weighting": True}, id="two-ld-wpo")
    yield pytest.param(
        {"loss_type": ["ipo", "sft"], "f_divergence_type": "js_divergence"}, id="ipo-sft-js"
    )
    yield pytest.param({"loss_type": ["aot", "sigmoid_norm"], "beta": 0.7}, id="aot-sigmoid_norm")
    yield pytest.param({"loss_type": ["discopop"], "discopop_tau": 0.5}, id="discopop-tau")
    yield pytest.param({"loss_type": ["sigmoid"], "beta": 2.0}, id="sigmoid-beta2")


def worst(found: dict, expected: dict) -> float:
    assert found.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 0
    return max(
        float((found[n] - g).abs().max()) / max(float(g.abs().max()), 1e-3 * largest)
        for n, g in expected.items()
    )


def test_the_batch_tells_the_losses_apart():
    """Among other things, policy and reference rank the pairs differently, else aot is sigmoid."""
    smoothing = {"exo_pair": 0.1, "robust": 0.1}
    values = [
        theirs({"loss_type": [name], "label_smoothing": smoothing.get(name, 0.0)})[0]
        for name in TRL_LOSSES
    ]
    assert min(abs(a - b) for a, b in itertools.combinations(values, 2)) > 1e-4, values


@pytest.mark.parametrize("options", list(cases()))
def test_the_same_as_trl(options):
    loss, gradients, metrics = theirs(options)
    our_gradients, our_metrics = ours(options)
    assert our_metrics["loss"] == pytest.approx(loss, rel=VALUE_RTOL)
    error = worst(our_gradients, gradients)
    assert error < GRADIENT_RTOL, error
    for name in set(our_metrics) - {"loss"}:
        expected = metrics[name]
        # Rewards are beta times differences of summed log-probs of some 100 nat.
        scale = 300 * options.get("beta", 0.1) if "rewards" in name else abs(expected)
        assert our_metrics[name] == pytest.approx(expected, abs=1e-6 * scale + 1e-6), name


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "aot", "sft"])
def test_the_same_as_trl_on_the_pairs_of_the_package(monkeypatch, name):
    """Where no HH is at hand, all of the above has these; here they are seen either way."""
    demo = short_pairs(demo_dialogues())
    monkeypatch.setitem(globals(), "pairs", lambda: demo)
    test_the_same_as_trl({"loss_type": [name]})


def test_metrics_are_those_of_trl():
    _, _, metrics = theirs({"loss_type": ["sigmoid"]})
    _, ours_read = ours({"loss_type": ["sigmoid"]})
    assert set(metrics) - {"num_tokens"} == set(ours_read) - {"loss"}
    assert abs(ours_read["rewards/margins"]) > 1e-3 and ours_read["mean_token_accuracy"] < 1


def test_sigmoid_label_smoothing_is_cdpo_where_trl_ignores_it():
    """TRL 1.16 accepts label_smoothing with sigmoid and leaves it out; ours is the formula."""
    plain, _, _ = theirs({"loss_type": ["sigmoid"]})
    ignored, _, _ = theirs({"loss_type": ["sigmoid"], "label_smoothing": 0.2})
    assert plain == ignored
    _, found = ours({"loss_type": ["sigmoid"], "label_smoothing": 0.2})
    policy, reference = prepared()
    pack = build_pack(pairs(), range(N_PAIRS), mode="shared")
    with torch.no_grad():
        sums = pair_sums(
            policy(pack=pack).token_logps, reference(pack=pack).token_logps, pack, by_length=False
        )
    assert sums.reference is not None
    ratios = (sums.policy - sums.reference)[:, :, 0]
    m = 0.1 * (ratios[:, 0] - ratios[:, 1])
    expected = -0.8 * torch.sigmoid(m).log() - 0.2 * torch.sigmoid(-m).log()
    assert found["loss"] == pytest.approx(float(expected.mean()), rel=VALUE_RTOL)
    assert abs(found["loss"] - plain) > 1e-3


# ---- the reference-free family, against TRL's experimental trainers -----------------------------


def their_sums(average: bool):
    policy, _ = models()
    batch = their_batch()
    logits = policy(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logps = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    mask = batch["completion_mask"][:, 1:]
    sums = (logps * mask).sum(1)
    nll = -(logps * mask)[:N_PAIRS].sum() / mask[:N_PAIRS].sum()
    return (sums / mask.sum(1) if average else sums).chunk(2), nll


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["simpo"], "beta": 2.0, "simpo_gamma": 0.7},
        {"loss_type": ["simpo"], "beta": 2.0, "label_smoothing": 0.1},
        {"loss_type": ["cpo"], "cpo_alpha": 0.6},
        {"loss_type": ["cpo"], "cpo_alpha": 0.0, "label_smoothing": 0.1},
        {"loss_type": ["orpo"]},
    ],
    ids=lambda o: "-".join(str(v) for v in o.values()),
)
def test_reference_free_losses_are_those_of_trls_experiments(options):
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    (name,) = options["loss_type"]
    (chosen, rejected), nll = their_sums(average=name != "cpo")
    self: Any = SimpleNamespace(
        beta=options.get("beta", 0.1),
        alpha=0.0,
        loss_type="simpo" if name == "simpo" else "sigmoid",
        simpo_gamma=options.get("simpo_gamma", 0.5),
        label_smoothing=options.get("label_smoothing", 0.0),
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )
    if name == "orpo":
        terms, chosen_rewards, *_ = ORPOTrainer.odds_ratio_loss(self, chosen, rejected)
        # Theirs takes the NLL over prompt and response; the paper's (eq. 6) is the response's.
        loss = nll - terms.mean()
    else:
        terms, chosen_rewards, _ = CPOTrainer.cpo_loss(self, chosen, rejected)
        loss = terms.mean() + (options["cpo_alpha"] * nll if name == "cpo" else 0.0)
    policy, _ = models()
    policy.zero_grad()
    loss.backward()
    expected = gradients_of(policy)
    found, metrics = ours(options)
    assert metrics["loss"] == pytest.approx(float(loss), rel=VALUE_RTOL)
    assert metrics["rewards/chosen"] == pytest.approx(float(chosen_rewards.mean()), rel=VALUE_RTOL)
    assert worst(found, expected) < GRADIENT_RTOL
