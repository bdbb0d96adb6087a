"""Helpers for training tests: interrupt a run, and compare weights between runs."""

import os
import signal

import torch

from ecore import pretrained
from ecore.model import ECore


def weights(run):
    return pretrained.load(run, "last").state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def at_call(monkeypatch, name, number, act):
    """Do ``act`` at the ``number``-th call of ECore's method ``name``, before it."""
    calls = 0
    method = getattr(ECore, name)

    def spied(self, *arguments, **options):
        nonlocal calls
        calls += 1
        if calls == number:
            act(self)
        return method(self, *arguments, **options)

    monkeypatch.setattr(ECore, name, spied)


def interrupt(_):
    os.kill(os.getpid(), signal.SIGINT)
