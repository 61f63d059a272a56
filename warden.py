"""The cage: runs one untrusted command in a fresh folder, confined, limited, and ends all of it.

    python warden.py --self-test < /dev/null        # what this machine can hold, in one line
    python warden.py --copy train.py -- python train.py

The command may read the interpreter, its packages and what --read names; it may write its own
folder, which is removed at the end. Nobody that it started outlives it, nor the end of the warden's
stdin. Exit status: the command's own, 128 + N after signal N, 124 with the reason on stderr when a
limit ended it, 125 when it could not be started as asked.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import inspect
import json
import math
import os
import platform
import re
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# ---------------------------------------------------------------------------
# Limits and lists
# ---------------------------------------------------------------------------

POLL_SECONDS = 0.25
LOG_BYTES = 10_000_000  # of output; more is read and thrown away
DISK_BYTES, DISK_FILES = 4 * 2**30, 20_000  # of the command's folder
DISK_FLOOR = 2**30  # of the file system: below, the run ends whoever fills it
ENDED = "ended by a limit: "
DISK_IS_FULL = f"{ENDED}disk: too little is free"
MEMORY_SHARE = 0.9  # of what is available at the start
PROCESSES = 400 + 8 * (os.cpu_count() or 1)  # and threads, together
END_SECONDS = 20.0  # for the last of them to die

# The environment that the command sees, as a pattern of names: nobody's key, token or settings.
PASSED_ON = re.compile(
    "PATH|LANG|LC_.*|LD_LIBRARY_PATH|NVIDIA_(VISIBLE_DEVICES|DRIVER_CAPABILITIES)|CUDA_.*|"
    "(OMP|MKL|TORCH|TORCHINDUCTOR|PYTORCH|TRITON)_.*|AUTORESEARCH_(?!CACHE|CORPUS).*"
)
READABLE = (
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/run/opengl-driver",
    "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives",
    "/etc/localtime", "/sys/devices", "/sys/bus", "/sys/class",
)  # fmt: skip
DEVICES = ("null", "zero", "full", "random", "urandom")
GPU_DEVICES = ("nvidia*", "nvidia-caps/*", "kfd", "dri/*")

# System calls denied by seccomp, with their numbers on x86-64 and on 64-bit ARM: other processes,
# kernel interfaces, mounts and namespaces, System V and POSIX queues, handles, sockets.
DENIED = """
ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, kcmp 312 272,
pidfd_getfd 438 438, io_uring_setup 425 425, io_uring_enter 426 426, io_uring_register 427 427,
bpf 321 280, perf_event_open 298 241, userfaultfd 323 282, fanotify_init 300 262,
keyctl 250 219, add_key 248 217, request_key 249 218, syslog 103 116, acct 163 89,
unshare 272 97, setns 308 268, mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51,
open_tree 428 428, open_tree_attr 467 467, move_mount 429 429, fsopen 430 430, fsconfig 431 431,
fsmount 432 432, fspick 433 433, mount_setattr 442 442, quotactl 179 60, swapon 167 224,
swapoff 168 225, init_module 175 105, finit_module 313 273, delete_module 176 106,
kexec_load 246 104, kexec_file_load 320 294, reboot 169 142, settimeofday 164 170,
clock_settime 227 112, adjtimex 159 171, clock_adjtime 305 266, sethostname 170 161,
setdomainname 171 162, shmget 29 194, shmat 30 196, shmctl 31 195, semget 64 190,
semop 65 193, semctl 66 191, semtimedop 220 192, msgget 68 186, msgsnd 69 189,
msgrcv 70 188, msgctl 71 187, mq_open 240 180, mq_unlink 241 181, mq_timedsend 242 182,
mq_timedreceive 243 183, mq_notify 244 184, name_to_handle_at 303 264, open_by_handle_at 304 265,
socket 41 198, connect 42 203, bind 49 200, listen 50 201, accept 43 202, accept4 288 242
"""
# CUDA does not start without a socket that others could connect to, which is denied to all here.
ALLOWED_WITH_GPU = {"socket", "bind", "listen"}
# Denied too where the command runs as the same user: Landlock has no say in a file's attributes.
DENIED_AS_SAME_USER = """
chmod 90 -1, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452, chown 92 -1, fchown 93 55,
lchown 94 -1, fchownat 260 54, utime 132 -1, utimes 235 -1, futimesat 261 -1, utimensat 280 88,
setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, setxattrat 463 463, removexattr 197 14,
lremovexattr 198 15, fremovexattr 199 16, removexattrat 466 466, ioprio_set 251 30
"""
# Then allowed for the caller alone: a limit of no processor time kills as surely as a signal.
ALLOWED_FOR_ITSELF = """
prlimit64 302 261, sched_setscheduler 144 119, sched_setparam 142 118, sched_setattr 314 274,
sched_setaffinity 203 122, setpriority 141 140
"""
ARCHITECTURES = {
    "x86_64": (0, 0xC000003E, 56, 41, 53, 13), "aarch64": (1, 0xC00000B7, 220, 198, 199, 134)
}  # fmt: skip
CLONE3, CLONE_NEW_ANYTHING, AF_UNIX = 435, 0x7E020000, 1
SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET = 1, 2, 5

# Landlock's rights, and the first version of it that knows them.
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
MAKE_CHAR, MAKE_BLOCK, REFER, TRUNCATE, IOCTL_DEV = 2**6, 2**11, 2**13, 2**14, 2**15
RIGHTS = ((1, REFER - 1), (2, REFER), (3, TRUNCATE), (5, IOCTL_DEV))
OF_A_FILE = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
NO_TCP, NO_SIGNALS_AND_ABSTRACT_SOCKETS = 3, 3  # versions 4 and 6

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP = 1, 4, 22
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, WAIT_ALL = 36, 38, 0x40000000

libc = ctypes.CDLL(None, use_errno=True)


class CannotConfine(Exception):
    """The confinement that was asked for cannot be had here; the message says why."""


# ---------------------------------------------------------------------------
# Seccomp and Landlock, by the kernel's own interface
# ---------------------------------------------------------------------------


def call(function: Any, *arguments: Any) -> int:
    """Result of a C function; raises OSError with its errno when that is negative."""
    result = function(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def seccomp_program(same_user: bool, gpu: bool) -> bytes:
    """Return a filter that answers EPERM to what is denied, as an array of struct sock_filter.

    Each rule begins with the number of the system call loaded, and a rule that does not apply goes
    on with the next one.
    """
    column, machine, clone, socket_, socketpair, sigaction = ARCHITECTURES[platform.machine()]
    number, architecture, argument_0, argument_1 = 0, 4, 16, 24  # in struct seccomp_data
    code: list[Any] = [
        ("load", architecture), ("equal", machine, "", "kill"),
        ("load", number), ("at least", 0x40000000, "eperm", ""),  # x32 has a table of its own
    ]  # fmt: skip
    for entry in (DENIED + ("," + DENIED_AS_SAME_USER if same_user else "")).split(","):
        denied = int(entry.split()[1 + column])
        if denied >= 0 and not (gpu and entry.split()[0] in ALLOWED_WITH_GPU):
            code += [("equal", denied, "eperm", "")]
    for entry in ALLOWED_FOR_ITSELF.split(",") if same_user else ():
        name, own = entry.split()[0], int(entry.split()[1 + column])
        code += [("equal", own, "", f"not {name}")]
        for argument in (argument_0, argument_1) if name == "setpriority" else (argument_0,):
            code += [("load", argument), ("equal", 0, "", "eperm")]  # a process, this one
        code += [("go to", "allow"), f"not {name}"]
    code += [("equal", CLONE3, "enosys", "")]  # its flags lie out of sight: libc then uses clone
    code += [("equal", clone, "", "not clone"), ("load", argument_0)]
    code += [("has bits", CLONE_NEW_ANYTHING, "eperm", "allow"), "not clone"]
    # Nobody may have the kernel reap its children: the time that they used would be lost. Asking
    # what is set, by a null pointer of two halves, is allowed.
    code += [("equal", sigaction, "", "not sigaction"), ("load", argument_0)]
    code += [("equal", signal.SIGCHLD, "", "allow"), ("load", argument_1)]
    code += [("equal", 0, "", "eperm"), ("load", argument_1 + 4)]
    code += [("equal", 0, "allow", "eperm"), "not sigaction"]
    # Of socket pairs those of streams and of sequenced packets, and with a GPU a socket of the last
    # kind: any other kind, raw ones too, sends to whatever address it is given.
    kinds = {socketpair: [SOCK_STREAM, SOCK_SEQPACKET]}
    kinds |= {socket_: [SOCK_SEQPACKET]} if gpu else {}
    for maker, allowed in kinds.items():
        code += [("equal", maker, "", f"not {maker}"), ("load", argument_0)]
        code += [("equal", AF_UNIX, "", "eperm"), ("load", argument_1), ("mask", 15)]
        code += [("equal", kind, "allow", "") for kind in allowed]
        code += [("go to", "eperm"), f"not {maker}"]
    code += [("go to", "allow")]
    code += ["eperm", ("answer", 0x50001), "enosys", ("answer", 0x50026)]
    code += ["kill", ("answer", 0x80000000), "allow", ("answer", 0x7FFF0000)]
    return assemble(code)


# Operations of the classic BPF machine (linux/bpf_common.h), which has one register.
OPERATIONS = {"load": 0x20, "mask": 0x54, "answer": 0x06, "go to": 0x05,
              "equal": 0x15, "at least": 0x35, "has bits": 0x45}  # fmt: skip


def assemble(code: list[Any]) -> bytes:
    """Translate operations to an array of struct sock_filter.

    A string is a label for the operation after it. A condition is (name, value, label where it
    holds, label where it does not), and "" is the next operation. Jumps lead forwards, conditional
    ones by at most 255 operations.
    """
    lines = [line for line in code if not isinstance(line, str)]
    labels = {line: n - sum(isinstance(each, str) for each in code[:n])
              for n, line in enumerate(code) if isinstance(line, str)}  # fmt: skip
    text = b""
    for n, (operation, value, *targets) in enumerate(lines):
        if operation == "go to":
            value = labels[value] - n - 1
        jumps = [labels[target] - n - 1 if target else 0 for target in targets or ("", "")]
        assert 0 <= min(jumps) and max(jumps) <= 255, f"{operation} {value}: jumps {jumps}"
        text += struct.pack("HBBI", OPERATIONS[operation], *jumps, value)
    return text


def apply_seccomp(program: bytes) -> None:
    buffer = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    call(libc.prctl, PR_SET_SECCOMP, 2, head, 0, 0)


def landlock_version() -> int:
    """The kernel's version of Landlock, 0 if it has none."""
    return max(0, libc.syscall(444, None, ctypes.c_long(0), ctypes.c_long(1)))


