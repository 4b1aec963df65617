"""Figures that others published, each with where it was read; TOML only. None of them was run here."""
