"""The list of mutations keeps up with the sources: each still changes one place, named tests exist.

That the tests catch them is shown by `python -m tests.mutations`.
"""

import ast

import pytest

from tests.mutations.__main__ import MUTATIONS, ROOT
from tests.mutations.mutation import Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_changes_one_place_and_names_tests_that_exist(mutation: Mutation) -> None:
    text = (ROOT / mutation.file).read_text()
    assert text.count(mutation.source) == 1
    changed = text.replace(mutation.source, mutation.changed)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text))
    assert mutation.tests
    for test in mutation.tests:
        file, _, function = test.partition("::")
        tests = ast.parse((ROOT / "tests" / file).read_text()).body
        names = {node.name for node in tests if isinstance(node, ast.FunctionDef)}
        assert function in names if function else names


def test_mutations_have_names_of_their_own() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) > 25
