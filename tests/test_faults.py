"""Kill agent.py, damage its files and refs, commit on its branch: the real program and real git.

    pytest -m "not nightly" tests/test_faults.py    # half of the points at which it is killed
    pytest -m nightly tests/test_faults.py          # the other half, and instants by chance

Where the referee is not what is tested, a stand-in that measures nothing takes its place.
"""

import copy
import fcntl
import glob
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, example, given, settings

import agent
import journal
import slots
from support.checkout import PROGRAM, TOY, TRUSTED, Checkout, sh
from support.checks import one_error, statuses
from support.stand_in import (
    idea,
    kill_and_wait,
    let_go,
    sharpness,
    stand_in,
    start_agent,
    while_training,
    without_self_test,
)
from support.waiting import wait_until


def final_state(checkout):
    """Return what must not depend on how often the program was killed.

    Hashes of commits are left out, because a commit has a date.
    """
    names = ("status", "val_bpb", "description", "experiment", "runs")
    rows = [tuple(row[name] for name in names) for row in checkout.rows()]
    refs = sorted(checkout.refs(), key=lambda ref: int(ref.rpartition("/")[2]))
    trees = [checkout.git("rev-parse", f"{ref}:train.py") for ref in refs]
    kept = checkout.git("log", "--format=%s", "main..autoresearch/t").splitlines()
    assert checkout.git("fsck", "--no-dangling") == ""
    tried = [row for row in checkout.rows() if row["status"] != "measure"]
    assert [row["commit"] for row in tried if row["experiment"] != "0"] == [
        checkout.git("rev-parse", "--short=7", ref) for ref in refs
    ]
    return rows, refs, trees, kept


# ---------------------------------------------------------------------------
# Kills
# ---------------------------------------------------------------------------

# 12 candidates: keeps, discards, and one that needs a second training run.
SHARPNESSES = (0.6, 0.4, 0.65, 0.3, 0.75, 0.76, 0.2, 0.85, 0.1, 0.9, 0.05, 0.95)
KILLS = 20


@pytest.mark.nightly
@pytest.mark.parametrize("referee", ["the referee", "a stand-in"])
def test_killed_at_instants_by_chance_it_ends_in_the_same_state(tmp_path, cache, referee):
    """The instants are spread over the seconds that the same command takes when left in peace."""
    choose, kills, most, states = random.Random(3), 0, 0.0, []
    values = (0.6, 0.4, 0.8) if referee == "the referee" else SHARPNESSES
    while kills < KILLS:
        folder = tmp_path / f"{len(states)}"
        folder.mkdir()
        checkout = Checkout(folder / "checkout", cache)
        if referee == "a stand-in":
            stand_in(checkout, "time.sleep(0.3)")  # so that a kill may fall into training
        command = ["--patches", *sharpness(checkout, *values)]
        while states and kills < KILLS:  # the first checkout is left in peace
            started = start_agent(checkout, *command)
            try:
                started.communicate(timeout=choose.uniform(0.0, most))
            except subprocess.TimeoutExpired:
                started.kill()
                said = started.communicate()[1]
                assert started.returncode in (0, -signal.SIGKILL), said
            if started.returncode == 0:
                break
            kills += 1
        before = time.monotonic()
        done = checkout.agent("--tag", "t", *command, timeout=1000)
        assert done.returncode == 0, done.stderr
        most = most or time.monotonic() - before
        states.append(final_state(checkout))
        assert states[-1] == states[0]
    assert {row[0] for row in states[0][0]} >= {"keep", "discard"}
    print(f"{kills} kills in {len(states) - 1} checkouts, {referee}")


@pytest.mark.gate
def test_killed_while_the_real_referee_trains_it_ends_in_the_same_state(checkout):
    command = ["--patches", *sharpness(checkout, 0.6)]
    started = while_training(checkout, 1, *command)
    wait_until(lambda: "step" in (checkout.folder / "runs/t/1/run.log").read_text(), started)
    kill_and_wait(started)
    done = checkout.agent("--tag", "t", *command)
    assert done.returncode == 0, done.stderr
    rows, refs, _, kept = final_state(checkout)
    assert [(row[0], row[3], row[4]) for row in rows] == [("keep", "0", "1"), ("keep", "1", "1")]
    assert refs == ["refs/autoresearch/t/1"] and kept == ["0.6.py"]


