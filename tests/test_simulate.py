"""The keep rule in simulated histories whose effects are known, by tests/benchmarks/simulate.py.

python -m pytest tests/test_simulate.py -m nightly   # the whole table of the README

Every history has a fixed seed, but any edit of the rule draws all of them anew. So a mean misses
its bound only if it lies more than three of its standard errors beyond it.
"""

import math
import statistics
from collections.abc import Sequence

import pytest
import simulate

from support.checkout import ROOT

COLUMNS = ("gain", "false", "inflation", "tried", "covered", "none")  # of the README's table


def histories(rule, sigma: float, count: int, common: float = simulate.COMMON) -> list:
    return [simulate.Night(rule, sigma, seed, common) for seed in range(count)]


def error_of(values: Sequence[float]) -> float:
    """Return the standard error of a mean."""
    return statistics.stdev(values) / math.sqrt(len(values))


def assert_at_least(values: Sequence[float], bound: float) -> None:
    """Check a mean against a lower bound, less three standard errors."""
    mean, error = statistics.fmean(values), error_of(values)
    assert mean >= bound - 3 * error, f"{mean:.4f} ± {error:.4f}, at least {bound} is asked for"


def assert_at_most(values: Sequence[float], bound: float) -> None:
    assert_at_least([-value for value in values], -bound)


def assert_share(found: Sequence[bool], least: float, most: float) -> None:
    """Check a share against two bounds, each with three binomial standard errors."""
    share, n = statistics.fmean(found), len(found)
    low, high = (3 * math.sqrt(bound * (1 - bound) / n) for bound in (least, most))
    assert least - low <= share <= most + high, f"{share} of {n}, not {least} to {most}"


def inflation(history) -> float:
    return history.claimed - history.gain


# ---------------------------------------------------------------------------
# What the rule finds and what it keeps
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", simulate.SIGMAS)
@pytest.mark.parametrize(
    "count",
    [pytest.param(100, marks=pytest.mark.gate), pytest.param(2000, marks=pytest.mark.nightly)],
)
def test_the_rule_finds_the_gains_and_keeps_little_else(sigma, count):
    """Both rules are shown the same ideas, so they are compared history by history."""
    greedy, ours = (histories(rule, sigma, count) for rule in (simulate.Greedy, simulate.Ours))
    pairs = list(zip(ours, greedy, strict=True))
    assert_at_most([one.false - 0.10 * one.keeps for one in ours], 0)  # at most 10 % are false
    assert_at_least([one.gain - 0.93 * other.gain for one, other in pairs], 0)
    assert_at_most([inflation(one) - 0.5 * inflation(other) for one, other in pairs], 0)
    assert_share([one.covered() for one in ours if one.keeps], 0.93, 0.97)


@pytest.mark.gate
def test_equal_seeds_find_more_and_claim_less_that_is_not_there():
    """The gain on equal seeds is larger by 10 standard errors, the inflation smaller by 4."""
    paired, apart = (histories(rule, 0.33, 100) for rule in (simulate.Ours, simulate.Apart))
    assert statistics.fmean(h.gain for h in paired) > statistics.fmean(h.gain for h in apart)
    assert statistics.fmean(map(inflation, paired)) < statistics.fmean(map(inflation, apart))


@pytest.mark.parametrize(
    "count",
    [pytest.param(60, marks=pytest.mark.gate), pytest.param(600, marks=pytest.mark.nightly)],
)
def test_where_seeds_have_nothing_in_common_it_is_no_worse_than_without_them(count):
    lone = histories(simulate.Ours, 0.33, count, common=0.0)
    apart = histories(simulate.Apart, 0.33, count, common=0.0)
    pairs = zip(lone, apart, strict=True)
    assert_at_least([one.gain - 0.99 * other.gain for one, other in pairs], 0)
    assert_at_most([one.false - 0.11 * one.keeps for one in lone], 0)


