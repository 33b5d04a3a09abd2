"""Tables and summary lines for people. `--json` holds everything that they show."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Column, Table

if TYPE_CHECKING:
    from quantkit.evaluation.run import EvalReport, EvalRow
    from quantkit.evaluation.speed import SpeedReport
    from quantkit.formats import EngineSupport
    from quantkit.quantization.estimate import RunEstimate
    from quantkit.quantization.report import RunReport
    from quantkit.runtime.kv_cache.cache import KVCache
    from quantkit.runtime.session import Summary
    from quantkit.runtime.speculative.metrics import SpeculationStats


def size(count: int) -> str:
    """1,234,567 bytes as "1.2 MB"."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def duration(seconds: float) -> str:
    """Seconds as "2m05s"."""
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02}m"


def pairs(title: str, rows: list[tuple[str, str]]) -> Table:
    """A two-column table."""
    table = Table(title=title, title_justify="left", show_header=False)
    for row in rows:
        table.add_row(*row)
    return table


def named(name: str, *values: str) -> Table:
    """A table whose first column holds names. On a narrow terminal the names are folded, so that no value is cut."""
    return Table(Column(name, overflow="fold"), *(Column(value, no_wrap=True) for value in values), title_justify="left")


def engine_rows(engines: "list[EngineSupport]") -> list[tuple[str, str]]:
    """One row per engine."""
    return [(f"loads in {e.name}", ("yes" if e.loads else "no") + (f" ({e.note})" if e.note else "")) for e in engines]


def run_tables(report: "RunReport", out: Path) -> list[Table]:
    """What `quantize` shows at its end: totals, engines and the worst five matrices."""
    from quantkit.formats import EngineSupport

    totals = report.totals
    rows = [
        ("matrices", f"{totals.matrices} quantized, {len(report.unquantized)} left in 16 bit"),
        ("bits per weight", f"{totals.bits_per_weight:.2f}"),
        ("size", f"{size(totals.source_bytes)} -> {size(totals.size_bytes)}"),
        ("mean output error", f"{totals.output_error:.2e}"),
        ("time", f"{duration(totals.wall_seconds)} ({totals.cpu_seconds:.0f} CPU seconds)"),
        ("peak memory", f"{totals.peak_memory_bytes / 2**20:,.0f} MiB"),
        *engine_rows([EngineSupport(**engine) for engine in report.engines]),
    ]
    worst = named("worst five", "scheme", "output error", "SNR dB", "saturation", "note")
    by_name = {matrix.name: matrix for matrix in report.matrices}
    for name in report.worst:
        matrix = by_name[name]
        worst.add_row(
            name,
            matrix.scheme,
            f"{matrix.output_error:.2e}",
            f"{matrix.snr_db:.1f}",
            f"{matrix.saturation:.1%}",
            matrix.note,
        )
    return [pairs(f"written: {out}", rows), worst]


def plan_table(plan: "RunEstimate") -> Table:
    """`quantize --plan`."""
    schemes: dict[str, list[str]] = {}
    for name, scheme in plan.schemes.items():
        schemes.setdefault(scheme, []).append(name)
    kept: dict[str, list[str]] = {}
    for name, reason in plan.unquantized.items():
        kept.setdefault(reason, []).append(name)
    rows = [
        ("host memory, peak", size(plan.host_bytes)),
        ("device memory, peak", size(plan.device_bytes) if plan.device_bytes else "none"),
        ("disk", f"{size(plan.disk_bytes)}, plus {size(plan.working_bytes)} during the run ({size(plan.free_bytes)} free)"),
        ("time", f"{duration(plan.seconds)} ({plan.block_seconds:.1f} s per block)"),
        *((scheme, _listed(names)) for scheme, names in schemes.items()),
        *((f"16 bit: {reason}", _listed(names)) for reason, names in kept.items()),
        *engine_rows(plan.engines),
    ]
    return pairs("plan (nothing was written)", rows)


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} matrices, {names[0]} ... {names[-1]}"


def eval_table(report: "EvalReport", model: str, baseline: str | None) -> Table:
    """`quantkit eval`."""
    table = named("model", "perplexity", "change", "KL mean", "KL p99", "top-1", "bits/weight", "size")
    table.title = f"{report.windows} windows of {report.seq_len} tokens, text: {report.text}"
    if report.kv_bytes_per_token is not None:
        kept = "" if report.kv_budget is None else f", {report.kv_policy} within {report.kv_budget:,} tokens"
        table.caption = (
            f"{model}: KV cache {report.kv_dtype or 'auto'}, {report.kv_bytes_per_token:,.0f} bytes per token{kept}"
        )

    def row(name: str, entry: "EvalRow", change: str) -> None:
        m = entry.metrics
        table.add_row(
            name,
            f"{m.perplexity:.3f}",
            change,
            "" if m.kl_mean is None else f"{m.kl_mean:.4f}",
            "" if m.kl_p99 is None else f"{m.kl_p99:.3f}",
            "" if m.top1_agreement is None else f"{m.top1_agreement:.1%}",
            f"{entry.bits_per_weight:.2f}",
            size(entry.size_bytes),
        )

    if report.baseline is not None:
        row(baseline or "", report.baseline, "")
    row(model, report.model, "" if report.ppl_increase is None else f"{report.ppl_increase:+.2%}")
    if report.kernel_difference is not None:
        table.caption = f"perplexity through the packed kernels: {report.kernel_difference:+.1e} from the dequantized weights"
    return table


