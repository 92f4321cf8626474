"""`DPOTrainer`: TRL's interface over a loop that reads top to bottom in `train` and `_train_step`.

A step is a fixed number of pairs, split into packs; its gradient is the sum over its pairs divided
by their number, however it was packed. Tokenising, packing, the forward, the loss, references and
checkpoints are each in a module of their own.
"""

import logging
import math
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState, set_seed
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    TrainerCallback,
    TrainerControl,
)
from transformers.trainer_utils import SaveStrategy, TrainOutput

from fastdpo_kernels import PreferenceOutput, preference_loss

from . import checkpoint as ckpt
from .batch import Pack
from .config import DPOConfig
from .data import TokenizedPairs, tokenize_pairs
from .errors import CheckpointError, ConfigError, DataError, ModelError
from .metrics import MetricsFile, PackStats, PreferenceMetrics, Throughput
from .model import base_model, load_pretrained, load_pretrained_tokenizer, load_weights
from .optim import make_optimizer, make_scheduler
from .policy import prepare_models
from .reference_logps import (
    LiveReference,
    ModelReference,
    PrecomputedReference,
    Reference,
    evaluating,
    precompute,
)
from .report import plot_curves
from .runtime import make_deterministic, peak_memory_gib, sum_gradients_over_ranks, sum_over_ranks
from .steps import Packer, StepPacks, StepPlan

logger = logging.getLogger(__name__)


