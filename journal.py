"""What is known of a run: experiments as git commits, results.tsv as their view, the screen.

The commits are the journal. All of it is written by plumbing that runs no hook, filter or monitor,
and touches neither index nor working tree.
"""

from __future__ import annotations

import ast
import ctypes
import errno
import fcntl
import hashlib
import itertools
import json
import logging
import logging.handlers
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Container, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from prepare import SetupError, write_atomic
from rule import ADOPTED, Noise, Scores, estimate

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results.tsv"
HEADER = ("commit", "val_bpb", "memory_gb", "status", "description", "run", "experiment", "runs",
          "seconds", "tokens_M", "cost_usd")

CHARS_PER_NODE = 4  # about, in Python
SLOWER = 0.10  # of the tokens per second: below, the same code ran on a disturbed machine
DISK_FLOOR = 2 * 2**30  # bytes that must be free before a run; the warden ends runs at half of it
DISK_POLL_SECONDS = 10.0
NO_SPACE = re.compile("No space left|Disk quota exceeded")  # in git's words
LOCK_SECONDS = 60.0  # that git may hold a ref; after it, git died with it
TORN = 7  # characters of a row's beginning, by which it is known
LOG_BYTES, LOGS_KEPT = 2_000_000, 3
CURVE = (10, 25, 50, 75, 100)  # % of the budget
LOG = logging.getLogger("autoresearch")
HELD: list[Any] = []  # locks, for as long as this process lives
DOING: dict[Any, str] = {}  # what goes on, a line each
STOP = threading.Event()  # what goes on is to end
PARSING = threading.Lock()  # see parse()


@dataclass
class Experiment:
    """A judged proposal, the baseline (0), or the best measured again: one commit, one row."""

    number: int
    description: str
    hypothesis: str = ""
    proposer: str = ""
    cost_usd: float = 0.0
    tokens_in: int = 0  # of the language model, all that it read
    tokens_cached: int = 0  # of these, read from its cache
    tokens_written: int = 0  # of these, written to it
    tokens_out: int = 0
    model: str = ""
    kind: str = ""  # tune, structure, remove, combine or retry
    combines: list[int] = field(default_factory=list)  # experiments whose edits it takes together
    idea: str = ""  # the line of ideas.md that it takes up
    status: str = ""  # keep, discard, crash or measure
    reason: str = ""
    runs: int = 0  # that are judged
    disturbed: int = 0  # runs set aside: beside a tenant, on a throttled card, or slow
    values: list[float] = field(default_factory=list)  # val_bpb of each run that has one
    seeds: list[int] = field(default_factory=list)  # that these runs had
    draws: list[float] = field(default_factory=list)  # random state at their first batch, hashed
    speeds: list[float] = field(default_factory=list)  # M tokens per second of the scale's clock
    hidden: list[float | None] = field(default_factory=list)  # bits per byte of the hidden split
    after: int = 0  # for a measurement: the last experiment before it
    order: int = 0  # in which verdicts were given; numbers are given when an idea is had
    saw: int = 0  # the verdicts that its proposer knew of
    base: int = 0  # the experiment that it was made of
    gain: float | None = None  # over that, as compared when this was judged
    program: str = ""  # its syntax tree, as a hash
    skeleton: str = ""  # the same without the values of the knobs
    knobs: dict[str, float] = field(default_factory=dict)
    moved: dict[str, list[float]] = field(default_factory=dict)  # knobs: before, after
    places: list[str] = field(default_factory=list)  # definitions that it changes
    printed: str = ""  # what train.py said before its first step
    curve: list[float] = field(default_factory=list)  # training loss at CURVE of the budget
    memory_gb: float = 0.0
    seconds: float = 0.0  # wall clock of all runs
    training_seconds: float = 0.0  # of these, in budgeted training
    evaluation_seconds: float = 0.0
    began: float = 0.0  # seconds since 1970
    ended: float = 0.0
    start_seconds: float = 0.0  # of the scale's clock, to the first batch, in the slowest run
    trained_seconds: float = 0.0  # to the first logits, in the slowest run
    answers_seconds: float = 0.0  # of the scale's clock, for all answers
    silence_seconds: float = 0.0  # without a word in the log, at most
    tokens_M: float = 0.0  # trained on in a run
    steps: float = 0.0
    params_M: float = 0.0
    commit: str = ""

    def val_bpb(self) -> float:
        scored = self.values and self.status != "crash"
        return statistics.fmean(self.values) if scored else math.nan

    def believed(self) -> bool:
        return not math.isnan(self.val_bpb()) and not self.reason.startswith("suspicious")


