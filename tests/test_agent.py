"""agent.py: the real program, real git, the real SDK against a scripted server."""

import contextlib
import difflib
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import agent
import journal
import proposals
from proposals import Edit, Rejected, apply_edits, read_knobs
from rule import Noise, judge, level
from support.api_server import proposal
from support.checkout import TOY, late

# ---------------------------------------------------------------------------
# The keep rule
# ---------------------------------------------------------------------------

SIGMA = 0.01


def verdict(*values, best=(1.0,) * 3, risk=0.1, simpler=False):
    """Of runs on different seeds."""
    own = {-n: value for n, value in enumerate(values, 1)}
    return judge(own, dict(enumerate(best)), Noise(SIGMA), risk, 1.0, simpler)[0]


def errors(count, runs=3):
    """So many standard errors of the difference between two means."""
    return count * SIGMA * math.sqrt(1 / runs + 1 / 3)


def test_gain_of_over_three_standard_errors_is_kept_at_once():
    assert verdict(1 - errors(3.5, 1)) == "keep"
    assert verdict(1 - errors(3.3, 1)) == "again"


def test_worse_than_the_best_is_dropped_after_one_run():
    assert verdict(1 + 0.1 * SIGMA) == "discard"


@pytest.mark.parametrize("risk, needed", [(0.1, 1.2816), (0.002, 2.8782)])
def test_confirmation_needs_the_standard_errors_of_the_level(risk, needed):
    for runs in (2, 3, 4):
        assert verdict(*[1 - errors(needed + 0.01, runs)] * runs, risk=risk) == "keep"
        weak = verdict(*[1 - errors(needed - 0.01, runs)] * runs, risk=risk)
        assert weak == ("again" if runs < 4 else "discard")


def test_simplification_may_lose_half_a_sigma_but_only_by_the_mean_of_two():
    assert verdict(1 + 0.4 * SIGMA, simpler=True) == "again"
    assert verdict(1 + 0.4 * SIGMA, 1 + 0.4 * SIGMA, simpler=True) == "keep"
    assert verdict(1 + 0.6 * SIGMA, simpler=True) == "discard"
    assert verdict(1 + 0.4 * SIGMA, 1 + 0.7 * SIGMA, simpler=True) == "discard"


def test_gain_too_good_to_be_true_is_set_aside():
    best, noise = dict.fromkeys(range(3), 1.0), Noise(SIGMA)
    assert judge({0: 0.5}, best, noise, 0.1, 1.0, False)[1].startswith("suspicious")
    assert judge({0: 0.96}, best, Noise(0.001), 0.1, 1.0, False) == ("keep", "")  # under 5 %
    assert judge({0: 0.5}, best, noise, 0.1, 0.55, False) == ("keep", "")  # seen before


def test_runs_on_equal_seeds_are_compared_in_pairs():
    best, noise = {1: 1.0, 2: 1.02, 3: 0.98}, Noise(SIGMA, shared=0.8)
    own = {seed: value - errors(1, 1) for seed, value in best.items()}  # 2 / sqrt(3) sigma less
    assert judge(own, best, noise, 0.05, 1.0, False)[0] == "keep"
    apart = {-seed: value for seed, value in own.items()}
    assert judge(apart, best, noise, 0.05, 1.0, False)[0] == "again"
    unlucky = {2: 1.01}  # as the best was on that seed, which it knows by the two others
    assert judge(unlucky, best, noise, 0.05, 1.0, False)[0] == "again"
    assert judge({-2: 1.01}, best, noise, 0.05, 1.0, False)[0] == "discard"


@pytest.mark.parametrize("seeds", ["1 123", "1 2", "12 123", "123 12", "123 1234"])
@pytest.mark.parametrize("shared", [0.0, 0.6])
def test_the_comparison_is_generalised_least_squares(seeds, shared):
    """Against the textbook's formula on the covariances of all runs."""
    draw = random.Random(1)
    old, new = ({int(seed): draw.gauss(1, SIGMA) for seed in each} for each in seeds.split())
    runs = [(side, seed) for side, each in enumerate((old, new)) for seed in each]
    covariance = np.array([[shared * (a[1] == b[1]) for b in runs] for a in runs])
    np.fill_diagonal(covariance, 1)
    design = np.array([[side == 0, side == 1] for side, _ in runs], dtype=float)
    weights = design.T @ np.linalg.inv(covariance)
    means = np.linalg.inv(weights @ design)
    first, second = means @ weights @ [(old, new)[side][seed] for side, seed in runs]
    gain, error = Noise(SIGMA, shared).compare(old, new)
    assert gain == pytest.approx(first - second)
    assert error == pytest.approx(SIGMA * math.sqrt(np.array([1, -1]) @ means @ [1, -1]))


