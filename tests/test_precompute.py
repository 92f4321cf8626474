"""References computed before training: never twice, and served only where nothing changed."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig

from fastdpo import precompute
from fastdpo.data import TokenizedPairs
from fastdpo.errors import ModelError
from fastdpo.reference_cache import REFERENCE_FILE, segments
from fastdpo.reference_logps import ModelReference
from tests.tiny import CHATML, tiny_chat_rows, tiny_llama, tiny_pairs, tiny_rows, tiny_tokenizer
from tests.tiny_trainer import LORA, lora, losses
from tests.tiny_trainer import trainer as dpo_trainer

trainer: Any = dpo_trainer  # what its references are is looked into here

pytestmark = pytest.mark.usefixtures("no_picture")


# A prompt is shared by two pairs; five packs of at most 128 tokens.
PACKS = {"max_tokens_per_pack": 128}


def changed(pairs: TokenizedPairs, i: int) -> TokenizedPairs:
    """The pairs with one more token in the chosen response of pair i."""
    prompts, chosens, rejecteds = (
        [list(part(k)) for k in range(len(pairs))]
        for part in (pairs.prompt, pairs.chosen, pairs.rejected)
    )
    chosens[i].append(7)
    return TokenizedPairs.from_lists(prompts, chosens, rejecteds)


def test_a_sweep_computes_the_reference_once(tmp_path, forwards):
    pairs = tiny_pairs(12, pairs_per_prompt=2)
    cache = {"ref_cache_dir": str(tmp_path / "cache"), **PACKS}
    plain = trainer(tmp_path / "plain", pairs=pairs, precompute_ref_log_probs=True, **PACKS)
    plain.train()
    n_packs = len(forwards)
    assert n_packs > 2
    forwards.clear()
    first = trainer(tmp_path / "first", pairs=pairs, **cache)
    first.train()
    assert len(forwards) == n_packs and losses(first) == losses(plain)
    forwards.clear()
    again = trainer(tmp_path / "again", pairs=pairs, **cache)
    again.train()
    assert losses(again) == losses(first)  # bit for bit
    for options in (
        {"beta": 0.3, "learning_rate": 1e-5, "seed": 7},
        {"loss_type": "ipo", "optim": "sgd"},
        {"loss_type": "hinge", "max_tokens_per_pack": 4096},
        {"ld_alpha": 0.5},
        {"peft_config": LoraConfig(**LORA)},  # adapters off are the same weights
        {"peft_config": LoraConfig(**{**LORA, "r": 2, "modules_to_save": ["lm_head"]})},
        {"ref_model": tiny_llama()},
        {"eval_dataset": pairs.select([3, 1])},
    ):
        made = trainer(tmp_path / "swept", pairs=pairs, **{**cache, **options})
        assert made.precomputations["train"].n_found == len(made.train_reference)
    assert forwards == []


def test_what_changes_the_reference_misses(tmp_path, forwards):
    pairs = tiny_pairs(4)
    cache = str(tmp_path / "cache")

    def found(model=None, **options) -> int:
        made = trainer(tmp_path / "run", model=model, pairs=pairs, ref_cache_dir=cache, **options)
        return made.precomputations["train"].n_found

    assert found() == 0 and found() == 8
    nudged: Any = tiny_llama()
    with torch.no_grad():
        nudged.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-6
    assert found(nudged) == 0
    theta = tiny_llama()
    theta.config.rope_parameters = {"rope_type": "default", "rope_theta": 5000.0}
    assert found(type(theta)(theta.config)) == 0
    assert found(bf16=True) == 0
    assert found(packing_mode="unshared") == 0
    assert found(lora(std=0.1), reference="copy") == 0
    assert found(lora(std=0.1), reference="copy") == 8
    assert found(lora(std=0.1, seed=1), reference="copy") == 0
    assert found(lora(std=0.1, lora_alpha=16), reference="copy") == 0
    assert found(lora(std=0.1), reference="adapters_off") == 8  # the first run's weights


def test_changed_ids_miss_and_nothing_else(tmp_path, forwards):
    pairs = tiny_pairs(12)
    cache = {"ref_cache_dir": str(tmp_path / "cache"), **PACKS}
    before = trainer(tmp_path / "a", pairs=pairs, **cache).train_reference
    forwards.clear()
    made = trainer(tmp_path / "b", pairs=changed(pairs, 5), **cache)
    done = made.precomputations["train"]
    assert (done.n_responses, done.n_found, done.n_computed) == (24, 23, 1) and len(forwards) == 1
    for i in range(24):
        if i != 10:  # pair 5's chosen response
            a, b = before.of_response(i), made.train_reference.of_response(i)
            assert np.array_equal(a, b), i


def test_truncation_and_template_miss_where_they_bite(tmp_path, forwards):
    tokenizer, rows = tiny_tokenizer(), tiny_rows(12)
    seen: set[tuple[bytes, bytes]] = set()
    for options in ({"max_length": 64}, {"max_length": 30}, {"max_length": 63}, {"text": "! "}):
        text = options.pop("text", "")
        forwards.clear()
        made = trainer(
            tmp_path / "run",
            model=tiny_llama(vocab_size=len(tokenizer)),
            pairs=[{**row, "prompt": text + row["prompt"]} for row in rows],
            processing_class=tokenizer,
            ref_cache_dir=str(tmp_path / "cache"),
            **options,
        )
        pairs = made.train_pairs
        texts = {
            (pairs.prompt(i).tobytes(), side(i).tobytes())
            for i in range(len(pairs))
            for side in (pairs.chosen, pairs.rejected)
        }
        done = made.precomputations["train"]
        assert (done.n_responses, done.n_found) == (len(texts), len(texts & seen)), options
        assert len(forwards) == (done.n_found < done.n_responses), options  # one pack holds all
        assert not options or options["max_length"] != 30 or 0 < done.n_found < done.n_responses
        seen |= texts


def test_a_chat_template_misses_where_it_writes_other_ids(tmp_path, forwards):
    """Another way of writing earlier turns: conversations of one turn are found as they were."""
    rows = tiny_chat_rows(24, pairs_per_prompt=1)
    tokenizer = tiny_tokenizer(chat=True)
    tokenizers = {"before": tokenizer, "after": copy.deepcopy(tokenizer)}
    earlier = "{% if message['role'] == 'assistant' and not loop.last %}so {% endif %}"
    role = "{{ message['role'] }}"
    tokenizers["after"].chat_template = CHATML.replace(role, earlier + role)
    made = {}
    for name, processing_class in tokenizers.items():
        forwards.clear()
        made[name] = trainer(
            tmp_path / name,
            model=tiny_llama(vocab_size=len(tokenizer)),
            pairs=rows,
            processing_class=processing_class,
            ref_cache_dir=str(tmp_path / "cache"),
            **PACKS,
        )
    before, after = (of.train_pairs for of in made.values())
    other = {i for i in range(24) if before.prompt(i).tolist() != after.prompt(i).tolist()}
    assert other == {i for i, row in enumerate(rows) if len(row["prompt"]) > 1} and other
    done = made["after"].precomputations["train"]
    assert (done.n_responses, done.n_found) == (48, 48 - 2 * len(other))
    plan = made["after"].packer.plan(after, np.arange(24))
    packs = [pair_ids for pair_ids in plan if other & set(pair_ids)]
    assert len(forwards) == done.n_computed == len(packs) < len(plan)
    right = trainer(
        tmp_path / "fresh",
        model=tiny_llama(vocab_size=len(tokenizer)),
        pairs=after,
        precompute_ref_log_probs=True,
        **PACKS,
    )
    # What was found was computed in other packs: fp32 token log-probs of size 10.
    assert np.abs(made["after"].train_reference.logps - right.train_reference.logps).max() < 1e-5


def test_an_interrupted_precomputation_ends_with_the_same_bits(
    tmp_path, monkeypatch, forwards, caplog
):
    pairs = tiny_pairs(24, pairs_per_prompt=2)
    whole = trainer(tmp_path / "a", pairs=pairs, ref_cache_dir=str(tmp_path / "whole"), **PACKS)
    n_packs = len(forwards)
    assert n_packs >= 4
    forwards.clear()
    options = {"pairs": pairs, "ref_cache_dir": str(tmp_path / "cut"), **PACKS}
    compute = precompute._compute

    def interrupted(*args):
        if len(forwards) == 2:
            raise KeyboardInterrupt
        compute(*args)

    monkeypatch.setattr(precompute, "_compute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "b", **options)
    monkeypatch.setattr(precompute, "_compute", compute)
    forwards.clear()
    resumed = trainer(tmp_path / "c", **options)
    assert len(forwards) == n_packs - 2
    assert np.array_equal(resumed.train_reference.logps, whole.train_reference.logps)

    # A damaged description: served all the same, mended and reported.
    folder = resumed.reference_cache.folder
    (folder / REFERENCE_FILE).write_text("{")
    with caplog.at_level("WARNING", logger="fastdpo"):
        assert trainer(tmp_path / "e", **options).precomputations["train"].n_computed == 0
    assert any(f"{REFERENCE_FILE} was damaged, and is mended" in m for m in caplog.messages)

    # Damage anywhere, and a torn end: found, reported, computed again, to the same bits.
    rng = np.random.default_rng(0)
    for _ in range(3):
        for segment in segments(folder):
            data = bytearray(segment.read_bytes())
            data[rng.integers(len(data))] ^= 0x10
            segment.write_bytes(data[: len(data) - int(rng.integers(0, 3))])
        caplog.clear()
        with caplog.at_level("WARNING", logger="fastdpo"):
            mended = trainer(tmp_path / "d", **options)
        said = [r.getMessage() for r in caplog.records if str(folder) in r.getMessage()]
        assert said and all("damaged" in line or "incomplete" in line for line in said), said
        assert mended.precomputations["train"].n_computed > 0
        assert np.array_equal(mended.train_reference.logps, whole.train_reference.logps)


def test_ranks_share_the_packs(tmp_path, monkeypatch, forwards):
    """Two ranks, one after the other: each computes half, and their sum is the whole."""
    pairs = tiny_pairs(24, pairs_per_prompt=2)
    alone = trainer(tmp_path / "a", pairs=pairs, precompute_ref_log_probs=True, **PACKS)
    n_packs = len(forwards)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(precompute, "rank_of_ranks", lambda rank=rank: (rank, 2))
        forwards.clear()
        made = trainer(tmp_path / "b", pairs=pairs, ref_cache_dir=str(tmp_path / "c"), **PACKS)
        parts.append(made.train_reference.logps)
        assert len(forwards) == (n_packs + 1 - rank) // 2
    assert np.array_equal(parts[0] + parts[1], alone.train_reference.logps)
    assert not np.any((parts[0] != 0) & (parts[1] != 0))


def test_what_is_not_finite_is_neither_kept_nor_served(tmp_path, monkeypatch):
    answer = ModelReference.token_logps

    def broken(self, packs):
        return [logps.index_fill(0, torch.tensor([3]), np.nan) for logps in answer(self, packs)]

    monkeypatch.setattr(ModelReference, "token_logps", broken)
    for already in (0, 7):  # of 8 responses
        made = trainer(
            tmp_path,
            pairs=tiny_pairs(4),
            ref_cache_dir=str(tmp_path / "cache"),
            overwrite_output_dir=True,
        )
        assert made.precomputations["train"].n_found == already
        with pytest.raises(ModelError, match="no finite log-prob"):
            made.train()


def test_evaluation_sets_use_the_cache_too(tmp_path, forwards):
    options = {"ref_cache_dir": str(tmp_path / "cache"), "peft_config": LoraConfig(**LORA)}
    sets = {"a": tiny_pairs(3, seed=1), "b": tiny_pairs(3, seed=2)}
    made = trainer(tmp_path / "a", pairs=tiny_pairs(4), eval_dataset=sets, **options)
    assert len(forwards) == 3
    expected = made.evaluate()["eval_b_loss"]
    assert made.evaluate(tiny_pairs(3, seed=3)) and len(forwards) == 4  # adapters off stay at hand
    forwards.clear()
    again = trainer(tmp_path / "b", pairs=tiny_pairs(4), eval_dataset=sets, **options)
    assert again.evaluate()["eval_b_loss"] == expected
    again.evaluate(tiny_pairs(3, seed=3))
    assert forwards == []
