"""Where runs happen: slots, a referee that waits in each, and ideas tried out before their turn.

A slot is a GPU or some cores. Its next referee starts when the run before it has trained, loads
torch in the cage, and takes train.py when its turn has come.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from journal import (
    CURVE,
    NO_SPACE,
    ROOT,
    STOP,
    Experiment,
    Run,
    await_disk,
    doing,
    one_line,
    patiently,
    pause_for_disk,
    read_train,
    say,
)
from prepare import SetupError, trusted_hash, write_atomic
from proposals import Proposal
from warden import DISK_IS_FULL, MEMORY_SHARE, PASSED_ON, memory_available

if TYPE_CHECKING:  # heavy, and no part of the installation
    from cluster import Cluster

OVERTIME = 20.0  # seconds that a run may take beyond the baseline's, to its first logits
START_OVERTIME = 60.0  # the same to the first batch: an edit may be the first to compile
ANSWERS_SHARE = 3.0  # times the baseline's seconds, for a run's answers
FAILURES = 3  # of the referee itself, in one run
SCREEN_TOKENS, SCREEN_SECONDS = 4300, 300.0  # two steps of 4096, the second near the end
NEEDS_GPU = re.compile("cuda|triton|nvidia|gpu", re.IGNORECASE)
STANDBY_GB = 0.7  # of the referee and of what waits in the cage, both with torch
SILENCE_SHARE, SILENCE_SECONDS = 3.0, 20.0  # beyond the baseline's longest, then it is said
WRITING = threading.Lock()  # the baseline's runs share a folder


# ---------------------------------------------------------------------------
# Slots
# ---------------------------------------------------------------------------


@dataclass(eq=False)
class Slot:
    """Where one run at a time can be: a GPU, or some cores; with a referee that is ready for it."""

    gpu: str = ""  # as CUDA_VISIBLE_DEVICES takes it; "" is any, or none
    cores: frozenset[int] = frozenset()  # none are all
    warm: Referee | None = None
    cold: bool = False  # none is made ready for the next run
    cluster: Cluster | None = None  # anywhere on it


@dataclass
class Task:
    """What a slot does: one run of an idea, the baseline, the best or a commit."""

    kind: str  # baseline (one run of it), best, commit or idea
    done: Experiment
    source: str
    base: Experiment | None = None  # the best that it is measured against
    proposal: Proposal | None = None  # of a commit or an idea
    commit: str = ""  # that holds the source, where it is no idea
    slot: Slot = field(default_factory=Slot)
    seed: int = 0  # of the run
    count: int = 0  # of the baseline's runs, this one
    result: dict[str, Any] = field(default_factory=dict)  # of it


def choose_slots(args: argparse.Namespace, scale: dict[str, Any]) -> list[Slot]:
    """One slot per GPU or, without one, per two cores; `--slots` and `--gpus` say otherwise.

    Their kind is the scale's device. Raises SetupError for a GPU that is not there or differs.
    """
    gpus = scale["gpus"]  # (identity, name) of each
    if not gpus:
        if args.gpus:
            raise SetupError("--gpus: this machine shows none", "nvidia-smi -L")
        cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
        n = args.slots or max(1, len(cores) // 2)
        scale["device"] += f", {n} runs at a time" if n > 1 else ""  # they share caches and memory
        return [Slot(cores=frozenset(cores[k::n] or cores[k % len(cores) :][:1])) for k in range(n)]
    wanted = args.gpus or list(range(len(gpus)))[: args.slots or None]
    for index in wanted:
        if index >= len(gpus):
            raise SetupError(f"--gpus {index}: the last one is {len(gpus) - 1}", "nvidia-smi -L")
    if len(names := {gpus[index][1] for index in wanted}) > 1:
        said = f"GPUs of one kind can be compared only: {', '.join(sorted(names))}"
        raise SetupError(said, "python agent.py --gpus 0")
    scale["device"] = names.pop()
    return [Slot(gpus[index][0]) for index in dict.fromkeys(wanted)]


def check_memory(run: Run, slots: list[Slot]) -> None:
    """Raise SetupError if runs without a GPU of their own would not fit into memory together."""
    if len(slots) > 1 and not slots[0].gpu and not slots[0].cluster:
        peak = run.history[0].memory_gb if run.history else try_out(run, read_train(run.start))[1]
        there = MEMORY_SHARE * memory_available() / 2**30
        most = max(1, int(there / (peak + STANDBY_GB)))
        if len(slots) > most:
            said = f"{len(slots)} runs at a time of {peak:.1f} GB each, and what stands by for them"
            hint = f"python agent.py --slots {most}"
            raise SetupError(f"{said}: the machine has {there:.1f} GB for it", hint)


# ---------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------


def train_once(
    run: Run, task: Task, count: int, label: str, hidden_below: float = math.inf
) -> dict[str, Any]:
    """Run `count` of an experiment: its result.json by the referee, or as it was found finished."""
    folder, suffix = run.folder(task.done.number), f"-{count}" if count > 1 else ""
    path, failures = result_path(run, task.done.number, count), 0
    while not (result := read_json(path)):
        await_disk()
        check_trusted(run)
        folder.mkdir(parents=True, exist_ok=True)  # somebody may have cleared runs/
        with WRITING:
            patiently(write_atomic, folder / "train.py", [task.source.encode()])
        said = measure(run, task, count, label, hidden_below)
        check_trusted(run)
        result = read_json(path)
        if result and result["reason"].startswith(DISK_IS_FULL) and failures < FAILURES:
            failures += 1  # somebody else fills it, or this train.py does
            path.unlink()
            pause_for_disk()
        elif not result and NO_SPACE.search(said):
            pause_for_disk()
        elif not result and folder.exists():
            problem, _, hint = said.rpartition("error: ")[2].partition("\nhint: ")
            problem = f"the referee failed: {one_line(problem[-500:], 500)}"
            if hint:  # it has a reason to end the night
                raise SetupError(problem, hint.strip())
            failures += 1  # out of memory, it may be
            say(f"{problem}: {label}")
            if failures > FAILURES:
                crash = {"status": "crash", "reason": problem, "total_seconds": 0.0}
                patiently(write_atomic, path, [json.dumps(crash).encode()])
    return result | read_log(folder / f"run{suffix}.log", result.get("log_bytes"))


def result_path(run: Run, number: int, count: int) -> Path:
    return run.folder(number) / f"result{f'-{count}' if count > 1 else ''}.json"


def read_log(log: Path, size: int | None = None) -> dict[str, Any]:
    """Return what a train.py printed of itself and its losses, from `size` bytes of its log.

    The loss at a share of the budget is the mean of those in the twentieth before it. What was
    printed after training is left out: held-out text could stand there.
    """
    text = log.read_bytes()[:size].decode("utf-8", errors="replace") if log.exists() else ""
    found = re.findall(r"\((\d{1,3})%\).{0,20}?loss (\d{1,4}\.\d{1,9})", text)
    losses = [(int(percent), float(loss)) for percent, loss in found]
    near = [[loss for percent, loss in losses if at - 5 <= percent <= at] for at in CURVE]
    said = one_line(text[:1000].partition("\nstep ")[0], 300) if losses else ""
    return {"printed": said, "curve": [fmean(each) for each in near] if all(near) else []}


def measure(run: Run, task: Task, count: int, label: str, hidden_below: float) -> str:
    """Have the referee write result.json; returns its last words."""
    if task.slot.cluster:
        return task.slot.cluster.measure(run, task, count, label, hidden_below)
    folder, suffix = run.folder(task.done.number), f"-{count}" if count > 1 else ""
    path, running = result_path(run, task.done.number, count), folder / f"running{suffix}.json"
    slot, limit = task.slot, run_timeout(run)
    if not slot.warm or slot.warm.process.poll() is not None:
        patiently(make_ready, run, slot, folder / "train.py")
    referee, slot.warm = slot.warm, None

    def trained() -> None:  # what it compiled is there for the next one, but for the first run's
        if not slot.cold and (run.history or compiled(run).exists()):
            with suppress(OSError):  # on a full disk, say: the next run starts its own
                make_ready(run, slot, folder / "train.py")

    try:
        pid = referee.process.pid
        facts = json.dumps({"pid": pid, "started": process_start(pid)})
        patiently(write_atomic, running, [facts.encode()])
        referee.begin(words_of(run, task, count, hidden_below))
        log = folder / f"run{suffix}.log"
        silence = watch(run, referee, label, log, limit + 3600, trained)
        late = referee.process.poll() is None
    finally:
        said = referee.stop()
        running.unlink(missing_ok=True)
    if late:
        result = {"status": "crash", "reason": "timeout: no result", "total_seconds": limit}
    else:
        result = read_json(path)
    if result:
        text = json.dumps(result | {"silence_seconds": silence}, indent=1)
        patiently(write_atomic, path, [text.encode()])
    return said


def words_of(run: Run, task: Task, count: int, hidden_below: float) -> list[object]:
    """The referee's command line for one run, with limits that follow from the baseline."""
    number = task.done.number
    words = [run.folder(number), "--run", count, "--seed", task.seed]
    words += ["--timeout", run_timeout(run), f"--hidden-below={hidden_below}"]
    words += ["--manifest", run.scale["manifest"], *means_of(run)]
    words += ["--trusted", run.scale["referee"]]
    if run.history:
        words += ["--start-limit", run.history[0].start_seconds + START_OVERTIME]
        words += ["--answers-limit", ANSWERS_SHARE * run.history[0].answers_seconds]
    return words


