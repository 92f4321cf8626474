"""`DPOTrainer`: TRL's interface over a loop that reads top to bottom in `train` and `_train_step`.

A step is a fixed number of pairs, split into packs; its gradient is the sum over its pairs divided
by their number, however it was packed. Tokenising, packing, the forward, the loss, references and
checkpoints are each in a module of their own.
"""

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
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

from . import checkpoint as ckpt
from .batch import Pack
from .config import DPOConfig
from .data import TokenizedPairs, tokenize_pairs
from .data_columns import require_columns
from .errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MissingPackageError,
    ModelError,
)
from .first_step import check_first_step
from .logps import PackedForwardInfo
from .metrics import TOKEN_STATS, MetricsFile, PackStats, PreferenceMetrics, Throughput
from .model import (
    base_model,
    load_by_name,
    load_policy,
    load_pretrained_tokenizer,
    load_weights,
    model_identity,
)
from .objective import Objective, PackLoss, ScoredPack, number_columns
from .optim import make_optimizer, make_scheduler
from .policy import open_reference_cache, prepare_models
from .precompute import Precomputation, PrecomputedReference, precompute
from .reference_logps import LiveReference, ModelReference, Reference, evaluating
from .reference_sync import follow, load_reference_state, reference_state
from .report import plot_curves
from .runtime import (
    make_deterministic,
    peak_memory_gib,
    sum_gradients_over_ranks,
    sum_over_ranks,
    total_over_ranks,
)
from .steps import Packer, StepPacks, StepPlan, mean_chosen_length

logger = logging.getLogger(__name__)


