"""rule.py: the keep rule, and the noise that it learns from repeated runs."""

import math
import random
import statistics

import numpy as np
import pytest

import journal
from rule import Noise, judge, level

SIGMA = 0.01


def verdict(*values, best=(1.0,) * 3, risk=0.1, simpler=False):
    """Return what the rule says of runs on different seeds."""
    own = {-n: value for n, value in enumerate(values, 1)}
    return judge(own, dict(enumerate(best)), Noise(SIGMA), risk, 1.0, simpler)[0]


def errors(count, runs=3):
    """Return so many standard errors of the difference between two means."""
    return count * SIGMA * math.sqrt(1 / runs + 1 / 3)


def test_gain_of_over_three_standard_errors_is_kept_at_once():
    assert verdict(1 - errors(3.5, 1)) == "keep"
    assert verdict(1 - errors(3.3, 1)) == "again"


def test_worse_than_the_best_is_dropped_after_one_run():
    assert verdict(1 + 0.1 * SIGMA) == "discard"


@pytest.mark.parametrize("risk, needed", [(0.1, 1.2816), (0.002, 2.8782)])
def test_confirmation_needs_the_standard_errors_of_the_level(risk, needed):
    for runs in (2, 3, 4):
        assert verdict(*[1 - errors(needed + 0.01, runs)] * runs, risk=risk) == "keep"
        weak = verdict(*[1 - errors(needed - 0.01, runs)] * runs, risk=risk)
        assert weak == ("again" if runs < 4 else "discard")


def test_simplification_may_lose_half_a_sigma_but_only_by_the_mean_of_two():
    assert verdict(1 + 0.4 * SIGMA, simpler=True) == "again"
    assert verdict(1 + 0.4 * SIGMA, 1 + 0.4 * SIGMA, simpler=True) == "keep"
    assert verdict(1 + 0.6 * SIGMA, simpler=True) == "discard"
    assert verdict(1 + 0.4 * SIGMA, 1 + 0.7 * SIGMA, simpler=True) == "discard"


def test_gain_too_good_to_be_true_is_set_aside():
    best, noise = dict.fromkeys(range(3), 1.0), Noise(SIGMA)
    assert judge({0: 0.5}, best, noise, 0.1, 1.0, False)[1].startswith("suspicious")
    assert judge({0: 0.96}, best, Noise(0.001), 0.1, 1.0, False) == ("keep", "")  # under 5 %
    assert judge({0: 0.5}, best, noise, 0.1, 0.55, False) == ("keep", "")  # seen before


def test_runs_on_equal_seeds_are_compared_in_pairs():
    best, noise = {1: 1.0, 2: 1.02, 3: 0.98}, Noise(SIGMA, shared=0.8)
    own = {seed: value - errors(1, 1) for seed, value in best.items()}  # 2 / sqrt(3) sigma less
    assert judge(own, best, noise, 0.05, 1.0, False)[0] == "keep"
    apart = {-seed: value for seed, value in own.items()}
    assert judge(apart, best, noise, 0.05, 1.0, False)[0] == "again"
    hard_seed = {2: 1.01}  # The best lost as much on it, which is known by its two other runs.
    assert judge(hard_seed, best, noise, 0.05, 1.0, False)[0] == "again"
    assert judge({-2: 1.01}, best, noise, 0.05, 1.0, False)[0] == "discard"


@pytest.mark.parametrize("seeds", ["1 123", "1 2", "12 123", "123 12", "123 1234"])
@pytest.mark.parametrize("shared", [0.0, 0.6])
def test_the_comparison_is_generalised_least_squares(seeds, shared):
    """Compare with the textbook's formula on the covariances of all runs."""
    draw = random.Random(1)
    old, new = ({int(seed): draw.gauss(1, SIGMA) for seed in each} for each in seeds.split())
    runs = [(side, seed) for side, each in enumerate((old, new)) for seed in each]
    covariance = np.array([[shared * (a[1] == b[1]) for b in runs] for a in runs])
    np.fill_diagonal(covariance, 1)
    design = np.array([[side == 0, side == 1] for side, _ in runs], dtype=float)
    weights = design.T @ np.linalg.inv(covariance)
    means = np.linalg.inv(weights @ design)
    first, second = means @ weights @ [(old, new)[side][seed] for side, seed in runs]
    gain, error = Noise(SIGMA, shared).compare(old, new)
    assert gain == pytest.approx(first - second)
    assert error == pytest.approx(SIGMA * math.sqrt(np.array([1, -1]) @ means @ [1, -1]))


def test_the_variance_that_seeds_share_is_learnt_from_repeated_runs():
    """The true correlation is 0.8, then 0; a hundred candidates have eight runs each."""
    nothing = journal.Run("t", {"sigma": SIGMA}, "start").noise()
    for common in (0.8, 0.0):
        draw, run = random.Random(2), journal.Run("t", {"sigma": SIGMA}, "start")
        shared = [draw.gauss(0, SIGMA * math.sqrt(common)) for _ in range(8)]
        for number in range(100):
            own = [x + draw.gauss(0, SIGMA * math.sqrt(1 - common)) for x in shared]
            tried = journal.Experiment(number, "", values=own, seeds=list(range(8)))
            run.history.append(tried)
        assert run.noise().shared == pytest.approx(common, abs=0.1)
        for e in run.history[1:]:
            e.draws = [1.0] * 8  # not what the first one drew
        assert run.noise().shared == nothing.shared
    run.history = run.history[:1]
    assert run.noise().shared == nothing.shared


