"""prepare.py: corpora to rows, the clock, the metric, both transports."""

import dataclasses
import json
import math
import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import prepare
import pretokenize
from prepare import Crash, Scale, SetupError
from support.checkout import TOY, sh

SMALL = Scale("small", "stdlib", 512, 32, "tokens", 4096, 8192, 0, 0.01)


@pytest.fixture(scope="module")
def files():
    """Text to prepare: 64 files of the standard library, which takes a second to look through."""
    return pretokenize.corpus_files(None)[:64]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, files):
    """(corpus with all kinds of files, cache with its rows, their folder): not to be altered."""
    corpus, cache = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("cache")
    for index, path in enumerate(files[:60]):
        (corpus / f"{index}.txt").write_bytes(path.read_bytes())
    rows = [json.dumps({"text": f"json document {n} " * 40}) for n in range(200)]
    (corpus / "more.jsonl").write_text("\n".join(rows))
    (corpus / "picture.png").write_bytes(b"\x89PNG\0\0" * 100)
    (corpus / ".hidden").write_text("secret")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTORESEARCH_CACHE", str(cache))
        return corpus, cache, pretokenize.ensure_rows(SMALL, str(corpus))


@pytest.fixture
def folder(prepared):
    """The prepared rows, to be read only."""
    return prepared[2]


@pytest.fixture
def own(prepared, tmp_path, monkeypatch):
    """(the corpus as an argument, a folder of its rows that a test may alter)."""
    corpus, cache, folder = prepared
    shutil.copytree(cache, tmp_path / "cache")
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    return str(corpus), tmp_path / "cache" / folder.name


def rows_of(folder, split):
    return np.array(prepare.load_rows(folder, split, SMALL.sequence_len))


def texts_of(folder, split):
    tokenizer, _ = prepare.load_tokenizer(folder)
    bos = SMALL.vocab_size - 1
    return [
        "".join(tokenizer.decode([t for t in row if t != bos]))
        for row in rows_of(folder, split).tolist()
    ]


def test_rows_are_full_start_with_bos_and_splits_share_no_document(folder):
    seen = {}
    for split in ("train", "val", "hidden"):
        rows = rows_of(folder, split)
        assert (rows[:, 0] == SMALL.vocab_size - 1).all() and rows.max() < SMALL.vocab_size
        seen[split] = {row.tobytes() for row in rows}
    assert len(rows_of(folder, "val")) == len(rows_of(folder, "hidden")) == 8192 // 32
    full = {split: {r for r in rows if r.count(b"\xff\x01") < 2} for split, rows in seen.items()}
    assert len(full["val"] & full["train"]) < 0.02 * len(
        full["val"]
    )  # licences repeat, documents do not
    assert not any("PNG" in text or "secret" in text for text in texts_of(folder, "train"))


def test_packing_loses_almost_nothing_and_every_document_starts_with_bos():
    generator = np.random.default_rng(0)
    documents = [
        generator.integers(0, 500, n).astype(np.uint16) for n in generator.integers(1, 300, 500)
    ]
    rows = np.stack(list(pretokenize.pack(documents, 65, 511)))
    pieces = sum(math.ceil(len(d) / 64) for d in documents)
    tokens = sum(map(len, documents)) + pieces
    assert (rows[:, 0] == 511).all() and 0.97 * tokens < rows.size <= tokens
    assert (rows == 511).sum() <= pieces


