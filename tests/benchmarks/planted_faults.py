"""Plant a fault in the product, run the test that must notice it, and print the table.

python tests/benchmarks/planted_faults.py             # all of them, some minutes
python tests/benchmarks/planted_faults.py seed limit  # those whose name has one of these words

A gate that is always green proves nothing. Each row is one guarantee: the fault takes it away in a
copy of the checkout, and the test named beside it must pass without the fault and fail with it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent


class Fault(NamedTuple):
    """What is exchanged in which file, and the test that must fail for it."""

    name: str
    file: str
    search: str
    replace: str
    test: str


FAULTS: list[Fault] = []  # filled in below


def copy(folder: Path) -> Path:
    """Copy the files that git knows or does not ignore, as they are in the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8", check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def run(folder: Path, test: str) -> tuple[bool, str]:
    """Run one test in a copy: whether it passed, and the last line that pytest printed."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-m", "", "--no-header", test]
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    if done.returncode not in (0, 1):  # no such test, or a tree that cannot be imported
        raise SystemExit(f"error: {test} was not run\n{done.stdout[-2000:]}")
    return done.returncode == 0, done.stdout.strip().splitlines()[-1]


def main() -> int:
    words, missed = sys.argv[1:], 0
    with tempfile.TemporaryDirectory(prefix="planted-") as temporary:
        os.environ.setdefault("AUTORESEARCH_TEST_CACHE", f"{temporary}/cache")
        for fault in FAULTS:
            if words and not any(word in fault.name for word in words):
                continue
            began, folder = time.monotonic(), copy(Path(tempfile.mkdtemp(dir=temporary)))
            sound, said = run(folder, fault.test)
            path = folder / fault.file
            text = path.read_text(encoding="utf-8")
            if text.count(fault.search) != 1:
                raise SystemExit(f"error: {fault.file} has {fault.search!r} not exactly once")
            path.write_text(text.replace(fault.search, fault.replace), encoding="utf-8")
            noticed = not run(folder, fault.test)[0]
            missed += not (sound and noticed)
            verdict = "red" if sound and noticed else f"MISSED ({said})"
            print(f"| {fault.name} | {fault.test.removeprefix('tests/')} | {verdict} | "
                  f"{time.monotonic() - began:.0f} |", flush=True)  # fmt: skip
            shutil.rmtree(folder)
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main())
