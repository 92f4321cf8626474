"""Loading models and tokenizers, through transformers and PEFT, with errors one can act on.

A folder or hub name may hold a model or a PEFT adapter (its base model is then loaded too).
Nothing here decides how a model trains: see adapters.py, reference_logps.py and logps.py.
"""

import hashlib
import json
import types
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file

from .adapters import refuse_prompt_learning
from .config import DPOConfig, ModelConfig
from .errors import CheckpointError, ConfigError, MissingPackageError, ModelError, did_you_mean

ADAPTER_CONFIG = "adapter_config.json"
# What PEFT's config says of where a model came from and which library wrote it.
NOT_OF_THE_ADAPTER = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")


def load_model(config: ModelConfig, args: DPOConfig) -> PreTrainedModel | PeftModel:
    """The causal language model named by `config.model_name_or_path`, on the training device.

    `dtype` is the dtype of the weights ("auto": as saved); `load_in_4bit`/`load_in_8bit` quantize
    the frozen base through bitsandbytes.
    """
    if config.model_name_or_path is None:
        raise ModelError("no model was named; set model_name_or_path to a folder or a hub name")
    kwargs = _load_options(config, args, quantization_config(config))
    kwargs.setdefault("revision", config.model_revision)
    return load_pretrained(config.model_name_or_path, args.device, **kwargs)


def load_ref_model(config: ModelConfig, args: DPOConfig) -> PreTrainedModel | PeftModel | None:
    """The model named by `config.ref_model_name_or_path`, loaded as the policy is but for its own
    quantization and revision; None where none is named."""
    if config.ref_model_name_or_path is None:
        return None
    own = replace(config, use_peft=True, load_in_4bit=config.ref_load_in_4bit, load_in_8bit=False)
    kwargs = _load_options(config, args, quantization_config(own))
    kwargs.setdefault("revision", config.reference_revision)
    return load_pretrained(config.ref_model_name_or_path, args.device, **kwargs)


def _load_options(config: ModelConfig, args: DPOConfig, quantization: Any) -> dict[str, Any]:
    """The arguments of `from_pretrained`: those of `args.model_init_kwargs` come first."""
    kwargs: dict[str, Any] = {**cast(dict, args.model_init_kwargs or {})}
    kwargs.setdefault("trust_remote_code", config.trust_remote_code)
    if config.dtype is not None:
        kwargs.setdefault("dtype", config.dtype)
    if quantization is not None:
        kwargs["quantization_config"] = quantization
    return kwargs


def load_by_name(
    name: str, args: DPOConfig, quantization_config: Any = None
) -> PreTrainedModel | PeftModel:
    """The model called `name`, loaded with `args.model_init_kwargs` onto the training device."""
    kwargs: dict[str, Any] = {**cast(dict, args.model_init_kwargs or {})}
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    kwargs.setdefault("dtype", "float32")  # as TRL; bf16 weights lose updates of 1e-6
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    return load_pretrained(name, args.device, **kwargs)


def load_policy(
    model: str | PreTrainedModel | PeftModel, args: DPOConfig, quantization_config: Any
) -> PreTrainedModel | PeftModel:
    """`model` itself, or the model of that name; refuses load options where nothing is loaded."""
    if isinstance(model, str):
        return load_by_name(model, args, quantization_config)
    if quantization_config is not None or args.model_init_kwargs:
        option = "model_init_kwargs" if quantization_config is None else "quantization_config"
        raise ConfigError(
            f"{option} applies when a model is loaded, and model= is loaded already; pass the "
            f"model's name, or leave {option} out"
        )
    return model


def load_pretrained(name: str, device: torch.device, **kwargs: Any) -> PreTrainedModel | PeftModel:
    """`AutoModelForCausalLM.from_pretrained`; of an adapter also its base.

    Raises `ModelError` naming what is missing, `MissingPackageError` for quantization packages.
    """
    check_exists(name)
    if kwargs.get("quantization_config") is not None:
        kwargs.setdefault("device_map", {"": device})
    if holds_adapter(name, kwargs.get("revision")):
        return _load_adapter(name, device, **kwargs)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    except ImportError as error:
        raise MissingPackageError(f"model {name!r} needs a missing package: {error}") from error
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"model {name!r} can't be loaded: {_first_line(error)}") from error
    return model if "device_map" in kwargs else model.to(device)


