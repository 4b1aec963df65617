"""`python -m kitbench`: environment variables that must be set before torch is imported, then the command line."""

from __future__ import annotations

import atexit
import gc
import os
import sys

ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # active waiting makes a step ten times slower as soon as another process uses a core
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS is deterministic only with a fixed workspace
    "KINETO_LOG_LEVEL": "99",  # the profiler announces itself on stderr otherwise,
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # and warns of memory that was allocated before it started
    "OPENCV_LOG_LEVEL": "SILENT",  # kitbench reports files that cannot be decoded
}
"""What is set, where the user has not set it."""


def main() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    atexit.register(gc.freeze)  # or Python looks for garbage in all that torch has made, a second long, when it ends
    from kitbench.cli.main import cli

    cli(prog_name="kitbench" if not sys.argv[0].endswith("__main__.py") else "python -m kitbench")


if __name__ == "__main__":
    main()
