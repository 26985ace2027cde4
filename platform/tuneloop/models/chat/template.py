"""Messages and tools to text, by a model's own chat template.

A field that a template leaves out would vanish without a word: such messages are refused. A control
token that stands in a message is put aside as a character of its own (`Escapes`), so that it can be
encoded as the text that it is.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.meta

from tuneloop.errors import ModelError
from tuneloop.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The date that templates write which ask for today's: what is rendered must not change overnight.
# It is the one that Llama 3's template falls back to where the clock is not offered.
FROZEN_DATE = date(2024, 7, 26)
_CLOCK = re.compile(r"strftime_now\(\s*(?P<quote>['\"])(?P<format>.*?)(?P=quote)\s*\)")
_OTHER_TEMPLATE = (
    "set model.chat_template to one that has: `chatml_tools` knows system messages, tools and "
    "their results, or the path of a Jinja file; or change the rows"
)
# Where the first of two planes of characters for private use begins; Unicode gives them no meaning.
_PRIVATE = (0xF0000, 0x100000)
# What transformers gives every template beside the parameters of `apply_chat_template`.
_GIVEN = frozenset({"messages", "raise_exception", "strftime_now", "tojson"})
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
_QUESTION: list[dict[str, Any]] = [{"role": "user", "content": "a"}]
_MARK = "\U0010fffd"
_THINKING = ("think", "thinking", "thought", "thoughts", "reason", "reasoning")


class RenderError(ValueError):
    """One row cannot be rendered; the message is the reason kept with the removed row.

    Args:
        remedy: What to do about it.
        is_of_tools: The tools are what cannot be rendered, not the messages.
    """

    def __init__(self, message: str, remedy: str = "", is_of_tools: bool = False) -> None:
        super().__init__(message)
        self.remedy = remedy
        self.is_of_tools = is_of_tools


def frozen(template: str) -> str:
    """Return a template with the date that it asks for written out, in the format it asks for."""

    def written(call: re.Match[str]) -> str:
        return repr(FROZEN_DATE.strftime(call["format"]))

    return _CLOCK.sub(written, template)


@dataclass(frozen=True)
class Escapes:
    """Control tokens and the characters that stand for them while a template renders.

    Args:
        tokens: The tokens; the character of the first is `chr(first)`, and so on.
    """

    tokens: tuple[str, ...]
    first: int = _PRIVATE[0]

    @staticmethod
    def of(tokens: tuple[str, ...], text: str) -> Escapes:
        """Return escapes whose characters do not stand in a text."""
        escapes = (Escapes(tokens, first) for first in _PRIVATE)
        for found in escapes:
            if not found.pattern.search(text):
                return found
        raise RenderError("the text has characters of both planes for private use")

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """What finds the characters."""
        last = self.first + max(0, len(self.tokens) - 1)
        return re.compile(f"[{chr(self.first)}-{chr(last)}]")

    def escape(self, value: object) -> Any:
        """Return a value with the tokens in its texts replaced by their characters."""
        if isinstance(value, str):
            for index, token in enumerate(self.tokens):
                value = value.replace(token, chr(self.first + index))
            return value
        if isinstance(value, Mapping):
            return {self.escape(key): self.escape(item) for key, item in value.items()}
        return [self.escape(item) for item in value] if isinstance(value, list) else value

    def restore(self, text: str) -> str:
        """Return a text with the tokens back in it."""
        return self.pattern.sub(lambda found: self.tokens[ord(found[0]) - self.first], text)


class ChatTemplate:
    """One chat template, and how it wants what OpenAI's layout leaves open.

    Args:
        tokenizer: A fast Hugging Face tokenizer, for the special tokens the template may name.
        source: The Jinja text.
        settings: Values of names that the template reads and that stand for no part of the
            conversation; see `setting_names`.

    Raises:
        ModelError: It writes today's date in a format that cannot be told from its text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        source: str,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer, self.source = tokenizer, frozen(source)
        self.settings = dict(settings or {})
        if re.search(r"strftime_now\s*\(", self.source):
            raise ModelError.of(
                "the chat template writes today's date in a format that it computes: what was "
                "trained today would be served otherwise tomorrow",
                where="model.chat_template",
                allowed=f"strftime_now with a format in quotes, which is frozen at {FROZEN_DATE}",
                remedy="write a date into a copy of the template and set model.chat_template "
                "to its path",
            )

    def with_settings(self, settings: Mapping[str, Any]) -> ChatTemplate:
        """Return the same template with other settings."""
        return ChatTemplate(self.tokenizer, self.source, settings)

    @cached_property
    def setting_names(self) -> frozenset[str]:
        """The names that the template reads and a request may set, such as `enable_thinking`."""
        environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
        # The tag is of transformers; what it is around is read without it, too.
        names = jinja2.meta.find_undeclared_variables(
            environment.parse(_GENERATION_TAG.sub("", self.source))
        )
        given = {*_GIVEN, *inspect.signature(self.tokenizer.apply_chat_template).parameters}
        names -= given | environment.globals.keys()
        return frozenset(name for name in names if not name.endswith(("_token", "_tokens")))

    @cached_property
    def opens_thinking(self) -> bool:
        """Whether a prompt ends with a tag behind which the model has to think."""
        opened = opened_thinking(self.render(_QUESTION, (), True))
        # Some templates name the speaker in such a tag: `<bot>`.
        return opened is not None and opened["tag"] in _THINKING

    def turns(self, messages: Sequence[Message], tools: Sequence[Any]) -> list[dict[str, Any]]:
        """Return messages as the template reads them.

        Raises:
            RenderError: It would leave something out.
        """
        if tools and "tools" not in self.source:
            message = "the chat template has no place for `tools`"
            raise RenderError(message, _OTHER_TEMPLATE, is_of_tools=True)
        return [self._turn(message) for message in messages]

    def render(
        self, turns: Sequence[dict[str, Any]], tools: Sequence[Any], generation_prompt: bool
    ) -> str:
        """Return the text of turns.

        Args:
            turns: From `turns`.
            tools: In OpenAI's layout.
            generation_prompt: End with what stands before an answer.

        Raises:
            RenderError: The template refuses the messages.
        """
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(turns),
                    tools=list(tools) or None,
                    chat_template=self.source,
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                    **self.settings,
                )
            )
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
        ) as error:
            raise RenderError(
                f"the chat template refuses the messages: {error}", _remedy(turns)
            ) from error

    def refuse_losses(
        self, rendered: str, turns: Sequence[dict[str, Any]], tools: Sequence[Any]
    ) -> None:
        """Raise RenderError if the name of a tool or the result of a call is not in a rendering."""
        for tool in tools:
            function = tool.get("function", tool) if isinstance(tool, Mapping) else tool
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                message = "one of `tools` has no `function` with a `name`"
                raise RenderError(message, is_of_tools=True)
            if function["name"] not in rendered:
                message = "the chat template leaves out some of the `tools`"
                raise RenderError(message, is_of_tools=True)
        for turn in turns:
            for call in turn.get("tool_calls", ()):
                if call["function"]["name"] not in rendered:
                    raise RenderError("the chat template leaves out some `tool_calls`")
            if turn["role"] != "tool" or not (text := turn["content"].strip()):
                continue
            if text not in rendered and json.dumps(text, ensure_ascii=False)[1:-1] not in rendered:
                raise RenderError(
                    "the chat template leaves out the results of tools", _OTHER_TEMPLATE
                )

    def answer_start(
        self,
        turns: Sequence[dict[str, Any]],
        tools: Sequence[Any],
        index: int,
        rendered: str,
        generation_prompt: bool,
    ) -> int:
        """Return where in a rendering an earlier answer begins, behind its header.

        For templates whose text before an answer is another one once turns follow: the answer is
        found by a mark put into it.

        Args:
            index: The answer's turn.
            rendered: All turns, with or without a generation prompt.

        Raises:
            RenderError: The answer is not found.
        """
        place = -1
        for turn in _marked(turns[index]):
            others = [*turns[:index], turn, *turns[index + 1 :]]
            marked = self.render(others, tools, generation_prompt)
            place = marked.find(_MARK) if marked.replace(_MARK, "") == rendered else -1
            if place >= 0:
                break
        if place < 0:
            raise RenderError("the chat template changes earlier turns when a turn is added")
        before = rendered[:place]
        header = self.header
        if header and header in before:
            return before.rindex(header) + len(header)
        # What opens a call is part of the answer, and only the question tells where it begins.
        behind = self._behind_question(turns, tools, index, rendered, generation_prompt)
        return len(before.rstrip()) if behind is None else behind

    def _behind_question(
        self,
        turns: Sequence[dict[str, Any]],
        tools: Sequence[Any],
        index: int,
        rendered: str,
        generation_prompt: bool,
    ) -> int | None:
        """Return where a rendering has what a prompt ends with, behind the turn before an answer.

        Arguments as of `answer_start`; None where it is not found.
        """
        text = turns[index - 1]["content"] if index else None
        if not text:
            return None
        end = len(text.rstrip())
        question = {**turns[index - 1], "content": text[:end] + _MARK + text[end:]}
        asked = [*turns[: index - 1], question]
        marked = self.render([*asked, *turns[index:]], tools, generation_prompt)
        _, found, closing = self.render(asked, tools, True).rpartition(_MARK)
        place = marked.find(_MARK)
        if not found or place < 0 or marked.replace(_MARK, "") != rendered:
            return None
        return place + len(closing) if rendered.startswith(closing, place) else None

    @cached_property
    def header(self) -> str:
        """What the template puts between a question and the answer; empty for nothing."""
        before, after = (self.render(_QUESTION, (), flag) for flag in (False, True))
        header = after[len(before) :] if after.startswith(before) else ""
        return re.sub(r"<\w+>\s*$", "", header)

    @cached_property
    def _writes_system(self) -> bool:
        try:
            return "probe" in self.render(
                [{"role": "system", "content": "probe"}, *_QUESTION], (), True
            )
        except RenderError:
            return True  # it refuses one itself, and says why

    @cached_property
    def _writes_thoughts(self) -> bool:
        if self.opens_thinking:
            return True
        answer = {"role": "assistant", "content": "b", "reasoning_content": "probe"}
        return "probe" in self.render([*_QUESTION, answer], (), False)

    def _turn(self, message: Message) -> dict[str, Any]:
        turn = message.as_dict()
        turn.pop("weight", None)
        if message.role == "developer" and "developer" not in self.source:
            # Models that do not know the newer name know it as system.
            turn["role"] = "system"
        if turn["role"] == "system" and message.content and not self._writes_system:
            raise RenderError(
                "the chat template has no place for a system message", _remedy([turn])
            )
        if message.tool_calls:
            if "tool_calls" not in self.source:
                raise RenderError(
                    "the chat template has no place for `tool_calls`", _OTHER_TEMPLATE
                )
            turn["tool_calls"] = self._calls(message)
            if not message.content and message.role == "assistant" and self._takes_null:
                turn["content"] = None
        if message.reasoning_content and not self._writes_thoughts:
            raise RenderError(
                "the chat template has no place for `reasoning_content`",
                "put it into `content` between the tags that the model thinks in, leave it out, or "
                "set model.chat_template to a template that writes it",
            )
        return turn

    def _calls(self, message: Message) -> list[dict[str, Any]]:
        """Return the calls with arguments as the template wants them: objects, or their text."""
        calls = message.calls
        if self._takes_objects:
            for call in calls:
                text = call["function"]["arguments"]
                try:
                    arguments = json.loads(text or "{}")
                except ValueError as error:
                    problem = f"the arguments of a tool call are not valid JSON: {error}"
                    raise RenderError(problem) from error
                call["function"] = call["function"] | {"arguments": arguments}
        return [{key: value for key, value in c.items() if value is not None} for c in calls]

    def _probe(self, content: str | None, arguments: object) -> str:
        """Return the rendering of a tool call; empty if the template fails."""
        function = {"name": "probe", "arguments": arguments}
        call = {"id": "abcdefghi", "type": "function", "function": function}
        answer = {"role": "assistant", "content": content, "tool_calls": [call]}
        turns: list[dict[str, Any]] = [*_QUESTION, answer]
        try:
            return self.render(turns, (), False)
        except RenderError:
            return ""

    @cached_property
    def _takes_objects(self) -> bool:
        rendered = self._probe("", {"key": "b"}) + self._probe(None, {"key": "b"})
        return bool(rendered) and "{'key'" not in rendered

    @cached_property
    def _takes_null(self) -> bool:
        """Whether a call without content is rendered right with `content: null`."""
        rendered = self._probe(None, {"key": "b"} if self._takes_objects else '{"key": "b"}')
        return "probe" in rendered and "None" not in rendered