def landlock_ruleset(version: int, rules: list[tuple[Path, int]]) -> int:
    """Descriptor of a ruleset that denies all but `rules`, (path, rights beneath it) each."""
    handled = sum(rights for since, rights in RIGHTS if version >= since)
    network = NO_TCP if version >= 4 else 0
    scoped = NO_SIGNALS_AND_ABSTRACT_SOCKETS if version >= 6 else 0
    attributes = struct.pack("QQQ", handled, network, scoped)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = call(libc.syscall, 444, attributes, size, 0)
    for path, rights in rules:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # a path that is not here must not void the others
            continue
        allowed = rights & handled & (-1 if path.is_dir() else OF_A_FILE)
        call(libc.syscall, 445, ruleset, 1, struct.pack("=QI", allowed, descriptor), 0)
        os.close(descriptor)
    return ruleset


def beside(path: Path, hidden: list[Path]) -> list[Path]:
    """The path, or what lies in it beside the hidden ones; rules follow no link."""
    if path in hidden:
        return []
    if not any(path in one.parents for one in hidden):
        return [path]
    children = [child for child in path.iterdir() if not child.is_symlink()]
    return [found for child in children for found in beside(child, hidden)]


# ---------------------------------------------------------------------------
# The means: how the command is started
# ---------------------------------------------------------------------------


