"""The Messages API by script: a local server that gives the replies of a test in order."""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ApiServer(ThreadingHTTPServer):
    """The Messages API by script: a POST takes the next reply; caching is counted as documented."""

    daemon_threads = True

    def __init__(self, *replies):
        self.replies, self.requests, self.cache = list(replies), [], set()
        self.status, self.error_type = 200, ""
        super().__init__(("127.0.0.1", 0), ApiHandler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def env(self):
        return {
            "ANTHROPIC_API_KEY": "sk-test-key",
            "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{self.server_port}",
        }

    def usage(self, request):
        """Token counts at 4 characters; what stands before a known mark is read from cache."""
        prefix, read, written = "", 0, 0
        content = request["messages"][0]["content"]
        if isinstance(content, str):  # asked plainly
            return {"input_tokens": len(content) // 4}
        for block in [*request["system"], *content]:
            prefix += block["text"]
            if "cache_control" in block:
                if prefix in self.cache:
                    read = len(prefix) // 4
                else:
                    self.cache.add(prefix)
                    written = len(prefix) // 4 - read
        fresh = len(prefix) // 4 - read - written
        return {
            "input_tokens": fresh,
            "cache_read_input_tokens": read,
            "cache_creation_input_tokens": written,
        }


PING = b'event: ping\ndata: {"type": "ping"}\n\n'


@dataclass
class Fault:
    """A reply of the API that is none."""

    status: int = 200
    body: str = '{"type": "error", "error": {"type": "api_error", "message": "no"}}'
    headers: dict = field(default_factory=dict)
    cut: bool = False  # the connection is lost in mid-body
    pings: int = 0  # ten a second of them, and nothing else, after the body
    hang: float = 0.0  # seconds before anything is said
    until: Callable[[], bool] = lambda: True  # nor before this holds, for a minute or two


class ApiHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def send(self, status, kind, data):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def fail(self, fault):
        time.sleep(fault.hang)
        deadline = time.monotonic() + 120
        while not fault.until() and time.monotonic() < deadline:
            time.sleep(0.1)
        self.send_response(fault.status)
        kind = "text/event-stream" if fault.status == 200 else "application/json"
        length = str(len(fault.body) + 1000 * fault.cut + len(PING) * fault.pings)
        headers = {"Content-Type": kind, "Content-Length": length} | fault.headers
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(fault.body.encode())
        for _ in range(fault.pings):
            time.sleep(0.1)
            with contextlib.suppress(OSError):
                self.wfile.write(PING)
        self.close_connection = True

    def refuse(self, message):
        error = {"type": "error", "error": {"type": self.server.error_type, "message": message}}
        self.send(self.server.status, "application/json", json.dumps(error).encode())

    def do_GET(self):
        if self.server.status != 200:
            return self.refuse(self.path.removeprefix("/v1/models/"))
        about = {
            "id": "m",
            "type": "model",
            "display_name": "m",
            "created_at": "2026-01-01T00:00:00Z",
        }
        self.send(200, "application/json", json.dumps(about).encode())

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        if self.server.status != 200:
            return self.refuse("no")
        reply = self.server.replies.pop(0)
        reply = reply(request) if callable(reply) else reply
        if isinstance(reply, Fault):
            return self.fail(reply)
        usage = self.server.usage(request)
        block, stop = reply if isinstance(reply, tuple) else (reply, "tool_use")
        if not request.get("stream"):
            text = {"type": "text", "text": block}
            call = {"type": "tool_use", "id": "toolu_1", "name": "propose", "input": block}
            whole = {"id": "msg", "type": "message", "role": "assistant", "model": "m",
                     "content": [call if isinstance(block, dict) else text], "stop_reason": stop,
                     "usage": {**usage, "output_tokens": 1}}
            return self.send(200, "application/json", json.dumps(whole).encode())
        events = [
            {
                "type": "message_start",
                "message": {
                    "id": "msg",
                    "type": "message",
                    "role": "assistant",
                    "model": "m",
                    "content": [],
                    "stop_reason": None,
                    "stop_sequence": None,
                    "usage": {**usage, "output_tokens": 1},
                },
            }
        ]
        if isinstance(block, str):
            events += [
                {
                    "type": "content_block_start",
                    "index": 0,
                    "content_block": {"type": "text", "text": ""},
                },
                {
                    "type": "content_block_delta",
                    "index": 0,
                    "delta": {"type": "text_delta", "text": block},
                },
                {"type": "content_block_stop", "index": 0},
            ]
        elif block is not None:
            tool = {"type": "tool_use", "id": "toolu_1", "name": "propose", "input": {}}
            delta = {"type": "input_json_delta", "partial_json": json.dumps(block)}
            events += [
                {"type": "content_block_start", "index": 0, "content_block": tool},
                {"type": "content_block_delta", "index": 0, "delta": delta},
                {"type": "content_block_stop", "index": 0},
            ]
        events += [
            {
                "type": "message_delta",
                "delta": {"stop_reason": stop, "stop_sequence": None},
                "usage": {"output_tokens": 100},
            },
            {"type": "message_stop"},
        ]
        lines = "".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n" for e in events)
        self.send(200, "text/event-stream", lines.encode())


def proposal(search, replace, description="an idea", **more):
    """The input of a `propose` call with one edit."""
    edit = {"search": search, "replace": replace, **more}
    return {"description": description, "hypothesis": "it should help", "edits": [edit]}
