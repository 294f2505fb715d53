import json
import os
import re
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import TOKENIZERS, byte_level, metaspace, pad_is_eos
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from dist_sft.chat import (
    IGNORE,
    BadRow,
    Dropped,
    Encoder,
    MaskError,
    OverlongError,
    Run,
    Sample,
    add_new_tokens,
    explain,
    load_template,
    parse,
    token_texts,
)
from dist_sft.errors import UserError
from dist_sft.templates import Piece

BUILT_IN = ("human-assistant", "alpaca", "chatml")
ASSETS = Path(__file__).parent / "assets"


def make_encoder(template_name, tokenizer, **options):
    template = load_template(template_name, tokenizer)
    add_new_tokens(tokenizer, template)
    return Encoder(template, tokenizer, **options)


def alpaca_rows():
    folder = os.environ.get("DIST_SFT_TEST_DATA")
    if folder is None:
        return json.loads((ASSETS / "alpaca_small.json").read_text(encoding="utf-8"))
    files = [Path(folder) / f"alpaca_{language}_demo.json" for language in ("en", "zh")]
    return [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))[:100]]


# ---- the independent re-computation: where each token's bytes lie in a text written by hand ------


PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_OF = {chr(byte): byte for byte in PRINTABLE} | {
    chr(256 + place): byte for place, byte in enumerate(OTHERS)
}


def token_bytes(token, byte_level):
    """Return the bytes that one plain entry of the vocabulary stands for."""
    if byte_level:
        return bytes(BYTE_OF[character] for character in token)
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def as_written(text, is_control, tokenizer):
    if is_control or isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        return text.encode()
    text = unicodedata.normalize("NFKC", text)
    return (text if text.startswith(" ") else f" {text}").encode()


def mask_by_offsets(input_ids, tokenizer, segments):
    """Recompute the mask: `segments` are (text, learned, is_control), tokens find their place."""
    written, borders = b"", []
    for text, learned, is_control in segments:
        written += as_written(text, is_control, tokenizer)
        borders.append((len(written), learned))
    added = tokenizer.get_added_vocab()
    byte_level = isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)
    mask, position = [], 0
    borders = iter(borders)
    end, learned = next(borders)
    for token in tokenizer.convert_ids_to_tokens(input_ids):
        while end <= position:
            end, learned = next(borders)
        piece = token.encode() if token in added else token_bytes(token, byte_level)
        assert written.startswith(piece, position), (token, written[position : position + 20])
        position += len(piece)
        assert position <= end, f"{token} crosses a border"
        mask.append(learned)
    assert position == len(written)
    return mask


def check(sample, tokenizer, marked, controls):
    """Compare with `marked`, a text in which ⟦...⟧ surround what is learned."""
    bos = tokenizer.bos_token if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else ""
    segments = [(bos, False, True)] if bos else []
    for part in re.split(r"(⟦.*?⟧)", marked, flags=re.DOTALL):
        learned = part.startswith("⟦")
        for text in re.split(f"({'|'.join(map(re.escape, controls))}|¦)", part.strip("⟦⟧")):
            if text and text != "¦":
                segments.append((text, learned, text in controls))
    assert isinstance(sample, Sample), sample
    assert not sample.truncated
    assert sample.learned == mask_by_offsets(sample.input_ids, tokenizer, segments)


