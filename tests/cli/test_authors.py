"""The author of a new attention: whatever goes wrong in the own file is told in one sentence with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result

from kitbench.errors import InputError
from kitbench.model import contract, methods
from tests.cli.conftest import call
from tests.conftest import Kitbench

GOOD = '''"""mine: scaled channels."""
import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, dim, heads, *, shift=False, reduction: int = 4):
        super().__init__()
        self.hidden = dim // reduction
        self.mix = nn.Linear(dim, dim)

    def forward(self, x):
        return self.mix(x)
'''
FEW = ("--set", "recipe.steps=3", "--set", "recipe.warmup=0", "--set", "recipe.validations=0")


def sentence(done: Result) -> str:
    [found] = [line for line in done.stderr.splitlines() if line.startswith("kitbench: ")]
    return found


def line_of(text: str, part: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if part in line)


FORWARD = "        return self.mix(x)\n"
BACKWARD = """        return Broken.apply(self.mix(x))


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise LookupError("in backward")
"""
IN_PLACE = """        y = self.mix(x).exp()
        z = y * y  # needs y again
        y.add_(1)
        return z + y
"""
MACS = "\n    def macs(self, h, w):\n        return 1\n"
ATTENDED = """
    def attended(self, x):
        itself = torch.arange(12)[None]  # of 3 rows of 4 patches
        return """


@pytest.mark.parametrize(
    ("old", "new", "expected", "part"),
    [
        ("import torch\n", "import torch\n1 / 0\n", "ZeroDivisionError: division by zero", "1 / 0"),
        ("import torch\n", "import torch\nimport sys; sys.exit('no GPU')\n", "SystemExit: no GPU", "sys.exit"),
        ("def forward(self, x):", "def forward(self, x:", "SyntaxError: '(' was never closed", "forward(self, x:"),
        (FORWARD, "        raise KeyError('mask')\n", "KeyError: 'mask'", "raise KeyError"),
        (FORWARD, "        return torch.matmul(x, x)\n", "RuntimeError: Expected size", "torch.matmul"),
        (FORWARD, BACKWARD, "LookupError: in backward", "raise LookupError"),
        (FORWARD, IN_PLACE, "modified by an inplace operation", "needs y again"),
        ("super().__init__()", "pass", "AttributeError: cannot assign module before", "nn.Linear"),
        (FORWARD, f"{FORWARD}\n    def macs(self, h, w):\n        return h * w * self.dim\n", "no attribute 'dim'", "self.dim"),
        (FORWARD, f"{FORWARD}\n    def report(self, x):\n        return {{'r': x.foo}}\n", "no attribute 'foo'", "x.foo"),
    ],
)  # fmt: skip
def test_an_exception_of_the_own_file_is_told_with_its_line_before_anything_is_written(
    here: Path, old: str, new: str, expected: str, part: str
) -> None:
    assert old in GOOD
    text = GOOD.replace(old, new, 1)
    (here / "mine.py").write_text(text)
    done = call("run", "--suite", "tiny.toml", "--method", "mine.py", code=2)
    found = sentence(done)
    assert expected in found
    assert f"mine.py:{line_of(text, part)}" in found
    assert "Traceback" not in done.output
    assert not (here / "results").exists()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("reduction: int = 4", "reduction: int", "the setting 'reduction' has no default"),
        ("reduction: int = 4", "reduction: int = None", "the default of 'reduction' is None"),
        ("reduction: int = 4", "reduction=(1, 2)", "the default of 'reduction' is (1, 2)"),
        (
            "reduction: int = 4",
            "reduction: int = 2.5",
            "the default of 'reduction' is 2.5, which its annotation does not",
        ),
        ("reduction: int = 4", "reduction: 'Nothing' = 4", "name 'Nothing' is not defined"),
        ("reduction: int = 4", "reduction: torch.Tensor = 4", "the annotation of 'reduction'"),
        ("(nn.Module)", "", "must be a torch.nn.Module"),
        ("return self.mix(x)", "with torch.no_grad():\n            return self.mix(x)", "without a gradient"),
        (FORWARD, f"{FORWARD}\n    def macs(self, h, w):\n        return None\n", "macs(height, width) returned None"),
        (FORWARD, f"{FORWARD}\n    def report(self, x):\n        return {{'r': x}}\n", "report(x) must return"),
        (FORWARD, f"{FORWARD}\n    def needed_macs(self, h, w):\n        return 1\n", "needed_macs but no macs"),
        (
            FORWARD,
            f"{FORWARD}{MACS}    def needed_macs(self, h, w):\n        return 0.5\n",
            "needed_macs(height, width) returned 0.5",
        ),
        (FORWARD, f"{FORWARD}{ATTENDED}4", "attended(x) must return the patches"),
        (FORWARD, f"{FORWARD}{ATTENDED}itself[:, :, None].expand(2, -1, -1)", "attended(x) must return the patches"),
        (FORWARD, f"{FORWARD}{ATTENDED}(itself[..., None].flip(1).expand(2, -1, -1), 4)", "itself first"),
        (FORWARD, f"{FORWARD}{ATTENDED}(itself[..., None].expand(2, -1, -1), 5)", "the number of columns"),
        (FORWARD, f"{FORWARD}{ATTENDED}(torch.stack([itself, itself + 1], -1).expand(2, -1, -1), 4)", "from 0"),
        ("def forward", "def foward", 'missing the required "forward" function'),
        ("import torch\n", "import torch\nimport beside\n", "move what it needs of beside.py into it"),
    ],
)
def test_a_wrong_guess_about_the_contract_is_mended_by_one_sentence(
    here: Path, old: str, new: str, expected: str
) -> None:
    assert old in GOOD
    (here / "mine.py").write_text(GOOD.replace(old, new, 1))
    (here / "beside.py").write_text("")
    with pytest.raises(InputError) as refused:
        contract.check_method(methods.load_method("mine.py", "mine"), {1: (8, 1, 16)}, {})
    assert expected in str(refused.value)
    assert "mine" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_setting_of_zero_names_the_line_that_divides_by_it(here: Path) -> None:
    (here / "mine.py").write_text(GOOD)
    done = call("run", "--suite", "tiny.toml", "--method", "mine.py", "--set", "methods.mine.reduction=0", code=2)
    assert "{'reduction': 0}" in sentence(done)
    assert "ZeroDivisionError" in sentence(done)
    assert f"mine.py:{line_of(GOOD, 'dim // reduction')}" in sentence(done)


def test_a_whole_number_as_the_default_of_a_float_gives_the_key_that_the_float_gives(here: Path) -> None:
    (here / "mine.py").write_text(GOOD.replace("reduction: int = 4", "reduction: float = 4"))
    mine = methods.load_method("mine.py", "mine")
    found = [mine.resolve(given)["reduction"] for given in ({}, {"reduction": 4}, {"reduction": 4.0})]
    assert [repr(value) for value in found] == ["4.0"] * 3


def test_settings_may_be_positional_and_a_dataclass_may_stand_in_the_file(here: Path) -> None:
    head = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Window:\n    side: int = 8\n"
    text = GOOD.replace("import torch\n", "").replace("*, shift=False, reduction", "shift=False, reduction")
    (here / "mine.py").write_text(head + text)
    done = call(
        "run", "--suite", "tiny.toml", "--method", "mine.py", "--set", "methods.mine.reduction=2", "--dry-run", code=0
    )
    assert "colour/mine/0" in done.stdout


LATE = GOOD.replace(
    FORWARD,
    """        self.calls = getattr(self, "calls", 0) + 1
        if {when}:
            raise KeyError("late")
        return self.mix(x)
