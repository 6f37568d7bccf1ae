"""Who may ask: names of the server, other web sites, the token.

`Guard` sees every request first and every answer last: it refuses, adds the
headers for browsers, counts and writes the journal.
"""

from collections.abc import Iterable, Mapping
import hmac
import ipaddress
import json
import re
import secrets
import time
from typing import Any
import urllib.parse

from absl import logging
import fastapi
from starlette import datastructures
from starlette import responses
from starlette import types

from dmdd_jax.serve import journal as journal_lib
from dmdd_jax.serve import metrics as metrics_lib

LOOPBACK = ('127.0.0.1', '::1', 'localhost')
_WILDCARDS = ('0.0.0.0', '::', '')
# What a header can carry as it is; RFC 6750 names these.
_TOKEN = re.compile(r'[A-Za-z0-9._~+/-]+=*')
_LONGEST_FAULT = 4096  # Bytes of an answer that are read for the journal.
# The page has a policy of its own.
_HEADERS = {
  'Content-Security-Policy': "default-src 'none'; frame-ancestors 'none'",
  'Cross-Origin-Resource-Policy': 'same-origin',
  'Referrer-Policy': 'no-referrer',
  'X-Content-Type-Options': 'nosniff',
}


class Hosts:
  """The names in a Host header that are answered.

  A web site can point a name of its own at this machine, and its page may then
  read what the server says. It cannot do that with an address of digits.
  """

  def __init__(self, names: Iterable[str] = (), any_address: bool = False):
    """Lists names.

    Args:
      names: without port; with none, and without `any_address`, all are
        answered.
      any_address: every address of digits is answered, too.
    """
    self._names = {name.lower() for name in names}
    self._any_address = any_address

  def __contains__(self, header: str) -> bool:
    name = _host_name(header)
    if name in self._names or not (self._names or self._any_address):
      return True
    if not self._any_address:
      return False
    try:
      ipaddress.ip_address(name)
    except ValueError:
      return False
    return True


def hosts_of(address: str, allowed: Iterable[str]) -> Hosts:
  """Under which names a server that listens on an address is asked.

  Args:
    address: loopback: its own names alone. Otherwise addresses of digits, too.
    allowed: further names.
  """
  own = [] if address in _WILDCARDS else [address]
  any_address = address.lower() not in LOOPBACK
  return Hosts([*LOOPBACK, *own, *allowed], any_address)


def check_token(token: str) -> None:
  """Raises ValueError where a token cannot be sent in a header."""
  if token and not _TOKEN.fullmatch(token):
    raise ValueError(
      'a token is one line of the letters A to Z and a to z, digits and'
      ' ._~+/-; a header cannot carry others. Make one with: openssl rand'
      ' -hex 32'
    )


def choose_token(
  token_file: str | None, is_open: bool, address: str
) -> tuple[str, bool]:
  """The token of a server.

  Args:
    token_file: holds it; None if there is none.
    is_open: nobody is asked for a token.
    address: that the server listens on; on loopback no token is needed.

  Returns:
    The token, '' for none, and whether it was made here.

  Raises:
    OSError: the file cannot be read.
    ValueError: it is empty, or there is a file although nobody is asked.
  """
  if token_file is not None:
    with open(token_file, encoding='utf-8') as file:
      token = file.read().strip()
    if not token or is_open:
      wrong = '--open asks for no token' if token else 'it is empty'
      raise ValueError(f'--token_file={token_file}: {wrong}')
    return token, False
  if is_open or address in LOOPBACK:
    return '', False
  return secrets.token_urlsafe(24), True


def authorize(headers: Mapping[str, str], token: str) -> None:
  """Refuses a request without the token, if there is one."""
  scheme, _, given = headers.get('authorization', '').partition(' ')
  if token and not (
    scheme.lower() == 'bearer'
    # Headers arrive as bytes, which Starlette reads as Latin-1.
    and hmac.compare_digest(given.encode('latin-1'), token.encode())
  ):
    raise fastapi.HTTPException(
      401,
      'send the header "Authorization: Bearer TOKEN"',
      {'WWW-Authenticate': 'Bearer'},
    )


