"""The morning report: of runs of every length, of other people's files, and in a real browser."""

import math
import random
import re
import shutil
import statistics
import sys
import time

import pytest

import report
from journal import Experiment, Run
from rule import Noise
from support.api_server import Fault, proposal
from support.checkout import ROOT, sh
from support.histories import HISTORIES, SOURCE
from support.stand_in import sharpness, stand_in


@pytest.fixture
def checkout(checkout):
    """One with a stand-in for the referee, whose scores are exact."""
    stand_in(checkout)
    return checkout


FIELD = """\
commit\tval_bpb\tmemory_gb\tstatus\tdescription
baseline\t0.997900\t44.0\tkeep\tbaseline
a1b2c3d\t0.993200\t44.2\tkeep\tincrease $\\lr$ to 0.04
b2c3d4e\t1.005000\t44.0\tdiscard\tswitch to GeLU
c3d4e5f\t0.000000\t0.0\tcrash\tdouble model width (OOM)
d4e5f6a\tnan\t0.0\tcrash\ta tab\tin the text
e5f6a7b\t0.992900\t44.1\tkeep\tsmaller batch
"""


def told(folder, text, name="results.tsv"):
    """What the command says of a file, and the folder of its page."""
    (folder / name).write_text(text, encoding="utf-8")
    done = sh(sys.executable, ROOT / "agent.py", "report", name, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder / f"runs/report-{name.removesuffix('.tsv')}"


def test_any_file_of_the_field_is_read_as_it_stands(tmp_path):
    words, folder = told(tmp_path, FIELD)
    assert "6 rows: 3 keep, 1 discard, 2 crash" in words
    assert "Baseline 0.997900, best 0.992900 (row 5: smaller batch), -0.005000" in words
    assert "1 of 2 keeps are within two standard errors" in words
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
    words, folder = told(tmp_path, text)
    assert word in words and (folder / "report.html").exists()


@pytest.mark.parametrize("text", ["", "a\tb\n1\t2\n", "\x00\xff"])
def test_a_file_that_is_none_is_refused_in_two_lines(tmp_path, text):
    (tmp_path / "x.tsv").write_text(text, encoding="latin-1")
    for name in ("x.tsv", "missing.tsv"):
        done = sh(sys.executable, ROOT / "agent.py", "report", name, cwd=tmp_path)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 2


@pytest.mark.gate
def test_no_run_a_baseline_only_crashes_and_one_keep(checkout):
    done = checkout.agent("report")
    assert done.returncode == 1 and "there is no run yet" in done.stderr
    checkout.agent("--tag", "t", "--experiments", "0")
    done = checkout.agent("report")
    assert done.returncode == 0 and "the gain is 0" in done.stdout, done.stderr
    (checkout.folder / "crash.py").write_text("SHARPNESS = nothing\n")
    checkout.agent("--tag", "t", "--patches", "crash.py")
    done = checkout.agent("report", "--tag", "t")
    assert "0 kept, 0 dropped, 1 crashed" in done.stdout
    checkout.agent("--tag", "t", "--patches", *map(str, sharpness(checkout, 0.6, 0.4)))
    done = checkout.agent("report")
    assert "1 kept, 1 dropped, 1 crashed" in done.stdout
    assert "Of 1 keeps about 0.0 may have gained nothing" in done.stdout
    (command,) = re.findall("git cherry-pick .*", done.stdout)
    assert done.stdout.endswith(command + "\n")
    checkout.git("reset", "-q", "--hard")
    sh("sh", "-c", f"git -c user.name=x -c user.email=x@y {command[4:]}", cwd=checkout.folder)
    assert "SHARPNESS = 0.6" in (checkout.folder / "train.py").read_text()
    page = (checkout.folder / "runs/t/report.html").read_text(encoding="utf-8")
    assert 'class="add">+SHARPNESS = 0.6' in page and command in page


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
    """By fresh runs of baseline and best, sigma from a prior and the runs of a night."""
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


def test_the_luck_of_draws_is_taken_off_when_its_runs_are_not_those_of_the_best():
    """The second keep's gain is sure; its runs are as lucky as those of the first that drew so."""
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


@pytest.mark.parametrize("name", HISTORIES)
def test_every_history_makes_a_page(tmp_path, name):
    run = HISTORIES[name](SOURCE)
    began = time.perf_counter()
    report.write(report.report_run(run), tmp_path, lambda line: None)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    print(f"{name}: {time.perf_counter() - began:.1f} s, {len(text) / 1e6:.2f} MB")
    assert len(text) < 5e6 and str(len(run.history)) in text


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
def test_report_is_written_anew_during_the_night(checkout, api):
    checkout.exchange("agent.py", "\nREPORT_SECONDS = 60.0", "\nREPORT_SECONDS = 0.0")
    checkout.commit_all()
    page = checkout.folder / "runs/t/report.html"

    def written():  # while the model is thinking about the next one
        return page.exists() and "1 kept" in page.read_text(encoding="utf-8")

    server = api(proposal("SHARPNESS = 0.5", "SHARPNESS = 0.6"), Fault(401, until=written))
    done = checkout.agent("--tag", "t", env=server.env)
    assert done.returncode == 1 and "refuses" in done.stderr
    assert written()