def means_of(run: Run) -> list[object]:
    fill = [] if run.history or compiled(run).exists() else ["--fill-cache"]
    words = ["--means", run.scale["means"], "--cache", compiled(run), *fill]
    return [*words, "--memory", run.scale["memory_gb"]]


def compiled(run: Run) -> Path:
    """What the baseline compiled, a person's code: every run has a copy, and none hands on its."""
    return run.folder(0).parent / "compile"


def run_timeout(run: Run) -> float:
    """Wall-clock seconds that a run may take to its first logits, from what the baseline took."""
    scale, baseline = run.scale, run.history[0].trained_seconds if run.history else 0.0
    if scale["clock"] == "cpu":  # a busy machine stretches the wall clock, not the budget
        return 5 * (baseline or scale["budget"]) + 60
    if scale["clock"] == "wall":
        return baseline + OVERTIME if baseline else scale["budget"] + 600
    return 2 * baseline + 60 if baseline else 86_400


def watch(
    run: Run, referee: Referee, label: str, log: Path, limit: float, trained: Callable[[], None]
) -> float:
    """Wait for the referee's end, at most `limit` seconds; the longest time without a log line."""
    started = heard = time.monotonic()
    usual = run.history[0].silence_seconds if run.history else math.inf
    size, longest, said = -1, 0.0, False
    with doing(label) as show:
        while referee.process.poll() is None and (now := time.monotonic()) < started + limit:
            if STOP.is_set():
                raise KeyboardInterrupt
            show(f"{label} · {now - started:.0f} s · {last_line(log)}")
            if (grown := log.stat().st_size if log.exists() else 0) != size:
                size, heard = grown, now
            longest = max(longest, now - heard)
            if not said and now - heard > SILENCE_SHARE * usual + SILENCE_SECONDS:
                said = True
                say(f"no output for {now - heard:.0f} s, the baseline's longest was {usual:.0f} s: "
                    f"{label}")
            if referee.has_trained(0.1):
                trained()
    return longest