# ---------------------------------------------------------------------------
# Git
# ---------------------------------------------------------------------------


def git(*arguments: str, data: str | None = None, index: str | None = None) -> str:
    """Standard output of a git command in ROOT. Raises SetupError with git's own words."""
    environment = os.environ | {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"}
    for who in ("GIT_AUTHOR", "GIT_COMMITTER"):  # the person may have set up no identity
        environment |= {f"{who}_NAME": "autoresearch", f"{who}_EMAIL": "autoresearch@localhost"}
    if index:
        environment["GIT_INDEX_FILE"] = index
    command = ["git", "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false"]
    command += ["-c", "core.fsync=all", *arguments]
    sent = None if data is None else data.encode()  # bytes: a text mode would change line ends
    done = subprocess.run(command, cwd=ROOT, env=environment, input=sent, capture_output=True)
    if done.returncode:
        words = done.stderr.decode("utf-8", errors="replace")
        said = one_line(words, 5000) or f"exit status {done.returncode}"  # with whole paths
        raise SetupError(f"git {arguments[0]}: {said}", "git status")
    return done.stdout.decode("utf-8")


def resolve(name: str) -> str | None:
    """The object that a name stands for, or None."""
    try:
        return git("rev-parse", "--verify", "--quiet", name).strip()
    except SetupError:
        return None


def read_train(commit: str) -> str:
    """train.py as it is in a commit."""
    try:
        source = git("cat-file", "blob", f"{commit}:./train.py")
    except UnicodeDecodeError as error:
        raise SetupError(f"train.py is not UTF-8: {error}", "file train.py") from error
    if odd := oddly_encoded(source):
        raise SetupError(f"train.py {odd}: it must be plain UTF-8", "file train.py")
    return source


def oddly_encoded(source: str) -> str:
    """Say what would make Python read a train.py otherwise than as the text that is shown here.

    Returns "" for plain text. An encoding named in the first two lines (PEP 263) can turn a comment
    into code, and a carriage return ends a line for Python alone.
    """
    if "\r" in source:
        return "has carriage returns"
    if source.startswith("\ufeff"):
        return "begins with a byte order mark"
    cookie = re.compile(r"[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)")
    return "names an encoding" if any(map(cookie.match, source.split("\n")[:2])) else ""


def write_commit(source: str | None, parent: str, message: str) -> str:
    """The hash of a new commit on `parent` with this train.py; None leaves the tree as it is."""
    tree = git("rev-parse", f"{parent}^{{tree}}").strip()
    if source is not None:
        blob = git("hash-object", "-w", "--stdin", data=source).strip()
        path = git("rev-parse", "--show-prefix").strip() + "train.py"
        mode = git("ls-tree", "--full-tree", parent, path).split()[0]
        with tempfile.TemporaryDirectory() as folder:
            index = f"{folder}/index"
            git("read-tree", tree, index=index)
            git("update-index", "--cacheinfo", f"{mode},{blob},{path}", index=index)
            tree = git("write-tree", index=index).strip()
    return git("commit-tree", tree, "-p", parent, "-F", "-", data=message).strip()


def move_refs(*moves: tuple[str, str, str | None]) -> None:
    """Compare-and-swap of refs, all or none: (ref, new, old); `old` None creates the ref."""
    text = "".join(f"update {ref} {new} {old or '0' * len(new)}\n" for ref, new, old in moves)
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            git("update-ref", "--stdin", data=text)
            return
        except SetupError as error:
            said = str(error)
            held = re.search(r"Unable to create '(.+/autoresearch.+\.lock)': File exists", said)
            empty = re.search(r"'(refs/(heads/)?autoresearch\S+)': reference broken", said)
            path = Path(held[1]) if held else git_folder() / empty[1] if empty else None
            if not path or (empty and path.read_bytes().strip(b"\0\n")):
                raise
            if empty or time.monotonic() > deadline:  # git died with it, or the machine did
                say(f"removed {path}, which nobody holds")
                path.unlink(missing_ok=True)
        time.sleep(0.5)


@cache
def git_folder() -> Path:
    """Where objects and refs lie, of all worktrees together."""
    return ROOT / git("rev-parse", "--git-common-dir").strip()


def sync_git() -> None:
    """Have commits and refs survive a power cut; git's own fsync loses some of them."""
    folder = os.open(git_folder(), os.O_RDONLY)
    try:
        if sys.platform != "linux":
            os.sync()
        elif ctypes.CDLL(None, use_errno=True).syncfs(folder):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(git_folder()))
    finally:
        os.close(folder)


