"""`quantkit eval`: gates for CI, and its output."""

import json
from pathlib import Path

import pytest

from helpers.command import quantkit, refused
from quantkit.evaluation import run as evaluate_run

SIZES = ("--windows", 3, "--seq-len", 64)


@pytest.fixture(scope="module")
def two_bits(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rounded to 2 bits: far from the original."""
    out = tmp_path_factory.mktemp("two") / "out"
    assert quantkit("quantize", llama, "-o", out, "--method", "rtn", "--bits", 2, "-q").status == 0
    return out


@pytest.fixture(scope="module")
def worse(llama: Path, two_bits: Path) -> tuple[Path, Path]:
    """Two models, first the one of higher perplexity, which for a random model may be the original."""

    def perplexity(model: Path) -> float:
        report = json.loads(quantkit("eval", model, *SIZES, "--json", "-").out)
        return float(report["model"]["metrics"]["perplexity"])

    first, second = sorted((llama, two_bits), key=perplexity, reverse=True)
    return first, second


@pytest.mark.parametrize("gate", [("--max-kl", 1e-6), ("--max-ppl-increase", "0.0001%"), ("--max-kl", 0)])
def test_failed_gate(worse: tuple[Path, Path], gate: tuple[object, ...]) -> None:
    done = quantkit("eval", worse[0], "--baseline", worse[1], *SIZES, *gate, "--json", "-")
    (failure,) = json.loads(done.out)["failed_gates"]
    assert done.status == 1
    assert f"gate failed: {failure}" in done.err
    assert "the limit is" in failure


def test_both_gates_fail(worse: tuple[Path, Path]) -> None:
    done = quantkit("eval", worse[0], "--baseline", worse[1], *SIZES, "--max-kl", 0, "--max-ppl-increase", 0, "-q")
    assert done.status == 1
    assert [line.split(":")[0] for line in done.err.splitlines()] == ["gate failed", "gate failed"]


@pytest.mark.parametrize("gate", [("--max-kl", 99), ("--max-ppl-increase", "99999%"), ("--max-ppl-increase", "999"), ()])
def test_passed_gate(worse: tuple[Path, Path], gate: tuple[object, ...]) -> None:
    done = quantkit("eval", worse[0], "--baseline", worse[1], *SIZES, *gate, "-q")
    assert (done.status, done.out, done.err) == (0, "", "")


def test_a_model_is_no_worse_than_itself(llama: Path) -> None:
    gates = ("--max-kl", "1e-6", "--max-ppl-increase", "0")
    assert quantkit("eval", llama, "--baseline", llama, *SIZES, *gates, "-q").status == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-kl", 1), "name one with --baseline"),
        (("--max-ppl-increase", "2%"), "name one with --baseline"),
        (("--max-ppl-increase", "two"), "--max-ppl-increase two: not a number"),
        (("--max-ppl-increase", "-1%"), "must not be negative"),
        (("--max-ppl-increase", "nan"), "--max-ppl-increase nan"),
        (("--text", "nowhere.txt"), "nowhere.txt"),
        (("--windows", 10**9), "lower --samples, --windows"),
        (("--baseline", "nowhere"), "nowhere: no such folder"),
        (("--device", "tpu"), "--device tpu"),
        (("--kv-dtype", "int5"), "--kv-dtype int5: there is no such type"),
        (("--kv-dtype", "int8", "--speed"), "leave --kv-dtype, --kv-policy and --kv-budget out"),
        (("--kv-budget", 64, "--speed"), "leave --kv-dtype, --kv-policy and --kv-budget out"),
        (("--kv-policy", "sinks"), "--kv-policy sinks needs to know how many tokens to keep"),
        (("--kv-policy", "sinks", "--kv-budget", 20), "--kv-budget 20 is less than 3 blocks"),
        (("--kv-policy", "sinks", "--kv-budget", 0), "--kv-budget 0 is less than 3 blocks of 16 tokens; give 48 or more"),
    ],
)
def test_bad_options(llama: Path, options: tuple[object, ...], words: str) -> None:
    assert words in refused("eval", llama, *SIZES, *options)


def test_shows_what_json_holds(llama: Path, two_bits: Path) -> None:
    done = quantkit("eval", two_bits, "--baseline", llama, *SIZES, "--json", "-")
    report = json.loads(done.out)
    metrics = report["model"]["metrics"]
    for value in (f"{metrics['perplexity']:.3f}", f"{metrics['kl_mean']:.4f}", f"{report['ppl_increase']:+.2%}"):
        assert value in done.err
    assert report["model"]["bits_per_weight"] < report["baseline"]["bits_per_weight"] == 32
    assert report["model"]["size_bytes"] < report["baseline"]["size_bytes"]


def test_without_a_baseline_nothing_is_compared(two_bits: Path) -> None:
    report = json.loads(quantkit("eval", two_bits, *SIZES, "--json", "-").out)
    assert report["baseline"] is report["ppl_increase"] is report["model"]["metrics"]["kl_mean"] is None


def test_kernels_that_are_wrong_are_told_of(two_bits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "warning" not in quantkit("eval", two_bits, *SIZES).err
    monkeypatch.setattr(evaluate_run, "_kernel_difference", lambda *_: -0.002)
    done = quantkit("eval", two_bits, *SIZES, "-q", "--json", "-")
    assert json.loads(done.out)["kernel_difference"] == -0.002
    (warning,) = done.err.splitlines()
    assert warning.startswith("warning: the packed kernels move the perplexity by -2.0e-03 ")
    assert done.status == 0


def test_a_bar_on_a_terminal(llama: Path) -> None:
    done = quantkit("eval", llama, *SIZES, terminal=True)
    assert "3/3" in done.err
    assert "perplexity" in done.out


def test_what_a_kv_cache_costs(llama: Path, two_bits: Path) -> None:
    """A 16-bit cache is nearly free, 4 bits cost more than 8; and a quantized model can have one too."""
    costs = {}
    for name in ("auto", "int8", "int4+4", "int4"):
        done = quantkit("eval", llama, "--baseline", llama, *SIZES, "--kv-dtype", name, "--json", "-")
        assert done.status == 0, done.err
        report = json.loads(done.out)
        costs[name] = report["model"]["metrics"]["kl_mean"]
        assert f"KV cache {name}, {report['kv_bytes_per_token']:,.0f} bytes per token" in done.err
    assert costs["auto"] < 1e-6 < costs["int8"] < costs["int4"]
    assert costs["int4+4"] < costs["int4"] / 4
    report = json.loads(quantkit("eval", two_bits, *SIZES, "--kv-dtype", "int8", "--json", "-").out)
    assert (report["kv_dtype"], report["kernel_difference"]) == ("int8", None)


def test_what_a_kv_budget_costs(llama: Path) -> None:
    """A budget that holds the windows drops nothing; a smaller one changes the reported numbers."""
    sizes = ("--windows", 2, "--seq-len", 128)
    costs = {}
    for tokens in (128, 64):
        budget = ("--kv-policy", "window", "--kv-budget", tokens)
        done = quantkit("eval", llama, "--baseline", llama, *sizes, *budget, "--json", "-")
        assert done.status == 0, done.err
        report = json.loads(done.out)
        assert (report["kv_policy"], report["kv_budget"]) == ("window", tokens)
        assert f"window within {tokens} tokens" in done.err
        costs[tokens] = report["model"]["metrics"]["kl_mean"]
    assert costs[128] < 1e-6 < costs[64]


def test_the_same_tokens_in_other_windows(llama: Path) -> None:
    """A baseline that was kept for two windows is not taken for one that is twice as long."""
    for windows, length in ((2, 64), (1, 128)):
        sizes = ("--windows", windows, "--seq-len", length)
        done = quantkit("eval", llama, "--baseline", llama, *sizes, "--json", "-")
        assert done.status == 0, done.err
        assert json.loads(done.out)["model"]["metrics"]["kl_mean"] == pytest.approx(0, abs=1e-9)
