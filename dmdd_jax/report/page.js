
'use strict';
(() => {
  const VIEWS = ['image', 'map', 'outline', 'ground truth'];
  const SVG = 'http://www.w3.org/2000/svg';
  const byId = (id) => document.getElementById(id);
  const {chunk: CHUNK, categories, items} = JSON.parse(byId('gallery-data').textContent);
  const list = byId('cards'), dialog = byId('dialog');
  const ranges = [byId('view'), byId('dialog-view')];
  let shown = [], current = 0, view = 0;

  const make = (name, className, text) => {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const figure = (x) => x === null || x === undefined ? '–' : String(Number(x.toPrecision(4)));
  const baseName = (file) => file.slice(file.lastIndexOf('/') + 1);
  // Thresholds that are tried on the page, by category; the run's elsewhere.
  const tried = new Map();
  const thresholdOf = (item) => tried.get(item.category) ?? categories[item.category].threshold;
  const verdictOf = (item) => !tried.has(item.category) ? item.verdict
    : item.score >= tried.get(item.category) ? 'defective' : 'good';
  const fault = (item) => item.label && verdictOf(item) === 'good' ? 'missed'
    : !item.label && verdictOf(item) === 'defective' ? 'alarm' : '';

  // One line of a chunk has the data of one image; a few chunks stay split.
  const chunks = new Map();
  function dataOf(index) {
    const number = Math.floor(index / CHUNK);
    let lines = chunks.get(number);
    if (!lines) {
      // It is whole once the next chunk, or the end of the page, has been read.
      const node = byId('chunk-' + number);
      if (!node || (document.readyState === 'loading' && !byId('chunk-' + (number + 1)))) return null;
      lines = node.textContent.split('\n');
      chunks.set(number, lines);
      if (chunks.size > 8) chunks.delete(chunks.keys().next().value);
    }
    return lines[index % CHUNK].split('|');
  }

  function outline(className, path) {
    const svg = document.createElementNS(SVG, 'svg');
    svg.setAttribute('class', className);
    svg.setAttribute('viewBox', '0 0 512 512');
    svg.setAttribute('aria-hidden', 'true');
    for (const kind of ['halo', 'edge']) {
      const node = document.createElementNS(SVG, 'path');
      node.setAttribute('class', kind);
      node.setAttribute('d', path);
      svg.append(node);
    }
    return svg;
  }

  function frameOf(index) {
    const item = items[index], frame = make('div', 'frame'), data = dataOf(index);
    if (!data) return frame;
    const [image, shades, prediction, truth] = data;
    const prefix = 'data:' + categories[item.category].mime + ';base64,';
    const base = make('img', 'base'), map = make('img', 'shades');
    base.alt = map.alt = '';
    base.decoding = map.decoding = 'async';
    base.src = prefix + image;
    map.dataset.later = prefix + shades;
    frame.append(base, map);
    if (prediction !== '-' && prediction) frame.append(outline('prediction', prediction));
    if (truth === '-') frame.dataset.truth = 'not known';
    else if (!truth) frame.dataset.truth = 'no defect';
    else frame.append(outline('truth', truth));
    wake(frame);
    return frame;
  }

  // Maps are decoded when they are first looked at.
  function wake(node) {
    if (view <= 0 || view >= 200) return;
    for (const map of node.querySelectorAll('img[data-later]')) {
      map.src = map.dataset.later;
      delete map.dataset.later;
    }
  }

  const cards = items.map((item, index) => {
    const card = make('li');
    card.dataset.index = index;
    card.setAttribute('role', 'option');
    card.setAttribute('aria-selected', 'false');
    card.tabIndex = -1;
    judge(card, item);
    return card;
  });

  function judge(card, item) {
    const kind = {missed: ', missed', alarm: ', false alarm'}[fault(item)] || '';
    card.className = kind ? 'wrong' : '';
    card.setAttribute('aria-label', `${item.file}, ${item.defect}, score ${figure(item.score)}${kind}`);
  }

  function fill(card) {
    const index = Number(card.dataset.index), item = items[index], wrong = fault(item);
    const frame = frameOf(index), caption = make('div', 'caption');
    if (wrong) frame.append(make('span', 'badge ' + wrong, wrong === 'alarm' ? 'false alarm' : 'missed'));
    caption.append(make('b', '', baseName(item.file)), make('span', '', `${item.defect} · ${figure(item.score)}`));
    card.replaceChildren(frame, caption);
  }

  const near = new IntersectionObserver((entries) => {
    for (const {target, isIntersecting} of entries) {
      if (!isIntersecting) target.replaceChildren();
      else if (!target.firstChild) fill(target);
    }
  }, {rootMargin: '500px 0px'});
  document.addEventListener('DOMContentLoaded', () => {
    for (const card of list.children) if (card.firstChild) fill(card);
  });

  function setView(value) {
    view = Math.max(0, Math.min(300, value));
    const share = (stop) => Math.max(0, 1 - Math.abs(view / 100 - stop));
    const style = document.documentElement.style;
    style.setProperty('--map', share(1));
    // Half way both outlines stand fully, to be compared.
    style.setProperty('--prediction', Math.min(1, 2 * share(2)));
    style.setProperty('--truth', Math.min(1, 2 * share(3)));
    const nearest = Math.round(view / 100), whole = view % 100 === 0;
    const text = whole ? VIEWS[nearest]
      : `between ${VIEWS[Math.floor(view / 100)]} and ${VIEWS[Math.floor(view / 100) + 1]}`;
    for (const range of ranges) {
      range.value = view;
      range.setAttribute('aria-valuetext', text);
    }
    for (const button of document.querySelectorAll('.stops button')) {
      button.setAttribute('aria-pressed', String(Number(button.value) === nearest));
    }
    wake(document);
  }

  for (const range of ranges) {
    range.addEventListener('input', () => setView(Number(range.value)));
    range.addEventListener('keydown', (event) => {
      const way = {ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1}[event.key];
      if (!way || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      event.stopPropagation();
      // A whole stop at a time; with Shift in small steps.
      if (event.shiftKey) setView(view + way * 10);
      else setView(100 * (way > 0 ? Math.floor(view / 100) + 1 : Math.ceil(view / 100) - 1));
    });
  }
  for (const stops of document.querySelectorAll('.stops')) {
    VIEWS.forEach((name, i) => {
      const button = make('button', '', name);
      button.type = 'button';
      button.value = i;
      button.tabIndex = -1;
      button.addEventListener('click', () => setView(100 * i));
      stops.append(button);
    });
  }

  const ORDERS = {
    error: (a, b) => b.error - a.error,
    high: (a, b) => b.score - a.score,
    low: (a, b) => a.score - b.score,
    overlap: (a, b) => (a.overlap ?? 2) - (b.overlap ?? 2) || b.error - a.error,
    file: (a, b) => a.file < b.file ? -1 : a.file > b.file ? 1 : 0,
  };
  const SHOW = {
    all: () => true,
    missed: (item) => fault(item) === 'missed',
    alarm: (item) => fault(item) === 'alarm',
    defective: (item) => item.label,
    good: (item) => !item.label,
  };

  function update() {
    const part = byId('search').value.trim().toLowerCase();
    const category = byId('category').value, defect = byId('defect').value;
    const inside = items.map((item, index) => index).filter((index) => {
      const item = items[index];
      return (category === '' || item.category === Number(category))
        && (defect === '' || item.defect === defect)
        && (!part || item.file.toLowerCase().includes(part));
    });
    for (const input of document.querySelectorAll('#show input')) {
      const count = inside.filter((index) => SHOW[input.value](items[index])).length;
      input.parentNode.querySelector('output').textContent = count;
    }
    const kind = document.querySelector('#show input:checked').value;
    const order = ORDERS[byId('sort').value];
    shown = inside.filter((index) => SHOW[kind](items[index]));
    shown.sort((a, b) => order(items[a], items[b]) || a - b);
    near.disconnect();
    for (const card of list.children) card.replaceChildren();
    list.replaceChildren(...shown.map((index) => cards[index]));
    for (const card of list.children) near.observe(card);
    byId('status').textContent = `${shown.length} of ${items.length} images.`;
    mark(0);
    showTrial();
  }

  // The category whose threshold can be tried: the chosen one, or the only one.
  const trialCategory = () => categories.length === 1 ? 0
    : byId('category').value === '' ? null : Number(byId('category').value);

  // The slider's ends: a little beyond the category's scores.
  function trialRange(number) {
    const scores = items.filter((item) => item.category === number && item.score !== null).map((item) => item.score);
    const low = Math.min(...scores), high = Math.max(...scores), margin = 0.02 * (high - low || 1);
    return [low - margin, high + margin];
  }

  function showTrial() {
    const number = trialCategory(), slider = byId('threshold');
    byId('trial').hidden = number === null;
    byId('trial-choose').hidden = number !== null;
    if (number === null) return;
    const [low, high] = trialRange(number), own = categories[number].threshold;
    const level = tried.get(number) ?? own;
    const inside = items.filter((item) => item.category === number);
    const count = (kind) => inside.filter((item) => fault(item) === kind).length;
    const defective = inside.filter((item) => item.label).length;
    byId('trial-name').textContent = categories[number].name;
    slider.value = level === null ? 1000 : Math.round(1000 * (level - low) / (high - low));
    slider.setAttribute('aria-valuetext', figure(level));
    const moved = tried.has(number);
    byId('trial').toggleAttribute('data-moved', moved);
    byId('trial-reset').hidden = !moved;
    byId('trial-text').textContent = level === null ? 'The run has no threshold.'
      : `${moved ? 'Tried' : 'The run\'s'} threshold ${figure(level)}: ${count('missed')} of ${defective} defective missed, `
      + `${count('alarm')} of ${inside.length - defective} good called defective.`
      + (moved ? ` Verdicts below follow it; the run's is ${figure(own)}. A threshold chosen on test images promises nothing of new ones.` : '');
  }

  function tryThreshold(value) {
    const number = trialCategory();
    if (value === null) tried.delete(number);
    else tried.set(number, value);
    items.forEach((item, index) => { if (item.category === number) judge(cards[index], item); });
    update();
  }
  byId('threshold').addEventListener('input', () => {
    const [low, high] = trialRange(trialCategory());
    tryThreshold(low + (high - low) * Number(byId('threshold').value) / 1000);
  });
  byId('trial-reset').addEventListener('click', () => tryThreshold(null));

  byId('csv').addEventListener('click', () => {
    const quoted = (text) => /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    const lines = [['category', 'file', 'defect', 'label', 'score', 'threshold', 'verdict', 'overlap']];
    for (const item of shown.map((index) => items[index])) {
      lines.push([categories[item.category].name, item.file, item.defect, item.label, item.score,
        thresholdOf(item), verdictOf(item), item.overlap]);
    }
    const text = lines.map((line) => line.map((x) => quoted(String(x ?? ''))).join(',') + '\n').join('');
    const link = make('a');
    link.href = URL.createObjectURL(new Blob([text], {type: 'text/csv'}));
    link.download = 'images.csv';
    link.click();
    URL.revokeObjectURL(link.href);
  });

  function mark(place, focus) {
    const old = list.querySelector('[tabindex="0"]');
    if (old) {
      old.tabIndex = -1;
      old.setAttribute('aria-selected', 'false');
    }
    current = Math.max(0, Math.min(shown.length - 1, place));
    const card = list.children[current];
    if (!card) return;
    card.tabIndex = 0;
    card.setAttribute('aria-selected', 'true');
    if (focus) {
      card.focus({preventScroll: true});
      card.scrollIntoView({block: 'nearest'});
    }
  }

  function columns() {
    const top = list.children[0] ? list.children[0].offsetTop : 0;
    let count = 1;
    while (count < list.children.length && list.children[count].offsetTop === top) count += 1;
    return count;
  }

  list.addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const moves = {ArrowRight: () => current + 1, ArrowLeft: () => current - 1,
      ArrowDown: () => current + columns(), ArrowUp: () => current - columns(),
      Home: () => 0, End: () => shown.length - 1};
    if (moves[event.key]) {
      event.preventDefault();
      mark(moves[event.key](), true);
    } else if (event.key === 'Enter' || event.key === ' ') {
      event.preventDefault();
      openAt(current);
    }
  });
  list.addEventListener('click', (event) => {
    const card = event.target.closest('li');
    if (card) openAt(shown.indexOf(Number(card.dataset.index)));
  });

  function openAt(place) {
    if (place < 0 || place >= shown.length) return;
    mark(place);
    const index = shown[current], item = items[index], category = categories[item.category];
    byId('dialog-title').textContent = item.file;
    byId('large').replaceChildren(frameOf(index));
    const verdict = {missed: 'missed', alarm: 'false alarm'}[fault(item)] || verdictOf(item);
    const facts = [['category', category.name], ['kind', item.defect], ['verdict', verdict],
      ['score', figure(item.score)],
      [tried.has(item.category) ? 'threshold tried' : 'threshold', figure(thresholdOf(item))],
      ['error', figure(tried.has(item.category) ? null : item.error)], ['mean of maps', figure(item.control)],
      ['outline at', figure(category.pixelThreshold)],
      ['overlap (IoU)', item.overlap === null ? '–' : item.overlap.toFixed(3)],
      ['colours', category.colors.map(figure).join(' to ')], ['place', `${current + 1} of ${shown.length}`]];
    byId('facts').replaceChildren(...facts.flatMap(([name, value]) => [make('dt', '', name), make('dd', '', value)]));
    byId('previous').disabled = current === 0;
    byId('next').disabled = current === shown.length - 1;
    if (!dialog.open) dialog.showModal();
  }
  byId('previous').addEventListener('click', () => openAt(current - 1));
  byId('next').addEventListener('click', () => openAt(current + 1));
  byId('close').addEventListener('click', () => dialog.close());
  dialog.addEventListener('click', (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener('close', () => mark(current, true));
  dialog.addEventListener('keydown', (event) => {
    const way = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (!way) return;
    event.preventDefault();
    openAt(current + way);
  });
  document.addEventListener('keydown', (event) => {
    if (event.target.matches('input[type=search], select') || event.ctrlKey || event.metaKey || event.altKey) return;
    if ('1234'.includes(event.key)) setView(100 * (Number(event.key) - 1));
  });

  if (!items.length) {
    byId('empty').hidden = false;
    return;
  }
  byId('browser').hidden = false;
  categories.forEach((category, i) => byId('category').append(new Option(category.name, i)));
  byId('category-label').hidden = categories.length < 2;
  for (const name of [...new Set(items.map((item) => item.defect))].sort()) {
    byId('defect').append(new Option(name, name));
  }
  if (items.every((item) => item.verdict === 'uncalibrated')) {
    for (const input of document.querySelectorAll('#show [value=missed], #show [value=alarm]')) input.disabled = true;
    byId('hint').textContent += ' No image was held out in training: there is no threshold, and no verdicts.';
  }
  for (const id of ['sort', 'category', 'defect']) byId(id).addEventListener('change', update);
  byId('search').addEventListener('input', update);
  byId('show').addEventListener('change', update);
  setView(0);
  update();
})();
