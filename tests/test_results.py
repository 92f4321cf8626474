"""What a run leaves to people: the report, samples, the model card, exports and uploads."""

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo import cli
from fastdpo.config_files import write_yaml
from fastdpo.errors import CheckpointError, ConfigError, DataError
from fastdpo.model_card import MARK, Card
from tests.tiny import tiny_llama, tiny_pairs, tiny_rows, tiny_tokenizer
from tests.tiny_trainer import bare_config, hidden_package, trainer

REAL_API = huggingface_hub.HfApi
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny model in bf16, data, and two runs on them: `lora` and `full`."""
    pytest.importorskip("datasets", reason="datasets is not installed")
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer), dtype=torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for split, rows in (("train", tiny_rows(12)), ("test", tiny_rows(6, seed=1))):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data" / f"{split}.jsonl").write_text(lines)
    common = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "data"),
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    write_yaml(folder / "full.yaml", {**common, "beta": 0.3})
    samples = {"num_sample_prompts": 2, "sample_max_new_tokens": 5}
    write_yaml(folder / "lora.yaml", {**common, **samples, "use_peft": True, "lora_r": 4})
    for name in ("lora", "full"):
        run = str(folder / name)
        assert cli.main(["train", str(folder / f"{name}.yaml"), "--output_dir", run]) == 0
    return folder


def error_of(capsys, *words: str) -> str:
    """The one line that a command which must fail says."""
    assert cli.main([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("fastdpo: error: ")
    return line


# ---- samples ------------------------------------------------------------------------------------


def test_samples_are_greedy_answers_to_the_same_prompts(base):
    samples = [json.loads(line) for line in (base / "lora" / "samples.jsonl").open()]
    assert [sample["step"] for sample in samples] == [2, 2, 4, 4]
    assert samples[0]["prompt"] == samples[2]["prompt"] != samples[1]["prompt"]
    model: Any = AutoPeftModelForCausalLM.from_pretrained(base / "lora", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(base / "lora")
    prompt = samples[2]["prompt"].removeprefix("<s>").lstrip(" ")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    for _ in range(5):  # by hand, without a cache
        with torch.no_grad():
            token = model(input_ids=ids).logits[0, -1].argmax()
        if int(token) == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, token[None, None]], 1)
    start = len(tokenizer(prompt)["input_ids"])
    assert samples[2]["response"] == tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_sample_prompts_of_a_file(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    sets = {"eval_dataset": tiny_pairs(2, seed=3), "processing_class": tiny_tokenizer()}
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "what is"}\n{"prompt": "the cat"}\n')
    made = trainer(tmp_path, sample_prompts=str(path), num_sample_prompts=1, **options, **sets)
    made.train()
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["<s>what is"]
    path.write_text('{"prompt": "what is"}\n{"question": "the cat"}\n')
    with pytest.raises(DataError, match='line 2: expected {"prompt": …}, got'):
        trainer(tmp_path, sample_prompts=str(path), **options, **sets)
    with pytest.raises(DataError, match="nowhere' can't be read: No such file"):
        trainer(tmp_path, sample_prompts="nowhere", **options, **sets)
    with pytest.raises(ConfigError, match="there is no tokenizer"):
        trainer(tmp_path, num_sample_prompts=1, **options, eval_dataset=sets["eval_dataset"])
    with pytest.raises(ConfigError, match="name a file with sample_prompts"):
        trainer(tmp_path, num_sample_prompts=1, **options, processing_class=tiny_tokenizer())


def test_samples_that_would_never_be_written_are_refused():
    for asked in ({"sample_prompts": "prompts.txt"}, {"num_sample_prompts": 1}):
        (name,) = asked
        with pytest.raises(ConfigError, match=f"'{name}' are answered at evaluations"):
            bare_config(**asked)
        bare_config(**asked, eval_on_start=True)
        bare_config(**asked, eval_strategy="epoch", sample_max_new_tokens=8)
    with pytest.raises(ConfigError, match="'sample_max_new_tokens' is how long samples get"):
        bare_config(eval_strategy="epoch", sample_max_new_tokens=8)


# ---- the report ---------------------------------------------------------------------------------


def test_a_report_of_one_run_is_one_file_with_everything(base, capsys):
    (base / "lora" / "plan.json").write_text(
        json.dumps(
            {
                "memory_bytes": {"weights": 2**20, "gradients": 2**19},
                "peak_bytes": 2**21,
                "measured_peak_bytes": 2**21 + 2**18,
            }
        )
    )
    assert cli.main(["report", str(base / "lora")]) == 0
    page = (base / "lora" / "report.html").read_text()
    assert str(base / "lora" / "report.html") in capsys.readouterr().out
    pictures = sorted(path.name for path in (base / "lora" / "report_png").iterdir())
    assert all((base / "lora/report_png" / name).read_bytes().startswith(PNG) for name in pictures)
    for name in ("loss", "margins", "accuracies", "rewards", "learning_rate", "grad_norm",
                 "throughput", "memory", "memory_by_kind", "waste"):  # fmt: skip
        assert f"{name}.png" in pictures and f'alt="{name}"' in page
    assert page.count("data:image/png;base64,") == len(pictures)
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing is fetched
    assert "peak memory 0.00 GiB, 12% above the plan" in page
    assert "train data: 12 rows -&gt; 12 pairs" in page and "lora_r" in page
    assert "<th>first answer</th>" in page and "step 4" in page


def test_a_report_of_several_runs_overlays_them(base, tmp_path):
    fallen = tmp_path / "fallen"
    fallen.mkdir()
    log = {"step": 1, "loss": 0.5, "rewards/chosen": -1.5, "rewards/margins": 0.2}
    lines = json.dumps(log) + "\n" + json.dumps({**log, "step": 2, "skipped_steps": 3})
    (fallen / "metrics.jsonl").write_text(lines + "\n" + '{"step": 3, "lo')  # killed in a line
    page = tmp_path / "page.html"
    runs = [str(base / "lora"), str(base / "full"), str(fallen)]
    assert cli.main(["report", *runs, "-o", str(page)]) == 0
    text = page.read_text()
    assert "<th>lora</th><th>full</th><th>fallen</th>" in text
    assert "fallen: the reward of chosen responses is -1.500 at step 2, below 0" in text
    assert "rpo_alpha: 1" in text and "loss_type: [sigmoid, sft]" in text
    assert "fallen: 3 steps were not finite" in text
    assert "<tr><td>beta</td><td>0.1</td><td>0.3</td>" in text  # what differs
    assert "<td>max_steps</td><td>4</td><td>4</td><td></td>" in text
    assert cli.main(["report", *runs, "-o", str(page)]) == 0  # its own page may be replaced


def test_bad_runs_are_one_line_errors(base, tmp_path, capsys):
    good = str(base / "full")
    assert "'nowhere' does not exist" in error_of(capsys, "report", good, "nowhere")
    assert "holds no metrics.jsonl" in error_of(capsys, "report", base / "data")
    (tmp_path / "metrics.jsonl").write_text("")
    assert "has logged nothing yet" in error_of(capsys, "report", tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[2]\n{"step": 3}\n')
    assert "line 2: expected an object with a step, got '[2]" in error_of(
        capsys, "report", tmp_path
    )
    assert "named twice" in error_of(capsys, "report", good, good)
    assert "takes RUN" in error_of(capsys, "report")
    (tmp_path / "thesis.html").write_text("<html>precious</html>")
    other = error_of(capsys, "report", good, "-o", tmp_path / "thesis.html")
    assert "is no report of fastdpo's" in other
    assert (tmp_path / "thesis.html").read_text() == "<html>precious</html>"
    assert "can't be written" in error_of(capsys, "report", good, "-o", "/dev/null/r.html")
    assert "is a folder" in error_of(capsys, "report", good, "-o", tmp_path)


# ---- card and export ----------------------------------------------------------------------------


def test_the_model_card(base):
    for name, library in (("lora", "peft"), ("full", "transformers")):
        text = (base / name / "README.md").read_text()
        _, head, body = text.split("---\n", 2)
        card = yaml.safe_load(head)
        assert card["library_name"] == library and "dpo" in card["tags"]
        assert "base_model" not in card  # a folder of this machine, which the hub would refuse
        assert MARK in body and str(base / "model") in body and str(base / "data") in body
        assert "| eval_loss | 0." in body and "train data: 12 rows -> 12 pairs" in body
        assert "| beta | `" in body and "| learning_rate | `0.01` |" in body
        assert "from_pretrained(" in body and "[More Information Needed]" not in body
        assert "Question:" not in body  # no row of the data


def test_a_card_says_only_what_is_known():
    text = Card("clerk", "me/base", adapter=False, options={}).text()
    assert "## Loading" in text and "## Options" not in text and "## Data" not in text


def test_a_card_of_ones_own_stays(tmp_path):
    made = trainer(tmp_path, max_steps=1)
    made.train()
    (tmp_path / "run" / "README.md").write_text("mine")
    made.save_model()
    assert (tmp_path / "run" / "README.md").read_text() == "mine"
    (tmp_path / "run" / "README.md").unlink()
    made.create_model_card(model_name="clerk", dataset_name="me/pairs", tags="polite")
    text = (tmp_path / "run" / "README.md").read_text()
    assert "# clerk" in text and "- me/pairs" in text and "- polite" in text


def test_export_copies_an_adapter(base, tmp_path):
    out = tmp_path / "out"
    assert cli.main(["export", str(base / "lora"), "-o", str(out)]) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (base / "lora" / name).read_bytes()
    assert not (out / "metrics.jsonl").exists() and "eval_loss" in (out / "README.md").read_text()
    AutoPeftModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_export_merges_in_fp32_and_rounds_once(base, tmp_path, dtype, caplog):
    out = tmp_path / "out"
    words = ["--dtype", dtype] if dtype else []
    assert cli.main(["export", str(base / "lora"), "-o", str(out), "--merge", *words]) == 0
    assert "no record of how its base was loaded" not in caplog.text
    merged: Any = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert merged.dtype == (torch.float32 if dtype else torch.bfloat16)  # as the base is saved
    adapted: Any = AutoPeftModelForCausalLM.from_pretrained(base / "lora", dtype="float32")
    adapted = adapted.merge_and_unload()
    for name, value in adapted.state_dict().items():
        assert torch.equal(merged.state_dict()[name], value.to(merged.dtype)), name
    assert not list(out.glob("adapter*"))
    AutoTokenizer.from_pretrained(out)
    assert "AutoModelForCausalLM" in (out / "README.md").read_text()


def test_export_of_a_whole_model_and_of_a_checkpoint(base, tmp_path):
    words = ["export", str(base / "full"), "-o", str(tmp_path / "a"), "--dtype", "bfloat16"]
    assert cli.main(words) == 0
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype="auto")
    assert model.dtype == torch.bfloat16
    checkpoint = base / "lora" / "checkpoint-2"
    assert cli.main(["export", str(checkpoint), "-o", str(tmp_path / "b"), "--merge"]) == 0
    assert not (tmp_path / "b" / "optimizer.pt").exists()


def test_exports_that_are_refused(base, tmp_path, capsys):
    out = tmp_path / "out"
    lora, full = base / "lora", base / "full"
    for words, said in (
        (["nowhere", "-o", out], "'nowhere' does not exist"),
        ([base, "-o", out], "holds no saved model or adapter"),
        ([full, "-o", out, "--merge"], "holds a whole model; leave it out"),
        ([lora, "-o", out, "--dtype", "float16"], "add --merge"),
        ([lora, "-o", full], "exists; choose a new folder"),
        ([lora, "-o", "/dev/null/x"], "/dev/null/x"),
        ([lora], "the following arguments are required: -o"),
        ([lora, "-o", out, "--dtype", "int3"], "invalid choice: 'int3'"),
        ([lora, "-o", out, "--private"], "--private is about --push_to_hub"),
    ):
        assert said in error_of(capsys, "export", *words), words
        assert not out.exists()
    config = yaml.safe_load((lora / "resolved_config.yaml").read_text())
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    for path in lora.glob("adapter*"):
        (quantized / path.name).write_bytes(path.read_bytes())
    for options, words in (
        ({"load_in_4bit": True}, "load_in_8bit need bitsandbytes: pip install 'fastdpo[qlora]'"),
        ({"base_precision": "8bit"}, "need bitsandbytes: pip install 'fastdpo[qlora]'"),
        ({"base_precision": "fp8"}, "8-bit floats (base_precision: fp8), .* without --merge"),
    ):
        write_yaml(quantized / "resolved_config.yaml", {**config, **options})
        with hidden_package("bitsandbytes"):
            said = error_of(capsys, "export", quantized, "-o", out, "--merge")
        assert re.search(words.replace("(", r"\(").replace(")", r"\)").replace("[", r"\["), said)
        assert not out.exists()


# ---- the hub ------------------------------------------------------------------------------------


class Hub:
    """Stands for huggingface_hub.HfApi: notes what it is asked for."""

    calls: list[tuple[str, dict[str, Any]]] = []
    refuses = False

    def create_repo(self, name, **kwargs):
        if self.refuses:
            raise OSError("403 Forbidden:\nnot yours")  # which HfHubHTTPError is one of
        self.calls.append(("create_repo", {"name": name, **kwargs}))
        return type("Repo", (), {"repo_id": f"me/{name}"})

    def create_branch(self, repo, **kwargs):
        self.calls.append(("create_branch", kwargs))

    def upload_folder(self, **kwargs):
        self.calls.append(("upload_folder", kwargs))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setattr(Hub, "calls", [])
    return Hub


def test_push_to_hub(hub, tmp_path, monkeypatch):
    options = {"push_to_hub": True, "hub_model_id": "clerk", "hub_private_repo": True}
    made = trainer(tmp_path, max_steps=1, hub_revision="v2", **options)
    made.train()
    assert hub.calls == []
    made.save_model(tmp_path / "elsewhere")
    assert hub.calls == []
    made.save_model()
    (_, repo), (_, branch), (_, upload) = hub.calls
    assert repo == {"name": "clerk", "private": True, "exist_ok": True}
    assert branch["branch"] == upload["revision"] == "v2" and upload["repo_id"] == "me/clerk"
    assert upload["folder_path"] == str(tmp_path / "run")
    assert "checkpoint-*" in upload["ignore_patterns"]
    monkeypatch.setattr(Hub, "refuses", True)
    with pytest.raises(CheckpointError, match="403 Forbidden: not yours; the result is whole in"):
        made.push_to_hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: REAL_API(endpoint="http://127.0.0.1:9"))
    with pytest.raises(CheckpointError, match="to 'clerk' failed: .*refused"):  # nobody listens
        made.push_to_hub()


def test_an_export_can_be_uploaded(hub, base, tmp_path, capsys):
    words = ["export", str(base / "lora"), "-o", str(tmp_path / "out"), "--push_to_hub", "clerk"]
    assert cli.main(words) == 0
    assert "https://huggingface.co/me/clerk" in capsys.readouterr().out
    assert hub.calls[-1][1]["folder_path"] == str(tmp_path / "out")


def test_what_can_not_be_uploaded_is_said_before_the_work(hub, base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="needs a token"):
        trainer(tmp_path, push_to_hub=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    out = tmp_path / "out"
    said = error_of(capsys, "export", base / "lora", "-o", out, "--push_to_hub", "me/x")
    assert "HF_HUB_OFFLINE is set" in said and not out.exists()
    with pytest.raises(ConfigError, match="'hub_model_id' is for uploads"):
        trainer(tmp_path, hub_model_id="me/x")
    with pytest.raises(ConfigError, match="'hub_token'.*hf auth login"):
        trainer(tmp_path, hub_token="hf_x")
