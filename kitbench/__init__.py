"""kitbench: which attention should restore my images, and does the k-NN one keep its promises?"""

__version__ = "0.1.0"

NUMERICS = 1
"""Raised by hand whenever a change of the code moves a number that a run produces: part of every run's key, so that
numbers of different code are never taken for one another. A golden run in the tests fails when it should have been."""
