// Pictures of the live page: the image, its map and what lies at or above a
// threshold. Nothing here asks the server or knows the page.

const SIDE = 1600;  // Of a picture on the screen, at most.

// A canvas of an image, upright; grey where the browser cannot show it.
export async function picture(file, width, height) {
  const scale = Math.min(1, SIDE / Math.max(width, height));
  const canvas = document.createElement('canvas');
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext('2d');
  try {
    const bitmap = await createImageBitmap(file);
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    bitmap.close();
  } catch {
    context.fillStyle = '#888';
    context.fillRect(0, 0, canvas.width, canvas.height);
  }
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

// The values of a map that the server sent as PNG, row by row.
export async function decodeMap(map) {
  const bytes = Uint8Array.from(atob(map.data), (c) => c.charCodeAt(0));
  const bitmap = await createImageBitmap(new Blob([bytes], {type: 'image/png'}));
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

// Draws an image with its heat map and outlines at a level of the map.
export function paint(canvas, image, map, level, heat, outline) {
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
}

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
    data.data.set([255, 220 * (1 - share), 0, 150 * share], 4 * i);
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
