"""Corpora: text and pictures with their licence, their source, a checksum where it matters, and a split."""

from __future__ import annotations

from tokenmill.corpora._corpus import Corpus, Record
from tokenmill.corpora._digit_scenes import COLOURS, Picture, Question, Thing, digit_scenes
from tokenmill.corpora._digit_scenes import KINDS as SCENE_KINDS
from tokenmill.corpora._digit_scenes import LICENCE as DIGITS_LICENCE
from tokenmill.corpora._digit_scenes import MOST as MOST_DIGITS
from tokenmill.corpora._exercises import (
    EXERCISE_TASKS,
    Exercise,
    ExerciseTask,
    Gap,
    answer_text,
    exercises,
    python_gaps,
)
from tokenmill.corpora._exercises import LETTERS as EXERCISE_LETTERS
from tokenmill.corpora._exercises import WINDOW as PYTHON_WINDOW
from tokenmill.corpora._page_scenes import KINDS as PAGE_KINDS
from tokenmill.corpora._page_scenes import LETTERS, Entry, page_scenes
from tokenmill.corpora._page_scenes import MOST as MOST_ENTRIES
from tokenmill.corpora._stdlib import LICENCE as PYTHON_LICENCE
from tokenmill.corpora._stdlib import load, names

__all__ = [
    "COLOURS",
    "Corpus",
    "DIGITS_LICENCE",
    "EXERCISE_LETTERS",
    "EXERCISE_TASKS",
    "Entry",
    "Exercise",
    "ExerciseTask",
    "Gap",
    "LETTERS",
    "MOST_ENTRIES",
    "PAGE_KINDS",
    "PYTHON_LICENCE",
    "PYTHON_WINDOW",
    "MOST_DIGITS",
    "Picture",
    "Question",
    "Record",
    "SCENE_KINDS",
    "Thing",
    "answer_text",
    "digit_scenes",
    "exercises",
    "load",
    "names",
    "page_scenes",
    "python_gaps",
]
