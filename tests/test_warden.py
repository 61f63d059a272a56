"""The cage under attack: real processes, held by each means that this machine has.

python -m pytest tests/test_warden.py                 # as root, and as an ordinary user
python -m pytest tests/test_warden.py -m "not slow"   # a minute: fewer holes, no torch.compile
"""

import ctypes
import importlib.util
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support.checkout import ROOT

if sys.platform != "linux":
    pytest.skip("confinement needs Linux", allow_module_level=True)
import warden

WARDEN = ROOT / "warden.py"
IS_ROOT = os.geteuid() == 0
NOBODY = 60_000  # an ordinary user, for tests that root runs
MIB = 2**20
SOON = 5.0  # seconds; a quiet machine ends all in 0.1 s, and who escapes lives on for 60 s

# What a command in the cage starts with: facts from the test, and what came of each attempt.
TOOLS = """\
import ctypes, errno, json, os, signal, socket, subprocess, sys, time
facts, said = json.loads(sys.argv[1]), {}
end = time.monotonic() + 60  # of whoever would escape
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

def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

def live():
    while time.monotonic() < end:
        time.sleep(1)

def answer():
    print(json.dumps(said), flush=True)

"""


# ---------------------------------------------------------------------------
# The means of this machine
# ---------------------------------------------------------------------------


def why_not(means, root=IS_ROOT):
    """Why a means cannot be had here, "" if it can; not by the warden's own opinion."""
    if means == "bubblewrap":
        if not shutil.which("bwrap"):
            return "bubblewrap is not installed"
        line = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "true"]
        done = subprocess.run(line, capture_output=True, encoding="utf-8")
        return f"bubblewrap does not work: {done.stderr}" if done.returncode else ""
    version = ctypes.CDLL(None).syscall(444, None, ctypes.c_long(0), ctypes.c_long(1))
    needed = 1 if root else 6
    return f"Landlock has version {version}, not {needed}" if version < needed else ""


def need(means):
    if reason := why_not(means):
        pytest.skip(reason)


@dataclass
class Done:
    """What one run left behind: exit status, the command's output, the warden's words."""

    status: int
    log: str
    error: str

    @property
    def said(self):
        return json.loads(self.log.splitlines()[-1])


@dataclass
class Running:
    """A warden at work, with its stdin open; `life` is a pipe whose end all its processes hold."""

    process: subprocess.Popen
    log: Path
    life: int

    def await_word(self, word, seconds=20.0):
        """Wait until the command has said so."""
        deadline = time.monotonic() + seconds
        while not self.log.exists() or word not in self.log.read_text(errors="replace"):
            assert time.monotonic() < deadline, f"no {word!r} from the command"
            time.sleep(0.01)

    def everybody_is_gone(self, within=0.0):
        """Whether nobody has the pipe's other end any more."""
        return bool(select.select([self.life], [], [], within)[0])

    def close(self):
        self.process.stdin.close()
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            for end in (self.process.stdout, self.process.stderr):
                end.close()
            os.close(self.life)


@dataclass
class Cage:
    """One means, and the folder in which its runs get theirs."""

    means: str
    folder: Path
    program: Path = WARDEN
    runs: list = field(default_factory=list)

    def start(self, *command, options=(), parent=(), **more):
        """A warden at work, started by this process or by a parent of its own."""
        life, held = os.pipe()
        line = [*parent, sys.executable, "-I", self.program, "--means", self.means, "--fd", held]
        line += ["--folder", self.folder, "--log", self.folder / "log", *options, "--", *command]
        more["pass_fds"] = [*more.get("pass_fds", ()), held]
        pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
        process = subprocess.Popen(list(map(str, line)), **pipes, **more)
        os.close(held)
        self.runs.append(Running(process, self.folder / "log", life))
        return self.runs[-1]

    def start_python(self, code, facts=None, **more):
        return self.start(*python(code, facts), **more)

    def finish(self):
        """Wait for the run's own end. After it nobody is left, and nothing of its folder."""
        run = self.runs[-1]
        status, error = run.process.wait(60), run.process.stderr.read().decode()
        assert run.everybody_is_gone(), "somebody is still alive"
        assert not list(self.folder.glob("work-*")), "the fresh folder is still there"
        log = run.log.read_text(errors="replace") if run.log.exists() else ""
        return Done(status, log, error)

    def run(self, *command, **more):
        self.start(*command, **more)
        return self.finish()

    def python(self, code, facts=None, **more):
        return self.run(*python(code, facts), **more)


def python(code, facts=None):
    """Command line of a Python that knows the tools above and these facts."""
    return [sys.executable, "-I", "-c", TOOLS + code, json.dumps(facts or {}, default=str)]


@pytest.fixture
def make_cage(tmp_path):
    cages = []

    def make(means, program=WARDEN):
        folder = tmp_path / f"{means}-{len(cages)}"
        folder.mkdir()
        folder.chmod(0o777)  # nothing but the cage protects
        cages.append(Cage(means, folder, program))
        return cages[-1]

    yield make
    for run in [run for cage in cages for run in cage.runs]:
        run.close()
    subprocess.run(["rm", "-rf", *(cage.folder for cage in cages)])  # as deep as it may be


@pytest.fixture(params=["bubblewrap", "landlock"])
def means(request):
    need(request.param)
    return request.param


@pytest.fixture
def cage(means, make_cage):
    return make_cage(means)


@pytest.fixture
def some_means():
    """For what the warden itself measures, whatever the means is."""
    found = [name for name in ("bubblewrap", "landlock") if not why_not(name)]
    return found[0] if found else pytest.skip("no means works here")


@pytest.fixture
def open_air(make_cage):
    """No confinement at all: an attack that fails here proves nothing where it is denied."""
    return make_cage("unconfined")


@pytest.fixture
def victim():
    """A process of this user, outside of every cage, with a key in its environment."""
    environment = os.environ | {"ANTHROPIC_API_KEY": f"sk-{uuid.uuid4().hex}"}
    process = subprocess.Popen(["sleep", "60"], env=environment)
    process.key = environment["ANTHROPIC_API_KEY"]
    yield process
    process.kill()
    process.wait()


def altered(folder, *changes):
    """A copy of the warden in which each (old, new) text is exchanged."""
    text = WARDEN.read_text(encoding="utf-8")
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    copy = folder / "warden.py"
    copy.write_text(text, encoding="utf-8")
    return copy