def speed_table(reports: "list[SpeedReport]") -> Table:
    """`quantkit eval --speed`: one column per model, one row per number, and the formula of each."""
    table = named("", *[report.name for report in reports], "what it is")
    table.title = f"device {reports[0].device}, {reports[0].threads} threads"

    def row(name: str, cell: "Callable[[SpeedReport], str]", meaning: str) -> None:
        table.add_row(name, *map(cell, reports), meaning)

    for name in reports[0].rates:
        rates = [report.rates[name] for report in reports]
        table.add_row(
            f"{name} tok/s", *(f"{rate.mean:.1f} ± {rate.sd:.1f}" for rate in rates), "mean ± standard deviation of 5 runs"
        )
    row("TTFT", lambda r: f"{1000 * r.ttft_seconds:.0f} ms", "first token - arrival, 128 prompt tokens")
    row("TPOT", lambda r: f"{1000 * r.tpot_seconds:.2f} ms", "(end - first token) / (n - 1), 64 new tokens")
    for count in reports[0].system_tps:
        rates_at = (f"{report.system_tps[count]:.1f}" for report in reports)
        table.add_row(f"{count} concurrent tok/s", *rates_at, "all output tokens / wall time")
    row("weights read", lambda r: size(r.weight_bytes), "per decode step")
    row("weight GB/s", lambda r: f"{r.weight_bandwidth / 1e9:.1f}", "weights read * tg128")
    row("machine GB/s", lambda r: f"{r.read_bandwidth / 1e9:.1f}", "read bandwidth: 256 MiB summed, best of 5 runs")
    row("load", lambda r: f"{r.load_seconds:.2f} s", "time to load the model, without imports")
    row("peak memory", lambda r: size(r.peak_memory_bytes), "largest resident set")
    if reports[0].peak_device_bytes:
        row("peak device memory", lambda r: size(r.peak_device_bytes), "largest allocation")
    return table


def kv_plan(cache: "KVCache", draft: "KVCache | None" = None) -> str:
    """One line about the KV cache of a model that is about to run, and one about its draft model's."""
    caches = {"": cache} if draft is None else {"": cache, " of the draft model": draft}
    return "\n".join(_kv_plan(each, of) for of, each in caches.items())


def _kv_plan(cache: "KVCache", of: str) -> str:
    pages = f", {size(cache.tail_bytes)} of it tail pages" if cache.tail_bytes else ""
    tokens = f"{cache.num_tokens:,} tokens of {cache.bytes_per_token:,.0f} bytes"
    return f"KV cache {cache.format.name}{of}: {size(cache.nbytes)} for {tokens}{pages}"


def generated(summary: "Summary") -> str:
    """One line about a run of `quantkit generate`."""
    decode = "" if summary.decode_tps is None else f", {summary.decode_tps:.1f} tokens/s per sequence"
    blocks = {"dropped": summary.evicted_blocks, "offloaded": summary.offloaded_blocks, "fetched": summary.fetched_blocks}
    moved = ", ".join(f"{count} {what}" for what, count in blocks.items() if count)
    moved = f"; KV blocks: {moved}" if moved else ""
    cached = f" ({summary.cached_tokens} from the prefix cache)" if summary.cached_tokens else ""
    return (
        f"{summary.prompt_tokens} prompt tokens{cached}, {summary.output_tokens} output tokens in {summary.seconds:.2f} s: "
        f"{summary.output_tps:.1f} tokens/s in total, first token after {1000 * summary.ttft_seconds:.0f} ms{decode}; "
        f"loaded in {summary.load_seconds:.2f} s, peak memory {size(summary.peak_memory_bytes)}{moved}"
    )


def speculated(stats: "SpeculationStats") -> str:
    """One line about a run's drafts."""
    if stats.acceptance_rate is None or stats.mean_accepted_length is None:
        return "speculation: no tokens were drafted"
    places = " ".join(f"{share:.0%}" for share in stats.acceptance_by_position)
    cost = (
        "" if stats.cost_ratio is None else f"; a draft step takes {stats.cost_ratio:.3f} of the time of a verification step"
    )
    speed_up = "" if stats.speed_up is None else f"; {stats.speed_up:.2f} times as fast as without drafts"
    return (
        f"speculation: {stats.accepted} of {stats.drafted} drafted tokens accepted "
        f"({stats.acceptance_rate:.0%}; by position {places}), "
        f"{stats.mean_accepted_length:.2f} tokens per draft, including the one that the model adds{cost}{speed_up}"
    )
