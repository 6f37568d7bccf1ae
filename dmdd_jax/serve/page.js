// The live page: asks the server, shows one state at a time.
import * as camera from './camera.js';
import * as paint from './paint.js';

const $ = (id) => document.getElementById(id);
const ROWS = 1000, PICTURES = 6;
const items = [];  // Newest first; see `submit` for what one holds.
const queue = [];
const pictures = new Map();  // Of items, the latest shown last.
const thresholds = {};  // Per category: {image, pixel}, moved by the sliders.
let current = null, models = [], sounds = null, dropped = 0, zoom = 1;

const MOVED = 'moved by hand';

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
function announce(state, sentence, aloud = true, moved = false) {
  const {word, path, tones} = STATES[state];
  $('state').dataset.state = state;
  $('state').classList.toggle('moved', moved);
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
  if (token) checkToken(token);
  const headers = token ? {Authorization: `Bearer ${token}`} : {};
  let response;
  try {
    response = await fetch(path, {...options, headers});
  } catch {
    throw new Error('The server cannot be reached. Is it running, and is this'
      + ' machine in its network?');
  }
  if (response.ok) return response.json();
  if (response.status === 401) {
    askForToken();
    throw new Error(token ? 'The server does not accept this token.'
      + ' Enter it again, or ask the person who runs the server for it.'
      : 'The server asks for a token. Enter it below; the person'
      + ' who runs the server has it.');
  }
  const fault = await response.json().catch(() => ({}));
  const text = typeof fault.detail === 'string' ? fault.detail : '';
  throw new Error(`Refused (${response.status}): ${text}`);
}

function askForToken() {
  $('login').hidden = false;
  $('token').focus();
}

// Others make fetch throw, because no header can carry them.
function checkToken(token) {
  const strange = token.match(/[^A-Za-z0-9._~+/=-]/u);
  if (!strange) return;
  askForToken();
  throw new Error(`The token has "${strange[0]}" in it. A token has the letters`
    + ' A to Z and a to z, digits and ._~+/- alone. Was another text entered?');
}

// The camera: a frame is inspected on a key, a click or by the clock. One that
// falls due while another is inspected is left out.
let clock = null, shooting = false;

async function openCamera(device = '') {
  try {
    await camera.start($('video'), device);
    $('station').hidden = false;
    $('shoot').focus();
    $('device').replaceChildren(
      ...(await camera.list()).map(([id, name]) => new Option(name, id)));
    const track = $('video').srcObject.getVideoTracks()[0];
    $('device').value = track.getSettings().deviceId ?? '';
  } catch (error) {
    closeCamera();
    fail(error.message);
  }
}

function closeCamera() {
  $('timed').checked = false;
  setClock();
  camera.stop($('video'));
  $('station').hidden = true;
}

async function shoot() {
  if (queue.length || shooting) return;
  shooting = true;
  try {
    await submit([await camera.photograph($('video'))]);
  } catch (error) {
    fail(error.message);
  } finally {
    shooting = false;
  }
}

function setClock() {
  clearInterval(clock);
  const seconds = $('interval').valueAsNumber;
  if ($('timed').checked && seconds > 0) {
    clock = setInterval(shoot, 1000 * Math.max(.2, seconds));
  }
}

// Says what went wrong outside of an inspection; nothing stays shown.
function fail(sentence) {
  if (queue.length) return;
  open(null);
  announce('refused', sentence);
}

// After something other than a file was pasted or dropped.
function refuseOther(verb) {
  fail(`What was ${verb} is no image file. Nothing was inspected.`);
}

function rest() {
  announce('rest', 'Drop, choose, paste or photograph an image.');
}

async function start() {
  try {
    models = await request('v1/models');
    $('login').hidden = true;
    $('category').replaceChildren(
      ...models.map((m) => new Option(m.category, m.category)));
    rest();
  } catch (error) {
    announce('refused', error.message);
  }
}

// Puts files on the list and inspects them one after another. The head says
// the verdict of one file, and what became of several at their end.
async function submit(files) {
  const category = $('category').value;
  const batch = [...files].map((file) => ({
    file, category, name: file.name || 'pasted image', at: new Date(),
    state: 'waiting', error: '', inspection: null, seconds: null, thumbnail: '',
    opinion: '', reason: '', kept: '',
  }));
  if (!batch.length) return;
  for (const item of batch) {
    item.row = rowOf(item);
    items.unshift(item);
    $('list').prepend(item.row);
  }
  await inspectAll(batch);
}

