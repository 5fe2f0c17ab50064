"""The page that teaches: what it shows is what the package computes, and hands and keys move it.

In a browser it runs with `pip install -e '.[browser]'`, where chromium and chromedriver are found.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import STRICT_PYTHON
from torch import Tensor, nn

from explicit_wn import SpectralNorm, WeightNorm

EXAMPLES = Path(__file__).parents[2] / "examples"
PAGE, STILL = EXAMPLES / "playground.html", EXAMPLES / "playground.png"
NUMBERS = re.compile(r'(?<=<script type="application/json" id="numbers">).*?(?=</script>)', re.DOTALL)


def numbers_of(page: str) -> dict[str, Any]:
    (numbers,) = NUMBERS.findall(page)
    return json.loads(numbers)


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def data(page: str) -> dict[str, Any]:
    return numbers_of(page)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page, written anew."""
    out = tmp_path_factory.mktemp("playground") / "page.html"
    command = [*STRICT_PYTHON, EXAMPLES / "playground.py", "--out", out]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=out.parent)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    assert re.fullmatch(r"page.html written, 0\.\d\d MB: open it in a browser\n", ran.stdout)
    return out.read_text(encoding="utf-8")


# The file


def test_it_is_small_and_asks_nothing_of_a_network(page: str) -> None:
    assert len(page.encode()) < 2_000_000
    assert STILL.stat().st_size < 200_000
    without_numbers = NUMBERS.sub("", page)
    assert re.findall(r"https?://[^\"\s]+", without_numbers) == ["http://www.w3.org/2000/svg"]  # a name, not a place
    assert not re.search(r"\bsrc=|@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(", without_numbers)
    assert not re.search(r"/(home|root|tmp|work|Users|usr)/", page)


def test_it_is_what_the_writer_writes(page: str, written: str) -> None:
    assert NUMBERS.sub("", page) == NUMBERS.sub("", written), "run python examples/playground.py"


def test_its_numbers_are_those_of_a_new_run(data: dict[str, Any], written: str) -> None:
    now = numbers_of(written)
    assert list(now) == list(data) == ["apart", "descent", "stale", "training", "power", "everywhere"]
    for name in ("apart", "descent", "stale", "power"):
        assert_near(data[name], now[name], name)
    if now["everywhere"]["torch"] == data["everywhere"]["torch"]:
        assert data["everywhere"] == now["everywhere"]
    for before, after in zip(data["training"]["runs"], now["training"]["runs"], strict=True):
        assert before["name"] == after["name"]
        assert_near(before["loss"][:30], after["loss"][:30], before["name"])  # later it is chaotic
        assert [len(one[key]) for one in (before, after) for key in ("loss", "right", "frames")] == [601, 31, 31] * 2
        assert abs(before["loss"][-1] - after["loss"][-1]) < 0.15


