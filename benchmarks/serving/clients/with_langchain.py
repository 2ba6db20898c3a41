"""LangChain, by langchain-openai."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import openai
from checks import KEY, LONG, MODEL, PLAIN, SEEDED, STOP, URL, fails, report, same, wait_rows
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI


def chat(case: dict[str, Any] | None = None, **more: Any) -> ChatOpenAI:
    """A model as the case wants it."""
    body = {} if case is None else {k: v for k, v in case["body"].items() if k != "messages"}
    given = {"base_url": f"{URL}/v1", "api_key": KEY, "model": MODEL, "max_retries": 0}
    return ChatOpenAI(**{**given, **body, **more})


def plain() -> None:
    same(chat(PLAIN).invoke(PLAIN["body"]["messages"]).content, PLAIN["texts"][0])


def stream() -> None:
    pieces = chat(PLAIN).stream(PLAIN["body"]["messages"])
    same("".join(str(piece.content) for piece in pieces), PLAIN["texts"][0])


def usage() -> None:
    answer = chat(PLAIN).invoke(PLAIN["body"]["messages"])
    same(answer.usage_metadata["output_tokens"], PLAIN["num_tokens"])
    pieces = list(chat(PLAIN, stream_usage=True).stream(PLAIN["body"]["messages"]))
    whole = pieces[0]
    for piece in pieces[1:]:
        whole += piece
    same(whole.usage_metadata["output_tokens"], PLAIN["num_tokens"])


def stop() -> None:
    same(chat(STOP).invoke(STOP["body"]["messages"]).content, STOP["texts"][0])


def seeds() -> None:
    messages = [HumanMessage(SEEDED["body"]["messages"][0]["content"])]
    answers = chat(SEEDED).generate([messages]).generations[0]
    same([answer.text for answer in answers], SEEDED["texts"])


def error() -> None:
    wrong = chat(PLAIN, temperature=9)
    messages = PLAIN["body"]["messages"]
    fails(openai.BadRequestError, lambda: wrong.invoke(messages), "temperature")


def bad_key() -> None:
    messages = PLAIN["body"]["messages"]
    fails(openai.AuthenticationError, lambda: chat(PLAIN, api_key="wrong").invoke(messages))


def cancel() -> str:
    pieces = chat(extra_body={"ignore_eos": True}).stream(LONG)
    for _ in range(3):
        next(pieces)
    pieces.close()
    return f"rows free after {wait_rows(False):.2f} s"


report(
    version("langchain-openai"),
    {
        "plain": plain,
        "stream": stream,
        "usage": usage,
        "stop": stop,
        "seeds, n": seeds,
        "error": error,
        "bad key": bad_key,
        "cancel": cancel,
    },
)
