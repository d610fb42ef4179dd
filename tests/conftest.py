"""What tests share: the cache of compiled programs, the choice of files, a tiny torch pipeline."""

import collections
import itertools
import signal
from types import SimpleNamespace

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
    for line in slowest_files(terminalreporter.stats):
        terminalreporter.write_line(line)
    if chosen := config.getoption("--environment"):
        terminalreporter.write_line(partition.left_out(chosen))


def slowest_files(stats, shown=15):
    """Lines with the seconds of the slowest test files, with what their tests set up."""
    seconds = collections.Counter()
    for report in itertools.chain.from_iterable(stats.values()):
        if isinstance(report, pytest.TestReport):
            seconds[report.nodeid.partition("::")[0]] += report.duration
    whole = sum(seconds.values())
    lines = [f"{s:.0f}s {file}" for file, s in seconds.most_common(shown)]
    return [f"Slowest files, of {whole:.0f}s in all:", *lines] if whole > 60 else []


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Nobody waits for servers that a test has not started."""
    monkeypatch.setattr("flowgrpo_jax.transport.http_client.PATIENCE", 0.0)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The directory of a tiny model with random weights. Not to be written to."""
    from tiny_model import write_model

    directory = tmp_path_factory.mktemp("tiny") / "model"
    write_model(directory)
    return directory


@pytest.fixture(scope="session")
def runs(tmp_path_factory, tiny_model):
    """The directory of short runs, with their recipe."""
    from short_runs import RECIPE

    runs = tmp_path_factory.mktemp("short")
    (runs / "model").symlink_to(tiny_model)
    (runs / "tiny.py").write_text(RECIPE)
    return runs


@pytest.fixture(scope="session")
def half(runs):
    """The work directory of two epochs from the command line. Not to be written to."""
    from short_runs import call

    call(runs, "train", "--config=tiny.py", "--config.epochs=2", "--workdir=half")
    return runs / "half"


@pytest.fixture(scope="session")
def shown(half):
    """The data of the page of those two epochs, which `train` wrote by itself."""
    from run_pages import data_of

    from flowgrpo_jax.report import page

    return data_of(half / page.FILE)


@pytest.fixture(scope="session")
def whole(runs):
    """The work directory of four epochs and the state that they end in. Not to be written to."""
    from short_runs import load

    from flowgrpo_jax.train import train

    workdir = runs / "whole"
    state = train(load(runs, log__tensorboard=False), workdir)
    return SimpleNamespace(workdir=workdir, state=state)


@pytest.fixture(scope="module")
def table():
    """The table of rewards with the one that runs of several processes use."""
    from flowgrpo_jax import rewards

    rewards.TABLE["brightness"] = "processes:brightness"
    yield
    del rewards.TABLE["brightness"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model, table):
    """The directory of the runs of a test file, with the model that they train."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "model").symlink_to(tiny_model)
    return folder


@pytest.fixture
def nothing_goes_on():
    """No process of a failed test goes on after it."""
    import processes

    yield
    processes.end_all()


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


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A tiny CLIP as transformers writes it, with a real tokenizer. Not to be written to."""
    from tower_scores import write_clip_folder

    folder = tmp_path_factory.mktemp("clip")
    write_clip_folder(folder)
    return folder


@pytest.fixture(scope="module")
def shapes():
    """The shapes of the parameters of a small transformer."""
    from weights_on_disk import SMALL, shapes_of

    from flowgrpo_jax.models.sd3.mmdit import MMDiT

    return shapes_of(MMDiT, SMALL)


@pytest.fixture(scope="module")
def tensors(shapes):
    """A random state dict for them."""
    from weights_on_disk import random_tensors

    return random_tensors(shapes)
