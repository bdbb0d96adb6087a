"""Training a model in a run folder: optimise, validate, keep the best, stop and resume."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ecore import pretrained
from ecore.config import ModelConfig, TrainingConfig
from ecore.data.batches import Batch, resident
from ecore.data.prepared import PreparedData
from ecore.errors import InputError
from ecore.model.base import EmpatheticModel
from ecore.precision import LowWeights, autocast, float32_products, settle
from ecore.training import checkpoint, run_folder, validation
from ecore.training.batch_order import BatchOrder
from ecore.training.checkpoint import Progress
from ecore.training.console import Console, machine, opening
from ecore.training.cuda_graphs import CapturedStep, Recorder, Taken, recorder
from ecore.training.distributed import Processes
from ecore.training.graph_watch import GraphWatch
from ecore.training.interrupt import Interrupt
from ecore.training.journal import Journal, peak_memory_mib, sums
from ecore.training.objective import objective
from ecore.training.run_folder import Settings
from ecore.training.schedule import adam, noam, set_rate
from ecore.training.tracker import Tracker
from ecore.training.validation import Validator

CHECKPOINT_SECONDS = 120.0
"""Between checkpoints, where no number of steps is given: a fast run writes few, a slow one loses little."""
clock = time.monotonic
"""Clock for the time between checkpoints, in seconds; tests replace it."""


class NotFinite(ArithmeticError):
    """Training has diverged; the message says where and what to try. The last good checkpoint is kept."""


@dataclass(frozen=True)
class Summary:
    """The result of :func:`train`."""

    run: str
    step: int
    max_steps: int
    best_step: int | None
    best_ppl_per_sample: float | None
    interrupted: bool
    stopped_early: bool
    seconds: float
    peak_memory_mib: float


def train(
    run: Path,
    data: PreparedData,
    model_config: ModelConfig | None = None,
    training: TrainingConfig | None = None,
    *,
    device: str | torch.device = "cpu",
    resume: bool = False,
    max_steps: int | None = None,
    preset: str | None = None,
    progress: bool = True,
    processes: Processes | None = None,
    log_to: str | None = None,
) -> dict[str, Any]:
    """Train a new model in ``run``, or resume the one that is there.

    On a CPU, with the same number of threads, an interrupted and resumed run has the losses of one that was
    never stopped, bit for bit.

    Args:
        model_config, training: settings of a new run; a resumed one has its own. Precision "auto" is settled here, and
            the run's settings have the one that was found.
        max_steps: steps to train, counted from the run's beginning; over ``training.max_steps``.
        preset: name of the settings, for the run's records.
        processes: those that train together (:func:`ecore.training.distributed.join`), each calling this
            function alike; default this one alone. Each takes its share of every batch, so samples and averaged
            gradients are those of one process with the same ``batch_size``; random masks of dropout are not.
        log_to: "wandb" or "trackio": the log goes there, too.

    Returns:
        :class:`Summary` as a dictionary. After Ctrl-C or SIGTERM ``interrupted`` is true, and the checkpoint
        of the last step is written.

    Raises:
        InputError: the folder or the data cannot be used.
        NotFinite: a loss or a weight is not finite.
    """
    run, device, processes = Path(run), torch.device(device), processes or Processes()
    if resume:
        if model_config is not None or training is not None:
            raise InputError(f"{run}: a resumed run keeps its own settings; give none")
        settings = run_folder.resume(run, data, max_steps)
    else:
        training = training or TrainingConfig()
        if max_steps is not None:
            training = replace(training, max_steps=max_steps)
        found = settle(training.precision, device) if processes.first else None
        if training.precision == "auto":  # one process measures for all, who must agree
            found = next(one for one in processes.gather(found) if one is not None)
        precision, notice = found or (training.precision, None)
        training = replace(training, precision=precision)
        if notice is not None and processes.first:
            print(notice, file=sys.stderr)
        settings = Settings(model_config or ModelConfig(), training, run_folder.describe(data), preset)
    tracker = Tracker(log_to) if log_to is not None and processes.first else None
    with contextlib.ExitStack() as held:
        if processes.first:
            held.enter_context(run_folder.alone(run))
        return _train(run, data, settings, device, resume, progress, processes, tracker)


def _train(
    run: Path,
    data: PreparedData,
    settings: Settings,
    device: torch.device,
    resume: bool,
    progress: bool,
    processes: Processes,
    tracker: Tracker | None,
) -> dict[str, Any]:
    if processes.first and not resume:
        run_folder.expect_new(run)
    if settings.training.cuda_graphs and settings.model.model == "cem":
        raise InputError("--cuda-graphs: not with --model cem, whose batches are not on the GPU")
    captures = recorder(settings.training, settings.model.backbone, device, processes.count, resumed=resume)
    if settings.training.compile and processes.count > 1:
        raise InputError(f"--compile: expected one process, these are {processes.count}")
    torch.manual_seed(settings.training.seed)
    model = pretrained.build(settings.model, data, run).to(device)
    if tracker is not None:
        tracker.begin(run, asdict(settings.model) | asdict(settings.training))
    if not resume and processes.first:  # only now: settings that make no model should leave no folder
        run_folder.start(run, data, settings)
    if processes.first:
        pretrained.save_parts(model, run)
    if tracker is not None:
        tracker.remember(run)
    processes.wait()
    trainer = Trainer(
        run, data, model, settings, device, progress and processes.first, processes, captures, tracker
    )
    try:
        if processes.first:
            settings.write(run)
        return asdict(trainer.run())
    finally:
        trainer.close()


class Trainer:
    """One process's work on a run."""

    def __init__(
        self,
        run: Path,
        data: PreparedData,
        model: EmpatheticModel,
        settings: Settings,
        device: torch.device,
        show_progress: bool,
        processes: Processes,
        captures: Recorder | None,
        tracker: Tracker | None,
    ) -> None:
        self.folder, self.data, self.model, self.device = run, data, model, device
        self.settings, self.config, self.processes = settings, settings.training, processes
        self.train_split = model.view(data.train, show_progress)
        valid_split = model.view(data.valid, show_progress)
        self.low_weights = LowWeights(model, self.config.precision)
        self.optimizer = adam(p for p in model.parameters() if p.requires_grad)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.config.precision == "float16")
        self.saved_step: int | None = None
        """Step of the last checkpoint."""
        self.saved_at = clock()
        self.state = self._restored()
        self.journal = Journal(run, self.state, processes, tracker)
        self.graph_watch = GraphWatch(self.config.warmup, self.state)
        # That is where an interrupted run may end at its present step.
        ends_here = 0 < self.state.step == self.config.max_steps
        reopened = ends_here and self.journal.reopen(self._line)
        self.journal.open()
        self.interrupt = Interrupt()
        self.console = Console(show_progress, self.state.step, self.config.max_steps)
        self.order = BatchOrder(
            self.train_split, self.config.batch_size, self.config.seed, self.state, processes
        )
        # On a GPU the data set lies on the device, and the host sends nothing but the samples' numbers.
        on_device = device.type == "cuda" or captures is not None
        self.source = resident(self.train_split, device) if on_device else self.train_split
        self.validator = Validator(model, valid_split, device, self.config, processes)
        self.loss = objective(model, self.config.compile, processes.count)
        if reopened:  # the log was cut before the line: only the checkpoint has it now
            self._save()
        self.captured: CapturedStep | None = None
        if captures is not None:
            size, notice = self.config.batch_size, self.console.notice
            self.captured = CapturedStep(
                self.source, size, self._whole_step, self.optimizer, captures, notice
            )

    def _restored(self) -> Progress:
        """Load the last checkpoint; return where training resumes: at the beginning where there is none."""
        rank, count = self.processes.rank, self.processes.count
        state = checkpoint.load(self.folder, self.model, self.optimizer, rank, count)
        if state is None:
            if rank:
                torch.manual_seed(self.config.seed + rank)  # other masks than the first process's
            return Progress()
        if self.config.max_steps < state.step:
            steps = f"--max-steps {self.config.max_steps}"
            raise InputError(f"{self.folder}: already trained for {state.step} steps; {steps} is fewer")
        if state.scaler:
            self.scaler.load_state_dict(state.scaler)
        self.saved_step = state.step
        return state

    def run(self) -> Summary:
        """Train until the last step, the end of patience or an interruption."""
        where = machine(self.device, self.config, self.processes.count, self.captured is not None)
        words = opening(self.folder, self.settings, self.data, self.model, self.state.step, where)
        self.console.open(words, self.journal.no_events)
        began = time.perf_counter()
        self.journal.restart_clock()
        with self.interrupt, float32_products(self.device.type, self.config.precision):
            self._conclude_step()  # an interrupted run may still owe its validation
            while not (self._ended() or self._interrupted()):
                self._take_step()
                self._conclude_step()
            if self.state.step != self.saved_step:
                self._save()
        return Summary(
            run=str(self.folder),
            step=self.state.step,
            max_steps=self.config.max_steps,
            best_step=self.state.best_step,
            best_ppl_per_sample=self.state.best,
            interrupted=self._interrupted() and (not self._ended() or self.journal.waiting is not None),
            stopped_early=self._stale() and self.state.step < self.config.max_steps,
            seconds=time.perf_counter() - began,
            peak_memory_mib=peak_memory_mib(self.device),
        )

    def close(self) -> None:
        """Close the log and the progress bar."""
        self.journal.close()
        self.console.close()

    def _interrupted(self) -> bool:
        return self.processes.any(self.interrupt.requested)

    def _ended(self) -> bool:
        return self.state.step >= self.config.max_steps or self._stale()

    def _stale(self) -> bool:
        return self.config.patience is not None and self.state.stale >= self.config.patience

    def _validates(self) -> bool:
        return self.state.step % self.config.validate_every == 0 or self.state.step == self.config.max_steps

    # One step

    def _take_step(self) -> None:
        state, config = self.state, self.config
        state.step += 1
        regular = (
            state.step == 1 or state.step % config.log_every == 0 or state.step % config.validate_every == 0
        )
        logs = regular or state.step == config.max_steps
        set_rate(self.optimizer, self._rate())
        if not self.model.training:  # going through all modules is slow
            self.model.train()
        if self.captured is not None:
            health = self._captured_step(self.captured, logs)
        else:
            with self.low_weights():
                health = self._accumulated_step(logs)
        self.journal.count(steps=1)
        self.console.advance()
        if logs:
            self._settle()
            line = self._line() | {f"health_{name}": float(v) for name, v in health.items()}
            self.journal.note(line)
            warning = self.graph_watch.look(line, len(self.order.present.samples))
            if warning is not None and self.processes.first:
                self.console.notice(warning)
            self.console.show_losses(line)
            # The last step may log early; should the run be prolonged, its next regular line must not notice.
            if regular:
                self.journal.begin_window()

    def _accumulated_step(self, health: bool) -> dict[str, Tensor]:
        """Forward and backward on each batch of a step, then the optimiser; the health values where requested."""
        config = self.config
        for number in range(config.accumulate):
            samples, share, batch_size = self.order.take()
            # Gradients travel between processes once a step.
            waits = self.processes.count > 1 and number + 1 < config.accumulate
            with self.loss.no_sync() if waits else contextlib.nullcontext():
                with self._forward():
                    batch = self.source.batch(samples).to(self.device)
                    losses = self.loss(batch, health, int(self.train_split.response_lengths[samples].sum()))
                # DistributedDataParallel takes the mean over the processes, whose shares may differ in size.
                weight = share * self.processes.count / config.accumulate
                self.scaler.scale(losses.total if weight == 1.0 else losses.total * weight).backward()
            self.journal.add(sums(losses, share))
            self.journal.count(samples=batch_size, batches=1)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return losses.health

    def _captured_step(self, step: CapturedStep, health: bool) -> dict[str, Tensor]:
        """The same on one batch, as a graph where there is one."""
        samples, _, batch_size = self.order.take()
        with self._split_may_refuse():
            taken = step(samples, health)
        self.journal.add(taken.sums)
        self.journal.count(samples=batch_size, batches=1)
        return taken.health

    def _whole_step(self, batch: Batch, tokens: int, health: bool) -> Taken:
        """Run the work of one recording."""
        with self._autocast(), self.low_weights():
            losses = self.loss(batch, health, tokens)
        losses.total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Taken(sums(losses, 1.0), losses.health)

    def _conclude_step(self) -> None:
        """Validate, log and save where the step just taken requires it."""
        state = self.state
        if self.journal.waiting is not None:
            results: dict[str, float] = {}
            if self._validates():
                validated = self._validate()
                if validated is None:  # interrupted: the line goes into the checkpoint and waits
                    return
                results = validated
                self._judge(results)
            self.journal.write(**results)
            if self._validates():
                self._save()
        if state.step not in (0, self.saved_step) and self._checkpoint_due():
            self._save()

    def _checkpoint_due(self) -> bool:
        if self.config.checkpoint_every is not None:
            return self.state.step % self.config.checkpoint_every == 0
        # All save together, and clocks differ: the first process's decides.
        return self.processes.any(self.processes.first and clock() - self.saved_at >= CHECKPOINT_SECONDS)

    @contextlib.contextmanager
    def _forward(self) -> Iterator[None]:
        """Return the context of every forward pass."""
        with self._autocast(), self._split_may_refuse():
            yield

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self.device.type, self.config.precision)

    @contextlib.contextmanager
    def _split_may_refuse(self) -> Iterator[None]:
        """On a CPU the hard strategy's split raises on values that are not finite, before any loss shows them."""
        try:
            yield
        except ValueError as error:
            if self.processes.count == 1:  # the others are not here to add theirs
                self._settle()
            raise self._diverged(self.state.step, str(error)) from None

    # The log

    def _settle(self) -> None:
        """Look at the losses of the steps since the last look, or stop where one is not finite."""
        found = self.journal.settle()
        if found is not None:
            step = self.state.step - found.later // self.config.accumulate
            raise self._diverged(step, f"the {found.name} loss is {found.value}")

    def _diverged(self, step: int, what: str) -> NotFinite:
        kept = (
            "no checkpoint was written yet" if self.saved_step is None else f"step {self.saved_step} is kept"
        )
        return NotFinite(
            f"{self.folder}: stopped, {what} at step {step} ({kept}); "
            "try a new run with a smaller --factor, a longer --warmup or --precision float32"
        )

    def _rate(self) -> float:
        return noam(self.state.step, self.settings.model.dim, self.config.warmup, self.config.factor)

    def _line(self) -> dict[str, Any]:
        averages = self.journal.averages()
        if not self.settings.model.perceives:
            del averages["emotion_accuracy"]
        where = {"step": self.state.step, "epoch": self.state.epoch}
        return {**where, **averages, "lr": self._rate(), "peak_memory_mib": peak_memory_mib(self.device)}

    # Validation and checkpoints

    def _validate(self) -> dict[str, float] | None:
        """Score the validation split, or its first samples; None where an interruption came in between."""
        began = time.perf_counter()
        with torch.no_grad(), self.low_weights():
            scored = self.validator.score(
                self._forward, lambda: self.interrupt.requested, self.console.validating
            )
        if scored is None:
            return None
        results = validation.results(scored)
        if results is None:
            raise self._diverged(self.state.step, "the validation loss is not finite")
        if not self.settings.model.perceives:
            del results["valid_emotion_accuracy"]
        self.journal.restart_clock()
        return results | {"valid_seconds": time.perf_counter() - began}

    def _judge(self, results: dict[str, float]) -> None:
        # A validation that only the run's end required does not count against it, should the run be prolonged.
        regular = self.state.step % self.config.validate_every == 0
        better = validation.judge(self.state, results["valid_ppl_per_sample"], regular)
        self.console.show_validation(self.state.step, results, better)

    def _save(self) -> None:
        self._settle()
        if not torch.isfinite(torch.nn.utils.get_total_norm(self.model.parameters())):
            raise self._diverged(self.state.step, "a weight is not finite")
        self.state.scaler = self.scaler.state_dict()
        random = self.processes.gather(checkpoint.random_state(self.device))
        self.journal.sync()
        if self.processes.first:
            checkpoint.save(self.folder, self.model, self.optimizer, self.state, random)
        self.saved_step, self.saved_at = self.state.step, clock()
        self.journal.restart_clock()