# Starts agent.py with a kill before or after the n-th call of a function that writes.
KILLER = """\
import os, signal, sys
sys.argv, (place, name, when, count) = ["agent.py", *sys.argv[5:]], sys.argv[1:5]
sys.path.insert(0, os.getcwd())
import agent, journal, slots
module, left = sys.modules[place], [int(count)]
inner = getattr(module, name)

def outer(*arguments, **more):
    left[0] -= 1
    here = left[0] == 0  # other threads count on
    if here and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = inner(*arguments, **more)
    if here and when == "after":
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(module, name, outer)
sys.exit(agent.main())
"""
# Calls, by number, of the functions that write in these three experiments.
CALLS = [
    (place, name, count)
    for place, name, counts in (
        ("agent", "write_atomic", (1, 3, 4, 5)),
        ("slots", "write_atomic", (1, 2, 3, 5, 9)),
        ("agent", "write_commit", (2,)),
        ("agent", "move_refs", (1, 2, 3)),
        ("agent", "sync_git", (3, 4)),
        ("agent", "append_rows", (1, 2)),
        ("agent", "show_result", (2,)),
        ("journal", "git", (13, 20)),
    )
    for count in counts
]
ALWAYS = ("move_refs-after-3", "append_rows-after-2")


def kill_points():
    """Give the points before and after each call: in turn one for the gate and one nightly."""
    for number, (place, name, count) in enumerate(CALLS):
        for turn, when in enumerate(("after", "before")):
            mark = [pytest.mark.gate, pytest.mark.nightly][(number + turn) % 2]
            always = f"{name}-{when}-{count}" in ALWAYS
            point = (place, name, when, str(count))
            yield pytest.param(point, marks=() if always else mark, id="-".join(point))


@pytest.mark.parametrize("point", list(kill_points()))
def test_killed_between_two_writes_it_ends_in_the_same_state(quick, point):
    """A keep, one confirmed on a seed that the best is run on too, and a discard."""
    command = ["--tag", "t", "--patches", *map(str, sharpness(quick, 0.6, 0.63, 0.4))]
    killed = sh(sys.executable, "-c", KILLER, *point, *command, cwd=quick.folder, env=quick.env,
                timeout=600)  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = quick.agent(*command)
    assert done.returncode == 0, done.stderr
    rows, refs, trees, kept = final_state(quick)
    assert [row[0] for row in rows] == ["keep", "keep", "measure", "keep", "discard"]
    assert len(refs) == 3 and len(set(trees)) == 3 and len(kept) == 2


def leave_behind(checkout, number):
    """Start a process that lives in a work folder of the run, as one of a killed agent.py does."""
    home = checkout.folder / f"runs/t/0/work-{number}"
    home.mkdir(parents=True)
    return subprocess.Popen(["sleep", "infinity"], cwd=home)


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.gate)])
def test_a_run_that_is_left_behind_and_cannot_be_ended_is_named_with_the_command(quick, count):
    """No running.json names these processes, so that agent.py does not end them itself."""
    quick.exchange("slots.py", r"deadline = time.monotonic\(\) \+ 30",
                   "deadline = time.monotonic() + 0.1")  # fmt: skip
    quick.commit_all()
    left = [leave_behind(quick, number) for number in range(count)]
    try:
        done = quick.agent("--tag", "t", "--experiments", "0")
        said = one_error(done)
        assert done.returncode == 1 and said.startswith("an earlier run is still alive: processes ")
        assert sorted(map(int, re.findall(r"\d+", said))) == [process.pid for process in left]
        hint = done.stderr.splitlines()[-1].removeprefix("hint: ")
        assert re.fullmatch(r"kill -9 \d+( \d+)*", hint)
        assert sorted(map(int, hint.split()[2:])) == [process.pid for process in left]
        subprocess.run(shlex.split(hint), check=True)
        assert [process.wait() for process in left] == [-signal.SIGKILL] * count
        assert quick.agent("--tag", "t", "--experiments", "0").returncode == 0
    finally:
        for process in left:
            process.kill()


# ---------------------------------------------------------------------------
# A person's commits on the branch, while a run is going on
# ---------------------------------------------------------------------------


def commit_on_branch(checkout, **constants):
    """Make a person's own commit on the run's branch: train.py with other constants."""
    name, beside = "autoresearch/t", checkout.folder.parent / "beside"
    checkout.git("worktree", "add", "-q", str(beside), name)
    source = (beside / "train.py").read_text(encoding="utf-8")
    for constant, value in constants.items():
        source = re.sub(rf"{constant} = .*", f"{constant} = {value}", source)
    (beside / "train.py").write_text(source, encoding="utf-8")
    (beside / "notes.txt").write_text("mine", encoding="utf-8")
    for command in (["add", "-A"], ["commit", "-q", "-m", "my own idea"]):
        done = sh("git", "-c", "user.name=p", "-c", "user.email=p@x", *command, cwd=beside)
        assert done.returncode == 0, done.stderr
    checkout.git("worktree", "remove", str(beside))
    return checkout.git("rev-parse", name)


