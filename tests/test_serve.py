"""The server: real HTTP, hostile clients, load."""

import asyncio
import base64
import contextlib
import dataclasses
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import exported_helpers
import numpy as np
from PIL import Image
import program_helpers
import pytest
import serve_helpers

from dmdd_jax.serve import app as serve_app
from dmdd_jax.serve import batching
from dmdd_jax.serve import limits as limits_lib
from dmdd_jax.serve import load
from dmdd_jax.serve import models as serve_models

SIDE = serve_helpers.SIDE
httpx = serve_helpers.httpx
make_model, serving = serve_helpers.make_model, serve_helpers.serving
png, post = serve_helpers.png, serve_helpers.post


@pytest.fixture(scope='module')
def address():
  limits = limits_lib.Limits(bytes=2**18, pixels=10**6, seconds=5.0)
  with serving(limits=limits) as running:
    yield running


def test_form_and_json_give_the_same_answer(address):
  answer = post(address, png()).json()
  document = {'image': base64.b64encode(png()).decode()}
  again = httpx.post(f'{address}/v1/inspect', json=document, timeout=120)
  assert again.json() == answer
  assert answer['score'] == pytest.approx(200 / 255)
  assert answer['verdict'] == 'defective' and answer['category'] == 'nut'
  assert (answer['height'], answer['width']) == (20, 30)
  shades = Image.open(io.BytesIO(base64.b64decode(answer['map']['data'])))
  low, high = answer['map']['low'], answer['map']['high']
  values = low + np.asarray(shades) / 255 * (high - low)
  assert values.shape == (SIDE, SIDE)
  assert values[2, 2] == pytest.approx(200 / 255, abs=0.01)
  assert values[-2, -2] == pytest.approx(100 / 255, abs=0.01)


def test_a_white_level_is_applied():
  model = dataclasses.replace(serve_helpers.make_model(), white_level=4095)
  file = io.BytesIO()
  Image.fromarray(np.full((20, 30), 2048, np.uint16)).save(file, 'PNG')
  with serving([model]) as running:
    score = post(running, file.getvalue()).json()['score']
  assert score == pytest.approx(128 / 255)


@pytest.mark.parametrize('kind', ['onnx', 'stablehlo'])
def test_the_white_level_of_a_file_is_that_of_its_training(kind, tmp_path):
  path = exported_helpers.write(kind, tmp_path, white_level=4095)
  assert serve_models.open_model(path).white_level == 4095


def test_the_map_as_floats_or_not_at_all(address):
  answer = post(address, png(), '/v1/inspect?map=float32').json()
  values = np.frombuffer(base64.b64decode(answer['map']['data']), '<f4')
  assert values.reshape(SIDE, SIDE)[-1, -1] == np.float32(100 / 255)
  assert post(address, png(), '/v1/inspect?map=none').json()['map'] is None
  assert post(address, png(), '/v1/inspect?map=tiff').status_code == 422


@pytest.mark.parametrize(
  'content, status, text',
  [
    (b'', 415, 'is none of PNG'),
    (b'no picture', 415, 'is none of PNG'),
    (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 415, 'is none of'),
    (png()[:-40], 415, 'cannot be decoded'),
    (load.bomb(2000, 2000), 413, '2000 x 2000'),
    (load.bomb(60000, 60000), 413, 'pixels'),
    (b'\x00' * (2**18 + 1), 413, 'bytes at most'),
    (b'\x00' * 2**20, 413, 'bytes at most'),
  ],
  ids=['empty', 'text', 'eps', 'cut', 'large', 'bomb', 'long', 'longer'],
)
def test_a_file_that_cannot_be_used_is_refused(address, content, status, text):
  answer = post(address, content)
  assert answer.status_code == status, answer.text
  assert text in answer.json()['detail']


