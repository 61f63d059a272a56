"""report.py: reports of runs of every length, of other people's files, and in a real browser."""

import math
import random
import re
import shutil
import statistics
import sys

import pytest

import report
from journal import Experiment, Run
from prepare import SetupError
from rule import Noise
from support.api_server import Fault, proposal
from support.checkout import ROOT, sh
from support.histories import HISTORIES, SOURCE
from support.stand_in import sharpness
from support.waiting import wait_until

FIELD = """\
commit\tval_bpb\tmemory_gb\tstatus\tdescription
baseline\t0.997900\t44.0\tkeep\tbaseline
a1b2c3d\t0.993200\t44.2\tkeep\tincrease $\\lr$ to 0.04
b2c3d4e\t1.005000\t44.0\tdiscard\tswitch to GeLU
c3d4e5f\t0.000000\t0.0\tcrash\tdouble model width (OOM)
d4e5f6a\tnan\t0.0\tcrash\ta tab\tin the text
e5f6a7b\t0.992900\t44.1\tkeep\tsmaller batch
"""


def test_any_file_of_the_field_is_read_as_it_stands(tmp_path):
    (tmp_path / "results.tsv").write_text(FIELD, encoding="utf-8")
    done = sh(sys.executable, ROOT / "agent.py", "report", "results.tsv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "6 rows: 3 keep, 1 discard, 2 crash" in done.stdout
    assert "Baseline 0.997900, best 0.992900 (row 5: smaller batch), -0.005000" in done.stdout
    assert "1 of 2 keeps are within two standard errors" in done.stdout
    folder = tmp_path / "runs/report-results"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "0.992900" in page and "a tab" in page and "http" not in page
    assert (folder / "progress.png").read_bytes().startswith(b"\x89PNG")


def test_a_reader_who_has_read_enough_is_no_error(tmp_path):
    (tmp_path / "results.tsv").write_text(FIELD, encoding="utf-8")
    line = f"{sys.executable} {ROOT}/agent.py report results.tsv | true"
    done = sh("bash", "-c", line, cwd=tmp_path)
    assert not done.stderr and (tmp_path / "runs/report-results/report.html").exists()


@pytest.mark.parametrize("text, word", [
    ("commit\tval_bpb\tmemory_gb\tstatus\tdescription\n", "No row has a score"),
    (FIELD.splitlines()[0] + "\nx\t0.000000\t0\tcrash\tboom\n", "No row has a score"),
    ("\n".join(FIELD.splitlines()[:2]), "Nothing was kept beyond the baseline"),
])  # fmt: skip
def test_a_file_with_little_in_it_makes_a_page_too(tmp_path, text, word):
    (tmp_path / "x.tsv").write_text(text, encoding="utf-8")
    said = []
    report.write(report.read_field(tmp_path / "x.tsv"), tmp_path, said.append)
    assert word in "\n".join(said)
    assert word in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["", "a\tb\n1\t2\n", "\x00\xff"])
def test_a_file_without_the_columns_of_the_field_is_refused(tmp_path, text):
    (tmp_path / "x.tsv").write_text(text, encoding="latin-1")
    with pytest.raises(SetupError, match="x.tsv has no column val_bpb, status, description"):
        report.read_field(tmp_path / "x.tsv")


def test_a_file_that_is_not_there_is_refused_in_two_lines(tmp_path):
    done = sh(sys.executable, ROOT / "agent.py", "report", "missing.tsv", cwd=tmp_path)
    error, hint = done.stderr.splitlines()
    assert done.returncode == 1 and error == "error: missing.tsv: No such file or directory"
    assert hint.startswith("hint: ") and not done.stdout


@pytest.mark.gate
def test_a_report_tells_what_was_kept_and_the_command_that_takes_it(quick):
    done = quick.agent("report")
    assert done.returncode == 1 and "there is no run yet" in done.stderr
    (quick.folder / "crash.py").write_text("SHARPNESS = nothing\n")
    words = ["crash.py", *map(str, sharpness(quick, 0.6, 0.4))]
    done = quick.agent("--tag", "t", "--patches", *words)
    assert done.returncode == 0, done.stderr
    done = quick.agent("report", "--tag", "t")
    assert "1 kept, 1 dropped, 1 crashed" in done.stdout, done.stderr
    assert "Of 1 keeps about 0.0 may have gained nothing" in done.stdout
    (command,) = re.findall("git cherry-pick .*", done.stdout)
    assert done.stdout.endswith(command + "\n")
    quick.git("reset", "-q", "--hard")
    sh("sh", "-c", f"git -c user.name=x -c user.email=x@y {command[4:]}", cwd=quick.folder)
    assert "SHARPNESS = 0.6" in (quick.folder / "train.py").read_text()
    page = (quick.folder / "runs/t/report.html").read_text(encoding="utf-8")
    assert 'class="add">+SHARPNESS = 0.6' in page and command in page


@pytest.mark.parametrize("name", ["empty", "plateau-25"])
def test_a_run_without_a_keep_has_gained_nothing(name):
    words = report.report_run(HISTORIES[name](SOURCE)).words
    assert any("Nothing was kept: the gain is 0, and what a gain of nothing" in w for w in words)


def test_the_share_of_time_in_training_is_of_all_slots():
    """Four runs of 40 minutes, half of it training, in two hours: two of them side by side."""
    run, minute = Run("t", {"sigma": 0.01}, ""), 60.0
    for number, began in enumerate((0, 40, 40, 80)):
        spans = dict(began=1e9 + began * minute, ended=1e9 + (began + 40) * minute)
        spans |= dict(seconds=40 * minute, training_seconds=20 * minute)
        run.history.append(Experiment(number, "", **spans))
    run.history.append(Experiment(4, "does not fit on the new best", ended=1e9))  # was never run
    words = report.Report("t", [])
    report.tell_time(run, words)
    assert words.words[0] == "2.0 hours on 2 slots, 33 % of them training."