def last_line(log: Path) -> str:
    if not log.exists():
        return "starting"
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 400))
        tail = file.read(400).decode("utf-8", errors="replace").strip()
    return one_line(tail.rpartition("\n")[2] or "starting", 60)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; {} if there is none, or half of one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# ---------------------------------------------------------------------------
# The referee, ready before it is needed
# ---------------------------------------------------------------------------


class Referee:
    """A process that has loaded all that a run needs, and waits for the words that say which."""

    def __init__(self, words: list[object], environment: dict[str, str], cores: frozenset[int]):
        self.stderr = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            trusted_command("referee.py", *words), env=trusted_environment() | environment,
            start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr,
        )
        with suppress(ProcessLookupError):
            if cores:  # before it starts a thread or a process
                os.sched_setaffinity(self.process.pid, cores)

    def begin(self, words: list[object]) -> None:
        with suppress(BrokenPipeError):  # it has died, and its last words say why
            self.process.stdin.write(json.dumps(list(map(str, words))).encode() + b"\n")
            self.process.stdin.flush()

    def has_trained(self, seconds: float) -> bool:
        """Whether it says so within that time."""
        out = self.process.stdout.fileno()
        return bool(select.select([out], [], [], seconds)[0] and os.read(out, 4096))

    def stop(self) -> str:
        """Close its stdin, which tells it to end the run and leave; its last words."""
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process.stdout.close()
        with self.stderr as stderr:
            stderr.seek(0)
            said = stderr.read().decode("utf-8", errors="replace")
        return said or f"exit status {self.process.returncode}"


def make_ready(run: Run, slot: Slot, like: Path) -> None:
    """Start a referee for the slot's next run, whose train.py is most probably much like this."""
    standby = run.folder(0).parent / "standby"
    standby.mkdir(parents=True, exist_ok=True)
    environment = {"AUTORESEARCH_ROWS": run.scale["rows"], "AUTORESEARCH_SCALE": run.scale["name"]}
    environment |= {"CUDA_VISIBLE_DEVICES": slot.gpu} if slot.gpu else {}
    words = [standby, "--wait", like, *means_of(run)]
    slot.warm = Referee(words, environment, slot.cores)


def trusted_environment() -> dict[str, str]:
    """For what measures: no key."""
    return {k: v for k, v in os.environ.items() if PASSED_ON.fullmatch(k) or k == "HOME"}


