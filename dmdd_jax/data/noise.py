"""Random fields for generated images and textures.

Synopsis:

  rng = noise.generator(seed=0, name='test/good/000')
  field = noise.band_limited(rng, size=128, cycles=4)
"""

import hashlib

import numpy as np


def generator(seed: int, name: str) -> np.random.Generator:
  """Returns the generator of one picture; other names give other numbers."""
  digest = hashlib.blake2b(f'{seed}/{name}'.encode(), digest_size=16).digest()
  words = np.frombuffer(digest, '<u4').tolist()
  return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def band_limited(
  rng: np.random.Generator,
  size: int,
  cycles: float,
  *,
  stretch: float = 1.0,
  angle: float = 0.0,
  octaves: float = 0.7,
) -> np.ndarray:
  """Returns tileable band-limited noise, mean 0 and deviation 1, (S, S).

  Args:
    rng: the random generator.
    size: height and width S.
    cycles: the band's centre, in cycles per picture.
    stretch: length of the grains over their width.
    angle: direction of the grains' length, in radians from the x axis.
    octaves: the band's width (deviation of log2 of the frequency).
  """
  spectrum = np.fft.rfft2(rng.standard_normal((size, size)))
  fy = np.fft.fftfreq(size, 1 / size)[:, np.newaxis]
  fx = np.fft.rfftfreq(size, 1 / size)[np.newaxis]
  along = np.cos(angle) * fx + np.sin(angle) * fy
  across = np.cos(angle) * fy - np.sin(angle) * fx
  radius = np.hypot(along * stretch, across)
  radius[0, 0] = 1
  band = np.exp(-0.5 * (np.log2(radius / cycles) / octaves) ** 2)
  band[0, 0] = 0
  field = np.fft.irfft2(spectrum * band, (size, size))
  return field / max(field.std(), 1e-12)