def lock(path: Path, what: str) -> None:
    """Hold a lock until this process ends, however it does. Raises SetupError, with its holder."""
    file = open(path, "a+", encoding="utf-8")
    file.seek(0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        said = f"{what} is taken by another agent.py, process {file.read().strip() or '?'}"
        raise SetupError(said, "wait for it, or stop it with Ctrl-C where it runs") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    HELD.append(file)


def await_disk() -> None:
    """Wait until there is space for another run."""
    while (free := shutil.disk_usage(ROOT).free) < DISK_FLOOR:
        say(f"paused: {free / 2**30:.1f} GB of disk are free, {DISK_FLOOR / 2**30:.0f} are needed; "
            "goes on when there is space")
        while shutil.disk_usage(ROOT).free < DISK_FLOOR:
            pause()


def pause_for_disk() -> None:
    say("paused: the disk is full; goes on when there is space")
    pause()


def pause() -> None:
    if STOP.wait(DISK_POLL_SECONDS):
        raise KeyboardInterrupt


def patiently(write: Callable[..., Any], *arguments: Any) -> Any:
    """What `write` returns, when there is space for it. It must be safe to be tried again."""
    while True:
        try:
            return write(*arguments)
        except (OSError, SetupError) as error:
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            if not full and not NO_SPACE.search(str(error)):
                raise
        pause_for_disk()


# ---------------------------------------------------------------------------
# Commit messages, and results.tsv
# ---------------------------------------------------------------------------


def one_line(text: str, limit: int = 200) -> str:
    """Text without line ends, tabs and control characters, cut to `limit` characters."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in mask(text)).split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def commit_message(done: Experiment, settings: str) -> str:
    """Description, hypothesis, and the result as trailers: a JSON value each."""
    facts = asdict(done) | {"settings": settings}
    named = {name.replace("_", "-").capitalize(): value for name, value in facts.items()
             if name not in ("description", "hypothesis", "commit")}
    trailers = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in named.items()]
    text = [done.description, one_line(done.hypothesis, 2000), "\n".join(trailers)]
    return "\n\n".join(filter(None, text)) + "\n"


def parse_message(commit: str, message: str) -> tuple[Experiment, str]:
    """(experiment, settings) of a commit of ours: the inverse of commit_message."""
    description, *middle, trailers = message.rstrip("\n").split("\n\n")
    lines = (line.split(": ", 1) for line in trailers.split("\n"))
    named = {each.name.lower(): each.name for each in fields(Experiment)}  # tokens_M as Tokens-m
    known = ((name.replace("-", "_").lower(), json.loads(value)) for name, value in lines)
    facts = {named.get(name, name): value for name, value in known}
    facts |= {"description": description, "hypothesis": "".join(middle), "commit": commit}
    settings = facts.pop("settings")
    return Experiment(**facts), settings


def read_journal(tag: str) -> list[tuple[Experiment, str]]:
    """All experiments and measurements of a run with their settings, in the order they happened."""
    form = "--format=%(refname)%00%(objectname)%00%(parent)%00%(contents)%01"
    refs = (f"refs/autoresearch/{tag}/", f"refs/autoresearch-measure/{tag}/")
    entries = []
    for record in git("for-each-ref", form, *refs).split("\x01"):
        ref, *fields = record.strip("\n").split("\0", 3)
        if re.fullmatch(r"refs/autoresearch(-measure)?/[^/]+/\d+", ref):  # others are a person's
            commit, parent, message = fields
            try:
                done, settings = parse_message(commit, message)
            except (ValueError, TypeError, KeyError) as error:
                hint = f"git update-ref -d {ref}"
                raise SetupError(f"{ref} is no experiment: {error}", hint) from error
            if done.number == 0 or done.status == "measure" or done.reason == ADOPTED:
                done.commit = parent  # the train.py that was measured
            entries.append((done, settings))
    def place(entry: tuple[Experiment, str]) -> tuple[int, int, int]:
        done = entry[0]  # older versions wrote no order
        return done.order, done.after or done.number, done.after

    return sorted(entries, key=place)


def plain_cell(text: str) -> str:
    """Put a quote before a text that a spreadsheet would take for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def row(done: Experiment, tag: str) -> str:
    """The experiment as a line of results.tsv."""
    why = f" ({done.reason})" if done.reason and done.status != "keep" else ""
    why += f" ({done.disturbed} runs set aside)" if done.disturbed else ""
    cells = (done.commit[:7], f"{done.val_bpb():.6f}", f"{done.memory_gb:.1f}", done.status,
             one_line(plain_cell(done.description) + why, 300), tag, str(done.number),
             str(done.runs), f"{done.seconds:.1f}", f"{done.tokens_M:.2f}", f"{done.cost_usd:.4f}")
    return "\t".join(cells) + "\n"


def read_results() -> str:
    """The text of results.tsv, "" if there is none. Raises SetupError for another tool's file."""
    text = RESULTS.read_bytes().decode("utf-8", errors="replace") if RESULTS.exists() else ""
    if text.strip() and text.splitlines()[0].lstrip("\ufeff").split("\t") != list(HEADER):
        raise SetupError("results.tsv has a foreign header", "mv results.tsv results-old.tsv")
    return text


def identity(line: str) -> tuple[str, ...]:
    """Of a row, whose words a person may have changed: commit, score, status, run, experiment."""
    cells = line.rstrip("\r\n").split("\t")
    return (*cells[:2], *cells[3:4], *cells[5:7])


def append_rows(rows: list[str]) -> None:
    """Append those rows that results.tsv does not have, and make them durable."""
    text = read_results()
    whole, _, torn = text.rpartition("\n")  # by a power cut; or a whole row, by an editor
    had = {identity(line) for line in whole.splitlines()}
    missing = [line for line in rows if identity(line) not in had]
    if not text.strip():
        missing.insert(0, "\t".join(HEADER) + "\n")
    elif len(torn) >= TORN and missing and missing[0].startswith(torn):
        os.truncate(RESULTS, RESULTS.stat().st_size - len(torn.encode()))
    elif torn:
        missing.insert(0, "\n")
    if missing:
        with open(RESULTS, "a", encoding="utf-8", newline="") as file:
            file.write("".join(missing))
            file.flush()
            os.fsync(file.fileno())


# ---------------------------------------------------------------------------
# The state of a run
# ---------------------------------------------------------------------------


@dataclass
class Run:
    """A night's work under one tag, as git has it."""

    tag: str
    scale: dict[str, Any]  # what prepare.py says of machine, contest and rows
    start: str  # the commit that the person started from
    history: list[Experiment] = field(default_factory=list)
    spent: Counter[str] = field(default_factory=Counter)  # on the API, replies in vain included
    billed: Counter[str] = field(default_factory=Counter)  # of it, to proposals that stay
    running: list[Any] = field(default_factory=list)  # proposals under way or waiting
    sources: dict[str, str] = field(default_factory=dict)  # train.py by commit
    screened: dict[str, str] = field(default_factory=dict)  # what fails in two steps of a best
    tiny: dict[str, Any] = field(default_factory=dict)  # the scale cpu, to try ideas out

    def settings(self) -> str:
        text = "{name} {budget:g} {clock} {manifest} {referee} {device}".format(**self.scale)
        return text + (" unconfined" if self.scale.get("unconfined") else "")

    def branch(self) -> str:
        return f"refs/heads/autoresearch/{self.tag}"

    def read_spent(self) -> None:
        """The money of earlier sessions: at least what the rows say."""
        self.spent, self.billed = self.booked(), self.booked()
        path = self.folder(0).parent / "spent.json"
        try:
            stored = json.loads(path.read_text()) if path.exists() else {}
            self.spent.update({name: value - self.spent[name] for name, value in stored.items()
                               if not value <= self.spent[name]})  # nan stays nan
        except (ValueError, TypeError, AttributeError) as error:
            said = f"{path}, what the run has spent, cannot be read: {error}"
            raise SetupError(said, f"rm {path}  # the rows are counted still") from error

    def spend(self, bill: dict[str, float]) -> None:
        """Book one reply, before anything is done with it."""
        self.spent.update(bill)
        path, text = self.folder(0).parent / "spent.json", json.dumps(self.spent)
        path.parent.mkdir(parents=True, exist_ok=True)
        patiently(write_atomic, path, [text.encode()])

    def booked(self) -> Counter[str]:
        names = ("cost_usd", "tokens_in", "tokens_cached", "tokens_written", "tokens_out")
        return Counter({name: sum(getattr(e, name) for e in self.history) for name in names})

    def take_bill(self) -> dict[str, float]:
        """Spent since the last proposal: each pays for what came to nothing before it."""
        bill = {name: value - self.billed[name] for name, value in self.spent.items()}
        self.billed.update(bill)
        return bill

    def seed(self, number: int) -> int:
        """Of every experiment's run of that number, so that they share their luck."""
        text = f"{self.tag} {self.start} {self.settings()} {number}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")

    def next_seed(self, known: Container[int]) -> int:
        """The first that is not among those."""
        return next(seed for seed in map(self.seed, itertools.count(1)) if seed not in known)

    def folder(self, number: int) -> Path:
        return ROOT / "runs" / self.tag / str(number)

    def tried(self) -> list[Experiment]:
        """The baseline and all judged proposals: a train.py each, without measurements."""
        return [e for e in self.history if e.status != "measure"]

    def experiments(self) -> list[Experiment]:
        return [e for e in self.tried() if e.number]

    def next_number(self) -> int:
        return 1 + max((e.number for e in [*self.history, *self.running]), default=0)

    def view(self) -> Run:
        """The run as it is now, for another thread; money and sources are shared."""
        return replace(self, history=list(self.history), running=list(self.running))

    def best(self) -> Experiment:
        """The last keep, which ideas are tried on top of and compared with."""
        return [e for e in self.history if e.status == "keep"][-1]

    def of(self, number: int) -> list[Experiment]:
        """An experiment and its repeated measurements."""
        return [e for e in self.history if e.number == number]

    def scores_of(self, number: int, what: str = "values") -> Scores:
        """Of every undisturbed run of an experiment, repeated measurements included."""
        return undisturbed(self.of(number), what)

    def seeds_of(self, number: int) -> set[int]:
        """Of these runs."""
        return {seed for seed, *_ in self.scores_of(number)}

    def all_scores(self) -> dict[int, Scores]:
        """scores_of every number, the baseline's first."""
        by_number: dict[int, list[Experiment]] = {0: []}
        for e in self.history:
            by_number.setdefault(e.number, []).append(e)
        return {number: undisturbed(of) for number, of in by_number.items()}

    def values_of(self, number: int) -> list[float]:
        return list(self.scores_of(number).values())

    def mean_of(self, number: int) -> float:
        return statistics.fmean(self.values_of(number))

    def ranked(self, tried: list[Experiment]) -> list[tuple[float, Experiment]]:
        """How far each lies below the baseline, as compared on equal seeds; the lowest first."""
        noise, scores = self.noise(), self.all_scores()
        gains = [noise.compare(scores[0], scores[e.number])[0] for e in tried]
        return sorted(zip(gains, tried, strict=True), key=lambda pair: -pair[0])

    def source_of(self, experiment: Experiment) -> str:
        return self.source_at(experiment.commit)

    def source_at(self, commit: str) -> str:
        if commit not in self.sources:
            self.sources[commit] = read_train(commit)
        return self.sources[commit]

    def noise(self, *more: Experiment) -> Noise:
        """By the scale's prior and every repeated run; `more` tell of what is shared only."""
        scores, pairs = self.all_scores(), []
        for e in [*self.experiments(), *more]:
            old, new = scores.get(e.base, {}), scores.get(e.number) or undisturbed([e])
            pairs.append([old[key] - new[key] for key in old.keys() & new.keys()])
        return estimate(self.scale["sigma"], [list(of.values()) for of in scores.values()], pairs)

    def drops(self) -> int:
        """Experiments since the last keep."""
        tried = self.experiments()
        return next((n for n, e in enumerate(reversed(tried)) if e.status == "keep"), len(tried))

    def since_keep(self) -> int:
        """Candidates since the last keep or measurement of the best."""
        latest = [e.status in ("keep", "measure") for e in reversed(self.history)]
        return latest.index(True)