@pytest.mark.gate
def test_a_commit_that_is_withdrawn_while_it_is_measured_is_not_adopted(quick):
    stand_in(quick, "value == 0.52 and hold()")
    assert quick.agent("--tag", "t", "--experiments", "0").returncode == 0
    before = quick.git("rev-parse", "autoresearch/t")
    commit_on_branch(quick, SHARPNESS=0.52)
    started = while_training(quick, 1, "--patches", *sharpness(quick, 0.6))
    quick.git("branch", "-f", "autoresearch/t", before)
    let_go(quick)
    said = started.communicate()[1]
    assert started.returncode == 0 and "not adopted" in said, said
    assert [row["description"] for row in quick.rows()] == ["baseline", "0.6.py"]


@pytest.mark.gate
def test_a_commit_in_mid_run_has_the_winner_run_again_on_top_of_it(quick, api):
    stand_in(quick, "value == 0.7 and hold()")
    started = while_training(quick, 1, "--experiments", "2", env=api(idea(0.7)).env)
    mine = commit_on_branch(quick, PASSES=5)
    let_go(quick)
    said = started.communicate()[1]
    assert started.returncode == 0, said
    assert "once more, on top of the new best" in said
    assert statuses(quick) == ["keep", "keep", "keep"]
    assert quick.git("rev-parse", "autoresearch/t~1") == mine
    source = quick.git("show", "autoresearch/t:train.py")
    assert "SHARPNESS = 0.7" in source and "PASSES = 5" in source


@pytest.mark.gate
def test_a_proposal_that_was_paid_for_outlives_an_adoption_and_a_kill(quick, api):
    stand_in(quick, "(value == 0.7 or 'PASSES = 5' in source) and hold()")
    server = api(idea(0.7), idea(0.8))
    command = ("--experiments", "2")
    started = while_training(quick, 1, *command, env=server.env)
    commit_on_branch(quick, PASSES=5)
    wait_until((quick.folder / "runs/t/2/proposal.json").exists, started)
    kill_and_wait(started)
    kill_and_wait(while_training(quick, 3, *command))  # the adopted commit; no key is needed
    let_go(quick)
    done = quick.agent("--tag", "t", *command, env=server.env)
    assert done.returncode == 0, done.stderr
    told = [(row["experiment"], row["description"]) for row in quick.rows()[1:]]
    assert told == [("3", "my own idea"), ("1", "to 0.7")]
    assert len(server.requests) == 2 and (quick.folder / "runs/t/2/proposal.json").exists()
    assert "PASSES = 5" in quick.git("show", "autoresearch/t:train.py")


# Starts agent.py; somebody commits on the branch in the last moment before it is moved.
RACER = """\
import os, subprocess, sys
sys.path.insert(0, os.getcwd())
import agent
move_refs, race = agent.move_refs, sys.argv.pop(1)

def late(*moves):
    if len(moves) == 2 and "raced" not in globals():
        globals()["raced"] = subprocess.run(["sh", "-c", race], check=True)
    move_refs(*moves)

agent.move_refs = late
sys.exit(agent.main())
"""


@pytest.mark.gate
def test_a_commit_in_the_last_moment_has_the_winner_run_again_too(quick):
    assert quick.agent("--tag", "t", "--experiments", "0").returncode == 0
    race = (
        "tree=$(git rev-parse main^{tree}) && git update-ref refs/heads/autoresearch/t "
        "$(git -c user.name=p -c user.email=p@x commit-tree $tree -p main -m mine)"
    )
    command = ["--tag", "t", "--patches", *sharpness(quick, 0.6)]
    done = sh(sys.executable, "-c", RACER, race, *command, cwd=quick.folder, env=quick.env,
              timeout=600)  # fmt: skip
    assert done.returncode == 0 and "once more, on top" in done.stderr, done.stderr
    assert [row["description"] for row in quick.rows()] == ["baseline", "mine", "0.6.py"]
    assert quick.git("log", "--format=%s", "main..autoresearch/t").split() == ["0.6.py", "mine"]


