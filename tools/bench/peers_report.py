"""The findings as tables: a row a system, shmcache first, then its peers, and what nobody can beat below them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version

from peers_common import OURS, Finding
from peers_work import TOGETHER, WORKLOADS
from rich.table import Table
from rich.text import Text

from shmcache_tools.text import make_table, time_text

PACKAGES = ("valkey", "ray", "iceoryx2", "lmcache")
_DIFFERS = 1.15  # wall and CPU time, before the report tells both


def versions() -> str:
    return ", ".join(f"{package} {_version(package)}" for package in PACKAGES)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def tables(findings: Sequence[Finding]) -> Iterator[tuple[str, Table]]:
    """A title and a table a workload, in the order of the findings."""
    for name in dict.fromkeys(finding.workload for finding in findings):
        yield WORKLOADS[name].title, _table([finding for finding in findings if finding.workload == name])


def _table(findings: Sequence[Finding]) -> Table:
    """For each column of the findings the time, beside shmcache's, and CPU time where some row needs it."""
    columns = dict.fromkeys(finding.column for finding in findings)
    with_cpu = {column: any(_tells_cpu(one) for one in findings if one.column == column) for column in columns}
    table = make_table("")
    for column, cpu in with_cpu.items():
        for header in (column, "", "CPU")[: 2 + cpu]:
            table.add_column(header, justify="right")
    for system in dict.fromkeys(finding.system for finding in findings):
        by_column = {finding.column: finding for finding in findings if finding.system == system}
        cells = (cell for column, cpu in with_cpu.items() for cell in _cells(by_column.get(column))[: 2 + cpu])
        table.add_row(_name(next(iter(by_column.values()))), *cells)
    return table


def _name(finding: Finding) -> Text:
    if finding.limit:
        return Text(f"limit: {finding.system}", style="dim")
    return Text(finding.system, style="bold" if finding.system == OURS else "")


def _cells(finding: Finding | None) -> tuple[str, str, str]:
    if finding is None:
        return "-", "", ""
    times = "" if finding.system == OURS else times_text(finding.times)
    return time_text(finding.median / 1e9), times, time_text(finding.cpu / 1e9) if _tells_cpu(finding) else ""


def _tells_cpu(finding: Finding) -> bool:
    """Where readers compete for the host's CPUs, CPU time is what tells."""
    differs = max(finding.median, finding.cpu) > _DIFFERS * min(finding.median, finding.cpu)
    return finding.workload in TOGETHER or differs


def times_text(times: float) -> str:
    """``0.35 x``, ``4.1 x``, ``1,200 x``."""
    return f"{times:,.0f} x" if times >= 10 else f"{times:.1f} x" if times >= 1 else f"{times:.2f} x"
