"""How a session of agent.py begins: its help, what confines train.py, and who else is at work.

python -m pytest tests/test_session.py -m "not nightly"
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig

import pytest

from support.checkout import ROOT, TOY, Checkout, sh
from support.checks import one_error, statuses, trailers
from support.stand_in import kill_and_wait, let_go, sharpness, stand_in, while_training
from support.waiting import wait_until

HEAVY = ("torch", "numpy", "anthropic", "optuna", "ray", "matplotlib", "tiktoken", "datasets")
COMMANDS = ("agent.py", "agent.py report", "agent.py promote", "prepare.py", "referee.py",
            "warden.py")  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_given_without_a_heavy_package(command):
    """None of these packages can be imported, so that whatever needs one fails."""
    program, *words = command.split()
    without = "import runpy, sys; sys.modules |= dict.fromkeys({!r}); sys.argv = {!r}; {}".format(
        HEAVY, [program, *words, "--help"],
        f"sys.path.insert(0, ''); runpy.run_path({program!r}, run_name='__main__')",
    )  # fmt: skip
    done = sh(sys.executable, "-c", without, cwd=ROOT, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {command} ")


# ---------------------------------------------------------------------------
# What confines train.py
# ---------------------------------------------------------------------------

LANDLOCK = "return max(0, libc.syscall(444, None, ctypes.c_long(0), ctypes.c_long(1)))"


def without_any_means(checkout: Checkout) -> dict[str, str]:
    """Have no means of confinement work in a checkout; returns the environment for that.

    bubblewrap cannot be found, and the sandbox believes that the kernel has no Landlock.
    """
    path = checkout.folder / "warden.py"
    text = path.read_text(encoding="utf-8")
    assert text.count(LANDLOCK) == 1
    path.write_text(text.replace(LANDLOCK, "return 0"), encoding="utf-8")
    checkout.commit_all()
    programs = checkout.folder.parent / "programs"
    programs.mkdir()
    for name in ("git", "nice", "chmod", "rm"):
        (programs / name).symlink_to(shutil.which(name))
    return {"PATH": str(programs)}


@pytest.fixture
def quick(checkout):
    """A checkout with the stand-in for a referee, which is confined as the real one is."""
    stand_in(checkout)
    return checkout


def test_where_nothing_confines_it_is_refused_in_two_lines_that_name_the_way_out(quick):
    done = quick.agent("--tag", "t", env=without_any_means(quick))
    assert done.returncode == 1 and done.stdout == ""
    said = one_error(done)
    assert said.startswith("train.py cannot be confined: bubblewrap is not installed; Landlock has")
    assert done.stderr.splitlines()[-1].endswith("python agent.py --unconfined")
    assert not (quick.folder / "results.tsv").exists()
    assert not list(quick.folder.glob("runs/t/*/train.py")), "something was trained"
    assert quick.git("for-each-ref", "refs/autoresearch*", "refs/heads/autoresearch") == ""


def outside(checkout: Checkout) -> str:
    """Return a train.py that does what the sandbox denies, and says what came of it."""
    mark = checkout.folder.parent / "mark"
    mark.touch()
    attempt = f"""\
def attempt():
    import socket
    for name, action in (("write", lambda: open({str(mark)!r}, "a").write("x")),
                         ("key", lambda: open({str(checkout.folder / ".env")!r}).read()),
                         ("socket", lambda: socket.create_connection(("127.0.0.1", PORT)))):
        try:
            action()
            print(name, "done")
        except OSError:
            print(name, "denied")


