"""`quantkit recipes`: the built-in recipes."""

from quantkit.cli import options
from quantkit.cli.verb import verb


@verb(example="Example: quantkit recipes --json - | jq '.\"gptq-w4\"'")
def recipes(json_file: options.JsonFile = None) -> None:
    """List the built-in recipes. Pass one of the names to `quantize --recipe`."""
    import yaml
    from rich.table import Table

    from quantkit.recipe import builtin_recipes, load_recipe, resolved_json

    options.require_writable(json_file)
    texts = builtin_recipes()
    table = Table("recipe", "method", "bits", "group", "grid", "description")
    resolved = {}
    for name, text in texts.items():
        recipe = load_recipe(name, {})
        resolved[name] = resolved_json(recipe)
        grid = "sym" if recipe.symmetric else "asym"
        description = yaml.safe_load(text).get("description", "")
        table.add_row(name, recipe.method, str(recipe.bits), str(recipe.group_size), grid, description)
    options.console(json_file).print(table)
    options.write_json(json_file, resolved)
