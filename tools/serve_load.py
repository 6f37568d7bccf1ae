"""Asks a server of tools/serve.py for many inspections at once, and counts.

  python tools/serve_load.py --image new/a.png --clients 1000 --hostile

Prints JSON; the exit status is 1 if a request got no answer.
"""

import asyncio
import json
import resource
import sys
import time

from absl import app
from absl import flags

from dmdd_jax import cli
from dmdd_jax.serve import load

_URL = flags.DEFINE_string(
  'url', 'http://127.0.0.1:8000/v1/inspect', 'Where; add ?category=NAME.'
)
_IMAGE = cli.define_path('image', None, 'A file to send.', required=True)
_REQUESTS = flags.DEFINE_integer('requests', 1000, 'How many.', 1)
_CLIENTS = flags.DEFINE_integer('clients', 1000, 'How many at a time.', 1)
_HOSTILE = flags.DEFINE_bool(
  'hostile', False, 'Half of them cut short, of a wrong type, or bombs.'
)


def main(argv: list[str]) -> None:
  """Sends and prints."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  with open(_IMAGE.value, 'rb') as file:
    content = file.read()
  _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
  requests = load.requests(content, _REQUESTS.value, _HOSTILE.value)
  started = time.perf_counter()
  answers = asyncio.run(load.send_all(_URL.value, requests, _CLIENTS.value))
  report = {
    'seconds': time.perf_counter() - started,
    **load.summarize(answers),
  }
  print(json.dumps(report, indent=2))
  if report['unanswered']:
    sys.exit(f'error: {report["unanswered"]} requests got no answer')


if __name__ == '__main__':
  cli.run(main)
