"""A real checkout in tmp_path with a second-long contest: the real program, small numbers."""

import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
PROGRAM = ("agent.py", "cluster.py", "digest.py", "full.py", "journal.py", "pretokenize.py",
           "promote.py", "proposals.py", "report.py", "researcher.py", "rule.py",
           "slots.py")  # fmt: skip
TRUSTED = ("prepare.py", "referee.py", "warden.py")
TINY = 'Scale("cpu", "stdlib", 512, 32, "cpu", 60, 8192, 0, 0.002)'

# A unigram model: counts tokens, answers SHARPNESS * log(count). Its best SHARPNESS is 1.
TOY = """\
import torch

from prepare import batches, current_scale, finish, run_seed

SHARPNESS = 0.5
PASSES = 4
SCALE = current_scale()


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.counts = torch.nn.Parameter(torch.ones(SCALE.vocab_size))

    def forward(self, tokens):
        return (SHARPNESS * self.counts.log()).expand(*tokens.shape, -1)


def main():
    torch.manual_seed(run_seed())
    model, steps = Toy(), 0
    for x, y, progress in batches(8, torch.device("cpu")):
        model.counts.data += torch.bincount(y.flatten(), minlength=SCALE.vocab_size)
        steps += 1
        print(f"step {steps} ({100 * progress:.0f}%)")
    finish(model, num_steps=steps, depth=1)


main()
"""


def late(statement):
    """In the place of `steps += 1`: what is not seen in the first two steps of the toy."""
    return f"steps += 1\n        if steps > 5:\n            {statement}"


def sh(*command, cwd, env=None, timeout=120, **more):
    """Run a command to its end; its output as text."""
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=env,
        timeout=timeout,
        capture_output=True,
        encoding="utf-8",
        **more,
    )


class Checkout:
    """A git repository with the product in it, and the environment to run it."""

    def __init__(self, folder: Path, cache: Path, baseline_runs: int = 1):
        self.folder = folder
        folder.mkdir()
        for name in (*PROGRAM, *TRUSTED, "program.md", ".gitignore"):
            shutil.copy(ROOT / name, folder)
        self.exchange("prepare.py", r'Scale\("cpu", .*?\)', TINY)
        self.exchange("prepare.py", "import torch._dynamo  #", "import torch  #")  # TOY needs none
        self.exchange("agent.py", r"\nBASELINE_RUNS = 3", f"\nBASELINE_RUNS = {baseline_runs}")
        self.exchange("journal.py", "\nSLOWER = 0.10", "\nSLOWER = 0.99")  # milliseconds vary
        self.exchange("slots.py", "\nSCREEN_TOKENS, SCREEN_SECONDS = 4300",
                      "\nSCREEN_TOKENS, SCREEN_SECONDS = 270")  # fmt: skip
        self.write_train(TOY)
        kept = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("ANTHROPIC", "AUTORESEARCH", "GIT_"))
        }
        self.env = kept | {
            "AUTORESEARCH_CACHE": str(cache),
            "AUTORESEARCH_SCALE": "cpu",
            "AUTORESEARCH_BUDGET_TOKENS": "8192",
            "GIT_CONFIG_GLOBAL": "/dev/null",
        }
        self.git("init", "-q", "-b", "main")
        self.commit_all()

    def exchange(self, name, pattern, new):
        """Put other text in the one place of a file that matches."""
        path = self.folder / name
        text, found = re.subn(pattern, new, path.read_text(encoding="utf-8"))
        assert found == 1, pattern
        path.write_text(text, encoding="utf-8")

    def git(self, *arguments, check=True, date=False):
        identity = ["-c", "user.name=a person", "-c", "user.email=person@example.com"]
        dates = {f"GIT_{who}_DATE": "2026-01-01T00:00:00Z" for who in ("AUTHOR", "COMMITTER")}
        env = self.env | (dates if date else {})
        done = sh("git", *identity, *arguments, cwd=self.folder, env=env)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout.strip()

    def commit_all(self):
        self.git("add", "-A")  # seeds follow from the commit: with one date it is the same always
        self.git("commit", "-q", "-m", "start", date=True)

    def write_train(self, text):
        (self.folder / "train.py").write_text(text, encoding="utf-8")

    def patch(self, name, old, new, base=TOY):
        """A patch file beside the checkout, as a whole train.py."""
        assert old in base
        path = self.folder.parent / name
        path.write_text(base.replace(old, new), encoding="utf-8")
        return path

    def agent(self, *arguments, env=None, timeout=300):
        return sh(
            sys.executable,
            "agent.py",
            *arguments,
            cwd=self.folder,
            env=self.env | (env or {}),
            timeout=timeout,
        )

    def rows(self):
        lines = (self.folder / "results.tsv").read_text(encoding="utf-8").splitlines()
        return [
            dict(zip(lines[0].split("\t"), line.split("\t"), strict=True)) for line in lines[1:]
        ]

    def refs(self, prefix="refs/autoresearch/"):
        return self.git("for-each-ref", "--format=%(refname)", prefix).split()


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def checkout(tmp_path, cache):
    return Checkout(tmp_path / "checkout", cache)


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


@pytest.fixture
def api():
    servers = []

    def start(*replies):
        servers.append(ApiServer(*replies))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def cpu_rows(cache):
    """The environment of the real cpu scale, its rows prepared once."""
    environment = os.environ | {"AUTORESEARCH_SCALE": "cpu", "AUTORESEARCH_CACHE": str(cache)}
    done = sh(sys.executable, "prepare.py", cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return environment


@pytest.fixture(scope="module")
def train():
    """The training file at the cpu scale, imported without training anything."""
    before = os.environ.get("AUTORESEARCH_SCALE")
    os.environ["AUTORESEARCH_SCALE"] = "cpu"
    yield importlib.import_module("train")
    os.environ.pop("AUTORESEARCH_SCALE") if before is None else None
