"""What may be tried next: edits that make a new train.py of the best, and where they come from.

A proposer is a function from a run's history to a Proposal, or None when nothing is left to try.
Here are those without a language model: a person's patches, and Optuna.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import itertools
import math
import os
import random
import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from journal import Experiment, Run, fingerprint, oddly_encoded, one_line, parse, patiently, say
from prepare import SetupError

KINDS = ("tune", "structure", "remove", "combine", "retry")
BILL = ("cost_usd", "tokens_in", "tokens_cached", "tokens_written", "tokens_out")
MAX_SOURCE = 40_000  # characters of a proposed train.py; every call pays for them
# A person's settings, such as diff.context or apply.whitespace, do not change what is a valid diff.
PLAIN_GIT = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
KNOB_MOST = 1e15  # a larger number is no hyperparameter, and may be too large for a float
SAME = 0.02  # of a knob's value: less is no other value
SAMPLER_STARTUP = 10  # experiments before TPE trusts its own model
SAMPLER_SEES = 1000  # of the latest, in what it tells of itself
SAMPLER_STEPS = range(-4, 5)  # of a tenth of a decade each way: at most a factor of 2.5


class Rejected(Exception):
    """A proposal that cannot be run; the message tells the proposer what to send instead."""


@dataclass(frozen=True)
class Edit:
    """Replace the one place where `search` stands in train.py."""

    search: str
    replace: str
    file: str = "train.py"


@dataclass
class Proposal:
    """One idea, and the train.py that its edits make of the best."""

    description: str
    hypothesis: str
    edits: list[Edit]
    proposer: str
    patch: str = ""  # a diff in the place of edits
    source: str = ""
    base: str = ""  # the commit that it is made of
    number: int = 0
    kind: str = ""  # one of KINDS, or a person's
    combines: list[int] = field(default_factory=list)  # experiments
    idea: str = ""  # a line of ideas.md
    saw: int = 0  # verdicts
    model: str = ""
    cost_usd: float = 0.0
    tokens_in: int = 0
    tokens_cached: int = 0
    tokens_written: int = 0
    tokens_out: int = 0

    def bill(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in BILL}


# ---------------------------------------------------------------------------
# Apply: edits to a new train.py
# ---------------------------------------------------------------------------


def apply_edits(source: str, edits: list[Edit]) -> str:
    """`source` with all edits made, or Rejected; each SEARCH must match it exactly once."""
    if not edits:
        raise Rejected("There is no edit. Send at least one SEARCH/REPLACE pair for train.py.")
    spans = []
    for index, edit in enumerate(edits, 1):
        if edit.file != "train.py":
            raise Rejected(f"Edit {index} is for {edit.file}. You may edit train.py only.")
        found = places(edit.search, source)
        if len(found) > 1:
            raise Rejected(f"The SEARCH of edit {index} matches {len(found)} places. Send it again "
                           "with enough of the lines around it to match exactly once.")
        if not found:
            first = next((line for line in edit.search.splitlines() if line.strip()), "")[:200]
            known = [line[:200] for line in source.splitlines()]  # longer ones would take minutes
            near = difflib.get_close_matches(first, known, n=3, cutoff=0.4)
            lines = "\n".join(near) or "(none)"
            raise Rejected(f"The SEARCH of edit {index} matches nowhere in train.py. Copy it to "
                           f"the letter, indentation included. The nearest lines:\n{lines}")
        spans.append((found[0], found[0] + len(edit.search), edit.replace))
    spans.sort(reverse=True)
    for (later, _, _), (_, end, _) in itertools.pairwise(spans):
        if later < end:
            raise Rejected("Two edits overlap: each SEARCH is of the train.py that you were shown.")
    for start, end, text in spans:  # from the last to the first, so that places stay valid
        source = source[:start] + text + source[end:]
    return source


def places(text: str, source: str) -> list[int]:
    """Where a text stands and cuts no name: EMBEDDING_LR is not in UNEMBEDDING_LR."""
    if not 0 < len(text) <= len(source):
        return []
    start, end = (r"\b" if re.match(r"\w", each) else "" for each in (text, text[-1]))
    # Ahead of each place, so that matches which overlap are all found.
    return [found.start() for found in re.finditer(f"(?={start}{re.escape(text)}{end})", source)]


def complete(proposal: Proposal, run: Run) -> Proposal:
    """The proposal with its train.py. Raises Rejected unless that compiles and is new here."""
    best = run.source_of(run.best())
    if proposal.patch:
        source = apply_patch(best, proposal.patch)
    else:
        source = apply_edits(best, proposal.edits)
    proposal.description = one_line(proposal.description) or "no description"
    if odd := oddly_encoded(source):
        raise Rejected(f"train.py {odd}. Send it without.")
    if len(source) > MAX_SOURCE:
        raise Rejected(f"train.py would have {len(source)} characters, over {MAX_SOURCE}.")
    try:
        compile(source, "train.py", "exec")
        new, holds = fingerprint(source), asserts_hold(source, run.scale)
        skeleton(source, run.scale["name"])
    except (SyntaxError, ValueError, LookupError, RecursionError, MemoryError,
            OverflowError) as error:
        raise Rejected(f"The edited train.py does not compile: {error}. Mend it.") from error
    if new == fingerprint(best):
        raise Rejected("The edits change nothing, or comments only. Change what the program does.")
    for tried in run.tried():
        if new == (tried.program or fingerprint(run.source_of(tried))):
            what = f"experiment {tried.number} again: {tried.description}, {tried.status}"
            raise Rejected(f"This is {what}, val_bpb {tried.val_bpb():.6f}. Try another idea.")
    for other in run.running:
        own = other.number == proposal.number or not other.source  # or a person's
        if not own and new == fingerprint(other.source):
            said = f"experiment {other.number} again, which is not over: {other.description}"
            raise Rejected(f"This is {said}. Try another idea.")
    if not holds:
        raise Rejected("An assertion at the top of train.py would fail with these constants.")
    proposal.source, proposal.base = source, run.best().commit
    return proposal


# ---------------------------------------------------------------------------
# Patches, and the sampler
# ---------------------------------------------------------------------------


Proposer = Callable[[Run], "Proposal | None"]
Screen = Callable[[Run, str], str]  # why a train.py is not worth a run, "" if it may be


def patches(files: list[Path]) -> Proposer:
    """Proposes the edits that a person wrote, one file each: a unified diff or a whole train.py."""
    rejected: set[str] = set()

    def propose(run: Run) -> Proposal | None:
        for path in files:
            try:
                text = path.read_text(encoding="utf-8", errors="replace")
            except OSError as error:
                say(f"{path} cannot be read: {error}")
                continue
            mark = f"patches {hashlib.sha256(text.encode()).hexdigest()[:12]}"
            if mark in rejected or any(e.proposer == mark for e in [*run.history, *run.running]):
                continue
            try:
                proposal = patiently(read_patch, path.name, text, mark, run)
                return patiently(complete, proposal, run)
            except Rejected as rejection:
                rejected.add(mark)
                say(f"rejected: {path.name}: {one_line(str(rejection), 300)}")
        return None

    return propose


def read_patch(name: str, text: str, mark: str, run: Run) -> Proposal:
    """A patch file as a proposal; a text without hunks is a whole train.py."""
    prose = name
    if re.search(r"^@@ -", text, re.M):
        headers = ("--- ", "+++ ", "diff ", "index ", "@@ ")
        first = next((line for line in text.splitlines() if line.strip()), "")
        subject = re.search(r"^Subject: (?:\[PATCH.*?\] )?(.+)", text, re.M)  # of git format-patch
        prose = subject[1] if subject else name if first.startswith(headers) else first
    else:
        best = run.source_of(run.best())
        if text and best == text:
            raise Rejected("it is the best train.py")
        text = unified_diff(best, text)
    return Proposal(prose, "", [], mark, patch=text)


def unified_diff(old: str, new: str) -> str:
    """From one train.py to another, as `git apply` reads it."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (("old", old), ("new", new)):
            (Path(folder) / name).mkdir()
            (Path(folder) / name / "train.py").write_bytes(text.encode())
        command = ["git", "diff", "--no-index", "--no-color", "--no-ext-diff", "--no-prefix",
                   "old/train.py", "new/train.py"]
        done = subprocess.run(
            command, cwd=folder, env=os.environ | PLAIN_GIT, stdout=subprocess.PIPE)
    return done.stdout.decode()


