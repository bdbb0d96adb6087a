"""The plan of a reproduction: each table's variants of the model, their seeds, and a folder for each run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ecore.config import (
    PRESETS,
    PUBLISHED_SIZES,
    WORD_LEVEL,
    ModelConfig,
    TrainingConfig,
    for_model,
    from_dict,
    to_dict,
)
from ecore.data.intensity import FILE_SOURCES
from ecore.data.prepared import PreparedData
from ecore.errors import InputError
from ecore.files import read_json, write_json
from ecore.paper.published import HARD, MULTITASK, SEEDS, SOFT, TABLES, TRANSFORMER
from ecore.pretrained import FORMAT

SETTINGS = "settings.json"
STRATEGIES = {SOFT: "soft", HARD: "hard"}
INTENSITIES = {
    "-SKEP": "skep",
    "-VAD": "vad",
    "-VADER": "vader",
    "-SentiWordNet": "sentiwordnet",
    " w/o": "none",
}
"""Table 9's rows by the end of their name, and the source of word intensities that each takes."""

RIVALS = {MULTITASK: "transformer", "MIME": "mime", "EmpDG": "empdg", "KEMP": "kemp", "CEM": "cem"}
"""Rows of Table 1 that are other systems, and the models that they can be trained as."""
OUR_SIZE = ", at our size"
"""End of the name of a rival's second row."""
SIZES = ("dim", "encoder_blocks", "decoder_blocks", "heads", "attention_dim", "feed_forward", "dropout")
"""Settings that a rival at its published size has from the preset of these sizes."""

FINE_TUNING: dict[str, Any] = {"dropout": 0.1, "factor": 0.03, "warmup": 1_000}
"""Settings of runs on a backbone where the user set none: the preset's learning rate would wash out what the
backbone has learned."""


@dataclass(frozen=True)
class Variant:
    """The settings in which one trained row differs from the others."""

    strategy: str
    ablations: tuple[str, ...] = ()
    commonsense: bool = True
    intensity: str | None = None
    """Source of word intensities; None takes the prepared data's own."""
    backbone: str | None = None
    model: str = "ecore"
    inferences: str | None = None
    """File that CEM reads."""
    published_size: bool = False
    """A rival has the sizes at which its authors publish it, and not those of all runs."""

    @property
    def name(self) -> str:
        """As in the run's folder: ``soft-without-co-p``, ``transformer``, ``hard-intensity-vad``, ``mime``."""
        if self.model != "ecore":
            # A plain Transformer is "transformer" already.
            name = "multitask-transformer" if self.model == "transformer" else self.model
            return f"{name}-published" if self.published_size else name
        plain = self.strategy == "none"
        parts = ["transformer" if plain else self.strategy]
        if self.backbone is not None:
            parts.append(Path(self.backbone).name)
        parts += [f"without-{part}" for part in self.ablations]
        if not self.commonsense:
            parts.append("without-commonsense")
        if self.intensity is not None:
            parts.append(f"intensity-{self.intensity}")
        return "-".join(parts)


@dataclass(frozen=True)
class Brought:
    """The user's own inputs besides the prepared data; they decide which rows can be trained."""

    intensity: str
    """Source of word intensities of the prepared data."""
    relations: bool
    """True if the prepared data has commonsense relations; runs then use them."""
    intensity_files: Mapping[str, Path]
    multi_emotion: Path | None = None
    backbone: str | None = None
    baselines: bool = False
    """True if Table 1's other systems are trained, too."""
    inferences: str | None = None


