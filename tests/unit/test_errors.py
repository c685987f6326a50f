"""Every error that the package promises, and that one base catches them all."""

from __future__ import annotations

import inspect

import pytest

from shmcache import errors

PROMISED = [
    "ArenaBusyError",
    "ArenaDamagedError",
    "ArenaExistsError",
    "ArenaNotFoundError",
    "ArenaPermissionError",
    "ArenaSpaceError",
    "ArenaVersionError",
    "ClosedError",
    "DeviceError",
    "DirectoryError",
    "FingerprintError",
    "GroupError",
    "LaneInUseError",
    "NoLaneError",
    "ShmcacheError",
    "ViewInUseError",
]


def test_nothing_more_and_nothing_less() -> None:
    assert errors.__all__ == PROMISED
    defined = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert defined == set(PROMISED)


@pytest.mark.parametrize("name", PROMISED)
def test_one_base_and_a_docstring(name: str) -> None:
    error = getattr(errors, name)
    assert issubclass(error, errors.ShmcacheError)
    assert not issubclass(error, (ValueError, TypeError, OSError)), "wrong arguments are told apart"
    assert inspect.getdoc(error)


def test_message_comes_through() -> None:
    with pytest.raises(errors.ShmcacheError, match="arena 'a': 3 lanes"):
        raise errors.NoLaneError("arena 'a': 3 lanes")
