// The camera of the live page: a frame as a file, on a key, a click or by the
// clock. Nothing here asks the server.

const QUALITY = 'image/png';  // Without loss, as a file of the camera would be.

// Opens a camera into a <video>; `device` is the id of one, '' for the first.
// Throws an Error whose text is for the user.
export async function start(video, device) {
  if (!navigator.mediaDevices) {
    throw new Error('The browser gives the camera only to pages of https or of'
      + ' localhost. Open this page there, or put a proxy with TLS in front.');
  }
  stop(video);
  const size = {width: {ideal: 3840}, height: {ideal: 2160}};
  const which = device ? {deviceId: {exact: device}} : {facingMode: 'environment'};
  try {
    video.srcObject = await navigator.mediaDevices.getUserMedia(
      {video: {...size, ...which}});
  } catch (error) {
    const reasons = {
      NotAllowedError: 'The browser was not allowed to use the camera.',
      NotFoundError: 'There is no camera.',
      NotReadableError: 'The camera is in use by another program.',
    };
    throw new Error(reasons[error.name] ?? `The camera failed: ${error.message}`);
  }
  await video.play();
}

export function stop(video) {
  for (const track of video.srcObject?.getTracks() ?? []) track.stop();
  video.srcObject = null;
}

// Whether frames come; they end when the camera is unplugged.
export function works(video) {
  return Boolean(video.videoWidth) && Boolean(video.srcObject?.active);
}

// The cameras as [id, name]; names are known once one was allowed.
export async function list() {
  const devices = await navigator.mediaDevices.enumerateDevices();
  return devices.filter((device) => device.kind === 'videoinput').map(
    (device, i) => [device.deviceId, device.label || `camera ${i + 1}`]);
}

// The frame that is shown, as a file named by the time.
export async function photograph(video) {
  if (!works(video)) throw new Error('The camera gives no picture.');
  const canvas = document.createElement('canvas');
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext('2d').drawImage(video, 0, 0);
  const blob = await new Promise((done) => canvas.toBlob(done, QUALITY));
  const name = new Date().toISOString().replaceAll(':', '-').replace('Z', '');
  return new File([blob], `camera_${name}.png`, {type: QUALITY});
}
