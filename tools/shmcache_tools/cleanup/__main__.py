"""``shmcache-cleanup``: destroys arenas, or takes back what dead lanes left in them.

What may be destroyed is decided by ``shmcache.destroy`` alone, at the moment of it: it refuses while a lane is alive,
and when another arena has the name by then, whatever was seen here before. So neither an engine that attaches or
starts anew while a question stands, nor another cleanup, comes to harm.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import TextIO

import shmcache
from shmcache.config import check_name
from shmcache.stats import ArenaInfo
from shmcache_tools.cleanup.plan import (
    DESTROY,
    REAP,
    REFUSE,
    Plan,
    live_lanes,
    plan_to_destroy,
    plan_to_reap,
    plans_table,
    reap_text,
)
from shmcache_tools.completion import complete_arenas
from shmcache_tools.look import look, look_at_all
from shmcache_tools.manual import make_manual_parser
from shmcache_tools.text import EXIT_DONE, EXIT_FAILED, complain, make_console, plural, say

PROG = "shmcache-cleanup"

_EXIT_INTERRUPTED = 130

_DESCRIPTION = """\
Destroy arenas: those named, those that are stale (no process is attached), or
all of this user. On a terminal it shows first what would go, what would stay,
and why, and asks; elsewhere it does not ask.

An arena with live lanes is refused unless --force; its processes keep what
they have mapped until they detach. An arena that is made anew under the same
name meanwhile is another one, and stays. What is gone already is no error."""
_EXAMPLES = """\
  shmcache-cleanup kv                   show, ask, destroy one arena
  shmcache-cleanup --stale              all that nobody is attached to
  shmcache-cleanup --stale --dry-run    only show which, and why
  shmcache-cleanup --stale --yes        for scripts: ask nothing
  shmcache-cleanup --reap kv            take back what the dead left; it stays
  shmcache-cleanup --all --force --yes  destroy everything, ask nothing"""
_EXIT_STATUS = """\
  0    all of it is done, or was done already
  1    something was refused or failed, or the answer was not yes
  2    wrong usage
  130  interrupted: nothing was done where it stood at the question"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; the exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    if [bool(options.names), options.stale, options.all].count(True) != 1:
        parser.error("give either names of arenas, or --stale, or --all")
    if options.force and (options.reap or options.stale):
        parser.error("--force is for what is alive: it does not go with --reap or --stale")
    try:
        return _run(options)
    except shmcache.ShmcacheError as error:  # no arena can be looked at: SHMCACHE_DIRECTORY
        complain(PROG, str(error))
        return EXIT_FAILED
    except KeyboardInterrupt:
        complain(PROG, "interrupted")
        return _EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = make_manual_parser(PROG, _DESCRIPTION, _EXAMPLES, _EXIT_STATUS)
    which = parser.add_argument_group("which arenas")
    complete_arenas(which.add_argument("names", nargs="*", type=_arena_name, metavar="NAME", help="this one"))
    which.add_argument("--stale", action="store_true", help="every arena that nobody is attached to")
    which.add_argument("--all", action="store_true", help="every arena of this user")
    what = parser.add_argument_group("what is done")
    what.add_argument("--reap", action="store_true", help="only take back what dead lanes left; destroy nothing")
    what.add_argument(
        "--force", action="store_true", help="destroy also what somebody is attached to, or cannot be read"
    )
    what.add_argument("--dry-run", action="store_true", help="do nothing: only show what would be done, and why")
    what.add_argument("--yes", action="store_true", help="do not ask")
    return parser


def _arena_name(text: str) -> str:
    """An argparse type."""
    try:
        return check_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _run(options: argparse.Namespace) -> int:
    plans = _plans(options)
    if options.dry_run:
        _show(plans, sys.stdout)
        return _exit_code([plan.deed != REFUSE for plan in plans])
    terminal = None if options.yes else _terminal()
    if terminal is None:
        return _exit_code([_carry_out(plan, force=options.force, brief=False) for plan in plans])
    return _ask_and_carry_out(plans, terminal, force=options.force)


