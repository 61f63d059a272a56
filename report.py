"""The morning: what is real, what was luck, and what to type.

    python agent.py report              # of the last run, from its commits
    python agent.py report --tag a1     # of another one
    python agent.py report FILE.tsv     # of any results.tsv with the field's five columns

Prints a summary and writes progress.png and report.html, one file that needs no network.
"""

from __future__ import annotations

import argparse
import base64
import difflib
import html
import io
import itertools
import math
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

from digest import causes, near_misses, open_ideas, signed, tokens_gain
from journal import (
    ROOT,
    Experiment,
    Run,
    git,
    kept_range,
    one_line,
    read_journal,
    undisturbed,
)
from prepare import SetupError, scale_named, write_atomic
from rule import AT_ONCE, Noise

CONFIDENCE = 0.95
KEPT_AGAIN = 1.5  # standard errors, about: what more than one run needs
FIELD_SIGMA = 0.0003  # of a 5-minute run on an H100, where a file says nothing of repeats
LABELS = 25  # keeps with a name in the picture
SHOWN = 200  # keeps with their diffs in the page
DIFF_LINES = 400
LIGHT = {"text": "#222222", "page": "#ffffff", "drop": "#b0b0b0", "keep": "#1f7a3d",
         "measure": "#b36b00", "band": "#1f7a3d"}  # fmt: skip
DARK = {"text": "#dddddd", "page": "#16181c", "drop": "#5c6068", "keep": "#57c785",
        "measure": "#e0a040", "band": "#57c785"}  # fmt: skip


# ---------------------------------------------------------------------------
# Arithmetic
# ---------------------------------------------------------------------------


def student(freedom: float, confidence: float = CONFIDENCE) -> float:
    """Two-sided quantile of Student's t (Abramowitz and Stegun 26.7.5); 3 % off at 3 degrees."""
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96,
             (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)  # fmt: skip
    return z + sum(term / freedom ** (n + 1) for n, term in enumerate(terms))


def half_width(noise: Noise, runs: int) -> float:
    """Half the 95 % interval of the mean of so many runs."""
    return student(noise.freedom) * noise.sigma / math.sqrt(runs)


def false_keep(gain: float, error: float) -> float:
    """Probability that there is no gain, before anything is known of how frequent gains are."""
    return 1 - statistics.NormalDist().cdf(gain / error) if error else 0.0


# ---------------------------------------------------------------------------
# What is reported, of a run of ours or of somebody's file
# ---------------------------------------------------------------------------


@dataclass
class Point:
    """One row: a judged experiment, the baseline or a repeated measurement."""

    number: int
    val_bpb: float
    status: str
    description: str
    error: float = 0.0  # standard error of val_bpb


@dataclass
class Report:
    """All that the page says."""

    title: str
    points: list[Point]
    words: list[str] = field(default_factory=list)  # the verdict
    type_this: list[tuple[str, str]] = field(default_factory=list)  # (what for, command)
    keeps: list[dict[str, Any]] = field(default_factory=list)
    lists: list[tuple[str, list[str]]] = field(default_factory=list)
    spans: list[tuple[float, float, str, str]] = field(default_factory=list)  # start, end, kind
    times: dict[str, float] = field(default_factory=dict)  # seconds by what they went to
    sigma: float = math.nan


def read_field(path: Path) -> Report:
    """Any results.tsv. Raises SetupError if it has not the field's columns."""
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except OSError as error:
        raise SetupError(f"{path}: {error.strerror}", "ls *.tsv") from error
    names = lines[0].strip().split("\t") if lines else []
    missing = [n for n in ("val_bpb", "status", "description") if n not in names]
    if missing:
        said = f"{path} has no column {', '.join(missing)}"
        raise SetupError(said, f"head -1 {path}  # tab-separated, with a header")
    points = []
    for line in filter(str.strip, lines[1:]):
        row = dict(zip(names, line.split("\t"), strict=False))
        try:
            value = float(row.get("val_bpb", ""))
        except ValueError:
            value = math.nan
        status = row.get("status", "").strip().lower()
        value = value if value > 0 and status != "crash" and math.isfinite(value) else math.nan
        points.append(Point(len(points), value, status, one_line(row.get("description", ""))))
    report = Report(path.name, points)
    scored = [p for p in points if not math.isnan(p.val_bpb)]
    count = {s: sum(p.status == s for p in points) for s in ("keep", "discard", "crash")}
    report.words = [f"{len(points)} rows: {count['keep']} keep, {count['discard']} discard, "
                    f"{count['crash']} crash."]  # fmt: skip
    if not scored:
        report.words.append("No row has a score.")
        return report
    kept = [p for p in scored if p.status == "keep"] or scored
    first, best = scored[0], min(kept, key=lambda p: p.val_bpb)
    change = signed(first.val_bpb - best.val_bpb)
    report.words.append(f"Baseline {first.val_bpb:.6f}, best {best.val_bpb:.6f} (row "
                        f"{best.number}: {best.description}), {change}.")
    if "runs" in names:
        report.words.append("Its runs were repeated, which the commits tell more of: python "
                            "agent.py report --tag NAME, where they are.")
    else:
        report.words += doubts(points, first)
    return report


