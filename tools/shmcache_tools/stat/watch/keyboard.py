"""Keys as they are pressed, from a terminal on standard input."""

from __future__ import annotations

import contextlib
import os
import re
import termios
import tty
from typing import Final

_SEQUENCES: Final = {
    **dict.fromkeys((b"\x1b[A", b"\x1bOA"), "up"),
    **dict.fromkeys((b"\x1b[B", b"\x1bOB"), "down"),
    **dict.fromkeys((b"\x1b[H", b"\x1bOH", b"\x1b[1~", b"\x1b[7~"), "home"),
    **dict.fromkeys((b"\x1b[F", b"\x1bOF", b"\x1b[4~", b"\x1b[8~"), "end"),
    b"\x1b[5~": "pgup",
    b"\x1b[6~": "pgdn",
}
_KEY = re.compile(rb"\x1b\[[0-9;?<=>]*[ -/]*[@-~]|\x1bO.|\x1b[^\[O]|[^\x1b]", re.DOTALL)


def decode(received: bytes) -> tuple[list[str], bytes]:
    """The keys in what a terminal sent, and the begin of one whose end is still to come.

    A key is its character, or ``up``, ``down``, ``pgup``, ``pgdn``, ``home``, ``end``; others are left out.
    """
    keys, place = [], 0
    while found := _KEY.match(received, place):
        place = found.end()
        sent = found.group()
        if key := _SEQUENCES.get(sent) or (chr(sent[0]) if len(sent) == 1 and sent.isascii() else None):
            keys.append(key)
    return keys, received[place:]


class Keyboard:
    """The keys of one terminal, by its descriptor; termios.error where it is none."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._before = termios.tcgetattr(fd)
        self._rest = b""

    def open(self) -> None:
        """From now on keys come one by one, and are not echoed."""
        tty.setcbreak(self.fd)

    def close(self) -> None:
        """The terminal is as it was before. Bears that it has gone."""
        with contextlib.suppress(termios.error):
            termios.tcsetattr(self.fd, termios.TCSADRAIN, self._before)

    def read(self) -> list[str] | None:
        """The keys that were pressed, once there are any; None: the terminal has gone."""
        try:
            received = os.read(self.fd, 1024)
        except OSError:
            return None
        keys, rest = decode(self._rest + received)
        self._rest = rest[-32:]
        return keys if received else None
