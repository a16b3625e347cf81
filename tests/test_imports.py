"""Optional libraries stay optional.

Who may import what is checked by import-linter: see ``[importlinter]`` in setup.cfg.
"""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

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


@pytest.mark.once
def test_a_module_that_was_not_imported_says_so() -> None:
    code = "import ndcache; ndcache.torch.load"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr.splitlines()[-1] == (
        "AttributeError: module 'ndcache' has no attribute 'torch' before `import ndcache.torch`"
    )


def test_the_command_line_needs_only_what_the_package_requires() -> None:
    """The packages of the extras, and of other systems, are not there after an installation of it alone."""
    missing = ["distributed", "filelock", "obstore", "ray", "safetensors", "torch"]
    code = "import sys; sys.modules.update(dict.fromkeys(sys.argv[1:])); import ndcache.cli.commands"
    subprocess.run([sys.executable, "-c", code, *missing], check=True)
