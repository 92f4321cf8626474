"""What the policy answers as it is trained: greedy responses to fixed prompts, at each evaluation.

They go to `samples.jsonl`, one a line, and from there into `fastdpo report`.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import DPOConfig
from .data import TokenizedPairs
from .errors import CheckpointError, ConfigError, DataError
from .reference_logps import evaluating


@dataclass(frozen=True)
class SamplePrompts:
    """Prompts as token ids, and how many tokens are written after each."""

    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: int

    @torch.no_grad()
    def answer(
        self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, device: Any
    ) -> list[dict[str, str]]:
        """The likeliest next token, again and again, until EOS; prompt and response as text."""
        answers = []
        generate: Any = model.generate
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        with evaluating(model):
            for prompt in self.prompts:
                ids = torch.tensor([prompt], device=device)
                output = generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=self.max_new_tokens,
                    do_sample=False,
                    **dict.fromkeys(("temperature", "top_p", "top_k")),  # a saved config's, unused
                    pad_token_id=pad,
                )
                response = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
                text = tokenizer.decode(list(prompt), skip_special_tokens=False)
                answers.append({"prompt": str(text), "response": str(response)})
        return answers


def sample_prompts(
    args: DPOConfig,
    eval_pairs: dict[str, TokenizedPairs],
    tokenizer: PreTrainedTokenizerBase | None,
) -> SamplePrompts | None:
    """The prompts that `args` ask for: a file's, or the first distinct ones that are evaluated on.

    Raises `ConfigError` or `DataError` where there are none.
    """
    if not args.sample_prompts and not args.num_sample_prompts:
        return None
    if tokenizer is None:
        raise ConfigError("samples are text, and there is no tokenizer; pass processing_class")
    if args.sample_prompts:
        prompts = [_ids(p, tokenizer) for p in _read(Path(args.sample_prompts))]
        return SamplePrompts(
            tuple(prompts[: args.num_sample_prompts or None]), args.sample_max_new_tokens
        )
    if not eval_pairs:
        raise ConfigError(
            "num_sample_prompts takes prompts of the evaluation set, and there is none; name a "
            "file with sample_prompts"
        )
    distinct: dict[tuple[int, ...], None] = {}
    for pairs in eval_pairs.values():
        for i in range(len(pairs)):
            prompt = tuple(pairs.prompt(i).tolist())
            if prompt and len(distinct) < args.num_sample_prompts:
                distinct[prompt] = None
    return SamplePrompts(tuple(distinct), args.sample_max_new_tokens)


def _ids(prompt: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    if isinstance(prompt, str):
        ids: Any = tokenizer(prompt)["input_ids"]
    else:
        encoded: Any = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=True
        )
        ids = encoded["input_ids"]
    if not ids:
        raise DataError(f"sample_prompts: the prompt {prompt!r} has no token")
    return tuple(ids)


def _read(path: Path) -> list[Any]:
    """A prompt a line: text, or in a .jsonl file {"prompt": text or messages}."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"sample_prompts {str(path)!r} can't be read: {reason}") from error
    if not lines:
        raise DataError(f"sample_prompts {str(path)!r} is empty; expected a prompt a line")
    if path.suffix != ".jsonl":
        return lines
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            prompts.append(json.loads(line)["prompt"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'sample_prompts {str(path)!r}, line {number}: expected {{"prompt": …}}, got '
                f"{line[:60]!r}"
            ) from error
    return prompts


class SamplesFile:
    """`samples.jsonl`: {"step", "prompt", "response"} a line."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, step: int, answers: list[dict[str, str]]) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                for answer in answers:
                    file.write(json.dumps({"step": step, **answer}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"{str(self.path)!r} can't be written: {error.strerror}; free space there and "
                "resume from the last checkpoint"
            ) from error

    def keep_until(self, step: int) -> None:
        """Drops what an interrupted run wrote after `step`."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self.path)
