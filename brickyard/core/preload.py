"""Imported once by the forkserver, so that every job starts with these modules loaded. Runs no tensor operation."""

import signal

# Ctrl-C reaches this process too, seconds before multiprocessing tells it to leave that to its parent.
signal.signal(signal.SIGINT, signal.SIG_IGN)

# ruff: noqa: E402
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
