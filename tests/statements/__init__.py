"""Figures in the prose of README.md and of the pages in results/, computed from the stored runs that they are about."""
