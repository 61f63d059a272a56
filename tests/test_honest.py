"""No false alarms: honest changes of the real train.py, each trained, scored and probed.

A change is a list of (search, replace) on the text of train.py. Every one of them must come out
with a score, never as a crash or as suspicious: neither the probe nor the sandbox may stand in the
way of honest work. All are examined in the test's own process. What concerns processes, files or
the wire also goes through agent.py, and at night all of them do.

    python -m pytest -m gate tests/test_honest.py
    python -m pytest -m nightly tests/test_honest.py -k autocast  # and all of its group
"""

import functools
import itertools
import json
import math
import os
import re
import shutil
import sys
from textwrap import dedent, indent
from types import SimpleNamespace

import pytest

import prepare
import referee
from prepare import Scale
from support.checkout import ROOT, Checkout, sh
from support.in_process import prepared_rows, score_in_process, seeded_probe, train_in_process

TRAIN = (ROOT / "train.py").read_text(encoding="utf-8")
# 256 rows of 64 tokens. A large sigma: what is better is not suspicious; few are run twice.
SCALE = 'Scale("cpu", "stdlib", 512, 64, "cpu", 60, 16384, 0, 0.05)'
TOKENS = 16384  # that a change is trained on, four steps; nightly it is sixteen
NIGHTLY_TOKENS = 65536
GROUP = 12  # changes that share a run of agent.py, and so a baseline

# ---------------------------------------------------------------------------
# Places in train.py
# ---------------------------------------------------------------------------

ROTATION = "q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))"
ATTENTION = """\
        if self.window < T and isinstance(mask, BlockMask):
            y = flex_attention(q, k, v, block_mask=mask)
        elif self.window < T:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
"""
UP = "self.up = nn.Linear(width, MLP_RATIO * width, bias=False)"
DOWN = "self.down = nn.Linear(MLP_RATIO * width, width, bias=False)"
MLP = "return self.down(F.relu(self.up(x)).square())"
MADE = "        self.mlp = MLP(width)\n"
BLOCK = """\
        x = x + self.attention(norm(x), value_embedding, cos, sin, mask)
        return x + self.mlp(norm(x))
"""
EMBEDDING = "        self.embedding = nn.Embedding(V, width)\n"
AUTOCAST = "torch.autocast(tokens.device.type, dtype, enabled=tokens.is_cuda)"
HALF = "return torch.float32\n"
LOGITS = "return SOFTCAP * torch.tanh(logits.float() / SOFTCAP)"
LOSS = """\
        hidden = self.hidden(tokens, mask).flatten(0, 1)  # (B * T, width)
        return ChunkedLoss.apply(hidden, self.head.weight, targets.flatten())
"""
MUON = "Muon(groups) if ranks()[1] == 1 else full.divided(groups, Muon)"
LEFT = "left = min(1.0, (1.0 - progress) / max(WARMDOWN_RATIO, 1e-9))"
TO_DEVICE = "    model.to(device)\n"
MADE_READY = "    objective = Objective(model, mask)\n"
STEP_LOSS = "            loss = objective(x, y)\n"
BATCHES = 'in batches(rows, device, tokens, counted.get("seconds", 0.0)):'
STEPPED = "        step += 1\n"
TRAINED = "    return step\n\n\n"
FINISH = "    finish(model, "

# ---------------------------------------------------------------------------
# Edits that several changes share
# ---------------------------------------------------------------------------


def after(place, *lines):
    """An edit that adds lines, indented like the place that they follow."""
    margin = place[: len(place) - len(place.lstrip())]
    return place, place + indent("\n".join(lines) + "\n", margin)


def before(place, *lines):
    return place, indent("\n".join(lines) + "\n", "    ") + place


def attention(code):
    """Another way from q, k, v (B, H, T, D) to y; `scores` are masked by `causal`."""
    given = """\
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    scores = (q @ k.mT / HEAD_DIM**0.5).masked_fill(~causal, -torch.inf)
    """
    return ATTENTION, indent(dedent(given) + dedent(code).rstrip() + "\n", " " * 8)


