"""The network and the score in a page: the scripts of docs/_static in a real browser, held against Python."""

from __future__ import annotations

import base64
import copy
import http.server
import json
import re
import shutil
import threading
from functools import partial
from pathlib import Path

import browser as chromium
import numpy as np
import pytest
import torch
from helpers import lived_in
from PIL import Image

from msunet_core import StudyError, apply_opt_level, build_msunet, load_data, load_network, pack, score
from msunet_core.data.sources import CIFAR100_CLASSES
from msunet_core.measure.evaluation import class_scores
from msunet_core.measure.scoring import published_table
from msunet_core.measure.unpack import shipped
from msunet_core.model.pruning import prune_to_target
from msunet_core.model.ternary import ternary_layers
from msunet_core.study.web import network_script

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("try_it", "score_explorer")
BITS = {
    "O0": {"weights": 32, "activations": 32, "sums": 32},
    "O3": {"weights": 16, "activations": 16, "sums": 32},
}
# Both sides sum FP32 products in other orders, Python in FP32: 1e-5 of scores up to 20 was seen.
TOLERANCE = 1e-3

needs_browser = pytest.mark.skipif(chromium.find() is None, reason="no Chromium")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The two pages without the site around them: what their sources hold as HTML, beside their scripts."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(DOCS / "_static", folder / "_static")
    (folder / "_static" / "msunet_v3.js").write_text(network_script(shipped()))
    for page in PAGES:
        blocks = re.findall(r"```\{raw\} html\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
        head = '<!doctype html><html lang="en"><meta charset="utf-8"><title>page</title>'
        head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
        (folder / f"{page}.html").write_text(head + "".join(blocks))
    scripts = "".join(
        f'<script src="_static/{name}.js"></script>' for name in ("msunet_v3", "msunet", "score")
    )
    (folder / "scripts.html").write_text(f"<!doctype html><title>no page</title>{scripts}")
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    window = chromium.Browser(tmp_path_factory.mktemp("chromium"))
    yield window
    window.close()


@pytest.fixture
def scripts(page, site):
    """The scripts alone, loaded once for all tests in a row that only call them."""
    address = (site / "scripts.html").as_uri()
    if page.evaluate("location.href") != address:
        page.open(address)
    return page


@pytest.fixture
def try_it(page, site):
    page.open((site / "try_it.html").as_uri())
    page.wait_for("document.querySelectorAll('#tryit-answer tr').length === 5")
    return page


@pytest.fixture
def explorer(page, site):
    page.open((site / "score_explorer.html").as_uri())
    return page


def smooth_images(count: int) -> torch.Tensor:
    """uint8 (count, 32, 32, 3): noise of 5 x 5 pixels made large: shapes with edges and plain parts."""
    noise = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(7))
    large = torch.nn.functional.interpolate(noise, size=32, mode="bicubic", align_corners=False)
    return (large * 255).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def scores_in_page(page, images: torch.Tensor, packed: Path | None = None) -> np.ndarray:
    """Class scores (N, classes) that the page's script computes, of its own network or another packed one."""
    pixels = base64.b64encode(images.numpy().tobytes()).decode()
    file = json.dumps(base64.b64encode(packed.read_bytes()).decode()) if packed else "MSUNET_FILE.packed"
    return np.array(
        page.evaluate(f"""(() => {{
            const network = MSUNet.decode(MSUNet.fromBase64({file}));
            const pixels = MSUNet.fromBase64("{pixels}");
            const of = (i) => MSUNet.normalise(pixels.subarray(i * 3072, (i + 1) * 3072), network.info);
            return Array.from({{ length: {len(images)} }}, (_, i) => [...MSUNet.run(network, of(i))]);
        }})()""")
    )


def answer(page) -> list[tuple[str, float]]:
    """The five classes that the page shows, with their scores."""
    rows = page.evaluate(
        "[...document.querySelectorAll('#tryit-answer tr')].map((r) => [...r.cells].map((c) => c.innerText))"
    )
    return [(row[0], float(row[-1])) for row in rows]