@pytest.mark.gate
def test_runs_that_are_cleared_and_a_patch_that_goes_in_mid_run_do_not_end_the_loop(quick):
    stand_in(quick, "value == 0.6 and hold()")
    patches = sharpness(quick, 0.6, 0.4, 0.7)
    started = while_training(quick, 1, "--patches", *patches)
    patches[1].unlink()
    shutil.rmtree(quick.folder / "runs/t")
    let_go(quick)
    said = started.communicate()[1]
    assert started.returncode == 0 and "cannot be read" in said, said
    tried = [row["description"] for row in quick.rows() if row["status"] != "measure"]
    assert tried == ["baseline", "0.6.py", "0.7.py"]


# ---------------------------------------------------------------------------
# Between two calls
# ---------------------------------------------------------------------------

ROW = "abc1234 0.990000 1.0 keep something x 0 1 1.0 1.0 0".replace(" ", "\t")
# What may stand in results.tsv below its header.
NONSENSE = {
    "nan": ROW.replace("0.990000", "nan").encode() + b"\n",
    "below zero": ROW.replace("0.990000", "-1").encode() + b"\n",
    "a zero": ROW.replace("0.990000", "0.000000").encode() + b"\n",
    "CRLF": ROW.encode() + b"\r\n",
    "merge markers": b"<<<<<<< HEAD\n" + ROW.encode() + b"\n=======\n>>>>>>> x\n",
    "not text": b"\xff\xfe\x00\n",
    "a short line": b"abc\tdef\n\n",
    "the beginning of a note": b"2",
    "a torn last line": ROW.encode()[:40],
}
# Bytes, or (which of the run's rows, how many of its bytes): a row that a power cut has torn.
PIECES = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([*NONSENSE.values(), b"\n", b"\r\n", b"\t", "\u2028\x85".encode()]),
    st.tuples(st.integers(0, 2), st.integers(0, 120)),
)


def damage(checkout):
    """Return, by name, what may become of the run's files and refs between two calls."""
    runs, refs = checkout.folder / "runs/t", checkout.folder / ".git/refs/autoresearch/t"
    main = checkout.git("rev-parse", "main")
    return {
        "a foreign ref": lambda: checkout.git("update-ref", "refs/autoresearch/t/mine", main),
        "a ref that a power cut emptied": lambda: (refs / "3").write_bytes(b""),
        "a lock that nobody holds": lambda: (refs / "3.lock").write_bytes(b""),
        "half of running.json": lambda: (runs / "running.json").write_bytes(b'{"pid": 1'),
        "half of a proposal": lambda: (
            (runs / "3").mkdir(), (runs / "3/proposal.json").write_bytes(b'{"description": "x')),
        "another's proposal": lambda: (
            (runs / "3").mkdir(), (runs / "3/proposal.json").write_bytes(b'{"adopted": "x"}')),
        "no runs": lambda: shutil.rmtree(runs),
    }  # fmt: skip


