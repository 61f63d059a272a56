"""The Ray backend on a real cluster of a head and two nodes, all of them on this machine.

python -m pytest tests/test_cluster.py -m "not nightly"

Ray needs seconds to start a node, and many more on a busy machine. So nothing here waits for a
time: a stand-in for the referee holds a run up until the test has seen what it waits for.
"""

import difflib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from prepare import SetupError
from support.checkout import TOY, Checkout, sh
from support.checks import (
    assert_each_keep_sits_on_what_it_was_measured_against,
    numbers_tried,
    one_error,
    statuses,
    trailers,
)
from support.stand_in import sharpness, stand_in
from support.waiting import wait_until

STORE = 80 * 2**20  # bytes of each node's object store
KEY = "sk-of-the-person-who-starts-it"


# ---------------------------------------------------------------------------
# A cluster
# ---------------------------------------------------------------------------


class Ray:
    """A cluster: a head that runs nothing, and nodes with room for two runs at a time each."""

    def __init__(self, cache, temporary):
        from ray.cluster_utils import Cluster

        self.cache, self.temporary, self.names = cache, temporary, itertools.count(1)
        self.cluster = Cluster()
        self.add(num_cpus=0, include_dashboard=False, no_monitor=True,
                 include_log_monitor=False)  # fmt: skip
        self.address = self.cluster.address
        self.nodes = [self.add(), self.add()]

    def add(self, env=None, **more):
        """Start a node, with a folder of its own as on a machine of its own."""
        name = f"{next(self.names)}"
        env = {"AUTORESEARCH_CACHE": str(self.cache), "AUTORESEARCH_NODE": name} | (env or {})
        settings = {"num_cpus": 4, "object_store_memory": STORE, "env_vars": env,
                    "temp_dir": f"{self.temporary}/{name}"}  # fmt: skip
        node = self.cluster.add_node(**settings | more)
        node.name = name
        return node

    def remove(self, node):
        self.cluster.remove_node(node, allow_graceful=False)

    @contextmanager
    def joined_by(self, *arguments, **more):
        """Have one more node for a while."""
        node = self.add(*arguments, **more)
        try:
            yield node
        finally:
            self.remove(node)

    def processes(self):
        return sh("pgrep", "-f", self.temporary, cwd="/").stdout.split()

    def referees(self):
        """Return the processes that measure; the programs travel to a folder of the node."""
        return sh("pgrep", "-f", f"{self.temporary}.*/(referee|warden).py", cwd="/").stdout.split()

    def confined(self):
        """Return the processes that are measured, by the folder in which they are."""
        found = []
        for link in Path("/proc").glob("[0-9]*/cwd"):
            with suppress(OSError):  # it has ended meanwhile
                if re.match(f"{re.escape(self.temporary)}.*/work-", os.readlink(link)):
                    found.append(link.parent.name)
        return found

    def end(self):
        """Take the cluster down, and see that none of its processes is left."""
        self.cluster.shutdown()
        wait_until(lambda: not self.processes())
        shutil.rmtree(self.temporary)


@pytest.fixture(scope="class")
def ray(cache):
    pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_prestart_worker_first_driver", "0")  # they do not have our programs
        patch.delenv("ANTHROPIC_API_KEY", raising=False)
        temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        os.mkdir(f"{temporary}/ray")  # there Ray notes the address, which else is everybody's
        patch.setenv("RAY_TMPDIR", temporary)
        cluster = Ray(cache, temporary)
        yield cluster
        cluster.end()


@pytest.fixture
def start(ray):
    """Starts agent.py on the cluster; what is still alive at the end is killed."""
    started = []

    def run(checkout, *words, env=None):
        command = [sys.executable, "agent.py", "--tag", "t", "--ray", ray.address, *words]
        started.append(subprocess.Popen(
            list(map(str, command)), cwd=checkout.folder, env=checkout.env | (env or {}),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8",
        ))  # fmt: skip
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()
        process.stderr.close()


