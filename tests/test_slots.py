"""Slots that are never idle: the next idea while one is trained, and several runs at a time.

A stand-in for the referee measures nothing and takes a moment.
"""

import json
import random
import signal
import subprocess
import sys
import time

import pytest

from support.api_server import Fault, proposal
from support.checkout import Checkout
from support.checks import (
    assert_each_keep_sits_on_what_it_was_measured_against,
    numbers_tried,
    one_error,
    trailers,
)
from support.stand_in import STAND_IN, idea, sharpness, stand_in

ALL = (0.6, 0.65, 0.7, 0.45, 0.75, 0.8, 0.62, 0.85)


@pytest.fixture
def slow(tmp_path, cache):
    """A checkout with the stand-in for a referee, which takes a second."""
    checkout = Checkout(tmp_path / "checkout", cache)
    stand_in(checkout, "time.sleep(1.0)")
    return checkout


@pytest.mark.gate
def test_the_next_idea_is_had_while_one_is_trained_and_put_on_what_was_kept(slow, api):
    passes = proposal("PASSES = 4", "PASSES = 7", "more passes")
    server = api(idea(0.6), passes, idea(0.7))
    done = slow.agent("--experiments", "2", "--tag", "t", env=server.env)
    assert done.returncode == 0, done.stderr
    told = server.requests[1]["messages"][0]["content"][-1]["text"]
    assert "Under way" in told and "1. to 0.6" in told
    source = slow.git("show", "refs/autoresearch/t/2:train.py")
    assert "SHARPNESS = 0.6" in source and "PASSES = 7" in source
    for number in (1, 2):  # both knew the verdict on the baseline, and no other one
        assert trailers(slow, f"refs/autoresearch/t/{number}")["Saw"] == 1
    assert len(server.requests) == 2
    assert_each_keep_sits_on_what_it_was_measured_against(slow)


@pytest.mark.gate
def test_an_idea_that_fits_no_more_is_dropped_and_the_next_one_pays_for_it(slow, api):
    server = api(idea(0.6), idea(0.7), proposal("PASSES = 4", "PASSES = 7", "more passes"))
    done = slow.agent("--experiments", "2", "--tag", "t", env=server.env)
    assert done.returncode == 0 and "to 0.7: dropped, The SEARCH" in done.stderr, done.stderr
    rows = slow.rows()
    assert [row["description"] for row in rows[1:]] == ["to 0.6", "more passes"]
    spent = json.loads((slow.folder / "runs/t/spent.json").read_text())["cost_usd"]
    assert sum(float(row["cost_usd"]) for row in rows[1:]) == pytest.approx(spent, abs=2e-4)


@pytest.mark.gate
def test_what_is_running_is_finished_before_a_refused_key_ends_the_night(slow, api):
    error = {"type": "error", "error": {"type": "authentication_error", "message": "bad key"}}
    server = api(idea(0.6), Fault(401, json.dumps(error)))
    done = slow.agent("--experiments", "5", "--tag", "t", env=server.env)
    assert done.returncode == 1 and "bad key" in one_error(done)
    assert [row["description"] for row in slow.rows()] == ["baseline", "to 0.6"]


@pytest.mark.gate
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_slots_end_in_one_history_in_which_no_keep_was_measured_on_another_base(slow, slots):
    patches = sharpness(slow, *ALL)
    done = slow.agent("--tag", "t", "--slots", slots, "--patches", *patches)
    assert done.returncode == 0, done.stderr
    rows = slow.rows()
    assert numbers_tried(slow) == list(range(len(ALL) + 1))
    best = min(float(row["val_bpb"]) for row in rows)
    assert f"→ {best:.6f}" in done.stderr
    assert_each_keep_sits_on_what_it_was_measured_against(slow)
    assert ("once more, on top of the new best" in done.stderr) == (slots > 1)


