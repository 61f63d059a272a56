"""The ends of a run: its exit status, its limits, and that nobody who ran in it is left.

python -m pytest tests/test_warden_ends.py               # as root, and as an ordinary user
python -m pytest tests/test_warden_ends.py -m alone      # a fork bomb, and the machine's memory
"""

import os
import signal
import subprocess
import sys
import time

import pytest

from support import sandbox as tools
from support.sandbox import (
    IS_ROOT,
    MIB,
    WAIT_SECONDS,
    altered,
    await_looks,
    clock_that_runs_out_at,
    limits_looked_at,
    snapshot,
)
from support.waiting import wait_until

if sys.platform != "linux":
    pytest.skip("confinement needs Linux", allow_module_level=True)
import warden

# Fixtures that the test files of the sandbox share.
make_sandbox, means, sandbox = tools.make_sandbox, tools.means, tools.sandbox
some_means, neighbour = tools.some_means, tools.neighbour


# A copy waits without a limit until all are gone: how long that takes is the machine's affair.
PATIENT = ("END_SECONDS = 20.0", "END_SECONDS = 1e9")


# ---------------------------------------------------------------------------
# Ends
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("command, status", [
    ("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", 137), ("kill -SEGV $$", 139),
])  # fmt: skip
def test_the_exit_status_is_preserved(sandbox, command, status):
    done = sandbox.run("sh", "-c", command)
    assert (done.status, done.error) == (status, "")


def test_a_command_that_does_not_exist_could_not_be_started(sandbox):
    assert sandbox.run("/no/such/program").status == 125


DEAF = """
for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:
    try: signal.signal(number, signal.SIG_IGN)
    except OSError: pass
"""
STATE = """
def await_state(pid, state):
    while open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != state:
        time.sleep(0.02)
"""
STOPPED = STATE + """
leader = os.getpid()
def stop():
    os.kill(os.getpid(), signal.SIGSTOP)
def follow():
    await_state(leader, "T")
    say("ready")
    stop()
daemon(stop)
daemon(follow)
stop()"""
WITHOUT_A_LEADER = STATE + """
import threading
def follow():
    await_state(os.getpid(), "Z")
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
    "stopped": STOPPED,
    "a chain": CHAIN.format(1),
    "chains": CHAIN.format(5),
    "without a leader": WITHOUT_A_LEADER,
    "waiting for a child": WAITING_FOR_A_CHILD,
}


@pytest.mark.parametrize("attack", PERSISTENT)
def test_nobody_is_left_after_the_limit(means, make_sandbox, tmp_path, attack):
    """The time is over as soon as the attack has said that it is ready."""
    program = altered(tmp_path, clock_that_runs_out_at("ready"), PATIENT)
    sandbox = make_sandbox(means, program)
    done = sandbox.python(PERSISTENT[attack], options=["--seconds", WAIT_SECONDS])
    assert done.status == 124 and "ended by a limit: wall clock: " in done.error
    assert "ready" in done.log


@pytest.mark.alone
def test_nobody_is_left_of_a_fork_bomb(means, make_sandbox, tmp_path):
    """The time is over once it has forked 200 times; where the kernel lets it, it goes on."""
    program = altered(tmp_path, clock_that_runs_out_at("ready"), PATIENT)
    sandbox = make_sandbox(means, program)
    bomb = """