def marked_alpaca(row, template_name, eos):
    question, answer = row["instruction"], row["output"]
    if template_name == "human-assistant":
        prompt = ("Human: " + question + "\n" + row["input"]).strip() + "\n\nAssistant: "
        return f"{prompt}⟦{answer}{eos}⟧"
    if template_name == "chatml":
        both = f"{question}\n{row['input']}" if row["input"] else question
        start, end = "<|im_start|>", "<|im_end|>"
        return f"{start}user\n{both}{end}¦\n¦{start}assistant\n⟦{answer}{end}⟧"
    if row["input"]:
        return (
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{question}\n\n### Input:\n{row['input']}\n\n### Response:"
            f"⟦{answer}{eos}⟧"
        )
    return (
        "Below is an instruction that describes a task. Write a response that appropriately "
        f"completes the request.\n\n### Instruction:\n{question}\n\n### Response:⟦{answer}{eos}⟧"
    )


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", BUILT_IN)
def test_masks_of_alpaca_rows(name, kind):
    tokenizer = TOKENIZERS[kind]()
    encoder = make_encoder(name, tokenizer)
    rows = alpaca_rows()
    controls = {tokenizer.eos_token, "<|im_start|>", "<|im_end|>"}
    for row, sample in zip(rows, encoder.encode(rows), strict=True):
        check(sample, tokenizer, marked_alpaca(row, name, tokenizer.eos_token), controls)


MULTI_TURN = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How are you?"},
        {"role": "assistant", "content": "很好。"},
        {"role": "user", "content": "Good"},
        {"role": "assistant", "content": " Indeed!"},
    ]
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("learn", ["all", "last"])
@pytest.mark.parametrize("name", BUILT_IN)
def test_masks_of_several_turns(name, learn, kind):
    tokenizer = TOKENIZERS[kind]()
    eos = tokenizer.eos_token
    [sample] = make_encoder(name, tokenizer, learn=learn).encode([MULTI_TURN])
    intro = "Below is an instruction that describes a task. Write a response that appropriately "
    marked = {
        "human-assistant": f"Be brief.\n\nHuman: How are you?\n\nAssistant: ⟦很好。{eos}⟧"
        f"\n\nHuman: Good\n\nAssistant: ⟦ Indeed!{eos}⟧",
        "alpaca": f"Be brief.\n\n{intro}completes the request.\n\n### Instruction:\nHow are you?"
        f"\n\n### Response:⟦很好。{eos}⟧\n\n### Instruction:\nGood\n\n### Response:⟦ Indeed!{eos}⟧",
        "chatml": "<|im_start|>system\nBe brief.<|im_end|>¦\n¦<|im_start|>user\nHow are you?"
        "<|im_end|>¦\n¦<|im_start|>assistant\n⟦很好。<|im_end|>⟧\n¦<|im_start|>user\nGood<|im_end|>"
        "¦\n¦<|im_start|>assistant\n⟦ Indeed!<|im_end|>⟧",
    }[name]
    if learn == "last":
        marked = re.sub(r"⟦(.*?)⟧", r"¦\1¦", marked, count=1)
    check(sample, tokenizer, marked, {eos, "<|im_start|>", "<|im_end|>"})


TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
CALL = {"name": "get_weather", "arguments": {"city": "巴黎"}}
TOOL_TURNS = {
    "system": "Be brief.",
    "tools": json.dumps([TOOL]),
    "conversations": [
        {"from": "human", "value": "天气?"},
        {
            "from": "function_call",
            "value": '{"name": "get_weather", "arguments": {"city": "巴黎"}}',
        },
        {"from": "observation", "value": "sunny"},
        {"from": "observation", "value": "warm"},
        {"from": "gpt", "value": "Sunny and warm."},
    ],
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_masks_of_tool_calls(kind):
    tokenizer = TOKENIZERS[kind]()
    [sample] = make_encoder("chatml", tokenizer).encode([TOOL_TURNS])
    marked = (
        "<|im_start|>system\nBe brief.\n\n# Tools\n\nYou may call one or more functions to assist "
        "with the user query.\n\nYou are provided with function signatures within <tools></tools> "
        'XML tags:\n<tools>\n{"type": "function", "function": {"name": "get_weather", '
        '"parameters": {}}}\n</tools>\n\nFor each function call, return a json object with '
        "function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>¦\n¦'
        "<|im_start|>user\n天气?<|im_end|>¦\n¦<|im_start|>assistant\n"
        '⟦<tool_call>\n{"name": "get_weather", "arguments": {"city": "巴黎"}}\n</tool_call>'
        "<|im_end|>⟧\n¦<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n"
        "<tool_response>\nwarm\n</tool_response><|im_end|>¦\n¦<|im_start|>assistant\n"
        "⟦Sunny and warm.<|im_end|>⟧"
    )
    check(sample, tokenizer, marked, {"<|im_start|>", "<|im_end|>"})


def test_words_before_a_call_and_wrapped_results():
    tokenizer = byte_level()
    call = {"name": "f", "arguments": {}}
    wrapped = "<tool_response>\nsunny\n</tool_response>"
    row = {
        "messages": [
            {"role": "user", "content": "天气?"},
            {"role": "assistant", "content": "I look.", "tool_calls": [call, call]},
            {"role": "tool", "content": wrapped},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "Sunny."},
        ]
    }
    [sample] = make_encoder("chatml", tokenizer).encode([row])
    block = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert [run.text for run in explain(sample, tokenizer) if run.learned] == [
        f"I look.\n{block}\n{block}<|im_end|>",
        "Sunny.<|im_end|>",
    ]
    assert f"user\n{wrapped}<|im_end|>" in tokenizer.decode(sample.input_ids)