def apply_patch(source: str, patch: str) -> str:
    """`source` with a unified diff applied. Raises Rejected if that is not possible."""
    file = re.search(r"^\+\+\+ (\S+)", patch, re.M)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.py"
        path.write_bytes(source.encode())
        command = ["git", "apply", f"-p{file[1].count('/') if file else 1}", "-"]
        alone = os.environ | PLAIN_GIT
        alone["GIT_CEILING_DIRECTORIES"] = str(Path(folder).resolve().parent)
        done = subprocess.run(
            command, cwd=folder, env=alone, input=patch.encode(), capture_output=True
        )
        if done.returncode or os.listdir(folder) != ["train.py"]:
            said = done.stderr.decode(errors="replace") or "it touches other files"
            raise Rejected(f"the diff does not apply to the best train.py: {said}")
        if path.is_symlink() or not path.is_file():
            raise Rejected("the diff makes train.py something else than a plain file")
        return path.read_bytes().decode("utf-8", errors="replace")


@dataclass(frozen=True)
class Knob:
    """A numeric constant of train.py's hyperparameter block, and where its literal stands."""

    name: str
    value: float | int
    line: int
    columns: tuple[int, int]  # in bytes of UTF-8, as ast counts

    def at(self, step: int) -> float | int:
        """The value `step` steps up or down the knob's own scale."""
        if isinstance(self.value, int) and self.value < 8:
            return max(1, self.value + round(step / SAMPLER_STEPS[-1]))
        if isinstance(self.value, int) and self.value & (self.value - 1) == 0:  # a size
            return max(1, int(self.value * 2.0 ** round(step / 2.5)))
        factor = 10 ** (step / 10)
        if re.search("BETA|MOMENTUM", self.name) and self.value < 1:  # 1 - value is what scales
            return round(1 - min(0.9, (1 - self.value) * factor), 4)
        value = float(f"{self.value * factor:.2g}")
        if re.search("RATIO|FRAC", self.name) and self.value <= 1:  # a share
            value = min(value, 1.0)
        return round(value) if isinstance(self.value, int) else value

    def step_of(self, value: float) -> int:
        """The step that comes nearest to a value."""
        return min(SAMPLER_STEPS, key=lambda step: (abs(self.at(step) - value), abs(step)))


