"""What recipes are made of: checked numbers, frozen sections, what every job has."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

# Strict: `epochs: true` is a slip of the pen and not the number 1.
Positive = Annotated[int, Field(ge=1, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]
PositiveNumber = Annotated[float, Field(gt=0.0, strict=True, allow_inf_nan=False)]
Number = Annotated[float, Field(ge=0.0, strict=True, allow_inf_nan=False)]
Fraction = Annotated[Number, Field(lt=1.0)]


def _from_home(path: str) -> str:
    return os.path.expanduser(path) if path == "~" or path.startswith("~/") else path


# Only shells know what `~` means, and they leave it alone in YAML and behind `run_dir=`.
PathText = Annotated[str, AfterValidator(_from_home)]


class Section(BaseModel):
    """Hold settings that are declared once: typed, documented, frozen, unknown keys forbidden."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class RowSource(Section):
    """One place that rows come from."""

    path: PathText
    """JSON, JSONL, CSV or Parquet file, a folder of `Dataset.save_to_disk`, or a hub name."""
    split: str = "train"
    """Split of a hub data set or saved DatasetDict."""
    format: Literal["auto", "alpaca", "messages", "sharegpt", "prompt_completion"] = "auto"
    """How a row is laid out; auto looks at the columns."""


class Watchdog(Section):
    """When a run counts as hung: its ranks are ended, with their stacks in the logs."""

    seconds: Annotated[float, Field(gt=0)] | None = 1800.0
    """Seconds without progress within a step or an evaluation, or as a stopped process anywhere;
    null: never."""
    slow_seconds: Annotated[float, Field(gt=0)] | None = 7200.0
    """The same while a model is loaded, saved or exported, and what a stop may take. Before that,
    while a model is fetched and data are encoded, there is no limit."""


class Job(Section):
    """What the recipe of every job has."""

    job: str
    """What the recipe is for; the launcher's word decides."""
    run_dir: PathText
    """Folder of the run: config, logs and what the job makes. The same folder again continues."""
    seed: Annotated[Count, Field(lt=2**63)] = 0
    """Seed of whatever is random."""
    threads_per_worker: Literal["auto"] | Positive = "auto"
    """CPU threads per worker; auto is 1 on CPU (threads change the last bits) and a fair share
    of the cores on GPU; there on Ray the CPUs of --resources-per-worker."""
    deterministic: bool = False
    """On GPU: bit-identical repeats, slower. On CPU runs are bit-identical anyway."""

    def to_json(self) -> str:
        """Return the resolved recipe as the text of `config.json`."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"

    def fingerprint(self) -> str:
        """Return a SHA-256 over everything but the run folder's place."""
        text = json.dumps(self.model_dump(mode="json", exclude={"run_dir"}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
