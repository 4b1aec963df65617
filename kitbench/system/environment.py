"""Where a run is made: device, versions, flags, commit; and the settings of torch that make it repeatable."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import kitbench
from kitbench.errors import InputError
from kitbench.spec.suite import Recipe
from kitbench.store.records import Environment, Numerics
from kitbench.system.processes import own_gpus, started_by_torchrun

_PACKAGES = ("torch", "numpy", "scipy", "scikit-image", "opencv-python-headless", "pillow", "pandas", "fvcore", "lpips")


def choose_device(wanted: str) -> torch.device:
    """The device of a name: `cpu`, `cuda:N`, `cuda` for the current one, `auto` for CUDA where it is, else the CPU.

    A CUDA device always has its index, which part of torch.cuda's functions insist on, and is made the current one, on
    which kernels are launched. Raises InputError for a device that is not there, or not this process's own.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and "LOCAL_RANK" in os.environ:
        wanted = f"cuda:{os.environ['LOCAL_RANK']}"  # torchrun: a GPU for each process of this machine
    device = named_device(wanted)
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        found = f"{count or 'no'} CUDA device{'s' * (count > 1)}"
        build = "" if torch.version.cuda else " (this torch is a CPU build)"
        if count and device.index == int(os.environ.get("LOCAL_RANK", "-1")):
            raise InputError(
                f"torchrun started a process for {wanted}, but there is {found}; start one per device, or let all "
                f"share one with --device cuda:0."
            )
        raise InputError(f"--device {wanted} was asked for, but there is {found}{build}; use --device cpu or auto.")
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        if own_gpus() > 1 and device.index != int(os.environ["LOCAL_RANK"]):
            raise InputError(f"--device {device} names one GPU for all processes; give cuda, one for each.")
        torch.cuda.set_device(device)
    return device


def named_device(wanted: str) -> torch.device:
    """The device of a name other than `auto`, whether it is here or not. Raises InputError for a name of none."""
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise InputError(f"--device {wanted} is no device; give auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {wanted} is not supported; give auto, cpu, cuda or cuda:N.")
    return device


def device_name(device: torch.device) -> str:
    """`cpu`, or the CUDA device's own name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def make_repeatable(recipe: Recipe) -> None:
    """Threads, deterministic algorithms and TF32 as the recipe says: the same for every method."""
    if recipe.threads is not None:
        # Also where the number stands already: torch would else leave MKL to choose fewer threads by itself.
        torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(recipe.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # a debugging aid that costs a pass over memory
    torch.backends.cudnn.benchmark = not recipe.deterministic
    torch.backends.cuda.matmul.allow_tf32 = recipe.tf32
    torch.backends.cudnn.allow_tf32 = recipe.tf32


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed the default generators of the CPU and of all CUDA devices, as torch.manual_seed does, before every step.

    torch.manual_seed also keeps a stack trace for each kind of device that is not in use: 0.3 ms, a step being 60.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)


def environment(device: torch.device, **more: int | None) -> Environment:
    """What is written beside a run's numbers; `more` are further flags."""
    return Environment(
        kitbench=kitbench.__version__,
        commit=commit(),
        command=("kitbench", *sys.argv[1:]),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        host=f"{platform.system()} {platform.machine()}, {_processor()}",
        device=device_name(device),
        driver=_driver() if device.type == "cuda" else None,
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        versions={name: found for name in _PACKAGES if (found := _version(name))},
        flags={**precision_flags(), "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"), **more},
    )


def precision_flags() -> dict[str, bool | int | str | None]:
    """Flags of torch that decide the last bits of a result."""
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def numerics(source: dict[str, str]) -> Numerics:
    """What the last bits of numbers made now depend on; `source`: digests of the source, by part."""
    return Numerics(source=source, torch=torch.__version__, threads=torch.get_num_threads(), flags=precision_flags())


def command_line() -> str:
    """The command that was given, as one would type it; of several machines' torchrun without their rendezvous."""
    program = ["python"]
    if started_by_torchrun():
        several = [f"--nnodes={count}"] if (count := os.environ.get("GROUP_WORLD_SIZE", "1")) != "1" else []
        program = ["torchrun", *several, f"--nproc-per-node={os.environ.get('LOCAL_WORLD_SIZE', '1')}"]
    return shlex.join([*program, "-m", "kitbench", *sys.argv[1:]])


def commit() -> str | None:
    """The commit of kitbench's own checkout, `+dirty` where its code differs from it; None where git tells none.

    A copy of a checkout without its .git has what KITBENCH_COMMIT says.
    """
    root = Path(kitbench.__file__).parent.parent
    if not (root / ".git").exists():
        return os.environ.get("KITBENCH_COMMIT") or None

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", root, *arguments], capture_output=True, text=True, check=True, timeout=20
            )
        except (OSError, subprocess.SubprocessError):
            return None  # no git, no commit yet, or no answer: the record says null
        return done.stdout.strip()

    head, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", "kitbench", "baselines", "datasets")
    return None if head is None or changes is None else f"{head}{'+dirty' if changes else ''}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or 'unknown processor'}, {os.cpu_count()} cores"


STATE = {
    "clocks.sm": "MHz, the multiprocessors",
    "clocks.max.sm": "MHz, their highest",
    "clocks.mem": "MHz, the memory",
    "power.draw": "W",
    "power.limit": "W",
    "temperature.gpu": "degrees Celsius",
    "utilization.gpu": "% of the time with a kernel running",
    "memory.used": "MiB, by all processes",
}
"""What is asked of nvidia-smi for `gpu_state`, and its unit."""


def gpu_state(device: torch.device, load: Callable[[], object] | None = None) -> dict[str, float | str | None]:
    """Clocks, power and temperature of a CUDA device by nvidia-smi, keys and units of STATE; `load` runs meanwhile.

    A value that the device does not tell is None; where nothing could be read, all are, and 'reason' says why.
    """
    asked = [
        "nvidia-smi", f"--id=GPU-{str(torch.cuda.get_device_properties(device).uuid).removeprefix('GPU-')}",
        f"--query-gpu={','.join(STATE)}", "--format=csv,noheader,nounits",
    ]  # fmt: skip
    empty: dict[str, float | str | None] = dict.fromkeys(STATE)
    try:
        with subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            try:
                deadline = time.monotonic() + 20
                while load is not None and process.poll() is None and time.monotonic() < deadline:
                    load()
                    torch.cuda.synchronize(device)
                said = process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0].strip()
            except BaseException:
                process.kill()
                raise
    except (OSError, subprocess.SubprocessError) as error:
        return empty | {"reason": f"{type(error).__name__}: {error}"}
    values = [value.strip() for value in said.split(",")]
    if process.returncode != 0 or len(values) != len(STATE):
        return empty | {"reason": f"nvidia-smi ended with exit code {process.returncode}: {said[:200]}"}
    return {name: _number(value) for name, value in zip(STATE, values, strict=True)}


def _number(value: str) -> float | None:
    """What nvidia-smi prints; None for '[N/A]' and the like."""
    try:
        return float(value)
    except ValueError:
        return None


def _driver() -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return next((line.strip() for line in done.stdout.splitlines()), None)


def how_to_go_on() -> str:
    return f"Go on with the same command: {command_line()}"
