"""What saves memory and changes no number, or says so: checkpointing, offload, gradients."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.accumulate import Fp32Accumulation, StepInBackward
from fastdpo.checkpointing import checkpoint_activations, why_not_selective
from fastdpo.errors import ConfigError
from fastdpo.logps import prepare_packed_forward
from fastdpo.nonfinite import FiniteGuard
from fastdpo.offload import OffloadActivations
from fastdpo.packing import build_pack
from fastdpo.plan_tracker import MemoryTracker
from tests.families import by_name
from tests.tiny import tiny_llama, tiny_mistral, tiny_pairs

LORA: Any = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def gradients(model: nn.Module, base: Any, offload: bool) -> dict[str, torch.Tensor]:
    """Of the packed log-probs' sum, by parameter."""
    pack = build_pack(tiny_pairs(6), range(6), mode="shared")
    model.train()
    model.zero_grad()
    if offload:
        with OffloadActivations(model, least_bytes=1):
            logps = base(pack=pack).token_logps
    else:
        logps = base(pack=pack).token_logps
    logps.sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "how, offload",
    [(True, False), ("selective", False), (False, True), ("selective", True), (True, True)],
)
def test_gradients_are_bitwise_those_of_the_plain_pass(lora, how, offload):
    def made() -> tuple[Any, Any]:
        base = tiny_mistral()  # windows: masks are among what is saved
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(**LORA)) if lora else base
        prepare_packed_forward(base)
        return model, base

    expected = gradients(*made(), offload=False)
    model, base = made()
    if how:
        checkpoint_activations(model, how, {})
    found = gradients(model, base, offload)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_selective_checkpointing_runs_attention_once():
    """Full checkpointing computes attention again in the backward pass, selective does not."""

    class Count(MemoryTracker):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counts[how] = counts.get(how, 0) + (
                "attention" in str(func) and "backward" not in str(func)
            )
            return super().__torch_dispatch__(func, types, args, kwargs)

    counts: dict[Any, int] = {}
    for how in (False, "selective", True):
        model = tiny_llama()
        prepare_packed_forward(model)
        if how:
            checkpoint_activations(model, how, {})
        pack = build_pack(tiny_pairs(6), range(6), mode="shared")
        model.train()
        with Count():
            model(pack=pack).token_logps.sum().backward()
    assert counts["selective"] == counts[False] > 0
    assert counts[True] == 2 * counts[False]


def test_offload_holds_a_tensor_that_is_saved_twice_once():
    model = nn.Linear(64, 64)
    offload = OffloadActivations(model, least_bytes=1)
    x = torch.randn(32, 64)
    with offload:
        y = x * 2.0
        out = (y.clone().requires_grad_() @ model.weight) + (y @ model.weight)
    assert offload.host_bytes == 2 * y.nbytes  # y and its clone, the weight not at all
    out.sum().backward()
    assert offload._now == 0  # everything was let go


def test_offload_leaves_small_tensors_weights_and_views_with_gaps():
    model = nn.Linear(64, 64)
    offload = OffloadActivations(model, least_bytes=64 * 64 * 4)
    with offload:
        small = torch.randn(8, 64, requires_grad=True).exp()
        expanded = torch.randn(1, 64, requires_grad=True).expand(64, 64).sin()
        model(torch.randn(1, 64)).sum().backward()
        (small.sum() + expanded.sum()).backward()
    assert offload.host_bytes == 0


# ---- gradients --------------------------------------------------------------------------------


def test_bf16_gradients_of_several_packs_are_summed_in_fp32():
    """1 and 255 gradients of 2^-9 each: bf16 has 8 bits, so 1 + 2^-9 rounds to 1 every time. Their
    sum, 1 + 255/512, needs 9 bits after the point; rounded once to bf16 it is 1.5."""
    w = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    plain = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    accumulation = Fp32Accumulation([w])
    accumulation.begin(256)
    for n in range(256):
        for parameter in (w, plain):
            (parameter * (1.0 if n == 0 else 2.0**-9)).sum().backward()
        assert w.grad is None
    accumulation.finish()
    assert plain.grad is not None and float(plain.grad[0]) == 1.0
    assert w.grad is not None and w.grad.dtype == torch.bfloat16 and float(w.grad[0]) == 1.5
    accumulation.begin(1)
    w.grad = None
    w.sum().backward()
    accumulation.finish()
    assert w.grad is not None and float(w.grad[0]) == 1.0  # one pack: autograd's own gradient


