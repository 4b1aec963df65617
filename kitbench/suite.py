"""What people write: suites, recipes and protocols, as validated frozen objects.

A suite (`kitbench/suites/*.toml`, or a file of the user's own) says what is compared: task, data, backbone, methods,
seeds. It names a recipe (how every method is trained) and a protocol (how every result is scored), which are files of
their own. Presets inside the suite change some of its keys; `--set key=value` changes single ones. Unknown keys are
refused everywhere, with the nearest known one. This room knows nothing of torch: reading a suite is instant.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kitbench.errors import InputError, nearest

Mode = Literal["colour", "gray"]
Setting = bool | int | float | str
M = TypeVar("M", bound=BaseModel)


class Frozen(BaseModel):
    """Validated once, never changed; a key that is not declared is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Grey = Annotated[float, Field(ge=0, le=255)]
Pixels = Annotated[float, Field(gt=0, le=64)]
Degrees = Annotated[float, Field(ge=-90, le=90)]
Share = Annotated[float, Field(ge=0, le=1)]


class Ranges(Frozen):
    """A task whose keys are ranges [low, high]: a value is drawn between them for every crop and every test image."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for key, value in self:
            if isinstance(value, tuple) and key != "sigma_test" and value[0] > value[1]:
                raise ValueError(f"{key} must be [low, high], found {list(value)}")
        return self

    @property
    def conditions(self) -> tuple[float | None, ...]:
        """What every test set is scored at: noise levels, or None where a set has one condition."""
        return (None,)


def condition(sigma: float | None) -> str:
    """What stands behind a test set's name: `σ25`, or nothing where a task has one condition."""
    return "" if sigma is None else f"σ{sigma:g}"


class Denoise(Ranges):
    """Additive white Gaussian noise, sigma in 8-bit grey levels (0..255)."""

    kind: Literal["denoise"]
    sigma_train: tuple[Grey, Grey]
    """Each training crop draws its sigma uniformly between these two; equal ends train for one sigma."""
    sigma_test: Annotated[tuple[Annotated[float, Field(gt=0, le=255)], ...], Field(min_length=1)]

    @property
    def conditions(self) -> tuple[float | None, ...]:
        return self.sigma_test


class Deblur(Ranges):
    """Camera shake: a kernel that follows a random trajectory, then noise (kitbench/data/degrade.py)."""

    kind: Literal["deblur"]
    length: tuple[Pixels, Pixels]
    """Length of the trajectory, pixels."""
    sigma: tuple[Grey, Grey]
    """White Gaussian noise behind the blur, in 8-bit grey levels."""


class Derain(Ranges):
    """Rain streaks added to the scene (kitbench/data/degrade.py)."""

    kind: Literal["derain"]
    density: tuple[Share, Share]
    """Streaks begun per pixel."""
    length: tuple[Pixels, Pixels]
    """Of a streak, pixels."""
    width: tuple[Pixels, Pixels]
    """Of a streak (standard deviation of its Gaussian profile), pixels."""
    angle: tuple[Degrees, Degrees]
    """Of an image's rain, degrees from the vertical."""
    strength: tuple[Share, Share]
    """Brightness of a streak, as a share of white."""


class RealNoise(Ranges):
    """Noise of a camera: Poisson and Gaussian in linear light, behind a colour mosaic (kitbench/data/degrade.py)."""

    kind: Literal["denoise-real"]
    shot: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]]
    """Variance per unit of light, drawn uniformly in its logarithm; the read noise follows from it."""
    mosaic: bool = True
    """Every pixel sees one colour; the noise is interpolated as a bilinear demosaicing does."""


Task = Annotated[Denoise | Deblur | Derain | RealNoise, Field(discriminator="kind")]
Kind = Literal["denoise", "deblur", "derain", "denoise-real"]


