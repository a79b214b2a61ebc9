#!/usr/bin/env python3
"""Tests of fingerd: python3 -m unittest, or for a few -k NAME.

Real sockets, real processes, loopback only; no root and no network needed.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import ctypes
import encodings
import errno
import fcntl
import functools
import gc
import grp
import http.server
import itertools
import json
import math
import os
import pathlib
import pwd
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import textwrap
import threading
import time
import traceback
import tracemalloc
import types
import unittest
import urllib.request
import zipfile
from typing import Any
from unittest import mock

import fingerd
import fingerd_backends
from fingerd_backends import (
    AccountsBackend,
    FilesBackend,
    FingerBackend,
    SqlBackend,
    WebBackend,
)

HERE = pathlib.Path(__file__).resolve().parent
PROGRAM = HERE / "fingerd.py"
EXAMPLE = HERE / "fingerd.conf.example"
README = HERE / "README"
HANG = 10       # seconds: a guard against hangs, never what a test waits for

USERS = """
[users]
moshez = Happy and well
alice = Login: alice\t\t\tName: Alice Liddell
  Plan:
  Down the rabbit hole.
"""


# ---- Helpers --------------------------------------------------------------

def connect(address, source=None, window=0, *, timeout=HANG):
    """Open a connection as a client that does not hang for ever.

    With a window it is a slow reader, for whom little is in flight.
    """
    family = socket.AF_INET6 if len(address) == 4 else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.settimeout(timeout)
    try:
        if source:
            sock.bind((source, 0))
        if window:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        sock.connect(address)
    except OSError:
        sock.close()
        raise
    return sock


def can_listen(host):
    """Has this system that address?"""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, 0), family=family).close()
    except OSError:
        return False
    return True


has_ipv6 = functools.partial(can_listen, "::1")
needs_proc = unittest.skipUnless(os.path.exists("/proc/self/status"),
                                 "no /proc here")
needs_root = unittest.skipUnless(os.geteuid() == 0, "needs root")
needs_more_addresses = unittest.skipUnless(can_listen("127.0.0.2"),
                                           "this system has no 127.0.0.2")


def read_all(sock):
    """Read up to the end of file."""
    with sock.makefile("rb") as file:
        return file.read()


def ask(address, *segments):
    """Send a query in these segments, and give the reply."""
    with connect(address) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for segment in segments:
            sock.sendall(segment)
        return read_all(sock)


def reset(sock):
    """Have the close of a socket be a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                    struct.pack("ii", 1, 0))


def wait_until(condition, what):
    """Poll a condition, and give its result; fail after HANG seconds."""
    deadline = time.monotonic() + HANG
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            raise AssertionError(f"waited in vain: {what}")
        time.sleep(0.005)


def free_port():
    """Give a port of 127.0.0.1 that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@contextlib.contextmanager
def full_listener(host="127.0.0.1", port=0):
    """Give a listening socket that takes no connection: its queue is full."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind((host, port))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener


@contextlib.contextmanager
def config_file(text):
    """Write a config into a directory of its own; give its path."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)      # for the user that root becomes
        path = os.path.join(directory, "fingerd.conf")
        with open(path, "wb") as file:
            file.write(text if isinstance(text, bytes) else text.encode())
        yield path


def read_config(text, overrides=None):
    """Give the config of a text; raise ConfigError of it."""
    with config_file(text) as path:
        return fingerd.read_config(path, lambda *said: None, overrides)


def open_descriptors():
    """Give the open descriptors of this process; none if that is unknown."""
    return set(os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else ())


class Logged:
    """Whatever writes a log that a test reads."""

    def __init__(self, log_path):
        self.log_path = log_path

    def has_ended(self):
        """Will it write no more?"""
        return False

    def log(self):
        """Give the lines that are there."""
        if not os.path.exists(self.log_path):
            return []
        return pathlib.Path(self.log_path).read_text("ascii").splitlines()

    def wait_log(self, pattern, times=1):
        """Wait until that many lines match; give the last."""
        def find():
            ended = self.has_ended()
            found = [line for line in self.log() if re.search(pattern, line)]
            if ended and len(found) < times:
                raise AssertionError(f"no {pattern} in {self.log()}")
            return found if len(found) >= times else []
        return wait_until(find, pattern)[-1]


class Serving(Logged):
    """A server in a thread of this process."""

    def __init__(self, server, log_path):
        super().__init__(log_path)
        self.server = server
        self.address = server.door.listeners[0].getsockname()

    def waiting(self, wait):
        """List the handlers that wait for this."""
        return list(self.server.waiting.handlers[wait])

    def wait_waiting(self, wait, number=1):
        """Wait until that many handlers wait for this."""
        wait_until(lambda: len(self.waiting(wait)) == number,
                   f"{number} handlers to wait for {wait}")

    def in_loop(self, action):
        """Have the loop call this, as if a signal had come."""
        self.server.inbox.actions[99] = action
        self.server.inbox.signals.add(99)
        self.server.inbox.wake()

    def ask(self, *segments):
        return ask(self.address, *segments)

    def connect(self, line=b"", host=None, window=0):
        """Give a client that has sent something."""
        if window:
            self.server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF,
                                          window)
        sock = connect(self.address, host, window)
        sock.sendall(line)
        return sock


def close_log(log):
    """Close what a log is written to in the end."""
    log.output.close()


@contextlib.contextmanager
def serving(text=USERS, backends=(), listen="127.0.0.1:0", last_call=0):
    """Serve a config in this process; nothing may be left of it after."""
    before = len(open_descriptors()), threading.active_count()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(fingerd, "LAST_CALL", last_call))
        path = stack.enter_context(config_file(text))
        log_path = os.path.join(os.path.dirname(path), "log")
        log = fingerd.Log()
        stack.callback(close_log, log)
        config = fingerd.read_config(path, log.report, {"listen": listen,
                                                        "to": log_path})
        config.backends += tuple(backends)
        log.open(config.log)
        server = fingerd.FingerServer(
            list(fingerd.open_listeners(config.server.listen)),
            fingerd.Answers(config, log), log)
        stack.callback(server.server_close)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        stack.callback(thread.join, HANG)
        # If its loop has failed, a shutdown would wait for ever.
        stack.callback(lambda: server.shutdown() if thread.is_alive() else 0)
        yield Serving(server, log_path)
    wait_until(lambda: len(open_descriptors()) <= before[0]
               and threading.active_count() <= before[1],
               "threads and descriptors to be as before")


def fingerd_command(*args):
    """Give the words that run the program on this Python."""
    return [sys.executable, *(f"-W{option}" for option in sys.warnoptions),
            str(PROGRAM), *args]


fingerd.load_late_imports()     # now, and not in each fork


class Fork:
    """The program in a fork of this process, with the methods of a Popen.

    A Python of its own takes ten times as long to start.
    """

    returncode = None

    def __init__(self, args, stdin=None, stdout=None, stderr=None, cwd=".",
                 preexec_fn=list, keep=()):
        with open(os.devnull, "r+b", 0) as null:
            files: list[Any] = [
                null if file in (None, subprocess.DEVNULL) else file
                for file in (stdin, stdout, stderr)]
            self.pid = os.fork()
            if self.pid:
                return
            try:
                gc.freeze()     # no socket of the test is to be closed late
                for number, file in enumerate(files):
                    os.dup2(file if isinstance(file, int) else file.fileno(),
                            number)
                os.chdir(cwd)
                preexec_fn()
                for fd in map(int, open_descriptors()):
                    if fd > 2 and fd not in keep:
                        with contextlib.suppress(OSError):
                            os.close(fd)
                atexit._clear()
                status = fingerd.main(list(args))
                atexit._run_exitfuncs()
                os._exit(status)
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(1)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = (-os.WTERMSIG(status) or
                                   os.WEXITSTATUS(status))
        return self.returncode

    def wait(self, timeout=None):
        wait_until(lambda: self.poll() is not None, "the end")
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def start_fingerd(*args, fresh=False, command=None, **options) -> Any:
    """Start the program in a Python of its own, or in a fork of this one.

    A fork has all modules already, and does not copy threads.
    """
    if fresh or command or threading.active_count() > 1:
        return subprocess.Popen(
            [*(command or fingerd_command()), *args],
            **{"stdin": subprocess.DEVNULL, **options})
    return Fork(args, **options)


def run_fingerd(*args, **options):
    """Run the program to its end; give status, stdout and stderr."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, \
            tempfile.TemporaryFile("w+", encoding="utf-8") as err:
        process = start_fingerd(
            *args, **{"stdout": out, "stderr": err, **options})
        try:
            status = process.wait(HANG)
        finally:
            process.kill()
        out.seek(0)
        err.seek(0)
        return status, out.read(), err.read()


class Program(Logged):
    """The program with a config, a pidfile and a log of its own."""

    def __init__(self, directory):
        super().__init__(os.path.join(directory, "log"))
        self.directory = directory
        self.config = os.path.join(directory, "fingerd.conf")
        self.pidfile = os.path.join(directory, "pid")
        self.process = None         # in the foreground

    def write(self, text):
        pathlib.Path(self.config).write_text(text)

    def run(self, *args):
        """Run a command about it; give status, stdout and stderr."""
        return run_fingerd("--config", self.config, "--pidfile", self.pidfile,
                           *args)

    def start(self, *args, log=None, run=run_fingerd, **options):
        """Start it in the background; give what the launcher gives."""
        return run("--config", self.config, "--pidfile", self.pidfile,
                   "--daemon", "--listen", "127.0.0.1:0", "--logfile",
                   log or self.log_path, *args, **options)

    def serve(self, *args, **options):
        """Start it in the foreground; its stderr is the log."""
        with open(self.log_path, "wb") as log:
            self.process = start_fingerd(
                "--config", self.config, "--listen", "127.0.0.1:0", *args,
                **{"stderr": log, **options})

    def has_ended(self):
        return self.process and self.process.poll() is not None

    def stop(self, number=signal.SIGTERM):
        """Send a signal; give the exit status."""
        self.process.send_signal(number)
        return self.process.wait(HANG)

    def reload(self, text, pattern, times=1):
        """Have it reload another config; give the line that it logs then."""
        if text is not None:
            self.write(text)
        os.kill(self.pid, signal.SIGHUP)
        return self.wait_log(pattern, times)

    @property
    def pid(self):
        if self.process:
            return self.process.pid
        return int(pathlib.Path(self.pidfile).read_text())

    @property
    def address(self):
        """Where it listens first; waits until it does."""
        ready = r"\bready\b.*\blisten\W+([\d.]+):(\d+)"
        host, port = re.search(ready, self.wait_log(ready)).groups()
        return host, int(port)

    def rotate(self):
        """Do as logrotate's create does; give the path of the old log."""
        old = self.log_path + ".1"
        os.rename(self.log_path, old)
        info = os.stat(old)
        open(self.log_path, "w").close()
        os.chown(self.log_path, info.st_uid, info.st_gid)
        return old

    def status(self, key):
        """Give the words of a line of /proc/PID/status."""
        text = pathlib.Path(f"/proc/{self.pid}/status").read_text()
        return re.search(rf"(?m)^{key}:\s*(.*)$", text)[1].split()

    def stat(self):
        """Give the words of /proc/PID/stat from the state on."""
        text = pathlib.Path(f"/proc/{self.pid}/stat").read_text()
        return text.rpartition(")")[2].split()


@contextlib.contextmanager
def installed(text=USERS):
    """Give the program with a config, to be started; kill it in the end."""
    with config_file(text) as path:
        program = Program(os.path.dirname(path))
        try:
            yield program
        finally:
            if program.process:
                program.process.kill()
                program.process.wait()
            with contextlib.suppress(OSError, ValueError):
                os.kill(program.pid, signal.SIGKILL)


@contextlib.contextmanager
def daemon(text=USERS, *args, **options):
    """Serve in the foreground; no fault, and status 0 at the end."""
    with installed(text) as program:
        program.serve(*args, **options)
        yield program
        status, log = program.stop(), program.log()
        if status or not all(re.match("[a-z]+: ", line) for line in log):
            raise AssertionError(f"status {status}: {log}")


@contextlib.contextmanager
def background(text=USERS, *args, start=True, **options):
    """Serve in the background; it must be gone at the end."""
    with installed(text) as program:
        if start:
            result = program.start(*args, **options)
            if result != (0, "", ""):
                raise AssertionError(result)
        yield program
        status, out, err = program.run("--stop")
        if status or err:
            raise AssertionError((status, out, err))


class TestBackend:
    """A backend that does what a test tells it."""

    __test__ = False
    waits = True

    def __init__(self, action):
        self.action = action        # called with the user and the timeout

    def lookup(self, user, verbose, client, timeout):
        return self.action(user, timeout)


@contextlib.contextmanager
def held():
    """Give a backend that answers once the block has been left or set."""
    release = threading.Event()
    entered = threading.Semaphore(0)

    def hold(user, timeout):
        entered.release()
        if not release.wait(HANG):
            raise TimeoutError("nobody has released it")
        return f"held {user}"
    backend = TestBackend(hold)
    backend.release, backend.entered = release, entered
    try:
        yield backend
    finally:
        release.set()


class Case(unittest.TestCase):
    maxDiff = None

    def enter(self, context):
        """Enter a context for the rest of the test."""
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        return stack.enter_context(context)

    def open_log(self, text):
        """Open a log with these settings for the rest of the test."""
        log = fingerd.Log()
        log.open(read_config("[log]\n" + text).log)
        self.addCleanup(close_log, log)
        return log


class ServerCase(Case):
    def serve(self, text=USERS, *backends, **options):
        """Serve a config for the rest of the test."""
        return self.enter(serving(text, backends, **options))

    def connect(self, server, *args, **options):
        """Give a client for the rest of the test."""
        return self.enter(server.connect(*args, **options))


# ---- Query ----------------------------------------------------------------

def query(*users, verbose=False, hosts=()):
    return fingerd.Query(users, verbose, tuple(hosts))


def understand(*segments, own_names=(), limit=512):
    """Give the Query of a line that comes in these segments."""
    line = fingerd.QueryLine(limit)
    if not any(line.add(segment) for segment in (*segments, b"")):
        raise AssertionError("an end of file does not end the line")
    return fingerd.parse_query(bytes(line.text), lambda: own_names)


class QueryTest(unittest.TestCase):
    GOOD = {
        query(): [b"\r\n", b"\n", b"", b"  \t \r\n", b"@localhost\r\n"],
        query("alice"): [
            b"alice\r\n", b"alice\n", b"alice\r\0", b"alice\r", b"alice",
            b" alice \r\n", b"\talice\t\r\n", b"\xff\xfb\x01alice\r\n",
            b"\xff\xfd\x03\xff\xfb\x0a\xff\xfb\x18alice\r\n",
            b"al\xff\xf1ice\r\n", b"alice\xff", b"alice\xff\xfb",
            b"\xff\xfa\x18\x00VT\n100\xff\xff\xff\xf0alice\r\n",
            b"alice@localhost\r\n", b"alice@LocalHost.\r\n",
            b"alice@localhost@localhost\r\n"],
        query("Alice"): [b"Alice\r\n"],
        query(verbose=True): [b"/W\r\n", b"/W \r\n", b"/w\r\n",
                              b"/W @localhost\r\n"],
        query("alice", verbose=True): [
            b"/W alice\r\n", b"/w alice\r\n", b"/W   alice\r\n",
            b"/W\talice\r\n", b"alice /W\r\n", b"/W alice /W\r\n"],
        query("/Wroot"): [b"/Wroot\r\n"], query("/WW"): [b"/WW\r\n"],
        query("/"): [b"/\r\n"], query("-l"): [b"-l\r\n"],
        query("--"): [b"--\r\n"],
        query("alice", "bob"): [b"alice bob\r\n", b"alice@localhost bob\r\n"],
        query(*"abcdefgh"): [b"a b c d e f g h\r\n"],
        query("a", "PROXY", "TCP4"): [b"a PROXY TCP4\r\n"],
        query("j\u00fcrgen"): ["j\u00fcrgen\r\n".encode()],
        query("a\u00a0b"): ["a\u00a0b\r\n".encode()],
        query("a\u2003b"): ["a\u2003b\r\n".encode()],
        query("alice", hosts=["example.org"]): [b"alice@example.org\r\n"],
        query(hosts=["example.org"]): [b"@example.org\r\n"],
        query("alice", verbose=True, hosts="ab"): [b"/W alice@a@b\r\n"],
        query(hosts=[""]): [b"@\r\n"],
        query("alice", hosts=[""]): [b"alice@\r\n"],
        query("alice", hosts=["", "b"]): [b"alice@@b\r\n"],
        query("alice", hosts="a"): [b"alice@a@localhost\r\n"],
        query("alice", hosts=["localhost", "a"]): [b"alice@localhost@a\r\n"],
        query("alice", hosts=["", "localhost"]): [b"alice@@localhost\r\n"],
        query("bob", hosts=[""]): [b"alice bob@a\r\n"],
        query(hosts=[""] * 300): [b"@" * 300 + b"\r\n"],
    }
    MALFORMED = [
        b"\0\r\n", b"al\0ice\r\n", b"alice\0\r\n", b"\x1b[2J\r\n",
        b"al\x07ice\r\n", b"al\x7fice\r\n", b"a\rb\r\n", b"a\x0bb\r\n",
        b"a\x0cb\r\n", b"\xe9\r\n", b"\xc3\r\n", b"\xed\xa0\x80\r\n",
        b"\xc0\xaf\r\n", "a\u0080b\r\n".encode(), "a\u009fb\r\n".encode(),
        b"\xff\xffalice\r\n", b"\xff\xff\xfb\x01alice\r\n",
        b"/W@localhost\r\n", b"/w@localhost\r\n", b"a\x1fb\r\n",
        b"a b c d e f g h i\r\n", b"al\rice\r\n",
    ]

    def test_understands_every_form_that_clients_send(self):
        own_names = frozenset(["localhost"])
        for expected, lines in self.GOOD.items():
            for line in lines:
                with self.subTest(line=line):
                    self.assertEqual(understand(line, own_names=own_names),
                                     expected)

    def test_refuses_what_is_no_query(self):
        for line in self.MALFORMED:
            with self.subTest(line=line):
                with self.assertRaises(fingerd.MalformedQuery):
                    understand(line)

    def line_of(self, segments, limit=512):
        """Give what a line comes to: its text, or why there is none."""
        line = fingerd.QueryLine(limit)
        try:
            ended = any(line.add(segment) for segment in segments)
            return bytes(line.text) if ended else None
        except fingerd.LineTooLong:
            return bytes(line.text) + b" is too long"

    LINES = [
        (b"alice\r\nmore\r\n", b"alice"), (b"alice\nmore", b"alice"),
        (b"alice\r\0more", b"alice"), (b"\n", b""), (b"alice", None),
        (b"alice\r", None), (b"al\rice", None), (b"", None),
        (b"alice\r\r\r\n", b"alice"), (b"al\0ice\n", b"al\0ice"),
        (b"alice\r\0\n", b"alice"), (b"al\nice\r\0", b"al"),
        (b"\xff\xfb\x0aalice\n", b"alice"), (b"\xff\xfb", None),
        (b"\xff\xfb\x0a", None), (b"\xff\xfe\x0a", None), (b"\xff\n", None),
        (b"\xff\xfa\x18\n\n", None), (b"\xff\xff\n", b"\xff"),
        (b"\xff\xfa\x18\n\xff\xf0\n", b""),
        (b"moshez\r\xff\xf1\0\n", b"moshez"),
        # Counted is what is left of a line, and all that comes.
        (b"\xff\xf1" * 270 + b"moshez\n", b"moshez"),
        (b"a" * 512 + b"\r\r\n", b"a" * 512),
        (b"a" * 512 + b"\rb\n", b"a" * 512 + b" is too long"),
        (b"a" * 512 + b"\r" * 1535 + b"\n", b"a" * 512),
        (b"a" * 512 + b"\r" * 1536 + b"\n", b"a" * 512 + b" is too long"),
        (b"a" * 513, b"a" * 512 + b" is too long"),
        (b"\xff\xf1" * 1023 + b"\n", b""),
        (b"\xff\xf1" * 1024, b" is too long")]

    def test_finds_the_end_of_a_line_however_the_bytes_are_cut(self):
        seeded = random.Random(854)
        alphabet = [b"\r", b"\n", b"\0", b"\xff", b"\xfa", b"\xf0", b"\xf1",
                    b"\xfb", b"alice", b" ", b"\r\r", b"x" * 20, b"\xff" * 3,
                    b"\xff\xf1" * 30, b"\r" * 30]
        lines: list[Any] = [(line, text, 512) for line, text in self.LINES]
        for _ in range(400):
            line = b"".join(seeded.choices(alphabet, k=seeded.randrange(12)))
            line += b"x" + b"\n" * seeded.randrange(2)
            lines.append((line, self.line_of([line], 40), 40))
        for line, text, limit in lines:
            for step in (5000, 1, 2, 3, 7):
                cut = [line[start:start + step]
                       for start in range(0, len(line), step)]
                self.assertEqual(self.line_of(cut, limit), text, line)

    def test_looks_at_each_byte_once(self):
        def cost(line, limit):
            start = time.thread_time()
            self.line_of([line[n:n + 1] for n in range(len(line))], limit)
            return time.thread_time() - start
        for start, rest, limit in (
                (b"", b"\xff\xf1", 2100), (b"\xff\xfa", b"\n\n", 2100),
                (b"", b"\r\r", 2100), (b"", b"xx", 9000)):
            with self.subTest(start + rest):
                few, many = (min(cost(start + rest * number, limit)
                                 for _ in range(3)) for number in (500, 4000))
                self.assertLess(many, few * 25)     # not 64 times as much


# ---- Reply ----------------------------------------------------------------

UNSAFE_ON_WIRE = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e"
                            "\u2066-\u2069]|[^\r]\n|\r[^\n]|[^\n]\\Z")


class ReplyTest(unittest.TestCase):
    def test_makes_wire_bytes_of_any_text(self):
        for text, wire in [
                ("", b"\r\n"), ("a", b"a\r\n"), ("a\n", b"a\r\n"),
                ("a\r\nb\n", b"a\r\nb\r\n"), ("a\n\nb", b"a\r\n\r\nb\r\n"),
                ("a\rb", b"a^Mb\r\n"), ("a\r\r\nb", b"a^M\r\nb\r\n"),
                ("\ttab", b"\ttab\r\n"), ("\x1b[2J", b"^[[2J\r\n"),
                ("\0\x07\x7f", b"^@^G^?\r\n"), ("\x9b", b"\\x9b\r\n"),
                ("\x85", b"\\x85\r\n"), ("\u202e", b"\\u202e\r\n"),
                ("\u2066\u2069", b"\\u2066\\u2069\r\n"),
                ("\u2028", b"\\u2028\r\n"), ("\x0b\x0c", b"^K^L\r\n"),
                ("\udc80\udcff", b"\\x80\\xff\r\n"),
                ("\ud800\udfff", b"\\ud800\\udfff\r\n"),
                ("j\u00fcrgen \u2603", "j\u00fcrgen \u2603\r\n".encode()),
                ("\U0001f600", "\U0001f600\r\n".encode())]:
            with self.subTest(text=text):
                self.assertEqual(fingerd.to_wire(text), wire)

    def test_lets_nothing_unsafe_through(self):
        for unsafe in ("a\n", "a\rb\r\n", "a", "\x1b\r\n"):
            self.assertRegex(unsafe, UNSAFE_ON_WIRE)
        for start in (0, 0x2000, 0xd7f0, 0xdc00, 0xfff0):
            text = "".join(map(chr, range(start, start + 0x100)))
            self.assertNotRegex(fingerd.to_wire(text).decode(), UNSAFE_ON_WIRE)

    def test_cuts_at_a_line_and_says_so(self):
        for data, limit, cut in [
                (b"a\r\nb\r\n", 6, b"a\r\nb\r\n"),
                (b"abc\r\ndefghijklmnop\r\n", 19, b"abc\r\n[truncated]\r\n"),
                (b"abc\r\ndefghijklmnop\r\n", 18, b"abc\r\n[truncated]\r\n"),
                (b"abc\r\ndefghijklmnop\r\n", 17, b"ab\r\n[truncated]\r\n"),
                (b"x" * 30 + b"\r\n", 20, b"x" * 5 + b"\r\n[truncated]\r\n"),
                (b"\xc3\xa9" * 20 + b"\r\n", 20,
                 b"\xc3\xa9" * 2 + b"\r\n[truncated]\r\n"),
                (b"\r\n" + b"x" * 30 + b"\r\n", 20, b"\r\n[truncated]\r\n"),
                (b"x" * 30 + b"\r\n", 16, b"x\r\n[truncated]\r\n")]:
            with self.subTest(data=data, limit=limit):
                self.assertEqual(fingerd.truncate(data, limit), cut)
                self.assertLessEqual(len(cut), limit)

    def test_joins_replies_of_which_the_worst_gives_the_outcome(self):
        replies = [fingerd.Reply("unknown", b"a"), fingerd.Reply(
            "answered", b"b", "x"), fingerd.Reply("failed", b"c", "y")]
        for number, outcome in enumerate(("unknown", "answered", "failed"), 1):
            self.assertEqual(fingerd.join_replies(replies[:number]).outcome,
                             outcome)
        self.assertEqual(fingerd.join_replies(replies * 2), (
            "failed", b"a\r\nb\r\nc\r\na\r\nb\r\nc", "x,y"))

    def test_the_least_max_reply_holds_each_fixed_reply(self):
        for reply in fingerd.FIXED_REPLIES.values():
            self.assertLessEqual(len(reply.data), fingerd.MIN_SIZE)


# ---- Settings -------------------------------------------------------------

class Picky:
    """A backend with much to say about its settings."""

    settings = (("color", "text", "", "a color"),
                ("size", "size", "1K", "a size"),
                ("shape", "text", "round", "a shape"))
    waits = False

    def __init__(self, options, report):
        wrong = [f"{name}: bad; write good" for name in ("size", "color")
                 if options["color"] == "bad"]
        if wrong:
            raise ValueError("\n".join(wrong))
        if options["color"] == "loud":
            report("is loud")
            report("is not quiet", "debug")
        self.warnings = [f"{name}: {value} is odd"
                         for name, value in options.items() if value == "odd"]

    def enter_chroot(self, path):
        raise ValueError(f"shape: does not fit into {path}; cut it")


class SettingsTest(Case):
    def check(self, rows, options=(), overrides=None):
        """Check how errors begin: each behind its line of a config and " | ".

        Those of options come first.  Gives what the errors leave.
        """
        lines = [row.split(" | ") for row in rows.split("\n")]
        wanted = [*options, *(f"FILE:{number}: {error.strip()}"
                              for number, (_, *errors) in enumerate(lines, 1)
                              for error in errors)]
        with config_file("\n".join(line for line, *_ in lines)) as path, \
                self.assertRaises(fingerd.ConfigError) as caught:
            fingerd.read_config(path, print, overrides)
        *errors, count = str(caught.exception).replace(
            path, "FILE").split("\n")
        self.assertEqual([error[:len(begin)] for error, begin in
                          itertools.zip_longest(errors, wanted, fillvalue="")],
                         wanted)
        place = "in FILE" if wanted[len(options):] else "on the command line"
        self.assertEqual(count, f"{len(wanted)} error{'s' * (len(wanted) > 1)}"
                                f" {place}, not started")
        return caught.exception.config

    def test_converts_values_or_says_what_is_wrong(self):
        for row in f"""\
yes/no | True | Yes | on | 1 | true
yes/no | False | FALSE | off | 0 | no
seconds | 1.5 | 1.5
seconds | 0.001 | 0.001
seconds | 31622400 | 31622400 | 31622400.0
period | 0 | 0
limit | 0 | 0
count | 1 | 1
size | 2048 | 2K
size | 1048576 | 1m
size | 64 | 64
size | 1000000000 | 1000000000
hosts | () |
hosts | ('a', 'b.example') | A  b.example.
networks | (IPv4Network('127.0.0.0/8'),) | ::ffff:127.0.0.0/104
networks | (IPv4Network('0.0.0.0/0'),) | ::ffff:0:0/96 | 0.0.0.0/0
networks | (IPv6Network('::fffe:0:0/95'),) | ::fffe:0:0/95
addresses | (('*', 79), ('::1', 80), ('h', 65535)) | *:79 [::1]:80 h:65535
next hops | {{}} | no | OFF
next hops | {{'a.example': 79, 'b': 7, '::1': 79}} | A.example. b:7 [::1]
server | None |
server | ('a', 79) | A.
octal | 23 | 0027
octal | 511 | 777
directory | '' |
directory | '/x' | /x
word | '12345678901234567890123456789012' | 12345678901234567890123456789012
level | 'debug' | DEBUG
syslog | ('h', 514) | h:514
user | None |
user | ('root', 0, 0) | 0 | root
user | ('4294967294', 4294967294, None) | 4294967294
group | None |
group | 0 | {grp.getgrgid(0).gr_name}
yes/no | is not one of yes, true, on, 1, no, false, off, 0 | maybe |
seconds | is not a number of seconds | ten | -1 | 1e3 | \u0661 | 1.
seconds | is not a number of seconds | 1234567890123
seconds | is not between 0.001 and 31622400 | 0 | 31622401
size | is not a size in bytes | 1G | 64 K | 1.5K |
size | is not between 64 and 1000000000 | 63 | 999999999999M
count | is not a whole number | 1_0 | 1.0 | -1
count | is not between 1 and 1000000000 | 0
limit | is not between 0 and 1000000000 | 1000000001
networks | is not a list of networks (10.0.0.1/8 has host | ::/0 10.0.0.1/8
addresses | is empty |
addresses | is not host:port or [v6 address]:port | h | ::1:79 | h:65536 | h:-1
addresses | is not host:port or [v6 address]:port | :79 | a\0b:79
next hops | is neither no nor a list of hosts | yes | * |
next hops | is not host:port or [v6 address]:port | a:b
server | is not a host; write e.g. host = two.example.org | *:7 | *
server | is not host:port or [v6 address]:port | two:x
backends | is empty |
level | is not one of debug, info, notice, warning, error | loud
log | is not stderr, syslog or a path |
directory | is not an absolute path; write e.g. /var/empty | x
octal | is not an octal mask | 8 | 7777
word | is not a word of 1 to 32 ASCII characters | a b | \u0661 |
word | is not a word | 123456789012345678901234567890123
syslog | is not host:port or [v6 address]:port | log
user | is not between 0 and 4294967294 | 4294967295
user | is not a user of this system; create it (adduser --system a b), or | a b
group | is not between 0 and 4294967294 | 4294967295
group | is not a group of this system; create it (addgroup --system a b) | a b
""".splitlines():
            kind, wanted, *texts = (word.strip() for word in row.split(" |"))
            for text in texts:
                with self.subTest(kind=kind, text=text):
                    try:
                        found = repr(fingerd.KINDS[kind](text))
                    except ValueError as error:
                        found = str(error)[:len(wanted)]
                    self.assertEqual(found, wanted)

    def test_reports_all_errors_in_line_order_with_their_count(self):
        config = self.check("""\
  first | indented line outside a text value; write it without
stray = 1 | stray: outside any section; write its [section] abov
[server]
  under a header | indented line
listen = nowhere | listen: "nowhere" is not host:port or [v6 address]:p
# between
  indented = 1 | indented line
bakend = users | bakend: no such setting; did you mean backend?
[limits]
timeout = ten | timeout: "ten" is not a number of seconds; write e.g
timeout = 5 | timeout: already on line 10; write it once
 what = this
nonsense | "nonsense" is neither a section nor a setting; write
= nothing | "= nothing" is neither
[server] | [server]: already on line 3; write it once
[broken | "[broken" is neither
[limits] | [limits]: already on line 9; write it once
timeout = x | timeout: already on line 10; write it once
max_reply = 10 ; bytes | max_reply: "10 ; bytes" is not a size in bytes; write
[daemon]
user = fingerd-79 | user: "fingerd-79" is not a user of this system
umask = 8 | umask: "8" is not an octal mask; write e.g. umask = 0
rundir = a\x1bb | rundir: "a\x1bb" has control characters; remove them
pidfile = /run/x
[users]
al ice = x | al ice: no query can match this name; write it witho
al@ice = x | al@ice: no query can match
alice = 1
Alice = 2 | Alice: already on line 28; write it once
/W = 3 | /W: no query can match
a\x1bb = 4 | a\x1bb: no query can match
""", ['--logfile: "" is not stderr, syslog or a path; write e.g. --logfile st',
      '--umask: "9" is not an octal mask; write e.g. --umask 027',
      '--user: "who-79" is not a user of this system; create it (adduser'],
                            {"umask": "9", "user": "who-79", "to": ""})
        # A daemon can be found by the pidfile of a config with errors.
        self.assertEqual((config.daemon.pidfile, config.daemon.rundir,
                          config.limits.timeout), ("/run/x", "", 10))
        self.check("", ['--umask: "9" is not an octal mask'], {"umask": "9"})
        for space in ("\t", "\x0c", "\xa0", "\u2003"):
            self.check(f"[limits]\n\n#\n{space}x = y | indented line")
        with self.assertRaisesRegex(
                fingerd.ConfigError, r":2: is not UTF-8; convert the file, e\."
                                     "g. with iconv -f latin1 -t utf-8$"):
            read_config(b"[users]\na = \xe9\n")

    def test_guesses_what_an_unknown_name_means(self):
        self.check("""\
[user] | [user]: no such section; did you mean [users]?
[DEFAULT] | [DEFAULT]: no such section; there are [server], [limits],
[webb] | [webb]: no such section; did you mean [web]?
[] | []: no such section; there are [server], [limits],
[limit] | [limit]: no such section; did you mean [limits]?
[server]
backend = usr log | backend: "log" is not a backend; there are users, remote,\
 | backend: "usr" is not a backend; did you mean users?
[web:"x] | [web:"x]: no such section; did you mean [web]?
[limits]
backend = users | backend: no such setting; there are
""")
        for name in ("finger:st\u00e4ff", 'web:"x', "web:", "Web"):
            self.check(     # a log could not hold it
                f'[server]\nbackend = {name} | backend: "{name}" is not a'
                " backend; did you mean")

    @mock.patch.dict(fingerd.BACKENDS, picky=Picky)
    def test_reports_all_that_backends_say_where_it_belongs(self):
        self.check("""\
[server]
backend = picky nosuch picky:two picky:three picky finger picky:4 picky:5 \
accounts:x |\
 [picky:three]: shape: does not fit into /srv; cut it |\
 backend: "nosuch" is not a backend; there are users, remote, picky, account |\
 backend: names one twice; name each once
[picky:4]
shape = big | shape: does not fit into /srv; cut it
[picky:5] | shape: does not fit into /srv; cut it
[picky]
size = 1 | size: "1" is not between 64 and 1000000000; write
color = bad | color: bad; write good
colour = red | colour: no such setting; did you mean color?
[picky:two] | size: bad; write good
color = bad | color: bad; write good
[finger]
# here
command = no-such-79 | command: "no-such-79" begins neither with a program
max_output = 1 | max_output: "1" is not between
[web:x]
cashe = 1 | cashe: no such setting; did you mean cache?
cache = x | cache: "x" is not a number of seconds
url = of what is not used only names and values are checked
[accounts:x]
show = all of it | show: "all" cannot | show: "it" cannot | show: "of" cannot
[daemon]
chroot = /srv
""")

    @mock.patch.dict(fingerd.BACKENDS, picky=Picky)
    def test_warns_of_what_is_not_used_and_what_backends_say(self):
        config = read_config("[web]\nurl = not a url\n[server]\nbackend ="
                             " picky picky:two\n[picky:two]\nshape = round\n"
                             "color = odd\n[picky]\ncolor = odd\nshape = odd\n"
                             "[users]\n[limits]\n")
        unused = "is not used; add {0} to backend, or remove the section"
        self.assertEqual(
            [warning.replace(config.path, "") for warning in config.warnings],
            [":1: [web]: " + unused.format("web"),
             ":7: color: odd is odd", ":9: color: odd is odd",
             ":10: shape: odd is odd", ":11: [users]: "
             + unused.format("users")])

    def test_a_reload_keeps_the_daemon_and_looks_up_no_name(self):
        old = read_config("[daemon]\nuser = nobody\nchroot = /srv\n")
        text = ("[server]\nbackend = users web picky\nlisten = a.invalid:79\n"
                "forward = b.invalid\n[web]\nurl = http://c.invalid/{user}\n"
                "[log]\nsyslog_address = d.invalid:514\n[daemon]\n"
                "user = no-such-user-79\ngroup = no-such-group-79\n")
        with config_file(text) as path, mock.patch(
                "socket.getaddrinfo", side_effect=AssertionError), \
                mock.patch.dict(fingerd.BACKENDS, picky=Picky):
            config = fingerd.read_config(path, print, {"user": "other"}, old)
            self.assertIs(config.daemon, old.daemon)
            self.assertEqual(config.raw_values["daemon", "user"], "other")
        with config_file(text + "usr = 1") as path, self.assertRaisesRegex(
                fingerd.ConfigError, ":12: usr: no such setting; did you"):
            fingerd.read_config(path, print, None, old)

    def test_keeps_the_lines_of_texts(self):
        config = read_config("\ufeff[users]\r\na = one\r\n"
                             "  two\r\n    three\r\n\r\n# no text\r\n"
                             "  # text\r\n  four\r\n\r\n\r\nb =\r\n"
                             "\tonly\r\nc = 100% = all\r\nd =\r\n"
                             "e =\r\n\r\n   deep\r\n  less\r\n"
                             "[server]\r\nheader = a\r\n  b\r\n")
        self.assertEqual(config.backends[0][1].replies, {
            "a": b"one\r\ntwo\r\n  three\r\n\r\n# text\r\nfour\r\n",
            "b": b"only\r\n", "c": b"100% = all\r\n", "d": b"\r\n",
            "e": b"\r\n deep\r\nless\r\n"})
        self.assertEqual(config.server.header, "a\nb")


