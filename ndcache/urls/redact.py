"""Texts that can be shown: without secrets, and without control characters from servers or file names."""

from __future__ import annotations

import logging
import re

from .url import UrlError, parse

__all__ = ["printable", "redact"]

_UNREADABLE = "(unreadable URL)"


def printable(text: str) -> str:
    """Return `text` in one line, without characters that control a terminal or reverse the text."""
    if text.isprintable():
        return text
    line = " ".join(text.splitlines())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def redact(text: str) -> str:
    """Return a URL, or a text that was meant to be one, without user, password, query and fragment.

    If the text is neither a URL nor a path, leave out everything that may be a password.
    """
    is_url = re.match(r"\s*(https?|s3|gs|az)://", text, re.IGNORECASE)
    return printable(_redact_url(text.strip()) if is_url else _redact_other(text))


def _redact_url(text: str) -> str:
    start, separator, rest = text.partition("://")
    rest = rest.rpartition("@")[2] if re.fullmatch("[^/?#@]*@[^@]*", rest) else rest
    shown, later = _before_query(rest)
    try:
        url = parse(text)
    except UrlError:
        # A host and a path are harmless, whatever is wrong with them; a number may be a port.
        is_harmless = re.fullmatch(
            r"(\[[0-9A-Fa-f:.]*\]?|[\w.-]*)(:[0-9]{0,5})?(/[^:;@%\\]*)?", shown
        ) and not re.search("@|%40", text)
        return start + separator + shown if is_harmless else _UNREADABLE
    host, _, path = shown.partition("/")
    if not path and "@" in later:
        return _UNREADABLE  # "user:1234#secret@host" has the port 1234 and no user; nobody means that
    before, at, after = path.rpartition("@")
    if at and (url.port is not None or ":" in before):
        return (
            f"{start}{separator}{host.partition(':')[0]}/…@{after}"  # nobody means the port 1234 in "user:1234/5@host"
        )
    return start + separator + shown


def _redact_other(text: str) -> str:
    """Redact a local path, hf://owner/name@revision, or a misspelled URL: "http;//", "https:/", "user:pw@host"."""
    if re.match(r"[A-Za-z]:[\\/]", text):
        return text.partition("?")[0]  # a Windows drive
    match = re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]*[:;]+)?[/\\]*", text)
    assert match is not None
    start, is_hf = match[0], bool(re.match(r"\s*hf://", text, re.IGNORECASE))
    is_typo = not is_hf and bool(
        re.search(r"[:;]|[/\\]{2}", start) or re.match(r"\s*([a-z]+[/\\]{2}|https?\W)", text, re.IGNORECASE)
    )
    shown, later = _before_query(text) if is_typo or is_hf else (text.partition("?")[0], "")
    before, at, after = re.sub("%40", "@", shown[len(start) :]).rpartition("@")
    if at and (is_typo or re.search("[:;]", before)):
        if "@" in later:
            return _UNREADABLE
        return (start if re.match(r"\s*(https?\W|hf:|[/\\]*$)", start, re.IGNORECASE) else "") + after
    if (is_typo and "@" in later) or ((is_typo or is_hf) and re.search("[:;](?![0-9]{1,5}(/|$))", shown[len(start) :])):
        return _UNREADABLE
    return shown


def _before_query(text: str) -> tuple[str, str]:
    shown = re.split("[?#]", text, maxsplit=1)[0]
    return shown, text[len(shown) :]


class _PrintableRecords(logging.Filter):
    """Make the log records of ndcache printable, as their names and addresses come from servers and files."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if not message.isprintable():
            record.msg, record.args = printable(message), None
        return True


logging.getLogger("ndcache").addFilter(_PrintableRecords())
