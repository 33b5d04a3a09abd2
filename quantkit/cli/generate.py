"""`quantkit generate`: text from a model, one prompt streamed to the terminal or a file of prompts as a batch."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from quantkit.cli import options, tables
from quantkit.cli.engine_options import EngineOptions, with_engine
from quantkit.errors import RequestError
from quantkit.runtime.request import SamplingParams
from quantkit.runtime.sequence import Output
from quantkit.runtime.session import Prompt, read_prompts

EXAMPLE = 'Example: quantkit generate demo-w4 --chat "Why is the sky blue?" --max-tokens 100 --spec ngram'


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
    schema = None if json_schema is None else _read_schema(json_schema)
    texts: list[Prompt] = [prompt] if prompt is not None else read_prompts(prompts) if prompts is not None else []
    session = engine.open(model)
    if not quiet:
        typer.echo(tables.kv_plan(session.model.cache), err=True)
    constraint = None if schema is None else session.grammars.compile(schema)
    requests = [session.request(text, params, chat=chat, constraint=constraint) for text in texts]
    machine = str(json_file) == "-"
    stream = prompt is not None and samples == 1 and not machine
    started = time.monotonic()
    with _progress(len(requests) * samples, enabled=not (stream or quiet) and sys.stderr.isatty()) as advance:
        outputs = session.engine.generate(requests, _write if stream else advance)
    summary = session.summary(outputs, time.monotonic() - started)
    if stream:
        typer.echo()
    elif not machine:
        _print_all(texts, outputs)
    if not quiet:
        typer.echo(tables.generated(summary), err=True)
        if summary.speculation is not None:
            typer.echo(tables.speculated(summary.speculation), err=True)
    options.write_json(json_file, {"completions": [_completion(output) for output in outputs], "summary": summary.to_json()})


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


def _write(output: Output) -> None:
    """Text as it comes."""
    sys.stdout.write(output.text)
    sys.stdout.flush()


@contextmanager
def _progress(total: int, *, enabled: bool) -> Iterator[Callable[[Output], None]]:
    """A bar of finished samples."""
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

        def advance(output: Output) -> None:
            nonlocal tokens
            tokens += len(output.token_ids)
            done = int(output.finish_reason is not None)
            progress.update(task, advance=done, rate=f"{tokens / (time.monotonic() - started):.0f} tokens/s")

        yield advance


def _print_all(texts: list[Prompt], outputs: list[Output]) -> None:
    """Every prompt and its samples, under a line that names them."""
    samples = len(outputs) // len(texts)
    for number, output in enumerate(outputs):
        text = texts[number // samples]
        sample = f", sample {output.index + 1}" if samples > 1 else ""
        typer.echo(f"--- {number // samples + 1}{sample}: {text if isinstance(text, str) else text[-1]['content']}")
        typer.echo(output.text)


def _completion(output: Output) -> dict[str, Any]:
    """An output as plain data."""
    return {
        "request": output.request_id,
        "sample": output.index,
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": None if output.finish_reason is None else output.finish_reason.value,
        "stop": output.stop,
        "usage": output.usage._asdict(),
        "timing": output.timing._asdict(),
        "logprobs": [entry._asdict() for entry in output.logprobs],
    }
