"""Run contenders in turn, each time in a fresh process, and evaluate medians, ratios and targets.

Of a contender with several settings, the first round finds the fastest, which is used from then on.
"""

from __future__ import annotations

import json
import os
import re
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
from .machine import version_of

ROOT = Path(__file__).parent.parent
#: The share of a suite's time in which settings may be chosen.
_CHOOSING = 0.5
#: The seconds after which a contender is ended, at the most and at the least.
_TIMEOUT, _LEAST_TIMEOUT = 600, 20


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
        The time by `time.monotonic` at which the suite should end.
    folder : pathlib.Path or None
        The directory for inputs and outputs.
    profile : bool
        Whether ndcache shows where its threads are.
    only : str
        A regular expression; contenders that it does not match are left out.
    chosen : dict
        For some contenders, the text of the setting to use, which an earlier run chose.
    """

    size: int | None
    rounds: int
    quick: bool
    deadline: float = float("inf")
    folder: Path | None = None
    profile: bool = False
    only: str = ""
    chosen: dict[str, str] = field(default_factory=dict)

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
    package : str
        The distribution whose version the report has beside the label, if any.
    setting : str
        The setting that was chosen and is part of `given`, as the report shows it.
    """

    label: str
    peer: str
    given: dict[str, Any]
    expect: int
    file_bytes: int
    settings: tuple[dict[str, Any], ...] = ()
    package: str = ""
    setting: str = ""

    def using(self, setting: dict[str, Any]) -> Contender:
        """Return the same contender with one of its settings."""
        return replace(self, given={**self.given, **setting}, setting=setting_text(setting))


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
        For each contender with a choice of settings, what was measured with each of them, in seconds; of one that loads
        several times, the first load and the median of the later ones together.
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
                        "version": version_of(contender.package),
                        "peer": contender.peer,
                        "seconds": seconds,
                        "median": median,
                        "later": self.values(contender.label, "later"),
                        "bytes": contender.expect,
                        "file_bytes": contender.file_bytes,
                        "gb_per_second": contender.file_bytes / median / 1e9,
                        "peak": max(self.values(contender.label, "peak"), default=None),
                        "ratio": self.ratio(contender.label, self.contenders[0].label),
                        "profile": self._profile(contender.label, median),
                        "setting": contender.setting,
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
        label: str,
        peer: str,
        *,
        loaded: bool = False,
        settings: tuple[dict[str, Any], ...] = (),
        package: str = "",
        **more: Any,
    ) -> Contender:
        expect = model["loaded" if loaded else "stored"]
        return Contender(label, peer, {**given, **more}, expect, model["stored"], settings, package)

    return make


def rounds(result: Result, settings: Settings, folder: Path, *, warm: Sequence[Path] = ()) -> Result:
    """Choose the settings of the contenders, and run them in turn, until the rounds are done or the time is up.

    No round begins that would not end in time if it took as long as the one before; the first one begins in any case.
    The files of `warm` are read first, so that they are in the page cache.
    """
    read(warm)
    result.contenders = [each for each in result.contenders if re.search(settings.only, each.label)]
    now = time.monotonic()
    choose_until = now + _CHOOSING * (settings.deadline - now)
    result.contenders = [_choose(result, contender, settings, folder, choose_until) for contender in result.contenders]
    taken = 0.0
    for number in range(settings.rounds):
        start = time.monotonic()
        if number and start + taken > settings.deadline:
            print(f"  stopped after {number} rounds, as the time is up", flush=True)
            break
        result.rounds.append(_run_round(result, settings, folder))
        taken = time.monotonic() - start
    return result


