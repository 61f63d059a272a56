"""What karpathy/autoresearch's train.py imports as `prepare`, made of our rows, seed and score.

upstream.py lays a copy of this file beside that train.py. Without a GPU it also stands in for
the calls of torch.cuda and torch.compile that the file makes, and for its timer: CPU seconds then.
"""

import importlib.util
import itertools
import os
import resource
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

spec = importlib.util.spec_from_file_location("contest", Path(os.environ["OURS"]) / "prepare.py")
contest = sys.modules["contest"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(contest)

SCALE = contest.current_scale()
MAX_SEQ_LEN, TIME_BUDGET = SCALE.sequence_len, SCALE.budget
DEVICE = torch.device(contest.device_type())
BLOCKS = {}  # block masks for FlexAttention, by window: built before anything is compiled

if DEVICE.type == "cpu":
    torch.set_num_threads(1)  # as ours
    time = types.SimpleNamespace(time=time.process_time)
    torch.compile = lambda model=None, **options: model or (lambda function: function)
    torch.cuda.get_device_capability = lambda: (0, 0)
    torch.cuda.synchronize = lambda: None
    torch.cuda.max_memory_allocated = lambda: 1024 * resource.getrusage(0).ru_maxrss
elif SCALE.clock == "tokens":
    raise SystemExit("error: its file knows a budget in seconds only")


def attention(q, k, v, causal, window_size):
    """y (B, T, H, D); windows by FlexAttention in what is compiled, by a plain mask elsewhere."""
    q, k, v = (y.transpose(1, 2).to(v.dtype) for y in (q, k, v))
    T, window = q.size(2), window_size[0]
    if not 0 <= window < T:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    elif torch.compiler.is_compiling():
        y = flex_attention(q, k, v, block_mask=BLOCKS[window])
    else:
        back = torch.arange(T, device=q.device)[:, None] - torch.arange(T, device=q.device)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=(back >= 0) & (back <= window))
    return y.transpose(1, 2)


def get_kernel(repository):
    """FlashAttention-3 from the Hub; where it cannot be had, its one call from torch's parts."""
    try:
        import kernels

        found = kernels.get_kernel(repository)
        print("attention: FlashAttention-3 as it asks for", flush=True)
        return found
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        print(f"attention: SDPA and FlexAttention for {repository} ({reason})", flush=True)
    window = MAX_SEQ_LEN // 2
    if DEVICE.type == "cuda":
        BLOCKS[window] = create_block_mask(
            lambda b, h, query, key: (query >= key) & (query - key <= window),
            None, None, MAX_SEQ_LEN, MAX_SEQ_LEN, DEVICE,
        )  # fmt: skip
    call = types.SimpleNamespace(flash_attn_func=attention)
    return types.SimpleNamespace(flash_attn_interface=call)


def rms_norm(x, shape):
    """In the number format that it is given, as its version of torch has it under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, shape)


class Tokenizer:
    @classmethod
    def from_directory(cls):
        return cls()

    def get_vocab_size(self):
        return SCALE.vocab_size


def make_dataloader(tokenizer, batch_size, length, split):
    """Endless (x, y, epoch) on the device, in the order in which ours has the rows."""
    rows = contest.train_rows(SCALE)
    for epoch in itertools.count(1):
        order = np.random.default_rng([contest.run_seed(), epoch - 1]).permutation(len(rows))
        for first in range(0, len(rows) - batch_size + 1, batch_size):
            batch = torch.from_numpy(rows[order[first : first + batch_size]].astype(np.int64))
            if DEVICE.type == "cuda":
                batch = batch.pin_memory().to(DEVICE, non_blocking=True)
            yield batch[:, :-1].contiguous(), batch[:, 1:].contiguous(), epoch


@torch.no_grad()
def evaluate_bpb(model, tokenizer, batch_size):
    """Our val_bpb of its model, which answers tokens with logits."""
    torch.compiler.set_stance("force_eager")
    torch.set_num_threads(os.cpu_count() or 1)
    folder = contest.rows_folder(SCALE)[0]
    return contest.evaluate(lambda tokens: model(tokens.to(DEVICE)), folder, "val", SCALE)
