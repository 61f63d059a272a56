"""The Ray backend on a real cluster of a head and two nodes, all of them on this machine.

python -m pytest tests/test_cluster.py -m "not nightly"

A stand-in for the referee, where it is named, measures nothing and takes a moment.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from support.checkout import TOY, sh
from support.checks import assert_each_keep_sits_on_what_it_was_measured_against, one_error
from support.stand_in import sharpness, stand_in

STORE = 80 * 2**20  # bytes of each node's object store
slow = pytest.mark.gate
ALL = (0.6, 0.65, 0.7, 0.45, 0.75, 0.8, 0.62, 0.85)
KEY = "sk-of-the-person-who-starts-it"


class Ray:
    """A cluster: a head that runs nothing, and nodes with room for two runs at a time each."""

    def __init__(self, cache, temporary):
        from ray.cluster_utils import Cluster

        self.cache, self.temporary = cache, temporary
        self.cluster = Cluster()
        self.add("head", num_cpus=0, include_dashboard=False, temp_dir=self.temporary)
        self.address = self.cluster.address
        for name in ("one", "two"):
            self.add(name)

    def add(self, name, env=None, **more):
        env = {"AUTORESEARCH_CACHE": str(self.cache), "AUTORESEARCH_NODE": name} | (env or {})
        settings = {"num_cpus": 4, "object_store_memory": STORE, "env_vars": env}
        return self.cluster.add_node(**settings | more)

    def remove(self, node):
        self.cluster.remove_node(node, allow_graceful=False)

    def processes(self):
        return sh("pgrep", "-f", self.temporary, cwd="/").stdout.split()

    def end(self):
        """Take it down, and see that nobody of it is left."""
        self.cluster.shutdown()
        deadline = time.monotonic() + 60
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        shutil.rmtree(self.temporary)
        assert not left, f"processes {left} outlive their cluster"


@pytest.fixture(scope="module")
def ray(cache):
    pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("ANTHROPIC_API_KEY", raising=False)
        temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        os.mkdir(f"{temporary}/ray")  # there Ray notes the address, which else is everybody's
        patch.setenv("RAY_TMPDIR", temporary)
        cluster = Ray(cache, temporary)
        yield cluster
        cluster.end()


def measuring(checkout, seconds):
    """The stand-in, which tells in a file what it measures where, and what it finds about it."""
    told = checkout.folder.parent / "told"
    told.touch()
    stand_in(checkout, seconds)
    path = checkout.folder / "referee.py"
    line = (
        f"open({str(told)!r}, 'a').write(json.dumps([os.environ.get('AUTORESEARCH_NODE'), "
        "int(os.path.basename(args.folder)), args.run, dict(os.environ)]) + '\\n')\n"
    )
    path.write_text(path.read_text().replace("time.sleep(", f"{line}time.sleep(", 1))
    checkout.commit_all()
    return told


def runs_told(path):
    """(node, experiment, run) of every start, in order."""
    return [tuple(json.loads(line)[:3]) for line in path.read_text().splitlines()]


@pytest.fixture
def start(ray):
    """Starts agent.py on the cluster; what is still alive at the end is killed."""
    started = []

    def run(checkout, *words):
        command = [sys.executable, "agent.py", "--tag", "t", "--ray", ray.address, *words]
        started.append(subprocess.Popen(
            list(map(str, command)), cwd=checkout.folder, env=checkout.env,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8",
        ))  # fmt: skip
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def wait_for(condition, process, seconds=240):  # beside other tests, on two cores
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


def referees(ray):
    """Processes of what is measured on the cluster: what travels lies in its own folder."""
    return sh("pgrep", "-f", f"{ray.temporary}.*/(referee|warden).py", cwd="/").stdout.split()


@slow
def test_forty_experiments_on_four_slots_end_in_the_history_of_one(ray, checkout):
    told = measuring(checkout, 0.5)
    patches = sharpness(checkout, *ALL, *(f"{0.301 + 0.0151 * n:.4f}" for n in range(32)))
    small = ray.add("small", num_cpus=2)  # has room for one run: a machine of another kind
    try:
        keys = {"ANTHROPIC_API_KEY": KEY, "SOME_TOKEN": KEY}
        words = ("--ray", ray.address, "--tag", "t", "--patches", *patches)
        done = checkout.agent(*words, env=keys)
    finally:
        ray.remove(small)
    assert done.returncode == 0, done.stderr
    assert f"left out: node {small.node_ip_address} ({small.node_id[:6]})" in done.stderr
    rows = checkout.rows()
    ideas = sorted(int(row["experiment"]) for row in rows if row["status"] != "measure")
    assert ideas == list(range(41))
    assert_each_keep_sits_on_what_it_was_measured_against(checkout)
    assert "once more, on top of the new best" in done.stderr  # slots did get in each other's way
    assert len(runs_told(told)) >= sum(int(row["runs"]) for row in rows) > 35
    assert {node for node, _, _ in runs_told(told)} == {"one", "two"}
    assert KEY not in told.read_text()
    device = checkout.git("log", "-1", "--format=%(trailers:key=Settings)", "refs/autoresearch/t/1")
    assert device.strip('"').endswith(" cores, 2 runs at a time")


@slow
def test_a_node_that_dies_loses_its_runs_only_and_they_are_run_elsewhere(ray, checkout, start):
    """Another that joins in the night gets runs when it has been looked at."""
    told, victim = measuring(checkout, 3.0), ray.add("victim")
    patches = sharpness(checkout, *(0.5 + 0.02 * n for n in range(1, 19)))
    night = start(checkout, "--patches", *patches)
    lost = wait_for(lambda: [run for run in runs_told(told) if run[0] == "victim"], night)
    ray.remove(victim)
    late = ray.add("late")
    lost = [run for run in runs_told(told) if run[0] == "victim"]
    said = night.communicate(timeout=240)[1]
    ray.remove(late)
    assert night.returncode == 0, said
    ideas = [int(row["experiment"]) for row in checkout.rows() if row["status"] != "measure"]
    assert sorted(ideas) == list(range(19))
    assert {row["status"] for row in checkout.rows()} <= {"keep", "discard", "measure"}
    assert_each_keep_sits_on_what_it_was_measured_against(checkout)
    places = {run[1:]: [] for run in lost}
    for node, *run in runs_told(told):
        places.get(tuple(run), []).append(node)
    assert any({"one", "two", "late"} & set(nodes) for nodes in places.values()), places
    assert f"new in the cluster: node {late.node_ip_address} ({late.node_id[:6]})" in said
    assert "late" in {node for node, _, _ in runs_told(told)}


@slow
def test_a_run_on_the_cluster_has_the_score_that_it_has_here(ray, checkout):
    patch = checkout.patch("a.py", "SHARPNESS = 0.5", "SHARPNESS = 0.8")
    done = checkout.agent("--ray", ray.address, "--slots", "1", "--tag", "t", "--patches", patch)
    assert done.returncode == 0, done.stderr
    there = checkout.folder / "runs/t/1"
    result = json.loads((there / "result.json").read_text())
    assert result["status"] == "ok" and "val_bpb" in (there / "run.log").read_text()
    here = checkout.folder.parent / "here"
    here.mkdir()
    shutil.copy(there / "train.py", here)
    words, (silent, _) = ("referee.py", here, "--seed", result["seed"]), os.pipe()
    local = sh(sys.executable, *words, cwd=checkout.folder, env=checkout.env, stdin=silent)
    assert local.returncode == 0, local.stderr
    assert json.loads((here / "result.json").read_text())["val_bpb"] == result["val_bpb"]
    assert float(checkout.rows()[1]["val_bpb"]) == pytest.approx(result["val_bpb"], abs=1e-6)


def test_without_ray_it_is_said_what_to_install(checkout):
    code = (
        "import sys; sys.modules['ray'] = None; sys.argv[1:] = ['--ray', 'auto']; "
        "import agent; sys.exit(agent.main())"
    )
    done = sh(sys.executable, "-c", code, cwd=checkout.folder, env=checkout.env)
    assert done.returncode == 1 and "import of ray" in one_error(done)
    assert done.stderr.splitlines()[-1] == "hint: pip install '.[ray]'"


@slow
def test_an_address_where_no_cluster_is_ends_it_with_two_lines(checkout):
    pytest.importorskip("ray")
    for address in ("127.0.0.1:9", "nonsense"):
        begun = time.monotonic()
        done = checkout.agent("--ray", address)
        assert done.returncode == 1 and f"--ray {address}: " in one_error(done)
        assert time.monotonic() - begun < 60
    assert not (checkout.folder / "results.tsv").exists()


@slow
def test_a_node_with_other_rows_ends_it_with_two_lines(ray, checkout, tmp_path):
    """The rows of one node are made of another text."""
    (tmp_path / "text").write_text("".join(f"{n} is {n * n}\n" for n in range(60_000)))
    env = {"AUTORESEARCH_CORPUS": str(tmp_path / "text"), "AUTORESEARCH_CACHE": str(tmp_path)}
    stranger = ray.add("stranger", env)
    try:
        done = checkout.agent("--ray", ray.address)
    finally:
        ray.remove(stranger)
    assert done.returncode == 1, done.stderr
    assert "other rows: corpus" in one_error(done) and stranger.node_id[:6] in one_error(done)
    assert not (checkout.folder / "results.tsv").exists()


@slow
def test_a_node_that_cannot_prepare_rows_ends_it_with_two_lines(ray, checkout, tmp_path):
    stranger = ray.add("stranger", {"AUTORESEARCH_CACHE": "/dev/null/cache"})
    try:
        done = checkout.agent("--ray", ray.address)
    finally:
        ray.remove(stranger)
    assert done.returncode == 1 and stranger.node_id[:6] in one_error(done), done.stderr
    assert "/dev/null" in one_error(done)


@slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whoever_ends_it_leaves_no_referee_on_a_node(ray, checkout, start, end):
    sleep = "    import time; time.sleep(600 * (SHARPNESS != 0.5)); finish(model"
    checkout.write_train(TOY.replace("    finish(model", sleep))
    checkout.commit_all()
    base = (checkout.folder / "train.py").read_text()
    patches = [checkout.patch(f"{v}.py", "SHARPNESS = 0.5", f"SHARPNESS = {v}", base)
               for v in (0.6, 0.7)]  # fmt: skip
    night = start(checkout, "--slots", "2", "--patches", *patches)
    baseline = checkout.folder / "runs/t/0/result.json"
    wait_for(lambda: baseline.exists() and len(referees(ray)) >= 4, night)
    night.send_signal(end)
    begun = time.monotonic()
    said = night.communicate(timeout=90)[1]
    if end == signal.SIGKILL:
        assert night.returncode == -signal.SIGKILL
    else:
        assert night.returncode == 130 and "goes on from here" in said, said
    while left := referees(ray):
        assert time.monotonic() < begun + 60, left
        time.sleep(0.1)
    print(f"{end.name}: nobody is left after {time.monotonic() - begun:.1f} s")
