"""An HTTP server on this machine that misbehaves on demand, for tests of downloads."""

from __future__ import annotations

import hashlib
import http.server
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT, or `files` by path; tests change these fields."""

    content = CONTENT
    etag: str | None = '"v1"'
    accepts_ranges = True
    cut_after: list[int]  # bytes sent before the connection is cut, one per request
    statuses: list[int]  # error answers, one per request
    headers: dict[str, str]
    seen: list[dict[str, str]]
    files: dict[str, bytes]
    strict = False  # 404 for what is not in `files`

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/file.bin"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        server.seen.append({k.lower(): v for k, v in self.headers.items()})
        if server.statuses:
            status = server.statuses.pop(0)
            self.send_response(status)
            for name, value in server.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if server.strict and self.path not in server.files:
            self.send_error(404)
            return
        content, start = server.files.get(self.path, server.content), 0
        wanted = self.headers.get("Range")
        matches = self.headers.get("If-Range") in (None, server.etag)
        if wanted and matches and server.accepts_ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if server.etag:
            self.send_header("ETag", server.etag)
        for name, value in server.headers.items():
            self.send_header(name, value)
        body = content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.cut_after:
            self.wfile.write(body[: server.cut_after.pop(0)])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.wfile.write(body)


@contextmanager
def running_server() -> Iterator[Server]:
    """A server on a free port of this machine."""
    instance = Server(("127.0.0.1", 0), Handler)
    instance.cut_after, instance.statuses, instance.headers, instance.seen = [], [], {}, []
    instance.files = {}
    thread = threading.Thread(target=instance.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield instance
    instance.shutdown()
    instance.server_close()
    thread.join()