def rows_of(table: str, brought: Brought) -> dict[str, Variant | str]:
    """The rows of ``table`` that are ours, in its order: what to train for each, or why it cannot be trained.

    Table 8 has rows without commonsense at its end, which the paper leaves out; Table 1 with ``baselines`` two rows of
    each rival.
    """
    rows: dict[str, Variant | str] = {}
    for name in TABLES[table].rows:
        heading = next((h for h in (SOFT, HARD) if name.startswith(h)), None)
        if name == TRANSFORMER:
            rows[name] = Variant(
                "none"
            )  # with related words where ours have them: rows differ in the method alone
        elif heading is not None:
            rows[name] = _row(table, STRATEGIES[heading], name.removeprefix(heading), brought)
    if table == "table1" and brought.baselines:
        for name, model in RIVALS.items():
            for ending, published_size in (("", True), (OUR_SIZE, False)):
                rows[name + ending] = _rival(model, published_size, brought)
    if table == "table8" and brought.relations:
        for heading, strategy in STRATEGIES.items():
            rows[f"{heading} w/o commonsense"] = Variant(strategy, commonsense=False)
    return rows


def _rival(model: str, published_size: bool, brought: Brought) -> Variant | str:
    if model == "kemp" and not brought.relations:
        return "needs data prepared with --relations FILE"
    if model == "cem" and brought.inferences is None:
        return "needs --inferences FILE"
    inferences = brought.inferences if model == "cem" else None
    return Variant("none", model=model, inferences=inferences, published_size=published_size)


def _row(table: str, strategy: str, ending: str, brought: Brought) -> Variant | str:
    if table == "table3" and brought.multi_emotion is None:
        return "needs --multi-emotion FILE"
    if table == "table6":
        return Variant(strategy, backbone=brought.backbone) if brought.backbone else "needs --backbone NAME"
    if table == "table9":
        source = INTENSITIES[ending]
        if source == brought.intensity:
            return Variant(strategy)
        if source in FILE_SOURCES and source not in brought.intensity_files:
            return f"needs --intensity-file {source}=FILE"
        return Variant(strategy, intensity=source)
    return Variant(strategy, (ending.removeprefix(" w/o "),) if ending else ())


