"""What a request may ask of the server."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a request may ask for.

  Attributes:
    bytes: of an image file; 20 megapixels of 16 bits in four channels fit.
    pixels: of an image; checked before it is decoded.
    waiting: requests being read, decoded or waiting for the device; one more
      gets 503.
    held: bytes of all bodies that are read or decoded; more gets 503.
    seconds: a body may take to arrive.
    decode_seconds: decoding an image may take.
    decode_memory: bytes of address space of a process that decodes.
  """

  bytes: int = 160 * 2**20
  pixels: int = 50_000_000
  waiting: int = 128
  held: int = 2**30
  seconds: float = 30.0
  decode_seconds: float = 10.0
  decode_memory: int = 3 * 2**30
