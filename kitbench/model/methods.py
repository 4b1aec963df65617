"""Finding a method by name or file, and checking before any training that it has the required signature.

A method is a Python file that opens with a card (its docstring) and defines one of three things: `class Attention`,
trained inside the shared backbone (the contract is in `kitbench.attention`); `restore(image, sigma)`, training-free; or
`class Network`, a whole network that is evaluated with given weights (`kitbench eval`). Shipped ones are
`kitbench/attention/kit.py` and the files of `baselines/`; the path of any other .py file works the same.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import json
import re
import sys
import typing
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from kitbench.errors import InputError, describe_error, nearest, own_place, short_path
from kitbench.spec.fields import Setting

if typing.TYPE_CHECKING:
    import torch
    from torch import nn

Restore = Callable[[np.ndarray, float | None], np.ndarray]


def shipped() -> dict[str, str]:
    """Module of every shipped method, by name (`global_.py` is `global`, `kit_random.py` is `kit-random`)."""
    modules = {"kit": "kitbench.attention.kit"}
    for file in resources.files("kitbench.baselines").iterdir():
        if file.name.endswith(".py") and file.name != "__init__.py":
            stem = file.name.removesuffix(".py")
            modules[stem.rstrip("_").replace("_", "-")] = f"kitbench.baselines.{stem}"
    return dict(sorted(modules.items()))


KINDS = {"Attention": "trained", "restore": "training-free", "Network": "given weights"}
"""What a method file defines, and the kind of method that this makes it."""


def method_cards() -> dict[str, tuple[str, str]]:
    """Kind and card of every shipped method, read from the source without importing it."""
    found = {}
    for name, module in shipped().items():
        package, _, stem = module.rpartition(".")
        tree = ast.parse(resources.files(package).joinpath(f"{stem}.py").read_text("utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        [kind] = [kind for word, kind in KINDS.items() if word in defined]
        found[name] = (kind, ast.get_docstring(tree) or "")
    return found


def method_kinds() -> dict[str, str]:
    """The kind of every shipped method, one of the values of KINDS."""
    return {name: kind for name, (kind, _) in method_cards().items()}


@dataclass(frozen=True)
class Loaded:
    """A method: its card, its settings with their defaults, and the class or function that implements it."""

    name: str
    card: str
    attention: type[nn.Module] | None = None
    restore: Restore | None = None
    network: type[nn.Module] | None = None
    source_sha256: str | None = None
    """Of a user's file, which is part of the run's key; None for shipped methods, which `NUMERICS` versions."""
    settings: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Annotation and default of each setting."""

    def resolve(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All settings, given ones and defaults. Raises InputError for an unknown key or a value of the wrong type."""
        resolved = {key: default for key, (_, default) in self.settings.items()}
        for key, value in given.items():
            if key not in self.settings:
                raise InputError(f"Method {self.name!r} has no setting {key!r}; {nearest(key, self.settings)}")
            try:
                # Lax for whole numbers alone: they may stand for floats. True is no number.
                adapter = TypeAdapter(self.settings[key][0])
                resolved[key] = adapter.validate_python(value, strict=type(value) is not int)
            except ValidationError as error:
                message = error.errors(include_url=False)[0]["msg"]
                raise InputError(
                    f"Method {self.name!r}: {key} is {value!r}: {message[0].lower()}{message[1:]}."
                ) from error
        return resolved

    def build(self, dim: int, heads: int, shift: bool, **settings: Any) -> nn.Module:
        """An attention for `dim` channels and `heads` heads. Raises InputError where it cannot be built so."""
        assert self.attention is not None, f"{self.name} is training-free"
        try:
            return self.attention(dim, heads, shift=shift, **settings)
        except Exception as error:  # a stranger's code may raise anything
            raise InputError(f"Method {self.name!r} cannot be built with {settings}: {_told(error)}") from error

    def build_network(self, channels: int, **settings: Any) -> nn.Module:
        """The whole network for gray (1) or colour (3) images. Raises InputError where it cannot be built so."""
        assert self.network is not None, f"{self.name} is no whole network"
        try:
            return self.network(channels, **settings)
        except Exception as error:  # a stranger's code may raise anything
            raise InputError(
                f"Method {self.name!r} cannot be built for {channels} channels with {settings}: {_told(error)}"
            ) from error


def load_method(name: str, label: str | None = None) -> Loaded:
    """A shipped method by its name, or the user's own by the path of its file. Raises InputError."""
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise InputError(
                f"Method file {name} does not exist; give the path of a Python file with a class Attention or Network."
            )
        module, sha256 = _import_file(path), hashlib.sha256(path.read_bytes()).hexdigest()
    elif name in shipped():
        module, sha256 = importlib.import_module(shipped()[name]), None
    else:
        raise InputError(f"Unknown method {name!r}; {nearest(name, shipped())} Or give a path to a .py file.")
    found = {word: getattr(module, word) for word in KINDS if hasattr(module, word)}
    if len(found) != 1:
        raise InputError(
            f"Method file {name} defines {' and '.join(found) or 'no method'}; define one of `class Attention`, "
            "`def restore(image, sigma)` and `class Network`."
        )
    [(word, method)] = found.items()
    return Loaded(
        name=label or name,
        card=inspect.getdoc(module) or "",
        attention=method if word == "Attention" else None,
        restore=method if word == "restore" else None,
        network=method if word == "Network" else None,
        source_sha256=sha256,
        settings={} if word == "restore" else _settings(method, word, name),
    )


def _import_file(path: Path) -> ModuleType:
    name = f"kitbench_method_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # an import may raise anything
        del sys.modules[name]
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        beside = missing is not None and path.with_name(f"{missing}.py").is_file()
        advice = f"; move what it needs of {missing}.py into it: a method is one file" if beside else ""
        raise InputError(f"Method file {path} cannot be imported: {describe_error(error)}{advice}.") from error
    return module


def _told(error: Exception) -> str:
    """What a constructor raised; of a shipped one that refuses a setting, its sentence alone."""
    refusal = isinstance(error, ValueError | TypeError) and own_place(error) is None
    return str(error) if refusal else f"{describe_error(error)}."


def _settings(method: type, word: str, name: str) -> dict[str, tuple[Any, Any]]:
    """Arguments of the constructor behind the required ones, also of those that a subclass passes on by `**settings`.

    Raises InputError where the class does not keep the contract.
    """
    from torch import nn

    if not (inspect.isclass(method) and issubclass(method, nn.Module)):
        found = f"a class of {', '.join(b.__name__ for b in method.__bases__)}" if inspect.isclass(method) else method
        raise InputError(f"Method {name}: `{word}` must be a torch.nn.Module, found {found}; derive it from nn.Module.")
    signature = inspect.signature(method)
    try:
        signature.bind_partial(8, 1, shift=False) if word == "Attention" else signature.bind_partial(3)
    except TypeError as error:
        expected = "dim, heads, *, shift=False, ..." if word == "Attention" else "channels, *, ..."
        raise InputError(f"Method {name}: {word}.__init__ must take ({expected}), found {signature}.") from error
    required = 2 if word == "Attention" else 1
    settings: dict[str, tuple[Any, Any]] = {}
    inherited = False
    for owner in method.__mro__:
        if "__init__" not in vars(owner) or owner.__module__.startswith("torch."):
            continue
        init = vars(owner)["__init__"]
        _, *parameters = inspect.signature(init).parameters.values()
        for parameter in parameters[required:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or parameter.name == "shift":
                continue
            passed = parameter.name in settings or (inherited and parameter.default is parameter.empty)
            if passed:  # by the subclass, as it likes
                continue
            settings[parameter.name] = _setting(parameter, init, f"Method {name}: in {owner.__name__}.__init__")
        inherited = any(p.kind is p.VAR_KEYWORD for p in parameters)
        if not inherited:
            break
    return settings


def _setting(parameter: inspect.Parameter, init: Callable[..., None], where: str) -> tuple[Any, Any]:
    """Annotation and default of a setting. Raises InputError where it has none that a run can record."""
    if parameter.default is parameter.empty:
        raise InputError(
            f"{where}, the setting {parameter.name!r} has no default; give it one, as in {parameter.name}: int = 4."
        )
    if not isinstance(parameter.default, Setting):
        raise InputError(
            f"{where}, the default of {parameter.name!r} is {parameter.default!r}; settings are true or false, numbers "
            "or text, for which a constructor can choose objects."
        )
    try:
        annotation = typing.get_type_hints(init).get(parameter.name, Any)
        TypeAdapter(annotation)
    except Exception as error:  # an annotation may be any expression
        first = str(error).splitlines()[0].split(". Set ")[0]
        raise InputError(
            f"{where}, the annotation of {parameter.name!r} cannot be checked ({type(error).__name__}: {first}); use "
            "bool, int, float, str or a Literal."
        ) from error
    return annotation, parameter.default


def check_method(method: Loaded, levels: Mapping[int, tuple[int, int, int]], settings: Mapping[str, Any]) -> None:
    """Run the attention forward and backward at each level's (channels, heads, side) before any training, and what else
    a run will call of it: `macs`, `needed_macs`, `report` and `attended`.

    Raises InputError where it fails, returns another shape or dtype than its input's or values that are not finite, or
    has trainable parameters without a gradient: DistributedDataParallel would wait for them forever.
    """
    for level, (dim, heads, side) in levels.items():
        for shift in (False, True):
            module = method.build(dim, heads, shift, **settings)
            where = f"Method {method.name!r}, level {level} (input [2, {side}, {side + 1}, {dim}], {heads} heads)"
            try:
                if fault := _trial(module, _tokens(side, dim)) or _extras(module, _tokens(side, dim)):
                    raise InputError(f"{where}, shift={shift}: {fault}.")
            except InputError:
                raise
            except Exception as error:  # a stranger's code may raise anything
                told = describe_error(error)
                if own_place(error) is None:
                    told += _forward_of(module, _tokens(side, dim))
                raise InputError(f"{where} failed: {told}.") from error


def _tokens(side: int, dim: int) -> torch.Tensor:
    import torch

    return torch.randn(2, side, side + 1, dim, generator=torch.Generator().manual_seed(0), requires_grad=True)


def _trial(module: nn.Module, x: torch.Tensor) -> str | None:
    """What is wrong with a forward and a backward pass; None where nothing is."""
    y = module(x)
    if fault := _fault(y, x):
        return f"{fault}; return one value per position and channel"
    if not y.requires_grad:
        return (
            "forward returned values without a gradient; compute them by torch operators, without no_grad, detach, "
            ".data or NumPy"
        )
    y.square().mean().backward()
    if idle := [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]:
        return (
            f"no gradient reaches {', '.join(idle)}; remove parameters that do not affect the result, or register them "
            "as buffers"
        )
    return None


def _extras(module: Any, x: torch.Tensor) -> str | None:
    """What is wrong with what `macs`, `needed_macs`, `report` and `attended` return, where the module has them.

    None where nothing is. x: [B, H, W, C].
    """
    import torch

    for name in ("macs", "needed_macs"):
        if hasattr(module, name):
            macs = getattr(module, name)(x.shape[1], x.shape[2])
            if type(macs) is not int or macs < 0:
                return (
                    f"{name}(height, width) returned {macs!r}, expected a whole number (int) of multiply-adds of one "
                    "image, 0 or more"
                )
    if hasattr(module, "needed_macs") and not hasattr(module, "macs"):
        return "it has needed_macs but no macs(height, width), the multiply-adds executed; add it"
    with torch.inference_mode():
        module.eval()
        if not torch.equal(module(x.detach()), module(x.detach())):
            return (
                "in evaluation mode two calls with the same input returned different values, so that no score could be "
                "reproduced; draw random numbers from a generator with a fixed seed"
            )
        if hasattr(module, "report"):
            report = module.eval().report(x.detach())
            try:
                json.dumps(dict(report))
            except (TypeError, ValueError) as error:
                return f"report(x) must return a dictionary of numbers and texts, which JSON can hold: {error}"
        if hasattr(module, "attended") and not _are_patches(module.eval().attended(x.detach()), len(x)):
            return (
                "attended(x) must return the patches that each patch attends to, int64 [B, N, k], itself first, "
                "numbered row by row from 0, and the number of columns of their grid (int)"
            )
    return None


def _are_patches(found: Any, batch: int) -> bool:
    """Whether `found` is what a method `attended` must return for a batch of so many images."""
    import torch

    if not (isinstance(found, tuple | list) and len(found) == 2 and isinstance(found[0], torch.Tensor)):
        return False
    patches, columns = found
    if patches.dtype != torch.int64 or patches.dim() != 3 or len(patches) != batch or not patches.numel():
        return False
    count = patches.shape[1]
    whole_rows = type(columns) is int and columns >= 1 and count % columns == 0
    itself_first = bool((patches[..., 0] == torch.arange(count, device=patches.device)).all())
    return whole_rows and itself_first and int(patches.min()) >= 0 and int(patches.max()) < count


def _forward_of(module: nn.Module, x: torch.Tensor) -> str:
    """The line of the forward pass whose gradient failed, found by torch's anomaly mode; empty where it finds none."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with suppress(Exception), torch.autograd.detect_anomaly():  # it fails again; the warning before it is wanted
            module(x).square().mean().backward()
    file = inspect.getfile(type(module))
    lines = re.findall(rf'File "{re.escape(file)}", line (\d+)', "\n".join(str(warning.message) for warning in caught))
    return f", in the gradient of {short_path(file)}:{lines[-1]}" if lines else ""


def check_network(method: Loaded, network: nn.Module, channels: int, device: torch.device) -> None:
    """Run a whole network on a small image of odd sides. Raises InputError where it fails or returns another shape."""
    import torch

    x = torch.rand(1, channels, 61, 47, generator=torch.Generator().manual_seed(0)).to(device)
    where = f"Method {method.name!r} (input {list(x.shape)})"
    try:
        with torch.inference_mode():
            fault = _fault(network(x), x)
    except Exception as error:  # a stranger's code may raise anything
        raise InputError(f"{where} failed: {describe_error(error)}.") from error
    if fault:
        raise InputError(f"{where}: {fault}; pad inside forward where the network needs multiples.")


def _fault(y: Any, x: torch.Tensor) -> str | None:
    """What is wrong with the output y of a forward pass of x; None where nothing is."""
    import torch

    returned = tuple(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__
    if returned != tuple(x.shape) or y.dtype != x.dtype:
        return (
            f"forward returned {returned} {getattr(y, 'dtype', '')}, expected the shape of its input, "
            f"{tuple(x.shape)} {x.dtype}"
        )
    if not bool(torch.isfinite(y).all()):
        return "forward returned values that are not finite (NaN or infinity)"
    return None


def check_restore(method: Loaded, channels: int, sigma: float | None) -> None:
    """Run a training-free method on a small image. Raises InputError where it fails or returns another shape."""
    assert method.restore is not None
    image = np.random.default_rng(0).random((32, 33, channels), dtype=np.float32)
    try:
        restored = method.restore(image, sigma)
    except Exception as error:  # a stranger's code may raise anything
        raise InputError(f"Method {method.name!r} failed on {image.shape}: {describe_error(error)}.") from error
    if getattr(restored, "shape", None) != image.shape or not np.isfinite(restored).all():
        found = getattr(restored, "shape", type(restored).__name__)
        raise InputError(
            f"Method {method.name!r}: restore returned {found}, expected finite values of shape {image.shape}."
        )