async function inspectAll(batch) {
  for (const item of batch) {
    item.state = 'waiting';
    refresh(item);
  }
  tally();
  queue.push(batch);
  if (queue.length > 1) return;  // The loop below gets to it.
  while (queue.length) {
    const items = queue[0];
    open(null);
    for (const [i, item] of items.entries()) {
      const rest = items.length > 1 ? `${i + 1} of ${items.length}: ` : '';
      announce('busy', rest + short(item.name));
      await inspect(item);
    }
    queue.shift();
    if (queue.length) continue;
    if (items.length === 1) await open(items[0], true);
    else summarize(items);
  }
}

async function inspect(item) {
  const began = performance.now();
  try {
    await item.file.slice(0, 1).arrayBuffer().catch(() => {
      throw new Error(
        'It cannot be read. Is it a folder, or was it moved or changed?');
    });
    const image = await paint.picture(item.file);
    const body = new FormData();
    body.append('image', item.file, item.name);
    const query = new URLSearchParams(
      {category: item.category, preview: image === null});
    item.inspection = await request(`v1/inspect?${query}`, {method: 'POST', body});
    item.seconds = (performance.now() - began) / 1000;
    item.thumbnail = paint.thumbnail((await load(item, image)).image);
    item.state = 'done';
  } catch (error) {
    item.state = 'refused';
    item.error = error.message;
  }
  cut();
  refresh(item);
  tally();
}

// Drops the oldest rows, and says on the page that it did.
function cut() {
  for (const item of items.splice(ROWS)) {
    item.row.remove();
    pictures.delete(item);
    dropped += 1;
  }
}

// The picture and the map of an item; those looked at last are kept.
async function load(item, image = null) {
  let held = pictures.get(item);
  if (!held) {
    const {width, height, map, preview} = item.inspection;
    image ??= await paint.picture(
      preview ? paint.blobOf(preview, 'image/jpeg') : item.file);
    held = {
      image: image ?? paint.grey(width, height),
      map: {...map, values: await paint.decodeMap(map)},
    };
  }
  pictures.delete(item);
  pictures.set(item, held);
  if (pictures.size > PICTURES) pictures.delete(pictures.keys().next().value);
  return held;
}

// The head after several files: its worst verdict, and how many of each.
function summarize(batch) {
  const states = batch.map(stateOf);
  const worst = ['defective', 'refused', 'uncalibrated', 'good'].find(
    (state) => states.includes(state));
  announce(worst, counts(batch) + (batch.some(isMoved) ? ` (${MOVED})` : ''),
    true, batch.some(isMoved));
}

function counts(list) {
  const states = Object.groupBy(list, stateOf);
  const text = [`${list.length} ${list.length === 1 ? 'image' : 'images'}`];
  for (const [state, {word}] of Object.entries(STATES)) {
    if (states[state]) text.push(`${states[state].length} ${word}`);
  }
  return text.join(', ');
}

// Long names keep their two ends.
function short(name) {
  return name.length > 48 ? `${name.slice(0, 24)} … ${name.slice(-20)}` : name;
}

// Where a slider goes from and to, and where calibration puts it.
function range(item, kind) {
  const inspection = item.inspection, calibrated = inspection[`${kind}_threshold`];
  const top = kind === 'image' ? inspection.score : inspection.map.high;
  const low = Math.min(0, kind === 'image' ? inspection.score : inspection.map.low);
  const high = 1.25 * Math.max(top, calibrated ?? 0, low + 1e-6);
  return {low, high, start: calibrated ?? (low + high) / 2};
}

function threshold(item, kind) {
  return thresholds[item.category]?.[kind] ?? range(item, kind).start;
}

function setThreshold(kind, value) {
  (thresholds[current.category] ??= {})[kind] = value;
  rejudge();
}

// After a threshold was moved: all that it judges.
function rejudge() {
  for (const item of items) refresh(item);
  tally();
  warn();
  if (current?.state === 'done') draw();
}

// One of STATES; the verdict is that of the threshold as it stands.
function stateOf(item) {
  if (item.state !== 'done') return item.state === 'refused' ? 'refused' : 'busy';
  if (!isMoved(item)) return item.inspection.verdict;
  const moved = thresholds[item.category].image;
  return item.inspection.score >= moved ? 'defective' : 'good';
}

// Whether a threshold of this page judges an item, and not the server's.
function isMoved(item) {
  return item.state === 'done' && thresholds[item.category]?.image !== undefined;
}

