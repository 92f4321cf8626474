"""Options: honoured or refused, never ignored; under TRL's names and with TRL's defaults."""

import ast
import dataclasses
import inspect
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser, TrainingArguments

import fastdpo
from fastdpo import DPOConfig, ModelConfig, ScriptArguments
from fastdpo.config import SHAPES_THE_RUN, to_plain
from fastdpo.config_files import read_yaml, write_yaml
from fastdpo.errors import ConfigError, FastDPOError
from fastdpo.losses import REGISTRY
from fastdpo.metrics import NAMES
from fastdpo.option_names import options_by_name
from fastdpo.options import Bound, Option, check, default_of, describe
from fastdpo.training_checks import METRICS
from fastdpo.training_options import TrainingOptions
from fastdpo.unsupported import ALIASES, TRL_NEUTRAL

PACKAGE = Path(fastdpo.__file__).parent


def config(**options: Any) -> DPOConfig:
    return DPOConfig(**{"output_dir": "unused", "use_cpu": True, **options})


def refusal(**options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        config(**options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"bta": 0.1}, ["'bta'", "did you mean 'beta'"]),
        ({"learning_rat": 1}, ["did you mean 'learning_rate'"]),
        ({"evaluation_strategy": "no"}, ["'evaluation_strategy'", "eval_strategy"]),
        ({"max_prompt_length": 5}, ["'max_prompt_length'", "max_length"]),
        ({"lora_r": 8}, ["'lora_r'", "ModelConfig"]),
        ({"beta": -1}, ["'beta'", "> 0", "-1"]),
        ({"beta": 0}, ["'beta'", "> 0", "got 0"]),
        ({"beta": None}, ["'beta'", "None"]),
        ({"beta": float("nan")}, ["'beta'", "nan"]),
        ({"beta": [0.1, 0.2]}, ["'beta'", "[0.1, 0.2]"]),
        ({"learning_rate": "abc"}, ["'learning_rate'", "number", "'abc'"]),
        ({"learning_rate": True}, ["'learning_rate'", "True"]),
        ({"learning_rate": "1e400"}, ["'learning_rate'", "'1e400'"]),
        ({"max_length": 0}, ["'max_length'", ">= 1", "none"]),
        ({"max_length": 10.5}, ["'max_length'", "whole number", "10.5"]),
        ({"seed": "x"}, ["'seed'", "'x'"]),
        ({"bf16": "maybe"}, ["'bf16'", "true or false", "'maybe'"]),
        ({"gradient_checkpointing": 1}, ["'gradient_checkpointing'", "got 1"]),
        ({"lr_scheduler_kwargs": "{not json"}, ["'lr_scheduler_kwargs'", "mapping"]),
        ({"eval_strategy": "stepz"}, ["'eval_strategy'", "did you mean 'steps'"]),
        ({"optim": "adamw_torch_fuse"}, ["'optim'", "did you mean 'adamw_torch_fused'"]),
        ({"packing_mode": "share"}, ["'packing_mode'", "did you mean 'shared'"]),
        ({"on_bad_row": "ignore"}, ["'on_bad_row'", "error, drop, keep"]),
        ({"truncation_mode": "keep_end"}, ["'truncation_mode'", "keep_start"]),
        ({"dataset_format": "hhh"}, ["'dataset_format'", "did you mean 'hh'"]),
        ({"train_sampling_strategy": "group_by_length"}, ["random, sequential"]),
        ({"loss_type": "sigmod"}, ["'sigmod'", "did you mean 'sigmoid'"]),
        ({"loss_type": []}, ["'loss_type'"]),
        ({"label_smoothing": 0.5}, ["'label_smoothing'", "< 0.5"]),
        ({"label_smoothing": 0.1, "loss_type": "hinge"}, ["'label_smoothing'", "'hinge'"]),
        ({"max_steps": 0}, ["'max_steps'", "-1"]),
        ({"warmup_ratio": 1.5}, ["'warmup_ratio'", "< 1", "1.5"]),
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, ["'warmup_ratio'", "'warmup_steps'"]),
        ({"report_to": "tensorbord"}, ["'report_to'", "did you mean 'tensorboard'"]),
        ({"report_to": ["none", "wandb"]}, ["'report_to'"]),
        ({"load_best_model_at_end": True}, ["'load_best_model_at_end'", "'no'", "'steps'"]),
        ({"metric_for_best_model": "accuracy"}, ["'accuracy'", "rewards/accuracies"]),
        ({"save_strategy": "best"}, ["'save_strategy'", "eval_strategy"]),
        ({"packing_mode": "padded", "group_by_prompt": True}, ["'group_by_prompt'", "'padded'"]),
        ({"optim": "sgd", "adam_beta1": 0.8}, ["'adam_beta1'", "sgd"]),
        ({"lr_scheduler_type": "constant", "warmup_steps": 5}, ["constant_with_warmup"]),
        (
            {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"x": 1}},
            ["lr_scheduler_kwargs"],
        ),
        ({"lr_scheduler_kwargs": {"x": 1}}, ["'lr_scheduler_kwargs'", "'linear'", "'x'"]),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, ["'lr_scheduler_kwargs'", "min_lr"]),
        ({"save_steps": 1.5}, ["save_steps", "1.5"]),  # transformers' own check, as one of ours
        ({"activation_checkpointing": True, "gradient_checkpointing": False}, ["two values"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_refused_values(options, parts):
    message = refusal(**options)
    assert all(part in message for part in parts), message


def test_bf16_needs_a_gpu_or_the_cpu_asked_for(monkeypatch):
    def pretend(answer: bool) -> None:
        for module in ("fastdpo.config", "transformers.training_args"):
            monkeypatch.setattr(f"{module}.is_torch_bf16_gpu_available", lambda: answer)

    pretend(False)
    with pytest.raises(ConfigError, match="'bf16'.*use_cpu"):
        DPOConfig(output_dir="unused", bf16=True)
    assert DPOConfig(output_dir="unused").bf16 is False
    assert config(bf16=True).bf16 is True  # bf16 autocast on the CPU
    pretend(True)
    assert DPOConfig(output_dir="unused").bf16 is True
    assert DPOConfig(output_dir="unused", use_cpu=True).bf16 is False


@pytest.mark.parametrize(
    "given, wanted",
    [
        ({"learning_rate": "1e-6"}, {"learning_rate": 1e-6}),  # how YAML 1.1 reads 1e-6
        ({"beta": "0.2", "seed": "7", "bf16": "no"}, {"beta": 0.2, "seed": 7, "bf16": False}),
        ({"max_length": "none"}, {"max_length": None}),
        ({"loss_type": "ipo"}, {"loss_type": ["ipo"]}),
        ({"loss_type": ["hinge"]}, {"loss_type": ["hinge"]}),
        ({"logging_steps": 5, "save_steps": 0.5}, {"logging_steps": 5, "save_steps": 0.5}),
        ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
        ({"activation_checkpointing": False}, {"gradient_checkpointing": False}),
        (
            {"lr_scheduler_kwargs": '{"num_cycles": 2}', "lr_scheduler_type": "cosine"},
            {"lr_scheduler_kwargs": {"num_cycles": 2}},
        ),
        ({"output_dir": Path("a/b")}, {"output_dir": "a/b"}),
        ({"report_to": "none"}, {"report_to": []}),
        ({"resume_from_checkpoint": False}, {"resume_from_checkpoint": None}),
        ({"resume_from_checkpoint": True}, {"resume_from_checkpoint": "True"}),
        ({"label_smoothing": 0.1}, {"label_smoothing": 0.1, "loss_type": ["sigmoid"]}),
    ],
    ids=lambda value: ",".join(value),
)
def test_accepted_values(given, wanted):
    made = config(**given)
    assert {name: getattr(made, name) for name in wanted} == wanted
    assert all(type(getattr(made, name)) is type(value) for name, value in wanted.items())


def test_metrics_by_name():
    assert METRICS == ("loss", *NAMES)
    for name in ("eval_loss", "loss", "rewards/accuracies", "eval_helpful_rewards/margins"):
        config(metric_for_best_model=name)


def test_bounds_say_what_they_hold():
    share = Option("x", (float,), bound=Bound(at_least=0, below=1))
    assert [check(share, v) for v in (0, 0.5, "0.25")] == [0, 0.5, 0.25]
    for value in (1, -0.1):
        with pytest.raises(ConfigError, match="'x' expects a number >= 0 and < 1, got"):
            check(share, value)


def test_whole_numbers_keep_every_digit():
    big = 2**60 + 1
    assert check(Option("x", (int,)), str(big)) == check(Option("x", (int,)), big) == big


# ---- TRL's and transformers' options ----------------------------------------------------------


UNSUPPORTED = [
    f
    for f in dataclasses.fields(TrainingArguments)
    if f.name not in describe(TrainingOptions) and f.name not in ALIASES
]


@pytest.mark.parametrize("f", UNSUPPORTED, ids=lambda f: f.name)
def test_unsupported_options_of_transformers(f):
    """Each is refused by name unless it asks for nothing, then the default is accepted."""
    default = default_of(f)
    value = not default if isinstance(default, bool) else "something"
    if f.name == "do_train":  # True is what fastdpo does
        value = "something"
    with pytest.raises(ConfigError, match=f"'{f.name}'.*not supported"):
        DPOConfig(**{"output_dir": "unused", f.name: value})


def test_neutral_values_are_accepted():
    defaults = {f.name: default_of(f) for f in UNSUPPORTED}
    config(**defaults, **TRL_NEUTRAL)
    config(fsdp="", deepspeed=None, fp16=False, debug=[], pad_to_multiple_of=None, do_train=True)
    config(do_eval=True, eval_strategy="epoch")
    assert "'do_eval'" in refusal(do_eval=True)


@pytest.mark.parametrize("name", TRL_NEUTRAL)
def test_unsupported_options_of_trl(name):
    neutral = TRL_NEUTRAL[name]
    value = not neutral if isinstance(neutral, bool) else 7
    assert f"'{name}'" in refusal(**{name: value})


def test_names_and_defaults_are_trls():
    """Every option of TRL's is one of ours or refused by name; defaults differ where it says so."""
    trl = pytest.importorskip("trl")
    ours = options_by_name()
    different = {
        "bf16",  # ours is True only where the GPU has it, both are None before that
        "report_to",  # a list in ours: ["none"]
        "hub_strategy",  # ours uploads at the end; TRL's default is with every checkpoint
    }
    for cls in (trl.DPOConfig, trl.ModelConfig, trl.ScriptArguments):
        for f in dataclasses.fields(cls):
            default = default_of(f)
            if f.name in ours and f.name not in different:
                assert ours[f.name].default == default, f.name
            elif f.name in TRL_NEUTRAL:
                assert TRL_NEUTRAL[f.name] == default, f.name
            else:
                known = {g.name for g in dataclasses.fields(TrainingArguments)}
                assert f.name in known | different, f"{f.name} of TRL is unknown here"


def test_hf_argument_parser_reads_our_dataclasses():
    parser = HfArgumentParser([ScriptArguments, DPOConfig])  # pyright: ignore[reportArgumentType]
    script, made = parser.parse_args_into_dataclasses(
        ["--dataset_name", "x", "--output_dir", "y", "--use_cpu", "--beta", "0.3"]
    )[:2]
    assert (script.dataset_name, made.beta, made.loss_type) == ("x", 0.3, ["sigmoid"])


def test_no_option_is_dead():
    """Every option is read somewhere: `args.beta`, `config.dtype`, …; a few by transformers."""
    read_by_transformers = {
        # TrainingArguments' own device set-up
        *("tf32", "ddp_backend", "ddp_timeout", "use_cpu"),
        # get_warmup_steps, get_optimizer_cls_and_kwargs, DefaultFlowCallback
        *(
            "warmup_steps",
            "optim_args",
            "adam_beta1",
            "adam_beta2",
            "adam_epsilon",
            "learning_rate",
        ),
        *("eval_steps", "eval_delay", "save_steps", "logging_strategy", "logging_steps"),
        "logging_first_step",
        # DPOConfig.pairs_per_step
        *("per_device_train_batch_size", "gradient_accumulation_steps"),
        "ref_model_revision",  # ModelConfig.reference_revision
        "hub_strategy",  # has one value, so that others are refused
    }
    declaring = {
        *("config.py", "loss_specs.py", "model_config.py", "options.py", "option_names.py"),
        *("script_arguments.py", "training_checks.py", "training_options.py", "unsupported.py"),
    }
    read = {
        node.attr
        for path in PACKAGE.rglob("*.py")
        if path.name not in declaring
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    # Those of the losses go by name to whichever function has such a parameter.
    read |= {name for loss in REGISTRY.values() for name in inspect.signature(loss.fn).parameters}
    # keep_start is the one truncation there is, and choices hold it to that.
    dead = set(options_by_name()) - read - read_by_transformers - {"truncation_mode"}
    assert not dead


# ---- whole configs ----------------------------------------------------------------------------


def test_round_trips(tmp_path):
    options: dict[str, Any] = {
        "loss_type": "ipo",
        "eval_strategy": "steps",
        "lr_scheduler_type": "cosine",
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "learning_rate": 3e-7,
        "max_length": None,
        "report_to": ["tensorboard"],
        "warmup_ratio": 0.1,
    }
    made = config(**options)
    assert to_plain(DPOConfig(**made.to_dict())) == to_plain(made)
    made.save_yaml(tmp_path / "config.yaml")
    assert to_plain(DPOConfig.from_yaml(tmp_path / "config.yaml")) == to_plain(made)
    changed = dataclasses.replace(dataclasses.replace(made, beta=0.2), beta=0.3)
    assert to_plain(changed) == {**to_plain(made), "beta": 0.3}


def test_none_under_a_second_name_leaves_the_files_value(tmp_path):
    (tmp_path / "c.yaml").write_text("warmup_steps: 100\ngradient_checkpointing: false\n")
    nothing = {"warmup_ratio": None, "activation_checkpointing": None}
    args = DPOConfig.from_yaml(tmp_path / "c.yaml", output_dir="o", use_cpu=True, **nothing)
    assert (args.warmup_steps, args.gradient_checkpointing) == (100, False)


def test_from_yaml_leaves_model_and_dataset_to_the_command_line(tmp_path):
    write_yaml(tmp_path / "c.yaml", {"dataset_name": "x", "lora_r": 4, "beta": 0.5})
    assert DPOConfig.from_yaml(tmp_path / "c.yaml", use_cpu=True, output_dir="y").beta == 0.5
    write_yaml(tmp_path / "c.yaml", {"bta": 0.5})
    with pytest.raises(ConfigError, match="did you mean 'beta'"):
        DPOConfig.from_yaml(tmp_path / "c.yaml")


def test_identity_is_what_shapes_the_run():
    made = config()
    assert set(SHAPES_THE_RUN) <= set(describe(TrainingOptions))
    same = dataclasses.replace(made, output_dir="other", logging_steps=1, max_tokens_per_pack=64)
    assert same.identity() == made.identity()
    changes: list[dict[str, Any]] = [{"beta": 0.2}, {"seed": 1}, {"loss_type": ["ipo"]}]
    changes.append({"lean_lora": False})  # other roundings
    for change in changes:
        assert dataclasses.replace(made, **change).identity() != made.identity()


def test_model_config():
    assert ModelConfig().dtype == "float32"
    made = ModelConfig(lora_target_modules="q_proj,v_proj", use_peft=True)  # pyright: ignore
    assert made.lora_target_modules == ["q_proj", "v_proj"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"load_in_4bit": True}, "'load_in_4bit'.*use_peft"),
        ({"load_in_4bit": True, "load_in_8bit": True, "use_peft": True}, "exclude each other"),
        ({"dtype": "bf16"}, "'dtype'.*bfloat16"),
        ({"lora_r": 0}, "'lora_r'.*>= 1"),
        ({"lora_rank": 8}, "'lora_rank'"),
        ({"beta": 0.1}, "'beta' is an option of DPOConfig, not of ModelConfig"),
        ({"lora_task_type": "SEQ_CLS"}, "'lora_task_type'.*not supported"),
    ]
    for options, match in cases:
        with pytest.raises(ConfigError, match=match):
            ModelConfig(**options)
    with pytest.raises(ConfigError, match="'dataset_streaming'.*not supported"):
        ScriptArguments(dataset_streaming=True)  # pyright: ignore[reportCallIssue]


def test_no_warning_from_transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config(gradient_checkpointing=True)


def test_the_light_half_imports_nothing_heavy():
    """A misspelt option is answered before torch and transformers are imported."""
    code = (
        "import sys, fastdpo, fastdpo.cli; fastdpo.cli.main(['train', '--bta', '1']);"
        "fastdpo.cli.main(['train', '--help']);"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'numpy'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "did you mean 'beta'" in done.stderr and "--max_tokens_per_pack" in done.stdout


def test_lazy_exports():
    assert set(fastdpo.__all__) <= set(dir(fastdpo))
    for name in fastdpo.__all__:
        assert getattr(fastdpo, name).__name__ == name
    assert issubclass(fastdpo.FastDPOError, Exception) and FastDPOError is fastdpo.FastDPOError
    with pytest.raises(AttributeError, match="no attribute 'DPOTrainr'"):
        _ = fastdpo.DPOTrainr  # pyright: ignore[reportAttributeAccessIssue]


# ---- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, match",
    [
        ("beta: 0.1\nbeta: 0.2\n", "line 2: 'beta' stands there twice"),
        ("beta: [0.1\n", "line 2"),
        ("- beta\n", "holds no options"),
        ("just words\n", "holds no options"),
        ("1: 2\n", "holds no options"),
    ],
)
def test_broken_files(tmp_path, text, match):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=match) as caught:
        read_yaml(path)
    assert "c.yaml" in str(caught.value)


