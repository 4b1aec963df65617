"""The package as others get it: a wheel that installs one name and works from any directory."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel, and nothing else, was installed."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: building leaves a build folder behind, which the next build would pack
    for name in ("kitbench", "baselines", "datasets"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source], check=True, capture_output=True
    )
    [wheel] = folder.glob("kitbench-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True, capture_output=True)
    return folder / "site"


def test_the_wheel_puts_exactly_one_name_into_site_packages(installed: Path) -> None:
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} - {"bin"}
    assert names == {"kitbench"}


def test_the_wheel_holds_every_module_and_data_file_of_the_checkout(installed: Path) -> None:
    def files(folder: Path) -> set[str]:
        return {p.relative_to(folder).as_posix() for s in ("*.py", "*.toml") for p in folder.rglob(s)}

    expected = files(ROOT / "kitbench") | {f"{n}/{f}" for n in ("baselines", "datasets") for f in files(ROOT / n)}
    assert files(installed / "kitbench") == expected


def test_the_wheel_works_from_another_directory(installed: Path, tmp_path: Path) -> None:
    code = "import kitbench, runpy, sys; print(kitbench.__file__); sys.argv[1:] = ['list']; runpy.run_module('kitbench', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(installed)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(installed))
    for name in ("denoise", "kit-random", "CBSD68", "quick"):
        assert name in done.stdout


def test_the_tested_set_satisfies_the_ranges_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    for requirement in project["dependencies"]:
        assert requirement.partition(">=")[0].lower() in pinned, requirement


def test_continuous_integration_runs_the_readmes_own_test_command() -> None:
    assert sum("python -m pytest" in line for line in (ROOT / "README.md").read_text().splitlines()) == 1
    assert "grep -m 1 'python -m pytest' README.md" in (ROOT / ".ci" / "run").read_text()
