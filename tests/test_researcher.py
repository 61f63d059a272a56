"""The language model's side: replies that are none, models and servers of every kind, ideas.md."""

import argparse
import json
import math
import re
from types import SimpleNamespace

import pytest

import journal
import prepare
import proposals
import researcher
from journal import Experiment
from prepare import SetupError
from proposals import Edit, Rejected
from support.api_server import Fault, proposal
from support.checkout import TOY
from support.histories import SOURCE, History


def reply(*blocks, stop="end_turn"):
    return SimpleNamespace(content=list(blocks), stop_reason=stop)


def said(text):
    return SimpleNamespace(type="text", text=text)


BLOCKS = """\
Some thoughts first.

**Description:** a wider window
Hypothesis: longer context helps.
kind: structure

```python
<<<<<<< SEARCH
WINDOW = 1
=======
WINDOW = 2
>>>>>>> REPLACE
```

<<<<<<< SEARCH
gone()
=======
>>>>>>> REPLACE
"""


def test_search_replace_blocks_in_plain_text_are_a_proposal():
    found = researcher.parse_reply(reply(said(BLOCKS)))
    assert found.edits == [Edit("WINDOW = 1\n", "WINDOW = 2\n"), Edit("gone()\n", "")]
    assert found.description == "structure: a wider window" and found.kind == "structure"
    assert found.hypothesis == "longer context helps."


@pytest.mark.parametrize("text, told", [
    ("Let me think about it.", "does not call the tool"),
    (f"```python\n{TOY}```", "Do not send the file"),
    ("```\n<<<<<<< SEARCH\nWINDOW = 1\n=======\nWINDOW = 2\n```", "no edit"),
])  # fmt: skip
def test_text_that_is_no_proposal_is_answered_with_what_to_send(text, told):
    with pytest.raises(Rejected, match=told):
        researcher.parse_reply(reply(said(text)))


@pytest.mark.parametrize("given", [
    {}, {"description": 1}, {"edits": "all"}, {"combines": ["x"]}, {"edits": [{"search": "a"}]},
    {"edits": [None]}, {"description": None}, {"hypothesis": ["a"]}, {"kind": 3},
])  # fmt: skip
def test_a_call_against_the_schema_is_rejected(given):
    call = SimpleNamespace(type="tool_use", name="propose", input=proposal("a", "b") | given)
    if not given:
        call.input = {}
    with pytest.raises(Rejected, match="schema"):
        researcher.parse_reply(reply(call, stop="tool_use"))


def test_lines_of_a_windows_server_and_an_empty_field_are_read_alike():
    text = "description:\n\nhypothesis: because\n\n" + BLOCKS.partition("```")[2]
    found = researcher.parse_reply(reply(said(text.replace("\n", "\r\n"))))
    assert found.hypothesis == "because" and len(found.edits) == 2


def test_a_reply_that_broke_off_has_used_what_it_had_said():
    usage = SimpleNamespace(input_tokens=9, output_tokens=1)
    broken = reply(said("word " * 300), stop=None)
    broken.usage = usage
    assert researcher.usage_of(broken).output_tokens == 500
    whole = reply(said("word " * 300))
    whole.usage = SimpleNamespace(output_tokens=1)
    assert researcher.usage_of(whole).output_tokens == 1


def test_sampler_learns_from_scores_of_the_same_structure_only():
    history = History(SOURCE)
    for n in range(12):
        history.add("discard", f"a{n}", {"MATRIX_LR": 0.01 * (1 + n % 4)}, [1.3 + 0.01 * (n % 4)])
    history.add("crash", "c", {"SOFTCAP": 3.0})
    assert len(proposals.alike(history.run)) == 13
    (line,) = proposals.sampler_view(history.run)
    assert line.startswith("MATRIX_LR: ") and "in the best quarter 0.01 to" in line
    back = proposals.Proposal("", "", [Edit("MATRIX_LR = 0.05", "MATRIX_LR = 0.04")], "x")
    history.add("keep", "k", {"MATRIX_LR": 0.05}, [1.2])
    with pytest.raises(Rejected, match="experiment 0 again: baseline"):
        proposals.complete(back, history.run)
    history.add("keep", "s", edit=("return x", "return -x"), values=[1.0])
    assert len(proposals.alike(history.run)) == 1 and proposals.sampler_view(history.run) == []


# ---------------------------------------------------------------------------
# The proposer in this process, with real HTTP: importing the SDK is what takes long
# ---------------------------------------------------------------------------


