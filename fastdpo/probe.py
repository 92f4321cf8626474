"""Whether a model computes packs right, found out on a few tokens when it is loaded.

Models that can't take packs do not say so: they run and return other numbers. So a tiny pack is
compared with separate plain forwards, and its attention calls with what the config announces. This
measures the model at hand, in its device and dtype; it is no proof for lengths it did not try.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .batch import Pack
from .data import TokenizedPairs
from .errors import ModelError
from .logps import PackedSettings, decoder_of, decoder_output, head_logps
from .model import n_embeddings
from .packing import build_pack
from .rotary import rotary_bounds
from .rows import gather_rows

_LAYER_TYPES = ("full_attention", "sliding_attention")
_LARGEST_WINDOW = 64  # windows up to this are exceeded by the probe's sequences
_HALF_DTYPES = (torch.float16, torch.bfloat16)


class Probe:
    """Separate plain forwards of a few sequences under the model's own attention, to compare with.

    hidden [N, D]: the rows that predict each target. logps [N]: from the model's own logits.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.pairs = _probe_pairs(model)
        self.targets = self._pack("unshared").targets
        with _undisturbed(model):
            self.hidden, self.logps, self.largest_logit = self._plain_forwards()

    def _pack(self, mode: str) -> Pack:
        threshold, _ = rotary_bounds(self.model.config)
        ids = range(len(self.pairs))
        return build_pack(self.pairs, ids, mode=mode, rope_threshold=threshold)

    def _plain_forwards(self) -> tuple[Tensor, Tensor, float]:
        model = self.model
        caught: list[Tensor] = []
        hook = decoder_of(model).register_forward_hook(lambda _m, _a, out: caught.append(out[0]))
        hidden, logps, largest = [], [], 0.0
        try:
            for pair_id, side in self._pack("unshared").responses:
                prompt = self.pairs.prompt(pair_id)
                response = (self.pairs.chosen, self.pairs.rejected)[side](pair_id)
                ids = torch.tensor([*prompt, *response], device=model.device)  # [L + 1]
                caught.clear()
                logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0]  # [L, V]
                scored = slice(len(prompt) - 1, None)
                dtype = torch.promote_types(logits.dtype, torch.float32)
                log_p = logits[scored].to(dtype).log_softmax(-1)
                hidden.append(caught[-1][0, scored])
                logps.append(log_p.gather(1, ids[len(prompt) :, None])[:, 0])
                largest = max(largest, float(logits[scored].abs().max()))
        finally:
            hook.remove()
        return torch.cat(hidden), torch.cat(logps), largest

    def failure(self, settings: PackedSettings) -> str | None:
        """Why the model, with the attention it has now, can't run `settings.mode`; or None."""
        if settings.mode != "padded":
            other = set(_layer_types(self.model)) - set(_LAYER_TYPES)
            if other:
                return f"it has layers of type {', '.join(sorted(other))}"
        pack = self._pack(settings.mode).to(self.model.device)
        if pack.layout is not None:
            pack = replace(pack, layout=replace(pack.layout, trace=[]))
        try:
            with _undisturbed(self.model):
                hidden = decoder_output(self.model, pack)[0].flatten(0, 1)
                rows = gather_rows(hidden, pack.predict)  # [N, D]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # foreign code: whatever it raises, it can't run this pack
            return f"its forward failed: {type(error).__name__}: {error}".splitlines()[0]
        if pack.layout is not None and pack.layout.trace is not None:
            unlike = self._unlike_config(pack.layout.trace)
            if unlike is not None:
                return unlike
        error = _relative_error(rows, self.hidden)
        tolerance = self._tolerance()
        if not error <= tolerance:  # NaN fails
            return (
                f"hidden states differ from separate forwards by {error:.1e} of their size, "
                f"expected at most {tolerance:.1e}"
            )
        return None

    def _unlike_config(self, calls: list[tuple[int | None, int | None]]) -> str | None:
        """Compares the attention calls (layer, window) that got the layout with the config."""
        config = self.model.config.get_text_config()
        n_layers = config.num_hidden_layers
        if len(calls) != n_layers:
            return f"the layout reached {len(calls)} of {n_layers} attention layers"
        window = getattr(config, "sliding_window", None)
        for (layer, given), layer_type in zip(calls, _layer_types(self.model), strict=False):
            expected = window if layer_type == "sliding_attention" else None
            if given != expected:
                return f"layer {layer} is of type {layer_type} but got window {given}"
        return None

    def _tolerance(self) -> float:
        """Rounding differences of two orders of computation, relative to the hidden states' size.

        2 roundings a layer add up at random over the depth, each of one eps; 16-bit matmuls sum in
        fp32, so theirs is one more, while an fp32 sum of D products adds about sqrt(D) / 4.
        """
        eps, in_half = self._eps()
        text = self.model.config.get_text_config()
        per_layer = 2.0 if in_half else 2.0 + math.sqrt(self.hidden.shape[-1]) / 4
        return per_layer * eps * math.sqrt(2 * text.num_hidden_layers)

    def _eps(self) -> tuple[float, bool]:
        """The coarsest precision that the forward computes in, and whether it is a 16-bit one."""
        device = self.model.device.type
        dtypes = {self.hidden.dtype, torch.float32}  # norms compute in fp32 even in fp64 models
        dtypes |= {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        if torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))
        eps = max(torch.finfo(dtype).eps for dtype in dtypes)
        if device == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32":
            eps = max(eps, 2.0**-10)
        return eps, bool(dtypes & set(_HALF_DTYPES)) or eps == 2.0**-10

    def check_head(self, settings: PackedSettings) -> None:
        """`ModelError` unless the head's log-probs are those of the model's own logits.

        Both start from the same hidden rows. The model rounds each logit (eps times its size);
        `linear_logps` takes exponentials about 40 nat from the target's logit, in fp32.
        """
        with _undisturbed(self.model):
            logps, _ = head_logps(
                self.model, self.hidden, self.targets.to(self.hidden.device), settings
            )
        error = float((logps - self.logps).abs().mean())
        eps, in_half = self._eps()
        factor = 1.0 if in_half else 2.0 + math.sqrt(self.hidden.shape[-1]) / 4
        offset = 64 * torch.finfo(torch.float32).eps
        tolerance = factor * eps * (1.0 + self.largest_logit) + offset
        if not error <= tolerance:
            raise ModelError(
                f"{type(self.model).__name__} does something to its logits that its config doesn't "
                f"name: log-probs through its head differ by {error:.1e} nat on average, expected "
                f"at most {tolerance:.1e}; this model can't be trained here"
            )


