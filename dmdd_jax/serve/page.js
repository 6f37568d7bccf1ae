// The live page: asks the server, shows one state at a time.
import * as paint from './paint.js';

const $ = (id) => document.getElementById(id);
const KEPT = 24;
const items = [];
const thresholds = {};  // Per category: {image, pixel}, moved by the sliders.
let current = null, models = [], sounds = null;

// Word, sign (a path in 24 x 24) and tones (Hz, begin in s) of each state.
const STATES = {
  rest: {word: 'READY', path: 'M4 12h16', tones: []},
  busy: {word: 'INSPECTING', path: 'M5 12h.1M12 12h.1M19 12h.1', tones: []},
  good: {
    word: 'OK', tones: [[880, 0]],
    path: 'M12 2a10 10 0 1 0 0 20a10 10 0 1 0 0-20M7 12.5l3.5 3.5l6.5-8',
  },
  defective: {
    word: 'DEFECT', tones: [[220, 0], [220, .25], [220, .5]],
    path: 'M8 2h8l6 6v8l-6 6H8l-6-6V8zM8 8l8 8M16 8l-8 8',
  },
  uncalibrated: {word: 'NO THRESHOLD', path: 'M4 12h16', tones: [[440, 0]]},
  refused: {
    word: 'NOT INSPECTED', tones: [[440, 0], [330, .25]],
    path: 'M12 2.5L22.5 21h-21zM12 9v6M12 18h.1',
  },
};

// The one place that says how things stand; it never keeps an earlier verdict.
function announce(state, sentence, aloud = true) {
  const {word, path, tones} = STATES[state];
  $('state').dataset.state = state;
  $('word').textContent = word;
  $('sentence').textContent = sentence;
  $('sign').firstElementChild.setAttribute('d', path);
  if (aloud) play(tones);
}

function play(tones) {
  if (!$('sound').checked) return;
  sounds ??= new AudioContext();
  for (const [pitch, begin] of tones) {
    const tone = sounds.createOscillator(), volume = sounds.createGain();
    const at = sounds.currentTime + begin;
    tone.frequency.value = pitch;
    volume.gain.setValueAtTime(.3, at);
    volume.gain.linearRampToValueAtTime(0, at + .2);
    tone.connect(volume).connect(sounds.destination);
    tone.start(at);
    tone.stop(at + .2);
  }
}

async function request(path, options = {}) {
  const token = sessionStorage.getItem('token');
  const headers = token ? {Authorization: `Bearer ${token}`} : {};
  let response;
  try {
    response = await fetch(path, {...options, headers});
  } catch {
    throw new Error('The server cannot be reached.');
  }
  if (response.ok) return response.json();
  if (response.status === 401) {
    $('login').hidden = false;
    $('token').focus();
  }
  const fault = await response.json().catch(() => ({}));
  const text = typeof fault.detail === 'string' ? fault.detail : '';
  throw new Error(`Refused (${response.status}): ${text}`);
}

async function start() {
  try {
    models = await request('v1/models');
    $('login').hidden = true;
    $('category').replaceChildren(
      ...models.map((m) => new Option(m.category, m.category)));
    announce('rest', 'Drop, choose, paste or photograph an image.');
  } catch (error) {
    announce('refused', error.message);
  }
}

async function inspectAll(files) {
  for (const file of files) await inspect(file);
}

async function inspect(file) {
  const category = $('category').value;
  const name = file.name || 'pasted image';
  current = null;
  $('result').hidden = true;
  announce('busy', name);
  const began = performance.now();
  try {
    const body = new FormData();
    body.append('image', file, name);
    const query = new URLSearchParams({category});
    const found = await request(`v1/inspect?${query}`, {method: 'POST', body});
    const seconds = (performance.now() - began) / 1000;
    const image = await paint.picture(file, found.width, found.height);
    const map = {...found.map, values: await paint.decodeMap(found.map)};
    add({name, found, seconds, image, map});
  } catch (error) {
    announce('refused', `${name}: ${error.message}`);
  }
}

function add(item) {
  items.unshift(item);
  items.length = Math.min(items.length, KEPT);
  show(item, true);
}

