"""The training loop: linear, the same for every method, and a pure function of the cell.

Before each step every generator is seeded from (seed, step), and a batch is a pure function of the same; so weights,
their average, optimiser state and the number of the step are all that a checkpoint needs to go on bit for bit.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from kitbench.data.batches import Batches
from kitbench.errors import Interrupted, RunError
from kitbench.model.backbone import UNet
from kitbench.runs.checkpoint import TrainingState, write_log
from kitbench.seeds import derive
from kitbench.spec.suite import Recipe
from kitbench.store.folder import RunFolder
from kitbench.store.log import LogLine
from kitbench.system.environment import seed_torch
from kitbench.system.interrupt import Stop
from kitbench.system.processes import World, current, pieces

T = TypeVar("T")
LOG_EVERY = 10
DIVERGED = 10.0
"""A loss that is not below it ends the run: images lie in [0, 1], and NaN is below nothing."""


@dataclass(frozen=True)
class TrainingContext:
    """Where a training runs and whom it informs; decides no number beyond rounding."""

    device: torch.device
    folder: RunFolder
    stop: Stop
    workers: int = 0
    """Processes that prepare batches."""
    micro_batch: int | None = None
    """Most samples of a batch at a time; their gradients add up to those of the whole batch."""
    report: Callable[[LogLine], None] = lambda line: None
    say: Callable[[str], None] = print
    """Called with a sentence about a damaged checkpoint."""
    validate: Callable[[nn.Module], float] | None = None
    """PSNR in dB of a network in evaluation mode on the validation crops."""


def train(model: UNet, batches: Batches, context: TrainingContext) -> list[LogLine]:
    """Train in place from the last good checkpoint, or from the start.

    Each process takes its share of every batch; the gradients add up to those of the whole batch, and the first process
    alone validates and writes. How a batch is shared changes rounding only.
    Returns the log: means over stretches of LOG_EVERY steps. Leaves the moving average in the model, if there is one.
    Raises RunError where the loss or the weights are not finite or the loss is not below DIVERGED, naming step and
    batch, with the last good checkpoint kept; and Interrupted, with a checkpoint written, once `stop()` is true.
    """
    loop = _Loop(model, batches, context)
    recipe, state, stop, world = loop.recipe, loop.state, context.stop, loop.world
    validated = validation_steps(recipe) if context.validate else frozenset()
    loop.start()
    with stop.saved_by(loop.keep):
        for step in range(state.done, recipe.steps):
            asked_to_stop = world.any(stop)
            for group in state.optimiser.param_groups:
                group["lr"] = learning_rate(recipe, step)
            state.optimiser.zero_grad(set_to_none=True)
            found = loop.gradients(step)
            if recipe.clip:
                clip_gradients(loop.parameters, recipe.clip)

            with stop.state:  # from here to the end of the block the state is that of no step
                loop.update(step, found)
                if state.done % LOG_EVERY == 0 or state.done == recipe.steps:
                    loop.log(step)
            if world.first and state.done in validated:
                loop.off_the_clock(loop.validate)
            if state.log and state.log[-1].step == state.done:
                context.report(state.log[-1])
            stopping = asked_to_stop() and state.done < recipe.steps
            if stopping or (state.done % recipe.checkpoint_every == 0 and state.done < recipe.steps):
                with stop.state:
                    message = loop.off_the_clock(loop.keep)
                if stopping:
                    raise Interrupted(message)
    loop.check(range(0))
    with torch.no_grad():
        for parameter, mean in zip(loop.parameters, state.average, strict=False):
            parameter.copy_(mean)
    if world.first:
        write_log(state.log, context.folder)
    return state.log


class _Loop:
    """What the steps of a training share."""

    def __init__(self, model: UNet, batches: Batches, context: TrainingContext) -> None:
        self.batches, self.context, self.recipe, device = batches, context, batches.recipe, context.device
        self.dtype = torch.float64 if self.recipe.precision == "float64" else torch.float32
        self.world: World = current()
        model.to(device, self.dtype).train()
        self.parameters = list(model.parameters())
        optimiser = torch.optim.AdamW(
            decay_groups(model, self.recipe.weight_decay),
            lr=self.recipe.lr, betas=self.recipe.betas, fused=self.recipe.fused,
        )  # fmt: skip
        average = [p.detach().clone() for p in self.parameters] if self.recipe.ema else []
        self.move_average = get_ema_multi_avg_fn(self.recipe.ema)
        self.state = TrainingState(model, optimiser, average, torch.zeros(2, device=device, dtype=self.dtype))
        self.losses = torch.zeros(LOG_EVERY, device=device, dtype=self.dtype)
        """Of the last steps: tells which one went wrong."""
        self.averaged: nn.Module | None = None
        """A copy of the network that holds the averaged weights while it is validated."""

    def start(self) -> None:
        """Load the last checkpoint, and prepare batches from there."""
        device, recipe = self.context.device, self.recipe
        self.state.resume(self.context.folder, self.context.say)
        self.network: nn.Module = torch.compile(self.state.model) if recipe.compile else self.state.model  # type: ignore[assignment]
        if self.world.size > 1:
            self.network = DistributedDataParallel(self.network, [device] if device.type == "cuda" else None)
        self.shares = pieces(self.world.share(recipe.batch), self.context.micro_batch)
        self.loader: Iterator[tuple[Tensor, Tensor]] = self.batches.from_step(
            self.state.done, self.context.workers, self.shares, pinned=device.type == "cuda"
        )
        self.queued = torch.cuda.Event() if device.type == "cuda" else None
        self.first, self.clock, self.waited = self.state.done, time.perf_counter(), 0.0

    def gradients(self, step: int) -> Tensor:
        """Add up the gradients of a step's batch. Returns its loss and squared error, [2], over all processes."""
        device, recipe = self.context.device, self.recipe
        found = torch.zeros_like(self.state.sums)
        for share in self.shares:
            degraded, clean = (images.to(device, self.dtype, non_blocking=True) for images in self._next_batch())
            seed_torch(derive(self.batches.seed, "step", step), device)  # for each piece: all draw as the whole batch
            with gradients_of(self.network, last=share is self.shares[-1]):
                with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                    restored = self.network(degraded)
                error = restored.to(self.dtype) - clean
                loss = loss_of(error, recipe)
                weight = len(share) / recipe.batch
                (loss * (weight * self.world.size)).backward()  # the processes' gradients are averaged, not added
            squared = torch.linalg.vector_norm(error.detach()).square() / error.numel()
            found += weight * torch.stack((loss.detach(), squared))
        return self.world.sum(found)

    def _next_batch(self) -> tuple[Tensor, Tensor]:
        if self.queued is not None:
            self.queued.record()
        asked = time.perf_counter()
        batch = next(self.loader)
        if self.queued is None or self.queued.query():  # else the device is still at work on what came before
            self.waited += time.perf_counter() - asked
        return batch

    def update(self, step: int, found: Tensor) -> None:
        """Change the weights by the gradients."""
        self.state.optimiser.step()
        if self.recipe.ema:
            self.move_average(self.state.average, self.parameters, None)
        self.losses[step % LOG_EVERY] = found[0]
        self.state.sums += found
        self.state.done = step + 1

    def log(self, step: int) -> None:
        """Add a line to the log. Raises RunError where a loss is not below DIVERGED."""
        state, done = self.state, self.state.done
        stretch = (done - 1) % LOG_EVERY + 1
        mean_loss, mse = (state.sums / stretch).tolist()  # waits for the device
        if not mean_loss < DIVERGED:
            self.check(range(done - stretch, done))
        now, steps = time.perf_counter(), done - self.first
        psnr = -10 * math.log10(mse) if mse else math.inf
        rate = learning_rate(self.recipe, step)
        seconds, waiting = (now - self.clock) / steps, self.waited / steps
        state.log.append(LogLine(done, mean_loss, psnr, rate, seconds, waiting))
        state.sums.zero_()
        self.first, self.clock, self.waited = done, now, 0.0

    def validate(self) -> None:
        """Score the validation crops with the averaged weights, and note the mean in the last line of the log."""
        assert self.context.validate is not None
        if self.averaged is None:
            self.averaged = copy.deepcopy(self.state.model)
        self.averaged.load_state_dict(self.state.model.state_dict())
        with torch.no_grad():
            for parameter, mean in zip(self.averaged.parameters(), self.state.average, strict=False):
                parameter.copy_(mean)
        psnr = self.context.validate(self.averaged.eval())
        self.state.log[-1] = self.state.log[-1]._replace(validation_psnr_db=psnr)

    def keep(self) -> str:
        """Write a checkpoint. Raises RunError where the state is not worth keeping."""
        state, folder = self.state, self.context.folder
        self.check(range(state.done - state.done % LOG_EVERY, state.done))
        if self.world.first:
            state.save(folder)
        return f"stopped at step {state.done} of {self.recipe.steps} of {folder.path.name}, saved"

    def check(self, steps: range) -> None:
        """Raises RunError where a loss of these steps is not below DIVERGED, or a weight is not finite."""
        folder, values = self.context.folder, self.losses.tolist()
        bad = next((step for step in steps if not values[step % LOG_EVERY] < DIVERGED), None)
        if bad is not None:
            places = self.batches.places(bad)
            crops = ", ".join(places[:16]) + (f" and {len(places) - 16} more" if len(places) > 16 else "")
            what = f"the loss is {values[bad % LOG_EVERY]:.4g} at step {bad}, on the crops {crops}"
        elif not torch.stack([p.isfinite().all() for p in self.parameters]).all():
            what = "weights are not finite, though every loss was"
        else:
            return
        kept = f"{folder.checkpoint} is kept" if folder.checkpoint.is_file() else "there was no checkpoint yet"
        raise RunError(f"training diverged: {what}; stopped, {kept}. A smaller recipe.lr or a longer warmup may help")

    def off_the_clock(self, work: Callable[[], T]) -> T:
        """Do work that is no part of a step's time."""
        paused = time.perf_counter()
        result = work()
        self.clock += time.perf_counter() - paused
        return result


def validation_steps(recipe: Recipe) -> frozenset[int]:
    """Steps after which the validation crops are scored: evenly spread, at lines of the log, the last step included."""
    count = recipe.validations
    wanted = (recipe.steps * number / count for number in range(1, count + 1))
    return frozenset(min(recipe.steps, LOG_EVERY * math.ceil(step / LOG_EVERY)) for step in wanted)


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
