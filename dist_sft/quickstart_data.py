"""Make the data of the quick start: a small Chinese-and-English instruction set and its tokenizer.

A tiny model with random weights can learn these skills in a minute, and exact match on held-out
operands shows that it learned the rule. Nothing is downloaded and a seed decides everything.
"""

import json
import random
import string
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NUM_HELD_OUT = 40
"""Held-out prompts per skill, half in English and half in Chinese."""

EOS, PAD = "<|endoftext|>", "<|pad|>"
TEMPLATE_CONSTANTS = ("Human: ", "\n\nAssistant: ")
"""The fixed parts of the template `human-assistant`."""

Row = dict[str, str]
Operands = tuple[Any, ...]


class Skill(NamedTuple):
    """One rule to learn: what is asked in English and in Chinese, about which operands."""

    name: str
    english: str
    chinese: str
    num_train: int
    """Operands drawn for training. Each is asked about in both languages."""
    draw: Callable[[random.Random], Operands]
    ask: Callable[[Operands, bool], tuple[str, str]]
    """(operands, chinese) -> (input, answer)."""


class Split(NamedTuple):
    """Rows to learn from and rows to be asked afterwards; no operands are in both."""

    train: list[Row]
    held_out: list[Row]


NUMBERS = {
    "two": "两", "three": "三", "four": "四", "five": "五",
    "six": "六", "seven": "七", "eight": "八", "nine": "九",
}  # fmt: skip
COLOURS = {
    "red": "红", "black": "黑", "white": "白", "blue": "蓝",
    "green": "绿", "yellow": "黄", "grey": "灰", "brown": "棕",
}  # fmt: skip
ANIMALS = {
    "cats": "猫", "dogs": "狗", "birds": "鸟", "rabbits": "兔", "horses": "马",
    "cows": "牛", "pigs": "猪", "fish": "鱼", "snakes": "蛇", "frogs": "蛙",
}  # fmt: skip
MEASURE_WORDS = {"horses": "匹", "cows": "头", "pigs": "头", "fish": "条", "snakes": "条"}
"""What Chinese puts between number and noun; 只 for the other animals."""
PRIMES = (19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97)
DIGITS = "零一二三四五六七八九"


def chinese_numeral(number: int) -> str:
    """Write a number from 10 to 999 in Chinese numerals."""
    hundreds, tens, ones = number // 100, number // 10 % 10, number % 10
    text = f"{DIGITS[hundreds]}百" if hundreds else ""
    if tens:
        # 15 is 十五, but 115 is 一百一十五
        text += "十" if number < 20 else f"{DIGITS[tens]}十"
    elif ones:
        text += "零"
    return text + (DIGITS[ones] if ones else "")


def _numbers(rng: random.Random, how_many: int, low: int, high: int) -> tuple[int, ...]:
    return tuple(rng.randint(low, high) for _ in range(how_many))


def _words(rng: random.Random, how_many: int, shortest: int, longest: int) -> tuple[str, ...]:
    return tuple(
        "".join(rng.choices(string.ascii_lowercase, k=rng.randint(shortest, longest)))
        for _ in range(how_many)
    )


def _fractions(rng: random.Random) -> tuple[int, int, int]:
    # A prime denominator above the sum of the numerators leaves nothing to reduce.
    return rng.randint(1, 9), rng.randint(1, 9), rng.choice(PRIMES)


def _convert(operands: Operands, chinese: bool) -> tuple[str, str]:
    (tenths,) = operands
    amount = f"{tenths / 10:g}"
    if chinese:
        return f"{amount}千克", f"{tenths * 100}克"
    return f"{amount} m", f"{tenths * 10} cm"


def _translate(operands: Operands, chinese: bool) -> tuple[str, str]:
    number, colour, animal = operands
    english = f"{number} {colour} {animal}"
    counted = NUMBERS[number] + MEASURE_WORDS.get(animal, "只")
    translation = f"{counted}{COLOURS[colour]}色的{ANIMALS[animal]}"
    return (translation, english) if chinese else (english, translation)


