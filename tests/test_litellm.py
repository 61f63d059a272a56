"""A night with a server of somebody else's: LiteLLM's proxy, with a model that answers from a can.

It is installed from the package index, in an environment of its own: its packages are many.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

CANNED = """\
description: sharper
hypothesis: it should help

<<<<<<< SEARCH
SHARPNESS = 0.5
=======
SHARPNESS = 0.6
>>>>>>> REPLACE
"""


def free_port():
    with socket.socket() as end:
        end.bind(("127.0.0.1", 0))
        return end.getsockname()[1]


@pytest.fixture
def proxy(tmp_path):
    """The environment to reach a proxy that runs."""
    home, port, key = tmp_path / "litellm", free_port(), f"sk-{secrets.token_hex(32)}"
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    install = [home / "bin/pip", "install", "--quiet", "litellm[proxy]"]
    subprocess.run(install, check=True, timeout=400)
    model = {"model": "openai/canned", "api_key": "none", "mock_response": CANNED}
    config = {"model_list": [{"model_name": "mine", "litellm_params": model}]}
    (tmp_path / "litellm.yaml").write_text(json.dumps(config))  # JSON is YAML
    log = open(tmp_path / "litellm.log", "w+")
    server = subprocess.Popen(
        [home / "bin/litellm", "--config", tmp_path / "litellm.yaml", "--port", str(port)],
        stdout=log, stderr=log, cwd=tmp_path, env=os.environ | {"LITELLM_MASTER_KEY": key},
    )  # fmt: skip
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"{address}/health/liveliness", timeout=5)
            break
        except OSError:
            log.seek(0)
            assert server.poll() is None and time.monotonic() < deadline, log.read()[-2000:]
            time.sleep(0.5)
    yield {"ANTHROPIC_BASE_URL": address, "ANTHROPIC_API_KEY": key}
    server.kill()
    server.wait()
    log.close()


@pytest.mark.gate
def test_a_night_with_litellm(checkout, proxy):
    done = checkout.agent("--experiments", "1", "--model", "mine", "--tag", "t", env=proxy)
    assert done.returncode == 0, done.stderr
    row = checkout.rows()[1]
    assert (row["status"], row["description"]) == ("keep", "sharper"), done.stderr
    message = checkout.git("log", "-1", "--format=%B", "autoresearch/t")
    assert 'Model: "mine"' in message and 'Proposer: "claude"' in message