def test_how_much_luck_is_common_is_learnt_from_repeated_runs():
    """True correlation 0.8 and 0; of a hundred candidates with two runs each."""
    nothing = journal.Run("t", {"sigma": SIGMA}, "start").noise()
    for common in (0.8, 0.0):
        draw, run = random.Random(2), journal.Run("t", {"sigma": SIGMA}, "start")
        luck = [draw.gauss(0, SIGMA * math.sqrt(common)) for _ in range(8)]
        for number in range(100):
            own = [x + draw.gauss(0, SIGMA * math.sqrt(1 - common)) for x in luck]
            tried = journal.Experiment(number, "", values=own, seeds=list(range(8)))
            run.history.append(tried)
        assert run.noise().shared == pytest.approx(common, abs=0.1)
        for e in run.history[1:]:
            e.draws = [1.0] * 8  # not what the first one drew
        assert run.noise().shared == nothing.shared
    run.history = run.history[:1]
    assert run.noise().shared == nothing.shared


@pytest.mark.parametrize("clock, aside", [("cpu", 1), ("tokens", 0)])
def test_what_disturbs_a_run_is_made_up_for_where_it_costs_score_or_run(clock, aside):
    """A budget in tokens trains as well, later; a crash may be a neighbour's fault."""
    run = journal.Run("t", {"sigma": SIGMA, "clock": clock}, "start")
    trained = {"val_bpb": 1.0, "seed": 1, "total_tokens_M": 1.0, "training_seconds": 9.0,
               "training_wall_seconds": 9.0, "start_seconds": 1.0, "start_wall_seconds": 1.0,
               "answers_seconds": 1.0, "peak_vram_mb": 1.0, "num_steps": 1.0}  # fmt: skip
    for result, expected in ((trained | {"status": "ok"}, aside),
                             ({"status": "crash", "reason": "out of memory"}, 1)):
        done = journal.Experiment(1, "")
        result |= {"disturbed": "another process on the GPU", "total_seconds": 10.0}
        agent.add_result(run, done, result, "1")
        assert done.disturbed == expected and done.status == ""
        assert len(done.values) == 1 - expected


def test_who_draws_other_numbers_on_a_seed_is_not_paired():
    """A twin with other initial weights, luckier by 1.5 sigma where all others agree."""
    best, noise = journal.Experiment(0, "", values=[1.0] * 3, seeds=[1, 2, 3]), Noise(SIGMA, 0.98)
    twin = journal.Experiment(1, "", values=[1 - 1.5 * SIGMA], seeds=[1])
    for draws, verdict in (([7.0], "again"), ([], "keep")):
        twin.draws = draws
        scores = journal.undisturbed([twin]), journal.undisturbed([best])
        assert judge(*scores, noise, 0.01, 1.0, False)[0] == verdict


def test_pairs_that_agree_are_soon_enough_to_keep_what_gains_half_a_sigma():
    """Of a real run with a budget in tokens, where nothing but the edit differs."""
    gains, sigma, seeds = (0.0084, 0.0082, 0.0094, 0.0091), 0.016, [1, 2, 3, 4]
    luck = [random.Random(seed).gauss(0, sigma) for seed in seeds]
    loss, gain = ([x - sign * y for x, y in zip(luck, gains, strict=True)] for sign in (-1, 1))
    run = journal.Run("t", {"sigma": sigma}, "start")
    for number, values in enumerate((luck, loss)):
        e = journal.Experiment(number, "", values=values, seeds=seeds)
        e.status = ("keep", "discard")[number]
        run.history.append(e)
    done = journal.Experiment(2, "", values=gain, seeds=seeds)
    scores, best = journal.undisturbed([done]), run.scores_of(0)
    for noise, verdict in ((run.noise(done), "keep"), (Noise(sigma), "discard")):
        assert judge(scores, best, noise, level(run.history), 0.0, False)[0] == verdict


def test_a_pair_apart_by_an_accident_does_not_end_what_equal_seeds_are_worth():
    run = journal.Run("t", {"sigma": SIGMA}, "start")
    for number in range(40):
        own = [random.Random(number).gauss(0, SIGMA / 10), 0.0]
        own[0] += 100 * SIGMA * (number == 20)
        run.history.append(journal.Experiment(number, "", values=own, seeds=[1, 2]))
    assert run.noise().shared > 0.8


def judged(*statuses):
    """A history with these verdicts; s is a keep for being simpler."""
    names = {"k": "keep", "d": "discard", "c": "crash", "s": "keep", "m": "measure"}
    return [journal.Experiment(0, "", status="keep")] + [
        journal.Experiment(n, "", status=names[status], reason="simpler" * (status == "s"),
                           values=[1.0])
        for n, status in enumerate("".join(statuses), 1)
    ]


def test_a_keep_makes_the_next_one_easier_and_drops_make_it_harder():
    assert level(judged()) == 0.1 * 0.02
    assert level(judged("k")) == 0.2 > level(judged("k", "d" * 20)) > 0.01
    assert level(judged("cm")) == level(judged())  # are no tests
    unfit = judged("kd")
    unfit[-1].values = []  # did not fit on the new best
    assert level(unfit) == level(judged("k")) and level(judged("kd")) <= level(judged("k"))
    assert level(judged("s")) < level(judged())  # finds nothing
    levels = [level(judged("k", "d" * n)) for n in range(100)]
    assert levels == sorted(levels, reverse=True) and levels[-1] > 0


def test_a_night_of_fifty_candidates_without_substance_mostly_keeps_none():
    """Whole nights of A/A pairs, by the rule and by keeping any drop."""
    draw, none, greedy = random.Random(1), 0, 0
    for _ in range(200):
        best, history, lowest = {n: draw.gauss(1, SIGMA) for n in range(3)}, judged(), 2.0
        for number in range(1, 51):
            own, status = {}, "again"
            while status == "again":
                own[number, len(own)] = draw.gauss(1, SIGMA)
                status = judge(own, best, Noise(SIGMA), level(history), 0.9, False)[0]
            first = own[number, 0]
            greedy, lowest = greedy + (first < lowest), min(lowest, first)
            best = own if status == "keep" else best
            history.append(journal.Experiment(number, "", status=status))
        none += all(e.status == "discard" for e in history[1:])
    assert none > 0.85 * 200 and greedy > 3 * 200


def test_sigma_starts_from_the_prior_and_follows_repeated_runs():
    run = journal.Run("t", {"sigma": 0.01}, "start")
    run.history = [journal.Experiment(0, "", status="keep", values=[1.0])]
    assert run.noise().sigma == pytest.approx(0.01)
    twice = {"status": "discard", "values": [1.0, 1.2]}
    run.history = [journal.Experiment(n, "", **twice) for n in range(500)]
    assert run.noise().sigma == pytest.approx(statistics.stdev([1.0, 1.2]), rel=0.01)


def test_one_diverging_run_does_not_make_noise_of_the_gains_to_come():
    run = journal.Run("t", {"sigma": 0.002}, "start")
    run.history = [journal.Experiment(0, "", status="keep", values=[1.0, 1.002, 0.998])]
    before = run.noise().sigma
    diverged = journal.Experiment(1, "", status="discard", values=[0.99, 5.0])
    run.history.append(diverged)
    assert before < run.noise().sigma < 2 * before
    run.history[0].values = [1.0]  # of an uneven machine
    assert run.noise().sigma < 2 * 0.002
    run.history = [journal.Experiment(0, "", status="keep", values=[1.0, 1.2, 0.8])]
    assert run.noise().sigma > 0.1  # what the baseline shows is believed


def test_code_in_a_string_is_no_simpler_and_prose_is_free():
    code = "def f(x):\n    return [x + i for i in range(10)]\n"
    assert journal.node_count(f"exec({code!r})") >= 0.6 * journal.node_count(code)
    told = code.replace(":\n", ":\n    'What it does, in a whole sentence.'\n", 1)
    assert journal.node_count(told) == journal.node_count(code) + 2


# ---------------------------------------------------------------------------
# Edits, patches, knobs
# ---------------------------------------------------------------------------


def test_edit_that_matches_nowhere_names_the_nearest_lines():
    with pytest.raises(Rejected, match="matches nowhere") as rejection:
        apply_edits(TOY, [Edit("SHARPNES = 0.5", "SHARPNESS = 1.0")])
    assert "SHARPNESS = 0.5" in str(rejection.value)


def test_edits_are_all_made_or_none():
    with pytest.raises(Rejected, match="edit 2 matches 2 places"):
        apply_edits("a\nb\nb\n", [Edit("a", "c"), Edit("b", "d")])
    assert apply_edits("a\nb\n", [Edit("a", "c"), Edit("b", "d")]) == "c\nd\n"
    assert apply_edits("a\nb\n", [Edit("b\n", "a\n"), Edit("a\n", "b\n")]) == "b\na\n"  # as shown
    with pytest.raises(Rejected, match="overlap"):
        apply_edits("a\nb\nc\n", [Edit("a\nb", "x"), Edit("b\nc", "y")])


