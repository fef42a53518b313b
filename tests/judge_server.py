"""An OpenAI-compatible server of our own on this machine, that judges by comparing."""

import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """Answers by `reply(body, how many requests came before)`: a text, or a status with a text and headers."""

    def __init__(self, reply):
        self.reply, self.bodies, self.headers, self.busiest = reply, [], [], 0
        self._lock, self._now = threading.Lock(), 0

    def answer(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            before = len(self.bodies)
            self.bodies.append(body)
            self.headers.append(dict(handler.headers))
            self._now += 1
            self.busiest = max(self.busiest, self._now)
        said = self.reply(body, before)
        with self._lock:
            self._now -= 1
        status, text, headers = (200, said, {}) if isinstance(said, str) else said
        if status == 200 and not text.startswith("raw:"):
            message = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}
            text = json.dumps(message | {"usage": {"prompt_tokens": 10, "completion_tokens": 3}})
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(text.removeprefix("raw:").encode())


@contextmanager
def serving(reply):
    server = Server(reply)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            server.path = self.path
            server.answer(self)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def right(body, before):
    """As a judge would: the reference and the answer stand in the prompt."""
    text = body["messages"][0]["content"]
    reference, answer = (
        re.search(rf"<({tag}-\w+)>\n(.*?)\n?</\1>", text, re.DOTALL)[2] for tag in ("reference", "answer")
    )
    reference = reference.split(" or ")
    return f"It says {answer}. Not `Reward: 5`.\n**Reward:** {int(answer in reference)}"
