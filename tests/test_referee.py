"""The referee as a process: it stands by, hands train.py over, screens.

What it measures is in test_prepare.py, what it withstands in test_red_team.py and test_honest.py.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import prepare
import referee
from support.checkout import ROOT, TOY, sh


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


class StandingBy:
    """A referee that waits, with what its process group shows of it."""

    def __init__(self, checkout, like):
        facts = sh(sys.executable, "prepare.py", cwd=checkout.folder, env=checkout.env)
        self.folder, self.env = checkout.folder / "runs/t", checkout.env
        self.env |= {"AUTORESEARCH_ROWS": json.loads(facts.stdout)["rows"]}
        (self.folder / "standby").mkdir(parents=True)
        command = [sys.executable, "referee.py", self.folder / "standby", "--wait", like]
        self.process = subprocess.Popen(
            list(map(str, command)), cwd=checkout.folder, env=self.env, encoding="utf-8",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def in_the_cage(self):
        """Process numbers of those whose folder is the throw-away one."""
        found = []
        for link in Path("/proc").glob("[0-9]*/cwd"):
            try:
                if self.folder / "standby" in link.readlink().parents:
                    found.append(int(link.parent.name))
            except OSError:
                continue
        return found

    def await_warm(self):
        """Until torch is loaded in the cage."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for pid in self.in_the_cage():
                if "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text():
                    return pid
            time.sleep(0.05)
        raise AssertionError(self.process.stderr.read())

    def run(self, number, source, *words):
        """Hand train.py over; result.json and run.log."""
        folder = self.folder / f"{number}"
        folder.mkdir()
        (folder / "train.py").write_text(source)
        self.process.stdin.write(json.dumps([str(folder), "--seed", "5", *words]) + "\n")
        self.process.stdin.flush()
        while self.process.poll() is None:  # its stdin stays open, or the run would be ended
            time.sleep(0.05)
        assert self.process.returncode == 0, self.process.stderr.read()
        return json.loads((folder / "result.json").read_text()), (folder / "run.log").read_text()


SEEDED = "    torch.manual_seed("
TELL = 'print("threads", torch.get_num_threads(), os.environ["AUTORESEARCH_SEED"], os.getpid())'
TELLS = TOY.replace(SEEDED, f"    {TELL}\n{SEEDED}")


@pytest.fixture
def standing_by(checkout):
    started = []

    def start(like):
        path = checkout.folder / "like.py"
        path.write_text(like)
        started.append(StandingBy(checkout, path))
        return started[-1]

    yield start
    for each in started:
        each.process.stdin.close()
        each.process.wait(timeout=30)
        assert not each.in_the_cage()


@pytest.mark.parametrize("setting", ['"1"', "str(1)"], ids=["plain", "computed"])
def test_what_stands_by_takes_over_only_what_is_loaded_as_that_program_says(standing_by, setting):
    """torch reads OMP_NUM_THREADS when it is loaded: too late for a process that waits."""
    waiting = standing_by("import os\n" + TELLS)
    waiting.await_warm()
    ours = f'import os\n\nos.environ["OMP_NUM_THREADS"] = {setting}\n' + TELLS
    result, log = waiting.run(1, ours)
    assert result["status"] == "ok", result
    threads, seed = re.search(r"threads (\d+) (\d+)", log).groups()
    assert (threads, seed) == ("1", "5")


def test_what_stands_by_is_the_process_that_trains_and_scores_the_same(standing_by, checkout):
    waiting = standing_by("import os\n" + TELLS)
    waiting.await_warm()
    (checkout.folder / "runs/t/by-hand").mkdir()
    (checkout.folder / "runs/t/by-hand/train.py").write_text("import os\n" + TELLS)
    began = time.monotonic()
    result, log = waiting.run(1, "import os\n" + TELLS)
    warm = time.monotonic() - began
    began = time.monotonic()
    cold = subprocess.Popen(
        [sys.executable, "referee.py", "runs/t/by-hand", "--seed", "5"],
        cwd=checkout.folder, env=waiting.env, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    assert cold.wait() == 0
    print(f"{warm:.1f} s warm, {time.monotonic() - began:.1f} s cold")
    by_hand = json.loads((checkout.folder / "runs/t/by-hand/result.json").read_text())
    assert result["val_bpb"] == by_hand["val_bpb"]
    assert 'File "' not in log and not list((checkout.folder / "runs/t/standby").iterdir())


def test_what_stands_by_and_dies_is_replaced_and_blamed_on_nobody(standing_by):
    waiting = standing_by("import os\n" + TELLS)
    os.kill(waiting.await_warm(), signal.SIGKILL)
    result, _ = waiting.run(1, "import os\n" + TELLS)
    assert result["status"] == "ok", result


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


def test_it_leaves_nobody_when_it_is_not_needed(standing_by):
    waiting = standing_by("import os\n" + TELLS)
    waiting.await_warm()
    waiting.process.stdin.close()
    assert waiting.process.wait(timeout=30) == 130
    assert not waiting.in_the_cage()


# ---------------------------------------------------------------------------
# Screening
# ---------------------------------------------------------------------------


def screen(tmp_path, environment, source, **more):
    """result.json of two steps of the real train.py with edits made."""
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
        (REAL, ""),
        (ACTS_LATE, ""),
        (UNEVEN, "not whole passes of 48 rows"),
        (WIDE_GATE, "RuntimeError: mat1 and mat2 shapes"),
        (REAL.replace("model = build_model()", "model = build_modl()"), "NameError"),
    ],
    ids=["the best", "acts late", "uneven at another scale", "shapes", "a name"],
)
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
