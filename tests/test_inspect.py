"""The `dist-sft` command: what it shows is what is trained on, and mistakes are said plainly."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny_tokenizers import byte_level

from dist_sft import cli, data, manifest, mask_picture, plan_report, totals
from dist_sft.config import Optimizer, read_recipe
from dist_sft.errors import UserError
from dist_sft.look import (
    Look,
    Token,
    find_source,
    look_at,
    mask_text,
    read_rows,
    show_end,
    show_look,
    uses_colour,
)
from dist_sft.tokenizer import load_words

HEAVY = ("torch", "transformers", "datasets", "matplotlib", "numpy", "pydantic", "rich")
ENGLISH = {"instruction": "Name the capital of France.", "input": "", "output": "It is Paris."}
CHINESE = {"instruction": "翻译成英文。", "input": "今天天气很好", "output": "The weather is nice."}
LONG = {"instruction": "Count.", "input": "", "output": "one two three " * 40}
LONG_QUESTION = {"instruction": "Why? " * 80, "input": "", "output": "Because."}
BROKEN = {"instruction": "No answer here."}
ROWS = [ENGLISH, CHINESE, ENGLISH, LONG, LONG_QUESTION, CHINESE | {"output": "天气很好。"}]
MAX_LENGTH = 80


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level().save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, tokenizer_folder: Path) -> Path:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    write_rows(tmp_path / "more.jsonl", [LONG | {"output": "四。"}] * 2)
    write_rows(tmp_path / "held.jsonl", [CHINESE, LONG | {"output": "None."}])
    tree = {
        "run_dir": str(tmp_path / "run"),
        "model": {"config": {"model_type": "llama"}, "tokenizer": str(tokenizer_folder)},
        "data": {
            "train": [{"path": str(tmp_path / name)} for name in ("rows.jsonl", "more.jsonl")],
            "eval": [{"path": str(tmp_path / "held.jsonl")}],
            "max_length": MAX_LENGTH,
            "cache_dir": str(tmp_path / "cache"),
        },
        "train": {"batch_size": 3, "epochs": 2, "tokens_per_micro_batch": 100},
        "optimizer": {"warmup_steps": 2},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    return path


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object, code: int = 0) -> str:
        assert cli.main([str(argument) for argument in arguments]) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    return run


# ---- the command line ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--help"], 0, "foretell a run"),
        (["inspect", "--help"], 0, "key=value"),
        (["--version"], 0, "dist-sft 0."),
        ([], 2, "COMMAND"),
    ],
)
def test_help_answers_without_importing_anything_heavy(
    arguments: list[str], code: int, text: str
) -> None:
    program = (
        "import sys\nfrom dist_sft.cli import main\ntry:\n    main(sys.argv[1:])\n"
        f"finally:\n    print('loaded:', *[m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert text in done.stdout + done.stderr
    assert done.stdout.endswith("loaded:\n")


def test_a_mistake_in_the_recipe_is_said_without_traceback(shown: Any, recipe: Path) -> None:
    assert "no recipe at" in shown("inspect", "missing.yaml", code=2)
    message = shown("plan", recipe, "data.max_lenght=3", code=2)
    assert "did you mean" in message
    assert "Traceback" not in message


def test_overrides_may_come_after_options(shown: Any, recipe: Path) -> None:
    text = shown("inspect", recipe, "data.max_length=500", "--row", 3, "data.learn=last")
    assert "cut" not in text


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "r.yaml", "--rows", "3"],
        ["inspect", "r.yaml", "--row", "3", "a=1", "--what"],
        ["export", "run", "out", "a=1"],
    ],
)
def test_unknown_arguments_are_refused(words: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    assert "unrecognized arguments" in capsys.readouterr().err


def test_training_is_started_elsewhere(capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "my recipe.yaml", "--workers", "2"])
    said = capsys.readouterr().err
    assert "training is started by: launch/local.py train 'my recipe.yaml' --workers 2\n" in said


# ---- one row ---------------------------------------------------------------------------------


def test_a_row_shows_mask_answer_and_prompt(shown: Any, recipe: Path) -> None:
    text = shown("inspect", recipe, "--row", 1)
    assert "rows (train.0) row 1\n" in text
    assert (
        "Human: 翻译成英文。\n今天天气很好\n\nAssistant: "
        "⟦The weather is nice.<|endoftext|>⟧\n" in text
    )
    assert "[answer]\nThe weather is nice.<|endoftext|>\n" in text
    assert (
        "the same ids as in training]\nHuman: 翻译成英文。\n今天天气很好\n\nAssistant:␣\n" in text
    )


def test_a_row_of_any_source(shown: Any, recipe: Path) -> None:
    assert "⟦四。<|endoftext|>⟧" in shown("inspect", recipe, "--row", 0, "--source", "more")
    assert "⟦None.<|endoftext|>⟧" in shown("inspect", recipe, "--row", 1, "--source", "eval.0")


def test_every_answer_of_a_conversation_is_shown(shown: Any, recipe: Path, tmp_path: Path) -> None:
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "See you")]
    row: Any = {"messages": [{"role": role, "content": text} for role, text in turns]}
    write_rows(tmp_path / "rows.jsonl", [row])
    text = shown("inspect", recipe, "--row", 0)
    assert "Assistant: ⟦Hello<|endoftext|>⟧" in text
    assert "[2 answers]\nHello<|endoftext|>\nSee you<|endoftext|>\n" in text
    assert text.endswith("Human: Bye\n\nAssistant:␣\n")


def test_what_is_shown_is_what_is_in_the_store(recipe: Path) -> None:
    settings = read_recipe(recipe)
    words = load_words(settings.model, settings.data.template)
    stores = data.prepare(settings.data, words, say=lambda line: None)
    train, _ = data.open_datasets(stores, settings.data, settings.seed)
    source = find_source(settings.data, None)
    for number in range(train.rows_per_source[0]):
        _, row = train.locate(number)
        rows = read_rows(source, [row])
        tokens = look_at(row, rows[row], source, settings.data, words).tokens
        ids, learned = train.sample(number)
        assert [token.id for token in tokens] == ids.tolist()
        assert [token.learned for token in tokens] == learned.tolist()
        assert tokens == totals.look_at_sample(train, number, words).tokens
        text = words.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert "".join(token.text for token in tokens) == text


@pytest.mark.parametrize(
    ("row", "overrides", "fate"),
    [
        (3, [], "cut: it has"),
        (3, [], "learned tokens lie behind it"),
        (3, ["data.overlong=drop"], "left out (overlong): it has"),
        (3, ["data.overlong=error"], "refused: it has"),
        (4, [], "left out (no_learned_token): it has"),
        (4, [], "the first learned token is number"),
    ],
)
def test_the_fate_of_a_long_row_is_said(
    shown: Any, recipe: Path, row: int, overrides: list[str], fate: str
) -> None:
    assert fate in shown("inspect", recipe, *overrides, "--row", row)


def test_a_row_that_is_left_out_is_shown_whole(shown: Any, recipe: Path) -> None:
    assert "⟦Because.<|endoftext|>⟧" in shown("inspect", recipe, "--row", 4)


def test_a_cut_prompt_is_said(shown: Any, recipe: Path) -> None:
    text = shown("inspect", recipe, "data.max_length=3", "--row", 0)
    assert "the first learned token is number" in text
    look = Look("row", "", (Token(1, "Hu", False, False),), ("x",), "Human", 5)
    assert "of which training sees only the first part" in printed(look)


def test_a_prompt_that_differs_from_training_is_said() -> None:
    look = Look("row", "", (Token(1, "a", True, False),), ("a",), "b", 1, prompt_agrees=False)
    assert "NOT what training shows before the answer" in printed(look)


@pytest.mark.parametrize(
    ("override", "consequence"),
    [("data.on_bad_row=error", "stops the run"), ("data.on_bad_row=skip", "is left out")],
)
def test_a_broken_row_is_explained(
    shown: Any, recipe: Path, tmp_path: Path, override: str, consequence: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(BROKEN) + "\n{oops\n", encoding="utf-8")
    text = shown("inspect", recipe, override, "--row", 0)
    assert "broken (" in text
    assert consequence in text
    assert "No answer here." in text
    assert "broken (broken_json): broken JSON at line 2" in shown(
        "inspect", recipe, override, "--row", 1
    )
    message = shown("inspect", recipe, "--row", 0, "--png", tmp_path / "x.png", code=2)
    assert "nothing to draw" in message


def test_a_row_without_a_learned_turn_is_explained(
    shown: Any, recipe: Path, tmp_path: Path
) -> None:
    row: Any = {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello", "weight": 0},
        ]
    }
    write_rows(tmp_path / "rows.jsonl", [row])
    assert "no assistant turn of it is learned" in shown("inspect", recipe, "--row", 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--row", 6], "row 6: rows (train.0) has 6 rows; allowed: 0 to 5"),
        (["--row", -1], "row -1: rows (train.0) has 6 rows; allowed: 0 to 5"),
        (["--row", 0, "--source", "zh"], "allowed, by name or key: rows (train.0), more (train.1)"),
        (["--row", 0, "--source", "rows", "data.eval.0.name=rows"], "2 sources have this name"),
        (["--png", "x.png"], "add --row N"),
        (["--row", 0, "--png", "/missing/x.png"], "--png: cannot write /missing/x.png"),
    ],
)
def test_wrong_requests_are_refused(
    shown: Any, recipe: Path, arguments: list[object], message: str
) -> None:
    assert message in shown("inspect", recipe, *arguments, code=2)


def test_the_token_table_lists_every_token(shown: Any, recipe: Path) -> None:
    lines = shown("inspect", recipe, "--row", 5, "--tokens").splitlines()
    start = next(i for i, line in enumerate(lines) if "position" in line)
    table = [line.split() for line in lines[start + 1 :]]
    assert [line[0] for line in table] == [str(i) for i in range(len(table))]
    assert table[-1][2:] == ["<|endoftext|>", "learned"]
    assert any("(part of the next character)" in line for line in lines)


# ---- colours ---------------------------------------------------------------------------------


def printed(look: Look, **options: Any) -> str:
    file = io.StringIO()
    show_look(Console(file=file, width=100, **options), look)
    return file.getvalue()


LOOK = Look(
    "row 0",
    "",
    (Token(1, "Hi", False, False), Token(2, "Yes", True, False), Token(3, "</s>", True, True)),
    ("Yes</s>",),
    "Hi",
    1,
)


def test_colours_tell_learned_from_read_on_a_terminal() -> None:
    text = printed(LOOK, force_terminal=True, color_system="truecolor")
    assert "\x1b[90mHi\x1b[0m\x1b[1;32mYes\x1b[0m\x1b[1;7;32m</s>\x1b[0m" in text
    assert "⟦" not in text


@pytest.mark.parametrize(
    "options", [{}, {"force_terminal": True, "no_color": True, "color_system": "truecolor"}]
)
def test_brackets_tell_where_there_is_no_colour(options: dict[str, Any]) -> None:
    text = printed(LOOK, **options)
    assert "Hi⟦" in text
    assert "⟦learned⟧" in text
    assert "\x1b[32m" not in text


def test_no_color_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert uses_colour(cli._console())
    assert not uses_colour(cli._console(no_color=True))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not uses_colour(cli._console())


def test_a_short_view_keeps_the_borders_of_long_runs() -> None:
    words = [Token(i, f"w{i} ", i >= 500, False) for i in range(1000)]
    text = mask_text(words, Console(file=io.StringIO()), elide=True).plain
    assert "[... 340 tokens ...]" in text
    assert "w499 ⟦w500 " in text
    assert "w999 ⟧" in text
    assert "w250" not in text


@given(st.text(alphabet="ab \n\t", max_size=6))
def test_white_space_at_the_end_is_visible(text: str) -> None:
    visible = show_end(text)
    assert visible == visible.rstrip()
    back = visible.replace("␣", " ").replace("⇥", "\t").replace("↵\n", "\n").replace("↵", "\n")
    assert back == text


# ---- totals ----------------------------------------------------------------------------------


def test_totals_count_losses_repetitions_and_overlap(shown: Any, recipe: Path) -> None:
    text = shown("inspect", recipe)
    counts = {line.split("  ")[0]: line.split()[-9:] for line in text.splitlines() if "%" in line}
    assert counts["rows (train.0)"][:5] == ["6", "5", "1", "1", "1"]
    assert counts["more (train.1)"][:5] == ["2", "2", "0", "0", "1"]
    assert counts["all training sources"][:5] == ["8", "7", "1", "1", "2"]
    assert counts["held (eval.0)"][:5] == ["2", "2", "0", "0", "0"]
    assert "1 no_learned_token, left out\n    row 4: it has" in text
    assert "1 cut, to data.max_length\n    row 3: it has" in text
    assert "2 of 7 training samples equal an earlier one\n    rows row 2 is rows row 0" in text
    assert "1 of 2 samples of held are trained on as well\n    held row 0 is rows row 1" in text
    assert text.count("⟦") == 1 + totals.EXAMPLES


def test_totals_name_broken_rows(shown: Any, recipe: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [ENGLISH, BROKEN])
    text = shown("inspect", recipe, "data.on_bad_row=skip")
    assert ", left out\n    row 1: " in text
    assert "row 1 (from 0) is broken" in shown("inspect", recipe, code=2)


def test_totals_of_a_held_out_fraction(shown: Any, recipe: Path) -> None:
    text = shown("inspect", recipe, "data.eval=[]", "data.eval_fraction=0.3")
    assert "of these 2 are held out for evaluation" in text
    assert "0 of 2 samples of held_out are trained on as well" in text


def test_new_tokens_of_the_template_are_counted(shown: Any, recipe: Path) -> None:
    assert "the template adds 2 tokens" in shown("inspect", recipe, "data.template=chatml")


def test_dropped_rows_are_named_by_their_own_reason(shown: Any, recipe: Path) -> None:
    text = shown("inspect", recipe, "data.overlong=drop")
    assert "2 overlong, left out\n    row 3: it has" in text
    assert "cut, to data.max_length" not in text


@given(st.lists(st.integers(1, 5000), min_size=1))
def test_the_histogram_counts_every_sample_once(lengths: list[int]) -> None:
    bars = totals.histogram(np.array(lengths))
    assert len(bars) <= totals.HISTOGRAM_BARS
    for shortest, longest, count in bars:
        assert count == sum(shortest <= length <= longest for length in lengths)
    assert sum(count for _, _, count in bars) == len(lengths)


@given(st.lists(st.integers(0, 5)), st.lists(st.integers(0, 5)))
def test_repetitions_are_counted(first: list[int], second: list[int]) -> None:
    count, pairs = totals.repeats(np.array(first, np.uint64))
    assert count == len(first) - len(set(first))
    assert all(first[p.sample] == first[p.original] and p.original < p.sample for p in pairs)
    count, pairs = totals.overlap(np.array(first, np.uint64), np.array(second, np.uint64))
    assert count == sum(value in second for value in first)
    assert all(first[p.sample] == second[p.original] for p in pairs)


def test_inspect_loads_no_model_and_starts_no_process(
    shown: Any, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    def forbidden(*arguments: object, **options: object) -> None:
        raise AssertionError("inspect must not do this")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", forbidden)
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", forbidden)
    monkeypatch.setattr(subprocess, "Popen", forbidden)
    shown("inspect", recipe)
    shown("inspect", recipe, "--row", 0)
    assert not (recipe.parent / "run").exists()


# ---- the picture -----------------------------------------------------------------------------


def tokens(*texts: str) -> list[Token]:
    return [Token(i, text, i % 2 == 1, False) for i, text in enumerate(texts)]


def test_a_picture_is_made_whatever_fonts_there_are(
    shown: Any, recipe: Path, tmp_path: Path
) -> None:
    # A glyph that is missing would be a warning, and warnings are errors here.
    picture = tmp_path / "mask.png"
    text = shown("inspect", recipe, "--row", 5, "--png", picture)
    assert f"drawn to {picture}" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_odd_texts_can_be_drawn(tmp_path: Path) -> None:
    odd = tokens("$a$", " costs $5", "\t", "\n\n", "\x07", "", "\ud7ff", "a" * 200, "", "")
    notes = mask_picture.draw(odd, "50 $ and $", tmp_path / "mask.png")
    assert not notes or "U+" in notes[0] or "no installed font" in notes[0]


def test_a_font_that_has_the_characters_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    font = make_font(tmp_path / "Tiny.ttf", "天气")
    broken = tmp_path / "Broken.ttf"
    broken.write_bytes(b"no font")
    monkeypatch.setattr(mask_picture, "findSystemFonts", lambda: [str(broken), str(font)])
    assert mask_picture.draw(tokens("天", "a"), "气", tmp_path / "mask.png") == []
    found = mask_picture.find_fonts("a天地")
    assert found.families == (mask_picture.LATIN_FONT, "Tiny")
    assert found.missing == {"地"}


def make_font(path: Path, characters: str) -> Path:
    """Write a font in which every character is the same triangle."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    pen.lineTo((500, 800))
    pen.lineTo((1000, 0))
    pen.closePath()
    names = [".notdef", *(f"glyph{i}" for i in range(len(characters)))]
    builder = FontBuilder(1000)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(c): f"glyph{i}" for i, c in enumerate(characters)})
    builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Tiny", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


