"""Who may ask the server: hosts, other sites, tokens; headers, the journal."""

import json
import os
import subprocess
import sys

import program_helpers
import pytest
import serve_helpers

from dmdd_jax.serve import batching
from dmdd_jax.serve import journal as journal_lib
from dmdd_jax.serve import security

httpx = serve_helpers.httpx
serving, post, png = (
  serve_helpers.serving,
  serve_helpers.post,
  serve_helpers.png,
)


@pytest.fixture(scope='module')
def address():
  with serving() as running:
    yield running


def test_the_token_guards_what_is_said_of_images():
  with serving(token='secret') as address:
    assert httpx.get(f'{address}/healthz', timeout=60).status_code == 200
    assert httpx.get(address, timeout=60).status_code == 200
    for header in ({}, {'authorization': 'Bearer wrong'}):
      answer = post(address, png(), headers=header)
      assert answer.status_code == 401 and 'Bearer' in answer.json()['detail']
    for header in ('Bearer secret', 'bearer secret'):
      answer = post(address, png(), headers={'authorization': header})
      assert answer.status_code == 200
    answer = post(address, png(), headers={'authorization': 'secret'})
    assert answer.status_code == 401


def test_other_names_of_the_machine_are_refused():
  with serving(hosts=security.hosts_of('127.0.0.1', [])) as address:
    port = address.rpartition(':')[2]
    assert httpx.get(f'{address}/healthz', timeout=60).status_code == 200
    for name in (f'[::1]:{port}', '127.0.0.1', '127.0.0.1:1'):
      header = {'host': name}
      answer = httpx.get(f'{address}/healthz', headers=header, timeout=60)
      assert answer.status_code == 200, name
    for name in (
      f'evil.example:{port}',
      'evil.example',
      '',
      '192.168.1.5',
      '[',
      '127.0.0.1.x',
    ):
      answer = post(address, png(), headers={'host': name})
      assert answer.status_code == 400, name
      assert '--allowed_host' in answer.json()['detail']


@pytest.mark.parametrize('listens', ['0.0.0.0', '::', '192.168.1.5'])
def test_in_a_network_names_are_listed_and_addresses_are_answered(listens):
  hosts = security.hosts_of(listens, ['Station-3'])
  for header in (
    'station-3:8000',
    'STATION-3',
    '192.168.1.5:8000',
    '[fe80::1]:8000',
    'localhost:8000',
  ):
    assert header in hosts, header
  for header in ('evil.example', 'station-3.evil.example', '1.2.3.4.x', ''):
    assert header not in hosts, header


@pytest.mark.parametrize('token', ['schlüssel', '令牌', 'two words', 'a\nb'])
def test_a_token_that_no_header_can_carry_is_refused(token):
  with pytest.raises(ValueError, match='a token is one line'):
    serve_helpers.serve_app.create_app(
      [serve_helpers.make_model()], token=token
    )
  security.check_token(security.choose_token(None, False, '0.0.0.0')[0])


def test_a_request_may_send_any_bytes_as_a_token():
  with serving(token='secret') as address:
    for given in ('schlüssel'.encode(), b'\xff\xfe', '令牌'.encode()):
      header = {b'authorization': b'Bearer ' + given}
      assert post(address, png(), headers=header).status_code == 401


@pytest.mark.parametrize(
  'headers, status',
  [
    ({}, 200),
    ({'sec-fetch-site': 'same-origin'}, 200),
    ({'sec-fetch-site': 'none'}, 200),
    ({'sec-fetch-site': 'same-site'}, 403),
    ({'sec-fetch-site': 'cross-site'}, 403),
    ({'sec-fetch-site': 'cross-site', 'sec-fetch-mode': 'navigate'}, 403),
    ({'origin': 'OWN'}, 200),
    ({'origin': 'null'}, 403),
    ({'origin': 'http://evil.example'}, 403),
    ({'origin': 'http://127.0.0.1:1'}, 403),
    ({'origin': 'http://['}, 403),
  ],
)
def test_the_page_of_another_site_inspects_nothing(address, headers, status):
  headers = {k: address if v == 'OWN' else v for k, v in headers.items()}
  inspected, refused = _counted(address)
  answer = post(address, png(), headers=headers)
  assert answer.status_code == status, answer.text
  assert _counted(address) == (
    inspected + (status == 200),
    refused + (status == 403),
  )


def _counted(address):
  """How many images were inspected, and how many requests got 403."""
  lines = httpx.get(f'{address}/metrics', timeout=60).text.splitlines()
  return tuple(
    sum(float(x.split()[-1]) for x in lines if x.startswith(name))
    for name in ('dmdd_verdicts_total', 'dmdd_requests_total{status="403"}')
  )


def test_a_link_from_another_site_is_followed(address):
  site = {'sec-fetch-site': 'cross-site'}
  linked = {**site, 'sec-fetch-mode': 'navigate'}
  assert httpx.get(address, headers=linked).status_code == 200
  assert httpx.get(address, headers=site).status_code == 403


