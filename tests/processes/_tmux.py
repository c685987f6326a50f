"""A terminal that a test types into and looks at: one window of a tmux server of its own."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from arena_support import TIMEOUT_S

_NAP_S = 0.05


class Tmux:
    """One window, at first of 80 by 24 cells, in which a shell runs."""

    def __init__(self, folder: Path) -> None:
        self._environ = {**os.environ, "TMUX_TMPDIR": str(folder), "LC_ALL": "C.UTF-8", "PS1": "$ "}
        for name in ("TMUX", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "ENV"):
            self._environ.pop(name, None)
        self._tmux("new-session", "-d", "-x", "80", "-y", "24", "sh", "-i")

    def type(self, line: str) -> None:
        """A line into the shell, or whatever reads the terminal."""
        self._tmux("send-keys", "-l", line)
        self.press("Enter")

    def run(self, *command: str) -> None:
        """Has the shell run a program; how it ended is told by ``ended``."""
        self.type(f"clear; {shlex.join(command)}; echo ended'='$?")

    def press(self, *keys: str) -> None:
        """Keys as tmux names them."""
        self._tmux("send-keys", *keys)

    def resize(self, width: int, height: int) -> None:
        self._tmux("resize-window", "-x", str(width), "-y", str(height))

    def lines(self, *, escapes: bool = False) -> list[str]:
        """What is seen, line by line."""
        return self._tmux("capture-pane", "-p", *(["-e"] if escapes else [])).splitlines()

    def text(self) -> str:
        """What is seen, with one space between words."""
        return "\n".join(" ".join(line.split()) for line in self.lines())

    def wait_for(self, *words: str) -> str:
        """Waits until all of these are seen; what is seen then."""
        return self.wait_until(lambda text: all(word in text for word in words), f"{words}")

    def wait_match(self, pattern: str) -> str:
        """The same until ``pattern`` is found; ``^`` and ``$`` are of lines."""
        return self.wait_until(lambda text: bool(re.search(pattern, text, re.MULTILINE)), pattern)

    def wait_until(self, holds: Callable[[str], bool], what: str) -> str:
        """The same for what ``holds`` of the text."""
        seen = ""

        def look() -> bool:
            nonlocal seen
            seen = self.text()
            return holds(seen)

        self.wait(look, lambda: f"{what}; seen is:\n{seen}")
        return seen

    def wait_full_screen(self) -> None:
        """Waits until a program has the other screen; fails at once where it has ended."""
        self.wait(lambda: self.full_screen or "ended=" in self.text(), self.text)
        assert self.full_screen, self.text()

    def wait(self, holds: Callable[[], bool], what: Callable[[], str] = str) -> None:
        """Waits until ``holds``. Not too often: each look is a process."""
        deadline = time.monotonic() + TIMEOUT_S
        while not holds():
            if time.monotonic() > deadline:
                pytest.fail(f"waited in vain for {what()}")
            time.sleep(_NAP_S)

    @property
    def full_screen(self) -> bool:
        """Whether a program has the other screen."""
        return self._fact("alternate_on") == "1"

    @property
    def cursor_shown(self) -> bool:
        return self._fact("cursor_flag") == "1"

    @property
    def child(self) -> int:
        """The process that the shell has started."""
        shell = self._fact("pane_pid")
        (pid,) = Path(f"/proc/{shell}/task/{shell}/children").read_text(encoding="ascii").split()
        return int(pid)

    def modes(self) -> set[str]:
        """The terminal's modes, as ``stty -a`` names them."""
        tty = self._fact("pane_tty")
        return set(subprocess.run(["stty", "-a", "-F", tty], capture_output=True, text=True, check=True).stdout.split())

    def close(self) -> None:
        """Bears that it is closed."""
        with contextlib.suppress(AssertionError):
            self._tmux("kill-server")

    def _fact(self, name: str) -> str:
        return self._tmux("display-message", "-p", f"#{{{name}}}").strip()

    def _tmux(self, *words: str) -> str:
        command = ["tmux", "-u", "-f", "/dev/null", "-L", "test", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=self._environ, check=False, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout


@contextmanager
def tmux_window() -> Iterator[Tmux]:
    """A window, gone at the end; skips the test where there is no tmux, but not in CI."""
    if shutil.which("tmux") is None and not os.environ.get("CI"):
        pytest.skip("tmux is not installed")
    with tempfile.TemporaryDirectory(prefix="tmux-") as folder:  # a short path: it is a socket's
        window = Tmux(Path(folder))
        try:
            yield window
        finally:
            window.close()
