"""The playground: one or two served models answer the same conversation, as they write."""

from __future__ import annotations

import asyncio
import json
import shlex
from typing import Any

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

import theme
from shell import is_read_only, reviewer_name, workspace_location
from tuneloop.artifacts import Workspace
from tuneloop.errors import EndpointError, UserError
from tuneloop.evals.reporting.overview import list_instructions
from tuneloop.models.client.client import Client, Delta, RequestError, chat_request
from tuneloop.records import Endpoint, Message, SamplingParams
from tuneloop.review.kept_rows import KeptRow, keep_row, kept_rows_file

DEFAULT_URL = "http://127.0.0.1:8000/v1"
MOST_MODELS = 2


@st.cache_data(ttl=15, show_spinner="Asking for the list of models")
def list_models(url: str, api_key: str) -> list[str]:
    async def ask() -> list[str]:
        async with Client(Endpoint(url, "", api_key), timeout_s=10) as client:
            return await client.models()

    return asyncio.run(ask())


def connect(page: DeltaGenerator) -> tuple[str, str, list[str]]:
    """Return the URL, the key and the models to ask; without an answer, say what to do.

    Args:
        page: Where there is room to say it.
    """
    url = st.text_input(
        "Server", DEFAULT_URL, key="url", help="An OpenAI-compatible base URL", bind="query-params"
    )
    api_key = st.text_input("API key", key="api_key", type="password", placeholder="if it has one",
                            autocomplete="off")  # fmt: skip
    try:
        served = list_models((url or DEFAULT_URL).strip(), (api_key or "").strip())
    except (EndpointError, RequestError) as error:
        page.error("No list of models from this server.")
        page.code(str(error), language=None, wrap_lines=True)
        page.write("Start one in a terminal, then refresh:")
        page.code("tuneloop serve CONFIG.yaml", language=None)
        st.stop()
    models = st.multiselect(
        "Models", served, served[:MOST_MODELS], max_selections=MOST_MODELS, key="models",
        help="Two are asked at the same time and stand side by side.",
    )  # fmt: skip
    return (url or DEFAULT_URL).strip(), (api_key or "").strip(), models


def choose_system_prompt() -> str:
    """Return the instruction that models were trained with, or what is written instead."""
    try:
        instructions = list_instructions(Workspace(workspace_location()).published())
    except UserError:
        instructions = {}
    task = "no task"
    if instructions:
        task = st.selectbox(
            "Task",
            [*instructions, "no task"],
            key="task",
            bind="query-params",
            help="Its instruction is the system prompt, as in training and evaluation.",
        )
    return (
        st.text_area(
            "System prompt",
            instructions.get(task, ""),
            key=f"system {task}",
            height=120,
            placeholder="none",
        )
        or ""
    )


def choose_sampling() -> SamplingParams:
    """Return how answers are sampled; all of it is sent with every request."""
    left, right = st.columns(2)
    stop = st.text_input("Stop text", key="stop", placeholder="none", help="Ends the answer")
    return SamplingParams(
        max_tokens=int(left.number_input("Max tokens", 1, 4096, 128, key="max_tokens")),
        temperature=float(
            right.number_input(
                "Temperature",
                0.0,
                2.0,
                0.0,
                0.1,
                key="temperature",
                help="0 is greedy decoding",
            )
        ),
        top_p=float(left.number_input("Top p", 0.01, 1.0, 1.0, 0.05, key="top_p")),
        seed=int(right.number_input("Seed", 0, 2**31 - 1, 0, key="seed")),
        stop=(stop,) if stop else (),
    )


def conversation(turns: list[dict[str, Any]], model: str, system: str) -> list[Message]:
    """Return what a model has seen and said so far, with the question that is open."""
    messages = [Message("system", system)] if system.strip() else []
    for turn in turns:
        messages.append(Message("user", turn["question"]))
        if model in turn["answers"]:
            messages.append(Message("assistant", turn["answers"][model]["text"]))
    return messages


async def answer(
    client: Client, messages: list[Message], params: SamplingParams, slot: DeltaGenerator
) -> dict[str, Any]:
    """Return a model's answer, shown piece by piece meanwhile."""
    text, last, problem = "", Delta(), ""
    try:
        async for delta in client.stream(messages, params):
            text, last = text + delta.text, delta
            slot.html(theme.box(client.endpoint.model, [theme.chip("writing …")], theme.text(text)))
    except (EndpointError, RequestError) as error:
        problem = str(error)
    return {
        "text": text,
        "problem": problem,
        "finish_reason": last.finish_reason,
        "tokens": last.completion_tokens,
    }


