"""Answers in a form that was asked for: which tokens may come next, by llguidance.

A grammar is compiled once and kept; each generation starts from a copy of it. Properties come in
the schema's order, and white space between them is bounded, so that no answer is white space until
its tokens are used up.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, grammar_from
from llguidance.hf import from_tokenizer
from torch import Tensor

from tuneloop.models.chat.renderer import Renderer
from tuneloop.models.json_form import MAX_FORM_BYTES, json_grammar
from tuneloop.serving.requests import AnswerForm, InvalidRequest

_NUM_KEPT = 64
_MAX_LEXER_STATES = 50_000  # 1 to 2 kB each


class Constraint:
    """A compiled form; any number of generations can start from it.

    Attributes:
        form: What was compiled.
    """

    def __init__(self, matcher: LLMatcher, form: AnswerForm) -> None:
        self._matcher = matcher
        self.form = form

    def start(self) -> TokenFilter:
        """Return what follows one generation."""
        return TokenFilter(self._matcher.deep_copy(), self.form.param)


class TokenFilter:
    """Follows one generation, and knows which tokens may come next."""

    def __init__(self, matcher: LLMatcher, param: str) -> None:
        self._matcher = matcher
        self._param = param

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow any more but the end."""
        return bool(self._matcher.is_stopped())

    def allows(self, token: int) -> bool:
        """Return whether a token may come next. Much faster than `mask`."""
        return bool(self._matcher.validate_tokens([token]) == 1)

    def mask(self, logits: Tensor) -> Tensor:
        """Return one row's logits with -inf where a token may not come next. Shapes (V,), (V,).

        Raises:
            InvalidRequest: The form is too complex to go on.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._refuse_error()
        allowed = np.unpackbits(bits, count=len(logits), bitorder="little").astype(bool)
        if not allowed.any():
            raise InvalidRequest("no token of the model fits the form", param=self._param)
        # By NumPy: for one row PyTorch's threads cost more than they save.
        return torch.from_numpy(np.where(allowed, logits.float().cpu().numpy(), -np.inf))

    def push(self, token: int) -> None:
        """Note the token that was chosen; not the one that ends the answer.

        Raises:
            InvalidRequest: The form is too complex to go on.
        """
        if not self._matcher.consume_token(token):
            self._refuse_error()

    def _refuse_error(self) -> None:
        if self._matcher.is_error():
            raise _refusal(self._matcher.get_error(), self._param)


class Constraints:
    """The forms of one model's answers, compiled once each.

    Takes a second to make, in which no other thread runs Python.

    Args:
        vocab_size: Of the model, which may have more ids than its tokenizer.

    Raises:
        ValueError: The tokens have no bytes of their own, as those of WordPiece.
    """

    def __init__(self, renderer: Renderer, vocab_size: int) -> None:
        self._tokenizer = _as_llguidance(renderer, max(vocab_size, len(renderer.tokenizer)))
        self._limits = LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
        self._has_leading_space = renderer.drops_leading_space
        self.compile = lru_cache(_NUM_KEPT)(self._compile)

    def _compile(self, form: AnswerForm) -> Constraint:
        """Return what follows generations of this form. Takes up to a second.

        Raises:
            InvalidRequest: The form cannot be read, is not supported, or no text has it.
        """
        size = len(form.text.encode())
        if size > MAX_FORM_BYTES:
            raise _refusal(f"it has {size:,} bytes; {MAX_FORM_BYTES:,} are allowed", form.param)
        try:
            if form.kind == "json":
                schema = json.loads(form.text)
                if not _has_an_end(schema):
                    raise _refusal("it refers to itself without an end", form.param)
                grammar = json_grammar(schema)
            else:
                grammar = grammar_from(form.kind, form.text)
        except InvalidRequest:
            raise
        except (ValueError, RecursionError) as error:
            raise _refusal(str(error), form.param) from error
        if self._has_leading_space:
            grammar = _after_a_space(grammar)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise _refusal(matcher.get_error(), form.param)
        if not any(matcher.compute_bitmask()):
            raise _refusal("no text has it", form.param)
        matcher.reset()
        return Constraint(matcher, form)


class _Vocabulary:
    """A tokenizer as llguidance asks for it where it does not read its file."""

    def __init__(self, renderer: Renderer, size: int) -> None:
        self.eos_token_id = renderer.stop_ids[0]
        self.bos_token_id = None
        self.tokens = [renderer.token_bytes(token) for token in range(size)]
        self.special_token_ids = list(renderer.tokenizer.all_special_ids)
        special = set(self.special_token_ids)
        self._ids = {data: i for i, data in enumerate(self.tokens) if data and i not in special}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: bytes) -> list[int]:
        """Return tokens of exactly this text, the longest first: its tokenizer adds a space."""
        ids: list[int] = []
        while text:
            sizes = range(min(self._longest, len(text)), 0, -1)
            size = next((size for size in sizes if text[:size] in self._ids), 0)
            if not size:
                break
            ids.append(self._ids[text[:size]])
            text = text[size:]
        return ids


def _as_llguidance(renderer: Renderer, size: int) -> LLTokenizer:
    stops = list(renderer.stop_ids)
    decoder = json.loads(renderer.tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    if decoder.get("type") == "Metaspace":
        wrapped = TokenizerWrapper(_Vocabulary(renderer, size))
        return LLTokenizer(wrapped, n_vocab=size, eos_token=stops)
    return from_tokenizer(renderer.tokenizer, n_vocab=size, eos_token=stops)


def _refusal(reason: str, param: str) -> InvalidRequest:
    first = next((line.strip() for line in reason.splitlines() if line.strip()), reason)
    return InvalidRequest(f"the answer cannot have this form: {first[:300]}", param=param)


def _after_a_space(grammar: str) -> str:
    """Return the grammar of the same texts with or without one space before them."""
    if grammar.startswith("{"):
        body = json.loads(grammar)["grammars"][0]
    else:
        body = {"lark_grammar": grammar}
    return json.dumps(
        {"grammars": [{"lark_grammar": "start: / ?/ @body"}, body | {"name": "body"}]}
    )


def _has_an_end(schema: object) -> bool:
    """Return whether some value of a schema is finite, as far as references decide it."""
    references = list(dict.fromkeys(_references(schema)))
    ended: set[str] = set()
    found = True
    while found:
        found = False
        # From the last: most definitions refer to later ones, and one round is enough.
        for reference in reversed(references):
            if reference not in ended and _ends(_resolve(reference, schema), ended):
                ended.add(reference)
                found = True
    return _ends(schema, ended)


def _references(part: object) -> Iterator[str]:
    if isinstance(part, Mapping):
        if isinstance(reference := part.get("$ref"), str):
            yield reference
        part = part.values()
    elif not isinstance(part, list):
        return
    for inner in part:
        yield from _references(inner)


def _ends(schema: object, ended: Collection[str]) -> bool:
    """Return whether some value of a schema is finite if what `ended` refers to is."""
    if not isinstance(schema, Mapping) or "const" in schema or "enum" in schema:
        return True
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in ended:
        return False
    for key in ("anyOf", "oneOf"):
        some = schema.get(key)
        if isinstance(some, list) and some and not any(_ends(one, ended) for one in some):
            return False
    every = schema.get("allOf")
    if isinstance(every, list) and not all(_ends(one, ended) for one in every):
        return False
    kinds = schema.get("type", ["object"] if "properties" in schema else ["null"])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or any(kind not in ("object", "array") for kind in kinds):
        return True
    return any(all(_ends(part, ended) for part in _needed_parts(schema, kind)) for kind in kinds)


def _needed_parts(schema: Mapping[str, Any], kind: str) -> list[Any]:
    """Return the schemas of what each value of a kind has."""
    if kind == "object":
        properties = schema.get("properties")
        properties = properties if isinstance(properties, Mapping) else {}
        return [properties[name] for name in schema.get("required") or () if name in properties]
    count = schema.get("minItems")
    if not isinstance(count, int) or count < 1:
        return []
    first = list(schema.get("prefixItems") or ())[:count]
    return first if len(first) == count else [*first, schema.get("items")]


def _resolve(reference: str, root: object) -> Any:
    """Return what a reference within the schema names; None if it is elsewhere or nowhere."""
    target = root
    for part in reference.removeprefix("#").split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        target = target.get(part) if isinstance(target, Mapping) else None
    return target if reference.startswith("#") else None
