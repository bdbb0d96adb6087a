"""The command `ecore annotate`, and an edit of a file that it wrote."""

import argparse

from ecore.cli.annotate import declare_annotate, run_annotate


def command(*words):
    parser = argparse.ArgumentParser()
    declare_annotate(parser)
    return run_annotate(parser.parse_args([str(word) for word in words]))


def edit(path, old, new):
    text = path.read_text(encoding="utf-8-sig")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
