"""Perceived emotions as features of a scikit-learn pipeline.

    pip install scikit-learn
    python examples/emotion_features.py ecore-demo/run

A transformer like scikit-learn's own: it clones, stands in pipelines and is searched over by name.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.validation import check_is_fitted

from ecore import ECore


class EmotionFeatures(TransformerMixin, BaseEstimator):
    """Texts to logarithms of their emotions' probabilities.

    Args:
        run: folder of a run, or name on the Hugging Face hub.
    """

    def __init__(self, run: str) -> None:
        self.run = run

    def fit(self, texts: Sequence[str], labels: object = None) -> EmotionFeatures:
        """Load the model, which learns nothing here."""
        self.model_ = ECore.from_pretrained(self.run)
        return self

    def transform(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return [texts, emotions]."""
        check_is_fitted(self)
        seen = self.model_.perceive(list(texts))
        rows = [[dict(text.emotions)[name] for name in self.get_feature_names_out()] for text in seen]
        return np.log(np.maximum(np.array(rows, np.float32), 1e-12))

    def get_feature_names_out(self, input_features: object = None) -> npt.NDArray[np.object_]:
        """Return the emotions' names, [emotions]."""
        check_is_fitted(self)
        return np.array(self.model_.model.vocabulary.emotions, object)


TEXTS = {
    "good": (
        "I passed my exam!", "My sister had a baby.", "We won the match.", "I got the job today.",
        "My best friend surprised me with a party.", "The doctor says that I am well again.",
    ),
    "bad": (
        "My dog died.", "Somebody broke into our house.", "I failed the test.", "My boss shouted at me.",
        "I am alone on my birthday.", "My car broke down on the motorway.",
    ),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="folder of a run, or name on the Hugging Face hub")
    run = parser.parse_args(arguments).run
    texts = [text for group in TEXTS.values() for text in group]
    labels = [label for label, group in TEXTS.items() for _ in group]
    pipeline = make_pipeline(EmotionFeatures(run), LogisticRegression(max_iter=1000))
    scores = cross_val_score(pipeline, texts, labels, cv=3)
    print(f"good or bad, {len(texts)} texts, three folds: accuracy {scores.mean():.2f}")
    pipeline.fit(texts, labels)
    names, weights = pipeline[0].get_feature_names_out(), pipeline[-1].coef_[0]
    for place in np.argsort(-np.abs(weights))[:5]:
        print(f"{names[place]:<14} speaks for {pipeline[-1].classes_[int(weights[place] > 0)]}")


if __name__ == "__main__":
    main()