@lru_cache(maxsize=32)
def read_knobs(source: str, scale: str) -> dict[str, Knob]:
    """The positive numbers among the upper-case constants above the first definition, by name.

    Of a tuple each number is a knob (ADAM_BETAS[0]); of {"cpu": 2, ...}[...] the scale's own entry.
    """
    knobs: dict[str, Knob] = {}

    def add(name: str, node: ast.AST) -> None:
        number = isinstance(node, ast.Constant) and type(node.value) in (int, float)
        if number and 0 < node.value < KNOB_MOST:
            columns = (node.col_offset, node.end_col_offset or 0)
            knobs[name] = Knob(name, node.value, node.lineno, columns)
        elif isinstance(node, ast.Tuple):
            for index, element in enumerate(node.elts):
                add(f"{name}[{index}]", element)
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict):
            for key, element in zip(node.value.keys, node.value.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == scale:
                    add(name, element)

    for statement in parse(source).body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            break
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            if statement.targets[0].id.isupper():
                add(statement.targets[0].id, statement.value)
    return knobs


def lines_of(source: str) -> list[str]:
    """Lines as ast counts them; str.splitlines ends one at a form feed too."""
    return re.split(r"(?<=\n)", source)


def set_knobs(source: str, values: dict[Knob, float | int]) -> str:
    """`source` with other literals; from the last to the first, so that places stay valid."""
    lines = lines_of(source)
    for knob in sorted(values, key=lambda k: (k.line, k.columns), reverse=True):
        line, (start, end) = lines[knob.line - 1].encode(), knob.columns
        lines[knob.line - 1] = (line[:start] + f"{values[knob]!r}".encode() + line[end:]).decode()
    return "".join(lines)


def asserts_hold(source: str, scale: dict[str, Any]) -> bool:
    """Whether the arithmetic that train.py asserts of its constants (divisibility) holds.

    An assertion with more in it than known numbers and operators counts as true.
    """
    known = {name: knob.value for name, knob in read_knobs(source, scale["name"]).items()}
    known |= {f"SCALE.{name}": value for name, value in scale.items()}
    for statement in parse(source).body:
        if isinstance(statement, ast.Assert):
            test = ast.unparse(statement.test)
            test = re.sub(r"[A-Za-z_][\w.]*", lambda word: str(known.get(word[0], word[0])), test)
            if re.fullmatch(r"[\d\s.()+*%<>=-]+", test) and not re.search(r"\*\*|<<", test):
                try:
                    if not eval(test):
                        return False
                except (ArithmeticError, TypeError, SyntaxError):  # train.py itself will say
                    continue
    return True


def skeleton(source: str, scale: str) -> str:
    """Identity of a program but for the values of its knobs."""
    return fingerprint(set_knobs(source, dict.fromkeys(read_knobs(source, scale).values(), 0)))


def identify(done: Experiment, source: str, old: str, scale: str) -> None:
    """Note what an experiment's train.py is, and where it differs from the one it was made of."""
    done.program, done.skeleton = fingerprint(source), skeleton(source, scale)
    done.knobs = {name: knob.value for name, knob in read_knobs(source, scale).items()}
    before = {name: knob.value for name, knob in read_knobs(old, scale).items()}
    done.moved = {n: [before[n], v] for n, v in done.knobs.items() if before.get(n, v) != v}
    new, known = definitions(source), definitions(old)
    done.places = [name for name in {**new, **known} if new.get(name) != known.get(name)]


@lru_cache(maxsize=32)
def definitions(source: str) -> dict[str, str]:
    """What stands at the top of a program, by name, as syntax trees; of classes each method."""
    found: dict[str, str] = {}
    for node in parse(source).body:
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                found[f"{node.name}.{getattr(part, 'name', '')}".rstrip(".")] = ast.dump(part)
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = ast.dump(node)
        elif name := getattr(node, "name", ""):
            found[name] = ast.dump(node)
        else:
            found["the rest"] = found.get("the rest", "") + ast.dump(node)
    return found


def near_copy(proposal: Proposal, run: Run) -> Experiment | None:
    """An experiment whose program differs from the proposed one by 2 % of its knobs at most."""
    others = [Experiment(p.number, p.description, status="under way") for p in run.running]
    own, sources = Experiment(0, ""), [p.source for p in run.running]
    for e, source in zip([own, *others], [proposal.source, *sources], strict=True):
        if source:  # a person's commit has none here
            identify(e, source, source, run.scale["name"])

    def close(old: Experiment) -> bool:
        return all(abs(v - old.knobs[n]) <= SAME * abs(old.knobs[n]) for n, v in own.knobs.items())

    same = [e for e in [*run.tried(), *others] if e.skeleton == own.skeleton]
    return next((e for e in same if e.knobs.keys() == own.knobs.keys() and close(e)), None)


def alike(run: Run) -> list[Experiment]:
    """All with a score and the structure of the best, that their knobs alone tell apart."""
    best = run.best()
    return [e for e in run.tried() if e.believed() and e.skeleton == best.skeleton]


def spread(values: list[float]) -> float:
    """Variance; the one of the library is exact, and takes a hundred times as long."""
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values)


