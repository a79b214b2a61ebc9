#!/usr/bin/env python3
"""fingerd - a finger server (RFC 1288) in one file, with nothing to install.

Run it so, and ask it with any finger client:

    python3 fingerd.py --config fingerd.conf

A client sends one line, `alice CRLF`, gets text back, and the server closes.
The text comes from a backend: the users in the config (here), or finger(1)
or a web page (fingerd_backends.py, needed only when the config names them).

Sections, from the protocol outward to the operating system:

    Query         bytes from the client -> Query
    Reply         text -> bytes for the client, and the fixed replies
    Backends      where texts come from
    Settings      the config file, checked as a whole before anything starts
    Log           one line for each connection
    Site          policy: who is answered, and what
    Server        clients, deadlines and limits in one loop
    Process       listening sockets, signals, the order of the start
    Command line  options and exit statuses
"""

from __future__ import annotations

import collections
import contextlib
import errno
import fcntl
import functools
import getopt
import grp
import io
import math
import os
import pwd
import re
import resource
import select
import selectors
import signal
import socket
import socketserver
import stat
import struct
import sys
import threading
import time
import types
from typing import Any, Callable, Container, Iterable, Iterator, NamedTuple

__version__ = "1.0"

MAX_USERS = 8           # names in one line; each may cost a whole lookup
MAX_HOSTS = 4           # in a chain that is forwarded: it may be a circle
FINGER_PORT = 79        # RFC 1288 2.1; also where a forwarded query goes
DONT_WAIT = int(socket.MSG_DONTWAIT)    # int(): an enum's | costs 2 us
CONFIG_FILES = ("fingerd.conf", "/etc/fingerd.conf")


def reason(error: OSError) -> str:
    """Say what went wrong; the system's words in lower case, no number."""
    text = (error.strerror or "").lower() or str(error) or "no reason given"
    return f"{text}: {error.filename}" if error.filename else text


def format_traceback() -> str:
    """Spell the exception at hand with the way to it, for the log."""
    try:
        import traceback  # slow to load, and hardly ever needed
    except (ImportError, OSError):      # no descriptor left to read it
        return repr(sys.exc_info()[1])
    return traceback.format_exc()


# ---- Query ----------------------------------------------------------------

# Telnet commands (RFC 854): subnegotiations, options, others, and one that
# is not complete yet.  IAC IAC is a byte 255 and stays: it is no UTF-8.
TELNET = re.compile(rb"(\xff\xff)|\xff(?:\xfa(?:[^\xff]|\xff[^\xf0])*\xff\xf0"
                    rb"|[\xfb-\xfe].|[^\xfa-\xff])|\xff.*\Z", re.DOTALL)
LINE_END = re.compile(rb"\r?\n|\r\0")   # CR NUL: telnet in character mode
CONTROL = re.compile(rb"[\0-\x08\x0a-\x1f\x7f]|\xc2[\x80-\x9f]")  # not TAB


class MalformedQuery(ValueError):
    """The line is not a query that RFC 1288 or its clients know."""


class Query(NamedTuple):
    """One line, understood: {Q1} of RFC 1288, or {Q2} when there are hosts."""

    users: tuple[str, ...]      # {U}; none asks for the user list
    verbose: bool               # {W}
    hosts: tuple[str, ...]      # {H}, the next hop last


def find_line_end(data: bytes) -> re.Match[bytes] | None:
    """Match the first line end in data, none inside a telnet command."""
    if b"\xff" in data:
        data = TELNET.sub(lambda match: b"." * len(match[0]), data)
    return LINE_END.search(data)


def strip_telnet(data: bytes) -> bytes:
    """Take out the commands that telnet(1) sends among what is typed."""
    return TELNET.sub(rb"\1", data) if b"\xff" in data else data


def strip_line(line: bytes) -> bytes:
    """Take the line end off, and telnet commands out."""
    line = strip_telnet(line)
    return line[:-2] if line.endswith(b"\r\0") else line.rstrip(b"\r\n")


def parse_query(line: bytes, own_names: frozenset[str] = frozenset()) -> Query:
    """Make a Query of a line, with or without its end (RFC 1288 2.3).

    own_names are this host's, in lower case: as the last host of a chain
    they are dropped, since Emacs sends all of user@host to that host.
    Raises MalformedQuery, and nothing else.
    """
    line = strip_line(line)
    if CONTROL.search(line):
        raise MalformedQuery("control character")
    try:
        tokens = [token.decode() for token in line.split()]
    except UnicodeDecodeError:
        raise MalformedQuery("not UTF-8") from None
    names = [token for token in tokens if token not in ("/W", "/w")]
    if len(names) > MAX_USERS:
        raise MalformedQuery("too many names")
    verbose = len(names) < len(tokens)
    if b"@" in line:
        return parse_hosts(names, verbose, own_names)
    return Query(tuple(names), verbose, ())


def parse_hosts(names: list[str], verbose: bool,
                own_names: frozenset[str]) -> Query:
    """Make a Query of names that have an @host among them."""
    users = []
    for name in names:
        user, *hosts = name.split("@")
        if user in ("/W", "/w"):
            raise MalformedQuery("/W is a token of its own")
        while hosts and all(hosts) and (
                hosts[-1].lower().rstrip(".") in own_names):
            hosts.pop()
        if hosts and len(names) > 1:
            hosts = [""]        # {Q2} has one name: refused, as @ alone is
        if hosts:
            return Query((user,) if user else (), verbose, tuple(hosts))
        if user:
            users.append(user)
    return Query(tuple(users), verbose, ())


# ---- Reply ----------------------------------------------------------------

# What a terminal or a line would take for an order: C0 but TAB and LF, DEL,
# C1, line separators, bidirectional overrides, and halves of characters.
UNSAFE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069"
                    "\ud800-\udfff]")
TRUNCATED = b"[truncated]\r\n"


class Reply(NamedTuple):
    """What the client gets and what the log says of it."""

    outcome: str                # a key of FIXED, or one of OUTCOMES
    data: bytes                 # for the wire: UTF-8, CRLF, nothing unsafe
    backend: str = "-"          # the name of the one that answered


# RFC 1288 3.2.1 and 3.2.2 suggest the two texts that end in "denied".
FIXED = {outcome: Reply(outcome, text + b"\r\n") for outcome, text in {
    "unknown": b"No such user",
    "failed": b"Internal error in server",
    "list-denied": b"Finger online user list denied",
    "forward-denied": b"Finger forwarding service denied",
    "malformed": b"Malformed query",
    "too-long": b"Query too long",
    "denied": b"Access denied",
    "timeout": b"Query timed out",
    "silent": b"Query timed out",
    "limited": b"Too many queries, try again later",
}.items()}
OUTCOMES = (*FIXED, "answered", "list", "forwarded", "gone")


def show_unsafe(match: re.Match[str]) -> str:
    """Spell one unsafe character in printable ASCII: ^[, \\x9b, \\u202e."""
    code = ord(match[0])
    if code < 0x20 or code == 0x7f:
        return "^" + chr(code ^ 0x40)
    if 0xdc80 <= code <= 0xdcff:        # a byte that was not UTF-8 (PEP 383)
        code -= 0xdc00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def to_wire(text: str) -> bytes:
    """Make the bytes for a client of any text (RFC 1288 2.2)."""
    text = UNSAFE.sub(show_unsafe, text.replace("\r\n", "\n"))
    if not text.endswith("\n"):
        text += "\n"
    return text.replace("\n", "\r\n").encode()


def join_replies(replies: list[Reply]) -> Reply:
    """Make one reply of those for several names."""
    outcomes = {reply.outcome for reply in replies}
    worst = [outcome for outcome in ("failed", "answered", "unknown")
             if outcome in outcomes]
    names = dict.fromkeys(reply.backend for reply in replies
                          if reply.backend != "-")
    data = b"\r\n".join(reply.data for reply in replies)
    return Reply(worst[0], data, ",".join(names) or "-")


def truncate(data: bytes, limit: int) -> bytes:
    """Cut wire bytes to limit, at a line if one fits, and say so."""
    if len(data) <= limit:
        return data
    room = limit - len(TRUNCATED)
    end = data.rfind(b"\r\n", 0, room)
    if end >= 0:
        return data[:end + 2] + TRUNCATED
    start = data[:max(0, room - 2)].decode("utf-8", "ignore").rstrip("\r")
    return (start.encode() + b"\r\n" if start else b"") + TRUNCATED


# ---- Backends -------------------------------------------------------------

MAX_LISTED = 10_000     # users in one list: more than a reply ever holds


class UsersBackend:
    """Users that stand in the config, each with the text of the reply.

    This is also the interface of a backend.  One instance answers many
    threads at once; it knows nothing of sockets, config files or the log.

    waits         may lookup() block?  If not, it is asked without a thread.
    lasting       does the same question always get the same answer, whoever
                  asks?  Then the server may remember it.
    settings      rows (name, kind of KINDS, default, help), or None where
                  any name may stand in the section.
    options       what stands there, converted; a value that will not do is
                  a ValueError "setting: what is wrong; what to write".
    report(text)  puts a line into the log, from any thread.

    lookup(user, verbose, client, timeout) gives the text for a user (or
    bytes that to_wire has made), None for one it does not know.  It takes
    at most timeout seconds, and raises OSError when its source fails.
    user_list(verbose, client, timeout) gives the text of {C}, None if it
    has none.  client is a numeric address.

    enter_chroot(path), if there is one, gets ready to work where path is /,
    or says with a ValueError, as above, why that cannot be.
    """

    waits = False
    lasting = True
    settings = None

    def __init__(self, options: dict[str, str],
                 report: Callable[[str], None]) -> None:
        self.replies = {name.lower(): to_wire(text)
                        for name, text in options.items()}
        self.list = self.make_list(options)

    @staticmethod
    def make_list(users: dict[str, str]) -> bytes:
        """Give each user a line, with the first line of the text."""
        names = list(users)[:MAX_LISTED]
        width = max(map(len, names), default=0)
        lines = [f"{name:{width}}  {users[name].partition(chr(10))[0]}"
                 for name in names]
        if len(users) > MAX_LISTED:
            lines.append("[truncated]")
        return to_wire("\n".join(lines))

    def lookup(self, user: str, verbose: bool, client: str,
               timeout: float) -> bytes | None:
        return self.replies.get(user.lower())

    def user_list(self, verbose: bool, client: str,
                  timeout: float) -> bytes | None:
        return self.list


BACKENDS: dict[str, Any] = {"users": UsersBackend}


def load_backends() -> dict[str, Any]:
    """Import the other file's backends; give the classes of both by name.

    Raises ValueError when it is not there or of another version.
    """
    try:
        import fingerd_backends
    except ModuleNotFoundError as error:
        if error.name != "fingerd_backends":
            raise
        raise ValueError("needs fingerd_backends.py, which is not beside"
                         " fingerd.py; copy it there too") from None
    if fingerd_backends.__version__ != __version__:
        raise ValueError(
            f"is of no use: fingerd.py is version {__version__}, but"
            f" fingerd_backends.py is {fingerd_backends.__version__};"
            " copy both from one release")
    return {**BACKENDS, **fingerd_backends.BACKENDS}


def find_backend(name: str) -> Any:
    """Give the class for a name as `web` or `web:staff`, or ValueError."""
    kind = name.partition(":")[0]
    if not re.fullmatch(r"[a-z]+(:[A-Za-z0-9_.-]+)?", name):
        raise ValueError("is no name of a backend; write e.g. web or web:2")
    classes = BACKENDS
    if kind not in classes and "did you mean" not in did_you_mean(
            kind, classes):
        classes = load_backends()
    if kind not in classes:
        raise ValueError("is no backend" + did_you_mean(kind, classes))
    return classes[kind]


# ---- Settings -------------------------------------------------------------

class Setting(NamedTuple):
    """One row of the table that feeds parsing, checking and --help."""

    section: str
    name: str
    kind: str                   # a key of KINDS
    default: str                # as it would be written in the file
    help: str
    flags: tuple[str, ...] = ()


class Kind(NamedTuple):
    """How a value is written: convert raises ValueError("is not ...")."""

    convert: Callable[[str], Any]
    example: str


class ConfigError(Exception):
    """What is wrong with the config or the command line, line by line."""


NO_ID = 0xffffffff              # -1, which setuid(2) takes for "leave it"
FACILITIES = (                  # by their numbers: RFC 3164 4.1.1
    "kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news", "uucp",
    "cron", "authpriv", "ftp", "ntp", "audit", "alert", "clock", "local0",
    "local1", "local2", "local3", "local4", "local5", "local6", "local7")
LEVELS = ("debug", "info", "notice", "warning", "error")
INFO = LEVELS.index("info")     # the level of a query's line
LONGEST = 366 * 86400           # seconds; more is a slip of the pen
MOST = 1_000_000_000            # of anything counted


def yes_or_no(text: str) -> bool:
    """Convert a boolean; any other word is an error, not a no."""
    word = text.lower()
    if word in ("yes", "true", "on", "1"):
        return True
    if word in ("no", "false", "off", "0"):
        return False
    raise ValueError("is neither yes nor no")


def period(text: str) -> float:
    """Convert seconds, 0 included."""
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        raise ValueError("is not a number of seconds")
    if float(text) > LONGEST:
        raise ValueError("is more than a year")
    return float(text)


def seconds(text: str) -> float:
    """Convert seconds, at least a millisecond."""
    if period(text) < 0.001:
        raise ValueError("is too short")
    return float(text)


def limit(text: str) -> int:
    """Convert a whole number; 0 is for no limit."""
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) > MOST:
        raise ValueError("is not a whole number up to a milliard")
    return int(text)


def count(text: str) -> int:
    """Convert a whole number from 1 on."""
    if limit(text) == 0:
        raise ValueError("is not at least 1")
    return int(text)


