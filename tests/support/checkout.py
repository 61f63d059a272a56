"""A checkout in a temporary folder: the real program, with a contest that takes a second."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = ("agent.py", "cluster.py", "digest.py", "full.py", "journal.py", "pretokenize.py",
           "promote.py", "proposals.py", "report.py", "researcher.py", "rule.py",
           "slots.py")  # fmt: skip
TRUSTED = ("prepare.py", "referee.py", "warden.py")
TINY = 'Scale("cpu", "stdlib", 512, 32, "cpu", 60, 8192, 0, 0.002)'

# A unigram model: counts tokens, answers SHARPNESS * log(count). Its best SHARPNESS is 1.
TOY = """\
import torch

from prepare import batches, current_scale, finish, run_seed

SHARPNESS = 0.5
PASSES = 4
SCALE = current_scale()


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.counts = torch.nn.Parameter(torch.ones(SCALE.vocab_size))

    def forward(self, tokens):
        return (SHARPNESS * self.counts.log()).expand(*tokens.shape, -1)


def main():
    torch.manual_seed(run_seed())
    model, steps = Toy(), 0
    for x, y, progress in batches(8, torch.device("cpu")):
        model.counts.data += torch.bincount(y.flatten(), minlength=SCALE.vocab_size)
        steps += 1
        print(f"step {steps} ({100 * progress:.0f}%)")
    finish(model, num_steps=steps, depth=1)


main()
"""


def late(statement):
    """In the place of `steps += 1`: what is not seen in the first two steps of the toy."""
    return f"steps += 1\n        if steps > 5:\n            {statement}"


def sh(*command, cwd, env=None, timeout=120, **more):
    """Run a command to its end; its output as text."""
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=env,
        timeout=timeout,
        capture_output=True,
        encoding="utf-8",
        **more,
    )


class Checkout:
    """A git repository with the product in it, and the environment to run it."""

    def __init__(self, folder: Path, cache: Path, baseline_runs: int = 1):
        self.folder = folder
        folder.mkdir()
        for name in (*PROGRAM, *TRUSTED, "program.md", ".gitignore"):
            shutil.copy(ROOT / name, folder)
        self.exchange("prepare.py", r'Scale\("cpu", .*?\)', TINY)
        self.exchange("prepare.py", "import torch._dynamo  #", "import torch  #")  # TOY needs none
        self.exchange("agent.py", r"\nBASELINE_RUNS = 3", f"\nBASELINE_RUNS = {baseline_runs}")
        self.exchange("journal.py", "\nSLOWER = 0.10", "\nSLOWER = 0.99")  # milliseconds vary
        self.exchange("slots.py", "\nSCREEN_TOKENS, SCREEN_SECONDS = 4300",
                      "\nSCREEN_TOKENS, SCREEN_SECONDS = 270")  # fmt: skip
        self.write_train(TOY)
        kept = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("ANTHROPIC", "AUTORESEARCH", "GIT_"))
        }
        self.env = kept | {
            "AUTORESEARCH_CACHE": str(cache),
            "AUTORESEARCH_SCALE": "cpu",
            "AUTORESEARCH_BUDGET_TOKENS": "8192",
            "GIT_CONFIG_GLOBAL": "/dev/null",
        }
        self.git("init", "-q", "-b", "main")
        self.commit_all()

    def exchange(self, name, pattern, new):
        """Put other text in the one place of a file that matches."""
        path = self.folder / name
        text, found = re.subn(pattern, new, path.read_text(encoding="utf-8"))
        assert found == 1, pattern
        path.write_text(text, encoding="utf-8")

    def git(self, *arguments, check=True, date=False):
        identity = ["-c", "user.name=a person", "-c", "user.email=person@example.com"]
        dates = {f"GIT_{who}_DATE": "2026-01-01T00:00:00Z" for who in ("AUTHOR", "COMMITTER")}
        env = self.env | (dates if date else {})
        done = sh("git", *identity, *arguments, cwd=self.folder, env=env)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout.strip()

    def commit_all(self):
        self.git("add", "-A")  # seeds follow from the commit: with one date it is the same always
        self.git("commit", "-q", "-m", "start", date=True)

    def write_train(self, text):
        (self.folder / "train.py").write_text(text, encoding="utf-8")

    def patch(self, name, old, new, base=TOY):
        """A patch file beside the checkout, as a whole train.py."""
        assert old in base
        path = self.folder.parent / name
        path.write_text(base.replace(old, new), encoding="utf-8")
        return path

    def agent(self, *arguments, env=None, timeout=300):
        return sh(
            sys.executable,
            "agent.py",
            *arguments,
            cwd=self.folder,
            env=self.env | (env or {}),
            timeout=timeout,
        )

    def rows(self):
        lines = (self.folder / "results.tsv").read_text(encoding="utf-8").splitlines()
        return [
            dict(zip(lines[0].split("\t"), line.split("\t"), strict=True)) for line in lines[1:]
        ]

    def refs(self, prefix="refs/autoresearch/"):
        return self.git("for-each-ref", "--format=%(refname)", prefix).split()
