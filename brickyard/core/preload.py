"""Imported once by the forkserver, so that every job starts with these modules loaded. Runs no tensor operation."""

import accelerate
import numpy
import peft
import scipy.stats
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import brickyard.core.trial

__all__ = [
    "AutoModelForSequenceClassification",
    "AutoTokenizer",
    "accelerate",
    "brickyard",
    "numpy",
    "peft",
    "scipy",
    "torch",
    "transformers",
]
