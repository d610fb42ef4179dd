"""What tests share: a tiny torch pipeline, without which the parity tests are skipped."""

import pytest

from flowgrpo_jax.transport import http_client


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Nobody waits for servers that a test has not started."""
    monkeypatch.setattr(http_client, "PATIENCE", 0.0)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny StableDiffusion3Pipeline on disk, in diffusers layout. Not to be written to."""
    from torch_models import write_pipeline

    root = tmp_path_factory.mktemp("checkpoint")
    write_pipeline(root)
    return root


@pytest.fixture(scope="session")
def pipeline(checkpoint):
    """The same in torch. Not to be changed."""
    from torch_models import diffusers

    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe
