"""Weights, checkpoints and the log of a training: written, and read back only where they are whole."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from kitbench.data.pixels import pixel_sha256
from kitbench.errors import InputError, RunError
from kitbench.spec.fields import digest
from kitbench.store.files import write_atomic
from kitbench.store.folder import RunFolder

Line = tuple[int, float, float, float, float, float]
"""Of the log: steps done, loss, PSNR in dB, learning rate, seconds a step, and those of them spent waiting for data,
on CUDA while the device had nothing left to do."""
HEADER = ("step", "loss", "psnr_db", "lr", "seconds_per_step", "seconds_data")


def save(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    average: Sequence[Tensor],
    sums: Tensor,
    done: int,
    log: Sequence[Line],
    folder: RunFolder,
) -> None:
    """Checkpoint: weights, their average, optimiser state and running sums; steps done, log and checksum as metadata.

    The checkpoint before it is kept under another name.
    """
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, own in optimiser.state_dict()["state"].items():
        state |= {f"optimiser.{number}.{name}": torch.as_tensor(value) for name, value in own.items()}
    state |= {f"average.{number}": tensor for number, tensor in enumerate(average)}
    state["sums"] = sums
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    metadata = {"steps": str(done), "log": csv_of(log)}
    metadata["sha256"] = digest([state_sha256(tensors), metadata])
    write_atomic(folder.checkpoint, safetensors.torch.save(tensors, metadata), folder.previous_checkpoint)
    write_log(log, folder)


def resume(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    average: Sequence[Tensor],
    sums: Tensor,
    folder: RunFolder,
    say: Callable[[str], None],
) -> tuple[int, list[Line]]:
    """Load the run's checkpoint where there is one, and where it is damaged the one before it.

    Returns the number of steps done, and the log up to there. Raises RunError where no checkpoint is good.
    """
    damaged = []
    for path in (folder.checkpoint, folder.previous_checkpoint):
        if not path.is_file():
            continue
        try:
            with safetensors.safe_open(path, "pt") as file:
                metadata = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no dict
            found = metadata.pop("sha256", None)
            if found != digest([state_sha256(tensors), metadata]):
                raise ValueError("its content has not the checksum that it states")
            _load(model, optimiser, average, sums, tensors)
            lines = list(csv.reader(io.StringIO(metadata["log"])))[1:]
            log = [(int(line[0]), *(float(value) for value in line[1:])) for line in lines]
            done = int(metadata["steps"])
        except (safetensors.SafetensorError, OSError, RuntimeError, KeyError, ValueError) as error:
            damaged.append(f"checkpoint {path} is damaged ({error})")
            continue
        if damaged:
            say(f"{damaged[0]}; going on from the one before it, at step {done}")
        return done, log  # type: ignore[return-value]
    if damaged:
        raise RunError(f"{' and '.join(damaged)}; delete what is damaged to train from the start")
    return 0, []


def _load(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    average: Sequence[Tensor],
    sums: Tensor,
    tensors: dict[str, Tensor],
) -> None:
    """Put a checkpoint's tensors into their places."""
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimiser."):
            _, number, name = key.split(".")
            # In the parameter's own memory format (channels-last kernels), as the optimiser had made it.
            like = parameters[int(number)]
            value = torch.empty_like(like).copy_(value) if value.shape == like.shape else value
            state.setdefault(int(number), {})[name] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    for place, mean in enumerate(average):
        mean.copy_(tensors[f"average.{place}"])
    sums.copy_(tensors["sums"])


def trained_state(folder: RunFolder) -> dict[str, Tensor]:
    """The trained weights of a run. Raises InputError where they are missing, or not those that were stored."""
    advice = "restore it, or delete the run's folder to train again"
    try:
        state = safetensors.torch.load_file(folder.weights)
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{folder.weights} cannot be read ({error}); {advice}.") from error
    training = folder.training
    if training is None or state_sha256(state) != training.weights_sha256:
        raise InputError(f"{folder.weights} is damaged: it has not the checksum that training.json states; {advice}.")
    return state


def state_sha256(state: dict[str, Tensor]) -> str:
    """Of all weights by name: equal if and only if they are bit-identical."""
    return digest({name: pixel_sha256(tensor.detach().cpu().numpy()) for name, tensor in state.items()})


def write_log(log: Sequence[Line], folder: RunFolder) -> None:
    write_atomic(folder.log, csv_of(log).encode())


def csv_of(log: Sequence[Line]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows(log)
    return text.getvalue()
