# SPDX-License-Identifier: Apache-2.0
"""A server on this machine that misbehaves as asked."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from monai_deq.data import resumable_download


class FileServer(ThreadingHTTPServer):
    """Serves ``content`` under any path.

    ``ranges``: whether it can go on with a file. ``cuts``: after how many bytes of the body it closes the connection,
    request by request. ``statuses``: what it says instead of serving, request by request. ``etag``, ``length``,
    ``content_type``: headers. ``shift``: how far the ranges it sends are from those asked for.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content = b""
        self.ranges, self.shift, self.length, self.etag = True, 0, True, '"one"'
        self.content_type = "application/octet-stream"
        self.cuts: list[int] = []
        self.statuses: list[int] = []
        self.asked: list[str | None] = []  # the Range of each request
        self.sent: list[int] = []  # the status of each answer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        server = self.server
        asked = self.headers.get("Range")
        server.asked.append(asked)
        first, status = 0, 200
        if server.statuses:
            status = server.statuses.pop(0)
        elif asked and server.ranges and self.headers.get("If-Range", server.etag) == server.etag:
            first, status = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) + server.shift, 206  # type: ignore[index]
            if first >= len(server.content):
                status = 416
        server.sent.append(status)
        self.send_response(status)
        body = server.content[first:] if status in (200, 206) else b""
        cut = server.cuts.pop(0) if server.cuts and status in (200, 206) else len(body)
        self.send_header("Content-Type", server.content_type)
        if server.etag:
            self.send_header("ETag", server.etag)
        if server.length:
            self.send_header("Content-Length", str(len(body)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{len(server.content) - 1}/{len(server.content)}")
        self.end_headers()
        self.wfile.write(body[:cut])

    def log_message(self, format: str, *args: object) -> None:
        """Not a word."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("no_proxy", "*")
    with FileServer() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken connection is taken up again at once."""
    monkeypatch.setattr(sys.modules[resumable_download.__module__], "_FIRST_WAIT", 0.0)
