"""Evaluation of a stored sweep: exponents, crossings, the largest image; its page and plots."""
