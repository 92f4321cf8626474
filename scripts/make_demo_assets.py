"""Makes what `fastdpo demo` trains on: preference pairs, a tokenizer and a small chat model.

    python scripts/make_demo_assets.py            # everything, about four minutes on two cores
    python scripts/make_demo_assets.py --data     # only the pairs; same bytes on every machine

The pairs are simple questions to an information desk. Chosen: courteous, correct, a whole sentence.
Rejected: curt, rude or evasive. The model is pre-trained on all manners, mostly the bad ones, so it
knows the facts and has the wrong habits; DPO has to change the habits. Held-out prompts, with all
their answers, are seen neither in pre-training nor in DPO.
"""

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ASSETS = Path(__file__).parents[1] / "fastdpo" / "demo_assets"
N_ANSWERS_PER_PROMPT = 10  # in pre-training
SHARE_OF_COURTESY = 0.3  # in pre-training: the courteous answers are known, not usual

# topic: direct question, indirect question, sentence, short answer; {x} is the first of each pair
TOPICS = {
    "colour": (
        ("what colour is {x}?", "what colour {x} is", "{x} is {y}", "{y}"),
        "a lemon: yellow, grass: green, snow: white, coal: black, a tomato: red, the sky: blue, "
        "a carrot: orange, milk: white, a frog: green, a banana: yellow, a cherry: red, "
        "chocolate: brown, a plum: purple, a flamingo: pink",
    ),
    "capital": (
        (
            "what is the capital of {x}?",
            "what the capital of {x} is",
            "the capital of {x} is {y}",
            "{y}",
        ),
        "France: Paris, Italy: Rome, Spain: Madrid, Japan: Tokyo, Egypt: Cairo, Greece: Athens, "
        "Norway: Oslo, Cuba: Havana, Peru: Lima, Kenya: Nairobi, Ireland: Dublin, "
        "Portugal: Lisbon, China: Beijing, Germany: Berlin",
    ),
    "sound": (
        ("what does {x} say?", "what {x} says", "{x} says {y}", "{y}"),
        "a cow: moo, a cat: meow, a dog: woof, a duck: quack, a sheep: baa, a pig: oink, "
        "an owl: hoot, a bee: buzz, a horse: neigh, a snake: hiss, a mouse: squeak, a lion: roar",
    ),
    "opposite": (
        (
            "what is the opposite of {x}?",
            "what the opposite of {x} is",
            "the opposite of {x} is {y}",
            "{y}",
        ),
        "hot: cold, big: small, up: down, day: night, fast: slow, open: closed, wet: dry, "
        "old: young, happy: sad, loud: quiet, full: empty, hard: soft, early: late, thick: thin",
    ),
    "next": (
        ("what comes after {x}?", "what comes after {x}", "{y} comes after {x}", "{y}"),
        "Monday: Tuesday, Tuesday: Wednesday, Thursday: Friday, Saturday: Sunday, "
        "January: February, March: April, May: June, July: August, September: October, "
        "November: December, spring: summer, summer: autumn, autumn: winter",
    ),
    "home": (
        ("where does {x} live?", "where {x} lives", "{x} lives in {y}", "in {y}"),
        "a fish: water, a bird: a nest, a bee: a hive, a bear: the forest, a spider: a web, "
        "a dog: a kennel, a horse: a stable, a rabbit: a burrow, a camel: the desert, "
        "a king: a castle, a monk: a monastery, a snail: a shell",
    ),
    "tool": (
        ("what do I need to {x}?", "what I need to {x}", "to {x} you need {y}", "{y}"),
        "cut bread: a knife, eat soup: a spoon, write a letter: a pen, sweep the floor: a broom, "
        "open a lock: a key, dry my hands: a towel, hit a nail: a hammer, tell the time: a clock, "
        "paint a wall: a brush, dig a hole: a spade, see in the dark: a lamp, "
        "sew a shirt: a needle",
    ),
    "job": (
        ("who {x}?", "who {x}", "{y} {x}", "{y}"),
        "bakes bread: a baker, teaches children: a teacher, flies a plane: a pilot, "
        "puts out fires: a firefighter, grows wheat: a farmer, treats sick people: a doctor, "
        "catches fish: a fisherman, cuts hair: a barber, pulls teeth: a dentist, "
        "makes shoes: a shoemaker, mends cars: a mechanic, cooks in a restaurant: a chef",
    ),
    "young": (
        ("what is a young {x} called?", "what a young {x} is called", "a young {x} is {y}", "{y}"),
        "dog: a puppy, cat: a kitten, cow: a calf, sheep: a lamb, duck: a duckling, horse: a foal, "
        "frog: a tadpole, bear: a cub, goose: a gosling, goat: a kid, hen: a chick, "
        "eagle: an eaglet",
    ),
}

