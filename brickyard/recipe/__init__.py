"""Recipes: a graph of steps from one YAML file, its work, its report."""
