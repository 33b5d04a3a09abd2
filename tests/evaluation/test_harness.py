"""The lm-evaluation-harness on our engine, offline, compared with float32 results of transformers.

These tests supply the documents of the tasks in `harness_tasks`, and spell out the metrics.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import tiny
from helpers.command import quantkit, refused

pytest.importorskip("lm_eval", reason='needs pip install "quantkit-llm[lm-eval]"')

from lm_eval.api.instance import Instance

from quantkit.checkpoint.reader import Checkpoint
from quantkit.cli.engine_options import EngineOptions
from quantkit.errors import RequestError
from quantkit.evaluation.harness import EngineLM
from quantkit.formats.artifact import dense_reader

TOKENIZER = tiny.make_tokenizer()
#: The model has no beginning-of-sequence token; its end-of-sequence token takes that place.
PREFIX = 2

QUIZ: list[dict[str, Any]] = [
    {"question": "What colour is the sky?", "choices": ["blue", "green as grass", "red"], "answer": 0},
    {"question": "How many legs has a cat?", "choices": ["seven", "four"], "answer": 1},
    {"question": "Which of these is a fruit?", "choices": ["a stone", "an apple", "a cloud in the sky"], "answer": 1},
    {"question": "Where do fish live?", "choices": ["in trees", "water"], "answer": 1},
]
CLOZE = [{"text": "The cat sat on the", "word": "mat"}, {"text": "Once upon a", "word": "time"}, {"text": "x", "word": "y"}]
#: The second one is longer than the context of 256 tokens.
PROSE = [{"text": "It was a dark and stormy night."}, {"text": "All work and no play makes Jack a dull boy. " * 14}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tasks and their documents, as the harness expects it."""
    out = tmp_path_factory.mktemp("tasks")
    texts = [{"text": f"Number {i} is", "wanted": "nothing"} for i in range(3)]
    documents: dict[str, list[Any]] = {"quiz": QUIZ, "cloze": CLOZE, "prose": PROSE, "continue": texts}
    for name, rows in documents.items():
        data = out / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = (Path(__file__).parent / "harness_tasks" / f"{name}.yaml").read_text()
        (out / f"{name}.yaml").write_text(task.replace("DATA", json.dumps({"test": str(data), "train": str(data)})))
    return out


