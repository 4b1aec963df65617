"""Suites, recipes and protocols: what users write, as validated frozen objects, and messages about invalid input."""
