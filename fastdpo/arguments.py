"""Every option that fastdpo honours, declared once: dataset, model and training.

Names and defaults are those of TRL's ScriptArguments, ModelConfig and DPOConfig and of
transformers' TrainingArguments where the meaning is theirs. What stands here is honoured; what
does not is refused by name (config.py). The standard library alone: see options.py.
"""

from dataclasses import dataclass, fields
from typing import Annotated, Any

from .data_formats import DATASET_FORMATS
from .errors import ConfigError, did_you_mean
from .loss_specs import (
    F_DIVERGENCES,
    LOSSES,
    SPECS,
    UNPAIRED_LOSSES,
    check_loss_names,
    check_loss_options,
)
from .options import (
    Auto,
    Bound,
    Count,
    Natural,
    NonNegative,
    Option,
    Positive,
    Share,
    Words,
    check,
    check_fields,
    checked_init,
    describe,
    option,
    parse_bytes,
)
from .unsupported import ALIASES, RENAMED, TRL_NEUTRAL, is_neutral, unsupported

OPTIMIZERS = (
    *("adamw_torch", "adamw_torch_fused", "sgd"),
    *("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "auto"),
)
AUTO = "auto"
Checkpointing = Annotated[str, Words((AUTO, "none", "selective", "full"))]
# What a plan chooses where it is left on auto, and what auto means where no memory is given.
PLANNED = {
    "max_tokens_per_pack": 8192,
    "gradient_checkpointing": True,
    "activation_offloading": False,
    "optim": "adamw_torch_fused",
    "logps_workspace_bytes": 256 * 2**20,
}
SCHEDULES = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant"),
    *("constant_with_warmup", "inverse_sqrt", "cosine_with_min_lr"),
    *("cosine_warmup_with_min_lr", "warmup_stable_decay"),
)
INTERVALS = ("no", "steps", "epoch")
BASE_PRECISIONS = ("auto", "bf16", "8bit", "4bit", "fp8")
REFERENCES = ("auto", "adapters_off", "copy", "model")
METRICS = (
    *("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected"),
)
UNPAIRED_METRICS = (*(name for name in METRICS if name != "rewards/accuracies"), "kl")
TOKEN_METRICS = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")


