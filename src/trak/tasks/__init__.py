"""Tasks: what f is, from a model and a batch."""

from trak.tasks.base import Task
from trak.tasks.causal_lm import CausalLM
from trak.tasks.classification import ImageClassification, TextClassification
from trak.tasks.contrastive import ContrastivePairs
from trak.tasks.custom import CustomTask, resolve_task
from trak.tasks.dense import DenseClassification
from trak.tasks.diffusion import Diffusion
from trak.tasks.dual_encoder import DualEncoder
from trak.tasks.masked_lm import MaskedLM
from trak.tasks.regression import Regression
from trak.tasks.seq2seq_lm import Seq2SeqLM

__all__ = [
    "CausalLM",
    "ContrastivePairs",
    "CustomTask",
    "DenseClassification",
    "Diffusion",
    "DualEncoder",
    "ImageClassification",
    "MaskedLM",
    "Regression",
    "Seq2SeqLM",
    "Task",
    "TextClassification",
    "resolve_task",
]
