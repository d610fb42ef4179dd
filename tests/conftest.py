"""What tests share: the cache of compiled programs, the choice of files, a tiny torch pipeline."""

import signal

import compile_cache
import partition
import pytest


def pytest_addoption(parser):
    parser.addoption("--environment", choices=partition.ENVIRONMENTS, help=partition.__doc__)


def pytest_configure(config):
    compile_cache.switch_on()  # before anything imports jax
    hear_interrupts()


def hear_interrupts():
    """Undo the ignoring of SIGINT in a background job: the processes that tests start inherit it,
    and a shell cannot trap a signal that was ignored when it started."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_ignore_collect(collection_path, config):
    chosen = config.getoption("--environment")
    if chosen and partition.is_test(collection_path):
        return not partition.runs(collection_path, chosen) or None
    return None


def pytest_terminal_summary(terminalreporter, config):
    if chosen := config.getoption("--environment"):
        terminalreporter.write_line(partition.left_out(chosen))


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Nobody waits for servers that a test has not started."""
    monkeypatch.setattr("flowgrpo_jax.transport.http_client.PATIENCE", 0.0)


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