def mixer(parts, answer):
    """Another layer in the place of attention, made of `parts`, that answers x (B, T, C)."""
    head = "class Mixer(nn.Module):\n    def __init__(self, width, window):\n"
    made = "super().__init__()\nself.window = window\n" + dedent(parts)
    asked = "\n    def forward(self, x, value_embedding, cos, sin, mask):\n"
    answered = "B, T, C = x.shape\n" + dedent(answer)
    layer = head + indent(made, " " * 8) + asked + indent(answered, " " * 8)
    return [
        ("class Block(nn.Module):\n", layer + "\n\nclass Block(nn.Module):\n"),
        ("= Attention(layer, width, window)", "= Mixer(width, window)"),
    ]


def adam_too(parameters):
    """An optimizer for parameters outside of the layers."""
    place = "        adam([model.resid_lambdas]"
    return place, f"        adam({parameters}, 0.003),\n" + place


def plain_loss():
    return LOSS, indent(
        "logits = self(tokens)\n"
        "return F.cross_entropy(logits.flatten(0, 1), targets.flatten())\n",
        " " * 8,
    )


# Vectors in the layers keep torch's initial values and are stepped by Adam.
VECTORS = [
    (
        '                if name.endswith(("out.weight"',
        "                if weight.ndim < 2:\n"
        "                    continue\n"
        '                if name.endswith(("out.weight"',
    ),
    adam_too("[w for w in model.blocks.parameters() if w.ndim < 2]"),
    (
        "    for weight in model.blocks.parameters():\n",
        "    for weight in (w for w in model.blocks.parameters() if w.ndim > 1):\n",
    ),
]
NO_NGRAMS = ('NGRAM_ORDER = {"cpu": 3', 'NGRAM_ORDER = {"cpu": 1')
ONE_LAYER = [('DEPTH = {"cpu": 2', 'DEPTH = {"cpu": 1')]
BFLOAT16 = [
    (TO_DEVICE, "    model.bfloat16().to(device)\n"),
    (HALF, HALF.replace("float32", "bfloat16")),
    (LOGITS, "return SOFTCAP * torch.tanh(logits / SOFTCAP)"),
]
AUTOCAST_BFLOAT16 = (AUTOCAST, "torch.autocast(tokens.device.type, torch.bfloat16)")
TOP_TWO = [
    (UP, "self.up = nn.Parameter(torch.empty(4, width, width))"),
    (DOWN, "self.down = nn.Parameter(torch.empty(4, width, width))\n"
           "        self.router = nn.Linear(width, 4, bias=False)"),
    (MLP, """\
best = self.router(x).topk(2)
        shares = torch.zeros(*x.shape[:2], 4, dtype=best.values.dtype)
        shares = shares.scatter(-1, best.indices, best.values.softmax(-1).to(shares.dtype))
        h = F.relu(torch.einsum("btc,ech->bteh", x, self.up)).square()
        return torch.einsum("bteh,bte,ehc->btc", h, shares.to(h.dtype), self.down)"""),
]
LION = '''\
class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum (Chen et al. 2023, arXiv 2302.06675)."""

    def __init__(self, groups):
        super().__init__(groups, dict(lr=0.0, weight_decay=0.0))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                step = mean.lerp(p.grad, 0.1).sign()
                p.sub_(group["lr"] * (step + group["weight_decay"] * p))
                mean.lerp_(p.grad, 0.01)


def build_optimizers(model):
'''
AHEAD = '''\
def ahead(served):
    """The same batches, taken by a thread while the one before is trained on."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, served, None)
        while batch := waiting.result():
            waiting = pool.submit(next, served, None)
            yield batch


def main():
'''

# ---------------------------------------------------------------------------
# Honest changes
# ---------------------------------------------------------------------------

