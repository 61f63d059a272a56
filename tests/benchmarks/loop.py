"""Where the seconds of a night go, and what thinking ahead is worth: the real agent and train.py.

python tests/benchmarks/loop.py                          # a scripted model with 5 s a reply
python tests/benchmarks/loop.py --reply 15 --budget 20   # with and without thinking ahead
python tests/benchmarks/loop.py --slots 2 --budget 20    # and two at a time
python tests/benchmarks/loop.py --alone --report a.json  # for simulate_slots.py
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from support.api_server import ApiServer, proposal  # noqa: E402

# agent.py with the times of its runs, each by the thread of its slot, on the last line of stdout.
TIMED = """\
import json, os, sys, threading, time
sys.path.insert(0, os.getcwd())
import agent, researcher
researcher.Claude.ahead = sys.argv.pop(1) == "True"
inner, times = agent.train_once, []

def train_once(run, task, count, *rest):
    started = time.monotonic()
    result = inner(run, task, count, *rest)
    times.append((task.done.number, started, time.monotonic(), result | {"count": count}))
    return result

agent.train_once = train_once
agent.main()
print(json.dumps(times))
"""


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


def answer(number: int, seconds: float):
    """A reply that comes after so many seconds; its edit changes next to nothing."""

    def reply(request):
        time.sleep(seconds)
        return proposal("INIT_SCALE = ", f"INIT_SCALE = 1e-{number + 5} + ", f"idea {number}")

    return reply


def spend_night(args: argparse.Namespace, ahead: bool, slots: int) -> list[tuple]:
    """(number, start, end, result) of each run, the baseline's included."""
    server = ApiServer(*(answer(n, args.reply) for n in range(args.experiments + slots)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkout"
        folder.mkdir()
        clone(folder)
        command = [sys.executable, "-c", TIMED, str(ahead), "--tag", "t", "--slots", str(slots)]
        command += ["--budget", args.budget, "--experiments", str(args.experiments)]
        done = subprocess.run(
            command, cwd=folder, env=os.environ | {"AUTORESEARCH_SCALE": "cpu"} | server.env,
            stdout=subprocess.PIPE, encoding="utf-8",
        )  # fmt: skip
    server.shutdown()
    runs = [tuple(run) for run in json.loads(done.stdout.splitlines()[-1])]
    if args.report:
        facts = {"slots": slots, "budget": float(args.budget), "reply": args.reply,
                 "experiments": args.experiments, "runs": runs}  # fmt: skip
        args.report.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return runs


def tell(
    title: str, runs: list[tuple], args: argparse.Namespace, slots: int
) -> tuple[float, float]:
    """Print where the slots' seconds went after the baseline; (experiments, runs) an hour."""
    runs = [run for run in runs if run[0] and run[3]["status"] == "ok"]
    first, last = min(run[1] for run in runs), max(run[2] for run in runs)
    whole, n = slots * (last - first), len(runs)
    spent = {"training": sum(run[3]["training_wall_seconds"] for run in runs),
             "evaluation": sum(run[3]["evaluation_seconds"] for run in runs),
             "start": sum(run[3]["start_wall_seconds"] for run in runs)}  # fmt: skip
    inside = sum(run[2] - run[1] for run in runs)
    spent["end of a run"] = inside - sum(spent.values())
    spent["between runs"] = whole - inside
    rates = 3600 * args.experiments / (last - first), 3600 * n / (last - first)
    print(f"\n{title}: {args.experiments} experiments, {n} runs; {rates[0]:.0f} and {rates[1]:.0f} "
          "an hour")
    for name, seconds in spent.items():
        print(f"  {name:14}{seconds / n:8.2f} s a run {100 * seconds / whole:6.1f} %")
    rest = (whole - spent["training"]) / n
    print(f"  so at a budget of 300 s {100 * 300 / (300 + rest):.1f} % would be training")
    return rates


def main() -> None:
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--budget", default="5", help="CPU seconds of training")
    parser.add_argument("--experiments", type=int, default=4)
    parser.add_argument("--reply", type=float, default=5.0, help="seconds of the scripted model")
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--alone", action="store_true", help="nothing to compare with")
    parser.add_argument("--report", type=Path, help="write the night's runs, with --alone")
    args = parser.parse_args()
    if args.report and not args.alone:
        parser.error("--report is of one night: add --alone")
    ahead = tell("thinking ahead", spend_night(args, True, args.slots), args, args.slots)
    if args.alone:
        return
    if args.slots > 1:
        other = tell("one slot", spend_night(args, True, 1), args, 1)
    else:
        other = tell("asked when a slot is free", spend_night(args, False, 1), args, 1)
    print(f"\nratio of experiments an hour: {ahead[0] / other[0]:.2f}, of runs, which repeats by "
          f"chance do not blur: {ahead[1] / other[1]:.2f}")


if __name__ == "__main__":
    main()
