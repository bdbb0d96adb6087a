"""When checkpoints are written."""

from dataclasses import replace

import pytest

from ecore.training import trainer
from ecore.training.trainer import Trainer


class Ticking:
    """A clock that goes on by so many seconds each time that a step begins, and by a minute in each checkpoint."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.saved = 1e6, []
        take_step, save = Trainer._take_step, trainer.checkpoint.save

        def stepping(one):
            self.now += seconds
            take_step(one)

        def saving(folder, model, optimizer, progress, random):
            self.now += 60
            self.saved.append(progress.step)
            save(folder, model, optimizer, progress, random)

        monkeypatch.setattr(trainer, "clock", lambda: self.now)
        monkeypatch.setattr(Trainer, "_take_step", stepping)
        monkeypatch.setattr(trainer.checkpoint, "save", saving)


@pytest.mark.parametrize(
    "seconds, every, saved",
    [
        (0.001, None, [5, 10, 13]),  # fast: with the validations and at the end alone
        (50.0, None, [3, 5, 8, 10, 13]),  # two minutes are over within the third step after a checkpoint
        (500.0, None, list(range(1, 14))),
        (500.0, 4, [4, 5, 8, 10, 12, 13]),
        (0.001, 4, [4, 5, 8, 10, 12, 13]),
    ],
)
def test_checkpoints_follow_time_or_steps(
    quiet_train, settings, monkeypatch, tmp_path, seconds, every, saved
):
    ticking = Ticking(monkeypatch, seconds)
    quiet_train(tmp_path / "run", replace(settings, checkpoint_every=every))
    assert ticking.saved == saved


def test_a_run_killed_between_timed_checkpoints_has_the_same_numbers(
    quiet_train, settings, reference, numbers, monkeypatch, tmp_path
):
    by_time = replace(settings, checkpoint_every=None)
    with monkeypatch.context() as patched:
        ticking = Ticking(patched, 70.0)
        take_step = Trainer._take_step

        def killed(self):
            if self.state.step == 8:
                raise MemoryError
            take_step(self)

        patched.setattr(Trainer, "_take_step", killed)
        with pytest.raises(MemoryError):
            quiet_train(tmp_path / "run", by_time)
        assert ticking.saved == [2, 4, 5, 7]
    quiet_train(tmp_path / "run", resume=True)
    assert numbers(tmp_path / "run") == numbers(reference)


def test_the_first_process_decides_when_to_save(quiet_train, settings, monkeypatch, tmp_path):
    """Another's clock counts for nothing, and both take part in the asking."""

    asked = []

    class Asked(trainer.Processes):
        def any(self, value):
            asked.append(value)
            return value

    ticking = Ticking(monkeypatch, 500.0)
    one = object.__new__(Trainer)
    one.config, one.saved_at = replace(settings, checkpoint_every=None), 0.0
    for rank, due in ((0, True), (1, False)):
        one.processes = Asked(rank, 2)
        assert ticking.now > 120
        assert one._checkpoint_due() is due
    assert asked == [True, False]
