"""A night on 1 to 512 slots in virtual time: the real loop, with no training, git or API behind it.

python tests/benchmarks/simulate_slots.py                  # the table of README.md beside it
python tests/benchmarks/simulate_slots.py --slots 64 --reply 0 --nights 1
python tests/benchmarks/simulate_slots.py --measure-git    # seconds of the main thread's calls
python tests/benchmarks/simulate_slots.py --from a.json --like b.json  # predict b from a

agent.Night and all below it is the program's own code. Only its edges are exchanged: the clock, the
threads, a run, git, fsync, the screen and the proposer. Seconds are those of an H100 by
EVIDENCE.md, section 4, effects of ideas those of its section 2. Reports are those of loop.py.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ALL_COMPLETED, Future
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]
from loop import clone, tell  # noqa: E402

import agent  # noqa: E402
import journal  # noqa: E402
import proposals  # noqa: E402
from proposals import Edit, Proposal  # noqa: E402

# Seconds of a call in the main thread, by --measure-git: medians on the 2 cores of README.md.
CALLS = {"git": 0.0019, "sync_git": 0.0003, "fsync": 0.0003, "complete": 0.015}
EARLY = 13  # ideas that gain more, and more often
UNTOUCHED = 10**9  # values of the places in the beginning, from here on; an idea's is its number


@dataclass(frozen=True)
class Assumed:
    """What is assumed of runs, ideas and replies: seconds, bpb and shares."""

    budget: float = 300.0  # of training
    stretch: float = 1.0  # wall-clock seconds in which a second of the budget is spent
    stretch_spread: float = 0.002  # standard deviations of logarithms, here and below
    start: float = 24.0  # process, imports, compilation and warm-up
    start_spread: float = 0.15
    evaluation: float = 12.0  # of val; hidden takes as long again
    hidden: float = 12.0
    evaluation_spread: float = 0.05
    end: float = 1.0  # of a run, until the loop knows
    reply: float = 15.0  # median
    reply_spread: float = 0.4
    speed_spread: float = 0.01  # of tokens per second
    disturbed: float = 0.01  # of runs
    crashes: float = 0.02  # of ideas, after a uniform share of the budget
    baseline: float = 0.9979
    sigma: float = 0.00033  # in truth
    prior: float = 0.0003  # the scale's
    places: int = 34  # of train.py that an idea may edit, as many as it has knobs
    effects: bool = True  # False: no idea does anything
    calls: dict[str, float] = field(default_factory=lambda: CALLS)

    def mean_reply(self) -> float:
        return self.reply * math.exp(self.reply_spread**2 / 2)


# ---------------------------------------------------------------------------
# Clock and threads
# ---------------------------------------------------------------------------


class Turn:
    """A thread's place in the queue; it may stand there twice, and is called once."""

    def __init__(self):
        self.lock, self.over = threading.Lock(), False
        self.lock.acquire()


class Clock:
    """Virtual time for real threads, of which one runs at a time: by time, then first come."""

    def __init__(self):
        self.now, self.queue, self.order = 0.0, [], itertools.count()
        self.watching: Turn | None = None  # of the main thread, while it waits for futures
        self.main, self.busy = threading.get_ident(), 0.0  # seconds in which that one worked

    def monotonic(self) -> float:
        return self.now

    def enter(self, turn: Turn, seconds: float = 0.0) -> Turn:
        heapq.heappush(self.queue, (self.now + seconds, next(self.order), turn))
        return turn

    def hand_over(self, own: Turn | None) -> None:
        """Call the next in the queue, and come back when it is one's own turn."""
        turn = None
        while turn is None or turn.over:
            if not self.queue and own is None:  # the last thread of all
                return
            self.now, _, turn = heapq.heappop(self.queue)
        turn.over = True
        if turn is not own:
            turn.lock.release()
            if own is not None:
                own.lock.acquire()

    def sleep(self, seconds: float) -> None:
        began = self.now
        if seconds > 0:
            self.hand_over(self.enter(Turn(), seconds))
        if threading.get_ident() == self.main:
            self.busy += self.now - began

    def in_thread(self, function, *arguments) -> Future:
        """As journal.in_thread, from this instant on."""
        future, turn = Future(), Turn()

        def call():
            turn.lock.acquire()
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)
            if self.watching:
                self.enter(self.watching)
            self.hand_over(None)

        threading.Thread(target=call, daemon=True).start()
        self.enter(turn)
        return future

    def wait(self, futures, timeout=math.inf, return_when=ALL_COMPLETED):
        """As concurrent.futures.wait."""
        until, futures = self.now + timeout, set(futures)
        while True:
            done = {future for future in futures if future.done()}
            enough = len(futures) if return_when == ALL_COMPLETED else 1
            if len(done) >= enough or self.now >= until:
                return SimpleNamespace(done=done, not_done=futures - done)
            self.watching = self.enter(Turn(), until - self.now)
            self.hand_over(self.watching)
            self.watching = None


