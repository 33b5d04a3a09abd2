"""Options: names that other programs use, and checks before anything is loaded."""

import typer

from quantkit.cli.verbs import command


def parsed(verb: str, *arguments: str) -> dict[str, object]:
    """The parameters that a command line gives a verb, which is not run."""
    context: typer.Context = command(verb).make_context(verb, list(arguments))
    return context.params


def test_vllm_names_are_accepted() -> None:
    options = ("--max-num-seqs", "3", "--max-num-batched-tokens", "64", "--kv-cache-dtype", "int8")
    ours = ("--max-batch", "3", "--token-budget", "64", "--kv-dtype", "int8")
    for verb in ("serve", "generate"):
        given = parsed(verb, "model", *options)
        assert (given["max_batch"], given["token_budget"], given["kv_dtype"]) == (3, 64, "int8")
        assert given == parsed(verb, "model", *ours)
    assert parsed("eval", "model", "--kv-cache-dtype", "int4")["kv_dtype"] == "int4"
