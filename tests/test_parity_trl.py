"""Twenty steps of fastdpo and of TRL, from the same weights on the same pairs, are the same run.

fp32 on CPU, order of pairs fixed. TRL's batches are padded, unshared, and rounded in another
order, so the runs agree to rounding, not to the bit. The prompts are given apart from the
responses, and both trainers tokenize the text themselves. Real pairs: real_pairs.py.
"""

import copy
import functools
import math

import pytest
import torch
from peft import LoraConfig

from fastdpo import DPOConfig, DPOTrainer
from tests.real_pairs import dialogues, tokenizer_of
from tests.tiny import tiny_llama

trl = pytest.importorskip("trl", minversion="1.16", reason="the peer to compare with")
Dataset = pytest.importorskip("datasets").Dataset

N_STEPS, PAIRS_PER_STEP, N_HELD_OUT = 20, 4, 16
MAX_LENGTH = 96  # of HH it cuts some responses, and drops some pairs whose prompt fills it

# What rounding leaves. A token log-prob of size 6 errs by about 8 eps 6 (two layers, norms and a
# log-sum-exp, in another order than the peer's), at random, so the sum over a response of 50 tokens
# by 8 eps 6 sqrt(50) nat. Reward and loss follow: a loss of 0.7 over 4 pairs at beta 0.1 errs by
# 4e-5 * 0.1 * sqrt(2) / 2 / sqrt(4) / 0.7 = 2e-6 relative, the largest of twenty by twice that or
# three times.
EPS = torch.finfo(torch.float32).eps
LOGPS_ATOL = 8 * EPS * 6 * math.sqrt(50)  # 4e-5 nat
RTOL = 1e-5
# A gradient errs by delta = 8 eps of its typical size, and Adam divides each weight's by its own
# size: the error of a move is delta / |g| of it, for g near 0 all of it. Over gradients that are
# spread evenly about 0 its root mean square is sqrt(delta).
MOVE_RTOL = math.sqrt(8 * EPS)  # 1e-3

METRICS = (
    "loss",
    "grad_norm",
    "learning_rate",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
SHARED = {
    "learning_rate": 1e-3,
    "max_steps": N_STEPS,
    "warmup_steps": 4,
    "weight_decay": 0.1,
    "train_sampling_strategy": "sequential",
    "max_length": MAX_LENGTH,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "seed": 7,
}


@functools.cache
def texts() -> tuple[list[dict], list[dict]]:
    """Rows to train on, with some to spare for those that are dropped, and held-out rows."""
    wanted = N_STEPS * PAIRS_PER_STEP + N_HELD_OUT
    # Short enough for a quick test, in characters; MAX_LENGTH tokens still cut some of HH's.
    rows = [row for row in dialogues() if sum(map(len, row.values())) < 700][: wanted + 40]
    return rows[:-N_HELD_OUT], rows[-N_HELD_OUT:]


@functools.cache
def tokenizer():
    return tokenizer_of(texts()[0], vocab_size=1000)


def model():
    vocab = tokenizer()
    return tiny_llama(
        vocab_size=len(vocab), pad_token_id=vocab.pad_token_id, eos_token_id=vocab.eos_token_id
    )


def run(kind: str, tmp_path, *, lora: bool, **options):
    """Trains and evaluates: (trainer, its weights before the first step, evaluation).

    The evaluation comes here because making another config resets accelerate's global state.
    """
    policy = model()
    start = {name: p.detach().clone() for name, p in policy.named_parameters()}
    ref_model = None if lora or options.get("precompute_ref_log_probs") else copy.deepcopy(policy)
    peft_config = (
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "down_proj"])
        if lora
        else None
    )
    train, held_out = texts()
    arguments = {
        "output_dir": str(tmp_path / kind),
        "per_device_train_batch_size": PAIRS_PER_STEP,
        "per_device_eval_batch_size": N_HELD_OUT,  # one batch: TRL means over batches
        **SHARED,
        **options,
    }
    if kind == "trl":
        config, trainer_class = trl.DPOConfig(**arguments), trl.DPOTrainer
    else:
        config, trainer_class = DPOConfig(**arguments, on_bad_row="keep"), DPOTrainer
    trainer = trainer_class(
        model=policy,
        ref_model=ref_model,
        args=config,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(held_out),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )
    if lora:
        start = trainable(trainer.model)
    trainer.train()
    return trainer, start, trainer.evaluate()