@pytest.fixture
def history(tmp_path, monkeypatch, cpu_rows):
    """A history of the baseline alone, whose train.py is the toy, in a folder of its own."""
    for module in (journal, researcher):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    for name in ("AUTORESEARCH_SCALE", "AUTORESEARCH_CACHE"):
        monkeypatch.setenv(name, cpu_rows[name])
    (tmp_path / "program.md").write_text("# Program\n", encoding="utf-8")
    history = History(TOY)
    history.run.scale["rows"] = str(prepare.rows_folder(prepare.current_scale())[0])
    return history


@pytest.fixture
def ask(api, monkeypatch):
    """Start a proposer that asks a server with these replies: (proposer, its line, server)."""

    def start(*replies, server=None, **options):
        server = server or api(*replies)
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        args = argparse.Namespace(patches=None, proposer=None, model=researcher.MODEL, mix=0.0,
                                  usd=None, hours=None, until=math.inf)  # fmt: skip
        vars(args).update(options)
        return *researcher.choose_proposer(args, lambda run, source: ""), server

    return start


def judged(history, proposal, status="discard", value=1.3):
    """Note a proposal in the history as the loop would, with its verdict."""
    run, best = history.run, history.run.best()
    done = Experiment(run.next_number(), proposal.description, status=status, values=[value])
    done.base, done.order, done.commit = best.number, done.number, f"{done.number:040d}"
    done.gain = run.mean_of(best.number) - value
    proposals.identify(done, proposal.source, run.source_of(best), "cpu")
    run.sources[done.commit] = proposal.source
    run.history.append(done)


def sharper(value, description="sharper", base=0.5, **more):
    return proposal(f"SHARPNESS = {base}", f"SHARPNESS = {value}", description) | more


HUGE = proposal("SHARPNESS = 0.5", "SHARPNESS = 0.5\n" + "x = 1  # fill\n" * 400_000, "huge")
STUBBORN = [
    sharper(0.4),  # 1, dropped
    sharper(0.4), sharper(0.4), sharper(0.4),  # repeats itself
    proposal("PASSES = 4", "PASSES = 4  # four"),  # comments only
    (f"```python\n{TOY}```", "end_turn"),  # the whole file
    (BLOCKS.replace(">>>>>>>", ">>"), "end_turn"),  # fences wrongly
    (sharper(0.3), "max_tokens"),
    ("I would rather not.", "end_turn"),
    HUGE,
    proposal("", TOY, "the whole file by the tool"),
    proposal("SHARPNESS = 0.5", "SHARPNESS = ", "no program"),
]  # fmt: skip


def test_a_reply_that_a_filter_blocks_is_one_in_vain(history, ask):
    blocked = {"type": "invalid_request_error",
               "message": "Output blocked by content filtering policy"}
    body = json.dumps({"type": "error", "error": blocked})
    faults = Fault(400, body), Fault(200, f"event: error\ndata: {body}\n\n")
    propose, _, server = ask(*faults, sharper(0.6))
    assert propose(history.run).description == "sharper" and not server.replies
    assert all(request["max_tokens"] == 32_000 for request in server.requests)  # not asked plainly


def test_of_a_stubborn_model_nothing_is_proposed_until_something_is_new(history, ask, capsys):
    propose, _, server = ask(*STUBBORN, sharper(0.45, "at last"))
    first = propose(history.run)
    assert first.description == "sharper"
    judged(history, first)
    assert propose(history.run).description == "at last" and not server.replies
    assert capsys.readouterr().err.count("rejected: ") == len(STUBBORN) - 1
    assert max(len(str(request)) for request in server.requests) < 200_000  # not 5 MB again


def test_when_nothing_can_be_made_of_replies_the_sampler_has_a_turn(history, ask):
    propose, _, server = ask(*[("no", "end_turn")] * 16, sharper(0.45))
    words = []
    for _ in range(3):
        proposal = propose(history.run)
        judged(history, proposal)
        words.append(proposal.description)
    assert [w.startswith("sampler: ") for w in words] == [True, True, False]
    assert not server.replies


def test_a_value_within_two_percent_is_named_once_and_may_be_meant(history, ask, capsys):
    values = (0.4, 0.404, 0.404, 0.3)
    propose, _, server = ask(*(sharper(value, f"to {value}") for value in values))
    found = []
    for _ in range(3):
        proposal = propose(history.run)
        judged(history, proposal)
        found.append(proposal.description)
    said = capsys.readouterr().err
    assert found == ["to 0.4", "to 0.404", "to 0.3"] and not server.replies
    assert said.count("All its constants are within 2 % of experiment 1") == 1


