"""The simulator of the loop, tests/benchmarks/simulate_slots.py: its clock is virtual, its loop the
program's own, and its arithmetic is checked by hand.
"""

import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import simulate_slots
from simulate_slots import Assumed, Simulation

KNOWN = Assumed()
EXACT = replace(
    KNOWN, sigma=0.0, effects=False, reply=0.0, reply_spread=0.0, start=0.0, evaluation=0.0,
    hidden=0.0, end=0.0, stretch_spread=0.0, speed_spread=0.0, disturbed=0.0, crashes=0.0,
    budget=100.0, calls=dict.fromkeys(simulate_slots.CALLS, 0.0),
)  # fmt: skip


def verdicts(simulation):
    found = simulation.verdicts
    return [(at, done.number, done.status, done.values, done.commit) for at, done in found]


def test_one_seed_is_one_history_and_another_seed_another():
    one, same, other = (verdicts(Simulation(KNOWN, 8, seed, 0.7).spend()) for seed in (1, 1, 2))
    assert one == same and len(one) > 20
    assert one != other


def test_eight_hours_pass_and_nothing_waits(monkeypatch):
    """Whoever sleeps, or waits for an event with a limit, would wait in real time."""

    def sleep(seconds):
        raise AssertionError(f"sleeps for {seconds} s")

    wait = threading.Event.wait

    def wait_without_limit(event, timeout=None):
        assert timeout is None, f"waits for {timeout} s"
        return wait(event)

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(threading.Event, "wait", wait_without_limit)
    simulation = Simulation(KNOWN, 1, hours=8).spend()
    assert simulation.clock.now > 8 * 3600
    assert 8 * 3600 / 400 < len(simulation.runs) < 8 * 3600 / 300  # of 300 s and a little more


def test_without_latency_and_noise_one_slot_does_what_is_computed_by_hand():
    simulation = Simulation(EXACT, 1, hours=1).spend()
    # A run starts at 0, 100, .., 3600: 3 of the baseline, 2 of the best again (of 5 in all).
    statuses = [done.status for _, done in simulation.verdicts]
    assert statuses.count("discard") == 37 - 3 - 2
    assert statuses.count("measure") == 2 and len(statuses) == 1 + 32 + 2
    assert simulation.clock.now == 3700 and sum(simulation.idle.values()) == 0


def test_two_slots_wait_for_one_reply_at_a_time():
    simulation = Simulation(replace(EXACT, reply=80.0), 2, experiments=6).spend()
    ends = [at for at, done in simulation.verdicts if done.number]
    # The first is asked for after 200 s of baseline, and the others one after another.
    assert ends == [200 + 80 * n + 100 for n in range(1, 7)]


@pytest.fixture(scope="class")
def seen() -> SimpleNamespace:
    """What each run was given, and which slots were free, in four hours on eight slots."""
    simulation = Simulation(KNOWN, 8, hours=4)
    seen = SimpleNamespace(simulation=simulation, bases={}, paired=[], slots=[])
    train_once, wait = simulation.train_once, simulation.clock.wait

    def recorded_train_once(run, task, *rest):
        if task.base:
            seen.bases[task.done.number] = task.base.commit
        if task.kind == "idea" and task.done.runs and simulation.clock.now < simulation.until:
            seen.paired.append(task.seed in run.seeds_of(task.base.number))
        return train_once(run, task, *rest)

    def recorded_wait(*arguments):
        if simulation.clock.now < simulation.until:
            loop = simulation.night
            seen.slots.append((len(loop.free), len(loop.waiting)))
        return wait(*arguments)

    simulation.train_once, simulation.clock.wait = recorded_train_once, recorded_wait
    simulation.spend()
    return seen


@pytest.mark.gate
class TestFourHoursOnEightSlots:
    def test_each_keep_was_measured_on_what_it_sits_on(self, seen):
        simulation = seen.simulation
        kept = [done for _, done in simulation.verdicts if done.status == "keep"]
        assert len(kept) > 5 and any("once more" in text for text in simulation.said)
        for before, done in zip(kept, kept[1:], strict=False):
            base = seen.bases[done.number]
            assert simulation.git.parents[done.commit] == base == before.commit
        assert simulation.git.refs["refs/heads/autoresearch/t"] == kept[-1].commit

    def test_an_idea_runs_again_on_a_seed_that_its_base_has_run_on(self, seen):
        assert len(seen.paired) > 20 and all(seen.paired)

    def test_no_slot_is_idle_while_an_idea_waits(self, seen):
        assert any(free for free, _ in seen.slots)
        assert any(waiting for _, waiting in seen.slots)
        assert not [(free, waiting) for free, waiting in seen.slots if free and waiting]
