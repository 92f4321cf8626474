"""The result of a run: it loads back, generates, and never overwrites another's."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo.errors import CheckpointError, MissingPackageError
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.tiny_trainer import LORA, hidden_package, trainer


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_saved_models_load_back(tmp_path, lora):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    made = trainer(
        tmp_path,
        model=str(tmp_path / "base"),
        peft_config=LoraConfig(**LORA) if lora else None,
    )
    made.processing_class = tiny_tokenizer()
    made.train()
    made.save_model(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / ("base" if lora else "saved"))
    if lora:
        loaded = PeftModel.from_pretrained(loaded, tmp_path / "saved")
    ids = torch.arange(5, 25)[None]
    made.model.eval()
    expected: Any = made.model
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected(input_ids=ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token == "</s>"


def test_a_trained_model_generates(tmp_path):
    made = trainer(tmp_path)
    made.train()
    ids = torch.arange(5, 15)[None]
    model: Any = made.model
    got = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert got.shape[1] > ids.shape[1]


def test_an_output_folder_is_never_overwritten(tmp_path):
    trainer(tmp_path).train()
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(CheckpointError, match="already holds an earlier run"):
        trainer(tmp_path).train()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    with pytest.raises(MissingPackageError, match="optim='adamw_8bit' needs a package"):
        with_8bit = trainer(tmp_path, overwrite_output_dir=True, optim="adamw_8bit")
        with hidden_package("bitsandbytes"):
            with_8bit.train()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before  # refused before it clears
    trainer(tmp_path, overwrite_output_dir=True).train()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    with pytest.raises(CheckpointError, match="thesis.tex"):
        trainer(tmp_path, output_dir=str(tmp_path / "other"), overwrite_output_dir=True).train()
    assert (tmp_path / "other" / "thesis.tex").read_text() == "precious"
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        trainer(tmp_path, output_dir=str(tmp_path / "file")).train()
    with pytest.raises(CheckpointError, match="can't be written"):
        trainer(tmp_path, output_dir="/dev/null/run").train()


def test_overwriting_leaves_no_old_weights(tmp_path):
    first = trainer(tmp_path)
    first.train()
    first.save_model()
    second = trainer(tmp_path, peft_config=LoraConfig(**LORA), overwrite_output_dir=True)
    second.train()
    second.save_model()
    assert not list((tmp_path / "run").glob("model*.safetensors"))
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
