"""agent.py promote: fresh runs of the kept commits, and a branch of those that hold."""

import difflib
import html
import subprocess
import sys

import pytest

import promote
from support.checkout import TOY
from support.checks import one_error, statuses
from support.stand_in import kill_and_wait, let_go, sharpness, stand_in
from support.waiting import wait_until

# SHARPNESS in three parts, each in its place, the last of which is good for a shallow model only.
PARTS = "DEPTH = 1\n" + "\n# between\n# the\n# parts\n".join(("A = 0.1", "B = 0.1", "C = 0.0"))
SHARPNESS = "\n# apart\n# from\n# them\nSHARPNESS = A + B + (C if DEPTH == 1 else -C)"
# The stand-in for a referee adds them up, and holds up a promotion that has five results.
HOLD_AT_FIVE = """\
import glob
    stage = os.path.dirname(os.path.abspath(args.folder))
    if "promote-same" in stage and len(glob.glob(stage + "/*/result*.json")) >= 5:
        hold()"""
ADD_UP = """\
names = {}
exec("\\n".join(re.findall(r"^(?:DEPTH|A|B|C|SHARPNESS) = .*", source, re.M)), names)
result["val_bpb"] = 0.1 * (names["SHARPNESS"] - 1) ** 2 + 1
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


def five_of(folder):
    """Return the results in a folder of experiments once there are five."""
    found = list(folder.glob("*/result*.json"))
    return found if len(found) >= 5 else []


@pytest.mark.gate
def test_what_holds_is_on_the_branch_and_what_only_seemed_to_is_not(checkout):
    start = TOY.replace("SHARPNESS = 0.5", PARTS + SHARPNESS)
    checkout.write_train(start)
    # The constant itself is no number in this file: what the stand-in reads of it is not used.
    stand_in(checkout, HOLD_AT_FIVE, ADD_UP)
    checkout.exchange("referee.py", r"value = float\(.*\n", "value = 0.0\n")
    checkout.commit_all()
    patches = []
    for old, new in (("A = 0.1", "A = 0.2"), ("B = 0.1", "B = 0.2"), ("C = 0.0", "C = 0.1")):
        lines = [text.splitlines(True) for text in (start, start.replace(old, new))]
        patches.append(checkout.folder.parent / f"{old[0]}.diff")
        patches[-1].write_text("".join(difflib.unified_diff(*lines, "a/train.py", "b/train.py")))
    done = checkout.agent("--tag", "t", "--patches", *patches)
    assert done.returncode == 0, done.stderr
    assert checkout.git("rev-list", "--count", "HEAD..autoresearch/t") == "3", done.stderr
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
    found = wait_until(lambda: five_of(folder), killed)
    kill_and_wait(killed)
    let_go(checkout)
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


# More passes are better too, so that a commit can take the constant back to where it was.
PASSES_COUNT = """\
result["val_bpb"] -= 0.01 * (int(re.search("PASSES = (.*)", source)[1]) - 4)
"""


def lines_by_number(said):
    """Return the lines of a promotion that are about a commit, by its number."""
    return {line[:4].strip(): line for line in said.splitlines() if line[:4].strip().isdigit()}


@pytest.mark.gate
def test_a_commit_that_others_build_on_stays_and_one_that_conflicts_is_left_out(checkout):
    """Three commits change one line: to 0.6, to 0.8, and back, with more passes."""
    start = TOY.replace("PASSES = 4", "# apart\n# from\n# it\nPASSES = 4")
    checkout.write_train(start)
    stand_in(checkout, more=PASSES_COUNT)
    back = checkout.patch("back.py", "PASSES = 4", "PASSES = 9", start)
    done = checkout.agent("--tag", "t", "--patches", *sharpness(checkout, 0.6, 0.8, base=start))
    assert done.returncode == 0 and statuses(checkout) == ["keep"] * 3, done.stderr
    words = ("promote", "--runs", "2", "--scale", "cpu")
    done = checkout.agent(*words)
    assert done.returncode == 0, done.stderr
    lines = lines_by_number(done.stdout)
    assert "needed by later commits  cannot be taken out, later commits build on it" in lines["1"]
    assert "  holds  " in lines["2"]
    source = checkout.git("show", "autoresearch/t-promoted:train.py")
    assert "SHARPNESS = 0.8" in source
    assert checkout.git("rev-list", "--count", "main..autoresearch/t-promoted") == "2"

    done = checkout.agent("--tag", "t", "--patches", back)
    assert done.returncode == 0 and statuses(checkout) == ["keep"] * 4, done.stderr
    done = checkout.agent(*words)  # A branch that holds something else is not overwritten.
    assert done.returncode == 1
    assert "t-promoted is there and holds something else" in one_error(done)
    assert checkout.git("show", "autoresearch/t-promoted:train.py") == source
    checkout.git("branch", "-m", "autoresearch/t-promoted", "old")
    done = checkout.agent(*words)
    assert done.returncode == 0, done.stderr
    lines = lines_by_number(done.stdout)
    assert "  no effect  " in lines["1"]  # The line is the same with and without it.
    assert "needed by later commits  cannot be taken out" in lines["2"]
    assert "  holds  " in lines["3"]
    assert "2 conflicts without the others, and is left out" in done.stderr.splitlines()
    assert "1 commits hold" in done.stdout
    assert checkout.git("rev-list", "--count", "main..autoresearch/t-promoted") == "1"
    source = checkout.git("show", "autoresearch/t-promoted:train.py")
    assert "SHARPNESS = 0.5" in source and "PASSES = 9" in source


def test_without_a_keep_there_is_nothing_to_promote(quick):
    done = quick.agent("promote")
    assert done.returncode == 1 and "there is no run yet" in done.stderr
    assert quick.agent("--tag", "t", "--experiments", "0").returncode == 0
    done = quick.agent("promote")
    assert done.returncode == 1 and "run t has kept nothing" in done.stderr
