"""TrainingOptions: every option of a training run that fastdpo honours, declared once.

Names and defaults are those of TRL's DPOConfig and of transformers' TrainingArguments where the
meaning is theirs; config.py joins them to those classes. What does not stand here is refused by
name. The standard library alone: see options.py.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from .data_formats import DATASET_FORMATS
from .loss_specs import F_DIVERGENCES, LOSSES
from .model_config import ATTENTION_HELP, BASE_PRECISIONS
from .option_names import settle
from .options import (
    AUTO,
    Auto,
    Bound,
    Count,
    Natural,
    NonNegative,
    Positive,
    Share,
    Words,
    check_fields,
    checked_init,
    option,
)
from .training_checks import check_together

OPTIMIZERS = (
    *("adamw_torch", "adamw_torch_fused", "sgd"),
    *("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "auto"),
)
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
        "(which needs it > 0), aot, aot_unpaired, simpo, cpo. All losses of a mix must take it.",
    )
    f_divergence_type: str = option(
        "reverse_kl",
        "Divergence that holds the policy to the reference (f-DPO); an sft in the mix has none.",
        F_DIVERGENCES,
    )
    f_alpha_divergence_coef: float = option(0.5, "alpha of alpha_divergence.")
    ld_alpha: Annotated[float, Bound(at_least=0, at_most=1)] | None = option(
        None,
        "LD-DPO: weight of a response's tokens beyond the other's length; none and 1: all alike. "
        "An sft in the mix counts every token.",
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
    dataset_num_proc: Count | None = option(
        None, "Processes that tokenize; by default as many as the rows are worth."
    )

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
    attn_implementation: str | None = option(None, ATTENTION_HELP)

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
    optim: str = option(
        "adamw_torch_fused",
        "Optimizer; 8-bit and paged ones need [qlora]. auto: as the plan needs.",
        OPTIMIZERS,
    )
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
        "attention's output. none: nothing. auto: as the plan needs.",
    )
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = option(
        None, "Arguments of torch.utils.checkpoint, such as use_reentrant."
    )
    base_precision: str | None = option(
        None,
        "fp8: the frozen linear layers of the model in 8-bit floats. Another value: what the model "
        "was loaded in.",
        BASE_PRECISIONS,
    )
    compile: str = option(
        "off",
        "layers: torch.compile each decoder layer, packs padded to 8 lengths. auto: on a GPU "
        "liger-kernel's layers where it is installed and has the model, else compiled ones where "
        "they can be. Unmeasured there so far, hence off.",
        ("auto", "off", "layers"),
    )
    cuda_graphs: bool = option(
        False,
        "Record compiled layers as CUDA graphs: for small models that wait for the host. Needs "
        "gradient_checkpointing: none; takes memory that no plan counts. Unmeasured so far.",
    )
    use_liger_kernel: bool = option(
        False, "liger-kernel's norms, rotary embedding and MLP (not its loss); needs a GPU."
    )
    lean_lora: bool = option(
        True,
        "LoRA without copies of activations, the products of layers that share an input merged; "
        "off: PEFT's own forward.",
    )
    logps_impl: str = option(
        "auto", "Implementation of the log-prob kernel.", ("auto", "triton", "torch")
    )
    activation_offloading: bool | Auto = option(
        False,
        "Hold activations in the host's memory between the forward and the backward pass. auto: "
        "where the plan finds no room for them.",
    )
    logps_workspace_bytes: Annotated[int, Bound(at_least=2**20)] | Auto = option(
        256 * 2**20,
        "Most bytes that the log-probs may borrow, by default 256 MiB. auto: what the plan finds "
        "room for.",
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
        None,
        "Steps between evaluations, or below 1 their share of all steps; by default logging_steps.",
    )
    eval_delay: NonNegative = option(0, "Steps or epochs before the first evaluation.")
    eval_on_start: bool = option(False, "Evaluate before the first step.")
    per_device_eval_batch_size: Count = option(8, "Pairs per evaluation batch.")
    load_best_model_at_end: bool = option(False, "End with the best checkpoint, not the last.")
    metric_for_best_model: str | None = option(
        None, "Metric that tells the best checkpoint; by default the loss."
    )
    greater_is_better: bool | None = option(
        None, "Whether that metric should rise; by default unless its name ends in loss."
    )

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
    save_total_limit: Count | None = option(None, "Most checkpoints to keep; by default all.")
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
        ["none"], "Trackers, through accelerate: tensorboard, wandb, mlflow, trackio, …, all, none."
    )
    project: str = option("huggingface", "Project of the tracker.")
    trackio_space_id: str | None = option(None, "Space that shows Trackio's runs.")

    def __post_init__(self) -> None:
        if isinstance(self.resume_from_checkpoint, bool):
            self.resume_from_checkpoint = str(self.resume_from_checkpoint)
        check_fields(self, TrainingOptions)
        if (self.resume_from_checkpoint or "").lower() == "false":
            self.resume_from_checkpoint = None
        if self.max_tokens_per_pack is None:
            self.max_tokens_per_pack = AUTO
        full_or_none = {"full": True, "none": False}  # transformers' switch for the same two
        self.gradient_checkpointing = full_or_none.get(
            str(self.gradient_checkpointing), self.gradient_checkpointing
        )
        check_together(self)

    @property
    def computes_reference_first(self) -> bool:
        """Whether all reference log-probs are known before training."""
        return self.precompute_ref_log_probs or self.ref_cache_dir is not None
