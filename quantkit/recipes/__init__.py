"""Recipes that ship with quantkit, one YAML a recipe; `quantkit recipes` lists them."""
