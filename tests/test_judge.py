"""Judges behind an OpenAI-compatible endpoint: a local server that imitates one looks at the
pictures that it is sent, and answers well, badly, late or not at all."""

import json
import re
import time

import numpy as np
import pytest
from http_stub import Stub, nobody
from judge_stub import MODEL, brighter, completion, gray, load, pictures, serving

from flowgrpo_jax.rewards import judge
from flowgrpo_jax.transport import http_client


def marks(request, body):
    """The mean of the picture / 50 as the mark, unless the caption asks for something else."""
    (image,), text = pictures(body)
    caption = text.rpartition("Caption: ")[2]
    if caption == "slow":
        time.sleep(8)
    return {
        "garbage": (200, b"\xff\xfe not JSON"),
        "list": (200, b"[1, 2]"),
        "no choice": (200, b'{"choices": []}'),
        "null": completion(None),
        "chatter": completion("What a lovely picture!"),
        "too high": completion("Final Score: 17"),
        "below": completion("Final Score: -2"),
        "error": (500, b"CUDA out of memory"),
        "refused": (400, b"the picture is too large"),
    }.get(caption, completion(f"It is bright.\nFinal Score: {image.mean() / 50:.1f}"))


BAD = ["garbage", "list", "no choice", "null", "chatter", "too high", "below", "error", "refused"]


def test_the_score_is_the_mark_over_the_best_mark():
    with Stub(marks) as stub:
        scores, valid = load("unifiedreward", stub)(gray(50, 250, 125), list("abc"), [{}] * 3)
    assert scores.dtype == np.float32 and valid.dtype == bool and valid.all()
    np.testing.assert_allclose(scores, [0.2, 1.0, 0.5], atol=1e-6)


def test_bad_answers_make_their_images_invalid_and_no_others(caplog):
    prompts = ["fine", *BAD, "slow", "fine too"]
    with Stub(marks) as stub:
        reward = load("unifiedreward", stub, timeout=4, retries=0)
        scores, valid = reward(gray(*[100] * len(prompts)), prompts, [{}] * len(prompts))
    good = [prompt.startswith("fine") for prompt in prompts]
    np.testing.assert_array_equal(valid, good)
    np.testing.assert_allclose(scores, np.where(good, 0.4, 0), atol=1e-6)
    assert "10 of 12 questions failed" in caplog.text


def test_a_passing_error_is_tried_again_and_a_lasting_one_only_so_often():
    left = [500, 503]

    def answer(request, body):
        return (left.pop(), b"") if left else marks(request, body)

    with Stub(answer) as stub:
        _, valid = load("unifiedreward", stub, retries=2)(gray(100), ["a"], [{}])
        assert valid.all() and len(stub.seen) == 3
        _, valid = load("unifiedreward", stub, retries=2)(gray(100), ["error"], [{}])
        assert not valid.any() and len(stub.seen) == 6


def test_a_dead_endpoint_costs_a_batch_no_more_than_its_first_questions(monkeypatch, caplog):
    asked, request = [], http_client.request

    def counted(url, *arguments, **options):
        asked.append(url)
        return request(url, *arguments, **options)

    monkeypatch.setattr(http_client, "request", counted)
    reward = load("unifiedreward", nobody(), concurrency=2, rest=60)
    _, valid = reward(gray(*range(50)), ["a"] * 50, [{}] * 50)
    assert not valid.any() and len(asked) <= 2 * 2  # two at a time, each tried twice
    assert re.search("given up a moment ago: .* refused", caplog.text)