def test_a_search_cuts_no_name():
    source = "EMBEDDING_LR = 0.8\nUNEMBEDDING_LR = 0.9\n"
    with pytest.raises(Rejected, match="nowhere"):
        apply_edits(source, [Edit("EMBEDDING_LR = 0.9", "EMBEDDING_LR = 0.7")])
    changed = apply_edits(source, [Edit("EMBEDDING_LR", "LR")])
    assert changed == "LR = 0.8\nUNEMBEDDING_LR = 0.9\n"


def test_edit_of_another_file_is_rejected():
    with pytest.raises(Rejected, match="prepare.py"):
        apply_edits(TOY, [Edit("a", "b", "prepare.py")])


KNOBS = """
RATE = 0.04  # µ before the literal: columns are bytes
DEPTH = {"cpu": 2, "gpu": 9}[SCALE.name]; BETAS = (0.8, 0.95)
BATCH, NAME = 64, "no number"
SIZE = 2048
assert SIZE % (SCALE.sequence_len * 16) == 0, "whole passes"
def main():
    INSIDE = 3
"""


def test_knobs_are_the_numbers_above_the_first_definition():
    knobs = read_knobs(KNOBS, "cpu")
    assert {name: knob.value for name, knob in knobs.items()} == {
        "RATE": 0.04,
        "DEPTH": 2,
        "BETAS[0]": 0.8,
        "BETAS[1]": 0.95,
        "SIZE": 2048,
    }


def test_setting_knobs_changes_their_literals_only():
    knobs = read_knobs(KNOBS, "cpu")
    changed = proposals.set_knobs(
        KNOBS, {knobs["RATE"]: 0.05, knobs["DEPTH"]: 3, knobs["BETAS[1]"]: 0.9}
    )
    expected = KNOBS.replace("0.04", "0.05").replace('"cpu": 2', '"cpu": 3').replace("0.95", "0.9")
    assert changed == expected


def test_sizes_step_by_factors_of_two_and_assertions_of_divisibility_are_seen():
    knobs, scale = read_knobs(KNOBS, "cpu"), {"name": "cpu", "sequence_len": 128}
    assert knobs["SIZE"].at(2) == 4096 and knobs["SIZE"].step_of(1024) == -2
    assert proposals.asserts_hold(KNOBS, scale)
    assert not proposals.asserts_hold(proposals.set_knobs(KNOBS, {knobs["SIZE"]: 1024}), scale)
    assert proposals.asserts_hold("assert __import__('os').abort()\n", scale)  # not evaluated


def test_journal_message_survives_a_round_trip():
    done = journal.Experiment(
        7,
        "a → b: c",
        'why\n\nStatus: "keep"',
        "claude",
        0.25,
        "crash",
        "Error: x",
        2,
        [1.5],
        3,
        0.5,
    )
    read, settings = journal.parse_message("abc", journal.commit_message(done, "cpu: 60"))
    done.hypothesis, done.commit = 'why Status: "keep"', "abc"
    assert (read, settings) == (done, "cpu: 60")


# ---------------------------------------------------------------------------
# Whole nights
# ---------------------------------------------------------------------------


def statuses(checkout):
    return [row["status"] for row in checkout.rows()]


def test_three_patches_are_kept_dropped_and_crashed(checkout):
    better = checkout.patch("better.py", "SHARPNESS = 0.5", "SHARPNESS = 0.6")
    worse = checkout.patch("worse.py", "SHARPNESS = 0.5", "SHARPNESS = 0.3")
    crash = checkout.patch("crash.py", "steps = Toy(), 0", "steps = Toy(), 1 / 0")
    checkout.exchange("agent.py", "BASELINE_RUNS = 1", "BASELINE_RUNS = 3")
    checkout.git("commit", "-qam", "three runs")
    head, index = checkout.git("rev-parse", "HEAD"), (checkout.folder / ".git/index").read_bytes()
    done = checkout.agent("--patches", better, worse, crash, "--tag", "t")
    assert done.returncode == 0, done.stderr
    assert statuses(checkout) == ["keep", "keep", "discard", "crash"]
    assert checkout.rows()[0]["runs"] == "3" and checkout.rows()[3]["val_bpb"] == "nan"
    assert "ZeroDivisionError" in checkout.rows()[3]["description"]
    assert checkout.refs() == [f"refs/autoresearch/t/{n}" for n in (1, 2, 3)]
    assert checkout.git("diff", "--name-only", "main", "autoresearch/t") == "train.py"
    assert checkout.git("status", "--porcelain") == "?? results.tsv"
    assert checkout.git("rev-parse", "HEAD") == head
    assert (checkout.folder / ".git/index").read_bytes() == index
    folder = checkout.folder / "runs/t/1"
    assert {"train.py", "proposal.json", "run.log", "result.json"} <= {
        p.name for p in folder.iterdir()
    }
    assert "SHARPNESS = 0.6" in (folder / "train.py").read_text()
    assert (folder / "run.log").read_text().count("\nval_bpb:") == 1
    again = checkout.agent("--patches", better, worse, crash)
    assert again.returncode == 0 and len(checkout.rows()) == 4  # passed over


