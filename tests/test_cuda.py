"""The real command line on CUDA: on a GPU where there is one (-m gpu), and everywhere on a make-believe one.

The make-believe device (tests/fake_cuda) computes on the CPU and refuses what CUDA refuses, so a wrong device in any
command is found without a GPU. What it cannot tell: CUDA's kernels, their numbers and their determinism.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from kitbench.baselines import dncnn
from PIL import Image
from skimage import data as photographs

from kitbench.cost.timing import FLUSH_BYTES
from kitbench.model import methods
from kitbench.store.sweeps import BRACKET
from tests.conftest import ROOT, TINY, run_kitbench

FAKE = ROOT / "tests" / "fake_cuda"
PATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
"""With what tools/gpu.sh adds to it."""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
Command = Callable[..., "subprocess.CompletedProcess[str]"]


def trained_methods() -> list[str]:
    """Beside kit and conv, which the tiny suite has; neighbourhood's package is not everywhere."""
    absent = {"kit", "conv"} | (set() if importlib.util.find_spec("natten") else {"neighbourhood"})
    return [name for name in methods.shipped() if name not in absent and methods.load_method(name).attention]


class Device:
    """The environment in which a command sees a CUDA device, and the log of what it asked of a make-believe one."""

    def __init__(self, folder: Path, real: bool) -> None:
        self.real, self.folder, self.log = real, folder, folder / "cuda.log"
        self.count = torch.cuda.device_count() if real else 1
        own = {"FAKE_CUDA_LOG": str(self.log), "PYTHONPATH": f"{FAKE}{os.pathsep}{PATH}"}
        self.environment: dict[str, str] = {} if real else own
        (folder / "small").mkdir()  # global attention of whole photographs takes minutes on one thread
        for name in ("astronaut", "chelsea"):
            Image.fromarray(getattr(photographs, name)()[100:180, 200:270]).save(folder / "small" / f"{name}.png")
        (folder / "tiny.toml").write_text(TINY.replace('"skimage-test"', '"./small/"'))

    def kitbench(self, *arguments: str, code: int | None = 0, **environment: str) -> Any:
        return run_kitbench(self.folder, *arguments, code=code, **self.environment | environment)

    def python(self, *arguments: str, **environment: str) -> str:
        """What Python prints, and it must end well; in the folder, unless it runs a module of the tests."""
        done = subprocess.run(
            [sys.executable, *arguments], cwd=self.folder, capture_output=True, text=True, timeout=280,
            env={k: v for k, v in os.environ.items() if k != "KITBENCH_DATA"}
            | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATH} | self.environment | environment,
        )  # fmt: skip
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        assert "Warning" not in done.stderr, done.stderr
        return done.stdout

    def asked(self) -> set[str]:
        """What was asked of the make-believe device."""
        return set(self.log.read_text().split("\n")) if self.log.is_file() else set()


@pytest.fixture(params=["make-believe", pytest.param("real", marks=pytest.mark.gpu)])
def cuda(request: pytest.FixtureRequest, tmp_path: Path) -> Device:
    return Device(tmp_path, request.param == "real")


@pytest.fixture
def fake(tmp_path: Path) -> Device:
    return Device(tmp_path, real=False)


def folder(out: Path, name: str) -> Path:
    [found] = out.glob(f"*-{name}-*")
    return found


def losses(out: Path, name: str) -> list[float]:
    return [float(line["loss"]) for line in csv.DictReader((folder(out, name) / "log.csv").read_text().splitlines())]


def weights(out: Path, name: str) -> str:
    """Their checksum."""
    found: str = json.loads((folder(out, name) / "training.json").read_text())["weights_sha256"]
    return found


