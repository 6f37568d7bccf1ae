"""The child process that decodes the bodies of requests; see decoding.py.

A file that takes too long or too much memory ends this process, and not the
server. It reads jobs from standard input and answers on standard output, until
its input ends. It imports neither a web framework nor jax.
"""

import base64
import binascii
from collections.abc import Mapping
import hashlib
import io
import json
import os
import resource
import signal
import struct
import sys
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
import python_multipart
from python_multipart import exceptions
from python_multipart import multipart

from dmdd_jax.data import files
from dmdd_jax.data import images as images_lib

_FRAME = struct.Struct('>IQ')
_PREVIEW = 1600  # Pixels of its longer side, at most.
_PARTS = 8  # Of a form; one of them is the image.


class Refusal(Exception):
  """Why a body is refused: the status of HTTP, and a text."""

  def __init__(self, status: int, detail: str):
    super().__init__(detail)
    self.status = status


def write_frame(
  stream: BinaryIO, document: Mapping[str, Any], content: Any = b''
) -> None:
  """Sends a document and bytes to the other process."""
  head = json.dumps(document).encode()
  stream.write(_FRAME.pack(len(head), len(content)) + head)
  stream.write(content)
  stream.flush()


def read_frame(stream: BinaryIO) -> tuple[dict[str, Any], bytes]:
  """What `write_frame` sent.

  Raises:
    EOFError: the other process has ended.
  """
  head, length = _FRAME.unpack(_exactly(stream, _FRAME.size))
  return json.loads(_exactly(stream, head)), _exactly(stream, length)


def _exactly(stream: BinaryIO, count: int) -> bytes:
  content = stream.read(count)
  if len(content) < count:
    raise EOFError
  return content


def main() -> None:
  """Works until standard input ends; its limits are the first argument."""
  limits = json.loads(sys.argv[1])
  # A signal to all processes of a service is for the server, which lets what
  # runs be answered.
  for name in (signal.SIGINT, signal.SIGTERM):
    signal.signal(name, signal.SIG_IGN)
  signal.signal(signal.SIGALRM, signal.SIG_DFL)  # Ends even a decoder in C.
  if sys.platform == 'linux':  # Others count what is mapped and not used.
    resource.setrlimit(resource.RLIMIT_AS, (limits['memory'],) * 2)
  answers = os.fdopen(os.dup(1), 'wb')
  os.dup2(2, 1)  # Nothing but answers may come there.
  while True:
    try:
      job, body = read_frame(sys.stdin.buffer)
    except EOFError:
      return
    signal.setitimer(signal.ITIMER_REAL, limits['seconds'])
    answer, image = _work(job, body, limits)
    del body
    signal.setitimer(signal.ITIMER_REAL, 0)
    write_frame(answers, answer, image)


def _work(
  job: Mapping[str, Any], body: bytes, limits: Mapping[str, Any]
) -> tuple[dict[str, Any], bytes]:
  """An answer and the image, or the reason why there is none."""
  try:
    content = image_of_body(job['content_type'], body, limits['bytes'])
    image = images_lib.decode_image(
      content, limits['pixels'], job['white_level']
    )
  except Refusal as refusal:
    return {'status': refusal.status, 'detail': str(refusal)}, b''
  except images_lib.ImageTooLargeError as error:
    return {'status': 413, 'detail': str(error)}, b''
  except files.BadImageError as error:
    return {'status': 415, 'detail': str(error)}, b''
  except MemoryError:
    detail = f'decoding may use {limits["memory"]} bytes of memory at most'
    return {'status': 413, 'detail': detail}, b''
  answer = {
    'status': 200,
    'height': image.shape[0],
    'width': image.shape[1],
    'sha256': hashlib.sha256(content).hexdigest(),
  }
  prepared = images_lib.resize_image(image, job['side'])
  preview = _preview(image) if job['preview'] else b''
  answer['preview'] = len(preview)
  kept = content if job['keep'] else b''
  return answer, np.ascontiguousarray(prepared).tobytes() + preview + kept


def _preview(image: np.ndarray) -> bytes:
  """The image as JPEG, no larger than a screen."""
  picture = Image.fromarray(image)
  picture.thumbnail((_PREVIEW, _PREVIEW))
  file = io.BytesIO()
  picture.save(file, 'JPEG', quality=90)
  return file.getvalue()


def image_of_body(content_type: str, body: bytes, most: int) -> bytes:
  """The image file in a multipart or JSON body.

  Raises:
    Refusal: there is none, or it has more than `most` bytes.
  """
  kind, options = multipart.parse_options_header(content_type)
  if kind == b'application/json':
    content = _from_json(body)
  else:
    content = _from_form(options.get(b'boundary', b''), body)
  if len(content) > most:
    raise Refusal(413, f'an image may have {most} bytes at most')
  return content


def _from_json(body: bytes) -> bytes:
  """The field `image`: base64, with line breaks or as a data URL, too."""
  try:
    document = json.loads(body)
  except (ValueError, RecursionError):
    raise Refusal(400, 'the body is no JSON') from None
  image = document.get('image') if isinstance(document, dict) else None
  if not isinstance(image, str):
    raise Refusal(400, 'the body must be {"image": "BASE64 OF AN IMAGE FILE"}')
  if image.startswith('data:'):
    head, comma, image = image.partition(',')
    if not comma or not head.endswith(';base64'):
      raise Refusal(400, '"image" is a data URL, but not of base64')
  try:
    return base64.b64decode(''.join(image.split()), validate=True)
  except (binascii.Error, ValueError):
    raise Refusal(400, '"image" is not base64') from None


def _from_form(boundary: bytes, body: bytes) -> bytes:
  """The file in the part `image`."""
  parts: list[tuple[dict[bytes, bytes], io.BytesIO]] = []
  whole: list[tuple[dict[bytes, bytes], io.BytesIO]] = []
  field, value = bytearray(), bytearray()

  def begin_header() -> None:
    field.clear()
    value.clear()

  def begin() -> None:
    if len(parts) == _PARTS:
      raise Refusal(400, f'the form has more than {_PARTS} parts')
    parts.append(({}, io.BytesIO()))

  def end_header() -> None:
    parts[-1][0][bytes(field).lower()] = bytes(value)

  callbacks = {
    'on_part_begin': begin,
    'on_header_begin': begin_header,
    'on_header_field': lambda data, start, end: field.extend(data[start:end]),
    'on_header_value': lambda data, start, end: value.extend(data[start:end]),
    'on_header_end': end_header,
    'on_part_data': lambda data, start, end: parts[-1][1].write(
      memoryview(data)[start:end]
    ),
    'on_part_end': lambda: whole.append(parts[-1]),
  }
  if not boundary:
    raise Refusal(400, 'the form cannot be read: no boundary is named')
  try:
    python_multipart.MultipartParser(boundary, callbacks).write(body)
  except exceptions.FormParserError as error:
    raise Refusal(400, f'the form cannot be read: {error}') from None
  for headers, content in whole:
    disposition = headers.get(b'content-disposition', b'')
    _, options = multipart.parse_options_header(disposition)
    if options.get(b'name') == b'image' and b'filename' in options:
      return content.getvalue()
  raise Refusal(400, 'the form has no file named "image"')


if __name__ == '__main__':
  main()
