"""The training loop: linear, the same for every method, and a pure function of the cell.

Before each step every generator is seeded from (seed, step), and a batch is a pure function of the same; so weights,
their average, optimiser state and the number of the step are all that a checkpoint needs to go on bit for bit.
"""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from kitbench.backbone import UNet
from kitbench.data.batches import Batches
from kitbench.data.cards import pixel_sha256
from kitbench.environment import seed_torch
from kitbench.errors import InputError, Interrupted, RunError
from kitbench.processes import current, pieces
from kitbench.seeds import derive
from kitbench.stop import Stop
from kitbench.store import RunFolder, write_atomic
from kitbench.suite import Recipe, digest

LOG_EVERY = 10
DIVERGED = 10.0
"""A loss that is not below it ends the run: images lie in [0, 1], and NaN is below nothing."""
Report = Callable[[int, float, float, float], None]
"""Called with (steps done, loss, training PSNR in dB, share of the time that was spent waiting for data), all of the
stretch since the last call."""
Line = tuple[int, float, float, float, float, float]
"""Of the log: steps done, loss, PSNR in dB, learning rate, seconds a step, and those of them spent waiting for data,
on CUDA while the device had nothing left to do."""
HEADER = ("step", "loss", "psnr_db", "lr", "seconds_per_step", "seconds_data")


def train(
    model: UNet,
    batches: Batches,
    recipe: Recipe,
    device: torch.device,
    folder: RunFolder,
    workers: int,
    report: Report,
    stop: Stop,
    say: Callable[[str], None] = print,
    micro_batch: int | None = None,
) -> list[Line]:
    """Train in place from the last good checkpoint, or from the start; `say` is told of a damaged one.

    Each process takes its share of every batch, at most `micro_batch` samples at a time; the gradients add up to those
    of the whole batch, and the first process alone writes. How a batch is shared changes rounding only.
    Returns the log: means over stretches of LOG_EVERY steps. Leaves the moving average in the model, if there is one.
    Raises RunError where the loss or the weights are not finite or the loss is not below DIVERGED, naming step and
    batch, with the last good checkpoint kept; and Interrupted, with a checkpoint written, once `stop()` is true.
    """
    dtype, world = torch.float64 if recipe.precision == "float64" else torch.float32, current()
    model.to(device, dtype).train()
    parameters = list(model.parameters())
    optimiser = torch.optim.AdamW(
        decay_groups(model, recipe.weight_decay), lr=recipe.lr, betas=recipe.betas, fused=recipe.fused
    )
    average = [p.detach().clone() for p in parameters] if recipe.ema else []
    move_average = get_ema_multi_avg_fn(recipe.ema)
    # Of loss and of squared error, over the stretch since the last line of the log.
    sums = torch.zeros(2, device=device, dtype=dtype)
    losses = torch.zeros(LOG_EVERY, device=device, dtype=dtype)  # of single steps: tells which one went wrong
    start, log = resume(model, optimiser, average, sums, folder, say)
    done = start
    network: nn.Module = torch.compile(model) if recipe.compile else model  # type: ignore[assignment]
    if world.size > 1:
        network = DistributedDataParallel(network, [device] if device.type == "cuda" else None)

    def keep() -> str:
        """Write the state after `done` steps. Raises RunError where it is not worth keeping."""
        check(losses, range(done - done % LOG_EVERY, done), parameters, batches, folder)
        if world.first:
            save(model, optimiser, average, sums, done, log, folder)
        return f"stopped at step {done} of {recipe.steps} of {folder.path.name}, saved"

    shares = pieces(world.share(recipe.batch), micro_batch)
    loader = batches.from_step(start, workers, shares, pinned=device.type == "cuda")
    queued = torch.cuda.Event() if device.type == "cuda" else None
    first, clock, waited = start, time.perf_counter(), 0.0
    with stop.saved_by(keep):
        for step in range(start, recipe.steps):
            asked_to_stop = world.any(stop)
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(recipe, step)
            optimiser.zero_grad(set_to_none=True)
            found = torch.zeros_like(sums)  # loss and squared error of this step
            for share in shares:
                if queued is not None:
                    queued.record()
                asked = time.perf_counter()
                batch = next(loader)
                if queued is None or queued.query():  # else the device is still at work on what came before
                    waited += time.perf_counter() - asked
                degraded, clean = (images.to(device, dtype, non_blocking=True) for images in batch)
                seed_torch(derive(batches.seed, "step", step), device)  # for each piece: all draw as the whole batch
                with gradients_of(network, last=share is shares[-1]):
                    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                        restored = network(degraded)
                    error = restored.to(dtype) - clean
                    loss = loss_of(error, recipe)
                    weight = len(share) / recipe.batch
                    (loss * (weight * world.size)).backward()  # the processes' gradients are averaged, not added
                squared = torch.linalg.vector_norm(error.detach()).square() / error.numel()
                found += weight * torch.stack((loss.detach(), squared))
            world.sum(found)
            if recipe.clip:
                clip_gradients(parameters, recipe.clip)

            with stop.state:  # from here to the end of the block the state is that of no step
                optimiser.step()
                if recipe.ema:
                    move_average(average, parameters, None)
                losses[step % LOG_EVERY] = found[0]
                sums += found
                done = step + 1
                if done % LOG_EVERY == 0 or done == recipe.steps:
                    stretch = (done - 1) % LOG_EVERY + 1
                    mean_loss, mse = (sums / stretch).tolist()  # waits for the device
                    if not mean_loss < DIVERGED:
                        check(losses, range(done - stretch, done), parameters, batches, folder)
                    now = time.perf_counter()
                    psnr = -10 * math.log10(mse) if mse else math.inf
                    seconds, waiting = ((now - clock) / (done - first), waited / (done - first))
                    log.append((done, mean_loss, psnr, learning_rate(recipe, step), seconds, waiting))
                    report(done, mean_loss, psnr, waiting / seconds)
                    sums.zero_()
                    first, clock, waited = done, now, 0.0
            stopping = asked_to_stop() and done < recipe.steps
            if stopping or (done % recipe.checkpoint_every == 0 and done < recipe.steps):
                paused = time.perf_counter()
                with stop.state:
                    said = keep()
                clock += time.perf_counter() - paused  # a checkpoint is no part of a step's time
                if stopping:
                    raise Interrupted(said)
    check(losses, range(0), parameters, batches, folder)
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=False):
            parameter.copy_(mean)
    if world.first:
        write_log(log, folder)
    return log