def test_missing_files(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    assert read_yaml(tmp_path / "config.yaml") == {}
    with pytest.raises(ConfigError, match="did you mean 'config.yaml'"):
        read_yaml(tmp_path / "confg.yaml")
    with pytest.raises(ConfigError, match="recipe:"):
        read_yaml(tmp_path / "nowhere" / "x.yaml")
    with pytest.raises(ConfigError, match="can't be read"):
        read_yaml(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_yaml(tmp_path / "bytes.yaml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_r": 4}, "'lora_r' has no effect without 'use_peft'"),
        (
            {"lora_layers_to_transform": [0]},
            "'lora_layers_to_transform' has no effect without 'use_peft'",
        ),
        ({"use_dora": True, "lora_alpha": 8}, "leave lora_alpha, use_dora out"),
        ({"use_bnb_nested_quant": True}, "'use_bnb_nested_quant' has no effect without 'load_in_4"),
    ],
)
def test_model_options_that_would_do_nothing_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**options)


def test_permission_to_overwrite_is_not_written_down(tmp_path):
    args = DPOConfig(output_dir=str(tmp_path / "run"), overwrite_output_dir=True, beta=0.2)
    args.save_yaml(tmp_path / "config.yaml")
    again = DPOConfig.from_yaml(tmp_path / "config.yaml")
    assert again.beta == 0.2 and not again.overwrite_output_dir


def test_a_config_on_a_full_disk_is_one_line():
    with pytest.raises(ConfigError, match="can't be written: No space left"):
        write_yaml("/dev/full", {"beta": 0.1})
