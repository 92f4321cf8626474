"""`DPOTrainer`: TRL's interface over a loop that reads top to bottom in `train` and `_train_step`.

A step is a fixed number of pairs, split into packs; its gradient is the sum over its pairs divided
by their number, however it was packed. Tokenising, packing, the forward, the loss, references and
checkpoints are each in a module of their own.
"""

import contextlib
import functools
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState, set_seed
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    TrainerCallback,
    TrainerControl,
)
from transformers.trainer_utils import SaveStrategy, TrainOutput

from . import checkpoint as ckpt
from . import resume
from .accumulate import make_gradients
from .batch import Pack
from .body import compiled_graphs
from .config import DPOConfig
from .errors import ConfigError, DataError
from .first_step import check_first_step
from .fp8 import use_fp8_base
from .hub import check_can_push
from .interrupts import StopRequests
from .logps import PackedOutput
from .metrics import TOKEN_STATS
from .model import (
    base_model,
    frozen_weights,
    load_by_name,
    load_policy,
    load_pretrained_tokenizer,
    load_weights,
    n_embeddings,
)
from .nonfinite import FiniteGuard, finite_or_none, grad_norm, refuse_nonfinite
from .objective import Objective, PackLoss, ScoredPack
from .optim import make_optimizer, make_scheduler
from .option_names import checked_arguments
from .plan_run import settle, start_over
from .policy import prepare_models, save_memory
from .reference_logps import evaluating
from .reference_sync import follow
from .report import plot_curves
from .router_loss import router_grad, router_loss, step_router_sums
from .run_data import References, by_name, needs_tokenizer, tokenized
from .run_folder import (
    CONFIG_FILE,
    CURVES_FILE,
    DATA_REPORT_FILE,
    METRICS_FILE,
    write_json,
)
from .run_log import MetricsFile, RunLog
from .runtime import make_deterministic, sum_gradients_over_ranks
from .samples import sample_prompts
from .steps import Packer, StepPacks, StepPlan
from .trackers import Trackers
from .trainer_interface import TrainerInterface

logger = logging.getLogger(__name__)


