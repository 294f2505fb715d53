"""`dist-sft chat`: conversations through a pipe and in a terminal, in the words of training."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_weights import write_checkpoint
from tiny_models import tiny_model
from tiny_tokenizers import byte_level, pad_is_eos

from dist_sft import cli, manifest
from dist_sft.chat import Conversation, Encoder, Turn, load_template
from dist_sft.console import printable
from dist_sft.decode import Decoder, Request
from dist_sft.sampling import Sampling

ROOT = Path(__file__).parents[1]
WINDOW = 256
SECONDS = 120
Talk = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run that was trained with the template alpaca."""
    run = tmp_path_factory.mktemp("chat") / "run"
    encoder = encoder_of("alpaca")
    facts = {"prompt_words": encoder.prompt_fingerprint, "template": "alpaca"}
    write_checkpoint(run, 5, tiny_model("llama", vocab_size=400), **facts)
    (run / "launch.json").write_text("{}")
    (run / "config.json").write_text(json.dumps({"data": {"template": "alpaca"}}))
    return run


def encoder_of(template: str) -> Encoder:
    tokenizer = pad_is_eos()
    return Encoder(load_template(template, tokenizer), tokenizer)


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Run the command within this process; return its exit code and what it printed."""

    def talk(model: Path, *options: str, said: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(said))
        capsys.readouterr()
        code = cli.main(["chat", str(model), *options])
        out, err = capsys.readouterr()
        return code, out, err

    return talk


def expected(turns: list[str], template: str = "alpaca", system: str = "", **how: Any) -> list[str]:
    """Answer the same turns without the command."""
    model, encoder = tiny_model("llama", vocab_size=400), encoder_of(template)
    text_of = partial(pad_is_eos().decode, skip_special_tokens=False)
    decoder = Decoder(model, encoder.stop_ids, Sampling(**{"max_new_tokens": 8, **how}), text_of)
    said: list[Turn] = [Turn("system", system)] if system else []
    answers = []
    for number, turn in enumerate(turns):
        said.append(Turn("user", turn))
        prompt = encoder.prompt(Conversation(tuple(said)))
        (answer,) = decoder.answer([Request(prompt, row=number)], 1)
        said.append(Turn("assistant", answer.text))
        answers.append(answer.text)
    return answers


def test_a_conversation_is_remembered(run_dir: Path, talk: Talk) -> None:
    code, out, err = talk(run_dir, "--max-new-tokens", "8", said="Name it.\n\nAgain!\n")
    first, second = expected(["Name it.", "Again!"])
    assert (code, out) == (0, f"{first}\n{second}\n")
    assert second != expected(["Again!"])[0]
    folder = manifest.folder_of(run_dir, 5)
    assert err.splitlines() == [
        f"MODEL: the checkpoint of step 5 of {run_dir} is taken",
        f"converting {folder} to torch.float32",
        f"{folder}: template alpaca, torch.float32 on cpu",
        "(cut at --max-new-tokens 8)",
        "(cut at --max-new-tokens 8)",
    ]


def test_reset_and_exit(run_dir: Path, talk: Talk) -> None:
    said = "Name it.\n/reset\nAgain!\n/foo\n/exit\nnever read\n"
    code, out, err = talk(run_dir, "--max-new-tokens", "8", said=said)
    assert (code, out) == (
        0,
        "".join(f"{expected([turn])[0]}\n" for turn in ("Name it.", "Again!")),
    )
    assert "there is no /foo: /reset begins anew, /exit or Ctrl-D ends" in err


def test_what_is_drawn_follows_from_seed_and_turn(run_dir: Path, talk: Talk) -> None:
    how = {"temperature": 1.5, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1, "seed": 3}
    options = [f"--{key.replace('_', '-')}={value}" for key, value in how.items()]
    options += ["--max-new-tokens=8", "--system", "Be brief."]
    out = talk(run_dir, *options, said="Name it.\nAgain!\n")[1]
    answers = expected(["Name it.", "Again!"], system="Be brief.", **how)
    assert out == "".join(f"{answer}\n" for answer in answers)
    assert out != talk(run_dir, *options, "--seed=4", said="Name it.\nAgain!\n")[1]


def test_a_conversation_longer_than_the_model_takes(run_dir: Path, talk: Talk) -> None:
    question = "Say more. " * 9
    out, err = talk(run_dir, "--max-new-tokens", "900", said=f"{question}\nAnd?\n/reset\nHi\n")[1:]
    prompt = encoder_of("alpaca").prompt(Conversation((Turn("user", question),)))
    first = expected([question], max_new_tokens=WINDOW - len(prompt))[0]
    assert out.startswith(f"{first}\n")
    assert f"(the {WINDOW} tokens that the model takes are full)" in err
    assert re.search(
        rf"not asked: the conversation has \d+ tokens with this question, and the model takes "
        rf"{WINDOW}, answers included; /reset begins anew",
        err,
    )
    assert len(out) > len(first) + 10, "after /reset it answers again"


def test_a_question_that_cannot_be_asked(run_dir: Path, talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    tokenizer = pad_is_eos()
    encoder = Encoder(load_template(str(file), tokenizer), tokenizer)
    facts = {"prompt_words": encoder.prompt_fingerprint, "template": str(file)}
    folder = write_checkpoint(tmp_path / "run", 5, tiny_model("llama", vocab_size=400), **facts)
    out, err = talk(folder, "--max-new-tokens=3", said="<|endoftext|>\nHi\n")[1:]
    assert "not asked: the row holds the text of a control token, <|endoftext|>" in err
    assert out.count("\n") >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--step", "7"], r"^--step: got 7; allowed: newest, best, or one of the checkpoints of"),
        (["--step", "first"], r"^--step: got first; allowed: best, or the step of a checkpoint$"),
        (["--template", "chatml"], r"^--template: the template chatml needs 2 tokens that the"),
        (["--template", "human-assistant"], r"Set --template to alpaca, with"),
        (["--template", "x.jinja"], r"^--template=x\.jinja: no such template or file"),
        (["--top-p", "2"], r"^--top-p: got 2\.0; allowed: "),
        (["--max-new-tokens", "0"], r"^--max-new-tokens: got 0; allowed: "),
        (["--top-k", "5"], r"^--top-k: no effect with --temperature: 0"),
        (["--seed", "-1"], r"^--seed: got -1; allowed: 0 to"),
        (["--dtype", "float16"], r"^model\.dtype: float16 needs a GPU"),
    ],
)
def test_wrong_input(run_dir: Path, talk: Talk, options: list[str], message: str) -> None:
    code, out, err = talk(run_dir, *options)
    assert (code, out) == (2, "")
    said = [line for line in err.splitlines() if not line.startswith("MODEL: the checkpoint")]
    assert re.search(message, "\n".join(said)), err


def test_no_room_to_convert(run_dir: Path, talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    code, _, err = talk(run_dir)
    assert code == 2
    assert "find no room in" in err
    assert "set TMPDIR to another folder" in err


def test_a_model_folder_without_a_template(talk: Talk, tmp_path: Path) -> None:
    tiny_model("llama", vocab_size=len(byte_level())).save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    code, _, err = talk(tmp_path)
    assert code == 2
    assert "--template=tokenizer: this tokenizer has no chat template; allowed: " in err
    assert talk(tmp_path, "--template=alpaca", "--max-new-tokens=2", said="Hi\n")[0] == 0


def test_what_could_steer_a_terminal_is_not_printed() -> None:
    assert printable("a\x1b[2J\n\tb\ufffd今", "\n\t") == "a·[2J\n\tb·今"
    assert printable("a\n") == "a·"


# ---- real pipes and terminals ----------------------------------------------------------------


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return a command whose model says x without end."""
    model = tiny_model(
        "llama", vocab_size=400, tie_word_embeddings=False, max_position_embeddings=10**6
    )
    for weight in model.parameters():
        weight.data.zero_()
    (x,) = pad_is_eos()("x", add_special_tokens=False).input_ids
    for weight in (model.model.embed_tokens.weight, model.model.norm.weight):
        weight.data.fill_(1.0)
    model.lm_head.weight.data[x] = 1.0
    run = tmp_path_factory.mktemp("endless") / "run"
    folder = write_checkpoint(run, 5, model, template="alpaca")
    return [sys.executable, "-m", "dist_sft.cli", "chat", str(folder), "--max-new-tokens", "100000"]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "dumb"}