def _marked(turn: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield an answer with a mark at its beginning, then with one behind what it thought.

    Templates drop what the assistant thought of earlier turns, and the mark with it. Other tags are
    part of the answer.
    """
    if content := turn["content"]:
        yield {**turn, "content": _MARK + content}
        if thought := re.match(r".*</\w+>\s*(?=\S)", content, re.DOTALL):
            cut = thought.end()
            yield {**turn, "content": content[:cut] + _MARK + content[cut:]}
    else:
        first, *others = turn.get("tool_calls", [{"function": {"name": ""}}])
        function = first["function"] | {"name": _MARK + first["function"]["name"]}
        yield {**turn, "tool_calls": [first | {"function": function}, *others]}


def opened_thinking(prompt: str) -> re.Match[str] | None:
    """Return the tag at the end of a prompt that opens what the model thinks, if there is one."""
    return re.search(r"<(?P<tag>\w+)>\s*$", prompt)


def closed_thinking(prompt: str, rendered: str, turn: Mapping[str, Any]) -> str:
    """Return what follows a prompt that opens the thinking itself, for an answer to learn.

    The thought is the turn's own, from `reasoning_content` or from before the closing tag in its
    content, and otherwise empty.

    Args:
        prompt: Ends with an opening tag that is not in `rendered`.
        rendered: All turns, the answer last.

    Raises:
        RenderError: The prompt is no beginning of the rendering even without the tag.
    """
    opened = opened_thinking(prompt)
    if opened is None or not rendered.startswith(prompt[: opened.start()]):
        raise RenderError("the chat template changes earlier turns when a turn is added")
    tag = opened["tag"]
    answer = rendered[opened.start() :].lstrip()
    if answer.startswith(f"<{tag}>"):
        return answer.removeprefix(f"<{tag}>").lstrip()
    content = turn["content"] or ""
    thought = turn.get("reasoning_content", "")
    if not thought and f"</{tag}>" in content:
        thought = content.rpartition(f"</{tag}>")[0].strip().removeprefix(f"<{tag}>")
    return f"{thought.strip()}\n</{tag}>\n\n{answer}"


def _remedy(turns: Sequence[Mapping[str, Any]]) -> str:
    has_system = any(turn["role"] == "system" for turn in turns)
    without = (
        "a template may know no system message: leave out task.instruction and the rows' own, or "
        if has_system
        else ""
    )
    return f"this is the model's own template, not the rows' layout: {without}{_OTHER_TEMPLATE}"