class DPOTrainer(TrainerInterface):
    """Trains `model` on preference pairs with DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7).

    Args:
        model: a folder or hub name, a transformers causal language model, or a PEFT model.
        ref_model: the reference, a model or its name; by default the policy's initial state
            (`args.reference`).
        args: a `DPOConfig`; TRL's names.
        train_dataset: a `datasets.Dataset`, a list of dicts, or `TokenizedPairs`; of pairs, or for
            kto and apo_zero_unpaired of single responses with labels.
        eval_dataset: the same, or a dict of them by name.
        processing_class: the tokenizer; by default the one saved with the model.
        peft_config: adds a new adapter to `model` and trains only that.
        callbacks: transformers `TrainerCallback`s. A substep is a pack whose gradient has been
            added, so `on_substep_end` comes once for every pack of a step but its last.
        optimizers: an optimizer and a scheduler to use instead of those that `args` name.
        quantization_config: for a `model` given by name: how transformers quantizes it.

    Raises `ConfigError`, `DataError`, `ModelError` or `CheckpointError`, one line each, for
    anything the user can mend.
    """

    @checked_arguments
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
        if not isinstance(self.args, DPOConfig):
            raise ConfigError(
                f"args is a {type(args).__name__}, and DPOTrainer takes a DPOConfig; write "
                "DPOConfig(...), which has the same options under the same names"
            )
        self.device = self.args.device
        self.output_dir = Path(self.args.output_dir or "dpo_output")
        if train_dataset is None and eval_dataset is None:
            raise DataError("train_dataset is required (or eval_dataset, to evaluate only)")
        if self.args.push_to_hub:
            check_can_push()
        self.objective = Objective(self.args)
        if self.args.deterministic:
            make_deterministic(self.device)
        set_seed(self.args.seed)  # an adapter's first weights are random

        name = model if isinstance(model, str) else base_model(model).config._name_or_path
        model = load_policy(model, self.args, quantization_config)
        if isinstance(ref_model, str):
            ref_model = load_by_name(ref_model, self.args)
        if processing_class is None and needs_tokenizer(train_dataset, eval_dataset):
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
        self._reference_name, self.router = models.reference.name, models.router
        self.frozen_weights = frozen_weights(models.policy, models.reference.model)
        if self.router is not None and self.objective.has_kl:
            raise ConfigError(
                f"loss_type {self.args.loss_type[0]}: the router's loss would count mismatched "
                "responses, which are not trained on; set router_aux_loss_coef: 0"
            )
        self.compiled = models.compiled
        self.data_reports: dict[str, list[str]] = {}  # what became of each dataset's rows
        read = functools.partial(
            tokenized,
            objective=self.objective,
            tokenizer=processing_class,
            reports=self.data_reports,
            n_embeddings=n_embeddings(self.model),
        )
        self.train_pairs = None if train_dataset is None else read(train_dataset, "train")
        self.eval_pairs = {
            key: read(dataset, key or "eval") for key, dataset in by_name(eval_dataset).items()
        }
        packer = Packer(
            models.packed.mode,
            0,
            self.device,
            models.packed.max_seqlen,
            with_last=self.router is not None,  # its loss is one of all tokens
            rope_threshold=models.packed.rope_threshold,
        )
        self.args, self.run_plan = settle(models, self.train_pairs, packer, self.args)
        plans_workspace = self.run_plan is not None and self.run_plan.chose("logps_workspace_bytes")
        self._forward = save_memory(models, self.args, rebind=plans_workspace)
        assert isinstance(self.args.max_tokens_per_pack, int)
        self.packer = packer.of_tokens(self.args.max_tokens_per_pack, padded=models.compiled)
        if self.args.base_precision == "fp8":
            self._use_fp8_base()
        self.references = References(
            models.reference, models.packed_reference, self.packer, self.args
        )
        if self.train_pairs is not None:
            self.train_reference = self.references.of(self.train_pairs, "train")
        self.eval_references = {
            key: self.references.of(pairs, key or "eval") for key, pairs in self.eval_pairs.items()
        }
        self.references.let_go()
        self.samples = sample_prompts(self.args, self.eval_pairs, processing_class)

        self.optimizer, self.lr_scheduler = optimizers
        self.state = TrainerState(
            is_local_process_zero=self.args.local_process_index == 0,
            is_world_process_zero=self.args.process_index == 0,
        )
        self.control = TrainerControl()
        self.trackers = Trackers(self.args)
        self.callback_handler = CallbackHandler(
            [
                DefaultFlowCallback,
                *([self.trackers] if self.trackers.names else []),
                *(callbacks or []),
            ],
            self.model,
            self.processing_class,
            self.optimizer,
            self.lr_scheduler,
        )
        self.metrics = self._new_metrics(router=self.router is not None)
        self.run_log = RunLog(self.device)
        self.stop_requests = StopRequests()
        self.guard = FiniteGuard(self.args.on_nonfinite, self.device)
        self.metrics_file: MetricsFile | None = None
        self.control = self._event("on_init_end")

    def _use_fp8_base(self) -> None:
        """Before any reference is computed, on the first pack of the data."""
        datasets = [self.train_pairs, *self.eval_pairs.values()]
        pairs = next(pairs for pairs in datasets if pairs is not None)
        n = min(len(pairs), self.args.pairs_per_step)
        with evaluating(self.model):
            pack = self.packer.pack(pairs, self.packer.plan(pairs, np.arange(n))[0]) if n else None
            self.fp8_error = use_fp8_base(self.model, pack, self._forward)

    # ---- the training step ------------------------------------------------------------------

    def _score(self, pack: Pack, reference: torch.Tensor | None) -> tuple[ScoredPack, PackedOutput]:
        """The policy on one pack: its log-probs apart from their graph, and the output with it."""
        stats = self.objective.stats + (TOKEN_STATS if self.args.log_token_stats else ())
        router = self.router is not None and self.model.training
        output = self._forward.with_stats(self.model, pack, stats, router)
        scored = ScoredPack(pack, output.token_logps.detach(), reference, output.stats)
        return scored, output

    def _train_step(self, step: StepPacks) -> None:
        """Gradients of one step, summed over its packs and ranks, clipped, and applied."""
        assert self.optimizer is not None and self.lr_scheduler is not None
        skips = self.guard.mode == "skip"
        sums = self.metrics.sums.clone() if skips else self.metrics.sums
        references = self.train_reference.token_logps(step.packs)  # no graph
        self.gradients.begin(len(step.packs))
        needs_whole_step = self.objective.needs_whole_step or self.router is not None
        if needs_whole_step and len(step.packs) != 1:
            self._backward_in_two_passes(step, references)
        else:
            for number, (pack, reference) in enumerate(zip(step.packs, references, strict=True), 1):
                scored, output = self._score(pack, reference)
                (loss,) = self.objective([scored], step.mean_chosen_length, grad=True)
                self._count(scored, loss)
                self._backward(output, loss, step, self._router_grad([output], step))
                self._end_substep(number, step)
        self._check_first_step = False
        if self.run_plan is not None:
            self.run_plan.before_update(self)
        self.gradients.finish()
        sum_gradients_over_ranks(self.trainable)
        if self.args.max_grad_norm:
            self._grad_norm = nn.utils.clip_grad_norm_(self.trainable, self.args.max_grad_norm)
        else:
            self._grad_norm = grad_norm(self.trainable)
        held = self.guard.judge(self.state.global_step + 1, self._grad_norm)
        if skips:  # else its numbers are never read
            self.metrics.sums = torch.where(held > 0, sums, self.metrics.sums)
        self.control = self._event("on_pre_optimizer_step")
        self.before_first_step = None  # from here on no step can be taken back
        self.guard.apply(self.optimizer)
        self.control = self._event("on_optimizer_step")
        self.learning_rate = self.lr_scheduler.get_last_lr()[0]  # the one this step used
        self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _backward(
        self,
        output: PackedOutput,
        loss: PackLoss,
        step: StepPacks,
        router_grad: torch.Tensor | None,
    ) -> None:
        """Adds a pack's gradient: a sum over pairs, over the step's pairs, which makes the mean.

        router_grad [E]: the step's, which its packs share.
        """
        assert loss.token_grad is not None
        tensors, grads = [output.token_logps], [loss.token_grad / step.n_pairs]
        if router_grad is not None:
            assert output.router is not None
            tensors.append(output.router.probs)
            grads.append(router_grad.to(output.router.probs.dtype))
        torch.autograd.backward(tensors, grads)

    def _router_grad(self, outputs: Sequence[PackedOutput], step: StepPacks) -> torch.Tensor | None:
        """d router loss / d a pack's router sums, from all packs of the step; counts the loss."""
        if self.router is None:
            return None
        parts = [output.router for output in outputs if output.router is not None]
        sums = step_router_sums(parts, self.router.n_experts, self.device)
        n_pairs = sum(len(pack.pair_ids) for pack in step.packs)
        self.metrics.add_router(router_loss(sums), self.router.coefficient, n_pairs)
        return self.router.coefficient * router_grad(sums)

    def _backward_in_two_passes(
        self, step: StepPacks, references: Sequence[torch.Tensor | None]
    ) -> None:
        """For a loss of the whole step: all packs' outputs first, then each pack's gradient.

        Memory stays that of one pack; the price is a second forward pass.
        """
        rng = None if self.args.disable_dropout else ckpt.rng_state()  # one dropout in both passes
        with torch.no_grad():
            both = [
                self._score(pack, reference)
                for pack, reference in zip(step.packs, references, strict=True)
            ]
        scored = [one for one, _ in both]
        trained = step.trained or step.packs
        losses = []
        if scored:
            losses = self.objective(scored, step.mean_chosen_length, grad=True, trained=trained)
        router_grad = self._router_grad([output for _, output in both], step)
        if rng is not None:
            ckpt.set_rng_state(rng)
        parts = zip(scored, losses, trained, strict=True)
        for number, (one, loss, pack) in enumerate(parts, 1):
            router = router_grad is not None
            output = self._forward.with_stats(self.model, pack, (), router)
            self._count(one, loss)
            self._backward(output, loss, step, router_grad)
            self._end_substep(number, step)

    def _end_substep(self, number: int, step: StepPacks) -> None:
        """After the gradient of the step's pack `number` of 1, 2, …; the last one's end is the
        step's, as in transformers."""
        if number < len(step.packs):
            self.control = self._event("on_substep_end")

    def _count(self, scored: ScoredPack, loss: PackLoss) -> None:
        """Before the backward pass, which may update weights already (optimizer_in_backward)."""
        if self._check_first_step:
            dtype = torch.bfloat16 if self.args.bf16 else base_model(self.model).dtype
            check_first_step(scored, loss, self.args.beta, dtype)
        self.metrics.add(loss, scored.pack, scored.stats)
        self.guard.note(scored.pack.pair_ids, loss.losses)

    # ---- the loop ---------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Trains until `max_steps` or `num_train_epochs`; returns steps, mean loss and rates.

        `resume_from_checkpoint` is a checkpoint folder, True for the newest whole one in
        `output_dir`, or "auto" for that one if there is any; a resumed run equals the uninterrupted
        one bit for bit under the same conditions. SIGTERM and SIGINT end it after the step in
        hand with a checkpoint and `Interrupted`, a `KeyboardInterrupt`; several ranks all end
        after the next step that logs, evaluates or saves, whichever of them the signal came to.
        """
        args = self.args
        if self.train_pairs is None:
            raise DataError("train() needs a train_dataset; this trainer was made without one")
        trained = self.objective.trained_pairs(self.train_pairs)
        self.plan = StepPlan(self.train_pairs, args, self.packer, trained)
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
        # Whatever could be refused has been by now: only then may an earlier run be cleared away.
        self.gradients = make_gradients(self.optimizer, args, self.plan, self.guard)
        self.guard.prepare(self.optimizer)
        found = resume.open_folder(self, resume_from_checkpoint or args.resume_from_checkpoint)
        self.metrics_file = MetricsFile(self.output_dir / METRICS_FILE)
        if found and self.run_plan is not None:
            self.packer = self.plan.packer = self.run_plan.packer_of(self.output_dir, self.packer)
        self.place: tuple[int, int] = (0, 0)
        if found:
            resume.put_back(self, found)
        if args.process_index == 0:
            args.save_yaml(self.output_dir / CONFIG_FILE)
            write_json(self.output_dir / DATA_REPORT_FILE, self.data_reports)
            if self.run_plan is not None:
                self.run_plan.write(self.output_dir)
        self._check_first_step = (
            args.first_step_check
            and self.state.global_step == 0
            and self.train_reference.equals_initial_policy
        )
        self._grad_norm: torch.Tensor | None = None
        self._saved_step = self.state.global_step if found else -1
        self.model.train()
        with self.trackers:
            return self._run_through()

    def _run_through(self) -> TrainOutput:
        args = self.args
        self.control = self._event("on_train_begin")
        if args.eval_on_start and self.state.global_step == 0:
            self._evaluate_and_track()
        started, self._first_step = time.perf_counter(), self.state.global_step
        self._pairs_before = self.pack_stats.n_pairs  # of a run that is resumed
        self.run_log.throughput.reset()
        # What a first step that runs out of memory takes back: see start_over.
        self.before_first_step = self.metrics.sums.clone(), ckpt.rng_state()
        plan = self.run_plan
        measuring = plan.measuring(self) if plan else contextlib.nullcontext()
        progress = tqdm(
            total=self.state.max_steps,
            initial=self.state.global_step,
            unit="step",
            disable=args.disable_tqdm or not self.state.is_local_process_zero,
        )
        with progress as self.run_log.bar, self.stop_requests, self.gradients, measuring:
            while self.state.global_step < self.state.max_steps:
                self._train_epoch()
                if self.control.should_training_stop or self.place[0] == self.plan.n_epochs:
                    break
        refuse_nonfinite(self)  # steps that no log came after
        if args.load_best_model_at_end and self.state.best_model_checkpoint:
            load_weights(self.model, Path(self.state.best_model_checkpoint))
        return self._finish(time.perf_counter() - started)

    def _train_epoch(self) -> None:
        self.control = self._event("on_epoch_begin")
        epoch, index = self.place
        steps = self.plan.steps(epoch, skip=index)
        while (step := next(steps, None)) is not None:
            self.control = self._event("on_step_begin")
            short = None
            try:
                self._train_step(step)
            except torch.OutOfMemoryError as error:
                short = error.with_traceback(None)  # whose frames hold the activations
            if short is not None:
                start_over(self, step, short)
                steps = self.plan.steps(epoch, skip=index)
                continue
            index += 1
            self.state.global_step += 1
            self.place = (epoch, index)
            self._move_reference()
            self.state.epoch = epoch + index / self.plan.steps_per_epoch
            self.state.num_input_tokens_seen += step.stats.n_tokens
            self.run_log.add(step.stats)
            if self.run_plan is not None:
                self.run_plan.after_step(self)
            self.control = self._event("on_step_end")
            # What an epoch's end asks for belongs to its last step: one checkpoint holds both.
            is_last = index == self.plan.steps_per_epoch or self._stops
            if is_last:
                self.control = self._event("on_epoch_end")
            control = self.control  # whose flags `_log_evaluate_save` clears
            waits = control.should_log or control.should_evaluate or control.should_save
            self._log_evaluate_save()
            resume.end_if_asked(self, self.stop_requests.to_obey(self.device, agree=waits))
            if not is_last and self._stops:  # an evaluation said so
                self.control = self._event("on_epoch_end")
                self._log_evaluate_save()
            if is_last or self._stops:
                break
        self.place = (epoch + 1, 0)

    @property
    def _stops(self) -> bool:
        return self.control.should_epoch_stop or self.control.should_training_stop

    def next_place(self) -> tuple[int, int]:
        """(epoch, steps of it that are done), where a resumed run goes on."""
        epoch, done = self.place
        if done == self.plan.steps_per_epoch or self.control.should_epoch_stop:
            return (epoch + 1, 0)
        return (epoch, done)

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
            resume.save(self)
        self.run_log.throughput.pause(time.perf_counter() - began)

    def _finish(self, seconds: float) -> TrainOutput:
        training_loss = self.metrics.run_loss()
        metrics = {
            "train_runtime": seconds,
            "train_samples_per_second": (self.pack_stats.n_pairs - self._pairs_before) / seconds,
            "train_steps_per_second": (self.state.global_step - self._first_step) / seconds,
            "train_loss": training_loss,
        }
        self.model.eval()
        self.log(metrics)
        if self.state.is_world_process_zero:
            try:
                plot_curves(self.output_dir / METRICS_FILE, self.output_dir / CURVES_FILE)
            except OSError as error:  # a full disk; the model is still to be saved
                logger.warning("%s could not be written: %s", CURVES_FILE, error)
        self.control = self._event("on_train_end")
        return TrainOutput(self.state.global_step, training_loss, metrics)

    # ---- logs -------------------------------------------------------------------------------

    def _log_training(self) -> None:
        """Reads the device sums (the only host synchronisation), logs them, starts anew."""
        refuse_nonfinite(self)
        means = self.metrics.read()
        if not means:
            return
        logs: dict[str, Any] = {"loss": means.pop("loss")}
        if (norm := finite_or_none(self._grad_norm)) is not None:
            logs["grad_norm"] = norm
        if self.guard.mode == "skip":
            logs["skipped_steps"] = self.guard.n_bad
        logs["learning_rate"] = self.learning_rate
        logs |= means | self.run_log.read()
        if self.compiled:
            logs["compiled_graphs"] = compiled_graphs()
        self.metrics.reset()
        self.run_log.show(logs)
        self.log(logs)
