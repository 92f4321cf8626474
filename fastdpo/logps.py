"""Token log-probs of a pack from a transformers model: `model(pack=pack).token_logps`.

`prepare_packed_forward` binds this to the base model's own forward, so that the outermost module
can be called (PEFT's, accelerate's, DDP's) and every hook and autocast applies. A call without a
pack is the model's own forward. The choice of mode is checked on the model itself, see probe.py.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from fastdpo_kernels import TokenStats, linear_logps

from .attention import registered_name, usable_backends
from .batch import Pack
from .errors import ConfigError, ModelError, did_you_mean
from .head import head_lora, output_head
from .packing import MODES
from .rotary import bind_rotary, rotary_bounds, with_long_rows
from .router_loss import RouterSums, pack_router_sums
from .rows import gather_rows

logger = logging.getLogger(__name__)


class PackedOutput(NamedTuple):
    """token_logps [N]: fp32 (fp64 for an fp64 model), in nat, differentiable. stats: those asked
    for, of each token's distribution. router: the pack's share in the router's loss, likewise."""

    token_logps: Tensor
    stats: TokenStats | None = None
    router: RouterSums | None = None


@dataclass(frozen=True)
class PackedForwardInfo:
    """What `prepare_packed_forward` chose.

    mode: "shared", "unshared" or "padded". backend: the attention that runs packs; in padded mode
    the model's own. reason: why it is not shared packs on the preferred backend; None if it is.
    max_seqlen: the longest sequence that the model's rotary embedding takes in a pack, if bounded.
    rope_threshold: the longest with its frequencies for short sequences, if it has others.
    """

    mode: str
    backend: str
    reason: str | None
    max_seqlen: int | None = None
    rope_threshold: int | None = None


@dataclass(frozen=True)
class HeadTransform:
    """Logits are scale * (hidden @ weight.T + bias), then softcap * tanh(logits / softcap)."""

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class PackedSettings:
    """How the bound forward computes; `mode` is the one its packs must have."""

    mode: str
    head: HeadTransform
    logps_impl: str
    workspace_bytes: int
    max_seqlen: int | None
    rope_threshold: int | None


# ---- the forward -----------------------------------------------------------------------------


def packed_forward(
    model: PreTrainedModel,
    pack: Pack,
    settings: PackedSettings,
    stats: Sequence[str] = (),
    router: bool = False,
) -> PackedOutput:
    """Token log-probs [N] of the pack's targets, and the `stats` that `linear_logps` has; the
    router's sums if asked for."""
    if (pack.layout is None) != (settings.mode == "padded"):
        kind = "padded" if pack.layout is None else "packed"
        raise ModelError(f"a {kind} batch for a model prepared for mode {settings.mode!r}")
    if settings.max_seqlen is not None and pack.max_seqlen > settings.max_seqlen:
        raise ModelError(
            f"a sequence of {pack.max_seqlen} tokens: past {settings.max_seqlen} this model's "
            "rotary embedding changes for every token of the batch, so results would depend on "
            f"what is packed together; lower max_length to {settings.max_seqlen}"
        )
    threshold = settings.rope_threshold
    if threshold is not None and pack.max_seqlen > threshold != pack.rope_threshold:
        raise ModelError(
            f"a sequence of {pack.max_seqlen} tokens for a model whose rotary embedding changes "
            f"past {threshold}, in a pack built for {pack.rope_threshold}; pass "
            "rope_threshold to build_pack"
        )
    output = decoder_output(model, pack, output_router_logits=True if router else None)
    rows = gather_rows(output[0].flatten(0, 1), pack.predict)  # [N, D]
    logps, token_stats = head_logps(model, rows, pack.targets, settings, stats)
    sums = pack_router_sums(model, output, pack) if router else None
    return PackedOutput(logps, token_stats, sums)


