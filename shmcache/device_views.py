"""Device memory on loan: CUDA tensors over regions, and whether any of them is still alive.

As in ``views.py`` all that is made for one batch refers to one object, the loan's base; torch keeps the run that it
made a tensor from, and the run keeps the base.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shmcache.device import Device
from shmcache.errors import DeviceError
from shmcache.views import ALONE

if TYPE_CHECKING:
    import torch

__all__ = ["DeviceLoan", "Mapped", "complete_streams"]


class _Base:
    """What everything made from one loan refers to."""

    __slots__ = ("__weakref__",)


class _Run:
    """A region's bytes, for torch, which keeps this object as long as a tensor over them is alive."""

    __slots__ = ("__cuda_array_interface__", "base")

    def __init__(self, base: _Base, mapped: Mapped) -> None:
        self.base = base
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": (mapped.nbytes,),
            "typestr": "|u1",
            "data": (mapped.address, False),
        }


@dataclass(eq=False)
class Mapped:
    """A region at an address of this process, as ``device`` sees it."""

    number: int
    generation: int
    device: Device
    address: int
    nbytes: int
    imported: bool = False  #: to be closed by the driver
    loans: weakref.WeakSet[_Base] = field(default_factory=weakref.WeakSet)  #: those of which something is alive


class DeviceLoan:
    """The device memory of one batch, as tensors."""

    def __init__(self) -> None:
        self._base = _Base()
        self._mapped: set[Mapped] = set()

    def flat(self, mapped: Mapped) -> torch.Tensor:
        """All bytes of a region, without a copy."""
        import torch  # noqa: PLC0415 # optional and slow to import

        self._lend(mapped)
        flat = torch.as_tensor(_Run(self._base, mapped), device=f"cuda:{mapped.device.ordinal}")
        if flat.data_ptr() != mapped.address:  # where torch takes the memory for another device's
            raise DeviceError(
                f"region {mapped.number}: torch {torch.__version__} would copy it to cuda:{mapped.device.ordinal}; "
                "read it on its own device"
            )
        return flat

    def in_use(self) -> bool:
        """Whether a tensor is alive."""
        return sys.getrefcount(self._base) > ALONE

    def devices(self) -> list[Device]:
        """Those whose tensors were made."""
        return list({mapped.device.ordinal: mapped.device for mapped in self._mapped}.values())

    def heir(self) -> DeviceLoan:
        """Another one of the same regions, of which nothing is made: they stay as long as it does."""
        heir = DeviceLoan()
        for mapped in self._mapped:
            heir._lend(mapped)
        return heir

    def _lend(self, mapped: Mapped) -> None:
        self._mapped.add(mapped)
        mapped.loans.add(self._base)

    def when_over(self, then: Callable[..., object], *args: object) -> None:
        """Calls ``then`` once no tensor is alive, nor the loan; not at the process's end."""
        weakref.finalize(self._base, then, *args).atexit = False


def complete_streams(devices: Collection[Device]) -> None:
    """Waits until this thread's current stream of each device has done all that it was given so far."""
    if not devices:
        return
    import torch  # noqa: PLC0415 # tensors were made, so it is imported

    for device in devices:
        device.complete(torch.cuda.current_stream(device.ordinal).cuda_stream)