def test_the_request_is_what_the_interface_says(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "k3y")
    image = np.random.default_rng(0).integers(0, 256, (1, 6, 6, 3), dtype=np.uint8)
    with Stub(lambda request, body: completion("Final Score: 3")) as stub:
        options = {"key_env": "JUDGE_KEY", "extra": {"seed": 7}}
        load("unifiedreward", stub, side=None, **options)(image, ["a {red} cat"], [{}])
        load("unifiedreward", stub, side=32)(image, ["a cat"], [{}])
    (method, path, headers, body), (_, _, headers2, body2) = stub.seen
    assert (method, path) == ("POST", "/v1/chat/completions")
    assert headers["Authorization"] == "Bearer k3y" and "Authorization" not in headers2
    fields = json.loads(body)
    assert (fields["model"], fields["temperature"], fields["seed"]) == (MODEL, 0, 7)
    (sent,), text = pictures(body)
    np.testing.assert_array_equal(sent, image[0])
    assert text.endswith("a {red} cat") and "{prompt}" not in text
    assert pictures(body2)[0][0].shape == (32, 32, 3)


def test_questions_are_asked_side_by_side_but_not_too_many():
    def answer(request, body):
        time.sleep(0.05)
        return marks(request, body)

    with Stub(answer) as stub:
        load("unifiedreward", stub, concurrency=3)(gray(*range(60, 72)), ["a"] * 12, [{}] * 12)
    assert 1 < stub.most <= 3


def test_answers_are_remembered_by_picture_and_prompt():
    with Stub(marks) as stub:
        reward = load("unifiedreward", stub)
        first = reward(gray(60, 70, 70), ["a", "a", "chatter"], [{}] * 3)
        asked = len(stub.seen)
        again = reward(gray(60, 70, 70), ["a", "a", "chatter"], [{}] * 3)
        assert len(stub.seen) == asked + 1  # only the one without a mark
        reward(gray(60, 71), ["b", "a"], [{}] * 2)
        assert len(stub.seen) == asked + 3
    np.testing.assert_array_equal(first, again)


def test_the_memory_is_bounded():
    with Stub(marks) as stub:
        reward = load("unifiedreward", stub, cache=1, concurrency=1)
        for level in (60, 70, 70, 60):
            reward(gray(level), ["a"], [{}])
        assert len(stub.seen) == 3


def test_a_pattern_that_finds_no_number_costs_its_image_alone():
    with Stub(lambda request, body: completion("eight/10")) as stub:
        options = {"template": "{prompt}?", "pattern": r"(\S+)/10", "low": 0, "high": 10}
        _, valid = load("vlm_judge", stub, **options)(gray(1), ["a"], [{}])
    assert not valid.any()


def test_a_judge_with_a_question_of_ones_own():
    def answer(request, body):
        _, text = pictures(body)
        assert text == 'Is {"this"} a cat? Say beauty=N, 0 to 10.'
        return completion("beauty=8")

    template = 'Is {"this"} {prompt}? Say beauty=N, 0 to 10.'
    with Stub(answer) as stub:
        options = {"template": template, "pattern": r"beauty=(\d+)", "low": 0, "high": 10}
        scores, valid = load("vlm_judge", stub, **options)(gray(1), ["a cat"], [{}])
    assert valid.all() and scores[0] == pytest.approx(0.8)


