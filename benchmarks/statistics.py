"""The command of error_rates.py: how often tables and claims decide something false, on simulated scores.

    python benchmarks/statistics.py [--repeats 4000]   # simulates: statistics.json (a few minutes on one core)
    python benchmarks/statistics.py --markdown         # the table of the stored JSON

Python looks for modules in a script's own folder first, so other scripts of this folder, and what they import, find
this file where they ask for the standard library's `statistics`. They are given that one.
"""

import importlib.util
import sys
import sysconfig
from pathlib import Path

if __name__ == "__main__":
    from error_rates import main

    main()
elif __name__ == "statistics":
    spec = importlib.util.spec_from_file_location(__name__, Path(sysconfig.get_path("stdlib"), "statistics.py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules[__name__] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[__name__])
