"""`python -m kitbench`: environment variables that must be set before torch is imported, then the command line."""

from __future__ import annotations

import os
import sys


def main() -> None:
    # With OpenMP's default active waiting, a step becomes ten times slower as soon as another process uses a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr otherwise,
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # and warns of memory that was allocated before it started
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # kitbench reports files that cannot be decoded
    from kitbench.cli.main import cli

    cli(prog_name="kitbench" if not sys.argv[0].endswith("__main__.py") else "python -m kitbench")


if __name__ == "__main__":
    main()
