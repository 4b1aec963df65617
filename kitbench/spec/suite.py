"""A suite, after presets and overrides: task, data, backbone, methods, recipe, protocol, seeds.

A suite (`kitbench/suites/*.toml`, or a file of the user's own) says what is compared: task, data, backbone, methods,
seeds. It names a recipe (how every method is trained) and a protocol (how every result is scored), which are separate
files; loading.py reads them. All objects are validated and frozen.
"""

from __future__ import annotations

import posixpath
import re
import tomllib
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from kitbench.spec.fields import Frozen, Mode, Setting, digest
from kitbench.spec.shipped import builtin
from kitbench.spec.tasks import Task, condition

LONGEST_NAME = 80
NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._+-]{{0,{LONGEST_NAME - 1}}}")
"""Of a suite or a method: files are named after it, in archives of runs too."""


ID = r"^[a-z0-9][a-z0-9-]*$"


def _protocol_id(name: object) -> object:
    if isinstance(name, str) and not re.match(ID, name):
        raise ValueError("a protocol's id consists of a to z, digits and -, and begins with a letter or digit")
    return name


class Protocol(Frozen):
    """How a result is scored. Rows of different protocols are never merged, averaged or compared."""

    id: Annotated[str, Field(pattern=ID), BeforeValidator(_protocol_id)]
    version: Annotated[int, Field(ge=1)]
    summary: str
    noise_seed: Literal["hash", "numpy0"]
    """hash: drawn from (data set, image, sigma). numpy0: NumPy's legacy generator, seed 0 before every image."""
    rounding: Literal["8bit", "8bit-truncated", "none"] = "8bit"
    """8bit: prediction clipped to [0, 1] and rounded to the nearest of 256 levels; 8bit-truncated: to the next lower
    one; none: clipped only."""
    border: Annotated[int, Field(ge=0, le=64)] = 0
    """Pixels cut from each side before scoring."""
    space: Literal["native", "y", "y-unrounded"] = "native"
    """native: all channels (RGB or gray) together; y: luma of MATLAB's rgb2ycbcr of 8-bit images, rounded to 8 bits;
    y-unrounded: of the same images converted to floating point. Where the prediction is not rounded, neither is y."""
    ssim: Literal["gaussian11", "matlab-rgb"] = "gaussian11"
    """gaussian11: 11 x 11 Gaussian window, sigma 1.5, valid region, each channel alone, then averaged. matlab-rgb:
    MATLAB's ssim of the RGB array as a volume, borders replicated."""
    shift: Annotated[int, Field(ge=0, le=16)] = 0
    """Scored at the integer shift of the prediction, up to this many pixels in each direction, with the best PSNR."""
    lpips: Literal["none", "alex", "squeeze", "vgg"] = "none"
    """LPIPS version 0.1 with this backbone; n/a, with the reason, where its weights are missing."""
    tile: Annotated[int, Field(ge=0)] = 0
    """0: whole images. Otherwise the side of square tiles, the same for every method."""
    overlap: Annotated[int, Field(ge=0)] = 0
    """Least overlap of neighbouring tiles, pixels."""
    placement: Literal["edge", "even"] = "edge"
    """edge: a tile every tile - overlap pixels, the last one moved back to end at the border. even: as many tiles as
    the overlap needs, at equal distances."""

    @model_validator(mode="after")
    def _tiles(self) -> Self:
        if self.tile and not (self.tile >= 32 and self.overlap <= self.tile // 2):
            raise ValueError(
                f"tile {self.tile} with overlap {self.overlap}: tile must be at least 32 and overlap at most half"
            )
        return self

    @property
    def stamp(self) -> str:
        """`id.vN`, followed by a hash where a key differs from the shipped protocol of that id."""
        stamp = f"{self.id}.v{self.version}"
        shipped = builtin("protocols").get(self.id)
        if shipped is not None and Protocol.model_validate(tomllib.loads(shipped)) == self:
            return stamp
        keys = self.model_dump(exclude={"id", "version", "summary"})
        if self.placement == "edge":  # what was done before this key existed: older stamps stay
            del keys["placement"]
        return f"{stamp}+{digest(keys)[:6]}"


def _set_name(name: str) -> str:
    """The path of a folder of pictures, which contains a slash, in one spelling: `./photos`; other names unchanged."""
    if "/" not in name:
        return name
    path = posixpath.normpath(name)
    return path if "/" in path else f"./{path}"


SetName = Annotated[str, AfterValidator(_set_name)]


class SetNames(Frozen):
    """Data sets, by name or by the path of a folder of pictures: for training (used together), for test (reported one
    by one)."""

    train: Annotated[tuple[SetName, ...], Field(min_length=1)]
    test: Annotated[tuple[SetName, ...], Field(min_length=1)]
    validation: tuple[SetName, ...] = ()
    """Those that learning curves and the tuning of learning rates are measured on; neither trained on nor reported."""
    protocol: Protocol | None = None
    """How these sets are scored, where not by the suite's own protocol."""


class Source(Frozen):
    """The data sets for each colour mode; `modes` are the colour modes that are run."""

    modes: Annotated[tuple[Mode, ...], Field(min_length=1)]
    colour: SetNames | None = None
    gray: SetNames | None = None

    @model_validator(mode="after")
    def _described(self) -> Self:
        for mode in self.modes:
            if getattr(self, mode) is None:
                raise ValueError(f"modes names {mode!r}, but there is no table {mode!r} that lists its sets")
        return self


class Data(Frozen):
    """`embedded` needs no download; `folder` is used instead when `--data DIR` or KITBENCH_DATA names one."""

    embedded: Source
    folder: Source


class Backbone(Frozen):
    """The U-shaped network that every method shares; only the attention inside it differs."""

    width: Annotated[int, Field(ge=4, le=512)]
    """Channels of level 1; doubled at every further level."""
    blocks: Annotated[tuple[Annotated[int, Field(ge=1, le=32)], ...], Field(min_length=1, max_length=6)]
    """Blocks at each level; the last level is the lowest, the others stand in the encoder and in the decoder."""
    head_dim: Annotated[int, Field(ge=4, le=256)] = 32
    """Channels of a head; the lowest level of width C has C / head_dim heads."""
    attention_levels: tuple[Annotated[int, Field(ge=1, le=6)], ...]
    """Levels (1 = full resolution) whose blocks hold the attention; the blocks of others are feed-forward only."""
    ffn_ratio: Annotated[int, Field(ge=1, le=8)] = 4

    @model_validator(mode="after")
    def _levels_exist(self) -> Self:
        beyond = [level for level in self.attention_levels if level > len(self.blocks)]
        if beyond:
            raise ValueError(
                f"attention_levels names level {beyond[0]}, but blocks describes {len(self.blocks)} levels"
            )
        if list(self.attention_levels) != sorted(set(self.attention_levels)):
            raise ValueError(
                f"attention_levels must name each level once, in rising order, found {list(self.attention_levels)}"
            )
        for level in range(len(self.blocks)):
            width = self.width << level
            if width % max(1, width // self.head_dim):
                raise ValueError(f"level {level + 1} has {width} channels, not a multiple of head_dim {self.head_dim}")
        return self


class RecipeCard(Frozen):
    """What to expect of a recipe before starting it."""

    summary: str
    hardware: str
    time: str
    score: str


class Recipe(Frozen):
    """How every method of a suite is trained."""

    name: str
    card: RecipeCard
    steps: Annotated[int, Field(ge=1, le=10_000_000)]
    batch: Annotated[int, Field(ge=1, le=4096)]
    """Crops of a step, over all devices together."""
    crop: Annotated[int, Field(ge=16, le=4096)]
    """Side of the square training crop, pixels."""
    optimiser: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0, le=1)]
    lr_min: Annotated[float, Field(ge=0, le=1)] = 1e-6
    warmup: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up before the cosine from lr to lr_min."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest gradient norm; 0 clips nothing."""
    loss: Literal["charbonnier", "l1", "l2"] = "charbonnier"
    charbonnier_epsilon: Annotated[float, Field(gt=0, le=1)] = 1e-3
    augment: bool = True
    """Each crop is flipped and turned by a multiple of 90 degrees at random (8 orientations)."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay per step of a moving average of the weights, which is then stored and scored; 0: none."""
    precision: Literal["float32", "bf16", "float64"] = "float32"
    """bf16: autocast. float64: trained in double precision, kept and scored in float32."""
    tf32: bool = False
    """CUDA may round the factors of float32 products and convolutions to 10 bits of mantissa."""
    channels_last: bool = True
    """Memory format of feature maps and kernels."""
    compile: bool = False
    """Train through torch.compile."""
    fused: bool = True
    """One kernel for the optimiser's step."""
    deterministic: bool = True
    init: str | None = None
    """Fine-tuning: the run whose trained weights training starts from, by its folder or the first digits of its hash.
    The key has the weights' checksum. None: weights drawn from the seed."""
    threads: Annotated[int, Field(ge=1, le=256)] | None = 1
    """CPU threads of the process that trains and scores: the order of a sum, and so its last bits, depend on them.
    None: not fixed, as in runs made before this key existed."""
    validations: Annotated[int, Field(ge=0, le=1000)] = 8
    """How often during training the validation crops are scored; decides no number but the curve."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 500
    """Steps between checkpoints; does not change any number."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        if self.warmup >= self.steps:
            raise ValueError(
                f"warmup ({self.warmup}) must be shorter than steps ({self.steps}); set recipe.warmup lower too"
            )
        if self.lr < self.lr_min:
            raise ValueError(f"lr ({self.lr:g}) is below lr_min ({self.lr_min:g}), to which it falls; set both")
        return self


