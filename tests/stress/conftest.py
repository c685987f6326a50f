"""Other processes in the test's arena, as in ``processes``."""

from processes.conftest import chance, enlist, start

__all__ = ["chance", "enlist", "start"]