def doubts(points: list[Point], first: Point) -> list[str]:
    """What noise may have made of a night in which each run was made once."""
    kept, low, gains = [], first.val_bpb, []
    for p in points:
        if p.status == "keep" and not math.isnan(p.val_bpb) and p is not first:
            gains.append(low - p.val_bpb)
            kept.append(p)
            low = p.val_bpb
    if not gains:
        return ["Nothing was kept beyond the baseline."]
    error = FIELD_SIGMA * math.sqrt(2)
    small = sum(gain < 2 * error for gain in gains)
    false = sum(false_keep(gain, error) for gain in gains)
    top = sum(sorted(gains, reverse=True)[:5])
    words = [f"Each run was made once. If two runs of the same code differ by {FIELD_SIGMA} (a "
             f"5-minute run on an H100), {small} of {len(gains)} keeps are within two standard "
             f"errors of nothing, and about {false:.1f} gained nothing at all."]
    if sum(gains) > 0:
        words.append(f"The 5 largest keeps carry {100 * top / sum(gains):.0f} % of the gain.")
    return words


def read_run(tag: str | None) -> tuple[Run, Path]:
    """A run as its commits tell it, by default the last one, and the folder for its report."""
    refs = ("--format=%(refname)", "--sort=-committerdate", "refs/autoresearch-measure")
    tags = [ref.split("/")[2] for ref in git("for-each-ref", *refs).split() if ref.endswith("/0")]
    if not tags or tag not in (None, *tags):
        said = f"there is no run {tag}" if tag else "there is no run yet"
        raise SetupError(said, "python agent.py --experiments 8")
    journal = read_journal(tag or tags[0])
    name, budget, clock, *_ = journal[0][1].split()
    settings = scale_named(name)
    scale = {"name": name, "budget": float(budget), "clock": clock, "sigma": settings.sigma}
    run = Run(tag or tags[0], scale, journal[0][0].commit, [done for done, _ in journal])
    return run, ROOT / "runs" / run.tag


def report_run(run: Run) -> Report:
    """What a run of ours comes to."""
    noise, best = run.noise(), run.best()
    points = [Point(e.after if e.status == "measure" else e.number, e.val_bpb(), e.status,
                    e.description, noise.sigma / math.sqrt(max(1, len(e.values))))
              for e in run.history]  # fmt: skip
    report = Report(f"autoresearch/{run.tag}", points, sigma=noise.sigma)
    report.words = verdict(run, noise)
    report.keeps = [kept_commit(run, e, noise) for e in run.experiments() if e.status == "keep"]
    tried = run.experiments()
    near = near_misses(tried, noise.sigma)
    ideas = ROOT / "ideas.md"
    text = ideas.read_text(encoding="utf-8", errors="replace") if ideas.exists() else ""
    crashed = [html.unescape(line.replace("<log>", "").replace("</log>", ""))
               for line in causes(tried)]  # fmt: skip
    again = found(run).read_text("utf-8").splitlines() if found(run).exists() else []
    report.lists = [("What `promote` found, by fresh runs", again),
                    ("Near misses, worth combining", near), ("Crashes by cause", crashed),
                    ("What became of ideas.md", open_ideas(text, tried))]  # fmt: skip
    if any(e.status == "keep" for e in tried):
        report.type_this.append(("take what was kept",
                                 f"git cherry-pick {kept_range(run)}"))
    # By the referee: it is a program that a language model wrote, and runs in the sandbox alone.
    again = f"git show {best.commit[:7]}:train.py > runs/again/train.py"
    again = f"mkdir -p runs/again && {again} && python referee.py runs/again"
    report.type_this.append(("run the best again, in the sandbox", again))
    tell_time(run, report)
    return report


