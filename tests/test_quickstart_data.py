"""The quick start's data: right answers, nothing leaked into the held-out rows, no text lost."""

import json
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dist_sft import quickstart_data

DICTIONARY = {
    "two": "两", "three": "三", "four": "四", "five": "五", "six": "六", "seven": "七",
    "eight": "八", "nine": "九", "red": "红", "black": "黑", "white": "白", "blue": "蓝",
    "green": "绿", "yellow": "黄", "grey": "灰", "brown": "棕", "cats": "猫", "dogs": "狗",
    "birds": "鸟", "rabbits": "兔", "horses": "马", "cows": "牛", "pigs": "猪", "fish": "鱼",
    "snakes": "蛇", "frogs": "蛙",
}  # fmt: skip


def read_numeral(text: str) -> int:
    total, digit = 0, 1  # the leading 十 of 十五 stands for one ten
    for character in text:
        if character in "百十":
            total, digit = total + digit * {"百": 100, "十": 10}[character], 0
        else:
            digit = "零一二三四五六七八九".index(character)
    return total + (0 if text[-1] in "百十" else digit)


def translate(english: str) -> re.Pattern[str]:
    number, colour, animal = (DICTIONARY[word] for word in english.split())
    return re.compile(f"{number}[只匹头条]{colour}色的{animal}")


def convert(text: str) -> str:
    amount, unit = re.fullmatch(r"([\d.]+) ?(m|千克)", text).groups()  # type: ignore[union-attr]
    factor, target = {"m": (100, " cm"), "千克": (1000, "克")}[unit]
    return f"{Fraction(amount) * factor}{target}"


def is_translation(question: str, answer: str) -> bool:
    english, chinese = sorted((question, answer))  # ASCII sorts before Chinese
    return translate(english).fullmatch(chinese) is not None


IS_RIGHT = {
    "addition": lambda q, a: sum(int(n) for n in q.split("+")) == int(a),
    "fractions": lambda q, a: sum(Fraction(n) for n in q.split("+")) == Fraction(a),
    "conversion": lambda q, a: convert(q) == a,
    "largest": lambda q, a: str(sorted(int(n) for n in q.split())[-1]) == a,
    "numerals": lambda q, a: read_numeral(a) == int(q),
    "first word": lambda q, a: q.startswith(f"{a} "),
    "reverse": lambda q, a: "".join(reversed(a)) == q,
    "capitals": lambda q, a: a.isupper() and a.lower() == q,
    "phrases": is_translation,
}