def diff_of(checkout, name, prose, old, new, file="train.py"):
    """A unified diff under a line of prose."""
    before = (checkout.folder / file).read_text()
    after = before.replace(old, new)
    lines = difflib.unified_diff(
        before.splitlines(True), after.splitlines(True), f"a/{file}", f"b/{file}"
    )
    path = checkout.folder.parent / name
    path.write_text(f"{prose}\n\n" + "".join(lines))
    return path


@pytest.mark.gate
def test_diff_applies_to_the_best_and_is_named_by_its_prose(checkout):
    first = diff_of(checkout, "1.diff", "sharper answers", "SHARPNESS = 0.5", "SHARPNESS = 0.6")
    second = diff_of(
        checkout, "2.diff", "count more slowly", "+= torch.bincount", "+= 0.5 * torch.bincount"
    )
    foreign = diff_of(checkout, "3.diff", "easier", "60, 8192", "60, 4096", "prepare.py")
    done = checkout.agent("--patches", first, second, foreign, "--tag", "t")
    assert done.returncode == 0, done.stderr
    described = [row["description"].split(" (")[0] for row in checkout.rows()]
    assert described == ["baseline", "sharper answers", "count more slowly"]
    assert "rejected: 3.diff" in done.stderr
    tried = checkout.git("show", "refs/autoresearch/t/2:train.py")
    assert "SHARPNESS = 0.6" in tried and "0.5 * torch.bincount" in tried


def test_sampler_night_needs_no_key_and_its_keeps_cherry_pick(checkout):
    done = checkout.agent("--experiments", "4", "--tag", "t")
    assert done.returncode == 0, done.stderr
    assert "an API key is not set" in done.stderr
    rows = checkout.rows()
    assert [row["experiment"] for row in rows] == list("01234") and len(checkout.refs()) == 4
    assert len(done.stdout.splitlines()) == 5
    kept = checkout.git("rev-list", "--reverse", "main..autoresearch/t").split()
    assert len(kept) == statuses(checkout).count("keep") - 1
    checkout.git("switch", "-q", "-c", "picked", "main")
    for commit in kept:
        checkout.git("cherry-pick", commit)
    assert checkout.git("diff", "autoresearch/t", "HEAD", "--", "train.py") == ""


@pytest.mark.gate
def test_claude_session_of_good_invalid_duplicate_and_refused_replies(checkout, api):
    server = api(
        proposal("SHARPNESS = 0.5", "SHARPNESS = 0.6", "sharper"),  # experiment 1, kept
        proposal("SHARPNESS = 0.5", "SHARPNESS = 0.7"),  # waits, and then matches nowhere any more
        proposal("steps", "stops"),  # matches often
        proposal("SHARPNESS = 0.6", "SHARPNESS = (0.7"),  # does not compile
        proposal("SHARPNESS = 0.6", "SHARPNESS = 0.4", "blunter"),  # experiment 2, dropped
        proposal("SHARPNESS = 0.6", "SHARPNESS = 0.4"),  # duplicate of 2
        proposal("SHARPNESS = 0.6", "SHARPNESS = 0.6  # sharp"),  # a comment
        (None, "refusal"),
        ("prose only", "end_turn"),  # the third repair turn: given up, a fresh conversation
        ({"description": "x"}, "tool_use"),  # against the schema
        proposal("a", "b", file="prepare.py"),  # another file
        (proposal("SHARPNESS = 0.6", "SHARPNESS = 0.61"), "max_tokens"),  # cut off
        proposal("model = Toy", "model = Foy", "never matches"),
        proposal("model, steps = Toy(), 0", "model, steps = Toy(), 1 / 0"),  # fails at once
        proposal("steps += 1", late("1 / 0"), "divide"),  # experiment 3
    )
    done = checkout.agent("--experiments", "3", "--tag", "t", env=server.env)
    assert done.returncode == 0, done.stderr
    rows = checkout.rows()
    assert [(row["status"], row["description"].split(" (")[0]) for row in rows] == [
        ("keep", "baseline"),
        ("keep", "sharper"),
        ("discard", "blunter"),
        ("crash", "divide"),
    ]
    assert done.stderr.count("rejected: ") == 11 and not server.replies
    (told,) = server.requests[-1]["messages"][-1]["content"]
    assert "fails in two steps" in told["content"] and "ZeroDivisionError" in told["content"]
    assert not list((checkout.folder / "runs/t").glob("screen-*"))
    assert done.stderr.count("an idea: dropped, The SEARCH of edit 1 matches nowhere") == 1
    assert len(re.findall("This is experiment 2 again.*blunter", done.stderr)) == 1
    assert all(float(row["cost_usd"]) > 0 for row in rows[1:])
    assert "key" not in (checkout.folder / "runs/t/1/run.log").read_text()


