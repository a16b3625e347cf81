"""Commands that measure this machine beside a load: ``bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ...report.page import render_page, write_text
from ..options import (
    device_option,
    find_root,
    json_option,
    loader_options,
    make_loader,
    names_option,
    quiet_option,
    report_option,
    source_argument,
)
from ..output import print_json, print_table, say
from ..show.benches import bench_json, bench_rows, limit_sentence, page_rates, rates_sentence

__all__ = ["bench"]


@click.command()
@source_argument
@device_option(default="cpu")
@names_option
@json_option
@quiet_option
@report_option
@loader_options()
def bench(
    source: str,
    device: str,
    names: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    report: str | None,
    **options: Any,
) -> None:
    """Load a model, and measure the network, disk and device beside it.

    The model is loaded into a temporary cache, on the disk of the cache, which needs as much room as the model and is
    removed afterwards.
    """
    from ..bench.run import run_bench
    from ..bench.temporary import temporary_cache

    with temporary_cache(find_root(options["cache_dir"])) as folder:
        with make_loader({**options, "cache_dir": str(folder / "cache")}, source) as loader:
            found = run_bench(
                loader,
                source,
                device,
                folder,
                names=names,
                is_limited=options["limit_rate"] is not None,
                progress=not quiet,
                report=report,
                say=say if not quiet else lambda line: None,
            )
        if report is not None:  # the load has written one without the rates
            write_text(Path(report), render_page(found.trace, list(page_rates(found)), rates_sentence(found)))
    if as_json:
        print_json(bench_json(source, found))
    else:
        print_table(("measured", "MiB/s ", "load used ", "how"), bench_rows(found))
        click.echo(f"\n{limit_sentence(found)}")