CHANGES = {
    "nothing_but_a_name": [
        ("def lr_multiplier(progress):", "def lr_factor(progress):"),
        ('group["full_lr"] * lr_multiplier(progress)', 'group["full_lr"] * lr_factor(progress)'),
    ],
    # Sizes
    "one_layer": ONE_LAYER,
    "no_ngrams": [NO_NGRAMS],
    "small_batch": [
        ('TOTAL_BATCH_SIZE = {"cpu": 4096', 'TOTAL_BATCH_SIZE = {"cpu": 1024'),
        ('DEVICE_BATCH_SIZE = {"cpu": 32', 'DEVICE_BATCH_SIZE = {"cpu": 16'),
    ],
    # Sequence of blocks
    "parallel_block": [(BLOCK, """\
        y = norm(x)
        return x + self.attention(y, value_embedding, cos, sin, mask) + self.mlp(y)
""")],
    # Attention
    "manual_softmax": [attention("y = scores.softmax(-1) @ v")],
    "linear_attention": [attention("""\
        q, k = F.elu(q[..., :8]) + 1, F.elu(k[..., :8]) + 1
        state = torch.einsum("bhtd,bhte->bhtde", k, v).cumsum(2)
        total = (q * k.cumsum(2)).sum(-1, keepdim=True)
        y = torch.einsum("bhtd,bhtde->bhte", q, state) / total
    """)],
    # Other layers in its place
    "gru": mixer(
        "self.gru = nn.GRU(width, width, batch_first=True, bias=False)\n"
        "self.out = nn.Linear(width, width, bias=False)\n",
        "return self.out(self.gru(x)[0])\n",
    ),
    "causal_convolution": mixer(
        "self.taps = nn.Parameter(torch.empty(width, 8))\n"
        "self.out = nn.Linear(width, width, bias=False)\n",
        "y = F.conv1d(F.pad(x.mT, (7, 0)), self.taps[:, None], groups=C).mT\n"
        "return self.out(F.silu(y) * x)\n",
    ),
    "long_convolution_by_fft": mixer(
        "self.filter = nn.Parameter(torch.empty(width, SCALE.sequence_len))\n"
        "self.out = nn.Linear(width, width, bias=False)\n",
        "spectrum = torch.fft.rfft(x.mT, n=2 * T) * torch.fft.rfft(self.filter[:, :T], n=2 * T)\n"
        "return self.out(torch.fft.irfft(spectrum, n=2 * T)[..., :T].mT * x)\n",
    ),
    "gated_recurrence": mixer(
        "self.gate = nn.Linear(width, width, bias=False)\n"
        "self.value = nn.Linear(width, width, bias=False)\n"
        "self.out = nn.Linear(width, width, bias=False)\n",
        """\
        keep, value = torch.sigmoid(self.gate(x) + 1), self.value(x)
        states = [(1 - keep[:, 0]) * value[:, 0]]
        for t in range(1, T):
            states.append(keep[:, t] * states[-1] + (1 - keep[:, t]) * value[:, t])
        return self.out(torch.stack(states, dim=1))
        """,
    ),
    "mean_of_all_earlier_tokens": mixer(
        "self.out = nn.Linear(width, width, bias=False)\n",
        "return self.out(x.cumsum(1) / torch.arange(1, T + 1)[:, None])\n",
    ),
    # Positions
    "no_positions": [(ROTATION, "q, k = norm(q), norm(k)")],
    # Normalisations
    "layer_norm": [("return F.rms_norm(", "return F.layer_norm(")],
    "batch_norm_with_running_statistics": [
        after(MADE, "self.norm = nn.BatchNorm1d(width)"),
        (BLOCK, BLOCK.replace("mlp(norm(x))", "mlp(self.norm(x.flatten(0, 1)).view_as(x))")),
        *VECTORS,
    ],
    # MLP
    "swiglu": [
        (UP, UP + "\n        " + UP.replace("up", "gate")),
        (MLP, "return self.down(F.silu(self.gate(x)) * self.up(x))"),
    ],
    "experts_softly_routed_by_token": [
        (UP, "self.up = nn.Parameter(torch.empty(4, width, width))"),
        (DOWN, "self.down = nn.Parameter(torch.empty(4, width, width))\n"
               "        self.router = nn.Linear(width, 4, bias=False)"),
        (MLP, """\
h = F.relu(torch.einsum("btc,ech->bteh", x, self.up)).square()
        return torch.einsum("bteh,bte,ehc->btc", h, self.router(x).softmax(-1), self.down)"""),
    ],
    "two_of_four_experts_in_bfloat16": [*TOP_TWO, AUTOCAST_BFLOAT16],
    # Head
    "no_softcap": [(LOGITS, "return logits.float()"), plain_loss()],
    "tied_embeddings": [
        ("        self.head.weight.normal_(std=0.001)\n", ""),
        after(
            "        self.head = nn.Linear(width, V, bias=False)\n",
            "self.head.weight = self.embedding.weight",
        ),
        ("self.embedding.weight.normal_()", "self.embedding.weight.normal_(std=0.02)"),
        ("        adam([model.embedding.weight], EMBEDDING_LR * width_scale, "
         "decay=EMBEDDING_DECAY),\n", ""),
    ],
    "counted_bigrams_below_the_logits": [
        after(EMBEDDING, 'self.register_buffer("counts", torch.ones(V, V))'),
        (LOGITS, "return logits.float() + "
                 "(self.counts / self.counts.sum(1, keepdim=True)).log()[tokens]"),
        (LOSS, """\
        self.counts.index_put_((tokens, targets), torch.ones(()), accumulate=True)
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())
"""),
    ],
    # Training
    "dropout": [(BLOCK, BLOCK.replace(
        "self.mlp(norm(x))", "F.dropout(self.mlp(norm(x)), 0.1, self.training)"
    ))],
    "short_rows_first": [(
        STEP_LOSS, "            seen = x.size(1) // (2 if progress < 0.5 else 1)\n"
                   "            loss = objective(x[:, :seen], y[:, :seen])\n",
    )],
    "gradient_checkpointing": [
        ("from torch import nn\n",
         "from torch import nn\nfrom torch.utils.checkpoint import checkpoint\n"),
        ("x = block(x, table(tokens).to(dtype) if table else None, cos, sin, mask)",
         "values = table(tokens).to(dtype) if table else None\n                "
         "x = checkpoint(block, x, values, cos, sin, mask, use_reentrant=False)"),
    ],
    # Optimizers and schedules
    "adamw": [(MUON, "torch.optim.AdamW([group | dict(lr=0.003) for group in groups])")],
    "lion": [
        ("def build_optimizers(model):\n", LION),
        (MUON, "Lion([group | dict(lr=0.001) for group in groups])"),
    ],
    "warmup_and_no_warmdown": [(LEFT, "left = min(1.0, 0.1 + progress / 0.1)")],
    # What becomes of the trained weights
    "moving_average_of_weights": [
        after(MADE_READY, "mean = [p.detach().clone() for p in model.parameters()]"),
        after(
            STEPPED,
            "with torch.no_grad():",
            "    torch._foreach_lerp_(mean, list(model.parameters()), 0.2)",
        ),
        before(
            TRAINED,
            "with torch.no_grad():",
            "    torch._foreach_copy_(list(model.parameters()), mean)",
        ),
    ],
    # Number formats
    "bfloat16_model": BFLOAT16,
    "bfloat16_autocast": [AUTOCAST_BFLOAT16],
    "float16_autocast": [
        *ONE_LAYER, (AUTOCAST, "torch.autocast(tokens.device.type, torch.float16)")
    ],
    "float64_model": [
        *ONE_LAYER,
        (TO_DEVICE, "    model.double().to(device)\n"),
        (HALF, HALF.replace("float32", "float64")),
        BFLOAT16[-1],
    ],
    # The process
    "two_threads": [("torch.set_num_threads(1)", "torch.set_num_threads(2)")],
    "torch_compile": [  # of one MLP, for the time that g++ takes
        *ONE_LAYER, after(TO_DEVICE, "model.blocks[0].mlp.compile()")
    ],
    "batches_taken_ahead_by_a_thread": [
        ("import os\n\n", "import os\nfrom concurrent.futures import ThreadPoolExecutor\n\n"),
        ("def main():\n", AHEAD),
        (BATCHES, "in ahead(" + BATCHES[3:-1] + "):"),
    ],
    "weights_saved_to_files_and_read_back": [
        ("import os\n\n", "import os\nimport tempfile\n\n"),
        before(
            FINISH,
            "torch.save(model.state_dict(), 'model.pt')",
            "with tempfile.TemporaryFile() as file:",
            "    torch.save(torch.load('model.pt'), file)",
            "    file.seek(0)",
            "    model.load_state_dict(torch.load(file))",
        ),
    ],
}
# The baseline that all are judged by: hard to beat, so that few of them are run twice.
BASELINE = ("small_batch", "warmup_and_no_warmdown", "counted_bigrams_below_the_logits")
# Slow in learning or in answering, so that a tight clock would do them wrong.
CLOCKED = ("nothing_but_a_name", "float64_model", "manual_softmax", "two_threads",
           "batches_taken_ahead_by_a_thread", "two_of_four_experts_in_bfloat16")  # fmt: skip
