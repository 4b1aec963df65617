"""What may be concluded, from stored runs alone: never from anything that training or evaluation holds in memory.

statistics.py  intervals, tests and detectable differences of an array [seeds, images]
compare.py     which runs are paired, and the differences between two methods
table.py       rows, and tables as papers print them; published.py, figures of others beside them
check.py       runs against a stored reference, for continuous integration
claims.py      the paper's six statements; pictures.py, report.py, report.html  the page that shows it all
explain.py     which patches KiT chose: the one part that runs a network
"""