class ExampleTest(Case):
    """The example config, the README and --help against the tables."""

    def rows(self):
        return [*fingerd.SETTINGS, *(
            fingerd.Setting(name, *row)
            for name, cls in fingerd.load_backends()[0].items()
            for row in cls.settings or ())]

    def test_example_is_all_default_but_for_its_user(self):
        text = EXAMPLE.read_text()
        uncommented = re.sub(r"(?m)^#(?=[\w\[])", "", text)
        example, changed, empty = map(read_config, (text, uncommented, ""))
        for section in fingerd.CORE:
            for config in (example, changed):
                self.assertEqual(getattr(config, section),
                                 getattr(empty, section))
        self.assertEqual(empty.warnings, [])
        self.assertEqual(re.findall(r"(?m)^[^#\[\n].*", text),
                         ["moshez = Happy and well"])

    def test_example_names_every_setting_once_with_its_default(self):
        section, shown = "", []
        for line in EXAMPLE.read_text().splitlines():
            if re.fullmatch(r"#?\[\w+\]", line):
                section = line.strip("#[]")
            elif re.match(r"#\w", line):
                name, _, default = line[1:].partition("=")
                shown.append((section, name.strip(), default.strip()))
        self.assertEqual(sorted(shown), sorted(
            (row.section, row.name, row.default) for row in self.rows()))

    def test_example_stays_within_its_columns(self):
        for path in (EXAMPLE, README):
            for line in path.read_text().splitlines():
                self.assertLessEqual(len(line), 76, line)

    def test_help_lists_every_option_and_setting(self):
        status, out, err = run_fingerd("--help")
        self.assertEqual((status, err), (0, ""))
        for row in self.rows():
            section = out.partition(f"\n[{row.section}]\n")[2]
            self.assertIn(f"  {row.name} = {row.default}".rstrip(),
                          section.partition("\n\n")[0])
        self.assertIn("\n[users]\n  NAME = TEXT  ", out)
        self.assertIn("\n[aliases]\n  NAME = NAMES  ", out)
        for flags, *_ in (*fingerd.OPTIONS, *fingerd.SWITCHES):
            for flag in flags:
                self.assertRegex(out, rf"(?m)^  (.* )?{flag}\b")

    def test_readme_commands_do_what_it_says(self):
        start, check, query = re.findall(
            r"\$ python3 fingerd\.py (--config.*)\n", README.read_text())
        with installed() as program:
            program.serve(*shlex.split(start), cwd=HERE)
            self.assertEqual(ask(program.address, b"moshez\r\n"), HAPPY)
            self.assertEqual(program.stop(signal.SIGINT), 0)
        for command, said in ((check, "fingerd.conf.example is good\n"),
                              (query, "Happy and well\n")):
            self.assertEqual(run_fingerd(*shlex.split(command), cwd=HERE),
                             (0, said, ""))

    def recipe(self, name):
        """Give a config of the README, the one after a word or two."""
        text = README.read_text().split(f"\n{name}.  ", 1)[1]
        return textwrap.dedent(text.split(":\n\n", 1)[1].split("\n\n")[0])

    def test_recipes_of_the_readme_answer_as_it_says(self):
        folder = self.enter(tempfile.TemporaryDirectory())
        write_file(folder, "news.txt", "None\n")
        script = write_file(folder, "weather", "#!/bin/sh\necho $1\n")
        os.chmod(script, 0o755)
        tilde = self.recipe("A tilde server").replace(
            "/srv/finger", folder).replace("/usr/local/bin/weather", script)
        for text, replies in [(tilde, {
                b"help": b"Try a name, sysops, or weather:oslo.\r\n",
                b"NEWS": b"None\r\n", b"root": UNKNOWN,
                b"sysops": UNKNOWN + b"\r\n" + UNKNOWN,
                b"weather:oslo": b"weather:oslo\r\n",
                b"weather:-l": UNKNOWN}), (self.recipe("A decoy"), {
                    b"root": UNKNOWN,
                    b"": b"Finger online user list denied\r\n"})]:
            with serving(text) as server:
                for line, reply in replies.items():
                    with self.subTest(line):
                        self.assertEqual(server.ask(line + b"\r\n"), reply)


# ---- Log ------------------------------------------------------------------

QUERY = {"client": "192.0.2.7", "port": 51123, "q": b"/W alice",
         "outcome": "answered", "backend": "users", "bytes": 412, "ms": 3}


class LogTest(ServerCase):
    def setUp(self):
        self.path = os.path.join(self.enter(tempfile.TemporaryDirectory()),
                                 "log")

    def log_to_file(self, setting=""):
        return self.open_log(f"to = {self.path}\n{setting}")

    def text(self):
        """Give the text of the file, and empty it."""
        text = pathlib.Path(self.path).read_text("ascii")
        os.truncate(self.path, 0)
        return text

    def said(self):
        """Give the lines of the file, without their times; empty it."""
        return [line.partition(" ")[2] for line in self.text().splitlines()]

    def test_writes_an_event_as_text_or_json(self):
        self.log_to_file().event("info", "query", **QUERY)
        self.assertRegex(self.text(),
                         r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ query client="
                         r'192\.0\.2\.7 port=51123 q="/W alice" outcome='
                         "answered backend=users bytes=412 ms=3\n$")
        line = 'a"\n\u00e9\x1b'.encode() + b"\xe9"
        self.log_to_file("format = json").event(
            "info", "query", **{**QUERY, "q": line})
        fields = json.loads(self.text())
        self.assertRegex(fields.pop("time"), r"^\d{4}-.*Z$")
        self.assertEqual(list(fields.items()), list({
            "event": "query", **QUERY, "q": 'a"\n\u00e9\x1b\\xe9'}.items()))

    def test_quotes_what_could_break_a_line_or_a_value(self):
        for value, quoted in [
                ("plain", "plain"), (b"plain", '"plain"'), ("", ""),
                (b"", '""'), (7, "7"), ("a=b", '"a=b"'),
                ('a"b', '"a\\"b"'), ("a\\b", '"a\\\\b"'),
                ("\x1b[2J", '"\\x1b[2J"'), (" ~", '" ~"'),
                (b"a\r\nquery x=1", '"a\\x0d\\x0aquery x=1"'),
                ("\u00e9", '"\\xc3\\xa9"'), (b"\xe9", '"\\xe9"'),
                ("\ud800", '"\\xed\\xa0\\x80"'), ("\0\x7f", '"\\x00\\x7f"')]:
            with self.subTest(value=value):
                self.assertEqual(
                    fingerd.format_text("x", {"a": value, "b": 1}),
                    f"x a={quoted} b=1")

    def test_leaves_out_what_is_below_its_level(self):
        log = self.log_to_file("level = warning")
        for level in fingerd.LEVELS:
            log.event(level, level)
        self.assertEqual(self.said(), ["warning", "error"])

    def test_survives_a_full_disk_and_says_what_was_lost(self):
        log = self.log_to_file()
        full = OSError(errno.ENOSPC, "No space left on device")
        with mock.patch("os.write", side_effect=[full, 3]):
            log.event("info", "lost")
            log.event("info", "all but 3 bytes lost")
        log.event("info", "three")
        log.event("info", "four")
        self.assertEqual(self.said(), ["lost lines=2", "three", "four"])

    def test_cuts_the_value_and_not_the_line_where_a_line_is_too_long(self):
        reader, writer = os.pipe()
        log = fingerd.Log()
        log.output = fingerd.LogFile(writer)
        self.addCleanup(os.close, reader)
        self.addCleanup(log.output.close)
        for form, q in itertools.product(("text", "json"), (
                b"x", b"\0", b'"', b"\xc3\xa9", b"\xff", b"\xf0\x9f\x98\x80")):
            with self.subTest(format=form, q=q):
                log.format = getattr(fingerd, f"format_{form}")
                log.event("info", "query", **{**QUERY, "q": q * 5000})
                log.event("error", "bug", client="x" * 9,
                          traceback="y\n" * 4999, other="z" * 3000)
                query, bug = os.read(reader, 65536).decode(
                    "ascii").splitlines()
                for text in (query, bug):
                    self.assertLess(len(text), select.PIPE_BUF)
                    self.assertGreater(len(text), select.PIPE_BUF // 2)
                if form == "json":
                    self.assertEqual(json.loads(query)["ms"], 3)
                    self.assertEqual(json.loads(bug)["client"], "x" * 9)
                else:
                    self.assertRegex(query, r' port=51123 q="(x|\\"|(\\x..)+)'
                                     '+" outcome=answered .* ms=3$')
                    self.assertRegex(bug, r' traceback="(y|\\x0a)+" other=z+$')
        with mock.patch.object(log.output, "limit", 0):
            self.assertIn(b'"a": "", "b": ""',
                          log.line("info", "x", {"a": 1, "b": "text"}))

    def test_opens_again_for_all_of_a_line_or_none(self):
        class Slow:     # while it is formatted, the log is opened otherwise
            def __str__(self):
                opener.start()
                opener.join(0.02)
                return "b"

        def fail(fd):
            close(fd)
            raise OSError(errno.EIO, "Input/output error")

        log, close = self.log_to_file(), os.close
        settings = read_config(f"[log]\nto = {self.path}\nformat = json").log
        with self.assertRaises(OSError):
            log.open(read_config("[log]\nto = /no/such/log").log)
        opener = threading.Thread(target=log.open, args=[settings])
        log.event("error", "x", a=Slow())
        opener.join(HANG)
        first = log.output
        with mock.patch("os.close", fail):
            log.open(settings)
        self.assertIsNot(log.output, first)
        log.event("error", "y")
        text, line = self.text().splitlines()
        self.assertRegex(text, '^[^ ]+ x a="b"$')
        self.assertEqual(json.loads(line)["event"], "y")

    def test_keeps_of_an_address_what_it_is_told(self):
        for client, host, kept in [
                ("full", "192.0.2.7", "192.0.2.7"),
                ("full", "2001:db8::1:0:7", "2001:db8::1:0:7"),
                ("network", "192.0.2.7", "192.0.2.0/24"),
                ("network", "2001:db8:1:2::7", "2001:db8:1::/48"),
                ("network", "2001:db8::7", "2001:db8::/48"),
                ("network", "::1", "::/48"),
                ("network", "unknown", "unknown"),
                ("none", "192.0.2.7", "-"), ("none", "2001:db8::7", "-")]:
            log = self.log_to_file(f"client = {client}")
            log.event("info", "query", client=host, port=5, q=b"x")
            log.event("error", "failed", client=host, reason="x")
            port = 5 if client == "full" else 0
            with self.subTest(client=client, host=host):
                self.assertEqual(self.said(), [
                    f'query client={kept} port={port} q="x"',
                    f"failed client={kept} reason=x"])

    @needs_more_addresses
    def test_limits_and_networks_see_what_the_log_does_not_keep(self):
        server = self.serve("[server]\ndeny = 127.0.0.3\n"
                            "proxy_from = 127.0.0.5\n[limits]\n"
                            "queries_per_minute = 1\n[log]\nclient = none\n"
                            + USERS)
        # Of balancers that are not configured, and of one that is broken.
        one, two = proxied("127.0.0.7")
        malformed, denied = b"Malformed query\r\n", b"Access denied\r\n"
        for line, host, reply in [
                (one, "127.0.0.4", malformed),
                (one + one, "127.0.0.5", malformed),
                (two + two, "127.0.0.5", malformed),
                (one[:-3], "127.0.0.5", malformed),
                (two[:-1], "127.0.0.5", malformed),
                (b"moshez\r\n", "127.0.0.1", HAPPY),
                (b"moshez\r\n", "127.0.0.1", LIMITED),
                (b"moshez\r\n", "127.0.0.2", HAPPY),
                (b"moshez\r\n", "127.0.0.3", denied)]:
            with server.connect(line, host) as sock:
                sock.shutdown(socket.SHUT_WR)
                self.assertEqual(read_all(sock), reply)
        server.wait_log("query client=- port=0 ", 9)
        self.assertNotRegex("\n".join(server.log()),
                            r"127\.0\.0|x7f.x00.x00")


# ---- Server ---------------------------------------------------------------

UNKNOWN = b"No such user\r\n"
FAILED = b"Internal error in server\r\n"
HAPPY = b"Happy and well\r\n"
LIMITED = b"Too many queries, try again later\r\n"
ALICE = (b"Login: alice\t\t\tName: Alice Liddell\r\nPlan:\r\n"
         b"Down the rabbit hole.\r\n")


class AnswerTest(ServerCase):
    """What clients get, over real sockets."""

    def test_answers_every_form_of_the_query_line(self):
        server = self.serve()
        host = socket.gethostname().encode()
        for reply, *queries in [    # see QueryTest for more
                (HAPPY, [b"MosheZ\n"], [b"/W ", b"moshez", b"\r\n"],
                 [b"m", b"o", b"shez", b"\r", b"\n"],
                 [b"\xff", b"\xfb", b"\x0amoshez\r\n"],
                 [b"moshez@localhost\r\n"], [b"moshez@127.0.0.1\r\n"],
                 [b"moshez@[127.0.0.1]\r\n"], [b"moshez@" + host + b"\r\n"],
                 [b"moshez\r\nalice\r\n"],
                 [b"\xff\xfd\x03" * 180, b"moshez\r\n"]),
                (UNKNOWN, [b"x" * 512, b"\r", b"\r\n"]),
                (HAPPY + b"\r\n" + UNKNOWN + b"\r\n" + ALICE,
                 [b"moshez bob alice\r\n"]),
                (b"Finger online user list denied\r\n", [b"/W\r\n"]),
                (b"Finger forwarding service denied\r\n",
                 [b"a@example.org\r\n"], [b"@\r\n"]),
                (b"Malformed query\r\n", [b"\xe9\r\n"]),
                (b"Query too long\r\n", [b"x" * 513 + b"\n"],
                 [b"x" * 200, b"x" * 200, b"x" * 200],
                 [b"\xff\xfd\x03" * 600, b"\xff\xfd\x03" * 100])]:
            for segments in queries:
                with self.subTest(segments=segments):
                    self.assertEqual(server.ask(*segments), reply)

    def test_answers_as_it_is_configured(self):
        allowed = "[server]\nuser_list = yes\n"
        listed = (b"moshez  Happy and well\r\n"
                  b"alice   Login: alice\t\t\tName: Alice Liddell\r\n")
        welcome = "welcome = Ask for moshez\n   or alice\n"
        around = "[server]\nheader = above\nfooter = below\n"
        own = "[server]\nhostname = Finger.example.org\n"
        least = "[limits]\nmax_reply = 64\n[users]\nlong = " + "x" * 63
        host = socket.gethostname().encode()
        for text, table in [
                (allowed + USERS, {b"": listed, b"/W ": listed}),
                # No backend has a list.
                (allowed + "backend = finger\n[finger]\n"
                 f"command = {sys.executable}\n",
                 {b"": b"Finger online user list denied\r\n"}),
                (allowed + welcome + USERS,
                 {b"": b"Ask for moshez\r\nor alice\r\n"}),
                (around + USERS, {b"bob": UNKNOWN, b"moshez":
                                  b"above\r\n" + HAPPY + b"below\r\n"}),
                (own + USERS, {
                    b"moshez@finger.EXAMPLE.org": HAPPY, b"moshez@" + host:
                    b"Finger forwarding service denied\r\n"}),
                (least, {
                    b"long": b"x" * 49 + b"\r\n[truncated]\r\n",
                    b"a b c d e f":
                    (UNKNOWN + b"\r\n") * 3 + b"[truncated]\r\n"})]:
            with serving(text) as server:
                for line, reply in table.items():
                    with self.subTest(text=text, line=line):
                        self.assertEqual(server.ask(line + b"\r\n"), reply)

    def test_answers_a_line_that_ends_with_the_file(self):
        server = self.serve()
        for line, reply in [(b"moshez", HAPPY), (b"moshez\r", HAPPY),
                            (b"mo\xff\xfd\nshez", HAPPY), (b"", b"")]:
            with connect(server.address) as sock:
                sock.sendall(line)
                sock.shutdown(socket.SHUT_WR)
                self.assertEqual(read_all(sock), reply)
        server.wait_log('q="" outcome=silent backend=- bytes=0')

    def test_logs_a_line_for_each_connection(self):
        server = self.serve("[server]\nuser_list = yes\n" + USERS)
        for line, logged in [
                (b"/W moshez", 'q="/W moshez" outcome=answered backend=users'
                 " bytes=16"),
                (b"al\x1b\"", r'q="al\x1b\"" outcome=malformed backend=-'
                 " bytes=17"),
                (b"moshez bob", 'q="moshez bob" outcome=answered backend=users'
                 " bytes=32"),
                (b"", 'q="" outcome=list backend=users bytes=68')]:
            server.ask(line + b"\r\n")
            server.wait_log(r"query client=127.0.0.1 port=\d+ "
                            + re.escape(logged) + r" ms=\d+$")
        self.assertEqual(len(server.log()), 4)

    def test_allows_and_denies_by_network(self):
        for policy, host, allowed in [
                ("allow = 127.0.0.0/8", "127.0.0.1", True),
                ("allow = 192.0.2.0/24", "127.0.0.1", False),
                ("deny = 127.0.0.1", "127.0.0.1", False),
                ("deny = 192.0.2.0/24", "127.0.0.1", True),
                ("allow = 127.0.0.0/8\ndeny = 127.0.0.1", "127.0.0.1", False),
                ("allow = 2001:db8::/32", "2001:db8::1", True),
                ("allow = ::/0", "127.0.0.1", False),
                ("allow = 192.0.2.0/24", "::ffff:192.0.2.1", True),
                ("deny = fe80::/10", "fe80::1%eth0", False)]:
            with self.subTest(policy=policy, host=host):
                text = f"[server]\n{policy}\n{USERS}"
                site = fingerd.Answers(read_config(text), fingerd.Log())
                self.assertIs(site.allows(fingerd.plain_address(host)),
                              allowed)
        server = self.serve("[server]\ndeny = 127.0.0.0/8\n" + USERS)
        self.assertEqual(server.ask(b"moshez\r\n"), b"Access denied\r\n")
        server.wait_log('q="" outcome=denied')

    def test_counts_an_ipv6_network_as_one_address(self):
        key = fingerd.address_key
        self.assertEqual(key("192.0.2.1"), "192.0.2.1")
        self.assertEqual(key("2001:db8:1:2::1"), key("2001:db8:1:2:3::"))
        self.assertNotEqual(key("2001:db8:1:2::1"), key("2001:db8:1:3::1"))

    @unittest.skipUnless(has_ipv6(), "this system has no ::1")
    def test_listens_on_ipv6(self):
        server = self.serve(listen="[::1]:0")
        self.assertEqual(server.ask(b"moshez@::1\r\n"), HAPPY)
        self.assertEqual(server.ask(b"moshez@[::1]\r\n"), HAPPY)
        server.wait_log(r"client=::1 port=\d+ ", 2)


class BackendsTest(ServerCase):
    """The chain of backends, and backends that fail, wait or lie."""

    def ask_backend(self, action, line=b"bob\r\n", limits=""):
        """Give the reply with a backend behind users, and the log."""
        with serving(f"[limits]\nmax_threads = 1\n{limits}\n{USERS}",
                     [("test", TestBackend(action))]) as server:
            reply = server.ask(line)
            self.assertEqual(server.ask(line), reply)   # of the same thread
            server.wait_log(" query ", 2)
            return reply, server.log()

    def serve_held(self, text=USERS, **options):
        """Serve with a backend that holds its answers; give both."""
        backend = self.enter(held())
        return backend, self.serve(text, ("held", backend), **options)

    def test_asks_in_order_and_the_first_that_knows_answers(self):
        asked = []

        def second(user, timeout):
            asked.append(user)
            self.assertTrue(6 < timeout <= 7, timeout)
            return f"second\x1b {user}" if user != "carol" else None
        reply, log = self.ask_backend(second, b"moshez bob carol\r\n",
                                      "timeout = 7")
        self.assertEqual(
            reply, HAPPY + b"\r\nsecond^[ bob\r\n\r\n" + UNKNOWN)
        self.assertEqual(asked, ["bob", "carol"] * 2)
        self.assertIn(" outcome=answered backend=users,test ", log[0])

    def test_a_failure_ends_the_search_and_is_logged_in_one_line(self):
        def fail():
            raise OSError("the origin\nis away")
        client = "client=127.0.0.1 "
        for action, logged in [
                (fail, f"failed backend=test {client}"
                 r'reason="the origin\\x0ais away"'),
                *((bug, f'bug backend=test {client}traceback="Trace') for bug
                  in (lambda: 1 / 0, lambda: 79, lambda: ["text"])),
                (sys.exit, f'bug {client}traceback="Trace.*SystemExit')]:
            reply, log = self.ask_backend(lambda user, timeout: action())
            self.assertEqual(reply, FAILED)
            self.assertEqual(len(log), 4)
            self.assertRegex(log[0], logged)
            self.assertRegex(log[1], " outcome=failed backend=(test|-) ")

    def test_joins_the_lists_of_the_backends_unless_one_fails(self):
        backend: Any = TestBackend(None)
        server = self.serve("[server]\nuser_list = yes\n[users]\na = b\n",
                            ("test", backend))
        for given, reply in ((lambda: "c  d", b"a  b\r\nc  d\r\n"),
                             (lambda: None, b"a  b\r\n"),
                             (lambda: 1 / 0, FAILED)):
            backend.user_list = lambda *asked, give=given: give()
            self.assertEqual(server.ask(b"\r\n"), reply)
        server.wait_log("outcome=list backend=users,test ")

    @needs_more_addresses
    def test_one_address_leaves_some_of_max_threads_to_others(self):
        backend, server = self.serve_held("[limits]\nmax_threads = 8\n")
        greedy = [self.connect(server, b"greedy\r\n") for _ in range(5)]
        server.wait_waiting(fingerd.ASK, 5)
        self.assertEqual(server.server.lookups.threads.total, 2)
        others = [self.connect(server, b"other\r\n", f"127.0.0.{n}")
                  for n in range(2, 10)]
        for _ in range(8):
            self.assertTrue(backend.entered.acquire(timeout=HANG))
        server.wait_waiting(fingerd.ASK, 13)
        self.assertEqual(server.server.lookups.threads.total, 8)
        backend.release.set()
        for sock in others:
            self.assertEqual(read_all(sock), b"held other\r\n")
        self.assertEqual(read_all(greedy[-1]), b"held greedy\r\n")

    def test_asks_nothing_for_a_client_that_was_reset_while_queued(self):
        backend, server = self.serve_held("[limits]\nmax_threads = 1\n")
        asked, hold = [], backend.action

        def note(user, timeout):
            asked.append(user)
            return hold(user, timeout)
        backend.action = note
        for n in range(5):      # the first of these is not queued, but asked
            sock = self.connect(server, b"u%d\r\nmore\r\n" % n)
            server.wait_waiting(fingerd.ASK, n + 1)
            wait_until(lambda: asked, "the first")
            reset(sock)
            sock.close()
        patient = self.connect(server, b"patient\r\n")
        patient.shutdown(socket.SHUT_WR)    # as nc -N does
        server.wait_waiting(fingerd.ASK, 6)
        backend.release.set()
        self.assertEqual(read_all(patient), b"held patient\r\n")
        server.wait_log('q="u." outcome=gone backend=- bytes=0', 5)
        self.assertEqual(asked, ["u0", "patient"])

    @needs_more_addresses
    def test_a_late_thread_gives_its_place_to_others_but_not_for_ever(self):
        backend, server = self.serve_held(
            "[limits]\nmax_threads = 1\n" + USERS)

        def expire(sock, *users):
            """Have the first that waits be overdue."""
            def act():
                handler = server.waiting(fingerd.ASK)[0]
                handler.deadline = server.server.waiting.due = 0
            wait_until(lambda: [handler.query.users for handler in
                                server.waiting(fingerd.ASK)] == [*users],
                       users)
            server.in_loop(act)
            self.assertEqual(read_all(sock), FAILED)
        bob = self.connect(server, b"bob\r\n")
        self.assertTrue(backend.entered.acquire(timeout=HANG))
        carol = self.connect(server, b"carol\r\n", "127.0.0.2")
        expire(bob, ("bob",), ("carol",))
        self.assertTrue(backend.entered.acquire(timeout=HANG))
        expire(carol, ("carol",))
        expire(self.connect(server, b"dave\r\n"), ("dave",))
        expire(self.connect(server, b"eve\r\n", "127.0.0.3"), ("eve",))
        self.assertFalse(backend.entered.acquire(blocking=False))
        self.assertEqual(server.server.lookups.threads.total, 2)
        for state in ("asking", "queued"):
            server.wait_log(
                rf'reason="no backend answered in time \({state}', 2)
        self.assertEqual(server.ask(b"moshez\r\n"), HAPPY)
        bob.close()
        wait_until(lambda: server.server.hosts.total == 3, "his close")
        backend.release.set()
        wait_until(lambda: not server.server.lookups.threads, "the threads")
        self.assertEqual(server.server.hosts.total, 3)  # as it was
        self.assertEqual(server.ask(b"bob\r\n"), b"held bob\r\n")
        server.wait_log(" query ", 6)
        self.assertEqual(len(server.log()), 4 + 6)

    def test_asks_a_backend_that_does_not_wait_each_time(self):
        numbers = itertools.count(1)
        backend = TestBackend(lambda user, timeout: f"{user} {next(numbers)}")
        backend.waits = False
        server = self.serve(USERS, ("test", backend))
        self.assertEqual(server.ask(b"a\r\n"), b"a 1\r\n")
        self.assertEqual(server.ask(b"a\r\n"), b"a 2\r\n")

    def test_a_reload_that_allows_more_lookups_starts_them(self):
        backend, server = self.serve_held("[limits]\nmax_threads = 1\n")
        self.connect(server, b"bob\r\n")
        self.assertTrue(backend.entered.acquire(timeout=HANG))
        two = self.connect(server, b"carol\r\n")
        wait_until(lambda: server.server.lookups.queued, "queue")
        config = read_config("[limits]\nmax_threads = 8\n")
        config.backends += (("held", backend),)
        server.in_loop(lambda: server.server.change_answers(
            fingerd.Answers(config, server.server.log)))
        self.assertTrue(backend.entered.acquire(timeout=HANG))
        backend.release.set()
        self.assertEqual(read_all(two), b"held carol\r\n")

    def test_signals_that_come_while_it_acts_on_one_are_one_for_later(self):
        server, served = self.serve(), threading.Event()
        self.addCleanup(served.set)
        waiting: list[int] = []

        def act():
            if not served.is_set():
                for _ in range(20):
                    server.in_loop(act)
            waiting.append(len(server.server.inbox.signals))
        server.in_loop(act)
        wait_until(lambda: waiting, "the first")
        self.assertEqual(server.ask(b"moshez\r\n"), HAPPY)
        served.set()
        self.assertLessEqual(max(waiting), 1)

    def test_a_stop_ends_with_the_last_client_of_a_full_server(self):
        backend, server = self.serve_held(
            "[limits]\nmax_clients = 1\ntimeout = 1000\n" + USERS)
        sock = self.connect(server, b"bob\r\n")
        sock.shutdown(socket.SHUT_WR)
        self.assertTrue(backend.entered.acquire(timeout=HANG))
        queued = [self.connect(server, b"moshez\r\n") for _ in range(3)]
        server.in_loop(server.server.stop)
        wait_until(lambda: server.server.stop_deadline < math.inf,
                   "the stop")
        backend.release.set()
        self.assertEqual(read_all(sock), b"held bob\r\n")
        for each in queued:
            self.assertEqual(read_all(each), HAPPY)
            each.close()
        self.assertTrue(server.server.ended.wait(HANG))

    def test_a_thread_is_kept_for_the_next_and_ends_with_the_server(self):
        threads = []

        def note(user, timeout):
            threads.append(threading.current_thread())
            return user

        server = self.serve(USERS, ("test", TestBackend(note)))
        for _ in range(3):
            self.assertEqual(server.ask(b"bob\r\n"), b"bob\r\n")
            wait_until(lambda: server.server.lookups.idle, "an idle thread")
        self.assertEqual(threads, [threads[0]] * 3)
        server.server.shutdown()
        server.server.server_close()
        threads[0].join(HANG)
        self.assertFalse(threads[0].is_alive())


class ForwardTest(ServerCase):
    # 127.1 is 127.0.0.1 as a host with a name that is not this server's own.

    def test_hands_a_query_on_and_the_answer_back(self):
        hop = self.serve()
        server = self.serve(
            f"[server]\nforward = 127.1:{hop.address[1]}"
            f" 127.0.1:{free_port()}\nheader = above\n"
            "[users]\nmoshez = not this one\n")
        for reply, *lines in [
                (HAPPY, b"moshez@127.1", b"moshez@127.1.@localhost",
                 b"/W moshez@127.1"),
                (UNKNOWN, b"bob@127.1"), (FAILED, b"moshez@127.0.1"),
                (b"Finger online user list denied\r\n", b"@127.1"),
                (b"Finger forwarding service denied\r\n",
                 b"moshez@example.org@127.1", b"moshez@@127.1",
                 b"moshez@127.1@example.org", b"moshez alice@127.1",
                 b"moshez" + b"@127.1" * 5)]:
            for line in lines:
                with self.subTest(line=line):
                    self.assertEqual(server.ask(line + b"\r\n"), reply)
        server.wait_log(" query ", 11)
        self.assertEqual("\n".join(server.log()).count("=forwarded"), 6)
        server.wait_log('reason="connection refused"')
        hop.wait_log('q="/W moshez"')
        hop.wait_log('q="" outcome=list-denied')
        hop.wait_log('q="moshez@example.org"')

    def test_filters_and_cuts_what_the_next_hop_says_before_the_deadline(self):
        def hop(parts):
            sock, _ = listener.accept()
            with sock, contextlib.suppress(OSError):
                sock.recv(1000)
                for part in parts:
                    sock.sendall(part)

        def endless(part, pause):
            for _ in range(500):        # 36 MB, or 10 seconds
                said.append(part)
                time.sleep(pause)
                yield part

        for parts, reply in [
                ([b"\x1b[2J\x9b\n", b"x"], b"^[[2J\\x9b\r\nx\r\n"),
                ([], b"\r\n"),
                (endless(b"0123456\n" * 9000, 0),
                 b"\r\n0123456\r\n[truncated]\r\n"),
                (endless(b"x", 0.02), FAILED)]:
            said: list[bytes] = []
            limit = "timeout = 0.1" * (reply == FAILED)
            with socket.create_server(("127.0.0.1", 0)) as listener, serving(
                    f"[limits]\n{limit}\n[server]\nforward ="
                    f" 127.1:{listener.getsockname()[1]}\n") as server:
                _, got = in_threads([
                    functools.partial(hop, parts),
                    lambda: server.ask(b"x@127.1\r\n")])
                if limit:
                    server.wait_log(r'failed forward="?127\.1:\d+"? .*reason=')
            self.assertTrue(got.endswith(reply), got)
            self.assertLess(len(said), 250)

    def test_does_not_ask_itself(self):
        for peer, own, ours in [
                ("127.0.0.2", "127.0.0.1", True), ("::1", "::1", True),
                ("::ffff:127.0.0.2", "::ffff:127.0.0.1", True),
                ("192.0.2.1", "192.0.2.1", True),
                ("fe80::1%eth0", "fe80::1%eth0", True),
                ("192.0.2.1", "192.0.2.2", False)]:
            sock = mock.Mock()
            sock.getpeername.return_value = peer, 79
            sock.getsockname.return_value = own, 4711
            with self.subTest(peer=peer):
                self.assertIs(fingerd.is_own_end(sock), ours)
        port = free_port()
        hops = "127.1", "0.0.0.0"
        server = self.serve("[server]\nforward = " + " ".join(
            f"{hop}:{port}" for hop in hops) + f"\n{USERS}",
            listen=f"*:{port}")
        server.address = "127.0.0.1", port
        for hop in hops:
            self.assertEqual(server.ask(f"moshez@{hop}\r\n".encode()), FAILED)
        server.wait_log("the next hop is this server itself", 2)
        site = server.server.answers    # nor after a reload
        server.server.change_answers(fingerd.Answers(site.config, site.log))
        self.assertEqual(server.ask(b"moshez@127.1\r\n"), FAILED)
        server.wait_log("the next hop is this server itself", 3)

    def test_a_dead_address_of_a_next_hop_does_not_starve_the_next(self):
        with full_listener() as dead, \
                socket.create_server(("127.0.0.1", 0)) as good:
            found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "",
                      sock.getsockname()) for sock in (dead, *[good] * 9)]
            with fingerd.connect_before(time.monotonic() + 1, found) as sock:
                self.assertEqual(sock.getpeername(), good.getsockname())


