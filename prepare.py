"""The contest: rows, clock, batches and metric. Nobody edits this file during a run.

    python prepare.py                          # rows for this machine's scale
    python prepare.py --corpus ~/notes         # rows from your own text, JSONL or Parquet files
    AUTORESEARCH_SCALE=gpu python prepare.py   # rows for another scale

train.py takes `current_scale`, `batches` and `finish` from here. Under agent.py it runs in the cage
of warden.py with a copy of this file, and referee.py, outside, owns the clock and the score.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import mmap
import os
import re
import resource
import runpy
import socket
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # heavy: imported where used, so that agent.py may import this file
    import numpy as np
    import tiktoken
    import torch

    LogitsOf = Callable[[torch.Tensor], torch.Tensor]  # tokens (B, T) -> logits (B, T, V)

# ---------------------------------------------------------------------------
# Constants of the contest
# ---------------------------------------------------------------------------

FORMAT = 1  # of the files under the cache; another one is prepared anew
CLIMBMIX = "karpathy/climbmix-400b-shuffle"  # Parquet shards with a column `text`
VAL_SHARD, HIDDEN_SHARD = 6542, 6541  # pinned; training shards count from 0
RECORD = 0.71800  # val_bpb on VAL_SHARD of the run that led nanochat's table in 2026 (1.65 hours)
QUERY_BYTES = 2**28  # float32 logits asked for in one query, at most
# Frames that say: I have loaded, give me train.py; give me the rows; it is trained, ask me.
WARM, START, READY = b"\xfe" * 4, b"\xff" * 4, b"\0" * 4
# What train.py claims of itself, beside its score. Crosses as float64 in this order.
CLAIMS = ("peak_vram_mb", "mfu_percent", "total_tokens_M", "num_steps", "num_params_M", "depth",
          "draws")  # fmt: skip
TRUSTED = ("prepare.py", "referee.py", "warden.py")
IMPORTED = time.monotonic()


@dataclasses.dataclass(frozen=True)
class Scale:
    """What is fixed for a kind of machine. Results of different scales are never compared."""

    name: str
    corpus: str  # "stdlib" or "climbmix"
    vocab_size: int
    sequence_len: int  # tokens predicted per row
    clock: str  # unit of the budget: "cpu" or "wall" seconds, or "tokens"
    budget: float
    eval_tokens: int  # of val, and as many of hidden
    shards: int  # of ClimbMix, to train on
    sigma: float  # prior of the run-to-run standard deviation of val_bpb


SCALES = (
    Scale("cpu", "stdlib", 1024, 128, "cpu", 60, 131_072, 0, 0.005),
    Scale("gpu", "climbmix", 8192, 2048, "wall", 300, 2**20, 10, 0.0003),
    Scale("d12", "climbmix", 32_768, 2048, "tokens", 1.2e9, 2**21, 30, 0.0003),
    Scale("gpt2", "climbmix", 32_768, 2048, "tokens", 7.3e9, 2**22, 150, 0.00004),
)


class SetupError(SystemExit):
    """The program cannot start or go on. Uncaught it prints two lines and exits with code 1."""

    def __init__(self, message: str, hint: str):
        super().__init__(f"error: {message}\nhint: {hint}")


class Crash(Exception):
    """A run has no result; the message is the reason."""


def device_type() -> str:
    """The best device here: "cuda", "mps" or "cpu"."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def current_scale() -> Scale:
    """The scale of AUTORESEARCH_SCALE, else of the device."""
    name = os.environ.get("AUTORESEARCH_SCALE")
    return scale_named(name or ("cpu" if device_type() == "cpu" else "gpu"))


