"""The state of a training, its checkpoints and its weights: written whole, and read back only where they are whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from kitbench.data.pixels import pixel_sha256
from kitbench.errors import InputError, RunError
from kitbench.spec.fields import digest
from kitbench.store.files import write_atomic
from kitbench.store.folder import RunFolder
from kitbench.store.log import LogLine, log_text, parse_log


@dataclass
class TrainingState:
    """All that a training needs to go on bit for bit: every random number is a function of seed and step."""

    model: nn.Module
    optimiser: torch.optim.Optimizer
    average: list[Tensor]
    """Moving average of the parameters, in their order; empty without one."""
    sums: Tensor
    """Loss and squared error, added up since the last line of the log."""
    done: int = 0
    """Steps."""
    log: list[LogLine] = field(default_factory=list)

    def save(self, folder: RunFolder) -> None:
        """Write the run's checkpoint, with a checksum; the one before it is kept under another name."""
        state = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for number, own in self.optimiser.state_dict()["state"].items():
            state |= {f"optimiser.{number}.{name}": torch.as_tensor(value) for name, value in own.items()}
        state |= {f"average.{number}": tensor for number, tensor in enumerate(self.average)}
        state["sums"] = self.sums
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        metadata = {"steps": str(self.done), "log": log_text(self.log)}
        metadata["sha256"] = digest([state_sha256(tensors), metadata])
        write_atomic(folder.checkpoint, safetensors.torch.save(tensors, metadata), folder.previous_checkpoint)
        write_log(self.log, folder)

    def resume(self, folder: RunFolder, say: Callable[[str], None]) -> None:
        """Load the run's checkpoint where there is one, and where it is damaged the one before it, saying so.

        Raises RunError where there are checkpoints and none is good.
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
                    raise ValueError("its content does not match the checksum stated in it")
                log, done = parse_log(metadata["log"]), int(metadata["steps"])
                self._load(tensors)
            except (safetensors.SafetensorError, OSError, RuntimeError, KeyError, ValueError) as error:
                damaged.append(f"checkpoint {path} is damaged ({error})")
                continue
            if damaged:
                say(f"{damaged[0]}; going on from the one before it, at step {done}")
            self.log, self.done = log, done
            return
        if damaged:
            raise RunError(f"{' and '.join(damaged)}; delete what is damaged to train from the start")

    def _load(self, tensors: dict[str, Tensor]) -> None:
        """Put a checkpoint's tensors into their places."""
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimiser."):
                _, number, name = key.split(".")
                # In the parameter's own memory format (channels-last kernels), as the optimiser had made it.
                like = parameters[int(number)]
                value = torch.empty_like(like).copy_(value) if value.shape == like.shape else value
                state.setdefault(int(number), {})[name] = value
        self.optimiser.load_state_dict({"state": state, "param_groups": self.optimiser.state_dict()["param_groups"]})
        for place, mean in enumerate(self.average):
            mean.copy_(tensors[f"average.{place}"])
        self.sums.copy_(tensors["sums"])


def trained_state(folder: RunFolder) -> dict[str, Tensor]:
    """The trained weights of a run. Raises InputError where they are missing, or not those that were stored."""
    advice = "restore it, or delete the run's folder to train again"
    try:
        state = safetensors.torch.load_file(folder.weights)
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{folder.weights} cannot be read ({error}); {advice}.") from error
    training = folder.training
    if training is None or state_sha256(state) != training.weights_sha256:
        raise InputError(
            f"{folder.weights} is damaged: it does not match the checksum stated in training.json; {advice}."
        )
    return state


def state_sha256(state: dict[str, Tensor]) -> str:
    """Of all weights by name: equal if and only if they are bit-identical."""
    return digest({name: pixel_sha256(tensor.detach().cpu().numpy()) for name, tensor in state.items()})


def write_log(log: list[LogLine], folder: RunFolder) -> None:
    write_atomic(folder.log, log_text(log).encode())
