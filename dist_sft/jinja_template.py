"""Chat templates in Jinja, as Hugging Face tokenizers carry them: where the assistant's words are.

Such a template gives one text. The learned spans are found from outside: an answer begins where
the generation prompt ends and stops after the first end token. What ends a turn, and what the
template adds before an answer, is learned once from a probe of known words.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dist_sft.row_fields import BadRow
from dist_sft.rows import Conversation, Turn
from dist_sft.templates import MaskError, Piece, fingerprint
from dist_sft.tokens import control_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
QUESTIONS = ("Qprobeone", "Qprobetwo")
ANSWERS = ("Aprobeone", "Aprobetwo")
SENTINEL = "Xsentinelx"

Message = dict[str, Any]


class Span(NamedTuple):
    """Where one answer lies in the text: words from `start` to `end`, end token up to `stop`."""

    prompt_end: int
    start: int
    end: int
    stop: int


class JinjaTemplate:
    """Find the assistant's words in what a Jinja chat template renders.

    `source` is None for the tokenizer's own template. Raises MaskError for a template that does
    not end the assistant's turns with a control token, or whose spans hold other words.
    """

    escapes = False
    new_tokens: tuple[str, ...] = ()

    def __init__(self, name: str, source: str | None, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.name = name
        self._source = source
        self._tokenizer = tokenizer
        controls = sorted(map(re.escape, control_tokens(tokenizer)), key=len, reverse=True)
        self._control = re.compile("|".join(controls) or r"(?!)")
        self.fingerprint = fingerprint(name == "tokenizer", source or tokenizer.chat_template)
        self.words_fingerprint = fingerprint(source or tokenizer.chat_template)
        self.end_tokens = self._find_end_tokens()
        self._end = re.compile("|".join(map(re.escape, sorted(self.end_tokens))))
        self._additions = self._find_additions()

    @property
    def chat_template(self) -> str | None:
        """Give the text of the file; None for the tokenizer's own."""
        return self._source

    def render(self, conversation: Conversation) -> list[Piece]:
        """Render for training; raises MaskError where the spans cannot be found."""
        messages = self._messages(conversation)
        text, blocks = self._text(messages, conversation.tools)
        spans = self._spans(messages, conversation.tools, text, blocks)
        if any(turn.tool_calls for turn in conversation.turns):
            self._check_other_words(messages, conversation.tools, text, spans)
        return list(_pieces(text, spans))

    def prompt(self, conversation: Conversation) -> list[Piece]:
        """Render up to where the assistant begins to speak."""
        messages = self._messages(conversation)
        text, blocks = self._text(messages, conversation.tools, generation_prompt=True)
        spans = self._spans(messages, conversation.tools, text, blocks)
        return list(_pieces(text, spans))

    def produces(self, turn: Turn, text: str) -> bool:
        """Tell whether `text` is the turn's words, after nothing but what the probe showed.

        Templates trim words, and write thinking with other white space or leave it out. Tool calls
        follow in the template's own words, with the tools' names in order.
        """
        thought, mark, words = turn.text.rpartition("</think>")
        words = words.strip()
        leads = {
            a + thinking for a in self._additions for thinking in ("", _squash(thought + mark))
        }
        if not turn.tool_calls:
            said = text.rstrip()
            return said.endswith(words) and _squash(said.removesuffix(words)) in leads
        names = re.compile(".*".join(re.escape(call.name) for call in turn.tool_calls), re.DOTALL)
        return any(
            _squash(text[: found.start()]) in leads and names.search(text, found.end())
            for found in re.finditer(re.escape(words), text)
        )

    # ---- rendering ---------------------------------------------------------------------------

    def _text(
        self, messages: list[Message], tools: Sequence[Any], *, generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """Return the text, and the generation blocks of a template that marks them."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            source = self._tokenizer.get_chat_template(self._source, list(tools) or None)
            marked = GENERATION_BLOCK.search(source) is not None
            if not marked:
                text = self._tokenizer.apply_chat_template(
                    messages,
                    tools=list(tools) or None,
                    chat_template=self._source,
                    add_generation_prompt=generation_prompt,
                    tokenize=False,
                )
                assert isinstance(text, str)
                return text, None
            # `apply_chat_template` gives the blocks as tokens only, of another encoding than ours.
            texts, blocks = render_jinja_template(
                [messages],
                tools=list(tools) or None,
                chat_template=source,
                return_assistant_tokens_mask=True,
                add_generation_prompt=generation_prompt,
                **self._tokenizer.special_tokens_map,
            )
            return texts[0], blocks[0]
        except Exception as error:  # the template is somebody's program: it may raise anything
            raise BadRow(
                "template_refused", f"the chat template {self.name} says: {error}"
            ) from error

    def _messages(self, conversation: Conversation) -> list[Message]:
        """Write the conversation in OpenAI's form, calls and results matched by number."""
        messages: list[Message] = []
        open_calls: list[Message] = []
        num_calls = 0
        for turn in conversation.turns:
            message: Message = {"role": turn.role, "content": turn.text}
            if turn.tool_calls:
                open_calls = [
                    {
                        "id": f"{number:09d}",  # nine characters: what Mistral's templates take
                        "type": "function",
                        "function": {"name": call.name, "arguments": dict(call.arguments)},
                    }
                    for number, call in enumerate(turn.tool_calls, num_calls)
                ]
                num_calls += len(open_calls)
                message["tool_calls"] = list(open_calls)
            if turn.role == "tool" and open_calls:
                call = open_calls.pop(0)
                message |= {"tool_call_id": call["id"], "name": call["function"]["name"]}
            messages.append(message)
        found = self._control.search(str((messages, conversation.tools)))
        if found:
            raise BadRow(
                "control_token_in_text",
                f"the row holds the text of a control token, {found[0]}, which the chat template "
                f"{self.name} cannot keep apart from the real one",
            )
        return messages

    # ---- where the answers are ---------------------------------------------------------------

    def _spans(
        self,
        messages: list[Message],
        tools: Sequence[Any],
        text: str,
        blocks: list[tuple[int, int]] | None,
    ) -> list[Span]:
        """Find each answer in `text`, which shows `messages` and perhaps a generation prompt."""
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if blocks is not None and len(blocks) != len(answers):
            raise MaskError(f"{len(blocks)} generation blocks for {len(answers)} assistant turns")
        spans: list[Span] = []
        for number, index in enumerate(answers):
            prompt_end = self._prompt_end(messages, tools, text, index)
            start = prompt_end if blocks is None else max(blocks[number][0], prompt_end)
            end_token = self._end.search(text, start)
            if end_token is None:
                raise MaskError(f"no end token after the answer {text[start:]!r}")
            span = Span(prompt_end, start, *end_token.span())
            if blocks is not None and text[blocks[number][1] : span.end].strip():
                raise MaskError("a generation block is not followed by an end token")
            if spans and span.prompt_end < spans[-1].stop:
                raise MaskError("the template's generation prompts overlap the answer before")
            spans.append(span)
        return spans

    def _prompt_end(
        self, messages: list[Message], tools: Sequence[Any], text: str, index: int
    ) -> int:
        prompt, _ = self._text(messages[:index], tools, generation_prompt=True)
        if text.startswith(prompt):
            return len(prompt)
        if index == len(messages) - 1:
            shown_from = max(0, len(prompt) - 60)
            raise MaskError(
                f"its generation prompt ends with {prompt[shown_from:]!r}, but what training shows "
                f"goes on with {text[shown_from:]!r}"
            )
        # Some templates show earlier turns in another way than the last one (Qwen3 removes their
        # thinking). A marker in place of the answer shows where its words begin.
        marked = [*messages]
        marked[index] = {**messages[index], "content": SENTINEL}
        before, found, _ = self._text(marked, tools)[0].partition(SENTINEL)
        if not found or not text.startswith(before):
            raise MaskError(f"cannot find the assistant's turn {messages[index]['content']!r}")
        return len(before)

    def _check_other_words(
        self, messages: list[Message], tools: Sequence[Any], text: str, spans: list[Span]
    ) -> None:
        """Refuse spans that change when only other parties' words change."""
        changed, _ = self._text([_with_other_words(m) for m in messages], tools)
        position = 0
        for span in spans:
            said = text[span.start : span.stop]
            position = changed.find(said, position)
            if position < 0:
                raise MaskError(f"the learned text {said!r} holds words of another party")
            position += len(said)

    # ---- the probe ---------------------------------------------------------------------------

    def _probe(self, turns: int) -> tuple[list[Message], str, list[tuple[int, int]] | None]:
        messages: list[Message] = []
        for question, answer in zip(QUESTIONS[:turns], ANSWERS[:turns], strict=True):
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        try:
            text, blocks = self._text(messages, ())
        except BadRow as error:
            raise MaskError(f"data.template={self.name}: {error}") from error
        for answer in ANSWERS[:turns]:
            if text.count(answer) != 1:
                raise self._refused(
                    f"shows an answer {text.count(answer)} times, not once: {text!r}"
                )
        return messages, text, blocks

    def _find_end_tokens(self) -> frozenset[str]:
        """Learn which control tokens end an assistant's turn, the last one and earlier ones."""
        _, text, _ = self._probe(1)
        last = self._control_after(text, ANSWERS[0])
        _, text, _ = self._probe(2)
        earlier = self._control_after(text, ANSWERS[0])
        opening = text[text.index(QUESTIONS[1]) : text.index(ANSWERS[1])]
        ends_question, *opens_answer = self._control.findall(opening) or [None]
        # Without an end of its own an answer runs into what opens the next turn.
        if (
            last is None
            or earlier is None
            or (earlier != last and (earlier != ends_question or earlier in opens_answer))
        ):
            raise self._refused(
                f"does not end the assistant's turn with a control token, so the model would "
                f"never learn to stop: {text!r}"
            )
        return frozenset([last, earlier])

    def _control_after(self, text: str, answer: str) -> str | None:
        rest = text[text.index(answer) + len(answer) :].lstrip()
        found = self._control.match(rest)
        return found[0] if found else None

    def _find_additions(self) -> frozenset[str]:
        """Learn what the template itself puts between the generation prompt and the words."""
        additions = set()
        for turns in (1, 2):
            messages, text, blocks = self._probe(turns)
            spans = self._spans(messages, (), text, blocks)
            for span, answer in zip(spans, ANSWERS[:turns], strict=True):
                before, found, after = text[span.start : span.end].partition(answer)
                if not found or after.strip() or any(word in before for word in QUESTIONS):
                    raise self._refused(
                        f"gives the learned text {text[span.start : span.stop]!r} for the answer "
                        f"{answer!r}"
                    )
                additions.add(_squash(before))
        return frozenset(additions)

    def _refused(self, problem: str) -> MaskError:
        return MaskError(f"data.template={self.name}: the chat template {problem}")


def _pieces(text: str, spans: list[Span]) -> list[Piece]:
    pieces = []
    position = 0
    for number, span in enumerate(spans):
        pieces.append(Piece(text[position : span.prompt_end]))
        if span.prompt_end < span.start:
            pieces.append(Piece(text[span.prompt_end : span.start]))
        pieces.append(Piece(text[span.start : span.end], number))
        pieces.append(Piece(text[span.end : span.stop], number, control=True))
        position = span.stop
    if position < len(text):
        pieces.append(Piece(text[position:]))
    return pieces


def _squash(text: str) -> str:
    return "".join(text.split())


def _with_other_words(message: Message) -> Message:
    """Change what a user, system or tool says, but not how it begins and ends."""
    if message["role"] == "assistant":
        return message
    content = message["content"]
    middle = len(content) // 2
    return {**message, "content": content[:middle] + SENTINEL + content[middle:]}
