"""Serves trained models over HTTP, with a live page, on this machine alone.

  python tools/serve.py --workdir runs/mvtec/screw --port 8000

--workdir may be given again, and may be a file of tools/export.py. The page is
at http://127.0.0.1:8000/, the description at /openapi.json. Ctrl-C stops.
"""

import sys

from absl import app
from absl import flags

from dmdd_jax import cli

_WORKDIR = cli.define_paths(
  'workdir', "A category's folder, or an exported file."
)
_PORT = flags.DEFINE_integer('port', 8000, 'To listen on.', 1, 65535)
_HOST = flags.DEFINE_string(
  'host', '127.0.0.1', 'To listen on; 0.0.0.0 is open to the network.'
)
_TOKEN_FILE = cli.define_path(
  'token_file', None, 'Its text is asked for as a bearer token.'
)
_ALLOWED_HOST = flags.DEFINE_multi_string(
  'allowed_host', [], 'A name it may be asked under, beside its own.'
)
_MAX_BYTES = flags.DEFINE_integer('max_bytes', 16 * 2**20, 'Of an image.', 1)
_MAX_PIXELS = flags.DEFINE_integer('max_pixels', 50_000_000, 'Of an image.', 1)
_MAX_WAITING = flags.DEFINE_integer(
  'max_waiting', 128, 'Requests at a time; one more gets 503.', 1
)
_LOCAL = ('127.0.0.1', '::1', 'localhost')


def main(argv: list[str]) -> None:
  """Loads the models and serves."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  try:
    from dmdd_jax.serve import app as serve_app
    from dmdd_jax.serve import models as serve_models
  except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; install the extra: pip install -e '.[serve]'")

  token = ''
  if _TOKEN_FILE.value:
    with open(_TOKEN_FILE.value, encoding='utf-8') as file:
      token = file.read().strip()
    if not token:
      raise ValueError(f'--token_file={_TOKEN_FILE.value}: it is empty')
  limits = serve_app.Limits(
    bytes=_MAX_BYTES.value,
    pixels=_MAX_PIXELS.value,
    waiting=_MAX_WAITING.value,
  )
  if not all(path.endswith('.onnx') for path in _WORKDIR.value):
    cli.use_compilation_cache()
  models = [serve_models.open_model(path) for path in _WORKDIR.value]
  # Open to the network, it cannot know its names.
  hosts = [*_ALLOWED_HOST.value]
  if hosts or _HOST.value in _LOCAL:
    hosts += [*_LOCAL, _HOST.value]
  application = serve_app.create_app(models, limits, token, hosts)
  print(f'http://{_HOST.value}:{_PORT.value}/', flush=True)
  serve_app.run(application, _HOST.value, _PORT.value)


if __name__ == '__main__':
  cli.run(main)
