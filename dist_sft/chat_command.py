"""`dist-sft chat MODEL`: ask a model in a terminal, or through a pipe, in the words of training."""

from __future__ import annotations

import argparse
import contextlib
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dist_sft.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from dist_sft.chat import Encoder, Turn
    from dist_sft.decode import Answer
    from dist_sft.generate_recipe import Generate
    from dist_sft.sampling import Sampling
    from dist_sft.weights import Located

COMMANDS = "/reset begins anew, /exit or Ctrl-D ends, Ctrl-C ends an answer"
SAMPLING: dict[str, tuple[Callable[[str], Any], str]] = {
    "temperature": (float, "0, the default, takes the most probable token; above, they are drawn"),
    "top_p": (float, "draw from the fewest tokens that have this probability together"),
    "top_k": (int, "draw from so many of the most probable tokens"),
    "repetition_penalty": (float, "above 1: what was said becomes less probable"),
    "max_new_tokens": (int, "longest answer, in tokens; default: 256"),
}
"""Settings that are those of a recipe's `generate`."""
INTERRUPTED = 130  # as shells have it


def add(commands: Any) -> None:
    """Add the command."""
    command: argparse.ArgumentParser = commands.add_parser(
        "chat",
        help="talk to a model",
        description="Talk to a training run (its newest good checkpoint), to one checkpoint, a "
        "model folder or a hub name. Questions come from standard input, one a line; answers go "
        "to standard output as they are made, everything else to standard error.",
    )
    command.add_argument("model", metavar="MODEL", help="RUN_DIR, a checkpoint, a folder, a name")
    command.add_argument("--step", metavar="N|best", help="of a run; default: the newest good one")
    command.add_argument(
        "--template",
        help="default: the one that the model was trained with, else its tokenizer's own",
    )
    command.add_argument("--system", metavar="TEXT", help="what the model is told at the start")
    for name, (kind, words) in SAMPLING.items():
        command.add_argument(_option(name), type=kind, metavar="X", help=words)
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of draws; default: 0")
    command.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="default: bfloat16 on GPU, float32 on CPU",
    )
    command.add_argument(
        "--prepack-weights",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on CPU: a copy of the weights that is faster; default: yes",
    )
    command.add_argument(
        "--verify",
        default="sha256",
        choices=["sha256", "size"],
        help="what of a checkpoint is compared with its manifest; default: sha256",
    )
    command.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="take a checkpoint that belongs to somebody else, or that others may write",
    )
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that is in the model"
    )
    command.set_defaults(run=_chat)


def _chat(options: argparse.Namespace) -> int:
    settings = _checked(options)
    step: Any = options.step or "newest"
    if step not in ("newest", "best"):
        if not step.isdecimal():
            raise UserError(f"--step: got {step}; allowed: best, or the step of a checkpoint")
        step = int(step)
    try:
        model = _load(options, step)
        from dist_sft.sampling import Sampling

        sampling = Sampling(**settings.model_dump(include=set(SAMPLING)), seed=options.seed)
        chat = Chat(model, sampling, options.system)
        chat.run()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        sys.stdout = None  # or Python flushes it once more at its end
        return 0
    return 1 if chat.unasked and not chat.in_terminal else 0


def _checked(options: argparse.Namespace) -> Generate:
    """Check the options as the same settings of a recipe are checked; raises UserError."""
    from pydantic import ValidationError

    from dist_sft.generate_recipe import Generate
    from dist_sft.recipe_errors import explain

    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed: got {options.seed}; allowed: 0 to 2**63 - 1")
    given = {name: getattr(options, name) for name in SAMPLING}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        return Generate.model_validate(given)
    except ValidationError as error:
        lines = explain(error, Generate, given)
    said = "\n".join(line.removeprefix("recipe: ") for line in lines)
    for name in SAMPLING:
        said = said.replace(name, _option(name))
    raise UserError(said)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


class Model(NamedTuple):
    """What answers."""

    weights: PreTrainedModel
    encoder: Encoder
    text_of: Callable[[list[int]], str]
    window: int | None
    """Tokens that it takes, prompt and answer together; None for any number."""


def _load(options: argparse.Namespace, step: Any) -> Model:
    """Load everything; raises UserError for what cannot answer in this template."""
    import torch
    from transformers.utils import logging

    from dist_sft import weights
    from dist_sft.chat import Encoder
    from dist_sft.generate_recipe import GenerateModel
    from dist_sft.model import positions, resolve_dtype
    from dist_sft.paths import cache_folder
    from dist_sft.tokenizer import load_words, vocabulary_size

    logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype(options.dtype, device)
    trusting = options.trust_remote_code
    located = weights.locate(
        options.model,
        step,
        verify=options.verify,
        trusting=options.trust_checkpoint,
        memo=cache_folder(None) / "digests",
        say=_say,
        key="MODEL",
        step_key="--step",
    )
    name = options.template or located.template or "tokenizer"
    place = GenerateModel(path=str(located.words), trust_remote_code=trusting)
    words = load_words(place, name, "--template")
    encoder = Encoder(words.template, words.tokenizer)
    tokens = vocabulary_size(words.tokenizer)
    weights.check_vocabulary(located, tokens, words.new_tokens, name, "--template")
    weights.check_words(located, encoder, _say, "--template")

    def text_of(ids: list[int]) -> str:
        return str(words.tokenizer.decode(ids, skip_special_tokens=False))

    with _scratch(located, dtype) as scratch:
        folder = weights.ready(located, scratch / "weights", dtype, _say)
        model = weights.load(
            folder, dtype, device, name=options.model, trust_remote_code=trusting,
            prepacked=options.prepack_weights,
        )  # fmt: skip
    # The converted files have no names any more; for as long as they are mapped, they are there.
    _say(f"{located.folder}: template {name}, {dtype} on {device.type}")
    return Model(model, encoder, text_of, positions(model.config.get_text_config()))


