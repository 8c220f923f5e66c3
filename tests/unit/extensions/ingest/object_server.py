"""A small object server on this machine: the requests of S3 that reading needs, and plain http for the same files."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 1000
"""Keys in one answer of a list, as at most in S3."""


@dataclass
class Store:
    """Files by "bucket/key", and what goes wrong. requests: "METHOD bucket/key range" as they come.

    refuse: a status instead of an answer, for a request. cut: how many bytes of an answer are sent, then the
    connection ends. etag: of a content. ranges: whether parts of files are sent.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refuse: Callable[[str], int] = lambda request: 0
    cut: Callable[[str], int | None] = lambda request: None
    etag: Callable[[bytes], str] = lambda content: hashlib.md5(content).hexdigest()
    ranges: bool = True
    address: str = ""
    authorization: str = ""  # of the last request


@contextlib.contextmanager
def serve(store: Store) -> Iterator[Store]:
    """Serve the files of a store at its address, until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            path, wanted = unquote(url.path).strip("/"), self.headers.get("Range", "")
            query = {key: values[0] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
            request = f"{self.command} {path} {wanted}".strip()
            if "list-type" in query:
                request = f"LIST {path}/{query.get('prefix', '')}"
            store.requests.append(request)
            store.authorization = self.headers.get("Authorization", "")
            if status := store.refuse(request):
                code = {403: "AccessDenied", 404: "NoSuchKey"}.get(status, "InternalError")
                self.send(status, f"<Error><Code>{code}</Code><Message>refused</Message></Error>".encode(), {})
            elif "list-type" in query:
                self.send(200, listing(store, path, query), {"Content-Type": "application/xml"})
            elif path not in store.files:
                self.send(404, b"<Error><Code>NoSuchKey</Code><Message>no such key</Message></Error>", {})
            else:
                self.send_file(store.files[path], wanted, request)

        def send_file(self, content: bytes, wanted: str, request: str) -> None:
            headers = {"ETag": f'"{store.etag(content)}"', "Last-Modified": "Sun, 29 Nov 2026 12:00:00 GMT"}
            if not wanted or not store.ranges:
                return self.send(200, content, headers, request)
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last or len(content)) + 1, len(content))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            self.send(206, content[start:stop], headers, request)

        def send(self, status: int, body: bytes, headers: dict[str, str], request: str = "") -> None:
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            cut = store.cut(request) if request else None
            self.wfile.write(body[:cut])
            self.close_connection = cut is not None

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        store.address = f"http://127.0.0.1:{server.server_port}"
        yield store
        server.shutdown()
        thread.join()


def listing(store: Store, bucket: str, query: dict[str, str]) -> bytes:
    """The answer to ListObjectsV2."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    keys = sorted(path.partition("/")[2] for path in store.files if path.startswith(f"{bucket}/"))
    entries: dict[str, str] = {}
    for key in keys:
        if not key.startswith(prefix):
            continue
        head, found, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
        if found:
            folder = prefix + head + delimiter
            entries[folder] = f"<CommonPrefixes><Prefix>{spelled(folder)}</Prefix></CommonPrefixes>"
        else:
            content = store.files[f"{bucket}/{key}"]
            entries[key] = (
                f"<Contents><Key>{spelled(key)}</Key><LastModified>2026-11-29T12:00:00.000Z</LastModified>"
                f"<ETag>&quot;{store.etag(content)}&quot;</ETag><Size>{len(content)}</Size>"
                "<StorageClass>STANDARD</StorageClass></Contents>"
            )
    names = [name for name in entries if name > query.get("continuation-token", "")]
    page, more = names[:PAGE], len(names) > PAGE
    token = f"<NextContinuationToken>{spelled(page[-1])}</NextContinuationToken>" if more else ""
    body = "".join(entries[name] for name in page)
    encoding = "<EncodingType>url</EncodingType>"
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult>'
        f"<Name>{bucket}</Name><Prefix>{spelled(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount>{encoding}{token}"
        f"<IsTruncated>{str(more).lower()}</IsTruncated>{body}</ListBucketResult>"
    ).encode()


def spelled(name: str) -> str:
    return escape(quote(name, safe="/"))
