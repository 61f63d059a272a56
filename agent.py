"""The loop: propose one edit of train.py, run it, judge it, keep it or drop it, record it.

    python agent.py                           # all night, with Claude if ANTHROPIC_API_KEY is set
    python agent.py --experiments 8           # until it has 8; without a key Optuna proposes
    python agent.py --patches a.diff b.diff   # judge your own edits
    python agent.py report                    # what the night comes to, see report --help
    python agent.py promote                   # which kept commits hold, see promote --help

A kept edit is a commit on the branch autoresearch/TAG; every edit that was tried is a commit under
refs/autoresearch/TAG/. Working tree, index and HEAD are never touched; only results.tsv grows.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while modules are loaded
# What lies beside this file must not stand in for a package.
here = os.path.dirname(os.path.realpath(__file__))
sys.path = [path for path in sys.path if os.path.realpath(path) != here] + [here]

import argparse
import importlib
import json
import math
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

bytecode, sys.pycache_prefix = sys.pycache_prefix, os.devnull  # an old one must not stand in
from journal import (
    LOG,
    RESULTS,
    ROOT,
    SLOWER,
    STOP,
    Experiment,
    Run,
    append_rows,
    commit_message,
    fingerprint,
    flush_screen,
    git,
    git_folder,
    in_thread,
    keep_log,
    lock,
    move_refs,
    node_count,
    one_line,
    patiently,
    read_journal,
    read_results,
    read_train,
    resolve,
    row,
    say,
    show_end,
    show_result,
    show_start,
    status_line,
    sync_git,
    undisturbed,
    write_commit,
)
from prepare import SetupError, hide_memory, rows_folder, scale_named, write_atomic
from proposals import Edit, Proposal, Proposer, Rejected, complete, identify
from researcher import MODEL, CapReached, choose_proposer
from rule import ADOPTED, Noise, judge, level
from slots import (
    Slot,
    Task,
    check_memory,
    choose_slots,
    end_leftover,
    read_json,
    result_path,
    screen,
    train_once,
    trusted_command,
    trusted_environment,
)
from warden import MEMORY_SHARE, memory_available

sys.pycache_prefix = bytecode

BASELINE_RUNS = 3
BEST_RUNS = 5  # of the best, at most, with its repeated measurements
REPORT_SECONDS = 60.0  # between two writings of report.html
MEASURE_AFTER = 10  # candidates without a keep, then the best is measured again
REPEATS = 3  # of disturbed runs, in one experiment
CRASHES = 3  # in a row, then the best is run again, to see whose fault they are


# ---------------------------------------------------------------------------
# One experiment
# ---------------------------------------------------------------------------


def carry_out(run: Run, task: Task) -> None:
    """One run, in a thread of its own, noted in task.done."""
    kinds = {"baseline": run_baseline, "best": run_best, "commit": run_commit, "idea": run_idea}
    task.done.began = task.done.began or time.time()
    kinds[task.kind](run, task)


def run_idea(run: Run, task: Task) -> None:
    """One run more; the verdict is not given here."""
    done, best = task.done, run.scores_of(task.base.number)
    label = f"{done.number}: {done.description}" + (", on another seed" if done.runs else "")
    on_it = [score for (seed, *_), score in best.items() if seed == run.next_seed(done.seeds)]
    usual = max([statistics.fmean(best.values()), *on_it])
    done.status = ""
    if not train_fairly(run, task, label, usual + 0.5 * run.noise().sigma):
        done.status = "discard"


def decide(run: Run, task: Task) -> None:
    """What the keep rule says of the runs that an idea has, those from before a kill included."""
    if result_path(run, task.done.number, 1 + runs_of(run, task.done.number, task.done)).exists():
        task.done.status = "again"
        return
    done, noise = task.done, run.noise(task.done)
    scores, best = undisturbed([done]), run.scores_of(task.base.number)
    lowest = min(e.val_bpb() for e in run.history if e.believed())
    simpler = node_count(task.source) < node_count(run.source_of(task.base))
    done.gain, _ = noise.compare(best, scores)
    done.status, done.reason = judge(
        scores, best, noise, level(run.history), lowest, simpler, hidden_gain(run, task, noise))


def train_fairly(run: Run, task: Task, label: str, hidden_below: float = math.inf) -> bool:
    """Add one run to be judged; False if the machine was disturbed again and again.

    Set aside and made up for is a run beside another tenant of the GPU or on a throttled card, and
    one in which the same code trained on fewer tokens per second than in another, newer or older.
    """
    done = task.done
    wanted = len(done.values) + 1
    for _ in range(1 + REPEATS):
        count = 1 + runs_of(run, done.number, done)
        known = {*run.seeds_of(done.number), *done.seeds}
        if not task.seed or task.seed in known:
            task.seed = run.next_seed(known)
        add_result(run, done, train_once(run, task, count, label, hidden_below), label)
        if done.status == "crash":
            return True
        if len(done.values) == wanted:
            done.reason = ""
            return True
    done.reason = f"disturbed: {done.reason}"
    return False


def runs_of(run: Run, number: int, *more: Experiment) -> int:
    """How often it was run, with what is not yet recorded."""
    return sum(e.runs + e.disturbed for e in [*run.of(number), *more])


def add_result(run: Run, done: Experiment, result: dict[str, Any], label: str) -> None:
    """Add a run to an experiment; what was disturbed is set aside, this run or an older one."""
    timed = run.scale["clock"] != "tokens"  # else a slow run has no worse score
    if result.get("disturbed") and (timed or result["status"] == "crash"):
        done.reason, done.disturbed = result["disturbed"], done.disturbed + 1
        done.seconds += result["total_seconds"]
        say(f"disturbed: {done.reason}: {label}")
        return
    add_run(done, result)
    if not timed:
        done.speeds.clear()
    known = [speed for e in [*run.of(done.number), done] for speed in e.speeds]
    slow = [n for n, speed in enumerate(done.speeds) if speed < (1 - SLOWER) * max(known)]
    for n in reversed(slow if done.status != "crash" else []):
        share = 100 * (1 - done.speeds[n] / max(known))
        done.reason = f"{share:.0f} % fewer tokens/s than the same code had"
        say(f"disturbed: {done.reason}: {label}")
        done.runs, done.disturbed = done.runs - 1, done.disturbed + 1
        for each in (done.values, done.seeds, done.draws, done.speeds, done.hidden):
            del each[n]


def hidden_gain(run: Run, task: Task, noise: Noise) -> float | None:
    """What a candidate gains on the hidden split over its base, if both were scored on it."""
    best, own = run.scores_of(task.base.number, "hidden"), undisturbed([task.done], "hidden")
    return noise.compare(best, own)[0] if best and own else None


def unfinished(run: Run) -> list[Proposal]:
    """Proposals that were under way or waiting when the program ended: they are paid for."""
    found, known = [], {e.number for e in run.history}
    for path in sorted((run.folder(0).parent).glob("[1-9]*/proposal.json")):
        stored = read_json(path)
        try:
            settings = stored.pop("settings")
            stored.pop("parent")
            proposal = Proposal(edits=[Edit(**edit) for edit in stored.pop("edits")], **stored)
        except (KeyError, TypeError):
            continue
        if settings == run.settings() and proposal.number not in known:
            found.append(proposal)
    return sorted(found, key=lambda proposal: proposal.number)


def lay_out(run: Run, number: int, facts: dict[str, Any]) -> None:
    """The experiment's folder with proposal.json; results of the same proposal stay."""
    folder, parent = run.folder(number), run.best().commit if run.history else run.start
    facts = {**facts, "parent": parent, "settings": run.settings()}
    if read_json(folder / "proposal.json") != facts:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():  # last of all the proposal, which is paid for
            if path.is_file() and path.name != "proposal.json":
                path.unlink()
        write_atomic(folder / "proposal.json", [json.dumps(facts, indent=1).encode()])