""",
)
BY_SIZE, BY_CALLS = "x.shape[1] > 130", "self.training and torch.is_grad_enabled() and self.calls > 9"


def test_a_late_exception_gives_line_traceback_and_exit_code_3(here: Path) -> None:
    """In training, after some steps: in this process, told at once and kept in failed.json."""
    text = LATE.replace("{when}", BY_CALLS)
    (here / "mine.py").write_text(text)
    steps = ("--set", "recipe.steps=40", *FEW[2:])
    done = call("run", "--suite", "tiny.toml", "--method", "mine.py", *steps, "--jobs", "1", code=3)
    place = f"mine.py:{line_of(text, 'raise KeyError')}"
    assert f"KeyError: 'late' at {place} in forward" in sentence(done)
    assert "Traceback" not in done.output
    [failed] = here.glob("results/*mine*/failed.json")
    record = json.loads(failed.read_text())
    assert place in record["message"]
    assert record["traceback"].startswith("Traceback (most recent call last)")
    assert 'raise KeyError("late")' in record["traceback"]
    again = call("run", "--suite", "tiny.toml", "--method", "mine.py", *steps, "--jobs", "1", "--traceback", code=3)
    assert 'raise KeyError("late")' in again.stderr


@pytest.mark.parametrize("when", [BY_SIZE, BY_CALLS])
def test_an_exit_in_the_own_file_is_the_failure_of_its_run_alone(here: Path, when: str) -> None:
    text = LATE.replace("{when}", when).replace('KeyError("late")', "SystemExit(0)")
    (here / "mine.py").write_text(text)
    chosen = ("--method", "mine.py", "--method", "conv", "--set", "recipe.steps=12", *FEW[2:], "--jobs", "1")
    done = call("run", "--suite", "tiny.toml", *chosen, code=3)
    assert f"SystemExit: 0 at mine.py:{line_of(text, 'raise SystemExit')} in forward" in sentence(done)
    assert list(here.glob("results/*conv*/eval/*.json"))


def test_an_exit_in_the_own_file_fails_the_command_that_reaches_it(here: Path) -> None:
    text = LATE.replace("{when}", "x.shape[1] > 40").replace('KeyError("late")', "SystemExit(0)")
    (here / "mine.py").write_text(text)
    done = call("scale", "--method", "mine.py", "--sizes", "64", "--what", "infer", code=3)
    assert f"SystemExit: 0 at mine.py:{line_of(text, 'raise SystemExit')} in forward" in sentence(done)


def test_an_exception_in_a_worker_process_is_told_alike(kitbench: Kitbench, tmp_path: Path) -> None:
    """At the size of a test image only, in another process: the place and the traceback come back."""
    text = LATE.replace("{when}", BY_SIZE)
    (tmp_path / "mine.py").write_text(text)
    done = kitbench(
        "run", "--suite", "tiny.toml", "--method", "mine.py", "--method", "conv", *FEW, "--jobs", "2", code=3
    )
    place = f"mine.py:{line_of(text, 'raise KeyError')}"
    assert f"KeyError: 'late' at {place} in forward" in done.stderr
    assert "probing   mine" in done.stdout
    assert list(tmp_path.glob("results/*conv*/eval/*.json"))
    [failed] = tmp_path.glob("results/*mine*/failed.json")
    assert 'raise KeyError("late")' in json.loads(failed.read_text())["traceback"]


@pytest.mark.parametrize(
    ("late", "expected"),
    [
        ("image * float('nan')", "NaN or infinite for image"),
        ("image[1:]", "it must keep the size"),
        ("image['x']", "IndexError: only integers"),
    ],
)
def test_what_cannot_be_scored_names_method_and_image(here: Path, late: str, expected: str) -> None:
    (here / "filter.py").write_text(f"def restore(image, sigma):\n    return image if len(image) < 100 else {late}\n")
    found = sentence(call("eval", "--method", "filter.py", "--suite", "tiny.toml", code=3))
    assert "denoise-colour-filter-" in found
    assert expected in found
    assert "skimage-test" in found or "filter.py:2 in restore" in found
    assert "RunError" not in found


def test_probing_is_announced_before_the_first_forward(here: Path) -> None:
    (here / "mine.py").write_text(GOOD.replace(FORWARD, "        print('forward is called')\n" + FORWARD))
    said = call("run", "--suite", "tiny.toml", "--method", "mine.py", "--dry-run", code=0).stdout.splitlines()
    assert said.index(next(line for line in said if "probing" in line)) < said.index("forward is called")


def test_traceback_shows_what_a_refusal_hides(here: Path) -> None:
    (here / "mine.py").write_text(GOOD.replace(FORWARD, "        raise KeyError('mask')\n"))
    done = call("run", "--suite", "tiny.toml", "--method", "mine.py", "--traceback", code=2)
    assert "Traceback (most recent call last)" in done.stderr
    assert "raise KeyError('mask')" in done.stderr


def test_a_fault_of_kitbench_itself_is_a_sentence_with_exit_code_3(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*arguments: object, **options: object) -> None:
        raise KeyError("a fault inside")

    monkeypatch.setattr("kitbench.verdict.render.render", fault)
    (here / "results" / "a").mkdir(parents=True)
    monkeypatch.setattr("kitbench.store.folder.find", lambda paths: [])
    done = call("table", "results", code=3)
    assert "KeyError: 'a fault inside'" in sentence(done)
    assert "--traceback" in sentence(done)
    assert "Traceback" in call("table", "results", "--traceback", code=3).stderr