@pytest.mark.parametrize("rule, least, most", [(simulate.Ours, 0.8, 1), (simulate.Greedy, 0, 0.3)])
def test_where_there_is_nothing_to_find_this_rule_keeps_nothing(rule, least, most):
    """The rule that keeps any drop keeps something nearly always, so there are false gains."""
    found = [
        simulate.Night(rule, 0.33, n, simulate.COMMON, simulate.nothing, math.inf, 50)
        for n in range(60)
    ]
    assert_share([history.keeps == 0 for history in found], least, most)


class Redrawn(simulate.Night):
    """Every third idea has other initial weights, whose effect its successors have too."""

    def score(self, done, seed, truth):
        base = self.run.best().draws[0] if self.run.history else 0.0
        done.draws.append(base if done.status == "measure" or done.number % 3 else done.number)
        return super().score(done, (seed, done.draws[-1]), truth)


@pytest.mark.parametrize(
    "count",
    [pytest.param(80, marks=pytest.mark.gate), pytest.param(400, marks=pytest.mark.nightly)],
)
def test_what_other_initial_weights_do_is_neither_kept_nor_believed(count):
    """Equal draws share most of their noise, so that a good draw stays good on its seeds."""
    found = [Redrawn(simulate.Ours, 0.33, seed, 0.9) for seed in range(count)]
    assert_at_most([one.false - 0.11 * one.keeps for one in found], 0)
    assert_share([one.covered() for one in found if one.keeps], 0.93, 1)


# ---------------------------------------------------------------------------
# The table of the README
# ---------------------------------------------------------------------------


def readme() -> dict[str, dict[str, list[str]]]:
    """Return the README's table as text: {rule: {column: one figure for each sigma}}."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    return {
        name: dict(zip(COLUMNS, (cell.split(" / ") for cell in cells), strict=True))
        for name, *cells in rows
        if name in simulate.RULES
    }


def test_the_table_of_the_readme_has_what_is_asked_of_the_rule():
    rows = readme()
    assert rows.keys() == simulate.RULES.keys()
    figures = zip(*(rows["this rule"][name] for name in COLUMNS[:-1]), strict=True)
    greedy = zip(*(rows["greedy: keep any drop"][name] for name in COLUMNS[:3]), strict=True)
    for ours, others in zip(figures, greedy, strict=True):
        gain, false, inflated, _, covered = map(float, ours)
        assert gain >= 0.93 * float(others[0])
        assert false <= 10
        assert inflated <= 0.5 * float(others[2])
        assert 93 <= covered <= 97


@pytest.mark.nightly
@pytest.mark.timeout(7200)  # some minutes of processor time, which a machine may have to share
@pytest.mark.parametrize("name", simulate.RULES)
def test_the_figures_of_the_readme_are_those_of_this_program(name):
    """A figure may lie five standard errors off: an edit that changes nothing draws anew."""
    (rule, common), row, count = simulate.RULES[name], readme()[name], 2000
    for n, sigma in enumerate(simulate.SIGMAS):
        found = histories(rule, sigma, count, common)
        keeps = statistics.fmean(one.keeps for one in found)
        false = sum(one.false for one in found) / keeps / count
        around = [one.false / keeps - false * (one.keeps / keeps - 1) for one in found]
        compare(row["gain"][n], [one.gain for one in found])
        compare(row["false"][n], [100 * each for each in around])  # whose mean is the share
        compare(row["inflation"][n], [inflation(one) for one in found])
        compare(row["tried"][n], [one.tried for one in found])
        if row["covered"] != ["–"]:
            compare(row["covered"][n], [100.0 * one.covered() for one in found if one.keeps])
    nothing = [
        simulate.Night(rule, 0.33, seed, common, simulate.nothing, math.inf, 50)
        for seed in range(count)
    ]
    compare(row["none"][0], [100.0 * (one.keeps == 0) for one in nothing])


def compare(printed: str, values: Sequence[float]) -> None:
    """Check a printed mean against another sample of the same size."""
    half = 0.5 * 10.0 ** -len(printed.partition(".")[2])  # it is rounded
    mean, error = statistics.fmean(values), math.sqrt(2) * error_of(values)
    assert abs(float(printed) - mean) <= 5 * error + half, f"{printed}, not {mean:.3f} ± {error}"
