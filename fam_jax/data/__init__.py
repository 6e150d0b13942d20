"""PassKey data: vocabularies, seqio tasks and resumable training streams.

Importing this package loads nothing; its modules import TensorFlow (through seqio), which takes seconds.
"""
