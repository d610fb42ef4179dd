"""Places that a command writes to, and other mistakes, are judged before the work."""

import re
from types import SimpleNamespace

import pytest
from PIL import Image

from flowgrpo_jax import compile, encode, evaluate, export, generate, serve
from flowgrpo_jax.checkpoints import policies
from flowgrpo_jax.command_line import cli, connection
from flowgrpo_jax.configs import shapes
from flowgrpo_jax.models import convert
from flowgrpo_jax.storage import outputs


@pytest.mark.parametrize("name", ["a.png", "new/a.PNG", "a.jpg", "a.webp", "a.b.png"])
def test_a_picture_that_can_be_saved(tmp_path, name):
    file = tmp_path / name
    outputs.check_picture(file, "--out")
    assert file.parent.is_dir() and list(file.parent.iterdir()) == []
    Image.new("RGB", (4, 4)).save(file)


@pytest.mark.parametrize("name", ["picture", "a.xyz", "a.", ".png", "a.psd"])  # psd is only read
def test_a_picture_of_no_format(tmp_path, name):
    with pytest.raises(ValueError, match=r"--out=.*suffix .* names no format.*use \.png"):
        outputs.check_picture(tmp_path / name, "--out")
    with pytest.raises((ValueError, KeyError)):
        Image.new("RGB", (4, 4)).save(tmp_path / name)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(IsADirectoryError, match=r"--out=.* is a directory: name a file"):
        outputs.check_file(tmp_path, "--out")
    with pytest.raises(OSError, match=r"nothing can be written to .*file: .*Give another --out"):
        outputs.check_file(tmp_path / "file" / "a.json", "--out")
    outputs.check_file(tmp_path / "file", "--out")
    assert (tmp_path / "file").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ------------------------------------------------------------------------------ the commands


@pytest.fixture
def unloaded(monkeypatch):
    """No command reads weights, loads a reward or compiles."""
    for owner, name in (
        (convert, "load"),
        (evaluate, "build_run"),
        (encode.parts, "load_model"),
        (policies, "load"),
        (compile, "topology"),
    ):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("the work began"))


DRAW = dict(model="shapes", lora=None, option=[], dtype="float32", base_dtype="", prompt=["a"])
SIZE = dict(height=None, width=None, guidance=1.0, steps=1, seed=0, solver="euler")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"out": "picture"}, "--out=.*picture: the suffix '' names no format"),
        ({"guidance": -1.0}, r"--guidance=-1\.0: .*at least 0"),
        ({"guidance": float("nan")}, r"--guidance=nan: .*finite"),
        ({"solver": "heun"}, r"'heun' is unknown: choose from dpmpp_2m, euler"),
        ({"height": 63}, "image size 63 x 64: both must be multiples"),
    ],
)
def test_generate_judges_before_it_draws(unloaded, tmp_path, monkeypatch, changes, message):
    args = DRAW | SIZE | {"out": "a.png"} | changes
    args["out"] = str(tmp_path / args["out"])
    monkeypatch.setattr(generate.flags, "FLAGS", SimpleNamespace(**args))
    with pytest.raises(ValueError, match=message):
        generate.main([])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"out": "a.png"}, r"--out=.*a\.png: .*JSON file.*give .*a\.json"),
        ({"out": ""}, "--out=.* is a directory"),
        ({"checkpoint": "nowhere"}, "'nowhere' does not exist: give base"),
    ],
)
def test_evaluate_judges_before_it_draws(unloaded, tmp_path, monkeypatch, changes, message):
    args = {"out": "a.json", "checkpoint": "base"} | changes
    args["out"] = str(tmp_path / args["out"])
    monkeypatch.setattr(
        evaluate.flags, "FLAGS", SimpleNamespace(config=shapes.get_config(), **args)
    )
    monkeypatch.setattr(connection, "connect", lambda: None)
    monkeypatch.setattr(evaluate.settings, "split_cpu", lambda _: None)
    with pytest.raises((ValueError, OSError), match=message):
        evaluate.main([])


def test_export_judges_before_it_reads_weights(unloaded, tmp_path):
    cli.record(tmp_path, shapes.get_config())
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"--out=.*file is a file: name a directory"):
        export.export(tmp_path, tmp_path / "file")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 5 in .*: choose from \[4\]"):
        export.export(tmp_path, tmp_path / "lora", 5)
    assert not (tmp_path / "lora").exists()


def test_encode_judges_before_it_loads(unloaded, tmp_path, monkeypatch):
    config = shapes.get_config()
    (tmp_path / "file").write_text("")
    config.model.text_cache = str(tmp_path / "file")
    monkeypatch.setattr(encode.flags, "FLAGS", SimpleNamespace(config=config, epochs=1))
    monkeypatch.setattr(connection, "connect", lambda: None)
    with pytest.raises(OSError, match=r"written to .*Give another --config\.model\.text_cache"):
        encode.main([])


def test_compile_judges_before_it_compiles(unloaded, tmp_path, monkeypatch):
    args = SimpleNamespace(config=shapes.get_config(), out=str(tmp_path))
    monkeypatch.setattr(compile.flags, "FLAGS", args)
    with pytest.raises(IsADirectoryError, match=r"--out=.* is a directory"):
        compile.main([])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--options=[1]"], "--options: .* is no JSON object"),
        (["--options={"], "--options: .* is no JSON"),
        (["--batch=0"], "--batch: 0 must be at least 1"),
        (["--max_images=-1"], "--max_images: -1 must be at least 1"),
        (["--port=x"], "--port: invalid .*'x'"),
        (["--port=70000"], "--port: 70000 .*65535"),
    ],
)
def test_serve_judges_its_flags(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        serve.parse(["--reward=ocr", *arguments])
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, last), last
