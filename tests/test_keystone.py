"""The keystone: packs with shared prompts give what padded, unshared training gives.

Log-probs and every parameter's gradient, in fp64, against plain transformers forwards over a
right-padded batch with full logits. Nothing of fastdpo takes part in the reference.
"""

import copy
import types

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from fastdpo.data import TokenizedPairs
from fastdpo.logps import prepare_packed_forward
from fastdpo.packing import build_pack, plan_packs

from .tiny import tiny_llama, tiny_mistral, tiny_qwen3

V = 80

# What the comparison may differ by, in fp64 (eps 2.2e-16):
# sums of some 1e3 terms through 2 layers, a few roundings each: 1e-12 of the result's size.
FP64 = 1e-12
# RMSNorm computes in fp32 (eps 1.2e-7) even in an fp64 model. Forward, the same inputs round to the
# same fp32 numbers; backward, gradients summed in another order pass through fp32: some eps.
STOCK_NORM_GRADIENTS = 1e-6


def tiny_qwen2(dtype: torch.dtype, **overrides) -> Qwen2ForCausalLM:
    """Biases on q, k, v; the second layer slides over a window of 6, the first sees everything."""
    config = Qwen2Config(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
        initializer_range=0.3,
        tie_word_embeddings=False,
        **overrides,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen2ForCausalLM(config).to(dtype)  # pyright: ignore[reportArgumentType]


MODELS = {
    "llama": lambda: tiny_llama(dtype=torch.float64, vocab_size=V),
    "qwen2": lambda: tiny_qwen2(torch.float64),
    "qwen3": lambda: tiny_qwen3(dtype=torch.float64, vocab_size=V),
    "mistral": lambda: tiny_mistral(dtype=torch.float64, vocab_size=V, sliding_window=5),
}


def mixed_pairs() -> TokenizedPairs:
    """Groups of 1 to 4 responses, single tokens, empty prompts, reused responses, a long one."""
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(V, size=n).tolist() for n in (6, 9, 1))
    r = [rng.integers(V, size=n).tolist() for n in (5, 1, 8, 12, 34, 1, 1, 3, 7, 1)]
    groups = [
        (a, r[0], r[1]),
        (b, r[4], r[5]),
        (a, r[0], r[2]),  # its chosen is the first pair's
        (a, r[3], r[1]),
        (c, r[6], r[6]),  # one single token, chosen and rejected
        ([], r[7], r[9]),  # nothing of r[9] is scored
        ([], r[8], r[7]),
    ]
    return TokenizedPairs.from_lists(*(list(column) for column in zip(*groups, strict=True)))


