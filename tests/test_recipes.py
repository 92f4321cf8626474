"""Recipes run as written, on stand-ins for what they download."""

import json
import math
from pathlib import Path

import pytest
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from fastdpo import cli
from tests.tiny import tiny_llama, tiny_rows, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("no_picture", "datasets_apart")


@pytest.fixture
def tutorial(tmp_path) -> Path:
    """The tutorial's fine-tuned Llama and its `data/rl`, both tiny."""
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "sft")
    tokenizer.save_pretrained(tmp_path / "sft")
    folder = tmp_path / "stack-exchange-paired" / "data" / "rl"
    folder.mkdir(parents=True)
    rows = [
        {
            "qid": i,
            "question": row["prompt"],
            "date": "2011/12/07",
            "metadata": ["https://stackoverflow.com"],
            "response_j": row["chosen"],
            "response_k": row["rejected"],
        }
        for i, row in enumerate(tiny_rows(200))
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "train-00000-of-00001.jsonl").write_text(lines)
    return tmp_path


def test_the_tutorial_of_llama_2_runs(tutorial, capsys, monkeypatch):
    """Trained, evaluated, checkpointed and saved; what is saved loads as an adapter on its base."""
    monkeypatch.chdir(tutorial)
    here = {  # what a CPU without bitsandbytes lacks, and a shorter run
        "load_in_4bit": "false",
        "optim": "adamw_torch",
        "use_cpu": "true",
        "dtype": "float32",
        "max_steps": "4",
        "warmup_steps": "1",
        "eval_steps": "2",
        "save_steps": "2",
        "logging_steps": "1",
        "disable_tqdm": "true",
    }
    words = [word for name, value in here.items() for word in (f"--{name}", value)]
    recipe = ["recipe:stack-exchange-llama2", "--model_name_or_path", "sft"]
    assert cli.main(["train", *recipe, "--output_dir", "run", *words]) == 0, capsys.readouterr().err
    logs = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    losses = [log["loss"] for log in logs if "loss" in log]
    assert len(losses) == 4 and losses[3] < losses[0]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)  # fp32; the adapter starts at zero
    assert [log["step"] for log in logs if "eval_rewards/accuracies" in log] == [2, 4]
    assert {"checkpoint-2", "checkpoint-4"} <= {path.name for path in Path("run").iterdir()}
    model = AutoPeftModelForCausalLM.from_pretrained("run").merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained("run")
    ids = tokenizer("Question: what\n\nAnswer: ", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] > ids.shape[1]
