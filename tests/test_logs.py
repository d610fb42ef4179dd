"""What a run writes of its figures, when it is stopped, resumed and prolonged."""

import errno
import io
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from flowgrpo_jax.storage import logs, picture_grid


def test_a_prolonged_run_keeps_its_last_evaluation(tmp_path):
    """Until its epoch is trained, the evaluation has a row of its own, as it had before."""
    finished = logs.Metrics(tmp_path)
    for epoch in range(3):
        finished.write(epoch, {"reward": epoch / 10})
    finished.write(3, {"eval/shapes": 0.5})
    again = logs.Metrics(tmp_path, 3)
    assert logs.read(again.file)[3:] == [{"epoch": 3, "eval/shapes": 0.5}]
    again.write(3, {"reward": 0.3})
    again.write(4, {"reward": 0.4})
    assert logs.read(again.file)[2:] == [
        {"epoch": 2, "reward": 0.2},
        {"epoch": 3, "eval/shapes": 0.5, "reward": 0.3},
        {"epoch": 4, "reward": 0.4},
    ]


def test_an_epoch_that_is_trained_again_is_written_again(tmp_path):
    killed = logs.Metrics(tmp_path)
    for epoch in range(3):
        killed.write(epoch, {"reward": epoch / 10, "eval/shapes": 0.5})
    again = logs.Metrics(tmp_path, 2, tensorboard=True)
    *before, last = logs.read(again.file)
    assert [row["epoch"] for row in before] == [0, 1]
    assert last == {"epoch": 2, "eval/shapes": 0.5}  # of the very state that it goes on from
    again.write(2, {"reward": 0.7})
    again.close()
    assert logs.read(again.file)[-1] == {"epoch": 2, "eval/shapes": 0.5, "reward": 0.7}
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"eval/shapes" in events.read_bytes()  # a reader drops those of before


def test_tensorboard_gets_no_figure_that_was_not_measured(tmp_path, caplog):
    """Such as the reward of a task that the epoch did not draw. A NaN is a warning each epoch."""
    metrics = logs.Metrics(tmp_path, tensorboard=True)
    metrics.write(0, {"reward/here": 0.5, "reward/absent": float("nan")})
    metrics.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"reward/here" in events.read_bytes()
    assert b"reward/absent" not in events.read_bytes() and not caplog.text


@pytest.mark.parametrize("more", [0, 1])
def test_a_row_that_a_full_disk_cuts_is_written_whole_later(tmp_path, monkeypatch, caplog, more):
    metrics = logs.Metrics(tmp_path)
    metrics.write(0, {"reward": 0.0})
    real = type(metrics.file).open

    @contextmanager
    def half(path, mode="r"):
        with real(path, mode) as file:
            write = file.write
            file = type("Full", (), {"write": lambda _, text: write(text[: len(text) // 2])})()
            yield file
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(type(metrics.file), "open", half)
        metrics.write(1, {"reward": 0.1})
    assert "No space left" in caplog.text
    if more:
        metrics.write(2, {"reward": 0.2})
    metrics.close()
    assert [row["epoch"] for row in logs.read(metrics.file)] == [0, 1] + more * [2]


@pytest.mark.parametrize("height, width", [(64, 128), (128, 64), (256, 256)])
def test_a_grid_keeps_the_pictures_proportions(height, width):
    black = np.zeros((1, height, width, 3), np.uint8)
    sheet = np.asarray(picture_grid.grid(black, [""], columns=1))
    dark = np.argwhere((sheet < 9).all(-1))
    high, wide = np.ptp(dark, axis=0) + 1
    assert max(high, wide) == 128 and high * width == wide * height


def test_tensorboard_and_wandb_get_the_pictures(tmp_path, monkeypatch):
    logged = []
    run = SimpleNamespace(log=lambda row, step: logged.append((step, row)))
    wandb = SimpleNamespace(init=lambda **_: run, Image=lambda picture: picture.size)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    metrics = logs.Metrics(tmp_path, tensorboard=True, wandb=True)
    metrics.show(4, "samples", lambda: Image.new("RGB", (20, 10), "red"))
    assert logged == [(4, {"samples": (20, 10)})]
    (events,) = (tmp_path / "tensorboard").iterdir()
    written = events.read_bytes()
    begin = written.index(b"\x89PNG")
    assert b"samples" in written[:begin]
    shown = Image.open(io.BytesIO(written[begin:]))
    assert shown.size == (20, 10) and shown.getpixel((0, 0)) == (255, 0, 0)


def test_no_picture_is_drawn_for_nobody(tmp_path):
    logs.Metrics(tmp_path).show(0, "samples", lambda: pytest.fail("drawn"))
    logs.Metrics(tmp_path, active=False).show(0, "samples", lambda: pytest.fail("drawn"))
