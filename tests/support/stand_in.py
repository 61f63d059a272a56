"""A stand-in for referee.py that measures nothing and takes a moment, not seconds.

The score is read in train.py itself: 0.1 * (SHARPNESS - 1) ** 2 + 1. Tests that are not about the
referee use it. A run can be held up until the test says so, so that no test has to sleep.
"""

import subprocess
import sys
from pathlib import Path

from support.api_server import proposal
from support.checkout import TOY, Checkout
from support.waiting import wait_until

# STEP is the code that stands for training; MORE is the code that a test adds before the result is
# written. Both know `args`, `words`, `source`, `value` and `here`, the folder of this file.
STAND_IN = """\
import argparse, json, os, re, sys, threading, time
words = json.loads(sys.stdin.readline() or "0") if "--wait" in sys.argv else sys.argv[1:]
if not words:
    sys.exit(130)
# Whoever started this process holds its stdin open: when that ends, so does this process.
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(130)), daemon=True).start()
here = os.path.dirname(__file__)

def hold():
    while not os.path.exists(here + "/go"):
        time.sleep(0.02)

parser = argparse.ArgumentParser()
parser.add_argument("folder")
for name in ("run", "seed"):
    parser.add_argument("--" + name, default="1")
args, _ = parser.parse_known_args(words)
if os.path.exists(here + "/broken"):
    sys.exit("error: broken\\nhint: mend it")
source, suffix = open(args.folder + "/train.py").read(), f"-{args.run}" if args.run != "1" else ""
value = float(re.search(r"SHARPNESS = (.*)", source)[1])
open(f"{args.folder}/run{suffix}.log", "w").write("step 1\\n")
if "--screen" not in words:
    STEP
print("trained", flush=True)
result = {"status": "ok", "reason": "", "seed": int(args.seed)}
result["val_bpb"] = 0.1 * (value - 1) ** 2 + 1
result |= dict.fromkeys(("start_seconds", "start_wall_seconds", "answers_seconds"), 0.1)
result |= dict.fromkeys(("training_seconds", "training_wall_seconds", "total_seconds"), 1.0)
result |= dict.fromkeys(("peak_vram_mb", "total_tokens_M", "num_steps"), 1.0)
path = f"{args.folder}/result{suffix}.json"
MORE
with open(path + ".part", "w") as file:
    json.dump(result, file)
os.replace(path + ".part", path)
"""


def stand_in(checkout: Checkout, step: str = "pass", more: str = "") -> None:
    """Put the stand-in in the place of the referee.

    `step` stands for training: "hold()" waits until `let_go` is called, "value == 0.6 and hold()"
    does so for one edit. `more` are lines that see or change `result` before it is written.
    """
    text = STAND_IN.replace("STEP", step).replace("MORE\n", more and more.rstrip("\n") + "\n")
    (checkout.folder / "referee.py").write_text(text, encoding="utf-8")
    checkout.commit_all()


def without_self_test(checkout: Checkout) -> None:
    """Have agent.py and promote start as with --unconfined: a stand-in confines nothing.

    The self-test of the sandbox is a third of the CPU seconds that a start takes.
    """
    for name in ("agent.py", "promote.py"):
        checkout.exchange(name, r'"--unconfined", action="store_true"',
                          '"--unconfined", action="store_false"')  # fmt: skip
    checkout.commit_all()


def let_go(checkout: Checkout) -> None:
    """Let all runs of the stand-in go on that wait in `hold()`, and all later ones."""
    (checkout.folder / "go").touch()


def sharpness(checkout: Checkout, *values: float | str, base: str = TOY) -> list[Path]:
    """Write patches that set the toy's constant, one for each value; returns their paths."""
    return [checkout.patch(f"{v}.py", "SHARPNESS = 0.5", f"SHARPNESS = {v}", base) for v in values]


def idea(value: float) -> dict:
    """Return a reply of the language model that sets the toy's constant."""
    return proposal("SHARPNESS = 0.5", f"SHARPNESS = {value}", f"to {value}")


def start_agent(checkout: Checkout, *arguments: object, env: dict | None = None, **more):
    """Start agent.py on tag t and return the process; its stderr is a pipe of text."""
    command = [sys.executable, "agent.py", "--tag", "t", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=checkout.folder, env=checkout.env | (env or {}),
        stderr=subprocess.PIPE, encoding="utf-8", **more,
    )  # fmt: skip


def while_training(checkout: Checkout, number: int, *arguments: object, env: dict | None = None):
    """Start agent.py and return the process once it trains the named experiment."""
    started = start_agent(checkout, *arguments, env=env)
    wait_until((checkout.folder / f"runs/t/{number}/run.log").exists, started)
    return started


def kill_and_wait(process: subprocess.Popen) -> str:
    """Kill a process as the kernel would; returns what it had said on stderr."""
    process.kill()
    said = process.communicate()[1] or ""
    assert process.returncode == -9, f"it had ended by itself: {said}"
    return said
