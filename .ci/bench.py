#!/usr/bin/env python3
"""Measure fingerd beside its peers: python3 .ci/bench.py --rounds 5

Each round starts one server after another (odd rounds backwards), each
alone, on a core and a port of its own, and asks it with 16 clients: for one
name, and for many, since one name measures a cache.  The table has the
medians of all rounds.  CPU time is what to compare: queries a second are no
more than the client asks for.  Peers that are not installed are left out.
After the table come figures of fingerd alone: its start, its memory for each
silent client, and how long others wait while clients ask for web pages that
are made to be slow to read; with --long also a million users.  With HAProxy
there are figures of one, two and three daemons behind it.

All on loopback, bounded in number and time.  With cc and Linux the client is
a program in C; else it is in Python, and is the limit itself.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import gzip
import importlib.util
import itertools
import json
import math
import os
import pathlib
import platform
import re
import resource
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Iterable, Iterator, NamedTuple

PROGRAM = pathlib.Path(__file__).resolve().parent.parent / "fingerd.py"

NAMES = 5000        # u0 to u4999 are users of every peer that can hold them
ACCOUNTS = 100      # u0 to u99 are accounts for a backend that waits
TEXT = ("Login: {0}\t\t\tName: Number {0}\r\n"
        "Plan:\r\nDown the rabbit hole.\r\n")

CONFIG = """\
[limits]
max_clients_per_host = 5000
max_threads = {threads}
[log]
{log}
{more}
[users]
{users}
"""

# ---- Peers ----------------------------------------------------------------

PEER_HEAD = f"""\
text = {TEXT!r}
users = {{b"u%d" % n: text.format("u%d" % n).encode() for n in range({NAMES})}}

def reply(user):
    return users.get(user, b"No such user\\r\\n")
"""

# Name, module and text of those in Python: each is run as a program of its
# own, so that none carries the modules of this one in its memory.
PYTHON_PEERS = (
    ("bare loop", "socket", """\
import socket

door = socket.create_server(("127.0.0.1", PORT), backlog=1024)
while True:
    client, _ = door.accept()
    try:
        client.send(reply(client.recv(512).strip()))
    except OSError:
        pass
    client.close()
"""),
    ("uvloop protocol", "uvloop", """\
import asyncio, uvloop

class Finger(asyncio.Protocol):
    data = b""

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.data += data
        if b"\\n" in self.data or len(self.data) > 512:
            self.transport.write(reply(self.data.strip()))
            self.transport.close()

async def serve():
    server = await asyncio.get_running_loop().create_server(
        Finger, "127.0.0.1", PORT, backlog=1024)
    await server.serve_forever()

loop = uvloop.new_event_loop()
asyncio.set_event_loop(loop)
loop.run_until_complete(serve())
"""),
    ("Twisted step 8", "twisted", """\
from twisted.internet import defer, protocol, reactor
from twisted.protocols import basic

class Finger(basic.LineReceiver):
    def lineReceived(self, line):
        found = self.factory.find(line)
        found.addErrback(lambda failure: b"Internal error in server\\r\\n")
        found.addCallback(self.write)

    def write(self, text):
        self.transport.write(text)
        self.transport.loseConnection()

class FingerFactory(protocol.ServerFactory):
    protocol = Finger
    noisy = False

    def find(self, user):
        return defer.succeed(reply(user))

reactor.listenTCP(PORT, FingerFactory(), backlog=1024, interface="127.0.0.1")
reactor.run()
"""),
    ("asyncio streams", "asyncio", """\
import asyncio

async def answer(reader, writer):
    writer.write(reply((await reader.readline()).strip()))
    writer.close()

async def serve():
    server = await asyncio.start_server(
        answer, "127.0.0.1", PORT, backlog=1024)
    await server.serve_forever()

asyncio.run(serve())
"""),
    ("pyfingerd", "pyfingerd", """\
from pyfingerd.core import FingerInterface, FingerUser
from pyfingerd.server import FingerServer

people = {user: [FingerUser(login=user, name="Number " + user,
                            plan="Down the rabbit hole.\\n")]
          for user in map(bytes.decode, users)}

class Users(FingerInterface):
    def search_users(self, query, active):
        return people.get(query, [])

FingerServer("127.0.0.1:PORT", interface=Users()).serve_forever()
"""),
    ("ThreadingTCPServer", "socketserver", """\
import socketserver

class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(reply(self.rfile.readline().strip()))