SKILLS = (
    Skill(
        "addition", "Add the two numbers.", "计算两个数的和。", 620,
        # Carries between digits take a tiny model longer than a newcomer wants to wait.
        lambda rng: (rng.randint(10, 99), 10 * rng.randint(1, 9)),
        lambda operands, _: ("{}+{}".format(*operands), str(sum(operands))),
    ),
    Skill(
        "fractions", "Add the two fractions.", "计算两个分数的和。", 600,
        _fractions,
        lambda o, _: (f"{o[0]}/{o[2]}+{o[1]}/{o[2]}", f"{o[0] + o[1]}/{o[2]}"),
    ),
    Skill(
        "conversion", "Convert metres to centimetres.", "把千克换算成克。", 500,
        lambda rng: _numbers(rng, 1, 1, 999), _convert,
    ),
    Skill(
        "largest", "Find the largest number.", "找出最大的数。", 2600,
        lambda rng: tuple(rng.sample(range(10, 100), 3)),
        lambda operands, _: (" ".join(map(str, operands)), str(max(operands))),
    ),
    Skill(
        "numerals", "Write the number in Chinese.", "把数字写成汉字。", 500,
        lambda rng: _numbers(rng, 1, 10, 999),
        lambda operands, _: (str(operands[0]), chinese_numeral(operands[0])),
    ),
    Skill(
        "first word", "Copy the first word.", "抄写第一个单词。", 500,
        lambda rng: _words(rng, 3, 3, 3),
        lambda operands, _: (" ".join(operands), operands[0]),
    ),
    Skill(
        "reverse", "Write the letters in reverse order.", "把字母倒过来写。", 1000,
        lambda rng: _words(rng, 1, 3, 5),
        lambda operands, _: (operands[0], operands[0][::-1]),
    ),
    Skill(
        "capitals", "Write in capital letters.", "改成大写字母。", 500,
        lambda rng: _words(rng, 1, 4, 4),
        lambda operands, _: (operands[0], operands[0].upper()),
    ),
    Skill(
        "phrases", "Translate into Chinese.", "翻译成英文。", 450,
        lambda rng: tuple(rng.choice(list(words)) for words in (NUMBERS, COLOURS, ANIMALS)),
        _translate,
    ),
)  # fmt: skip


def _row(skill: Skill, operands: Operands, chinese: bool) -> Row:
    question, answer = skill.ask(operands, chinese)
    instruction = skill.chinese if chinese else skill.english
    return {"instruction": instruction, "input": question, "output": answer, "skill": skill.name}


def _draw_distinct(skill: Skill, rng: random.Random) -> list[Operands]:
    """Draw operands without repetition; 3 + 5 and 5 + 3 count as the same."""
    drawn: dict[Operands, Operands] = {}
    while len(drawn) < NUM_HELD_OUT + skill.num_train:
        operands = skill.draw(rng)
        drawn.setdefault(tuple(sorted(operands)), operands)
    return list(drawn.values())


def make_rows(seed: int) -> Split:
    """Make the rows of every skill. The order of the training rows is left to the trainer."""
    split = Split([], [])
    for skill in SKILLS:
        # one generator per skill: a change to one skill leaves the rows of the others alone
        operands = _draw_distinct(skill, random.Random(f"{seed} {skill.name}"))
        split.held_out.extend(
            _row(skill, each, chinese=bool(index % 2))
            for index, each in enumerate(operands[:NUM_HELD_OUT])
        )
        split.train.extend(
            _row(skill, each, chinese)
            for each in operands[NUM_HELD_OUT:]
            for chinese in (False, True)
        )
    return split


def make_tokenizer() -> "Tokenizer":
    """Build a tokenizer with a token per instruction, template constant, phrase word and character.

    Short sequences decide what a tiny model can learn in a minute. Text that has nothing to do
    with the skills is encoded too, without loss: unknown characters become UTF-8 bytes.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models

    instructions = [text for skill in SKILLS for text in (skill.english, skill.chinese)]
    english_words = [*NUMBERS, *(f" {word}" for word in (*COLOURS, *ANIMALS))]
    phrases = [*TEMPLATE_CONSTANTS, *instructions, *english_words]
    dictionary = (NUMBERS, COLOURS, ANIMALS, MEASURE_WORDS)
    chinese_words = [word for words in dictionary for word in words.values()]
    # with the characters of the instructions, which people may write in other sentences too
    known_text = "".join(
        [string.printable, DIGITS, "百十千克只色的", *chinese_words, *instructions]
    )
    characters = sorted(set(known_text))
    pieces = [EOS, PAD, *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([EOS, PAD])
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return tokenizer


def exact_match(rows: Sequence[Mapping[str, str]], answers: Sequence[str]) -> dict[str, float]:
    """Score answers to rows: per skill, the share that equals the row's output exactly."""
    assert len(rows) == len(answers), (len(rows), len(answers))
    hits: defaultdict[str, list[bool]] = defaultdict(list)
    for row, answer in zip(rows, answers, strict=True):
        hits[row["skill"]].append(answer == row["output"])
    return {skill: sum(each) / len(each) for skill, each in hits.items()}


def _write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def write(folder: Path, seed: int = 0) -> None:
    """Write `train.jsonl`, `heldout.jsonl` and `tokenizer/` into the folder, made if needed."""
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    split = make_rows(seed)
    _write_jsonl(folder / "train.jsonl", split.train)
    _write_jsonl(folder / "heldout.jsonl", split.held_out)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(),
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder / "tokenizer")
