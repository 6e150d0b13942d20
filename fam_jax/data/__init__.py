"""Training and held-out data: sources of examples, batches made of them, and vocabularies.

Start at `build.py`, which makes the batches that a config asks for; `interface.py` says what sources and batches are.
Importing this package loads nothing. Some modules import TensorFlow (through seqio), which takes seconds.
"""