def gradients_of(network: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Where a piece's gradients are added up: in this process, and behind the `last` piece over all processes."""
    return nullcontext() if last or not isinstance(network, DistributedDataParallel) else network.no_sync()


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> None:
    """Scale all gradients so that their joint 2-norm is at most `limit`: torch.nn.utils.clip_grad_norm_, bit for bit.

    That one sorts them by device and type first, which here are one: 0.2 ms, a step being 60.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))


def check(
    losses: Tensor, steps: range, parameters: Sequence[nn.Parameter], batches: Batches, folder: RunFolder
) -> None:
    """Raises RunError where a loss of these steps is not below DIVERGED, or a weight is not finite."""
    values = losses.tolist()
    bad = next((step for step in steps if not values[step % LOG_EVERY] < DIVERGED), None)
    if bad is not None:
        places = batches.places(bad)
        crops = ", ".join(places[:16]) + (f" and {len(places) - 16} more" if len(places) > 16 else "")
        what = f"the loss is {values[bad % LOG_EVERY]:.4g} at step {bad}, on the crops {crops}"
    elif not torch.stack([p.isfinite().all() for p in parameters]).all():
        what = "weights are not finite, though every loss was"
    else:
        return
    kept = f"{folder.checkpoint} is kept" if folder.checkpoint.is_file() else "there was no checkpoint yet"
    raise RunError(f"training went astray: {what}; stopped, {kept}. A smaller recipe.lr or a longer warmup may help")


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
    metadata = {"steps": str(done), "log": _csv(log)}
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
    write_atomic(folder.log, _csv(log).encode())


def _csv(log: Sequence[Line]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows(log)
    return text.getvalue()
