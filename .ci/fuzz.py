#!/usr/bin/env python3
"""Run the fuzzers of test_fingerd.py for long: python3 .ci/fuzz.py

Each round fuzzes a server with queries, and the reader of configs, with the
next seed.  The first round that fails ends it, and its seed is named.
"""

import argparse
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from test_fingerd import fuzz_round


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Run the fuzzers of test_fingerd.py for long.")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1288,
                        help="of the first round (default 1288)")
    options = parser.parse_args()
    until = time.monotonic() + options.seconds
    seed = options.seed
    while time.monotonic() < until:
        try:
            fuzz_round(seed)
        except Exception:
            print(f"--seed {seed} fails:", file=sys.stderr)
            raise
        seed += 1
    print(f"{seed - options.seed} rounds, the last with --seed {seed - 1}:"
          " nothing found")


if __name__ == "__main__":
    main()
