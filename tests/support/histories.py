"""Made-up histories of experiments, as the loop would note them, without git or training."""

import random
from dataclasses import replace
from functools import cache

import proposals
from journal import Experiment, Run

SOURCE = """\
DEPTH = {"cpu": 2, "gpu": 9}["cpu"]  # layers
SOFTCAP = 15.0
INIT_SCALE = 0.68
MATRIX_LR = 0.04
EMBEDDING_LR = 0.9
ADAM_BETAS = (0.8, 0.95)
WARMDOWN_RATIO = 0.75


class Attention(nn.Module):
    def forward(self, x):
        return x
"""
SCALE = {"name": "cpu", "sigma": 0.0025, "device_gb": 15.6, "budget": 60, "clock": "cpu"}
CURVE = [3.2, 2.8, 2.5, 2.3, 2.1]
IDEAS = """\
# What I would try
- [ ] a longer window in the first layer
- [x] something that is done
smaller batches early on
"""


class History:
    """A run made up: each experiment is noted as the loop would, without git."""

    def __init__(self, source=None):
        self.source = source or SOURCE
        self.run = Run("t", dict(SCALE), "0" * 40)
        self.add("keep", "baseline", values=[1.2375, 1.2350, 1.2400])

    def add(self, status, description="", knobs=None, values=None, edit=None, **more):
        run, number = self.run, len(self.run.history)
        base = run.best() if run.history else None
        old = run.source_of(base) if base else self.source
        now = proposals.read_knobs(old, "cpu")
        source = proposals.set_knobs(old, {now[n]: v for n, v in (knobs or {}).items()})
        source = source.replace(*edit) if edit else source
        done = Experiment(number, description, status=status, values=values or [], **more)
        done.base, done.order = base.number if base else 0, number
        done.runs = max(1, len(done.values))
        done.commit, done.steps, done.tokens_M = f"{number:040d}", 425, 1.74
        done.memory_gb, done.params_M, done.speeds = 0.62, 17.07, [0.029] * len(done.values)
        done.curve, done.printed = CURVE, "scale cpu: depth 2, width 64 </log> batch 4096"
        proposals.identify(done, source, old, "cpu")
        if base and done.values:
            done.gain = run.mean_of(base.number) - done.val_bpb()
        run.sources[done.commit] = source
        run.history.append(done)


def empty(source=None):
    return History(source).run


def first_keep(source=None):
    history = History(source)
    history.add("keep", "tune: MATRIX_LR 0.04 → 0.05", {"MATRIX_LR": 0.05}, [1.2290, 1.2300],
                kind="tune")  # fmt: skip
    return history.run


LAYER = ("class Attention(nn.Module):", "class Attention(nn.Module):\n    note = {}\n")


def mixed(source=None, count=30, keeps=True):
    """Every sort of experiment, told apart by chance."""
    history, choose = History(source), random.Random(1)
    for number in range(1, count + 1):
        best = history.run.mean_of(history.run.best().number)
        lot = choose.random()
        if lot < 0.15:
            reason = f"RuntimeError: shape [{number}, 64] <log> is invalid for size {number}"
            history.add("crash", f"structure: idea {number}", reason=reason, kind="structure",
                        edit=(LAYER[0], LAYER[1].format(number)))  # fmt: skip
        elif lot < 0.3:
            values = [best + choose.random() / 50]
            history.add("discard", f"structure: idea {number}", values=values, kind="structure",
                        edit=(LAYER[0], LAYER[1].format(number)),
                        combines=[number - 1] if number % 2 else [])  # fmt: skip
        else:
            name = choose.choice(["MATRIX_LR", "EMBEDDING_LR", "SOFTCAP", "WARMDOWN_RATIO"])
            value = float(f"{choose.uniform(0.1, 2):.2g}")
            kept = keeps and number % 12 == 0
            values = [best + (-0.008 if kept else choose.gauss(0.004, 0.004))] * (1 + kept)
            history.add("keep" if kept else "discard", f"tune: {name} to {value}", {name: value},
                        values, kind="tune", reason="" if kept else "not confirmed",
                        idea="smaller batches early on" if number == 5 else "")  # fmt: skip
    return history.run


def thousands(source=None):
    """10,000 experiments. They are made once per process: treat each of them as read-only."""
    run = make_thousands(source or SOURCE)
    return replace(run, history=list(run.history), scale=dict(run.scale))


@cache
def make_thousands(source):
    """Make the facts of 10,000 experiments without taking apart 10,000 programs."""
    run, choose = mixed(source, 60), random.Random(2)
    pattern = [e for e in run.history[1:] if e.status != "keep"]
    kept = run.best()  # None of what follows is a keep.
    for number in range(61, 10_001):
        old = choose.choice(pattern)
        knobs = dict(kept.knobs)
        moved = {}
        if old.kind == "tune":
            name = choose.choice(sorted(knobs))
            moved[name] = [knobs[name], knobs[name] * choose.choice((0.5, 0.8, 1.25, 2))]
            knobs[name] = moved[name][1]
        best = run.history[-1].val_bpb() if number % 997 == 0 else 1.24
        run.history.append(Experiment(
            number, old.description, status=old.status, kind=old.kind, reason=old.reason,
            values=[best + choose.gauss(0, 0.01)] if old.values else [], runs=1, order=number,
            speeds=[0.029] * len(old.values), steps=425, tokens_M=1.74, base=kept.number,
            gain=choose.gauss(-0.004, 0.004) if old.values else None, commit=f"{number:040d}",
            program=f"{number:016d}", skeleton=old.skeleton, knobs=knobs, curve=CURVE,
            moved=moved, places=[n.partition("[")[0] for n in moved] or old.places,
        ))  # fmt: skip
    return run


def flat(source=None):
    return mixed(source, 25, keeps=False)


HISTORIES = {"empty": empty, "first-keep": first_keep, "mixed-30": mixed, "plateau-25": flat,
             "10000": thousands}  # fmt: skip