class Told:
    """The stand-in on all nodes: it tells in a file where it measures what, and can be held up."""

    def __init__(self, checkout, more="", allowed=0):
        self.folder = checkout.folder.parent
        self.path = self.folder / "told"
        self.path.touch()
        self.allow(allowed)
        step = f"""\
            number, node = int(os.path.basename(args.folder)), os.environ["AUTORESEARCH_NODE"]
            with open({str(self.path)!r}, "a") as file:
                file.write(json.dumps([node, number, args.run, dict(os.environ)]) + "\\n")
            def allowed():
                paths = [{str(self.folder)!r} + "/allowed" + name for name in ("-" + node, "")]
                return max(int(open(path).read()) for path in paths if os.path.exists(path))
            while number > allowed():
                time.sleep(0.02)"""
        stand_in(checkout, textwrap.indent(textwrap.dedent(step), "    ").lstrip(), more)

    def allow(self, number, node=None):
        """Let experiments up to this number go on, on all nodes or on one more than on others."""
        path = self.folder / (f"allowed-{node.name}" if node else "allowed")
        path.with_suffix(".part").write_text(f"{number}", encoding="utf-8")
        path.with_suffix(".part").rename(path)

    def runs(self):
        """Return (node, experiment, run) of every start, in order."""
        lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]
        return [tuple(json.loads(line)[:3]) for line in lines]

    def ideas(self):
        return [run for run in self.runs() if run[1]]


def log_of(checkout):
    """Return what agent.py has said so far."""
    path = checkout.folder / "runs/t/agent.log"
    return path.read_text(encoding="utf-8") if path.exists() else ""


# ---------------------------------------------------------------------------
# Ideas that can be taken up in any order
# ---------------------------------------------------------------------------

# What each idea adds to the score, whatever else was kept: 10 standard deviations and more.
GAINS = {1: 0.02, 2: 0.03, 3: -0.02, 4: -0.03, 5: 0.025, 6: -0.025, 7: -0.04, 8: 0.022}
MORE = f"""\
for number, gain in {GAINS}.items():
    result["val_bpb"] -= gain * (f"IDEA_{{number}} = 1" in source)
"""


def independent_ideas(checkout):
    """Give train.py a line for each idea, too far apart to get into each other's diffs.

    Returns the diffs' paths.
    """
    lines = [f"IDEA_{number} = 0\n#\n#\n#\n" for number in GAINS]
    checkout.write_train(base := TOY.replace("PASSES = 4\n", "PASSES = 4\n#\n" + "".join(lines)))
    checkout.commit_all()
    paths = []
    for number in GAINS:
        new = base.replace(f"IDEA_{number} = 0", f"IDEA_{number} = 1")
        names = {"fromfile": "a/train.py", "tofile": "b/train.py"}
        text = difflib.unified_diff(base.splitlines(True), new.splitlines(True), **names)
        paths.append(checkout.folder.parent / f"{number}.diff")
        paths[-1].write_text("".join(text), encoding="utf-8")
    return paths


def outcome(checkout):
    """Return what must not depend on where runs were: {idea: (status, gain)}, the train.py kept."""
    found = [trailers(checkout, ref) for ref in checkout.refs()]
    names = [checkout.git("log", "-1", "--format=%s", ref) for ref in checkout.refs()]
    ideas = zip(names, found, strict=True)
    gains = {name: (facts["Status"], round(facts["Gain"], 6)) for name, facts in ideas}
    return gains, checkout.git("show", "autoresearch/t:train.py")


# ---------------------------------------------------------------------------
# On the cluster
# ---------------------------------------------------------------------------


