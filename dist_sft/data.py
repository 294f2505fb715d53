"""From a recipe's sources to encoded data sets and their plan: encode once, then only read.

Nothing here imports torch: `batches` turns samples into tensors.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dist_sft.chat import Encoder
from dist_sft.config import Data, Source
from dist_sft.digests import sha256
from dist_sft.encoding import build_or_open
from dist_sft.once import make_once
from dist_sft.paths import cache_folder
from dist_sft.plan import Plan
from dist_sft.sources import open_source
from dist_sft.store import Dataset, Store, StoreMeta, split_fraction
from dist_sft.tokenizer import Words, vocabulary_size

Say = Callable[[str], None]


@dataclass(frozen=True)
class Stores:
    """Where the encoded sources are; what one process of a node tells the others."""

    train: list[tuple[str, str]]
    """(source name, store folder)"""
    eval: list[tuple[str, str]]
    vocab_size: int


def on_this_node(path: Path, name: str, say: Say) -> Path:
    """Copy a store to the node's own disk, where DIST_SFT_SCRATCH names a folder on it.

    Every byte of the copy is compared with what was written; one that is there already is used.
    Where there is no room for it, the store itself is.
    """
    scratch = os.environ.get("DIST_SFT_SCRATCH")
    if not scratch:
        return path

    def copy(folder: Path) -> None:
        shutil.copytree(path, folder, dirs_exist_ok=True)

    def load() -> Path:
        return Store.open(near, name=name, digest=sha256).path

    near = Path(scratch) / path.name
    Path(scratch).mkdir(parents=True, exist_ok=True)
    needed, free = sum(p.stat().st_size for p in path.iterdir()), shutil.disk_usage(scratch).free
    if needed > free and not near.exists():
        say(
            f"DIST_SFT_SCRATCH={scratch}: {name} needs {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free: it is read from {path}"
        )
        return path
    return make_once(near, make=copy, load=load, what=f"the copy of {name} in {scratch}", say=say)


def make_encoder(data: Data, words: Words) -> Encoder:
    """Return what turns this recipe's rows into samples."""
    return Encoder(
        words.template,
        words.tokenizer,
        max_length=data.max_length,
        overlong=data.overlong,
        learn=data.learn,
    )


def prepare(
    data: Data, words: Words, say: Say, progress: Callable[[int], None] = lambda rows: None
) -> Stores:
    """Encode every source that is not encoded yet; one process per node calls this."""
    encoder = make_encoder(data, words)

    def build(sources: tuple[Source, ...], kind: str) -> list[tuple[str, str]]:
        built = []
        for number, source in enumerate(sources):
            store = build_or_open(
                open_source(source.path, split=source.split, key=f"data.{kind}.{number}"),
                encoder,
                cache_folder(data.cache_dir),
                name=source.label,
                row_format=source.format,
                on_bad_row=data.on_bad_row,
                progress=progress,
                say=say,
            )
            say(f"{kind} {describe(store.meta, source.label)}")
            built.append((source.label, str(on_this_node(store.path, source.label, say))))
        return built

    with _tokenizer_threads():
        train, evals = build(data.train, "train"), build(data.eval, "eval")
    return Stores(train, evals, vocabulary_size(words.tokenizer))


@contextmanager
def _tokenizer_threads() -> Iterator[None]:
    """Let the tokenizer use a thread per core for a while, or RAYON_NUM_THREADS of them.

    Ranks start with them turned off, but while one encodes, the others of its node only wait. The
    Rust library looks at the variable in every call. Its threads stay, asleep, which matters to a
    fork alone: a child would wait for threads that it does not have. Nothing forks in here, and
    afterwards the variable says "false" again to ranks and their children; where it was not set,
    the library itself turns its threads off in a child.
    """
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def describe(meta: StoreMeta, name: str) -> str:
    """Return one line on what became of a source's rows."""
    lost = {reason: count for reason, count in meta.dropped.items() if count}
    lost |= {reason: bad.count for reason, bad in meta.bad_rows.items()}
    parts = [
        f"{name}: {meta.samples:,} of {meta.rows:,} rows",
        f"{meta.tokens:,} tokens, {meta.learned_tokens / max(1, meta.tokens):.0%} learned",
    ]
    if meta.truncated:
        parts.append(f"{meta.truncated:,} cut to data.max_length")
    if lost:
        parts.append("left out: " + ", ".join(f"{n:,} {reason}" for reason, n in lost.items()))
    if meta.duplicates:
        parts.append(f"duplicates: {meta.duplicates:,}")
    return "; ".join(parts)


def open_datasets(stores: Stores, data: Data, seed: int) -> tuple[Dataset, dict[str, Dataset]]:
    """Open what `prepare` encoded: the training set and the evaluation sets by name."""

    def opened(places: list[tuple[str, str]]) -> list[Store]:
        return [Store.open(Path(folder), name=name) for name, folder in places]

    train = Dataset(opened(stores.train))
    if data.eval_fraction:
        kept, held_out = split_fraction(train.content_hashes, data.eval_fraction, seed)
        return train.select(kept), {"held_out": train.select(held_out)}
    return train, {store.name: Dataset([store]) for store in opened(stores.eval)}


def fingerprint(train: Dataset, evals: dict[str, Dataset]) -> str:
    """Return what names the content of all data sets of a run."""
    return " ".join([train.fingerprint, *(f"{name}:{x.fingerprint}" for name, x in evals.items())])


def make_plan(dataset: Dataset, data: Data, seed: int, batch_size: int) -> Plan:
    """Return which samples make up every step."""
    weights = tuple(source.weight for source in data.train)
    return Plan(dataset.rows_per_source, weights, seed, batch_size)


def total_steps(plan: Plan, epochs: float | None, steps: int | None) -> int:
    """Return how many steps a run has: `train.steps`, or `train.epochs` (1 if neither is set)."""
    if steps is not None:
        return steps
    return max(1, round((1.0 if epochs is None else epochs) * plan.steps_per_epoch))
