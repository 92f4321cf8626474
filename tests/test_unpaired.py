"""Unpaired data: kto and apo_zero_unpaired, from rows with a label to the weights, against TRL's
KTOTrainer; and what is refused. The data by itself: test_unpaired_data.py."""

import collections
import contextlib
import copy
import functools
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import nn

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.errors import ConfigError, DataError
from fastdpo.losses import REGISTRY, PairLogps
from fastdpo.policy import PackForward
from tests.families import by_name
from tests.test_parity_trl import LOGPS_ATOL, MOVE_RTOL, RTOL, SHARED, compare_weights, trainable
from tests.tiny import tiny_chat_rows, tiny_examples, tiny_llama, tiny_pairs, tiny_tokenizer
from tests.tiny_trainer import LORA

trl = pytest.importorskip("trl", minversion="1.16", reason="the peer to compare with")
Dataset = pytest.importorskip("datasets").Dataset

N_STEPS, STEP = 4, 4


@pytest.fixture(autouse=True)
def no_picture(monkeypatch) -> None:
    """Curves are drawn after every run; here that would be most of the time."""
    monkeypatch.setattr("fastdpo.trainer.plot_curves", lambda *args: None)


def rows_of(kind: str, n: int = N_STEPS * STEP + 5) -> list[dict]:
    """Plain examples, about two in three desirable; or conversational pairs, to be unpaired."""
    chat = kind == "chat pairs"
    return tiny_chat_rows(n, seed=3, pairs_per_prompt=1) if chat else tiny_examples(n)


# ---- the losses, on random log-probs -----------------------------------------------------------


class Answers(nn.Module):
    """Stands for a model with TRL's fused head: token log-probs [B, L - 1] by call, in turn."""

    def __init__(self, *log_probs: torch.Tensor):
        super().__init__()
        self.log_probs = itertools.cycle(log_probs)

    def forward(self, **kwargs: Any) -> SimpleNamespace:
        log_probs = next(self.log_probs)
        zeros = torch.zeros_like(log_probs)
        return SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros)


