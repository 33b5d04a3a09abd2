"""The commands that start vLLM and SGLang, and which artifacts `deploy` refuses for them."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from helpers import tiny
from helpers.command import quantkit, refused
from quantkit.checkpoint.reader import Checkpoint
from quantkit.cli import deploy as verb
from quantkit.errors import FormatError, RecipeError
from quantkit.formats.convert import convert
from quantkit.formats.deploy import Deployment, deployment
from quantkit.quantization.run import QuantizeRequest, quantize_model
from quantkit.recipe import Recipe, Rule

#: Name -> recipe.
ARTIFACTS: dict[str, dict[str, Any]] = {
    "w4": {"bits": 4, "group_size": 16},
    "w4 gptq": {"bits": 4, "group_size": 16, "format": "gptq"},
    "w4 asym gptq": {"bits": 4, "group_size": 16, "symmetric": False, "format": "gptq"},
    "w4 awq": {"bits": 4, "group_size": 32, "symmetric": False, "format": "awq"},
    "w3": {"bits": 3, "group_size": 16},
    "w4 channel": {"bits": 4, "group_size": -1},
    "w4 head": {"bits": 4, "group_size": 16, "rules": (Rule(match="lm_head", bits=8),)},
    "w4 asym head": {"bits": 4, "group_size": 16, "symmetric": False, "rules": (Rule(match="lm_head", bits=8),)},
    "w4 head gptq": {"bits": 4, "group_size": 16, "rules": (Rule(match="lm_head", bits=8),), "format": "gptq"},
}

Artifact = Callable[[str], Path]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Tiny llamas of one block: 4 heads, 2 KV heads, 64 columns, 96 channels. Read only."""
    root = tmp_path_factory.mktemp("artifacts")
    model = tiny.make_model(root / "model", num_hidden_layers=1, intermediate_size=96)

    @cache
    def made(name: str) -> Path:
        if name == "dense":
            return model
        out = root / name.replace(" ", "-")
        recipe = Recipe(method="rtn", **ARTIFACTS[name])
        quantize_model(QuantizeRequest(model, out, recipe, torch.device("cpu"), max_memory=1 << 30, overwrite=False), Mock())
        return out

    return made


def _deploy(folder: Path, engine: str, gpus: int = 1, *extra: str) -> Deployment:
    return deployment(Checkpoint(folder), str(folder), engine, gpus, extra)


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        *((name, "vllm") for name in ("dense", *ARTIFACTS) if name != "w4 asym gptq"),
        *((name, "sglang") for name in ("dense", "w4", "w4 gptq", "w4 channel", "w4 head gptq")),
    ],
)
def test_commands(artifact: Artifact, name: str, engine: str) -> None:
    folder = artifact(name)
    gpus = "1" if name in ("w4 awq", "w3") else "2"  # see below
    wanted = {
        "vllm": ["vllm", "serve", str(folder), "--tensor-parallel-size", gpus],
        "sglang": ["python", "-m", "sglang.launch_server", "--model-path", str(folder), "--tp-size", gpus],
    }
    found = _deploy(folder, engine, int(gpus), "--max-model-len", "64")
    assert found.command == [*wanted[engine], "--max-model-len", "64"]
    assert any("output head" in note for note in found.notes) == (engine == "vllm" and name in ("w4 head", "w4 asym head"))


@pytest.mark.parametrize(
    ("name", "engine", "reason", "remedy"),
    [
        ("w4 asym gptq", "vllm", "needs 4 or 8 bits, symmetric", "--format compressed-tensors`"),
        ("w4 asym gptq", "sglang", "needs 4 or 8 bits, symmetric", "--format compressed-tensors`"),
        ("w4 awq", "sglang", "mixture-of-experts", "--format compressed-tensors`"),
        ("w3", "sglang", "needs 4 or 8 bits", "`quantkit serve "),
        ("w4 head", "sglang", "takes the quantized output head", "--format gptq`"),
        ("w4 asym head", "sglang", "takes the quantized output head", "`quantkit serve "),
    ],
)
def test_what_an_engine_does_not_load(
    artifact: Artifact, tmp_path: Path, name: str, engine: str, reason: str, remedy: str
) -> None:
    folder = artifact(name)
    with pytest.raises(FormatError) as caught:
        _deploy(folder, engine)
    message = str(caught.value)
    assert "\n" not in message
    assert reason in message
    assert remedy in message
    if "--format" in remedy:
        # The advice is good: the engine loads the converted artifact.
        format_name = remedy.removeprefix("--format ").removesuffix("`")
        convert(folder, tmp_path / "out", format_name, overwrite=False)
        assert _deploy(tmp_path / "out", engine).command


