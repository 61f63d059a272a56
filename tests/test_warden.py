"""The sandbox under attack: what a command inside can read, change and reach, by each means.

python -m pytest tests/test_warden.py    # as root, and as an ordinary user
"""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from support import sandbox as tools
from support.sandbox import IS_ROOT, WARDEN, snapshot
from support.waiting import wait_until

if sys.platform != "linux":
    pytest.skip("confinement needs Linux", allow_module_level=True)
import warden

# Fixtures that the test files of the sandbox share.
make_sandbox, means, sandbox = tools.make_sandbox, tools.means, tools.sandbox
unconfined, neighbour = tools.unconfined, tools.neighbour


@pytest.fixture
def victim():
    """A process of this user, outside of every sandbox, with a key in its environment."""
    environment = os.environ | {"ANTHROPIC_API_KEY": f"sk-{uuid.uuid4().hex}"}
    process = subprocess.Popen(["sleep", str(tools.ESCAPED_SECONDS)], env=environment)
    process.key = environment["ANTHROPIC_API_KEY"]
    yield process
    process.kill()
    process.wait()


# ---------------------------------------------------------------------------
# Secrets
# ---------------------------------------------------------------------------


def test_the_environment_is_the_allow_list(sandbox):
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
    done = sandbox.python(code, env=environment, options=["--env", "AUTORESEARCH_SEED=1=2"])
    seen = done.said
    seen.pop("PWD", None)  # by bubblewrap
    own = [seen.pop(name) for name in ("HOME", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR",
                                       "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")]  # fmt: skip
    assert all(path.startswith(f"{sandbox.folder}/work-") for path in own), own
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


def test_no_process_gives_its_key_away(sandbox, unconfined, victim):
    """The victim, the supervisor and its parent, a shell, hold the key."""

    environment = os.environ | {"ANTHROPIC_API_KEY": victim.key}
    facts = {"key": [victim.key[:9], victim.key[9:]]}

    def sweep(sandbox):
        parent = ["sh", "-c", '"$@"; exit $?', "sh"]
        options = ["--env", "MARKED=1"]
        return sandbox.python(SWEEP, facts, options=options, parent=parent, env=environment).said

    assert sweep(unconfined)["found"] >= 2
    assert sweep(sandbox) == {"own": True, "found": 0}


def test_the_command_gets_three_descriptors_and_the_one_named(sandbox):
    code = """
for n in range(100):
    attempt(n, lambda: os.fstat(n))
answer()
"""
    said = sandbox.python(code).said
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


def test_files_outside_are_neither_read_nor_changed(sandbox, unconfined, neighbour):
    before = snapshot(neighbour)
    said = sandbox.python(ON_FILES, {"outside": neighbour}).said
    assert set(said.values()) <= {"EACCES", "EPERM", "ENOENT", "EROFS", "EXDEV"}, said
    assert snapshot(neighbour) == before
    free = unconfined.python(ON_FILES, {"outside": neighbour}).said
    assert free.keys() == said.keys()
    free.pop("write by a parent's /proc")  # root can: the parent is the supervisor
    assert set(free.values()) == {"done"}, free


ON_ATTRIBUTES = """
target = facts["outside"] + "/results.tsv"
attempt("mode", lambda: os.chmod(target, 0o777))
attempt("owner", lambda: os.chown(target, os.getuid(), os.getgid()))
attempt("times", lambda: os.utime(target, (1, 1)))
attempt("mode by /proc", lambda: os.chmod("/proc/self/root" + target, 0o777))
answer()
"""