def test_without_a_font_code_points_are_drawn_and_a_package_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(mask_picture, "findSystemFonts", lambda: [])
    (note,) = mask_picture.draw(tokens("天", "a"), "题", tmp_path / "mask.png")
    assert "has 2 of the characters (天 题)" in note
    assert "fonts-noto-cjk" in note
    assert "fonts-wqy-microhei" in note
    assert mask_picture.label_of("a天", {"天"}) == "a<U+5929>"


def test_a_very_long_row_is_drawn_in_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mask_picture, "MAX_TOKENS", 3)
    (note,) = mask_picture.draw(tokens(*"abcde"), "row", tmp_path / "mask.png")
    assert note == "the picture shows the first 3 of 5 tokens"


@given(st.lists(st.text(alphabet="a天 ", max_size=40), min_size=1, max_size=80))
def test_every_token_gets_a_bar_inside_the_lines(texts: list[str]) -> None:
    cells = mask_picture.place(tokens(*texts))
    assert [token for cell in cells for token in cell.tokens] == tokens(*texts)
    places = [(cell.line, cell.left) for cell in cells]
    assert places == sorted(set(places))
    assert all(cell.left + cell.width <= mask_picture.LINE_COLUMNS for cell in cells)


# ---- plan ------------------------------------------------------------------------------------


