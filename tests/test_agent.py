"""agent.py: the real program, real git, the real SDK against a scripted server."""

import difflib
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import agent
import journal
from support.api_server import Fault, proposal
from support.checkout import TOY, Checkout, late
from support.checks import numbers_tried, one_error, statuses
from support.stand_in import (
    kill_and_wait,
    sharpness,
    stand_in,
    start_agent,
    while_training,
)
from support.waiting import wait_until

# ---------------------------------------------------------------------------
# What is noted of an experiment
# ---------------------------------------------------------------------------

RESULT = {"status": "ok", "val_bpb": 1.0, "seed": 1, "total_tokens_M": 2.0, "num_steps": 9,
          "training_seconds": 60.0, "training_wall_seconds": 60.0, "start_seconds": 0.1,
          "start_wall_seconds": 0.1, "answers_seconds": 1.0, "total_seconds": 70.0,
          "peak_vram_mb": 1.0}  # fmt: skip
CLOCKS = pytest.mark.parametrize("clock", ["cpu", "tokens"])


@CLOCKS
def test_a_run_beside_another_tenant_counts_only_if_it_had_its_whole_budget(clock):
    """With a budget in tokens it has trained as well, later; a crash may be the neighbour's fault.
    """
    run = journal.Run("t", {"sigma": 0.01, "clock": clock}, "start")
    crash = {"status": "crash", "reason": "out of memory", "total_seconds": 70.0}
    for result, aside in ((RESULT, clock == "cpu"), (crash, True)):
        done = journal.Experiment(1, "")
        agent.add_result(run, done, result | {"disturbed": "another process on the GPU"}, "1")
        assert done.disturbed == aside and done.status == ""
        assert len(done.values) == done.runs == 1 - aside and done.seconds == 70.0


@CLOCKS
def test_a_slow_run_is_set_aside_where_it_had_less_of_the_budget(clock):
    run = journal.Run("t", {"sigma": 0.01, "clock": clock}, "start")
    done, counted = journal.Experiment(1, "an idea"), {"cpu": 2, "tokens": 3}[clock]
    for seed, seconds in enumerate((60.0, 61.0, 90.0)):
        times = {"training_seconds": seconds, "training_wall_seconds": seconds, "seed": seed}
        agent.add_result(run, done, RESULT | times, "a run")
    assert (done.runs, done.disturbed) == (counted, 3 - counted)
    assert len(journal.undisturbed([done])) == counted == len(done.values)
    assert done.seeds == [0, 1, 2][:counted]


WORDS = st.text(max_size=300)
PARTS = {"reason": WORDS, "hypothesis": WORDS, "description": WORDS,
         "status": st.sampled_from(["keep", "discard", "crash", "measure"]),
         "values": st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=4),
         "combines": st.lists(st.integers(0, 99), max_size=3),
         "hidden": st.lists(st.none() | st.floats(0, 9), max_size=2),
         "gain": st.none() | st.floats(-9, 9),
         "knobs": st.dictionaries(st.sampled_from(["DEPTH", "BETAS[0]"]), st.floats(0, 9))}


@given(st.fixed_dictionaries(PARTS), WORDS)
@settings(derandomize=True, deadline=None, max_examples=150)
def test_a_commit_message_says_all_of_an_experiment_whatever_its_texts_are(parts, device):
    """Texts get into an experiment by one_line, which the hypothesis goes through here only."""
    told = {"description": journal.one_line(parts["description"]) or "no description",
            "reason": journal.one_line(parts["reason"], 300)}  # fmt: skip
    done = journal.Experiment(7, **parts | told)
    own = f"cpu 60 {journal.one_line(device)}"
    read, settings_read = journal.parse_message("abc", journal.commit_message(done, own))
    hypothesis = journal.one_line(done.hypothesis, 2000)
    assert read == replace(done, hypothesis=hypothesis, commit="abc") and settings_read == own


def test_a_text_that_looks_like_a_trailer_is_read_back_as_text():
    done = journal.Experiment(7, "a → b: c", 'why\n\nStatus: "keep"', status="crash",
                              reason='Error: "x"\n\nStatus: "keep"')  # fmt: skip
    read, _ = journal.parse_message("abc", journal.commit_message(done, "cpu: 60"))
    assert read == replace(done, hypothesis='why Status: "keep"', commit="abc")