def test_the_prompt_after_a_tool_result():
    tokenizer = byte_level()
    encoder = make_encoder("chatml", tokenizer)
    [sample] = encoder.encode([TOOL_TURNS])
    asked = {**TOOL_TURNS, "conversations": TOOL_TURNS["conversations"][:-1]}
    prompt = encoder.prompt(parse(asked, answered=False))
    assert prompt == sample.input_ids[: len(prompt)]
    assert sample.learned[len(prompt) - 1 : len(prompt) + 1] == [False, True]


@pytest.mark.parametrize("row", [TOOL_TURNS, {**MULTI_TURN, "tools": [TOOL]}])
@pytest.mark.parametrize("name", ["human-assistant", "alpaca"])
def test_plain_templates_have_no_words_for_tools(name, row):
    [outcome] = make_encoder(name, byte_level()).encode([row])
    assert outcome.reason == "tools_not_expressible"
    assert "data.template to chatml" in str(outcome)


def test_plain_templates_take_one_system_turn_in_front():
    messages = [MULTI_TURN["messages"][1], *MULTI_TURN["messages"]]
    [outcome] = make_encoder("alpaca", byte_level()).encode([{"messages": messages}])
    assert outcome.reason == "late_system"


def test_a_turn_of_weight_zero_is_read_and_not_learned():
    tokenizer = byte_level()
    messages = [dict(message) for message in MULTI_TURN["messages"]]
    messages[2]["weight"] = 0
    for learn in ("all", "last"):
        [sample] = make_encoder("chatml", tokenizer, learn=learn).encode([{"messages": messages}])
        learned = [run.text for run in explain(sample, tokenizer) if run.learned]
        assert learned == [" Indeed!<|im_end|>"]
    messages[4]["weight"] = 0
    [outcome] = make_encoder("chatml", tokenizer).encode([{"messages": messages}])
    assert outcome == Dropped("no_learned_token", len(sample.input_ids))


# ---- prompts --------------------------------------------------------------------------------


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: text.strip() and "\ufffd" not in text
)
ENCODERS = {
    (name, kind): make_encoder(name, TOKENIZERS[kind]()) for name in BUILT_IN for kind in TOKENIZERS
}


@pytest.mark.parametrize("kind", ["byte_level", "adds_bos", "metaspace"])
@pytest.mark.parametrize("name", BUILT_IN)
@settings(max_examples=40, deadline=None)
@given(texts=st.lists(words, min_size=4, max_size=4))
def test_the_prompt_is_what_training_showed(name, kind, texts):
    encoder = ENCODERS[name, kind]
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
    [sample] = encoder.encode([{"messages": messages}])
    conversation = parse({"messages": messages})
    starts = [i for i in range(1, len(sample.learned)) if sample.learned[i - 1 : i + 1] == [0, 1]]
    for turns, start in zip((1, 3), starts, strict=True):
        asked = conversation._replace(turns=conversation.turns[:turns])
        assert encoder.prompt(asked) == sample.input_ids[:start]
        answered = conversation._replace(turns=conversation.turns[: turns + 1])
        assert encoder.prompt(answered) == sample.input_ids[:start]