class TestBetweenTwoCalls:
    """Each test begins with a copy of one checkout, in which 0.6 was kept and 0.4 discarded."""

    @pytest.fixture(scope="class")
    @classmethod
    def original(cls, tmp_path_factory, cache):
        checkout = Checkout(tmp_path_factory.mktemp("original") / "checkout", cache)
        stand_in(checkout)
        without_self_test(checkout)
        checkout.exchange("journal.py", r"\nLOCK_SECONDS = .*", "\nLOCK_SECONDS = 1.0")
        checkout.commit_all()
        done = checkout.agent("--tag", "t", "--patches", *sharpness(checkout, 0.6, 0.4))
        assert done.returncode == 0, done.stderr
        assert statuses(checkout) == ["keep", "keep", "discard"]
        return checkout

    @pytest.fixture
    def after_two(self, original, tmp_path):
        place = copy.copy(original)
        place.folder = tmp_path / "checkout"
        shutil.copytree(original.folder, place.folder, symlinks=True)
        return place

    @pytest.mark.gate
    @pytest.mark.parametrize("what", [
        "a foreign ref", "a ref that a power cut emptied", "a lock that nobody holds",
        "half of running.json", "half of a proposal", "another's proposal", "no runs",
    ])  # fmt: skip
    def test_what_is_damaged_between_two_calls_does_not_end_the_loop(self, after_two, what):
        damage(after_two)[what]()
        done = after_two.agent("--tag", "t", "--patches", *sharpness(after_two, 0.6, 0.4, 0.3))
        assert done.returncode == 0, done.stderr
        assert statuses(after_two) == ["keep", "keep", "discard", "discard"]
        assert [ref for ref in after_two.refs() if "mine" not in ref] == [
            f"refs/autoresearch/t/{number}" for number in (1, 2, 3)]  # fmt: skip

    def test_a_persons_commit_on_the_branch_is_adopted_even_if_it_is_worse(self, after_two):
        mine = commit_on_branch(after_two, SHARPNESS=0.52)
        command = ["--tag", "t", "--patches", *sharpness(after_two, 0.6, 0.4, 0.55)]
        done = after_two.agent(*command)
        assert done.returncode == 0, done.stderr
        assert "has a commit of yours, the new best: my own idea" in done.stderr
        rows = after_two.rows()
        told = [(row["experiment"], row["status"], row["description"]) for row in rows[3:]]
        again = ("3", "measure", "my own idea")  # on the second seed of what follows
        assert told == [("3", "keep", "my own idea"), again, ("4", "keep", "0.55.py")]
        assert rows[3]["commit"] == mine[:7]
        assert after_two.git("rev-parse", "autoresearch/t~1") == mine
        assert after_two.git("show", "autoresearch/t:notes.txt") == "mine"
        table = after_two.folder / "results.tsv"
        text = table.read_text(encoding="utf-8")
        edited = text.replace("\tbaseline\t", "\tbaseline, on a busy machine\t")
        table.write_text(edited, encoding="utf-8")
        assert edited != text and after_two.agent(*command).returncode == 0
        assert table.read_text(encoding="utf-8") == edited  # read back from git, nothing is new

    @pytest.mark.gate
    def test_a_branch_that_went_elsewhere_is_left_alone(self, after_two):
        after_two.git("commit", "-q", "--allow-empty", "-m", "elsewhere")
        after_two.git("branch", "-f", "autoresearch/t", "main")
        done = after_two.agent("--tag", "t", "--experiments", "3")
        assert done.returncode == 1 and "commits that are not of this run" in one_error(done)
        assert after_two.git("rev-parse", "autoresearch/t") == after_two.git("rev-parse", "main")

    @pytest.mark.gate
    def test_an_experiment_that_a_person_deletes_leaves_its_number_unused(self, after_two):
        after_two.git("update-ref", "-d", "refs/autoresearch/t/1")
        after_two.git("update-ref", "-d", "refs/heads/autoresearch/t")
        done = after_two.agent("--tag", "t", "--patches", *sharpness(after_two, 0.7))
        assert done.returncode == 0, done.stderr
        assert after_two.refs() == ["refs/autoresearch/t/2", "refs/autoresearch/t/3"]

    def test_nonsense_in_results_stays_and_misleads_nobody(self, after_two):
        """The best is what the commits say; what stood in the file stays byte for byte."""
        header = b"\xef\xbb\xbf" + "\t".join(journal.HEADER).encode() + b"\n"
        before = header + b"\n".join(NONSENSE.values())
        (after_two.folder / "results.tsv").write_bytes(before)
        done = after_two.agent("--tag", "t", "--patches", *sharpness(after_two, 0.6, 0.4, 0.3))
        assert done.returncode == 0, done.stderr
        after = (after_two.folder / "results.tsv").read_bytes()
        assert after.startswith(before)
        added = after[len(before):].decode().split("\n")
        verdicts = [line.split("\t")[3] for line in added if "\tt\t" in line]
        assert verdicts == ["keep", "keep", "discard", "discard"]
        assert "val_bpb 1.025000 → 1.016000" in done.stderr

    @settings(derandomize=True, deadline=None, max_examples=60,
              suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
    @given(st.lists(PIECES, max_size=6))
    @example([(0, 120), b"\n", (1, 9)])
    @example([(0, 120), b"\n", (1, 120), b"\n", (2, 120)])
    @example([(1, 50), b"\xc3"])
    def test_any_bytes_below_the_header_of_results_stay_and_the_rows_come_once(
        self, original, monkeypatch, pieces
    ):
        """The functions that a start calls are called in this process, on the run's real commits.

        The only bytes that may go are those of a last line that the power cut has torn, and these
        come again as the beginning of the whole row.
        """
        monkeypatch.setattr(journal, "ROOT", original.folder)
        monkeypatch.setattr(journal, "RESULTS", original.folder.parent / "nonsense.tsv")
        settled = journal.read_journal("t")
        rows = [journal.row(experiment, "t") for experiment, _ in settled]
        text = [piece if isinstance(piece, bytes) else rows[piece[0]].encode()[: piece[1]]
                for piece in pieces]  # fmt: skip
        before = "\t".join(journal.HEADER).encode() + b"\n" + b"".join(text)
        journal.RESULTS.write_bytes(before)
        run = agent.find_run("t", scale_of(settled[0][1]))
        journal.append_rows([journal.row(experiment, "t") for experiment in run.history])
        after = journal.RESULTS.read_bytes()
        assert after.startswith(before)
        lines = after.decode("utf-8", errors="replace").splitlines()
        found = [journal.identity(line) for line in lines]
        assert {journal.identity(row) for row in rows} <= set(found)
        added = after[len(before):].decode("utf-8", errors="replace").splitlines()
        assert len(added) <= 1 + len(rows)
        journal.append_rows(rows)
        assert journal.RESULTS.read_bytes() == after
        assert (run.best().number, run.best().val_bpb()) == (1, pytest.approx(1.016))


def scale_of(settings_of_run):
    """Return what prepare.py had said, as far as the settings of a run tell it."""
    names = ("name", "budget", "clock", "manifest", "referee", "device")
    scale = dict(zip(names, settings_of_run.split(" ", 5), strict=True))
    return scale | {"budget": float(scale["budget"])}


def test_results_that_cannot_be_written_are_an_error_at_the_start(quick):
    path = quick.folder / "results.tsv"
    path.write_text("\t".join(journal.HEADER) + "\n", encoding="utf-8")
    path.chmod(0o444)
    # Root may write what it has no permission for, unless it is without this capability.
    as_others = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
    command = [*as_others, sys.executable, "agent.py", "--tag", "t", "--experiments", "0"]
    done = sh(*command, cwd=quick.folder, env=quick.env, timeout=600)
    assert done.returncode == 1 and "no permission to write" in one_error(done), done.stderr
    assert done.stderr.splitlines()[-1] == f"hint: chmod u+w {path}"
    path.chmod(0o644)
    path.write_text("<<<<<<< HEAD\n", encoding="utf-8")
    done = quick.agent("--tag", "t")
    assert done.returncode == 1 and "foreign header" in one_error(done)


def test_the_reason_of_every_end_is_in_the_log(quick):
    assert quick.agent("--experiments", "1", "--tag", "t").returncode == 0
    log = quick.folder / "runs/t/agent.log"
    said = log.read_text(encoding="utf-8")
    assert "stopped: the run has its 1 experiments" in said
    assert "baseline, run 1" in said and "NOT confined: " in said
    (quick.folder / "broken").touch()
    done = quick.agent("--experiments", "2", "--tag", "t")
    assert done.returncode == 1 and "broken" in one_error(done)
    assert one_error(done) in log.read_text(encoding="utf-8")


# ---------------------------------------------------------------------------
# Git, of every kind and setting
# ---------------------------------------------------------------------------


def test_no_hook_filter_or_monitor_is_run(quick):
    mark = quick.folder.parent / "ran"
    script = f"#!/bin/sh\necho $0 >> {mark}\ncat\n"
    hooks = ["pre-commit", "post-commit", "reference-transaction", "post-index-change",
             "commit-msg", "prepare-commit-msg", "post-checkout", "monitor"]  # fmt: skip
    folder = quick.folder / ".git/hooks"
    folder.mkdir(exist_ok=True)
    for name in hooks:
        (folder / name).write_text(script, encoding="utf-8")
        (folder / name).chmod(0o755)
    (quick.folder / ".git/info").mkdir(exist_ok=True)
    (quick.folder / ".git/info/attributes").write_text("*.py filter=evil\n", encoding="utf-8")
    for name, value in (("core.fsmonitor", folder / "monitor"), ("commit.gpgsign", "true"),
                        ("filter.evil.clean", folder / "monitor"), ("core.autocrlf", "true"),
                        ("filter.evil.smudge", folder / "monitor")):  # fmt: skip
        quick.git("config", name, str(value))
    done = quick.agent("--tag", "t", "--patches", *sharpness(quick, 0.6, 0.4))
    assert done.returncode == 0, done.stderr
    assert len(quick.rows()) == 3 and not mark.exists()
    quick.git("-c", "commit.gpgsign=false", "commit", "-q", "--allow-empty", "-m", "x")
    assert mark.exists()  # git itself does run them


@pytest.mark.gate
@pytest.mark.parametrize("kind", ["submodule", "worktree", "shallow clone", "detached and dirty"])
def test_every_kind_of_checkout_works(quick, tmp_path, kind):
    place = copy.copy(quick)
    if kind == "submodule":
        sh("git", "init", "-q", tmp_path / "whole", cwd=tmp_path)
        place.folder = tmp_path / "whole/part"
        sh("git", "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", quick.folder,
           "part", cwd=tmp_path / "whole")  # fmt: skip
    elif kind == "worktree":
        place.folder = tmp_path / "tree"
        quick.git("worktree", "add", "-q", place.folder, "-b", "side")
    elif kind == "shallow clone":
        quick.git("commit", "-q", "--allow-empty", "-m", "more")
        place.folder = tmp_path / "shallow"
        sh("git", "clone", "-q", "--depth=1", f"file://{quick.folder}", place.folder, cwd=tmp_path)
    else:
        quick.git("checkout", "-q", "--detach")
        (quick.folder / "program.md").write_text("changed", encoding="utf-8")
        (quick.folder / "new").write_text("staged", encoding="utf-8")
        quick.git("add", "new")
        (quick.folder / ".git/index.lock").touch()

    def state():
        return place.git("diff", "HEAD", "--", ":!results.tsv"), place.git("rev-parse", "HEAD")

    before = state()
    done = place.agent("--tag", "t", "--patches", *sharpness(place, 0.6, 0.4))
    assert done.returncode == 0, done.stderr
    assert statuses(place) == ["keep", "keep", "discard"]
    assert len(place.refs()) == 2
    assert state() == before


@pytest.mark.gate
def test_two_agents_on_one_repository_are_one_too_many(quick):
    stand_in(quick, "hold()")
    first = while_training(quick, 0)
    second = quick.agent("--tag", "other")
    kill_and_wait(first)
    assert second.returncode == 1 and f"process {first.pid}" in one_error(second)
    let_go(quick)
    third = quick.agent("--experiments", "0", "--tag", "t2")
    assert third.returncode == 0, third.stderr  # a holder that was killed holds nothing


# ---------------------------------------------------------------------------
# Clock, terminal and signals
# ---------------------------------------------------------------------------


@pytest.mark.gate
def test_a_wall_clock_that_jumps_changes_no_duration(checkout):
    """A year back and a year forward, in turn, in every program: no machine is as slow as that."""
    jumps = "time.time = __import__('itertools').cycle([1e9, 1e9 - 3e7, 1e9 + 3e7]).__next__"
    for name in (*PROGRAM, *TRUSTED):
        if "\nimport time\n" in (checkout.folder / name).read_text(encoding="utf-8"):
            checkout.exchange(name, "\nimport time\n", f"\nimport time\n{jumps}\n")
    checkout.commit_all()
    same = sharpness(checkout, 0.5)  # what the baseline is already, so that nothing more is trained
    done = checkout.agent("--tag", "t", "--hours", "1000", "--patches", *same)
    assert done.returncode == 0 and "stopped: nothing is left" in done.stderr, done.stderr
    (row,) = checkout.rows()
    result = json.loads((checkout.folder / "runs/t/0/result.json").read_text(encoding="utf-8"))
    measured = {name: value for name, value in result.items() if name.endswith("_seconds")}
    assert len(measured) > 5 and 0 < float(row["seconds"]) < 1e6
    assert all(0 <= value < 1e6 for value in measured.values()), measured


def ignores_ctrl_c(pid):
    """Say whether a process ignores SIGINT by now, as agent.py does from the first one on."""
    with open(f"/proc/{pid}/status", encoding="utf-8") as file:
        ignored = int(re.search(r"SigIgn:\s*([0-9a-f]+)", file.read())[1], 16)
    return bool(ignored >> (signal.SIGINT - 1) & 1)


@pytest.mark.parametrize("times", [
    pytest.param(1, marks=pytest.mark.nightly), pytest.param(2, marks=pytest.mark.gate),
])  # fmt: skip
def test_ctrl_c_in_a_terminal_ends_with_130_and_leaves_nobody(checkout, times):
    """The second one comes while it is waiting for the referee, which is stopped until then."""
    endless = "    import time; time.sleep(1e6); finish(model"
    checkout.write_train(TOY.replace("    finish(model", endless))
    checkout.commit_all()
    ours, theirs = os.openpty()
    started = subprocess.Popen(
        [sys.executable, "agent.py", "--tag", "t"], cwd=checkout.folder, env=checkout.env,
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    said, log = [], checkout.folder / "runs/t/0/run.log"
    reader = threading.Thread(target=lambda: said.extend(iter(lambda: read_some(ours), b"")))
    reader.start()
    wait_until(lambda: log.exists() and b"step" in log.read_bytes(), started)
    referee = json.loads((checkout.folder / "runs/t/0/running.json").read_bytes())["pid"]
    if times == 2:
        os.kill(referee, signal.SIGSTOP)
    os.write(ours, b"\x03")
    if times == 2:
        wait_until(lambda: ignores_ctrl_c(started.pid), started)
        os.write(ours, b"\x03")
        os.kill(referee, signal.SIGCONT)
    assert started.wait() == 130
    reader.join()
    assert b"goes on from here" in b"".join(said) and b"Traceback" not in b"".join(said)
    os.close(ours)
    assert not [link for link in glob.glob("/proc/[0-9]*/cwd") if lives_in(link, checkout.folder)]


def read_some(terminal):
    try:
        return os.read(terminal, 4096)
    except OSError:  # nobody is left at the other end
        return b""


def lives_in(link, folder):
    try:
        return os.readlink(link).startswith(str(folder))
    except OSError:
        return False


@pytest.mark.gate
def test_a_terminal_that_is_closed_ends_it_with_the_reason(quick):
    stand_in(quick, "hold()")
    # Whoever runs the tests may ignore this signal, as `nohup` does, and agent.py would follow.
    attend = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)}
    started = start_agent(quick, **attend)
    wait_until((quick.folder / "runs/t/0/run.log").exists, started)
    started.send_signal(signal.SIGHUP)
    assert "interrupted (SIGHUP)" in started.communicate()[1] and started.returncode == 130
    log = (quick.folder / "runs/t/agent.log").read_text(encoding="utf-8")
    assert "interrupted (SIGHUP)" in log


