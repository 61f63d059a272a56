"""A run with somebody else's server: LiteLLM's proxy, with a model whose answer is written here.

python -m pytest tests/test_litellm.py -m nightly

The proxy is installed from the package index, in an environment of its own: its packages are many.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
import urllib.request

import pytest

from support.waiting import wait_until

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
    subprocess.run(install, check=True)
    model = {"model": "openai/canned", "api_key": "none", "mock_response": CANNED}
    config = {"model_list": [{"model_name": "mine", "litellm_params": model}]}
    # JSON is YAML too.
    (tmp_path / "litellm.yaml").write_text(json.dumps(config), encoding="utf-8")
    log = open(tmp_path / "litellm.log", "w+", encoding="utf-8")
    server = subprocess.Popen(
        [home / "bin/litellm", "--config", tmp_path / "litellm.yaml", "--port", str(port)],
        stdout=log, stderr=log, cwd=tmp_path, env=os.environ | {"LITELLM_MASTER_KEY": key},
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"

    def answers():
        try:
            return urllib.request.urlopen(f"{address}/health/liveliness", timeout=60)
        except OSError:  # it does not listen yet
            return None

    try:
        wait_until(answers, server).close()
        yield {"ANTHROPIC_BASE_URL": address, "ANTHROPIC_API_KEY": key}
    except AssertionError:
        log.seek(0)
        print(log.read()[-2000:])
        raise
    finally:
        server.kill()
        server.wait()
        log.close()


@pytest.mark.nightly
@pytest.mark.timeout(7200)  # the packages come through a network
def test_a_proposal_by_litellm_is_tried_and_kept(checkout, proxy):
    words = ("--experiments", "1", "--model", "mine", "--tag", "t")
    done = checkout.agent(*words, env=proxy, timeout=1800)
    assert done.returncode == 0, done.stderr
    row = checkout.rows()[1]
    assert (row["status"], row["description"]) == ("keep", "sharper"), done.stderr
    message = checkout.git("log", "-1", "--format=%B", "autoresearch/t")
    assert 'Model: "mine"' in message and 'Proposer: "claude"' in message
