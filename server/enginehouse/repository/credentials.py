"""Where a remote repository is and which account opens it.

Accounts come from Triton's credential file (TRITON_CLOUD_CREDENTIAL_PATH: by kind of storage, the longest
matching prefix of the URL wins, "" is everything else), then from the variables that Triton reads, else from
what each cloud's own library finds (profiles, instance roles). Pure: the file's content is given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from enginehouse.errors import InvalidArgument

CREDENTIAL_VARIABLE = "TRITON_CLOUD_CREDENTIAL_PATH"
KINDS = ("s3", "gs", "as", "hf")
_S3_ENDPOINT = re.compile(r"(?:(https?)://)?([\w.-]+:\d+|(?<=//)[\w.-]+)/(.+)")


@dataclass(frozen=True, slots=True)
class Address:
    """A remote repository's place. `path` is bucket and prefix; `endpoint` a server other than the usual."""

    url: str
    kind: str
    path: str
    endpoint: str = ""
    account: str = ""


def is_remote(url: str) -> bool:
    return "://" in url and not url.startswith("file://")


def parse_address(url: str) -> Address:
    """Raises InvalidArgument for a URL of another kind or without a bucket."""
    kind, _, rest = url.partition("://")
    rest = re.sub(r"(?<!:)/{2,}", "/", rest).rstrip("/")
    if kind not in KINDS:
        allowed = ", ".join(f"{known}://" for known in KINDS)
        raise InvalidArgument(f"repository '{url}': found '{kind}://', allowed: a folder, {allowed}")
    if not rest:
        raise InvalidArgument(f"repository '{url}' names no bucket")
    if kind == "s3" and (match := _S3_ENDPOINT.fullmatch(rest)) is not None:
        scheme, host, path = match.groups()
        return Address(url, kind, path, f"{scheme or 'http'}://{host}")
    if kind == "as":
        host, _, path = rest.partition("/")
        if not path:
            raise InvalidArgument(f"repository '{url}': allowed: as://ACCOUNT/CONTAINER[/FOLDER]")
        return Address(url, kind, path, account=host.split(".")[0])
    if kind == "hf" and rest.count("/") != 1:
        raise InvalidArgument(f"repository '{url}': allowed: hf://OWNER/NAME[@REVISION]")
    return Address(url, kind, rest)


def account_for(address: Address, credentials: Mapping[str, Any]) -> Any:
    """The entry of the credential file, or None."""
    entries = credentials.get(address.kind, {})
    matching = [prefix for prefix in entries if address.url.startswith(prefix)]
    return entries[max(matching, key=len)] if matching else None


def filesystem_options(
    address: Address, credentials: Mapping[str, Any], environment: Mapping[str, str]
) -> dict[str, Any]:
    """Arguments of fsspec's filesystem for that address."""
    account = account_for(address, credentials)
    options = {"s3": _s3, "gs": _gs, "as": _azure, "hf": _hugging_face}[address.kind](address, account, environment)
    return {name: value for name, value in options.items() if value}


def _s3(address: Address, account: Any, environment: Mapping[str, str]) -> dict[str, Any]:
    account = account or {}
    region = account.get("region") or environment.get("AWS_DEFAULT_REGION")
    client = {"endpoint_url": address.endpoint, "region_name": region}
    return {
        "key": account.get("key_id"),
        "secret": account.get("secret_key"),
        "token": account.get("session_token"),
        "profile": account.get("profile"),
        "client_kwargs": {name: value for name, value in client.items() if value},
    }


def _gs(address: Address, account: Any, environment: Mapping[str, str]) -> dict[str, Any]:
    return {"token": account or environment.get("GOOGLE_APPLICATION_CREDENTIALS")}


def _azure(address: Address, account: Any, environment: Mapping[str, str]) -> dict[str, Any]:
    if account is None and (connection := environment.get("AZURE_STORAGE_CONNECTION_STRING")):
        return {"connection_string": connection}
    account = account or {}
    return {
        "account_name": account.get("account_str") or environment.get("AZURE_STORAGE_ACCOUNT") or address.account,
        "account_key": account.get("account_key") or environment.get("AZURE_STORAGE_KEY"),
    }


def _hugging_face(address: Address, account: Any, environment: Mapping[str, str]) -> dict[str, Any]:
    token = account if isinstance(account, str) else environment.get("HF_TOKEN")
    return {"token": token, "endpoint": environment.get("HF_ENDPOINT")}