@pytest.mark.timeout(600)
def test_every_method_trains_on_cuda_as_on_the_cpu_and_bit_identically_twice(cuda: Device) -> None:
    trained = ["kit", "conv", *trained_methods()]
    compared = trained if cuda.real else ["kit", "conv"]  # the make-believe device is the CPU

    def run(names: list[str], device: str, out: str) -> None:
        few = () if cuda.real else ("--set", "recipe.steps=3")
        cuda.kitbench(
            "run", "--suite", "tiny.toml", "--method", ",".join(names), *few, "--device", device, "--out", out
        )

    run(trained, "cuda", "cuda")
    run(compared, "cpu", "cpu")
    for name in compared:
        assert losses(cuda.folder / "cuda", f"{name}-s0") == pytest.approx(
            losses(cuda.folder / "cpu", f"{name}-s0"), rel=0.02
        )
    if cuda.real:
        run(trained, "cuda", "again")
        for name in trained:
            assert weights(cuda.folder / "again", f"{name}-s0") == weights(cuda.folder / "cuda", f"{name}-s0")
    else:  # batches are copied from page-locked memory, behind the host's back
        assert "copy from pinned memory, non-blocking" in cuda.asked()
        assert "copy from pageable memory, non-blocking" not in cuda.asked()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["kit", "conv", *trained_methods()])
def test_mixed_precision_trains_as_single_does(name: str, tmp_path: Path) -> None:
    device = Device(tmp_path, real=True)
    for precision in ("bf16", "float32"):
        precise = ("--set", f"recipe.precision={precision}", "--out", precision)
        device.kitbench("run", "--suite", "tiny.toml", "--device", "cuda", "--method", name, *precise)
    assert losses(tmp_path / "bf16", f"{name}-s0") == pytest.approx(losses(tmp_path / "float32", f"{name}-s0"), rel=0.1)


def test_a_run_that_is_killed_goes_on_bit_for_bit(cuda: Device) -> None:
    steps = 400 if cuda.real else 30
    run = ("run", "--suite", "tiny.toml", "--device", "cuda", "--method", "kit", "--workers", "1")
    run += ("--set", f"recipe.steps={steps}")
    environment = {k: v for k, v in os.environ.items() if k != "KITBENCH_DATA"} | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "kitbench", *run, "--out", "killed"], cwd=cuda.folder, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env=environment | cuda.environment, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not list((cuda.folder / "killed").glob("*-kit-s0-*/checkpoint.safetensors")):
        assert process.poll() is None, "the run has ended before its first checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder(cuda.folder / "killed", "kit-s0") / "training.json").exists()
    cuda.kitbench(*run, "--out", "killed")
    cuda.kitbench(*run, "--out", "whole")
    assert weights(cuda.folder / "killed", "kit-s0") == weights(cuda.folder / "whole", "kit-s0")
    assert losses(cuda.folder / "killed", "kit-s0") == losses(cuda.folder / "whole", "kit-s0")


@pytest.mark.parametrize("share", [False, True], ids=["a GPU each", "one GPU"])
def test_two_processes_train_on_cuda_as_one_does(cuda: Device, share: bool) -> None:
    """NCCL wants a GPU for each process; on one GPU they speak by gloo, and NCCL is tried alone, below."""
    if not cuda.real and not share:
        cuda.environment["FAKE_CUDA_DEVICES"] = "2"
    share = share or (cuda.real and cuda.count < 2)
    device = "cuda:0" if share else "cuda"
    run = ("-m", "kitbench", "run", "--suite", "tiny.toml", "--method", "kit", "--set", "recipe.precision=float64")
    cuda.python(*run, "--device", "cuda", "--out", "alone")
    cuda.log.unlink(missing_ok=True)
    told = cuda.python(*TORCHRUN, "2", *run, "--device", device, "--out", "both")
    assert "2 processes" in told
    assert losses(cuda.folder / "both", "kit-s0") == pytest.approx(losses(cuda.folder / "alone", "kit-s0"), rel=1e-9)
    if not cuda.real:
        nccl = {line for line in cuda.asked() if line.startswith("nccl")}
        assert nccl == (set() if share else {"nccl on cuda:0", "nccl on cuda:1"})


ALONE = """
import os, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from kitbench.system.environment import choose_device
from kitbench.system.processes import joined
with joined() as world:
    device = choose_device("cuda")
    assert world.size == 1 and device.index == int(os.environ["LOCAL_RANK"])
    total = torch.ones(3, device=device)
    dist.all_reduce(total)
    assert total.tolist() == [1, 1, 1]
    told = torch.tensor(1)
    dist.all_reduce(told)  # on the CPU, by gloo
    model = DistributedDataParallel(torch.nn.Linear(4, 4).to(device), [device])
    model(torch.rand(2, 4, device=device)).square().mean().backward()
    assert model.module.weight.grad.device == device
    print("well", dist.get_backend_config())
"""


