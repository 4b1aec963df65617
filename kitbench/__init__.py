"""kitbench: which attention should restore my images, and does the k-NN one keep its promises?"""

__version__ = "0.1.0"

NUMERICS = 1
"""Incremented by hand whenever a change of the code changes a number that a run produces. It is part of every key, so
that results of different code are never mixed. A test compares stored numbers and fails where this was forgotten."""
