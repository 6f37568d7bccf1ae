"""MVTec AD with anomalies painted on the object alone, where it can be told.

`configs/mvtec_foreground.py:screw`, a comma list, or all 15. What it uses for
which category is `mvtec.FOREGROUND`; the others are as in configs/mvtec.py.
"""

import ml_collections

from configs import mvtec


def get_config(categories: str = '') -> ml_collections.ConfigDict:
  """Returns the configuration of some categories; '' means all 15."""
  config = mvtec.get_config(categories)
  rows = config.per_category.to_dict()
  for category, kind in mvtec.FOREGROUND.items():
    row = rows[category]
    synthesis = {**row.get('synthesis', {}), 'foreground': kind}
    rows[category] = {**row, 'synthesis': synthesis}
  config.per_category = ml_collections.ConfigDict(rows)
  return config