def _load_adapter(name: str, device: torch.device, **kwargs: Any) -> PeftModel:
    """An adapter, to be trained on, over the base that its config names.

    `revision` is the adapter's where it lies on the hub, and else the base's, before the one that
    the adapter's config remembers.
    """
    revision = kwargs.pop("revision", None) or "main"
    config = PeftConfig.from_pretrained(name, revision=revision)
    base_name = config.base_model_name_or_path
    if not base_name:
        raise ModelError(
            f"{name!r} holds an adapter whose adapter_config.json names no base model; load base "
            "and adapter with peft.PeftModel.from_pretrained and pass the model itself"
        )
    refuse_prompt_learning(config)
    if Path(name).is_dir() and revision != "main":
        config.revision = revision
    base = load_pretrained(base_name, device, revision=config.revision or "main", **kwargs)
    return PeftModel.from_pretrained(
        base, name, config=config, revision=revision, is_trainable=True
    )


def holds_adapter(name: str, revision: str | None = None) -> bool:
    """Whether the folder or hub name `name` holds an adapter, not a model."""
    if Path(name).is_dir():
        return (Path(name) / ADAPTER_CONFIG).is_file()
    return find_adapter_config_file(name, revision=revision) is not None


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `config.model_name_or_path`, of the same revision."""
    if config.model_name_or_path is None:
        raise ModelError("no model was named; set model_name_or_path to a folder or a hub name")
    return load_pretrained_tokenizer(
        config.model_name_or_path,
        revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
    )


def load_pretrained_tokenizer(name: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer saved with the model `name`; `ModelError` where there is none."""
    if not name:
        raise ModelError("the model has no name to load a tokenizer by; pass processing_class=")
    check_exists(name)
    try:
        return AutoTokenizer.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the tokenizer of {name!r} can't be loaded: {_first_line(error)}; pass "
            "processing_class= in Python, or save the tokenizer beside the model"
        ) from error


def quantization_config(config: ModelConfig) -> Any | None:
    """The `BitsAndBytesConfig` for `load_in_4bit`/`load_in_8bit`, or None for neither."""
    if not (config.load_in_4bit or config.load_in_8bit):
        return None
    try:
        import bitsandbytes  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingPackageError(
            "load_in_4bit and load_in_8bit need bitsandbytes: pip install 'fastdpo[qlora]'"
        ) from error
    from transformers import BitsAndBytesConfig

    if config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    compute_dtype = config.dtype if config.dtype not in (None, "auto") else "bfloat16"
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
    )


def is_quantized(model: nn.Module) -> bool:
    """Whether bitsandbytes holds the weights of `model` in 4 or 8 bits."""
    return bool(
        getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    )


def keep_unpacked(model: nn.Module) -> None:
    """Keeps bitsandbytes' 4-bit layers differentiable on a CPU with AVX-512.

    There their first forward in eval mode (the reference's, say) repacks the weights in place for
    a kernel that rounds otherwise and has no gradient: training would go on without a word.
    """
    flag = "support_avx512bf16_for_cpu"
    for module in model.modules():
        if getattr(module, flag, False):
            setattr(module, flag, False)
            module.state_dict()  # which unpacks weights that are packed already


def keep_activations(model: nn.Module) -> None:
    """Makes bitsandbytes' 8-bit layers multiply activations as they are, by weights unpacked on the
    way: 8 bits are then how weights are held, and no more.

    Their own product rounds activations to 8 bits but for the columns in which any row of the
    batch is large, so a token's numbers would depend on what it is packed with.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt" and "bitsandbytes" in type(module).__module__:
            module.forward = types.MethodType(_unpacked_forward, module)


def _unpacked_forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    out = _UnpackedProduct.apply(x.to(dtype), layer)
    assert isinstance(out, torch.Tensor)
    return out if layer.bias is None else out + layer.bias.to(dtype)


def _unpacked(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] of an 8-bit layer: each row its 8 bits times its scale / 127."""
    scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    packed = layer.weight if layer.weight.dtype == torch.int8 else layer.state.CB
    return packed.to(dtype) * (scales / 127).to(dtype)[:, None]


