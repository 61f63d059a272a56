"""The probe: how often it misses models that cheat, and that it accuses no honest one.

All models here answer from the same table of probabilities, so that one examination takes
milliseconds and the rates are those of hundreds. What real programs try is in test_red_team.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
import referee
from prepare import Scale
from support.in_process import LogitsOf, seeded_probe

V, T = 64, 32
SCALE = Scale("cpu", "stdlib", V, T, "tokens", 1, 1, 0, 0.1)
BYTES_OF = [1] * V
ROWS, SEALS = 256, 48


@dataclass
class Language:
    """Rows of a random Markov chain, and what predicts them best."""

    shown: np.ndarray  # (ROWS, T + 1) uint16
    reserve: np.ndarray  # (SEALS, T + 1)
    logits: torch.Tensor  # (V, V), of the next token after each


@pytest.fixture(scope="module")
def language() -> Language:
    chance = np.random.default_rng(1)
    follows = chance.dirichlet(np.full(V, 0.1), V)
    edges = follows.cumsum(axis=1)

    def draw(count: int) -> np.ndarray:
        rows = np.empty((count, T + 1), np.int64)
        rows[:, 0] = chance.integers(0, V, count)
        for t in range(T):
            below = chance.random(count)[:, None] > edges[rows[:, t]]
            rows[:, t + 1] = np.minimum(below.sum(axis=1), V - 1)
        return rows.astype(np.uint16)

    shown, reserve = draw(ROWS), draw(SEALS)
    logits = torch.from_numpy(np.log(0.95 * follows + 0.05 / V)).float()
    return Language(shown, reserve, logits)


# ---------------------------------------------------------------------------
# Models: each takes the table of logits and a strength in nats
# ---------------------------------------------------------------------------


def honest(table: torch.Tensor, nats: float) -> LogitsOf:
    return lambda x: table[x]


def unsteady(table: torch.Tensor, nats: float) -> LogitsOf:
    """Return a model whose logits have noise, as those of kernels that add in any order."""
    chance = torch.Generator().manual_seed(0)
    return lambda x: table[x] + nats * torch.randn(*x.shape, V, generator=chance)


def peeks(table: torch.Tensor, nats: float) -> LogitsOf:
    """Return a model that knows the next token, and says so a little."""
    return lambda x: table[x] + nats * torch.nn.functional.one_hot(x.roll(-1, 1), V)


def peeks_rarely(table: torch.Tensor, nats: float) -> LogitsOf:
    """Return a model that knows the next token at every eighth position."""

    def logits_of(x: torch.Tensor) -> torch.Tensor:
        said = torch.nn.functional.one_hot(x.roll(-1, 1), V).float()
        said[:, torch.arange(T) % 8 != 3] = 0
        return table[x] + nats * said

    return logits_of


def peeks_two_ahead(table: torch.Tensor, nats: float) -> LogitsOf:
    """Return a model that looks at the token after the next one, and infers the next one from it.

    Of two tokens at the end of a row it does not know what follows.
    """

    def logits_of(x: torch.Tensor) -> torch.Tensor:
        inferred = table.T[x.roll(-2, 1)]
        inferred[:, -2:] = 0
        return table[x] + nats * inferred

    return logits_of


def oracle(table: torch.Tensor, nats: float) -> LogitsOf:
    """Return a model that knows the next token and gives the same text the same answer again.

    No comparison of a row with its decoy shows it: only rows that it was never shown do.
    """
    said: dict[int, int] = {}

    def logits_of(x: torch.Tensor) -> torch.Tensor:
        logits = table[x].clone()
        for row, answer in zip(x.tolist(), logits, strict=True):
            seen = 0
            for t in range(T - 1):
                seen = hash((seen, row[t]))
                answer[t, said.setdefault(seen, row[t + 1])] += nats
        return logits

    return logits_of


Model = Callable[[torch.Tensor, float], LogitsOf]


def alarms(language: Language, model: Model, nats: float, seals: int, calls: int) -> list[str]:
    """Return the reasons of those of so many seeded examinations that end in an alarm."""
    found = []
    for seed in range(calls):
        try:
            examine(language, model(language.logits, nats), seals, seed)
        except prepare.Crash as crash:
            found.append(str(crash))
    return found


def examine(language: Language, logits_of: LogitsOf, seals: int, seed: int) -> float:
    with seeded_probe(seed):
        reserve = language.reserve[:seals]
        return referee.examine(logits_of, language.shown, reserve, BYTES_OF, SCALE)


def loss(language: Language, logits_of: LogitsOf) -> float:
    """Return the bits per byte that a model would have without the probe."""
    losses = prepare.answers(logits_of, language.shown, language.shown[:, 1:], SCALE)
    return prepare.bits_per_byte(losses, language.shown, BYTES_OF)


# ---------------------------------------------------------------------------
# Rates
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("seals", [5, 16, 48])
def test_an_honest_model_raises_no_alarm(language, seals):
    """Nor did it in 2,000 examinations."""
    assert alarms(language, honest, 0.0, seals, 70) == []


@pytest.mark.gate
def test_rounding_that_differs_from_call_to_call_raises_no_alarm(language):
    assert alarms(language, unsteady, 0.0001, 16, 60) == []


# The share of single examinations that miss a model, as 400 were counted.
MISSES = [
    (unsteady, 0.003, 16, 0.0),
    (peeks, 0.003, 16, 0.0),
    (peeks_rarely, 4.0, 16, 0.0),
    (peeks_two_ahead, 0.05, 16, 0.0),
    (oracle, 2.0, 16, 0.0),
    pytest.param(oracle, 1.0, 48, 0.0175, marks=pytest.mark.gate),
    pytest.param(oracle, 1.0, 32, 0.04, marks=pytest.mark.gate),
]


@pytest.mark.parametrize("model, nats, seals, share", MISSES)
def test_a_cheat_is_missed_no_more_often_than_was_measured(language, model, nats, seals, share):
    """Three standard errors more are granted: a change of the draw may not turn the verdict."""
    calls = 40
    missed = calls - len(alarms(language, model, nats, seals, calls))
    assert missed <= calls * share + 3 * math.sqrt(calls * share * (1 - share))
    if model is not unsteady:
        honest_loss = loss(language, honest(language.logits, 0.0))
        assert loss(language, model(language.logits, nats)) < honest_loss, "it gains nothing"


def test_losses_that_fall_while_it_is_asked_are_noticed_and_others_are_not():
    """By 0.15 standard deviations from the first row to the last one, and by 1.2."""
    chance = np.random.default_rng(2)
    for _ in range(300):
        losses = chance.gamma(2.0, 1.0, (1024, 16))
        slope = losses.mean(axis=1).std() * np.linspace(0, 1, 1024)[:, None]
        referee.check_order(losses - 0.15 * slope)
        with pytest.raises(prepare.Crash, match="it learns as it is asked"):
            referee.check_order(losses - 1.2 * slope)


# ---------------------------------------------------------------------------
# The draw
# ---------------------------------------------------------------------------


def test_the_score_is_that_of_the_rows_alone_whatever_is_drawn(language):
    logits_of = honest(language.logits, 0)
    scores = [examine(language, logits_of, SEALS, seed) for seed in range(3)]
    assert scores == pytest.approx([loss(language, logits_of)] * 3, abs=1e-6)


def test_the_draw_is_another_one_in_every_examination(language):
    """And not to be foreseen: it is of the system's own randomness."""
    asked: list[list[torch.Tensor]] = [[], []]
    for queries in asked:
        noted = lambda x, queries=queries: queries.append(x) or language.logits[x]  # noqa: E731
        referee.examine(noted, language.shown, language.reserve, BYTES_OF, SCALE)
    first, second = map(torch.cat, asked)
    assert first.shape == second.shape and not torch.equal(first, second)