def test_a_ladder_of_models_goes_up_after_three_drops(history, ask):
    names = ["claude-haiku-5-5"] * 3 + ["claude-opus-5-5"] * 2
    propose, _, server = ask(*(sharper(value) for value in (0.4, 0.35, 0.3, 0.25, 0.2)),
                             model="claude-haiku-5-5,claude-opus-5-5")  # fmt: skip
    costs = []
    for name in names:
        proposal = propose(history.run)
        assert proposal.model == name == server.requests[-1]["model"]
        judged(history, proposal)
        costs.append(proposal.cost_usd)
    assert costs[4] > 4 * costs[1] > 0  # both read most of the prompt from the cache


def test_mix_gives_the_sampler_its_share(history, ask):
    propose, _, server = ask(sharper(0.4), sharper(0.35), mix=0.5)
    proposers = []
    for _ in range(4):
        proposal = propose(history.run)
        judged(history, proposal)
        proposers.append(proposal.proposer)
    assert proposers == ["claude", "sampler"] * 2 and not server.replies


def odd(request):
    """A server that knows neither strict tools nor cache marks nor lists of blocks."""
    if "strict" in str(request) or "cache_control" in str(request):
        body = '{"type": "error", "error": {"type": "invalid_request_error", "message": "odd"}}'
        return Fault(400, body)
    assert isinstance(request["system"], str) and request["max_tokens"] < 10_000
    return BLOCKS.replace("WINDOW = 1", "SHARPNESS = 0.5").replace(
        "WINDOW = 2", "SHARPNESS = 0.4").replace("gone()", "PASSES = 4"), "end_turn"  # fmt: skip


def test_a_server_that_knows_little_is_asked_plainly(history, ask, capsys):
    propose, _, server = ask(odd, odd)
    assert propose(history.run).description == "structure: a wider window"
    assert "asking more plainly: odd" in capsys.readouterr().err and not server.replies


def test_an_unknown_price_is_said_and_the_cost_is_nan(history, ask):
    propose, line, _ = ask(sharper(0.4), model="house-blend")
    assert line.endswith("whose price is not known: cost_usd is nan")
    done = Experiment(1, "", cost_usd=propose(history.run).cost_usd)
    assert journal.row(done, "t").rstrip("\n").split("\t")[-1] == "nan"
    with pytest.raises(SetupError, match="the price of house-blend is not known"):
        ask(model="house-blend", usd=1.0)


def test_a_model_that_the_server_does_not_have_is_refused_before_it_is_asked(history, api, ask):
    server = api()
    server.status, server.error_type = 404, "not_found_error"
    with pytest.raises(SetupError, match="claude-none"):
        ask(model="claude-none", server=server)
    assert not server.requests


# ---------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------


def test_kind_combines_and_the_idea_taken_up_are_recorded_and_shown(quick, api):
    (quick.folder / "ideas.md").write_text("# mine\n- [ ] be blunter\n- [x] done\n")
    server = api(
        sharper(0.4, kind="tune", idea="be blunter"),
        sharper(0.3, kind="combine", combines=[1]),
        sharper(0.2),
    )
    done = quick.agent("--experiments", "3", "--tag", "t", env=server.env)
    assert done.returncode == 0, done.stderr
    told = [request["messages"][0]["content"][-1]["text"] for request in server.requests]
    assert "- be blunter\n" in told[0] and "- done" not in told[0]
    assert "- be blunter (taken up: 1 discard" in told[2]
    message = quick.git("log", "-1", "--format=%B", "refs/autoresearch/t/2")
    assert 'Kind: "combine"' in message and "Combines: [1]" in message
    assert quick.rows()[1]["description"].startswith("tune: sharper")
    assert (quick.folder / "ideas.md").read_text() == "# mine\n- [ ] be blunter\n- [x] done\n"


def test_tokens_and_dollars_are_told_apart_and_summed(quick, api):
    server = api(sharper(0.6), proposal("PASSES = 4", "PASSES = 5"))
    done = quick.agent("--experiments", "2", "--tag", "t", env=server.env)
    assert done.returncode == 0, done.stderr
    assert re.search(r"k \(\d+\.\dk cached\) \+ 0\.1k tokens \$0\.", done.stdout)
    assert re.search(r"\$0\.\d+ an experiment, \$0\.\d+ a kept commit", done.stderr)
    message = quick.git("log", "-1", "--format=%B", "refs/autoresearch/t/1")
    counts = dict(re.findall(r"Tokens-(in|cached|written|out): (\d+)", message))
    assert int(counts["written"]) > 1000 and counts["cached"] == "0" and counts["out"] == "100"
