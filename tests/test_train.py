"""train.py against oracles: plain attention, plain cross-entropy, SVD, determinism."""

import ast
import re
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

import prepare
from support.checkout import ROOT, sh
from support.in_process import surroundings


@pytest.fixture
def model(train):
    torch.manual_seed(0)
    model = train.build_model()
    model.init_weights()
    for weight in model.parameters():  # leave the identity that it starts from
        weight.data += 0.1 * torch.randn_like(weight)
    return model


def tokens(rows, length, seed=0):
    return torch.randint(1024, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_chunked_loss_and_its_gradients_agree_with_cross_entropy(train, model):
    x, y = tokens(5, 100), tokens(5, 100, seed=1)  # 500 tokens: the last chunk is not full
    loss = model.loss(x, y)
    loss.backward()
    got = {name: p.grad.to_dense() for name, p in model.named_parameters()}
    model.zero_grad()
    plain = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
    for name, parameter in model.named_parameters():
        assert torch.allclose(got[name], parameter.grad.to_dense(), atol=1e-6, rtol=1e-3), name


def test_fused_loss_of_a_gpu_is_the_one_of_a_cpu(train):
    draw = torch.Generator().manual_seed(0)
    h, w = torch.randn(50, 64, generator=draw), torch.randn(1024, 64, generator=draw)
    y = tokens(50, 1)
    both = [train.chunk_loss(h, w, y, fused) for fused in (False, True)]
    for plain, fused in zip(*both, strict=True):
        assert torch.allclose(plain, fused, rtol=1e-5, atol=1e-5)


def test_no_position_sees_a_later_token_or_another_row(model):
    model.eval()
    x = tokens(3, 128)
    with torch.no_grad():
        before = model(x)
        changed = x.clone()
        changed[:, 77:] = tokens(3, 51, seed=2)
        changed[2] = tokens(1, 128, seed=3)
        after = model(changed)
    assert torch.equal(before[:2, :77], after[:2, :77])
    assert not torch.equal(before[:2, 77], after[:2, 77])


def test_short_window_sees_just_its_tokens(train, model):
    """Layer 0 alone, against attention written out with a mask."""
    block = model.blocks[0].attention
    assert block.window == 128 // train.SHORT_WINDOW_DIVISOR
    x = torch.randn(2, 128, model.width)
    got = block(x, None, model.cos, model.sin, model.mask)

    def heads(y):
        return y.view(2, 128, -1, train.HEAD_DIM).transpose(1, 2)

    q, k, v = heads(block.query(x)), heads(block.key(x)), heads(block.value(x))
    q, k = (train.norm(train.rotate(y, model.cos, model.sin)) for y in (q, k))
    weights = q @ k.mT / train.HEAD_DIM**0.5
    back = torch.arange(128)[:, None] - torch.arange(128)[None]
    weights = weights.masked_fill((back < 0) | (back > block.window), -torch.inf).softmax(-1)
    expected = block.out((weights @ v).transpose(1, 2).reshape(2, 128, -1))
    assert torch.allclose(got, expected, atol=1e-5)


def test_flex_attention_agrees_with_the_plain_mask(train, model):
    """Forwards, by the CPU's reference of what a GPU trains with; the loss and each position."""
    x, mask = tokens(3, 128), train.block_mask(model.short_window, torch.device("cpu"))
    with torch.no_grad():
        plain, flex = model.hidden(x, model.mask), model.hidden(x, mask)
        wider = model.hidden(x, train.block_mask(model.short_window + 1, torch.device("cpu")))
        losses = model.loss(x, x), model.loss(x, x, mask)
    assert torch.allclose(plain, flex, atol=1e-5)
    assert not torch.allclose(plain, wider, atol=1e-3)
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-5)