@pytest.mark.parametrize(
  'kind, body, status',
  [
    ('text/plain', b'x', 415),
    ('', b'x', 415),
    ('application/json', b'{', 400),
    ('application/json', b'\xff\xfe', 400),
    ('application/json', b'[' * 100_000, 400),
    ('application/json', b'[]', 400),
    ('application/json', b'{"image": 3}', 400),
    ('application/json', b'{"image": "!!"}', 400),
    ('application/json', '{"image": "ä"}'.encode(), 400),
    ('multipart/form-data', b'x', 400),
    ('multipart/form-data; boundary=b', b'nothing of the kind', 400),
    ('multipart/form-data; boundary=b', b'--b\r\nContent-', 400),
    (
      'multipart/form-data; boundary=b',
      b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\nx\r\n--b--',
      400,
    ),
  ],
)
def test_a_body_that_cannot_be_used_is_refused(address, kind, body, status):
  answer = httpx.post(
    f'{address}/v1/inspect',
    content=body,
    headers={'content-type': kind},
    timeout=120,
  )
  assert answer.status_code == status, answer.text
  assert isinstance(answer.json()['detail'], str)


def _raw(address, content):
  host, _, port = address.removeprefix('http://').partition(':')
  client = socket.create_connection((host, int(port)), timeout=60)
  client.sendall(
    b'POST /v1/inspect HTTP/1.1\r\nHost: x\r\nContent-Type: application/json'
    b'\r\nContent-Length: 1000\r\n\r\n' + content
  )
  return client


def test_clients_that_break_off_or_dawdle(address):
  for _ in range(20):
    _raw(address, b'{"image": "').close()
  slow = _raw(address, b'{')
  assert b' 408 ' in slow.recv(4096).partition(b'\r\n')[0]
  slow.close()
  assert post(address, png()).status_code == 200
  assert httpx.get(f'{address}/healthz', timeout=60).json()['waiting'] == 0


@pytest.mark.parametrize(
  'level', [13, 14, 15, 16], ids=['raises', 'nan', 'infinite map', 'too few']
)
def test_a_failing_model_does_not_end_the_service(address, level):
  file = io.BytesIO()
  Image.new('RGB', (SIDE, SIDE), (level, level, level)).save(file, 'PNG')
  answer = post(address, file.getvalue())
  assert answer.status_code == 500 and 'see the log' in answer.json()['detail']
  assert post(address, png()).status_code == 200


def test_a_worker_that_has_ended_is_not_healthy(monkeypatch):
  async def ended(self):
    pass

  monkeypatch.setattr(batching.Batcher, 'work', ended)
  with serving() as address:
    answer = httpx.get(f'{address}/healthz', timeout=60)
  assert answer.status_code == 503 and 'log' in answer.json()['detail']


@pytest.mark.parametrize('score', [np.nan, np.inf, -np.inf])
def test_there_is_no_verdict_on_what_is_no_score(score):
  with pytest.raises(ValueError, match='no verdict'):
    make_model().verdict(score)


async def _many(address, contents, connections):
  limits = httpx.Limits(max_connections=connections)
  async with httpx.AsyncClient(timeout=300, limits=limits) as client:
    return await asyncio.gather(
      *(
        client.post(f'{address}/v1/inspect?map=none', files={'image': content})
        for content in contents
      )
    )


def _metric(address, name):
  for line in httpx.get(f'{address}/metrics', timeout=60).text.splitlines():
    if line.startswith(f'{name} '):
      return float(line.split()[-1])
  raise AssertionError(name)


def test_concurrent_requests_share_calls_and_keep_their_answers():
  levels = [index % 120 for index in range(120)]
  models = [make_model(seconds=0.02)]
  with serving(
    models, limits=limits_lib.Limits(waiting=200, seconds=600)
  ) as address:
    answers = asyncio.run(_many(address, [png(x) for x in levels], 120))
    calls = _metric(address, 'dmdd_batch_images_count')
    images = _metric(address, 'dmdd_batch_images_sum')
  for level, answer in zip(levels, answers):
    assert answer.status_code == 200
    assert answer.json()['score'] == pytest.approx((level + 100) / 255)
  assert images == 120 and calls < 100


