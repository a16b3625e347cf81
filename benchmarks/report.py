"""Report figures as a table, as JSON and as charts."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any


def table(result: dict[str, Any], *, quick: bool) -> str:
    """Return a suite's medians, its ratios to the first contender, its targets, and where the time went."""
    later = f" {'later s':>9} {'GB/s':>8}" if any(row["later"] for row in result["rows"]) else ""
    columns = f"{'seconds':>9} {'GB/s':>8}{later} {'CPU s':>7} {'cores':>5} {'peak MiB':>9}"
    lines = [f"{result['suite']:34} {columns}   ratio to the first"]
    for row in result["rows"]:
        peak = f"{row['peak'] / 2**20:9,.0f}" if row["peak"] else " " * 9
        speed = f"{row['gb_per_second']:8.2f}" if row["file_bytes"] else " " * 8
        ratio = _range(row["ratio"]) if row["ratio"] else ""
        spent = row["profile"].get("user", 0) + row["profile"].get("system", 0)
        busy = row["profile"].get("busy_cores", 0)
        if later:
            seconds, again = _later(row)
            speed += f" {seconds:>9} {again:>8}"
        lines.append(f"{_label(row):34} {row['median']:9.4f} {speed} {spent:7.2f} {busy:5.1f} {peak}   {ratio}")
    lines += [_settings(row) for row in result["rows"] if row["setting"]]
    lines += [f"left out: {label} ({reason})" for label, reason in result["left_out"].items()]
    for target in result["targets"]:
        if "median" not in target:
            lines.append(f"target: {target['label']}: not measured")
        elif target["sign"] == ">=" and not target["bound"]:
            lines.append(f"figure: {target['label']}: {_range(target)}")
        else:
            verdict = _verdict(target, quick=quick)
            lines.append(f"target: {target['label']}: {_range(target)} {target['sign']} {target['bound']:g}: {verdict}")
    for row in result["rows"]:
        if stages := row["profile"].get("stages"):
            words = ", ".join(f"{name} {seconds:.3f}" for name, seconds in stages.items())
            lines.append(f"stats.seconds of {row['label']}: {words}")
        if threads := row["profile"].get("threads"):
            lines.append(f"threads of {row['label']}, which wait {row['profile']['lock_wait_ms']:.1f} ms for the lock:")
            lines += [f"  {mean:6.2f} {place}" for place, mean in threads.items()]
    return "\n".join(lines)


def rst_table(result: dict[str, Any]) -> str:
    """Return a suite's medians and ratios as a table of reStructuredText, as docs/benchmarks.rst has them."""
    lines = [(result["suite"], "seconds", "GB/s", "later, GB/s", "CPU s", "MiB", "to the first", "setting")]
    for row in result["rows"]:
        spent = row["profile"].get("user", 0) + row["profile"].get("system", 0)
        seconds = {"median": row["median"], "lowest": min(row["seconds"]), "highest": max(row["seconds"])}
        speed = f"{row['gb_per_second']:.2f}" if row["file_bytes"] else ""
        ratio = _range(row["ratio"]) if row["ratio"] else ""
        peak = f"{row['peak'] / 2**20:,.0f}" if row["peak"] else ""
        figures = (_range(seconds), speed, _later(row)[1], f"{spent:.1f}", peak, ratio, row["setting"])
        lines.append((_label(row), *figures))
    # Only some suites have later loads, and only some contenders settings.
    columns = [column for index, column in enumerate(zip(*lines, strict=True)) if not index or any(column[1:])]
    lines = list(zip(*columns, strict=True))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = "  ".join("=" * width for width in widths)
    texts = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([rule, texts[0], rule, *texts[1:], rule])


def write_rst(path: Path, machine: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Write the tables of all suites so far, below a description of the machine."""
    versions = "\n".join(f"- {name} {version}" for name, version in machine["versions"].items())
    about = f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, {machine['date']}"
    path.write_text("\n\n".join([about, versions, *map(rst_table, results)]) + "\n")


def write_json(path: Path, machine: dict[str, Any], results: list[dict[str, Any]], *, quick: bool) -> None:
    """Write the figures of all suites so far."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(json.dumps({"machine": machine, "quick": quick, "suites": results}, indent=1) + "\n")
    temporary.replace(path)


def read_settings(path: Path) -> dict[str, str]:
    """Return the setting of each contender that has one in the figures of an earlier run."""
    suites = json.loads(path.read_text())["suites"]
    return {row["label"]: row["setting"] for suite in suites for row in suite["rows"] if row["setting"]}


def write_png(folder: Path, machine: dict[str, Any], result: dict[str, Any]) -> Path:
    """Draw a bar of seconds for each contender, or lines for the suite ``growth``. This needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    rows = result["rows"]
    if result["suite"] == "growth":
        figure, panes = pyplot.subplots(1, 2, figsize=(9, 4))
        for axes, word in zip(panes, ("MiB", "tensors"), strict=True):
            chosen = [row for row in rows if row["label"].endswith(word)]
            along = [float(row["label"].split()[0].replace(",", "")) for row in chosen]
            axes.loglog(along, [row["median"] for row in chosen], "o-")
            axes.set_xlabel(word)
            axes.set_ylabel("seconds")
            axes.grid(alpha=0.3)
    elif result["suite"].startswith("memory"):
        figure, axes = _bars(pyplot, rows, [row["peak"] / 2**20 for row in rows], None)
        axes.set_xlabel("peak memory, MiB")
    else:
        medians = [row["median"] for row in rows]
        spread = [
            [row["median"] - min(row["seconds"]) for row in rows],
            [max(row["seconds"]) - row["median"] for row in rows],
        ]
        figure, axes = _bars(pyplot, rows, medians, spread)
        axes.set_xlabel("seconds (median; lowest to highest)")
    title = f"{result['suite']}: {machine['cpu']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}"
    figure.suptitle(title, size=9)
    figure.tight_layout()
    path = folder / f"{result['suite']}.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _settings(row: dict[str, Any]) -> str:
    if not row["settings"]:
        return f"setting of {row['label']}: {row['setting']}, without a comparison in this run"
    best, *others = (f"{trial['setting']} ({trial['seconds']:.3g} s)" for trial in row["settings"])
    return f"setting of {row['label']}: {best}; slower: {', '.join(others) or 'none'}"


def _label(row: dict[str, Any]) -> str:
    return f"{row['label']} {row['version']}".rstrip()


def _later(row: dict[str, Any]) -> tuple[str, str]:
    """Return the median seconds of a contender's later loads, and its speed in them, if it has any."""
    if not row["later"]:
        return "", ""
    seconds = statistics.median(row["later"])
    return f"{seconds:.4f}", f"{row['file_bytes'] / seconds / 1e9:.2f}"


def _verdict(target: dict[str, Any], *, quick: bool) -> str:
    if quick:
        return "not judged with tiny inputs"
    if target["met"] is None:
        return f"not judged on fewer than {target['cores']} cores"
    return "met" if target["met"] else "MISSED"


def _range(found: dict[str, float]) -> str:
    return f"{found['median']:.3g} ({found['lowest']:.3g} to {found['highest']:.3g})"


def _bars(pyplot: Any, rows: list[dict[str, Any]], values: list[float], spread: list[list[float]] | None) -> Any:
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.45 * len(rows)))
    colors = ["tab:orange" if "ndcache" in row["label"] else "tab:gray" for row in rows]
    axes.barh([row["label"] for row in rows], values, xerr=spread, color=colors)
    axes.invert_yaxis()
    return figure, axes