def fp64_norms(model: PreTrainedModel) -> PreTrainedModel:
    """Replaces every RMSNorm's forward by one that keeps the dtype of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (
            self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        )

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(forward, module)
    return model


def token_weights(pairs: TokenizedPairs) -> dict[tuple[int, int], torch.Tensor]:
    """d loss / d token log-prob of every (pair, side): some fixed numbers."""
    generator = torch.Generator().manual_seed(1)
    return {
        (i, side): torch.randn(length, generator=generator, dtype=torch.float64)
        for i, lengths in enumerate(pairs.lengths[:, 1:].tolist())
        for side, length in enumerate(lengths)
    }


def padded_unshared(model, pairs: TokenizedPairs) -> dict[tuple[int, int], torch.Tensor]:
    """Scored token log-probs of every (pair, side): one plain forward over all 2P padded rows."""
    rows, keys = [], []
    for i in range(len(pairs)):
        for side, response in enumerate((pairs.chosen(i), pairs.rejected(i))):
            rows.append([*pairs.prompt(i).tolist(), *response.tolist()])
            keys.append((i, side))
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    log_p = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)  # [2P, L, V]
    result = {}
    for k, (i, side) in enumerate(keys):
        start = max(len(pairs.prompt(i)), 1)  # without a prompt the first token isn't scored
        targets = torch.tensor(rows[k][start:], dtype=torch.int64)
        result[i, side] = log_p[k, start - 1 : len(rows[k]) - 1].gather(1, targets[:, None])[:, 0]
    return result


def weighted_sum(logps: dict, weights: dict) -> torch.Tensor:
    # Where the first token isn't scored, its weight isn't used either.
    return torch.stack(
        [(lp * weights[k][len(weights[k]) - len(lp) :]).sum() for k, lp in logps.items()]
    ).sum()


def packed(
    model, pairs: TokenizedPairs, pair_ids, mode: str
) -> dict[tuple[int, int], torch.Tensor]:
    pack = build_pack(pairs, pair_ids, mode=mode)
    token_logps = model(pack=pack).token_logps  # [N]
    parts = token_logps.split(pack.cu_responses.diff().tolist())
    return {
        (i, side): parts[response]
        for i, responses in zip(pack.pair_ids.tolist(), pack.pairs.tolist(), strict=True)
        for side, response in enumerate(responses)
    }


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict, expected: dict, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if value.numel():
            error = (found[key] - value).abs().max() / value.abs().max().clamp(min=1e-3)
            assert error <= tolerance, (key, float(error))


@pytest.mark.parametrize("norm", ["stock", "fp64"])
@pytest.mark.parametrize("checkpointing", ["none", "non_reentrant", "reentrant"])
@pytest.mark.parametrize("name", MODELS)
def test_shared_packs_equal_padded_unshared(name: str, checkpointing: str, norm: str) -> None:
    model = MODELS[name]().train()
    if norm == "fp64":
        fp64_norms(model)
    pairs = mixed_pairs()
    weights = token_weights(pairs)
    expected = padded_unshared(model, pairs)
    expected_gradients = gradients(model, weighted_sum(expected, weights))

    info = prepare_packed_forward(model, mode="shared")
    assert (info.mode, info.backend, info.reason) == ("shared", "sdpa", None)
    if checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    found = packed(model, pairs, range(len(pairs)), "shared")
    assert_close(found, expected, FP64)
    found_gradients = gradients(model, weighted_sum(found, weights))
    tolerance = STOCK_NORM_GRADIENTS if norm == "stock" else FP64
    assert_close(found_gradients, expected_gradients, tolerance)


@pytest.mark.parametrize("mode", ["unshared", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_the_other_modes_equal_padded_unshared(name: str, mode: str) -> None:
    model = fp64_norms(MODELS[name]()).train()
    pairs = mixed_pairs()
    weights = token_weights(pairs)
    expected = padded_unshared(model, pairs)
    expected_gradients = gradients(model, weighted_sum(expected, weights))

    assert prepare_packed_forward(model, mode=mode).mode == mode
    found = packed(model, pairs, range(len(pairs)), mode)
    assert_close(found, expected, FP64)
    assert_close(gradients(model, weighted_sum(found, weights)), expected_gradients, FP64)


@pytest.mark.parametrize("max_tokens", [42, 60, 75])
def test_gradients_do_not_depend_on_how_a_step_is_packed(max_tokens: int) -> None:
    model = fp64_norms(MODELS["llama"]()).train()
    prepare_packed_forward(model, mode="shared")
    pairs = mixed_pairs()
    weights = token_weights(pairs)
    whole = gradients(
        model, weighted_sum(packed(model, pairs, range(len(pairs)), "shared"), weights)
    )
    model.zero_grad()
    plan = plan_packs(pairs, range(len(pairs)), max_tokens=max_tokens)
    assert len(plan) > 1
    for pair_ids in plan:
        weighted_sum(packed(model, pairs, pair_ids, "shared"), weights).backward()
    assert_close({n: p.grad for n, p in model.named_parameters()}, whole, FP64)


def test_runs_are_bitwise_equal() -> None:
    model = tiny_llama(vocab_size=V)
    prepare_packed_forward(model, mode="shared")
    pairs = mixed_pairs()
    weights = token_weights(pairs)
    runs = []
    for _ in range(2):
        found = packed(model, pairs, range(len(pairs)), "shared")
        runs.append((found, gradients(model, weighted_sum(found, weights))))
    for first, second in zip(*runs, strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_wrong_positions_would_be_seen() -> None:
    """The keystone can fail: with wrong positions, log-probs move by far more."""
    model = MODELS["llama"]().eval()
    pairs = mixed_pairs()
    expected = padded_unshared(copy.deepcopy(model), pairs)
    prepare_packed_forward(model, mode="shared")
    pack = build_pack(pairs, range(len(pairs)), mode="shared")
    right = model(pack=pack).token_logps
    assert pack.position_ids is not None
    pack.position_ids.copy_(torch.arange(len(pack.position_ids)))
    wrong = model(pack=pack).token_logps
    assert len(right) < sum(map(len, expected.values()))  # reused responses are computed once
    assert (right - wrong).abs().max() > 1e-3
