"""`echo` of completions: the prompt comes before the output, and with `logprobs` its tokens before those of the output."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.live_server import serving, tiny_folder
from quantkit.server.app import ServerConfig

PROMPTS = ["Hello there", "W", "Once upon a time, in a land far away, there lived a king who had three sons and no"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with serving(folder, ServerConfig("tiny", 8)) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0)


@torch.no_grad()
def _logprobs(folder: Path, tokens: list[int]) -> torch.Tensor:
    """Log probabilities at every token after the first, by transformers: float32 [T - 1, V]."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)


@pytest.mark.parametrize("tokens", [False, True], ids=["text", "tokens"])
def test_logprobs_of_prompts(client: openai.OpenAI, folder: Path, tokens: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 3, "temperature": 0, "logprobs": 1, "n": 2, "seed": 1}
    found = client.completions.create(prompt=ids if tokens else PROMPTS, echo=True, **asked)
    plain = client.completions.create(prompt=ids if tokens else PROMPTS, **asked)
    assert len(found.choices) == 2 * len(PROMPTS)
    for choice, bare in zip(found.choices, plain.choices, strict=True):
        prompt, own = PROMPTS[choice.index // 2], ids[choice.index // 2]
        assert choice.text == prompt + bare.text
        logprobs, after = choice.logprobs, bare.logprobs
        assert logprobs is not None
        assert after is not None
        count = len(own)
        assert logprobs.tokens == [*(tokenizer.decode([token]) for token in own), *(after.tokens or [])]
        assert logprobs.text_offset == list(range(len(own) + 3))[: len(logprobs.tokens)]  # one byte per token
        assert logprobs.token_logprobs is not None
        assert logprobs.top_logprobs is not None
        assert (logprobs.token_logprobs[0], logprobs.top_logprobs[0]) == (None, None)
        wanted = _logprobs(folder, own)
        for place in range(1, count):
            # The order of float32 sums differs.
            assert logprobs.token_logprobs[place] == pytest.approx(float(wanted[place - 1, own[place]]), abs=1e-4)
            assert max(logprobs.top_logprobs[place].values()) == pytest.approx(float(wanted[place - 1].max()), abs=1e-4)
        assert logprobs.token_logprobs[count:] == pytest.approx(after.token_logprobs, abs=1e-4)


def test_a_stream_gives_what_the_whole_gives(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": PROMPTS,
        "max_tokens": 5,
        "temperature": 0,
        "echo": True,
        "logprobs": 0,
    }
    whole = client.completions.create(**asked)
    texts, logprobs = dict.fromkeys(range(3), ""), {index: list[float | None]() for index in range(3)}
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            logprobs[choice.index] += (choice.logprobs and choice.logprobs.token_logprobs) or []
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert choice.logprobs is not None
        assert logprobs[choice.index] == choice.logprobs.token_logprobs


def test_without_logprobs(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "Hi", "max_tokens": 4, "temperature": 0}
    bare = client.completions.create(**asked)
    echoed = client.completions.create(**asked, echo=True)
    not_echoed = client.completions.create(**asked, echo=False)
    assert echoed.choices[0].text == "Hi" + bare.choices[0].text
    assert echoed.choices[0].logprobs is None
    assert not_echoed.choices[0].text == bare.choices[0].text
    parts = [c.choices[0].text for c in client.completions.create(**asked, echo=True, stream=True)]
    assert "".join(parts) == echoed.choices[0].text


@pytest.mark.parametrize("echo", [1, "yes"])
def test_refused(url: str, echo: object) -> None:
    reply = httpx.post(url + "/v1/completions", json={"prompt": "Hi", "echo": echo})
    assert reply.status_code == 400
    assert "echo" in reply.json()["error"]["message"]


def test_a_token_that_does_not_exist(url: str) -> None:
    reply = httpx.post(url + "/v1/completions", json={"prompt": [1, 2**31 - 1], "echo": True, "logprobs": 1})
    assert reply.status_code == 400
    assert "not in the vocabulary" in reply.json()["error"]["message"]


def test_chats_have_no_echo(url: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "echo": True}
    assert httpx.post(url + "/v1/chat/completions", json=body).status_code == 400


class TestHarness:
    """The lm-evaluation-harness as a client of the server: its `local-completions`."""

    @pytest.fixture(scope="class")
    def lm(self, url: str, folder: Path) -> Any:
        pytest.importorskip("lm_eval", reason='needs pip install "quantkit-llm[lm-eval]"')
        pytest.importorskip("tenacity", reason='needs pip install "lm-eval[api]"')
        from lm_eval.models.openai_completions import LocalCompletionsAPI

        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.eos_token = tokenizer.decode([2])
        tokenizer.save_pretrained(folder / "named")
        address = url + "/v1/completions"
        return LocalCompletionsAPI(
            base_url=address, model="tiny", tokenizer=str(folder / "named"), tokenizer_backend="huggingface", max_length=256
        )

    def test_scores(self, lm: Any, folder: Path) -> None:
        from lm_eval.api.instance import Instance

        pairs = [("Hello", " there"), ("A longer one", " x"), ("Hello", " you")]
        found = lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for (score, greedy), (context, rest) in zip(found, pairs, strict=True):
            tokens, first = tokenizer(context + rest)["input_ids"], len(tokenizer(context)["input_ids"])
            wanted = _logprobs(folder, tokens)[first - 1 :]
            target = torch.tensor(tokens[first:])
            assert score == pytest.approx(float(wanted.gather(1, target[:, None]).sum()), abs=1e-3)
            assert greedy == bool((wanted.argmax(-1) == target).all())

    def test_texts(self, lm: Any, client: openai.OpenAI) -> None:
        from lm_eval.api.instance import Instance

        wanted = client.completions.create(model="tiny", prompt="Hello", max_tokens=7, temperature=0, stop=["\n"])
        (text,) = lm.generate_until([Instance("generate_until", {}, ("Hello", {"until": ["\n"], "max_gen_toks": 7}), 0)])
        assert text == wanted.choices[0].text
