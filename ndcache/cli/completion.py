"""Completion in shells: the sources of cached models, and words with colons in bash."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Iterator

from click import shell_completion
from click.shell_completion import CompletionItem

from ..errors import NdcacheError

__all__ = ["cached_sources"]

#: Like click's, but with the line as it was typed instead of bash's words.
_BASH_SOURCE = """\
%(complete_func)s() {
    local IFS=$'\\n' line type value
    COMPREPLY=()
    for line in $(env COMP_LINE="${COMP_LINE:0:COMP_POINT}" COMP_WORDBREAKS="$COMP_WORDBREAKS" \\
            %(complete_var)s=bash_complete "$1"); do
        IFS=',' read -r type value <<< "$line"
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain) COMPREPLY+=("$value") ;;
        esac
    done
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""
#: A character that needs a backslash in a shell.
_SPECIAL = re.compile(r"[^\w@%+=:,./~-]", re.ASCII)


@shell_completion.add_completion_class
class _BashComplete(shell_completion.BashComplete):
    """Completion in bash, which takes ``https:`` for two words, ``https`` and ``:``.

    So the words are read from the line, and a completion is the part after the last character at which bash divides.
    """

    source_template = _BASH_SOURCE
    _is_quoted = False
    _head = ""

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_LINE"] + "."  # the last word has at least this character
        *words, last = shell_completion.split_arg_string(line)
        incomplete = last[:-1]
        try:
            shlex.split(line)
        except ValueError:  # an open quotation, in which bash does not divide
            self._is_quoted = True
        else:
            value = incomplete.partition("=")[2] if incomplete.startswith("-") else incomplete
            breaks = [value.rfind(character) for character in os.environ["COMP_WORDBREAKS"]]
            self._head = value[: max(breaks, default=-1) + 1]
        return words[1:], incomplete

    def format_completion(self, item: CompletionItem) -> str:
        value = item.value.removeprefix(self._head)
        return f"{item.type},{value if self._is_quoted else _SPECIAL.sub(_escaped, value)}"


class _WholeWords(shell_completion.ShellComplete):
    """Completion in shells that replace the whole word, and so ``--device=`` as well."""

    _head = ""

    def get_completion_args(self) -> tuple[list[str], str]:
        words, incomplete = super().get_completion_args()
        option, equals, _ = incomplete.partition("=")
        self._head = option + equals if equals and option.startswith("-") else ""
        return words, incomplete

    def format_completion(self, item: CompletionItem) -> str:
        return super().format_completion(CompletionItem(f"{self._head}{item.value}", item.type, item.help))


@shell_completion.add_completion_class
class _ZshComplete(_WholeWords, shell_completion.ZshComplete):
    pass


@shell_completion.add_completion_class
class _FishComplete(_WholeWords, shell_completion.FishComplete):
    pass


def _escaped(match: re.Match[str]) -> str:
    return f"\\{match[0]}"


def cached_sources(cache_dir: str | None) -> Iterator[str]:
    """Yield the sources of the models in the cache, without their sizes, which take long to find out."""
    from ..files.folder import Folder  # here, as every command registers the shells
    from ..files.notes import read_note
    from ..format.paths import STATE_DIRECTORY
    from ..store.inventory import cache_root

    with contextlib.suppress(NdcacheError, OSError):  # nothing is completed from a cache that cannot be used
        root = cache_root(cache_dir, os.environ.get("NDCACHE_HOME"))
        for state in root.glob(f"[!.]*/*/{STATE_DIRECTORY}"):
            source = (read_note(Folder(root, state.relative_to(root).parts), "source.json") or {}).get("source")
            if isinstance(source, str):
                yield source