attempt()
main()
"""
    return TOY.replace("\nmain()\n", f"\n{attempt}")


def test_what_measures_has_no_key_in_its_environment(quick):
    """Neither the referee nor what it starts can give away what it does not have."""
    stand_in(quick, more="json.dump(dict(os.environ), open(here + '/environment', 'w'))")
    keys = {"ANTHROPIC_API_KEY": "sk-1", "ANTHROPIC_AUTH_TOKEN": "2", "HF_TOKEN": "3",
            "AWS_SECRET_ACCESS_KEY": "4", "SSH_AUTH_SOCK": "/tmp/5"}  # fmt: skip
    done = quick.agent("--tag", "t", "--patches", *sharpness(quick, 0.6), env=keys)
    assert done.returncode == 0, done.stderr
    environment = json.loads((quick.folder / "environment").read_text(encoding="utf-8"))
    assert "PATH" in environment and not keys.keys() & environment.keys()


@pytest.mark.gate
@pytest.mark.parametrize("confined", [True, False])
def test_unconfined_is_what_it_says_and_says_it(checkout, confined):
    """The same train.py tries to write a file, to read a key and to open a connection."""
    (checkout.folder / ".env").write_text("A_KEY=1", encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        checkout.write_train(outside(checkout).replace("PORT", f"{port}"))
        checkout.commit_all()
        if confined:
            done = checkout.agent("--tag", "t", "--experiments", "0")
        else:
            env = without_any_means(checkout)
            done = checkout.agent("--tag", "t", "--experiments", "0", "--unconfined", env=env)
    assert done.returncode == 0, done.stderr
    log = (checkout.folder / "runs/t/0/run.log").read_text(encoding="utf-8")
    for name in ("write", "key", "socket"):
        assert f"{name} {'denied' if confined else 'done'}" in log
    text = (checkout.folder.parent / "mark").read_text(encoding="utf-8")
    assert text == ("" if confined else "x")
    warning = "NOT confined: train.py runs as you, with your files and your network (--unconfined)"
    assert (warning in done.stderr.splitlines()) is not confined
    assert ("\nconfined: " in done.stderr) is confined
    assert statuses(checkout) == ["keep"]


def test_results_without_the_sandbox_are_not_compared_with_others(quick):
    patch, other = sharpness(quick, 0.6, 0.7)
    first = quick.agent("--tag", "t", "--patches", patch)
    assert first.returncode == 0, first.stderr
    assert "unconfined" not in trailers(quick, "refs/autoresearch/t/1")["Settings"]
    done = quick.agent("--tag", "t", "--unconfined", "--patches", other)
    assert done.returncode == 1 and "run t has other settings" in one_error(done)
    assert len(quick.rows()) == 2


@pytest.mark.parametrize("unconfined", [False, True])
def test_a_virtual_environment_that_is_the_checkout_is_refused(quick, unconfined):
    """Every run can read the interpreter's folder, so .git and keys would lie open."""
    sh(sys.executable, "-m", "venv", "--without-pip", quick.folder, cwd=quick.folder)
    (site,) = quick.folder.glob("lib/python3*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_paths()["purelib"], encoding="utf-8")
    words = ("--tag", "t", *(["--unconfined"] if unconfined else []))
    done = sh(quick.folder / "bin/python", "agent.py", *words, cwd=quick.folder, env=quick.env)
    assert done.returncode == 1
    assert one_error(done) == f"the virtual environment is the checkout itself, {quick.folder}"
    assert done.stderr.splitlines()[-1] == "hint: python -m venv .venv"
    assert not (quick.folder / "results.tsv").exists()


@pytest.mark.gate
def test_a_virtual_environment_in_the_checkout_is_none_of_it(quick):
    """The usual place, .venv, is not refused."""
    sh(sys.executable, "-m", "venv", "--without-pip", quick.folder / ".venv", cwd=quick.folder)
    (site,) = quick.folder.glob(".venv/lib/python3*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_paths()["purelib"], encoding="utf-8")
    python = quick.folder / ".venv/bin/python"
    done = sh(python, "agent.py", "--tag", "t", "--experiments", "0", cwd=quick.folder,
              env=quick.env, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\nconfined: " in done.stderr and statuses(quick) == ["keep"]


# ---------------------------------------------------------------------------
# Who else is at work
# ---------------------------------------------------------------------------


@pytest.mark.gate
def test_a_second_session_in_one_repository_is_refused_while_the_first_one_runs(quick):
    """The lock ends with its holder, however that ends, and a worktree has the same one."""
    stand_in(quick, "hold()")
    tree = quick.folder.parent / "tree"
    quick.git("worktree", "add", "-q", tree, "-b", "side")
    first = while_training(quick, 0, "--experiments", "0")
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: (first.kill(), first.wait(), first.stderr.close()))
        for folder in (quick.folder, tree):
            second = sh(sys.executable, "agent.py", "--tag", "u", cwd=folder, env=quick.env)
            assert second.returncode == 1
            said = f"this repository is taken by another agent.py, process {first.pid}"
            assert one_error(second) == said
            assert not (folder / "runs/u").exists()
        first.kill()
        first.wait()
    let_go(quick)
    done = quick.agent("--tag", "t", "--experiments", "0")
    assert done.returncode == 0 and statuses(quick) == ["keep"], done.stderr


@pytest.mark.gate
def test_what_a_killed_session_left_alive_is_ended_before_the_next_one_begins(quick):
    """The referee is made to outlive its agent.py, as one that hangs in the kernel would."""
    stand_in(quick, "hold()")
    path = quick.folder / "referee.py"
    text = path.read_text(encoding="utf-8")
    stubborn = text.replace("os._exit(130)", "0")
    assert stubborn != text
    path.write_text(stubborn, encoding="utf-8")
    quick.commit_all()
    first = while_training(quick, 0, "--experiments", "0")
    facts = json.loads((quick.folder / "runs/t/0/running.json").read_text(encoding="utf-8"))
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: alive(facts["pid"]) and os.kill(facts["pid"], signal.SIGKILL))
        kill_and_wait(first)
        assert alive(facts["pid"])
        agent = while_training(quick, 0, "--experiments", "0")
        wait_until(lambda: not alive(facts["pid"]), agent)
    let_go(quick)
    said = agent.communicate()[1]
    assert agent.returncode == 0 and statuses(quick) == ["keep"], said
    assert f"ending process {facts['pid']}, which an earlier agent.py left behind" in said


def alive(pid: int) -> bool:
    """Whether a process lives; one that has ended and waits for its parent does not."""
    with contextlib.suppress(OSError):
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    return False
