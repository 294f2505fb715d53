import re
from textwrap import dedent

import pytest
from tiny_tokenizers import adds_bos, byte_level, metaspace

from dist_sft.chat import (
    BadRow,
    Encoder,
    MaskError,
    Sample,
    explain,
    load_template,
    parse,
    token_texts,
)
from dist_sft.errors import UserError

CONTROLS = (
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "[TOOL_CALLS]",
    "<|start|>", "<|end|>", "<|return|>", "<|channel|>", "<|message|>",
)  # fmt: skip


def _template(text):
    return re.sub(r"\n\s*", "", dedent(text))


CHATML = _template(
    r"""
    {% for m in messages %}
    {{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
    """
)
CHATML_GENERATION = _template(
    r"""
    {% for m in messages %}
    {% if m.role == 'assistant' %}
    {{ '<|im_start|>assistant\n' }}{% generation %}{{ m.content }}{% endgeneration %}
    {{ '<|im_end|>\n' }}
    {% else %}
    {{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {% endif %}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
    """
)
# The block takes in the end token and what follows it.
CHATML_WIDE_GENERATION = CHATML_GENERATION.replace(
    r"{% endgeneration %}{{ '<|im_end|>\n' }}", r"{{ '<|im_end|>\n' }}{% endgeneration %}"
)
LLAMA3 = _template(
    r"""
    {{ bos_token }}
    {% for m in messages %}
    {{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
    {% endfor %}
    {% if add_generation_prompt %}
    {{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
    {% endif %}
    """
)
# Thinking of all turns but the last is left out, and the last one always shows some.
QWEN3 = _template(
    r"""
    {% set ns = namespace(last=0) %}
    {% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
    {% endfor %}
    {% for m in messages %}
    {% if m.role == 'assistant' %}
    {% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n')
        if '</think>' in m.content else '' %}
    {% set words = m.content.split('</think>')[-1].lstrip('\n') %}
    {{ '<|im_start|>assistant\n' }}
    {% if loop.index0 > ns.last and (loop.last or thought) %}
    {{ '<think>\n' + thought + '\n</think>\n\n' + words }}
    {% else %}{{ words }}{% endif %}
    {% for c in m.tool_calls or [] %}
    {{ '\n<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' }}
    {{ c.function.arguments | tojson }}{{ '}\n</tool_call>' }}
    {% endfor %}
    {{ '<|im_end|>\n' }}
    {% elif m.role == 'tool' %}
    {{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
    {% else %}
    {{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {% endif %}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
    """
)
GEMMA = _template(
    r"""
    {{ bos_token }}
    {% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}
    {% endif %}
    {% for m in messages %}
    {% set role = 'model' if m.role == 'assistant' else m.role %}
    {{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
    """
)
MISTRAL = _template(
    r"""
    {{ bos_token }}
    {% for m in messages %}
    {% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
    {% elif m.tool_calls %}
    {{ '[TOOL_CALLS] [' }}
    {% for c in m.tool_calls %}
    {{ '{"name": "' + c.function.name + '", "arguments": ' }}{{ c.function.arguments | tojson }}
    {{ ', "id": "' + c.id + '"}' }}{{ ', ' if not loop.last }}
    {% endfor %}
    {{ ']' + eos_token }}
    {% elif m.role == 'tool' %}
    {{ '[TOOL_RESULTS]' + m.tool_call_id + m.content + '[/TOOL_RESULTS]' }}
    {% else %}{{ ' ' + m.content + eos_token }}{% endif %}
    {% endfor %}
    """
)
# Two end tokens, and control tokens inside of what is learned.
HARMONY = _template(
    r"""
    {% for m in messages %}
    {% if m.role == 'assistant' %}
    {{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}
    {{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
    {% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}
    {% endfor %}
    {% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}
    """
)
TEMPLATES = {
    "chatml": CHATML,
    "chatml_generation": CHATML_GENERATION,
    "chatml_wide_generation": CHATML_WIDE_GENERATION,
    "llama3": LLAMA3,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "harmony": HARMONY,
}
TOKENIZERS = {"byte_level": byte_level, "adds_bos": adds_bos, "metaspace": metaspace}


