"""The sweep: what it is asked, and what its children do to it."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from kitbench.cli.main import cli
from kitbench.cost.agreement import reconcile
from kitbench.cost.flops import count_module
from kitbench.cost.sweep import points as measuring
from kitbench.cost.sweep import run, worker
from kitbench.cost.sweep.options import SweepOptions, parse_bytes, parse_method, parse_sizes
from kitbench.cost.sweep.points import guess_seconds
from kitbench.cost.sweep.run import run_scale  # fmt: skip
from kitbench.cost.sweep.worker import Child, Failed, Spec, build, closed_form, needed_macs
from kitbench.errors import InputError
from kitbench.spec.suite import Backbone
from kitbench.store.sweeps import BRACKET, Sweep
from kitbench.text import byte_size
from kitbench.verdict.scaling.fit import largest
from kitbench.verdict.scaling.page import sweep_csv, sweep_markdown, sweep_summary, write_sweep
from tests.stored import ENVIRONMENT
from tests.verdict.scaling.test_fit import points

HEAD = '''
"""A method that misbehaves when it really runs."""
import os, time
import torch
from torch import nn

class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, *, shift: bool = False, at: int = 0) -> None:
        super().__init__()
        self.at = at
        self.proj = nn.Linear(dim, dim)

    def macs(self, height: int, width: int) -> int:
        return height * width * self.proj.in_features ** 2

    def forward(self, x):
        if type(x) is torch.Tensor and x.shape[1] >= self.at:
            BODY
        return self.proj(x)
'''
FAULTS = {
    "oom": "torch.empty(1 << 50)",
    "timeout": "time.sleep(600)",
    "killed": "os.kill(os.getpid(), 9)",
    "failed": "raise ArithmeticError('lost')",
}


@pytest.fixture
def quiet():
    with open("/dev/null", "w") as nowhere:  # noqa: PTH123
        yield Console(file=nowhere)


def method_file(folder, name, body):
    file = folder / f"{name}.py"
    file.write_text(HEAD.replace("BODY", body))
    return str(file)


def options(out, methods, **others):
    return SweepOptions(
        methods=methods,
        dim=16,
        out=out,
        device="cpu",
        rounds=2,
        seconds=0.1,
        patience=5.0,
        **{"sizes": "16,32", "budget": "1KiB", **others},
    )


def test_a_child_that_fails_in_any_way_is_a_marked_row_and_the_sweep_goes_on(tmp_path, quiet, monkeypatch):
    monkeypatch.setattr(measuring, "WARM_UP_SECONDS", {"cpu": 8.0})
    files = {outcome: method_file(tmp_path, outcome, body) for outcome, body in FAULTS.items()}
    wanted = tuple(f"{file}:at=32" for file in files.values())
    sweep = run_scale(options(tmp_path / "out", ("conv", *wanted), what=("infer",)), quiet)
    for label, outcome in zip(wanted, files, strict=True):
        small, large = sweep.curve(label, "infer")
        assert small.status == "measured"
        assert large.status == outcome
        assert large.reason
        assert large.seconds is None
    assert [p.status for p in sweep.curve("conv", "infer")] == ["measured"] * 2
    assert all(p.seconds is not None for p in sweep.curve("conv", "infer"))
    assert "would need" in (sweep.curve(wanted[0], "infer")[1].reason or "")
    write_sweep(sweep, tmp_path / "out")
    page = (tmp_path / "out" / "scale.md").read_text()
    for word in ("OOM", "timeout", "by signal 9", "ArithmeticError: lost"):
        assert word in page


def test_beyond_a_size_that_did_not_end_nothing_is_tried(tmp_path, quiet):
    label = f"{method_file(tmp_path, 'hangs', FAULTS['killed'])}:at=16"
    sweep = run_scale(options(tmp_path / "out", (label,), what=("infer",)), quiet)
    assert [p.status for p in sweep.curve(label, "infer")] == ["killed", "predicted"]


def test_a_sweep_is_stored_drawn_and_resumed(tmp_path, quiet, monkeypatch):
    wanted = options(tmp_path, ("kit", "window"), what=("infer", "train"), sizes="16")
    first = run_scale(wanted, quiet)
    assert {p.status for p in first.points} == {"measured"}
    assert all(p.peak_bytes and p.seconds and p.macs_note is None for p in first.points)
    write_sweep(first, tmp_path)
    for name in ("scale.png", "scale.svg", "scale.md"):
        assert (tmp_path / name).stat().st_size > 1000
    # A method without a single timed point, as where one call would take too long at every size.
    partly = [p.model_copy(update={"seconds": None}) if p.method == "window" else p for p in first.points]
    write_sweep(first.model_copy(update={"points": tuple(partly)}), tmp_path / "partly")
    rows = list(csv.DictReader((tmp_path / "scale.csv").read_text().splitlines()))
    assert len(rows) == len(first.points) == 4
    for row in rows:
        assert float(row["gflops"]) == pytest.approx(2 * float(row["gmacs"]))

    def never(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr(run, "measure", never)
    assert run_scale(wanted, quiet).points == first.points
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_scale(replace(wanted, device="auto"), quiet).points == first.points  # the same device by another name
    screen = io.StringIO()
    with pytest.raises(AssertionError, match="measured again"):
        run_scale(options(tmp_path, ("kit", "window"), heads=2), Console(file=screen))  # another heads, another sweep
    kept = tmp_path / "scale-previous.json"
    assert Sweep.model_validate_json(kept.read_bytes()).points == first.points
    assert f"it is now {kept}\n" in screen.getvalue()


def test_a_half_done_sweep_goes_on_where_it_stopped(tmp_path, quiet, monkeypatch):
    real, sizes = run.measure, []

    def interrupted(specs, *rest):
        size = next(iter(specs.values())).size
        if size == 32 and not sizes.count(32):
            sizes.append(32)
            raise KeyboardInterrupt
        sizes.append(size)
        return real(specs, *rest)

    monkeypatch.setattr(run, "measure", interrupted)
    wanted = options(tmp_path, ("window",), what=("infer",))
    with pytest.raises(KeyboardInterrupt):
        run_scale(wanted, quiet)
    assert [p.size for p in run_scale(wanted, quiet).points] == [16, 32]
    assert sizes == [16, 32, 32]


@pytest.mark.parametrize("scope", ["block", "model"])
def test_blocks_and_models_are_swept_and_reconciled(scope):
    backbone = run._backbone(SweepOptions(scope=scope))
    spec = Spec("window", {}, scope, "infer", 32, 16, 1, backbone)
    module = build(spec)
    found = count_module(module, spec.shape)
    assert reconcile(closed_form(module, spec), found.macs, found.uncounted) is None


@pytest.mark.parametrize("scope", ["attention", "block", "model"])
def test_a_point_knows_what_the_definition_needs_where_more_is_executed(scope):
    config = Backbone(width=32, head_dim=32, blocks=(1,), attention_levels=(1,))
    excess = {}
    for method in ("local", "window"):
        spec = Spec(method, {}, scope, "infer", 32, 32, 1, config)
        module = build(spec)
        needed = needed_macs(module, spec)
        excess[method] = None if needed is None else closed_form(module, spec) - needed
    assert excess == {"local": 2 * 32**3 * (14**2 - 7**2), "window": None}


def test_both_counts_of_a_method_that_executes_more_than_it_needs_stand_in_the_sweep():
    [point] = points((256,), lambda s: 1.0, macs_needed=1_190_000_000)
    point = point.model_copy(update={"macs_closed": 1_570_000_000})
    sweep = Sweep(
        key="0", scope="model", dim=16, heads=1, device="cpu", threads=1, memory_limit=1, budget=1,
        methods={"m": ("m", {})}, environment=ENVIRONMENT, points=(point,),
    )  # fmt: skip
    expected = "m executes 1.57 GMACs in a forward pass at 256 px, of which its definition needs 1.19."
    assert expected in sweep_markdown(sweep)
    assert expected in sweep_summary(sweep)
    [row] = csv.DictReader(sweep_csv(sweep).splitlines())
    assert float(row["closed_form_forward_gmacs"]) == 1.57
    assert float(row["needed_forward_gmacs"]) == 1.19


def test_what_would_not_fit_is_told_with_its_need_and_not_tried(tmp_path, quiet):
    label = "global:form=materialised"
    sweep = run_scale(options(tmp_path, (label,), what=("infer",), sizes="16,4096", memory="1GiB"), quiet)
    point = sweep.curve(label, "infer")[1]
    assert point.status == "oom"
    assert "PiB, not tried" in (point.reason or "")


def test_a_short_sweep_brackets_the_budget_with_predicted_sizes_and_a_new_budget_moves_them(
    tmp_path, quiet, monkeypatch
):
    def predict(specs, sweep, _):
        return [measuring._predicted(label, spec, sweep) for label, spec in specs.items()]

    monkeypatch.setattr(run, "measure", predict)
    asked = options(tmp_path, ("window",), what=("infer", "train"), sizes="16,32", budget="64MiB")
    sweep = run_scale(asked, quiet)
    for what in ("infer", "train"):
        *_, last, past = sweep.curve("window", what)
        assert last.bytes <= 64 << 20 < past.bytes
        assert past.size <= 2 * last.size
        assert (past.status, past.reason) == ("predicted", BRACKET)
        found = largest(sweep, "window", what)
        assert last.size <= found.low <= found.side <= found.high <= past.size
    again = run_scale(options(tmp_path, ("window",), what=("infer", "train"), budget="256MiB"), quiet)
    assert largest(again, "window", "infer").side == pytest.approx(2 * largest(sweep, "window", "infer").side, rel=0.05)
    stored = Sweep.model_validate_json((tmp_path / "scale.json").read_text())
    assert len({(p.what, p.size) for p in stored.points}) == len(stored.points)
    assert {p.size for p in stored.points if p.reason is None} == {16, 32}


def test_a_child_of_a_method_without_an_attention_is_refused():
    with pytest.raises(InputError, match="has no class Attention"):
        build(Spec("nlm", {}, "attention", "infer", 16, 16, 1))


def test_a_method_that_cannot_be_counted_is_refused_with_the_line_that_says_so(tmp_path, quiet):
    file = method_file(tmp_path, "bare", "pass")
    text = (tmp_path / "bare.py").read_text().replace("return self.proj(x)", "raise NotImplementedError")
    (tmp_path / "bare.py").write_text(text)
    with pytest.raises(
        InputError, match=r"\(NotImplementedError: no message at .*bare.py:\d+ in forward\); its forward"
    ):
        run_scale(options(tmp_path / "out", (file,)), quiet)


def test_where_the_resident_set_cannot_be_read_the_point_is_still_measured(monkeypatch):
    def missing(call):
        raise FileNotFoundError(2, "No such file or directory", "/proc/self/clear_refs")

    monkeypatch.setattr(worker, "resident_peak_bytes", missing)
    bench = worker.Bench(Spec("window", {}, "attention", "infer", 16, 16, 1), torch.device("cpu"), 1 << 60)
    monkeypatch.setattr(worker, "_limit", lambda device, limit: None)  # of this process
    assert bench.answer("resident") is None


def test_an_error_in_a_child_reaches_the_parent_as_words():
    spec = Spec("kit", {"patch": 0}, "attention", "infer", 16, 16, 1)
    with Child(spec, torch.device("cpu"), 1, 1 << 30) as child, pytest.raises(Failed, match="patch") as caught:
        child.measure(60)
    assert caught.value.outcome == "failed"


def test_the_time_of_a_point_is_guessed_from_the_last_smaller_one():
    sweep = Sweep.model_construct(points=tuple(points((64, 128), lambda s: s**2 / 1e4)))
    unknown = points((256,), lambda s: 1.0)[0].model_copy(update={"macs": 4})
    assert guess_seconds(unknown, sweep) == pytest.approx(4 * 128**2 / 1e4)
    assert guess_seconds(points((64,), lambda s: 1.0)[0], sweep) is None


def test_a_prediction_is_corrected_by_what_both_of_the_next_smaller_sizes_measured_beyond_theirs():
    """A buffer of a fixed size raises the ratio of the smaller one alone, and is ignored."""
    spec = Spec("window", {}, "attention", "infer", 64, 16, 1)

    def sweep(*peaks):
        sizes = (16, 32, 48)[: len(peaks)]
        made = [p.model_copy(update={"method": "m", "raw_bytes": 100}) for p in points(sizes, lambda s: 1)]
        stored = [p.model_copy(update={"peak_bytes": peak}) for p, peak in zip(made, peaks, strict=True)]
        return Sweep.model_construct(points=tuple(stored), memory_limit=1000)

    found = [
        measuring._correction("m", spec, sweep(*peaks)) for peaks in ((200,), (300, 150, 120), (90, 150), (150, 90))
    ]
    assert found == [1.0, 1.2, 1.0, 1.0]


def test_a_point_needs_a_margin_over_its_prediction_to_be_tried(tmp_path):
    sweep = Sweep.model_construct(points=(), memory_limit=1000)
    tried, refused = points((64,), lambda s: 909)[0], points((64,), lambda s: 910)[0]
    assert measuring._not_to_be_run(tried, None, sweep, options(tmp_path, ("window",))) is None
    assert measuring._not_to_be_run(refused, None, sweep, options(tmp_path, ("window",)))["status"] == "oom"


def test_sizes_memory_and_methods_are_parsed():
    assert parse_sizes("64:600") == [64, 128, 256, 512]
    assert parse_sizes("96,64") == [64, 96]
    assert parse_bytes("8GiB") == 8 << 30
    assert parse_bytes("1.5 GB") == 1_500_000_000
    assert parse_bytes("1000000B") == 1_000_000
    assert parse_method("kit:k=8:retrieval=exact:tau=0.5") == ("kit", {"k": 8, "retrieval": "exact", "tau": 0.5})
    assert byte_size(71.2 * 2**30) == "71.2 GiB"
    assert byte_size(350 << 20) == "350 MiB"


@pytest.mark.parametrize("text", ["64-128", "128:64", "", "0:64", "a,b", "64:100000000"])
def test_sizes_that_make_no_sense_are_refused(text):
    with pytest.raises(InputError, match="--sizes"):
        parse_sizes(text)


@pytest.mark.parametrize("text", ["8 apples", "-1GiB", "0", ""])
def test_memory_that_makes_no_sense_is_refused(text):
    with pytest.raises(InputError, match="amount of memory"):
        parse_bytes(text)


@pytest.mark.parametrize("methods", [("kitt",), ("kit:k",), ("kit:kk=3",), ("kit:k=many",), ("kit", "kit"), ("nlm",)])
def test_methods_that_make_no_sense_are_refused_before_anything_is_written(methods, tmp_path, quiet):
    with pytest.raises(InputError):
        run_scale(options(tmp_path / "out", methods), quiet)
    assert not (tmp_path / "out").exists()


def test_the_command_line_sweeps_by_default_what_the_room_does():
    given = cli.commands["scale"].make_context("scale", []).params
    default = SweepOptions()
    assert tuple(given.pop("method")) == default.methods
    assert given.pop("what") == ",".join(default.what)
    assert {name: value for name, value in given.items() if value != getattr(default, name)} == {}


def test_a_foreign_file_in_the_folder_is_not_overwritten(tmp_path, quiet):
    (tmp_path / "scale.json").write_text(json.dumps({"mine": 1}))
    with pytest.raises(InputError, match="move it away"):
        run_scale(options(tmp_path, ("window",)), quiet)
    assert json.loads((tmp_path / "scale.json").read_text()) == {"mine": 1}