def found(run: Run) -> Path:
    """Where agent.py promote leaves its conclusions."""
    return run.folder(0).parent / "promote.txt"


def gain_of(run: Run, noise: Noise) -> tuple[float, float, list[float], float]:
    """(the best's gain over the baseline, half its 95 % interval, the best's values that it is
    judged by, and what was taken off since runs that it was chosen by are among them)."""
    base, best = run.scores_of(0), run.best()
    fresh = undisturbed([e for e in run.of(best.number) if e.status == "measure"])
    scores = fresh or run.scores_of(best.number)
    gain, error = noise.compare(base, scores)
    # The first keep that drew the same numbers was kept for their luck too, which the best has.
    common = ((e, undisturbed([e]).keys() & scores.keys()) for e in run.tried())
    kept = [(e, len(keys) / len(scores)) for e, keys in common if e.status == "keep" and keys]
    luck = max((luck_of(run, e, noise) * share for e, share in kept[:1] + kept[-1:] if e.number),
               default=0.0)  # on average; tests/benchmarks/simulate.py says how far off it is
    half = student(noise.freedom) * math.hypot(error, luck / 2)
    return gain - luck, half, list(scores.values()), luck


def luck_of(run: Run, done: Experiment, noise: Noise) -> float:
    """What the gain of a keep is too large by, on average, as it was kept for being so large.

    The mean of a normal variable above a bar is above its mean by the inverse Mills ratio, here at
    the distance to the bar that was measured. The bar is AT_ONCE for one run, KEPT_AGAIN for
    more, in standard errors; tests/benchmarks/simulate.py says how often the interval then holds
    the truth.
    """
    if done.gain is None or done.reason:
        return 0.0  # simpler, or adopted: not kept for its gain
    error, normal = keep_error(run, done, noise), statistics.NormalDist()
    above = done.gain / error - (KEPT_AGAIN if len(done.values) > 1 else AT_ONCE)
    return error * normal.pdf(above) / normal.cdf(above)


def verdict(run: Run, noise: Noise) -> list[str]:
    """Baseline, best and gain with their 95 % intervals, and what of it may be luck."""
    best, first = run.best(), run.history[0]
    tried = run.experiments()
    count = {s: sum(e.status == s for e in tried) for s in ("keep", "discard", "crash")}
    words = [f"{len(tried)} experiments: {count['keep']} kept, {count['discard']} dropped, "
             f"{count['crash']} crashed."]  # fmt: skip

    def mean(values: list[float]) -> str:
        half = half_width(noise, len(values))
        return f"{statistics.fmean(values):.6f} ± {half:.6f} ({len(values)} runs)"

    base = run.values_of(0)
    if not count["keep"]:
        half = math.sqrt(2) * half_width(noise, len(base))
        words.append(f"Baseline {mean(base)}. Nothing was kept: the gain is 0, and what a gain of "
                     f"nothing looks like is ± {half:.6f}.")
    else:
        gain, half, values, luck = gain_of(run, noise)
        words.append(f"Baseline {mean(base)}, best {mean(values)}: experiment {best.number}, "
                     f"{best.description}.")
        real = "real" if gain > half else "not told from nothing"
        words.append(f"The gain is {gain:.6f} ± {half:.6f} (95 %): {real}.")
        if round(luck, 6):
            words.append("The best is judged by runs that it was chosen by; what that makes it too "
                         f"good by, {luck:.6f}, is taken off.")
        low = min(v for e in run.history for v in e.values if e.believed())
        claimed = first.values[0] - low if first.values else math.nan
        if claimed > 0:
            share = 100 * min(1.0, max(0.0, 1 - gain / claimed))
            words.append(f"The lowest single number is {low:.6f}: a search that believes it "
                         f"claims {claimed:.6f}, of which {share:.0f} % is luck.")
        false = sum(false_keep(e.gain, keep_error(run, e, noise)) for e in tried
                    if e.status == "keep" and e.gain is not None)  # fmt: skip
        words.append(f"Of {count['keep']} keeps about {false:.1f} may have gained nothing.")
    words.append(f"Two runs of the same code differ by {noise.sigma:.6f} (sigma, "
                 f"{noise.freedom:.0f} degrees of freedom); {noise.shared:.2f} of the variance is "
                 "shared by two versions of it that draw the same numbers on one seed.")
    return words


