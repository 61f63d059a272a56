"""The athlete: model, optimizer, schedules and loop. The only file that the language model edits.

    python train.py                          # train at this machine's scale, print the summary
    AUTORESEARCH_SCALE=gpu python train.py   # at another scale
    AUTORESEARCH_SCALE=gpt2 torchrun --nproc_per_node=8 train.py   # the full run; it resumes

DEPTH is the dial: width, heads, learning rates and windows follow from it, so that the same
file, with the same commits on it, trains the one-minute model on a CPU and the full one on GPUs.
Data, clock, seed and score belong to prepare.py.
"""

import contextlib
import functools
import math
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads burn budget

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from prepare import SPENT, batches, current_scale, device_type, finish, ranks, run_seed

SCALE = current_scale()
FULL = "AUTORESEARCH_REFEREE" not in os.environ  # an experiment has one rank and no checkpoints
if FULL:
    import full

# ---------------------------------------------------------------------------
# Hyperparameters
# ---------------------------------------------------------------------------

# Model
DEPTH = {"cpu": 2, "gpu": 9, "d12": 12, "gpt2": 24}[SCALE.name]  # layers, the one dial
ASPECT_RATIO = {"cpu": 32, "gpu": 57, "d12": 64, "gpt2": 64}[SCALE.name]  # width per layer
HEAD_DIM = {"cpu": 32, "gpu": 128, "d12": 128, "gpt2": 128}[SCALE.name]  # width is whole heads
MLP_RATIO = 4  # hidden width of the MLP over the model's width
WINDOW_PATTERN = "SSSSL"  # repeated over layers: S short window, L all; the last layer is L
SHORT_WINDOW_DIVISOR = 8  # a short window sees the last sequence_len / 8 tokens
ROPE_BASE = 200000.0  # of the rotary frequencies
SOFTCAP = 15.0  # logits are bounded to +-15 by tanh
NGRAM_ORDER = {"cpu": 3, "gpu": 1, "d12": 1, "gpt2": 1}[SCALE.name]  # longest n-gram embedded
NGRAM_ROWS = 131072  # of the hash table of each n-gram length, 2 to NGRAM_ORDER
VALUE_GATE_CHANNELS = 32  # of the residual stream, that gate the value embeddings
INIT_SCALE = 0.68  # on the standard deviation 1 / sqrt(width) of uniform matrices
X0_LAMBDA_INIT = 0.05  # share of the embedding that is added back before each layer
LOSS_CHUNK = {"cpu": 128, "gpu": 8192, "d12": 4096, "gpt2": 4096}[SCALE.name]  # tokens, by memory

# Batch: tokens a step, rows a forward pass
TOTAL_BATCH_SIZE = {"cpu": 4096, "gpu": 262144, "d12": 524288, "gpt2": 1048576}[SCALE.name]
DEVICE_BATCH_SIZE = {"cpu": 32, "gpu": 32, "d12": 16, "gpt2": 8}[SCALE.name]

# Optimizer
MATRIX_LR = 0.04  # Muon, matrices of the layers
EMBEDDING_LR = 0.9  # Adam, at width 768; value embeddings and n-grams too
UNEMBEDDING_LR = 0.005  # Adam, at width 768; the output head
SCALAR_LR = 0.5  # Adam, x0 lambdas
RESID_LR_RATIO = 0.01  # on SCALAR_LR, for the residual lambdas
ADAM_BETAS = (0.8, 0.95)
X0_BETAS = (0.96, 0.95)
WEIGHT_DECAY = 0.2  # Muon, cautious, falls linearly to 0
EMBEDDING_DECAY = 0.001
VALUE_EMBEDDING_DECAY = 0.003
UNEMBEDDING_DECAY = 0.01
MUON_MOMENTUM = 0.95
MUON_MOMENTUM_START = 0.85
MUON_MOMENTUM_STEPS = 200  # from the one to the other
MUON_BETA2 = 0.95  # of the variance reduction

# Schedule
WARMDOWN_RATIO = 0.75  # last share of the budget, in which learning rates fall linearly
FINAL_LR_FRAC = 0.05  # what is left of them at the end