def operands(row: dict[str, str]) -> tuple[str, ...]:
    """Find what a row is about, whatever the order, the unit or the direction."""
    question = row["input"]
    if row["skill"] == "phrases":
        # the English side, in either direction
        question = min(question, row["output"])
    return tuple(sorted(re.findall(r"[\d.]+|[a-z]{2,}", question)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("quickstart") / "made" / "here"
    quickstart_data.write(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder / "tokenizer")


@pytest.fixture(scope="module")
def rows(folder: Path) -> quickstart_data.Split:
    def read(name: str) -> list[quickstart_data.Row]:
        return [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]

    return quickstart_data.Split(read("train.jsonl"), read("heldout.jsonl"))


def test_every_answer_is_right(rows: quickstart_data.Split) -> None:
    wrong = [
        row
        for row in rows.train + rows.held_out
        if not IS_RIGHT[row["skill"]](row["input"], row["output"])
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("number", "numeral"),
    [(10, "十"), (15, "十五"), (20, "二十"), (100, "一百"), (105, "一百零五"),
     (110, "一百一十"), (115, "一百一十五"), (999, "九百九十九")],
)  # fmt: skip
def test_chinese_numerals(number: int, numeral: str) -> None:
    assert quickstart_data.chinese_numeral(number) == numeral


@pytest.mark.parametrize("skill", IS_RIGHT)
def test_held_out_operands_are_never_trained_on(rows: quickstart_data.Split, skill: str) -> None:
    trained = {operands(row) for row in rows.train if row["skill"] == skill}
    held_out = [operands(row) for row in rows.held_out if row["skill"] == skill]
    assert not trained & set(held_out)
    assert len(set(held_out)) == len(held_out) == quickstart_data.NUM_HELD_OUT


def test_held_out_phrases_are_made_of_trained_words(rows: quickstart_data.Split) -> None:
    def words(part: list[quickstart_data.Row]) -> set[str]:
        return {word for row in part if row["skill"] == "phrases" for word in operands(row)}

    assert words(rows.held_out) <= words(rows.train) == set(DICTIONARY)


def test_every_skill_is_asked_in_both_languages(rows: quickstart_data.Split) -> None:
    instructions = {(row["skill"], row["instruction"]) for row in rows.train}
    assert Counter(skill for skill, _ in instructions) == dict.fromkeys(IS_RIGHT, 2)
    assert {(row["skill"], row["instruction"]) for row in rows.held_out} == instructions


def test_the_seed_decides_every_byte(folder: Path, tmp_path: Path) -> None:
    def contents(path: Path) -> dict[Path, bytes]:
        return {
            file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()
        }

    # Another process, so that the order of sets and hashes is another one.
    again = tmp_path / "again"
    code = "import sys, pathlib, dist_sft.quickstart_data as q; q.write(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(again)], check=True)
    assert contents(again) == contents(folder)
    assert quickstart_data.make_rows(1).held_out != quickstart_data.make_rows(0).held_out


def test_files_are_small(folder: Path) -> None:
    sizes = {file.name: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    assert sorted(sizes) == [
        "heldout.jsonl", "tokenizer.json", "tokenizer_config.json", "train.jsonl",
    ]  # fmt: skip
    assert 500_000 < sizes["train.jsonl"] < 4_000_000
    assert sizes["heldout.jsonl"] < 100_000
    assert sizes["tokenizer.json"] < 100_000


def test_instructions_and_template_constants_are_single_tokens(
    tokenizer: PreTrainedTokenizerFast, rows: quickstart_data.Split
) -> None:
    start, end = quickstart_data.TEMPLATE_CONSTANTS
    for row in rows.held_out:
        pieces = tokenizer.tokenize(f"{start}{row['instruction']}\n{row['input']}{end}")
        assert pieces[:3] == [start, row["instruction"], "\n"]
        assert pieces[-1] == end
        assert "".join(pieces[3:-1]) == row["input"]


def test_operands_are_characters(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("47+38") == list("47+38")
    assert tokenizer.tokenize("qzx") == list("qzx")
    assert tokenizer.tokenize("三百零五") == list("三百零五")


def test_rows_are_short_and_need_no_byte_tokens(
    tokenizer: PreTrainedTokenizerFast, rows: quickstart_data.Split
) -> None:
    texts = [row["input"] + row["output"] for row in rows.train + rows.held_out]
    encoded = tokenizer(texts, add_special_tokens=False).input_ids
    assert max(len(numbers) for numbers in encoded) <= 18
    used = tokenizer.convert_ids_to_tokens(sorted({n for numbers in encoded for n in numbers}))
    assert [piece for piece in used if piece.startswith("<0x")] == []


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " two  spaces ",
        "Human: Human:\n\nAssistant: ",
        "<0x41>",
        "naïve 日本 😀\t\r\n",
        "scared cats",
    ],
)
def test_awkward_text_survives_the_saved_tokenizer(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_end_token_ends_and_is_not_shown(tokenizer: PreTrainedTokenizerFast) -> None:
    numbers = tokenizer.encode("85" + quickstart_data.EOS)
    assert numbers[-1] == tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer.decode(numbers, skip_special_tokens=True) == "85"
    assert tokenizer.bos_token is None


def test_exact_match_scores_each_skill() -> None:
    rows = [
        {"skill": "reverse", "output": "ab"},
        {"skill": "reverse", "output": "cd"},
        {"skill": "largest", "output": "9"},
    ]
    assert quickstart_data.exact_match(rows, ["ab", "cd ", "9"]) == {"reverse": 0.5, "largest": 1.0}
    with pytest.raises(AssertionError):
        quickstart_data.exact_match(rows, ["ab"])


def test_help_is_quick_and_needs_no_torch() -> None:
    code = (
        "import sys, dist_sft.quickstart as q\n"
        "try: q.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "--workers" in shown.stdout