def test_preparation_is_repeatable_and_interrupted_it_leaves_nothing_complete(own, monkeypatch):
    corpus, folder = own
    first = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(
            prepare.os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            pretokenize.ensure_rows(SMALL, corpus)
    assert not (folder / "manifest.json").exists() and not (folder / "train.bin").exists()
    assert pretokenize.ensure_rows(SMALL, corpus) == folder
    assert (folder / "manifest.json").read_bytes() == first


def test_altered_rows_are_noticed(own):
    corpus, folder = own
    assert pretokenize.ensure_rows(SMALL, corpus) == folder
    data = bytearray((folder / "val.bin").read_bytes())
    data[100] ^= 1
    (folder / "val.bin").write_bytes(data)
    with pytest.raises(SetupError, match="val.bin"):
        pretokenize.ensure_rows(SMALL, corpus)


def test_climbmix_shards_come_through_datasets_and_a_missing_one_is_named(
    tmp_path, monkeypatch, files
):
    """Real Parquet shards, served from a folder by the code that reads the Hub."""
    import pyarrow
    import pyarrow.parquet

    texts = [path.read_text(errors="replace") for path in files[:40]]
    for number, index in enumerate((0, 1, prepare.HIDDEN_SHARD, prepare.VAL_SHARD)):
        table = pyarrow.table({"text": texts[number * 10 : number * 10 + 10]})
        pyarrow.parquet.write_table(
            table, tmp_path / f"shard_{index:05d}.parquet", row_group_size=4
        )
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pretokenize, "CLIMBMIX", str(tmp_path))
    scale = dataclasses.replace(SMALL, corpus="climbmix", shards=3)
    with pytest.raises(SetupError, match="shard_00002.parquet"):
        pretokenize.ensure_rows(scale, None)
    folder = prepare.rows_folder(scale)[0]
    assert not (folder / "manifest.json").exists()
    scale = dataclasses.replace(scale, shards=2)
    folder = pretokenize.ensure_rows(scale, None)
    for split, shard in (("train", texts[:20]), ("hidden", texts[20:30]), ("val", texts[30:])):
        found = [text in "\0".join(shard) for text in texts_of(folder, split)]
        assert sum(found) > 0.5 * len(found), split  # the others are packed of several pieces
    assert sorted(p.name for p in folder.iterdir()) == [
        "hidden.bin",
        "manifest.json",
        "tokenizer.json",
        "train.bin",
        "val.bin",
    ]


def test_interrupted_climbmix_goes_on_with_the_first_missing_shard(tmp_path, monkeypatch, files):
    read = []

    def shard(index):
        read.append(index)
        if index == 1 and len(read) < 6:
            raise SetupError("shard_00001.parquet: gone", "again")
        of_shard = files[index % 7 * 8 :][:8]
        yield from (path.read_text(errors="replace") for path in of_shard)

    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    monkeypatch.setattr(pretokenize, "climbmix_shard", shard)
    monkeypatch.setattr(pretokenize, "TOKENIZER_CHARS", 50_000)
    scale = dataclasses.replace(SMALL, corpus="climbmix", shards=2)
    with pytest.raises(SetupError):
        pretokenize.ensure_rows(scale, None)
    assert read == [0, prepare.VAL_SHARD, prepare.HIDDEN_SHARD, 0, 1]
    pretokenize.ensure_rows(scale, None)
    assert read[5:] == [1]


def test_column_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(SetupError, match="column `text`"):
        pretokenize.ensure_rows(SMALL, str(tmp_path / "a.jsonl"))


def test_evaluate_agrees_with_a_naive_oracle(folder):
    """Summed over single tokens in float64, BOS left out."""
    torch.manual_seed(0)
    table = torch.randn(512, 512)
    rows, (_, bytes_of) = rows_of(folder, "val").astype(np.int64), prepare.load_tokenizer(folder)
    nats = total = 0.0
    for row in rows:
        log_probs = F.log_softmax(table[row[:-1]].double(), dim=-1)
        for position, target in enumerate(row[1:]):
            if bytes_of[target]:
                nats -= log_probs[position, target].item()
                total += bytes_of[target]
    got = prepare.evaluate(lambda tokens: table[tokens], folder, "val", SMALL)
    assert got == pytest.approx(nats / math.log(2) / total, abs=1e-6)
    shifted = prepare.evaluate(lambda tokens: table[tokens] + 100, folder, "val", SMALL)
    assert shifted == pytest.approx(got, abs=1e-4)


def test_uniform_logits_score_the_bits_of_the_vocabulary(folder):
    bytes_of = np.array(prepare.load_tokenizer(folder)[1])
    targets = bytes_of[rows_of(folder, "val")[:, 1:]]
    expected = math.log2(512) * (targets > 0).sum() / targets.sum()
    got = prepare.evaluate(lambda x: torch.zeros(*x.shape, 512), folder, "val", SMALL)
    assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "answer",
    [lambda x: torch.full((*x.shape, 512), math.nan), lambda x: torch.zeros(*x.shape, 511)],
)
def test_logits_that_are_none_are_a_crash(folder, answer):
    with pytest.raises(Crash):
        prepare.evaluate(answer, folder, "val", SMALL)


