#!/usr/bin/env python3
"""Fuzz fingerd for long: python3 .ci/fuzz.py

Each round fuzzes a server with queries, and the reader of configs, with the
next seed.  The first round that fails ends it, and its seed is named.
"""

import argparse
import pathlib
import random
import re
import socket
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import fingerd
from test_fingerd import (
    EXAMPLE,
    HAPPY,
    UNSAFE_ON_WIRE,
    USERS,
    connect,
    read_all,
    read_config,
    reset,
    serving,
)

FUZZ_LINE = [
    b"/W", b"@", b" ", b"\t", b"\r", b"\n", b"\r\n", b"\0", b"\xff",
    b"\xff\xfa", b"\xff\xf0", b"\xff\xfb\x01", b"moshez", b"shap",
    b"localhost", b"-", b"\xc3\xa9", b"\xe2\x80\xae", b"\x1b[2J", b"\x9b",
    b"../", b"%s", b"x" * 300]
FUZZ_CONFIG = [
    "[", "]", "=", "\n", "\n  ", "#", ":", "\t", "\r", "\0", "\u202e",
    "\ud800", "/", "0", "-1", "99999999999999999999", "1e9", "::1", "yes",
    "{user}", "$user", "[users]\n", "[limits]\n", "[web:a]\n",
    "timeout = 10\n", "backend = users\n", "a = b\n"]


def fuzz_query(seeded, server):
    """Ask once, in some way that a client may; no reply may do harm."""
    pieces = [seeded.choice(FUZZ_LINE) for _ in range(seeded.randrange(9))]
    if seeded.randrange(4):
        pieces.append(b"\r\n")
    ending = seeded.choice(["half-close", "half-close", "reset"])
    with connect(server.address) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces if seeded.randrange(2) else [b"".join(pieces)]:
            sock.sendall(piece)
        if ending == "reset":
            reset(sock)
            return
        sock.shutdown(socket.SHUT_WR)
        reply = read_all(sock).decode()
    if UNSAFE_ON_WIRE.search(reply):
        raise AssertionError(f"{pieces} got {reply!r}")


def fuzz_config(seeded):
    """Spoil a config; it is refused with reasons, or serves as a whole."""
    text = EXAMPLE.read_text()
    if seeded.randrange(2):
        text = re.sub(r"(?m)^#(?! )", "", text)     # every setting there is
    for _ in range(seeded.randrange(1, 4)):
        start = seeded.randrange(len(text))
        end = start + seeded.choice([0, 1, 3, 40])
        text = text[:start] + seeded.choice(FUZZ_CONFIG) + text[end:]
    data = text.encode("utf-8", "surrogatepass")
    try:
        config = read_config(data)
    except fingerd.ConfigError as error:
        if not all(re.search(r"[^:]+: .|, not started", line)
                   for line in str(error).splitlines()):
            raise AssertionError(f"{error} for {data!r}") from None
        return
    if not config.backends or len(config.raw_values) < len(fingerd.SETTINGS):
        raise AssertionError(f"half a config of {data!r}")


def fuzz_round(seed, queries=150, configs=50):
    """Fuzz a server and the reader of configs; AssertionError if any fails."""
    seeded = random.Random(seed)
    with serving(USERS + "[server]\nuser_list = yes\n") as server:
        for _ in range(queries):
            fuzz_query(seeded, server)
        server.wait_log("^[^ ]+ query ", queries)
        if server.ask(b"moshez\r\n") != HAPPY:
            raise AssertionError("it no longer answers")
        bugs = [line for line in server.log() if " query " not in line]
        if bugs:
            raise AssertionError("\n".join(bugs))
    for _ in range(configs):
        fuzz_config(seeded)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Fuzz fingerd for long.")
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
