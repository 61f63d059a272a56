"""The cluster: runs as tasks of a Ray cluster that a person has brought up.

    pip install '.[ray]'
    ray start --head --port 6379               # by hand: on the first machine
    ray start --address HOST:6379              # on each of the others
    ray up cluster.yaml                        # or in a cloud, by Ray's launcher
    ray attach cluster.yaml                    # to where agent.py is then started
    sky launch -c night --num-nodes 4 --gpus H100 ray.yaml   # or by SkyPilot, `run:` as by hand
    python agent.py --ray auto                 # on a node, or --ray HOST:6379 --slots 4

A slot is a task with a GPU (two CPUs at the scale `cpu`). Nodes prepare or verify their rows and
test their cage first, and are left out if their device is another one; what a dying node ran is run
elsewhere. Ray schedules, carries and tries again. A node measures a run as one machine does, from a
copy of the programs that comes with the task; here are the two ends of that wire. A run starts cold
there: nothing stands by on a node whose next task is Ray's to choose.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

# An address where nobody answers is told in 10 seconds, not in 15 minutes and on the screen; and
# `uv run` is not Ray's way to start its workers. Ray reads these when it is loaded.
os.environ |= {"RAY_NUM_REDIS_GET_RETRIES": "1", "RAY_py_gcs_connect_timeout_s": "5"}
os.environ |= {"RAY_gcs_rpc_server_connect_timeout_s": "2", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
import ray
from ray.exceptions import NodeDiedError, RayError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from journal import ROOT, STOP, Experiment, Run, doing, one_line, patiently, say
from prepare import TRUSTED, SetupError, write_atomic
from slots import Task, check_trusted, measure, trusted_command
from warden import MEMORY_SHARE, memory_available

PROGRAMS = (
    *TRUSTED, "agent.py", "cluster.py", "digest.py", "journal.py", "pretokenize.py", "proposals.py",
    "researcher.py", "rule.py", "slots.py",
)  # fmt: skip
CPUS = 2  # of a run without a GPU
RETRIES = 3  # by Ray, of a run whose node or process dies; the loop asks for it again after that
POLL_SECONDS = 0.5
PATIENCE_SECONDS = 60.0  # then it is said which nodes are awaited
END_SECONDS = 25.0  # for a run that is cancelled to be over: its referee has 20


# ---------------------------------------------------------------------------
# On a node
# ---------------------------------------------------------------------------


def look(corpus: str | None, unconfined: bool, room: int) -> dict[str, Any]:
    """Rows prepared or verified, the cage tested: what prepare.py says, or why not as `error`."""
    from agent import confine

    try:
        facts = prepare_rows(corpus)
        names = {name for _, name in facts["gpus"]}
        if facts["name"] != "cpu" and len(names) != 1:
            said = f"GPUs of one kind can be compared only, torch sees: {', '.join(sorted(names))}"
            raise SetupError(said, "nvidia-smi -L")
        facts["means"] = confine(unconfined)
    except (SystemExit, OSError) as error:  # the first would end Ray's process
        return {"error": str(error)}
    if not facts["gpus"]:  # runs at a time share caches and memory
        facts["device"] = processor() + (f", {room} runs at a time" if room > 1 else "")
    there = MEMORY_SHARE * memory_available() / 2**30
    return facts | {"memory_gb": there / room if room > 1 else math.inf, "torch": version("torch")}


def prepare_rows(corpus: str | None) -> dict[str, Any]:
    """What prepare.py says when the rows are there. Raises SystemExit with its last words."""
    folder = Path(os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    command = trusted_command("prepare.py", *(["--corpus", corpus] if corpus else []))
    with open(folder / "prepare.lock", "a") as file:  # nodes may share the folder
        fcntl.flock(file, fcntl.LOCK_EX)
        done = subprocess.run(command, capture_output=True, encoding="utf-8", input="")
    if done.returncode:
        raise SystemExit(done.stderr[-2000:] or f"prepare.py: exit status {done.returncode}")
    return json.loads(done.stdout)


def processor() -> str:
    """The kind of a machine without a GPU: cores of one model are alike."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.+)", info.read_text() if info.exists() else "", re.M)
    return f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores"


