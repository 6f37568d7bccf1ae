"""What is known of a test set beside its masks: gaps, and MVTec LOCO's sPRO.

Synopsis:

  reason = truth.unknown(records)
  if reason:
    truth.explain(metrics, 'no masks', reason)
  truth.add_spro(metrics, data, records, maps, {'spro': 0.3})
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any

from absl import logging
import numpy as np

from dmdd_jax.data import files
from dmdd_jax.data import images as images_lib
from dmdd_jax.data import loco
from dmdd_jax.data import maps as map_files
from dmdd_jax.data import records as records_lib
from dmdd_jax.metrics import spro as spro_lib
from dmdd_jax.metrics import store as store_lib


def unknown(records: Sequence[records_lib.Record]) -> str | None:
  """Why there are no pixel metrics; None where every image has its truth."""
  missing = sum(not record.has_truth for record in records)
  if not missing:
    return None
  defective = sum(record.label for record in records)
  reason = f'{missing} of {defective} defective images have no mask'
  logging.warning('pixel metrics are null: %s', reason)
  return reason


def explain(metrics: dict[str, Any], reason: str, better: str) -> None:
  """Puts a better reason for undefined metrics in the place of another."""
  reasons = metrics['undefined']
  metrics['undefined'] = {
    name: better if why == reason else why for name, why in reasons.items()
  }


def add_spro(
  metrics: dict[str, Any],
  data: Mapping[str, Any],
  records: Sequence[records_lib.Record],
  maps: store_lib.Arrays,
  limits: Mapping[str, float],
) -> None:
  """Adds MVTec LOCO's sPRO: of both kinds of anomalies, and their mean.

  It is measured at the masks' sizes, as MVTec's evaluation code does:
  saturation areas count pixels there. NaN, with the reason under `undefined`,
  without what it needs.

  Args:
    metrics: gets NAME, NAME_logical and NAME_structural.
    data: `root` and `category` are read.
    records: the N test images.
    maps: N maps, resized where they have another size than the mask.
    limits: {NAME: false-positive rate up to which sPRO is taken}.
  """
  reason = 'no such anomalies in the test'
  spro = dict.fromkeys(limits, math.nan)
  try:
    if why := unknown(records):
      raise files.MissingDataError(why)
    kinds = loco.read_config(data['root'], data['category'])
    rates = tuple(limits.values())
    parts = {
      defect.removesuffix('_anomalies'): _spro(
        defect, kinds, records, maps, rates
      )
      for defect in loco.DEFECTS
    }
    for index, name in enumerate(limits):
      values = {f'{name}_{kind}': part[index] for kind, part in parts.items()}
      spro |= {name: float(np.mean(list(values.values()))), **values}
  except (files.MissingDataError, files.DatasetError) as error:
    logging.warning('sPRO is null: %s', error)
    reason = str(error)
  undefined = {k: reason for k, value in spro.items() if math.isnan(value)}
  metrics.update(spro)
  if undefined:
    metrics['undefined'] = metrics.get('undefined', {}) | undefined


def _spro(
  defect: str,
  kinds: Mapping[int, Mapping[str, Any]],
  records: Sequence[records_lib.Record],
  maps: store_lib.Arrays,
  limits: Sequence[float],
) -> list[float]:
  """sPRO of one kind of anomalies and the good images."""
  regions = []
  with store_lib.MapStore(exact=True) as native:
    for index, record in enumerate(records):
      if record.defect in (defect, records_lib.GOOD):
        mask = images_lib.native_mask(record)
        native.append(map_files.resize_map(maps[index], mask.shape), mask)
        regions.append(loco.read_regions(record, kinds))
    return spro_lib.spro(native.maps, regions, limits)