def interpreter_paths() -> list[Path]:
    """Where this Python and its packages lie, by their real names."""
    places = (sys.prefix, sys.base_prefix, *sys.path)
    return list(dict.fromkeys(Path(place).resolve() for place in places if os.path.isdir(place)))


def interpreter_links() -> list[Path]:
    """The links on the way from sys.executable to the program itself."""
    links = [Path(sys.executable)]
    while links[-1].is_symlink():
        links.append(links[-1].parent / links[-1].readlink())
    return links


def gpu_devices() -> list[Path]:
    return [device for pattern in GPU_DEVICES for device in Path("/dev").glob(pattern)]


def gpu_groups() -> list[int]:
    """Return the groups that the devices of GPUs belong to."""
    return sorted({path.stat().st_gid for path in gpu_devices()} - {0})


def other_user() -> int | None:
    """For root: a user number that nobody has, another one for each of a few runs at a time."""
    return 60_000 + os.getpid() % 5_000 if os.geteuid() == 0 else None


def become(user: int, groups: list[int], may_read: bool) -> None:
    """Give up root for good, here and in all programs to come, for a user number that nobody has.

    `may_read` keeps the right to pass and read whatever the confinement shows: Python may lie under
    /root. In bubblewrap's world the text of this function runs by itself, so it needs no other.
    """
    import ctypes
    import os
    import struct

    libc = ctypes.CDLL(None, use_errno=True)
    kept = 1 << 2 if may_read else 0  # CAP_DAC_READ_SEARCH
    keep_rights = libc.prctl(28, 4, 0, 0, 0)  # PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP
    os.setgroups(groups)
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    header, sets = struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[kept] * 3, 0, 0, 0)
    given_up = libc.capset(header, sets)
    ambient = libc.prctl(47, 2, 2, 0, 0) if may_read else 0  # PR_CAP_AMBIENT, raise that right
    if keep_rights or given_up or ambient:
        raise OSError(ctypes.get_errno(), "root cannot be given up")


THEN_RUN = """
import json, os, sys
*who, work = json.loads(sys.argv[1])
become(*who)
os.chdir(work)
os.execvp(sys.argv[2], sys.argv[2:])
"""
# Each its own, but for that of users.
NAMESPACES = ("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts",
              "--unshare-cgroup-try")  # fmt: skip