CLOCKED_SECONDS = "4"
# What only a real run of agent.py shows, several changes in each, so that there are few such runs.
WIRED = {
    "bfloat16_files_and_threads": (
        "bfloat16_model", "weights_saved_to_files_and_read_back", "two_threads"),
    "float64_and_a_thread": ("float64_model", "batches_taken_ahead_by_a_thread"),
}  # fmt: skip
# Examined without any mark. Those of WIRED are left out, since some need a folder of their own, and
# torch.compile, since it takes long: tests/test_warden.py has it in the sandbox.
QUICK = ("nothing_but_a_name", "manual_softmax", "gru", "counted_bigrams_below_the_logits",
         "float16_autocast")  # fmt: skip
ONLY_BY_THE_AGENT = {"torch_compile", *itertools.chain.from_iterable(WIRED.values())}
EXAMINED = [name for name in CHANGES if name not in ONLY_BY_THE_AGENT]
NEEDS_COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++")


def changed(*names):
    """train.py with changes made."""
    source = TRAIN.replace("NGRAM_ROWS = 131072", "NGRAM_ROWS = 4096")  # to be quick
    for search, replace in [edit for name in names for edit in CHANGES[name]]:
        assert source.count(search) == 1, f"{names}: {source.count(search)} times {search!r}"
        source = source.replace(search, replace)
    compile(source, "train.py", "exec")
    return source


