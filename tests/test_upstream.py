"""Upstream's pickle servers: a local server that speaks their protocol with the real pickle, and
answers that are hostile."""

import io
import os
import pickle
import struct

import numpy as np
import pytest
from http_stub import Stub, nobody
from PIL import Image

from flowgrpo_jax import rewards
from flowgrpo_jax.rewards import upstream

MARK = "/tmp/an-answer-was-run"


def gray(*levels):
    return np.stack([np.full((16, 16, 3), level, np.uint8) for level in levels])


def load(name, stub, **options):
    url = stub if isinstance(stub, str) else stub.url
    return rewards.load([name], {name: {"urls": url, "retries": 0, **options}})[name]


def brightness(body):
    """The means of a request's pictures, which must be JPEG."""
    images = [Image.open(io.BytesIO(data), formats=["JPEG"]) for data in body["images"]]
    assert len(images) <= 64
    return [float(np.asarray(image).mean()) for image in images]


def answering(fields):
    """A server whose answer is the pickle of fields(request)."""

    def answer(request, body):
        assert request.command == "POST" and request.path == "/"
        return 200, pickle.dumps(fields(pickle.loads(body)))

    return Stub(answer)


# -------------------------------------------------------------------------------- the protocol


def geneval(body):
    means = brightness(body)
    assert len(body["meta_datas"]) == len(means)
    strict = [float(record["tag"] == "colors") for record in body["meta_datas"]]
    rewards = [-1.0 if body["only_strict"] else 0.5] * len(means)
    groups = {"colors": np.array([1.0, -10.0])}
    return {"scores": means, "rewards": rewards, "strict_rewards": strict, "group_rewards": groups}


def test_geneval():
    images = gray(*range(100, 170))
    records = [{"tag": "colors" if i < 50 else "counting", "include": []} for i in range(70)]
    with answering(geneval) as stub:
        for field, expected in {
            "scores": np.arange(100, 170),
            "strict_rewards": np.arange(70) < 50,
            "rewards": np.full(70, 0.5),
        }.items():
            reward = load("geneval_upstream", stub, field=field)
            scores, valid = reward(images, [""] * 70, records)
            assert valid.all() and scores.dtype == np.float32
            np.testing.assert_allclose(scores, expected, atol=0.6)  # JPEG is not exact
        assert len(stub.seen) == 6  # 64 images a request


@pytest.mark.parametrize(
    "kind",
    [
        list,
        tuple,
        np.array,
        lambda x: np.array(x, np.float32),
        lambda x: np.array(x, ">f2"),
        lambda x: [np.float32(v) for v in x],
        lambda x: [np.float64(v) for v in x],
        lambda x: np.array(x, np.int64),
        lambda x: [int(v) for v in x],
        lambda x: np.asfortranarray(x),
    ],
)
def test_deqa_and_every_kind_of_number(kind):
    numbers = lambda body: {"outputs": kind([round(m / 50) for m in brightness(body)])}  # noqa: E731
    with answering(numbers) as stub:
        scores, valid = load("deqa_upstream", stub)(gray(50, 250, 100), [""] * 3, [{}] * 3)
    assert valid.all()
    np.testing.assert_allclose(scores, [0.2, 1.0, 0.4], rtol=1e-6)


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("core", ["core", "_core"])
def test_arrays_of_old_and_new_numpy(protocol, core):
    values = {"a": np.arange(3.0), "b": np.int16(7), "c": np.array([[True], [False]])}
    data = pickle.dumps(values, protocol)
    if protocol == 3:  # names are lines there, so that they can be exchanged
        data = data.replace(b"numpy._core.", f"numpy.{core}.".encode())
    read = upstream.loads(data)
    np.testing.assert_array_equal(upstream.numbers(read["a"], 3), [0, 1, 2])
    np.testing.assert_array_equal(upstream.numbers([read["b"], 2], 2), [7, 2])
    np.testing.assert_array_equal(read["c"].values, [[True], [False]])


def test_one_number_that_is_none_is_invalid_alone():
    outputs = lambda body: {"outputs": [1.0, float("nan"), 5.0]}  # noqa: E731
    with answering(outputs) as stub:
        scores, valid = load("deqa_upstream", stub)(gray(1, 2, 3), [""] * 3, [{}] * 3)
    np.testing.assert_array_equal(valid, [True, False, True])
    np.testing.assert_allclose(scores, [0.2, 0, 1])


def test_errors_are_retried_and_then_their_images_are_invalid(caplog):
    with Stub(lambda request, body: (500, b"Traceback: CUDA out of memory")) as stub:
        reward = load("deqa_upstream", stub, retries=2, backoff=0)
        _, valid = reward(gray(1, 2), ["", ""], [{}, {}])
        assert not valid.any() and len(stub.seen) == 3 and "CUDA out of memory" in caplog.text


def test_ready_is_any_answer():
    with Stub(lambda request, body: (405, b"")) as stub:
        load("geneval_upstream", stub).ready()
    with pytest.raises(RuntimeError, match="no server is ready"):
        load("geneval_upstream", nobody()).ready()


