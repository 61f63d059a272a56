"""Train and score a train.py in the test's own process, by the referee's arithmetic and probe.

The sandbox, the socket and the shared memory are left out, but for `referee_in_process`: they take
seconds and are tested elsewhere. train.py gets a copy of prepare.py, as in the sandbox: what it
does to that copy does not reach the one that scores it.
"""

import fcntl
import importlib.util
import json
import os
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import prepare
import pretokenize
import referee
from prepare import Scale
from support.checkout import ROOT, TINY, Checkout

LogitsOf = Callable[[torch.Tensor], torch.Tensor]  # tokens (B, T) -> logits (B, T, V)
TINY_SCALE: Scale = eval(TINY, {"Scale": Scale})  # the scale of a `Checkout`


def prepared_rows(cache: Path, scale: Scale) -> Path:
    """Return the folder of a scale's rows in a cache; of two workers one makes it."""
    before = os.environ.get("AUTORESEARCH_CACHE")
    os.environ["AUTORESEARCH_CACHE"] = str(cache)
    try:
        with open(cache / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return pretokenize.ensure_rows(scale, None)
    finally:
        os.environ.pop("AUTORESEARCH_CACHE")
        os.environ.update({"AUTORESEARCH_CACHE": before} if before else {})


@contextmanager
def surroundings(scale: Scale, rows: Path, tokens: int) -> Iterator[ModuleType]:
    """Give what runs here its own copy of prepare.py and the environment of a run.

    All is as before afterwards: modules, environment, arguments, torch's random state and threads.
    """
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "prepare.py")
    copy = importlib.util.module_from_spec(spec)
    before = sys.modules["prepare"], os.environ.copy(), sys.argv, sys.path[:]
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    precision = torch.get_float32_matmul_precision()
    full = sys.modules.pop("full", None)  # it takes its functions from the copy
    sys.modules["prepare"] = copy
    os.environ |= {
        "AUTORESEARCH_SCALE": scale.name, "AUTORESEARCH_ROWS": str(rows),
        "AUTORESEARCH_BUDGET_TOKENS": str(tokens), "AUTORESEARCH_SEED": "0",
    }  # fmt: skip
    try:
        spec.loader.exec_module(copy)
        copy.SCALES = (scale,)
        yield copy
    finally:
        sys.modules["prepare"], environment, sys.argv, sys.path = before
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
        torch.set_float32_matmul_precision(precision)
        sys.modules.pop("full", None)
        sys.modules.update({"full": full} if full else {})


def train_in_process(path: Path, scale: Scale, rows: Path, tokens: int) -> LogitsOf:
    """Run a train.py to its call of `finish` and return what answers the referee's queries.

    Raises whatever train.py raises, and AssertionError if it ends without `finish`.
    """
    models: list[torch.nn.Module] = []
    with surroundings(scale, rows, tokens) as copy:
        copy.finish = lambda model, **claims: models.append(model)
        runpy.run_path(str(path), run_name="__main__")
    assert len(models) == 1, f"{path} called finish {len(models)} times"
    model = models[0].eval()

    @torch.no_grad()
    def logits_of(asked: torch.Tensor) -> torch.Tensor:
        answer = model(asked)
        shape = (*asked.shape, scale.vocab_size)
        if tuple(answer.shape) != shape:  # as in the sandbox, before anything is copied
            raise prepare.Crash(f"logits of shape {tuple(answer.shape)}, not {shape}")
        return answer.float()

    return logits_of


def score_in_process(logits_of: LogitsOf, scale: Scale, rows: Path) -> float:
    """Return val_bpb as the referee computes it, with all decoys. Raises prepare.Crash."""
    bytes_of = prepare.load_tokenizer(rows)[1]
    val = prepare.load_rows(rows, "val", scale.sequence_len)
    hidden = prepare.load_rows(rows, "hidden", scale.sequence_len)
    reserve = hidden[:: referee.RESERVE][::2]
    return referee.examine(logits_of, val, reserve, bytes_of, scale)


@contextmanager
def seeded_probe(seed: int) -> Iterator[None]:
    """Have referee.examine draw its decoys by a seed, so that its verdict is always the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(referee, "secrets", SimpleNamespace(randbits=lambda bits: seed))
        yield


def referee_in_process(
    checkout: Checkout, rows: Path, source: str, *words: object, env: dict[str, str],
    **constants: float,
) -> tuple[dict, str]:
    """Have the referee train and score a train.py in the real sandbox; its result.json and run.log.

    The referee itself runs here, which saves the seconds in which a process of its own would load
    torch. `words` and `env` are its command line and environment, `constants` take the place of its
    own. Raises what the referee raises.
    """
    (checkout.folder / "runs").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=checkout.folder / "runs"))
    (folder / "train.py").write_text(source, encoding="utf-8")
    read, write = os.pipe()  # its stdin, which stays open
    env = {"AUTORESEARCH_SCALE": "cpu", "AUTORESEARCH_ROWS": str(rows)} | env
    with open(read) as stdin, open(write, "w"), pytest.MonkeyPatch.context() as patch:
        for name, value in constants.items():
            patch.setattr(referee, name, value)
        patch.setattr(referee, "ROOT", checkout.folder)
        patch.setattr(prepare, "SCALES", (TINY_SCALE,))
        patch.setattr(prepare, "hide_memory", lambda: None)  # the tests read their own /proc
        patch.setattr(sys, "stdin", stdin)
        for name, value in env.items():
            patch.setenv(name, value)
        args = referee.parse([str(folder), *map(str, words)])
        confined = referee.start(args, source.encode())
        wait = confined.warden.wait  # the referee waits for 10 s, which a busy machine may exceed
        patch.setattr(confined.warden, "wait", lambda timeout=None: wait())
        try:
            referee.referee(args, confined)
        finally:
            confined.end()
            confined.link.close()
            os.close(confined.train_rows)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return result, (folder / "run.log").read_text(encoding="utf-8", errors="replace")
