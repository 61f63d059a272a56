"""What a test asks of a checkout after agent.py has run: its errors, its rows, its commits."""

import json
import subprocess

from support.checkout import Checkout


def one_error(done: subprocess.CompletedProcess) -> str:
    """Return the error of a program that ended with its two lines, and without a traceback."""
    lines = done.stderr.strip().splitlines()
    assert "Traceback" not in done.stderr and lines[-2].startswith("error: "), done.stderr
    return lines[-2].removeprefix("error: ")


def statuses(checkout: Checkout) -> list[str]:
    """Return the column `status` of results.tsv."""
    return [row["status"] for row in checkout.rows()]


def numbers_tried(checkout: Checkout) -> list[int]:
    """Return the experiments of results.tsv in order of number, without repeated measurements."""
    rows = [row for row in checkout.rows() if row["status"] != "measure"]
    return sorted(int(row["experiment"]) for row in rows)


def trailers(checkout: Checkout, ref: str) -> dict:
    """Return the trailers of a ref's commit by name, with their values read as JSON."""
    text = checkout.git("log", "-1", "--format=%B", ref)
    lines = (line.partition(": ") for line in text.split("\n\n")[-1].splitlines())
    return {name: json.loads(value) for name, _, value in lines}


def assert_each_keep_sits_on_what_it_was_measured_against(checkout: Checkout) -> None:
    """Check, in the order of verdicts, that the parent of a keep is the keep before it."""
    refs = checkout.refs() + checkout.refs("refs/autoresearch-measure/t/0")
    known = {ref: trailers(checkout, ref) for ref in refs}
    tip = checkout.git("rev-parse", "main")
    for ref in sorted(refs, key=lambda ref: known[ref]["Order"])[1:]:
        commit, parent = checkout.git("rev-parse", ref, f"{ref}^").split()
        if known[ref]["Status"] == "keep":
            assert parent == tip, ref
            tip = commit
    assert tip == checkout.git("rev-parse", "autoresearch/t")
    assert checkout.git("fsck", "--no-dangling") == ""
    numbers = numbers_tried(checkout)
    assert len(set(numbers)) == len(numbers)
