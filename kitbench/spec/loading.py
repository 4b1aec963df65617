"""From TOML files to validated objects: suites with their presets and overrides, recipes and protocols.

Presets inside the suite change some of its keys; `--set key=value` changes single ones. Unknown keys are refused
everywhere, with the most similar known one. Nothing here imports torch, so that reading a suite takes milliseconds.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from pydantic import BaseModel

from kitbench.errors import InputError, nearest
from kitbench.spec.fields import Mode
from kitbench.spec.messages import model_of, parse
from kitbench.spec.shipped import builtin
from kitbench.spec.suite import Data, Protocol, Recipe, Suite

DATA_KEYS = ("train", "test", "validation", "modes")
"""Short keys, `data.train` and so on, that hold for every mode, with a data folder and without one."""


def recipes() -> list[Recipe]:
    """The shipped recipes."""
    return [parse(Recipe, tomllib.loads(text), f"recipe {name}") for name, text in builtin("recipes").items()]


def protocols() -> list[Protocol]:
    """The shipped protocols."""
    return [parse(Protocol, tomllib.loads(text), f"protocol {name}") for name, text in builtin("protocols").items()]


def read_protocol(name: str) -> Protocol:
    """A shipped protocol by its name, or the user's own by the path of its .toml file. Raises InputError."""
    return parse(Protocol, read_toml(name, "protocols", Path()), f"protocol {name}")


def read_toml(name: str, kind: Literal["suites", "recipes", "protocols"], base: Path) -> dict[str, Any]:
    """A shipped file by its name, or the user's own by its path (relative to `base`). Raises InputError."""
    what = kind.removesuffix("s")
    if name.endswith(".toml"):
        path = base / name
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{what} file {path} cannot be read ({error}); give a readable TOML file.") from error
    elif name in builtin(kind):
        path, text = Path(f"{name}.toml"), builtin(kind)[name]
    else:
        raise InputError(
            f"Unknown {what} {name!r}; {nearest(name, builtin(kind))} The path of a file must end in .toml."
        )
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{what} file {path} is not valid TOML: {error}.") from error


def load_suite(
    name: str,
    preset: str | None = None,
    overrides: Sequence[str] = (),
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (),
    shipped: Mapping[str, str] = MappingProxyType({}),
) -> Suite:
    """A suite by name or path, with its preset, `key=value` overrides, and `--method`, `--seeds` choices applied.

    shipped: the kind of every shipped method (`kitbench.model.methods.KINDS`) by name: one of them may be chosen that
    the suite does not name, with the default settings of its file. Raises InputError for anything unknown or out of
    range, in one sentence.
    """
    base = Path(name).parent if name.endswith(".toml") else Path()
    raw = read_toml(name, "suites", Path())
    label = raw.get("name", name)
    presets = raw.pop("presets", {})
    default = raw.pop("default_preset", None)
    if not isinstance(presets, dict) or not presets:
        raise InputError(f"Suite {label!r} has no presets; add a table of changed keys like [presets.quick].")
    preset = preset or default
    if preset is None:
        raise InputError(
            f"Suite {label!r} names no default_preset; add that key, or give --preset: {' or '.join(presets)}."
        )
    if not isinstance(preset, str) or preset not in presets:
        raise InputError(f"Suite {label!r} has no preset {preset!r}; {nearest(str(preset), presets)}")
    if not isinstance(presets[preset], dict):
        raise InputError(
            f"In suite {label}: preset {preset} must be a table of changed keys, found {presets[preset]!r}."
        )
    raw = _merge(raw, presets[preset])
    raw["preset"] = preset
    _one_source_for_both(raw)
    for kind in ("recipe", "protocol"):
        if kind in raw:
            raw[kind] = _resolve(raw[kind], kind, base)
    _resolve_protocols(raw, base)
    _place_folders(raw, base)
    raw["methods"] = {
        key: value | {"attention": _relative_to(value.get("attention", key), base)}
        for key, value in _tables(raw.get("methods", {}), label).items()
    }
    if methods:
        _choose(raw, methods, shipped, label)
    # In TOML a method's settings stand beside its `attention`; here they are a table of their own.
    own = {key: _settings(value) for key, value in raw["methods"].items()}
    for override in overrides:
        _set(raw, override, base)
    raw["methods"] = {
        key: {"attention": value["attention"], "settings": _settings(value), "own": own[key]}
        for key, value in raw["methods"].items()
    }
    if seeds:
        raw["seeds"] = list(seeds)
    _resolve_protocols(raw, base)
    return parse(Suite, raw, f"suite {label}")


def _one_source_for_both(raw: dict[str, Any]) -> None:
    """A suite file with one of the tables data.embedded and data.folder uses it with and without --data; in place."""
    data = raw.get("data")
    if isinstance(data, dict):
        for given, absent in (("embedded", "folder"), ("folder", "embedded")):
            if given in data and absent not in data:
                data[absent] = deepcopy(data[given])