def test_every_request_is_answered_when_too_many_come():
  contents = [png()] * 300
  models = [make_model(seconds=0.05)]
  with serving(
    models, limits=limits_lib.Limits(waiting=4, seconds=600)
  ) as address:
    answers = asyncio.run(_many(address, contents, 300))
    found = [answer.status_code for answer in answers]
    assert set(found) == {200, 503} and len(found) == 300
    refused = next(x for x in answers if x.status_code == 503)
    assert refused.headers['retry-after'] == '1'
    assert post(address, png()).status_code == 200


def test_every_one_of_200_good_and_hostile_requests_is_answered():
  requests = load.requests(png(), 200, hostile=True, pause=0.05)
  models = [make_model(seconds=0.01)]
  limits = limits_lib.Limits(waiting=150, seconds=2.0)
  with serving(models, limits=limits) as address:
    url = f'{address}/v1/inspect'
    answers = asyncio.run(load.send_all(url, requests, clients=200))
    counted = _metric(address, 'dmdd_request_seconds_count')
    memory = _metric(address, 'process_resident_memory_bytes')
    assert _metric(address, 'dmdd_waiting_requests') == 0
    assert post(address, png()).status_code == 200
  assert len(answers) == 200 <= counted and memory > 0
  allowed = {
    'image': {200},
    'slow': {200},
    'JSON': {200},
    'file cut short': {415},
    'text as an image': {415},
    'wrong content type': {415},
    'bomb': {413},
    'upload that stops': {408},
  }
  found = {}
  for answer in answers:
    found.setdefault(answer.kind, set()).add(answer.status)
  assert found.keys() == allowed.keys()
  for kind, statuses in found.items():
    assert statuses <= allowed[kind] | {503}, (kind, statuses)
  assert 200 in found['image']


def test_a_request_without_an_answer_is_counted():
  with socket.socket() as listener:  # Does not listen.
    listener.bind(('127.0.0.1', 0))
    url = f'http://127.0.0.1:{listener.getsockname()[1]}/v1/inspect'
    requests = load.requests(png(), 3)
    answers = asyncio.run(load.send_all(url, requests, clients=2))
  assert load.summarize(answers) == {
    'answers': {'image': {'none': 3}},
    'unanswered': 3,
    'p50': None,
    'p99': None,
  }
  with pytest.raises(ValueError, match='HOST:PORT'):
    asyncio.run(load.send_all('127.0.0.1:8000', requests, clients=2))


def test_several_categories():
  models = [make_model('nut'), make_model('bolt', image_threshold=None)]
  with serving(models) as address:
    listed = httpx.get(f'{address}/v1/models', timeout=60).json()
    assert [model['category'] for model in listed] == ['nut', 'bolt']
    answer = post(address, png())
    assert answer.status_code == 404
    assert '?category=bolt or ?category=nut' in answer.json()['detail']
    answer = post(address, png(), '/v1/inspect?category=cog')
    assert answer.status_code == 404 and "'cog'" in answer.json()['detail']
    answer = post(address, png(), '/v1/inspect?category=bolt').json()
    assert answer['verdict'] == 'uncalibrated'
    assert answer['image_threshold'] is None


def test_categories_must_differ():
  with pytest.raises(ValueError, match='different categories'):
    serve_app.create_app([make_model(), make_model()])
  with pytest.raises(ValueError, match='at least one'):
    serve_app.create_app([])


def test_metrics_count_verdicts_and_refusals(address):
  post(address, png())
  post(address, b'')
  text = httpx.get(f'{address}/metrics', timeout=60).text
  for part in (
    'dmdd_verdicts_total{category="nut",verdict="defective"}',
    'dmdd_requests_total{status="200"}',
    'dmdd_requests_total{status="415"}',
    'dmdd_waiting_requests 0.0',
  ):
    assert part in text


@contextlib.contextmanager
def _process(seconds, grace):
  """A server in a process, over a model of so many seconds; its address."""
  code = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import serve_helpers
