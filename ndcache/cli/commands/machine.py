"""Commands about this machine: ``doctor`` and ``demo``."""

from __future__ import annotations

import functools

import click

from ...report.words import format_count
from ...urls.redact import printable
from ..doctor import facts
from ..options import (
    cache_dir_option,
    check_finite,
    device_option,
    find_root,
    json_option,
    quiet_option,
    verbose_option,
)
from ..output import print_facts, print_json, print_table, say
from ..show.devices import device_words
from ..show.json_values import demo_json, doctor_json
from ..show.loads import demo_rows
from ..values import WholeNumber

__all__ = ["demo", "doctor"]


@click.command()
@cache_dir_option
@json_option
@quiet_option
@verbose_option
def doctor(cache_dir: str | None, as_json: bool, quiet: bool) -> None:
    """Show versions, GPUs, the cache and the environment."""
    found = facts(functools.partial(find_root, cache_dir))
    if as_json:
        print_json(doctor_json(found))
    else:
        print_facts(found)


@click.command()
@device_option(default="auto")
@click.option(
    "--size-mib", type=WholeNumber(1), metavar="MIB", default=40, show_default=True, help="Size of the model."
)
@click.option(
    "--rate-mib",
    type=click.FloatRange(0, min_open=True),
    metavar="MIB/S",
    callback=check_finite,
    default=8.0,
    show_default=True,
    help="How fast the server sends over each connection.",
)
@json_option
@quiet_option
@verbose_option
@click.pass_context
def demo(ctx: click.Context, /, device: str, size_mib: int, rate_mib: float, as_json: bool, quiet: bool) -> None:
    """Load a small model from a slow local server in three ways.

    It is loaded with one worker, with eight, and from the cache. No network is needed: the model is generated and
    served on this machine. Every loaded value is compared with the generated one; the exit status is 1 if one differs.
    """
    from ..demo import run_demo

    report = run_demo(
        device,
        size_mib=size_mib,
        rate_mib=rate_mib,
        progress=not quiet,
        say=say if not quiet else lambda line: None,
        describe=lambda found: (
            "the CPU (no hardware GPU was found)" if (device, found) == ("auto", "cpu") else device_words(found)
        ),
    )
    if as_json:
        print_json(demo_json(report))
    else:
        print_table(("loaded", "workers ", "seconds ", "MiB/s ", "speed-up "), demo_rows(report))
    if wrong := sorted({name for load in report.loads for name in load.wrong}):
        say(f"error: {format_count(len(wrong), 'tensor')} not as generated: {printable(', '.join(wrong[:5]))}")
        ctx.exit(1)
    if not as_json:
        click.echo(
            f"\nEvery value of {format_count(len(report.manifest), 'tensor')} was as generated, in all three loads."
        )
