"""The keep rule: how far runs of the same code lie apart, and which candidate is kept.

What it finds, and what it keeps that is nothing, is by tests/benchmarks/simulate.py, in the README.
"""

from __future__ import annotations

import math
import operator
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from journal import Experiment

PRIOR_RUNS = 5  # pseudo-observations that the scale's prior of sigma counts for
SIGMA_MOST = 3.0  # times sigma, that one run can tell of it
SHARES = [1 - n / 100 for n in range(1, 101)]  # of the variance, by two runs that drew the same
SUSPICIOUS_SIGMAS, SUSPICIOUS_SHARE = 10.0, 0.05
RUNS_MOST = 4  # of an experiment, before it is dropped as not confirmed
AT_ONCE = 3.4  # standard errors: then one run is enough
# Chosen by tests/benchmarks/simulate.py: what may be risked at first, what a keep adds, and the
# share that one test risks.
WEALTH, PAY, RISK_SHARE, RISK_MOST = 0.02, 2.5, 0.1, 0.2
RISK_LEAST = 1 - statistics.NormalDist().cdf(AT_ONCE)  # even after 500 drops
ADOPTED = "adopted"  # a person's own commit on the run's branch: kept, whatever it scores
Scores = dict[Any, float]  # val_bpb by (seed, draws): equal keys share luck


@dataclass(frozen=True)
class Noise:
    """How far runs of the same code lie apart."""

    sigma: float  # their standard deviation
    shared: float = 0.0  # of the variance, by two programs' runs that drew the same numbers
    freedom: float = math.inf  # degrees, of sigma

    def compare(self, old: Scores, new: Scores) -> tuple[float, float]:
        """(by how much `new` lies below `old`, the standard error of that).

        Generalised least squares for the two means: runs under one key have the correlation
        `shared`, all others none. Pairs take away the luck that is common, and what one side has
        more runs of than the other tells how much luck that was.
        """
        common = old.keys() & new.keys()
        weight = 1 / (1 - self.shared**2)
        a, b = ((weight - 1) * len(common) + len(scores) for scores in (old, new))
        c = weight * self.shared * len(common)
        x, y = (sum(scores[seed] for seed in common) for scores in (old, new))
        u = (weight - 1) * x - weight * self.shared * y + sum(old.values())
        v = (weight - 1) * y - weight * self.shared * x + sum(new.values())
        scale = a * b - c * c  # of a mean - c mean' = u, b mean' - c mean = v
        gain, variance = ((b - c) * u - (a - c) * v) / scale, (a + b - 2 * c) / scale
        return round(gain, 12), self.sigma * math.sqrt(variance)  # of equal scores nothing


def estimate(prior: float, repeated: list[list[float]], pairs: list[list[float]]) -> Noise:
    """Noise, by the scale's prior of sigma and by all that was run more than once.

    repeated: val_bpb of each program's runs, the baseline's first. pairs: by how much a candidate
    lies below what it was made of, in each pair of runs that drew the same numbers.

    A run counts no more than SIGMA_MOST times what prior and baseline, a person's code, say: one
    program that diverges on its second seed must not make noise of all gains to come.
    """
    squares, freedom, most = PRIOR_RUNS * prior**2, PRIOR_RUNS, math.inf
    for values in repeated:
        if len(values) > 1:
            squares += squares_of(values, most)
            freedom += len(values) - 1
        most = min(most, SIGMA_MOST**2 * squares / freedom)  # after the first, the baseline
    variance, apart, known = squares / freedom, 0.0, 0
    for changes in pairs:
        if len(changes) > 1:
            most = SIGMA_MOST**2 * (2 * variance + apart) / (1 + known)
            apart += squares_of(changes, most)
            known += len(changes) - 1
    return Noise(math.sqrt(variance), expected_share(apart / variance, known), freedom)


def squares_of(values: list[float], most: float) -> float:
    mean = statistics.fmean(values)
    return sum(min(most, (value - mean) ** 2) for value in values)


def expected_share(squares: float, freedom: int) -> float:
    """The share of the variance that is common to two runs that drew the same numbers, by Bayes:
    `squares` of differences in such pairs, around their means and over the variance, have that
    many degrees of freedom.

    At first all shares are equally probable. So even two pairs that agree well tell much, where
    pseudo-observations of a single value would outvote ten.
    """
    logs = [-freedom / 2 * math.log(1 - share) - squares / 4 / (1 - share) for share in SHARES]
    most = max(logs)
    likely = [math.exp(log - most) for log in logs]
    return sum(map(operator.mul, SHARES, likely)) / sum(likely)


def level(history: list[Experiment]) -> float:
    """How probable a false keep may be now: much after a keep, less with every drop.

    In the manner of alpha-investing (Foster and Stine 2008): each test costs what it risks, each
    keep pays. It pays more than theirs, so that their bound does not hold; what does is printed by
    tests/benchmarks/simulate.py.
    """
    wealth = WEALTH
    for e in history:
        risk = min(RISK_MOST, RISK_SHARE * wealth)
        if e.number and e.status == "keep" and not e.reason:
            wealth += PAY - risk
        elif e.number and e.status in ("keep", "discard") and e.values and e.reason != ADOPTED:
            wealth -= risk / (1 - risk)
    return max(RISK_LEAST, min(RISK_MOST, RISK_SHARE * wealth))


def judge(
    scores: Scores, best: Scores, noise: Noise, risk: float, lowest: float,
    simpler: bool, hidden_gain: float | None = None,
) -> tuple[str, str]:
    """The keep rule: (verdict, reason) for a candidate's val_bpb; "again" asks for one more run.

    `best` are the best's own scores, `risk` the level that the test is made at, `lowest` the lowest
    val_bpb that was believed so far; `simpler` says that the candidate has fewer syntax-tree nodes
    than the best; `hidden_gain` is what it gains on the hidden split, which nobody searches on.
    """
    runs, sigma, (gain, error) = len(scores), noise.sigma, noise.compare(best, scores)
    if hidden_gain is not None and gain - hidden_gain > max(3 * sigma, gain / 2):
        return "discard", "suspicious: the hidden split does not show this gain"
    beyond = lowest - statistics.fmean(scores.values())
    much = SUSPICIOUS_SHARE * statistics.fmean(best.values())
    if beyond > SUSPICIOUS_SIGMAS * sigma and gain > much:
        return "discard", "suspicious: too good to be true, look at it yourself"
    needed = statistics.NormalDist().inv_cdf(1 - risk)
    if gain > error * (max(needed, AT_ONCE) if runs == 1 else needed):
        return "keep", ""
    if simpler and gain >= -0.5 * sigma:
        return ("again", "") if runs == 1 else ("keep", "simpler")
    if gain <= 0 or runs == RUNS_MOST:
        return "discard", "not confirmed" if runs > 1 else ""
    return "again", ""
