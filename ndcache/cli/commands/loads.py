"""Commands that load or download a model: ``load`` and ``fetch``."""

from __future__ import annotations

from typing import Any

import click

from ...loader import Loader
from ...loaders.plan import FetchPlan
from ..options import (
    device_option,
    files_option,
    json_option,
    loader_options,
    make_loader,
    names_option,
    quiet_option,
    report_option,
    source_argument,
    sources_argument,
    trace_option,
)
from ..output import print_facts, print_json, print_table, say
from ..several import for_each
from ..show.json_values import fetch_json, load_json, plan_json
from ..show.loads import load_facts
from ..show.plans import plan_error, plan_facts, plan_rows
from ..values import DIRECTORY, locate_source, location_words

__all__ = ["fetch", "load"]


@click.command()
@source_argument
@device_option(default="cpu")
@names_option
@click.option("--no-decode", is_flag=True, help="Keep bfloat16 as it is stored, instead of expanding it to float32.")
@json_option
@quiet_option
@trace_option
@report_option
@files_option
@loader_options()
def load(
    source: str,
    device: str,
    names: tuple[str, ...],
    no_decode: bool,
    files: bool,
    as_json: bool,
    quiet: bool,
    trace: str | None,
    report: str | None,
    **options: Any,
) -> None:
    """Load a model and report time and bytes."""
    with (
        make_loader(options, source) as loader,
        loader.load(
            source,
            device,
            names=names or None,
            decode=not no_decode,
            files=files,
            progress=not quiet,
            trace=trace,
            report=report,
        ) as weights,
    ):
        if as_json:
            print_json(load_json(source, weights))
        else:
            print_facts(load_facts(source, device, weights))


@click.command()
@sources_argument
@names_option
@quiet_option
@trace_option
@report_option
@files_option
@click.option(
    "--include",
    metavar="NAME|PATTERN",
    multiple=True,
    help="More companion files to fetch, such as README.md. Repeatable.",
)
@click.option("--exclude", metavar="PATTERN", multiple=True, help="Companion files to leave out. Repeatable.")
@click.option("--local-dir", metavar="DIR", type=DIRECTORY, help="Put the model into DIR, and not into the cache.")
@click.option("--force", is_flag=True, help="Download again what is cached, and replace it.")
@click.option("--dry-run", "-n", is_flag=True, help="Show what would be fetched, and write nothing.")
@json_option
@loader_options()
@click.pass_context
def fetch(
    ctx: click.Context,
    /,
    sources: tuple[str, ...],
    names: tuple[str, ...],
    quiet: bool,
    trace: str | None,
    report: str | None,
    files: bool,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    local_dir: str | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Download models into the cache and print their directories."""
    _check_places({"--local-dir": local_dir, "--trace": trace, "--report": report}, len(sources), dry_run=dry_run)
    wanted: dict[str, Any] = {
        "names": names or None,
        "files": files,
        "include": include,
        "exclude": exclude,
        "force": force,
        "local_dir": local_dir,
        "progress": not quiet,
        "trace": trace,
        "report": report,
    }

    def work(loader: Loader, source: str) -> dict[str, object]:
        if dry_run:
            plan = loader.fetch(source, dry_run=True, **wanted)
            _show_plan(source, plan, as_json=as_json)
            return plan_json(source, plan)
        directory = loader.fetch(source, **wanted)
        if not as_json:
            click.echo(directory)
        return fetch_json(source, directory)

    values, is_good = for_each(sources, options, work)
    if as_json:
        print_json(values)
    if not is_good or any(value.get("has_room") is False for value in values):
        ctx.exit(1)


def _check_places(places: dict[str, str | None], count: int, *, dry_run: bool) -> None:
    """Check the options that name a place for what comes of one download."""
    for flag, value in places.items():
        if value is not None and count > 1:
            raise click.UsageError(f"{flag} is for one model; give one SOURCE.")
        if value is not None and dry_run and flag != "--local-dir":
            raise click.UsageError(f"{flag} is for a download, and --dry-run makes none.")


def _show_plan(source: str, plan: FetchPlan, *, as_json: bool) -> None:
    if not as_json:
        print_table(("file", "size ", "to fetch "), plan_rows(plan))
        click.echo()
        print_facts(plan_facts(location_words(locate_source(source)), plan))
    if (error := plan_error(plan)) is not None:
        say(f"error: {error}")
