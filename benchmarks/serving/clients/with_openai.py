"""OpenAI's Python client: one of 1.x and the newest."""

from __future__ import annotations

import asyncio
import json

import openai
from checks import KEY, LONG, MODEL, PLAIN, SEEDED, STOP, URL, fails, report, same, wait_rows

CLIENT = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)
CHAT = CLIENT.chat.completions
SCHEMA = {
    "type": "object",
    "properties": {"tree": {"enum": ["oak", "pine"]}},
    "required": ["tree"],
    "additionalProperties": False,
}


def plain() -> None:
    answer = CHAT.create(model=MODEL, **PLAIN["body"])
    same(answer.choices[0].message.content, PLAIN["texts"][0])
    same(answer.object, "chat.completion")
    same(answer.model, MODEL)


def stream() -> None:
    pieces = list(CHAT.create(model=MODEL, stream=True, **PLAIN["body"]))
    same("".join(p.choices[0].delta.content or "" for p in pieces), PLAIN["texts"][0])
    assert pieces[-1].choices[0].finish_reason


def usage() -> None:
    same(CHAT.create(model=MODEL, **PLAIN["body"]).usage.completion_tokens, PLAIN["num_tokens"])
    options = {"include_usage": True}
    pieces = list(CHAT.create(model=MODEL, stream=True, stream_options=options, **PLAIN["body"]))
    same(pieces[-1].choices, [])
    same(pieces[-1].usage.completion_tokens, PLAIN["num_tokens"])


def stop() -> None:
    choice = CHAT.create(model=MODEL, **STOP["body"]).choices[0]
    same((choice.message.content, choice.finish_reason), (STOP["texts"][0], "stop"))


def seeds_and_n() -> None:
    choices = CHAT.create(model=MODEL, **SEEDED["body"]).choices
    same([choice.message.content for choice in choices], SEEDED["texts"])


def completions() -> None:
    pieces = list(CLIENT.completions.create(model=MODEL, prompt="One, two,", stream=True, seed=1))
    whole = CLIENT.completions.create(model=MODEL, prompt="One, two,", seed=1)
    same("".join(p.choices[0].text for p in pieces), whole.choices[0].text)


def logprobs() -> None:
    answer = CHAT.create(model=MODEL, logprobs=True, top_logprobs=2, **PLAIN["body"])
    content = answer.choices[0].logprobs.content
    same(len(content), answer.usage.completion_tokens)
    same(len(content[0].top_logprobs), 2)


def prediction() -> None:
    expected = {"type": "content", "content": PLAIN["texts"][0]}
    answer = CHAT.create(model=MODEL, prediction=expected, **PLAIN["body"])
    same(answer.choices[0].message.content, PLAIN["texts"][0])
    assert answer.usage.completion_tokens_details.accepted_prediction_tokens > 0


def json_schema() -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "t", "strict": True, "schema": SCHEMA}}
    answer = CHAT.create(
        model=MODEL, messages=PLAIN["body"]["messages"], response_format=wanted, temperature=0
    )
    assert json.loads(answer.choices[0].message.content)["tree"] in ("oak", "pine")


def models() -> None:
    same([model.id for model in CLIENT.models.list()], [MODEL])
    same(CLIENT.models.retrieve(MODEL).id, MODEL)


def error() -> None:
    body = {**PLAIN["body"], "temperature": 9}
    fails(openai.BadRequestError, lambda: CHAT.create(model=MODEL, **body), "temperature")
    fails(openai.NotFoundError, lambda: CHAT.create(model="none", **PLAIN["body"]), "none")


def bad_key() -> None:
    other = CLIENT.with_options(api_key="wrong").chat.completions
    fails(openai.AuthenticationError, lambda: other.create(model=MODEL, **PLAIN["body"]))


def cancel() -> str:
    pieces = CHAT.create(model=MODEL, messages=LONG, stream=True, extra_body={"ignore_eos": True})
    for _ in range(3):
        next(iter(pieces))
    pieces.close()
    streamed = wait_rows(False)

    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY) as client:
            made = client.chat.completions.create(
                model=MODEL, messages=LONG, extra_body={"ignore_eos": True}
            )
            going = asyncio.ensure_future(made)
            await asyncio.to_thread(wait_rows, True)
            going.cancel()

    asyncio.run(leave())
    return f"rows free after {streamed:.2f} s, whole {wait_rows(False):.2f} s"


report(
    openai.__version__,
    {
        "plain": plain,
        "stream": stream,
        "usage": usage,
        "stop": stop,
        "seeds, n": seeds_and_n,
        "completions": completions,
        "logprobs": logprobs,
        "prediction": prediction,
        "json schema": json_schema,
        "models": models,
        "error": error,
        "bad key": bad_key,
        "cancel": cancel,
    },
)
