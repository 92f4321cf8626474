"""What fastdpo does not honour of TRL's and transformers' options, and what it says instead.

An option moves from here to the class that declares it when it is built. Which of
TrainingArguments' fields are not honoured is read off transformers itself (config.py).
"""

from typing import Any

from .errors import ConfigError

# TRL's options that fastdpo does not honour, with the value at which they ask for nothing.
TRL_NEUTRAL: dict[str, Any] = {
    # DPOConfig
    "padding_free": False,
    "pad_to_multiple_of": "auto",
    "precompute_ref_batch_size": None,
    "pad_token": None,
    # ScriptArguments and its mixtures of datasets
    "dataset_streaming": False,
    "ignore_bias_buffers": False,
    "datasets": None,
    "streaming": False,
    "test_split_size": None,
    # ModelConfig
    "lora_target_parameters": None,
    "lora_task_type": "CAUSAL_LM",
    "bnb_4bit_quant_storage": None,
}

# The way out, where it is more than leaving the option out.
WAY_OUT = {
    "accelerator_config": "fastdpo prepares its own batches",
    "auto_find_batch_size": "set max_tokens_per_pack, which bounds the memory of a forward pass",
    "bf16_full_eval": "evaluation computes as training does: see bf16",
    "deepspeed": "it trains on one GPU, or on several with torchrun",
    "dataset_streaming": "it reads the dataset whole; name a smaller split such as 'train[:1%]'",
    "do_predict": "use trainer.evaluate()",
    "fp16": "use bf16: true",
    "fp16_full_eval": "use bf16: true",
    "fsdp": "it trains on one GPU, or on several with torchrun",
    "full_determinism": "use deterministic: true",
    "label_smoothing_factor": "use label_smoothing",
    "pad_to_multiple_of": "packs have no padding",
    "pad_token": "set tokenizer.pad_token; packs need none",
    "padding_free": "packs have no padding anyway: see packing_mode",
    "precompute_ref_batch_size": "packs are filled by tokens: set max_tokens_per_pack",
    "remove_unused_columns": "columns that no option asks for are not read; leave it out",
    "hub_token": "run `hf auth login` or set HF_TOKEN, so that no config file holds a secret",
    "torch_compile": "use compile: layers",
}

# Names that users of older TRL or transformers releases know.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "max_prompt_length": "max_length (of prompt and response together)",
    "max_completion_length": "max_length (of prompt and response together)",
    "no_cuda": "use_cpu",
    "group_by_length": "train_sampling_strategy (packs need no grouping by length)",
    "torch_dtype": "dtype",
    "tokenizer": "processing_class, an argument of DPOTrainer",
    "precompute_reference_log_probs": "precompute_ref_log_probs",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
}

# Other names of options: shorter, or newer than the oldest supported release of transformers.
ALIASES = {
    "resume": "resume_from_checkpoint",
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}


def is_neutral(value: Any, default: Any) -> bool:
    """Whether `value` asks for nothing beyond `default`: it is the default, or both mean off."""

    def is_off(x: Any) -> bool:
        return x in ("no", "none", "auto") if isinstance(x, str) and x else not x

    return value == default or (is_off(value) and is_off(default))


def unsupported(name: str, value: Any) -> ConfigError:
    """The error for an option of TRL's or transformers' that fastdpo does not honour."""
    way_out = WAY_OUT.get(name, "leave it out")
    return ConfigError(f"option {name!r} ({value!r}) is not supported by fastdpo yet; {way_out}")
