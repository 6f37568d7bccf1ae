"""A client that asks a server for many inspections at once, good and bad ones.

The standard library alone: what is measured is the server.

Synopsis:

  requests = serve_load.requests(content, count=1000, hostile=True)
  answers = asyncio.run(serve_load.send_all(url, requests, clients=1000))
  print(serve_load.summarize(answers))
"""

import asyncio
import base64
from collections.abc import Sequence
import contextlib
import dataclasses
import itertools
import json
import struct
import time
from typing import Any
import urllib.parse
import zlib

_FORM = 'multipart/form-data; boundary=b'
_PIECES = 8  # Of a slow body.


@dataclasses.dataclass(frozen=True)
class Request:
  """One POST to /v1/inspect.

  Attributes:
    kind: its name in the summary.
    content_type: of the body.
    body: what is sent.
    missing: bytes that are announced and never sent.
    pause: seconds between the eight parts of the body.
  """

  kind: str
  content_type: str
  body: bytes
  missing: int = 0
  pause: float = 0.0


@dataclasses.dataclass(frozen=True)
class Answer:
  """What came back.

  Attributes:
    kind: of the request.
    status: of HTTP; None if the connection ended without one.
    seconds: from connecting to the end of the answer.
  """

  kind: str
  status: int | None
  seconds: float


def requests(
  content: bytes, count: int, hostile: bool = False, pause: float = 0.5
) -> list[Request]:
  """So many requests with an image file.

  Args:
    content: of the file.
    count: how many.
    hostile: half of them are cut short, of a wrong type, or bombs; of the
      others one in five is slow, and one is JSON.
    pause: seconds between the parts of a slow body.
  """
  whole = Request('image', _FORM, form(content))
  if not hostile:
    return [whole] * count
  document = json.dumps({'image': base64.b64encode(content).decode()}).encode()
  kinds = [
    whole,
    Request('slow', _FORM, form(content), pause=pause),
    Request('JSON', 'application/json', document),
    Request('file cut short', _FORM, form(content[: len(content) // 2])),
    whole,
    Request('text as an image', _FORM, form(b'no picture')),
    whole,
    Request('wrong content type', 'text/plain', content),
    Request('bomb', _FORM, form(bomb(60_000, 60_000))),
    Request('upload that stops', _FORM, form(content)[:-20], missing=20),
  ]
  return list(itertools.islice(itertools.cycle(kinds), count))


def form(content: bytes) -> bytes:
  """A multipart body, its boundary being b, with the file `image`."""
  head = b'Content-Disposition: form-data; name="image"; filename="x"'
  return b'--b\r\n' + head + b'\r\n\r\n' + content + b'\r\n--b--\r\n'


def bomb(width: int, height: int) -> bytes:
  """A small PNG whose header promises this many pixels."""
  header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  file = b'\x89PNG\r\n\x1a\n'
  for name, data in (
    (b'IHDR', header),
    (b'IDAT', zlib.compress(bytes(1000))),
    (b'IEND', b''),
  ):
    check = struct.pack('>I', zlib.crc32(name + data))
    file += struct.pack('>I', len(data)) + name + data + check
  return file


async def send_all(
  url: str, requests: Sequence[Request], clients: int
) -> list[Answer]:
  """Sends every request, each on a connection of its own.

  Args:
    url: http://HOST:PORT/v1/inspect, and what may follow a question mark.
    requests: in the order in which they are begun.
    clients: connections at a time.

  Raises:
    ValueError: no such URL.
  """
  if not urllib.parse.urlsplit(url).netloc or not url.startswith('http://'):
    raise ValueError(f'{url!r} is not of the form http://HOST:PORT/v1/inspect')
  answers, waiting = [], iter(requests)

  async def client() -> None:
    for request in waiting:
      answers.append(await send(url, request))

  await asyncio.gather(*(client() for _ in range(clients)))
  return answers


async def send(url: str, request: Request) -> Answer:
  """Sends one request and reads its answer to the end."""
  started, received = time.perf_counter(), b''
  to = urllib.parse.urlsplit(url)
  head = (
    f'POST {to.path}?{to.query} HTTP/1.1\r\nHost: {to.netloc}\r\n'
    f'Content-Type: {request.content_type}\r\n'
    f'Content-Length: {len(request.body) + request.missing}\r\n'
    'Connection: close\r\n\r\n'
  )
  # A server may answer, and close, before all is sent.
  with contextlib.suppress(OSError):
    reader, writer = await asyncio.open_connection(to.hostname, to.port)
    try:
      with contextlib.suppress(OSError):
        await _write(writer, head.encode(), request)
      received = await reader.read()
    finally:
      writer.close()
  status = None
  if received.startswith(b'HTTP/1.1 '):
    status = int(received[9:12])
  return Answer(request.kind, status, time.perf_counter() - started)


async def _write(
  writer: asyncio.StreamWriter, head: bytes, request: Request
) -> None:
  writer.write(head)
  parts = _PIECES if request.pause else 1
  step = max(1, -(-len(request.body) // parts))
  for start in range(0, len(request.body), step):
    if start:
      await asyncio.sleep(request.pause)
    writer.write(request.body[start : start + step])
    await writer.drain()


def summarize(answers: Sequence[Answer]) -> dict[str, Any]:
  """Counts, and seconds of what was inspected.

  Returns:
    {'answers': {kind: {status: count}}, 'unanswered': count, 'p50': seconds of
    the answers with status 200, None without any, 'p99': likewise}
  """
  counts: dict[str, dict[str, int]] = {}
  for answer in answers:
    of_kind = counts.setdefault(answer.kind, {})
    status = str(answer.status or 'none')
    of_kind[status] = of_kind.get(status, 0) + 1
  inspected = sorted(x.seconds for x in answers if x.status == 200)
  return {
    'answers': counts,
    'unanswered': sum(answer.status is None for answer in answers),
    **{
      f'p{share}': inspected[(len(inspected) - 1) * share // 100]
      if inspected
      else None
      for share in (50, 99)
    },
  }
