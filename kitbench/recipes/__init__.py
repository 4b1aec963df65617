"""Recipes, as TOML files that people read and copy; no code."""