def _plans(options: argparse.Namespace) -> list[Plan]:
    """Looks at the arenas that the arguments name."""
    infos = _named(options.names) if options.names else [i for i in look_at_all() if i.stale or options.all]
    if not infos and not options.names:
        say("no stale arenas" if options.stale else "no arenas of this user")
    if options.reap:
        return [plan_to_reap(info) for info in infos]
    now = time.time()
    return [plan_to_destroy(info, now, force=options.force) for info in infos]


def _named(names: Sequence[str]) -> list[ArenaInfo]:
    """One that is not there is told and left out."""
    infos: list[ArenaInfo] = []
    for name in dict.fromkeys(names):
        if info := look(name):
            infos.append(info)
        else:
            say(f"{name}: no such arena, nothing to do")
    return infos


def _terminal() -> TextIO | None:
    """Where somebody can be asked; None where nobody is there."""
    if sys.stdin is None or not sys.stdin.isatty():
        return None
    return next((out for out in (sys.stdout, sys.stderr) if out is not None and out.isatty()), None)


def _show(plans: Sequence[Plan], file: TextIO) -> None:
    if not plans:
        return
    console = make_console(file)
    with console.capture() as captured:
        console.print(plans_table(plans, piped=not console.is_terminal))
    say("\n".join(line.rstrip() for line in captured.get().splitlines()), file)


def _ask_and_carry_out(plans: Sequence[Plan], terminal: TextIO, *, force: bool) -> int:
    _show(plans, terminal)
    willing = [plan for plan in plans if plan.does_something]
    if willing and not _agreed(willing, terminal):
        say("nothing was done", terminal)
        return EXIT_FAILED
    done = [_carry_out(plan, force=force, brief=True) for plan in willing]
    return _exit_code([*done, *(plan.deed != REFUSE for plan in plans)])


def _agreed(willing: Sequence[Plan], terminal: TextIO) -> bool:
    lanes = sum(len(live_lanes(plan.info)) for plan in willing if plan.deed == DESTROY)
    in_use = f", with {plural(lanes, 'live lane')}" if lanes else ""
    question = f"{willing[0].deed.capitalize()} {plural(len(willing), 'arena')}{in_use}?"
    answer = b""
    try:
        print(f"\n{question} [y/N] ", end="", file=terminal, flush=True)
        answer = sys.stdin.buffer.readline()  # bytes: what is no text is no yes
    finally:
        if not answer.endswith(b"\n"):
            say("", terminal)
    return answer.strip().lower() in {b"y", b"yes"}


def _carry_out(plan: Plan, *, force: bool, brief: bool) -> bool:
    """Does with one arena what is planned, and tells why unless ``brief``; False where that was refused or failed."""
    why = plan.reason(brief=brief)
    if plan.deed == REFUSE:
        complain(PROG, f"{plan.name}: refused, {why}")
        return False
    try:
        if plan.deed == DESTROY:
            shmcache.destroy(plan.name, force=force, inode=plan.info.inode)
            say(f"{plan.name}: destroyed ({why})")
        elif plan.deed == REAP:
            say(f"{plan.name}: reaped {_reap(plan.name)}")
        else:
            say(f"{plan.name}: {why}")
    except shmcache.ArenaNotFoundError:
        anew = "; another one has its name now, and stays" if look(plan.name) else ""
        say(f"{plan.name}: is gone already{anew}")
    except shmcache.ShmcacheError as error:
        complain(PROG, str(error))
        return False
    return True


def _reap(name: str) -> str:
    """What was taken back."""
    with shmcache.attach(name) as cache:
        return reap_text(cache.reap())


def _exit_code(fine: Sequence[bool]) -> int:
    return EXIT_DONE if all(fine) else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