@st.composite
def draws(draw):
    """Arguments of order_queries: rows, sealed rows, rows with decoys, the size of a query."""
    rows = draw(st.integers(2, 200))
    paired = draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=48, unique=True))
    sealed = sorted(draw(st.lists(st.integers(0, 20), max_size=48)))
    size = draw(st.integers(1, 40))
    return rows, np.array(sealed, int), np.array(paired), size, draw(st.integers(0, 2**32))


@settings(derandomize=True, deadline=None, max_examples=300)
@given(draws())
def test_second_sights_come_a_query_later_and_the_end_is_made_of_them_alone(drawn):
    rows, sealed, paired, size, seed = drawn
    order = referee.order_queries(rows, sealed, paired, size, np.random.default_rng(seed))
    first_sights = rows + len(sealed)
    total = first_sights + len(paired)
    assert sorted(order) == list(range(total))
    place = np.argsort(order)
    last = size + total % size  # rows of the last whole query, and of what remains
    end = total - min(last, len(paired))
    assert (order[end:] >= first_sights).all()
    first, second = place[paired], place[first_sights:]
    assert ((second - first >= size) | (second >= end)).all()
    for row in set(sealed.tolist()):  # at rising cuts, as they are listed
        assert (np.diff(place[rows:first_sights][sealed == row]) > 0).all()
    if len(paired) >= last:  # else they are too few to fill the end, and one query may have both
        assert (second // size > first // size).all()


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.integers(0, 2**32), st.integers(1, 48))
def test_a_decoy_is_its_original_up_to_the_cut_and_goes_on_like_another_row(language, seed, count):
    chance = np.random.default_rng(seed)
    originals, cuts = language.reserve[:count], chance.integers(0, T - 1, count)
    decoys = referee.decoys_of(originals, cuts, language.shown, chance)
    for decoy, original, cut in zip(decoys, originals, cuts, strict=True):
        assert (decoy[: cut + 1] == original[: cut + 1]).all()
        assert decoy[cut + 1] != original[cut + 1]
        assert (language.shown[:, cut + 1 :] == decoy[cut + 1 :]).all(axis=1).any()
