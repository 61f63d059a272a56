"""The referee as a process: it stands by, hands train.py over, screens.

What it measures is in test_prepare.py, what it withstands in test_red_team.py and test_honest.py,
and its probe in test_probe.py.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import prepare
import referee
from support.checkout import ROOT, TOY, sh
from support.in_process import TINY_SCALE, prepared_rows, referee_in_process
from support.waiting import PATIENCE_SECONDS, wait_until


@pytest.mark.parametrize(
    "lines, found",
    [
        ('os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")', {"OMP_WAIT_POLICY": "ACTIVE"}),
        ('os.environ["OMP_NUM_THREADS"] = "3"', {"OMP_NUM_THREADS": "3"}),
        ('os.environ["OMP_A"] = "1"\nos.environ.setdefault("OMP_A", "2")', {"OMP_A": "1"}),
        ('os.environ["LD_PRELOAD"] = "x.so"\nprint(os.environ.get("HOME"))', {}),
        ('os.environ["OMP_NUM_THREADS"] = str(3)', None),
        ('if True:\n    os.environ["OMP_NUM_THREADS"] = "3"', None),
        ('os.environ |= {"OMP_NUM_THREADS": "3"}', None),
        ('from os import environ\nenviron["OMP_NUM_THREADS"] = "3"', None),
        ('os.putenv("OMP_NUM_THREADS", "3")', None),
        (f'os.environ["OMP_NOTE"] = "{"x" * 200_000}"', None),
        (r'os.environ["OMP_NOTE"] = "\0"', None),
        ("def broken(", {}),
    ],
)
def test_what_a_program_sets_before_it_loads_torch_is_found_or_said_to_be_unclear(
    lines, found, monkeypatch
):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)  # train.py sets it, where it is imported
    assert referee.early_environment(f"import os\n{lines}\n".encode()) == found


def fields(pid):
    """Return the fields of /proc/PID/stat from the state on, [] if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


class StandingBy:
    """A referee that waits, with what its process group shows of it."""

    def __init__(self, checkout, rows, like):
        self.folder = checkout.folder / "runs/t"
        self.env = checkout.env | {"AUTORESEARCH_ROWS": str(rows)}
        (self.folder / "standby").mkdir(parents=True)
        command = [sys.executable, "referee.py", self.folder / "standby", "--wait", like]
        self.process = subprocess.Popen(
            list(map(str, command)), cwd=checkout.folder, env=self.env, encoding="utf-8",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def in_the_sandbox(self):
        """Return the process numbers of those whose folder is the throw-away one."""
        found = []
        for link in Path("/proc").glob("[0-9]*/cwd"):
            try:
                if self.folder / "standby" in link.readlink().parents:
                    found.append(int(link.parent.name))
            except OSError:
                continue
        return found

    def warm(self):
        """Return the process in the sandbox that has loaded torch, 0 if there is none yet."""
        for pid in self.in_the_sandbox():
            try:
                if "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text():
                    return pid
            except OSError:
                continue
        return 0

    def await_warm(self):
        return wait_until(self.warm, self.process)

    def children(self):
        """Return the processes that the referee has started and that have not ended."""
        of_all = {pid: fields(pid) for pid in filter(str.isdigit, os.listdir("/proc"))}
        ours = {pid: each for pid, each in of_all.items() if each[1:2] == [str(self.process.pid)]}
        return [pid for pid, each in ours.items() if each[0] != "Z"]

    def run(self, number, source, *words):
        """Hand train.py over; return result.json and run.log."""
        folder = self.folder / f"{number}"
        folder.mkdir()
        (folder / "train.py").write_text(source)
        self.process.stdin.write(json.dumps([str(folder), "--seed", "5", *words]) + "\n")
        self.process.stdin.flush()  # and it stays open, or the run would be ended
        assert self.process.wait(PATIENCE_SECONDS) == 0, self.process.stderr.read()
        return json.loads((folder / "result.json").read_text()), (folder / "run.log").read_text()


SEEDED = "    torch.manual_seed("
TELL = """\
    print("threads", torch.get_num_threads(), os.environ["AUTORESEARCH_SEED"])
    print("started", open("/proc/self/stat").read().rpartition(")")[2].split()[19])
"""
TELLS = "import os\n" + TOY.replace(SEEDED, TELL + SEEDED)


def started(log):
    """Return when the process that ran train.py had started, in ticks since the machine did."""
    return re.search(r"started (\d+)", log)[1]


@pytest.fixture
def standing_by(checkout, cache):
    """Start referees that wait for a program like the one named; nothing is left of them."""
    waiting = []

    def start(like):
        path = checkout.folder / "like.py"
        path.write_text(like)
        waiting.append(StandingBy(checkout, prepared_rows(cache, TINY_SCALE), path))
        return waiting[-1]

    yield start
    for each in waiting:
        each.process.stdin.close()
        each.process.wait(PATIENCE_SECONDS)
        assert not each.in_the_sandbox()


@pytest.mark.parametrize("setting", [
    pytest.param('"1"', id="plain", marks=pytest.mark.gate),
    pytest.param("str(1)", id="computed", marks=pytest.mark.nightly),
])  # fmt: skip
def test_what_stands_by_takes_over_only_what_is_loaded_as_that_program_says(standing_by, setting):
    """torch reads OMP_NUM_THREADS when it is loaded: too late for a process that waits."""
    waiting = standing_by(TELLS)
    then = fields(waiting.await_warm())[19]
    ours = f'import os\n\nos.environ["OMP_NUM_THREADS"] = {setting}\n' + TELLS
    result, log = waiting.run(1, ours)
    assert result["status"] == "ok", result
    threads, seed = re.search(r"threads (\d+) (\d+)", log).groups()
    assert (threads, seed) == ("1", "5") and started(log) != then


def test_what_stands_by_is_the_process_that_trains_and_scores_the_same(
    standing_by, checkout, cache
):
    waiting = standing_by(TELLS)
    then = fields(waiting.await_warm())[19]
    result, log = waiting.run(1, TELLS)
    assert started(log) == then
    assert 'File "' not in log and not list((checkout.folder / "runs/t/standby").iterdir())
    rows = prepared_rows(cache, TINY_SCALE)
    budget = {"AUTORESEARCH_BUDGET_TOKENS": checkout.env["AUTORESEARCH_BUDGET_TOKENS"]}
    cold, _ = referee_in_process(checkout, rows, TELLS, "--seed", 5, env=budget)
    assert result["status"] == "ok" and result["val_bpb"] == cold["val_bpb"]


@pytest.mark.gate
def test_what_stands_by_and_dies_is_replaced_and_blamed_on_nobody(standing_by):
    waiting = standing_by(TELLS)
    pid = waiting.await_warm()
    then = fields(pid)[19]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not waiting.children(), waiting.process)  # its supervisor has seen it
    result, log = waiting.run(1, TELLS)
    assert result["status"] == "ok" and started(log) != then, result