def scale_named(name: str) -> Scale:
    """A scale with the budget of the environment.

    AUTORESEARCH_BUDGET replaces the budget in seconds, AUTORESEARCH_BUDGET_TOKENS makes it training
    tokens. Raises SetupError for an unknown scale or a budget that is no positive number.
    """
    scale = next((scale for scale in SCALES if scale.name == name), None)
    if scale is None:
        known = "|".join(scale.name for scale in SCALES)
        raise SetupError(f"unknown scale {name!r}", f"export AUTORESEARCH_SCALE={known}")
    for variable in ("AUTORESEARCH_BUDGET", "AUTORESEARCH_BUDGET_TOKENS"):
        if text := os.environ.get(variable):
            number = re.fullmatch(r"\d*\.?\d+([eE]\d{1,2})?", text)
            if not number or float(text) == 0:
                hint = f"python agent.py --budget 60  # or: unset {variable}"
                raise SetupError(f"{variable}={text} is no positive number", hint)
            seconds = scale.clock.replace("tokens", "wall")
            clock = "tokens" if variable.endswith("TOKENS") else seconds
            scale = dataclasses.replace(scale, clock=clock, budget=float(text))
    return scale


def hide_memory() -> None:
    """Keep this process's memory and environment from others of the same user."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE


# ---------------------------------------------------------------------------
# Prepared rows
# ---------------------------------------------------------------------------


def load_tokenizer(folder: Path) -> tuple[tiktoken.Encoding, list[int]]:
    """(tokenizer without BOS, bytes per token with 0 for BOS) of a folder of rows."""
    import tiktoken

    stored = json.loads((folder / "tokenizer.json").read_bytes())
    tokens = [base64.b64decode(token) for token in stored["tokens"]]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    encoding = tiktoken.Encoding(
        "rows", pat_str=stored["pattern"], mergeable_ranks=ranks, special_tokens={}
    )
    return encoding, [len(token) for token in tokens] + [0]


def load_rows(folder: Path, split: str, sequence_len: int) -> np.ndarray:
    """Rows of a split as a read-only memmap, (N, sequence_len + 1) uint16."""
    import numpy as np

    return np.memmap(folder / f"{split}.bin", np.uint16, mode="r").reshape(-1, sequence_len + 1)


def rows_folder(scale: Scale, corpus: str | None = None) -> tuple[Path, str]:
    """(folder of the prepared rows, their source in words); named after what makes them."""
    if prepared := os.environ.get("AUTORESEARCH_ROWS"):  # under the referee
        return Path(prepared), ""
    if corpus := corpus or os.environ.get("AUTORESEARCH_CORPUS"):
        from pretokenize import corpus_files  # not in the cage, where nothing is prepared

        stats = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in corpus_files(corpus)]
        source, made_of = f"corpus {Path(corpus).expanduser().resolve()}", json.dumps(stats)
    elif scale.corpus == "stdlib":
        source = made_of = f"standard library of Python {sys.version.split()[0]}"
    else:
        source = made_of = f"{CLIMBMIX}, {scale.shards} shards"
    shape = f"{FORMAT} {scale.vocab_size} {scale.sequence_len} {scale.eval_tokens} {made_of}"
    cache = Path(os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch").expanduser()
    return cache / f"{scale.name}-{hashlib.sha256(shape.encode()).hexdigest()[:10]}", source


def write_atomic(path: Path, blocks: Iterable[bytes]) -> None:
    """Write a file that is complete under its name or not there at all, power cut included."""
    with open(path.with_name(path.name + ".part"), "wb") as file:
        file.writelines(blocks)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


SCORED = ("tokenizer.json", "val.bin", "hidden.bin")


def file_hash(path: Path) -> str:
    import numpy as np

    return hashlib.sha256(np.memmap(path, np.uint8, mode="r")).hexdigest()


def check_rows(folder: Path, names: Iterable[str], manifest: str | None = None) -> None:
    """Raise SetupError unless these files, and the manifest itself, are as they were prepared."""
    stored = (folder / "manifest.json").read_bytes()
    if manifest and hashlib.sha256(stored).hexdigest()[:16] != manifest:
        raise SetupError(f"trusted file changed: {folder}/manifest.json", "python agent.py")
    for name in names:
        path = folder / name
        if not path.exists() or file_hash(path) != json.loads(stored)["sha256"][name]:
            raise SetupError(f"trusted file changed: {path}", f"rm -r {folder}")


def trusted_hash() -> str:
    """Of the programs that measure: results of other ones are not compared with theirs."""
    sources = (Path(__file__).with_name(name).read_bytes() for name in TRUSTED)
    return hashlib.sha256(b"\0".join(sources)).hexdigest()[:16]


# ---------------------------------------------------------------------------
# Clock and batches
# ---------------------------------------------------------------------------


@dataclasses.dataclass
class Spent:
    """What the clock has counted in this process since the first batch."""

    started: tuple[float, float] | None = None  # by the scale's clock and by the wall
    seconds: float = 0.0  # of the scale's clock
    wall_seconds: float = 0.0
    children: float = 0.0  # CPU seconds of those that live, when last looked at
    looked: float = -1.0
    tokens: int = 0
    draws: int = 0  # stands for the random numbers that were drawn before the first batch


SPENT = Spent()


def run_seed() -> int:
    """The seed of this run, not train.py's to choose: initial weights and the order of the data."""
    return int(os.environ.get("AUTORESEARCH_SEED", "0"))