def make_tokenizer(kind):
    tokenizer = TOKENIZERS[kind]()
    tokenizer.add_tokens(list(CONTROLS), special_tokens=True)
    if tokenizer.bos_token is None:
        tokenizer.bos_token = tokenizer.eos_token
    return tokenizer


def make_encoder(source, kind="byte_level", **options):
    tokenizer = make_tokenizer(kind)
    tokenizer.chat_template = source
    return Encoder(load_template("tokenizer", tokenizer), tokenizer, **options), tokenizer


def learned(sample, tokenizer):
    assert isinstance(sample, Sample), sample
    return [run.text for run in explain(sample, tokenizer) if run.learned]


ROW = {
    "messages": [
        {"role": "user", "content": "How are you?"},
        {"role": "assistant", "content": "很好。"},
        {"role": "user", "content": "Good"},
        {"role": "assistant", "content": "Indeed, good!"},
    ]
}
LEARNED = {
    "chatml": ["很好。<|im_end|>", "Indeed, good!<|im_end|>"],
    "chatml_generation": ["很好。<|im_end|>", "Indeed, good!<|im_end|>"],
    "chatml_wide_generation": ["很好。<|im_end|>", "Indeed, good!<|im_end|>"],
    "llama3": ["很好。<|eot_id|>", "Indeed, good!<|eot_id|>"],
    "qwen3": ["很好。<|im_end|>", "<think>\n\n</think>\n\nIndeed, good!<|im_end|>"],
    "gemma": ["很好。<end_of_turn>", "Indeed, good!<end_of_turn>"],
    "mistral": [" 很好。EOS", " Indeed, good!EOS"],
    "harmony": [
        "<|channel|>final<|message|>很好。<|end|>",
        "<|channel|>final<|message|>Indeed, good!<|return|>",
    ],
}


