"""The full run: the ranks of torchrun, and a state on disk to go on from.

train.py takes this only when a person starts it. In an experiment there is one rank, and a cage.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from prepare import current_scale, ranks, run_seed

CHECKPOINT_SHARE = 0.02  # of the budget, from one to the next


def join(device: torch.device) -> torch.device:
    """This rank's own device, once it can talk to the other ranks. The first one speaks for all."""
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        torch._dynamo.config.optimize_ddp = False  # which takes no FlexAttention
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if ranks()[0]:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return device


def divided(
    groups: list[dict[str, Any]], kind: type[torch.optim.Optimizer]
) -> torch.optim.Optimizer:
    """An optimizer of which each rank steps some of the parameters, and sends them to the rest."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(groups, kind)


def checkpoints(
    code: str, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]
) -> Checkpoints | None:
    """Where this run's state is kept: in AUTORESEARCH_CHECKPOINTS, else at the scale gpt2 in
    runs/checkpoints, and there in a folder of its code, seed, budget and number of ranks."""
    scale = current_scale()
    default = "runs/checkpoints" if scale.name == "gpt2" else ""
    root = os.environ.get("AUTORESEARCH_CHECKPOINTS", default)
    settings = f"{Path(code).read_text(encoding='utf-8')} {scale} {run_seed()} {ranks()[1]}"
    folder = Path(root) / hashlib.sha256(settings.encode()).hexdigest()[:12]
    return Checkpoints(folder, model, optimizers) if root else None


class Checkpoints:
    """The state of a run on disk, a file for each rank. `optimizers` hold this rank's state."""

    def __init__(
        self, folder: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]
    ):
        self.folder, self.model, self.optimizers = folder, model, optimizers
        self.rank, self.count = ranks()
        self.last = -1.0  # share of the budget that was spent then

    def due(self, progress: float) -> bool:
        """Whether it is time for one; the first call starts to count."""
        self.last = progress if self.last < 0 else self.last
        return progress >= self.last + CHECKPOINT_SHARE

    def save(self, counted: dict[str, Any]) -> None:
        """Write a checkpoint beside the last one, which goes when all of the new one is there."""
        self.last = -1.0
        folder = self.folder / f"step-{counted['step']}"
        folder.mkdir(parents=True, exist_ok=True)
        state = counted | {"optimizers": [each.state_dict() for each in self.optimizers]}
        if self.rank == 0:
            state["model"] = self.model.state_dict()
        with open(folder / f"rank-{self.rank}.pt", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        self.wait()
        if self.rank == 0:
            with open(self.folder / "last.new", "w") as file:
                file.write(folder.name)
                file.flush()
                os.fsync(file.fileno())
            (self.folder / "last.new").replace(self.folder / "last")
            for old in set(self.folder.glob("step-*")) - {folder}:
                shutil.rmtree(old)
        self.wait()

    def load(self) -> dict[str, Any]:
        """What was counted at the last checkpoint, whose state is taken on; {} without one."""
        if not (self.folder / "last").exists():
            return {}
        folder = self.folder / (self.folder / "last").read_text()
        device = next(self.model.parameters()).device
        self.model.load_state_dict(torch.load(folder / "rank-0.pt", device)["model"])
        state = torch.load(folder / f"rank-{self.rank}.pt", device)
        for optimizer, found in zip(self.optimizers, state.pop("optimizers"), strict=True):
            optimizer.load_state_dict(found)
        print(f"goes on at step {state['step']}, {state['tokens']:,} tokens, from {folder}")
        return state

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()
