"""LoRA adapters through PEFT: made from options, checked against the model, switched off.

The reference of a fresh adapter is the model with its adapters off. An adapter that was trained
before is no such thing: `is_untouched` tells the two apart.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from .config import ModelConfig
from .errors import ConfigError, ModelError, did_you_mean

REFERENCE_ADAPTER = "ref"
ALL_LINEAR = "all-linear"
# Initialisations that move base weights: with the adapter off, the model is no longer the policy
# that training starts from (PEFT documents them as changing the residual weights).
REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "eva")


def lora_config(config: ModelConfig) -> LoraConfig | None:
    """The LoRA that the options describe, or None without `use_peft`."""
    if not config.use_peft:
        return None
    targets = config.lora_target_modules
    if targets is None:
        target_modules: str | list[str] = ALL_LINEAR
    else:
        target_modules = targets[0] if len(targets) == 1 else list(targets)
        if target_modules != ALL_LINEAR and isinstance(target_modules, str):
            target_modules = [target_modules]
    layers = _layers(config.lora_layers_to_transform)
    if layers is not None and target_modules == ALL_LINEAR:
        target_modules = [ALL_LINEAR]  # PEFT chooses layers only for modules that are listed
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=target_modules,
        modules_to_save=config.lora_modules_to_save,
        layers_to_transform=layers,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        revision=None if config.model_revision == "main" else config.model_revision,  # the base's
    )


def _layers(given: list[float] | None) -> list[int] | None:
    if given is None:
        return None
    layers = [int(number) for number in given]
    if layers != given or min(layers, default=-1) < 0:
        raise ConfigError(
            f"'lora_layers_to_transform' expects whole numbers from 0 on, got {given}"
        )
    return layers


def add_adapter(model: PreTrainedModel, peft_config: PeftConfig) -> PeftModel:
    """`model` with a new trainable adapter.

    Raises `ModelError` for targets that match no module (with the candidates) or a router, for
    prompt learning (it has no packed form), and for initialisations that rewrite the base weights.
    """
    if not isinstance(peft_config, PeftConfig):
        raise ConfigError(
            f"peft_config must be a peft.PeftConfig such as peft.LoraConfig, got "
            f"{type(peft_config).__name__}"
        )
    refuse_prompt_learning(peft_config)
    if isinstance(peft_config, LoraConfig):
        _check_initialisation(peft_config)
        name_all_linear(model, peft_config)
        _check_targets(model, "lora_target_modules", peft_config.target_modules)
        _check_targets(model, "lora_modules_to_save", peft_config.modules_to_save)
        _check_layers(model, peft_config)
    try:
        adapted = get_peft_model(model, peft_config)
    except ValueError as error:
        raise ModelError(f"PEFT can't add the adapter: {' '.join(str(error).split())}") from error
    refuse_routers(adapted)
    return adapted


def refuse_prompt_learning(peft_config: PeftConfig) -> None:
    """Raises `ModelError` for an adapter that prepends virtual tokens."""
    if peft_config.is_prompt_learning:
        raise ModelError(
            f"{getattr(peft_config.peft_type, 'value', peft_config.peft_type)} prepends virtual "
            "tokens, which packs with shared prompts can't hold; use LoRA, DoRA or full fine-tuning"
        )


def refuse_routers(model: PeftModel) -> None:
    """Raises `ModelError` for LoRA on a router that is a linear layer by its class, as Llama 4's
    and PhiMoE's are, and returns a tuple, which PEFT can't add to."""
    kinds = {
        name.removeprefix("base_model.model."): type(module.get_base_layer()).__name__
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear)  # of a parameter, as of Mixtral's router, it is another
    }
    routers = [name for name, kind in kinds.items() if kind.endswith("Router")]
    if routers:
        others = sorted({name.rpartition(".")[2] for name in kinds.keys() - set(routers)})
        raise ModelError(
            f"lora_target_modules takes in {routers[0]}, a {kinds[routers[0]]}, whose result is a "
            f"tuple that LoRA can't add to; name others, such as {', '.join(others) or 'o_proj'}"
        )


def _check_initialisation(peft_config: LoraConfig) -> None:
    init = peft_config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(REWRITES_BASE):
        raise ModelError(
            f"init_lora_weights={init!r} rewrites the base weights, so the model with its adapter "
            "off is not the policy that training starts from; use init_lora_weights=True"
        )


def _check_targets(
    model: PreTrainedModel, option: str, targets: str | list[str] | set[str] | None
) -> None:
    """Each named target must match a module; PEFT only objects when none of them does."""
    if targets is None or targets == ALL_LINEAR:
        return
    names = [name for name, _ in model.named_modules() if name]
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    candidates = sorted({name.rpartition(".")[2] for name in linear})
    if isinstance(targets, str):  # a regular expression over the whole name
        unmatched = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
    else:
        unmatched = [
            target
            for target in sorted(targets)
            if not any(name == target or name.endswith(f".{target}") for name in names)
        ]
    if unmatched:
        raise ModelError(
            f"{option} {unmatched[0]!r} matches no module of {type(model).__name__}"
            f"{did_you_mean(unmatched[0], candidates)}; its linear layers are "
            f"{', '.join(candidates)}"
        )


def _check_layers(model: PreTrainedModel, peft_config: LoraConfig) -> None:
    """Every chosen layer must exist: PEFT adds nothing for one that does not, and says nothing."""
    chosen = peft_config.layers_to_transform
    depth = model.config.get_text_config().num_hidden_layers
    for layer in [chosen] if isinstance(chosen, int) else chosen or ():
        if not 0 <= layer < depth:
            raise ModelError(
                f"lora_layers_to_transform {layer} is no layer of {type(model).__name__}, which "
                f"has {depth}: 0 to {depth - 1}"
            )


def name_all_linear(model: PreTrainedModel, peft_config: PeftConfig) -> None:
    """Replaces "all-linear" in a list of targets, which PEFT knows only alone, by the names of the
    linear layers, the head's left out."""
    targets = getattr(peft_config, "target_modules", None)
    if not isinstance(peft_config, LoraConfig) or isinstance(targets, str | None):
        return
    if ALL_LINEAR in targets:
        head = model.get_output_embeddings()
        names = {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }
        peft_config.target_modules = sorted(names | (set(targets) - {ALL_LINEAR}))