# ---------------------------------------------------------------------------
# Git in memory
# ---------------------------------------------------------------------------


class Git:
    """What the loop asks of git: train.py alone in a tree, commits, refs."""

    def __init__(self, source: str):
        self.blobs, self.parents, self.refs, self.staged = {}, {}, {}, {}
        self.trees = {}  # of commits: the blob is the tree
        blob = self.write(source)
        self.start = self.commit(blob, "", "start")

    def write(self, source: str) -> str:
        name = hashlib.sha1(source.encode()).hexdigest()
        self.blobs[name] = source
        return name

    def commit(self, tree: str, parent: str, message: str) -> str:
        name = hashlib.sha1(f"{tree} {parent} {message}".encode()).hexdigest()
        self.trees[name], self.parents[name] = tree, parent
        return name

    def __call__(self, *words: str, data: str | None = None, index: str | None = None) -> str:
        match words:
            case ("rev-parse", "--verify", "--quiet", name):
                if name not in self.refs:
                    raise agent.SetupError(f"git: {name}", "git status")
                return self.refs[name]
            case ("rev-parse", "--show-prefix"):
                return ""
            case ("rev-parse", name):
                return self.trees[name.removesuffix("^{tree}")]
            case ("for-each-ref", form, prefix):  # nobody has the branch checked out
                refs = [ref.rpartition("/")[2] for ref in self.refs if ref.startswith(prefix)]
                return "" if "worktree" in form else "\n".join(refs)
            case ("hash-object", *_):
                return self.write(data)
            case ("ls-tree", *_):
                return "100644 blob"
            case ("read-tree", tree):
                self.staged[index] = tree
            case ("update-index", _, entry):
                self.staged[index] = entry.split(",")[1]
            case ("write-tree",):
                return self.staged.pop(index)
            case ("commit-tree", tree, _, parent, *_):
                return self.commit(tree, parent, data)
            case ("cat-file", _, name):
                return self.blobs[self.trees[name.removesuffix(":./train.py")]]
            case ("update-ref", "--stdin"):
                self.move([line.split()[1:] for line in data.splitlines()])
            case _:
                raise NotImplementedError(words)
        return ""

    def move(self, moves: list[list[str]]) -> None:
        for ref, _, old in moves:
            if self.refs.get(ref, "0" * len(old)) != old:
                raise agent.SetupError(f"git update-ref: {ref} is not at {old}", "git status")
        self.refs.update({ref: new for ref, new, _ in moves})


# ---------------------------------------------------------------------------
# One night
# ---------------------------------------------------------------------------


def overlap(start: float, end: float, until: float) -> float:
    return max(0.0, min(end, until) - min(start, until))