def self_test(program, *options, user=None, interpreter=sys.executable, **environment):
    """The self-test by a warden, perhaps as another user."""
    become = [f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    line = ["setpriv", *become, "--"] if user else []
    return subprocess.run(
        [*line, interpreter, "-I", program, "--self-test", *options],
        env=os.environ | environment,
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )


# ---------------------------------------------------------------------------
# Secrets
# ---------------------------------------------------------------------------


def test_the_environment_is_the_allow_list(cage):
    secrets = {
        "ANTHROPIC_API_KEY": "sk-1",
        "AWS_SECRET_ACCESS_KEY": "2",
        "GITHUB_TOKEN": "3",
        "SSH_AUTH_SOCK": "/tmp/agent",
        "HF_TOKEN": "4",
        "PYTHONPATH": "/elsewhere",
        "XPATH": "5",
        "PATHS": "6",
        "AUTORESEARCH_CACHE": "/cache",
        "AUTORESEARCH_CORPUS": "/corpus",
    }
    passed_on = {"LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "AUTORESEARCH_SCALE": "cpu"}
    environment = secrets | passed_on | {"PATH": os.environ["PATH"], "HOME": "/home/person"}
    code = "said = dict(os.environ); answer()"
    done = cage.python(code, env=environment, options=["--env", "AUTORESEARCH_SEED=1=2"])
    seen = done.said
    seen.pop("PWD", None)  # by bubblewrap
    own = [seen.pop(name) for name in ("HOME", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR",
                                       "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")]  # fmt: skip
    assert all(path.startswith(f"{cage.folder}/work-") for path in own), own
    assert seen == passed_on | {
        "PATH": os.environ["PATH"],
        "AUTORESEARCH_SEED": "1=2",
        "PYTHONDONTWRITEBYTECODE": "1",
        "USER": "nobody",
    }


SWEEP = """
found, key = 0, "".join(facts["key"]).encode()  # the whole is not in our own command line
for pid in filter(str.isdigit, os.listdir("/proc")):
    for name in ("environ", "cmdline", f"task/{pid}/environ"):
        try:
            with open(f"/proc/{pid}/{name}", "rb") as file:
                text = file.read()
        except OSError:
            continue
        found += key in text
        said["own"] = said.get("own") or b"MARKED=1" in text
said["found"] = found
answer()
"""


def test_no_process_gives_its_key_away(cage, open_air, victim):
    """The victim, the warden and its parent, a shell, hold the key."""

    environment = os.environ | {"ANTHROPIC_API_KEY": victim.key}
    facts = {"key": [victim.key[:9], victim.key[9:]]}

    def sweep(cage):
        parent = ["sh", "-c", '"$@"; exit $?', "sh"]
        options = ["--env", "MARKED=1"]
        return cage.python(SWEEP, facts, options=options, parent=parent, env=environment).said

    assert sweep(open_air)["found"] >= 2
    assert sweep(cage) == {"own": True, "found": 0}


def test_the_command_gets_three_descriptors_and_the_one_named(cage):
    code = """
for n in range(100):
    attempt(n, lambda: os.fstat(n))
answer()
"""
    said = cage.python(code).said
    held = [int(n) for n, came in said.items() if came == "done"]
    assert held[:3] == [0, 1, 2] and len(held) == 4


# ---------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------


ON_FILES = """
outside, home = facts["outside"], os.getcwd()
target, climb = outside + "/results.tsv", os.path.relpath(outside, home) + "/prepare.py"
open("mine", "w").write("mine")
os.symlink(target, "link")
os.symlink(outside, "folder_link")

def write(path, flags=os.O_WRONLY):
    os.close(os.open(path, flags, 0o666))

attempt("read", lambda: open(target).read())
attempt("list", lambda: os.listdir(outside))
attempt("write", lambda: open(target, "a").write("x"))
attempt("write by ..", lambda: open(climb, "a").write("x"))
attempt("write by symlink", lambda: open("link", "a").write("x"))
attempt("write by a folder's symlink", lambda: open("folder_link/.git/config", "a").write("x"))
attempt("write by /proc", lambda: open("/proc/self/root" + target, "a").write("x"))
attempt("write by a parent's /proc", lambda: open(f"/proc/{os.getppid()}/root{target}", "a"))
attempt("read and write", lambda: write(target, os.O_RDWR))
attempt("truncate on opening", lambda: write(target, os.O_WRONLY | os.O_TRUNC))
attempt("truncate", lambda: os.truncate(outside + "/prepare.py", 0))
attempt("create", lambda: write(outside + "/json.py", os.O_WRONLY | os.O_CREAT))
attempt("create a hook", lambda: write(outside + "/.git/hook", os.O_WRONLY | os.O_CREAT))
attempt("create unnamed", lambda: write(outside, os.O_WRONLY | os.O_TMPFILE))
attempt("make a folder", lambda: os.mkdir(outside + "/__pycache__"))
attempt("make a symlink", lambda: os.symlink("/", outside + "/root"))
attempt("make a pipe", lambda: os.mkfifo(outside + "/pipe"))
attempt("hardlink in", lambda: os.link(target, "hard"))
attempt("hardlink out", lambda: os.link("mine", outside + "/mine"))
attempt("rename in", lambda: os.rename(outside + "/moves", "moved"))
attempt("rename out", lambda: os.rename("mine", outside + "/agent.py"))
attempt("rename there", lambda: os.rename(outside + "/renamed", outside + "/again"))
attempt("remove", lambda: os.unlink(outside + "/removed"))
attempt("remove a folder", lambda: os.rmdir(outside + "/empty"))
answer()
"""


def snapshot(folder):
    """All that is in a folder, with contents, modes and times."""
    paths = sorted(folder.rglob("*"))
    facts = [(p.lstat().st_mode, p.lstat().st_mtime_ns, p.lstat().st_uid) for p in paths]
    return [
        (str(p.relative_to(folder)), *fact, p.read_bytes() if p.is_file() else b"")
        for p, fact in zip(paths, facts, strict=True)
    ]


@pytest.fixture
def neighbour(tmp_path):
    """A checkout that anybody may write to, but for the cage."""
    folder = tmp_path / "checkout"
    (folder / ".git").mkdir(parents=True)
    (folder / "empty").mkdir()
    for name in ("prepare.py", "agent.py", "results.tsv", "moves", "renamed", "removed",
                 ".git/config"):  # fmt: skip
        (folder / name).write_text(f"contents of {name}\n", encoding="utf-8")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    return folder


def test_files_outside_are_neither_read_nor_changed(cage, open_air, neighbour):
    before = snapshot(neighbour)
    said = cage.python(ON_FILES, {"outside": neighbour}).said
    assert set(said.values()) <= {"EACCES", "EPERM", "ENOENT", "EROFS", "EXDEV"}, said
    assert snapshot(neighbour) == before
    free = open_air.python(ON_FILES, {"outside": neighbour}).said
    assert free.keys() == said.keys()
    free.pop("write by a parent's /proc")  # which root can, since the parent is the warden
    assert set(free.values()) == {"done"}, free


ON_ATTRIBUTES = """
target = facts["outside"] + "/results.tsv"
attempt("mode", lambda: os.chmod(target, 0o777))
attempt("owner", lambda: os.chown(target, os.getuid(), os.getgid()))
attempt("times", lambda: os.utime(target, (1, 1)))
attempt("mode by /proc", lambda: os.chmod("/proc/self/root" + target, 0o777))
answer()
"""


def test_attributes_of_files_outside_stay(cage, open_air, neighbour):
    for path in (neighbour, *neighbour.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    before = snapshot(neighbour)
    said = cage.python(ON_ATTRIBUTES, {"outside": neighbour}).said
    assert set(said.values()) <= {"EPERM", "EACCES", "ENOENT"}, said
    assert snapshot(neighbour) == before
    free = open_air.python(ON_ATTRIBUTES, {"outside": neighbour}).said
    assert set(free.values()) == {"done"}, free


def test_its_own_folder_and_temporary_folder_work(cage, tmp_path):
    given = tmp_path / "train.py"
    given.write_text("# given", encoding="utf-8")
    code = """
import pathlib, tempfile
assert open("train.py").read() == "# given"
open("train.py", "w").write("# changed")
os.makedirs("a/b")
open("a/b/one", "w").write("1")
os.rename("a/b/one", "a/two")
os.link("a/two", "three")
os.symlink("a/two", "four")
os.truncate("three", 0)
assert open("four").read() == ""
os.unlink("a/two")
with tempfile.NamedTemporaryFile() as file:
    file.write(b"x")
    said["temporary"] = os.path.relpath(file.name, os.getcwd()).split("/")[0]
assert os.access(os.environ["TMPDIR"], os.R_OK | os.W_OK | os.X_OK)  # as a compiler asks
subprocess.run(["sh", "-c", "echo x > by_shell && cat by_shell > /dev/null"], check=True)
assert pathlib.Path.home() == pathlib.Path.cwd() and open("by_shell").read() == "x\\n"
answer()
"""
    done = cage.python(code, options=["--copy", given])
    assert (done.status, done.said) == (0, {"temporary": "tmp"}), done.log
    assert given.read_text(encoding="utf-8") == "# given"


LEAVE = """
for place in (os.getcwd(), os.environ["TMPDIR"], "/tmp", "/var/tmp", "/dev/shm", "/run", "/dev",
              os.path.dirname(os.getcwd()), facts["home"], "/proc", "/sys"):
    attempt(place, lambda: open(f"{place}/{facts['mark']}", "w").write("x"))
attempt("System V", lambda: system(libc_shmget, facts["number"], 4096, 0o1666))
attempt("queue", lambda: system(libc_msgget, facts["number"], 0o1666))
attempt("POSIX queue", lambda: ctypes.CDLL("librt.so.1").mq_open(mark, 66, 438, None) >= 0)
said["own"] = [os.getcwd(), os.environ["TMPDIR"]]
answer()
"""
FIND = """
places = {os.getcwd(), os.environ["TMPDIR"], "/tmp", "/var/tmp", "/dev/shm", "/run", "/dev",
          os.path.dirname(os.getcwd()), facts["home"], *facts["places"]}
said["found"] = [place for place in places if os.path.lexists(f"{place}/{facts['mark']}")]
for name, number in (("System V", libc_shmget), ("queue", libc_msgget)):
    attempt(name, lambda: system(number, facts["number"], 0, 0))
answer()
"""
NUMBERS = {"x86_64": "libc_shmget, libc_msgget = 29, 68\n"}
IPC = NUMBERS.get(os.uname().machine, "libc_shmget, libc_msgget = 194, 186\n")


def test_what_one_run_leaves_no_later_one_finds(cage):
    mark, number = f"left-{uuid.uuid4().hex}", uuid.uuid4().int % 2**30 + 1
    facts = {"mark": mark, "number": number, "home": Path.home()}
    head = IPC + "mark = b'/' + facts['mark'].encode()\n"
    first = cage.python(head + LEAVE, facts).said
    own = first.pop("own")
    assert [first[place] for place in own] == ["done", "done"]
    assert [first[name] for name in ("System V", "queue")] == ["EPERM", "EPERM"]
    assert first["POSIX queue"] == "no"
    second = cage.python(head + FIND, facts | {"places": own}).said
    assert second["found"] == []
    for place in (*first, *own):
        assert not os.path.lexists(f"{place}/{mark}"), place


def test_a_path_named_readable_can_be_read_only(cage, tmp_path):
    corpus = tmp_path / "corpus"
    (corpus / "inner").mkdir(parents=True)
    for name in ("inner/rows", "alone", "beside"):
        path = tmp_path / name if name != "inner/rows" else corpus / name
        path.write_text("rows", encoding="utf-8")
        path.chmod(0o666)
    code = """
attempt("in a folder", lambda: open(facts["corpus"] + "/inner/rows").read() == "rows")
attempt("a file", lambda: open(facts["corpus"] + "/../alone").read() == "rows")
attempt("write", lambda: open(facts["corpus"] + "/inner/rows", "a"))
attempt("create", lambda: open(facts["corpus"] + "/new", "w"))
attempt("write a file", lambda: open(facts["corpus"] + "/../alone", "a"))
attempt("beside", lambda: open(facts["corpus"] + "/../beside").read())
answer()
"""
    options = ["--read", corpus, "--read", tmp_path / "alone"]
    said = cage.python(code, {"corpus": corpus}, options=options).said
    assert [said.pop("in a folder"), said.pop("a file")] == ["done", "done"]
    assert set(said.values()) <= {"EACCES", "EROFS", "ENOENT"}, said


@pytest.fixture
def packages():
    """(A package of this Python's, another beside it)."""
    found = [importlib.util.find_spec(name).submodule_search_locations for name in
             ("pluggy", "iniconfig")]  # fmt: skip
    hidden, beside = (Path(places[0]) for places in found)
    assert hidden.parent == beside.parent
    return hidden, beside


@pytest.mark.parametrize("what", ["folder", "file", "folder by a link"])
def test_a_hidden_path_among_the_packages_cannot_be_read(cage, packages, tmp_path, what):
    hidden, beside = packages
    link = tmp_path / "link"
    link.symlink_to(hidden.parent)
    name = {"folder": hidden, "file": hidden / "__init__.py"}.get(what, link / hidden.name)
    code = """
attempt("hidden", lambda: len(open(facts["hidden"] + "/__init__.py").read()) > 0)
attempt("beside", lambda: open(facts["beside"] + "/__init__.py").read())
answer()
"""
    facts = {"hidden": hidden, "beside": beside}
    assert cage.python(code, facts).said == {"hidden": "done", "beside": "done"}
    said = cage.python(code, facts, options=["--hide", name]).said
    assert said["beside"] == "done"
    assert said["hidden"] in ("EACCES", "ENOENT", "no")


def test_a_hidden_path_has_no_second_name(cage):
    """Where /lib is a link to /usr/lib, what is hidden in one is hidden in the other."""
    libraries = sorted(Path("/usr/lib").resolve().glob("python3.*/heapq.py"))
    if not (Path("/lib").is_symlink() and libraries):
        pytest.skip("no /lib that is a link to a folder with a Python in it")
    names = [libraries[0], Path("/lib", *libraries[0].parts[-2:])]
    text = libraries[0].read_text(encoding="utf-8")
    for name in names:
        assert text in cage.run("cat", name).log
    for name in names:
        done = cage.run("cat", name, options=["--hide", libraries[0].parent])
        assert done.status == 1 and text[:100] not in done.log


def test_a_hidden_path_inside_one_named_readable_cannot_be_read(cage, tmp_path):
    corpus = tmp_path / "corpus"
    for name in ("train", "held_out"):
        (corpus / name).mkdir(parents=True)
        (corpus / name / "rows").write_text("rows", encoding="utf-8")
    code = """
attempt("train", lambda: open(facts["corpus"] + "/train/rows").read())
attempt("held out", lambda: open(facts["corpus"] + "/held_out/rows").read())
answer()
"""
    options = ["--read", corpus, "--hide", corpus / "held_out"]
    said = cage.python(code, {"corpus": corpus}, options=options).said
    assert said["train"] == "done"
    assert said["held out"] in ("EACCES", "ENOENT")


# ---------------------------------------------------------------------------
# Network, other processes, the kernel
# ---------------------------------------------------------------------------


@pytest.fixture
def listeners(tmp_path):
    """Real ends outside of the cage: by name (family, kind, address), and the sockets."""
    unique = uuid.uuid4().hex
    wanted = {
        "TCP": (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
        "UDP": (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
        "TCP 6": (socket.AF_INET6, socket.SOCK_STREAM, ("::1", 0)),
        "UDP 6": (socket.AF_INET6, socket.SOCK_DGRAM, ("::1", 0)),
        "abstract": (socket.AF_UNIX, socket.SOCK_STREAM, f"\0{unique}"),
        "abstract datagrams": (socket.AF_UNIX, socket.SOCK_DGRAM, f"\0{unique}d"),
        "path": (socket.AF_UNIX, socket.SOCK_STREAM, f"/tmp/{unique}"),
        "path datagrams": (socket.AF_UNIX, socket.SOCK_DGRAM, f"/tmp/{unique}d"),
    }
    ends = {}
    for name, (family, kind, address) in wanted.items():
        ends[name] = socket.socket(family, kind)
        try:
            ends[name].bind(address)
        except OSError:
            assert family == socket.AF_INET6  # a machine without it
            ends.pop(name).close()
            continue
        if kind == socket.SOCK_STREAM:
            ends[name].listen()
        ends[name].setblocking(False)
        if isinstance(address, str) and address.startswith("/"):
            os.chmod(address, 0o777)
    places = {name: (*wanted[name][:2], end.getsockname()) for name, end in ends.items()}
    for name, (family, kind, address) in places.items():
        places[name] = (family, kind, address.decode() if isinstance(address, bytes) else address)
    yield places, ends
    for end in ends.values():
        end.close()
    for address in (f"/tmp/{unique}", f"/tmp/{unique}d"):
        os.unlink(address)


ON_SOCKETS = """
def reach(family, kind, address):
    address = tuple(address) if isinstance(address, list) else address
    with socket.socket(family, kind) as end:
        end.connect(address)
        end.send(b"x")

def by_a_pair(address):
    with socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0] as end:
        end.sendto(b"x", address)

def serve(family, address):
    with socket.socket(family) as end:
        end.bind(address)
        end.listen()

for name, place in facts.items():
    attempt(name, lambda: reach(*place))
attempt("a pair's datagrams", lambda: by_a_pair(facts["path datagrams"][2]))
attempt("a pair's abstract datagrams", lambda: by_a_pair(facts["abstract datagrams"][2]))
attempt("netlink", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close())
attempt("a server", lambda: serve(socket.AF_INET, ("127.0.0.1", 0)))
attempt("an abstract server", lambda: serve(socket.AF_UNIX, "\\0server"))
answer()
"""


def heard(ends):
    """Names of the sockets to which somebody came."""
    found = []
    for name, end in ends.items():
        try:
            end.accept()[0].close() if end.type == socket.SOCK_STREAM else end.recv(1)
        except BlockingIOError:
            continue
        found.append(name)
    return sorted(found)


def test_no_socket_reaches_anybody(cage, open_air, listeners):
    places, ends = listeners
    said = cage.python(ON_SOCKETS, places).said
    assert set(said.values()) == {"EPERM"}, said
    assert heard(ends) == []
    free = open_air.python(ON_SOCKETS, places).said
    assert set(free.values()) == {"done"}, free
    assert heard(ends) == sorted(ends)


def test_a_pair_of_stream_sockets_works(cage):
    code = """
one, other = socket.socketpair()
one.sendall(b"x")
said["received"] = other.recv(1).decode()
answer()
"""
    assert cage.python(code).said == {"received": "x"}


ON_PROCESSES = """
own = {os.getpid(), os.getppid() if os.getppid() == 1 else 0}  # or the init of its own world

def anybody():
    heard = 0
    for pid in {int(name) for name in os.listdir("/proc") if name.isdigit()} - own:
        try:
            os.kill(pid, 0)
            heard += 1
        except OSError:
            pass
    return heard > 0

for name, pid in facts.items():
    attempt(name, lambda: os.kill(pid, 0))
    attempt(name + " goes on", lambda: os.kill(pid, signal.SIGCONT))
    attempt(name + "'s group", lambda: os.killpg(pid, 0))
    attempt(name + "'s memory", lambda: open(f"/proc/{pid}/mem", "rb"))
attempt("anybody", anybody)
if "done" not in said.values():  # or all of this machine would be lost
    for number in (signal.SIGCONT, signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(-1, number)  # Linux says nothing where it was denied for each
        except OSError:
            pass
    attempt("survived", lambda: False)
answer()
"""


def test_no_process_outside_can_be_signalled(cage, victim):
    victim.send_signal(signal.SIGSTOP)
    done = cage.python(ON_PROCESSES, {"victim": victim.pid, "person": os.getpid()})
    said = done.said
    assert said.pop("anybody") == "no"
    assert said.pop("survived") == "no"
    assert set(said.values()) <= {"EPERM", "ESRCH", "EACCES", "ENOENT"}, said
    assert (done.status, victim.poll()) == (0, None)
    state = Path(f"/proc/{victim.pid}/stat").read_text(encoding="utf-8")
    assert state.rpartition(")")[2].split()[0] == "T"


ON_THE_VICTIM = """
import resource
victim = facts["victim"]
attempt("processor time", lambda: resource.prlimit(victim, resource.RLIMIT_CPU, (0, 0)))
attempt("open files", lambda: resource.prlimit(victim, resource.RLIMIT_NOFILE, (0, 0)))
attempt("nice value", lambda: os.setpriority(os.PRIO_PROCESS, victim, 19))
attempt("nice value of a user", lambda: os.setpriority(os.PRIO_USER, facts["user"], 19))
attempt("policy", lambda: os.sched_setscheduler(victim, os.SCHED_IDLE, os.sched_param(0)))
answer()
"""


def test_no_process_outside_can_be_starved(cage, open_air, victim):
    """A limit of no processor time kills as surely as a signal."""

    def state():
        nice = [os.getpriority(os.PRIO_PROCESS, pid) for pid in (victim.pid, 0)]
        limits = Path(f"/proc/{victim.pid}/limits").read_text(encoding="utf-8")
        return nice, os.sched_getscheduler(victim.pid), limits

    before, facts = state(), {"victim": victim.pid, "user": os.getuid()}
    said = cage.python(ON_THE_VICTIM, facts).said
    said.pop("nice value of a user")  # under bubblewrap there is none but its own processes
    assert set(said.values()) <= {"EPERM", "ESRCH", "EACCES"}, said
    assert state() == before
    without_users = ON_THE_VICTIM.replace('os.PRIO_USER, facts["user"]', "os.PRIO_PROCESS, victim")
    free = open_air.python(without_users, facts).said
    assert set(free.values()) == {"done"}, free


def test_the_command_cannot_kill_what_started_it(cage):
    code = "attempt('parent', lambda: os.kill(os.getppid(), signal.SIGKILL)); answer()"
    done = cage.python(code)
    assert done.status == 0
    # Under bubblewrap the init of its own world, which takes no signal from within.
    assert done.said["parent"] == ("done" if cage.means == "bubblewrap" else "EPERM")


ON_THE_KERNEL = """
attempt("ptrace", lambda: system(numbers["ptrace"], 0, 0, 0, 0))
attempt("ptrace of a child", lambda: system(numbers["ptrace"], 0x4206, child, 0, 0))
attempt("io_uring", lambda: system(425, 1, ctypes.create_string_buffer(120)))
attempt("unshare", lambda: system(numbers["unshare"], 0x10000000))
attempt("clone", lambda: system(numbers["clone"], 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0))
attempt("memory of a child", lambda: system(numbers["process_vm_readv"], child, 0, 0, 0, 0, 0))
attempt("open by handle", lambda: system(numbers["open_by_handle_at"], -100, 0, 0))
attempt("add_key", lambda: system(numbers["add_key"], b"user", b"name", b"value", 5, -4))
attempt("bpf", lambda: system(numbers["bpf"], 0, 0, 0))
attempt("userfaultfd", lambda: system(numbers["userfaultfd"], 1))
attempt("perf", lambda: system(numbers["perf_event_open"], 0, 0, -1, -1, 0))
attempt("mount", lambda: system(numbers["mount"], b"x", b".", b"tmpfs", 0, 0))
attempt("setns", lambda: system(numbers["setns"], 0, 0))
attempt("clone3", lambda: system(435, ctypes.create_string_buffer(88), 88))
os.kill(child, signal.SIGKILL)
answer()
"""
X86_64 = {
    "ptrace": 101, "unshare": 272, "clone": 56, "process_vm_readv": 310, "mount": 165,
    "open_by_handle_at": 304, "add_key": 248, "bpf": 321, "userfaultfd": 323,
    "perf_event_open": 298, "setns": 308,
}  # fmt: skip
AARCH64 = {
    "ptrace": 117, "unshare": 97, "clone": 220, "process_vm_readv": 270, "mount": 40,
    "open_by_handle_at": 265, "add_key": 217, "bpf": 280, "userfaultfd": 282,
    "perf_event_open": 241, "setns": 268,
}  # fmt: skip


def test_dangerous_system_calls_are_denied(cage):
    """Attaching to a child and unsharing need no right: they would work for anybody."""
    numbers = X86_64 if os.uname().machine == "x86_64" else AARCH64
    head = f"numbers = {numbers}\nchild = os.fork()\nif child == 0: time.sleep(60)\n"
    said = cage.python(head + ON_THE_KERNEL).said
    assert said.pop("clone3") == "ENOSYS"
    assert set(said.values()) == {"EPERM"}, said


def test_nobody_has_the_kernel_reap_its_children(cage):
    """The time of such a child would be counted for nobody."""
    code = """
import mmap
number = 13 if os.uname().machine == "x86_64" else 134
far = 2**32  # looks like no address in its lower half
libc.mmap.restype = ctypes.c_void_p
action = libc.mmap(ctypes.c_void_p(far), 4096, 3, 0x32, -1, 0)
said["mapped"] = action == far
ctypes.memmove(action, (1).to_bytes(8, "little") + bytes(24), 32)  # SIG_IGN
attempt("ignore", lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN))
attempt("handle", lambda: signal.signal(signal.SIGCHLD, lambda *_: None))
attempt("far", lambda: system(number, signal.SIGCHLD, action, 0, 8))
attempt("ask", lambda: system(number, signal.SIGCHLD, 0, 0, 8))
attempt("another signal", lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN))
answer()
"""
    said = cage.python(code).said
    assert said.pop("mapped") is True
    assert said == {"ignore": "EPERM", "handle": "EPERM", "far": "EPERM", "ask": "done",
                    "another signal": "done"}  # fmt: skip


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86-64 has other system call tables")
def test_system_calls_of_other_tables_are_denied(cage):
    """getpid, which is allowed, as x32 and as 32-bit code knows it."""
    code = """
import mmap
attempt("x32", lambda: system(0x40000000 + 39))
answer()
page = mmap.mmap(-1, 4096, prot=7)
page.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20; int 0x80; ret
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))())
print("survived")
"""
    done = cage.python(code)
    assert json.loads(done.log.splitlines()[0]) == {"x32": "EPERM"}
    assert "survived" not in done.log
    assert done.status == 128 + signal.SIGSYS


# ---------------------------------------------------------------------------
# The choice of the means, and the self-test
# ---------------------------------------------------------------------------


@pytest.mark.gate
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++")
@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is not installed")
def test_torch_compile_works_inside(cage):
    code = """
import torch
function = torch.compile(lambda x: torch.sin(x) * 2 + 1)
x = torch.arange(4.0)
assert torch.allclose(function(x), torch.sin(x) * 2 + 1)
said["compiled"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
answer()
"""
    done = cage.python(code, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.status == 0, done.log
    assert done.said == {"compiled": 1}


@pytest.mark.skipif(not warden.gpu_devices(), reason="no GPU here: this side is untested")
def test_a_gpu_works_inside(cage):
    code = """
import torch
libc = ctypes.CDLL("libcuda.so.1")
said["cuInit"] = libc.cuInit(0)
x = torch.randn(256, 256, device="cuda")
assert torch.allclose(x @ torch.eye(256, device="cuda"), x)
function = torch.compile(lambda x: torch.sin(x) * 2 + 1)
said["compiled"] = bool(torch.allclose(function(x), torch.sin(x) * 2 + 1, atol=1e-6))
answer()
"""
    assert cage.python(code).said == {"cuInit": 0, "compiled": True}


def test_the_strongest_means_comes_first():
    need("bubblewrap")
    done = self_test(WARDEN)
    assert re.fullmatch(r"bubblewrap\+seccomp, (\d+)/\1\n", done.stdout), done.stderr


def test_without_user_namespaces_the_second_means_is_chosen(tmp_path):
    need("landlock")
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    done = self_test(WARDEN, PATH=f"{tmp_path}:{os.environ['PATH']}")
    user = r"\+uid" if IS_ROOT else ""
    assert re.fullmatch(rf"landlock\(\d+\)\+seccomp{user}, (\d+)/\1\n", done.stdout), done.stderr


def test_without_any_means_nothing_is_started(tmp_path):
    old = "return max(0, libc.syscall(444, None, ctypes.c_long(0), ctypes.c_long(1)))"
    program = altered(tmp_path, (old, "return 0"))
    (tmp_path / "empty").mkdir()
    done = self_test(program, PATH=str(tmp_path / "empty"))
    assert (done.returncode, done.stdout) == (125, "")
    assert "bubblewrap is not installed" in done.stderr and "--unconfined" in done.stderr
    command = [sys.executable, "-I", "-c", f"open({str(tmp_path / 'ran')!r}, 'w')"]
    line = [sys.executable, "-I", program, "--folder", tmp_path, "--log", tmp_path / "log"]
    environment = os.environ | {"PATH": str(tmp_path / "empty")}
    with subprocess.Popen(
        [*line, "--", *command], env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.wait(20) == 125
        assert b"--unconfined" in process.stderr.read()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["bwrap", "Landlock", "landlok"])
def test_a_means_that_nobody_knows_is_refused(make_cage, tmp_path, name):
    done = make_cage(name).run("touch", tmp_path / "ran")
    assert done.status == 125
    assert not (tmp_path / "ran").exists()


def test_a_means_that_does_not_work_here_is_refused(make_cage, tmp_path):
    """It is asked for by name, and must not be exchanged for a weaker one."""
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = make_cage("bubblewrap").run("touch", tmp_path / "ran", env=os.environ | path)
    assert done.status != 0
    assert not (tmp_path / "ran").exists()


def test_the_self_test_finds_the_holes_of_no_confinement():
    done = self_test(WARDEN, "--means", "unconfined")
    assert done.returncode == 125
    for hole in ("reads a file outside", "TCP", "reads an environment", "signals a process"):
        assert hole in done.stderr


NO_USER = ("return 60_000 + os.getpid() % 5_000 if os.geteuid() == 0 else None", "return None")
NO_SOCKET, NO_CONNECT = ("socket 41 198, ", ""), ("connect 42 203, ", "")
ALL_READABLE = ('READABLE = (\n    "/usr",',
                f'READABLE = (\n    "{os.path.realpath(tempfile.gettempdir())}", "/usr",')
NO_RULES = ("call(libc.syscall, 446, ruleset, 0)", "pass")
NO_SCOPE = ("scoped = NO_SIGNALS_AND_ABSTRACT_SOCKETS if", "scoped = 0 if")
ALL_UNSHARED = '"--unshare-all", "--unshare-user"'
WITHOUT_NET = '"--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts"'
WITHOUT_PID = '"--unshare-user", "--unshare-net", "--unshare-ipc", "--unshare-uts"'


def unhandled(right):
    return "(1, REFER - 1), (2", f"(1, REFER - 1 - {right}), (2"


REMOVED = [
    ("io_uring", [("io_uring_setup 425 425, ", "")]),
    ("unshare", [("unshare 272 97, ", "")]),
    ("System V memory", [("shmget 29 194, ", "")]),
    ("children unseen", [("(equal, 0, 9, sigaction)", "(equal, 0, 9, 9999)")]),
    ("netlink, UDP", [NO_SOCKET]),
    ("datagrams of a pair", [("(equal, 2, 0, SOCK_DGRAM)", "(equal, 2, 0, 255)")]),
    ("reads a file outside, lists a folder outside", [ALL_READABLE]),
]
REMOVED_OF_BUBBLEWRAP = [
    ("netlink, UDP, datagrams of a pair, io_uring, unshare, System V memory",
     [('"--seccomp", str(memory)', '"--cap-drop", "ALL"')]),
    ("TCP, abstract socket", [(ALL_UNSHARED, WITHOUT_NET), NO_SOCKET, NO_CONNECT]),
    ("signals a process", [(ALL_UNSHARED, WITHOUT_PID)]),
    ("writes a file outside, overwrites a file outside, truncates a file outside",
     [ALL_READABLE, ('"--ro-bind-try", path', '"--bind-try", path')]),
    ("its own folder is not writable", [('["--bind", str(work)', '["--ro-bind", str(work)')]),
]  # fmt: skip
REMOVED_OF_LANDLOCK = [
    ("TCP", [NO_SOCKET, NO_CONNECT, ("network = NO_TCP if", "network = 0 if")]),
    ("abstract socket", [NO_SOCKET, NO_CONNECT, NO_SCOPE]),
    ("path socket", [NO_SOCKET, NO_CONNECT]),
    ("signals a process", [NO_USER, NO_SCOPE]),
    ("starves a process", [NO_USER, ("sched_setscheduler 144 119, ", "")]),
    ("reads an environment", [NO_USER, NO_RULES]),
    ("ptrace", [NO_USER, NO_RULES, ("ptrace 101 117, ", "")]),
    ("changes a file's mode", [NO_USER, ("chmod 90 -1, fchmod 91 52, fchmodat 268 53, ", "")]),
    ("truncates a file outside", [("(3, TRUNCATE), ", "")]),
    ("reads a file outside", [unhandled("READ_FILE")]),
    ("lists a folder outside", [unhandled("READ_DIR")]),
    ("overwrites a file outside", [unhandled("WRITE_FILE")]),
    ("writes a file outside", [unhandled("WRITE_FILE - 2**8")]),
    ("its own folder is not writable", [("(work, ~(MAKE_CHAR | MAKE_BLOCK))", "(work, 4)")]),
]


def each(name, *tables):
    """Every removal; the first of each table is quick, the others are for patient machines."""
    for table in tables:
        for at, (holes, changes) in enumerate(table):
            marks = [pytest.mark.gate] if at else []
            yield pytest.param(name, holes, changes, marks=marks, id=f"{name}: {holes}")


@pytest.mark.parametrize(
    "name, holes, changes",
    [*each("bubblewrap", REMOVED, REMOVED_OF_BUBBLEWRAP),
     *each("landlock", REMOVED, REMOVED_OF_LANDLOCK)],
)  # fmt: skip
def test_the_self_test_names_the_hole_where_a_rule_is_missing(tmp_path, name, holes, changes):
    need(name)
    done = self_test(altered(tmp_path, *changes), "--means", name)
    assert (done.returncode, done.stdout) == (125, "")
    found = done.stderr.splitlines()[0].partition("found holes: ")[2].split(", ")
    assert set(holes.split(", ")) <= set(found), done.stderr
    assert "--unconfined" in done.stderr


def ordinary_python():
    """A Python that every user can run, None if there is none."""
    code = "import ctypes, sys; open(sys.executable); print(sys.version_info >= (3, 10))"
    for path in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        line = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]
        line += [path, "-I", "-c", code]
        try:
            done = subprocess.run(line, capture_output=True, encoding="utf-8", cwd="/")
        except OSError:
            return None
        if done.stdout.strip() == "True":
            return path
    return None


@pytest.mark.parametrize("user", [None, NOBODY], ids=["as root", "as an ordinary user"])
def test_the_self_test_passes_for_every_kind_of_user(means, user):
    """With a Python and a folder that are open to all: no capability is kept to get there."""
    if not IS_ROOT:
        pytest.skip("only root can become another user; every other test ran as this one")
    interpreter = ordinary_python()
    if interpreter is None:
        pytest.skip("no setpriv, or no Python of 3.10 or newer that everybody can run")
    if reason := user and why_not(means, root=False):
        pytest.skip(reason)
    folder = Path("/tmp") / f"warden-{uuid.uuid4().hex}"
    folder.mkdir()
    folder.chmod(0o755)
    try:
        shutil.copy(WARDEN, folder)
        program = folder / "warden.py"
        done = self_test(program, "--means", means, user=user, interpreter=interpreter)
    finally:
        shutil.rmtree(folder)
    assert re.fullmatch(rf"{means}.*, (\d+)/\1\n", done.stdout), done.stderr


def session(number):
    """Processes that live in a session, by its number."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            stat = path.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        found += [path.parts[2]] if int(stat[3]) == number and stat[0] not in "ZX" else []
    return found


def test_an_interrupted_self_test_leaves_nobody(means):
    line = [sys.executable, "-I", WARDEN, "--self-test", "--means", means]
    pipe = subprocess.DEVNULL
    with subprocess.Popen(line, stdin=pipe, stderr=pipe, start_new_session=True) as process:
        while len(session(process.pid)) < 3:  # itself, its victim, and a warden
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    deadline = time.monotonic() + SOON
    while session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    left = session(process.pid)
    for pid in left:
        os.kill(int(pid), signal.SIGKILL)
    assert not left


# ---------------------------------------------------------------------------
# Ends
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("command, status", [
    ("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", 137), ("kill -SEGV $$", 139),
])  # fmt: skip
def test_the_exit_status_is_preserved(cage, command, status):
    done = cage.run("sh", "-c", command)
    assert (done.status, done.error) == (status, "")


def test_a_command_that_does_not_exist_could_not_be_started(cage):
    assert cage.run("/no/such/program").status == 125


DEAF = """
for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:
    try: signal.signal(number, signal.SIG_IGN)
    except OSError: pass
"""
BOMB = """
say("ready")
while time.monotonic() < end:
    try: os.fork()
    except OSError: pass"""
STOPPED = """
def stop():
    say("ready")
    os.kill(os.getpid(), signal.SIGSTOP)
daemon(stop)
stop()"""
WITHOUT_A_LEADER = """
import threading
def follow():
    time.sleep(0.1)
    say("ready")
    live()
def lead():
    threading.Thread(target=follow).start()
    libc.pthread_exit(None)  # the process looks dead, and is not
daemon(lead)
live()"""
WAITING_FOR_A_CHILD = """
def wait():  # too deep to be stopped
    vfork, clone = 0x4000, 56 if os.uname().machine == "x86_64" else 220
    if libc.syscall(clone, vfork | signal.SIGCHLD, 0, 0, 0, 0) == 0:
        say("ready")
        live()
daemon(wait)
live()"""
CHAIN = """
def chain():
    while time.monotonic() < end:
        if os.fork(): os._exit(0)
        time.sleep(0.002)
for _ in range({}): daemon(chain)
say("ready")
live()"""
PERSISTENT = {
    "deaf": DEAF + "say('ready')\nlive()",
    "daemons": DEAF + "for _ in range(5): daemon(live)\nsay('ready')\nlive()",
    "bomb": BOMB,
    "stopped": STOPPED,
    "a chain": CHAIN.format(1),
    "chains": CHAIN.format(5),
    "without a leader": WITHOUT_A_LEADER,
    "waiting for a child": WAITING_FOR_A_CHILD,
}


def first(n, table):
    """The names of a table; those after the first n are for patient machines."""
    return [pytest.param(k, marks=[pytest.mark.gate] * (i >= n)) for i, k in enumerate(table)]


@pytest.mark.parametrize("attack", first(4, PERSISTENT))
def test_nobody_is_left_after_the_limit(cage, attack):
    started = time.monotonic()
    done = cage.python(PERSISTENT[attack], options=["--seconds", "0.6"])
    assert time.monotonic() - started < 0.6 + SOON
    assert done.status == 124 and "ended by a limit: " in done.error
    assert "ready" in done.log


def test_nobody_outlives_the_process_that_holds_stdin(cage):
    code = """
import subprocess, sys
warden = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, close_fds=False)
warden.wait()
"""
    agent = [sys.executable, "-I", "-c", code]
    run = cage.start_python(PERSISTENT["daemons"], parent=agent)
    run.await_word("ready")
    assert not run.everybody_is_gone()
    run.process.kill()
    assert run.everybody_is_gone(within=SOON)
    deadline = time.monotonic() + SOON
    while list(cage.folder.glob("work-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not list(cage.folder.glob("work-*"))


@pytest.mark.parametrize("attack", ["daemons", "a chain", "without a leader"])
def test_the_end_of_stdin_ends_all(cage, attack):
    run = cage.start_python(PERSISTENT[attack])
    run.await_word("ready")
    assert not run.everybody_is_gone()
    run.process.stdin.close()
    assert run.everybody_is_gone(within=SOON)
    assert cage.finish().status == 124


def test_on_one_core_it_lets_them_die(cage):
    """As in a slot: its own priority must not keep the core from those that it has killed."""
    core = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}}); "
    code = core + "os.execvp(__import__('sys').argv[1], __import__('sys').argv[1:])"
    run = cage.start_python(PERSISTENT["daemons"], parent=[sys.executable, "-I", "-c", code])
    run.await_word("ready")
    run.process.stdin.close()
    assert run.everybody_is_gone(within=SOON)
    run.process.wait(timeout=SOON)
    assert cage.finish().status == 124


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_warden_ends_all(cage, number):
    run = cage.start_python(PERSISTENT["daemons"])
    run.await_word("ready")
    run.process.send_signal(number)
    assert run.everybody_is_gone(within=SOON)
    assert cage.finish().status == 130


def test_a_daemon_that_keeps_stdout_open_delays_nothing(cage):
    started = time.monotonic()
    done = cage.python("daemon(live); say('ready'); os._exit(7)")
    assert (done.status, done.log) == (7, "ready\n")
    assert time.monotonic() - started < SOON


def test_what_is_said_last_is_in_the_log(cage):
    done = cage.run("sh", "-c", "head -c 60000 /dev/zero | tr '\\0' x; exit 7")
    assert (done.status, len(done.log)) == (7, 60000)


# ---------------------------------------------------------------------------
# Limits
# ---------------------------------------------------------------------------


def test_a_flood_of_output_is_capped(cage):
    code = "for _ in range(300): os.write(1, b'x' * 99_999 + b'\\n')\nsys.exit(7)"
    done = cage.python(code)
    assert done.status == 7
    assert done.log.startswith("x" * 99_999) and "the log ends here" in done.log[-60:]
    assert warden.LOG_BYTES <= (cage.folder / "log").stat().st_size < warden.LOG_BYTES + 100


def test_an_endless_flood_of_output_ends_at_the_limit(cage):
    started = time.monotonic()
    done = cage.run("yes", options=["--seconds", "0.5"])
    assert done.status == 124
    assert time.monotonic() - started < 0.5 + SOON
    assert (cage.folder / "log").stat().st_size < warden.LOG_BYTES + 100


SMALL_DISK = ("DISK_BYTES, DISK_FILES = 4 * 2**30, 20_000", f"DISK_BYTES, DISK_FILES = {MIB}, 300")
ON_THE_DISK = {
    "huge files": ("for i in range(2): os.write(os.open(f'huge{i}', 65), bytes(2**20))", "0.0 GiB"),
    "many files": ("for i in range(400): open(f'file{i}', 'w').close()", "files"),
    "many folders": ("for i in range(400): os.mkdir(f'folder{i}')", "files"),
    "a deep folder": ("for i in range(1500): os.mkdir('x'); os.chdir('x')", "files"),
    "long names": ("for i in range(320): os.mkdir('x' * 200); os.chdir('x' * 200)", "files"),
    "a closed folder": ("os.mkdir('closed'); os.chdir('closed')\n"
                        "for i in range(400): open(f'file{i}', 'w').close()\n"
                        "attempt('close', lambda: os.chmod('.', 0))", "files"),
    "a temporary file": ("for i in range(2): "
                         "os.write(os.open(f'tmp/huge{i}', 65), bytes(2**20))", "0.0 GiB"),
}  # fmt: skip


@pytest.mark.parametrize("attack", ON_THE_DISK)
def test_too_much_on_the_disk_ends_the_run(some_means, make_cage, tmp_path, attack):
    cage = make_cage(some_means, altered(tmp_path, SMALL_DISK))
    code, reason = ON_THE_DISK[attack]
    done = cage.python(code + "\ntime.sleep(20)", options=["--seconds", "3"])
    assert done.status == 124
    assert "ended by a limit: disk: " in done.error and reason in done.error


def test_one_huge_file_stops_at_the_limit(some_means, make_cage, tmp_path):
    cage = make_cage(some_means, altered(tmp_path, SMALL_DISK))
    code = """
end = os.open("huge", os.O_WRONLY | os.O_CREAT)
attempt("write", lambda: [os.write(end, bytes(2**18)) for _ in range(100)])
said["size"] = os.fstat(end).st_size
answer()
"""
    assert cage.python(code).said == {"write": "EFBIG", "size": MIB}


@pytest.mark.parametrize("attack", [
    "os.mkdir('a'); os.chdir('a')\nfor i in range(1200): os.mkdir('x'); os.chdir('x')",
    "os.mkdir('closed'); open('closed/file', 'w').close()\nattempt('', lambda: "
    "os.chmod('closed', 0))",
    "open(b'\\xff\\n', 'w').close(); os.symlink('/', 'root'); os.symlink('nowhere', 'dangling')",
    "os.rmdir('tmp'); os.symlink(facts['outside'], 'tmp')",
    "attempt('', lambda: os.rmdir('tmp'))\nattempt('', lambda: os.rmdir(os.getcwd()))",
], ids=["deep", "closed", "odd names", "a link out", "empty"])  # fmt: skip
def test_the_fresh_folder_is_gone_afterwards(cage, neighbour, attack):
    before = snapshot(neighbour)
    done = cage.python(attack + "\nsys.exit(7)", {"outside": neighbour})
    assert done.status == 7 or "disk" in done.error  # what is closed may count as too much
    assert sorted(path.name for path in cage.folder.iterdir()) == ["log"]
    assert snapshot(neighbour) == before


def test_a_growing_file_without_a_name_ends_with_the_free_space(some_means, make_cage, tmp_path):
    grows = 300 * MIB
    if (free := shutil.disk_usage(tmp_path).free) < 2 * grows:
        pytest.skip(f"only {free / MIB:.0f} MiB are free")
    floor = ("DISK_FLOOR = 2**30", f"DISK_FLOOR = {free - grows // 2}")
    cage = make_cage(some_means, altered(tmp_path, floor))
    code = f"""
end = os.open("grows", os.O_RDWR | os.O_CREAT)
os.unlink("grows")
time.sleep(0.6)
say("held so far")
os.posix_fallocate(end, 0, {grows})
time.sleep(20)
"""
    done = cage.python(code, options=["--seconds", "10"])
    assert done.status == 124 and warden.DISK_IS_FULL in done.error
    assert "held so far" in done.log


SOCKETS = """
import ctypes, json, os, socket, sys
sys.path.insert(0, sys.argv[1])
import warden
warden.call(warden.libc.prctl, warden.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
warden.apply_seccomp(warden.seccomp_program(same_user=False, gpu=sys.argv[2] == "gpu"))
made, name = [], f"\\0{os.getpid()}"
for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_NETLINK):
    for kind in range(1, 6):
        try:
            end = socket.socket(family, kind)
        except OSError:
            continue
        made.append([int(family), kind])
        end.bind(name)
        end.listen()
        for attempt in (lambda: socket.socket(family, kind).connect(name), end.accept,
                        lambda: socket.socket(family, kind).sendto(b"x", name)):
            try:
                attempt()
                made.append(str(attempt))
            except OSError:
                pass
made.append(len(socket.socketpair()))
print(json.dumps(made))
"""


@pytest.mark.parametrize("gpu", [False, True])
def test_with_a_gpu_one_kind_of_socket_listens_and_nobody_reaches_it(gpu):
    """CUDA opens one of AF_UNIX, SOCK_SEQPACKET."""
    command = [sys.executable, "-c", SOCKETS, str(WARDEN.parent), "gpu" if gpu else "none"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ([[1, 5]] if gpu else []) + [2]


HOLD_MEMORY = {
    "mapped": "hold()",
    "in children": "if os.fork() == 0: hold(); live()",
    "in memfds": "os.posix_fallocate(os.memfd_create('x'), 0, size)",
}


@pytest.mark.parametrize("whose", ["the machine's", "a slot's"])
@pytest.mark.parametrize("how", first(1, HOLD_MEMORY))
def test_too_much_memory_ends_the_run(some_means, make_cage, tmp_path, how, whose):
    if (how, whose) == ("in memfds", "a slot's"):
        pytest.skip("what is not mapped counts for the machine only")
    available = warden.memory_available()
    if available < 6 * 2**30:
        pytest.skip(f"only {available / 2**30:.1f} GiB of memory are available")
    share = ("MEMORY_SHARE = 0.9", f"MEMORY_SHARE = {768 * MIB / available}")
    options = ["--seconds", "15"]
    if whose == "a slot's":
        share, options = share[:1] * 2, [*options, "--memory", "0.75"]
    cage = make_cage(some_means, altered(tmp_path, share))
    code = f"""
import mmap
time.sleep(0.4)
say("held so far")
held, size, flags = [], 64 * 2**20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
def hold():
    held.append(mmap.mmap(-1, size, flags=flags))
for _ in range(64):
    {HOLD_MEMORY[how]}
    time.sleep(0.02)
live()
"""
    done = cage.python(code, options=options)
    assert done.status == 124 and "ended by a limit: memory: " in done.error
    assert "held so far" in done.log


BURN = {
    "itself": "burn(0.6)",
    "a child nobody waits for": "if os.fork() == 0: burn(0.6); os._exit(0)",
    "a child that ends without a signal":
        "clone = 56 if os.uname().machine == 'x86_64' else 220\n"
        "if libc.syscall(clone, 0, 0, 0, 0, 0) == 0: burn(0.6); os._exit(0)",
    "a daemon": "daemon(lambda: burn(0.6))",
    "many short children": "for _ in range(12):\n"
                           "    if os.fork() == 0: burn(0.05); os._exit(0)\n"
                           "    os.wait()",
}  # fmt: skip


@pytest.mark.parametrize("who", first(2, BURN))
def test_a_byte_on_stdin_is_answered_by_cpu_seconds(cage, who):
    code = f"""
say("ready")
time.sleep(0.2)
reading, writing = os.pipe()
{BURN[who]}
os.close(writing)
os.read(reading, 1)  # until all that could write are gone
say("finished")
live()
"""
    run = cage.start_python(code)

    def cpu_seconds():
        run.process.stdin.write(b"?")
        run.process.stdin.flush()
        return float(run.process.stdout.readline())

    run.await_word("ready")
    before = cpu_seconds()
    run.await_word("finished")
    used = cpu_seconds() - before
    assert before < 0.5
    assert 0.55 <= used < 1
    run.process.stdin.close()
    assert cage.finish().status == 124
