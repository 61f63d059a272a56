"""upstream.py against a file with the other project's interface, made here; seeds.py, plant.py."""

import math
import re
import runpy
import sys

import plant
import pytest
import seeds
import torch
import upstream

import prepare
from journal import fingerprint
from support.checkout import ROOT, sh
from support.in_process import surroundings

STEPS = 4  # of 4,096 tokens
# Counts which token follows which; asks for all that the other file asks of its surroundings. The
# budget is spent in tokens here, not in seconds, so that the score is the same on any machine.
STAND_IN = """\
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import get_kernel
cap = torch.cuda.get_device_capability()
fa3 = get_kernel("a/name" if cap == (9, 0) else "another").flash_attn_interface

from prepare import MAX_SEQ_LEN, TIME_BUDGET, Tokenizer, make_dataloader, evaluate_bpb

TOTAL_BATCH_SIZE = 2**15 # tokens
ASPECT_RATIO = 64
HEAD_DIM = 128
DEPTH = 8
DEVICE_BATCH_SIZE = 128

torch.manual_seed(42)
device = torch.device("cuda")
autocast_ctx = torch.amp.autocast(device_type="cuda", dtype=torch.bfloat16)
V = Tokenizer.from_directory().get_vocab_size()


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.counts = nn.Parameter(torch.ones(V, V))

    def forward(self, tokens):
        q = torch.randn(len(tokens), tokens.size(1), 1, 8).bfloat16()
        for window in (tokens.size(1), tokens.size(1) // 2):
            y = fa3.flash_attn_func(q, q, q, causal=True, window_size=(window, 0))
            assert y.shape == q.shape and torch.allclose(y[:, 0], q[:, 0], atol=1e-2)
        assert F.rms_norm(q, (8,)).dtype == q.dtype
        return self.counts[tokens].log()


@torch.compile(dynamic=False, fullgraph=True)
def add(counts, x, y):
    counts.index_put_((x, y), torch.ones(()), accumulate=True)


model = torch.compile(Counter().to(device), dynamic=False)
loader = make_dataloader(None, DEVICE_BATCH_SIZE, MAX_SEQ_LEN, "train")
seconds, spent, step = 0, 0, 0
while True:
    torch.cuda.synchronize()
    started = time.time()
    x, y, epoch = next(loader)
    add(model.counts.data, x, y)
    if step > 10:
        seconds += time.time() - started
        spent += x.numel()
    step += 1
    if step > 10 and spent >= TIME_BUDGET:
        break
with autocast_ctx:
    val_bpb = evaluate_bpb(model, None, DEVICE_BATCH_SIZE)
print("---")
print(f"val_bpb:          {val_bpb:.6f}")
print(f"training_seconds: {max(seconds, 0.1):.1f}")
print(f"total_seconds:    {seconds:.1f}")
print(f"peak_vram_mb:     {torch.cuda.max_memory_allocated() / 1024 / 1024:.1f}")
print(f"total_tokens_M:   {step * TOTAL_BATCH_SIZE / 1e6:.1f}")
print(f"num_steps:        {step}")
print(f"num_params_M:     {V * V / 1e6:.1f}")
"""


@pytest.mark.gate
def test_both_files_are_trained_on_the_same_rows_and_scored_alike(cpu_rows, tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(STAND_IN, encoding="utf-8")
    command = [sys.executable, ROOT / "tests/benchmarks/upstream.py", tmp_path, "--pairs", "1"]
    environment = cpu_rows | {"AUTORESEARCH_BUDGET_TOKENS": str(4096 * STEPS)}
    done = sh(*command, cwd=tmp_path, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "attention: SDPA and FlexAttention" in done.stdout
    scores = re.findall(r"val_bpb (\d\.\d{6}) .* (\d+) steps", done.stdout)
    (theirs, steps), (ours, our_steps) = [(float(score), int(count)) for score, count in scores]
    assert steps == our_steps == STEPS
    # What a table of token pairs, counted on the rows that ours trains on, scores by our metric.
    for name, value in (environment | {"AUTORESEARCH_SEED": "0"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(prepare, "SPENT", prepare.Spent())
    scale = prepare.scale_named("cpu")
    counts = torch.ones(scale.vocab_size, scale.vocab_size)
    for x, y, _ in prepare.batches(32, torch.device("cpu")):
        counts.index_put_((x, y), torch.ones(()), accumulate=True)
    folder = prepare.rows_folder(scale)[0]
    expected = prepare.evaluate(lambda tokens: counts[tokens].log(), folder, "val", scale)
    assert theirs == pytest.approx(expected, abs=2e-6)
    uniform = prepare.evaluate(lambda x: torch.zeros(*x.shape, 1024), folder, "val", scale)
    assert 1 < ours < uniform - 0.1
    ratio = float(re.search(r"ours / upstream: val_bpb ([\d.]+)", done.stdout)[1])
    assert ratio == pytest.approx(ours / theirs, abs=1e-4)


def test_a_file_that_is_not_the_known_one_is_refused():
    with pytest.raises(prepare.SetupError, match="rms_norm"):
        upstream.adapted(STAND_IN.replace("F.rms_norm", "own_norm"), 0, True)
    with pytest.raises(prepare.SetupError, match="DEPTH is set 0 times"):
        upstream.with_constants("HEAD_DIM = 3", {"DEPTH": 2})


def test_the_edits_of_seeds_fit_train_py():
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    for name, (search, _) in seeds.EDITS.items():
        assert not search or source.count(search) == 1, name


def test_equal_seeds_take_away_what_two_versions_share():
    first, second = [1.0, 2.0, 3.0], [1.5, 2.5, 3.5]
    assert seeds.spread(first, second) == (0.0, pytest.approx(2**0.5))
    equal, different = seeds.spread(first, second[::-1])
    assert (equal, different) == (2.0, pytest.approx(2**0.5))


def test_planted_ideas_are_programs_of_their_own_and_end_when_they_say(
    cpu_rows, tmp_path, monkeypatch
):
    source = plant.held_back((ROOT / "train.py").read_text(encoding="utf-8"))
    ideas = dict(plant.ideas(source))
    assert len({fingerprint(text) for text in (source, *ideas.values())}) == 31
    monkeypatch.setenv("AUTORESEARCH_CACHE", cpu_rows["AUTORESEARCH_CACHE"])
    scale = prepare.scale_named("cpu")
    rows, budget, steps = prepare.rows_folder(scale)[0], 15 * 4096, []
    for name in ("gain-8", "loss-10"):
        text = ideas[name].replace("NGRAM_ROWS = 131072", "NGRAM_ROWS = 4096")  # to be quick
        (tmp_path / "train.py").write_text(text, encoding="utf-8")
        with surroundings(scale, rows, budget) as copy:
            copy.finish = lambda model, num_steps, **claims: steps.append(num_steps)
            runpy.run_path(str(tmp_path / "train.py"), run_name="__main__")
    shares = 0.97**6 * 0.94**2, 0.97**6 * 0.94**4
    assert steps == [math.ceil(15 * share) for share in shares] == [12, 10]
