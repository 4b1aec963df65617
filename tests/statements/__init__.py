"""Figures in the prose of README.md and results/README.md, computed from the stored runs that they are about."""
