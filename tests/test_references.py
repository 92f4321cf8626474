"""Every kind of reference: computed never twice, served only where nothing changed, moved right."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from fastdpo import cli, precompute
from fastdpo.adapters import REFERENCE_ADAPTER
from fastdpo.config_files import write_yaml
from fastdpo.data import TokenizedPairs
from fastdpo.errors import ConfigError, MissingPackageError, ModelError
from fastdpo.reference_cache import REFERENCE_FILE, segments
from fastdpo.reference_logps import AdapterReference, ModelReference
from fastdpo.reference_sync import RECOMPRESSION_TOLERANCE, recompress
from tests.test_trainer import LORA, config, losses, weights
from tests.test_trainer import trainer as dpo_trainer
from tests.tiny import CHATML, tiny_chat_rows, tiny_llama, tiny_pairs, tiny_rows, tiny_tokenizer

trainer: Any = dpo_trainer  # what its references are is looked into here

# A prompt is shared by two pairs; five packs of at most 128 tokens.
PACKS = {"max_tokens_per_pack": 128}


@pytest.fixture(autouse=True)
def no_picture(monkeypatch) -> None:
    """Curves are drawn after every run; here that would be most of the time."""
    monkeypatch.setattr("fastdpo.trainer.plot_curves", lambda *args: None)


@pytest.fixture
def forwards(monkeypatch) -> list[int]:
    """The pair ids of every pack that a reference is asked for, one entry a pack."""
    asked: list[int] = []
    for kind in (ModelReference, AdapterReference):
        original = kind.token_logps

        def spy(self, packs, original=original):
            asked.extend(len(pack.pair_ids) for pack in packs)
            return original(self, packs)

        monkeypatch.setattr(kind, "token_logps", spy)
    return asked


def lora(
    model: Any = None, *, std: float = 0.0, seed: int = 0, name: str = "default", **overrides
) -> Any:
    """A tiny Llama (or `model`) with an adapter, trained before if `std` > 0."""
    model = tiny_llama() if model is None else model
    if isinstance(model, PeftModel):
        model.add_adapter(name, LoraConfig(**{**LORA, **overrides}))
    else:
        model = get_peft_model(model, LoraConfig(**{**LORA, **overrides}), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if f".{name}." in key and std:
            parameter.data.normal_(std=std, generator=generator)
    return model


def changed(pairs: TokenizedPairs, i: int) -> TokenizedPairs:
    """The pairs with one more token in the chosen response of pair i."""
    prompts, chosens, rejecteds = (
        [list(part(k)) for k in range(len(pairs))]
        for part in (pairs.prompt, pairs.chosen, pairs.rejected)
    )
    chosens[i].append(7)
    return TokenizedPairs.from_lists(prompts, chosens, rejecteds)


# ---- the cache under a trainer ----------------------------------------------------------------


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


# ---- adapters as references -------------------------------------------------------------------


def test_a_named_adapter_is_the_reference(tmp_path):
    base = tiny_llama()
    alone = lora(copy.deepcopy(base), std=0.1, seed=3, name="sft")
    policy = lora(lora(base, std=0.1, seed=3, name="sft"), std=0.1, seed=4, name="mine")
    policy.set_adapter("mine")
    frozen = [p for n, p in policy.named_parameters() if "lora_A.mine" in n]
    for parameter in frozen:  # the user's own choice, which switching adapters must not undo
        parameter.requires_grad_(False)
    by_model = trainer(tmp_path / "a", model=copy.deepcopy(policy), ref_model=alone, max_steps=3)
    by_name = trainer(tmp_path / "b", model=policy, reference="adapter:sft", max_steps=3)
    before = {n: p.clone() for n, p in policy.named_parameters() if ".sft." in n}
    by_model.train()
    by_name.train()
    assert losses(by_name) == losses(by_model)
    assert abs(losses(by_name)[0] - np.log(2)) > 1e-3
    assert not any(parameter.requires_grad for parameter in frozen)
    assert all(torch.equal(p, before[n]) for n, p in policy.named_parameters() if n in before)


def test_adapters_leave_no_doubt(tmp_path):
    def policy() -> Any:
        made = lora(lora(std=0.1, name="sft"), std=0.1, seed=1, name="mine")
        made.set_adapter("mine")
        return made

    for reference, parts in {
        "auto": ["'mine' was trained before", "'copy'", "'adapters_off'", "'adapter:sft'"],
        "adapter:stf": ["no such adapter", "did you mean 'sft'"],
        "adapter:mine": ["the adapter that is trained", "'copy'"],
    }.items():
        with pytest.raises(ConfigError) as caught:
            trainer(tmp_path, model=policy(), reference=reference)
        assert all(part in str(caught.value) for part in parts), caught.value
    with pytest.raises(ConfigError, match="needs an adapter"):
        trainer(tmp_path, reference="adapter:sft")
    several = policy()
    several.base_model.set_adapter(["sft", "mine"])
    with pytest.raises(ConfigError, match="2 active adapters"):
        trainer(tmp_path, model=several)
    named_ref = lora(lora(std=0.1, name=REFERENCE_ADAPTER), std=0.1, name="mine")
    named_ref.set_adapter("mine")
    assert trainer(tmp_path, model=named_ref).live_reference.adapter == REFERENCE_ADAPTER
    with pytest.raises(ConfigError, match="'ref'.*'adapter:ref'"):
        trainer(tmp_path, model=named_ref, reference="copy")
    with pytest.raises(ModelError, match="bias='all'.*biases of the base"):
        trainer(tmp_path, peft_config=LoraConfig(**LORA, bias="all"))


# ---- TR-DPO -----------------------------------------------------------------------------------

MOVES = {"sync_ref_model": True, "ref_model_sync_steps": 2}


def test_full_weights_follow_as_in_trl(tmp_path):
    """The update is TRL's own, and the losses before the first one are those without."""
    callbacks = pytest.importorskip("trl.trainer.callbacks")
    mine, other = tiny_llama(seed=1), tiny_llama(seed=2)
    made = trainer(tmp_path / "a", model=mine, ref_model=copy.deepcopy(other), max_steps=4, **MOVES)
    history = []
    move = made._move_reference

    def spy():
        step = made.state.global_step
        if step % 2 == 0:
            callbacks.SyncRefModelCallback._sync_target_model(made.model, other, 0.6)
        move()
        own = made.live_reference.model.parameters()
        history.append(all(torch.equal(a, b) for a, b in zip(own, other.parameters(), strict=True)))

    made._move_reference = spy
    made.train()
    assert history == [True] * 4
    still = trainer(tmp_path / "b", model=tiny_llama(seed=1), ref_model=tiny_llama(seed=2))
    still.train()
    assert losses(made)[:2] == losses(still)[:2] and losses(made)[2] != losses(still)[2]