def test_block_mask_leaves_out_what_no_window_reaches(train):
    """At the sizes of a GPU: each block of 128 queries sees its own and the few before it."""
    T, window = 2048, 256
    mask = torch.nn.attention.flex_attention.create_block_mask(
        lambda b, h, query, key: train.in_window(window, query, key), None, None, T, T, "cpu"
    )
    seen = mask.to_dense()[0, 0].bool()
    block = torch.arange(T // 128)
    back = block[:, None] - block[None]
    assert torch.equal(seen, (back >= 0) & (back <= window // 128))


def test_rotation_makes_scores_depend_on_distance_only(train, model):
    q, k = torch.randn(1, 1, 1, train.HEAD_DIM), torch.randn(1, 1, 1, train.HEAD_DIM)
    spread = [train.rotate(y.expand(1, 1, 128, -1), model.cos, model.sin)[0, 0] for y in (q, k)]
    scores = spread[0] @ spread[1].T
    assert torch.allclose(scores[10, 7], scores[100, 97], atol=1e-4)
    assert not torch.allclose(scores[10, 7], scores[10, 3], atol=1e-2)


def test_orthogonalize_comes_near_the_polar_factor(train):
    torch.manual_seed(0)
    for shape in ((2, 32, 64), (2, 64, 32)):
        g = torch.randn(*shape)
        u, _, v = torch.linalg.svd(g, full_matrices=False)
        values = torch.linalg.svdvals(train.orthogonalize(g))
        assert ((values > 0.6) & (values < 1.3)).all()
        cosine = F.cosine_similarity(train.orthogonalize(g).flatten(1), (u @ v).flatten(1))
        assert (cosine > 0.98).all()


def test_muon_step_keeps_the_size_of_the_update_and_decays_only_where_it_agrees(train):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(16, 8)) for _ in range(3)]
    before = torch.stack([w.detach().clone() for w in weights])
    optimizer = train.Muon([dict(params=weights, lr=0.1)])
    optimizer.param_groups[0] |= dict(momentum=0.9, weight_decay=0.0)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    moved = before - torch.stack([w.detach() for w in weights])
    per_step = 0.1 * (16 / 8) ** 0.5
    assert torch.allclose(moved.norm(dim=(1, 2)), torch.full((3,), per_step * 8**0.5), rtol=0.15)


def test_an_edited_number_of_the_optimizer_is_not_compiled_anew(train):
    from torch._dynamo.testing import CompileCounter  # takes seconds to import

    torch._dynamo.reset()
    counter = CompileCounter()
    step = torch.compile(train.muon_step, dynamic=False, backend=counter, fullgraph=True)
    weights, grads = torch.randn(2, 3, 16, 8).unbind()
    numbers = ((0.1, 0.9, 0.2, 0.95), (0.07, 0.85, 0.0, 0.9), (0.2, 0.95, 0.1, 0.99))
    compiled, eager = ([weights.clone(), grads, torch.zeros(3, 16, 8), torch.zeros(3, 16, 1)]
                       for _ in range(2))  # fmt: skip
    for each in numbers:
        step(*compiled, *map(torch.tensor, each))
        train.muon_step(*eager, *each)
    assert counter.frame_count == 1
    for got, expected in zip(compiled, eager, strict=True):
        assert torch.allclose(got, expected, atol=1e-5)


def test_steps_before_the_clock_leave_no_trace(train, monkeypatch):
    """A GPU compiles by them. Afterwards weights and random state are those that the seed gives."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = train.build_model()
    model.init_weights()
    optimizers = train.build_optimizers(model)
    taken = []
    for optimizer in optimizers:
        optimizer.register_step_post_hook(lambda made, *_: taken.append(bool(made.state)))
    train.compile_all(model, optimizers, None, 2)
    assert taken == [True] * 2 * len(optimizers)  # two steps, or there was nothing to forget
    state = torch.get_rng_state()
    fresh = train.build_model()
    torch.manual_seed(train.run_seed())
    fresh.init_weights()
    assert torch.equal(state, torch.get_rng_state())
    for (name, got), wanted in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(got, wanted), name
        assert got.grad is None
    assert not any(optimizer.state for optimizer in optimizers)


def test_hashed_ngrams_depend_on_their_n_tokens_only(train):
    x = tokens(2, 64)
    changed = x.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 1024
    differs = (
        (train.hashed_ngrams(x, 2) != train.hashed_ngrams(changed, 2)).any(0).nonzero().flatten()
    )
    assert differs.tolist() == [10, 11]
    rows = train.hashed_ngrams(tokens(200, 128), 2)
    assert 0 <= rows.min() and rows.max() < train.NGRAM_ROWS
    assert rows.unique().numel() > 0.5 * train.NGRAM_ROWS * (
        1 - 2.718 ** (-rows.numel() / train.NGRAM_ROWS)
    )


def test_schedules_are_pure_functions_of_progress(train):
    assert train.lr_multiplier(0) == 1 and train.lr_multiplier(1) == pytest.approx(
        train.FINAL_LR_FRAC
    )
    values = [train.lr_multiplier(p / 100) for p in range(101)]
    assert values == sorted(values, reverse=True)
    assert train.muon_momentum(0) == train.MUON_MOMENTUM_START
    assert train.muon_momentum(10**6) == pytest.approx(train.MUON_MOMENTUM)
    assert train.muon_weight_decay(1) == 0


@pytest.mark.parametrize("scale", prepare.SCALES, ids=lambda scale: scale.name)
def test_every_scale_has_a_model_of_the_size_that_its_constants_say(scale, tmp_path):
    """On the meta device, which holds no numbers; counted by hand."""
    with surroundings(scale, tmp_path, 1):
        file = runpy.run_path(str(ROOT / "train.py"))
        with torch.device("meta"):
            model = file["build_model"]()
        parameters, flops = sum(p.numel() for p in model.parameters()), model.flops_per_token()
    depth, width, V, T = file["DEPTH"], model.width, scale.vocab_size, scale.sequence_len
    assert (depth, width) == {"cpu": (2, 64), "gpu": (9, 640), "d12": (12, 768),
                              "gpt2": (24, 1536)}[scale.name]  # fmt: skip
    with_values = (depth + 1) // 2  # every other layer, the last one included
    matrices = depth * (4 + 2 * file["MLP_RATIO"]) * width**2 + V * width
    matrices += with_values * file["VALUE_GATE_CHANNELS"] * (width // file["HEAD_DIM"])
    tables = (1 + with_values) * V * width
    tables += (file["NGRAM_ORDER"] - 1) * file["NGRAM_ROWS"] * width
    assert parameters == matrices + tables + 2 * depth
    whole = 1 + sum(kind == "L" for kind in (file["WINDOW_PATTERN"] * depth)[: depth - 1])
    attended = whole * T + (depth - whole) * T // file["SHORT_WINDOW_DIVISOR"]
    assert flops == 6 * matrices + 12 * width * attended
    if scale.name == "gpu":  # what the field's best published run ended with: 80.9 M parameters
        assert parameters == pytest.approx(80.9e6, rel=0.01)


def test_hyperparameters_bear_the_fields_names_one_literal_a_line():
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    names = {
        t.id
        for s in ast.parse(source).body
        if isinstance(s, ast.Assign)
        for t in s.targets
        if isinstance(t, ast.Name)
    }
    wanted = """DEPTH HEAD_DIM WINDOW_PATTERN TOTAL_BATCH_SIZE DEVICE_BATCH_SIZE EMBEDDING_LR
        UNEMBEDDING_LR MATRIX_LR SCALAR_LR WEIGHT_DECAY ADAM_BETAS WARMDOWN_RATIO FINAL_LR_FRAC"""
    assert set(wanted.split()) <= names
    assert re.search(r"^MATRIX_LR = [\d.]+ ", source, re.M)


@pytest.mark.gate
def test_same_seed_twice_gives_the_same_val_bpb(cpu_rows):
    """The real model for four steps, as a person starts it."""
    environment = cpu_rows | {"AUTORESEARCH_BUDGET_TOKENS": str(4 * 4096)}

    def train(seed):
        own = environment | {"AUTORESEARCH_SEED": seed}
        done = sh(sys.executable, "train.py", cwd=ROOT, env=own, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    with ThreadPoolExecutor(3) as side_by_side:
        first, second, other = side_by_side.map(train, "334")
    scores = [
        re.search(r"^val_bpb: +(\d\.\d{6})$", text, re.M)[1] for text in (first, second, other)
    ]
    assert scores[0] == scores[1] != scores[2]
    keys = re.findall(r"^(\w+): ", first.split("---\n")[1], re.M)
    assert keys == ["val_bpb", "training_seconds", "total_seconds", "peak_vram_mb", "mfu_percent",
                    "total_tokens_M", "num_steps", "num_params_M", "depth"]  # fmt: skip
    assert re.search(r"^num_steps: +4$", first, re.M)


def test_diverging_run_ends_early_with_its_reason(cpu_rows, tmp_path, monkeypatch):
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    for search, new in (("MATRIX_LR = 0.04", "MATRIX_LR = float('nan')"),
                        ("NGRAM_ROWS = 131072", "NGRAM_ROWS = 4096")):  # fmt: skip
        assert source.count(search) == 1
        source = source.replace(search, new)
    (tmp_path / "train.py").write_text(source, encoding="utf-8")
    monkeypatch.setenv("AUTORESEARCH_CACHE", cpu_rows["AUTORESEARCH_CACHE"])
    scale = prepare.scale_named("cpu")
    rows, budget = prepare.rows_folder(scale)[0], 100 * 4096
    with surroundings(scale, rows, budget) as copy:
        with pytest.raises(FloatingPointError, match="loss is nan at step [12],"):
            runpy.run_path(str(tmp_path / "train.py"), run_name="__main__")
        assert 0 < copy.SPENT.tokens < 0.1 * budget


def test_first_steps_may_leap_but_not_far(train):
    assert train.report(3, 0.1, lambda: 7.3, 6.2) == 6.2
    with pytest.raises(FloatingPointError, match="loss is 9.3 at step 3, was 6.2"):
        train.report(3, 0.1, lambda: 9.3, 6.2)