def add_run(done: Experiment, result: dict[str, Any]) -> None:
    """Add one result.json to an experiment."""
    done.runs += 1
    done.seconds += result["total_seconds"]
    if result["status"] == "crash":
        done.status, done.reason = "crash", one_line(result["reason"], 300)
        return
    done.training_seconds += result["training_wall_seconds"]
    done.evaluation_seconds += result.get("evaluation_seconds", 0.0)
    done.values.append(result["val_bpb"])
    done.seeds.append(result["seed"])
    done.draws.append(result.get("draws", 0.0))
    done.speeds.append(result["total_tokens_M"] / max(result["training_seconds"], 1e-9))
    done.silence_seconds = max(done.silence_seconds, result.get("silence_seconds", 0.0))
    done.hidden.append(result.get("hidden_bpb"))
    done.memory_gb = max(done.memory_gb, result["peak_vram_mb"] / 1024)
    done.tokens_M, done.steps = result["total_tokens_M"], result["num_steps"]
    done.params_M = result.get("num_params_M", 0.0)
    done.printed, done.curve = result.get("printed", ""), result.get("curve", [])
    done.answers_seconds = max(done.answers_seconds, result["answers_seconds"])
    done.start_seconds = max(done.start_seconds, result["start_seconds"])
    trained = result["start_wall_seconds"] + result["training_wall_seconds"]
    done.trained_seconds = max(done.trained_seconds, trained)  # the first run compiles