function sentence(item) {
  const name = short(item.name);
  if (item.state === 'refused') return `${name}: ${item.error}`;
  const score = `${name}: score ${item.inspection.score.toFixed(3)}`;
  if (stateOf(item) === 'uncalibrated') return score;
  const limit = `${score}, threshold ${threshold(item, 'image').toFixed(3)}`;
  if (!isMoved(item)) return limit;
  return `${limit} (${MOVED}; the server's: ${number(item.inspection.image_threshold)})`;
}

const number = (value) => value === null ? 'none' : value.toFixed(3);

// The strip that says which thresholds are this page's own.
function warn() {
  const names = {image: 'verdict', pixel: 'outline'}, texts = [];
  for (const [category, moved] of Object.entries(thresholds)) {
    const model = models.find((m) => m.category === category);
    for (const [kind, value] of Object.entries(moved)) {
      texts.push(`${category}, ${names[kind]}: ${number(value)}, the server's is`
        + ` ${number(model[`${kind}_threshold`])}`);
    }
  }
  $('moved').hidden = !texts.length;
  $('moved-text').textContent =
    `Thresholds moved by hand, on this page alone. ${texts.join('; ')}.`;
}

// What tools/serve.py --thresholds reads: the server's, but for those moved.
function thresholdFile() {
  const entries = Object.entries(thresholds).map(([category, moved]) => [
    category, Object.fromEntries(Object.entries(moved).map(
      ([kind, value]) => [`${kind}_threshold`, value]))]);
  return JSON.stringify(Object.fromEntries(entries)) + '\n';
}

// Shows an item, its sentence in the head; null shows none.
async function open(item, aloud = false) {
  const previous = current;
  current = item;
  for (const changed of [previous, item]) if (changed) refresh(changed);
  if (item?.state !== 'done') {
    $('result').hidden = true;
    if (item) announce(stateOf(item), sentence(item), aloud);
    return;
  }
  announce(stateOf(item), sentence(item), aloud, isMoved(item));
  await load(item);
  if (current === item) draw();
}

function draw() {
  const {image, map} = pictures.get(current);
  announce(stateOf(current), sentence(current), false, isMoved(current));
  $('result').hidden = false;
  $('name').textContent = `${current.name} (${current.category})`;
  $('score').textContent = current.inspection.score.toFixed(3);
  $('time').textContent = `${current.seconds.toFixed(2)} s`;
  for (const kind of ['image', 'pixel']) {
    const {low, high} = range(current, kind), value = threshold(current, kind);
    const slider = $(`${kind}-threshold`);
    slider.value = 1000 * (value - low) / (high - low);
    slider.setAttribute('aria-valuetext', value.toFixed(3));
    $(`${kind}-value`).textContent = value.toFixed(3);
  }
  const level = threshold(current, 'pixel'), regions = regionsOf(current, map);
  paint.paint($('view'), image, map, level, $('show-map').checked,
    $('show-outline').checked, regions, image.width / current.inspection.width);
  $('view').setAttribute('aria-label', sentence(current));
  $('plain').width = image.width;
  $('plain').height = image.height;
  $('plain').getContext('2d').drawImage(image, 0, 0);
  const [low, top] = paint.heatRange(level, map.high);
  $('ramp-low').textContent = low.toFixed(3);
  $('ramp-level').textContent = level > 0 ? level.toFixed(3) : '';
  $('ramp-top').textContent = top.toFixed(3);
  const model = models.find((m) => m.category === current.category);
  $('feedback').hidden = !model?.feedback;
  $('is-good').hidden = stateOf(current) === 'good';
  $('is-defective').hidden = stateOf(current) === 'defective';
  $('kept').textContent = current.kept;
  list(regions);
  fit();
}

// The server's regions, or those at the outline threshold of this page.
function regionsOf(item, map) {
  const {width, height, regions, pixel_threshold} = item.inspection;
  if (thresholds[item.category]?.pixel === undefined && pixel_threshold !== null) {
    return regions;
  }
  return paint.regions(map, threshold(item, 'pixel'), width, height);
}

// What an operator says of the shown verdict; the server keeps the image.
async function disagree(opinion) {
  const item = current;
  const remark = $('remark').value.trim();
  const reason = $('reason').value + (remark && `: ${remark}`);
  $('kept').textContent = 'Sending …';
  let said;
  try {
    const body = new FormData();
    body.append('image', item.file, item.name);
    const query = new URLSearchParams(
      {category: item.category, opinion, reason, name: item.name.slice(0, 500)});
    const {file} = await request(`v1/feedback?${query}`, {method: 'POST', body});
    item.opinion = opinion;
    item.reason = reason;
    said = `Kept as ${file}.`;
    $('remark').value = '';
  } catch (error) {
    said = `Not kept. ${error.message}`;
  }
  item.kept = said;
  refresh(item);
  if (current === item) draw();
}

