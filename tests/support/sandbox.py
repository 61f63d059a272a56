"""What tests of the sandbox share: its program at work, attacks inside it, and its fixtures.

A test file takes the fixtures that it needs by assignment, as in `means = tools.means`.
"""

import ctypes
import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support.checkout import ROOT
from support.waiting import PATIENCE_SECONDS, wait_until

WARDEN = ROOT / "warden.py"
IS_ROOT = os.geteuid() == 0
MIB = 2**20
# Who escapes lives on for longer than anybody waits for its end. A process that ends only then has
# escaped, however slow the machine is.
WAIT_SECONDS, ESCAPED_SECONDS = 300.0, 1200.0

# What a command inside starts with: facts from the test, and what came of each attempt.
TOOLS = """\
import ctypes, errno, json, os, signal, socket, subprocess, sys, time
facts, said = json.loads(sys.argv[1]), {}
end = time.monotonic() + ESCAPED_SECONDS
libc = ctypes.CDLL(None, use_errno=True)

def attempt(name, action):
    try:
        result = action()
        said[name] = "done" if result is not False else "no"
    except OSError as error:
        said[name] = errno.errorcode.get(error.errno, str(error))

def system(*arguments):
    if libc.syscall(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)) < 0:
        raise OSError(ctypes.get_errno(), "")

def say(word):
    os.write(1, word.encode() + b"\\n")

def hold():
    while not os.path.exists("go"):
        time.sleep(0.02)

def daemon(action):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            action()
        os._exit(0)
    try:
        os.wait()
    except ChildProcessError:  # the kernel reaps
        pass

def live():
    while time.monotonic() < end:
        time.sleep(1)

def answer():
    print(json.dumps(said), flush=True)

""".replace("ESCAPED_SECONDS", str(ESCAPED_SECONDS))


# ---------------------------------------------------------------------------
# The means of this machine
# ---------------------------------------------------------------------------


def why_not(means: str, root: bool = IS_ROOT) -> str:
    """Return why a means cannot be had here, "" if it can, without asking the program tested."""
    if means == "bubblewrap":
        if not shutil.which("bwrap"):
            return "bubblewrap is not installed"
        line = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "true"]
        done = subprocess.run(line, capture_output=True, encoding="utf-8")
        return f"bubblewrap does not work: {done.stderr}" if done.returncode else ""
    version = ctypes.CDLL(None).syscall(444, None, ctypes.c_long(0), ctypes.c_long(1))
    needed = 1 if root else 6
    return f"Landlock has version {version}, not {needed}" if version < needed else ""


def need(means: str) -> None:
    """Skip the test where a means cannot be had."""
    if reason := why_not(means):
        pytest.skip(reason)


# ---------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------


@dataclass
class Done:
    """What one run left behind: exit status, the command's output, the program's own words."""

    status: int
    log: str
    error: str

    @property
    def said(self) -> dict:
        return json.loads(self.log.splitlines()[-1])


@dataclass
class Running:
    """A run at work, with its stdin open; `life` is a pipe whose end all its processes hold."""

    process: subprocess.Popen
    folder: Path
    log: Path
    life: int

    def await_word(self, word: str) -> None:
        """Wait until the command has said so."""
        wait_until(lambda: self.log.exists() and word in self.output(), self.process)

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def let_go(self) -> None:
        """Let a command that waits in `hold()` go on."""
        (work,) = self.folder.glob("work-*")
        (work / "go").touch()

    def everybody_is_gone(self, within: float = 0.0) -> bool:
        """Whether nobody has the pipe's other end any more, now or within some seconds."""
        return bool(select.select([self.life], [], [], within)[0])

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(WAIT_SECONDS)
        finally:
            self.process.kill()
            for end in (self.process.stdout, self.process.stderr):
                end.close()
            os.close(self.life)


@dataclass
class Sandbox:
    """One means, and the folder in which its runs get theirs."""

    means: str
    folder: Path
    program: Path = WARDEN
    runs: list = field(default_factory=list)

    def start(self, *command, options=(), parent=(), **more) -> Running:
        """Start a run, by this process or by a parent of its own."""
        life, held = os.pipe()
        line = [*parent, sys.executable, "-I", self.program, "--means", self.means, "--fd", held]
        line += ["--folder", self.folder, "--log", self.folder / "log", *options, "--", *command]
        more["pass_fds"] = [*more.get("pass_fds", ()), held]
        pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
        process = subprocess.Popen(list(map(str, line)), **pipes, **more)
        os.close(held)
        self.runs.append(Running(process, self.folder, self.folder / "log", life))
        return self.runs[-1]

    def start_python(self, code, facts=None, **more) -> Running:
        return self.start(*python(code, facts), **more)

    def finish(self) -> Done:
        """Wait for the run's own end. After it nobody is left, and nothing of its folder."""
        run = self.runs[-1]
        status, error = run.process.wait(WAIT_SECONDS), run.process.stderr.read().decode()
        assert run.everybody_is_gone(), "somebody is still alive"
        assert not list(self.folder.glob("work-*")), "the fresh folder is still there"
        return Done(status, run.output() if run.log.exists() else "", error)

    def run(self, *command, **more) -> Done:
        self.start(*command, **more)
        return self.finish()

    def python(self, code, facts=None, **more) -> Done:
        return self.run(*python(code, facts), **more)