def proxy_2(kind=0x11, body=b"", command=0x21):
    """Give a PROXY header of version 2."""
    return fingerd.PROXY_2 + struct.pack("!BBH", command, kind,
                                         len(body)) + body


def proxied(client, port=4711, reached="192.0.2.1"):
    """Give the PROXY headers, of both versions, for a client."""
    kind, number, family = ((0x21, 6, socket.AF_INET6) if ":" in client
                            else (0x11, 4, socket.AF_INET))
    addresses = [socket.inet_pton(family, text) for text in (client, reached)]
    return (f"PROXY TCP{number} {client} {reached} {port} 79\r\n".encode(),
            proxy_2(kind, b"".join(addresses) + struct.pack("!HH", port, 79)
                    + b"\x04\0\2no"))


class ProxyTest(ServerCase):
    """What load balancers say with the PROXY protocol."""

    MALFORMED = b"Malformed query\r\n"

    def test_reads_a_header_however_it_is_cut(self):
        v6 = ("2001:db8::5", 65535), "2001:db8::1"
        v4 = ("192.0.2.7", 4711), "192.0.2.1"
        for data, client, reached in [
                *((data, *v4) for data in proxied("192.0.2.7")),
                *((data, *v6) for data in proxied("2001:db8::5", 65535,
                                                  "2001:db8::1")),
                (b"PROXY TCP6 2001:DB8:0::5 2001:db8::1 65535 0\r\n", *v6),
                (b"PROXY TCP6 ::ffff:192.0.2.7 ::ffff:192.0.2.1 4711 79\r\n",
                 *v4),
                (proxy_2(0x12, bytes([192, 0, 2, 7, 192, 0, 2, 1, 18, 103,
                                      0, 79])), *v4),
                *((data, None, "") for data in (
                    b"PROXY UNKNOWN\r\n",
                    b"PROXY UNKNOWN ff \xff" + b"f" * 87 + b"\r\n",
                    proxy_2(0x00), proxy_2(0x10, b"x"),
                    proxy_2(0x31, b"/" * 216),
                    proxy_2(0x11, b"x", command=0x20),
                    proxy_2(0xff, command=0x20),
                    proxy_2(0x00, b"x" * 4080)))]:
            with self.subTest(data=data):
                for end in range(len(data)):
                    self.assertIsNone(fingerd.parse_proxy_header(data[:end]))
                for rest in (b"", b"alice\r\n"):
                    self.assertEqual(
                        fingerd.parse_proxy_header(data + rest),
                        (len(data), client, reached))

    def test_a_header_that_is_not_quite_one_is_malformed(self):
        for data in [
                b"alice\r\n", b"proxy UNKNOWN\r\n",
                *(b"PROXY " + rest for rest in (
                    b" UNKNOWN\r\n", b"UNKNOWN\n\r\n", b"UNKNOWNS\r\n",
                    b"UNKNOWN\n", b"\r\n", b"UNKNOWN " + b"f" * 92 + b"\r\n",
                    b"UNKNOWN " + b"f" * 93, b"TCP4\r\n",
                    b"TCP5 ::1 ::1 1 1\r\n", b"TCP4 ::1 ::1 1 1\r\n",
                    b"TCP4 \xff \xff 1 1\r\n", b"TCP6 fe80::1%lo ::1 1 1\r\n",
                    b"TCP6 192.0.2.7 192.0.2.1 1 1\r\n",
                    b"TCP6 2001:db8:::5 ::1 1 1\r\n")),
                *(b"PROXY TCP4 192.0.2." + rest + b"\r\n" for rest in (
                    b"7 192.0.2.1 4711", b"7 192.0.2.1 4711 79 ",
                    b"07 192.0.2.1 4711 79", b"7 192.0.2.256 4711 79",
                    b"7 192.0.2.1 65536 79", b"7 192.0.2.1 4711 65536",
                    b"7 192.0.2.1 04711 79", b"7 192.0.2.1 -1 79",
                    b"7 192.0.2.1 \xd9\xa1 79", b"7\0 192.0.2.1 4711 79",
                    b"7  192.0.2.1 4711 79")),
                proxy_2(0x11, b"x" * 11), proxy_2(0x21, b"x" * 35),
                proxy_2(0x41, b"x" * 40), proxy_2(0x13, b"x" * 40),
                proxy_2(0x11, b"x" * 12, command=0x22),
                proxy_2(0x11, b"x" * 12, command=0x11),
                proxy_2(0x00, b"x" * 4081),
                fingerd.PROXY_2.replace(b"Q", b"q") + b"\x20\0\0\0"]:
            with self.subTest(data=data):
                with self.assertRaises(fingerd.MalformedQuery):
                    fingerd.parse_proxy_header(data)
                with self.assertRaises(fingerd.MalformedQuery):
                    for end in range(len(data) + 1):
                        self.assertIsNone(
                            fingerd.parse_proxy_header(data[:end]))

    def balance(self, limits="", more=""):
        """Serve behind a load balancer."""
        return self.serve("[server]\nproxy_from = 127.0.0.1 192.0.2.0/24\n"
                          f"{more}\n[limits]\n{limits}\n{USERS}")

    def test_the_client_of_the_header_is_the_one_in_the_log(self):
        server = self.balance()
        for host, reached, own in (
                ("192.0.2.7", "192.0.2.1", "192.0.2.1"),
                ("2001:db8::7", "2001:db8::1", "[2001:db8::1]")):
            for header in proxied(host, 4711, reached):
                whole = header + f"moshez@{own}\r\n".encode()
                for segments in (
                        [whole], [whole[:len(header)], whole[len(header):]],
                        [whole[:-3], whole[-3:]], [whole[:20], whole[20:]],
                        [whole[i:i + 1] for i in range(len(whole))]):
                    with self.subTest(segments=segments):
                        self.assertEqual(server.ask(*segments), HAPPY)
            server.wait_log(re.escape(
                f'query client={host} port=4711 q="moshez@{own}" '), 10)
        wait_until(lambda: not server.server.hosts, "no client")

    def test_allow_and_deny_go_by_the_header(self):
        server = self.balance(more="allow = 192.0.2.0/28\ndeny = 192.0.2.9")
        denied = b"Access denied\r\n"
        for reply, *headers in (
                (HAPPY, *proxied("192.0.2.7")),
                (denied, *proxied("192.0.2.9"), *proxied("192.0.2.19")),
                (HAPPY, b"PROXY UNKNOWN\r\n", proxy_2(0, command=0x20))):
            for header in headers:
                self.assertEqual(server.ask(header + b"moshez\r\n"), reply)
        server.wait_log("client=127.0.0.1 .*outcome=answered", 2)

    def test_limits_go_by_the_header_and_spare_health_checks(self):
        server = self.balance("max_clients_per_host = 1\nmax_clients = 9"
                              "\nqueries_per_minute = 2")

        def hold(*headers):
            for data in headers:
                self.connect(server, data)
                holding.append(data)
                server.wait_waiting(fingerd.READ, len(holding))
        holding: list[bytes] = []
        check = b"PROXY UNKNOWN\r\n"
        hold(b"", b"PRO", check, check)
        one, two = (proxied(host)[0] for host in ("192.0.2.7", "192.0.2.8"))
        self.assertEqual([server.ask(one + b"moshez\r\n") for _ in range(3)],
                         [HAPPY, HAPPY, LIMITED])
        hold(two)
        wait_until(lambda: server.server.hosts.get("192.0.2.8"), "it")
        self.assertEqual(server.ask(two + b"moshez\r\n"), LIMITED)
        for _ in range(3):
            self.assertEqual(server.ask(check + b"moshez\r\n"), HAPPY)
        hold(b"", b"", b"", b"")
        server.wait_log("full clients=9 limit=9")

    def test_without_a_good_header_the_balancer_is_in_the_log(self):
        server = self.balance()
        for data, logged in [
                (b"moshez\r\n", 'client=127.0.0.1 .*q="moshez.*" .*malformed'),
                (b"PROXY TCP4 x\r\n", "client=127.0.0.1 .*PROXY.*malformed"),
                (proxied("192.0.2.7")[0] * 2, "client=192.0.2.7 .*malformed")]:
            self.assertEqual(server.ask(data), self.MALFORMED)
            server.wait_log(logged)
        for data, reply in ((b"", b""), (b"PROXY", self.MALFORMED)):
            sock = self.connect(server, data)
            sock.shutdown(socket.SHUT_WR)
            self.assertEqual(read_all(sock), reply)
        late = [self.connect(server, data) for data in (
            proxied("192.0.2.7")[1][:20], b"PROXY TCP4 192.0.2.7", b"",
            proxied("192.0.2.8")[0])]
        server.wait_waiting(fingerd.READ, 4)
        handlers = server.waiting(fingerd.READ)
        wait_until(lambda: sum(len(handler.text) for handler in handlers)
                   == 40 and "192.0.2.8" in server.server.hosts, "headers")
        self.assertEqual(select.select(     # what has come is not left there
            [handler.request for handler in handlers], [], [], 0)[0], [])
        server.in_loop(lambda: server.server.waiting.hurry(0, fingerd.READ))
        for sock in late:
            self.assertEqual(read_all(sock), b"Query timed out\r\n")
        for logged in ('"PROXY" outcome=malformed', "QUIT.*=timeout",
                       "PROXY.*=timeout", 'q="" .*=silent .* bytes=17'):
            server.wait_log("client=127.0.0.1 .*" + logged)
        server.wait_log('client=192.0.2.8 .*q="" outcome=silent')

    def test_a_header_of_a_stranger_is_a_malformed_query(self):
        for more in ("", "proxy_from = 192.0.2.0/24"):
            server = self.serve(f"[server]\n{more}\n{USERS}")
            for data in (*proxied("192.0.2.7"), b"PROXY UNKNOWN\r\n",
                         proxy_2(0, command=0x20)):
                self.assertEqual(server.ask(data + b"moshez\r\n"),
                                 self.MALFORMED)
            server.wait_log("client=127.0.0.1 .*outcome=malformed", 4)
            self.assertEqual(server.ask(b"PROXY moshez\r\n"),
                             UNKNOWN + b"\r\n" + HAPPY)


class Stub:
    """Something that waits, where a handler would."""

    wait, deadline = fingerd.NOTHING, 0.0

    def __init__(self, key):
        self.key = key


class LoopTest(unittest.TestCase):
    """What the loop knows of its clients, with a clock and no socket."""

    def test_counts_keep_no_key_that_has_none(self):
        counts = fingerd.Counts()
        for key in "aab":
            counts.add(key)
        self.assertEqual((counts.total, counts), (3, {"a": 2, "b": 1}))
        for key in "aba":
            counts.remove(key)
        self.assertEqual((counts.total, counts), (0, {}))

    def test_rates_recover_with_time_and_stay_bounded(self):
        rates = fingerd.Rates()
        asked = [rates.exceeded("a", 2, now) for now in (0, 1, 2, 3, 31, 32)]
        self.assertEqual(asked, [False, False, True, True, False, True])
        self.assertFalse(rates.exceeded("b", 2, 3))
        with mock.patch.object(fingerd, "TRACKED", 9):
            for n in range(20):
                rates.exceeded(n, 2, 40)
        self.assertEqual([*rates.buckets], [*range(11, 20)])

    def test_those_that_wait_are_due_in_their_order(self):
        waiting = fingerd.Waiting()
        a, b, c = map(Stub, "abc")
        self.assertEqual(waiting.due, math.inf)
        for stub, wait, deadline in ((a, fingerd.READ, 3),
                                     (b, fingerd.CLOSE, 2),
                                     (c, fingerd.READ, 5)):
            waiting.add(stub, wait, deadline)
        self.assertEqual(waiting.due, 2)
        due = []
        for now in (1.9, 2, 4, 5):
            for stub in waiting.overdue(now):
                waiting.remove(stub)
                due.append((now, stub))
        self.assertEqual(due, [(2, b), (4, a), (5, c)])
        self.assertEqual(waiting.due, math.inf)
        waiting.add(a, fingerd.READ, 9)
        waiting.add(b, fingerd.CLOSE, 8)
        waiting.hurry(7, fingerd.CLOSE)
        self.assertEqual([*waiting.overdue(6.9)], [])
        self.assertEqual((waiting.due, a.deadline), (7, 9))

    def test_those_that_were_answered_have_a_moment_to_close(self):
        waiting = fingerd.Waiting()
        a, b, c = map(Stub, "abc")
        waiting.add_left(a, 2)
        waiting.add_left(b, 3)
        waiting.add(c, fingerd.READ, 4)
        self.assertEqual(waiting.timeout(1), 1)
        self.assertEqual([*waiting.take_left(1)], [])
        self.assertEqual([*waiting.take_left(2)], [a])
        self.assertEqual(waiting.timeout(2), 1)
        self.assertEqual([*waiting.take_left(math.inf)], [b])
        self.assertEqual(waiting.timeout(3), 1)
        self.assertEqual(waiting.timeout(5), 0)

    def test_whoever_leaves_while_others_are_ended_is_not_ended_again(self):
        waiting = fingerd.Waiting()
        a, b = map(Stub, "ab")
        for stub in (a, b):
            waiting.add(stub, fingerd.READ, 1)
        due = []
        for stub in waiting.overdue(1):
            due.append(stub)
            for each in (a, b):
                waiting.remove(each)
        self.assertEqual((due, waiting.due), ([a], math.inf))

    def test_threads_are_given_address_by_address(self):
        lookups = fingerd.Lookups()
        stubs = [Stub(key) for key in "aaaabbc"]
        for stub in stubs:
            lookups.add(stub)
        order = []
        while lookups.next(8):
            order.append(lookups.next(8))
            lookups.begin(order[-1])
        self.assertEqual("".join(stub.key for stub in order), "abcab")
        self.assertEqual(order[0], stubs[0])
        lookups.give_up(order[0])
        lookups.end(order[0])
        self.assertEqual(lookups.next(8), stubs[2])
        self.assertEqual(lookups.next(4), None)

    def test_an_address_has_a_quarter_of_the_threads_and_at_least_one(self):
        for places, share in ((1, 1), (3, 1), (4, 1), (8, 2), (64, 16)):
            lookups = fingerd.Lookups()
            for _ in range(20):
                lookups.add(Stub("a"))
            while lookups.next(places):
                lookups.begin(lookups.next(places))
            self.assertEqual(lookups.threads.total, share)

    def test_the_door_is_closed_without_room_and_says_so_now_and_then(self):
        door = fingerd.Door([], mock.Mock())
        for clients, now, is_open, *said in (
                (2, 0, True), (3, 1, False, "full"), (4, 2, False),
                (2, 3, True, "room"), (3, 4, False), (2, 5, True),
                (3, 11.5, False, "full"), (1, 12, True, "room")):
            door.log.reset_mock()
            self.assertIs(door.is_open(clients, 3, now), is_open)
            self.assertEqual([(call[1][1], call[2]["clients"]) for call in
                              door.log.event.mock_calls],
                             [(event, clients) for event in said])

    def test_the_door_pauses_for_want_of_descriptors(self):
        door = fingerd.Door([], mock.Mock())
        for _ in range(2):
            self.assertTrue(door.pause(OSError(errno.EMFILE, "x"), 7))
        door.log.event.assert_called_once_with("error", "starved", reason="x",
                                               clients=7)
        self.assertFalse(door.is_open(7, 9, 3))
        self.assertFalse(door.pause(OSError(errno.ECONNABORTED, "x"), 7))
        self.assertTrue(door.is_open(7, 9, 3))


class LimitsTest(ServerCase):
    """Clients that are slow, many, or rude cost nobody else anything."""

    BIG = "big =\n" + "\n ".join(["", *["x" * 7000] * 35])      # 245,000 bytes

    def stopped(self, text=""):
        """Give a server whose loop does not run, and its listener."""
        listener, = fingerd.open_listeners([("127.0.0.1", 0)])
        log = fingerd.Log()
        log.level = 99      # of nothing
        return self.enter(fingerd.FingerServer([listener], fingerd.Answers(
            read_config(text), log), log)), listener

    def test_whatever_a_client_waits_for_ends_at_its_deadline(self):
        server = self.serve("[limits]\nmax_reply = 1M\ntimeout = 31622400\n"
                            + USERS + self.BIG)     # a year is no trouble
        silent, dripping, idle, slow = [
            self.connect(server, line, window=4096)
            for line in (b"", b"a", b"moshez\r\n", b"big\r\n")]
        server.wait_waiting(fingerd.READ, 2)
        server.wait_waiting(fingerd.CLOSE)
        server.wait_waiting(fingerd.WRITE)
        self.assertEqual(read_all(idle), HAPPY)
        handlers = server.waiting(fingerd.READ)
        deadlines = [handler.deadline for handler in handlers]
        dripping.sendall(b"a")
        wait_until(lambda: any(handler.text == b"aa" for handler in handlers),
                   "the next drop")
        self.assertEqual([handler.deadline for handler in handlers], deadlines)
        self.assertGreater(min(deadlines), time.monotonic() + 31622000)
        server.in_loop(lambda: server.server.waiting.hurry(
            0, fingerd.READ, fingerd.WRITE, fingerd.CLOSE))
        for sock in (silent, dripping):
            self.assertEqual(read_all(sock), b"Query timed out\r\n")
        server.wait_log('q="aa" outcome=timeout')
        server.wait_log('q="" outcome=silent backend=- bytes=17')
        server.wait_log('q="big" outcome=gone')
        for sock in (silent, dripping, slow):
            sock.close()
        wait_until(lambda: not server.server.hosts.total, "all to end")

    def test_slow_readers_share_a_text_and_hold_up_nobody_and_no_stop(self):
        server = self.serve("[limits]\nmax_reply = 1M\ntimeout = 99\n" + USERS
                            + self.BIG)
        slow = [self.connect(server, b"big\r\n", window=4096)
                for _ in range(3)]
        server.wait_waiting(fingerd.WRITE, 3)
        self.assertEqual(len({id(handler.reply.data) for handler in
                              server.waiting(fingerd.WRITE)}), 1)
        self.assertEqual(server.ask(b"moshez\r\n"), HAPPY)
        self.assertEqual(len(read_all(slow[0])), 245_072)
        server.wait_log('q="big" outcome=answered .*bytes=245072')

        def stop():
            server.server.stop()
            server.server.chores[server.server.abort] -= 100
            server.server.waiting.hurry(0)
        server.in_loop(stop)
        server.wait_log('q="big" outcome=gone', 2)

    def test_what_a_client_still_sends_costs_it_nothing_or_is_cut_off(self):
        server = self.serve("[users]\nlong = " + "x" * 60_000)
        for _ in range(5):
            sock = self.connect(server, b"long\r\n" + b"y" * 100_000)
            self.assertEqual(len(read_all(sock)), 60_002)
        with self.assertRaises(OSError):
            for _ in range(1000):
                sock.sendall(b"y" * 65536)
        wait_until(lambda: server.server.hosts.total == 4, "the close")

    def test_takes_more_clients_in_a_row_when_more_are_waiting(self):
        server, listener = self.stopped(
            "[limits]\nmax_clients_per_host = 300\n" + USERS)
        socks = [self.enter(connect(listener.getsockname()))
                 for _ in range(300)]       # the kernel holds as many
        for sock in socks:
            sock.sendall(b"moshez\r\n")
        server.door.accepts, turns = 1.0, 0
        while server.hosts.total < 300 and turns < 300:
            server.accept_clients(listener)
            turns += 1
        self.assertLess(turns, 60)
        for sock in socks:
            self.assertEqual(read_all(sock), HAPPY)

    def test_holds_clients_above_max_clients_in_the_kernel(self):
        server = self.serve("[limits]\nmax_clients = 3\n" + USERS)
        socks = [self.connect(server) for _ in range(3)]
        server.wait_log("full clients=3 limit=3")
        waiting = self.connect(server, b"moshez\r\n")
        self.assertEqual(select.select([waiting], [], [], 0.05)[0], [])
        socks.pop().close()
        self.assertEqual(read_all(waiting), HAPPY)
        waiting.close()
        server.wait_log("room clients=2 limit=3")

    def test_looks_who_has_closed_when_there_is_no_room(self):
        server = self.serve("[limits]\nmax_clients = 1\n" + USERS)
        start = time.monotonic()
        with mock.patch.object(fingerd, "LINGER", HANG):
            for _ in range(3):
                self.assertEqual(server.ask(b"moshez\r\n"), HAPPY)
        self.assertLess(time.monotonic() - start, HANG)
        server.in_loop(lambda: server.server.look_at_left(math.inf))
        self.assertLessEqual(" ".join(server.log()).count("full"), 1)

    def test_a_crowd_at_one_listener_leaves_room_to_another(self):
        backend = self.enter(held())
        server = self.serve("[limits]\nmax_clients = 1\n", ("held", backend),
                            listen="127.0.0.1:0 127.0.0.1:0")
        first, second = (listener.getsockname()
                         for listener in server.server.door.listeners)
        socks = []
        for number in range(9):
            sock = self.enter(connect(second if number == 2 else first))
            sock.sendall(b"u%d\r\n" % number)
            sock.shutdown(socket.SHUT_WR)       # its place is free then
            socks.append(sock)
        backend.release.set()
        for sock in socks:
            self.assertIn(b"held u", read_all(sock))
            sock.close()
        server.wait_log("outcome=answered", 9)
        order = re.findall('q="(u[0-9])"', "\n".join(server.log()))
        self.assertLess(order.index("u2"), 6)
        self.assertEqual(sorted(set(order) - {"u2"}), [
            user for user in order if user != "u2"])

    def test_an_address_holds_its_share_answered_or_not(self):
        server = self.serve("[limits]\nmax_clients_per_host = 3\n" + USERS)
        silent = self.connect(server)
        server.wait_waiting(fingerd.READ)
        replies = [read_all(self.connect(server, b"moshez\r\n"))
                   for _ in range(20)]
        self.assertEqual(replies, [HAPPY] * 2 + [LIMITED] * 18)
        server.wait_log('q="" outcome=limited')
        silent.close()
        self.assertEqual(server.ask(b"moshez\r\n"), HAPPY)

    def test_an_address_is_not_refused_for_those_that_have_closed(self):
        server = self.serve("[limits]\nmax_clients_per_host = 1\n" + USERS)
        for data in (b"", b"mos", b"moshez\r\n"):
            for number in range(12):
                for _ in range(3):
                    server.connect(data).close()
                with server.connect(b"moshez\r\n") as sock:
                    self.assertEqual(read_all(sock), HAPPY, data)
                    if number % 4 == 0:     # is watched then, not lingering
                        wait_until(lambda: server.waiting(fingerd.CLOSE), "it")

    def test_one_address_can_ask_only_so_often_also_what_is_no_query(self):
        for line, reply, logged in [
                (b"moshez\r\n", HAPPY, 'q="moshez" outcome=limited'),
                (b"\0\r\n", b"Malformed query\r\n", "outcome=limited"),
                (b"x" * 600, b"Query too long\r\n", "outcome=limited")]:
            server = self.serve("[limits]\nqueries_per_minute = 2\n" + USERS)
            self.assertEqual([server.ask(line) for _ in range(3)],
                             [reply, reply, LIMITED])
            server.wait_log(logged)

    @needs_root             # some kernels let nobody else attach a filter
    def test_a_stop_loses_nobody_that_has_connected(self):
        lost: list[Any] = []
        answered: list[Any] = []

        def load():
            while True:
                try:
                    sock = connect(server.address, timeout=0.2)
                except OSError:         # refused, or no answer at all
                    return
                with sock:
                    sock.settimeout(HANG)
                    try:
                        sock.sendall(b"moshez\r\n")
                        reply = read_all(sock)
                    except OSError as error:
                        reply = error
                    (answered if reply == HAPPY else lost).append(reply)

        def stop():
            wait_until(lambda: len(answered) > 300, "some queries")
            server.server.shutdown()

        server = self.serve("[limits]\nmax_clients_per_host = 1000\n" + USERS,
                            last_call=fingerd.LAST_CALL)
        in_threads([load] * 8 + [stop])
        self.assertEqual(lost, [])

    def test_a_stop_accepts_all_that_have_connected(self):
        server, listener = self.stopped("[limits]\nmax_clients = 2\n" + USERS)
        for _ in range(3):      # these end as soon as they are accepted
            with connect(listener.getsockname()) as sock:
                reset(sock)
        client = self.enter(connect(listener.getsockname()))
        client.sendall(b"moshez\r\n")
        with mock.patch.object(fingerd.Listener, "accept", side_effect=OSError(
                errno.EMFILE, "out of them")):
            self.assertEqual(server.close_door(), fingerd.LAST_CALL)
        self.assertEqual([server.close_door() for _ in range(3)],
                         [fingerd.LAST_CALL, fingerd.LAST_CALL, math.inf])
        self.assertEqual(client.recv(100), HAPPY)

    def test_a_stop_leaves_little_time_to_those_who_do_not_ask_or_close(self):
        server, _ = self.stopped()
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.sendall(b"half a line")
            server.process_request(ours, ("192.0.2.7", 1))
            handler, = server.waiting.handlers[fingerd.READ]
            with mock.patch.object(server.door, "listeners", []):   # inetd
                self.assertEqual(server.seconds_for(fingerd.READ), 10)
            server.stop()
            self.assertLessEqual(handler.deadline,
                                 time.monotonic() + fingerd.GRACE)
            for wait, seconds in ((fingerd.CLOSE, fingerd.GRACE),
                                  (fingerd.WRITE, 10)):
                self.assertEqual(server.seconds_for(wait), seconds)

    @unittest.skipUnless(sys.platform == "linux", "only Linux filters SYNs")
    @needs_root     # some kernels let nobody else
    def test_a_stop_takes_those_on_their_way_and_opens_no_connection(self):
        for passed in (False, True):    # systemd goes on to listen
            server, listener = self.stopped()
            listener.passed = passed
            address = listener.getsockname()
            with self.subTest(passed=passed), connect(address):
                now = time.monotonic()
                server.stop()
                self.assertGreaterEqual(server.chores[server.close_door],
                                        now + fingerd.LAST_CALL)
                if passed:
                    connect(address).close()
                else:
                    with self.assertRaises(socket.timeout):
                        connect(address, timeout=0.05)
                    listener.accept()[0].close()
                    with self.assertRaises(BlockingIOError):
                        listener.accept()


# ---- Process --------------------------------------------------------------

class Faulty:
    """A client's socket, one call of which fails once."""

    def __init__(self, sock, call, error):
        self.sock = sock
        self.call = call
        self.error = error

    def __getattr__(self, name):
        if name == self.call:
            self.call = ""
            raise self.error
        return getattr(self.sock, name)


class FaultsTest(ServerCase):
    """What the system may say to a call, and cannot be made to say here."""

    def ask_with_fault(self, server, call, name):
        """Have the next client meet the fault; give its reply, if any."""
        accept = fingerd.Listener.accept
        faults = [OSError(getattr(errno, name), "x")]

        def fail(listener):
            if call == "accept" and faults:
                raise faults.pop()
            sock, address = accept(listener)
            if faults:
                sock = Faulty(sock, call, faults.pop())
            return sock, address

        with mock.patch.object(fingerd.Listener, "accept", fail):
            reply = b""
            with contextlib.suppress(ConnectionError):
                reply = server.ask(b"moshez\r\n")
            self.assertEqual(faults, [])
            self.assertEqual(server.ask(b"moshez\r\n"), HAPPY)
        return reply

    @mock.patch.object(fingerd, "PAUSE", 0.01)
    def test_goes_on_whatever_call_fails(self):
        server = self.serve()
        door = server.server.door
        for call, logged, names in [
                ("accept", "starved", "EMFILE ENFILE ENOBUFS ENOMEM"),
                ("accept", "", "ECONNABORTED EPERM EPROTO ENETDOWN ETIMEDOUT"
                 " EHOSTUNREACH EOPNOTSUPP EINTR EAGAIN"),
                ("recv", "gone", "ECONNRESET ETIMEDOUT EHOSTUNREACH ENOMEM"),
                ("send", "gone", "EPIPE ECONNRESET ENOBUFS ENOMEM"),
                ("shutdown", "gone", "ENOTCONN ECONNRESET"),
                ("recv", "", "EAGAIN"), ("send", "", "EAGAIN")]:
            for name in names.split():
                with self.subTest(call=call, error=name):
                    wait_until(lambda: not door.starved_logged, "an accept")
                    door.accepts = 8.0      # more than there are clients
                    reply = self.ask_with_fault(server, call, name)
                    if logged != "gone":
                        self.assertEqual(reply, HAPPY)
        server.wait_log(" query ", 50)
        log = "\n".join(server.log())
        self.assertEqual([log.count(word) for word in (
            " starved ", "=gone", "=answered", " bug ")], [4, 10, 40, 0])

    def test_accepts_in_vain_now_and_then_only(self):
        server = self.serve()
        accept = fingerd.Listener.accept
        with mock.patch.object(fingerd.Listener, "accept", autospec=True,
                               side_effect=accept) as accepts:
            for _ in range(54):
                self.assertEqual(server.ask(b"moshez\r\n"), HAPPY)
        self.assertLess(accepts.call_count, 54 + 10)

    def test_a_client_that_cannot_be_watched_leaves_nothing(self):
        server = self.serve()
        with mock.patch.object(
                server.server.selector, "register", side_effect=OSError(
                    errno.ENOSPC, "No space left on device")), \
                server.connect(b"half a line") as sock, \
                contextlib.suppress(ConnectionError):
            self.assertEqual(read_all(sock), b"")
        server.wait_log('starved reason="no space left on device"')
        server.wait_log("outcome=gone")
        self.assertEqual(server.ask(b"moshez\r\n"), HAPPY)
        wait_until(lambda: not server.server.hosts.total, "the close")

    def test_a_clock_that_is_set_changes_nothing_but_the_times(self):
        now = time.time()
        server = self.serve("[limits]\ntimeout = 0.2\n"
                            "queries_per_minute = 60\n" + USERS)
        silent = self.connect(server)
        for clock in (now, now + 86400, now - 86400, 0, -3600, 2 ** 33):
            with self.subTest(clock=clock), mock.patch(
                    "time.time", lambda clock=clock: clock):
                self.assertEqual(server.ask(b"moshez\r\n"), HAPPY)
                stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ",
                                      time.gmtime(int(clock)))
                server.wait_log(f"^{stamp} query .*outcome=answered")
        self.assertEqual(read_all(silent), b"Query timed out\r\n")

    def test_threads_that_cannot_be_had_fail_only_who_needs_the_first(self):
        no_thread = mock.patch("threading.Thread.start",
                               side_effect=RuntimeError(
                                   "can't start new thread"))
        backend = self.enter(held())
        server = self.serve(USERS, ("held", backend))
        with no_thread:
            self.assertEqual(server.ask(b"other\r\n"), FAILED)
            self.assertEqual(server.ask(b"moshez\r\n"), HAPPY)
        server.wait_log("starved reason=\"can't start new thread\"")
        one = self.connect(server, b"bob\r\n")
        self.assertTrue(backend.entered.acquire(timeout=HANG))
        with no_thread:     # who can have none waits for one that runs
            two = self.connect(server, b"carol\r\n")
            wait_until(lambda: server.server.lookups.queued, "queue")
            self.assertEqual(server.ask(b"moshez\r\n"), HAPPY)
        backend.release.set()
        self.assertEqual(read_all(one), b"held bob\r\n")
        self.assertEqual(read_all(two), b"held carol\r\n")


