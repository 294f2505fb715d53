"""One rank of `test_examiner.py`: train cells twice, the second time asking in between.

python examined.py JOB.json OUT.json: see `cells.py` for the job, which has `prompts` (ids) and
`max_new_tokens`, too. Rank 0 writes each cell's losses without and with questions, and the answers.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from cells import DEVICE, Run, own_state

from dist_sft.asking import Prompts
from dist_sft.examiner import LOOKS_EVERY, Examiner
from dist_sft.step import agree_on_step

STEPS = 4
STOPS_AT = LOOKS_EVERY + 1  # the token before which the last rank wants to stop


def train(job: SimpleNamespace, cell: SimpleNamespace, *, asking: bool) -> dict[str, Any]:
    run = Run(job, cell)
    examiner = Examiner(
        Prompts(job.prompts, [""] * len(job.prompts)),
        SimpleNamespace(stop_ids=job.stop_ids),
        lambda ids: " ".join(map(str, ids)),
        run.stock,
        job.max_new_tokens,
        batch_tokens=job.batch_tokens,
    )
    attention = run.engine.module.config._attn_implementation
    beats: list[str] = []
    asked: list[list[list[int]] | None] = []

    def ask(stops_at: int | None = None) -> None:
        beats.clear()

        def stopping() -> bool:
            mine = len(beats) == stops_at and dist.get_rank() == dist.get_world_size() - 1
            return agree_on_step([], DEVICE, stopping=mine).stopping

        answers = examiner.examine(run.engine, DEVICE, stopping, beats.append)
        asked.append(answers and [answer.ids for answer in answers])
        assert run.engine.module.training
        assert run.engine.module.config._attn_implementation == attention
        assert set(beats) == {"evaluation"}
        assert stops_at is None or len(beats) == stops_at

    losses = []
    for number in range(1, STEPS + 1):
        if asking:
            ask()
            ask(STOPS_AT)
        losses += [run.gradient(number)[0], run.update(number)]
    if asking:
        ask()
    losses.append(run.evaluate())
    run.engine.close()
    return {"losses": losses, "answers": asked}


def main() -> None:
    job = SimpleNamespace(**json.loads(Path(sys.argv[1]).read_text()))
    results = []
    for cell in job.cells:
        both = []
        for asking in (False, True):
            with own_state():
                both.append(train(job, SimpleNamespace(**cell), asking=asking))
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, both[1]["answers"])
        assert all(answers == everyone[0] for answers in everyone)
        results.append(both)
        print(cell, both, flush=True)
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
