"""The first step's check: policy and reference are equal before the first update, or it says so."""

import numpy as np
import pytest
import torch

from fastdpo.errors import ModelError
from tests.tiny import tiny_llama
from tests.tiny_trainer import losses, trainer


def test_first_sigmoid_loss_is_ln_2(tmp_path):
    made = trainer(tmp_path, max_steps=1)
    made.train()
    assert losses(made)[0] == pytest.approx(np.log(2), abs=1e-6)


def test_first_step_check_names_a_reference_that_is_not_the_policy(tmp_path):
    made = trainer(tmp_path)
    with torch.no_grad():
        made.model.lm_head.weight.mul_(1.1)  # after the copy was taken
    with pytest.raises(ModelError, match="before the first update policy and reference differ"):
        made.train()
    unchecked = trainer(tmp_path, overwrite_output_dir=True, first_step_check=False)
    with torch.no_grad():
        unchecked.model.lm_head.weight.mul_(1.1)
    unchecked.train()


def test_first_step_check_allows_for_fp32_norms_in_an_fp64_model(tmp_path):
    model = tiny_llama(dtype=torch.float64)
    trainer(tmp_path, model=model, precompute_ref_log_probs=True, max_steps=1).train()
