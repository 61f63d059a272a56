"""Text to rows, once: files or ClimbMix, a tokenizer, packed splits, and the hashes of it all.

    python prepare.py --corpus ~/notes   # which calls ensure_rows

Nothing here runs while train.py is trained.
"""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import py_compile
import random
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import prepare
from prepare import CLIMBMIX, FORMAT, HIDDEN_SHARD, VAL_SHARD, Scale, SetupError, write_atomic

if TYPE_CHECKING:  # heavy: imported where used
    import numpy as np
    import tiktoken

HELD_OUT_SHARE = 0.25  # of a local corpus: the pool that val and hidden are filled from
TOKENIZER_CHARS = 250_000_000  # of training text that the BPE sees, at most
DOCUMENT_CHARS = 5_000  # a longer text file is cut at a line end: splits are by document
PACK_SLACK = 64  # rows' worth of tokens that best-fit packing chooses from

# ---------------------------------------------------------------------------
# Corpus: files to documents
# ---------------------------------------------------------------------------


def corpus_files(corpus: str | None) -> list[Path]:
    """The files of `--corpus PATH` but hidden ones; else the standard library's own source."""
    root, pattern, left_out = Path(sysconfig.get_paths()["stdlib"]), "*.py", {"site-packages"}
    if corpus:
        root, pattern = Path(corpus).expanduser().resolve(), "*"
        if not root.exists():
            raise SetupError(f"--corpus {corpus}: no such file or folder", f"ls {root.parent}")
    else:
        left_out |= {"dist-packages", "test", "tests", "idlelib", "idle_test", "pydoc_data"}
    files = [root] if root.is_file() else sorted(p for p in root.rglob(pattern) if p.is_file())
    parts = {path: path.relative_to(root).parts for path in files}
    return [p for p, names in parts.items() if not any(n in left_out or n[0] == "." for n in names)]


def load_text(source: str, files: str) -> Iterator[str]:
    """Column `text` of Parquet or JSONL `files`, streamed by Hugging Face `datasets`.

    `source` is a repository of the Hub or a folder that holds the files, or a builder ("json",
    "parquet") for a path.
    """
    import datasets

    for row in datasets.load_dataset(source, data_files=files, split="train", streaming=True):
        if not isinstance(row.get("text"), str):
            raise SetupError(f"{files}: no text in a column `text`", f"rename one of {sorted(row)}")
        yield row["text"]


def climbmix_shard(index: int) -> Iterator[str]:
    """Documents of one ClimbMix shard. Raises SetupError with its name if it cannot be had."""
    file, hint = f"shard_{index:05d}.parquet", "python prepare.py  # goes on"
    try:
        yield from load_text(CLIMBMIX, file)
    except (OSError, RuntimeError, ValueError) as error:
        raise SetupError(f"{CLIMBMIX} {file}: {error}", hint) from error


def read_documents(path: Path) -> Iterator[str]:
    """Documents of a local file: rows of a JSONL or Parquet file, stretches of a text file."""
    raw, stretch = path.read_bytes(), ""
    builder = {".jsonl": "json", ".parquet": "parquet"}.get(path.suffix.lower())
    if builder and raw.strip():
        try:
            yield from load_text(builder, str(path))
        except (RuntimeError, ValueError) as error:
            said = " ".join(str(error).split())[:200]
            raise SetupError(f"{path} cannot be read: {said}", f"head -c 300 {path}") from error
        return
    if b"\0" in raw[:8192]:  # a picture, an archive, a program
        return
    for line in raw.decode("utf-8", errors="replace").splitlines(keepends=True):
        stretch += line
        if len(stretch) > DOCUMENT_CHARS:
            yield stretch
            stretch = ""
    yield stretch


def local_documents(files: list[Path]) -> tuple[list[str], list[str]]:
    """(held-out pool, training documents) in a fixed random order; equal texts count once."""
    texts = (text for path in files for text in read_documents(path) if text.strip())
    documents = list(dict.fromkeys(texts))
    random.Random(FORMAT).shuffle(documents)
    share = HELD_OUT_SHARE * sum(map(len, documents))
    pool = sum(size <= share for size in itertools.accumulate(map(len, documents)))
    return documents[:pool], documents[pool:]