def trainable(of) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in of.named_parameters() if p.requires_grad}


def difference(ours: dict, theirs: dict, beta: float, prefix: str = "") -> dict[str, float]:
    """How far two logs are apart, by metric, in units of what rounding allows: 1 is the limit."""
    logps = LOGPS_ATOL + RTOL * max(
        abs(theirs[f"{prefix}logps/{s}"]) for s in ("chosen", "rejected")
    )
    # A reward is beta times the difference of two logps, a margin that of two rewards.
    atol = {"logps": logps, "rewards": 4 * beta * logps}
    return {
        name: abs(ours[prefix + name] - theirs[prefix + name])
        / (atol.get(name.split("/")[0], 0.0) + RTOL * abs(theirs[prefix + name]) + 1e-30)
        for name in METRICS
        if prefix + name in theirs
    }


# Not here: label_smoothing, which TRL 1.16 accepts and leaves out of its sigmoid loss.
CASES = {
    "sigmoid": {"loss_type": ["sigmoid"]},
    "ipo": {"loss_type": ["ipo"]},
    "hinge": {"loss_type": ["hinge"]},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "precomputed": {"precompute_ref_log_probs": True},
    "lora": {"lora": True, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_run_as_trl(tmp_path, case, record_property):
    options = {"beta": 0.1, "gradient_checkpointing": False, **CASES[case]}
    lora = options.pop("lora", False)
    theirs, their_start, their_evaluation = run("trl", tmp_path, lora=lora, **options)
    ours, our_start, our_evaluation = run("fastdpo", tmp_path, lora=lora, **options)
    assert our_start.keys() == their_start.keys()
    assert all(torch.equal(our_start[name], their_start[name]) for name in our_start)

    logs = [[log for log in t.state.log_history if "loss" in log] for t in (ours, theirs)]
    assert [len(of) for of in logs] == [N_STEPS, N_STEPS]
    assert max(log["rewards/margins"] for log in logs[1]) > 1e-3  # there is something to compare
    losses = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(*logs, strict=True))
    weights, moved = compare_weights(trainable(ours.model), trainable(theirs.model), their_start)
    print(
        f"\n{case}: losses within {losses:.1e}, weights within {weights:.1e} relative, "
        f"after a move of {moved:.1e}"
    )
    record_property("losses", losses)
    record_property("weights", weights)
    moved_at = next(i for i, log in enumerate(logs[1], start=1) if log["learning_rate"] > 0)
    for step, (mine, other) in enumerate(zip(*logs, strict=True), start=1):
        excess = {k: v for k, v in difference(mine, other, options["beta"]).items() if v > 1}
        if step <= moved_at:  # policy = reference: the sign of a reward is that of its rounding
            excess.pop("rewards/accuracies", None)
        assert not excess, (step, excess, mine, other)
    assert moved > 1e-3  # the weights did change
    assert weights < min(RTOL, MOVE_RTOL * moved)

    excess = difference(our_evaluation, their_evaluation, options["beta"], "eval_")
    assert max(excess.values()) <= 1, (excess, our_evaluation, their_evaluation)


def compare_weights(ours: dict, theirs: dict, start: dict) -> tuple[float, float]:
    """Over all weights: relative difference of the two, and relative distance from the start."""

    def flat(weights: dict) -> torch.Tensor:
        return torch.cat([weights[name].double().flatten() for name in sorted(theirs)])

    assert ours.keys() == theirs.keys()
    a, b, c = flat(ours), flat(theirs), flat(start)
    return float((a - b).norm() / b.norm()), float((b - c).norm() / b.norm())
