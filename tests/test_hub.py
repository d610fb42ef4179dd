"""Models on the hub: what is asked for, and what a refusal tells the user to do."""

from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from flowgrpo_jax.models import sd3

NAME = "stabilityai/stable-diffusion-3.5-medium"
RESPONSE = SimpleNamespace(headers={}, request=None)
GATED = errors.GatedRepoError("403 Client Error: restricted", response=RESPONSE)
ABSENT = errors.RepositoryNotFoundError("404 Client Error", response=RESPONSE)
LOCAL = r"set config\.model\.path \(of generate: --model\) to a local copy"


@pytest.mark.parametrize(
    "error, message",
    [
        (GATED, rf"is gated.*accept the licence at https://huggingface.co/{NAME}, log in here"),
        (GATED, rf"`hf auth login` \(or set HF_TOKEN\).*{LOCAL}.*403 Client Error: restricted"),
        (ABSENT, rf"is not on the hub, or is private: check the name .*hf auth login.*{LOCAL}"),
        (
            errors.LocalEntryNotFoundError("no network"),
            rf"cannot be reached: go online .*`hf download {NAME} --local-dir DIR`.*{LOCAL}",
        ),
        (errors.OfflineModeIsEnabled("offline"), rf"cannot be reached.*HF_HUB_OFFLINE.*{LOCAL}"),
        (OSError("disk full"), rf"could not be downloaded: .*hf auth login.*{LOCAL}.*disk full"),
    ],
)
def test_a_refusal_says_what_to_do(error, message, monkeypatch):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match=rf"^model '{NAME}' .*{message}") as raised:
        sd3.load(NAME)
    assert raised.value.__cause__ is error


FILES = {  # of the repository, and whether the pipeline with T5 and without it reads them
    "model_index.json": (True, True),
    "scheduler/scheduler_config.json": (True, True),
    "transformer/diffusion_pytorch_model.safetensors": (True, True),
    "vae/config.json": (True, True),
    "text_encoder/model.safetensors": (True, True),
    "text_encoder_2/config.json": (True, True),
    "tokenizer/merges.txt": (True, True),
    "tokenizer_2/vocab.json": (True, True),
    "text_encoder_3/model-00001-of-00002.safetensors": (True, False),
    "text_encoder_3/model.safetensors.index.json": (True, False),
    "tokenizer_3/spiece.model": (True, False),
    "text_encoder/model.fp16.safetensors": (False, False),
    "text_encoder_3/model.fp16-00001-of-00002.safetensors": (False, False),
    "text_encoder_3/model.safetensors.index.fp16.json": (False, False),
    "sd3.5_medium.safetensors": (False, False),
    "text_encoders/t5xxl_fp16.safetensors": (False, False),
    "mmdit.png": (False, False),
}


@pytest.mark.parametrize("t5", [True, False])
def test_only_what_is_read_is_downloaded(t5, monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda _, **k: asked.update(k) or str(tmp_path)
    )
    assert sd3.resolve(NAME, t5=t5) == tmp_path
    assert set(filter_repo_objects(FILES, **asked)) == {
        name for name, (full, without) in FILES.items() if (full if t5 else without)
    }
