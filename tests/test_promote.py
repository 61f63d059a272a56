"""agent.py promote: fresh runs of the kept commits, and a branch of those that hold."""

import difflib
import html
import re
import signal
import subprocess
import sys
import time

import pytest

import promote
from support.checkout import TOY
from support.stand_in import STAND_IN, stand_in

# SHARPNESS in three parts, each in its place, the last of which is good for a shallow model only.
PARTS = "DEPTH = 1\n" + "\n# between\n# the\n# parts\n".join(("A = 0.1", "B = 0.1", "C = 0.0"))
SHARPNESS = "\n# apart\n# from\n# them\nSHARPNESS = A + B + (C if DEPTH == 1 else -C)"
# The stand-in for a referee adds them up.
ADD_UP = """\
names = {}
exec("\\n".join(re.findall(r"^(?:DEPTH|A|B|C|SHARPNESS) = .*", source, re.M)), names)
value = names["SHARPNESS"]
"""


def test_three_way_merge_takes_one_commit_out_and_tells_a_conflict():
    start = "a = 1\n# one\n# two\n# three\nb = 1\n"
    first, second = start.replace("a = 1", "a = 2"), start.replace("a = 1", "a = 3")
    both = first.replace("b = 1", "b = 2")
    assert promote.merge(both, first, start) == start.replace("b = 1", "b = 2")
    assert promote.merge(second, first, start) is None


def test_depth_is_doubled_wherever_it_comes_from():
    names = {}
    source = 'X = "é"\nDEPTH = {"cpu": 2,\n         "gpu": 9}["cpu"]  # layers\nY = DEPTH\n'
    exec(promote.deepen(source), names)
    assert (names["DEPTH"], names["Y"], names["X"]) == (4, 4, "é")
    with pytest.raises(SystemExit, match="sets no DEPTH"):
        promote.deepen("X = 1\n")


def test_an_effect_is_told_only_beyond_its_interval():
    def stack(number, *values):
        made = promote.Stack("", "")
        made.done.number, made.done.values, made.done.seeds = number, list(values), [1, 2, 3]
        return made

    better = stack(1, 1.0, 1.001, 0.999)
    for worse, word in (((1.02, 1.021), "holds"), ((1.0, 1.001), "no effect"), ((0.98,), "hurts")):
        stacks = [stack(0, *worse), better]
        assert promote.effect(*stacks, promote.noise_of(stacks, 0.002)).verdict() == word


def test_what_rounds_have_in_common_does_not_hide_an_effect():
    """Rounds differ by more than what the second stack gains in each of them."""
    stacks = [promote.Stack("", "") for _ in range(2)]
    for number, stack in enumerate(stacks):
        rounds = [1.0, 1.02, 0.98, 1.01, 0.99, 1.0]
        stack.done.number, stack.done.seeds = number, list(range(6))
        stack.done.values = [value - 0.008 * number for value in rounds]
    assert promote.effect(*stacks, promote.noise_of(stacks, 0.01)).verdict() == "holds"
    stacks[1].done.seeds = list(range(6, 12))
    assert promote.effect(*stacks, promote.noise_of(stacks, 0.01)).verdict() == "no effect"


@pytest.mark.gate
def test_what_holds_is_on_the_branch_and_what_only_seemed_to_is_not(checkout):
    start = TOY.replace("SHARPNESS = 0.5", PARTS + SHARPNESS)
    checkout.write_train(start)
    stand_in(checkout, "time.sleep(0.2)")
    path = checkout.folder / "referee.py"
    (read,) = re.findall("^value = .*\n", STAND_IN, re.M)
    path.write_text(path.read_text().replace(read, ADD_UP))
    checkout.commit_all()
    patches = []
    for old, new in (("A = 0.1", "A = 0.2"), ("B = 0.1", "B = 0.2"), ("C = 0.0", "C = 0.1")):
        lines = [text.splitlines(True) for text in (start, start.replace(old, new))]
        patches.append(checkout.folder.parent / f"{old[0]}.diff")
        patches[-1].write_text("".join(difflib.unified_diff(*lines, "a/train.py", "b/train.py")))
    night = checkout.agent("--tag", "t", "--patches", *patches)
    assert night.returncode == 0, night.stderr
    assert checkout.git("rev-list", "--count", "HEAD..autoresearch/t") == "3", night.stderr
    beside = checkout.folder.parent / "beside"  # a person's own commit, which is kept unseen
    checkout.git("worktree", "add", "-q", str(beside), "autoresearch/t")
    path = beside / "train.py"
    path.write_text(path.read_text().replace("PASSES = 4", "PASSES = 4\nNOTHING = 1"))
    checkout.git("-C", str(beside), "commit", "-qam", "nothing")
    checkout.git("worktree", "remove", str(beside))
    assert checkout.agent("--tag", "t", "--experiments", "4").returncode == 0

    command = [sys.executable, "agent.py", "promote", "--runs", "2"]
    killed = subprocess.Popen(command, cwd=checkout.folder, env=checkout.env,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    folder = checkout.folder / "runs/t/promote-same"
    deadline = time.monotonic() + 120
    while len(found := list(folder.glob("*/result*.json"))) < 5 and time.monotonic() < deadline:
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    before = {path: path.stat().st_mtime_ns for path in found}
    done = checkout.agent("promote", "--runs", "2")
    assert done.returncode == 0, done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in found}  # nothing is run again
    said = done.stdout.splitlines()
    verdicts = {line.split()[0]: line[6:22].strip() for line in said if line[:4].strip().isdigit()}
    assert (verdicts["1"], verdicts["2"], verdicts["3"]) == ("holds", "holds", "hurts"), done.stdout
    assert verdicts["4"] == "no effect" and said[-1].endswith("..autoresearch/t-promoted")
    assert "promotes 4 kept commits: up to 12 runs here" in done.stderr
    source = checkout.git("show", "autoresearch/t-promoted:train.py")
    assert [part in source for part in ("A = 0.2", "B = 0.2", "C = 0.1", "NOTHING")] == [1, 1, 0, 0]
    checkout.git("switch", "-qc", "taken")
    checkout.git(*said[-1].removeprefix("take them: git ").split())
    assert checkout.git("show", "HEAD:train.py") == source
    assert checkout.agent("promote", "--runs", "2").stdout == done.stdout  # the same once more
    checkout.agent("report")
    page = (checkout.folder / "runs/t/report.html").read_text(encoding="utf-8")
    assert all(html.escape(line) in page for line in said)


def test_without_a_keep_there_is_nothing_to_promote(checkout):
    done = checkout.agent("promote")
    assert done.returncode == 1 and "there is no run yet" in done.stderr
    assert checkout.agent("--tag", "t", "--experiments", "0").returncode == 0
    done = checkout.agent("promote")
    assert done.returncode == 1 and "run t has kept nothing" in done.stderr
