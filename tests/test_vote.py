"""The live page and the vote: what is served, to whom, and that a vote becomes a reward."""

import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request

import chromium
import numpy as np
import pytest
from etils import epath

from flowgrpo_jax import rewards
from flowgrpo_jax.report import page, pictures, run_data, votes

uvicorn = pytest.importorskip("uvicorn")
from flowgrpo_jax.report import server  # noqa: E402

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
PROMPTS, RECORDS = ["a cat"] * 4, [{}] * 4


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path) / "votes"


class Client:
    """Asks a server of this machine. Returns the status and the text of an answer."""

    def __init__(self, port):
        self.port = port

    def get(self, path, **headers):
        return self.ask(urllib.request.Request(self.at(path), headers=headers))

    def post(self, path, body, kind="application/json"):
        body = json.dumps(body).encode()
        return self.ask(urllib.request.Request(self.at(path), body, {"content-type": kind}))

    def at(self, path):
        return f"http://127.0.0.1:{self.port}/{path}"

    def ask(self, request):
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@pytest.fixture
def client(half, folder):
    app = server.app([epath.Path(half)], folder, ("127.0.0.1", "localhost"))
    running = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        place.listen()
        thread = threading.Thread(target=running.run, kwargs={"sockets": [place]}, daemon=True)
        thread.start()
        yield Client(place.getsockname()[1])
        running.should_exit = True
        thread.join(20)


def reward(folder, seconds):
    (made,) = rewards.load(["vote"], {"vote": {"folder": str(folder), "seconds": seconds}}).values()
    made.ready()
    made.pause = 0.01
    return made


def test_a_vote_is_a_reward_and_is_not_asked_again(client, folder):
    given = []
    waits = threading.Thread(
        target=lambda: given.append(reward(folder, 30.0)(IMAGES, PROMPTS, RECORDS))
    )
    waits.start()
    deadline = time.monotonic() + 20
    while not (asked := json.loads(client.get("votes")[1])) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [p["prompt"] for p in asked["pictures"]] == PROMPTS
    place = f"votes/{asked['name']}"
    assert client.post(place, {"chosen": [4]})[0] == 400
    assert client.post(place, {"chosen": [2, 0]})[0] == 200
    waits.join(20)
    scores, valid = given[0]
    assert scores.tolist() == [1, 0, 1, 0] and valid.all()
    assert client.get("votes")[1] == "{}"
    again, _ = reward(folder, 0.01)(IMAGES, PROMPTS, RECORDS)  # without a human
    assert again.tolist() == scores.tolist()


def test_a_vote_that_does_not_come_is_invalid_and_stays_so(folder):
    _, valid = reward(folder, 0.05)(IMAGES, PROMPTS, RECORDS)
    assert not valid.any() and votes.waiting(folder) == []
    assert not reward(folder, 60.0)(IMAGES, PROMPTS, RECORDS)[1].any()  # at once
    assert votes.given(folder, next(f.name for f in folder.glob("*.webp"))[:16]) is None


def test_a_picture_that_is_not_shown_is_invalid(folder):
    """A sheet has room for so many of a group."""
    shown, n = pictures.MOST, pictures.MOST + 2
    group = np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), np.uint8), ["a"] * n, [{}] * n
    reward(folder, 0.01)(*group)
    votes.give(folder, next(folder.glob("*.webp")).stem, [1, shown - 1])
    scores, valid = reward(folder, 0.01)(*group)
    assert np.flatnonzero(scores).tolist() == [1, shown - 1]
    assert valid.tolist() == [True] * shown + [False] * 2


def test_the_oldest_group_comes_first(folder):
    made = [reward(folder, 0.01) for _ in range(2)]
    for i, one in enumerate(made):
        one(IMAGES + i, PROMPTS, RECORDS)
        time.sleep(0.01)
    for answer in folder.glob(f"*{votes.ANSWER}"):
        answer.unlink()
    first, second = votes.waiting(folder)
    asked = [votes.files.read_object(folder / f"{name}.json")["asked"] for name in (first, second)]
    assert asked == sorted(asked)


def test_the_page_is_served_live(client, half):
    status, text = client.get("")
    assert status == 200 and '"live": true' in text and "askForVote" in text
    assert "askForVote" not in (half / "report.html").read_text()
    assert client.get("version") == client.get("version") != (200, "")


def test_a_run_that_has_not_begun_is_waited_for(tmp_path):
    place = epath.Path(tmp_path)
    assert server.version([place]) == ""
    (place / "metrics.jsonl").write_text("")
    assert server.version([place]) != ""
    run = run_data.read(place)
    assert run["series"] == {"epoch": [], "hours": []} and run["judged"] is None


def test_a_port_that_is_taken_is_named():
    with server.listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"--port={port}: nothing can be served .*another"):
            server.listening("127.0.0.1", port)


@pytest.mark.skipif(not chromium.PROGRAM, reason="Debian's package chromium is not installed")
def test_a_page_that_reloads_itself_shows_what_was_chosen(half, tmp_path):
    """The axis and the evaluation at which a reader looks."""
    live = page.html([run_data.read(epath.Path(half))], live=True)
    code = """
        CHOSEN[0].value = "hours"; CHOSEN[1].value = 0; keepView();
        CHOSEN[0].value = "epochs"; CHOSEN[1].value = 1; restoreView();
        document.title = JSON.stringify([CHOSEN[0].value, CHOSEN[1].value, find("at")]);
    """.replace("find(", "((id) => document.getElementById(id).textContent)(")
    probe = tmp_path / "probe.html"
    probe.write_text(live.replace("</body>", f"<script>{code}</script></body>"))
    title = re.search(r"<title>(.*?)</title>", chromium.call(probe.as_uri(), "--dump-dom"))[1]
    axis, place, at = json.loads(title)
    assert (axis, place) == ("hours", "0") and at.startswith("epoch 0")


def test_pages_from_elsewhere_can_neither_read_nor_vote(client, folder):
    assert client.get("", host="evil.example")[0] == 400
    assert client.post(f"votes/{'0' * 16}", {"chosen": []}, kind="text/plain")[0] == 415
    for name in ("0" * 16, "..%2Fmetrics", "metrics"):
        assert client.post(f"votes/{name}", {"chosen": []})[0] in (400, 404)
    assert not folder.exists()


@pytest.mark.skipif(not chromium.PROGRAM, reason="Debian's package chromium is not installed")
def test_the_served_page_asks_for_a_vote(client, folder):
    reward(folder, 0.01)(IMAGES, PROMPTS, RECORDS)
    next(folder.glob(f"*{votes.ANSWER}")).unlink()  # it waits again
    drawn = chromium.call(client.at(""), "--dump-dom")
    assert "Choose the pictures that show “a cat” best." in drawn
    assert drawn.count('aria-pressed="false"') == 4


def test_an_option_that_makes_no_sense_is_an_error():
    with pytest.raises(ValueError, match=r"vote.seconds=0: must be above 0"):
        rewards.load(["vote"], {"vote": {"seconds": 0}})