class ProcessTest(unittest.TestCase):
    """The program itself, started as a user would."""

    def test_ends_cleanly_on_many_of_both_signals(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            with daemon(USERS, "--prefix", "who",
                        fresh=number == signal.SIGTERM) as program:
                self.assertEqual(ask(program.address, b"moshez\r\n"), HAPPY)

                def has_ended():
                    program.process.send_signal(number)
                    return program.has_ended()
                wait_until(has_ended, "the end")
                program.wait_log(f"^who: stopped signal={number.name}"
                                 r" queries=1 seconds=\d+$")
                program.wait_log(r"^who: ready listen=127\.0\.0\.1:\d+"
                                 r" backend=users (user=nobody )?"
                                 rf"pid={program.pid}$")

    @mock.patch.object(fingerd, "GRACE", 0.1)
    def test_serves_those_at_hand_before_it_ends(self):
        with installed() as program:
            gate = os.path.join(program.directory, "gate")
            os.mkfifo(gate)
            program.write("[server]\nbackend = users finger\n[finger]\ncommand"
                          f" = /bin/sh -c 'read x < {gate}; echo $x'\n"
                          "[limits]\ntimeout = 5\n" + USERS)
            program.serve()
            with connect(program.address) as slow, \
                    connect(program.address) as silent:
                slow.sendall(b"bob\r\n")
                with open(gate, "r+b", 0) as writer:    # waits for nobody
                    program.process.send_signal(signal.SIGTERM)
                    wait_until(lambda: refused(program.address), "the end")
                    program.process.send_signal(signal.SIGHUP)  # too late
                    writer.write(b"late but whole\n")
                    self.assertEqual(read_all(slow), b"late but whole\r\n")
                self.assertEqual(read_all(silent), b"Query timed out\r\n")
                silent.close()
                self.assertEqual(program.process.wait(HANG), 0)
            self.assertNotIn(" reloaded ", "\n".join(program.log()))

    def test_a_log_that_nobody_reads_holds_nobody_up(self):
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        with installed() as program:
            port = free_port()
            address = ("127.0.0.1", port)
            program.serve("--listen", f"127.0.0.1:{port}", stderr=writer)
            os.close(writer)
            wait_until(lambda: not refused(address), "the start")
            for _ in range(150):        # 84 kB: more than a pipe holds
                self.assertEqual(ask(address, b"x" * 500 + b"\r\n"), UNKNOWN)
            self.assertEqual(program.stop(), 0)

    @needs_proc
    def test_many_clients_cost_no_thread_and_little_memory(self):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        soft = max(soft, min(hard, 1300))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        count = 1000 if soft >= 1300 else 500
        with daemon(f"[limits]\nmax_clients_per_host = {count + 1}\n"
                    "timeout = 60\n" + USERS, fresh=True) as program, \
                contextlib.ExitStack() as stack:
            address = program.address
            self.assertEqual(ask(address, b"moshez\r\n"), HAPPY)
            before = int(program.status("VmRSS")[0])
            socks = [stack.enter_context(connect(address))
                     for _ in range(count)]
            self.assertEqual(ask(address, b"moshez\r\n"), HAPPY)
            self.assertEqual(program.status("Threads"), ["1"])
            grown = int(program.status("VmRSS")[0]) - before
            each = 1 if sys.version_info >= (3, 11) else 1.5     # KiB
            self.assertLess(grown, 512 + each * count)
            for sock in socks:      # and now they all ask at once
                sock.sendall(b"moshez\r\n")
            for sock in socks:
                self.assertEqual(read_all(sock), HAPPY)

    @unittest.skipUnless(hasattr(resource, "prlimit"), "no prlimit(2) here")
    @mock.patch.object(fingerd, "PAUSE", 0.1)
    def test_pauses_when_descriptors_are_out_and_goes_on_after(self):
        # Not as nobody: then we may not change its limits.
        args = [] if os.geteuid() else ["--user", "root"]
        with daemon(USERS, *args) as program, \
                contextlib.ExitStack() as stack:
            def cpu_seconds():
                times = program.stat()[11:13]
                return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")

            address = program.address
            used = len(os.listdir(f"/proc/{program.pid}/fd"))
            resource.prlimit(program.pid, resource.RLIMIT_NOFILE,
                             (used + 2, used + 2))
            held = [stack.enter_context(connect(address)) for _ in range(2)]
            waiting = stack.enter_context(connect(address))
            waiting.sendall(b"moshez\r\n")
            program.wait_log('starved reason="too many open files"')
            start = cpu_seconds()
            self.assertEqual(select.select([waiting], [], [], 0.2)[0], [])
            self.assertLess(cpu_seconds() - start, 0.1)
            held[0].close()
            self.assertEqual(read_all(waiting), HAPPY)
            self.assertEqual(
                len([x for x in program.log() if "starved" in x]), 1)
            stack.close()

    def test_lowers_its_limits_to_what_the_system_allows(self):
        finger = ("[server]\nbackend = users finger\n[finger]\n"
                  "command = /bin/echo\n")
        two, one = (f"[limits]\nmax_threads = {n}\n" for n in (2, 1))
        for text, soft, hard, line in [
                (finger + two, 200, 300,
                 "limits max_clients=254 descriptors=300 configured=10000"),
                (finger, 300, 300,
                 "limits max_threads=19 descriptors=300 configured=64"),
                (finger, 300, 300,
                 "limits max_clients=135 descriptors=300 configured=10000"),
                (one, 36, 36, "full clients=4 limit=4"),
                (one, 31, 31, "full clients=1 limit=1")]:
            with self.subTest(text=text, hard=hard), daemon(
                    text + USERS, preexec_fn=functools.partial(
                        resource.setrlimit, resource.RLIMIT_NOFILE,
                        (soft, hard))) as program, \
                    contextlib.ExitStack() as stack:
                self.assertEqual(ask(program.address, b"moshez\r\n"), HAPPY)
                for _ in range(5 * (hard < 100)):
                    stack.enter_context(connect(program.address))
                program.wait_log(line)
                if hard > 100:      # the config's limits are not for ever
                    program.reload(None, line, 2)

    def test_passes_over_addresses_that_the_system_lacks(self):
        here, there = [(socket.AF_INET, socket.SOCK_STREAM, 6, "",
                        (host, free_port())) for host in ("127.0.0.1",
                                                          "192.0.2.1")]
        # No name that is everywhere has such addresses.
        for found in ([there, here], [here, there]):
            with mock.patch("socket.getaddrinfo", return_value=found):
                # One that is listened on already is left over, too.
                listener, = fingerd.open_listeners([("name", 1), ("other", 1)])
            with listener:
                self.assertEqual(listener.getsockname(), here[4])
        with mock.patch("socket.getaddrinfo", return_value=[there] * 2), \
                self.assertRaisesRegex(fingerd.StartError, "192.0.2.1"):
            list(fingerd.open_listeners([("name", 1)]))

    def test_says_on_the_terminal_why_it_cannot_start(self):
        with installed() as program, socket.create_server(
                ("127.0.0.1", 0)) as busy:
            port = busy.getsockname()[1]
            missing = os.path.join(program.directory, "none")
            fifo = os.path.join(program.directory, "fifo")
            os.mkfifo(fifo)
            program.write(f"[log]\nsyslog_address = {missing}\n" + USERS)
            absent = f"no such file or directory: {missing}"
            for option, value, message in [
                    ("--listen", f"127.0.0.1:{port}", f"listen on 127.0.0.1:"
                     f"{port}: address already in use; stop the program that"
                     " is there, or use another port"),
                    ("--listen", "a..b:79",
                     "listen on a..b:79: not a host name"),
                    ("--listen", "192.0.2.1:0",
                     "listen on 192.0.2.1:0: cannot assign requested address"),
                    ("--listen", "no-such-host.invalid:0",
                     "listen on no-such-host.invalid:0: "),
                    ("--pidfile", f"{missing}/pid",
                     f"lock the pidfile: {absent}/pid"),
                    ("--logfile", f"{program.config}/log",
                     f"open the log: not a directory: {program.config}/log"),
                    ("--logfile", fifo, "open the log: no such device"),
                    ("--logfile", "syslog", f"reach syslog at {missing}: no"
                     " such file or directory"),
                    ("--rundir", missing,
                     f"enter chroot or rundir: {absent}")]:
                with self.subTest(option=option, value=value):
                    status, out, err = program.start(option, value)
                    self.assertEqual((status, out), (1, ""))
                    self.assertRegex(err, "^fingerd: cannot "
                                     + re.escape(message) + ".*\n$")
                    self.assertFalse(os.path.exists(program.pidfile))

    def test_closing_its_terminal_ends_it_unless_it_has_nohup(self):
        def take_terminal():
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            if nohup:
                signal.signal(signal.SIGHUP, signal.SIG_IGN)

        for nohup, chroot in ((False, False), (True, False), (False, True)):
            if chroot and os.geteuid():
                self.skipTest("needs root")
            with self.subTest(nohup=nohup, chroot=chroot), \
                    installed() as program:
                terminal, end = os.openpty()
                program.process = start_fingerd(
                    "--config", program.config, "--listen", "127.0.0.1:0",
                    "-l", program.log_path, *["--chroot", program.directory][
                        :2 * chroot], stdin=end, preexec_fn=take_terminal)
                os.close(end)
                address = program.address
                program.process.send_signal(signal.SIGHUP)
                program.wait_log(" reloaded ")      # the terminal is there
                os.close(terminal)
                if nohup:
                    program.wait_log(" reloaded ", 2)
                    self.assertEqual(ask(address, b"moshez\r\n"), HAPPY)
                    program.process.send_signal(signal.SIGTERM)
                self.assertEqual(program.process.wait(HANG), 0)
                program.wait_log("stopped signal=SIG"
                                 + ("TERM" if nohup else "HUP"))

    def test_only_root_can_become_another(self):
        with as_nobody():
            self.assertIsNone(fingerd.choose_ids(read_config("").daemon))
            for name, value in (("user", "root"), ("group", "54321"),
                                ("chroot", "/")):
                config = read_config("", {name: value})
                with self.assertRaisesRegex(fingerd.StartError, "only root"):
                    fingerd.choose_ids(config.daemon)


NOBODY = 65534      # a user that has nothing


class BackgroundTest(unittest.TestCase):
    """The daemon in the background, its pidfile, and commands about it."""

    def test_the_launcher_returns_when_it_serves_and_is_left_behind(self):
        with background() as program:
            pid = program.pid
            self.assertEqual(ask(program.address, b"moshez\r\n"), HAPPY)
            self.assertIn(f" pid={pid}", program.wait_log("ready"))
            for path, mode in ((program.pidfile, 0o600),
                               (program.log_path, 0o640)):
                self.assertEqual(os.stat(path).st_mode & 0o777, mode)
            if not os.path.exists("/proc/self/status"):
                self.skipTest("no /proc here")
            session, terminal = map(int, program.stat()[3:5])
            self.assertNotIn(session, (pid, os.getsid(0)))
            self.assertEqual(terminal, 0)
            self.assertEqual(program.status("Umask"), ["0027"])
            if os.access(f"/proc/{pid}/cwd", os.R_OK):
                self.assertEqual(os.readlink(f"/proc/{pid}/cwd"), "/")
                for fd in range(3):
                    self.assertEqual(os.readlink(f"/proc/{pid}/fd/{fd}"),
                                     os.devnull)

    def test_runs_in_the_rundir_with_the_umask_that_are_wanted(self):
        with tempfile.TemporaryDirectory() as rundir:
            os.chmod(rundir, 0o755)
            script = write_file(rundir, "script", "pwd\numask\n")
            with background("[server]\nbackend = finger\n[finger]\ncommand ="
                            f" /bin/sh {script}\n", "--rundir", rundir,
                            "--umask", "077") as program:
                self.assertEqual(
                    ask(program.address, b"x\r\n").decode().split(),
                    [os.path.realpath(rundir), "0077"])
                self.assertEqual(os.stat(program.log_path).st_mode & 0o777,
                                 0o600)

    def test_only_one_can_run_until_it_has_died(self):
        with background(start=False) as program:
            starts = [program.start(run=start_fingerd) for _ in range(5)]
            self.assertEqual(sorted(start.wait() for start in starts),
                             [0, 1, 1, 1, 1])
            first, (host, port) = program.pid, program.address
            self.assertEqual(
                program.start("--listen", f"{host}:{port}"),
                (1, "", f"fingerd: already running, pid {first}"
                        f" ({program.pidfile} is locked)\n"))
            self.assertEqual(ask(program.address, b"moshez\r\n"), HAPPY)
            os.kill(first, signal.SIGKILL)
            wait_until(lambda: not fingerd.find_daemon(program.pidfile)[0],
                       "its end")
            # The number alone proves nothing.
            for command, status, said in [
                    ("--status", 1, f"has died; it was pid {first}"),
                    ("--stop", 0, "is not running"),
                    ("--reload", 1, "is not running")]:
                self.assertEqual(program.run(command),
                                 (status, f"fingerd {said}\n", ""))
            write_file(program.directory, "pid", f"{first:010}\n")
            self.assertEqual(program.start(), (0, "", ""))
            self.assertNotEqual(program.pid, first)
            self.assertEqual(program.run("--status"), (
                0, f"fingerd is running, pid {program.pid}\n", ""))

    def test_a_pidfile_is_removed_at_the_end_or_has_been_before(self):
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "pid")
            with fingerd.hold_pidfile(path):
                self.assertEqual(os.listdir(directory), ["pid"])
            self.assertEqual(os.listdir(directory), [])
            with fingerd.hold_pidfile(path):
                os.unlink(path)
                write_file(directory, "pid")        # is another's
            self.assertEqual(os.listdir(directory), ["pid"])
            with mock.patch("fcntl.lockf", lambda *args: os.unlink(path)), \
                    self.assertRaisesRegex(
                        fingerd.StartError, "just been removed; start again"):
                fingerd.hold_pidfile(path).__enter__()

    def test_takes_nothing_else_for_a_pidfile(self):
        with config_file(USERS) as config:
            folder, path = os.path.dirname(config), config + ".pid"
            self.assertEqual(fingerd.find_daemon(path), (0, 0))
            good = write_file(folder, "good", "4711\n")
            table: list[Any] = [
                ("", 0), ("4711\n", 4711), ("4711", 4711),
                ("99999999999\n", None), ("4711 and more", None),
                ("4711" + "\n" * 30, None), (os.link, None),
                (os.symlink, None)]
            for make, number in table:
                if isinstance(make, str):
                    write_file(folder, "fingerd.conf.pid", make)
                else:
                    os.unlink(path)
                    make(good, path)
                before = os.lstat(path)[:7]
                with self.subTest(make=make):
                    if number is not None:
                        self.assertEqual(fingerd.find_daemon(path),
                                         (0, number))
                        continue
                    with self.assertRaises(fingerd.StartError):
                        fingerd.find_daemon(path)
                    with self.assertRaises(fingerd.StartError):
                        fingerd.hold_pidfile(path).__enter__()
                    self.assertEqual(os.lstat(path)[:7], before)
            os.unlink(path)
            os.mkfifo(path)
            wrong = (f"fingerd: {path} is not a pidfile (a file with one name,"
                     " a number or nothing in it); name another\n")
            for status, command in [(1, "--daemon"), (4, "--status"),
                                    (1, "--stop")]:
                self.assertEqual(
                    run_fingerd("--config", config, "--pidfile", path,
                                "--logfile", config + ".log", command),
                    (status, "", wrong))

    @mock.patch.object(fingerd, "GRACE", 0.1)
    def test_stop_waits_until_it_is_gone(self):
        with background() as program, connect(program.address) as sock:
            address = program.address
            sock.sendall(b"mos")        # takes it a while to give up
            self.assertEqual(program.run("--stop"), (0, "", ""))
            self.assertEqual(fingerd.find_daemon(program.pidfile), (0, 0))
            self.assertRegex(program.log()[-1], "stopped signal=SIGTERM")
            self.assertEqual(read_all(sock), b"Query timed out\r\n")
            self.assertTrue(refused(address))
            # What it may not remove, as nobody, it empties.
            self.assertEqual(os.path.exists(program.pidfile),
                             os.geteuid() == 0)

    def test_signals_at_the_start_are_acted_on_when_it_serves(self):
        for numbers, status, lines in [
                ((signal.SIGHUP, signal.SIGUSR1), 0, ["reload", "counters"]),
                ((signal.SIGTERM,), 0, ["stopped signal=SIGTERM"]),
                ((signal.SIGINT,), 0, ["stopped signal=SIGINT"])]:

            def interrupt(self, answers, numbers=numbers):
                for number in numbers:
                    os.kill(os.getpid(), number)

            with self.subTest(numbers=numbers), mock.patch.object(
                    fingerd.Daemon, "give_up_rights", interrupt), \
                    background(start=False) as program:
                self.assertEqual(program.start(), (status, "", ""))
                for line in lines:
                    program.wait_log(line)

    def test_a_start_that_waits_for_a_name_can_be_ended(self):
        with installed() as program, mock.patch.object(
                fingerd, "find_host", lambda *name: signal.pause()):
            program.serve("--pidfile", program.pidfile)
            wait_until(lambda: os.path.exists(program.pidfile), "the lock")
            self.assertEqual(program.stop(), -signal.SIGTERM)

    def test_commands_need_a_pidfile_but_no_good_config(self):
        with background() as program:       # a bad one is there at its end
            for text, args, status in [
                    ("", [], 2), ("[daemon]\npidfile = /x\x01y\n", [], 2),
                    (f"[daemon]\npidfile = {program.pidfile}\n[x]\n", [], 0),
                    ("[nonsense]\n", ["--pidfile", program.pidfile], 0)]:
                program.write(text)
                result = run_fingerd("--config", program.config, *args,
                                     "--status")
                self.assertEqual(result[0], status)
                if not text:
                    self.assertEqual(
                        result[2], "fingerd: no pidfile is configured; set"
                        " pidfile in [daemon], or give --pidfile\n")


class ReloadTest(unittest.TestCase):
    def test_takes_up_users_limits_policy_and_log(self):
        # As nobody it must not need a module that only root could read.
        with background("[users]\na = old\n", fresh=True) as program:
            self.assertEqual(ask(program.address, b"a\r\n"), b"old\r\n")
            program.write("[users]\na = new\n[limits]\nmax_query = 70\n"
                          "[server]\nuser_list = yes\n[log]\nformat = json\n")
            self.assertEqual(program.run("--reload"), (0, "", ""))
            event = json.loads(program.wait_log("reloaded"))
            self.assertEqual(event["config"], program.config)
            for line, reply in [(b"a", b"new\r\n"), (b"", b"a  new\r\n"),
                                (b"x" * 71, b"Query too long\r\n")]:
                self.assertEqual(ask(program.address, line + b"\r\n"), reply)

    def test_a_bad_file_keeps_everything_and_says_why(self):
        with background() as program:
            address, path = program.address, program.config
            self.assertIn("not started", program.reload(
                "[users]\nmoshez = gone\n[limits]\ntimeout = x\n"
                "max_clients = 0\n", "reload-failed reason=.*2 errors in"))
            program.wait_log(r'reload-failed reason=".*fingerd\.conf:4:'
                             r' timeout: \\"x\\" is not a number')
            os.unlink(path)
            program.reload(None, 'reason="cannot read the config: no such')
            os.mkfifo(path, 0o644)      # it holds nobody up
            program.rotate()            # and the log is opened again
            program.reload(None, 'reload-failed reason=".*fingerd.conf is not'
                                 ' a regular file"')
            self.assertEqual(ask(address, b"moshez\r\n"), HAPPY)
            os.unlink(path)
            program.write("[server]\nhostname = x\n[daemon]\nuser = root\n"
                          "rundir = /\n" + USERS)
            for times in (1, 2):
                program.reload(None, " reloaded ", times)
            said = [line.partition(" ")[2] for line in program.log()
                    if "not-reloaded" in line]
            self.assertEqual(sorted(said), [
                f'not-reloaded setting={name} reason="only a restart can'
                ' change it"' for name in ("rundir", "user") for _ in "12"])

    def test_loses_no_query_in_many_reloads(self):
        with background() as program:
            address, stop = program.address, threading.Event()

            def load():
                replies = []
                while not stop.is_set():
                    replies.append(ask(address, b"mos", b"hez\r\n"))
                return replies

            def reload():
                try:
                    for number in range(20):
                        program.reload(
                            (USERS, "[users]\nmoshez = Other words\n")[
                                number % 2], " reloaded ", number + 1)
                finally:
                    stop.set()

            one, two, _ = in_threads([load, load, reload])
            self.assertLessEqual({*one, *two}, {HAPPY, b"Other words\r\n"})
            program.wait_log("outcome=answered", len(one + two))
            self.assertEqual(len([line for line in program.log()
                                  if " query " in line]), len(one + two))

    def test_reload_signals_even_when_it_finds_errors_itself(self):
        with background() as program:
            reload = ["--config", program.config, "--reload"]
            program.write("[daemon]\npidfile = "
                          f"{program.pidfile}\n[nonsense]\n" + USERS)
            for args in (["--pidfile", program.pidfile], []):
                program.rotate()
                status, out, err = run_fingerd(*reload, *args)
                self.assertEqual((status, out), (1, ""))
                self.assertIn(":3: [nonsense]: no such section", err)
                program.wait_log("reload-failed .*nonsense")
            program.write("[nonsense]\n")      # no pidfile is known
            status, _, err = run_fingerd(*reload)
            self.assertEqual((status, "[nonsense]" in err), (2, True))
            none = os.path.join(program.directory, "none")      # nor a daemon
            status, _, err = run_fingerd(*reload, "--pidfile", none)
            self.assertEqual((status, "[nonsense]" in err), (1, True))

    @needs_proc
    @mock.patch.object(fingerd, "GRACE", 0.1)
    def test_who_is_here_gets_the_new_limits_and_no_program_stays(self):
        with installed() as program:
            family = Family(program.directory)
            self.addCleanup(os.close, family.fd)
            os.chmod(family.path, 0o666)
            script = write_file(program.directory, "script",
                                f"exec 9>{family.path}; echo x >&9; sleep 60")
            text = ("[server]\nbackend = finger\n[finger]\ncommand = /bin/sh"
                    f" {script}\n[limits]\ntimeout = ")
            program.write(text + "20\n")
            self.assertEqual(program.start(), (0, "", ""))
            with connect(program.address) as sock, \
                    connect(program.address) as slow:
                sock.sendall(b"bob\r\n")
                slow.sendall(b"bo")
                select.select([family.fd], [], [], HANG)
                program.reload(text + "0.1\n", " reloaded ")
                self.assertEqual(read_all(sock), FAILED)
                self.assertEqual(read_all(slow), b"Query timed out\r\n")
            self.assertEqual(program.run("--stop"), (0, "", ""))
            self.assertEqual(family.gone(), b"x\n")

    @needs_root
    def test_warns_that_a_reload_cannot_read_the_config(self):
        uid, gid = pwd.getpwnam("nobody")[2:4]
        as_root = ["--user", "root"]
        with installed() as program:
            path, folder = program.config, program.directory
            cannot = f"fingerd: a reload cannot read {path}: "
            closed = "uid %d may not open %s; change its mode\n"
            for owner, group, mode, folder_mode, args, why in [
                    (0, 0, 0o644, 0o711, [], ""),
                    (uid, 0, 0o400, 0o711, [], ""),
                    (uid, 0, 0o400, 0o700, as_root, ""),
                    (0, gid, 0o640, 0o711, [], ""),
                    (0, gid, 0o604, 0o711, [], closed % (uid, path)),
                    (0, 0, 0o600, 0o711, [], closed % (uid, path)),
                    (0, 0, 0o644, 0o744, [], closed % (uid, folder)),
                    (0, 0, 0o644, 0o755, ["--chroot", folder], ""),
                    (0, 0, 0o644, 0o755, ["--chroot", "/usr"],
                     "it is outside the chroot /usr; move it there\n")]:
                os.chown(path, owner, group)
                os.chmod(path, mode)
                os.chmod(folder, folder_mode)
                with self.subTest(mode=mode, folder=folder_mode, args=args):
                    self.assertEqual(
                        program.run("--check", *args),
                        (0, f"{path} is good\n", why and cannot + why))

    @needs_root
    @needs_proc
    def test_reload_goes_by_the_user_that_the_daemon_has_become(self):
        for args, status, event in ([], 1, "reload-failed"), (
                ["--user", "root"], 0, " reloaded "):
            with self.subTest(args=args), background(start=False) as program:
                os.chmod(program.config, 0o600)
                warning = program.run("--check", *args)[2]
                self.assertEqual(bool(warning), bool(status))
                self.assertEqual(program.start(*args), (0, "", warning))
                self.assertEqual(program.run("--reload"),
                                 (status, "", warning))
                program.wait_log(event)

    @mock.patch.object(fingerd, "fit_max_clients", lambda *args: None)
    def test_keeps_nothing_of_the_configs_it_had(self):
        def count():
            kept = (fingerd.Answers, WebBackend, urllib.request.OpenerDirector)
            return [type(x) for x in gc.get_objects() if type(x) in kept]

        with config_file("[server]\nbackend = web\n[web]\nprefix = https:"
                         "//127.0.0.1:1/\n[log]\nlevel = error\n") as path:
            daemon = fingerd.Daemon(fingerd.read_config(path, print),
                                    fingerd.Log())
            answers = fingerd.Answers(daemon.config, daemon.log)
            with fingerd.FingerServer([], answers, daemon.log) as (
                    daemon.server), fingerd.Notifier() as daemon.notifier:
                del answers
                daemon.reload()
                before = count()
                for _ in range(3):
                    daemon.reload()
                self.assertCountEqual(count(), before)
                self.assertEqual(daemon.reloads["ok"], 4)

    def test_reopens_its_log_or_writes_on_in_the_one_it_has(self):
        with background() as program:
            old = program.rotate()
            program.reload(None, r"^\d{4}-\S+ reloaded ")
            self.assertNotIn("reloaded", pathlib.Path(old).read_text())
            os.truncate(program.log_path, 0)    # as copytruncate does
            os.kill(program.pid, signal.SIGUSR1)
            line = program.wait_log("counters")
            self.assertEqual(program.log(), [line])     # no hole before it
            self.assertRegex(line, r"^\d{4}-\S+ counters ")
            os.rename(program.log_path, old)
            os.mkdir(program.log_path)          # no new one can be had
            os.kill(program.pid, signal.SIGHUP)
            Logged(old).wait_log("reload-failed")
            os.rmdir(program.log_path)

    def test_logs_its_settings_at_debug_and_counters_for_sigusr1(self):
        with background("[log]\nlevel = debug\n[limits]\ntimeout = 7\n"
                        + USERS) as program:
            for line in (b"moshez", b"moshez", b"bob", b"\0"):
                ask(program.address, line + b"\r\n")
            program.wait_log("outcome=malformed")
            os.kill(program.pid, signal.SIGUSR1)
            self.assertRegex(
                program.wait_log("counters"),
                r"counters seconds=\d+ queries=4 clients=\d lookups=0 "
                r".*\bunknown=1 .*\bmalformed=1 .*\banswered=2 ")
            log = "\n".join(program.log())
            for words in ("limits name=timeout value=7",
                          "server name=user_list value=no",
                          "server name=listen value=127.0.0.1:0",
                          "daemon name=daemonize value=yes"):
                self.assertIn(f"setting section={words}\n", log)


class StatsTest(Case):
    """The text file for Prometheus."""

    def test_counts_by_outcome_and_backend_and_time(self):
        stats, both = fingerd.Stats(), fingerd.Reply("answered", b"", "a,b")
        for reply, seconds in ((fingerd.GONE, 0.0005), (both, 0.3),
                               (both, 11)):
            stats.count(reply, seconds)
        bounds = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25,
                  0.5, 1, 2.5, 5, 10, "+Inf"]
        buckets = "".join(
            f'fingerd_query_seconds_bucket{{le="{bound}"}} {number}\n'
            for bound, number in zip(bounds, [1] * 9 + [2] * 5 + [3]))
        self.assertEqual(stats.text(2, 1, {"ok": 3, "failed": 0}), f"""\
# TYPE fingerd_queries_total counter
fingerd_queries_total{{outcome="gone",backend="-"}} 1
fingerd_queries_total{{outcome="answered",backend="a,b"}} 2
# TYPE fingerd_query_seconds histogram
{buckets}fingerd_query_seconds_sum 11.300500
fingerd_query_seconds_count 3
# TYPE fingerd_clients gauge
fingerd_clients 2
# TYPE fingerd_threads gauge
fingerd_threads 1
# TYPE fingerd_reloads_total counter
fingerd_reloads_total{{result="ok"}} 3
fingerd_reloads_total{{result="failed"}} 0
""")

    def test_a_write_that_fails_is_logged_once_until_one_succeeds(self):
        folder = pathlib.Path(self.enter(tempfile.TemporaryDirectory()), "x")
        server = self.enter(serving(f"[server]\nstats = {folder}/f.prom"))
        site = server.server.answers
        program = fingerd.Daemon(site.config, site.log)
        program.server = server.server
        for times in (1, 2):
            for _ in range(2):
                self.assertEqual(program.write_stats(), 15)
            self.assertEqual(len(server.log()), times)
            server.wait_log("failed stats=.*f.prom reason=.*no such file")
            folder.mkdir()
            program.write_stats()
            folder.joinpath("f.prom").unlink()
            folder.rmdir()
        program.write_stats()
        site.config.server.stats = f"{folder}/g.prom"       # by a reload
        program.write_stats()
        server.wait_log("failed stats=.*g.prom reason=")
        self.assertEqual(len(server.log()), 4)

    def test_the_file_is_whole_at_any_time_and_all_may_read_it(self):
        def rename(old, new):
            self.assertEqual(path.read_text(), "old")
            os.replace(old, new)

        folder = pathlib.Path(self.enter(tempfile.TemporaryDirectory()))
        path, other = folder / "f.prom", folder / "other"
        path.write_text("old")
        folder.joinpath("f.prom.new").symlink_to(other)     # by a crash
        self.addCleanup(os.umask, os.umask(0o077))
        with mock.patch("os.rename", rename):
            fingerd.replace_file(str(path), "new\n")
        self.assertEqual(path.read_text(), "new\n")
        self.assertEqual(path.stat().st_mode & 0o777, 0o644)
        self.assertEqual(os.listdir(folder), ["f.prom"])

    def test_the_daemon_writes_it_at_start_reload_and_end_if_wanted(self):
        with installed() as program:
            folder = pathlib.Path(program.directory, "stats")
            folder.mkdir()
            folder.chmod(0o777)
            path, text = folder / "f.prom", f"[server]\nstats = {folder}"
            args = ["--chroot", program.directory] * (os.geteuid() == 0)
            program.write(f"{text}/f.prom\n{USERS}")
            os.chmod(program.config, 0o644)
            self.assertEqual(program.start(*args), (0, "", ""))
            self.assertIn('reloads_total{result="ok"} 0', path.read_text())
            for config, event, times in [
                    (USERS, "reloaded", 1), ("what", "reload-failed", 1),
                    (f"{text}/f.prom\n{USERS}", "reloaded", 2)]:
                path.unlink(missing_ok=True)
                program.reload(config, event, times)
            wait_until(path.exists, "a write")
            self.assertEqual(ask(program.address, b"moshez\r\n"), HAPPY)
            self.assertEqual(program.run("--stop"), (0, "", ""))
            for line in ('queries_total{outcome="answered",backend="users"} 1',
                         'reloads_total{result="ok"} 2',
                         'reloads_total{result="failed"} 1'):
                self.assertIn(f"fingerd_{line}\n", path.read_text())
            if os.geteuid() == 0:
                self.assertEqual(path.owner(), "nobody")
            self.assertEqual(os.listdir(folder), ["f.prom"])


