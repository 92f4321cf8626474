"""The command line: one name space from file and flags, whole runs, and one-line errors."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastdpo
from fastdpo import cli
from fastdpo.config import DPOConfig, to_plain
from fastdpo.config_files import recipes, write_yaml
from fastdpo.errors import ConfigError, FastDPOError
from fastdpo.help import HELP_PARTS
from fastdpo.option_names import options_by_name
from tests.tiny import tiny_llama, tiny_rows, tiny_tokenizer
from tests.tiny_trainer import hidden_package

ROOT = Path(fastdpo.__file__).parents[1]


def parse(*words: str) -> dict[str, Any]:
    return cli.parse_arguments(words)


# ---- from words to options --------------------------------------------------------------------


def test_flags_of_every_kind():
    assert parse("--beta", "0.2", "--learning-rate=1e-6", "--run_name=a=b") == {
        "beta": "0.2",
        "learning_rate": "1e-6",
        "run_name": "a=b",
    }
    assert parse("--use_peft", "--bf16", "false", "--use_cpu=yes") == {
        "use_peft": True,
        "bf16": "false",
        "use_cpu": "yes",
    }
    assert parse("--max_steps", "-1", "--max_length", "none") == {
        "max_steps": "-1",
        "max_length": None,
    }
    wanted = {"lora_target_modules": ["q_proj", "k_proj", "v_proj"]}
    for words in (
        ["--lora_target_modules", "q_proj,k_proj,v_proj"],
        ["--lora_target_modules", "q_proj", "k_proj", "v_proj"],
        ["--lora_target_modules=q_proj,k_proj", "--lora_target_modules", "v_proj"],
    ):
        assert parse(*words) == wanted


def test_flags_win_over_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    write_yaml(path, {"beta": 0.5, "seed": 3})
    wanted = {"beta": "0.2", "seed": 3}
    assert parse(str(path), "--beta", "0.2") == wanted
    assert parse("--beta", "0.2", "--config", str(path)) == wanted
    with pytest.raises(ConfigError, match="two config files"):
        parse(str(path), "--config", str(path))
    # As a run's own resolved_config.yaml is repeated, in which every option stands.
    write_yaml(path, {"resume_from_checkpoint": None, "warmup_steps": 100})
    assert parse(str(path), "--resume", "auto") == {"warmup_steps": 100, "resume": "auto"}
    with_ratio = parse(str(path), "--warmup_ratio", "0.1")
    assert with_ratio == {"resume_from_checkpoint": None, "warmup_ratio": 0.1}
    assert DPOConfig.from_yaml(path, use_cpu=True, resume="auto").resume_from_checkpoint == "auto"


@pytest.mark.parametrize(
    "words, match",
    [
        (["--bta", "1"], "'bta'.*did you mean 'beta'"),
        (["--lora_rank", "8"], "'lora_rank'.*did you mean"),
        (["--beta"], "'--beta' expects a number > 0, and nothing follows"),
        (["--beta", "--use_peft"], "'--beta' expects"),
        (["--beta", "1", "2"], "unexpected argument '2'"),
        (["--beta", "1", "--beta", "2"], "'--beta' is given twice"),
        (["--use_peft", "true", "c.yaml"], "unexpected argument 'c.yaml'.*comes first"),
        (["recipe:hhh"], "'hhh'.*did you mean 'hh'"),
        (["--config"], "expects a file"),
    ],
)
def test_refused_words(words, match):
    with pytest.raises(ConfigError, match=match):
        parse(*words)


def test_options_reach_every_config_that_has_them():
    named = ("--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", "--use_cpu")
    script, model, config = cli.build_configs(
        parse(*named, "--attn_implementation", "sdpa", "--use_peft", "--lora_r", "4")
    )
    assert script.dataset_name == "d" and model.lora_r == 4
    assert model.attn_implementation == config.attn_implementation == "sdpa"
    cli.build_configs(parse(*named, "--fp16", "false"))
    off = ("--lora_r", "4", "--use_peft", "false")  # the switch of a file that has adapter options
    assert not cli.build_configs(parse(*named, *off))[1].use_peft
    for words, match in (
        (("--lora_r", "4"), "'lora_r' has no effect without 'use_peft'"),
        (("--beta", "-1"), "'beta' expects a number > 0"),
        (("--fsdp", "full_shard"), "'fsdp'.*not supported"),
        (("--padding_free",), "'padding_free'.*not supported"),
        (("--activation_checkpointing", "maybe"), "'gradient_checkpointing'"),
    ):
        with pytest.raises(ConfigError, match=match):
            cli.build_configs(parse(*named, *words))
    with pytest.raises(ConfigError, match="'dataset_name' is required"):
        cli.build_configs(parse("--model_name_or_path", "m"))
    with pytest.raises(ConfigError, match="'model_name_or_path' is required"):
        cli.build_configs(parse("--dataset_name", "d"))


@pytest.mark.parametrize("name", recipes())
def test_recipes_are_whole(name):
    script, model, _ = cli.build_configs(parse(f"recipe:{name}", "--output_dir", "o"))
    assert script.dataset_name and model.model_name_or_path


# ---- the process ------------------------------------------------------------------------------


def test_help_names_every_option(capsys):
    assert cli.main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"--{name} " in shown or f"--{name}\n" in shown for name in options_by_name())
    assert all(f"{part}:" in shown for part in HELP_PARTS.values())
    assert all(name in shown for name in recipes())
    assert all(len(line) <= 100 for line in shown.splitlines())
    assert "a whole number >= 1048576 or auto" in " ".join(shown.split())  # in full, no 1e+06
    assert cli.main(["precompute", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: fastdpo precompute ")
    assert cli.main([]) == 0 and "fastdpo demo" in capsys.readouterr().out


def test_status_of_errors(capsys, monkeypatch):
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == (
        f"fastdpo: error: unknown command 'trian'; there are {', '.join(cli.COMMANDS)}; "
        "did you mean 'train'?\n"
    )

    def interrupted(argv):
        raise KeyboardInterrupt

    def broken(argv):
        raise FastDPOError("two\n  lines")

    monkeypatch.setattr(cli, "_run", interrupted)
    assert cli.main([]) == 130
    monkeypatch.setattr(cli, "_run", broken)
    assert cli.main([]) == 2
    assert capsys.readouterr().err.endswith("fastdpo: error: two lines\n")


def test_without_datasets_its_absence_is_one_line(tmp_path, capsys):
    """What reads files is its own package; lists of rows need none (test_data.py)."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(tiny_rows(1)[0]) + "\n")
    words = ["--model_name_or_path", "m", "--dataset_name", str(rows), "--use_cpu"]
    with hidden_package("datasets"):
        assert cli.main(["train", *words, "--output_dir", str(tmp_path / "run")]) == 2
    shown = capsys.readouterr().err
    assert "fastdpo: error: reading a dataset needs the `datasets` package" in shown
    assert shown.endswith("; pip install datasets\n")