# ---------------------------------------------------------------------------
# Whole runs with the real referee
# ---------------------------------------------------------------------------


def processes_of(checkout):
    """Return the command lines of all processes that name the checkout's folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text(errors="replace").replace("\0", " ")
        except OSError:  # It has ended.
            continue
        found += [words] if str(checkout.folder) in words else []
    return found


def test_three_patches_are_kept_dropped_and_crashed(checkout):
    better, worse = sharpness(checkout, 0.6, 0.3)
    crash = checkout.patch("crash.py", "steps = Toy(), 0", "steps = Toy(), 1 / 0")
    head, index = checkout.git("rev-parse", "HEAD"), (checkout.folder / ".git/index").read_bytes()
    done = checkout.agent("--patches", better, worse, crash, "--tag", "t")
    assert done.returncode == 0, done.stderr
    assert statuses(checkout) == ["keep", "keep", "discard", "crash"]
    assert checkout.rows()[3]["val_bpb"] == "nan"
    assert "ZeroDivisionError" in checkout.rows()[3]["description"]
    assert checkout.refs() == [f"refs/autoresearch/t/{n}" for n in (1, 2, 3)]
    assert checkout.git("diff", "--name-only", "main", "autoresearch/t") == "train.py"
    assert checkout.git("status", "--porcelain") == "?? results.tsv"
    assert checkout.git("rev-parse", "HEAD") == head
    assert (checkout.folder / ".git/index").read_bytes() == index
    folder = checkout.folder / "runs/t/1"
    names = {path.name for path in folder.iterdir()}
    assert {"train.py", "proposal.json", "run.log", "result.json"} <= names
    assert "SHARPNESS = 0.6" in (folder / "train.py").read_text()
    assert (folder / "run.log").read_text().count("\nval_bpb:") == 1
    again = checkout.agent("--patches", better, worse, crash)
    assert again.returncode == 0 and len(checkout.rows()) == 4  # passed over


@pytest.mark.gate
def test_an_idea_that_fails_in_two_steps_goes_back_to_the_model_and_costs_no_run(checkout, api):
    fails = proposal("steps = Toy(), 0", "steps = Toy(), 1 / 0")
    server = api(fails, Fault(401), Fault(401))  # The first one ends the conversation only.
    done = checkout.agent("--experiments", "1", "--tag", "t", env=server.env)
    assert done.returncode == 1 and "error: the API refuses" in done.stderr, done.stderr
    (told,) = server.requests[1]["messages"][-1]["content"]
    assert "fails in two steps" in told["content"] and "ZeroDivisionError" in told["content"]
    assert statuses(checkout) == ["keep"] and not checkout.refs()
    folder = checkout.folder / "runs/t"
    assert not list(folder.glob("screen-*")) and not (folder / "1").exists()


@pytest.mark.gate
def test_a_run_that_hangs_is_ended_by_the_limit_that_follows_from_the_baseline(checkout):
    """The limit is twice what the baseline took and a minute, which is a second here."""
    checkout.exchange("slots.py", r"return 2 \* baseline \+ 60 if", "return 2 * baseline + 1 if")
    sleep = "    import time; time.sleep(3600); finish(model"
    hang = checkout.patch("hang.py", "    finish(model", sleep)
    done = checkout.agent("--patches", hang, timeout=900)
    assert done.returncode == 0, done.stderr
    assert statuses(checkout) == ["keep", "crash"]
    assert "(timeout: no answer within" in checkout.rows()[1]["description"]
    assert not processes_of(checkout)


@pytest.mark.gate
def test_ctrl_c_ends_with_130_and_leaves_no_process(checkout):
    hanging = TOY.replace("    finish(model", "    import time; time.sleep(3600); finish(model")
    checkout.write_train(hanging)
    checkout.git("commit", "-qam", "hanging")
    started = start_agent(checkout)
    log = checkout.folder / "runs/t/0/run.log"
    wait_until(lambda: log.exists() and b"step" in log.read_bytes(), started)
    assert any("referee.py" in words for words in processes_of(checkout))
    started.send_signal(signal.SIGINT)
    said = started.communicate(timeout=600)[1]
    assert started.returncode == 130 and "goes on from here" in said, said
    wait_until(lambda: not processes_of(checkout))  # The run itself would go on for an hour.


# ---------------------------------------------------------------------------
# Whole runs with a stand-in for the referee
# ---------------------------------------------------------------------------

# The referee waits for as long as the test keeps the file "hold VALUE".
HOLD_ONE = 'while os.path.exists(f"{here}/hold {value}"): time.sleep(0.02)'


@pytest.mark.gate
def test_killed_in_mid_run_it_goes_on_and_loses_or_doubles_nothing(checkout):
    stand_in(checkout, HOLD_ONE)
    words = ["--patches", *sharpness(checkout, 0.6, 0.4, 0.8)]
    for number, value in ((0, 0.5), (3, 0.8)):  # the experiment during which it is killed
        held = checkout.folder / f"hold {value}"
        held.touch()
        kill_and_wait(while_training(checkout, number, *words))
        wait_until(lambda: not processes_of(checkout))  # The referee does not outlive the agent.
        held.unlink()
    done = checkout.agent("--tag", "t", *words)
    assert done.returncode == 0, done.stderr
    assert [(row["experiment"], row["status"]) for row in checkout.rows()] == [
        ("0", "keep"), ("1", "keep"), ("2", "discard"), ("3", "keep"),
    ]  # fmt: skip
    assert len(checkout.refs()) == 3
    assert checkout.git("fsck", "--no-dangling") == ""


@pytest.mark.nightly
def test_killed_with_the_real_referee_it_goes_on_and_loses_or_doubles_nothing(checkout):
    slow = TOY.replace("steps += 1", "steps += 1; import time; time.sleep(0.05)")
    checkout.write_train(slow)
    checkout.git("commit", "-qam", "slow")
    words = ["--patches", *sharpness(checkout, 0.6, 0.4, 0.8, base=slow)]
    for number in (0, 3):  # the experiment during which the program is killed
        started = start_agent(checkout, *words)
        log = checkout.folder / f"runs/t/{number}/run.log"
        wait_until(lambda log=log: log.exists() and b"step 3" in log.read_bytes(), started)
        kill_and_wait(started)
        wait_until(lambda: not processes_of(checkout))
    done = checkout.agent("--tag", "t", *words)
    assert done.returncode == 0, done.stderr
    assert statuses(checkout) == ["keep", "keep", "discard", "keep"]
    assert len(checkout.refs()) == 3
    assert checkout.git("fsck", "--no-dangling") == ""


def test_the_baseline_is_run_three_times_before_anything_is_judged(tmp_path, cache):
    checkout = Checkout(tmp_path / "checkout", cache, baseline_runs=3)
    stand_in(checkout)
    done = checkout.agent("--patches", *sharpness(checkout, 0.6), "--tag", "t")
    assert done.returncode == 0, done.stderr
    assert statuses(checkout) == ["keep", "keep"] and checkout.rows()[0]["runs"] == "3"
    results = [json.loads(p.read_text()) for p in checkout.folder.glob("runs/t/0/result*.json")]
    assert len({result["seed"] for result in results}) == len(results) == 3


def diff_of(checkout, name, prose, old, new, file="train.py"):
    """Write a unified diff under a line of prose; returns its path."""
    before = (checkout.folder / file).read_text()
    after = before.replace(old, new)
    lines = difflib.unified_diff(
        before.splitlines(True), after.splitlines(True), f"a/{file}", f"b/{file}"
    )
    path = checkout.folder.parent / name
    path.write_text(f"{prose}\n\n" + "".join(lines))
    return path


def test_diff_applies_to_the_best_and_is_named_by_its_prose(quick):
    first = diff_of(quick, "1.diff", "sharper answers", "SHARPNESS = 0.5", "SHARPNESS = 0.6")
    second = diff_of(
        quick, "2.diff", "count more slowly", "+= torch.bincount", "+= 0.5 * torch.bincount"
    )
    foreign = diff_of(quick, "3.diff", "easier", "60, 8192", "60, 4096", "prepare.py")
    done = quick.agent("--patches", first, second, foreign, "--tag", "t")
    assert done.returncode == 0, done.stderr
    described = [row["description"].split(" (")[0] for row in quick.rows()]
    assert described == ["baseline", "sharper answers", "count more slowly"]
    assert "rejected: 3.diff" in done.stderr
    tried = quick.git("show", "refs/autoresearch/t/2:train.py")
    assert "SHARPNESS = 0.6" in tried and "0.5 * torch.bincount" in tried


def test_the_sampler_needs_no_key_and_its_keeps_cherry_pick(quick):
    done = quick.agent("--experiments", "6", "--tag", "t")
    assert done.returncode == 0, done.stderr
    assert "an API key is not set" in done.stderr
    assert numbers_tried(quick) == list(range(7)) and len(quick.refs()) == 6
    assert len(done.stdout.splitlines()) == len(quick.rows())
    kept = quick.git("rev-list", "--reverse", "main..autoresearch/t").split()
    assert len(kept) == statuses(quick).count("keep") - 1 >= 2
    quick.git("switch", "-q", "-c", "picked", "main")
    for commit in kept:
        quick.git("cherry-pick", commit)
    assert quick.git("diff", "autoresearch/t", "HEAD", "--", "train.py") == ""


# The stand-in runs nothing: what divides by zero fails at once, or after the two steps of a screen.
DIVIDES = """\
open(f"{args.folder}/run{suffix}.log", "a").write(str(dict(os.environ)))
if "1 / 0" in source and not ("steps > 5" in source and "--screen" in words):
    result = {"status": "crash", "reason": "ZeroDivisionError: division", "total_seconds": 0.1}
