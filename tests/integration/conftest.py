"""Servers for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from integration._servers import Server
from processes.conftest import chance

__all__ = ["chance"]


@pytest.fixture(scope="session")
def lasting_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server of all tests that do it no harm."""
    server = Server(tmp_path_factory.mktemp("v"))
    yield server
    server.kill()


@pytest.fixture
def server(lasting_server: Server) -> Server:
    """A server that holds nothing yet."""
    with lasting_server.client as plain:
        plain.flushall()
    return lasting_server


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts a server of the test's own, with options; it is killed afterwards."""
    servers: list[Server] = []

    def start(*options: str) -> Server:
        folder = tmp_path / str(len(servers))
        folder.mkdir()
        servers.append(Server(folder, *options))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()