def assert_near(one: Any, other: Any, where: str) -> None:
    """That two values of the page are the same, but for the last digit of a number."""
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_near(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_near(*pair, f"{where}[{index}]")
    elif isinstance(one, (int, float)):
        assert other == pytest.approx(one, rel=2e-3, abs=2e-3 if isinstance(one, float) else 1), where
    else:
        assert one == other, where


# Its numbers


def test_taken_apart_every_w_is_what_the_formula_gives(data: dict[str, Any]) -> None:
    apart = data["apart"]
    angles, lengths, g = (torch.tensor(apart[key], dtype=torch.float64) for key in ("angles", "lengths", "magnitudes"))
    unit = torch.stack([angles.deg2rad().cos(), angles.deg2rad().sin()], dim=1)
    w = (unit[:, None, None] * g[:, None]).expand(-1, len(lengths), -1, -1)
    torch.testing.assert_close(torch.tensor(apart["w"]).double() / 1000, w.flatten(), atol=6e-4, rtol=0)
    v = (unit[:, None] * lengths[:, None]).flatten()
    torch.testing.assert_close(torch.tensor(apart["v"]).double(), v, atol=6e-4, rtol=0)
    torch.testing.assert_close(torch.tensor(apart["norm"]).double(), lengths.repeat(len(angles)), atol=6e-4, rtol=0)


def by_hand(g: Tensor, v: Tensor) -> Tensor:
    return g * v / v.square().sum().sqrt()


@pytest.mark.parametrize(("rate", "start"), [(0, 0), (3, 1), (5, 0), (6, 2)])
def test_every_step_of_the_descent_follows_from_the_one_before(data: dict[str, Any], rate: int, start: int) -> None:
    descent = data["descent"]
    lr, target, run = descent["rates"][rate], torch.tensor(descent["target"]), descent["runs"][rate][start]
    assert run[0]["norm"] == pytest.approx(descent["lengths"][start], abs=1e-4)
    for now, after in zip(run, [*run[1:], None], strict=True):
        g, v = torch.tensor(now["g"], requires_grad=True), torch.tensor(now["v"], requires_grad=True)
        w = by_hand(g, v)
        w.retain_grad()
        (w - target).square().sum().backward()
        only_g = by_hand(g - lr * g.grad, v)
        for name, value in {
            "w": w, "gradient of w": w.grad, "gradient of g": g.grad, "gradient of v": v.grad,
            "w of a plain layer next": w - lr * w.grad, "w next, if only g moves": only_g,
            "v next": v - lr * v.grad, "w next": by_hand(g - lr * g.grad, v - lr * v.grad),
        }.items():  # fmt: skip
            torch.testing.assert_close(torch.tensor(now[name]), value.detach(), atol=1e-3, rtol=1e-3, msg=name)
        assert now["norm next"] >= now["norm"] - 1e-4
        if after is not None:
            assert [now["w next"], now["v next"], now["norm next"]] == [after["w"], after["v"], after["norm"]]


def test_the_stale_model_says_the_old_and_the_line_mends_it(data: dict[str, Any]) -> None:
    stale = data["stale"]
    made, stepped, asked = stale["without"]
    assert made["says"] == made["should"] == asked["says"]
    assert stepped["held"] == made["held"] != stepped["true"]
    assert abs(asked["should"] - asked["says"]) > 0.3
    assert stale["with"][2]["says"] == stale["with"][2]["should"] == asked["should"]
    g, v = torch.tensor(1.5, requires_grad=True), torch.tensor([2.0, 0.4], requires_grad=True)
    (by_hand(g, v).sum() - 3).square().backward()
    true = by_hand(g - 0.15 * g.grad, v - 0.15 * v.grad)
    torch.testing.assert_close(torch.tensor(asked["true"]), true.detach(), atol=2e-4, rtol=0)
    assert "self.wn.recompute(self.fc)" in stale["detected"]
    assert stale["second_backward"] == "Trying to backward through the graph a second time"


def test_the_power_iterations_are_those_of_the_formula_and_arrive(data: dict[str, Any]) -> None:
    for ratio, run in zip(data["power"]["ratios"], data["power"]["runs"], strict=True):
        circle, image = torch.tensor(run["circle"]), torch.tensor(run["image"])
        weight = torch.linalg.lstsq(circle, image).solution.t()
        sigmas = torch.linalg.svdvals(weight)
        torch.testing.assert_close(sigmas[1] / sigmas[0], torch.tensor(ratio), atol=2e-3, rtol=0)
        assert run["sigma"] == pytest.approx(sigmas[0].item(), abs=2e-3)
        u = torch.tensor(run["moments"][0]["u"])
        for now in run["moments"][1:]:
            v = nn.functional.normalize(weight.t() @ u, dim=0)
            u = nn.functional.normalize(weight @ v, dim=0)
            torch.testing.assert_close(torch.tensor([now["u"], now["v"]]), torch.stack([u, v]), atol=1e-2, rtol=0)
            torch.testing.assert_close(torch.tensor(now["normed"]), image / now["sigma"], atol=2e-3, rtol=0)
        assert run["moments"][0]["off"] == pytest.approx(80, abs=0.1)
        assert run["moments"][-1]["off"] < 3


def test_the_runs_are_what_the_caption_says_of_them(data: dict[str, Any]) -> None:
    ends = {run["name"]: run["right"][-1] for run in data["training"]["runs"]}
    soon = {run["name"]: run["right"][5] for run in data["training"]["runs"]}
    assert ends["spectral norm"] < 0.8 < 0.95 < min(ends["plain"], ends["weight norm"], ends["weight norm + init"])
    assert soon["weight norm + init"] > 0.95
    assert abs(soon["plain"] - soon["weight norm"]) < 0.05
    layers = {run["name"]: run["layers"] for run in data["training"]["runs"]}
    assert layers["plain"] == []
    assert [len(layer["g"]) for layer in layers["weight norm"]] == [32, 32, 32, 32, 2]
    for layer in layers["weight norm"]:
        for lengths in layer["‖v‖"]:
            assert len(lengths) == 31
    assert [set(layer) for layer in layers["spectral norm"]] == [{"name", "σ"}] * 5


class Described(HTMLParser):
    """What a page has for those who do not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_every_picture_has_a_caption_and_every_section_a_title(page: str) -> None:
    parser = Described()
    parser.feed(page)
    count = [tag for tag, _ in parser.tags].count
    assert count("section") == count("figure") == count("figcaption") == count("h2") == 6
    sections = [attrs for tag, attrs in parser.tags if tag == "section"]
    ids = {attrs.get("id") for _, attrs in parser.tags}
    assert all(section["aria-labelledby"] in ids for section in sections)
    links = [attrs["href"] for tag, attrs in parser.tags if tag == "a"]
    assert {f"#{section['id']}" for section in sections} <= set(links)
    assert all(attrs.get("role") == "img" for tag, attrs in parser.tags if tag == "svg")


# In a browser

SIZES = {"desktop": (1100, 900), "phone": (360, 740)}
Browser = Any


def why_no_browser() -> str | None:
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed"
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"there is no {' and no '.join(missing)}" if missing else None


in_a_browser = pytest.mark.skipif(why_no_browser() is not None, reason=why_no_browser() or "")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1100,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    browser = webdriver.Chrome(options=options, service=service)
    yield browser
    browser.quit()
    service.stop()


@pytest.fixture
def opened(chromium: Browser) -> Iterator[Callable[..., Browser]]:
    """Opens the page, and finds no error in the end."""

    def open_page(size: str = "desktop", **media: str) -> Browser:
        width, height = SIZES[size]
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        chromium.get(PAGE.as_uri())
        assert chromium.execute_script("return document.documentElement.dataset.ready") == "yes"
        return chromium

    yield open_page
    assert chromium.get_log("browser") == []


def press(browser: Browser, id: str, key: str, times: int = 1) -> None:
    """Presses a key on the element that has the focus, once that is the one with this id."""
    from selenium.webdriver.common.keys import Keys

    element = browser.find_element("id", id)
    browser.execute_script("arguments[0].focus()", element)
    for _ in range(times):
        element.send_keys(getattr(Keys, key))


def click(browser: Browser, css: str) -> None:
    """Clicks on an element, once it stands still in the middle."""
    element = browser.find_element("css selector", css)
    browser.execute_script(INTO_VIEW, element)
    element.click()


INTO_VIEW = "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})"


def arrows(browser: Browser, id: str) -> dict[str, Tensor]:
    """Where the arrows of a drawing end, by what they are said to be and, checked against it, as they are drawn."""
    frame = browser.execute_script("return {...document.getElementById(arguments[0]).dataset}", id)
    found = browser.execute_script(
        "return [...document.querySelectorAll(`#${arguments[0]} [data-arrow]`)].map(one => "
        "[one.dataset.arrow, one.dataset.x, one.dataset.y, one.querySelector('path')?.getAttribute('d')])",
        id,
    )
    tips = {}
    for name, x, y, path in found:
        tips[name] = torch.tensor([float(x), float(y)])
        if path:
            px, py = map(float, path.removeprefix("M").split("L")[0].split())
            unit = 400 / float(frame["size"])
            drawn = torch.tensor([float(frame["x"]) + px / unit, float(frame["y"]) + (400 - py) / unit])
            torch.testing.assert_close(drawn, tips[name], atol=1e-4, rtol=0)
    return tips


def text(browser: Browser, id: str) -> str:
    return browser.find_element("id", id).text.replace("−", "-")


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_opens_on_every_screen_and_nothing_sticks_out(opened: Any, size: str, scheme: str) -> None:
    browser = opened(size, prefers_color_scheme=scheme)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", paper))) / 3
    assert brightness > 200 if scheme == "light" else brightness < 60
    pictures = "return [...document.querySelectorAll('svg:not([aria-hidden]), canvas')].map(one => one.ariaLabel)"
    assert all(browser.execute_script(pictures))
    outside = (
        "return [...document.querySelectorAll('main figure')].flatMap(figure => [...figure.querySelectorAll("
        "'svg, canvas, input, select, button, dl, pre')].filter(one => "
        "one.getBoundingClientRect().right > figure.getBoundingClientRect().right).map(one => one.id))"
    )
    assert browser.execute_script(outside) == []


@in_a_browser
def test_the_keys_move_the_arrows_to_what_the_package_computes(opened: Any) -> None:
    browser, wn = opened(), WeightNorm()
    layer = wn.apply(nn.Linear(2, 1, bias=False))
    for id, key, times in (
        ("apart-angle", "ARROW_RIGHT", 4),
        ("apart-length", "HOME", 1),
        ("apart-length", "END", 1),
        ("apart-g", "ARROW_LEFT", 20),
        ("apart-angle", "END", 1),
    ):
        before = arrows(browser, "apart-w")["w"]
        press(browser, id, key, times)
        v, w = arrows(browser, "apart-v")["v"], arrows(browser, "apart-w")["w"]
        assert torch.equal(before, w) == (id == "apart-length")
        with torch.no_grad():
            layer.weight_v.copy_(v)
            layer.weight_g.fill_(float(text(browser, "apart-g-out")))
        wn.recompute(layer)
        torch.testing.assert_close(w, layer.weight.detach()[0], atol=2e-3, rtol=0)
        told = f"({w[0]:.2f}, {w[1]:.2f})"
        assert text(browser, "apart-values").splitlines()[-1] == told
        if id == "apart-length":
            assert text(browser, "apart-says").endswith("w did not move.")


@in_a_browser
def test_the_tip_of_v_can_be_dragged(opened: Any) -> None:
    from selenium.webdriver import ActionChains

    browser = opened()
    handle = browser.find_element("css selector", "#apart-v .handle")
    browser.execute_script(INTO_VIEW, handle)
    ActionChains(browser).click_and_hold(handle).move_by_offset(-150, 60).move_by_offset(-20, 0).release().perform()
    v, w = arrows(browser, "apart-v")["v"], arrows(browser, "apart-w")["w"]
    assert v[0] < -0.5
    torch.testing.assert_close(w, 1.5 * v / v.norm(), atol=2e-3, rtol=0)
    ActionChains(browser).move_by_offset(90, 0).perform()
    assert torch.equal(arrows(browser, "apart-v")["v"], v), "let go, it stays"


@in_a_browser
def test_the_descent_shows_the_step_that_is_asked_for(opened: Any, data: dict[str, Any]) -> None:
    browser, runs = opened(), data["descent"]["runs"]
    press(browser, "descent-rate", "ARROW_RIGHT", 2)
    press(browser, "descent-step", "ARROW_RIGHT", 1)
    click(browser, "#descent-length input[value='0']")
    now = runs[5][0][1]
    assert {name: tip.tolist() for name, tip in arrows(browser, "descent-w").items()} == {
        name: pytest.approx(now[key], abs=1e-6)
        for name, key in {
            "w": "w", "g": "w next, if only g moves",
            "v": "w of a plain layer next", "plain": "w of a plain layer next",
        }.items()
    }  # fmt: skip
    directions = arrows(browser, "descent-v")
    assert directions["v next"].tolist() == directions["step"].tolist() == pytest.approx(now["v next"], abs=1e-6)
    assert f"{now['norm']:.3f} → {now['norm next']:.3f}" in text(browser, "descent-values")
    for _ in range(11):
        press(browser, "descent-step", "ARROW_RIGHT")
        arrows(browser, "descent-v")
    assert "hardly a pull" in text(browser, "descent-says")


@in_a_browser
def test_the_line_appears_where_it_mends_the_model(opened: Any, data: dict[str, Any]) -> None:
    browser, line = opened(), "self.wn.recompute(self.fc)"
    seen = []
    for _ in range(4):
        seen.append((line in text(browser, "stale-code"), *re.findall(r"\d\.\d+", text(browser, "stale-values"))))
        press(browser, "stale-on", "ENTER")
    old, new = (f"{data['stale']['with'][moment]['says']:.3f}" for moment in (0, 2))
    assert seen == [(False, old, old), (False, new), (False, old, new), (False, old, new)]
    assert line in text(browser, "stale-code")
    assert re.findall(r"\d\.\d+", text(browser, "stale-values")) == [new, new]
    assert not browser.find_element("id", "stale-on").is_enabled()
    press(browser, "stale-back", "ENTER")
    assert text(browser, "stale-message") == data["stale"]["detected"]


@in_a_browser
def test_the_scrubber_moves_all_four_runs(opened: Any, data: dict[str, Any]) -> None:
    browser = opened()
    drawn = "return [...document.querySelectorAll('#training-runs canvas')].map(one => one.toDataURL())"
    before = browser.execute_script(drawn)
    press(browser, "training-step", "END")
    after = browser.execute_script(drawn)
    assert all(one != other for one, other in zip(before, after, strict=True))
    assert len(set(after)) == 4
    told = [one.text for one in browser.find_elements("css selector", "#training-runs p")]
    runs = data["training"]["runs"]
    for words, run in zip(told, runs, strict=True):
        loss, right = map(float, re.findall(r"[\d.]+", words))
        assert (loss, right) == pytest.approx((run["loss"][600], 100 * run["right"][30]), abs=0.6)
        assert words.startswith(f"loss {run['loss'][600]:.3f}")
    for value, titles, curves in (("0", ["g", "‖v‖"], 32), ("2", ["σ"], 1)):
        click(browser, f"#training-run option[value='{value}']")
        boxes = browser.find_elements("css selector", "#training-curves > div")
        assert [box.find_element("css selector", "h3").text for box in boxes] == titles
        assert {len(box.find_elements("css selector", "path.curve")) for box in boxes} == {curves}


@in_a_browser
def test_it_plays_where_motion_is_wanted(opened: Any) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    browser = opened()
    press(browser, "training-play", "ENTER")
    WebDriverWait(browser, 30).until(lambda _: int(text(browser, "training-step-out")) >= 100)
    press(browser, "training-play", "ENTER")
    assert text(browser, "training-play") == "Play"
    assert not opened(prefers_reduced_motion="reduce").find_element("id", "training-play").is_displayed()


@in_a_browser
def test_the_power_iterations_turn_the_arrows(opened: Any) -> None:
    browser = opened()
    click(browser, "#power-ratio input[value='2']")
    start = arrows(browser, "power-out")["u"]
    press(browser, "power-step", "ARROW_RIGHT", 5)
    weight = numbers_of(PAGE.read_text(encoding="utf-8"))["power"]["runs"][2]
    matrix = torch.linalg.lstsq(torch.tensor(weight["circle"]), torch.tensor(weight["image"])).solution.t()
    sn = SpectralNorm(warmup=0)
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(matrix)
    sn.apply(layer)
    layer.weight_u.copy_(start)
    for _ in range(5):
        sn.recompute(layer)
    torch.testing.assert_close(arrows(browser, "power-in")["v"], layer.weight_v, atol=5e-3, rtol=0)
    torch.testing.assert_close(arrows(browser, "power-out")["u"], layer.weight_u, atol=5e-3, rtol=0)


@in_a_browser
def test_the_code_marks_the_norm(opened: Any) -> None:
    browser = opened()
    marked = {
        name: [one.text.strip() for one in browser.find_elements("css selector", f"#everywhere-{name} .marked")]
        for name in ("python", "script", "export")
    }
    assert marked["python"] == ["self.wn.recompute(self.fc)"]
    assert marked["script"][0] == "_0 = (wn).recompute(fc, )"
    assert len(marked["script"]) == 2
    assert ["aten._weight_norm" in line for line in marked["export"]] == [True]


@in_a_browser
@pytest.mark.parametrize("size", SIZES)
def test_the_tab_key_reaches_every_control_and_shows_where_it_is(opened: Any, size: str) -> None:
    from selenium.webdriver.common.keys import Keys

    browser = opened(size)
    wanted = set(
        browser.execute_script(
            "return [...document.querySelectorAll('input[type=range], button:enabled, select')].map(one => one.id)"
        )
    )
    assert len(wanted) == 12
    reached = {}
    for _ in range(40):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        reached |= browser.execute_script(
            "const one = document.activeElement; return {[one.id || one.name]: getComputedStyle(one).outlineStyle}"
        )
    controls = wanted | {"descent-length", "power-ratio"}
    assert {reached.get(control) for control in controls} == {"solid"}
