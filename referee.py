"""The referee: trains one train.py in the cage, scores it from outside, probes what it says.

    python referee.py runs/mine                   # runs/mine/train.py; writes result.json
    python referee.py runs/mine --seed 7 --run 2
    python referee.py runs/standby --wait < words # loads all now, takes its words when they come

Clock, targets and arithmetic are in this process, which train.py reaches by a socket and a piece of
shared memory only: token rows go in, logits come out. agent.py starts it once per run.
"""

from __future__ import annotations

import argparse
import ast
import fcntl
import json
import math
import os
import re
import secrets
import select
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).resolve().parent))  # which python -I leaves out
import prepare
from prepare import Crash, Scale, SetupError
from warden import Tree

if TYPE_CHECKING:  # heavy
    import numpy as np
    import torch

    from prepare import LogitsOf

ROOT = Path(__file__).resolve().parent
OVERRUN_SHARE, OVERRUN_SECONDS = 0.03, 1.0  # of the budget: the last step, and the way out
STALL_SHARE, STALL_SECONDS = 5.0, 30.0  # wall clock of a CPU budget on a busy machine, and more
EVALUATION_SECONDS = 900.0  # wall clock that train.py has for all its answers
ANSWERS_SECONDS = 2.0  # by the budget's clock, beyond what the agent allows for all answers
RESERVE = 8  # every 8th row of hidden is kept for the probe
PROBES = 48  # decoys of either kind in a split, at least
PROBE_SHARE = 10  # one decoy of either kind for so many rows: the probe takes a fifth of their time
OFFSETS = 32  # positions before the cut at which a peek at later tokens is looked for by name
SEND_FILE = "import os, socket, sys; socket.send_fds(socket.socket(fileno=0), [b'.'], " + (
    "[os.open(sys.argv[1], os.O_RDONLY)])"
)
GPU_POLL_SECONDS, GPU_SHARE = 5.0, 0.1
BOOT = "exec(__import__('prepare').await_train(globals()))"
LOADED = prepare.trusted_hash()  # may be older than a run: it stands by before its turn
WARM_SECONDS = 600.0  # to load torch and open the device, on a machine that is very busy
# What the libraries read when they are loaded or open the device.
EARLY = re.compile(
    "(OMP|KMP|GOMP|MKL|OPENBLAS|TORCH|TORCHDYNAMO|TORCHINDUCTOR|PYTORCH|TRITON|CUBLAS|CUBLASLT|CUDNN|"
    "CUDA)_(?!VISIBLE_DEVICES).*"
)
THROTTLED = 0x8 | 0x20 | 0x40 | 0x80  # NVML's bits for heat and power brakes; a power cap is usual
PEEKING_NATS = 2e-3  # tolerated mean
# Tolerated between two answers for the same tokens. On a CPU honest models differ by 1e-6 at most
# (tests/benchmarks/probe.py); on a GPU, where it is not measured, by this in one of 10,000.
SAME_NATS, SAME_NATS_GPU, DIFFERENT_SHARE = 1e-3, 0.5, 1e-4
LEARNING_ERRORS = 4.5  # standard errors by which later answers may be better than earlier ones

# ---------------------------------------------------------------------------
# The probe
# ---------------------------------------------------------------------------