# ---------------------------------------------------------------------------
# Documents to rows
# ---------------------------------------------------------------------------


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> bytes:
    """A byte-pair encoding as JSON: its pattern and vocab_size - 1 tokens; the last id is BOS."""
    import rustbpe

    def first_chars(left: int) -> Iterator[str]:
        for text in documents:
            yield text
            left -= len(text)
            if left <= 0:
                return

    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(first_chars(TOKENIZER_CHARS), vocab_size - 1)
    tokens = [base64.b64encode(bytes(token)).decode() for token, _ in bpe.get_mergeable_ranks()]
    return json.dumps({"pattern": bpe.get_pattern(), "tokens": tokens}).encode()


def encode(
    tokenizer: tiktoken.Encoding, documents: Iterable[str], batch: int
) -> Iterator[list[int]]:
    """Tokens of each document, without BOS; no more than `batch` documents are taken ahead."""
    documents = iter(documents)
    while texts := list(itertools.islice(documents, batch)):
        yield from tokenizer.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)


def pack(documents: Iterable[list[int]], capacity: int, bos: int) -> Iterator[np.ndarray]:
    """Best-fit packing of documents, (n,) tokens, into full rows (capacity,) that start with BOS.

    Every document starts with BOS; a longer one is cut into pieces that start with BOS too. The
    longest piece that fits goes next; where none fits, the shortest is cropped to fill the row.
    """
    import numpy as np

    pieces: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # waiting, by length
    lengths = 0  # bit n is set while a piece of n tokens waits
    waiting = 0  # tokens

    def take_row() -> np.ndarray:
        nonlocal lengths, waiting
        row, filled = np.empty(capacity, np.uint16), 0
        while filled < capacity:
            room = capacity - filled
            fitting = lengths & ((2 << room) - 1)
            length = (fitting or lengths & -lengths).bit_length() - 1
            piece = pieces[length].pop()
            lengths ^= 0 if pieces[length] else 1 << length
            waiting -= length
            row[filled : filled + length] = piece[:room]
            filled += length
        return row

    for tokens in documents:
        for start in range(0, len(tokens), capacity - 1):
            piece = np.array([bos, *tokens[start : start + capacity - 1]], np.uint16)
            pieces[len(piece)].append(piece)
            lengths |= 1 << len(piece)
            waiting += len(piece)
        while waiting >= PACK_SLACK * capacity:
            yield take_row()
    while waiting >= capacity:
        yield take_row()


def write_rows(
    scale: Scale, folder: Path, source: str, train: Iterable[str], parts: dict[str, Iterator[str]]
) -> None:
    """Write tokenizer, rows and, last of all, manifest: a folder with a manifest is complete.

    A part (split or shard) whose file is there is done. Raises SetupError for too little text.
    """
    from rich.console import Console
    from rich.progress import track

    def bar(items: Iterable[Any], name: str, total: int | None = None) -> Iterable[Any]:
        return track(items, f"{name:12}", total=total, console=Console(stderr=True))

    def require(enough: bool, found: str) -> None:
        if not enough:
            need = f"{2 * 4 * scale.eval_tokens / HELD_OUT_SHARE / 1e6:.0f} MB of text or more"
            hint = f"python agent.py --corpus PATH  # {need}"
            raise SetupError(f"{source}: too little text, {found}", hint)

    if not (folder / "tokenizer.json").exists():
        learned = train_tokenizer(bar(train, "tokenizer"), scale.vocab_size)
        write_atomic(folder / "tokenizer.json", [learned])
    tokenizer, bytes_of = prepare.load_tokenizer(folder)
    require(len(bytes_of) == scale.vocab_size, f"{len(bytes_of)} of {scale.vocab_size} tokens")
    for name, documents in parts.items():
        if (folder / f"{name}.bin").exists():
            continue
        wanted = None if name.startswith("train") else scale.eval_tokens // scale.sequence_len
        tokens = encode(tokenizer, documents, batch=1 if wanted else 256)
        rows = itertools.islice(pack(tokens, scale.sequence_len + 1, scale.vocab_size - 1), wanted)
        packed = [row.tobytes() for row in bar(rows, name, wanted)]
        require(len(packed) >= (wanted or 1), f"{len(packed)} of {wanted or 1} rows for {name}")
        write_atomic(folder / f"{name}.bin", packed)
    shards = [folder / f"{name}.bin" for name in parts if name.startswith("train-")]
    if shards:
        write_atomic(folder / "train.bin", (shard.read_bytes() for shard in shards))
    splits = ("train", "val", "hidden")
    rows = {split: len(prepare.load_rows(folder, split, scale.sequence_len)) for split in splits}
    hashed = ("tokenizer.json", *(f"{split}.bin" for split in splits))
    manifest = {
        "format": FORMAT,
        "source": source,
        "tokens": {split: count * scale.sequence_len for split, count in rows.items()},
        "sha256": {name: prepare.file_hash(folder / name) for name in hashed},
    }
    write_atomic(folder / "manifest.json", [json.dumps(manifest, indent=1).encode()])
    for shard in shards:
        shard.unlink()


