"""Mistakes in the user's settings for requests: certificate files, passwords, headers.

Most checks are made only after a request has failed, so that they cost nothing when all is well.
"""

from __future__ import annotations

import errno
import netrc
import os
import re
import ssl
from collections.abc import Iterator
from pathlib import Path

import requests
import urllib3

from ..errors import AuthError, TLSError

__all__ = ["certificate_error", "check_certificates", "credential_error", "damaged_netrc"]

_FILE_ERRORS = {errno.EACCES, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EPERM}


def check_certificates(session: requests.Session, url: str) -> None:
    """Raise `TLSError` if the certificates of authorities would be read from a pipe: opening it may wait forever."""
    verify = session.merge_environment_settings(url, {}, None, None, None)["verify"]
    if isinstance(verify, (str, os.PathLike)) and Path(verify).is_fifo():
        raise _authorities_error(session, verify, "is a pipe", url)


def certificate_error(session: requests.Session, url: str, chain: list[BaseException]) -> TLSError | None:
    """Return the error for a certificate file that `session` cannot use, or None if that is not why it failed."""
    if not any(_may_concern_file(error) for error in chain):
        return None
    settings = session.merge_environment_settings(url, {}, None, None, None)
    verify, cert = settings["verify"], settings["cert"]
    if isinstance(verify, (str, os.PathLike)) and (what := _wrong_authorities(Path(verify))):
        return _authorities_error(session, verify, what, url)
    if cert and (what := _wrong_client_certificate(cert)):
        return TLSError(f"session.cert: {what}", url=url)
    return None


def _authorities_error(session: requests.Session, verify: str | os.PathLike[str], what: str, url: str) -> TLSError:
    names = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE") if session.trust_env else ()
    name = next((name for name in names if os.environ.get(name) == str(verify)), "session.verify")
    hint = f"Set {name} to a file of certificates (PEM), or remove it to use the usual ones."
    return TLSError(f"{name} ({verify}) {what}", url=url, hint=hint)


def _may_concern_file(error: BaseException) -> bool:
    if isinstance(error, ssl.SSLError):
        return not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLSyscallError)
    # The errors that requests raises itself have no errno.
    return isinstance(error, OSError) and (
        error.errno in _FILE_ERRORS or (type(error) is OSError and error.errno is None)
    )


def _wrong_authorities(path: Path) -> str | None:
    try:
        if not os.path.exists(path):
            return "does not exist"
        if os.path.isdir(path):
            # OpenSSL sees only files with names that `openssl rehash` gives.
            hashed = any(re.fullmatch(r"[0-9a-f]{8}\.[0-9]+", name) for name in os.listdir(path))
            return None if hashed else "is a directory without certificates that OpenSSL can find"
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError:
        return "is not a file of certificates (PEM)"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def _wrong_client_certificate(cert: str | os.PathLike[str] | tuple[str, str]) -> str | None:
    file, key = (cert, None) if isinstance(cert, (str, os.PathLike)) else cert
    for path in (file, key):
        if path and not os.path.exists(path):
            return f"{path} does not exist"
    try:
        # Without this password, OpenSSL would ask for one at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(file, key, password=lambda: b"")
    except ssl.SSLError:
        return f"{file}{f' and {key}' if key else ''} are not a certificate and its key (PEM, without a password)"
    except OSError as error:
        return f"{error.filename or file} cannot be read: {error.strerror}"
    return None


def credential_error(
    session: requests.Session, url: str, token: str | None, proxy: str | None, chain: list[BaseException]
) -> AuthError | None:
    """Return the error for a password or header that cannot be sent, or None if that is not why a request failed.

    Parameters
    ----------
    session : requests.Session
    url : str
        May hold a user and password.
    token : str or None
        The token of Hugging Face that was sent.
    proxy : str or None
        The proxy's address, which may hold a user and password.
    chain : list of exceptions
        The failure and its causes.
    """
    if any(isinstance(error, UnicodeDecodeError) for error in chain) and (found := damaged_netrc()):
        return AuthError(f"the netrc file {found} cannot be read", url=url, hint="Set NETRC to another one.")
    if not any(_is_unsendable_header(error) for error in chain):
        return None
    if any(isinstance(error, urllib3.exceptions.InvalidHeader) for error in chain):
        return None  # a header of the response
    names = (name for name, value in _credentials(session, url, token, proxy) if not _can_be_sent(value))
    return AuthError(
        f"{next(names, 'a header')} cannot be sent: it has a character that HTTP does not allow",
        url=url,
        hint="Is there a line break, a quotation mark or a letter in it that does not belong there?",
    )


def _is_unsendable_header(error: BaseException) -> bool:
    """Return whether requests or http.client has refused a header; the latter shows it only in its message."""
    if isinstance(error, UnicodeEncodeError):
        return error.encoding in ("ascii", "latin-1")
    if isinstance(error, requests.exceptions.InvalidHeader):
        return True
    return type(error) is ValueError and str(error).startswith("Invalid header ")


def _credentials(
    session: requests.Session, url: str, token: str | None, proxy: str | None
) -> Iterator[tuple[str, object]]:
    """Yield the texts that are sent with a request, each with a name that the user knows."""
    if token is not None:
        yield "the token of Hugging Face (HF_TOKEN)", token
    yield "the user or password in the URL", "".join(requests.utils.get_auth_from_url(url))
    if isinstance(session.auth, tuple):
        yield "session.auth", "".join(map(str, session.auth))
    for name, value in session.headers.items():
        yield f"the session's header {ascii(name)[:40]}", value
    for cookie in session.cookies:
        yield f"the session's cookie {ascii(cookie.name)[:40]}", cookie.value
    if proxy is not None:
        yield "the user or password of the proxy", "".join(requests.utils.get_auth_from_url(proxy))
    if session.trust_env and damaged_netrc() is None:
        yield f"the user or password in {_netrc_path()}", "".join(requests.utils.get_netrc_auth(url) or ())


def _can_be_sent(value: object) -> bool:
    try:
        data = value if isinstance(value, bytes) else str(value or "").encode("latin-1")
    except UnicodeError:
        return False
    return data == data.lstrip() and not re.search(rb"[\r\n\0]", data)


def _netrc_path() -> str | None:
    """Return the netrc file that requests uses, or None if there is none."""
    names = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    return next((path for path in map(os.path.expanduser, names) if os.path.exists(path)), None)


def damaged_netrc() -> str | None:
    """Return the netrc file, with its damaged line, if it cannot be read and requests goes on without it."""
    path = _netrc_path()
    if path is None:
        return None
    try:
        netrc.netrc(path)
    except netrc.NetrcParseError as error:  # its message may hold a password
        return f"{path} (line {error.lineno})"
    except (OSError, UnicodeError):
        return path
    return None
