"""Slots that are never idle: the next idea while one is trained, and several runs at a time.

A stand-in for the referee measures nothing, and can be held up until the test lets it go.
"""

import json
import random
import signal
import subprocess

import pytest

from support.api_server import Fault, proposal
from support.checkout import Checkout
from support.checks import (
    assert_each_keep_sits_on_what_it_was_measured_against,
    numbers_tried,
    one_error,
    trailers,
)
from support.stand_in import idea, let_go, sharpness, stand_in, start_agent
from support.waiting import wait_until

ALL = (0.6, 0.65, 0.7, 0.45, 0.75, 0.8, 0.62, 0.85)
HOLD_IDEAS = "value != 0.5 and hold()"  # all but the baseline


@pytest.fixture
def held(checkout):
    """A checkout whose stand-in holds up every run but the baseline's, until let_go."""
    stand_in(checkout, HOLD_IDEAS)
    return checkout


def finish(started):
    """Wait for agent.py to end by itself, and return what it said."""
    said = started.communicate(timeout=600)[1]
    assert started.returncode == 0, said
    return said


def test_the_next_idea_is_had_while_one_is_trained_and_put_on_what_was_kept(held, api):
    def second_idea(request):
        wait_until((held.folder / "runs/t/1/run.log").exists)
        assert not list(held.folder.glob("runs/t/1/result*.json"))  # It is being trained.
        let_go(held)
        return proposal("PASSES = 4", "PASSES = 7", "more passes")

    server = api(idea(0.6), second_idea, idea(0.7))
    done = held.agent("--experiments", "2", "--tag", "t", env=server.env)
    assert done.returncode == 0, done.stderr
    told = server.requests[1]["messages"][0]["content"][-1]["text"]
    assert "Under way" in told and "1. to 0.6" in told
    source = held.git("show", "refs/autoresearch/t/2:train.py")
    assert "SHARPNESS = 0.6" in source and "PASSES = 7" in source
    for number in (1, 2):  # both knew the verdict on the baseline, and no other one
        assert trailers(held, f"refs/autoresearch/t/{number}")["Saw"] == 1
    assert len(server.requests) == 2
    assert_each_keep_sits_on_what_it_was_measured_against(held)


def test_an_idea_that_fits_no_more_is_dropped_and_the_next_one_pays_for_it(quick, api):
    server = api(idea(0.6), idea(0.7), proposal("PASSES = 4", "PASSES = 7", "more passes"))
    done = quick.agent("--experiments", "2", "--tag", "t", env=server.env)
    assert done.returncode == 0 and "to 0.7: dropped, The SEARCH" in done.stderr, done.stderr
    rows = quick.rows()
    assert [row["description"] for row in rows[1:]] == ["to 0.6", "more passes"]
    spent = json.loads((quick.folder / "runs/t/spent.json").read_text())["cost_usd"]
    assert sum(float(row["cost_usd"]) for row in rows[1:]) == pytest.approx(spent, abs=2e-4)


@pytest.mark.gate
def test_what_is_running_is_finished_before_a_refused_key_ends_the_run(held, api):
    error = {"type": "error", "error": {"type": "authentication_error", "message": "bad key"}}
    server = api(idea(0.6), Fault(401, json.dumps(error)))
    started = start_agent(held, "--experiments", 5, env=server.env)
    wait_until((held.folder / "runs/t/1/run.log").exists, started)
    wait_until(lambda: len(server.requests) == 2, started)
    let_go(held)
    said = started.communicate(timeout=600)[1]
    assert started.returncode == 1 and "bad key" in said.splitlines()[-2], said
    assert [row["description"] for row in held.rows()] == ["baseline", "to 0.6"]


@pytest.mark.parametrize("slots", [
    pytest.param(1, marks=pytest.mark.nightly), 2, pytest.param(3, marks=pytest.mark.nightly)
])  # fmt: skip
def test_slots_end_in_one_history_in_which_no_keep_was_measured_on_another_base(held, slots):
    """The first ideas, one for each slot, are all measured against the baseline."""
    patches = sharpness(held, *ALL)
    started = start_agent(held, "--slots", slots, "--patches", *patches)
    for number in range(1, slots + 1):
        wait_until((held.folder / f"runs/t/{number}/run.log").exists, started)
    let_go(held)
    said = finish(started)
    rows = held.rows()
    assert numbers_tried(held) == list(range(len(ALL) + 1))
    best = min(float(row["val_bpb"]) for row in rows)
    assert f"→ {best:.6f}" in said
    assert_each_keep_sits_on_what_it_was_measured_against(held)
    assert ("once more, on top of the new best" in said) == (slots > 1)