@pytest.mark.parametrize(
    ("name", "gpus", "problem"),
    [
        ("dense", 3, "4 attention heads are not divisible by 3"),
        ("dense", 4, None),  # the two KV heads are replicated
        ("w4", 2, None),
        ("w4", 4, "mlp.down_proj: a part of 24 columns is not a multiple of the group size 16"),
        ("w4 channel", 4, None),
        ("w4 awq", 2, "mlp.down_proj: a part of 48 columns is not a multiple of the group size 32"),
        ("w4 gptq", 2, None),
        ("w3", 2, "mlp.down_proj: a part of 48 columns is not a multiple of the 32 values of a packed word"),
    ],
)
def test_how_many_gpus(artifact: Artifact, name: str, gpus: int, problem: str | None) -> None:
    if problem is None:
        assert _deploy(artifact(name), "vllm", gpus).command
        return
    with pytest.raises(RecipeError) as caught:
        _deploy(artifact(name), "vllm", gpus)
    message = str(caught.value)
    assert f"--tensor-parallel {gpus}: " in message
    assert problem in message
    # It proposes exactly the numbers of GPUs that are possible.
    fitting = [int(each) for each in message.split(" fits ")[1].removesuffix(" GPUs").split(", ")]
    possible = []
    for n in range(1, 5):
        try:
            _deploy(artifact(name), "vllm", n)
        except RecipeError:
            continue
        possible.append(n)
    assert fitting == possible


def test_heads_of_keys_and_values(tmp_path: Path) -> None:
    """Twelve heads with four KV heads: the KV heads can be neither split nor replicated evenly."""
    sizes: dict[str, Any] = {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 4}
    model = tiny.make_model(tmp_path / "model", num_hidden_layers=1, **sizes)
    with pytest.raises(RecipeError, match=r"4 KV heads and 6 GPUs do not divide each other.* fits 1, 2, 4 GPUs"):
        _deploy(model, "vllm", 6)
    odd = tiny.make_model(tmp_path / "odd", num_hidden_layers=1, intermediate_size=90)
    with pytest.raises(RecipeError, match=r"90 channels of the MLP are not divisible by 4.* fits 1, 2 GPUs"):
        _deploy(odd, "sglang", 4)


def test_a_rotated_artifact_is_ours_alone(tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model", num_hidden_layers=1)
    recipe = Recipe(method="rtn", bits=4, group_size=16, rotate=True)
    quantize_model(
        QuantizeRequest(model, tmp_path / "out", recipe, torch.device("cpu"), max_memory=1 << 30, overwrite=False), Mock()
    )
    with pytest.raises(FormatError, match=r"rotated.*`quantkit serve"):
        _deploy(tmp_path / "out", "vllm")


def test_the_verb(artifact: Artifact) -> None:
    done = quantkit("deploy", "vllm", artifact("w4"), "--tensor-parallel", 2, "--", "--port", 9)
    assert done.status == 0, done.err
    assert done.out.splitlines() == [f"vllm serve {artifact('w4')} --tensor-parallel-size 2 --port 9"]
    report = json.loads(quantkit("deploy", "sglang", artifact("w4"), "--json", "-").out)
    assert report["command"][-2:] == ["--tp-size", "1"]
    assert "does not load it" in refused("deploy", "sglang", artifact("w3"))
    assert "note: " in quantkit("deploy", "vllm", artifact("w4 head")).err


def test_run(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine replaces the process, if it is installed."""
    assert "vllm is not installed here" in refused("deploy", "vllm", artifact("dense"), "--run")
    became: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(verb, "find_spec", lambda name: name)
    monkeypatch.setattr(os, "execv", lambda program, line: became.append((program, line)))
    assert quantkit("deploy", "vllm", artifact("w4"), "--run").out == ""
    assert quantkit("deploy", "sglang", artifact("w4"), "--run").out == ""
    (vllm, first), (python, second) = became
    assert (vllm, first[:2]) == ("/bin/vllm", ["/bin/vllm", "serve"])
    assert (python, second[1:3]) == (sys.executable, ["-m", "sglang.launch_server"])