def test_intervals_of_a_gain_hold_what_they_say():
    """Draw fresh runs of baseline and best; sigma is from a prior and 18 runs. 0.95 ± 3 errors."""
    choose, held = random.Random(1), 0
    for _ in range(1000):
        run = Run("t", {"sigma": 0.01}, "")
        for number in range(6):
            values = [choose.gauss(1, 0.01) for _ in range(3)]
            run.history.append(Experiment(number, "", status="keep", values=values))
        noise = run.noise()
        base, best = ([choose.gauss(mean, 0.01) for _ in range(4)] for mean in (1.0, 0.99))
        gain = statistics.fmean(base) - statistics.fmean(best)
        held += abs(gain - 0.01) < math.sqrt(2) * report.half_width(noise, 4)
    assert 930 <= held <= 970


def test_what_a_keep_was_chosen_by_is_taken_off_the_gain_of_all_that_drew_the_same():
    """The second keep's gain is sure; its runs drew the same numbers as those of the first."""
    def kept(number, values, gain, drawn):
        return Experiment(number, "", status="keep", values=values, seeds=[1, 2], order=number,
                          base=max(0, number - 1), gain=gain, draws=[drawn] * 2)  # fmt: skip

    first, second = kept(0, [1.0, 1.0], None, 1.0), kept(1, [0.98, 0.98], 0.02, 2.0)
    run = Run("t", {"sigma": 0.01}, "", [first, second, kept(2, [0.9, 0.9], 0.08, 2.0)])
    noise = Noise(0.01, shared=0.99)
    gain, half, _, luck = report.gain_of(run, noise)
    assert gain + luck == pytest.approx(0.1) and half > luck
    assert luck == report.luck_of(run, second, noise) > report.luck_of(run, run.best(), noise)
    second.draws = [1.0] * 2  # then the best is the first that drew so, and its gain is as sure
    assert report.gain_of(run, noise)[3] < luck / 10
    fresh = Experiment(2, "", status="measure", values=[0.9], seeds=[3], draws=[2.0], after=2)
    run.history.append(fresh)  # on a seed that none was kept for
    assert report.gain_of(run, noise)[3] == 0


def test_quantiles_of_student():
    for freedom, quantile in ((5, 2.5706), (10, 2.2281), (30, 2.0423), (1e6, 1.96)):
        assert math.isclose(report.student(freedom), quantile, rel_tol=0.01)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.gate] if name == "10000" else []) for name in HISTORIES
])  # fmt: skip
def test_a_page_has_a_row_for_every_experiment_and_a_diff_for_every_keep(tmp_path, name):
    run = HISTORIES[name](SOURCE)
    report.write(report.report_run(run), tmp_path, lambda line: None)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    rows = re.findall(r"<tr><td>(\d+)<td>(\w+)<td>([\d.]+|nan)<td>", text)
    assert rows == [(str(e.number), e.status, f"{e.val_bpb():.6f}") for e in run.history]
    kept = [e.number for e in run.experiments() if e.status == "keep"]
    assert [int(n) for n in re.findall(r"<details><summary><b>(\d+)</b>", text)] == kept
    counts = [sum(e.status == s for e in run.experiments()) for s in ("keep", "discard", "crash")]
    said = "{} experiments: {} kept, {} dropped, {} crashed.".format(sum(counts), *counts)
    assert f"<p>{said}</p>" in text
    assert len(text) < 5e6


@pytest.mark.gate
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("colour", ["light", "dark"])
def test_page_in_a_real_browser(tmp_path, colour):
    from playwright.sync_api import sync_playwright

    run = HISTORIES["mixed-30"](SOURCE)
    report.write(report.report_run(run), tmp_path, lambda line: None)
    complaints = []
    with sync_playwright() as driver:
        options = {"executable_path": shutil.which("chromium"), "args": ["--no-sandbox"]}
        browser = driver.chromium.launch(**options)
        page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme=colour)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url)
                if request.url.startswith("http") else None)  # fmt: skip
        page.goto((tmp_path / "report.html").as_uri())
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        seen = page.inner_text("body")
        diff = page.locator("pre.diff").first
        folded = diff.is_visible()
        page.locator("summary").first.click()
        unfolded = diff.is_visible()
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        browser.close()
    assert not complaints and wide <= 0
    assert "1.221500" in seen and not folded and unfolded
    assert (background == "rgb(255, 255, 255)") == (colour == "light")


@pytest.mark.gate
def test_the_report_is_written_anew_while_the_run_goes_on(quick, api):
    quick.exchange("agent.py", "\nREPORT_SECONDS = 60.0", "\nREPORT_SECONDS = 0.0")
    quick.exchange("researcher.py", "\nSILENCE_SECONDS = 180.0", "\nSILENCE_SECONDS = 3600.0")
    quick.commit_all()
    page = quick.folder / "runs/t/report.html"

    def refuse(request):  # while the model is thinking about the next proposal
        wait_until(lambda: page.exists() and "1 kept" in page.read_text(encoding="utf-8"))
        return Fault(401)

    server = api(proposal("SHARPNESS = 0.5", "SHARPNESS = 0.6"), refuse)
    done = quick.agent("--tag", "t", env=server.env, timeout=900)
    assert done.returncode == 1 and "refuses" in done.stderr
    assert "1 kept" in page.read_text(encoding="utf-8")
