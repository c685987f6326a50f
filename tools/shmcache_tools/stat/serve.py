"""``shmcache-stat --serve-metrics``: a Prometheus endpoint beside the engines, for any number of arenas."""

from __future__ import annotations

import argparse
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import TYPE_CHECKING, Final

from shmcache_tools.text import EXIT_DONE, EXIT_FAILED, complain

if TYPE_CHECKING:
    from shmcache.metrics import Collector

DASHBOARD: Final = Path(__file__).with_name("dashboard.json")  #: for Grafana

_PROG: Final = "shmcache-stat"
_HERE: Final = "127.0.0.1"
_ADDRESS: Final = re.compile(r"(?:(?:\[([^\[\]]+)\]|([^\s/:\[\]]+)):)?([0-9]{1,5})", re.ASCII)
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def address(text: str) -> tuple[str, int]:
    """An argparse type: ``[HOST:]PORT`` as host and port."""
    found = _ADDRESS.fullmatch(text)
    if found is None or int(found[3]) > 65535:
        raise argparse.ArgumentTypeError(
            f"expected [HOST:]PORT, as 9464, 0.0.0.0:9464 or [::1]:9464, and a port up to 65535 (0: any), got {text!r}"
        )
    return found[1] or found[2] or _HERE, int(found[3])


def serve_metrics(name: str | None, host: str, port: int) -> int:
    """Serves the arena ``name``, or all of this user, until a signal asks for the end; the exit code."""
    shown = f"[{host}]" if ":" in host else host
    try:
        from shmcache.metrics import Collector  # noqa: PLC0415 # an extra, imported where it is needed
    except ModuleNotFoundError as error:
        complain(_PROG, str(error))
        return EXIT_FAILED
    try:
        with _serving(Collector(*filter(None, [name])), host, port) as bound:
            asked = _note_signals()
            what = "all arenas of this user" if name is None else f"the arena {name}"
            print(f"serving http://{shown}:{bound}/metrics of {what}; dashboard: {DASHBOARD}", flush=True)
            asked.get()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        complain(_PROG, f"cannot serve on {shown}:{port}: {reason}; give another [HOST:]PORT")
        return EXIT_FAILED
    return EXIT_DONE


def _note_signals() -> SimpleQueue[int]:
    """Where signals that ask for the end are put from now on: the process is to end at the first one."""
    asked: SimpleQueue[int] = SimpleQueue()

    def note(signum: int, _: FrameType | None) -> None:
        asked.put(signum)
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)  # who asks twice does not disturb the end

    for each in _SIGNALS:
        if signal.getsignal(each) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(each, note)
    return asked


@contextmanager
def _serving(collector: Collector, host: str, port: int) -> Iterator[int]:
    """Answers scrapes for the time of the block; the port."""
    from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server  # noqa: PLC0415

    registry = CollectorRegistry()
    registry.register(collector)
    ProcessCollector(registry=registry)  # what looking costs
    server, thread = start_http_server(port, host, registry)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