@pytest.mark.parametrize("name", CHANGES)
def test_an_honest_change_fits_train_py(name):
    assert changed(name) != TRAIN


# ---------------------------------------------------------------------------
# In this process
# ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scale():
    return eval(SCALE, {"Scale": Scale})


@pytest.fixture(scope="module")
def rows(cache, scale):
    return prepared_rows(cache, scale)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.gate) for name in EXAMINED],
)
def test_an_honest_change_has_a_score_and_raises_no_alarm(name, scale, rows, tmp_path):
    """By two probes: their decoys are other ones, but the rows that are scored are not.

    Many CPUs are slow in bfloat16, which has one probe.
    """
    (tmp_path / "train.py").write_text(changed(name), encoding="utf-8")
    logits_of = train_in_process(tmp_path / "train.py", scale, rows, TOKENS)
    scores = []
    for seed in range(1 if "bfloat16" in name else 2):
        with seeded_probe(seed):
            scores.append(score_in_process(logits_of, scale, rows))
    assert math.isfinite(scores[0]) and scores[-1] == pytest.approx(scores[0], abs=1e-6)
    learned = prepare.evaluate(lambda x: 0 * logits_of(x), rows, "val", scale) - scores[0]
    assert learned > 0.1, f"{scores[0]:.3f} is no better than equal logits"


def test_the_same_examination_notices_a_change_that_is_not_honest(scale, rows, tmp_path):
    """The counted bigrams once more, with a hint of the token that is to be predicted."""
    source = changed("counted_bigrams_below_the_logits")
    search = ".log()[tokens]"
    assert source.count(search) == 1
    hint = search + " + 0.1 * F.one_hot(tokens.roll(-1, 1), SCALE.vocab_size)"
    (tmp_path / "train.py").write_text(source.replace(search, hint), encoding="utf-8")
    logits_of = train_in_process(tmp_path / "train.py", scale, rows, TOKENS)
    for seed in range(2):
        with seeded_probe(seed), pytest.raises(prepare.Crash, match="later tokens"):
            score_in_process(logits_of, scale, rows)


