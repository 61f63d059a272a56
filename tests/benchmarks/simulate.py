"""Whole nights with known true effects: what the keep rule finds, and what it takes for a gain.

python tests/benchmarks/simulate.py                  # the table of the README, 2,000 nights a row
python tests/benchmarks/simulate.py --nights 200     # sooner

The real `judge`, `level` and `Run.noise`; effects and noise are EVIDENCE.md's, section 2, in 1e-3
bits per byte. The rule knows neither sigma, of which its prior says 0.3, nor what of its square is
common on one seed. Every rule is shown the same ideas.
"""

import argparse
import itertools
import math
import random
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import agent  # noqa: E402
import report  # noqa: E402
from journal import Experiment, Run, undisturbed  # noqa: E402
from rule import judge, level  # noqa: E402

SIGMAS = (0.2, 0.33, 0.5)
PRIOR, RUNS, EARLY = 0.3, 125, 13
START = 1000.0  # val_bpb of the baseline
# Share of the variance that is common to two versions on one seed: a ratio of 0.6 in spread, as
# tests/benchmarks/seeds.py measured for small edits.
COMMON = 0.64


def effect(choose: random.Random, idea: int) -> float:
    """What an idea gains in truth."""
    lot = choose.random()
    if idea > EARLY and lot < 0.28:
        return 0.0
    if lot < (0.72 if idea <= EARLY else 0.56):
        return choose.expovariate(1 / (2.4 if idea <= EARLY else 0.22))
    return -choose.lognormvariate(math.log(1.12), 1.1)


def nothing(choose: random.Random, idea: int) -> float:
    return 0.0


class Night:
    """One night; afterwards `gain` in truth, `claimed` gain, numbers of keeps and false keeps."""

    def __init__(
        self, rule, sigma: float, seed: int, common: float = COMMON, effects=effect, runs=RUNS,
        ideas=math.inf,
    ):  # fmt: skip
        self.ideas = random.Random(f"ideas {seed}")  # the same ones for every rule
        self.choose, self.sigma, self.left = random.Random(seed), sigma, runs
        self.rule, self.common, self.luck, self.seeds = rule, common, {}, itertools.count()
        self.run = Run("t", {"sigma": PRIOR}, "")
        self.truth, self.keeps, self.false, self.tried = START, 0, 0, 0
        first = Experiment(0, "", status="keep")
        for _ in range(rule.baseline):
            self.measure(first, START)
        self.note(first)
        while self.left > 0 and self.tried < ideas:
            if rule.measures_best and self.run.since_keep() >= agent.MEASURE_AFTER:
                if len(self.best()) < agent.BEST_RUNS:
                    self.measure_best()
                    continue
            self.tried += 1
            self.try_out(effects(self.ideas, self.tried))
        self.gain = START - self.truth
        self.claimed, _ = self.noise.compare(self.run.scores_of(0), self.best())

    def measure(self, done: Experiment, truth: float) -> None:
        """One run more, on a seed that all have, or on one of its own."""
        self.left -= 1
        known = {*self.run.seeds_of(done.number), *done.seeds}
        seeds = itertools.count() if self.rule.equal else self.seeds
        seed = next(seed for seed in seeds if seed not in known)
        done.seeds.append(seed)
        done.values.append(self.score(done, seed, truth))

    def score(self, done: Experiment, seed: int, truth: float) -> float:
        """What a run measures: the truth, the luck of its seed, and its own."""
        if seed not in self.luck:
            self.luck[seed] = self.choose.gauss(0, self.sigma * self.common**0.5)
        return truth + self.luck[seed] + self.choose.gauss(0, self.sigma * (1 - self.common) ** 0.5)

    def best(self) -> dict[tuple[int, float], float]:
        return self.run.scores_of(self.run.best().number)

    def note(self, done: Experiment) -> None:
        done.order = len(self.run.history)
        self.run.history.append(done)
        if done.number == 0 or len(done.values) > 1 or done.status == "measure":
            self.noise = self.run.noise()

    def measure_best(self) -> None:
        again = Experiment(self.run.best().number, "", status="measure", after=self.tried)
        self.measure(again, self.truth)
        self.note(again)

    def try_out(self, gain: float) -> None:
        done = Experiment(self.tried, "", status="again", base=self.run.best().number)
        best, risk = self.best(), level(self.run.history)
        while done.status == "again" and self.left > 0:
            self.measure(done, self.truth - gain)
            scores = undisturbed([done])
            if self.rule.equal and not {*done.seeds} <= self.run.seeds_of(done.base):
                self.measure_best()
                best = self.best()
            noise = self.run.noise(done) if len(scores) > 1 else self.noise
            done.status, done.reason = self.rule.judge(scores, best, noise, risk)
        if done.status == "keep":
            self.keeps, self.false = self.keeps + 1, self.false + (gain <= 0)
            self.truth -= gain
        elif done.status == "again":  # the night is over
            done.status = "discard"
        done.gain, _ = noise.compare(best, scores)
        self.note(done)

    def covered(self) -> bool:
        """Whether the report's 95 % interval of the gain holds the truth."""
        gain, half, *_ = report.gain_of(self.run, self.noise)
        return abs(gain - self.gain) <= half


