"""Metrics of anomaly detection on plain arrays: numpy and scipy in float64.

Usable without the rest of the package, with any framework's maps:

  from dmdd_jax.metrics import results
  metrics = results.compute(maps, masks, scores, labels)

`ranking` holds AUROC, AP and F1-max, `region` AU-PRO, sPRO, AUPIMO and the
per-image PRO of RD4AD's line, `maps` the store for more maps than memory
holds, `bootstrap` the confidence intervals, `results` the one entry point and
the tables.
"""
