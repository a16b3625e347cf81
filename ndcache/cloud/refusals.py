"""Read why a storage refuses a request, and make the error for the user."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import AuthError, NotFoundError, TransferError
from ..urls.url import Url
from . import credentials

__all__ = ["Refusal", "Refused"]

#: Codes of signatures and credentials that were valid once.
_EXPIRED = ("ExpiredToken", "TokenRefreshRequired", "RequestExpired", "RequestTimeTooSkewed")
#: Codes of wrong credentials, some of which come with status 400.
_WRONG = (
    *("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidSecurity", "AuthenticationFailed"),
    *("AuthorizationQueryParametersError", "AuthorizationHeaderMalformed", "InvalidClientTokenId", "NotSignedUp"),
)
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "InvalidBucketName")
_CODE = re.compile(r"<Code>([A-Za-z0-9.]{1,64})</Code>")
_SAYS_EXPIRED = re.compile(r"\bexpired\b|specified time frame", re.IGNORECASE)
_REGION = re.compile(r"[a-z0-9-]{1,32}")


@dataclass(frozen=True)
class Refusal:
    """A storage's reason to refuse a request.

    Attributes
    ----------
    status : int
    code : str
        The storage's own word for the reason, such as ``"AccessDenied"``; empty if it gives none.
    region : str or None
        The bucket's region, which S3 tells.
    says_expired : bool
        Whether the signature or the credentials were valid once.
    """

    status: int
    code: str
    region: str | None
    says_expired: bool

    @classmethod
    def read(cls, status: int, headers: Mapping[str, str], body: bytes) -> Refusal:
        """Read the headers and the beginning of the body of a response."""
        text = body.decode("utf-8", "replace")
        match = _CODE.search(text)
        code = match[1] if match else headers.get("x-ms-error-code", "")[:64]
        region = headers.get("x-amz-bucket-region", "")
        is_old = code in _EXPIRED or (status in (400, 401, 403) and _SAYS_EXPIRED.search(text) is not None)
        return cls(
            status,
            code if code.isascii() and code.isalnum() else "",
            region if _REGION.fullmatch(region) else None,
            is_old,
        )

    def may_need_credentials(self, scheme: str) -> bool:
        """Return whether a request without a signature may have been refused for that reason."""
        # Azure says of private containers that they do not exist, or that there is no public access (409).
        return self.status in (401, 403) or (scheme == "az" and self.status in (404, 409))

    def error(self, url: Url, given: TransferError, *, is_signed: bool) -> TransferError:
        """Return the error to raise for an object; `given` is the one for the status alone."""
        said = f"{self.code}, status {self.status}" if self.code else f"status {self.status}"
        if self.code in _NO_BUCKET:
            return NotFoundError(
                f"there is no {url.scheme}://{url.host} ({said})",
                url=str(url),
                status=self.status,
                hint="Check its name, and the endpoint or account in the environment.",
            )
        is_about_access = self.status in (401, 403, 409) or self.says_expired or self.code in _WRONG
        if not is_about_access:
            return given
        return AuthError(
            f"the storage refuses access ({said})",
            url=str(url),
            status=self.status,
            hint=self._hint(url, is_signed=is_signed),
        )

    def _hint(self, url: Url, *, is_signed: bool) -> str:
        advice = credentials.advice(url.scheme)
        said = f"The storage says {self.code}: " if self.code else ""
        if not is_signed:
            return f"{said}it was asked without credentials, as the environment has none. {advice}"
        if self.says_expired:
            return f"{said}the signature or the credentials have expired. Renew them, and check this machine's clock."
        if self.code == "AuthenticationFailed" and "%" in url.path:  # of Azure
            return (
                f"{said}the credentials are wrong, or the name has characters that obstore signs in another way than "
                "Azure reads them. A shared access signature (AZURE_STORAGE_SAS_TOKEN) works for all names."
            )
        if self.code in _WRONG:
            return f"{said}the credentials are wrong, or for another storage. {advice}"
        return f"{said}these credentials may not read this object, or there is none and they may not list the bucket."


class Refused(TransferError):
    """A storage has refused a request.

    Attributes
    ----------
    refusal : Refusal
    given : TransferError
        The error for the status alone.
    """

    def __init__(self, given: TransferError, headers: Mapping[str, str], body: bytes) -> None:
        super().__init__(given.message)
        self.refusal = Refusal.read(given.status or 0, headers, body)
        self.given = given
