"""The README's Python runs as it stands, from its first block to its last."""

from __future__ import annotations

import re
from pathlib import Path

import cuda_support

import shmcache

README = Path(__file__).parents[2] / "README.md"


def test_the_examples_run(arena_name: str, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2
    code = "\n".join(blocks).replace('"kv"', repr(arena_name)).replace("/var/cache/kv", str(tmp_path))
    assert arena_name in code
    with cuda_support.gpus("double", tmp_path):
        exec(compile(code, str(README), "exec"), {})  # noqa: S102 # our own README
    assert arena_name not in shmcache.arenas()