def test_plan_foretells_the_run(shown: Any, recipe: Path) -> None:
    text = shown("plan", recipe, "--workers", 2)
    assert "steps          6 in 2 epochs of 3" in text
    assert "7 per epoch, 3 per step, 1 in the last step of an epoch" in text
    assert "1.00e-05 at step 1, 2.00e-05 at step 2 (end of warm-up), cosine to" in text
    assert "workers: 2, tokens per micro-batch: 100" in text
    assert "unless the model fails the isolation proof" in text
    assert "padded" not in shown("plan", recipe, 'train.packing="on"', "--workers", 2)
    assert "packed" not in shown("plan", recipe, 'train.packing="off"', "--workers", 2)


def test_plan_shows_every_row_of_a_step_once(shown: Any, recipe: Path) -> None:
    settings = read_recipe(recipe)
    words = load_words(settings.model, settings.data.template)
    stores = data.prepare(settings.data, words, say=lambda line: None)
    train, _ = data.open_datasets(stores, settings.data, settings.seed)
    samples = data.make_plan(train, settings.data, settings.seed, 3).samples(3)
    text = shown("plan", recipe, "--workers", 2, "--step", 3)
    assert text.startswith(f"step 3 of 6, epoch 1: {len(samples)} examples, ")
    assert plan_report.rows_by_source(train, samples.tolist()) in text
    assert "(filler)" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", 0], "--workers: got 0; allowed: 1 or more"),
        (["--step", 7], "--step: got 7; allowed: 1 to 6"),
        (["--step", 0], "--step: got 0; allowed: 1 to 6"),
    ],
)
def test_plans_that_cannot_be_are_refused(
    shown: Any, recipe: Path, arguments: list[object], message: str
) -> None:
    assert message in shown("plan", recipe, *arguments, code=2)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (Optimizer(lr=1e-3, schedule="constant"), "1.00e-03 at step 1, constant to 1.00e-03"),
        (Optimizer(lr=1e-3, warmup_steps=20), "5.00e-05 at step 1, still warming up"),
    ],
)
def test_milestones_of_the_learning_rate(settings: Optimizer, text: str) -> None:
    assert plan_report.milestones(10, settings).startswith(text)