def bubblewrap(
    command: list[str], work: Path, read: list[Path], hide: list[Path]
) -> tuple[list[str], list[int], Callable[[], None]]:
    """(command line, descriptors to pass on, what to do before exec) of a run in bubblewrap."""
    program = seccomp_program(same_user=False, gpu=bool(gpu_devices()))
    memory = os.memfd_create("seccomp")
    os.write(memory, program)
    os.lseek(memory, 0, os.SEEK_SET)
    line = ["bwrap", *NAMESPACES, "--cap-drop", "ALL", "--die-with-parent", "--new-session",
            "--proc", "/proc", "--ro-bind", "/proc/sys", "/proc/sys", "--dev", "/dev",
            "--seccomp", str(memory)]
    if (user := other_user()) is None:
        line += ["--unshare-user"]
    else:  # in a user namespace of its own root would stay root for every file and kernel setting
        for right in ("SETUID", "SETGID", "SETPCAP", "DAC_READ_SEARCH"):  # until it has become so
            line += ["--cap-add", f"CAP_{right}"]
        code = f"{inspect.getsource(become)}\n{THEN_RUN}"
        facts = json.dumps([user, gpu_groups(), True, str(work)])
        # Not isolated: where the library is hidden, PYTHONPATH names what takes its place.
        command = [sys.executable, "-S", "-c", code, facts, *command]
    for device in gpu_devices():
        line += ["--dev-bind", str(device), str(device)]
    visible = [*interpreter_paths(), *read]
    for path in [*READABLE, *map(str, visible)]:
        link = os.path.islink(path)  # to be kept one, or what is hidden shows under another name
        line += ["--symlink", os.readlink(path), path] if link else ["--ro-bind-try", path, path]
    for link in interpreter_links():
        if not any(Path(top) in link.parents for top in (*READABLE, *interpreter_paths())):
            line += ["--ro-bind", os.path.realpath(link), str(link)]
    read_only: list[str] = []
    for path in map(str, filter(Path.exists, hide)):
        line += ["--tmpfs", path] if os.path.isdir(path) else ["--ro-bind", "/dev/null", path]
        if os.path.isdir(path):
            read_only += ["--remount-ro", path]
        if os.path.exists(f"{path}/os.py"):  # by which Python knows its library
            line += ["--ro-bind", os.path.realpath(__file__), f"{path}/os.py"]
    for path in (str(p) for p in visible if any(one in p.parents for one in hide)):
        line += ["--ro-bind", path, path]
    line += ["--bind", str(work), str(work), *read_only, "--remount-ro", "/"]
    line += ["--chdir", str(work) if user is None else "/"]
    return [*line, "--", *command], [memory], lambda: None