def comparisons(table: str, names: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs (A, B) of which the paper says that A outperforms B, among ``names``, the rows of ``table``.

    Ours over the plain Transformer and over CEM, the best baseline of Appendix G; a whole model over its
    ablations; in Table 9 every source of intensities over none.
    """
    pairs = []
    for heading in (SOFT, HARD):
        ours = [name for name in names if name.startswith(heading)]
        if table == "table9":
            pairs += [(name, f"{heading} w/o") for name in ours if not name.endswith(" w/o")]
        elif table in ("table4", "table8"):
            pairs += [(heading, name) for name in ours if name != heading]
        elif table == "table6":
            pairs += [(name, "CEM-DialoGPT") for name in ours]
        else:
            pairs += [(heading, other) for other in (TRANSFORMER, "CEM") if other == "CEM" or other in names]
    return pairs


def seeds_of(
    tables: Iterable[str], rows: Mapping[str, Mapping[str, Variant | str]], seeds: int | None
) -> dict[Variant, int]:
    """Return the number of seeds of each variant: ``seeds``, or else five for Table 7's rows and one for the others.

    A variant that several tables show is listed once.
    """
    counts: dict[Variant, int] = {}
    for table in tables:
        for variant in rows[table].values():
            if isinstance(variant, Variant):
                wanted = seeds or (SEEDS if table == "table7" else 1)
                counts[variant] = max(wanted, counts.get(variant, 0))
    return counts


@dataclass(frozen=True)
class Settings:
    """Settings that all runs of one folder share, and that may not change between calls."""

    preset: str
    model: ModelConfig
    training: TrainingConfig
    literal_thresholds: bool = False
    limit: int | None = None
    """Samples of the test split that are scored; None takes all."""

    def agree(self, out: Path, data: PreparedData) -> None:
        """Note the settings in ``out``, or check that they are those noted there.

        Raises:
            InputError: ``out`` was begun with others, or holds something else.
        """
        path = out / SETTINGS
        own = {
            "preset": self.preset,
            "literal_thresholds": self.literal_thresholds,
            "limit": self.limit,
            "data": data.meta["fingerprint"],
        }
        if not path.exists():
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise InputError(
                    f"{out}: holds something else (no {SETTINGS}); expected a new folder, or one begun by "
                    "`ecore reproduce`"
                )
            out.mkdir(parents=True, exist_ok=True)
            model, training = to_dict(self.model), to_dict(self.training)
            written = {
                "format": FORMAT,
                **own,
                "folder": str(data.folder),
                "model": model,
                "training": training,
            }
            write_json(path, written)
            return
        stored = read_json(path)
        if isinstance(stored, dict) and stored.get("format", 1) != FORMAT:
            raise InputError(
                f"{path}: its runs are of format {stored.get('format', 1)}, those of now of {FORMAT}: they do not "
                "belong in one table; take another --out"
            )
        try:
            before = (
                {name: stored[name] for name in own}
                | asdict(from_dict(ModelConfig, stored["model"]))
                | asdict(from_dict(TrainingConfig, stored["training"]))
            )
        except (KeyError, TypeError, InputError) as error:
            raise InputError(f"{path}: damaged ({error}); expected what `ecore reproduce` wrote") from None
        for name, value in (own | asdict(self.model) | asdict(self.training)).items():
            if before[name] != value:
                flag = _flag(f"no-{name}" if value is False and name not in own else name)
                raise InputError(
                    f"{flag}: {out} was begun with {_shown(before[name])}, not {_shown(value)}; take the "
                    "same again or another --out"
                )


def _flag(name: str) -> str:
    return "--" + {"max_steps": "steps"}.get(name, name).replace("_", "-")


def _shown(value: Any) -> str:
    return "none" if value is None else " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


@dataclass(frozen=True)
class Run:
    """One model to train and score."""

    variant: Variant
    seed: int
    folder: Path
    data: Path
    model: ModelConfig
    training: TrainingConfig

    @property
    def name(self) -> str:
        return self.folder.name


def plan_runs(
    counts: Mapping[Variant, int], out: Path, settings: Settings, data: Mapping[str | None, PreparedData]
) -> list[Run]:
    """The runs of all variants, a seed of every variant before the next: tables fill evenly.

    Args:
        data: the prepared data for each source of intensities that a variant names, ``None`` for the own.
    """
    runs = []
    for seed in range(max(counts.values(), default=0)):
        for variant, number in counts.items():
            if seed < number:
                prepared = data[variant.intensity]
                model, training = configured(variant, settings)
                thresholds = prepared.thresholds(model.thresholds, settings.literal_thresholds)
                runs.append(
                    Run(
                        variant,
                        seed,
                        out / "runs" / f"{variant.name}-seed{seed}",
                        Path(os.path.realpath(prepared.folder)),
                        replace(model, thresholds=thresholds),
                        replace(training, seed=seed),
                    )
                )
    return runs


def configured(variant: Variant, settings: Settings) -> tuple[ModelConfig, TrainingConfig]:
    """The settings of a variant's runs: those of all, less what it has no use for.

    Raises:
        InputError: what is left is at odds with itself.
    """
    model, training = settings.model, settings.training
    if variant.model != "ecore":
        if variant.published_size:
            published = PRESETS[PUBLISHED_SIZES][0]
            model = replace(model, **{name: getattr(published, name) for name in SIZES})
        model = replace(for_model(model, variant.model), inferences=variant.inferences)
        if variant.model == "cem":  # whose batches are not on the GPU
            training = replace(training, cuda_graphs=False)
        return model, training
    if variant.backbone is not None:
        preset_model, preset_training = PRESETS[settings.preset]
        if model.dropout == preset_model.dropout:
            model = replace(model, dropout=FINE_TUNING["dropout"])
        for name in ("factor", "warmup"):
            if getattr(training, name) == getattr(preset_training, name):
                training = replace(training, **{name: FINE_TUNING[name]})
        unused = {name: getattr(ModelConfig(), name) for name in WORD_LEVEL}
        model = replace(model, backbone=variant.backbone, **unused)
    if variant.strategy == "none":
        model = replace(model, emotion_start=False)
    if not variant.commonsense:
        model = replace(model, commonsense=False)
    return replace(model, strategy=variant.strategy, ablations=variant.ablations), training
