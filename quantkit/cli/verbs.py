"""All verbs. A verb's module is imported only when that verb, or its help, is asked for.

A new verb is a file with a function that `quantkit.cli.verb.verb` decorates, and one line of `VERBS`. The file imports at
its top only what its options need; what runs the verb (torch, transformers) is imported inside the function.
"""

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from quantkit.cli.verb import Verb
from quantkit.utils.registry import Registry

VERBS: Registry[Verb] = Registry(
    "verb",
    {
        "quantize": ("quantkit.cli.quantize:quantize", "Quantize a model to 2, 3, 4 or 8 bits."),
        "eval": ("quantkit.cli.eval:evaluate", "Measure perplexity and KL divergence, speed, or benchmark tasks."),
        "generate": ("quantkit.cli.generate:generate", "Generate text from one prompt or a file of prompts."),
        "serve": ("quantkit.cli.serve:serve", "Serve a model over HTTP with an OpenAI-compatible API."),
        "bench": ("quantkit.cli.bench:bench", "Measure latency and throughput of a server under load."),
        "deploy": ("quantkit.cli.deploy:deploy", "Check that vLLM or SGLang can load a model, and print the command."),
        "inspect": ("quantkit.cli.inspect:inspect", "Show what a model folder holds, without loading the weights."),
        "convert": ("quantkit.cli.convert:convert", "Change the format of a quantized model; its weights stay the same."),
        "recipes": ("quantkit.cli.recipes:recipes", "List the built-in recipes."),
        "calib": ("quantkit.cli.calib:calib", "List the built-in text sets for calibration and evaluation."),
    },
)


class VerbCommand(TyperCommand):
    """A verb as the group lists it: name and one line of help. Parsing its arguments imports its module."""

    def make_context(self, *args: Any, **settings: Any) -> Any:
        """Parse arguments; the context that comes back belongs to the verb's full command."""
        return command(str(self.name)).make_context(*args, **settings)


class VerbGroup(TyperGroup):
    """The program `quantkit`: a command for each registered verb."""

    def __init__(self, **settings: Any) -> None:
        settings["commands"] = {name: VerbCommand(name, short_help=VERBS.description(name)) for name in VERBS}
        super().__init__(**settings)


def command(name: str) -> Any:
    """The full command (a `click.Command`) of a verb: options, help and callback."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name, epilog=VERBS[name].example)(VERBS[name].callback)
    return typer.main.get_command(app)