def keep_error(run: Run, done: Experiment, noise: Noise) -> float:
    """Standard error of a gain, by the runs of both sides as they were then."""
    then = [e for e in run.of(done.base) if e.order < done.order] or run.of(done.base)
    return noise.compare(undisturbed(then), undisturbed([done]))[1]


def kept_commit(run: Run, done: Experiment, noise: Noise) -> dict[str, Any]:
    """What is to be known of a commit before it is taken."""
    base = next((e for e in run.history if e.number == done.base), run.history[0])
    old, new = run.source_of(base).splitlines(), run.source_of(done).splitlines()
    diff = list(difflib.unified_diff(old, new, "before", "after", lineterm="", n=2))
    added = sum(line.startswith("+") for line in diff[2:])
    half = student(noise.freedom) * keep_error(run, done, noise)
    hidden = [run.scores_of(done.base, "hidden"), undisturbed([done], "hidden")]
    by_tokens = tokens_gain(done, base, run.scale["name"])
    facts = {"commit": done.commit[:7], "number": done.number, "description": done.description,
             "hypothesis": done.hypothesis, "runs": len(done.values), "diff": diff[:DIFF_LINES],
             "lines": f"+{added} −{sum(line.startswith('-') for line in diff[2:])} lines",
             "gain": "adopted" if done.gain is None else f"{done.gain:.6f} ± {half:.6f}"}
    if all(hidden):
        gain, _ = noise.compare(*hidden)
        facts["hidden"] = f"{gain:.6f} on the hidden split"
    if by_tokens is not None and done.gain is not None:
        facts["speed"] = f"{by_tokens:.6f} by tokens trained, {done.gain - by_tokens:.6f} per step"
    return facts


def tell_time(run: Run, report: Report) -> None:
    """Where the seconds of the night went."""
    timed = sorted((e for e in run.history if e.began and e.ended), key=lambda e: e.began)
    if not timed:
        return
    begin, end = timed[0].began, max(e.ended for e in timed)
    covered = begin
    down = 0.0
    for e in timed:  # of several slots one is enough
        if e.began > covered:
            down += e.began - covered
        covered = max(covered, e.ended)
        report.spans.append((e.began - begin, e.ended - begin, e.status, f"{e.number}"))
    training = sum(e.training_seconds for e in timed)
    evaluation = sum(e.evaluation_seconds for e in timed)
    busy = sum(e.seconds for e in timed)
    report.times = {"training": training, "evaluation": evaluation,
                    "start and end": max(0.0, busy - training - evaluation), "idle or down": down}
    spent = sum(e.cost_usd for e in run.history)
    tokens = sum(e.tokens_in + e.tokens_out for e in run.history)
    kept = sum(e.status == "keep" for e in run.experiments())
    at_work = busy / max(1.0, end - begin - down)  # an idea may wait between its runs
    slots = max(1, math.ceil(at_work - 0.05))
    share = min(100, 100 * training / max(1.0, slots * (end - begin)))
    where = f" on {slots} slots" if slots > 1 else ""
    report.words.append(f"{(end - begin) / 3600:.1f} hours{where}, {share:.0f} % of them training.")
    if tokens:
        cached, each = sum(e.tokens_cached for e in run.history), spent / len(run.experiments())
        report.words.append(
            f"{tokens / 1e6:.2f} M tokens of the language model, {cached / 1e6:.2f} M of them "
            f"cached, ${spent:.2f}: ${each:.3f} an experiment, "
            + (f"${spent / kept:.2f} a kept commit." if kept else "no commit kept."))  # fmt: skip


# ---------------------------------------------------------------------------
# The picture
# ---------------------------------------------------------------------------


