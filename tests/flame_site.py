"""A site on this machine that behaves like the one FLAME is downloaded from.

A form with user name and password is POSTed; the answer is the archive (whole or from an offset),
or an HTML page: the login form again, or the licence.
"""

from __future__ import annotations

import http.server
import re
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

USERNAME, PASSWORD = "ana+test@example.org", "p&ss=w ord%§"
LOGIN_PAGE = """<!DOCTYPE html><html><head><title>FLAME</title></head><body>
<a href="license.html">License</a> <p class="error">Please sign in.</p>
<form method="post"><input name="username"><input type="password" name="password"></form>
</body></html>"""
LICENCE_PAGE = """<!DOCTYPE html><html><head><title>FLAME</title></head><body>
<h1>License</h1><p>You have to accept the license agreement before downloading.</p></body></html>"""
OTHER_PAGE = "<html><head><title>Down for maintenance</title></head></html>"


class Site(http.server.ThreadingHTTPServer):
    """Tests change these fields."""

    archive = b""
    licence_accepted = True
    rejects_with_status = False  # 401 instead of the page with the form
    page: str | None = None  # sent to everybody
    page_type = "text/html; charset=UTF-8"
    etag: str | None = None
    scheme = "http"
    cut_after: list[int]  # bytes sent before the connection is cut, one per request
    seen: list[dict[str, str]]  # path, headers and form of every request

    @property
    def url(self) -> str:
        return (
            f"{self.scheme}://localhost:{self.server_address[1]}/download.php"
            "?domain=flame&sfile=FLAME2023.zip&resume=1"
        )


class Handler(http.server.BaseHTTPRequestHandler):
    server: Site

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.seen.append({"path": self.path, "method": "GET"})
        self._page(LOGIN_PAGE)

    def do_POST(self) -> None:
        site = self.server
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        form = dict(urllib.parse.parse_qsl(body, keep_blank_values=True))
        headers = {key.lower(): value for key, value in self.headers.items()}
        site.seen.append({**headers, **form, "path": self.path, "method": "POST"})
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
        if site.page is not None:
            self._page(site.page)
        elif (form.get("username"), form.get("password")) != (USERNAME, PASSWORD):
            self._page(LOGIN_PAGE, 401 if site.rejects_with_status else 200)
        elif not site.licence_accepted:
            self._page(LICENCE_PAGE)
        elif query != {"domain": "flame", "sfile": "FLAME2023.zip", "resume": "1"}:
            self._page(OTHER_PAGE, 404)
        else:
            self._send_archive()

    def _page(self, text: str, status: int = 200) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", self.server.page_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _send_archive(self) -> None:
        site = self.server
        content, start = site.archive, 0
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if match and self.headers.get("If-Range") in (None, site.etag):
            start = int(match[1])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if site.etag:
            self.send_header("ETag", site.etag)
        self.send_header("Content-Type", "application/zip")
        self.send_header("Content-Disposition", 'attachment; filename="FLAME2023.zip"')
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if site.cut_after:
            self.wfile.write(content[start : start + site.cut_after.pop(0)])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.wfile.write(content[start:])


@contextmanager
def running_site(certificate: tuple[Path, Path] | None = None) -> Iterator[Site]:
    """The site on a free port of this machine; with a certificate (file, key) over TLS."""
    instance = Site(("127.0.0.1", 0), Handler)
    instance.cut_after, instance.seen = [], []
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*map(str, certificate))
        instance.socket = context.wrap_socket(instance.socket, server_side=True)
        instance.scheme = "https"
    thread = threading.Thread(target=instance.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield instance
    instance.shutdown()
    instance.server_close()
    thread.join()