@functools.cache
def train_rows(scale: Scale) -> np.ndarray:
    """Training rows, (N, T + 1) uint16. The referee hands them out and starts its own clock."""
    import numpy as np

    if link := referee_link():
        link.sendall(START)
        _, descriptors, _, _ = socket.recv_fds(link, 1, 1)
        with os.fdopen(descriptors[0], "rb") as file:
            return np.memmap(file, np.uint16, mode="r").reshape(-1, scale.sequence_len + 1)
    folder, _ = rows_folder(scale)
    if not (folder / "train.bin").exists():
        raise SetupError(f"no rows in {folder}", "python prepare.py")
    return load_rows(folder, "train", scale.sequence_len)


@functools.cache
def referee_link() -> socket.socket | None:
    """The socket to the referee that started this process, if one did."""
    descriptors = os.environ.get("AUTORESEARCH_REFEREE")
    return socket.socket(fileno=int(descriptors.split(",")[0])) if descriptors else None


def await_train(main: dict[str, Any]) -> CodeType:
    """In the cage: load what every run needs, then wait for train.py; its code, to run as `main`.

    AUTORESEARCH_COLD: load nothing, since train.py says first how it is to be loaded.
    AUTORESEARCH_IMPORT: a scale at which the model is to be built first, without memory for it.
    """
    if not os.environ.get("AUTORESEARCH_COLD"):
        import torch._dynamo  # which optimizers and torch.compile load

        if torch.cuda.is_available():
            import torch._inductor.compile_fx

            torch.zeros(1, device="cuda")
    link = referee_link()
    link.sendall(WARM)
    seed, size = struct.unpack("<IQ", link.recv(12, socket.MSG_WAITALL))
    path, source = Path("train.py").absolute(), link.recv(size, socket.MSG_WAITALL)
    path.write_bytes(source)
    os.environ["AUTORESEARCH_SEED"], sys.argv = str(seed), [str(path)]
    if name := os.environ.get("AUTORESEARCH_IMPORT"):
        import torch

        tiny, os.environ["AUTORESEARCH_SCALE"] = os.environ["AUTORESEARCH_SCALE"], name
        with torch.device("meta"):
            runpy.run_path(str(path)).get("build_model", int)()
        os.environ["AUTORESEARCH_SCALE"] = tiny
    main |= {"__file__": str(path)}
    text = source.decode("utf-8")  # as the agent reads it: bytes may name an encoding of their own
    return compile(text, str(path), "exec", dont_inherit=True)


