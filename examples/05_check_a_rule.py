"""The exactness kit on rules of one's own: a right one passes, a common mistake is caught."""

from redwood import testing, verify
from redwood.tree import Law


def accept_by_the_draft_ratio(tree, target_probs, chance):
    """A mistake seen in public code: POINT nodes judged as if they had been drawn."""
    nodes = [0]
    while True:
        row = target_probs[nodes[-1]]
        for child in tree.children[nodes[-1]]:
            if chance.coin(child, min(1.0, 2.0 * float(row[tree.token_list[child]]))):
                nodes.append(child)
                break
        else:
            return verify.Acceptance(nodes, chance.draw(row))


cases = testing.random_cases(seed=1, count=20, laws=[Law.POINT])
testing.check_exact(verify.traversal, cases)
print("traversal verification: exact on all cases")

try:
    cases = testing.random_cases(seed=1, count=20, laws=[Law.POINT])
    testing.check_exact(accept_by_the_draft_ratio, cases)
except testing.ExactnessError as error:
    print("the mistake is caught:", str(error).splitlines()[0])
else:
    raise SystemExit("the kit missed a wrong rule")
