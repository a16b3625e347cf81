"""Optional libraries stay optional.

Who may import what is checked by import-linter: see ``[importlinter]`` in setup.cfg.
"""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import ndcache


def test_every_module_imports_without_wgpu_and_pytorch() -> None:
    """Importing them loads native libraries, so ndcache does it only when somebody asks for their devices."""
    code = """
import importlib, sys
sys.modules["wgpu"] = sys.modules["torch"] = None
for name in sys.argv[1:]:
    importlib.import_module(name)
"""
    names = [found.name for found in pkgutil.walk_packages(ndcache.__path__, "ndcache.")]
    assert "ndcache.devices.gpu.device" in names
    subprocess.run([sys.executable, "-c", code, *names], check=True)
