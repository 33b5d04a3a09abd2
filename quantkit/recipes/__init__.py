"""Recipes that ship with quantkit, one YAML file per recipe; `quantkit recipes` lists them."""
