"""Benchmarks: each measures paratrain next to a hand-written loop or a rival in the same run, interleaved, and writes its result."""
