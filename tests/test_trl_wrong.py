"""Where TRL 1.16 is wrong, shown by running it, and ours held to the mathematics instead: its
precomputed reference's key leaves out what the values depend on; its truncation can take the
prompt away. (Its ignored label_smoothing: test_losses_trl.py; WPO with sft: test_losses_random.py.)
"""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.errors import ConfigError
from tests.tiny import tiny_llama, tiny_rows, tiny_tokenizer

trl = pytest.importorskip("trl", minversion="1.16", reason="the peer to compare with")
datasets = pytest.importorskip("datasets")

N = 4
# The chosen responses are the longer ones, whose ends LD-DPO weighs.
ROWS = [
    {"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]}
    for row in tiny_rows(N)
]
# fp32 log-probs, sums of up to 160 nat in another order.
ATOL = 8 * 160 * torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def no_picture(monkeypatch) -> None:
    monkeypatch.setattr("fastdpo.trainer.plot_curves", lambda *args: None)


@functools.cache
def model() -> Any:
    return tiny_llama()


def on_disk(folder: Path) -> Any:
    """A dataset of files, as users have: its computed columns are cached beside it."""
    path = folder / "rows.jsonl"
    if not path.exists():  # its time is part of the dataset's fingerprint
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(folder / "hub")
    )


def arguments(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        **{"output_dir": str(folder / "run"), "use_cpu": True, "bf16": False, "report_to": "none"},
        **{"gradient_checkpointing": False, "disable_tqdm": True, "save_strategy": "no"},
        **options,
    }


def their_trainer(folder: Path, **options: Any) -> Any:
    args = trl.DPOConfig(**arguments(folder, precompute_ref_log_probs=True, **options))
    return trl.DPOTrainer(
        model=tiny_llama(),
        args=args,
        train_dataset=on_disk(folder),
        processing_class=tiny_tokenizer(),
    )


def weighted_log_prob(prompt: list[int], response: list[int], n_full: int, alpha: float) -> float:
    """By the definition: the first `n_full` tokens of the response in full, the others by alpha."""
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        log_p = model()(ids).logits[0, :-1].log_softmax(-1)
    tokens = log_p.gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
    return float(tokens[:n_full].sum() + alpha * tokens[n_full:].sum())


def our_reference(folder: Path, alpha: float | None, max_length: int | None) -> list[float]:
    """Weighted reference log-probs of the chosen responses, as our step uses them."""
    made = DPOTrainer(
        model=tiny_llama(),
        args=DPOConfig(
            **arguments(folder, max_length=max_length, ref_cache_dir=str(folder / "cache")),
            per_device_train_batch_size=N,
            ld_alpha=alpha,
        ),
        train_dataset=on_disk(folder),
        processing_class=tiny_tokenizer(),
    )
    assert made.train_pairs is not None
    (pack,) = made.packer.packs(made.train_pairs, torch.arange(N).numpy())
    (reference,) = made.train_reference.token_logps([pack])
    assert reference is not None
    scored, _ = made._score(pack, reference)
    sums = made.objective._sums(scored)
    assert sums.reference is not None
    parts = sums.reference[:, 0]  # chosen; [P, K]
    return (parts[:, 0] + (alpha or 0.0) * parts[:, 1:].sum(1)).tolist()


def expected(folder: Path, alpha: float, max_length: int | None) -> list[float]:
    trainer = their_trainer(folder / "rows", max_length=None)  # tokenized, uncut
    found = []
    for row in trainer.train_dataset:
        prompt = row["prompt_ids"]
        room = None if max_length is None else max_length - len(prompt)
        chosen, rejected = row["chosen_ids"][:room], row["rejected_ids"][:room]
        n_full = min(len(chosen), len(rejected))
        found.append(weighted_log_prob(prompt, chosen, n_full, alpha))
    return found


def test_trls_cache_serves_stale_values_where_ours_does_not(tmp_path):
    """TRL's key is the dataset's fingerprint and the model's hash; what it stores are sums under
    ld_alpha and max_length. Ours stores tokens, and finds them by what they are behind."""
    for folder in ("trl", "rows", "ours"):
        (tmp_path / folder).mkdir()
    (tmp_path / "rows" / "rows").mkdir()
    theirs = {
        name: torch.tensor(
            their_trainer(tmp_path / "trl", **options).train_dataset["ref_chosen_logps"]
        )
        for name, options in {
            "plain": {"max_length": None},
            "ld": {"max_length": None, "ld_alpha": 0.0},
            "cut": {"max_length": 22, "truncation_mode": "keep_end"},
        }.items()
    }
    assert torch.equal(theirs["plain"], theirs["ld"])  # stale: those of another ld_alpha
    assert torch.equal(theirs["plain"], theirs["cut"])  # stale: those of whole texts
    for alpha, max_length in ((None, None), (0.0, None), (0.4, None), (0.4, 40)):
        right = expected(tmp_path / "rows", 1.0 if alpha is None else alpha, max_length)
        found = our_reference(tmp_path / "ours", alpha, max_length)
        assert found == pytest.approx(right, abs=ATOL), (alpha, max_length)
    plain = expected(tmp_path / "rows", 1.0, None)
    assert theirs["plain"].tolist() == pytest.approx(plain, abs=ATOL)  # right the first time
    assert expected(tmp_path / "rows", 0.0, None) != pytest.approx(plain, abs=1.0)


def test_trl_takes_prompts_away_where_ours_keeps_them(tmp_path):
    """truncation_mode keep_end cuts from the prompt, down to nothing: what is then scored is no
    response to it. Ours cuts responses alone, and refuses the mode by name."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    (tmp_path / "rows").mkdir()
    (row, *_) = their_trainer(tmp_path / "rows", max_length=None).train_dataset
    prompt, chosen = row["prompt_ids"], row["chosen_ids"]
    limit = len(chosen)
    collate = DataCollatorForPreference(0, max_length=limit, truncation_mode="keep_end")
    batch = collate([{k: row[k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")}])
    assert batch["completion_mask"][0].all()  # no prompt left, and no row for the first token
    with torch.no_grad():
        log_p = model()(batch["input_ids"][:1]).logits[0, :-1].log_softmax(-1)
    without = float(log_p.gather(1, batch["input_ids"][0, 1:, None]).sum())
    right = weighted_log_prob(prompt, chosen, len(chosen), 1.0)
    assert abs(without - right) > 1.0
    with pytest.raises(ConfigError, match="'truncation_mode'.*keep_start.*'keep_end'"):
        DPOConfig(**arguments(tmp_path, truncation_mode="keep_end"))