def write_library(folder: Path) -> None:
    """The standard library as bytecode without docstrings, and where its source lies.

    Where the library's source is the corpus, train.py must not be able to read its held-out part:
    it runs on this instead, and the warden hides the folders that sources.json lists.
    """
    root, part = Path(sysconfig.get_paths()["stdlib"]), folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH  # there is no source to check
    for path in corpus_files(None):
        to = (part / path.relative_to(root)).with_suffix(".pyc")
        try:
            py_compile.compile(str(path), str(to), doraise=True, optimize=2,
                               invalidation_mode=unchecked)
        except (py_compile.PyCompileError, ValueError):  # a template, say
            continue
    sources = {str(root.resolve())}
    for start in (sys.base_prefix, sys.prefix, "/usr"):  # other programs bring their own Python
        for top, folders, files in os.walk(start):
            if {"argparse.py", "tokenize.py"} <= set(files):
                sources.add(str(Path(top).resolve()))
                folders.clear()
    write_atomic(part / "sources.json", [json.dumps(sorted(sources)).encode()])
    os.replace(part, folder)


def ensure_rows(scale: Scale, corpus: str | None) -> Path:
    """Return the folder of the rows: prepared if they are missing, then checked by their hashes.

    Of several processes that find rows missing one prepares them, and the others wait for it.
    """
    corpus = corpus or os.environ.get("AUTORESEARCH_CORPUS")
    folder, source = prepare.rows_folder(scale, corpus)
    with_library = not corpus and scale.corpus == "stdlib"
    wanted = ("manifest.json", "library") if with_library else ("manifest.json",)
    if not all((folder / name).exists() for name in wanted):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                print("waiting for another process that prepares the same rows", file=sys.stderr)
                fcntl.flock(lock, fcntl.LOCK_EX)
            prepare_missing(scale, corpus, folder, source, with_library)
    prepare.check_rows(folder, ("train.bin", *prepare.SCORED))
    return folder


def prepare_missing(
    scale: Scale, corpus: str | None, folder: Path, source: str, with_library: bool
) -> None:
    """Make what is missing of the rows and of the library. The caller holds the folder's lock."""
    if not (folder / "manifest.json").exists():
        if corpus or scale.corpus == "stdlib":
            for leftover in folder.iterdir():  # val's documents are known in one go only
                leftover.unlink()
            pool, train = local_documents(corpus_files(corpus))
            held_out = iter(pool)  # what val and hidden leave of it trains
            parts = {"val": held_out, "hidden": held_out, "train": itertools.chain(train, held_out)}
        else:
            shards = range(scale.shards)
            train = itertools.chain.from_iterable(map(climbmix_shard, shards))
            parts = {"val": climbmix_shard(VAL_SHARD), "hidden": climbmix_shard(HIDDEN_SHARD)}
            parts |= {f"train-{index:05d}": climbmix_shard(index) for index in shards}
        write_rows(scale, folder, source, train, parts)
    if with_library and not (folder / "library").exists():
        write_library(folder / "library")