def _merge(base: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` updated by `change`, table by table; lists and values are replaced."""
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
    if not isinstance(value, dict) or "from" in value:
        raise InputError(
            f"The {kind} is {value!r}; give its name, or a table like {{ from = 'NAME', key = value }} (kitbench list)."
        )
    return value


def _resolve_protocols(raw: dict[str, Any], base: Path) -> None:
    """Read the protocols that single modes of the data name, in place."""
    sources = raw.get("data")
    for source in sources.values() if isinstance(sources, dict) else ():
        for mode in get_args(Mode):
            sets = source.get(mode) if isinstance(source, dict) else None
            if isinstance(sets, dict) and "protocol" in sets:
                sets["protocol"] = _resolve(sets["protocol"], "protocol", base)


def _place_folders(raw: dict[str, Any], base: Path) -> None:
    """Folders of pictures that a suite file names are looked for beside that file; in place."""
    sources = raw.get("data")
    for source in sources.values() if isinstance(sources, dict) else ():
        for mode in get_args(Mode):
            sets = source.get(mode) if isinstance(source, dict) else None
            for part in ("train", "test", "validation"):
                if isinstance(sets, dict) and isinstance(sets.get(part), list):
                    sets[part] = [f"{base / n}/" if isinstance(n, str) and "/" in n else n for n in sets[part]]


def _tables(value: object, label: str) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict) or not all(isinstance(table, dict) for table in value.values()):
        raise InputError(f"In suite {label}: methods must be tables like [methods.kit], found {value!r}.")
    return value


def _settings(method: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in method.items() if key != "attention"}


def _relative_to(attention: object, base: Path) -> object:
    """A method file named in a suite file is looked for beside that file."""
    return str(base / attention) if isinstance(attention, str) and attention.endswith(".py") else attention


def _choose(raw: dict[str, Any], methods: Sequence[str], shipped: Mapping[str, str], label: str) -> None:
    """Leave only these methods, in place; training-free ones stand among the references."""
    free = [method for method in methods if method not in raw["methods"] and shipped.get(method) == "training-free"]
    known = {name: {"attention": name} for name in shipped} | raw["methods"]
    chosen: dict[str, dict[str, Any]] = {}
    for name, table in (_chosen(method, known, label) for method in methods if method not in free):
        if chosen.setdefault(name, table) != table:
            raise InputError(
                f"{chosen[name]['attention']} and {table['attention']} would both be the method {name!r}; rename one."
            )
    raw["methods"] = chosen
    if free:
        raw["references"] = free


def _chosen(method: str, known: Mapping[str, dict[str, Any]], label: str) -> tuple[str, dict[str, Any]]:
    if method.endswith(".py"):
        name = Path(method).stem.rstrip("_").replace("_", "-")
        if name in known:
            raise InputError(
                f"Method file {method} bears the name of the method {name!r} of kitbench or of suite {label!r}; rename "
                f"the file, so that tables can show both."
            )
        return name, {"attention": method}
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
    if parts == ["preset"]:
        raise InputError(f"--set preset would change the name of the preset alone; give --preset {text.strip()}.")
    if parts[0] == "methods":
        if len(parts) != 3 or parts[1] not in raw["methods"]:
            raise InputError(
                f"--set {key}: a method's setting is methods.NAME.SETTING; "
                f"{nearest('.'.join(parts[1:2]), raw['methods'])}"
            )
        raw["methods"][parts[1]][parts[2]] = value
        return
    if parts[0] == "data" and len(parts) == 2:
        _set_data(raw, parts[1], value)
        return
    model: type[BaseModel] | None = Suite
    table: Any = raw
    for depth, part in enumerate(parts):
        if model is None or part not in model.model_fields:
            known = [".".join([*parts[:depth], field]) for field in (model.model_fields if model else ())]
            raise InputError(f"--set {key}: unknown key; {nearest(key.strip(), known)}")
        if model.model_fields[part].annotation == (str | None) and not isinstance(value, str):
            value = text  # the hash of a run may consist of digits
        inside = table.get(part) if isinstance(table, dict) else None
        model = model_of(model.model_fields[part].annotation, inside.get("kind") if isinstance(inside, dict) else None)
        if depth + 1 < len(parts):
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise InputError(f"--set {key}: {'.'.join(parts[: depth + 1])} is {table!r}, not a table of keys.")
    table[parts[-1]] = _resolve(value, key, base) if key in ("recipe", "protocol") else value  # type: ignore[arg-type]


def _set_data(raw: dict[str, Any], part: str, value: object) -> None:
    """`data.train=A,B` and the like: the sets of every mode, with a data folder and without one; in place."""
    if part not in DATA_KEYS:
        known = [f"data.{key}" for key in (*DATA_KEYS, *Data.model_fields)]
        raise InputError(f"--set data.{part}: unknown key; {nearest(f'data.{part}', known)}")
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise InputError(f"--set data.{part}: give one name or several with commas between them, as in 'A,B'.")
    sources = raw.get("data")
    for source in sources.values() if isinstance(sources, dict) else ():
        if isinstance(source, dict) and part == "modes":
            source["modes"] = names
            continue
        for mode in get_args(Mode):
            if isinstance(source, dict) and isinstance(source.get(mode), dict):
                source[mode][part] = names
