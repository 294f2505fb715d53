"""Compare the speed of dist_sft's decoding with what transformers offers, on the same prompts.

    python benchmarks/generate_speed.py --rows alpaca_en.json
    python benchmarks/generate_speed.py --rows alpaca_en.json --only dist_sft "pipeline, batch 32"

Contestants: `pipeline("text-generation")` with one prompt at a time and with batches of 8 and 32 in
file order; `generate_batch`, transformers' continuous batching, with as much memory for keys and
values as `dist_sft` has; `dist_sft` itself. All answer the same prompts greedily with the same
weights, dtype and number of threads. Each runs in a process of its own, one after the other, round
after round. Loading and a warm-up of two short answers are not in the rates; `dist_sft` loads as
its `generate` does, which on CPU lays weights out anew.

Columns, medians over the rounds: output tokens/s, end tokens included; how many times dist_sft is
as fast in the same round; the same for tokens per second of processor time, which is the steadier
number on a machine with other work if there is one thread (two wait for each other, and waiting
counts); seconds to load; peak resident memory while it answers (on a GPU: peak allocated memory);
by how much that is above what was in use before the first prompt; how many answers are those of
`pipeline, one by one`, token by token (float32 rounds otherwise in other shapes; in bfloat16 few
stay).
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

PAGE = 256  # tokens, generate_batch's default
OURS, REFERENCE = "dist_sft", "pipeline, one by one"

Answers = list[list[int]]


def by_pipeline(batch_size: int) -> Callable[..., Answers]:
    """Return a contestant: the usual way."""

    def answer(model: Any, tokenizer: Any, texts: list[str], ids: Answers, options: Any) -> Answers:
        from transformers import pipeline

        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
        said = pipe(
            texts,
            batch_size=batch_size,
            max_new_tokens=options.max_new_tokens,
            do_sample=False,
            return_tensors=True,
        )
        answers = []
        for number, (output,) in enumerate(said):
            first = number - number % batch_size
            padded = max(len(prompt) for prompt in ids[first : first + batch_size])
            answers.append(up_to_end(output["generated_token_ids"][padded:], tokenizer))
        return answers

    return answer


def by_generate_batch(
    model: Any, tokenizer: Any, texts: list[str], ids: Answers, options: Any
) -> Answers:
    """Answer by transformers' continuous batching."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    outputs = model.generate_batch(
        inputs=ids,
        generation_config=GenerationConfig(
            max_new_tokens=options.max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=options.batch_tokens // PAGE,
            max_batch_tokens=options.generate_batch_tokens,
        ),
    )
    # Their names are req_0, req_1, ... in the order of the prompts.
    in_order = sorted(outputs.values(), key=lambda output: int(output.request_id.split("_")[-1]))
    assert len(in_order) == len(ids), "a request is lost"
    return [up_to_end(output.generated_tokens, tokenizer) for output in in_order]


def by_dist_sft(
    model: Any, tokenizer: Any, texts: list[str], ids: Answers, options: Any
) -> Answers:
    """Answer by our own loop."""
    from dist_sft.decode import Decoder, Request
    from dist_sft.sampling import Sampling

    end = tokenizer.eos_token_id
    decoder = Decoder(model, [end], Sampling(options.max_new_tokens), tokenizer.decode)
    requests = [Request(prompt, row) for row, prompt in enumerate(ids)]
    answers = decoder.answer(requests, options.batch_tokens)
    return [[*x.ids, end] if x.reason == "eos" else x.ids for x in answers]


CONTESTANTS: dict[str, Callable[..., Answers]] = {
    REFERENCE: by_pipeline(1),
    "pipeline, batch 8": by_pipeline(8),
    "pipeline, batch 32": by_pipeline(32),
    "generate_batch": by_generate_batch,
    OURS: by_dist_sft,
}


def up_to_end(ids: list[int], tokenizer: Any) -> list[int]:
    """Leave out padding behind the end token."""
    end = tokenizer.eos_token_id
    return ids[: ids.index(end) + 1] if end in ids else ids