class Simulation:
    """A night of the real loop; what came of it stands in the attributes."""

    def __init__(self, assumed: Assumed, slots: int, seed: int = 1, hours: float | None = None,
                 experiments: int | None = None, scored: dict | None = None,
                 checkout: Path | None = None):
        """`scored`: results by (number, count), of a real night, to be scored like; `checkout`:
        to make git's calls in, which are timed then, as is what else the main thread does."""
        self.assumed, self.slots, self.seed, self.scored = assumed, slots, seed, scored or {}
        self.clock = Clock()
        self.until = math.inf if hours is None else 3600 * hours
        self.args = argparse.Namespace(
            slots=[agent.Slot() for _ in range(slots)], hours=hours, experiments=experiments,
            until=self.until,
        )  # fmt: skip
        self.checkout, self.ideas = checkout, 0
        places = [f"PLACE_{n} = {UNTOUCHED + n}\n" for n in range(assumed.places)]
        self.gains = {UNTOUCHED + n: 0.0 for n in range(assumed.places)}  # of a place, by its value
        self.git = Git("".join(places)) if not checkout else journal.git
        self.start = self.git.start if not checkout else commit_places(checkout, places)
        self.runs, self.verdicts, self.said = [], [], []
        self.seconds = defaultdict(list)  # of the main thread's calls
        self.ready: dict[str, float] = {}  # when a slot could have had an idea
        self.free_since = dict.fromkeys(self.args.slots, 0.0)
        self.idle = Counter()  # seconds of slots, by what they waited for
        self.baseline_end = math.inf

    def spend(self) -> Simulation:
        """Run agent.Night to its end."""
        scale = {"name": "gpu", "budget": self.assumed.budget, "clock": "wall", "manifest": "",
                 "referee": "", "device": "virtual", "sigma": self.assumed.prior,
                 "gpus": [], "rows": ""}  # fmt: skip
        self.run = journal.Run("t", scale, self.start)
        self.night = agent.Night(self.run, self.propose, self.args)
        self.propose.__func__.ahead = True
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        with tempfile.TemporaryDirectory(dir=memory) as folder, self.edges(Path(folder)):
            self.night.work()
            self.sources = [(e, self.run.source_of(e)) for e in self.run.history]
        self.end = min(self.until, self.clock.now)
        for slot in self.args.slots:
            self.note_idle(slot, math.inf)
        return self

    @contextmanager
    def edges(self, folder: Path):
        """The program between this clock, this git and these runs."""
        virtual = SimpleNamespace(
            monotonic=self.clock.monotonic, time=self.clock.monotonic, sleep=self.clock.sleep
        )
        git, sync_git = self.costly("git", self.git), self.costly("sync_git", journal.sync_git)
        here = {"ROOT": self.checkout or folder, "time": virtual, "git": git}
        screen = {"say": self.said.append, "show_result": self.see_verdict}
        loop = {"in_thread": self.in_thread, "wait": self.clock.wait, "STOP": threading.Event(),
                "train_once": self.train_once, "sync_git": sync_git,
                "complete": self.costly("complete", proposals.complete)}  # fmt: skip
        with ExitStack() as stack:
            enter = stack.enter_context
            enter(mock.patch.multiple(agent, **here, **loop, **screen))
            enter(mock.patch.multiple(journal, **here, RESULTS=here["ROOT"] / "results.tsv",
                                      say=self.said.append))  # fmt: skip
            enter(mock.patch.object(agent.Night, "refresh", lambda *words, **more: None))
            enter(mock.patch.object(os, "fsync", self.costly("fsync", os.fsync)))
            enter(mock.patch.object(tempfile, "tempdir", str(folder)))
            yield

    def costly(self, name: str, function):
        """A call that takes its virtual seconds, of whichever thread makes it."""
        to_disk = name in ("sync_git", "fsync")

        def call(*words, **more):
            began = time.perf_counter()
            try:
                return function(*words, **more) if self.checkout or not to_disk else None
            finally:
                took = self.assumed.calls[name]
                if self.checkout:
                    took = time.perf_counter() - began
                if threading.get_ident() == self.clock.main:
                    self.seconds[name].append(took)
                self.clock.sleep(took)

        return call

    def in_thread(self, function, *arguments) -> Future:
        """A thread, and the book of its slot's idle time."""
        if function is not agent.carry_out:
            return self.clock.in_thread(function, *arguments)
        task = arguments[1]
        idea = task.done.description if task.kind == "idea" else ""
        self.note_idle(task.slot, self.ready[idea] if idea else self.clock.now)

        def carry_out():
            try:
                function(*arguments)
            finally:
                self.free_since[task.slot] = self.ready[idea] = self.clock.now
                if task.kind == "baseline":
                    self.baseline_end = self.clock.now

        return self.clock.in_thread(carry_out)

    def note_idle(self, slot: agent.Slot, ready: float) -> None:
        """Book what a slot waited for since its last task: the baseline, an idea, the loop."""
        until = min(self.clock.now, self.until)
        since = min(until, self.free_since[slot])
        measured = min(until, max(since, self.baseline_end))
        thought = min(until, max(measured, ready))
        self.idle["baseline"] += measured - since
        self.idle["idea"] += thought - measured
        self.idle["loop"] += until - thought

    def see_verdict(self, run: journal.Run, done: journal.Experiment) -> None:
        self.verdicts.append((self.clock.now, done))

    # What an idea is, and what its run does

    def propose(self, run: journal.Run) -> Proposal:
        """An idea for one place of the best train.py, after a reply's time."""
        self.ideas += 1
        idea, choose = self.ideas, random.Random(f"{self.seed} idea {self.ideas}")
        self.gains[idea] = effect(choose, idea) if self.assumed.effects else 0.0
        place = choose.randrange(self.assumed.places)
        source = run.source_of(run.best())
        line = next(x for x in source.splitlines() if x.startswith(f"PLACE_{place} = "))
        self.gains[idea] += self.gains[int(line.split()[-1])]
        edit = Edit(f"{line}\n", f"PLACE_{place} = {idea}\n")
        self.clock.sleep(spread(choose, self.assumed.reply, self.assumed.reply_spread))
        proposal = Proposal(f"idea {idea}", "", [edit], "virtual", saw=len(run.history))
        self.ready[proposal.description] = self.clock.now
        return proposals.complete(proposal, run)

    def value(self, source: str) -> float:
        """val_bpb of a train.py without noise."""
        lines = (line for line in source.splitlines() if line.startswith("PLACE_"))
        return self.assumed.baseline - sum(self.gains[int(line.split()[-1])] for line in lines)

    def train_once(self, run, task, count, label, hidden_below=math.inf) -> dict:
        """A result.json as the referee's, after a run's virtual seconds."""
        known, began = self.assumed, self.clock.now
        choose = random.Random(f"{self.seed} run {count} {task.source}")
        val_bpb = self.value(task.source) + choose.gauss(0, known.sigma)
        result = {"status": "ok", "reason": "", "val_bpb": val_bpb, "disturbed": "",
                  "seed": task.seed,
                  "peak_vram_mb": 45_000.0, "num_steps": 950, "num_params_M": 80.9,
                  "training_seconds": known.budget,
                  "total_tokens_M": 500 * spread(choose, 1, known.speed_spread),
                  "hidden_bpb": val_bpb}  # fmt: skip
        result |= self.scored.get((task.done.number, count), {})
        start = spread(choose, known.start, known.start_spread)
        training = known.budget * spread(choose, known.stretch, known.stretch_spread)
        evaluation = spread(choose, known.evaluation, known.evaluation_spread)
        if result["val_bpb"] < hidden_below:
            evaluation += spread(choose, known.hidden, known.evaluation_spread)
        else:
            result["hidden_bpb"] = None
        if task.kind == "idea" and random.Random(
            f"{self.seed} crash {task.proposal.edits[0].replace}").random() < known.crashes:
            result |= {"status": "crash", "reason": "made up"}
            training, evaluation = training * choose.random(), 0.0
        elif choose.random() < known.disturbed:
            result["disturbed"] = "made up"
        total = start + training + evaluation + known.end
        result |= {"start_seconds": start, "start_wall_seconds": start, "answers_seconds": 1.0,
                   "training_wall_seconds": training, "evaluation_seconds": evaluation,
                   "total_seconds": total}  # fmt: skip
        self.clock.sleep(total)
        self.runs.append((task.done.number, began, self.clock.now, result))
        path = run.folder(task.done.number) / f"result{f'-{count}' if count > 1 else ''}.json"
        path.write_text("{}", encoding="utf-8")  # that there is one is what counts
        return result


