"""``python -m benchmarks [SUITE …]``: create inputs, start servers, run ndcache and its peers in turn, and report."""

from __future__ import annotations

import argparse
import re
import time
import traceback
from pathlib import Path

from . import report, servers
from .harness import Settings
from .inputs import NoRoom
from .machine import machine
from .suites import SERVED, SUITES

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def size(text: str) -> int:
    """Parse a size such as ``512MiB``."""
    found = re.fullmatch(r"([0-9.]+)\s*([KMG]?)(?:i?B)?", text, re.IGNORECASE)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512MiB")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"one of {', '.join(SUITES)}; default: all")
    parser.add_argument("--size", type=size, help="size of the model, such as 4GiB; default: depends on the suite")
    parser.add_argument("--rounds", type=int, help="how often each contender runs (default: 5, or 1 with --quick)")
    parser.add_argument("--quick", action="store_true", help="tiny inputs, to see that everything runs, not how fast")
    parser.add_argument(
        "--minutes", type=float, help="end each suite after about this time; its first round may be cut"
    )
    parser.add_argument("--only", default="", metavar="PATTERN", help="run only contenders that this matches")
    parser.add_argument("--settings", type=Path, metavar="JSON", help="use the settings that an earlier run chose")
    parser.add_argument("--profile", action="store_true", help="show where the threads of ndcache are")
    parser.add_argument("--folder", type=Path, help="directory for inputs and outputs; default: the system's")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rst", type=Path, help="write the tables to this file, as reStructuredText")
    parser.add_argument("--png", type=Path, help="write a chart of each suite to this directory")
    options = parser.parse_args()
    if unknown := set(options.suites) - set(SUITES):
        parser.error(f"no such suite: {', '.join(sorted(unknown))}")
    return options


def main() -> int:
    options = parse_arguments()
    here = machine()
    print(", ".join(f"{name}: {value}" for name, value in here.items()), flush=True)
    results, failed = [], False
    chosen = report.read_settings(options.settings) if options.settings else {}
    for name in options.suites or SUITES:
        if name in SERVED and servers.program() is None:
            print(f"\n{name}: skipped, as nginx is not installed", flush=True)
            continue
        print(f"\n{name}", flush=True)
        minutes = options.minutes or float("inf")
        rounds = options.rounds or (1 if options.quick else 5)
        for part in SUITES[name]:
            deadline = time.monotonic() + 60 * minutes / len(SUITES[name])
            settings = Settings(
                *(options.size, rounds, options.quick, deadline, options.folder, options.profile),
                only=options.only,
                chosen=chosen,
            )
            try:
                result = part(settings).to_json()
            except NoRoom as error:
                print(f"  left out: {error}", flush=True)
                failed = True
                continue
            except Exception:  # keep the figures of the other suites
                traceback.print_exc()
                failed = True
                continue
            results.append(result)
            print(f"\n{report.table(result, quick=options.quick)}", flush=True)
            if options.json:
                report.write_json(options.json, here, results, quick=options.quick)
            if options.rst:
                report.write_rst(options.rst, here, results)
            if options.png:
                print(report.write_png(options.png, here, result), flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