forks = os.open("forks", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
while time.monotonic() < end:
    try:
        if os.fork() == 0:
            os.write(forks, b"x")
            if os.fstat(forks).st_size >= 200: say("ready")
    except OSError: pass
"""
    done = sandbox.python(bomb, options=["--seconds", WAIT_SECONDS])
    assert done.status == 124
    assert "ready" in done.log or "ended by a limit: processes: " in done.error


def test_the_limit_of_seconds_is_on_the_wall_clock(sandbox):
    """A command that uses no processor time is ended too, and not before its time."""
    started = time.monotonic()
    done = sandbox.python("live()", options=["--seconds", "0.75"])
    assert time.monotonic() - started >= 0.75
    assert (done.status, done.error) == (124, "ended by a limit: wall clock: 0.75 s\n")


def test_nobody_outlives_the_process_that_holds_stdin(sandbox):
    code = """
import subprocess, sys
subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, close_fds=False).wait()
"""
    agent = [sys.executable, "-I", "-c", code]
    run = sandbox.start_python(PERSISTENT["daemons"], parent=agent)
    run.await_word("ready")
    assert not run.everybody_is_gone()
    run.process.kill()
    assert run.everybody_is_gone(within=WAIT_SECONDS)
    wait_until(lambda: not list(sandbox.folder.glob("work-*")))


@pytest.mark.parametrize("attack", ["daemons", "a chain", "without a leader"])
def test_the_end_of_stdin_ends_all(means, make_sandbox, tmp_path, attack):
    sandbox = make_sandbox(means, altered(tmp_path, PATIENT))
    run = sandbox.start_python(PERSISTENT[attack])
    run.await_word("ready")
    assert not run.everybody_is_gone()
    run.process.stdin.close()
    assert run.everybody_is_gone(within=WAIT_SECONDS)
    assert sandbox.finish().status == 124


def test_on_one_core_it_lets_them_die(means, make_sandbox, tmp_path):
    """As in a slot: its own priority must not keep the core from those that it has killed.

    The copy never ends where they cannot die.
    """
    sandbox = make_sandbox(means, altered(tmp_path, PATIENT))
    core = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}}); "
    code = core + "os.execvp(__import__('sys').argv[1], __import__('sys').argv[1:])"
    run = sandbox.start_python(PERSISTENT["daemons"], parent=[sys.executable, "-I", "-c", code])
    run.await_word("ready")
    run.process.stdin.close()
    assert run.everybody_is_gone(within=WAIT_SECONDS)
    assert sandbox.finish().status == 124


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_supervisor_ends_all(sandbox, number):
    run = sandbox.start_python(PERSISTENT["daemons"])
    run.await_word("ready")
    run.process.send_signal(number)
    assert run.everybody_is_gone(within=WAIT_SECONDS)
    assert sandbox.finish().status == 130


def test_a_daemon_that_keeps_stdout_open_delays_nothing(sandbox):
    """The daemon lives for longer than `finish` waits."""
    done = sandbox.python("daemon(live); say('ready'); os._exit(7)")
    assert (done.status, done.log) == (7, "ready\n")


def test_what_is_said_last_is_in_the_log(means, make_sandbox, tmp_path):
    """The copy reads nothing before the command has ended."""
    loop = "        while child.poll() is None and not broken:\n"
    sandbox = make_sandbox(means, altered(tmp_path, (loop, f"        child.wait()\n{loop}")))
    done = sandbox.run("sh", "-c", "head -c 60000 /dev/zero | tr '\\0' x; exit 7")
    assert (done.status, len(done.log)) == (7, 60000)


# ---------------------------------------------------------------------------
# Limits
# ---------------------------------------------------------------------------


def test_a_flood_of_output_is_capped(sandbox):
    code = "for _ in range(300): os.write(1, b'x' * 99_999 + b'\\n')\nsys.exit(7)"
    done = sandbox.python(code)
    assert done.status == 7
    assert done.log.startswith("x" * 99_999) and "the log ends here" in done.log[-60:]
    assert warden.LOG_BYTES <= (sandbox.folder / "log").stat().st_size < warden.LOG_BYTES + 100


def test_an_endless_flood_of_output_ends_at_the_limit(sandbox):
    done = sandbox.run("yes", options=["--seconds", "0.5"])
    assert (done.status, done.error) == (124, "ended by a limit: wall clock: 0.5 s\n")
    assert (sandbox.folder / "log").stat().st_size < warden.LOG_BYTES + 100


def test_too_many_threads_cannot_be_started_or_end_the_run(means, make_sandbox, tmp_path):
    """The kernel refuses them to a user of the run's own, as root's runs have one.

    Under bubblewrap its own two processes count too, so that the supervisor may be as quick.
    """
    few = ("PROCESSES = 400 + 8 * (os.cpu_count() or 1)", "PROCESSES = 200")
    sandbox = make_sandbox(means, altered(tmp_path, few))
    code = """
import threading
threading.stack_size(2**18)
try:
    for _ in range(300): threading.Thread(target=live, daemon=True).start()
except RuntimeError:
    say("refused")
    os._exit(7)
live()
"""
    done = sandbox.python(code, options=["--seconds", WAIT_SECONDS])
    refused = done.status == 7 and done.log == "refused\n"
    ended = done.status == 124 and "ended by a limit: processes: " in done.error
    # For an ordinary user his other processes count too, or not, depending on the means.
    assert refused or ended and (means == "bubblewrap" or not IS_ROOT), done


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
def test_too_much_on_the_disk_ends_the_run(some_means, make_sandbox, tmp_path, attack):
    sandbox = make_sandbox(some_means, altered(tmp_path, SMALL_DISK))
    code, reason = ON_THE_DISK[attack]
    done = sandbox.python(code + "\nlive()", options=["--seconds", WAIT_SECONDS])
    assert done.status == 124
    assert "ended by a limit: disk: " in done.error and reason in done.error


def test_one_huge_file_stops_at_the_limit(some_means, make_sandbox, tmp_path):
    sandbox = make_sandbox(some_means, altered(tmp_path, SMALL_DISK))
    code = """