async def answer_all(
    url: str, api_key: str, requests: dict[str, list[Message]], params: SamplingParams,
    slots: dict[str, DeltaGenerator],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Return every model's answer; all are asked at the same time."""

    async def one(model: str) -> dict[str, Any]:
        async with Client(Endpoint(url, model, api_key)) as client:
            return await answer(client, requests[model], params, slots[model])

    answers = await asyncio.gather(*(one(model) for model in requests))
    return dict(zip(requests, answers, strict=True))


def answer_box(model: str, reply: dict[str, Any]) -> str:
    """Return one answer as HTML."""
    chips = []
    if reply["finish_reason"] == "length":
        chips.append(theme.chip("cut off by max tokens", "warn"))
    if reply["tokens"] is not None:
        chips.append(theme.chip(f"{reply['tokens']} tokens"))
    body = theme.text(reply["text"]) if reply["text"] or not reply["problem"] else ""
    if reply["problem"]:
        chips.append(theme.chip("failed", "bad"))
        body += theme.labelled("Problem", theme.text(reply["problem"]))
    return theme.box(model, chips, body)


def offer_test_row(turn: dict[str, Any], task: str) -> None:
    """Offer to keep a question, with its right answer, as a test row of the task."""
    if "://" in (location := workspace_location()).removeprefix("file://"):
        return
    file = kept_rows_file(location, task)
    with st.popover("Save as a test row", type="tertiary"):
        st.html(theme.labelled("Question", theme.text(turn["question"])))
        said = {model: reply["text"] for model, reply in turn["answers"].items()}
        model = next(reversed(said), "")
        if len(said) > 1:
            model = st.selectbox("Begin with the answer of", said, len(said) - 1) or model
        right = (
            st.text_area("Right answer", said.get(model, ""), key=f"right {turn['number']} {model}")
            or ""
        )
        name = reviewer_name()
        if not name:
            name = st.text_input("Your name", placeholder="stored with the row", max_chars=80,
                                 key="keeper") or ""  # fmt: skip
        if st.button("Save", type="primary"):
            if not right.strip() or not name.strip():
                st.error("Give your name." if right.strip() else "Give the right answer.")
                return
            row = KeptRow(turn["question"], right.strip(), name.strip())
            try:
                is_new = keep_row(file, row)
            except UserError as error:
                st.error("The row is not saved.")
                st.code(str(error), language=None, wrap_lines=True)
                return
            st.session_state.judge = name.strip()
            st.success("Saved." if is_new else "It is saved already.")
            st.caption("To score models on the rows saved so far:")
            source = json.dumps([{"path": str(file), "format": "question_answer"}])
            override = shlex.quote(f"evaluation.sources={source}")
            st.code(f"tuneloop evaluate CONFIG.yaml {override}", language=None, wrap_lines=True)


settings, talk = st.columns([1, 2], gap="large")
with settings:
    url, api_key, models = connect(talk)
    system = choose_system_prompt()
    is_talk = st.checkbox("Send earlier turns along", key="turns_along", bind="query-params",
                          help="For models that were trained on conversations.")  # fmt: skip
    params = choose_sampling()
turns: list[dict[str, Any]] = st.session_state.setdefault("turns", [])
with talk:
    above = st.container()
    question = st.chat_input("Ask", disabled=not models)
    below = st.container()
with above:
    if not turns and not question:
        st.caption("Ask something; the answers appear here as they are written.")
    for turn in turns:
        st.html(theme.labelled("You", theme.text(turn["question"])))
        st.html(theme.sides([answer_box(m, a) for m, a in turn["answers"].items()]))
    if question and models:
        number = st.session_state["num_turns"] = st.session_state.get("num_turns", 0) + 1
        turns.append({"question": question, "answers": {}, "sent": {}, "number": number})
        turns[-1]["is_alone"] = len(turns) == 1 or not is_talk
        st.html(theme.labelled("You", theme.text(question)))
        requests = {
            model: conversation(turns if is_talk else turns[-1:], model, system) for model in models
        }
        turns[-1]["sent"] = {m: chat_request(m, r, params) for m, r in requests.items()}
        columns = st.columns(len(models))
        slots = {m: c.empty() for m, c in zip(models, columns, strict=True)}
        turns[-1]["answers"] = asyncio.run(answer_all(url, api_key, requests, params, slots))
        for model, reply in turns[-1]["answers"].items():
            slots[model].html(answer_box(model, reply))
if turns:
    with below:
        with st.expander("What was sent last"):
            st.json(turns[-1]["sent"], expanded=2)
        # What an answer to earlier turns is right about is not in its question.
        if turns[-1]["is_alone"] and not is_read_only():
            offer_test_row(turns[-1], st.session_state.get("task", ""))
        if st.button("Start over"):
            turns.clear()
            st.rerun()