// The regions as buttons that show them larger.
function list(regions) {
  const count = regions.length === 100 ? 'The 100 highest' : regions.length || 'No';
  const noun = regions.length === 1 ? 'region' : 'regions';
  $('regions-head').textContent = `${count} ${noun} at or above the outline threshold`;
  $('regions').replaceChildren(...regions.map((region, i) => {
    const row = document.createElement('li'), button = document.createElement('button');
    const [left, top, width, height, area] = ['left', 'top', 'width', 'height',
      'area'].map((name) => Math.round(region[name]));
    button.type = 'button';
    button.textContent = `${i + 1}: ${width} × ${height} px at ${left}, ${top};`
      + ` area ${area} px; peak ${region.peak.toFixed(3)}`;
    button.onclick = () => approach(region);
    row.append(button);
    return row;
  }));
}

// Sizes both pictures: the whole one at a zoom of 1.
function fit() {
  const frame = $('view').parentElement, {width, height} = $('view');
  const whole = Math.min(frame.clientWidth, .74 * innerHeight * width / height);
  for (const id of ['plain', 'view']) $(id).style.width = `${whole * zoom}px`;
  $('zoom').textContent = `${Math.round(100 * zoom)} %`;
}

function setZoom(value) {
  const frame = $('view').parentElement;
  const share = (at, shown, all) => (at + shown / 2) / all;
  const x = share(frame.scrollLeft, frame.clientWidth, frame.scrollWidth);
  const y = share(frame.scrollTop, frame.clientHeight, frame.scrollHeight);
  zoom = Math.min(16, Math.max(1, value));
  fit();
  center(x, y);
}

// Brings a point, in shares of the picture, to the middle of the frame.
function center(x, y) {
  const frame = $('view').parentElement;
  frame.scrollLeft = x * frame.scrollWidth - frame.clientWidth / 2;
  frame.scrollTop = y * frame.scrollHeight - frame.clientHeight / 2;
}

function approach(region) {
  const {width, height} = current.inspection;
  setZoom(.5 * Math.min(width / region.width, height / region.height));
  center((region.left + region.width / 2) / width,
    (region.top + region.height / 2) / height);
}

// The row of an item in the list; `refresh` fills it.
function rowOf(item) {
  const row = document.createElement('li');
  const button = document.createElement('button');
  for (const [tag, name] of [
    ['img', 'thumbnail'], ['b', 'verdict'], ['span', 'score'], ['span', 'name'],
    ['span', 'note'],
  ]) {
    const part = document.createElement(tag);
    part.classList.add(name);
    button.append(part);
  }
  button.type = 'button';
  button.querySelector('img').alt = '';
  button.onclick = () => {
    if (!['done', 'refused'].includes(item.state) || queue.length) return;
    scrollTo(0, 0);
    open(item);
  };
  row.append(button);
  return row;
}

function refresh(item) {
  const part = (name) => item.row.querySelector(`.${name}`);
  const state = stateOf(item);
  part('thumbnail').hidden = !item.thumbnail;
  if (item.thumbnail) part('thumbnail').src = item.thumbnail;
  part('verdict').textContent =
    item.state === 'waiting' ? 'WAITING' : STATES[state].word;
  part('verdict').className = `verdict ${state}`;
  part('score').textContent =
    item.state === 'done' ? item.inspection.score.toFixed(3) : '';
  part('name').textContent = item.name;
  const notes = [item.state === 'refused' && item.error,
    isMoved(item) && `◆ threshold ${MOVED}`,
    item.opinion && `operator: ${item.opinion} (${item.reason})`];
  part('note').textContent = notes.filter(Boolean).join('; ');
  item.row.firstChild.setAttribute('aria-current', item === current);
  item.row.hidden = !['all', state].includes($('filter').value);
}

// What is said of the whole list.
function tally() {
  $('past').hidden = !items.length;
  $('counts').textContent = `${counts(items)}.`;
  $('cut').textContent = dropped
    ? `The list is cut: the ${dropped} oldest rows were dropped, ${ROWS} are kept.`
    : 'The list is complete since the page was opened.';
  $('again').hidden = !items.some((item) => item.state === 'refused');
}

