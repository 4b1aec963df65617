"""The training loop: linear, the same for every method, and a pure function of the cell.

Before each step every generator is seeded from (seed, step), and a batch is a pure function of the same; so weights,
optimiser state and the number of the step are all that a checkpoint needs to go on bit for bit.
"""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from kitbench.backbone import UNet
from kitbench.data.batches import Batches
from kitbench.errors import Interrupted, RunError
from kitbench.seeds import derive
from kitbench.store import RunFolder, replace_with, write_atomic
from kitbench.suite import Recipe

LOG_EVERY = 10
Report = Callable[[int, float, float], None]
"""Called with (steps done, loss, training PSNR in dB), both means over the stretch since the last call."""


def train(
    model: UNet,
    batches: Batches,
    recipe: Recipe,
    device: torch.device,
    folder: RunFolder,
    workers: int,
    report: Report,
    stopping: Callable[[], bool],
) -> tuple[float, list[float]]:
    """Train in place from the last checkpoint, or from the start.

    Returns the mean loss of the last logged stretch, and the seconds a step of every stretch of LOG_EVERY steps.
    Raises RunError where the loss is not finite, naming the step, and Interrupted, with a checkpoint written, once
    `stopping()` is true.
    """
    model.to(device).train()
    optimiser = torch.optim.AdamW(
        decay_groups(model, recipe.weight_decay), lr=recipe.lr, betas=recipe.betas, fused=True
    )
    sums = torch.zeros(
        2, device=device
    )  # of loss and of squared error, over the stretch since the last line of the log
    start, log = resume(model, optimiser, sums, folder)
    loader = batches.from_step(start, workers)
    first, clock = start, time.perf_counter()
    rates: list[float] = []
    for step in range(start, recipe.steps):
        degraded, clean = (images.to(device, non_blocking=True) for images in next(loader))
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(recipe, step)
        torch.manual_seed(derive(batches.seed, "step", step))
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            restored = model(degraded)
        error = restored.float() - clean
        loss = loss_of(error, recipe)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if recipe.clip:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimiser.step()

        sums += torch.stack((loss.detach(), error.detach().square().mean()))
        done = step + 1
        if done % LOG_EVERY == 0 or done == recipe.steps:
            stretch = (done - 1) % LOG_EVERY + 1
            mean_loss, mse = (sums / stretch).tolist()  # waits for the device
            if not math.isfinite(mean_loss):
                raise RunError(
                    f"the loss is {mean_loss} within steps {done - stretch} to {done - 1}; the run was stopped"
                )
            now = time.perf_counter()
            rates.append((now - clock) / (done - first))
            log.append((done, mean_loss, -10 * math.log10(mse), learning_rate(recipe, step), rates[-1]))
            report(done, mean_loss, log[-1][2])
            sums.zero_()
            first, clock = done, now
        stop = stopping() and done < recipe.steps
        if stop or (done % recipe.checkpoint_every == 0 and done < recipe.steps):
            paused = time.perf_counter()
            save(model, optimiser, sums, done, log, folder)
            clock += time.perf_counter() - paused  # a checkpoint is no part of a step's time
        if stop:
            raise Interrupted(f"stopped at step {done} of {recipe.steps} of {folder.path.name}, saved")
    write_log(log, folder.log)
    return log[-1][1], [line[4] for line in log]


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up to lr, then a cosine from lr to lr_min at the last step."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / (recipe.warmup + 1)
    progress = (step - recipe.warmup) / max(1, recipe.steps - 1 - recipe.warmup)
    return recipe.lr_min + (recipe.lr - recipe.lr_min) * (1 + math.cos(math.pi * progress)) / 2


def loss_of(error: Tensor, recipe: Recipe) -> Tensor:
    """Mean over all elements. Charbonnier: sqrt(error^2 + epsilon^2), as in Lai et al., CVPR 2017."""
    if recipe.loss == "charbonnier":
        return (error.square() + recipe.charbonnier_epsilon**2).sqrt().mean()
    return error.abs().mean() if recipe.loss == "l1" else error.square().mean()


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices and kernels decay; biases, norms and position tables (under two dimensions, or named bias) do not."""
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    still = [p for name, p in parameters if p.ndim < 2 or "bias" in name]
    decayed = [p for name, p in parameters if not (p.ndim < 2 or "bias" in name)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": still, "weight_decay": 0.0}]


Line = tuple[int, float, float, float, float]


def save(
    model: nn.Module, optimiser: torch.optim.Optimizer, sums: Tensor, done: int, log: Sequence[Line], folder: RunFolder
) -> None:
    """Checkpoint: weights, optimiser state and running sums; the number of steps done and the log in the metadata."""
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    for number, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{number}.{name}": torch.as_tensor(value).contiguous() for name, value in state.items()}
    tensors["sums"] = sums
    metadata = {"steps": str(done), "log": _csv(log)}
    replace_with(folder.checkpoint, lambda aside: safetensors.torch.save_file(tensors, aside, metadata))


def resume(
    model: nn.Module, optimiser: torch.optim.Optimizer, sums: Tensor, folder: RunFolder
) -> tuple[int, list[Line]]:
    """Load the run's checkpoint where there is one. Returns the number of steps done, and the log up to there."""
    if not folder.checkpoint.is_file():
        return 0, []
    try:
        with safetensors.safe_open(folder.checkpoint, "pt") as file:
            metadata = file.metadata()
        tensors = safetensors.torch.load_file(folder.checkpoint)
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
        sums.copy_(tensors["sums"])
        rows = list(csv.reader(io.StringIO(metadata["log"])))[1:]
        log = [(int(r[0]), *(float(value) for value in r[1:])) for r in rows]
        return int(metadata["steps"]), log  # type: ignore[return-value]
    except (safetensors.SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise RunError(
            f"checkpoint {folder.checkpoint} is damaged ({error}); delete it to train from the start"
        ) from error


def write_log(log: Sequence[Line], path: Path) -> None:
    write_atomic(path, _csv(log).encode())


def _csv(log: Sequence[Line]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("step", "loss", "psnr_db", "lr", "seconds_per_step"))
    writer.writerows(log)
    return text.getvalue()
