"""What callers state about an arena, checked once: sizes, names, the configuration, ``extra_count``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

MAX_BLOCKS: Final = 2**31
MIN_BLOCK_SIZE: Final = 4096  #: bytes; a page
MAX_BLOCK_SIZE: Final = 2**30  #: bytes
MAX_SLOTS: Final = 2**20
MAX_LANES: Final = 256
MAX_REGIONS: Final = 31  #: of device memory
DEFAULT_REGIONS: Final = 8
MAX_FINGERPRINT: Final = 256  #: bytes of UTF-8
MIN_SECONDS: Final = 1e-6
MAX_SECONDS: Final = 1e9  #: about 31 years; as nanoseconds it fits 64 bits with room for a clock
MAX_WINDOW_S: Final = 1e7  #: three of it fit into the score of an object
EVICTIONS: Final = ("segmented", "lru")

_UNITS: Final[dict[str, int]] = {
    "": 1,
    "B": 1,
    **{prefix + "iB": 1024**power for power, prefix in enumerate("KMGT", 1)},
    **{prefix + "B": 1000**power for power, prefix in enumerate("KMGT", 1)},
}
# At most 20 digits a side: enough for every size, and no text makes the conversion slow.
_SIZE: Final = re.compile(r"([0-9]{1,20})(?:\.([0-9]{1,20}))? ?([A-Za-z]{0,3})", re.ASCII)
_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", re.ASCII)


def shown(value: object) -> str:
    """``value`` for an error message: its repr, cut where long, with its type where that may surprise."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 # somebody's __repr__, or an int too long for Python to print
        return f"something that cannot be printed ({type(value).__name__})"
    text = text if len(text) <= 100 else text[:97] + "..."
    return text if type(value) in (int, str, bytes, float) else f"{text} ({type(value).__name__})"


