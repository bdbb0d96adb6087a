"""Checkpoints of a run folder: safetensors only, and complete whenever the process dies.

A checkpoint is ``checkpoint-NNNNNN.safetensors`` (the model's weights) and, for the last one,
``checkpoint-NNNNNN.state.safetensors`` (the rest that training needs: optimiser, random numbers, position).
``checkpoints.json`` names the valid checkpoints and is written last: the earlier ones stay until then, and afterwards
all that it does not name are removed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ecore.errors import InputError
from ecore.files import parse_json, write_json
from ecore.model.base import EmpatheticModel
from ecore.model.weights import load_weights, read_tensors, save_tensors, save_weights
from ecore.pretrained import CHECKPOINTS, weights_file

_ADAM = ("exp_avg", "exp_avg_sq", "step")


@dataclass
class Progress:
    """The state of training that resuming needs, tensors apart."""

    step: int = 0
    epoch: int = 0
    batches: int = 0
    """Batches of this epoch already taken."""
    best: float | None = None
    """Lowest ``ppl_per_sample`` of any validation."""
    best_step: int | None = None
    stale: int = 0
    """Validations since then, except those that only a run's end required."""
    validated: int = 0
    """Step of the last validation."""
    window: dict[str, float] = field(default_factory=dict)
    """Sums since the last line of the log."""
    line: dict[str, Any] | None = None
    """A line of the log that still waits for its validation."""
    blind_since: int | None = None
    """Step since which the graph says the same of every context; None while it sees."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """State of the gradient scaler; empty where there is none."""


def checkpoint_name(step: int) -> str:
    """Name of the checkpoint of ``step``, without its endings."""
    return f"checkpoint-{step:06d}"


def save(
    run: Path,
    model: EmpatheticModel,
    optimizer: Optimizer,
    progress: Progress,
    random: Sequence[dict[str, Tensor]],
) -> None:
    """Write the checkpoint of ``progress.step`` and make it the last one.

    Args:
        random: :func:`random_state` of each process that trains.

    Raises:
        OSError: the disk refuses.
    """
    name = checkpoint_name(progress.step)
    notes = {"progress": json.dumps(dataclasses.asdict(progress))}
    save_weights(model, run / f"{name}.safetensors")
    state = _optimizer_tensors(model, optimizer) | _numbered(random)
    save_tensors(run / f"{name}.state.safetensors", state, notes)
    _point(run, progress)


def load(
    run: Path, model: EmpatheticModel, optimizer: Optimizer, rank: int = 0, processes: int = 1
) -> Progress | None:
    """Put the last checkpoint of ``run`` into ``model``, ``optimizer`` and the random number generators.

    Leftovers of a process that died while it wrote are removed, by the first one. None where no checkpoint was ever
    completed. Where other than ``processes`` processes wrote it, those but the first start new random numbers.

    Raises:
        InputError: a file that ``checkpoints.json`` names is missing, damaged or of another model.
    """
    if not (run / CHECKPOINTS).exists():
        return None
    weights = weights_file(run, "last")
    load_weights(model, weights)
    path = weights.with_suffix(".state.safetensors")
    state, notes = _read_state(path)
    try:
        progress = Progress(**parse_json(notes["progress"], path.name))
        _restore_optimizer(model, optimizer, state)
        _restore_random_state(model, state, rank, processes)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: not the training state of this model ({error})") from None
    # The process may have died between the state, which knows the best step, and the pointers.
    if rank == 0:
        _point(run, progress)
    return progress


def _point(run: Path, progress: Progress) -> None:
    last = checkpoint_name(progress.step)
    best = checkpoint_name(progress.best_step) if progress.best_step is not None else last
    if not (run / f"{best}.safetensors").exists():
        raise InputError(
            f"{run / best}.safetensors: missing, but checkpoints.json needs it (the best checkpoint)"
        )
    pointers = {"best": best, "last": last}
    write_json(run / CHECKPOINTS, pointers, sealed=True)
    kept = {f"{best}.safetensors", f"{last}.safetensors", f"{last}.state.safetensors"}
    for path in [*run.glob("checkpoint-*.safetensors"), *stray_files(run)]:
        if path.name not in kept:
            path.unlink()


def stray_files(run: Path) -> list[Path]:
    """Temporary files that a process left when it died while it wrote them."""
    return [*run.glob(".*.tmp"), *run.glob(".tmp??????")]  # the second are safetensors' own


def _read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.exists():
        raise InputError(f"{path}: no such file; without it training cannot go on")
    return read_tensors(path)


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained parameters by name, each once, in the optimiser's order."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"adam.{part}.{name}": optimizer.state[p][part].detach().cpu().contiguous()
        for name, p in _parameters(model)
        if p in optimizer.state  # not where no gradient ever came, as in some ablations
        for part in _ADAM
    }


def _restore_optimizer(model: nn.Module, optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    state = {}
    for i, (name, parameter) in enumerate(_parameters(model)):
        parts = {part: tensors[f"adam.{part}.{name}"] for part in _ADAM if f"adam.{part}.{name}" in tensors}
        if parts and parts["exp_avg"].shape != parameter.shape:
            raise ValueError(
                f"{name}: shape {tuple(parts['exp_avg'].shape)}, expected {tuple(parameter.shape)}"
            )
        if parts:
            state[i] = parts
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of this process's random number generators: the CPU's, and the GPU's where ``device`` is one."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _numbered(random: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        f"random.{rank}.{kind}": state for rank, states in enumerate(random) for kind, state in states.items()
    }


def _restore_random_state(model: nn.Module, tensors: dict[str, Tensor], rank: int, processes: int) -> None:
    written = sum(name.startswith("random.") and name.endswith(".cpu") for name in tensors)
    if rank and written != processes:
        torch.manual_seed(int(tensors["random.0.cpu"].sum()) + rank)
        return
    device = next(model.parameters()).device
    torch.set_rng_state(tensors[f"random.{rank}.cpu"])
    if device.type == "cuda" and f"random.{rank}.cuda" in tensors:
        torch.cuda.set_rng_state(tensors[f"random.{rank}.cuda"], device)
