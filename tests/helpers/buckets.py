"""A server of buckets that checks signatures, and their time, as S3, Google Cloud Storage and Azure do."""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import hmac
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from .requirements import need_s3rver
from .servers import FileServer, Request

ACCESS_KEY = "AKIDEXAMPLE"
#: In every form in which it could be shown.
SECRET = "wJalrXUtnFEMIbPxRfiCYEXAMPLEKEY0"
ACCOUNT = "account"
AZURE_KEY = base64.b64encode(SECRET.encode()).decode()
GOOGLE_EMAIL = "reader@project.iam.gserviceaccount.com"

_RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)


class BucketServer(FileServer):
    """Serve a directory as a storage does, whose signatures it checks: ``directory/bucket/key``.

    Parameters
    ----------
    directory : pathlib.Path
    scheme : str
        ``"s3"``, ``"gs"`` or ``"az"``.

    Attributes
    ----------
    is_public : bool
        Whether requests without a signature are answered.
    refused : list of str
        The code of each refusal so far.
    expired : callable
        Called with each valid signature: whether to say that it has expired.
    cut : dict of str to int
        Bodies that break off after so many bytes, once, by path.
    secret : str
        The secret that signatures must be made with; for Google, anything but `SECRET` is the key of somebody else.
    given : str or None
        A signature that is accepted as it is.
    region : str or None
        The bucket's region, which S3 tells those who sign for another one.
    code : str or None
        The code of a 404 for every request.
    """

    def __init__(self, directory: Path, scheme: str) -> None:
        self.scheme = scheme
        self.is_public = False
        self.refused: list[str] = []
        self.signatures: list[str] = []
        self.expired: Callable[[str], bool] = lambda signature: False
        self.cut: dict[str, int] = {}
        self.secret = SECRET
        self.given: str | None = None
        self.region: str | None = None
        self.code: str | None = None
        super().__init__(directory)

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment variables with which obstore signs for this server."""
        url = self.url.rstrip("/")
        if self.scheme == "s3":
            return {
                "AWS_ENDPOINT_URL": url,
                "AWS_REGION": "eu-north-1",
                "AWS_ACCESS_KEY_ID": ACCESS_KEY,
                "AWS_SECRET_ACCESS_KEY": SECRET,
            }
        if self.scheme == "gs":
            return {"GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(service_account(url))}
        return {
            "AZURE_STORAGE_ENDPOINT": f"{url}/{ACCOUNT}",
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY,
        }

    @property
    def secret_names(self) -> list[str]:
        """Return the names of the environment variables that have credentials."""
        return [name for name in self.environment if name.endswith(("KEY", "KEY_ID"))]

    def path(self, name: str) -> str:
        """Return the path of requests for a file."""
        return f"/{quote(name)}" if self.scheme != "az" else f"/{ACCOUNT}/{quote(name)}"

    def _answer_file(self, handler: BaseHTTPRequestHandler, request: Request) -> None:
        code = self._refusal(request)
        if code is None:
            if self.scheme == "az":
                request = Request("GET", request.target.replace(f"/{ACCOUNT}/", "/", 1), request.headers)
            super()._answer_file(handler, request)
            return
        self.refused.append(code)
        message = "Request has expired" if code == "AccessDenied" and "?" in request.target else "No."
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        handler.send_response({"NoSuchBucket": 404, "AuthorizationHeaderMalformed": 400}.get(code, 403))
        if self.region is not None:
            handler.send_header("x-amz-bucket-region", self.region)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def _send(self, handler: BaseHTTPRequestHandler, body: memoryview) -> None:
        nbytes = self.cut.pop(handler.path.partition("?")[0], None)
        if nbytes is None:
            super()._send(handler, body)
            return
        handler.wfile.write(body[:nbytes])
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)

    def _refusal(self, request: Request) -> str | None:
        query = dict(parse_qsl(request.target.partition("?")[2], keep_blank_values=True))
        if self.code is not None:
            return self.code
        if not query:
            return None if self.is_public else "AccessDenied"
        if self.given is not None:
            return None if query["sig"] == self.given else "AuthenticationFailed"
        check = {"s3": _check_s3, "gs": _check_gs, "az": _check_az}[self.scheme]
        found = check(request, query, self.secret)
        if self.region is not None and self.region not in query["X-Amz-Credential"]:
            return "AuthorizationHeaderMalformed"
        if found not in (None, "AccessDenied"):
            return found
        signature = query.get("sig") or query.get("X-Amz-Signature") or query["X-Goog-Signature"]
        self.signatures.append(signature)
        return "AccessDenied" if found or self.expired(signature) else None


def service_account(url: str | None = None) -> dict[str, str]:
    """Return the key of Google's service account, for a storage at another URL."""
    pem = _RSA.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    key = {
        "type": "service_account",
        "private_key": pem,
        "private_key_id": "1",
        "client_email": GOOGLE_EMAIL,
        "client_id": "1",
        "token_uri": "http://127.0.0.1:9/token",
    }
    return key if url is None else {**key, "gcs_base_url": url}


