from __future__ import annotations

import io

import pytest

from shmcache_tools.text import (
    age_text,
    complain,
    make_console,
    make_table,
    percent_text,
    plural,
    printable,
    size_text,
    time_text,
)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (65536, "64 KiB"),
        (1536 * 1024, "1.5 MiB"),
        (512 * 2**20, "512 MiB"),
        (3 * 2**40, "3 TiB"),
        (5000 * 2**40, "5000 TiB"),
    ],
)
def test_size(size: int, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 ns"), (34e-9, "34 ns"), (1.25e-6, "1.25 us"), (0.31, "310 ms"), (12.5, "12.5 s")],
)
def test_time(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0 s"),
        (0, "0 s"),
        (41.9, "41 s"),
        (61, "1 min 1 s"),
        (3 * 3600 + 12 * 60 + 5, "3 h 12 min"),
        (86400, "1 d"),
        (86400 + 59, "1 d"),
    ],
)
def test_age(seconds: float, text: str) -> None:
    assert age_text(seconds) == text


def test_counts_and_fractions() -> None:
    assert plural(1, "lane") == "1 lane"
    assert plural(1200, "lane") == "1,200 lanes"
    assert percent_text(None) == "-"
    assert percent_text(0.2656) == "26.6 %"


def test_printable_leaves_nothing_that_a_terminal_obeys() -> None:
    assert printable("python \x1b[31m\x07x\r\n\u202e") == "python ?[31m?x???"
    assert printable("größe 1") == "größe 1"


def test_a_piped_table_is_neither_cut_nor_coloured() -> None:
    out = io.StringIO()
    table = make_table("name", "n", right=("n",))
    table.add_row("x" * 200, "1" * 100)
    make_console(out).print(table)
    assert "x" * 200 in out.getvalue()
    assert "1" * 100 in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_brackets_are_text() -> None:
    out = io.StringIO()
    make_console(out).print("[bold]engine[0]")
    assert out.getvalue() == "[bold]engine[0]\n"


def test_complaints_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    complain("prog", "no arena\x1b[2J")
    assert capsys.readouterr() == ("", "prog: no arena?[2J\n")