def decoder_output(model: PreTrainedModel, pack: Pack, **kwargs: Any) -> Any:
    """What the decoder gives for a pack; first its last hidden states [1, T, D], padded [B, L, D].

    `kwargs` that are None are left out.
    """
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    if pack.layout is None:
        kwargs |= {"input_ids": pack.input_ids, "attention_mask": pack.attention_mask}
    else:
        assert pack.position_ids is not None
        # transformers hands a 4-D mask through as it is. Ours is never read: without it the decoder
        # would build a [T, T] one, and read from the device whether `position_ids` restart.
        unread_mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=pack.input_ids.device)
        kwargs |= {
            "input_ids": pack.input_ids.unsqueeze(0),
            "position_ids": pack.position_ids.unsqueeze(0),
            "attention_mask": unread_mask,
            "pack_layout": pack.layout,
        }
    with with_long_rows(pack.long_rows):
        return decoder_of(model)(use_cache=False, **kwargs)


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module under `model` whose first output are the hidden states that its head reads."""
    decoder = model.get_decoder()
    if decoder is model:  # a text-only class of a larger model may not find its own
        decoder = getattr(model, "model", None)
    if not isinstance(decoder, nn.Module):
        raise ModelError(f"{type(model).__name__} has no decoder apart from its head")
    return decoder


def head_logps(
    model: PreTrainedModel,
    rows: Tensor,
    targets: Tensor,
    settings: PackedSettings,
    stats: Sequence[str] = (),
) -> tuple[Tensor, TokenStats | None]:
    """log softmax(logits)[targets] of hidden `rows` [N, D] under the model's head: [N]."""
    head = output_head(model)
    options: dict[str, Any] = {
        "bias": getattr(head, "bias", None),
        "lora": head_lora(head),
        "softcap": settings.head.softcap,
        "scale": settings.head.scale,
        "impl": settings.logps_impl,
        "workspace_bytes": settings.workspace_bytes,
    }
    if not stats:
        return linear_logps(rows, head.weight, targets, **options), None
    return linear_logps(rows, head.weight, targets, stats=stats, **options)


def head_transform(config: PretrainedConfig) -> HeadTransform:
    """What the model does to its logits, by the names that configs have for it."""
    text = config.get_text_config()
    scale = 1.0
    if getattr(text, "logits_scaling", None):  # Granite divides
        scale /= text.logits_scaling
    if isinstance(getattr(text, "logit_scale", None), int | float):  # Cohere multiplies
        scale *= text.logit_scale
    softcap = getattr(text, "final_logit_softcapping", None)  # Gemma caps
    return HeadTransform(scale, softcap or getattr(text, "logits_soft_cap", None))


# ---- binding it to a model -------------------------------------------------------------------


def prepare_packed_forward(
    model: PreTrainedModel,
    *,
    attn_implementation: str | None = None,
    logps_impl: str = "auto",
    workspace_bytes: int = 256 * 2**20,
    mode: str = "auto",
    is_reference: bool = False,
) -> PackedForwardInfo:
    """Gives `model` (the base model, adapters may be in it) a forward that takes `pack=`.

    Sets the model's attention implementation. `mode="auto"` takes shared packs where the model
    computes them right, else unshared packs, else padded batches, and logs why; any other `mode`
    is that or `ModelError`. is_reference: `mode` is the policy's, which the error then goes by.
    Call it under the autocast that training will use. Leaves weights, gradients, train/eval mode
    and random states as they were.
    """
    from .probe import Probe  # probe.py measures what is defined above

    if mode != "auto" and mode not in MODES:
        raise ConfigError(
            f"packing_mode {mode!r} is none of auto, {', '.join(MODES)}"
            f"{did_you_mean(mode, ['auto', *MODES])}"
        )
    _refuse_unsupported(model, mode)
    own_attention = _own_attention(model)
    head = head_transform(model.config)
    threshold, max_seqlen = rotary_bounds(model.config)
    plain = "sdpa" if _has_sdpa(model) else "eager"  # where calls without a pack go

    _unbind(model)
    bind_rotary(model)
    set_attention(model, own_attention)
    probe = Probe(model)
    failures: dict[str, list[str]] = {}  # what is wrong -> with what
    for candidate, backend in _candidates(model, mode, attn_implementation, own_attention):
        settings = PackedSettings(
            candidate, head, logps_impl, workspace_bytes, max_seqlen, threshold
        )
        is_padded = candidate == "padded"
        name = backend if is_padded else registered_name(backend, plain=plain)
        failure = set_attention(model, name) or probe.failure(settings)
        if failure is None:
            break
        failures.setdefault(failure, []).append(f"{candidate} with {backend}")
    else:
        set_attention(model, own_attention)
        way_out = "" if mode == "auto" else "; packing_mode: auto takes what works"
        name = type(model).__name__
        if is_reference:
            name = f"the reference, {name},"
            way_out = "" if mode == "padded" else "; set packing_mode: padded for both models"
        raise ModelError(f"{name} can't do {_reason(failures)}{way_out}")
    probe.check_head(settings)
    model._fastdpo_own_attention = own_attention  # type: ignore[assignment]
    _bind(model, settings)
    reason = _reason(failures) or None
    if reason is not None:
        kind = "batches" if candidate == "padded" else "packs"
        model_type = type(model).__name__
        logger.warning(
            "%s runs %s %s with %s; not %s", model_type, candidate, kind, backend, reason
        )
    return PackedForwardInfo(candidate, backend, reason, max_seqlen, threshold)


