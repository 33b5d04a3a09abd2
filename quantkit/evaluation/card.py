"""Measured numbers in an artifact's model card: `quantkit eval ARTIFACT --baseline MODEL --write-card`."""

import re
import shlex
from pathlib import Path

import torch
import transformers

from quantkit.checkpoint.locate import hub_id
from quantkit.evaluation.run import EvalReport
from quantkit.formats.model_card import write_measurements
from quantkit.version import __version__


def write_card(folder: Path, report: EvalReport, baseline: str) -> None:
    """Put a report with a baseline into the card of the artifact at `folder`, in place of earlier numbers.

    Args:
        folder: the artifact.
        report: what was measured.
        baseline: what the user typed after `--baseline`. A local path is not written.
    """
    assert report.baseline is not None, "a card's numbers are relative to a baseline"
    name = baseline if baseline == "demo" else hub_id(Path(report.baseline.name)) or "MODEL"
    write_measurements(folder, measured(report, name))


def measured(report: EvalReport, baseline: str) -> str:
    """The report as Markdown: a table, and how it was measured.

    Args:
        report: with a baseline.
        baseline: its public name.
    """
    assert report.baseline is not None
    model, base = report.model.metrics, report.baseline.metrics
    assert report.ppl_increase is not None
    rows = [
        ("Perplexity", f"{base.perplexity:.3f}", f"{model.perplexity:.3f} ({report.ppl_increase:+.2%})"),
        ("KL divergence, mean (nats)", "", f"{model.kl_mean:.4f}"),
        ("KL divergence, 99th percentile (nats)", "", f"{model.kl_p99:.4f}"),
        ("Same most likely token", "", f"{model.top1_agreement:.2%}"),
    ]
    text = report.text if re.fullmatch(r"[\w-]+|hf:[\w./-]+", report.text) else "FILE"
    sizes = ["--text", text, "--windows", str(report.windows), "--seq-len", str(report.seq_len)]
    cache = [] if report.kv_dtype is None else ["--kv-dtype", report.kv_dtype]
    if report.kv_budget is not None:
        cache += ["--kv-policy", report.kv_policy, "--kv-budget", str(report.kv_budget)]
    versions = f"quantkit {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    return "\n".join(
        [
            "## Measured",
            "",
            "| | Original | This model |",
            "|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            f"Over {model.predictions:,} predictions: {report.windows} windows of {report.seq_len} tokens, text `{text}` "
            f"(SHA-256 of the tokens: {report.tokens_sha256[:16]}).",
            "",
            f"    {shlex.join(['quantkit', 'eval', 'PATH', '--baseline', baseline, *sizes, *cache])}",
            "",
            f"Versions: {versions}.",
        ]
    )
