"""`quantkit serve`: an OpenAI-compatible server."""

from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

import typer

from quantkit.checkpoint.locate import local_folder
from quantkit.cli import options
from quantkit.cli.engine_options import LESS_MEMORY, EngineOptions, with_engine
from quantkit.cli.verb import verb
from quantkit.errors import QuantkitError, install_command


@verb(
    example="Example: quantkit serve demo-w4 --port 8000 --spec ngram   (then: curl localhost:8000/v1/models)",
    when_out_of_memory=LESS_MEMORY,
)
@with_engine
def serve(
    model: options.Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="Port to listen on. 0: any free port.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="QUANTKIT_API_KEY",
            show_envvar=True,
            help="Key that clients must send, as a bearer token or as the password.",
        ),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the model in the API. Default: the last part of MODEL.")
    ] = None,
    max_waiting: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Sequences that may wait while --max-batch others run. More are refused with status 429."
        ),
    ] = 256,
    request_timeout: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="Time limit of a request. A longer one is cancelled.")
    ] = 600.0,
    max_body: Annotated[str, typer.Option(metavar="SIZE", help="Largest accepted request body.")] = "4MiB",
    *,
    engine: EngineOptions,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Serve MODEL over HTTP with an OpenAI-compatible API: completions, chat completions, streaming.

    After SIGTERM the server finishes the running requests, then exits. A second SIGTERM aborts them.
    """
    if api_key == "":
        raise QuantkitError("--api-key is empty; give a key, or set neither --api-key nor QUANTKIT_API_KEY")
    size = options.byte_size(max_body, "--max-body")
    local_folder(model)  # refuses a wrong name before torch is imported
    try:
        from quantkit.server.app import ServerConfig, create_app
        from quantkit.server.process import run
    except ModuleNotFoundError as error:
        raise QuantkitError(f"quantkit serve needs {error.name}; run: {install_command('serve')}") from None
    from quantkit.cli import tables

    if api_key is None and not _loopback(host):
        typer.echo(f"warning: anyone who can reach {host}:{port} can use this server; set --api-key", err=True)
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
