"""The house rules that a machine can hold: ceilings, function length, what an import may load."""

import ast
import io
import re
import statistics
import subprocess
import sys
import tokenize

import pytest

from support.checkout import ROOT

# Code lines: no blank lines, comments or docstrings, so that a plain sentence costs nothing.
CEILINGS = {
    "prepare.py": 390,
    "pretokenize.py": 215,
    "referee.py": 510,
    "warden.py": 670,
    "train.py": 520,
    "full.py": 80,
    "agent.py": 705,
    "rule.py": 85,
    "slots.py": 345,
    "cluster.py": 235,
    "journal.py": 500,
    "proposals.py": 350,
    "report.py": 420,
    "promote.py": 325,
    "researcher.py": 415,
    "digest.py": 220,
}
ALL = 5_900  # code lines of the product


def code_lines(text):
    """Return how many lines of a program hold code."""
    documented, lines = set(), set()
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, kinds) and ast.get_docstring(node):
            first = node.body[0]
            documented.update(range(first.lineno, first.end_lineno + 1))
    prose = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
             tokenize.ENDMARKER)  # fmt: skip
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in prose:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - documented)


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_comments_docstrings_and_blank_lines_are_no_code():
    text = '"""One."""\n\n# two\nx = 1  # three\n\n\ndef f():\n    """Four\n    five."""\n'
    assert code_lines(text + "    return (\n        x\n    )\n") == 5


@pytest.mark.parametrize("name", CEILINGS)
def test_file_stays_under_its_ceiling(name):
    assert code_lines(read(name)) <= CEILINGS[name]


def test_the_product_stays_small():
    assert sum(code_lines(read(name)) for name in CEILINGS) <= ALL


def test_functions_stay_short():
    lengths = {}
    for name in CEILINGS:
        for node in ast.walk(ast.parse(read(name))):
            if isinstance(node, ast.FunctionDef):
                lengths[name, node.name] = node.end_lineno - node.lineno + 1
    assert max(lengths.values()) <= 60, max(lengths, key=lengths.get)
    assert statistics.median(lengths.values()) <= 15


def test_no_other_python_file_at_the_top():
    assert {path.name for path in ROOT.glob("*.py")} == set(CEILINGS)


def test_every_dependency_is_imported_by_a_shipped_file():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^dependencies = \[(.*?)^\]", text, re.M | re.S)[1]
    source = "\n".join(map(read, CEILINGS))
    for package in re.findall(r'"([a-z]+)[=>]', listed):
        assert re.search(rf"^\s*(import|from) {package}\b", source, re.M), package


def test_agent_imports_nothing_heavy():
    heavy = ("torch", "numpy", "optuna", "anthropic", "rich", "ray", "matplotlib")
    code = f"import sys, agent; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_what_goes_to_a_clusters_nodes_is_all_that_it_imports_there():
    code = "import cluster; print([cluster.PROGRAMS, cluster.TRUSTED])"  # Ray's settings stay there
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    programs, trusted = ast.literal_eval(told.stdout.decode())
    for name in programs:
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        for node in ast.walk(tree) if name in trusted else tree.body:  # which start there
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = getattr(node, "module", None) or node.names[0].name
                own = (ROOT / f"{module}.py").exists()
                assert not own or f"{module}.py" in programs, (name, module)
