"""An Ollama Modelfile for an exported model: file, template, system prompt, stop, sampling.

Ollama writes prompts by a Go template. It is derived from what our renderer writes, and only where
pieces around each message explain every rendered conversation.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from tuneloop.errors import ModelError
from tuneloop.models.chat.renderer import Renderer
from tuneloop.models.chat.template import RenderError
from tuneloop.records import Message, Role


class _Pieces(NamedTuple):
    """Text before and after each role's message, before a first user turn, and before an answer."""

    opening: str
    default: str
    around: dict[str, tuple[str, str]]
    answer: str


def modelfile(renderer: Renderer, file: str, instruction: str, context: int) -> str:
    """Return a Modelfile that asks as the model was trained.

    Args:
        file: Of the GGUF, beside the Modelfile.
        instruction: System prompt of the task; empty for none.
        context: Longest prompt and answer together, in tokens.

    Raises:
        ModelError: The chat template does more than to write something around each message.
    """
    # The parser knows no escapes: what stands between the outer quotes is the text.
    stops = "".join(
        f'PARAMETER stop "{renderer.tokenizer.convert_ids_to_tokens(index)}"\n'
        for index in renderer.stop_ids
    )
    try:
        pieces = _pieces(renderer)
    except RenderError as error:  # no place for a system message, for example
        raise _inexpressible() from error
    # Where the tokenizer puts BOS before a text, llama.cpp does so too.
    opening = "" if renderer.adds_bos else pieces.opening
    system = f"SYSTEM {_block(instruction)}\n" if instruction else ""
    if not _is_kept(instruction):
        # The template's constants can say it: there it stands wherever no other one is sent.
        before, after = pieces.around["system"]
        pieces, system = pieces._replace(default=f"{before}{instruction}{after}"), ""
    return (
        f"FROM ./{file}\nTEMPLATE {_block(_go_template(pieces, opening))}\n{system}{stops}"
        # Ollama's own default of 1.1 would turn greedy answers away from what their prompt says.
        f"PARAMETER temperature 0\nPARAMETER repeat_penalty 1\nPARAMETER num_ctx {context}\n"
    )


def _prompt(renderer: Renderer, turns: Sequence[Message]) -> str:
    ids = renderer.prompt_ids(turns)
    return str(renderer.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _pieces(renderer: Renderer) -> _Pieces:
    """Return the pieces that explain the template.

    Raises:
        ModelError: No pieces do.
    """
    system, user = Message("system", "sword"), Message("user", "uword")
    assistant = Message("assistant", "aword")
    whole = _prompt(renderer, [system, user, assistant, user])
    words = (system.content, user.content, assistant.content, user.content)
    parts, rest = [], whole
    for word in words:
        part, _, rest = rest.partition(word)
        parts.append(part)
    before_system, between, middle, after_answer = parts
    lead = _prompt(renderer, [user]).partition(user.content)[0]
    # Where one message ends and the next begins: first tried right behind the stop token.
    stop = renderer.tokenizer.convert_ids_to_tokens(renderer.stop_ids[0])
    behind = between.find(stop) + len(stop)
    behind += len(between[behind:]) - len(between[behind:].lstrip())
    # A BOS that stands once belongs to no turn.
    bos = renderer.tokenizer.bos_token or ""
    for opening in (bos, "") if bos and whole.count(bos) == 1 else ("",):
        for cut in sorted(range(len(between)), key=lambda cut: abs(cut - behind)):
            end, before_user = between[:cut], between[cut:]
            answer_end = after_answer.removesuffix(before_user)
            pieces = _Pieces(
                opening,
                lead.removesuffix(before_user).removeprefix(opening),
                {
                    "system": (before_system.removeprefix(opening), end),
                    "user": (before_user, answer_end if middle.startswith(answer_end) else end),
                    "assistant": (middle.removeprefix(end), answer_end),
                },
                rest.removeprefix(end),
            )
            if _explains(renderer, pieces):
                return pieces
    raise _inexpressible()


def _explains(renderer: Renderer, pieces: _Pieces) -> bool:
    """Return whether the pieces write what the renderer writes, for every shape of a talk."""
    contents = itertools.cycle(["Is 1 < 2?\nYes", "a", '{"b": [1, 2]}', "é 日本"])
    talks: tuple[list[Role], ...] = (
        ["user"],
        ["system", "user"],
        ["user", "assistant", "user"],
        ["system", "user", "assistant", "user", "assistant", "user"],
    )
    for roles in talks:
        turns = [Message(role, next(contents)) for role in roles]
        text = pieces.opening + ("" if roles[0] == "system" else pieces.default)
        for turn in turns:
            before, after = pieces.around[turn.role]
            text += f"{before}{turn.content}{after}"
        if text + pieces.answer != _prompt(renderer, turns):
            return False
    return True


def _go_template(pieces: _Pieces, opening: str) -> str:
    parts = [_literal(opening)]
    if pieces.default:
        parts.append(f"{{{{ if not .System }}}}{_literal(pieces.default)}{{{{ end }}}}")
    parts.append("{{ range .Messages }}")
    for index, (role, (before, after)) in enumerate(pieces.around.items()):
        parts.append(f'{{{{ {"else if" if index else "if"} eq .Role "{role}" }}}}')
        parts.append(f"{_literal(before)}{{{{ .Content }}}}{_literal(after)}")
    return "".join([*parts, "{{ end }}{{ end }}", _literal(pieces.answer)])


def _literal(text: str) -> str:
    """Return text as a Go template in a block writes it.

    Constants stand for braces, which would be read as code, and for what a block does not keep.
    """

    def written(found: re.Match[str]) -> str:
        signs = found[0]
        if signs[0] not in '{"' and _is_kept(signs):
            return signs
        escaped = (sign if sign == "{" else f"\\U{ord(sign):08x}" for sign in signs)
        return f'{{{{ "{"".join(escaped)}" }}}}'

    return re.sub(r'\{+|"{3,}|[^{"]', written, text)


def _is_kept(text: str) -> bool:
    """Return whether a block keeps a text as it is.

    Ollama's parser leaves out what is not printed, such as a no-break or an ideographic space, and
    ends a block with the first line that ends with three quotes.

    Source: https://github.com/ollama/ollama/blob/main/parser/parser.go, `ParseFile`.
    """
    is_printed = all(sign.isprintable() or sign in "\t\r\n" for sign in text)
    return is_printed and not re.search(r'"""\s*[\r\n]', text)


def _block(text: str) -> str:
    return f'"""{text}"""'


def _inexpressible() -> ModelError:
    return ModelError.of(
        "Ollama's templates cannot express this chat template",
        where="model.chat_template",
        allowed="templates that write something around each message, such as chatml",
        remedy="use `--to gguf`: llama.cpp reads the model's own template",
    )
