"""``shmcache-cleanup``: destroys arenas, or reaps what dead lanes left in them.

What is destroyed is decided by ``shmcache.destroy`` alone: it refuses while a lane is alive, whatever
was seen here before, so two cleanups at once, or an engine that attaches meanwhile, do no harm.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import shmcache
from shmcache.stats import ArenaInfo, LaneInfo, ReapReport
from shmcache_tools.look import look, look_at_all
from shmcache_tools.render import lane_text
from shmcache_tools.text import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_USAGE,
    complain,
    make_console,
    make_parser,
    plural,
    printable,
    size_text,
)

PROG = "shmcache-cleanup"

_DESCRIPTION = """\
Destroy arenas: those named, the stale ones (no process attached), or all of this user.
An arena with live lanes is refused unless --force; its processes keep what they have mapped
until they detach. With --reap nothing is destroyed: the shares and half-written objects that
dead lanes left are taken back."""
_EXAMPLES = """\
  shmcache-cleanup --stale             destroy every arena that nobody is attached to
  shmcache-cleanup --stale --dry-run   only say which, and why
  shmcache-cleanup engine-0            destroy one arena; refused while somebody lives there
  shmcache-cleanup --reap engine-0     take back what dead lanes left, keep the arena
  shmcache-cleanup --all --force --yes destroy everything, ask nothing

On a terminal it asks before it destroys, unless --yes.
exit codes: 0 done, 1 refused or failed, 2 usage"""


@dataclass(frozen=True, slots=True)
class Choice:
    """One arena that the arguments chose, as it was when we looked."""

    info: ArenaInfo
    force: bool

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def live(self) -> list[LaneInfo]:
        return [lane for lane in self.info.lanes if lane.state == "alive"]

    @property
    def refused(self) -> bool:
        unreadable = self.info.problem is not None and not self.info.old
        return (bool(self.live) or unreadable) and not self.force

    def why(self) -> str:
        """The reason for or against destroying it, with what would be lost."""
        if self.info.old:
            return f"made before the last boot; {size_text(self.info.segment_bytes)}"
        if self.info.problem is not None:
            return f"cannot be read: {printable(self.info.problem)}"
        if self.live:
            lanes = "; ".join(map(lane_text, self.live))
            return f"{plural(len(self.live), 'live lane')}: {lanes}"
        objects = self.info.stats.objects if self.info.stats else 0
        return f"stale, nobody is attached; {plural(objects, 'object')}, {size_text(self.info.segment_bytes)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; the exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    if [bool(options.names), options.stale, options.all].count(True) != 1:
        parser.error("give either names of arenas, or --stale, or --all")
    if options.force and (options.reap or options.stale):
        parser.error("--force is for what is alive: it does not go with --reap or --stale")
    try:
        choices = _choose(options)
    except ValueError as error:
        complain(PROG, str(error))
        return EXIT_USAGE
    if not choices and not options.names:
        _say("no stale arenas" if options.stale else "no arenas of this user")
    if options.reap:
        return _reap_all(choices, options.dry_run)
    return _destroy_all(choices, options)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(PROG, _DESCRIPTION, _EXAMPLES)
    parser.add_argument("names", nargs="*", metavar="NAME", help="an arena")
    parser.add_argument("--stale", action="store_true", help="every arena that nobody is attached to")
    parser.add_argument("--all", action="store_true", help="every arena of this user")
    parser.add_argument("--reap", action="store_true", help="take back what dead lanes left; destroy nothing")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done, and why")
    parser.add_argument("--force", action="store_true", help="destroy also while somebody is attached")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    return parser


def _choose(options: argparse.Namespace) -> list[Choice]:
    """Look at the arenas that the arguments name; one that is not there is told and left out."""
    if not options.names:
        return [Choice(info, options.force) for info in look_at_all() if info.stale or options.all]
    choices: list[Choice] = []
    for name in dict.fromkeys(options.names):
        if info := look(name):
            choices.append(Choice(info, options.force))
        else:
            _say(f"{name}: no such arena, nothing to do")
    return choices


def _destroy_all(choices: Sequence[Choice], options: argparse.Namespace) -> int:
    willing = [choice for choice in choices if not choice.refused]
    if options.dry_run:
        for choice in choices:
            _say(f"{choice.name}: {'would refuse' if choice.refused else 'would destroy'}, {choice.why()}")
        return EXIT_DONE if len(willing) == len(choices) else EXIT_FAILED
    if willing and not options.yes and not _confirmed(willing):
        _say("nothing destroyed")
        return EXIT_FAILED
    done = [_destroy(choice) for choice in choices]
    return EXIT_DONE if all(done) else EXIT_FAILED


def _confirmed(willing: Sequence[Choice]) -> bool:
    """Ask, where there is somebody to ask."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return True
    for choice in willing:
        _say(f"{choice.name}: {choice.why()}")
    try:
        # Not input(prompt), which may write its prompt to standard error.
        answer = make_console().input(f"Destroy {plural(len(willing), 'arena')}? [y/N] ", markup=False)
    except (EOFError, KeyboardInterrupt):
        _say("")
        return False
    return answer.strip().lower() in ("y", "yes")


def _destroy(choice: Choice) -> bool:
    """Destroy one arena; False where that was refused or failed."""
    if choice.refused:
        return _refuse(choice)
    try:
        shmcache.destroy(choice.name, force=choice.force)
    except shmcache.ArenaNotFoundError:
        _say(f"{choice.name}: is gone already")
    except shmcache.ShmcacheError as error:
        complain(PROG, str(error))
        return False
    else:
        _say(f"{choice.name}: destroyed ({choice.why()})")
    return True


def _refuse(choice: Choice) -> bool:
    remedy = "stop it first, or pass --force" if choice.live else "pass --force to destroy it nevertheless"
    complain(PROG, f"{choice.name}: refused, {choice.why()}; {remedy}")
    return False


def _reap_all(choices: Sequence[Choice], dry_run: bool) -> int:
    done = [_tell_dead(choice) if dry_run else _reap(choice) for choice in choices]
    return EXIT_DONE if all(done) else EXIT_FAILED


def _tell_dead(choice: Choice) -> bool:
    """Say what a reap would take back; False where the arena cannot be read."""
    if choice.info.problem is not None:
        complain(PROG, f"{choice.name}: {choice.why()}")
        return False
    dead = [lane for lane in choice.info.lanes if lane.state == "dead"]
    shares = sum(lane.reserved + lane.held for lane in dead)
    writing = sum(lane.writing for lane in dead)
    report = ReapReport(lanes=len(dead), shares=shares, writes=writing, lock=_lock_is_dead(choice.info))
    _say(f"{choice.name}: would reap {_reap_text(report)}")
    return True


def _reap(choice: Choice) -> bool:
    try:
        with shmcache.attach(choice.name) as cache:
            report = cache.reap()
    except shmcache.ArenaNotFoundError:
        _say(f"{choice.name}: is gone already")
    except shmcache.ShmcacheError as error:
        complain(PROG, str(error))
        return False
    else:
        _say(f"{choice.name}: reaped {_reap_text(report)}")
    return True


def _reap_text(report: ReapReport) -> str:
    parts = [
        plural(report.lanes, "dead lane"),
        plural(report.shares, "share"),
        plural(report.writes, "half-written object"),
    ]
    return ", ".join(parts) + (", the arena lock" if report.lock else "")


def _lock_is_dead(info: ArenaInfo) -> bool:
    return info.lock is not None and not info.lock.alive


def _say(message: str) -> None:
    make_console().print(message, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
