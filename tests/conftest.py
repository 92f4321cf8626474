"""Fixtures that several files share. What they need is imported when they are asked for."""

import os

import pytest

# torch reads it once a process, at the first product on a GPU: for the runs that are deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def no_picture(monkeypatch) -> None:
    """Curves are drawn after every run; where runs are tiny that would be most of the time."""
    monkeypatch.setattr("fastdpo.trainer.plot_curves", lambda *args: None)


@pytest.fixture
def datasets_apart(tmp_path, monkeypatch) -> None:
    """What `datasets` keeps of files that it read goes with the test."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def plain():
    """A tokenizer with BOS and EOS, without a chat template."""
    from tests.tiny import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture(scope="session")
def chat():
    """A tokenizer with a chat template, without BOS."""
    from tests.tiny import tiny_tokenizer

    return tiny_tokenizer(bos=False, chat=True)


@pytest.fixture
def forwards(monkeypatch) -> list[int]:
    """The number of pairs in every pack that a reference is asked for, one entry a pack."""
    from fastdpo.reference_logps import AdapterReference, ModelReference

    asked: list[int] = []
    for kind in (ModelReference, AdapterReference):
        original = kind.token_logps

        def spy(self, packs, original=original):
            asked.extend(len(pack.pair_ids) for pack in packs)
            return original(self, packs)

        monkeypatch.setattr(kind, "token_logps", spy)
    return asked