def _layer_types(model: PreTrainedModel) -> list[str]:
    return list(getattr(model.config.get_text_config(), "layer_types", None) or [])


def _relative_error(rows: Tensor, expected: Tensor) -> float:
    """Mean over rows of |row - expected| / |expected|; a padding token's row may be all zero."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    rows, expected = rows.to(dtype), expected.to(dtype)
    size = expected.norm(dim=-1)
    return float(((rows - expected).norm(dim=-1) / size.clamp(min=1e-6 * size.mean())).mean())


def _probe_pairs(model: PreTrainedModel) -> TokenizedPairs:
    """Two prompts with three and two responses, one of one token; longer than a small window."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    extra = window if window <= _LARGEST_WINDOW else 0
    n_vocabulary = n_embeddings(model)
    rng = np.random.default_rng(0)
    a, b = (rng.integers(n_vocabulary, size=extra + n).tolist() for n in (9, 14))
    r = [rng.integers(n_vocabulary, size=n).tolist() for n in (5, 11, 7, 6, 1)]
    return TokenizedPairs.from_lists([a, a, b], [r[0], r[0], r[3]], [r[1], r[2], r[4]])


@contextlib.contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; puts train/eval flags and random states back."""
    training = [module for module in model.modules() if module.training]
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            model.eval()
            yield
    finally:
        for module in training:
            module.training = True
        torch.clear_autocast_cache()  # it may hold weights cast without a graph
