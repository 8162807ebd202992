// A canvas to draw on, white on black, or to drag the joints of a pose. `props.limbs` are pairs of joints,
// `props.colours` their colours, `props.pose` the joints' first places, as fractions of the side. `props.value` is what
// the page's functions get, and give back: the joints of a pose, or a drawing as a PNG.
const canvas = element.querySelector('canvas'), pen = canvas.getContext('2d'), side = canvas.width;
let mode = 'draw', joints = structuredClone(props.pose), strokes = [], ground = null;
let pointer = null, held = null, last = null;  // what draws (no other finger or palm beside it), and from where
const before = [];

function line(from, to, width, colour) {
  pen.strokeStyle = colour;
  pen.lineWidth = width;
  pen.lineCap = 'round';
  pen.beginPath();
  pen.moveTo(from[0] * side, from[1] * side);
  pen.lineTo(to[0] * side + 0.01, to[1] * side);  // a line without length, a dot, is not drawn by all browsers
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

function stroke(here) {
  strokes.push([last, here, Number(element.querySelector('.width').value)]);
  line(...strokes.at(-1), 'white');
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
}

function remember() {
  before.push([[...strokes], structuredClone(joints), ground]);
}

canvas.addEventListener('pointerdown', event => {
  if (pointer !== null || event.button) return;
  pointer = event.pointerId;
  canvas.setPointerCapture(event.pointerId);
  last = place(event);
  const far = joint => Math.hypot(joint[0] - last[0], joint[1] - last[1]);
  held = joints.reduce((best, joint, i) => (far(joint) < far(joints[best]) ? i : best), 0);
  if (far(joints[held]) > 0.08) held = null;
  if (mode === 'draw' || held !== null) remember();
  if (mode === 'draw') stroke(last);
});
canvas.addEventListener('pointermove', event => {
  if (event.pointerId !== pointer) return;
  const here = place(event);
  if (mode === 'draw') stroke(here);
  else if (held !== null) { joints[held] = here; show(); }
  last = here;
});
for (const end of ['pointerup', 'pointercancel'])
  canvas.addEventListener(end, event => { if (event.pointerId === pointer) { pointer = null; finish(); } });

function clear(drawing = null) {
  remember();
  strokes = [];
  ground = drawing;
  joints = structuredClone(props.pose);
  finish();
}

element.querySelector('.clear').addEventListener('click', () => clear());
element.querySelector('.undo').addEventListener('click', () => {
  if (before.length) [strokes, joints, ground] = before.pop();
  finish();
});
for (const button of element.querySelectorAll('input[name=mode]'))
  button.addEventListener('change', () => { mode = button.value; finish(); });
watch('value', () => {  // an earlier picture's hint comes back, to be drawn on
  const image = new Image();
  image.onload = () => { element.querySelector('input[value=draw]').click(); clear(image); };
  image.src = JSON.parse(props.value).drawing;
});
finish();
