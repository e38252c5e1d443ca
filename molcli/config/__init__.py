"""Typed recipes: one frozen section per stage, read from one YAML file."""
