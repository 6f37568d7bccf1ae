"""The device mesh, shardings, and host arrays made global.

Synopsis:

  mesh = sharding.make_mesh()
  batch = sharding.to_global(mesh, {'image': local_rows})
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

DATA_AXIS = 'data'


def make_mesh(devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
  """A one-axis mesh over `devices`, by default all devices of all hosts."""
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh(
    (len(devices),),
    (DATA_AXIS,),
    devices=devices,
    axis_types=(jax.sharding.AxisType.Auto,),
  )


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


def to_global(
  mesh: jax.sharding.Mesh, batch: Mapping[str, np.ndarray]
) -> dict[str, jax.Array]:
  """Puts this process's rows of a batch on its devices, as global arrays."""
  target = batched(mesh)
  return {
    key: jax.make_array_from_process_local_data(target, np.asarray(rows))
    for key, rows in batch.items()
  }


def replicate(mesh: jax.sharding.Mesh, tree: Any) -> Any:
  """Puts a tree of host arrays on every device."""
  return jax.device_put(tree, replicated(mesh))


def abstract_replicated(tree: Any) -> Any:
  """Shapes of a tree, replicated over all devices, to restore into."""
  target = replicated(make_mesh())
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=target), tree
  )