def sampler_view(run: Run) -> list[str]:
    """Which knobs matter, and where the sampler looks, from experiments of the best's structure.

    A knob's share is the correlation ratio: the variance of its values' mean scores over that of
    all scores.
    """
    found = alike(run)[-SAMPLER_SEES:]
    if len(found) < SAMPLER_STARTUP:
        return []
    scores, told = zip(*run.ranked(found), strict=True)
    whole, shares = spread(scores), {}
    for name in run.best().knobs:
        groups: dict[float, list[float]] = {}
        for e, score in zip(told, scores, strict=True):
            groups.setdefault(e.knobs.get(name, math.nan), []).append(score)
        if 1 < len(groups) <= len(told) / 2 and whole:
            means = [statistics.fmean(group) for group in groups.values() for _ in group]
            shares[name] = spread(means) / whole
    good = told[: max(3, len(told) // 4)]
    lines = []
    for name in sorted(shares, key=shares.get, reverse=True)[:5]:
        values = sorted(e.knobs[name] for e in good if name in e.knobs)
        lines.append(f"{name}: {100 * shares[name]:.0f} % of the differences; in the best quarter "
                     f"{values[0]:g} to {values[-1]:g}, most often {statistics.mode(values):g}")
    return lines


def sampler(run: Run) -> Proposal | None:
    """New values for one to three constants of the best train.py, by Optuna's TPE."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    name, source = run.scale["name"], run.source_of(run.best())
    now = read_knobs(source, name)
    start = now | read_knobs(run.source_of(run.history[0]), name)
    steps_of = optuna.distributions.IntDistribution(SAMPLER_STEPS[0], SAMPLER_STEPS[-1])
    space = {n: steps_of for n in now}
    if not space and run.experiments():  # an edit has put them elsewhere
        return None
    if not space:
        raise SetupError("train.py has no numeric constants at the top", "head -60 train.py")
    tried = []  # a crash has no score, and none is made up for it
    for gain, e in run.ranked(alike(run)):
        steps = {n: start[n].step_of(e.knobs[n]) for n in space if n in e.knobs}
        told = {"params": steps, "distributions": {n: steps_of for n in steps}}
        tried.append(optuna.trial.create_trial(**told, value=-gain))
    for attempt in range(100):
        known = len(run.history) + len(run.running)
        choose = random.Random(f"{run.tag} {known} {attempt}")
        seed = choose.randrange(2**31)
        options = dict(n_startup_trials=SAMPLER_STARTUP, multivariate=False)  # few knobs at a time
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, **options))
        study.add_trials(tried)
        changed = choose.sample(sorted(space), k=min(len(space), choose.choice((1, 1, 2, 3))))
        steps = study.ask({n: space[n] for n in changed}).params
        values = {now[n]: start[n].at(steps[n]) for n in changed}
        proposed = set_knobs(source, values)
        moved = [f"{k.name} {k.value!r} → {v!r}" for k, v in values.items() if v != k.value]
        lines = zip(lines_of(source), lines_of(proposed), strict=True)
        edits = [Edit("\n" + old[:-1], "\n" + new[:-1]) for old, new in lines if old != new]
        try:
            if edits:
                idea = Proposal(", ".join(moved), "", edits, "sampler", kind="tune")
                return complete(idea, run)
        except (Rejected, SyntaxError, RecursionError):  # tried before, or an odd program
            continue
    return None
