"""What only a GPU can show; `pytest -m gpu`, or `make gpu-check`. Everything here skips elsewhere.

Triton kernels as the GPU runs them (not the interpreter), PyTorch's variable-length attention, no
host synchronisation inside a step, bitwise repeatable runs, the memory bound. The same arithmetic
on CPU is tested beside each module.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.batch import Pack
from fastdpo.logps import prepare_packed_forward
from fastdpo.packing import build_pack
from fastdpo_kernels import linear_logps, preference_loss
from fastdpo_kernels.reference import linear_logps_reference, preference_loss_reference
from tests.tiny import tiny_llama, tiny_pairs
from tests.tiny_trainer import LORA

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# (N, D, V): one off a tile's edge; more rows than a tile; a real head.
SHAPES = [(1, 64, 1001), (129, 256, 4097), (512, 896, 32001), (300, 2048, 128256)]


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def head_inputs(
    n: int, d: int, v: int, dtype: torch.dtype, *, peaked: bool, seed: int = 0
) -> Inputs:
    """hidden [N, D], weight [V, D], targets [N]; peaked: half of the targets have p close to 1."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=DEVICE)

    weight = randn(v, d) / math.sqrt(d)
    targets = torch.randint(v, (n,), generator=generator, device=DEVICE)
    hidden = 2.0 * randn(n, d)
    if peaked:
        hidden[::2] += 40.0 * weight[targets[::2]]  # z_y - z of about 40 + noise
        hidden[1::4] -= 150.0 * weight[targets[1::4]]  # logp < -100: the exact fallback's rows
    return hidden.to(dtype), weight.to(dtype), targets


def no_tf32() -> None:
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def oracle(inputs: Inputs, dtype: torch.dtype, *, trained: bool) -> tuple[Any, Any, Any]:
    """Log-probs and gradients of the reference in `dtype`, on the same rounded inputs."""
    hidden, weight, targets = inputs
    h = hidden.clone().to(dtype).requires_grad_()
    w = weight.clone().to(dtype).requires_grad_(trained)
    logps, _ = linear_logps_reference(h, w, targets)
    logps.backward(grad_of(logps))
    return logps.detach(), h.grad, w.grad


def grad_of(logps: torch.Tensor) -> torch.Tensor:
    """An upstream gradient that differs from row to row, in sign too."""
    return torch.cos(torch.arange(len(logps), device=logps.device)).to(logps.dtype)