def carry_out(
    run: Run, number: int, source: str, seed: int, count: int, hidden_below: float,
    found: dict[str, Any],
) -> tuple[dict[str, bytes], str]:
    """Measure one run in a folder of its own: (the files that it leaves, the referee's words)."""
    facts = found[ray.get_runtime_context().get_node_id()]
    if facts["gpus"]:
        os.environ.pop("OMP_NUM_THREADS", None)  # one, which is Ray's word and no machine's
    (ROOT / "runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "runs") as folder:
        here = {name: facts[name] for name in ("rows", "means", "memory_gb")}
        run = replace(run, tag=Path(folder).name, scale=run.scale | here)
        own, task = run.folder(number), Task("", Experiment(number, ""), source, seed=seed)
        own.mkdir()
        write_atomic(own / "train.py", [source.encode()])
        task.slot.cold = True
        try:
            check_trusted(run)
            said = measure(run, task, count, f"{number}", hidden_below)
            check_trusted(run)
        except SystemExit as error:  # which would end Ray's process
            return {}, str(error)
        left = [path for path in own.iterdir() if path.suffix in (".log", ".json")]
        return {path.name: path.read_bytes() for path in left}, said


# ---------------------------------------------------------------------------
# Where agent.py runs
# ---------------------------------------------------------------------------


@dataclass(eq=False)
class Cluster:
    """The cluster that this process is connected to, and what was found on its nodes, by Ray's id.

    A node is looked at before its first run; what was found is {} if it died meanwhile.
    """

    corpus: str | None
    unconfined: bool
    needs: dict[str, Any]  # of a run: Ray's options of a task
    looks: dict[str, Any] = field(default_factory=dict)  # Ray's promises
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    one_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    def nodes(self) -> dict[str, dict[str, Any]]:
        """Those that live and have room, by Ray's id."""
        alive = (node for node in ray.nodes() if node["Alive"])
        return {node["NodeID"]: node for node in alive if self.room(node)}

    def room(self, node: dict[str, Any]) -> int:
        """Runs at a time on a node."""
        wanted = {"CPU": self.needs["num_cpus"], "GPU": self.needs["num_gpus"]}
        return int(min(node["Resources"].get(kind, 0) // n for kind, n in wanted.items() if n))

    def look_at(self, nodes: dict[str, dict[str, Any]]) -> list[str]:
        """Have new nodes looked at; those of which it is known since now what was found."""
        new = []
        for key, node in nodes.items():
            if key not in self.looks:  # with all its GPUs, which must be of one kind
                gpus = self.needs["num_gpus"] and node["Resources"]["GPU"]
                there = NodeAffinitySchedulingStrategy(key, soft=False)
                options = self.needs | {"num_gpus": gpus, "scheduling_strategy": there}
                task = ray.remote(look).options(**options, max_retries=0)
                self.looks[key] = task.remote(self.corpus, self.unconfined, self.room(node))
            if key not in self.found and ray.wait([self.looks[key]], timeout=0)[0]:
                new.append(key)
                try:
                    self.found[key] = ray.get(self.looks[key])
                except (NodeDiedError, TaskUnschedulableError):
                    self.found[key] = {}
                except RayError as error:
                    self.found[key] = {"error": one_line(str(error)[-400:], 400)}
        return new

    def usable(self, run: Run) -> dict[str, dict[str, Any]]:
        """What was found on nodes that live and are like the run's; new ones are looked at."""
        nodes = self.nodes()
        with self.one_at_a_time:
            for key in filter(self.found.get, self.look_at(nodes)):
                problem = difference(self.found[key], run.scale)
                why = f", left out: {one_line(problem, 300)}" if problem else ""
                say(f"new in the cluster: {name_of(nodes[key])}{why}")
        found = ((key, self.found.get(key)) for key in nodes)
        return {key: facts for key, facts in found if facts and not difference(facts, run.scale)}

    def measure(self, run: Run, task: Task, count: int, label: str, hidden_below: float) -> str:
        """Have a node measure one run, and write here what it leaves; the referee's last words."""
        sent = replace(run, history=run.history[:1], running=[], sources={}, screened={}, tiny={})
        words = (sent, task.done.number, task.source, task.seed, count, hidden_below)
        promise, places, begun = None, {}, time.monotonic()
        try:
            with doing(label) as show:
                while not promise or not ray.wait([promise], timeout=0)[0]:
                    now = self.usable(run)
                    if now and not places.keys() & now.keys():  # or all that could have it died
                        cancel(promise)
                        there = {"ray.io/node-id": f"in({','.join(now)})"}
                        options = self.needs | {"label_selector": there, "max_retries": RETRIES}
                        promise = ray.remote(carry_out).options(**options).remote(*words, now)
                        places = now
                    show(f"{label} · {time.monotonic() - begun:.0f} s")
                    if STOP.wait(POLL_SECONDS):
                        raise KeyboardInterrupt
            files, said = ray.get(promise)
        except RayError as error:
            return one_line(str(error)[-400:], 400)
        finally:
            cancel(promise)  # which does nothing to what is over
        folder = run.folder(task.done.number)
        folder.mkdir(parents=True, exist_ok=True)  # somebody may have cleared runs/
        for name, data in sorted(files.items(), reverse=True):  # the result last: it ends the run
            patiently(write_atomic, folder / name, [data])
        return said


def cancel(promise: Any) -> None:
    """Have Ray interrupt a task, and wait until it is over: it ends what it has started."""
    if promise:
        ray.cancel(promise)
        ray.wait([promise], timeout=END_SECONDS)


def connect(address: str) -> None:
    """Join the cluster, with a copy of the programs for its nodes. Raises SetupError."""
    ending = signal.getsignal(signal.SIGTERM)  # which Ray takes for itself
    with tempfile.TemporaryDirectory() as staged:
        for name in PROGRAMS:
            shutil.copy(ROOT / name, staged)
        quiet = {"log_to_driver": False, "configure_logging": False}
        try:
            ray.init(address, runtime_env={"working_dir": staged}, **quiet)
        except (OSError, RuntimeError, ValueError, RayError) as error:
            said = f"--ray {address}: {one_line(str(error), 300)}"
            hint = "ray status  # on a node of the cluster; or bring one up: ray start --head"
            raise SetupError(said, hint) from None
        finally:
            signal.signal(signal.SIGTERM, ending)


def join(address: str, corpus: str | None, unconfined: bool) -> tuple[dict[str, Any], Cluster, int]:
    """(what prepare.py says on the nodes, the cluster, its runs at a time). Raises SetupError.

    Nodes of the commonest device are the ones; a problem of any of them is the night's.
    """
    corpus = corpus or os.environ.get("AUTORESEARCH_CORPUS")
    connect(address)
    corpus = corpus and str(Path(corpus).expanduser().resolve())
    cluster = Cluster(corpus, unconfined, needs_of_a_run())
    if not (nodes := look_at_all(cluster)):
        what = "a GPU" if cluster.needs["num_gpus"] else f"{CPUS} CPUs"
        raise SetupError(f"--ray {address}: no node of the cluster has {what}", "ray status")
    rooms: Counter[tuple[str, str]] = Counter()
    for key, node in nodes.items():
        facts = cluster.found[key]
        refuse(node, facts.get("error", ""))
        rooms[facts["device"], facts["manifest"]] += cluster.room(node)
    kind = max(rooms, key=lambda kind: (rooms[kind], kind))
    like = (cluster.found[key] for key in nodes)
    scale = next(facts for facts in like if (facts["device"], facts["manifest"]) == kind)
    for key, node in nodes.items():
        facts, name = cluster.found[key], name_of(node)
        if facts["device"] == kind[0]:
            refuse(node, difference(facts, scale))
            say(f"{name}: {kind[0]}, room for {cluster.room(node)}, {facts['means']}")
        else:
            say(f"left out: {name} is {facts['device']}, compared are runs on {kind[0]}")
    return dict(scale), cluster, rooms[kind]


def needs_of_a_run() -> dict[str, Any]:
    """Ray's options of a task, by the scale: the person's, or that of what the cluster has."""
    gpus = ray.cluster_resources().get("GPU", 0)
    scale = os.environ.get("AUTORESEARCH_SCALE") or ("gpu" if gpus >= 1 else "cpu")
    passed = {k: v for k, v in os.environ.items() if k.startswith("AUTORESEARCH_BUDGET")}
    passed |= {"CUDA_VISIBLE_DEVICES": ""} if scale == "cpu" else {}
    needs = {"num_gpus": 0, "num_cpus": CPUS} if scale == "cpu" else {"num_gpus": 1, "num_cpus": 1}
    return needs | {"runtime_env": {"env_vars": passed | {"AUTORESEARCH_SCALE": scale}}}


def look_at_all(cluster: Cluster) -> dict[str, dict[str, Any]]:
    """The nodes that live, when all have been looked at."""
    nodes, patience = cluster.nodes(), time.monotonic() + PATIENCE_SECONDS
    say(f"preparing or verifying the rows on {len(nodes)} nodes of the cluster")
    while awaited := nodes.keys() - cluster.found.keys():
        cluster.look_at(nodes)
        time.sleep(POLL_SECONDS)
        if time.monotonic() > patience:
            patience, names = math.inf, ", ".join(name_of(nodes[key]) for key in awaited)
            say(f"still preparing, or busy with the work of others: {names}")
    return {key: node for key, node in nodes.items() if cluster.found[key]}


def name_of(node: dict[str, Any]) -> str:
    return f"node {node['NodeManagerAddress']} ({node['NodeID'][:6]})"


def refuse(node: dict[str, Any], problem: str) -> None:
    """Raise SetupError for a problem of a node, in the two lines of a program there, if any."""
    if problem:
        problem, _, hint = problem.rpartition("error: ")[2].partition("\nhint: ")
        hint = f"ssh {node['NodeManagerAddress']}  # then: {one_line(hint) or 'ray status'}"
        raise SetupError(f"{name_of(node)}: {one_line(problem[-500:], 500)}", hint)


def difference(facts: dict[str, Any], scale: dict[str, Any]) -> str:
    """Why runs with these facts are not compared with runs at this scale; "" if they are."""
    if "error" in facts:
        return facts["error"]
    if facts["manifest"] != scale["manifest"]:
        ours, theirs = (f"{each['source']} ({each['manifest']})" for each in (scale, facts))
        return f"other rows: {theirs}, not {ours}\nhint: rm -r {facts['rows']}"
    if facts["torch"] != (ours := scale["torch"]):
        return f"torch is {facts['torch']}, not {ours}\nhint: pip install torch=={ours}"
    same = facts["device"] == scale["device"]
    return "" if same else f"it is {facts['device']}, not {scale['device']}"