def test_batches_serve_the_budget_in_tokens_and_repeat_with_the_seed(folder, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_ROWS", str(folder))
    monkeypatch.setattr(prepare, "current_scale", lambda: SMALL)

    def served(seed):
        monkeypatch.setenv("AUTORESEARCH_SEED", str(seed))
        monkeypatch.setattr(prepare, "SPENT", prepare.Spent())
        return list(prepare.batches(16, torch.device("cpu")))

    first, again, other = served(1), served(1), served(2)
    assert len(first) == 4096 // (16 * 32)
    assert [progress for _, _, progress in first] == [n / 8 for n in range(8)]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    x, y, _ = first[0]
    assert torch.equal(x[:, 1:], y[:, :-1])
    with pytest.raises(ValueError, match="batch_size 0"):
        next(prepare.batches(0, torch.device("cpu")))


def test_draws_tell_who_drew_the_same_numbers_before_the_first_batch(folder, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_ROWS", str(folder))
    monkeypatch.setattr(prepare, "current_scale", lambda: SMALL)

    def draws(seed, *shapes):
        monkeypatch.setattr(prepare, "SPENT", prepare.Spent())
        torch.manual_seed(seed)
        for shape in shapes:
            torch.nn.Linear(*shape)
        for _ in prepare.batches(16, torch.device("cpu")):
            torch.rand(3)  # dropout, say
        return prepare.SPENT.draws

    assert draws(1, (4, 8), (8, 2)) == draws(1, (4, 8), (8, 2)) > 0
    assert len({draws(1, (4, 8)), draws(2, (4, 8)), draws(1, (4, 9)), draws(1)}) == 4


def test_cpu_clock_stops_after_its_seconds_of_work_not_of_waiting(folder, monkeypatch):
    scale = dataclasses.replace(SMALL, clock="cpu", budget=0.9)
    now = SimpleNamespace(worked=5.0, passed=100.0)
    clock = SimpleNamespace(process_time=lambda: now.worked, monotonic=lambda: now.passed)
    monkeypatch.setenv("AUTORESEARCH_ROWS", str(folder))
    monkeypatch.setattr(prepare, "current_scale", lambda: scale)
    monkeypatch.setattr(prepare, "SPENT", prepare.Spent(looked=math.inf))  # at no other process
    monkeypatch.setattr(prepare, "time", clock)
    served = []
    for _, _, progress in prepare.batches(4, torch.device("cpu")):
        served.append(progress)
        now.worked, now.passed = now.worked + 0.25, now.passed + 3.0
    assert served == pytest.approx([0.0, 0.25 / 0.9, 0.5 / 0.9, 0.75 / 0.9])
    assert prepare.SPENT.seconds == pytest.approx(1.0)
    assert prepare.SPENT.wall_seconds == pytest.approx(12.0)


def test_cpu_clock_counts_what_this_process_and_those_that_it_waited_for_have_worked(monkeypatch):
    """Measured from outside and from within, it lies between the two, however long that takes."""
    monkeypatch.setattr(prepare, "SPENT", prepare.Spent(looked=math.inf))  # at no other process
    own = prepare.time.process_time
    outer = own()
    started = prepare.cpu_seconds()
    inner = own()
    sum(range(300_000))
    least = own() - inner
    counted = prepare.cpu_seconds() - started
    assert 0 < least <= counted <= own() - outer + 1e-6
    work = "import time\nwhile time.process_time() < 0.3: pass"
    started = prepare.cpu_seconds()
    assert sh(sys.executable, "-c", work, cwd="/").returncode == 0
    assert prepare.cpu_seconds() - started > 0.28  # it is told in ticks of 10 ms


def test_by_hand_and_under_the_referee_a_model_scores_the_same(checkout):
    """`python train.py` prints what the referee writes, to 1e-6."""
    by_hand = sh(sys.executable, "prepare.py", cwd=checkout.folder, env=checkout.env)
    rows = json.loads(by_hand.stdout)["rows"]
    by_hand = sh(sys.executable, "train.py", cwd=checkout.folder, env=checkout.env)
    folder = checkout.folder / "runs"
    folder.mkdir()
    (folder / "train.py").write_text(TOY)
    environment = checkout.env | {"AUTORESEARCH_ROWS": rows}
    command = [sys.executable, "referee.py", folder, "--seed", "0"]
    read, write = os.pipe()
    done = sh(*command, cwd=checkout.folder, env=environment, stdin=read)
    os.close(write)
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "result.json").read_text())
    assert f"val_bpb:          {result['val_bpb']:.6f}" in by_hand.stdout
    assert prepare.summary(result) in (folder / "run.log").read_text()
    assert result["draws"] > 0
    assert not list(folder.glob("work-*"))
