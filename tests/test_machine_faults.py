"""Break the machine under agent.py: a GPU that fails or is shared, runs that die, a full disk.

    pytest -m "not nightly" tests/test_machine_faults.py
    pytest -m nightly tests/test_machine_faults.py          # 500 experiments
    pytest -m alone tests/test_machine_faults.py            # a full disk, as root

Where the referee is not what is tested, a stand-in that measures nothing takes its place.
"""

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys

import pytest

import agent
from support.api_server import proposal
from support.checkout import Checkout, sh
from support.checks import one_error, statuses
from support.stand_in import sharpness, stand_in, start_agent

# ---------------------------------------------------------------------------
# Runs that crash
# ---------------------------------------------------------------------------


def test_three_crashes_in_a_row_are_the_ideas_or_the_machine(quick):
    """The best is run again; it crashes too once the machine is broken."""
    fails = (
        "if value < 0.5 or os.path.exists(here + '/faulty'):\n"
        "    result = {'status': 'crash', 'reason': 'RuntimeError: CUDA', 'total_seconds': 1.0}\n"
    )
    stand_in(quick, more=fails)
    patches = sharpness(quick, 0.1, 0.2, 0.3, 0.4)
    done = quick.agent("--tag", "t", "--patches", *patches)
    assert done.returncode == 0, done.stderr
    assert statuses(quick) == ["keep", *["crash"] * 3, "measure", "crash"]
    more = sharpness(quick, 0.45, 0.46)
    assert quick.agent("--tag", "t", "--patches", *patches, more[0]).returncode == 0
    (quick.folder / "faulty").touch()
    done = quick.agent("--tag", "t", "--patches", *patches, *more, "--experiments", "7")
    assert done.returncode == 1
    assert "it is the machine, not the ideas: RuntimeError: CUDA" in one_error(done)


def test_a_referee_that_is_killed_is_started_again_and_one_that_always_is_a_crash(quick):
    """As the kernel does when memory is short: once for one idea, each time for another."""
    dies = (
        "marker = args.folder + '/killed'\n"
        "if value == 0.6 and not os.path.exists(marker) or value == 0.4:\n"
        "    open(marker, 'w').close(), os.kill(os.getpid(), 9)\n"
    )
    stand_in(quick, more=dies)
    done = quick.agent("--tag", "t", "--patches", *sharpness(quick, 0.6, 0.4, 0.7))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the referee failed: exit status -9") == 1 + 4
    assert statuses(quick) == ["keep", "keep", "crash", "keep"]


@pytest.mark.gate
def test_a_kept_idea_that_fails_later_does_not_end_the_loop(quick):
    """It runs once and never again; the baseline, which does, tells that it is not the machine."""
    fails = (
        "if value < 0.5 or value == 0.7 and args.run != '1':\n"
        "    result = {'status': 'crash', 'reason': 'ValueError: luck', 'total_seconds': 1.0}\n"
    )
    stand_in(quick, more=fails)
    patches = sharpness(quick, 0.7, 0.1, 0.2, 0.3, 0.9)
    done = quick.agent("--tag", "t", "--patches", *patches)
    assert done.returncode == 0, done.stderr
    assert statuses(quick) == ["keep", "keep", *["crash"] * 3, "measure", "keep"]
    assert quick.rows()[5]["val_bpb"] == "nan"
    assert quick.agent("--tag", "t", "--patches", *patches).returncode == 0


CRASH_ONCE = """\
mark = here + "/crashed"
if args.run == "2" and not os.path.exists(mark):
    open(mark, "w").close()
    result = {"status": "crash", "reason": "CUDA error", "total_seconds": 1.0}
"""


@pytest.mark.gate
def test_a_measurement_of_the_baseline_that_fails_once_does_not_end_the_loop(quick):
    quick.exchange("agent.py", "\nMEASURE_AFTER = 10", "\nMEASURE_AFTER = 1")
    stand_in(quick, more=CRASH_ONCE)
    done = quick.agent("--tag", "t", "--patches", *sharpness(quick, 0.4, 0.6))
    assert done.returncode == 0 and "does the baseline? CUDA error" in done.stderr, done.stderr
    assert statuses(quick) == ["keep", "discard", "measure", "keep"]


@pytest.mark.gate
def test_odd_programs_do_not_end_the_loop(quick):
    """One too deep to parse, a form feed, constants that are gone, a line of no end."""
    deep = quick.patch("deep.py", "PASSES = 4", f"PASSES = {'-' * 50_000}1")
    feed = quick.patch("feed.py", "SHARPNESS = 0.5", "# a\x0cpage\nSHARPNESS = 0.6")
    done = quick.agent("--tag", "t", "--patches", deep, feed)
    assert done.returncode == 0 and "rejected: deep.py" in done.stderr, done.stderr
    done = quick.agent("--tag", "t", "--experiments", "3")
    assert done.returncode == 0 and len(quick.rows()) == 4, done.stderr
    source = quick.git("show", "autoresearch/t:train.py")
    inside = source.replace("\nSHARPNESS", "\nclass C:\n    SHARPNESS").replace("\nPASSES", "\n#")
    path = quick.folder.parent / "inside.py"
    path.write_text(re.sub("SHARPNESS = .*", "SHARPNESS = 1.0", inside), encoding="utf-8")
    assert quick.agent("--tag", "t", "--patches", path).returncode == 0
    done = quick.agent("--tag", "t", "--experiments", "9")
    assert done.returncode == 0 and "nothing is left to propose" in done.stderr, done.stderr


