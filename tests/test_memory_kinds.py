"""The measured peak by kind: exact sums of tensors, in plan.json and in the report."""

import json

import pytest
import torch

from fastdpo.report_page import write_report
from tests.tiny import tiny_llama
from tests.tiny_trainer import lora, trainer

MEASURED = {"max_tokens_per_pack": 96, "gpu_memory": "1GiB", "measure_memory": True}


@pytest.mark.parametrize("adapter", [False, True])
def test_kinds_are_sums_of_tensors_and_make_the_peak(tmp_path, monkeypatch, adapter):
    monkeypatch.setattr("fastdpo.trainer.plot_curves", lambda *args: None)
    model = lora() if adapter else tiny_llama()
    made = trainer(tmp_path, model, **MEASURED)
    made.train()
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    found, planned = plan["measured_memory_bytes"], plan["first_steps_memory_bytes"]
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    buffers = sum(b.nbytes for b in model.buffers())
    assert found["weights"] == buffers + (frozen if adapter else trained)
    assert found["adapters"] == (trained if adapter else 0)
    assert found["gradients"] == trained  # fp32, as the weights
    # Two moments of each, and torch's count of steps.
    steps = len([p for p in model.parameters() if p.requires_grad]) * torch.zeros(()).nbytes
    assert found["optimizer states"] == 2 * trained + steps
    # A copy of a fully trained model, nothing beside adapters.
    assert found["reference"] == planned["reference"] == (0 if adapter else trained + buffers)
    assert found["weights"] == planned["weights"] and found["adapters"] == planned["adapters"]
    assert sum(found.values()) == plan["measured_peak_bytes"]
    assert found["activations and workspace"] > 0
    write_report([tmp_path / "run"], tmp_path / "report.html")
    row = f'<td>gradients</td><td class="n">{planned["gradients"] / 2**20:,.2f}</td>'
    page = (tmp_path / "report.html").read_text()
    assert f'{row}<td class="n">{trained / 2**20:,.2f}</td>' in page
