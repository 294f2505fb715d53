"""What an exported tokenizer's chat template writes is what training showed, word for word."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from test_chat import BUILT_IN, MULTI_TURN, TOOL, TOOL_TURNS, alpaca_rows, make_encoder
from tiny_tokenizers import TOKENIZERS, byte_level, metaspace
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, GenerationConfig, PreTrainedTokenizerFast

from dist_sft.chat import Conversation, Encoder, load_template, parse
from dist_sft.export import write_model_files
from dist_sft.rows import Turn


def bytewise() -> PreTrainedTokenizerFast:
    """One token per byte, so that a whole text encodes as its pieces do; BOS as in Llama-3."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


MAKERS = {**TOKENIZERS, "bytewise": bytewise}
BOS = {"byte_level": "", "pad_is_eos": "", "adds_bos": "<s>", "metaspace": "<s>", "bytewise": "<s>"}


def equip(name, tokenizer):
    """Give the tokenizer its exported form; return the encoder that training uses with it."""
    encoder = make_encoder(name, tokenizer)
    tokenizer.chat_template = encoder.template.chat_template
    return encoder


EQUIPPED = {}
for name in BUILT_IN:
    for kind in MAKERS:
        tokenizer = MAKERS[kind]()
        EQUIPPED[name, kind] = (equip(name, tokenizer), tokenizer)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


def system(text):
    return {"role": "system", "content": text}


PLAIN = {
    "single": [user("Name the capital")],
    "answered": [user("Name the capital"), assistant("Paris")],
    "several turns": MULTI_TURN["messages"],
    "asked again": MULTI_TURN["messages"][:-1],
    "system": [system(" Be brief.\n"), user("天气?")],
    "empty system": [system(""), user("天气?")],
    "unicode": [user("把 魑魅 😀 e\u0301 \u2028"), assistant("鱻。"), user("\u00a0¿\u3000")],
    "white space": [user("\n  a \n\n"), assistant(" \n b\t\n"), user("\tc\n"), assistant("  d  ")],
    "two questions": [user("One"), user("Two"), assistant("Three")],
    "braces": [user("{{ bos_token }} {% if %} {# #}"), assistant("<tool_call> &lt; \" ' \\n")],
    "parts": [user([{"type": "text", "text": " a"}, {"type": "text", "text": "b\n"}])],
    "no content": [system(None), user("a")],
}
CALL = {"name": "f", "arguments": {"city": "巴黎", "days": [1, 2.5, None, True], "<&>": {"b": "'"}}}
BLANK = {"name": "g", "arguments": {}}
NATIVE = {"id": "1", "type": "function", "function": CALL}
WRAPPED = " \n<tool_response>\nsunny\n</tool_response>"


def tool(content):
    return {"role": "tool", "content": content}


CHATML_ONLY = {
    "late system": [user("a"), system(" b\n"), user("c")],
    "a call": [user("天气?"), assistant("", tool_calls=[NATIVE]), tool("sunny")],
    "flat calls": [user("a"), assistant("", tool_calls=[CALL, BLANK]), tool("x"), tool("y\n")],
    "words and call": [user("a"), assistant("I look.", tool_calls=[NATIVE]), tool(WRAPPED)],
    "call and user": [user("a"), assistant(None, tool_calls=[NATIVE]), tool(""), user("b")],
    "results as JSON": [user("a"), assistant("", tool_calls=[NATIVE]), tool({"天": [1, None]})],
    "several rounds": [
        *(user("a"), assistant("", tool_calls=[NATIVE]), tool("b"), tool("c")),
        *(assistant("", tool_calls=[NATIVE]), tool("d"), assistant("e"), user("f")),
    ],
}
TOOLS = [TOOL, {"name": "g", "description": "Gets <&'\"> 气"}]
CASES = {key: (messages, None) for key, messages in PLAIN.items()}
CHATML_CASES = {key: (messages, None) for key, messages in CHATML_ONLY.items()}
CHATML_CASES |= {
    f"{key}, tools": (messages, TOOLS) for key, messages in {**PLAIN, **CHATML_ONLY}.items()
}
ALL_CASES = [(name, *case) for name in BUILT_IN for case in CASES.values()]
ALL_CASES += [("chatml", *case) for case in CHATML_CASES.values()]
IDS = [f"{name}: {key}" for name in BUILT_IN for key in CASES]
IDS += [f"chatml: {key}" for key in CHATML_CASES]


def read(messages, tools=None):
    return parse({"messages": messages, "tools": tools}, "messages", answered=False)


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


