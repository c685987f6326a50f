"""What vLLM's workers run for the tests: they name ``Peek`` as the engine's ``worker_extension_cls``."""

from __future__ import annotations

import hashlib
import threading
import time
from typing import Any

import torch
from vllm.distributed.kv_transfer import get_kv_transfer_group


class Peek:
    """Beside the methods of a worker."""

    model_runner: Any

    def block_digests(self, blocks: int) -> list[str]:
        """Of each of so many blocks of this rank's KV cache, all its layers."""
        layers = [layer.view(torch.uint8) for layer in self.model_runner.kv_caches]
        rows = len(layers[0]) // blocks  # vLLM has a block as several of its kernels' blocks where those are small
        found = []
        for block in range(blocks):
            digest = hashlib.blake2b(digest_size=16)
            for layer in layers:
                digest.update(layer[block * rows : (block + 1) * rows].numpy().tobytes())
            found.append(digest.hexdigest())
        return found

    def hold_saves(self) -> None:
        """Copies out of blocks wait until a step is about to write over some of them, and half a second more."""
        worker: Any = get_kv_transfer_group()._worker
        before, save = worker.before, worker._copier.save
        wanted = threading.Event()

        def tell(step: Any) -> None:
            if step.flush:
                wanted.set()
            before(step)

        def late(*arguments: Any) -> None:
            if not wanted.is_set():
                wanted.wait(30)
                wanted.set()
                time.sleep(0.5)
            save(*arguments)

        worker.before, worker._copier.save = tell, late
