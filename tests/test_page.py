"""The chat page in a real browser, on the shipped model and a run of three steps.

Screenshots go to the folder in SCREENSHOTS, or to pytest's temporary one.
"""

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.conftest import ROOT, TINY

webdriver = pytest.importorskip("selenium.webdriver", reason="pip install -r requirements-dev.txt")
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no browser: apt-get install chromium chromium-driver"
)
SWITCHES = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--window-size=1280,1000"),
)
SECONDS = 60  # until something must have happened on the page: the machine may be busy
GONE = (NoSuchElementException, StaleElementReferenceException, IndexError)


class Browser:
    """A browser with a profile of its own, and the words for what a person does in it."""

    def __init__(self, profile, address):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for switch in (*SWITCHES, f"--user-data-dir={profile}"):
            options.add_argument(switch)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        self.address = address
        self.load()

    def load(self):
        self.driver.get(self.address)
        self.until(lambda: "You are talking to" in self.text("#header"))

    def until(self, condition):
        """Wait until `condition()` is true; the last value of it."""
        end = time.monotonic() + SECONDS
        while True:
            try:
                value = condition()
            except GONE:
                value = None
            if value:
                return value
            assert time.monotonic() < end, f"this did not come true: {condition.__code__.co_consts}"
            time.sleep(0.05)

    def find(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.find(selector).text

    def texts(self, selector):
        return [element.text for element in self.all(selector)]

    def click(self, selector):
        element = self.find(selector)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        time.sleep(0.2)
        for message in self.all("button.toast-close"):  # it may lie on top of what is clicked
            self.driver.execute_script("arguments[0].click()", message)
        element.click()

    def tab(self, name):
        self.until(lambda: [one for one in self.all("button[role=tab]") if one.text == name])[0].click()

    def fill(self, selector, text, *, enter=False):
        field = self.find(selector)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys((text or Keys.DELETE) + (Keys.ENTER if enter else Keys.TAB))

    def choose(self, name, option):
        """Pick an option of a dropdown by its text."""
        self.click(f"#{name} input")
        found = lambda: [one for one in self.all("ul[role=listbox] li") if one.text.strip("✓ \n") == option]  # noqa: E731
        self.until(found)[0].click()

    def open_section(self, name):
        """Unfold an accordion."""
        self.click(f"#{name} button.label-wrap")
        time.sleep(0.5)

    def ask(self, question):
        """Send a question and wait for the whole answer; returns the text of the chat."""
        before = len(self.all("#chat .bot.message"))
        self.fill("#question textarea", question, enter=True)
        self.until(lambda: len(self.all("#chat .bot.message")) > before and "tokens/s" in self.last_answer())
        return self.text("#chat")

    def clear(self):
        """Start a new conversation, and wait until the old one is gone."""
        self.click("#clear")
        self.until(lambda: not self.all("#chat .bot.message, #chat .user.message"))

    def last_answer(self):
        return self.all("#chat .bot.message")[-1].text

    def requests(self):
        """Addresses that the page has asked for since the last call."""
        messages = [json.loads(line["message"])["message"] for line in self.driver.get_log("performance")]
        sent = [one["params"] for one in messages if one["method"] == "Network.requestWillBeSent"]
        return [one["request"]["url"] for one in sent if one["documentURL"].startswith(self.address)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def place(demo_run, tmp_path_factory):
    """A folder with two runs, an evaluation, and a damaged file of settings."""
    folder = tmp_path_factory.mktemp("page")
    for name, seed in (("second", 2), ("demo", 1)):
        settings = shutil.copytree(demo_run, folder / "runs" / name, symlinks=True) / "settings.json"
        settings.write_text(settings.read_text().replace('"SEED": 1', f'"SEED": {seed}'))
        time.sleep(0.01)
        (folder / "runs" / name / "metrics.jsonl").touch()
    shutil.copytree(demo_run / "evaluation" / "after", folder / "evaluations" / "mine")
    (folder / "chat.json").write_text('{"settings": {"temperature": "hot')
    return folder


@pytest.fixture(scope="module")
def server(place):
    """The address of a running page."""
    port = free_port()
    words = ["--runs", place / "runs", "--evaluations", place / "evaluations", "--port", port]
    words += ["--settings-file", place / "chat.json", "--refresh-seconds", 0.5, "--page-rows", 10]
    log = open(place / "log", "w")
    process = subprocess.Popen(
        [sys.executable, "chat_gui.py", *map(str, words)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
    )
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert process.poll() is None, (place / "log").read_text()
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}/"
    process.terminate()
    process.wait()
    log.close()
    assert "Traceback" not in (place / "log").read_text(), (place / "log").read_text()


@pytest.fixture(scope="module")
def one(server, tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"), server)
    yield browser
    browser.driver.quit()


@pytest.fixture(scope="module")
def keep(one, tmp_path_factory):
    """Keep a screenshot under a name."""
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return lambda name: one.driver.save_screenshot(str(folder / f"{name}.png"))


def test_the_first_screen_says_who_is_there(one, keep):
    assert "You are talking to demo · best, a checkpoint trained from tiny-qwen3" in one.text("#header")
    one.until(lambda: "What is 603 + 74?" in one.text("#chat"))
    assert one.until(lambda: one.find("#run input").get_attribute("value")) == "demo"
    assert one.find("#checkpoint input").get_attribute("value") == "best"
    assert one.find("#max_tokens input").get_attribute("value") == "64", (
        "as in the checkpoint's sampling.json"
    )
    one.until(lambda: "damaged and were ignored" in one.text("body"))
    keep("first")


def test_clear_retry_and_undo(one, keep):
    one.fill("#temperature input[type=number]", "1")
    one.ask("What is 12 + 30?")
    keep("chat")
    answers = {one.last_answer().splitlines()[0]}
    for _ in range(6):  # another answer may happen to be the same
        one.click("#retry")
        time.sleep(1)
        one.until(lambda: "tokens/s" in one.last_answer())
        answers.add(one.last_answer().splitlines()[0])
    assert len(answers) > 1
    assert len(one.all("#chat .user.message")) == 1
    one.click("#undo")
    one.until(lambda: not one.all("#chat .user.message"))
    assert one.find("#question textarea").get_attribute("value") == "What is 12 + 30?"


@pytest.fixture(scope="module")
def endless(place):
    """The shipped model without an end token: it talks until it is stopped."""
    folder = shutil.copytree(TINY, place / "endless")
    for name, changes in (
        ("generation_config.json", {"eos_token_id": 1023}),  # an id that the tokenizer does not have
        ("tokenizer_config.json", {"eos_token": None}),
    ):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | changes))
    return folder


def test_an_answer_is_streamed_and_can_be_stopped(one, endless):
    one.clear()
    one.open_section("another")
    one.fill("#other textarea, #other input", str(endless))
    one.click("#open_other")
    one.until(lambda: "talking to endless" in one.text("#header"))
    one.fill("#max_tokens input", "900")
    one.fill("#question textarea", "Compute 38 + 30.", enter=True)
    lengths = []
    while len(set(lengths)) < 4:
        lengths.append(one.until(lambda: len(one.last_answer())))
    assert lengths == sorted(lengths), "it grows"
    one.click("#stop")
    one.until(lambda: "stopped by you" in one.last_answer())
    assert "tokens/s" in one.last_answer()
    one.fill("#question textarea", "And 2 + 2?", enter=True)
    one.until(lambda: len(one.all("#chat .bot.message")) == 2 and len(one.last_answer()) > 9)
    one.click("#undo")  # while it streams: nothing of it comes after
    one.until(lambda: one.find("#question textarea").get_attribute("value") == "And 2 + 2?")
    time.sleep(1)
    assert [len(one.all(f"#chat .{who}.message")) for who in ("user", "bot")] == [1, 1]
    one.click("#send")
    one.until(lambda: len(one.all("#chat .bot.message")) == 2 and len(one.last_answer()) > 9)
    one.clear()
    time.sleep(1)
    assert not one.all("#chat .message")


def test_another_checkpoint_and_the_base(one):
    one.choose("checkpoint", "step_000001")
    one.until(lambda: "demo · step_000001, a checkpoint" in one.text("#header"))
    one.choose("checkpoint", "base (before training)")
    one.until(lambda: "tiny-qwen3, a model as it is" in one.text("#header"))
    one.choose("run", "second")
    one.until(lambda: "second · best" in one.text("#header"))
    one.choose("run", "demo")
    one.until(lambda: "demo · best" in one.text("#header"))


def test_mistakes_are_messages_and_the_page_goes_on(one, place):
    broken = place / "broken"
    shutil.copytree(place / "runs" / "demo" / "checkpoints" / "step_000001", broken)
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    other = shutil.copytree(place / "runs" / "demo" / "checkpoints" / "step_000001", place / "other")
    weights = safetensors.torch.load_file(other / "adapter_model.safetensors")
    weights = {name: torch.zeros(16, 24) for name in weights}
    safetensors.torch.save_file(weights, other / "adapter_model.safetensors")
    for path, message in (
        ("nowhere/at/all", "model not found"),
        (str(broken), "is damaged"),
        (str(other), "belongs to another base"),
        (str(ROOT / "data"), "is no model, adapter or run folder"),
    ):
        one.fill("#other textarea, #other input", path)
        one.click("#open_other")
        one.until(lambda message=message: message in one.text("body"))
    assert "demo · best" in one.text("#header"), "the old one stays"
    one.fill("#other textarea, #other input", str(TINY))
    one.click("#open_other")
    one.until(lambda: "tiny-qwen3, a model as it is" in one.text("#header"))
    one.ask("Compute 1 + 1.")


def test_system_prompts_are_saved_chosen_and_removed(one, place):
    saved = lambda: json.loads((place / "chat.json").read_text())["system_prompts"]  # noqa: E731
    system = lambda: one.find("#system textarea").get_attribute("value")  # noqa: E731
    one.open_section("system_prompt")
    one.fill("#system textarea", "Answer like a pirate.")
    one.click("#keep_prompt")
    one.until(lambda: saved() == ["Answer like a pirate."])
    one.choose("saved_prompts", "Please reason step by step.")
    one.until(lambda: system() == "Please reason step by step.")
    one.choose("saved_prompts", "Answer like a pirate.")
    one.until(lambda: system() == "Answer like a pirate.")
    one.clear()
    one.ask("Compute 1 + 1.")
    one.open_section("word_for_word")
    one.until(lambda: "Answer like a pirate." in one.find("#given textarea").get_attribute("value"))
    one.click("#forget_prompt")
    one.until(lambda: saved() == [])
    one.fill("#system textarea", "")


def test_a_conversation_is_saved_and_loaded(one, tmp_path):
    one.clear()
    one.ask("What is 5 + 6?")
    one.open_section("files")
    one.click("#save")
    files = lambda: one.text("#files").replace("\n", "")  # noqa: E731
    one.until(lambda: "conversation.json" in files() and "conversation.md" in files())
    saved = {
        "system": "Be brief.",
        "messages": [
            {"role": "user", "content": "What is $\\frac{6}{2}$?"},
            {"role": "assistant", "content": "<think>half of six</think>It is <answer>3</answer>, $3^1$."},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "I counted</think>Quite.", "opened": True},
        ],
    }
    (tmp_path / "mine.json").write_text(json.dumps(saved))
    one.find("#files input[type=file]").send_keys(str(tmp_path / "mine.json"))
    one.until(lambda: "It is <answer>3</answer>" in one.text("#chat"))
    assert one.all("#chat .katex"), "formulas are rendered"
    assert "half of six" not in one.text("#chat"), "the thinking is folded away"
    assert "I counted" not in one.text("#chat"), "that which the template opened, too"
    assert "Quite." in one.text("#chat")
    assert "Thinking" in one.text("#chat")
    assert "answer: 3" in one.text("#chat")
    (tmp_path / "bad.json").write_text("{}")
    one.find("#files input[type=file]").send_keys(str(tmp_path / "bad.json"))
    one.until(lambda: "holds no conversation" in one.text("body"))
    one.clear()