class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    request_queue_size = 1024       # with its own 5, a burst waits seconds

with Server(("127.0.0.1", PORT), Handler) as server:
    server.serve_forever()
"""),
)

XINETD_CONFIG = """\
service finger-bench
{
    type = UNLISTED
    port = PORT
    bind = 127.0.0.1
    socket_type = stream
    protocol = tcp
    wait = no
    user = nobody
    server = %s
    instances = UNLIMITED
    per_source = UNLIMITED
    cps = 1000000 1
}
"""


class Peer(NamedTuple):
    """A server to measure: how it is started and asked."""

    name: str
    command: list[str]          # PORT in a word becomes the port
    query: str = "u"            # a number comes behind
    names: int = NAMES          # how many numbers; 0: none comes behind
    crowd: bool = True          # can 1,000 clients come at once?


def write_file(folder: str, name: str, text: str) -> str:
    path = os.path.join(folder, name)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    return path


def fingerd_peer(temp: str, name: str, log: str = "level = warning",
                 more: str = "", names: int = NAMES,
                 threads: int = 64) -> Peer:
    texts = (TEXT.format(f"u{n}").rstrip().replace("\r\n", "\n  ")
             for n in range(names))
    users = "\n".join(f"u{n} = {text}" for n, text in enumerate(texts))
    config = write_file(temp, name + ".conf",
                        CONFIG.format(log=log, more=more, users=users,
                                      threads=threads))
    return Peer(name, [sys.executable, str(PROGRAM), "--config", config,
                       "--listen", "127.0.0.1:PORT"], names=names)


def backend_peers(temp: str) -> list[Peer]:
    """Give fingerd with files, and with accounts by itself and by finger(1).

    The accounts are in a passwd file that no other program sees; only root
    can have one.
    """
    def peer(backend: str, setting: str = "", *prefix: str) -> Peer:
        more = f"[server]\nbackend = {backend}\n[{backend}]\n{setting}\n"
        name, command, *_ = fingerd_peer(temp, backend, more=more, names=0)
        return Peer(name, [*prefix, *command], names=ACCOUNTS, crowd=False)

    def write(folder: str, name: str, text: str) -> None:
        os.makedirs(os.path.join(temp, folder), exist_ok=True)
        write_file(temp, os.path.join(folder, name), text)

    passwd = pathlib.Path("/etc/passwd").read_text(encoding="utf-8")
    for user in (f"u{number}" for number in range(ACCOUNTS)):
        write("files", user + ".txt", TEXT.format(user).replace("\r", ""))
        write("home-" + user, ".plan", "Down the rabbit hole.\n")
        passwd += f"{user}:x:0:0:Number {user}:{temp}/home-{user}:/bin/sh\n"
    hidden = ["unshare", "--mount", "sh", "-c",
              'mount --bind "$0" /etc/passwd && exec "$@"',
              write_file(temp, "passwd", passwd)]
    os.chmod(temp, 0o755)       # the server becomes nobody
    peers = [peer("files", f"directory = {temp}/files")]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        subprocess.run([*hidden, "finger", "u0"], check=True,
                       capture_output=True)
        peers += [peer("accounts", "uids = 0-0", *hidden),
                  peer("finger", "", *hidden)]
    return peers


def xinetd_peer(temp: str) -> list[Peer]:
    path = os.environ.get("PATH", "") + ":/usr/sbin"
    xinetd = shutil.which("xinetd", path=path)
    server = shutil.which("in.fingerd", path=path)
    if not xinetd or not server or os.geteuid() != 0:
        return []
    script = ('echo "$1" >"$0" && exec "$2" -dontfork -f "$0"'
              ' -filelog "$0.log" -pidfile "$0.pid"')
    command = ["sh", "-c", script, os.path.join(temp, "xinetd.conf"),
               XINETD_CONFIG % server, xinetd]
    return [Peer("xinetd in.fingerd", command, "root", 0, False)]


def all_peers(temp: str, compiled: bool) -> list[Peer]:
    log = "to = " + os.path.join(temp, "query.log")
    peers = [fingerd_peer(temp, "fingerd"),
             fingerd_peer(temp, "fingerd, query log", log)]
    if compiled:
        peers.append(Peer("C, epoll", [os.path.join(temp, "bench"),
                                       "serve", "PORT"]))
    peers += [Peer(name, [sys.executable, "-c", PEER_HEAD + text],
                   crowd=name != "bare loop")   # one client at a time
              for name, module, text in PYTHON_PEERS
              if importlib.util.find_spec(module)]
    return peers + backend_peers(temp) + xinetd_peer(temp)


# ---- The client -----------------------------------------------------------

# A client, so light that it is not the limit itself, and the limit: a server
# with epoll and a hash.
#   bench serve PORT
#   bench load PORT CLIENTS SECONDS COUNT QUERY NAMES
# Each client asks, reads to the end and asks again, until SECONDS or COUNT
# are over and there is a reply for each: for QUERY, with a number below NAMES
# behind it.  A reply that does not name the user is wrong.
BENCH_C = r"""
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { FDS = 8192, LINE = 512, MOST = 2000000, SLOTS = 4 * NAMES };