def test_one_process_speaks_nccl_with_itself(cuda: Device) -> None:
    (cuda.folder / "alone.py").write_text(ALONE)
    told = cuda.python(*TORCHRUN, "1", "alone.py")
    assert "well" in told
    assert ("nccl" in told) == cuda.real


@pytest.mark.parametrize(
    ("cuda", "sizes"),
    [
        ("make-believe", "16:64"),
        pytest.param("real", "32", marks=pytest.mark.gpu),
        pytest.param("real", "64:256", marks=[pytest.mark.gpu, pytest.mark.slow]),
    ],
    indirect=["cuda"],
)
def test_a_sweep_on_cuda_has_no_failed_row(cuda: Device, sizes: str) -> None:
    methods = "kit,global:form=sdpa,window,local,conv" if cuda.real else "kit,conv"
    asked = ("--sizes", sizes, "--what", "infer,train", "--methods", methods)
    cuda.kitbench("scale", "--device", "cuda", *asked, "--out", "scale")
    points = json.loads((cuda.folder / "scale" / "scale.json").read_text())["points"]
    assert {point["status"] for point in points} <= {"measured", "predicted"}, [point["reason"] for point in points]
    assert all(point["peak_bytes"] for point in points if point["size"] == points[0]["size"])
    if not cuda.real:
        assert {"_cuda_setMemoryFraction", "_cuda_resetPeakMemoryStats", "_cuda_emptyCache"} <= cuda.asked()


def asked_for(folder: Path) -> list[dict[str, Any]]:
    """The points of a sweep at the sizes that were asked for, without those predicted around the budget."""
    points = json.loads((folder / "scale.json").read_text())["points"]
    return [point for point in points if point["reason"] != BRACKET]


def test_what_the_other_children_hold_is_no_want_of_memory(fake: Device) -> None:
    """Each method's training step fits on the device, but not beside what another has cached."""
    asked = ("scale", "--device", "cuda", "--sizes", "64", "--what", "train", "--methods", "window,conv,kit")
    wide = fake.kitbench(*asked, "--out", "wide")
    assert "failed" not in wide.stdout
    points = asked_for(fake.folder / "wide")
    (fake.folder / "held").mkdir()
    largest = max(point["reserved_bytes"] for point in points)
    device = round(1.6 * largest) + FLUSH_BYTES  # the timer's buffer has room once: no child may keep it
    tight = {"FAKE_CUDA_FOLDER": str(fake.folder / "held"), "FAKE_CUDA_BYTES": str(device)}
    limit = 2 * max(point["predicted_bytes"] for point in points)
    assert limit < FLUSH_BYTES
    fake.kitbench(*asked, "--memory", f"{limit}B", "--out", "tight", **tight)
    tight_points = asked_for(fake.folder / "tight")
    assert [point["status"] for point in tight_points] == ["measured"] * 3, [point["reason"] for point in tight_points]
    assert [point["peak_bytes"] for point in tight_points] == [point["peak_bytes"] for point in points]


BENCH = """
import torch
from kitbench.cost.sweep.worker import Bench, Spec
bench = Bench(Spec("conv", {}, "attention", "train", 64, 32, 1), torch.device("cuda:0"), 200 << 20)
for request in ("measure", "prepare", "sample", "sample"):
    bench.answer(request)
    bench.rest()
    print(torch.cuda.memory_reserved())
"""


def test_the_timers_buffer_is_neither_counted_nor_kept(cuda: Device) -> None:
    """With a memory limit below the size of the buffer, which a waiting child of the sweep does not hold."""
    kept = [int(line) for line in cuda.python("-c", BENCH).split()]
    assert len(kept) == 4
    assert max(kept) < 200 << 20 < FLUSH_BYTES


