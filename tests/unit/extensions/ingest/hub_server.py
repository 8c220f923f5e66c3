"""A stand-in for huggingface.co on this machine: the few addresses that streaming a dataset asks for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
JSON = {"Content-Type": "application/json"}


@contextlib.contextmanager
def serve(name: str, files: dict[str, bytes], gated: str) -> Iterator[tuple[str, list[str]]]:
    """Serve a dataset of these files, all in data/ but README.md, and a gated one.

    Its address, and the requests "GET path range" as they come.
    """
    requests: list[str] = []
    api, content = f"/api/datasets/{name}", f"/datasets/{name}/resolve/{COMMIT}/"

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, code: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
            self.send_response(code)
            for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def error(self, code: int, error: str) -> None:
            self.answer(code, b"{}", {"X-Error-Code": error, "X-Error-Message": error})

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
            there = [entry(path) for path in files if path in unquote(asked)]
            self.answer(200, json.dumps(there).encode(), JSON)

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            for kind in ("tree", "resolve"):
                path = path.replace(f"/{kind}/main", f"/{kind}/{COMMIT}")
            wanted = self.headers.get("Range")
            requests.append(f"{self.command} {path} {wanted or ''}")
            if path.startswith(f"/api/datasets/{gated}"):
                self.error(403, "GatedRepo")
            elif not path.startswith((api, content)):
                self.error(404, "RepoNotFound")
            elif path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
                siblings = [{"rfilename": file} for file in files]
                answer = {"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "gated": False, "tags": []}
                self.answer(200, json.dumps(answer).encode(), JSON)
            elif path.startswith(f"{api}/revision/"):
                self.error(404, "RevisionNotFound")
            elif path.startswith(f"{api}/tree/"):
                below = path.removeprefix(f"{api}/tree/{COMMIT}").strip("/")
                listing = [entry(file) for file in files if file.startswith(below)]
                if not below:
                    listing += [{"type": "directory", "path": "data", "size": 0, "oid": "0" * 40}]
                self.answer(200, json.dumps(listing).encode(), JSON)
            elif path.removeprefix(content) not in files:
                self.error(404, "EntryNotFound")
            else:
                body = files[path.removeprefix(content)]
                headers = {"ETag": f'"{oid(body)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
                if wanted is None:
                    self.answer(200, body, headers)
                    return
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                start, stop = int(first), min(int(last or len(body)) + 1, len(body))
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
                self.answer(206, body[start:stop], headers)

    def oid(body: bytes) -> str:
        return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()  # git's name of a file

    def entry(path: str) -> dict[str, object]:
        return {"type": "file", "path": path, "size": len(files[path]), "oid": oid(files[path])}

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", requests
        server.shutdown()
        thread.join()