def parse_size(value: int | str, what: str) -> int:
    """Bytes of a size given as int or as text: ``"512MiB"``, ``"1.5GiB"``, ``"64 KiB"``, ``"8GB"``.

    KiB, MiB, GiB and TiB are powers of 1024; KB, MB, GB and TB are powers of 1000. ``what`` names the
    size in the errors: TypeError unless int (not bool) or str; ValueError for text that is no size, a
    fraction of a byte, or less than 1 byte.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f'{what}: expected bytes as int or text like "512MiB", got {shown(value)}')
    size = int(value) if isinstance(value, int) else _parse_text(value, what)
    if size < 1:
        raise ValueError(f"{what}: expected at least 1 byte, got {shown(value)}")
    return size


def _parse_text(text: str, what: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None or match[3] not in _UNITS:
        raise ValueError(
            f"{what}: expected a number and one of B, KiB, MiB, GiB, TiB, KB, MB, GB, TB, got {shown(text)}"
        )
    fraction = match[2] or ""
    scale: int = 10 ** len(fraction)
    size, rest = divmod(int(match[1] + fraction) * _UNITS[match[3]], scale)
    if rest:
        raise ValueError(f"{what}: expected a whole number of bytes, got {shown(text)}")
    return size


def check_name(name: str) -> str:
    """``name``, if an arena may be called so: 1 to 64 of ``[A-Za-z0-9._-]``, not starting with a dot.

    Otherwise TypeError (no str) or ValueError.
    """
    if not isinstance(name, str):
        raise TypeError(f"name of an arena: expected str, got {shown(name)}")
    if _NAME.fullmatch(name) is None:
        raise ValueError(
            f"name of an arena: expected 1 to 64 of A-Z a-z 0-9 . _ - and no dot in front, got {shown(name)}"
        )
    return name


def check_writers(writers: int, world_size: int) -> int:
    """``writers``, how many lanes of a group fill an object together, as a plain int.

    TypeError unless int (bool is not); ValueError unless 1 <= writers <= world_size.
    """
    if isinstance(writers, bool) or not isinstance(writers, int):
        raise TypeError(f"writers: expected int, got {shown(writers)}")
    if not 1 <= writers <= world_size:
        raise ValueError(f"writers: expected 1 to {world_size}, as world_size is {world_size}, got {shown(writers)}")
    return int(writers)


def check_extra_count(extra_count: int, world_size: int) -> int:
    """``extra_count``, the number of shares beyond the first, as a plain int.

    TypeError unless int (bool is not); ValueError unless 0 <= extra_count < world_size.
    """
    if isinstance(extra_count, bool) or not isinstance(extra_count, int):
        raise TypeError(f"extra_count: expected int, got {shown(extra_count)}")
    if not 0 <= extra_count < world_size:
        raise ValueError(
            f"extra_count: expected 0 to {world_size - 1}, as world_size is {world_size}, got {shown(extra_count)}"
        )
    return int(extra_count)


@dataclass(frozen=True, init=False)
class ArenaConfig:
    """The geometry and the rules of an arena, fixed when it is created.

    ``ArenaConfig(capacity, *, block_size="64KiB", ...)``: sizes are given as int or text (see
    :func:`parse_size`) and kept as int. TypeError or ValueError says which field is wrong, what was
    expected and what was got.
    """

    capacity: int  #: payload bytes of region 0; a multiple of block_size
    block_size: int  #: bytes; a power of two, 4 KiB to 1 GiB
    slots: int  #: objects at most, 1 to 2**20; by default capacity / block_size
    lanes: int  #: processes at most, 1 to 256
    regions: int  #: of device memory at a time, 0 to 31; each costs 4 bytes of metadata a block
    fingerprint: str  #: model, dtype, layout version; at most 256 bytes of UTF-8, no NUL
    read_lease_s: float  #: a reserved share unclaimed for so long may be revoked
    write_lease_s: float  #: a writer stuck for so long loses its key
    lock_timeout_s: float  #: how long a change waits for a live but stopped holder of the arena lock
    populate: bool  #: allocate and touch every page at creation
    eviction: str  #: "segmented" by how many requests used an object, or "lru": the least recently used goes first
    eviction_window_s: float  #: segmented: by so much each of an object's second and third request outlives its use

    # Written by hand, because callers may state more types than readers should have to deal with.
    def __init__(
        self,
        capacity: int | str,
        *,
        block_size: int | str = "64KiB",
        slots: int | None = None,
        lanes: int = 64,
        regions: int | None = None,
        fingerprint: str = "",
        read_lease_s: float = 300.0,
        write_lease_s: float = 600.0,
        lock_timeout_s: float = 5.0,
        populate: bool = False,
        eviction: str = "segmented",
        eviction_window_s: float = 180.0,
    ) -> None:
        block_bytes = _check_block_size(block_size)
        capacity_bytes = _check_capacity(capacity, block_bytes)
        default_slots = min(capacity_bytes // block_bytes, MAX_SLOTS)
        fields = {
            "capacity": capacity_bytes,
            "block_size": block_bytes,
            "slots": default_slots if slots is None else _check_int(slots, "slots", MAX_SLOTS),
            "lanes": _check_int(lanes, "lanes", MAX_LANES),
            "regions": _check_regions(regions, capacity_bytes // block_bytes),
            "fingerprint": check_fingerprint(fingerprint),
            "read_lease_s": _check_seconds(read_lease_s, "read_lease_s"),
            "write_lease_s": _check_seconds(write_lease_s, "write_lease_s"),
            "lock_timeout_s": _check_seconds(lock_timeout_s, "lock_timeout_s"),
            "populate": check_bool(populate, "populate"),
            "eviction": _check_eviction(eviction),
            "eviction_window_s": _check_seconds(eviction_window_s, "eviction_window_s", MAX_WINDOW_S),
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)  # past the class's own freezing


def check_fingerprint(fingerprint: str) -> str:
    """``fingerprint``, if it is one: at most 256 bytes of UTF-8 without NUL; else TypeError or ValueError."""
    if not isinstance(fingerprint, str):
        raise TypeError(f"fingerprint: expected str, got {shown(fingerprint)}")
    try:
        encoded = fingerprint.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"fingerprint: expected text that UTF-8 can hold, got {shown(fingerprint)}") from None
    if len(encoded) > MAX_FINGERPRINT:
        raise ValueError(
            f"fingerprint: expected at most {MAX_FINGERPRINT} bytes of UTF-8, got {len(encoded)} bytes; "
            "a longer description can be hashed"
        )
    if b"\0" in encoded:
        raise ValueError(f"fingerprint: expected text without NUL, got {shown(fingerprint)}")
    return fingerprint


def _check_block_size(value: int | str) -> int:
    size = parse_size(value, "block_size")
    if not MIN_BLOCK_SIZE <= size <= MAX_BLOCK_SIZE or size & (size - 1):
        raise ValueError(f"block_size: expected a power of two from 4 KiB to 1 GiB, got {shown(value)}")
    return size


def _check_capacity(value: int | str, block_size: int) -> int:
    size = parse_size(value, "capacity")
    if size % block_size:
        raise ValueError(f"capacity: expected a multiple of block_size, {block_size} bytes, got {shown(value)}")
    if size // block_size > MAX_BLOCKS:
        raise ValueError(
            f"capacity: expected at most {MAX_BLOCKS} blocks of {block_size} bytes, got {shown(value)}; "
            "a larger block_size allows more"
        )
    return size


def _check_regions(value: int | None, blocks: int) -> int:
    """None: 8, or as many as so small blocks allow. The blocks of all regions are numbered with 32 bits."""
    most = min(MAX_REGIONS, (2**32 - 1) // blocks - 1)
    if value is None:
        return min(DEFAULT_REGIONS, most)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"regions: expected int, got {shown(value)}")
    if not 0 <= value <= most:
        raise ValueError(f"regions: expected 0 to {most} with {blocks} blocks, got {shown(value)}")
    return int(value)


def _check_int(value: int, what: str, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what}: expected int, got {shown(value)}")
    if not 1 <= value <= most:
        raise ValueError(f"{what}: expected 1 to {most}, got {shown(value)}")
    return int(value)


def _check_eviction(value: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"eviction: expected str, got {shown(value)}")
    if value not in EVICTIONS:
        raise ValueError(f"eviction: expected {' or '.join(map(repr, EVICTIONS))}, got {shown(value)}")
    return value


def _check_seconds(value: float, what: str, most: float = MAX_SECONDS) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{what}: expected seconds as float, got {shown(value)}")
    if not MIN_SECONDS <= value <= most:  # also refuses NaN and both infinities
        raise ValueError(f"{what}: expected {MIN_SECONDS:g} to {most:g} seconds, got {shown(value)}")
    return float(value)


def check_bool(value: bool, what: str) -> bool:
    """``value``, if it is True or False; else TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{what}: expected bool, got {shown(value)}")
    return value
