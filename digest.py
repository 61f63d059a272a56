"""What the language model is shown of a run: the same bytes for the same history, and never more
than TOKENS_MOST of them, after ten experiments or ten thousand.

Built from the journal alone, stable parts first, so that a call can read most of it from a cache.
"""

from __future__ import annotations

import ast
import html
import math
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from journal import CURVE, ROOT, Experiment, Run, one_line, parse
from prepare import load_tokenizer
from proposals import sampler_view

TOKENS_MOST = 30_000  # of one call, by the tokenizer of the rows: an estimate, mostly too high
PROGRAM_MOST = 9_000  # characters of program.md
LAST, BEST, NEAR = 20, 10, 15  # experiments that have a line of their own
PLATEAU = 10  # candidates without a keep, then another kind of idea is asked for
# val_bpb that e times the tokens are worth, about: at `cpu` 1.324 → 1.181 from 30 to 60 seconds,
# at `gpu` 1.008 → 0.998 for 18 % of the steps.
TOKENS_WORTH = {"cpu": 0.2, "gpu": 0.05}
BULLET = re.compile(r"^([-*+]|\d+[.)]) (\[ \] )?")
FACE = ("Scale", "current_scale", "device_type", "run_seed", "batches", "evaluate", "finish")


# ---------------------------------------------------------------------------
# The best, and the last run beside it
# ---------------------------------------------------------------------------


def signed(gain: float | None) -> str:
    """A gain as the change of val_bpb that it is."""
    return "no score" if gain is None else f"{0.0 - gain:+.6f}"


def card(run: Run, sigma: float) -> list[str]:
    """What is known of the best."""
    best = run.best()

    def measured(number: int) -> str:
        values = run.values_of(number)
        error = sigma / math.sqrt(len(values))
        return f"val_bpb {statistics.fmean(values):.6f} ± {error:.6f} (of {len(values)} runs)"

    speed = f"{statistics.fmean(best.speeds):.4f} M tokens/s, " if best.speeds else ""
    limit = f" of {run.scale['device_gb']:.1f}" if "device_gb" in run.scale else ""
    first = run.history[0].knobs
    moved = [f"{name} {value:g} (was {first[name]:g})" for name, value in best.knobs.items()
             if name in first and value != first[name]]
    lines = [
        f"It has {measured(best.number)}, the baseline {measured(0)}.",
        f"{best.steps:.0f} steps, {best.tokens_M:.2f} M tokens, {speed}memory "
        f"{best.memory_gb:.1f}{limit} GB, {best.params_M:.2f} M parameters.",
        f"Two runs of the same code differ by about {sigma:.6f} (sigma): a smaller gain is noise "
        "until it is repeated.",
    ]
    if best.printed:
        lines.append(f"It says of itself: <log>{html.escape(best.printed, quote=False)}</log>")
    return lines + (["Constants moved so far: " + ", ".join(moved)] if moved else [])


def tokens_gain(done: Experiment, base: Experiment, scale: str) -> float | None:
    """What more or fewer tokens were worth in val_bpb, about; None where that is not known."""
    if scale not in TOKENS_WORTH or not (done.tokens_M > 0 and base.tokens_M > 0):
        return None
    return TOKENS_WORTH[scale] * math.log(done.tokens_M / base.tokens_M)


def compare(run: Run, done: Experiment, base: Experiment) -> list[str]:
    """The last run's loss curve beside the one of what it was made of, and where a gain is from."""
    lines = []
    if done.curve and base.curve:
        rows = [["training loss at", *(f"{at} %" for at in CURVE)],
                ["this run", *(f"{loss:.4f}" for loss in done.curve)],
                [f"experiment {base.number}", *(f"{loss:.4f}" for loss in base.curve)]]
        lines = [f"{name:16}" + "".join(f"{cell:>9}" for cell in row) for name, *row in rows]
    by_tokens = tokens_gain(done, base, run.scale["name"])
    if by_tokens is not None and done.gain is not None:
        share = 100 * (done.tokens_M / base.tokens_M - 1)
        lines.append(f"It trained on {share:+.1f} % tokens, worth about {signed(by_tokens)}; the "
                     f"other {signed(done.gain - by_tokens)} are better or worse steps.")
    return lines


# ---------------------------------------------------------------------------
# What was tried
# ---------------------------------------------------------------------------


def line_of(done: Experiment) -> str:
    """One experiment in one line."""
    why = done.reason.partition(":")[0]  # what hidden says is not for the model
    why = f" [{why}]" if why and done.status != "crash" else ""
    score = "no score"
    if done.status != "crash":
        score = f"{done.val_bpb():.6f} ({signed(done.gain)}), "
        score += f"{done.runs} runs, {done.steps:.0f} steps"
    moved = [f"{n} {a:g} → {b:g}" for n, (a, b) in done.moved.items() if n not in done.description]
    values = f" {{{', '.join(moved[:6])}}}" if moved else ""
    return f"{done.number}. {done.status}, {score}: {done.description}{values}{why}"


