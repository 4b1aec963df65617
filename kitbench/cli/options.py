"""Options and arguments that several commands share."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from kitbench.errors import InputError


class RunPath(click.Path):
    """The path of a run's folder or of a folder of runs, or the first digits of a run's key.

    Digits are looked for in results/ and the present folder; behind a folder (other/4583f247fe), in that one.
    """

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(value)
        if not path.exists() and re.fullmatch(r"[0-9a-f]{4,64}", path.name):
            return _run_of_key(path.parent, path.name)
        if not path.exists() and re.fullmatch(r"[0-9a-f]{1,3}", path.name):
            raise InputError(f"{value} is no folder, and of a run's key it is too little; give four digits or more.")
        return super().convert(value, param, ctx)


class WholeRange(click.IntRange):
    """A whole number in a range. click would call a word that is none `not a valid integer range`."""

    name = "integer"


class FiniteRange(click.FloatRange):
    """A float in a range; not infinity, nor NaN, which no range excludes."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


def _run_of_key(root: Path, digits: str) -> Path:
    """The one run below a folder whose key begins with these digits. Raises InputError for none and for several."""
    roots = [Path("results"), Path()] if root == Path() else [root]
    patterns = [f"{below}*-{digits[:10]}*/run.json" for below in ("", "*/", "*/*/")]
    found = {path.resolve(): path.parent for root in roots for pattern in patterns for path in root.glob(pattern)}
    from kitbench.store.folder import RunFolder

    named = [folder for folder in found.values() if RunFolder(folder).key_begins(digits)]
    if not named:
        where = " or ".join(f"{root}/" if root != Path() else "the present folder" for root in roots)
        raise InputError(f"No run whose key begins with {digits} is in {where}; give the folder of the run.")
    if len(named) > 1:
        listed = ", ".join(map(str, sorted(named)[:5]))
        raise InputError(f"The digits {digits} begin the keys of {len(named)} runs ({listed}); give a folder.")
    return named[0]


def listed(context: click.Context, parameter: click.Parameter, words: tuple[str, ...]) -> tuple[str, ...]:
    """The names of an option that may be repeated, and may hold several with commas between them."""
    names = tuple(name.strip() for word in words for name in word.split(",") if name.strip())
    if words and not names:
        raise click.BadParameter("no name is given.", context, parameter)
    return names


def one_spelling(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of sets as runs store them: the path of a folder has one spelling."""
    from kitbench.spec.suite import SetNames

    return SetNames(train=names, test=names).test if names else ()


def overrides_of(overrides: tuple[str, ...], train_set: tuple[str, ...], test_set: tuple[str, ...]) -> tuple[str, ...]:
    """What --set, --train-set and --test-set change, as values of --set."""
    chosen = {"data.train": train_set, "data.test": test_set}
    return (*overrides, *(f"{key}={json.dumps(names, ensure_ascii=False)}" for key, names in chosen.items() if names))


FORMATS = {".csv": "csv", ".html": "html", ".json": "json", ".md": "markdown", ".tex": "latex"}
"""By the suffix of a file."""


def form_of(form: str | None, out: Path | None, known: Sequence[str]) -> str:
    """The format of an output: the one that was chosen, else that of the file's suffix, else the first known one.

    Raises InputError where the two differ, or the command has no such format.
    """
    by_suffix = FORMATS.get(out.suffix.lower()) if out is not None else None
    if form is not None and by_suffix not in (None, form):
        raise InputError(f"--format {form} and --out {out} name two formats; give one of them.")
    chosen = form or by_suffix or known[0]
    if chosen not in known:
        raise InputError(f"This command has no format {chosen}, which --out {out} asks for; it has {', '.join(known)}.")
    return chosen


def _markdown_only(context: click.Context, parameter: click.Parameter, out: Path | None) -> Path | None:
    form_of(None, out, ("markdown",))
    return out


METHODS = click.option(
    "--method", "--methods", "method", multiple=True, metavar="NAME|FILE", callback=listed,
    help="Only this method: a name (kitbench list), or the path of a .py file; by default all of the suite. "
         "Several: repeat, or A,B.",
)  # fmt: skip
TRAIN_SET = click.option(
    "--train-set", multiple=True, metavar="SET", callback=listed,
    help="Instead of the suite's training sets: a name (kitbench list), or a folder of pictures with a / in its path. "
         "Several: repeat, or A,B.",
)  # fmt: skip
TEST_SET = click.option(
    "--test-set",
    multiple=True,
    metavar="SET",
    callback=listed,
    help="Instead of the suite's test sets: names (kitbench list), or folders of pictures with a / in the path. "
    "Several: repeat, or A,B.",
)
DATA = click.option(
    "--data", type=click.Path(path_type=Path), envvar="KITBENCH_DATA", show_envvar=True,
    help="Folder that contains data sets; by default, photographs that ship with scikit-image.",
)  # fmt: skip
SUITE = click.option("--suite", required=True, help="A suite's name (kitbench list), or the path of a .toml file.")
PRESET = click.option(
    "--preset",
    help="A preset of the suite (kitbench list), e.g. smoke, quick or standard; by default the one that the "
    "suite names (quick in shipped suites).",
)
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one setting, e.g. recipe.steps=2000. Repeatable.",
)
OUT = click.option(
    "--out", type=click.Path(path_type=Path), default=Path("results"), show_default=True, help="Folder for the runs."
)
MARKDOWN_OUT = click.option(
    "--out", type=click.Path(path_type=Path), callback=_markdown_only,
    help="Write Markdown to this file instead of the terminal.",
)  # fmt: skip
LPIPS = click.option(
    "--lpips-weights",
    metavar="FILE",
    envvar="KITBENCH_LPIPS_WEIGHTS",
    show_envvar=True,
    help="Backbone weights for LPIPS: the file, or a folder that holds it.",
)
DEVICE = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
JOBS = click.option(
    "--jobs", type=WholeRange(1), envvar="KITBENCH_JOBS", show_envvar=True,
    help="Runs at a time; by default as many as cores and memory, GPUs, or Slurm allow. 1: one after another.",
)  # fmt: skip
PATHS = click.argument("paths", nargs=-1, required=True, type=RunPath(), metavar="RUNS...")
PROTOCOL = click.option("--protocol", help="Only rows of this protocol (id, or id.vN).")
RUN = click.option(
    "--run", "folder", required=True, type=RunPath(), metavar="RUN",
    help="A trained run: its folder, or the first digits of its key.",
)  # fmt: skip
METHOD_FILE = click.option(
    "--method", "method_file", type=click.Path(path_type=Path), help="Python file of a method that is not shipped."
)
TRACEBACK = "kitbench.traceback"
"""Key of click's `meta` under which it is kept whether tracebacks are wanted."""

CHECK = "kitbench.check"
"""Key of click's `meta` under which a check that failed keeps its exit code, though nobody may read what it prints."""


def traceback_option() -> click.Option:
    """The option --traceback, which every command has."""

    def keep(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        context.meta[TRACEBACK] = value

    return click.Option(
        ["--traceback"], is_flag=True, expose_value=False, callback=keep,
        help="Print the Python traceback of an error too.",
    )  # fmt: skip


def shared_by_torchrun() -> bool:
    """Whether torchrun has started this process and others beside it."""
    return "LOCAL_RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
