"""What a run writes of its figures, when it is stopped, resumed and prolonged."""

from flowgrpo_jax import logs


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
    assert [row["epoch"] for row in logs.read(logs.Metrics(tmp_path, 2).file)] == [0, 1]
