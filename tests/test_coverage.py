"""Model families: shared packs equal padded, unshared training, or the fallback says why.

Log-probs and every parameter's gradient in fp64, through unpatched transformers models of which
only the casts to fp32 are held back (norms, routers, rotary angles), so that fp64 shows equality.
"""

import logging
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from fastdpo.logps import prepare_packed_forward

from .families import FALLBACKS, README, SHARED, Family, readme_with_table
from .test_keystone import (
    assert_close,
    gradients,
    mixed_pairs,
    packed,
    padded_unshared,
    token_weights,
    weighted_sum,
)

# Sums of some 1e3 terms through 2 layers and back, with eps 2.2e-16: as in test_keystone.py.
# Routers and caps add exponentials of numbers around 10, which multiply relative errors by that.
FP64 = 1e-11


class NoFloat32(TorchFunctionMode):
    """What a model casts to fp32 stays in fp64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def names(families: list[Family]) -> list[str]:
    return [family.name for family in families]


@pytest.mark.parametrize("family", SHARED, ids=names(SHARED))
def test_shared_packs_equal_padded_unshared(family: Family) -> None:
    model = family.build(torch.float64)
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        # transformers 5.17 loads Gemma 2 with sdpa, which leaves the cap out: log-probs of these
        # small logits move by 2e-6. Only its eager attention is the model.
        model.set_attn_implementation("eager")
    pairs = mixed_pairs()
    weights = token_weights(pairs)
    with NoFloat32():
        expected = padded_unshared(model, pairs)
        expected_gradients = gradients(model, weighted_sum(expected, weights))
        info = prepare_packed_forward(model)
        assert (info.mode, info.backend, info.reason) == ("shared", "sdpa", None)
        found = packed(model, pairs, range(len(pairs)), "shared")
        found_gradients = gradients(model, weighted_sum(found, weights))
    assert_close(found, expected, FP64)
    assert_close(found_gradients, expected_gradients, FP64)


@pytest.mark.parametrize("family", FALLBACKS, ids=names(FALLBACKS))
def test_models_that_fall_back_say_why(family: Family, caplog) -> None:
    model = family.build()
    own = model.config._attn_implementation
    assert family.why is not None
    with caplog.at_level(logging.WARNING, "fastdpo.logps"):
        info = prepare_packed_forward(model)
    assert info.mode == "padded" and info.reason is not None and family.why in info.reason
    assert info.backend == model.config._attn_implementation == own
    (record,) = [r for r in caplog.records if r.name == "fastdpo.logps"]  # not transformers' own
    assert family.why in record.message and "padded batches" in record.message
    pairs = mixed_pairs()
    expected = padded_unshared(model, pairs)
    found = packed(model, pairs, range(len(pairs)), "padded")
    assert_close(found, expected, 1e-4)  # fp32: log-probs of some nat, 2 layers


def test_readme_shows_what_is_tested() -> None:
    text = README.read_text()
    assert text == readme_with_table(text), "run python -m tests.families"