def prefix(request):
    blocks = [*request["system"], *request["messages"][0]["content"]]
    marked = [i for i, block in enumerate(blocks) if "cache_control" in block]
    return [block["text"] for block in blocks[: marked[-1] + 1]]


@pytest.mark.gate
def test_second_call_reads_the_first_ones_prefix_from_the_cache(checkout, api):
    server = api(
        proposal("SHARPNESS = 0.5", "SHARPNESS = 0.4", "blunter"),
        proposal("SHARPNESS = 0.5", "SHARPNESS = 0.3", "blunter still"),
        proposal("SHARPNESS = 0.5", "SHARPNESS = 0.2", "blunt"),
    )
    done = checkout.agent("--experiments", "3", "--model", "claude-sonnet-5-5", env=server.env)
    assert done.returncode == 0, done.stderr
    first, second, third = server.requests
    assert prefix(first) == prefix(second) == prefix(third)
    assert "1. blunter" in second["messages"][0]["content"][-1]["text"]  # is under way
    assert "1. discard" in third["messages"][0]["content"][-1]["text"]
    costs = [float(row["cost_usd"]) for row in checkout.rows()[1:]]
    assert costs[1] < 0.2 * costs[0]
    assert first["tools"][0]["strict"] is True and first["stream"] is True


@pytest.mark.gate
def test_unknown_price_is_said_and_written_as_nan(checkout, api):
    server = api(proposal("SHARPNESS = 0.5", "SHARPNESS = 0.4"))
    done = checkout.agent("--experiments", "1", "--model", "house-blend", env=server.env)
    assert done.returncode == 0, done.stderr
    assert "price is not known" in done.stderr and checkout.rows()[1]["cost_usd"] == "nan"


@pytest.mark.gate
def test_best_is_measured_again_after_a_plateau(checkout):
    checkout.exchange("agent.py", "MEASURE_AFTER = 10", "MEASURE_AFTER = 3")
    worse = [checkout.patch(f"{n}.py", "SHARPNESS = 0.5", f"SHARPNESS = 0.4{n}") for n in range(4)]
    done = checkout.agent("--patches", *worse, "--tag", "t")
    assert done.returncode == 0, done.stderr
    assert statuses(checkout) == ["keep", *["discard"] * 3, "measure", "discard"]
    measured = checkout.rows()[-2]
    assert (measured["experiment"], measured["runs"]) == ("0", "1")
    assert measured["commit"] == checkout.rows()[0]["commit"]
    assert checkout.refs() == [f"refs/autoresearch/t/{n}" for n in range(1, 5)]


@pytest.mark.gate
def test_killed_in_mid_run_it_goes_on_and_loses_or_doubles_nothing(checkout):
    slow = TOY.replace("steps += 1", "steps += 1; import time; time.sleep(0.05)")
    checkout.write_train(slow)
    checkout.git("commit", "-qam", "slow")
    patches = [
        checkout.patch(f"{n}.py", "SHARPNESS = 0.5", f"SHARPNESS = 0.{n}", slow) for n in (6, 4, 8)
    ]
    command = [sys.executable, "agent.py", "--tag", "t", "--patches", *map(str, patches)]
    for number in (0, 3):  # the experiment during which the program is killed
        started = subprocess.Popen(
            command, cwd=checkout.folder, env=checkout.env, stderr=subprocess.DEVNULL
        )
        log, deadline = checkout.folder / f"runs/t/{number}/run.log", time.monotonic() + 120
        while not (log.exists() and b"step 3" in log.read_bytes()) and time.monotonic() < deadline:
            time.sleep(0.02)
        started.send_signal(signal.SIGKILL)
        started.wait()
        left = f"ps -eo args | grep -c '[r]eferee.py {checkout.folder}'"
        while subprocess.run(left, shell=True, capture_output=True).stdout.strip() != b"0":
            assert time.monotonic() < deadline, "the referee outlived the agent"
            time.sleep(0.1)
    done = checkout.agent("--tag", "t", "--patches", *patches)
    assert done.returncode == 0, done.stderr
    assert [(row["experiment"], row["status"]) for row in checkout.rows()] == [
        ("0", "keep"),
        ("1", "keep"),
        ("2", "discard"),
        ("3", "keep"),
    ]
    assert len(checkout.refs()) == 3
    assert checkout.git("fsck", "--no-dangling") == ""


