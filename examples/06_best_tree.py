"""Sequoia's best tree for an acceptance vector, and the best size for measured times."""

from redwood.algorithms.sequoia import choose_tree, expected_tokens, optimal_tree

acceptance = [0.75, 0.1, 0.05, 0.02]
for size in (2, 4, 8, 16, 32):
    tree = optimal_tree(acceptance, size)
    print(f"{size:3} nodes: {expected_tokens(tree, acceptance):.3f} tokens per pass")

times = {1: 50.0, 2: 52.0, 4: 56.0, 8: 66.0, 16: 100.0, 32: 160.0}  # ms of one target pass
plan = choose_tree(acceptance, times, draft_time=6.0)
print(f"best: {plan.size} nodes, {plan.levels} levels, {plan.speedup:.2f}x plain decoding")
