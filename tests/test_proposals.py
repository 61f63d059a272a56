"""proposals.py: edits of train.py, and its numeric constants."""

import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import proposals
from proposals import Edit, Rejected, apply_edits, read_knobs
from support.checkout import TOY

# ---------------------------------------------------------------------------
# Edits
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


def places_of(search, source):
    """Return where a text stands and cuts no name, found by trying every place."""

    def cuts(at):  # a name, between this character and the one before it
        around = source[max(0, at - 1) : at + 1]
        return 0 < at < len(source) and all(c.isalnum() or c == "_" for c in around)

    known = range(len(source) - len(search) + 1 if search else 0)
    ends = ((at, at + len(search)) for at in known if source.startswith(search, at))
    return [at for at, end in ends if not cuts(at) and not cuts(end)]


def made_by_hand(source, edits):
    """Return the source with all edits made, piece by piece from its start, or None."""
    found = [(places_of(edit.search, source), edit) for edit in edits]
    if not edits or any(len(places) != 1 for places, _ in found):
        return None
    pieces, done = [], 0
    for (at,), edit in sorted(found, key=lambda each: each[0]):
        if at < done:  # the one before it reaches into this one
            return None
        pieces += [source[done:at], edit.replace]
        done = at + len(edit.search)
    return "".join([*pieces, source[done:]])


def outcome(source, edits):
    try:
        return apply_edits(source, edits)
    except Rejected:
        return None


TEXTS = st.text("ab_1é =(\n", max_size=30)


@st.composite
def sources_and_edits(draw):
    """Make a source and edits, most of which are of places in it."""
    source, edits = draw(TEXTS), []
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(source)))
        part = source[start : start + draw(st.integers(1, 8))]
        search = draw(st.one_of(st.just(part), st.just(part), TEXTS))
        edits.append(Edit(search, draw(TEXTS)))
    return source, edits


@given(sources_and_edits(), st.randoms(use_true_random=False))
@settings(derandomize=True, deadline=None, max_examples=500)
def test_edits_are_all_made_each_at_its_only_place_and_in_any_order(made, chance):
    source, edits = made
    for edit in edits:  # the next test is about a SEARCH that overlaps itself
        at = places_of(edit.search, source)
        assume(all(b - a >= len(edit.search) for a, b in zip(at, at[1:], strict=False)))
    result = outcome(source, edits)
    assert result == made_by_hand(source, edits)
    assert outcome(source, chance.sample(edits, len(edits))) == result


def test_a_search_that_overlaps_itself_matches_twice():
    with pytest.raises(Rejected, match="matches 2 places"):
        apply_edits("x()\nx()\nx()\n", [Edit("x()\nx()\n", "x()\n")])


@given(st.text(max_size=60), st.text(max_size=20), st.text(max_size=60))
@settings(derandomize=True, deadline=None, max_examples=200)
def test_an_edit_of_any_text_changes_that_text_only(before, replace, after):
    """Whatever stands around a marked place, and whatever is put there, arrives unchanged."""
    assume("<§>" not in before + after)
    assert apply_edits(f"{before}<§>{after}", [Edit("<§>", replace)]) == before + replace + after


# ---------------------------------------------------------------------------
# Constants
# ---------------------------------------------------------------------------


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


def test_any_constant_can_be_set_to_any_value_and_read_back():
    """Set 1 to 3 of the constants of a program at a time, a hundred times."""
    source, choose = KNOBS, random.Random(1)
    for _ in range(100):
        knobs = read_knobs(source, "cpu")
        chosen = choose.sample(sorted(knobs), choose.randint(1, 3))
        values = {name: knobs[name].at(choose.randint(-4, 4)) for name in chosen}
        source = proposals.set_knobs(source, {knobs[name]: v for name, v in values.items()})
        found = {name: knob.value for name, knob in read_knobs(source, "cpu").items()}
        assert found == {name: knob.value for name, knob in knobs.items()} | values
