"""A datastore of real text: time to build, to look up and to add, and memory.

    python benchmarks/datastore.py
    python benchmarks/datastore.py --tokens 50000000 --text FOLDER --answers smollm2

The text is the source of installed Python packages unless folders are given, tokenised by the
target's tokenizer; packages are read until there is enough of it. Looked up are the last four
tokens at random places: of the text itself, which stand there, and of recorded answers (replay.py),
which mostly do not and back off. Times are of one process; the sorter uses one thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
from replay import load_answers, record_path

from redwood.datastore import Datastore, add, create
from redwood.datastore.search import look_up
from redwood.datastore.sources import Documents, find_files
from redwood.models import locate
from redwood.models.tokenizer import load_tokenizer

Texts = list[list[int]]


def packages() -> list[Path]:
    """Folders of installed packages, the large ones of pure Python first."""
    import torch
    import transformers

    home = Path(transformers.__file__).parent
    return [home, Path(torch.__file__).parent, home.parent]


def read_texts(folders: Sequence[Path], tokenizer: Any, most: int) -> Texts:
    """Tokenised files until there are `most` tokens."""
    files = [file for file in find_files(folders) if file.path.suffix in (".py", ".md", ".txt")]

    def enough() -> Iterator[list[int]]:
        count = 0
        for document in Documents(files, tokenizer):
            if count >= most:
                return
            yield document[: most - count]
            count += len(document)

    return list(enough())


def lookup_ms(store: Datastore, suffixes: Sequence[Sequence[int]]) -> dict[str, float]:
    """Milliseconds of single lookups: median and tails; how many tokens matched at most."""
    times, matched = [], []
    for suffix in suffixes:
        begin = time.perf_counter()
        found = look_up(store.chunks, suffix)
        times.append(1e3 * (time.perf_counter() - begin))
        matched.append(max((length for length, _ in found.matches(suffix)), default=0))
    low, middle, high, highest = np.percentile(times, [10, 50, 90, 99])
    made = {"p10": low, "median": middle, "p90": high, "p99": highest}
    made |= {f"matched_{n}": matched.count(n) / len(matched) for n in range(5)}
    return {name: round(float(value), 4) for name, value in made.items()}


def places(texts: Sequence[Sequence[int]], count: int, rng: np.random.Generator) -> Texts:
    """The last four tokens at random places of texts, by their lengths."""
    whole = list(itertools.chain.from_iterable(texts))
    starts = rng.integers(0, len(whole) - 4, count)
    return [whole[start : start + 4] for start in starts]


def memory_of_reader(path: Path, suffixes: Texts) -> dict[str, float]:
    """Megabytes of a fresh process before it opens a datastore, after, and after lookups."""
    code = f"""
import json, sys
from redwood.datastore import Datastore
from redwood.datastore.search import look_up
def rss(kind):
    lines = open("/proc/self/status").read().splitlines()
    return sum(int(l.split()[1]) for l in lines if l.startswith(kind)) / 1024
sizes = [rss("RssAnon")]
store = Datastore.open({str(path)!r})
sizes.append(rss("RssAnon"))
for suffix in json.load(sys.stdin):
    look_up(store.chunks, suffix)
print(json.dumps([*sizes, rss("RssAnon"), rss("RssFile")]))
"""
    ran = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(suffixes),
        capture_output=True,
        text=True,
        check=True,
    )
    before, opened, used, mapped = json.loads(ran.stdout)
    names = ("before", "opened", "after_lookups", "mapped_files_touched")
    return dict(zip(names, map(round, (before, opened, used, mapped)), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--text", type=Path, nargs="+", help="folders; default: packages")
    parser.add_argument("--answers", default="smollm2", help="record for lookups, if there is one")
    parser.add_argument("--lookups", type=int, default=3000)
    parser.add_argument("--folder", type=Path, help="for the datastore; default: a temporary one")
    options = parser.parse_args()
    tokenizer = load_tokenizer(locate(options.target)[0])
    begin = time.perf_counter()
    texts = read_texts(options.text or packages(), tokenizer, options.tokens)
    tokenise_s = time.perf_counter() - begin
    rng = np.random.default_rng(0)
    queries = {"of_the_text": places(texts, options.lookups, rng)}
    if record_path(options.answers).exists():
        answers = [answer.answer for answer in load_answers(options.answers)]
        queries["of_answers"] = places(answers, options.lookups, rng)
    num_tokens = sum(map(len, texts))
    result: dict[str, Any] = {"setting": common.setting(command=shlex.join(["python", *sys.argv]))}
    result |= {"tokens": num_tokens, "documents": len(texts), "tokenise_s": round(tokenise_s, 1)}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder, "store")
        kept = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begin = time.perf_counter()
        store = create(path, tokenizer, texts)
        result["build_s"] = round(time.perf_counter() - begin, 2)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - kept
        result |= {"build_peak_mb": round(peak / 1024), "chunks": len(store.chunks)}
        result["size_mb"] = round(store.manifest.size_bytes / 1e6, 1)
        begin = time.perf_counter()
        store = Datastore.open(path, tokenizer)
        result["open_ms"] = round(1e3 * (time.perf_counter() - begin), 2)
        for name, suffixes in queries.items():
            result[f"lookup_ms_{name}"] = lookup_ms(store, suffixes)
        result["reader_mb"] = memory_of_reader(path, queries["of_the_text"])
        begin = time.perf_counter()
        add(path, [texts[0][:128]])
        result["add_one_answer_s"] = round(time.perf_counter() - begin, 2)
        begin = time.perf_counter()
        Datastore.open(path).verify()
        result["verify_s"] = round(time.perf_counter() - begin, 2)
    common.save("datastore", result)
    for name, value in result.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
