"""The parts of decoder layers and memories: projections, norms, RoPE, gathers of sharded weights.

Letters for axes, here and in every einsum: B batch, T tokens, S keys, C block, M FAM length, N blocks, L layers,
D width, H query heads, K key/value heads, G = H / K, hd head width, F feed-forward width, V vocabulary, m cached
blocks, R previous FAMs that a token sees, W tokens of a piece (a part of a block). Blocks are counted from 0; F_tau is
the FAM after block tau, F_{-1} the initial one.
"""