def settle(owner: type, given: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments `given` under the names of `owner`'s fields. Raises `ConfigError` for
    a name that nothing knows, and for an option of TRL's that asks for what fastdpo does not do.
    """
    known = {f.name for f in fields(owner)}
    given = dict(given)
    for alias, name in ALIASES.items():
        value = given.pop(alias, None)
        if value is not None and given.setdefault(name, value) != value:
            raise ConfigError(
                f"{alias!r} and {name!r} are one option with two values: {value!r} and "
                f"{given[name]!r}; give one of them"
            )
    if (ratio := given.pop("warmup_ratio", None)) is not None:
        _settle_warmup(given, ratio)
    for name in [name for name in given if name not in known]:
        if name not in TRL_NEUTRAL:
            raise unknown(name, owner)
        if not is_neutral(given[name], TRL_NEUTRAL[name]):
            raise unsupported(name, given[name])
        del given[name]
    return given


def _settle_warmup(given: dict[str, Any], ratio: Any) -> None:
    share = check(Option("warmup_ratio", (float,), False, Bound(at_least=0, below=1)), ratio)
    if share and given.get("warmup_steps"):
        raise ConfigError(
            f"'warmup_ratio' {share:g} and 'warmup_steps' {given['warmup_steps']!r} are both set; "
            "give one of them (warmup_steps below 1 is a share of all steps)"
        )
    if share:
        given["warmup_steps"] = share


def unknown(name: str, owner: type | None = None) -> ConfigError:
    """The error for an option that `owner` does not have, with its present or the nearest name.
    Without `owner`: that none of the three classes has.
    """
    homes = [
        cls for cls in (ScriptArguments, ModelConfig, TrainingOptions) if name in describe(cls)
    ]
    if owner is not None and homes:
        home = "DPOConfig" if homes[0] is TrainingOptions else homes[0].__name__
        return ConfigError(f"{name!r} is an option of {home}, not of {owner.__name__}")
    if name in RENAMED:
        return ConfigError(f"unknown option {name!r}; its name is {RENAMED[name]}")
    nearest = did_you_mean(name, options_by_name(owner))
    return ConfigError(f"unknown option {name!r}{nearest or '; see `fastdpo train --help`'}")


def options_by_name(owner: type | None = None) -> dict[str, Option]:
    """All options of the command line's one name space, or those that `owner` has."""
    result: dict[str, Option] = {}
    for cls in (ModelConfig, ScriptArguments, TrainingOptions):
        if owner is None or issubclass(owner, cls):
            result |= {name: opt for name, opt in describe(cls).items() if name not in result}
    return result


@checked_init(settle)
@dataclass
class ScriptArguments:
    """Which dataset; TRL's ScriptArguments."""

    dataset_name: str | None = option(
        None, "A file (.jsonl, .jsonl.gz, .parquet, .csv), a folder, or a dataset of the hub."
    )
    dataset_config: str | None = option(None, "Configuration of a hub dataset.")
    dataset_train_split: str = option("train", "Split to train on.")
    dataset_test_split: str = option(
        "test", "Split to evaluate on, read where eval_strategy or eval_on_start asks for it."
    )

    def __post_init__(self) -> None:
        check_fields(self, ScriptArguments)


ADAPTER_OPTIONS = (
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save",
    "use_rslora", "use_dora",
)  # fmt: skip
FOUR_BIT_OPTIONS = ("bnb_4bit_quant_type", "use_bnb_nested_quant")


@checked_init(settle)
@dataclass
class ModelConfig:
    """Which model, how it is loaded, and the adapter that is trained; TRL's ModelConfig."""

    model_name_or_path: str | None = option(None, "A folder or hub name: a model, or an adapter.")
    model_revision: str = option("main", "Branch, tag or commit of a hub model.")
    dtype: str | None = option(
        "float32",
        "Type of the weights in memory; `auto` keeps the saved one.",
        ("auto", "bfloat16", "float16", "float32"),
    )
    trust_remote_code: bool = option(False, "Run the Python code that the model ships with.")
    attn_implementation: str | None = option(
        None,
        "varlen_attn, flash_attention_2, _3 or _4, flex_attention, sdpa; by default the first that "
        "gives this model's numbers here, the fastest first.",
    )
    use_peft: bool = option(False, "Train a LoRA adapter instead of the whole model.")
    lora_r: Count = option(16, "Rank of the adapter.")
    lora_alpha: Count = option(32, "Scale of the adapter: alpha / r.")
    lora_dropout: Share = option(0.05, "Dropout inside the adapter, while disable_dropout is off.")
    lora_target_modules: list[str] | None = option(
        None, "Modules that get an adapter, by the end of their names; by default all-linear."
    )
    lora_layers_to_transform: list[float] | None = option(
        None, "Numbers of the layers that get an adapter; by default all."
    )
    lora_modules_to_save: list[str] | None = option(
        None, "Modules trained in full beside the adapter, and saved with it."
    )
    use_rslora: bool = option(False, "Rank-stabilised scale: alpha / sqrt(r).")
    use_dora: bool = option(False, "Weight-decomposed LoRA.")
    load_in_8bit: bool = option(False, "Hold the frozen base in 8 bits (bitsandbytes).")
    load_in_4bit: bool = option(False, "Hold the frozen base in 4 bits (bitsandbytes): QLoRA.")
    base_precision: str | None = option(
        None,
        "bf16, 8bit, 4bit: dtype or load_in_8bit/4bit in one word. fp8: bf16, then the linear "
        "layers in 8-bit floats (Hopper or newer; emulated on a CPU), and the log says by how much "
        "log-probs move. auto: the first of the first three that the plan finds room for. none: as "
        "those options say.",
        BASE_PRECISIONS,
    )
    bnb_4bit_quant_type: str = option("nf4", "Format of the 4 bits.", ("fp4", "nf4"))
    use_bnb_nested_quant: bool = option(False, "Quantize the 4-bit constants as well.")
    ref_model_name_or_path: str | None = option(
        None, "A folder or hub name: a reference other than the policy as it starts."
    )
    ref_load_in_4bit: bool = option(False, "Hold that reference in 4 bits (bitsandbytes).")

    def __post_init__(self) -> None:
        check_fields(self, ModelConfig)
        self._settle_precision()
        if self.load_in_8bit and self.load_in_4bit:
            raise ConfigError("'load_in_8bit' and 'load_in_4bit' exclude each other; keep one")
        if self.ref_load_in_4bit and self.ref_model_name_or_path is None:
            raise ConfigError("'ref_load_in_4bit' needs a reference model: ref_model_name_or_path")
        defaults = {field.name: field.default for field in fields(ModelConfig)}
        for names, needs in (
            (ADAPTER_OPTIONS, ("use_peft",)),
            (FOUR_BIT_OPTIONS, ("load_in_4bit", "ref_load_in_4bit")),
        ):
            given = [name for name in names if getattr(self, name) != defaults[name]]
            if given and not any(getattr(self, switch) for switch in needs):
                raise ConfigError(
                    f"{given[0]!r} has no effect without {needs[0]!r}; add {needs[0]}: true "
                    f"(--{needs[0]}), or leave {', '.join(given)} out"
                )
        for name in ("load_in_8bit", "load_in_4bit"):
            if getattr(self, name) and not self.use_peft:
                raise ConfigError(
                    f"{name!r} holds frozen weights, which only an adapter can train; "
                    "add use_peft: true (--use_peft)"
                )

    def _settle_precision(self) -> None:
        """`base_precision` in terms of `dtype`, `load_in_8bit` and `load_in_4bit`."""
        if self.base_precision is None:
            return
        if not self.use_peft:
            raise ConfigError(
                "'base_precision' is that of frozen weights, which only an adapter can train; add "
                "use_peft: true (--use_peft), or set dtype"
            )
        bits = {"8bit": self.load_in_8bit, "4bit": self.load_in_4bit}
        if other := [f"load_in_{b}" for b, on in bits.items() if on and b != self.base_precision]:
            raise ConfigError(
                f"'base_precision' {self.base_precision!r} and {other[0]!r} contradict each other; "
                "keep one"
            )
        if self.base_precision != AUTO:
            self.take_precision(self.base_precision)

    def take_precision(self, precision: str) -> None:
        """Sets the options that `precision`, "bf16", "8bit", "4bit" or "fp8", stands for."""
        self.base_precision, self.dtype = precision, "bfloat16"
        self.load_in_8bit, self.load_in_4bit = precision == "8bit", precision == "4bit"


@checked_init(settle)
@dataclass
class TrainingOptions:
    """How to train: what fastdpo honours of TRL's DPOConfig, and its own options."""

    # Where it is written
    output_dir: str | None = option(None, "Folder for checkpoints, metrics and the result.")
    overwrite_output_dir: bool = option(False, "Start over in a folder that holds a run.")
    resume_from_checkpoint: str | None = option(
        None,
        "A checkpoint folder; true: the newest whole one in output_dir; auto: that one, or the "
        "start where there is none. --resume for short.",
    )
    run_name: str | None = option(None, "Name of the run for trackers.")

    # Preference loss
    loss_type: list[str] = option(
        ["sigmoid"],
        f"{', '.join(LOSSES)}; or module:function, your own. Several are added up.",
    )
    loss_weights: list[float] | None = option(None, "A weight for each loss_type; by default 1.")
    beta: Positive = option(0.1, "How strongly the policy is held to the reference; IPO's tau.")
    label_smoothing: float = option(
        0.0,
        "Share of labels taken to be flipped, in [0, 0.5): cDPO with sigmoid; robust, exo_pair "
        "(which needs it > 0), aot, aot_unpaired, simpo, cpo; those of a mix that take it.",
    )
    f_divergence_type: str = option(
        "reverse_kl", "Divergence that holds the policy to the reference (f-DPO).", F_DIVERGENCES
    )
    f_alpha_divergence_coef: float = option(0.5, "alpha of alpha_divergence.")
    ld_alpha: Annotated[float, Bound(at_least=0, at_most=1)] | None = option(
        None,
        "LD-DPO: weight of a response's tokens beyond the other's length; none and 1: all alike.",
    )
    use_weighting: bool = option(
        False, "WPO: weigh pairs by the policy's own probability of them. Costs token statistics."
    )
    rpo_alpha: NonNegative = option(
        0.0, "RPO: weight of the chosen response's NLL per token, added to every pair's loss."
    )
    discopop_tau: Positive = option(0.05, "discopop's temperature.")
    simpo_gamma: NonNegative = option(0.5, "simpo's target margin, a reward difference.")
    cpo_alpha: NonNegative = option(1.0, "cpo's weight of the chosen responses' NLL.")
    desirable_weight: NonNegative = option(
        1.0, "Weight of desirable responses: kto, apo_zero_unpaired, whose data are unpaired."
    )
    undesirable_weight: NonNegative = option(1.0, "Weight of undesirable responses, likewise.")
    use_pair_weights: bool = option(
        False, "Multiply each pair's loss by its column `weight` (>= 0)."
    )
    use_soft_labels: bool = option(
        False, "Read the probability that chosen is the better one from the column `p_chosen`."
    )
    score_margin_scale: NonNegative = option(
        0.0,
        "Margin that a pair must have: this times score_chosen - score_rejected, two columns.",
    )

    router_aux_loss_coef: NonNegative | None = option(
        None,
        "Weight of a mixture of experts' load-balancing loss in training; by default the model's "
        "own, 0 leaves it out. Steps of several packs then take a second forward pass.",
    )

    # Reference
    reference: str = option(
        "auto",
        "adapters_off: the model without its adapter. copy: the policy as it starts, frozen. "
        "adapter:NAME: another adapter of the model. model: a model of its own (ref_model). "
        "auto chooses where one reading is possible.",
    )
    precompute_ref_log_probs: bool = option(
        False, "Compute all reference log-probs before training, then drop the reference."
    )
    ref_cache_dir: str | None = option(
        None,
        "Folder that keeps reference log-probs between runs. All are then computed before "
        "training, but for those that are there already.",
    )
    sync_ref_model: bool = option(
        False, "TR-DPO: move the reference towards the policy as training goes."
    )
    ref_model_mixup_alpha: Annotated[float, Bound(above=0, at_most=1)] = option(
        0.6, "TR-DPO: the policy's share in a new reference; 1 replaces it."
    )
    ref_model_sync_steps: Count = option(512, "TR-DPO: steps between two moves.")

    # Data
    max_length: Count | None = option(
        1024, "Most tokens of prompt + response; longer responses lose their end. none: no limit."
    )
    truncation_mode: str = option("keep_start", "What truncation keeps.", ("keep_start",))
    dataset_format: str = option(
        "auto", "How the columns are read; auto goes by their names.", DATASET_FORMATS
    )
    on_bad_row: str = option(
        "error",
        "What to do with a row whose response is empty, or whose responses are identical; a "
        "None value is dropped or an error.",
        ("error", "drop", "keep"),
    )
    dataset_num_proc: Count | None = option(None, "Processes that tokenize.")

    # Packs
    max_tokens_per_pack: Count | Auto | None = option(
        AUTO,
        "Most tokens in one forward pass: the memory dial. auto: as many as the plan finds room "
        "for; 8192 where no memory is known.",
    )
    packing_mode: str = option(
        "auto",
        "shared: a prompt is computed once for its responses. auto takes the first that is exact "
        "for the model: shared, unshared, padded.",
        ("auto", "shared", "unshared", "padded"),
    )
    group_by_prompt: bool = option(False, "Keep pairs of one prompt in one step.")
    attn_implementation: str | None = option(
        None,
        "varlen_attn, flash_attention_2, _3 or _4, flex_attention, sdpa; by default the first that "
        "gives this model's numbers here, the fastest first.",
    )

    # Steps
    per_device_train_batch_size: Count = option(
        8, "Pairs per step, with gradient_accumulation_steps and ranks as factors."
    )
    gradient_accumulation_steps: Count = option(1, "A factor of the pairs per step.")
    num_train_epochs: Positive = option(3.0, "Passes over the training pairs.")
    max_steps: int = option(-1, "Optimizer steps, in place of epochs where positive.")
    train_sampling_strategy: str = option(
        "random",
        "Shuffled every epoch, or in the dataset's order.",
        ("random", "sequential"),
    )
    dataloader_drop_last: bool = option(False, "Leave out an epoch's last, smaller step.")
    seed: Natural = option(42, "Seed of everything random.")
    data_seed: Natural | None = option(None, "Seed of the order of pairs; by default `seed`.")

    # Optimizer
    learning_rate: NonNegative = option(1e-6, "Peak learning rate.")
    lr_scheduler_type: str = option("linear", "Schedule of the learning rate.", SCHEDULES)
    lr_scheduler_kwargs: dict[str, Any] | str | None = option(None, "Arguments of the schedule.")
    warmup_steps: NonNegative = option(0, "Warm-up in steps, or below 1 as a share of all steps.")
    optim: str = option("adamw_torch_fused", "Optimizer; 8-bit ones need [qlora].", OPTIMIZERS)
    optimizer_in_backward: bool = option(
        False,
        "Update each weight as soon as its gradient is whole, so that gradients take no memory. "
        "Needs one pack a step and max_grad_norm: 0; a step that is not finite is found too late.",
    )
    weight_decay: NonNegative = option(0.0, "Decay of all weights but biases and norms.")
    adam_beta1: Share = option(0.9, "Adam's first moment.")
    adam_beta2: Share = option(0.999, "Adam's second moment.")
    adam_epsilon: Positive = option(1e-8, "Adam's epsilon.")
    max_grad_norm: NonNegative = option(1.0, "Clip the gradient's norm here; 0 does not clip.")

    on_nonfinite: str = option(
        "stop",
        "A step whose loss or gradient is not finite is never applied. stop: the run ends at the "
        "next log or checkpoint, naming pair and row. skip: it goes on, and counts them.",
        ("stop", "skip"),
    )

    # Precision and memory
    bf16: bool | None = option(None, "Compute in bfloat16; by default where the GPU has it.")
    tf32: bool | None = option(None, "Multiply fp32 matrices in TF32.")
    disable_dropout: bool = option(True, "Train without dropout, as the reference is computed.")
    gpu_memory: str | None = option(
        None, "Memory that the run may take, such as 24GiB; by default all that the GPU has."
    )
    gradient_checkpointing: bool | Checkpointing = option(
        True,
        "Recompute activations in the backward pass. full: all of a layer. selective: all but "
        "attention's output. none: nothing.",
    )
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = option(None, "Its arguments.")
    base_precision: str | None = option(
        None,
        "fp8: the frozen linear layers of the model in 8-bit floats. Another value: what the model "
        "was loaded in.",
        BASE_PRECISIONS,
    )
    compile: str = option(
        "off",
        "layers: torch.compile each decoder layer, packs padded to 8 lengths. auto: where it can "
        "on a GPU. Unmeasured there so far, hence off.",
        ("auto", "off", "layers"),
    )
    use_liger_kernel: bool = option(
        False, "liger-kernel's norms, rotary embedding and MLP (not its loss); needs a GPU."
    )
    logps_impl: str = option(
        "auto", "Implementation of the log-prob kernel.", ("auto", "triton", "torch")
    )
    activation_offloading: bool | Auto = option(
        False,
        "Hold activations in the host's memory between the forward and the backward pass.",
    )
    logps_workspace_bytes: Annotated[int, Bound(at_least=2**20)] | Auto = option(
        256 * 2**20, "Most bytes the log-probs may borrow."
    )
    measure_memory: bool = option(
        False, "Compare the plan with the measured peak on a CPU too, which slows the first steps."
    )
    model_init_kwargs: dict[str, Any] | str | None = option(None, "Arguments of from_pretrained.")
    trust_remote_code: bool = option(False, "Run the Python code that the model ships with.")
    deterministic: bool = option(False, "Bitwise repeatable on a GPU too, at some cost.")
    first_step_check: bool = option(
        True, "Stop where policy and reference differ before the first update."
    )
    use_cpu: bool = option(False, "Run on the CPU.")
    ddp_backend: str | None = option(
        None,
        "Communication between ranks.",
        ("nccl", "gloo", "mpi", "xccl", "hccl", "cncl", "mccl"),
    )
    ddp_timeout: Count = option(1800, "Seconds that a rank waits for the others.")

    # Evaluation
    eval_strategy: str = option("no", "When to evaluate.", INTERVALS)
    eval_steps: Positive | None = option(
        None, "Steps between evaluations, or below 1 their share of all steps."
    )
    eval_delay: NonNegative = option(0, "Steps or epochs before the first evaluation.")
    eval_on_start: bool = option(False, "Evaluate before the first step.")
    per_device_eval_batch_size: Count = option(8, "Pairs per evaluation batch.")
    load_best_model_at_end: bool = option(False, "End with the best checkpoint, not the last.")
    metric_for_best_model: str | None = option(None, "Metric that tells the best; the loss.")
    greater_is_better: bool | None = option(None, "Whether that metric should rise.")

    num_sample_prompts: Natural = option(
        0, "Prompts of the evaluation sets (or of sample_prompts) answered greedily each time."
    )
    sample_prompts: str | None = option(
        None, 'A file of prompts to answer instead: one a line, or .jsonl with {"prompt": …}.'
    )
    sample_max_new_tokens: Count = option(64, "Most tokens of such an answer.")

    # Checkpoints
    save_strategy: str = option("steps", "When to save a checkpoint.", (*INTERVALS, "best"))
    save_steps: Positive = option(
        500, "Steps between checkpoints, or below 1 their share of all steps."
    )
    save_total_limit: Count | None = option(None, "Most checkpoints to keep.")
    save_only_model: bool = option(False, "Save without optimizer state: no resuming.")

    # Hub
    push_to_hub: bool = option(False, "Upload the saved result to the Hugging Face Hub.")
    hub_model_id: str | None = option(
        None, "Its name there, USER/NAME; by default output_dir's name."
    )
    hub_private_repo: bool | None = option(None, "As a private model.")
    hub_revision: str | None = option(None, "Branch that it goes to.")
    hub_strategy: str = option("end", "When to upload: once, at the end.", ("end",))

    # Log
    logging_strategy: str = option("steps", "When to log.", INTERVALS)
    logging_steps: Positive = option(10, "Steps between logs, or below 1 their share of all.")
    log_token_stats: bool = option(
        False,
        "Log entropy, mean logits and token accuracy too: about a third more work in the head.",
    )
    logging_first_step: bool = option(False, "Log the first step as well.")
    disable_tqdm: bool | None = option(None, "No progress bars.")
    report_to: list[str] = option(
        ["none"], "Trackers, through transformers' callbacks: tensorboard, wandb, all, none, …"
    )
    project: str = option("huggingface", "Project of the tracker.")
    trackio_space_id: str | None = option(None, "Space that shows Trackio's runs.")

    def __post_init__(self) -> None:
        self.check_options()

    def check_options(self) -> None:
        """Types, domains, and what two options say together. Raises `ConfigError`."""
        if isinstance(self.resume_from_checkpoint, bool):
            self.resume_from_checkpoint = str(self.resume_from_checkpoint)
        check_fields(self, TrainingOptions)
        if (self.resume_from_checkpoint or "").lower() == "false":
            self.resume_from_checkpoint = None
        self._check_loss()
        self._check_reference()
        self._check_optimizer()
        self._check_memory()
        if self.max_steps == 0 or self.max_steps < -1:
            raise ConfigError(
                f"'max_steps' expects a whole number >= 1, or -1 to go by epochs; "
                f"got {self.max_steps}"
            )
        for name in ("hub_model_id", "hub_private_repo", "hub_revision"):
            if getattr(self, name) is not None and not self.push_to_hub:
                raise ConfigError(
                    f"{name!r} is for uploads: set push_to_hub: true, or leave it out"
                )
        in_step = self.save_strategy in ("best", self.eval_strategy)
        if self.load_best_model_at_end and not in_step:
            raise ConfigError(
                "'load_best_model_at_end' needs an evaluation at every checkpoint: eval_strategy "
                f"is {self.eval_strategy!r} and save_strategy {self.save_strategy!r}; use one"
            )
        best = (self.metric_for_best_model or "loss").removeprefix("eval_")
        measured = UNPAIRED_METRICS if self.loss_type[0] in UNPAIRED_LOSSES else METRICS
        measured += TOKEN_METRICS if self.log_token_stats else ()
        if not any(best == name or best.endswith(f"_{name}") for name in measured):
            raise ConfigError(
                f"'metric_for_best_model' {best!r} is not measured; there are "
                f"{', '.join(measured)}{did_you_mean(best, measured)}"
            )
        if self.save_strategy == "best" and self.eval_strategy == "no":
            raise ConfigError("'save_strategy' best needs evaluations; set eval_strategy")
        if self.packing_mode not in ("auto", "shared") and self.group_by_prompt:
            raise ConfigError(
                f"'group_by_prompt' shares prompts, which packing_mode={self.packing_mode!r} does "
                "not; leave one of the two out"
            )

    def _check_memory(self) -> None:
        how = {"full": True, "none": False}
        self.gradient_checkpointing = how.get(
            str(self.gradient_checkpointing), self.gradient_checkpointing
        )
        if self.max_tokens_per_pack is None:
            self.max_tokens_per_pack = AUTO
        if self.gpu_memory is not None:
            parse_bytes(self.gpu_memory)
        if self.optimizer_in_backward and self.max_grad_norm:
            raise ConfigError(
                f"'optimizer_in_backward' uses gradients one by one, and max_grad_norm "
                f"{self.max_grad_norm:g} needs the norm of all of them; set max_grad_norm: 0"
            )

    def _check_optimizer(self) -> None:
        for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
            given = getattr(self, name)
            if self.optim == "sgd" and given != describe(TrainingOptions)[name].default:
                raise ConfigError(f"{name!r} belongs to AdamW, and optim is 'sgd'; leave it out")
        schedule = self.lr_scheduler_type
        if schedule == "constant" and self.warmup_steps:
            raise ConfigError(
                "lr_scheduler_type 'constant' has no warm-up, and warmup_steps is "
                f"{self.warmup_steps}; use 'constant_with_warmup'"
            )
        if schedule in ("constant", "constant_with_warmup") and self.lr_scheduler_kwargs:
            raise ConfigError(f"lr_scheduler_type {schedule!r} takes no lr_scheduler_kwargs")

    def _check_reference(self) -> None:
        kind, colon, name = self.reference.partition(":")
        if (colon and (kind != "adapter" or not name)) or not (colon or kind in REFERENCES):
            raise ConfigError(
                f"'reference' expects one of {', '.join(REFERENCES)} or adapter:NAME; got "
                f"{self.reference!r}{did_you_mean(kind, REFERENCES)}"
            )
        if not self.sync_ref_model:
            for option_name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
                given = getattr(self, option_name)
                if given != describe(TrainingOptions)[option_name].default:
                    raise ConfigError(
                        f"{option_name!r} is for TR-DPO: set sync_ref_model: true, or leave it out"
                    )
            return
        for option_name in ("precompute_ref_log_probs", "ref_cache_dir"):
            if getattr(self, option_name):
                raise ConfigError(
                    f"'sync_ref_model' moves the reference during training, and {option_name!r} "
                    "computes it once before; keep one of them"
                )
        if self.reference not in ("auto", "copy", "model"):
            raise ConfigError(
                f"'sync_ref_model' moves a copy of the policy, and 'reference' {self.reference!r} "
                "is none; use reference='copy'"
            )

    @property
    def computes_reference_first(self) -> bool:
        """Whether all reference log-probs are known before training."""
        return self.precompute_ref_log_probs or self.ref_cache_dir is not None

    def _check_loss(self) -> None:
        check_loss_names(self.loss_type)
        check_loss_options(self, {name: SPECS.get(name) for name in self.loss_type})


# The first option of each part of the help.
HELP_PARTS = {
    "model_name_or_path": "Model",
    "use_peft": "Adapter",
    "load_in_8bit": "Quantization",
    "dataset_name": "Dataset",
    "output_dir": "Where it is written",
    "loss_type": "Preference loss",
    "reference": "Reference",
    "max_length": "Data",
    "max_tokens_per_pack": "Packs",
    "per_device_train_batch_size": "Steps",
    "learning_rate": "Optimizer",
    "bf16": "Precision, memory and machine",
    "eval_strategy": "Evaluation",
    "save_strategy": "Checkpoints",
    "push_to_hub": "Hub",
    "logging_strategy": "Log",
}
