"""A run's datasets, tokenized, and the reference of each: read live or computed beforehand.

What tokenizing does is data.py's affair, what a reference is reference_logps.py's.
"""

import logging
from typing import Any

from transformers import PreTrainedTokenizerBase

from .config import DPOConfig
from .data import TokenizedPairs, tokenize_pairs
from .data_columns import require_columns
from .errors import ConfigError
from .logps import PackedForwardInfo
from .objective import Objective
from .policy import open_reference_cache
from .precompute import Precomputation, precompute
from .reference_logps import LiveReference, ModelReference, Reference
from .steps import Packer

logger = logging.getLogger(__name__)


def by_name(eval_dataset: Any) -> dict[str, Any]:
    """Evaluation sets by name; a single one is named ''."""
    if eval_dataset is None:
        return {}
    return dict(eval_dataset) if isinstance(eval_dataset, dict) else {"": eval_dataset}


def needs_tokenizer(*datasets: Any) -> bool:
    """Whether any of `datasets`, or of the sets in them, is not tokenized yet."""
    return any(
        dataset is not None and not isinstance(dataset, TokenizedPairs)
        for given in datasets
        for dataset in by_name(given).values()
    )


def tokenized(
    dataset: Any,
    name: str,
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase | None,
    reports: dict[str, list[str]] | None = None,
    n_embeddings: int | None = None,
) -> TokenizedPairs:
    """The pairs (or unpaired examples) of `dataset` that `objective` is of, with the columns that
    it asks for; says what became of the rows, and adds that to `reports` under `name`.

    n_embeddings: of the model. `DataError` for a token id that it lacks, naming the row.
    """
    args, wanted = objective.args, objective.columns
    if isinstance(dataset, TokenizedPairs):
        require_columns(wanted, list(dataset.columns), name)
        if n_embeddings is not None:
            dataset.check_ids(n_embeddings, name)
        return dataset
    pairs, report = tokenize_pairs(
        dataset,
        tokenizer,
        max_length=args.max_length,
        on_bad_row=args.on_bad_row,
        dataset_format=args.dataset_format,
        num_proc=args.dataset_num_proc,
        name=name,
        progress=not args.disable_tqdm,
        number_columns=wanted,
        mismatch_block=objective.mismatch_block,
    )
    for line in report.lines():
        logger.info(line)
    if reports is not None:
        reports[name] = report.lines()
    if n_embeddings is not None:
        pairs.check_ids(n_embeddings, name)
    return pairs


class References:
    """The reference of each dataset: `live` itself, or its values, computed when asked for.

    live: None once it was let go. cache: where values are kept between runs, if anywhere.
    precomputations: what was computed, by dataset.
    """

    def __init__(
        self, live: LiveReference, packed: PackedForwardInfo, packer: Packer, args: DPOConfig
    ):
        self.live: LiveReference | None = live
        self.packer, self.args = packer, args
        self.precomputations: dict[str, Precomputation] = {}
        self.cache = (
            open_reference_cache(live, packed, args) if args.ref_cache_dir is not None else None
        )

    def of(self, pairs: TokenizedPairs, name: str) -> Reference:
        """Raises `ConfigError` where the reference's model is gone."""
        if self.live is None:
            raise ConfigError(
                "the reference was computed before training, and its model let go after its last "
                "use; pass this dataset as eval_dataset at construction"
            )
        if not self.args.computes_reference_first:
            return self.live
        reference = precompute(
            self.live,
            pairs,
            self.packer,
            cache=self.cache,
            description=f"Reference log-probs of {name}",
            progress=not self.args.disable_tqdm,
        )
        self.precomputations[name] = reference.precomputation
        return reference

    def let_go(self) -> None:
        """Frees a model of the reference's own that is not needed any more; adapters cost
        nothing."""
        if self.args.computes_reference_first and isinstance(self.live, ModelReference):
            self.live = None
