"""`quantkit generate`: text from a model, one prompt streamed to the terminal or a file of prompts as a batch."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli import options
from quantkit.cli.engine_options import LESS_MEMORY, EngineOptions, with_engine
from quantkit.cli.verb import verb
from quantkit.errors import RequestError

if TYPE_CHECKING:
    from quantkit.runtime.core.output import Output
    from quantkit.runtime.session import Session, Summary


@verb(
    example='Example: quantkit generate demo-w4 --chat "Why is the sky blue?" --max-tokens 100 --spec ngram',
    when_out_of_memory=LESS_MEMORY,
)
@with_engine
def generate(
    model: options.Model,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="What to continue; or use --prompts.")] = None,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="A batch: .txt, a prompt a line, or .jsonl.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this mass.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: repeat less.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Taken off the logits of tokens already produced.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, a time they occurred.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    samples: Annotated[int, typer.Option("-n", help="Samples a prompt.")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the output; may be repeated.")] = None,
    stop_token_id: Annotated[list[int] | None, typer.Option(help="Token that ends the output; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end-of-sequence token.")] = False,
    json_schema: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A JSON schema; the output is JSON that fits it.")
    ] = None,
    logprobs: Annotated[int | None, typer.Option(help="Log probabilities of this many tokens a place, in --json.")] = None,
    *,
    engine: EngineOptions,
    json_file: options.JsonFile = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Generate text with quantkit's own engine: artifacts of any format, or plain checkpoints."""
    options.require_writable(json_file)
    if (prompt is None) == (prompts is None):
        raise RequestError("name either a prompt or a file of prompts with --prompts, not both and not neither")
    if logprobs is not None and json_file is None:
        raise RequestError("--logprobs are only in --json; add --json FILE, or --json - for stdout")
    schema = None if json_schema is None else _read_schema(json_schema)

    from quantkit.cli import tables
    from quantkit.cli.completions import Completions
    from quantkit.data.prompts import LocatedPrompt, read_prompts
    from quantkit.runtime.core.request import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        n=samples,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        stop_token_ids=tuple(stop_token_id or ()),
        ignore_eos=ignore_eos,
        logprobs=logprobs,
    )
    given = [LocatedPrompt(prompt)] if prompt is not None else read_prompts(prompts) if prompts is not None else []
    session = engine.open(model)
    if not quiet:
        typer.echo(tables.kv_plan(session.model.cache, session.draft_cache), err=True)
    constraint = None if schema is None else session.grammars.compile(schema)
    requests = []
    for each in given:
        with each.located_errors():
            requests.append(session.request(each.prompt, params, chat=chat, constraint=constraint))
    machine = str(json_file) == "-"
    stream = prompt is not None and samples == 1 and not machine
    total, started = len(requests) * samples, time.monotonic()
    completions = Completions(session.engine, given, requests)
    try:
        with _progress(total, enabled=not (stream or quiet) and sys.stderr.isatty()) as advance:
            completions.run(_write if stream else advance)
    finally:  # What has ended is not lost to what ends the run.
        outputs = completions.ended
        summary = session.summary(outputs, time.monotonic() - started)
        if stream:
            typer.echo()
        elif not machine:
            completions.show()
        _tell(outputs, summary, session, total, max_tokens, quiet=quiet)
        options.write_json(json_file, {"completions": completions.to_json(), "summary": summary.to_json()})
    failures = completions.failures
    for failure in failures:
        typer.echo(f"error: {failure}", err=True)
    if failures:
        raise typer.Exit(1)


def _tell(
    outputs: "list[Output]", summary: "Summary", session: "Session", total: int, max_tokens: int, *, quiet: bool
) -> None:
    """On stderr: the run in numbers, and what is less than was asked for."""
    from quantkit.cli import tables
    from quantkit.cli.completions import cut_short

    if outputs and not quiet:
        typer.echo(tables.generated(summary), err=True)
        if summary.speculation is not None:
            typer.echo(tables.speculated(summary.speculation), err=True)
    if cut := cut_short(outputs, session.model, max_tokens):
        held = f"KV memory holds {session.model.max_model_len:,} tokens, prompt and output together"
        typer.echo(f"note: {held}, where {cut} of {total} completions ended; raise --kv-memory for longer ones", err=True)
    if len(outputs) < total > 1:
        typer.echo(f"note: {len(outputs)} of {total} completions had ended", err=True)


def _read_schema(path: Path) -> Any:
    """
    Raises:
        RequestError: the file cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not JSON: {error}"
        raise RequestError(f"--json-schema {path}: cannot be read ({reason}); name a file with a JSON schema") from None


def _write(output: "Output") -> None:
    """Text as it comes."""
    sys.stdout.write(output.text)
    sys.stdout.flush()


@contextmanager
def _progress(total: int, *, enabled: bool) -> "Iterator[Callable[[Output], None]]":
    """A bar of finished samples."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("samples"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not enabled) as progress:
        task = progress.add_task("samples", total=total, rate="")
        started, tokens = time.monotonic(), 0

        def advance(output: "Output") -> None:
            nonlocal tokens
            tokens += len(output.token_ids)
            done = int(output.finish_reason is not None)
            progress.update(task, advance=done, rate=f"{tokens / (time.monotonic() - started):.0f} tokens/s")

        yield advance