static char line[FDS][LINE];
static int have[FDS];
static char *users[SLOTS], *replies[SLOTS];

static struct sockaddr_in loopback(int nth, int port) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port)};
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK + nth);
    return a;
}

static void watch(int poll, int fd) {
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event);
}

static unsigned slot(const char *user) {    /* its own, or a free one */
    unsigned h = 5381;
    for (const char *c = user; *c; c++)
        h = h * 33 ^ (unsigned char)*c;
    while (users[h %= SLOTS] && strcmp(users[h], user))
        h++;
    return h;
}

static int answer(int fd) {     /* 1 when nothing more is to come */
    char *text = line[fd];
    ssize_t n = recv(fd, text + have[fd], LINE - have[fd], 0);
    if (n < 0 && errno == EAGAIN)
        return 0;
    if (n > 0)
        have[fd] += n;
    char *end = memchr(text, '\n', have[fd]);
    if (n > 0 && !end && have[fd] < LINE)
        return 0;
    if (end) {
        *(end > text && end[-1] == '\r' ? end - 1 : end) = 0;
        const char *reply = replies[slot(text)];
        if (!reply)
            reply = "No such user\r\n";
        send(fd, reply, strlen(reply), MSG_NOSIGNAL);
    }
    have[fd] = 0;
    close(fd);
    return 1;
}

static void add_user(int number) {
    char user[16];
    sprintf(user, "u%d", number);
    unsigned h = slot(user);
    users[h] = strdup(user);
    if (asprintf(&replies[h], TEXT, user, user) < 0)
        abort();
}

static int serve(int port) {
    int one = 1, fd, poll = epoll_create1(0);
    int door = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    struct sockaddr_in a = loopback(0, port);
    struct epoll_event events[256];
    for (int i = 0; i < NAMES; i++)
        add_user(i);
    setsockopt(door, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(door, (void *)&a, sizeof a) || listen(door, 1024))
        return 1;
    watch(poll, door);
    for (;;) {
        int n = epoll_wait(poll, events, 256, -1);
        for (int i = 0; i < n; i++) {
            if (events[i].data.fd != door) {
                answer(events[i].data.fd);
                continue;
            }
            while ((fd = accept4(door, 0, 0, SOCK_NONBLOCK)) >= 0)
                if (!answer(fd))
                    watch(poll, fd);
        }
    }
}

static double began[FDS], took[MOST];

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void ask(int poll, int port, const char *query, long names) {
    static long turn;
    int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0), size;
    /* many addresses: a port is not soon used again */
    struct sockaddr_in to = loopback(0, port), from = loopback(turn % 16, 0);
    if (names)      /* 7919 is a prime: every name once, and out of order */
        size = sprintf(line[fd], "Number %s%ld\r\n", query,
                       turn * 7919 % names);
    else
        size = sprintf(line[fd], "Number %s\r\n", query);
    turn++;
    have[fd] = 0;
    began[fd] = now();
    setsockopt(fd, IPPROTO_IP, 24 /* choose the port at connect */, &one,
               sizeof one);
    if (bind(fd, (void *)&from, sizeof from)
            || connect(fd, (void *)&to, sizeof to)
            || send(fd, line[fd] + 7, size - 7, MSG_NOSIGNAL) < 0) {
        perror("load");
        exit(1);
    }
    line[fd][size - 2] = 0;
    watch(poll, fd);
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static int load(char **argv) {
    static char text[65536];
    int port = atoi(argv[0]), clients = atoi(argv[1]), size;
    int poll = epoll_create1(0);
    long done = 0, bad = 0, count = atol(argv[3]), names = atol(argv[5]);
    double start = now(), seconds = atof(argv[2]), end = start;
    struct epoll_event events[256];
    for (int i = 0; i < clients; i++)
        ask(poll, port, argv[4], names);
    while (done < clients
            || (done < count && done < MOST && end < start + seconds)) {
        int n = epoll_wait(poll, events, 256, 100);
        for (int i = 0; i < n && done < MOST; i++) {
            int fd = events[i].data.fd;
            char *user = line[fd] + (names ? 0 : 7);
            while ((size = recv(fd, text, sizeof text, MSG_DONTWAIT)) > 0)
                have[fd] |= memmem(text, size, user, strlen(user)) != 0;
            if (size < 0 && errno == EAGAIN)
                continue;
            bad += size < 0 || !have[fd];
            close(fd);
            took[done++] = now() - began[fd];
            ask(poll, port, argv[4], names);
        }
        end = now();
    }
    qsort(took, done, sizeof *took, by_value);
    printf("[%ld, %ld, %f]\n", done, bad, took[done * 99 / 100] * 1e3);
    return 0;
}