def test_a_prompt_that_a_template_cannot_express():
    conversation = parse(
        {**TOOL_TURNS, "conversations": TOOL_TURNS["conversations"][:1]}, answered=False
    )
    with pytest.raises(BadRow, match="no words for tools"):
        make_encoder("alpaca", byte_level()).prompt(conversation)


# ---- control tokens -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", BUILT_IN)
def test_control_tokens_in_words_stay_words(name, kind):
    tokenizer = TOKENIZERS[kind]()
    encoder = make_encoder(name, tokenizer)
    words = "".join(tokenizer.all_special_tokens) + "<|im_end|>"
    plain, spiked = encoder.encode(
        [{"instruction": "a", "output": "b"}, {"instruction": words, "output": words}]
    )
    specials = set(tokenizer.all_special_ids) | set(encoder.stop_ids)
    counts = [[sample.input_ids.count(i) for i in specials] for sample in (plain, spiked)]
    assert counts[0] == counts[1]
    assert tokenizer.decode(spiked.input_ids).replace(" ", "").count(words) == 2


def test_the_tokenizer_is_left_as_it_was():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.enable_truncation(3)
    encoder = make_encoder("human-assistant", tokenizer)
    [sample] = encoder.encode([{"instruction": "Name the capital", "output": "Paris is it."}])
    assert len(sample.input_ids) > 6
    assert not tokenizer.backend_tokenizer.encode_special_tokens


def test_a_control_token_that_cannot_be_escaped():
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=False), "<|im_start|>"])
    encoder = make_encoder("chatml", tokenizer)
    [outcome] = encoder.encode([{"instruction": "What is <|im_end|>?", "output": "An end."}])
    assert outcome.reason == "control_token_in_text"
    assert "<|im_end|>" in str(outcome)


def test_chatml_says_which_tokens_are_new():
    tokenizer = byte_level()
    template = load_template("chatml", tokenizer)
    assert template.new_tokens == ("<|im_start|>", "<|im_end|>")
    size = len(tokenizer)
    assert add_new_tokens(tokenizer, template) == 2
    assert len(tokenizer) == size + 2
    assert load_template("chatml", tokenizer).new_tokens == ()
    assert Encoder(template, tokenizer).stop_ids == (size + 1,)


# ---- length ---------------------------------------------------------------------------------


def test_overlong_rows():
    row = {"instruction": "Name the capital", "output": "The capital of France is Paris."}
    [whole] = make_encoder("human-assistant", byte_level()).encode([row])
    first = whole.learned.index(True)
    assert whole.learned[-1]

    cut = make_encoder("human-assistant", byte_level(), max_length=first + 2)
    assert cut.encode([row]) == [
        Sample(whole.input_ids[: first + 2], [False] * first + [True] * 2, True)
    ]
    none_left = make_encoder("human-assistant", byte_level(), max_length=first)
    assert none_left.encode([row]) == [Dropped("no_learned_token", len(whole.input_ids))]
    drop = make_encoder("human-assistant", byte_level(), max_length=first + 2, overlong="drop")
    assert drop.encode([row]) == [Dropped("overlong", len(whole.input_ids))]
    exact = make_encoder("human-assistant", byte_level(), max_length=len(whole.input_ids))
    assert exact.encode([row]) == [whole]

    refuse = make_encoder("human-assistant", byte_level(), max_length=first + 2, overlong="error")
    with pytest.raises(OverlongError, match=r"row 17 has .*\n.*Name the capital") as caught:
        refuse.encode([row], first_row=17)
    assert f"data.max_length={first + 2}" in str(caught.value)
    assert "data.overlong" in str(caught.value)


