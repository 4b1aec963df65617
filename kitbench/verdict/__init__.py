"""Tables and conclusions from stored runs alone, never from anything that training or evaluation keeps in memory.

entries.py     stored evaluations with their runs; rows.py, their means, the long form of a table
statistics.py  intervals, tests and detectable differences of arrays [seeds, images]
compare.py     which runs are paired, and the differences between two methods
layout.py      what stands in each cell of a table; render.py, tables as papers print them
published.py   figures that others printed
reference.py   runs against a stored reference, for continuous integration
differences.py how two runs differ; anchors.py, published weights scored here beside what their authors printed
claims.py      the paper's six statements; contrasts.py, what decides those about quality; growth.py, those about cost
scaling/       what a sweep says; page/, the page that shows it all
"""