def size(text: str) -> int:
    """Convert bytes, with K and M for 1024 and its square."""
    match = re.fullmatch("([0-9]{1,10})([KkMm]?)", text)
    if not match:
        raise ValueError("is not a size in bytes")
    number = int(match[1]) * {"": 1, "k": 1024, "m": 1 << 20}[match[2].lower()]
    if not 16 <= number <= MOST:        # 16 has room for [truncated]
        raise ValueError("is not between 16 and a milliard bytes")
    return number


def words(text: str) -> tuple[str, ...]:
    """Convert words with spaces or line ends between them."""
    return tuple(text.split())


def hosts(text: str) -> tuple[str, ...]:
    """Convert host names; their case and a last dot do not count."""
    return tuple(word.rstrip(".") for word in words(text.lower()))


def networks(text: str) -> tuple[Any, ...]:
    """Convert networks in CIDR notation; an address is one, too."""
    if not text:
        return ()
    import ipaddress  # only for those who name networks: 2 ms, 1 MiB
    result = []
    for word in words(text):
        try:
            result.append(ipaddress.ip_network(word))
        except ValueError as error:
            raise ValueError(f"is no list of networks ({error})") from None
    return tuple(result)


def split_address(text: str, default_port: str = "") -> tuple[str, int]:
    """Split host:port or [v6]:port; raise ValueError without a port."""
    match = re.fullmatch(r"(\[[\w:.%-]+\]|[^\[\]:]+)(?::([0-9]{1,5}))?", text)
    port = (match[2] or default_port) if match else ""
    if not match or not port or int(port) > 65535:
        raise ValueError("is not host:port or [v6 address]:port")
    return match[1].strip("[]"), int(port)


def addresses(text: str) -> tuple[tuple[str, int], ...]:
    """Convert the addresses to listen on; * is every one there is."""
    if not words(text):
        raise ValueError("names no address")
    return tuple(split_address(word) for word in words(text))


def next_hops(text: str) -> dict[str, int]:
    """Convert the hosts that queries may be forwarded to, with ports."""
    if text.lower() in ("no", "false", "off", "0"):
        return {}
    if not words(text) or text.lower() in ("yes", "true", "on", "1"):
        raise ValueError("is neither no nor a list of hosts")
    return dict(split_address(word, str(FINGER_PORT)) for word in hosts(text))


def backend_names(text: str) -> tuple[str, ...]:
    """Convert the names of backends, each once."""
    names = words(text)
    if not names or len(set(names)) < len(names):
        raise ValueError("does not name one or more backends, each once")
    return names


def one_of(*choices: str) -> Callable[[str], str]:
    """Make a converter that knows these words and no other."""
    def convert(text: str) -> str:
        if text.lower() not in choices:
            raise ValueError(f"is none of {', '.join(choices)}")
        return text.lower()
    return convert


class User(NamedTuple):
    """A user to become; gid is None where passwd(5) does not know it."""

    name: str
    uid: int
    gid: int | None


def user(text: str) -> User | None:
    """Convert a user's name or number; None for an empty text."""
    if not text:
        return None
    number = re.fullmatch("[0-9]{1,10}", text)
    try:
        entry = pwd.getpwuid(int(text)) if number else pwd.getpwnam(text)
    except (KeyError, OverflowError):
        if not number or int(text) >= NO_ID:
            raise ValueError("is no user of this system") from None
        return User(text, int(text), None)
    return User(entry.pw_name, entry.pw_uid, entry.pw_gid)


def group(text: str) -> int | None:
    """Convert a group's name or number to the number; None if empty."""
    if not text:
        return None
    if re.fullmatch("[0-9]{1,10}", text) and int(text) < NO_ID:
        return int(text)
    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        raise ValueError("is no group of this system") from None


def octal(text: str) -> int:
    """Convert a mask for file modes."""
    if not re.fullmatch("0*[0-7]{1,3}", text):
        raise ValueError("is not an octal mask")
    return int(text, 8)


def directory(text: str) -> str:
    """Convert the absolute path of a directory; it may be empty."""
    if text and not os.path.isabs(text):
        raise ValueError("is not an absolute path")
    return path(text)


def syslog_address(text: str) -> str | tuple[str, int]:
    """Convert the path of a socket, or host:port of a syslog server."""
    return text if text.startswith("/") else split_address(text)


def one_word(text: str) -> str:
    """Convert a word that may stand in front of the lines of a log."""
    if not re.fullmatch("[!-~]{1,32}", text):
        raise ValueError("is not a word of up to 32 ASCII characters")
    return text


def path(text: str) -> str:
    """Convert the path of a file; it may be empty."""
    if CONTROL.search(os.fsencode(text)):
        raise ValueError("has a control character in it")
    return text


def log_target(text: str) -> str:
    """Convert where the log goes."""
    if not text:
        raise ValueError("is empty")
    return path(text)


KINDS = {
    "yes/no": Kind(yes_or_no, "yes"),
    "seconds": Kind(seconds, "10"),
    "period": Kind(period, "60"),
    "count": Kind(count, "100"),
    "limit": Kind(limit, "100"),
    "size": Kind(size, "64K"),
    "text": Kind(str, "some text"),
    "words": Kind(words, "one two"),
    "hosts": Kind(hosts, "example.org"),
    "networks": Kind(networks, "192.0.2.0/24 2001:db8::/32"),
    "addresses": Kind(addresses, "localhost:1079"),
    "next hops": Kind(next_hops, "finger.example.org other.example.org:1079"),
    "backends": Kind(backend_names, "users"),
    "log": Kind(log_target, "/var/log/fingerd.log"),
    "facility": Kind(one_of(*FACILITIES), "daemon"),
    "word": Kind(one_word, "fingerd"),
    "syslog": Kind(syslog_address, "/dev/log"),
    "path": Kind(path, "/run/fingerd.pid"),
    "directory": Kind(directory, "/var/empty"),
    "user": Kind(user, "root"),
    "group": Kind(group, "0"),
    "octal": Kind(octal, "027"),
    "format": Kind(one_of("text", "json"), "text"),
    "level": Kind(one_of(*LEVELS), "info"),
}

SETTINGS = (
    Setting("server", "listen", "addresses", "localhost:1079",
            "addresses to answer on: host:port, [v6]:port, *:port",
            ("--listen",)),
    Setting("server", "backend", "backends", "users",
            "who is asked, in order: users, finger, web, web:NAME"),
    Setting("server", "user_list", "yes/no", "no",
            "answer the empty query with a list of users?"),
    Setting("server", "forward", "next hops", "no",
            "hosts that user@host may be forwarded to"),
    Setting("server", "welcome", "text", "",
            "text for the empty query, instead of a list"),
    Setting("server", "header", "text", "", "text above each answer"),
    Setting("server", "footer", "text", "", "text below each answer"),
    Setting("server", "hostname", "hosts", "",
            "names of this host; the system's when empty"),
    Setting("server", "allow", "networks", "",
            "networks that are answered; all when empty"),
    Setting("server", "deny", "networks", "",
            "networks that are not, even if allowed"),
    Setting("limits", "timeout", "seconds", "10",
            "seconds for the query, for the backend, and for the reply"),
    Setting("limits", "max_query", "size", "512", "bytes in a query line"),
    Setting("limits", "max_reply", "size", "64K", "bytes in a reply"),
    Setting("limits", "max_clients", "count", "10000", "clients at a time"),
    Setting("limits", "max_clients_per_host", "count", "100",
            "clients at a time of one address, or IPv6 /64"),
    Setting("limits", "queries_per_minute", "limit", "0",
            "queries of one address; 0 for no limit"),
    Setting("limits", "max_threads", "count", "64",
            "backends' lookups at a time; the rest queue"),
    Setting("daemon", "daemonize", "yes/no", "no",
            "run in the background?"),
    Setting("daemon", "pidfile", "path", "",
            "file for the process number, locked while it runs",
            ("--pidfile",)),
    Setting("daemon", "user", "user", "",
            "user to become when started as root; nobody when empty",
            ("--user", "--uid")),
    Setting("daemon", "group", "group", "",
            "group to become; that of the user when empty",
            ("--group", "--gid")),
    Setting("daemon", "chroot", "directory", "",
            "directory that becomes /; none when empty", ("--chroot",)),
    Setting("daemon", "rundir", "path", "",
            "directory to run in; / in the background or a chroot",
            ("--rundir",)),
    Setting("daemon", "umask", "octal", "027",
            "mask for the modes of files", ("--umask",)),
    Setting("log", "to", "log", "stderr",
            "stderr, syslog, or the path of a file", ("-l", "--logfile")),
    Setting("log", "format", "format", "text", "text or json"),
    Setting("log", "level", "level", "info",
            "least level written: " + ", ".join(LEVELS)),
    Setting("log", "facility", "facility", "daemon", "facility for syslog"),
    Setting("log", "prefix", "word", "fingerd",
            "word before each line on stderr and in syslog", ("--prefix",)),
    Setting("log", "syslog_address", "syslog", "/dev/log",
            "socket of syslog, or host:port for UDP"),
)


class Entry(NamedTuple):
    """A value as it stands in the file."""

    line: int
    name: str
    text: str
    indented: int               # number of its first indented line, or 0


class Section(NamedTuple):
    """A section as it stands in the file, its entries by lower-case name."""

    line: int
    entries: dict[str, Entry]


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Give the end of an error about a word that is none of the choices."""
    import difflib  # costs a start 10 ms, and only errors need it
    names = list(choices)
    close = difflib.get_close_matches(word, names, 1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; there are {', '.join(names)}"


def read_blocks(lines: Iterable[str]) -> Iterator[tuple[int, list[str], int]]:
    """Yield each line at the margin with all below it, up to the next.

    With it come its number and that of its first indented line, or 0.
    Lines that start with # are left out.
    """
    start, indented = 0, 0
    block: list[str] = []
    for number, line in enumerate(map(str.rstrip, lines), 1):
        if line.startswith("#"):
            continue
        if not line or line[0] in " \t":
            indented = indented or (number if line else 0)
            block.append(line)
            continue
        yield start, block, indented
        start, block, indented = number, [line], 0
    yield start, block, indented


def join_lines(first: str, below: list[str]) -> str:
    """Join a value's lines, less the indentation that the first below has."""
    while below and not below[-1]:      # blank lines behind it are no part
        below.pop()
    if not below:
        return first
    top = next(filter(None, below))
    indent = top[:len(top) - len(top.lstrip())]
    below = [line[len(indent):] if line.startswith(indent) else line.lstrip()
             for line in below]
    return "\n".join([first, *below] if first else below)