def cpu_seconds() -> float:
    """What this process and all that it started have used: compilers count, as for the referee."""
    now = time.monotonic()
    if now - SPENT.looked > 1 and sys.platform == "linux":
        SPENT.looked, parents, seconds, tick = now, {}, {}, os.sysconf("SC_CLK_TCK")
        for stat in map(str, Path("/proc").glob("[0-9]*/stat")):
            with contextlib.suppress(OSError), open(stat, errors="replace") as file:
                fields = file.read().rpartition(")")[2].split()
                pid = int(stat.split("/")[2])
                parents[pid], seconds[pid] = int(fields[1]), sum(map(int, fields[11:15])) / tick
        family, found = {os.getpid()}, 0
        while len(family) > found:
            found = len(family)
            family |= {pid for pid, parent in parents.items() if parent in family}
        SPENT.children = sum(seconds[pid] for pid in family if pid != os.getpid())
    waited = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + waited.ru_utime + waited.ru_stime + SPENT.children


def ranks() -> tuple[int, int]:
    """(rank of this process, number of them): as torchrun says, else (0, 1)."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def draws(device: torch.device) -> int:
    """Stands for all random numbers drawn so far, as for initial weights: on one seed two programs
    that drew the same ones share luck, and others do not."""
    import torch

    state = torch.get_rng_state().numpy().tobytes()
    if device.type == "cuda":
        state += torch.cuda.get_rng_state(device).numpy().tobytes()
    return zlib.crc32(state)


def batches(
    batch_size: int, device: torch.device, trained: int = 0, seconds: float = 0.0
) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    """Yield (x, y, progress) until the budget is spent; the clock starts with the first batch.

    x and y are (batch_size, T) int64 on `device`, y being x one token later; progress is the share
    of the budget spent, in [0, 1). Under torchrun each rank has its share of the rows. A run that
    goes on says how many tokens it has trained, in how many seconds. Raises ValueError if there are
    fewer rows than one batch for each rank, SetupError if ranks would end by different clocks.
    """
    import numpy as np
    import torch

    scale, (rank, count) = current_scale(), ranks()
    rows, batch_size = train_rows(scale), batch_size * count  # of all ranks
    if not 0 < batch_size <= len(rows):
        raise ValueError(f"batch_size {batch_size} is not between 1 and {len(rows)} rows")
    if count > 1 and scale.clock != "tokens":
        raise SetupError("several ranks end together only by a budget in tokens",
                         "export AUTORESEARCH_BUDGET_TOKENS=100000000")
    own = slice(rank * (batch_size // count), (rank + 1) * (batch_size // count))
    SPENT.tokens = max(SPENT.tokens, trained)  # no second budget by asking twice
    a_batch = batch_size * scale.sequence_len
    epochs, past = divmod(trained // a_batch, len(rows) // batch_size)
    clock = cpu_seconds if scale.clock == "cpu" else time.monotonic
    copied: torch.cuda.Event | None = None  # the batch before, and what was queued until then
    SPENT.draws = SPENT.draws or draws(device)
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    for epoch in itertools.count(epochs):
        order = np.random.default_rng([run_seed(), epoch]).permutation(len(rows))
        start, past = past * batch_size, 0
        for first in range(start, len(rows) - batch_size + 1, batch_size):
            drawn = order[first : first + batch_size][own]
            batch = torch.from_numpy(rows[drawn].astype(np.int64))
            if device.type == "cuda":  # the clock runs ahead of queued work by one batch, no more
                batch, before = batch.pin_memory().to(device, non_blocking=True), copied
                copied = torch.cuda.Event()
                copied.record()
                if before:
                    before.synchronize()
            elif device.type != "cpu":
                getattr(torch, device.type).synchronize()
            SPENT.started = SPENT.started or (clock() - seconds, time.monotonic() - seconds)
            SPENT.seconds = clock() - SPENT.started[0]
            SPENT.wall_seconds = time.monotonic() - SPENT.started[1]
            spent = SPENT.tokens if scale.clock == "tokens" else SPENT.seconds
            if spent >= scale.budget:
                return
            batch = batch.to(device)
            SPENT.tokens += a_batch
            yield batch[:, :-1], batch[:, 1:], spent / scale.budget


# ---------------------------------------------------------------------------
# The metric, and the end of train.py
# ---------------------------------------------------------------------------


def rows_per_query(scale: Scale) -> int:
    return max(1, min(32, QUERY_BYTES // (4 * scale.sequence_len * scale.vocab_size)))


def token_losses(logits: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Loss in nats of each target (B, T), float32 on the CPU. Raises Crash for no proper logits."""
    import torch

    shape = (*targets.shape, vocab_size)
    if tuple(logits.shape) != shape:
        raise Crash(f"logits of shape {tuple(logits.shape)}, not {shape}")
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    losses = -log_probs.gather(-1, targets.to(logits.device).unsqueeze(-1)).squeeze(-1).cpu()
    if not torch.isfinite(losses).all():
        raise Crash("logits are not finite")
    return losses