def ours(inputs: Inputs, *, trained: bool) -> tuple[Any, Any, Any]:
    hidden, weight, targets = inputs
    h = hidden.clone().requires_grad_()
    w = weight.clone().requires_grad_(trained)
    logps = linear_logps(h, w, targets, impl="triton")
    logps.backward(grad_of(logps))
    return logps.detach(), h.grad, w.grad


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("peaked", [False, True], ids=["flat", "peaked"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_linear_logps_against_the_fp64_oracle(shape, dtype, trained, peaked):
    no_tf32()
    n, d, v = shape
    inputs = head_inputs(n, d, v, DTYPES[dtype], peaked=peaked)
    truth, truth_h, truth_w = oracle(inputs, torch.float64, trained=trained)
    plain, plain_h, _ = oracle(inputs, torch.float32, trained=trained)
    logps, grad_h, grad_w = ours(inputs, trained=trained)
    assert logps.dtype == torch.float32 and torch.isfinite(logps).all()
    # DESIGN 9: at most twice the error of an fp32-accumulating reference. A single row's error is
    # luck, so the largest of all rows; and not below the rounding of -softplus(log s + 40).
    allowed = 2 * float((plain.double() - truth).abs().max())
    allowed = max(allowed, torch.finfo(torch.float32).eps * (40 + float(truth.abs().max())))
    assert float((logps.double() - truth).abs().max()) <= allowed
    # 16-bit inputs: the exponentials that gradients are summed from are bf16 (fp16 has not their
    # range), rounded by eps / 2, and so is what meets them and what is written: at random, below
    # eps together. Weights: the same.
    eps = torch.finfo(torch.float32 if dtype == "fp32" else torch.bfloat16).eps
    fp32 = max(relative(plain_h, truth_h), torch.finfo(torch.float32).eps)
    assert relative(grad_h, truth_h) <= eps + 2 * fp32
    if trained:
        assert relative(grad_w, truth_w) <= eps + 2 * fp32


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_linear_logps_is_bitwise_repeatable(trained):
    inputs = head_inputs(513, 896, 32001, torch.bfloat16, peaked=True)
    first = ours(inputs, trained=trained)
    torch.empty(2**28, dtype=torch.uint8, device=DEVICE).fill_(255)  # NaN in freed memory
    second = ours(inputs, trained=trained)
    for a, b in zip(first, second, strict=True):
        if a is not None:  # a frozen weight has no gradient
            assert torch.equal(a, b)


def test_linear_logps_ignores_rows_and_needs_none():
    hidden, weight, targets = head_inputs(130, 256, 4097, torch.bfloat16, peaked=False)
    targets[::3] = -100
    hidden[::3] = math.nan
    logps, grad, _ = ours((hidden, weight, targets), trained=False)
    assert (logps[::3] == 0).all() and (grad[::3] == 0).all()
    assert torch.isfinite(logps).all() and torch.isfinite(grad).all()
    empty = linear_logps(hidden[:0].requires_grad_(), weight, targets[:0], impl="triton")
    empty.sum().backward()
    assert empty.shape == (0,)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_linear_logps_stays_inside_its_workspace(trained):
    n, d, v, workspace = 8192, 1024, 128256, 64 * 2**20
    hidden, weight, targets = head_inputs(n, d, v, torch.bfloat16, peaked=False)
    hidden.requires_grad_()
    weight.requires_grad_(trained)

    def forward():
        return linear_logps(hidden, weight, targets, impl="triton", workspace_bytes=workspace)

    forward().sum().backward()  # compiles; the library's own memory, once a thread
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    logps = forward()
    peak = torch.cuda.max_memory_allocated() - before
    kept = torch.cuda.memory_allocated() - before
    # Beyond the workspace: what is kept for backward (the saved [N, D] gradient), and vectors [N].
    vectors = 256 * n
    assert peak <= workspace + kept + vectors
    assert n * v * 2 > 20 * peak  # no logits
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    logps.sum().backward()
    results = 2 * (n * d + (v * d if trained else 0))
    assert torch.cuda.max_memory_allocated() - before <= workspace + results + vectors


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
def test_preference_loss_against_the_fp64_oracle(loss_type):
    generator = torch.Generator(DEVICE).manual_seed(0)
    lengths = torch.tensor([1, 300, 0, 17, 1024, 5, 129], device=DEVICE)
    cu_responses = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    n = int(lengths.sum())
    logps = -6 * torch.rand(n, generator=generator, device=DEVICE)
    reference = logps + 0.1 * torch.randn(n, generator=generator, device=DEVICE)
    pairs = torch.tensor([[0, 1], [3, 4], [5, 4], [6, 2]], device=DEVICE)  # 4 is shared, 2 empty
    options = {"beta": 0.1, "loss_type": loss_type}

    def run(op, dtype, **extra):
        values = logps.to(dtype).requires_grad_()
        out = op(
            values, cu_responses, pairs, ref_token_logps=reference.to(dtype), **options, **extra
        )
        out.losses.sum().backward()
        assert values.grad is not None
        return out, values.grad

    truth, truth_grad = run(preference_loss_reference, torch.float64)
    out, grad = run(preference_loss, torch.float32, impl="triton")
    # A response sums up to 1024 numbers of size 6 in fp32, by a tree or in blocks: its error is
    # below 10 roundings of the sum. Rewards are beta times that, the loss at most ten times.
    atol = 10 * torch.finfo(torch.float32).eps * float(truth.logps.abs().max())
    assert float((out.logps.double() - truth.logps).abs().max()) <= atol
    for name in ("chosen_rewards", "rejected_rewards"):
        difference = (getattr(out, name).double() - getattr(truth, name)).abs().max()
        assert float(difference) <= 2 * 0.1 * atol
    torch.testing.assert_close(out.losses.double(), truth.losses, rtol=1e-5, atol=20 * atol)
    torch.testing.assert_close(grad.double(), truth_grad, rtol=1e-4, atol=20 * atol)


def wide_llama(dtype: torch.dtype = torch.float32):
    """A tiny Llama with heads of width 64, which flash kernels take, on the GPU."""
    model = tiny_llama(
        hidden_size=256, intermediate_size=512, head_dim=64, initializer_range=0.05, dtype=dtype
    )
    return model.to(DEVICE)  # pyright: ignore[reportArgumentType]


def packed_logps(model, pack: Pack, attention: str, *, bf16: bool):
    """Token log-probs and all parameters' gradients of one shared pack under `attention`."""
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        info = prepare_packed_forward(model, attn_implementation=attention, mode="shared")
        assert info.backend == attention
        logps = model(pack=pack).token_logps
    logps.sum().backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    return logps.detach(), grads


@pytest.mark.parametrize("backend", ["varlen_attn", "flash_attention_2"])
def test_variable_length_attention_equals_sdpa_over_segments(backend):
    if backend == "flash_attention_2":
        pytest.importorskip("flash_attn", reason="the extra fastdpo[flash] is not installed")
    no_tf32()
    model = wide_llama()
    pairs = tiny_pairs(12, pairs_per_prompt=3, prompt_lengths=(5, 200), response_lengths=(1, 150))
    pack = build_pack(pairs, range(12), mode="shared").to(DEVICE)
    truth, truth_grad = packed_logps(model, pack, "sdpa", bf16=False)
    plain, plain_grad = packed_logps(model, pack, "sdpa", bf16=True)
    fast, fast_grad = packed_logps(model, pack, backend, bf16=True)
    # Both round to bf16 at the same places but inside attention: against fp32 they err alike.
    assert relative(fast, truth.double()) <= 2 * relative(plain, truth.double())
    assert relative(fast_grad, truth_grad.double()) <= 2 * relative(plain_grad, truth_grad.double())


class RefuseSyncs(TrainerCallback):
    """Lets no operation wait for the device between the start and the end of a step.

    The first epoch is let off: it compiles for each length of its packs, fills caches and checks
    the start. The second has the same packs.
    """

    def __init__(self, first: int):
        self.first, self.watched = first, 0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= self.first:
            torch.cuda.set_sync_debug_mode("error")

    def on_step_end(self, args, state, control, **kwargs):
        self.watched += torch.cuda.get_sync_debug_mode() == 2
        torch.cuda.set_sync_debug_mode("default")


def train(
    tmp_path, name: str, *, steps: int = 8, callbacks=(), peft_config=None, **overrides
) -> DPOTrainer:
    options = {
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 8,
        "logging_steps": 4,
        "save_strategy": "no",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        **overrides,
    }
    config = DPOConfig(output_dir=str(tmp_path / name), max_steps=steps, **options)
    pairs = tiny_pairs(32, pairs_per_prompt=2, prompt_lengths=(8, 60), response_lengths=(4, 40))
    pairs = replace(pairs, columns={"label": np.arange(32) % 2.0})  # read by losses of examples
    trainer = DPOTrainer(
        model=wide_llama(),
        args=config,
        train_dataset=pairs,
        callbacks=list(callbacks),
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_a_step_does_not_wait_for_the_device(tmp_path, checkpointing):
    watch = RefuseSyncs(first=4)
    try:
        trainer = train(
            tmp_path, "run", callbacks=[watch], gradient_checkpointing=checkpointing, steps=8
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watch.watched == 4
    assert trainer.args.bf16 and trainer.packed_forward.backend != "sdpa"


@pytest.mark.parametrize("loss_type", ["aot", "kto", "apo_zero_unpaired", "discopop", "orpo"])
def test_no_loss_waits_for_the_device(tmp_path, loss_type):
    """Those of the whole step in two passes over several packs."""
    watch = RefuseSyncs(first=4)
    try:
        trainer = train(
            tmp_path, "run", callbacks=[watch], loss_type=loss_type, max_tokens_per_pack=256
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watch.watched == 4 and trainer.pack_stats.n_packs > 8


PACKS = {"max_tokens_per_pack": 256}
KINDS: dict[str, dict[str, Any]] = {
    "several packs": PACKS,
    "lora, adapters off": {"peft_config": LoraConfig(**LORA), **PACKS},
    "lora, copied reference": {"peft_config": LoraConfig(**LORA), "reference": "copy"},
    "precomputed": {"precompute_ref_log_probs": True, **PACKS},
    "moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 2},
    "skip, fused": {"on_nonfinite": "skip", "optim": "adamw_torch_fused", **PACKS},
    "skip, not fused": {"on_nonfinite": "skip", "optim": "adamw_torch", **PACKS},
    "skip, sgd": {"on_nonfinite": "skip", "optim": "sgd"},
    "stop, not fused": {"on_nonfinite": "stop", "optim": "adamw_torch"},
    "in backward": {"optimizer_in_backward": True, "max_grad_norm": 0.0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_of_run_waits_for_the_device(tmp_path, kind):
    """As test_no_sync.py, which sees on a CPU what is read but not what is copied."""
    watch = RefuseSyncs(first=4)
    options = {"gradient_checkpointing": False, **KINDS[kind]}
    try:
        trainer = train(tmp_path, "run", callbacks=[watch], **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watch.watched == 4
    assert "max_tokens_per_pack" not in options or trainer.pack_stats.n_packs > 8


def test_training_on_the_gpu_lowers_the_loss(tmp_path):
    trainer = train(tmp_path, "run", steps=24, num_train_epochs=6)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < 0.9 * losses[0]
    assert trainer.packed_forward.mode == "shared"


def test_deterministic_runs_are_bitwise_equal(tmp_path):
    try:
        runs = [train(tmp_path, name, deterministic=True) for name in ("first", "second")]
    finally:
        torch.use_deterministic_algorithms(False)
    first, second = (dict(run.model.named_parameters()) for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [log.get("loss") for log in runs[0].state.log_history] == [
        log.get("loss") for log in runs[1].state.log_history
    ]
