// Pictures of the live page: the image, its map and what lies at or above a
// threshold. Nothing here asks the server or knows the page.

const SIDE = 1600;  // Of a picture on the screen, at most.
const NUMBERED = 20, LISTED = 100;  // Regions, at most.

// A canvas of an image, upright; null where the browser cannot show it.
export async function picture(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return null;
  }
  const {width, height} = bitmap;
  const scale = Math.min(1, SIDE / Math.max(width, height));
  const canvas = document.createElement('canvas');
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  canvas.getContext('2d').drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas;
}

// In place of a picture that can no longer be read.
export function grey(width, height) {
  const canvas = document.createElement('canvas');
  const scale = Math.min(1, SIDE / Math.max(width, height));
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext('2d');
  context.fillStyle = '#888';
  context.fillRect(0, 0, canvas.width, canvas.height);
  return canvas;
}

// A small copy of a picture, as a data URL.
export function thumbnail(image) {
  const canvas = document.createElement('canvas');
  const scale = Math.min(1, 96 / Math.max(image.width, image.height));
  canvas.width = Math.max(1, Math.round(image.width * scale));
  canvas.height = Math.max(1, Math.round(image.height * scale));
  canvas.getContext('2d').drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL('image/jpeg', .8);
}

// What the server sent as base64.
export function blobOf(text, type) {
  return new Blob([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], {type});
}

// The values of a map that the server sent as PNG, row by row.
export async function decodeMap(map) {
  const bitmap = await createImageBitmap(blobOf(map.data, 'image/png'));
  const canvas = document.createElement('canvas');
  canvas.width = canvas.height = map.size;
  const context = canvas.getContext('2d', {willReadFrequently: true});
  context.drawImage(bitmap, 0, 0);
  const pixels = context.getImageData(0, 0, map.size, map.size).data;
  const values = new Float32Array(map.size * map.size);
  for (let i = 0; i < values.length; i++) {
    values[i] = map.low + pixels[4 * i] / 255 * (map.high - map.low);
  }
  return values;
}

// Draws an image with its heat map and outlines at a level of the map; the
// regions (see `regions`) get their numbers.
export function paint(canvas, image, map, level, heat, outline, regions, scale) {
  canvas.width = image.width;
  canvas.height = image.height;
  const context = canvas.getContext('2d');
  context.drawImage(image, 0, 0);
  if (heat) context.drawImage(shades(map, level), 0, 0, canvas.width, canvas.height);
  if (!outline) return;
  const path = contour(map, level, canvas.width, canvas.height);
  const thin = Math.max(1, canvas.width / 300);
  // White within black: seen on any image, and on the heat map's red.
  for (const [width, color] of [[2.4 * thin, '#000'], [thin, '#fff']]) {
    context.lineWidth = width;
    context.strokeStyle = color;
    context.stroke(path);
  }
  context.font = `bold ${Math.max(8, canvas.width / 32)}px sans-serif`;
  regions.slice(0, NUMBERED).forEach((region, i) => {
    const at = [(region.left + region.width) * scale, region.top * scale];
    context.strokeStyle = '#000';
    context.lineWidth = 3 * thin;
    context.strokeText(i + 1, ...at);
    context.fillStyle = '#fff';
    context.fillText(i + 1, ...at);
  });
}

// Regions at or above a level, as serve/regions.py lists them: pixels that
// touch by a side or a corner; box and area in pixels of the image.
export function regions({size, values}, level, width, height) {
  const seen = new Uint8Array(size * size), regions = [];
  const x = width / size, y = height / size;
  for (let first = 0; first < values.length; first++) {
    if (seen[first] || values[first] < level) continue;
    let [left, top, right, bottom, area, peak] = [size, size, 0, 0, 0, -Infinity];
    const stack = [first];
    seen[first] = 1;
    while (stack.length) {
      const at = stack.pop(), row = Math.floor(at / size), column = at % size;
      [left, right] = [Math.min(left, column), Math.max(right, column + 1)];
      [top, bottom] = [Math.min(top, row), Math.max(bottom, row + 1)];
      [area, peak] = [area + 1, Math.max(peak, values[at])];
      for (let r = Math.max(0, row - 1); r < Math.min(size, row + 2); r++) {
        for (let c = Math.max(0, column - 1); c < Math.min(size, column + 2); c++) {
          const next = r * size + c;
          if (seen[next] || values[next] < level) continue;
          seen[next] = 1;
          stack.push(next);
        }
      }
    }
    regions.push({
      left: left * x, top: top * y, width: (right - left) * x,
      height: (bottom - top) * y, area: area * x * y, peak,
    });
  }
  return regions.sort((a, b) => b.peak - a.peak).slice(0, LISTED);
}

// The colours from no heat to full heat.
export function legend(canvas) {
  const context = canvas.getContext('2d');
  context.clearRect(0, 0, canvas.width, 1);
  const data = context.createImageData(canvas.width, 1);
  for (let i = 0; i < canvas.width; i++) {
    data.data.set(colour(i / (canvas.width - 1)), 4 * i);
  }
  context.putImageData(data, 0, 0);
}

const colour = (share) => [255, 220 * (1 - share), 0, 150 * share];

// The map's values at which the heat map begins and is full.
export function heatRange(level, high) {
  return level > 0 ? [level / 2, 2 * level] : [0, high || 1];
}

// Clear up to half the level, then yellow to red up to twice.
function shades({size, high, values}, level) {
  const canvas = document.createElement('canvas');
  canvas.width = canvas.height = size;
  const context = canvas.getContext('2d');
  const data = context.createImageData(size, size);
  const [low, top] = heatRange(level, high);
  values.forEach((value, i) => {
    const share = Math.min(1, Math.max(0, (value - low) / (top - low)));
    data.data.set(colour(share), 4 * i);
  });
  context.putImageData(data, 0, 0);
  return canvas;
}

// Marching squares with interpolated crossings, in the canvas's pixels.
function contour({size, values}, level, width, height) {
  const path = new Path2D();
  const at = (row, column) =>
    row < 0 || column < 0 || row >= size || column >= size
      ? -Infinity : values[row * size + column];
  const cross = (a, b) => (isFinite(a) && isFinite(b) ? (level - a) / (b - a) : .5);
  const x = (c) => (c + .5) * width / size, y = (r) => (r + .5) * height / size;
  for (let r = -1; r < size; r++) {
    for (let c = -1; c < size; c++) {
      const v = [at(r, c), at(r, c + 1), at(r + 1, c + 1), at(r + 1, c)];
      const inside = v.map((value) => value >= level);
      const points = [];
      if (inside[0] !== inside[1]) points.push([x(c + cross(v[0], v[1])), y(r)]);
      if (inside[1] !== inside[2]) points.push([x(c + 1), y(r + cross(v[1], v[2]))]);
      if (inside[2] !== inside[3]) points.push([x(c + 1 - cross(v[2], v[3])), y(r + 1)]);
      if (inside[3] !== inside[0]) points.push([x(c), y(r + 1 - cross(v[3], v[0]))]);
      for (let i = 0; i + 1 < points.length; i += 2) {
        path.moveTo(...points[i]);
        path.lineTo(...points[i + 1]);
      }
    }
  }
  return path;
}
