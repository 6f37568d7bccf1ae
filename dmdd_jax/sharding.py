"""The device mesh, shardings, and host arrays made global.

Rows of a batch lie on the devices in the order of their processes: process i
of n holds the i-th n-th of them.

Synopsis:

  mesh = sharding.make_mesh()
  batch = sharding.to_global(mesh, {'image': local_rows})
  arrays = sharding.to_host(mesh, predicted)
"""

from collections.abc import Mapping, Sequence
import functools
from typing import Any

import jax
import numpy as np

DATA_AXIS = 'data'


def make_mesh(devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """A one-axis mesh over `devices`, by default all devices of all hosts."""
  return jax.sharding.Mesh(
    np.array(_ordered(jax.devices() if devices is None else devices)),
    (DATA_AXIS,),
    axis_types=(jax.sharding.AxisType.Auto,),
  )


def _ordered(devices: Sequence[jax.Device]) -> list[jax.Device]:
  return sorted(devices, key=lambda device: (device.process_index, device.id))


def processes(mesh: jax.sharding.Mesh) -> list[int]:
  """The processes whose devices are in a mesh."""
  return sorted({device.process_index for device in mesh.devices.flat})


def shard(mesh: jax.sharding.Mesh) -> tuple[int, int]:
  """(index, count) of this process among those of the mesh."""
  members = processes(mesh)
  return members.index(jax.process_index()), len(members)


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Every device holds the whole array."""
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def batched(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """The first axis is split over the devices."""
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(DATA_AXIS))


def check_batch_size(
  mesh: jax.sharding.Mesh, batch_size: int, field: str
) -> None:
  """Raises ValueError where a global batch does not divide over the mesh."""
  if batch_size < 1 or batch_size % mesh.size:
    raise ValueError(
      f'config.{field} = {batch_size} does not divide over {mesh.size}'
      f' devices; use a positive multiple of {mesh.size}'
    )


def local_rows(mesh: jax.sharding.Mesh, rows: np.ndarray) -> np.ndarray:
  """This process's rows of a batch that every process has whole."""
  index, count = shard(mesh)
  size = len(rows) // count
  return rows[index * size : (index + 1) * size]


def to_global(
  mesh: jax.sharding.Mesh, batch: Mapping[str, np.ndarray]
) -> dict[str, jax.Array]:
  """Puts this process's rows of a batch on its devices, as global arrays."""
  target = batched(mesh)
  return {
    key: jax.make_array_from_process_local_data(target, np.asarray(rows))
    for key, rows in batch.items()
  }


def to_host(mesh: jax.sharding.Mesh, tree: Any) -> Any:
  """Global arrays as numpy arrays, whole on every process of the mesh."""
  if len(processes(mesh)) > 1:
    tree = _gather(mesh)(tree)
  return jax.tree.map(np.asarray, tree)


def whole_rows(
  mesh: jax.sharding.Mesh, rows: Mapping[str, np.ndarray]
) -> Mapping[str, np.ndarray]:
  """The rows of all processes of the mesh: what `local_rows` undoes."""
  if len(processes(mesh)) == 1:
    return rows
  return to_host(mesh, to_global(mesh, rows))


@functools.cache
def _gather(mesh: jax.sharding.Mesh) -> Any:
  return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def replicate(mesh: jax.sharding.Mesh, tree: Any) -> Any:
  """Puts a tree of arrays, the same in every process, on every device."""
  target = replicated(mesh)
  if len(processes(mesh)) == 1:
    return jax.device_put(tree, target)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(target, np.asarray(x)),
    tree,
  )


def abstract_replicated(
  tree: Any, mesh: jax.sharding.Mesh | None = None
) -> Any:
  """Shapes of a tree, replicated, by default over all devices, to restore."""
  target = replicated(make_mesh() if mesh is None else mesh)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=target), tree
  )
