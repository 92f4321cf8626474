"""Packs: which pairs share one, and that the layout is what attention is promised."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdpo.batch import Pack
from fastdpo.data import TokenizedPairs
from fastdpo.errors import ConfigError, DataError
from fastdpo.packing import build_pack, plan_packs
from fastdpo.rows import RowGather, gather_rows
from fastdpo.steps import step_pair_ids

from .tiny import tiny_pairs

# ---- the layout ------------------------------------------------------------------------------


def test_a_small_pack_by_hand() -> None:
    pairs = TokenizedPairs.from_lists(
        prompts=[[10, 11], [10, 11]],
        chosens=[[20, 21, 22], [20, 21, 22]],
        rejecteds=[[30], [40, 41]],
    )
    pack = build_pack(pairs, [0, 1], mode="shared")
    # The prompt, then response 0, 1 (one token: nothing to lay down), 2, without last tokens.
    assert pack.input_ids.tolist() == [10, 11, 20, 21, 40]
    assert pack.position_ids is not None and pack.layout is not None
    assert pack.position_ids.tolist() == [0, 1, 2, 3, 2]
    assert pack.layout.segments == ((0, 4, 0, 4), (4, 5, 4, 7))
    assert pack.layout.kv_index.tolist() == [0, 1, 2, 3, 0, 1, 4]
    assert pack.layout.cu_seqlens_q.tolist() == [0, 4, 5]
    assert pack.layout.cu_seqlens_k.tolist() == [0, 4, 7]
    assert pack.layout.cu_seqlens_k.dtype == torch.int32
    assert (pack.layout.max_seqlen_q, pack.layout.max_seqlen_k, pack.max_seqlen) == (4, 4, 4)
    # The prompt's last row predicts the first token of every response.
    assert pack.predict_index.tolist() == [1, 2, 3, 1, 1, 4]
    assert pack.targets.tolist() == [20, 21, 22, 30, 40, 41]
    assert pack.cu_responses.tolist() == [0, 3, 4, 6]
    assert pack.pairs.tolist() == [[0, 1], [0, 2]]
    assert pack.responses == ((0, 0), (0, 1), (1, 1))
    assert pack.n_tokens == 5
    assert pack.n_tokens_unshared == 4 + 2 + 4 + 3
    assert pack.n_tokens_padded == 4 * 5


def test_unshared_and_padded_lay_out_every_response_with_its_prompt() -> None:
    pairs = TokenizedPairs.from_lists([[10, 11]], [[20, 21, 22]], [[30]])
    pack = build_pack(pairs, [0], mode="unshared")
    assert pack.input_ids.tolist() == [10, 11, 20, 21, 10, 11]
    assert pack.layout is not None and pack.layout.kv.is_identity
    assert pack.layout.segments == ((0, 4, 0, 4), (4, 6, 4, 6))
    assert pack.predict_index.tolist() == [1, 2, 3, 5]

    pack = build_pack(pairs, [0], mode="padded")
    assert pack.input_ids.tolist() == [[10, 11, 20, 21], [10, 11, 0, 0]]
    assert pack.attention_mask is not None
    assert pack.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert pack.predict_index.tolist() == [1, 2, 3, 5]
    assert pack.n_tokens == 8


def test_an_empty_prompt_leaves_the_first_token_unscored() -> None:
    pairs = TokenizedPairs.from_lists([[]], [[20, 21, 22]], [[30]])
    for mode in ("shared", "unshared"):
        pack = build_pack(pairs, [0], mode=mode)
        assert pack.input_ids.tolist() == [20, 21]
        assert pack.targets.tolist() == [21, 22]
        assert pack.predict_index.tolist() == [0, 1]
        assert pack.cu_responses.tolist() == [0, 2, 2]


@pytest.mark.parametrize("mode", ["shared", "unshared", "padded"])
def test_nothing_to_score_still_makes_a_pack(mode: str) -> None:
    pack = build_pack(TokenizedPairs.from_lists([[]], [[20]], [[30]]), [0], mode=mode)
    assert (pack.n_tokens, len(pack.targets)) == (1, 0)
    assert pack.cu_responses.tolist() == [0, 0, 0]


def test_an_empty_response_scores_nothing() -> None:
    pairs = TokenizedPairs.from_lists([[10, 11]], [[20, 21]], [[]])
    for mode in ("shared", "unshared", "padded"):
        pack = build_pack(pairs, [0], mode=mode)
        assert pack.cu_responses.tolist() == [0, 2, 2]
        assert pack.targets.tolist() == [20, 21]


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(ConfigError, match="'sharde'.*did you mean 'shared'"):
        build_pack(tiny_pairs(1), [0], mode="sharde")


token_lists = st.lists(st.integers(0, 3), max_size=4)  # few tokens, so that prompts coincide
some_pairs = st.lists(st.tuples(token_lists, token_lists, token_lists), min_size=1, max_size=8)


def contexts(pack: Pack) -> list[tuple[list[int], int]]:
    """For every scored token what its row attends to, read off the layout alone, and the target."""
    if pack.layout is None:
        assert pack.attention_mask is not None
        rows = pack.input_ids.flatten().tolist()
        width = pack.input_ids.shape[1]
        assert pack.attention_mask.flatten()[pack.predict_index].all()
        seen = [rows[i // width * width : i + 1] for i in range(len(rows))]
    else:
        assert pack.position_ids is not None
        ids, positions = pack.input_ids.tolist(), pack.position_ids.tolist()
        keys = [ids[j] for j in pack.layout.kv_index.tolist()]
        key_positions = [positions[j] for j in pack.layout.kv_index.tolist()]
        seen = [[] for _ in ids]
        for q_start, q_end, k_start, k_end in pack.layout.segments:
            for row in range(q_start, q_end):
                end = k_end - (q_end - 1 - row)  # bottom-right
                seen[row] = keys[k_start:end]
                assert key_positions[k_start:end] == list(range(len(seen[row])))
                assert positions[row] == len(seen[row]) - 1
    index = pack.predict_index.tolist()
    return [(seen[i], target) for i, target in zip(index, pack.targets.tolist(), strict=True)]


@settings(max_examples=60, deadline=None)
@given(some_pairs, st.sampled_from(["shared", "unshared", "padded"]))
def test_every_scored_token_sees_its_prompt_and_response(rows: list, mode: str) -> None:
    pairs = TokenizedPairs.from_lists(*(list(column) for column in zip(*rows, strict=True)))
    pack = build_pack(pairs, range(len(pairs)), mode=mode)
    found, bounds = contexts(pack), pack.cu_responses.tolist()
    for i, responses in enumerate(pack.pairs.tolist()):
        prompt = pairs.prompt(i).tolist()
        for r, response in zip(responses, (pairs.chosen(i), pairs.rejected(i)), strict=True):
            sequence = [*prompt, *response.tolist()]
            start = max(len(prompt), 1)
            expected = [(sequence[:k], sequence[k]) for k in range(start, len(sequence))]
            assert found[bounds[r] : bounds[r + 1]] == expected
    for r, (i, side) in enumerate(pack.responses):
        assert pack.pairs[i, side] == r


@settings(max_examples=60, deadline=None)
@given(some_pairs, st.integers(12, 40), st.sampled_from(["shared", "unshared", "padded"]))
def test_plans_hold_every_pair_once_within_bounds(rows: list, max_tokens: int, mode: str) -> None:
    pairs = TokenizedPairs.from_lists(*(list(column) for column in zip(*rows, strict=True)))
    kwargs = {"share_prompts": mode == "shared", "padded": mode == "padded"}
    try:
        plan = plan_packs(pairs, range(len(pairs)), max_tokens=max_tokens, **kwargs)
    except DataError:
        alone = [build_pack(pairs, [i], mode=mode).n_tokens for i in range(len(pairs))]
        assert max(alone) > max_tokens
        return
    assert sorted(i for pack in plan for i in pack) == list(range(len(pairs)))
    assert all(build_pack(pairs, ids, mode=mode).n_tokens <= max_tokens for ids in plan)
    assert plan == plan_packs(pairs, range(len(pairs)), max_tokens=max_tokens, **kwargs)


# ---- the plan --------------------------------------------------------------------------------


def test_best_fit_decreasing_fills_packs() -> None:
    # Costs 6, 5, 5, 4 into packs of 10: two, where taking them in order would need three.
    pairs = TokenizedPairs.from_lists(
        [[1] * 3, [2] * 2, [3] * 4, [4] * 2], [[7, 8]] * 4, [[9] * 3, [9] * 3, [9], [9] * 2]
    )
    assert [build_pack(pairs, [i], mode="shared").n_tokens for i in range(4)] == [6, 5, 5, 4]
    assert plan_packs(pairs, [1, 0, 2, 3], max_tokens=10) == [[0, 3], [1, 2]]


def test_a_prompt_is_shared_across_a_step() -> None:
    pairs = tiny_pairs(6, pairs_per_prompt=3, prompt_lengths=(20, 20))
    (plan,) = plan_packs(pairs, [0, 3, 1, 4, 2, 5], max_tokens=10_000)
    assert plan == [0, 3, 1, 4, 2, 5]
    pack = build_pack(pairs, plan, mode="shared")
    responses = int(np.maximum(pairs.lengths[:, 1:] - 1, 0).sum())
    assert pack.n_tokens == 2 * 20 + responses
    assert pack.n_tokens_unshared == 12 * 20 + responses


def test_a_prompt_group_larger_than_a_pack_is_split() -> None:
    pairs = tiny_pairs(6, pairs_per_prompt=6, prompt_lengths=(20, 20), response_lengths=(10, 10))
    plan = plan_packs(pairs, range(6), max_tokens=60)  # 20 + 18 a pair: two pairs a pack
    assert [len(ids) for ids in plan] == [2, 2, 2]


@pytest.mark.parametrize("mode", ["shared", "unshared", "padded"])
def test_a_pair_that_fits_no_pack_is_named_by_its_row(mode: str) -> None:
    pairs = TokenizedPairs.from_lists(
        [[1] * 3, [2] * 20], [[5] * 4, [5] * 30], [[6] * 4, [6] * 40], rows=[4, 17]
    )
    kwargs = {"share_prompts": mode == "shared", "padded": mode == "padded"}
    takes = {"shared": 20 + 29 + 39, "unshared": 49 + 59, "padded": 2 * 59}[mode]
    with pytest.raises(DataError, match=f"row 17: .* {takes} tokens .* is 64; raise max_tokens"):
        plan_packs(pairs, [0, 1], max_tokens=64, **kwargs)


# ---- steps -----------------------------------------------------------------------------------


def test_steps_hold_every_pair_once_and_depend_on_seed_and_epoch() -> None:
    pairs = tiny_pairs(22)
    steps = step_pair_ids(pairs, epoch=0, pairs_per_step=4, seed=0)
    assert [len(s) for s in steps] == [4, 4, 4, 4, 4, 2]
    assert sorted(np.concatenate(steps).tolist()) == list(range(22))
    again = step_pair_ids(pairs, epoch=0, pairs_per_step=4, seed=0)
    other = step_pair_ids(pairs, epoch=1, pairs_per_step=4, seed=0)
    assert all(np.array_equal(a, b) for a, b in zip(steps, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(steps, other, strict=True))


def test_sequential_steps_keep_the_order() -> None:
    steps = step_pair_ids(tiny_pairs(5), pairs_per_step=2, epoch=3, seed=9, sampling="sequential")
    assert [s.tolist() for s in steps] == [[0, 1], [2, 3], [4]]


def test_sequential_groups_come_where_their_prompt_occurs_first() -> None:
    a, b, c = [1], [2], [3]
    pairs = TokenizedPairs.from_lists([a, b, a, c, b], [[5]] * 5, [[6]] * 5)
    steps = step_pair_ids(
        pairs, pairs_per_step=2, epoch=0, seed=0, sampling="sequential", group_by_prompt=True
    )
    assert [s.tolist() for s in steps] == [[0, 2], [1, 4], [3]]


@pytest.mark.parametrize("seed", range(4))
def test_groups_stay_in_one_step_where_they_fit(seed: int) -> None:
    pairs = tiny_pairs(50, pairs_per_prompt=3)  # 17 prompts: groups of 3, the last of 2
    steps = step_pair_ids(pairs, pairs_per_step=7, epoch=0, seed=seed, group_by_prompt=True)
    assert [len(s) for s in steps] == [7] * 7 + [1]
    assert sorted(np.concatenate(steps).tolist()) == list(range(50))
    # Each step of 7 takes two whole groups, 14 in all; the other 8 pairs fill what is left.
    assert sum(len({i // 3 for i in s.tolist()}) for s in steps) == 14 + 8


def test_a_group_larger_than_a_step_is_divided() -> None:
    pairs = tiny_pairs(10, pairs_per_prompt=10)
    steps = step_pair_ids(pairs, pairs_per_step=4, epoch=0, seed=0, group_by_prompt=True)
    assert [len(s) for s in steps] == [4, 4, 2]
    assert sorted(np.concatenate(steps).tolist()) == list(range(10))


def test_an_unknown_sampling_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'sequential'"):
        step_pair_ids(tiny_pairs(2), pairs_per_step=1, epoch=0, seed=0, sampling="sequental")


# ---- gathering rows --------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=12))
def test_gather_rows_and_its_gradient(index: list[int]) -> None:
    source = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    gather = RowGather.plan(np.array(index, dtype=np.int64), 6)
    gathered = gather_rows(source, gather)
    assert torch.equal(gathered, source[index])
    weights = torch.randn(gathered.shape, dtype=torch.float64)
    gathered.backward(weights)
    expected = torch.zeros_like(source)
    for row, weight in zip(index, weights, strict=True):  # in order, as promised: bit for bit
        expected[row] += weight
    assert source.grad is not None
    assert torch.equal(source.grad, expected)


def test_long_16_bit_sums_are_kept_in_fp32() -> None:
    source = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    gathered = gather_rows(source, RowGather.plan(np.zeros(400, np.int64), 1))
    gathered.backward(torch.ones(400, 1, dtype=torch.bfloat16))
    assert source.grad is not None
    assert source.grad.item() == 400  # bf16 alone stops at 256


def test_packs_move_whole() -> None:
    pack = build_pack(tiny_pairs(3, pairs_per_prompt=3), [0, 1, 2], mode="shared")
    assert pack.layout is not None
    pack.layout.masks[None] = []
    moved = pack.to("meta")
    assert moved.layout is not None and moved.layout.masks == {}  # made anew on that device
    tensors = [moved.input_ids, moved.targets, moved.layout.kv.first, moved.layout.cu_seqlens_k]
    tensors += [t for repeat in moved.layout.kv.repeats for t in repeat]
    assert {t.device.type for t in tensors} == {"meta"}
    assert moved.responses == pack.responses


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_packs_cross_to_a_gpu_without_waiting() -> None:
    pack = build_pack(tiny_pairs(3, pairs_per_prompt=3), [0, 1, 2], mode="shared")
    moved = pack.pin_memory().to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    assert moved.input_ids.cpu().tolist() == pack.input_ids.tolist()
