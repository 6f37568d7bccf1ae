"""DMDD (Dual-Modeling Decouple Distillation) anomaly detection on JAX/Flax.

Synopsis:

  inspector = dmdd_jax.train('parts/good', workdir='runs/parts', minutes=20)
  inspector = dmdd_jax.load('runs/mvtec/screw')
  for result in inspector(['a.png', 'b.png']):
    print(result.score, result.verdict, result.map.shape)
"""

__all__ = ['Inspector', 'load', 'train']


def __getattr__(name: str):
  """What `api` has, which is imported when it is asked for.

  jax, TensorFlow and Orbax take seconds to import.
  """
  if name not in __all__:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  from dmdd_jax import api

  return getattr(api, name)
