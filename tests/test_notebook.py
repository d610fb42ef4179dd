"""The notebook of first steps: its cells run one after the other, here on a tiny model."""

import json
import sys
from pathlib import Path
from types import ModuleType

from short_runs import load

from flowgrpo_jax.configs import shapes

NOTEBOOK = Path(__file__).parent.parent / "docs" / "first_steps.ipynb"


def cells():
    found = json.loads(NOTEBOOK.read_text())["cells"]
    assert len(found) == 10 and not any(cell.get("outputs") for cell in found)
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


def test_the_notebook_runs(runs, tmp_path, monkeypatch, capsys):
    shown = []
    display = ModuleType("IPython.display")
    display.Image = lambda file: Path(file).read_bytes()[:4]
    display.IFrame = lambda file, width, height: shown.append(Path(file).read_text())
    display.display = shown.append
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    tiny = load(runs, epochs=1)
    tiny.model.path = str(runs / "model")
    monkeypatch.setattr(shapes, "get_config", lambda: tiny)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names = {}
    for source in cells():
        exec(source.replace("EPOCHS = 25", "EPOCHS = 1"), names)
    monkeypatch.delitem(sys.modules, "my_reward")
    before, after, page = shown
    assert before == after == b"\x89PNG"
    assert '"eval/my_reward:warm"' in page and str(tmp_path) in capsys.readouterr().out