class Method(Frozen):
    """A method of the suite: the attention in the shared backbone, and its settings."""

    attention: str
    """A shipped name, or a path to a Python file with a class `Attention`."""
    settings: Mapping[str, Setting] = Field(default_factory=dict)
    own: Mapping[str, Setting] = Field(default_factory=dict)
    """The settings before `--set`."""


class Suite(Frozen):
    """A comparison, with preset and overrides applied, recipe and protocol read."""

    name: str
    title: str
    preset: str
    task: Task
    data: Data
    backbone: Backbone
    methods: dict[str, Method]
    references: tuple[str, ...] = ()
    """Training-free methods, whose rows stand beside the trained ones."""
    recipe: Recipe
    protocol: Protocol
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31, strict=True)], ...], Field(min_length=1)]

    @property
    def stamps(self) -> list[str]:
        """Of all protocols that the suite may score by, its own first."""
        sources = (self.data.embedded, self.data.folder)
        own = [sets.protocol for source in sources for sets in (source.colour, source.gray) if sets and sets.protocol]
        return list(dict.fromkeys(protocol.stamp for protocol in (self.protocol, *own)))

    @model_validator(mode="after")
    def _compares_something(self) -> Self:
        if not self.methods and not self.references:
            raise ValueError("neither methods nor references name anything to run")
        for name in (self.name, *self.methods):
            if not NAME.fullmatch(name):
                shown = name if len(name) <= LONGEST_NAME else f"{name[:20]}..."
                raise ValueError(
                    f"{shown!r} cannot name a suite or a method, as files are named after it; give at most "
                    f"{LONGEST_NAME} letters of A to Z, digits and . _ + -, and begin with a letter or digit"
                )
        if self.methods and not self.backbone.attention_levels:
            raise ValueError("backbone.attention_levels is empty, and all methods would be one network; name a level")
        for key, values in (("seeds", self.seeds), ("references", self.references)):
            if len(set(values)) != len(values):
                raise ValueError(f"{key} must differ from one another, found {list(values)}")
        if len(set(map(condition, self.task.conditions))) != len(self.task.conditions):  # files are named after it
            raise ValueError(
                f"noise levels of sigma_test must differ in six digits, found {list(self.task.conditions)}"
            )
        return self
