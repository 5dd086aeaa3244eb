"""
A small HTTP server that answers as a store does, for tests of what asks stores.
"""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseServer
from typing import TYPE_CHECKING, Any, TypeVar

from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

Answer = tuple[int, bytes]
S = TypeVar("S", bound=BaseServer)


@contextmanager
def running(server: S) -> Generator[S]:
    """
    Serve on a thread until the block ends.
    """
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def http_server(
    answer: Callable[[str], Answer], headers: list[dict[str, str]] | None = None
) -> Generator[tuple[str, list[str]]]:
    """
    Run a small HTTP server; yield its URL and the paths that it was asked for, and put their headers into ``headers``.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if headers is not None:
                headers.append({name.lower(): value for name, value in self.headers.items()})
            status, body = answer(self.path)
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with running(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as server:
        yield f"http://127.0.0.1:{server.server_port}", asked


@contextmanager
def raw_server(talk: Callable[[socket.socket], object]) -> Generator[str]:
    """
    Run a server whose answer to one connection is what ``talk`` writes, once a request's head has arrived; yield its URL.
    """

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(65536) or b"\r\n\r\n"
            talk(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            with suppress(OSError):
                # Nobody may have asked.
                socket.create_connection(listener.getsockname(), timeout=1).close()
            thread.join()


def any_json() -> st.SearchStrategy[Any]:
    """
    Return what draws any JSON, with the numbers and texts that break readers.
    """
    scalars = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text()
        | st.sampled_from([10**40, -1, "10" * 3000, "\ud800", "1e9", "..", "\x00", "0" * 32, "a" * 32, 2**63])
    )
    return st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@st.composite
def damaged(draw: st.DrawFn, document: Any) -> Any:
    """
    Draw ``document`` with up to three of its parts replaced or taken out.
    """
    for _ in range(draw(st.integers(1, 3))):
        node = document
        while isinstance(node, dict | list) and node:
            key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
            if not isinstance(node[key], dict | list) or not node[key] or draw(st.integers(0, 5)) == 0:
                if isinstance(node, dict) and draw(st.booleans()):
                    del node[key]
                else:
                    node[key] = draw(any_json())
                break
            node = node[key]
    return document
