"""The load-balancing loss over packs: what padded, unshared batches of whole steps give."""

import copy
from typing import Any

import pytest
import torch

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.errors import ConfigError, ModelError
from fastdpo.logps import prepare_packed_forward
from fastdpo.packing import build_pack, plan_packs
from fastdpo.router_loss import make_router_loss, router_grad, router_loss, step_router_sums

from . import test_distributed
from .families import SHARED, V, by_name
from .test_coverage import FP64, NoFloat32
from .test_keystone import assert_close, gradients, mixed_pairs
from .test_parity_trl import compare_weights
from .tiny import tiny_llama, tiny_pairs, tiny_rows, tiny_tokenizer

ROUTED = [family for family in SHARED if family.router]
CPU = torch.device("cpu")


def their_loss(model: Any, pairs) -> torch.Tensor:
    """transformers' own, over one padded batch of all whole sequences."""
    rows = [
        [*pairs.prompt(i).tolist(), *response.tolist()]
        for i in range(len(pairs))
        for response in (pairs.chosen(i), pairs.rejected(i))
    ]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return model(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss


@pytest.mark.parametrize("family", ROUTED, ids=[family.name for family in ROUTED])
def test_packs_of_a_step_give_the_padded_batchs_loss(family) -> None:
    model = family.build(torch.float64)
    pairs = mixed_pairs()
    with NoFloat32():
        expected = their_loss(model, pairs)
        expected_gradients = gradients(model, expected)
        made = make_router_loss(model, 0.5)
        assert made is not None and (made.coefficient, made.n_experts) == (0.5, 4)
        for mode in ("shared", "unshared", "padded"):
            prepare_packed_forward(model, mode=mode)
            plan = plan_packs(
                pairs,
                range(len(pairs)),
                max_tokens=100 if mode == "padded" else 60,
                share_prompts=mode == "shared",
                padded=mode == "padded",
                with_last=True,
            )
            assert len(plan) > 1
            packs = [build_pack(pairs, ids, mode=mode, with_last=True) for ids in plan]
            sums = [model(pack=pack, router_sums=True).router for pack in packs]
            step = step_router_sums(sums, made.n_experts, CPU)
            gradient = router_grad(step)
            found = gradients(model, sum(part.probs @ gradient for part in sums))  # type: ignore[arg-type]
            torch.testing.assert_close(router_loss(step), expected.detach(), rtol=FP64, atol=0)
            assert_close(found, expected_gradients, FP64)


@pytest.mark.parametrize("mode", ["shared", "unshared", "padded"])
@pytest.mark.parametrize("with_last", [False, True])
def test_multiplicity_counts_the_sequences_one_by_one(mode: str, with_last: bool) -> None:
    pairs = mixed_pairs()
    pack = build_pack(pairs, range(len(pairs)), mode=mode, with_last=with_last)
    assert pack.multiplicity.shape == pack.input_ids.shape
    lengths = pairs.lengths.astype(int)
    whole = 2 * lengths[:, 0].sum() + lengths[:, 1:].sum()
    assert float(pack.multiplicity.sum()) == whole - (0 if with_last else 2 * len(pairs))
    assert float(pack.multiplicity.sum()) == pack.n_tokens_unshared
    # By token as well: every token id occurs as often as in the 2P sequences.
    counts = torch.bincount(pack.input_ids.flatten(), pack.multiplicity.flatten(), minlength=V)
    sequences = [
        torch.from_numpy(part[: len(part) - drop].astype(int))
        for i in range(len(pairs))
        for part, drop in (
            *((pairs.prompt(i), 0), (pairs.chosen(i), not with_last)),
            *((pairs.prompt(i), 0), (pairs.rejected(i), not with_last)),
        )
    ]
    assert torch.equal(counts, torch.bincount(torch.cat(sequences), minlength=V).double())


def train(tmp_path, model, pairs=None, **options) -> DPOTrainer:
    arguments = {
        "output_dir": str(tmp_path / "run"),
        "overwrite_output_dir": True,
        "learning_rate": 0.1,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "optim": "sgd",
        **options,
    }
    if pairs is None:
        pairs = tiny_pairs(12, vocab_size=V, pairs_per_prompt=2)
    made = DPOTrainer(copy.deepcopy(model), args=DPOConfig(**arguments), train_dataset=pairs)
    made.train()
    return made


def weights(made: DPOTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in made.model.named_parameters()}


def test_steps_do_not_depend_on_packs_or_checkpointing(tmp_path) -> None:
    model = by_name("Qwen3-MoE").build()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    whole = train(tmp_path, model, router_aux_loss_coef=1.0)
    options = {"max_tokens_per_pack": 110, "gradient_checkpointing": True}
    other = train(tmp_path, model, router_aux_loss_coef=1.0, **options)
    without = train(tmp_path, model, router_aux_loss_coef=0.0)
    assert other.pack_stats.n_packs > whole.pack_stats.n_packs == 2
    # A weight of 0.2 stores its move with an error of eps / 4 of itself (eps 1.2e-7), as often as
    # there are steps; gradients summed in another order err by some eps of themselves.
    difference, moved = compare_weights(weights(other), weights(whole), start)
    assert difference < 1e-7 + 1e-5 * moved
    assert compare_weights(weights(without), weights(whole), start)[0] > 0.1 * moved
    logs = [log for log in whole.state.log_history if "aux_loss" in log]
    bare = [log for log in without.state.log_history if "loss" in log]
    assert len(logs) == 2 and "aux_loss" not in bare[0]
    assert logs[0]["loss"] == pytest.approx(bare[0]["loss"] + logs[0]["aux_loss"], rel=1e-5)


def test_a_step_equals_trls(tmp_path) -> None:
    trl = pytest.importorskip("trl", minversion="1.16", reason="the peer to compare with")
    from datasets import Dataset

    model = by_name("Qwen3-MoE").build(vocab_size=400)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = Dataset.from_list(tiny_rows(12))
    shared = {"router_aux_loss_coef": 1.0, "use_cpu": True, "bf16": False, "report_to": "none"}
    options = {
        **shared,
        **{"learning_rate": 0.1, "max_steps": 2, "per_device_train_batch_size": 4},
        **{"train_sampling_strategy": "sequential", "logging_steps": 1, "save_strategy": "no"},
        **{"disable_tqdm": True, "gradient_checkpointing": False, "optim": "sgd"},
    }
    made = []
    for trainer, config in ((DPOTrainer, DPOConfig), (trl.DPOTrainer, trl.DPOConfig)):
        args = config(output_dir=str(tmp_path / trainer.__module__), **options)
        tokenizer = tiny_tokenizer(bos=False)
        kwargs = {"args": args, "train_dataset": rows, "processing_class": tokenizer}
        one = trainer(copy.deepcopy(model), ref_model=copy.deepcopy(model), **kwargs)
        one.train()
        made.append(one)
    ours, theirs = ([log for log in one.state.log_history if "loss" in log] for one in made)
    for mine, other in zip(ours, theirs, strict=True):
        # fp32 through 2 layers, as in test_parity_trl.py; TRL's logs keep that precision.
        assert mine["aux_loss"] == pytest.approx(other["aux_loss"], rel=1e-5)
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
    difference, moved = compare_weights(weights(made[0]), weights(made[1]), start)
    assert moved > 1e-3 and difference < 1e-7 + 1e-5 * moved  # as above


def test_what_has_no_such_loss_is_refused(tmp_path, monkeypatch) -> None:
    with pytest.raises(ConfigError, match="'router_aux_loss_coef' is 0.1, and LlamaForCausalLM"):
        train(tmp_path, tiny_llama(vocab_size=V), router_aux_loss_coef=0.1)
    assert make_router_loss(tiny_llama(), None) is None
    model = by_name("Mixtral").build()
    kwargs = {"use_reentrant": True}
    with pytest.raises(ConfigError, match="use_reentrant: true loses the gradient of the router"):
        train(tmp_path, model, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
    model.num_experts_per_tok = 1  # the model's own formula, not the config's
    with pytest.raises(ModelError, match="MixtralForCausalLM computes an auxiliary loss of its"):
        make_router_loss(model, None)


@pytest.mark.soak
def test_two_ranks_train_as_one(tmp_path, monkeypatch) -> None:
    """The means are over the pairs of all ranks, one of which has none in an epoch's last step."""
    script = test_distributed.SCRIPT.replace(
        "tiny_llama(dtype=torch.float64)", 'by_name("Mixtral").build(torch.float64)'
    )
    script = script.replace("tiny_pairs(9)", f"tiny_pairs(9, vocab_size={V})")
    script = script.replace("report_to=", "router_aux_loss_coef=1.0, report_to=")
    assert script.count("by_name") == script.count("router_aux") == 1
    script = "from tests.families import by_name\n" + script
    monkeypatch.setattr(test_distributed, "SCRIPT", script)
    one = test_distributed.run(tmp_path / "one", ranks=1, batch=4)
    two = test_distributed.run(tmp_path / "two", ranks=2, batch=2)
    for name, weight in one["weights"].items():
        # As in test_distributed.py: norms and routers compute in fp32.
        assert (two["weights"][name] - weight).norm() <= 4e-6 * weight.norm(), name
    for a, b in zip(one["log"], two["log"], strict=True):
        for key in ("loss", "aux_loss"):
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-5), key
