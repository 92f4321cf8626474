"""The peers of the training benchmark: which there are, what they lack, how they are kept apart.

Unsloth itself needs a GPU; a package of its name and interface stands in for it here.
"""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import bench_train_step, harness, isolated, peers, train_cases
from benchmarks.train_cases import Bench, Case

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CASE = Case("tiny", "lora", "hh", 2, 2, ("unsloth",), max_length=64)


def test_the_matrix_is_whole_and_begins_with_the_bars():
    cases = train_cases.gpu_cases()
    names = [(case.shape, case.tuning, case.lengths) for case in cases]
    assert len(names) == len(set(names)) == 4 * 3 * 3
    assert names[:3] == [
        ("1B", "lora", "hh"),
        ("8B", "lora", "hh"),
        ("8B", "lora", "ultrafeedback"),
    ]
    assert all(set(train_cases.TRAINERS) <= set(case.trainers) for case in cases)
    assert all(case.max_length == (8192 if case.lengths == "long" else 2048) for case in cases)
    assert all(case.shape in train_cases.SECONDS_NEEDED for case in cases)


def test_what_a_peer_lacks_is_named(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert peers.without("trl", CUDA) == []
    lacks = "; ".join(peers.without("trl-best", CUDA))
    assert "liger_kernel not installed" in lacks and "flash_attn not installed" in lacks
    assert "padding-free" in lacks
    assert "--unsloth-python" in str(peers.unsloth_absent(CUDA, "lora", None))
    assert "full" in str(peers.unsloth_absent(CUDA, "full", "python3"))
    assert peers.unsloth_absent(CPU, "lora", "python3") == "Unsloth needs a GPU"
    assert peers.unsloth_absent(CUDA, "qlora", "/other/python") is None
    assert not peers.rewrites_transformers("trl-best", CUDA)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name)
    assert peers.rewrites_transformers("trl-best", CUDA)  # with Liger's layers
    assert not peers.rewrites_transformers("trl-best", CPU) and "needs a GPU" in str(
        peers.without("trl-best", CPU)
    )
    assert not any(peers.rewrites_transformers(name, CUDA) for name in ("fastdpo", "trl"))


def test_trl_at_its_best_gives_way_to_memory(monkeypatch):
    tried = []

    def run(trainer, job, *args):
        tried.append((job.micro_batch, job.gradient_checkpointing))
        if len(tried) < 3:
            raise torch.OutOfMemoryError("no")
        return peers.Timing(1.0, 1.0, 1.0, 1.0, 10, None, 0.7, 0.6)

    monkeypatch.setattr(peers, "run", run)
    case = Case("tiny", "lora", "hh", 16, 1, ("trl-best",), max_length=64)
    found = Bench(case, CPU).measure("trl-best")
    assert tried == [(4, False), (1, False), (4, True)]
    assert found["settings"] == {"micro_batch": 4, "gradient_checkpointing": True}
    row = {"case": case.name, "trainer": "trl-best", **found}
    assert "activations recomputed to fit" in bench_train_step.without_lines([row])[-1]


STAND_IN = """
import sys
assert "transformers" not in sys.modules, "Unsloth has to be imported first"
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


class FastLanguageModel:
    @staticmethod
    def from_pretrained(name, *, max_seq_length, dtype, load_in_4bit, fix_tokenizer,
                        use_exact_model_name):
        assert max_seq_length == 64 and not load_in_4bit and use_exact_model_name
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        return model, AutoTokenizer.from_pretrained(name)

    @staticmethod
    def get_peft_model(model, *, use_gradient_checkpointing, random_state, **options):
        assert use_gradient_checkpointing == "unsloth"
        torch.manual_seed(random_state)
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
"""


def test_unsloth_is_trained_in_a_process_of_its_own(tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="trl not installed")
    (tmp_path / "unsloth").mkdir()
    (tmp_path / "unsloth/__init__.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    bench = Bench(CASE, CPU)
    found = bench.measure("unsloth", seconds=120.0)
    figures = train_cases.figures(bench, "unsloth", found, peak_flops=1e9)
    assert figures["pairs_per_second"] > 0 and 0 <= figures["waste"] < 1
    # Adapters start at zero: the first loss is ln 2 on the very weights that were saved for it.
    assert found["first_loss"] == pytest.approx(0.6931, abs=0.02)


def test_a_peer_that_dies_is_told_of_and_leaves_the_others(tmp_path, monkeypatch, capsys):
    (tmp_path / "unsloth").mkdir()
    (tmp_path / "unsloth/__init__.py").write_text("raise SystemExit('no GPU for me')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(peers, "unsloth_absent", lambda *args: None)
    results = harness.Results(tmp_path / "rows.json", {})
    left_out = bench_train_step.measure_all(
        [CASE], results, device=CPU, data=Path(), repeats=1, budget=harness.Budget(),
        peak_flops=1e9,
    )  # fmt: skip
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert "no GPU for me" in row["error"] and "pairs_per_second" not in row
    assert left_out == [f"tiny-lora-hh/unsloth/0: {row['error']}"]
    assert bench_train_step.summaries([row]) == []


def test_a_peer_that_takes_too_long_is_stopped(tmp_path, monkeypatch):
    (tmp_path / "unsloth").mkdir()
    (tmp_path / "unsloth/__init__.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(isolated.Failed, match="stopped after 1 s"):
        Bench(CASE, CPU).measure("unsloth", seconds=1.0)