@pytest.mark.parametrize(
    "options, words",
    [({"pattern": "score"}, "one group"), ({"low": 5}, "low=5"), ({"concurrency": 0}, "conc")],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        judge.unifiedreward(**options)


@pytest.mark.parametrize(
    "reason, words",
    [
        ("length", r"cut off \(finish_reason 'length'; {'max_tokens': 512}\): raise max_tokens"),
        ("content_filter", "finish_reason is 'content_filter'"),
        ("tool_calls", "finish_reason is 'tool_calls'"),
        ("abort", "finish_reason is 'abort'"),
    ],
)
def test_an_answer_that_is_not_whole_is_none(reason, words, caplog):
    text = "Final Score: 4 <answer>Image 1 is better</answer>"
    with Stub(lambda request, body: completion(text, finish_reason=reason)) as stub:
        for name in ("unifiedreward", "preference"):
            _, valid = load(name, stub)(gray(1, 2), ["a"] * 2, [{}] * 2)
            assert not valid.any()
            assert re.search(words, caplog.text)
            caplog.clear()


@pytest.mark.parametrize("reason", [None, "stop", "eos_token"])
def test_an_answer_that_is_whole_counts(reason):
    with Stub(lambda request, body: completion("Final Score: 4", finish_reason=reason)) as stub:
        scores, valid = load("unifiedreward", stub)(gray(1), ["a"], [{}])
    assert valid.all() and scores[0] == pytest.approx(0.8)


def test_the_warning_names_the_most_frequent_cause(caplog):
    def answer(request, body):
        _, text = pictures(body)
        return completion("?") if text.endswith("odd") else completion(None, finish_reason="length")

    with Stub(answer) as stub:
        load("unifiedreward", stub)(gray(1, 2, 3), ["odd", "a", "a"], [{}] * 3)
    assert "3 of 3 questions failed, 2 of them so: the answer was cut off" in caplog.text


@pytest.mark.parametrize(
    "options, sent",
    [
        ({}, {"max_tokens": 512, "temperature": 0.0}),
        ({"max_tokens": None, "temperature": None}, {}),
        (
            {"max_tokens": None, "extra": {"max_completion_tokens": 9, "temperature": 1}},
            {"max_completion_tokens": 9, "temperature": 1},
        ),
    ],
)
def test_the_fields_of_a_request_are_those_that_the_recipe_leaves(options, sent):
    with Stub(lambda request, body: completion("Final Score: 3")) as stub:
        load("unifiedreward", stub, **options)(gray(1), ["a"], [{}])
        fields = json.loads(stub.seen[0][3])
    assert {k: v for k, v in fields.items() if k not in ("model", "messages")} == sent


@pytest.mark.parametrize("name, shown", [("unifiedreward", 1), ("preference", 2)])
def test_ready_asks_a_question(name, shown, monkeypatch, caplog):
    monkeypatch.setattr(http_client, "PATIENCE", 0.0)

    def strict(request, body):
        if "max_tokens" in json.loads(body):
            return 400, b"Unsupported parameter: 'max_tokens'"
        return marks(request, body) if shown == 1 else brighter(request, body)

    with Stub(serving(strict)) as stub:
        with pytest.raises(RuntimeError, match=r"'max_tokens'.* left out with max_tokens=None"):
            load(name, stub).ready()
        load(name, stub, max_tokens=None).ready()
        images, text = pictures(stub.seen[-1][3])
        assert len(images) == shown and "Text Caption: a grey square" in text
        assert not caplog.text.count("not clear")
        stub.answer = serving(lambda request, body: completion("no", finish_reason="length"))
        with pytest.raises(RuntimeError, match="raise max_tokens"):
            load(name, stub).ready()
        stub.answer = serving(lambda request, body: (200, b"{}"))
        with pytest.raises(RuntimeError, match="no chat completion"):
            load(name, stub).ready()
        stub.answer = serving(lambda request, body: completion("I cannot say."))
        load(name, stub).ready()  # another picture may get a better answer
        assert "the answer to a first question is not clear" in caplog.text


@pytest.mark.parametrize("name", ["unifiedreward", "preference"])
def test_ready_wants_a_server_that_has_the_model(name):
    answer = "Final Score: 4 <answer>Tie</answer>"
    with Stub(serving(lambda request, body: completion(answer))) as stub:
        load(name, stub).ready()
        assert stub.seen[0][:2] == ("GET", "/v1/models")
        with pytest.raises(RuntimeError, match=r"serves \['other', 'a-judge'\], not model='mine'"):
            load(name, stub, model="mine").ready()
        stub.answer = lambda request, body: (401, b"wrong key")
        with pytest.raises(RuntimeError, match="wrong key"):
            load(name, stub).ready()
        stub.answer = lambda request, body: (200, b"<html>")
        with pytest.raises(RuntimeError, match="not what OpenAI's interface says"):
            load(name, stub).ready()
    with pytest.raises(RuntimeError, match="no server is ready"):
        load(name, nobody()).ready()
