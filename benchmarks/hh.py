"""Real pairs for `fastdpo train`: Anthropic HH with a tokenizer and a 2M Llama made from it.

`python -m benchmarks.hh` splits off a tenth of the prompts, trains a byte-level BPE tokenizer on
the rest, warms a small Llama up as a language model of it, and writes `data/` and `model/`; then
it prints the command that trains. With --train it runs that command and says what came of it.
Nothing is downloaded. The dialogues contain offensive text: none of it is printed.
"""

import argparse
import gzip
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastdpo.data_formats import read_row

from . import ROOT, child_environment
from .harness import command_line, environment, table, write_json

DATA = ROOT.parent / "shared" / "data" / "hh-rlhf"
FILE = "harmless-base-test.jsonl.gz"
VOCAB_SIZE = 8000
RECIPE = "benchmarks/hh.yaml"


def read_pairs(folder: Path = DATA) -> list[dict[str, str]]:
    """The rows as published: `chosen` and `rejected`, each a whole dialogue.

    Raises `FileNotFoundError` naming the file and where it comes from.
    """
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no HH pairs at {path}; pass --data the folder that holds {FILE}, the file "
            "harmless-base/test.jsonl.gz of github.com/anthropics/hh-rlhf"
        )
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def explicit_rows(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """The usable rows as `prompt`, `chosen`, `rejected`; bad ones (an empty response) left out.

    The responses begin with their space, and the prompt ends with "Assistant:".
    """
    pairs = [read_row(row, "hh", has_chat_template=False) for row in rows]
    return [
        {"prompt": str(p.prompt), "chosen": str(p.chosen), "rejected": str(p.rejected)}
        for p in pairs
        if p.problem is None
    ]


def split_by_prompt(
    rows: Sequence[dict[str, str]], *, share: float = 0.1, seed: int = 0
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(train, held out): about `share` of the rows are held out.

    Dialogues that open alike are kept on one side, so no held-out question was trained on.
    """
    openings = sorted({_opening(row) for row in rows})
    random.Random(seed).shuffle(openings)
    held_out = set(openings[: round(share * len(openings))])
    return (
        [row for row in rows if _opening(row) not in held_out],
        [row for row in rows if _opening(row) in held_out],
    )


def _opening(row: dict[str, str]) -> str:
    return row["chosen"].split("\n\nAssistant:", 1)[0]


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `texts`, without a BOS token; pad and EOS differ."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=1024,
    )


def small_llama(vocab_size: int = VOCAB_SIZE, seed: int = 0) -> LlamaForCausalLM:
    """A Llama of 2.0M parameters: 5 layers of width 128, grouped queries, tied embeddings."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def warm_start(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    *,
    epochs: int,
    learning_rate: float = 3e-3,
    block: int = 256,
    blocks_per_step: int = 8,
    seed: int = 0,
) -> list[float]:
    """Trains `model` on `texts` as a language model; returns the mean loss of each epoch.

    The texts are laid end to end, each closed by EOS, and cut into blocks. AdamW under a cosine
    schedule. Preferences are no part of it: chosen and rejected dialogues count alike.
    """
    eos = str(tokenizer.eos_token)
    encoded = tokenizer([text + eos for text in texts])["input_ids"]
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1)
    n_blocks = sum(map(len, encoded)) // block
    n_steps = max(epochs * (n_blocks // blocks_per_step), 1)
    warmup = max(n_steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warmup, 0.5 * (1 + math.cos(math.pi * i / n_steps)) + 1e-3),
    )
    model.train()
    losses = []
    with tqdm(total=n_steps, desc="Language model", unit="step") as bar:
        for _ in range(epochs):
            rng.shuffle(encoded)
            flat = torch.tensor([token for ids in encoded for token in ids])
            blocks = flat[: n_blocks * block].view(-1, block)
            epoch_losses = []
            for i in range(0, n_blocks - blocks_per_step + 1, blocks_per_step):
                batch = blocks[i : i + blocks_per_step]
                loss = model(input_ids=batch, labels=batch, use_cache=False).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                epoch_losses.append(float(loss.detach()))
                bar.update()
                bar.set_postfix(loss=f"{epoch_losses[-1]:.3f}")
            losses.append(sum(epoch_losses) / max(len(epoch_losses), 1))
    model.eval()
    return losses


def prepare(output_dir: Path, *, data: Path, epochs: int, seed: int) -> None:
    """Writes `data/train.jsonl`, `data/test.jsonl` and `model/` below `output_dir`."""
    rows = read_pairs(data)
    train, held_out = split_by_prompt(rows, seed=seed)
    (output_dir / "data").mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("test", held_out)):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (output_dir / "data" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    texts = [row[side] for row in train for side in ("chosen", "rejected")]
    tokenizer = train_tokenizer(texts)
    model = small_llama(len(tokenizer), seed=seed)
    started = time.perf_counter()
    losses = warm_start(model, tokenizer, texts, epochs=epochs, seed=seed)
    model.save_pretrained(output_dir / "model")
    tokenizer.save_pretrained(output_dir / "model")
    curve = " -> ".join(f"{loss:.3f}" for loss in losses) or "untrained"
    print(
        f"{len(train)} pairs to train on, {len(held_out)} held out; a Llama of "
        f"{model.num_parameters() / 1e6:.2f}M parameters, vocabulary {len(tokenizer)}; "
        f"language model loss by epoch: {curve} ({time.perf_counter() - started:.0f} s)"
    )


def train_command(output_dir: Path, *options: str) -> list[str]:
    """The arguments of `fastdpo` that train on what `prepare` wrote."""
    return [
        "train",
        RECIPE,
        "--model_name_or_path", str(output_dir / "model"),
        "--dataset_name", str(output_dir / "data"),
        "--output_dir", str(output_dir / "run"),
        *options,
    ]  # fmt: skip


EVALUATED = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen")


def outcome(output_dir: Path) -> dict[str, Any]:
    """What a run came to: its losses, its evaluations, and what chance and length alone would get.

    `loss_first`, `loss_last`: means over the first and the last tenth of the logs. `evaluations`:
    by step, the held-out pairs. `p_chance`: the probability that guessing does as well.
    """
    log = output_dir / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    tenth = max(len(losses) // 10, 1)
    evaluations = {x["step"]: {key: x[key] for key in EVALUATED} for x in lines if "eval_loss" in x}
    held_out = (output_dir / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = explicit_rows(json.loads(line) for line in held_out)
    accuracy = evaluations[max(evaluations)]["eval_rewards/accuracies"]
    return {
        "loss_first": sum(losses[:tenth]) / tenth,
        "loss_last": sum(losses[-tenth:]) / tenth,
        "n_held_out": len(pairs),
        "accuracy": accuracy,
        "p_chance": above_chance(accuracy, len(pairs)),
        "accuracy_of_the_shorter": sum(len(p["chosen"]) < len(p["rejected"]) for p in pairs)
        / len(pairs),
        "evaluations": evaluations,
    }


def above_chance(accuracy: float, n: int) -> float:
    """The probability that guessing gets at least `accuracy` of `n` pairs right."""
    hits = round(accuracy * n)
    return sum(math.comb(n, k) for k in range(hits, n + 1)) / 2**n


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hh", description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder that holds " + FILE)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/hh"))
    parser.add_argument("--epochs", type=int, default=3, help="of the language model")
    parser.add_argument("--seed", type=int, default=0, help="of split, weights and order")
    parser.add_argument("--train", action="store_true", help="run the command that is printed")
    options = parser.parse_args(argv)
    try:
        prepare(options.output_dir, data=options.data, epochs=options.epochs, seed=options.seed)
    except OSError as error:
        parser.exit(2, f"hh: error: {error}\n")
    command = train_command(options.output_dir)
    print("\nfastdpo " + " ".join(command) + "\n")
    if not options.train:
        return 0
    code = subprocess.run(
        [sys.executable, "-m", "fastdpo", *command], env=child_environment(), check=False
    ).returncode
    if code == 0:
        report(options.output_dir, command_line("benchmarks.hh", argv))
    return code


def report(output_dir: Path, command: str) -> None:
    """Prints the outcome of `output_dir/run`, and writes it to `output_dir/hh.json`."""
    found = outcome(output_dir)
    write_json(
        output_dir / "hh.json", {"environment": environment(torch.device("cpu"), command), **found}
    )
    n, accuracy = found["n_held_out"], found["accuracy"]
    rows = [[step, *values.values()] for step, values in found["evaluations"].items()]
    print(table(["step", *EVALUATED], rows))
    print(
        f"training loss: {found['loss_first']:.4f} over the first tenth of the logs, "
        f"{found['loss_last']:.4f} over the last\n"
        f"held out: {round(accuracy * n)} of {n} pairs have the higher reward on the chosen "
        f"response ({accuracy:.1%}); guessing gets that many with probability "
        f"{found['p_chance']:.1g}; taking the shorter response gets "
        f"{found['accuracy_of_the_shorter']:.1%}"
    )


if __name__ == "__main__":
    sys.exit(main())