@pytest.mark.gate
def test_what_was_loaded_from_another_trusted_file_does_not_run(standing_by, checkout):
    """Though it is back in its place by the time of the run, as after `git checkout x; ... -`."""
    path = checkout.folder / "prepare.py"
    right, hashed = path.read_text(), "import prepare; print(prepare.trusted_hash())"
    wanted = sh(sys.executable, "-c", hashed, cwd=checkout.folder, env=checkout.env).stdout.strip()
    path.write_text(right + "# another\n")
    waiting = standing_by(TOY)
    waiting.await_warm()
    path.write_text(right)
    with pytest.raises(AssertionError, match="trusted file changed while a run was made ready"):
        waiting.run(1, TOY, "--trusted", wanted)
    assert not (waiting.folder / "1/result.json").exists()


@pytest.mark.gate
def test_it_leaves_nobody_when_it_is_not_needed(standing_by):
    waiting = standing_by(TELLS)
    waiting.await_warm()
    waiting.process.stdin.close()
    assert waiting.process.wait(PATIENCE_SECONDS) == 130
    assert not waiting.in_the_sandbox()


# ---------------------------------------------------------------------------
# Screening
# ---------------------------------------------------------------------------


def screen(tmp_path, environment, source, **more):
    """Return result.json of two steps of the real train.py with edits made."""
    (tmp_path / "train.py").write_text(source)
    facts = json.loads(sh(sys.executable, "prepare.py", cwd=ROOT, env=environment).stdout)
    env = environment | {"AUTORESEARCH_ROWS": facts["rows"], **more}
    env |= {"AUTORESEARCH_BUDGET_TOKENS": "4300", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.Popen(
        [sys.executable, "referee.py", str(tmp_path), "--screen"], cwd=ROOT, env=env,
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.wait() == 0
    return json.loads((tmp_path / "result.json").read_text())


REAL = (ROOT / "train.py").read_text(encoding="utf-8")
ROWS_A_PASS = 'DEVICE_BATCH_SIZE = {"cpu": 32, "gpu": '
UNEVEN = REAL.replace(f"{ROWS_A_PASS}32", f"{ROWS_A_PASS}48")
SCHEDULED = "        set_schedules("
ACTS_LATE = REAL.replace(SCHEDULED, f"        late = progress > 0.8\n{SCHEDULED}")
ACTS_LATE = ACTS_LATE.replace("    return step\n", "    assert late\n    return step\n")
assert "    assert late" in ACTS_LATE
WIDE_GATE = REAL.replace("x[..., :VALUE_GATE_CHANNELS]", "x[..., : VALUE_GATE_CHANNELS + 1]")


@pytest.mark.parametrize(
    "source, reason",
    [
        pytest.param(ACTS_LATE, "", id="acts late", marks=pytest.mark.gate),
        pytest.param(UNEVEN, "not whole passes of 48 rows", id="uneven at another scale",
                     marks=pytest.mark.gate),
        pytest.param(WIDE_GATE, "RuntimeError: mat1 and mat2 shapes", id="shapes",
                     marks=pytest.mark.nightly),
        pytest.param(REAL.replace("model = build_model()", "model = build_modl()"), "NameError",
                     id="a name", marks=pytest.mark.nightly),
        pytest.param(REAL, "", id="the best", marks=pytest.mark.nightly),
    ],
)  # fmt: skip
def test_what_fails_within_two_steps_is_told_apart(tmp_path, cpu_rows, source, reason):
    result = screen(tmp_path, cpu_rows, source, AUTORESEARCH_IMPORT="gpu")
    assert (result["status"] == "ok") == (not reason) and reason in result["reason"], result
    assert reason or result["num_steps"] == 2


def test_a_busy_machine_may_answer_unevenly_but_not_train_meanwhile():
    def check_pace(*taken):
        referee.Confined.check_pace(SimpleNamespace(taken=taken, slack=1.3))

    check_pace(*[0.06, 0.07, 0.08, 0.13] * 16)  # 1.4 s over the median, measured
    check_pace(*[0.07] * 60, 0.7, 0.8)
    with pytest.raises(prepare.Crash, match="trained on while answering"):
        check_pace(*[0.07] * 60, 0.7, 0.9)