def config(tmp_path, name: str, **options) -> DPOConfig:
    base = {
        "output_dir": str(tmp_path / name),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "gradient_checkpointing": True,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
    }
    return DPOConfig(**{**base, **options})


def trained(tmp_path, name: str, **options) -> DPOTrainer:
    trainer = DPOTrainer(
        model=tiny_llama(), args=config(tmp_path, name, **options), train_dataset=tiny_pairs(16)
    )
    trainer.train()
    return trainer


def test_the_optimizer_in_backward_takes_the_same_steps(tmp_path):
    """Weights, states and losses bitwise those of ordinary steps; no gradient is left to hold."""
    left = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            left.extend(p for p in kwargs["model"].parameters() if p.grad is not None)

    plain = trained(tmp_path, "a", weight_decay=0.1)
    trainer = DPOTrainer(
        model=tiny_llama(),
        args=config(tmp_path, "b", weight_decay=0.1, optimizer_in_backward=True),
        train_dataset=tiny_pairs(16),
        callbacks=[Watch()],
    )
    trainer.train()
    assert not left
    ours, theirs = trainer.model.state_dict(), plain.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert trainer.optimizer is not None and plain.optimizer is not None
    states = [t.optimizer.state_dict()["state"] for t in (trainer, plain)]  # pyright: ignore
    assert all(
        torch.equal(states[0][key][name], states[1][key][name])
        for key in states[1]
        for name in states[1][key]
    )
    losses = [[x["loss"] for x in t.state.log_history if "loss" in x] for t in (trainer, plain)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm 1 needs the norm of all of them"),
        ({"on_nonfinite": "skip"}, "on_nonfinite 'skip' looks at all of them first"),
        ({"max_tokens_per_pack": 64}, r"needs one pack a step, and step \d+ of epoch 1 has"),
    ],
)
def test_the_optimizer_in_backward_refuses_what_needs_all_gradients(tmp_path, options, message):
    with pytest.raises(ConfigError, match=f"'optimizer_in_backward'.*{message}"):
        trained(tmp_path, "a", optimizer_in_backward=True, **options)


def test_stepping_in_backward_leaves_the_groups_as_they_were():
    model = nn.Linear(3, 3)
    groups: Any = [{"params": [model.weight], "lr": 0.5}, {"params": [model.bias], "lr": 0.25}]
    optimizer = torch.optim.SGD(groups)
    before = [p.detach().clone() for p in model.parameters()]
    with StepInBackward(optimizer, FiniteGuard("stop", torch.device("cpu"))):
        model(torch.ones(1, 3)).sum().backward()
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]
    moved = [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]
    assert torch.equal(moved[0], torch.full((3, 3), 0.5)) or torch.allclose(
        moved[0], torch.tensor(0.5)
    )
    assert torch.allclose(moved[1], torch.tensor(0.25))


def test_runs_under_offload_and_selective_checkpointing_equal_the_plain_run(tmp_path, monkeypatch):
    monkeypatch.setattr("fastdpo.offload.LEAST_BYTES", 1)
    plain = trained(tmp_path, "a", gradient_checkpointing="none")
    for name, options in {
        "b": {"gradient_checkpointing": "selective"},
        "c": {"gradient_checkpointing": "none", "activation_offloading": True},
        "d": {"gradient_checkpointing": "full", "activation_offloading": True},
    }.items():
        other = trained(tmp_path, name, **options)
        if options.get("activation_offloading"):
            offload: Any = other._forward.saving()
            assert offload.host_bytes > 0
        ours, theirs = other.model.state_dict(), plain.model.state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


def test_selective_checkpointing_refuses_attention_that_it_can_not_keep(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    shape: Any = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    model = Gemma2ForCausalLM(
        Gemma2Config(vocab_size=400, num_attention_heads=4, num_key_value_heads=2, **shape)
    )
    with pytest.raises(ConfigError, match="caps its logits at 50.*use 'full'"):
        checkpoint_activations(model, "selective", {})
    for backend in ("flex_attention", "flash_attention_4", "eager"):
        with pytest.raises(ConfigError, match=f"those of {backend} attention can't be told from"):
            checkpoint_activations(tiny_llama(), "selective", {}, backend)
    assert why_not_selective(model.config, "flash_attention_2") is None  # which caps by itself
    sinks = by_name("GPT-OSS").build().config
    assert why_not_selective(sinks, "sdpa") == (
        "this model's attention has sinks, which sdpa runs unfused"
    )
    with pytest.raises(ConfigError, match="use_reentrant: true can't"):
        checkpoint_activations(tiny_llama(), "selective", {"use_reentrant": True})
