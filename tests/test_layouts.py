"""One device, eight as data, fsdp, tensor or all three, and two processes: the same training."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from flowgrpo_jax import cli, recipe, rewards, sharding
from flowgrpo_jax.checkpoint import Checkpoints, load_lora
from flowgrpo_jax.models import layers, lora
from flowgrpo_jax.models.lora import LoRASpec
from flowgrpo_jax.models.mmdit import MMDiT, MMDiTConfig
from flowgrpo_jax.models.text import CLIPConfig, CLIPText, T5Config, T5Encoder
from flowgrpo_jax.models.vae import VAE, VAEConfig
from flowgrpo_jax.pretraining import flow, package
from flowgrpo_jax.pretraining.tokenizers import sizes, write_tokenizers
from flowgrpo_jax.shapes import grammar
from flowgrpo_jax.train import first_state, train

HERE = Path(__file__).parent
MMDIT = MMDiTConfig(
    sample_size=4,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=8,
    joint_attention_dim=32,
    caption_projection_dim=64,
    pooled_projection_dim=32,
    pos_embed_max_size=4,
    dual_attention_layers=(0,),
    qk_norm="rms_norm",
)
T5 = T5Config(vocab_size=9, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
LAYOUTS = {  # name: mesh, host call
    "data": ({"data": 8}, "overlap"),
    "fsdp": ({"data": 1, "fsdp": 8}, "overlap"),
    "tensor": ({"data": 1, "tensor": 8}, "overlap"),
    "all": ({"data": 2, "fsdp": 2, "tensor": 2}, "overlap"),
    "callback": ({"data": 2, "fsdp": 4}, "callback"),
}


def clip(vocabulary, activation):
    return CLIPConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=grammar.LENGTH,
        hidden_act=activation,
        projection_dim=16,
        eos_token_id=vocabulary - 1,
    )


def write_model(folder):
    """A tiny model with random weights, none of them zero, in diffusers layout."""
    words = grammar.vocabulary()
    write_tokenizers(folder, words, grammar.LENGTH)
    n_clip, n_t5 = sizes(words)
    clips = clip(n_clip, "quick_gelu"), clip(n_clip, "gelu")
    t5 = dataclasses.replace(T5, vocab_size=n_t5)
    vae = VAEConfig(
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    makers = flow.makers(*clips, t5) | {
        "transformer": lambda rngs: MMDiT(MMDIT, rngs=rngs),
        "vae": lambda rngs: VAE(vae, rngs=rngs),
    }
    params = {name: layers.initialise(create, i) for i, (name, create) in enumerate(makers.items())}
    package.write(folder, params, MMDIT, vae, *clips, t5, dtype=np.float32)


CACHE_ALL = (
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES",
)
calls: list[int] = []


def brightness(images, prompts, metadata):
    """Hardly moves when a value is rounded the other way. Kills its process at a call asked for,
    once the checkpoint asked for is complete: checkpoints are written in the background."""
    calls.append(len(images))
    if os.environ.get("KILL_AT_CALL") == str(len(calls)):
        deadline = time.monotonic() + 100
        while not Path(os.environ["KILL_AFTER"]).exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
    return images.mean((1, 2, 3)) / 255, np.ones(len(images), bool)


def load(folder, mesh, host_call):
    from configs import shapes

    c = shapes.get_config()
    c.model.path = str(folder / "model")
    c.model.height = c.model.width = 32
    c.epochs = 2
    c.lora.rank, c.lora.alpha = 8, 8.0
    c.sample.groups, c.sample.group_size, c.sample.micro_batch = 2, 8, 8  # a group on all devices
    c.sample.steps, c.sample.window, c.sample.window_range = 4, 2, (0, 3)
    c.sample.guidance_scale = c.eval.guidance_scale = 2.0
    c.reward.weights = {"brightness": 1.0}
    c.reward.host_call = host_call
    c.eval.every, c.eval.images, c.eval.micro_batch, c.eval.steps = 2, 8, 8, 2
    c.eval.rewards, c.checkpoint.best = (), "brightness"
    c.train.eps, c.train.learning_rate = 1.0, 1.0  # steps follow the gradient, not its sign
    c.checkpoint.every = 1
    c.mesh.update(mesh)
    return c


def adapted(config, name):
    """Runs whose name begins with "full" have no adapter."""
    config.lora.rank = 0 if name.startswith("full") else config.lora.rank
    return config


def refuse(read, unreadable, checkpoints, step, like):
    """`Checkpoints.read` where this process cannot read its part of a step."""
    if step == unreadable:
        raise OSError("a part of it is gone")
    return read(checkpoints, step, like)


def run(folder, name, mesh, host_call, epochs):
    """What each child process does, as launchers have it done."""
    cli.connect()
    rewards.TABLE["brightness"] = "test_layouts:brightness"
    config = adapted(load(Path(folder), mesh, host_call), name)
    if step := os.environ.get("UNREADABLE"):
        real = Checkpoints.read
        Checkpoints.read = lambda *arguments: refuse(real, int(step), *arguments)
    if jax.process_count() > 1:  # each with a cache of its own, as on machines without shared disks
        config.model.text_cache = f"{folder}/texts-{jax.process_index()}"
    config.epochs = epochs
    train(config, Path(folder) / name, resume=True)


def spawn(
    folder, name, mesh, host_call="overlap", *, devices, processes=1, epochs=2, last=(), launcher=()
):
    """The run in child processes, which share the given number of devices; the last one gets more
    environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    children = []
    for i in range(processes):
        env = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices // processes),
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
        }
        if processes > 1:
            env |= {
                "FLOWGRPO_COORDINATOR": address,
                "FLOWGRPO_PROCESSES": str(processes),
                "FLOWGRPO_PROCESS": str(i),
            }
        # Runs of one layout share compiled programs.
        env |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), **dict.fromkeys(CACHE_ALL, "0")}
        if i == processes - 1:
            env |= dict(last)
        call = f"test_layouts.run{(str(folder), name, mesh, host_call, epochs)!r}"
        children.append(
            subprocess.Popen(
                [*launcher, sys.executable, "-c", f"import test_layouts; {call}"],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
    started.extend(children)
    return children


started: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_goes_on():
    """After a test that failed, either."""
    yield
    for child in started:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    started.clear()


def start(*run, **settings):
    """The same, until it has ended well; what each process printed."""
    children = spawn(*run, **settings)
    outputs = [child.communicate(timeout=300)[0] for child in children]
    assert not any(child.returncode for child in children), outputs
    return outputs


def final_state(folder, name):
    """All that a run's last checkpoint holds of the training: LoRA, EMA, optimiser, key, step."""
    built = recipe.build(adapted(load(folder, {"data": 1}, "overlap"), name))
    state, _ = Checkpoints(folder / name / "checkpoints").resume(first_state(built))
    return jax.device_get(dataclasses.replace(state, key=jax.random.key_data(state.key)))


def outcome(folder, name):
    """(metrics without times, the EMA after training) of a run."""
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [{k: v for k, v in row.items() if "second" not in k} for row in rows]
    config = adapted(load(folder, {"data": 1}, "overlap"), name)
    built = recipe.build(config, training=False)
    return rows, jax.device_get(load_lora(folder / name, built.model))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    write_model(folder / "model")
    return folder


@pytest.fixture(scope="module", autouse=True)
def table():
    rewards.TABLE["brightness"] = "test_layouts:brightness"
    yield
    del rewards.TABLE["brightness"]


@pytest.fixture(scope="module")
def one_device(folder):
    start(folder, "one", {"data": 1}, devices=1)
    rows, ema = outcome(folder, "one")
    assert len(rows) == 3 and max(row.get("ratio_gap", 0) for row in rows) < 1e-5
    moved = [np.abs(x).max() for k, x in ema.items() if k.endswith("lora_b")]
    assert np.median(moved) > 1e-5
    return rows, ema


def same(ours, theirs, within=2e-3):
    for mine, other in zip(ours[0], theirs[0], strict=True):
        gap = mine.pop("ratio_gap", 0), other.pop("ratio_gap", 0)
        assert max(gap) < 1e-5
        # Losses are sums of advantages near 0: what is left of them is rounding.
        assert mine == pytest.approx(other, rel=2e-3, abs=5e-5)
    for path, x in theirs[1].items():
        size = np.abs(x).max()
        np.testing.assert_allclose(ours[1][path], x, atol=within * size + 1e-9, err_msg=path)


def same_pictures(folder, ours, theirs):
    """The evaluation's, before training: the same noise drew them, on whatever devices."""
    mine, other = (
        np.asarray(Image.open(folder / name / "samples" / "epoch-00000.png"), int)
        for name in (ours, theirs)
    )
    assert np.abs(mine - other).max() <= 1 and other.std() > 5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_does_not_change_the_result(folder, one_device, layout):
    start(folder, layout, *LAYOUTS[layout], devices=8)
    same(outcome(folder, layout), one_device)
    same_pictures(folder, layout, "one")


def test_the_layout_does_not_change_full_fine_tuning(folder):
    start(folder, "full-one", {"data": 1}, devices=1)
    start(folder, "full-eight", {"data": 2, "fsdp": 2, "tensor": 2}, devices=8)
    one = outcome(folder, "full-one")
    base = package.read(folder / "model", {"transformer": lambda rngs: MMDiT(MMDIT, rngs=rngs)})
    moved = [np.abs(x - base["transformer"][path]).max() for path, x in one[1].items()]
    assert np.median(moved) > 1e-5
    same(outcome(folder, "full-eight"), one, within=1e-2)  # biases move little, rounding as ever


PAIR = {"data": 1, "fsdp": 8}  # over two processes: each has a part of every weight and group


@pytest.mark.parametrize(
    "host_call, mesh", [("overlap", {"data": 4, "fsdp": 2}), ("callback", PAIR)]
)
def test_two_processes_train_as_one(folder, one_device, host_call, mesh):
    name = f"two-{host_call}"
    start(folder, name, mesh, host_call, devices=8, processes=2)
    same(outcome(folder, name), one_device)
    same_pictures(folder, name, "one")


@pytest.fixture(scope="module")
def undisturbed(folder):
    start(folder, "undisturbed", PAIR, devices=8, processes=2)
    return outcome(folder, "undisturbed")[0], final_state(folder, "undisturbed")


def exactly(folder, name, undisturbed):
    metrics, state = undisturbed
    assert outcome(folder, name)[0] == metrics
    jax.tree.map(np.testing.assert_array_equal, final_state(folder, name), state)


def test_a_killed_process_costs_a_restart(folder, undisturbed):
    """One of two processes is killed in the middle of the second epoch. The other one ends by
    itself, the launchers start both again, and the run is, bit for bit, the one that was never
    killed."""
    kill = {"KILL_AT_CALL": "4", "KILL_AFTER": str(folder / "killed" / "checkpoints" / "1")}
    launcher = [HERE.parent / "launch" / "run.sh"]
    children = spawn(
        folder,
        "killed",
        PAIR,
        devices=8,
        processes=2,
        last=kill | {"PAUSE": "5"},
        launcher=launcher,
    )
    outputs = [child.communicate(timeout=600)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert all("launch/run.sh: ended with" in output for output in outputs), outputs
    assert "ended with 137" in outputs[1]
    exactly(folder, "killed", undisturbed)


def test_one_process_is_told_to_stop_and_both_save(folder, undisturbed):
    """SIGTERM to one of two: both leave after the same epoch with the status for a restart."""
    children = spawn(folder, "stopped", PAIR, devices=8, processes=2, epochs=100_000)
    log, deadline = folder / "stopped" / "metrics.jsonl", time.monotonic() + 300
    while not (log.exists() and len(log.read_text().splitlines()) >= 2):
        assert time.monotonic() < deadline and all(child.poll() is None for child in children)
        time.sleep(0.1)
    children[1].send_signal(signal.SIGTERM)
    outputs = [child.communicate(timeout=300)[0] for child in children]
    assert [child.returncode for child in children] == [cli.RESTART] * 2, outputs
    done = len(log.read_text().splitlines())
    assert Checkpoints(folder / "stopped" / "checkpoints").steps()[-1] == done
    # The third row of the undisturbed run is its last evaluation; the stopped one went on instead.
    assert outcome(folder, "stopped")[0][:2] == undisturbed[0][:2]


def test_two_processes_pass_over_a_damaged_checkpoint(folder, undisturbed):
    shutil.copytree(folder / "undisturbed", folder / "torn")
    for file in (folder / "torn" / "checkpoints" / "2").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-9])
    start(folder, "torn", PAIR, devices=8, processes=2)
    exactly(folder, "torn", undisturbed)
    assert Checkpoints(folder / "torn" / "checkpoints").steps() == [1, 2]


def test_both_pass_over_a_checkpoint_that_one_cannot_read(folder, undisturbed):
    shutil.copytree(folder / "undisturbed", folder / "half")
    last = {"UNREADABLE": "2"}
    first, _ = start(folder, "half", PAIR, devices=8, processes=2, last=last)
    assert "2 cannot be read: another process of the run" in first
    exactly(folder, "half", undisturbed)


def test_a_run_goes_on_in_another_layout(folder, one_device):
    """An epoch on 8 devices of two processes, an epoch on one device."""
    start(folder, "moved", {"data": 2, "fsdp": 4}, devices=8, processes=2, epochs=1)
    start(folder, "moved", {"data": 1}, devices=1)
    ours, theirs = outcome(folder, "moved"), one_device
    assert [row["epoch"] for row in ours[0]] == [0, 1, 2]
    same(ours, theirs)


# ------------------------------------------------------------------------------ the table


def shapes_of(create, targets=()):
    def build():
        model = create(nnx.Rngs(0))
        if targets:
            lora.add(model, LoRASpec(targets=targets))
        return model

    return layers.functional(nnx.eval_shape(build))[1]


def test_every_parameter_meets_one_rule():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    large = MMDiTConfig(num_layers=38, num_attention_heads=38, caption_projection_dim=2432)
    everywhere = ("attn.to_q", "attn.to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear")
    for shapes in (
        shapes_of(lambda rngs: MMDiT(MMDIT, rngs=rngs), everywhere),
        shapes_of(lambda rngs: MMDiT(large, rngs=rngs)),
        shapes_of(lambda rngs: CLIPText(clip(100, "gelu"), rngs=rngs)),
        shapes_of(lambda rngs: T5Encoder(T5, rngs=rngs)),
    ):
        for path, leaf in shapes.items():
            assert len(sharding.spec(path, leaf.shape, mesh)) == len(leaf.shape)
    with pytest.raises(ValueError, match=r"'blocks/new_layer/kernel' meets 0 rules.*add"):
        sharding.spec("blocks/new_layer/kernel", (2, 2), mesh)


def test_a_mesh_that_does_not_fit_names_the_sizes():
    with pytest.raises(ValueError, match=r"'fsdp': 3.* does not fit 1 devices"):
        sharding.make_mesh(data=-1, fsdp=3)
    with pytest.raises(ValueError, match=r"at most one size may be -1"):
        sharding.make_mesh(data=-1, fsdp=-1)


def test_an_incomplete_address_is_an_error(monkeypatch):
    monkeypatch.setenv("FLOWGRPO_COORDINATOR", "127.0.0.1:1")
    monkeypatch.setenv("FLOWGRPO_PROCESSES", "2")
    with pytest.raises(ValueError, match=r"also set FLOWGRPO_PROCESS$"):
        cli.connect()
