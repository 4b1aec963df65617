"""The U-shaped network that every method shares: only the attention inside its blocks differs.

Our reading of KiT's architecture, close to Uformer's: a 3x3 convolution at input and output, 4x4 stride-2 convolutions
down, 2x2 transposed convolutions up, skips by concatenation and a 1x1 convolution, a global residual. A block is
x + attention(norm(x)), then x + LeFF(norm(x)); levels outside `attention_levels` have only the second part.
Feature maps are [B, C, H, W] in channels-last memory, so that an attention's [B, H, W, C] is a view.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kitbench.model.methods import Loaded
from kitbench.spec.suite import Backbone


class LeFF(nn.Module):
    """Locally-enhanced feed-forward (Uformer, CVPR 2022): linear, 3x3 depth-wise convolution, linear. [B, H, W, C]."""

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.hidden = dim * ratio
        self.expand = nn.Linear(dim, self.hidden)
        self.depthwise = nn.Conv2d(self.hidden, self.hidden, 3, padding=1, groups=self.hidden)
        self.reduce = nn.Linear(self.hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.expand(x))
        x = self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y: Tensor = self.reduce(F.gelu(x))
        return y

    def macs(self, height: int, width: int) -> int:
        """2 C h for the linear maps and 9 h for the depth-wise convolution, a position."""
        return height * width * self.hidden * (2 * self.expand.in_features + 9)


class Block(nn.Module):
    """x + attention(norm(x)), where there is one; then x + LeFF(norm(x)). [B, C, H, W] to the same."""

    def __init__(self, dim: int, attention: nn.Module | None, ratio: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(dim) if attention is not None else None
        self.attention = attention
        self.norm_ffn = nn.LayerNorm(dim)
        self.ffn = LeFF(dim, ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        if self.attention is not None and self.norm_attention is not None:
            x = x + self.attention(self.norm_attention(x))
        x = x + self.ffn(self.norm_ffn(x))
        return x.permute(0, 3, 1, 2)


class UNet(nn.Module):
    """The shared backbone with one method's attention in it; [B, channels, H, W] in [0, 1] to the same, any H and W.

    Every parameter that two methods share starts from the same value: each module is initialised from a seed hashed
    from (seed, its name), so that one block's attention does not influence the initial weights of another block.
    """

    def __init__(self, channels: int, config: Backbone, method: Loaded, settings: dict[str, Any], seed: int) -> None:
        super().__init__()
        self.config = config
        depth = len(config.blocks)
        widths = [config.width << level for level in range(depth)]
        with torch.random.fork_rng(devices=[]):
            self.head = nn.Conv2d(channels, widths[0], 3, padding=1)
            self.down = nn.ModuleList(nn.Conv2d(w, 2 * w, 4, stride=2, padding=1) for w in widths[:-1])
            self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in widths[:-1])
            self.join = nn.ModuleList(nn.Conv2d(2 * w, w, 1) for w in widths[:-1])
            self.tail = nn.Conv2d(widths[0], channels, 3, padding=1)

            def stage(name: str, level: int, first: int) -> nn.Sequential:
                """The blocks of a level; `first` is the number of blocks that the level has had before."""
                dim, blocks, before = widths[level], [], None
                for number in range(config.blocks[level]):
                    attention = None
                    if level + 1 in config.attention_levels:
                        torch.manual_seed(_seed(seed, f"{name}.{number}.attention"))
                        attention = method.build(dim, heads(config, level), (first + number) % 2 == 1, **settings)
                        if before is not None and hasattr(attention, "follow"):
                            attention.follow(before)  # type: ignore[operator]
                        before = attention
                    blocks.append(Block(dim, attention, config.ffn_ratio))
                return nn.Sequential(*blocks)

            self.encoder = nn.ModuleList(stage(f"encoder.{i}", i, 0) for i in range(depth - 1))
            self.bottom = stage("bottom", depth - 1, 0)
            self.decoder = nn.ModuleList(stage(f"decoder.{i}", i, config.blocks[i]) for i in range(depth - 1))
            for name, module in self.named_modules():
                reset = getattr(module, "reset_parameters", None)
                if reset is not None and ".attention" not in name:
                    torch.manual_seed(_seed(seed, name))
                    reset()
            # The untrained network returns its input, so that training need not first remove a random residual.
            nn.init.zeros_(self.tail.weight)
            assert self.tail.bias is not None
            nn.init.zeros_(self.tail.bias)
        self.lay_out(torch.channels_last)

    def lay_out(self, memory_format: torch.memory_format) -> None:
        """Set the memory format of kernels and feature maps; it changes rounding only."""
        self.memory_format = memory_format
        self.to(memory_format=memory_format)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        padded = pad(x, 1 << (len(self.config.blocks) - 1)).contiguous(memory_format=self.memory_format)
        f, skips = self.head(padded), []
        for stage, down in zip(self.encoder, self.down, strict=True):
            f = stage(f)
            skips.append(f)
            f = down(f)
        f = self.bottom(f)
        for stage, up, join, skip in reversed(list(zip(self.decoder, self.up, self.join, skips, strict=True))):
            f = stage(join(torch.cat([up(f), skip], dim=1)))
        restored: Tensor = padded + self.tail(f)
        return restored[..., :height, :width]

    def attentions(self) -> Iterator[tuple[str, nn.Module]]:
        """Name and module of every attention inside."""
        for name, module in self.named_modules():
            if isinstance(module, Block) and module.attention is not None:
                yield f"{name}.attention", module.attention

    def macs(self, height: int, width: int) -> int | None:
        """Closed form: multiply-adds of one forward of one image; None where the attention states no closed form."""
        stride = 1 << (len(self.config.blocks) - 1)
        height, width = -(-height // stride) * stride, -(-width // stride) * stride
        channels, base = self.head.in_channels, self.config.width
        total = 2 * height * width * 9 * channels * base  # head and tail
        for level, stages in enumerate(self._stages()):
            h, w, dim = height >> level, width >> level, base << level
            for block in stages:
                total += block.ffn.macs(h, w)
                if block.attention is not None:
                    closed_form = getattr(block.attention, "macs", None)
                    if closed_form is None:
                        return None
                    total += closed_form(h, w)
            if level + 1 < len(self.config.blocks):
                # down: 16 C 2C at a quarter of the positions; up: 2C C at every one; join: 2C C
                total += h * w * dim * dim * (8 + 2 + 2)
        return total

    def needed_macs(self, height: int, width: int) -> int | None:
        """As `macs`, with what the attention's definition needs where its implementation executes more; None: no more.

        An attention states it by a method `needed_macs(height, width)`.
        """
        stride = 1 << (len(self.config.blocks) - 1)
        excess = 0
        for level, stages in enumerate(self._stages()):
            h, w = (-(-side // stride) * stride >> level for side in (height, width))
            for block in stages:
                needed = getattr(block.attention, "needed_macs", None)
                if block.attention is not None and needed is not None:
                    excess += block.attention.macs(h, w) - needed(h, w)  # type: ignore[operator]
        executed = self.macs(height, width)
        return executed - excess if executed is not None and excess else None

    def _stages(self) -> Iterator[list[Block]]:
        for encoder, decoder in zip(self.encoder, self.decoder, strict=True):
            yield [block for stage in (encoder, decoder) for block in _blocks(stage)]
        yield _blocks(self.bottom)


def _blocks(stage: nn.Module) -> list[Block]:
    return [block for block in stage.children() if isinstance(block, Block)]


def heads(config: Backbone, level: int) -> int:
    """Heads at a level (0 = full resolution)."""
    return max(1, (config.width << level) // config.head_dim)


def attention_levels(config: Backbone, crop: int) -> dict[int, tuple[int, int, int]]:
    """(channels, heads, side of the map in training) of each level (1 = full resolution) that holds the attention."""
    return {
        level: (config.width << (level - 1), heads(config, level - 1), max(1, crop >> (level - 1)))
        for level in sorted(set(config.attention_levels))
    }


def pad(x: Tensor, multiple: int) -> Tensor:
    """Pad [B, C, H, W] at the bottom and right to the next multiple: by reflection; where too thin, by the edge."""
    bottom, right = -x.shape[-2] % multiple, -x.shape[-1] % multiple
    if not (bottom or right):
        return x
    mode = "reflect" if bottom < x.shape[-2] and right < x.shape[-1] else "replicate"
    return F.pad(x, (0, right, 0, bottom), mode=mode)


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/init/{name}".encode(), digest_size=7).digest())