def answers(
    logits_of: LogitsOf, rows: np.ndarray, targets: np.ndarray, scale: Scale
) -> torch.Tensor:
    """Losses (N, T) of targets (N, T) after the tokens of rows (N, T + 1), a query at a time."""
    import numpy as np
    import torch

    size, losses = rows_per_query(scale), []
    for first in range(0, len(rows), size):
        x, y = (torch.from_numpy(part[first : first + size].astype(np.int64))
                for part in (rows[:, :-1], targets))
        losses.append(token_losses(logits_of(x), y, scale.vocab_size))
    return torch.cat(losses)


def bits_per_byte(losses: torch.Tensor, rows: np.ndarray, bytes_of: list[int]) -> float:
    """Summed losses (N, T) / (ln 2 * bytes of the targets); BOS counts in neither sum."""
    import numpy as np
    import torch

    sizes = torch.from_numpy(np.array(bytes_of)[rows[:, 1:]])
    return losses[sizes > 0].double().sum().item() / (math.log(2) * int(sizes.sum()))


def evaluate(logits_of: LogitsOf, folder: Path, split: str, scale: Scale) -> float:
    """Bits per byte of a split, in this process.

    `logits_of` answers tokens (B, T) int64 with logits (B, T, V).
    Raises Crash for logits of another shape or that are not finite.
    """
    rows = load_rows(folder, split, scale.sequence_len)
    losses = answers(logits_of, rows, rows[:, 1:], scale)
    return bits_per_byte(losses, rows, load_tokenizer(folder)[1])


def summary(result: dict[str, Any]) -> str:
    """The block that greps in this field expect."""
    forms = {"val_bpb": ".6f", "training_seconds": ".1f", "total_seconds": ".1f",
             "peak_vram_mb": ".1f", "mfu_percent": ".2f", "total_tokens_M": ".2f",
             "num_steps": ".0f", "num_params_M": ".2f", "depth": ".0f"}
    return "\n".join(["---", *(f"{k + ':':<18}{result[k]:{form}}" for k, form in forms.items())])


def finish(
    model: torch.nn.Module, *, num_steps: int, depth: int, mfu_percent: float = 0.0
) -> None:
    """End train.py: score the trained model here, or serve the referee behind the pipe.

    `model(tokens (B, T) int64)` returns logits (B, T, V). Of several ranks the first does it.
    """
    import torch

    if ranks()[0]:
        return

    scale, device = current_scale(), next(model.parameters()).device
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB, on a Mac bytes
    vram = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0
    torch.cuda.empty_cache()  # the referee does its arithmetic on the same card
    claims = {
        "peak_vram_mb": vram or rss / (2**20 if sys.platform == "darwin" else 2**10),
        "mfu_percent": mfu_percent,
        "total_tokens_M": SPENT.tokens / 1e6,
        "num_steps": num_steps,
        "num_params_M": sum(p.numel() for p in model.parameters()) / 1e6,
        "depth": depth,
        "draws": SPENT.draws,
    }
    model.eval()
    if "torch._dynamo" in sys.modules:  # compiling anew for these shapes would count as training
        torch.compiler.set_stance("force_eager")
    torch.set_num_threads(os.cpu_count() or 1)  # the clock has stopped

    @torch.no_grad()
    def logits_of(tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens.to(device))

    if link := referee_link():
        return answer_queries(link, logits_of, scale, claims)
    claims["training_seconds"] = SPENT.seconds
    claims["val_bpb"] = evaluate(logits_of, rows_folder(scale)[0], "val", scale)
    print(summary({**claims, "total_seconds": time.monotonic() - IMPORTED}))
    if scale.name == "gpt2":
        word = "reached" if claims["val_bpb"] <= RECORD else "missed"
        print(f"target_bpb:       {RECORD:.6f} {word}, in {SPENT.wall_seconds / 3600:.3f} hours")