@pytest.mark.gate
@pytest.mark.parametrize("screen", ["a full disk", "a pipe that nobody reads"])
def test_a_screen_that_takes_nothing_does_not_end_the_loop(quick, screen):
    if screen == "a full disk":
        out = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, out = os.pipe()
        os.close(reader)
    command = ["--tag", "t", "--patches", *map(str, sharpness(quick, 0.6))]
    done = subprocess.run(
        [sys.executable, "agent.py", *command], cwd=quick.folder, env=quick.env,
        stdout=out, stderr=out,
    )  # fmt: skip
    os.close(out)
    assert done.returncode == 0 and len(quick.rows()) == 2
    log = (quick.folder / "runs/t/agent.log").read_text(encoding="utf-8")
    assert "stopped: nothing is left" in log


@pytest.mark.gate
def test_a_run_that_is_silent_is_said_on_the_screen_and_in_the_log(quick):
    quick.exchange("slots.py", r"\nSILENCE_SHARE, SILENCE_SECONDS = 3.0, 20.0",
                   "\nSILENCE_SHARE, SILENCE_SECONDS = 3.0, 0.1")  # fmt: skip
    stand_in(quick, "value == 0.6 and hold()")
    started = while_training(quick, 1, "--patches", *sharpness(quick, 0.6))
    log = quick.folder / "runs/t/agent.log"
    wait_until(lambda: "no output for " in log.read_text(encoding="utf-8"), started)
    let_go(quick)
    said = started.communicate()[1]
    assert started.returncode == 0, said
    (line,) = [line for line in said.splitlines() if line.startswith("no output for ")]
    assert line.endswith(": 1: 0.6.py") and line in log.read_text(encoding="utf-8")