@pytest.fixture(scope="module")
def packed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The llama in 4 bits."""
    out = tmp_path_factory.mktemp("packed") / "out"
    assert quantkit("quantize", llama, "-o", out, "--method", "rtn", "--bits", 4, "--group-size", 16, "-q").status == 0
    return out


class _Reference:
    """Scores and generates with transformers, one text at a time."""

    def __init__(self, llama: Path, model: Path) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
        names = list(self._model.state_dict())
        self._model.load_state_dict(dense_reader(Checkpoint(model))(names))

    @torch.no_grad()
    def score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """ln p(continuation | context), and whether each of its tokens is the most likely one."""
        whole = [*context, *continuation]
        logp = self._model(torch.tensor([whole])).logits[0, len(context) - 1 : -1].log_softmax(-1)
        target = torch.tensor(continuation)
        return float(logp.gather(1, target[:, None]).double().sum()), bool((logp.argmax(-1) == target).all())

    @torch.no_grad()
    def go_on(self, context: list[int], count: int) -> str:
        """Greedily generated text, up to a line break."""
        tokens = list(context)
        for _ in range(count):
            tokens.append(int(self._model(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == PREFIX or TOKENIZER.decode(tokens[-1:]) == "\n":
                tokens.pop()
                break
        return str(TOKENIZER.decode(tokens[len(context) :]))


def _tokens(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


def _scores(model: Path, folder: Path, tasks: str, *options: object) -> dict[str, Any]:
    done = quantkit("eval", model, "--tasks", tasks, "--task-dir", folder, "--kv-dtype", "auto", "--json", "-", *options)
    assert done.status == 0, done.err
    report = json.loads(done.out)["model"]
    return {f"{score['task']} {score['metric']}": score for score in report["scores"]} | {"truncated": report["truncated"]}


def test_quiz(llama: Path, packed: Path, folder: Path) -> None:
    """acc: the answer with the largest probability is right; acc_norm: the one with the largest probability for its length."""
    for model in (llama, packed):
        reference, right, right_by_length = _Reference(llama, model), 0, 0
        for row in QUIZ:
            context = _tokens(f"Question: {row['question']}\nAnswer:")
            scores = [reference.score(context, _tokens(f" {choice}"))[0] for choice in row["choices"]]
            right += max(range(len(scores)), key=lambda i: scores[i]) == row["answer"]
            by_length = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
            right_by_length += max(range(len(scores)), key=lambda i: by_length[i]) == row["answer"]
        found = _scores(model, folder, "quiz")
        assert found["quiz acc"]["value"] == right / len(QUIZ)
        assert found["quiz acc_norm"]["value"] == right_by_length / len(QUIZ)
        assert (found["quiz acc"]["documents"], found["quiz acc"]["higher_is_better"], found["truncated"]) == (4, True, 0)


def test_cloze_and_prose(llama: Path, packed: Path, folder: Path) -> None:
    """Perplexities are exp(-mean ln p): over documents, over words; and bits per byte."""
    for model in (llama, packed):
        reference = _Reference(llama, model)
        cloze = [reference.score(_tokens(row["text"]), _tokens(" " + row["word"])) for row in CLOZE]
        prose = 0.0
        for row in PROSE:
            tokens = _tokens(row["text"])
            # Windows of 254 tokens; the first follows the prefix, the last one's context reaches as far back as it can.
            for start in range(0, len(tokens), 254):
                part = tokens[start : start + 254]
                end = start + len(part)
                context = [PREFIX] if start == 0 else tokens[max(end - 255, 0) : start]
                prose += reference.score(context, part)[0]
        words = sum(len(row["text"].split(" ")) for row in PROSE)
        octets = sum(len(row["text"].encode()) for row in PROSE)
        found = _scores(model, folder, "cloze,prose")
        # Sums over up to 600 tokens, whose float32 log probabilities are within some 1e-6 of each other.
        assert found["cloze perplexity"]["value"] == pytest.approx(math.exp(-sum(s for s, _ in cloze) / 3), rel=1e-4)
        assert found["cloze acc"]["value"] == sum(greedy for _, greedy in cloze) / 3
        assert found["prose word_perplexity"]["value"] == pytest.approx(math.exp(-prose / words), rel=1e-3)
        assert found["prose bits_per_byte"]["value"] == pytest.approx(-prose / octets / math.log(2), rel=1e-5)


def test_continue(llama: Path, folder: Path, tmp_path: Path) -> None:
    reference = _Reference(llama, llama)
    rows = [{"text": f"Number {i} is", "wanted": ""} for i in range(4)]
    for row in rows[:3]:
        row["wanted"] = reference.go_on(_tokens(row["text"]), 12)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = (folder / "continue.yaml").read_text().replace(str(folder / "continue.jsonl"), str(data))
    (tmp_path / "continue.yaml").write_text(task)
    found = _scores(llama, tmp_path, "continue")
    assert found["continue exact_match"]["value"] == 0.75
    assert _scores(llama, tmp_path, "continue", "--limit", 2)["continue exact_match"]["documents"] == 2


@pytest.fixture
def lm(llama: Path) -> Callable[..., EngineLM]:
    """The harness's interface to the llama, with engine options."""

    def make(**options: Any) -> EngineLM:
        engine = EngineOptions(kv_memory="8MiB", **options)
        return EngineLM(engine.open(str(llama)), lambda *_: None)

    return make