def test_a_browser_on_another_site_is_refused(browser, address):
  with serving() as other:  # Another port is another origin.
    # Any page of it will do, without its policy, which forbids the attack.
    page = browser.new_page(bypass_csp=True)
    try:
      page.goto(f'{other}/healthz')
      before = _counted(address)
      page.evaluate(
        """([address, content]) => {
          const bytes = Uint8Array.from(atob(content), c => c.charCodeAt(0));
          const body = new FormData();
          body.append('image', new Blob([bytes]), 'x.png');
          return fetch(address + '/v1/inspect',
                       {method: 'POST', mode: 'no-cors', body}).catch(() => 0);
        }""",
        [address, serve_helpers.base64_of(png())],
      )
      after = _counted(address)
      assert after == (before[0], before[1] + 1)
    finally:
      page.close()


def test_every_answer_has_the_headers_for_browsers(address, monkeypatch):
  async def broken(self, image):
    raise ZeroDivisionError

  answers = [
    httpx.get(f'{address}{path}')
    for path in ('/', '/healthz', '/metrics', '/openapi.json', '/nowhere')
  ]
  answers += [post(address, png()), post(address, b'text')]
  answers.append(httpx.get(address, headers={'origin': 'http://x'}))
  monkeypatch.setattr(batching.Batcher, 'inspect', broken)
  answers.append(post(address, png()))
  assert {x.status_code for x in answers} == {200, 403, 404, 415, 500}
  for answer in answers:
    assert answer.headers['x-content-type-options'] == 'nosniff'
    policy = answer.headers['content-security-policy']
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert answer.is_success or isinstance(answer.json()['detail'], str)


@pytest.mark.parametrize('path', ['/', '/healthz', '/metrics', '/v1/models'])
def test_head_is_get_without_a_body(address, path):
  head = httpx.head(f'{address}{path}', timeout=60)
  assert head.status_code == 200 and head.content == b''
  got = httpx.get(f'{address}{path}', timeout=60)
  assert head.headers['content-type'] == got.headers['content-type']


@pytest.mark.parametrize('query', ['threshold=NaN', 'threshold=1', 'maps=png'])
def test_an_unknown_parameter_is_refused(address, query):
  answer = post(address, png(), f'/v1/inspect?{query}')
  assert answer.status_code == 422, answer.text
  assert query.partition('=')[0] in answer.text


def test_the_journal_has_a_line_for_each_inspection_and_refusal(tmp_path):
  path = tmp_path / 'log.jsonl'
  journal = journal_lib.open_journal(str(path))
  with serving(journal=journal) as address:
    post(address, png())
    post(address, b'text')
    post(address, png(), '/v1/inspect?category=%0Anew%20line')
    post(address, png(), headers={'origin': 'http://evil.example'})
    httpx.get(f'{address}/healthz')
    httpx.get(f'{address}/nowhere')
  entries = [json.loads(line) for line in path.read_text().splitlines()]
  assert [x['status'] for x in entries] == [200, 415, 404, 403, 404]
  first = entries[0]
  assert first['verdict'] == 'defective' and first['image_threshold'] == 0.5
  assert first['score'] == pytest.approx(200 / 255)
  assert first['sha256'] == serve_helpers.sha256_of(png())
  assert first['client'] == '127.0.0.1' and first['seconds'] > 0
  assert first['time'].endswith('+00:00')
  assert 'new line' in entries[2]['detail']
  assert 'another site' in entries[3]['detail']


def test_a_full_disk_ends_the_journal_and_not_the_service():
  if not os.path.exists('/dev/full'):
    pytest.skip('there is no /dev/full')
  journal = journal_lib.open_journal('/dev/full')
  with serving(journal=journal) as address:
    for _ in range(2):
      assert post(address, png()).status_code == 200


@pytest.mark.parametrize(
  'flags, token',
  [
    ((), False),
    (('--host=localhost',), False),
    (('--host=0.0.0.0',), True),
    (('--host=0.0.0.0', '--open'), False),
  ],
)
def test_a_server_in_a_network_makes_a_token(flags, token):
  code = f"""
import sys
sys.argv = ['serve.py', '--workdir=unused', *{flags!r}]
from dmdd_jax.serve import app, models
models.open_model = lambda path: None
app.create_app = lambda models, limits, token, *others: token
app.run = lambda token, *unused: print('served with', token or 'none')
import runpy
runpy.run_path('tools/serve.py', run_name='__main__')
"""
  done = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    cwd=program_helpers.REPOSITORY,
    env={**os.environ, 'PYTHONPATH': program_helpers.REPOSITORY},
  )
  assert done.returncode == 0, done.stderr
  printed = [
    line.removeprefix('token: ')
    for line in done.stdout.splitlines()
    if line.startswith('token: ')
  ]
  assert len(printed) == token
  assert f'served with {printed[0] if token else "none"}' in done.stdout


def test_a_token_comes_from_its_file(tmp_path):
  path = tmp_path / 'token'
  path.write_text('secret\n')
  assert security.choose_token(str(path), False, '::') == ('secret', False)
  with pytest.raises(ValueError, match='--open'):
    security.choose_token(str(path), True, '::')
  path.write_text('\n')
  with pytest.raises(ValueError, match='it is empty'):
    security.choose_token(str(path), False, '::')


def test_the_container_is_open_to_its_network_and_asks_for_a_token():
  path = os.path.join(program_helpers.REPOSITORY, 'Dockerfile')
  with open(path) as file:
    text = file.read()
  assert '--host=0.0.0.0' in text and '--open' not in text