def examine(
    logits_of: LogitsOf, rows: np.ndarray, reserve: np.ndarray, bytes_of: list[int], scale: Scale
) -> float:
    """Return bits per byte of rows (N, T + 1), asked for in random order among decoys.

    A decoy has the tokens of a row up to a random cut and another row's after it:

        row    a b c d e f g h        decoy  a b c d x y z w        cut: at d

    Decoys of scored rows come a query or more after their row, and whatever is said up to the cut
    must be the same. Decoys of the reserve, whose rows are never shown whole, come at rising cuts:
    the token after each cut was not shown yet, and must be no harder to predict than others at that
    position; two of them agree up to the smaller cut. Nothing is scored that train.py could know to
    have been probed already. Raises Crash.
    """
    import numpy as np

    chance = np.random.default_rng(secrets.randbits(128))
    N, T = len(rows), scale.sequence_len
    count = max(PROBES, N // PROBE_SHARE)
    paired = chance.choice(N, min(count, N // 2), replace=False)
    # Reserve rows, some of them twice. More often would be no more evidence: a row hangs together.
    sealed = np.resize(chance.permutation(len(reserve)), min(count, 2 * len(reserve)))
    sealed.sort()
    cuts = chance.integers(0, T - 1, len(sealed) + len(paired))
    seal_cuts = cuts[: len(sealed)] = cuts[np.lexsort((cuts[: len(sealed)], sealed))]  # rising
    originals = np.concatenate([reserve[sealed], rows[paired]])
    queries = np.concatenate([rows, decoys_of(originals, cuts, rows, chance)])
    targets = np.concatenate([rows, originals])[:, 1:]
    order = order_queries(N, sealed, paired, prepare.rows_per_query(scale), chance)
    losses = prepare.answers(logits_of, queries[order], targets[order], scale)[np.argsort(order)]
    of_rows, of_sealed, of_paired = np.split(losses.numpy(), [N, N + len(sealed)])
    check_pairs(of_rows[paired], of_paired, cuts[len(sealed) :])
    again = np.flatnonzero(sealed[1:] == sealed[:-1])  # a row's decoy, and its next one
    check_pairs(of_sealed[again + 1], of_sealed[again], seal_cuts[again])
    check_seals(of_rows, of_sealed, seal_cuts)
    check_order(of_rows[order[order < N]])
    return prepare.bits_per_byte(losses[:N], rows, bytes_of)


def decoys_of(
    originals: np.ndarray, cuts: np.ndarray, rows: np.ndarray, chance: np.random.Generator
) -> np.ndarray:
    """Return each original up to its cut, then what a row that goes on otherwise has there."""
    import numpy as np

    decoys = originals.copy()
    for decoy, cut in zip(decoys, cuts, strict=True):
        others = np.flatnonzero(rows[:, cut + 1] != decoy[cut + 1])
        if len(others):  # else all rows agree there
            decoy[cut + 1 :] = rows[chance.choice(others), cut + 1 :]
    return decoys


def order_queries(
    N: int, sealed: np.ndarray, paired: np.ndarray, size: int, chance: np.random.Generator
) -> np.ndarray:
    """Return the order in which N rows, the decoys of `sealed` and those of `paired` are asked.

    First sights come at random, the decoys of one sealed row as they are listed. The decoy of a
    paired row comes a query of `size` rows or more after its row; and at the end there are second
    sights only, since it would be known there that no probe follows.
    """
    import numpy as np

    P, first_sights = len(paired), N + len(sealed)
    place = np.concatenate([chance.permutation(first_sights).astype(float), np.zeros(P)])
    for row in np.unique(sealed):
        own = N + np.flatnonzero(sealed == row)
        place[own] = np.sort(place[own])
    earliest = place[paired] + size
    place[first_sights:] = earliest + chance.random(P) * np.maximum(0, first_sights - earliest)
    last_query = size + (first_sights + P) % size
    ending = np.argsort(chance.random(P) + (earliest < first_sights))[:last_query]
    place[first_sights + ending] = np.inf
    return np.argsort(place, kind="stable")


def standard_error(values: np.ndarray) -> float:
    return values.std(ddof=1) / math.sqrt(len(values))


def check_pairs(real: np.ndarray, decoy: np.ndarray, cuts: np.ndarray) -> None:
    """Compare losses (P, T) of the same tokens up to each cut. Raises Crash.

    `decoy` has other tokens after the cut. A model that looks ahead loses at the cut most of all.
    """
    import numpy as np

    at = cuts[:, None] - np.arange(OFFSETS)  # (P, OFFSETS)
    gains = np.take_along_axis(decoy - real, np.maximum(at, 0), axis=1)
    for offset in range(OFFSETS):
        gain = gains[at[:, offset] >= 0, offset]
        if len(gain) > 4 and gain.mean() > PEEKING_NATS + 5 * standard_error(gain):
            raise Crash("probe: logits depend on later tokens")
    change = np.abs(decoy - real)[np.arange(real.shape[1]) <= cuts[:, None]]
    gpu = prepare.device_type() != "cpu"
    different = (change > (SAME_NATS_GPU if gpu else SAME_NATS)).sum()
    if different > (DIFFERENT_SHARE * len(change) if gpu else 0):
        causes = "later tokens, other rows, earlier calls or chance"
        raise Crash(f"probe: the same tokens get other logits ({causes})")


def check_seals(shown: np.ndarray, sealed: np.ndarray, cuts: np.ndarray) -> None:
    """Compare losses (decoys, T) of tokens that were not shown yet, each decoy's at its cut, with
    losses (N, T) of tokens at the same positions that were. Raises Crash.

    By logarithms: who knows some of the next tokens brings their losses near 0, and hides behind a
    few enormous ones where he was wrong. In a plain mean those only widen the standard error.
    """
    import numpy as np

    def level(losses: np.ndarray) -> np.ndarray:
        return np.log(losses + 0.1)

    excess = level(sealed[np.arange(len(cuts)), cuts]) - level(shown).mean(axis=0)[cuts]
    errors = 4 + 24 / len(excess)  # 4 standard errors, and what a t-test adds for few samples
    if excess.mean() > PEEKING_NATS + errors * standard_error(excess):
        raise Crash("probe: tokens that were not shown yet are worse predicted")


def check_order(losses: np.ndarray) -> None:
    """Compare the losses (N, T) of rows with the order in which they were asked. Raises Crash."""
    import numpy as np

    mean, when = losses.mean(axis=1), np.arange(len(losses)) - (len(losses) - 1) / 2
    slope = (when * mean).sum() / (when**2).sum()
    rest = mean - mean.mean() - slope * when
    error = math.sqrt((rest**2).sum() / (len(mean) - 2) / (when**2).sum())
    if slope < -LEARNING_ERRORS * error:
        raise Crash("probe: later answers are better than earlier ones: it learns as it is asked")


# ---------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------


class Gpu:
    """Looks, with nvidia-smi, for what makes a run slower than it is: tenants and throttling."""

    def __init__(self) -> None:
        self.id: list[str] = []  # of one card, to ask for that alone
        self.looks, self.shared, self.throttled = 0, 0, 0
        self.ended = threading.Event()

    def start(self) -> None:
        import torch

        if torch.cuda.is_available():
            self.id = [f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"]
        if shutil.which("nvidia-smi"):
            threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        while not self.ended.wait(GPU_POLL_SECONDS):
            tenants = set(map(int, re.findall(r"^\d+", self.ask("compute-apps=pid"), re.M)))
            reasons = re.findall(r"0x([0-9a-fA-F]+)", self.ask("gpu=clocks_event_reasons.active"))
            own = {os.getpid(), *Tree().look().parents}
            # In a container the numbers may be the host's: who has none here is not counted.
            self.shared += any(Path(f"/proc/{pid}").exists() for pid in tenants - own)
            self.throttled += any(int(mask, 16) & THROTTLED for mask in reasons)
            self.looks += 1

    def ask(self, what: str) -> str:
        command = ["nvidia-smi", *self.id, "--format=csv,noheader", f"--query-{what}"]
        with suppress(subprocess.TimeoutExpired):
            done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60)
            return done.stdout if done.returncode == 0 else ""
        return ""

    def trouble(self) -> str:
        """End looking; what there was in at least GPU_SHARE of the looks, "" if nothing."""
        self.ended.set()
        if self.shared > GPU_SHARE * self.looks:
            return "another process on the GPU"
        return "a throttled GPU" if self.throttled > GPU_SHARE * self.looks else ""


# ---------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------


def shared_memory() -> int:
    """Descriptor of memory that has no name."""
    if sys.platform == "linux":
        return os.memfd_create("logits", os.MFD_ALLOW_SEALING)
    return os.dup(tempfile.TemporaryFile().fileno())


def what_to_show(rows: Path) -> list[Any]:
    """The warden's options for what train.py may read of the data, and what not of the machine."""
    shown = ["--hide", ROOT, "--hide", rows.parent, "--read", rows / "tokenizer.json"]
    if (library := rows / "library").exists():
        shown += ["--read", library, "--env", f"PYTHONPATH={library}"]
        for source in json.loads((library / "sources.json").read_bytes()):
            shown += ["--hide", source]
    return shown


def open_read_only(path: Path) -> int:
    """Descriptor of a file, by a read-only mount where that can be had.

    In bubblewrap's world train.py owns the file still, and could open its descriptor anew to write.
    """
    line = ["bwrap", "--ro-bind", "/", "/", "--", sys.executable, "-I", "-c", SEND_FILE, str(path)]
    if shutil.which("bwrap"):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            done = subprocess.run(line, stdin=theirs, stderr=subprocess.DEVNULL)
            if done.returncode == 0:
                return socket.recv_fds(ours, 1, 1)[1][0]
    return os.open(path, os.O_RDONLY)


class Confined:
    """One run of train.py in the warden's cage, reached by a socket and shared memory only."""

    def __init__(
        self, folder: Path, scale: Scale, rows: Path, early: dict[str, str] | None, more: list[str]
    ):
        """Start the process in `folder`, to await train.py, loaded as far as `early` allows."""
        self.log, self.started, self.early = folder / f"{os.getpid()}.log", time.monotonic(), early
        self.clock = self.cpu_seconds if scale.clock == "cpu" else self.wall_seconds
        self.deadline = self.limit = self.slack = math.inf
        self.before = 0.0  # CPU seconds, until train.py came
        self.taken: list[float] = []  # seconds, by each answer
        self.shown = False  # whether it may have been asked about held-out rows
        memory = shared_memory()
        self.claims, self.tokens, self.logits = prepare.exchange(memory, scale)
        if sys.platform == "linux":  # or train.py could shrink it below what is read here
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self.link, theirs = socket.socketpair()
        facts = {"AUTORESEARCH_SCALE": scale.name, "AUTORESEARCH_ROWS": rows,
                 "AUTORESEARCH_COLD": "" if early is not None else 1, "PYTHONUNBUFFERED": 1,
                 "AUTORESEARCH_REFEREE": f"{theirs.fileno()},{memory}"} | (early or {})
        environment = [word for fact in facts.items() for word in ("--env", "{}={}".format(*fact))]
        line = [*more, "--folder", folder, "--log", self.log, "--copy", ROOT / "prepare.py",
                *what_to_show(rows), *environment,
                "--fd", theirs.fileno(), "--fd", memory, "--", sys.executable, "-c", BOOT]
        self.warden = subprocess.Popen(
            [sys.executable, "-I", str(ROOT / "warden.py"), *map(str, line)],
            pass_fds=(theirs.fileno(), memory), start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        theirs.close()
        os.close(memory)
        self.train_rows = open_read_only(rows / "train.bin")
        self.loaded = {LOADED, prepare.trusted_hash()}

    def begin(self, source: bytes, seed: int, log: Path) -> None:
        """Hand train.py over, whose clocks start here. SystemExit if nobody is there to take it."""
        try:
            self.await_frame(prepare.WARM, WARM_SECONDS)
            self.loaded.add(prepare.trusted_hash())
            os.replace(self.log, log)
            self.log, self.before = log, self.cpu_seconds()
            self.started = time.monotonic()
            self.link.sendall(struct.pack("<IQ", seed, len(source)) + source)
        except (Crash, BrokenPipeError, ConnectionResetError) as error:
            sys.exit(f"error: nothing can be loaded in the cage: {error}")

    def wall_seconds(self) -> float:
        return time.monotonic() - self.started

    def cpu_seconds(self) -> float:
        """What train.py and all that it started have used, as the kernel counts it."""
        try:
            os.write(self.warden.stdin.fileno(), b"?")
            return float(self.warden.stdout.readline()) - self.before
        except (BrokenPipeError, ValueError):
            raise Crash(self.last_words()) from None

    def receive(self, size: int) -> bytes:
        """What has come, up to `size` bytes. Raises Crash if train.py has hung up."""
        try:
            part = self.link.recv(size, socket.MSG_DONTWAIT)
        except BlockingIOError:  # out-of-band data, which is no data
            time.sleep(0.01)
            return b""
        except ConnectionResetError:
            part = b""
        if not part:
            raise Crash(self.last_words())
        return part

    def await_frame(
        self, expected: bytes, seconds: float, limit: float = math.inf, late: str = ""
    ) -> None:
        """Wait for one frame, for some seconds, or until the budget's clock is past a limit.

        Raises Crash for that, silence, another frame or the end of train.py.
        """
        frame, started, looked = b"", time.monotonic(), time.monotonic()
        while len(frame) < len(expected):
            readable, _, _ = select.select([self.link, sys.stdin], [], [], 0.25)
            now = time.monotonic()
            if sys.stdin in readable and not os.read(sys.stdin.fileno(), 4096):
                raise KeyboardInterrupt  # whoever started this referee is gone
            if self.link in readable:
                frame += self.receive(len(expected) - len(frame))
            elif self.warden.poll() is not None:
                raise Crash(self.last_words())
            silent = now - started > seconds
            if limit < math.inf and (silent or now - looked > 1):
                looked = now
                if self.clock() > limit:
                    break
            if silent:
                raise Crash(f"timeout: no answer within {seconds:.0f} s")
        if limit < math.inf and self.clock() > limit:
            raise Crash(f"overtime: {late}")
        if frame != expected:
            raise Crash("garbage on the pipe")

    def train(
        self, scale: Scale, timeout: float, start_limit: float, answers_limit: float
    ) -> dict[str, float]:
        """From the start to the end of training, on the referee's own clock. Raises Crash."""
        late = f"{start_limit:.0f} s before the first batch"
        self.await_frame(prepare.START, timeout, start_limit, late)
        begun, wall_begun = self.clock(), self.wall_seconds()
        try:
            socket.send_fds(self.link, [b"."], [self.train_rows])
        except (BrokenPipeError, ConnectionResetError):
            raise Crash(self.last_words()) from None
        budget = math.inf if scale.clock == "tokens" else scale.budget
        self.slack = budget * OVERRUN_SHARE + OVERRUN_SECONDS
        stalled = (budget + self.slack) * STALL_SHARE + STALL_SECONDS
        timeout = min(timeout - wall_begun, stalled)
        late = "trained on after the end of the budget"
        self.await_frame(prepare.READY, timeout, begun + budget + self.slack, late)
        ended = self.clock()
        self.slack -= max(0.0, ended - begun - budget)
        more = STALL_SECONDS if scale.clock == "tokens" else ANSWERS_SECONDS  # that clock: the wall
        self.limit = ended + answers_limit + more
        self.deadline = time.monotonic() + EVALUATION_SECONDS
        return {"start_seconds": begun, "start_wall_seconds": wall_begun,
                "training_seconds": ended - begun,
                "training_wall_seconds": self.wall_seconds() - wall_begun}

    def logits_of(self, tokens: torch.Tensor) -> torch.Tensor:
        import torch

        if not self.taken:
            prepare.pin(self.logits)
        n, asked = len(tokens), self.clock()
        self.tokens[:n] = tokens.numpy()
        frame = struct.pack("<I", n)
        try:
            self.link.sendall(frame)
        except (BrokenPipeError, ConnectionResetError):
            raise Crash(self.last_words()) from None
        late = "too slow in answering"
        self.await_frame(frame, self.deadline - time.monotonic(), self.limit, late)
        self.taken.append(self.clock() - asked)
        # A copy: train.py could change the shared memory between two passes of the arithmetic.
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.from_numpy(self.logits[:n]).to(device, copy=True)

    def check_pace(self) -> None:
        """Raise Crash if some answers took so much longer that training could have gone on."""
        pace = 2 * statistics.median(self.taken)  # a busy machine; all alike may be slower yet
        if sum(max(0.0, seconds - pace) for seconds in self.taken) > self.slack:
            raise Crash("overtime: trained on while answering")

    def last_words(self) -> str:
        """Why train.py ended, from the warden's exit status and the last exception in its log."""
        try:
            status = self.warden.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "hung up without an answer"
        # The warden's own words: 124 and 125 may be what train.py itself exited with.
        said = self.warden.stderr.read().decode("utf-8", errors="replace").strip()
        if status == 124 and said:
            return said
        if status == 125 and said:
            raise SetupError(f"the warden: {said}", "python warden.py --self-test < /dev/null")
        if status == 0:
            return "exited before finish(model) had its answers"
        if status - 128 in signal.valid_signals():
            name = signal.strsignal(status - 128)
            return f"killed by signal {status - 128} {name} before finish(model) had its answers"
        return self.last_error() or f"exit status {status}"

    def last_error(self) -> str:
        tail = self.log.read_bytes()[-20_000:].decode("utf-8", errors="replace").splitlines()
        errors = [line for line in tail if re.match(r"[\w.]+(Error|Exception|Exit|Crash)\b", line)]
        last = errors[-1] if errors else ""
        # What it says after it has seen held-out rows could carry them into the next prompt.
        return re.match(r"[\w.]*", last)[0][:100] if self.shown else last

    def end(self) -> None:
        """Hang up: the warden ends all that is left of the run, and itself."""
        self.warden.stdin.close()
        self.warden.wait()


def plausible(claim: float) -> float:
    """What train.py claims of itself, 0 if that cannot be."""
    return claim if 0 <= claim < 1e12 else 0.0


def score(confined: Confined, rows: Path, scale: Scale, hidden_below: float) -> Iterator[Any]:
    """val_bpb, and hidden_bpb if the first is low enough to matter. Raises Crash."""
    bytes_of = prepare.load_tokenizer(rows)[1]
    val = prepare.load_rows(rows, "val", scale.sequence_len)
    hidden = prepare.load_rows(rows, "hidden", scale.sequence_len)
    reserve = hidden[::RESERVE]
    val_bpb = examine(confined.logits_of, val, reserve[::2], bytes_of, scale)
    confined.check_pace()
    yield "val_bpb", val_bpb
    if val_bpb < hidden_below:
        scored = hidden[[n for n in range(len(hidden)) if n % RESERVE]]
        yield "hidden_bpb", examine(confined.logits_of, scored, reserve[1::2], bytes_of, scale)
        confined.check_pace()


def early_environment(source: bytes) -> dict[str, str] | None:
    """What train.py sets for libraries before it loads them; None if that is not plain to see."""
    try:
        tree, found, odd = ast.parse(source.decode("utf-8")), {}, 0
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}  # it will say so itself
    for node in ast.walk(tree):
        named = {ast.Attribute: "attr", ast.Name: "id", ast.alias: "name"}.get(type(node), "")
        odd += getattr(node, named, "") in ("environ", "environb", "putenv")
    for node in ast.walk(tree):  # what is read, and plain settings, are not odd
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="environ"), attr="get")):
                odd -= 1
            case ast.Subscript(value=ast.Attribute(attr="environ"), ctx=ast.Load()):
                odd -= 1
    for statement in tree.body:
        match statement:
            case ast.Assign(
                targets=[ast.Subscript(
                    value=ast.Attribute(attr="environ"), slice=ast.Constant(value=str(name))
                )],
                value=ast.Constant(value=str(value)),
            ):
                found[name], odd = value, odd - 1
            case ast.Expr(
                value=ast.Call(
                    func=ast.Attribute(value=ast.Attribute(attr="environ"), attr="setdefault"),
                    args=[ast.Constant(value=str(name)), ast.Constant(value=str(value))],
                )
            ):
                found[name], odd = found.get(name, os.environ.get(name, value)), odd - 1
    odd += sum(len(v) > 1000 or not v.isprintable() for v in found.values())
    return None if odd else {k: v for k, v in found.items() if EARLY.fullmatch(k)}