def best_five(scores: torch.Tensor) -> list[tuple[str, float]]:
    values, places = scores.topk(5)
    names = [CIFAR100_CLASSES[i].replace("_", " ") for i in places]
    return list(zip(names, values.tolist(), strict=True))


def assert_same_answer(shown: list[tuple[str, float]], expected: list[tuple[str, float]]) -> None:
    assert [name for name, _ in shown] == [name for name, _ in expected]
    # Three decimals are shown.
    assert [s for _, s in shown] == pytest.approx([s for _, s in expected], abs=TOLERANCE + 5e-4)


# --- the network ---------------------------------------------------------------------------------


@needs_browser
@pytest.mark.slow
def test_class_scores_in_the_page_are_pythons_at_o0_on_100_images(scripts):
    images = torch.cat([load_data("synthetic", limit=1).test_images[:50], smooth_images(50)])
    model, _ = load_network(shipped())
    expected = class_scores(model, images, "O0").numpy()
    assert expected.shape == (100, 100) and expected.std() > 1
    np.testing.assert_allclose(scores_in_page(scripts, images), expected, rtol=0, atol=TOLERANCE)


@needs_browser
@pytest.mark.parametrize(
    ("arguments", "pruner", "merge"),
    [
        ({"variant": "v3"}, "V2", True),  # T, S, D
        ({"variant": "v1", "width": 0.1}, "none", False),  # all four vectors of each batch norm
        ({"variant": "v3", "weights": "binary", "num_classes": 7}, "V1", True),
        ({"variant": "v2", "weights": "float"}, "V2", False),
    ],
)
def test_every_kind_of_packed_layer_is_read(scripts, new_network, tmp_path, arguments, pruner, merge):
    model = lived_in(new_network(**arguments))
    prune_to_target(model, pruner)
    path = pack(model, tmp_path / "other.safetensors", merge=merge)
    packed, _ = load_network(path, arguments["variant"])
    images = smooth_images(4)
    expected = class_scores(packed, images, "O0").numpy()
    assert np.abs(expected[0] - expected[1]).max() > 100 * TOLERANCE  # the images are told apart
    np.testing.assert_allclose(scores_in_page(scripts, images, path), expected, rtol=0, atol=TOLERANCE)


@needs_browser
def test_what_the_layers_show_is_what_pythons_layers_put_out(scripts):
    names = ["conv_stem", "act1", "blocks.2.0.conv_dw", "blocks.2.0.se", "blocks.3.0.bn3", "global_pool"]
    model, _ = load_network(shipped())
    expected = {}
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _m, _i, out, name=name: expected.update({name: out[0].flatten()}))
    image = smooth_images(1)
    class_scores(model, image)
    pixels = base64.b64encode(image.numpy().tobytes()).decode()
    found = scripts.evaluate(f"""(() => {{
        const network = MSUNet.decode(MSUNet.fromBase64(MSUNET_FILE.packed));
        const found = {{}};
        const input = MSUNet.normalise(MSUNet.fromBase64("{pixels}"), network.info);
        MSUNet.run(network, input, (step, values) => {{
            if ({json.dumps(names)}.includes(step.name)) found[step.name] = [...values];
        }});
        return found;
    }})()""")
    assert list(found) == names
    for name in names:
        np.testing.assert_allclose(found[name], expected[name].numpy(), rtol=0, atol=TOLERANCE, err_msg=name)