class TestOnACluster:
    @pytest.mark.gate
    def test_four_slots_on_two_nodes_end_in_the_history_of_one_slot(
        self, ray, checkout, start, tmp_path, cache
    ):
        """Ideas win on a best that is not the best any more, too. No key goes to a node."""
        told, ideas = Told(checkout, MORE), independent_ideas(checkout)
        keys = {"ANTHROPIC_API_KEY": KEY, "SOME_TOKEN": KEY}
        agent = start(checkout, "--patches", *ideas, env=keys)
        wait_until(lambda: len(told.ideas()) == 4, agent)
        told.allow(1)  # the others are measured on the baseline still when this one is kept
        wait_until(lambda: "refs/autoresearch/t/1" in checkout.refs(), agent)
        told.allow(len(GAINS))
        said = agent.communicate()[1]
        assert agent.returncode == 0, said
        assert "once more, on top of the new best" in said
        assert_each_keep_sits_on_what_it_was_measured_against(checkout)
        assert {node for node, _, _ in told.runs()} == {node.name for node in ray.nodes}
        assert KEY not in told.path.read_text(encoding="utf-8")
        settings = trailers(checkout, "refs/autoresearch/t/1")["Settings"]
        assert settings.endswith(" cores, 2 runs at a time")

        (tmp_path / "alone").mkdir()
        alone = Checkout(tmp_path / "alone/checkout", cache)
        stand_in(alone, more=MORE)
        ideas = independent_ideas(alone)
        done = alone.agent("--tag", "t", "--slots", "1", "--patches", *ideas)
        assert done.returncode == 0, done.stderr
        assert outcome(checkout) == outcome(alone)
        kept = {f"{n}.diff": ("keep" if gain > 0 else "discard", gain) for n, gain in GAINS.items()}
        assert outcome(alone)[0] == kept

    @pytest.mark.gate
    def test_a_node_that_dies_loses_its_runs_only_and_they_are_run_elsewhere(
        self, ray, checkout, start
    ):
        """A node that joins later is looked at and gets runs."""
        told, victim = Told(checkout), ray.nodes[-1]
        patches = sharpness(checkout, *(f"{0.45 - 0.02 * n:.2f}" for n in range(9)))
        agent = start(checkout, "--patches", *patches)
        wait_until(lambda: len(told.ideas()) == 4, agent)  # two on each node, which are held up
        lost = {run[1:] for run in told.ideas() if run[0] == victim.name}
        assert len(lost) == 2
        ray.nodes.remove(victim)
        ray.remove(victim)
        late = ray.add()
        ray.nodes.append(late)
        name = f"node {late.node_ip_address} ({late.node_id[:6]})"
        wait_until(lambda: f"new in the cluster: {name}" in log_of(checkout), agent)
        told.allow(len(patches), late)
        told.allow(allowed := 4)

        def late_has_run():
            """Hold up later ideas on the old node, so that they have to be run on the new one.

            The lost runs may wait for room on the old node: then one that is held up goes on.
            """
            nonlocal allowed
            found = told.ideas()
            held = [run[1] for run in found if run[1] > allowed and run[0] != late.name]
            again = {run[1:] for run in found if run[0] != victim.name}
            if len(held) == 2 and not lost <= again:
                allowed = min(held)
                told.allow(allowed)
            return late.name in {run[0] for run in found}

        wait_until(late_has_run, agent)
        told.allow(len(patches))
        said = agent.communicate()[1]
        assert agent.returncode == 0, said
        assert numbers_tried(checkout) == list(range(1 + len(patches)))
        assert statuses(checkout) == ["keep", *["discard"] * len(patches)]
        starts = Counter(run[1:] for run in told.ideas())
        assert {run for run, count in starts.items() if count == 2} == lost, said
        assert set(starts.values()) == {1, 2}
        assert_each_keep_sits_on_what_it_was_measured_against(checkout)

    @pytest.mark.parametrize(
        "end, real",
        [pytest.param(signal.SIGKILL, False, marks=pytest.mark.gate),
         *(pytest.param(end, True, marks=pytest.mark.nightly)
           for end in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM))],
    )  # fmt: skip
    def test_whoever_ends_it_leaves_no_referee_on_a_node(self, ray, checkout, start, end, real):
        """The real referee measures a train.py that never comes to its end."""
        if real:
            forever = "    while True:\n        pass\n    finish(model"
            checkout.write_train(TOY.replace("    finish(model", forever))
            checkout.commit_all()
            begun = ray.confined
        else:
            begun = Told(checkout, allowed=-1).runs
        agent = start(checkout, "--slots", "1")
        wait_until(begun, agent)
        assert ray.referees()
        agent.send_signal(end)
        said = agent.communicate()[1]
        if end == signal.SIGKILL:
            assert agent.returncode == -signal.SIGKILL, said
        else:
            assert agent.returncode == 130 and "goes on from here" in said, said
        wait_until(lambda: not ray.referees() and not ray.confined())

    @pytest.mark.nightly
    def test_a_machine_of_another_kind_is_left_out(self, ray, checkout):
        """It has room for one run at a time, the others for two."""
        stand_in(checkout)
        with ray.joined_by(num_cpus=2) as small:
            words = ("--ray", ray.address, "--experiments", "0", "--tag", "t")
            done = checkout.agent(*words, timeout=1200)
        assert done.returncode == 0, done.stderr
        assert f"left out: node {small.node_ip_address} ({small.node_id[:6]})" in done.stderr
        assert int(checkout.rows()[0]["runs"]) == 4  # one on every slot

    @pytest.mark.nightly
    def test_a_run_on_the_cluster_has_the_score_that_it_has_here(self, ray, checkout):
        patch = checkout.patch("a.py", "SHARPNESS = 0.5", "SHARPNESS = 0.8")
        words = ("--ray", ray.address, "--slots", "1", "--tag", "t", "--patches", patch)
        done = checkout.agent(*words, timeout=1200)
        assert done.returncode == 0, done.stderr
        there = checkout.folder / "runs/t/1"
        result = json.loads((there / "result.json").read_text(encoding="utf-8"))
        assert result["status"] == "ok"
        assert "val_bpb" in (there / "run.log").read_text(encoding="utf-8")
        here = checkout.folder.parent / "here"
        here.mkdir()
        shutil.copy(there / "train.py", here)
        words, (silent, _) = ("referee.py", here, "--seed", result["seed"]), os.pipe()
        local = sh(sys.executable, *words, cwd=checkout.folder, env=checkout.env, stdin=silent,
                   timeout=1200)  # fmt: skip
        assert local.returncode == 0, local.stderr
        scored = json.loads((here / "result.json").read_text(encoding="utf-8"))["val_bpb"]
        assert scored == result["val_bpb"]
        assert float(checkout.rows()[1]["val_bpb"]) == pytest.approx(scored, abs=1e-6)

    @pytest.mark.nightly
    def test_a_node_with_other_rows_ends_it_with_two_lines(self, ray, checkout, tmp_path):
        """The rows of one node are made of another text."""
        text = "".join(f"{n} is {n * n}\n" for n in range(60_000))
        (tmp_path / "text").write_text(text, encoding="utf-8")
        env = {"AUTORESEARCH_CORPUS": str(tmp_path / "text"), "AUTORESEARCH_CACHE": str(tmp_path)}
        with ray.joined_by(env) as stranger:
            done = checkout.agent("--ray", ray.address, timeout=1200)
        assert done.returncode == 1, done.stderr
        assert "other rows: corpus" in one_error(done) and stranger.node_id[:6] in one_error(done)
        assert not (checkout.folder / "results.tsv").exists()

    @pytest.mark.nightly
    def test_a_node_that_cannot_prepare_rows_ends_it_with_two_lines(self, ray, checkout):
        with ray.joined_by({"AUTORESEARCH_CACHE": "/dev/null/cache"}) as stranger:
            done = checkout.agent("--ray", ray.address, timeout=1200)
        assert done.returncode == 1 and stranger.node_id[:6] in one_error(done), done.stderr
        assert "/dev/null" in one_error(done)


