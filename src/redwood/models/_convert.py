"""From a GGUF file to a folder that Transformers loads: safetensors, tokenizer, configuration.

Or to tokenizer and configuration alone, for the native backend, which reads the GGUF itself.

The work is done once per model, in a process of its own: it needs several times the file's size in
memory, which is given back at its end, and Transformers' settings and progress bars stay out of the
caller's process.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redwood.errors import ModelError
from redwood.models._cache import made_by, say
from redwood.models._transformers import gguf_options

if TYPE_CHECKING:
    from redwood.models._gguf_vocab import Facts

NO_WEIGHTS = "none"
"""In place of a dtype: tokenizer and configuration only."""

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, NO_WEIGHTS: 0}
_DESCRIPTION_BYTES = 32_000_000  # a tokenizer of 150k tokens takes half of this

REFUSED = "tokenizer-refused.txt"
"""In place of a tokenizer's files: why none was made. The rest can be used with another one."""

_MAKERS = ("_convert.py", "_gguf_pre.py", "_gguf_spm.py", "_gguf_vocab.py", "gguf_tokenizer.py")

_CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from redwood.models._convert import run
run(*sys.argv[2:])
"""


def converted_size(source: Path, dtype: str) -> int:
    """Returns the bytes that converting takes, from the GGUF's list of tensors.

    Raises: ModelError if the file is not a GGUF, is cut short, lacks a part, or holds no language
        model: then nothing is begun.
    """
    from redwood.models._gguf_parts import GGUFModel, check_language_model

    with GGUFModel(source) as file:
        check_language_model(file)
        elements = sum(math.prod(tensor.shape) for tensor in file.tensors.values())
        weights = elements * _ITEM_BYTES[dtype]
        if len(file.parts) > 1 and dtype != NO_WEIGHTS:  # merged first
            weights += sum(tensor.size for tensor in file.tensors.values())
    return weights + _DESCRIPTION_BYTES


def convert(source: Path, target: Path, dtype: str) -> None:
    """Writes the model of a GGUF file to the new folder `target`, its weights in `dtype`.

    Raises: OSError if the disk is full; ModelError, with the reason, if Transformers cannot
        convert the file.
    """
    command = [sys.executable, "-W", "ignore", "-c", _CHILD, json.dumps(sys.path)]
    done = subprocess.run(
        [*command, str(source), str(target), dtype],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
    )
    if done.returncode == 0:
        for line in done.stdout.splitlines():
            say(line)
        return
    if "No space left" in done.stderr or "os error 28" in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    lines = done.stderr.strip().splitlines()
    reason = lines[-1] if lines and done.returncode > 0 else "no reason given"
    if done.returncode < 0:
        reason = f"ended by signal {-done.returncode}; was there enough memory?"
    doing = "read the tokenizer of" if dtype == NO_WEIGHTS else "convert"
    to = "" if dtype == NO_WEIGHTS else f" to {dtype}"
    raise ModelError(f"cannot {doing} {source.name}{to}: {reason}")


def makers() -> dict[str, str]:
    """Returns what a conversion depends on besides its source: versions, and the code itself."""
    digest = hashlib.sha256()
    for name in _MAKERS:
        with suppress(OSError):  # an archive: the version has to do
            digest.update(Path(__file__).with_name(name).read_bytes())
    return {**made_by("redwood", "transformers", "tokenizers"), "code": digest.hexdigest()[:16]}


def run(source_name: str, target_name: str, dtype: str) -> None:
    """Does the work of `convert`, inside the process made for it.

    Lines for the user go to stdout.
    """
    import torch
    import transformers

    from redwood.models.gguf_tokenizer import build_tokenizer, read_gguf_facts

    source, target = Path(source_name), Path(target_name)
    refusal, facts, tokenizer = None, None, None
    try:
        facts = read_gguf_facts(source)
        tokenizer = build_tokenizer(facts)
    except ModelError as error:
        refusal = str(error)
    if dtype == NO_WEIGHTS:
        described = transformers.AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    else:
        described, report = transformers.AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            **gguf_options(),
        )
        if absent := sorted(report["missing_keys"]):  # they would hold random numbers
            raise ModelError(f"{len(absent)} weights are not in the file, for instance {absent[0]}")
    generation = _generation(getattr(described, "config", described), facts)
    if dtype != NO_WEIGHTS:
        described.generation_config = generation
    target.mkdir()  # fails if the parent was killed and its workspace cleared: then we end too
    described.save_pretrained(target)
    generation.save_pretrained(target)
    if refusal is not None:
        (target / REFUSED).write_text(refusal, "utf-8")
    elif facts is not None:
        _save_tokenizer(tokenizer, facts, target)


def _save_tokenizer(tokenizer: Any, facts: Facts, target: Path) -> None:
    """Saves a tokenizer and holds what will be loaded against the file, too."""
    import transformers

    from redwood.models.gguf_tokenizer import hold_against

    tokenizer.save_pretrained(target, save_jinja_files=False)  # named ones would get a folder
    loaded = transformers.PreTrainedTokenizerFast.from_pretrained(target, local_files_only=True)
    hold_against(loaded, facts)
    if loaded.backend_tokenizer.to_str() != tokenizer.backend_tokenizer.to_str():
        raise facts.refusal("its tokenizer is another one after it was saved and loaded")
    for note in facts.notes:
        print(note)


def _generation(config: Any, facts: Facts | None) -> Any:
    """Returns a generation config with the file's ids, which `config` gets as well."""
    import transformers

    ids, ends = (facts.ids, facts.ends()) if facts is not None else ({}, [])
    config.bos_token_id, config.pad_token_id = ids.get("bos"), ids.get("pad")
    config.eos_token_id = ends[0] if ends else None
    return transformers.GenerationConfig(
        bos_token_id=config.bos_token_id,
        pad_token_id=config.pad_token_id,
        eos_token_id=ends or None,
    )