def test_outcomes_stand_in_the_order_of_the_rows():
    rows = [{"instruction": "a"}, {"instruction": "a", "output": "b"}, {"text": "c"}]
    outcomes = make_encoder("human-assistant", byte_level()).encode(rows)
    assert [getattr(outcome, "reason", "fine") for outcome in outcomes] == [
        "no_answer",
        "fine",
        "wrong_columns",
    ]
    assert make_encoder("human-assistant", byte_level()).encode([]) == []


# ---- templates and tokenizers that must be refused -------------------------------------------


class Broken:
    """A built-in template whose pieces are changed afterwards."""

    def __init__(self, template, change):
        self._template, self._change = template, change

    def __getattr__(self, name):
        return getattr(self._template, name)

    def render(self, conversation):
        return self._change(self._template.render(conversation))


def drops_end(pieces):
    return pieces[:-1]


def drops_everything_learned(pieces):
    return pieces[:-2]


def learns_user_words(pieces):
    return [pieces[0]._replace(turn=0), *pieces[1:]]


def learns_user_words_as_answer(pieces):
    return [pieces[0], Piece(pieces[0].text, 0), pieces[2]]


def ends_twice(pieces):
    return [*pieces, pieces[-1]]


def learns_what_follows(pieces):
    return [*pieces, Piece("\n", 0)]


def says_the_answer_twice(pieces):
    return [*pieces[:2], *pieces[1:]]


@pytest.mark.parametrize(
    "change",
    [
        drops_end,
        drops_everything_learned,
        learns_user_words,
        learns_user_words_as_answer,
        ends_twice,
        learns_what_follows,
        says_the_answer_twice,
    ],
)
def test_broken_templates_are_refused(change):
    tokenizer = pad_is_eos()
    encoder = Encoder(Broken(load_template("human-assistant", tokenizer), change), tokenizer)
    row = {"instruction": "Name the capital", "output": "Paris"}
    with pytest.raises(MaskError, match=r"data\.template=human-assistant:") as caught:
        encoder.encode([row], first_row=4)
    assert 'row 4: {"instruction": "Name the capital", "output": "Paris"}' in str(caught.value)


def lossy(normalizer):
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.Replace(Regex("[aeiou]"), ""),
        normalizers.Replace("。", ""),
        normalizers.Lowercase(),
        normalizers.Replace("\n", " "),
        normalizers.Replace(" ", ""),
        normalizers.Replace(Regex(".+"), ""),
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    ],
)
def test_tokenizers_that_lose_characters_are_refused(normalizer):
    encoder = make_encoder("human-assistant", lossy(normalizer))
    row = {"instruction": "把", "output": "Café is\ngood。"}
    with pytest.raises(MaskError, match="the mask cannot be proved"):
        encoder.encode([row])


def test_a_tokenizer_that_loses_question_and_answer_is_refused():
    # All questions vanish, so the two answers would become one run of learned tokens.
    encoder = make_encoder(
        "human-assistant", lossy(normalizers.Replace(Regex("\n\nHuman(.|\n)*"), ""))
    )
    with pytest.raises(MaskError, match="2 answers gave 1 runs"):
        encoder.encode([MULTI_TURN])


def test_what_sentencepiece_normalises_is_no_loss():
    tokenizer = metaspace()
    [sample] = make_encoder("human-assistant", tokenizer).encode(
        [{"instruction": "a", "output": " ﬁne　 ½ ①"}]
    )
    assert [run.text for run in explain(sample, tokenizer) if run.learned] == ["fine  1⁄2 1</s>"]


def test_characters_that_the_vocabulary_lacks():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>"
    )
    known, unknown = make_encoder("human-assistant", tokenizer).encode(
        [{"instruction": "b", "output": "aaa"}, {"instruction": "a", "output": "aba"}]
    )
    assert known.input_ids[-4:] == [2, 2, 2, 1]
    assert unknown.reason == "unknown_characters"
    assert "aba" in str(unknown)


