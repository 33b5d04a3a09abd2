"""`quantkit serve`: an OpenAI-compatible server."""

from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli import options
from quantkit.cli.engine_options import LESS_MEMORY, EngineOptions, with_engine
from quantkit.cli.verb import verb
from quantkit.errors import QuantkitError


@verb(
    example="Example: quantkit serve demo-w4 --port 8000 --spec ngram   (then: curl localhost:8000/v1/models)",
    when_out_of_memory=LESS_MEMORY,
)
@with_engine
def serve(
    model: options.Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="QUANTKIT_API_KEY", show_envvar=True, help="What clients must send as a bearer token or password."
        ),
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(metavar="NAME", help="Default: the last part of MODEL.")] = None,
    max_waiting: Annotated[int, typer.Option(min=0, help="Sequences that may wait beside --max-batch; beyond: 429.")] = 256,
    request_timeout: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Ends longer requests.")] = 600.0,
    max_body: Annotated[str, typer.Option(metavar="SIZE", help="Largest body of a request.")] = "4MiB",
    *,
    engine: EngineOptions,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Serve a model over HTTP, as OpenAI's API does: completions, chat completions, streams.

    SIGTERM lets running requests end, a second one cuts them.
    """
    if api_key == "":
        raise QuantkitError("--api-key is empty; give a key, or leave it and QUANTKIT_API_KEY out")
    size = options.byte_size(max_body, "--max-body")
    try:
        from quantkit.server.app import ServerConfig, create_app
        from quantkit.server.process import run
    except ModuleNotFoundError as error:
        raise QuantkitError(f'quantkit serve needs {error.name}; pip install "quantkit-llm[serve]"') from None
    from quantkit.cli import tables

    if api_key is None and not _loopback(host):
        typer.echo(f"warning: everybody who reaches {host}:{port} can use this server; set --api-key", err=True)
    session = engine.open(model)
    if not quiet:
        typer.echo(tables.kv_plan(session.model.cache, session.draft_cache), err=True)
    name = served_model_name or Path(model).name
    config = ServerConfig(name, engine.max_batch, max_waiting, request_timeout, size, api_key)
    run(create_app(session, config), host, port, quiet=quiet)


def _loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
