"""``shmcache-stat --watch``: again and again, on the whole terminal or line by line into a pipe."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import termios
import time
from typing import Final

from rich.console import Console

from shmcache_tools.program import Interrupted, Interrupts, noted_interrupts
from shmcache_tools.stat.views import View
from shmcache_tools.stat.watch.history import History, look_into
from shmcache_tools.stat.watch.keyboard import Keyboard
from shmcache_tools.stat.watch.lines import Lines
from shmcache_tools.stat.watch.live import SIGNALS, Live, next_due
from shmcache_tools.stat.watch.wakeups import Wakeups, wakeups
from shmcache_tools.text import EXIT_DONE, EXIT_FAILED, complain, make_console

_PROG: Final = "shmcache-stat"
_FIRST_S: Final = 0.25  #: over which the first line tells what goes on
_READER_GONE: Final = (errno.EPIPE, errno.EIO)  #: a pipe's, a terminal's


def watch(view: View, interval_s: float) -> int:
    """Shows the view again and again until q, or until a signal or the reader ends it; the exit code."""
    console = make_console()
    try:
        with noted_interrupts() as interrupts:
            if sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal:
                with wakeups(*SIGNALS) as waker:
                    Live(view, interval_s, console, _keyboard()).run(waker, interrupts)
            else:
                with wakeups() as waker:
                    _print_lines(view, interval_s, console, waker, interrupts)
    except Interrupted as interrupted:
        return EXIT_DONE if interrupted.signum == signal.SIGINT else 128 + interrupted.signum
    except OSError as error:  # of the output: those of looking are shown
        _forget_output()
        if error.errno in _READER_GONE:
            return EXIT_DONE
        complain(_PROG, str(error))
        return EXIT_FAILED
    return EXIT_DONE


def _print_lines(view: View, interval_s: float, console: Console, waker: Wakeups, interrupts: Interrupts) -> None:
    """For ever."""
    history, observer, lines = History(), view.observer(), Lines(view, console)
    look_into(history, observer)
    due = time.monotonic() + min(_FIRST_S, interval_s)
    while True:
        while (left := due - time.monotonic()) > 0:
            waker.wait(left)
            interrupts.check()
        look_into(history, observer)
        sys.stdout.write(lines.of(history))
        sys.stdout.flush()
        due = next_due(due, interval_s)


def _keyboard() -> Keyboard | None:
    """None where standard input is no terminal."""
    try:
        return Keyboard(sys.stdin.fileno())
    except (AttributeError, ValueError, OSError, termios.error):
        return None


def _forget_output() -> None:
    """What is left of it in buffers must not fail again at the end."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
