"""A night of ideas whose worth is known: what does the keep rule make of real runs?

    python tests/benchmarks/plant.py /tmp/planted  # a held-back train.py in a clone, and ideas
    cd /tmp/planted && AUTORESEARCH_BUDGET_TOKENS=600000 python agent.py --slots 1 \\
        --tag planted --patches ../planted-ideas/*.diff

Of the budget, this train.py uses 0.97**6 * 0.94**3. Nine ideas give back 3 or 6 % of that, eight
take as much away, seven change what is never used, and six draw other initial weights.
"""

import argparse
import difflib
import random
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# (search, replace) in train.py
LOOP = 'in batches(rows, device, tokens, counted.get("seconds", 0.0)):\n'
PARTS = """        progress /= math.prod(known("SHARE_"))
        if progress >= 1:
            break
"""
INIT = "    model = build_model()\n"
DRAWS = '    torch.rand(sum(known("DRAW_")))\n'
KNOWN = """def known(prefix):
    return [value for name, value in globals().items() if name.startswith(prefix)]
"""
HELD_BACK, TAKEN_AWAY = [0.97] * 6 + [0.94] * 3, [0.97, 0.94] * 4


def held_back(source: str) -> str:
    """train.py with a line for each idea, far enough apart that no patch shows another's."""
    if source.count(LOOP) != 1 or source.count(INIT) != 1:
        raise SystemExit("error: train.py is no longer as this script knows it")
    source = source.replace(LOOP, LOOP + PARTS).replace(INIT, DRAWS + INIT)
    values = {f"SHARE_{n}": value for n, value in enumerate(HELD_BACK + [1.0] * len(TAKEN_AWAY))}
    values |= {f"DRAW_{n}": 0 for n in range(6)} | {f"TWIN_{n}": 0 for n in range(7)}
    lines = "".join(f"{name} = {value}\n\n\n" for name, value in values.items())
    head, rule, rest = source.partition("\n# ----")
    return f"{head}\n{lines}{KNOWN}{rule}{rest}"


def ideas(source: str) -> list[tuple[str, str]]:
    """(name, train.py) of each, in an order of no meaning."""
    changes = {f"gain-{n}": (f"SHARE_{n} = {value}\n", f"SHARE_{n} = 1.0\n")
               for n, value in enumerate(HELD_BACK)}  # fmt: skip
    for n, value in enumerate(TAKEN_AWAY, len(HELD_BACK)):
        changes[f"loss-{n}"] = f"SHARE_{n} = 1.0\n", f"SHARE_{n} = {value}\n"
    for n in range(6):
        changes[f"draws-{n}"] = f"DRAW_{n} = 0\n", f"DRAW_{n} = {n + 3}\n"
    for n in range(7):
        changes[f"twin-{n}"] = f"TWIN_{n} = 0\n", f"TWIN_{n} = {n + 1}\n"
    found = [(name, source.replace(*change)) for name, change in changes.items()]
    random.Random(7).shuffle(found)
    return found


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
    path = folder / "train.py"
    source = held_back(path.read_text(encoding="utf-8"))
    path.write_text(source, encoding="utf-8")
    who = ("-c", "user.name=plant", "-c", "user.email=plant@localhost")
    subprocess.run(["git", *who, "commit", "--quiet", "-am", "held back"], cwd=folder, check=True)
    patches = folder.with_name(f"{folder.name}-ideas")
    patches.mkdir()
    for n, (name, new) in enumerate(ideas(source), 1):
        old, new = source.splitlines(True), new.splitlines(True)
        text = "".join(difflib.unified_diff(old, new, "a/train.py", "b/train.py", n=1))
        (patches / f"{n:02d}-{name}.diff").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
