"""Parsing of URLs and redirects; ambiguous ones are refused, row 41 of docs/faults.rst."""

from __future__ import annotations

import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import urllib3

import ndcache
from ndcache.urls.url import UrlError, parse

# --- parsing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "origin", "sent"),
    [
        ("http://host", ("http", "host", 80), "http://host/"),
        ("HTTPS://Host:8443/A?b#c", ("https", "host", 8443), "https://host:8443/A?b"),
        ("https://user:p%40ss@host/", ("https", "host", 443), "https://host/"),
        ("http://host.:80/", ("http", "host.", 80), "http://host.:80/"),
        ("http://h_o-st.a/", ("http", "h_o-st.a", 80), "http://h_o-st.a/"),
        ("http://127.0.0.1:1/", ("http", "127.0.0.1", 1), "http://127.0.0.1:1/"),
        ("http://[::1]:8000/a", ("http", "::1", 8000), "http://[::1]:8000/a"),
        ("http://[0:0::0001]/", ("http", "::1", 80), "http://[::1]/"),
        ("https://bücher.example/ü b?ü", ("https", "xn--bcher-kva.example", 443), None),
        ("http://host/a@b:c//d/../[e]", ("http", "host", 80), "http://host/a@b:c//d/../[e]"),
        ("http://host/100%?a=%zz", ("http", "host", 80), "http://host/100%25?a=%25zz"),
    ],
)
def test_row_41_urls_that_every_parser_reads_alike(text: str, origin: tuple[str, str, int], sent: str | None) -> None:
    url = parse(text)
    assert url.origin == origin
    assert str(url).isascii()
    assert sent in (None, str(url))
    assert parse(str(url)).origin == origin
    assert urlsplit(str(url)).hostname == urllib3.util.parse_url(str(url)).host.strip("[]") == url.host  # type: ignore[union-attr]


AMBIGUOUS = [
    *("", "host", "http:host", "http:/host", "http:///host", "ftp://host/", "file:///etc/passwd", "http//host"),
    *("http://evil\\@home/", "http://evil\\\\@home/", "http://home\\evil/", "http:\\\\home/", "http://home/a\\b"),
    *("http://ho\tme/", "http://ho\nme/", "http://home\r\n/", "\thttp://home/", "http://home\0/", "http://home/\x1b"),
    *(
        "http://ho me/",
        "http:// home/",
        "http://home /",
        "http://home\x85/",
        "http://home\u2028/",
        "http://home\u200b/",
    ),
    *("http://a@b@home/", "http://a b@home/", "http://[@home/", "http://user:p/w@home/", "http://user:p#w@home/"),
    *("http://%65vil/", "http://home%2eevil/", "http://home%00/", "http://home%40evil/", "http://home%/"),
    *("http://home。evil/", "http://home．evil/", "http://home｡evil/", "http://ｈome/", "http://ﬁle/", "http://①/"),
    *("http://home\u00ad/", "http://\u212aelvin/", "http://home\u2100/", "http://١٢٧.0.0.1/", "http://127.0.0.１/"),
    *("http://[::1/", "http://::1/", "http://[::1]x/", "http://[::1%25lo]/", "http://[::1%lo]/", "http://[home]/"),
    *("http://[]/", "http://x[::1]/", "http://[::1]:/", "http://[[::1]]/", "http://[v1.a]/", "http://[127.0.0.1]/"),
    *("http://home:/", "http://home:0/", "http://home:080/", "http://home:+80/", "http://home: 80/", "http://home:-1/"),
    *("http://home:65536/", "http://home:99999999999/", "http://home:８０/", "http://home:8_0/", "http://home:80:81/"),
    *("http://.home/", "http://home../", "http://a..b/", "http://./", "http://*.home/", "http://ho*me/", "http://{}/"),
    *("http://127.1/", "http://0177.0.0.1/", "http://0x7f.0.0.1/", "http://2130706433/", "http://127.0.0.1./"),
    *("http://127.0.0.256/", "http://1.2.3.4.5/", "http://0x/", "http://home.1/"),
    *("http://@/", "http://user@/", "http://user:pw@:80/", "http://" + "a" * 64 + "/", "http://" + "a." * 130 + "b/"),
    *("http://home;evil/", "http://home,evil/", "http://home\udc80/", "http://home|evil/", "http://xn--\u00e9/"),
]


@pytest.mark.parametrize("text", AMBIGUOUS)
def test_row_41_ambiguous_urls_are_refused(text: str) -> None:
    with pytest.raises(UrlError) as caught:
        parse(text)
    assert "home" not in str(caught.value)


@pytest.mark.parametrize("text", [text for text in AMBIGUOUS if text.startswith("http://") and text == text.strip()])
def test_row_41_ambiguous_urls_are_refused_wherever_they_are_given(
    text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: asked.append(args))
    with pytest.raises(ValueError, match=r"this URL cannot be used"):
        ndcache.load(text)
    with pytest.raises(ValueError, match=r"this URL cannot be used"):
        ndcache.load("http://127.0.0.1:9/", mirrors=[text])
    if "\0" not in text and "\udc80" not in text:
        monkeypatch.setenv("HF_ENDPOINT", text)
        with pytest.raises(ValueError, match="HF_ENDPOINT cannot be used"):
            ndcache.load("hf://owner/name")
    assert not asked


@pytest.mark.parametrize(
    ("target", "leads_to"),
    [
        ("b", "http://home:81/a/b"),
        ("/b?c", "http://home:81/b?c"),
        ("?c", "http://home:81/a/x?c"),
        (" ../b ", "http://home:81/b"),
        ("//other/b", "http://other/b"),
        ("https://home:81/b", "https://home:81/b"),
        ("/a//evil/b", "http://home:81/a//evil/b"),
        ("a:b", None),
        ("///evil/b", None),
        ("http:///evil/b", None),
        ("http:b", None),
        ("http:/evil/b", None),
        ("/\\evil/b", None),
        ("\\\\evil/b", None),
        ("/\t/evil/b", None),
        ("//evil\\@home:81/", None),
        ("http://evil\\@home:81/", None),
        ("\x01http://evil/", None),
    ],
)
def test_row_41_a_redirect_that_can_be_misread_is_refused(target: str, leads_to: str | None) -> None:
    here = parse("http://user:pw@home:81/a/x")
    if leads_to is None:
        with pytest.raises(UrlError):
            here.join(target)
    else:
        assert str(here.join(target)) == leads_to
