"""The page in a real browser, whose network ends at this machine."""

import json
import math
import os
import re
import shutil
import socket
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import forked
import numpy as np
import pytest
from PIL import Image, ImageDraw

from controlnet.inference.png_text import read_texts
from controlnet.training.lock import holder
from controlnet.training.run_state import RunFolder
from controlnet.worlds.measures import iou

api = pytest.importorskip("playwright.sync_api", reason="a browser is driven by playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here"),
    # Looked for, not imported, which takes seconds: the server alone does.
    pytest.mark.skipif(find_spec("gradio") is None, reason="the page needs gradio"),
]

ROOT = Path(__file__).parents[3]
ALONE = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
SECONDS = 60_000  # in milliseconds: what a busy machine may need
# Without a GPU the processor draws each frame: half as many pixels each way are enough.
SCREEN = dict(viewport={"width": 1280, "height": 800}, device_scale_factor=0.5, reduced_motion="reduce")
FRAMES = 300  # milliseconds: a few of them, on a busy machine
# Editors draw each frame anew, by the processor: ten in a second are enough.
SLOWLY = """requestAnimationFrame = draw => setTimeout(() => draw(performance.now()), 100);
cancelAnimationFrame = clearTimeout;"""
# In place of train.py, which needs seconds to begin: it takes the same options, writes and ends as that does.
TRAINING = """
import json, signal, sys, time
from controlnet.training.lock import locked
from controlnet.training.options import parse_args
given = parse_args("")
steps, out = given["steps"], given["out"]
signal.signal(signal.SIGTERM, lambda *_: sys.exit("saved: go on with --resume"))
with locked(out), open(out / "log.jsonl", "w", buffering=1) as log:
    (out / "settings.json").write_text(json.dumps({"settings": {"steps": steps}, "data": {}}))
    for step in range(1, steps + 1):
        print(json.dumps({"step": step, "loss": 1 / step}), file=log)
        time.sleep(0.1)
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory, request):
    """-> the page's address and its folders of pictures and runs."""
    folder = tmp_path_factory.mktemp("page")
    write_run(folder / "runs" / "before")
    (folder / "train.py").write_text(TRAINING)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = forked.start(serve, folder, port)
    try:
        request.getfixturevalue("browser")  # starts meanwhile
        wait_for(lambda: answers(port), server)
        yield f"http://127.0.0.1:{port}", folder / "out", folder / "runs"
    finally:
        server.terminate()
        server.join(30)
        assert server.exitcode in (0, 130)
    said = (folder / "said").read_text()
    assert said.startswith(f"http://127.0.0.1:{port}\n") and "public link" not in said


def serve(folder, port):
    """The program, which looks at runs more often."""
    os.chdir(folder)
    os.environ.update(https_proxy="http://127.0.0.1:9", PYTHONPATH=str(ROOT))
    with open("said", "w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    from tools.page import __main__, runs, trainings

    runs.SECONDS, trainings.ROOT = 0.5, folder
    sys.exit(__main__.main(["--port", str(port), "--out", "out", "--runs", "runs"]))


def write_run(folder):
    """One that has ended."""
    (folder / "samples").mkdir(parents=True)
    run = RunFolder(folder)
    for step in (1, 2):
        run.log({"step": step, "loss": step})
        Image.new("RGB", (8 * step, 8)).save(run.grid(step))
    run.settings_file.write_text('{"settings": {"steps": 2}, "data": {}}')


def answers(port):
    with socket.socket() as here:
        return here.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition, process=None):
    end = time.monotonic() + SECONDS / 1000
    while not (found := condition()):
        assert time.monotonic() < end and (process is None or process.is_alive())
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ALONE.split())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def wrong():
    """Addresses outside that a visitor's page has asked for, and errors that it has shown."""
    return []


@pytest.fixture(autouse=True)
def nothing_wrong(wrong):
    yield
    found, wrong[:] = wrong[:], []
    assert not found


@pytest.fixture(scope="module")
def visit(served, browser, wrong):
    """Opens the page for one more visitor."""
    contexts = []

    def blocked(route):
        wrong.append(route.request.url)
        route.abort()

    def new():
        contexts.append(browser.new_context(**SCREEN))
        contexts[-1].route(re.compile(r"^(?!http://127\.0\.0\.1:|data:|blob:)"), blocked)
        contexts[-1].add_init_script(SLOWLY)
        page = contexts[-1].new_page()
        page.set_default_timeout(SECONDS)
        page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(served[0])
        wait_in(page, f"{CANVAS}?.getContext('2d').getImageData(0, 0, 1, 1).data[3]")
        page.wait_for_timeout(FRAMES)  # the rest of the page tells nobody when it is ready
        return page

    yield new
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def page(visit):
    """Of a visitor who stays all along."""
    return visit()