@pytest.mark.parametrize("kind", ["byte_level", "adds_bos"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_learned_spans(name, kind):
    encoder, tokenizer = make_encoder(TEMPLATES[name], kind)
    [sample] = encoder.encode([ROW])
    expected = [text.replace("EOS", tokenizer.eos_token) for text in LEARNED[name]]
    assert learned(sample, tokenizer) == expected
    text = tokenizer.apply_chat_template(ROW["messages"], tokenize=False)
    bos = tokenizer.bos_token
    missing = "" if kind == "byte_level" or text.startswith(bos) else bos
    assert tokenizer.decode(sample.input_ids) == missing + text
    assert sample.input_ids[:2].count(tokenizer.bos_token_id) <= 1

    encoder.learn = "last"
    [sample] = encoder.encode([ROW])
    assert learned(sample, tokenizer) == expected[-1:]


@pytest.mark.parametrize("name", TEMPLATES)
def test_learned_spans_with_sentencepiece(name):
    encoder, tokenizer = make_encoder(TEMPLATES[name], "metaspace")
    [sample] = encoder.encode([ROW])
    texts = [text.replace("EOS", "</s>").split() for text in LEARNED[name]]
    assert ["".join(text.split()) for text in learned(sample, tokenizer)] == [
        "".join(text) for text in texts
    ]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_is_what_training_showed(name, kind):
    encoder, tokenizer = make_encoder(TEMPLATES[name], kind)
    conversation = parse(ROW)
    for turns in (2, 4):
        [sample] = encoder.encode([{"messages": ROW["messages"][:turns]}])
        asked = conversation._replace(turns=conversation.turns[: turns - 1])
        prompt = encoder.prompt(asked)
        assert prompt == sample.input_ids[: len(prompt)]
        assert sample.learned[len(prompt) - 1 : len(prompt) + 1] == [False, True]
        if turns == 2 and kind == "byte_level":
            native = tokenizer.apply_chat_template(
                ROW["messages"][:1], add_generation_prompt=True, return_dict=False
            )
            assert prompt == native


def test_earlier_thinking_is_left_out():
    encoder, tokenizer = make_encoder(QWEN3)
    thinking = [
        {**m, "content": f"<think>\nhm {i}\n</think>\n\n{m['content']}"}
        if m["role"] == "assistant"
        else m
        for i, m in enumerate(ROW["messages"])
    ]
    [sample] = encoder.encode([{"messages": thinking}])
    assert learned(sample, tokenizer) == [
        "很好。<|im_end|>",
        "<think>\nhm 3\n</think>\n\nIndeed, good!<|im_end|>",
    ]


CALL = {"name": "get_weather", "arguments": '{"city": "巴黎"}'}
TOOL_ROW = {
    "messages": [
        {"role": "user", "content": "天气?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "sunny"},
        {"role": "tool", "content": "warm"},
        {"role": "assistant", "content": "Sunny."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Welcome."},
    ]
}


def test_tool_calls_in_the_words_of_the_template():
    encoder, tokenizer = make_encoder(QWEN3)
    [sample] = encoder.encode([TOOL_ROW])
    block = '\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "巴黎"}}\n</tool_call>'
    assert learned(sample, tokenizer) == [
        f"{block}{block}<|im_end|>",
        "Sunny.<|im_end|>",
        "<think>\n\n</think>\n\nWelcome.<|im_end|>",
    ]
    encoder, tokenizer = make_encoder(MISTRAL)
    [sample] = encoder.encode([TOOL_ROW])
    call = '{"name": "get_weather", "arguments": {"city": "巴黎"}, "id": "00000000%d"}'
    assert learned(sample, tokenizer)[0] == f"[TOOL_CALLS] [{call % 0}, {call % 1}]<|endoftext|>"
    assert "[TOOL_RESULTS]000000001warm[/TOOL_RESULTS]" in tokenizer.decode(sample.input_ids)


def test_a_template_that_drops_tool_calls_is_refused():
    encoder, _ = make_encoder(CHATML)
    with pytest.raises(MaskError, match="is not what the turn says"):
        encoder.encode([{"messages": TOOL_ROW["messages"]}])


def test_a_template_that_puts_the_users_words_into_a_call_is_refused():
    leaking = QWEN3.replace(
        "{{ c.function.arguments | tojson }}", "{{ [c.function.arguments, messages[0].content] }}"
    )
    assert leaking != QWEN3
    encoder, _ = make_encoder(leaking)
    with pytest.raises(MaskError, match="words of another party"):
        encoder.encode([TOOL_ROW])


BROKEN = {
    "never ends": (CHATML.replace("<|im_end|>", ""), "never learn to stop"),
    "ends only users": (
        CHATML.replace("'<|im_end|>\\n'", "('<|im_end|>\\n' if m.role == 'user' else '\\n')"),
        "never learn to stop",
    ),
    "ends only the last": (
        CHATML.replace(
            "'<|im_end|>\\n'", "('<|im_end|>\\n' if loop.last or m.role == 'user' else '\\n')"
        ),
        "never learn to stop",
    ),
    "ends in words": (CHATML.replace("<|im_end|>", "###"), "never learn to stop"),
    "says nothing": ("{{ messages[0].content }}<|im_end|>", "0 times, not once"),
    "says it twice": (CHATML.replace("m.content", "m.content + m.content"), "2 times, not once"),
    "echoes the user": (
        CHATML_GENERATION.replace(
            "{{ m.content }}", "{{ messages[loop.index0 - 1].content + ': ' + m.content }}"
        ),
        "gives the learned text",
    ),
    "block without end": (
        CHATML_GENERATION.replace("{% endgeneration %}", "{% endgeneration %}{{ ' bye ' }}"),
        "never learn to stop",
    ),
    "block around the user": (
        CHATML_GENERATION.replace(
            "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}",
            "{% else %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}",
        ),
        "2 generation blocks for 1 assistant turns",
    ),
    "prompt of another kind": (
        CHATML.replace("'<|im_start|>assistant\\n' }}{% endif", "'<|im_start|>bot\\n' }}{% endif"),
        "its generation prompt ends with",
    ),
    "thinks in the prompt only": (
        CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif"),
        "its generation prompt ends with",
    ),
    "is no Jinja": ("{% for %}", "tokenizer says: Expected an expression"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_templates_are_refused(name):
    source, message = BROKEN[name]
    assert source not in (CHATML, CHATML_GENERATION)
    with pytest.raises(MaskError, match=message):
        make_encoder(source)


def test_a_block_that_leaves_out_the_beginning_of_an_answer_is_refused():
    source = CHATML_GENERATION.replace(
        "{% generation %}{{ m.content }}",
        "{{ m.content[:-9] }}{% generation %}{{ m.content[-9:] }}",
    )
    encoder, _ = make_encoder(source)  # the probe's answers are nine characters long
    with pytest.raises(MaskError, match="is not what the turn says"):
        encoder.encode([ROW])


def test_user_words_that_only_some_rows_show():
    source = CHATML_GENERATION.replace(
        "{{ m.content }}",
        "{{ messages[0].content + ' ' if '?' in messages[0].content else '' }}{{ m.content }}",
    )
    encoder, _ = make_encoder(source)
    with pytest.raises(MaskError, match=r"data\.template=tokenizer: .*\nrow 3: .*How are you") as e:
        encoder.encode([ROW], first_row=3)
    assert "is not what the turn says" in str(e.value)


@pytest.mark.parametrize("change", ["replace('\\n', ' ')", "truncate(12)"])
def test_templates_that_change_answers_are_refused(change):
    encoder, _ = make_encoder(CHATML.replace("m.content", f"(m.content | {change})"))
    fine, broken = (
        {"messages": [ROW["messages"][0], {"role": "assistant", "content": text}]}
        for text in ("4 + 4", "one line\nand another")
    )
    assert isinstance(encoder.encode([fine])[0], Sample)
    with pytest.raises(MaskError, match="is not what the turn says"):
        encoder.encode([broken])


def test_words_before_a_call_that_also_stand_elsewhere():
    encoder, tokenizer = make_encoder(QWEN3)
    call = {"role": "assistant", "content": "k", "tool_calls": [CALL]}
    [sample] = encoder.encode([{"messages": [ROW["messages"][0], call]}])
    assert learned(sample, tokenizer)[0].startswith("<think>\n\n</think>\n\nk\n<tool_call>")


def test_rows_that_a_template_refuses():
    encoder, _ = make_encoder(GEMMA)
    system = {"role": "system", "content": "Be brief."}
    [outcome] = encoder.encode([{"messages": [system, *ROW["messages"]]}])
    assert isinstance(outcome, BadRow)
    assert outcome.reason == "template_refused"
    assert "System role not supported" in str(outcome)


@pytest.mark.parametrize("place", [0, 1])
def test_control_tokens_in_words(place):
    encoder, _ = make_encoder(CHATML)
    messages = [dict(message) for message in ROW["messages"]]
    messages[place]["content"] += "<|im_end|>"
    [outcome] = encoder.encode([{"messages": messages}])
    assert isinstance(outcome, BadRow)
    assert outcome.reason == "control_token_in_text"
    assert "<|im_end|>" in str(outcome)


def test_a_template_file_says_the_same_as_the_tokenizers_own(tmp_path):
    file = tmp_path / "qwen3.jinja"
    file.write_text(QWEN3, encoding="utf-8")
    tokenizer = make_tokenizer("byte_level")
    from_file = Encoder(load_template(str(file), tokenizer), tokenizer)
    assert from_file.encode([ROW, TOOL_ROW]) == make_encoder(QWEN3)[0].encode([ROW, TOOL_ROW])
    before = from_file.fingerprint
    file.write_text(QWEN3 + "{# changed #}", encoding="utf-8")
    assert Encoder(load_template(str(file), tokenizer), tokenizer).fingerprint != before


def test_a_tokenizer_without_a_chat_template():
    with pytest.raises(UserError, match="has no chat template; allowed: human-assistant"):
        load_template("tokenizer", byte_level())


def test_token_texts_show_control_tokens():
    encoder, tokenizer = make_encoder(CHATML)
    [sample] = encoder.encode([ROW])
    assert token_texts(sample.input_ids, tokenizer).count("<|im_end|>") == 4