class DPOTrainer:
    """Trains `model` on preference pairs with DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7).

    Args:
        model: a folder or hub name, a transformers causal language model, or a PEFT model.
        ref_model: the reference; by default the policy's initial state (`args.reference`).
        args: a `DPOConfig`; TRL's names.
        train_dataset: a `datasets.Dataset`, a list of dicts, or `TokenizedPairs`.
        eval_dataset: the same, or a dict of them by name.
        processing_class: the tokenizer; by default the one saved with the model.
        peft_config: adds a new adapter to `model` and trains only that.
        callbacks: transformers `TrainerCallback`s.
        optimizers: an optimizer and a scheduler to use instead of those that `args` name.
        quantization_config: for a `model` given by name: how transformers quantizes it.

    Raises `ConfigError`, `DataError`, `ModelError` or `CheckpointError`, one line each, for
    anything the user can mend.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | PeftModel | None = None,
        args: DPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[
            torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None
        ] = (None, None),
        quantization_config: Any = None,
    ):
        self.args = args if args is not None else DPOConfig(output_dir="dpo_output")
        self.device = self.args.device
        self.output_dir = Path(self.args.output_dir or "dpo_output")
        if train_dataset is None and eval_dataset is None:
            raise DataError("train_dataset is required (or eval_dataset, to evaluate only)")
        if self.args.deterministic:
            make_deterministic()
        set_seed(self.args.seed)  # an adapter's first weights are random

        if isinstance(model, str):
            name = model
            model = self._load(name, quantization_config)
        else:
            name = base_model(model).config._name_or_path
            self._refuse_load_options(quantization_config)
        if processing_class is None and _needs_tokenizer(train_dataset, eval_dataset):
            if not name:
                raise ConfigError(
                    "the model has no name to load a tokenizer by; pass processing_class="
                )
            processing_class = load_pretrained_tokenizer(
                name, trust_remote_code=self.args.trust_remote_code
            )
        self.processing_class = processing_class

        self.train_pairs = None if train_dataset is None else self._tokenize(train_dataset, "train")
        self.eval_pairs = {
            key: self._tokenize(dataset, key or "eval")
            for key, dataset in _by_name(eval_dataset).items()
        }
        models = prepare_models(model, ref_model, peft_config, self.args)
        self.model, self.packed_forward = models.policy, models.packed
        self._forward, self._reference_name = models.forward, models.reference.name
        self.packer = Packer(models.packed.mode, self.args.max_tokens_per_pack, self.device)
        self._prepare_references(models.reference)

        self.optimizer, self.lr_scheduler = optimizers
        self.state = TrainerState(
            is_local_process_zero=self.args.local_process_index == 0,
            is_world_process_zero=self.args.process_index == 0,
        )
        self.control = TrainerControl()
        self.callback_handler = CallbackHandler(
            [
                DefaultFlowCallback,
                *get_reporting_integration_callbacks(self.args.report_to),
                *(callbacks or []),
            ],
            self.model,
            self.processing_class,
            self.optimizer,
            self.lr_scheduler,
        )
        self.pack_stats = PackStats()
        self.metrics = PreferenceMetrics(self.device)
        self.metrics_file: MetricsFile | None = None
        self.control = self._event("on_init_end")

    # ---- construction -----------------------------------------------------------------------

    def _load(self, name: str, quantization_config: Any) -> PreTrainedModel | PeftModel:
        kwargs: dict[str, Any] = {**cast(dict, self.args.model_init_kwargs or {})}
        kwargs.setdefault("trust_remote_code", self.args.trust_remote_code)
        if quantization_config is not None:
            kwargs["quantization_config"] = quantization_config
        return load_pretrained(name, self.device, **kwargs)

    def _refuse_load_options(self, quantization_config: Any) -> None:
        if quantization_config is not None or self.args.model_init_kwargs:
            option = (
                "quantization_config" if quantization_config is not None else "model_init_kwargs"
            )
            raise ConfigError(
                f"{option} applies when a model is loaded, and model= is loaded already; pass the "
                f"model's name, or leave {option} out"
            )

    def _tokenize(self, dataset: Any, name: str) -> TokenizedPairs:
        if isinstance(dataset, TokenizedPairs):
            return dataset
        pairs, report = tokenize_pairs(
            dataset,
            self.processing_class,
            max_length=self.args.max_length,
            on_bad_row=self.args.on_bad_row,
            dataset_format=self.args.dataset_format,
            num_proc=self.args.dataset_num_proc,
            name=name,
            progress=not self.args.disable_tqdm,
        )
        for line in report.lines():
            logger.info(line)
        return pairs

    def _prepare_references(self, live: LiveReference) -> None:
        """One reference a dataset: the live one, or its values computed now."""
        if not self.args.precompute_ref_log_probs:
            self.live_reference: LiveReference | None = live
            self.train_reference: Reference = live
            self.eval_references: dict[str, Reference] = dict.fromkeys(self.eval_pairs, live)
            return
        if self.train_pairs is not None:
            self.train_reference = self._precompute(live, self.train_pairs, "train")
        self.eval_references = {
            key: self._precompute(live, pairs, key or "eval")
            for key, pairs in self.eval_pairs.items()
        }
        # A model of its own is not needed any more, and its memory is; adapters cost nothing.
        self.live_reference = None if isinstance(live, ModelReference) else live

    def _precompute(
        self, live: LiveReference, pairs: TokenizedPairs, name: str
    ) -> PrecomputedReference:
        return precompute(
            live,
            pairs,
            self.packer,
            description=f"Reference log-probs of {name}",
            progress=not self.args.disable_tqdm,
        )

    # ---- the training step ------------------------------------------------------------------

    def _loss(
        self, token_logps: torch.Tensor, pack: Pack, ref_token_logps: torch.Tensor
    ) -> PreferenceOutput:
        return preference_loss(
            token_logps,
            pack.cu_responses,
            pack.pairs,
            ref_token_logps=ref_token_logps,
            beta=self.args.beta,
            loss_type=self.args.loss_type[0],
            label_smoothing=self.args.label_smoothing,
        )

    def _train_step(self, step: StepPacks) -> None:
        """Gradients of one step, summed over its packs and ranks, clipped, and applied."""
        assert self.optimizer is not None and self.lr_scheduler is not None
        ref_token_logps = self.train_reference.token_logps(step.packs)  # no graph
        for pack, reference in zip(step.packs, ref_token_logps, strict=True):
            token_logps = self._forward(self.model, pack)  # [N]
            output = self._loss(token_logps, pack, reference)
            if self._check_first_step:
                self._compare_with_reference(output, pack, token_logps)
            # Every backward adds a sum over pairs; dividing by the step's pairs makes the mean.
            (output.losses.sum() / step.n_pairs).backward()
            self.metrics.add(output, pack.pairs)
        self._check_first_step = False
        sum_gradients_over_ranks(self.trainable)
        if self.args.max_grad_norm:
            self._grad_norm = nn.utils.clip_grad_norm_(self.trainable, self.args.max_grad_norm)
        self.control = self._event("on_pre_optimizer_step")
        self.optimizer.step()
        self.control = self._event("on_optimizer_step")
        self.learning_rate = self.lr_scheduler.get_last_lr()[0]  # the one this step used
        self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _compare_with_reference(
        self, output: PreferenceOutput, pack: Pack, token_logps: torch.Tensor
    ) -> None:
        """Before the first update a reference that is the policy itself gives margins of 0.

        What may differ is rounding: token log-probs err by a few eps times their size, at random
        over a response's n tokens, so by about 8 eps sqrt(n) times the mean |log-prob|.
        """
        dtype = torch.bfloat16 if self.args.bf16 else base_model(self.model).dtype
        eps = torch.finfo(dtype).eps
        logratios = torch.cat([output.chosen_rewards, output.rejected_rewards]) / self.args.beta
        lengths = pack.cu_responses.diff()[pack.pairs.T.reshape(-1)]
        size = token_logps.detach().abs().mean().clamp(min=1.0)
        excess = (logratios.abs() - 8 * eps * lengths.clamp(min=1).sqrt() * size).max()
        if excess > 0:
            worst = int(logratios.abs().argmax())
            raise ModelError(
                "before the first update policy and reference differ by "
                f"{float(logratios[worst]):+.3g} nat on a response of {int(lengths[worst])} "
                "tokens, yet the reference is the initial policy: look for dropout still on, "
                "an adapter that was trained before, or another dtype; first_step_check=False "
                "trains regardless"
            )

    # ---- the loop ---------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Trains until `max_steps` or `num_train_epochs`; returns steps, mean loss and rates.

        `resume_from_checkpoint` is a checkpoint folder, or True for the newest in `output_dir`;
        a resumed run equals the uninterrupted one bit for bit under the same conditions.
        """
        args = self.args
        if self.train_pairs is None:
            raise DataError("train() needs a train_dataset; this trainer was made without one")
        resume = resume_from_checkpoint or args.resume_from_checkpoint
        if args.process_index == 0:
            ckpt.prepare_output_dir(
                self.output_dir, resuming=bool(resume), overwrite=args.overwrite_output_dir
            )
        self.metrics_file = MetricsFile(self.output_dir / ckpt.METRICS_FILE)
        self.plan = StepPlan(self.train_pairs, args, self.packer)
        self.state.max_steps = self.plan.max_steps
        self.state.num_train_epochs = self.plan.n_epochs
        self.state.compute_steps(args, self.plan.max_steps)
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model, args)
        if self.lr_scheduler is None:
            self.lr_scheduler = make_scheduler(self.optimizer, args, self.state.max_steps)
        self.callback_handler.optimizer = self.optimizer
        self.callback_handler.lr_scheduler = self.lr_scheduler
        if resume:
            self._resume(ckpt.find_checkpoint(self.output_dir, resume))
        if args.process_index == 0:
            args.save_yaml(self.output_dir / ckpt.CONFIG_FILE)
        self._check_first_step = (
            args.first_step_check
            and self.state.global_step == 0
            and self.train_reference.equals_initial_policy
        )
        self._grad_norm: torch.Tensor | None = None
        self.model.train()
        started = time.perf_counter()
        self.throughput = Throughput()
        self.control = self._event("on_train_begin")
        if args.eval_on_start and self.state.global_step == 0 and self.eval_pairs:
            self._evaluate_and_track()
        with self._progress_bar() as self.progress:
            for epoch in range(
                self.state.global_step // self.plan.steps_per_epoch, self.plan.n_epochs
            ):
                self._train_epoch(epoch)
                if self.control.should_training_stop:
                    break
        if args.load_best_model_at_end and self.state.best_model_checkpoint:
            load_weights(self.model, Path(self.state.best_model_checkpoint))
        return self._finish(time.perf_counter() - started)

    def _train_epoch(self, epoch: int) -> None:
        self.control = self._event("on_epoch_begin")
        steps_per_epoch = self.plan.steps_per_epoch
        done = self.state.global_step - epoch * steps_per_epoch  # a resumed epoch's share
        for index, step in enumerate(self.plan.steps(epoch, skip=done), start=done + 1):
            self.control = self._event("on_step_begin")
            self._train_step(step)
            self.state.global_step += 1
            self.state.epoch = epoch + index / steps_per_epoch
            self.state.num_input_tokens_seen += step.stats.n_tokens
            self.pack_stats += step.stats
            self.throughput.add(step.stats)
            self.progress.update()
            self.control = self._event("on_step_end")
            self._log_evaluate_save()
            if self.control.should_epoch_stop or self.control.should_training_stop:
                break
        self.control = self._event("on_epoch_end")
        self._log_evaluate_save()

    def _log_evaluate_save(self) -> None:
        if self.control.should_log:
            self._log_training()
        began = time.perf_counter()
        metrics = self._evaluate_and_track() if self.control.should_evaluate else None
        if self.args.save_strategy == SaveStrategy.BEST:
            self.control.should_save = metrics is not None and self._is_best
        if self.control.should_save:
            self._save_checkpoint()
            self.control = self._event("on_save")
        self.throughput.pause(time.perf_counter() - began)

    # ---- logs -------------------------------------------------------------------------------

    def _log_training(self) -> None:
        """Reads the device sums (the only host synchronisation), logs them, starts anew."""
        means = self.metrics.read()
        if not means:
            return
        logs: dict[str, Any] = {"loss": means.pop("loss")}
        if not math.isfinite(logs["loss"]):
            raise ModelError(
                f"the loss is {logs['loss']} at step {self.state.global_step}; lower learning_rate "
                "or max_grad_norm, or check the dataset's rows of this step"
            )
        if self._grad_norm is not None:
            logs["grad_norm"] = float(self._grad_norm)
        logs["learning_rate"] = self.learning_rate
        logs |= means
        logs["num_tokens"] = self.state.num_input_tokens_seen
        logs |= self.throughput.read()
        logs["waste"] = self.pack_stats.waste
        logs["peak_memory_gib"] = peak_memory_gib(self.device)
        self.metrics.reset()
        self.throughput.reset()
        self.progress.set_postfix(
            loss=f"{logs['loss']:.4f}",
            margin=f"{logs['rewards/margins']:.3f}",
            accuracy=f"{logs['rewards/accuracies']:.2f}",
            pairs_s=f"{logs['pairs_per_second']:.1f}",
            tokens_s=f"{logs['tokens_per_second']:.0f}",
        )
        self.log(logs)

    def log(self, logs: dict[str, float]) -> None:
        """Adds `logs` to `state.log_history` and `metrics.jsonl` and hands them to callbacks."""
        logs = {**logs, "epoch": self.state.epoch}
        record = {**logs, "step": self.state.global_step}
        self.state.log_history.append(record)
        if self.metrics_file is not None and self.state.is_world_process_zero:
            self.metrics_file.append(record)
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def _progress_bar(self) -> tqdm:
        return tqdm(
            total=self.state.max_steps,
            initial=self.state.global_step,
            unit="step",
            disable=self.args.disable_tqdm or not self.state.is_local_process_zero,
        )

    def _finish(self, seconds: float) -> TrainOutput:
        training_loss = self.metrics.run_loss()
        metrics = {
            "train_runtime": seconds,
            "train_samples_per_second": self.pack_stats.n_pairs / seconds,
            "train_steps_per_second": self.state.global_step / seconds,
            "train_loss": training_loss,
        }
        self.model.eval()
        self.log(metrics)
        if self.state.is_world_process_zero:
            plot_curves(self.output_dir / ckpt.METRICS_FILE, self.output_dir / ckpt.CURVES_FILE)
        self.control = self._event("on_train_end")
        return TrainOutput(self.state.global_step, training_loss, metrics)

    # ---- evaluation -------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and rewards on `eval_dataset`, by default on those given at construction.

        Returns and logs TRL's names with the prefix: `eval_loss`, `eval_rewards/accuracies`, …;
        for a dict of datasets `eval_NAME_loss`, ….
        """
        if eval_dataset is None:
            if not self.eval_pairs:
                raise DataError("evaluate() needs an eval_dataset, here or at construction")
            sets, references = self.eval_pairs, self.eval_references
        else:
            sets = {
                key: self._tokenize(dataset, key or "eval")
                for key, dataset in _by_name(eval_dataset).items()
            }
            references = {key: self._reference_for(pairs, key) for key, pairs in sets.items()}
        logs: dict[str, float] = {}
        for key, pairs in sets.items():
            prefix = f"{metric_key_prefix}_{key}" if key else metric_key_prefix
            logs |= self._evaluate_pairs(pairs, references[key], prefix)
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def _reference_for(self, pairs: TokenizedPairs, name: str) -> Reference:
        """The reference for a dataset that came after construction."""
        live = self.live_reference
        if live is None:
            raise ConfigError(
                "precompute_ref_log_probs let the reference model go after its last use; pass this "
                "dataset as eval_dataset at construction"
            )
        if not self.args.precompute_ref_log_probs:
            return live
        return self._precompute(live, pairs, name or "eval")

    def _evaluate_pairs(
        self, pairs: TokenizedPairs, reference: Reference, prefix: str
    ) -> dict[str, float]:
        metrics = PreferenceMetrics(self.device)
        batch = self.args.per_device_eval_batch_size * self.args.world_size
        started = time.perf_counter()
        with evaluating(self.model):
            for start in tqdm(
                range(0, len(pairs), batch),
                desc=f"Evaluating {prefix}",
                leave=False,
                disable=self.args.disable_tqdm,
            ):
                ids = np.arange(start, min(start + batch, len(pairs)))
                ids = ids[self.args.process_index :: self.args.world_size]
                packs = list(self.packer.packs(pairs, ids))
                ref_token_logps = reference.token_logps(packs)
                for pack, ref in zip(packs, ref_token_logps, strict=True):
                    output = self._loss(self._forward(self.model, pack), pack, ref)
                    metrics.add(output, pack.pairs)
        seconds = time.perf_counter() - started
        logs = {f"{prefix}_{key}": value for key, value in metrics.read().items()}
        logs[f"{prefix}_runtime"] = seconds
        logs[f"{prefix}_samples_per_second"] = len(pairs) / seconds
        return logs

    def _evaluate_and_track(self) -> dict[str, float]:
        """Evaluates during training and remembers the best metric."""
        if not self.eval_pairs:
            raise ConfigError(
                "eval_strategy asks for evaluation and there is no eval_dataset; pass one, or set "
                "eval_strategy='no'"
            )
        metrics = self.evaluate()
        self._is_best = False
        name = self.args.metric_for_best_model
        if name is not None:
            key = name if name.startswith("eval_") else f"eval_{name}"
            if key not in metrics:
                raise ConfigError(
                    f"metric_for_best_model {name!r} is not measured; there are "
                    f"{', '.join(sorted(metrics))}"
                )
            value, best = metrics[key], self.state.best_metric
            better = best is None or (value > best if self.args.greater_is_better else value < best)
            if better:
                self.state.best_metric, self._is_best = value, True
                self.state.best_global_step = self.state.global_step
        return metrics

    # ---- checkpoints ------------------------------------------------------------------------

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Saves the adapter (PEFT's format) or the model (transformers'), and the tokenizer."""
        if not self.state.is_world_process_zero:
            return
        folder = Path(output_dir or self.output_dir)
        try:
            if isinstance(self.model, PeftModel):
                self.model.save_pretrained(
                    str(folder), selected_adapters=self.model.active_adapters
                )
            else:
                self.model.save_pretrained(str(folder))
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
        except OSError as error:
            raise CheckpointError(
                f"the model could not be saved in {str(folder)!r}: {error.strerror or error}"
            ) from error

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint belongs to: options that shape the run, the data, the reference."""
        assert self.train_pairs is not None
        return {
            **self.args.identity(),
            "train_dataset": ckpt.fingerprint(self.train_pairs),
            "reference model": self._reference_name,
            "world_size": self.args.world_size,
        }

    def _save_checkpoint(self) -> None:
        assert self.optimizer is not None and self.lr_scheduler is not None
        folder = self.output_dir / f"checkpoint-{self.state.global_step}"
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(folder)
        metric_sums = sum_over_ranks(self.metrics.sums.clone()).cpu()
        if not self.state.is_world_process_zero or folder.exists():
            return
        state = ckpt.ResumeState(
            trainer_state=self.state,
            optimizer={} if self.args.save_only_model else self.optimizer.state_dict(),
            scheduler=self.lr_scheduler.state_dict(),
            rng=ckpt.rng_state(),
            metric_sums=metric_sums,
            identity=self._identity(),
        )
        ckpt.save_checkpoint(folder, state, self.save_model)
        best = self.state.best_model_checkpoint
        ckpt.rotate(self.output_dir, self.args.save_total_limit, Path(best) if best else None)

    def _resume(self, folder: Path) -> None:
        assert self.optimizer is not None and self.lr_scheduler is not None
        saved = ckpt.load_checkpoint(folder)
        ckpt.check_identity(saved.identity, self._identity(), folder)
        if not saved.optimizer:
            raise CheckpointError(
                f"checkpoint {str(folder)!r} was written with save_only_model, so it has no "
                "optimizer to resume; start afresh with it as the model"
            )
        load_weights(self.model, folder)
        self.optimizer.load_state_dict(saved.optimizer)
        self.lr_scheduler.load_state_dict(saved.scheduler)
        self.state = saved.trainer_state
        self.state.is_world_process_zero = self.args.process_index == 0
        self.state.is_local_process_zero = self.args.local_process_index == 0
        if self.state.is_world_process_zero:  # which holds the sums of all ranks
            self.metrics.sums.copy_(saved.metric_sums)
        ckpt.set_rng_state(saved.rng)
        if self.metrics_file is not None and self.state.is_world_process_zero:
            self.metrics_file.keep_until(self.state.global_step)

    # ---- small things -----------------------------------------------------------------------

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Adds a transformers `TrainerCallback`."""
        self.callback_handler.add_callback(callback)

    def _event(self, name: str) -> TrainerControl:
        return getattr(self.callback_handler, name)(self.args, self.state, self.control)


def _by_name(eval_dataset: Any) -> dict[str, Any]:
    """Evaluation sets by name; a single one is named ''."""
    if eval_dataset is None:
        return {}
    return dict(eval_dataset) if isinstance(eval_dataset, dict) else {"": eval_dataset}


def _needs_tokenizer(*datasets: Any) -> bool:
    return any(
        dataset is not None and not isinstance(dataset, TokenizedPairs)
        for given in datasets
        for dataset in _by_name(given).values()
    )
