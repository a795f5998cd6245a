"""Runs an op on every device of a mesh, on what each holds of the leaves. Knows cuts; moves nothing.

XLA cannot look into a custom call, so it would first gather sharded leaves on every device. Here it is told
how the arrays are cut. Where shardings are part of the types (``AxisType.Explicit``) a ``shard_map`` says so;
where only the compiler knows them (``AxisType.Auto``) that takes a ``custom_partitioning``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxkv.errors import CacheMismatchError, ConfigError
from jaxkv.transfer.shard_grid import OpCuts, find_specs, sharding_rule

Arrays = tuple[jax.Array, ...]

# jax does not annotate these.
_custom_partitioning: Any = custom_partitioning
_reshard: Any = jax.reshard


def run_on_shards(op: Callable[..., Arrays], cuts: OpCuts, arrays: Sequence[jax.Array]) -> Arrays:
    """What ``op`` gives on every device together; ``arrays`` are the operands of ``cuts``, leaves last.

    Leaves stay where they are. Raises ``CacheMismatchError`` where they do not lie as ``cuts`` says; if only
    the compiler can know, it raises a ``jax.errors.JaxRuntimeError`` that quotes it.
    """
    mesh: Any = jax.typeof(arrays[-1]).sharding.mesh
    axis_types = set(mesh.axis_types)
    if axis_types == {AxisType.Explicit}:
        return _map_shards(op, cuts, arrays)
    if not cuts.grid.parts:
        return op(*arrays)
    if axis_types - {AxisType.Auto}:
        raise CacheMismatchError(
            f"leaves of shapes {[leaf.shape for leaf in cuts.grid.leaves]} are more than one device holds, "
            f"and mesh axes {mesh.axis_names} are of types {mesh.axis_types}; make them all Auto or all "
            "Explicit, or call the op under a shard_map over all that shard the leaves"
        )
    if not getattr(jax.config, "jax_use_shardy_partitioner", True):
        raise ConfigError(
            "page ops on sharded leaves need XLA's Shardy partitioner, but jax_use_shardy_partitioner is "
            "False; leave it at its default, or call the op under shard_map"
        )
    return _partition(op, cuts, arrays)


def _map_shards(op: Callable[..., Arrays], cuts: OpCuts, arrays: Sequence[jax.Array]) -> Arrays:
    num_others = len(arrays) - len(cuts.grid.leaves)
    others, leaves = arrays[:num_others], arrays[num_others:]
    shardings: list[Any] = [jax.typeof(leaf).sharding for leaf in leaves]
    mesh = shardings[0].mesh
    specs = find_specs(cuts, shardings)
    # Types must agree here. Where every device has all of an array, it cuts out its part without the others.
    laid = [
        _reshard(other, NamedSharding(mesh, specs[array.name]))
        for other, array in zip(others, cuts.operands, strict=False)
    ]
    mapped = jax.shard_map(
        op,
        mesh=mesh,
        in_specs=tuple(specs[array.name] for array in cuts.operands),
        out_specs=tuple(specs[array.name] for array in cuts.results),
        check_vma=False,  # tensor shards give a status each, equal but for the time it took
    )
    results: Arrays = mapped(*laid, *leaves)
    return results


def _partition(op: Callable[..., Arrays], cuts: OpCuts, arrays: Sequence[jax.Array]) -> Arrays:
    num_others = len(arrays) - len(cuts.grid.leaves)
    types: Any = tuple(jax.core.ShapedArray(result.shape, result.dtype) for result in cuts.results)
    local_shape = cuts.grid.local_shape(cuts.grid.leaves[0])

    def whole(*operands: jax.Array) -> Arrays:
        return tuple(_unpartitioned.bind(*operands, types=types, local_shape=local_shape))

    def partition(mesh: Mesh, operands: Sequence[Any], _: Sequence[Any]) -> tuple[Any, ...]:
        specs = find_specs(cuts, [leaf.sharding for leaf in operands[num_others:]])
        results = tuple(NamedSharding(mesh, specs[array.name]) for array in cuts.results)
        return mesh, op, results, tuple(NamedSharding(mesh, specs[array.name]) for array in cuts.operands)

    rule, factor_sizes = sharding_rule(cuts)
    partitioned = _custom_partitioning(whole)
    partitioned.def_partition(partition, sharding_rule=rule, **factor_sizes)
    results: Arrays = partitioned(*arrays)
    return results


def _refuse(*_: Any, local_shape: tuple[int, ...], **__: Any) -> NoReturn:
    raise CacheMismatchError(
        f"leaf 0 lies whole on one device, which held {local_shape} of it when the caches were registered; "
        "put it back on its mesh, or register the caches as they are now"
    )


_unpartitioned: Any = Primitive("jaxkv_unpartitioned")
"""The op on leaves that lie on one device after all. It has a type, and is refused when it is lowered."""
_unpartitioned.multiple_results = True
_unpartitioned.def_abstract_eval(lambda *_, types, local_shape: list(types))  # noqa: ARG005
mlir.register_lowering(_unpartitioned, _refuse)
