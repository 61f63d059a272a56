"""train.py at the cpu scale: speed, score, memory, and the same model with plain AdamW.

python tests/benchmarks/muon.py               # 60 CPU seconds a run, one seed
python tests/benchmarks/muon.py --seeds 6     # and the spread over seeds
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# The same model without Muon. "matrices": AdamW steps what Muon stepped, the tuned rates of all
# other groups stay. "plain": one AdamW, one learning rate for every parameter; the n-gram tables,
# whose gradients are sparse, get SparseAdam at that rate.
WITHOUT_MUON = {
    "matrices": """
    adamw = torch.optim.AdamW(model.blocks.parameters(), lr=LR, betas=(0.9, 0.95), fused=True)
    optimizers = [adamw, *with_muon(model)[1:]]
""",
    "plain": """
    dense = [p for name, p in model.named_parameters() if not name.startswith("ngrams")]
    adamw = torch.optim.AdamW(dense, lr=LR, betas=(0.9, 0.95), fused=True)
    optimizers = [adamw, torch.optim.SparseAdam(list(model.ngrams.parameters()), lr=LR)]
""",
}
VARIANT = """
with_muon = build_optimizers


def build_optimizers(model):{body}
    for group in [*adamw.param_groups, *optimizers[1].param_groups]:
        group.setdefault("full_lr", group["lr"])
    return optimizers


if __name__ == "__main__":
"""


def run(source: str, seed: int, budget: str) -> dict[str, float]:
    """The summary block of one run by hand."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "train.py").write_text(source, encoding="utf-8")
        environment = os.environ | {
            "AUTORESEARCH_SCALE": "cpu",
            "AUTORESEARCH_SEED": str(seed),
            "AUTORESEARCH_BUDGET": budget,
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "train.py"]
        done = subprocess.run(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
        )
    return {
        key: float(value) for key, value in re.findall(r"^(\w+): +([\d.]+)$", done.stdout, re.M)
    }


def main() -> None:
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--budget", default="60", help="CPU seconds")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    environment = os.environ | {"AUTORESEARCH_SCALE": "cpu"}
    prepare = [sys.executable, str(ROOT / "prepare.py")]
    subprocess.run(prepare, env=environment, check=True, stdout=subprocess.DEVNULL)
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    rows = []
    for seed in range(args.seeds):
        rows.append(row := run(source, seed, args.budget))
        speed = row["total_tokens_M"] * 1e6 / row["training_seconds"]
        print(
            f"seed {seed}: val_bpb {row['val_bpb']:.6f}, {speed:,.0f} tokens per CPU second, "
            f"{row['num_steps']:.0f} steps, peak {row['peak_vram_mb']:.0f} MB, "
            f"{row['total_seconds']:.0f} s in all",
            flush=True,
        )
    scores = [row["val_bpb"] for row in rows]
    if len(scores) > 1:
        print(f"mean {statistics.fmean(scores):.6f}, sigma {statistics.stdev(scores):.6f}")
    for kind, body in WITHOUT_MUON.items():
        others = []
        for lr in (0.004, 0.008, 0.016, 0.032):
            text = VARIANT.format(body=body.replace("LR", str(lr)))
            variant = source.replace('if __name__ == "__main__":\n', text)
            others.append(run(variant, 0, args.budget)["val_bpb"])
            print(f"AdamW, {kind}, at {lr}: val_bpb {others[-1]:.6f}", flush=True)
        gain = 100 * (1 - scores[0] / min(others))
        print(
            f"Muon is {gain:.1f} % below the best AdamW ({kind}), seed 0, {args.budget} CPU s each"
        )


if __name__ == "__main__":
    main()