def start(args: argparse.Namespace, source: bytes) -> Confined:
    """A process that is ready for this train.py or, as far as can be told, for the next one."""
    more = ["--means", args.means, "--memory", args.memory]
    more += ["--cache", args.cache] if args.cache else []
    more += ["--fill-cache"] if args.fill_cache else []
    scale = prepare.current_scale()
    rows = prepare.rows_folder(scale)[0].resolve()
    return Confined(args.folder, scale, rows, early_environment(source), more)


def stand_by(args: argparse.Namespace) -> tuple[argparse.Namespace, Confined | None]:
    """Load all that the next run needs, then await its command line, JSON on stdin."""
    waiting = start(args, args.wait.read_bytes()) if args.wait.exists() else None
    load()
    words = b""
    while not words.endswith(b"\n"):
        part = os.read(sys.stdin.fileno(), 65536)
        if not part:  # it is not needed, or whoever started this referee is gone
            if waiting:
                waiting.end()
            raise KeyboardInterrupt
        words += part
    return parse(json.loads(words)), waiting


def load() -> None:
    """Import what the score needs, and open the device."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.init()  # needs to write to its own /proc, which hiding takes away
    prepare.hide_memory()


def referee(args: argparse.Namespace, waiting: Confined | None = None) -> None:
    """Train FOLDER/train.py once, score it, write run.log and result.json there.

    A run without a result has `"status": "crash"` and a `reason`. Raises SetupError if a trusted
    file is not what it was.
    """
    scale, suffix = prepare.current_scale(), f"-{args.run}" if args.run > 1 else ""
    rows, log = prepare.rows_folder(scale)[0].resolve(), args.folder / f"run{suffix}.log"
    result: dict[str, Any] = {"status": "crash", "reason": "", "val_bpb": None, "seed": args.seed}
    source, gpu = (args.folder / "train.py").read_bytes(), Gpu()
    early = early_environment(source)
    if waiting and (waiting.early != early or waiting.warden.poll() is not None):
        waiting.end()
        waiting = None
    confined = waiting or start(args, source)
    load()  # while train.py starts
    import torch

    try:
        gpu.start()
        confined.begin(source, args.seed, log)
        if args.trusted and confined.loaded != {args.trusted}:
            said = "trusted file changed while a run was made ready"
            raise SetupError(said, "git status  # then the same command goes on")
        with ThreadPoolExecutor(1) as beside:  # some seconds for a large corpus
            checked = beside.submit(prepare.check_rows, rows, ["train.bin"], args.manifest)
            result |= confined.train(scale, args.timeout, args.start_limit, args.answers_limit)
            checked.result()
        gpu.ended.set()
        print("trained", flush=True)  # the next one may be made ready
        result["log_bytes"] = log.stat().st_size  # later lines could hold held-out text
        prepare.check_rows(rows, prepare.SCORED, args.manifest)
        trained = time.monotonic()
        claimed = zip(prepare.CLAIMS, confined.claims.tolist(), strict=True)
        result |= {name: plausible(value) for name, value in claimed}
        # First training rows: what fails on them may be told with all its words.
        few = prepare.load_rows(rows, "train", scale.sequence_len)
        few = few[: prepare.rows_per_query(scale)]
        prepare.answers(confined.logits_of, few, few[:, 1:], scale)
        if not args.screen:
            confined.shown = True
            result |= dict(score(confined, rows, scale, args.hidden_below))
        result["evaluation_seconds"] = time.monotonic() - trained
        result["answers_seconds"] = sum(confined.taken)
        result["status"] = "ok"
    except (Crash, torch.OutOfMemoryError) as crash:
        prepare.check_rows(rows, ["train.bin", *prepare.SCORED], args.manifest)  # may be the cause
        result["reason"] = " ".join(str(crash).split())[:300]
    finally:
        confined.end()
    result["disturbed"] = gpu.trouble()
    result["total_seconds"] = time.monotonic() - confined.started
    if result["status"] == "ok" and not args.screen:
        with open(log, "a", encoding="utf-8") as out:
            out.write("\n" + prepare.summary(result) + "\n")
    text = json.dumps(result, indent=1)
    prepare.write_atomic(args.folder / f"result{suffix}.json", [text.encode()])


def parse(words: list[str]) -> argparse.Namespace:
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("folder", type=Path, help="with a train.py; run.log and result.json are written there")
    add("--seed", type=int, default=0)
    add("--run", type=int, default=1, metavar="N", help="N > 1 writes run-N.log, result-N.json")
    add("--timeout", type=float, default=86_400, metavar="SECONDS", help="to the first logits")
    add("--start-limit", type=float, default=math.inf, metavar="SECONDS", help="to the first batch")
    add("--answers-limit", type=float, default=math.inf, metavar="SECONDS", help="for all of them")
    add("--cache", metavar="PATH", help="of compiled code: the run gets a copy")
    add("--fill-cache", action="store_true", help="make it of what this run leaves")
    add("--hidden-below", type=float, default=math.inf, metavar="VAL_BPB")
    add("--manifest", metavar="HASH", help="that the rows must have")
    add("--trusted", metavar="HASH", help="that prepare.py, referee.py and warden.py must have")
    add("--means", default="", metavar="NAME", help="of confinement, see warden.py")
    add("--memory", type=float, default=math.inf, metavar="GB", help="at most")
    add("--screen", action="store_true", help="ask the trained model once, do not score it")
    add("--wait", type=Path, metavar="FILE", help="load now, as for this train.py; then read the\n"
        "command line as JSON from stdin")
    return parser.parse_args(words)


def main() -> None:
    try:
        args = parse(sys.argv[1:])
        referee(*(stand_by(args) if args.wait else (args,)))
    except OSError as error:
        raise SetupError(str(error), "df -h") from error
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
