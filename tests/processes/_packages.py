"""Packages that are extras: a test that needs one skips where it is missing, but not in CI."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest


def need(module: str) -> Any:
    """The module; skips the test where its package is not installed."""
    if os.environ.get("CI"):
        return importlib.import_module(module)
    return pytest.importorskip(module)
