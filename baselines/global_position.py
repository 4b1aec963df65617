"""Global attention that knows positions: a depth-wise convolution of the tokens before it.

Paper: "Conditional Positional Encodings for Vision Transformers" (Chu et al., ICLR 2023), whose position
    encoding generator this is.
Question: does global attention (baselines/global_.py) lose to local methods because it knows no position?
Operator: the tokens plus their depth-wise s x s convolution with zero padding, by which a position knows its
    surroundings and the border of the image; then global attention over all H W positions.  It serves any resolution.
Cost: s^2 H W C beside that of global attention, 4 H W C^2 + 2 (H W)^2 C.
Parameters: (s^2 + 1) C of the convolution beside those of global attention.
Departures: in every block, where the paper has it once, after the first; before the projections of the attention and
    inside its residual, where the paper adds it to the stream between two blocks.
"""

from __future__ import annotations

from typing import Literal

from kitbench.baselines import global_
from torch import Tensor, nn


class Attention(nn.Module):
    """Global attention with a positional convolution: [B, H, W, C] tokens -> [B, H, W, C].

    kernel: odd side s of the convolution.  form: as in global attention.  Raises ValueError for settings out of range.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        shift: bool = False,
        form: Literal["sdpa", "materialised"] = "sdpa",
        kernel: int = 3,
    ) -> None:
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and positive, but is {kernel}")
        super().__init__()
        self.dim, self.kernel = dim, kernel
        self.attend = global_.Attention(dim, heads, form=form)
        self.position = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attend(x + self.position(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return y

    def macs(self, height: int, width: int) -> int:
        """Multiply-adds of one forward pass of one image."""
        attention: int = self.attend.macs(height, width)
        return attention + height * width * self.kernel**2 * self.dim