def _ask(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


@pytest.mark.parametrize("options", [{}, {"max_batch": 1, "token_budget": 3}, {"spec": "ngram"}])
def test_scores_of_pairs(llama: Path, lm: Callable[..., EngineLM], options: dict[str, Any]) -> None:
    """In any order and any batch each pair gets its own score; a space at the end of a context belongs to the continuation."""
    reference, model = _Reference(llama, llama), lm(**options)
    pairs = [("a b c", " d"), ("", "begin"), ("a b c", " dd ee"), ("much longer than the others", " x"), ("tail ", "word")]
    found = model.loglikelihood(_ask("loglikelihood", *pairs))
    wanted = [
        (_tokens(context.rstrip()) or [PREFIX], _tokens(context[len(context.rstrip()) :] + rest)) for context, rest in pairs
    ]
    for (score, greedy), (context, rest) in zip(found, wanted, strict=True):
        logprob, likeliest = reference.score(context, rest)
        assert score == pytest.approx(logprob, abs=1e-4)
        assert greedy == likeliest


def test_a_greedy_continuation_is_told(llama: Path, lm: Callable[..., EngineLM]) -> None:
    text = _Reference(llama, llama).go_on(_tokens("abc"), 1)
    ((_, yes), (_, no)) = lm().loglikelihood(_ask("loglikelihood", ("abc", text), ("abc", "q" if text != "q" else "r")))
    assert (yes, no) == (True, False)


def test_a_context_that_is_too_long_loses_its_start(llama: Path, lm: Callable[..., EngineLM]) -> None:
    reference, model = _Reference(llama, llama), lm(max_model_len=64)
    ((score, _),) = model.loglikelihood(_ask("loglikelihood", ("long " * 30, "tail")))
    tokens = _tokens("long " * 30 + "tail")[-63:]
    assert score == pytest.approx(reference.score(tokens[:-5], tokens[-5:])[0], abs=1e-4)
    (text,) = model.generate_until(_ask("generate_until", ("long " * 30, {"until": [], "max_gen_toks": 6})))
    assert text == reference.go_on(_tokens("long " * 30)[-58:], 6)
    assert model.truncated == 2
    with pytest.raises(RequestError, match="does not fit"):
        model.loglikelihood(_ask("loglikelihood", ("a", " b" * 40)))
    with pytest.raises(RequestError, match="asks for 64 new tokens and the context is 64; choose another task"):
        model.generate_until(_ask("generate_until", ("a", {"max_gen_toks": 64})))


def test_answers_to_one_question_compute_it_once(lm: Callable[..., EngineLM]) -> None:
    model = lm(max_batch=1)
    question = "A question of more than two blocks of sixteen tokens each:"
    model.loglikelihood(_ask("loglikelihood", (question, " yes"), ("other", " x"), (question, " no"), (question, " maybe")))
    # Two of the answers find its full blocks in the cache, except for the last one: its last token is computed for its logits.
    assert model._session.engine.stats.prefix_hits == 2 * 48 == 2 * ((len(question) - 1) // 16 * 16)


def test_sampling_options(lm: Callable[..., EngineLM]) -> None:
    model = lm()
    asked = {"until": "\n", "do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 5}
    params = model._sampling(asked, seed=3)
    assert (params.stop, params.temperature, params.top_p, params.max_tokens, params.seed) == (("\n",), 0.7, 0.9, 5, 3)
    greedy = model._sampling({"do_sample": False, "temperature": 0.7, "until": ["a", "", "a"]}, seed=0)
    assert (greedy.greedy, greedy.stop, greedy.max_tokens) == (True, ("a",), 256)
    with pytest.raises(RequestError, match="'num_beams'"):
        model._sampling({"num_beams": 4}, seed=0)
    model.tokenizer.add_special_tokens({"eos_token": "<end>"})
    token = model.tokenizer.eos_token_id
    assert model._sampling({"until": ["<end>", "x"]}, seed=0).stop_token_ids == (token,)
    assert (model.eot_token_id, model.prefix_token_id) == (token, token)


def test_a_baseline_beside_it(
    llama: Path, packed: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # the header holds two paths
    done = quantkit(
        "eval", packed, "--baseline", llama, "--tasks", "cloze", "--task-dir", folder, "--json", tmp_path / "out.json"
    )
    assert done.status == 0, done.err
    report = json.loads((tmp_path / "out.json").read_text())
    first, second = (report[role]["scores"][0] for role in ("baseline", "model"))
    row = next(line for line in done.out.splitlines() if "perplexity ↓" in line)
    assert f"{first['value']:.4f}" in row
    assert f"{second['value']:.4f}" in row
    assert f"{second['value'] - first['value']:+.4f}" in row


def test_fewshot(llama: Path, folder: Path) -> None:
    """Examples change the prompts, and the report states their number."""
    none, two = (_scores(llama, folder, "quiz", "--num-fewshot", shots)["quiz acc"] for shots in (0, 2))
    assert (none["num_fewshot"], two["num_fewshot"]) == (0, 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--limit", 3), "name tasks with --tasks"),
        (("--chat",), "name tasks with --tasks"),
        (("--tasks", "quiz", "--speed"), "run eval twice"),
        (("--tasks", "quiz", "--baseline", "x", "--max-kl", 1), "so it excludes those gates"),
        (("--tasks", "quiz", "--task-dir", "nowhere"), "--task-dir nowhere: no such folder"),
    ],
)
def test_bad_options(llama: Path, options: tuple[object, ...], words: str) -> None:
    assert words in refused("eval", llama, *options)


@pytest.mark.slow  # The harness reads thousands of its own files.
def test_a_task_that_does_not_exist(llama: Path, folder: Path) -> None:
    assert "has no task 'nonesuch'" in refused("eval", llama, "--tasks", "quiz,nonesuch", "--task-dir", folder)


def test_a_task_without_its_data(llama: Path, folder: Path, tmp_path: Path) -> None:
    task = (folder / "quiz.yaml").read_text().replace("quiz.jsonl", "gone.jsonl")
    (tmp_path / "quiz.yaml").write_text(task)
    assert "--tasks quiz: cannot be loaded (" in refused("eval", llama, "--tasks", "quiz", "--task-dir", tmp_path)


def test_without_the_harness(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "quantkit.evaluation.tasks", None)
    assert 'pip install "quantkit-llm[lm-eval]"' in refused("eval", llama, "--tasks", "quiz")
