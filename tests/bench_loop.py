"""Where the seconds of an experiment go: real agent, real train.py, sampler, a short budget.

python tests/bench_loop.py                 # 4 experiments of 5 CPU seconds
python tests/bench_loop.py --budget 60
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def clone(folder: Path) -> None:
    """The working tree's own files as a fresh repository."""
    files = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    for name in filter(None, files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
    (folder / "results.tsv").unlink(missing_ok=True)
    identity = ["-c", "user.name=bench", "-c", "user.email=bench@localhost"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "start"]):
        subprocess.run(["git", *command], cwd=folder, check=True)


def timed(module, spent: Counter, name: str) -> None:
    """Wrap a function of a module so that its wall-clock seconds add up under its name."""
    inner = getattr(module, name)

    def outer(*args, **more):
        started = time.perf_counter()
        try:
            return inner(*args, **more)
        finally:
            spent[name] += time.perf_counter() - started
            if name == "baseline":
                spent.clear()

    setattr(module, name, outer)


def main() -> None:
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--budget", default="5")
    parser.add_argument("--experiments", type=int, default=4)
    args = parser.parse_args()
    os.environ["AUTORESEARCH_SCALE"] = "cpu"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkout"
        folder.mkdir()
        clone(folder)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        agent, spent = importlib.import_module("agent"), Counter()
        timed(importlib.import_module("researcher"), spent, "sampler")
        for name in ("record", "train_once", "baseline", "experiment"):
            timed(agent, spent, name)
        sys.argv[1:] = ["--proposer", "sampler", "--budget", args.budget]
        sys.argv += ["--experiments", str(args.experiments)]
        agent.main()
        files = sorted((folder / "runs").glob("*/[1-9]*/result*.json"))
        runs = [run for file in files if (run := json.loads(file.read_text()))["status"] == "ok"]
        os.chdir(ROOT)

    def each(key: str) -> float:
        return sum(run[key] for run in runs) / args.experiments

    seconds = {
        "proposal": spent["sampler"] / args.experiments,
        "start": each("start_wall_seconds"),
        "training": each("training_wall_seconds"),
        "evaluation": each("evaluation_seconds"),
    }
    seconds["end of a run"] = spent["train_once"] / args.experiments - sum(
        list(seconds.values())[1:]
    )
    seconds["git and row"] = spent["record"] / args.experiments
    seconds["judging and the rest"] = spent["experiment"] / args.experiments - sum(seconds.values())
    print(f"\nseconds per experiment ({args.experiments} experiments, {len(runs)} runs)")
    for name, value in seconds.items():
        print(f"  {name:22}{value:8.2f}")
    work = seconds["training"] + seconds["evaluation"]
    rest = sum(seconds.values()) - work
    print(f"  all but training and evaluation: {rest:.2f}")


if __name__ == "__main__":
    main()
