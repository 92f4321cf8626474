"""fastdpo_kernels: log-probs and preference losses without logits, in torch and Triton.

Usable alone: it imports torch, triton and the standard library, nothing of any trainer.
"""

from .impls import TokenStats
from .linear_logps import linear_logps

__all__ = ["TokenStats", "linear_logps"]
