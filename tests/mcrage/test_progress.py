import io
import sys

import pytest

from mcrage.progress import ProgressReport


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_elsewhere_there_is_a_line_now_and_then_and_one_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReport("round", 5, every=2) as progress:
        for number in range(5):
            progress.advance(f"loss {number}")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in lines] == ["round 2/5 loss 1", "round 4/5 loss 3", "round 5/5 loss 4"]


def test_a_terminal_gets_a_bar_with_the_note(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with ProgressReport("round", 3) as progress:
        for _ in range(3):
            progress.advance("loss 1.5")
    assert "3/3" in terminal.getvalue()
    assert "loss 1.5" in terminal.getvalue()


def test_nothing_is_said_when_it_is_switched_off(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReport("round", 1, enabled=False) as progress:
        progress.advance()
    assert capsys.readouterr().err == ""
