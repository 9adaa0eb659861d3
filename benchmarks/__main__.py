"""`python -m benchmarks [name ...]`: run the benchmarks of this machine's kind, all by default."""

from __future__ import annotations

import importlib
import sys

NAMES = ["import_time", "overhead", "recovery", "exactness", "sharding"]

for name in sys.argv[1:] or NAMES:
    print(f"--- {name}")
    importlib.import_module(f"benchmarks.{name}").main()