class SyslogTest(Case):
    def setUp(self):
        self.path = os.path.join(self.enter(tempfile.TemporaryDirectory()),
                                 "log")

    @contextlib.contextmanager
    def syslog(self):
        """Be a syslog daemon."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(HANG)
            sock.bind(self.path)
            os.chmod(self.path, 0o666)
            yield sock
        os.unlink(self.path)

    def receive(self, sock, pattern):
        """Wait for a message; give its match."""
        while True:
            found = re.fullmatch(pattern, sock.recv(65536).decode("ascii"))
            if found:
                return found

    def test_writes_to_a_socket_and_survives_a_restart_of_syslog(self):
        with self.syslog() as sock:
            log = self.open_log(f"to = syslog\nsyslog_address = {self.path}\n"
                                "facility = local3\nprefix = who\n"
                                "level = debug")
            for severity, level in enumerate(reversed(fingerd.LEVELS), 3):
                log.event(level, "x", a="b c")
                self.assertEqual(sock.recv(100).decode(), (
                    f'<{19 * 8 + severity}>who[{os.getpid()}]: x a="b c"'))
        for _ in range(2):
            log.event("info", "lost")
        with self.syslog() as sock:
            log.event("info", "x")
            self.receive(sock, "<156>.*: lost lines=2")
            self.receive(sock, "<158>.*: x")

    def test_a_syslog_that_does_not_keep_up_holds_nobody_up(self):
        with self.syslog() as sock:
            log = self.open_log(f"to = syslog\nsyslog_address = {self.path}")
            thread = threading.Thread(daemon=True, target=lambda: [
                log.event("info", "x", a="x" * 9999) for _ in range(400)])
            thread.start()
            thread.join(HANG)
            self.assertFalse(thread.is_alive())
            self.assertLessEqual(len(sock.recv(65536)), fingerd.MAX_SYSLOG)

    def test_writes_to_a_host_over_udp(self):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(HANG)
            sock.bind(("127.0.0.1", 0))
            log = self.open_log("to = syslog\nformat = json\nsyslog_address"
                                f" = localhost:{sock.getsockname()[1]}")
            log.event("notice", "x", a=1)
            event = self.receive(sock, r"<29>fingerd\[\d+\]: (.*\"x\".*)")[1]
            self.assertEqual(json.loads(event)["a"], 1)

    @needs_root
    def test_reloads_in_a_chroot_that_syslog_is_not_in(self):
        with background(start=False) as program:
            text = f"[log]\nsyslog_address = {self.path}\n"
            program.write(text + USERS)
            with self.syslog() as sock:
                self.assertEqual(program.start(
                    "--chroot", program.directory, log="syslog"), (0, "", ""))
                for more, head in (("", "<29>fingerd"),
                                   ("facility = mail\nprefix = x", "<21>x")):
                    program.write(f"{text}{more}\n{USERS}")
                    os.kill(program.pid, signal.SIGHUP)
                    self.receive(sock, rf"{head}\[\d+\]: reloaded .*")

    def test_a_reload_looks_no_syslog_up(self):
        with background(start=False) as program:
            text = f"[log]\nto = {program.log_path}\n"
            program.write(text + USERS)
            self.assertEqual(       # the command line would override
                program.run("--daemon", "--listen", "127.0.0.1:0"),
                (0, "", ""))
            program.reload("[log]\nto = syslog\n"
                           "syslog_address = host.invalid:514\n", " reloaded ")
            program.reload(text, " reloaded ", 2)
            self.assertEqual(
                re.findall("not-reloaded setting=(.*) reason",
                           "\n".join(program.log())), ["to", "syslog_address"])

    def test_a_fault_under_inetd_is_sent_there(self):
        settings = [row._replace(default=self.path)
                    if row.name == "syslog_address" else row
                    for row in fingerd.SETTINGS]
        log = fingerd.Log()
        self.addCleanup(close_log, log)
        ours, client = socket.socketpair()
        with self.syslog() as sock, client, mock.patch.object(
                fingerd, "SETTINGS", settings):
            client.sendall(b"moshez\r\n")
            client.shutdown(socket.SHUT_WR)
            fingerd.refuse_for_inetd(ours, log, fingerd.ConfigError(
                "fingerd.conf:1: [x]", "1 error"))
            self.assertEqual(read_all(client), FAILED)
            for line in (r"fingerd\.conf:1: \[x\]", "1 error"):
                self.receive(sock, r"<27>fingerd\[\d+\]: not-started"
                                   f' reason="{line}"')


@needs_root
@needs_proc
class PrivilegesTest(unittest.TestCase):
    """Root at the start, nobody after, read from the running process."""

    # What a site loads at the start cannot be loaded too late.
    bare = {"command": [sys.executable, "-S", str(PROGRAM)]}

    def test_an_ordinary_user_may_start_it_where_it_may_not_enter(self):
        def become_nobody():
            os.chdir("closed")
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)

        read_config("")         # loads what nobody may not
        with installed() as program:
            os.mkdir(os.path.join(program.directory, "closed"), 0o700)
            program.serve(cwd=program.directory, preexec_fn=become_nobody)
            self.assertEqual(ask(program.address, b"moshez\r\n"), HAPPY)

    def test_becomes_nobody_for_good(self):
        host = f"127.79.{os.getpid() % 250 + 1}.2"
        uid, gid = pwd.getpwnam("nobody")[2:4]
        with background("[server]\nbackend = users finger\n[finger]\n"
                        "command = /usr/bin/id -u\n" + USERS,
                        "--listen", f"{host}:79") as program:
            for name, reply in [(b"moshez", HAPPY),
                                (b"x", b"%d\r\n" % uid)]:
                self.assertEqual(ask((host, 79), name + b"\r\n"), reply)
            for key, ids in [("Uid", [uid] * 4), ("Gid", [gid] * 4),
                             ("Groups", [gid])]:
                self.assertEqual([*map(int, program.status(key))], ids)
            for key in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
                self.assertEqual(int(program.status(key)[0], 16), 0)
            self.assertEqual(program.status("NoNewPrivs"), ["1"])
            info = os.stat(program.log_path)
            self.assertEqual((info.st_uid, info.st_gid), (uid, gid))
            program.wait_log(" ready .* user=nobody pid=")

    def test_takes_the_group_of_a_user(self):
        uid, gid = pwd.getpwnam("daemon")[2:4]
        nobody = pwd.getpwnam("nobody")[2:4]
        nogroup = grp.getgrnam("nogroup").gr_gid
        for user, group, *ids in [
                ("", "", *nobody), ("root", "", 0, 0),
                ("daemon", "", uid, gid), ("daemon", "nogroup", uid, nogroup),
                ("54321", "54322", 54321, 54322),
                ("54321", "", 54321, nobody[1])]:
            config = read_config("", {"user": user, "group": group})
            self.assertEqual(fingerd.choose_ids(config.daemon),
                             (user or "nobody", *ids))

    def test_works_inside_an_empty_chroot(self):
        origin = Origin({"/~carol": text_page("Carol's page\n")})
        self.addCleanup(origin.close)
        with serving() as hop, tempfile.TemporaryDirectory() as empty, \
                background(
                    "[server]\nbackend = users web\nforward ="
                    f" 127.1:{hop.address[1]} ip4.localhost:1"
                    f" localhost.:{hop.address[1]}\n[web]"
                    f"\nprefix = http://localhost:{origin.port}/~\n" + USERS,
                    start=False) as program:
            os.chmod(empty, 0o755)
            self.assertEqual(program.start("--chroot", empty, **self.bare)[0],
                             0)
            self.assertEqual(os.readlink(f"/proc/{program.pid}/root"), empty)
            for line, reply in [
                    (b"moshez", HAPPY), (b"moshez@127.1", HAPPY),
                    (b"carol", b"Carol's page\r\n"), (b"dave", UNKNOWN),
                    (b"\xff\xff", b"Malformed query\r\n")]:
                self.assertEqual(ask(program.address, line + b"\r\n"), reply)
            self.assertEqual(os.listdir(empty), [])

    def test_reloads_a_config_and_a_log_that_are_inside_the_chroot(self):
        with background(start=False) as program:
            self.assertEqual(program.start("--chroot", program.directory,
                                           **self.bare), (0, "", ""))
            address = program.address
            os.unlink(program.config)
            program.reload(None, 'reload-failed reason="cannot read the'
                                 ' config: no such file')
            program.reload("[user]\n", r"did you mean \[users\]")
            program.rotate()
            for number in (1, 2):       # it knows the path after one, too
                program.reload("[server]\nallow = 127.0.0.0/8 ::1\n"
                               "[log]\nformat = json\n"
                               "[users]\nmoshez = new\n",
                               f'"reloaded".*"{program.config}"', number)
            self.assertEqual(ask(address, b"moshez\r\n"), b"new\r\n")

    def test_ends_if_rights_of_root_remain(self):
        def stay_root(uid):
            os.setresuid(uid, uid, 0)

        for call, instead, message in [
                ("os.setgroups", list, "groups of root remain"),
                ("os.setgid", abs, "groups of root remain"),
                ("os.setuid", stay_root, "root privileges can be regained")]:
            with self.subTest(call=call), config_file(USERS) as path, \
                    mock.patch(call, instead):
                self.assertEqual(
                    run_fingerd("--config", path, "--query", "x"),
                    (1, "", f"fingerd: {message}\n"))

    def test_a_program_that_is_not_in_the_chroot_is_a_config_error(self):
        with tempfile.TemporaryDirectory() as chroot:
            os.mkdir(os.path.join(chroot, "bin"))
            os.symlink("/bin/echo", os.path.join(chroot, "bin", "echo"))
            for command in (sys.executable, "/bin/echo"):   # a link leads out
                with self.assertRaisesRegex(
                        fingerd.ConfigError, f':4: command: "{command}" is not'
                        f" inside the chroot {chroot}; put it there"):
                    read_config("[server]\nbackend = finger\n[finger]\n"
                                f"command = {command} {{user}}\n",
                                {"chroot": chroot})

    def test_a_query_from_the_command_line_is_answered_in_the_chroot(self):
        with config_file("[server]\nbackend = files\n[files]\n"
                         "directory = /\n") as path:
            root = os.path.dirname(path)
            write_file(root, "bob.txt", "inside\n")
            self.assertEqual(run_fingerd("--config", path, "--chroot", root,
                                         "--query", "bob"),
                             (0, "inside\n", ""))

    @contextlib.contextmanager
    def forger(self, path, number=0):
        """Have nobody lock a pidfile with a number, or its own, in it."""
        def forge():
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.lockf(fd, fcntl.LOCK_EX)
            os.write(fd, b"%d\n" % (number or os.getpid()))
            signal.pause()

        process = Fork([], preexec_fn=forge)
        try:
            wait_until(lambda: os.path.exists(path) and os.path.getsize(path),
                       "the forgery")
            yield process
        finally:
            process.kill()
            process.wait()

    def test_root_signals_nobody_by_a_forged_pidfile(self):
        def refuses(path, owner, holder):
            with self.assertRaisesRegex(
                    fingerd.StartError, f"^{path} names pid {victim} and"
                    f" belongs to uid {owner}, but pid {holder} has locked it;"
                    " not believed$"):
                fingerd.find_daemon(path)

        with background() as program, tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o1777)
            victim, path = program.pid, os.path.join(folder, "pid")
            stop = ["--config", program.config, "--pidfile", path, "--stop"]
            with self.forger(path, victim) as process:
                refuses(path, NOBODY, process.pid)
                self.assertEqual(run_fingerd(*stop)[0], 1)
                with self.assertRaisesRegex(
                        fingerd.StartError, f"^{path} belongs to another user;"
                        " remove it, or name another pidfile$"):
                    fingerd.hold_pidfile(path).__enter__()
            os.unlink(path)
            # Only itself can a process have signalled so.
            with self.forger(path) as process:
                self.assertEqual(run_fingerd(*stop)[0], 0)
                self.assertEqual(process.wait(), -signal.SIGTERM)
            # One that the locking process does not own, nor root.
            os.chown(program.pidfile, 54321, -1)
            refuses(program.pidfile, 54321, victim)
            os.chown(program.pidfile, 0, -1)
            with as_nobody(), self.assertRaisesRegex(
                    fingerd.StartError, "^cannot read the pidfile: permission"
                    f" denied: {program.pidfile}$"):
                fingerd.find_daemon(program.pidfile)

    def test_a_process_of_another_namespace_is_not_believed(self):
        def leave():
            if ctypes.CDLL(None).unshare(0x20000000):   # CLONE_NEWPID
                os._exit(77)
            pid = os.fork()
            if pid:
                os._exit(os.WEXITSTATUS(os.waitpid(pid, 0)[1]))

        with background() as program:
            status, _, err = run_fingerd(
                "--config", program.config, "--pidfile", program.pidfile,
                "--stop", preexec_fn=leave)
            if status == 77:
                self.skipTest("no other namespace can be had")
            self.assertEqual((status, err), (
                1, "fingerd: cannot read the pidfile: a process of another"
                   " namespace has locked it\n"))

    def test_root_writes_no_log_where_another_user_wants_it(self):
        with tempfile.TemporaryDirectory() as root, \
                tempfile.TemporaryDirectory() as sticky:
            os.chmod(sticky, 0o1777)
            log, pipe, theirs, shared = (os.path.join(sticky, name) for name in
                                         ("log", "pipe", "theirs", "shared"))
            ours = os.path.join(root, "ours")
            for folder in (ours, theirs + "/log", shared + "/log"):
                os.makedirs(folder)
            file = write_file(ours, "file", "precious")
            os.mkfifo(pipe)
            self.addCleanup(os.close, os.open(pipe, os.O_RDWR))
            os.chown(pipe, NOBODY, -1)
            os.chown(theirs, NOBODY, -1)
            os.chmod(shared, 0o777)
            attacks: list[Any] = [
                # A log, the directory above that others can change, a call.
                (log, "", os.symlink, file, log),
                (log, "", os.symlink, ours + "/new", log),
                (log, "", os.link, file, log),
                (log, "", shutil.copy, file, log),
                (pipe, "", list), ("/dev/ptmx", "", list),
                ("/dev/stdout", "", list),
                (log + "/file", log, os.symlink, ours, log),
                (log + "/ours/file", log, os.symlink, root, log),
                (theirs + "/log/log", theirs, list),
                (shared + "/log/log", shared, list)]
            for path, above, make, *args in attacks:
                make(*args)
                if os.path.lexists(log) and make is not os.link:
                    os.chown(log, NOBODY, -1, follow_symlinks=False)
                with self.subTest(path=path, make=make, args=args), \
                        self.assertRaisesRegex(
                            OSError, f"^others can change {above}; name"
                            " another file$" if above else f"^{path} is a"
                            " link, a device or another user's; name another"
                            " file, or write to = stderr$"):
                    fingerd.open_log_file(path, (1, 1))
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(log)
            self.assertEqual(os.listdir(ours), ["file"])
            self.assertEqual(pathlib.Path(file).read_text(), "precious")

    def test_root_writes_its_log_to_what_is_its_own_or_the_users(self):
        nobody = (NOBODY, NOBODY)
        with tempfile.TemporaryDirectory() as folder:
            for uid, mode in [(0, 0o1777), (0, 0o755), (NOBODY, 0o777),
                              (54321, 0o755)]:
                os.chown(folder, uid, -1)
                os.chmod(folder, mode)
                for owner in (0, NOBODY):
                    log = write_file(folder, "log")
                    os.chown(log, owner, -1)
                    os.chmod(log, 0o666)
                    with self.subTest(owner=owner, folder=(uid, mode)):
                        os.close(fingerd.open_log_file(log, nobody))
                        with as_nobody():       # a reload
                            os.close(fingerd.open_log_file(log, None))
                os.unlink(log)
            os.close(fingerd.open_log_file(os.devnull, nobody))
            os.mkfifo(log)
            os.chown(log, NOBODY, -1)
            self.addCleanup(os.close, os.open(log, os.O_RDWR))
            os.close(fingerd.open_log_file(log, nobody))


class ServiceManagerTest(unittest.TestCase):
    """systemd and inetd."""

    def test_tells_systemd_how_it_goes(self):
        with tempfile.TemporaryDirectory() as directory, socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            path = os.path.join(directory, "notify")
            sock.bind(path)
            os.chmod(directory, 0o755)
            os.chmod(path, 0o666)
            sock.settimeout(HANG)
            with mock.patch.dict(os.environ, NOTIFY_SOCKET=path,
                                 WATCHDOG_USEC="200000"), daemon() as program:
                said = b""

                def hear(pattern):
                    nonlocal said
                    while not re.search(pattern, said, re.DOTALL):
                        said += sock.recv(100) + b" "

                hear(b"^READY=1\nMAINPID=%d WATCHDOG=1 WATCHDOG=1 "
                     % program.pid)
                program.process.send_signal(signal.SIGHUP)
                hear(rb"RELOADING=1\nMONOTONIC_USEC=\d+ (WATCHDOG=1 )*READY=1")
                for number in (2, 3):   # each is told, if not acted on
                    program.process.send_signal(signal.SIGHUP)
                    hear(rb"(RELOADING=1.*){%d}" % number)
                hear(b"(READY=1.*){3}")
                program.stop()
                hear(b"STOPPING=1 ")

    @unittest.skipUnless(sys.platform == "linux", "abstract names are Linux's")
    def test_finds_what_systemd_tells(self):
        kind = (socket.AF_UNIX, socket.SOCK_DGRAM)
        with socket.socket(*kind) as sock:
            sock.bind("")       # Linux makes an abstract name
            name = "@" + sock.getsockname()[1:].decode()
            for period, usec, pid in [
                    (0.1, "200000", os.getpid()),
                    (math.inf, "200000", 2 ** 22),
                    (math.inf, "2e5", os.getpid()),
                    (math.inf, "0", os.getpid())]:
                with mock.patch.dict(
                        os.environ, NOTIFY_SOCKET=name, WATCHDOG_USEC=usec,
                        WATCHDOG_PID=str(pid)), fingerd.Notifier(
                        *kind) as notifier:
                    notifier.find_systemd()
                    notifier.report("a", "b")
                self.assertEqual((notifier.period, sock.recv(100)),
                                 (period, b"a\nb"))
        with mock.patch.dict(os.environ, NOTIFY_SOCKET=name), \
                fingerd.Notifier(*kind) as notifier, self.assertRaisesRegex(
                fingerd.StartError, "^cannot reach NOTIFY_SOCKET: connection"
                " refused$"):
            notifier.find_systemd()

    def passing(self, file):
        """Give the options of a start to which systemd passes a file."""
        def pass_it():
            os.dup2(file.fileno(), 3)
            os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
        return {"keep": [3], "preexec_fn": pass_it}

    def test_serves_a_socket_that_systemd_has_opened(self):
        with socket.create_server(("127.0.0.1", 0)) as sock, \
                background(start=False) as program:
            address = sock.getsockname()
            root = [] if os.geteuid() else ["--user", "root"]
            self.assertEqual(program.start(*root, **self.passing(sock)), (
                0, "", "fingerd: --listen: is not used with systemd's sockets;"
                       " remove it\n"))
            self.assertEqual(program.address, address)
            self.assertEqual(ask(address, b"moshez\r\n"), HAPPY)
            self.assertEqual(program.run("--stop"), (0, "", ""))
            connect(address).close()    # systemd goes on listening

    def test_refuses_what_is_no_listening_socket_and_no_connection(self):
        with socket.create_server(("127.0.0.1", 0)) as listener, \
                socket.socket() as tcp, open(os.devnull) as null, \
                socket.socket(socket.AF_UNIX) as unix:
            unix.bind("")
            unix.listen()
            for file in (null, tcp, unix):
                self.assertEqual(
                    run_fingerd("--config", str(EXAMPLE),
                                **self.passing(file)),
                    (1, "", "fingerd: LISTEN_FDS: descriptor 3 is not a"
                            " listening TCP socket; write ListenStream=79\n"))
            for stdin in (null, listener, unix):
                status, out, err = run_fingerd(
                    "--inetd", "--config", str(EXAMPLE), stdin=stdin)
                self.assertEqual((status, out), (1, ""))
                self.assertRegex(
                    err, "^fingerd: --inetd: standard input is not a"
                    " connection: .*; have inetd start it\n$")

    def test_lines_for_the_journal_carry_their_priority(self):
        with installed("[web]\n" + USERS) as program:
            info = os.stat(write_file(program.directory, "log"))
            journal = {"JOURNAL_STREAM": f"{info.st_dev}:{info.st_ino}"}
            with mock.patch.dict(os.environ, journal):
                program.serve("--prefix", "who")
                self.assertEqual(ask(program.address, b"moshez\r\n"), HAPPY)
                program.reload("[log]\nformat = json\n", "reloaded")
                self.assertEqual(program.stop(), 0)
                lines = program.log()
                self.assertEqual(
                    [line[:3] for line in lines],
                    ["<4>", "<5>", "<6>", "<5>", "<5>"])    # a warning first
                self.assertNotRegex("\n".join(lines), "(fingerd|who): ")
                self.assertRegex(lines[-1], '^<5>{"time": .*"stopped"')
                program.write("[nonsense]\n")
                program.serve("--check")
                self.assertEqual(program.process.wait(HANG), 2)
            first, last = program.log()
            self.assertIn(f"<3>{program.config}:1: [nonsense]", first)
            self.assertEqual(
                last, f"<3>1 error in {program.config}, not started")
        with mock.patch.dict(os.environ, JOURNAL_STREAM="1:2"):
            self.assertFalse(fingerd.is_journal())

    @mock.patch.object(fingerd, "GRACE", 0.1)
    def test_serves_one_connection_for_inetd(self):
        happy = ("moshez\r\n", HAPPY, 0)
        finger = ("[server]\nbackend = finger\n[finger]\n"
                  "command = /bin/echo for {user}\n")
        no_syslog = "[log]\nto = syslog\nsyslog_address = /no/such\n"
        for text, args, line, reply, status in [
                (finger, [], "x\r\n", b"for x\r\n", 0),
                (no_syslog, [], *happy),
                # A client has its time, and is told of no warning or fault.
                ("[limits]\ntimeout = 0.1\n", [], "mos",
                 b"Query timed out\r\n", 0),
                ("[limits]\nqueries_per_minute = 9\n[web]\n", [], *happy),
                ("[nonsense]\n", [], "x\r\n", FAILED, 2),
                ("", ["--rundir", "/no/such"], "x\r\n", FAILED, 1),
                ("", ["--logfile", "/no/such/log"], "x\r\n", FAILED, 1),
                ("", ["--logfile", "log"], "", b"", 0)]:    # has left already
            with self.subTest(text=text, args=args), config_file(
                    text + USERS) as path, socket.create_server(
                    ("127.0.0.1", 0)) as listener, connect(
                    listener.getsockname()) as client:
                served, _ = listener.accept()
                client.sendall(line.encode())
                if line.endswith("\n"):
                    client.shutdown(socket.SHUT_WR)
                elif not line:
                    reset(client)
                    client.close()
                with served:
                    process = start_fingerd(
                        "--config", path, "--inetd", *args, stdin=served,
                        stdout=served, stderr=served,
                        cwd=os.path.dirname(path))
                    self.assertEqual(process.wait(HANG), status)
                if line:
                    self.assertEqual(read_all(client), reply)
                else:
                    self.assertIn(
                        'query client=0.0.0.0 port=0 q="" outcome=gone'
                        " backend=- bytes=0 ms=", pathlib.Path(path).with_name(
                            "log").read_text())


class BundleTest(Case):
    def setUp(self):
        self.directory = self.enter(tempfile.TemporaryDirectory())
        self.path = os.path.join(self.directory, "fingerd")

    def test_one_file_has_every_backend_and_the_right_statuses(self):
        shutil.copyfile(PROGRAM, self.path)     # the bundle replaces it
        shutil.copy(HERE / "fingerd_backends.py", self.directory)
        for path, result in [
                (self.path, (0, "", "")),
                ("/no/such/file", (1, "", "fingerd: cannot write the bundle:"
                                   " no such file or directory: /no/such/file"
                                   "\n"))]:
            self.assertEqual(run_fingerd("--bundle", path, command=[
                sys.executable, self.path]), result)
        self.assertEqual(os.stat(self.path).st_mode & 0o777, 0o755)
        with open(self.path, "rb") as file, zipfile.ZipFile(file) as bundle:
            self.assertEqual(sorted(bundle.namelist()), [
                "__main__.py", "fingerd.py", "fingerd_backends.py"])
            for name in ("fingerd.py", "fingerd_backends.py"):
                self.assertEqual(bundle.read(name), (HERE / name).read_bytes())
            file.seek(0)
            self.assertEqual(file.readline(), b"#!/usr/bin/env python3\n")

    def test_changes_the_mode_of_nothing_but_a_file(self):
        """As root, --bundle /dev/null must not make that unwritable."""
        fifo = os.path.join(self.directory, "pipe")
        os.mkfifo(fifo, 0o600)
        with open(self.path, "wb") as file, subprocess.Popen(
                ["cat", fifo], stdout=file) as cat:
            self.assertEqual(run_fingerd("--bundle", fifo), (0, "", ""))
            self.assertEqual(cat.wait(HANG), 0)
        self.assertEqual(os.stat(fifo).st_mode & 0o777, 0o600)
        with zipfile.ZipFile(self.path) as bundle:
            self.assertIsNone(bundle.testzip())


def refused(address):
    """Is nobody listening any more?"""
    try:
        connect(address).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


# ---- Command line ---------------------------------------------------------

LINES = ("-x", "--", "--help", "-", "", "/W moshez", "a=b", "=", "a\nb",
         "-5", "\udcff", "moshez@localhost", "--query")


class CommandLineTest(unittest.TestCase):
    def test_prints_its_version(self):
        self.assertEqual(run_fingerd("--version"),
                         (0, f"fingerd {fingerd.__version__}\n", ""))

    def test_check_warns_of_settings_that_do_nothing(self):
        with config_file("[server]\nlisten = localhost:79\nstats = x\n[limits]"
                         "\nmax_clients_per_host = 9\nqueries_per_minute = 9\n"
                         "[web]\n") as path:
            web = (f"fingerd: {path}:7: [web]: is not used; add web to"
                   " backend, or remove the section\n")
            inetd = "".join(f"fingerd: {path}:{text}\n" for text in [
                "3: stats: is not written under inetd; remove it",
                "5: max_clients_per_host: does nothing under inetd; set"
                " limits in inetd",
                "6: queries_per_minute: does nothing under inetd; set limits"
                " in inetd"])
            sockets = ("listen: is not used with systemd's sockets; remove"
                       " it\n")
            lost = ("fingerd: the log will be lost: it goes to stderr, and"
                    " there is none in the background; write to = syslog, or a"
                    " file\n")
            for args, pid, number, warnings in [
                    (["--daemon"], 0, 0, web + lost),
                    ([], 0, 1, web), ([], 1, 1, web), ([], None, 0, web),
                    ([], None, "x", web), (["--inetd"], 0, 0, web + inetd),
                    ([], None, 1, web + f"fingerd: {path}:2: {sockets}"),
                    (["--listen", "localhost:80"], None, 1,
                     web + f"fingerd: --{sockets}")]:
                with self.subTest(args=args, pid=pid, number=number):
                    self.assertEqual(
                        run_fingerd("--config", path, "--check", *args,
                                    preexec_fn=lambda: os.environ.update(
                                        LISTEN_PID=str(pid if pid is not None
                                                       else os.getpid()),
                                        LISTEN_FDS=str(number))),
                        (0, f"{path} is good\n", warnings))

    def test_logs_what_a_backend_reports_at_its_level(self):
        text = "[server]\nbackend = picky\n[picky]\ncolor = loud\n"
        with config_file(text) as path, mock.patch.dict(fingerd.BACKENDS,
                                                        picky=Picky):
            self.assertEqual(
                run_fingerd("--config", path, "--check"),
                (0, f"{path} is good\n",
                 'fingerd: backend name=picky text="is loud"\n'))

    def test_prints_what_a_client_would_get(self):
        failed = "Internal error in server"
        with config_file("[server]\ndeny = ::ffff:192.0.2.0/120\nbackend ="
                         " users finger\n[finger]\ncommand = /bin/sh -c"
                         " 'kill $$'\n[web]\n" + USERS) as path:    # not used
            for line, client, reply in [
                    ("/W moshez@localhost", "198.51.100.1", "Happy and well"),
                    ("-x", "::1", "No such user"),
                    ("", "::1", "Finger online user list denied"),
                    ("a\x1bb\udc80", "::1", "Malformed query"),
                    ("bob", None, failed),
                    ("x" * 513, "::1", "Query too long"),
                    ("moshez", "192.0.2.7", "Access denied"),
                    ("moshez", "::ffff:192.0.2.7", "Access denied")]:
                with self.subTest(line=line, client=client):
                    status, out, err = run_fingerd(
                        "--config", path, "--query", line,
                        *(["--from", client] if client else []))
                    self.assertEqual((status, out),
                                     (reply == failed, reply + "\n"))
                    self.assertRegex(err, "^fingerd: failed backend=finger"
                                     " client=127.0.0.1 " if status else "^$")

    def test_an_option_takes_any_value(self):
        for line, which in itertools.product(LINES, (0, -1)):
            names = {name: flags[which] for flags, name, *_ in fingerd.OPTIONS}
            apart, joined = [], []
            for flag in names.values():
                apart += [flag, line]
                joined += [f"{flag}={line}"]
            for argv in (apart, joined):
                args = fingerd.parse_options([*argv, "--check"])
                self.assertEqual({name: getattr(args, name) for name in names},
                                 dict.fromkeys(names, line))
                self.assertIs(args.check, True)

    def test_a_bad_value_is_an_error_of_one_line(self):
        with config_file("") as path:
            for row in fingerd.SETTINGS:
                for value in LINES if row.flags else ():
                    with self.subTest(name=row.name, value=value):
                        try:
                            fingerd.read_config(path, print, {row.name: value})
                        except fingerd.ConfigError as error:
                            self.assertRegex(
                                str(error), r"\A--[a-z]+: .+\n"
                                r"1 error on .+, not started\Z")

    def test_complains_of_wrong_options_in_one_line(self):
        missing = ("cannot read the config: no such file or directory{}; name"
                   " another with --config, or copy fingerd.conf.example")
        folder = missing.replace("no such file or", "is a")
        for args, message in [
                *[([], missing.format(": /etc/fingerd.conf"))
                  ] * (not os.path.exists("/etc/fingerd.conf")),
                (["--config", ""], missing.format("")),
                (["--config", str(HERE)], folder.format(f": {HERE}")),
                (["--config", "a\nb\udcff"], missing.format(": a\\nb\\xff")),
                *(([word], f'"{shown}" is not an option; see --help')
                  for word, shown in [
                      ("--listne", "--listne"), ("--conf=x", "--conf=x"),
                      ("-x", "-x"), ("fingerd.conf", "fingerd.conf"),
                      ("--a\nb\udcff", "--a\\nb\\xff")]),
                (["--config"], "--config: expected one argument; see --help"),
                (["-l"], "-l/--logfile: expected one argument; see --help"),
                (["--check=1"], "--check: ignored explicit argument '1'; see"
                                " --help"),
                *((["--config", str(EXAMPLE), "--query", "x", "--from", text],
                   f'--from: "{shown}" is not an address; write e.g.'
                   " --from 192.0.2.7")
                  for text, shown in [
                      ("", ""), ("192.0.2.7/32", "192.0.2.7/32"),
                      ("::1\n\udcff", "::1\\n\\xff")]),
                (["--from", "192.0.2.7"], "--from: goes with --query only"),
                (["--bundle", "/no/such/a\nb"], "cannot write the bundle: no"
                 " such file or directory: /no/such/a\\nb")]:
            with self.subTest(args=args):
                status, out, err = run_fingerd(*args)
                self.assertEqual((out, err), ("", f"fingerd: {message}\n"))
                self.assertEqual(status, 1 if "--bundle" in args else 2)

    def test_closes_what_it_inherits_but_for_the_sockets_of_systemd(self):
        reader, writer = os.pipe()

        def inherit():
            copies = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100)   # inheritable
                      for fd in (listener.fileno(), writer, config.fileno())]
            for number, copy in enumerate(copies, 3):
                os.dup2(copy, number)
            os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")

        with open(reader, "rb") as pipe, socket.create_server(
                ("127.0.0.1", 0)) as listener, installed() as program, \
                open(program.config, "rb") as config:
            address = listener.getsockname()
            program.serve("--config", "/dev/fd/5",
                          keep=(3, 4, 5, *range(100, 200)),
                          preexec_fn=inherit)
            os.close(writer)
            listener.close()
            self.assertEqual(ask(address, b"moshez\r\n"), HAPPY)
            self.assertEqual(select.select([pipe], [], [], HANG)[0], [pipe])
            self.assertEqual(pipe.read(), b"")      # all copies are closed
            self.assertEqual(program.stop(), 0)

    @unittest.skipUnless(os.path.exists("/dev/full"), "no /dev/full here")
    def test_survives_streams_that_are_closed_or_full(self):
        reader, unread = os.pipe()
        os.close(reader)
        self.addCleanup(os.close, unread)
        full = os.open("/dev/full", os.O_WRONLY)
        self.addCleanup(os.close, full)
        cannot = "fingerd: cannot print: no space left on device\n"
        cases: list[Any] = [
            (["--help"], {"stdout": unread}, (0, "", "")),
            (["--version"], {"preexec_fn": lambda: os.close(1)}, (0, "", "")),
            (["--nonsense"], {"stderr": full}, (2, "", "")),
            (["--version"], {"stdout": full}, (1, "", cannot)),
            (["--config", str(EXAMPLE), "--query", "moshez"],
             {"stdout": full}, (1, "", cannot))]
        for args, options, result in cases:
            with self.subTest(args=args, options=options):
                self.assertEqual(run_fingerd(*args, **options), result)

    @needs_proc
    def test_never_writes_its_log_to_a_client(self):
        with installed() as program:
            program.write(f"[log]\nto = {program.directory}/log\n" + USERS)
            program.serve(command=["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-',
                                   "sh", *fingerd_command()])
            program.wait_log("ready")
            for fd in range(3):
                self.assertEqual(os.readlink(f"/proc/{program.pid}/fd/{fd}"),
                                 os.devnull)
            self.assertEqual(program.stop(), 0)


class LoneCopyTest(unittest.TestCase):
    """fingerd.py without fingerd_backends.py."""

    def test_serves_the_users(self):
        with installed() as program:
            shutil.copy(PROGRAM, program.directory)
            options = {"command": [sys.executable, "fingerd.py"],
                       "cwd": program.directory}
            program.serve("--config", "fingerd.conf", **options)
            self.assertEqual(
                run_fingerd("--bundle", "out", **options),
                (2, "", "fingerd: --bundle: needs fingerd_backends.py, which"
                        " is not beside fingerd.py; copy it there too\n"))
            self.assertEqual(ask(program.address, b"moshez\r\n"), HAPPY)
            self.assertEqual(program.stop(), 0)
            self.assertEqual(sorted(os.listdir(program.directory)),
                             ["fingerd.conf", "fingerd.py", "log"])

    def test_says_what_it_needs_the_other_file_for(self):
        absent = functools.partial(sys.modules.update, fingerd_backends=None)
        other = functools.partial(setattr, fingerd_backends, "__version__",
                                  "0.9")

        def broken():
            del sys.modules["fingerd_backends"]
            sys.path.insert(0, os.path.dirname(path))
            write_file(sys.path[0], "fingerd_backends.py",
                       "import no_such_module_79\n")

        missing = ("needs fingerd_backends.py, which is not beside fingerd.py;"
                   " copy it there too")
        why = ("needs fingerd_backends.py, which cannot be imported (No"
               " module named 'no_such_module_79'); restart once it can")
        for state, text, errors in [
                (absent, "[server]\nbackend = users web\n[web]\n"
                 "prefix = http://example.org/~\n",
                 [f'2: backend: "web" {missing}, or write backend = users']),
                (absent, "[server]\nbackend = usres\n",
                 ['2: backend: "usres" is not a backend; did you mean users?'
                  ]),
                (absent, "[web]\ncache = 1\n[servers]\n[limit]\n",
                 [f"1: [web]: {missing}, or remove the section",
                  "3: [servers]: no such section; did you mean [server]?",
                  "4: [limit]: no such section; did you mean [limits]?"]),
                (other, "[server]\nbackend = web\n",
                 ['2: backend: "web" cannot be used: fingerd.py is version'
                  f" {fingerd.__version__}, but fingerd_backends.py is 0.9;"
                  " copy both from one release, or write backend = users"]),
                (broken, "[server]\nbackend = web\n[webb]\n",
                 [f'2: backend: "web" {why}, or write backend = users',
                  f"3: [webb]: {why}, or remove the section"])]:
            with self.subTest(text=text), config_file(text) as path:
                count = f"{len(errors)} error" + "s" * (len(errors) > 1)
                self.assertEqual(
                    run_fingerd("--config", path, preexec_fn=state),
                    (2, "", "".join(f"fingerd: {path}:{error}\n"
                                    for error in errors)
                     + f"fingerd: {count} in {path}, not started\n"))
        self.assertEqual(run_fingerd("--help", preexec_fn=absent)[::2],
                         (0, ""))


# ---- Backends -------------------------------------------------------------

PROMPT = 5      # seconds that what is not slow may take on a busy machine
CLIENT = "192.0.2.7"

# Made for these tests, for localhost, 127.0.0.1 and test.invalid, until 2126:
# openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes
TEST_CERT = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQghBqC7tTsciDx9ItX
5yXbKYayGWItmMPZqFxb//NGy7GhRANCAATYHsVrN4UdCMzkDdqgut6a63Sax0DS
0ibbNwJtjyxPO7vPI4RWsaCKQaN0NM1o2Qgm1lHzrCWmJl2C1q/uqIho
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBUTCB+aADAgECAhRvRNhQzPS9f9yRJSTGylSSgav+MzAKBggqhkjOPQQDAjAM
MQowCAYDVQQDDAF4MCAXDTI2MTEzMDE3NTMxMVoYDzIxMjYxMTA2MTc1MzExWjAM
MQowCAYDVQQDDAF4MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE2B7FazeFHQjM
5A3aoLremut0msdA0tIm2zcCbY8sTzu7zyOEVrGgikGjdDTNaNkIJtZR86wlpiZd
gtav7qiIaKM3MDUwKAYDVR0RBCEwH4IJbG9jYWxob3N0ggx0ZXN0LmludmFsaWSH
BH8AAAEwCQYDVR0TBAIwADAKBggqhkjOPQQDAgNHADBEAiAX6csP775mtg6toUlY
0sIJgTX9pIOfNvPwdIH50ueYSAIgVgC7wyTRGLJQc1uBw/IUQWoMP8ZZmnjZHuQh
Rmbyt0o=
-----END CERTIFICATE-----
"""


