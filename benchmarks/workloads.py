"""What is trained on in the benchmarks: model shapes, lengths of pairs, and their necessary FLOPs.

Models have random weights and pairs random tokens: speed depends on their sizes. The head is
scaled so that its logits are peaked as a trained model's are, since flat ones draw less power and
never leave a kernel's fast path. Nothing here trains or measures.
"""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

LORA_RANK = 16
PEAKED_STD = 5.0  # of the logits; a softmax over 128k of them is dominated by a few tokens


@dataclass(frozen=True)
class Lengths:
    """Lognormal token counts of prompt, chosen, rejected, with a tail of long pairs.

    mu, sigma: mean and deviation of their logarithms; corr: of ln chosen with ln rejected, and of
    ln prompt with both. One pair in 64 is four times as long.
    """

    mu: tuple[float, float, float]
    sigma: tuple[float, float, float]
    corr_responses: float
    corr_prompt: float

    def draw(self, n: int, max_length: int, seed: int = 0) -> np.ndarray:
        """[n, 3] int64, prompt + response within `max_length` and every response at least 2."""
        rng = np.random.default_rng(seed)
        corr = np.array(
            [
                [1.0, self.corr_prompt, self.corr_prompt],
                [self.corr_prompt, 1.0, self.corr_responses],
                [self.corr_prompt, self.corr_responses, 1.0],
            ]
        )
        z = rng.standard_normal((n, 3)) @ np.linalg.cholesky(corr).T
        lengths = np.exp(np.array(self.mu) + np.array(self.sigma) * z)
        lengths[rng.permutation(n)[: max(n // 64, 1)]] *= 4
        lengths = np.rint(lengths).astype(np.int64)
        lengths[:, 0] = lengths[:, 0].clip(1, max_length * 3 // 4)
        lengths[:, 1:] = lengths[:, 1:].clip(2, max_length - lengths[:, :1])
        return lengths


def _mean_to_mu(mean: float, sigma: float) -> float:
    return math.log(mean) - sigma**2 / 2


LENGTHS = {
    # Anthropic HH, harmless test split: measured on its 2,312 pairs.
    "hh": Lengths((4.36, 3.27, 3.50), (0.99, 0.93, 0.98), 0.30, 0.23),
    # UltraFeedback: the published means, 145 and 346 tokens; the spread is an assumption.
    "ultrafeedback": Lengths(
        (_mean_to_mu(145, 1.0), _mean_to_mu(346, 0.7), _mean_to_mu(346, 0.7)),
        (1.0, 0.7, 0.7),
        0.46,
        0.15,
    ),
    # Long documents to answer about: an assumption, like no dataset in particular.
    "long": Lengths(
        (_mean_to_mu(3000, 0.6), _mean_to_mu(350, 0.7), _mean_to_mu(350, 0.7)),
        (0.6, 0.7, 0.7),
        0.46,
        0.15,
    ),
}


def _llama(**kwargs) -> LlamaConfig:
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    return LlamaConfig(max_position_embeddings=8192, rope_parameters=rope, **kwargs)


SHAPES: dict[str, PreTrainedConfig] = {
    "tiny": _llama(
        vocab_size=8000, hidden_size=128, intermediate_size=384, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "tiny-untied": _llama(
        vocab_size=8000, hidden_size=96, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    ),
    "5M": _llama(
        vocab_size=8000, hidden_size=192, intermediate_size=512, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "12M": _llama(
        vocab_size=8000, hidden_size=320, intermediate_size=896, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "0.5B": Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "1B": _llama(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    ),
    "3B": _llama(
        vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
        num_attention_heads=24, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    ),
    "8B": _llama(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    ),
}  # fmt: skip
"""As Qwen2.5-0.5B, Llama-3.2-1B and -3B, and Llama-3.1-8B; tiny is the 2M Llama of
benchmarks/hh.py, tiny-untied another of 2M, three quarters of it embeddings and head, and the next
two are for CPUs to grow by."""


def random_model(
    shape: str, device: torch.device, dtype: torch.dtype, *, peaked: bool = True
) -> PreTrainedModel:
    """A model of `SHAPES[shape]` with random weights, made on the device; `peaked`: its logits."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=dtype)
    if not peaked:
        return model
    head = model.get_output_embeddings().weight
    with torch.no_grad():  # behind the last norm a hidden state has D entries of size about 1
        head.mul_(PEAKED_STD / (head.float().std() * math.sqrt(head.shape[1])).to(head.dtype))
    return model


def absent(tuning: str) -> str | None:
    """Why models can't be tuned this way here, or None."""
    if tuning == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes not installed"
    return None


def quantize_nf4(model: PreTrainedModel) -> None:
    """Makes the body's linear layers NF4 in place, as `load_in_4bit` would while loading."""
    import bitsandbytes  # pyright: ignore[reportMissingImports]

    kind = "nf4"
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=model.dtype
    )
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is not torch.nn.Linear or linear is head:
                continue
            with torch.device("meta"):
                quantized = bitsandbytes.nn.Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    bias=False,
                    compute_dtype=model.dtype,
                    quant_type=kind,
                )
            weight = bitsandbytes.nn.Params4bit(
                linear.weight.data, requires_grad=False, quant_type=kind
            )
            quantized.weight = weight.to(linear.weight.device)  # packs it
            quantized.bias = linear.bias
            setattr(parent, name, quantized)
    for name in ("is_quantized", "is_loaded_in_4bit"):  # as transformers' loading marks them
        setattr(model, name, True)
    model.config.quantization_config = config


def random_rows(lengths: np.ndarray, vocab_size: int, seed: int = 0) -> list[dict]:
    """Rows of token ids for both trainers; `length` is what TRL groups by."""
    rng = np.random.default_rng(seed)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = []
    for parts in lengths.tolist():
        ids = [rng.integers(3, vocab_size, n).tolist() for n in parts]
        length = parts[0] + max(parts[1:])
        rows.append({**dict(zip(names, ids, strict=True)), "length": length})
    return rows


def necessary_tokens(lengths: np.ndarray) -> int:
    """Tokens that must be computed: each prompt once, each response without its last token."""
    return int(lengths[:, 0].sum() + (lengths[:, 1:] - 1).clip(min=0).sum())


def necessary_flops(
    config: PreTrainedConfig, lengths: Sequence | np.ndarray, *, lora: bool, live_reference: bool
) -> float:
    """FLOPs that a DPO step over these pairs [n, 3] can't do without: the sum over its phases."""
    return sum(flops_by_phase(config, lengths, lora=lora, live_reference=live_reference).values())


def flops_by_phase(
    config: PreTrainedConfig, lengths: Sequence | np.ndarray, *, lora: bool, live_reference: bool
) -> dict[str, float]:
    """Necessary FLOPs of the body's products, the adapters', attention and the head.

    No padding, no repeated prompt, no recomputation, no gradient of a frozen weight; the head sees
    response tokens only. Norms, rotations and the optimizer are left out: they are no products.
    """
    lengths = np.asarray(lengths, dtype=np.float64)
    prompt, responses = lengths[:, 0], lengths[:, 1:]
    tokens, scored = float(necessary_tokens(lengths)), float(responses.sum())
    width, layers = config.hidden_size, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or width // config.num_attention_heads
    q, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    linears = [
        (width, q), (width, kv), (width, kv), (q, width),
        (width, config.intermediate_size), (width, config.intermediate_size),
        (config.intermediate_size, width),
    ]  # fmt: skip
    weights = layers * sum(a * b for a, b in linears)
    adapter = layers * sum(LORA_RANK * (a + b) for a, b in linears) if lora else 0
    # Causal: a token attends to those before it; QK' and PV are 4 FLOPs a pair of entries.
    seen = prompt**2 / 2 + (responses * prompt[:, None] + responses**2 / 2).sum(1)
    # Forward passes: the policy's, and the reference's. Backward: the gradient of the input, and
    # of the weight where there is one; attention has the gradients of two products.
    forwards = 2 if live_reference else 1
    backwards = 1 if lora else 2
    return {
        "GEMMs": 2.0 * weights * tokens * (forwards + backwards),
        "LoRA": 2.0 * adapter * tokens * 3,
        "attention": 4.0 * layers * q * float(seen.sum()) * (forwards + 2),
        "log-probs and loss": 2.0 * width * config.vocab_size * scored * (forwards + backwards),
    }