def test_python_m_fastdpo():
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fastdpo", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert run("--version").stdout == f"fastdpo {fastdpo.__version__}\n"
    failed = run("train", "--beta", "abc")
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr == "fastdpo: error: 'beta' expects a number > 0, got 'abc'\n"


# ---- whole runs -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with a tiny model, two splits of pairs, and a config that trains on them."""
    pytest.importorskip("datasets", reason="datasets is not installed")
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for split, rows in (("train", tiny_rows(16)), ("test", tiny_rows(8, seed=1))):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data" / f"{split}.jsonl").write_text(lines)
    write_yaml(
        folder / "config.yaml",
        {
            "model_name_or_path": str(folder / "model"),
            "dataset_name": str(folder / "data"),
            "use_cpu": True,
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "use_peft": True,
            "lora_r": 4,
            "learning_rate": "1e-3",
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "eval_strategy": "epoch",
        },
    )
    return folder


def train(base: Path, output_dir: Path, *words: str) -> int:
    return cli.main(["train", str(base / "config.yaml"), "--output_dir", str(output_dir), *words])


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_train_with_an_adapter(base, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(base, run, "--beta", "0.2") == 0
    shown = capsys.readouterr().out
    assert "trained 2 steps; held out: loss 0." in shown and str(run) in shown
    assert {"resolved_config.yaml", "metrics.jsonl", "curves.png"} <= set(files(run))
    logs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_rewards/accuracies" in log for log in logs)
    AutoPeftModelForCausalLM.from_pretrained(run)
    AutoTokenizer.from_pretrained(run)

    # The resolved config is the same run again, flags and all.
    resolved = yaml.safe_load((run / "resolved_config.yaml").read_text())
    assert resolved["beta"] == 0.2 and resolved["lora_r"] == 4
    assert resolved["dataset_name"] == str(base / "data")
    again = cli.build_configs(parse(str(run / "resolved_config.yaml")))
    assert to_plain(*again) == resolved

    # A second run into the same folder is refused and leaves it alone, unless asked for.
    before = files(run)
    assert train(base, run) == 2
    assert "already holds an earlier run" in capsys.readouterr().err
    assert files(run) == before
    assert train(base, run, "--overwrite_output_dir", "--eval_strategy", "no") == 0
    assert "held out" not in capsys.readouterr().out


def test_train_in_full_and_resume(base, tmp_path, capsys):
    full = ("--use_peft", "false", "--eval_strategy", "no", "--save_strategy", "steps")
    run = tmp_path / "run"
    assert train(base, run, *full, "--save_steps", "1") == 0
    AutoModelForCausalLM.from_pretrained(run)
    (run / "model.safetensors").unlink()
    resume = ("--resume_from_checkpoint", str(run / "checkpoint-1"))
    assert train(base, run, *full, *resume, "--beta", "0.9") == 2
    assert "beta: 0.1 then, 0.9 now" in capsys.readouterr().err
    assert train(base, run, *full, *resume) == 0
    assert (run / "model.safetensors").exists()
    assert train(base, tmp_path / "new", *full, "--resume_from_checkpoint", "true") == 2
    assert "nothing to resume" in capsys.readouterr().err


def bad_rows(folder: Path, name: str) -> str:
    """A broken variant of the training data, as a file."""
    rows: list[Any] = tiny_rows(6)
    changes: dict[str, dict[str, Any]] = {
        "none": {"chosen": None},
        "empty": {"rejected": ""},
        "identical": {"chosen": " same", "rejected": " same"},
    }
    rows[3] |= changes.get(name, {})
    lines = [json.dumps(row) for row in rows]
    if name == "torn":
        lines[3] = lines[3][:20]
    elif name == "columns":
        lines = [json.dumps({"question": "a", "good": "b", "bad": "c"})]
    path = folder / f"{name}.jsonl"
    path.write_text("" if name == "no rows" else "\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--dataset_name", "{tmp}/nowhere.jsonl"], ["nowhere.jsonl"]),
        (["--dataset_train_split", "trian"], ["'trian'", "train"]),
        (["--dataset_test_split", "validation"], ["'validation'", "test"]),
        (["--dataset_name", "columns"], ["question", "chosen"]),
        (["--dataset_name", "torn"], ["torn.jsonl"]),
        (["--dataset_name", "no rows"], ["empty"]),
        (["--dataset_name", "none"], ["3", "chosen", "on_bad_row"]),
        (["--dataset_name", "empty"], ["3", "rejected", "on_bad_row"]),
        (["--dataset_name", "identical"], ["3", "identical", "on_bad_row"]),
        (["--max_length", "2"], ["max_length", "2"]),
        (["--model_name_or_path", "{tmp}/no-model"], ["no-model"]),
        (["--model_name_or_path", "{base}/data"], ["config.json"]),
        (["--lora_target_modules", "q_prj"], ["'q_prj'", "q_proj"]),
        (["--attn_implementation", "flash_attention_2"], ["flash_attention_2"]),
        (["--attn_implementation", "sdpaa"], ["sdpaa", "sdpa"]),
        (["--max_tokens_per_pack", "4"], ["4", "max_tokens_per_pack"]),
        (["--metric_for_best_model", "fun"], ["'fun'"]),
        (["--resume_from_checkpoint", "{tmp}/none"], ["none", "does not exist"]),
        (["--output_dir", "{base}/config.yaml"], ["config.yaml", "is a file"]),
        (["--output_dir", "{base}/config.yaml/run"], ["config.yaml"]),
        (["--output_dir", "/proc/fastdpo"], ["/proc/fastdpo", "can't be written"]),
        (["--gpu_memory", "1KiB"], ["1.00 KiB", "the least that this run takes is"]),
        (["--output_dir", "{base}/data"], ["other files", "test.jsonl"]),
        (["--output_dir", "{base}/data", "--overwrite_output_dir"], ["other files"]),
    ],
    ids=lambda value: "=".join(value).replace("--", "") if value[0].startswith("--") else "",
)
def test_bad_input_is_one_line(base, tmp_path, capsys, words, parts):
    words = [word.format(tmp=tmp_path, base=base) for word in words]
    words = [
        bad_rows(tmp_path, word)
        if word in ("columns", "torn", "no rows", "none", "empty", "identical")
        else word
        for word in words
    ]
    if words[0] == "--dataset_name":
        words += ["--eval_strategy", "no"]
    if "--output_dir" not in words:
        words += ["--output_dir", str(tmp_path / "run")]
    before = files(base)
    assert cli.main(["train", str(base / "config.yaml"), *words]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "fastdpo: error: " in line]
    assert len(errors) == 1
    assert all(part in errors[0] for part in parts), errors[0]
    assert files(base) == before
    assert not files(tmp_path / "run")
