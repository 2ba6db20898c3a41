"""The compiled module: `src/native/bindings*.cpp`. Absent where it could not be built.

Arguments of the wrong type, shape or value raise TypeError or ValueError. Arrays are C-contiguous.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

def explain_bus_errors() -> None:
    """A mapped file that was cut short then ends the process with a line that names it."""

def kinds(kind: str) -> str | None:
    """The format that holds a kind of weights exactly; None: it is not read."""

def instruction_sets() -> list[str]:
    """Those that run here, best first."""

def packed_bytes(format: str, rows: int, cols: int) -> int: ...
def pack(
    kind: str,
    data: NDArray[np.uint8],
    rows: int,
    cols: int,
    order: NDArray[np.int32] | None,
    format: str,
    out: NDArray[np.uint8],
    threads: int,
) -> None:
    """Packs `rows` rows; row r is row order[r] of `data` (None: r)."""

def unpack(
    format: str, packed: NDArray[np.uint8], cols: int, first: int, out: NDArray[np.float32]
) -> None:
    """Numbers of the rows from `first`; out: [rows, cols]."""

def read(kind: str, data: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """Numbers of all rows of a file; out: [rows, cols]."""

def product(
    isa: str,
    format: str,
    packed: NDArray[np.uint8],
    rows: int,
    x: NDArray[np.float32],
    out: NDArray[np.float32],
    add: bool = False,
) -> None:
    """One product alone. x: [n, cols]; out: [n, rows padded to 16]."""

class State:
    """A state of recurrent layers, which rows may share."""

    @property
    def id(self) -> int:
        """Tells it apart from others while it is held."""

    def read(self, out: NDArray[np.uint8]) -> None: ...

class Decoder:
    """A decoder with its rows; keeps the arrays of its weights alive."""

    def __init__(
        self,
        config: dict[str, object],
        matrices: dict[str, tuple[str, NDArray[np.uint8]]],
        vectors: dict[str, NDArray[np.float32]],
        threads: int,
        cpus: Sequence[int],
        isa: str,
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def cache_bytes(self) -> int: ...
    @property
    def state_bytes(self) -> int:
        """Of the states of recurrent layers after a token; 0: there are none."""

    @property
    def record_bytes(self) -> int:
        """Of what a provisional node does to states."""

    def states(self, rows: Sequence[int]) -> int:
        """How many states these rows hold, shared ones counted once."""

    def reusable(self, row: int, length: int) -> int:
        """The longest beginning of at most `length` tokens that has a state."""

    def open(self) -> int: ...
    def fork(self, row: int, slots: int) -> int: ...
    def pages(self, rows: Sequence[int]) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    def page_ids(self, row: int) -> list[int]:
        """Numbers that tell its pages apart while they are held, in order."""

    def read_page(self, row: int, page: int, out: NDArray[np.uint8]) -> None: ...
    def append_page(self, row: int, data: NDArray[np.uint8]) -> None:
        """Puts a page of 64 slots behind those of the row."""

    def states_of(self, row: int) -> dict[int, State]:
        """The states that a row has, by how many of its tokens they stand behind."""

    def make_state(self, data: NDArray[np.uint8]) -> State: ...
    def restore_states(self, row: int, tokens: NDArray[np.int32], states: dict[int, State]) -> None:
        """Gives a row that has its pages the committed tokens, and states behind some of them."""

    def release(self, row: int) -> None: ...
    def shrink(self, row: int, slots: int) -> None: ...
    def keep(self, row: int, length: int, nodes: NDArray[np.int32]) -> None:
        """Keeps these provisional nodes, in order, behind `length` slots."""

    def extend(
        self,
        entries: Sequence[tuple[int, int, NDArray[np.int32], NDArray[np.int32], int]],
        logits: NDArray[np.float32],
    ) -> None:
        """Scores the new nodes of rows, to logits [sum of num_logits, vocab_size padded to 16].

        Entries: row, committed length, parents of all provisional nodes, new tokens, num_logits.
        """

def row_range(row: NDArray[np.float32] | NDArray[np.float64]) -> tuple[float, float, int]:
    """See `redwood.sampling.kernels.row_range`."""

def best_few(rows: NDArray[np.float32], ids: NDArray[np.int32], probs: NDArray[np.float32]) -> bool:
    """See `redwood.sampling.kernels.best_few`."""

def weigh(
    row: NDArray[np.float32] | NDArray[np.float64],
    high: float,
    temperature: float,
    out: NDArray[np.float64],
) -> float:
    """See `redwood.sampling.kernels.weigh`."""

def truncate(
    weights: NDArray[np.float64], mass: float, top_k: int, top_p: float, min_p: float
) -> float:
    """See `redwood.sampling.kernels.truncate`."""

def draw(weights: NDArray[np.float64], uniform: float) -> int:
    """See `redwood.sampling.kernels.draw`."""

def race(weights: NDArray[np.float64], key: int, position: int) -> tuple[list[int], list[float]]:
    """See `redwood.sampling.kernels.gumbel_candidates`."""

def uniforms_at(
    key: int, position: int, tokens: NDArray[np.int64], out: NDArray[np.float64]
) -> None:
    """See `redwood.sampling.kernels.uniforms_at`."""

def log(row: NDArray[np.float64], out: NDArray[np.float64]) -> None:
    """See `redwood.sampling.kernels.log`."""

class TextIndex:
    """See `redwood.algorithms.sssd.TextIndex`; compares 4 tokens at most."""

    def __len__(self) -> int: ...
    def extend(self, token_ids: Sequence[int]) -> None: ...
    def matches(self, suffix: Sequence[int]) -> list[tuple[int, list[int]]]: ...
    def followers(self, places: Sequence[int]) -> dict[int, list[int]]: ...

class SuccessorTable:
    """See `redwood.algorithms.successors.SuccessorTable`."""

    def __init__(self, max_bytes: int) -> None: ...
    def __len__(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def max_bytes(self) -> int: ...
    @property
    def rows(self) -> int: ...
    def learn(
        self,
        tail: Sequence[int],
        token_ids: Sequence[int],
        parents: Sequence[int],
        ids: NDArray[np.int32],
        probs: NDArray[np.float32],
    ) -> None: ...
    def find(self, context: Sequence[int]) -> list[tuple[int, list[tuple[int, float]]]]: ...
    def clear(self) -> None: ...
    def entries(self) -> NDArray[np.uint8]: ...
    def load(self, entries: NDArray[np.uint8], rows: int) -> None: ...

class Rates:
    """See `redwood.algorithms.source_rates.Rates`."""

    hits: list[float]
    trials: list[float]

    def rate(self, cell: int, prior: float) -> float: ...
    def count(self, cell: int, hit: bool) -> None: ...
    def load(self, hits: Sequence[float], trials: Sequence[float]) -> None: ...

class Retriever:
    """See `redwood.algorithms.retrieval.Retriever`."""

    index: TextIndex

    def __init__(self, own_text: bool) -> None: ...
    def __len__(self) -> int: ...
    def extend(self, token_ids: Sequence[int], rates: Rates) -> None: ...
    def draft(
        self,
        size: int,
        max_branch: int,
        least: float,
        rates: Rates,
        table: SuccessorTable | None,
        stored: Sequence[tuple[int, Sequence[Sequence[int]]]],
        predicted: Sequence[int],
        run: int,
    ) -> tuple[list[int], list[int], list[float], list[int]]: ...
