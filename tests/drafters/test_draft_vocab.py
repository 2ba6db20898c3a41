"""A draft model that scores a list of tokens: the same laws, cut to the list, over the same ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import redwood
from conftest import save_model, tiny_tokenizer
from decoder_kit import save_gguf, tiny_model
from redwood.algorithms.successors import ENTRY, SuccessorTable
from redwood.backends.base import Nodes
from redwood.backends.load import open_model
from redwood.backends.native.load import load_native
from redwood.bench.acceptance import Text, paired
from redwood.drafters.base import ModelDrafter, NgramDrafter, UnionDrafter, parts_of
from redwood.drafters.context import Context
from redwood.engine import RowEngine, draft_vocab
from redwood.engine.draft_vocab import DRAFT_VOCAB, RANKED_VOCAB, outputs_of, special_ids
from redwood.errors import ArgumentError, TableError
from redwood.sampling import GumbelNoise, History, SamplingParams
from redwood.table import target_id, write_table
from redwood.table.ranking import LEAST_ROWS, rank_tokens, ranked_ids, read_ranking
from redwood.testing import TableBackend

VOCAB = 60
IDS = np.array([1, 2, 5, 7, 8, 20, 21, 33, 40, 58])
TEXT = [5, 9, 17, 5, 9, 17, 5, 9]
SHAPE = [-1, 0, 0, 0, 1, 1, 2]


class Listed(TableBackend):
    """A model by table that reads all tokens and scores some."""

    def __init__(self, ids: Sequence[int] = tuple(IDS), reads: int = VOCAB, **options: Any) -> None:
        super().__init__(reads, **{"capacity": 256, **options})
        self.output_ids, self.num_embeddings = torch.tensor(list(ids)), reads
        self.vocab_size = len(ids)

    def logits(self, text: Sequence[int]) -> Tensor:
        """As of a model that scores all."""
        self.vocab_size = self.num_embeddings
        row = super().logits(text)
        self.vocab_size = len(self.output_ids)
        return row[self.output_ids]

    def extend(self, rows: Sequence[Nodes]) -> list[Tensor]:
        """Checks what it can read, and no less."""
        self.vocab_size = self.num_embeddings
        return super().extend(rows)


def _context(vocab_size: int = VOCAB, **params: Any) -> Context:
    made = SamplingParams(**params)
    noise = GumbelNoise(1, vocab_size) if made.coupled and made.temperature else None
    rng = np.random.default_rng(1)
    return Context(1, list(TEXT), made, History(TEXT), vocab_size, rng, noise)


PARAMS = {
    "point": {"temperature": 0.0},
    "without_replacement": {"temperature": 0.9},
    "with_replacement": {"temperature": 0.9},
    "coupled": {"temperature": 0.9, "seed": 3},
}


@pytest.mark.parametrize("more", [{}, {"logit_bias": {7: 2.0, 9: 50.0}}, {"presence_penalty": 1.5}])
@pytest.mark.parametrize("how", PARAMS)
def test_the_law_stored_is_the_models_own_over_the_listed_tokens(
    how: str, more: dict[str, Any]
) -> None:
    """Against a model whose other logits are as good as none: the same trees and draft rows."""

    class Masked(TableBackend):
        def logits(self, text: Sequence[int]) -> Tensor:
            row = torch.full((VOCAB,), -1e30)
            row[torch.tensor(IDS)] = super().logits(text)[torch.tensor(IDS)]
            return row

    law = how if how.startswith("with") else "point"
    trees = []
    for backend in (Listed(seed=4), Masked(VOCAB, seed=4, capacity=256)):
        for shape in (SHAPE, None):
            drafter = ModelDrafter(backend, shape, law=law, width=len(IDS))
            (tree,) = drafter.propose([_context(**PARAMS[how], **more)], [7])
            trees.append(tree)
    for mine, theirs in zip(trees[:2], trees[2:], strict=True):
        assert mine.token_list == theirs.token_list and mine.parent_list == theirs.parent_list
        assert mine.law_list == theirs.law_list and len(mine) > 3
        assert set(mine.token_list[1:]) <= set(IDS.tolist())
        if mine.draft_probs is not None:
            assert theirs.draft_probs is not None and mine.draft_ids is not None
            torch.testing.assert_close(mine.draft_probs, theirs.draft_probs, rtol=1e-6, atol=1e-9)
            assert torch.equal(mine.draft_ids, theirs.draft_ids)


def test_draft_rows_are_the_softmax_over_the_list() -> None:
    backend = Listed(seed=4)
    drafter = ModelDrafter(backend, [-1, 0, 0], law="without_replacement", width=99)
    (tree,) = drafter.propose([_context(temperature=0.9)], [3])
    probs, ids = tree.draft_row(0)
    want = TableBackend(VOCAB, seed=4, capacity=256).logits(TEXT)[torch.tensor(IDS)].double()
    by_id = dict(zip(IDS.tolist(), torch.softmax(want / 0.9, -1).tolist(), strict=True))
    assert ids is not None and sorted(ids.tolist()) == IDS.tolist()
    assert probs.tolist() == pytest.approx([by_id[token] for token in ids.tolist()], abs=1e-6)


def test_tokens_past_the_targets_vocabulary_are_not_drafted() -> None:
    for how in PARAMS.values():
        drafter = ModelDrafter(Listed(), SHAPE, width=8)
        (tree,) = drafter.propose([_context(vocab_size=21, **how)], [7])
        assert max(tree.token_list) <= 20
    with pytest.raises(ArgumentError, match="more children than 2 tokens"):
        ModelDrafter(Listed(), SHAPE).propose([_context(vocab_size=5)], [7])


@pytest.mark.parametrize("guesses", [0, 4])
@pytest.mark.parametrize("params", [{}, {"temperature": 0.9, "seed": 11}], ids=["greedy", "seed"])
def test_texts_equal_plain_decoding(params: dict[str, Any], guesses: int) -> None:
    """Targets whose tokens are mostly outside the list, and a draft model that is the target."""
    target = TableBackend(VOCAB, seed=4, capacity=256)
    for ids in (IDS, range(0, VOCAB, 2), range(VOCAB)):
        drafter = ModelDrafter(Listed(ids, seed=4), guesses=guesses, width=8)
        engine = redwood.Engine(target, drafter, budget=6)
        plain = redwood.Engine(target, budget=1)
        for prompt in ([1, 2, 3], TEXT, [59, 59]):
            how: dict[str, Any] = {"max_tokens": 40, **params}
            made = engine.generate(prompt, **how)
            assert made.token_ids == plain.generate(prompt, **how).token_ids
    assert made.stats.target_passes < 40  # of the list that holds all: it drafts, and is right


def test_sampled_texts_have_the_targets_law() -> None:
    """Chi-square of two tokens over many texts; the list leaves most tokens out."""
    target = TableBackend(12, seed=2, capacity=16, spread=1.0)

    draft = Listed([0, 3, 4, 9], 12, seed=3, spread=1.0)
    first = torch.softmax(target.logits([1, 2]).double(), -1).numpy()
    want = np.stack(
        [p * torch.softmax(target.logits([2, t]).double(), -1).numpy() for t, p in enumerate(first)]
    )
    for law in ("without_replacement", "with_replacement"):
        drafter = ModelDrafter(draft, [-1, 0, 0, 1], law=law, width=4)
        engine, count = RowEngine(target, drafter, budget=4, max_rows=400), 6000
        got, texts = np.zeros((12, 12)), dict[int, list[int]]()
        for _ in range(count):
            texts[engine.add([1, 2], SamplingParams(temperature=1.0, max_tokens=2))] = []
        while engine.busy:
            for step in engine.step():
                texts[step.request] += step.token_ids
        for one, two in texts.values():
            got[one, two] += 1
        expected = want * count
        used = expected > 5
        square = float((((got - expected) ** 2)[used] / expected[used]).sum())
        degrees = int(used.sum())
        assert square < degrees + 4.5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("weights", ["auto", "draft", "f32"])
@pytest.mark.parametrize("kind", ["folder", "tied", "Q4_K", "Q8_0"])
def test_a_listed_head_gives_the_bits_of_the_whole_one(
    kind: str, weights: str, tmp_path: Path
) -> None:
    pytest.importorskip("redwood._native", reason="installed without a compiler")
    wide = {"hidden_size": 256, "intermediate_size": 512}
    model = tiny_model("qwen3" if kind == "tied" else "llama", **wide)
    gguf = None
    if kind.startswith("Q"):
        gguf = save_gguf(tmp_path / "m.gguf", model, kind)
    else:
        save_model(tmp_path, model, tiny_tokenizer())
    how: dict[str, Any] = {"weights": weights}
    whole = load_native(tmp_path, gguf, **how)
    ids = np.array([0, 3, 17, 18, 19, 64, 95])
    some = load_native(tmp_path, gguf, outputs=np.append(ids, [96, 1000]), **how)  # none: left out
    assert some.output_ids is not None and some.output_ids.tolist() == ids.tolist()
    assert (some.vocab_size, some.num_embeddings) == (len(ids), 96)
    rows = [backend.open() for backend in (whole, some)]
    nodes = ([5, 90, 17, 2], [-1, 0, 0, 1])
    full, listed = (
        b.extend([Nodes(row, *nodes)])[0] for b, row in zip((whole, some), rows, strict=True)
    )
    assert torch.equal(listed, full[:, ids])
    for wrong in (ids[::-1].copy(), np.array([1, 1]), np.array([-1, 2]), np.array([], np.int64)):
        with pytest.raises(ArgumentError, match="outputs"):
            load_native(tmp_path, gguf, outputs=wrong, **how)
    assert load_native(tmp_path, gguf, outputs=np.arange(200), **how).output_ids is None


def test_along_a_text_logits_are_by_token() -> None:
    target, draft = TableBackend(VOCAB, seed=1, capacity=256), Listed(seed=2)
    whole = TableBackend(VOCAB, seed=2, capacity=256)
    for (_, mine), (_, want) in zip(
        paired(target, draft, Text(TEXT, [3, 7, 58])),
        paired(target, whole, Text(TEXT, [3, 7, 58])),
        strict=True,
    ):
        assert mine.shape == want.shape
        assert torch.equal(mine[IDS], want[IDS]) and (np.delete(mine.numpy(), IDS) == -1e30).all()


def test_tokens_are_ranked_by_what_was_said() -> None:
    table = SuccessorTable()
    rows = (
        np.array([[9, 4], [9, 4], [7, 9]], np.int32),
        np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4]], np.float32),
    )
    table.learn([], [1, 2, 3], [-1, 0, 0], *rows)
    assert rank_tokens(table.entries()).tolist() == [9, 7, 4]
    assert rank_tokens(SuccessorTable().entries()).tolist() == []
    entries = np.zeros(
        3, ENTRY
    )  # equal weights: the lower id first; a probability of 0 is no token
    entries["rows"], entries["tokens"][:, 0], entries["probs"][:, 0] = (
        [2, 1, 4],
        [8, 6, 3],
        [
            0.5,
            1.0,
            0.0,
        ],
    )
    assert rank_tokens(entries.view(np.uint8).reshape(3, 64)).tolist() == [6, 8]


def test_special_tokens_come_first_and_the_first_ids_fill() -> None:
    ranking = np.array([50, 40, 1, 30])
    assert ranked_ids(ranking, 3, [99]).tolist() == [40, 50, 99]
    assert ranked_ids(ranking, 8, [99, 40, 40]).tolist() == [0, 1, 2, 3, 30, 40, 50, 99]
    assert ranked_ids(ranking[:0], 4).tolist() == [0, 1, 2, 3]
    with pytest.raises(ArgumentError, match="no room for 3"):
        ranked_ids(ranking, 2, [7, 8, 9])


def _table_file(path: Path, model: Path, rows: int = LEAST_ROWS) -> Path:
    """A table of a tiny model that ranks the tokens from 100 to 139."""
    entries = np.zeros(40, ENTRY)
    entries["key"], entries["rows"] = np.arange(1, 41), np.arange(40, 0, -1)
    entries["tokens"][:, 0], entries["probs"][:, 0] = np.arange(100, 140), 0.5
    tokenizer = redwood.load(model, None, backend="eager").tokenizer
    write_table(
        path, target_id(str(model), tokenizer, 300), entries.view(np.uint8).reshape(40, 64), rows
    )
    return path


def test_what_may_be_named(tiny_model_folder: Path, tmp_path: Path, caplog: Any) -> None:
    path = _table_file(tmp_path / "said:1", tiny_model_folder)
    tokenizer = tiny_tokenizer()
    assert special_ids(tokenizer)[:2] == [0, 1]
    assert outputs_of(None, path, tokenizer) is outputs_of("all", None, tokenizer) is None
    assert outputs_of(77, path, tokenizer) == 77
    assert outputs_of("auto", None, tokenizer) == DRAFT_VOCAB
    assert outputs_of("auto", tmp_path / "new", tokenizer) == DRAFT_VOCAB
    for named, table in ((f"{path}:32", None), ("table:32", path), ("auto:32", path)):
        ids = outputs_of(named, table, tokenizer, ends=[260])
        assert isinstance(ids, np.ndarray)
        assert ids.tolist() == [0, 1, *range(100, 129), 260]
    for named, table in ((path, None), (str(path), None), ("table", path)):
        ids = outputs_of(named, table, tokenizer)
        assert isinstance(ids, np.ndarray) and len(ids) == RANKED_VOCAB == DRAFT_VOCAB
    assert not caplog.records
    few = _table_file(tmp_path / "few", tiny_model_folder, rows=LEAST_ROWS - 1)
    assert outputs_of("auto", few, tokenizer) == DRAFT_VOCAB and not caplog.records
    assert outputs_of(few, None, tokenizer) == DRAFT_VOCAB and len(caplog.records) == 1
    for wrong in ("table", 2.5, "table:0", ["table"]):
        with pytest.raises(ArgumentError, match="draft_vocab"):
            outputs_of(wrong, path if wrong == "table:0" else None, tokenizer)  # type: ignore[arg-type]
    with pytest.raises(TableError, match="does not exist"):
        outputs_of("no-such-table", None, tokenizer)
    with pytest.raises(TableError, match="another tokenizer"):
        read_ranking(path, tiny_tokenizer(280))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TableError, match="damaged"):
        outputs_of("auto", path, tokenizer)


def _model_of(engine: redwood.Engine) -> Any:
    """The backend of the model that drafts."""
    (model,) = [part for part in parts_of(engine.drafter) if isinstance(part, ModelDrafter)]
    return model.backend


@pytest.mark.parametrize("params", [{}, {"temperature": 0.9, "seed": 5}], ids=["greedy", "seed"])
def test_a_loaded_draft_model_scores_what_the_table_ranks(
    params: dict[str, Any], tiny_model_folder: Path, tiny_draft_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("redwood._native", reason="installed without a compiler")
    path = _table_file(tmp_path / "said", tiny_model_folder)
    plain = redwood.load(tiny_model_folder, None, backend="native")
    names = f"auto+{tiny_draft_folder}"
    with redwood.load(
        tiny_model_folder, names, backend="native", table=path, draft_vocab="table:64", budget=6
    ) as engine:
        listed = _model_of(engine).output_ids
        assert len(listed) == 64 and {0, 1, *range(100, 140)} <= set(listed.tolist())
        for prompt in ("Tom went to the market.", [5, 9, 17]):
            how: dict[str, Any] = {"max_tokens": 30, "ignore_eos": True, **params}
            made = engine.generate(prompt, **how)
            assert made.token_ids == plain.generate(prompt, **how).token_ids
            assert made.stats.num_draft_tokens > 0


def test_the_default_ranks_where_a_table_is_kept(
    tiny_model_folder: Path, tiny_draft_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    pytest.importorskip("redwood._native", reason="installed without a compiler")
    monkeypatch.setattr(draft_vocab, "RANKED_VOCAB", 48)
    path = _table_file(tmp_path / "said", tiny_model_folder)
    for table, scored in ((path, 48), (tmp_path / "new", 300)):
        names = ["auto", str(tiny_draft_folder)]
        with redwood.load(
            tiny_model_folder, names[1:] + ["table"], backend="native", table=table
        ) as e:
            (model,) = [part for part in e.drafter.parts if isinstance(part, ModelDrafter)]  # type: ignore[attr-defined]
            assert model.backend.vocab_size == scored


@pytest.mark.slow
@pytest.mark.parametrize("how", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "seed"])
def test_a_real_model_says_the_same(how: dict[str, Any], tmp_path: Path) -> None:
    """SmolLM2 drafts for itself, from what a table ranks after two answers."""
    name, prompts = "smollm2-135m-instruct", ["Name three trees.", "Write a poem about rain."]
    chats = [[{"role": "user", "content": text}] for text in prompts]
    with redwood.load(name, backend="native", table=tmp_path / "said") as engine:
        plain = [engine.generate(c, max_tokens=48, speculate=False, **how) for c in chats]
        ranking = rank_tokens(engine.kept_tables[0].table.entries())
    assert len(ranking) > 50
    ids = ranked_ids(ranking, 2048, special_ids(engine.tokenizer))
    _, backend = open_model(name, outputs=ids, draft_weights="draft", backend="native")
    for drafter in (ModelDrafter(backend), UnionDrafter([ModelDrafter(backend), NgramDrafter()])):
        made = redwood.load(name, drafter, backend="native", budget=6)
        for chat, want in zip(chats, plain, strict=True):
            answer = made.generate(chat, max_tokens=48, **how)
            assert answer.token_ids == want.token_ids
            assert answer.stats.num_accepted_tokens > 0
