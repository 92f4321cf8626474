"""RoPE whose frequencies depend on the longest row: packs give what every sequence gives alone."""

from typing import Any

import pytest
import torch

from fastdpo.data import TokenizedPairs
from fastdpo.errors import DataError, ModelError
from fastdpo.logps import prepare_packed_forward
from fastdpo.packing import build_pack, plan_packs
from fastdpo.steps import Packer

from .families import V, by_name
from .test_coverage import FP64, NoFloat32
from .test_keystone import assert_close, gradients, mixed_pairs, token_weights, weighted_sum
from .tiny import tiny_llama, tiny_pairs

THRESHOLD = 14  # between the lengths of mixed_pairs' sequences; one prompt has both kinds
LONGROPE = {
    **{"rope_type": "longrope", "rope_theta": 10_000.0, "factor": 2.0},
    **{"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]},
    "original_max_position_embeddings": THRESHOLD,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}


def longrope(family: str) -> Any:
    return by_name(family).build(
        torch.float64,
        rope_parameters=LONGROPE,
        max_position_embeddings=64,
        original_max_position_embeddings=THRESHOLD,
        partial_rotary_factor=1.0,
    )


def alone(model: Any, pairs: TokenizedPairs) -> dict[tuple[int, int], torch.Tensor]:
    """Scored token log-probs of every (pair, side), a plain forward for each."""
    result = {}
    for i in range(len(pairs)):
        prompt = pairs.prompt(i).tolist()
        for side, response in enumerate((pairs.chosen(i), pairs.rejected(i))):
            ids = torch.tensor([*prompt, *response.tolist()])
            start = max(len(prompt), 1)
            if len(ids) == start:  # nothing of it is scored
                result[i, side] = torch.zeros(0, dtype=torch.float64)
                continue
            log_p = model(input_ids=ids[None, :-1]).logits[0].log_softmax(-1)
            result[i, side] = log_p[start - 1 :].gather(1, ids[start:, None])[:, 0]
    return result


def packed(model, pairs, mode: str) -> dict[tuple[int, int], torch.Tensor]:
    pack = build_pack(pairs, range(len(pairs)), mode=mode, rope_threshold=THRESHOLD)
    assert pack.long_rows is not None and not pack.long_rows.all()
    parts = model(pack=pack).token_logps.split(pack.cu_responses.diff().tolist())
    return {
        (i, side): parts[response]
        for i, responses in enumerate(pack.pairs.tolist())
        for side, response in enumerate(responses)
    }


@pytest.mark.parametrize("mode", ["shared", "unshared", "padded"])
@pytest.mark.parametrize("family", ["Llama 3", "Phi-3, Phi-4"])
def test_long_and_short_sequences_keep_their_frequencies(family: str, mode: str) -> None:
    model, pairs = longrope(family), mixed_pairs()
    weights = token_weights(pairs)
    with NoFloat32():
        expected = alone(model, pairs)
        expected_gradients = gradients(model, weighted_sum(expected, weights))
        info = prepare_packed_forward(model, mode=mode)
        assert (info.rope_threshold, info.max_seqlen) == (THRESHOLD, None)
        assert prepare_packed_forward(model, mode=mode) == info  # bound once
        found = packed(model, pairs, mode)
        found_gradients = gradients(model, weighted_sum(found, weights))
    assert_close(found, expected, FP64)
    assert_close(found_gradients, expected_gradients, FP64)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_what_would_go_wrong(kind: str) -> None:
    """A short sequence in one batch with a long one: transformers gives it other logits."""
    rope = LONGROPE if kind == "longrope" else DYNAMIC
    model: Any = tiny_llama(
        vocab_size=V, rope_parameters=rope, max_position_embeddings=THRESHOLD
    ).eval()
    ids = torch.arange(40).reshape(2, 20)
    short, mask = ids[:1, :12], torch.ones_like(ids)
    mask[0, 12:] = 0
    with torch.no_grad():
        apart = model(input_ids=short).logits
        together = model(input_ids=ids, attention_mask=mask).logits[:1, :12]
    difference = float((together - apart).abs().max())
    print(f"\n{kind}: logits moved by {difference:.2g}")
    assert difference > 0.1  # of logits of some nat
    assert float((model(input_ids=short).logits - apart).abs().max()) == 0


def test_a_pack_built_without_the_threshold_is_refused() -> None:
    model = longrope("Llama 3")
    prepare_packed_forward(model)
    pairs = mixed_pairs()
    with pytest.raises(ModelError, match="of 42 tokens .* changes past 14, in a pack built for No"):
        model(pack=build_pack(pairs, range(len(pairs)), mode="shared"))
    short = tiny_pairs(1, vocab_size=V, prompt_lengths=(4, 4), response_lengths=(5, 5))
    model(pack=build_pack(short, [0], mode="shared"))


def test_a_prompt_of_both_kinds_is_counted_twice() -> None:
    pairs = tiny_pairs(8, prompt_lengths=(9, 9), response_lengths=(2, 12), pairs_per_prompt=4)
    for max_tokens in (45, 60, 90):
        plan = plan_packs(pairs, range(8), max_tokens=max_tokens, rope_threshold=THRESHOLD)
        packs = [build_pack(pairs, ids, mode="shared", rope_threshold=THRESHOLD) for ids in plan]
        assert all(pack.n_tokens <= max_tokens for pack in packs)
        assert sorted(i for ids in plan for i in ids) == list(range(8))
    apart = build_pack(pairs, range(8), mode="shared", rope_threshold=THRESHOLD)
    together = build_pack(pairs, range(8), mode="shared")
    assert apart.n_tokens == together.n_tokens + 2 * 9  # two prompts, each of both kinds


def test_dynamic_is_refused_past_its_bound() -> None:
    model: Any = tiny_llama(rope_parameters=DYNAMIC, max_position_embeddings=48)
    assert prepare_packed_forward(model).max_seqlen == 48
    pairs = tiny_pairs(1, prompt_lengths=(30, 30), response_lengths=(5, 5))
    model(pack=build_pack(pairs, [0], mode="shared"))
    pairs = tiny_pairs(1, prompt_lengths=(30, 30), response_lengths=(20, 20))
    with pytest.raises(ModelError, match="of 49 tokens: past 48.*max_length to 48"):
        model(pack=build_pack(pairs, [0], mode="shared"))
    packer = Packer("shared", 1000, torch.device("cpu"), max_seqlen=48)
    with pytest.raises(DataError, match="row 0 takes 49 tokens; past 48.*max_length to 48"):
        packer.plan(pairs, [0])  # type: ignore[arg-type]
