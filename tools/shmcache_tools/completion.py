"""``--print-completion``: what a shell needs to complete the options of a program, names of arenas and files.

shtab writes the scripts, and is needed only when one is printed; this file adds how each shell lists its user's arenas.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from shmcache_tools.text import EXIT_FAILED, complain, say

SHELLS = ("bash", "zsh", "fish", "tcsh")

_LIST_ARENAS = {
    "bash": """\
_shmcache_arenas() {
  local segment prefix=${SHMCACHE_DIRECTORY:-/dev/shm}/shmcache.$EUID.
  for segment in "$prefix$1"*; do
    [[ -f $segment ]] && echo "${segment#"$prefix"}"
  done
}""",
    "zsh": """\
_shmcache_arenas() {
  local prefix=${SHMCACHE_DIRECTORY:-/dev/shm}/shmcache.$EUID.
  local -a segments=($prefix*(N.))
  compadd -- ${segments#$prefix}
}""",
    "fish": """\
function __shmcache_arenas
  set -l directory $SHMCACHE_DIRECTORY /dev/shm
  set -l prefix $directory[1]/shmcache.(id -u).
  for segment in $prefix*
    test -f $segment; and string replace -- $prefix '' $segment
  end
end""",
    # tcsh completes by patterns between slashes, in which this path could not stand.
    "tcsh": "set shmcache_prefix = `sh -c 'echo ${SHMCACHE_DIRECTORY:-/dev/shm}'`/shmcache.`id -u`.",
}
_ARENA = {
    "bash": "_shmcache_arenas",
    "zsh": "_shmcache_arenas",
    "fish": "(__shmcache_arenas)",
    "tcsh": '`sh -c "ls -d $shmcache_prefix*" | & sed -n s,^$shmcache_prefix,,p`',
}
_FILE = {
    "bash": "_shtab_compgen_files",
    "zsh": "_files",
    "fish": "(__fish_complete_path (commandline -ct))",
    "tcsh": "f",
}


def complete_arenas(action: argparse.Action) -> None:
    """Let the shell complete this argument with the names of arenas."""
    action.complete = _ARENA  # type: ignore[attr-defined] # what shtab looks for


def complete_files(action: argparse.Action) -> None:
    """Let the shell complete this argument with files."""
    action.complete = _FILE  # type: ignore[attr-defined]


class PrintCompletion(argparse.Action):
    """The option that prints the script for one of ``SHELLS``, and exits."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,  # noqa: ARG002 # argparse calls with it
        values: str | Sequence[Any] | None,
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        shell = str(values)
        try:
            import shtab  # noqa: PLC0415 # an extra
        except ImportError:
            complain(parser.prog, "--print-completion needs shtab: pip install 'shmcache[completion]'")
            parser.exit(EXIT_FAILED)
        say(shtab.complete(parser, shell, preamble=_LIST_ARENAS[shell]))
        parser.exit()
