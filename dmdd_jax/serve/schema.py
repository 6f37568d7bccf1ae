"""What the server's answers hold, and how they are described."""

import base64
import io
from typing import Literal

import numpy as np
from PIL import Image
import pydantic

from dmdd_jax.serve import regions as regions_lib


class ModelInfo(pydantic.BaseModel):
  """A category that is served; `feedback`: whether opinions are kept."""

  category: str
  image_size: int
  image_threshold: float | None
  pixel_threshold: float | None
  feedback: bool


class Health(pydantic.BaseModel):
  """The server's state."""

  status: Literal['ok']
  waiting: int


class AnomalyMap(pydantic.BaseModel):
  """A map of the model's size; `data` is base64.

  png: 8-bit grey, 0 is `low` and 255 is `high`; float32: little-endian rows.
  """

  format: Literal['png', 'float32']
  size: int
  low: float
  high: float
  data: str


class Inspection(pydantic.BaseModel):
  """The answer for an image.

  `regions`: the highest peak first, at most 100. `preview`: a JPEG in base64,
  for formats that browsers do not show.
  """

  category: str
  score: float
  verdict: Literal['defective', 'good', 'uncalibrated']
  image_threshold: float | None
  pixel_threshold: float | None
  height: int
  width: int
  map: AnomalyMap | None
  regions: list[regions_lib.Region]
  preview: str | None


class Fault(pydantic.BaseModel):
  """Why a request was refused."""

  detail: str


class InspectQuery(pydantic.BaseModel):
  """What may stand behind the question mark of /v1/inspect."""

  model_config = pydantic.ConfigDict(extra='forbid')

  category: str | None = pydantic.Field(
    None, description='Needed if several are served.'
  )
  map: Literal['png', 'float32', 'none'] = pydantic.Field(
    'png', description='How the map is sent.'
  )
  preview: bool = pydantic.Field(
    False, description='Whether the image is sent back as JPEG.'
  )


class FeedbackQuery(pydantic.BaseModel):
  """What may stand behind the question mark of /v1/feedback."""

  model_config = pydantic.ConfigDict(extra='forbid')

  opinion: Literal['good', 'defective'] = pydantic.Field(
    description='What the image is.'
  )
  category: str | None = pydantic.Field(
    None, description='Needed if several are served.'
  )
  reason: str = pydantic.Field('', max_length=500)
  name: str = pydantic.Field(
    '', max_length=500, description='Of the file, where it came from.'
  )


class Feedback(pydantic.BaseModel):
  """What was kept, and where in the folder of --feedback."""

  category: str
  file: str
  score: float
  verdict: Literal['defective', 'good', 'uncalibrated']


def encode_map(values: np.ndarray, map_format: str) -> AnomalyMap | None:
  """A map (S, S) for a response, see `AnomalyMap`; None for 'none'."""
  if map_format == 'none':
    return None
  low, high = float(values.min()), float(values.max())
  if map_format == 'float32':
    data = np.ascontiguousarray(values, '<f4').tobytes()
  else:
    shades = (values - low) / max(high - low, 1e-12)
    file = io.BytesIO()
    picture = Image.fromarray(np.round(shades * 255).astype(np.uint8))
    picture.save(file, 'PNG', compress_level=1)
    data = file.getvalue()
  return AnomalyMap(
    format=map_format,
    size=len(values),
    low=low,
    high=high,
    data=base64.b64encode(data).decode(),
  )


_REASONS = {
  400: 'no image in the body',
  401: 'the token is missing or wrong',
  403: 'the page of another site asks',
  404: 'no such category',
  408: 'the body did not arrive in time',
  413: 'too many bytes or pixels, or too long to decode',
  415: 'no image of a known format',
  500: 'the model failed',
  503: 'too many requests are waiting',
  507: 'the folder of --feedback cannot be written to',
}
BODY = {
  'required': True,
  'content': {
    'multipart/form-data': {
      'schema': {
        'type': 'object',
        'required': ['image'],
        'properties': {'image': {'type': 'string', 'format': 'binary'}},
      }
    },
    'application/json': {
      'schema': {
        'type': 'object',
        'required': ['image'],
        'properties': {
          'image': {
            'type': 'string',
            'format': 'byte',
            'description': 'An image file in base64, or its data URL.',
          }
        },
      }
    },
  },
}
FAULTS = {
  code: {'model': Fault, 'description': text} for code, text in _REASONS.items()
}