class _UnpackedProduct(torch.autograd.Function):
    """x [..., in] times the unpacked weight's transpose; the weight is unpacked again backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any) -> torch.Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, _unpacked(layer, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] @ _unpacked(ctx.layer, grads[0].dtype), None


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout of `model` to 0, as TRL does: a noisy policy is not its reference.

    Attention's dropout is a number, not a module; TRL leaves it on.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010  (nn.Module types it a Tensor)


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model, or `model` itself."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise ModelError(
            f"expected a transformers PreTrainedModel or a PeftModel, got {type(model).__name__}"
        )
    return inner


def n_embeddings(model: PreTrainedModel | PeftModel) -> int:
    """Rows of the input embedding: token ids lie below it."""
    return len(model.get_input_embeddings().weight)  # pyright: ignore[reportArgumentType]


def model_identity(model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    """What a resumed run must share of its model: the shapes and dtypes of the base's weights,
    and the adapter's settings under their PEFT names."""
    shapes = [
        (name, tuple(p.shape), str(p.dtype))
        for name, p in model.named_parameters()
        if ".lora_" not in name
    ]
    identity: dict[str, Any] = {
        "model": hashlib.sha256(repr(sorted(shapes)).encode()).hexdigest()[:16]
    }
    if isinstance(model, PeftModel):
        config = model.peft_config[model.active_adapters[0]].to_dict()
        for key, value in config.items():
            if key not in NOT_OF_THE_ADAPTER and value is not None:
                plain = sorted(value) if isinstance(value, set | list | tuple) else value
                identity[f"adapter {key}"] = json.loads(json.dumps(plain, default=str))
    return identity


def frozen_weights(*models: nn.Module) -> str:
    """A hash of up to 64 numbers of each weight of `models` that does not train.

    A checkpoint does not hold those: a resumed run brings base and reference along again. Two
    finetunes of one base differ in these numbers too; reading all of them would take seconds.
    """
    digest = hashlib.sha256()
    for model in {id(model): model for model in models}.values():
        for weight in model.parameters():
            if weight.requires_grad or weight.device.type == "meta" or not weight.numel():
                continue
            flat = weight.data.reshape(-1)
            some = flat[:: -(-flat.numel() // 64)].contiguous().view(torch.uint8)
            digest.update(some.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_weights(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Puts the weights that `save_pretrained` wrote in `folder` into `model`, in place."""
    if isinstance(model, PeftModel):
        (adapter,) = model.active_adapters
        weights = load_file(folder / "adapter_model.safetensors")
        unfit = set_peft_model_state_dict(model, weights, adapter_name=adapter).unexpected_keys
        if unfit:
            raise CheckpointError(
                f"checkpoint {str(folder)!r} does not fit the model: {unfit[0]!r} has no "
                "counterpart"
            )
        return
    shards = sorted(folder.glob("model*.safetensors"))
    weights = {key: value for shard in shards for key, value in load_file(shard).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    untied = set(missing) - set(getattr(model, "_tied_weights_keys", None) or ())
    if unexpected or untied:
        raise CheckpointError(
            f"checkpoint {str(folder)!r} does not fit the model: "
            f"{(unexpected or sorted(untied))[0]!r} has no counterpart"
        )


def check_exists(name: str) -> None:
    """A name that can only be a path gets a plain answer where transformers asks the hub."""
    path = Path(name)
    looks_like_path = (
        path.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") > 1
    )
    if looks_like_path and not path.exists():
        there = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ModelError(
            f"model folder {name!r} does not exist{did_you_mean(path.name, there)}; a name of the "
            "hub is written owner/name"
        )
    if path.is_file():
        raise ModelError(f"model {name!r} is a file; expected a folder that holds config.json")
    if path.is_dir() and not any(
        (path / file).is_file() for file in ("config.json", ADAPTER_CONFIG)
    ):
        raise ModelError(
            f"folder {name!r} holds neither config.json nor {ADAPTER_CONFIG}, so no model; "
            "a training run keeps its models in checkpoint-N folders below it"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