def check_text(name, kind, messages, tools=None, conversation=None):
    encoder, tokenizer = EQUIPPED[name, kind]
    conversation = conversation or read(messages, tools)

    def rendered(**options):
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)

    if messages[-1]["role"] == "assistant":
        assert rendered() == BOS[kind] + text_of(encoder.template.render(conversation))
    else:
        asked = rendered(add_generation_prompt=True)
        assert asked == BOS[kind] + text_of(encoder.template.prompt(conversation))
        assert asked.startswith(rendered())


@pytest.mark.parametrize(("name", "messages", "tools"), ALL_CASES, ids=IDS)
def test_the_text_is_what_training_showed(name, messages, tools):
    for kind in MAKERS:
        check_text(name, kind, messages, tools)


@pytest.mark.parametrize("name", BUILT_IN)
def test_alpaca_rows_with_their_input_in_the_content(name):
    rows = alpaca_rows()
    assert any(row["input"] for row in rows)
    for row in rows:
        conversation = parse(row)
        messages = [{"role": t.role, "content": t.text} for t in conversation.turns]
        if name == "alpaca":  # the wording "### Input:" has no place in messages
            conversation = read(messages)
        check_text(name, "adds_bos", messages, conversation=conversation)


def test_rows_of_every_shape_with_tools():
    conversation = parse(TOOL_TURNS)
    messages = []
    for turn in conversation.turns:
        calls = [{"function": call._asdict()} for call in turn.tool_calls]
        messages.append({"role": turn.role, "content": turn.content, "tool_calls": calls})
    check_text("chatml", "metaspace", messages, list(conversation.tools), conversation)


words = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.mark.parametrize("name", BUILT_IN)
@settings(max_examples=100, deadline=None)
@given(texts=st.lists(words, min_size=1, max_size=6), starts_with_system=st.booleans())
def test_any_words(name, texts, starts_with_system):
    roles = ["system"] * starts_with_system + ["user", "assistant"] * 3
    turns = [Turn(role, text) for role, text in zip(roles, texts, strict=False)]
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    check_text(name, "adds_bos", messages, conversation=Conversation(tuple(turns)))


# ---- tokens ---------------------------------------------------------------------------------


def ids_of(tokenizer, messages, tools=None):
    return tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, return_dict=False
    )


@pytest.mark.parametrize(("name", "messages", "tools"), ALL_CASES, ids=IDS)
def test_the_tokens_are_what_training_showed(name, messages, tools):
    """Compare where pieces encode as the whole does.

    That is always so with one token per byte. Elsewhere merges can cross the border between an
    earlier answer and what is before it: `templates._read_chat_template` says what that means.
    """
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    merges = any(message["role"] == "assistant" for message in asked)
    for kind in ["bytewise"] if merges else MAKERS:
        encoder, tokenizer = EQUIPPED[name, kind]
        prompt = encoder.prompt(read(messages, tools))
        assert ids_of(tokenizer, asked, tools) == prompt
        assert prompt.count(tokenizer.bos_token_id) == (BOS[kind] != "")


def test_an_earlier_answer_may_merge_with_the_cue():
    tokenizer = byte_level()
    encoder = equip("human-assistant", tokenizer)
    messages = [user("Name it"), assistant("is Paris"), user("Sure?")]
    trained, served = encoder.prompt(read(messages)), ids_of(tokenizer, messages)
    assert trained != served
    assert tokenizer.decode(trained) == tokenizer.decode(served)
    cue = tokenizer("\n\nAssistant: ").input_ids
    assert trained[-len(cue) :] == served[-len(cue) :] == cue


def test_sentencepiece_may_want_its_mark_before_the_whole_text_only():
    tokenizer = metaspace()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    encoder = equip("alpaca", tokenizer)
    trained, served = encoder.prompt(read(PLAIN["single"])), ids_of(tokenizer, PLAIN["single"])
    assert trained != served
    assert tokenizer.decode(trained).replace("<s> ", "<s>") == tokenizer.decode(served)


def test_bos_that_opens_every_turn():
    tokenizer = bytewise()
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    encoder = equip("chatml", tokenizer)
    prompt = encoder.prompt(read(PLAIN["single"]))
    assert prompt[0] == bos != prompt[1]
    assert ids_of(tokenizer, PLAIN["single"]) == prompt