"""


def test_good_invalid_duplicate_and_refused_replies_each_get_what_they_deserve(quick, api):
    stand_in(quick, more=DIVIDES)
    server = api(
        proposal("SHARPNESS = 0.5", "SHARPNESS = 0.6", "sharper"),  # experiment 1, kept
        proposal("SHARPNESS = 0.5", "SHARPNESS = 0.7"),  # waits, and then matches nowhere any more
        proposal("steps", "stops"),  # matches often
        proposal("SHARPNESS = 0.6", "SHARPNESS = (0.7"),  # does not compile
        proposal("SHARPNESS = 0.6", "SHARPNESS = 0.4", "blunter"),  # experiment 2, dropped
        proposal("SHARPNESS = 0.6", "SHARPNESS = 0.4"),  # duplicate of 2
        proposal("SHARPNESS = 0.6", "SHARPNESS = 0.6  # sharp"),  # a comment
        (None, "refusal"),
        ("prose only", "end_turn"),  # the third repair turn: given up, a fresh conversation
        ({"description": "x"}, "tool_use"),  # against the schema
        proposal("a", "b", file="prepare.py"),  # another file
        (proposal("SHARPNESS = 0.6", "SHARPNESS = 0.61"), "max_tokens"),  # cut off
        proposal("model = Toy", "model = Foy", "never matches"),
        proposal("model, steps = Toy(), 0", "model, steps = Toy(), 1 / 0"),  # fails at once
        proposal("steps += 1", late("1 / 0"), "divide"),  # experiment 3
    )
    done = quick.agent("--experiments", "3", "--tag", "t", env=server.env)
    assert done.returncode == 0, done.stderr
    rows = quick.rows()
    assert [(row["status"], row["description"].split(" (")[0]) for row in rows] == [
        ("keep", "baseline"),
        ("keep", "sharper"),
        ("discard", "blunter"),
        ("crash", "divide"),
    ]
    assert done.stderr.count("rejected: ") == 11 and not server.replies
    (told,) = server.requests[-1]["messages"][-1]["content"]
    assert "fails in two steps" in told["content"] and "ZeroDivisionError" in told["content"]
    assert done.stderr.count("an idea: dropped, The SEARCH of edit 1 matches nowhere") == 1
    assert len(re.findall("This is experiment 2 again.*blunter", done.stderr)) == 1
    assert all(float(row["cost_usd"]) > 0 for row in rows[1:])
    seen = (quick.folder / "runs/t/1/run.log").read_text()  # the environment of the referee
    assert "AUTORESEARCH_SCALE" in seen and "ANTHROPIC" not in seen and "sk-test" not in seen


def prefix(request):
    """Return the texts of a request up to the last one that is marked for the cache."""
    blocks = [*request["system"], *request["messages"][0]["content"]]
    marked = [i for i, block in enumerate(blocks) if "cache_control" in block]
    return [block["text"] for block in blocks[: marked[-1] + 1]]


@pytest.mark.gate
def test_the_second_call_reads_the_prefix_of_the_first_from_the_cache(quick, api):
    server = api(
        proposal("SHARPNESS = 0.5", "SHARPNESS = 0.4", "blunter"),
        proposal("SHARPNESS = 0.5", "SHARPNESS = 0.3", "blunter still"),
        proposal("SHARPNESS = 0.5", "SHARPNESS = 0.2", "blunt"),
    )
    done = quick.agent("--experiments", "3", "--model", "claude-sonnet-5-5", env=server.env)
    assert done.returncode == 0, done.stderr
    first, second, third = server.requests
    assert prefix(first) == prefix(second) == prefix(third)
    assert "1. blunter" in second["messages"][0]["content"][-1]["text"]  # is under way
    assert "1. discard" in third["messages"][0]["content"][-1]["text"]
    costs = [float(row["cost_usd"]) for row in quick.rows()[1:]]
    assert costs[1] < 0.2 * costs[0]
    assert first["tools"][0]["strict"] is True and first["stream"] is True


def test_the_best_is_measured_again_after_a_plateau(quick):
    quick.exchange("agent.py", "MEASURE_AFTER = 10", "MEASURE_AFTER = 3")
    worse = sharpness(quick, 0.4, 0.41, 0.42, 0.43)
    done = quick.agent("--patches", *worse, "--tag", "t")
    assert done.returncode == 0, done.stderr
    assert statuses(quick) == ["keep", *["discard"] * 3, "measure", "discard"]
    measured = quick.rows()[-2]
    assert (measured["experiment"], measured["runs"]) == ("0", "1")
    assert measured["commit"] == quick.rows()[0]["commit"]
    assert quick.refs() == [f"refs/autoresearch/t/{n}" for n in range(1, 5)]


def test_lost_rows_and_a_lost_branch_come_back_from_git(quick):
    (patch,) = sharpness(quick, 0.6)
    assert quick.agent("--patches", patch, "--tag", "t").returncode == 0
    rows, tip = quick.rows(), quick.git("rev-parse", "autoresearch/t")
    (quick.folder / "results.tsv").unlink()
    quick.git("update-ref", "-d", "refs/heads/autoresearch/t")
    assert quick.agent("--patches", patch).returncode == 0
    assert quick.rows() == rows and quick.git("rev-parse", "autoresearch/t") == tip


# ---------------------------------------------------------------------------
# Bad input: two lines, exit code 1, nothing changed
# ---------------------------------------------------------------------------


def refused(checkout, *arguments, env=None):
    """Run agent.py, check that it ends with two lines and changes nothing; return the first."""
    before = checkout.git("for-each-ref"), os.path.exists(checkout.folder / "results.tsv")
    done = checkout.agent(*arguments, env=env)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and not done.stdout, done.stderr
    assert lines[-2].startswith("error: ") and lines[-1].startswith("hint: "), lines
    assert len(lines) == 2 or "too little text" in lines[-2], lines
    assert before == (checkout.git("for-each-ref"), os.path.exists(checkout.folder / "results.tsv"))
    return lines[-2]


def test_checkout_that_is_not_ready_is_refused(checkout):
    checkout.write_train(TOY + "\n# edited\n")
    assert "not committed as it stands" in refused(checkout)
    (checkout.folder / "train.py").unlink()
    assert "missing" in refused(checkout)
    checkout.write_train(TOY)
    (checkout.folder / "results.tsv").write_text("id\tloss\n1\t2\n")
    assert "foreign header" in refused(checkout)


def test_folder_without_git_is_refused(checkout):
    (checkout.folder / ".git").rename(checkout.folder.parent / "git")
    done = checkout.agent()
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "git init" in done.stderr


def test_bad_settings_are_refused(checkout, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "little").mkdir()
    (tmp_path / "little" / "a.txt").write_text("too little text\n" * 50)
    assert "no positive number" in refused(checkout, "--budget", "0")
    assert "unknown scale" in refused(checkout, env={"AUTORESEARCH_SCALE": "tpu"})
    assert "no such file" in refused(checkout, "--corpus", str(tmp_path / "nowhere"))
    assert "too little text" in refused(checkout, "--corpus", str(tmp_path / "empty"))
    assert "too little text" in refused(checkout, "--corpus", str(tmp_path / "little"))
    assert "no such file" in refused(checkout, "--patches", str(tmp_path / "no.diff"))
    assert "needs a key" in refused(checkout, "--proposer", "claude")
    for key in ("sk-a\r", "sk-ä"):
        assert "what no key can" in refused(checkout, env={"ANTHROPIC_API_KEY": key})
    local = {"ANTHROPIC_API_KEY": "sk-test-key", "ANTHROPIC_BASE_URL": "localhost:1"}
    assert "no http address" in refused(checkout, env=local)
    for tag in ("a..b", "x.lock", "x.", "-x", "ä"):
        assert "branch name" in refused(checkout, f"--tag={tag}", "--experiments", "0")
    done = checkout.agent("--hours=nan")
    assert done.returncode == 2 and "--hours: invalid amount value: 'nan'" in done.stderr


@pytest.mark.parametrize("read, text", [
    (agent.amount, "-1"), (agent.amount, "inf"), (agent.amount, "nan"), (agent.amount, "x"),
    (agent.count, "-3"), (agent.count, "1.5"), (agent.share, "1.1"), (agent.indices, "0,-1"),
])  # fmt: skip
def test_a_number_that_makes_no_sense_is_none(read, text):
    with pytest.raises(ValueError):  # which argparse tells in words of its own
        read(text)


def test_a_refused_key_ends_the_run_before_the_baseline(quick, api):
    server = api()
    server.status, server.error_type = 401, "authentication_error"
    assert "refuses" in refused(quick, env=server.env)
    assert not server.requests and not (quick.folder / "runs").exists()


@pytest.mark.gate
def test_a_branch_that_somebody_looks_at_is_not_moved_under_them(quick):
    first, second = sharpness(quick, 0.6, 0.8)
    assert quick.agent("--patches", first, "--tag", "t").returncode == 0
    beside = quick.folder.parent / "beside"
    quick.git("worktree", "add", "-q", str(beside), "autoresearch/t")
    done = quick.agent("--patches", second, "--tag", "t")
    assert [row["status"] for row in quick.rows()] == ["keep"] * 3, done.stderr
    assert quick.git("-C", str(beside), "status", "--porcelain") == ""
    best = quick.git("rev-parse", "refs/autoresearch/t/2")
    assert done.stderr.splitlines()[-1].endswith(f"..{best[:7]}")
    quick.git("worktree", "remove", str(beside))
    done = quick.agent("--patches", second, "--tag", "t")
    assert quick.git("rev-parse", "autoresearch/t") == best
    assert done.stderr.splitlines()[-1].endswith("..autoresearch/t")
    quick.git("switch", "-q", "autoresearch/t")
    assert "own branch" in refused(quick, "--tag", "t")


@pytest.mark.gate
def test_a_baseline_that_fails_ends_the_run_before_any_paid_call(quick, api):
    server = api()
    crash = '{"status": "crash", "reason": "ended without finish", "total_seconds": 0.1}'
    stand_in(quick, more=f"result = {crash}")
    done = quick.agent("--tag", "t", env=server.env)
    assert done.returncode == 1
    assert one_error(done) == "the baseline fails: ended without finish"
    assert not server.requests and not quick.refs() and not quick.refs("refs/autoresearch-measure")
    assert not (quick.folder / "results.tsv").exists()


# ---------------------------------------------------------------------------
# The program itself
# ---------------------------------------------------------------------------


@pytest.mark.gate
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_agent_stays_small_and_never_imports_torch(quick, api):
    """Measure the peak memory of a run with a language model, with optuna and all other imports."""
    server = api(proposal("SHARPNESS = 0.5", "SHARPNESS = 0.4"))
    probe = (
        "import json, sys; import agent, optuna; sys.argv[1:] = ['--experiments', '1']; "
        "code = agent.main(); status = open('/proc/self/status').read(); "
        "peak = int(status.split('VmHWM:')[1].split()[0]) / 1024; "
        "print(json.dumps([code, peak, 'torch' in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=quick.folder,
        env=quick.env | server.env,
        capture_output=True,
        encoding="utf-8",
    )
    code, megabytes, torch = json.loads(done.stdout.splitlines()[-1])
    assert code == 0 and megabytes < 150 and not torch, done.stderr
