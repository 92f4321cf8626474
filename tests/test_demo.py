"""The demo: its assets are what the script makes, and its run does what it tells."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

from fastdpo import demo
from fastdpo.cli import main
from fastdpo.errors import CheckpointError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(
        "make_demo_assets", ROOT / "scripts" / "make_demo_assets.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def result(tmp_path_factory, cache):
    """The demo as the user runs it, but for the progress bar."""
    return demo.run_demo(tmp_path_factory.mktemp("demo") / "run", disable_tqdm=True)


def rows(split):
    text = (demo.ASSETS / "data" / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_shipped_pairs_are_what_the_script_makes(script, tmp_path):
    script.make_data(tmp_path)
    for split in ("train", "test"):
        made = (tmp_path / "data" / f"{split}.jsonl").read_bytes()
        assert made == (demo.ASSETS / "data" / f"{split}.jsonl").read_bytes()


def test_the_pairs_can_be_learnt_only_by_manners():
    train, test = rows("train"), rows("test")
    assert 600 <= len(train) <= 1000 and len(test) >= 100
    asked = {split: {r["prompt"][-1]["content"] for r in part} for split, part in
             (("train", train), ("test", test))}  # fmt: skip
    assert not asked["train"] & asked["test"]  # whatever came earlier in the conversation
    per_prompt = Counter(json.dumps(row["prompt"]) for row in train)
    assert sum(n > 1 for n in per_prompt.values()) > 0.3 * len(per_prompt)
    for part in (train, test):
        answers = [[r[side][0]["content"] for side in ("chosen", "rejected")] for r in part]
        shorter = sum(len(chosen) < len(rejected) for chosen, rejected in answers) / len(part)
        assert 0.2 < shorter < 0.8  # length gives nothing away
        assert all(chosen != rejected for chosen, rejected in answers)


def test_the_shipped_model_is_small_and_loads_in_float32():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    size = sum(file.stat().st_size for file in (demo.ASSETS / "model").iterdir())
    assert size <= 1_000_000
    model = AutoModelForCausalLM.from_pretrained(demo.ASSETS / "model")
    assert model.dtype == torch.float32 and model.config.model_type == "llama"
    tokenizer = AutoTokenizer.from_pretrained(demo.ASSETS / "model")
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id, None}) == 3
    assert tokenizer.decode(tokenizer("Añ 语 ok").input_ids) == "Añ 语 ok"


def test_the_demo_learns_what_it_shows(result, script):
    assert result.before.chosen_likelier < 0.5 and result.before.reward_accuracy == 0
    assert result.after.chosen_likelier >= 0.90 and result.after.reward_accuracy >= 0.90
    assert result.n_held_out_pairs == len(rows("test"))
    # The three that are shown are the first topics' questions, not picked for their answers: one
    # may be courteous before. After, they are courteous answers with the right fact; another CPU
    # rounds otherwise, so half a million parameters are allowed one slip.
    import random

    by_text = {q.messages[-1]["content"]: q for q in script.questions(random.Random(1))}
    assert len(result.generations) == 3
    assert all(by_text[question].held_out for question, _, _ in result.generations)
    assert sum(before != after for _, before, after in result.generations) >= 2
    right = [after in by_text[question].courteous() for question, _, after in result.generations]
    assert sum(right) >= 2


def test_the_demo_saves_tokens(result):
    stats = result.pack_stats
    assert stats.n_pairs == result.n_train_pairs * demo.OPTIONS["num_train_epochs"]
    assert stats.n_tokens < 0.7 * stats.n_tokens_unshared < 0.7 * stats.n_tokens_padded


def test_the_demo_writes_what_it_names(result):
    from fastdpo.model import load_pretrained

    folder = result.output_dir
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    logs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_rewards/accuracies" in log for log in logs)
    assert any("pairs_per_second" in log for log in logs)
    options = yaml.safe_load((folder / "resolved_config.yaml").read_text())
    assert options["model_name_or_path"] == demo.OPTIONS["model_name_or_path"]
    assert options["beta"] == demo.OPTIONS["beta"]
    adapted = load_pretrained(str(folder), torch.device("cpu"))
    assert adapted.active_adapters == ["default"]
    text = "\n".join(demo.report_lines(result))
    for name in ("adapter_model.safetensors", "metrics.jsonl", "curves.png", str(folder)):
        assert name in text
    for part in (f"{result.after.chosen_likelier:.3f}", "x fewer", "before", "after"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 100 + len(str(folder))


def test_a_used_folder_is_refused_before_any_work(result, tmp_path, capsys):
    with pytest.raises(CheckpointError, match="already holds an earlier run"):
        demo.run_demo(result.output_dir)
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["demo", "--output_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "fastdpo: error:" in error and "notes.txt" in error and error.count("\n") == 1
    assert main(["demo", "--output", "x", "--nope"]) == 2
    assert "--nope" in capsys.readouterr().err


def test_the_next_free_folder_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert demo._new_folder() == Path("runs/demo")
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo-2").mkdir()
    assert demo._new_folder() == Path("runs/demo-3")
