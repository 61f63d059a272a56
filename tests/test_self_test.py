"""The choice of the means, and the self-test: it attacks from inside and must name every hole.

python -m pytest tests/test_self_test.py               # one removed rule for each means
python -m pytest tests/test_self_test.py -m nightly    # each of the others
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import pytest

from support import sandbox as tools
from support.sandbox import IS_ROOT, WARDEN, altered, need, self_test, why_not
from support.waiting import PATIENCE_SECONDS, wait_until

if sys.platform != "linux":
    pytest.skip("confinement needs Linux", allow_module_level=True)

# Fixtures that the test files of the sandbox share.
make_sandbox, means = tools.make_sandbox, tools.means

NOBODY = 60_000  # an ordinary user, for tests that root runs


# ---------------------------------------------------------------------------
# The choice of the means
# ---------------------------------------------------------------------------


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
        assert process.wait(PATIENCE_SECONDS) == 125
        assert b"--unconfined" in process.stderr.read()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["bwrap", "Landlock", "landlok"])
def test_a_means_that_nobody_knows_is_refused(make_sandbox, tmp_path, name):
    done = make_sandbox(name).run("touch", tmp_path / "ran")
    assert done.status == 125
    assert not (tmp_path / "ran").exists()


def test_a_means_that_does_not_work_here_is_refused(make_sandbox, tmp_path):
    """It is asked for by name, and must not be exchanged for a weaker one."""
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = make_sandbox("bubblewrap").run("touch", tmp_path / "ran", env=os.environ | path)
    assert done.status != 0
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------
# The self-test
# ---------------------------------------------------------------------------


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
ALL_UNSHARED = '"--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"'
WITHOUT_NET = '"--unshare-ipc", "--unshare-pid", "--unshare-uts"'
WITHOUT_PID = '"--unshare-ipc", "--unshare-net", "--unshare-uts"'


PAIRS = "socketpair: [SOCK_STREAM, SOCK_SEQPACKET]"


def unhandled(right):
    return "(1, REFER - 1), (2", f"(1, REFER - 1 - {right}), (2"


REMOVED = [
    ("io_uring", [("io_uring_setup 425 425, ", "")]),
    ("unshare", [("unshare 272 97, ", "")]),
    ("System V memory", [("shmget 29 194, ", "")]),
    ("children unseen", [('("equal", sigaction, ', '("equal", 9999, ')]),
    ("netlink, UDP", [NO_SOCKET]),
    ("datagrams of a pair", [(PAIRS, PAIRS.replace("]", ", SOCK_DGRAM]"))]),
    ("raw datagrams of a pair", [(PAIRS, PAIRS.replace("]", ", 3]"))]),
    ("reads a file outside, lists a folder outside", [ALL_READABLE]),
]
REMOVED_OF_BUBBLEWRAP = [
    ("netlink, UDP, datagrams of a pair, io_uring, unshare, System V memory",
     [('"--seccomp", str(memory)', '"--cap-drop", "ALL"')]),
    ("TCP, abstract socket", [(ALL_UNSHARED, WITHOUT_NET), NO_SOCKET, NO_CONNECT]),
    ("signals a process", [(ALL_UNSHARED, WITHOUT_PID), NO_USER]),
    ("writes a file outside, overwrites a file outside, truncates a file outside",
     [ALL_READABLE, ('"--ro-bind-try", path', '"--bind-try", path')]),
    ("its own folder is not writable", [('["--bind", str(work)', '["--ro-bind", str(work)')]),
]  # fmt: skip
# Where root starts it.
REMOVED_FOR_ROOT = [
    ("is root", [NO_USER]),
    ("is root, opens a kernel setting to write",
     [NO_USER, ('"--ro-bind", "/proc/sys", "/proc/sys", ', "")]),
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
    """Return every removal; the first of each table is in the gate, the others are nightly."""
    for table in tables:
        for at, (holes, changes) in enumerate(table):
            marks = [pytest.mark.nightly] if at else []
            yield pytest.param(name, holes, changes, marks=marks, id=f"{name}: {holes}")


@pytest.mark.parametrize(
    "name, holes, changes",
    [*each("bubblewrap", REMOVED, REMOVED_OF_BUBBLEWRAP, REMOVED_FOR_ROOT),
     *each("landlock", REMOVED, REMOVED_OF_LANDLOCK)],
)  # fmt: skip
def test_the_self_test_names_the_hole_where_a_rule_is_missing(tmp_path, name, holes, changes):
    need(name)
    if "is root" in holes and not IS_ROOT:
        pytest.skip("only root can be root in the sandbox")
    done = self_test(altered(tmp_path, *changes), "--means", name)
    assert (done.returncode, done.stdout) == (125, "")
    found = done.stderr.splitlines()[0].partition("found holes: ")[2].split(", ")
    assert set(holes.split(", ")) <= set(found), done.stderr
    assert "--unconfined" in done.stderr


def ordinary_python():
    """Return a Python that every user can run, None if there is none."""
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


def processes(session: int, word: str) -> list[int]:
    """Return who is alive in a session, or has a word in its command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
            words = (folder / "cmdline").read_text(errors="replace")
        except OSError:
            continue
        if stat[0] not in "ZX" and (int(stat[3]) == session or word in words):
            found.append(int(folder.name))
    return found


def test_an_interrupted_self_test_leaves_nobody(means, tmp_path):
    """The attacks, which take no time, are held up until the signal has come."""
    attacks = "        print(json.dumps(holes(json.loads(args.attack))))\n"
    held_up = f"        print('inside', flush=True)\n        time.sleep({tools.ESCAPED_SECONDS})\n"
    limit = '"--seconds", "30"'
    program = altered(tmp_path, (attacks, held_up), (limit, '"--seconds", "inf"'))
    # Its name is in the command lines of all but the victim, and short enough for a path socket.
    temporary = Path(tempfile.mkdtemp(prefix="interrupted-", dir="/tmp"))
    line = [sys.executable, "-I", program, "--self-test", "--means", means]

    def attacked():
        return [log for log in temporary.glob("*/log") if b"inside" in log.read_bytes()]

    with subprocess.Popen(
        line, env=os.environ | {"TMPDIR": str(temporary)}, stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            wait_until(attacked, process)
            before = processes(process.pid, str(temporary))
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE_SECONDS) == 130
            wait_until(lambda: not processes(process.pid, str(temporary)))
        finally:
            for pid in processes(process.pid, str(temporary)):
                os.kill(pid, signal.SIGKILL)
            shutil.rmtree(temporary, ignore_errors=True)
    assert len(before) >= 4, "itself, its victim, a supervisor and the attacks"