@pytest.fixture(scope="module")
def other(visit):
    """Of another, at the same time."""
    return visit()


def wait_in(page, expression, arg=None):
    """Until the expression holds in the browser, which is asked now and then: between all frames it would draw each."""
    page.wait_for_function(expression, arg=arg, polling=100)


def go_to(page, tab):
    page.get_by_role("tab", name=tab).click()
    page.wait_for_timeout(FRAMES)  # what it shows tells nobody when it is ready


def drag(page, canvas, places):
    """The mouse along these places, in fractions of the canvas."""
    page.locator(canvas).first.scroll_into_view_if_needed()
    box = page.locator(canvas).first.bounding_box()
    x, y = ([box[start] + box[size] * place[i] for place in places] for i, (start, size) in enumerate(SIDES))
    page.mouse.move(x[0], y[0])
    page.mouse.down()
    for there in zip(x[1:], y[1:], strict=True):
        page.mouse.move(*there)
    page.mouse.up()


CANVAS = "document.querySelector('#sketch canvas')"
SIDES = (("x", "width"), ("y", "height"))
CIRCLE = [(0.55 + 0.25 * math.cos(i * math.pi / 12), 0.5 + 0.25 * math.sin(i * math.pi / 12)) for i in range(25)]


def draw_circle(page):
    """If the canvas is empty."""
    go_to(page, "Draw")
    page.locator("#sketch input[value=draw]").check()  # also after a pose
    pixels = f"{CANVAS}.getContext('2d').getImageData(0, 0, 512, 512).data"
    if not page.evaluate(f"{pixels}.some((level, i) => level && i % 4 < 3)"):
        drag(page, "#sketch canvas", CIRCLE)


def make(page, seen="#picture", steps=2):
    """-> the address of the finished picture."""
    return made(page, ask(page, seen, steps), seen)


def ask(page, seen="#picture", steps=2):
    """Presses the button -> the address of the picture that was there before, if there was one."""
    before = page.locator(f"{seen} img").get_attribute("src") if page.locator(f"{seen} img").count() else None
    set_number(page, "steps", steps)
    page.get_by_role("button", name="make", exact=True).filter(visible=True).click()
    return before


def made(page, before, seen="#picture"):
    wait_in(
        page,
        "([seen, before]) => { const s = document.querySelector(seen + ' img')?.src;"
        " return s && s !== before && /[/][0-9]{4}[.]png$/.test(s); }",
        [seen, before],
    )
    return page.locator(f"{seen} img").get_attribute("src")


def set_number(page, label, value):
    field = page.get_by_label(f"number input for {label}", exact=False).filter(visible=True)
    if not field.count():
        page.get_by_role("button", name="more").filter(visible=True).click()
        page.wait_for_timeout(FRAMES)  # else it opens with its own number
    field.first.fill(str(value))
    field.first.press("Tab")
    assert field.first.input_value() == str(value)


def file_of(out, address):
    return out / address.rsplit("/", 1)[1]


def inputs_of(picture):
    settings, _ = read_texts(picture)
    return settings, [np.asarray(Image.open(picture.parents[1] / hint)) for hint in settings["hint"]]


def test_the_disc_lies_on_the_circle_that_was_drawn(served, page, other):
    page.get_by_role("button", name="make", exact=True).filter(visible=True).click()
    wait_in(page, "document.querySelector('#picture-notes').innerText.startsWith('nothing is drawn yet')")
    draw_circle(page)
    drawn = page.evaluate(f"{CANVAS}.toDataURL()")
    drag(page, "#sketch canvas", [(0.1, 0.1), (0.2, 0.3)])
    assert page.evaluate(f"{CANVAS}.toDataURL()") != drawn
    page.locator("#sketch .undo").click()
    page.fill("#prompt textarea", "red circle with blue background")
    address = make(page, steps=5)
    picture = file_of(served[1], address)
    pixels = np.asarray(Image.open(picture)).astype(int)
    disc = Image.new("1", (pixels.shape[1], pixels.shape[0]))
    ImageDraw.Draw(disc).polygon([(x * disc.width, y * disc.height) for x, y in CIRCLE], fill=1)
    assert iou(pixels[..., 0] > pixels[..., 2], np.asarray(disc)) > 0.8

    # What is downloaded is the file with its text, which fills the form of another visitor.
    assert page.request.get(address).body() == picture.read_bytes()
    other.locator("input[type=file][accept='.png']").first.set_input_files(picture)
    wait_in(other, "document.querySelector('#prompt textarea').value.startsWith('red circle')")
    wait_in(other, f"{CANVAS}.toDataURL() === {json.dumps(drawn)}")