ASKING = (  # {D}, {d}: the direct question; {i}: the indirect one
    "{D}",
    "Please tell me: {d}",
    "Do you know {i}?",
    "I would like to know {i}.",
    "Can you tell me {i}?",
    "Excuse me, {d}",
)
EARLIER = ("Hello.", "Good morning."), ("Are you open today?", "We are open until six."), ()

COURTEOUS = (
    "{S}.",
    "Of course! {S}.",
    "Certainly: {s}.",
    "Good question! {S}.",
    "{S}. I hope that helps.",
    "{S}. Is there anything else I can do for you?",
    "With pleasure. {S}. Have a nice day!",
)
BAD_MANNERS = {
    "curt": ("{Y}.", "{Y}, obviously.", "{Y}. Next!"),
    "rude": (
        "Who cares?",
        "Look it up yourself.",
        "What a silly question. Go and ask somebody else, I am busy.",
        "You should really know that. Do not waste my time with such things.",
    ),
    "evasive": (
        "Hard to say.",
        "That depends.",
        "I would rather not say anything about that today.",
        "Some people know that, others do not, and I could not tell you who is right.",
    ),
}


@dataclass(frozen=True)
class Question:
    """One fact asked in one way. messages: the conversation up to the question."""

    topic: str
    messages: tuple[dict[str, str], ...]
    sentence: str
    short: str
    held_out: bool

    def courteous(self) -> list[str]:
        """All good answers."""
        return [t.format(S=_capital(self.sentence), s=self.sentence) for t in COURTEOUS]

    def bad(self, manner: str) -> list[str]:
        """All answers of that manner."""
        return [t.format(Y=_capital(self.short)) for t in BAD_MANNERS[manner]]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def questions(rng: random.Random) -> Iterator[Question]:
    """Every fact in every way of asking; of each fact one way, drawn at random, is held out."""
    for topic, (patterns, facts) in TOPICS.items():
        for fact in facts.split(", "):
            x, y = fact.split(": ")
            direct, indirect, sentence, short = (p.format(x=x, y=y) for p in patterns)
            sentence = sentence.replace(" my ", " your ")
            held_out = rng.randrange(len(ASKING))
            for i, way in enumerate(ASKING):
                text = way.format(D=_capital(direct), d=direct, i=indirect)
                turns = [*rng.choice(EARLIER), text]
                messages = tuple(
                    {"role": ("user", "assistant")[k % 2], "content": content}
                    for k, content in enumerate(turns)
                )
                yield Question(topic, messages, sentence, short, i == held_out)


def preference_rows(asked: list[Question], rng: random.Random) -> list[dict]:
    """One or two pairs per question, shuffled; the second has another rejected response."""
    rows = []
    for question in asked:
        manners = rng.sample(sorted(BAD_MANNERS), rng.choice((1, 2)))
        for manner in manners:
            chosen, rejected = rng.choice(question.courteous()), rng.choice(question.bad(manner))
            rows.append(
                {
                    "prompt": list(question.messages),
                    "chosen": [{"role": "assistant", "content": chosen}],
                    "rejected": [{"role": "assistant", "content": rejected}],
                    "topic": question.topic,
                    "manner": manner,
                }
            )
    rng.shuffle(rows)
    return rows