def card():
    """(GB of the card, shares of DEPTH, of tokens a step, of rows a pass that it can have)."""
    gb = math.inf
    if SCALE.name == "gpu" and torch.cuda.is_available():
        gb = torch.cuda.get_device_properties(0).total_memory / 1e9
    from_gb = {40: (1, 1, 1), 20: (2 / 3, 1 / 4, 1), 10: (1 / 2, 1 / 4, 1 / 2)}
    return gb, next((s for least, s in from_gb.items() if gb >= least), (4 / 9, 1 / 8, 1 / 4))


DEPTH, TOTAL_BATCH_SIZE, DEVICE_BATCH_SIZE = (
    max(1, round(size * share))
    for size, share in zip((DEPTH, TOTAL_BATCH_SIZE, DEVICE_BATCH_SIZE), card()[1], strict=True)
)
if card()[1][1] < 1:  # of tokens a step: they may be fewer than a pass would have
    DEVICE_BATCH_SIZE = max(1, min(DEVICE_BATCH_SIZE, TOTAL_BATCH_SIZE // SCALE.sequence_len))
assert TOTAL_BATCH_SIZE % (DEVICE_BATCH_SIZE * SCALE.sequence_len) == 0, (
    f"a step of {TOTAL_BATCH_SIZE} tokens is not whole passes of {DEVICE_BATCH_SIZE} rows"
)
assert HEAD_DIM % 2 == 0, f"rotation turns pairs of channels, HEAD_DIM is {HEAD_DIM}"

# Dense bfloat16 FLOP/s by data sheet, for mfu_percent.
PEAK_FLOPS = {"H100": 989.5e12, "H200": 989.5e12, "A100": 312e12, "4090": 165.2e12, "3090": 71e12}

# ---------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------


@functools.cache
def fast(function, is_cuda):
    """The function, compiled where that pays. Numbers that may change are to come as tensors."""
    return torch.compile(function, dynamic=False) if is_cuda else function


def half(device):
    """What matrices are multiplied in: bfloat16 on a GPU, float16 before Ampere, else float32."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def norm(x):
    """RMS norm without a weight, over the last dimension; autocast would answer in float32."""
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, (x.size(-1),))


def rotate(x, cos, sin):
    """Rotary position embedding of x (B, H, T, D); cos and sin are (T, D / 2)."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
    return turned.to(x.dtype)


def hashed_ngrams(tokens, n):
    """Table row of the last n tokens up to each position of (B, T), by a multiplicative hash."""
    key = tokens
    for back in range(1, n):
        key = key * 1000003 + F.pad(tokens[:, :-back], (back, 0))
    return (key * 2654435761 >> 16) % NGRAM_ROWS


def has_value_embedding(layer):
    """Every other layer, the last one included."""
    return (DEPTH - 1 - layer) % 2 == 0


class Attention(nn.Module):
    """Causal self-attention with QK norm, a window, and a gated value embedding on some layers."""

    def __init__(self, layer, width, window):
        super().__init__()
        self.n_head, self.window = width // HEAD_DIM, window
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        if has_value_embedding(layer):
            self.value_gate = nn.Linear(min(VALUE_GATE_CHANNELS, width), self.n_head, bias=False)

    def forward(self, x, value_embedding, cos, sin, mask):
        B, T, C = x.shape

        def heads(y):  # (B, T, C) -> (B, H, T, D)
            return y.view(B, T, self.n_head, HEAD_DIM).transpose(1, 2)

        q, k, v = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        if value_embedding is not None:
            gate = 2 * torch.sigmoid(self.value_gate(x[..., :VALUE_GATE_CHANNELS]))  # (B, T, H)
            v = v + gate.transpose(1, 2).unsqueeze(-1) * heads(value_embedding)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        if self.window < T and isinstance(mask, BlockMask):
            y = flex_attention(q, k, v, block_mask=mask)
        elif self.window < T:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


def in_window(window, query, key):
    """Whether a position sees another: itself and the last `window` before it."""
    return (query >= key) & (query - key <= window)


def block_mask(window, device):
    """A short window for FlexAttention, which passes over blocks where nothing is seen."""
    T = SCALE.sequence_len
    return create_block_mask(
        lambda b, h, query, key: in_window(window, query, key), None, None, T, T, device
    )


class MLP(nn.Module):
    """Two matrices with a squared ReLU between them."""

    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, MLP_RATIO * width, bias=False)
        self.down = nn.Linear(MLP_RATIO * width, width, bias=False)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    def __init__(self, layer, width, window):
        super().__init__()
        self.attention = Attention(layer, width, window)
        self.mlp = MLP(width)

    def forward(self, x, value_embedding, cos, sin, mask):
        x = x + self.attention(norm(x), value_embedding, cos, sin, mask)
        return x + self.mlp(norm(x))


def chunk_loss(h, w, y, fused):
    """(summed loss, gradients by h and by w) of a chunk: h (n, width), w (V, width), y (n, 1)."""
    bounded = torch.tanh((h @ w.T).float() / SOFTCAP)
    log_probs = F.log_softmax(SOFTCAP * bounded, dim=-1)
    loss = log_probs.gather(1, y).sum().neg()
    if fused:  # the softmax, less 1 at the target, in one pass when compiled
        d_logits = log_probs.exp() - (torch.arange(len(w), device=y.device) == y).float()
    else:
        d_logits = log_probs.exp_()
        d_logits.scatter_add_(1, y, d_logits.new_full(y.shape, -1.0))
    d_logits = (d_logits * (1 - bounded.square_())).to(w.dtype)  # through the tanh
    return loss, d_logits @ w, d_logits.T @ h


class ChunkedLoss(torch.autograd.Function):
    """Mean cross-entropy of soft-capped logits, LOSS_CHUNK tokens at a time, gradients included.

    The logits of a step are its largest tensor by far; in chunks they stay in the CPU's cache, and
    out of the GPU's memory.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets):  # (N, width), (V, width), (N,)
        w = weight.to(hidden.dtype)
        total, d_hidden, d_weight = 0.0, torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(targets), LOSS_CHUNK):
            chunk = slice(start, start + LOSS_CHUNK)
            step = fast(chunk_loss, hidden.is_cuda)
            loss, d_hidden[chunk], d_w = step(
                hidden[chunk], w, targets[chunk, None], hidden.is_cuda)
            total, d_weight = total + loss, d_weight.add_(d_w)
        ctx.save_for_backward(d_hidden, d_weight)  # not yet divided, which float16 would not hold
        return total / len(targets)

    @staticmethod
    def backward(ctx, d_loss):
        d_hidden, d_weight = ctx.saved_tensors
        each = d_loss / d_hidden.size(0)
        return d_hidden * each, d_weight * each, None


class GPT(nn.Module):
    """Layers over an embedding that every layer sees again, with an untied head."""

    def __init__(self):
        super().__init__()
        V, T = SCALE.vocab_size, SCALE.sequence_len
        width = math.ceil(DEPTH * ASPECT_RATIO / HEAD_DIM) * HEAD_DIM
        short = T // SHORT_WINDOW_DIVISOR
        pattern = [WINDOW_PATTERN[i % len(WINDOW_PATTERN)] for i in range(DEPTH - 1)] + ["L"]
        windows = [T if kind == "L" else short for kind in pattern]
        self.width, self.short_window = width, short
        self.embedding = nn.Embedding(V, width)
        alone = ranks()[1] == 1  # what ranks share is dense
        self.ngrams = nn.ModuleList(
            nn.Embedding(NGRAM_ROWS, width, sparse=alone) for _ in range(2, NGRAM_ORDER + 1)
        )
        self.value_embeddings = nn.ModuleDict(
            {str(i): nn.Embedding(V, width) for i in range(DEPTH) if has_value_embedding(i)}
        )
        self.blocks = nn.ModuleList(Block(i, width, windows[i]) for i in range(DEPTH))
        self.head = nn.Linear(width, V, bias=False)
        self.resid_lambdas = nn.Parameter(torch.empty(DEPTH))
        self.x0_lambdas = nn.Parameter(torch.empty(DEPTH))
        self.register_buffer("cos", torch.empty(T, HEAD_DIM // 2), persistent=False)
        self.register_buffer("sin", torch.empty(T, HEAD_DIM // 2), persistent=False)
        self.register_buffer("mask", torch.empty(T, T, dtype=torch.bool), persistent=False)

    @torch.no_grad()
    def init_weights(self):
        """Fill parameters and buffers; apart from __init__, so that "meta" can hold a model."""
        bound = INIT_SCALE * (3 / self.width) ** 0.5
        self.resid_lambdas.fill_(1.0)
        self.x0_lambdas.fill_(X0_LAMBDA_INIT)
        self.embedding.weight.normal_()
        self.head.weight.normal_(std=0.001)
        for table in self.ngrams:
            table.weight.zero_()
        for table in self.value_embeddings.values():
            table.weight.uniform_(-bound, bound)
        for block in self.blocks:
            for name, weight in block.named_parameters():
                if name.endswith(("out.weight", "down.weight", "value_gate.weight")):
                    weight.zero_()  # every block starts as the identity, every gate at 1
                else:
                    weight.uniform_(-bound, bound)
        T, device = SCALE.sequence_len, self.cos.device
        position = torch.arange(T, dtype=torch.float32, device=device)
        channel = torch.arange(0, HEAD_DIM, 2, dtype=torch.float32, device=device)
        angles = torch.outer(position, ROPE_BASE ** (-channel / HEAD_DIM))
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())
        self.mask.copy_(in_window(self.short_window, position[:, None], position[None, :]))

    def hidden(self, tokens, mask):
        """Tokens (B, T) to the normed output of the last layer (B, T, width)."""
        cos, sin = self.cos[: tokens.size(1)], self.sin[: tokens.size(1)]
        dtype = half(tokens.device)
        with torch.autocast(tokens.device.type, dtype, enabled=tokens.is_cuda):
            x = self.embedding(tokens)  # (B, T, width)
            for n, table in enumerate(self.ngrams, 2):
                x = x + table(hashed_ngrams(tokens, n))
            x = x0 = norm(x.to(dtype))
            for i, block in enumerate(self.blocks):
                x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
                table = self.value_embeddings[str(i)] if has_value_embedding(i) else None
                x = block(x, table(tokens).to(dtype) if table else None, cos, sin, mask)
            return norm(x).to(dtype)

    def forward(self, tokens):
        """Tokens (B, T) int64 to logits (B, T, vocab_size) float32."""
        T = tokens.size(1)
        hidden = self.hidden(tokens, self.mask[:T, :T])
        logits = hidden @ self.head.weight.to(hidden.dtype).T
        return SOFTCAP * torch.tanh(logits.float() / SOFTCAP)

    def loss(self, tokens, targets, mask=None):
        """Mean cross-entropy in nats per token, without ever holding all logits."""
        T = tokens.size(1)
        mask = self.mask[:T, :T] if mask is None else mask
        hidden = self.hidden(tokens, mask).flatten(0, 1)  # (B * T, width)
        return ChunkedLoss.apply(hidden, self.head.weight, targets.flatten())

    def matrix_parameters(self):
        """Of the layers and the head: what each token is multiplied with."""
        return sum(p.numel() for p in (*self.blocks.parameters(), self.head.weight))

    def flops_per_token(self):
        """Forward and backward: 6 a matrix weight, 12 a channel and attended token of a layer."""
        attended = sum(block.attention.window for block in self.blocks)
        return 6 * self.matrix_parameters() + 12 * self.width * attended


def build_model():
    """The untrained model of the current scale, on the default device."""
    return GPT()


# ---------------------------------------------------------------------------
# Optimizer
# ---------------------------------------------------------------------------

# Polar Express (Amsel et al. 2025, arXiv 2505.16932): quintic steps towards the orthogonal factor.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(g):
    """The nearest semi-orthogonal matrices to g (N, rows, columns), approximately."""
    x = g.bfloat16() if half(g.device) == torch.bfloat16 else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    tall = g.size(-2) > g.size(-1)
    x = x.mT if tall else x
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(g.dtype)


def spread(g):
    """The dimension of g (N, rows, columns) that shares a variance: there are more of the other."""
    return -1 if g.size(-2) >= g.size(-1) else -2


def muon_step(weights, grads, momentums, variances, lr, momentum, weight_decay, beta2):
    """Step a stack of matrices (N, rows, columns), and its state, in place."""
    momentums.lerp_(grads, 1 - momentum)
    update = orthogonalize(grads.lerp(momentums, momentum))  # Nesterov
    square = update.square().mean(spread(update), keepdim=True)
    variances.lerp_(square, 1 - beta2)
    scale = variances.clamp_min(1e-10).rsqrt()
    size_before = square.sum((-2, -1), keepdim=True).sqrt()
    size_after = (square * scale.square()).sum((-2, -1), keepdim=True).sqrt()
    update = update * scale * (size_before / size_after.clamp_min(1e-10))
    agrees = update * weights >= 0
    weights -= lr * (update + weight_decay * weights * agrees)


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum (Jordan et al. 2024) with the variance reduction of NorMuon (Li et
    al. 2025, arXiv 2510.05491), and weight decay only where it agrees with the step. A group
    holds matrices of one shape, which are stepped as one stack.
    """

    def __init__(self, groups):
        super().__init__(groups, dict(lr=0.0, momentum=0.0, weight_decay=0.0))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if group["params"]:  # of several ranks, not each has a matrix of each shape
                self.step_stack(group, self.state[group["params"][0]])

    def step_stack(self, group, state):
        weights = torch.stack(group["params"])  # (N, rows, columns)
        grads = torch.stack([p.grad for p in group["params"]])
        rows, columns = weights.shape[-2:]
        if not state:
            state["momentum"] = torch.zeros_like(grads)
            state["variance"] = torch.zeros_like(grads.sum(spread(grads), keepdim=True))
        lr = group["lr"] * max(1.0, rows / columns) ** 0.5
        numbers = (lr, group["momentum"], group["weight_decay"], MUON_BETA2)
        if weights.is_cuda:  # of no dimension, and not on the device: nothing is waited for
            numbers = map(torch.tensor, numbers)
        step = fast(muon_step, weights.is_cuda)
        step(weights, grads, state["momentum"], state["variance"], *numbers)
        torch._foreach_copy_(group["params"], list(weights.unbind()))


# What the learning rates and WEIGHT_DECAY are tuned at.
REFERENCE_BATCH = {"cpu": 4096}.get(SCALE.name, 262144)  # tokens a step
REFERENCE_TOKENS = 3e8  # of a run


def batch_scale():
    """Learning rates grow with the square root of the batch (Malladi et al. 2022, for Adam)."""
    return math.sqrt(TOTAL_BATCH_SIZE / REFERENCE_BATCH)


def decay_scale():
    """WEIGHT_DECAY keeps the share of a run over which weights are averaged (Wang and Aitchison
    2024): steps * lr * decay stays, where lr goes with the root of the batch."""
    if SCALE.clock != "tokens" or SCALE.name in ("cpu", "gpu"):
        return 1.0
    return batch_scale() * REFERENCE_TOKENS / SCALE.budget


def build_optimizers(model):
    """[Muon for the matrices of the layers, AdamW for the rest]; each group knows its `full_lr`.

    Of several ranks each steps some of the matrices, and sends them to the others.
    """
    width_scale = (model.width / 768) ** -0.5 * batch_scale()

    def adam(parameters, lr, betas=ADAM_BETAS, decay=0.0):
        return dict(params=parameters, lr=lr, betas=betas, weight_decay=decay)

    tables = list(model.value_embeddings.parameters())
    adam_groups = [
        adam([model.embedding.weight], EMBEDDING_LR * width_scale, decay=EMBEDDING_DECAY),
        adam(tables, EMBEDDING_LR * width_scale, decay=VALUE_EMBEDDING_DECAY),
        adam([model.head.weight], UNEMBEDDING_LR * width_scale, decay=UNEMBEDDING_DECAY),
        adam([model.resid_lambdas], SCALAR_LR * RESID_LR_RATIO * batch_scale()),
        adam([model.x0_lambdas], SCALAR_LR * batch_scale(), betas=X0_BETAS),
    ]
    by_shape = {}
    for weight in model.blocks.parameters():
        by_shape.setdefault(weight.shape, []).append(weight)
    lr = MATRIX_LR * batch_scale()
    groups = [dict(params=weights, lr=lr) for weights in by_shape.values()]
    muon = Muon(groups) if ranks()[1] == 1 else full.divided(groups, Muon)
    optimizers = [muon, torch.optim.AdamW(adam_groups, eps=1e-10, fused=True)]
    if model.ngrams:  # a step touches few rows of these tables
        lr, tables = EMBEDDING_LR * width_scale, list(model.ngrams.parameters())
        optimizers.append(torch.optim.SparseAdam(tables, lr=lr, betas=ADAM_BETAS, eps=1e-10))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
    return optimizers


# ---------------------------------------------------------------------------
# Schedules
# ---------------------------------------------------------------------------


def lr_multiplier(progress):
    """1, then linear to FINAL_LR_FRAC over the last WARMDOWN_RATIO of the budget."""
    left = min(1.0, (1.0 - progress) / max(WARMDOWN_RATIO, 1e-9))
    return FINAL_LR_FRAC + (1.0 - FINAL_LR_FRAC) * left


def muon_momentum(step):
    ramp = min(1.0, step / max(MUON_MOMENTUM_STEPS, 1))
    return MUON_MOMENTUM_START + (MUON_MOMENTUM - MUON_MOMENTUM_START) * ramp


def muon_weight_decay(progress):
    return WEIGHT_DECAY * decay_scale() * (1.0 - progress)


def set_schedules(optimizers, progress, step):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * lr_multiplier(progress)
    for group in optimizers[0].param_groups:
        group["momentum"] = muon_momentum(step)
        group["weight_decay"] = muon_weight_decay(progress)


# ---------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------


def fitting_rows(attempt):
    """DEVICE_BATCH_SIZE, or half of it where an attempt with so many rows is out of memory."""
    try:
        attempt(DEVICE_BATCH_SIZE)
        return DEVICE_BATCH_SIZE
    except torch.OutOfMemoryError:
        if DEVICE_BATCH_SIZE == 1 or ranks()[1] > 1:  # of which the others would not know
            raise
    rows = DEVICE_BATCH_SIZE // 2
    print(f"out of memory with {DEVICE_BATCH_SIZE} rows a pass, so {rows} in twice the passes")
    attempt(rows)
    return rows


def own(optimizers):
    """The optimizers that hold this rank's state."""
    return [getattr(optimizer, "optim", optimizer) for optimizer in optimizers]


class Objective(nn.Module):
    """A model whose answer is its loss, as DistributedDataParallel takes it."""

    def __init__(self, model, mask):
        super().__init__()
        self.model, self.mask = model, mask

    def forward(self, x, y):
        return self.model.loss(x, y, self.mask)


def compile_all(model, optimizers, mask, n_rows):
    """Steps on made-up tokens, before the clock starts; then all is as if they had not been."""
    shape, device = (n_rows, SCALE.sequence_len + 1), model.cos.device
    model.zero_grad(set_to_none=True)
    model.__dict__.pop("hidden", None)  # of an attempt with more rows
    torch.cuda.empty_cache()
    rows = torch.randint(SCALE.vocab_size, shape, device=device)
    with torch.no_grad():
        model(rows[:1, :-1])  # as the referee will ask: the first time loads kernels
    model.hidden = torch.compile(type(model).hidden.__get__(model), dynamic=False)
    for _ in range(2):  # on views of rows, as from batches(): another layout is compiled anew
        model.loss(rows[:, :-1], rows[:, 1:], mask).backward()
        for optimizer in optimizers:
            optimizer.step()
    model.zero_grad(set_to_none=True)
    for optimizer in own(optimizers):
        optimizer.state.clear()
    torch.manual_seed(run_seed())
    model.init_weights()


def read_later(loss):
    """A call that gives a loss's value, without waiting for what is queued after it."""
    value = loss.detach().to("cpu", non_blocking=True)
    if not loss.is_cuda:
        return value.item
    copied = torch.cuda.Event()
    copied.record()

    def read():
        copied.synchronize()
        return value.item()

    return read


def report(step, progress, read_loss, first_loss):
    """Print a step's loss; a doomed run need not burn its budget. The first loss of all."""
    loss = read_loss()
    first_loss = loss if first_loss is None else first_loss
    if not loss <= first_loss + 3:  # NaN too; the first steps may leap by 1
        raise FloatingPointError(f"loss is {loss} at step {step}, was {first_loss:.4f}")
    print(f"step {step:05d} ({100 * progress:.0f}%) | loss {loss:.4f}")
    return first_loss


def main():
    torch.manual_seed(run_seed())
    torch.set_float32_matmul_precision("high")
    device = torch.device("cpu" if SCALE.name == "cpu" else device_type())
    device = full.join(device) if ranks()[1] > 1 else device
    if device.type == "cpu":
        torch.set_num_threads(1)  # the most tokens per CPU second, and the same on any machine
    model = build_model()
    model.init_weights()
    model.to(device)
    optimizers, mask, rows = build_optimizers(model), None, DEVICE_BATCH_SIZE
    if device.type == "cuda":
        mask = block_mask(model.short_window, device)
        rows = fitting_rows(functools.partial(compile_all, model, optimizers, mask))
    at_once = rows * SCALE.sequence_len * ranks()[1]
    if TOTAL_BATCH_SIZE % at_once:
        raise ValueError(f"a step of {TOTAL_BATCH_SIZE} tokens is not whole passes of {at_once}")
    print(f"scale {SCALE.name}: depth {DEPTH}, width {model.width}, head_dim {HEAD_DIM}, "
          f"batch {TOTAL_BATCH_SIZE} tokens in {TOTAL_BATCH_SIZE // at_once} passes, {device}")
    gb, shares = card()
    if gb < math.inf:
        print(f"card of {gb:.0f} GB: {shares} of depth, tokens a step and rows a pass")
    if SCALE.clock == "tokens":
        ratio = SCALE.budget / model.matrix_parameters()
        print(f"{SCALE.budget / 1e6:,.1f} M tokens, {ratio:.2f} for each parameter of a matrix")
    step = train(model, optimizers, mask, rows, device)
    if ranks()[1] > 1:
        torch.distributed.destroy_process_group()  # the rest is the first one's
    finish(model, num_steps=step, depth=DEPTH, mfu_percent=mfu_percent(model, device))


def train(model, optimizers, mask, rows, device):
    """Steps until the budget is spent; how many."""
    checkpoints = full.checkpoints(__file__, model, own(optimizers)) if FULL else None
    counted = checkpoints.load() if checkpoints else {}
    step, tokens = counted.get("step", 0), counted.get("tokens", 0)
    objective = Objective(model, mask)
    if ranks()[1] > 1:
        objective = nn.parallel.DistributedDataParallel(objective, broadcast_buffers=False)
    accumulation = TOTAL_BATCH_SIZE // (rows * SCALE.sequence_len * ranks()[1])
    scaler = torch.amp.GradScaler(device.type, enabled=half(device) == torch.float16)
    if counted:
        scaler.load_state_dict(counted["scaler"])
    first_loss, line, next_line, begun = counted.get("first_loss"), None, 0.0, 0.0
    for x, y, progress in batches(rows, device, tokens, counted.get("seconds", 0.0)):
        begun = begun if tokens % TOTAL_BATCH_SIZE else progress  # however many passes there are
        tokens += x.numel() * ranks()[1]
        last = tokens % TOTAL_BATCH_SIZE == 0
        with contextlib.nullcontext() if last or ranks()[1] == 1 else objective.no_sync():
            loss = objective(x, y)
            scaler.scale(loss / accumulation).backward()
        if not last:
            continue
        set_schedules(optimizers, begun, step)
        for table in model.ngrams if ranks()[1] > 1 else ():
            table.weight.grad = table.weight.grad.to_sparse(1)  # rows that some rank has seen
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        model.zero_grad(set_to_none=True)
        if progress >= next_line:  # the loss of the line before has long been there
            first_loss = report(*line, first_loss) if line else first_loss
            line, next_line = (step, progress, read_later(loss)), progress + 0.02
        step += 1
        if checkpoints and checkpoints.due(progress):
            checkpoints.save(dict(step=step, tokens=tokens, seconds=SPENT.wall_seconds,
                                  first_loss=first_loss, scaler=scaler.state_dict()))
    if line:
        report(*line, first_loss)
    return step


def mfu_percent(model, device):
    """Model FLOPs per second of training, over the device's peak; 0 where the peak is not known."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    peak = next((flops for key, flops in PEAK_FLOPS.items() if key in name), math.inf)
    done = model.flops_per_token() * SPENT.tokens / ranks()[1]
    return 100 * done / SPENT.wall_seconds / peak


if __name__ == "__main__":
    main()