# ---- export ----------------------------------------------------------------------------------


@pytest.fixture
def run_dir(recipe: Path) -> Path:
    folder = recipe.parent / "run"
    for step in (3, 6):
        checkpoint = manifest.folder_of(folder, step)
        checkpoint.mkdir(parents=True)
        manifest.write(checkpoint, {"format": manifest.FORMAT, "step": step, "files": {}})
    (folder / "config.json").write_text(read_recipe(recipe).to_json(), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("options", "step", "dtype"),
    [([], 6, "float32"), (["--step", 3, "--dtype", "bfloat16"], 3, "bfloat16")],
)
def test_export_writes_the_chosen_checkpoint(
    shown: Any,
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[object],
    step: int,
    dtype: str,
) -> None:
    from dist_sft import export

    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(export, "export", lambda *arguments: calls.append(arguments))
    out = tmp_path / "out"
    assert f"step {step} as {dtype}: {out}" in shown("export", run_dir, out, *options)
    folder, written, given_dtype = calls[0]
    assert (folder.name, written, str(given_dtype)) == (
        f"step-{step:08d}", out, f"torch.{dtype}"
    )  # fmt: skip


def test_exports_that_cannot_be_are_refused(shown: Any, run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "not a run folder" in shown("export", tmp_path, out, code=2)
    message = shown("export", run_dir, out, "--step", 4, code=2)
    assert "--step: got 4; allowed: best, or one of the checkpoints [3, 6]" in message
    assert "exists already" in shown("export", run_dir, run_dir, code=2)
    (manifest.folder_of(run_dir, 6) / manifest.NAME).write_text("{}")
    assert "the checkpoint of step 6 is damaged: " in shown("export", run_dir, out, code=2)
    shutil.rmtree(run_dir / "checkpoints")
    assert "has no checkpoint yet" in shown("export", run_dir, out, code=2)


def test_user_errors_are_the_only_ones_that_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_plan", lambda options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["plan", "r.yaml"])
    assert issubclass(UserError, ValueError)
