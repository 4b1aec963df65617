"""What is written and what stops it; colours, help, and files that are refused before any work."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from kitbench.cli.main import cli
from kitbench.data.cards import Card
from kitbench.errors import Interrupted
from tests.cli.conftest import call
from tests.stored import store


@pytest.mark.parametrize(
    ("out", "sentence"),
    [("folder", "is a folder; give the path of a file."), ("file/t", "cannot be written (Not a")],
)
def test_an_out_that_cannot_be_a_file_is_refused_before_the_work(here: Path, out: str, sentence: str) -> None:
    store(here / "results", "kit", 30.0)
    (here / "file").touch()
    for words, suffix in (
        (("table", "results"), ".csv"),
        (("export", "results"), ".csv"),
        (("report", "results"), ".html"),
        (("score", "none", "none", "--protocol", "awgn8"), ".csv"),
        (("pools", "none", "--stored"), ".md"),
        (("retrieval", "none"), ".md"),
    ):
        (here / f"folder{suffix}").mkdir(exist_ok=True)
        done = call(*words, "--out", f"{out}{suffix}", code=2)
        assert sentence in done.stderr, words
        assert done.stderr.count("\n") == 1


def test_ctrl_c_has_the_exit_code_of_an_interruption_and_not_of_a_failed_check(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(paths: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kitbench.store.folder.find", stop)
    done = call("check", "results", "--against", "reference.json", code=3)
    assert done.stderr == "kitbench: stopped; what was stored before is kept\n"


def test_ctrl_c_ends_downloads_at_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    def endless(card: Card, root: Path, report: Callable[[str, int, int | None], None]) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for number in range(2000):
            try:
                report(card.name, number, None)
            except Interrupted:
                ended.append(card.name)
                raise
            time.sleep(0.005)

    monkeypatch.setattr("kitbench.data.fetch.fetch", endless)
    # A shell that starts the tests in the background has them ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = call("data", "fetch", "Set12", "--data", "sets", code=3)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.stderr == "kitbench: stopped; the same command continues the downloads\n"
    end = time.monotonic() + 5
    while not ended and time.monotonic() < end:
        time.sleep(0.005)
    assert ended == ["Set12"]


def commands() -> list[click.Command]:
    return [
        one
        for command in cli.commands.values()
        for one in (command, *(command.commands.values() if isinstance(command, click.Group) else ()))
    ]


def test_a_word_in_place_of_a_number_is_told_in_words() -> None:
    assert "'abc' is not a valid integer." in call("tune", "--suite", "denoise", "--seed", "abc", code=2).stderr
    assert "'much' is not a valid number." in call("scale", "--patience", "much", code=2).stderr


def test_scale_refuses_what_has_no_attention(here: Path) -> None:
    for name in ("dncnn", "nlm"):
        refused = call("scale", "--method", name, "--sizes", "64", code=2).stderr
        assert f"Method '{name}' has no class Attention; the sweep measures attentions" in refused


def test_tables_have_no_blanks_at_the_ends_of_lines(here: Path) -> None:
    store(here / "results", "kit", 30.0)
    for words in (["list"], ["data", "list"], ["status", "results"]):
        lines = call(*words).stdout.splitlines()
        assert len(lines) > 2
        assert not [line for line in lines if line != line.rstrip()]


def test_errors_are_red_unless_no_colour_is_wanted(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def printed() -> str:
        return CliRunner().invoke(cli, ["table", "nowhere"], color=True).stderr

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert printed().startswith("\x1b[31mkitbench: nowhere")
    monkeypatch.setenv("NO_COLOR", "1")
    assert printed().startswith("kitbench: nowhere")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["run", "--help"], ["list"]])
def test_output_that_cannot_be_written_is_one_sentence(words: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "kitbench", *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert ended.returncode == 3
    assert re.fullmatch(r"kitbench: no space is left where the output goes; .*\n", ended.stderr), ended.stderr


@pytest.mark.parametrize("group", ["", "data"])
def test_no_summary_of_a_command_is_cut_off(group: str) -> None:
    lines = call(*group.split(), "--help").stdout.splitlines()
    assert not [line for line in lines[1:] if line.endswith("...")]
    assert all(len(line) <= 80 for line in lines)


def test_every_option_is_described_and_says_its_default() -> None:
    for command in commands():
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                assert option.help, (command.name, option.name)
                assert not option.help.startswith("Of "), (command.name, option.help)
    text = " ".join(call("run", "--help").stdout.split())
    for default in ("--seeds", "--preset"):
        line = text[text.index(default) :][:160]
        assert "by default" in line, default


def test_completion_is_offered_by_the_installed_command() -> None:
    """As docs/running.md says."""
    code = "from kitbench.cli.main import cli; cli(prog_name='kitbench')"
    environment = os.environ | {"_KITBENCH_COMPLETE": "bash_complete", "COMP_WORDS": "kitbench cur", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "plain,curves\n"


@pytest.mark.parametrize("command", ["claims", "curves", "anchors", "retrieval", "pools", "table"])
def test_a_file_whose_suffix_asks_for_another_format_is_refused_before_anything_is_read(
    here: Path, command: str
) -> None:
    said = call(command, "results", "--out", "page.html", code=2).stderr
    assert "has no format html, which --out page.html asks for; it has" in said
    assert not list(here.glob("page*"))


def test_a_report_is_html_whatever_its_file_is_called(here: Path) -> None:
    assert "the report is an HTML page" in call("report", "results", "--out", "page.pdf", code=2).stderr
    assert not list(here.glob("page*"))