def theirs(options: dict, labels, policy, ref, kl, ref_kl):
    """TRL's KTO loss of summed log-probs [B] and its metrics."""
    tokens = [values[:, None] for values in (kl, policy, ref_kl, ref)]
    reads_kl = options["loss_type"] == "kto"
    self: Any = SimpleNamespace(
        **options,
        model=nn.Module(),
        ref_model=Answers(*(tokens[2:] if reads_kl else tokens[3:])),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        calculate_KL=reads_kl,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        _metrics={"train": collections.defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    self._compute_kl_logps = functools.partial(trl.KTOTrainer._compute_kl_logps, self)
    two = torch.ones(len(labels), 2, dtype=torch.long)
    completion = torch.tensor([[0, 1]]).expand(len(labels), 2)
    names = ("input_ids", "attention_mask", "KL_input_ids", "KL_attention_mask")
    batch = dict.fromkeys(names, two)
    batch |= {"completion_mask": completion, "KL_completion_mask": completion, "label": labels}
    with pytest.MonkeyPatch.context() as patch:
        where = f"{trl.KTOTrainer.__module__}.disable_gradient_checkpointing"
        patch.setattr(where, lambda *args: contextlib.nullcontext())
        model: Any = Answers(*(tokens[:2] if reads_kl else tokens[1:2]))
        loss = trl.KTOTrainer._compute_loss(self, model, batch, False)
    return loss, {name: values[-1] for name, values in self._metrics["train"].items()}


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("seed", range(6))
def test_the_losses_are_trls_on_random_log_probs(loss_type, seed):
    """Value and gradient in fp64, with a KL baseline above 0 and one that is clamped to it."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.rand(7, generator=generator) < (0.0 if seed == 4 else 1.0 if seed == 5 else 0.5)
    values = -20 * torch.rand(4, 7, generator=generator, dtype=torch.float64)
    policy, ref, kl, ref_kl = values.unbind()
    kl = kl + (9.0 if seed % 2 else -9.0)
    options = {"beta": 0.3, "desirable_weight": 1.4, "undesirable_weight": 0.6}
    leaf = policy.clone().requires_grad_()
    expected, metrics = theirs({**options, "loss_type": loss_type}, labels, leaf, ref, kl, ref_kl)
    (slope,) = torch.autograd.grad(expected, leaf)
    ones = torch.ones(7, dtype=torch.float64)
    mine, mismatched = policy.clone().requires_grad_(), kl.clone().requires_grad_()
    logps = PairLogps(
        mine, mismatched, ref, ref_kl, ones, ones, -mine, ones[0], desirable=labels.double()
    )
    loss = REGISTRY[loss_type].fn(logps, **options).mean()
    found = torch.autograd.grad(loss, (mine, mismatched), allow_unused=True)
    assert (metrics["kl"] > 0) == (loss_type == "kto" and seed % 2 == 1)
    # Ten operations on numbers of size 1 in fp64.
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-13)
    torch.testing.assert_close(found[0], slope, rtol=1e-12, atol=1e-15)
    assert found[1] is None or not found[1].any()  # the baseline is a constant


# ---- whole runs --------------------------------------------------------------------------------


def run(kind: str, tmp_path, rows: list[dict], tokenizer, **options):
    """(trainer, its weights before the first step)."""
    arguments: dict[str, Any] = {
        "output_dir": str(tmp_path / kind),
        "per_device_train_batch_size": STEP,
        "gradient_checkpointing": False,
        **SHARED,
        "max_steps": N_STEPS,
        "beta": 0.5,
        "max_length": 40,  # cuts some responses and drops some prompts
        **options,
    }
    policy = tiny_llama(vocab_size=len(tokenizer))
    reference = copy.deepcopy(policy)
    with torch.no_grad():  # another model, so that the baseline is not 0 from the start
        reference.lm_head.weight *= 1.1
    start = trainable(policy)
    if kind == "trl":
        config, trainer_class = trl.KTOConfig(**arguments), trl.KTOTrainer
    else:
        config = DPOConfig(**arguments, log_token_stats=True)
        trainer_class = DPOTrainer
    trainer = trainer_class(
        model=policy,
        ref_model=reference,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer, start


CASES = {
    "kto": {"loss_type": "kto", "desirable_weight": 0.8, "undesirable_weight": 1.5},
    "kto pairs": {"loss_type": "kto", "kind": "chat pairs"},
    "apo": {"loss_type": "apo_zero_unpaired", "undesirable_weight": 2.0},
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_run_as_trl(tmp_path, case):
    options: dict[str, Any] = dict(CASES[case])
    kind = options.pop("kind", "plain")
    tokenizer = tiny_tokenizer(bos=False, chat=kind != "plain")
    # So few pairs that a step holds examples of both labels: first come all chosen responses.
    rows = rows_of(kind, 9) if "pairs" in kind else rows_of(kind)
    theirs, start = run("trl", tmp_path, rows, tokenizer, **options)
    ours, _ = run("fastdpo", tmp_path, rows, tokenizer, **options)
    assert ours.train_pairs is not None
    logs = [[log for log in t.state.log_history if "loss" in log] for t in (ours, theirs)]
    assert [len(of) for of in logs] == [N_STEPS, N_STEPS]
    # The bounds of test_parity_trl.py: log-probs of 300 nat at most; rewards are beta times theirs.
    reward = 4 * 0.5 * (LOGPS_ATOL + RTOL * 300)
    names: set[str] = set()
    for step, (mine, other) in enumerate(zip(*logs, strict=True), start=1):
        compared = {"loss", "kl", "entropy", "grad_norm"} | {n for n in other if "/" in n}
        for name in compared & other.keys():
            atol = reward if name.split("/")[0] in ("rewards", "kl") else 1e-5
            expected = pytest.approx(other[name], rel=10 * RTOL, abs=atol)
            assert mine[name] == expected, (step, name)
        names |= compared & other.keys()
    assert {"kl", "rewards/margins", "logps/rejected", "logits/chosen", "entropy"} <= names
    kls = [log["kl"] for log in logs[1]]
    assert (max(kls) > 0.1) == (options["loss_type"] == "kto"), kls  # there is a baseline
    weights, moved = compare_weights(trainable(ours.model), trainable(theirs.model), start)
    assert moved > 1e-3 and weights < MOVE_RTOL * moved


def train(tmp_path, rows=None, peft_config=None, resume=None, model=None, **options) -> DPOTrainer:
    arguments: dict[str, Any] = {
        **SHARED,
        "output_dir": str(tmp_path),
        "loss_type": "kto",
        "per_device_train_batch_size": STEP,
        "max_steps": 2,
        "train_sampling_strategy": "random",
        **options,
    }
    trainer = DPOTrainer(
        model=tiny_llama() if model is None else model,
        args=DPOConfig(**arguments),
        train_dataset=rows or rows_of("plain"),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: DPOTrainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_references_before_training_and_cached_ones_serve_mismatches_too(tmp_path):
    live = train(tmp_path / "a")
    # The first-step check has held the policy to its reference; the loss is then sigmoid(0).
    assert losses(live)[0] == pytest.approx(0.5, abs=1e-6)
    # fp32 log-probs, summed in packs of other sizes.
    assert losses(train(tmp_path / "b", precompute_ref_log_probs=True)) == pytest.approx(
        losses(live), rel=1e-5
    )
    cache = {"ref_cache_dir": str(tmp_path / "cache")}
    first = train(tmp_path / "c", **cache)
    again = train(tmp_path / "d", desirable_weight=2.0, **cache)
    done = again.precomputations["train"]
    assert done.n_found == done.n_responses and losses(first)[1] == pytest.approx(losses(live)[1])
    # Another step, other mismatches: only those are computed.
    other = train(tmp_path / "e", per_device_train_batch_size=7, **cache)
    done = other.precomputations["train"]
    assert 0.5 * done.n_responses < done.n_found < done.n_responses


def test_gradients_run_through_no_mismatched_response(tmp_path, monkeypatch):
    """In a step of several packs the second pass has each example's own response alone. (That the
    gradient is the step's: test_objective.py.) Dropout, which falls alike in both, needs both."""
    seen: list[tuple[bool, int]] = []
    with_stats = PackForward.with_stats

    def counted(self, model, pack, *args):
        if model.training:  # the policy in a step, and neither reference nor probe
            seen.append((torch.is_grad_enabled(), len(pack.targets)))
        return with_stats(self, model, pack, *args)

    monkeypatch.setattr(PackForward, "with_stats", counted)

    def tokens(name: str, **options) -> tuple[int, int]:
        """Scored tokens of the first step: without a graph, and with one."""
        seen.clear()
        made = train(tmp_path / name, max_steps=1, **options)
        assert made.train_pairs is not None and (made.pack_stats.n_packs > 1) == bool(options)
        lengths.append(made.train_pairs.scored_lengths[made.plan._order(0)[0]].sum(0))
        without, with_graph = (sum(n for graph, n in seen if graph is g) for g in (False, True))
        return without, with_graph

    lengths: list[np.ndarray] = []
    packs = {"max_tokens_per_pack": 64}
    found = [tokens("one"), tokens("many", **packs), tokens("d", **packs, disable_dropout=False)]
    own, mismatched = lengths[0].tolist()
    both = own + mismatched
    assert min(own, mismatched) > 10
    assert found == [(0, both), (both, own), (both, both)]


def test_an_adapter_in_many_packs_and_resumed(tmp_path):
    """Adapters off are the reference of both responses; a resumed run repeats the whole one."""
    options: dict[str, Any] = {
        "peft_config": LoraConfig(**LORA),
        "max_steps": 3,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    one = train(tmp_path / "one", **options)
    many = train(tmp_path / "many", max_tokens_per_pack=64, **options)
    assert one.pack_stats.n_packs == 3 and many.pack_stats.n_packs > 6
    # fp32, packs of other sizes, two Adam steps of 1e-3.
    assert losses(many) == pytest.approx(losses(one), rel=1e-5)
    resumed = train(
        tmp_path / "many",
        max_tokens_per_pack=64,
        resume=str(tmp_path / "many" / "checkpoint-1"),
        **options,
    )
    names = ("loss", "kl", "rewards/margins", "logps/chosen")
    logs = [
        [[log.get(n) for n in names] for log in of.state.log_history if "loss" in log]
        for of in (many, resumed)
    ]
    assert logs[0] == logs[1] and abs(losses(many)[2] - 0.5) > 1e-5


def test_evaluation_takes_the_whole_set_as_one_step(tmp_path):
    found = []
    for size in (3, 100):
        made = DPOTrainer(
            model=tiny_llama(),
            ref_model=tiny_llama(seed=1),
            args=DPOConfig(
                **{**SHARED, "output_dir": str(tmp_path), "loss_type": "kto"},
                per_device_eval_batch_size=size,
            ),
            eval_dataset=rows_of("plain"),
            processing_class=tiny_tokenizer(),
        )
        logs = made.evaluate()
        found.append({k: v for k, v in logs.items() if "runtime" not in k and "second" not in k})
    # Packs of other sizes, fp32.
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert {"eval_kl", "eval_rewards/margins"} <= found[0].keys()
    assert "eval_rewards/accuracies" not in found[0]


# ---- users' losses, and what is refused ---------------------------------------------------------


USERS = """
import torch
from fastdpo.loss_specs import LossSpec
from fastdpo.losses import PreferenceLoss

def half(logps, *, beta, desirable_weight=1.0):
    sign = 2 * logps.desirable - 1
    return 0.5 * torch.sigmoid(-sign * beta * logps.chosen_logratios)

single = PreferenceLoss(half, LossSpec("mine", unpaired=True, logps=False))
"""


def test_a_users_loss_of_single_responses(tmp_path, monkeypatch):
    (tmp_path / "users_unpaired.py").write_text(USERS)
    monkeypatch.chdir(tmp_path)
    mine = train(tmp_path / "a", loss_type="users_unpaired:single")
    zero = train(
        tmp_path / "b",
        loss_type="apo_zero_unpaired",
        desirable_weight=0.5,
        undesirable_weight=0.5,
    )
    # The same terms in another order of fp64 factors.
    assert losses(mine) == pytest.approx(losses(zero), rel=1e-6)
    with pytest.raises(ConfigError, match="unpaired data and goes with no other"):
        train(tmp_path / "c", loss_type="users_unpaired:single,sigmoid")


def test_what_a_run_refuses(tmp_path):
    with pytest.raises(ConfigError, match="kto.*same step.*1 example"):
        train(tmp_path, per_device_train_batch_size=1)
    assert train(tmp_path / "a", loss_type="apo_zero_unpaired", per_device_train_batch_size=1)
    experts = by_name("Mixtral").build()
    with pytest.raises(ConfigError, match="kto.*mismatched.*router_aux_loss_coef: 0"):
        train(tmp_path / "m", model=experts)
    with pytest.raises(DataError, match="is unpaired.*loss_type kto"):
        train(tmp_path / "b", loss_type="sigmoid")
    with pytest.raises(DataError, match="no column 'label'"):
        DPOTrainer(
            model=tiny_llama(),
            args=DPOConfig(**SHARED, output_dir=str(tmp_path), loss_type=["kto"]),
            train_dataset=tiny_pairs(4),
        )
