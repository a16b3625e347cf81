"""Commands for models on disk: ``ls``, ``rm``, ``prune`` and ``verify``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from ... import cache
from ...errors import NdcacheError, UnsafeCacheError, redact
from ...loader import Loader
from ...loaders.verification import VerifyReport
from ...location import locate
from ...store.housekeeping.listing import find_denied
from ...store.housekeeping.matching import match_source
from ...store.housekeeping.pruning import PruneReport
from ...store.housekeeping.quantities import parse_duration, parse_size
from ...urls.redact import printable
from ..filters import SORT_KEYS, Filter, has_form_of_filter, parse_filter
from ..group import UserError, argument_errors, one_line
from ..options import (
    MODEL_OPTIONS,
    find_root,
    json_option,
    loader_options,
    only_scope_option,
    quiet_option,
)
from ..output import print_facts, print_json, print_lines, print_table, say
from ..several import for_each
from ..show.caches import (
    denied_json,
    denied_words,
    model_columns,
    model_json,
    model_name,
    model_rows,
    prune_json,
    prune_lines,
    prune_total,
    total_words,
    verify_error,
    verify_facts,
    verify_gap,
)
from ..show.json_values import verify_json
from ..values import CACHED, SOURCE, WholeNumber, locate_source, location_words

__all__ = ["ls", "prune", "rm", "verify"]

_RULES = ("older_than", "keep_last", "partial", "aside", "max_size")

dry_run_option = click.option("--dry-run", "-n", is_flag=True, help="Remove nothing; show what would be removed.")


def _checked(parse: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, str | None], str | None]:
    """Return a callback that refuses a text that `parse` cannot read."""

    def check(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
        try:
            if value is not None:
                parse(value)
        except ValueError as error:
            raise click.BadParameter(f"{error}.") from error
        return value

    return check


def _filters(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> list[Filter]:
    try:
        return [parse_filter(value) for value in values]
    except ValueError as error:
        raise click.BadParameter(f"{error}.") from error


def _filters_or_patterns(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[Filter]:
    """Read arguments: all patterns together are one filter."""
    matches = [match_source(value) for value in values if not has_form_of_filter(value)]
    found = _filters(ctx, param, tuple(filter(has_form_of_filter, values)))
    if matches:
        found.append(lambda model: any(is_meant(model) for is_meant in matches))
    return found


@click.command()
@click.argument("wanted", metavar="[SOURCE|PATTERN|FILTER]...", type=CACHED, nargs=-1, callback=_filters_or_patterns)
@click.option(
    "--filter",
    "filters",
    metavar="FILTER",
    multiple=True,
    callback=_filters,
    help="Only models for which this holds: size>1GB, used>30d, age<2w, partial, complete, in-use. Repeatable.",
)
@click.option(
    "--sort",
    type=click.Choice(list(SORT_KEYS)),
    help="Order: by source, the largest first (size), the one used last first (used), the youngest first (age), those"
    " with missing shards first (state).",
)
@click.option("--reverse", "-r", is_flag=True, help="Reverse the order.")
@click.option("--paths", is_flag=True, help="Also show the directories.")
@click.option("--quiet", "-q", is_flag=True, help="Print only the sources, one a line.")
@json_option
@only_scope_option
@loader_options("cache_dir")
def ls(
    wanted: list[Filter],
    filters: list[Filter],
    sort: str | None,
    reverse: bool,
    paths: bool,
    quiet: bool,
    as_json: bool,
    cache_dir: str | None,
    scope: str | None,
) -> None:
    """List the models in the cache, with their state, size, age and last use.

    Bytes that several models share count once, for the first of them.
    """
    everything, denied = cache.models(scope=scope, cache_dir=cache_dir), _say_denied(cache_dir, scope)
    found = [model for model in everything if all(is_listed(model) for is_listed in (*wanted, *filters))]
    if sort is not None:
        found.sort(key=SORT_KEYS[sort])
    if reverse:
        found.reverse()
    if as_json:
        print_json([*map(model_json, found), *map(denied_json, denied)])
    elif quiet:
        for model in found:
            click.echo(printable(model.source))
    elif found:
        columns = model_columns(found, has_paths=paths)
        print_table(columns, model_rows(found, columns))
        click.echo(f"\n{total_words(found, everything)}")
    elif everything:
        say("no model matches")
    else:
        say(f"no model in {printable(str(find_root(cache_dir)))}" + (f" in the scope {scope!r}" if scope else ""))


@click.command()
@click.argument("sources", metavar="[SOURCE|PATTERN]...", type=CACHED, nargs=-1)
@click.option("--all", "takes_all", is_flag=True, help="Remove all models.")
@click.option("--force", is_flag=True, help="Remove models that are in use, too.")
@dry_run_option
@json_option
@click.option("--quiet", "-q", is_flag=True, help="Print no result, only errors.")
@only_scope_option
@loader_options("cache_dir")
@click.pass_context
def rm(
    ctx: click.Context,
    /,
    sources: tuple[str, ...],
    takes_all: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    cache_dir: str | None,
    scope: str | None,
) -> None:
    """Remove models from the cache, without asking.

    SOURCE may also be a path that ls shows, and PATTERN one like hf://mlc-ai/*. A model that a load uses is kept. The
    exit status is 1 if one is, and if nothing matches.
    """
    if takes_all is bool(sources):
        raise click.UsageError("Give sources or patterns, or --all.")
    report = cache.delete(
        *("*",) if takes_all else sources, scope=scope, cache_dir=cache_dir, force=force, dry_run=dry_run
    )
    denied = _say_denied(cache_dir, scope) if takes_all or report.unmatched else []
    if as_json:
        print_json(prune_json(report, denied))
    elif not quiet:
        print_lines(prune_lines(report))
    errors = [] if takes_all else [_why_unmatched(source, cache_dir) for source in _unmatched(sources, report)]
    if takes_all and report.unmatched:
        say("the cache is empty")
    errors += [f"{model_name(model)} is in use and was kept; --force removes it" for model in report.in_use]
    _say_errors(ctx, [*errors, *map(one_line, report.failed)])


@click.command()
@click.option(
    "--older-than",
    metavar="AGE",
    callback=_checked(parse_duration),
    help="Remove models that were not used for this long: 30d, 12h, 2w.",
)
@click.option(
    "--keep-last",
    metavar="N",
    type=WholeNumber(0),
    help="Keep the N models that were used last. Without another rule, remove all others.",
)
@click.option("--partial", is_flag=True, help="Remove models with missing shards, and other interrupted downloads.")
@click.option("--aside", is_flag=True, help="Remove bad files that were set aside.")
@click.option(
    "--max-size",
    metavar="SIZE",
    callback=_checked(parse_size),
    help="Remove the models that were not used for the longest time, until the rest has this size: 50GB, 50GiB.",
)
@dry_run_option
@json_option
@click.option("--quiet", "-q", is_flag=True, help="Print no result, only errors.")
@only_scope_option
@loader_options("cache_dir")
@click.pass_context
def prune(ctx: click.Context, /, as_json: bool, quiet: bool, **rules: Any) -> None:
    """Remove models that nobody needs any more, without asking.

    What any of the rules names is removed, except for the models that --keep-last protects and those that a load uses.
    """
    if all(rules[name] is None or rules[name] is False for name in _RULES):
        raise click.UsageError(f"Say what to remove: --{', --'.join(_RULES).replace('_', '-')}.")
    report = cache.prune(**rules)
    denied = _say_denied(rules["cache_dir"], rules["scope"])
    if as_json:
        print_json(prune_json(report, denied))
    elif not quiet:
        print_lines([*prune_lines(report), prune_total(report)])
    for model in report.in_use:
        say(f"{model_name(model)} is in use and was kept")
    _say_errors(ctx, map(one_line, report.failed))


def _say_denied(cache_dir: str | None, scope: str | None) -> list[Path]:
    """Return the folders of the cache that this account may not read, and warn of them."""
    if denied := find_denied(find_root(cache_dir), scope):
        say(f"warning: {denied_words(denied)}")
    return denied


def _unmatched(sources: tuple[str, ...], report: PruneReport) -> Iterator[str]:
    """Yield the sources, as they were typed, that are not in the cache."""
    return (source for source in sources if redact(source) in report.unmatched)


def _why_unmatched(source: str, cache_dir: str | None) -> str:
    """Return what is wrong with a source that is not in the cache."""
    if "*" in source:
        return f"nothing in the cache matches {redact(source)}"
    word = source.strip("/. ")
    similar = next((model.source for model in cache.models(cache_dir=cache_dir) if word in model.source), None)
    if word and similar is not None and "/" not in word and not word.endswith(":"):
        return f"{redact(source)} is not in the cache; did you mean {similar}?"
    try:
        with argument_errors():
            location = locate(source)
        if location.directory is not None:
            raise UnsafeCacheError(
                f"{location.directory} does not lie in the cache {find_root(cache_dir)} as a model does",
                hint="ndcache deletes only what it fetched; remove the directory yourself.",
            )
    except (NdcacheError, UserError) as error:
        return one_line(error)
    return f"{location} is not in the cache"


def _say_errors(ctx: click.Context, errors: Iterable[str]) -> None:
    """Print errors, if there are any, and end with exit status 1."""
    errors = list(errors)
    for error in errors:
        say(f"error: {printable(error)}")
    if errors:
        ctx.exit(1)


@click.command()
@click.argument("sources", metavar="[SOURCE]...", type=SOURCE, nargs=-1)
@click.option("--all", "takes_all", is_flag=True, help="Check all models in the cache.")
@click.option("--fail-on-missing", is_flag=True, help="Exit with status 1 if shards were not downloaded yet, too.")
@json_option
@quiet_option
@loader_options(*MODEL_OPTIONS, "max_workers", "integrity", "lock")
@click.pass_context
def verify(
    ctx: click.Context,
    /,
    sources: tuple[str, ...],
    takes_all: bool,
    fail_on_missing: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Compare models on disk with their digests.

    Reads every byte again. The exit status is 1 if a shard is bad. Shards of a cached model that are missing are named,
    and count as an error with --fail-on-missing.
    """
    if takes_all is bool(sources):
        raise click.UsageError("Give sources, or --all.")
    for name in ("integrity", "lock", "revision") if takes_all else ():
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name} is for one model, and not for --all.")
    are_several, progress = takes_all or len(sources) > 1, not quiet and sys.stderr.isatty()
    is_good = True

    def show(source: str, report: VerifyReport, *, is_remote: bool, name: str = "") -> dict[str, object]:
        nonlocal is_good
        name = name or source
        if not as_json:
            names = [("source", name)] if are_several else []
            print_facts([*names, *verify_facts(report, is_remote=is_remote)])
        prefix = f"{name}: " if are_several else ""
        is_good &= _say_problem(prefix, report, is_remote=is_remote, fails_on_missing=fail_on_missing)
        return verify_json(source, report)

    if takes_all:
        known = {name: options[name] for name in ("cache_dir", "scope", "max_workers") if options[name] is not None}
        values, have_all = list[dict[str, object]](), True
        for model, report in cache.verify(**known, progress=progress):
            values.append(show(model.source, report, is_remote=True, name=model_name(model)))
        if not values:
            say("the cache is empty")
        values += map(denied_json, _say_denied(options["cache_dir"], options["scope"]))
    else:

        def work(loader: Loader, source: str) -> dict[str, object]:
            location = locate_source(source)
            report = loader.verify(source, progress=progress)
            return show(location_words(location), report, is_remote=location.is_remote)

        values, have_all = for_each(sources, options, work)
    if as_json:
        print_json(values)
    if not (is_good and have_all):
        ctx.exit(1)


def _say_problem(prefix: str, report: VerifyReport, *, is_remote: bool, fails_on_missing: bool) -> bool:
    """Print what is wrong with a model, or missing; return False if that is an error."""
    error, gap = verify_error(report, is_remote=is_remote), verify_gap(report)
    if error is None and fails_on_missing and report.missing:
        error = gap
    if error is not None:
        say(f"error: {printable(prefix + error)}")
    elif gap is not None:
        say(f"warning: {printable(prefix + gap)}")
    return error is None
