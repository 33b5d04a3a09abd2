"""`quantkit generate`: one prompt streamed, a file of prompts as a batch, and what is refused."""

import gc
import json
import sys
from pathlib import Path

import pytest

from helpers.command import quantkit, refused

LENGTH = ("--max-tokens", 12, "--ignore-eos")


@pytest.fixture(scope="module")
def chatty(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The llama with a chat template that refuses everybody but users."""
    folder = tmp_path_factory.mktemp("chatty") / "model"
    folder.mkdir()
    for path in llama.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    template = (
        "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('only users') }}{% endif %}"
        "<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    return folder


def completions(*arguments: object) -> list[dict[str, object]]:
    done = quantkit("generate", *arguments, "--json", "-")
    assert done.status == 0, done.err
    found: list[dict[str, object]] = json.loads(done.out)["completions"]
    return found


def test_text_streams_to_stdout_and_numbers_to_stderr(llama: Path) -> None:
    done = quantkit("generate", llama, "Hello", *LENGTH)
    (completion,) = completions(llama, "Hello", *LENGTH)
    assert done.status == 0
    assert done.out == f"{completion['text']}\n"
    assert "5 prompt tokens, 12 output tokens" in done.err
    assert "peak memory" in done.err
    first, last = done.err.splitlines()
    assert first.startswith("KV cache float32: ")
    assert first.endswith(" tokens of 768 bytes")
    assert "KV cache" not in last
    assert quantkit("generate", llama, "Hello", *LENGTH, "-q").err == ""


def test_json_holds_tokens_usage_times_and_logprobs(llama: Path) -> None:
    (completion,) = completions(llama, "Hello", *LENGTH, "--logprobs", 2)
    assert len(completion["token_ids"]) == 12  # type: ignore[arg-type]
    assert completion["finish_reason"] == "length"
    assert completion["usage"] == {"prompt": 5, "cached": 0, "generated": 12}
    first = completion["logprobs"][0]  # type: ignore[index]
    assert first["token"] == completion["token_ids"][0]  # type: ignore[index]
    assert len(first["top"]) == 2
    assert first["logprob"] == first["top"][0][1]


def test_a_file_of_prompts_gives_what_each_gives_alone(llama: Path, tmp_path: Path) -> None:
    prompts = ["One", "Two and more", "A third one that is much longer than the others"]
    (tmp_path / "p.txt").write_text("\n".join(prompts) + "\n\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    alone = [completions(llama, prompt, *LENGTH)[0]["token_ids"] for prompt in prompts]
    for name in ("p.txt", "p.jsonl"):
        batch = completions(llama, "--prompts", tmp_path / name, *LENGTH, "--token-budget", 32, "--max-batch", 2)
        assert [completion["token_ids"] for completion in batch] == alone
    shown = quantkit("generate", llama, "--prompts", tmp_path / "p.txt", *LENGTH)
    assert [line for line in shown.out.splitlines() if line.startswith("--- ")] == [
        f"--- {number}: {prompt}" for number, prompt in enumerate(prompts, start=1)
    ]


def test_samples_and_seeds(llama: Path) -> None:
    options = ("--temperature", 1, "--seed", 7, "-n", 3, *LENGTH)
    first, again = completions(llama, "Hello", *options), completions(llama, "Hello", *options)
    tokens = [completion["token_ids"] for completion in first]
    assert tokens == [completion["token_ids"] for completion in again]
    assert len({str(ids) for ids in tokens}) == 3


def test_chat(chatty: Path, tmp_path: Path) -> None:
    (as_text,) = completions(chatty, "<Hi>:", *LENGTH)
    (as_chat,) = completions(chatty, "Hi", "--chat", *LENGTH)
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}))
    (as_messages,) = completions(chatty, "--prompts", tmp_path / "p.jsonl", *LENGTH)
    assert as_text["token_ids"] == as_chat["token_ids"] == as_messages["token_ids"]


def test_a_stop_string_ends_the_text(llama: Path) -> None:
    (whole,) = completions(llama, "Hello", *LENGTH)
    text = str(whole["text"])
    stop = text[4:6]
    (cut,) = completions(llama, "Hello", *LENGTH, "--stop", stop)
    assert cut["text"] == text[: text.index(stop)]
    assert (cut["finish_reason"], cut["stop"]) == ("stop", stop)


def test_a_json_schema_decides_what_the_text_is_like(llama: Path, tmp_path: Path) -> None:
    schema = {"type": "array", "items": {"enum": ["red", "green", 7]}, "minItems": 2, "maxItems": 4}
    (tmp_path / "s.json").write_text(json.dumps(schema))
    options = ("Hello", "-n", 3, "--temperature", 1, "--seed", 2, "--json-schema", tmp_path / "s.json")
    plain = completions(llama, *options)
    for completion in plain:
        assert 2 <= len(json.loads(str(completion["text"]))) <= 4
        assert completion["finish_reason"] == "stop"
    drafted = completions(llama, *options, "--spec", "ngram")
    assert [completion["token_ids"] for completion in drafted] == [completion["token_ids"] for completion in plain]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "s.json: cannot be read (not JSON: "),
        (b'"\xff"', "s.json: cannot be read (not JSON: "),
        (None, "s.json: cannot be read (No such file or directory); name a file with a JSON schema"),
        (b'{"type": "foo"}', "the JSON schema is refused (Invalid type: foo)"),
        (b"[]", "the JSON schema is refused ("),
    ],
)
def test_bad_schemas_are_one_line(llama: Path, tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "s.json").write_bytes(content)
    assert words in refused("generate", llama, "x", "--json-schema", tmp_path / "s.json")


def test_without_the_library_it_is_named(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.delitem(sys.modules, "quantkit.runtime.sampling.json_schema", raising=False)
    line = refused("generate", llama, "x", "--json-schema", tmp_path / "s.json")
    assert 'needs llguidance; run: pip install "quantkit-llm[serve]"' in line


@pytest.mark.parametrize("length", ["auto", 3])
def test_speculation_changes_no_text_and_says_what_it_did(llama: Path, length: object) -> None:
    (plain,) = completions(llama, "Hello", *LENGTH)
    for spec in ("ngram", f"draft:{llama}"):
        done = quantkit("generate", llama, "Hello", *LENGTH, "--spec", spec, "--draft-len", length, "--json", "-")
        found = json.loads(done.out)
        assert found["completions"][0]["token_ids"] == plain["token_ids"]
        assert "speculation: " in done.err
        stats = found["summary"]["speculation"]
        assert stats["accepted"] <= stats["drafted"]
        if spec != "ngram" and length == 3:
            # The model drafts for itself: the 11 tokens after the first take two steps of 3 + 1, and one of 2 + 1.
            assert (stats["drafts"], stats["drafted"], stats["accepted"]) == (3, 8, 8)
            assert stats["acceptance_by_position"] == [1, 1, 1]
            assert "8 of 8 drafted tokens accepted (100%; by position 100% 100% 100%), 3.67 tokens per draft" in done.err
    done = quantkit("generate", llama, "Hello", *LENGTH, "--json", "-")
    assert json.loads(done.out)["summary"]["speculation"] is None
    assert "speculation" not in done.err


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_drafts_for_itself_with_rounded_activations(llama: Path, tmp_path: Path, bits: int) -> None:
    options = ("--method", "rtn", "--bits", 4, "--group-size", 16)
    assert quantkit("quantize", llama, "-o", tmp_path / "out", *options, "-q").status == 0
    (plain,) = completions(tmp_path / "out", "Hello", *LENGTH)
    spec = ("--spec", "qspec", "--draft-len", 3, "--draft-act-bits", bits, "--json", "-")
    found = json.loads(quantkit("generate", tmp_path / "out", "Hello", *LENGTH, *spec).out)
    assert found["completions"][0]["token_ids"] == plain["token_ids"]
    assert found["summary"]["speculation"]["drafted"] >= 8


def test_a_draft_model_shares_the_memory(llama: Path) -> None:
    # Both models store as much a token: of 64 KiB each cache gets a half, which is 42 tokens, so two blocks of 16.
    (found,) = completions(llama, "Hello", *LENGTH, "--spec", f"draft:{llama}", "--kv-memory", "64KiB")
    assert found["finish_reason"] == "length"
    done = quantkit("generate", llama, "Hello", *LENGTH, "--spec", f"draft:{llama}", "--kv-memory", "64KiB", "--json", "-")
    sizes = "24.6 kB for 32 tokens of 768 bytes"
    plan = [f"KV cache float32: {sizes}", f"KV cache float32 of the draft model: {sizes}"]
    assert done.err.splitlines()[:2] == plan
    assert json.loads(done.out)["summary"]["kv_memory_bytes"] == 2 * 32 * 768
    line = refused("generate", llama, "x" * 40, *LENGTH, "--spec", f"draft:{llama}", "--kv-memory", "64KiB")
    assert "the prompt has 40 tokens and KV memory holds 32 tokens" in line


def test_a_draft_model_with_another_tokenizer_is_refused(llama: Path, tmp_path: Path) -> None:
    for path in llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[20:22]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    line = refused("generate", llama, "Hello", "--spec", f"draft:{tmp_path}")
    assert "its tokenizer has other tokens; draft with a model of the same family" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("x", "--spec", "fast"), "--spec fast: no such proposer; use off, ngram, draft:MODEL, qspec or quantspec"),
        (("x", "--spec", "qspec"), "--spec qspec: drafts with packed weights, and this model has none; quantize it first"),
        (("x", "--spec", "qspec", "--draft-act-bits", "5"), "--draft-act-bits 5: activations are quantized to 4 or 8 bits"),
        (
            ("x", "--spec", "quantspec", "--kv-dtype", "int8"),
            "drafts from an int4+4 cache, and --kv-dtype is int8; leave it out",
        ),
        (("x", "--spec", "draft:"), "--spec draft:: no such proposer"),
        (("x", "--spec", "draft:nowhere"), "nowhere: no such folder"),
        (("x", "--spec", "ngram", "--draft-len", "0"), "--draft-len 0: write a number from 1 to 15, or auto"),
        (("x", "--spec", "ngram", "--draft-len", "many"), "--draft-len many: write a number"),
        (
            ("x", "--draft-len", "4"),
            "--draft-len sets the length of drafts, but without --spec there are none; add --spec, or drop --draft-len",
        ),
        (("x", "--draft-act-bits", "8"), "--draft-act-bits applies to --spec qspec only; add that, or drop --draft-act-bits"),
        (("x", "--spec", "ngram", "--draft-act-bits", "8"), "--draft-act-bits applies to --spec qspec only"),
        ((), "give either a PROMPT or a file of prompts"),
        (("x", "--prompts", "y.txt"), "not both"),
        (("",), "the prompt has no tokens"),
        (("x" * 300,), "the prompt has 300 tokens and the context is 256"),
        (("x", "--temperature", "-1"), "temperature is -1.0, it must be between 0 (greedy) and 1e+06"),
        (("x", "--temperature", "nan"), "temperature is nan"),
        (("x", "--top-p", "0"), "top_p is 0.0, it must be above 0 and at most 1"),
        (("x", "--max-tokens", "0"), "max_tokens is 0, it must be at least 1"),
        (("x", "--stop-token-id", "256"), "outside of the vocabulary of 256"),
        (("x", "--chat"), "has no chat template"),
        (("x", "--kv-memory", "lots"), "--kv-memory lots: not a size"),
        (("x", "--kv-memory", "1KiB"), "does not hold a block of 16 tokens"),
        (("x", "--kv-memory", "20KiB", "--max-model-len", "256"), "needs 0 MiB; give more memory or lower --max-model-len"),
        (("x", "--max-model-len", "999"), "longer than the model's context of 256"),
        (("x", "--max-batch", "9", "--token-budget", "4"), "token_budget at least max_batch"),
        (("x", "-n", "99"), "only 32 sequences run at a time"),
        (("x", "--kv-policy", "lru"), "--kv-policy lru: there is no such policy; use full, window, sinks, scored"),
        (("x", "--kv-policy", "sinks"), "--kv-policy sinks needs to know how many tokens to keep; add --kv-budget TOKENS"),
        (("x", "--kv-budget", "64"), "--kv-budget needs a policy that drops tokens"),
        (("x", "--kv-policy", "sinks", "--kv-budget", "0"), "--kv-budget 0 is less than 3 blocks of 16 tokens; give 48 or"),
        (("x", "--kv-policy", "window", "--kv-budget", "1"), "--kv-budget 1 is less than 3 blocks of 16 tokens; give 48 or"),
        (("x", "--kv-policy", "window", "--kv-budget", "-5"), "--kv-budget -5 is less than 3 blocks of 16 tokens"),
        (("x", "--kv-offload-dir", "."), "--kv-offload-dir holds what does not fit into host memory; add --kv-offload SIZE"),
        (("x", "--kv-offload", "4B"), "--kv-offload of 4 bytes does not hold a block"),
        (("x", "--kv-offload", "99999"), "--kv-offload: 99,999.0 GiB are asked for and"),
        (("--prompts", "missing.txt"), "missing.txt: cannot be read (No such file or directory)"),
    ],
)
def test_bad_input_is_one_line(llama: Path, arguments: tuple[str, ...], words: str) -> None:
    assert words in refused("generate", llama, *arguments)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no prompt; write one per line"),
        (b"\xff\xfe\n", "cannot be read (not UTF-8)"),
        (b'{"prompt": "a"}\n{"prompt": 3}\n', 'line 2: has neither a "prompt" (text) nor "messages"'),
        (b"not json\n", "line 1: is not JSON"),
        (b'{"messages": [{"role": "user"}]}\n', "line 1: has neither"),
        (b'{"messages": [{"role": "system", "content": "x"}]}\n', "the chat template refuses the messages (only users)"),
    ],
)
def test_bad_prompt_files_are_one_line(chatty: Path, tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "p.jsonl").write_bytes(content)
    assert words in refused("generate", chatty, "--prompts", tmp_path / "p.jsonl")


def test_a_budget_serves_a_prompt_that_memory_does_not_hold(llama: Path) -> None:
    # 64 tokens; 3 layers x (key + value) x 2 heads x 16 wide x float32.
    small, prompt = ("--kv-memory", 64 * 3 * 2 * 2 * 16 * 4), "tokens " * 20
    budget = ("--kv-policy", "sinks", "--kv-budget", 64)
    done = quantkit("generate", llama, prompt, *LENGTH, *small, *budget, "--json", "-")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert len(found["completions"][0]["token_ids"]) == 12
    # 151 tokens are computed: of the 10 blocks that they fill or begin, 4 are left.
    assert found["summary"]["evicted_blocks"] == 6
    assert "KV blocks: 6 dropped" in done.err
    line = refused("generate", llama, prompt, *LENGTH, *small)
    assert "140 tokens and KV memory holds 64 tokens, prompt and output together; raise --kv-memory or shorten" in line


def test_offloaded_prefixes_are_fetched_for_later_prompts(llama: Path, tmp_path: Path) -> None:
    texts = [f"{n} " + "common words " * 6 for n in (1, 2, 3, 1, 2)]
    (tmp_path / "p.txt").write_text("\n".join(texts))
    tight = ("--prompts", tmp_path / "p.txt", *LENGTH, "--max-batch", 1, "--max-model-len", 96)
    done = quantkit("generate", llama, *tight, "--kv-offload", "1MiB", "--kv-offload-dir", tmp_path, "--json", "-")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert found["summary"]["fetched_blocks"] > 0
    assert found["completions"][3]["usage"]["cached"] == 64
    tokens = [completion["token_ids"] for completion in found["completions"]]
    assert tokens == [completion["token_ids"] for completion in completions(llama, *tight)]
    gc.collect()  # A session knows its engine and the engine its session.
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]


@pytest.mark.parametrize("dtype", ["fp8", "int8", "int4"])
def test_a_quantized_cache_holds_more_tokens_in_the_same_memory(llama: Path, dtype: str) -> None:
    memory = ("--kv-memory", "400KB", "--max-batch", 8, "--token-budget", 8)
    tokens = {}
    for name in ("auto", dtype):
        done = quantkit("generate", llama, "Hello", *LENGTH, *memory, "--kv-dtype", name, "--json", "-")
        summary = json.loads(done.out)["summary"]
        assert summary["kv_dtype"] == ("float32" if name == "auto" else name)
        assert summary["kv_memory_bytes"] <= 400_000
        tokens[name] = summary["kv_tokens"]
    assert tokens[dtype] > tokens["auto"]


def test_tail_pages_are_part_of_the_plan(llama: Path) -> None:
    small = ("--kv-memory", "400KB", "--max-batch", 2, "--token-budget", 32, "--kv-dtype", "int4")
    first, *_ = quantkit("generate", llama, "Hello", *LENGTH, *small).err.splitlines()
    # 2 x 3 + 1 pages of 32 tokens: 3 layers, 2 heads, key and value of 16 numbers in bfloat16.
    assert first.startswith("KV cache int4: ")
    assert first.endswith(f", {7 * 32 * 3 * 2 * 2 * 16 * 2 / 1000:.1f} kB of it tail pages")


@pytest.mark.parametrize("dtype", ["auto", "int4"])
@pytest.mark.parametrize("policy", ["window", "scored"])
def test_drafts_budgets_and_quantized_caches_go_together(llama: Path, tmp_path: Path, dtype: str, policy: str) -> None:
    # The draft model, here the model itself, holds the whole text; what it drafts is checked within the budget.
    (tmp_path / "p.txt").write_text("some words " * 13 + "\n" + "other words " * 9)
    cache = ("--kv-policy", policy, "--kv-budget", 96, "--kv-dtype", dtype, "--kv-memory", "4MiB", "--kv-offload", "1MiB")
    options = ("--prompts", tmp_path / "p.txt", *LENGTH, *cache, "--max-batch", 2)
    plain = [completion["token_ids"] for completion in completions(llama, *options)]
    for spec in ("ngram", f"draft:{llama}"):
        drafted = completions(llama, *options, "--spec", spec, "--draft-len", 3)
        assert [completion["token_ids"] for completion in drafted] == plain
