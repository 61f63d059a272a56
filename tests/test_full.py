"""The full run: several ranks train what one trains, a broken run what an unbroken one does."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import prepare
from support.checkout import ROOT, sh

STEPS, STEP_TOKENS, STEP_ROWS = 8, 1024, 8
# train.py with small steps. In each step it notes its loss on certain rows, and in the end it
# leaves its weights. Every run but the last one is a process forked from one that has loaded torch.
WATCHED = """
import json, os, sys, torch
import train
torch.set_default_dtype(torch.float64)  # in which rounding does not grow to what is looked for
train.half = lambda device: torch.float64
train.NGRAM_ROWS = 4096  # what ranks send each other is dense
train.TOTAL_BATCH_SIZE = STEP_TOKENS
build, schedule = train.build_model, train.set_schedules
rows = torch.randint(1024, (8, 129), generator=torch.Generator().manual_seed(0))

def watch(rows_a_pass, broken_at, checkpoints, path):
    train.DEVICE_BATCH_SIZE, losses, models = rows_a_pass, [], []
    os.environ["AUTORESEARCH_CHECKPOINTS"] = checkpoints

    def build_model():
        models.append(build())
        return models[0]

    def set_schedules(optimizers, progress, step):
        with torch.no_grad():
            losses.append(models[0].loss(rows[:, :-1], rows[:, 1:]).item())
        if step == broken_at:
            os._exit(9)
        schedule(optimizers, progress, step)

    def finish(model, **claims):
        if train.ranks()[0] == 0:
            torch.save((losses, model.state_dict(), claims["num_steps"]), path)

    train.build_model, train.set_schedules, train.finish = build_model, set_schedules, finish
    train.main()

*before, last = json.loads(sys.argv[1])
for run in before:
    if os.fork() == 0:
        watch(*run)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == (9 if run[1] >= 0 else 0), run
