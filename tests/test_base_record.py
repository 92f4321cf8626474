"""`base.json`: what a merge has to know of the base that an adapter was trained over."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fastdpo import base_record
from fastdpo.errors import CheckpointError, ConfigError, MissingPackageError, ModelError
from fastdpo.export import export
from tests.tiny import tiny_llama
from tests.tiny_trainer import LORA, hidden_package, trainer


@pytest.fixture
def run(tmp_path) -> Path:
    """A checkpoint of a run in Python, over a model object loaded in bf16 from a folder."""
    tiny_llama().save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="bfloat16")
    made = trainer(
        tmp_path, model=model, peft_config=LoraConfig(**LORA), save_strategy="steps", max_steps=1
    )
    made.train()
    return tmp_path / "run" / "checkpoint-1"


def changed(run: Path, **values: Any) -> None:
    path = run / "base.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_run_in_python_leaves_a_record(run, tmp_path, caplog):
    assert base_record.read(run) == {
        "base_model_name_or_path": str(tmp_path / "model"),
        "revision": None,  # of the hub alone
        "dtype": "bfloat16",
        "quantization_config": None,
        "base_precision": None,
    }
    export(run, tmp_path / "a", merge=True, dtype=None)
    assert "no record" not in caplog.text
    export(run, tmp_path / "copy", merge=False, dtype=None)
    assert base_record.read(tmp_path / "copy") == base_record.read(run)
    (run / "base.json").unlink()  # an older fastdpo's, or another library's
    export(run, tmp_path / "b", merge=True, dtype=None)
    assert "so there is no record of how its base was loaded" in caplog.text


def test_an_fp8_base_is_not_merged_wherever_it_is_saved(tmp_path):
    """Its record says so, apart from the run's options; a record from before has no such line."""
    tiny_llama(intermediate_size=64).save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="bfloat16")
    lora = LoraConfig(**LORA)
    made = trainer(tmp_path, model=model, peft_config=lora, max_steps=1, base_precision="fp8")
    elsewhere = tmp_path / "elsewhere"
    made.save_model(str(elsewhere))
    with pytest.raises(ModelError, match=r"base in 8-bit floats .* export without --merge"):
        export(elsewhere, tmp_path / "merged", merge=True, dtype=None)
    export(elsewhere, tmp_path / "copy", merge=False, dtype=None)
    record = json.loads((tmp_path / "copy" / "base.json").read_text())
    assert record.pop("base_precision") == "fp8"
    (elsewhere / "base.json").write_text(json.dumps(record))
    found = base_record.read(elsewhere)
    assert found is not None and found["base_precision"] is None


def test_a_full_model_has_no_base(tmp_path):
    made = trainer(tmp_path, max_steps=1)
    made.train()
    made.save_model()
    assert not (tmp_path / "run" / "base.json").exists()


def test_a_quantized_base_is_loaded_as_it_was(monkeypatch):
    """Whoever quantized it: the record is the model's own, not the options'. The merge itself:
    test_qlora.py."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    model = tiny_llama(dtype=torch.float16)
    wanted = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="float16")
    wanted.bnb_4bit_quant_type = "nf4"
    model.config.quantization_config = wanted
    model.config.dtype = torch.float16  # as from_pretrained does
    model.config._commit_hash = "c0ffee"
    found = json.loads(json.dumps(base_record.record(model), default=str))
    assert found["revision"] == "c0ffee"
    made = base_record.load_options(found)
    assert made["dtype"] == "float16"
    assert made["quantization_config"].to_dict() == wanted.to_dict()


@pytest.mark.parametrize("recorded", ["c0ffee", None])
def test_the_recorded_commit_is_loaded(run, tmp_path, monkeypatch, recorded):
    seen = []

    def load(name, **kwargs):
        seen.append(kwargs["revision"])
        raise OSError("seen")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", load)
    changed(run, revision=recorded)
    with pytest.raises(CheckpointError, match="seen"):
        export(run, tmp_path / "out", merge=True, dtype=None)
    changed(run, base_model_name_or_path="another/model")  # the adapter was told of another since
    with pytest.raises(CheckpointError, match="seen"):
        export(run, tmp_path / "out", merge=True, dtype=None)
    assert seen == [recorded or "main", "main"]


def test_records_that_do_not_help_are_one_line_errors(run, tmp_path):
    out = tmp_path / "out"
    four_bits = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    changed(run, quantization_config=four_bits)
    with hidden_package("bitsandbytes"), pytest.raises(MissingPackageError) as missing:
        export(run, out, merge=True, dtype=None)
    assert "pip install 'fastdpo[qlora]'" in str(missing.value)
    changed(run, quantization_config={"quant_method": "abacus"})
    with pytest.raises(ConfigError, match="quantized by 'abacus', in a way that this transformers"):
        export(run, out, merge=True, dtype=None)
    for text in ("{", '{"dtype": "float32"}', "[]"):
        (run / "base.json").write_text(text)
        with pytest.raises(CheckpointError, match="base.json', which says how the base was loaded"):
            export(run, out, merge=True, dtype=None)
    assert not out.exists()
