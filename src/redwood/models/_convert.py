"""From a GGUF file to a folder that Transformers loads: safetensors, tokenizer, configuration.

Or to tokenizer and configuration alone, for the native backend, which reads the GGUF itself.

The work is done once per model, in a process of its own: it needs several times the file's size in
memory, which is given back at its end, and Transformers' settings and progress bars stay out of the
caller's process.
"""

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from redwood._transformers import gguf_options
from redwood.errors import ModelError

NO_WEIGHTS = "none"
"""In place of a dtype: tokenizer and configuration only."""

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, NO_WEIGHTS: 0}
_DESCRIPTION_BYTES = 32_000_000  # a tokenizer of 150k tokens takes half of this

# Tokens that end an answer. A GGUF names a single one, and a model may use several.
_STOPS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<end_of_turn>")

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


def run(source_name: str, target_name: str, dtype: str) -> None:
    """Does the work of `convert`, inside the process made for it."""
    import torch
    import transformers

    source, target = Path(source_name), Path(target_name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    _restore_splitting(tokenizer, source)
    if dtype == NO_WEIGHTS:
        return _describe(source, target, tokenizer)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=getattr(torch, dtype),
        output_loading_info=True,
        **gguf_options(),
    )
    if absent := sorted(report["missing_keys"]):  # they would hold random numbers
        raise ModelError(f"{len(absent)} weights are not in the file, for instance {absent[0]}")
    model.generation_config = _generation(model.config, tokenizer)
    target.mkdir()  # fails if the parent was killed and its workspace cleared: then we end too
    tokenizer.save_pretrained(target)
    model.save_pretrained(target)


def _describe(source: Path, target: Path, tokenizer: Any) -> None:
    import transformers

    config = transformers.AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    target.mkdir()
    tokenizer.save_pretrained(target)
    config.save_pretrained(target)
    _generation(config, tokenizer).save_pretrained(target)


def _generation(config: Any, tokenizer: Any) -> Any:
    import transformers

    return transformers.GenerationConfig(
        bos_token_id=config.bos_token_id,
        pad_token_id=config.pad_token_id,
        eos_token_id=_stop_ids(tokenizer, config.eos_token_id),
    )


def _stop_ids(tokenizer: Any, eos_token_id: int | None) -> list[int]:
    """Returns the file's own end token first, then the others that the vocabulary has."""
    vocabulary = tokenizer.get_vocab()
    named = [vocabulary[token] for token in _STOPS if token in vocabulary]
    return list(dict.fromkeys([eos_token_id, *named] if eos_token_id is not None else named))


def _restore_splitting(tokenizer: Any, source: Path) -> None:
    """Cuts digits apart for files that ask for it, which Transformers (5.23) does not do.

    Without it "\\n\\n1" or four spaces before a digit become other tokens than in training.
    """
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(source).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
