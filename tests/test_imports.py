"""What importing ndcache needs. The directions of imports are checked by import-linter (``[importlinter]``, setup.cfg)."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import ndcache


def test_every_module_imports_without_wgpu() -> None:
    """wgpu loads a native library, so it is imported only when a GPU is asked for."""
    code = """
import importlib, sys
sys.modules["wgpu"] = None
for name in sys.argv[1:]:
    importlib.import_module(name)
"""
    names = [found.name for found in pkgutil.walk_packages(ndcache.__path__, "ndcache.")]
    assert "ndcache.devices.gpu.device" in names
    subprocess.run([sys.executable, "-c", code, *names], check=True)