def _run_round(result: Result, settings: Settings, folder: Path) -> dict[str, dict[str, Any]]:
    """Run each contender once, as long as there is time, and return what was measured."""
    current: dict[str, dict[str, Any]] = {}
    number = len(result.rounds) + 1
    for contender in result.contenders:
        label = contender.label
        if label in result.left_out:
            continue
        if time.monotonic() > settings.deadline:
            if number == 1:
                result.left_out[label] = "the time was up"
            continue
        profile = settings.profile and contender.peer.startswith("ndcache")
        measured = measure(contender, folder, settings.deadline, profile=profile)
        if problem := measured.get("unavailable") or measured.get("failed"):
            result.left_out[label] = problem
            print(f"  {label}: left out: {problem}", flush=True)
            continue
        current[label] = measured
        measured["gb_per_second"] = speed = contender.file_bytes / measured["seconds"] / 1e9
        text = f"  {number} {label:34} {measured['seconds']:9.4f} s {speed:8.2f} GB/s"
        if "later" in measured:
            measured["later_gb_per_second"] = speed = contender.file_bytes / measured["later"] / 1e9
            text += f", later {measured['later']:9.4f} s {speed:8.2f} GB/s"
        print(text, flush=True)
    return current


def _choose(result: Result, contender: Contender, settings: Settings, folder: Path, until: float) -> Contender:
    """Return the contender with the fastest of its settings, which run in turn, twice if there are rounds and time.

    If an earlier run chose one, it is used; after `until`, so is the fastest so far, or else the first.
    """
    for setting in contender.settings:
        if setting_text(setting) == settings.chosen.get(contender.label):
            return contender.using(setting)
    best: dict[str, tuple[dict[str, Any], float]] = {}
    problem = None
    for setting in contender.settings * (1 if settings.rounds < 5 or until < float("inf") else 2):
        if time.monotonic() > until:
            print(f"  {contender.label}: no more settings are tried, as the time is up", flush=True)
            break
        text = setting_text(setting)
        # One later load is enough to choose.
        few = {"loads": min(2, contender.given.get("loads", 1))}
        measured = measure(contender.using(setting | few), folder, settings.deadline)
        if problem := measured.get("unavailable") or measured.get("failed"):
            print(f"  {contender.label}, {text}: {problem}", flush=True)
            if "unavailable" in measured or "hangs" in measured:
                break
            continue
        seconds = measured["seconds"] + measured.get("later", 0)
        print(f"  - {contender.label:34} {seconds:9.4f} s, {text}", flush=True)
        best[text] = (setting, min(seconds, best.get(text, (setting, float("inf")))[1]))
    if not best:
        if problem:
            result.left_out[contender.label] = problem
        return contender.using(contender.settings[0]) if contender.settings else contender
    trials = result.trials[contender.label] = sorted(best.values(), key=lambda trial: trial[1])
    return contender.using(trials[0][0])


def setting_text(setting: dict[str, Any]) -> str:
    """Return a setting as the report shows it."""
    return ", ".join(f"{name} {value}" for name, value in setting.items())


def measure(
    contender: Contender, folder: Path, deadline: float = float("inf"), *, profile: bool = False
) -> dict[str, Any]:
    """Run a contender once, in a fresh process, after everything of an earlier run is written to disk.

    It is ended after `_TIMEOUT`, or a quarter of the time that is left if that is less, so that one that hangs leaves
    time for the others.
    """
    os.sync()
    timeout = min(_TIMEOUT, max(_LEAST_TIMEOUT, (deadline - time.monotonic()) / 4))
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
            return {"failed": f"took more than {timeout:.0f} s", "hangs": True}
    return _parse(done, contender.expect)


def _parse(done: subprocess.CompletedProcess[str], expect: int) -> dict[str, Any]:
    """Return the figures that a contender printed, or why there are none."""
    # Some libraries print to standard output, too.
    figures = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not figures:
        errors = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        return {"failed": next((line for line in reversed(errors) if re.match(r"[\w.]+: ", line)), errors[-1])}
    measured: dict[str, Any] = json.loads(figures[-1])
    if "bytes" in measured and measured["bytes"] != expect:
        return {"failed": f"{measured['bytes']:,} bytes instead of {expect:,}"}
    return measured


def read(paths: Sequence[Path]) -> None:
    """Read files, so that they are in the page cache."""
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.read(16 << 20):
                pass