def test_a_tokenizer_without_a_rust_backend():
    tokenizer = ByT5Tokenizer(extra_ids=0)
    encoder = make_encoder("chatml", tokenizer)
    [sample] = encoder.encode([{"instruction": "Say </s>", "output": "天 <|im_end|>"}])
    assert explain(sample, tokenizer) == [
        Run("<|im_start|>user\nSay </s><|im_end|>\n<|im_start|>assistant\n", False),
        Run("天 <|im_end|><|im_end|>", True),
    ]
    assert sample.input_ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    assert sample.input_ids.count(tokenizer.eos_token_id) == 0
    assert make_encoder("chatml", ByT5Tokenizer(extra_ids=0)).fingerprint == encoder.fingerprint


# ---- loading and fingerprints ----------------------------------------------------------------


def test_unknown_templates():
    with pytest.raises(UserError, match="did you mean chatml") as caught:
        load_template("chatlm", byte_level())
    assert "allowed: human-assistant, alpaca, chatml, tokenizer, or a Jinja file" in str(
        caught.value
    )


def test_unreadable_template_files(tmp_path):
    (tmp_path / "t.jinja").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "t.jinja", tmp_path / "no.jinja", tmp_path):
        with pytest.raises(UserError, match=f"data.template={re.escape(str(path))}"):
            load_template(str(path), byte_level())


@pytest.mark.parametrize("name", ["human-assistant", "alpaca"])
def test_plain_templates_need_eos(name):
    tokenizer = byte_level()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no eos_token"):
        load_template(name, tokenizer)


def test_fingerprints_follow_everything_that_decides_the_samples():
    def all_of():
        for name in BUILT_IN:
            for make in TOKENIZERS.values():
                yield make_encoder(name, make()).fingerprint
        for options in ({"max_length": 5}, {"overlong": "drop"}, {"learn": "last"}):
            yield make_encoder("chatml", byte_level(), **options).fingerprint
        template = load_template("alpaca", byte_level())
        yield Encoder(replace(template, version=2), byte_level()).fingerprint

    fingerprints = list(all_of())
    assert len(set(fingerprints)) == len(fingerprints)
    assert fingerprints == list(all_of())
    assert all(re.fullmatch("[0-9a-f]{64}", text) for text in fingerprints)


# ---- seeing the mask -------------------------------------------------------------------------


def test_explain_and_token_texts():
    tokenizer = byte_level()
    [sample] = make_encoder("human-assistant", tokenizer).encode(
        [{"instruction": "Name 魑魅", "output": "鱻 is 😀, thank you"}]
    )
    assert explain(sample, tokenizer) == [
        Run("Human: Name 魑魅\n\nAssistant: ", False),
        Run("鱻 is 😀, thank you<|endoftext|>", True),
    ]
    texts = token_texts(sample.input_ids, tokenizer)
    assert len(texts) == len(sample.input_ids)
    assert {"鱻", "魑", "<|endoftext|>", ""} <= set(texts)
    assert "".join(texts) == tokenizer.decode(sample.input_ids)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_token_texts_read_as_the_whole(kind):
    tokenizer = TOKENIZERS[kind]()
    for row in alpaca_rows()[:20]:
        [sample] = make_encoder("human-assistant", tokenizer).encode([row])
        whole = tokenizer.decode(sample.input_ids)
        assert "".join(token_texts(sample.input_ids, tokenizer)) == whole


def test_token_texts_of_a_cut_character():
    tokenizer = byte_level()
    ids = tokenizer("a鱻").input_ids[:-1]
    assert token_texts(ids, tokenizer) == ["a", *[""] * (len(ids) - 2), "\ufffd"]


def test_the_ignored_label_is_what_torch_ignores():
    assert IGNORE == -100