def record(run: Run, done: Experiment, source: str | None, parent: str = "") -> bool:
    """Make it last: the commit; its ref, which is the journal, with the branch if kept; the row.

    `source` None: what was measured is the train.py of the parent, by default of the best.
    False, and nothing is recorded, if the branch is no longer at the parent.
    """
    parent = parent or (run.best().commit if run.history else run.start)
    done.order = 1 + max((e.order for e in run.history), default=0)
    done.ended = time.time()
    old = run.source_at(parent)
    identify(done, old if source is None else source, old, run.scale["name"])
    commit = patiently(write_commit, source, parent, commit_message(done, run.settings()))
    ref = f"refs/autoresearch/{run.tag}/{done.number}"
    if done.number == 0 or done.status == "measure":
        refs = ("--format=%(refname:lstrip=3)", f"refs/autoresearch-measure/{run.tag}/")
        number = 1 + max(map(int, git("for-each-ref", *refs).split()), default=-1)
        ref = f"refs/autoresearch-measure/{run.tag}/{number}"
    moves = [(ref, commit, None)]
    if source is not None and done.status == "keep" and not shown_in(run):
        moves.append((run.branch(), commit, parent))
    patiently(sync_git)  # what is named must be there
    try:
        patiently(move_refs, *moves)
    except SetupError:
        if len(moves) == 1 or resolve(run.branch()) == parent:
            raise
        return False
    patiently(sync_git)
    done.commit = parent if source is None else commit
    stored = run.folder(done.number) / "proposal.json"
    if source is not None and (facts := read_json(stored)):  # it is not unfinished
        patiently(write_atomic, stored, [json.dumps(facts | {"commit": commit}, indent=1).encode()])
    patiently(append_rows, [row(done, run.tag)])
    show_result(run, done)
    run.history.append(done)
    return True


def run_baseline(run: Run, task: Task) -> None:
    """Run train.py untouched once."""
    task.result = train_once(run, task, task.count, task.done.description)


def run_best(run: Run, task: Task) -> None:
    """Run the best once more, so that it does not stay a lucky number."""
    done = task.done
    if not train_fairly(run, task, f"the best again: {done.description}"):
        say("the best is slower than it was, again and again; going on with what there is")
    elif done.status == "crash":
        say(f"the best ({done.number}) now fails; does the baseline? {done.reason}")
        check_machine(run, task)
        done.status = "measure"


def check_machine(run: Run, failed: Task) -> None:
    """Raise SetupError if the baseline, which worked once, now fails as the best did."""
    number, last = failed.done.number, runs_of(run, failed.done.number, failed.done)
    source, count = run.source_of(run.history[0]), 1 + (runs_of(run, 0) if number else last)
    task = Task("baseline", Experiment(0, "baseline"), source, slot=failed.slot, seed=run.seed(1))
    result = train_once(run, task, count, "the baseline, to see if it is the machine")
    result_path(run, 0, count).unlink(missing_ok=True)
    if result["status"] == "crash":
        result_path(run, number, last).unlink(missing_ok=True)  # or it would be found again
        said = f"the baseline now fails: it is the machine, not the ideas: {result['reason']}"
        raise SetupError(one_line(said, 500), "dmesg | tail")


def run_commit(run: Run, task: Task) -> None:
    """Measure what a person has committed on the branch: it is the best, whatever it scores."""
    done = task.done
    fair = train_fairly(run, task, f"adopted: {done.description}")
    if not fair or done.status == "crash":  # which would be found again
        (run.folder(done.number) / "proposal.json").unlink(missing_ok=True)
        said = f"your commit on autoresearch/{run.tag} {'fails' if fair else 'has no score'}"
        hint = f"git branch -f autoresearch/{run.tag} {task.base.commit[:7]}"
        raise SetupError(f"{said}: {done.reason}", hint if fair else "nvidia-smi")
    done.reason = ADOPTED


# ---------------------------------------------------------------------------
# The night
# ---------------------------------------------------------------------------


def check_checkout() -> None:
    """Raise SetupError unless this is a git checkout with train.py committed as it stands."""
    if shutil.which("git") is None:
        raise SetupError("git is not installed", "apt install git")
    try:
        git("rev-parse", "--verify", "HEAD")
    except SetupError as error:
        hint = "git init && git add . && git commit -m start"
        said = str(error).splitlines()[0].removeprefix("error: ")
        raise SetupError(f"{ROOT} is no git repository with a commit: {said}", hint) from None
    path = ROOT / "train.py"
    if not path.exists():
        raise SetupError("train.py is missing", "git checkout HEAD -- train.py")
    head = read_train("HEAD") if resolve("HEAD:./train.py") else ""
    if path.read_text(encoding="utf-8", errors="replace").splitlines() != head.splitlines():
        hint = "git add train.py && git commit -m start"
        raise SetupError("train.py is not committed as it stands", hint)
    try:
        fingerprint(head)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise SetupError(f"train.py cannot be read: {error}", "python -m ast train.py") from error
    read_results()
    for path in (ROOT, RESULTS):
        if path.exists() and not os.access(path, os.W_OK):
            raise SetupError(f"no permission to write {path}", f"chmod u+w {path}")
    tempfile.gettempdir()  # is chosen now, not at 3 a.m. on a full disk
    if shutil.disk_usage(ROOT).free < 1e9:
        raise SetupError("less than 1 GB of disk is free", "df -h .")


