"""Fixtures, the order of the tests, and the skips that the gate allows."""

import fcntl
import importlib
import os
import re
import signal
import sys
from pathlib import Path

import pytest
from xdist.scheduler.loadscope import LoadScopeScheduling

from support.api_server import ApiServer
from support.checkout import ROOT, Checkout, sh
from support.stand_in import stand_in, without_self_test

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share the machine's cores

# In the gate (AUTORESEARCH_GATE is set) any other reason for a skip is a failure: what a test needs
# is missing there, and nobody would notice that it is not tested.
SKIPS_ALLOWED = (
    "no GPU here",
    "only root can",
    "x86-64 has other system call tables",
)


class OneByOne(LoadScopeScheduling):
    """Hands out tests one by one, and the tests of a class, which share fixtures, together."""

    def _split_scope(self, nodeid):
        return nodeid.rsplit("::", 1)[0] if nodeid.count("::") > 1 else nodeid


def pytest_xdist_make_scheduler(config, log):
    return OneByOne(config, log)


def pytest_collection_modifyitems(items):
    """Start with the long tests, so that no worker is left with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("gate") is None)


def pytest_sessionfinish(session):
    """Fail the gate if something was skipped that may not be."""
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if not os.environ.get("AUTORESEARCH_GATE") or terminal is None:
        return
    for report in terminal.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        if not re.search("|".join(map(re.escape, SKIPS_ALLOWED)), reason):
            print(f"\nnot allowed in the gate: {report.nodeid} was skipped: {reason}")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def cache(tmp_path_factory, worker_id):
    """The folder of prepared rows and bytecode that all workers share.

    AUTORESEARCH_TEST_CACHE names one that is kept from one call of pytest to the next.
    """
    base = tmp_path_factory.getbasetemp()
    base = base if worker_id == "master" else base.parent
    folder = Path(os.environ.get("AUTORESEARCH_TEST_CACHE") or base / "cache")
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"AUTORESEARCH_CACHE": str(folder), "AUTORESEARCH_SCALE": "cpu"}
    with open(folder / "lock", "w") as lock:  # of two workers one prepares, the other one waits
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = sh(sys.executable, "prepare.py", cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr
        toy = Checkout(tmp_path_factory.mktemp("toy") / "checkout", folder)
        done = sh(sys.executable, "prepare.py", cwd=toy.folder, env=toy.env)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def checkout(tmp_path, cache):
    """A checkout with the toy as its train.py and the real referee."""
    return Checkout(tmp_path / "checkout", cache)


@pytest.fixture
def quick(checkout):
    """A checkout with the stand-in for a referee, whose scores are exact, and no self-test."""
    without_self_test(checkout)
    stand_in(checkout)
    return checkout


@pytest.fixture
def api():
    """Starts servers of the Messages API, each with the replies that it is to give."""
    servers = []

    def start(*replies):
        servers.append(ApiServer(*replies))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def cpu_rows(cache):
    """The environment of the real scale `cpu`, whose rows are prepared."""
    return os.environ | {"AUTORESEARCH_SCALE": "cpu", "AUTORESEARCH_CACHE": str(cache)}


@pytest.fixture(scope="module")
def train():
    """The training file at the cpu scale, imported without training anything."""
    before = os.environ.get("AUTORESEARCH_SCALE")
    os.environ["AUTORESEARCH_SCALE"] = "cpu"
    yield importlib.import_module("train")
    os.environ.pop("AUTORESEARCH_SCALE") if before is None else None