@pytest.mark.gate
def test_two_slots_that_are_killed_lose_nothing_and_double_nothing(slow):
    choose, patches = random.Random(1), sharpness(slow, *ALL)
    command = [sys.executable, "agent.py", "--tag", "t", "--slots", "2", "--patches", *patches]
    for _ in range(8):
        started = subprocess.Popen(
            command, cwd=slow.folder, env=slow.env, stderr=subprocess.DEVNULL
        )
        time.sleep(choose.uniform(1.0, 5.0))
        started.kill()
        started.wait()
    done = slow.agent(*command[2:])
    assert done.returncode == 0, done.stderr
    assert numbers_tried(slow) == list(range(len(ALL) + 1))
    assert_each_keep_sits_on_what_it_was_measured_against(slow)


@pytest.mark.gate
def test_ctrl_c_ends_all_slots(slow):
    stand_in(slow, "time.sleep(30.0)")
    path = slow.folder / "referee.py"
    path.write_text(path.read_text().replace("sleep(30.0)", "sleep(30 * (value != 0.5))"))
    path.write_text(path.read_text().replace('open(f"', 'value = float(re.search(r"SHARPNESS = (.*)'
                                             '", source)[1])\nopen(f"', 1))  # fmt: skip
    slow.commit_all()
    started = subprocess.Popen(
        [sys.executable, "agent.py", "--tag", "t", "--slots", "2", "--patches",
         *map(str, sharpness(slow, 0.6, 0.7))], cwd=slow.folder, env=slow.env,
        stderr=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip
    while not all((slow.folder / f"runs/t/{n}/run.log").exists() for n in (1, 2)):
        assert started.poll() is None
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    said = started.communicate(timeout=30)[1]
    assert started.returncode == 130 and "goes on from here" in said, said
    left = subprocess.run(["pgrep", "-f", str(slow.folder)], capture_output=True)
    assert not left.stdout


@pytest.mark.gate
def test_an_idea_that_is_being_tried_out_outlives_ctrl_c(tmp_path, cache, api):
    checkout = Checkout(tmp_path / "checkout", cache)  # with the real referee, which takes longer
    server, command = api(idea(0.6)), ["agent.py", "--tag", "t", "--experiments", "1"]
    started = subprocess.Popen(
        [sys.executable, *command], cwd=checkout.folder, env=checkout.env | server.env,
        stderr=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip
    while not list(checkout.folder.glob("runs/t/screen-*/train.py")):
        assert started.poll() is None
        time.sleep(0.02)
    started.send_signal(signal.SIGINT)
    said = started.communicate(timeout=60)[1]
    assert started.returncode == 130, said
    done = checkout.agent(*command[1:], env=server.env)
    assert done.returncode == 0 and "going on with experiment 1: to 0.6" in done.stderr
    assert len(server.requests) == 1 and checkout.rows()[1]["description"] == "to 0.6"


def test_the_baseline_is_run_as_often_on_every_slot(tmp_path, cache):
    checkout = Checkout(tmp_path / "checkout", cache, baseline_runs=3)
    stand_in(checkout, "time.sleep(0.3)")
    done = checkout.agent("--tag", "t", "--slots", "2", "--experiments", "0")
    assert done.returncode == 0, done.stderr
    assert [row["runs"] for row in checkout.rows()] == ["4"]
    results = [json.loads(p.read_text()) for p in checkout.folder.glob("runs/t/0/result*.json")]
    assert len({result["seed"] for result in results}) == len(results) == 4


def test_slots_that_cannot_be_are_refused(slow):
    stand_in(slow)
    done = slow.agent("--gpus", "7")
    assert done.returncode == 1 and "--gpus" in one_error(done)
    path = slow.folder / "referee.py"
    hungry = STAND_IN.replace("STEP", "0.0").replace(
        'path = f"', 'result["peak_vram_mb"] = 1e9\npath = f"'
    )
    path.write_text(hungry)
    slow.commit_all()
    done = slow.agent("--slots", "2", "--tag", "t")
    assert done.returncode == 1 and "2 runs at a time" in one_error(done)
    assert not (slow.folder / "results.tsv").exists()
