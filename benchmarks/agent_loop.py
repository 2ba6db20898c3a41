"""An agent with the plain OpenAI client: a real file tool, a real calculator, twenty tasks.

Each task is done four times: tools called freely (auto) and the first call demanded (required),
each once streamed with speculation and once whole with plain decoding. Checked are: every call
parses and names a tool; every demanded call fits its schema; both ways say and call the same at
temperature 0. What is reported besides: how many tasks the model solves.

    redwood serve --target qwen2.5-coder-1.5b-instruct --drafter ngram
    python benchmarks/agent_loop.py --url http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import argparse
import ast
import json
import operator
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import OpenAI

_MOST_TURNS = 4
_SYSTEM = (
    "You are an assistant with tools. Use calculate for every calculation, and read_file, "
    "write_file and list_files for files. Answer in one short sentence."
)
_OPERATORS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
FILES = {
    "notes.txt": "Buy 12 apples at 3 crowns each.\nCall Anna on Friday.\n",
    "config.json": '{"port": 8080, "host": "localhost", "debug": false}\n',
    "main.py": "def area(width, height):\n    return width * height\n",
    "names.csv": "name,age\nTom,31\nAnna,28\n",
}
TASKS: list[tuple[str, str]] = [
    ("What is 37 * 43?", "1591"),
    ("What is 1234 + 8766?", "10000"),
    ("What is (17 + 5) * 12?", "264"),
    ("How much is 1001 divided by 7?", "143"),
    ("What is the remainder of 1000 divided by 7? Use the % operator.", "6"),
    ("Subtract 458 from 1000.", "542"),
    ("What is 2.5 * 16?", "40"),
    ("A box holds 24 bottles. How many bottles are in 15 boxes?", "360"),
    ("A train goes 85 km in an hour. How far does it go in 6 hours?", "510"),
    ("What is 99 * 99?", "9801"),
    ("Which port is in config.json?", "8080"),
    ("Read notes.txt. Whom should be called on Friday?", "Anna"),
    ("Which files are there?", "notes.txt"),
    ("Read names.csv. How old is Tom?", "31"),
    ("Read main.py. What is the name of the function in it?", "area"),
    ('Write the text "hello" into the file hello.txt.', "file:hello.txt=hello"),
    ('Write a file todo.txt that holds the line "water plants".', "file:todo.txt=water plants"),
    ('Create empty.json holding just {"a": "b"}.', 'file:empty.json="a"'),
    ("Read config.json. Which host is in it?", "localhost"),
    ("What is 12 * 3 + 4?", "40"),
]


def _tool(name: str, description: str, **properties: str) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {
                    key: {"type": "string", "description": said} for key, said in properties.items()
                },
                "required": list(properties),
                "additionalProperties": False,
            },
        },
    }


TOOLS = [
    _tool("calculate", "Calculates.", expression="Numbers, + - * / // % and parentheses."),
    _tool("read_file", "Returns what is in a file.", path="Its name."),
    _tool("write_file", "Writes a file.", path="Its name.", content="Its whole text."),
    _tool("list_files", "Returns the names of all files."),
]
_SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}


class Tools:
    """The tools, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name, text in FILES.items():
            (folder / name).write_text(text)

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Returns what a tool says; also of its errors."""
        try:
            return str(getattr(self, name)(**arguments))
        except Exception as error:  # the model is told
            return f"error: {type(error).__name__}: {error}"

    def calculate(self, expression: str) -> str:
        value = _evaluated(ast.parse(expression, mode="eval").body)
        return str(int(value) if float(value).is_integer() else value)

    def read_file(self, path: str) -> str:
        return self._inside(path).read_text()

    def write_file(self, path: str, content: str) -> str:
        self._inside(path).write_text(content)
        return f"wrote {len(content)} characters"

    def list_files(self) -> str:
        return "\n".join(sorted(each.name for each in self._folder.iterdir()))

    def _inside(self, path: str) -> Path:
        found = (self._folder / path).resolve()
        if self._folder.resolve() not in found.parents:
            raise ValueError("outside of the folder")
        return found


def _evaluated(node: ast.AST) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluated(node.operand)
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_evaluated(node.left), _evaluated(node.right))
    raise ValueError("only arithmetic")


@dataclass
class Run:
    """What one task did."""

    said: list[Any] = field(default_factory=list)
    calls: int = 0
    faults: list[str] = field(default_factory=list)
    answer: str = ""
    tokens: int = 0
    passes: int = 0
    solved: bool = False


def joined(stream: Any) -> tuple[dict[str, Any], str, Any]:
    """A message from its deltas, as any client joins them."""
    text, calls, reason, usage = "", [], "", None
    for chunk in stream:
        usage = chunk.usage or usage
        if not chunk.choices:
            continue
        choice = chunk.choices[0]
        reason = choice.finish_reason or reason
        text += choice.delta.content or ""
        for call in choice.delta.tool_calls or []:
            if call.index == len(calls):
                calls.append({"id": call.id, "name": call.function.name, "arguments": ""})
            calls[call.index]["arguments"] += call.function.arguments or ""
    return {"text": text, "calls": calls}, reason, usage


def ask(client: OpenAI, model: str, stream: bool, **request: Any) -> tuple[dict, str, Any]:
    """One answer, streamed or whole, in one form."""
    if stream:
        options = {"include_usage": True}
        return joined(
            client.chat.completions.create(
                model=model, stream=True, stream_options=options, **request
            )
        )
    made = client.chat.completions.create(model=model, **request)
    message = made.choices[0].message
    calls = [
        {"id": call.id, "name": call.function.name, "arguments": call.function.arguments}
        for call in message.tool_calls or []
    ]
    return (
        {"text": message.content or "", "calls": calls},
        made.choices[0].finish_reason,
        made.usage,
    )


def do(client: OpenAI, model: str, task: tuple[str, str], choice: str, streamed: bool) -> Run:
    """Does a task; streamed with speculation, whole without."""
    run = Run()
    question, wanted = task
    messages: list[Any] = [
        {"role": "system", "content": _SYSTEM},
        {"role": "user", "content": question},
    ]
    with tempfile.TemporaryDirectory() as folder:
        tools = Tools(Path(folder))
        for turn in range(_MOST_TURNS):
            demanded = choice if turn == 0 else "auto"
            said, reason, usage = ask(
                client,
                model,
                streamed,
                messages=messages,
                tools=TOOLS,
                tool_choice=demanded,
                parallel_tool_calls=False,
                temperature=0,
                max_tokens=160,
                extra_body={"redwood": {"speculate": streamed}},
            )
            told = (usage.model_extra or {}).get("redwood", {})
            run.tokens += usage.completion_tokens
            run.passes += told.get("target_passes", 0)
            run.said.append(
                [said["text"], [[c["name"], c["arguments"]] for c in said["calls"]], reason]
            )
            if demanded == "required" and not said["calls"] and reason != "length":
                run.faults.append("a demanded call is missing")
            if not said["calls"] or reason == "length":
                run.answer = said["text"]
                break
            messages.append(_message(said))
            for call in said["calls"]:
                run.calls += 1
                result = _result(tools, call, run.faults, demanded == "required")
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        run.solved = _solved(wanted, run.answer, messages, Path(folder))
    return run


def _message(said: dict[str, Any]) -> dict[str, Any]:
    calls = [
        {
            "id": call["id"],
            "type": "function",
            "function": {"name": call["name"], "arguments": call["arguments"]},
        }
        for call in said["calls"]
    ]
    return {"role": "assistant", "content": said["text"] or None, "tool_calls": calls}


def _result(tools: Tools, call: dict[str, Any], faults: list[str], demanded: bool) -> str:
    try:
        arguments = json.loads(call["arguments"])
    except ValueError:
        faults.append(f"arguments do not parse: {call['arguments']!r}")
        return "error: no JSON"
    schema = _SCHEMAS.get(call["name"])
    if schema is None:
        faults.append(f"no such tool: {call['name']!r}")
        return "error: no such tool"
    if set(arguments) != set(schema["required"]) or any(
        not isinstance(value, str) for value in arguments.values()
    ):
        if demanded:
            faults.append(f"arguments do not fit the schema: {call}")
        return "error: wrong arguments"
    return tools.call(call["name"], arguments)


def _solved(wanted: str, answer: str, messages: list[Any], folder: Path) -> bool:
    if wanted.startswith("file:"):
        name, _, text = wanted.removeprefix("file:").partition("=")
        path = folder / name
        return path.is_file() and text in path.read_text()
    return wanted in answer.replace(",", "").replace("\u202f", "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--key", default="none")
    parser.add_argument("--every", type=int, default=1, help="only every so many-th task")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    client = OpenAI(base_url=options.url, api_key=options.key, timeout=600, max_retries=0)
    model = client.models.list().data[0].id
    totals: dict[str, Any] = {}
    faults: list[str] = []
    for choice in ("auto", "required"):
        for task in TASKS[:: options.every]:
            started = time.monotonic()
            streamed = do(client, model, task, choice, True)
            whole = do(client, model, task, choice, False)
            faults += [f"{task[0]}: {fault}" for fault in streamed.faults + whole.faults]
            if streamed.said != whole.said:
                faults.append(f"{task[0]}: {streamed.said} is not {whole.said}")
            for name, run in ((f"{choice}, streamed", streamed), (f"{choice}, whole", whole)):
                kept = totals.setdefault(
                    name, {"tasks": 0, "calls": 0, "solved": 0, "tokens": 0, "passes": 0}
                )
                kept["tasks"] += 1
                kept["calls"] += run.calls
                kept["solved"] += run.solved
                kept["tokens"] += run.tokens
                kept["passes"] += run.passes
            print(
                f"{choice:8} {'+' if streamed.solved else '-'} {streamed.calls} calls, "
                f"{streamed.tokens / max(1, streamed.passes):.2f} tokens per pass, "
                f"{time.monotonic() - started:.0f} s: {task[0]} -> {streamed.answer[:60]!r}",
                flush=True,
            )
    for name, kept in totals.items():
        print(f"{name}: {kept}")
    for fault in faults:
        print("FAULT", fault)
    print(f"{len(faults)} faults")
    if options.json is not None:
        options.json.write_text(json.dumps({"model": model, **totals, "faults": faults}, indent=1))
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