class ConfigReader:
    """Reads a config file, keeps every error, so that one run tells all.

    Not configparser: it stops at the first error, does not know the line of
    a value, and joins a setting that is indented to the value above it.
    """

    def __init__(self, path: str, report: Callable[[str, str], None],
                 overrides: dict[str, str] | None = None,
                 old: Any = None) -> None:
        """Read what is at path; for a reload, old is what read() gave."""
        self.path = path
        self.report = report        # called with a backend's name and text
        self.overrides = overrides or {}        # by the name of the setting
        self.old = old
        self.texts: dict[tuple[str, str], str] = {}     # section and name
        self.errors: list[tuple[int, str]] = []
        self.sections: dict[str, Section] = {}

    def read(self) -> Any:
        """Give a namespace of sections, each a namespace of its settings.

        It has path, texts (of the settings) and backends (pairs of name and
        object) besides.  Raises ConfigError with all errors in line order,
        and their count.
        """
        self.parse(self.read_text())
        config = types.SimpleNamespace(path=self.path, texts=self.texts)
        for name in dict.fromkeys(row.section for row in SETTINGS):
            rows = [row for row in SETTINGS if row.section == name]
            values = self.convert_section(name, rows)
            setattr(config, name, types.SimpleNamespace(**values))
        config.backends = self.make_backends(
            config.server.backend, "" if self.old else config.daemon.chroot)
        self.raise_errors()
        return config

    def read_text(self) -> io.StringIO:
        """Give the file's lines, however they end."""
        data = b""
        try:
            with open(self.path, "rb") as file:
                data = file.read()
            return io.StringIO(data.decode("utf-8-sig"), None)
        except OSError as error:
            raise ConfigError(f"cannot read the config: {reason(error)};"
                              " name another with --config") from None
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise ConfigError(f"{self.path}:{line}: is not UTF-8; convert the"
                              " file, e.g. with iconv -f latin1 -t utf-8"
                              ) from None

    def raise_errors(self) -> None:
        if not self.errors:
            return
        lines = [f"{self.path}:{line}: {message}" if line else message
                 for line, message in sorted(self.errors)]
        where = "on the command line"
        if max(self.errors)[0]:
            where = f"in {self.path}"
        number = "1 error" if len(lines) == 1 else f"{len(lines)} errors"
        raise ConfigError("\n".join(
            [*lines, f"{number} {where}, not started"]))

    def error(self, line: int, message: str) -> None:
        """Note what is wrong; line 0 is the command line."""
        self.errors.append((line, message))

    # From lines to texts.

    def parse(self, lines: Iterable[str]) -> None:
        """Fill self.sections."""
        section = None
        for start, block, indented in read_blocks(lines):
            if block and block[0].startswith("["):
                section = self.parse_section(start, block[0])
            elif start:
                self.parse_entry(section, start, block, indented)
                continue
            if indented:
                self.error_indented(indented)

    def error_indented(self, line: int, name: str = "") -> None:
        self.error(line, name + "indented line outside a text value; write it"
                                " without spaces in front")

    def parse_section(self, number: int, line: str) -> Section:
        """Open a section; one that will not do is read and forgotten."""
        section = Section(number, {})
        name = line[1:-1].strip()
        if line[-1] != "]" or not name:
            self.error(number, f'"{line}" is no section; write [name]')
        elif name in self.sections:
            section = self.sections[name]
            self.error(number, f"[{name}]: stands on line {section.line}"
                               " already; make them one")
        else:
            self.sections[name] = section
        return section

    def parse_entry(self, section: Section | None, start: int,
                    block: list[str], indented: int) -> None:
        """Put one setting into its section."""
        name, equals, text = block[0].partition("=")
        name = name.rstrip()
        key = name.lower()
        if not equals or not name:
            self.error(start, f'"{block[0]}" is neither a section nor a'
                              " setting; write [section] or name = value")
        elif section is None:
            self.error(start, f"{name}: stands in no section; write"
                              " its [section] above it")
        elif key in section.entries:
            known = section.entries[key]
            self.error(start, f"{name}: stands on line {known.line} already;"
                              " keep one of the two")
        else:
            text = join_lines(text.lstrip(), block[1:])
            section.entries[key] = Entry(start, name, text, indented)

    # From texts to values.

    def convert_section(self, name: str,
                        rows: Iterable[Setting]) -> dict[str, Any]:
        """Give the values of the rows, and complain of any other setting."""
        entries = dict(self.sections[name].entries
                       if name in self.sections else {})
        values = {row.name: self.convert(row, entries.pop(row.name, None))
                  for row in rows}
        for entry in entries.values():
            self.error(entry.line, f"{entry.name}: no such setting of [{name}]"
                       + did_you_mean(entry.name, values))
        return values

    def convert(self, row: Setting, entry: Entry | None) -> Any:
        """Give one value; on error note it, and give the default."""
        value = KINDS[row.kind].convert(row.default)
        text = self.overrides.get(row.name, entry.text if entry
                                  else row.default)
        self.texts[row.section, row.name] = text
        if self.old and row.section == "daemon":    # a user means nothing
            return getattr(self.old.daemon, row.name)   # inside a chroot
        if entry:
            written = entry.text
            if entry.indented and KINDS[row.kind].convert is not str:
                self.error_indented(entry.indented, f"{row.name}: ")
                written = written.partition("\n")[0]
            value = self.convert_text(row, row.name, " = ", written,
                                      entry.line, value)
        if row.name in self.overrides:
            flag = row.flags[-1] if row.flags else "--" + row.name
            value = self.convert_text(row, flag, " ", text, 0, value)
        return value

    def convert_text(self, row: Setting, name: str, equals: str, text: str,
                     line: int, default: Any) -> Any:
        kind = KINDS[row.kind]
        try:
            return kind.convert(text)
        except ValueError as error:
            example = row.default or kind.example
            self.error(line, f'{name}: "{text}" {error};'
                             f" write e.g. {name}{equals}{example}")
            return default

    # From values to backends.

    def make_backends(self, names: tuple[str, ...],
                      chroot: str) -> tuple[Any, ...]:
        """Build the backends, and complain of sections that are of none."""
        made = []
        core = {row.section for row in SETTINGS}
        others = [name for name in self.sections if name not in core]
        for name in dict.fromkeys([*names, *others]):
            try:
                cls = find_backend(name)
            except ValueError as error:
                self.error_backend(name, name in names, error)
                continue
            except ImportError as error:
                if not self.old:
                    raise
                self.error_backend(name, name in names,
                                   f"cannot be loaded any more ({error});"
                                   " restart instead of a reload")
                continue
            options = self.backend_options(name, cls)
            if name in names and options is not None:
                made.append((name, self.make_backend(name, cls, options,
                                                     chroot)))
        return tuple(made)

    def error_backend(self, name: str, wanted: bool, error: Any) -> None:
        """Complain of the backend = line, or of a section that is of none."""
        missing = "which is not beside" in str(error)
        if wanted:
            line = self.sections["server"].entries["backend"].line
            self.error(line, f'backend: "{name}" {error}'
                       + ", or write backend = users" * missing)
            return
        core = [f"[{row}]" for row in dict.fromkeys(
            row.section for row in SETTINGS)]
        guess = did_you_mean(f"[{name}]", core)
        if missing and "did you mean" not in guess:
            guess = f"{error}, or remove the section"
        else:
            guess = "no such section" + guess
        self.error(self.sections[name].line, f"[{name}]: {guess}")

    def backend_options(self, name: str, cls: Any) -> dict[str, Any] | None:
        """Give the values of a backend's section, None if any is wrong."""
        section = self.sections.get(name, Section(0, {}))
        before = len(self.errors)
        if cls.settings is not None:
            rows = [Setting(name, *row) for row in cls.settings]
            options = self.convert_section(name, rows)
        else:
            options = {e.name: e.text for e in section.entries.values()}
            for entry in section.entries.values():
                if re.search("[\0- \x7f-\x9f@]|^/[Ww]$", entry.name):
                    self.error(entry.line, f"{entry.name}: nobody can ask for"
                               " it; write a name without spaces and @")
        return options if len(self.errors) == before else None

    def make_backend(self, name: str, cls: Any, options: Any,
                     chroot: str) -> Any:
        """Build one backend; its ValueError begins with the setting."""
        try:
            backend = cls(options, functools.partial(self.report, name))
            if chroot and hasattr(backend, "enter_chroot"):
                backend.enter_chroot(chroot)
            return backend
        except ValueError as error:
            section = self.sections.get(name, Section(0, {}))
            setting = str(error).partition(":")[0]
            entry = section.entries.get(setting)
            where = "" if section.line else f"{self.path}: [{name}] "
            self.error(entry.line if entry else section.line,
                       f"{where}{error}")


# ---- Log ------------------------------------------------------------------

MAX_SYSLOG = 8192       # bytes of a message; rsyslog takes no more
HEAD = 64               # bytes in front of a line, at most
SHORT = 64              # bytes of a query whose quoted form is remembered
QUOTED = re.compile(r'[^ !#-\[\]-~]')   # what an escape must stand for
PLAIN = re.compile(r'[!#-<>-\[\]-~]*')  # a value that needs no quotes


def quote(text: str) -> str:
    """Put text into quotes as printable ASCII, whatever is in it."""
    return '"' + QUOTED.sub(escape, text) + '"'


def escape(match: re.Match[str]) -> str:
    """Escape one character that would end a value or a line."""
    character = match[0]
    if character in '"\\':
        return "\\" + character
    if "\udc80" <= character <= "\udcff":       # a byte (PEP 383)
        return f"\\x{ord(character) - 0xdc00:02x}"
    return "".join(f"\\x{byte:02x}"
                   for byte in character.encode("utf-8", "surrogatepass"))


@functools.lru_cache(maxsize=256)
def quote_line(line: bytes) -> str:
    """Quote what a client has sent, without its end."""
    return quote(strip_line(line).decode("utf-8", "surrogateescape"))


@functools.lru_cache(maxsize=1)
def utc_time(second: int) -> str:
    """Format a time of the system's clock."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(second))


def format_text(event: str, fields: dict[str, Any]) -> str:
    """Format an event as key=value; a query is always in quotes."""
    words = [event]
    for key, value in fields.items():
        text = str(value)
        plain = key != "q" and PLAIN.fullmatch(text)
        words.append(f"{key}={text if plain else quote(text)}")
    return " ".join(words)


def format_json(event: str, fields: dict[str, Any]) -> str:
    """Format an event as JSON, the time first."""
    import json  # text has no use for it
    return json.dumps({"time": utc_time(int(time.time())), "event": event,
                       **fields})


class LogFile:
    """An open file, pipe or terminal.

    A pipe or terminal that is not full takes PIPE_BUF bytes at once, and a
    longer line would have to wait (pipe(7)).  A file takes any line.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.limit = sys.maxsize        # bytes of a line
        self.pipe_poll: Any = None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            self.limit = select.PIPE_BUF
            self.pipe_poll = select.poll()
            self.pipe_poll.register(fd, select.POLLOUT)

    def write(self, line: bytes) -> None:
        """Write a line without waiting; raise OSError if it is lost."""
        if self.pipe_poll and not self.pipe_poll.poll(0):
            raise BlockingIOError
        if os.write(self.fd, line + b"\n") <= len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        if self.fd != 2:
            with contextlib.suppress(OSError):      # closed all the same
                os.close(self.fd)


class Syslog:
    """A datagram socket to syslog(3) that finds a syslog that has restarted.

    Not so in a chroot, where the path is out of reach, unless the socket
    stays, as that of systemd-journald does, or it is UDP.
    """

    limit = MAX_SYSLOG

    def __init__(self, address: str | tuple[str, int]) -> None:
        """Connect to a path or host; raise OSError if nobody listens."""
        family: int = socket.AF_UNIX
        self.address: Any = address
        if not isinstance(address, str):    # a name is looked up only here
            found = socket.getaddrinfo(*address, type=socket.SOCK_DGRAM)
            family, self.address = found[0][0], found[0][4]
        self.sock = socket.socket(family, socket.SOCK_DGRAM)
        try:
            self.sock.connect(self.address)
        except OSError:
            self.sock.close()
            raise

    def write(self, line: bytes) -> None:
        """Send a line without waiting; raise OSError if it is lost."""
        try:
            self.sock.send(line, DONT_WAIT)
        except OSError:         # it may have restarted
            self.sock.connect(self.address)
            self.sock.send(line, DONT_WAIT)

    def close(self) -> None:
        self.sock.close()


