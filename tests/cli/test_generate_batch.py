"""A batch of `quantkit generate` that fails or is interrupted: finished completions are written, others are named."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.command import Done, quantkit, refused
from quantkit.runtime.core.batch import Batch
from quantkit.runtime.core.output import Output
from quantkit.runtime.engine.engine import Engine
from quantkit.runtime.model.model_runner import ModelRunner

PROMPTS = ["One", "Two Z", "Three"]
LENGTH = ("--max-tokens", 12, "--ignore-eos")
#: Bytes of keys and values of a token.
TOKEN = 3 * 2 * 2 * 16 * 4


@pytest.fixture
def batch(llama: Path, tmp_path: Path) -> Callable[..., Done]:
    """Run the prompts, one after another."""
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    return lambda *options: quantkit("generate", llama, "--prompts", tmp_path / "p.txt", *LENGTH, "--max-batch", 1, *options)


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose logits after a "Z" are NaN."""
    forward = ModelRunner.forward

    def spoil(model: ModelRunner, batch: Batch, draft: bool = False) -> Tensor:
        followed = batch.token_ids[batch.logit_rows]
        return forward(model, batch, draft).masked_fill((followed == ord("Z") - ord("!"))[:, None], torch.nan)

    monkeypatch.setattr(ModelRunner, "forward", spoil)


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the twentieth step: the first prompt has had its 12, the second has not."""
    step, steps = Engine.step, iter(range(19))

    def stop(engine: Engine) -> list[Output]:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", stop)


def headers(done: Done) -> list[str]:
    return [line for line in done.out.splitlines() if line.startswith("--- ")]


@pytest.mark.usefixtures("spoiled")
def test_a_failed_request_leaves_the_others_alone(batch: Callable[..., Done], llama: Path, tmp_path: Path) -> None:
    done = batch()
    assert done.status == 1
    assert headers(done) == ["--- 1: One", "--- 2: Two Z", "--- 3: Three"]
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert f"error: {tmp_path}/p.txt, line 2: request 1: the model's logits after token 5 are NaN" in line
    again = batch("--json", "-")
    assert again.status == 1
    first, failed, last = json.loads(again.out)["completions"]
    assert (first["error"], len(first["token_ids"])) == (last["error"], len(last["token_ids"])) == (None, 12)
    assert (failed["finish_reason"], failed["token_ids"]) == ("error", [])
    assert "are NaN" in failed["error"]
    alone = quantkit("generate", llama, "Z", *LENGTH, "-q")
    assert (alone.status, alone.out) == (1, "\n")
    assert alone.err.startswith("error: request 0: the model's logits after token 1 are NaN")


@pytest.mark.parametrize("to", ["file", "stdout", "text"])
@pytest.mark.usefixtures("interrupted")
def test_an_interrupted_batch_keeps_what_has_ended(batch: Callable[..., Done], tmp_path: Path, to: str) -> None:
    done = batch(*{"file": ("--json", tmp_path / "out.json"), "stdout": ("--json", "-"), "text": ()}[to])
    assert done.status == 130
    assert done.err.splitlines()[-2:] == ["note: 1 of 3 completions were finished", "error: interrupted"]
    if to == "text":
        assert headers(done) == ["--- 1: One"]
        return
    found = json.loads(done.out if to == "stdout" else (tmp_path / "out.json").read_text())
    (completion,) = found["completions"]
    assert (completion["request"], len(completion["token_ids"])) == (0, 12)
    assert found["summary"]["output_tokens"] == 12


def test_what_fails_for_our_own_fault_keeps_what_has_ended(
    batch: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    forward, steps = ModelRunner.forward, iter(range(19))

    def fail(model: ModelRunner, given: Batch, draft: bool = False) -> Tensor:
        if next(steps, None) is None:
            raise AssertionError("our own")
        return forward(model, given, draft)

    monkeypatch.setattr(ModelRunner, "forward", fail)
    with pytest.raises(AssertionError, match="our own"):
        batch("--json", tmp_path / "out.json", "-q")
    assert len(json.loads((tmp_path / "out.json").read_text())["completions"]) == 1


def test_a_prompt_that_is_too_long_is_named_before_any_runs(batch: Callable[..., Done], llama: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("One\n\n" + "x" * 300)
    line = refused("generate", llama, "--prompts", tmp_path / "long.txt")
    assert line.startswith(f"error: {tmp_path}/long.txt, line 3: the prompt has 300 tokens and the context is 256")


def test_memory_that_ends_texts_early_is_said_once(batch: Callable[..., Done]) -> None:
    # "Two Z" and "Three" would be 17 tokens each with what follows them, one more than a block.
    done = batch("--kv-memory", 16 * TOKEN, "-q")
    assert done.status == 0
    held = "KV memory holds 16 tokens, prompt and output together"
    assert done.err == f"note: {held}; 2 of 3 completions ended there. Raise --kv-memory for longer ones\n"
    assert batch("--kv-memory", 32 * TOKEN, "-q").err == ""
    assert batch("--kv-memory", 16 * TOKEN, "-q", "--max-model-len", 16).err == "", "16 is what was asked for"


def test_logprobs_need_json(batch: Callable[..., Done]) -> None:
    done = batch("--logprobs", 2)
    assert (done.status, done.out) == (2, "")
    assert done.err == "error: --logprobs are written to --json only; add --json FILE, or --json - for stdout\n"
