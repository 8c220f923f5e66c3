"""What is on the server that a URL names: fsspec's file system for it, its files, and its errors in words."""

from __future__ import annotations

import base64
import glob
import hashlib
import re
from dataclasses import dataclass
from os.path import splitext
from typing import Any
from urllib.parse import unquote, urlsplit

from torchtitan.extensions.ingest.source_files import matches
from torchtitan.extensions.ingest.token_files import MASK
from torchtitan.tools.errors import UserError
from torchtitan.tools.urls import CREDENTIALS, is_http, without_secrets

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"} | dict.fromkeys(
    ("az", "abfs", "abfss"), "adlfs"
)
CONTENT = ("sha256", "blob_id", "xet_hash", "ETag", "etag", "md5Hash", "Content-MD5", "Digest", "crc32c", "generation")
TIMES = ("LastModified", "Last-Modified", "last_modified", "updated", "mtime", "modified")
"""What servers say that tells a file's content from another; the first of these that a server gives is taken."""

BESIDE = {".bin": ".idx", ".idx": ".bin", ".npy": ".csv.gz"}
"""Of a file of token ids: the end of the file of the same stem that belongs to it."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a server. path: as its file system names it. name: its path in the local folder.

    size: bytes, None if the server does not say. identity: hex, of its content as far as the server tells; "": only its
    name is of interest. digest: (kind, hex) of its content if the server gives one; download.py compares.
    dated: False if neither a checksum nor a time is known, so that a change of the same size would not be noticed.
    """

    path: str
    name: str
    size: int | None
    identity: str
    digest: tuple[str, str] | None
    dated: bool


def open_file_system(url: str) -> Any:
    """The fsspec file system of a URL; UserError if there is none, or if its library is missing."""
    import fsspec

    protocol = url.partition("://")[0]
    package = PACKAGES.get(protocol)
    try:
        cls = fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        if package or isinstance(error, ImportError):
            mend = f"pip install {package}" if package else str(error)
            raise UserError(
                f"{url} needs a library that is missing: {mend}. (The extra `remote` has s3fs and gcsfs.)"
            ) from error
        raise UserError(f"{url}: {protocol}:// is no protocol that fsspec knows.") from error
    options: dict[str, Any] = {"use_listings_cache": False}
    if is_http(url):
        import aiohttp

        given = fsspec.config.conf.get("http", {}) | fsspec.config.conf.get("https", {})
        # Not decompressed on the way; a large file takes longer than the library's five minutes.
        options["headers"] = given.get("headers", {}) | {"Accept-Encoding": "identity"}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
        default = {"trust_env": True, "timeout": timeout, "auto_decompress": False}
        options["client_kwargs"] = default | given.get("client_kwargs", {})
    fs = cls(**options)
    fs.invalidate_cache()  # the hub's keeps what it has listed
    return fs


def list_files(fs: Any, url: str) -> tuple[list[RemoteFile], str]:
    """The files that a URL names, sorted by name, and the rest of the path in a local folder that holds them: a name, a
    glob, or "" for the folder itself. UserError if there are none; whatever the library raises if it cannot tell.

    With files of token ids come what lies beside them and belongs to them, as it would be found in a local folder.
    """
    if is_http(url):
        name = unquote(urlsplit(url).path.rpartition("/")[2])
        chosen = {name: dict(fs.info(url))}
        if chosen[name].get("mimetype") == "text/html" and not name.endswith((".html", ".htm")):
            raise UserError(f"{url} is a web page: a list of files, or a form to log in. Name a file itself.")
        if end := BESIDE.get(splitext(name)[1]):
            address = splitext(url.partition("?")[0])[0] + end
            if (info := _info(fs, address)) is not None:
                chosen[splitext(name)[0] + end] = info
        return _remote_files(chosen), name
    target = str(fs._strip_protocol(url))
    folder, _, name = target.rpartition("/")
    info = None if url.endswith("/") else _info(fs, target)
    if info is not None and info["type"] == "file":
        chosen = {name: info}
        found = _find(fs, folder, 1) if splitext(name)[1] in BESIDE else {}
        return _remote_files(chosen | _beside(chosen, found)), name
    if glob.has_magic(target):
        parts = target.split("/")
        first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        root, pattern = "/".join(parts[:first]), parts[first:]
        if not root:
            raise UserError(f"{url} must name the bucket or repository without a pattern.")
        found = _find(fs, root, None if "**" in pattern else len(pattern))
        chosen = {n: i for n, i in found.items() if matches(n.split("/"), pattern)}
        if not chosen:
            raise UserError(f"No file matches {url} (of {len(found)} in {root}). Correct the pattern.")
        return _remote_files(chosen | _beside(chosen, found)), "/".join(pattern)
    found = _find(fs, target, None)
    shown = {n: i for n, i in found.items() if not any(part.startswith(".") for part in n.split("/"))}
    if not shown and folder:  # a Megatron dataset without its .bin?
        found = _find(fs, folder, 1)
        if pair := {n: found[n] for n in (f"{name}.bin", f"{name}.idx") if n in found}:
            return _remote_files(pair | _beside(pair, found)), name
    if not shown:
        what = "holds hidden files only" if found and info else "does not exist, or is empty"
        raise UserError(f"{url} {what}. Correct the path, or put the files there.")
    return _remote_files(shown), ""


