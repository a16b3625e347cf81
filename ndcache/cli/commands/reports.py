"""Commands about the page of a load: ``report``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ...report.page import render_page, write_text
from ...trace import check_writable
from ...urls.redact import printable
from ..group import UserError
from ..options import json_option, quiet_option, verbose_option
from ..output import print_json

__all__ = ["report"]


@click.command()
@click.argument("trace", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("page", type=click.Path(dir_okay=False, path_type=Path), required=False)
@json_option
@quiet_option
@verbose_option
def report(trace: Path, page: Path | None, as_json: bool, quiet: bool) -> None:
    """Make a page about a load from its trace, and print the page's path.

    TRACE is a file that --trace wrote. PAGE is by default a file beside it that ends in .html; it is replaced.
    """
    try:
        html = render_page(json.loads(trace.read_bytes()))
    except ValueError as error:
        raise UserError(f"{printable(str(trace))}: this is not a trace that ndcache wrote") from error
    page = page or trace.with_suffix(".html")
    check_writable(page, "page")
    write_text(page, html)
    if as_json:
        print_json({"path": str(page)})
    else:
        click.echo(printable(str(page)))
