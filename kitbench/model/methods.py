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
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from kitbench.errors import METHOD_ERRORS, InputError, describe_error, nearest, own_place
from kitbench.spec.fields import Setting

if typing.TYPE_CHECKING:
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
                resolved[key] = _typed(self.settings[key][0], value)
            except ValidationError as error:
                message = error.errors(include_url=False)[0]["msg"]
                hint = f"; write {value.lower()}" if value in ("True", "False") else ""
                raise InputError(
                    f"Method {self.name!r}: {key} is {value!r}: {message[0].lower()}{message[1:]}{hint}."
                ) from error
        return resolved

    def build(self, dim: int, heads: int, shift: bool, **settings: Any) -> nn.Module:
        """An attention for `dim` channels and `heads` heads. Raises InputError where it cannot be built so."""
        assert self.attention is not None, f"{self.name} is training-free"
        try:
            return self.attention(dim, heads, shift=shift, **settings)
        except METHOD_ERRORS as error:
            raise InputError(f"Method {self.name!r} cannot be built with {settings}: {_told(error)}") from error

    def build_network(self, channels: int, **settings: Any) -> nn.Module:
        """The whole network for gray (1) or colour (3) images. Raises InputError where it cannot be built so."""
        assert self.network is not None, f"{self.name} is no whole network"
        try:
            return self.network(channels, **settings)
        except METHOD_ERRORS as error:
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
        module, sha256 = _import_file(path)
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


def _import_file(path: Path) -> tuple[ModuleType, str]:
    """The module in a file, and the SHA-256 of what was run. Raises InputError.

    The file is read once, and no cached bytecode is used: Python takes it for that of a file of the same size that was
    changed within the same second.
    """
    name = f"kitbench_method_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert isinstance(spec.loader, SourceFileLoader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        source = path.read_bytes()
        exec(spec.loader.source_to_code(source, str(spec.origin)), vars(module))
    except METHOD_ERRORS as error:
        del sys.modules[name]
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        beside = missing is not None and path.with_name(f"{missing}.py").is_file()
        advice = f"; move what it needs of {missing}.py into it: a method is one file" if beside else ""
        raise InputError(f"Method file {path} cannot be imported: {describe_error(error)}{advice}.") from error
    return module, hashlib.sha256(source).hexdigest()


def _told(error: BaseException) -> str:
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
        # Without an annotation the default says the type; a whole number may stand for a fraction.
        kind: Any = int | float if type(parameter.default) is int else type(parameter.default)
        annotation = typing.get_type_hints(init).get(parameter.name, kind)
        TypeAdapter(annotation)
    except Exception as error:  # an annotation may be any expression
        first = str(error).splitlines()[0].split(". Set ")[0]
        raise InputError(
            f"{where}, the annotation of {parameter.name!r} cannot be checked ({type(error).__name__}: {first}); use "
            "bool, int, float, str or a Literal."
        ) from error
    try:
        return annotation, _typed(annotation, parameter.default)
    except ValidationError as error:
        raise InputError(
            f"{where}, the default of {parameter.name!r} is {parameter.default!r}, which its annotation does not "
            f"allow; change one of them."
        ) from error


def _typed(annotation: Any, value: Any) -> Any:
    """The value as the annotation has it: a whole number may stand for a float. Raises ValidationError."""
    # Lax for whole numbers alone. True is no number.
    return TypeAdapter(annotation).validate_python(value, strict=type(value) is not int)