def spread(choose: random.Random, median: float, deviation: float) -> float:
    return median * math.exp(choose.gauss(0, deviation))


def effect(choose: random.Random, idea: int) -> float:
    """What an idea gains, in bpb, by the model of EVIDENCE.md, section 2."""
    lot = choose.random()
    if idea > EARLY and lot < 0.28:
        return 0.0
    if lot < (0.72 if idea <= EARLY else 0.56):
        return choose.expovariate(1 / (2.4e-3 if idea <= EARLY else 0.22e-3))
    return -choose.lognormvariate(math.log(1.12e-3), 1.1)


# ---------------------------------------------------------------------------
# What the calls of the main thread take
# ---------------------------------------------------------------------------


def commit_places(checkout: Path, places: list[str]) -> str:
    """The real train.py with lines to edit at its end, committed in a checkout of its own."""
    with open(checkout / "train.py", "a", encoding="utf-8") as file:
        file.writelines(places)
    identity = ["-c", "user.name=bench", "-c", "user.email=bench@localhost"]
    subprocess.run(["git", *identity, "commit", "-qam", "places"], cwd=checkout, check=True)
    return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=checkout, text=True).strip()


def measure_calls(experiments: int) -> None:
    """A night of one slot with real git, and the seconds of its calls."""
    with tempfile.TemporaryDirectory() as folder:
        clone(Path(folder))
        known = Simulation(Assumed(), 1, experiments=experiments, checkout=Path(folder)).spend()
    for name, seconds in known.seconds.items():
        print(f"{name:9} {len(seconds) / experiments:5.1f} an experiment, median "
              f"{1000 * statistics.median(seconds):5.1f} ms, mean "
              f"{1000 * statistics.fmean(seconds):5.1f} ms")  # fmt: skip
    print(f"together {known.clock.busy / experiments:.3f} s an experiment, "
          f"{len(known.runs) / experiments:.2f} runs each")  # fmt: skip