def near_misses(tried: list[Experiment], sigma: float) -> list[str]:
    """Dropped within one sigma of a gain or loss, the best first, and what was made of them."""
    later: dict[int, list[Experiment]] = {}
    for e in tried:
        for number in e.combines:
            later.setdefault(number, []).append(e)
    close = [e for e in tried if e.status == "discard" and e.believed()
             and e.gain is not None and e.gain > -sigma]
    close = sorted(close, key=lambda e: (-e.gain, e.number))[:NEAR]

    def line(e: Experiment) -> str:
        since = [f"{c.number} ({c.status}, {signed(c.gain)})" for c in later.get(e.number, [])]
        return line_of(e) + (f"; combined in {', '.join(since)}" if since else "")

    return [line(e) for e in close]


def alone(done: Experiment) -> bool:
    """Whether one constant is all that it changes."""
    return len(done.moved) == len(done.places) == 1


def by_knob(old: list[Experiment], run: Run) -> list[str]:
    """Values of constants that were moved alone, and the change of val_bpb that each made."""
    tried: dict[str, dict[float, list[float]]] = {}
    for e in old:
        if alone(e) and e.gain is not None:
            ((name, (_, value)),) = e.moved.items()
            tried.setdefault(name, {}).setdefault(value, []).append(e.gain)
    lines = []
    for name, values in tried.items():
        gains = {value: statistics.fmean(each) for value, each in values.items()}
        shown = sorted(sorted(gains, key=gains.get, reverse=True)[:8])
        cells = [f"{v:g} {-1000 * gains[v]:+.1f}e-3" for v in shown]
        now = run.best().knobs.get(name)
        lines.append(f"{name}: {', '.join(cells)}" + (f", best {now:g}" if now is not None else ""))
    return lines


def by_family(old: list[Experiment]) -> list[str]:
    """Ideas by their kind and by the definitions that they changed; the most frequent first."""
    families: dict[str, list[Experiment]] = {}
    for e in old:
        if not alone(e) or e.gain is None:
            where = ", ".join(e.places[:3]) or "unknown"
            where = f"{len(e.moved)} constants" if len(e.moved) == len(e.places) > 1 else where
            families.setdefault(f"{e.kind or 'idea'}, {where}", []).append(e)
    lines = []
    for name, found in sorted(families.items(), key=lambda f: (-len(f[1]), f[0])):
        count = Counter(e.status for e in found)
        gains = [e.gain for e in found if e.gain is not None]
        best = f", best {signed(max(gains))}" if gains else ""
        said = ", ".join(f"{n} {status}" for status, n in sorted(count.items()))
        lines.append(f"{name}: {said}{best}")
    return lines


def causes(tried: list[Experiment]) -> list[str]:
    """Crashes by what they said last, the most frequent first."""
    found: dict[str, list[Experiment]] = {}
    for e in tried:
        if e.status == "crash":
            found.setdefault(re.sub(r"\d+", "#", e.reason)[:80], []).append(e)
    lines = []
    for crashed in sorted(found.values(), key=lambda c: (-len(c), -c[-1].number)):
        last = crashed[-1]  # what it said could end the fence itself
        said = html.escape(one_line(last.reason, 300), quote=False)
        lines.append(f"{len(crashed)}x, last {last.number} ({one_line(last.description, 100)}): "
                     f"<log>{said}</log>")
    return lines


def open_ideas(text: str, tried: list[Experiment]) -> list[str]:
    """The lines of ideas.md that are no heading and not ticked off, and what became of each."""
    lines = [line.strip() for line in text.splitlines()]
    ticked = re.compile(r"#|<!--|([-*+]|\d+[.)]) \[[xX]\]")
    ideas = [one_line(BULLET.sub("", line)) for line in lines if line and not ticked.match(line)]
    taken: dict[str, list[str]] = {}
    for e in tried:
        if e.idea:
            said = BULLET.sub("", e.idea.partition(" (taken up: ")[0])  # as it is shown here
            taken.setdefault(said, []).append(f"{e.number} {e.status} {signed(e.gain)}")
    return [f"- {each}" + (f" (taken up: {', '.join(taken[each])})" if each in taken else "")
            for each in ideas]


def plateau(run: Run) -> list[str]:
    """What is asked for when nothing was kept for long."""
    tried, since = run.experiments(), run.drops()
    if since < PLATEAU:
        return []
    kinds = Counter(e.kind or "idea" for e in tried[-since:])
    said = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
    again = "still nothing is kept" if since >= 2 * PLATEAU else "nothing is kept"
    lines = [f"{again.capitalize()}, for {since} experiments ({said}). Propose another kind of "
             "idea than these: a change of structure, a removal, two near misses combined, or a "
             "retry of what failed before the best was what it is."]
    if since >= 2 * PLATEAU:
        kept = [f"{e.number}. ({signed(e.gain)}) {e.description}" for e in tried[::-1]
                if e.status == "keep"]
        lines += ["What was kept, to build on:", *kept] if kept else []
    return lines