class DPOTrainer:
    """Trains `model` on preference pairs with DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7).

    Args:
        model: a folder or hub name, a transformers causal language model, or a PEFT model.
        ref_model: the reference, a model or its name; by default the policy's initial state
            (`args.reference`).
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
        ref_model: str | PreTrainedModel | PeftModel | None = None,
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
        self.objective = Objective(self.args)
        if self.args.deterministic:
            make_deterministic()
        set_seed(self.args.seed)  # an adapter's first weights are random

        name = model if isinstance(model, str) else base_model(model).config._name_or_path
        model = load_policy(model, self.args, quantization_config)
        if isinstance(ref_model, str):
            ref_model = load_by_name(ref_model, self.args)
        if processing_class is None and _needs_tokenizer(train_dataset, eval_dataset):
            processing_class = load_pretrained_tokenizer(
                name, trust_remote_code=self.args.trust_remote_code
            )
        self.processing_class = processing_class

        models = prepare_models(
            model,
            ref_model,
            peft_config,
            self.args,
            needs_reference=self.objective.needs_reference,
        )
        self.model, self.packed_forward = models.policy, models.packed
        self._forward, self._reference_name = models.forward, models.reference.name
        self.packer = Packer(
            models.packed.mode,
            self.args.max_tokens_per_pack,
            self.device,
            models.packed.max_seqlen,
        )
        self.train_pairs = None if train_dataset is None else self._tokenize(train_dataset, "train")
        self.eval_pairs = {
            key: self._tokenize(dataset, key or "eval")
            for key, dataset in _by_name(eval_dataset).items()
        }
        self._prepare_references(models.reference, models.packed_reference)

        self.optimizer, self.lr_scheduler = optimizers
        self.state = TrainerState(
            is_local_process_zero=self.args.local_process_index == 0,
            is_world_process_zero=self.args.process_index == 0,
        )
        self.control = TrainerControl()
        self.callback_handler = CallbackHandler(
            [
                DefaultFlowCallback,
                *_tracker_callbacks(self.args.report_to),
                *(callbacks or []),
            ],
            self.model,
            self.processing_class,
            self.optimizer,
            self.lr_scheduler,
        )
        self.pack_stats = PackStats()
        self.metrics = self._new_metrics()
        self.metrics_file: MetricsFile | None = None
        self.control = self._event("on_init_end")

    # ---- construction -----------------------------------------------------------------------

    def _tokenize(self, dataset: Any, name: str) -> TokenizedPairs:
        wanted = number_columns(self.args)
        if isinstance(dataset, TokenizedPairs):
            require_columns(wanted, list(dataset.columns), name)
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
            number_columns=wanted,
        )
        for line in report.lines():
            logger.info(line)
        return pairs

    def _new_metrics(self) -> PreferenceMetrics:
        return PreferenceMetrics(self.device, token_stats=self.args.log_token_stats)

    def _prepare_references(self, live: LiveReference, packed: PackedForwardInfo) -> None:
        """One reference a dataset: the live one, or its values computed now."""
        self.reference_cache = None
        self.precomputations: dict[str, Precomputation] = {}
        if not self.args.computes_reference_first:
            self.live_reference: LiveReference | None = live
            self.train_reference: Reference = live
            self.eval_references: dict[str, Reference] = dict.fromkeys(self.eval_pairs, live)
            return
        if self.args.ref_cache_dir is not None:
            self.reference_cache = open_reference_cache(live, packed, self.args)
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
        reference = precompute(
            live,
            pairs,
            self.packer,
            cache=self.reference_cache,
            description=f"Reference log-probs of {name}",
            progress=not self.args.disable_tqdm,
        )
        self.precomputations[name] = reference.precomputation
        return reference

    # ---- the training step ------------------------------------------------------------------

    def _score(self, pack: Pack, reference: torch.Tensor | None) -> tuple[ScoredPack, torch.Tensor]:
        """The policy on one pack: its log-probs apart from their graph, and with it [N]."""
        stats = self.objective.stats + (TOKEN_STATS if self.args.log_token_stats else ())
        output = self._forward.with_stats(self.model, pack, stats)
        scored = ScoredPack(pack, output.token_logps.detach(), reference, output.stats)
        return scored, output.token_logps

    def _train_step(self, step: StepPacks) -> None:
        """Gradients of one step, summed over its packs and ranks, clipped, and applied."""
        assert self.optimizer is not None and self.lr_scheduler is not None
        references = self.train_reference.token_logps(step.packs)  # no graph
        if self.objective.needs_whole_step and len(step.packs) > 1:
            self._backward_in_two_passes(step, references)
        else:
            for pack, reference in zip(step.packs, references, strict=True):
                scored, token_logps = self._score(pack, reference)
                (loss,) = self.objective([scored], step.mean_chosen_length, grad=True)
                self._backward(token_logps, loss, step)
                self._count(scored, loss)
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

    def _backward(self, token_logps: torch.Tensor, loss: PackLoss, step: StepPacks) -> None:
        """Adds a pack's gradient: a sum over pairs, over the step's pairs, which makes the mean."""
        assert loss.token_grad is not None
        token_logps.backward(loss.token_grad / step.n_pairs)

    def _backward_in_two_passes(
        self, step: StepPacks, references: Sequence[torch.Tensor | None]
    ) -> None:
        """For a loss of the whole step: all packs' log-probs first, then each pack's gradient.

        Memory stays that of one pack; the price is a second forward pass.
        """
        rng = None if self.args.disable_dropout else ckpt.rng_state()  # one dropout in both passes
        with torch.no_grad():
            scored = [
                self._score(pack, reference)[0]
                for pack, reference in zip(step.packs, references, strict=True)
            ]
        losses = self.objective(scored, step.mean_chosen_length, grad=True)
        if rng is not None:
            ckpt.set_rng_state(rng)
        for one, loss in zip(scored, losses, strict=True):
            self._backward(self._forward(self.model, one.pack), loss, step)
            self._count(one, loss)

    def _count(self, scored: ScoredPack, loss: PackLoss) -> None:
        if self._check_first_step:
            dtype = torch.bfloat16 if self.args.bf16 else base_model(self.model).dtype
            check_first_step(scored, loss, self.args.beta, dtype)
        self.metrics.add(loss, scored.pack, scored.stats)

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
        self._saved_step = self.state.global_step if resume else -1
        self.model.train()
        self.control = self._event("on_train_begin")
        if args.eval_on_start and self.state.global_step == 0:
            self._evaluate_and_track()
        started, self._first_step = time.perf_counter(), self.state.global_step
        self.throughput = Throughput()
        with self._progress_bar() as self.progress:
            epoch = self.state.global_step // self.plan.steps_per_epoch
            while self.state.global_step < self.state.max_steps:
                self._train_epoch(epoch)
                epoch += 1
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
            self._move_reference()
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

    def _move_reference(self) -> None:
        """TR-DPO: every so many steps the reference takes a share of the policy."""
        every = self.args.ref_model_sync_steps
        if self.args.sync_ref_model and self.state.global_step % every == 0:
            assert self.live_reference is not None
            follow(self.live_reference, self.model, self.args.ref_model_mixup_alpha)

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
        logs["num_tokens"] = int(total_over_ranks(self.state.num_input_tokens_seen, self.device))
        logs |= self.throughput.read(self.device)
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
            "train_steps_per_second": (self.state.global_step - self._first_step) / seconds,
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
                "the reference was computed before training, and its model let go after its last "
                "use; pass this dataset as eval_dataset at construction"
            )
        if not self.args.computes_reference_first:
            return live
        return self._precompute(live, pairs, name or "eval")

    def _evaluate_pairs(
        self, pairs: TokenizedPairs, reference: Reference, prefix: str
    ) -> dict[str, float]:
        metrics = self._new_metrics()
        batch = self.args.per_device_eval_batch_size * self.args.world_size
        mean_length = mean_chosen_length(pairs, np.arange(len(pairs)))
        started = time.perf_counter()
        waiting: list[ScoredPack] = []  # [N] each; a loss of the whole set waits for all of them
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
                references = reference.token_logps(packs)
                for pack, ref in zip(packs, references, strict=True):
                    waiting.append(self._score(pack, ref)[0])
                is_last = start + batch >= len(pairs)
                if is_last or not self.objective.needs_whole_step:
                    losses = self.objective(waiting, mean_length, grad=False)
                    for scored, loss in zip(waiting, losses, strict=True):
                        metrics.add(loss, scored.pack, scored.stats)
                    waiting.clear()
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
                adapters = self.model.active_adapters
                self.model.save_pretrained(str(folder), selected_adapters=adapters)
            else:
                self.model.save_pretrained(str(folder))
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"the model could not be saved in {str(folder)!r}: {error}"
            ) from error

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint belongs to: options that shape the run, the data, the reference."""
        assert self.train_pairs is not None
        return {
            **self.args.identity(),
            **model_identity(self.model),
            "train_dataset": ckpt.fingerprint(self.train_pairs),
            "reference model": self._reference_name,
            "world_size": self.args.world_size,
        }

    def _save_checkpoint(self) -> None:
        assert self.optimizer is not None and self.lr_scheduler is not None
        folder = self.output_dir / f"checkpoint-{self.state.global_step}"
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(folder)
        if self._saved_step == self.state.global_step:  # at a step's end, and again at the run's
            return
        self._saved_step = self.state.global_step
        metric_sums = sum_over_ranks(self.metrics.sums.clone()).cpu()
        if not self.state.is_world_process_zero:
            return
        state = ckpt.ResumeState(
            trainer_state=self.state,
            optimizer={} if self.args.save_only_model else self.optimizer.state_dict(),
            scheduler=self.lr_scheduler.state_dict(),
            rng=ckpt.rng_state(),
            metric_sums=metric_sums,
            identity=self._identity(),
            reference=self._moving_reference(),
        )
        ckpt.save_checkpoint(folder, state, self.save_model)
        best = self.state.best_model_checkpoint
        ckpt.rotate(self.output_dir, self.args.save_total_limit, Path(best) if best else None)

    def _moving_reference(self) -> dict[str, Any] | None:
        """What a checkpoint must hold of a reference that moves with the policy."""
        if not self.args.sync_ref_model or self.args.save_only_model:
            return None
        assert self.live_reference is not None
        return reference_state(self.live_reference)

    def _resume(self, folder: Path) -> None:
        assert self.optimizer is not None and self.lr_scheduler is not None
        saved = ckpt.load_checkpoint(folder)
        ckpt.check_identity(saved.identity, self._identity(), folder)
        if not saved.optimizer:
            raise CheckpointError(
                f"checkpoint {str(folder)!r} was written with save_only_model, so it has no "
                "optimizer to resume; start afresh with it as the model"
            )
        try:
            load_weights(self.model, folder)
            if saved.reference is not None:
                assert self.live_reference is not None
                load_reference_state(self.live_reference, saved.reference)
            self.optimizer.load_state_dict(saved.optimizer)
            self.lr_scheduler.load_state_dict(saved.scheduler)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"checkpoint {str(folder)!r} does not fit this model or optimizer: {error}"
            ) from error
        self.state = saved.trainer_state
        self.state.compute_steps(self.args, self.plan.max_steps)  # how often may have changed
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


def _tracker_callbacks(report_to: list[str]) -> list[TrainerCallback]:
    try:
        return [made() for made in get_reporting_integration_callbacks(report_to)]
    except (ImportError, RuntimeError) as error:
        raise MissingPackageError(
            f"report_to {', '.join(report_to)}: {' '.join(str(error).split())} "
            "pip install 'fastdpo[trackers]' brings the trackers"
        ) from error


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
