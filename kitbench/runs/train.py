"""The training loop: linear, the same for every method, and a pure function of the cell.

Before each step every generator is seeded from (seed, step), and a batch is a pure function of the same; so weights,
their average, optimiser state and the number of the step are all that a checkpoint needs to go on bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from kitbench.data.batches import Batches
from kitbench.errors import Interrupted, RunError
from kitbench.model.backbone import UNet
from kitbench.runs.checkpoint import Line, resume, save, write_log
from kitbench.seeds import derive
from kitbench.spec.suite import Recipe
from kitbench.store.folder import RunFolder
from kitbench.system.environment import seed_torch
from kitbench.system.interrupt import Stop
from kitbench.system.processes import current, pieces

LOG_EVERY = 10
DIVERGED = 10.0
"""A loss that is not below it ends the run: images lie in [0, 1], and NaN is below nothing."""
Report = Callable[[int, float, float, float], None]
"""Called with (steps done, loss, training PSNR in dB, share of the time that was spent waiting for data), all of the
stretch since the last call."""


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
