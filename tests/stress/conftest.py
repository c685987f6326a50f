"""Other processes in the test's arena, as in ``processes``."""

from processes.conftest import enlist, start

__all__ = ["enlist", "start"]
