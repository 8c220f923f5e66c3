"""Paths that are URLs (s3://bucket/folder): told apart from local paths, and kept free of secrets.

A URL is written into config.toml, plan.json, corpus.json and the log, and names the data in chains of stages. So one
that carries a password or a signature is refused; credentials come from where the libraries look for them.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

from torchtitan.tools.errors import UserError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_COLLAPSED = re.compile(r"(s3a?|gs|gcs|hf|https?|abfss?|az|oss):/?[^/:]")  # what Path makes of a URL, or a slip
_QUERY = ("download", "dl", "format", "raw", "ref", "revision", "version")
"""Parameters of http addresses that are no secrets."""

CREDENTIALS = (
    "s3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or AWS_ENDPOINT_URL for another server; gs: "
    "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`; hf: HF_TOKEN, or `hf auth login`; "
    'http: ~/.netrc, or FSSPEC_HTTPS=\'{"headers": {"Authorization": "..."}}\''
)
"""Where the libraries look for credentials, for messages."""


def is_url(path: str) -> bool:
    """Whether a path is a URL."""
    return bool(_URL.match(path))


def is_http(url: str) -> bool:
    """Whether a URL is of http or https, whose servers list no folders."""
    return url.startswith(("http://", "https://"))


def join_url(folder: str, path: str) -> str:
    """`path` below `folder` if that makes a URL; "" if it is a local path, or a dataset of the hub."""
    if is_url(path):
        protocol, _, rest = path.partition("://")
        return f"{protocol.lower()}://{rest}"
    if not is_url(folder) or not path or path.startswith(("/", "~", "hub:")):
        return ""
    return join_url("", f"{folder.rstrip('/')}/{path.removeprefix('./')}")


def check_url(url: str, where: str) -> None:
    """UserError, without the secret, if a URL carries one, or cannot name files. where: "data source 'books'"."""
    protocol, _, rest = url.partition("://")
    place = rest.partition("/")[0]
    key, value = _query_parameter(url)
    if "::" in re.sub(r"\[.*?\]", "", url):
        raise UserError(f"The {protocol}:// URL of {where} is a chain ('::'), which is not read: unpack it first.")
    host = re.fullmatch(r"(\[[\da-fA-F:.]+\]|[^:@]*)(:\d+)?", place)  # else what follows ":" may be a password
    if not host and (is_http(url) or ":" in place):
        raise UserError(
            f"The {protocol}:// URL of {where} has a user or password before its host. It would be written into logs "
            f"and files: take it out. Credentials are found in the environment ({CREDENTIALS})."
        )
    if key and not (is_http(url) and key in _QUERY and len(value) <= 64):
        raise UserError(
            f"The {protocol}:// URL of {where} has the parameter {key} behind its '?'. What is there may be a "
            "signature or a token, would be written into logs and files, and would make other data of a URL that is "
            f"signed anew: take it out. Credentials are found in the environment ({CREDENTIALS}). Download a file that "
            "has only a signed URL, and name the local file."
        )
    if protocol in ("file", "local"):
        raise UserError(f"The path of {where} is a {protocol}:// URL: write the path, /{rest.lstrip('/')}.")
    if not place or ".." in rest.split("/"):
        raise UserError(f"The path {url!r} of {where} names no folder of a server: write it out, without '..'.")
    if is_http(url) and (set("*[]#") & set(rest.partition("/")[2]) or url.endswith("/") or "/" not in rest):
        raise UserError(
            f"The path {url!r} of {where} must name a single file: http servers list no folders, so that a glob or a "
            "folder finds nothing there ('*', '[' and '#' in a name are written %2A, %5B and %23). Name one file per "
            "source, or download the files (wget) and name their folder."
        )


def check_not_collapsed(path: str, where: str) -> None:
    """UserError for s3:/bucket and s3:bucket, which would be looked for on this machine."""
    if match := _COLLAPSED.match(path):
        raise UserError(f"The path {path!r} of {where} is neither a URL nor a path: write {match[1]}://...")


def without_secrets(text: str) -> str:
    """A message of a library, in which URLs may carry secrets: the server may have redirected to a signed one."""
    text = re.sub(r"//[^/\s'\"]*@", "//***@", text)
    return re.sub(r"(\w://[^\s?'\"]*)\?[^\s'\")]*", r"\1?***", text)


def _query_parameter(url: str) -> tuple[str, str]:
    """The first parameter behind '?' that may be a secret; else the first; ("", "") if there is none."""
    match = re.search(r"\?(.*)" if is_http(url) else r"\?([\w.%-]+=.*)", url)  # elsewhere '?' is a pattern too
    query = match[1].partition("#")[0] if match else ""
    pairs = [(unquote(key), value) for key, _, value in (part.partition("=") for part in query.split("&")) if key]
    return next((pair for pair in pairs if pair[0] not in _QUERY), pairs[0] if pairs else ("", ""))
