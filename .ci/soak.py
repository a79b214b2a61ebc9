#!/usr/bin/env python3
"""Let everything go wrong at once: python3 .ci/soak.py --seconds 600

Runs a daemon with the backends users, finger and web, among clients,
programs and web pages that fail in every way, while its config is reloaded
and its log rotated.  Every good query gets its answer in time, no reply does
harm, and after each round no process, thread, descriptor or memory is left.
Prints a line for each round; an AssertionError reports the first fault.
Needs /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import os
import pathlib
import random
import re
import signal
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from test_fingerd import (
    HANG,
    HAPPY,
    UNSAFE_ON_WIRE,
    USERS,
    Origin,
    ask,
    background,
    connect,
    drip,
    raw,
    read_all,
    reset,
    text_page,
    wait_until,
)

MARK = "60.1288"        # seconds; names the processes that a program leaves
GROWTH = 16384          # KiB: what Python and malloc may keep for themselves
SLOWEST = HANG / 2      # seconds that a good answer may take
SCRIPT = f"""#!/bin/sh
case $1 in
    p-good) echo fine ;;
    p-fail) echo sorry >&2; exit 3 ;;
    p-hang) exec sleep {MARK} ;;
    p-flood) exec yes ;;
    p-fork) sleep {MARK} & (sleep {MARK} &) ; echo forked ;;
