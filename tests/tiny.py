"""Tiny tokenizers, models and preference data, built locally in milliseconds, for every test.

Everything is deterministic and nothing is downloaded. Models are random: they test arithmetic.
For a model that has learnt something, see fastdpo/demo_assets.
"""

import functools
import random

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fastdpo.data import TokenizedPairs, tokenize_pairs

WORDS = (
    "the a red blue green small large cat dog bird house river tree boat garden runs sleeps sings "
    "falls grows quickly slowly never often what where when is are and with under over"
).split()

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen's: the generation prompt is the start of the assistant's turn."""


@functools.cache
def _bpe_json(vocab_size: int) -> str:
    specials = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rng = random.Random(0)
    text = [" ".join(rng.choices(WORDS, k=12)) for _ in range(200)]
    text += [
        "\n\nHuman: what?\n\nAssistant: yes.",
        "Question: why? \n\nAnswer: because",
        "user\nassistant\nsystem\n",
    ] * 20
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(
    *, bos: bool = True, chat: bool = False, vocab_size: int = 400
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (any text round-trips); pad != eos.

    bos: the tokenizer puts <s> before plain text. chat: it carries the ChatML template, and
    <|im_end|> is its EOS token; otherwise it has no template and </s> is EOS.
    """
    tokenizer = Tokenizer.from_str(_bpe_json(vocab_size))
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    result = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>" if chat else "</s>",
        pad_token="<pad>",
    )
    if chat:
        result.chat_template = CHATML
    return result


def _config_kwargs(overrides: dict) -> dict:
    return {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        # Large enough for log-probs that are far from uniform: errors then have something to show.
        "initializer_range": 0.3,
        **overrides,
    }


def _build(model_class, config, seed: int, dtype: torch.dtype):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).to(dtype)


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> LlamaForCausalLM:
    """2 layers, 4 heads of width 8 with 2 key/value heads (GQA), D = 32, V = 400, untied head."""
    config = LlamaConfig(**_config_kwargs(overrides))
    return _build(LlamaForCausalLM, config, seed, dtype)


def tiny_qwen3(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> Qwen3ForCausalLM:
    """As tiny_llama, with Qwen3's norms on queries and keys, and tied embeddings."""
    config = Qwen3Config(**_config_kwargs({"tie_word_embeddings": True, **overrides}))
    return _build(Qwen3ForCausalLM, config, seed, dtype)


def tiny_mistral(
    seed: int = 0, dtype: torch.dtype = torch.float32, sliding_window: int | None = 7, **overrides
) -> MistralForCausalLM:
    """As tiny_llama, with a sliding window short enough to cut most pairs."""
    config = MistralConfig(**_config_kwargs({"sliding_window": sliding_window, **overrides}))
    return _build(MistralForCausalLM, config, seed, dtype)


def _sentence(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def tiny_rows(n: int = 16, seed: int = 0, pairs_per_prompt: int = 2) -> list[dict]:
    """n rows of plain text with columns prompt, chosen, rejected; neighbours share a prompt."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        if i % pairs_per_prompt == 0:
            prompt = f"Question: {_sentence(rng, 2, 12)}? \n\nAnswer:"
        rows.append(
            {
                "prompt": prompt,
                "chosen": " yes " + _sentence(rng, 1, 16),
                "rejected": " no " + _sentence(rng, 1, 16),
            }
        )
    return rows


def tiny_chat_rows(n: int = 16, seed: int = 0, pairs_per_prompt: int = 2) -> list[dict]:
    """The rows of `tiny_rows` as conversations; every third prompt has an earlier turn."""
    rows = []
    for i, row in enumerate(tiny_rows(n, seed, pairs_per_prompt)):
        prompt = [{"role": "user", "content": row["prompt"]}]
        if (i // pairs_per_prompt) % 3 == 2:
            prompt = [
                {"role": "user", "content": "where is the cat"},
                {"role": "assistant", "content": "under the tree"},
                *prompt,
            ]
        rows.append(
            {
                "prompt": prompt,
                "chosen": [{"role": "assistant", "content": row["chosen"].strip()}],
                "rejected": [{"role": "assistant", "content": row["rejected"].strip()}],
            }
        )
    return rows


def tiny_examples(n: int) -> list[dict]:
    """`n` rows of unpaired data, about two in three desirable."""
    return [
        {
            "prompt": row["prompt"],
            "completion": row["rejected" if i % 3 == 1 else "chosen"],
            "label": i % 3 != 1,
        }
        for i, row in enumerate(tiny_rows(n, seed=3, pairs_per_prompt=1))
    ]


def tiny_pairs(
    n: int = 8,
    seed: int = 0,
    *,
    vocab_size: int = 400,
    prompt_lengths: tuple[int, int] = (1, 24),
    response_lengths: tuple[int, int] = (1, 20),
    pairs_per_prompt: int = 1,
) -> TokenizedPairs:
    """n pairs of random token ids in [3, vocab_size); lengths are inclusive ranges.

    `pairs_per_prompt` neighbours share a prompt. Chosen and rejected always differ.
    """
    rng = np.random.default_rng(seed)

    def draw(bounds: tuple[int, int]) -> list[int]:
        length = rng.integers(bounds[0], bounds[1] + 1)
        return rng.integers(3, vocab_size, length).tolist()

    prompts, chosens, rejecteds = [], [], []
    for i in range(n):
        prompts.append(draw(prompt_lengths) if i % pairs_per_prompt == 0 else prompts[-1])
        chosens.append(draw(response_lengths))
        rejected = draw(response_lengths)
        while rejected == chosens[-1]:
            rejected = draw(response_lengths)
        rejecteds.append(rejected)
    return TokenizedPairs.from_lists(prompts, chosens, rejecteds)


def message(role, content) -> dict:
    return {"role": role, "content": content}


def tokenize(rows, tokenizer, max_length: int | None = 256, **kwargs):
    return tokenize_pairs(rows, tokenizer, max_length=max_length, progress=False, **kwargs)


def triple(pairs: TokenizedPairs, i: int = 0) -> list[list[int]]:
    """The ids of pair i: prompt, chosen, rejected."""
    return [pairs.prompt(i).tolist(), pairs.chosen(i).tolist(), pairs.rejected(i).tolist()]


def texts(pairs: TokenizedPairs, tokenizer, i: int = 0) -> tuple[str, ...]:
    return tuple(tokenizer.decode(ids) for ids in triple(pairs, i))
