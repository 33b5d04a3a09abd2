"""Values that the shell completes. Names are looked up when the shell asks for them; that imports no torch."""

from collections.abc import Callable, Iterable


def names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Completes one of the known names. Of "draft:MODEL" it completes "draft:"; the user names the model."""

    def complete(incomplete: str) -> list[str]:
        completed = ["".join(name.partition(":")[:2]) for name in known]
        return [name for name in completed if name.startswith(incomplete)]

    return complete


def recipes(incomplete: str) -> list[str]:
    """Completes the name of a built-in recipe."""
    from quantkit.recipe import builtin_recipes

    return names(builtin_recipes())(incomplete)


def text_sets(incomplete: str) -> list[str]:
    """Completes the name of a built-in text set."""
    from quantkit.data.corpus import text_sets

    return names(text_sets())(incomplete)
