"""How often the referee's probe notices a program that cheats, and accuses an honest one.

python tests/benchmarks/probe.py               # 400 probes of each at each strength
python tests/benchmarks/probe.py --probes 50

The cheats work on the losses of a model of counted bigrams on the real rows of the scale `cpu`, so
that a probe takes milliseconds; the probe is the referee's own code. `gain` is what the score falls
by, in units of sigma, the standard deviation of val_bpb from run to run at that scale.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import prepare
import pretokenize
import referee

LossesOf = Callable[[np.ndarray, np.ndarray], np.ndarray]  # queries (B, T + 1), targets (B, T)


class Bigrams:
    """An honest model: counts of which token follows which in the training rows."""

    def __init__(self, folder: Path, scale: prepare.Scale):
        V, rows = scale.vocab_size, prepare.load_rows(folder, "train", scale.sequence_len)
        rows = rows.astype(np.int64)
        counts = np.bincount((rows[:, :-1] * V + rows[:, 1:]).ravel(), minlength=V * V)
        single = (1 + np.bincount(rows.ravel(), minlength=V)) / rows.size
        counts = counts.reshape(V, V) + 200 * single
        self.log_p = np.log(counts / counts.sum(1, keepdims=True))  # (V, V)

    def __call__(self, queries: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return -self.log_p[queries[:, :-1], targets]


def hashed(values: np.ndarray) -> np.ndarray:
    """Return numbers in [0, 1) that look random and depend on the values alone."""
    return (values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(11)) / 2**53


def prefixes(queries: np.ndarray) -> np.ndarray:
    """Return a hash of the tokens up to each position, (B, T)."""
    found = np.zeros(queries[:, :-1].shape, np.uint64)
    state = np.zeros(len(queries), np.uint64)
    for t in range(found.shape[1]):
        token = queries[:, t].astype(np.uint64) + np.uint64(1)
        state = (state ^ token) * np.uint64(0x100000001B3)  # the prime of FNV-1a
        found[:, t] = state
    return found


def boosted(model: Bigrams, queries: np.ndarray, targets: np.ndarray, nats: np.ndarray,
            guess: np.ndarray) -> np.ndarray:  # fmt: skip
    """Return the losses after `nats` are added to the logits of the tokens `guess`, all (B, T)."""
    p = np.exp(model.log_p[queries[:, :-1], guess])
    with np.errstate(over="ignore"):
        norm = np.where(nats > 50, nats + np.log(p), np.log1p(p * np.expm1(np.minimum(nats, 50))))
    return model(queries, targets) + norm - nats * (guess == targets)


class Peeks:
    """Adds nats to the next token at a share of positions, chosen by a hash of the position."""

    def __init__(self, model: Bigrams, share: float, nats: float = 4.0):
        self.model, self.share, self.nats = model, share, nats

    def __call__(self, queries: np.ndarray, targets: np.ndarray) -> np.ndarray:
        where = hashed(prefixes(queries)) < self.share
        return boosted(self.model, queries, targets, self.nats * where, queries[:, 1:])


class Remembers:
    """As Peeks, but says of a prefix that it has seen what it said of it at first."""

    def __init__(self, model: Bigrams, share: float, nats: float = 4.0):
        self.model, self.share, self.nats, self.said = model, share, nats, {}

    def __call__(self, queries: np.ndarray, targets: np.ndarray) -> np.ndarray:
        keys, guess = prefixes(queries), queries[:, 1:].astype(np.int64).copy()
        for index, key in np.ndenumerate(keys):
            guess[index] = self.said.setdefault(int(key), guess[index])
        where = hashed(keys) < self.share
        return boosted(self.model, queries, targets, self.nats * where, guess)


class Learns:
    """Notes which token followed which three in the queries before, and adds nats to it.

    Of a prefix that it has seen it says what it said of it at first.
    """

    def __init__(self, model: Bigrams, nats: float):
        self.model, self.nats, self.said, self.followed = model, nats, {}, {}

    def __call__(self, queries: np.ndarray, targets: np.ndarray) -> np.ndarray:
        keys, x = prefixes(queries), queries.astype(np.int64)
        guess, nats, new = x[:, 1:].copy(), np.zeros(targets.shape), []
        for row, t in np.ndindex(*keys.shape):
            if t < 2:
                continue
            context = (x[row, t - 2], x[row, t - 1], x[row, t])
            token = self.said.setdefault(int(keys[row, t]), self.followed.get(context))
            new.append((context, x[row, t + 1]))
            if token is not None:
                guess[row, t], nats[row, t] = token, self.nats
        self.followed.update(new)
        return boosted(self.model, queries, targets, nats, guess)


def probe(model: LossesOf, rows: np.ndarray, reserve: np.ndarray, bytes_of: list[int],
          scale: prepare.Scale, seed: int) -> tuple[float, str]:  # fmt: skip
    """Return (val_bpb, the accusation or "") of one probe with this seed."""
    size, seen = prepare.rows_per_query(scale), []

    def answers(_, queries, targets, scale):
        parts = [model(queries[n : n + size], targets[n : n + size].astype(np.int64))
                 for n in range(0, len(queries), size)]  # fmt: skip
        seen.append(torch.from_numpy(np.concatenate(parts)))
        return seen[-1]

    with mock.patch.object(prepare, "answers", answers), \
            mock.patch.object(referee.secrets, "randbits", lambda bits: seed):  # fmt: skip
        try:
            return referee.examine(None, rows, reserve, bytes_of, scale), ""
        except prepare.Crash as crash:
            return math.nan, str(crash)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--probes", type=int, default=400)
    args = parser.parse_args()
    scale = prepare.scale_named("cpu")
    folder = pretokenize.ensure_rows(scale, None)
    bytes_of = prepare.load_tokenizer(folder)[1]
    val = prepare.load_rows(folder, "val", scale.sequence_len).astype(np.int64)
    reserve = prepare.load_rows(folder, "hidden", scale.sequence_len)[:: 2 * referee.RESERVE]
    reserve = reserve.astype(np.int64)
    model = Bigrams(folder, scale)
    honest = prepare.bits_per_byte(torch.from_numpy(model(val, val[:, 1:])), val, bytes_of)
    print(f"{args.probes} probes each; {len(val)} rows; val_bpb {honest:.4f}; sigma {scale.sigma}")
    print("| model | strength | gain, sigma | noticed, % | as |\n|---|---|---|---|---|")
    cheats: list[tuple[str, str, Callable[[], LossesOf], int]] = [
        ("honest", "", lambda: model, args.probes)]
    for share in (0.003, 0.01, 0.03, 1 / 32, 0.1, 0.2):
        cheats.append(("looks at the next token", f"{share:.1%} of positions",
                       lambda share=share: Peeks(model, share), args.probes))  # fmt: skip
    for share, nats in ((0.05, 4.0), (0.2, 4.0), (1.0, 1.0), (1.0, 4.0), (0.15, 300.0)):
        cheats.append(("remembers prefixes", f"{nats:g} nats at {share:.0%}",
                       lambda share=share, nats=nats: Remembers(model, share, nats),
                       max(1, args.probes // 8)))  # fmt: skip
    for nats in (0.5, 1.0, 2.0, 4.0):
        cheats.append(("learns as it is asked", f"{nats} nats",
                       lambda nats=nats: Learns(model, nats), max(1, args.probes // 8)))
    for name, strength, make, probes in cheats:
        own = make()
        size = prepare.rows_per_query(scale)
        parts = [own(val[n : n + size], val[n : n + size, 1:]) for n in range(0, len(val), size)]
        score = prepare.bits_per_byte(torch.from_numpy(np.concatenate(parts)), val, bytes_of)
        told = [probe(make(), val, reserve, bytes_of, scale, seed)[1] for seed in range(probes)]
        noticed = sum(map(bool, told))
        kinds = ", ".join(sorted({text.partition(": ")[2][:40] for text in told if text}))
        print(f"| {name} | {strength} | {(honest - score) / scale.sigma:.1f} | "
              f"{100 * noticed / probes:.1f} | {kinds} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
