"""A server that speaks OpenAI's chat completions as a script says, and keeps what was asked."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """Answers as the test's script says; keeps what was asked."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # which keeps a body back for 40 ms

    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, Script)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append((self.path, dict(self.headers), body))
            number = len(server.asked)
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
        try:
            status, headers, content = server.answer(number, body)
        finally:
            with server.lock:  # before the client has its answer, and asks again
                server.busy -= 1
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client has waited long enough

    def log_message(self, *_: object) -> None:
        pass


Answer = tuple[int, dict[str, str], bytes]


class Script(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # a connection beyond it waits a second for its next try

    def __init__(self, answer: Callable[[int, dict[str, object]], Answer]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.asked: list[tuple[str, dict[str, str], dict[str, object]]] = []
        self.lock = threading.Lock()
        self.busy = self.busiest = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


def reply(words: str, **usage: int) -> Answer:
    message = {"choices": [{"message": {"content": words}}], "usage": usage}
    return 200, {}, json.dumps(message).encode()


Serve = Callable[[Callable[[int, dict[str, object]], Answer]], Script]