def describe_machine(corpus: str | None, scale: str = "") -> dict[str, Any]:
    """What prepare.py says of machine, scale and rows; it prepares missing rows first."""
    command = trusted_command("prepare.py", *(["--corpus", corpus] if corpus else []))
    environment = os.environ | ({"AUTORESEARCH_SCALE": scale} if scale else {})
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", env=environment)
    if done.returncode < 0:
        raise SetupError(f"prepare.py was ended by signal {-done.returncode}", "dmesg | tail")
    if done.returncode:  # it has said why
        raise SystemExit(done.returncode)
    return json.loads(done.stdout)


def confine(unconfined: bool) -> str:
    """The means of confinement that withstood the self-test of now. Raises SetupError for none."""
    if ROOT == Path(sys.prefix).resolve():  # which every run can read
        said = f"the virtual environment is the checkout itself, {ROOT}"
        raise SetupError(said, "python -m venv .venv")
    if unconfined:
        say("NOT confined: train.py runs as you, with your files and your network (--unconfined)")
        return "unconfined"
    done = subprocess.run(
        trusted_command("warden.py", "--self-test"), env=trusted_environment(),
        stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8",
    )
    if done.returncode:
        problem = done.stderr.removeprefix("error: ").partition("\nhint: ")[0]
        hint = "apt install bubblewrap  # or, at your own risk: python agent.py --unconfined"
        raise SetupError(f"train.py cannot be confined: {one_line(problem, 600)}", hint)
    say(f"confined: {done.stdout.strip()}")
    return done.stdout.partition(",")[0]


def find_run(tag: str | None, scale: dict[str, Any]) -> Run:
    """The named run, else the latest that began with this train.py and settings, else a new one."""
    refs = ("--format=%(refname)", "--sort=-committerdate", "refs/autoresearch-measure")
    tags = [ref.split("/")[2] for ref in git("for-each-ref", *refs).split() if ref.endswith("/0")]
    start = resolve("HEAD") or ""
    for known in [tag] if tag in tags else tags if tag is None else []:
        journal = read_journal(known)
        run = Run(known, scale, journal[0][0].commit, [done for done, _ in journal])
        same = all(settings == run.settings() for _, settings in journal)
        if tag and not same:
            raise SetupError(f"run {tag} has other settings: {journal[0][1]}", "python agent.py")
        if same and (tag or read_train(run.start) == read_train(start)):
            return run
    branches = git("for-each-ref", "--format=%(refname:lstrip=3)", "refs/heads/autoresearch")
    rows = (line.split("\t") for line in read_results().splitlines())
    taken = {*tags, *branches.split(), *(cells[5] for cells in rows if len(cells) > 5)}
    day = time.strftime("%b%d").lower()
    names = [day, *(f"{day}-{n}" for n in range(2, len(taken) + 3))]
    run = Run(tag or next(name for name in names if name not in taken), scale, start)
    if resolve("refs/heads/autoresearch") or resolve(run.branch()) not in (None, start):
        raise SetupError(f"a branch stands in the way of autoresearch/{run.tag}", "git branch")
    return run


def shown_in(run: Run) -> str:
    """The working tree that has the run's branch checked out, if any: it is not moved then."""
    return git("for-each-ref", "--format=%(worktreepath)", run.branch()).strip()


def commit_on_branch(run: Run) -> str | None:
    """What a person has committed on the branch; the branch is brought up to the journal else."""
    tip, best = resolve(run.branch()), run.best().commit
    if tip == best:
        return None
    if tip in (None, run.start, *(e.commit for e in run.history if e.status == "keep")):
        if not shown_in(run):  # the program may have died in between
            patiently(move_refs, (run.branch(), best, tip))
        return None
    if git("rev-list", "--max-count=1", best, "--not", tip):
        said = f"autoresearch/{run.tag} has commits that are not of this run"
        raise SetupError(said, f"git rebase {best[:7]} autoresearch/{run.tag}")
    return tip


