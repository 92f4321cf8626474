"""fastdpo: preference training (DPO) on one GPU, memory-constrained, fast and exact.

The names below are imported when they are first used, so that `import fastdpo` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "DPOConfig": "config",
    "DPOTrainer": "trainer",
    "FastDPOError": "errors",
    "ModelConfig": "config",
    "ScriptArguments": "config",
    "TokenizedPairs": "data",
    "tokenize_pairs": "data",
}

if TYPE_CHECKING:
    from .config import DPOConfig, ModelConfig, ScriptArguments
    from .data import TokenizedPairs, tokenize_pairs
    from .errors import FastDPOError
    from .trainer import DPOTrainer

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "FastDPOError",
    "ModelConfig",
    "ScriptArguments",
    "TokenizedPairs",
    "tokenize_pairs",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