// Where a slider goes from and to, and where calibration puts it.
function range(item, kind) {
  const found = item.found, calibrated = found[`${kind}_threshold`];
  const top = kind === 'image' ? found.score : found.map.high;
  const low = Math.min(0, kind === 'image' ? found.score : found.map.low);
  const high = 1.25 * Math.max(top, calibrated ?? 0, low + 1e-6);
  return {low, high, start: calibrated ?? (low + high) / 2};
}

function threshold(item, kind) {
  return thresholds[item.found.category]?.[kind] ?? range(item, kind).start;
}

function setThreshold(kind, value) {
  (thresholds[current.found.category] ??= {})[kind] = value;
  draw();
}

function verdict(item) {
  const moved = thresholds[item.found.category]?.image;
  if (moved === undefined) return item.found.verdict;
  return item.found.score >= moved ? 'defective' : 'good';
}

function show(item, aloud = false) {
  current = item;
  $('result').hidden = $('past').hidden = false;
  $('name').textContent = `${item.name} (${item.found.category})`;
  $('score').textContent = item.found.score.toFixed(3);
  $('time').textContent = `${item.seconds.toFixed(2)} s`;
  draw(aloud);
}

function sentence(item) {
  const score = `score ${item.found.score.toFixed(3)}`;
  if (verdict(item) === 'uncalibrated') return `${item.name}: ${score}`;
  return `${item.name}: ${score}, threshold ${threshold(item, 'image').toFixed(3)}`;
}

function draw(aloud = false) {
  announce(verdict(current), sentence(current), aloud);
  for (const kind of ['image', 'pixel']) {
    const {low, high} = range(current, kind), value = threshold(current, kind);
    const slider = $(`${kind}-threshold`);
    slider.value = 1000 * (value - low) / (high - low);
    slider.setAttribute('aria-valuetext', value.toFixed(3));
    $(`${kind}-value`).textContent = value.toFixed(3);
  }
  const {image, map} = current;
  paint.paint($('view'), image, map, threshold(current, 'pixel'),
    $('show-map').checked, $('show-outline').checked);
  $('view').setAttribute('aria-label', sentence(current));
  remember();
}

function remember() {
  const focused = [...$('history').children].findIndex(
    (entry) => entry.contains(document.activeElement));
  $('history').replaceChildren(...items.map((item) => {
    const entry = document.createElement('li');
    const button = document.createElement('button');
    const small = document.createElement('canvas');
    small.width = 120;
    small.height = Math.max(1, Math.round(120 * item.image.height / item.image.width));
    small.getContext('2d').drawImage(item.image, 0, 0, small.width, small.height);
    const word = document.createElement('b');
    word.className = verdict(item);
    word.textContent = STATES[verdict(item)].word;
    button.type = 'button';
    button.setAttribute('aria-current', item === current);
    button.append(small, word, ` ${item.found.score.toFixed(2)} ${item.name}`);
    button.onclick = () => show(item);
    entry.append(button);
    return entry;
  }));
  if (focused >= 0) $('history').children[focused]?.firstChild.focus();
}

for (const kind of ['image', 'pixel']) {
  $(`${kind}-threshold`).oninput = (event) => {
    const {low, high} = range(current, kind);
    setThreshold(kind, low + event.target.value / 1000 * (high - low));
  };
}
$('reset').onclick = () => {
  delete thresholds[current.found.category];
  draw();
};
$('show-map').onchange = $('show-outline').onchange = () => draw();
$('sound').checked = localStorage.getItem('sound') === 'on';
$('sound').onchange = () => {
  localStorage.setItem('sound', $('sound').checked ? 'on' : 'off');
  play(STATES.good.tones);
};
$('choose').onclick = () => $('file').click();
$('photograph').onclick = () => $('camera').click();
for (const id of ['file', 'camera']) {
  $(id).onchange = async (event) => {
    await inspectAll([...event.target.files]);
    event.target.value = '';  // The same file can be chosen again.
  };
}
const images = (list) => [...list].filter((file) => file.type.startsWith('image/'));
document.addEventListener('paste', (event) => inspectAll(images(event.clipboardData.files)));
document.addEventListener('dragover', (event) => {
  event.preventDefault();
  $('drop').classList.add('over');
});
document.addEventListener('dragleave', () => $('drop').classList.remove('over'));
document.addEventListener('drop', (event) => {
  event.preventDefault();
  $('drop').classList.remove('over');
  inspectAll([...event.dataTransfer.files]);
});
$('login').onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem('token', $('token').value);
  start();
};
start();