def exchange(memory: int, scale: Scale) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Views of the memory behind a file descriptor: claims, tokens (B, T), logits (B, T, V)."""
    import numpy as np

    B, T, V = rows_per_query(scale), scale.sequence_len, scale.vocab_size
    size = 4096 + 4 * B * T * (1 + V)
    if os.fstat(memory).st_size < size:
        os.ftruncate(memory, size)
    view = mmap.mmap(memory, size)
    tokens = np.frombuffer(view, np.int32, B * T, 4096).reshape(B, T)
    logits = np.frombuffer(view, np.float32, B * T * V, 4096 + 4 * B * T).reshape(B, T, V)
    return np.frombuffer(view, np.float64, len(CLAIMS)), tokens, logits


def pin(array: np.ndarray) -> None:
    """Let a GPU copy straight to and from this memory, where there is one that can."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.cudart().cudaHostRegister(array.ctypes.data, array.nbytes, 0)


def answer_queries(
    link: socket.socket, logits_of: LogitsOf, scale: Scale, own_claims: dict[str, float]
) -> None:
    """Serve the referee until it hangs up: a frame asks for n rows, the same frame answers."""
    import numpy as np
    import torch

    claims, tokens, logits = exchange(int(os.environ["AUTORESEARCH_REFEREE"].split(",")[1]), scale)
    claims[:] = [own_claims[name] for name in CLAIMS]
    pin(logits)
    link.sendall(READY)
    while frame := link.recv(4):
        (n,) = struct.unpack("<I", frame)
        said = logits_of(torch.from_numpy(tokens[:n].astype(np.int64)))
        if tuple(said.shape) != logits[:n].shape:
            raise Crash(f"logits of shape {tuple(said.shape)}, not {logits[:n].shape}")
        torch.from_numpy(logits[:n]).copy_(said)
        link.sendall(frame)


# ---------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------


def main() -> None:
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--corpus", metavar="PATH", help="text, JSONL or Parquet (column `text`)")
    args = parser.parse_args()
    sys.path.append(str(Path(__file__).resolve().parent))  # which python -I leaves out
    from pretokenize import ensure_rows  # which imports this file

    try:
        scale = current_scale()
        folder = ensure_rows(scale, args.corpus)
    except OSError as error:
        raise SetupError(str(error), "AUTORESEARCH_CACHE=/path python agent.py; df -h") from error
    except KeyboardInterrupt:
        sys.exit(130)
    manifest, kinds = (folder / "manifest.json").read_bytes(), []
    if scale.name != "cpu":  # which trains on no GPU, and need not wait for torch
        import torch

        cards = range(torch.cuda.device_count())
        kinds = [torch.cuda.get_device_properties(index) for index in cards]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = dataclasses.asdict(scale) | {
        "device": kinds[0].name if kinds else f"CPU, {os.cpu_count()} cores",
        "rows": str(folder),
        "source": json.loads(manifest)["source"],
        "tokens": json.loads(manifest)["tokens"],
        "manifest": hashlib.sha256(manifest).hexdigest()[:16],
        "referee": trusted_hash(),
        "gpus": [[f"GPU-{kind.uuid}", kind.name] for kind in kinds],
        "device_gb": (kinds[0].total_memory if kinds else memory) / 2**30,
    }
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
