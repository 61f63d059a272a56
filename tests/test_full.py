"""The full run: several ranks train what one trains, a broken run what an unbroken one does."""

import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import prepare
from support.checkout import ROOT, sh

STEPS = 20
# train.py, which in each step notes its loss on certain rows, and in the end leaves its weights.
WATCHED = """
import os, sys, torch
import train
torch.set_default_dtype(torch.float64)  # in which rounding does not grow to what is looked for
train.half = lambda device: torch.float64
rows_a_pass, broken_at, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
train.NGRAM_ROWS = 4096  # what ranks send each other is dense
train.DEVICE_BATCH_SIZE, losses, models = rows_a_pass, [], []
build, schedule = train.build_model, train.set_schedules
rows = torch.randint(1024, (8, 129), generator=torch.Generator().manual_seed(0))

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
"""


@pytest.fixture
def watched(cpu_rows, tmp_path):
    """Runs WATCHED: (losses, weights, steps), or None if it was broken off."""
    script = tmp_path / "watched.py"
    script.write_text(WATCHED)

    def run(name, ranks=1, rows=32, broken_at=-1, checkpoints=""):
        path = tmp_path / name
        environment = cpu_rows | {
            "AUTORESEARCH_BUDGET_TOKENS": str(STEPS * 4096), "PYTHONPATH": str(ROOT),
            "AUTORESEARCH_CHECKPOINTS": checkpoints, "OMP_NUM_THREADS": "1",
        }
        launch = [sys.executable]
        if ranks > 1:
            launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        done = sh(*launch, script, rows, broken_at, path, cwd=tmp_path, env=environment)
        assert (done.returncode == 0) == (broken_at < 0), done.stderr
        return torch.load(path) if broken_at < 0 else None

    return run


@pytest.mark.gate
def test_two_ranks_train_what_one_does_and_go_on_from_a_checkpoint(watched, tmp_path):
    losses, weights, steps = watched("one")
    assert steps == STEPS and losses[-1] != losses[0]
    # A quarter of the rows a pass on each rank: two passes a step, the first of them not shared.
    shared, weights_of_two, steps = watched("two", ranks=2, rows=8)
    assert steps == STEPS
    assert shared == pytest.approx(losses, abs=1e-5)
    for name, weight in weights.items():
        assert torch.allclose(weights_of_two[name], weight, atol=1e-3), name
    kept = str(tmp_path / "kept")
    watched("none", ranks=2, rows=8, broken_at=13, checkpoints=kept)
    rest, resumed, steps = watched("resumed", ranks=2, rows=8, checkpoints=kept)
    assert steps == STEPS and 1 < len(rest) < STEPS and rest == shared[-len(rest) :]
    assert all(torch.equal(resumed[name], weight) for name, weight in weights_of_two.items())


@pytest.mark.gate
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(watched, tmp_path):
    kept = str(tmp_path / "kept")
    losses, weights, _ = watched("whole")
    watched("none", broken_at=12, checkpoints=kept)
    watched("none", broken_at=17, checkpoints=kept)
    rest, resumed, steps = watched("resumed", checkpoints=kept)
    assert steps == STEPS and 1 < len(rest) <= 5 and rest == losses[-len(rest) :]
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())
    folders = list((tmp_path / "kept").glob("*/step-*"))
    assert len(folders) == 1  # older ones go


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
    assert os.environ.get("RANK") is None