class Night:
    """Slots that are never idle, a proposer that thinks ahead, and one judge: the main thread."""

    def __init__(self, run: Run, propose: Proposer, args: argparse.Namespace):
        self.run, self.propose, self.args = run, propose, args
        self.free = list(args.slots)
        self.tasks: dict[Future[None], Task] = {}
        self.waiting: list[Proposal] = []
        self.again: list[Task] = []  # ideas that are to have another run
        self.thinking: Future[Proposal | None] | None = None
        self.end: SetupError | str = ""  # why there will be no more proposals
        self.baseline = Experiment(0, "baseline", status="keep")
        self.unreported = 0  # verdicts
        self.report: subprocess.Popen[bytes] | None = None
        self.report_at = time.monotonic() + REPORT_SECONDS

    def work(self) -> None:
        """Until a limit is reached or nothing is left to propose."""
        for proposal in unfinished(self.run):
            say(f"going on with experiment {proposal.number}: {proposal.description}")
            self.waiting.append(proposal)
            self.run.running.append(proposal)
            self.run.billed.update(proposal.bill())
        for name, value in self.run.billed.items():
            if self.run.spent[name] < value:  # spent.json is lost
                self.run.spent[name] = value
        try:
            with status_line():
                while self.fill_slots():
                    futures = [*self.tasks, *([self.thinking] if self.thinking else [])]
                    wait(futures, 1.0, FIRST_COMPLETED)  # a second: for --hours
                    over = [future for future in self.tasks if future.done()]
                    for future in sorted(over, key=lambda f: self.tasks[f].done.number):
                        self.settle(future)
                    if self.thinking and self.thinking.done():
                        self.take_proposal()
                    self.refresh()
        finally:
            self.refresh(last=True)
            STOP.set()
            wait([*self.tasks, *([self.thinking] if self.thinking else [])], 30)
            for slot in self.args.slots:
                if slot.warm:
                    slot.warm.stop()
            if self.thinking and self.thinking.done() and not self.thinking.exception():
                self.take_proposal()  # it is paid for
        if isinstance(self.end, SetupError):
            raise self.end
        commit_on_branch(self.run)
        show_end(self.run, self.limit() or self.end)

    def limit(self) -> str:
        """Which of the person's limits is reached; "" if none."""
        most = self.args.experiments
        if not self.run.history:  # a baseline there is in any case
            return ""
        if most is not None and len(self.run.experiments()) >= most:
            return f"the run has its {most} experiments"
        return f"{self.args.hours:g} hours are over" if time.monotonic() > self.args.until else ""

    def fill_slots(self) -> bool:
        """Give work to free slots and to the proposer; False when all is done."""
        while self.free and (task := self.next_task()):
            task.slot = self.free.pop(0)
            self.tasks[in_thread(carry_out, self.run, task)] = task
        if self.thinking is None and not self.end and not self.limit() and self.may_think():
            self.thinking = in_thread(self.propose, self.run.view())
        return bool(self.tasks or self.thinking)

    def may_think(self) -> bool:
        """Never more ideas in waiting than slots; what costs no time is thought of when needed."""
        run, most = self.run, self.args.experiments
        ideas = len(run.experiments()) + len(run.running)
        room = len(self.args.slots) if self.propose_ahead() else len(self.free)
        return (most is None or ideas < most) and len(self.waiting) < room and bool(run.history)

    def propose_ahead(self) -> bool:
        return getattr(self.propose, "ahead", False)

    def next_task(self) -> Task | None:
        """What a free slot does, if there is anything."""
        run = self.run
        if not run.history:
            return self.next_of_baseline()
        under_way = {task.kind for task in self.tasks.values()}
        if "commit" in under_way:  # it will be the best, whatever it scores
            return None
        over = bool(self.limit()) or isinstance(self.end, SetupError)
        if not over and (tip := commit_on_branch(run)):
            return self.adopt(tip)
        if (task := self.next_again(under_way, over)) or over:
            return task
        plateau = run.since_keep() >= MEASURE_AFTER
        plateau = plateau and len(run.values_of(run.best().number)) < BEST_RUNS
        crashes = [e.status for e in run.history[-CRASHES:]] == ["crash"] * CRASHES
        if "best" not in under_way and (plateau or crashes):
            return self.measure_best()
        ideas = len(self.again) + sum(task.kind == "idea" for task in self.tasks.values())
        most = self.args.experiments
        while self.waiting and (most is None or len(run.experiments()) + ideas < most):
            if task := self.take_up(self.waiting.pop(0)):
                return task
        return None

    def next_again(self, under_way: set[str], over: bool) -> Task | None:
        """An idea's next run, on a seed that the best has run on too; if need be the best first."""
        run, best = self.run, self.run.best()
        known = run.seeds_of(best.number)
        again = [e for e in run.of(best.number) if e.status == "measure"]
        vain = bool(again) and not again[-1].values  # it fails, or the machine is not as it was
        for task in list(self.again):
            seed = run.next_seed(task.done.seeds)
            if task.base.commit != best.commit:  # from the start, on top of that
                self.again.remove(task)
                self.waiting.insert(0, task.proposal)
            elif seed in known or vain or over:
                self.again.remove(task)
                return task
            elif "best" not in under_way:
                return self.measure_best(seed)
        return None

    def measure_best(self, seed: int = 0) -> Task:
        best, after = self.run.best(), max(e.number for e in self.run.history)
        done = Experiment(best.number, best.description, status="measure", after=after)
        return Task("best", done, self.run.source_of(best), commit=best.commit, seed=seed)

    def next_of_baseline(self) -> Task | None:
        """One more run of train.py as it is, the same number of them on every slot."""
        run, done, slots = self.run, self.baseline, len(self.args.slots)
        wanted = slots * math.ceil(BASELINE_RUNS / slots)
        count = 1 + done.runs + done.disturbed + len(self.tasks)
        if len(done.values) + len(self.tasks) >= wanted or count > wanted + REPEATS:
            return None
        if count == 1:
            patiently(lay_out, run, 0, {"description": "baseline"})
        again = ", once more" if count > wanted else ""
        part = Experiment(0, f"baseline, run {min(count, wanted)} of {wanted}{again}")
        task = Task("baseline", part, read_train(run.start), commit=run.start, count=count)
        task.seed = run.next_seed({*done.seeds, *(other.seed for other in self.tasks.values())})
        return task

    def settle_baseline(self, task: Task) -> None:
        """Add one of its runs; the last one makes it experiment 0."""
        run, done, label = self.run, self.baseline, task.done.description
        done.began = min(done.began or math.inf, task.done.began)
        add_result(run, done, task.result, label)
        if done.status == "crash":
            (run.folder(0) / "proposal.json").unlink(missing_ok=True)  # or it would be found again
            log = f"run{f'-{task.count}' if task.count > 1 else ''}.log"
            log = str((run.folder(0) / log).relative_to(ROOT))
            raise SetupError(f"the baseline fails: {done.reason}", f"tail {log}")
        if task.result["status"] == "ok":
            say(f"{label}: val_bpb {task.result['val_bpb']:.6f}")
        if self.tasks or self.next_of_baseline():
            return
        if not done.values:
            raise SetupError(f"the baseline is disturbed: {done.reason}", "nvidia-smi")
        if len(done.values) < BASELINE_RUNS:
            say("the machine is too uneven for a third run; going on with what there is")
        done.reason = ""
        record(run, done, None, task.commit)

    def take_up(self, proposal: Proposal) -> Task | None:
        """A proposal on top of the best of now; None if it does not fit there."""
        run = self.run
        shared = ("description", "hypothesis", "proposer", "kind", "combines", "idea", "saw",
                  "model", *proposal.bill())
        done = Experiment(proposal.number, **{name: getattr(proposal, name) for name in shared})
        done.base = run.best().number
        try:
            patiently(complete, proposal, run)
        except Rejected as rejection:
            run.running.remove(proposal)
            if list(run.folder(proposal.number).glob("result*.json")):  # has run
                done.status, done.reason = "discard", "does not fit on the new best"
                record(run, done, proposal.source, proposal.base)
            else:
                say(f"{proposal.description}: dropped, {one_line(str(rejection), 200)}")
                run.billed.subtract(proposal.bill())  # the next one pays
                shutil.rmtree(run.folder(proposal.number), ignore_errors=True)
            return None
        patiently(lay_out, run, proposal.number, asdict(proposal))
        return Task("idea", done, proposal.source, run.best(), proposal)

    def adopt(self, tip: str) -> Task:
        """A person's commit on the branch, under the number that it had when it was found."""
        run, subject = self.run, one_line(git("log", "-1", "--format=%s", tip)) or "no subject"
        say(f"autoresearch/{run.tag} has a commit of yours, the new best: {subject}")
        paths = run.folder(0).parent.glob("[1-9]*/proposal.json")
        numbers = [int(p.parent.name) for p in paths if read_json(p).get("adopted") == tip]
        done = Experiment((numbers or [run.next_number()])[0], subject, "", "person", status="keep")
        done.base = run.best().number
        patiently(lay_out, run, done.number, {"description": subject, "adopted": tip})
        proposal = Proposal(subject, "", [], "person", number=done.number)
        run.running.append(proposal)
        return Task("commit", done, read_train(tip), run.best(), proposal, commit=tip)

    def settle(self, future: Future[None]) -> None:
        """Record a task that is over; what won against another best than that of now runs again."""
        run, task = self.run, self.tasks.pop(future)
        self.free.append(task.slot)
        future.result()
        done = task.done
        if task.kind == "idea" and not done.status:
            decide(run, task)
        if task.kind == "baseline":
            self.settle_baseline(task)
        elif task.kind == "commit" and commit_on_branch(run) != task.commit:
            say(f"your commit {task.commit[:7]} is not the branch's last any more: not adopted")
        elif done.status == "again":
            self.again.append(task)
            return
        elif task.kind != "idea":
            record(run, done, None, task.commit)
        else:
            moved = task.base.commit != run.best().commit or bool(commit_on_branch(run))
            again = done.status == "keep" and moved
            if again or not record(run, done, task.source, task.base.commit):
                say(f"once more, on top of the new best: {done.description}")
                self.waiting.insert(0, task.proposal)
                return
        if task.proposal:
            run.running.remove(task.proposal)
        self.unreported += 1

    def refresh(self, last: bool = False) -> None:
        """Have the report written anew, by a process of its own, once a minute at most."""
        under_way = self.report and self.report.poll() is None
        due = self.report if last else not under_way and time.monotonic() > self.report_at
        if due and self.unreported and self.run.history:
            self.unreported = 0
            self.report_at = time.monotonic() + REPORT_SECONDS
            words = ("report", "--tag", self.run.tag)
            self.report = subprocess.Popen(
                trusted_command("agent.py", *words), env=trusted_environment(),
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
            with suppress(OSError):  # it may be over; what is training goes first
                os.setpriority(os.PRIO_PROCESS, self.report.pid, 10)

    def take_proposal(self) -> None:
        """What the proposer thought of waits for a slot, under a number, and outlives a kill."""
        future, self.thinking = self.thinking, None
        try:
            proposal = future.result()
        except CapReached as cap:
            self.end = str(cap)
            return
        except SetupError as error:
            self.end = error  # once what is running is over
            return
        if proposal is None:
            self.end = "nothing is left to propose"
            return
        proposal.number = self.run.next_number()
        patiently(lay_out, self.run, proposal.number, asdict(proposal))
        self.run.running.append(proposal)
        self.waiting.append(proposal)


def find_slots(args: argparse.Namespace) -> tuple[dict[str, Any], list[Slot]]:
    """What prepare.py says of this machine, or of the nodes of a cluster, and the slots there."""
    if not args.ray:
        scale = describe_machine(args.corpus)
        return scale, choose_slots(args, scale)
    import cluster  # which needs Ray, a second to load and no part of the installation

    scale, joined, most = cluster.join(args.ray, args.corpus, args.unconfined)
    if args.slots and args.slots > most:
        say(f"--slots {args.slots}: the cluster has room for {most} runs at a time")
    return scale, [Slot(cluster=joined) for _ in range(min(args.slots or most, most))]


def settle_in(run: Run, slots: list[Slot]) -> None:
    """Take the GPUs, keep a log, end what a killed agent.py has left, and share the memory."""
    for slot in slots:
        if slot.gpu:
            lock(Path(run.scale["rows"]).parent / f"{slot.gpu}.lock", f"the GPU {slot.gpu}")
    keep_log(run.folder(0).parent)
    end_leftover(run)
    there = MEMORY_SHARE * memory_available() / 2**30  # to be shared by all that run at a time
    run.scale["memory_gb"] = there / len(slots) if len(slots) > 1 else math.inf


def night(args: argparse.Namespace) -> None:
    """Set up, measure the baseline unless the run has one, experiment until a limit is reached."""
    args.until = time.monotonic() + (math.inf if args.hours is None else args.hours * 3600)
    keep_log(None)
    check_checkout()
    lock(git_folder() / "autoresearch.lock", "this repository")
    if args.budget is not None:
        os.environ["AUTORESEARCH_BUDGET"] = args.budget
    head = git("rev-parse", "--symbolic-full-name", "HEAD").strip()
    own = re.fullmatch("refs/heads/autoresearch/(.+)", head)
    if own and args.tag in (None, own[1]):
        raise SetupError(f"HEAD is on the run's own branch autoresearch/{own[1]}", "git switch -")
    rows_folder(scale_named(os.environ.get("AUTORESEARCH_SCALE") or "cpu"), args.corpus)
    if args.tag and not re.fullmatch(r"(?!.*(\.\.|\.lock$|\.$))\w[\w.-]*", args.tag, re.A):
        said = f"--tag {args.tag}: it must do as a branch name, of letters, digits, dots and dashes"
        raise SetupError(said, "python agent.py --tag a1")
    propose, line = choose_proposer(args, screen)
    caps = {"experiments": args.experiments, "hours": args.hours, "US dollars": args.usd}
    limits = [f"after {cap:g} {unit}" for unit, cap in caps.items() if cap is not None]
    say(f"{line}; stops " + (" or ".join(limits) or "when you say so"))
    scale, args.slots = find_slots(args)
    scale["unconfined"] = args.unconfined  # such results are not compared with others
    run = find_run(args.tag, scale)
    settle_in(run, args.slots)
    run.read_spent()
    if args.usd is not None and math.isnan(run.spent["cost_usd"]):
        said = f"--usd: what run {run.tag} has spent is not known, its model has no known price"
        raise SetupError(said, "python agent.py --tag NAME, a run of its own")
    ahead = getattr(propose, "ahead", False)  # what it thinks of is tried out on this machine
    if ahead or not args.ray:  # whose nodes have been asked
        run.scale["means"] = confine(args.unconfined)
    run.tiny = scale
    if ahead and (args.ray or scale["name"] != "cpu"):
        run.tiny = describe_machine(None, "cpu")
    check_memory(run, args.slots)
    show_start(run)
    if run.history:
        say(f"going on after experiment {len(run.experiments())}")
        patiently(append_rows, [row(done, run.tag) for done in run.history])
    Night(run, propose, args).work()


def interrupt(number: int, frame: Any) -> None:
    """Ctrl-C, once: what follows takes seconds, and must not be interrupted itself."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt(signal.Signals(number).name)


def amount(text: str) -> float:
    """A number that is none below zero; argparse turns a ValueError into its own words."""
    if not 0 <= float(text) < math.inf:
        raise ValueError
    return float(text)


def share(text: str) -> float:
    if amount(text) > 1:
        raise ValueError
    return float(text)


def count(text: str) -> int:
    amount(text)
    return int(text)


def indices(text: str) -> list[int]:
    return [count(each) for each in text.split(",")]


def own_module(name: str) -> Any:
    """Import a module of this checkout that only one command needs, without old bytecode."""
    before, sys.pycache_prefix = sys.pycache_prefix, os.devnull
    try:
        return importlib.import_module(name)
    finally:
        sys.pycache_prefix = before


def main() -> int:
    if sys.argv[1:2] == ["report"]:
        return own_module("report").main(sys.argv[2:])
    if sys.argv[1:2] == ["promote"]:
        promote = own_module("promote")
        return carefully(promote.promote, promote.parse(sys.argv[2:]))
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--experiments", type=count, metavar="N", help="stop when the run has N experiments")
    add("--hours", type=amount, metavar="H", help="stop after H hours")
    add("--usd", type=amount, metavar="D", help="stop when the run has spent D dollars on the API")
    add("--tag", metavar="NAME", help="the run to start or to go on with")
    add("--proposer", choices=("claude", "sampler"), help="default: claude if there is a key")
    add("--patches", nargs="+", type=Path, metavar="FILE", help="try your diffs or train.py files")
    add("--model", default=MODEL, metavar="NAME",
        help=f"of the Anthropic API, default {MODEL};\nA,B: B after 3 drops in a row")
    add("--mix", type=share, default=0.0, metavar="SHARE", help="of experiments, by the sampler")
    add("--corpus", metavar="PATH", help="text, JSONL or Parquet to train on")
    add("--budget", metavar="SECONDS", help="of training per run, default the scale's")
    add("--slots", type=count, metavar="N", help="runs at a time, default one per GPU or two cores")
    add("--gpus", type=indices, metavar="0,1", help="to run on, one run each, default all")
    add("--ray", metavar="ADDRESS", help="of a Ray cluster to run on, or auto: where this runs")
    add("--unconfined", action="store_true", help="let train.py run without a cage: your own risk")
    args = parser.parse_args()
    if args.ray and args.gpus:
        parser.error("--gpus are cards of this machine: with --ray, Ray hands them out")
    return carefully(night, args)


def carefully(work: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Exit code of what is not to be disturbed by a signal, a dead terminal or a full disk."""
    hide_memory()
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if each == signal.SIGINT or signal.getsignal(each) != signal.SIG_IGN:  # of nohup
            signal.signal(each, interrupt)
    sys.stdout.reconfigure(errors="replace")  # an arrow must not end a night on a plain terminal
    sys.stderr.reconfigure(errors="replace")
    try:
        work(args)
    except OSError as error:
        LOG.exception("stopped")
        raise SetupError(str(error), "df -h . && ls -ld .") from error
    except ImportError as error:
        extra = "'.[ray]'" if error.name == "ray" else "."
        raise SetupError(f"a package is missing: {error}", f"pip install {extra}") from error
    except KeyboardInterrupt as error:
        say(f"interrupted ({error}); the same command goes on from here")
        return 130
    except BaseException as error:
        LOG.error("stopped: %s", error, exc_info=not isinstance(error, SystemExit))
        raise
    finally:
        flush_screen()
    return 0


if __name__ == "__main__":
    sys.exit(main())