def undisturbed(experiments: list[Experiment], what: str = "values") -> Scores:
    """Values, or hidden, of one program's runs that were not slower than it can be, by their luck:
    the seed, and what was drawn on it."""
    slow = (1 - SLOWER) * max((s for e in experiments for s in e.speeds), default=0.0)
    return {(e.number, e.after, n) if seed is None else (seed, drawn): value  # no seeds once
            for e in experiments for n, (value, speed, seed, drawn) in enumerate(
                itertools.zip_longest(getattr(e, what), e.speeds, e.seeds, e.draws))
            if value is not None and (speed is None or speed >= slow)}


def parse(source: str) -> ast.Module:
    """Return the syntax tree of a program. Raises what ast.parse raises.

    One thread at a time: CPython counts the depth of all trees that are being made in one place,
    and two at once can end in a SystemError on Python 3.11 (issue gh-106905 there).
    """
    with PARSING:
        return ast.parse(source)


@cache
def fingerprint(source: str) -> str:
    """Identity of a program: its syntax tree, so that comments and layout do not count."""
    return hashlib.sha256(ast.dump(parse(source)).encode()).hexdigest()[:16]


def node_count(source: str) -> int:
    """Size of a program: nodes of its syntax tree; code in a string is no simpler than code."""
    nodes = list(ast.walk(parse(source)))
    prose = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    texts = [node.value for node in nodes if isinstance(node, ast.Constant)
             and isinstance(node.value, (str, bytes)) and id(node) not in prose]
    return len(nodes) + sum(len(text) // CHARS_PER_NODE for text in texts)


# ---------------------------------------------------------------------------
# Screen: results on stdout, words on stderr
# ---------------------------------------------------------------------------


def mask(text: str) -> str:
    """Text without this process's keys and tokens."""
    for name, value in os.environ.items():
        if name.endswith(("_KEY", "_TOKEN")) and len(value) >= 8:
            text = text.replace(value, "***")
    return text


def say(text: str) -> None:
    """A line on stderr and in the log."""
    LOG.info(mask(text))
    print_line(text, sys.stderr)


def print_line(text: str, stream: Any) -> None:
    """Print, if there is somewhere to print to: a full disk or a dead `tee` ends no night."""
    with suppress(OSError, ValueError):
        print(mask(text), file=stream, flush=True)


def flush_screen() -> None:
    """Leave nothing that Python would try to print at its own end, and complain about."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def keep_log(folder: Path | None) -> None:
    """Write what is said to agent.log in a folder; None holds it back until there is one."""
    LOG.propagate, logging.raiseExceptions = False, False  # a full disk is no reason to end
    LOG.setLevel(logging.INFO)
    if folder is None:
        LOG.addHandler(logging.handlers.MemoryHandler(1000))
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = logging.handlers.RotatingFileHandler(
        folder / "agent.log", maxBytes=LOG_BYTES, backupCount=LOGS_KEPT, encoding="utf-8"
    )
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    (held,) = LOG.handlers
    held.setTarget(file)
    held.close()  # which flushes
    LOG.handlers = [file]


@contextmanager
def status_line() -> Iterator[None]:
    """Show what goes on, of DOING, at the bottom of the terminal; elsewhere nothing."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.live import Live
    from rich.spinner import Spinner
    from rich.text import Text

    class Doing:
        def __rich__(self) -> Text:
            line = " | ".join(list(DOING.values()))
            return Text(line or "thinking", overflow="ellipsis", no_wrap=True)

    show = {"transient": True, "redirect_stdout": sys.stdout.isatty()}  # not a file's rows
    with Live(Spinner("line", Doing()), console=Console(stderr=True), **show):
        yield


@contextmanager
def doing(text: str) -> Iterator[Callable[[str], None]]:
    """Have the status line tell what goes on, as the function that is yielded words it later on."""
    key = object()

    def show(text: str) -> None:
        DOING[key] = text

    if not sys.stderr.isatty():
        say(text)
    show(text)
    try:
        yield show
    finally:
        del DOING[key]


def in_thread(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """The future result of a call, in a thread that does not outlive the program."""
    future: Future[Any] = Future()

    def call() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def show_result(run: Run, done: Experiment) -> None:
    """One line per finished experiment or measurement."""
    change = ""
    if run.history and not math.isnan(done.val_bpb()):
        gain = run.mean_of(run.best().number) - done.val_bpb() if done.gain is None else done.gain
        change = f"{-gain:+.6f}"
    cost = (f"{done.tokens_in / 1e3:.1f}k ({done.tokens_cached / 1e3:.1f}k cached) + "
            f"{done.tokens_out / 1e3:.1f}k tokens ${done.cost_usd:.3f}  ")
    cost = cost if done.tokens_out else ""
    why = f" ({done.reason})" if done.reason else ""
    line = (f"{done.number:4d}  {done.status:7}  {done.val_bpb():8.6f}  {change:9}  "
            f"{done.runs}x {done.seconds:5.0f} s  {cost}{done.description}{why}")
    LOG.info(mask(line))
    print_line(line, sys.stdout)


def show_start(run: Run) -> None:
    scale = run.scale
    unit = {"cpu": "CPU seconds", "wall": "seconds", "tokens": "tokens"}[scale["clock"]]
    say(f"run {run.tag}: scale {scale['name']}, {scale['device']}, data: {scale['source']}")
    scored = f"is scored on {scale['eval_tokens']:,} tokens"
    say(f"a run trains for {scale['budget']:g} {unit} and {scored}")
    say(f"keeps go to the branch autoresearch/{run.tag}; Ctrl-C stops, the same command goes on")


def kept_range(run: Run) -> str:
    """What was kept, as git takes it; the branch lags while somebody has it checked out."""
    best, name = run.best().commit, f"autoresearch/{run.tag}"
    return f"{run.start[:7]}..{name if resolve(run.branch()) == best else best[:7]}"


def show_end(run: Run, reason: str) -> None:
    kept = sum(e.status == "keep" for e in run.experiments())
    spent, tokens = run.spent["cost_usd"], run.spent["tokens_in"] + run.spent["tokens_out"]
    first, last, sigma = run.mean_of(0), run.mean_of(run.best().number), run.noise().sigma
    say(f"stopped: {reason}; {len(run.experiments())} experiments, {kept} kept, val_bpb "
        f"{first:.6f} → {last:.6f}, sigma {sigma:.6f}"
        + (f", {tokens / 1e6:.2f} M tokens, ${spent:.2f}" if tokens else ""))
    if spent:
        each = f"${spent / max(1, len(run.experiments())):.3f} an experiment"
        say(each + (f", ${spent / kept:.2f} a kept commit" if kept else ", no commit kept"))
    if kept:
        say(f"take what was kept: git cherry-pick {kept_range(run)}")
