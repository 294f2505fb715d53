"""Stop strings and streams, wherever the borders between tokens and characters are."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_model import BEGIN, ScriptedModel, saying
from tiny_tokenizers import byte_level, metaspace
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dist_sft.decode import Answer, Decoder, Request
from dist_sft.sampling import Sampling
from dist_sft.stop_strings import BROKEN, StopStrings
from dist_sft.tokens import decode

TOKENIZERS = {"byte_level": byte_level(), "metaspace": metaspace()}
BYTE_TOKENS = {
    "byte_level": [bytes_to_unicode()[byte] for byte in range(256)],
    "metaspace": [f"<0x{byte:02X}>" for byte in range(256)],
}
PLAIN = st.characters(exclude_categories=["Cs", "Cc", "Cn"], exclude_characters=BROKEN)
TEXTS = st.text(PLAIN, max_size=30) | st.text("ab 好。🙂é", max_size=30)
patient = settings(deadline=None)


def in_bytes(kind: str, said: bytes) -> list[int]:
    """Return a token per byte."""
    ids: list[int] = TOKENIZERS[kind].convert_tokens_to_ids([BYTE_TOKENS[kind][b] for b in said])
    return ids


def text_of(kind: str) -> Callable[[list[int]], str]:
    return lambda ids: decode(ids, TOKENIZERS[kind])


def answered(kind: str, ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[Answer, list[str]]:
    """Let a model say `ids`; return the answer and the pieces of a stream of it."""
    tokenizer: PreTrainedTokenizerFast = TOKENIZERS[kind]
    end = len(tokenizer)
    model = ScriptedModel(saying([ids], end), end + 1)
    decoder = Decoder(model, [end], Sampling(1000, stop=tuple(stop)), text_of(kind))  # type: ignore
    request = Request([1, BEGIN])
    return decoder.answer([request], 1)[0], list(decoder.stream(request))


@patient
@given(st.sampled_from(sorted(TOKENIZERS)), TEXTS, st.booleans(), st.data())
def test_an_answer_ends_before_the_first_stop_string(
    kind: str, text: str, bytewise: bool, data: st.DataObject
) -> None:
    """Its own words or others, one or two; streams never show a part of one."""
    within = st.integers(0, max(0, len(text) - 1)).flatmap(
        lambda start: st.integers(1, 6).map(lambda n: text[start : start + n] or "x")
    )
    stop = data.draw(st.lists(within | st.text(PLAIN, min_size=1, max_size=3), max_size=2))
    tokenizer = TOKENIZERS[kind]
    ids = in_bytes(kind, text.encode()) if bytewise else tokenizer.encode(text)
    answer, pieces = answered(kind, ids, stop)
    # Token by token, in full, without looking at tails.
    texts = [text_of(kind)(ids[:n]) for n in range(len(ids) + 1)]
    ends = [n for n, said in enumerate(texts) if any(x in said for x in stop)]
    if ends:
        said = texts[ends[0]]
        assert answer.text == said[: min(said.find(x) for x in stop if x in said)]
        assert answer == Answer(answer.text, list(ids[: ends[0]]), "stop")
    else:
        assert answer == Answer(texts[-1], list(ids), "eos")
    assert "".join(pieces) == answer.text
    assert "" not in pieces


@patient
@given(st.binary(max_size=40), st.data())
def test_a_stream_of_broken_bytes_is_the_answer(said: bytes, data: st.DataObject) -> None:
    answer, pieces = answered("byte_level", in_bytes("byte_level", said))
    assert answer.text == said.decode(errors="replace")
    assert "".join(pieces) == answer.text


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_stream_shows_a_character_when_it_is_whole(kind: str) -> None:
    said = "是🙂ok"
    _, pieces = answered(kind, in_bytes(kind, said.encode()))
    assert pieces == list(said)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("before", range(20))
def test_a_stop_string_far_into_text_that_is_spelled_in_bytes(kind: str, before: int) -> None:
    """Whatever byte of a character the newest tokens begin with."""
    text = "x" * (before % 4) + "好" * before
    answer, pieces = answered(kind, in_bytes(kind, (text + "。毒 more").encode()), ["。毒"])
    assert (answer.text, answer.reason) == (text, "stop")
    assert len(answer.ids) == len((text + "。毒").encode())
    assert "".join(pieces) == text


def test_stop_strings_at_the_first_token_and_of_many_tokens() -> None:
    ids = TOKENIZERS["byte_level"].encode("Paris. Human: more")
    first = text_of("byte_level")(ids[:1])
    answer, pieces = answered("byte_level", ids, [first])
    assert (answer, pieces) == (Answer("", list(ids[:1]), "stop"), [])
    answer, pieces = answered("byte_level", ids, ["\nHuman", " Human:"])
    assert (answer.text, answer.reason, "".join(pieces)) == ("Paris.", "stop", "Paris.")
    assert len(ids) > len(answer.ids) > 3


def test_of_two_stop_strings_in_one_token_the_earlier_one_counts() -> None:
    spoken = {5: "one", 6: "axyzb"}
    stops = StopStrings(["y", "xyz", "b"], lambda ids: "".join(spoken[i] for i in ids))
    assert stops.cut([5]) is None
    assert stops.cut([5, 6]) == "onea"


def test_tokens_without_text_hide_no_stop_string() -> None:
    spoken = {3: "", 4: "EN", 5: "D"}
    stops = StopStrings(["END"], lambda ids: "".join(spoken[i] for i in ids))
    assert stops.cut([4, *[3] * 100]) is None
    assert stops.cut([4, *[3] * 100, 5]) == ""


def test_long_answers_are_not_decoded_again_for_every_token() -> None:
    decoded = 0

    def text(ids: list[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return "a" * len(ids)

    stops = StopStrings(["END"], text)
    ids: list[int] = []
    for _ in range(500):
        ids.append(1)
        assert stops.cut(ids) is None
    assert decoded < 500 * 12


@pytest.mark.parametrize(
    ("text", "sure"),
    [("say EN", "say "), ("say E", "say "), ("say ENG", "say ENG"), ("好\ufffd", "好"), ("", "")],
)
def test_what_may_begin_a_stop_string_is_held_back(text: str, sure: str) -> None:
    assert StopStrings(["END", "\nHuman"], str).sure(text) == sure
    assert StopStrings([], str).sure(text) == text.rstrip(BROKEN)
