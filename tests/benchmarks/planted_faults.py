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


FAULTS = [
    Fault("the probe compares no pairs", "referee.py",
          "    check_pairs(of_rows[paired], of_paired, cuts[len(sealed) :])\n", "",
          "tests/test_red_team.py::test_bent_answers_are_rejected_with_the_name_of_the_bend"),
    Fault("the probe believes what was not shown", "referee.py",
          "    check_seals(of_rows, of_sealed, seal_cuts)\n", "",
          "tests/test_probe.py::test_a_cheat_is_missed_no_more_often_than_was_measured"),
    Fault("logits that are not finite count", "prepare.py",
          "if not torch.isfinite(losses).all():", "if False:",
          "tests/test_prepare.py::test_logits_that_are_none_are_a_crash"),
    Fault("a crash tells what it saw", "referee.py",
          "if self.shown else last", "if False else last",
          "tests/test_hostile_input.py"
          "::test_once_it_has_seen_held_out_rows_a_crash_tells_its_class_alone"),
    Fault("a program that measures is not trusted", "prepare.py",
          'TRUSTED = ("prepare.py", "referee.py", "warden.py")',
          'TRUSTED = ("prepare.py", "warden.py")',
          "tests/test_red_team.py::test_every_program_that_measures_is_in_the_hash_of_what_is_trusted"),
    Fault("the seed does not reach the run", "slots.py", '"--seed", task.seed]', '"--seed", 1]',
          "tests/test_slots.py::test_the_baseline_is_run_as_often_on_every_slot"),
    Fault("the repository is not synced", "journal.py",
          "elif ctypes.CDLL(None, use_errno=True).syncfs(folder):", "elif False:",
          "tests/test_journal.py"
          "::test_sync_has_the_kernel_write_the_file_system_of_the_repository"),
    Fault("the ref is named before its commit is synced", "agent.py",
          "    patiently(sync_git)  # what is named must be there\n", "",
          "tests/test_journal.py"
          "::test_a_commit_is_on_disk_before_a_ref_names_it_and_the_ref_before_its_row"),
    Fault("the branch moves without compare-and-swap", "journal.py",
          "{old or '0' * len(new)}", "",
          "tests/test_journal.py::test_refs_move_all_or_none_and_only_from_what_they_were"),
    Fault("--experiments is no limit", "agent.py",
          "if most is not None and len(self.run.experiments()) >= most:", "if False:",
          "tests/test_faults.py::test_the_reason_of_every_end_is_in_the_log"),
    Fault("--usd is no limit", "researcher.py",
          'self.args.usd is not None and not self.run.spent["cost_usd"] < self.args.usd:', "False:",
          "tests/test_api_faults.py::test_a_cap_in_dollars_holds_over_restarts"),
    Fault("the key is in the environment of what measures", "slots.py",
          'if PASSED_ON.fullmatch(k) or k == "HOME"}', "if True}",
          "tests/test_session.py::test_what_measures_has_no_key_in_its_environment"),
    Fault("one lower number is a keep", "rule.py", "AT_ONCE = 3.4 ", "AT_ONCE = 0.0 ",
          "tests/test_rule.py::test_gain_of_over_three_standard_errors_is_kept_at_once"),
    Fault("the hidden split has no say", "rule.py",
          "if hidden_gain is not None and", "if False and",
          "tests/test_red_team.py::test_half_of_a_gain_and_three_sigma_must_show_on_hidden"),
    Fault("a SEARCH that matches twice is made", "proposals.py", "if len(found) > 1:",
          "if len(found) > 9:", "tests/test_proposals.py::test_edits_are_all_made_or_none"),
    Fault("sockets are allowed in the sandbox", "warden.py", "socket 41 198, connect 42 203, ", "",
          "tests/test_warden.py::test_no_socket_reaches_anybody"),
    Fault("a killed run's processes live on", "slots.py",
          "os.killpg(found[\"pid\"], signal.SIGKILL)  #", "pass  #",
          "tests/test_session.py"
          "::test_what_a_killed_session_left_alive_is_ended_before_the_next_one_begins"),
]  # fmt: skip


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
