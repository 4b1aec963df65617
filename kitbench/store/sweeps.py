"""scale.json: a sweep of cost against resolution, as stored."""

from __future__ import annotations

from typing import Literal

from kitbench.spec.fields import Frozen, Setting
from kitbench.store.records import Environment
from kitbench.text import counted

What = Literal["infer", "train"]
Scope = Literal["attention", "block", "model"]
Outcome = Literal["oom", "timeout", "killed", "failed"]
Status = Literal["measured", "predicted"] | Outcome

BRACKET = "not asked for: brackets the largest side within the budget"
"""The `reason` of a point that was predicted to find the largest image within the budget."""


class Point(Frozen):
    """One method at one size, inference or training step: its cost, and whether that was measured or predicted."""

    method: str
    what: What
    size: int
    status: Status
    reason: str | None = None
    """Why it was not measured, or not completely."""
    macs: int
    """Counted multiply-adds of one call on fake tensors; of a training step forward and backward."""
    macs_closed: int | None
    """Closed form of the forward pass; None where the method states none."""
    macs_needed: int | None = None
    """What the definition needs of the forward pass, where the implementation executes more."""
    macs_note: str | None = None
    """Set where closed form and forward count differ by more than 1 %."""
    comparisons: int
    exponentials: int
    gathered_bytes: int
    raw_bytes: int
    """Peak bytes predicted on fake tensors."""
    predicted_bytes: int
    """The same, corrected by what both of the next two smaller sizes measured beyond their own."""
    peak_bytes: int | None = None
    """Measured peak of allocated bytes, above module and input."""
    reserved_bytes: int | None = None
    """CUDA: measured peak of reserved bytes, above what was reserved before."""
    resident_bytes: int | None = None
    """CPU: peak resident set of a fresh process, where it was cross-checked."""
    seconds: float | None = None
    """Median of one call."""
    quartiles: tuple[float, float] | None = None
    rounds: int = 0
    dropped: int = 0
    noisy: bool = False

    @property
    def bytes(self) -> int:
        """Measured peak where there is one, else the predicted."""
        return self.predicted_bytes if self.peak_bytes is None else self.peak_bytes


class Sweep(Frozen):
    """scale.json: the points of one command on one machine."""

    schema_version: Literal[1] = 1
    key: str
    """Digest of everything that determines the points; a sweep with another key starts from the beginning."""
    scope: Scope
    dim: int
    heads: int
    device: str
    threads: int
    memory_limit: int
    budget: int
    methods: dict[str, tuple[str, dict[str, Setting]]]
    """By label: the method's name or file, and its settings."""
    environment: Environment
    points: tuple[Point, ...] = ()

    @property
    def subject(self) -> str:
        """What was swept: `attention alone, 32 channels, 2 heads`."""
        if self.scope == "model":  # its channels are those of the suite's backbone
            return "the whole network of the suite denoise"
        part = {"attention": "attention alone", "block": "one block"}[self.scope]
        return f"{part}, {self.dim} channels, {counted(self.heads, 'head')}"

    def curve(self, method: str, what: What) -> list[Point]:
        """The points of one method, by size."""
        return sorted((p for p in self.points if (p.method, p.what) == (method, what)), key=lambda p: p.size)