class Protocol(Frozen):
    """How a result is scored. Rows of different protocols are never merged, averaged or compared."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    version: Annotated[int, Field(ge=1)]
    summary: str
    noise_seed: Literal["hash", "numpy0"]
    """hash: drawn from (data set, image, sigma). numpy0: NumPy's legacy generator, seed 0 before every image."""
    rounding: Literal["8bit", "none"] = "8bit"
    """8bit: prediction clipped to [0, 1] and rounded to the nearest of 256 levels; none: clipped only."""
    border: Annotated[int, Field(ge=0, le=64)] = 0
    """Pixels cut from each side before scoring."""
    space: Literal["native", "y"] = "native"
    """native: all channels (RGB or gray) together; y: luma of MATLAB's rgb2ycbcr."""
    ssim: Literal["gaussian11", "matlab-rgb"] = "gaussian11"
    """gaussian11: 11 x 11 Gaussian window, sigma 1.5, valid region, each channel alone, then averaged. matlab-rgb:
    MATLAB's ssim of the RGB array as a volume, borders replicated."""
    shift: Annotated[int, Field(ge=0, le=16)] = 0
    """Compared at the integer shift of the prediction, up to so many pixels each way, that gives the best PSNR."""
    lpips: Literal["none", "alex", "squeeze", "vgg"] = "none"
    """LPIPS version 0.1 with this backbone; n/a, with the reason, where its weights are missing."""
    tile: Annotated[int, Field(ge=0)] = 0
    """0: whole images. Else square tiles of this side, alike for every method."""
    overlap: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _tiles(self) -> Self:
        if self.tile and not (self.tile >= 32 and self.overlap <= self.tile // 2):
            raise ValueError(
                f"tile {self.tile} with overlap {self.overlap}: tile must be at least 32 and overlap at most half"
            )
        return self

    @property
    def stamp(self) -> str:
        """`id.vN`, with a hash behind it where a key differs from the shipped protocol of that id."""
        stamp = f"{self.id}.v{self.version}"
        shipped = _builtin("protocols").get(self.id)
        if shipped is not None and Protocol.model_validate(tomllib.loads(shipped)) == self:
            return stamp
        return f"{stamp}+{digest(self.model_dump(exclude={'id', 'version', 'summary'}))[:6]}"


class Sets(Frozen):
    """Names of data cards: those trained on (together) and those reported (one by one)."""

    train: Annotated[tuple[str, ...], Field(min_length=1)]
    test: Annotated[tuple[str, ...], Field(min_length=1)]
    protocol: Protocol | None = None
    """How these are scored, where the suite's own protocol does not fit them."""


class Source(Frozen):
    """The sets of a source of images, a choice per colour mode; `modes` are those that a run uses."""

    modes: Annotated[tuple[Mode, ...], Field(min_length=1)]
    colour: Sets | None = None
    gray: Sets | None = None

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
        for level in range(len(self.blocks)):
            width = self.width << level
            if width % max(1, width // self.head_dim):
                raise ValueError(f"level {level + 1} has {width} channels, not a multiple of head_dim {self.head_dim}")
        return self


class RecipeCard(Frozen):
    """What somebody should know before starting the recipe."""

    summary: str
    hardware: str
    time: str
    score: str


class Recipe(Frozen):
    """How every method is trained, without exception."""

    name: str
    card: RecipeCard
    steps: Annotated[int, Field(ge=1, le=10_000_000)]
    batch: Annotated[int, Field(ge=1, le=4096)]
    """Crops a step, over all devices."""
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
    """Decay per step of a moving average of the weights, which is then what is kept and scored; 0: none."""
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
    checkpoint_every: Annotated[int, Field(ge=1)] = 500
    """Steps between checkpoints; decides no number."""

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup >= self.steps:
            raise ValueError(f"warmup ({self.warmup}) must be shorter than steps ({self.steps})")
        return self


class Method(Frozen):
    """An attention and its settings: what a method of the suite puts into the shared backbone."""

    attention: str
    """A shipped name, or a path to a Python file with a class `Attention`."""
    settings: Mapping[str, Setting] = Field(default_factory=dict)


class Suite(Frozen):
    """A comparison, resolved: preset and overrides applied, recipe and protocol read."""

    name: str
    title: str
    preset: str
    task: Task
    data: Data
    backbone: Backbone
    methods: Annotated[dict[str, Method], Field(min_length=1)]
    references: tuple[str, ...]
    recipe: Recipe
    protocol: Protocol
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(min_length=1)]

    @property
    def stamps(self) -> list[str]:
        """Of all protocols that the suite may score by, its own first."""
        sources = (self.data.embedded, self.data.folder)
        own = [sets.protocol for source in sources for sets in (source.colour, source.gray) if sets and sets.protocol]
        return list(dict.fromkeys(protocol.stamp for protocol in (self.protocol, *own)))

    @model_validator(mode="after")
    def _seeds_differ(self) -> Self:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must differ from one another, found {list(self.seeds)}")
        return self


def digest(value: object) -> str:
    """SHA-256 (hex) of the canonical JSON of a value made of dicts, lists, strings, numbers and None."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _builtin(kind: Literal["suites", "recipes", "protocols"]) -> Mapping[str, str]:
    """Texts of the shipped files of a kind, by name."""
    files = sorted(resources.files(f"kitbench.{kind}").iterdir(), key=lambda file: file.name)
    return {file.name.removesuffix(".toml"): file.read_text("utf-8") for file in files if file.name.endswith(".toml")}


def suite_names() -> list[str]:
    """Names of the shipped suites."""
    return list(_builtin("suites"))


def recipes() -> list[Recipe]:
    """The shipped recipes."""
    return [parse(Recipe, tomllib.loads(text), f"recipe {name}") for name, text in _builtin("recipes").items()]


def protocols() -> list[Protocol]:
    """The shipped protocols."""
    return [parse(Protocol, tomllib.loads(text), f"protocol {name}") for name, text in _builtin("protocols").items()]


def read_toml(name: str, kind: Literal["suites", "recipes", "protocols"], base: Path) -> dict[str, Any]:
    """A shipped file by its name, or the user's own by its path (relative to `base`). Raises InputError."""
    what = kind.removesuffix("s")
    if name.endswith(".toml"):
        path = base / name
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{what} file {path} cannot be read ({error}); give a readable TOML file.") from error
    elif name in _builtin(kind):
        path, text = Path(f"{name}.toml"), _builtin(kind)[name]
    else:
        raise InputError(f"Unknown {what} {name!r}; {nearest(name, _builtin(kind))} A file's name must end in .toml.")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{what} file {path} is not valid TOML: {error}.") from error


def load(
    name: str,
    preset: str | None = None,
    overrides: Sequence[str] = (),
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> Suite:
    """A suite by name or path, with its preset, `key=value` overrides, and `--method`, `--seeds` choices applied.

    Raises InputError for anything unknown or out of range, in one sentence.
    """
    base = Path(name).parent if name.endswith(".toml") else Path()
    raw = read_toml(name, "suites", base)
    label = raw.get("name", name)
    presets = raw.pop("presets", {})
    default = raw.pop("default_preset", None)
    preset = preset or default
    if not isinstance(presets, dict) or not isinstance(preset, str) or preset not in presets:
        raise InputError(f"Suite {label!r} has no preset {preset!r}; {nearest(str(preset), presets)}")
    if not isinstance(presets[preset], dict):
        raise InputError(
            f"In suite {label}: preset {preset} must be a table of changed keys, found {presets[preset]!r}."
        )
    raw = _merge(raw, presets[preset])
    raw["preset"] = preset
    for kind in ("recipe", "protocol"):
        raw[kind] = _resolve(raw.get(kind), kind, base)
    _resolve_protocols(raw, base)
    raw["methods"] = {
        key: value | {"attention": _beside(value.get("attention", key), base)}
        for key, value in _tables(raw.get("methods", {}), label).items()
    }
    if methods:
        raw["methods"] = dict(_chosen(method, raw["methods"], label) for method in methods)
    for override in overrides:
        _set(raw, override, base)
    # In TOML a method's settings stand beside its `attention`; here they are a table of their own.
    raw["methods"] = {
        key: {"attention": value["attention"], "settings": {k: v for k, v in value.items() if k != "attention"}}
        for key, value in raw["methods"].items()
    }
    if seeds:
        raw["seeds"] = list(seeds)
    _resolve_protocols(raw, base)
    return parse(Suite, raw, f"suite {label}")


def parse(model: type[M], raw: object, where: str) -> M:
    """Validate `raw`, turning pydantic's report into one sentence. Raises InputError."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise InputError(_sentence(model, error, where)) from error


def _sentence(model: type[BaseModel], error: ValidationError, where: str) -> str:
    """The first fault of a validation report, with its place, what was found and what was expected."""
    # An unknown key is told before the key that is missing for it.
    faults = sorted(error.errors(include_url=False), key=lambda fault: fault["type"] != "extra_forbidden")
    fault = faults[0]
    owner, parts = _walk(model, [str(part) for part in fault["loc"]])
    place = ".".join(parts)
    if fault["type"] == "extra_forbidden":
        return f"In {where}: unknown key {place!r}; {nearest(parts[-1], owner.model_fields if owner else ())}"
    if fault["type"] == "missing":
        return f"In {where}: the key {place!r} is missing; add it."
    if fault["type"].startswith("union_tag"):
        kinds = ", ".join(get_args(Kind))
        return f"In {where}: {place}.kind is {fault['input'].get('kind')!r}; give one of {kinds}."
    message = fault["msg"].removeprefix("Value error, ")
    at = (
        f"{place} is {fault['input']!r}: "
        if place and not isinstance(fault["input"], dict)
        else f"{place}: "
        if place
        else ""
    )
    return f"In {where}: {at}{message[0].lower()}{message[1:]}."


def _walk(model: type[BaseModel] | None, path: Sequence[str]) -> tuple[type[BaseModel] | None, list[str]]:
    """The model that describes the table holding the last key of a report's path, and the path as people write it.

    None where keys are free (methods' settings). A report names the chosen member of a union behind the union's key.
    """
    owner, parts, rest = model, [], list(path)
    while rest:
        part = rest.pop(0)
        parts.append(part)
        owner = model
        if model is None or part not in model.model_fields:
            model = None
            continue
        model = _model_of(model.model_fields[part].annotation, rest[0] if rest else None)
        if rest and model is not None and _tag(model) == rest[0]:
            rest.pop(0)
    return owner, parts


def _tag(model: type[BaseModel]) -> str | None:
    """The `kind` that chooses this member of a union; None for other models."""
    field = model.model_fields.get("kind")
    return get_args(field.annotation)[0] if field and get_origin(field.annotation) is Literal else None


def _model_of(annotation: Any, tag: object = None) -> type[BaseModel] | None:
    """The model in an annotation; of several, the one with this tag, or the first."""
    if get_origin(annotation) in (UnionType, Union):
        found = [m for m in map(_model_of, get_args(annotation)) if m]
        return next((m for m in found if _tag(m) == tag), found[0] if found else None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _merge(base: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `change` laid over it, table by table; lists and values are replaced."""
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _resolve(value: object, kind: Literal["recipe", "protocol"], base: Path) -> object:
    """A recipe or protocol named by a string is read; `{from = NAME, key = value}` changes some of its keys."""
    plural: Literal["recipes", "protocols"] = "recipes" if kind == "recipe" else "protocols"
    if isinstance(value, str):
        return read_toml(value, plural, base)
    if isinstance(value, dict) and isinstance(value.get("from"), str):
        changes = {key: change for key, change in value.items() if key != "from"}
        return _merge(read_toml(value["from"], plural, base), changes)
    return value


def _resolve_protocols(raw: dict[str, Any], base: Path) -> None:
    """Read the protocols that single modes of the data name, in place."""
    sources = raw.get("data")
    for source in sources.values() if isinstance(sources, dict) else ():
        for mode in get_args(Mode):
            sets = source.get(mode) if isinstance(source, dict) else None
            if isinstance(sets, dict) and "protocol" in sets:
                sets["protocol"] = _resolve(sets["protocol"], "protocol", base)


def _tables(value: object, label: str) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict) or not all(isinstance(table, dict) for table in value.values()):
        raise InputError(f"In suite {label}: methods must be tables like [methods.kit], found {value!r}.")
    return value


def _beside(attention: object, base: Path) -> object:
    """A method file named in a suite file is looked for beside that file."""
    return str(base / attention) if isinstance(attention, str) and attention.endswith(".py") else attention


def _chosen(method: str, known: Mapping[str, dict[str, Any]], label: str) -> tuple[str, dict[str, Any]]:
    if method.endswith(".py"):
        return Path(method).stem.rstrip("_").replace("_", "-"), {"attention": method}
    if method not in known:
        raise InputError(
            f"Suite {label!r} has no method {method!r}; {nearest(method, known)} Or give a path to a .py file."
        )
    return method, known[method]


def _set(raw: dict[str, Any], override: str, base: Path) -> None:
    """Apply one `key.of.table=value` in place; the value is read as TOML, else taken as a string."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise InputError(f"--set takes KEY=VALUE, for example recipe.steps=2000; found {override!r}.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    if parts[0] == "methods":
        if len(parts) != 3 or parts[1] not in raw["methods"]:
            raise InputError(
                f"--set {key}: a method's setting is methods.NAME.SETTING; "
                f"{nearest('.'.join(parts[1:2]), raw['methods'])}"
            )
        raw["methods"][parts[1]][parts[2]] = value
        return
    model: type[BaseModel] | None = Suite
    table: Any = raw
    for depth, part in enumerate(parts):
        if model is None or part not in model.model_fields:
            known = [".".join([*parts[:depth], field]) for field in (model.model_fields if model else ())]
            raise InputError(f"--set {key}: unknown key; {nearest(key.strip(), known)}")
        inside = table.get(part) if isinstance(table, dict) else None
        model = _model_of(model.model_fields[part].annotation, inside.get("kind") if isinstance(inside, dict) else None)
        if depth + 1 < len(parts):
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise InputError(f"--set {key}: {'.'.join(parts[: depth + 1])} is {table!r}, not a table of keys.")
    table[parts[-1]] = _resolve(value, key, base) if key in ("recipe", "protocol") else value  # type: ignore[arg-type]