# ---------------------------------------------------------------------------
# Without a cluster
# ---------------------------------------------------------------------------

FACTS = {"manifest": "a" * 8, "source": "library", "rows": "/rows", "torch": "2.0",
         "device": "a processor, 4 cores"}  # fmt: skip
NODE = {"NodeManagerAddress": "10.0.0.7", "NodeID": "123456789", "Resources": {"CPU": 4}}


def test_the_commonest_kind_of_machine_is_used_and_others_are_left_out(monkeypatch, capsys):
    cluster = pytest.importorskip("cluster")
    devices, cpus = ("a", "b", "b", "c"), (5, 4, 5, 6)  # room for 2, 2, 2 and 3 runs
    nodes = {f"id {n}": NODE | {"NodeID": f"id {n}", "Resources": {"CPU": cpus[n]}}
             for n in range(4)}  # fmt: skip

    def look_at_all(joined):
        for key, device in zip(nodes, devices, strict=True):
            joined.found[key] = FACTS | {"device": device, "means": "landlock"}
        return nodes

    monkeypatch.setattr(cluster, "connect", lambda address: None)
    monkeypatch.setattr(cluster, "needs_of_a_run", lambda: {"num_cpus": 2, "num_gpus": 0})
    monkeypatch.setattr(cluster, "look_at_all", look_at_all)
    scale, _, most = cluster.join("auto", None, False)
    assert (scale["device"], most) == ("b", 4)
    said = capsys.readouterr().err
    for n, device in ((0, "a"), (3, "c")):
        assert f"left out: node 10.0.0.7 (id {n}) is {device}, compared are runs on b" in said
    assert said.count("left out") == 2 and "node 10.0.0.7 (id 2): b, room for 2, landlock" in said