def _own_attention(model: PreTrainedModel) -> str:
    """The attention implementation that the model was loaded with."""
    before = getattr(model, "_fastdpo_own_attention", None)  # set where it was prepared before
    name = before or model.config._attn_implementation or "eager"
    if name == "sdpa" and not _has_sdpa(model):
        logger.warning(
            "%s caps attention logits, which transformers' sdpa leaves out: its plain forwards run "
            "eager attention from here on",
            type(model).__name__,
        )
        return "eager"
    return name


def _has_sdpa(model: PreTrainedModel) -> bool:
    """Whether transformers' sdpa computes this model; some versions drop softcaps silently."""
    softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return bool(getattr(model, "_supports_sdpa", False)) and softcap is None


def _reason(failures: dict[str, list[str]]) -> str:
    return "; ".join(f"{', '.join(tried)}: {failure}" for failure, tried in failures.items())


def _candidates(
    model: PreTrainedModel, mode: str, attn_implementation: str | None, own_attention: str
) -> list[tuple[str, str]]:
    """(mode, backend) to try, best first."""
    if mode == "padded":
        return [("padded", attn_implementation or own_attention)]
    device = model.device
    dtype = model.dtype
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    backends = usable_backends(attn_implementation, device=device, dtype=dtype, config=model.config)
    packed = ("shared", "unshared") if mode == "auto" else (mode,)
    candidates = [(m, backend) for m in packed for backend in backends]
    return candidates + ([("padded", own_attention)] if mode == "auto" else [])


def set_attention(model: PreTrainedModel, name: str) -> str | None:
    """Sets the attention implementation; returns why it did not take, or None."""
    if model.config._attn_implementation == name:
        return None
    if not model._can_set_attn_implementation():
        return "its attention can't be replaced"  # transformers would only warn
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        return f"transformers refused {name!r}: {str(error).split('. ')[0]}"
    taken = model.config._attn_implementation
    return None if taken == name else f"transformers took {taken!r} for {name!r}"


def _refuse_unsupported(model: PreTrainedModel, mode: str) -> None:
    output_head(model)
    for name, module in model.named_modules() if mode != "padded" else ():
        dropout = getattr(module, "attention_dropout", 0.0)
        if isinstance(dropout, int | float) and dropout > 0:
            raise ModelError(
                f"attention_dropout is {dropout} in {name}; packs have none: set "
                "disable_dropout: true, attention_dropout 0 in the model's config, or "
                "packing_mode: padded"
            )


def _bind(model: PreTrainedModel, settings: PackedSettings) -> None:
    plain = model.forward
    # A method, unbound, so that copies of the model call themselves and wrappers can unwrap it.
    function: Callable[..., Any] = getattr(plain, "__func__", lambda self, *a, **k: plain(*a, **k))

    @functools.wraps(function)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        pack: Pack | None = None,
        token_stats: Sequence[str] = (),
        router_sums: bool = False,
        **kwargs: Any,
    ) -> Any:
        if pack is None:
            return function(self, *args, **kwargs)
        given = [name for name, value in kwargs.items() if value is not None]
        if args or given:
            raise TypeError(f"a pack holds all inputs; got {given or len(args)} more beside it")
        return packed_forward(self, pack, settings, token_stats, router_sums)

    forward._fastdpo_plain = plain  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]


def _unbind(model: nn.Module) -> None:
    """Takes an earlier binding off, so that preparing twice is preparing once."""
    plain = getattr(model.forward, "_fastdpo_plain", None)
    if plain is None:
        return
    del model.__dict__["forward"]
    if plain.__func__ is not type(model).forward:
        model.forward = types.MethodType(plain.__func__, model)
