"""journal.py: commits and refs that outlast a power cut and a race, in a real repository."""

import json
import os
import sys
from pathlib import Path

import pytest

import journal
from prepare import SetupError
from support.checkout import ROOT, sh
from support.stand_in import sharpness

# agent.py, with the order in which it writes on the last line of stdout.
RECORDER = """
import json, os, sys
sys.argv[0] = "agent.py"
sys.path.insert(0, os.getcwd())
import agent
order = []

def recorded(name, inner):
    def outer(*arguments):
        order.append(name)
        return inner(*arguments)
    return outer

for name in ("write_commit", "sync_git", "move_refs", "append_rows"):
    setattr(agent, name, recorded(name, getattr(agent, name)))
code = agent.main()
print(json.dumps(order))
sys.exit(code)
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """An empty repository that journal.py works in, and the hash of its first commit."""
    monkeypatch.setattr(journal, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    journal.git_folder.cache_clear()
    sh("git", "init", "-q", "-b", "main", cwd=tmp_path)
    tree = journal.git("hash-object", "-w", "-t", "tree", "--stdin", data="").strip()
    commit = journal.git("commit-tree", tree, "-F", "-", data="start").strip()
    journal.git("update-ref", "refs/heads/main", commit)
    yield commit
    journal.git_folder.cache_clear()


def test_a_commit_is_on_disk_before_a_ref_names_it_and_the_ref_before_its_row(quick):
    command = ["--tag", "t", "--patches", *sharpness(quick, 0.6)]
    done = sh(sys.executable, "-c", RECORDER, *command, cwd=quick.folder, env=quick.env)
    assert done.returncode == 0, done.stderr
    written = ["write_commit", "sync_git", "move_refs", "sync_git", "append_rows"]
    order = json.loads(done.stdout.splitlines()[-1])
    begun = [at for at, name in enumerate(order) if name == "write_commit"]
    assert len(begun) == 2  # of the baseline and of the patch
    assert all(order[at : at + len(written)] == written for at in begun), order


def test_sync_has_the_kernel_write_the_file_system_of_the_repository(repository, monkeypatch):
    synced = []

    class Library:
        answer = 0

        def syncfs(self, descriptor):
            synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
            return self.answer

    monkeypatch.setattr(journal.ctypes, "CDLL", lambda *_, **__: Library())
    journal.sync_git()
    assert synced == [journal.ROOT / ".git"]
    Library.answer = -1
    with pytest.raises(OSError):
        journal.sync_git()


def test_git_is_called_so_that_it_syncs_and_runs_no_hook_or_monitor(
    repository, tmp_path, monkeypatch
):
    log = tmp_path / "arguments"
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin/git"
    fake.write_text(f'#!/bin/sh\necho "$@" > {log}\n', encoding="utf-8")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    journal.git("status")
    for setting in ("core.fsync=all", "core.hooksPath=/dev/null", "core.fsmonitor=false"):
        assert f"-c {setting} " in log.read_text(encoding="utf-8")


def test_refs_move_all_or_none_and_only_from_what_they_were(repository):
    one, other = (
        journal.git("commit-tree", f"{repository}^{{tree}}", "-F", "-", data=text).strip()
        for text in ("one", "other")
    )
    branch, ref = "refs/heads/autoresearch/t", "refs/autoresearch/t/1"
    journal.move_refs((branch, repository, None))
    with pytest.raises(SetupError):  # the branch is not where the caller thinks
        journal.move_refs((ref, one, None), (branch, one, other))
    assert journal.resolve(ref) is None and journal.resolve(branch) == repository
    journal.move_refs((ref, one, None), (branch, one, repository))
    assert journal.resolve(ref) == journal.resolve(branch) == one
    with pytest.raises(SetupError):  # a ref that is to be new exists
        journal.move_refs((ref, other, None))
    assert journal.resolve(ref) == one


def test_one_thread_at_a_time_makes_a_syntax_tree(monkeypatch):
    """Two at once ended a run with a SystemError on Python 3.11."""
    held, inner = [], journal.ast.parse
    monkeypatch.setattr(
        journal.ast, "parse", lambda text: held.append(journal.PARSING.locked()) or inner(text)
    )
    assert journal.node_count("x = 1") > 1 and held == [True]
    assert not journal.PARSING.locked()
    with pytest.raises(SyntaxError):
        journal.parse("x = (")
    assert not journal.PARSING.locked()


@pytest.mark.parametrize("name", [
    path.name for path in sorted(ROOT.glob("*.py"))
    if path.name not in ("referee.py", "journal.py")  # the referee has one thread that parses
])  # fmt: skip
def test_no_other_module_makes_a_syntax_tree_by_itself(name):
    assert "ast.parse(" not in (ROOT / name).read_text(encoding="utf-8")
