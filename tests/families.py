"""Tiny random models of the families that fastdpo is tried on, and what each is expected to do.

`python -m tests.families` writes README's table from them; tests/test_coverage.py checks the
models, and that table. Sliding windows are shorter than the sequences of the tests.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

V = 80
README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- models: written by `python -m tests.families` -->", "<!-- models: end -->"

BASE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
WINDOW = {"head_dim": 8, "sliding_window": 6}
ALTERNATE = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
}


@dataclass(frozen=True)
class Family:
    """A family as README names it, and a tiny model of it.

    model: transformers' class without its ending; config: its config without the ending.
    special: what its tests reach beyond plain attention. why: where it falls back to padded
    batches, what the log says (part of it).
    """

    name: str
    model: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    special: str = ""
    why: str | None = None
    config: str | None = None
    router: bool = False
    base: dict[str, Any] = field(default_factory=lambda: BASE)

    def build(self, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
        """The model in eval mode, always with the same weights."""
        config_class = getattr(transformers, (self.config or self.model) + "Config")
        ending = "LMHeadModel" if self.model == "GPT2" else "ForCausalLM"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = config_class(**{**self.base, **self.kwargs, **overrides})
            model = getattr(transformers, self.model + ending)(config).to(dtype).eval()
        if dtype == torch.float64 and self.router:
            model.set_experts_implementation("eager")  # the grouped matmul has no fp64
        return model


GPT2 = {
    **{"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
OPT = {
    **{"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2, "dropout": 0.0},
}
STATES = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}

FAMILIES = [
    Family("Llama 2, SmolLM", "Llama", {"num_key_value_heads": 4}),
    Family("Llama 3", "Llama", {"rope_parameters": LLAMA3}, "grouped heads, scaled RoPE"),
    Family(
        "Qwen2, Qwen2.5",
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        "biases, windows from a layer on",
    ),
    Family("Qwen2-MoE", "Qwen2Moe", {**MOE, "shared_expert_intermediate_size": 32}, router=True),
    Family("Qwen3", "Qwen3", {"head_dim": 8, "tie_word_embeddings": True}, "norms on q and k"),
    Family("Qwen3-MoE", "Qwen3Moe", {"head_dim": 8, **MOE}, router=True),
    Family("Mistral", "Mistral", {"sliding_window": 6}, "sliding window"),
    Family("Mixtral", "Mixtral", LOCAL_MOE, router=True),
    Family("Gemma", "Gemma", {"head_dim": 8}, "tied embeddings, GeGLU"),
    Family("Gemma 2", "Gemma2", ALTERNATE, "alternate windows, both softcaps"),
    Family("Gemma 3", "Gemma3", ALTERNATE, "alternate windows, two RoPEs", config="Gemma3Text"),
    Family("Phi-3, Phi-4", "Phi3", {"sliding_window": 6}, "fused projections, window"),
    Family("Phi-4-mini", "Phi3", {"partial_rotary_factor": 0.5}, "partial RoPE"),
    Family("OLMo 2", "Olmo2", {}, "norms after the blocks"),
    Family("OLMo 3", "Olmo3", ALTERNATE, "alternate windows"),
    Family("OLMoE", "Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, router=True),
    Family("SmolLM3", "SmolLM3", {"no_rope_layers": [1, 0]}, "layers without RoPE"),
    Family("Granite", "Granite", {"logits_scaling": 4.0, "residual_multiplier": 0.5}, "logits / 4"),
    Family("Granite-MoE", "GraniteMoe", {"logits_scaling": 4.0, **LOCAL_MOE}, router=True),
    Family("Cohere", "Cohere", {"logit_scale": 0.25}, "logits × 0.25, parallel blocks"),
    Family("Cohere 2", "Cohere2", {"logit_scale": 0.25, **ALTERNATE}, "alternate windows"),
    Family("GPT-OSS", "GptOss", {**ALTERNATE, **LOCAL_MOE}, "sinks, windows", router=True),
    Family("GPT-2", "GPT2", {}, "learned positions", base=GPT2),
    Family("OPT", "OPT", {}, "learned positions", base=OPT),
    Family("Qwen3-Next", "Qwen3Next", {"head_dim": 8, **MOE, **LINEAR, **HYBRID},
           why="layers of type linear_attention"),
    Family("Qwen3.5", "Qwen3_5", {"head_dim": 8, **LINEAR, **HYBRID}, config="Qwen3_5Text",
           why="layers of type linear_attention"),
    Family("Mamba", "Mamba", base=STATES, why="layers of type linear_attention"),
    Family(
        "Jamba",
        "Jamba",
        {
            **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
            **{"expert_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4},
            "use_mamba_kernels": False,
        },
        why="layers of type linear_attention",
    ),
    Family("RecurrentGemma", "RecurrentGemma", {"num_hidden_layers": 3},
           why="layers of type linear_attention"),
    Family(
        "Falcon-H1",
        "FalconH1",
        {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4,
         "mamba_n_groups": 1},
        why="layers of type hybrid",
    ),
    Family(
        "Llama 4",
        "Llama4",
        {"intermediate_size_mlp": 48, "head_dim": 8, "num_local_experts": 2},
        config="Llama4Text",
        why="layers of type chunked_attention",
    ),
    Family("StableLM", "StableLm", why="the layout reached 0 of 2 attention layers"),
    Family("Bloom", "Bloom", why="its attention can't be replaced",
           base={"vocab_size": V, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    Family("MPT", "Mpt", why="its attention can't be replaced",
           base={"vocab_size": V, "d_model": 32, "n_layers": 2, "n_heads": 4}),
]  # fmt: skip
SHARED = [family for family in FAMILIES if family.why is None]
FALLBACKS = [family for family in FAMILIES if family.why is not None]


def by_name(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


def table() -> str:
    """What README says of the families, as Markdown."""
    lines = ["| models | packs | tested with |", "|---|---|---|"]
    for family in SHARED:
        routed = "experts and their router loss" if family.router else ""
        special = ", ".join(filter(None, [family.special, routed]))
        lines.append(f"| {family.name} | shared prompts | {special} |")
    reasons = dict.fromkeys(family.why for family in FALLBACKS)
    for why in reasons:
        names = ", ".join(family.name for family in FALLBACKS if family.why == why)
        lines.append(f"| {names} | padded batches | {why} |")
    return "\n".join(lines)


def readme_with_table(text: str) -> str:
    """README's `text` with the table between its marks replaced by `table()`."""
    before, rest = text.split(START)
    after = rest.split(END)[1]
    return f"{before}{START}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    new = readme_with_table(README.read_text())
    sys.stdout.write("unchanged\n" if new == README.read_text() else f"{README} written\n")
    README.write_text(new)
