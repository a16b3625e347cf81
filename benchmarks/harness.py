"""Run contenders in turn, each time in a fresh process, and evaluate medians, ratios and targets."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parent.parent
_PACKAGES = (
    *("ndcache", "requests", "numpy", "ml_dtypes", "wgpu", "hf_transfer", "huggingface_hub", "safetensors"),
    *("apache-tvm", "torch", "runai-model-streamer", "fastsafetensors"),
)


@dataclass(frozen=True)
class Contender:
    """A program to measure: one line of the table.

    Attributes
    ----------
    label : str
    peer : str
        The name of its function in `benchmarks.peers`.
    given : dict
        The function's input, beside ``out``, an empty directory.
    expect : int
        The bytes that it must load or write.
    file_bytes : int
        The bytes of its files, from which its speed is computed; 0 if it has none.
    """

    label: str
    peer: str
    given: dict[str, Any]
    expect: int
    file_bytes: int


@dataclass(frozen=True)
class Target:
    """A bound on one contender's figure.

    Attributes
    ----------
    label : str
    above : str
        The label of the contender.
    below : str or None
        The label of the contender whose figure in the same round divides it, if any.
    sign : {">=", "<="}
    bound : float
    figure : str
        The key of the figure in what the contender measured.
    scale : float
        Multiplies the figure.
    difference : bool
        Whether the other figure is subtracted instead.
    """

    label: str
    above: str
    below: str | None
    sign: Literal[">=", "<="]
    bound: float
    figure: str = "seconds"
    scale: float = 1.0
    difference: bool = False


@dataclass
class Result:
    """The measurements of a suite, round by round."""

    suite: str
    contenders: list[Contender]
    rounds: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)

    def values(self, label: str, figure: str = "seconds") -> list[float]:
        """Return a contender's figure in each round in which it ran."""
        return [each[label][figure] for each in self.rounds if label in each and each[label].get(figure) is not None]

    def to_json(self) -> dict[str, Any]:
        """Return the medians, ratios and targets."""
        rows = []
        for contender in self.contenders:
            if seconds := self.values(contender.label):
                median = statistics.median(seconds)
                rows.append(
                    {
                        "label": contender.label,
                        "peer": contender.peer,
                        "seconds": seconds,
                        "median": median,
                        "bytes": contender.expect,
                        "file_bytes": contender.file_bytes,
                        "gb_per_second": contender.file_bytes / median / 1e9,
                        "peak": max(self.values(contender.label, "peak"), default=None),
                        "ratio": self.ratio(contender.label, self.contenders[0].label),
                        "profile": self._profile(contender.label, median),
                    }
                )
        return {
            "suite": self.suite,
            "rows": rows,
            "left_out": self.left_out,
            "targets": [self._evaluate(target) for target in self.targets],
        }

    def _profile(self, label: str, median: float) -> dict[str, Any]:
        """Return the profile of the round that is nearest to the median."""
        ran = [each[label] for each in self.rounds if label in each]
        return dict(min(ran, key=lambda measured: abs(measured["seconds"] - median)).get("profile", {}))

    def ratio(
        self, above: str, below: str, figure: str = "seconds", *, difference: bool = False
    ) -> dict[str, float] | None:
        """Return the median, lowest and highest quotient or difference of the rounds in which both ran."""
        pairs = [
            each[above][figure] - each[below][figure] if difference else each[above][figure] / each[below][figure]
            for each in self.rounds
            if above in each and below in each and each[below].get(figure)
        ]
        if not pairs:
            return None
        return {"median": statistics.median(pairs), "lowest": min(pairs), "highest": max(pairs)}

    def _evaluate(self, target: Target) -> dict[str, Any]:
        if target.below is None:
            values = self.values(target.above, target.figure)
            found = (
                {"median": statistics.median(values), "lowest": min(values), "highest": max(values)} if values else None
            )
        else:
            found = self.ratio(target.above, target.below, target.figure, difference=target.difference)
        if found is None:
            return {"label": target.label, "sign": target.sign, "bound": target.bound, "met": None}
        found = {name: value * target.scale for name, value in found.items()}
        met = found["median"] >= target.bound if target.sign == ">=" else found["median"] <= target.bound
        return {"label": target.label, "sign": target.sign, "bound": target.bound, "met": met, **found}


def rounds(
    result: Result, count: int, folder: Path, deadline: float = float("inf"), *, warm: Sequence[Path] = ()
) -> Result:
    """Run the contenders in turn, `count` times. No round starts after the deadline (`time.monotonic`).

    The files of `warm` are read first, so that they are in the page cache.
    """
    read(warm)
    for number in range(count):
        if number and time.monotonic() > deadline:
            print(f"  stopped after {number} rounds, as the time is up", flush=True)
            break
        current: dict[str, dict[str, Any]] = {}
        result.rounds.append(current)
        for contender in result.contenders:
            if contender.label in result.left_out:
                continue
            measured = measure(contender, folder)
            if problem := measured.get("unavailable") or measured.get("failed"):
                result.left_out[contender.label] = problem
                print(f"  {contender.label}: left out: {problem}", flush=True)
                continue
            current[contender.label] = measured
            measured["gb_per_second"] = speed = contender.file_bytes / measured["seconds"] / 1e9
            print(f"  {number + 1} {contender.label:34} {measured['seconds']:9.4f} s {speed:8.2f} GB/s", flush=True)
    return result


def measure(contender: Contender, folder: Path, timeout: float = 600) -> dict[str, Any]:
    """Run a contender once, in a fresh process, after everything of an earlier run is written to disk."""
    os.sync()
    with tempfile.TemporaryDirectory(dir=folder, prefix="out-") as out:
        given = {**contender.given, "out": out, "expect": contender.expect}
        given.setdefault("memory", contender.expect + contender.file_bytes)
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *_paths()]), "HF_HUB_DISABLE_XET": "1"}
        if contender.given.get("ca"):
            environ["REQUESTS_CA_BUNDLE"] = environ["SSL_CERT_FILE"] = contender.given["ca"]
        command = [sys.executable, "-m", "benchmarks.peers", contender.peer, json.dumps(given)]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"took more than {timeout} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    measured: dict[str, Any] = json.loads(lines[-1])
    if "bytes" in measured and measured["bytes"] != contender.expect:
        return {"failed": f"{measured['bytes']:,} bytes instead of {contender.expect:,}"}
    return measured


def read(paths: Sequence[Path]) -> None:
    """Read files, so that they are in the page cache."""
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.read(16 << 20):
                pass


def machine() -> dict[str, Any]:
    """Describe this machine, as published figures must."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    for name, option in (("curl", "--version"), ("aria2c", "--version")):
        if shutil.which(name):
            versions[name] = (_output(name, option).splitlines() or [""])[0]
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": versions,
        "gpu": _gpu(),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD").strip() or None,
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


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _paths() -> list[str]:
    return [path for path in [os.environ.get("PYTHONPATH", "")] if path]
