"""FlexAttention over packs: the formula, its blocks, and how often it compiles."""

import pytest
import torch

import fastdpo.attention_flex as flex
from fastdpo.packing import build_pack
from tests.attention_cases import CPU, H, by_formula, call, some_layout, some_qkv
from tests.tiny import tiny_pairs


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("extra", ["plain", "softcap", "sinks"])
def test_flex_attention_is_the_formula(extra, window, monkeypatch) -> None:
    """Uncompiled, on CPU, where PyTorch refuses gradients before it computes them well."""
    import torch.nn.attention.flex_attention as theirs

    monkeypatch.setattr(theirs, "_validate_device", lambda *tensors: None)
    layout, n_tokens = some_layout()
    q, k, v = some_qkv(n_tokens)
    softcap = 1.5 if extra == "softcap" else None
    sinks = torch.randn(H, dtype=torch.float64, requires_grad=True) if extra == "sinks" else None
    inputs = [q, k, v] + ([] if sinks is None else [sinks])
    expected = by_formula(q, k, v, layout, 0.3, window, softcap, sinks)
    kwargs = {"sliding_window": window, "softcap": softcap, "s_aux": sinks}
    out = call("flex_attention", q, k, v, layout, scaling=0.3, **kwargs)
    weights = torch.randn(out.shape, dtype=torch.float64)
    gradients = torch.autograd.grad((out * weights).sum(), inputs)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    # fp64, as in test_attention.py; its log-sum-exp is fp32, which sinks read (eps 1.2e-7).
    atol = 1e-12 if sinks is None else 1e-6
    torch.testing.assert_close(out, expected, rtol=0, atol=atol)
    for found, gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, gradient, rtol=0, atol=10 * atol)


@pytest.mark.parametrize("window", [None, 1, 6, 11])
@pytest.mark.parametrize("mode", ["shared", "unshared"])
def test_flex_attentions_blocks_hold_what_is_seen(mode, window, monkeypatch) -> None:
    monkeypatch.setattr(flex, "BLOCK", 4)  # T is some 60 here, 128 a block there
    layout, n_tokens = some_layout(mode)
    n_blocks = -(-n_tokens // 4)
    seen = torch.zeros(4 * n_blocks, 4 * n_blocks, dtype=torch.bool)
    keys = layout.kv_index.tolist()
    for q_start, q_end, k_start, k_end in layout.segments:
        for row in range(q_start, q_end):
            end = k_end - (q_end - 1 - row)
            seen[row, keys[k_start if window is None else max(k_start, end - window) : end]] = True
    row, column = torch.arange(n_tokens)[:, None], torch.arange(n_tokens)[None]
    mask = flex._block_mask(layout, window, CPU)
    by_rule = mask.mask_mod(torch.tensor(0), torch.tensor(0), row, column)
    assert torch.equal(by_rule, seen[:n_tokens, :n_tokens])
    blocks = seen.view(n_blocks, 4, n_blocks, 4)
    some, every = blocks.any(3).any(1), blocks.all(3).all(1)
    n_masked, masked, n_whole, whole = flex._block_lists(layout, window)
    tables = []
    for counts, indices in ((n_masked, masked), (n_whole, whole)):
        table = torch.zeros(n_blocks, n_blocks, dtype=torch.bool)
        for block, n in enumerate(counts[0, 0]):
            table[block, indices[0, 0, block, :n].tolist()] = True
        tables.append(table)
    assert torch.equal(tables[0] ^ tables[1], some)  # each block once
    assert not (tables[1] & ~every).any()
    assert tables[1].any() or window is not None


def test_packs_share_flex_attentions_graphs(monkeypatch) -> None:
    """Two windows and growing packs: one graph a window for the first, one for all other lengths.

    A mask is a new closure for every pack; it must not compile anew for that.
    """
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, backend="eager")
    monkeypatch.setattr(flex, "_function", lambda is_cuda: compiled)
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for n in (6, 7, 8, 9):
        pairs = tiny_pairs(n, seed=n, prompt_lengths=(40, 90), response_lengths=(20, 60))
        pack = build_pack(pairs, range(n), mode="shared")
        for window in (None, 30):
            q, k, v = (x.detach() for x in some_qkv(pack.n_tokens, torch.float32, dim=16))
            with torch.no_grad():
                call("flex_attention", q, k, v, pack.layout, sliding_window=window)
    assert graphs["unique_graphs"] - before == 4
    torch._dynamo.reset()