def landlock(
    command: list[str], work: Path, read: list[Path], hide: list[Path]
) -> tuple[list[str], list[int], Callable[[], None]]:
    """The same under Landlock and seccomp, and for root as another user."""
    version, user = landlock_version(), other_user()
    system, known = [Path(p).resolve() for p in READABLE], [*interpreter_paths(), *read]
    shown = [p for top in {*system, *known} if top.exists() for p in beside(top, hide)]
    gpus = gpu_devices()
    devices = [*(Path("/dev") / name for name in DEVICES), *gpus]
    naming = WRITE_FILE | TRUNCATE if gpus else 0  # what CUDA does to its threads
    rules = [(p, EXECUTE | READ_FILE | READ_DIR) for p in shown]
    rules += [(p, READ_FILE | WRITE_FILE | IOCTL_DEV) for p in devices]
    rules += [(Path("/proc"), READ_FILE | READ_DIR | naming), (work, ~(MAKE_CHAR | MAKE_BLOCK))]
    groups = gpu_groups()
    places = [Path(sys.executable), *known, work]
    open_to_all = all(p.stat().st_mode & 1 for place in places for p in place.resolve().parents)

    def enter() -> None:
        ruleset = landlock_ruleset(version, rules)
        if user is not None:
            become(user, groups, may_read=not open_to_all)  # which Landlock narrows down
        call(libc.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        call(libc.syscall, 446, ruleset, 0)
        apply_seccomp(seccomp_program(same_user=user is None, gpu=bool(gpus)))

    return command, [], enter


def unconfined(
    command: list[str], work: Path, read: list[Path], hide: list[Path]
) -> tuple[list[str], list[int], Callable[[], None]]:
    """The same with limits and the end of all processes only."""
    return command, [], lambda: None


MEANS = {start.__name__: start for start in (bubblewrap, landlock, unconfined)}


def choose_means() -> str:
    """The strongest means that work here. Raises CannotConfine if there are none."""
    tried = []
    if platform.machine() not in ARCHITECTURES or sys.platform != "linux":
        raise CannotConfine(f"no confinement for {sys.platform} on {platform.machine()}")
    if shutil.which("bwrap"):
        python = [sys.executable, "-I", "-c", ""]
        line, memory, _ = bubblewrap(python, Path(tempfile.gettempdir()), [], [])
        done = subprocess.run(line, pass_fds=memory, capture_output=True, encoding="utf-8")
        os.close(memory[0])
        if done.returncode == 0:
            return "bubblewrap"
        tried.append(done.stderr.strip()[:200])
    else:
        tried.append("bubblewrap is not installed")
    needed = 1 if os.geteuid() == 0 else 6  # before 6 the same user's processes could be signalled
    if landlock_version() >= needed:
        return "landlock"
    tried.append(f"Landlock has version {landlock_version()}, {needed} is needed for this user")
    raise CannotConfine("; ".join(tried))


# ---------------------------------------------------------------------------
# Processes: who is alive, what they used, and the end of them
# ---------------------------------------------------------------------------


class Tree:
    """All descendants of this process, daemons included, since it is a subreaper."""

    def __init__(self) -> None:
        self.own: dict[tuple[int, int], float] = {}  # last seen CPU seconds, by pid and start time
        self.cpu_seconds = self.memory = 0.0  # memory in bytes
        self.alive: dict[int, str] = {}  # start time by pid
        self.parents: dict[int, int] = {}
        self.threads = 0

    def look(self) -> Tree:
        """Read /proc once. A process that dies unseen counts by who waited for it."""
        tick, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
        stats: dict[int, list[str]] = {}
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                text = Path(f"/proc/{name}/stat").read_text(errors="replace")
            except OSError:
                continue
            stats[int(name)] = text.rpartition(")")[2].split()  # state, ppid, ...
        family, added = {os.getpid()}, True
        while added:
            children = {pid for pid, stat in stats.items() if int(stat[1]) in family}
            added = not children <= family
            family |= children
        mine = {pid: stats[pid] for pid in family - {os.getpid()}}
        self.alive = {
            pid: stat[19]
            for pid, stat in mine.items()
            if stat[0] not in "ZX" or int(stat[17]) > 1  # a dead leader of threads that live
        }
        self.parents = {pid: int(stat[1]) for pid, stat in mine.items()}
        self.threads = sum(int(stat[17]) for stat in mine.values())
        self.memory = sum(int(stat[21]) * page for stat in mine.values())
        for pid, stat in mine.items():
            self.own[pid, int(stat[19])] = (int(stat[11]) + int(stat[12])) / tick
        waited = sum(sum(map(int, stat[11:15])) for stat in mine.values()) / tick
        reaped = resource.getrusage(resource.RUSAGE_CHILDREN)
        total = waited + reaped.ru_utime + reaped.ru_stime
        self.cpu_seconds = max(self.cpu_seconds, total, sum(self.own.values()))
        return self


def end_all(child: subprocess.Popen[bytes], tree: Tree) -> None:
    """Stop every descendant, until no new one is found, then kill: who must stop cannot fork."""
    if sys.platform != "linux" and child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
    deadline, told = time.monotonic() + END_SECONDS, set[tuple[int, str]]()
    for pid, parent in tree.parents.items():
        if parent == child.pid:  # under bubblewrap the init of a world that ends with it
            signal_first(pid, signal.SIGKILL)
    while not reap(child) and sys.platform == "linux" and time.monotonic() < deadline:
        for pid in orphans():  # before the slow look: a chain of forks is ours for a moment only
            signal_first(pid, signal.SIGSTOP)
        new = tree.look().alive.items() - told
        for pid, _ in new or tree.alive.items():
            signal_first(pid, signal.SIGSTOP if new else signal.SIGKILL)
        told |= new
        if not new:  # on a core that this process has to itself by its priority, nobody could die
            time.sleep(0.001)


def orphans() -> list[int]:
    """Return this process's own children, whose parents may have died just now."""
    try:
        text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    except OSError:  # a kernel without CONFIG_PROC_CHILDREN
        return []
    return list(map(int, text.split()))


def signal_first(pid: int, number: int) -> None:
    """Signal a process and, if we may, let it run before thousands of others, to obey."""
    with contextlib.suppress(OSError):
        os.kill(pid, number)
        os.sched_setscheduler(pid, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))


def reap(child: subprocess.Popen[bytes]) -> bool:
    """Collect the dead; keep the child's own status. Whether no descendant is left, dead or alive.

    The kernel is sure, as orphans become our children; /proc hides who is born as it is read.
    """
    child.poll()
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG | WAIT_ALL)
        except ChildProcessError:
            return True
        if pid == 0:
            return False
        if pid == child.pid:
            child.returncode = os.waitstatus_to_exitcode(status)


def threads_of_this_user() -> int:
    """Threads that the kernel counts against this user's limit already."""
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.stat().st_uid == os.getuid():
                count += len(os.listdir(folder / "task"))
        except OSError:
            continue
    return count


# ---------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------


def memory_available() -> int:
    """Bytes that the machine could still give."""
    text = Path("/proc/meminfo").read_text() if sys.platform == "linux" else ""
    found = re.search(r"MemAvailable:\s+(\d+)", text)
    return int(found[1]) * 1024 if found else 2**60


def folder_usage(folder: Path) -> tuple[int, int]:
    """(bytes, files) under a folder, or more than the limit as soon as that is passed.

    What is too deep or too closed to look into counts as too much.
    """
    size = files = 0
    folders = [str(folder)]
    while folders and size <= DISK_BYTES and files <= DISK_FILES:
        try:
            for entry in os.scandir(folders.pop()):
                size, files = size + entry.stat(follow_symlinks=False).st_blocks * 512, files + 1
                folders += [entry.path] if entry.is_dir(follow_symlinks=False) else []
        except FileNotFoundError:  # removed meanwhile
            continue
        except OSError:
            files += DISK_FILES + 1
    return size, files


