"""Requests to the reward server that are none, and what is said of each."""

import base64
import io
import os

import numpy as np
from PIL import Image


def coded(data):
    return base64.b64encode(data).decode()


def file(shape=(8, 8, 3), kind="PNG", mode="RGB"):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros(shape, np.uint8)).convert(mode).save(buffer, format=kind)
    return buffer.getvalue()


def npy(array, allow_pickle=False):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


class Bomb:
    """Its pickle makes a folder where it is read."""

    def __reduce__(self):
        return os.mkdir, ("/tmp/a-pickle-was-read",)


def promising(shape):
    """An npy header of this shape, and hardly any data."""
    buffer = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + b"\0" * 10


ONE = {"prompts": [""], "metadata": [{}]}
MALFORMED = {
    "nothing": (b"", "no JSON"),
    "no JSON": (b"\x80\x04}.", "no JSON"),
    "depth": (b"[" * 100_000, "no JSON"),
    "a list": (b"[]", "must be an object, not list"),
    "no images": (ONE, "images must be an object"),
    "pickle": (ONE | {"images": {"pickle": "gAR9lC4="}}, "one of the keys png, npy"),
    "both": (ONE | {"images": {"png": [], "npy": ""}}, "one of the keys"),
    "no list": (ONE | {"images": {"png": "abc"}}, "must be a list"),
    "zero": ({"images": {"png": []}, "prompts": [], "metadata": []}, "0 images"),
    "numbers": (ONE | {"images": {"png": [5]}}, "base64 strings"),
    "no base64": (ONE | {"images": {"png": ["%%%"]}}, "no PNG"),
    "a JPEG": (ONE | {"images": {"png": [coded(file(kind="JPEG"))]}}, "no PNG"),
    "half a PNG": (ONE | {"images": {"png": [coded(file((64, 64, 3))[:50])]}}, "broken PNG"),
    "sizes": (
        ONE | {"images": {"png": [coded(file()), coded(file((9, 8, 3)))]}},
        r"several sizes: \[\(8, 8\), \(8, 9\)\]",
    ),
    "many": (ONE | {"images": {"png": [coded(file())] * 33}}, "33 images"),
    "wide": (ONE | {"images": {"png": [coded(file((1, 2049, 3)))]}}, "1 x 2049 px"),
    "heavy": (ONE | {"images": {"png": [coded(file((600, 600, 3)))]}}, "more than 1000000 bytes"),
    "no prompt": ({"images": {"png": [coded(file())]}, "metadata": [{}]}, "lists of 1 strings"),
    "two prompts": (ONE | {"images": {"png": [coded(file())]}, "prompts": ["", ""]}, "of 1 str"),
    "a number": (ONE | {"images": {"png": [coded(file())]}, "prompts": [1]}, "of 1 strings"),
    "metadata": (ONE | {"images": {"png": [coded(file())]}, "metadata": [1]}, "1 objects"),
    "no npy": (ONE | {"images": {"npy": coded(b"\x93NUMPY")}}, "no array"),
    "an object": (
        ONE | {"images": {"npy": coded(npy(np.array([Bomb()], object), allow_pickle=True))}},
        r"object \(1,\)",
    ),
    "floats": (ONE | {"images": {"npy": coded(npy(np.zeros((1, 8, 8, 3))))}}, "float64"),
    "no batch": (ONE | {"images": {"npy": coded(npy(np.zeros((8, 8, 3), np.uint8)))}}, "uint8"),
    "gray": (ONE | {"images": {"npy": coded(npy(np.zeros((1, 8, 8, 1), np.uint8)))}}, "channels"),
    "gigabytes": (ONE | {"images": {"npy": coded(promising((32, 2048, 2048, 3)))}}, "more than"),
    "exabytes": (ONE | {"images": {"npy": coded(promising((2**40, 2**40, 2**40, 3)))}}, "images"),
    "negative": (ONE | {"images": {"npy": coded(promising((1, -8, -8, 3)))}}, "-8 x -8"),
    "too short": (ONE | {"images": {"npy": coded(promising((1, 8, 8, 3)))}}, "10 bytes"),
}
