"""LiteLLM, as a library."""

from __future__ import annotations

import asyncio
import os
from importlib.metadata import version
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it fetches a table at import

import litellm
from checks import KEY, LONG, MODEL, PLAIN, SEEDED, STOP, URL, fails, report, same, wait_rows

PLACE = {"model": f"openai/{MODEL}", "api_base": f"{URL}/v1", "api_key": KEY, "max_retries": 0}


def ask(case: dict[str, Any], **more: Any) -> Any:
    """An answer to a case."""
    return litellm.completion(**{**PLACE, **case["body"], **more})


def plain() -> None:
    same(ask(PLAIN).choices[0].message.content, PLAIN["texts"][0])


def stream() -> None:
    pieces = ask(PLAIN, stream=True)
    same("".join(p.choices[0].delta.content or "" for p in pieces), PLAIN["texts"][0])


def usage() -> None:
    same(ask(PLAIN).usage.completion_tokens, PLAIN["num_tokens"])
    pieces = list(ask(PLAIN, stream=True, stream_options={"include_usage": True}))
    same(pieces[-1].usage.completion_tokens, PLAIN["num_tokens"])


def stop() -> None:
    choice = ask(STOP).choices[0]
    same((choice.message.content, choice.finish_reason), (STOP["texts"][0], "stop"))


def seeds() -> None:
    same([choice.message.content for choice in ask(SEEDED).choices], SEEDED["texts"])


def error() -> None:
    fails(litellm.BadRequestError, lambda: ask(PLAIN, temperature=9), "temperature")
    fails(litellm.NotFoundError, lambda: ask(PLAIN, model="openai/none"), "none")


def bad_key() -> None:
    fails(litellm.AuthenticationError, lambda: ask(PLAIN, api_key="wrong"))


def cancel() -> str:
    body = {"messages": LONG, "extra_body": {"ignore_eos": True}}
    pieces = litellm.completion(**PLACE, **body, stream=True)
    for _ in range(3):
        next(pieces)
    pieces.completion_stream.close()
    streamed = wait_rows(False)

    async def leave() -> None:
        going = asyncio.ensure_future(litellm.acompletion(**PLACE, **body))
        await asyncio.to_thread(wait_rows, True)
        going.cancel()
        await asyncio.gather(going, return_exceptions=True)

    asyncio.run(leave())
    return f"rows free after {streamed:.2f} s, whole {wait_rows(False):.2f} s"


report(
    version("litellm"),
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
