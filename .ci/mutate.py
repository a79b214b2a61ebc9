#!/usr/bin/env python3
"""Show what the tests miss: python3 .ci/mutate.py --seed 1 --count 60

A mutant is the program with one small change: another comparison, a number
one higher, or no exit (return, raise, break, continue) at the end of an "if".
The tests run on a copy of the files up to the first failure.  A mutant that
fails none has SURVIVED: no test looks at that code, or the change makes no
difference.

As root each run has its own processes and its own loopback: a mutant signals
nobody else and leaves nothing behind, and jobs side by side do not meet.
"""

from __future__ import annotations

import argparse
import ast
import functools
import itertools
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Iterator, NamedTuple

HERE = pathlib.Path(__file__).resolve().parent.parent
PROGRAM = ("fingerd.py", "fingerd_backends.py")
FILES = (*PROGRAM, "test_fingerd.py", "fingerd.conf.example", "README")
ALONE = ["unshare", "--pid", "--net", "--fork", "--mount-proc",
         "--kill-child", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
SWAPPED: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"), ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"), ast.NotIn: ("not in", "in")}


class Mutant(NamedTuple):
    """A file, and which of its bytes become others."""

    path: str
    line: int
    start: int
    old: bytes
    new: bytes

    def applied(self, source: bytes) -> bytes:
        end = self.start + len(self.old)
        return source[:self.start] + self.new + source[end:]

    def __str__(self) -> str:
        old, new = (" ".join(text.decode().split())
                    for text in (self.old, self.new))
        return f"{self.path}:{self.line}: {old} -> {new}"


class Finder(ast.NodeVisitor):
    """Collects the mutants of a file."""

    def __init__(self, path: str, source: bytes) -> None:
        self.path = path
        self.source = source
        self.lines = [0, *itertools.accumulate(
            map(len, source.splitlines(keepends=True)))]
        self.found: list[Mutant] = []
        self.visit(ast.parse(source))

    def place(self, line: int, column: int) -> int:
        return self.lines[line - 1] + column

    def add(self, line: int, start: int, end: int, new: str) -> None:
        self.found.append(Mutant(self.path, line, start,
                                 self.source[start:end], new.encode()))

    def replace(self, node: Any, new: str) -> None:
        self.add(node.lineno, self.place(node.lineno, node.col_offset),
                 self.place(node.end_lineno, node.end_col_offset), new)

    def visit_Compare(self, node: Any) -> None:
        sides = [node.left, *node.comparators]
        for op, left, right in zip(node.ops, sides, sides[1:]):
            old, new = SWAPPED[type(op)]
            start = self.source.index(old.encode(), self.place(
                left.end_lineno, left.end_col_offset))
            self.add(right.lineno, start, start + len(old), new)
        self.generic_visit(node)

    def visit_Constant(self, node: Any) -> None:
        if isinstance(node.value, bool):
            self.replace(node, repr(not node.value))
        elif isinstance(node.value, (int, float)):
            self.replace(node, repr(node.value + 1))

    def visit_If(self, node: Any) -> None:
        for last in (node.body[-1], *node.orelse[-1:]):
            if isinstance(last, (ast.Return, ast.Raise, ast.Break,
                                 ast.Continue)):
                self.replace(last, "pass")
        self.generic_visit(node)

    def visit_JoinedStr(self, node: Any) -> None:
        """Pass over f-strings: old Pythons misplace what is in them."""


@functools.lru_cache(maxsize=8)
def shape(source: bytes) -> list[Any]:
    """Give what a source is compiled to, without line numbers."""
    def of(code: types.CodeType) -> list[Any]:
        return [code.co_code, code.co_names, code.co_varnames,
                [of(value) if isinstance(value, types.CodeType)
                 else repr(value) for value in code.co_consts]]
    return of(compile(source, "", "exec"))


def first_failure(tree: str, limit: float, *words: str) -> str | None:
    """Run tests; give the first that fails, or what else went wrong."""
    alone = ALONE if os.geteuid() == 0 and shutil.which("unshare") else []
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [*alone, sys.executable, "-m", "unittest", "-f", *words],
            cwd=tree, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=said, start_new_session=True)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "the time limit"
        said.seek(0)
        failed = re.search(rb"(?m)^(?:FAIL|ERROR): (\w+)", said.read())
    if status == 0:
        return None
    return failed[1].decode() if failed else f"status {status}"


def killer(limit: float, mutant: Mutant | None = None) -> str | None:
    """Give the test that fails a mutant twice: once may be chance."""
    with tempfile.TemporaryDirectory() as tree:
        os.chmod(tree, 0o755)       # some tests are an ordinary user's
        for file in FILES:
            shutil.copy(HERE / file, tree)
        if mutant:
            path = pathlib.Path(tree, mutant.path)
            path.write_bytes(mutant.applied(path.read_bytes()))
        for _ in range(3):
            name = first_failure(tree, limit)
            if not name or not name.startswith("test_"):
                break
            if first_failure(tree, limit, "-k", name):
                break
    return name


def mutants(seed: int) -> Iterator[Mutant]:
    """Give all mutants that differ from the program, in some order."""
    sources = {path: (HERE / path).read_bytes() for path in PROGRAM}
    found = [mutant for path, source in sources.items()
             for mutant in Finder(path, source).found]
    random.Random(seed).shuffle(found)
    for mutant in found:
        source = sources[mutant.path]
        if shape(source) != shape(mutant.applied(source)):
            yield mutant


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Change the program in small ways; do its tests see it?")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    start = time.monotonic()
    fails = killer(600)
    if fails:
        sys.exit(f"the tests fail without a mutant: {fails}")
    limit = 60 + 4 * options.jobs * (time.monotonic() - start)
    chosen = list(itertools.islice(mutants(options.seed), options.count))
    survived = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        run = functools.partial(killer, limit)
        for mutant, name in zip(chosen, pool.map(run, chosen)):
            survived += not name
            print(f"{mutant}: {f'killed by {name}' if name else 'SURVIVED'}",
                  flush=True)
    print(f"{survived} of {len(chosen)} survived,"
          f" {survived / len(chosen):.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
