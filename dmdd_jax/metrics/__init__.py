"""Metrics of anomaly detection on plain arrays: numpy and scipy in float64.

Usable without the rest of the package, with any framework's maps:

  from dmdd_jax.metrics import results
  metrics = results.compute(maps, masks, scores, labels)

`ranking` has AUROC, AP and F1-max. `region` has AU-PRO and the per-image PRO of
RD4AD's line of work, `spro` and `aupimo` what their names say. `store` keeps
more maps than fit in memory. `intervals` has confidence intervals, from the
counts of `tallies`. `results` computes all metrics in one call and formats
their tables; nothing here writes a file.
"""