# ---- what has no words ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["human-assistant", "alpaca"])
@pytest.mark.parametrize(
    ("messages", "tools", "problem"),
    [
        (CHATML_ONLY["a call"], None, "no words for tool_calls"),
        ([user("a"), tool("b")], None, "no words for the role tool"),
        (PLAIN["single"], TOOLS, "no words for tools"),
        (CHATML_ONLY["late system"], None, "one system turn, at the start"),
        ([user("a </s> b")], None, "control token </s>"),
    ],
)
def test_plain_templates_refuse(name, messages, tools, problem):
    _, tokenizer = EQUIPPED[name, "adds_bos"]
    with pytest.raises(TemplateError, match=problem):
        ids_of(tokenizer, messages, tools)


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([{"role": "critic", "content": "a"}], "no words for the role critic"),
        ([{"content": "a"}], "no words for the role"),
        ([user([{"type": "image", "image": "a.png"}])], "content must be text"),
        ([user({"a": 1})], "content must be text"),
        ([user("a"), assistant("b", reasoning_content="c")], "no words for reasoning_content"),
        ([user("a"), assistant("", function_call=CALL)], "no words for function_call"),
    ],
)
def test_every_template_refuses(name, messages, problem):
    _, tokenizer = EQUIPPED[name, "adds_bos"]
    with pytest.raises(TemplateError, match=problem):
        ids_of(tokenizer, messages)


@pytest.mark.parametrize("control", ["<|im_start|>", "<|im_end|>"])
def test_chatml_refuses_control_tokens(control):
    _, tokenizer = EQUIPPED["chatml", "adds_bos"]
    call = {"name": "f", "arguments": {"a": control}}
    for messages, tools in (
        ([user(control)], None),
        ([system(control), user("a")], TOOLS),
        ([user("a")], [{"name": "f", "description": control}]),
        ([user("a"), assistant("", tool_calls=[call]), tool("b")], None),
        ([user("a"), assistant("", tool_calls=[CALL]), tool(control)], None),
    ):
        with pytest.raises(TemplateError, match="control token"):
            ids_of(tokenizer, messages, tools)


def test_chatml_refuses_arguments_as_text():
    _, tokenizer = EQUIPPED["chatml", "adds_bos"]
    call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    with pytest.raises(TemplateError, match="must be an object, not JSON text"):
        ids_of(tokenizer, [user("a"), assistant("", tool_calls=[call]), tool("b")])


# ---- other templates, and the exported folder ------------------------------------------------


JINJA = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def export(folder: Path, tokenizer, template):
    module = SimpleNamespace(
        config=SimpleNamespace(save_pretrained=lambda folder: None),
        generation_config=GenerationConfig(),
        named_parameters=lambda remove_duplicate: [],
        state_dict=dict,
    )
    folder.mkdir()
    write_model_files(folder, module, tokenizer, [1], template.chat_template, {})
    return AutoTokenizer.from_pretrained(folder)


def test_a_file_is_exported_as_it_is(tmp_path):
    (tmp_path / "t.jinja").write_text(JINJA)
    tokenizer = byte_level()
    tokenizer.chat_template = "other"
    exported = export(
        tmp_path / "out", tokenizer, load_template(str(tmp_path / "t.jinja"), tokenizer)
    )
    assert exported.chat_template == JINJA
    assert tokenizer.chat_template == "other"


def test_the_tokenizers_own_template_stays(tmp_path):
    tokenizer = byte_level()
    tokenizer.chat_template = {"default": JINJA, "tool_use": f"{JINJA} "}
    template = load_template("tokenizer", tokenizer)
    assert template.chat_template is None
    exported = export(tmp_path / "out", tokenizer, template)
    assert exported.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("make", [*TOKENIZERS.values(), lambda: ByT5Tokenizer(extra_ids=0)])
@pytest.mark.parametrize("name", BUILT_IN)
def test_the_exported_tokenizer(name, make, tmp_path):
    tokenizer = make()
    tokenizer.chat_template = {"default": JINJA, "tool_use": JINJA}
    encoder = make_encoder(name, tokenizer)
    exported = export(tmp_path / "out", tokenizer, encoder.template)
    assert exported.chat_template == encoder.template.chat_template
    assert tokenizer.chat_template == {"default": JINJA, "tool_use": JINJA}
    assert ids_of(exported, PLAIN["system"]) == encoder.prompt(read(PLAIN["system"]))


@pytest.mark.parametrize("name", BUILT_IN)
def test_training_goes_on_from_an_exported_tokenizer(name, tmp_path):
    """`data.template: tokenizer` finds the same answers in the exported template."""
    tokenizer = bytewise()
    first = make_encoder(name, tokenizer)
    exported = export(tmp_path / "out", tokenizer, first.template)
    second = Encoder(load_template("tokenizer", exported), exported)
    assert second.stop_ids == first.stop_ids
    rows = [MULTI_TURN, *alpaca_rows()]
    if name == "chatml":
        rows.append(TOOL_TURNS)
    if name == "alpaca":
        rows = [row for row in rows if not row.get("input")]
    assert second.encode(rows) == first.encode(rows)