esac
"""
CONFIG = """
[server]
backend = users finger web
forward = 127.0.0.2:1
user_list = yes
[limits]
timeout = 0.5
max_clients_per_host = 5000
[finger]
command = {folder}/script {{user}}
pattern = p-[a-z]+
[web]
url = {url}/{{user}}
cache = 0
stale = 0
"""
GOOD = {b"moshez": HAPPY, b"p-good": b"fine\r\n", b"w-good": b"fine\r\n"}
BAD = [
    b"p-fail", b"p-hang", b"p-flood", b"p-fork", b"w-error", b"w-hang",
    b"w-drip", b"w-lie", b"w-reset", b"w-flood", b"w-noise", b"x@127.0.0.2",
    b"nobody", b"", b"\0", b"x" * 600, b"a b c d e f g h i", b"@@@@"]


def reset_page(handler):
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\nhalf")
    reset(handler.connection)


PAGES = {
    "/w-good": text_page("fine\n"),
    "/w-error": (500, {}, b"no"),
    "/w-hang": lambda handler: handler.server.leaving.wait(1),
    "/w-drip": drip(b"HTTP/1.0 200 OK\r\n\r\n"),
    "/w-lie": raw(b"HTTP/1.0 200 OK\r\nContent-Length: 99\r\n\r\nshort"),
    "/w-reset": reset_page,
    "/w-flood": raw(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n"
                    + b"x\n" * 500000),
    "/w-noise": raw(bytes(range(256)) * 40),
}


def processes_with(mark):
    """Give the processes with this in their command line."""
    found = []
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if mark.encode() in pathlib.Path(path).read_bytes():
                found.append(path)
    return found


class Soak:
    """A daemon, and what happens to it."""

    def __init__(self, program, config):
        self.program = program
        self.config = config
        self.address = program.address
        self.over = threading.Event()
        self.reloads = 0
        self.took: list[float] = []         # seconds, of the good queries
        self.asked = 0                      # queries that were to go wrong
        self.errors: list[Exception] = []
        self.least = self.descriptors()

    def ask_good(self, seeded):
        """Ask as anybody would: the answer is right, and in time."""
        line, reply = seeded.choice(list(GOOD.items()))
        start = time.monotonic()
        got = ask(self.address, line + b"\r\n")
        took = time.monotonic() - start
        self.took.append(took)
        if got != reply or took > SLOWEST:
            raise AssertionError(f"{line!r} got {got!r} after {took} s")

    def ask_bad(self, seeded):
        """Ask for trouble, or leave in the middle; no reply may do harm."""
        line = seeded.choice(BAD) + b"\r\n"
        self.asked += 1
        with connect(self.address) as sock:
            leave = seeded.randrange(4)
            if leave == 0:
                sock.sendall(line[:seeded.randrange(len(line))])
                reset(sock)
                return
            sock.sendall(line)
            if leave == 1:
                return
            reply = read_all(sock).decode()
        if not reply or UNSAFE_ON_WIRE.search(reply):
            raise AssertionError(f"{line!r} got {reply!r}")

    def stay_silent(self, seeded):
        """Say nothing, or half a line, until the server has had enough."""
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(connect(self.address))
                     for _ in range(50)]
            for sock in socks[::2]:
                sock.sendall(b"mos")
            for sock in socks:
                if read_all(sock) != b"Query timed out\r\n":
                    raise AssertionError("a silent client has another reply")

    def reload(self, seeded):
        """Have it reload a config, good or bad, and reopen a rotated log."""
        bad = seeded.choice(["", "", "[server]\nnonsense = 1\n"])
        self.write(self.config + bad)
        if seeded.randrange(4) == 0:
            os.unlink(self.program.rotate())
        self.reloads += 1
        os.kill(self.program.pid, signal.SIGHUP)
        os.kill(self.program.pid, signal.SIGUSR1)
        self.over.wait(0.05)

    def write(self, config):
        """Change the config in one step: half of one could be read."""
        path = self.program.config + ".new"
        pathlib.Path(path).write_text(config)
        os.replace(path, self.program.config)

    def repeat(self, step, seed):
        seeded = random.Random(seed)
        try:
            while not self.over.is_set() and not self.errors:
                step(seeded)
        except Exception as error:
            self.errors.append(error)

    def run(self, seconds, seed):
        """Let everything happen at once, for so many seconds."""
        steps = [*[self.ask_good] * 3, *[self.ask_bad] * 6, self.stay_silent,
                 self.reload]
        self.over.clear()
        threads = [threading.Thread(target=self.repeat, args=(step, seed + n))
                   for n, step in enumerate(steps)]
        for thread in threads:
            thread.start()
        self.over.wait(seconds)
        self.over.set()
        for thread in threads:
            thread.join(HANG)
        if self.errors:
            raise self.errors[0]

    def calm_down(self):
        """Wait until only the daemon is left; give its KiB of memory."""
        pid = self.program.pid
        self.write(self.config)
        os.kill(pid, signal.SIGHUP)
        wait_until(lambda: not processes_with(MARK), "the programs' end")
        # Threads wait for more to look up, at most max_threads.
        wait_until(lambda: int(self.program.status("Threads")[0]) <= 65,
                   "the threads' end")
        for _ in range(10):
            if ask(self.address, b"moshez\r\n") != HAPPY:
                raise AssertionError("it no longer answers")
        for line in self.program.log():
            if " bug " in line or not re.match(r"[-\dT:]+Z [ -~]+\Z", line):
                raise AssertionError(line)
        # A client that has just been answered is not closed yet.
        wait_until(lambda: self.descriptors() <= self.least, "the closes")
        return int(self.program.status("VmRSS")[0])

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.program.pid}/fd"))

    def report(self):
        """Say how it went so far; times are those of this round."""
        took = sorted(self.took)
        p50, p99 = (took[len(took) * n // 100] * 1000 for n in (50, 99))
        self.took.clear()
        return (f"{len(took)} good queries (p50 {p50:.0f} ms, p99 {p99:.0f},"
                f" worst {took[-1] * 1000:.0f}), {self.asked} others,"
                f" {self.reloads} reloads")


@contextlib.contextmanager
def soaking():
    """Start what a Soak needs."""
    origin = Origin(PAGES)
    try:
        with background(start=False) as program:
            config = USERS + CONFIG.format(folder=program.directory,
                                           url=origin.url)
            program.write(config)
            script = pathlib.Path(program.directory, "script")
            script.write_text(SCRIPT)
            script.chmod(0o755)
            result = program.start(fresh=True)
            if result != (0, "", ""):
                raise AssertionError(result)
            yield Soak(program, config)
    finally:
        origin.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Let everything go wrong at once around a daemon.")
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    until = time.monotonic() + options.seconds
    memory: list[int] = []
    with soaking() as soak:
        while time.monotonic() < until:
            soak.run(min(10, options.seconds / 2), len(memory) * 100)
            memory.append(soak.calm_down())
            print(f"round {len(memory)}: {soak.report()},"
                  f" {memory[-1] / 1024:.1f} MiB", flush=True)
            if memory[-1] > memory[0] + GROWTH:
                raise AssertionError("its memory grows")
    print("every answer was right; nothing was left behind")


if __name__ == "__main__":
    main()
