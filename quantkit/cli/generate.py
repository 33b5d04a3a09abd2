"""`quantkit generate`: one prompt, streamed to the terminal, or a file of prompts as a batch."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.checkpoint.locate import local_folder
from quantkit.cli import options
from quantkit.cli.engine_options import LESS_MEMORY, EngineOptions, with_engine
from quantkit.cli.verb import verb
from quantkit.errors import RequestError

if TYPE_CHECKING:
    from quantkit.cli.progress import Progress
    from quantkit.runtime.core.output import Output
    from quantkit.runtime.session import Session, Summary


@verb(
    example='Example: quantkit generate demo-w4 --chat "Why is the sky blue?" --max-tokens 100 --spec ngram',
    when_out_of_memory=LESS_MEMORY,
)
@with_engine
def generate(
    model: options.Model,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="Text to continue. For a batch use --prompts.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="File with a batch of prompts: .txt with one per line, or .jsonl with one object per line."
        ),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="New tokens per completion, at most.")] = 256,
    temperature: Annotated[
        float, typer.Option(metavar="X", help="Randomness of sampling. 0: always take the most likely token.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(metavar="N", help="Sample only from the N most likely tokens. 0: from all.")] = 0,
    top_p: Annotated[
        float, typer.Option(metavar="X", help="Sample only from the most likely tokens whose probabilities add up to X.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(metavar="X", help="Drop tokens whose probability is below X times the highest one.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float,
        typer.Option(metavar="X", help="Above 1: tokens of the prompt and of the output become less likely to occur again."),
    ] = 1.0,
    presence_penalty: Annotated[
        float, typer.Option(metavar="X", help="Subtracted from the logits of tokens that occur in the output.")
    ] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(metavar="X", help="Subtracted once per occurrence in the output.")] = 0.0,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Seed for sampling. The same seed gives the same text.")
    ] = None,
    samples: Annotated[int, typer.Option("-n", metavar="N", help="Completions per prompt.")] = 1,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End the output before this text. May be given several times.")
    ] = None,
    stop_token_id: Annotated[
        list[int] | None, typer.Option(metavar="ID", help="End the output at this token. May be given several times.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Do not stop at the end-of-sequence token.")] = False,
    json_schema: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Constrain the output to JSON that conforms to the JSON schema in FILE."),
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Record the log probabilities of the N most likely tokens at each position. Needs --json."
        ),
    ] = None,
    *,
    engine: EngineOptions,
    json_file: options.JsonFile = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Generate text from MODEL, quantized (in any format) or not, in quantkit's own engine."""
    options.require_writable(json_file)
    if (prompt is None) == (prompts is None):
        raise RequestError("give either a PROMPT or a file of prompts with --prompts, not both")
    if logprobs is not None and json_file is None:
        raise RequestError("--logprobs are written to --json only; add --json FILE, or --json - for stdout")
    schema = None if json_schema is None else _read_schema(json_schema)
    local_folder(model)  # refuses a wrong name before torch is imported

    from quantkit.cli import tables
    from quantkit.cli.completions import Completions
    from quantkit.cli.progress import Progress
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
    with Progress(quiet=quiet or sys.stderr.isatty(), stage=f"loading {model}"):
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
        with Progress(quiet=quiet or stream) as progress:
            completions.run(_write if stream else _watcher(progress, total))
    finally:  # Finished outputs are shown even if the run is interrupted.
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
    """Print to stderr: statistics of the run, and notes on incomplete outputs."""
    from quantkit.cli import tables
    from quantkit.cli.completions import cut_short

    if outputs and not quiet:
        typer.echo(tables.generated(summary), err=True)
        if summary.speculation is not None:
            typer.echo(tables.speculated(summary.speculation), err=True)
    if cut := cut_short(outputs, session.model, max_tokens):
        held = f"KV memory holds {session.model.max_model_len:,} tokens, prompt and output together"
        typer.echo(f"note: {held}; {cut} of {total} completions ended there. Raise --kv-memory for longer ones", err=True)
    if len(outputs) < total > 1:
        typer.echo(f"note: {len(outputs)} of {total} completions were finished", err=True)


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
    """Print a piece of text at once."""
    sys.stdout.write(output.text)
    sys.stdout.flush()


def _watcher(progress: "Progress", total: int) -> "Callable[[Output], None]":
    """A function that reports finished samples and tokens per second to `progress`."""
    started, done, tokens = time.monotonic(), 0, 0

    def watch(output: "Output") -> None:
        nonlocal done, tokens
        tokens += len(output.token_ids)
        done += output.finish_reason is not None
        progress.advance("samples", done, total, f"{tokens / (time.monotonic() - started):.0f} tokens/s")

    progress.advance("samples", 0, total)
    return watch
