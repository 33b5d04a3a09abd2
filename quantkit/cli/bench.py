"""`quantkit bench`: latency and throughput of a server under load."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from quantkit.cli import options
from quantkit.cli.verb import verb
from quantkit.errors import QuantkitError, install_command

if TYPE_CHECKING:
    pass

_Number = TypeVar("_Number", int, float)


@verb(
    example="Example: quantkit bench demo-w4 --rate 1,2,4,8 --plot sweep.png -- --spec ngram   "
    "(or quantkit bench http://host:8000)"
)
def bench(
    target: Annotated[
        str,
        typer.Argument(
            metavar="URL|MODEL", help="URL of a running server; or a model, which is served for the duration of the run."
        ),
    ],
    serve: Annotated[
        list[str] | None, typer.Argument(metavar="[-- OPTIONS]", help="For MODEL: options of `quantkit serve`.")
    ] = None,
    concurrency: Annotated[
        str | None,
        typer.Option(
            metavar="N,...", help="Clients; each sends its next request when the previous one is answered. Default: 8."
        ),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(metavar="R,...", help="Requests per second, sent at random times (Poisson) without waiting for answers."),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, metavar="N", help="Requests per load.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens per prompt.")] = 128,
    max_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="New tokens per request.")] = 64,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos/--heed-eos", help="Generate all --max-tokens, or stop at the end-of-sequence token.")
    ] = True,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed for prompts and arrival times.")] = 0,
    ttft_limit: Annotated[
        float | None, typer.Option(min=0, metavar="MS", help="Goodput counts only requests whose first token comes within MS.")
    ] = None,
    tpot_limit: Annotated[
        float | None,
        typer.Option(min=0, metavar="MS", help="Goodput counts only requests with a time per output token of at most MS."),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="A request that takes longer counts as failed.")
    ] = 600.0,
    model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Model to request from the server. Default: the first that it lists.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="QUANTKIT_API_KEY", show_envvar=True, help="API key of the server.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Plot throughput against latency to FILE.png.")] = None,
    json_file: options.JsonFile = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure an OpenAI-compatible server under load: TTFT, ITL, TPOT and throughput. Several loads (1,2,4) make a sweep.

    Prompts are random token ids, all different. Failed requests are counted, and the reasons are listed.
    """
    options.require_writable(json_file)
    if plot is not None and (plot.suffix != ".png" or not plot.absolute().parent.is_dir()):
        raise QuantkitError(f"--plot {plot}: cannot be written there; name a .png in a folder that exists")
    if concurrency is not None and rate is not None:
        raise QuantkitError("--concurrency and --rate are two kinds of load; give one of them")
    clients = _numbers("8" if concurrency is None else concurrency, "--concurrency", int)
    rates = [] if rate is None else _numbers(rate, "--rate", float)
    try:
        from quantkit.bench.child import serving
        from quantkit.bench.client import Workload
        from quantkit.bench.load import ClosedLoop, Load, Poisson
        from quantkit.bench.measures import Limits
        from quantkit.bench.plot import plot as draw
        from quantkit.bench.run import BenchRequest, run
    except ModuleNotFoundError as error:
        raise QuantkitError(f"quantkit bench needs {error.name}; run: {install_command('bench')}") from None
    from quantkit.cli.bench_table import bench_table
    from quantkit.cli.progress import Progress

    loads: list[Load] = [Poisson(each, seed) for each in rates] or [ClosedLoop(each) for each in clients]
    remote = target.startswith(("http://", "https://"))
    if remote and serve:
        raise QuantkitError(
            f"{' '.join(serve)}: these are options of `quantkit serve`, but {target} is a running server; leave them out"
        )
    with nullcontext(target) if remote else serving(target, serve or (), api_key) as url:
        request = BenchRequest(
            url=url,
            model=model_name,
            api_key=api_key,
            loads=loads,
            requests=requests,
            workload=Workload(prompt_tokens, max_tokens, ignore_eos, seed, timeout),
            limits=Limits(_seconds(ttft_limit), _seconds(tpot_limit)),
        )
        with Progress(quiet=quiet, stage="connecting") as progress:
            report = run(request, progress.advance)
    console = options.console(json_file, quiet=quiet)
    console.print(bench_table(report))
    for point in report.points:
        for reason, count in point.figures.errors.items():
            console.print(f"{point.load}: {count} failed: {reason}", markup=False)
    if plot is not None:
        draw(report, plot)
    options.write_json(json_file, report.to_json())


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _numbers(text: str, option: str, kind: "type[_Number]") -> "list[_Number]":
    """Numbers above 0 with commas between them."""
    try:
        numbers = [kind(each) for each in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < float("inf") for number in numbers):
        raise QuantkitError(f"{option} {text}: write numbers above 0 with commas between them, for example 1,2,4")
    return numbers