watch(*last)
""".replace("STEP_TOKENS", str(STEP_TOKENS))


def a_run(rows=STEP_ROWS, broken_at=-1, checkpoints=""):
    """A run of WATCHED: rows a pass on each rank; the step that it dies in, if any."""
    return rows, broken_at, str(checkpoints)


@pytest.fixture(scope="class")
def watched(cpu_rows, tmp_path_factory):
    """Runs WATCHED: [(losses, weights, steps), or None of a run that was broken off]."""
    folder = tmp_path_factory.mktemp("watched")
    script = folder / "watched.py"
    script.write_text(WATCHED, encoding="utf-8")

    def watch(*runs, ranks=1):
        environment = cpu_rows | {
            "AUTORESEARCH_BUDGET_TOKENS": str(STEPS * STEP_TOKENS), "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        launch = [sys.executable]
        if ranks > 1:
            launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        paths = [folder / f"{number}.pt" for number in range(len(runs))]
        told = json.dumps([(*run, str(path)) for run, path in zip(runs, paths, strict=True)])
        done = sh(*launch, script, told, cwd=folder, env=environment, timeout=1000)
        broken = [run[1] >= 0 for run in runs]
        assert (done.returncode != 0) == broken[-1], done.stderr
        found = [torch.load(path) if path.exists() else None for path in paths]
        assert [each is None for each in found] == broken
        for path in paths:
            path.unlink(missing_ok=True)
        return found

    return watch


# A quarter of the rows a pass on each rank: two passes a step, the first of them not shared.
QUARTER = STEP_ROWS // 4


@pytest.fixture(scope="class")
def alone(watched, tmp_path_factory):
    """(folder of checkpoints, an unbroken run of one rank, one that was broken off twice)."""
    kept = tmp_path_factory.mktemp("kept")
    broken = [a_run(broken_at=step, checkpoints=kept) for step in (3, 6)]
    whole, *_, resumed = watched(a_run(), *broken, a_run(checkpoints=kept))
    return kept, whole, resumed


@pytest.mark.gate
class TestBrokenOff:
    def test_a_resumed_run_is_the_unbroken_one_to_the_bit(self, alone):
        kept, (losses, weights, steps), (rest, resumed, resumed_steps) = alone
        assert steps == resumed_steps == len(losses) == len(set(losses)) == STEPS
        # It goes on after the second break: what the first one left has three steps at most.
        assert 1 < len(rest) < STEPS - 3 and rest == losses[-len(rest) :]
        assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())
        assert len(list(kept.glob("*/step-*"))) == 1  # older ones go

    def test_two_ranks_that_go_on_train_what_one_does(self, alone, watched, tmp_path):
        _, (losses, weights, _), _ = alone
        watched(a_run(QUARTER, 5, tmp_path / "kept"), ranks=2)
        [(rest, resumed, steps)] = watched(a_run(QUARTER, -1, tmp_path / "kept"), ranks=2)
        assert steps == STEPS and 1 < len(rest) < STEPS
        assert rest == pytest.approx(losses[-len(rest) :], abs=1e-5)
        for name, weight in weights.items():
            assert torch.allclose(resumed[name], weight, atol=1e-3), name


@pytest.mark.nightly
def test_two_resumed_ranks_are_two_unbroken_ones_to_the_bit(watched, tmp_path):
    [(losses, weights, steps)] = watched(a_run(QUARTER), ranks=2)
    assert steps == len(losses) == STEPS
    watched(a_run(QUARTER, 5, tmp_path / "kept"), ranks=2)
    [(rest, resumed, steps)] = watched(a_run(QUARTER, -1, tmp_path / "kept"), ranks=2)
    assert steps == STEPS and 1 < len(rest) < STEPS and rest == losses[-len(rest) :]
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())


def test_several_ranks_need_a_budget_in_tokens(cpu_rows, monkeypatch):
    for name, value in (cpu_rows | {"RANK": "0", "WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AUTORESEARCH_BUDGET_TOKENS", raising=False)
    with pytest.raises(prepare.SetupError, match="only by a budget in tokens"):
        next(prepare.batches(4, torch.device("cpu")))


def test_ranks_share_the_rows_of_one_and_resuming_serves_the_rest(cpu_rows, monkeypatch):
    for name, value in (cpu_rows | {"AUTORESEARCH_BUDGET_TOKENS": str(128 * 8 * 5)}).items():
        monkeypatch.setenv(name, value)

    def serve(rank, ranks, size, trained=0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        monkeypatch.setattr(prepare, "SPENT", prepare.Spent())
        return list(prepare.batches(size, torch.device("cpu"), trained))

    alone = serve(0, 1, 8)
    first, second = serve(0, 2, 4), serve(1, 2, 4)
    assert len(alone) == len(first) == len(second) == 5
    for (x, _, progress), (a, _, at), (b, _, _) in zip(alone, first, second, strict=True):
        assert torch.equal(x, torch.cat((a, b))) and progress == at
    rest = serve(0, 1, 8, trained=128 * 8 * 3)
    assert len(rest) == 2
    assert not list(prepare.batches(8, torch.device("cpu")))  # nor is there a second budget
    for (x, _, at), (y, _, progress) in zip(rest, alone[3:], strict=True):
        assert torch.equal(x, y) and at == progress


@pytest.mark.parametrize("gb", (85, 42.4, 25.3, 12.5, 8))
def test_a_smaller_card_gets_whole_passes_of_a_smaller_model(train, monkeypatch, gb):
    scale = replace(train.SCALE, name="gpu", sequence_len=2048)
    monkeypatch.setattr(train, "SCALE", scale)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda index: SimpleNamespace(total_memory=gb * 1e9))
    found, (depth, batch, rows) = train.card()
    assert found == gb and (depth == batch == rows == 1) == (gb > 40)
    tokens = 32 * rows * 2048
    assert tokens == int(tokens) and 262144 * batch % tokens == 0
    # 0.46 GB a row and 2 GB beside, as measured at full depth and width (tests/benchmarks/gpu.md).
    assert 2 + 0.46 * 32 * rows * depth**2 < 0.8 * gb


def test_out_of_memory_halves_the_rows_of_a_pass_once(train, monkeypatch, capsys):
    tried = []

    def attempt(rows):
        tried.append(rows)
        if rows > 16:
            raise torch.OutOfMemoryError("no")

    assert train.fitting_rows(attempt) == 16 and tried == [32, 16]
    assert "out of memory with 32 rows a pass, so 16" in capsys.readouterr().out
    monkeypatch.setattr(train, "DEVICE_BATCH_SIZE", 64)
    with pytest.raises(torch.OutOfMemoryError):
        train.fitting_rows(attempt)


def test_float16_keeps_its_gradients_by_the_scaler(train):
    """What a card before Ampere multiplies in, against float32."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4096, 64, generator=generator)
    weight = 0.1 * torch.randn(512, 64, generator=generator)
    targets = torch.randint(512, (4096,), generator=generator)
    found = []
    for dtype in (torch.float32, torch.float16):
        scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
        h, w = hidden.to(dtype, copy=True).requires_grad_(), weight.clone().requires_grad_()
        scaler.scale(train.ChunkedLoss.apply(h, w, targets)).backward()
        found.append((h.grad.float() / scaler.get_scale(), w.grad / scaler.get_scale()))
    for exact, half in zip(*found, strict=True):
        assert (exact - half).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("name", ("d12", "gpt2"))
def test_rates_and_decay_follow_batch_and_length(train, monkeypatch, name):
    scale = prepare.scale_named(name)
    batch = {"d12": 524288, "gpt2": 1048576}[name]
    for key, value in (("SCALE", scale), ("TOTAL_BATCH_SIZE", batch), ("REFERENCE_BATCH", 262144)):
        monkeypatch.setattr(train, key, value)
    assert train.batch_scale() == pytest.approx({"d12": 2, "gpt2": 4}[name] ** 0.5)
    steps = scale.budget / batch
    here = steps * train.batch_scale() * train.decay_scale()
    assert here == pytest.approx(train.REFERENCE_TOKENS / 262144)


@pytest.mark.parametrize(("val_bpb", "word"), ((0.717, "reached"), (0.719, "missed")))
def test_the_full_run_says_whether_it_reached_the_record(monkeypatch, capsys, val_bpb, word):
    monkeypatch.setattr(prepare, "current_scale", lambda: prepare.scale_named("gpt2"))
    monkeypatch.setattr(prepare, "rows_folder", lambda scale: (None, ""))
    monkeypatch.setattr(prepare, "evaluate", lambda *_: val_bpb)
    monkeypatch.setattr(prepare, "SPENT", prepare.Spent(wall_seconds=5940.0))
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: None)
    threads = torch.get_num_threads()
    prepare.finish(torch.nn.Linear(1, 1), num_steps=1, depth=24)
    torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert said.endswith(f"target_bpb:       0.718000 {word}, in 1.650 hours\n")
