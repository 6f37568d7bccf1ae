"""DMDD (Dual-Modeling Decouple Distillation) anomaly detection on JAX/Flax.

Synopsis:

  inspector = dmdd_jax.load('runs/mvtec/screw')
  for result in inspector(['a.png', 'b.png']):
    print(result.score, result.verdict, result.map.shape)
"""


def load(workdir, step=None):
  """Loads a trained category's folder; see `predict.load`, `predict.Inspector`.

  Args:
    workdir: the folder that holds `checkpoints/`.
    step: which checkpoint, by default the newest.
  """
  from dmdd_jax import predict  # jax and Orbax take seconds to import.

  return predict.load(workdir, step)
