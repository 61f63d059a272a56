"""Promotion: which kept commits still hold, on top of each other and at a larger scale.

    python agent.py promote                  # of the last run; says first what it will cost
    python agent.py promote --runs 3         # of each stack of commits; more tell smaller gains
    python agent.py promote --scale gpu      # the run's own scale: nothing larger

All is measured afresh, in rounds of baseline, best, and the best without each of its commits; then
what gains is measured so at the larger scale (on the CPU twice the depth and the budget, on a GPU
d12). Those that hold are put on the branch autoresearch/TAG-promoted. Killed, it goes on.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agent import (
    check_checkout,
    confine,
    describe_machine,
    find_run,
    lay_out,
    settle_in,
    train_fairly,
)
from journal import (
    STOP,
    Experiment,
    Run,
    git,
    git_folder,
    in_thread,
    keep_log,
    lock,
    move_refs,
    print_line,
    read_train,
    resolve,
    say,
    status_line,
    sync_git,
    undisturbed,
    write_commit,
)
from journal import (
    parse as parse_program,
)
from prepare import SetupError
from report import found, read_run, student
from rule import Noise
from slots import Slot, Task, choose_slots

RUNS = 4  # of each stack, at each scale
ONE_SIDED = 0.90  # a two-sided interval of this leaves 5 % on the side of no gain
LARGER = {"cpu": "cpu", "gpu": "d12", "d12": "d12", "gpt2": "gpt2"}  # cpu: twice as deep and long


# ---------------------------------------------------------------------------
# Stacks of commits
# ---------------------------------------------------------------------------


@dataclass(eq=False)
class Stack:
    """Some of the kept commits on the start, measured at one scale."""

    name: str
    source: str
    done: Experiment = field(default_factory=lambda: Experiment(0, ""))


class Promotion(Run):
    """Runs beside the night's; the stacks of a round have one seed, used nowhere else."""

    def seed(self, number: int) -> int:
        text = f"promotion {self.tag} {self.start} {self.settings()} {number}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def merge(ours: str, base: str, theirs: str) -> str | None:
    """What turned base into theirs, done to ours, as git merges files; None if that conflicts."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("ours", "base", "theirs")]
        for path, text in zip(paths, (ours, base, theirs), strict=True):
            path.write_bytes(text.encode())
        done = subprocess.run(["git", "merge-file", "-p", *paths], capture_output=True, cwd=folder)
    return None if done.returncode else done.stdout.decode()


def put_together(run: Run, commits: list[Experiment]) -> tuple[str, list[Experiment]]:
    """(train.py with these commits on the start, those that could not be put there)."""
    source, left = read_train(run.start), []
    for kept in commits:
        merged = merge(source, *before_and_after(run, kept))
        left += [kept] if merged is None or not compiles(merged) else []
        source = source if kept in left else merged or source
    return source, left


def without(run: Run, kept: Experiment) -> str | None:
    """The best without one of its commits; None if later ones build on it."""
    before, after = before_and_after(run, kept)
    source = merge(run.source_of(run.best()), after, before)
    return source if source is not None and compiles(source) else None


def before_and_after(run: Run, kept: Experiment) -> tuple[str, str]:
    chain = [run.start, *(e.commit for e in run.history if e.number and e.status == "keep")]
    return run.source_at(chain[chain.index(kept.commit) - 1]), run.source_of(kept)


def compiles(source: str) -> bool:
    try:
        compile(source, "train.py", "exec")
    except (SyntaxError, ValueError):
        return False
    return True


def deepen(source: str) -> str:
    """The same with twice the DEPTH. Raises SetupError if there is none at the top."""
    for node in parse_program(source).body:
        names = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(name, ast.Name) and name.id == "DEPTH" for name in names):
            lines = source.splitlines(keepends=True)
            first, last = node.value.lineno - 1, node.value.end_lineno
            text = "".join(lines[first:last]).encode()
            tail = len("".join(lines[first : last - 1]).encode()) + node.value.end_col_offset
            old, start = text[node.value.col_offset : tail], node.value.col_offset
            deep = (text[:start] + b"2 * (" + old + b")" + text[tail:]).decode()
            return "".join([*lines[:first], deep, *lines[last:]])
    raise SetupError("train.py sets no DEPTH at its top, which is to be doubled",
                     "python agent.py promote --scale cpu  # at the run's own scale only")


# ---------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------


def measure(stage: Run, stacks: list[Stack], rounds: int, slots: list[Slot]) -> None:
    """So many runs of each stack, in rounds; those that are finished are found again."""
    for number, stack in enumerate(stacks):
        stack.done = Experiment(number, stack.name, status="keep", commit=stage.start)
        digest = hashlib.sha256(stack.source.encode()).hexdigest()
        lay_out(stage, number, {"description": stack.name, "train": digest})
    first = stacks[0].done
    run_once(stage, stacks[0], slots[0])
    if first.status == "crash":
        raise SetupError(f"the baseline fails: {first.reason}", f"less {stage.folder(0)}/run.log")
    # What follows is limited by what this took; its own numbers must not be found here twice.
    stage.history = [replace(first, number=-1, values=[], seeds=[], speeds=[], hidden=[])]
    jobs = [stack for _ in range(rounds) for stack in stacks][1:]
    free = list(slots)
    busy: dict[Future[None], tuple[Stack, Slot]] = {}
    try:
        while jobs or busy:
            under_way = [stack for stack, _ in busy.values()]
            next_ones = [stack for stack in dict.fromkeys(jobs) if stack not in under_way]
            for stack in next_ones[: len(free)]:  # of one stack, one run at a time
                jobs.remove(stack)
                slot = free.pop(0)
                busy[in_thread(run_once, stage, stack, slot)] = stack, slot
            for future in wait(busy, 1.0, FIRST_COMPLETED).done:
                free.append(busy.pop(future)[1])
                future.result()
    finally:
        STOP.set()
        wait(busy, 30)
        STOP.clear()


def run_once(stage: Run, stack: Stack, slot: Slot) -> None:
    """One run more, unless one has failed."""
    done = stack.done
    if done.status == "crash":
        return
    label = f"{stage.tag.rpartition('/')[2]}, round {len(done.values) + 1}: {stack.name}"
    train_fairly(stage, Task("best", done, stack.source, slot=slot), label, -math.inf)
    if done.status == "crash":
        (stage.folder(done.number) / "proposal.json").unlink()  # the same command tries it again
    value = f"{done.values[-1]:.6f}" if done.status != "crash" and done.values else done.reason
    say(f"{label}: {value}")


def noise_of(stacks: list[Stack], sigma: float) -> Noise:
    """Of all these runs, with a prior."""
    return Run("", {"sigma": sigma}, "", [stack.done for stack in stacks]).noise()


@dataclass
class Effect:
    """By how much the first of two stacks has the higher val_bpb, and how sure that is."""

    gain: float = math.nan
    half: float = math.nan  # of the 90 % interval
    reason: str = ""  # why there is none

    def __str__(self) -> str:
        return self.reason or f"{self.gain:+.6f} ± {self.half:.6f}"

    def verdict(self) -> str:
        if self.gain > self.half:
            return "holds"
        return "hurts" if self.gain < -self.half else "no effect"


def effect(worse: Stack, better: Stack, noise: Noise) -> Effect:
    for stack in (worse, better):
        if stack.done.status == "crash" or not stack.done.values:
            return Effect(reason=f"{stack.name} fails: {stack.done.reason}")
    gain, error = noise.compare(undisturbed([worse.done]), undisturbed([better.done]))
    return Effect(gain, student(noise.freedom, ONE_SIDED) * error)


# ---------------------------------------------------------------------------
# From the kept commits to those that hold
# ---------------------------------------------------------------------------


def parse(words: list[str]) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("agent.py promote", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--tag", metavar="NAME", help="of a run, default the last")
    add("--scale", choices=tuple(LARGER), help="the larger one")
    add("--runs", type=int, default=RUNS, metavar="N", help=f"of each stack, default {RUNS}")
    add("--corpus", metavar="PATH", help="as the run had it; so for the next three")
    add("--slots", type=int, metavar="N", help="runs at a time")
    add("--gpus", type=lambda text: [int(each) for each in text.split(",")], metavar="0,1")
    add("--unconfined", action="store_true", help="let train.py run without a cage: your own risk")
    args = parser.parse_args(words)
    if args.runs < 1:
        parser.error("--runs must be 1 or more")
    return args


def stage_of(run: Run, name: str, scale: dict[str, Any]) -> Promotion:
    return Promotion(f"{run.tag}/promote-{name}", scale, run.start)


def promote(args: argparse.Namespace) -> None:
    """Measure, decide, and write the branch; each verdict is a line on stdout."""
    keep_log(None)
    check_checkout()
    lock(git_folder() / "autoresearch.lock", "this repository")
    known, _ = read_run(args.tag)
    set_budget(known.scale["budget"], known.scale["clock"])
    scale = describe_machine(args.corpus, known.scale["name"])
    args.slots = choose_slots(args, scale)
    scale["unconfined"] = args.unconfined
    run = find_run(known.tag, scale)
    kept = [e for e in run.history if e.number and e.status == "keep"]
    if not kept:
        raise SetupError(f"run {run.tag} has kept nothing", "python agent.py")
    settle_in(run, args.slots)
    scale["means"] = confine(args.unconfined)
    for slot in args.slots:
        slot.cold = True  # the next run is another train.py
    larger = args.scale or LARGER[scale["name"]]
    twice = not args.scale and larger == scale["name"] == "cpu"
    beyond = twice or larger != scale["name"]
    announce(run, len(kept), args, larger if beyond else "", twice)

    small = stage_of(run, "same", scale)
    trimmed = {e.number: without(run, e) for e in kept} if len(kept) > 1 else {}
    baseline = Stack("baseline", read_train(run.start))
    whole = Stack("all kept", run.source_of(run.best()))
    parts = {n: Stack(f"without {n}", text) for n, text in trimmed.items() if text is not None}
    with status_line():
        measure(small, [baseline, whole, *parts.values()], args.runs, args.slots)
    noise = noise_of([baseline, whole, *parts.values()], run.noise().sigma)
    total = effect(baseline, whole, noise)
    found(run).unlink(missing_ok=True)
    conclude(run, f"all {len(kept)} kept together: {total}, {total.verdict()}")
    at_small = {e.number: total if len(kept) == 1 else
                effect(parts[e.number], whole, noise) if e.number in parts else
                Effect(reason="cannot be taken out, later commits build on it") for e in kept}
    going = [e for e in kept if at_small[e.number].gain > 0 or at_small[e.number].reason]
    at_large: dict[int, Effect] = {}
    if beyond and going:
        at_large = at_larger(run, going, args, larger, twice)
    holding = tell(run, kept, at_small, at_large, beyond)
    finish(run, small, holding, args, baseline, whole)


def set_budget(budget: float, clock: str) -> None:
    os.environ.pop("AUTORESEARCH_BUDGET", None)
    os.environ.pop("AUTORESEARCH_BUDGET_TOKENS", None)
    name = "AUTORESEARCH_BUDGET_TOKENS" if clock == "tokens" else "AUTORESEARCH_BUDGET"
    os.environ[name] = f"{budget:.12g}"


def announce(run: Run, kept: int, args: argparse.Namespace, larger: str, twice: bool) -> None:
    """What it costs at most, before any of it is spent."""
    stacks = 2 + (kept if kept > 1 else 0)
    first = run.history[0]
    each = first.seconds / max(1, first.runs + first.disturbed)
    runs, hours = stacks * args.runs, stacks * args.runs * each / 3600 / len(args.slots)
    line = f"promotes {kept} kept commits: up to {runs} runs here, {hours:.1f} hours"
    if twice:
        line += f"; then up to {runs} of twice the depth and budget, {2 * hours:.1f} hours"
    elif larger:
        line += f"; then up to {runs} at the scale {larger}, each of the hours that one takes there"
    say(f"{line}; and {args.runs} of what holds. Killed, it goes on with the same command")


def at_larger(
    run: Run, going: list[Experiment], args: argparse.Namespace, larger: str, twice: bool
) -> dict[int, Effect]:
    """The effect of each commit at the larger scale, on top of the others that go there."""
    if twice:
        set_budget(2 * run.scale["budget"], run.scale["clock"])
    else:
        for name in ("AUTORESEARCH_BUDGET", "AUTORESEARCH_BUDGET_TOKENS"):
            os.environ.pop(name, None)
    scale = describe_machine(args.corpus, larger)
    scale |= {name: run.scale[name] for name in ("means", "memory_gb", "device")}
    stage = stage_of(run, "twice" if twice else larger, scale)
    grow = deepen if twice else str
    source, left = put_together(run, going)
    together = [e for e in going if e not in left]
    baseline = Stack("baseline", grow(read_train(run.start)))
    whole, parts = Stack("what gained", grow(source)), {}
    for e in together if len(together) > 1 else []:
        text, lost = put_together(run, [other for other in together if other is not e])
        if not lost:
            parts[e.number] = Stack(f"without {e.number}", grow(text))
    with status_line():
        measure(stage, [baseline, whole, *parts.values()], args.runs, args.slots)
    noise = noise_of([baseline, whole, *parts.values()], scale["sigma"])
    total = effect(baseline, whole, noise)
    where = "at twice the depth and budget" if twice else f"at the scale {larger}"
    conclude(run, f"what gained, {where}: {total}, {total.verdict()}")
    set_budget(run.scale["budget"], run.scale["clock"])
    alone = {together[0].number: total} if len(together) == 1 else {}
    tied = {e.number: Effect(reason="cannot be taken out, later commits build on it")
            for e in together}  # fmt: skip
    lone = {n: effect(stack, whole, noise) for n, stack in parts.items()}
    apart = {e.number: Effect(reason="conflicts without those that were left out") for e in left}
    return tied | apart | lone | alone


def conclude(run: Run, line: str) -> None:
    """Say it, and leave it for the report."""
    print_line(line, sys.stdout)
    with open(found(run), "a", encoding="utf-8") as file:
        file.write(line + "\n")


def tell(
    run: Run, kept: list[Experiment], small: dict[int, Effect], large: dict[int, Effect],
    beyond: bool,
) -> list[Experiment]:
    """A line for each commit; those that hold, and those that what holds is built on."""
    holding = []
    for e in kept:
        here, there = small[e.number], large.get(e.number)
        word = here.verdict()
        if beyond and there is not None:
            word = there.verdict()
            if word == "no effect" and here.verdict() == "holds":
                word = "holds only small"
        tied = here.reason.startswith("cannot") and (there is None or there.reason)
        word = "needed by later commits" if tied else word
        holding += [e] if word in ("holds", "needed by later commits") else []
        larger = f"; larger: {there}" if there else "; not tried larger" if beyond else ""
        line = f"{e.number:>4}  {word:<16}  {here}{larger}  {e.commit[:7]}  {e.description}"
        conclude(run, line)
    return holding


def finish(
    run: Run, small: Run, holding: list[Experiment], args: argparse.Namespace,
    baseline: Stack, whole: Stack,
) -> None:
    """Measure what holds by itself, write its branch, and say what to type."""
    source, left = put_together(run, holding)
    for e in left:
        say(f"{e.number} conflicts without the others, and is left out")
    taken = [e for e in holding if e not in left]
    if not taken:
        conclude(run, "nothing holds: there is nothing to take")
        return
    final = whole
    if source != whole.source:
        final = Stack("what holds", source)
        again = stage_of(run, "holds", small.scale)
        first = Stack("baseline", baseline.source)
        with status_line():
            measure(again, [first, final], args.runs, args.slots)
        baseline = first
    gain = effect(baseline, final, noise_of([baseline, final], run.noise().sigma))
    name = write_branch(run, taken)
    conclude(run, f"{len(taken)} commits hold, together {gain} in fresh runs: {name}")
    conclude(run, f"take them: git cherry-pick {run.start[:7]}..{name}")


def write_branch(run: Run, taken: list[Experiment]) -> str:
    """autoresearch/TAG-promoted, from the start. Raises SetupError if another one has its name."""
    name, tip, source = f"autoresearch/{run.tag}-promoted", run.start, read_train(run.start)
    for e in taken:
        source = merge(source, *before_and_after(run, e)) or source
        why = f"\n\n{e.hypothesis}" if e.hypothesis else ""
        tip = write_commit(source, tip, f"{e.description}{why}\n\n(from commit {e.commit})\n")
    old = resolve(f"refs/heads/{name}")
    if old and git("rev-parse", f"{old}^{{tree}}") != git("rev-parse", f"{tip}^{{tree}}"):
        raise SetupError(f"the branch {name} is there and holds something else",
                         f"git branch -m {name} {name}-old  # then the same command again")
    if not old:
        sync_git()
        move_refs((f"refs/heads/{name}", tip, None))
        sync_git()
    return name