class Ours:
    """The rule of agent.py."""

    baseline, measures_best, equal = agent.BASELINE_RUNS, True, True

    @staticmethod
    def judge(scores, best, noise, risk):
        return judge(scores, best, noise, risk, 0.0, False)


class Apart(Ours):
    """This rule, if each run had a seed of its own."""

    equal = False


class Before:
    """The rule until 2026-11-26: 4 sigma at once, or sigma / sqrt(2) by the mean of two."""

    baseline, measures_best, equal = 3, True, False

    @staticmethod
    def judge(scores, best, noise, risk):
        sigma, gain = noise.sigma, mean_of(best) - mean_of(scores)
        if len(scores) == 1:
            return ("keep" if gain > 4 * sigma else "again" if gain > 0 else "discard"), ""
        return ("keep" if gain >= sigma / math.sqrt(2) else "discard"), ""


class ByValue:
    """Repeats by expected value: what an idea gains is known as a distribution over `GAINS`, which
    starts from that of the ideas tried here. Another run is worth what it is expected to add to
    what would be kept, and is made where that is over its COST; kept is what gains nothing with a
    probability under LIMIT. Of ten settings tried, none found as much as this rule."""

    baseline, measures_best, equal = agent.BASELINE_RUNS, True, False
    COST, LIMIT, MOST = 0.02, 0.3, 8
    GAINS = np.arange(-8, 12, 0.04)
    SPREAD = np.linspace(-2.5, 2.5, 11)  # of the next run's result, in its standard deviations

    def __init__(self):
        size = np.maximum(np.abs(self.GAINS), 0.02)
        better, worse = self.GAINS > 0.01, self.GAINS < -0.01
        shares = (
            (0.28, ~(better | worse)),
            (0.28, better * np.exp(-size / 0.22)),
            (0.44, worse * np.exp(-((np.log(size / 1.12) / 1.1) ** 2) / 2) / size),
        )
        self.prior = sum(share * form / form.sum() for share, form in shares) + 1e-12
        self.likely = np.exp(-(self.SPREAD**2) / 2)
        self.likely /= self.likely.sum()

    def after(self, prior, seen, variance):
        """(probability of no gain, mean gain, distribution) once `seen` (N, 1) was measured."""
        found = prior * np.exp(-((self.GAINS - seen) ** 2) / 2 / variance)
        found /= found.sum(-1, keepdims=True) + 1e-300
        return found[..., self.GAINS < 0.01].sum(-1), (found * self.GAINS).sum(-1), found

    def judge(self, scores, best, noise, risk):
        seen, sigma = min(mean_of(best) - mean_of(scores), self.GAINS[-1]), noise.sigma
        variance = sigma**2 * (1 / len(scores) + 1 / len(best))
        none, mean, found = self.after(self.prior, seen, variance)
        now = mean if none <= self.LIMIT else 0.0
        spread = math.sqrt((found * (self.GAINS - mean) ** 2).sum() + sigma**2)
        then, means, _ = self.after(found, (mean + spread * self.SPREAD)[:, None], sigma**2)
        worth = (self.likely * np.where(then <= self.LIMIT, np.maximum(means, 0), 0)).sum() - now
        if worth > self.COST and none > self.LIMIT / 4 and len(scores) < self.MOST:
            return "again", ""
        return ("keep" if now > 0 else "discard"), ""