// A table of the list, oldest first, as text of CSV.
function table() {
  const head = ['time', 'image', 'category', 'verdict', 'score', 'threshold',
    'server_threshold', 'seconds', 'error',
    'opinion', 'reason'];
  const rows = items.toReversed().filter((x) => stateOf(x) !== 'busy').map((x) => {
    const done = x.state === 'done';
    return [x.at.toISOString(), x.name, x.category,
      done ? stateOf(x) : 'not inspected', done ? x.inspection.score : '',
      !done || stateOf(x) === 'uncalibrated' ? '' : threshold(x, 'image'),
      x.inspection?.image_threshold ?? '', done ? x.seconds.toFixed(3) : '', x.error,
      x.opinion, x.reason];
  });
  // A text that begins like a formula is none in a spreadsheet behind a quote.
  const cell = (value) => typeof value === 'number' ? value
    : `"${String(value).replace(/^[=+\-@\t\r]/, "'$&").replaceAll('"', '""')}"`;
  return [head, ...rows].map((row) => row.map(cell).join(',')).join('\r\n');
}

function download(name, type, text) {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {type}));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

for (const kind of ['image', 'pixel']) {
  $(`${kind}-threshold`).oninput = (event) => {
    const {low, high} = range(current, kind);
    setThreshold(kind, low + event.target.value / 1000 * (high - low));
  };
}
$('reset').onclick = () => {
  for (const category of Object.keys(thresholds)) delete thresholds[category];
  rejudge();
  if (!current && !queue.length) rest();
};
$('keep').onclick = () =>
  download('thresholds.json', 'application/json', thresholdFile());
$('is-good').onclick = () => disagree('good');
$('is-defective').onclick = () => disagree('defective');
$('feedback').onsubmit = (event) => event.preventDefault();
$('filter').onchange = () => items.forEach(refresh);
$('again').onclick = () => {
  const batch = items.filter((item) => item.state === 'refused');
  inspectAll(batch.reverse());
};
$('csv').onclick = () => download('inspections.csv', 'text/csv', table());
$('smaller').onclick = () => setZoom(zoom / 1.5);
$('larger').onclick = () => setZoom(zoom * 1.5);
$('beside').onchange = () => {
  $('plain').parentElement.hidden = !$('beside').checked;
  fit();
};
const frames = [...document.querySelectorAll('.frame')];
for (const frame of frames) {
  frame.onscroll = () => frames.forEach(
    (other) => other.scrollTo(frame.scrollLeft, frame.scrollTop));
}
addEventListener('resize', () => current?.state === 'done' && fit());
paint.legend($('ramp'));
$('show-map').onchange = $('show-outline').onchange = () => draw();
$('sound').checked = localStorage.getItem('sound') === 'on';
$('sound').onchange = () => {
  localStorage.setItem('sound', $('sound').checked ? 'on' : 'off');
  play(STATES.good.tones);
};
$('choose').onclick = () => $('file').click();
$('live').onclick = () => openCamera();
$('leave').onclick = closeCamera;
$('device').onchange = () => openCamera($('device').value);
$('shoot').onclick = $('video').onclick = shoot;
$('timed').onchange = $('interval').onchange = setClock;
document.addEventListener('keydown', (event) => {
  // A key has its own meaning in these; a foot switch is a space or an enter.
  if (event.target.closest('button, input, select, a')) return;
  if ($('station').hidden || ![' ', 'Enter'].includes(event.key)) return;
  event.preventDefault();
  if (!event.repeat) shoot();
});
$('photograph').onclick = () => $('camera').click();
for (const id of ['file', 'camera']) {
  $(id).onchange = async (event) => {
    await submit(event.target.files);
    event.target.value = '';  // The same file can be chosen again.
  };
}
document.addEventListener('paste', (event) => {
  if (event.target.closest?.('input')) return;
  const {files} = event.clipboardData;
  if (files.length) submit(files);
  else refuseOther('pasted');
});
document.addEventListener('dragover', (event) => {
  event.preventDefault();
  $('drop').classList.add('over');
});
document.addEventListener('dragleave', () => $('drop').classList.remove('over'));
document.addEventListener('drop', (event) => {
  event.preventDefault();
  $('drop').classList.remove('over');
  const {files} = event.dataTransfer;
  if (files.length) submit(files);
  else refuseOther('dropped');
});
$('login').onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem('token', $('token').value.trim());
  start();
};
start();