def test_compare_base_and_checkpoint(one, keep):
    one.choose("checkpoint", "best")
    one.until(lambda: "demo · best" in one.text("#header"))
    one.tab("Compare")
    one.click("#compare")
    one.until(lambda: "of 4 right" in one.text("#share_left") and "of 4 right" in one.text("#share_right"))
    assert one.text("#share_left").startswith("tiny-qwen3: ")
    assert one.text("#share_right").startswith("demo · best: ")
    assert len(one.all("#answers_left .bot.message")) == 4
    assert one.text("#answers_left") != one.text("#answers_right")
    keep("compare")
    one.tab("Talk")


def test_curves_follow_a_run_in_progress_and_are_overlaid(one, place, keep):
    one.tab("Run")
    one.until(lambda: "demo: step 3 of 3, finished" in one.text("#run_headline"))
    one.until(
        lambda: len([plot for plot in one.all("#plots canvas, #plots svg.marks") if plot.is_displayed()]) >= 6
    )
    keep("run")
    path = place / "runs" / "demo" / "metrics.jsonl"
    line = json.loads(path.read_text().splitlines()[-1]) | {"step": 4}
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n" + '{"step": 5, "rew')
    one.until(lambda: "demo: step 4" in one.text("#run_headline"))
    one.choose("runs", "second")
    one.until(lambda: "second: step 3" in one.text("#run_headline"))
    one.find("body").send_keys(Keys.ESCAPE)
    one.open_section("settings_section")
    one.until(lambda: "LEARNING_RATE" in one.text("#settings_table"))


