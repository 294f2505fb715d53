"""Measure rows per second from a file to encoded samples on one core: dist_sft beside two recipes.

    python benchmarks/encode_speed.py DATA.json [--tokenizer FOLDER] [--rounds 5]

All three render rows in the same words, encode prompt and answer apart, mask the prompt and write
the result to disk; that they give the same number of tokens is checked. The two recipes start from
rows in memory, dist_sft from the file, which it also hashes. Without `--tokenizer` a byte-level BPE
is trained on the data. The ratio is that of processor time: on a machine with other work it is
steadier than that of time on the clock, which the table shows, too.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import datasets
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dist_sft.chat import Encoder, load_template
from dist_sft.encoding import build_or_open
from dist_sft.sources import open_source

Row = dict[str, str]


class Seconds(NamedTuple):
    """How long something took."""

    processor: float
    clock: float


def train_tokenizer(rows: list[Row]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of 8,000 entries on the rows."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text for row in rows for text in row.values()), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")


def render(row: Row) -> tuple[str, str]:
    """Return prompt and answer in the words of the human-assistant template."""
    instruction = f"{row['instruction']}\n{row.get('input') or ''}".strip()
    return f"Human: {instruction}\n\nAssistant: ", row["output"]


def map_per_sample(tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, folder: Path) -> int:
    """Encode as the common recipe does: `Dataset.map`, one row at a time. Return the tokens."""

    def encode(row: Row) -> dict[str, list[int]]:
        prompt, answer = render(row)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        answer_ids = [*answer_ids, tokenizer.eos_token_id]
        ids = prompt_ids + answer_ids
        labels = [-100] * len(prompt_ids) + answer_ids
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    return count(rows.map(encode, **map_options(rows, folder)))


def map_batched(tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, folder: Path) -> int:
    """Encode with `Dataset.map(batched=True)`, two tokenizer calls a batch. Return the tokens."""

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = [
            render(dict(zip(batch, row, strict=True))) for row in zip(*batch.values(), strict=True)
        ]
        prompts, answers = (
            tokenizer(list(part), add_special_tokens=False)["input_ids"]
            for part in zip(*texts, strict=True)
        )
        answers = [[*ids, tokenizer.eos_token_id] for ids in answers]
        pairs = list(zip(prompts, answers, strict=True))
        ids = [prompt + answer for prompt, answer in pairs]
        labels = [[-100] * len(prompt) + answer for prompt, answer in pairs]
        return {"input_ids": ids, "attention_mask": [[1] * len(i) for i in ids], "labels": labels}

    return count(rows.map(encode, batched=True, **map_options(rows, folder)))


def map_options(rows: datasets.Dataset, folder: Path) -> dict[str, Any]:
    """Write to a fresh file, as a first run does."""
    return {
        "remove_columns": rows.column_names,
        "cache_file_name": str(folder / "encoded.arrow"),
        "load_from_cache_file": False,
    }


def count(encoded: datasets.Dataset) -> int:
    """Return the number of tokens."""
    ids = encoded.with_format("arrow")["input_ids"]
    return sum(len(chunk.flatten()) for chunk in ids[:].chunks)


def build_store(encoder: Encoder, data: Path, folder: Path) -> int:
    """Encode with dist_sft. Return the tokens."""
    return build_or_open(open_source(str(data)), encoder, folder, name="data").meta.tokens


def main() -> None:
    """Run all of them in turn, `--rounds` times, and print medians."""
    parser = argparse.ArgumentParser(description="Measure encoding speed on one core.")
    parser.add_argument("data", type=Path, help="a JSON array of instruction/input/output rows")
    parser.add_argument("--tokenizer", help="folder or hub name; by default one is trained")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

    rows = json.loads(options.data.read_text(encoding="utf-8"))
    if options.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    else:
        tokenizer = train_tokenizer(rows)
    encoder = Encoder(load_template("human-assistant", tokenizer), tokenizer)
    table = datasets.Dataset.from_list(rows)
    datasets.disable_progress_bars()
    contestants: dict[str, Callable[[Path], int]] = {
        "map per sample": lambda folder: map_per_sample(tokenizer, table, folder),
        "map batched": lambda folder: map_batched(tokenizer, table, folder),
        "dist_sft": lambda folder: build_store(encoder, options.data, folder),
    }

    seconds: dict[str, list[Seconds]] = {name: [] for name in contestants}
    tokens = set()
    for _ in range(options.rounds):
        for name, contestant in contestants.items():
            with tempfile.TemporaryDirectory() as folder:
                start = Seconds(time.process_time(), time.perf_counter())
                tokens.add(contestant(Path(folder)))
                end = Seconds(time.process_time(), time.perf_counter())
                seconds[name].append(
                    Seconds(end.processor - start.processor, end.clock - start.clock)
                )
    assert len(tokens) == 1, f"the contestants made different numbers of tokens: {tokens}"

    report = Table(title=f"{len(rows)} rows, {tokens.pop()} tokens, one core, medians")
    for column in ("", "rows / CPU s", "of per-sample map", "rows / s"):
        report.add_column(column, justify="right")
    rates = {
        name: [len(rows) / median(column) for column in zip(*spent, strict=True)]
        for name, spent in seconds.items()
    }
    reference = rates["map per sample"][0]
    for name, (processor, clock) in rates.items():
        report.add_row(name, f"{processor:,.0f}", f"{processor / reference:.2f}x", f"{clock:,.0f}")
    Console().print(report)


if __name__ == "__main__":
    main()
