"""pretokenize.py as a process: several first starts on one cache."""

import json
import subprocess
import sys

import pytest


@pytest.mark.gate
def test_of_several_first_starts_on_one_cache_one_prepares_and_all_get_its_rows(checkout, tmp_path):
    """Four of six once failed: one removed what another one had just written."""
    env = checkout.env | {"AUTORESEARCH_CACHE": str(tmp_path / "cache")}
    started = [
        subprocess.Popen(
            [sys.executable, "prepare.py"], cwd=checkout.folder, env=env, encoding="utf-8",
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(4)
    ]  # fmt: skip
    told = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0] * 4, told
    assert len({(json.loads(out)["rows"], json.loads(out)["manifest"]) for out, _ in told}) == 1
    assert sum("100%" in err for _, err in told) == 1  # the others waited, or found them complete