def is_untouched(model: PeftModel) -> bool:
    """Whether the active adapters change nothing yet: every LoRA B (or A) is still zero."""
    pairs: dict[str, dict[str, bool]] = {}
    for name, parameter in model.named_parameters():
        match = re.match(r"(.*)\.lora_(?:embedding_)?([AB])\.([^.]+)", name)
        if match and match[3] in model.active_adapters:
            factor = pairs.setdefault(f"{match[1]}.{match[3]}", {})
            factor[match[2]] = not bool(torch.any(parameter != 0))
    return bool(pairs) and all(any(factor.values()) for factor in pairs.values())


def adapter_parameters(model: PeftModel, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that belong to `adapter`, by name. (A module of the base model may have the
    adapter's name too.)"""
    own = {
        f"{path}.{holder}.{adapter}"
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        for holder in module.adapter_layer_names
    }
    part = re.compile(rf"\.{re.escape(adapter)}(?=\.|$)")
    for name, parameter in model.named_parameters():
        if any(name[: found.end()] in own for found in part.finditer(name)):
            yield name, parameter


def copy_adapter(model: PeftModel) -> None:
    """Freezes a copy of the active adapter as the adapter `ref`, to serve as the reference."""
    (active,) = model.active_adapters
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.add_adapter(REFERENCE_ADAPTER, model.peft_config[active])
    overwrite_adapter(model, active)
    model.set_adapter(active)
    for parameter, flag in trained:
        parameter.requires_grad_(flag)


def overwrite_adapter(model: PeftModel, source: str) -> None:
    """Gives `ref` the tensors of adapter `source`, bit for bit."""
    for name, parameter in adapter_parameters(model, REFERENCE_ADAPTER):
        own = model.get_parameter(re.sub(rf"\.{REFERENCE_ADAPTER}(\.|$)", rf".{source}\1", name))
        parameter.data = own.data.clone()  # its dtype too, which PEFT computes in
        parameter.requires_grad_(False)


def check_biases(model: PeftModel) -> None:
    """Raises `ModelError` where an adapter trains biases of the base model, which no switching
    off takes back: the reference would move with the policy."""
    for name, config in model.peft_config.items():
        bias = getattr(config, "bias", "none")
        if bias != "none":
            raise ModelError(
                f"adapter {name!r} has bias={bias!r}: it trains biases of the base model, so the "
                "reference would change with the policy; use bias='none', or pass a ref_model"
            )


@contextmanager
def reference_adapter(model: PeftModel, name: str | None) -> Iterator[None]:
    """The model under adapter `name`, or with all adapters off where `name` is None."""
    if name is None:
        with model.disable_adapter():
            yield
        return
    (active,) = model.active_adapters
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter(active)
        for parameter, flag in trained:  # set_adapter makes all of an adapter trainable
            parameter.requires_grad_(flag)