def defaults(kind):
    """Give a backend's settings at their defaults, converted."""
    return {name: fingerd.KINDS[kind_](text)
            for name, kind_, text, _ in kind.settings}


def in_threads(jobs):
    """Run functions at the same moment; return what each gave or raised."""
    start = threading.Barrier(len(jobs))

    def work(job):
        start.wait(HANG)
        return job()

    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        futures = [pool.submit(work, job) for job in jobs]
    return [future.exception() or future.result() for future in futures]


class Family:
    """Reports when a script and all that it has started are gone.

    They hold the writing end of a FIFO, as descriptor 9, and write to it.
    """

    def __init__(self, folder):
        self.path = os.path.join(folder, "family")
        os.mkfifo(self.path)
        self.fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)

    def gone(self):
        """Wait for the end of all; return what they wrote."""
        said = b""
        while select.select([self.fd], [], [], HANG)[0]:
            data = os.read(self.fd, 4096)
            if not data:
                return said
            said += data
        raise AssertionError("something lives on")

    def close(self):
        os.close(self.fd)
        os.unlink(self.path)


class Origin(http.server.ThreadingHTTPServer):
    """A web server; pages are (status, headers, body) or functions.

    A function gets the request handler and writes what it likes; so do greet,
    before anything else, and tunnel, which answers CONNECT.  `asked` collects
    the paths as they came.
    """

    daemon_threads = False      # so that closing joins them
    request_queue_size = 64

    def __init__(self, pages=None, tls=None, greet=None, tunnel=None):
        self.pages = pages or {}
        self.tls, self.greet, self.tunnel = tls, greet, tunnel
        self.asked = []
        self.headers = None                 # of the last request
        self.leaving = threading.Event()
        super().__init__(("127.0.0.1", 0), OriginHandler)
        self.port = self.server_address[1]
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self.thread.start()

    def finish_request(self, request, client_address):
        with contextlib.suppress(OSError):
            if self.greet:
                with request.makefile("wb", 0) as wfile:
                    self.greet(types.SimpleNamespace(server=self, wfile=wfile))
            if self.tls:
                request = self.tls.wrap_socket(request, server_side=True)
            with request:
                OriginHandler(request, client_address, self)

    def close(self):
        self.leaving.set()
        self.shutdown()
        self.thread.join(HANG)
        self.server_close()


class OriginHandler(http.server.BaseHTTPRequestHandler):
    """Answers from the pages of its Origin."""

    server: Any

    def do_GET(self):
        self.server.asked.append(self.path)
        self.server.headers = self.headers
        page = self.server.pages.get(self.path, (404, {}, b"not here"))
        if callable(page):
            page(self)
            return
        status, headers, body = page
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)),
                            **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_CONNECT(self):
        """Be the proxy and what is behind it at once, over TLS."""
        self.server.asked.append("CONNECT " + self.path)
        if callable(self.server.tunnel):
            self.server.tunnel(self)
            return
        self.wfile.write(b"HTTP/1.1 200 Go on\r\n\r\n")
        with self.server.tunnel.wrap_socket(self.connection,
                                            server_side=True) as inner:
            OriginHandler(inner, self.client_address, self.server)

    def log_message(self, *args):
        pass


def text_page(text):
    return (200, {"Content-Type": "text/plain; charset=utf-8"}, text.encode())


def raw(*parts, pause=0.0, then=b"", rest=0.0):
    """A page that sends these bytes and no other, with a pause between.

    At the end it sends `then` again and again, with a rest between.
    """
    def page(handler):
        for part in parts:
            handler.wfile.write(part)
            handler.server.leaving.wait(pause)
        while then and not handler.server.leaving.wait(rest):
            handler.wfile.write(then)
    return page


def drip(head, then=b"x"):
    """A page that sends head, and then a byte now and then, for ever."""
    return raw(head, then=then, rest=0.02)


def run_python(test, code, *args):
    """Run code in a Python of its own; return what it prints."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-B", "-c", textwrap.dedent(code),
         *args], capture_output=True, timeout=HANG, text=True, check=False,
        env=dict(os.environ, PYTHONPATH=str(HERE)))
    test.assertEqual((result.returncode, result.stderr), (0, ""))
    return result.stdout


def write_file(folder, name, text=""):
    """Write a file, text or bytes; give its path."""
    path = pathlib.Path(folder, name)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


class System:
    """A system's accounts and logins as files, all owned by this user."""

    def __init__(self, folder):
        self.folder = folder
        self.entries: dict = {}
        self.getpwnam = self.entries.__getitem__

    def add(self, name, gecos="", uid=None, **files):
        """Make an account with these files in its home; give the last path."""
        home = path = os.path.join(self.folder, name)
        os.mkdir(home)
        for file, text in files.items():
            path = write_file(home, "." + file, text)
        uid = os.getuid() if uid is None else uid
        self.entries[name] = pwd.struct_passwd(
            (name, "x", uid, 1, gecos, home, "/bin/sh"))
        return path

    def log_in(self, *logins):
        """Have utmp tell of (name, terminal, host, time)."""
        write_file(self.folder, "utmp", b"".join(
            pack_utmp(*login) for login in logins))

    def getpwall(self):
        return list(self.entries.values())

    def make(self, case, **options):
        backend = case.make(AccountsBackend, **{
            "uids": f"{os.getuid()}-{os.getuid()}", **options})
        backend.passwd = self
        for name in ("utmp", "lastlog", "mail/"):
            setattr(backend, name.strip("/"), os.path.join(self.folder, name))
        return backend


def pack_utmp(name, tty, host, since, kind=7):
    """Make a record of utmp(5)."""
    fields = [text.encode() for text in (tty, name, host)]
    return fingerd_backends.UTMP.pack(kind, *fields, since)


