"""Tiny trainers: a few steps on a CPU in well under a second, and what tests ask of them."""

import contextlib
import sys
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from fastdpo import DPOConfig, DPOTrainer
from tests.tiny import tiny_llama, tiny_pairs, tiny_rows, tiny_tokenizer

LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear"}


def config(tmp_path, **overrides) -> DPOConfig:
    options = {
        "output_dir": str(tmp_path / "run"),
        "learning_rate": 1e-2,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "use_cpu": True,
        **overrides,
    }
    return DPOConfig(**options)


def bare_config(**options) -> DPOConfig:
    """Options of a run that is not begun, all else at its default."""
    return DPOConfig(output_dir="unused", use_cpu=True, **options)


def trainer(tmp_path, model=None, pairs=None, **overrides) -> DPOTrainer:
    init = {
        key: overrides.pop(key)
        for key in (
            *("ref_model", "peft_config", "callbacks", "eval_dataset", "optimizers"),
            "processing_class",
        )
        if key in overrides
    }
    return DPOTrainer(
        model=model if model is not None else tiny_llama(),
        args=config(tmp_path, **overrides),
        train_dataset=pairs if pairs is not None else tiny_pairs(16, pairs_per_prompt=2),
        **init,
    )


def trained_on_rows(tmp_path, rows=None, **overrides) -> DPOTrainer:
    """After three steps on text."""
    options = {"max_steps": 3, "processing_class": tiny_tokenizer(), **overrides}
    made = trainer(tmp_path, pairs=rows or tiny_rows(8), **options)
    made.train()
    return made


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


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def losses(made: DPOTrainer) -> list[float]:
    return [log["loss"] for log in made.state.log_history if "loss" in log]


@contextlib.contextmanager
def hidden_package(name: str):
    """As if the package were not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, None)
        yield
