"""Memory architectures: one interface, a file or two for each, one registry.

`interface.py` says what a memory is and docs/add_a_memory.md how to add one. `window.py` holds full, sliding window and
block sliding window attention, `fam.py` Feedback Attention Memory.
"""
