"""What the files of interpreted tests share."""

import pytest

from fastdpo_kernels.tiles import Plan


@pytest.fixture
def plans(monkeypatch) -> list[Plan]:
    """What Triton's driver runs, in order."""
    from fastdpo_kernels import linear_logps_triton as driver

    made = []
    for name in ("run_forward", "run_weight_grad"):
        runner = getattr(driver, name)

        def spy(*args, _runner=runner):
            made.append(args[-1])
            return _runner(*args)

        monkeypatch.setattr(driver, name, spy)
    return made