def test_settings_that_differ_and_smoothing(one):
    one.choose("differ_from", "second")
    cells = lambda: [text for text in one.texts("#settings_table [role=gridcell]") if text.strip()]  # noqa: E731
    one.until(lambda: cells() == ["SEED", "1", "2"])
    curve = lambda: one.find("#plots canvas, #plots svg.marks").screenshot_as_base64  # noqa: E731
    before = one.until(lambda: (first := curve()) and (time.sleep(1), first == curve())[1] and first)
    one.fill("#smoothing input[type=number]", "0")
    one.until(lambda: curve() != before)
    one.click("#smoothing input[type=range]")  # its middle
    one.until(lambda: 0.3 < float(one.find("#smoothing input[type=number]").get_attribute("value")) < 0.7)


def test_samples_are_filtered_sorted_and_opened(one, keep):
    one.tab("Samples")
    one.until(lambda: "1 to 10 of 18" in one.text("#samples_count"))
    one.click("#samples_next")
    one.until(lambda: "11 to 18 of 18" in one.text("#samples_count"))
    one.choose("samples_step", "all steps")
    one.until(lambda: "of 54" in one.text("#samples_count"))
    one.choose("samples_tier", "easy")
    one.until(lambda: "of 18" in one.text("#samples_count"))
    one.choose("samples_right", "wrong")
    one.until(lambda: "0% right" in one.text("#samples_count"))
    assert not [text for text in one.texts("#samples_table [role=gridcell]") if text == "✓"]
    one.choose("samples_right", "right and wrong")
    one.choose("samples_sort", "reward")
    one.until(lambda: "of 18" in one.text("#samples_count"))
    cells = one.until(
        lambda: [cell for cell in one.all("#samples_table [role=gridcell]") if cell.text == "easy"]
    )
    cells[0].click()
    one.until(lambda: "gold answer" in one.text("#sample_facts"))
    assert "Problem:" in one.find("#sample_prompt textarea").get_attribute("value")
    for word in ("verdict", "extracted answer", "tokens", "correctness", "advantage", "train-easy"):
        assert word in one.text("#sample_facts")
    keep("samples")
    one.choose("samples_source", "evaluation mine")
    one.until(lambda: "1 to 10 of 10" in one.text("#samples_count"))