def _check_s3(request: Request, query: dict[str, str], secret: str) -> str | None:
    if query["X-Amz-Credential"].split("/")[0] != ACCESS_KEY:
        return "InvalidAccessKeyId"
    key = b"AWS4" + secret.encode()
    for part in query["X-Amz-Credential"].split("/")[1:]:
        key = hmac.digest(key, part.encode(), "sha256")
    text = _text_to_sign(request, query, "X-Amz", request.headers["host"])
    if not hmac.compare_digest(hmac.digest(key, text, "sha256").hex(), query["X-Amz-Signature"]):
        return "SignatureDoesNotMatch"
    return _expiry(query, "X-Amz")


def _check_gs(request: Request, query: dict[str, str], secret: str) -> str | None:
    if not query["X-Goog-Credential"].startswith(GOOGLE_EMAIL):
        return "InvalidAccessKeyId"
    text = _text_to_sign(request, query, "X-Goog", "storage.googleapis.com")
    if secret != SECRET:
        text += secret.encode()
    try:
        _RSA.public_key().verify(bytes.fromhex(query["X-Goog-Signature"]), text, padding.PKCS1v15(), hashes.SHA256())
    except InvalidSignature:
        return "SignatureDoesNotMatch"
    return _expiry(query, "X-Goog")


def _text_to_sign(request: Request, query: dict[str, str], name: str, host: str) -> bytes:
    """Return what the signature of version 4 covers: the request, the time and the place."""
    parameters = sorted((quote(key, safe=""), quote(value, safe="")) for key, value in query.items())
    canonical = "\n".join(
        (
            "GET",
            request.path,
            "&".join(f"{key}={value}" for key, value in parameters if key != f"{name}-Signature"),
            f"host:{host}\n",
            "host",
            "UNSIGNED-PAYLOAD",
        )
    )
    scope = query[f"{name}-Credential"].partition("/")[2]
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    return "\n".join((query[f"{name}-Algorithm"], query[f"{name}-Date"], scope, digest)).encode()


def _expiry(query: dict[str, str], name: str) -> str | None:
    made = datetime.datetime.strptime(query[f"{name}-Date"] + "+0000", "%Y%m%dT%H%M%SZ%z")
    return "AccessDenied" if time.time() > made.timestamp() + int(query[f"{name}-Expires"]) else None


def _check_az(request: Request, query: dict[str, str], secret: str) -> str | None:
    place = f"/blob{unquote(request.path)}"
    before = [query.get(name, "") for name in ("sp", "st", "se")]
    after = [query.get(name, "") for name in ("si", "sip", "spr", "sv", "sr", "snapshot", "ses")]
    text = "\n".join([*before, place, *after, *("",) * 5]).encode()
    expected = base64.b64encode(hmac.digest(secret.encode(), text, "sha256")).decode()
    if not hmac.compare_digest(expected, query["sig"]):
        return "AuthenticationFailed"
    until = datetime.datetime.strptime(query["se"].replace("Z", "+0000"), "%Y-%m-%dT%H:%M:%S%z")
    return "AccessDenied" if time.time() > until.timestamp() else None


@contextlib.contextmanager
def s3rver(directory: Path) -> Iterator[str]:
    """Run npm's s3rver, with a bucket named models, for the access key S3RVER with the secret S3RVER; yield its URL."""
    program = need_s3rver()
    node = shutil.which("node") or "node"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    options = ["--address", "127.0.0.1", "--port", str(port), "--no-vhost-buckets", "--silent"]
    process = subprocess.Popen(
        [node, str(program), *options, "--directory", str(directory), "--configure-bucket", "models"],
        env={**os.environ, "NODE_NO_WARNINGS": "1"},
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None, "s3rver has ended"
            assert time.monotonic() < deadline, "s3rver does not start"
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)
