"""The language model's side: replies that are none, models and servers of every kind, ideas.md."""

import json
import re
from types import SimpleNamespace

import pytest

import proposals
import researcher
from proposals import Edit, Rejected
from support.api_server import Fault, proposal
from support.checkout import TOY
from support.histories import SOURCE, History
from support.stand_in import stand_in


@pytest.fixture
def checkout(checkout):
    """One with a stand-in for the referee, whose scores are exact."""
    stand_in(checkout, "time.sleep(0.05)")
    return checkout


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


def test_a_reply_that_a_filter_blocks_is_one_in_vain(checkout, api):
    blocked = {"type": "invalid_request_error",
               "message": "Output blocked by content filtering policy"}
    body = json.dumps({"type": "error", "error": blocked})
    server = api(Fault(400, body), Fault(200, f"event: error\ndata: {body}\n\n"), sharper(0.6))
    done = checkout.agent("--experiments", "1", "--tag", "t", env=server.env)
    assert done.returncode == 0 and not server.replies, done.stderr
    assert checkout.rows()[1]["description"] == "sharper"
    assert all(request["max_tokens"] == 32_000 for request in server.requests)  # not asked plainly


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


def test_a_stubborn_model_costs_no_run_and_stops_no_loop(checkout, api):
    server = api(*STUBBORN, sharper(0.45, "at last"))
    done = checkout.agent("--experiments", "2", "--tag", "t", env=server.env)
    assert done.returncode == 0, done.stderr
    rows = checkout.rows()
    assert [row["experiment"] for row in rows] == ["0", "1", "2"] and not server.replies
    assert rows[2]["description"].startswith("at last")
    assert done.stderr.count("rejected: ") == len(STUBBORN) - 1
    assert len(list((checkout.folder / "runs/t").glob("[12]/result*.json"))) == 2
    assert max(len(str(request)) for request in server.requests) < 200_000  # not 5 MB again


def test_when_nothing_can_be_made_of_replies_the_sampler_has_a_turn(checkout, api):
    server = api(*[("no", "end_turn")] * 16, sharper(0.45))
    done = checkout.agent("--experiments", "3", "--tag", "t", env=server.env)
    assert done.returncode == 0, done.stderr
    words = [row["description"] for row in checkout.rows()[1:]]
    assert [w.startswith("sampler: ") for w in words] == [True, True, False]


def test_a_value_within_two_percent_is_named_once_and_may_be_meant(checkout, api):
    server = api(sharper(0.4), sharper(0.404), sharper(0.404), sharper(0.3), sharper(0.301))
    done = checkout.agent("--experiments", "3", "--tag", "t", env=server.env)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("All its constants are within 2 % of experiment 1") == 1
    assert len(checkout.rows()) == 4


def test_kind_combines_and_the_idea_taken_up_are_recorded_and_shown(checkout, api):
    (checkout.folder / "ideas.md").write_text("# mine\n- [ ] be blunter\n- [x] done\n")
    server = api(
        sharper(0.4, kind="tune", idea="be blunter"),
        sharper(0.3, kind="combine", combines=[1]),
        sharper(0.2),
    )
    done = checkout.agent("--experiments", "3", "--tag", "t", env=server.env)
    assert done.returncode == 0, done.stderr
    told = [request["messages"][0]["content"][-1]["text"] for request in server.requests]
    assert "- be blunter\n" in told[0] and "- done" not in told[0]
    assert "- be blunter (taken up: 1 discard" in told[2]
    message = checkout.git("log", "-1", "--format=%B", "refs/autoresearch/t/2")
    assert 'Kind: "combine"' in message and "Combines: [1]" in message
    assert checkout.rows()[1]["description"].startswith("tune: sharper")
    assert (checkout.folder / "ideas.md").read_text() == "# mine\n- [ ] be blunter\n- [x] done\n"


def test_a_ladder_of_models_goes_up_after_three_drops(checkout, api):
    server = api(*(sharper(value) for value in (0.4, 0.35, 0.3, 0.25, 0.2)))
    names = "claude-haiku-5-5,claude-opus-5-5"
    done = checkout.agent("--experiments", "5", "--model", names, "--tag", "t", env=server.env)
    assert done.returncode == 0, done.stderr
    asked = [request["model"] for request in server.requests]
    assert asked[:3] == ["claude-haiku-5-5"] * 3 and asked[4] == "claude-opus-5-5"
    message = checkout.git("log", "-1", "--format=%B", "refs/autoresearch/t/5")
    assert 'Model: "claude-opus-5-5"' in message
    costs = [float(row["cost_usd"]) for row in checkout.rows()[1:]]
    assert costs[4] > 4 * costs[0]


def test_mix_gives_the_sampler_its_share(checkout, api):
    server = api(sharper(0.4), sharper(0.35))
    done = checkout.agent("--experiments", "4", "--mix", "0.5", "--tag", "t", env=server.env)
    assert done.returncode == 0, done.stderr
    lines = checkout.git("for-each-ref", "--format=%(contents)", "refs/autoresearch/t")
    assert re.findall(r'Proposer: "(\w+)"', lines) == ["claude", "sampler"] * 2
    assert not server.replies


def odd(request):
    """A server that knows neither strict tools nor cache marks nor lists of blocks."""
    if "strict" in str(request) or "cache_control" in str(request):
        body = '{"type": "error", "error": {"type": "invalid_request_error", "message": "odd"}}'
        return Fault(400, body)
    assert isinstance(request["system"], str) and request["max_tokens"] < 10_000
    return BLOCKS.replace("WINDOW = 1", "SHARPNESS = 0.5").replace(
        "WINDOW = 2", "SHARPNESS = 0.4").replace("gone()", "PASSES = 4"), "end_turn"  # fmt: skip


def test_a_server_that_knows_little_is_asked_plainly(checkout, api):
    server = api(odd, odd)
    done = checkout.agent("--experiments", "1", "--tag", "t", env=server.env)
    assert done.returncode == 0, done.stderr
    assert "asking more plainly: odd" in done.stderr
    assert checkout.rows()[1]["description"].startswith("structure: a wider window")


def test_tokens_and_dollars_are_told_apart_and_summed(checkout, api):
    server = api(sharper(0.6), proposal("PASSES = 4", "PASSES = 5"))
    done = checkout.agent("--experiments", "2", "--tag", "t", env=server.env)
    assert done.returncode == 0, done.stderr
    assert re.search(r"k \(\d+\.\dk cached\) \+ 0\.1k tokens \$0\.", done.stdout)
    assert re.search(r"\$0\.\d+ an experiment, \$0\.\d+ a kept commit", done.stderr)
    message = checkout.git("log", "-1", "--format=%B", "refs/autoresearch/t/1")
    counts = dict(re.findall(r"Tokens-(in|cached|written|out): (\d+)", message))
    assert int(counts["written"]) > 1000 and counts["cached"] == "0" and counts["out"] == "100"


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