def python(code: str, facts: dict | None = None) -> list[str]:
    """Return the command line of a Python that knows the tools above and these facts."""
    return [sys.executable, "-I", "-c", TOOLS + code, json.dumps(facts or {}, default=str)]


# ---------------------------------------------------------------------------
# Copies of the program in which something is changed
# ---------------------------------------------------------------------------


def altered(folder: Path, *changes: tuple[str, str]) -> Path:
    """Return a copy of the program in which each (old, new) text is exchanged."""
    text = WARDEN.read_text(encoding="utf-8")
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    copy = folder / "warden.py"
    copy.write_text(text, encoding="utf-8")
    return copy


def clock_that_runs_out_at(word: str) -> tuple[str, str]:
    """Return the change by which the time of a run is over as soon as its command says so.

    A limit in seconds would count the start too, which takes long on a machine that is taken.
    """
    now = "now = time.monotonic()"
    return now, f"{now} + 1e6 * ({word.encode()} in Path(log.file.name).read_bytes())"


def limits_looked_at(record: Path) -> tuple[str, str]:
    """Return the change by which every look at the limits adds a byte to a file."""
    docstring = '    """What the command has too much of, "" if nothing."""\n'
    return docstring, f"{docstring}    open({str(record)!r}, 'a').write('x')\n"


def await_looks(record: Path, run: Running, count: int) -> None:
    """Wait until the limits have been looked at so many times more."""

    def size():
        return record.stat().st_size if record.exists() else 0

    before = size()
    wait_until(lambda: size() >= before + count, run.process)


def self_test(program, *options, user=None, interpreter=sys.executable, **environment):
    """Run the self-test of a program to its end, perhaps as another user."""
    become = [f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    line = ["setpriv", *become, "--"] if user else []
    return subprocess.run(
        [*line, interpreter, "-I", program, "--self-test", *options],
        env=os.environ | environment,
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE_SECONDS,
    )


# ---------------------------------------------------------------------------
# Fixtures
# ---------------------------------------------------------------------------


@pytest.fixture
def make_sandbox(tmp_path) -> Iterable[Callable[..., Sandbox]]:
    """Makes sandboxes by their means, and ends all that runs in them after the test."""
    made = []

    def make(means, program=WARDEN, folder=None):
        folder = (folder or tmp_path) / f"{means}-{len(made)}"
        folder.mkdir()
        folder.chmod(0o777)  # nothing but the sandbox protects
        made.append(Sandbox(means, folder, program))
        return made[-1]

    yield make
    for run in [run for one in made for run in one.runs]:
        run.close()
    subprocess.run(["rm", "-rf", *(one.folder for one in made)])  # as deep as it may be


@pytest.fixture(params=["bubblewrap", "landlock"])
def means(request) -> str:
    """Each means that this machine has."""
    need(request.param)
    return request.param


@pytest.fixture
def sandbox(means, make_sandbox) -> Sandbox:
    return make_sandbox(means)


@pytest.fixture
def some_means() -> str:
    """One means, for what the program itself measures, whatever the means is."""
    found = [name for name in ("bubblewrap", "landlock") if not why_not(name)]
    return found[0] if found else pytest.skip("no means works here")


@pytest.fixture
def unconfined(make_sandbox) -> Sandbox:
    """No confinement at all: an attack that fails here proves nothing where it is denied."""
    return make_sandbox("unconfined")


@pytest.fixture
def neighbour(tmp_path) -> Path:
    """A checkout that anybody may write to, but for the sandbox."""
    folder = tmp_path / "checkout"
    (folder / ".git").mkdir(parents=True)
    (folder / "empty").mkdir()
    for name in ("prepare.py", "agent.py", "results.tsv", "moves", "renamed", "removed",
                 ".git/config"):  # fmt: skip
        (folder / name).write_text(f"contents of {name}\n", encoding="utf-8")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    return folder


def snapshot(folder: Path) -> list[tuple]:
    """Return all that is in a folder, with contents, modes and times."""
    paths = sorted(folder.rglob("*"))
    facts = [(p.lstat().st_mode, p.lstat().st_mtime_ns, p.lstat().st_uid) for p in paths]
    return [
        (str(p.relative_to(folder)), *fact, p.read_bytes() if p.is_file() else b"")
        for p, fact in zip(paths, facts, strict=True)
    ]
