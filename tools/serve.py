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
  'token_file',
  None,
  'Its text is asked for as a bearer token. Without it, a server that is open'
  ' to the network makes a token and prints it.',
)
_OPEN = flags.DEFINE_bool('open', False, 'Ask for no token, from anybody.')
_ALLOWED_HOST = flags.DEFINE_multi_string(
  'allowed_host', [], 'A name it may be asked under, beside its own.'
)
_FEEDBACK = cli.define_path(
  'feedback',
  None,
  'A folder for images whose verdict an operator calls wrong, in the layout of'
  ' MVTec AD.',
)
_THRESHOLDS = cli.define_path(
  'thresholds',
  None,
  "A file of the page, with thresholds in the models' place.",
)
_LOG = cli.define_path(
  'log',
  None,
  'A line of JSON for each inspection and each refusal goes to the end of this'
  ' file; to standard error with "-".',
)
_MAX_BYTES = flags.DEFINE_integer(
  'max_bytes', 160 * 2**20, 'Of an image file.', 1
)
_MAX_PIXELS = flags.DEFINE_integer('max_pixels', 50_000_000, 'Of an image.', 1)
_MAX_WAITING = flags.DEFINE_integer(
  'max_waiting', 128, 'Requests at a time; one more gets 503.', 1
)
_MAX_HELD = flags.DEFINE_integer(
  'max_held', 2**30, 'Bytes of all requests at a time; more get 503.', 1
)
_MAX_DECODE_SECONDS = flags.DEFINE_float(
  'max_decode_seconds', 10.0, 'To decode an image.', 0.01
)
_MAX_DECODE_MEMORY = flags.DEFINE_integer(
  'max_decode_memory', 3 * 2**30, 'Bytes of a process that decodes.', 2**28
)


def main(argv: list[str]) -> None:
  """Loads the models and serves."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  try:
    from dmdd_jax.serve import app as serve_app
    from dmdd_jax.serve import feedback as feedback_lib
    from dmdd_jax.serve import journal as journal_lib
    from dmdd_jax.serve import limits as limits_lib
    from dmdd_jax.serve import models as serve_models
    from dmdd_jax.serve import security
  except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; install the extra: pip install -e '.[serve]'")

  token, is_new = security.choose_token(
    _TOKEN_FILE.value, _OPEN.value, _HOST.value
  )
  journal = journal_lib.open_journal(_LOG.value)
  limits = limits_lib.Limits(
    bytes=_MAX_BYTES.value,
    pixels=_MAX_PIXELS.value,
    waiting=_MAX_WAITING.value,
    held=_MAX_HELD.value,
    decode_seconds=_MAX_DECODE_SECONDS.value,
    decode_memory=_MAX_DECODE_MEMORY.value,
  )
  if not all(path.endswith('.onnx') for path in _WORKDIR.value):
    cli.use_compilation_cache()
  models = [serve_models.open_model(path) for path in _WORKDIR.value]
  if _THRESHOLDS.value is not None:
    models = serve_models.with_thresholds(models, _THRESHOLDS.value)
  keep = None
  if _FEEDBACK.value is not None:
    categories = [model.category for model in models]
    keep = feedback_lib.open_folder(_FEEDBACK.value, categories)
  hosts = security.hosts_of(_HOST.value, _ALLOWED_HOST.value)
  application = serve_app.create_app(
    models, limits, token, hosts, journal, keep
  )
  if is_new:
    print(f'token: {token}')
  print(f'http://{_HOST.value}:{_PORT.value}/', flush=True)
  serve_app.run(application, _HOST.value, _PORT.value)


if __name__ == '__main__':
  cli.run(main)