def is_of_other_site(method: str, headers: Mapping[str, str]) -> bool:
  """Whether the page of another origin sends a request.

  A link to the page is followed. Programs other than browsers send neither of
  the headers.
  """
  if site := headers.get('sec-fetch-site'):
    followed = method == 'GET' and headers.get('sec-fetch-mode') == 'navigate'
    return site not in ('same-origin', 'none') and not followed
  # Browsers send the other header to 'https:' and localhost alone.
  origin = headers.get('origin')
  if origin is None:
    return False
  try:
    return urllib.parse.urlsplit(origin).netloc != headers.get('host', '')
  except ValueError:
    return True


class Guard:
  """Refuses, adds headers, counts, and writes the journal; ASGI."""

  def __init__(
    self,
    app: types.ASGIApp,
    hosts: Hosts,
    metrics: metrics_lib.Metrics,
    journal: journal_lib.Journal,
  ):
    self._app, self._hosts = app, hosts
    self._metrics, self._journal = metrics, journal

  async def __call__(
    self, scope: types.Scope, receive: types.Receive, send: types.Send
  ) -> None:
    """Handles one request."""
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    method = scope['method']
    if method == 'HEAD':  # uvicorn keeps its own scope, and drops the body.
      scope = {**scope, 'method': 'GET'}
    scope.setdefault('state', {})['entry'] = {}
    started, status, fault = time.perf_counter(), 0, bytearray()

    async def send_guarded(message: types.Message) -> None:
      nonlocal status
      if message['type'] == 'http.response.start':
        status = message['status']
        headers = datastructures.MutableHeaders(scope=message)
        for name, value in _HEADERS.items():
          headers.setdefault(name, value)
      elif status >= 400 and len(fault) < _LONGEST_FAULT:
        fault.extend(message.get('body', b'')[:_LONGEST_FAULT])
      await send(message)

    try:
      app = self._refusal(scope) or self._app
      await app(scope, receive, send_guarded)
    except Exception:
      logging.exception('%s %s failed', method, scope['path'])
      if status:
        raise  # Too late for an answer.
      answer = _answer(500, 'the server failed; see its log')
      await answer(scope, receive, send_guarded)
    finally:
      seconds = time.perf_counter() - started
      self._metrics.requests.labels(str(status or 500)).inc()
      self._metrics.seconds.observe(seconds)
      entry = scope['state']['entry']
      if entry or status >= 400 or not status:
        self._journal(
          {
            'client': (scope.get('client') or [None])[0],
            'method': method,
            'path': scope['path'],
            'status': status,
            'seconds': round(seconds, 4),
            **entry,
            **_detail(bytes(fault)),
          }
        )

  def _refusal(self, scope: types.Scope) -> types.ASGIApp | None:
    headers = datastructures.Headers(scope=scope)
    if (host := headers.get('host', '')) not in self._hosts:
      return _answer(
        400, f'the host {host[:200]!r} is not served; see --allowed_host'
      )
    if is_of_other_site(scope['method'], headers):
      return _answer(403, 'the page of another site may not ask this server')
    return None


def _answer(status: int, detail: str) -> responses.JSONResponse:
  return responses.JSONResponse({'detail': detail}, status)


def _detail(fault: bytes) -> dict[str, Any]:
  """The reason in the body of a refusal; nothing without one."""
  try:
    return {'detail': json.loads(fault)['detail']}
  except (ValueError, KeyError, TypeError):
    return {}


def _host_name(header: str) -> str:
  """The name in a Host header, without the port; empty if it is none."""
  try:
    return urllib.parse.urlsplit(f'//{header}').hostname or ''
  except ValueError:
    return ''