def _info(fs: Any, target: str) -> dict[str, Any] | None:
    try:
        return dict(fs.info(target))
    except Exception as error:
        if what_failed(error) == "missing":
            return None
        raise


def _find(fs: Any, root: str, depth: int | None) -> dict[str, dict[str, Any]]:
    """Path below `root` -> what the server says, for all files there."""
    try:
        found = fs.find(root, maxdepth=depth, detail=True)
    except Exception as error:
        if what_failed(error) == "missing":
            return {}
        raise
    result = {}
    for path, info in found.items():
        name = str(path).removeprefix(root.rstrip("/") + "/")
        if info["type"] != "file" or path in (root, root + "/") or (name.endswith("/") and not info.get("size")):
            continue  # object stores have empty objects that stand for folders
        if any(part in ("", ".", "..") for part in name.split("/")) or name == path:
            raise UserError(f"{path} cannot be a file of a local folder: rename it, or leave it out by a glob.")
        result[name] = info
    return result


def _beside(chosen: dict[str, Any], found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of the files found, those that belong to the chosen files of token ids. Of a mask, which is refused, the name."""
    result: dict[str, dict[str, Any]] = {}
    tokens = [splitext(name) for name in chosen if splitext(name)[1] in BESIDE]
    folders = {stem.rpartition("/")[0] for stem, _ in tokens}
    for name, info in found.items():
        in_folder, _, file = name.rpartition("/")
        if in_folder in folders and file.endswith((".npy", ".bin", ".npz")) and MASK.search(splitext(file)[0]):
            result[name] = info | {"only_name": True}
    beside = [stem + BESIDE[end] for stem, end in tokens]
    result |= {name: found[name] for name in beside if name in found}
    return {name: info for name, info in result.items() if name not in chosen}


def _remote_files(found: dict[str, dict[str, Any]]) -> list[RemoteFile]:
    return [_remote_file(name, info) for name, info in sorted(found.items())]


def _remote_file(name: str, info: dict[str, Any]) -> RemoteFile:
    path, size = str(info["name"]), info.get("size")
    if info.get("lfs"):  # of the Hugging Face hub
        info = info | {"sha256": info["lfs"]["sha256"]}
    key = next((key for key in CONTENT if info.get(key)), None) or next((k for k in TIMES if info.get(k)), None)
    value = str(info[key]).strip('"') if key else ""
    digest = None
    if key == "sha256":
        digest = ("sha256", value)
    elif key == "blob_id":
        digest = ("git", value)
    elif key in ("md5Hash", "Content-MD5"):
        digest = ("md5", base64.b64decode(value).hex())
    elif key == "ETag" and "StorageClass" in info and re.fullmatch("[0-9a-f]{32}", value):
        digest = ("s3", value)  # the MD5, unless the store encrypts
    identity = "" if info.get("only_name") else hashlib.sha256(repr((path, size, value)).encode()).hexdigest()[:32]
    return RemoteFile(path, name, size, identity, digest, key is not None)


def identity_now(fs: Any, file: RemoteFile) -> str:
    """The identity of a file that was listed before, as the server tells it now."""
    return _remote_file(file.name, dict(fs.info(file.path))).identity


def what_failed(error: BaseException) -> str:
    """ "missing", "forbidden", or else "unreachable": what an error of a library is, by what it was raised from."""
    chain = _chain(error)
    statuses = {status for one in chain if (status := _status(one)) is not None}
    if statuses & {401, 403} or any(isinstance(e, PermissionError) or "Credential" in type(e).__name__ for e in chain):
        return "forbidden"
    if statuses & {404, 410} or (not statuses and all(isinstance(one, FileNotFoundError) for one in chain)):
        return "missing"
    return (
        "forbidden" if any(400 <= status < 500 and status not in (408, 429) for status in statuses) else "unreachable"
    )


def _chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of a library carries."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = next((v for v in (getattr(response, "status_code", None), getattr(error, "status", None)) if v), None)
    return status if isinstance(status, int) else None


def refusal(url: str, error: BaseException, what: str = "cannot be read") -> UserError:
    """The UserError for what a library raised."""
    first = _chain(error)[-1]
    text = without_secrets(" ".join(f"{type(first).__name__}: {first}".split()))[:400].rstrip(".")
    mend = {
        "missing": "Correct the path, or put the file there.",
        "forbidden": f"Give this user the right to read it, and its credentials in the environment ({CREDENTIALS}).",
        "unreachable": "Start again when the server can be reached: what was fetched is kept.",
    }[what_failed(error)]
    return UserError(f"{url} {what}: {text}. {mend}")
