"""Train with `transformers.Trainer`: the plain recipe, and the same with `batch_rebalance`.

Started by `train_speed.py`. Writes one line per optimizer step, with the names dist_sft uses, to
RUN_DIR/metrics.jsonl. AdamW, constant learning rate, clip 1.0.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import torch
from alpaca import tokenize
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import BatchRebalanceSampler

from dist_sft.metrics import peak_memory_bytes

IGNORE = -100

Row = dict[str, str]


def main() -> None:
    """Train the rows once, in the batches in which the file lists them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="JSON list of Alpaca rows, in training order")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--max-length", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--accumulation", type=int, required=True)
    parser.add_argument("--sampling", choices=["sequential", "batch_rebalance"], required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = json.loads(options.rows.read_text(encoding="utf-8"))
    if options.sampling == "batch_rebalance":
        rows = in_the_order_of_batch_rebalance(rows)
    columns = list(rows[0])
    data = Dataset.from_list(rows).map(
        lambda row: to_features(row, tokenizer, options.max_length), remove_columns=columns
    )
    trainer = MeasuredTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
        args=TrainingArguments(
            output_dir=str(options.run_dir),
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=options.accumulation,
            num_train_epochs=1,
            learning_rate=options.lr,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            weight_decay=0.0,
            bf16=options.dtype == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            train_sampling_strategy=options.sampling,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    trainer.add_callback(WriteSteps(trainer, options.run_dir / "metrics.jsonl"))
    trainer.train()


def in_the_order_of_batch_rebalance(rows: list[Row]) -> list[Row]:
    """Place the rows so that the sampler's own shuffle draws them in the order given."""
    sampler = BatchRebalanceSampler([1] * len(rows), len(rows), dp_size=1, grad_accum=1)
    generator = torch.Generator().manual_seed(sampler.seed + sampler.epoch)
    placed = list(rows)
    for row, place in zip(rows, torch.randperm(len(rows), generator=generator), strict=True):
        placed[place] = row
    return placed


def to_features(
    row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list[int]]:
    """Return the model's inputs for one row, with the prompt masked."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ids, prompt_length = tokenize(row, encode, tokenizer.eos_token_id, max_length)
    labels = [IGNORE] * prompt_length + ids[prompt_length:]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


class MeasuredTrainer(Trainer):
    """Count the tokens that go through the model. Nothing else differs from `Trainer`."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.counts: Counter[str] = Counter()

    def training_step(
        self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], *rest: object
    ) -> torch.Tensor:
        """Count one micro-batch and train on it."""
        self.counts["tokens"] += int(inputs["attention_mask"].sum())
        self.counts["supervised_tokens"] += int((inputs["labels"][:, 1:] != IGNORE).sum())
        self.counts["computed_tokens"] += inputs["input_ids"].numel()
        return super().training_step(model, inputs, *rest)


class WriteSteps(TrainerCallback):
    """Append a line for each optimizer step; its seconds run from the end of the step before."""

    def __init__(self, trainer: MeasuredTrainer, path: Path) -> None:
        self.trainer = trainer
        self.path = path
        self.ended = self.seconds = 0.0

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        """Start the clock."""
        self.ended = time.perf_counter()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        """Stop the clock of this step and start that of the next."""
        now = time.perf_counter()
        self.seconds, self.ended = now - self.ended, now

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: object,
    ) -> None:
        """Write the step's line once its loss is known."""
        if "loss" not in logs:  # the summary at the end of training
            return
        counts = self.trainer.counts
        line = {
            "step": state.global_step,
            "loss": logs["loss"],
            "seconds": self.seconds,
            "peak_memory_bytes": peak_memory_bytes(self.trainer.args.device),
            **counts,
        }
        counts.clear()
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
