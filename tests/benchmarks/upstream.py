"""karpathy/autoresearch's train.py and ours, in turn, on the same rows, seeds, budget and score.

python tests/benchmarks/upstream.py PATH                        # 3 pairs at this machine's scale
python tests/benchmarks/upstream.py PATH --pairs 5 --budget 60
python tests/benchmarks/upstream.py PATH --depth 8 --width 512  # both of one size and batch

PATH is a checkout of it, or a file like its train.py, of which a changed copy runs: `prepare` is
upstream_prepare.py beside this file, the seed is ours. Its timer stays its own: on a GPU its first
11 steps are free, compiling among them. Its attention kernels are fetched; where they cannot be,
torch's stand in for them, which the output says. On a CPU it has our scale's size, runs in float32,
is not compiled, as ours is not, and gets CPU seconds without free steps.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import prepare  # noqa: E402
import pretokenize  # noqa: E402

SIZES = ("DEPTH", "ASPECT_RATIO", "HEAD_DIM", "TOTAL_BATCH_SIZE", "DEVICE_BATCH_SIZE")
COMPARED = ("val_bpb", "tokens_s", "num_steps", "peak_vram_mb")
FREE_STEPS = 11
# What ours takes over from its file on a GPU where both are to be of one size.
LIKE_ITS = {
    "TOTAL_BATCH_SIZE": 2**19,
    "DEVICE_BATCH_SIZE": 128,
    "WINDOW_PATTERN": '"SSSL"',
    "SHORT_WINDOW_DIVISOR": 2,
}
# (pattern, replacement) in its text; each must be found.
ALWAYS = (
    (r"^from kernels import get_kernel$", "from prepare import get_kernel, rms_norm"),
    (r"\bF\.rms_norm\(", "rms_norm("),
    (r"\bmanual_seed\(\d+\)", "manual_seed(SEED)"),
)
ON_A_CPU = (
    (r"^import time$", "from prepare import time"),
    (r'"cuda"', '"cpu"'),
    (r"\btorch\.bfloat16\b", "torch.float32"),
    (r"\bstep > 10\b", "step >= 0"),
)


def with_constants(source: str, values: dict[str, int | str]) -> str:
    """`source` with other values of constants at its top level. Raises SetupError without one."""
    for name, value in values.items():
        source, found = re.subn(rf"^{name} = [^#\n]*", f"{name} = {value}  ", source, flags=re.M)
        if found != 1:
            raise prepare.SetupError(f"{name} is set {found} times", f"grep -n {name} train.py")
    return source


def adapted(source: str, seed: int, on_cpu: bool) -> str:
    """Its train.py for our rows. Raises SetupError if it is not the file that is known here."""
    for pattern, replacement in ALWAYS + (ON_A_CPU if on_cpu else ()):
        replacement = replacement.replace("SEED", str(seed))
        source, found = re.subn(pattern, replacement, source, flags=re.M)
        if not found:
            raise prepare.SetupError(f"its train.py has no {pattern}", "git log -3 -- train.py")
    return source.replace(".bfloat16()", ".float()") if on_cpu else source


def constants(source: str, scale: str) -> dict[str, int]:
    """The sizes that our train.py has at a scale."""
    found = {name: re.search(rf'^{name} = .*"{scale}": (\d+)', source, re.M) for name in SIZES}
    return {name: int(match[1]) for name, match in found.items() if match}


def run(source: str, scale: prepare.Scale, seed: int, rival: bool) -> dict[str, float]:
    """The summary block of one run by hand; `rival` for the other project's file."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "train.py").write_text(source, encoding="utf-8")
        environment = os.environ | {"OURS": str(ROOT), "AUTORESEARCH_SCALE": scale.name}
        environment["AUTORESEARCH_SEED"] = str(seed)
        if rival:
            text = (ROOT / "tests/benchmarks/upstream_prepare.py").read_text(encoding="utf-8")
            (Path(folder) / "prepare.py").write_text(text, encoding="utf-8")
        else:
            places = [str(ROOT), os.environ.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
        command = [sys.executable, "train.py"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    for line in re.findall("^attention: .*$", done.stdout, re.M):
        print(f"  {line}", flush=True)
    if "---\n" not in done.stdout:
        print(done.stdout[-2000:] + done.stderr[-4000:], file=sys.stderr)
        raise SystemExit(f"error: {'its' if rival else 'our'} train.py failed")
    block = done.stdout.rpartition("---\n")[2]
    row = {key: float(value) for key, value in re.findall(r"^(\w+): +([\d.]+)$", block, re.M)}
    tokens = row["total_tokens_M"] * 1e6
    if rival:  # it rounds them, and does not time all of them
        base, _, power = re.search(r"^TOTAL_BATCH_SIZE = ([\d*]+)", source, re.M)[1].partition("**")
        free = FREE_STEPS if scale.name != "cpu" else 0
        tokens = (row["num_steps"] - free) * int(base) ** int(power or 1)
    row["tokens_s"] = tokens / row["training_seconds"]
    return row


def show(name: str, row: dict[str, float]) -> None:
    print(
        f"  {name:9} val_bpb {row['val_bpb']:.6f}  {row['tokens_s']:11,.0f} tokens/s"
        f"  {row['num_steps']:6.0f} steps  peak {row['peak_vram_mb']:8,.0f} MB"
        f"  {row['num_params_M']:6.1f} M parameters  {row['training_seconds']:.1f} s"
        f" ({row['total_seconds']:.0f} s in all)",
        flush=True,
    )


def main() -> None:
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("path", type=Path, help="a checkout of karpathy/autoresearch")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--budget", help="seconds of training, default the scale's")
    parser.add_argument("--depth", type=int, help="layers of both, with --width")
    parser.add_argument("--width", type=int, help="of both, with --depth")
    args = parser.parse_args()
    if bool(args.depth) != bool(args.width):
        parser.error("--depth and --width go together: one follows from the other, and not alike")
    if args.budget:
        os.environ["AUTORESEARCH_BUDGET"] = args.budget
    scale = prepare.current_scale()
    on_cpu = scale.name == "cpu"
    path = args.path / "train.py" if args.path.is_dir() else args.path
    theirs = path.read_text(encoding="utf-8")
    ours = (ROOT / "train.py").read_text(encoding="utf-8")
    pretokenize.ensure_rows(scale, None)
    sizes = constants(ours, scale.name) if on_cpu else {}
    if args.depth:
        sizes |= {"DEPTH": args.depth, "ASPECT_RATIO": -(-args.width // args.depth)}
    theirs = with_constants(theirs, sizes)
    ours = with_constants(ours, sizes | (LIKE_ITS if args.depth and not on_cpu else {}))
    print(f"scale {scale.name}, {scale.budget:g} s each, sizes {sizes or 'as they are'}")
    ratios = []
    for seed in range(args.pairs):
        print(f"pair {seed + 1}, seed {seed}", flush=True)
        first = run(adapted(theirs, seed, on_cpu), scale, seed, rival=True)
        show("upstream", first)
        second = run(ours, scale, seed, rival=False)
        show("ours", second)
        ratio = {key: second[key] / first[key] for key in COMPARED}
        ratios.append(ratio["val_bpb"])
        words = "  ".join(f"{key} {value:.4f}" for key, value in ratio.items())
        print(f"  ours / upstream: {words}", flush=True)
    print(f"val_bpb, mean of the ratios: {sum(ratios) / len(ratios):.4f}")


if __name__ == "__main__":
    main()