def events(checkout):
    """Count what two slots have written: lines of the log, and files of experiments."""
    folder = checkout.folder / "runs/t"
    log = folder / "agent.log"
    lines = log.read_bytes().count(b"\n") if log.exists() else 0
    return lines + len(list(folder.glob("*/*.json"))) + len(list(folder.glob("*/run*.log")))


@pytest.mark.gate
def test_two_slots_that_are_killed_lose_nothing_and_double_nothing(quick):
    """Kill it after so many lines of the log and files that it has a new one, drawn by chance."""
    choose, kills = random.Random(1), 0
    words = ["--slots", "2", "--patches", *map(str, sharpness(quick, *ALL))]
    for _ in range(5):
        started, goal = start_agent(quick, *words), events(quick) + choose.randint(3, 25)
        wait_until(lambda s=started, g=goal: events(quick) >= g or s.poll() is not None)
        started.kill()
        kills += started.wait() == -signal.SIGKILL
        started.stderr.close()
    done = quick.agent("--tag", "t", *words)
    assert done.returncode == 0, done.stderr
    assert kills >= 3, "it was over before most of the kills"
    assert numbers_tried(quick) == list(range(len(ALL) + 1))
    assert_each_keep_sits_on_what_it_was_measured_against(quick)


@pytest.mark.gate
def test_ctrl_c_ends_all_slots(held):
    started = start_agent(held, "--slots", 2, "--patches", *sharpness(held, 0.6, 0.7))
    for number in (1, 2):
        wait_until((held.folder / f"runs/t/{number}/run.log").exists, started)
    started.send_signal(signal.SIGINT)
    said = started.communicate(timeout=600)[1]
    assert started.returncode == 130 and "goes on from here" in said, said

    def left():
        found = subprocess.run(["pgrep", "-f", held.folder], capture_output=True)
        return found.stdout

    wait_until(lambda: not left())  # They are still held, and would wait for ever.
    assert len(held.rows()) == 1


@pytest.mark.gate
def test_an_idea_that_is_being_screened_outlives_ctrl_c(checkout, api):
    stand_in(checkout, more='"--screen" in words and hold()')
    server = api(idea(0.6))
    started = start_agent(checkout, "--experiments", 1, env=server.env)
    wait_until(lambda: list(checkout.folder.glob("runs/t/screen-*/run.log")), started)
    started.send_signal(signal.SIGINT)
    said = started.communicate(timeout=600)[1]
    assert started.returncode == 130, said
    let_go(checkout)
    done = checkout.agent("--tag", "t", "--experiments", "1")  # No key is needed any more.
    assert done.returncode == 0 and "going on with experiment 1: to 0.6" in done.stderr
    assert len(server.requests) == 1 and checkout.rows()[1]["description"] == "to 0.6"


def test_the_baseline_is_run_as_often_on_every_slot(tmp_path, cache):
    """Three runs of it are made four on two slots, of which two are under way at a time."""
    checkout = Checkout(tmp_path / "checkout", cache, baseline_runs=3)
    stand_in(checkout, "hold()")
    started = start_agent(checkout, "--slots", 2, "--experiments", 0)
    for name in ("run.log", "run-2.log"):
        wait_until((checkout.folder / "runs/t/0" / name).exists, started)
    let_go(checkout)
    finish(started)
    assert [row["runs"] for row in checkout.rows()] == ["4"]
    results = [json.loads(p.read_text()) for p in checkout.folder.glob("runs/t/0/result*.json")]
    assert len({result["seed"] for result in results}) == len(results) == 4


def test_slots_that_cannot_be_are_refused(checkout):
    stand_in(checkout, more='result["peak_vram_mb"] = 1e9')
    done = checkout.agent("--gpus", "7")
    assert done.returncode == 1 and "--gpus" in one_error(done)
    done = checkout.agent("--slots", "2", "--tag", "t")
    assert done.returncode == 1 and "2 runs at a time" in one_error(done)
    assert not (checkout.folder / "results.tsv").exists()
