// A canvas to draw on, white on black, or to drag the joints of a pose. `props.limbs` are pairs of joints,
// `props.colours` their colours, `props.pose` the joints' first places, as fractions of the side. `props.value` is what
// the page's functions get, and give back: the joints of a pose, or a drawing as a PNG.
const canvas = element.querySelector('canvas'), pen = canvas.getContext('2d'), side = canvas.width;
let mode = 'draw', joints = structuredClone(props.pose), held = null, last = null, strokes = [], ground = null;

function line(from, to, width, colour) {
  pen.strokeStyle = colour;
  pen.lineWidth = width;
  pen.lineCap = 'round';
  pen.beginPath();
  pen.moveTo(from[0] * side, from[1] * side);
  pen.lineTo(to[0] * side, to[1] * side);
  pen.stroke();
}

function show() {
  pen.fillStyle = 'black';
  pen.fillRect(0, 0, side, side);
  if (mode === 'draw') {
    if (ground) pen.drawImage(ground, 0, 0, side, side);
    for (const [from, to, width] of strokes) line(from, to, width, 'white');
  } else {
    props.limbs.forEach(([a, b], i) => line(joints[a], joints[b], 8, props.colours[i]));
    joints.forEach((joint, i) => line(joint, joint, 14, props.colours[i]));
  }
}

function finish() {
  show();
  props.value = JSON.stringify(mode === 'pose' ? { pose: joints } : { drawing: canvas.toDataURL('image/png') });
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
}

canvas.addEventListener('pointerdown', event => {
  canvas.setPointerCapture(event.pointerId);
  last = place(event);
  const far = joint => Math.hypot(joint[0] - last[0], joint[1] - last[1]);
  held = joints.reduce((best, joint, i) => (far(joint) < far(joints[best]) ? i : best), 0);
  if (far(joints[held]) > 0.08) held = null;
});
canvas.addEventListener('pointermove', event => {
  if (last === null) return;
  const here = place(event);
  if (mode === 'draw') strokes.push([last, here, Number(element.querySelector('.width').value)]);
  else if (held !== null) joints[held] = here;
  last = here;
  show();
});
for (const end of ['pointerup', 'pointercancel'])
  canvas.addEventListener(end, () => { last = held = null; finish(); });

function clear(drawing = null) {
  strokes = [];
  ground = drawing;
  joints = structuredClone(props.pose);
  finish();
}

element.querySelector('.clear').addEventListener('click', () => clear());
for (const button of element.querySelectorAll('input[name=mode]'))
  button.addEventListener('change', () => { mode = button.value; finish(); });
watch('value', () => {  // a hint of before, which strokes go over
  const image = new Image();
  image.onload = () => { element.querySelector('input[value=draw]').click(); clear(image); };
  image.src = JSON.parse(props.value).drawing;
});
finish();