def measure(options: argparse.Namespace) -> None:
    """Run one contestant in this process; write what it did."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from dist_sft import weights

    logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    texts = prompts(options)
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)
    began = time.perf_counter()
    if options.measure == OURS:
        model = weights.load(Path(options.model), dtype, torch.device(device))
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(device).eval()
    loading = time.perf_counter() - began
    ids: Answers = [tokenizer(text).input_ids for text in texts]
    answer = CONTESTANTS[options.measure]
    short = argparse.Namespace(**vars(options) | {"max_new_tokens": 3})
    answer(model, tokenizer, texts[:2], ids[:2], short)
    before = memory(device, forget_peak=True)
    began, worked = time.perf_counter(), time.process_time()
    answers = answer(model, tokenizer, texts, ids, options)
    seconds, processor = time.perf_counter() - began, time.process_time() - worked
    found = {
        "answers": answers,
        "seconds": seconds,
        "loading": loading,
        "processor": processor,
        "peak": memory(device),
        "growth": memory(device) - before,
        "prompt_tokens": sum(map(len, ids)),
    }
    options.out.write_text(json.dumps(found))


def memory(device: str, *, forget_peak: bool = False) -> int:
    """Return the most bytes that were in use, of the GPU's or resident ones of this process."""
    if device == "cuda":
        import torch

        if forget_peak:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if forget_peak:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def prompts(options: argparse.Namespace) -> list[str]:
    """Return the prompts, in the words of the template human-assistant."""
    rows = json.loads(options.rows.read_text())[: options.prompts]
    return [f"Human: {x['instruction']}\n{x['input']}".strip() + "\n\nAssistant: " for x in rows]


def command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=Path, required=True, help="a JSON file of Alpaca rows")
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-tokens", type=int, default=8192, help="keys and values in memory")
    parser.add_argument(
        "--generate-batch-tokens", type=int, default=512, help="generate_batch's max_batch_tokens"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument(
        "--prefix", default="", help="stands before each process's command: 'taskset -c 0,1'"
    )
    parser.add_argument("--measure", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def run(options: argparse.Namespace, contestant: str, out: Path) -> dict[str, Any]:
    """Measure one contestant in a fresh process."""
    command = [sys.executable, *sys.argv, "--measure", contestant, "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(
        [*shlex.split(options.prefix), *command],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    if done.returncode:
        sys.exit(f"{contestant} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    found: dict[str, Any] = json.loads(out.read_text())
    tokens = sum(map(len, found["answers"]))
    found["rate"], found["per_work"] = tokens / found["seconds"], tokens / found["processor"]
    return found


def table(rounds: list[dict[str, dict[str, Any]]], options: argparse.Namespace) -> Table:
    first = rounds[0]
    prompt_tokens = next(iter(first.values()))["prompt_tokens"]
    title = (
        f"{options.prompts} prompts ({prompt_tokens} tokens), {options.max_new_tokens} new tokens "
        f"at most, {options.dtype}, {options.threads} threads, medians over {len(rounds)} rounds"
    )
    result = Table(title=title, box=box.MARKDOWN)
    result.add_column("contestant", no_wrap=True)
    for name in (
        "tokens/s",
        "x",
        "per CPU s",
        "x",
        "load s",
        "peak MB",
        "growth MB",
        "same answers",
    ):
        result.add_column(name, justify="right")
    for name in first:
        runs = [found[name] for found in rounds]
        speeds = []
        for key in ("rate", "per_work"):
            ratios = [x[OURS][key] / x[name][key] for x in rounds if OURS in x]
            speeds += [f"{median(x[key] for x in runs):.1f}", f"{median(ratios or [0]):.2f}"]
        same = "-"
        if REFERENCE in first:
            pairs = zip(runs[0]["answers"], first[REFERENCE]["answers"], strict=True)
            same = f"{sum(a == b for a, b in pairs)}/{len(runs[0]['answers'])}"
        result.add_row(
            name,
            *speeds,
            f"{median(x['loading'] for x in runs):.1f}",
            *(f"{median(x[key] for x in runs) / 1e6:.0f}" for key in ("peak", "growth")),
            same,
        )
    return result


def main() -> None:
    options = command_line()
    if options.measure:
        return measure(options)
    rounds: list[dict[str, dict[str, Any]]] = []
    console = Console(width=100)
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(options.rounds):
            rounds.append({})
            for name in options.only:
                rounds[-1][name] = run(options, name, Path(scratch) / "out.json")
                console.print(f"round {number + 1}: {name} {rounds[-1][name]['rate']:.1f} tokens/s")
    console.print(table(rounds, options))


if __name__ == "__main__":
    main()