def test_attributes_of_files_outside_stay(sandbox, unconfined, neighbour):
    for path in (neighbour, *neighbour.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    before = snapshot(neighbour)
    said = sandbox.python(ON_ATTRIBUTES, {"outside": neighbour}).said
    assert set(said.values()) <= {"EPERM", "EACCES", "ENOENT"}, said
    assert snapshot(neighbour) == before
    free = unconfined.python(ON_ATTRIBUTES, {"outside": neighbour}).said
    assert set(free.values()) == {"done"}, free


def test_its_own_folder_and_temporary_folder_work(sandbox, tmp_path):
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
    done = sandbox.python(code, options=["--copy", given])
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


def test_what_one_run_leaves_no_later_one_finds(sandbox):
    mark, number = f"left-{uuid.uuid4().hex}", uuid.uuid4().int % 2**30 + 1
    facts = {"mark": mark, "number": number, "home": Path.home()}
    head = IPC + "mark = b'/' + facts['mark'].encode()\n"
    first = sandbox.python(head + LEAVE, facts).said
    own = first.pop("own")
    assert [first[place] for place in own] == ["done", "done"]
    assert [first[name] for name in ("System V", "queue")] == ["EPERM", "EPERM"]
    assert first["POSIX queue"] == "no"
    second = sandbox.python(head + FIND, facts | {"places": own}).said
    assert second["found"] == []
    for place in (*first, *own):
        assert not os.path.lexists(f"{place}/{mark}"), place


def test_a_path_named_readable_can_be_read_only(sandbox, tmp_path):
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
    said = sandbox.python(code, {"corpus": corpus}, options=options).said
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
def test_a_hidden_path_among_the_packages_cannot_be_read(sandbox, packages, tmp_path, what):
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
    assert sandbox.python(code, facts).said == {"hidden": "done", "beside": "done"}
    said = sandbox.python(code, facts, options=["--hide", name]).said
    assert said["beside"] == "done"
    assert said["hidden"] in ("EACCES", "ENOENT", "no")


def test_a_hidden_path_has_no_second_name(sandbox):
    """Where /lib is a link to /usr/lib, what is hidden in one is hidden in the other."""
    libraries = sorted(Path("/usr/lib").resolve().glob("python3.*/heapq.py"))
    if not (Path("/lib").is_symlink() and libraries):
        pytest.skip("no /lib that is a link to a folder with a Python in it")
    names = [libraries[0], Path("/lib", *libraries[0].parts[-2:])]
    text = libraries[0].read_text(encoding="utf-8")
    for name in names:
        assert text in sandbox.run("cat", name).log
    for name in names:
        done = sandbox.run("cat", name, options=["--hide", libraries[0].parent])
        assert done.status == 1 and text[:100] not in done.log


def test_a_hidden_path_inside_one_named_readable_cannot_be_read(sandbox, tmp_path):
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
    said = sandbox.python(code, {"corpus": corpus}, options=options).said
    assert said["train"] == "done"
    assert said["held out"] in ("EACCES", "ENOENT")


# ---------------------------------------------------------------------------
# Network, other processes, the kernel
# ---------------------------------------------------------------------------


@pytest.fixture
def listeners(tmp_path):
    """Return real ends outside: by name (family, kind, address), and the sockets."""
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

def by_a_pair(address, kind):
    with socket.socketpair(socket.AF_UNIX, kind)[0] as end:
        end.sendto(b"x", address)

def serve(family, address):
    with socket.socket(family) as end:
        end.bind(address)
        end.listen()

for name, place in facts.items():
    attempt(name, lambda: reach(*place))
for kind in (socket.SOCK_DGRAM, socket.SOCK_RAW):  # raw ones are datagrams to the kernel
    for name in ("path datagrams", "abstract datagrams"):
        attempt(f"{name} of a pair, {kind}", lambda: by_a_pair(facts[name][2], kind))
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


def test_no_socket_reaches_anybody(sandbox, unconfined, listeners):
    places, ends = listeners
    said = sandbox.python(ON_SOCKETS, places).said
    assert set(said.values()) == {"EPERM"}, said
    assert heard(ends) == []
    free = unconfined.python(ON_SOCKETS, places).said
    assert set(free.values()) == {"done"}, free
    assert heard(ends) == sorted(ends)


def test_a_pair_of_stream_sockets_works(sandbox):
    code = """
one, other = socket.socketpair()
one.sendall(b"x")
said["received"] = other.recv(1).decode()
answer()
"""
    assert sandbox.python(code).said == {"received": "x"}


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


def test_no_process_outside_can_be_signalled(sandbox, victim):

    def state():
        stat = Path(f"/proc/{victim.pid}/stat").read_text(encoding="utf-8")
        return stat.rpartition(")")[2].split()[0]

    victim.send_signal(signal.SIGSTOP)
    wait_until(lambda: state() == "T", victim)
    done = sandbox.python(ON_PROCESSES, {"victim": victim.pid, "person": os.getpid()})
    said = done.said
    assert said.pop("anybody") == "no"
    assert said.pop("survived") == "no"
    assert set(said.values()) <= {"EPERM", "ESRCH", "EACCES", "ENOENT"}, said
    assert (done.status, victim.poll()) == (0, None)
    assert state() == "T"


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


def test_no_process_outside_can_be_starved(sandbox, unconfined, victim):
    """A limit of no processor time kills as surely as a signal."""

    def state():
        nice = [os.getpriority(os.PRIO_PROCESS, pid) for pid in (victim.pid, 0)]
        limits = Path(f"/proc/{victim.pid}/limits").read_text(encoding="utf-8")
        return nice, os.sched_getscheduler(victim.pid), limits

    before, facts = state(), {"victim": victim.pid, "user": os.getuid()}
    said = sandbox.python(ON_THE_VICTIM, facts).said
    said.pop("nice value of a user")  # under bubblewrap there is none but its own processes
    assert set(said.values()) <= {"EPERM", "ESRCH", "EACCES"}, said
    assert state() == before
    without_users = ON_THE_VICTIM.replace('os.PRIO_USER, facts["user"]', "os.PRIO_PROCESS, victim")
    free = unconfined.python(without_users, facts).said
    assert set(free.values()) == {"done"}, free


AS_A_USER = """
open("mine", "w").close()
attempt("set-uid", lambda: os.chmod("mine", 0o4755))
for name in ("kernel/core_pattern", "kernel/hostname", "vm/drop_caches"):
    attempt(name, lambda: os.open(f"/proc/sys/{name}", os.O_WRONLY))
answer()
say("ready")
live()
"""


def test_root_is_an_ordinary_user_inside_for_files_and_for_the_kernel(sandbox):
    """A set-uid file of root in the work folder once ran as root outside."""
    run = sandbox.start_python(AS_A_USER)
    run.await_word("ready")
    (made,) = sandbox.folder.glob("work-*/mine")
    assert made.stat().st_uid == os.geteuid() or made.stat().st_uid >= 60_000 and IS_ROOT
    assert made.stat().st_uid > 0
    said = json.loads(run.log.read_text(encoding="utf-8").splitlines()[0])
    said.pop("set-uid")
    assert len(said) == 3 and set(said.values()) <= {"EACCES", "EPERM", "EROFS"}, said
    run.process.stdin.close()
    sandbox.finish()


def test_the_command_cannot_kill_what_started_it(sandbox):
    code = "attempt('parent', lambda: os.kill(os.getppid(), signal.SIGKILL)); answer()"
    done = sandbox.python(code)
    assert done.status == 0
    # Under bubblewrap the init of its own world, which takes no signal from within; it belongs to
    # the same user unless root has started it.
    heard = sandbox.means == "bubblewrap" and not IS_ROOT
    assert done.said["parent"] == ("done" if heard else "EPERM")


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


def test_dangerous_system_calls_are_denied(sandbox):
    """Attaching to a child and unsharing need no right: they would work for anybody."""
    numbers = X86_64 if os.uname().machine == "x86_64" else AARCH64
    head = f"numbers = {numbers}\nchild = os.fork()\nif child == 0: live()\n"
    said = sandbox.python(head + ON_THE_KERNEL).said
    assert said.pop("clone3") == "ENOSYS"
    assert set(said.values()) == {"EPERM"}, said


def test_nobody_has_the_kernel_reap_its_children(sandbox):
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
    said = sandbox.python(code).said
    assert said.pop("mapped") is True
    assert said == {"ignore": "EPERM", "handle": "EPERM", "far": "EPERM", "ask": "done",
                    "another signal": "done"}  # fmt: skip


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86-64 has other system call tables")
def test_system_calls_of_other_tables_are_denied(sandbox):
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
    done = sandbox.python(code)
    assert json.loads(done.log.splitlines()[0]) == {"x32": "EPERM"}
    assert "survived" not in done.log
    assert done.status == 128 + signal.SIGSYS


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


@pytest.mark.gate
@pytest.mark.parametrize(
    "means", ["bubblewrap", pytest.param("landlock", marks=pytest.mark.nightly)], indirect=True
)
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++")
@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is not installed")
def test_torch_compile_works_inside(sandbox):
    code = """
import torch
function = torch.compile(lambda x: torch.sin(x) * 2 + 1)
x = torch.arange(4.0)
assert torch.allclose(function(x), torch.sin(x) * 2 + 1)
said["compiled"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
answer()
"""
    quick = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_VEC_ISA_OK": "0"}  # tries no vectors with g++
    done = sandbox.python(code, env=os.environ | quick)
    assert done.status == 0, done.log
    assert done.said == {"compiled": 1}


@pytest.mark.skipif(not warden.gpu_devices(), reason="no GPU here: this side is untested")
def test_a_gpu_works_inside(sandbox):
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
    assert sandbox.python(code).said == {"cuInit": 0, "compiled": True}
