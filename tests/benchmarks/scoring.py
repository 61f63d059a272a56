"""What the cage and the probe cost: real train.py at the scale `cpu`, trained for a few steps.

python tests/benchmarks/scoring.py             # 5 rounds
python tests/benchmarks/scoring.py --rounds 9 --means landlock
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"AUTORESEARCH_SCALE": "cpu", "AUTORESEARCH_BUDGET_TOKENS": "40960"}

import prepare  # noqa: E402
import pretokenize  # noqa: E402
import referee  # noqa: E402


def seconds(action) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def in_turn(rounds: int, **actions) -> dict[str, list[float]]:
    """Seconds of each action, taken in turn, so that the machine's moods meet all alike."""
    taken = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            taken[name].append(seconds(action))
    return taken


def show(taken: dict[str, list[float]]) -> None:
    for name, values in taken.items():
        spread = f"{min(values):.3f} to {max(values):.3f}"
        print(f"  {name:34}{statistics.median(values):8.3f}  ({spread})")


def main() -> None:
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--means", default="")
    args = parser.parse_args()
    scale = prepare.current_scale()
    rows = pretokenize.ensure_rows(scale, None)
    os.environ["AUTORESEARCH_ROWS"] = str(rows)
    read, _ = os.pipe()
    sys.stdin = os.fdopen(read)  # its end would tell the referee that nobody waits
    bytes_of = prepare.load_tokenizer(rows)[1]
    val = prepare.load_rows(rows, "val", scale.sequence_len)
    reserve = prepare.load_rows(rows, "hidden", scale.sequence_len)[:: 2 * referee.RESERVE]
    python = [sys.executable, "-c", "import torch"]
    with tempfile.TemporaryDirectory() as folder:
        cage = [sys.executable, "-I", ROOT / "warden.py", "--means", args.means]
        cage += ["--folder", folder, "--log", f"{folder}/log", "--", *python]
        open_stdin = {"stdin": subprocess.PIPE, "check": True}

        def caged() -> None:
            with subprocess.Popen(list(map(str, cage)), stdin=subprocess.PIPE) as warden:
                assert warden.wait() == 0

        bare = in_turn(args.rounds, bare=lambda: subprocess.run(python, **open_stdin), caged=caged)
        print(f"seconds to start Python, import torch and end; {args.rounds} rounds")
        show(bare)
        cost = statistics.median(bare["caged"]) - statistics.median(bare["bare"])
        print(f"  the cage: {cost:.3f} s a run")

        source, more = (ROOT / "train.py").read_bytes(), ["--means", args.means]
        early = referee.early_environment(source)
        confined = referee.Confined(Path(folder), scale, rows, early, more)
        try:
            confined.begin(source, 0, Path(folder) / "run.log")
            confined.train(scale, 600, 600, 600)
            taken = in_turn(
                args.rounds,
                plain=lambda: prepare.answers(confined.logits_of, val, val[:, 1:], scale),
                probed=lambda: referee.examine(confined.logits_of, val, reserve, bytes_of, scale),
            )
        finally:
            confined.end()
    print(f"seconds to score {scale.eval_tokens:,} tokens, transport included")
    show(taken)
    ratio = statistics.median(taken["probed"]) / statistics.median(taken["plain"])
    print(f"  the probe: {100 * (ratio - 1):.1f} % more")


if __name__ == "__main__":
    main()