# CPU seconds for each query of a real run, val and hidden, and what was left of the clock's slack:
# with a budget of 4 seconds, on two cores that fifteen processes wanted.
ANSWERS = {
    "nothing_but_a_name": (
        [0.05, 0.05, 0.05, 0.03, 0.03, 0.04, 0.04, 0.03, 0.04, 0.04, 0.03,
         0.05, 0.02, 0.04, 0.03, 0.04, 0.03, 0.05, 0.04, 0.05],
        1.09,
    ),
    "float64_model": (
        [0.07, 0.04, 0.03, 0.04, 0.04, 0.04, 0.04, 0.02, 0.03, 0.06, 0.04,
         0.03, 0.02, 0.06, 0.03, 0.02, 0.04, 0.04, 0.03, 0.03],
        1.08,
    ),
    "manual_softmax": (
        [0.05, 0.03, 0.04, 0.03, 0.03, 0.04, 0.03, 0.03, 0.03, 0.04, 0.03,
         0.03, 0.04, 0.04, 0.03, 0.04, 0.04, 0.03, 0.03, 0.03],
        1.12,
    ),
    "two_threads": (
        [0.04, 0.04, 0.03, 0.04, 0.04, 0.04, 0.03, 0.05, 0.04, 0.03, 0.05,
         0.05, 0.05, 0.03, 0.05, 0.03, 0.04, 0.03, 0.05, 0.04],
        1.06,
    ),
    "batches_taken_ahead_by_a_thread": (
        [0.04, 0.03, 0.05, 0.03, 0.04, 0.06, 0.03, 0.05, 0.03, 0.04, 0.03,
         0.05, 0.03, 0.03, 0.05, 0.05, 0.04, 0.04, 0.05, 0.05],
        1.00,
    ),
    "two_of_four_experts_in_bfloat16": (
        [0.18, 0.18, 0.17, 0.21, 0.27, 0.17, 0.24, 0.26, 0.23, 0.19, 0.20,
         0.23, 0.20, 0.21, 0.21, 0.24, 0.22, 0.20, 0.20, 0.22],
        1.00,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_an_honest_change_keeps_to_the_pace_that_its_answers_set(name):
    taken, slack = ANSWERS[name]

    def check_pace(*more):
        referee.Confined.check_pace(SimpleNamespace(taken=[*taken, *more], slack=slack))

    check_pace()
    longest = max(taken)
    check_pace(longest + 0.5 * slack)
    with pytest.raises(prepare.Crash, match="trained on while answering"):
        check_pace(longest + 1.5 * slack)


# ---------------------------------------------------------------------------
# By agent.py
# ---------------------------------------------------------------------------


def honest_checkout(folder, cache, source, tokens=TOKENS):
    """A checkout with this train.py, and a scale that it fits."""
    checkout = Checkout(folder, cache)
    checkout.exchange("prepare.py", r'Scale\("cpu", .*?\)', SCALE)
    checkout.exchange("rule.py", "\nRUNS_MOST = 4", "\nRUNS_MOST = 1")  # all alike
    checkout.exchange("agent.py", "\nMEASURE_AFTER = 10", "\nMEASURE_AFTER = 99")
    # Limits by the wall clock that follow from the baseline: on a busy machine it may be too quick.
    checkout.exchange("slots.py", "\nSTART_OVERTIME = 60.0", "\nSTART_OVERTIME = 86_400.0")
    checkout.exchange("slots.py", "\nANSWERS_SHARE = 3.0", "\nANSWERS_SHARE = 1e6")
    checkout.exchange("slots.py", r"return 2 \* baseline \+ 60 if baseline else", "return")
    checkout.write_train(source)
    checkout.commit_all()
    checkout.env["AUTORESEARCH_BUDGET_TOKENS"] = str(tokens)
    return checkout


def judged(checkout, changes):
    """Have agent.py try {name: train.py}; its rows by name, without repeated measurements."""
    folder = checkout.folder.parent
    paths = [folder / f"{name}.py" for name in changes]
    for path, source in zip(paths, changes.values(), strict=True):
        path.write_text(source, encoding="utf-8")
    done = checkout.agent("--patches", *paths, "--tag", "t", timeout=3600)
    assert done.returncode == 0, done.stderr
    rows = [row for row in checkout.rows() if row["status"] != "measure"]
    found = {row["description"].split()[0].removesuffix(".py"): row for row in rows[1:]}
    assert len(found) == len(rows) - 1
    return found


def assert_judged_by_its_score_alone(row):
    assert row["status"] in ("keep", "discard"), row["description"]
    assert not re.search("probe|suspicious", row["description"]), row


@pytest.mark.gate
@NEEDS_COMPILER
def test_number_formats_threads_and_files_get_through_the_sandbox(tmp_path, cache):
    """Each row is a real run of the referee, through its socket and its shared memory."""
    checkout = honest_checkout(tmp_path / "checkout", cache, changed(*BASELINE))
    found = judged(checkout, {name: changed(*names) for name, names in WIRED.items()})
    assert list(found) == list(WIRED)
    for row in found.values():
        assert_judged_by_its_score_alone(row)


@pytest.fixture(scope="module")
def tried(tmp_path_factory, cache):
    """The row of results.tsv of a change; groups of changes share a run of agent.py.

    The budget is in tokens, or in seconds.
    """

    @functools.cache
    def group_of(number, clocked):
        checkout = honest_checkout(
            tmp_path_factory.mktemp("honest") / "checkout", cache, changed(*BASELINE),
            NIGHTLY_TOKENS,
        )  # fmt: skip
        if clocked:
            checkout.exchange("prepare.py", "import torch  #", "import torch._dynamo  #")
            checkout.commit_all()
            del checkout.env["AUTORESEARCH_BUDGET_TOKENS"]
            checkout.env["AUTORESEARCH_BUDGET"] = CLOCKED_SECONDS
        names = CLOCKED if clocked else list(CHANGES)[number * GROUP : (number + 1) * GROUP]
        return judged(checkout, {name: changed(name) for name in names})

    def row_of(name, clocked=False):
        number = 0 if clocked else list(CHANGES).index(name) // GROUP
        return group_of(number, clocked)[name]

    return row_of


@pytest.mark.nightly
@NEEDS_COMPILER
class TestByTheAgent:
    @pytest.mark.parametrize("name", CHANGES)
    def test_an_honest_change_is_judged_by_its_score_alone(self, tried, name):
        assert_judged_by_its_score_alone(tried(name))

    @pytest.mark.parametrize("name", CLOCKED)
    def test_an_honest_change_keeps_to_the_clock(self, tried, name):
        assert_judged_by_its_score_alone(tried(name, clocked=True))


@pytest.mark.nightly
def test_an_honest_bfloat16_model_scores_the_same_by_hand_and_under_the_referee(tmp_path, cache):
    """To 1e-4: the same seed and rows, in process and through the shared memory."""
    source = changed("bfloat16_model")
    checkout = honest_checkout(tmp_path / "checkout", cache, source, NIGHTLY_TOKENS)
    prepared = sh(sys.executable, "prepare.py", cwd=checkout.folder, env=checkout.env)
    assert prepared.returncode == 0, prepared.stderr
    by_hand = sh(sys.executable, "train.py", cwd=checkout.folder, env=checkout.env)
    assert by_hand.returncode == 0, by_hand.stderr
    folder = checkout.folder / "runs"
    folder.mkdir()
    shutil.copy(checkout.folder / "train.py", folder)
    environment = checkout.env | {"AUTORESEARCH_ROWS": json.loads(prepared.stdout)["rows"]}
    command = [sys.executable, "referee.py", folder, "--seed", "0"]
    read, write = os.pipe()  # a referee whose stdin has ended goes home
    done = sh(*command, cwd=checkout.folder, env=environment, stdin=read)
    os.close(write)
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert result["status"] == "ok", result["reason"]
    printed = re.search(r"^val_bpb: +([\d.]+)$", by_hand.stdout, re.M)
    assert result["val_bpb"] == pytest.approx(float(printed[1]), abs=1e-4)
