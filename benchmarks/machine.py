"""Describe the machine on which figures were measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from . import servers

_ROOT = Path(__file__).parent.parent
_PACKAGES = (
    *("ndcache", "requests", "numpy", "ml_dtypes", "wgpu", "hf_transfer", "huggingface_hub", "obstore", "safetensors"),
    *("apache-tvm", "torch", "cuda-bindings", "instanttensor", "runai-model-streamer", "fastsafetensors"),
    *("dask", "distributed", "ray"),
)


def version_of(package: str) -> str:
    """Return the version of a distribution; nothing if there is none."""
    try:
        return importlib.metadata.version(package) if package else ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def machine() -> dict[str, Any]:
    """Describe this machine, as published figures must."""
    versions: dict[str, str] = {}
    for name in _PACKAGES:
        if version := version_of(name):
            versions[name] = version
    for name, program, option in (
        ("curl", shutil.which("curl"), "--version"),
        ("aria2c", shutil.which("aria2c"), "--version"),
        ("nginx", servers.program(), "-v"),
    ):
        if program:
            versions[name] = (_output(program, option, errors=True).splitlines() or [""])[0]
    versions["OpenSSL"] = ssl.OPENSSL_VERSION
    return {
        "cpu": _cpu_model(),
        "cores": servers.cores(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": versions,
        "gpu": _gpu(),
        "commit": _output("git", "-C", str(_ROOT), "rev-parse", "--short", "HEAD").strip() or None,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def _gpu() -> str | None:
    code = "import wgpu; i = wgpu.gpu.request_adapter_sync().info; print(i['device'], '/', i['description'])"
    lines = _output(sys.executable, "-c", code).strip().splitlines()
    return lines[-1] if lines else None


def _output(*command: str, errors: bool = False) -> str:
    """Return what a command prints to standard output, and with `errors` to standard error."""
    stderr = subprocess.STDOUT if errors else subprocess.DEVNULL
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
