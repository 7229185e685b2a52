"""An S3 server as a process of its own, behind a door that can be shut, which counts what goes through."""

from __future__ import annotations

import os
import re
import selectors
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUCKET = "sweeps"
KEY, SECRET = "AKIAOFTESTS", "s3cret-of-the-tests"
_REQUEST = re.compile(r'"(?:\x1b\[[0-9;]*m)*(GET|PUT|POST|DELETE|HEAD) (\S+) HTTP')
_STARTING = 120.0


class Door(socketserver.ThreadingTCPServer):
    """Passes connections on to the server; those that come while it is shut are closed at once."""

    daemon_threads = allow_reuse_address = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Passage)
        self.behind, self.shut, self.sent = port, False, 0
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()


class _Passage(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        door: Any = self.server
        if door.shut:
            return
        with suppress(OSError), socket.create_connection(("127.0.0.1", door.behind)) as inner:
            ways = {self.request: inner, inner: self.request}
            with selectors.DefaultSelector() as ready:
                for end in ways:
                    ready.register(end, selectors.EVENT_READ)
                while not door.shut:
                    for key, _ in ready.select(0.05):
                        data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                        if not data:
                            return
                        if key.fileobj is self.request:
                            door.sent += len(data)
                        ways[key.fileobj].sendall(data)


@dataclass
class S3:
    """A running server."""

    door: Door
    log: Path

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to reach it."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.door.server_address[1]}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "2",  # or a request that fails takes many seconds
        }

    def requests(self) -> Counter[str]:
        """Return how many requests of each kind came."""
        return Counter(method for method, _ in _REQUEST.findall(self.log.read_text(errors="replace")))


@contextmanager
def serving(place: Path) -> Iterator[S3]:
    """Run a server with an empty bucket; it is ended whatever happens."""
    log = place / "s3.log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "MOTO_S3_CUSTOM_ENDPOINTS": ""},
        )
    door = None
    try:
        end = time.monotonic() + _STARTING
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, "the S3 server does not start"
            with suppress(OSError):
                request = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
                urllib.request.urlopen(request, timeout=5).close()
                break
            time.sleep(0.05)
        door = Door(port)
        yield S3(door, log)
    finally:
        if door is not None:
            door.shutdown()
            door.server_close()
        process.send_signal(signal.SIGKILL)
        process.wait()