def trusted_command(program: str, *words: object) -> list[str]:
    """Command line of a program that measures: no settings or bytecode but its own are read."""
    folder = os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch"
    bytecode = f"pycache_prefix={Path(folder).expanduser().absolute() / 'bytecode'}"
    return [sys.executable, "-I", "-X", bytecode, str(ROOT / program), *map(str, words)]


def check_trusted(run: Run) -> None:
    """Raise SetupError if a program that measures is not what it was when the run began."""
    if trusted_hash() != run.scale["referee"]:
        said = "trusted file changed: prepare.py, referee.py or warden.py"
        raise SetupError(said, "git status  # then python agent.py --tag NAME, a run of its own")


# ---------------------------------------------------------------------------
# Ideas, tried out before they cost a run
# ---------------------------------------------------------------------------


def try_out(run: Run, source: str) -> tuple[str, float]:
    """(what fails, GB at most) in two steps of a train.py on the CPU, at the scale `cpu`."""
    run.folder(0).parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="screen-", dir=run.folder(0).parent))
    environment = {"AUTORESEARCH_SCALE": "cpu", "AUTORESEARCH_ROWS": run.tiny["rows"],
                   "AUTORESEARCH_BUDGET_TOKENS": str(SCREEN_TOKENS), "CUDA_VISIBLE_DEVICES": ""}
    if run.scale["name"] != "cpu":  # its constants and shapes, without memory for them
        environment["AUTORESEARCH_IMPORT"] = run.scale["name"]
    words = [folder, "--screen", "--timeout", SCREEN_SECONDS, "--means", run.scale["means"]]
    try:
        (folder / "train.py").write_bytes(source.encode())
        referee = Referee(words, environment, frozenset())
        os.setpriority(os.PRIO_PGRP, referee.process.pid, 19)  # what is training goes first
        deadline = time.monotonic() + 2 * SCREEN_SECONDS
        while referee.process.poll() is None and time.monotonic() < deadline:
            if STOP.wait(0.1):
                break
        referee.stop()
        result, log = read_json(folder / "result.json"), folder / "run.log"
        tail = log.read_text(encoding="utf-8", errors="replace")[-1500:] if log.exists() else ""
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if result.get("status") == "ok":
        return "", result["peak_vram_mb"] / 1024
    return (f"{result['reason']}\n{tail}" if result else ""), 0.0


def screen(run: Run, source: str) -> str:
    """Why a train.py is not worth a run, "" if it may be: it fails at once, and the best does not.
    """
    try:
        said = try_out(run, source)[0]
    except OSError as error:  # the disk is full, say, which is no fault of the idea
        say(f"an idea is not tried out before its run: {error}")
        return ""
    elsewhere = run.scale["name"] != "cpu" and NEEDS_GPU.search(said)
    if not said or elsewhere or said.startswith(("timeout", "ended by a limit")):
        return ""
    best = run.best()
    if best.commit not in run.screened:
        run.screened[best.commit] = try_out(run, run.source_of(best))[0]
        if run.screened[best.commit]:
            say("ideas are not tried out before their run: the best fails at the scale cpu too")
    return "" if run.screened[best.commit] else said


# ---------------------------------------------------------------------------
# What a killed agent.py left behind
# ---------------------------------------------------------------------------


def end_leftover(run: Run) -> None:
    """End what a killed agent.py left of its last run, until nobody lives in its folder."""
    folder, own = run.folder(0).parent, []
    for path in folder.glob("**/running*.json"):
        found = read_json(path)
        if found.get("started") and process_start(found["pid"]) == found["started"]:
            say(f"ending process {found['pid']}, which an earlier agent.py left behind")
            with suppress(ProcessLookupError):
                os.killpg(found["pid"], signal.SIGKILL)  # the warden sees it, and ends the rest
        path.unlink(missing_ok=True)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        own = [link for link in Path("/proc").glob("[0-9]*/cwd") if lives_in(link, folder)]
        if not own:
            for litter in (folder / "standby", *folder.glob("screen-*")):
                shutil.rmtree(litter, ignore_errors=True)
            return
        time.sleep(0.1)
    pids = [link.parent.name for link in own]
    said = f"an earlier run is still alive: processes {', '.join(pids)}"
    raise SetupError(said, f"kill -9 {' '.join(pids)}")


def lives_in(link: Path, folder: Path) -> bool:
    """Whether a process has its home in a cage of the run; a person's shell may be beside it."""
    try:
        above = [link.readlink(), *link.readlink().parents]
        return folder in above and any(path.name.startswith("work-") for path in above)
    except OSError:
        return False


def process_start(pid: int) -> str:
    """When a process was started, in the kernel's ticks; "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