# ---------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------


def told(night: Simulation) -> dict[str, float]:
    """A night's figures, up to its end by --hours."""
    seen = [done for at, done in night.verdicts if at <= night.end]
    tried = [done for done in seen if done.number and done.status != "measure"]
    kept = [done for done in tried if done.status == "keep"]
    runs = [run for run in night.runs if run[2] <= night.end]
    again = sum(text.startswith("once more") for text in night.said)
    dropped = sum(": dropped, " in text for text in night.said)
    unfit = sum(done.reason == "does not fit on the new best" for done in tried)
    value = {e.commit: night.value(source) for e, source in night.sources}
    best = [done for done in seen if done.status == "keep"][-1]
    gain, hours = night.assumed.baseline - value[best.commit], night.end / 3600
    false = sum(value[e.commit] >= value[night.git.parents[e.commit]] for e in kept)
    whole = night.slots * night.end
    training = sum(
        overlap(start + result["start_seconds"],
                start + result["start_seconds"] + result["training_wall_seconds"], night.end)
        for _, start, _, result in night.runs)  # fmt: skip
    waited = sum(night.idle.values())
    return {
        "experiments an hour": len(tried) / hours,
        "runs an experiment": len(runs) / max(1, len(tried)),
        "slot time: training, %": 100 * training / whole,
        "start, evaluation, end of runs, %": 100 * (1 - (training + waited) / whole),
        "waiting for the baseline, %": 100 * night.idle["baseline"] / whole,
        "waiting for an idea, %": 100 * night.idle["idea"] / whole,
        "waiting for the loop, %": 100 * night.idle["loop"] / whole,
        "main thread busy, %": 100 * night.clock.busy / night.clock.now,
        "true gain, 1e-3 bpb": 1e3 * gain,
        "gain an hour, 1e-3": 1e3 * gain / hours,
        "gain a GPU-hour, 1e-3": 1e3 * gain / hours / night.slots,
        "keeps": len(kept),
        "of them false, %": 100 * false / max(1, len(kept)),
        "winners run again on a new best, %": 100 * again / max(1, again + len(kept)),
        "winners that fit there no more": unfit,
        "ideas that fit no more": dropped,
    }


def table(columns: dict[int, list[Simulation]]) -> str:
    """Markdown, a column for each number of slots: means over its nights."""
    figures = {slots: [told(night) for night in nights] for slots, nights in columns.items()}
    head = [f"{slots} ({len(nights)} n.)" for slots, nights in columns.items()]
    lines = ["| slots (nights) | " + " | ".join(head) + " |", "|---|" + "---|" * len(head)]
    for name in next(iter(figures.values()))[0]:
        means = [statistics.fmean(each[name] for each in nights) for nights in figures.values()]
        lines.append(f"| {name} | " + " | ".join(f"{mean:.3g}" for mean in means) + " |")
    return "\n".join(lines)


def limits(night: Simulation) -> str:
    """Where one proposer and the main thread would be the limit, from what one night took."""
    experiments = len(night.run.experiments())
    slot = sum(end - start for _, start, end, _ in night.runs) / experiments
    main, reply = night.clock.busy / experiments, night.assumed.mean_reply()
    lines = [f"an experiment takes a slot {slot:.0f} s and the main thread {main:.3f} s"]
    if reply:
        lines.append(f"so one proposer with {reply:.1f} s a reply feeds {slot / reply:.0f} slots")
    lines.append(f"and one main thread serves {slot / main:.0f}")
    return ", ".join(lines) + f" ({night.slots} slots)"


# ---------------------------------------------------------------------------
# A real night, predicted
# ---------------------------------------------------------------------------