int main(int argc, char **argv) {
    return argc == 3 ? serve(atoi(argv[2])) : argc == 8 ? load(argv + 2) : 2;
}
"""

# The same client for a machine without cc or epoll: there it is the limit,
# and the CPU times are higher, since the server sleeps between queries.
LOAD_PEER = """\
import itertools, json, socket, sys, threading, time

def ask():
    while time.monotonic() < end and len(took) < int(count):
        number = str(next(turn) * 7919 % int(names)) if int(names) else ""
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", int(port))) as client:
            client.sendall((query + number + "\\r\\n").encode())
            with client.makefile("rb") as reply:
                user = "Number " + query + number if number else query
                right.append(user.encode() in reply.read())
        took.append((time.monotonic() - began) * 1e3)

port, clients, seconds, count, query, names = sys.argv[1:]
took, right, turn = [], [], itertools.count()
end = time.monotonic() + float(seconds)
threads = [threading.Thread(target=ask) for _ in range(int(clients))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
took.sort()
print(json.dumps([len(took), right.count(False), took[-len(took) // 100]]))
"""


class Running:
    """A peer while it runs, with a port of its own."""

    def __init__(self, peer: Peer, cores: Iterable[int] = ()) -> None:
        self.peer = peer
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.process = subprocess.Popen(
            [word.replace("PORT", str(self.port)) for word in peer.command],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True)
        if cores:
            os.sched_setaffinity(self.process.pid, cores)

    def __enter__(self) -> Running:
        until = time.monotonic() + 120      # a million users take a while
        while time.monotonic() < until and self.process.poll() is None:
            with contextlib.suppress(OSError), self.ask() as client:
                if client.recv(1):
                    return self
            time.sleep(0.01)
        self.__exit__()
        raise RuntimeError(self.peer.name + " does not answer")

    def __exit__(self, *exception: object) -> None:
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2)
        self.signal(signal.SIGKILL)
        self.process.wait()

    def signal(self, number: int) -> None:
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, number)

    def connect(self, timeout: float = 5) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout)

    def ask(self, timeout: float = 5) -> socket.socket:
        client = self.connect(timeout)
        number = "0" if self.peer.names else ""
        client.sendall(f"{self.peer.query}{number}\r\n".encode())
        return client

    def usage(self) -> tuple[float, float, float]:
        """Give its processes' CPU microseconds, resident MiB, threads."""
        cpu = pages = threads = 0
        for path in glob.glob("/proc/[0-9]*/stat"):
            with contextlib.suppress(OSError), \
                    open(path, encoding="utf-8") as file:
                stat = file.read().rpartition(")")[2].split()
                if int(stat[3]) == self.process.pid:    # the session
                    cpu += sum(map(int, stat[11:15]))
                    threads += int(stat[17])
                    pages += int(stat[21])
        if not threads:         # a system without this /proc
            return math.nan, math.nan, math.nan
        return (cpu * 1e6 / os.sysconf("SC_CLK_TCK"),
                pages * os.sysconf("SC_PAGE_SIZE") / 2**20, threads)


@contextlib.contextmanager
def silent_clients(server: Running,
                   count: int) -> Iterator[list[socket.socket]]:
    """Connect COUNT clients that never finish their line."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.connect())
                   for _ in range(count)]
        with server.ask() as last:      # answered when they all are in
            last.recv(1)
        yield clients


@contextlib.contextmanager
def dripping_clients(server: Running, count: int) -> Iterator[None]:
    """Connect COUNT clients, each of which sends a letter every 2 s."""
    done = threading.Event()

    def drip() -> None:
        for client in itertools.cycle(clients):
            if done.wait(2 / count):
                return
            with contextlib.suppress(OSError):
                client.send(b"a")

    with silent_clients(server, count) as clients:
        thread = threading.Thread(target=drip)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def drain(server: Running, count: int) -> float:
    """Give queries a second, when COUNT clients ask before it wakes up.

    The last one is read first: in a server that keeps the order all are
    answered by then, and the work of reading them does not count.
    """
    with contextlib.ExitStack() as stack:
        server.signal(signal.SIGSTOP)
        try:
            clients = [stack.enter_context(server.ask(0.9))
                       for _ in range(count)]
        finally:
            start = end = time.monotonic()
            server.signal(signal.SIGCONT)
        for client in reversed(clients):
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.recv(4096)
                continue
            client.settimeout(5)
            client.recv(4096)
            end = time.monotonic()
    return count / (end - start)


# ---- Pages that are made to be slow to read -------------------------------

HOSTILE_CONFIG = """\
[server]
backend = users web
[web]
url = http://127.0.0.1:{port}/{{user}}
cache = 0
stale = 0
"""

HTML = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n"
CHUNKED = HTML + b"Transfer-Encoding: chunked\r\n\r\n"
# What comes first, and what comes again and again until so many KiB are sent.
HOSTILE_PAGES = [
    *((HTML + b"\r\n" + first, again, 256) for first, again in (
        (b"<a", b"="), (b"", b"<a "), (b"", b"<"), (b"", b"</"), (b"", b"&#"),
        (b"", b"&amp;"), (b"", b"<!--"), (b"<a b='", b"\"'"), (b"", b"<b>"),
        (b"", b"<script>"), (b"<pre>", b" \n"))),
    (b"", b"HTTP/1.1 100 Continue\r\n\r\n", 16384),
    (HTML, b"X: y\r\n", 16384),
    (CHUNKED, b"1;x=y\r\n \r\n", 16384),
    (CHUNKED + b"0\r\n", b"X: y\r\n", 16384),
    (HTML + b"Content-Encoding: gzip\r\n\r\n", gzip.compress(b""), 16384)]

ORIGIN = f"""\
import http.server

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        first, again, size = {HOSTILE_PAGES!r}[int(self.path[2:])]
        self.wfile.write(first)
        for _ in range(size // 64):
            self.wfile.write(again * (65536 // len(again)))

class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 1024

Server(("127.0.0.1", PORT), Handler).serve_forever()
"""


@contextlib.contextmanager
def hostile_origin() -> Iterator[Running]:
    """Serve these pages; nice, since it shares a core with the client."""
    command = ["nice", "-n", "19", sys.executable, "-c", ORIGIN]
    with Running(Peer("origin", command, "GET /h0 HTTP/1.0\r\n",
                      0)) as origin:
        yield origin


# ---- Measuring ------------------------------------------------------------

def ready_ms(command: list[str]) -> float:
    """Give milliseconds until the program says it is ready, or ends."""
    start = time.monotonic()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL,
                          stderr=subprocess.PIPE) as process:
        assert process.stderr
        while b"ready" not in (process.stderr.readline() or b"ready"):
            pass
        took = time.monotonic() - start
        process.terminate()
    return took * 1e3


FLEETS = {              # what each serves: users, or a program that only waits
    "users": "[server]\n",
    "waiting": """\
[finger]
command = sh -c "sleep 0.1; echo Number $0" {user}
[server]
backend = finger
"""}
HAPROXY_CONFIG = """\
listen finger
    bind 127.0.0.1:${P}
    timeout connect 1s
    timeout client 30s
    timeout server 30s
    option redispatch 1
"""


def haproxy_peer(temp: str, daemons: list[Running]) -> Peer:
    servers = "".join(
        f"    server s{daemon.port} 127.0.0.1:{daemon.port} check"
        " send-proxy-v2\n" for daemon in daemons)
    config = write_file(temp, "haproxy.cfg", HAPROXY_CONFIG + servers)
    return Peer("HAProxy", [
        "sh", "-c", 'P=PORT exec haproxy -db -f "$0"', config])


class Bench:
    """The load generator, the cores, and the figures of all rounds."""

    def __init__(self, temp: str, seconds: float, crowd: int,
                 only: str) -> None:
        self.temp = temp
        self.seconds = seconds
        self.crowd = crowd
        self.wrong = 0          # replies that were not what was expected
        self.figures: dict[tuple[str, str], list[float]] = {}
        self.generator = [sys.executable, "-c", LOAD_PEER]
        compiled = bool(shutil.which("cc")) and hasattr(select, "epoll")
        if compiled:
            self.compile_generator()
        self.peers = [peer for peer in all_peers(temp, compiled)
                      if re.search(only, peer.name)]
        self.server_core: list[int] = []
        self.cores: list[int] = []
        if hasattr(os, "sched_setaffinity"):
            self.cores = sorted(os.sched_getaffinity(0))
            first, *others = self.cores
            if others:
                self.server_core = [first]
                os.sched_setaffinity(0, others)

    def compile_generator(self) -> None:
        source = write_file(self.temp, "bench.c", BENCH_C)
        program = os.path.join(self.temp, "bench")
        text = json.dumps(TEXT.format("%s"))
        subprocess.run(["cc", "-O2", f"-DTEXT={text}", f"-DNAMES={NAMES}",
                        "-o", program, source], check=True)
        self.generator = [program, "load"]

    def note(self, name: str, key: str, value: float) -> None:
        self.figures.setdefault((name, key), []).append(value)

    def show(self, name: str, key: str, digits: int = 1) -> str:
        values = self.figures.get((name, key), [math.nan])
        text = "{:,.{}f}".format(statistics.median(values), digits)
        return text if text != "nan" else "-"

    def load(self, server: Running, names: int, seconds: float = 0,
             count: int = 2000000) -> tuple[float, float]:
        """Ask with 16 clients; give CPU microseconds a query, and p99."""
        before = server.usage()[0]
        done, p99 = self.count_replies(server, names, seconds, count)
        return (server.usage()[0] - before) / done, p99

    def count_replies(self, server: Running, names: int, seconds: float = 0,
                      count: int = 2000000) -> tuple[int, float]:
        """Ask with 16 clients; give the number of replies, and p99."""
        seconds = seconds or self.seconds
        output = subprocess.run(
            [*self.generator, str(server.port), "16", str(seconds),
             str(count), server.peer.query, str(names)],
            stdout=subprocess.PIPE, timeout=seconds + 60, check=True).stdout
        done, wrong, p99 = json.loads(output)
        self.wrong += wrong
        return done, p99

    def measure(self, peer: Peer) -> None:
        """Measure one peer in one round."""
        with Running(peer, self.server_core) as server:
            self.note(peer.name, "idle", server.usage()[1])
            self.load(server, peer.names, self.seconds / 5)
            cpu, p99 = self.load(server, min(peer.names, 1))
            self.note(peer.name, "one", cpu)
            self.note(peer.name, "p99", p99)
            if peer.names:
                self.note(peer.name, "many", self.load(server, peer.names)[0])
            if peer.crowd:
                self.measure_crowd(server)

    def measure_crowd(self, server: Running) -> None:
        """Measure beside a silent crowd, and one that asks at once."""
        name = server.peer.name
        with silent_clients(server, self.crowd):
            self.note(name, "silent", self.load(server, 1)[1])
            _, memory, threads = server.usage()
            self.note(name, "crowd", memory)
            self.note(name, "threads", threads)
        with dripping_clients(server, self.crowd):
            self.note(name, "drip", self.load(server, 1)[1])
        with contextlib.suppress(OSError):      # its backlog is too short
            for _ in range(3):
                self.note(name, "drain", drain(server, self.crowd))

    def measure_all(self, rounds: int) -> None:
        """Measure all peers, backwards in odd rounds: none is always first."""
        for number in range(rounds):
            for peer in self.peers[::-1] if number % 2 else self.peers:
                print(f"round {number + 1} of {rounds}: {peer.name}",
                      file=sys.stderr)
                self.measure(peer)
            for peer, key in itertools.product(self.peers, ("one", "many")):
                fingerd = self.figures.get(("fingerd", key))
                theirs = self.figures.get((peer.name, key))
                if fingerd and theirs:
                    self.note(peer.name, f"share of {key}",
                              fingerd[-1] / theirs[-1])
            for name in ("files", "accounts"):
                mine = self.figures.get((name, "many"))
                finger = self.figures.get(("finger", "many"))
                if mine and finger:
                    self.note(name, "part of finger", mine[-1] / finger[-1])

    def start_times(self, count: int) -> None:
        """Time the start, and that of a Python that does nothing."""
        peer = fingerd_peer(self.temp, "start", "level = notice", names=1)
        command = [word.replace("PORT", "0") for word in peer.command]
        bundle = os.path.join(self.temp, "bundle")
        subprocess.run([*command[:2], "--bundle", bundle], check=True)
        for _ in range(count):
            empty = ready_ms([sys.executable, "-c", "pass"])
            self.note("empty", "ready", empty)
            for name, path in (("script", command[1]), ("bundle", bundle)):
                ready = ready_ms([command[0], path, *command[2:]])
                self.note(name, "ready", ready)
                self.note(name, "ratio", ready / empty)
        with Running(Peer("bundle", [peer.command[0], bundle,
                                     *peer.command[2:]])) as server:
            self.note("bundle", "memory", server.usage()[1])

    def idle_clients(self, count: int) -> None:
        with Running(fingerd_peer(self.temp, "idle")) as server:
            before = server.usage()[1]
            with silent_clients(server, count):
                grown = server.usage()[1] - before
        self.note("silent", "KiB", grown * 1024 / count)

    def hostile_pages(self, rounds: int) -> None:
        """Ask for users, alone and beside 90 that ask for hostile pages."""
        with hostile_origin() as origin, Running(
                fingerd_peer(self.temp, "hostile", more=HOSTILE_CONFIG.format(
                    port=origin.port)), self.server_core) as server:
            self.note("hostile", "alone", self.load(server, NAMES)[1])
            asking = subprocess.Popen(
                [*self.generator, str(server.port), "90", "600", "2000000",
                 "h", str(len(HOSTILE_PAGES))], stdout=subprocess.DEVNULL)
            try:
                for _ in range(rounds):
                    self.note("hostile", "beside",
                              self.load(server, NAMES)[1])
            finally:
                asking.kill()
                asking.wait()

    def measure_fleets(self, rounds: int) -> None:
        """Measure a daemon alone, and one to three behind HAProxy."""
        for _, kind, count in itertools.product(range(rounds), FLEETS,
                                                range(4)):
            print(f"{kind}: {count} daemons behind HAProxy", file=sys.stderr)
            with contextlib.ExitStack() as stack:
                self.measure_fleet(stack, kind, count)

    def measure_fleet(self, stack: contextlib.ExitStack, kind: str,
                      count: int) -> None:
        balanced = "proxy_from = 127.0.0.0/8" if count else ""
        peer = fingerd_peer(self.temp, "fleet", threads=4,
                            more=FLEETS[kind] + balanced)
        daemons = [stack.enter_context(Running(peer, self.cores))
                   for _ in range(count or 1)]
        door = daemons[0]
        if count:
            door = stack.enter_context(Running(
                haproxy_peer(self.temp, daemons), self.cores))
        self.load(door, NAMES, self.seconds / 5)
        before = [server.usage()[0] for server in (door, *daemons)]
        start = time.monotonic()
        done, p99 = self.count_replies(door, NAMES)
        self.note(kind, f"rate {count}", done / (time.monotonic() - start))
        used = [server.usage()[0] - cpu for server, cpu
                in zip((door, *daemons), before)]
        self.note(kind, f"daemon {count}", sum(used[1:]) / done)
        self.note(kind, f"balancer {count}", used[0] / done)
        self.note(kind, f"p99 {count}", p99)

    def many_users(self, count: int) -> None:
        start = time.monotonic()
        with Running(fingerd_peer(self.temp, "users", names=count),
                     self.server_core) as server:
            self.note("users", "start", time.monotonic() - start)
            self.load(server, count, self.seconds)
            self.note("users", "memory", server.usage()[1])
            cpu, _ = self.load(server, count, 600, count)
            self.note("users", "cpu", cpu)
            self.note("users", "after", server.usage()[1])


# ---- Output ---------------------------------------------------------------

COLUMNS = (             # key, title, digits after the point
    ("one", "one", 1), ("share of one", "share", 2), ("many", "many", 1),
    ("share of many", "share", 2), ("p99", "p99", 2), ("silent", "silent", 2),
    ("drip", "drip", 2), ("drain", "drain", 0), ("idle", "idle", 1),
    ("crowd", "crowd", 1), ("threads", "threads", 0))

LEGEND = """
one, many: microseconds of the server's CPU time for a query, all for one
name, or for {names:,} in turn; share: fingerd's cost divided by this
server's.  files, accounts, finger: fingerd with {accounts} users of these
backends, and the programs that it runs.  p99: milliseconds for a client;
silent, drip: the same beside {crowd:,} clients that say nothing, or send a
letter every 2 s.  drain: queries a second when {crowd:,} have asked before.
idle: resident MiB after the start; crowd, threads: MiB and threads with
{crowd:,} silent clients.
"""


def print_peers(bench: Bench, rounds: int) -> None:
    core = ", server on its own core" if bench.server_core else ""
    if bench.generator[0] == sys.executable:
        core += ", no cc: slow client"
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores,"
          f" {platform.machine()}, Python {platform.python_version()},"
          f" medians of {rounds} rounds{core}, load average"
          f" {os.getloadavg()[0]:.1f}\n")
    row = ("{:18}" + "{:>8}" * 4 + "{:>7}" * 3 + "{:>8}{:>6}{:>7}{:>8}").format
    print(row("", *(title for _, title, _ in COLUMNS)))
    for peer in bench.peers:
        print(row(peer.name, *(bench.show(peer.name, key, digits)
                               for key, _, digits in COLUMNS)))
    print(LEGEND.format(names=NAMES, accounts=ACCOUNTS, crowd=bench.crowd))
    print("Of the cost of a query by finger, files has"
          f" {bench.show('files', 'part of finger', 2)} and accounts"
          f" {bench.show('accounts', 'part of finger', 2)}; a tenth is the"
          " limit")


def print_singles(bench: Bench, rounds: int, long: bool) -> None:
    """Measure and print what concerns fingerd alone."""
    show = bench.show
    bench.start_times(3 * rounds)
    print(f"python3 -c pass takes {show('empty', 'ready')} ms; fingerd.py is"
          f" ready in {show('script', 'ready')} ms, {show('script', 'ratio')}"
          f" times that; a bundle in {show('bundle', 'ready')} ms,"
          f" {show('bundle', 'ratio')} times, {show('bundle', 'memory')} MiB")
    bench.idle_clients(3 * bench.crowd)
    print(f"Each of {3 * bench.crowd:,} silent clients:"
          f" {show('silent', 'KiB', 2)} KiB")
    bench.hostile_pages(rounds)
    print("p99 beside 90 clients that ask for hostile pages:"
          f" {show('hostile', 'beside')} ms; alone:"
          f" {show('hostile', 'alone')} ms")
    if long:
        bench.many_users(1000000)
        print(f"With 1,000,000 users: start {show('users', 'start')} s,"
              f" {show('users', 'memory')} MiB, cpu {show('users', 'cpu')};"
              " after a query for each of them:"
              f" {show('users', 'after')} MiB")


def print_fleets(bench: Bench, rounds: int) -> None:
    """Measure and print what more daemons bring, and a balancer costs."""
    bench.measure_fleets(rounds)
    row = "{:32}{:>10}{:>8}{:>10}{:>8}".format
    print("\n" + row("daemons behind HAProxy", "queries/s", "daemon",
                     "balancer", "p99"))
    for kind, count in itertools.product(FLEETS, range(4)):
        name = f"{kind}, {count or 'one without it'}"
        print(row(name, bench.show(kind, f"rate {count}", 0),
                  bench.show(kind, f"daemon {count}"),
                  bench.show(kind, f"balancer {count}") if count else "-",
                  bench.show(kind, f"p99 {count}", 2)))
    print("daemon, balancer: microseconds of CPU time for a query.  waiting:"
          " a program\nthat takes 0.1 s, at most 4 of them at a time in each"
          " daemon.  All share\nthe cores.")


def hold_many_clients() -> None:
    with contextlib.suppress(OSError, ValueError):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Measure fingerd beside its peers.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1,
                        help="of each measurement (default 1)")
    parser.add_argument("--only", default="", metavar="REGEX",
                        help="peers to measure (default all)")
    parser.add_argument("--quick", action="store_true",
                        help="one short round: a try, not a measurement")
    parser.add_argument("--long", action="store_true",
                        help="also a million users")
    options = parser.parse_args()
    crowd = 1000
    if options.quick:
        options.rounds, options.seconds, crowd = 1, 0.2, 100
    hold_many_clients()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), \
            tempfile.TemporaryDirectory() as temp:
        bench = Bench(temp, options.seconds, crowd, options.only)
        bench.measure_all(options.rounds)
        print_peers(bench, options.rounds)
        print_singles(bench, options.rounds, options.long)
        if shutil.which("haproxy"):
            print_fleets(bench, options.rounds)
        print(f"Wrong replies: {bench.wrong}")
        return 1 if bench.wrong else 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