def test_records_that_geneval_cannot_read_are_judged_when_loading():
    check = load("geneval_upstream", "http://a").check
    check({"prompt": "a cat", "tag": "single_object", "include": [{"class": "cat", "count": 1}]})
    with pytest.raises(ValueError, match="they need `tag`"):
        check({"prompt": "a cat"})
    load("deqa_upstream", "http://a").check({"prompt": "a cat"})


def test_an_unknown_field_is_an_error():
    with pytest.raises(ValueError, match=r"field='group_rewards'.*scores, rewards"):
        load("geneval_upstream", "http://a", field="group_rewards")


# ----------------------------------------------------------------------------- hostile answers


class Run:
    """Its pickle calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Plain:
    """An object of a class of ours."""


def name(module, attribute):
    """The opcode that looks a name up."""
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def short(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


DTYPE = name("numpy", "dtype") + b"(" + short("f8") + b"K\x00K\x01tR"
POINTERS = name("numpy", "dtype") + b"(" + short("O8") + b"K\x00K\x01tR"
RECONSTRUCT = name("numpy.core.multiarray", "_reconstruct")
HOSTILE = {
    "system": pickle.dumps({"outputs": Run(os.system, f"touch {MARK}")}),
    "eval": pickle.dumps({"outputs": [Run(eval, f"open({MARK!r}, 'w')")]}),
    "getattr": pickle.dumps(Run(getattr, "text", "__class__")),
    "os.mkdir, protocol 0": pickle.dumps(Run(os.mkdir, MARK), 0),
    "inside an object array": pickle.dumps({"outputs": np.array([Run(os.mkdir, MARK)], object)}),
    "an object": pickle.dumps({"outputs": Plain()}),
    "a module of ours": name("flowgrpo_jax.rewards.upstream", "os") + b".",
    "a dotted name": b"\x80\x04" + short("numpy") + short("dtype.__init__") + b"\x93.",
    "numpy.load": name("numpy", "load") + b".",
    "pointers as bytes": name("numpy.core.multiarray", "scalar")
    + b"("
    + POINTERS
    + b"C\x08AAAAAAAAtR.",
    "a type that turns into pointers": DTYPE
    + b"(K\x03"
    + short("O")
    + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb.",
    "a type with fields": DTYPE + b"(K\x03" + short("<") + b"N)}K\x00K\x00K\x00tb.",
    "attributes set on the class": name("numpy", "ndarray") + b"}" + short("values") + b"K\x01sb.",
    "attributes set through slots": name("numpy", "dtype") + b"N}" + short("x") + b"K\x01s\x86b.",
    "an array of other bytes": RECONSTRUCT + b"(tR(K\x01(K\x05t" + DTYPE + b"\x89C\x08AAAAAAAAtb.",
    "an array from text": RECONSTRUCT + b"(tR(K\x01(K\x01t" + DTYPE + b"\x89" + short("x") + b"tb.",
    "persistent": b"Pname\n.",
    "an extension": b"\x82\x01.",
    "cut off": pickle.dumps({"outputs": [1.0, 2.0]})[:-5],
    "empty": b"",
    "JSON": b'{"outputs": [1.0, 2.0]}',
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_not_plain_is_refused_unread(case, caplog):
    before = {cls: dict(vars(cls)) for cls in set(upstream.KNOWN.values())}
    with pytest.raises(ValueError, match="no pickle that is safe to read"):
        upstream.loads(HOSTILE[case])
    with Stub(lambda request, body: (200, HOSTILE[case])) as stub:
        scores, valid = load("deqa_upstream", stub)(gray(1, 2), ["", ""], [{}, {}])
    assert not valid.any() and not scores.any() and "failed on 2 images" in caplog.text
    assert not os.path.exists(MARK)
    assert before == {cls: dict(vars(cls)) for cls in before}


def test_the_hostile_pickles_are_no_strawmen(tmp_path):
    """Python's own unpickler does what they say."""
    pickle.loads(pickle.dumps(Run(os.mkdir, str(tmp_path / "made"))))
    assert (tmp_path / "made").is_dir()


@pytest.mark.parametrize(
    "answer",
    [
        [1.0, 2.0],
        {"scores": [1.0, 2.0]},
        {"outputs": [1.0]},
        {"outputs": 1.0},
        {"outputs": ["1", "2"]},
        {"outputs": [[1.0], [2.0]]},
        {"outputs": [None, None]},
        {"outputs": [10**400, 1]},
        {"outputs": np.zeros((2, 1))},
        {"outputs": {0: 1.0, 1: 2.0}},
    ],
)
def test_an_answer_of_another_form_makes_its_images_invalid(answer):
    with answering(lambda body: answer) as stub:
        _, valid = load("deqa_upstream", stub)(gray(1, 2), ["", ""], [{}, {}])
    assert not valid.any()


def test_instances_made_without_their_arguments_hold_nothing():
    data = b"\x80\x04" + name("numpy", "ndarray") + b")\x81."  # cls.__new__(cls)
    with pytest.raises(ValueError, match="shape"):
        upstream.numbers(upstream.loads(data), 2)
