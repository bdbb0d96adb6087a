"""The command."""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.tune.__main__ import main


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "there is no CUDA device" in capsys.readouterr().err