@pytest.mark.gate
def test_lost_rows_and_a_lost_branch_come_back_from_git(checkout):
    patch = checkout.patch("better.py", "SHARPNESS = 0.5", "SHARPNESS = 0.6")
    assert checkout.agent("--patches", patch, "--tag", "t").returncode == 0
    rows, tip = checkout.rows(), checkout.git("rev-parse", "autoresearch/t")
    (checkout.folder / "results.tsv").unlink()
    checkout.git("update-ref", "-d", "refs/heads/autoresearch/t")
    assert checkout.agent("--patches", patch).returncode == 0
    assert checkout.rows() == rows and checkout.git("rev-parse", "autoresearch/t") == tip


def test_ctrl_c_ends_with_130_and_leaves_no_process(checkout):
    hanging = TOY.replace("    finish(model", "    import time; time.sleep(60); finish(model")
    checkout.write_train(hanging)
    checkout.git("commit", "-qam", "hanging")
    started = subprocess.Popen(
        [sys.executable, "agent.py", "--tag", "t"],
        cwd=checkout.folder,
        env=checkout.env,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    log, deadline = checkout.folder / "runs/t/0/run.log", time.monotonic() + 60
    while not (log.exists() and b"step" in log.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    assert started.wait(30) == 130 and "goes on from here" in started.stderr.read()
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            assert str(checkout.folder) not in process.read_text(errors="replace")


# ---------------------------------------------------------------------------
# Bad input: two lines, exit code 1, nothing changed
# ---------------------------------------------------------------------------


def refused(checkout, *arguments, env=None):
    """Run agent.py, expect its two lines, and return the first."""
    before = checkout.git("for-each-ref"), os.path.exists(checkout.folder / "results.tsv")
    done = checkout.agent(*arguments, env=env)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and not done.stdout, done.stderr
    assert lines[-2].startswith("error: ") and lines[-1].startswith("hint: "), lines
    assert len(lines) == 2 or "too little text" in lines[-2], lines
    assert before == (checkout.git("for-each-ref"), os.path.exists(checkout.folder / "results.tsv"))
    return lines[-2]


def test_checkout_that_is_not_ready_is_refused(checkout):
    checkout.write_train(TOY + "\n# edited\n")
    assert "not committed as it stands" in refused(checkout)
    (checkout.folder / "train.py").unlink()
    assert "missing" in refused(checkout)
    checkout.write_train(TOY)
    (checkout.folder / "results.tsv").write_text("id\tloss\n1\t2\n")
    assert "foreign header" in refused(checkout)


def test_folder_without_git_is_refused(checkout):
    (checkout.folder / ".git").rename(checkout.folder.parent / "git")
    done = checkout.agent()
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "git init" in done.stderr


def test_bad_settings_are_refused(checkout, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "little").mkdir()
    (tmp_path / "little" / "a.txt").write_text("too little text\n" * 50)
    assert "no positive number" in refused(checkout, "--budget", "0")
    assert "unknown scale" in refused(checkout, env={"AUTORESEARCH_SCALE": "tpu"})
    assert "no such file" in refused(checkout, "--corpus", str(tmp_path / "nowhere"))
    assert "too little text" in refused(checkout, "--corpus", str(tmp_path / "empty"))
    assert "too little text" in refused(checkout, "--corpus", str(tmp_path / "little"))
    assert "no such file" in refused(checkout, "--patches", str(tmp_path / "no.diff"))
    assert "needs a key" in refused(checkout, "--proposer", "claude")
    for key in ("sk-a\r", "sk-ä"):
        assert "what no key can" in refused(checkout, env={"ANTHROPIC_API_KEY": key})
    local = {"ANTHROPIC_API_KEY": "sk-test-key", "ANTHROPIC_BASE_URL": "localhost:1"}
    assert "no http address" in refused(checkout, env=local)
    for tag in ("a..b", "x.lock", "x.", "-x", "ä"):
        assert "branch name" in refused(checkout, f"--tag={tag}", "--experiments", "0")
    for wrong in ("--hours=nan", "--hours=-1", "--usd=-1", "--usd=inf", "--experiments=-3"):
        done = checkout.agent(wrong)
        assert done.returncode == 2 and "invalid" in done.stderr, done.stderr


def test_refused_key_and_unknown_model_end_before_the_baseline(checkout, api):
    server = api()
    server.status, server.error_type = 401, "authentication_error"
    assert "refuses" in refused(checkout, env=server.env)
    server.status, server.error_type = 404, "not_found_error"
    assert "claude-none" in refused(checkout, "--model", "claude-none", env=server.env)
    assert not server.requests


@pytest.mark.gate
def test_a_branch_that_somebody_looks_at_is_not_moved_under_them(checkout):
    first, second = (checkout.patch(f"{v}.py", "SHARPNESS = 0.5", f"SHARPNESS = {v}")
                     for v in (0.6, 0.8))
    assert checkout.agent("--patches", first, "--tag", "t").returncode == 0
    beside = checkout.folder.parent / "beside"
    checkout.git("worktree", "add", "-q", str(beside), "autoresearch/t")
    done = checkout.agent("--patches", second, "--tag", "t")
    assert [row["status"] for row in checkout.rows()] == ["keep"] * 3, done.stderr
    assert checkout.git("-C", str(beside), "status", "--porcelain") == ""
    best = checkout.git("rev-parse", "refs/autoresearch/t/2")
    assert done.stderr.splitlines()[-1].endswith(f"..{best[:7]}")
    checkout.git("worktree", "remove", str(beside))
    done = checkout.agent("--patches", second, "--tag", "t")
    assert checkout.git("rev-parse", "autoresearch/t") == best
    assert done.stderr.splitlines()[-1].endswith("..autoresearch/t")
    checkout.git("switch", "-q", "autoresearch/t")
    assert "own branch" in refused(checkout, "--tag", "t")


def test_failing_baseline_stops_before_any_paid_call(checkout, api):
    server = api()
    checkout.write_train(TOY.replace("finish(model", "print(model"))
    checkout.git("commit", "-qam", "no finish")
    assert (
        "baseline fails" in (done := checkout.agent(env=server.env)).stderr and done.returncode == 1
    )
    assert not server.requests and not checkout.refs()


@pytest.mark.gate
def test_hanging_run_is_ended_by_the_hard_timeout(checkout):
    """At a wall-clock budget the limit is the baseline's own time and OVERTIME."""
    checkout.exchange("prepare.py", '32, "cpu", 60', '32, "wall", 1')
    checkout.exchange("slots.py", "\nOVERTIME = 20.0", "\nOVERTIME = 2.0")
    checkout.git("commit", "-qam", "wall clock")
    sleep = "    import time; time.sleep(60); finish(model"
    hang = checkout.patch("hang.py", "    finish(model", sleep)
    del checkout.env["AUTORESEARCH_BUDGET_TOKENS"]
    done = checkout.agent("--patches", hang)
    assert done.returncode == 0, done.stderr
    assert "overtime" in checkout.rows()[1]["description"]


# ---------------------------------------------------------------------------
# The program itself
# ---------------------------------------------------------------------------


@pytest.mark.gate
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_agent_stays_small_and_never_imports_torch(checkout, api):
    """Peak memory of a whole claude night, optuna included, with everything that it imports."""
    server = api(proposal("SHARPNESS = 0.5", "SHARPNESS = 0.4"))
    probe = (
        "import json, sys; import agent, optuna; sys.argv[1:] = ['--experiments', '1']; "
        "code = agent.main(); status = open('/proc/self/status').read(); "
        "peak = int(status.split('VmHWM:')[1].split()[0]) / 1024; "
        "print(json.dumps([code, peak, 'torch' in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=checkout.folder,
        env=checkout.env | server.env,
        capture_output=True,
        encoding="utf-8",
    )
    code, megabytes, torch = json.loads(done.stdout.splitlines()[-1])
    assert code == 0 and megabytes < 150 and not torch, done.stderr


@pytest.mark.parametrize(("clock", "counted"), [("cpu", 2), ("tokens", 3)])
def test_a_slow_run_is_set_aside_where_it_had_less_of_the_budget(clock, counted):
    run = journal.Run("t", {"sigma": SIGMA, "clock": clock}, "start")
    done = journal.Experiment(1, "an idea")
    for seed, seconds in enumerate((60.0, 61.0, 90.0)):
        result = {"status": "ok", "val_bpb": 1.0, "total_tokens_M": 2.0, "seed": seed,
                  "training_seconds": seconds, "training_wall_seconds": seconds, "num_steps": 9,
                  "total_seconds": 2 * seconds, "peak_vram_mb": 1, "answers_seconds": 1.0,
                  "start_seconds": 0.1, "start_wall_seconds": 0.1}  # fmt: skip
        agent.add_result(run, done, result, "a run")
    assert (done.runs, done.disturbed) == (counted, 3 - counted)
    assert len(journal.undisturbed([done])) == counted == len(done.values)