def test_a_pose_is_dragged(served, page):
    go_to(page, "Draw")
    page.get_by_label("pose").check()
    drag(page, "#sketch canvas", [(0.31, 0.56), (0.25, 0.4), (0.15, 0.25)])  # the right wrist
    settings, (hint,) = inputs_of(file_of(served[1], make(page)))
    assert settings["control"] == ["tiny-pose"] and hint.shape == (512, 512, 3)
    assert hint[int(0.25 * 512), int(0.15 * 512)].any() and not hint[int(0.58 * 512), int(0.31 * 512)].any()
    beyond = f"{CANVAS}.getContext('2d').getImageData({int(0.15 * 512) - 6}, {int(0.25 * 512)}, 1, 1).data"
    assert max(page.evaluate(f"[...{beyond}]")[:3]) > 50  # the joint's dot, which is wider than the limb


def test_cancel_works_at_the_next_step(served, page):
    draw_circle(page)
    before = sorted(served[1].glob("*.png"))
    ask(page, steps=50)
    wait_in(page, "/step [0-9]+ of 50/.test(document.querySelector('#picture-notes').innerText)")
    page.get_by_role("button", name="cancel", exact=True).filter(visible=True).click()
    wait_in(page, "document.querySelector('#picture-notes').innerText.includes('cancelled')")
    set_number(page, "steps", 2)
    shown = page.locator("#picture img").get_attribute("src")
    page.get_by_role("button", name="another", exact=True).dblclick()
    picture = file_of(served[1], made(page, shown))
    assert sorted(served[1].glob("*.png")) == [*before, picture]
    assert read_texts(picture)[0]["seed"] == int(page.get_by_label("seed", exact=True).input_value()) == 1
    page.locator("#picture-before img").nth(1).click()
    wait_in(page, f"document.querySelector('#picture img').src.endsWith('/{before[-1].name}')")


def test_a_bad_file_is_a_sentence(page, tmp_path):
    go_to(page, "Draw")
    (tmp_path / "bad.png").write_text("no picture")
    page.locator("input[type=file][accept='.png']").first.set_input_files(tmp_path / "bad.png")
    wait_in(page, "document.body.innerText.includes('\"bad.png\" is not readable as an image')")
    go_to(page, "Files")
    page.locator("#dropped input[type=file]").set_input_files(tmp_path / "bad.png")
    page.wait_for_selector("text=bad.png")
    page.locator("#checkpoint input").click()
    page.get_by_role("option", name="tiny-pose.safetensors").click()
    wait_in(page, "/kind +ControlNet/.test(document.querySelector('#facts textarea').value)")


def test_two_visitors_have_their_own_pictures(served, page, other):
    pages, colours = (page, other), ("red", "lime")
    for page, colour in zip(pages, colours, strict=True):
        draw_circle(page)
        page.fill("#prompt textarea", f"{colour} circle with blue background")
    before = [ask(page) for page in pages]
    for page, colour, old in zip(pages, colours, before, strict=True):
        settings, _ = inputs_of(file_of(served[1], made(page, old)))
        assert settings["prompt"].startswith(colour)