def remove(folder: Path) -> None:
    """Remove a folder whatever is in it; Python's own recursion would end before some trees do."""
    for command in ("rm -rf", "chmod -R u+rwX", "rm -rf"):
        if folder.exists():
            subprocess.run([*command.split(), str(folder)], stderr=subprocess.DEVNULL)


def broken_limit(tree: Tree, work: Path, memory_limit: float, check_disk: bool) -> str:
    """What the command has too much of, "" if nothing."""
    if sys.platform == "linux":
        tree.look()
    used = max(tree.memory, memory_limit / MEMORY_SHARE - memory_available())
    if used > memory_limit:
        return f"memory: {used / 2**30:.1f} GiB"
    if tree.threads > PROCESSES:
        return f"processes: {tree.threads}"
    if check_disk:
        size, files = folder_usage(work)
        if size > DISK_BYTES or files > DISK_FILES:
            return f"disk: {size / 2**30:.1f} GiB in {files} files"
        if shutil.disk_usage(work).free < DISK_FLOOR:
            return DISK_IS_FULL.removeprefix(ENDED)
    return ""


class Log:
    """The command's output in a file, up to a limit."""

    def __init__(self, path: Path):
        self.file, self.left = open(path, "wb", buffering=0), LOG_BYTES

    def write(self, data: bytes) -> None:
        self.file.write(data[: max(0, self.left)])
        if self.left > 0 and len(data) >= self.left:
            self.file.write(f"\n[the log ends here: {LOG_BYTES:,} bytes]\n".encode())
        self.left -= len(data)


def watch(
    child: subprocess.Popen[bytes], work: Path, log: Log, seconds: float, gigabytes: float
) -> str:
    """Wait for the end of the command, of stdin or of a limit; the limit's name or "".

    Every byte on stdin is answered on stdout by a line: CPU seconds of all that the command
    started, so far. With the first its turn begins: then it is looked how much memory there is.
    """
    tree, started, memory_limit = Tree(), time.monotonic(), MEMORY_SHARE * memory_available()
    begun = False
    assert child.stdout
    sources, polled, walked, broken = [0, child.stdout.fileno()], 0.0, 0.0, ""
    try:
        while child.poll() is None and not broken:
            readable, _, _ = select.select(sources, [], [], POLL_SECONDS)
            if 0 in readable:
                if not os.read(0, 4096):
                    return "the end of stdin"
                os.write(1, f"{tree.look().cpu_seconds:.2f}\n".encode())
                if not begun:
                    memory_limit = MEMORY_SHARE * (memory_available() + tree.memory)
                    begun = True
            if child.stdout.fileno() in readable:
                data = os.read(child.stdout.fileno(), 65536)
                log.write(data)
                sources = sources if data else [0]
            now = time.monotonic()
            if now - polled >= POLL_SECONDS:
                check_disk = now - walked >= 1
                if tree.memory > gigabytes * 2**30:
                    broken = f"memory: {tree.memory / 2**30:.1f} GiB, the share of one of the runs"
                    break
                broken, polled = broken_limit(tree, work, memory_limit, check_disk), now
                walked = now if check_disk else walked
            if now - started > seconds:
                broken = f"wall clock: {seconds:g} s"
        return broken
    finally:
        end_all(child, tree)
        while select.select([child.stdout], [], [], 0)[0] and log.left > 0:
            data = os.read(child.stdout.fileno(), 65536)
            if not data:
                break
            log.write(data)


def set_limits(others: int) -> None:
    """In the child, before exec: what the kernel itself can hold."""
    limits = ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, DISK_BYTES),
              (resource.RLIMIT_NPROC, others + PROCESSES))  # which does not bind root
    for what, most in limits:
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))
    if sys.platform == "linux":
        call(libc.prctl, PR_SET_DUMPABLE, 1, 0, 0, 0)  # or the next line is not ours to write
        Path("/proc/self/oom_score_adj").write_text("1000")  # before anybody else


