"""upstream.py against a stand-in: a file with the other project's interface, made here. And
seeds.py, and plant.py.
"""

import math
import re
import sys

import pytest

from support.checkout import ROOT, sh

sys.path.insert(0, str(ROOT / "tests"))
import plant
import seeds
import upstream

import prepare
from journal import fingerprint

# Counts which token follows which; asks for all that the other file asks of its surroundings.
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
spent, step = 0, 0
while True:
    torch.cuda.synchronize()
    started = time.time()
    x, y, epoch = next(loader)
    add(model.counts.data, x, y)
    if step > 10:
        spent += time.time() - started
    step += 1
    if step > 10 and spent >= TIME_BUDGET:
        break
with autocast_ctx:
    val_bpb = evaluate_bpb(model, None, DEVICE_BATCH_SIZE)
print("---")
print(f"val_bpb:          {val_bpb:.6f}")
print(f"training_seconds: {spent:.1f}")
print(f"total_seconds:    {spent:.1f}")
print(f"peak_vram_mb:     {torch.cuda.max_memory_allocated() / 1024 / 1024:.1f}")
print(f"total_tokens_M:   {step * TOTAL_BATCH_SIZE / 1e6:.1f}")
print(f"num_steps:        {step}")
print(f"num_params_M:     {V * V / 1e6:.1f}")
"""


@pytest.mark.gate
def test_both_files_are_trained_on_the_same_rows_and_scored_alike(cpu_rows, tmp_path):
    (tmp_path / "train.py").write_text(STAND_IN, encoding="utf-8")
    command = [sys.executable, ROOT / "tests/benchmarks/upstream.py", tmp_path, "--pairs", "1"]
    done = sh(*command, "--budget", "1", cwd=tmp_path, env=cpu_rows)
    assert done.returncode == 0, done.stderr
    theirs, ours = map(float, re.findall(r"val_bpb (\d\.\d{6})", done.stdout))
    assert "attention: SDPA and FlexAttention" in done.stdout
    assert 1.9 < theirs < 2.3, done.stdout  # what counted bigrams give on these rows
    assert 1.5 < ours < 4, done.stdout  # 1.26 after a minute
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


def test_planted_ideas_are_programs_of_their_own_and_end_when_they_say(cpu_rows, tmp_path):
    source = plant.held_back((ROOT / "train.py").read_text(encoding="utf-8"))
    ideas = dict(plant.ideas(source))
    assert len({fingerprint(text) for text in (source, *ideas.values())}) == 31
    env = cpu_rows | {"AUTORESEARCH_BUDGET_TOKENS": "100000", "PYTHONPATH": str(ROOT)}
    steps = {}
    for name in ("gain-8", "loss-10"):
        (tmp_path / "train.py").write_text(ideas[name], encoding="utf-8")
        done = sh(sys.executable, "train.py", cwd=tmp_path, env=env)
        steps[name] = float(re.search(r"num_steps: +([\d.]+)", done.stdout)[1])
    shares = 0.97**6 * 0.94**2, 0.97**6 * 0.94**4
    assert list(steps.values()) == [math.ceil(100000 * share / 4096) for share in shares]