def draw(report: Report, colours: dict[str, str], width: float = 10.0) -> bytes:
    """The progress picture as PNG: drops faint, keeps named, the best as a line with its sigma."""
    from matplotlib.figure import Figure

    figure = Figure((width, 5.0), dpi=110, layout="constrained", facecolor=colours["page"])
    axes = figure.add_subplot(facecolor=colours["page"])
    scored = [p for p in report.points if not math.isnan(p.val_bpb)]
    groups = {"drop": [p for p in scored if p.status not in ("keep", "measure")],
              "measure": [p for p in scored if p.status == "measure"],
              "keep": [p for p in scored if p.status == "keep"]}  # fmt: skip
    if scored:
        kept = groups["keep"] or scored[:1]
        steps = [*itertools.accumulate((p.number for p in (*kept, scored[-1])), max)]  # by slots
        lows = [p.val_bpb for p in kept] + [kept[-1].val_bpb]
        axes.step(steps, lows, where="post", color=colours["keep"], label="best")
        if report.sigma > 0:
            low, high = ([v + s * report.sigma for v in lows] for s in (-1, 1))
            axes.fill_between(steps, low, high, step="post", color=colours["band"], alpha=0.15,
                              linewidth=0, label="one sigma")  # fmt: skip
        limits(axes, scored, kept)
    names = {"drop": "dropped", "measure": "the best again", "keep": "kept"}
    for kind, found in groups.items():
        if found:
            axes.errorbar([p.number for p in found], [p.val_bpb for p in found],
                          yerr=[p.error for p in found] if report.sigma > 0 else None,
                          fmt="o", markersize=3 if kind == "drop" else 5, color=colours[kind],
                          elinewidth=0.7, alpha=0.6 if kind == "drop" else 1, label=names[kind])
    for p in groups["keep"][-LABELS:]:
        axes.annotate(one_line(p.description, 34), (p.number, p.val_bpb), fontsize=7, rotation=25,
                      xytext=(3, 4), textcoords="offset points", color=colours["text"],
                      parse_math=False)  # fmt: skip
    axes.set_xlabel("experiment", color=colours["text"])
    axes.set_ylabel("val_bpb, lower is better", color=colours["text"])
    axes.tick_params(colors=colours["text"])
    axes.grid(alpha=0.2)
    for edge in axes.spines.values():
        edge.set_color(colours["drop"])
    if scored:
        axes.legend(fontsize=8, labelcolor=colours["text"], facecolor=colours["page"])
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def limits(axes: Any, scored: list[Point], kept: list[Point]) -> None:
    """Leave out far worse ones, or the gains could not be seen."""
    low, high = min(p.val_bpb for p in scored), max(p.val_bpb for p in kept)
    room = max(high - low, 4 * max(p.error for p in kept), 1e-6)
    worst = max(p.val_bpb for p in scored)
    axes.set_ylim(low - 0.25 * room, min(worst + 0.25 * room, high + 1.5 * room))


# ---------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------

PAGE = Template("""\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: auto; padding: 1rem;
  color: light-dark(#222, #ddd); background: light-dark(#fff, #16181c); overflow-wrap: anywhere }
img, svg { max-width: 100%; height: auto }
code, pre { font: 13px/1.45 ui-monospace, monospace }
pre { overflow-x: auto; padding: .6rem; background: light-dark(#f4f4f4, #22252b) }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: 14px }
td, th { text-align: left; padding: .15rem .7rem .15rem 0; vertical-align: top }
details { margin: .4rem 0 } summary { cursor: pointer }
.add { color: light-dark(#1f7a3d, #57c785) } .cut { color: light-dark(#b3261e, #ff8a80) }
.note { opacity: .75 }
</style></head><body>
<h1>$title</h1>
$words
<picture><source srcset="data:image/png;base64,$dark" media="(prefers-color-scheme: dark)">
<img alt="val_bpb by experiment" src="data:image/png;base64,$light"></picture>
$parts
<p class="note">Written $date.</p>
</body></html>
""")


def quote(text: object) -> str:
    return html.escape(str(text))


def show_keep(facts: dict[str, Any]) -> str:
    """One kept commit, with its diff folded."""
    rows = []
    for line in facts["diff"]:
        kind = {"+": "add", "-": "cut"}.get(line[:1], "")
        rows.append(f'<span class="{kind}">{quote(line)}</span>' if kind else quote(line))
    known = [facts[name] for name in ("lines", "speed", "hidden") if name in facts]
    about, body = ", ".join([f"{facts['runs']} runs", *known]), "\n".join(rows)
    return (f"<details><summary><b>{facts['number']}</b> {quote(facts['description'])}"
            f" <small>gain {facts['gain']}</small></summary>"
            f"<p>{quote(about)}<br>{quote(facts['hypothesis'])}</p>"
            f"<pre>git show {facts['commit']}</pre><pre class=\"diff\">{body}</pre></details>")