def test_a_photograph_becomes_a_hint_and_what_is_painted_is_made_anew(served, other, tmp_path):
    page = other
    Image.open(ROOT / "assets" / "cat.jpg").resize((192, 128)).save(tmp_path / "cat.png")
    go_to(page, "Photo")
    page.wait_for_selector("#photo canvas")
    page.wait_for_selector("#hint-1 canvas")
    page.wait_for_timeout(FRAMES)  # editors tell nobody when they are ready
    page.locator("#photo input[type=file]").first.set_input_files(tmp_path / "cat.png")
    wait_in(page, "!document.querySelector('#photo').innerText.includes('Upload')")
    page.wait_for_timeout(FRAMES)
    page.get_by_role("button", name="make", exact=True).filter(visible=True).click()
    wait_in(page, "document.querySelector('#photo-picture-notes').innerText.includes('not used yet')")
    page.locator("#detect-1").click()
    wait_in(page, "!document.querySelector('#hint-1').innerText.includes('Upload')")
    page.wait_for_timeout(FRAMES)
    drag(page, "#hint-1 canvas", [(0.4, 0.5), (0.5, 0.5), (0.6, 0.5)])
    drag(page, "#photo canvas", [(0.5, 0.5), (0.55, 0.55)])
    page.wait_for_timeout(FRAMES)
    page.get_by_label("begin from").click()
    page.get_by_text("the photograph, for what is painted").click()
    settings, (hint,) = inputs_of(file_of(served[1], make(page, "#photo-picture")))
    assert settings["control"] == ["tiny-canny"] and settings["size"] == "192x128"
    lines = hint.min(axis=2) > 127
    assert hint.shape == (512, 768, 3) and 0.02 < lines.mean() < 0.3
    assert lines[:, 300:460].all(axis=1).sum() in range(3, 60)  # the stroke
    init, mask = (Image.open(served[1].parent / settings[name]) for name in ("init", "mask"))
    assert init.size == mask.size and 0 < np.asarray(mask).mean() < 64
    page.goto("about:blank")  # else its editors keep the browser busy


def test_a_run_is_seen_as_curves_and_grids(page):
    go_to(page, "Runs")
    page.locator("#run input").click()
    page.get_by_role("option", name="before").click()
    wait_in(page, "document.querySelector('#status').innerText === 'ended after step 2 of 2'")
    page.wait_for_selector("#charts polyline")
    wait_in(page, "document.querySelector('#grid img')?.naturalWidth === 16")
    page.get_by_label("number input for which grid").fill("1")
    page.get_by_label("number input for which grid").press("Tab")
    wait_in(page, "document.querySelector('#grid img')?.naturalWidth === 8")


def test_a_training_is_started_watched_and_stopped(served, page):
    go_to(page, "Runs")
    page.get_by_role("button", name="a new training").click()
    page.locator("#name input, #name textarea").fill("mine")
    for label, value in (("steps", "500"), ("batch size", "1"), ("images", "4")):
        page.get_by_label(label, exact=True).filter(visible=True).fill(value)
    expected = "python train.py --data=fill50k --base=tiny --steps=500 --batch-size=1 --images=4 --precision=fp32"
    wait_in(page, f"document.querySelector('#command textarea').value === '{expected} --out=runs/mine'")
    page.get_by_role("button", name="start", exact=True).click()
    wait_in(page, "/step [0-9]+ of 500, about/.test(document.querySelector('#status').innerText)")
    points = "(document.querySelector('#charts polyline')?.points.length ?? 0)"
    wait_in(page, f"{points} > {max(2, page.evaluate(points))}")
    process = holder(served[2] / "mine")
    assert os.getsid(process) == process  # what ends the page does not end it
    page.get_by_role("button", name="stop", exact=True).click()
    wait_in(page, "document.querySelector('#status').innerText.startsWith('ended after step')")
    wait_in(page, "document.querySelector('#output textarea').value.includes('go on with --resume')")


def test_nothing_outside_its_folders_is_served(served, page):
    address, out, _ = served
    (out.parent / "secret.png").write_bytes(b"secret")
    for path in ("/etc/hostname", ROOT / "README.md", out.parent / "secret.png", out / ".." / "secret.png", "runs"):
        assert page.request.get(f"{address}/gradio_api/file={path}").status in (403, 404), path
    # A form that names a file of the server's, in place of one that was sent.
    config = page.request.get(f"{address}/config").json()
    files = [c["id"] for c in config["components"] if c["type"] in ("file", "uploadbutton")]
    uploads = [d for d in config["dependencies"] if d["inputs"] and set(d["inputs"]) <= set(files)]
    assert len(uploads) == 2
    for upload in uploads:
        file = {"path": str(out.parent / "secret.png"), "meta": {"_type": "gradio.FileData"}}
        sent = {"data": [file], "fn_index": upload["id"], "session_hash": "forged"}
        assert page.request.post(f"{address}/gradio_api/queue/join", data=sent).ok
    said = page.request.get(f"{address}/gradio_api/queue/data?session_hash=forged").text()
    assert said.count('"success":false') == 2 and "is not readable" not in said
