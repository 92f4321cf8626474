"""fastdpo_kernels: log-probs and preference losses without logits, in torch and Triton.

Usable alone: it imports torch, triton and the standard library, nothing of any trainer.
"""

from .impls import TokenStats
from .late import raise_pending
from .linear_dpo_loss import linear_dpo_loss
from .linear_logps import linear_logps
from .preference_loss import PreferenceOutput, preference_loss

__all__ = [
    "PreferenceOutput",
    "TokenStats",
    "linear_dpo_loss",
    "linear_logps",
    "preference_loss",
    "raise_pending",
]
