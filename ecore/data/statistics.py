"""Statistics of a prepared folder's words in meta.json: lengths, intensities, thresholds."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ecore.data.batches import MAX_CONTEXT_WORDS, SplitArrays
from ecore.data.intensity import matched_thresholds
from ecore.data.vocabulary import PAD


def split_statistics(arrays: SplitArrays) -> dict[str, Any]:
    """Return how many samples a split has, and how long its contexts and responses are."""
    start, response, end = arrays.samples[:, :3].T
    return {
        "conversations": len(arrays.text_offsets) - 1,
        "samples": len(arrays.samples),
        "context_words": _spread(response - start),
        "response_words": _spread(end - response),
        "related_words": float((arrays.concepts != PAD).sum(axis=1).mean()),
    }


def _spread(lengths: npt.NDArray[np.int64]) -> dict[str, float]:
    p90, p99 = np.percentile(lengths, (90, 99))
    return {"mean": float(lengths.mean()), "p90": float(p90), "p99": float(p99), "max": int(lengths.max())}


def intensity_statistics(
    train: SplitArrays, bare: npt.NDArray[np.float32], floored: npt.NDArray[np.float32]
) -> dict[str, Any]:
    """Return matched thresholds and what passes each threshold, over the words of all training contexts.

    A turn's words count once for every context that holds them.

    Args:
        train: the training split.
        bare, floored: [V], every word's intensity before and after the floor.
    """
    words = np.asarray(train.words)
    start, end = np.asarray(train.samples)[:, :2].T
    change = np.zeros(len(words) + 1, dtype=np.int64)
    np.add.at(change, start, 1)
    np.add.at(change, end, -1)
    counts = np.bincount(words, weights=change.cumsum()[:-1], minlength=len(floored))
    total = max(counts.sum(), 1)
    matched = matched_thresholds(floored, counts)

    def shares(threshold: float) -> dict[str, float]:
        passes = floored >= np.float32(threshold)
        before = np.concatenate(([0], passes[words].cumsum()))
        return {
            "threshold": threshold,
            "words": float(counts[passes].sum() / total),
            "contexts": float((before[end] > before[start]).mean()),
        }

    return {
        "thresholds": {str(literal): threshold for literal, threshold in matched.items()},
        "zero_intensity": float(counts[bare == 0].sum() / total),
        "intensity_shares": {
            str(literal): {"literal": shares(literal), "matched": shares(threshold)}
            for literal, threshold in matched.items()
        },
    }


def describe(meta: dict[str, Any]) -> str:
    """Describe a prepared folder for people: its sizes, and how much passes each intensity threshold."""
    lines = [f"{'split':<8}{'conversations':>14}{'samples':>9}{'context words':>38}{'response words':>38}"]
    for name, split in meta["splits"].items():
        spreads = (
            "{mean:.1f} mean, {p90:.0f} p90, {p99:.0f} p99, {max} max".format(**split[key])
            for key in ("context_words", "response_words")
        )
        lines.append(
            f"{name:<8}{split['conversations']:>14}{split['samples']:>9}"
            + "".join(f"{s:>38}" for s in spreads)
        )
    truncated = sum(split["truncated_contexts"] for split in meta["splits"].values())
    lines.append(f"contexts cut to their last {MAX_CONTEXT_WORDS} words: {truncated}")
    skipped = sum(meta["skipped_lines"].values())
    lines.append(f"bad lines skipped: {skipped}")
    lines.append(f"vocabulary ({meta['vocabulary']}): {meta['vocabulary_size']} words, special ones counted")
    if meta["glove"]:
        types, tokens = (100 * meta["glove_coverage"][key] for key in ("types", "tokens"))
        lines.append(f"word vectors: {types:.1f} % of word types, {tokens:.1f} % of words")
    if meta["relations"]:
        related = meta["splits"]["train"]["related_words"]
        lines.append(f"related words: {related:.1f} a training context")
    lines.append(
        f"intensity ({meta['intensity']}): c = 0 for {100 * meta['zero_intensity']:.0f} % of the training "
        f"contexts' words, before the floor of {meta['intensity_floor']:g}"
    )
    if meta["intensity"] != "none":
        lines.append(f"{'threshold':<32}{'words over it':>16}{'contexts with any':>20}")
        for literal, kinds in meta["intensity_shares"].items():
            for kind, row in kinds.items():
                label = literal if kind == "literal" else f"{row['threshold']:.4g} matched to {literal}"
                lines.append(f"{label:<32}{100 * row['words']:>14.1f} %{100 * row['contexts']:>18.1f} %")
    return "\n".join(lines)
