"""Trees of tensors: there and back, in one order, with what is no tensor left as it is."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import random

from dni_rnn.pytree import (
    LSTMState,
    detach,
    flatten,
    flatten_rows,
    map_tree,
    part,
    unflatten,
    unflatten_rows,
    where_rows,
)


class Pair(NamedTuple):
    first: Any
    second: Any


branches = st.recursive(
    st.one_of(st.none(), st.integers(-9, 9).map(lambda n: torch.tensor(float(n)))),
    lambda tree: st.one_of(
        st.lists(tree, max_size=3),
        st.lists(tree, max_size=3).map(tuple),
        st.tuples(tree, tree).map(lambda both: Pair(*both)),
        st.dictionaries(st.sampled_from("zyxab"), tree, max_size=4),
    ),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    """Alike to the type, to the order of a dict's keys, and to the identity of each tensor."""
    if type(a) is not type(b):
        return False
    if a is None or isinstance(a, torch.Tensor):
        return a is b
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


@given(branches)
def test_there_and_back(tree):
    leaves, spec = flatten(tree)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    assert same(unflatten(leaves, spec), tree)
    assert same(map_tree(lambda leaf: leaf, tree), tree)
    replaced, again = flatten(map_tree(lambda leaf: leaf + 1.0, tree))
    assert again == spec
    assert [float(leaf) for leaf in replaced] == [float(leaf) + 1.0 for leaf in leaves]


def test_nothing_is_structure_and_no_leaf():
    tree = (None, [torch.ones(1), None], {"a": None})
    leaves, spec = flatten(tree)
    assert len(leaves) == 1
    assert spec != flatten((None, [torch.ones(1)], {"a": None}))[1]
    assert map_tree(lambda leaf: leaf * 2, tree) == (None, [torch.tensor([2.0]), None], {"a": None})
    assert flatten(None)[0] == []
    assert unflatten([], flatten(None)[1]) is None


def test_a_dict_is_read_by_sorted_key_and_comes_back_in_its_own_order():
    one, two, three = torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)
    tree, other = {"z": one, "a": two, "m": three}, {"m": three, "z": one, "a": two}
    assert flatten(tree)[0] == flatten(other)[0] == [two, three, one]
    assert list(map_tree(torch.neg, tree)) == ["z", "a", "m"]
    assert list(map_tree(torch.neg, other)) == ["m", "z", "a"]


@pytest.mark.parametrize(
    ("leaf", "name"), [(object(), "object"), ("h", "str"), (bytes(2), "bytes"), ({1}, "set")]
)
def test_what_is_no_tensor_is_refused(leaf, name):
    with pytest.raises(TypeError, match=f"found a {name} in it"):
        flatten({"state": torch.zeros(1), "other": [leaf]})


def test_a_part_is_a_field_a_key_or_an_index():
    hidden, cell = torch.ones(1), torch.zeros(1)
    state = LSTMState(hidden, cell)
    assert part(state, "cell") is part(state, 1) is part(state, -1) is cell
    assert part({"b": cell, "a": hidden}, "a") is hidden
    assert part({0: hidden, 1: cell}, 1) is cell  # the key, not the place
    assert part([hidden, (cell, hidden)], 1) == (cell, hidden)
    assert part(state, None) is state
    assert part(hidden, None) is hidden


def test_detached_is_the_same_without_a_history():
    leaf = torch.ones(2, requires_grad=True)
    tree = detach({"b": leaf * 2, "a": None})
    assert list(tree) == ["b", "a"]
    assert torch.equal(tree["b"], torch.full((2,), 2.0))
    assert not tree["b"].requires_grad


def test_rows_are_chosen_one_by_one(generator):
    """Key by key, in whatever order the two have them."""
    chosen = {"memory": random(generator, 2, 3, 4), "output": random(generator, 3, 5)}
    other = {"output": random(generator, 3, 5), "memory": random(generator, 2, 3, 4)}
    mixed = where_rows(torch.tensor([False, True, False]), chosen, other)
    for key in chosen:
        assert torch.equal(mixed[key][..., 1, :], chosen[key][..., 1, :])
        for row in (0, 2):
            assert torch.equal(mixed[key][..., row, :], other[key][..., row, :])
    maps = random(generator, 3, 2, 4, 4), random(generator, 3, 2, 4, 4)
    mixed = where_rows(torch.tensor([True, False, False]), *maps, batch_dim=0)
    assert torch.equal(mixed, torch.cat([maps[0][:1], maps[1][1:]]))


@pytest.mark.parametrize("batch_dim", [-2, 0])
def test_rows_side_by_side_and_back(batch_dim, generator):
    if batch_dim == 0:
        tree = {"maps": random(generator, 3, 2, 4, 5), "vector": random(generator, 3, 7)}
    else:
        tree = {
            "z": random(generator, 2, 3, 4),
            "one": random(generator, 1, 3, 2),
            "a": random(generator, 3, 7),
        }
    rows = flatten_rows(tree, batch_dim)
    for row in range(3):
        wanted = [tree[key].select(batch_dim, row).flatten() for key in sorted(tree)]
        assert torch.equal(rows[row], torch.cat(wanted))
    leaves, _ = flatten(tree)
    for leaf, back in zip(leaves, unflatten_rows(rows, leaves, batch_dim), strict=True):
        assert torch.equal(leaf, back)
    for leaf in leaves:
        assert torch.equal(unflatten_rows(flatten_rows(leaf, batch_dim), [leaf], batch_dim)[0], leaf)
