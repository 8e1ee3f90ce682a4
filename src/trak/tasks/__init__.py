"""Tasks: what f is, from a model and a batch."""

from trak.tasks.base import Task
from trak.tasks.classification import ImageClassification, TextClassification
from trak.tasks.custom import CustomTask, resolve_task
from trak.tasks.regression import Regression

__all__ = ["CustomTask", "ImageClassification", "Regression", "Task", "TextClassification", "resolve_task"]