def test_who_draws_other_numbers_on_a_seed_is_not_paired():
    """Judge a twin with other initial weights that is 1.5 sigma better where all others agree."""
    best, noise = journal.Experiment(0, "", values=[1.0] * 3, seeds=[1, 2, 3]), Noise(SIGMA, 0.98)
    twin = journal.Experiment(1, "", values=[1 - 1.5 * SIGMA], seeds=[1])
    for draws, verdict in (([7.0], "again"), ([], "keep")):
        twin.draws = draws
        scores = journal.undisturbed([twin]), journal.undisturbed([best])
        assert judge(*scores, noise, 0.01, 1.0, False)[0] == verdict


def test_pairs_that_agree_are_soon_enough_to_keep_what_gains_half_a_sigma():
    """Judge the gains of a real run with a token budget, where nothing but the edit differs."""
    gains, sigma, seeds = (0.0084, 0.0082, 0.0094, 0.0091), 0.016, [1, 2, 3, 4]
    scatter = [random.Random(seed).gauss(0, sigma) for seed in seeds]
    loss, gain = ([x - sign * y for x, y in zip(scatter, gains, strict=True)] for sign in (-1, 1))
    run = journal.Run("t", {"sigma": sigma}, "start")
    for number, values in enumerate((scatter, loss)):
        e = journal.Experiment(number, "", values=values, seeds=seeds)
        e.status = ("keep", "discard")[number]
        run.history.append(e)
    done = journal.Experiment(2, "", values=gain, seeds=seeds)
    scores, best = journal.undisturbed([done]), run.scores_of(0)
    for noise, verdict in ((run.noise(done), "keep"), (Noise(sigma), "discard")):
        assert judge(scores, best, noise, level(run.history), 0.0, False)[0] == verdict


def test_a_pair_apart_by_an_accident_does_not_end_what_equal_seeds_are_worth():
    run = journal.Run("t", {"sigma": SIGMA}, "start")
    for number in range(40):
        own = [random.Random(number).gauss(0, SIGMA / 10), 0.0]
        own[0] += 100 * SIGMA * (number == 20)
        run.history.append(journal.Experiment(number, "", values=own, seeds=[1, 2]))
    assert run.noise().shared > 0.8


def judged(*statuses):
    """Return a history with these verdicts; s is a keep for being simpler."""
    names = {"k": "keep", "d": "discard", "c": "crash", "s": "keep", "m": "measure"}
    return [journal.Experiment(0, "", status="keep")] + [
        journal.Experiment(n, "", status=names[status], reason="simpler" * (status == "s"),
                           values=[1.0])
        for n, status in enumerate("".join(statuses), 1)
    ]


def test_a_keep_makes_the_next_one_easier_and_drops_make_it_harder():
    assert level(judged()) == 0.1 * 0.02
    assert level(judged("k")) == 0.2 > level(judged("k", "d" * 20)) > 0.01
    assert level(judged("cm")) == level(judged())  # are no tests
    unfit = judged("kd")
    unfit[-1].values = []  # did not fit on the new best
    assert level(unfit) == level(judged("k")) and level(judged("kd")) <= level(judged("k"))
    assert level(judged("s")) < level(judged())  # finds nothing
    levels = [level(judged("k", "d" * n)) for n in range(100)]
    assert levels == sorted(levels, reverse=True) and levels[-1] > 0


def test_of_fifty_candidates_without_substance_none_is_kept_most_of_the_time():
    """Judge 200 histories of A/A pairs by the rule, and by keeping whatever scores lower."""
    draw, none, greedy = random.Random(1), 0, 0
    for _ in range(200):
        best, history, lowest = {n: draw.gauss(1, SIGMA) for n in range(3)}, judged(), 2.0
        for number in range(1, 51):
            own, status = {}, "again"
            while status == "again":
                own[number, len(own)] = draw.gauss(1, SIGMA)
                status = judge(own, best, Noise(SIGMA), level(history), 0.9, False)[0]
            first = own[number, 0]
            greedy, lowest = greedy + (first < lowest), min(lowest, first)
            best = own if status == "keep" else best
            history.append(journal.Experiment(number, "", status=status))
        none += all(e.status == "discard" for e in history[1:])
    assert none > 0.85 * 200 and greedy > 3 * 200


def test_sigma_starts_from_the_prior_and_follows_repeated_runs():
    run = journal.Run("t", {"sigma": 0.01}, "start")
    run.history = [journal.Experiment(0, "", status="keep", values=[1.0])]
    assert run.noise().sigma == pytest.approx(0.01)
    twice = {"status": "discard", "values": [1.0, 1.2]}
    run.history = [journal.Experiment(n, "", **twice) for n in range(500)]
    assert run.noise().sigma == pytest.approx(statistics.stdev([1.0, 1.2]), rel=0.01)


def test_one_diverging_run_does_not_make_noise_of_the_gains_to_come():
    run = journal.Run("t", {"sigma": 0.002}, "start")
    run.history = [journal.Experiment(0, "", status="keep", values=[1.0, 1.002, 0.998])]
    before = run.noise().sigma
    diverged = journal.Experiment(1, "", status="discard", values=[0.99, 5.0])
    run.history.append(diverged)
    assert before < run.noise().sigma < 2 * before
    run.history[0].values = [1.0]  # of an uneven machine
    assert run.noise().sigma < 2 * 0.002
    run.history = [journal.Experiment(0, "", status="keep", values=[1.0, 1.2, 0.8])]
    assert run.noise().sigma > 0.1  # what the baseline shows is believed


def test_code_in_a_string_is_no_simpler_and_prose_is_free():
    code = "def f(x):\n    return [x + i for i in range(10)]\n"
    assert journal.node_count(f"exec({code!r})") >= 0.6 * journal.node_count(code)
    told = code.replace(":\n", ":\n    'What it does, in a whole sentence.'\n", 1)
    assert journal.node_count(told) == journal.node_count(code) + 2