end = os.open("huge", os.O_WRONLY | os.O_CREAT)
attempt("write", lambda: [os.write(end, bytes(2**18)) for _ in range(100)])
said["size"] = os.fstat(end).st_size
answer()
"""
    assert sandbox.python(code).said == {"write": "EFBIG", "size": MIB}


@pytest.mark.parametrize("attack", [
    "os.mkdir('a'); os.chdir('a')\nfor i in range(1200): os.mkdir('x'); os.chdir('x')",
    "os.mkdir('closed'); open('closed/file', 'w').close()\nattempt('', lambda: "
    "os.chmod('closed', 0))",
    "open(b'\\xff\\n', 'w').close(); os.symlink('/', 'root'); os.symlink('nowhere', 'dangling')",
    "os.rmdir('tmp'); os.symlink(facts['outside'], 'tmp')",
    "attempt('', lambda: os.rmdir('tmp'))\nattempt('', lambda: os.rmdir(os.getcwd()))",
], ids=["deep", "closed", "odd names", "a link out", "empty"])  # fmt: skip
def test_the_fresh_folder_is_gone_afterwards(sandbox, neighbour, attack):
    before = snapshot(neighbour)
    done = sandbox.python(attack + "\nsys.exit(7)", {"outside": neighbour})
    assert done.status == 7 or "disk" in done.error  # what is closed may count as too much
    assert sorted(path.name for path in sandbox.folder.iterdir()) == ["log"]
    assert snapshot(neighbour) == before


FREE = "shutil.disk_usage(work).free"


def exchange(path, text):
    """Write a file so that whoever reads it sees the old text or the new one, never a part."""
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def test_too_little_free_space_ends_the_run(some_means, make_sandbox, tmp_path):
    """The free space of the file system is made up: 2 GiB, then half a GiB."""
    free, looks = tmp_path / "free", tmp_path / "looks"
    exchange(free, str(2**31))
    made_up = f"int(Path({str(free)!r}).read_text())"
    program = altered(tmp_path, (FREE, f"(open({str(looks)!r}, 'a').write('x') and {made_up})"))
    sandbox = make_sandbox(some_means, program)
    run = sandbox.start_python("live()", options=["--seconds", WAIT_SECONDS])
    await_looks(looks, run, 2)
    exchange(free, str(2**29))
    done = sandbox.finish()
    assert done.status == 124 and warden.DISK_IS_FULL in done.error


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own of 64 MiB, so that what else fills a disk does not matter."""
    if not IS_ROOT:
        pytest.skip("only root can mount a file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=64m,mode=777", "tmpfs"]
    subprocess.run(["mount", *options, str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_growing_file_without_a_name_ends_with_the_free_space(
    some_means, small_disk, make_sandbox, tmp_path
):
    looks = tmp_path / "looks"
    floor = ("DISK_FLOOR = 2**30", f"DISK_FLOOR = {32 * MIB}")
    record = (FREE, f"(open({str(looks)!r}, 'a').write('x') and {FREE})")
    program = altered(tmp_path, floor, record)
    sandbox = make_sandbox(some_means, program, small_disk)
    code = f"""
file = os.open("grows", os.O_RDWR | os.O_CREAT)
os.unlink("grows")
os.posix_fallocate(file, 0, {16 * MIB})
say("held so far")
hold()
os.posix_fallocate(file, 0, {48 * MIB})
live()
"""
    run = sandbox.start_python(code, options=["--seconds", WAIT_SECONDS])
    run.await_word("held so far")
    await_looks(looks, run, 2)
    run.let_go()
    done = sandbox.finish()
    assert done.status == 124 and warden.DISK_IS_FULL in done.error


def made_up_memory(path, mebibytes=10_240):
    """Return the changes by which a copy reads a made-up /proc/meminfo, and gives a run 256 MiB."""
    exchange(path, f"MemAvailable: {mebibytes * 1024} kB\n")
    return (
        ('Path("/proc/meminfo")', f"Path({str(path)!r})"),
        ("MEMORY_SHARE = 0.9", f"MEMORY_SHARE = {256 / mebibytes}"),
    )


# 2 pieces of 64 MiB each are fewer than a run may have, 6 are more.
HOLD_MEMORY = """
import mmap
held, size, flags = [], 64 * 2**20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
def map_memory():
    held.append(mmap.mmap(-1, size, flags=flags))
def hold_memory():
    HOW
for _ in range(2): hold_memory()
say("held so far")
hold()
for _ in range(4): hold_memory()
live()
"""
IN_CHILDREN = """
    reading, writing = os.pipe()
    if os.fork() == 0: map_memory(); os.write(writing, b"x"); live()
    os.read(reading, 1)"""
WAYS_TO_HOLD = {
    "mapped": "map_memory()",
    "in children": IN_CHILDREN,
    "in memfds": "os.posix_fallocate(os.memfd_create('x'), 0, size)",
}


@pytest.mark.parametrize("whose", ["the machine's", "a slot's"])
@pytest.mark.parametrize("how", ["mapped", "in children"])
def test_too_much_memory_ends_the_run(some_means, make_sandbox, tmp_path, how, whose):
    looks = tmp_path / "looks"
    changes, options = [limits_looked_at(looks)], ["--seconds", WAIT_SECONDS]
    if whose == "a slot's":
        options += ["--memory", "0.25"]
    else:
        changes += made_up_memory(tmp_path / "meminfo")
    sandbox = make_sandbox(some_means, altered(tmp_path, *changes))
    run = sandbox.start_python(HOLD_MEMORY.replace("HOW", WAYS_TO_HOLD[how]), options=options)
    run.await_word("held so far")
    await_looks(looks, run, 3)
    run.let_go()
    done = sandbox.finish()
    assert done.status == 124 and "ended by a limit: memory: " in done.error
    assert ("the share of one of the runs" in done.error) == (whose == "a slot's")


def test_memory_that_no_process_shows_ends_the_run(some_means, make_sandbox, tmp_path):
    """What is available on the machine falls by more than the run may have."""
    looks, path = tmp_path / "looks", tmp_path / "meminfo"
    changes = [limits_looked_at(looks), *made_up_memory(path)]
    sandbox = make_sandbox(some_means, altered(tmp_path, *changes))
    run = sandbox.start_python("live()", options=["--seconds", WAIT_SECONDS])
    await_looks(looks, run, 2)
    made_up_memory(path, 10_240 - 200)
    await_looks(looks, run, 2)
    made_up_memory(path, 10_240 - 300)
    done = sandbox.finish()
    assert done.status == 124 and "ended by a limit: memory: " in done.error


@pytest.mark.alone
def test_memory_in_files_without_a_name_counts_for_the_machine(some_means, make_sandbox, tmp_path):
    """The machine's own account is read here, which neighbours change too."""
    available = warden.memory_available()
    if available < 2048 * MIB:
        pytest.skip(f"only {available / MIB:.0f} MiB of memory are available")
    looks = tmp_path / "looks"
    share = ("MEMORY_SHARE = 0.9", f"MEMORY_SHARE = {1024 * MIB / available}")
    sandbox = make_sandbox(some_means, altered(tmp_path, limits_looked_at(looks), share))
    code = HOLD_MEMORY.replace("HOW", WAYS_TO_HOLD["in memfds"]).replace("range(4)", "range(24)")
    run = sandbox.start_python(code, options=["--seconds", WAIT_SECONDS])
    run.await_word("held so far")
    await_looks(looks, run, 2)
    run.let_go()
    done = sandbox.finish()
    assert done.status == 124 and "ended by a limit: memory: " in done.error


# Each process that burns says how much processor time it has had.
BURN = """
def burn(seconds):
    start = time.process_time()
    while time.process_time() < start + seconds:
        pass

def burn_and_exit(seconds):
    burn(seconds)
    say(f"burned {time.process_time()}")
    os._exit(0)

say(f"started {time.process_time()}")
hold()
start = time.process_time()
reading, writing = os.pipe()
HOW
os.close(writing)
os.read(reading, 1)  # until all that could write are gone
say(f"burned {time.process_time() - start}")
say("finished")
live()
"""
BURNERS = {
    "itself": "burn(0.6)",
    "a child nobody waits for": "if os.fork() == 0: burn_and_exit(0.6)",
    "a child that ends without a signal":
        "clone = 56 if os.uname().machine == 'x86_64' else 220\n"
        "if libc.syscall(clone, 0, 0, 0, 0, 0) == 0: burn_and_exit(0.6)",
    "a daemon": "daemon(lambda: burn_and_exit(0.6))",
    "many short children": "for _ in range(12):\n"
                           "    if os.fork() == 0: burn_and_exit(0.05)\n"
                           "    os.wait()",
}  # fmt: skip


@pytest.mark.parametrize("who", BURNERS)
def test_a_byte_on_stdin_is_answered_by_cpu_seconds(sandbox, who):
    """They agree with what the processes have measured: nothing is missed or counted twice."""
    run = sandbox.start_python(BURN.replace("HOW", BURNERS[who]))

    def cpu_seconds():
        run.process.stdin.write(b"?")
        run.process.stdin.flush()
        return float(run.process.stdout.readline())

    def said(word):
        return sum(float(line.split()[1]) for line in run.output().splitlines() if word in line)

    run.await_word("started")
    before = cpu_seconds()
    assert said("started") - 0.05 <= before < said("started") + 0.5
    run.let_go()
    run.await_word("finished")
    used = cpu_seconds() - before
    assert said("burned") >= 0.6
    assert 0.9 * said("burned") <= used < 1.5 * said("burned")
    run.process.stdin.close()
    assert sandbox.finish().status == 124