@pytest.mark.parametrize(
    "other, error, hint",
    [
        ({"manifest": "b" * 8, "source": "corpus"}, "other rows: corpus (bbbbbbbb), not library "
         "(aaaaaaaa)", "rm -r /rows"),
        ({"torch": "1.0"}, "torch is 1.0, not 2.0", "pip install torch==2.0"),
        ({"device": "another one"}, "it is another one, not a processor, 4 cores", "ray status"),
        ({"error": "prepare.py said\nerror: no space\nhint: df -h"}, "no space", "df -h"),
    ],
)  # fmt: skip
def test_a_node_whose_runs_could_not_be_compared_ends_it_with_two_lines(other, error, hint):
    cluster = pytest.importorskip("cluster")
    cluster.refuse(NODE, cluster.difference(dict(FACTS), FACTS))  # an equal one is welcome
    with pytest.raises(SetupError) as refusal:
        cluster.refuse(NODE, cluster.difference(FACTS | other, FACTS))
    said = f"error: node 10.0.0.7 (123456): {error}\nhint: ssh 10.0.0.7  # then: {hint}"
    assert str(refusal.value) == said


def test_without_ray_the_error_says_what_to_install(checkout):
    code = (
        "import sys; sys.modules['ray'] = None; sys.argv[1:] = ['--ray', 'auto']; "
        "import agent; sys.exit(agent.main())"
    )
    done = sh(sys.executable, "-c", code, cwd=checkout.folder, env=checkout.env)
    assert done.returncode == 1 and "import of ray" in one_error(done)
    assert done.stderr.splitlines()[-1] == "hint: pip install '.[ray]'"


@pytest.mark.parametrize(
    "address",
    [pytest.param("127.0.0.1:9", marks=pytest.mark.gate),
     pytest.param("nonsense", marks=pytest.mark.nightly)],
)  # fmt: skip
def test_an_address_where_no_cluster_is_ends_it_with_two_lines(checkout, address):
    """Ray's own patience is a quarter of an hour, which is beyond the limit here."""
    pytest.importorskip("ray")
    done = checkout.agent("--ray", address, timeout=600)
    assert done.returncode == 1 and f"--ray {address}: " in one_error(done)
    assert not (checkout.folder / "results.tsv").exists()