# ---------------------------------------------------------------------------
# Runs that are set aside
# ---------------------------------------------------------------------------


@pytest.fixture
def timed(quick):
    """The same with a budget in CPU seconds, where a slow training run has a worse score."""
    del quick.env["AUTORESEARCH_BUDGET_TOKENS"]
    quick.exchange("journal.py", "\nSLOWER = .*", "\nSLOWER = 0.10")
    return quick


def test_a_disturbed_run_is_set_aside_and_made_up_for(timed):
    """The second run of the same code has half the tokens per second; four are wanted."""
    stand_in(timed, more='result["total_tokens_M"] = 0.5 if args.run == "2" else 1.0')
    done = timed.agent("--tag", "t", "--patches", *sharpness(timed, 0.5001))
    assert done.returncode == 0, done.stderr
    row = timed.rows()[-1]
    assert "disturbed: 50 % fewer tokens/s" in done.stderr and row["runs"] == "4"
    assert (timed.folder / "runs/t/1/result-5.json").exists()


@pytest.mark.gate
def test_a_best_that_cannot_be_measured_again_is_asked_once(timed):
    """Its runs but the first have half the tokens per second; an idea wants four on equal seeds."""
    stand_in(timed, more='slow = args.folder.endswith("/0") and args.run != "1"\n'
                         'result["total_tokens_M"] = 0.5 if slow else 1.0')  # fmt: skip
    done = timed.agent("--tag", "t", "--patches", *sharpness(timed, 0.5001, 0.50011))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\nthe best again: baseline") == 1 + agent.REPEATS
    told = [(row["experiment"], row["status"], row["runs"]) for row in timed.rows()[1:]]
    assert told == [("0", "measure", "0"), ("1", "discard", "4"), ("2", "discard", "4")]


@pytest.mark.gate
def test_an_idea_is_judged_the_same_from_the_runs_that_a_kill_has_left(quick):
    """Its first run alone would lose against the second one of the best, which came after it."""
    scores = {"0": (1.0, 0.95), "1": (0.999, 0.85)}
    scored = f'{scores}[args.folder.rpartition("/")[2]][int(args.run) - 1]'
    stand_in(quick, more=f'if "--screen" not in words:\n    result["val_bpb"] = {scored}')
    command = ["--tag", "t", "--patches", *sharpness(quick, 0.6)]
    assert quick.agent(*command).returncode == 0
    rows = quick.rows()
    assert [(row["status"], row["runs"]) for row in rows[2:]] == [("keep", "2")]
    for ref in ("refs/autoresearch/t/1", "refs/heads/autoresearch/t"):  # as if it was not recorded
        quick.git("update-ref", "-d", ref)
    path = quick.folder / "runs/t/1/proposal.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    del stored["commit"]
    path.write_text(json.dumps(stored), encoding="utf-8")
    (quick.folder / "results.tsv").unlink()
    done = quick.agent(*command)
    assert "going on with experiment 1" in done.stderr, done.stderr
    names = ("status", "val_bpb", "experiment", "runs")
    assert [[r[n] for n in names] for r in quick.rows()] == [[r[n] for n in names] for r in rows]


# A stand-in for nvidia-smi: there is trouble until the first training run has its result.
SMI = """\
#!/bin/sh
there=yes
[ -e {result} ] && there=no
case "$*" in
*compute-apps*) [ $there = no ] || echo {tenant} ;;
*) [ $there = no ] && echo 0x4 || echo {mask} ;;
esac
"""


@pytest.mark.parametrize("trouble, tenant, mask", [
    pytest.param("another process on the GPU", os.getpid(), "0x4", marks=pytest.mark.gate),
    pytest.param("a throttled GPU", "", "0x0000000000000024", marks=pytest.mark.nightly),
], ids=["another process", "a throttled GPU"])  # fmt: skip
def test_a_run_beside_a_tenant_or_on_a_throttled_card_is_not_judged(
    checkout, tmp_path, trouble, tenant, mask
):
    """The referee is the real one, which asks nvidia-smi ten times a second."""
    (tmp_path / "bin").mkdir()
    smi, result = tmp_path / "bin/nvidia-smi", checkout.folder / "runs/t/0/result.json"
    smi.write_text(SMI.format(result=result, tenant=tenant, mask=mask), encoding="utf-8")
    smi.chmod(0o755)
    checkout.exchange("referee.py", "\nGPU_POLL_SECONDS, GPU_SHARE = .*",
                      "\nGPU_POLL_SECONDS, GPU_SHARE = 0.1, 0.5")  # fmt: skip
    checkout.commit_all()
    del checkout.env["AUTORESEARCH_BUDGET_TOKENS"]
    checkout.env |= {"AUTORESEARCH_BUDGET": "1", "PATH": f"{smi.parent}:{checkout.env['PATH']}"}
    done = checkout.agent("--tag", "t", "--experiments", "0")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("disturbed: ") == done.stderr.count(f"disturbed: {trouble}") == 1
    (row,) = checkout.rows()
    assert row["runs"] == "1" and row["val_bpb"] != "nan"
    first, second = (json.loads(path.read_text(encoding="utf-8"))
                     for path in (result, result.with_name("result-2.json")))  # fmt: skip
    assert first["disturbed"] == trouble and second["disturbed"] == ""