class Greedy:
    """Keep any drop of one run below the lowest one."""

    baseline, measures_best, equal = 1, False, False

    @staticmethod
    def judge(scores, best, noise, risk):
        return ("keep" if mean_of(scores) < mean_of(best) else "discard"), ""


RULES = {"greedy: keep any drop": (Greedy, COMMON), "4 sigma, or two runs": (Before, COMMON),
         "repeats by expected value": (ByValue(), COMMON),
         "this rule on different seeds": (Apart, COMMON), "this rule": (Ours, COMMON),
         "this rule, 0.99 in common": (Ours, 0.99),
         "this rule, nothing in common": (Ours, 0.0)}  # fmt: skip


def mean_of(scores: dict[tuple[int, float], float]) -> float:
    return statistics.fmean(scores.values())


def row(rule, sigma: float, nights: int, common: float = COMMON) -> dict[str, float]:
    """Means over nights: true gain, share of false keeps, inflation of the claim, experiments,
    and how often the report's interval of the gain holds the truth."""
    found = [Night(rule, sigma, seed, common) for seed in range(nights)]
    keeps = sum(night.keeps for night in found)
    return {
        "gain": statistics.fmean(night.gain for night in found),
        "false": sum(night.false for night in found) / keeps,
        "inflation": statistics.fmean(night.claimed - night.gain for night in found),
        "keeps": keeps / nights,
        "tried": statistics.fmean(night.tried for night in found),
        "covered": statistics.fmean(night.covered() for night in found if night.keeps)
        if rule in (Ours, Apart) else math.nan,
    }


def nights_without_keep(rule, sigma: float, nights: int, common: float = COMMON) -> float:
    """The share of nights that keep nothing where there is nothing to be found."""
    found = [Night(rule, sigma, n, common, nothing, math.inf, 50) for n in range(nights)]
    return sum(night.keeps == 0 for night in found) / nights


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--nights", type=int, default=2000, help="a row")
    args = parser.parse_args()
    print(f"{args.nights} nights of {RUNS} runs each, sigma {' / '.join(map(str, SIGMAS))}\n")
    print("| rule | true gain, 10⁻³ | false keeps, % | inflation, 10⁻³ | experiments | "
          "report's 95 % interval holds, % | 50 ideas worth nothing: nights without a keep, % |")
    print("|---|---|---|---|---|---|---|")
    pool, n = ProcessPoolExecutor(), args.nights
    jobs = {name: [*(pool.submit(row, rule, sigma, n, common) for sigma in SIGMAS),
                   pool.submit(nights_without_keep, rule, 0.33, n, common)]
            for name, (rule, common) in RULES.items()}  # fmt: skip
    for name, each in jobs.items():
        *rows, none = (job.result() for job in each)
        cells = [(1, "gain", ".2f"), (100, "false", ".1f"), (1, "inflation", ".2f"),
                 (1, "tried", ".0f"), (100, "covered", ".1f")]  # fmt: skip
        text = [" / ".join(f"{each * r[key]:{form}}" for r in rows) for each, key, form in cells]
        text = " | ".join(text).replace("nan / nan / nan", "–")
        print(f"| {name} | {text} | {100 * none:.0f} |", flush=True)


if __name__ == "__main__":
    main()
