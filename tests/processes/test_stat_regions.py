"""shmcache-stat, and a scrape, of a real arena with regions of device memory, while their owners live and after."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cuda_double
import jsonschema
import pytest
from arena_support import TIMEOUT_S
from processes._crew import Member
from processes._tmux import tmux_window
from prometheus_client import CollectorRegistry, generate_latest

import shmcache
from shmcache.metrics import Collector
from shmcache_tools.stat.documents import json_schema

_BLOCK = 4096


def _stat(*arguments: str | Path) -> str:
    """What the installed program prints into a pipe."""
    script = Path(sys.executable).with_name("shmcache-stat")
    done = subprocess.run([script, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    return done.stdout


def _rows(text: str) -> list[str]:
    """With one space between words."""
    return [" ".join(line.split()) for line in text.splitlines()]


def _regions(arena: str) -> list[list[str]]:
    """The words of each line of the table of regions."""
    rows = _rows(_stat(arena))
    first = next((place for place, row in enumerate(rows) if row.startswith("region device uuid")), len(rows))
    return [row.split() for row in rows[first + 1 :] if " GPU-" in row]


def _document(arena: str, *options: str) -> Any:
    document = json.loads(_stat(arena, "--json", *options))
    jsonschema.Draft202012Validator(json_schema()).validate(document)
    return document["arenas"][0]


def _scraped(arena: str, name: str) -> dict[str, float]:
    """The values of a family, by region and state."""
    registry = CollectorRegistry()
    registry.register(Collector(arena))
    found = re.findall(rf"^{name}{{(.*)}} (\S+)$", generate_latest(registry).decode(), re.MULTILINE)
    labels = [(dict(re.findall(r'(\w+)="([^"]*)"', text)), float(value)) for text, value in found]
    return {" ".join([each["region"], *filter(None, [each.get("state")])]): value for each, value in labels}


@pytest.fixture
def on_gpus(tmp_path: Path, enlist: Callable[..., Member]) -> Iterator[Callable[..., Member]]:
    """Starts a process of the arena that sees two GPUs, which are not there."""
    root = tmp_path / "gpus"
    root.mkdir()

    def start(rank: int) -> Member:
        member = enlist("engine", rank, 3)
        member.do(f"import cuda_double; driver = cuda_double.install({str(root)!r}, devices=2, torch=False)")
        return member

    yield start
    assert cuda_double.violations(root) == []


@pytest.fixture
def owner(on_gpus: Callable[..., Member]) -> Member:
    """Owns a region on each GPU, with an object in the first."""
    owner = on_gpus(0)
    owner.do("numbers = cache.add_region('cuda:0', '64KiB'), cache.add_region('cuda:1', '4MiB')")
    assert owner.do("numbers") == (1, 2)
    owner.do(f"batch = cache.reserve_write([b'there'], {2 * _BLOCK}, region=1); batch.publish()")
    return owner


@pytest.fixture
def reader(owner: Member, on_gpus: Callable[..., Member]) -> Member:
    """Has the owner's first region open, and a share of that object."""
    reader = on_gpus(1)
    reader.do(f"cache.open_region({owner.do('numbers[0]')}); batch = cache.read([b'there'])")
    return reader


def _kill(owner: Member, reader: Member) -> None:
    """And nobody reaps: a process that has a region open finds out what has become of it, unless it is stopped."""
    reader.stop()
    owner.kill()


def test_regions_of_the_living(arena: str, owner: Member, reader: Member) -> None:
    uuids = [region.uuid for region in shmcache.inspect(arena).regions]
    assert len(set(uuids)) == 2
    one, two = (" ".join(words) for words in _regions(arena))
    pid = owner.pid
    whose = rf"0 engine 0 {pid} \S+"
    assert re.fullmatch(rf"1 cuda:0 {uuids[0]} {whose} 64 KiB 8 KiB, 12.5 % 4 KiB {reader.do('cache.lane')} live", one)
    assert re.fullmatch(rf"2 cuda:1 {uuids[1]} {whose} 4 MiB 0 B, 0.0 % 16 KiB - live", two)
    text = _stat(arena)
    assert "devices 4.1 MiB in 2 regions of at most 8; 8 KiB used, 0.2 %" in _rows(text)
    assert "lost" not in text
    assert any(row.startswith(f"0 engine 0 {pid} ") and row.endswith(" 1-2") for row in _rows(text))
    assert "device memory" in _stat()


def test_what_kill_leaves_of_them(arena: str, owner: Member, reader: Member) -> None:
    _kill(owner, reader)
    one, two = _regions(arena)
    assert (one[0], one[-1], two[0], two[-1]) == ("1", "lost", "2", "lost")
    assert one[3:7] == ["0", "engine", "0", str(owner.pid)]
    text = _stat(arena)
    assert "lost: its owner is gone" in text
    assert f"to reap: shmcache-cleanup --reap {arena}\n" in text
    kept = rf"region 1 of {arena} is lost, but kept by lane \d+ \(64 KiB of its GPU"
    assert re.search(kept, text)
    assert text.rstrip().endswith(f"to see whose shares: shmcache-stat --shares {arena}")
    text = _stat(arena, "--shares")
    assert re.search(r"^held .* there +8 KiB +1 lost ", text, re.MULTILINE)
    assert text.rstrip().endswith(f"to end who does not let go: kill {reader.pid}")


def test_what_stays_of_them_after_a_reap(arena: str, owner: Member, reader: Member) -> None:
    owner.kill()
    reader.do("cache.reap()")  # frees the second, in which nothing lies
    (one,) = _regions(arena)
    assert " ".join(one[:7]) == f"1 cuda:0 {one[2]} 0 engine 0 {owner.pid}"  # who it was
    assert "to see whose shares" in _stat(arena)
    reader.do("batch.release(); cache.reap()")
    assert _regions(arena) == []
    assert "region" not in _stat(arena)


