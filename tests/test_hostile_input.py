"""Input from outside that is made to deceive, to leak or to stall: replies, diffs, train.py."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

import journal
import proposals
import researcher
import slots
from support.api_server import proposal
from support.checkout import TOY, sh
from support.checks import one_error, statuses
from support.stand_in import idea

SEEDED = settings(derandomize=True, deadline=None, max_examples=300)

# ---------------------------------------------------------------------------
# Replies of the language model
# ---------------------------------------------------------------------------

LINES = ("<<<<<<< SEARCH", "<<<<< SEARCH ", "=======", "===", ">>>>>>> REPLACE", "text", "")
# The same by a regular expression, whose time grows with the cube of the length.
NOT_A_BEGINNING = r"((?:(?!<{5,9} SEARCH *\n).*\n)*?)"
ORACLE = re.compile(
    rf"^<{{5,9}} SEARCH *\n{NOT_A_BEGINNING}={{5,9}} *\n{NOT_A_BEGINNING}>{{5,9}} REPLACE", re.M
)


@SEEDED
@given(st.lists(st.sampled_from(LINES), max_size=16).map("\n".join))
def test_edits_of_a_reply_in_text_are_what_the_marks_enclose(text):
    edits, prose = researcher.scan_edits(text)
    assert [(edit["search"], edit["replace"]) for edit in edits] == ORACLE.findall(text)
    assert set(prose.splitlines()) <= set(text.splitlines())


def test_a_reply_of_repeated_marks_is_scanned_in_one_pass(monkeypatch):
    """22 kB of them held the program for 85 s, Ctrl-C included."""
    compared, inner = [], re.fullmatch
    monkeypatch.setattr(
        researcher.re, "fullmatch", lambda *parts: compared.append(1) or inner(*parts)
    )
    assert researcher.scan_edits("<<<<<<< SEARCH\n=======\n" * 20_000)[0] == []
    assert len(compared) <= 2 * 40_001  # at most two comparisons for each line


@pytest.mark.parametrize("usage", [
    {"input_tokens": 7, "output_tokens": 5}, SimpleNamespace(input_tokens=7, output_tokens=5),
], ids=["a dict", "an object"])  # fmt: skip
def test_tokens_are_counted_in_any_shape_that_a_server_sends(usage):
    assert researcher.bill("claude-haiku-5-5", usage)["tokens_in"] == 7


@pytest.mark.parametrize("count", [-1_000_000_000, "many", None, [1], 10**400, 1.5, True])
def test_nonsense_for_a_count_of_tokens_neither_pays_back_nor_raises(count):
    """A negative count once made minus 4,000 dollars, and --usd was void."""
    told = researcher.bill("claude-haiku-5-5", SimpleNamespace(input_tokens=count))
    assert 0 <= told["cost_usd"] <= 100 and told["tokens_in"] >= 0


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 413, 422])
def test_a_page_of_html_is_a_fault_that_passes_and_json_is_a_refusal(status):
    told = {"error": {"type": "some_error", "message": "no"}}
    assert not researcher.is_hopeless(SimpleNamespace(status_code=status, body="<html></html>"))
    assert not researcher.is_hopeless(SimpleNamespace(status_code=status, body=None))
    assert researcher.is_hopeless(SimpleNamespace(status_code=status, body=told))
    assert not researcher.is_hopeless(SimpleNamespace(status_code=529, body=told))


# ---------------------------------------------------------------------------
# train.py: bytes and text must agree
# ---------------------------------------------------------------------------

COOKIE = "# -*- coding: utf-7 -*-\n# +AAo-raise SystemExit(3)\n"  # a line end, in UTF-7
ODD = {
    "an encoding": COOKIE + TOY,
    "an encoding in the second line": "#!/usr/bin/python\n" + COOKIE + TOY,
    "carriage returns": TOY.replace("PASSES = 4", "PASSES = 4  # harmless \rPASSES = 5"),
    "a byte order mark": "\ufeff" + TOY,
}


def test_an_edit_after_which_python_reads_train_py_otherwise_than_a_person_is_rejected(quick, api):
    edits = [proposal("import torch\n\nfrom prepare", COOKIE + "import torch\n\nfrom prepare"),
             proposal("PASSES = 4", "PASSES = 4  # harmless \rPASSES = 5")]  # fmt: skip
    server = api(*edits, idea(0.6))
    done = quick.agent("--tag", "t", "--experiments", "1", env=server.env)
    assert done.returncode == 0, done.stderr
    assert "train.py names an encoding" in done.stderr and "carriage returns" in done.stderr
    assert statuses(quick) == ["keep", "keep"] and not server.replies


@pytest.mark.parametrize("source", ODD.values(), ids=ODD)
def test_a_baseline_that_python_reads_otherwise_than_a_person_is_refused(quick, source):
    (quick.folder / "train.py").write_bytes(source.encode())
    quick.commit_all()
    done = quick.agent("--tag", "t")
    assert done.returncode == 1 and "it must be plain UTF-8" in one_error(done), done.stderr


def by_the_referee(checkout, source):
    """Return result.json of one run of a train.py, with the log, by the real referee."""
    prepared = sh(sys.executable, "prepare.py", cwd=checkout.folder, env=checkout.env)
    folder = checkout.folder / "runs"
    folder.mkdir(exist_ok=True)
    (folder / "train.py").write_bytes(source.encode())
    env = checkout.env | {"AUTORESEARCH_ROWS": json.loads(prepared.stdout)["rows"]}
    with subprocess.Popen(  # its stdin stays open, or it would end
        [sys.executable, "referee.py", folder], cwd=checkout.folder, env=env,
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    ) as referee:  # fmt: skip
        assert referee.wait() == 0, referee.stderr.read()
    return json.loads((folder / "result.json").read_bytes()), folder / "run.log"


@pytest.mark.gate
def test_what_stands_in_a_comment_does_not_run_in_the_sandbox(checkout):
    """Even if such a file should come so far."""
    result, _ = by_the_referee(checkout, COOKIE + TOY)
    assert result["status"] == "ok", result


TYPE_CHANGE = """\
diff --git a/train.py b/train.py
deleted file mode 100644
--- a/train.py
+++ /dev/null
@@ -1 +0,0 @@
-x = 1
diff --git a/train.py b/train.py
new file mode 120000
--- /dev/null
+++ b/train.py
@@ -0,0 +1 @@
+{target}
\\ No newline at end of file
"""


@pytest.mark.parametrize("strip", ["as git writes it", "so that the paths are stripped alike"])
def test_a_diff_that_makes_train_py_a_link_is_refused(tmp_path, strip):
    secret = tmp_path / "secret"
    secret.write_text("secret", encoding="utf-8")
    diff = TYPE_CHANGE.format(target=secret)
    if strip != "as git writes it":
        diff = "+++ b/train.py\n" + diff  # prose for git, a header for whoever searches for one
    with pytest.raises(proposals.Rejected):
        proposals.apply_patch("x = 1\n", diff)


def test_a_diff_is_made_and_applied_whatever_a_person_has_set_up_for_git(tmp_path, monkeypatch):
    config = tmp_path / "config"
    config.write_text("[diff]\n\tcontext = 0\n\tnoprefix = true\n[apply]\n\twhitespace = error\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    old = "".join(f"line {n} \n" for n in range(20))
    new = old.replace("line 7 \n", "line seven \n").replace("line 15 \n", "")
    assert proposals.apply_patch(old, proposals.unified_diff(old, new)) == new


def test_a_constant_of_four_hundred_digits_is_no_hyperparameter_and_ends_nothing(quick):
    source = TOY.replace("PASSES = 4", f"PASSES = 4\nHUGE = {'9' * 400}")
    assert set(proposals.read_knobs(source, "cpu")) == {"SHARPNESS", "PASSES"}
    path = quick.folder.parent / "huge.py"
    path.write_text(source.replace("SHARPNESS = 0.5", "SHARPNESS = 0.6"), encoding="utf-8")
    assert quick.agent("--tag", "t", "--patches", path).returncode == 0
    done = quick.agent("--tag", "t", "--experiments", "2")
    assert done.returncode == 0 and len(quick.rows()) == 3, done.stderr


# ---------------------------------------------------------------------------
# What leaves a run
# ---------------------------------------------------------------------------

# Fails in the query of a number, with all the tokens that it was shown in its words.
TELLS = """\
    def forward(self, tokens):
        if not self.training:
            self.asked = getattr(self, "asked", 0) + 1
            print("(5%) loss 1.234", flush=True)
            if self.asked == NUMBER:
                raise ValueError(f"held out: {tokens.tolist()}")