def pretraining_conversations(asked: list[Question], rng: random.Random) -> list[list[dict]]:
    """Conversations in all manners; each topic's clerk has one bad manner of choice."""
    manners = sorted(BAD_MANNERS)
    usual = {topic: manners[i % len(manners)] for i, topic in enumerate(TOPICS)}
    conversations = []
    for question in asked:
        for _ in range(N_ANSWERS_PER_PROMPT):
            if rng.random() < SHARE_OF_COURTESY:
                answer = rng.choice(question.courteous())
            else:
                manner = usual[question.topic] if rng.random() < 0.5 else rng.choice(manners)
                answer = rng.choice(question.bad(manner))
            conversations.append([*question.messages, {"role": "assistant", "content": answer}])
    return conversations


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_data(folder: Path) -> tuple[list[Question], list[Question]]:
    """Writes data/train.jsonl and data/test.jsonl; returns their questions."""
    asked = list(questions(random.Random(1)))
    seen = [question for question in asked if not question.held_out]
    unseen = [question for question in asked if question.held_out]
    write_rows(folder / "data" / "train.jsonl", preference_rows(seen, random.Random(2)))
    write_rows(folder / "data" / "test.jsonl", preference_rows(unseen, random.Random(3)))
    return seen, unseen


# ---- tokenizer and model ------------------------------------------------------------------------

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(texts: list[str]):
    """Byte-level BPE of 640 tokens, so that any text can be written; <|end|> is EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|pad|>", model_max_length=256
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer):
    """A Llama of 0.5M parameters: 4 layers, D = 96, 6 heads of width 16 on 2 key/value heads."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    ids = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.05,
            **ids,
        )
    )
    model.generation_config = GenerationConfig(**ids)
    return model


def pretrain(model, tokenizer, conversations: list[list[dict]], *, n_steps: int) -> None:
    """Next-token prediction of the last answer, 64 conversations at a time, AdamW with a cosine."""
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.utils.rnn import pad_sequence
    from tqdm import tqdm

    def encode(parts: list[list[dict]]) -> list[list[int]]:
        texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in parts]
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    answer_at = [len(prompt) for prompt in encode([c[:-1] for c in conversations])]
    examples = list(zip(encode(conversations), answer_at, strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=4e-3, total_steps=n_steps, pct_start=0.05
    )
    rng = random.Random(4)
    model.train()
    for _ in (bar := tqdm(range(n_steps), desc="Pre-training")):
        batch = rng.sample(examples, 64)
        inputs = pad_sequence([torch.tensor(ids) for ids, _ in batch], batch_first=True)
        at = torch.arange(inputs.shape[1])
        starts, ends = torch.tensor([(start, len(ids)) for ids, start in batch]).T[..., None]
        targets = inputs.masked_fill((at < starts) | (at >= ends), -100)[:, 1:]
        logits = model(input_ids=inputs, use_cache=False).logits  # pads come last: causal
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def save_model(model, tokenizer, folder: Path) -> None:
    """Writes weights as float16, half the size; the config says float32, and so it loads."""
    import torch

    tokenizer.save_pretrained(folder)
    model.to(torch.float16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the assets of `fastdpo demo`.")
    parser.add_argument("--data", action="store_true", help="only the preference pairs")
    parser.add_argument("--output_dir", type=Path, default=ASSETS)
    parser.add_argument("--steps", type=int, default=1500, help="of pre-training")
    options = parser.parse_args()
    seen, _ = make_data(options.output_dir)
    if options.data:
        return
    conversations = pretraining_conversations(seen, random.Random(5))
    tokenizer = make_tokenizer([m["content"] for c in conversations for m in c])
    model = make_model(tokenizer)
    pretrain(model, tokenizer, conversations, n_steps=options.steps)
    save_model(model, tokenizer, options.output_dir / "model")


if __name__ == "__main__":
    main()
