"""What commands print, where a terminal is and where none is."""

from __future__ import annotations

import sys
import time

import pytest

from memkv_engines.cli.tier.printing import human_age, human_size, plain, progress, table


def test_progress_is_shown_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        with progress(2048) as bar:
            bar.bytes(1024)
        assert ("2.00k" in capsys.readouterr().err) is terminal


def test_without_tqdm_there_is_no_progress_and_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with progress(2048) as bar:
        bar.bytes(1024)
    assert capsys.readouterr().err == ""


def test_what_comes_from_a_disk_does_not_move_the_cursor() -> None:
    assert plain("a\x1b[31m\n\udcffé") == "a\\x1b[31m\\n\\udcffé"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB"), (3 << 50, "3,072.0 TiB")]
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert human_size(count) == text


@pytest.mark.parametrize(
    ("age_s", "text"),
    [(5, "5 s ago"), (600, "10 min ago"), (86_400, "24 h ago"), (10 * 86_400, "10 d ago"), (-60, "in the future")],
)
def test_ages_for_people(age_s: int, text: str) -> None:
    assert human_age(time.time_ns() - age_s * 10**9) == text
    assert human_age(0) == "-"


def test_a_table_lines_up() -> None:
    assert table([("A", "LONG"), ("bbb", "c")]) == "A    LONG\nbbb  c"
