"""Run contenders in turn, each time in a fresh process, and evaluate medians, ratios and targets.

Of a contender with several settings, the first round finds the fastest, which is used from then on.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from . import servers

ROOT = Path(__file__).parent.parent
_PACKAGES = (
    *("ndcache", "requests", "numpy", "ml_dtypes", "wgpu", "hf_transfer", "huggingface_hub", "obstore", "safetensors"),
    *("apache-tvm", "torch", "runai-model-streamer", "fastsafetensors", "dask", "distributed", "ray"),
)


@dataclass(frozen=True)
class Settings:
    """The options of the command line.

    Attributes
    ----------
    size : int or None
        Bytes of the model; None means each suite's own.
    rounds : int
    quick : bool
        Whether inputs are tiny.
    deadline : float
        The time by `time.monotonic` after which no round starts.
    folder : pathlib.Path or None
        The directory for inputs and outputs.
    profile : bool
        Whether ndcache shows where its threads are.
    """

    size: int | None
    rounds: int
    quick: bool
    deadline: float = float("inf")
    folder: Path | None = None
    profile: bool = False

    def bytes_or(self, usual: int, tiny: int = 4 << 20) -> int:
        """Return the bytes of the model, by default `usual`, or `tiny` with tiny inputs."""
        return self.size or (tiny if self.quick else usual)


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
    settings : tuple of dict
        The settings to choose from, one of which is added to `given`; empty if there is no choice.
    """

    label: str
    peer: str
    given: dict[str, Any]
    expect: int
    file_bytes: int
    settings: tuple[dict[str, Any], ...] = ()


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
    cores : int
        The fewest cores of a machine on which the bound holds.
    """

    label: str
    above: str
    below: str | None
    sign: Literal[">=", "<="]
    bound: float
    figure: str = "seconds"
    scale: float = 1.0
    difference: bool = False
    cores: int = 0


@dataclass
class Result:
    """The measurements of a suite, round by round.

    Attributes
    ----------
    trials : dict
        For each contender with a choice of settings, what was measured with each of them, in seconds.
    """

    suite: str
    contenders: list[Contender]
    rounds: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    trials: dict[str, list[tuple[dict[str, Any], float]]] = field(default_factory=dict)

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
                        "settings": [
                            {"setting": setting_text(setting), "seconds": seconds}
                            for setting, seconds in self.trials.get(contender.label, [])
                        ],
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
        evaluated = {"label": target.label, "sign": target.sign, "bound": target.bound, "cores": target.cores}
        if found is None:
            return {**evaluated, "met": None}
        found = {name: value * target.scale for name, value in found.items()}
        met = found["median"] >= target.bound if target.sign == ">=" else found["median"] <= target.bound
        return {**evaluated, "met": met if servers.cores() >= target.cores else None, **found}


def maker(given: dict[str, Any], model: dict[str, Any]) -> Callable[..., Contender]:
    """Return a function that makes contenders that load or download the same model."""

    def make(
        label: str, peer: str, *, loaded: bool = False, settings: tuple[dict[str, Any], ...] = (), **more: Any
    ) -> Contender:
        expect = model["loaded" if loaded else "stored"]
        return Contender(label, peer, {**given, **more}, expect, model["stored"], settings)

    return make


def rounds(result: Result, settings: Settings, folder: Path, *, warm: Sequence[Path] = ()) -> Result:
    """Choose the settings of the contenders, and run them in turn. No round starts after the deadline.

    The files of `warm` are read first, so that they are in the page cache.
    """
    read(warm)
    result.contenders = [_choose(result, contender, settings, folder) for contender in result.contenders]
    for number in range(settings.rounds):
        if number and time.monotonic() > settings.deadline:
            print(f"  stopped after {number} rounds, as the time is up", flush=True)
            break
        current: dict[str, dict[str, Any]] = {}
        result.rounds.append(current)
        for contender in result.contenders:
            if contender.label in result.left_out:
                continue
            measured = measure(contender, folder, profile=settings.profile and contender.peer.startswith("ndcache"))
            if problem := measured.get("unavailable") or measured.get("failed"):
                result.left_out[contender.label] = problem
                print(f"  {contender.label}: left out: {problem}", flush=True)
                continue
            current[contender.label] = measured
            measured["gb_per_second"] = speed = contender.file_bytes / measured["seconds"] / 1e9
            print(f"  {number + 1} {contender.label:34} {measured['seconds']:9.4f} s {speed:8.2f} GB/s", flush=True)
    return result


def _choose(result: Result, contender: Contender, settings: Settings, folder: Path) -> Contender:
    """Return the contender with the fastest of its settings, which run in turn, twice if there are many rounds."""
    best: dict[str, tuple[dict[str, Any], float]] = {}
    problem = None
    for setting in contender.settings * (1 if settings.rounds < 5 else 2):
        text = setting_text(setting)
        measured = measure(replace(contender, given={**contender.given, **setting}), folder)
        if problem := measured.get("unavailable") or measured.get("failed"):
            print(f"  {contender.label}, {text}: {problem}", flush=True)
            if "unavailable" in measured:
                break
            continue
        print(f"  - {contender.label:34} {measured['seconds']:9.4f} s, {text}", flush=True)
        best[text] = (setting, min(measured["seconds"], best.get(text, (setting, float("inf")))[1]))
    if not best:
        if problem:
            result.left_out[contender.label] = problem
        return contender
    trials = result.trials[contender.label] = sorted(best.values(), key=lambda trial: trial[1])
    return replace(contender, given={**contender.given, **trials[0][0]})


def setting_text(setting: dict[str, Any]) -> str:
    """Return a setting as the report shows it."""
    return ", ".join(f"{name} {value}" for name, value in setting.items())


def measure(contender: Contender, folder: Path, timeout: float = 600, *, profile: bool = False) -> dict[str, Any]:
    """Run a contender once, in a fresh process, after everything of an earlier run is written to disk."""
    os.sync()
    with tempfile.TemporaryDirectory(dir=folder, prefix="out-") as out:
        given = {**contender.given, "out": out, "expect": contender.expect, "profile": profile}
        given.setdefault("memory", contender.expect + contender.file_bytes)
        # Packages may lie in any folder that this process imports from.
        paths = [str(ROOT), *(path for path in sys.path if path)]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_DISABLE_XET": "1"}
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


def _output(*command: str, errors: bool = False) -> str:
    """Return what a command prints to standard output, and with `errors` to standard error."""
    stderr = subprocess.STDOUT if errors else subprocess.DEVNULL
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