def test_two_browsers_do_not_mix_and_settings_are_remembered(one, server, place, tmp_path):
    one.tab("Chat")
    one.clear()
    one.fill("#max_tokens input", "47")
    one.ask("What is 8 + 1?")
    one.until(lambda: json.loads((place / "chat.json").read_text())["settings"]["max_new_tokens"] == 47)
    one.click("#reset")
    one.until(lambda: one.find("#max_tokens input").get_attribute("value") == "64")
    one.fill("#max_tokens input", "47")
    one.until(lambda: json.loads((place / "chat.json").read_text())["settings"]["max_new_tokens"] == 47)
    two = Browser(tmp_path / "profile", server)
    try:
        assert two.until(lambda: two.find("#max_tokens input").get_attribute("value")) == "47"
        two.fill("#question textarea", "What is 2 + 2?", enter=True)
        one.fill("#question textarea", "What is 9 + 9?", enter=True)
        two.until(lambda: "tokens/s" in two.last_answer())
        one.until(lambda: len(one.all("#chat .bot.message")) == 2 and "tokens/s" in one.last_answer())
        assert [text.strip() for text in two.texts("#chat .user.message")] == ["What is 2 + 2?"]
        assert [text.strip() for text in one.texts("#chat .user.message")] == [
            "What is 8 + 1?",
            "What is 9 + 9?",
        ]
    finally:
        two.driver.quit()


def test_nothing_is_asked_of_another_machine(one, server):
    addresses = one.requests()
    assert len(addresses) > 50
    assert not [one for one in addresses if not one.startswith((server, "data:", "blob:"))]


@pytest.mark.parametrize("path", ["/etc/passwd", ROOT / "README.md", ROOT / "lib" / "chat.py"])
def test_files_cannot_be_fetched(server, path):
    port = int(server.rstrip("/").rpartition(":")[2])
    for address in (f"/gradio_api/file={path}", f"/file={path}", f"/gradio_api/file=../../../..{path}"):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
        connection.request("GET", address)
        assert connection.getresponse().status in (403, 404)
        connection.close()