class Chatty:
    """Stands for the referee of a run whose log grows at some seconds of a made-up clock."""

    def __init__(self, log, seconds_of_lines):
        self.log, self.lines, self.seconds = log, seconds_of_lines, 0.0
        self.process = self

    def monotonic(self):
        return self.seconds

    def poll(self):
        return None if self.lines else 0

    def has_trained(self, seconds):
        self.seconds += seconds
        if self.lines and self.seconds >= self.lines[0]:
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(f"{self.lines.pop(0)}\n")
        return False


@pytest.mark.parametrize("seconds_of_lines, longest, said", [
    ((1, 32, 63), 31, 0), ((1, 35, 36), 34, 1), ((1, 50, 99, 160), 61, 1),
], ids=["never for too long", "once", "three times"])  # fmt: skip
def test_a_run_that_is_silent_for_longer_than_the_baseline_was_is_said_once(
    tmp_path, monkeypatch, capsys, seconds_of_lines, longest, said
):
    """The baseline was silent for 4 s: three times that and 20 s more is the limit."""
    referee = Chatty(tmp_path / "run.log", list(seconds_of_lines))
    monkeypatch.setattr(slots, "time", referee)
    run = SimpleNamespace(history=[SimpleNamespace(silence_seconds=4.0)])
    found = slots.watch(run, referee, "an idea", referee.log, 1e6, lambda: None)
    assert found == pytest.approx(longest, abs=0.3)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("no output")]
    assert len(lines) == said
    assert all(line.endswith("the baseline's longest was 4 s: an idea") for line in lines)