def test_a_successor_is_not_taken_for_the_owner(
    arena: str, owner: Member, reader: Member, on_gpus: Callable[..., Member]
) -> None:
    owner.kill()
    successor = on_gpus(0)
    assert successor.do("cache.lane") == 0
    pid = successor.pid
    assert successor.do("cache.add_region('cuda:1', '64KiB')") == 2
    one, two = (" ".join(words) for words in _regions(arena))
    assert re.match(r"1 cuda:0 GPU-\S+ 0 - - - - 64 KiB .* lost$", one)
    assert re.match(rf"2 cuda:1 GPU-\S+ 0 engine 0 {pid} .* live$", two)
    assert any(row.startswith(f"0 engine 0 {pid} ") and row.endswith(" 2") for row in _rows(_stat(arena)))
    assert reader.do("cache.status([b'there'])") == [shmcache.Status.LOST]


def test_live(arena: str, owner: Member, reader: Member) -> None:
    def line(number: int, rest: str) -> str:
        return rf"^region {number} cuda:{number - 1} GPU-\w{{8}} [█░]+ {rest}$"

    with tmux_window() as window:
        window.run(sys.executable, "-m", "shmcache_tools.stat", arena, "--watch", "0.1")
        window.wait_match(line(1, rf"12% of 64Ki pid {owner.pid} 1 open live"))
        window.wait_match(line(2, rf"0% of 4Mi pid {owner.pid} 0 open live"))
        _kill(owner, reader)
        window.wait_match(line(1, rf"12% of 64Ki pid {owner.pid} 1 open lost"))
        lost = next(row for row in window.lines(escapes=True) if "region 1 " in row)
        assert re.search(r"\x1b\[[\d;]*7[\d;]*m.*lost", lost)  # reversed
        reader.resume()  # it reaps, since it has a region open whose owner is gone
        window.wait_until(lambda text: "region 1 " in text and "region 2 " not in text, "the second is gone")
        reader.do("batch.release(); cache.reap()")
        window.wait_until(lambda text: "region " not in text, "both are gone")


@pytest.mark.parametrize("options", [(), ("--shares",), ("--map",)])
def test_json(arena: str, owner: Member, reader: Member, options: tuple[str, ...]) -> None:
    found = _document(arena, *options)
    assert [region["state"] for region in found["regions"]] == ["live", "live"]
    assert found["regions"][0]["opened"] == [reader.do("cache.lane")]
    assert found["regions"][0]["uuid"].startswith("GPU-")
    if options == ("--map",):
        assert [(each["region"], each["block"], each["blocks"]) for each in found["objects"]] == [(1, 0, 2)]
    if options == ("--shares",):
        assert [(each["region"], each["kind"]) for each in found["shares"]] == [(1, "held")]
    _kill(owner, reader)
    assert [region["state"] for region in _document(arena, *options)["regions"]] == ["lost", "lost"]


def test_maps(arena: str, owner: Member, reader: Member, tmp_path: Path) -> None:
    reader.do(f"cache.put(b'here', bytes({_BLOCK}))")
    text = _stat(arena, "--map")
    host, one, two = (re.escape(arena) + title for title in (" host memory  1 MiB", " region 1, cuda:0", " region 2"))
    assert re.search(rf"^{host} in 256 blocks of 4 KiB\n +0 KiB -\.{{63}}\n", text, re.MULTILINE)
    assert re.search(rf"^{one} GPU-\w{{8}}  64 KiB in 16 blocks of 4 KiB\n *0 KiB HH\.{{14}}\n", text, re.MULTILINE)
    assert re.search(rf"^{two}, cuda:1 GPU-\w{{8}}  4 MiB in 256 blocks of 16 KiB\n", text, re.MULTILINE)
    _kill(owner, reader)
    assert re.search(rf"^{one} GPU-\w{{8}}  LOST  64 KiB in 16 blocks", _stat(arena, "--map"), re.MULTILINE)
    for name in ("m.svg", "m.png"):
        assert _stat(arena, "--map", "--output", tmp_path / name) == f"wrote {tmp_path / name}\n"
    assert "LOST" in (tmp_path / "m.svg").read_text(encoding="utf-8")


def test_a_scrape(arena: str, owner: Member, reader: Member) -> None:
    assert _scraped(arena, "shmcache_region_capacity_bytes") == {"1": 2**16, "2": 2**22}
    assert _scraped(arena, "shmcache_region_used_bytes") == {"1": 2 * _BLOCK, "2": 0}
    assert _scraped(arena, "shmcache_region_openers") == {"1": 1, "2": 0}
    states = {"1 live": 1, "1 lost": 0, "2 live": 1, "2 lost": 0}
    assert _scraped(arena, "shmcache_region_state") == states
    _kill(owner, reader)
    assert _scraped(arena, "shmcache_region_state") == {state: 1 - value for state, value in states.items()}
    reader.kill()
    assert _scraped(arena, "shmcache_region_openers") == {"1": 0, "2": 0}


def test_who_has_pinned(arena: str, on_gpus: Callable[..., Member]) -> None:
    one, two = on_gpus(0), on_gpus(1)
    one.do("cache.pin()")
    text = _rows(_stat(arena))
    assert any(row.startswith(f"0 engine 0 {one.pid} ") and row.endswith(" 1 MiB") for row in text)
    assert any(row.startswith(f"1 engine 1 {two.pid} ") and row.endswith(" -") for row in text)
    one.kill()
    assert "pinned" not in _stat(arena)
