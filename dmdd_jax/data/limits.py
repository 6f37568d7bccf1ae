"""What an image file may be made of, beyond its number of pixels.

A file of few pixels, or of few bytes, can still take minutes and gigabytes to
decode. What shows in the structure of a file is refused before it is decoded.

Synopsis:

  with Image.open(path) as file:
    fault = limits.fault(file)
"""

import re

from PIL import ImageFile

# Each side of an image, in pixels. Pillow's resize takes time and memory by the
# longer side alone: 23 s and 1.3 GB for 1 x 50,000,000 pixels.
SIDE = 100_000
# Passes over a JPEG's pixels. libjpeg itself writes 10 for a progressive colour
# file, 18 for CMYK; a scan of a few bytes takes as long as any other.
SCANS = 32

# A marker of JPEG that is no stuffed byte, no filler and no restart. In the
# data of a scan only those occur.
_MARKER = re.compile(rb'\xff+([^\x00\xff\xd0-\xd7])', re.DOTALL)
_START, _END, _SCAN = 0xD8, 0xD9, 0xDA


def fault(file: ImageFile.ImageFile) -> str:
  """Says why an opened file is not to be decoded; empty if it may be.

  Args:
    file: by `PIL.Image.open`, not loaded yet; of a JPEG the bytes are read.
  """
  if max(file.size) > SIDE:
    return (
      f'the image has {file.width} x {file.height} pixels; a side may have'
      f' {SIDE} at most'
    )
  # An MPO file is a JPEG with more JPEGs behind it.
  if file.format in ('JPEG', 'MPO') and file.fp is not None:
    position = file.fp.tell()
    file.fp.seek(0)
    content = file.fp.read()
    file.fp.seek(position)
    if count_scans(content, SCANS + 1) > SCANS:
      return f'the JPEG has more than {SCANS} scans; save it again'
  return ''


def count_scans(content: bytes, most: int) -> int:
  """The scans of a JPEG up to its end; stops counting at `most`.

  JPEGs within a segment, such as the thumbnail of EXIF, do not count.
  """
  scans = position = 0
  while scans < most:
    marker = _MARKER.search(content, position)
    if marker is None or marker[1][0] == _END:
      break
    position = marker.end()
    scans += marker[1][0] == _SCAN
    if marker[1][0] not in (_START, 0x01):  # All others have a length.
      position += int.from_bytes(content[position : position + 2], 'big')
  return scans