def show_timeline(report: Report) -> str:
    """The night from left to right, one bar an experiment, and the sums."""
    if not report.spans:
        return ""
    whole = max(end for _, end, _, _ in report.spans) or 1.0
    colour = {"keep": "#1f7a3d", "crash": "#b3261e", "measure": "#b36b00"}
    bars = [f'<rect x="{1000 * a / whole:.1f}" y="{2 + 8 * (n % 2)}" height="8" '
            f'width="{max(0.5, 1000 * (b - a) / whole):.1f}" fill="{colour.get(kind, "#8a8f98")}">'
            f"<title>{label}</title></rect>"
            for n, (a, b, kind, label) in enumerate(report.spans)]  # fmt: skip
    sums = "".join(f"<tr><td>{name}</td><td>{seconds / 3600:.2f} h</td></tr>"
                   for name, seconds in report.times.items())  # fmt: skip
    return ('<h2>The night</h2><svg viewBox="0 0 1000 20" role="img" aria-label="timeline">'
            f"{''.join(bars)}</svg><table>{sums}</table>")


def page(report: Report) -> str:
    """The whole of report.html."""
    parts = []
    for what, command in report.type_this:
        parts.append(f"<p>To {quote(what)}:</p><pre>{quote(command)}</pre>")
    if report.keeps:
        parts.append("<h2>Kept</h2>" + "".join(map(show_keep, report.keeps[-SHOWN:])))
    for title, lines in report.lists:
        if lines:
            items = "".join(f"<li>{quote(line)}</li>" for line in lines)
            parts.append(f"<h2>{quote(title)}</h2><ul>{items}</ul>")
    parts.append(show_timeline(report))
    cells = "".join(f"<tr><td>{p.number}<td>{quote(p.status)}<td>{p.val_bpb:.6f}<td>"
                    f"{quote(one_line(p.description, 100))}" for p in report.points)  # fmt: skip
    parts.append(f"<details><summary>All {len(report.points)} rows</summary><div class=\"scroll\">"
                 f"<table><tr><th>#<th>status<th>val_bpb<th>description{cells}</table></div>"
                 "</details>")  # fmt: skip
    pictures = {name: base64.b64encode(draw(report, colours)).decode()
                for name, colours in (("light", LIGHT), ("dark", DARK))}  # fmt: skip
    words = "".join(f"<p>{quote(line)}</p>" for line in report.words)
    date = time.strftime("%Y-%m-%d %H:%M")
    return PAGE.substitute(title=quote(report.title), words=words, parts="\n".join(parts),
                           date=date, **pictures)  # fmt: skip


def write(report: Report, folder: Path, say: Callable[[str], Any] = print) -> None:
    """progress.png and report.html in a folder, and the summary by `say`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "progress.png", [draw(report, LIGHT)])
    write_atomic(folder / "report.html", [page(report).encode()])
    for line in [report.title, *report.words]:
        say(line)
    for facts in report.keeps[-SHOWN:]:
        say(f"  {facts['number']:>4}  {facts['commit']}  {facts['gain']}  {facts['description']}")
    say(f"see {folder / 'report.html'} and {folder / 'progress.png'}")
    for what, command in report.type_this[::-1]:  # what is typed first stands last
        say(f"to {what}: {command}")


def main(words: list[str]) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("agent.py report", description=__doc__, formatter_class=form)
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE.tsv")
    parser.add_argument("--tag", metavar="NAME", help="of a run, default the last")
    args = parser.parse_args(words)
    if args.file and args.tag:
        parser.error("a file has no --tag")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # of `| head`, which has read enough
    try:
        if args.file:
            write(read_field(args.file), Path("runs") / f"report-{args.file.stem}")
        else:
            run, folder = read_run(args.tag)
            write(report_run(run), folder)
    except OSError as error:
        raise SetupError(str(error), "df -h . && ls -ld runs") from error
    return 0