def test_commands_that_use_a_trained_run_do_so_on_cuda(cuda: Device) -> None:
    cuda.kitbench("run", "--suite", "tiny.toml", "--device", "cuda", "--method", "kit")
    run = str(folder(cuda.folder / "results", "kit-s0").relative_to(cuda.folder))
    picture = np.random.default_rng(0).integers(256, size=(70, 90, 3), dtype=np.uint8)
    Image.fromarray(picture).save(cuda.folder / "mine.png")
    on = ("--run", run, "--device", "cuda")
    for tile in ("0", "64"):
        cuda.kitbench("restore", "mine.png", *on, "--tile", tile, "--overwrite")
    with Image.open(cuda.folder / "mine-restored.png") as restored:
        assert restored.size == (90, 70)
    cuda.kitbench("explain", "mine.png", *on, "--at", "20,30")
    assert (cuda.folder / "explain.png").stat().st_size > 1000
    assert "bit-identical" in cuda.kitbench("reproduce", run).stdout  # finds the device of the record
    state = {key: torch.zeros_like(t) for key, t in dncnn.Network(3, depth=2, width=4).state_dict().items()}
    safetensors.torch.save_file(state, cuda.folder / "zero.safetensors")
    small = ("--set", "methods.dncnn.depth=2", "--set", "methods.dncnn.width=4")
    given = ("--method", "dncnn", "--weights", "zero.safetensors", *small)
    cuda.kitbench("eval", "--suite", "tiny.toml", *given, "--device", "cuda")
    assert "dncnn" in cuda.kitbench("table", "results").stdout


def test_each_worker_has_a_gpu_of_its_own(fake: Device) -> None:
    fake.environment |= {"FAKE_CUDA_DEVICES": "2", "KITBENCH_JOBS": ""}
    said = fake.kitbench("run", "--suite", "tiny.toml", "--device", "cuda").stdout
    assert "(cuda:0, cuda:1), 2 worker processes" in said
    named = fake.kitbench("run", "--suite", "tiny.toml", "--device", "cuda:1", "--seeds", "7").stdout
    assert "(cuda:1)," in named
    assert "worker processes" not in named


@pytest.mark.parametrize(
    ("device", "processes", "devices", "sentence"),
    [
        ("cuda:3", 1, 2, "--device cuda:3 was asked for, but there is 2 CUDA devices"),
        ("cuda", 2, 1, "start one per device, or let all share one with --device cuda:0"),
        ("cuda:0", 2, 2, "names one GPU for all processes"),
    ],
)
def test_a_device_that_will_not_do_is_refused(
    fake: Device, device: str, processes: int, devices: int, sentence: str
) -> None:
    command = [*TORCHRUN, str(processes)] if processes > 1 else []
    done = subprocess.run(
        [sys.executable, *command, "-m", "kitbench", "run", "--suite", "tiny.toml", "--device", device],
        cwd=fake.folder, capture_output=True, text=True, timeout=200,
        env={k: v for k, v in os.environ.items() if k != "KITBENCH_DATA"} | fake.environment
        | {"FAKE_CUDA_DEVICES": str(devices)},
    )  # fmt: skip
    assert done.returncode != 0
    assert sentence in done.stderr
    assert not (fake.folder / "results").exists()


WRONG = {
    "a device without an index": "torch.cuda.set_per_process_memory_fraction(0.5, torch.device('cuda'))",
    "operands on two devices": "torch.ones(2, device='cuda') + torch.ones(2)",
    "numpy of the device's memory": "torch.ones(2, device='cuda').numpy()",
    "a device that is not there": "torch.ones(2, device='cuda:1')",
    "more memory than there is": "torch.empty(1 << 20, device='cuda')",
    "no deterministic kernel": "torch.use_deterministic_algorithms(True); torch.ones(2, device='cuda').cumsum(0)",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_make_believe_device_refuses_what_cuda_refuses(fake: Device, wrong: str) -> None:
    code = f"""
import torch
try:
    {WRONG[wrong]}
except (ValueError, RuntimeError, TypeError) as error:
    print(type(error).__name__)
"""
    kind = {"a device without": "ValueError", "numpy": "TypeError", "more memory": "OutOfMemoryError"}
    expected = next((kind[start] for start in kind if wrong.startswith(start)), "RuntimeError")
    assert fake.python("-c", code, FAKE_CUDA_BYTES=str(1 << 20)).strip() == expected
