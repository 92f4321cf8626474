"""What became of a dataset's rows, for people: counts, lengths, and one pair with its boundary.

Counts only; it decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from .data_formats import UNPAIRED


@dataclass(frozen=True)
class LengthSummary:
    """Tokens of one part (prompts, chosen or rejected responses) over all pairs."""

    total: int
    median: int
    longest: int

    def __str__(self) -> str:
        return f"{self.total:,} (median {self.median:,}, longest {self.longest:,})"


@dataclass(frozen=True)
class DataReport:
    """How `n_rows` rows became `n_pairs` pairs.

    n_dropped_*: rows left out, by reason (`identical` counts those equal before truncation,
    `identical_cut` those equal only after it, `unscored` responses without a token to score).
    n_desirable: of `n_pairs` unpaired examples, whose responses chosen_tokens and rejected_tokens
    are about by label; None for pairs.
    n_kept_bad: rows with an empty response or identical ones that are trained on, as asked.
    prompt_boundary_moved: pairs whose tokenized prompt is not the beginning of prompt + response,
    so that the response begins earlier. example: one pair, decoded, boundary marked.
    """

    name: str
    format: str
    on_bad_row: str
    max_length: int | None
    n_rows: int
    n_pairs: int
    n_prompts: int
    prompt_tokens: LengthSummary
    chosen_tokens: LengthSummary
    rejected_tokens: LengthSummary
    n_desirable: int | None = None
    n_dropped_none: int = 0
    n_dropped_empty: int = 0
    n_dropped_identical: int = 0
    n_dropped_identical_cut: int = 0
    n_dropped_unscored: int = 0
    n_dropped_tie: int = 0
    n_dropped_long_prompt: int = 0
    n_kept_bad: int = 0
    n_truncated_chosen: int = 0
    n_truncated_rejected: int = 0
    n_identical_cut: int = 0
    prompt_boundary_moved: int = 0
    n_repeats_prompt: int = 0
    n_double_bos: int = 0
    n_without_eos: int = 0
    n_empty_prompt: int = 0
    n_mismatched_own_prompt: int = 0
    unused_columns: tuple[str, ...] = ()
    example: str = ""

    def lines(self) -> list[str]:
        """The report as lines of text; lines about things that did not happen are left out."""
        what, chosen, rejected = "pairs", "chosen", "rejected"
        if self.n_desirable is not None:
            what, chosen, rejected = "examples", "desirable", "undesirable"
            what += f" ({self.n_desirable:,} desirable)"
        head = f"{self.name} data: {self.n_rows:,} rows -> {self.n_pairs:,} {what}"
        lines = [f"{head}, {self.n_prompts:,} distinct prompts (format {self.format})"]
        lines += [f"  {text}" for text in self._events()]
        lines.append(
            f"  tokens: prompts {self.prompt_tokens}, {chosen} {self.chosen_tokens}, "
            f"{rejected} {self.rejected_tokens}"
        )
        if self.unused_columns:
            lines.append(f"  columns not used: {', '.join(self.unused_columns)}")
        lines += [f"  {line}" for line in self.example.splitlines()]
        return lines

    def _events(self) -> list[str]:
        dropped = {
            "with a None": self.n_dropped_none,
            "with an empty response": self.n_dropped_empty,
            "with identical responses": self.n_dropped_identical,
            f"with responses identical once cut to max_length={self.max_length}": (
                self.n_dropped_identical_cut
            ),
            "without a response token to score": self.n_dropped_unscored,
            "ties": self.n_dropped_tie,
            f"whose prompt fills max_length={self.max_length}": self.n_dropped_long_prompt,
        }
        events = [f"dropped: {n:,} {what}" for what, n in dropped.items() if n]
        if self.n_kept_bad:
            events.append(
                f"kept: {self.n_kept_bad:,} rows with an empty response or identical ones "
                "(on_bad_row=keep)"
            )
        if self.format == UNPAIRED and self.n_truncated_chosen:
            events.append(
                f"cut to max_length={self.max_length}: {self.n_truncated_chosen:,} responses"
            )
        elif self.n_truncated_chosen or self.n_truncated_rejected:
            events.append(
                f"cut to max_length={self.max_length}: {self.n_truncated_chosen:,} chosen and "
                f"{self.n_truncated_rejected:,} rejected responses"
            )
        notes = (
            (self.prompt_boundary_moved, "the response begins before the end of the prompt's text "
             "(tokens merge there, or the template writes the prompt alone differently)"),
            (self.n_repeats_prompt, "the responses repeated the prompt, which was cut from them"),
            (self.n_double_bos, "the text brought a second BOS, which was removed"),
            (self.n_empty_prompt, "there is no prompt token"),
        )  # fmt: skip
        events += [f"in {n:,} pairs {what}" for n, what in notes if n]
        if self.n_mismatched_own_prompt:
            events.append(
                f"{self.n_mismatched_own_prompt:,} mismatched responses answer the very prompt "
                "that they stand behind, which biases the KL baseline: shuffle the rows"
            )
        if self.n_without_eos:
            events.append(
                f"{self.n_without_eos:,} responses do not end with EOS: the chat template "
                "does not write it, so the model does not learn to stop there"
            )
        return events
