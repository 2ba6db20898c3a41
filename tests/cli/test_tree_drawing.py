"""Pictures of trees: every node is there, and nothing lies on anything else."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from itertools import combinations

import pytest

from redwood.algorithms.sequoia import expected_tokens, optimal_tree
from redwood.cli.tree_drawing import RADIUS, nodes_of, positions, svg, text_lines

RATES = [0.7, 0.2, 0.06, 0.02]
BY_LEVEL = [[0.9, 0.05], [0.6, 0.3, 0.05], [0.2]]
FORK = [-1, 0, 0, 1, 1, 2]
SVG = "{http://www.w3.org/2000/svg}"
TREES = {
    "root": [-1],
    "chain": [-1, 0, 1, 2, 3],
    "star": [-1, 0, 0, 0, 0],
    "fork": FORK,
    "optimal": optimal_tree(RATES, 64),
    "children out of order": [-1, 0, 0, 2, 1, 3, 4, 4, 1],
}


def test_nodes_know_rank_depth_and_the_product_of_the_rates_above() -> None:
    nodes = nodes_of(FORK, RATES)
    assert [node.rank for node in nodes] == [0, 1, 2, 1, 2, 1]
    assert [node.depth for node in nodes] == [0, 1, 1, 2, 2, 2]
    expected = [1.0, 0.7, 0.2, 0.49, 0.14, 0.14]
    assert [node.score for node in nodes] == pytest.approx(expected)


def test_rates_by_level_are_those_of_the_parents_depth() -> None:
    scores = [node.score for node in nodes_of(FORK, BY_LEVEL)]
    assert scores == pytest.approx([1.0, 0.9, 0.05, 0.54, 0.27, 0.03])


@pytest.mark.parametrize("rates", [RATES, BY_LEVEL, [], [[]]])
@pytest.mark.parametrize("name", TREES)
def test_scores_add_up_to_the_expected_tokens(name: str, rates: list[float]) -> None:
    total = sum(node.score for node in nodes_of(TREES[name], rates))
    assert total == pytest.approx(expected_tokens(TREES[name], rates))


def test_text_shows_each_node_below_its_parent() -> None:
    assert list(text_lines(FORK, nodes_of(FORK, RATES))) == [
        "root  1.0000",
        "├─ rank 1  0.7000",
        "│  ├─ rank 1  0.4900",
        "│  └─ rank 2  0.1400",
        "└─ rank 2  0.2000",
        "   └─ rank 1  0.1400",
    ]


def test_a_chain_deeper_than_pythons_stack_is_drawn() -> None:
    chain = list(range(-1, 1500))
    nodes = nodes_of(chain, [0.99])
    assert len(list(text_lines(chain, nodes))) == 1501
    assert svg(chain, nodes, "deep").count("<circle") == 1501


@pytest.mark.parametrize("name", TREES)
def test_nodes_of_one_depth_are_at_least_one_apart(name: str) -> None:
    places = positions(TREES[name])
    for (x, depth), (other_x, other_depth) in combinations(places, 2):
        assert depth != other_depth or abs(x - other_x) >= 1.0 - 1e-9


@pytest.mark.parametrize("name", TREES)
def test_svg_is_well_formed_with_a_circle_per_node_and_no_overlap(name: str) -> None:
    parents = TREES[name]
    nodes = nodes_of(parents, RATES)
    root = ElementTree.fromstring(svg(parents, nodes, "a < b & c"))
    assert root.find(f"{SVG}title").text == "a < b & c"
    circles = [
        (float(c.get("cx")), float(c.get("cy")), float(c.get("r")))
        for c in root.iter(f"{SVG}circle")
    ]
    lines = [
        tuple(float(n.get(k)) for k in ("x1", "y1", "x2", "y2")) for n in root.iter(f"{SVG}line")
    ]
    assert len(circles) == len(parents) and len(lines) == len(parents) - 1
    width, height = float(root.get("width")), float(root.get("height"))
    for x, y, r in circles:
        assert r == RADIUS and r <= x <= width - r and r <= y <= height - r
    for (x, y, r), (other_x, other_y, other_r) in combinations(circles, 2):
        assert y != other_y or abs(x - other_x) > r + other_r
    for node, (x1, y1, x2, y2) in enumerate(lines, start=1):
        assert (x2, y2) == circles[node][:2]
        assert (x1, y1) == circles[parents[node]][:2]


def test_svg_names_rank_and_score_of_every_node() -> None:
    nodes = nodes_of(FORK, RATES)
    drawn = svg(FORK, nodes, "fork")
    for index, node in enumerate(nodes):
        name = f"rank {node.rank}" if index else "root"
        assert f"node {index}, {name}, depth {node.depth}, score {node.score:.6g}<" in drawn