def learn(runs: list[list]) -> Assumed:
    """What runs took in a report of loop.py, baseline included, at whatever budget."""
    fine = [(end - start, r) for _, start, end, r in runs if r["status"] == "ok"]
    scored = [r["hidden_bpb"] is not None for _, r in fine if "hidden_bpb" in r]
    alone = [r["evaluation_seconds"] for _, r in fine if r.get("hidden_bpb") is None]
    both = [r["evaluation_seconds"] for _, r in fine if r.get("hidden_bpb") is not None]
    evaluation = statistics.fmean(alone) if alone else statistics.fmean(both) / 2
    hidden = statistics.fmean(both) - evaluation if any(scored) else evaluation
    start, start_spread = fit([r["start_wall_seconds"] for _, r in fine])
    stretch, stretch_spread = fit(
        [r["training_wall_seconds"] / r["training_seconds"] for _, r in fine])  # fmt: skip
    parts = ("start_wall_seconds", "training_wall_seconds", "evaluation_seconds")
    end = statistics.fmean(took - sum(r[part] for part in parts) for took, r in fine)
    values = [r["val_bpb"] for _, r in fine]
    return Assumed(
        stretch=stretch, stretch_spread=stretch_spread, start=start, start_spread=start_spread,
        evaluation=evaluation, hidden=hidden, evaluation_spread=0.0, end=end, reply_spread=0.0,
        disturbed=0.0, crashes=0.0, baseline=statistics.fmean(values), effects=False,
        sigma=statistics.stdev(values), prior=agent.scale_named("cpu").sigma,
    )  # fmt: skip


def fit(seconds: list[float]) -> tuple[float, float]:
    """Median and deviation of a lognormal."""
    logs = [math.log(each) for each in seconds]
    return math.exp(statistics.fmean(logs)), statistics.stdev(logs)


def predict(learned: Path, real: Path) -> None:
    """Print where the seconds of a real night went, and where they go in a simulated one.

    Its runs take what those of another night took, at this one's budget and reply. They score what
    they scored, so that the same ones are repeated: chance says how many those are.
    """
    night = json.loads(real.read_text(encoding="utf-8"))
    known = learn(json.loads(learned.read_text(encoding="utf-8"))["runs"])
    known = replace(known, budget=night["budget"], reply=night["reply"])
    args = argparse.Namespace(experiments=night["experiments"])
    names = ("val_bpb", "hidden_bpb", "total_tokens_M", "training_seconds", "disturbed")
    scored = {(n, r["count"]): {name: r[name] for name in names if name in r}
              for n, _, _, r in night["runs"] if r["status"] == "ok"}  # fmt: skip

    def rate(title: str, scored: dict, seed: int) -> float:
        found = Simulation(known, night["slots"], seed, None, args.experiments, scored).spend()
        return tell(title, found.runs, args, night["slots"])[0]

    print(known)
    was = tell("measured", night["runs"], args, night["slots"])[0]
    rates = [rate(f"simulated, seed {seed}", scored, seed) for seed in range(1, 6)]
    with redirect_stdout(None):
        free = [rate("", {}, seed) for seed in range(1, 41)]
    like = statistics.fmean(rates)
    print(f"\nmeasured {was:.1f} an hour, simulated {like:.1f}: {100 * (like / was - 1):+.1f} %; "
          f"with other luck {statistics.fmean(free):.1f}, {min(free):.1f} to {max(free):.1f}")


def main() -> None:
    known, form = Assumed(), argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--slots", type=int, nargs="+", default=[1, 2, 8, 64, 512])
    add("--hours", type=float, default=8.0)
    add("--nights", type=int, help="for each, default 16 slots' worth, at most 8, at least 1")
    add("--seed", type=int, default=1, help="of the first night")
    for name in ("budget", "start", "evaluation", "end", "reply", "sigma", "crashes"):
        add(f"--{name}", type=float, default=getattr(known, name))
    add("--measure-git", action="store_true", help="time real calls, and end")
    add("--from", dest="learned", type=Path, help="a report, to learn from what its runs took")
    add("--like", type=Path, help="another, to predict, and end")
    args = parser.parse_args()
    if args.like:
        return predict(args.learned, args.like)
    if args.measure_git:
        return measure_calls(100)
    given = {name: getattr(args, name) for name in vars(args) if name in asdict(known)}
    known = replace(known, hidden=args.evaluation, **given)
    columns = {}
    for slots in args.slots:
        nights = args.nights or min(8, max(1, 16 // slots))
        columns[slots] = [Simulation(known, slots, args.seed + n, args.hours).spend()
                          for n in range(nights)]  # fmt: skip
        print(limits(columns[slots][0]), file=sys.stderr)
    print(table(columns))


if __name__ == "__main__":
    main()
