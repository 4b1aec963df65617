"""Tables and conclusions from stored runs alone, never from anything that training or evaluation keeps in memory.

entries.py     stored evaluations with their runs; rows.py, their means, the long form of a table
statistics.py  intervals, tests and detectable differences of an array [seeds, images]
compare.py     which runs are paired, and the differences between two methods
render.py      tables as papers print them; published.py, figures that others printed
reference.py   runs against a stored reference, for continuous integration
differences.py how two runs differ; anchors.py, scores of published weights against those that their authors printed
claims.py      the paper's six statements; scaling/, evaluation of a sweep; page/, the HTML report
"""
