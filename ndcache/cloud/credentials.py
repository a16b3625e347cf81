"""Look for credentials in the environment. obstore reads them; this only tells whether there are any, and which."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

__all__ = ["advice", "has_credentials", "has_fixed_key", "is_unsigned", "sas_token", "shows_secret"]

#: The variables that name a key, which signs without any request.
_FIXED_KEYS = {
    "s3": ("AWS_ACCESS_KEY_ID",),
    "gs": ("GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH", "GOOGLE_SERVICE_ACCOUNT_KEY"),
    "az": (
        *("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_MASTER_KEY"),
        *("AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_SAS_KEY", "AZURE_STORAGE_USE_EMULATOR"),
    ),
}
#: The variables that name other credentials.
_OTHERS = {
    "s3": (
        *("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"),
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    ),
    "gs": ("GOOGLE_APPLICATION_CREDENTIALS",),
    "az": (
        *("AZURE_STORAGE_TOKEN", "AZURE_CLIENT_SECRET", "AZURE_STORAGE_CLIENT_SECRET", "AZURE_FEDERATED_TOKEN_FILE"),
        *("AZURE_MSI_ENDPOINT", "AZURE_IDENTITY_ENDPOINT", "IDENTITY_ENDPOINT", "AZURE_USE_AZURE_CLI"),
    ),
}
_SKIPS = {"s3": "AWS_SKIP_SIGNATURE", "gs": "GOOGLE_SKIP_SIGNATURE", "az": "AZURE_SKIP_SIGNATURE"}
_SECRET = re.compile(r"(AWS|GOOGLE|AZURE)_\w*(KEY|TOKEN|SECRET|PASSWORD)\w*")
#: The login of Google's command line.
_GOOGLE_LOGIN = os.path.join("~", ".config", "gcloud", "application_default_credentials.json")
_AWS_PROFILES = os.path.join("~", ".aws")
_EXPORT = (
    "Profiles in ~/.aws are not read; this puts their credentials into the environment: "
    'eval "$(aws configure export-credentials --format env)".'
)


def is_unsigned(scheme: str, environ: Mapping[str, str]) -> bool:
    """Return whether the user wants requests without a signature."""
    return environ.get(_SKIPS[scheme], "").strip().lower() in ("1", "true", "yes", "on")


def has_fixed_key(scheme: str, environ: Mapping[str, str]) -> bool:
    """Return whether the environment has a key that signs without any request."""
    return any(environ.get(name) for name in _FIXED_KEYS[scheme])


def has_credentials(scheme: str, environ: Mapping[str, str]) -> bool:
    """Return whether the environment or a file of the usual name has credentials.

    Else only the metadata of a virtual machine can have them.
    """
    if has_fixed_key(scheme, environ) or any(environ.get(name) for name in _OTHERS[scheme]):
        return True
    return scheme == "gs" and os.path.exists(os.path.expanduser(_GOOGLE_LOGIN))


def sas_token(environ: Mapping[str, str]) -> str | None:
    """Return Azure's shared access signature, which can be sent as it is but signs nothing; None if there is none."""
    token = environ.get("AZURE_STORAGE_SAS_TOKEN") or environ.get("AZURE_STORAGE_SAS_KEY") or ""
    return token.strip().lstrip("?") or None


def shows_secret(text: str, environ: Mapping[str, str]) -> bool:
    """Return whether a text has the value of a secret of the environment."""
    # One by one: iterating over the values of a large environment decodes them all.
    return any(
        len(value) > 3 and value in text for name in environ if _SECRET.fullmatch(name) and (value := environ[name])
    )


def advice(scheme: str) -> str:
    """Return how to give credentials."""
    if scheme == "s3":
        general = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and AWS_SESSION_TOKEN for temporary credentials."
        has_profiles = os.path.exists(os.path.expanduser(_AWS_PROFILES))
        return f"{general} {_EXPORT}" if has_profiles else general
    if scheme == "gs":
        return "Set GOOGLE_SERVICE_ACCOUNT to the file of a service account's key."
    return "Set AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN."