@needs_browser
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content[:5000], "ends too early"),
        (lambda content: b"PK" + content[2:], "not a packed network"),
        (lambda content: content.replace(b"msunet-packed-1", b"msunet-packed-9"), "msunet-packed-9"),
        (lambda content: content.replace(b'\\"width\\":1.0', b'\\"width\\":0.5'), "longer than"),
    ],
)
def test_bytes_that_are_no_network_are_refused_in_one_line(scripts, change, said, tmp_path):
    (tmp_path / "odd").write_bytes(change(shipped().read_bytes()))
    file = json.dumps(base64.b64encode((tmp_path / "odd").read_bytes()).decode())
    message = scripts.evaluate(
        f"(() => {{ try {{ MSUNet.decode(MSUNet.fromBase64({file})); }} catch (e) {{ return e.message; }}"
        "return null; })()"
    )
    assert said in message and "\n" not in message


@needs_browser
def test_shrinking_by_a_part_of_a_pixel_keeps_the_mean(scripts):
    # 50 / 32 pixels each: output pixel 0 covers pixel 0 whole and 18/32 of pixel 1. A ramp stays a ramp.
    found = scripts.evaluate("""(() => {
        const rgba = new Uint8ClampedArray(50 * 50 * 4).map((_, i) => 5 * (Math.floor(i / 4) % 50));
        return [...MSUNet.shrink(rgba, 50)].filter((_, i) => i % 3 === 0).slice(0, 32);
    })()""")
    assert found[0] == round((0 * 1 + 5 * 18 / 32) / (50 / 32))
    edges = (np.arange(32) + 0.5) * 50 / 32 - 0.5  # middle of each output pixel, in pixels of the picture
    # Where a part of a pixel is covered the mean is off that of a line by at most an eighth of a step.
    np.testing.assert_allclose(found, 5 * edges, atol=5 / 8 + 0.5)


def test_the_page_gets_the_file_and_a_name_for_each_class_of_cifar_100(new_network, tmp_path):
    with pytest.raises(StudyError, match="has 4 classes, not those of CIFAR-100"):
        network_script(pack(new_network(), tmp_path / "narrow.safetensors"))
    script = network_script(shipped())
    content = json.loads(script.removeprefix("globalThis.MSUNET_FILE = ").rstrip().removesuffix(";"))
    assert (len(content["names"]), content["names"][1], content["names"][3]) == (100, "aquarium fish", "bear")
    assert base64.b64decode(content["packed"]) == shipped().read_bytes()


# --- a reader at "Try it" ------------------------------------------------------------------------


@needs_browser
def test_a_dropped_picture_is_cropped_shrunk_and_classified(try_it, tmp_path):
    wide = smooth_images(3).permute(0, 3, 1, 2).reshape(1, 9, 32, 32)[:, :3].repeat_interleave(2, 2)
    wide = torch.cat([wide.repeat_interleave(2, 3), wide], 3)[0].permute(1, 2, 0)  # 64 x 96
    Image.fromarray(wide.numpy()).save(tmp_path / "wide.png")
    try_it.drop("#tryit-zone", tmp_path / "wide.png")
    try_it.wait_for("document.getElementById('tryit-status').textContent.startsWith('wide.png, 96 × 64')")
    crop = wide[:, 16:80].float().reshape(32, 2, 32, 2, 3).mean((1, 3))
    pixels = (crop + 0.5).floor().to(torch.uint8)
    model, _ = load_network(shipped())
    assert_same_answer(answer(try_it), best_five(class_scores(model, pixels[None], "O0")[0]))
    seen = try_it.evaluate(
        "[...document.getElementById('tryit-picture').getContext('2d').getImageData(0, 0, 32, 32).data]"
    )
    assert torch.equal(torch.tensor(seen).view(32, 32, 4)[..., :3], pixels.long())


@needs_browser
def test_a_chosen_picture_of_32_pixels_reaches_the_network_as_it_is(try_it, tmp_path):
    image = smooth_images(2)[1]
    Image.fromarray(image.numpy()).save(tmp_path / "small.png")
    try_it.choose("#tryit-file", tmp_path / "small.png")
    try_it.wait_for("document.getElementById('tryit-status').textContent.startsWith('small.png, 32 × 32')")
    model, _ = load_network(shipped())
    assert_same_answer(answer(try_it), best_five(class_scores(model, image[None], "O0")[0]))
    assert re.match(r"\d+ ms for this picture, \d+ ms the median of the last 2", try_it.text("#tryit-time"))