class Log:
    """The log, one event a line, as key=value or JSON.

    Any thread may write; a line is one system call.  Not logging: a line of
    that costs four times as much.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()    # held from a line's format to its end
        self.level = INFO
        self.format = format_text
        self.facility = 0
        self.prefix = "fingerd"
        self.output: LogFile | Syslog = LogFile(2)
        self.lost = 0                   # lines that could not be written

    def open(self, settings: Any,
             owner: tuple[int, int] | None = None) -> None:
        """Use the settings of [log]; raise OSError and change nothing.

        A file is opened again, and gets the owner (uid, gid) if it is new.
        A connection to syslog is kept.
        """
        old = output = self.output
        if settings.to == "stderr":
            output = LogFile(2)
        elif settings.to != "syslog":
            output = LogFile(open_log_file(settings.to, owner))
        elif not isinstance(old, Syslog):
            output = Syslog(settings.syslog_address)
        with self.lock:
            self.output = output
            self.level = LEVELS.index(settings.level)
            self.format = (format_json if settings.format == "json"
                           else format_text)
            self.facility = FACILITIES.index(settings.facility)
            self.prefix = settings.prefix
        if output is not old:
            old.close()

    def close(self) -> None:
        """Close what is open; what comes later goes to stderr."""
        with self.lock:
            old, self.output = self.output, LogFile(2)
        old.close()

    def event(self, level: str, event: str, **fields: Any) -> None:
        """Write a line if its level is wanted, the fields in their order."""
        if LEVELS.index(level) >= self.level:
            with self.lock:
                self.write(level, self.fit(event, fields))

    def query(self, host: str, port: int, line: bytes, reply: Reply,
              sent: int, ms: int) -> None:
        """Write the line of a connection: bytes sent, milliseconds it took."""
        if self.level > INFO:
            return
        if self.format is format_text and len(line) <= SHORT:
            text = (f"query client={host} port={port} q={quote_line(line)}"
                    f" outcome={reply.outcome} backend={reply.backend}"
                    f" bytes={sent} ms={ms}")
            with self.lock:
                self.write("info", text)
            return
        json = self.format is format_json
        q = strip_line(line).decode(
            "utf-8", "backslashreplace" if json else "surrogateescape")
        self.event("info", "query", client=host, port=port, q=q,
                   outcome=reply.outcome, backend=reply.backend, bytes=sent,
                   ms=ms)

    def fit(self, event: str, fields: dict[str, Any]) -> str:
        """Format an event; cut its longest value until the line fits."""
        line = self.format(event, fields)
        limit = self.output.limit - HEAD
        while len(line) > limit and any(fields.values()):
            key = max(fields, key=lambda key: len(str(fields[key])))
            text = str(fields[key])
            fields[key] = text[:len(text) * limit // len(line)]
            line = self.format(event, fields)
        return line

    def write(self, level: str, line: str) -> None:
        """Write a line; before it, how many were lost."""
        try:
            if self.lost:
                lost = self.format("lost", {"lines": self.lost})
                self.output.write(self.add_head("warning", lost))
                self.lost = 0
            self.output.write(self.add_head(level, line))
        except OSError:
            self.lost += 1

    def add_head(self, level: str, line: str) -> bytes:
        """Put time or prefix in front; JSON has the time in it."""
        if isinstance(self.output, Syslog):
            severity = 7 - LEVELS.index(level)      # as syslog(3) counts
            line = (f"<{self.facility * 8 + severity}>"
                    f"{self.prefix}[{os.getpid()}]: {line}")
        elif self.format is format_text and self.output.fd == 2:
            line = f"{self.prefix}: {line}"
        elif self.format is format_text:
            line = f"{utc_time(int(time.time()))} {line}"
        return line.encode("ascii", "backslashreplace")


# ---- Site -----------------------------------------------------------------

MAX_KNOWN = 1024        # replies that are remembered
MAX_KNOWN_SIZE = 4096   # bytes of one of them, with its line


class WouldWait(Exception):
    """A backend that may block is to be asked, and no thread is at hand."""


class BackendFailed(Exception):
    """A backend could not answer; the log has been told why."""


def plain_address(host: str) -> str:
    """Give the numeric address without a scope, IPv4 also where mapped."""
    if ":" not in host:
        return host
    host = host.partition("%")[0]
    return host[7:] if host.startswith("::ffff:") and "." in host else host


@functools.lru_cache(maxsize=4096)
def address_key(host: str) -> str:
    """Give what counts as one address: an IPv4 address, an IPv6 /64."""
    if ":" not in host:
        return host
    return socket.inet_pton(socket.AF_INET6, host)[:8].hex()


class Site:
    """What is answered, and to whom: policy and backends of one config."""

    def __init__(self, config: Any, log: Log) -> None:
        self.config = config
        self.log = log
        self.backends = config.backends
        self.max_query = config.limits.max_query
        self.max_reply = config.limits.max_reply
        self.rate = config.limits.queries_per_minute
        server = config.server
        self.header = to_wire(server.header) if server.header else b""
        self.footer = to_wire(server.footer) if server.footer else b""
        self.names = frozenset({"localhost", *(
            server.hostname or (socket.gethostname().lower(),))})
        self.hops: dict[str, str] = {}      # addresses, for a chroot
        self.own_ports: set[int] = set()    # that we listen on
        self.guarded = bool(server.allow or server.deny)
        self.allows = functools.lru_cache(maxsize=4096)(self.find_access)
        self.lasting = all(getattr(backend, "lasting", False)
                           for _, backend in self.backends)
        self.known: dict[bytes, Reply] = {}     # by the line, with its end

    def find_access(self, host: str) -> bool:
        """May this address ask?  A deny wins over any allow."""
        if not self.guarded:
            return True
        import ipaddress  # networks() has loaded it
        address = ipaddress.ip_address(host)
        server = self.config.server
        if any(address in network for network in server.deny):
            return False
        return not server.allow or any(address in network
                                       for network in server.allow)

    def remember(self, line: bytes, reply: Reply) -> None:
        """Keep a reply that anybody gets for this line until a reload."""
        if self.lasting and reply.outcome != "failed" and (
                line.endswith(b"\n") and b"@" not in line
                and len(line) + len(reply.data) <= MAX_KNOWN_SIZE):
            if len(self.known) >= MAX_KNOWN:
                self.known.clear()
            self.known[line] = reply

    def answer(self, line: bytes, client: str, reached: Callable[[], str],
               deadline: float | None = None) -> Reply | None:
        """Answer a line of this client, in time for deadline (monotonic).

        Without a deadline no backend that waits is asked: where one would
        have to be, the answer is None.  reached() tells the address that
        the client has reached this host by.
        """
        if len(line) > self.max_query and (
                len(strip_line(line)) > self.max_query):
            return FIXED["too-long"]
        try:
            query = parse_query(line)
            if query.hosts:
                address = reached()
                query = parse_query(line, self.names.union(
                    (address, f"[{address}]")))
        except MalformedQuery:
            return FIXED["malformed"]
        try:
            if query.hosts:
                return self.forward(query, deadline)
            if query.users:
                return self.look_up(query, client, deadline)
            return self.list_users(query, client, deadline)
        except WouldWait:
            return None

    # {Q1} with names.

    def look_up(self, query: Query, client: str,
                deadline: float | None) -> Reply:
        """Answer for each name in turn, an empty line between them."""
        if len(query.users) == 1:
            reply = self.look_up_user(query.users[0], query.verbose, client,
                                      deadline)
        else:
            reply = join_replies([
                self.look_up_user(user, query.verbose, client, deadline)
                for user in query.users])
        data = reply.data
        if reply.outcome == "answered":
            data = self.frame(data)
        elif len(query.users) > 1:
            data = truncate(data, self.max_reply)
        return reply if data is reply.data else reply._replace(data=data)

    def look_up_user(self, user: str, verbose: bool, client: str,
                     deadline: float | None) -> Reply:
        """Ask the backends in order until one knows the user."""
        for name, backend in self.backends:
            try:
                data = self.ask(name, backend, backend.lookup, deadline,
                                user, verbose, client)
            except BackendFailed:
                return FIXED["failed"]._replace(backend=name)
            if data is not None:
                return Reply("answered", data, name)
        return FIXED["unknown"]

    def ask(self, name: str, backend: Any, method: Callable[..., Any],
            deadline: float | None, *args: Any) -> bytes | None:
        """Give what a backend says as wire bytes, None if it knows nothing.

        Raises WouldWait, or BackendFailed once the reason is in the log.
        """
        left = 0.0
        if backend.waits:
            if deadline is None:
                raise WouldWait
            left = deadline - time.monotonic()
        try:
            if backend.waits and left <= 0:
                raise TimeoutError("no time was left to ask it")
            answer = method(*args, left)
            if answer is None or isinstance(answer, bytes):
                return answer
            return to_wire(answer[:self.max_reply + 1])
        except OSError as error:
            self.log.event("warning", "failed", backend=name, client=args[-1],
                           reason=reason(error))
        except Exception:
            self.log.event("error", "bug", backend=name, client=args[-1],
                           traceback=format_traceback())
        raise BackendFailed(name)

    def frame(self, data: bytes) -> bytes:
        """Put header and footer around an answer, and cut what is too long."""
        return truncate(self.header + data + self.footer, self.max_reply)

    # {Q1} without a name: the user list.

    def list_users(self, query: Query, client: str,
                   deadline: float | None) -> Reply:
        """Give the welcome text, or the backends' lists, one by one."""
        server = self.config.server
        if server.welcome:
            return Reply("list", self.frame(to_wire(server.welcome)))
        if not server.user_list:
            return FIXED["list-denied"]
        lists = {}
        for name, backend in self.backends:
            method = getattr(backend, "user_list", None)
            if not method:
                continue
            try:
                data = self.ask(name, backend, method, deadline,
                                query.verbose, client)
            except BackendFailed:
                return FIXED["failed"]._replace(backend=name)
            if data is not None:
                lists[name] = data
        if not lists:
            return FIXED["list-denied"]
        return Reply("list", self.frame(b"".join(lists.values())),
                     ",".join(lists))

    # {Q2}: forwarding.

    def forward(self, query: Query, deadline: float | None) -> Reply:
        """Hand the query to its last host, if the config allows that one."""
        *others, host = query.hosts
        host = host.lower().rstrip(".").strip("[]")
        port = self.config.server.forward.get(host)
        if port is None or not all(query.hosts) or (
                len(query.hosts) > MAX_HOSTS):
            return FIXED["forward-denied"]
        if deadline is None:
            raise WouldWait
        line = ("/W " if query.verbose else "") + "@".join(
            ["".join(query.users), *others])
        try:
            answer = fetch_finger((self.hops.get(host, host), port), line,
                                  self.max_reply, deadline, self.own_ports)
        except OSError as error:
            self.log.event("warning", "failed", forward=f"{host}:{port}",
                           reason=reason(error))
            return FIXED["failed"]
        return Reply("forwarded", truncate(to_wire(answer), self.max_reply))


    def resolve_hops(self) -> None:
        """Look the next hops up now: in a chroot names mean nothing."""
        for host, port in self.config.server.forward.items():
            try:
                found = socket.getaddrinfo(host, port,
                                           type=socket.SOCK_STREAM)
            except (OSError, UnicodeError) as error:
                self.log.event("warning", "failed", forward=f"{host}:{port}",
                               reason=str(error))
            else:
                self.hops[host] = str(found[0][4][0])


def connect_before(deadline: float, host: str, port: int) -> socket.socket:
    """Connect to the first address of a host that can be had in time."""
    failure = OSError(f"{host} has no address")
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for tried, (family, kind, protocol, _, address) in enumerate(found):
        sock = socket.socket(family, kind, protocol)
        try:    # a share for each: one that is dead must not starve the next
            sock.settimeout(seconds_left(deadline) / (len(found) - tried))
            sock.connect(address)
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure


def seconds_left(deadline: float) -> float:
    """Give the seconds to a deadline; TimeoutError if there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the next hop took too long")
    return left


def fetch_finger(address: tuple[str, int], line: str, limit: int,
                 deadline: float, own_ports: Container[int]) -> str:
    """Ask another finger server; give what it says, at most limit bytes.

    Raises OSError, TimeoutError at the deadline (monotonic seconds).
    """
    answer = b""
    try:
        sock = connect_before(deadline, *address)
    except UnicodeError:
        raise OSError("is no name of a host") from None
    with sock:
        if (sock.getpeername()[0] == sock.getsockname()[0]
                and address[1] in own_ports):
            raise OSError("the next hop is this server itself")
        sock.sendall(line.encode() + b"\r\n")
        while len(answer) <= limit:
            sock.settimeout(seconds_left(deadline))
            data = sock.recv(65536)
            if not data:
                break
            answer += data
    return answer.decode("utf-8", "backslashreplace")


# ---- Server ---------------------------------------------------------------

BACKLOG = 1024          # connections the kernel holds for us: see listen(2)
ACCEPTS = 256           # in a row, before other clients get their turn
FILLED = 8              # batches with a client for each, before a longer one
GRACE = 0.5             # seconds for a backend to come back from a timeout
PAUSE = 1.0             # seconds without accept when descriptors are out
QUIET = 10.0            # seconds between two lines "full"
LINGER = 0.05           # seconds until we look whether a client has closed
LINGERING = 256         # such clients; with more, the oldest are looked at
GATHER = 0.005          # seconds; who is answered in them is one of a batch
DISCARD = 1 << 18       # bytes read away behind a query; more is a flood
TRACKED = 65536         # addresses whose rate is known; then the oldest go
SEND = DONT_WAIT | int(getattr(socket, "MSG_MORE", 0))    # FIN in one segment
STATES = {      # what a client can wait for, and how the selector helps
    "reading": selectors.EVENT_READ,    # the line
    "queued": 0,                        # a thread
    "asking": 0,                        # the backend, in a thread
    "sending": selectors.EVENT_WRITE,   # room for the reply
    "closing": selectors.EVENT_READ,    # the client's close
}


class Client:
    """One connection.  While all goes at once, it has no state."""

    __slots__ = ("sock", "host", "port", "started", "data", "reply", "rest",
                 "state", "deadline", "lookup_deadline", "discarded")

    def __init__(self, sock: socket.socket, address: tuple[Any, ...]) -> None:
        self.sock = sock
        host = address[0]
        self.host = plain_address(host) if ":" in host else host
        self.port = address[1]
        self.started = time.monotonic()
        self.data = b""                 # what has come of the line
        self.reply: Reply | None = None
        self.rest = b""                 # what of the reply has not gone yet
        self.state = ""                 # a key of STATES
        self.deadline = 0.0
        self.lookup_deadline: float | None = None
        self.discarded = 0

    def reached(self) -> str:
        """Give the address by which the client has reached this host."""
        return plain_address(self.sock.getsockname()[0])


class RateLimit:
    """Token buckets: so many queries a minute from each address."""

    def __init__(self) -> None:
        self.buckets: Any = collections.OrderedDict()

    def exceeded(self, key: str, rate: int, now: float) -> bool:
        """Count a query; is it one too many?"""
        tokens, then = self.buckets.pop(key, (rate, now))
        tokens = min(rate, tokens + (now - then) * rate / 60)
        exceeded = tokens < 1
        self.buckets[key] = (tokens if exceeded else tokens - 1, now)
        if len(self.buckets) > TRACKED:
            self.buckets.popitem(last=False)
        return exceeded


class FingerHandler(socketserver.StreamRequestHandler):
    """One query.  Its line is complete, so both files are in memory."""

    server: FingerServer

    def setup(self) -> None:
        self.rfile = io.BytesIO(self.request.data)
        self.wfile: io.BytesIO = io.BytesIO()
        self.reply: Reply | None = None

    def handle(self) -> None:
        client = self.request
        self.reply = self.server.site.answer(
            self.rfile.readline(), client.host, client.reached,
            client.lookup_deadline)
        if self.reply:
            self.wfile.write(self.reply.data)

    def finish(self) -> None:
        self.server.take_reply(self.request, self.reply,
                               self.wfile.getvalue())


class FingerServer(socketserver.ThreadingTCPServer):
    """Serves clients in one loop; a thread is only for a backend that waits.

    A client passes accept_clients, read_line, process_request, send and
    read_away.  Wherever it would block, it gets a state and a deadline, and
    the loop goes on with others.  All but take_reply runs in the loop.
    """

    daemon_threads = True       # a hung backend does not keep us from ending

    def __init__(self, listeners: list[socket.socket], site: Site,
                 log: Log) -> None:
        """Take over sockets that listen already and do not block."""
        socketserver.BaseServer.__init__(self, ("", 0), FingerHandler)
        self.listeners = listeners
        self.site = site
        site.own_ports = {listener.getsockname()[1] for listener in listeners}
        self.log = log
        self.started = time.monotonic()
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self.clients: dict[str, Any] = {
            state: collections.OrderedDict() for state in STATES}
        self.hosts: dict[str, int] = {}     # clients with a state, by address
        self.rates = RateLimit()
        self.answered: list[Client] = []    # lately; later they are a batch
        self.linger_deadline = 0.0          # of the first of these
        self.lingering: collections.deque[tuple[float, list[Client]]]
        self.lingering = collections.deque()    # batches and deadlines
        self.lingerers = 0
        self.crowd = 0                      # connections
        self.batch = ACCEPTS                # accepts in a row, and how often
        self.filled = 0                     # there was a client for each
        self.lookups = 0                    # threads
        self.answers: collections.deque[tuple[Client, Reply | None, bytes]]
        self.answers = collections.deque()  # from threads
        self.signals: collections.deque[int] = collections.deque()
        self.actions: dict[int, Callable[[], None]] = {}    # else stop()
        self.heartbeat: Callable[[], float] | None = None   # gives seconds
        self.next_beat = 0.0
        self.listening = self.starved = False
        self.full = self.full_told = False
        self.full_logged = -math.inf
        self.paused_until = 0.0
        self.stop_deadline: float | None = None
        self.stopped_by = ""
        self.ended = threading.Event()
        self.selector = selectors.DefaultSelector()
        self.woken, self.waker = socket.socketpair()
        self.woken.setblocking(False)
        self.waker.setblocking(False)       # as set_wakeup_fd wants it
        self.selector.register(self.woken, selectors.EVENT_READ,
                               self.take_wake)

    # The loop.

    def serve_forever(self, poll_interval: float = 0) -> None:
        """Serve until stop(), and then until the clients at hand have left."""
        while self.stop_deadline is None or not self.done(self.stop_deadline):
            now = time.monotonic()
            if self.answered:
                self.let_linger(now)
            self.watch_listeners(now)
            due = self.next_due(now)
            for key, _ in self.selector.select(self.patience(now, due)):
                if isinstance(key.data, Client):
                    self.attempt(self.go_on, key.data)
                else:
                    key.data(key.fileobj)
            if self.answers:
                self.take_answers()
            if self.lingerers > LINGERING:
                self.look_at_lingering(now)
            now = time.monotonic()
            if now >= due or self.stop_deadline:
                self.do_what_is_due(now)
            if self.signals:
                self.act_on_signals()
        for state in ("reading", "queued", "asking", "sending"):
            for client in list(self.clients[state]):    # out of time
                self.leave(client, "gone")
        self.ended.set()

    def serve_one(self, sock: socket.socket) -> None:
        """Serve a connection that is open already, and no other."""
        self.stop_deadline = math.inf
        self.begin(Client(sock, sock.getpeername()))
        self.serve_forever()

    def done(self, deadline: float) -> bool:
        return not self.crowd or time.monotonic() >= deadline

    def next_due(self, now: float) -> float:
        """Give the time when something is to be done unasked."""
        due = self.next_beat if self.heartbeat else math.inf
        if self.lingering:
            due = min(due, self.lingering[0][0])
        elif self.answered:
            due = min(due, self.linger_deadline)
        if self.paused_until > now:
            due = min(due, self.paused_until)
        for clients in self.clients.values():
            if clients:
                due = min(due, next(iter(clients)).deadline)
        if self.stop_deadline is not None:
            due = min(due, self.stop_deadline if self.crowd else now)
        return due

    def patience(self, now: float, due: float) -> float | None:
        """Give the seconds that the selector may wait; None for ever."""
        if due <= now:
            return 0
        # Some systems' selectors take no more than 24 days.
        return None if due == math.inf else min(due - now, 3600)

    def do_what_is_due(self, now: float) -> None:
        self.look_at_lingering(
            now if self.stop_deadline is None else math.inf)
        self.end_overdue(now)
        if self.heartbeat and now >= self.next_beat:
            self.next_beat = now + self.heartbeat()

    def wake(self) -> None:
        """Make the loop look around, from any thread."""
        with contextlib.suppress(OSError):      # full: it will, anyway; or
            self.waker.send(b"\0")              # closed, and nobody waits

    def take_wake(self, woken: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            woken.recv(4096)

    def act_on_signals(self) -> None:
        while self.signals:
            self.actions.get(self.signals.popleft(), self.stop)()

    # From a listening socket to a line.

    def watch_listeners(self, now: float) -> None:
        """Leave new clients in the kernel's queue while there is no room."""
        most = self.site.config.limits.max_clients
        if self.crowd >= most:
            self.look_at_lingering(math.inf)    # most of them have gone
            self.listen(False)                  # then another comes first
        if self.full != (self.crowd >= most):
            self.full = not self.full
            self.log_full(now)
        self.listen(not self.full and now >= self.paused_until)

    def listen(self, wanted: bool) -> None:
        """Have the selector tell of new clients, or not."""
        if wanted == self.listening:
            return
        self.listening = wanted
        if wanted:      # the first is told of first, and may take the room
            self.listeners = self.listeners[1:] + self.listeners[:1]
        for listener in self.listeners:
            if wanted:
                self.selector.register(listener, selectors.EVENT_READ,
                                       self.accept_clients)
            else:
                self.selector.unregister(listener)

    def log_full(self, now: float) -> None:
        """Log that there is no room, or room again, but not all the time."""
        if self.full and now >= self.full_logged + QUIET:
            self.full_logged = now
            self.full_told = True
        if self.full_told:
            self.log.event("warning" if self.full else "notice",
                           "full" if self.full else "room",
                           clients=self.crowd,
                           limit=self.site.config.limits.max_clients)
        self.full_told = self.full_told and self.full

    def accept_clients(self, listener: socket.socket, most: int = 0) -> None:
        """Accept until it would block, or others should have their turn.

        As a rule it stops where lately nobody was left to accept: to try in
        vain costs more than to be told of another.
        """
        room = self.site.config.limits.max_clients - self.crowd
        for number in range(min(room, most or self.batch)):
            try:
                sock, address = listener.accept()
            except BlockingIOError:
                self.starved = False
                self.batch, self.filled = max(1, number), 0
                return
            except OSError as error:
                if self.is_starved(error):
                    return
                continue        # this one has left already: see accept(2)
            client = Client(sock, address)
            try:
                self.begin(client)
            except Exception:
                self.give_up(client)
        self.filled += 1
        if self.filled == FILLED:
            self.batch, self.filled = min(2 * self.batch, ACCEPTS), 0

    def is_starved(self, error: OSError) -> bool:
        """Pause if accept failed for want of descriptors; log that once."""
        if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS,
                               errno.ENOMEM):
            return False
        if not self.starved:
            self.log.event("error", "starved", reason=reason(error),
                           clients=self.crowd)
        self.starved = True
        self.paused_until = time.monotonic() + PAUSE
        return True

    def begin(self, client: Client) -> None:
        """Refuse a client, or read its line, which mostly is there."""
        self.crowd += 1
        site = self.site
        if site.guarded and not site.allows(client.host):
            self.refuse(client, "denied")
        elif self.hosts and self.hosts.get(address_key(client.host), 0) >= (
                site.config.limits.max_clients_per_host):
            self.refuse(client, "limited")
        else:
            self.read_line(client)

    def attempt(self, step: Callable[..., None], client: Client,
                *args: Any) -> None:
        """Take a step for a client; a bug in it costs nobody but that one."""
        try:
            step(client, *args)
        except Exception:
            self.give_up(client)

    def give_up(self, client: Client) -> None:
        """Log the bug that an except clause holds, and drop the client."""
        self.handle_error(client, client.host)
        self.drop(client)

    def go_on(self, client: Client) -> None:
        """Do what a client has waited for."""
        if client.state == "sending":
            self.send(client)
        elif client.state == "closing":
            self.read_away(client)
        else:
            self.read_line(client)

    def read_line(self, client: Client) -> None:
        """Take what has come; with the line end, or the file's, answer."""
        most = self.site.max_query
        try:
            data = client.sock.recv(most + 2, DONT_WAIT)
        except BlockingIOError:
            self.move(client, "reading")
            return
        except OSError:
            self.leave(client, "gone")
            return
        line = client.data = client.data + data if client.data else data
        known = self.site.known.get(line)
        if known:
            client.reply, client.rest = known, known.data
        else:
            end = find_line_end(line)
            if end:
                line = strip_telnet(line[:end.end()])
            elif not line:
                self.leave(client, "silent")
                return
            elif len(line) > most + 1:
                self.refuse(client, "too-long")
                return
            elif data:
                self.move(client, "reading")
                return
            else:
                line = strip_telnet(line)
            client.data = line
        self.process_request(client, client.host)

    # From a line to a reply.

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a client at once, or queue it for a thread."""
        rate = self.site.rate
        if rate and self.rates.exceeded(address_key(request.host), rate,
                                        time.monotonic()):
            self.refuse(request, "limited")
            return
        if not request.reply:
            self.ask_handler(request)
        if request.reply:
            self.send(request)
        else:
            self.move(request, "queued")
            self.start_lookups()

    def ask_handler(self, client: Client) -> None:
        """Have a handler answer, if it can do so at once."""
        try:
            self.finish_request(client, client.host)    # type: ignore
        except Exception:
            self.handle_error(client, client.host)
            client.reply = FIXED["failed"]
            client.rest = client.reply.data
        else:
            if client.reply:
                self.site.remember(client.data, client.reply)

    def start_lookups(self) -> None:
        """Give threads to those that have queued longest."""
        queued = self.clients["queued"]
        while queued and self.lookups < self.site.config.limits.max_threads:
            client = next(iter(queued))
            client.lookup_deadline = client.deadline - GRACE
            try:
                super().process_request(client, client.host)
                self.lookups += 1
                self.move(client, "asking", client.deadline)
            except RuntimeError as error:       # no thread to be had
                if self.lookups:
                    return                      # until one of them ends
                self.log.event("error", "starved", reason=str(error))
                self.attempt(self.refuse, client, "failed")

    def take_reply(self, client: Client, reply: Reply | None,
                   data: bytes) -> None:
        """Take what a handler made; the loop goes on with that of a thread."""
        if client.lookup_deadline is None:
            client.reply, client.rest = reply, data
        else:
            self.answers.append((client, reply, data))
            self.wake()

    def take_answers(self) -> None:
        """Send what threads have brought, unless the client's time is over."""
        while self.answers:
            client, reply, data = self.answers.popleft()
            self.lookups -= 1
            if client.state != "asking":
                continue
            client.reply = reply or FIXED["failed"]
            client.rest = data or client.reply.data
            self.attempt(self.send, client)
        self.start_lookups()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a bug, with the traceback that leads to it."""
        self.log.event("error", "bug", client=client_address,
                       traceback=format_traceback())

    def shutdown_request(self, request: Any) -> None:
        """Do nothing at a thread's end: the loop sends, and closes."""

    def refuse(self, client: Client, outcome: str) -> None:
        """Send one of the fixed replies."""
        client.reply = FIXED[outcome]
        client.rest = client.reply.data
        self.send(client)

    # From a reply to the close.

    def send(self, client: Client) -> None:
        """Send what the client will take; then shut down, and log."""
        rest = client.rest
        try:
            sent = client.sock.send(rest, SEND)
            if sent == len(rest):
                client.sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.leave(client, "gone")
            return
        if sent < len(rest):
            client.rest = rest[sent:]
            self.move(client, "sending")
            return
        client.rest = b""
        self.log_query(client, client.reply or FIXED["failed"])
        if client.state:
            self.move(client, "")
        self.answered.append(client)

    def log_query(self, client: Client, reply: Reply) -> None:
        """Write the one line of a connection."""
        self.outcomes[reply.outcome] += 1
        if self.log.level > INFO:
            return
        line = client.data
        if len(line) > self.site.max_query:
            line = strip_line(line)[:self.site.max_query]
        sent = len(client.reply.data) - len(client.rest) if client.reply else 0
        ms = int((time.monotonic() - client.started) * 1000)
        self.log.query(client.host, client.port, line, reply, sent, ms)

    def let_linger(self, now: float) -> None:
        """Give those who were answered just now a moment to close.

        Most have closed then: to look is cheaper than to be told of each,
        and cheapest at many in a row.
        """
        if not self.linger_deadline:
            self.linger_deadline = now + LINGER
        elif now >= self.linger_deadline - LINGER + GATHER:
            self.end_gathering()

    def end_gathering(self) -> None:
        self.lingering.append((self.linger_deadline, self.answered))
        self.lingerers += len(self.answered)
        self.answered, self.linger_deadline = [], 0.0

    def look_at_lingering(self, now: float) -> None:
        """See whether those whose moment is over have closed."""
        if self.linger_deadline and now >= self.linger_deadline:
            self.end_gathering()
        while self.lingering and (self.lingering[0][0] <= now
                                  or self.lingerers > LINGERING):
            _, clients = self.lingering.popleft()
            self.lingerers -= len(clients)
            for client in clients:
                try:
                    self.read_away(client)
                except Exception:
                    self.give_up(client)

    def read_away(self, client: Client) -> None:
        """Read until the client closes: a close with bytes unread would be
        a reset, and could take the reply from it (RFC 1122 4.2.2.13)."""
        try:
            while client.discarded <= DISCARD:
                data = client.sock.recv(1024, DONT_WAIT)
                if not data:
                    break
                client.discarded += len(data)
        except BlockingIOError:
            # Who was refused a place does not get one to close slowly.
            if client.reply not in (FIXED["denied"], FIXED["limited"]):
                self.move(client, "closing")
                return
        except OSError:
            pass
        self.drop(client)

    def leave(self, client: Client, outcome: str) -> None:
        """Log a client that gets no reply, or no more of it, and drop it."""
        self.log_query(client, Reply(outcome, b""))
        self.drop(client)

    def drop(self, client: Client) -> None:
        if client.state:
            self.move(client, "")
        client.sock.close()
        self.crowd -= 1

    # States, deadlines, the end.

    def move(self, client: Client, state: str, deadline: float = 0) -> None:
        """Let a client wait for another thing, or for nothing."""
        old = client.state
        if old == state:
            return
        if old:
            del self.clients[old][client]
            if STATES[old]:
                self.selector.unregister(client.sock)
        client.state = ""
        if state and self.watch(client, STATES[state]):
            client.state = state
            client.deadline = deadline or self.deadline_of(client, state)
            self.clients[state][client] = None
        if bool(old) != bool(client.state):
            self.count_host(address_key(client.host), -1 if old else 1)

    def watch(self, client: Client, events: int) -> bool:
        """Register a client; close one that the system has no room for."""
        try:
            if events:
                self.selector.register(client.sock, events, client)
        except OSError as error:
            self.log.event("error", "starved", reason=reason(error))
            self.leave(client, "gone")
            return False
        return True

    def count_host(self, key: str, change: int) -> None:
        number = self.hosts.get(key, 0) + change
        if number:
            self.hosts[key] = number
        else:
            del self.hosts[key]

    def deadline_of(self, client: Client, state: str) -> float:
        """Give the end of a client's time in a state: one timeout for each.

        It grows with each call, so the first client of a state is the next.
        """
        timeout = self.site.config.limits.timeout
        if state == "reading":
            return client.started + timeout
        if state == "queued":
            return time.monotonic() + timeout + GRACE
        if state == "closing" and self.stop_deadline is not None:
            return time.monotonic() + GRACE
        return time.monotonic() + timeout

    def end_overdue(self, now: float) -> None:
        """Do what is due to those whose time in a state is over."""
        for state, clients in self.clients.items():
            while clients and next(iter(clients)).deadline <= now:
                self.attempt(self.end_time, next(iter(clients)), state)

    def end_time(self, client: Client, state: str) -> None:
        if state == "reading":
            self.refuse(client, "timeout" if client.data else "silent")
        elif state in ("queued", "asking"):
            self.log.event("warning", "failed", client=client.host,
                           reason=f"no backend answered in time ({state})")
            self.refuse(client, "failed")
        elif state == "sending":
            self.leave(client, "gone")
        else:
            self.drop(client)

    def change_site(self, site: Site) -> None:
        """Serve by another config from now on, also those who are here."""
        site.hops, site.own_ports = self.site.hops, self.site.own_ports
        self.site = site
        longest = time.monotonic() + site.config.limits.timeout + GRACE
        for clients in self.clients.values():
            for client in clients:
                client.deadline = min(client.deadline, longest)
        self.start_lookups()            # it may allow more of them

    def stop(self, reason: str = "shutdown") -> None:
        """Take no new clients; let serve_forever() end with the last one."""
        if self.stop_deadline is not None:
            return
        for listener in self.listeners * (1 + BACKLOG // ACCEPTS):
            self.accept_clients(listener, ACCEPTS)
        now = time.monotonic()
        self.stopped_by = reason
        self.stop_deadline = now + self.site.config.limits.timeout + GRACE
        self.close_listeners()
        for state in ("reading", "closing"):
            for client in self.clients[state]:
                client.deadline = min(client.deadline, now + GRACE)

    def close_listeners(self) -> None:
        for listener in self.listeners:
            if self.listening:
                self.selector.unregister(listener)
            listener.close()
        self.listeners = []

    def shutdown(self) -> None:
        """Stop from another thread, and wait for the end."""
        self.signals.append(signal.SIGTERM)
        self.wake()
        self.ended.wait()

    def server_close(self) -> None:
        """Close every socket there is."""
        self.close_listeners()
        for clients in (*self.clients.values(), self.answered,
                        *(clients for _, clients in self.lingering)):
            for client in clients:
                client.sock.close()
        self.selector.close()
        self.woken.close()
        self.waker.close()


# ---- Sockets --------------------------------------------------------------

SPARE_DESCRIPTORS = 32          # log, listeners, selector, Python's own
LOOKUP_DESCRIPTORS = 7          # a thread's socket, or pipes of its process
LISTEN_HINTS = {
    errno.EACCES: "; start as root, or use a port above 1023",
    errno.EADDRINUSE: "; stop the program that is there, or use another port",
}


class StartError(Exception):
    """Why the daemon cannot start, for the terminal."""


class AbsentAddress(StartError):
    """This system does not have an address, or its family."""


class Listener(socket.socket):
    """A listening socket.  Its accept() is that of socket.socket, less the
    enums that are made there for each client: half the time."""

    def accept(self) -> tuple[Any, Any]:
        fd, address = self._accept()    # type: ignore[attr-defined]
        family = socket.AF_INET if len(address) == 2 else socket.AF_INET6
        return socket.SocketType(family, socket.SOCK_STREAM, 0, fd), address


def address_text(address: tuple[Any, ...]) -> str:
    """Format host and port of a socket's address."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def open_listeners(names: Iterable[tuple[str, int]]) -> list[socket.socket]:
    """Listen on the addresses of all names, or raise StartError."""
    listeners: list[socket.socket] = []
    try:
        for host, port in names:
            listen_on(host, port, listeners)
    except StartError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def listen_on(host: str, port: int, listeners: list[socket.socket]) -> None:
    """Add a listener for each address of a name that has none yet.

    Absent addresses are skipped, as long as there is another.
    """
    absent: AbsentAddress | None = None
    present = False
    for family, (name, _, *scope) in find_addresses(host, port):
        address = (name, port, *scope)
        if address not in [each.getsockname() for each in listeners]:
            try:
                listeners.append(open_listener(family, address))
            except AbsentAddress as error:
                absent = error
                continue
            port = listeners[-1].getsockname()[1]   # one port for all
        present = True
    if absent and not present:
        raise absent


def find_addresses(host: str, port: int) -> list[tuple[int, Any]]:
    """Give the families and addresses of a host; of all for *."""
    try:
        infos = socket.getaddrinfo(None if host == "*" else host, port,
                                   type=socket.SOCK_STREAM,
                                   flags=socket.AI_PASSIVE)
    except UnicodeError:
        why = "not a host name"
    except OSError as error:
        why = reason(error)
    else:
        return [(info[0], info[4]) for info in infos]
    raise StartError(f"cannot listen on {address_text((host, port))}: {why}")


def open_listener(family: int, address: tuple[Any, ...]) -> Listener:
    """Open one listening socket that does not block."""
    try:
        sock = socket.create_server(address, family=family, backlog=BACKLOG)
    except OSError as error:
        number = error.errno or 0       # its text names the address again
        absent = number in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
        raise (AbsentAddress if absent else StartError)(
            f"cannot listen on {address_text(address)}:"
            f" {os.strerror(number).lower()}"
            + LISTEN_HINTS.get(number, "")) from None
    listener = Listener(fileno=sock.detach())
    listener.setblocking(False)
    return listener


def passed_listeners() -> list[socket.socket]:
    """Take the sockets that systemd has opened (sd_listen_fds(3))."""
    pid = os.environ.pop("LISTEN_PID", "")
    number = os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not re.fullmatch("[0-9]{1,4}", number):
        return []
    return [passed_listener(fd) for fd in range(3, 3 + int(number))]


def passed_listener(fd: int) -> Listener:
    try:
        listener = Listener(fileno=fd)
        listening = listener.getsockopt(socket.SOL_SOCKET,
                                        socket.SO_ACCEPTCONN)
    except OSError as error:
        raise StartError(f"LISTEN_FDS: descriptor {fd} is not a socket:"
                         f" {reason(error)}") from None
    if not listening or listener.family not in (socket.AF_INET,
                                                socket.AF_INET6):
        listener.close()
        raise StartError(f"LISTEN_FDS: descriptor {fd} is not a listening"
                         " TCP socket; write ListenStream=79")
    listener.set_inheritable(False)
    listener.setblocking(False)
    return listener


def fit_max_clients(config: Any, log: Log) -> None:
    """Raise the limit of descriptors, and keep clients and threads in it."""
    limits = config.limits
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    clients = soft - SPARE_DESCRIPTORS
    threads = limits.max_threads
    if config.server.forward or any(
            backend.waits for _, backend in config.backends):
        threads = min(threads, max(1, clients // 2 // LOOKUP_DESCRIPTORS))
        clients -= LOOKUP_DESCRIPTORS * threads
    for name, most in (("max_threads", threads),
                       ("max_clients", max(1, clients))):
        configured = getattr(limits, name)
        if most < configured:
            setattr(limits, name, most)
            log.event("notice", "limits", **{name: most}, descriptors=soft,
                      configured=configured)


# ---- Pidfile --------------------------------------------------------------

PIDFILE_FLAGS = os.O_CLOEXEC | os.O_NOCTTY | os.O_NOFOLLOW | os.O_NONBLOCK
PIDFILE_WAIT = 5.0              # seconds for one that starts to have a pid


def is_plain(info: os.stat_result) -> bool:
    """Is it a regular file, and has no other name?"""
    return stat.S_ISREG(info.st_mode) and info.st_nlink < 2


class Pidfile:
    """A file with the number of the process, locked while the daemon runs.

    A start locks it with flock(2), which survives its forks, so that there
    is only one.  The daemon locks it with lockf(3), too: the system knows the
    process that has done so.  The number alone is not believed, for a crash
    leaves it behind, and another user may have written it.
    """

    def __init__(self, path: str) -> None:
        """Lock the file, created if need be; StartError if another has it."""
        self.path = path
        until = time.monotonic() + PIDFILE_WAIT
        try:
            while not self.lock():
                pid, _ = find_daemon(path)
                if pid or time.monotonic() > until:
                    raise StartError("already running, pid"
                                     f" {pid or 'not known yet'} ({path} is"
                                     " locked)")
                time.sleep(0.01)
        except OSError as error:
            raise StartError("cannot lock the pidfile:"
                             f" {reason(error)}") from None

    def lock(self) -> bool:
        """Try once."""
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | PIDFILE_FLAGS,
                          0o600)        # anybody can lock what is readable
        try:
            read_pidfile(self.fd, self.path)
            if os.fstat(self.fd).st_uid not in (0, os.geteuid()):
                raise StartError(f"{self.path} belongs to another user;"
                                 " remove it, or name another pidfile")
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A daemon that ended since the open may have removed the file.
            if os.path.samestat(os.fstat(self.fd), os.stat(self.path)):
                os.ftruncate(self.fd, 0)    # of a number that is not ours
                return True
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(self.fd)
        return False

    def write(self) -> None:
        """Lock the file as this process, and write its number.

        Never open the file after this: its close would end the lock.
        """
        try:
            fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.pwrite(self.fd, b"%d\n" % os.getpid(), 0)
        except OSError as error:
            raise StartError("cannot write the pidfile:"
                             f" {reason(error)}") from None

    def remove(self) -> None:
        """Empty the file, remove it if we may, and end the locks."""
        with contextlib.suppress(OSError):      # it may be outside a chroot
            os.ftruncate(self.fd, 0)
            if os.path.samestat(os.fstat(self.fd), os.stat(self.path)):
                os.unlink(self.path)
        os.close(self.fd)


def read_pidfile(fd: int, path: str) -> int:
    """Give the number in a pidfile, or 0; StartError if it is not one."""
    if not is_plain(os.fstat(fd)):
        raise StartError(f"{path} is not a regular file with one name; name"
                         " another pidfile")
    text = os.pread(fd, 20, 0)
    if not re.fullmatch(b"([0-9]{1,10}\n?)?", text):
        raise StartError(f"{path} has other text than a process number; name"
                         " another pidfile")
    return int(text or 0)


def find_daemon(path: str) -> tuple[int, int]:
    """Give the pid of the daemon that has a pidfile, and the number in it.

    Each may be 0.  Raises StartError if the pid is unknown, or may be forged.
    """
    try:
        fd = os.open(path, os.O_RDONLY | PIDFILE_FLAGS)
    except FileNotFoundError:
        return 0, 0
    except OSError as error:
        raise StartError(f"cannot read the pidfile: {reason(error)}"
                         ) from None
    try:
        number = read_pidfile(fd, path)
        holder = lock_holder(fd)
        owner = os.fstat(fd).st_uid
    except OSError as error:
        raise StartError(f"cannot tell who has locked {path}:"
                         f" {reason(error)}") from None
    finally:
        os.close(fd)
    if holder and number not in (0, holder):
        raise StartError(f"{path} names pid {number}, but is locked by pid"
                         f" {holder}; not believed")
    owners = (0, os.geteuid(), *(process_ids(holder) or ())[:1])
    if holder and owner not in owners:
        raise StartError(f"{path} does not belong to the user of pid {holder},"
                         " which has locked it; not believed")
    return holder, number


def lock_holder(fd: int) -> int:
    """Give the pid of the process that has a file's lockf, 0 for none.

    Raises OSError if that process cannot be seen.  See fcntl(2), F_GETLK.
    """
    def ask(layout: str, *lock: int) -> tuple[int, ...]:
        return struct.unpack(layout, fcntl.fcntl(
            fd, fcntl.F_GETLK, struct.pack(layout, *lock)))

    if sys.platform == "linux":
        kind, _, _, _, pid = ask("hhqqi0q", fcntl.F_WRLCK, 0, 0, 0, 0)
    else:               # the BSDs and macOS; not all have the last number
        _, _, pid, kind, _, _ = ask("qqihhi", 0, 0, 0, fcntl.F_WRLCK, 0, 0)
    if kind == fcntl.F_UNLCK:
        return 0
    if pid <= 0:
        raise OSError("a process of another namespace")
    return pid


def process_ids(pid: int) -> tuple[int, int] | None:
    """Give uid and gid of a process; None where the system does not say."""
    try:
        info = os.stat(f"/proc/{pid}")
    except OSError:
        return None
    return info.st_uid, info.st_gid


# ---- Privileges -----------------------------------------------------------

LOG_FLAGS = (os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY
             | os.O_NOFOLLOW | os.O_NONBLOCK)   # waits for no pipe's reader


def choose_ids(daemon: Any) -> tuple[str, int, int] | None:
    """Choose the name, uid and gid to become; None to stay who we are."""
    if os.geteuid() != 0:
        if daemon.chroot or (
                daemon.user and daemon.user.uid != os.geteuid()) or (
                daemon.group is not None and daemon.group != os.getegid()):
            raise StartError("only root can change the user, the group or the"
                             " root directory; start as root, or remove user,"
                             " group and chroot")
        return None
    try:
        chosen: Any = daemon.user or user("nobody")
        gid = chosen.gid if daemon.group is None else daemon.group
        if gid is None:
            gid = pwd.getpwnam("nobody").pw_gid
    except (KeyError, ValueError):
        raise StartError('there is no user "nobody"; write user = NAME and'
                         " group = NAME, or user = root") from None
    return chosen.name, chosen.uid, gid


def lost_log(config: Any) -> str:
    """Say that there will be no log, or ""."""
    if config.log.to == "stderr" and config.daemon.daemonize:
        return ("the log will be lost: it goes to stderr, and there is none in"
                " the background; write to = syslog, or a file")
    return ""


def unreadable_config(config: Any, ids: Any = None) -> str:
    """Say why a reload could not read the config, or "".

    It goes by owners and modes, for the uid and gid of the daemon: ids, or
    those that it is going to have.
    """
    if not ids:
        with contextlib.suppress(StartError):
            ids = (choose_ids(config.daemon) or ("",))[1:]
    if not ids:         # it keeps ours, and we have read it
        return ""
    path = os.path.abspath(config.path)
    root = os.path.normpath(config.daemon.chroot or "/")
    cannot = f"a reload cannot read {path}:"
    if not path.startswith(os.path.join(root, "")):
        return f"{cannot} it is outside the chroot {root}; move it there"
    wanted = stat.S_IROTH
    while may(os.stat(path), ids, wanted):
        if path == root:
            return ""
        path, wanted = os.path.dirname(path), stat.S_IXOTH
    return f"{cannot} uid {ids[0]} may not open {path}; change its mode"


def may(info: os.stat_result, ids: tuple[int, int], wanted: int) -> bool:
    """Do owner and mode of a file allow this (S_IROTH or S_IXOTH)?"""
    uid, gid = ids
    shift = 6 if info.st_uid == uid else 3 if info.st_gid == gid else 0
    return uid == 0 or bool(info.st_mode >> shift & wanted)


def drop_privileges(name: str, uid: int, gid: int) -> None:
    """Become a user, without a way back; StartError if there is one."""
    try:
        os.setgroups([gid])
        os.setgid(gid)
        os.setuid(uid)      # real, effective and saved: we are root
    except OSError as error:
        raise StartError(f"cannot become {name}: {reason(error)}") from None
    if uid == 0:
        return
    for regain in (os.setuid, os.seteuid):
        with contextlib.suppress(PermissionError):
            regain(0)
            raise StartError("root privileges can be regained")
    if os.getgroups() != [gid] or os.getgid() != gid:
        raise StartError("groups of root remain")
    forbid_new_privileges()


def forbid_new_privileges() -> None:
    """Make set-user-id programs powerless (Linux: prctl(2))."""
    if sys.platform == "linux":
        with contextlib.suppress(ImportError):  # some Pythons are without
            import ctypes
            ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)     # PR_SET_NO_NEW_PRIVS


def load_late_imports() -> None:
    """Import now what cannot be read after chroot or the drop."""
    import difflib  # noqa: F401
    import encodings.idna  # noqa: F401
    import ipaddress  # noqa: F401
    import json  # noqa: F401
    try:
        raise ValueError
    except ValueError:
        format_traceback()      # has imports of its own
    with contextlib.suppress(ImportError, OSError):
        import ctypes  # glibc ends threads with this, and aborts without
        ctypes.CDLL("libgcc_s.so.1")


def open_log_file(path: str, owner: tuple[int, int] | None) -> int:
    """Open a file or pipe to append to; create a file for its owner.

    Clients choose a part of what is written: no user of this system may lead
    root to write it into another file.
    """
    owners = {0, os.geteuid(), *(owner or ())[:1]}
    if os.geteuid() == 0:
        check_directories(os.path.dirname(path), owners)
    try:
        fd = os.open(path, LOG_FLAGS | os.O_CREAT | os.O_EXCL, 0o640)
    except FileExistsError:
        return open_existing_log(path, owners)
    if owner:
        os.fchown(fd, *owner)
    return fd


def open_existing_log(path: str, owners: Container[int]) -> int:
    """Open a log that belongs to one of these users."""
    try:
        fd = os.open(path, LOG_FLAGS)
        info = os.fstat(fd)
        if path == os.devnull or info.st_uid in owners and (
                is_plain(info) or stat.S_ISFIFO(info.st_mode)):
            return fd
        os.close(fd)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK):      # a symlink
            raise
    raise OSError(f"{path} is a link, a device or another user's; name"
                  " another file, or write to = stderr")


def check_directories(last: str, owners: Container[int]) -> None:
    """Refuse a directory that others could replace by a symlink."""
    path = last
    while True:
        info = os.lstat(path)
        link = stat.S_ISLNK(info.st_mode)
        writable = not link and info.st_mode & stat.S_IWOTH and (
            not info.st_mode & stat.S_ISVTX)
        if (link or path != last) and (writable or info.st_uid not in owners):
            raise OSError(f"others can change {path}; name another file")
        if path == os.path.dirname(path):
            return
        path = os.path.dirname(path)


# ---- Process --------------------------------------------------------------

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
TURN = 0.0002                   # seconds the loop waits for a busy thread


def daemonize() -> int:
    """Continue in the background, in a session of its own (daemon(7)).

    Only the daemon returns, with a descriptor: a byte written to it ends the
    launching command with status 0, its close without one with status 1.
    """
    launcher, ready = os.pipe()
    if os.fork():
        os.close(ready)
        os._exit(0 if os.read(launcher, 1) else 1)
    os.close(launcher)
    os.setsid()
    if os.fork():       # the leader of a session could get a terminal again
        os._exit(0)
    return ready


def release_launcher(launcher: int, null: int) -> None:
    """End the launching command with status 0; leave its terminal."""
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.write(launcher, b"\0")
    os.close(launcher)


def open_terminal() -> int | None:
    """Open the terminal; None if there is none, or its end is ignored."""
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        return None
    try:
        return os.open("/dev/tty", os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError:
        return None


class Notifier(contextlib.AbstractContextManager):
    """Reports to systemd (sd_notify(3)); without one it does nothing."""

    def __init__(self) -> None:
        """Connect now: in a chroot the path is out of reach."""
        path = os.environ.pop("NOTIFY_SOCKET", "")
        period = os.environ.pop("WATCHDOG_USEC", "")
        pid = os.environ.pop("WATCHDOG_PID", str(os.getpid()))
        self.sock: socket.socket | None = None
        self.period = 0.0       # seconds between signs of life; 0 for none
        if not path:
            return
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self.sock.connect("\0" + path[1:] if path[0] == "@" else path)
        except OSError as error:
            self.sock.close()
            raise StartError("cannot reach NOTIFY_SOCKET:"
                             f" {reason(error)}") from None
        if re.fullmatch("[0-9]{1,15}", period) and pid == str(os.getpid()):
            self.period = int(period) / 2e6

    def send(self, *lines: str) -> None:
        if self.sock:
            with contextlib.suppress(OSError):
                self.sock.send("\n".join(lines).encode(), DONT_WAIT)

    def send_sign_of_life(self) -> float:
        """Send it, and give the seconds until the next is due."""
        self.send("WATCHDOG=1")
        return self.period

    def __exit__(self, *exception: object) -> None:
        if self.sock:
            self.sock.close()


class Daemon:
    """The process: how it starts, what signals do, how it ends."""

    def __init__(self, config: Any, log: Log,
                 reader: Callable[..., ConfigReader]) -> None:
        self.config = config
        self.log = log
        self.reader = reader            # of the config
        self.directory = os.getcwd()    # where relative paths start
        self.root = ""                  # the chroot that we are in
        self.ids: tuple[str, int, int] | None = None    # that we become
        self.terminal: int | None = None
        self.notifier: Notifier
        self.server: FingerServer

    def start_and_serve(self) -> None:
        """Start, serve until a signal, end.  Raises StartError.

        All that can fail does so before the launching command returns, most
        of it before the fork.
        """
        daemon = self.config.daemon
        os.umask(daemon.umask)
        sys.setswitchinterval(TURN)
        site = Site(self.config, self.log)
        with contextlib.ExitStack() as opened:
            pidfile = daemon.pidfile and Pidfile(self.path(daemon.pidfile))
            if pidfile:
                opened.callback(pidfile.remove)
            listeners = passed_listeners() or open_listeners(
                self.config.server.listen)
            for listener in listeners:
                opened.enter_context(listener)
            self.ids = choose_ids(daemon)
            self.open_log(self.config.log)
            self.notifier = opened.enter_context(Notifier())
            null = opened.enter_context(open(os.devnull, "r+b", 0))
            self.terminal = None if daemon.daemonize else open_terminal()
            self.give_up_rights(site)
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)   # for later
            launcher = daemonize() if daemon.daemonize else None
            if pidfile:
                pidfile.write()
            fit_max_clients(self.config, self.log)
            self.server = opened.enter_context(
                FingerServer(listeners, site, self.log))
            self.watch_signals()
            self.report_ready(listeners)
            if launcher is not None:
                release_launcher(launcher, null.fileno())
            self.server.serve_forever()
            self.report_end()

    def serve_inetd(self, sock: socket.socket) -> None:
        """Serve the one connection that inetd(8) has accepted."""
        os.umask(self.config.daemon.umask)
        site = Site(self.config, self.log)
        self.ids = choose_ids(self.config.daemon)
        try:
            self.open_log(self.config.log)
        except StartError:
            if self.config.log.to != "syslog":
                raise           # without syslog only the log is lost
        self.give_up_rights(site)
        with FingerServer([], site, self.log) as server:
            try:
                server.serve_one(sock)
            except OSError as error:
                if error.errno not in (errno.ENOTCONN, errno.EINVAL):
                    raise       # else it had left before it had an address
                self.log.query("unknown", 0, b"", Reply("gone", b""), 0, 0)

    def give_up_rights(self, site: Site) -> None:
        """Enter the chroot and the rundir, and become the user."""
        daemon = self.config.daemon
        rundir = daemon.rundir or (
            "/" if daemon.daemonize or daemon.chroot else "")
        if self.ids:
            load_late_imports()
        try:
            if daemon.chroot:
                site.resolve_hops()
                os.chroot(daemon.chroot)
                os.chdir("/")
                self.root = os.path.normpath(daemon.chroot)
            if rundir:
                os.chdir(rundir)
        except OSError as error:
            raise StartError("cannot enter chroot or rundir:"
                             f" {reason(error)}") from None
        if self.ids:
            drop_privileges(*self.ids)

    def path(self, name: str) -> str:
        """Give the absolute path of a file, as it is seen from a chroot."""
        path = os.path.normpath(os.path.join(self.directory, name))
        if self.root and path.startswith(self.root + "/"):
            return path[len(self.root):]
        return path

    def open_log(self, settings: Any) -> None:
        """Open the log, again if it is a file; StartError if that fails."""
        settings = types.SimpleNamespace(**vars(settings))
        what = "open the log"
        if settings.to == "syslog":
            address = settings.syslog_address
            what = "reach syslog at " + (
                address if isinstance(address, str) else address_text(address))
        elif settings.to != "stderr":
            settings.to = self.path(settings.to)
        try:
            self.log.open(settings, self.ids[1:] if self.ids else None)
        except OSError as error:
            raise StartError(f"cannot {what}: {reason(error)}") from None

    def report_ready(self, listeners: list[socket.socket]) -> None:
        """Write the first lines of the log, and let systemd know."""
        event = self.log.event
        for (section, name), text in self.config.texts.items():
            event("debug", "setting", section=section, name=name, value=text)
        if self.ids and not self.config.daemon.user:
            event("notice", "user", name=self.ids[0],
                  reason="started as root, and user is not set")
        user = {"user": self.ids[0]} if self.ids else {}
        event("notice", "ready", listen=",".join(
            address_text(listener.getsockname()) for listener in listeners),
            backend=",".join(name for name, _ in self.config.backends),
            **user, pid=os.getpid())
        self.notifier.send("READY=1", f"MAINPID={os.getpid()}")
        if self.notifier.period:
            self.server.heartbeat = self.notifier.send_sign_of_life

    def report_end(self) -> None:
        self.log.event("notice", "stopped", signal=self.server.stopped_by,
                       queries=sum(self.server.outcomes.values()),
                       seconds=int(time.monotonic() - self.server.started))
        signal.set_wakeup_fd(-1)
        # It is too late for more.  To ignore them would not do: Python
        # complains of one that has come, but has no handler any more.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    # Signals.

    def watch_signals(self) -> None:
        """Have signals noted and the loop woken: the loop acts on them."""
        def note(number: int, frame: Any) -> None:
            self.server.signals.append(number)

        self.server.actions = {
            signal.SIGTERM: functools.partial(self.stop, "SIGTERM"),
            signal.SIGINT: functools.partial(self.stop, "SIGINT"),
            signal.SIGHUP: self.hang_up, signal.SIGUSR1: self.log_counters}
        for number in SIGNALS:
            signal.signal(number, note)
        # A launcher may have left it ignored: then no program has a status.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.set_wakeup_fd(self.server.waker.fileno(),
                             warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def stop(self, name: str) -> None:
        self.notifier.send("STOPPING=1")
        self.server.stop(name)

    def hang_up(self) -> None:
        """Stop if the terminal has gone that we were started from, or reload.

        Nobody sees a log on a terminal that has gone.  /dev/tty could not be
        opened in a chroot, so this asks by a descriptor.
        """
        try:
            if self.terminal is not None:
                os.tcgetpgrp(self.terminal)
        except OSError:
            self.stop("SIGHUP")
        else:
            self.reload()

    def reload(self) -> None:
        """Reload the config: all of it or, if it is bad, nothing.

        Nothing here waits for the network.
        """
        if self.server.stopped_by:
            return
        self.notifier.send("RELOADING=1",
                           f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            with contextlib.suppress(StartError):   # it stays as it is
                self.open_log(self.config.log)
            self.change_config(self.read_config())
        except Exception as error:      # whatever it is, the old one serves
            text = (reason(error) if isinstance(error, OSError)
                    else str(error) or repr(error))
            for line in text.splitlines():
                self.log.event("warning", "reload-failed", reason=line)
        self.notifier.send("READY=1")

    def read_config(self) -> Any:
        """Read the config again, but not from a pipe: that could wait."""
        path = self.path(self.config.path)
        if os.path.exists(path) and not os.path.isfile(path):
            raise ConfigError(f"{path} is not a regular file")
        config = self.reader(path, old=self.config).read()
        config.path = self.config.path
        return config

    def change_config(self, config: Any) -> None:
        """Use another config; StartError if its log cannot be opened."""
        site = Site(config, self.log)
        self.log_unreloadable(config)
        self.open_log(config.log)
        fit_max_clients(config, self.log)
        self.server.change_site(site)
        self.config = config
        self.log.event("notice", "reloaded", config=config.path)

    def log_unreloadable(self, config: Any) -> None:
        """Log what a reload cannot change, and keep it."""
        for row in SETTINGS:
            key = section, name = row.section, row.name
            old, new = self.config.texts[key], config.texts[key]
            if new != old and (
                    section == "daemon" or name in ("listen", "syslog_address")
                    or (section, name, new) == ("log", "to", "syslog")):
                self.log.event("warning", "not-reloaded", setting=name,
                               reason="only a restart can change it")
                config.texts[key] = old
                setattr(getattr(config, section), name,
                        getattr(getattr(self.config, section), name))

    def log_counters(self) -> None:
        server = self.server
        self.log.event(
            "notice", "counters",
            seconds=int(time.monotonic() - server.started),
            queries=sum(server.outcomes.values()), clients=server.crowd,
            lookups=server.lookups, **server.outcomes)


# ---- Command line ---------------------------------------------------------

DEFAULT_TIMEOUT = 60.0          # seconds, if the config has errors
STOP_WAIT = 5.0                 # seconds beyond the timeout, for --stop
BUNDLE_MAIN = "import fingerd, sys\nsys.exit(fingerd.main())\n"
COMMANDS = {
    "check": "check the config: status 0 if good, 2 if not",
    "status": "tell whether the pidfile's daemon runs: 0 yes, 3 no",
    "stop": "stop it, and wait until it has ended",
    "reload": "have it take up its config anew",
    "inetd": "serve the one connection on standard input",
    "version": "print the version, and end",
    "help": "print this and all settings, and end",
}


class Option(NamedTuple):
    """One option of the command line."""

    flags: tuple[str, ...]
    name: str           # of what it sets
    argument: str       # what must follow it; "" for nothing
    value: Any          # that it sets when nothing follows
    help: str


def make_options() -> list[Option]:
    """List the options; those that override a setting come from SETTINGS."""
    return [
        Option(("--config",), "config", "FILE", None,
               f"the config; else {' or '.join(CONFIG_FILES)}"),
        *(Option(row.flags, row.name, "VALUE", None, row.help)
          for row in SETTINGS if row.flags),
        Option(("-d", "--daemon"), "daemonize", "", "yes", "daemonize = yes"),
        Option(("-n", "--nodaemon"), "daemonize", "", "no", "daemonize = no"),
        Option(("--syslog",), "to", "", "syslog", "to = syslog"),
        *(Option(("--" + name,), name, "", True, does)
          for name, does in COMMANDS.items()),
        Option(("--query",), "query", "LINE", None,
               "print what a client would get, and end"),
        Option(("--from",), "client", "ADDRESS", None,
               "for --query: the client's address"),
        Option(("--bundle",), "bundle", "FILE", None,
               "write one program that has every backend"),
    ]


def parse_options(argv: list[str]) -> types.SimpleNamespace:
    """Give what the options set, None for the others, or ConfigError.

    getopt, for argparse takes as long to load as all else that we need.
    """
    rows = {flag: row for row in make_options() for flag in row.flags}
    short = "".join(flag[1:] + ":" * bool(row.argument)
                    for flag, row in rows.items() if flag[1] != "-")
    long = [flag[2:] + "=" * bool(row.argument)
            for flag, row in rows.items() if flag[1] == "-"]
    try:
        found, rest = getopt.gnu_getopt(argv, short, long)
    except getopt.GetoptError as error:
        raise ConfigError(f"{error}; see --help") from None
    if rest:
        raise ConfigError(f'"{rest[0]}" is no option; see --help')
    args = types.SimpleNamespace(**{row.name: None for row in rows.values()})
    for flag, value in found:
        row = rows[flag]
        setattr(args, row.name, value if row.argument else row.value)
    return args


def help_text() -> str:
    """Spell what --help prints."""
    lines = ["usage: fingerd.py [OPTION]...", "",
             "Answer finger queries (RFC 1288) from a config file.", "",
             "options:"]
    for row in make_options():
        flags = ", ".join(row.flags) + f" {row.argument}".rstrip()
        lines.append(f"  {flags:20} {row.help}")
    return "\n".join([*lines, "", settings_text(), ""])


def settings_text() -> str:
    """List the settings of all sections with their defaults."""
    rows = list(SETTINGS)
    with contextlib.suppress(ValueError):   # alone: then those of users only
        for name, cls in load_backends().items():
            rows += [Setting(name, *row) for row in cls.settings or ()]
    lines = ["settings of the config file, and their defaults:"]
    section = ""
    for row in rows:
        if row.section != section:
            section = row.section
            lines += ["", f"[{section}]"]
        lines += [f"  {row.name} = {row.default}".rstrip(),
                  f"        {row.help}"]
    lines += ["", "[users]", "  NAME = TEXT",
              "        a user, and what is said of that user"]
    return "\n".join(lines)


def find_config(path: str | None) -> str:
    """Give the path of the config: the one named, or one that is there."""
    if path is not None:
        return path
    for known in CONFIG_FILES:
        if os.path.exists(known):
            info = os.stat(known)
            if os.geteuid() == 0 and (info.st_uid or info.st_mode & 0o022):
                raise ConfigError(f"{known} can be written by others than"
                                  " root; name it with --config if you trust"
                                  " it")
            return known
    raise ConfigError(f"there is no {' and no '.join(CONFIG_FILES)}; copy"
                      " fingerd.conf.example to one of them, or name a file"
                      " with --config")


def print_reply(config: Any, log: Log, line: str, client: str) -> int:
    """Print what this client would get for a line; 1 if a backend failed."""
    import ipaddress  # not needed to serve
    try:
        client = plain_address(client)
        ipaddress.ip_address(client)
    except ValueError:
        raise ConfigError(f'--from: "{client}" is not an address; write'
                          " e.g. --from 192.0.2.7") from None
    site = Site(config, log)
    if os.geteuid() == 0:       # no program is run as root, for no query
        load_late_imports()
        child = os.fork()
        if child:
            return os.WEXITSTATUS(os.waitpid(child, 0)[1])
        try:
            drop_privileges(*choose_ids(config.daemon) or ("root", 0, 0))
            os._exit(say_reply(site, line, client))
        finally:
            os._exit(1)
    return say_reply(site, line, client)


def say_reply(site: Site, line: str, client: str) -> int:
    """Print the reply itself; give the status."""
    reply = FIXED["denied"]
    if site.allows(client):
        deadline = time.monotonic() + site.config.limits.timeout
        reply = site.answer(os.fsencode(line), client, lambda: "localhost",
                            deadline) or FIXED["failed"]
    say(reply.data)
    return 1 if reply.outcome == "failed" else 0


def control(args: types.SimpleNamespace,
            reader: Callable[..., ConfigReader]) -> int:
    """Act on the running daemon; give the exit status.

    A pidfile is enough: the config may have errors by now.
    """
    config, pidfile, errors = read_for_control(args.config, reader)
    pidfile = args.pidfile or pidfile
    if not pidfile:
        raise ConfigError(errors or "no pidfile is configured; set pidfile in"
                                    " [daemon], or give --pidfile")
    path = os.path.abspath(pidfile)
    if args.status:
        return print_status(path)
    if args.reload:
        return send_reload(path, config, errors)
    stop_daemon(path, config.limits.timeout if config else DEFAULT_TIMEOUT)
    return 0


def read_for_control(path: str | None, reader: Callable[..., ConfigReader]
                     ) -> tuple[Any, str, str]:
    """Give the config or None, its pidfile if that is good, and the errors."""
    text = ""
    try:
        reading = reader(find_config(path))
        try:
            config = reading.read()
        finally:
            text = reading.texts.get(("daemon", "pidfile"), "")
    except ConfigError as error:
        return None, text if text.isprintable() else "", str(error)
    return config, config.daemon.pidfile, ""


def print_status(path: str) -> int:
    """Say whether the daemon runs; give the status of LSB."""
    try:
        pid, number = find_daemon(path)
    except StartError as error:
        complain(str(error))
        return 4
    if pid:
        say(f"fingerd is running, pid {pid}\n".encode())
    elif number:
        say(f"fingerd has died; it was pid {number}\n".encode())
    else:
        say(b"fingerd is not running\n")
    return 0 if pid else 1 if number else 3


def send_reload(path: str, config: Any, errors: str) -> int:
    """Have the daemon reload; give 1 if that fails, as far as we know."""
    if errors:
        complain(errors)
    pid, _ = find_daemon(path)
    if not pid:
        say(b"fingerd is not running\n")
        return 1
    if config:
        errors = unreadable_config(config, process_ids(pid))
        if errors:
            complain(errors)
    send_signal(pid, signal.SIGHUP)
    return 1 if errors else 0


def stop_daemon(path: str, timeout: float) -> None:
    """Stop the daemon, and wait until nobody, or another, has its pidfile."""
    pid, _ = find_daemon(path)
    if not pid:
        say(b"fingerd is not running\n")
        return
    send_signal(pid, signal.SIGTERM)
    until = time.monotonic() + timeout + STOP_WAIT
    while find_daemon(path)[0] == pid:
        if time.monotonic() > until:
            raise StartError(f"pid {pid} has not ended in"
                             f" {timeout + STOP_WAIT:.0f} seconds")
        time.sleep(0.02)


def send_signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except OSError as error:
        raise StartError(f"cannot signal pid {pid}:"
                         f" {reason(error)}") from None


def take_inetd_socket() -> socket.socket:
    """Take the connection from standard input, where inetd puts it.

    It is stdout and stderr, too, and nothing else may be written to it.
    """
    try:
        sock = socket.socket(fileno=os.dup(0))
        if sock.type != socket.SOCK_STREAM or sock.family not in (
                socket.AF_INET, socket.AF_INET6) or sock.getsockopt(
                socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            sock.close()
            raise OSError("not TCP, or listening")
    except OSError as error:
        raise StartError("--inetd: standard input is not a connection:"
                         f" {reason(error)}; have inetd start it") from None
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            os.dup2(null, fd)
    os.close(null)
    return sock


def refuse_for_inetd(sock: socket.socket, log: Log, error: Exception) -> None:
    """Tell the client that we fail, and syslog why: there is no terminal."""
    with contextlib.suppress(OSError), sock:
        sock.settimeout(GRACE)
        sock.sendall(FIXED["failed"].data)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(4096):      # a close with bytes unread is a reset
            pass
    defaults = {row.name: row.default for row in SETTINGS
                if row.section == "log"}
    with contextlib.suppress(OSError):
        log.open(types.SimpleNamespace(**{**defaults, "to": "syslog"}))
        for line in str(error).splitlines():
            log.event("error", "not-started", reason=line)


def compiled(name: str, source: str) -> bytes:
    """Compile a module to what this Python loads at once (PEP 552)."""
    import importlib.util
    import marshal
    unchecked = (1).to_bytes(4, "little")   # the source beside it is the same
    return (importlib.util.MAGIC_NUMBER + unchecked
            + importlib.util.source_hash(source.encode())
            + marshal.dumps(compile(source, f"{name}.py", "exec",
                                    dont_inherit=True)))


def write_bundle(path: str) -> None:
    """Write a zipapp of both files, which anybody may run.

    It has them compiled, too: a Python of the same version starts sooner.
    """
    import importlib.util
    import zipfile
    files: dict[str, str | bytes] = {"__main__.py": BUNDLE_MAIN}
    try:
        load_backends()
        for name in ("fingerd", "fingerd_backends"):
            spec: Any = importlib.util.find_spec(name)
            if not spec:
                raise ValueError("this file is not named fingerd.py any more")
            source = spec.loader.get_source(name)
            files[f"{name}.py"] = source
            files[f"{name}.pyc"] = compiled(name, source)
    except ValueError as error:
        raise ConfigError(f"--bundle: {error}") from None
    try:
        with open(path, "wb") as file:
            file.write(b"#!/usr/bin/env python3\n")
            with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as bundle:
                for name, data in files.items():
                    bundle.writestr(name, data)
        os.chmod(path, 0o755)
    except OSError as error:
        raise StartError(f"cannot write the bundle: {reason(error)}"
                         ) from None


def run(args: types.SimpleNamespace, log: Log) -> int:
    """Do what the options say; give the exit status."""
    if args.client is not None and args.query is None:
        raise ConfigError("--from: goes with --query only")
    if args.bundle:
        write_bundle(args.bundle)
        return 0
    if not args.inetd:
        return run_config(args, log)
    sock = take_inetd_socket()
    try:
        return run_config(args, log, sock)
    except (ConfigError, StartError) as error:
        refuse_for_inetd(sock, log, error)
        raise


def run_config(args: types.SimpleNamespace, log: Log,
               sock: socket.socket | None = None) -> int:
    """Read the config, and do what needs it; give the exit status."""
    def report(backend: str, text: str) -> None:
        log.event("warning", "backend", name=backend, text=text)

    overrides = {row.name: getattr(args, row.name) for row in SETTINGS
                 if getattr(args, row.name, None) is not None}
    reader = functools.partial(ConfigReader, report=report,
                               overrides=overrides)
    if args.status or args.stop or args.reload:
        return control(args, reader)
    path = find_config(args.config)
    config = reader(path).read()
    if args.query is not None:
        return print_reply(config, log, args.query,
                           args.client or "127.0.0.1")
    if sock:
        Daemon(config, log, reader).serve_inetd(sock)
        return 0
    for warning in (lost_log(config), unreadable_config(config)):
        if warning:
            complain(warning)
    if args.check:
        say(to_wire(f"{path} is good").replace(b"\r", b""))
        return 0
    Daemon(config, log, reader).start_and_serve()
    return 0


def say(data: bytes) -> None:
    """Write to stdout; a reader who has seen enough is no failure."""
    try:
        while data:
            data = data[os.write(1, data):]
    except BrokenPipeError:
        pass
    except OSError as error:
        raise StartError(f"cannot print: {reason(error)}") from None


def complain(text: str) -> None:
    """Tell the person at the terminal, each line with the name in front."""
    for line in text.split("\n"):
        data = to_wire(f"fingerd: {line}").replace(b"\r\n", b"\n")
        with contextlib.suppress(OSError):
            os.write(2, data)


def open_standard_streams() -> None:
    """Open /dev/null where there is no stdin, stdout or stderr.

    The first socket would get that number, and clients what is printed.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)      # takes the lowest number


def main(argv: list[str] | None = None) -> int:
    """Run fingerd; give its status: 0 done, 1 failed, 2 bad use or config."""
    open_standard_streams()
    try:
        args = parse_options(sys.argv[1:] if argv is None else argv)
        if args.version:
            say(f"fingerd {__version__}\n".encode())
        elif args.help:
            say(help_text().encode())
        else:
            return run(args, Log())
    except ConfigError as error:
        complain(str(error))
        return 2
    except StartError as error:
        complain(str(error))
        return 1
    except OSError as error:        # as when there are no descriptors
        complain(f"cannot go on: {reason(error)}")
        return 1
    except KeyboardInterrupt:       # before there is anything to end cleanly
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