from dmdd_jax.serve import app as serve_app
app = serve_app.create_app([serve_helpers.make_model(seconds={seconds})])
serve_app.run(app, port=int(sys.argv[1]), grace={grace})
"""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  server = subprocess.Popen(
    [sys.executable, '-c', code, str(port)],
    env={**os.environ, 'PYTHONPATH': program_helpers.REPOSITORY},
  )
  address = f'http://127.0.0.1:{port}'
  try:
    _wait_until_up(address, server)
    yield server, address
  finally:
    server.kill()
    server.wait()


def _ask(address):
  """Begins a request; the list that its answer will be in, and its thread."""
  answers = []

  def ask():
    try:
      answers.append(post(address, png()).status_code)
    except httpx.TransportError:
      answers.append(None)

  client = threading.Thread(target=ask)
  client.start()
  while _metric(address, 'dmdd_batch_images_count') == 0:  # The model runs.
    time.sleep(0.05)
  return answers, client


def test_what_is_running_is_answered_when_the_server_is_stopped():
  with _process(seconds=3, grace=30) as (server, address):
    answers, client = _ask(address)
    server.send_signal(signal.SIGTERM)
    client.join()
    assert answers == [200]
    assert server.wait(timeout=120) in (0, -signal.SIGTERM)


def test_a_server_leaves_though_a_model_hangs():
  with _process(seconds=10_000, grace=1) as (server, address):
    answers, client = _ask(address)
    server.send_signal(signal.SIGTERM)
    assert server.wait(timeout=120) == 1
    client.join()
    assert answers[0] != 200


def _wait_until_up(address, server):
  deadline = time.monotonic() + 300
  while time.monotonic() < deadline and server.poll() is None:
    with contextlib.suppress(httpx.TransportError):
      if httpx.get(f'{address}/healthz', timeout=60).status_code == 200:
        return
    time.sleep(0.2)
  raise AssertionError('the server did not start')


def test_what_cannot_be_served_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='nowhere'):
    serve_models.open_model(tmp_path / 'nowhere')


@pytest.mark.parametrize(
  'content', [b'', b'text'], ids=lambda x: x.decode() or 'empty'
)
def test_a_damaged_onnx_file_is_named(tmp_path, content):
  pytest.importorskip('onnxruntime', reason='the extra onnx is not installed')
  path = tmp_path / 'damaged.onnx'
  path.write_bytes(content)
  with pytest.raises(ValueError, match='damaged.onnx.*tools/export.py'):
    serve_models.open_model(path)


def test_without_onnxruntime_the_extra_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'onnxruntime', None)
  path = tmp_path / 'model.onnx'
  path.write_bytes(b'')
  with pytest.raises(ValueError, match=r'model.onnx.*\.\[onnx\]'):
    serve_models.open_model(path)


def test_the_description_is_kept_under_fuzzing(address):
  """Requests drawn from /openapi.json, valid and not."""
  schemathesis = pytest.importorskip(
    'schemathesis', reason='schemathesis is not installed'
  )
  import hypothesis
  from schemathesis import checks

  schema = schemathesis.openapi.from_url(f'{address}/openapi.json')
  chosen = [
    checks.not_a_server_error,
    *(
      getattr(schemathesis.specs.openapi.checks, name)
      for name in (
        'status_code_conformance',
        'content_type_conformance',
        'response_schema_conformance',
      )
    ),
  ]
  operations = [found.ok() for found in schema.get_all_operations()]
  assert {x.path for x in operations} == {
    '/healthz',
    '/metrics',
    '/v1/feedback',
    '/v1/inspect',
    '/v1/models',
  }
  modes = schemathesis.GenerationMode
  for operation in operations:
    # Only these have parameters and a body that can be wrong.
    has_body = operation.path in ('/v1/inspect', '/v1/feedback')
    wrong = [modes.NEGATIVE] if has_body else []
    for mode in (modes.POSITIVE, *wrong):

      @hypothesis.settings(
        max_examples=25,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
      )
      @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
      def check(case):
        case.call_and_validate(base_url=address, checks=chosen)

      check()
