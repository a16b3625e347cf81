"""Failures of TLS: their meanings, and which of them are final."""

from __future__ import annotations

import os
import ssl
import traceback
from collections.abc import Iterable

import urllib3
from urllib3.util.ssl_match_hostname import CertificateError

from ..errors import TLSError

__all__ = ["close_abandoned", "has_tls_ended", "tls_error"]

_AUTHORITY = "its certificate is from an authority that is not known here"
_HOST = "its certificate is for another host"
#: OpenSSL's codes for certificates that it refuses (X509_V_ERR_…), in words.
_CERTIFICATES = {
    2: _AUTHORITY,
    9: "its certificate is not valid yet",
    10: "its certificate has expired",
    18: "its certificate is self-signed",
    19: "its certificate is from a self-signed authority that is not known here",
    20: _AUTHORITY,
    21: _AUTHORITY,
    23: "its certificate has been revoked",
    62: _HOST,
    64: _HOST,
}
_CLOCK = "Is this machine's clock right? If it is, the server needs a new certificate."
_HINTS = {9: _CLOCK, 10: _CLOCK, 23: None, 62: "Check the host's spelling.", 64: "Give the host by its name."}

_NO_TLS = ("it does not speak TLS", "Does the server speak plain http://?")
_NOTHING_IN_COMMON = (
    "it and this machine have no version or cipher of TLS in common",
    "One of the two is too old, or set to allow too little.",
)
_NAME = ("it does not know this host", "Check the host's spelling.")
_CLIENT = (
    "it wants a certificate from this machine, or another one",
    "Give it through a session of your own: requests.Session().cert.",
)
#: OpenSSL's reasons for failures that a retry cannot mend. All other reasons mean that the connection broke.
_FINAL = {
    **dict.fromkeys(["HTTP_REQUEST", "RECORD_LAYER_FAILURE", "UNKNOWN_PROTOCOL", "WRONG_VERSION_NUMBER"], _NO_TLS),
    **dict.fromkeys(
        [
            *("CA_KEY_TOO_SMALL", "CA_MD_TOO_WEAK", "DH_KEY_TOO_SMALL", "EE_KEY_TOO_SMALL"),
            *("INAPPROPRIATE_FALLBACK", "LIBRARY_HAS_NO_CIPHERS", "NO_CIPHERS_AVAILABLE", "NO_PROTOCOLS_AVAILABLE"),
            *("NO_SHARED_CIPHER", "NO_SUITABLE_SIGNATURE_ALGORITHM"),
            *(
                "TLSV1_ALERT_INAPPROPRIATE_FALLBACK",
                "TLSV1_ALERT_INSUFFICIENT_SECURITY",
                "TLSV1_ALERT_PROTOCOL_VERSION",
            ),
            *("TLSV1_ALERT_NO_APPLICATION_PROTOCOL", "UNSAFE_LEGACY_RENEGOTIATION_DISABLED", "UNSUPPORTED_PROTOCOL"),
            *("UNSUPPORTED_SSL_VERSION", "VERSION_TOO_LOW", "WRONG_CIPHER_RETURNED", "WRONG_SSL_VERSION"),
        ],
        _NOTHING_IN_COMMON,
    ),
    "SSLV3_ALERT_HANDSHAKE_FAILURE": (
        "it and this machine have no cipher of TLS in common, or it wants a certificate from this machine",
        "Give a certificate through a session of your own: requests.Session().cert.",
    ),
    **dict.fromkeys(["TLSV1_UNRECOGNIZED_NAME", "TLSV1_ALERT_UNRECOGNIZED_NAME"], _NAME),
    **dict.fromkeys(
        [
            *("SSLV3_ALERT_BAD_CERTIFICATE", "SSLV3_ALERT_CERTIFICATE_EXPIRED", "SSLV3_ALERT_CERTIFICATE_REVOKED"),
            *("SSLV3_ALERT_CERTIFICATE_UNKNOWN", "SSLV3_ALERT_NO_CERTIFICATE", "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE"),
            *("TLSV13_ALERT_CERTIFICATE_REQUIRED", "TLSV1_ALERT_ACCESS_DENIED", "TLSV1_ALERT_UNKNOWN_CA"),
        ],
        _CLIENT,
    ),
}
#: The parts of OpenSSL that read only certificate and key files, and nothing that a server sent.
_FILE_LIBRARIES = ("PEM", "X509")


def close_abandoned(error: BaseException) -> None:
    """Close the socket that `ssl` leaves open, before Python 3.13, if the peer had reset it (CPython issue 113280)."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        sock = frame.f_locals.get("self")
        if isinstance(sock, ssl.SSLSocket):
            sock.close()


def has_tls_ended(chain: Iterable[BaseException]) -> bool:
    """Return whether the server ended the TLS connection, with or without the notice that TLS requires."""
    return any(isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError) for error in chain)


def tls_error(chain: list[BaseException], host: str, url: str, *, is_connected: bool) -> TLSError | None:
    """Return the error for a final failure of TLS, or None if the connection just broke or did not use TLS.

    Parameters
    ----------
    chain : list of exceptions
        The failure and its causes.
    host : str
        The host that was connected to, for the message.
    url : str
    is_connected : bool
        Whether the handshake was over. Bytes that are not TLS are then a damaged record, and not final.
    """
    error = next((item for item in chain if isinstance(item, ssl.SSLError)), None)
    if isinstance(error, ssl.SSLCertVerificationError):
        words, hint = _certificate(error.verify_code)
    elif error is not None:
        reason = error.reason or ""
        is_final = reason in _FINAL and (not is_connected or "ALERT" in reason)
        is_of_file = error.library in _FILE_LIBRARIES and not is_connected
        if not is_final and not is_of_file:
            return None
        words, hint = _FINAL.get(reason, ("the certificate files given for it cannot be used", None))
    elif any(isinstance(item, CertificateError) for item in chain):
        words, hint = _HOST, _HINTS[62]
    elif any(isinstance(item, urllib3.exceptions.SSLError) for item in chain):
        words, hint = "TLS cannot be set up as configured", None
    else:
        return None
    if error is not None and error.reason:
        words += f" (OpenSSL: {error.reason.lower().replace('_', ' ')})"
    return TLSError(f"no secure connection to {host}: {words}", url=url, hint=hint)


def _certificate(code: int) -> tuple[str, str | None]:
    words = _CERTIFICATES.get(code, f"its certificate cannot be trusted (OpenSSL's code {code})")
    if code in _HINTS:
        return words, _HINTS[code]
    hint = "For a private certificate authority, set REQUESTS_CA_BUNDLE to its file."
    if os.environ.get("SSL_CERT_FILE") and not os.environ.get("REQUESTS_CA_BUNDLE"):
        hint += " (SSL_CERT_FILE is not read.)"
    return words, hint
