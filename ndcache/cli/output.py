"""Print results on standard output, and messages on standard error."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Sequence

import click

from ..urls.redact import printable

__all__ = ["print_facts", "print_json", "print_lines", "print_table", "say"]

#: The lines that are written at once.
_LINES = 1000
#: Characters of JSON that are too many to be read by people: indenting them would take seconds.
_LONG_JSON = 1 << 20


def say(line: str) -> None:
    """Print a line on standard error."""
    from tqdm import tqdm  # here, as most commands print nothing with it, nor with rich

    tqdm.write(line, file=sys.stderr)  # above the progress bar, if there is one
    sys.stderr.flush()


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print labels and values in two columns; a pair of empty strings is an empty line."""
    facts = list(facts)
    width = max((len(label) for label, _ in facts), default=0)
    for label, value in facts:
        click.echo(f"{label:<{width}}  {printable(value)}".rstrip())


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; columns whose names end in a space hold numbers, and are aligned to the right.

    The rows may be many: so they are printed while they are made, some at once, and columns may grow on the way.
    """
    # Not rich's Table, which takes 0.3 ms for each row: models have 100,000 tensors.
    from rich.console import Console
    from rich.text import Text

    headers = [column.strip() for column in columns]
    right = [column.endswith(" ") for column in columns]
    widths = list(map(_width, headers))

    def line(row: Sequence[str]) -> str:
        # A long row stays one line. The terminal wraps it, and a copy of it is still one line.
        parts = []
        for cell, width, is_right in zip(row, widths, right, strict=True):
            space = " " * (width - _width(cell))
            parts.append(space + cell if is_right else cell + space)
        return "  ".join(parts).rstrip()

    rest, is_first = iter(rows), True
    while (some := list(itertools.islice(rest, _LINES))) or is_first:
        cells = [[_plain(cell) for cell in row] for row in some]
        widths = [max([before, *map(_width, column)]) for before, *column in zip(widths, *cells, strict=True)]
        if is_first:
            Console(file=sys.stdout, highlight=False).print(Text(line(headers), style="bold"), soft_wrap=True)
            is_first = False
        _print_lines(map(line, cells))


def _plain(cell: str) -> str:
    return cell if cell.isascii() and cell.isprintable() else printable(cell)


def _width(cell: str) -> int:
    if cell.isascii():
        return len(cell)
    from rich.cells import cell_len

    return cell_len(cell)


def print_lines(lines: Iterable[str]) -> None:
    """Print lines, many at a time: there may be 100,000."""
    _print_lines(map(_plain, lines))


def _print_lines(lines: Iterable[str]) -> None:
    rest = iter(lines)
    while some := list(itertools.islice(rest, _LINES)):
        click.echo("\n".join(some))


def print_json(value: object) -> None:
    """Print JSON, and nothing else: on one line if it is very long."""
    text = json.dumps(value)
    click.echo(text if len(text) > _LONG_JSON else json.dumps(value, indent=2))