# ---------------------------------------------------------------------------
# The whole
# ---------------------------------------------------------------------------


def fit(lines: list[str], characters: float) -> list[str]:
    """As many of the first lines as there is room for, and the number of the others."""
    used = 0
    for n, line in enumerate(lines):
        used += len(line) + 1
        if used > characters:
            return [*lines[:n], f"({len(lines) - n} more)"]
    return lines


def digest(run: Run, ideas: str = "", room: float = 1.0) -> str:
    """The history: what was tried, what came of it, how sure that is. `room` 1 is all of it."""
    tried, best, sigma = run.experiments(), run.best(), run.noise().sigma
    known = {e.number: e for e in reversed(run.history)}  # the first of a number, not repeats
    old = tried[:-LAST]
    top = [e for _, e in run.ranked([e for e in old if e.believed()])[:BEST]]
    queue = [f"{p.number}. {p.description}" for p in run.running]
    parts = [
        (f"The best is experiment {best.number}: {best.description}.", card(run, sigma), math.inf),
        ("The last 20, newest first, with val_bpb and its change from the best of that time:",
         [line_of(e) for e in tried[: -LAST - 1 : -1]], 8000),
        ("The 10 best of the older ones:", [line_of(e) for e in top], 4000),
        ("Near misses, dropped within one sigma of the best of their time:",
         near_misses(tried, sigma), 4000),
        ("Of the older ones, constants moved alone (value and change of val_bpb):",
         by_knob(old, run), 7000),
        ("Of the older ones, all others, by kind and by what they touched:",
         by_family(old), 4000),
        ("Crashes by cause:", causes(tried), 3000),
        ("What an optimiser of the constants makes of them:", sampler_view(run), 1500),
        ("Under way, their results are not known yet:", queue, 3000),
        ("What people want tried, from ideas.md; name the line that you take up:",
         open_ideas(ideas, tried), 4000),
        ("", plateau(run), 4000),
    ]  # fmt: skip
    if tried and tried[-1].base in known:
        last = compare(run, tried[-1], known[tried[-1].base])
        parts.insert(1, (f"The last run, experiment {tried[-1].number}:", last, math.inf))
    shown = [[title, *fit(lines, room * most)] for title, lines, most in parts if lines]
    whole = [f"# History\n\n{len(tried)} experiments so far."]
    return "\n\n".join([*whole, *("\n".join(filter(None, part)) for part in shown)])


def public_face(source: str) -> str:
    """What train.py may call of prepare.py: signatures and docstrings."""
    module = parse(source)
    parts = [f'"""{ast.get_docstring(module)}"""']
    for node in module.body:
        if getattr(node, "name", "") in FACE:
            if isinstance(node, ast.FunctionDef):
                node.body = node.body[: bool(ast.get_docstring(node))] or parse("...").body
            parts.append(ast.unparse(node))
    return "\n\n\n".join(parts) + "\n"


def count_tokens(texts: list[str], rows: str) -> int:
    """Tokens of texts, by the tokenizer of a folder of rows."""
    encoding = load_tokenizer(Path(rows))[0]
    return sum(map(len, encoding.encode_ordinary_batch(texts)))


def prompt(run: Run, program: str, contract: str, ideas: str = "") -> dict[str, Any]:
    """System and first message, stable parts first, each with a mark to cache up to it."""

    def block(text: str) -> dict[str, Any]:  # one hour: the next call comes after a whole training
        cache = {"type": "ephemeral", "ttl": "1h"}
        return {"type": "text", "text": text, "cache_control": cache}

    if len(program) > PROGRAM_MOST:
        program = program[:PROGRAM_MOST] + "\n(program.md goes on, too long to be shown)\n"
    face = public_face((ROOT / "prepare.py").read_text(encoding="utf-8"))
    stable = [
        program + contract,
        f"# prepare.py, the referee, which nobody edits: what you may call\n\n```python\n{face}```",
        f"# train.py, the best so far, which you edit\n\n```python\n{run.source_of(run.best())}```",
    ]
    rows = (run.tiny or run.scale)["rows"]
    left = TOKENS_MOST - count_tokens(stable, rows)
    for room in (1.0, 0.7, 0.5, 0.35, 0.25, 0.15, 0.08):
        history = digest(run, ideas, room) + "\n\nPropose the next experiment."
        if count_tokens([history], rows) <= left:
            break
    content = [*map(block, stable[1:]), {"type": "text", "text": history}]
    return {"system": [block(stable[0])], "messages": [{"role": "user", "content": content}]}
