"""The simulator of nights: its clock is virtual, its loop the program's, its arithmetic by hand."""

import time
from dataclasses import replace

import simulate_slots
from simulate_slots import Assumed, Simulation

KNOWN = Assumed()
EXACT = replace(
    KNOWN, sigma=0.0, effects=False, reply=0.0, reply_spread=0.0, start=0.0, evaluation=0.0,
    hidden=0.0, end=0.0, stretch_spread=0.0, speed_spread=0.0, disturbed=0.0, crashes=0.0,
    budget=100.0, calls=dict.fromkeys(simulate_slots.CALLS, 0.0),
)  # fmt: skip


def history(night):
    return [(at, done.number, done.status, done.values, done.commit) for at, done in night.verdicts]


def test_one_seed_is_one_history_and_another_seed_another():
    one, same, other = (history(Simulation(KNOWN, 8, seed, 2).spend()) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_eight_hours_pass_in_seconds_and_nothing_sleeps():
    began = time.monotonic()
    night = Simulation(KNOWN, 1, hours=8).spend()
    assert night.clock.now > 8 * 3600
    assert time.monotonic() - began < 60


def test_without_latency_and_noise_one_slot_does_what_is_computed_by_hand():
    night = Simulation(EXACT, 1, hours=1).spend()
    # A run starts at 0, 100, .., 3600: 3 of the baseline, 2 of the best again (of 5 in all).
    statuses = [done.status for _, done in night.verdicts]
    assert statuses.count("discard") == 37 - 3 - 2
    assert statuses.count("measure") == 2 and len(statuses) == 1 + 32 + 2
    assert night.clock.now == 3700 and sum(night.idle.values()) == 0


def test_two_slots_wait_for_one_reply_at_a_time():
    night = Simulation(replace(EXACT, reply=80.0), 2, experiments=6).spend()
    ends = [at for at, done in night.verdicts if done.number]
    # The first is asked for after 200 s of baseline, and the others one after another.
    assert ends == [200 + 80 * n + 100 for n in range(1, 7)]


def test_each_keep_was_measured_on_what_it_sits_on():
    night, bases = Simulation(KNOWN, 8, hours=4), {}
    inner = night.train_once

    def train_once(run, task, *rest):
        if task.base:
            bases[task.done.number] = task.base.commit
        return inner(run, task, *rest)

    night.train_once = train_once
    night.spend()
    kept = [done for _, done in night.verdicts if done.status == "keep"]
    assert len(kept) > 5 and any("once more" in text for text in night.said)
    for before, done in zip(kept, kept[1:], strict=False):
        assert night.git.parents[done.commit] == bases[done.number] == before.commit
    assert night.git.refs["refs/heads/autoresearch/t"] == kept[-1].commit


def test_an_idea_runs_again_on_a_seed_that_its_base_has_run_on():
    night, paired = Simulation(KNOWN, 4, hours=6), []
    inner = night.train_once

    def train_once(run, task, *rest):
        if task.kind == "idea" and task.done.runs and night.clock.now < night.until:
            paired.append(task.seed in run.seeds_of(task.base.number))
        return inner(run, task, *rest)

    night.train_once = train_once
    night.spend()
    assert len(paired) > 20 and all(paired)


def test_no_slot_is_idle_while_an_idea_waits():
    night = Simulation(KNOWN, 8, hours=2)
    inner, seen = night.clock.wait, []

    def wait(*arguments):
        if night.clock.now < night.until:
            seen.append((len(night.night.free), len(night.night.waiting)))
        return inner(*arguments)

    night.clock.wait = wait
    night.spend()
    assert any(free for free, _ in seen) and any(waiting for _, waiting in seen)
    assert not [(free, waiting) for free, waiting in seen if free and waiting]
