"""The configuration of a MooncakeStore: the fields of Mooncake's own file, checked."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shmcache.config import parse_size, shown

__all__ = ["Config", "endpoints", "read_fields"]

PROTOCOLS: Final = ("tcp", "rdma")
MAX_PREFIX: Final = 256  #: characters
MIN_SEGMENT: Final = 16 << 20  #: bytes; the client refuses less

_log = logging.getLogger("shmcache.storage")


@dataclass(frozen=True)
class Config:
    """The fields of a configuration, checked."""

    master_server_address: str
    metadata_server: str = "P2PHANDSHAKE"
    local_hostname: str = ""
    protocol: str = "tcp"
    device_name: str = ""
    global_segment_size: int = 3355443200  # the defaults of mooncake_config.py
    local_buffer_size: int = 1 << 30
    tenant_id: str = ""
    prefix: str = "shmcache:"

    @classmethod
    def parse(cls, fields: Mapping[str, object]) -> Config:
        """TypeError or ValueError, which says which field is wrong and what was expected."""
        checked = {name: _CHECKS[name](value, name) for name, value in fields.items()}
        if "master_server_address" not in checked:
            raise ValueError("config: expected master_server_address, the host:port of Mooncake's master")
        return cls(**checked)


def read_fields(config: Mapping[str, object] | str | os.PathLike[str]) -> dict[str, object]:
    """The fields that a configuration states, if all have known names."""
    if isinstance(config, Mapping):
        unknown = [name for name in config if name not in _CHECKS]
        if unknown:
            raise ValueError(f"config: expected fields of {', '.join(_CHECKS)}, got {shown(unknown[0])}")
        return dict(config)
    if not isinstance(config, (str, os.PathLike)):
        raise TypeError(f"config: expected a mapping or the path of a JSON file, got {shown(config)}")
    try:
        stated = json.loads(Path(config).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"config: expected JSON in {os.fspath(config)!r}: {error}") from None
    if not isinstance(stated, dict):
        # The argument's type is right; the file's text is not.
        raise ValueError(f"config: expected a JSON object in {os.fspath(config)!r}, got {shown(stated)}")  # noqa: TRY004
    passed_over = sorted(stated.keys() - _CHECKS.keys())
    if passed_over:
        _log.info("%r: passed over what is not ours: %s", os.fspath(config), ", ".join(passed_over))
    return {name: value for name, value in stated.items() if name in _CHECKS and value is not None}


def endpoints(address: str) -> list[tuple[str, int]]:
    """Host and port of each server that an address names."""
    found = re.finditer(r"(?:\[([^\]]+)\]|([^\[\]/:;,]+)):([0-9]{1,5})", address.rpartition("://")[2])
    return [(match[1] or match[2], int(match[3])) for match in found]


def _check_text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected str, got {shown(value)}")
    if "\0" in value:
        raise ValueError(f"{name}: expected text without NUL, got {shown(value)}")
    return value


def _check_prefix(value: object, name: str) -> str:
    text = _check_text(value, name)
    if len(text) > MAX_PREFIX:
        raise ValueError(f"{name}: expected at most {MAX_PREFIX} characters, got {len(text)}")
    return text


def _check_master(value: object, name: str) -> str:
    text = _check_text(value, name)
    if not endpoints(text) and "://" not in text:
        raise ValueError(f"{name}: expected host:port, got {shown(value)}")
    return text


def _check_metadata(value: object, name: str) -> str:
    text = _check_text(value, name)
    scheme = text.rpartition("://")[0]
    known = scheme in ("http", "https") or (scheme in ("", "etcd") and endpoints(text))
    if text != "P2PHANDSHAKE" and not known:  # on others the client ends the process
        raise ValueError(
            f"{name}: expected P2PHANDSHAKE, http://host:port/metadata or etcd://host:port, got {shown(value)}"
        )
    return text


def _check_protocol(value: object, name: str) -> str:
    text = _check_text(value, name).lower()
    if text not in PROTOCOLS:
        raise ValueError(f"{name}: expected one of {', '.join(PROTOCOLS)}, got {shown(value)}")
    return text


def _check_size(value: object, name: str) -> int:
    """As Mooncake reads sizes: all units are powers of 1024, also without an i, in small letters, without a B."""
    if value in (0, "0") and not isinstance(value, bool):
        return 0
    if isinstance(value, str) and (match := re.fullmatch(r"([0-9.]+) *([KMGT])(?:I?B)?", value.strip().upper())):
        value = f"{match[1]}{match[2]}iB"
    return parse_size(value, name)  # type: ignore[arg-type] # it checks that


def _check_segment(value: object, name: str) -> int:
    size = _check_size(value, name)
    if 0 < size < MIN_SEGMENT:
        raise ValueError(f"{name}: expected 0 or at least 16 MiB, got {shown(value)}")
    return size


_CHECKS: Final[dict[str, Callable[[object, str], Any]]] = {
    "master_server_address": _check_master,
    "metadata_server": _check_metadata,
    "local_hostname": _check_text,
    "protocol": _check_protocol,
    "device_name": _check_text,
    "global_segment_size": _check_segment,
    "local_buffer_size": _check_size,
    "tenant_id": _check_text,
    "prefix": _check_prefix,
}