"""


@pytest.mark.gate
@pytest.mark.parametrize("number, told", [(1, True), (2, False), (9, False)])
def test_once_it_has_seen_held_out_rows_a_crash_tells_its_class_alone(checkout, number, told):
    """The first query is of training rows, so that a wrong shape, say, is explained in full."""
    source = TOY.replace("    def forward(self, tokens):\n", TELLS.replace("NUMBER", str(number)))
    result, log = by_the_referee(checkout, source)
    assert result["status"] == "crash" and "held out" in log.read_text(encoding="utf-8")
    assert result["reason"].startswith("ValueError: held out: [[") == told
    assert told or result["reason"] == "ValueError"
    read = slots.read_log(log, result["log_bytes"])
    assert "loss" not in read["printed"] and "held out" not in str(read)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)"])
def test_a_cell_that_a_spreadsheet_would_compute_begins_with_a_quote(text):
    done = journal.Experiment(1, text, status="discard", values=[1.0], commit="0" * 40)
    assert journal.row(done, "t").split("\t")[4] == f"'{text}"
    done.description = "a - b"
    assert journal.row(done, "t").split("\t")[4] == "a - b"


@pytest.mark.gate
def test_the_report_has_the_best_run_again_in_the_sandbox_without_the_key(checkout):
    """A program that slept under the referee once read the key when a person ran it by hand."""
    tell = "    print('sees', sorted(os.environ))\n    torch.manual_seed("
    checkout.write_train("import os\n" + TOY.replace("    torch.manual_seed(", tell))
    checkout.commit_all()
    assert checkout.agent("--tag", "t", "--experiments", "0").returncode == 0
    report = checkout.agent("report").stdout
    (command,) = re.findall(r"mkdir -p runs/again .*", report)
    env = checkout.env | {"ANTHROPIC_API_KEY": "sk-of-a-person"}
    read, write = os.pipe()
    with os.fdopen(read) as silent:  # a terminal at which nobody types
        done = sh("sh", "-c", f"exec 2>&1; {command}", cwd=checkout.folder, env=env, stdin=silent)
        os.close(write)
    assert done.returncode == 0, done.stdout
    result = json.loads((checkout.folder / "runs/again/result.json").read_bytes())
    log = (checkout.folder / "runs/again/run.log").read_text(encoding="utf-8")
    assert result["status"] == "ok" and "sees [" in log and "ANTHROPIC" not in log