@pytest.mark.slow
def test_through_a_pipe(run_dir: Path, endless: list[str]) -> None:
    command = [*endless[:4], str(run_dir), "--max-new-tokens", "8"]
    done = subprocess.run(
        command, input="Name it.\nAgain!\n", text=True, capture_output=True, env=ENVIRONMENT
    )
    answers = expected(["Name it.", "Again!"])
    assert (done.returncode, done.stdout) == (0, "".join(f"{answer}\n" for answer in answers))
    with subprocess.Popen(
        endless, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    ) as process:  # fmt: skip
        assert process.stdin
        assert process.stdout
        process.stdin.write(b"Name it.\n")
        process.stdin.flush()
        assert process.stdout.read(20), "it comes as it is made"
        process.stdout.close()  # as `head` does
        assert process.wait(SECONDS) == 0
        assert process.stderr
        assert b"Traceback" not in process.stderr.read()


class Terminal:
    """Run a command in a terminal of its own."""

    def __init__(self, command: list[str]) -> None:
        self.pid, self._terminal = pty.fork()
        if not self.pid:
            os.execve(command[0], command, ENVIRONMENT)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def wait_for(self, text: str) -> str:
        """Return what came up to here."""
        deadline = time.monotonic() + SECONDS
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self._terminal], [], [], 1)[0]:
                self.seen += os.read(self._terminal, 4096).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before

    def end(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.slow
def test_in_a_terminal(endless: list[str]) -> None:
    terminal = Terminal(endless)
    try:
        assert "template alpaca, torch.float32 on cpu" in terminal.wait_for("> ")
        terminal.type("\x03")
        assert "/reset begins anew" in terminal.wait_for("> ")
        terminal.type("Name it.\n")
        terminal.wait_for("Name it.\r\n")
        while len(terminal.seen) < 50:
            terminal.seen += os.read(terminal._terminal, 100).decode(errors="replace")
        terminal.type("\x03")
        assert len(terminal.wait_for("(interrupted)")) > 50
        terminal.wait_for("> ")
        terminal.type("/reset\n")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.end() == 0
    except BaseException:
        os.kill(terminal.pid, signal.SIGKILL)
        raise
