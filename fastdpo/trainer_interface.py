"""What users call around the loop of trainer.py, under the names of transformers' Trainer and TRL.

Evaluating, logging, saving, describing and uploading. `DPOTrainer` sets the attributes.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState
from transformers.trainer_callback import CallbackHandler, TrainerCallback, TrainerControl

from . import saving
from .batch import Pack
from .config import DPOConfig
from .data import TokenizedPairs
from .errors import ConfigError, DataError
from .evaluation import evaluate_pairs, note_if_best
from .hub import push_folder
from .logps import PackedOutput
from .metrics import PackStats, PreferenceMetrics
from .model import n_embeddings
from .model_card import write_card
from .objective import Objective, ScoredPack
from .policy import PackForward
from .precompute import Precomputation
from .reference_cache import ReferenceCache
from .reference_logps import LiveReference, Reference, evaluating
from .run_data import References, by_name, tokenized
from .run_folder import SAMPLES_FILE
from .run_log import MetricsFile, RunLog
from .samples import SamplePrompts, SamplesFile
from .steps import Packer


class TrainerInterface:
    """The methods of `DPOTrainer` that are not the loop."""

    args: DPOConfig
    device: torch.device
    output_dir: Path
    objective: Objective
    model: PreTrainedModel | PeftModel
    processing_class: PreTrainedTokenizerBase | None
    packer: Packer
    train_pairs: TokenizedPairs | None
    eval_pairs: dict[str, TokenizedPairs]
    eval_references: dict[str, Reference]
    references: References
    data_reports: dict[str, list[str]]
    samples: SamplePrompts | None
    state: TrainerState
    control: TrainerControl
    callback_handler: CallbackHandler
    run_log: RunLog
    metrics_file: MetricsFile | None
    _forward: PackForward
    _is_best: bool

    def _score(self, pack: Pack, reference: torch.Tensor | None) -> tuple[ScoredPack, PackedOutput]:
        raise NotImplementedError

    # ---- evaluation -------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss and rewards on `eval_dataset`, by default on those given at construction.

        Returns and logs TRL's names with the prefix: `eval_loss`, `eval_rewards/accuracies`, …;
        for a dict of datasets `eval_NAME_loss`, …. A name of one given at construction stands for
        it. `ignore_keys`, of transformers' Trainer, names outputs of the model to leave out, which
        are never gathered here: refused unless empty.
        """
        if ignore_keys:
            raise ConfigError(
                f"evaluate() gathers no outputs of the model, so ignore_keys {ignore_keys} would "
                "do nothing; leave it out"
            )
        if isinstance(eval_dataset, str):
            return self._evaluate_named(eval_dataset, metric_key_prefix)
        if eval_dataset is None:
            if not self.eval_pairs:
                raise DataError("evaluate() needs an eval_dataset, here or at construction")
            sets, references = self.eval_pairs, self.eval_references
        else:
            read = functools.partial(
                tokenized,
                objective=self.objective,
                tokenizer=self.processing_class,
                n_embeddings=n_embeddings(self.model),
            )
            sets = {
                key: read(dataset, key or "eval") for key, dataset in by_name(eval_dataset).items()
            }
            references = {
                key: self.references.of(pairs, key or "eval") for key, pairs in sets.items()
            }
        return self._evaluate_sets(sets, references, metric_key_prefix)

    def _evaluate_named(self, name: str, prefix: str) -> dict[str, float]:
        if name not in self.eval_pairs:
            raise DataError(
                f"no evaluation set is called {name!r}; there are "
                f"{', '.join(map(repr, self.eval_pairs)) or 'none'}"
            )
        return self._evaluate_sets(
            {name: self.eval_pairs[name]}, {name: self.eval_references[name]}, prefix
        )

    def _evaluate_sets(
        self, sets: dict[str, TokenizedPairs], references: dict[str, Reference], prefix: str
    ) -> dict[str, float]:
        logs: dict[str, float] = {}
        with evaluating(self.model):
            for key, pairs in sets.items():
                logs |= evaluate_pairs(
                    pairs,
                    references[key],
                    self._score,
                    objective=self.objective,
                    metrics=self._new_metrics(),
                    packer=self.packer,
                    args=self.args,
                    prefix=f"{prefix}_{key}" if key else prefix,
                    after_batch=functools.partial(self._event, "on_prediction_step"),
                )
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def _new_metrics(self, router: bool = False) -> PreferenceMetrics:
        return PreferenceMetrics(
            self.device,
            token_stats=self.args.log_token_stats,
            unpaired=self.objective.unpaired,
            router=router,
        )

    def _evaluate_and_track(self) -> dict[str, float]:
        """Evaluates during training and remembers the best metric."""
        if not self.eval_pairs:
            raise ConfigError(
                "eval_strategy asks for evaluation and there is no eval_dataset; pass one, or set "
                "eval_strategy='no'"
            )
        metrics = self.evaluate()
        self._is_best = note_if_best(metrics, self.state, self.args)
        if self.samples is not None and self.state.is_world_process_zero:
            assert self.processing_class is not None
            with self._forward.autocast():
                answers = self.samples.answer(self.model, self.processing_class, self.device)
            SamplesFile(self.output_dir / SAMPLES_FILE).append(self.state.global_step, answers)
        return metrics

    # ---- logs and results ---------------------------------------------------------------------

    def log(self, logs: dict[str, float]) -> None:
        """Adds `logs` to `state.log_history` and `metrics.jsonl` and hands them to callbacks."""
        logs = {**logs, "epoch": self.state.epoch}
        record = {**logs, "step": self.state.global_step}
        self.state.log_history.append(record)
        if self.metrics_file is not None and self.state.is_world_process_zero:
            self.metrics_file.append(record)
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Saves the adapter (PEFT's format) or the model (transformers'), and the tokenizer."""
        if not self.state.is_world_process_zero:
            return
        folder = Path(output_dir or self.output_dir)
        saving.save_model(self.model, self.processing_class, folder)
        write_card(folder, saving.card_of(self, folder.name))
        if self.args.push_to_hub and output_dir is None:
            self.push_to_hub("Model save")

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Writes `README.md` into `output_dir`; TRL's name and arguments."""
        name = model_name or self.output_dir.name
        tags = [tags] if isinstance(tags, str) else tags or []
        if self.state.is_world_process_zero:
            write_card(self.output_dir, saving.card_of(self, name, dataset_name, tags))

    def push_to_hub(self, commit_message: str = "End of training") -> str | None:
        """Uploads the saved result in `output_dir` as `hub_model_id`; returns its address."""
        if not self.state.is_world_process_zero:
            return None
        return push_folder(
            self.output_dir,
            self.args.hub_model_id or self.output_dir.name,
            private=self.args.hub_private_repo,
            revision=self.args.hub_revision,
            message=commit_message,
        )

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Adds a transformers `TrainerCallback`."""
        self.callback_handler.add_callback(callback)

    @property
    def pack_stats(self) -> PackStats:
        """What the packs of the run so far held, on this rank."""
        return self.run_log.packs

    @property
    def live_reference(self) -> LiveReference | None:
        """The reference that answers for any pack; None where its model was let go."""
        return self.references.live

    @property
    def reference_cache(self) -> ReferenceCache | None:
        """Where reference log-probs are kept between runs, if anywhere."""
        return self.references.cache

    @property
    def precomputations(self) -> dict[str, Precomputation]:
        """What was computed of the reference beforehand, by dataset."""
        return self.references.precomputations

    def _event(self, name: str) -> TrainerControl:
        return getattr(self.callback_handler, name)(self.args, self.state, self.control)
