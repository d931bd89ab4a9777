"""What a person sees: tables whose figures are never cut, one bar or a line now and then, errors in one line."""

import io

import pytest
from rich.console import Console

from kncompress import terminal
from kncompress.terminal import Progress, clock, first_line, markdown_table, named_line, plain, show, table, text_table

HEAD, ROWS = ("map", "parameters"), [("layers.0.mlp.up [2x1]", "1,024"), ("head", "38,597,376"), ("a|b",)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_figures_end_in_one_column_and_brackets_are_no_markup():
    assert text_table(HEAD, ROWS, "<>").splitlines() == [
        "map                    parameters",
        "layers.0.mlp.up [2x1]       1,024",
        "head                   38,597,376",
        "a|b",
    ]


def test_a_narrow_terminal_cuts_no_figure():
    stream = Terminal()
    show(table(HEAD, ROWS, "<>", ruled=True), console=Console(file=stream, width=12, force_terminal=True))
    assert all(cell in stream.getvalue() for row in ROWS for cell in row)
    wide = table(("prompt",), [["x" * 400]], "<")
    assert plain(wide, "after it").splitlines() == ["prompt", "x" * 400, "after it"]


def test_markdown_is_aligned_and_a_bar_begins_no_cell():
    lines = markdown_table(HEAD, [*ROWS[:2], ("a|b", "")], "<>").splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split("|")[1:3] == [f" {'-' * 21} ", f" {'-' * 9}: "] and lines[-1].startswith("| a\\|b ")


@pytest.mark.parametrize(
    ("error", "line", "named"),
    [
        (ValueError("no such shape\nat all"), "no such shape", "ValueError: no such shape"),
        (ValueError("\n  later"), "later", "ValueError: later"),
        (TimeoutError(), "TimeoutError", "TimeoutError"),
    ],
)
def test_an_error_is_one_line(error, line, named):
    assert (first_line(error), named_line(error)) == (line, named)


def test_a_log_has_a_line_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with Progress("fitting", stream=stream) as progress:
        for second in range(25):
            now[0] = float(second)
            if progress.due:
                progress.show(second / 25, f"{second} of 25")
        progress.say("a line between")
    assert stream.getvalue().splitlines() == ["fitting  10 of 25", "fitting  20 of 25", "a line between"]


@pytest.mark.parametrize("kept", [True, False])
def test_a_terminal_has_one_bar_and_is_given_back(monkeypatch, kept):
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    stream = Terminal()
    with pytest.raises(ZeroDivisionError), Progress("fitting [q]", stream=stream, kept=kept) as progress:
        assert not progress.due  # quick work shows nothing
        now[0] = 2.0
        assert progress.due
        progress.show(0.5, "half [s]")
        assert not progress.due
        progress.say("said")
        raise ZeroDivisionError
    text = stream.getvalue()
    assert "fitting [q]" in text and "half [s]" in text and text.count("said") == 1
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # cursor hidden, cursor back
    assert text.endswith("half [s]\n\x1b[?25h") == kept


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0:00"), (200, "3:20"), (59.7, "1:00"), (3723, "1:02:03"), (360000, "100:00:00")],
)
def test_clock(seconds, text):
    assert clock(seconds) == text
