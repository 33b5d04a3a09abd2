"""Fixtures that several rooms share."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers import tiny

# Kernels are compiled where there is a GPU and interpreted elsewhere. Triton reads this when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama in float32, three blocks, one shard. Read only."""
    return tiny.make_model(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="session")
def llama_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama in bfloat16 over several shards. Read only."""
    return tiny.make_model(tmp_path_factory.mktemp("llama_bf16") / "model", dtype=torch.bfloat16, shard="60KB")


@pytest.fixture(autouse=True)
def _own_environment(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees baselines that another run cached, and tables are as wide as in a log, whatever terminal runs pytest."""
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """(family, options of the recipe) -> a tiny model and its rotated artifact. Read only."""
    from helpers import rotated  # imports triton

    return rotated.maker(tmp_path_factory.mktemp("rotated"))