def make_database(path, script):
    """Make an SQLite database."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)


@contextlib.contextmanager
def leased(path):
    """Have a file whose opening another process wants to be asked about."""
    with open(path, "rb") as file:
        # SIGIO, which tells of the opening, would end the process.
        fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield


@contextlib.contextmanager
def as_nobody():
    """Be nobody, if we are root: it may read everything."""
    user = os.geteuid()
    os.seteuid(user or pwd.getpwnam("nobody").pw_uid)
    try:
        yield
    finally:
        os.seteuid(user)


class BackendCase(Case):
    """Makes backends; fails when one leaves a thread or descriptor behind."""

    def setUp(self):
        # No certificates: to load all takes 50 ms.
        self.enter(mock.patch.dict(os.environ, SSL_CERT_FILE=os.devnull))
        for name in list(os.environ):
            if name.lower().endswith("_proxy"):
                del os.environ[name]
        self.reports = []
        self.folder = tempfile.mkdtemp(prefix="fingerd-test-")
        self.addCleanup(shutil.rmtree, self.folder)
        self.addCleanup(self.check_leftovers, open_descriptors(),
                        set(threading.enumerate()))

    def check_leftovers(self, descriptors, threads):
        for thread in set(threading.enumerate()) - threads:
            thread.join(HANG)
        self.assertEqual(set(threading.enumerate()) - threads, set())
        self.assertEqual(open_descriptors() - descriptors, set())

    def report(self, text, level="warning"):
        self.reports.append(text if level == "warning" else f"{level}: {text}")

    def make(self, kind, *args, **options):
        return kind(dict(defaults(kind), **options), self.report, *args)

    def write_script(self, text, shell="#!/bin/sh\n"):
        path = write_file(self.folder, "script", shell + textwrap.dedent(text))
        os.chmod(path, 0o755)
        return path

    def start_origin(self, pages=None, **options):
        origin = Origin(pages, **options)
        self.addCleanup(origin.close)
        return origin

    def ask(self, backend, user, verbose=False, timeout=HANG):
        return backend.lookup(user, verbose, CLIENT, timeout)

    def list(self, backend, verbose=False, timeout=HANG):
        return backend.user_list(verbose, CLIENT, timeout)

    def assert_fails(self, pattern, function, *args, kind=OSError):
        """Check that a failure is of the built-in kind, in one line."""
        with self.assertRaisesRegex(kind, pattern) as caught:
            function(*args)
        self.assertNotIn("\n", str(caught.exception))
        self.assertEqual(type(caught.exception).__module__, "builtins")

    def assert_answer(self, answer, function, *args):
        """Check an answer, or the reason of a failure, an expression."""
        if isinstance(answer, OSError):
            self.assert_fails(str(answer), function, *args, kind=type(answer))
        else:
            self.assertEqual(function(*args), answer)

    def assert_refused(self, kind, table):
        """Check a table of (bad options, the whole complaint)."""
        for options, message in table:
            with self.subTest(options):
                with self.assertRaises(ValueError) as caught:
                    self.make(kind, **options)
                self.assertEqual(str(caught.exception), message)

    @contextlib.contextmanager
    def takes(self, least=0.0, most=PROMPT):
        start = time.monotonic()
        yield
        spent = time.monotonic() - start
        self.assertGreaterEqual(spent, least)
        self.assertLess(spent, most)


# ---- What every backend does ----------------------------------------------

HOSTILE_NAMES = (
    "-l", "-", ".", "..", ".a", "/etc/passwd", "%2e%2e", "..;", "$(id)",
    "`id`", ";id", "|id", "*", "~", "{user}", "%s", "\\x00", "'", '"',
    "\u202e", "+", "x" * 65, "x" * 500, "\u65e5" * 170, "a\n", "",
    *(f"a{sign}b" for sign in "/%;\\$`|&?#:*~'\"{} "))


class BackendContract(BackendCase):
    """Run against every backend: knows alice, fails for broken and slow."""

    known = "I am {}.\n"
    listed = "alice\nbob\n"
    late = "timed out"
    make_known: Any

    def test_answers_who_it_knows_only_and_fails_with_its_source(self):
        backend = self.make_known()
        self.assertIs(backend.waits, True)
        for verbose in (False, True):
            self.assertEqual(self.ask(backend, "alice", verbose),
                             self.known.format("alice"))
            self.assertIsNone(self.ask(backend, "nobody", verbose))
        self.assertEqual(self.reports, [])
        self.assertFalse(getattr(backend, "warnings", ()))
        self.assert_fails(".", self.ask, backend, "broken")
        self.assertIsNone(self.list(backend))
        self.assertEqual(self.list(self.make_known(listed=True)), self.listed)

    def test_keeps_to_the_timeout(self):
        backend = self.make_known()
        for seconds in (0.05, 0, -1):
            with self.takes(seconds):
                self.assert_fails(self.late, self.ask, backend, "slow",
                                  False, seconds, kind=TimeoutError)

    def test_answers_many_threads_each_its_own(self):
        backend = self.make_known()
        results = in_threads([
            functools.partial(self.ask, backend, name)
            for name in ["alice", "bob", "nobody", "broken"] * 8])
        self.assertEqual(
            [isinstance(result, OSError) or result for result in results],
            [*map(self.known.format, ("alice", "bob")), None, True] * 8)


class NamePatternContract(BackendContract):
    """Also run against those backends to which a name must look like one."""

    def test_a_name_fits_the_whole_pattern_or_no_source_is_asked(self):
        backend = self.make_known()
        for name in HOSTILE_NAMES:
            self.assertIsNone(self.ask(backend, name), name)
        self.assertEqual(self.times_asked(), 0)
        backend = self.make_known(pattern="-.*|x+")
        for name, asked in (("-l", 0), ("x" * 65, 0), ("x" * 64, 1)):
            self.assertIsNone(self.ask(backend, name))
            self.assertEqual(self.times_asked(), asked)


class FingerContractTest(NamePatternContract):
    def make_known(self, listed=False, **options):
        self.log = write_file(self.folder, "log")
        script = self.write_script(f"""\
            echo >>{self.log}
            case $1 in
                alice|bob) echo "I am $1." ;;
                list) echo alice; echo bob ;;
                broken) kill -9 $$ ;;
                slow) sleep 60 ;;
                *) exit 1 ;;
            esac
            """)
        return self.make(FingerBackend, command=script + " {user}",
                         list_command=f"{script} list" * listed, **options)

    def times_asked(self):
        return os.path.getsize(self.log)


class WebContractTest(NamePatternContract):
    def make_known(self, listed=False, **options):
        self.origin = self.start_origin({
            "/~alice": text_page("I am alice.\n"),
            "/~bob": text_page("I am bob.\n"),
            "/~broken": (500, {}, b"oops"),
            "/~slow": drip(HEAD + b"\r\n"),
            "/list": text_page("alice\nbob\n")})
        return self.make(WebBackend, url=self.origin.url + "/~{user}",
                         index=f"{self.origin.url}/list" * listed, **options)

    def times_asked(self):
        return len(self.origin.asked)


class FilesContractTest(BackendContract):
    test_keeps_to_the_timeout: Any = None       # no system bounds a read

    def setUp(self):
        super().setUp()
        for name, text in (("alice", "I am alice.\n"), ("bob.txt",
                           "I am bob.\n"), ("list", "alice\nbob\n")):
            write_file(self.folder, name, text)
        self.enter(leased(write_file(self.folder, "broken")))

    def make_known(self, listed=False, **options):
        return self.make(FilesBackend, directory=self.folder,
                         index="list" if listed else "")


class SqlContractTest(BackendContract):
    late = "timed out|interrupted"

    def make_known(self, listed=False, **options):
        self.addCleanup(gc.collect)     # an exception keeps its connection
        path = os.path.join(self.folder, "known.db")
        make_database(path, """
            CREATE VIEW IF NOT EXISTS people AS
                SELECT 'bob' AS name, 'I am bob.' AS text
                UNION ALL SELECT 'alice', 'I am alice.\n'
                UNION ALL SELECT 'broken', abs(-9223372036854775808)
                UNION ALL SELECT 'slow', (WITH RECURSIVE t(n) AS (
                    SELECT 1 UNION ALL SELECT n + 1 FROM t)
                    SELECT count(*) FROM t);
            """)
        return self.make(SqlBackend, database=path,
                         list_query="VALUES ('alice'), ('bob')" * listed)


class AccountsContractTest(BackendContract):
    known = "Login: {:15}\t\t\tName: \nPlan:\nI am there.\n"
    listed = time.strftime("{:14}  {:24}  Login Time\n{:42}%b %e %R\n"
                           "{:42}%b %e %R\n", time.localtime(86400)).format(
                               "Login", "Name", "alice", "bob")
    test_keeps_to_the_timeout: Any = None       # as of files

    def setUp(self):
        super().setUp()
        self.system = System(self.folder)
        for name in ("alice", "bob"):
            self.system.add(name, plan="I am there.")
        self.system.log_in(("alice", "tty1", "", 86400),
                           ("bob", "tty1", "", 86400))
        self.enter(leased(self.system.add("broken", plan="")))

    def make_known(self, listed=False, **options):
        return self.system.make(self, show="plan login" if listed else "plan")


class RemoteContractTest(BackendContract):
    known = "I am {}.\r\n"
    listed: Any = b"alice  I am alice.\r\nbob    I am bob.\r\n"
    late = "timed out|no time is left"

    def make_known(self, listed=False, **options):
        leaving = threading.Event()

        def answer(user, timeout):
            if user == "slow":
                leaving.wait(HANG)
            elif user == "broken":
                raise OSError("broken")
        server = self.enter(serving(
            f"[server]\nuser_list = {'yes' if listed else 'no'}\n[users]\n"
            "alice = I am alice.\nbob = I am bob.\n",
            [("test", TestBackend(answer))]))
        self.addCleanup(leaving.set)
        return self.make(fingerd.RemoteBackend, host=server.address, **options)

    def ask(self, backend, user, verbose=False, timeout=HANG):
        answer = super().ask(backend, user, verbose, timeout)
        return answer and answer.decode()


del BackendContract, NamePatternContract    # run by their heirs only


class TextAndNamesTest(unittest.TestCase):
    """The patterns of operators are timed: re lets no other thread run."""

    def tearDown(self):
        self.assertEqual(signal.getitimer(signal.ITIMER_VIRTUAL), (0, 0))
        self.assertIs(signal.getsignal(signal.SIGVTALRM), signal.SIG_DFL)

    @mock.patch.object(fingerd_backends, "MAX_MATCH", 0.01)
    def test_refuses_patterns_that_a_name_keeps_busy_and_no_others(self):
        slow = ('takes over 0.01 seconds for the name "[^"]{64}"; write no'
                " repeat inside another")
        for pattern, why in (
                ("(a", r"is not a regular expression \(missing \),"
                 r" unterminated subpattern at position 0\); correct it"),
                *((pattern, slow) for pattern in (
                    "([a-z]+[._-]?)+", "(a|aa)+", r"(\w+\s?)*", r"(\d+)*x",
                    "([A-Z]+)*", "(.*)*x", "([^@]+)+@", "user-([a-z]+)+",
                    "weather:([a-z]+-?)*", "(abc|ab|c)+x",
                    "(foo|bar):([a-z]+)+", "(x+x+)+y",
                    ".*a.*a.*a.*a.*a.*a", r"(\.+|[.-]+)*", "((a|b)*)*"))):
            with self.subTest(pattern), self.assertRaisesRegex(
                    ValueError, f'^pattern: "{re.escape(pattern)}" {why}$'):
                fingerd_backends.compile_pattern(pattern)
        for pattern in (
                ".*", "[a-z]+(:[a-z]+)?", "[a-z]+([._-][a-z]+)*", "alice|bob",
                "(?i)[a-z]{2,8}[0-9]*", r"[^\W\d]\w*", ".*a.*b", "(a+)(b+)"):
            fingerd_backends.compile_pattern(pattern)

    @mock.patch.object(fingerd_backends, "MAX_CHECK", 0.01)
    def test_does_not_take_a_long_time_as_a_whole(self):
        names = itertools.repeat("a", 10 ** 7)
        with mock.patch.object(fingerd_backends, "hostile_names",
                               lambda pattern: names):
            fingerd_backends.compile_pattern("any(thing)?")
        self.assertTrue(next(names, None))

    def test_names_are_those_of_logins_and_for_web_of_any_script(self):
        for kind, names, others in (
                (FingerBackend, ("A.b-c_d", "a-", "a.", "x" * 64),
                 ("h\u00e9", "\u0661", "\U0001f600", "a+")),
                (WebBackend, ("A.b-c_d+e", "h\u00e9", "\u65e5\u672c", "\u0661",
                              "a..b", "x" * 64), ())):
            pattern = fingerd_backends.compile_pattern(
                defaults(kind)["pattern"])
            for name in ("a", "_", "9", *names, *others):
                self.assertEqual(fingerd_backends.fits(pattern, name),
                                 name not in others, name)

    def test_cuts_at_a_line_and_no_character_in_half(self):
        for data, limit, text in (
                (b"\xc3\xa9" * 3, 5, "\u00e9\u00e9\n[truncated]\n"),
                (b"a\n\xc3\xa9\xc3\xa9", 5, "a\n[truncated]\n"),
                (b"\xff\xff", 5, "\\xff\\\n[truncated]\n"),
                (b"123456", 5, "12345\n[truncated]\n"),
                (b"12345", 5, "12345"), (b"", 5, ""),
                # Nor where a long text is decoded in pieces.
                (b" " * 1023 + b"\xc3\xa9\n", 2000, " " * 1023 + "\u00e9\n")):
            with self.subTest(data):
                self.assertEqual(
                    fingerd_backends.make_text(data, "utf-8", limit), text)


# ---- finger ---------------------------------------------------------------

class FingerBackendTest(BackendCase):
    def make_script(self, text, command="{user}", **options):
        path = self.write_script(text)
        return self.make(FingerBackend, command=f"{path} {command}", **options)

    def test_puts_the_name_into_one_argument_without_a_shell(self):
        backend = self.make_script(
            "printf '<%s>\\n' \"$@\"",
            "'a {user} b' --name={user} {user}{user} {0} %s", pattern=".*")
        for name in ("$(id)", "`id`;id", "it's", '"', "*", "{user}", "a\\b",
                     "h\u00e9"):
            self.assertEqual(
                self.ask(backend, name), f"<a {name} b>\n<--name={name}>\n"
                f"<{name}{name}>\n<{{0}}>\n<%s>\n")

    def test_complains_of_bad_settings(self):
        none = ("begins neither with a program in /usr/local/bin:/usr/bin:/bin"
                " nor with the path of one; install it, or correct its name")
        plain = write_file(self.folder, "plain")
        self.assert_refused(FingerBackend, (
            *(({"command": command}, f'command: "{command}" {none}')
              for command in ("", "fingr -- {user}", "/nowhere/x {user}",
                              plain, os.path.relpath("/bin/sh"),
                              "/bin/{user}")),
            ({"command": "sh 'x"},
             'command: "sh \'x" cannot be split into words; close every'
             " quote"),
            # One line for each error.
            ({"command": "fingr", "verbose_command": "fingr",
              "list_command": "fingr", "pattern": ""},
             f'command: "fingr" {none}\nverbose_command: "fingr" {none}\n'
             f'list_command: "fingr" {none}\n'
             'pattern: is empty; write e.g. [a-z]+')))

    def test_warns_of_what_only_a_shell_understands(self):
        said = ("is passed to the program as an argument, there is no shell;"
                " write a script if you need one")
        backend = self.make(
            FingerBackend, command="echo {user}>&2 | `id` <x & '$HOME' --a=b"
            " 'c d' \\\\ * ? ~ #", verbose_command="echo a;",
            list_command="echo &")
        self.assertEqual(backend.warnings, [
            *(f'command: "{word}" {said}' for word in (
                "{user}>&2", "|", "`id`", "<x", "&", "$HOME")),
            f'verbose_command: "a;" {said}', f'list_command: "&" {said}'])

    def test_gives_a_small_environment_and_nothing_of_its_own(self):
        # Debian's finger obeys .nofinger only when its input is a socket.
        script = self.write_script("""\
            import os, socket, stat, sys
            print(stat.S_ISSOCK(os.fstat(0).st_mode), repr(sys.stdin.read()),
                  socket.socket(fileno=0).getpeername() == "",
                  os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid(),
                  os.getcwd(), sorted(os.environ.items()))
            os.fstat(int(sys.argv[1]))
            """, shell=f"#!{sys.executable} -IS\n")
        os.environ["FINGERD_SECRET"] = "x"
        with open(os.devnull) as file:
            os.set_inheritable(file.fileno(), True)
            backend = self.make(FingerBackend, **dict.fromkeys(
                ("command", "list_command"), f"{script} {file.fileno()}"))
            for user, verbose, said in (
                    ("alice", "", self.ask(backend, "alice")),
                    ("", "1", self.list(backend, True))):
                words = [("FINGER_CLIENT", "192.0.2.7"), ("FINGER_USER", user),
                         ("FINGER_VERBOSE", verbose), ("LC_ALL", "C.UTF-8"),
                         ("PATH", "/usr/local/bin:/usr/bin:/bin")]
                self.assertEqual(
                    said, f"True '' True True True {os.getcwd()} {words}\n")
        self.assertIn("Bad file descriptor", self.reports[0])

    def test_status_and_output_decide_the_answer(self):
        unknown = "finger: alice: no such user."
        for script, answer, *reports in (
                ("echo hi", "hi\n"), ("printf hi", "hi"), ("echo", "\n"),
                # Silence is unknown whatever the status ...
                ("true", None), ("exit 1", None),
                ("echo oops >&2; exit 1", None, "oops"),
                # ... and output is the answer.
                ("echo hi; exit 3", "hi\n"),
                ("echo ' a' >&2; echo; echo b >&2; exit 2", "\n", "a; b"),
                # The words of others for an unknown user.
                (f"echo '{unknown}' >&2; exit 1", None, unknown),
                (f"echo '{unknown}'", None),
                (f"echo hi; echo '{unknown}' >&2", "hi\n", unknown),
                (r"printf '\r\nno such user.\r\n\r\n'", None),
                ("echo '  NO SUCH USER. '; exit 3", None),
                ("echo 'No such user' >&2", None, "No such user"),
                ("echo 'No such user here'", "No such user here\n"),
                ("echo hi; echo 'No such user'", "hi\nNo such user\n"),
                (r"printf '\233\377h\303\251\303\r\n'",
                 "\\x9b\\xffh\u00e9\\xc3\r\n"),
                # The start of what has no end.
                *((f"printf a >&2; head -c 99999 /dev/zero | tr '\\0' '{fill}'"
                   " >&2; echo hi", "hi\n", "a" + fill.strip() * 4095)
                  for fill in "x "),
                # A signal is a failure.
                ("echo half; kill -15 $$", OSError(
                    "script: ended by signal 15$")),
                ("echo 'No such user'; kill -9 $$",
                 OSError("script: ended by signal 9$"))):
            with self.subTest(script):
                del self.reports[:]
                backend = self.make_script(script)
                begin = time.process_time()
                self.assert_answer(answer, self.ask, backend, "alice")
                self.assertLess(time.process_time() - begin, 0.1)
                path = os.path.join(self.folder, "script")
                self.assertEqual(self.reports, [
                    "debug: " * ("no such user" in text.lower())
                    + f"{path}: on standard error: {text}"
                    for text in reports])

    def test_verbose_and_list_have_commands_of_their_own(self):
        for options, text in (
                ({"verbose_command": "echo long {user}"}, "long alice\n"),
                ({"verbose_command": ""}, "short alice\n"),
                ({}, "short alice\n")):
            backend = self.make(FingerBackend, command="echo short {user}",
                                list_command="false", **options)
            self.assertEqual(self.ask(backend, "alice"), "short alice\n")
            self.assertEqual(self.ask(backend, "alice", True), text)
        self.assert_fails("^/.*/false: gave no list$", self.list, backend)

    def test_leaves_nothing_behind_and_waits_for_nobody(self):
        short, linger = 0.01, HANG      # what the end of pipes may take
        for script, lingering, answer in (
                # At the deadline all are killed, grandchildren too.
                ("trap '' TERM INT HUP; (trap '' TERM; sleep 60) &\n"
                 "(sleep 60 | sleep 60) & echo half; echo waiting >&2\n"
                 "while :; do sleep 60 & sleep 0.01; done", short,
                 TimeoutError("/script: timed out, killed$")),
                # A grandchild holds the pipe, or never stops talking.
                ("sleep 60 & echo hi", short, "hi\n"),
                ("(while :; do echo hi; sleep 0.01; done) & exec echo hi",
                 short, "(hi\n)+"),
                ("sleep 60 >/dev/null 2>&1 & exit 1", linger, None),
                # It closes its output and stays, or all but comes to an end.
                ("echo hi; exec >&- 2>&-; sleep 60", short, "hi\n"),
                ("exec >&- 2>&-; sleep 60", short, None),
                ("exec >&- 2>&-; sleep 0.05; kill -9 $$", linger,
                 OSError("/script: ended by signal 9$")),
                ("(sleep 0.05; echo late) & echo hi", linger, "hi\nlate\n"),
                # It says too much, with a grandchild.
                ("sleep 60 & yes 0123456789", linger,
                 "(0123456789\n){9}\\[truncated\\]\n")):
            with self.subTest(script), contextlib.closing(
                    Family(self.folder)) as family, mock.patch.object(
                    fingerd_backends, "LINGER", lingering):
                backend = self.make_script(
                    f"exec 9>{family.path}\necho x >&9\n{script}",
                    max_output=100)
                late = isinstance(answer, TimeoutError)
                job = functools.partial(self.ask, backend, "alice", False,
                                        0.3 if late else HANG)
                with self.takes(0.3 * late):
                    if isinstance(answer, str):
                        self.assertRegex(job(), f"\\A({answer})\\Z")
                    else:
                        self.assert_answer(answer, job)
                self.assertEqual(family.gone(), b"x\n")
        self.assertRegex("\n".join(self.reports), r"\A/.*: waiting\Z")

    def test_a_program_that_cannot_be_run_is_a_failure_with_a_reason(self):
        path = self.write_script("echo hi", shell="")
        backend = self.make(FingerBackend, command=path)
        self.assert_fails(f"Exec format error: '{path}'$",
                          self.ask, backend, "alice")
        os.unlink(path)
        self.assert_fails(f"No such file or directory: '{path}'$",
                          self.ask, backend, "alice")
        none = OSError(errno.EMFILE, "Too many open files")
        with mock.patch("selectors.DefaultSelector", side_effect=none):
            self.assert_fails("Too many open files$", self.ask,
                              self.make_script("sleep 60"), "alice")
        for number in range(3):
            before = len(open_descriptors())
            pipes = [os.pipe() for _ in range(number)]
            with mock.patch("os.pipe", side_effect=[*pipes, none]):
                self.assert_fails("Too many open files$", self.ask,
                                  self.make_script("echo hi"), "alice")
            self.assertEqual(len(open_descriptors()), before)

    def test_works_without_waitid_and_with_sigchld_ignored(self):
        backend = self.make_script(
            "case $1 in a) echo hi ;; b) exit 1 ;; c) sleep 60 ;; esac")
        self.addCleanup(signal.signal, signal.SIGCHLD, signal.SIG_DFL)
        for handler in (signal.SIG_IGN, signal.SIG_DFL):
            signal.signal(signal.SIGCHLD, handler)
            if handler == signal.SIG_DFL:
                self.enter(mock.patch.object(os, "waitid", create=True))
                del os.waitid
            self.assertEqual(self.ask(backend, "a"), "hi\n")
            self.assertIsNone(self.ask(backend, "b"))
            self.assert_fails("timed out", self.ask, backend, "c", False, 0.05)


# ---- web ------------------------------------------------------------------

HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
HOSTILE_HTML = (
    "<", "<a", "</", "<!", "<!--", "<?", "<a b='", "<a ====", "='\"",
    "<a =\"'", "<x a=''", "<script>", "<script></", "<pre>\n", "<li>",
    "<li> \n", "<li><p>", "x<br>", "&#", "&a", " ", "\n", "\t", "\xa0", "x",
    "x<", "--", "\u65e5")


class WebBackendTest(BackendCase):
    def make_web(self, url, **options):
        return self.make(WebBackend, url=url, **options)

    def start_web(self, pages=None, tls=None, **options):
        """Start an origin; give it, and a backend for its /~{user}."""
        origin = self.start_origin(pages, tls=tls)
        return origin, self.make_web(origin.url + "/~{user}", **options)

    def check_answers(self, table, **options):
        """Check a table of (page, answer or failure)."""
        origin, backend = self.start_web(cache=0.0, **options)
        for page, answer in table:
            origin.pages["/~x"] = page
            with self.subTest(str(page)[:200]):
                self.assert_answer(answer, self.ask, backend, "x")

    def trust_test_cert(self):
        """Write the certificate; have TLS clients of this process trust it."""
        path = write_file(self.folder, "cert.pem", TEST_CERT)
        os.environ["SSL_CERT_FILE"] = path
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context

    def answer_names_with(self, function):
        """Stand in for the name service, and for names in .invalid only."""
        def getaddrinfo(host, *args, real=socket.getaddrinfo, **options):
            if not host.endswith(".invalid"):
                return real(host, *args, **options)
            if "missing" in host:
                raise socket.gaierror(socket.EAI_NONAME, "Name not known")
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))
                    for address in function(host)]
        self.enter(mock.patch("socket.getaddrinfo", getaddrinfo))

    def test_puts_the_name_into_one_segment_which_cannot_climb(self):
        origin = self.start_origin()
        for url, table in {
                "/~{user}": {
                    "a.b-c_d~e": "/~a.b-c_d~e", "a/b": "/~a%2Fb",
                    "a?b#c": "/~a%3Fb%23c", "a%2fb": "/~a%252fb",
                    "a;b&c=d": "/~a%3Bb%26c%3Dd", "h\u00e9": "/~h%C3%A9",
                    "{user}": "/~%7Buser%7D", "a:80": "/~a%3A80"},
                "/{user}": {"...": "/...", **dict.fromkeys((
                    ".", "..", "../x", "x/..", "x/../y", "..\\x", "%2e",
                    "%2E%2e", "a%2f..", "..;x"))},
                "/.{user}/plan": {"..": "/.../plan", ".": None, "./x": None,
                                  "%2e": None}}.items():
            backend = self.make_web(origin.url + url, pattern=".*")
            for name, path in table.items():
                with self.subTest(url=url, name=name):
                    self.assertIsNone(self.ask(backend, name))
                    self.assertEqual(origin.asked, [path] * bool(path))
                    origin.asked.clear()
        self.assertEqual(origin.headers["User-Agent"], "fingerd/1.0")
        self.assertEqual(origin.headers["Accept-Encoding"], "identity")
        self.ask(self.make(WebBackend, prefix=origin.url + "/users/"), "alice")
        self.assertEqual(origin.asked, ["/users/alice"])

    def test_complains_of_bad_settings(self):
        good, host = "https://example.org/~{user}", "https://example.org/"
        either = f"url: write either url or prefix, e.g. url = {good}"
        no_url = "is not a web address; write https://host/path"
        self.assert_refused(WebBackend, (
            ({}, either),
            ({"url": good, "prefix": host}, either),
            *(({"url": url}, f'url: "{url}" {no_url}') for url in (
                "ftp://example.org/{user}", "http:///{user}",
                "example.org/{user}", "HTTP://a/{user}", host + "#{user}",
                "https://{user}.example.org/", "https://example.org/a b{user}",
                "https://example.org/\u00e9{user}", "https://a:x/{user}",
                "https://[::1/{user}", "https://a\\b/{user}")),
            ({"prefix": "https://example.org"},
             f'prefix: "https://example.org" {no_url}'),
            *(({"url": url}, f'url: "{url}" {no_url}') for url in (
                "http://a:0/{user}", "http://a:65536/{user}")),
            ({"url": "http://a/b/../{user}"}, 'url: "http://a/b/../{user}" has'
             ' a "." or ".." segment; write the path without'),
            *(({"prefix": host, setting: host + "{user}"},
               f'{setting}: "{host}{{user}}" has a {{user}} that has no place'
               " here; leave it out") for setting in ("prefix", "index")),
            ({"url": "https://me:secret@example.org/@{user}"},
             f'url: "https://...@{{user}}" {no_url}'),
            ({"url": host}, f'url: "{host}" has no place for the name; write'
             " {user} in its path"),
            ({"url": "x", "index": "/list", "pattern": ""},
             f'url: "x" {no_url}\nindex: "/list" {no_url}\n'
             "pattern: is empty; write e.g. [a-z]+")))
        for url in ("https://[::1]:8080/{user}?a=b", "http://a/{user}{user}",
                    "http://a-b.c:1?{user}"):
            self.make_web(url)

    def test_makes_text_of_html(self):
        for page, text in (
                ("<p>Hello,   <b>big</b>\n world", "Hello, big world\n"),
                ("<title>Alice &amp; <b>Co</title><h1>Plan</h1>to rest",
                 "Plan\n\nto rest\n"),
                ("a<br>b<br/>c<BR >d", "a\nb\nc\nd\n"),
                ("<ul><li>a<li>b</ul>c", "* a\n* b\n\nc\n"),
                ("<ol><li> <p>a</p></li><li></li><li>b</li></ol>",
                 "* a\n\n*\n* b\n"),
                ("<div>a<div>b</div></div><div>c<br></div>d<br><br>e",
                 "a\nb\nc\nd\n\ne\n"),
                ("<pre>\n a\n\n   b\tc </pre>d", " a\n\n   b\tc\n\nd\n"),
                ("<pre>a<b>  b</b>\r c\r\n \n\nd</pre>e  f",
                 "a  b\n c\n\nd\n\ne f\n"),
                ("<table><tr><th>a</th><td>b</td></tr><tr><td>c <td> d</table>"
                 "e", "a\tb\nc\td\n\ne\n"),
                ("<script>if (a<b) '</p>'</script>a<STYLE>p{}</Style>b"
                 "<script>" + "</b> <p>" * 999 + "</scripts></SCRIPT >c"
                 "<script>never closed <p>d", "abc\n"),
                ("a<!-- <p>x</p> -- > -->b<!-->c<!--->d<!-- never > closed",
                 "abcd\n"),
                ("<!DOCTYPE html><?xml version='1.0'?>a</>b</ x>c", "abc\n"),
                ("<a href='/x?a>b' title=\"c>d\">link</a>", "link\n"),
                (f"<a href='{'>' * 9999}' id= \"{'>' * 9999}\">a", "a\n"),
                ("<a href=it's>link</a> it's", "link it's\n"),
                ("1 < 2 <= 3 <3 & 4 &lt;b&gt; <<b>",
                 "1 < 2 <= 3 <3 & 4 <b> <\n"),
                ("&eacute;&#233;&#xe9;&nbsp;&nbsp;x&bogus;&#1;&#" + "9" * 300
                 + ";&amp", "\u00e9\u00e9\u00e9  x&bogus;\ufffd&\n"),
                # No reference is cut where a long text is.
                ("x" + "&eacute;" * 5000, "x" + "\u00e9" * 5000 + "\n"),
                ("x " * 9999, ("x " * 9999).strip() + "\n"),
                ("".join(f"<!--{'x' * size}--><script>{'x' * size}</script>a"
                         for size in range(1000, 1030)), "a" * 30 + "\n"),
                ("</ul></li></pre></p>a</div><div><p></div>\n\n<p>b",
                 "a\n\nb\n"),
                *((f"a{end}", "a\n") for end in ("<p", "<p b='", "<p b='x")),
                ("<", "<\n"), ("  \n ", ""), ("", "")):
            with self.subTest(page[:99]):
                self.assertEqual(fingerd_backends.html_text(page), text)

    def test_hostile_html_takes_no_longer_and_no_memory(self):
        self.addCleanup(tracemalloc.stop)
        for piece, start in itertools.product(HOSTILE_HTML, ("", "<pre>")):
            page = (start + piece * 2 ** 14)[:2 ** 14]
            begin = time.process_time()
            fingerd_backends.html_text(page)
            self.assertLess(time.process_time() - begin, 0.2, page[:99])
            tracemalloc.start()
            fingerd_backends.html_text(page[:2 ** 12])
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            self.assertLess(peak, 200 * 2 ** 12, page[:99])

    def test_what_is_hostile_stops_no_other_thread(self):
        def look(*event):       # at each call of a function, and each return
            now = time.thread_time()
            times[:] = now, max(times[1], now - times[0])

        table: Any = (
            *((0.002, fingerd_backends.html_text, (piece * 2 ** 18)[:2 ** 18])
              for piece in ("<", "<!--", "<script>", "<a ====", "x", " ",
                            "\u65e5")),
            *((0.01, fingerd_backends.make_text,        # 0.06 s in all
               bytearray(b"\xff\x81" * 2 ** 15), codec, 2 ** 16)
              for codec in ("utf_8_sig", "gb18030")))
        for limit, function, *args in table:
            for _ in range(5):
                gc.disable()
                times = [time.thread_time(), 0.0]
                sys.setprofile(look)
                try:
                    function(*args)
                finally:
                    sys.setprofile(None)
                    gc.enable()
                if times[1] < limit:
                    break
            self.assertLess(times[1], limit, repr(args)[:99])

    def test_turns_one_page_at_a_time_into_text(self):
        origin, backend = self.start_web({
            "/~x": text_page("hi\n"), "/~y": drip(HEAD + b"\r\n")}, cache=0.0)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            with WebBackend.turn:
                x = pool.submit(self.ask, backend, "x")
                with self.assertRaises(concurrent.futures.TimeoutError):
                    x.result(0.1)
            self.assertEqual(x.result(HANG), "hi\n")
            # A page that is slow to come is not in the way of others.
            y = pool.submit(self.ask, backend, "y")
            wait_until(lambda: "/~y" in origin.asked, "the first bytes")
            for _ in range(3):
                self.assertEqual(self.ask(backend, "x"), "hi\n")
            self.assertFalse(y.done())
            origin.leaving.set()
            self.assertRegex(y.result(HANG), "^x*$")

    def test_honours_the_charset(self):
        plain, html = "text/plain; charset=", "text/html; charset="
        meta = b"<meta charset=%s>"
        kept: Any = vars(encodings)["_cache"]   # every name ever looked up
        before = len(kept)
        for kind, page, text in (
                (plain + "utf-8", b"h\xc3\xa9\n", "h\u00e9\n"),
                ("text/plain", b"h\xc3\xa9\n", "h\u00e9\n"),
                ("text/plain", b"\xef\xbb\xbfh\xe9\n", "h\\xe9\n"),
                (plain + "ISO-8859-1", b"\xe9 \x93\n", "\u00e9 \u201c\n"),
                (plain + "us-ascii", b"h\xe9\n", "h\u00e9\n"),
                (plain + "ISO-8859-2", b"\xb1\n", "\u0105\n"),
                (plain + "ISO-8859-15", b"\xa4\n", "\u20ac\n"),
                (plain + "Shift_JIS", b"\x93\xfa\n", "\u65e5\n"),
                (html + "koi8-r", meta % b"cp1251" + b"\xf0", "\u041f\n"),
                ("text/html", meta % b"'windows-1251'" + b"\xcf", "\u041f\n"),
                ("text/html", b"<meta http-equiv='Content-Type' content="
                 b"'text/html; charset=koi8-r'>\xf0", "\u041f\n"),
                (plain + "UTF-16", b"\xff\xfex\0\n\0", "x\n"),
                ("text/html", meta % b"UTF-16" + b"x", "x\n"),
                ("text/html", b"<a href='/?charset=koi8-r'>\xf0", "\\xf0\n"),
                ("text/html", b" " * 1024 + meta % b"koi8-r" + b"\xf0",
                 "\\xf0\n"),
                ("text/plain", meta % b"koi8-r" + b"\xf0",
                 "<meta charset=koi8-r>\\xf0"),
                # What is not a charset of text is read as UTF-8.
                *((f'{plain}"{name}"', b"h\xc3\xa9\\x\xff", "h\u00e9\\x\\xff")
                  for name in (
                    "hex", "idna", "unicode_escape", "utf-7", "undefined",
                    "nonsense", "x" * 300, "../os", "'", ";" * 60000))):
            with self.subTest(kind[:99], page=page):
                begin = time.process_time()
                is_html = kind.startswith(html[:9])
                codec = fingerd_backends.choose_codec(kind, page, is_html)
                self.assertEqual(fingerd_backends.make_text(
                    page, codec, 2000,
                    fingerd_backends.html_text if is_html else str), text)
                self.assertLess(time.process_time() - begin, 0.5)
        self.assertEqual(len(kept), before)
        for name in fingerd_backends.CODECS.values():
            self.assertEqual("x\n".encode(name).decode(name), "x\n")

    def test_status_and_headers_decide_what_is_an_answer(self):
        origin, backend = self.start_web()
        backend.index = origin.url + "/list"
        self.assert_fails(f"^GET {origin.url}/list: there is no such page$",
                          self.list, backend)
        self.check_answers([
            *(((status, {}, b""), reason and OSError(f"/~x: {reason}$"))
              for status, reason in (
                (404, None), (410, None), (204, "204 No Content"),
                (206, "206 Partial Content"), (403, "403 Forbidden"),
                (500, "500 Internal Server Error"))),
            *(((200, {"Content-Type": kind}, body), answer)
              for kind, body, answer in (
                ("text/plain; charset=koi8-r", b"\xf0", "\u041f"),
                ("text/html", b"<meta charset=koi8-r>\xf0", "\u041f\n"),
                *((kind, b"<b>", "<b>") for kind in (
                    "text/markdown", "text/x-anything; a=b",
                    "application/json", "application/ld+json",
                    "application/xml")),
                ("application/xhtml+xml", b"<b>", ""),
                ("TEXT/HTML", b"<b>", ""),
                *((kind, b"<b>", OSError(f': its type "{kind}" is not text$'))
                  for kind in ("image/png", "application/octet-stream",
                               "application/jsonx")))),
            *(((200, {"Content-Encoding": coding}, b"hi\n"), OSError(
                f'its encoding "{coding.lower()}" was not asked for$'))
              for coding in ("GZIP", "br", "identity, gzip")),
            ((200, {"Content-Encoding": "Identity"}, b"hi\n"), "hi\n")])

    def test_a_reply_that_ends_early_or_is_not_http_is_a_failure(self):
        early = OSError("/~x: the answer ended early$")
        self.check_answers([(raw(reply), answer) for reply, answer in (
            (b"HTTP/1.0 200 OK\r\n\r\nhi\n", "hi\n"),
            (HEAD + b"Content-Length: 3\r\n\r\nhi\nmore", "hi\n"),
            (CHUNKED + b"3;a=b\r\nhi\n\r\n0\r\nA: b\r\n\r\n", "hi\n"),
            (HEAD + b"\r\n", ""),
            (HEAD + b"Content-Length: 0\r\n\r\nmore", ""),
            (b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"\r\nhi\n", "hi\n"),
            (HEAD + b"Content-Length: 9\r\n\r\nhi\n", early),
            (HEAD + b"Content-Length: 9\r\n\r\n", early),
            (CHUNKED + b"3\r\nhi\n\r\n", early),
            (CHUNKED + b"what\r\n", early),
            (b"", OSError(": Remote end closed connection")),
            (b"SSH-2.0-OpenSSH_9.2\r\n", OSError(": BadStatusLine: ")),
            (b"HTTP/1.0 9999 OK\r\n\r\n", OSError(": BadStatusLine: ")),
            (b"x" * 65537, OSError(": LineTooLong: ")))])

    @mock.patch.object(fingerd_backends.BoundedFile, "left", 2 ** 15)
    def test_an_answer_without_end_is_cut_and_costs_no_more(self):
        line, end = b"0123456789", "[truncated]\n"
        lines, cut = b"0123456789\n" * 1000, "0123456789\n" * 9 + end
        many = OSError(": headers, chunk sizes or trailers are too long$")
        html = HEAD + b"Content-Type: text/html\r\n\r\n"
        table = [(raw(head, then=then), answer) for head, then, answer in (
            (HEAD + b"\r\n", lines, cut),
            (HEAD + b"\r\n", b"x" * 101, "x" * 100 + "\n" + end),
            (html + b"<p>", line + b"<br>", "0123456789\n" * 7 + end),
            (html, b"<em>", "\n" + end),
            (CHUNKED, b"2af8\r\n" + lines + b"\r\n", cut),
            (CHUNKED, b"1;%s\r\nx\r\n" % (b"y" * 1999), many),
            (CHUNKED, b"0" * 999, many),
            (CHUNKED + b"0\r\n", b"A: b\r\n" * 999, many),
            (b"HTTP/1.1 200 ", line, many),
            (HEAD, b"A: %s\r\n" % (b"b" * 9999), many),
            (HEAD, b"A: b\r\n", OSError("HTTPException")),
            (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 999, many))]
        self.check_answers(table, max_output=100)
        # They are around a body, which may be as long again.
        self.check_answers([(text_page("x" * 2 ** 16), "x" * 2 ** 16)])
        self.assertLess(fingerd_backends.AROUND, 2 ** 18)
        heads = (HEAD + b"Content-Length: %d\r\n\r\n" % 10 ** 12, *(
            CHUNKED + size + b"\r\n" for size in (
                b"f" * 999, b"0xfff_fff", b"-1", b" -1", b"-0x1", b"-1_0",
                b"-" + b"f" * 999)))
        origin, backend = self.start_web(cache=0.0, max_output=100)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        for head in heads:
            origin.pages["/~x"] = raw(head, then=lines)
            # Newer Pythons refuse a negative size.
            with self.subTest(head), contextlib.suppress(
                    OSError if b"-" in head[len(CHUNKED):] else TypeError):
                self.assertEqual(self.ask(backend, "x"), cut)
        self.assertLess(tracemalloc.get_traced_memory()[1], 2 ** 20)
        # Nor do small chunks.
        _, backend = self.start_web({"/~x": raw(
            CHUNKED + b"2\r\nxx\r\n" * 9999 + b"0\r\n\r\n")})
        tracemalloc.clear_traces()
        self.assertEqual(self.ask(backend, "x"), "x" * 19998)
        self.assertLess(tracemalloc.get_traced_memory()[1], 2 ** 19)

    def test_no_stage_of_an_exchange_outlasts_the_deadline(self):
        def silent_later(handler):
            if handler.server.asked:
                silent(handler)

        tls = self.trust_test_cert()
        silent = raw(b"", pause=HANG)
        slow = raw(b"", pause=0.3)      # ... leaves less for what follows
        late = raw(b"", b"HTTP/1.1 200 Go on\r\n\r\n", pause=0.3)
        found = b"HTTP/1.1 302 x\r\nLocation: /~x\r\n"
        away = (302, {"Location": "/~y"}, b"")
        full = self.enter(full_listener()).getsockname()
        jobs = [functools.partial(fingerd_backends.dial, full, 0.4)]
        for page, options in (
                (silent, {}),
                (drip(HEAD, b"A: b\r\n"), {}),
                (drip(HEAD + b"\r\n"), {}),
                (raw(found, b"\r\n", pause=0.1), {}),
                (None, {"tls": tls, "greet": drip(b"\x16\3\3\x40\0", b"\2")}),
                (drip(HEAD + b"\r\n"), {"tls": tls}),
                (away, {"tls": tls, "greet": silent_later}),
                (silent, {"tls": tls, "greet": slow}),
                (None, {"tunnel": drip(b"HTTP/1.0 200 OK\r\n", b"A: b\r\n")}),
                (None, {"tunnel": late})):
            origin = self.start_origin({"/~x": page}, **options)
            url = origin.url
            if "tunnel" in options:
                os.environ["https_proxy"], url = url, "https://test.invalid"
            jobs.append(functools.partial(
                self.ask, self.make_web(url + "/~{user}"), "x", False, 0.4))
        with self.takes(0.4, 0.4 + PROMPT):
            errors = in_threads(jobs)
        self.assertTrue(all(isinstance(error, (TimeoutError, socket.timeout))
                            for error in errors), errors)

    def test_each_read_has_the_time_that_is_left(self):
        sock, file = mock.Mock(), mock.Mock(**{"readinto.return_value": 1})
        fingerd_backends.BoundedFile(
            sock, file, time.monotonic() + 60).readinto(bytearray(9))
        # The last is for a handshake, after the answer of a proxy.
        before, after = sock.method_calls
        self.assertTrue(50 < after[1][0] < before[1][0] <= 60)

    def test_a_dead_address_does_not_starve_the_next(self):
        self.answer_names_with(lambda host: "abc")
        sock = mock.Mock()
        connect = self.enter(mock.patch(
            "socket.create_connection", side_effect=(TimeoutError, sock)))
        self.assertIs(fingerd_backends.dial(("test.invalid", 80), 60), sock)
        self.assertEqual(
            [(*address, round(share))
             for (address, share), _ in connect.call_args_list],
            [("a", 80, 20), ("b", 80, 30)])
        # A share is for each connect, not for the handshake.
        self.assertGreater(sock.settimeout.call_args[0][0], 50)

    def test_follows_redirects_on_the_same_host_or_to_those_named(self):
        port = self.start_origin({"/~x": text_page("other port\n")}).port
        origin, backend = self.start_web({
            "/there": text_page("hi\n"), "/%E9%20x": text_page("latin\n")},
            cache=0.0)
        own = origin.port
        named = self.make_web(backend.template, redirect_hosts=("localhost",))
        refused = OSError('redirected to ".*", which is not allowed$')
        table = [
            *((backend, location, 302, answer) for location, answer in (
                ("there", "hi\n"), ("?x#y", None),
                (origin.url + "/there", "hi\n"),
                (f"//127.0.0.1:{own}/there", "hi\n"),
                ("/\xe9 x", "latin\n"),
                ("http://[/", OSError("ValueError: ")))),
            *((backend, location, 302, refused) for location in (
                f"http://localhost:{own}/there", f"http://127.0.0.1:{port}/~x",
                "http://127.0.0.1:22/", "http://127.0.0.1@localhost/there",
                f"http://me@127.0.0.1:{own}/there", "http://[::1]/",
                "file:///etc/passwd", "ftp://127.0.0.1/x",
                "data:text/plain,x")),
            *((backend, "/there", status, "hi\n")
              for status in (301, 303, 307, 308)),
            (named, f"http://127.0.0.2:{own}/there", 302, refused),
            (named, f"http://LOCALHOST:{own}/there", 302, "hi\n"),
            (backend, "", 302, OSError("more than 5 redirects$"))]
        for asked, location, status, answer in table:
            with self.subTest(location, status=status):
                origin.pages["/~x"] = raw(
                    f"HTTP/1.0 {status} x\r\nLocation: {location}\r\n\r\n"
                    .encode("latin-1"))
                del origin.asked[:]
                self.assert_answer(answer, self.ask, asked, "x")
        self.assertEqual(origin.asked, ["/~x"] * 6)

    def test_tls_is_verified_and_never_left(self):
        secure, backend = self.start_web({
            "/~x": text_page("hi\n"), "/there": text_page("safe\n"),
            "/~same": (302, {"Location": "/there"}, b"")},
            tls=self.trust_test_cert())
        secure.pages["/~down"] = (302, {
            "Location": f"http://127.0.0.1:{secure.port}/there"}, b"")
        for user, answer in (("x", "hi\n"), ("same", "safe\n"),
                             ("down", OSError("not allowed$"))):
            self.assert_answer(answer, self.ask, backend, user)
        self.assert_fails("not allowed$", backend._follow, "http://127.0.0.1/",
                          "HTTPS://127.0.0.1/", "http://127.0.0.1/")
        self.answer_names_with(lambda host: ["127.0.0.1"])
        for name, answer in (
                ("test", "hi\n"), ("missing", OSError(
                    r"^GET https://missing\.invalid:.*: Name not known$")),
                ("other", OSError("(?i)hostname mismatch|certificate"))):
            backend = self.make_web(
                f"https://{name}.invalid:{secure.port}/~{{user}}")
            self.assert_answer(answer, self.ask, backend, "x")
        os.environ["SSL_CERT_FILE"] = os.devnull
        self.assert_fails("(?i)certificate.verify", self.ask,
                          self.make_web(secure.url + "/~{user}"), "x")
        self.assertEqual(secure.asked,
                         ["/~x", "/~same", "/there", "/~down", "/~x"])

    def test_uses_the_proxy_of_the_environment(self):
        proxy = self.start_origin({
            "http://test.invalid/~x": text_page("by proxy\n"),
            "/~x": text_page("by tunnel\n")}, tunnel=self.trust_test_cert())
        os.environ.update(http_proxy=proxy.url, https_proxy=proxy.url)
        for scheme, text in (("http", "by proxy\n"), ("https", "by tunnel\n")):
            backend = self.make_web(scheme + "://test.invalid/~{user}")
            self.assertEqual(self.ask(backend, "x"), text)
        self.assertEqual(proxy.asked, ["http://test.invalid/~x",
                                       "CONNECT test.invalid:443", "/~x"])

    def pass_time(self, backend, seconds):
        """Have all pages that are known be older."""
        for user in "xy":
            page = backend.find_page(backend.template.replace("{user}", user))
            page.until -= seconds
            page.stale_until -= seconds

    def test_keeps_answers_for_a_while_unknown_users_too(self):
        origin, backend = self.start_web({"/~x": text_page("hi\n")})
        for _ in range(2):
            for _ in range(3):
                self.assertEqual(self.ask(backend, "x"), "hi\n")
                self.assertIsNone(self.ask(backend, "y"))
            self.assertEqual(origin.asked, ["/~x", "/~y"])
            self.pass_time(backend, 30)     # of 60
        origin.pages = {"/~y": text_page("here now\n")}
        self.assertIsNone(self.ask(backend, "x"))
        self.assertEqual(self.ask(backend, "y"), "here now\n")

    def test_asks_once_for_many_clients_at_the_same_moment(self):
        def page(handler):
            wait_until(lambda: backend.find_page.call_count == 8, "all")
            handler.wfile.write(b"HTTP/1.0 %d x\r\n\r\nhi\n" % status)

        for status, cache, answer in (
                (200, 60.0, "hi\n"), (200, 0.0, "hi\n"), (404, 60.0, None),
                (500, 0.0, True)):
            with self.subTest(status, cache=cache):
                origin, backend = self.start_web({"/~x": page}, cache=cache)
                backend.find_page = mock.Mock(side_effect=backend.find_page)
                results = in_threads([
                    functools.partial(self.ask, backend, "x")] * 8)
                self.assertEqual([isinstance(result, OSError) or result
                                  for result in results], [answer] * 8)
                self.assertEqual(origin.asked, ["/~x"])

    def test_one_that_waits_for_another_has_its_own_deadline(self):
        def silent_first(handler):
            if len(origin.asked) == 1:
                go.wait(HANG)
            handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\nhi\n")

        late = TimeoutError("/~x: timed out$")
        for first, user, second, answer in (
                # One that had less time does not speak for the origin ...
                (0.1, "x", HANG, "hi\n"),
                # ... one that has less waits no longer, or not at all.
                (HANG, "x", 0.05, late), (HANG, "y", HANG, "hi\n")):
            with self.subTest(first=first, user=user, second=second), \
                    concurrent.futures.ThreadPoolExecutor() as pool:
                go = threading.Event()
                origin, backend = self.start_web({
                    "/~x": silent_first, "/~y": text_page("hi\n")})
                pool.submit(self.ask, backend, "x", False, first)
                wait_until(lambda: origin.asked, "the first to ask")
                with self.takes():
                    self.assert_answer(answer, self.ask, backend, user, False,
                                       second)
                go.set()

    def test_gives_an_old_answer_while_the_origin_fails(self):
        origin, backend = self.start_web({"/~x": text_page("hi\n")})
        self.assertEqual(self.ask(backend, "x"), "hi\n")
        self.assertIsNone(self.ask(backend, "y"))
        origin.pages = dict.fromkeys(("/~x", "/~y"), (503, {}, b""))
        self.pass_time(backend, 60)
        for _ in range(2):      # each tries again
            self.assertEqual(self.ask(backend, "x"), "hi\n")
            self.assertIsNone(self.ask(backend, "y"))
        self.assertEqual(self.reports, [
            f"an old answer is given: GET {origin.url}/~{name}: 503 Service"
            " Unavailable" for name in "xyxy"])
        self.assertEqual(origin.asked, ["/~x", "/~y"] * 3)
        with mock.patch.object(backend, "_fetch",
                               side_effect=TimeoutError) as fetch:
            self.assertEqual(self.ask(backend, "x", False, 80), "hi\n")
            left = fetch.call_args[0][1] - time.monotonic()
            self.assertTrue(30 < left < 41)     # half of the time
        self.pass_time(backend, 3500)
        self.assertEqual(self.ask(backend, "x"), "hi\n")
        self.pass_time(backend, 100)
        self.assert_fails("503", self.ask, backend, "x")
        origin.pages = {"/~x": text_page("back\n")}
        self.assertEqual(self.ask(backend, "x"), "back\n")

    @mock.patch.object(fingerd_backends, "MAX_CACHE", 2 << 18)
    def test_forgets_what_was_asked_for_least(self):
        origin, backend = self.start_web()
        for user in "xyxzxy":
            self.ask(backend, user)
        self.assertEqual(origin.asked, ["/~x", "/~y", "/~z", "/~y"])

    @mock.patch.object(WebBackend, "tls", None)
    @mock.patch.dict(fingerd_backends.known_addresses)
    def test_looks_hosts_up_before_a_chroot_and_never_after(self):
        find = mock.Mock(return_value=["127.0.0.1"])
        self.answer_names_with(find)
        origin = self.start_origin({"/~x": text_page("safe")},
                                   tls=self.trust_test_cert())
        failed = ("is found, nor will be in the chroot; write an address"
                  " instead of the name")
        with self.assertRaises(ValueError) as caught:
            self.make(WebBackend, prefix="http://missing.invalid/",
                      index="https://missing.invalid/").enter_chroot("/")
        self.assertEqual(str(caught.exception), "\n".join(
            f"{setting}: no address of missing.invalid {failed}"
            for setting in ("prefix", "index")))
        # The certificates of a folder are read when one is needed.
        os.environ["SSL_CERT_DIR"] = self.folder
        os.environ["SSL_CERT_FILE"] = os.devnull
        os.environ["http_proxy"] = "proxy.invalid:3128"
        url = f"https://test.invalid:{origin.port}/~{{user}}"
        backend = self.make_web(url, redirect_hosts=("missing.invalid",))
        backend.enter_chroot("/")
        os.environ["SSL_CERT_FILE"] = os.environ["SSL_CERT_DIR"] = os.devnull
        for again in (backend, self.make_web(url)):
            self.assertEqual(self.ask(again, "x"), "safe")
        self.assertEqual(find.mock_calls, [mock.call("test.invalid"),
                                           mock.call("proxy.invalid")])

    def test_needs_no_module_after_the_start(self):
        # After chroot or the drop, Python's own files may be out of reach.
        origin = self.start_origin({
            "/~x": (200, {"Content-Type": "text/html"},
                    b"<meta charset=iso-2022-jp>&eacute;"),
            "/~bad": raw(b"x\n"),
            "/~away": (302, {"Location": "http://h\xe9.invalid/"}, b"")})
        secure = self.start_origin({"/~x": text_page("safe")},
                                   tls=self.trust_test_cert())
        out = run_python(self, """\
            import sys
            from fingerd_backends import FingerBackend, WebBackend
            lookups = [
                kind({**{name: text for name, _, text, _ in kind.settings},
                      "max_output": 5000, "cache": 60.0, "stale": 1.0,
                      "redirect_hosts": (), setting: text}, print).lookup
                for kind, setting, text in (
                    (FingerBackend, "command", "echo {user}"),
                    *((WebBackend, "prefix", url) for url in sys.argv[1:]))]
            class Refuse:
                def find_spec(self, name, *args):
                    print("needs", name)
            sys.meta_path.insert(0, Refuse())
            for lookup in lookups:
                for user in "x", "bad", "away":
                    try:
                        print(ascii(lookup(user, False, "", 10)), end=" ")
                    except OSError as error:
                        print(type(error).__name__, end=" ")
            """, "http://localhost:1/", origin.url + "/~", secure.url + "/~")
        self.assertEqual(out.split(), [
            "'x\\n'", "'bad\\n'", "'away\\n'", *["OSError"] * 3, "'\\xe9\\n'",
            "OSError", "OSError", "'safe'", "None", "None"])


# ---- files ------------------------------------------------------------------

class RemoteBackendTest(BackendCase):
    def ask_remote(self, said, user, **options):
        """Ask a server that says this."""
        with socket.create_server(("127.0.0.1", 0)) as listener, \
                concurrent.futures.ThreadPoolExecutor() as pool:
            listener.settimeout(HANG)
            answer = pool.submit(self.ask, self.make(
                fingerd.RemoteBackend, host=listener.getsockname(), **options),
                user, user == "w")
            sock, _ = listener.accept()
            with sock, contextlib.suppress(OSError):
                self.assertEqual(sock.recv(1000), b"/W " * (user == "w")
                                 + user.encode() + b"\r\n")
                sock.sendall(said)
            return answer.result()

    def test_understands_what_other_servers_say(self):
        denied = b"Finger online user list denied\r\n"
        table = [
            *((said, "x", None) for said in (
                b"No such user\r\n", b"finger: x: no such user.\r\n",
                b"x: no such user\r\n", b"finger: x: no such user\n",
                b"x: no such user.\n", b"", b"\r\n")),
            *((said, "x", said) for said in (
                b"No such user\r\nas x\r\n", b"no such user: x\r\n",
                b"There is no such user\r\n")),
            *((said, "x", OSError(str(said, "ascii").strip())) for said in (
                FAILED, b"Access denied\r\n", denied,
                b"Too many queries, try again later\r\n")),
            (denied, "", None), (b"\x1b[2J\xff\n", "w", b"^[[2J\\xff\r\n")]
        for said, user, answer in table:
            with self.subTest(said):
                self.assert_answer(answer, self.ask_remote, said, user)
        self.assertEqual(
            self.ask_remote(b"0123456\n" * 90000, "x", max_output=100),
            b"0123456\r\n" * 9 + b"[truncated]\r\n")

    def test_is_not_asked_for_a_client_that_has_its_address(self):
        asked = OSError(".")
        for host, client, answer in (
                ("127.0.0.1", "127.0.0.1", None), ("::1", "::1", None),
                ("127.0.1.1", "127.0.0.1", None),   # Debian's of its own name
                ("127.0.0.1", "127.0.0.2", asked), ("::1", CLIENT, asked)):
            backend = self.make(fingerd.RemoteBackend, host=(host, 0))
            with self.subTest(host=host, client=client):
                self.assert_answer(answer, backend.lookup, "x", False, client,
                                   HANG)

    def test_asks_once_for_all_that_ask_the_same_at_the_same_time(self):
        backend = self.make(fingerd.RemoteBackend, host=("127.0.0.1", 0))
        asked: Any = (threading.Event(), [])
        backend.asked["x"] = asked
        late = TimeoutError("the same was asked before, and got no answer")
        self.assert_answer(late, self.ask, backend, "x", False, 0.01)
        asked[0].set()
        self.assert_answer(late, self.ask, backend, "x")
        asked[1].append("here\n")
        self.assertEqual(self.ask(backend, "x"), b"here\r\n")
        self.assert_fails(".", self.ask, backend, "y")
        self.assertEqual(list(backend.asked), ["x"])    # y is forgotten

    @unittest.skipUnless(has_ipv6(), "this system has no ::1")
    def test_a_circle_ends_with_the_first_deadline(self):
        port = free_port()
        text = ("[server]\nbackend = users remote\n[limits]\ntimeout = 0.2\n"
                "[remote]\nhost = {}:{}\n" + USERS)
        # Each asks from another address than the one by which it is asked.
        with daemon(text.format("[::1]", port)) as two, serving(
                text.format(*two.address), listen=f"[::1]:{port}") as one:
            self.assertEqual(one.ask(b"bob\r\n"), FAILED)
            one.wait_log("query", 2)
            two.wait_log("query client=127.0.0.1 ")
            wait_until(lambda: not one.server.lookups.threads, "the end")
            self.assertLess(sum("query" in line for line in one.log()), 5)

    def test_a_bad_host_is_a_config_error(self):
        backend = self.make(fingerd.RemoteBackend, host=("x.invalid", 79))
        with mock.patch.object(fingerd, "find_host", side_effect=OSError):
            self.assert_fails(
                "host: no address of x.invalid is found, nor will be in the"
                " chroot; write an address instead of the name",
                backend.enter_chroot, "/srv", kind=ValueError)
        self.assert_refused(fingerd.RemoteBackend, [
            ({}, "host: is empty; write e.g. host = two.example.org")])


class FilesBackendTest(BackendCase):
    def make_files(self, files=(), **options):
        for name, text in dict(files).items():
            write_file(self.folder, name, text)
        return self.make(FilesBackend, directory=self.folder, **options)

    def test_tries_the_name_as_typed_first_and_txt_last(self):
        tries = ["Alice", "Alice.txt", "alice", "alice.txt"]
        backend = self.make_files({name: name for name in tries})
        for number, name in enumerate(tries):
            self.assertEqual(self.ask(backend, "Alice"), name)
            self.assertEqual(self.ask(backend, "alice"), tries[max(number, 2)])
            os.remove(os.path.join(self.folder, name))
        self.assertIsNone(self.ask(backend, "Alice"))

    def test_knows_nobody_of_what_is_not_a_users_file(self):
        backend = self.make_files(dict.fromkeys((
            ".hidden", "-l", "a b", "alice.txt", "index.txt", ".txt", "x" * 65,
            "list", "list.txt.txt"), ""), index="index.txt")
        os.mkdir(os.path.join(self.folder, "sub"))
        write_file(self.folder, "sub/file")
        for name in (".hidden", "hidden", "-l", "a b", "alice.txt",
                     "ALICE.TXT", "index", "Index", "index.txt", ".txt", "",
                     "x" * 65, "list.txt", "sub/file", "sub", "./alice",
                     self.folder + "/alice", "alice/", "\U00020000" * 64,
                     "alice\0", "\udcff"):
            self.assertIsNone(self.ask(backend, name), name)
        self.assertEqual(self.ask(backend, "alice"), "")
        nowhere = self.make(FilesBackend, directory="/nowhere")
        for name in (".hidden", "alice.txt", "sub/file"):   # opens nothing
            self.assertIsNone(self.ask(nowhere, name))
        self.assert_fails("[Nn]o such file", self.ask, nowhere, "alice")

    def test_what_is_replaced_is_seen_whole(self):
        for number in "12":
            os.mkdir(os.path.join(self.folder, number))
            for name in "ab":
                write_file(self.folder, f"{number}/{name}", number + name)
        link = os.path.join(self.folder, "current")
        os.symlink("1", link)
        os.symlink("2", link + "-new")
        backend, fstat = self.make(FilesBackend, directory=link), os.fstat

        def replace(fd):        # while it is read
            os.rename(link + "/b", link + "/a")
            return fstat(fd)
        with mock.patch.object(os, "fstat", replace):
            self.assertEqual(self.ask(backend, "a"), "1a")
        self.assertEqual(self.ask(backend, "a"), "1b")
        os.rename(link + "-new", link)
        self.assertEqual(self.ask(backend, "a"), "2a")

    def test_only_a_regular_file_is_read_and_nothing_else_costs_time(self):
        path = functools.partial(os.path.join, self.folder)
        write_file(self.folder, ".secret", "secret")
        os.mkfifo(path("fifo"))
        os.mkdir(path("directory"))
        for name, target in (
                ("link", ".secret"), ("dangling", "nowhere"), ("loop", "loop"),
                ("zero", "/dev/zero"), ("tty", "/dev/tty")):
            os.symlink(target, path(name))
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path("socket"))
        with contextlib.suppress(PermissionError):      # for root only
            os.mknod(path("device"), stat.S_IFCHR | 0o666, os.makedev(1, 5))
        names = sorted({*os.listdir(self.folder)} - {".secret"})
        backend = self.make_files(list=True)
        with self.takes():
            for name in names:
                self.assertIsNone(self.ask(backend, name), name)
                write_file(self.folder, name + ".txt", "a file")
                self.assertEqual(self.ask(backend, name), "a file")
            self.assertEqual(self.list(backend).splitlines(),
                             [f"{name:9}  a file" for name in names])

    def test_is_text_whatever_is_in_it_at_the_moment(self):
        half = "x\n" * (fingerd_backends.MAX_FILE // 2)
        backend = self.make_files()
        for data, text in (
                (b"Gr\xc3\xbc\xc3\x9fe", "Gr\xfc\xdfe"), (b"", ""),
                (b"\xff\xc3", "\\xff\\xc3"), (half.encode(), half),
                (half.encode() + b"x\n", half + "[truncated]\n")):
            with self.subTest(data[:9]):
                write_file(self.folder, "alice", data)
                self.assertEqual(self.ask(backend, "alice"), text)
        os.truncate(write_file(self.folder, "alice", "huge\n"), 1 << 40)
        with self.takes():
            self.assertEqual(self.ask(backend, "alice"), "huge\n[truncated]\n")

    def test_makes_a_list_of_first_lines_or_gives_the_index(self):
        backend = self.make_files({
            "bob": "Builder\nof things", "bob.txt": "not asked for",
            "Alice.txt": "Liddell\n", "empty": "", "long": "x" * 5000,
            ".hidden": "no", "b@c": "no", os.fsdecode(b"\xff"): "no"},
            list=True)
        self.assertEqual(self.list(backend), "Alice  Liddell\nbob    Builder\n"
                         f"empty  \nlong   {'x' * 1000}\n")
        self.assert_fails("timed out", self.list, backend, False, 0,
                          kind=TimeoutError)
        backend = self.make_files(index="index", list=True)
        self.assert_fails("/.* has no file index", self.list, backend)
        write_file(self.folder, "index", "Welcome")
        self.assertEqual(self.list(backend), "Welcome")

    def test_what_it_may_not_read_is_unknown(self):
        backend = self.make_files({"alice": "secret", "bob": "Bob"})
        os.chmod(os.path.join(self.folder, "alice"), 0)
        os.chmod(self.folder, 0o711)    # it need not be readable
        with as_nobody():
            self.assertIsNone(self.ask(backend, "alice"))
            self.assertEqual(self.ask(backend, "bob"), "Bob")

    def test_refuses_settings_that_cannot_be(self):
        self.assert_refused(FilesBackend, [
            ({}, "directory: is empty; write e.g. /srv/finger"),
            *(({"directory": "/", "index": name}, f'index: "{name}" is not the'
               " name of a file in the directory; write e.g. index.txt")
              for name in ("./x", "/etc/passwd", ".", ".."))])

    @needs_root
    def test_works_in_a_chroot_as_sql_and_remote_do(self):
        port = free_port()
        text = ("[server]\nbackend = files sql remote\n[files]\ndirectory ="
                " /texts\n[sql]\ndatabase = /people.db\n[remote]\nhost ="
                f" localhost:{port}\n")
        with background(text, start=False) as program, serving(
                listen=f"localhost:{port}"):
            os.mkdir(os.path.join(program.directory, "texts"))
            write_file(program.directory, "texts/bob", "Bob\n")
            make_database(os.path.join(program.directory, "people.db"), PEOPLE)
            os.chmod(program.config, 0o644)
            self.assertEqual(
                program.start("--chroot", program.directory, fresh=True),
                (0, "", ""))
            for number in range(2):
                for user, reply in ((b"BOB", b"Bob\r\n"), (b"moshez", HAPPY),
                                    (b"alice", b"I am alice.\r\n")):
                    with connect(program.address, "127.0.0.2") as sock:
                        sock.sendall(user + b"\r\n")
                        self.assertEqual(read_all(sock), reply)
                os.kill(program.pid, signal.SIGHUP)
                program.wait_log("reloaded", number + 1)


# ---- sql --------------------------------------------------------------------

PEOPLE = """
    CREATE TABLE people (name TEXT PRIMARY KEY, text TEXT);
    INSERT INTO people VALUES ('alice', 'I am alice.');
    """


class SqlBackendTest(BackendCase):
    def setUp(self):
        super().setUp()
        self.addCleanup(gc.collect)     # an exception keeps its connection
        self.path = os.path.join(self.folder, "people.db")
        make_database(self.path, PEOPLE)

    def make_sql(self, **options):
        return self.make(SqlBackend, database=self.path, **options)

    def make_fake(self, execute=None, **options):
        """Make a backend of a module whose connections are mocks."""
        def connect(**words):
            connection = mock.MagicMock()
            cursor = connection.cursor.return_value
            cursor.description = (("text",),)
            cursor.execute.side_effect = execute
            cursor.fetchmany.return_value = [["I am here"]]
            self.connections.append(connection)
            return connection
        self.connections: list[Any] = []
        module = mock.MagicMock(paramstyle="pyformat", threadsafety=1)
        module.connect.side_effect = connect
        self.enter(mock.patch.dict(sys.modules, fake=module))
        return module, self.make(
            SqlBackend, module="fake", query="SELECT %s", **options)

    def test_the_name_is_a_parameter_whatever_is_in_it(self):
        backend = self.make_sql()
        for name in ("' OR '1'='1", "'; DROP TABLE people; --", '"', "%", "?",
                     "_", "\\", "Gr\xfc\xdfe", "x" * 500):
            self.assertIsNone(self.ask(backend, name), name)
            with contextlib.closing(sqlite3.connect(self.path)) as other:
                other.execute("INSERT INTO people VALUES (?, '1')", [name])
                other.commit()
            self.assertEqual(self.ask(backend, name), "1\n", name)

    def test_answers_with_lines_for_rows_and_columns_and_only_reads(self):
        for query, answer in (
                ("SELECT 'a', ?", "'a': a\n?: alice\n"),
                ("SELECT 1 AS n, 2.5 AS x, NULL AS no, ? AS name",
                 "n: 1\nx: 2.5\nname: alice\n"),
                ("VALUES (?), ('b'), (NULL)", "alice\nb\n"),
                ("SELECT 'a\n' || ? || '\n\n'", "a\nalice\n"),
                ("SELECT '' WHERE 1 OR ?", "\n"),
                ("SELECT X'6fff' WHERE 1 OR ?", "o\\xff\n"),
                ("SELECT CAST(X'6fff' AS TEXT) WHERE 1 OR ?", "o\\xff\n"),
                ("SELECT '\xfc' AS \xe4 , ? AS n", "\xe4: \xfc\nn: alice\n"),
                ("SELECT NULL, NULL WHERE 1 OR ?", None),
                ("SELECT text FROM people WHERE name = 'x' || ?", None),
                ("WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1"
                 " FROM t) SELECT ? FROM t",
                 "alice\n" * fingerd_backends.MAX_ROWS),
                *((query, OSError("readonly")) for query in (
                    "DELETE FROM people WHERE name = ?",
                    "INSERT INTO people VALUES (?, 'x') RETURNING name",
                    "CREATE TABLE t AS SELECT ?")),
                ("SELECT text FROM people WHERE name = ?", "I am alice.\n")):
            with self.subTest(query):
                self.assert_answer(
                    answer, self.ask, self.make_sql(query=query), "alice")
        self.assertEqual(
            self.list(self.make_sql(list_query="SELECT 1 WHERE 0")), "")

    def test_waits_for_a_busy_database_up_to_the_deadline(self):
        backend = self.make_sql()
        with contextlib.closing(sqlite3.connect(
                self.path, check_same_thread=False)) as writer:
            writer.execute("BEGIN EXCLUSIVE")
            with self.takes(0.05):
                self.assert_fails("locked", self.ask, backend, "alice", False,
                                  0.05, kind=TimeoutError)
            timer = threading.Timer(0.05, writer.rollback)
            timer.start()
            self.assertEqual(self.ask(backend, "alice"), "I am alice.\n")
            timer.join()

    def test_a_database_that_is_replaced_is_found(self):
        backend = self.make_sql()
        self.assertEqual(self.ask(backend, "alice"), "I am alice.\n")
        new = os.path.join(self.folder, "new.db")
        make_database(new, PEOPLE.replace("I am", "I was"))
        os.rename(new, self.path)
        self.assertEqual(self.ask(backend, "alice"), "I was alice.\n")
        make_database(self.path, "UPDATE people SET text = 'changed'")
        self.assertEqual(self.ask(backend, "alice"), "changed\n")
        os.remove(self.path)
        self.assert_fails("unable to open", self.ask, backend, "alice")
        self.assertFalse(os.path.exists(self.path))     # nor made

    def test_gives_the_words_of_connect_to_another_module(self):
        module, backend = self.make_fake(
            connect="dbname=people port=5432 timeout=-1 host=::1 empty= p1=a'b"
                    " password='1 2' quoted=\"7\"\n  options='-c a=b'",
            list_query="SELECT 'a%'")
        self.assertEqual(self.ask(backend, "alice"), "I am here\n")
        self.assertEqual(self.list(backend), "I am here\n")
        module.connect.assert_called_once_with(**{
            "dbname": "people", "port": 5432, "timeout": -1, "host": "::1",
            "empty": "", "p1": "a'b", "password": "1 2", "quoted": "7",
            "options": "-c a=b"})
        call, expected = mock.call, []
        for words in (("SELECT %s", ["alice"]), ("SELECT 'a%'",)):
            expected += [
                call.cursor(), call.cursor().execute(*words),
                call.cursor().fetchmany(fingerd_backends.MAX_ROWS),
                call.cursor().close(), call.rollback()]
        del backend
        gc.collect()
        self.assertEqual(self.connections[0].mock_calls,
                         [*expected, call.close()])

    def test_has_as_many_connections_as_threads_and_new_ones_for_dead(self):
        def execute(query, parameters):
            hold.wait(HANG)
            if parameters == ["typo"]:
                raise LookupError("there is\na typo")
        hold = threading.Event()
        module, backend = self.make_fake(execute)
        backend.limit_threads(5)
        asked = functools.partial(self.ask, backend, "alice")

        def release():
            wait_until(lambda: len(self.connections) == 5, "connections")
            self.assert_fails("all connections are in use", self.ask, backend,
                              "alice", False, 0.01, kind=TimeoutError)
            hold.set()
        self.assertEqual(in_threads([release] + [asked] * 9),
                         [None] + ["I am here\n"] * 9)
        self.assertEqual(len(self.connections), 5)
        # What fails is tried once again, on a new connection.
        self.assert_fails("LookupError: there is a typo", self.ask, backend,
                          "typo")
        for connection in self.connections:
            connection.cursor.side_effect = OSError
        connect, module.connect.side_effect = (
            module.connect.side_effect, LookupError)
        self.assert_fails("LookupError", asked)
        module.connect.side_effect = connect
        for _ in range(5):
            self.assertEqual(asked(), "I am here\n")
        self.assertEqual([bool(connection.close.called) for connection
                          in self.connections].count(True), 4)
        self.assertEqual(len(self.connections), 7)

    def test_the_server_bounds_it_by_max_threads(self):
        config = read_config("[server]\nbackend = sql\n[limits]\nmax_threads ="
                             " 7\n[sql]\ndatabase = /srv/people.db\n")
        fingerd.Answers(config, fingerd.Log())
        self.assertEqual(config.backends[0][1].places._value, 7)

    def test_refuses_settings_that_cannot_be(self):
        self.enter(mock.patch.dict(
            sys.modules, odd=mock.Mock(paramstyle="odd"),
            fake=mock.Mock(paramstyle="pyformat"),
            unsafe=mock.Mock(threadsafety=0)))
        once = "once; write it where the name goes, and nowhere else"
        place = {"database": "/srv/people.db"}
        fake = {"module": "fake", "query": "SELECT %s"}
        self.assert_refused(SqlBackend, (
            *((options, "database: is for module = sqlite3, which needs it;"
               " write e.g. /srv/people.db, or connect for another module")
              for options in ({}, {**fake, **place})),
            ({**place, "connect": "a=b"},
             "connect: is for other modules; write database"),
            *(({**fake, "connect": text}, "connect: is not made of name=value"
               " words; write e.g. dbname=people password='with spaces'")
              for text in ("people", "a=b secret", "=b", "a='b", "a='b'c",
                           "1=2")),
            *(({**place, "query": text}, f"query: does not have ? {once}")
              for text in ("SELECT 1", "SELECT ?, ?")),
            ({**fake, "query": "SELECT ?"}, f"query: does not have %s {once}"),
            *(({"module": name}, f'module: "{name}" cannot be used ({reason});'
               " install a DB-API 2 module, or write sqlite3")
              for name, reason in (
                ("no_such_module", "No module named 'no_such_module'"),
                ("os", "module 'os' has no attribute 'threadsafety'"),
                ("odd", "'odd'"), ("unsafe", "threads may not use it")))))


# ---- accounts ---------------------------------------------------------------

ALL_ITEMS = " ".join(fingerd_backends.ITEMS)
NOW = int(time.time())
DAY = 86400


class AccountsBackendTest(BackendCase):
    def setUp(self):
        super().setUp()
        os.chmod(self.folder, 0o755)        # for nobody
        self.system = System(self.folder)
        self.enter(mock.patch.object(fingerd_backends, "SAME_TIME", 0))

    def plan(self, backend, user="alice"):
        """Give what is shown as the plan of a user, all else left out."""
        return self.ask(backend, user).split("Name: \n", 1)[1]

    def test_shows_each_item_by_itself(self):
        self.system.add("alice", "Gr\xfc\xdfe & \udcff,Room 1,5551234,x",
                        plan="\u65e5\n", project="Dream\nmore\n",
                        pgpkey="KEY", forward="a@example.org\n")
        self.system.log_in(("alice", "no-tty", "host.example", DAY))
        os.mkdir(os.path.join(self.folder, "mail"))
        home = self.system.entries["alice"].pw_dir
        since = time.strftime("%a %b %e %R (%Z)", time.localtime(DAY))
        table = {
            "home": f"Directory: {home}\n", "shell": "Shell: /bin/sh\n",
            "home shell": f"Directory: {home}\tShell: /bin/sh\n",
            "office": "Office: Room 1\n",
            "phone": "Office Phone: 555-1234\t\t\tHome Phone: x\n",
            "office phone": "Office: Room 1, 555-1234\t\tHome Phone: x\n",
            "login": f"On since {since} on no-tty\n", "from": "", "idle": "",
            "login from": f"On since {since} on no-tty from host.example\n",
            "login idle": f"On since {since} on no-tty (messages off)\n",
            "mail": "No mail.\n", "forward": "Mail forwarded to"
            " a@example.org\n", "project": "Project:\nDream\nmore\n",
            "plan": "Plan:\n\u65e5\n", "pgpkey": "PGP key:\nKEY\n", "": "",
            "plan project pgpkey":      # as is shown by default
                "PGP key:\nKEY\nProject:\nDream\nmore\nPlan:\n\u65e5\n"}
        first = "Login: alice          \t\t\tName: Gr\xfc\xdfe Alice \\xff\n"
        for show, text in table.items():
            with self.subTest(show):
                self.assertEqual(
                    self.ask(self.system.make(self, show=show), "alice"),
                    first + text)
        self.assertEqual(self.ask(self.system.make(self), "ALICE"),
                         first + table["plan project pgpkey"])
        self.assertLess({*fingerd_backends.ITEMS}, {*table})
        self.assertEqual(self.make(AccountsBackend).uids, range(1000, 60000))

    def test_shows_more_to_local_clients(self):
        self.system.add("alice")
        backend = self.system.make(
            self, show="plan", show_local="project shell",
            local=fingerd.KINDS["networks"]("192.0.2.0/24 ::1"))
        for client, local in (("192.0.2.7", True), ("192.0.3.7", False),
                              ("::1", True), ("::2", False)):
            text = backend.lookup("alice", False, client, HANG)
            self.assertEqual(text.split("Name: \n")[1], "Shell: /bin/sh\n"
                             * local + "No Plan.\n", client)

    def make_hidden(self):
        """Make accounts that nobody may see; give names, and options."""
        path = functools.partial(os.path.join, self.folder)
        for name in ("file", "link", "dir", "closed", "gone", "nohome"):
            self.system.add(name, plan="hidden")
        self.system.add("alice", plan="seen")
        self.system.add("system", plan="hidden", uid=os.getuid() + 1)
        write_file(self.folder, "file/.nofinger")
        os.symlink("nowhere", path("link/.nofinger"))
        os.mkdir(path("dir/.nofinger"))
        os.chmod(path("closed"), 0o600)
        self.addCleanup(os.chmod, path("closed"), 0o700)
        shutil.rmtree(path("gone"))
        shutil.rmtree(path("nohome"))
        write_file(self.folder, "nohome", "a file")
        return ["file", "link", "dir", "closed", "gone", "nohome", "system",
                "unknown", "a b", "-l", "../alice"]

    def test_hidden_system_and_unknown_get_the_same_after_the_same_time(self):
        names = self.make_hidden()
        self.system.add("a b", plan="not a name that a query can have")
        backend = self.system.make(self, show=ALL_ITEMS)
        fingerd_backends.SAME_TIME = 0.01       # until the end of the test
        with as_nobody():
            for name in names:
                with self.subTest(name), self.takes(0.01):
                    self.assertIsNone(self.ask(backend, name))
            fingerd_backends.SAME_TIME = HANG
            with self.takes(0.01):
                self.assertIn("seen", self.ask(backend, "alice"))
                self.assertIsNone(self.ask(backend, "unknown", False, 0.01))

    def test_believes_no_file_but_a_regular_one_of_the_user(self):
        path = functools.partial(os.path.join, self.folder)
        secret, other = write_file(self.folder, "secret"), os.getuid() + 1
        for name in ("none", "fifo", "link"):
            self.system.add(name)
        self.system.add("eve", uid=other)
        os.mkfifo(path("fifo/.plan"))
        os.symlink(secret, path("link/.plan"))
        os.link(secret, path("eve/.plan"))      # to another's
        uids = f"{other - 1}-{other}"
        for name in ("none", "fifo", "link", "eve"):
            with self.subTest(name):
                backend = self.system.make(self, uids=uids)
                self.assertEqual(self.plan(backend, name), "No Plan.\n")
                backend = self.system.make(self, uids=uids, opt_in=True)
                self.assertIsNone(self.ask(backend, name))
        self.system.add("alice", plan="")
        self.assertEqual(self.plan(backend), "Plan:\n\n")

    def test_leaves_out_what_the_system_does_not_keep(self):
        self.system.add("alice")
        backend = self.system.make(self, show="login from idle")
        self.assertEqual(self.plan(backend), "")
        write_file(self.folder, "utmp", b"torn")
        self.assertEqual(self.plan(backend), "")
        write_file(self.folder, "lastlog", b"torn")
        self.assertEqual(self.plan(backend), "Never logged in.\n")
        mail = self.system.make(self, show="mail")
        self.assertEqual(self.plan(mail), "No mail.\n")
        path = os.path.join(self.folder, "mail")
        os.mkdir(path, 0)
        self.addCleanup(os.chmod, path, 0o700)
        os.chmod(os.path.join(self.folder, "lastlog"), 0)
        with as_nobody():
            self.assertEqual(self.plan(backend), "")
            self.assertEqual(self.plan(mail), "")

    def test_lists_who_is_logged_in_and_not_hidden(self):
        hidden = self.make_hidden()
        backend = self.system.make(self, show="login plan")
        for logins in ((), [(name, "tty1", "", NOW) for name in hidden]):
            self.system.log_in(*logins)
            with as_nobody():
                for verbose in (False, True):
                    self.assertEqual(self.list(backend, verbose),
                                     "No one logged on.\n")
        self.system.add("bob", "Bob Builder,Room 1")
        self.system.log_in(
            *logins, ("bob", "tty2", "host", NOW), ("alice", "tty1", "", NOW),
            ("", "tty4", "", NOW), ("bob", "tty5", "", NOW, 8),
            ("bob", "tty3", "", DAY))
        with as_nobody():
            table, *texts = self.list(backend), self.list(backend, True)
            self.assertEqual(texts, ["\n".join(
                self.ask(backend, name) for name in ("bob", "alice"))])
        first, *rows = table.splitlines()
        # As rogallo 3.2 knows a list: it is this regular expression's.
        self.assertRegex(first, r"^Login\s+Name\s+Login Time\s*$")
        self.assertEqual(rows, [
            time.strftime(f"{login:14}  {name:24}  %b %e %R",
                          time.localtime(since))
            for login, name, since in (("alice", "", NOW),
                                       ("bob", "Bob Builder", DAY),
                                       ("bob", "Bob Builder", NOW))])
        self.assert_fails("timed out", self.list, backend, True, 0,
                          kind=TimeoutError)

    def test_looks_among_full_names_only_when_told_so(self):
        names = [f"user{number}" for number in range(10)]
        for name in names:
            self.system.add(name, "John Public,Room John")
        self.system.add("john", "J. Doe")
        self.system.add("daemon", "John", uid=os.getuid() + 1)
        self.system.add("ghost", "John Ghost", nofinger="")
        for match, user, found in (
                (False, "john", ["john"]), (False, "public", []),
                (True, "JOHN", ["john", *names[:8]]),
                (True, "Public", names[:8]),
                *((True, name, []) for name in (
                    "joh", "j", "room", "public,", "ghost", "daemon", "&"))):
            with self.subTest(user, match=match):
                backend = self.system.make(self, show="", match_names=match)
                self.assertEqual(
                    re.findall(r"(?:\A|\n\n)Login: (\w+)",
                               self.ask(backend, user) or ""), found)
        backend = self.system.make(self, match_names=True)
        with mock.patch.object(fingerd_backends, "MATCH_TIME", 1e9), \
                mock.patch.object(self.system, "getpwall",
                                  return_value=()) as walk:
            for _ in range(3):
                self.ask(backend, "public")
        walk.assert_called_once_with()

    def test_refuses_settings_that_cannot_be(self):
        items = "cannot be shown; write some of " + ALL_ITEMS
        uids = "is not a range of numbers; write e.g. 1000-59999"
        self.assert_refused(AccountsBackend, (
            ({"show": "plan all"}, f'show: "all" {items}'),
            ({"show": "a b", "show_local": "Plan", "local": "x"},
             f'show: "a" {items}\nshow: "b" {items}\n'
             f'show_local: "Plan" {items}'),
            ({"show_local": "home"},
             "show_local: is for nobody; write local = 127.0.0.0/8 ::1"),
            *(({"uids": text}, f'uids: "{text}" {uids}')
              for text in ("", "1000", "a-b", "1-2-3", "-5", "1-99999999999"))
        ))
        with self.assertRaisesRegex(fingerd.ConfigError, "chroot: hides the"
                                    " accounts; leave one of them out\n"):
            read_config("[server]\nbackend = accounts\n"
                        "[daemon]\nchroot = /tmp\n")


# ---- Aliases ----------------------------------------------------------------

class AliasesTest(ServerCase):
    def test_answers_for_each_name_behind_an_alias(self):
        server = self.serve("""