@needs_browser
def test_behind_a_transparent_picture_it_is_white(try_it, tmp_path):
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    try_it.choose("#tryit-file", tmp_path / "clear.png")
    try_it.wait_for("document.getElementById('tryit-status').textContent.startsWith('clear.png, 40 × 40')")
    seen = try_it.evaluate(
        "[...document.getElementById('tryit-picture').getContext('2d').getImageData(0, 0, 32, 32).data]"
    )
    assert set(seen) == {255}


@needs_browser
def test_a_file_that_is_no_picture_is_said(try_it, tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    before = answer(try_it)
    try_it.choose("#tryit-file", tmp_path / "text.png")
    try_it.wait_for("document.getElementById('tryit-status').textContent.includes('is no picture')")
    assert answer(try_it) == before and not try_it.complaints


@needs_browser
def test_layers_are_looked_at_by_the_keyboard(try_it):
    picture = "document.getElementById('tryit-maps').toDataURL()"
    first, words = try_it.evaluate(picture), try_it.text("#tryit-caption")
    assert words.startswith("All 64 maps of 32 × 32: black is 0.00")  # behind a ReLU
    try_it.press("#tryit-layer", "ArrowDown", times=2)
    try_it.wait_for(f"{picture} !== {json.dumps(first)}")
    assert try_it.evaluate("document.getElementById('tryit-layer').value") == "blocks.0.0.bn1"
    label = try_it.evaluate("document.getElementById('tryit-maps').getAttribute('aria-label')")
    assert label == f"Output of blocks.0.0.bn1. {try_it.text('#tryit-caption')}"


@needs_browser
def test_the_camera_is_classified_until_it_is_stopped(try_it):
    try_it.click("#tryit-camera")
    try_it.wait_for("document.getElementById('tryit-time').textContent.includes('last 3')")
    assert try_it.text("#tryit-camera") == "Stop the camera"
    assert "the camera" in try_it.evaluate(
        "document.getElementById('tryit-picture').getAttribute('aria-label')"
    )
    try_it.click("#tryit-camera")
    stopped = try_it.text("#tryit-time")
    try_it.evaluate("new Promise((done) => setTimeout(done, 500))")
    assert try_it.text("#tryit-camera") == "Use the camera" and try_it.text("#tryit-time") == stopped


@needs_browser
def test_a_readers_own_network_takes_the_place_of_ours(try_it, new_network, tmp_path):
    path = pack(new_network(), tmp_path / "own.safetensors")
    try_it.choose("#tryit-own", path)
    try_it.wait_for("document.getElementById('tryit-network').textContent.startsWith('own.safetensors')")
    assert "4 classes" in try_it.text("#tryit-network")
    assert {name for name, _ in answer(try_it)} == {"class 0", "class 1", "class 2", "class 3"}


# --- the score -----------------------------------------------------------------------------------


def counted_in_page(page, setting: dict) -> dict:
    return page.evaluate(f"MSUNetScore.count({json.dumps(setting)})")


def scored(variant: str, level: str, pruner: str, shares: dict, weights: str = "ternary", width: float = 1.0):
    """Python's score of a pruned network, and the setting of the page that tells of the same."""
    torch.manual_seed(0)
    model = build_msunet(variant, weights=weights, width=width)
    prune_to_target(model, pruner)
    at_level = apply_opt_level(copy.deepcopy(model), level)  # FP16 moves a weight or two over the threshold
    layers = ternary_layers(at_level).items()
    known = {name: (layer.signs() == 0).double().mean().item() for name, layer in layers}
    zeros = {"ternary": 0, "se": 0, "dw": 0, "classifier": 0} | shares
    setting = dict(variant=variant, weights=weights, width=width, bits=BITS[level], zeros=zeros, known=known)
    return score(model, level), setting


@needs_browser
@pytest.mark.parametrize(
    "case",
    [
        ("v1", "O0", "V1", {"se": 0.9}),
        ("v2", "O3", "V2", {"se": 0.9, "dw": 0.5}),
        ("v3", "O3", "V2", {"se": 0.9, "dw": 0.5}),
        # No published ones: zeros in the classifier, other weights, other widths (10 / 4 is a tie).
        ("v3", "O0", "V3", {"se": 0.9, "dw": 0.5, "classifier": 0.9}),
        ("v3", "O3", "none", {}, "binary", 0.15625),
        ("v1", "O0", "V2", {"se": 0.9, "dw": 0.5}, "float", 1.3),
    ],
)
def test_the_page_counts_every_layer_as_score_does(scripts, case):
    result, setting = scored(*case)
    counted = counted_in_page(scripts, setting)
    rows = {row["name"]: row for row in counted["layers"]}
    assert set(rows) == set(result.layers["name"]) and len(rows) == len(counted["layers"])
    for layer in result.layers.itertuples():
        row = rows[layer.name]
        found, expected = [(r["params"], r["mults"], r["adds"]) for r in (row, layer._asdict())]
        # The same sums of FP64 in another order.
        assert found == pytest.approx(expected, rel=1e-12), layer.name
        assert row["kind"] == layer.kind, layer.name
    for measure in ("params", "mults", "adds", "flops", "value"):
        assert counted[measure] == pytest.approx(getattr(result, measure), rel=1e-12), measure


@needs_browser
def test_the_page_knows_the_published_results(scripts):
    table = published_table().set_index("variant")
    known = scripts.evaluate("MSUNetScore.PUBLISHED")
    assert known == table[["params", "flops", "score"]].to_dict("index")
    for variant, row in known.items():
        counted = scripts.evaluate(f"MSUNetScore.count(MSUNetScore.published('{variant}'))")
        assert counted["flops"] == pytest.approx(row["flops"])
        # One share of zeros for all layers: the published parameters are met to 1 %.
        assert counted["params"] == pytest.approx(row["params"], rel=0.01)


@needs_browser
def test_the_challenges_counter_asks_for_what_the_published_one_leaves_out(scripts):
    _, setting = scored("v3", "O3", "V2", {"se": 0.9, "dw": 0.5})
    ours, official = (
        counted_in_page(scripts, setting),
        counted_in_page(scripts, setting | {"official": True}),
    )
    # Sums of squeeze-excitation (H*W-1 for each of 320, 768, 640, 1024 channels) and of the last pool in full
    # where half was counted, and an addition for the bias of each of 100 classes.
    sums = 255 * 320 + 255 * 768 + 63 * 640 + 63 * 1024 + 63 * 256
    assert official["adds"] - ours["adds"] == pytest.approx(sums / 2 + 100)
    assert official["params"] - ours["params"] == pytest.approx(100 / 2)
    pruned = counted_in_page(
        scripts, setting | {"official": True, "zeros": setting["zeros"] | {"classifier": 0.9}}
    )
    # 25,600 weights of 16 bits become 25,600 bits and 2,560 weights.
    assert official["params"] - pruned["params"] == pytest.approx(12_800 - 800 - 1_280)


# --- a reader at the explorer --------------------------------------------------------------------


def shown_counts(page) -> dict[str, float]:
    """Parameters, operations in millions and the score, as the page shows them."""
    rows = page.evaluate(
        "[...document.querySelectorAll('#score-totals tr')].map((r) => [...r.cells].map((c) => c.innerText))"
    )
    return {row[0]: float(row[2] if row[0] == "score" else row[1].split()[0]) for row in rows}


@needs_browser
def test_additions_shrink_by_the_bits_of_sums_when_their_slider_moves(explorer):
    before = shown_counts(explorer)
    assert "100 % of v3's" in explorer.text("#score-words")
    inside = float(re.search(r"operations ([\d.]+) M", explorer.text("#score-inside"))[1])
    explorer.press("#score-sums", "ArrowLeft", times=16)
    assert explorer.text("#score-sums-value") == "16\N{NO-BREAK SPACE}bits"
    assert "really rounded" in explorer.text("#score-sums-note")
    after = shown_counts(explorer)
    # Half of those inside convolutions (shown to 0.1 M) and of the classifier's 25,500 is gone, nothing else.
    assert before["additions"] - after["additions"] == pytest.approx(inside / 2 + 0.0128, abs=0.05)
    assert (before["multiplications"], before["parameters"]) == (
        after["multiplications"],
        after["parameters"],
    )
    assert after["score"] < before["score"]


@needs_browser
def test_below_the_threshold_zeros_are_said_to_save_nothing_and_do_not(explorer):
    explorer.press("#score-dw", "ArrowLeft", times=10)  # 40 %
    assert explorer.text("#score-dw-note").startswith("Sparse")
    sparse = shown_counts(explorer)
    explorer.press("#score-dw", "ArrowLeft")
    dense = shown_counts(explorer)
    assert explorer.text("#score-dw-note").startswith("Dense")
    assert dense["parameters"] > sparse["parameters"]
    explorer.press("#score-dw", "Home")
    assert shown_counts(explorer) == dense


@needs_browser
@pytest.mark.parametrize("variant", ["v1", "v2", "v3"])
def test_a_button_sets_a_published_network(explorer, variant):
    explorer.click(f"[data-published={variant}]")
    row = published_table().loc[f"MSUNet-{variant}"]
    shown = shown_counts(explorer)
    assert shown["multiplications"] + shown["additions"] == pytest.approx(row["flops"] / 1e6, abs=0.011)
    assert shown["score"] == pytest.approx(row["score"], rel=0.005)
    # Its place on the axis is beside its mark.
    order = explorer.evaluate("[...document.querySelectorAll('#score-scale th')].map((c) => c.innerText)")
    assert abs(order.index("this setting") - order.index(variant)) == 1


@needs_browser
def test_the_page_says_what_halves_the_score_and_it_does(explorer):
    rows = explorer.evaluate(
        "[...document.querySelectorAll('#score-levers tr')].map((r) => [...r.cells].map((c) => c.innerText))"
    )
    said = {row[0]: row[1:] for row in rows}
    # Storage and products are too small a part: only what makes fewer or cheaper additions can do it alone.
    enough = {move for move, (_, alone, _) in said.items() if not alone.startswith("not enough")}
    assert enough == {"bits of sums", "zeros, ternary", "width"}
    bits = int(said["bits of sums"][1].split()[0])
    explorer.press("#score-sums", "ArrowLeft", times=32 - bits)
    half = published_table().loc["MSUNet-v3", "score"] / 2
    assert shown_counts(explorer)["score"] <= half
    explorer.press("#score-sums", "ArrowRight")
    assert shown_counts(explorer)["score"] > half


# --- both pages ----------------------------------------------------------------------------------


@needs_browser
@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_page_fits_the_screen_names_its_controls_and_stays_on_this_machine(page, site, name, width, dark):
    page.open((site / f"{name}.html").as_uri(), width=width, dark=dark)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    unnamed = page.evaluate("""[...document.querySelectorAll('input, select, button, canvas')]
        .filter((e) => !(e.labels?.length || e.innerText || e.getAttribute('aria-label')))
        .map((e) => e.outerHTML)""")
    assert unnamed == []
    assert page.complaints == []
    assert page.requests and all(url.startswith(site.as_uri()) for url in page.requests)


@needs_browser
def test_a_served_page_asks_only_its_server(page, site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        page.open(f"{address}try_it.html")
        page.wait_for("document.querySelectorAll('#tryit-answer tr').length === 5")
        server.shutdown()
    assert all(url.startswith(address) for url in page.requests)
    assert [c for c in page.complaints if "favicon" not in c] == []
