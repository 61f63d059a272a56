"""The house rules that a machine can hold: ceilings, function length, what an import may load."""

import ast
import re
import statistics
import subprocess
import sys

import pytest

from support.checkout import ROOT

CEILINGS = {
    "prepare.py": 580,
    "pretokenize.py": 275,
    "referee.py": 610,
    "warden.py": 785,
    "train.py": 670,
    "full.py": 115,
    "agent.py": 855,
    "rule.py": 145,
    "slots.py": 470,
    "cluster.py": 325,
    "journal.py": 675,
    "proposals.py": 455,
    "report.py": 535,
    "promote.py": 425,
    "researcher.py": 500,
    "digest.py": 315,
    "program.md": 120,
    "README.md": 176,
}
PYTHON = [name for name in CEILINGS if name.endswith(".py")]


@pytest.mark.parametrize("name", CEILINGS)
def test_file_stays_under_its_ceiling(name):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= CEILINGS[name]


def test_functions_stay_short():
    lengths = {}
    for name in PYTHON:
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                lengths[name, node.name] = node.end_lineno - node.lineno + 1
    assert max(lengths.values()) <= 60, max(lengths, key=lengths.get)
    assert statistics.median(lengths.values()) <= 12


def test_no_other_python_file_at_the_top():
    assert {path.name for path in ROOT.glob("*.py")} == set(PYTHON)


def test_every_dependency_is_imported_by_a_shipped_file():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^dependencies = \[(.*?)^\]", text, re.M | re.S)[1]
    source = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in PYTHON)
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