[server]
user_list = yes
[users]
bob = Bob
carol = Carol
staff = hidden by the alias
moshez = Happy
[aliases]
sales = bob Carol
Staff = sales
    moshez nobody
short = moshez
bob2 = bob bob
eight = bob2 bob2 bob2 bob2
a8 = bob
""" + "".join(f"a{n} = a{n + 1}\n" for n in range(8)))
        staff = ["Bob", "Carol", "Happy", "No such user"]
        for line, replies in {
                "sales": staff[:2], "SALES": staff[:2], "staff": staff,
                "short": ["Happy"], "bob2": ["Bob"] * 2, "bob": ["Bob"],
                "eight": ["Bob"] * 8, "a0": ["Bob"],
                "/W short bob": ["Happy", "Bob"],
                "": ["bob     Bob\r\ncarol   Carol\r\n"
                     "staff   hidden by the alias\r\nmoshez  Happy"],
                "staff Staff": staff * 2,
                "staff staff bob": ["Malformed query"]}.items():
            with self.subTest(line):
                self.assertEqual(
                    server.ask(f"{line}\r\n".encode()).decode(), "\r\n".join(
                        f"{reply}\r\n" for reply in replies))

    def test_every_backend_is_asked_for_the_names(self):
        asked = mock.Mock(side_effect=lambda user, timeout: user)
        server = self.serve("[aliases]\nrota = Alice bob:x\n",
                            ("slow", TestBackend(asked)))
        self.assertEqual(server.ask(b"ROTA\r\n"), b"Alice\r\n\r\nbob:x\r\n")
        self.assertEqual(asked.call_count, 2)
        server.wait_log('q="ROTA" outcome=answered backend=slow')

    def test_refuses_aliases_that_cannot_be(self):
        wrong = "does not stand for 1 to 8 names; write these, without @"
        circle = "is a circle, or too long a chain"
        chain = "".join(f"a{n} = a{n + 1}\n" for n in range(2000))
        table = (
            ("alice = alice bob", f":2: alice: {circle} (alice = alice)"),
            ("A = b\nb = C\nc = a", f":4: c: {circle} (c = a = b = c)"),
            ("x = y\ny = y", f":2: x: {circle} (x = y = y); cut it"),
            ("x =", f":2: x: {wrong}"), ("x = a@b", f":2: x: {wrong}"),
            ("x = 1 2 3 4 5 6 7 8 9", f":2: x: {wrong}"),
            ("x = y y y\ny = 1 2 3", f":2: x: {wrong}"),
            (chain, f":2: a0: {circle} (a0 = a1 = "),
            ("".join(f"a{n} = a{n + 1} a{n + 1}\n" for n in range(99)),
             f":2: a0: {circle} (a0 = a1 = "),
            ("a:b =", f":2: a:b: {wrong}"),
            ("a b = c", ":2: a b: no query can match this name"),
            ("x = y\n[alias]\nx = y", ":3: [alias]: no such section; did you"
             " mean [aliases]?"))
        for text, message in table:
            with self.subTest(text[:40]):
                with self.assertRaises(fingerd.ConfigError) as caught:
                    read_config("[aliases]\n" + text)
                self.assertIn(message, str(caught.exception))


if __name__ == "__main__":
    unittest.main()