@contextlib.contextmanager
def _scratch(located: Located, dtype: torch.dtype) -> Iterator[Path]:
    """Make a folder while a model is loaded. Raises UserError where weights find no room."""
    shapes = located.facts.get("shapes", {})
    needed = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    with tempfile.TemporaryDirectory(prefix="dist_sft-") as folder:
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"{located.folder} is converted first, and its {needed / 1e9:.1f} GB find no room "
                f"in {tempfile.gettempdir()} ({free / 1e9:.1f} GB are free): set TMPDIR to another "
                "folder"
            )
        yield Path(folder)


class Chat:
    """One conversation after the other, until there is nothing more to read."""

    def __init__(self, model: Model, sampling: Sampling, system: str | None) -> None:
        self._model, self._sampling, self._system = model, sampling, system
        self.in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self.unasked = 0
        """Questions that were not put to the model."""
        self._turns: list[Turn] = []
        self._answers = 0

    def run(self) -> None:
        """Answer what is read from standard input."""
        if self.in_terminal:
            import readline  # noqa: F401  with it, input() is a line that can be edited

            _say(COMMANDS)
        self._reset()
        while (line := self._read()) is not None:
            words = line.strip()
            if words == "/exit":
                break
            if words == "/reset":
                self._reset()
            elif words.startswith("/") and " " not in words:
                _say(f"there is no {words}: {COMMANDS}")
            elif words:
                self._ask(line)

    def _reset(self) -> None:
        from dist_sft.chat import Turn

        self._turns = [Turn("system", self._system)] if self._system else []

    def _read(self) -> str | None:
        """Return the next line, None at the end of the input."""
        if not self.in_terminal:
            line = sys.stdin.readline()
            return line.rstrip("\n") if line else None
        while True:
            try:
                return input("> ")
            except KeyboardInterrupt:
                _say(f"\n{COMMANDS}")
            except EOFError:
                print()
                return None

    def _ask(self, question: str) -> None:
        """Print the answer to a question; both become part of the conversation."""
        from dist_sft.chat import BadRow, Conversation, Turn
        from dist_sft.decode import Decoder, Request

        turns = [*self._turns, Turn("user", question)]
        try:
            prompt = self._model.encoder.prompt(Conversation(tuple(turns)))
        except BadRow as problem:
            self._refuse(str(problem))
            return
        room = self._sampling.max_new_tokens
        if self._model.window is not None:
            room = min(room, self._model.window - len(prompt))
        if room < 1:
            self._refuse(
                f"the conversation has {len(prompt)} tokens with this question, and the model "
                f"takes {self._model.window}, answers included; /reset begins anew"
            )
            return
        sampling = replace(self._sampling, max_new_tokens=room)
        ends = self._model.encoder.stop_ids
        decoder = Decoder(self._model.weights, ends, sampling, self._model.text_of)
        said, answer = self._print(decoder.stream(Request(prompt, row=self._answers)))
        self._answers += 1
        self._turns = [*turns, Turn("assistant", answer.text if answer else said)]
        if answer is None:
            _say("(interrupted)")
        elif answer.reason == "error":
            _say("(the model's numbers are not finite)")
        elif answer.reason == "length" and room < self._sampling.max_new_tokens:
            _say(f"(the {self._model.window} tokens that the model takes are full)")
        elif answer.reason == "length":
            _say(f"(cut at --max-new-tokens {room})")

    def _refuse(self, why: str) -> None:
        """Say that a question is not put to the model; through a pipe its answer is empty."""
        self.unasked += 1
        _say(f"not asked: {why}")
        if not self.in_terminal:
            print(flush=True)

    def _print(self, stream: Generator[str, None, Answer]) -> tuple[str, Answer | None]:
        """Print an answer as it comes; return what was printed, and the answer unless cut short."""
        from dist_sft.console import printable

        said, answer = "", None
        try:
            while True:
                piece = next(stream)
                print(printable(piece, "\n\t") if self.in_terminal else piece, end="", flush=True)
                said += piece
        except StopIteration as end:
            answer = end.value
        except KeyboardInterrupt:
            if not self.in_terminal:
                raise
        print(flush=True)
        return said, answer


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
