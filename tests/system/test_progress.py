"""Progress shows what it is told, on a terminal and elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kitbench.system.progress import progress


@pytest.mark.parametrize("terminal", [False, True])
def test_names_with_brackets_are_shown_as_they_are(terminal: bool) -> None:
    screen = io.StringIO()
    with progress(Console(file=screen, force_terminal=terminal, width=120), "[1/2] kit", 2) as update:
        update(0, "a [red] rose.png")
        update(2, "b [/red].png")
    said = screen.getvalue()
    assert "[1/2] kit" in said
    assert "b [/red].png" in said
    assert terminal or "a [red] rose.png" in said