def reference_equals_policy(made, pairs) -> bool:
    (pack,) = made.packer.packs(pairs, np.arange(len(pairs)))
    made.model.eval()
    with torch.no_grad():
        policy = made._forward(made.model, pack)
    (reference,) = made.live_reference.token_logps([pack])
    return torch.equal(policy, reference)


@pytest.mark.parametrize("kind", ["full", "lora", "dora", "modules_to_save"])
def test_a_hard_update_is_exact(tmp_path, kind):
    peft = {
        "full": None,
        "lora": LoraConfig(**LORA),
        "dora": LoraConfig(**LORA, use_dora=True),
        "modules_to_save": LoraConfig(**LORA, modules_to_save=["lm_head"]),
    }[kind]
    made = trainer(tmp_path, peft_config=peft, ref_model_mixup_alpha=1.0, max_steps=3, **MOVES)
    checks = []
    move = made._move_reference

    def spy():
        move()
        checks.append(reference_equals_policy(made, tiny_pairs(2)))
        made.model.train()

    made._move_reference = spy
    made.train()
    assert checks == [False, True, False]


def products(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    return {
        name: module.scaling[adapter]
        * module.lora_B[adapter].weight.double()
        @ module.lora_A[adapter].weight.double()
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def test_a_soft_update_of_lora_averages_products(tmp_path):
    made = trainer(tmp_path, peft_config=LoraConfig(**LORA), max_steps=12, **MOVES)
    expected = {name: torch.zeros_like(p) for name, p in products(made.model, "default").items()}
    move = made._move_reference
    worst = []

    def spy():
        move()
        if made.state.global_step % 2 == 0:
            for name, product in products(made.model, "default").items():
                expected[name] = 0.6 * product.detach() + 0.4 * expected[name]
            for name, own in products(made.model, REFERENCE_ADAPTER).items():
                error = (own - expected[name]).detach().norm()
                worst.append(float(error / expected[name].norm()))

    made._move_reference = spy
    made.train()
    # Each of the updates errs by at most the tolerance, old errors shrink by 0.4: a geometric sum.
    # Beside it fp32's rounding, 1e-6. The second bound: something was recompressed at all.
    assert max(worst) <= RECOMPRESSION_TOLERANCE / 0.6 + 1e-6
    ranks = [m.r[REFERENCE_ADAPTER] for m in made.model.modules() if hasattr(m, "lora_A")]

    assert 4 < max(ranks) < 6 * 4  # fewer than stacked
    made.save_model(tmp_path / "saved")
    assert not (tmp_path / "saved" / REFERENCE_ADAPTER).exists()


def test_recompress():
    generator = torch.Generator().manual_seed(0)

    def factors(rank: int):
        shapes = ((40, rank), (rank, 30))
        return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]

    left, right = factors(5)
    doubled = torch.cat([left, left], 1), torch.cat([right, right])
    new_left, new_right = recompress(*doubled, 1e-6)
    assert new_left.shape == (40, 5) and new_right.shape == (5, 30)
    torch.testing.assert_close(new_left @ new_right, 2 * left @ right, rtol=1e-12, atol=1e-12)
    left, right = factors(60)  # more than either side has
    new_left, new_right = recompress(left, right, 1e-12)
    assert new_left.shape[1] == 30
    torch.testing.assert_close(new_left @ new_right, left @ right, rtol=1e-10, atol=1e-10)
    for tolerance in (0.5, 0.1, 0.01):
        new_left, new_right = recompress(left, right, tolerance)
        error = (new_left @ new_right - left @ right).norm() / (left @ right).norm()
        assert error <= tolerance
    zero_left, zero_right = recompress(torch.zeros(4, 3), torch.randn(3, 5), 1e-4)
    assert zero_left.shape == (4, 1) and not (zero_left @ zero_right).any()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_resumed_run_has_the_moved_reference(tmp_path, kind):
    options = {
        "peft_config": LoraConfig(**LORA) if kind == "lora" else None,
        "save_strategy": "steps",
        "save_steps": 3,  # between two moves
        "max_steps": 6,
        **MOVES,
    }
    whole = trainer(tmp_path, **options)
    whole.train()
    resumed = trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for (name, a), b in zip(
        weights(whole.model).items(), weights(resumed.model).values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert losses(resumed) == losses(whole)


@pytest.mark.parametrize(
    "options, match",
    [
        ({**MOVES, "precompute_ref_log_probs": True}, "'sync_ref_model'.*'precompute_ref_log"),
        ({**MOVES, "ref_cache_dir": "x"}, "'sync_ref_model'.*'ref_cache_dir'"),
        ({**MOVES, "reference": "adapters_off"}, "'sync_ref_model'.*'adapters_off'.*'copy'"),
        ({**MOVES, "reference": "adapter:a"}, "'sync_ref_model'.*'adapter:a'"),
        ({"ref_model_mixup_alpha": 0.5}, "'ref_model_mixup_alpha'.*sync_ref_model"),
        ({"ref_model_sync_steps": 5}, "'ref_model_sync_steps'.*sync_ref_model"),
        ({**MOVES, "ref_model_mixup_alpha": 0}, "'ref_model_mixup_alpha'.*> 0 and <= 1"),
        ({**MOVES, "ref_model_mixup_alpha": 1.5}, "'ref_model_mixup_alpha'.*<= 1"),
        ({"reference": "adaptr:a"}, "'reference'.*adapter:NAME"),
        ({"reference": "adapter:"}, "'reference'.*adapter:NAME"),
        ({"reference": "cpoy"}, "'reference'.*did you mean 'copy'"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_refused_options(tmp_path, options, match):
    with pytest.raises(ConfigError, match=match):
        config(tmp_path, **options)


def test_references_that_cannot_follow(tmp_path):
    soft = {**MOVES, "ref_model_mixup_alpha": 0.5}
    with pytest.raises(ConfigError, match="DoRA.*ref_model_mixup_alpha: 1"):
        trainer(tmp_path, peft_config=LoraConfig(**LORA, use_dora=True), **soft)
    targets = {"target_modules": ["embed_tokens", "q_proj"]}
    with pytest.raises(ConfigError, match="LoRA on embeddings.*embed_tokens"):
        trainer(tmp_path, peft_config=LoraConfig(**{**LORA, **targets}), **soft)
    with pytest.raises(ModelError, match="averages weights.*layers.2"):
        trainer(tmp_path, ref_model=tiny_llama(num_hidden_layers=3), **MOVES)
    with pytest.raises(ConfigError, match="leave ref_model out"):
        trainer(tmp_path, peft_config=LoraConfig(**LORA), ref_model=tiny_llama(), **MOVES)
    with pytest.raises(ConfigError, match="ambiguous"):
        trainer(tmp_path, model=lora(std=0.1), **MOVES)


# ---- from the command line --------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    for name, seed in (("model", 0), ("other", 1)):
        tiny_llama(seed=seed, vocab_size=len(tokenizer)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in tiny_rows(8)))
    options = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "train.jsonl"),
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "max_steps": 1,
        "save_strategy": "no",
    }
    write_yaml(folder / "config.yaml", options)
    return folder


def run(command: str, base: Path, *words: str) -> int:
    return cli.main([command, str(base / "config.yaml"), *words])


def test_precompute_then_train(base, tmp_path, capsys, forwards):
    cache = ("--ref_cache_dir", str(tmp_path / "cache"))
    assert run("precompute", base) == 2
    assert "--ref_cache_dir" in capsys.readouterr().err
    assert run("precompute", base, *cache) == 0
    shown = capsys.readouterr().out
    assert "train: 16 responses, 0 of them found; 1 of 1 packs computed" in shown
    forwards.clear()
    output = ("--output_dir", str(tmp_path / "run"))
    assert run("train", base, *cache, *output, "--beta", "0.4", "--use_peft", "--lora_r", "4") == 0
    assert forwards == []
    assert cli.main(["cache", "info", str(tmp_path / "cache")]) == 0
    shown = capsys.readouterr().out
    assert "1 reference," in shown and "16 responses" in shown and str(base / "model") in shown
    assert "float32, computed in float32" in shown


def test_a_reference_model_by_name(base, tmp_path, capsys, forwards):
    other = ("--ref_model_name_or_path", str(base / "other"))
    output = ("--output_dir", str(tmp_path / "run"), "--logging_steps", "1")
    assert run("train", base, *other, *output) == 0 and len(forwards) == 1
    (first, *_) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    made = trainer(
        tmp_path / "api",
        model=str(base / "model"),
        ref_model=str(base / "other"),
        pairs=tiny_rows(8),
        per_device_train_batch_size=8,
        max_steps=1,
        learning_rate=1e-6,
    )
    made.train()
    assert json.loads(first)["loss"] == pytest.approx(losses(made)[0], abs=1e-6)
    assert abs(losses(made)[0] - np.log(2)) > 1e-3
    assert run("train", base, "--ref_load_in_4bit", "--output_dir", str(tmp_path / "x")) == 2
    assert "'ref_load_in_4bit' needs" in capsys.readouterr().err


def test_a_reference_model_in_4_bits_is_asked_for_as_such(base, monkeypatch):
    """What bitsandbytes is asked to load, also where it is not installed."""
    from fastdpo import ModelConfig, model
    from fastdpo.config import DPOConfig

    args = DPOConfig(output_dir="unused", use_cpu=True)
    named: dict[str, Any] = {
        "model_name_or_path": "m",
        "ref_model_name_or_path": str(base / "other"),
    }
    quantized = ModelConfig(**named, ref_load_in_4bit=True, bnb_4bit_quant_type="fp4")
    try:
        import bitsandbytes  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        with pytest.raises(MissingPackageError, match="qlora"):
            model.load_ref_model(quantized, args)
        monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", object())
    asked = {}
    monkeypatch.setattr(model, "load_pretrained", lambda name, device, **kw: asked.update(kw))
    model.load_ref_model(quantized, args)
    assert asked["quantization_config"].load_in_4bit
    assert asked["quantization_config"].bnb_4bit_quant_type == "fp4"
    asked.clear()
    model.load_ref_model(ModelConfig(**named, use_peft=True, load_in_4bit=True), args)
    assert "quantization_config" not in asked  # the policy's quantization is not the reference's


def test_four_bits(tmp_path):
    """A 4-bit reference model; and QLoRA, whose adapters-off reference is served from the cache:
    the first-step check compares it with a policy that no reference forward came before."""
    pytest.importorskip("bitsandbytes", reason="the qlora extra")
    from fastdpo import ModelConfig, model
    from fastdpo.config import DPOConfig

    wide: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    tiny_llama(**wide).save_pretrained(tmp_path / "model")
    args = DPOConfig(output_dir="unused", use_cpu=True)
    name = str(tmp_path / "model")
    pairs = tiny_pairs(8)
    own = model.load_ref_model(
        ModelConfig(model_name_or_path=name, ref_model_name_or_path=name, ref_load_in_4bit=True),
        args,
    )
    made = trainer(tmp_path / "a", model=name, ref_model=own, pairs=pairs, max_steps=1)
    made.train()
    assert 1e-3 < abs(losses(made)[0] - np.log(2)) < 1  # 4 bits, and no other model

    gradients = []
    for run_name, found in (("b", 0), ("c", 16)):
        made = trainer(
            tmp_path / run_name,
            model=model.load_model(
                ModelConfig(model_name_or_path=name, use_peft=True, load_in_4bit=True), args
            ),
            peft_config=LoraConfig(**LORA),
            pairs=pairs,
            ref_cache_dir=str(tmp_path / "cache"),
            max_steps=1,
        )
        assert made.precomputations["train"].n_found == found
        made.train()
        gradients.append(made.state.log_history[0]["grad_norm"])
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-5) and gradients[0] > 0