def run(args: argparse.Namespace) -> int:
    """Start the command in a folder of its own and see it out; the exit status."""
    means = re.split(r"[(+]", args.means or choose_means())[0]  # the label of a self-test will do
    if means not in MEANS:
        raise CannotConfine(f"no means is called {means!r}")
    work = Path(tempfile.mkdtemp(prefix="work-", dir=args.folder)).resolve()
    try:
        (work / "tmp").mkdir()
        for path in args.copy:
            shutil.copy(path, work)
        if args.cache and args.cache.exists():
            shutil.copytree(args.cache, work / "tmp/compile", symlinks=True)
        if not any(map(shutil.which, (args.command[0], work / args.command[0]))):
            raise FileNotFoundError(f"no such program: {args.command[0]}")
        read, hide = ([path.resolve() for path in paths] for paths in (args.read, args.hide))
        line, descriptors, enter = MEANS[means](args.command, work, read, hide)
        user = other_user() if means != "unconfined" else None
        if user is not None:
            for path in [work, *work.rglob("*")]:
                os.chown(path, user, user, follow_symlinks=False)

        others = 0 if user is not None else threads_of_this_user()

        def before_exec() -> None:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            set_limits(others)
            enter()
            if sys.platform == "linux":  # last: a change of user clears it
                call(libc.prctl, PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

        child = subprocess.Popen(
            line, cwd=work, env=environment(work, args.env), preexec_fn=before_exec,
            pass_fds=[*descriptors, *args.fd], start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for descriptor in args.fd:
            os.close(descriptor)
        broken = watch(child, work, Log(args.log), args.seconds, args.memory)
        if args.fill_cache and (work / "tmp/compile").is_dir() and not args.cache.exists():
            whole = Path(shutil.copytree(work / "tmp/compile", f"{work}-cache", symlinks=True))
            with contextlib.suppress(OSError):  # another one was quicker
                whole.rename(args.cache)
            shutil.rmtree(whole, ignore_errors=True)
        if broken:
            print(f"{ENDED}{broken}", file=sys.stderr)
            return 124
        return child.returncode if child.returncode >= 0 else 128 - child.returncode
    finally:
        remove(work)


def environment(work: Path, more: list[str]) -> dict[str, str]:
    """What the command sees: the allow-list, its own folders, and what --env names."""
    own = {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)}
    own |= {"HOME": str(work), "TMPDIR": f"{work}/tmp", "PYTHONDONTWRITEBYTECODE": "1"}
    own["USER"] = "nobody"  # torch asks for a name, and there may be no list of users to ask
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH"):
        own[name] = f"{work}/tmp/compile/{name.lower()}"
    return own | dict(pair.split("=", 1) for pair in more)


# ---------------------------------------------------------------------------
# Self-test: attacks from inside
# ---------------------------------------------------------------------------


def attacks_on(facts: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Return what the confined side must not be able to do, by the name of the hole."""
    secret, victim, port = facts["secret"], facts["pid"], facts["port"]

    def reach(family: int, kind: int, address: Any) -> None:
        with socket.socket(family, kind) as end:
            end.sendto(b"x", address) if kind == SOCK_DGRAM else end.connect(address)

    def environments() -> bool:
        found = False
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                found |= b"SELF_TEST_CANARY" in path.read_bytes()
            except OSError:
                continue
        return found

    return {
        "reads a file outside": lambda: open(secret).read(),
        "lists a folder outside": lambda: "secret" in os.listdir(os.path.dirname(secret)),
        "writes a file outside": lambda: open(secret + ".new", "w"),
        "overwrites a file outside": lambda: os.open(secret, os.O_WRONLY),
        "truncates a file outside": lambda: os.truncate(secret, 0),
        "changes a file's mode": lambda: os.chmod(secret, 0o666),
        "links a file outside": lambda: os.link(secret, "linked"),
        "moves a file outside": lambda: os.rename(secret, "moved"),
        "TCP": lambda: reach(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", port)),
        "UDP": lambda: reach(socket.AF_INET, SOCK_DGRAM, ("127.0.0.1", port)),
        "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
        "abstract socket": lambda: reach(AF_UNIX, socket.SOCK_STREAM, f"\0{secret}"),
        "path socket": lambda: reach(AF_UNIX, socket.SOCK_STREAM, f"{secret}.socket"),
        "datagrams of a pair": lambda: socket.socketpair(AF_UNIX, SOCK_DGRAM),
        "raw datagrams of a pair": lambda: socket.socketpair(AF_UNIX, socket.SOCK_RAW),
        "is root": lambda: os.getuid() == 0,
        "opens a kernel setting to write": lambda: os.open(
            "/proc/sys/kernel/core_pattern", os.O_WRONLY),
        "reads an environment": environments,
        "signals a process": lambda: os.kill(victim, 0),
        "starves a process": lambda: os.sched_setscheduler(
            victim, os.SCHED_IDLE, os.sched_param(0)),
        "ptrace": lambda: call(libc.ptrace, 0x4206, victim, 0, 0),
        "io_uring": lambda: call(libc.syscall, 425, 1, ctypes.create_string_buffer(120)),
        "unshare": lambda: call(libc.unshare, 0x10000000),
        "System V memory": lambda: call(libc.shmget, 0, 4096, 0o1600),
        "children unseen": lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN),
    }


def holes(facts: dict[str, Any]) -> list[str]:
    """Return how many things were tried inside, and the names of the attacks that succeeded and of
    the needs that were not met."""
    attacks = attacks_on(facts)
    needs: dict[str, Callable[[], Any]] = {
        "its own folder is not writable": lambda: open("file", "w").close(),
        "its temporary folder is not writable": lambda: tempfile.TemporaryFile().close(),
    }
    with contextlib.suppress(OSError):  # of another maker's card
        if gpu_devices():
            driver = ctypes.CDLL("libcuda.so.1")
            needs["cuInit fails"] = lambda: driver.cuInit(0) == 0

    def done(action: Callable[[], Any]) -> bool:
        try:
            return action() is not False
        except OSError:
            return False

    open_holes = [name for name, attack in attacks.items() if done(attack)]
    missing = [name for name, need in needs.items() if not done(need)]
    return [f"{len(attacks) + len(needs)}", *open_holes, *missing]


def self_test(means: str) -> str:
    """The means and how many attacks it held. Raises CannotConfine with the holes' names."""
    canary = os.environ | {"SELF_TEST_CANARY": "1"}
    short = "/tmp" if len(tempfile.gettempdir()) > 70 else None  # sockets' names have 107 bytes
    with (
        tempfile.TemporaryDirectory(dir=short) as outside,
        socket.create_server(("127.0.0.1", 0)) as tcp,
    ):
        secret, inside = Path(outside, "secret"), Path(outside, "inside")
        secret.write_text("secret")
        inside.mkdir()
        ends = [socket.socket(AF_UNIX), socket.socket(AF_UNIX)]
        for end, address in zip(ends, (f"\0{secret}", f"{secret}.socket"), strict=True):
            end.bind(address)
            end.listen()
        for path in (outside, secret, f"{secret}.socket", inside):  # nothing but the cage protects
            os.chmod(path, 0o777)
        asleep = [sys.executable, "-I", "-c", "import sys; sys.stdin.read()"]
        victim = subprocess.Popen(asleep, stdin=subprocess.PIPE, env=canary)
        facts = {"secret": str(secret), "pid": victim.pid, "port": tcp.getsockname()[1]}
        line = ["--means", means, "--folder", str(inside), "--log", f"{outside}/log"]
        line += ["--copy", __file__, "--seconds", "30", "--", sys.executable, "-I", "warden.py"]
        warden = subprocess.Popen(
            [sys.executable, "-I", __file__, *line, "--attack", json.dumps(facts)],
            stdin=subprocess.PIPE, env=canary,
        )
        try:
            status = warden.wait()
        finally:
            for process in (warden, victim):  # which end with their stdin
                process.stdin.close()
                process.wait()
            for end in ends:
                end.close()
        said = Path(outside, "log").read_text(errors="replace").strip()
    if status or not said:
        raise CannotConfine(f"the self-test of {means} did not run: {said[-300:]}")
    count, *found = json.loads(said)
    if found:
        raise CannotConfine(f"the self-test of {means} found holes: {', '.join(found)}")
    name = means if means != "landlock" else f"landlock({landlock_version()})"
    other = "+uid" if means == "landlock" and os.geteuid() == 0 else ""
    return f"{name}+seccomp{other}, {count}/{count}"


def parse() -> argparse.Namespace:
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--self-test", action="store_true", help="attack from inside, print the means in one line")
    add("--means", metavar="NAME", help="bubblewrap, landlock or unconfined; default: the first")
    add("--folder", type=Path, default=".", metavar="PATH", help="where the fresh folder is made")
    add("--copy", type=Path, action="append", default=[], metavar="FILE", help="into that folder")
    add("--cache", type=Path, metavar="PATH", help="of compiled code; the command gets a copy")
    add("--fill-cache", action="store_true", help="make that of what this command leaves")
    add("--read", type=Path, action="append", default=[], metavar="PATH", help="readable too")
    add("--hide", type=Path, action="append", default=[], metavar="PATH", help="not readable")
    add("--env", action="append", default=[], metavar="NAME=VALUE")
    add("--fd", type=int, action="append", default=[], metavar="N", help="to pass on")
    add("--log", type=Path, default="run.log", metavar="FILE")
    add("--seconds", type=float, default=math.inf, metavar="S", help="of wall clock, at most")
    add("--memory", type=float, default=math.inf, metavar="GB", help="mapped, at most")
    add("--attack", help=argparse.SUPPRESS)
    add("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    args.command = args.command[args.command[:1] == ["--"] :]
    if not (args.command or args.self_test or args.attack):
        parser.error("no command is given")
    return args


def main() -> int:
    args = parse()
    if args.attack:
        print(json.dumps(holes(json.loads(args.attack))))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if sys.platform == "linux":
        call(libc.prctl, PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        call(libc.prctl, PR_SET_DUMPABLE, 0, 0, 0, 0)
        signal_first(os.getpid(), 0)  # or a fork bomb leaves it no time to act
    try:
        if args.self_test:
            print(self_test(args.means or choose_means()))
            return 0
        return run(args)
    except KeyboardInterrupt:
        return 130
    except (CannotConfine, OSError, subprocess.SubprocessError) as error:
        hint = "python agent.py --unconfined  # at your own risk"
        print(f"error: {error}\nhint: {hint}", file=sys.stderr)
        return 125


if __name__ == "__main__":
    sys.exit(main())
