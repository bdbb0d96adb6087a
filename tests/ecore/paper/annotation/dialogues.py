"""Dialogues to annotate, label files, and an annotator that answers as the test says."""

import json

from ecore.data.corpus import Conversation

EMOTIONS = ("afraid", "grateful", "joyful", "sad")


def conversation(conv_id="a", emotion="sad", *turns, situation="A secret."):
    return Conversation(conv_id, emotion, situation, turns or ("My dog died.", "Oh no."))


def labels_file(path, **labels):
    path.write_text("".join(json.dumps({"conv_id": i, "emotions": e}) + "\n" for i, e in labels.items()))
    return path


class Says:
    """Annotates with what it was given; an exception is raised."""

    name = "says"

    def __init__(self, **answers):
        self.answers = answers

    def annotate(self, conversation):
        answer = self.answers[conversation.conv_id]
        if isinstance(answer, BaseException):
            raise answer
        return tuple(answer.split())


FOUR = [
    conversation("a", "sad", "=1+1", "Yes.", 'He said "no", twice.'),
    conversation("b", "sad"),
    conversation("c", "joyful"),
    conversation("d", "afraid"),
]


SAID = {
    "a": "joyful sad afraid",
    "b": "joyful afraid",
    "c": "joyful grateful",
    "d": "afraid",
}