# ---------------------------------------------------------------------------
# A long run, and a full disk
# ---------------------------------------------------------------------------

# Runs 500 experiments in its own process; prints the exit code, memory in MB, and how many git
# commands and CPU seconds each experiment took, its own and those of the commands.
LONG = """\
import json, os, subprocess, sys, time
sys.path.insert(0, os.getcwd())
import agent
commands, spent = [0], []
run, record = subprocess.run, agent.record

def counted(command, *arguments, **more):
    commands[0] += command[0] == "git"
    return run(command, *arguments, **more)

def noted(*arguments):
    spent.append((commands[0], sum(os.times()[:4])))
    return record(*arguments)

subprocess.run, agent.record = counted, noted
sys.argv[1:] = ["--tag", "t", "--experiments", "500", "--model", "claude-haiku-5-5"]
code = agent.main()
status = open("/proc/self/status").read()
now, peak = (int(status.split(name)[1].split()[0]) / 1024 for name in ("VmRSS:", "VmHWM:"))
print(json.dumps([code, now, peak, spent]))
"""


def answer_of(number):
    """Return a reply whose every 125th idea is better, while the others make no difference."""

    def answer(request):
        source = request["messages"][0]["content"][1]["text"]
        (value,) = re.findall(r"^SHARPNESS = (.*)", source, re.M)
        if number % 125 == 0:
            better = f"SHARPNESS = {float(value) + 0.1:.2f}"
            return proposal(f"SHARPNESS = {value}", better, f"sharper, {number}")
        return proposal("PASSES = 4", f"PASSES = 4\nIDEA_{number} = 1", f"idea {number}")

    return answer


@pytest.mark.nightly
def test_five_hundred_experiments_are_all_there_and_cost_no_more_at_the_end(quick, api):
    server = api(*map(answer_of, range(1, 521)))
    done = sh(sys.executable, "-c", LONG, cwd=quick.folder, env=quick.env | server.env,
              timeout=5000)  # fmt: skip
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-3000:]
    code, now, peak, spent = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stderr
    rows = [row for row in quick.rows() if row["status"] != "measure"]
    assert [int(row["experiment"]) for row in rows] == list(range(501))
    assert sum(row["status"] == "keep" for row in rows) >= 3  # the baseline and what is clear
    assert len(quick.refs()) == 500 and quick.git("fsck", "--no-dangling") == ""
    each = [[later - earlier for earlier, later in zip(column, column[1:], strict=False)]
            for column in zip(*spent, strict=True)]  # fmt: skip
    (git_first, first), (git_last, last) = (
        [statistics.median(column[part]) for column in each]
        for part in (slice(1, 51), slice(-50, None)))  # fmt: skip
    print(f"{now:.0f} MB at the end, {peak:.0f} at most; {git_first:.0f} and {git_last:.0f} git "
          f"commands, {first:.3f} and {last:.3f} CPU s an experiment")  # fmt: skip
    assert peak < 150 and git_last <= git_first and last <= 1.5 * first


@pytest.mark.alone
def test_a_full_disk_pauses_and_loses_nothing(tmp_path, cache):
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk])
    if mounted.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        checkout = Checkout(disk / "checkout", cache)
        checkout.exchange("journal.py", r"\nDISK_FLOOR = .*", "\nDISK_FLOOR = 0")
        checkout.exchange("journal.py", r"\nDISK_POLL_SECONDS = .*", "\nDISK_POLL_SECONDS = 0.1")
        checkout.exchange("agent.py", r"shutil.disk_usage\(ROOT\).free < 1e9", "False")
        stand_in(checkout)
        patches = sharpness(checkout, 0.6, 0.4)
        assert checkout.agent("--tag", "t", "--experiments", "0").returncode == 0
        filler = disk / "filler"
        file = os.open(filler, os.O_WRONLY | os.O_CREAT)
        with contextlib.suppress(OSError):
            while True:
                os.write(file, bytes(4096))
        os.close(file)
        started = start_agent(checkout, "--patches", *patches)
        said = ""
        while "paused" not in said:
            line = started.stderr.readline()
            assert line, said
            said += line
        filler.unlink()
        said += started.communicate()[1]
        assert started.returncode == 0, said
        assert statuses(checkout) == ["keep", "keep", "discard"]
        assert checkout.git("fsck", "--no-dangling") == ""
    finally:
        subprocess.run(["umount", disk])
