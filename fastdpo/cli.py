"""The command line: `fastdpo train config.yaml --beta 0.2` and `fastdpo demo`.

Reads options, checks them before anything heavy is imported, and hands them to the trainer.
Errors that the user can mend are one line on stderr and exit status 2. No training logic here.
"""

import ast
import functools
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from . import __version__
from .config_files import RECIPE, read_yaml
from .errors import ConfigError, FastDPOError, did_you_mean
from .help import help_lines
from .model_config import ADAPTER_OPTIONS, ModelConfig
from .option_names import options_by_name, overridden, unknown
from .options import AUTO, NONE, Option, describe
from .script_arguments import ScriptArguments
from .training_options import TrainingOptions
from .unsupported import ALIASES, TRL_NEUTRAL

if TYPE_CHECKING:
    from .config import DPOConfig
    from .trainer import DPOTrainer

USAGE = f"""\
fastdpo {__version__}: preference training (DPO) on one GPU

  fastdpo train [CONFIG.yaml | {RECIPE}NAME] [--option value …]   train; flags win over the file
  fastdpo train --help                                          every option, with its default
  fastdpo plan CONFIG.yaml [--gpu_memory 24GiB]                 memory and time, before anything
  fastdpo precompute CONFIG.yaml --ref_cache_dir DIR            the reference of `train`, once
  fastdpo cache info|verify|prune DIR                           what such a folder holds
  fastdpo export RUN -o DIR [--merge] [--dtype T]               a result to hand on
  fastdpo report RUN [RUN …] [-o PAGE.html]                     curves, data, samples as a page
  fastdpo demo [--output_dir DIR]                               a run of a few minutes on a CPU
  fastdpo --version
"""
COMMANDS = ("train", "plan", "precompute", "cache", "report", "export", "demo")
# Where the `main` of those is that are not here; imported when called, for most need torch.
HOMES = {
    "plan": ".plan_cli",
    "cache": ".cache_cli",
    "report": ".report_page",
    "export": ".export",
    "demo": ".demo",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command in `argv` (by default the process's); returns the exit status."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except FastDPOError as error:
        print(f"fastdpo: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        if hasattr(error, "status"):  # interrupts.Interrupted, which knows what is saved
            print(f"fastdpo: {error}", file=sys.stderr)
            return error.status  # pyright: ignore[reportAttributeAccessIssue]
        print("fastdpo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `fastdpo train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    command, *rest = argv
    if command in ("-V", "--version"):
        print(f"fastdpo {__version__}")
        return 0
    if command not in COMMANDS:
        raise ConfigError(
            f"unknown command {command!r}; there are {', '.join(COMMANDS)}"
            f"{did_you_mean(command, COMMANDS)}"
        )
    if command in HOMES:
        return importlib.import_module(HOMES[command], __package__).main(rest)
    if {"-h", "--help"} & set(rest):
        print("\n".join(help_lines(command)))
        return 0
    run = run_precompute if command == "precompute" else run_train
    run(*build_configs(parse_arguments(rest)))
    return 0


# ---- from words to options --------------------------------------------------------------------


def parse_arguments(words: Sequence[str]) -> dict[str, Any]:
    """The options in `words`: first those of the config file, if one is named, then the flags'.

    Values of flags are text still; `--flag` alone is True. A list is one word with commas,
    several words, or the flag several times.
    """
    words = list(words)
    values: dict[str, Any] = {}
    if words and not words[0].startswith("--"):
        values = read_yaml(words.pop(0))
    flags: dict[str, Any] = {}
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(
                f"unexpected argument {word!r}; a config file comes first, options start with --"
            )
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        found = [value] if equals else []
        opt = _known_option(name)
        is_list = opt is not None and list in opt.kinds
        while not equals and words and not words[0].startswith("--") and (is_list or not found):
            found.append(words.pop(0))
        if name in flags and not is_list:
            raise ConfigError(f"option '--{name}' is given twice; keep one")
        flags[name] = flags.get(name, []) + _list(found) if is_list else _scalar(name, opt, found)
    if "config" in flags:
        if values:
            raise ConfigError(f"two config files: the first argument and {flags['config']!r}")
        values = read_yaml(flags.pop("config"))
    return overridden(values, flags)


def _list(found: list[str]) -> list[str]:
    return [part.strip() for word in found for part in word.split(",") if part.strip()]


def _scalar(name: str, opt: Option | None, found: list[str]) -> Any:
    if found:
        text = found[0]
        if opt is None and name != "config":  # refused later, unless it asks for nothing
            try:
                return yaml.safe_load(text)
            except yaml.YAMLError:
                return text
        return None if opt is not None and opt.nullable and text.lower() in NONE else text
    if opt is not None and bool not in opt.kinds:
        raise ConfigError(f"'--{name}' expects {opt.expected}, and nothing follows it")
    if name == "config":
        raise ConfigError("'--config' expects a file, and nothing follows it")
    return True


def _known_option(name: str) -> Option | None:
    """The option called `name`; None if it has another's place (an alias, or one refused later)."""
    found = options_by_name().get(ALIASES.get(name, name))
    if found is None and name not in ("config", "warmup_ratio", *TRL_NEUTRAL):
        if name not in training_argument_names():
            raise unknown(name)
    return found


@functools.cache
def training_argument_names() -> frozenset[str]:
    """The fields of transformers' TrainingArguments, read off its source: importing it takes
    seconds, and a misspelt option should not wait for them."""
    spec = importlib.util.find_spec("transformers")
    for folder in (spec and spec.submodule_search_locations) or ():
        tree = ast.parse((Path(folder) / "training_args.py").read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments":
                fields = (n.target for n in node.body if isinstance(n, ast.AnnAssign))
                return frozenset(f.id for f in fields if isinstance(f, ast.Name))
    return frozenset()


def build_configs(
    values: dict[str, Any], needs_dataset: bool = True
) -> tuple[ScriptArguments, ModelConfig, "DPOConfig"]:
    """The three configs that the flat `values` describe. Raises `ConfigError`."""
    for name in values:
        _known_option(name)
    script = ScriptArguments(**_part(values, ScriptArguments))
    model = ModelConfig(**_without_adapter(_part(values, ModelConfig)))
    elsewhere = {**describe(ScriptArguments), **describe(ModelConfig)}
    shared = describe(TrainingOptions)
    rest = {k: v for k, v in values.items() if k in shared or k not in elsewhere}
    # All that can be checked without transformers, first: its import takes seconds.
    TrainingOptions(**{k: v for k, v in rest.items() if k not in _only_transformers(rest)})
    for name, value, example in (
        ("model_name_or_path", model.model_name_or_path, "a folder or a hub name"),
        ("dataset_name", script.dataset_name, "a file, a folder or a hub name"),
    ):
        if value is None and (needs_dataset or name != "dataset_name"):
            raise ConfigError(f"option {name!r} is required: {example}; see `fastdpo train --help`")
    from .config import DPOConfig

    return script, model, DPOConfig(**rest)


def _without_adapter(values: dict[str, Any]) -> dict[str, Any]:
    """Without a file's adapter options where `use_peft` is said to be false: it switches them."""
    if "use_peft" not in values or ModelConfig(use_peft=values["use_peft"]).use_peft:
        return values
    return {name: value for name, value in values.items() if name not in ADAPTER_OPTIONS}


def _part(values: dict[str, Any], cls: type) -> dict[str, Any]:
    return {name: values[name] for name in describe(cls) if name in values}


def _only_transformers(values: Iterable[str]) -> set[str]:
    ours = {*describe(TrainingOptions), *ALIASES, *TRL_NEUTRAL, "warmup_ratio"}
    return set(values) - ours


# ---- the run ----------------------------------------------------------------------------------


def run_train(script: ScriptArguments, model: ModelConfig, config: "DPOConfig") -> None:
    """Loads model and data, trains, evaluates where asked, saves, and says where everything is.

    Raises `FastDPOError` for what the user can mend; nothing is overwritten unasked.
    """
    from .checkpoint import candidates
    from .run_folder import prepare_output_dir, tidy

    is_main = config.process_index == 0
    assert config.output_dir is not None
    output_dir = Path(config.output_dir)
    resume = config.resume_from_checkpoint
    if is_main:
        tidy(output_dir)
        if resume:
            candidates(output_dir, resume)  # says no before any work
        elif not config.overwrite_output_dir:
            # Where it is set, the trainer clears the folder once all else is loaded.
            prepare_output_dir(output_dir, resuming=False, overwrite=False)

    trainer = _make_trainer(script, model, config)
    trainer.train()
    last = trainer.state.log_history[-2:]  # an evaluation, then the run's summary
    evaluated = [log for log in last if "eval_loss" in log and log["step"] == last[-1]["step"]]
    metrics = evaluated[0] if evaluated else trainer.evaluate() if trainer.eval_pairs else {}
    trainer.save_model()
    if is_main:
        print("\n".join(_summary(output_dir, trainer.state.global_step, metrics)))


def run_precompute(script: ScriptArguments, model: ModelConfig, config: "DPOConfig") -> None:
    """Fills `ref_cache_dir` with what a training run of these options would compute first.

    Raises `FastDPOError` for what the user can mend. Interrupted, it goes on where it was.
    """
    if config.ref_cache_dir is None:
        raise ConfigError(
            "`fastdpo precompute` fills a folder for later runs: name it with --ref_cache_dir"
        )
    trainer = _make_trainer(script, model, config)
    if config.process_index == 0:
        for name, done in trainer.precomputations.items():
            print(
                f"{name}: {done.n_responses} responses, {done.n_found} of them found; "
                f"{done.n_computed} of {done.n_packs} packs computed"
            )
        print(f"  {config.ref_cache_dir}  what `fastdpo train --ref_cache_dir` reads")


def _make_trainer(script: ScriptArguments, model: ModelConfig, config: "DPOConfig") -> "DPOTrainer":
    """Loads data and models; the reference is computed here where it is computed first."""
    from .adapters import lora_config
    from .data import load_dataset_split
    from .model import load_model, load_ref_model, load_tokenizer
    from .plan_cli import settle_precision
    from .trainer import DPOTrainer

    show_progress(logging.INFO if config.process_index == 0 else logging.WARNING)
    assert script.dataset_name is not None
    splits = [script.dataset_train_split]
    if config.eval_strategy != "no" or config.eval_on_start:
        splits.append(script.dataset_test_split)
    train_dataset, *eval_datasets = (
        load_dataset_split(script.dataset_name, split, config=script.dataset_config)
        for split in splits
    )
    if model.base_precision == AUTO:
        pairs = settle_precision(script, model, config)
        config.base_precision = model.base_precision
        train_dataset = train_dataset if pairs is None else pairs
    policy = load_model(model, config)
    tokenizer = load_tokenizer(model)
    return DPOTrainer(
        model=policy,
        ref_model=load_ref_model(model, config),
        args=config,
        train_dataset=train_dataset,
        eval_dataset=eval_datasets[0] if eval_datasets else None,
        processing_class=tokenizer,
        peft_config=lora_config(model),
        callbacks=[config_writer(script, model, config)],
    )


def show_progress(level: int) -> None:
    """What fastdpo chose and found (packs, attention, dropped rows), on stderr."""
    logger = logging.getLogger("fastdpo")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(level)


def config_writer(*configs: Any) -> Any:
    """A callback that completes the trainer's resolved_config.yaml with model and dataset, so
    that `fastdpo train resolved_config.yaml` is the same run."""
    from transformers import TrainerCallback

    from .config import to_plain, write_yaml
    from .run_folder import CONFIG_FILE

    class ConfigWriter(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                write_yaml(Path(str(args.output_dir)) / CONFIG_FILE, to_plain(*configs))

    return ConfigWriter()


def _summary(output_dir: Path, steps: int, metrics: dict[str, float]) -> list[str]:
    from .run_folder import CONFIG_FILE, CURVES_FILE, METRICS_FILE

    shown = {
        "loss": metrics.get("eval_loss"),
        "reward accuracy": metrics.get("eval_rewards/accuracies"),
        "margin": metrics.get("eval_rewards/margins"),
    }
    measured = [f"{name} {value:.4f}" for name, value in shown.items() if value is not None]
    lines = [f"trained {steps} steps" + (f"; held out: {', '.join(measured)}" if measured else "")]
    is_adapter = (output_dir / "adapter_config.json").is_file()
    lines.append(f"  {output_dir}  the {'adapter' if is_adapter else 'model'} and the tokenizer")
    for name, what in (
        (CONFIG_FILE, "every option, as the run had it"),
        (METRICS_FILE, "the log, one JSON object a line"),
        (CURVES_FILE, "loss, margin and accuracy as a picture"),
        ("plan.json", "memory as it was predicted and measured"),
    ):
        if (output_dir / name).exists():
            lines.append(f"  {output_dir / name}  {what}")
    return lines
