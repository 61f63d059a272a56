"""How much of the spread between two versions of train.py do equal seeds take away?

    python tests/benchmarks/seeds.py                        # 8 seeds at this machine's scale
    python tests/benchmarks/seeds.py --seeds 10 --budget 30 --at-once 2

Each version trains once on each seed, by hand. For each edit: its gain, the standard deviation of
the differences on equal seeds, that on different seeds, their ratio. A ratio of 1 says that equal
seeds are worth nothing; one of 0.7 that they are worth twice the runs. "nothing" is train.py again:
what is left of its spread on equal seeds is time, that gives one run more steps than another. With
AUTORESEARCH_BUDGET_TOKENS, a budget of tokens, there is no such time.
"""

import argparse
import itertools
import os
import random
import statistics
from concurrent.futures import ThreadPoolExecutor

import upstream
from upstream import ROOT, prepare, pretokenize

EDITS = {  # name: (search, replace)
    "nothing": ("", ""),
    "a rate 5 % lower": ("MATRIX_LR = 0.04 ", "MATRIX_LR = 0.038 "),
    "GELU, of the same shape": ("F.relu(self.up(x)).square()", "F.gelu(self.up(x))"),
    "an MLP of another shape": ("MLP_RATIO = 4 ", "MLP_RATIO = 3 "),
}


def spread(first: list[float], second: list[float]) -> tuple[float, float]:
    """Standard deviations of second - first, on equal seeds and on different ones."""
    equal = statistics.stdev(b - a for a, b in zip(first, second, strict=True))
    return equal, (statistics.variance(first) + statistics.variance(second)) ** 0.5


def main() -> None:
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--budget", help="seconds of training, default the scale's")
    parser.add_argument("--at-once", type=int, default=1, help="runs at a time")
    args = parser.parse_args()
    if args.budget:
        os.environ["AUTORESEARCH_BUDGET"] = args.budget
    scale = prepare.current_scale()
    pretokenize.ensure_rows(scale, None)
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    versions = {"train.py": source}
    for name, (search, replace) in EDITS.items():
        if search and source.count(search) != 1:
            raise SystemExit(f"error: train.py has {search!r} {source.count(search)} times")
        versions[name] = source.replace(search, replace) if search else source

    def score(task: tuple[int, str]) -> float:
        seed, name = task
        return upstream.run(versions[name], scale, seed, rival=False)["val_bpb"]

    tasks = list(itertools.product(range(1, args.seeds + 1), versions))
    random.Random(1).shuffle(tasks)  # or a seed's runs would share the machine's mood too
    budget = f"{scale.budget:g} {scale.clock}"
    print(f"scale {scale.name}, {budget}, {args.seeds} seeds, {args.at_once} at once")
    with ThreadPoolExecutor(args.at_once) as pool:
        scores = dict(zip(tasks, pool.map(score, tasks), strict=True))
    seeds = range(1, args.seeds + 1)
    by_name = {name: [scores[seed, name] for seed in seeds] for name in versions}
    base = by_name.pop("train.py")
    print(f"train.py: {statistics.mean(base):.6f}, sigma {statistics.stdev(base):.6f}, "
          + " ".join(f"{value:.6f}" for value in base))  # fmt: skip
    print(f"{'edit':24} {'difference':>10} {'equal seeds':>12} {'different':>10} {'ratio':>6}")
    for name, values in by_name.items():
        equal, different = spread(base, values)
        gain = statistics.mean(values) - statistics.mean(base)
        each = " ".join(f"{b - a:+.6f}" for a, b in zip(base, values, strict=True))
        ratio = f"{equal / different:6.2f}  {each}"
        print(f"{name:24} {gain:+10.6f} {equal:12.6f} {different:10.6f} {ratio}")


if __name__ == "__main__":
    main()
