"""Small parameters in one array, because each argument of a program takes time at every call.

A call of a pmapped program takes about 20 µs for each array, and the update of a small array takes
longer than its arithmetic. On a CPU (2 cores, AMD EPYC with AVX-512) a step of the digits' network,
whose state has 459 arrays, is 1.1 times as fast with 11, and compiles in two thirds of the time.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from ddpm_jax import cpu

SMALL = 2**16  # elements; larger arrays are few, and take longer to copy


class Layout(NamedTuple):
    """Where the arrays of a tree are in a Packed."""

    treedef: Any
    shapes: tuple  # of the small arrays
    is_small: tuple  # of each array


@flax.struct.dataclass
class Packed:
    """The arrays of a tree, all of one dtype."""

    small: jax.Array  # [N], those with fewer than SMALL elements, one after another
    large: list  # the others
    layout: Layout = flax.struct.field(pytree_node=False)


def pack(tree):
    """`packed` on a CPU; the tree itself on other devices, where this was not measured."""
    return packed(tree) if cpu.is_used() else tree


def packed(tree):
    """Replaces the dicts of parameters in a tree, such as a TrainState, by Packed ones.

    A dict without small arrays stays.
    """
    return jax.tree.map(_pack, tree, is_leaf=_is_dict)


def unpack(tree):
    """The inverse of packed; large arrays are the same, not copies."""
    return jax.tree.map(_unpack, tree, is_leaf=_is_packed)


def _is_dict(tree):
    return isinstance(tree, dict)


def _is_packed(tree):
    return isinstance(tree, Packed)


def _pack(tree):
    if not _is_dict(tree):
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    small = [leaf for leaf in leaves if leaf.size < SMALL]
    if not small:
        return tree
    is_small = tuple(leaf.size < SMALL for leaf in leaves)
    layout = Layout(treedef, tuple(leaf.shape for leaf in small), is_small)
    return Packed(_join(small), [leaf for leaf in leaves if leaf.size >= SMALL], layout)


def _unpack(packed):
    if not _is_packed(packed):
        return packed
    layout, large = packed.layout, iter(packed.large)
    small = iter(_split(packed.small, layout.shapes))
    leaves = [next(small if is_small else large) for is_small in layout.is_small]
    return jax.tree.unflatten(layout.treedef, leaves)


@jax.jit
def _join(leaves):
    return jnp.concatenate([leaf.ravel() for leaf in leaves])


@functools.partial(jax.jit, static_argnums=1)
def _split(vector, shapes):
    ends = list(itertools.accumulate(map(math.prod, shapes)))
    parts = jnp.split(vector, ends[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
