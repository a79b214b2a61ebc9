#!/usr/bin/env python3
"""fingerd - a finger server (RFC 1288) in one file, with nothing to install.

Start it, and ask it with any finger client:

    python3 fingerd.py --config fingerd.conf

A client sends one line, `alice CRLF`, gets text back, and the server closes.
The text comes from a backend.  Two are here: the users in the config, and
another finger server.  fingerd_backends.py is needed only for the others.

Sections, from the protocol outward to the operating system:

    Query         bytes from the client -> Query
    Reply         text -> bytes for the client, and the fixed replies
    Backends      where texts come from
    Settings      the table of settings, and converters for their texts
    Config file   read and checked as a whole before anything starts
    Log           one line for each connection
    Stats         counters for Prometheus
    Answers       policy: who is answered, and what
    Forwarding    asking another finger server, also as a backend
    PROXY header  the client's address, as a load balancer gives it
    Clients       the life of a client, and what it waits for
    Waiting       counts, rates, deadlines, and the queue for threads
    Server        the loop: accepting, waiting, threads
    Sockets       what it listens on
    Pidfile       the file, its lock, and the daemon that holds it
    Privileges    users and groups, and files that root may open
    Process       signals, reload, the order of the start
    Actions       what the options ask for
    Command line  options and exit statuses
"""

from __future__ import annotations

import argparse
import array
import bisect
import collections
import contextlib
import errno
import fcntl
import functools
import gc
import grp
import itertools
import math
import os
import pwd
import queue
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
import textwrap
import threading
import time
import types
from typing import (
    Any,
    Callable,
    Container,
    Generator,
    Iterable,
    Iterator,
    NamedTuple,
    NoReturn,
)

__version__ = "1.0"

MAX_USERS = 8           # names in one line; each may cost a whole lookup
MAX_HOSTS = 4           # in a forwarded chain, which may be a circle
FINGER_PORT = 79        # RFC 1288 2.1; also where a forwarded query goes
MAX_PORT = 65535
READ_SIZE = 4096        # bytes asked for at once
DONT_WAIT = int(socket.MSG_DONTWAIT)    # int(): an enum's | costs 2 us
PEEK = int(socket.MSG_PEEK)


def reason(error: OSError) -> str:
    """Give the system's words for an error, in lower case, without errno."""
    text = (error.strerror or "").lower() or str(error) or "no reason given"
    return f"{text}: {error.filename}" if error.filename else text


def format_traceback() -> str:
    """Format the current traceback."""
    try:
        import traceback  # slow to load, and rarely needed
    except (ImportError, OSError):      # no descriptor is left to load it
        return repr(sys.exc_info()[1])
    return traceback.format_exc()


# ---- Query ----------------------------------------------------------------

RAW_SHARE = 4           # bytes, with telnet's, per byte of max_query
NO_QUERY = re.compile(  # control characters but TAB; a PROXY header
    rb"[\0-\x08\x0a-\x1f\x7f]|\xc2[\x80-\x9f]|\APROXY (TCP[46]|UNKNOWN)\b")
LINE_END = re.compile(rb"\n|\r\0")     # telnet sends CR NUL for a CR
IAC, SB, SE, WILL, DONT = 255, 250, 240, 251, 254   # of telnet, see RFC 854


class MalformedQuery(ValueError):
    """The line is not a finger query."""


class LineTooLong(ValueError):
    """The line is longer than max_query."""


class Query(NamedTuple):
    """A parsed line: {Q1} of RFC 1288, or {Q2} if it names hosts."""

    users: tuple[str, ...]      # {U}; if empty, the user list is asked for
    verbose: bool               # {W}
    hosts: tuple[str, ...]      # {H}, the next hop last


def is_plain(text: bytes) -> bool:
    """Is this one name of ASCII letters, digits, and perhaps - . _?"""
    return text.translate(None, b"-._").isalnum()


class QueryLine:
    """Builds a line from segments; removes telnet commands and line end.

    It does not matter where the segments begin and end.  Each byte is looked
    at once.
    """

    __slots__ = ("text", "limit", "room", "telnet")

    def __init__(self, limit: int) -> None:
        self.text = bytearray()
        self.limit = limit              # bytes of text
        self.room = RAW_SHARE * limit   # bytes that may still come
        self.telnet: Any = None         # strip_telnet(), from the first IAC on

    def add(self, data: bytes) -> bool:
        """Add a segment, b"" at the end of file; is the line complete?

        Raises LineTooLong; the text is then cut to the limit.
        """
        start, text = len(self.text), self.text
        if IAC in data and not self.telnet:
            self.telnet = strip_telnet(text)
            next(self.telnet)
        if self.telnet and data:
            for byte in data[:self.room]:
                self.telnet.send(byte)
        else:
            text += data[:self.room] or b"\n"  # an end of file ends a line
        self.room -= len(data)
        end = LINE_END.search(text, max(0, start - 1))
        if end:
            del text[end.start():]
            del text[len(text.rstrip(b"\r")):]
        # A CR beyond the limit may be a part of the line end.
        if (text[max(start, self.limit):].strip(b"\r")
                or self.room <= 0 and not end):
            del text[self.limit:]
            raise LineTooLong
        return bool(end)


def strip_telnet(text: bytearray) -> Generator[None, int, None]:
    """Take bytes one by one; append those that are no command to text."""
    while True:
        byte = yield
        if byte == IAC:
            byte = yield
            if byte == SB:
                while (yield) != IAC or (yield) != SE:
                    pass
            elif WILL <= byte <= DONT:
                yield                   # the option
            if byte != IAC:
                continue
        text.append(byte)               # IAC IAC means a byte 255


def parse_query(line: bytes | bytearray,
                own_names: Callable[[], Container[str]] = frozenset) -> Query:
    """Parse a line without its end (RFC 1288 2.3).

    own_names() gives the names of this host, in lower case.  At the end of
    user@host they are dropped: Emacs sends all of it to that host.
    Raises MalformedQuery, and nothing else.
    """
    if NO_QUERY.search(line):
        raise MalformedQuery("control character or PROXY header")
    try:
        tokens = [token.decode() for token in line.split()]
    except UnicodeDecodeError:
        raise MalformedQuery("not UTF-8") from None
    names = [token for token in tokens if token not in ("/W", "/w")]
    if len(names) > MAX_USERS:
        raise MalformedQuery("too many names")
    verbose = len(names) < len(tokens)
    own = own_names() if b"@" in line else ()
    users = []
    for name in names:
        user, *hosts = name.split("@")
        if user in ("/W", "/w"):
            raise MalformedQuery("/W is a token of its own")
        while hosts and all(hosts) and hosts[-1].lower().rstrip(".") in own:
            hosts.pop()
        if hosts and len(names) > 1:
            hosts = [""]        # {Q2} has one name: refuse it like a lone @
        if hosts:
            return Query((user,) if user else (), verbose, tuple(hosts))
        if user:
            users.append(user)
    return Query(tuple(users), verbose, ())


# ---- Reply ----------------------------------------------------------------

# What could control a terminal or break a line: C0 except TAB and LF, DEL,
# C1, line separators, bidirectional overrides; and surrogates.
UNSAFE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069"
                    "\ud800-\udfff]")
TRUNCATED = b"[truncated]\r\n"


class Reply(NamedTuple):
    """What the client gets, and what its log line says about it."""

    outcome: str                # one of OUTCOMES
    data: bytes                 # for the wire: UTF-8, CRLF, nothing unsafe
    backend: str = "-"          # the name of the backend that answered


# RFC 1288 3.2.1 and 3.2.2 suggest the two texts that end in "denied".
FIXED_REPLIES = {outcome: Reply(outcome, text + b"\r\n") for outcome, text in {
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
OUTCOMES = (*FIXED_REPLIES, "answered", "list", "forwarded", "gone")
GONE = Reply("gone", b"")           # the client left, or did not read
SILENCE = Reply("silent", b"")      # the client sent only an end of file


class Refused(Exception):
    """The client is not answered: it gets this reply."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.outcome)
        self.reply = reply


def show_unsafe(match: re.Match[str]) -> str:
    """Show one unsafe character in printable ASCII: ^[, \\x9b, \\u202e."""
    code = ord(match[0])
    if code < 0x80:
        return "^" + chr(code ^ 0x40)
    if 0xdc80 <= code <= 0xdcff:        # a byte that was not UTF-8 (PEP 383)
        code -= 0xdc00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def to_wire(text: str) -> bytes:
    """Convert any text to the bytes for a client (RFC 1288 2.2)."""
    text = UNSAFE.sub(show_unsafe, text.replace("\r\n", "\n"))
    if not text.endswith("\n"):
        text += "\n"
    return text.replace("\n", "\r\n").encode()


def join_replies(replies: list[Reply]) -> Reply:
    """Join the replies for several names."""
    outcomes = [reply.outcome for reply in replies]
    first = min(outcomes, key=("failed", "answered", "unknown").index)
    names = dict.fromkeys(reply.backend for reply in replies
                          if reply.backend != "-")
    data = b"\r\n".join(reply.data for reply in replies)
    return Reply(first, data, ",".join(names) or "-")


def truncate(data: bytes, limit: int) -> bytes:
    """Cut wire bytes to limit, at a line end if there is one, and say so."""
    if len(data) <= limit:
        return data
    room = limit - len(TRUNCATED)
    end = data.rfind(b"\r\n", 0, room)
    if end >= 0:
        return data[:end + 2] + TRUNCATED
    start = data[:room - 2].decode("utf-8", "ignore")
    return (start.encode() + b"\r\n" if start else b"") + TRUNCATED


# ---- Backends -------------------------------------------------------------

class UsersBackend:
    """Users of the config, each with the text of the reply.

    This is also the interface of a backend.  One instance answers many
    threads at once; it knows nothing of sockets, config files or the log.

    waits         may lookup() block?  If not, it is called in the loop.
    settings      rows (name, kind of KINDS, default, help) of its section,
                  or None if any name may be there, each with a text.
    options       the values in the section.  If some are bad, it raises a
                  ValueError with a line for each of them,
                  "setting: what is wrong; what to write".
    report(text, level="warning")  writes a line to the log, from any thread.
    warnings      optional: lines "setting: text" for the operator.

    lookup(user, verbose, client, timeout) gives the text for a user (or
    bytes that to_wire has made), None if it does not know the user.  It
    takes at most timeout seconds, and raises OSError when its source fails.
    user_list(verbose, client, timeout), optional, gives the text of {C},
    None if it has none.  client is a numeric address.
    enter_chroot(path), optional, prepares for path to become /, or raises a
    ValueError, as above, if it cannot work there.
    limit_threads(number), optional, sets how many lookups may run at once.
    """

    waits = False
    settings = None

    def __init__(self, options: dict[str, str],
                 report: Callable[[str], None]) -> None:
        self.replies = {name.lower(): to_wire(text)
                        for name, text in options.items()}
        width = max(map(len, options), default=0)
        self.list = to_wire("\n".join(
            f"{name:{width}}  {text.partition(chr(10))[0]}"
            for name, text in options.items()))

    def lookup(self, user: str, verbose: bool, client: str,
               timeout: float) -> bytes | None:
        return self.replies.get(user.lower())

    def user_list(self, verbose: bool, client: str,
                  timeout: float) -> bytes | None:
        return self.list


BACKENDS: dict[str, Any] = {"users": UsersBackend}
BACKEND_NAME = re.compile(r"[a-z]+(:[A-Za-z0-9_.-]+)?")


def load_backends() -> tuple[dict[str, Any], str]:
    """Give the backends by name, and why the other file's are missing."""
    try:
        import fingerd_backends
    except ImportError as error:    # in a chroot all of Python may be absent
        wrong = f"cannot be imported ({error}); restart once it can"
        if error.name == "fingerd_backends":
            wrong = "is not beside fingerd.py; copy it there too"
        return BACKENDS, f"needs fingerd_backends.py, which {wrong}"
    if fingerd_backends.__version__ != __version__:
        return BACKENDS, (
            f"cannot be used: fingerd.py is version {__version__}, but"
            f" fingerd_backends.py is {fingerd_backends.__version__};"
            " copy both from one release")
    return {**BACKENDS, **fingerd_backends.BACKENDS}, ""


def find_backend(name: str, used: bool) -> Any:
    """Give the class for a name such as `web` or `web:staff`, or ValueError.

    If it is not used, it is only the name of a section.
    """
    kind = name.partition(":")[0]
    classes, failure = (BACKENDS, "") if kind in BACKENDS else load_backends()
    if kind in classes and BACKEND_NAME.fullmatch(name):
        return classes[kind]
    known = list(classes)
    form, wrong, cure = (
        'backend: "{}"', "is not a backend", "write backend = users")
    if not used:
        name = f"[{name}]"
        known = [f"[{section}]" for section in (*CORE, "aliases", *known)]
        form, wrong, cure = "{}:", "no such section", "remove the section"
    guess = suggest(name, known)
    if failure and "did you mean" not in guess:
        wrong, guess = failure, f", or {cure}"
    raise ValueError(f"{form.format(name)} {wrong}{guess}")


def suggest(word: str, choices: list[str]) -> str:
    """Give the end of an error on an unknown word: what may be meant."""
    import difflib  # 10 ms: only errors need it
    for close in difflib.get_close_matches(word, choices, 1):
        return f"; did you mean {close}?"
    return f"; there are {', '.join(choices)}"


# ---- Settings -------------------------------------------------------------

FACILITIES = (                  # by their numbers: RFC 3164 4.1.1
    "kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news", "uucp",
    "cron", "authpriv", "ftp", "ntp", "audit", "alert", "clock", "local0",
    "local1", "local2", "local3", "local4", "local5", "local6", "local7")
LEVELS = ("debug", "info", "notice", "warning", "error")
INFO = LEVELS.index("info")     # the level of a query's line
MAX_SECONDS = 366 * 86400       # a year: more is a typing error
MAX_COUNT = 1_000_000_000       # of anything counted, bytes included
MIN_SIZE = 64                   # bytes: room for each of FIXED_REPLIES
YES, NO = ("yes", "true", "on", "1"), ("no", "false", "off", "0")
NUMBERS = {                     # patterns of how they are written
    "a whole number": "[0-9]{1,12}",
    "a number of seconds": r"[0-9]{1,12}(\.[0-9]{1,12})?",
    "a size in bytes": "[0-9]{1,12}[KkMm]?",
}
UNITS = {"K": 1024, "M": 1024 ** 2}


class Setting(NamedTuple):
    """A row of the table that feeds parsing, checking and --help."""

    section: str
    name: str
    kind: str                   # a key of KINDS
    default: str                # as it would be written in the file
    help: str
    flags: tuple[str, ...] = ()


# Converters take a text.  For a bad one they raise ValueError("is not ..."),
# with "; " and what to write if the setting's default is not an example.

def text_matching(pattern: str, what: str,
                  convert: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """Make a converter of texts that match all of a pattern."""
    def check(text: str) -> Any:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"is not {what}")
        return convert(text)
    return check


def number_from(low: float, high: float, what: str) -> Callable[[str], Any]:
    """Make a converter to numbers; what is a key of NUMBERS."""
    def convert(text: str) -> float:
        value = float(text.rstrip("KkMm")) * UNITS.get(text[-1].upper(), 1)
        if not low <= value <= high:
            raise ValueError(f"is not between {low} and {high}")
        return int(value) if value.is_integer() else value
    return text_matching(NUMBERS[what], what, convert)


def one_of(*words: str, convert: Callable[[str], Any] = str.lower
           ) -> Callable[[str], Any]:
    """Make a converter of these words, in any case."""
    return text_matching("(?ai)" + "|".join(words),
                         f"one of {', '.join(words)}", convert)


def list_of(convert: Callable[[str], Any],
            at_least: int = 0) -> Callable[[str], tuple[Any, ...]]:
    """Make a converter of a list of words, each by the one given."""
    def convert_words(text: str) -> tuple[Any, ...]:
        words = text.split()
        if len(words) < at_least:
            raise ValueError("is empty")
        return tuple(convert(word) for word in words)
    return convert_words


def to_host(text: str) -> str:
    return text.lower().rstrip(".")


def to_address(text: str, default_port: str = "") -> tuple[str, int]:
    match = re.fullmatch(r"(\[[\w:.%-]+\]|\*|[\w.-]+)(?::([0-9]{1,5}))?", text)
    port = (match[2] or default_port) if match else ""
    if not match or not port or int(port) > MAX_PORT:
        raise ValueError("is not host:port or [v6 address]:port")
    return match[1].strip("[]"), int(port)


def to_hops(text: str) -> dict[str, int]:
    if text.lower() in NO:
        return {}
    if not text or "*" in text or text.lower() in YES:
        raise ValueError("is neither no nor a list of hosts")
    return dict(to_address(to_host(word), str(FINGER_PORT))
                for word in text.split())


def to_server(text: str) -> tuple[str, int] | None:
    if "*" in text:
        raise ValueError("is not a host; write e.g. host = two.example.org")
    return to_address(to_host(text), str(FINGER_PORT)) if text else None


def to_network(text: str) -> Any:
    """Convert a network in CIDR notation, or an address.

    A network of IPv4-mapped addresses becomes the IPv4 one, as the addresses
    of clients do.  A wider one, such as ::/0, means IPv6 only.
    """
    import ipaddress  # 2 ms, 1 MiB: only for configs that name networks
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(f"is not a list of networks ({error}); write e.g."
                         " 192.0.2.0/24 2001:db8::/32") from None
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    if mapped:
        return ipaddress.ip_network(f"{mapped}/{network.prefixlen - 96}")
    return network


def to_user(text: str) -> Any:
    """Give name, uid and gid of a user; a uid may have no name and no gid."""
    if not text:
        return None
    uid = to_id(text) if text.isdecimal() else None
    try:
        entry = pwd.getpwnam(text) if uid is None else pwd.getpwuid(uid)
        return entry.pw_name, entry.pw_uid, entry.pw_gid
    except KeyError:
        if uid is not None:
            return text, uid, None
    raise ValueError("is not a user of this system; create it (adduser"
                     f" --system {text}), or leave user empty for nobody")


def to_group(text: str) -> int | None:
    if text.isdecimal():
        return to_id(text)
    try:
        return grp.getgrnam(text).gr_gid if text else None
    except KeyError:
        raise ValueError("is not a group of this system; create it (addgroup"
                         f" --system {text}), or leave group empty for the"
                         " user's") from None


def to_syslog(text: str) -> str | tuple[str, int]:
    return text if text.startswith("/") else to_address(text)


# The next number would be -1: "do not change" for chown(2) and setresuid(2).
to_id = number_from(0, 0xfffffffe, "a whole number")
KINDS: dict[str, Callable[[str], Any]] = {
    "yes/no": one_of(*YES, *NO, convert=lambda text: text.lower() in YES),
    "seconds": number_from(0.001, MAX_SECONDS, "a number of seconds"),
    "period": number_from(0, MAX_SECONDS, "a number of seconds"),
    "count": number_from(1, MAX_COUNT, "a whole number"),
    "limit": number_from(0, MAX_COUNT, "a whole number"),
    "size": number_from(MIN_SIZE, MAX_COUNT, "a size in bytes"),
    "text": str,                # the only kind that may have several lines
    "hosts": list_of(to_host),
    "networks": list_of(to_network),
    "addresses": list_of(to_address, 1),
    "next hops": to_hops,
    "server": to_server,
    "backends": list_of(str, 1),
    "path": str,
    "directory": text_matching(
        "(/.*)?", "an absolute path; write e.g. /var/empty"),
    "log": text_matching(".+", "stderr, syslog or a path"),
    "facility": one_of(*FACILITIES),
    "word": text_matching("[!-~]{1,32}", "a word of 1 to 32 ASCII characters"),
    "syslog": to_syslog,
    "user": to_user,
    "group": to_group,
    "octal": text_matching(
        "0*[0-7]{1,3}", "an octal mask", lambda text: int(text, 8)),
    "format": one_of("text", "json"),
    "level": one_of(*LEVELS),
    "part": one_of("full", "network", "none"),
}

# Rows are name, kind, default, help, and the options of the command line.
CORE: dict[str, tuple[tuple[str, ...], ...]] = {
    "server": (
        ("listen", "addresses", "localhost:1079",
         "where to answer: host:port, [v6]:port, *:port", "--listen"),
        ("backend", "backends", "users", "backends to ask, in order"),
        ("user_list", "yes/no", "no", "list users for the empty query?"),
        ("forward", "next hops", "no", "hosts to ask for user@host"),
        ("welcome", "text", "", "text for the empty query, instead of a list"),
        ("header", "text", "", "text above each answer"),
        ("footer", "text", "", "text below each answer"),
        ("hostname", "hosts", "", "names of this host; empty: the system's"),
        ("allow", "networks", "", "networks that are answered; empty: all"),
        ("deny", "networks", "", "networks that are refused, even if allowed"),
        ("proxy_from", "networks", "", "load balancers that speak PROXY"),
        ("stats", "path", "", "file for Prometheus; empty: none"),
    ),
    "limits": (
        ("timeout", "seconds", "10", "seconds for query, backend, reply each"),
        ("max_query", "size", "512", "bytes in a query line"),
        ("max_reply", "size", "64K", "bytes in a reply"),
        ("max_clients", "count", "10000", "clients at a time"),
        ("max_clients_per_host", "count", "100", "at a time from one address"),
        ("queries_per_minute", "limit", "0", "from one address; 0: no limit"),
        ("max_threads", "count", "64", "lookups at a time; the rest queue"),
    ),
    "daemon": (
        ("daemonize", "yes/no", "no", "run in the background?"),
        ("pidfile", "path", "", "file locked while it runs", "--pidfile"),
        ("user", "user", "", "user that root becomes; empty: nobody",
         "--user", "--uid"),
        ("group", "group", "", "group that root gets; empty: the user's",
         "--group", "--gid"),
        ("chroot", "directory", "", "directory that becomes /", "--chroot"),
        ("rundir", "path", "", "directory to run in", "--rundir"),
        ("umask", "octal", "027", "mask for the modes of files", "--umask"),
    ),
    "log": (
        ("to", "log", "stderr", "stderr, syslog, or the path of a file",
         "-l", "--logfile"),
        ("format", "format", "text", "text or json"),
        ("level", "level", "info", "lowest level: " + ", ".join(LEVELS)),
        ("facility", "facility", "daemon", "facility for syslog"),
        ("prefix", "word", "fingerd", "word before each line", "--prefix"),
        ("syslog_address", "syslog", "/dev/log", "its socket, or host:port"),
        ("client", "part", "full",
         "what is kept of an address: full, network, none"),
    ),
}
SETTINGS = tuple(Setting(section, name, kind, default, text, tuple(flags))
                 for section, rows in CORE.items()
                 for name, kind, default, text, *flags in rows)


# ---- Config file ----------------------------------------------------------

# Not configparser: it stops at the first error, does not know the line of a
# value, and joins an indented setting to the value above it.
INDENTED = ("indented line outside a text value; write it without spaces in"
            " front")
UNASKED = re.compile("[\0- \x7f-\x9f@]|^/[Ww]$")    # no query can ask for it


class ConfigError(Exception):
    """Errors of the config or the command line, a line in each argument."""

    config: Any = None          # with defaults instead of bad values

    def __str__(self) -> str:
        return "\n".join(line.replace("\n", "\\n") for line in self.args)


class Entry(NamedTuple):
    """A setting as written in the file or on the command line."""

    line: int                   # 0: the command line
    name: str
    text: str                   # on this line
    below: list[tuple[int, str]]    # indented or empty lines, and numbers


class Section(dict):
    """The entries of a section, by name in lower case."""

    line = 0                    # of its header


class Notes(list):
    """Errors or warnings with line numbers; 0 is the command line."""

    def add(self, line: int, text: str) -> None:
        self.append((line, text))

    def place(self, section: Section, label: str,
              texts: Iterable[str]) -> None:
        """Add a backend's notes, `setting: text`, each at the setting's line.

        A setting that has a note is skipped: the backend saw its default.
        """
        noted = {(line, text.partition(":")[0]) for line, text in self}
        for text in texts:
            setting = text.partition(":")[0]
            line = section.get(setting, section).line
            if (line, setting) not in noted:
                self.add(line, label + text)

    def texts(self, path: str) -> list[str]:
        return [f"{path}:{line}: {text}" if line else text
                for line, text in sorted(self)]


def read_config(path: str, report: Callable[..., None],
                overrides: dict[str, str] | None = None,
                old: Any = None) -> Any:
    """Read a config; raise ConfigError with all its errors.

    report(backend, text, level) logs for a backend; overrides has texts from
    the command line by setting; old is the config that a reload replaces.
    The result has a namespace of values for each section of CORE, and: path,
    overrides; raw_values, texts by section and name; lines, line numbers by
    setting; aliases, the names that each means; backends, pairs of name and
    object; warnings, lines of text.
    """
    errors, warnings = Notes(), Notes()
    sections = parse_config(read_text(path), errors)
    config = convert_core(sections, overrides or {}, old, errors)
    config.path, config.overrides = path, overrides
    config.aliases = make_aliases(sections.pop("aliases", Section()), errors)
    chroot = "" if old else config.daemon.chroot
    config.backends = tuple(make_backends(config, sections, report, chroot,
                                          errors, warnings))
    config.warnings = warnings.texts(path)
    if errors:
        count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
        where = f"in {path}" if max(errors)[0] else "on the command line"
        failure = ConfigError(*errors.texts(path),
                              f"{count} {where}, not started")
        failure.config = config
        raise failure
    return config


def read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except OSError as error:
        raise ConfigError(f"cannot read the config: {reason(error)};"
                          " name another with --config, or copy"
                          " fingerd.conf.example") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: is not UTF-8; convert the file,"
                          " e.g. with iconv -f latin1 -t utf-8") from None


def parse_config(text: str, errors: Notes) -> dict[str, Section]:
    """Sort settings into sections; those of the same name are read as one."""
    sections: dict[str, Section] = {}
    section = Section()                 # until the first header
    entry: Entry | None = None          # that may have indented lines
    for number, line in enumerate(map(str.rstrip, text.split("\n")), 1):
        if not line or line[0].isspace():
            if entry:
                entry.below.append((number, line))
            elif line:
                errors.add(number, INDENTED)
            continue
        if line[0] == "#":
            continue
        name, equals, value = map(str.strip, line.partition("="))
        entry, first = Entry(number, name, value, []), number
        if line[0] == "[" and line[-1] == "]":
            name, entry = line, None
            section = sections.setdefault(line[1:-1].strip(), Section())
            section.line = first = section.line or number
        elif not equals or not name:
            errors.add(number, f'"{line}" is neither a section nor a setting;'
                               " write [section] or name = value")
        elif not section.line:
            errors.add(number, f"{name}: outside any section; write its"
                               " [section] above it")
        else:
            first = section.setdefault(name.lower(), entry).line
        if first != number:
            errors.add(number, f"{name}: already on line {first}; write it"
                               " once")
    return sections


def full_text(entry: Entry) -> str:
    """Give all lines of a text; those below the first are dedented."""
    if not entry.below:
        return entry.text
    below = textwrap.dedent("\n".join(line for _, line in entry.below))
    return "\n".join(filter(None, [entry.text, below.rstrip("\n")]))


def convert_core(sections, overrides, old, errors):
    """Convert the sections of CORE to a config."""
    config = types.SimpleNamespace(raw_values={}, lines={})
    for section in CORE:
        rows = [row for row in SETTINGS if row.section == section]
        if old and section == "daemon":
            # The old one is kept.  Its user is not looked up again: that may
            # wait for a network, and fails in a chroot.
            rows = [row._replace(kind="text") for row in rows]
        entries = [*sections.pop(section, Section()).values(),
                   *(Entry(0, row.name, overrides[row.name], [])
                     for row in rows if row.name in overrides)]
        values = convert_section(rows, entries, errors)
        setattr(config, section, types.SimpleNamespace(**values))
        for row in rows:
            config.raw_values[section, row.name] = row.default
        for entry in entries:
            name = entry.name.lower()
            if name in values:
                config.raw_values[section, name] = full_text(entry)
                config.lines[name] = entry.line
    if old:
        config.daemon = old.daemon
    return config


def convert_section(rows, entries, errors):
    """Give the values by name; note entries that are not in rows.

    If rows are None, any name that a query can ask for may be there.
    """
    if rows is None:
        for entry in entries:
            if UNASKED.search(entry.name):
                errors.add(entry.line, f"{entry.name}: no query can match this"
                                       " name; write it without spaces and @")
        return {entry.name: full_text(entry) for entry in entries}
    values = {row.name: KINDS[row.kind](row.default) for row in rows}
    known = {row.name: row for row in rows}
    for entry in entries:       # the later one counts
        name = entry.name.lower()
        if name in known:
            values[name] = convert_entry(known[name], entry, errors)
        else:
            errors.add(entry.line, f"{entry.name}: no such setting"
                                   + suggest(name, list(known)))
    return values


def convert_entry(row: Setting, entry: Entry, errors: Notes) -> Any:
    """Give the value of an entry; note a bad one and give the default."""
    if row.kind == "text":
        return full_text(entry)
    for number, line in entry.below:
        if line:
            errors.add(number, INDENTED)
    try:
        if re.search("[\0-\x1f\x7f-\x9f]", entry.text):
            raise ValueError("has control characters; remove them")
        return KINDS[row.kind](entry.text)
    except ValueError as error:
        name, equals = row.name, " ="
        if not entry.line:
            name, equals = max(row.flags, key=len), ""
        wrong = f'{name}: "{entry.text}" {error}'
        if row.default and "; " not in str(error):
            wrong += f"; write e.g. {name}{equals} {row.default}"
        errors.add(entry.line, wrong)
        return KINDS[row.kind](row.default)


def make_aliases(section: Section, errors: Notes) -> dict[str, list[str]]:
    """Give the names that each alias means, by alias in lower case."""
    convert_section(None, section.values(), errors)
    aliases = {}
    for name, entry in section.items():
        try:
            aliases[name] = follow_alias(name, section)
        except ValueError as error:
            errors.add(entry.line, f"{name}: {error}")
    return aliases


def follow_alias(word: str, aliases: Section, *path: str) -> list[str]:
    """Give the names that a word means; path is the aliases before it."""
    name = word.lower()
    if name not in aliases:
        return [word]
    if name in path or len(path) > MAX_USERS:
        raise ValueError("is a circle, or too long a chain"
                         f" ({' = '.join((*path, name))}); cut it")
    names = []
    for meant in full_text(aliases[name]).split():
        names += follow_alias(meant, aliases, *path, name)
    if not 1 <= len(names) <= MAX_USERS or "@" in "".join(names):
        raise ValueError(f"does not stand for 1 to {MAX_USERS} names; write"
                         " these, without @")
    return names


def make_backends(config, sections, report, chroot, errors, warnings):
    """Make the backends that are used; yield pairs of name and object.

    The sections of others are checked for names and values.
    """
    line = config.lines.get("backend", 0)
    names = config.server.backend
    if len(set(names)) < len(names):
        errors.add(line, "backend: names one twice; name each once")
    for name in dict.fromkeys((*names, *sections)):
        section = sections.get(name, Section())
        section.line = section.line or line
        try:
            cls = find_backend(name, name in names)
        except ValueError as error:
            errors.add(line if name in names else section.line, str(error))
            continue
        rows = cls.settings and [Setting("", *row) for row in cls.settings]
        options = convert_section(rows, section.values(), errors)
        if name not in names:
            warnings.add(section.line, f"[{name}]: is not used; add {name} to"
                                       " backend, or remove the section")
            continue
        label = "" if name in sections else f"[{name}]: "
        try:
            backend = cls(options, functools.partial(report, name))
            if chroot and hasattr(backend, "enter_chroot"):
                backend.enter_chroot(chroot)
        except ValueError as error:
            errors.place(section, label, str(error).splitlines())
        else:
            warnings.place(section, label, getattr(backend, "warnings", ()))
            yield name, backend


# ---- Log ------------------------------------------------------------------

SEVERITY = {level: 7 - number       # as syslog(3) counts
            for number, level in enumerate(LEVELS)}
MAX_SYSLOG = 8192       # bytes of a message; rsyslog takes no more
PLAIN = re.compile(r'[!#-<>-\[\]-~]*')  # a value that needs no quotes
ESCAPES = [chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}"
           for byte in range(256)]
ESCAPES[ord('"')], ESCAPES[ord("\\")] = '\\"', "\\\\"


def quote(value: Any) -> str:
    """Quote bytes, or any text, as printable ASCII."""
    if not isinstance(value, bytes):
        value = str(value).encode("utf-8", "surrogatepass")
    return '"' + value.decode("latin-1").translate(ESCAPES) + '"'


@functools.lru_cache(maxsize=1)
def utc_time(second: int) -> str:
    """Format the seconds of the system's clock, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(second))


def format_text(event: str, fields: dict[str, Any]) -> str:
    """Format an event as key=value; numbers and plain words need no quotes."""
    words = [event]
    for key, value in fields.items():
        if isinstance(value, int) or (
                isinstance(value, str) and PLAIN.fullmatch(value)):
            words.append(f"{key}={value}")
        else:
            words.append(f"{key}={quote(value)}")
    return " ".join(words)


def format_json(event: str, fields: dict[str, Any]) -> str:
    """Format an event as JSON, the time first."""
    import json  # not needed for text
    return json.dumps(
        {"time": utc_time(int(time.time())), "event": event, **fields},
        default=lambda line: line.decode("utf-8", "backslashreplace"))


def network_of(host: str) -> str:
    """Give the IPv4 /24 or the IPv6 /48 of an address."""
    if ":" not in host:
        return re.sub(r"\.[0-9]+$", ".0/24", host)
    packed = socket.inet_pton(socket.AF_INET6, host)
    return socket.inet_ntop(socket.AF_INET6, packed[:6] + bytes(10)) + "/48"


def is_journal() -> bool:
    """Is stderr systemd's journal?  See systemd.exec(5), JOURNAL_STREAM.

    A line there begins with its severity: see sd-daemon(3).
    """
    info = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{info.st_dev}:{info.st_ino}"


class LogFile:
    """An open file, pipe or terminal.

    A pipe or terminal that is not full takes PIPE_BUF bytes at once; a longer
    line could have to wait (pipe(7)).  A file takes any line.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.journal = fd == 2 and is_journal()
        self.limit = sys.maxsize        # bytes of a line
        self.pipe_poll: Any = None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            self.limit = select.PIPE_BUF - len("\n")
            self.pipe_poll = select.poll()
            self.pipe_poll.register(fd, select.POLLOUT)

    def write(self, line: bytes) -> None:
        """Write a line without waiting; raise OSError if it is lost."""
        if self.pipe_poll and not self.pipe_poll.poll(0):
            raise BlockingIOError
        if os.write(self.fd, line + b"\n") <= len(line):
            raise OSError("only a part was written")

    def close(self) -> None:
        if self.fd != 2:
            with contextlib.suppress(OSError):      # it is closed anyway
                os.close(self.fd)


class Syslog(socket.socket):
    """A datagram socket to syslog(3); reconnects if syslog has restarted.

    In a chroot it cannot reconnect to a path outside; over UDP it can, and
    systemd-journald keeps its socket.
    """

    limit = MAX_SYSLOG

    def __init__(self, address: str | tuple[str, int]) -> None:
        """Connect to a path or host; raise OSError if that fails."""
        family: int = socket.AF_UNIX
        self.address: Any = address
        if not isinstance(address, str):    # a name is looked up only here
            found = socket.getaddrinfo(*address, type=socket.SOCK_DGRAM)
            family, self.address = found[0][0], found[0][4]
        super().__init__(family, socket.SOCK_DGRAM)
        try:
            self.connect(self.address)
        except OSError:
            self.close()
            raise

    def write(self, line: bytes) -> None:
        """Send a line without waiting; raise OSError if it is lost."""
        try:
            self.send(line, DONT_WAIT)
        except OSError:         # it may have restarted
            self.connect(self.address)
            self.send(line, DONT_WAIT)


class Log:
    """The log, one event a line, as key=value or JSON.

    Any thread may write; a line is one system call.  The logging module is
    not used: its lines cost more, and can wait for whoever reads them.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()    # held from a line's format to its end
        self.output: LogFile | Syslog = LogFile(2)
        self.lost = 0                   # lines that could not be written
        self.open(convert_core({}, {}, None, Notes()).log)

    def open(self, settings: Any,
             owner: tuple[int, int] | None = None) -> None:
        """Use the settings of [log]; if OSError is raised, none has changed.

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
            self.format = (format_json if settings.format == "json" else
                           format_text)
            self.hide = {"network": network_of,
                         "none": lambda host: "-"}.get(settings.client)
            self.facility = FACILITIES.index(settings.facility)
            self.prefix = settings.prefix
        if output is not old:
            old.close()

    def event(self, level: str, event: str, **fields: Any) -> None:
        """Write a line if its level is wanted, the fields in their order.

        If the client's address is hidden, so are its port and PROXY header.
        """
        if LEVELS.index(level) < self.level:
            return
        if self.hide and "client" in fields:
            fields["client"] = self.hide(fields["client"])
            if "port" in fields:
                fields["port"] = 0
            if fields.get("q", b"").startswith((PROXY_1, PROXY_2)):
                fields["q"] = PROXY_1
        with self.lock:
            try:
                if self.lost:
                    self.output.write(
                        self.line("warning", "lost", {"lines": self.lost}))
                    self.lost = 0
                self.output.write(self.line(level, event, fields))
            except OSError:
                self.lost += 1

    def report(self, backend: str, text: str, level: str = "warning") -> None:
        """Write what a backend reports."""
        self.event(level, "backend", name=backend, text=text)

    def line(self, level: str, event: str, fields: dict[str, Any]) -> bytes:
        """Format an event; cut its longest value until the line fits."""
        head = self.head(level)
        line = head + self.format(event, fields)
        limit = self.output.limit
        while len(line) > limit and any(fields.values()):
            key = max(fields, key=lambda key: len(str(fields[key])))
            value = fields[key]
            text = value if isinstance(value, bytes) else str(value)
            fields[key] = text[:len(text) * limit // len(line)]
            line = head + self.format(event, fields)
        return line.encode()

    def head(self, level: str) -> str:
        """Give what the output needs in front; JSON has its own time."""
        if isinstance(self.output, Syslog):
            return (f"<{self.facility * 8 + SEVERITY[level]}>"
                    f"{self.prefix}[{os.getpid()}]: ")
        if self.output.journal:         # which names the program itself
            return f"<{SEVERITY[level]}>"
        if self.format is format_json:
            return ""
        if self.output.fd == 2:
            return f"{self.prefix}: "
        return f"{utc_time(int(time.time()))} "


# ---- Stats ----------------------------------------------------------------

STATS_PERIOD = 15.0     # seconds from one write to the next
BUCKETS = (             # upper bounds in the histogram, in seconds
    .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10)


class Stats:
    """Numbers for Prometheus, kept if the config names a file for them."""

    def __init__(self) -> None:
        self.queries: Any = collections.Counter()   # by outcome and backend
        self.buckets = [0] * (len(BUCKETS) + 1)
        self.seconds = 0.0
        self.failing = ""           # where the last write has failed

    def count(self, reply: Reply, seconds: float) -> None:
        self.queries[reply.outcome, reply.backend] += 1
        self.buckets[bisect.bisect_left(BUCKETS, seconds)] += 1
        self.seconds += seconds

    def text(self, clients: int, threads: int, reloads: dict[str, int]) -> str:
        """Format the numbers for node_exporter's textfile collector."""
        counts = list(itertools.accumulate(self.buckets))
        lines = ["# TYPE fingerd_queries_total counter"]
        lines += [f'fingerd_queries_total{{outcome="{outcome}",'
                  f'backend="{backend}"}} {number}'
                  for (outcome, backend), number in self.queries.items()]
        lines += ["# TYPE fingerd_query_seconds histogram"]
        lines += [f'fingerd_query_seconds_bucket{{le="{bound}"}} {number}'
                  for bound, number in zip([*BUCKETS, "+Inf"], counts)]
        lines += [
            f"fingerd_query_seconds_sum {self.seconds:.6f}",
            f"fingerd_query_seconds_count {counts[-1]}",
            "# TYPE fingerd_clients gauge", f"fingerd_clients {clients}",
            "# TYPE fingerd_threads gauge", f"fingerd_threads {threads}",
            "# TYPE fingerd_reloads_total counter"]
        lines += [f'fingerd_reloads_total{{result="{result}"}} {number}'
                  for result, number in reloads.items()]
        return "\n".join(lines) + "\n"


def replace_file(path: str, text: str) -> None:
    """Replace a file, readable by all, so that nobody sees a part of it."""
    new = f"{path}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new)              # a crash may have left it
    with open(new, "xb") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(text.encode())
    os.rename(new, path)


# ---- Answers --------------------------------------------------------------

class WouldWait(Exception):
    """Only a thread can answer, as a backend that may block must be asked."""


class Answers:
    """Policy and backends of one config: what is answered, and to whom."""

    def __init__(self, config: Any, log: Log) -> None:
        self.config = config
        self.log = log
        self.limits = config.limits
        self.backends = config.backends
        self.aliases = config.aliases
        for _, backend in config.backends:
            if hasattr(backend, "limit_threads"):
                backend.limit_threads(config.limits.max_threads)
        server = config.server
        self.header = to_wire(server.header) if server.header else b""
        self.footer = to_wire(server.footer) if server.footer else b""
        self.names = frozenset({"localhost", *(
            server.hostname or (socket.gethostname().lower(),))})
        self.own_ports: set[int] = set()    # we listen on them
        self.guarded = bool(server.allow or server.deny or server.proxy_from)
        self.framing = bool(self.header or self.footer)
        # Caches of functions, not methods: cycles would keep old configs.
        self.allows = functools.lru_cache(maxsize=4096)(functools.partial(
            is_allowed, server.allow, server.deny))
        self.is_balancer = functools.lru_cache(maxsize=256)(functools.partial(
            is_in, server.proxy_from))

    def answer(self, query: Query, client: str,
               deadline: float | None = None) -> Reply:
        """Answer a client's query before deadline (monotonic seconds).

        Without a deadline, raise WouldWait rather than wait for a backend.
        """
        if query.hosts:
            return self.forward(query, deadline)
        if not query.users:
            return self.list_users(query, client, deadline)
        users = query.users
        if self.aliases:
            users = tuple(name for user in users
                          for name in self.aliases.get(user.lower(), (user,)))
            if len(users) > MAX_USERS:
                return FIXED_REPLIES["malformed"]
        if len(users) == 1:
            reply = self.look_up(users[0], query.verbose, client, deadline)
        else:
            reply = join_replies([
                self.look_up(user, query.verbose, client, deadline)
                for user in users])
        if self.framing or len(reply.data) > self.limits.max_reply:
            return self.frame(reply)
        return reply

    def frame(self, reply):
        """Put header and footer around an answer; cut it to max_reply."""
        data, limit = reply.data, self.limits.max_reply
        if reply.outcome in ("answered", "list"):
            data = self.header + data[:limit + 1] + self.footer
        return reply._replace(data=truncate(data, limit))

    def look_up(self, user, verbose, client, deadline):
        """Ask the backends in order until one knows the user, or fails."""
        for name, backend in self.backends:
            reply = self.ask(name, backend, deadline, client, verbose, user)
            if reply:
                return reply
        return FIXED_REPLIES["unknown"]

    def list_users(self, query, client, deadline):
        """Give the welcome text, or the joined lists of the backends."""
        server = self.config.server
        if server.welcome:
            return self.frame(Reply("list", to_wire(server.welcome)))
        if not server.user_list:
            return FIXED_REPLIES["list-denied"]
        replies = []
        for name, backend in self.backends:
            if hasattr(backend, "user_list"):
                reply = self.ask(name, backend, deadline, client,
                                 query.verbose)
                if reply and reply.outcome == "failed":
                    return reply
                replies += [reply] if reply else []
        if not replies:
            return FIXED_REPLIES["list-denied"]
        data = b"".join(reply.data for reply in replies)
        return self.frame(Reply(
            "list", data, ",".join(reply.backend for reply in replies)))

    def ask(self, name, backend, deadline, client, verbose, user=""):
        """Give a backend's reply for a user, or its list; None if it has none.

        Logs a failure.  Raises WouldWait if it needs a deadline, and has none.
        """
        if backend.waits and deadline is None:
            raise WouldWait
        try:
            left = seconds_left(deadline) if backend.waits else 0.0
            if user:
                answer = backend.lookup(user, verbose, client, left)
            else:
                answer = backend.user_list(verbose, client, left)
            if answer is None:
                return None
            if not isinstance(answer, bytes):
                answer = to_wire(answer[:self.limits.max_reply + 1])
            return Reply("answered", answer, name)
        except OSError as error:
            self.log.event("warning", "failed", backend=name, client=client,
                           reason=reason(error))
        except Exception:
            self.log.event("error", "bug", backend=name, client=client,
                           traceback=format_traceback())
        return FIXED_REPLIES["failed"]._replace(backend=name)

    def forward(self, query, deadline):
        """Send the query on to its last host, if the config allows that."""
        *others, host = query.hosts
        host = host.lower().rstrip(".").strip("[]")
        port = self.config.server.forward.get(host)
        if port is None or not all(query.hosts) or (
                len(query.hosts) > MAX_HOSTS):
            return FIXED_REPLIES["forward-denied"]
        if deadline is None:
            raise WouldWait
        line = ("/W " if query.verbose else "") + "@".join(
            ["".join(query.users), *others])
        try:
            answer = fetch_finger(find_host(host, port), line,
                                  self.limits.max_reply, deadline,
                                  self.own_ports)
        except OSError as error:
            self.log.event("warning", "failed", forward=f"{host}:{port}",
                           reason=reason(error))
            return FIXED_REPLIES["failed"]
        return Reply("forwarded",
                     truncate(to_wire(answer), self.limits.max_reply))

    def resolve_hops(self) -> None:
        """Look the hosts in `forward` up now: in a chroot that would fail."""
        for host, port in self.config.server.forward.items():
            try:
                CHROOT_HOSTS[host, port] = find_host(host, port)
            except OSError as error:
                self.log.event("warning", "failed", forward=f"{host}:{port}",
                               reason=reason(error))


def is_allowed(allow, deny, host):
    """May this address ask?  A deny wins over any allow."""
    return not is_in(deny, host) and (not allow or is_in(allow, host))


def is_in(networks, host):
    """Is an address in one of these networks?"""
    if not networks:
        return False
    import ipaddress  # to_network() has loaded it
    address = ipaddress.ip_address(host)
    return any(address in network for network in networks)


# ---- Forwarding -----------------------------------------------------------

CHROOT_HOSTS: dict[tuple[str, int], Any] = {}   # looked up before the chroot
REFUSALS = {reply.data.decode().strip() for reply in FIXED_REPLIES.values()}
LIST_DENIED = FIXED_REPLIES["list-denied"].data.decode().strip()
UNKNOWN = re.compile(           # as fingerd, Debian's finger and the BSDs say
    r"((finger: )?(\S+: )?no such user\.?)?", re.IGNORECASE)


def plain_address(host: str) -> str:
    """Give an address without its scope, and an IPv4-mapped one as IPv4."""
    host = host.partition("%")[0]
    return host[7:] if host.startswith("::ffff:") and "." in host else host


def find_host(host: str, port: int) -> Any:
    """Give the addresses of a host as getaddrinfo() does; raise OSError.

    For * these are the addresses to listen on.
    """
    try:
        return CHROOT_HOSTS.get((host, port)) or socket.getaddrinfo(
            None if host == "*" else host, port, type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE)
    except UnicodeError:
        raise OSError("not a host name") from None


def fetch_finger(found: Any, line: str, limit: int, deadline: float,
                 own_ports: Container[int] = ()) -> str:
    """Ask another finger server; give its answer, or the start of a long one.

    Stops after limit bytes.  Raises OSError, TimeoutError at the deadline.
    """
    answer = b""
    try:
        with connect_before(deadline, found) as sock:
            if sock.getpeername()[1] in own_ports and is_own_end(sock):
                raise OSError("the next hop is this server itself")
            sock.sendall(line.encode() + b"\r\n")
            while len(answer) <= limit:
                sock.settimeout(seconds_left(deadline))
                data = sock.recv(65536)
                if not data:
                    break
                answer += data
    except socket.timeout:      # before Python 3.10 another class
        raise TimeoutError("timed out") from None
    return answer.decode("utf-8", "backslashreplace")


def connect_before(deadline: float, found: Any) -> socket.socket:
    """Connect to the first of the addresses that accepts in time."""
    failure = OSError("the host has no address")
    for tried, (family, kind, protocol, _, address) in enumerate(found):
        sock = socket.socket(family, kind, protocol)
        try:    # share the time: a dead address must leave some to the next
            sock.settimeout(seconds_left(deadline) / (len(found) - tried))
            sock.connect(address)
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure


def is_own_end(sock: socket.socket) -> bool:
    """Does this connection lead back to this host?"""
    peer, own = (plain_address(address[0]) for address
                 in (sock.getpeername(), sock.getsockname()))
    return peer == own or peer.startswith("127.")


def seconds_left(deadline: float) -> float:
    """Give the seconds to a monotonic deadline; TimeoutError if it is over."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("no time is left")
    return left


class RemoteBackend:
    """Another finger server, as a backend.

    It is not asked for a client that has its address: two servers that name
    each other would ask each other for ever.
    """

    waits = True
    settings = (
        ("host", "server", "", "finger server to ask: host, or host:port"),
        ("max_output", "size", "64K", "bytes that are read of an answer"),
    )

    def __init__(self, options: dict[str, Any],
                 report: Callable[..., None]) -> None:
        if not options["host"]:
            raise ValueError("host: is empty; write e.g. host ="
                             " two.example.org")
        self.address: tuple[str, int] = options["host"]
        self.max_output: int = options["max_output"]
        # What is being asked, by line: when that is done, and the answer.
        self.asked: dict[str, tuple[threading.Event, list[str]]] = {}

    def enter_chroot(self, path: str) -> None:
        try:
            CHROOT_HOSTS[self.address] = find_host(*self.address)
        except OSError:
            raise ValueError(
                f"host: no address of {self.address[0]} is found, nor will be"
                " in the chroot; write an address instead of the name"
            ) from None

    def lookup(self, user: str, verbose: bool, client: str,
               timeout: float) -> bytes | None:
        """Give the server's answer; None if it says "no such user"."""
        deadline = time.monotonic() + timeout
        found = find_host(*self.address)
        hosts = {plain_address(info[4][0]) for info in found}
        if any(host.startswith("127.") for host in hosts):
            hosts.add("127.0.0.1")      # from there all of these are asked
        if client in hosts:
            return None
        answer = self.ask("/W " * verbose + user, found, deadline)
        said = answer.strip()
        if UNKNOWN.fullmatch(said) or not user and said == LIST_DENIED:
            return None
        if said in REFUSALS:
            raise OSError(f'it says "{said}"')
        return truncate(to_wire(answer), self.max_output)

    def ask(self, line: str, found: Any, deadline: float) -> str:
        """Ask, once for all that ask the same at the same time.

        Servers in a circle would ask on, each with a deadline of its own.
        """
        first: tuple[threading.Event, list[str]] = threading.Event(), []
        done, answers = self.asked.setdefault(line, first)
        if done is first[0]:
            try:
                answers.append(fetch_finger(found, line, self.max_output,
                                            deadline))
            finally:
                del self.asked[line]
                done.set()
        else:
            done.wait(seconds_left(deadline))
        if not answers:
            raise TimeoutError("the same was asked before, and got no answer")
        return answers[0]

    def user_list(self, verbose: bool, client: str,
                  timeout: float) -> bytes | None:
        """Give its answer to the empty query; None if it denies a list."""
        return self.lookup("", verbose, client, timeout)


BACKENDS["remote"] = RemoteBackend


# ---- PROXY header ---------------------------------------------------------

# A load balancer begins a connection with a header, which gives the address
# of the client.  See proxy-protocol.txt of HAProxy: version 1 is a line, 2 is
# binary.  It may come in any number of segments, and the query with the last.

PROXY_1 = b"PROXY "
PROXY_2 = b"\r\n\r\n\0\r\nQUIT\n"
PROXY_WORDS = re.compile(rb"PROXY (?:UNKNOWN(?: .*)?|TCP([46]) (\S+) (\S+)"
                         rb" (0|[1-9]\d{0,4}) (0|[1-9]\d{0,4}))")
MAX_PROXY_1 = 107       # bytes, with the CRLF
MAX_PROXY_2 = 4096      # bytes, with extensions: what one recv() asks for
PROXY_LOCAL, PROXY_COMMAND = 0x20, 0x21     # the 2 is the version
PROXY_LAYOUTS = {       # source, destination, and their ports
    1: (socket.AF_INET, "!4s4sHH"), 2: (socket.AF_INET6, "!16s16sHH")}


class ProxyHeader(NamedTuple):
    """What a header says."""

    size: int                   # bytes
    client: tuple[str, int] | None = None   # None: the balancer is the client
    reached: str = ""           # the address that the client has connected to


def parse_proxy_header(data: bytes) -> ProxyHeader | None:
    """Parse a header; None if it is not complete.

    Raises MalformedQuery if data is not the start of one.
    """
    if PROXY_2.startswith(data[:len(PROXY_2)]):
        return parse_proxy_2(data)
    if PROXY_1.startswith(data[:len(PROXY_1)]):
        return parse_proxy_1(data)
    raise MalformedQuery("no PROXY header")


def parse_proxy_1(data: bytes) -> ProxyHeader | None:
    line, end, _ = data[:MAX_PROXY_1].partition(b"\r\n")
    if not end and len(data) < MAX_PROXY_1 and b"\n" not in line:
        return None
    match = PROXY_WORDS.fullmatch(line)
    if not end or not match:
        raise MalformedQuery("not a PROXY line")
    size = len(line) + len(end)
    if not match[1]:
        return ProxyHeader(size)
    family = socket.AF_INET if match[1] == b"4" else socket.AF_INET6
    port = int(match[4])
    try:
        source = socket.inet_pton(family, match[2].decode())
        reached = socket.inet_pton(family, match[3].decode())
    except (OSError, ValueError):
        raise MalformedQuery("bad address in a PROXY line") from None
    if max(port, int(match[5])) > MAX_PORT:
        raise MalformedQuery("bad port in a PROXY line")
    return ProxyHeader(size, (address_from(family, source), port),
                       address_from(family, reached))


def parse_proxy_2(data: bytes) -> ProxyHeader | None:
    start = len(PROXY_2) + 4
    if len(data) < start:
        return None
    command, kind, length = struct.unpack_from("!BBH", data, len(PROXY_2))
    family, transport = kind >> 4, kind & 15
    size = start + length
    if size > MAX_PROXY_2 or command != PROXY_LOCAL and (
            command != PROXY_COMMAND or family > 3 or transport > 2):
        raise MalformedQuery("not version 2 of a PROXY header")
    if len(data) < size:
        return None
    if command == PROXY_LOCAL or not transport or family not in PROXY_LAYOUTS:
        return ProxyHeader(size)
    family, layout = PROXY_LAYOUTS[family]
    if length < struct.calcsize(layout):
        raise MalformedQuery("PROXY header without addresses")
    source, reached, port, _ = struct.unpack_from(layout, data, start)
    return ProxyHeader(size, (address_from(family, source), port),
                       address_from(family, reached))


def address_from(family: int, packed: bytes) -> str:
    return plain_address(socket.inet_ntop(family, packed))


# ---- Clients --------------------------------------------------------------

# How a client is served.  FingerServer has one loop for all clients.  Only
# backends that wait are asked in threads: a thread answers one client after
# another, and between two it waits for work.
#
#     listener > accept_clients > process_request > FingerHandler.handle:
#
#                read the line > ask > send, log > has it closed?
#         yields     READ        ASK     WRITE      LEFT, CLOSE
#
# handle() is the whole life of a client, from top to bottom.  It is a
# generator: instead of waiting, it yields what it waits for.  The loop
# resumes it when that has come, or throws a Deadline in when its time is
# over.  Most lines are there when their clients are accepted, so handle()
# runs to LEFT at once.  LEFT is a moment in which most clients close: to look
# once after it costs less than to watch each of them.  A client whose address
# is at its limit yields LATER first: the loop then looks whether others of
# that address have closed.
#
# What the loop knows is in the classes of the next section.  They touch no
# client's socket: Counts (connections by address), Rates (queries by
# address), Waiting (handlers that wait), Lookups (the queue for threads),
# Door (when to accept), Inbox (what signals and threads leave for the loop).

GRACE = 0.5             # seconds for a backend to return after its timeout
LINGER = 0.01           # seconds until we look whether a client has closed
DISCARD = 1 << 18       # bytes to discard after a query; more is a flood
SEND = DONT_WAIT | int(getattr(socket, "MSG_MORE", 0))  # the FIN joins it


class Deadline(TimeoutError):
    """A client's time is over.  (ETIMEDOUT raises another TimeoutError.)"""


class Wait:
    """What a client waits for."""

    def __init__(self, events: int = 0) -> None:
        self.events = events        # of its socket, for the selector


LATER = Wait()                          # the next turn of the loop
READ = Wait(selectors.EVENT_READ)       # more of the line
ASK = Wait()                            # the reply of a thread
WRITE = Wait(selectors.EVENT_WRITE)     # room for the reply
LEFT = Wait()                           # the end of LINGER
CLOSE = Wait(selectors.EVENT_READ)      # its close
NOTHING = Wait()                        # none of these, or LEFT


@functools.lru_cache(maxsize=4096)
def address_key(host: str) -> str:
    """Give what limits count as one address: all of IPv4, a /64 of IPv6."""
    if ":" not in host:
        return host
    return socket.inet_pton(socket.AF_INET6, host)[:8].hex()


class FingerHandler(socketserver.StreamRequestHandler):
    """One client.  receive(), send() and has_left() return True when done."""

    server: FingerServer
    line: QueryLine | None = None       # if it comes in parts
    text: bytes | bytearray = b""       # of the line
    query: Query | None = None
    reply = GONE
    reached = ""                # our address, if a PROXY header names it
    sent = discarded = 0        # bytes
    wait, deadline = NOTHING, 0.0

    def __init__(self, request, client_address, server):
        self.request, self.client_address = request, client_address
        self.server = server
        self.host = self.key = client_address[0]
        if ":" in self.host:
            self.host = plain_address(self.host)
            self.key = address_key(self.host)
        self.started = time.monotonic()
        self.steps = self.handle()      # the server runs it

    def fileno(self):
        return self.request.fileno()

    def handle(self):
        """Serve the client; yield what it has to wait for."""
        try:
            try:
                if self.server.answers.guarded:
                    yield from self.check_access()
                if self.is_crowded():
                    yield LATER
                    if self.is_crowded():
                        raise Refused(FIXED_REPLIES["limited"])
                while not self.receive():
                    yield READ
                self.check_rate()
                if not self.query:
                    self.query = parse_query(self.text, self.own_names)
                try:
                    self.reply = self.server.answers.answer(self.query,
                                                            self.host)
                except WouldWait:
                    self.reply = yield ASK
            except Refused as refused:
                self.reply = refused.reply
            except MalformedQuery:
                self.reply = FIXED_REPLIES["malformed"]
            except Deadline:
                self.reply = self.overdue_reply()
            while not self.send():
                yield WRITE
        except OSError:                 # it has left, or does not read
            self.log_query(GONE)
            return
        self.log_query(self.reply)
        yield LEFT
        while not self.has_left():
            yield CLOSE

    def check_access(self):
        """Refuse a denied address; a load balancer names the client first."""
        answers = self.server.answers
        if answers.is_balancer(self.host):
            self.count_for("")
            yield from self.receive_header()
        if self.key and not answers.allows(self.host):
            raise Refused(FIXED_REPLIES["denied"])

    def receive_header(self):
        """Read a PROXY header; from then on serve the client that it names."""
        header = None
        while not header:
            try:
                data = self.request.recv(MAX_PROXY_2, DONT_WAIT | PEEK)
            except BlockingIOError:
                yield READ
                continue
            if not data:
                raise MalformedQuery if self.text else Refused(SILENCE)
            start = len(self.text)
            self.text += data
            header = parse_proxy_header(bytes(self.text))
            # The query after the header stays in the socket.
            self.request.recv(header.size - start if header else len(data))
        self.text = b""
        self.reached = header.reached
        if header.client:
            self.client_address = header.client
            self.host = header.client[0]
            self.count_for(address_key(self.host))

    def count_for(self, key):
        """Count this connection for another address; "" is exempt."""
        self.server.hosts.remove(self.key)
        self.server.hosts.add(key)
        self.key = key

    def is_crowded(self):
        """Has this address more connections than it may have?"""
        return self.key and (
            self.server.hosts[self.key]
            > self.server.answers.limits.max_clients_per_host)

    def check_rate(self):
        """Count a query, and refuse it if the address asks too often."""
        rate = self.server.answers.limits.queries_per_minute
        if rate and self.key and self.server.rates.exceeded(
                self.key, rate, time.monotonic()):
            raise Refused(FIXED_REPLIES["limited"])

    def receive(self):
        """Read what has come of the line; is it complete?"""
        limit = self.server.answers.limits.max_query
        try:
            data = self.request.recv(READ_SIZE, DONT_WAIT)
        except BlockingIOError:
            return False
        if not self.line:
            if not data:
                raise Refused(SILENCE)
            text = data.rstrip(b"\r\n")
            if data.endswith(b"\n") and len(data) <= limit and is_plain(text):
                self.text = text        # as most are: no more is needed
                self.query = Query((text.decode(),), False, ())
                return True
            if data.startswith(PROXY_2):
                raise MalformedQuery("PROXY header, but not from proxy_from")
            self.line = QueryLine(limit)
            self.text = self.line.text
        try:
            return self.line.add(data)
        except LineTooLong:
            self.check_rate()
            raise Refused(FIXED_REPLIES["too-long"]) from None

    def own_names(self):
        """Give this host's names, and the address the client connected to."""
        address = self.reached or plain_address(self.request.getsockname()[0])
        return self.server.answers.names | {address, f"[{address}]"}

    def overdue_reply(self):
        """Give the reply to a client whose time is over."""
        if self.wait is not ASK:
            started = self.line or self.text
            return FIXED_REPLIES["timeout" if started else "silent"]
        state = "asking" if self in self.server.lookups.running else "queued"
        self.server.log.event(
            "warning", "failed", client=self.host,
            reason=f"no backend answered in time ({state})")
        return FIXED_REPLIES["failed"]

    def send(self):
        """Send what the client takes; after all of it, our end of file."""
        data = self.reply.data
        try:
            self.sent += self.request.send(
                memoryview(data)[self.sent:] if self.sent else data, SEND)
        except BlockingIOError:
            return False
        if self.sent < len(data):
            return False
        self.request.shutdown(socket.SHUT_WR)
        return True

    def log_query(self, reply):
        """Count the connection, and write its line of the log."""
        server = self.server
        server.outcomes[reply.outcome] += 1
        if server.stats:
            server.stats.count(reply, time.monotonic() - self.started)
        if server.log.level <= INFO:
            server.log.event(
                "info", "query", client=self.host,
                port=self.client_address[1], q=bytes(self.text),
                outcome=reply.outcome, backend=reply.backend, bytes=self.sent,
                ms=int((time.monotonic() - self.started) * 1000))

    def has_left(self):
        """Discard what follows the line; is it time to close?

        To close with bytes unread would send a reset, and the client could
        lose the reply (RFC 1122 4.2.2.13).
        """
        try:
            while self.discarded <= DISCARD:
                data = self.request.recv(READ_SIZE, DONT_WAIT)
                if not data:
                    return True
                self.discarded += len(data)
        except BlockingIOError:
            # Refused clients get no time to close: they would fill the server.
            return self.reply.outcome in ("denied", "limited")
        except OSError:
            pass
        return True


# ---- Waiting --------------------------------------------------------------

TRACKED = 65536         # addresses whose rate is known; the oldest go first
HOST_SHARE = 4          # one address gets at most 1/4 of the threads
FULL_LOG_INTERVAL = 10.0    # seconds between two lines "full"
SO_ATTACH_FILTER = 26   # Linux: socket(7)
DROP_SYN = (            # BPF for a TCP segment: drop it if it has SYN
    (0x30, 0, 0, 13), (0x45, 0, 1, 2), (6, 0, 0, 0), (6, 0, 0, 0xffff))


class Counts(dict):
    """Numbers by key; a key whose number is 0 is removed."""

    total = 0

    def add(self, key):
        self.total += 1
        self[key] = self.get(key, 0) + 1

    def remove(self, key):
        self.total -= 1
        self[key] -= 1
        if not self[key]:
            del self[key]


class Rates:
    """Token buckets by key: each holds a minute's queries, and refills."""

    def __init__(self):
        self.buckets = collections.OrderedDict()

    def exceeded(self, key, rate, now):
        """Count a query; is it one too many, at rate a minute?"""
        tokens, then = self.buckets.pop(key, (rate, now))
        tokens = min(rate, tokens + (now - then) * rate / 60)
        self.buckets[key] = (tokens if tokens < 1 else tokens - 1, now)
        if len(self.buckets) > TRACKED:
            self.buckets.popitem(last=False)
        return tokens < 1


class Waiting:
    """Handlers that wait, by what they wait for; the first is due first."""

    def __init__(self):
        self.handlers: Any = {
            wait: {} for wait in (LATER, READ, ASK, WRITE, CLOSE)}
        self.left: Any = collections.deque()    # those in LEFT: most clients
        self.due = math.inf         # no handler but in LEFT is due before

    def add(self, handler, wait, deadline):
        handler.wait, handler.deadline = wait, deadline
        self.handlers[wait][handler] = None
        if deadline < self.due:
            self.due = deadline

    def add_left(self, handler, deadline):
        handler.deadline = deadline
        self.left.append(handler)

    def take_left(self, now):
        """Remove and yield the handlers in LEFT that are due."""
        while self.left and self.left[0].deadline <= now:
            yield self.left.popleft()

    def timeout(self, now):
        """Give the selector's timeout: None for ever, or an hour at most.

        On some systems it may not be more than 24 days.
        """
        due = self.due
        if self.left and self.left[0].deadline < due:
            due = self.left[0].deadline
        return None if due == math.inf else max(0, min(due - now, 3600))

    def remove(self, handler):
        del self.handlers[handler.wait][handler]
        handler.wait = NOTHING

    def overdue(self, now):
        """Yield the other handlers that are due; find when the next is."""
        for wait, handlers in self.handlers.items():
            overdue = []
            for handler in handlers:
                if handler.deadline > now:
                    break
                overdue.append(handler)
            for handler in overdue:
                if handler.wait is wait:    # else it has ended meanwhile
                    yield handler
        self.due = min((next(iter(handlers)).deadline for handlers
                        in self.handlers.values() if handlers),
                       default=math.inf)

    def hurry(self, deadline, *waits):
        """Bring the deadlines of handlers in these waits forward."""
        for wait in waits:
            for handler in self.handlers[wait]:
                handler.deadline = min(handler.deadline, deadline)
        self.due = min(self.due, deadline)


class Lookups:
    """The queue for threads, in which addresses take turns.

    One address has at most a quarter of the places, which are max_threads.
    A thread is late when its client waits no longer.  It then has no place,
    unless there are already as many late threads as places.
    """

    def __init__(self):
        self.queued = collections.OrderedDict()     # handlers by address
        self.running = set()                # handlers that a thread works for
        self.late = 0                       # threads: see above
        self.threads = Counts()             # by address, with the late ones
        self.idle = 0                       # threads that wait for work
        self.work: Any = queue.SimpleQueue()    # handlers; None: end a thread

    def add(self, handler):
        self.queued.setdefault(handler.key, {})[handler] = None

    def next(self, places):
        """Give the handler whose turn it is; None if there is no place."""
        if len(self.running) + max(0, self.late - places) < places:
            share = max(1, places // HOST_SHARE)
            for key, handlers in self.queued.items():
                if self.threads.get(key, 0) < share:
                    return next(iter(handlers))
        return None

    def begin(self, handler):
        """Count a thread for a handler; its address goes to the end."""
        self.unqueue(handler)
        if handler.key in self.queued:
            self.queued.move_to_end(handler.key)
        self.running.add(handler)
        self.threads.add(handler.key)

    def unqueue(self, handler):
        del self.queued[handler.key][handler]
        if not self.queued[handler.key]:
            del self.queued[handler.key]

    def give_up(self, handler):
        """Forget a handler: its thread is late, or it leaves the queue."""
        if handler in self.running:
            self.running.remove(handler)
            self.late += 1
        else:
            self.unqueue(handler)

    def end(self, handler):
        """Count a late thread as idle."""
        self.late -= 1
        self.threads.remove(handler.key)
        self.idle += 1


class Door:
    """The listening sockets: when to accept, and how many in a row."""

    def __init__(self, listeners, log):
        self.listeners = listeners
        for listener in listeners:
            listener.setblocking(False)
        self.log = log
        self.watched = False            # does the selector watch them?
        self.accepts = 8.0              # in a row
        self.full_logged = self.starved_logged = False
        self.next_full_log = -math.inf
        self.paused = False

    def is_open(self, connections, limit, now):
        """May clients be accepted?  Log when full, and when no longer."""
        full = connections >= limit
        if self.full_logged and not full:
            self.full_logged = False
            self.log.event("notice", "room", clients=connections, limit=limit)
        elif full and not self.full_logged and now >= self.next_full_log:
            self.full_logged = True
            self.next_full_log = now + FULL_LOG_INTERVAL
            self.log.event("warning", "full", clients=connections, limit=limit)
        return not full and not self.paused

    def watch(self, selector, accept):
        """Have the selector call accept for new clients; None: stop that."""
        if self.watched == bool(accept):
            return
        self.watched = bool(accept)
        if accept:      # rotate: the first could take all places
            self.listeners = self.listeners[1:] + self.listeners[:1]
        for listener in self.listeners:
            if accept:
                selector.register(listener, selectors.EVENT_READ, accept)
            else:
                selector.unregister(listener)

    def pause(self, error, connections):
        """Pause if accept failed for lack of resources; log that once."""
        self.paused = error.errno in (errno.EMFILE, errno.ENFILE,
                                      errno.ENOBUFS, errno.ENOMEM)
        if self.paused and not self.starved_logged:
            self.starved_logged = True
            self.log.event("error", "starved", reason=reason(error),
                           clients=connections)
        return self.paused

    def drop_new_connections(self):
        """Have the kernel drop packets that open a connection (Linux).

        The close of a listener resets connections that are not accepted.
        Raises OSError where filters do not exist, or need a right.
        """
        code = array.array("B", b"".join(struct.pack("HBBI", *instruction)
                                         for instruction in DROP_SYN))
        for listener in self.listeners:
            if not listener.passed:     # on those systemd goes on listening
                listener.setsockopt(
                    socket.SOL_SOCKET, SO_ATTACH_FILTER,
                    struct.pack("HP", len(DROP_SYN), code.buffer_info()[0]))

    def close(self):
        for listener in self.listeners:
            listener.close()
        self.listeners = []


class Inbox:
    """What signals and threads leave for the loop, and how they wake it."""

    def __init__(self):
        self.signals: set[int] = set()          # that came, each once
        self.actions: dict[int, Callable[[], None]] = {}    # default: stop
        self.replies: Any = collections.deque()     # (handler, reply)
        self.woken, self.waker = socket.socketpair()
        self.woken.setblocking(False)
        self.waker.setblocking(False)           # set_wakeup_fd requires it

    def wake(self):
        """Wake the loop, from any thread."""
        with contextlib.suppress(OSError):      # full: it wakes anyway, or
            self.waker.send(b"\0")              # closed: it has ended

    def close(self):
        self.woken.close()
        self.waker.close()


# ---- Server ---------------------------------------------------------------

BACKLOG = 1024          # connections the kernel holds for us: see listen(2)
ACCEPTS = 256           # in a row at most, then other clients get their turn
MORE_ACCEPTS = 1.09     # factor after a turn in which none failed
FEWER_ACCEPTS = 0.5     # factor after a failed one: it costs as a turn does
PAUSE = 1.0             # seconds without accept when descriptors run out
LAST_CALL = 0.02        # seconds to accept connections that come with a stop


class FingerServer(socketserver.ThreadingTCPServer):
    """Serves clients in one loop; a thread is only for a backend that waits.

    fileno() and server_address are those of the first listener.
    """

    stats: Stats | None = None
    daemon_threads = True       # we can end while a backend hangs
    stop_deadline = math.inf    # of a stop that has begun

    def __init__(self, listeners: list[Listener], answers: Answers,
                 log: Log) -> None:
        """Take over sockets that listen already."""
        socketserver.BaseServer.__init__(
            self, listeners[0].getsockname() if listeners else ("", 0),
            FingerHandler)
        if listeners:
            self.socket = listeners[0]
        self.answers = answers
        answers.own_ports = {listener.getsockname()[1]
                             for listener in listeners}
        self.log = log
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self.hosts = Counts()           # connections by address
        self.rates = Rates()
        self.waiting = Waiting()
        self.lookups = Lookups()
        self.door = Door(listeners, log)
        self.inbox = Inbox()
        self.chores: dict[Callable[[], float], float] = {}  # when each is due
        self.ended = threading.Event()
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.inbox.woken, selectors.EVENT_READ,
                               self.read_inbox)

    # The loop.

    def serve_forever(self, poll_interval: float = 0) -> None:
        """Serve until stop(), and then until the last client has left."""
        while self.door.listeners or self.hosts.total:
            now = time.monotonic()
            self.watch_door(now)
            for key, _ in self.selector.select(self.waiting.timeout(now)):
                key.data(key.fileobj)
            self.look_at_left(now)
            if now >= self.waiting.due:     # last: serve what has come first
                self.do_what_is_due(now)
        self.ended.set()

    def serve_one(self, sock: socket.socket) -> None:
        """Serve a connection that is open already, and no other."""
        address = "0.0.0.0", 0
        with contextlib.suppress(OSError):      # it has left already
            address = sock.getpeername()
        self.process_request(sock, address)
        self.serve_forever()

    def do_what_is_due(self, now):
        for handler in self.waiting.overdue(now):
            if handler.wait is LATER:
                self.look_at_left(math.inf)     # some may have closed
                self.resume(handler)
            else:
                self.resume(handler, error=Deadline())
        self.start_lookups()        # late threads give their places away
        for chore, due in list(self.chores.items()):
            if now >= due:
                self.chores[chore] = now + chore()
        self.waiting.hurry(min(self.chores.values(), default=math.inf))

    def schedule(self, chore, due=0.0):
        """Have the loop call chore; it gives the seconds to its next time."""
        self.chores[chore] = due
        self.waiting.hurry(due)

    # From a listening socket to a handler.

    def watch_door(self, now):
        """Leave new clients in the kernel's queue at max_clients."""
        limit = self.answers.limits.max_clients
        if self.door.watched and self.hosts.total < limit:
            return
        if self.hosts.total >= limit:
            self.look_at_left(math.inf)             # most of them have closed
            self.door.watch(self.selector, None)    # watching again rotates
        is_open = self.door.is_open(self.hosts.total, limit, now)
        self.door.watch(self.selector,
                        self.accept_clients if is_open else None)

    def accept_clients(self, listener, most=0):
        """Accept as many as came at a time lately, up to max_clients.

        Gives True if no more are in the kernel's queue.
        """
        door = self.door
        room = self.answers.limits.max_clients - self.hosts.total
        for _ in range(min(room, most or int(door.accepts))):
            try:
                request, client_address = listener.accept()
            except BlockingIOError:
                door.accepts = max(1.0, door.accepts * FEWER_ACCEPTS)
                door.starved_logged = False
                return True
            except OSError as error:
                if door.pause(error, self.hosts.total):
                    door.watch(self.selector, None)
                    self.schedule(self.end_pause, time.monotonic() + PAUSE)
                    return False
                continue        # this one has left already: see accept(2)
            self.process_request(request, client_address)
        door.accepts = min(door.accepts * MORE_ACCEPTS, ACCEPTS)
        return False

    def end_pause(self):
        self.door.paused = False
        return math.inf

    def process_request(self, request, client_address):
        """Serve a new client until it has to wait."""
        handler = self.finish_request(request, client_address)
        self.hosts.add(handler.key)
        self.resume(handler)

    def finish_request(self, request, client_address):
        """Make the handler of a client; handle() has not begun."""
        return FingerHandler(request, client_address, self)

    # From one wait of a handler to the next.

    def resume(self, handler, reply=None, error=None):
        """Run a handler to its next wait or end."""
        try:
            if error:
                wait = handler.steps.throw(error)
            else:
                wait = handler.steps.send(reply)
            if wait is not handler.wait:
                self.keep(handler, wait)
        except (StopIteration, OSError):
            self.close_request(handler)
        except Exception:               # a bug ends this client, no other
            self.handle_error(handler.request, handler.host)
            self.close_request(handler)

    def keep(self, handler, wait):
        """Keep a handler until what it waits for has come."""
        if handler.wait is not NOTHING:
            self.forget(handler)
        if wait is LEFT:
            self.waiting.add_left(handler, time.monotonic() + LINGER)
            return
        try:
            if wait.events:
                self.selector.register(handler, wait.events, self.resume)
        except OSError as error:
            self.log.event("error", "starved", reason=reason(error))
            self.resume(handler, error=error)
            return
        self.waiting.add(handler, wait,
                         time.monotonic() + self.seconds_for(wait))
        if wait is ASK:
            self.lookups.add(handler)
            self.start_lookups()

    def seconds_for(self, wait):
        if wait is LATER:
            return 0
        if self.stop_deadline < math.inf and wait in (READ, CLOSE):
            return GRACE
        return self.answers.limits.timeout + GRACE * (wait is ASK)

    def forget(self, handler):
        """Undo keep()."""
        if handler.wait.events:
            self.selector.unregister(handler)
        elif handler.wait is ASK:
            self.lookups.give_up(handler)
        self.waiting.remove(handler)

    def look_at_left(self, now):
        """Resume the clients in LEFT that are due; most have closed."""
        for handler in self.waiting.take_left(now):
            self.resume(handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a bug with its traceback."""
        self.log.event("error", "bug", client=client_address,
                       traceback=format_traceback())

    def close_request(self, request: Any) -> None:
        """Close the connection of a client: each one ends here."""
        if request.wait is not NOTHING:
            self.forget(request)
        request.request.close()
        self.hosts.remove(request.key)

    # Threads.

    def start_lookups(self):
        """Give threads to the handlers whose turn it is."""
        while True:
            handler = self.lookups.next(self.answers.limits.max_threads)
            if not handler:
                return
            if handler.request.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self.resume(handler, error=ConnectionResetError())
                continue
            if self.lookups.idle:
                self.lookups.idle -= 1
                self.lookups.work.put(handler)
            else:
                try:
                    super().process_request(handler, handler.client_address)
                except RuntimeError as error:   # no thread can be started
                    if self.lookups.threads:
                        return                  # until one of them is idle
                    self.log.event("error", "starved", reason=str(error))
                    self.resume(handler, FIXED_REPLIES["failed"])
                    continue
            self.lookups.begin(handler)

    def process_request_thread(self, request, client_address):
        """Answer clients, one after another: to start a thread is slow."""
        while request:
            try:
                reply = self.answers.answer(request.query, request.host,
                                            request.deadline - GRACE)
            except BaseException:       # sys.exit() in a backend as well
                self.handle_error(request.request, request.host)
                reply = FIXED_REPLIES["failed"]
            self.inbox.replies.append((request, reply))
            self.inbox.wake()
            del request, reply          # free them while there is no work
            request = self.lookups.work.get()
        self.lookups.work.put(None)     # for the next thread

    def read_inbox(self, woken):
        """Act on signals; resume the clients that threads have answered."""
        with contextlib.suppress(BlockingIOError):
            woken.recv(READ_SIZE)
        for _ in range(len(self.inbox.signals)):    # more may come meanwhile
            self.inbox.actions.get(self.inbox.signals.pop(), self.stop)()
        while self.inbox.replies:
            handler, reply = self.inbox.replies.popleft()
            if handler.wait is ASK:         # else its time was over
                self.resume(handler, reply)
            self.lookups.end(handler)
        self.start_lookups()

    # Changes, and the end.

    def change_answers(self, answers: Answers) -> None:
        """Use another config from now on, for connected clients, too."""
        answers.own_ports = self.answers.own_ports
        self.answers = answers
        self.waiting.hurry(time.monotonic() + answers.limits.timeout + GRACE,
                           READ, ASK, WRITE, CLOSE)
        self.start_lookups()            # max_threads may be higher now

    def stop(self) -> None:
        """Take no new clients; have serve_forever() end with the last one."""
        if self.stop_deadline < math.inf:
            return
        now = time.monotonic()
        self.stop_deadline = now + self.answers.limits.timeout + GRACE
        self.waiting.hurry(now + GRACE, READ, CLOSE)
        self.schedule(self.abort, self.stop_deadline)
        self.schedule(self.close_door, now)
        with contextlib.suppress(OSError):      # then there is no last call
            self.door.drop_new_connections()
            self.schedule(self.close_door, now + LAST_CALL)

    def close_door(self):
        """Accept the clients in the queue; close the listening sockets."""
        empty = [self.accept_clients(listener, BACKLOG)
                 for listener in self.door.listeners]
        if not all(empty) and time.monotonic() < self.stop_deadline:
            return LAST_CALL        # they wait for room, or for a descriptor
        self.door.watch(self.selector, None)
        self.door.close()
        return math.inf

    def abort(self):
        """End the clients that are still here: a stop has had its time."""
        self.close_door()
        self.look_at_left(math.inf)
        for handler in self.waiting.overdue(math.inf):
            self.resume(handler, error=ConnectionAbortedError())
        return math.inf

    def shutdown(self) -> None:
        """Stop from another thread, and wait for the end."""
        self.inbox.signals.add(signal.SIGTERM)
        self.inbox.wake()
        self.ended.wait()

    def server_close(self) -> None:
        """Close all sockets, and end the threads."""
        self.lookups.work.put(None)
        self.door.close()
        for handlers in (self.waiting.left, *self.waiting.handlers.values()):
            for handler in handlers:
                handler.request.close()
        self.selector.close()
        self.inbox.close()


# ---- Sockets --------------------------------------------------------------

SPARE_DESCRIPTORS = 32          # log, listeners, selector, Python's own
LOOKUP_DESCRIPTORS = 7          # a thread's socket, or pipes of its process
ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
LISTEN_HINTS = {
    errno.EACCES: "; start as root, or use a port above 1023",
    errno.EADDRINUSE: "; stop the program that is there, or use another port",
}


class StartError(Exception):
    """A failure to report on the terminal; the exit status is 1."""


@contextlib.contextmanager
def attempt(what: str) -> Iterator[None]:
    """Turn an OSError into a StartError: cannot do what, and why."""
    try:
        yield
    except OSError as error:
        raise StartError(f"cannot {what}: {reason(error)}") from None


class Listener(socket.socket):
    """A listening socket.  accept() is twice as fast: it makes no enums."""

    passed = False          # by systemd, which goes on listening

    def accept(self) -> tuple[Any, Any]:
        fd, address = self._accept()    # type: ignore[attr-defined]
        family = socket.AF_INET if len(address) == 2 else socket.AF_INET6
        return socket.SocketType(family, socket.SOCK_STREAM, 0, fd), address


def address_text(address: tuple[Any, ...]) -> str:
    """Format host and port of a socket's address."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def open_listeners(names: Iterable[tuple[str, int]]) -> Iterator[Listener]:
    """Listen on each address of these names, or raise StartError.

    Addresses that are not on this system are skipped if a name has others.
    """
    taken: list[Any] = []
    for name in names:
        with attempt(f"listen on {address_text(name)}"):
            found = find_host(*name)
        absent = 0
        for family, _, _, _, address in found:
            if address in taken:
                continue
            try:
                sock = socket.create_server(address, family=family,
                                            backlog=BACKLOG)
            except OSError as error:
                number = error.errno or 0   # its text names the address again
                absent += number in ABSENT
                if number in ABSENT and absent < len(found):
                    continue
                raise StartError(
                    f"cannot listen on {address_text(address)}:"
                    f" {os.strerror(number).lower()}"
                    + LISTEN_HINTS.get(number, "")) from None
            taken.append(sock.getsockname())
            yield Listener(fileno=sock.detach())


def count_passed() -> int:
    """Count the sockets that systemd passes to us (sd_listen_fds(3))."""
    number = os.environ.get("LISTEN_FDS", "")
    ours = os.environ.get("LISTEN_PID") == str(os.getpid())
    return int(number) if ours and re.fullmatch("[0-9]{1,4}", number) else 0


def passed_listeners() -> Iterator[Listener]:
    """Take the sockets that systemd has opened."""
    for fd in range(3, 3 + count_passed()):
        with contextlib.suppress(OSError):      # it is not a socket
            listener = Listener(fileno=fd)
            if listener.family in (socket.AF_INET, socket.AF_INET6) and (
                    listener.getsockopt(socket.SOL_SOCKET,
                                        socket.SO_ACCEPTCONN)):
                listener.set_inheritable(False)
                listener.passed = True
                yield listener
                continue
            listener.close()
        raise StartError(f"LISTEN_FDS: descriptor {fd} is not a listening TCP"
                         " socket; write ListenStream=79")


def fit_max_clients(config: Any, log: Log) -> None:
    """Raise the limit of descriptors; lower clients and threads to fit."""
    limits = config.limits
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    clients, threads = soft - SPARE_DESCRIPTORS, limits.max_threads
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

# No terminal to control us, no symlink, no wait for the reader of a pipe.
SAFE_FLAGS = os.O_NOCTTY | os.O_NOFOLLOW | os.O_NONBLOCK


def is_lone_file(info: os.stat_result) -> bool:
    """Is it a regular file without another name?"""
    return stat.S_ISREG(info.st_mode) and info.st_nlink < 2


@contextlib.contextmanager
def hold_pidfile(path: str) -> Iterator[None]:
    """Keep a pidfile locked, with our number in it; empty it in the end.

    The lock is one of lockf(3), as the system can name the process that holds
    it.  Forks do not hold it, and to open and close the file again ends it.
    The number alone proves nothing: a crash leaves it behind, and another
    user may have written it.
    """
    with attempt("lock the pidfile"):
        fd = os.open(path, SAFE_FLAGS | os.O_RDWR | os.O_CREAT,
                     0o600)             # who can read a file can lock it
        read_pidfile(fd, path)
        if os.fstat(fd).st_uid not in (0, os.geteuid()):
            raise StartError(f"{path} belongs to another user; remove it, or"
                             " name another pidfile")
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = find_daemon(path)[0] or "unknown: it has just ended"
            raise StartError(f"already running, pid {pid} ({path} is"
                             " locked)") from None
        if not os.fstat(fd).st_nlink:
            raise StartError(f"{path} has just been removed; start again")
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):      # it may be outside a chroot
            os.ftruncate(fd, 0)
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                os.unlink(path)
        os.close(fd)


def read_pidfile(fd: int, path: str) -> int:
    """Give the number in a pidfile, or 0; StartError if it is not one."""
    if is_lone_file(os.fstat(fd)):
        text = os.pread(fd, 20, 0)
        if re.fullmatch(b"([0-9]{1,10}\n?)?", text):
            return int(text or 0)
    raise StartError(f"{path} is not a pidfile (a file with one name, a number"
                     " or nothing in it); name another")


def find_daemon(path: str) -> tuple[int, int]:
    """Give the pid of the daemon that holds a pidfile, and the number in it.

    Each may be 0.  Raises StartError if the pid is unknown, or may be forged.
    """
    with attempt("read the pidfile"):
        try:
            fd = os.open(path, SAFE_FLAGS | os.O_RDONLY)
        except FileNotFoundError:
            return 0, 0
        try:
            number = read_pidfile(fd, path)
            pid = lock_holder(fd)
            owner = os.fstat(fd).st_uid
        finally:
            os.close(fd)
    if pid and (number not in (0, pid) or owner not in (
            0, os.geteuid(), *process_ids(pid)[:1])):
        raise StartError(f"{path} names pid {number} and belongs to uid"
                         f" {owner}, but pid {pid} has locked it; not"
                         " believed")
    return pid, number


def lock_holder(fd: int) -> int:
    """Give the pid of the process that holds lockf on a file; 0 if none.

    Raises OSError if that process cannot be seen.  See fcntl(2), F_GETLK.
    """
    if sys.platform == "linux":     # places of l_type and l_pid
        layout, kind, pid = "hhqqi0q", 0, 4
    else:                           # the BSDs and macOS
        layout, kind, pid = "qqihh4x", 3, 2
    lock = [0] * 5
    lock[kind] = fcntl.F_WRLCK
    held = struct.unpack(layout, fcntl.fcntl(
        fd, fcntl.F_GETLK, struct.pack(layout, *lock)))
    if held[kind] == fcntl.F_UNLCK:
        return 0
    if held[pid] <= 0:
        raise OSError("a process of another namespace has locked it")
    return int(held[pid])


def process_ids(pid: int) -> tuple[int, ...]:
    """Give the uid and gid of a process; () if the system does not say."""
    with contextlib.suppress(OSError):
        info = os.stat(f"/proc/{pid}")
        return info.st_uid, info.st_gid
    return ()


# ---- Privileges -----------------------------------------------------------

def choose_ids(daemon: Any) -> tuple[str, int, int] | None:
    """Choose the name, uid and gid to become; None if they stay the same."""
    if os.geteuid() != 0:
        if daemon.chroot or (
                daemon.user and daemon.user[1] != os.geteuid()) or (
                daemon.group is not None and daemon.group != os.getegid()):
            raise StartError("only root can change the user, the group or the"
                             " root directory; start as root, or remove user,"
                             " group and chroot")
        return None
    try:
        name, uid, gid = daemon.user or to_user("nobody")
        if daemon.group is not None:
            gid = daemon.group
        elif gid is None:
            gid = pwd.getpwnam("nobody").pw_gid
    except (KeyError, ValueError):
        raise StartError('there is no user "nobody"; write user = NAME and'
                         " group = NAME") from None
    return name, uid, gid


def unreadable_config(config: Any, ids: tuple[int, ...] = ()) -> str:
    """Give the reason why a reload could not read the config, or "".

    It checks owners and modes for the uid and gid of the daemon: ids, or
    those that it will have.
    """
    with contextlib.suppress(StartError):
        ids = ids or (choose_ids(config.daemon) or ())[1:]
    uid, gid = ids or (0, 0)    # ours stay, and we have read the config
    path = os.path.abspath(config.path)
    root = os.path.normpath(config.daemon.chroot or "/")
    cannot = f"a reload cannot read {path}:"
    if not path.startswith(os.path.join(root, "")):
        return f"{cannot} it is outside the chroot {root}; move it there"
    wanted = stat.S_IROTH
    while uid:          # root reads anything
        info = os.stat(path)
        shift = 6 if info.st_uid == uid else 3 if info.st_gid == gid else 0
        if not info.st_mode >> shift & wanted:
            return f"{cannot} uid {uid} may not open {path}; change its mode"
        if path == root:
            break
        path, wanted = os.path.dirname(path), stat.S_IXOTH
    return ""


def drop_privileges(name: str, uid: int, gid: int) -> None:
    """Become a user, without a way back; StartError if there is one."""
    with attempt(f"become {name}"):
        os.setgroups([gid])
        os.setgid(gid)
        os.setuid(uid)      # real, effective and saved: we are root
    if uid == 0:
        return
    for regain in (os.setuid, os.seteuid):
        with contextlib.suppress(PermissionError):
            regain(0)
            raise StartError("root privileges can be regained")
    if os.getgroups() != [gid] or os.getgid() != gid:
        raise StartError("groups of root remain")
    if sys.platform == "linux":     # programs get no more rights either
        with contextlib.suppress(ImportError):  # some Pythons lack it
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
        import ctypes  # glibc needs it to end a thread, or aborts
        ctypes.CDLL("libgcc_s.so.1")


def open_log_file(path: str, owner: tuple[int, int] | None) -> int:
    """Open a file or pipe to append to; create a file for its owner.

    Clients choose a part of the text, so no user of this system may make
    root write it into another file.
    """
    owners = {0, os.geteuid(), *(owner or ())[:1]}
    if os.geteuid() == 0:
        check_directories(os.path.dirname(path), owners)
    flags = SAFE_FLAGS | os.O_WRONLY | os.O_APPEND
    if not os.path.islink(path):        # which the flags refuse, too
        try:
            fd = os.open(path, flags)
        except FileNotFoundError:
            fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o640)
            if owner:
                os.fchown(fd, *owner)
        info = os.fstat(fd)
        if path == os.devnull or info.st_uid in owners and (
                is_lone_file(info) or stat.S_ISFIFO(info.st_mode)):
            return fd
        os.close(fd)
    raise OSError(f"{path} is a link, a device or another user's; name"
                  " another file, or write to = stderr")


def check_directories(path: str, owners: Container[int],
                      last: bool = True) -> None:
    """Refuse a path to a log that others could lead elsewhere by a symlink.

    The last directory may be theirs: then the log itself is looked at.
    """
    info = os.lstat(path)
    link = stat.S_ISLNK(info.st_mode)
    shared = not link and (
        info.st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH)
    if (link or not last) and (shared or info.st_uid not in owners):
        raise OSError(f"others can change {path}; name another file")
    if path != os.path.dirname(path):
        check_directories(os.path.dirname(path), owners, last=False)


# ---- Process --------------------------------------------------------------

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
TURN = 0.0002                   # seconds the loop waits for a busy thread


def daemonize() -> Callable[[], None]:
    """Continue in the background, in a session of its own (daemon(7)).

    Gives a function that ends the launching command with status 0, and leaves
    its terminal.  If the daemon ends before that is called, the status is 1.
    """
    launcher, ready = os.pipe()
    if os.fork():
        os.close(ready)
        os._exit(0 if os.read(launcher, 1) else 1)
    os.close(launcher)
    os.setsid()
    if os.fork():       # the leader of a session could get a terminal again
        os._exit(0)
    null = os.open(os.devnull, os.O_RDWR)       # a chroot may have none

    def release() -> None:
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.write(ready, b"\0")
        os.close(ready)
        os.close(null)
    return release


def open_terminal() -> int | None:
    """Open the terminal, which a chroot lacks; None if there is none.

    If SIGHUP is ignored (nohup), the end of the terminal does not matter.
    """
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        with contextlib.suppress(OSError):
            return os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    return None


class Notifier(socket.socket):
    """Reports to systemd (sd_notify(3)); without one it does nothing."""

    period = math.inf       # seconds between signs of life

    def find_systemd(self) -> None:
        """Connect, if it runs.  Later a chroot may hide the path."""
        path = os.environ.get("NOTIFY_SOCKET")
        period = os.environ.get("WATCHDOG_USEC", "")
        pid = str(os.getpid())
        if path:
            with attempt("reach NOTIFY_SOCKET"):
                self.connect("\0" + path[1:] if path[0] == "@" else path)
            if re.fullmatch("[1-9][0-9]{0,14}", period) and (
                    os.environ.get("WATCHDOG_PID", pid) == pid):
                self.period = int(period) / 2e6

    def report(self, *lines: str) -> None:
        with contextlib.suppress(OSError):      # it is not there
            self.send("\n".join(lines).encode(), DONT_WAIT)

    def send_sign_of_life(self) -> float:
        """Send it, and give the seconds until the next is due."""
        self.report("WATCHDOG=1")
        return self.period


class Daemon:
    """The process: how it starts, what signals do, how it ends."""

    def __init__(self, config: Any, log: Log) -> None:
        self.config = config
        self.log = log
        self.directory = os.getcwd()    # where relative paths start
        self.root = ""                  # the chroot that we are in
        self.ids = choose_ids(config.daemon)    # that we become
        self.terminal: int | None = None
        self.started = time.monotonic()
        self.stopped_by = ""
        self.reloads = {"ok": 0, "failed": 0}
        self.notifier: Notifier
        self.server: FingerServer

    def start_and_serve(self) -> None:
        """Start, serve until a signal, end.  Raises StartError.

        All that can fail does so before the launching command returns.
        """
        daemon = self.config.daemon
        os.umask(daemon.umask)
        sys.setswitchinterval(TURN)
        answers = Answers(self.config, self.log)
        with contextlib.ExitStack() as opened:
            # What systemd passes is for this process, not for its child.
            passed = [*passed_listeners()]
            self.notifier = opened.enter_context(
                Notifier(socket.AF_UNIX, socket.SOCK_DGRAM))
            self.notifier.find_systemd()
            release = daemonize() if daemon.daemonize else None
            self.terminal = open_terminal()
            if daemon.pidfile:
                opened.enter_context(hold_pidfile(self.path(daemon.pidfile)))
            listeners = [
                opened.enter_context(listener) for listener in
                passed or open_listeners(self.config.server.listen)]
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # kept pending
            self.open_log(self.config)
            self.give_up_rights(answers)
            fit_max_clients(self.config, self.log)
            self.server = opened.enter_context(
                FingerServer(listeners, answers, self.log))
            self.watch_signals()
            if release:
                release()
            self.report_ready(listeners)
            self.server.serve_forever()
            self.report_end()

    def give_up_rights(self, answers: Answers) -> None:
        """Enter the chroot and the rundir, and become the user."""
        daemon = self.config.daemon
        rundir = daemon.rundir or (
            "/" if daemon.daemonize or daemon.chroot else "")
        if self.ids:
            load_late_imports()
        with attempt("enter chroot or rundir"):
            if daemon.chroot:
                answers.resolve_hops()
                os.chroot(daemon.chroot)
                os.chdir("/")
                self.root = os.path.normpath(daemon.chroot)
            if rundir:
                os.chdir(rundir)
        if self.ids:
            drop_privileges(*self.ids)

    def path(self, name: str) -> str:
        """Give the absolute path of a file, inside the chroot if any."""
        path = os.path.normpath(os.path.join(self.directory, name))
        if self.root and path.startswith(self.root + "/"):
            return path[len(self.root):]
        return path

    def open_log(self, config: Any) -> None:
        """Open the log; a file is opened again.  Raises StartError."""
        settings = types.SimpleNamespace(**vars(config.log))
        what = "open the log"
        if settings.to == "syslog":
            what = ("reach syslog at "
                    + config.raw_values["log", "syslog_address"])
        elif settings.to != "stderr":
            settings.to = self.path(settings.to)
        with attempt(what):
            self.log.open(settings, self.ids and self.ids[1:])

    def report_ready(self, listeners: list[Listener]) -> None:
        """Write the first lines of the log, and report to systemd."""
        event = self.log.event
        for (section, name), text in self.config.raw_values.items():
            event("debug", "setting", section=section, name=name, value=text)
        user = {"user": self.ids[0]} if self.ids else {}
        event("notice", "ready", listen=",".join(
            address_text(listener.getsockname()) for listener in listeners),
            backend=",".join(name for name, _ in self.config.backends),
            **user, pid=os.getpid())
        self.notifier.report("READY=1", f"MAINPID={os.getpid()}")
        now = time.monotonic()
        self.server.schedule(self.notifier.send_sign_of_life,
                             now + self.notifier.period)
        self.server.schedule(self.write_stats, now + self.write_stats())

    def write_stats(self) -> float:
        """Write the stats, if wanted; give the seconds until the next time."""
        server, name = self.server, self.config.server.stats
        if not name:
            server.stats = None
            return math.inf
        stats = server.stats = server.stats or Stats()
        path = self.path(name)
        try:
            replace_file(path, stats.text(
                server.hosts.total, server.lookups.threads.total,
                self.reloads))
            stats.failing = ""
        except OSError as error:
            if stats.failing != path:
                self.log.event("warning", "failed", stats=path,
                               reason=reason(error))
            stats.failing = path
        return STATS_PERIOD

    def report_end(self) -> None:
        self.write_stats()
        self.log.event("notice", "stopped", signal=self.stopped_by,
                       queries=sum(self.server.outcomes.values()),
                       seconds=int(time.monotonic() - self.started))
        signal.set_wakeup_fd(-1)
        # Signals are blocked, not ignored: Python complains about one that
        # has arrived, but has no handler any more.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    # Signals.

    def watch_signals(self) -> None:
        """Have signals noted, and the loop woken, which acts on them."""
        inbox = self.server.inbox
        inbox.actions = {
            signal.SIGTERM: functools.partial(self.stop, "SIGTERM"),
            signal.SIGINT: functools.partial(self.stop, "SIGINT"),
            signal.SIGHUP: self.hang_up, signal.SIGUSR1: self.log_counters}
        for number in SIGNALS:
            signal.signal(number, lambda number, _: inbox.signals.add(
                number))
        # Our parent may have ignored it: then programs would have no status.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.set_wakeup_fd(inbox.waker.fileno(), warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def stop(self, name: str) -> None:
        self.notifier.report("STOPPING=1")
        self.stopped_by = name
        self.server.stop()

    def hang_up(self) -> None:
        """Stop if the terminal that started us has gone, else reload."""
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
        if self.stopped_by:
            return
        self.notifier.report(
            "RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            with contextlib.suppress(StartError):   # the old log stays
                self.open_log(self.config)
            path = self.path(self.config.path)
            # The open of a pipe could wait.
            if os.path.exists(path) and not os.path.isfile(path):
                raise ConfigError(f"{path} is not a regular file")
            self.change_config(read_config(
                path, self.log.report, self.config.overrides, self.config))
            result = "ok"
        except Exception as error:      # whatever it is, keep the old config
            for line in (str(error) or repr(error)).splitlines():
                self.log.event("warning", "reload-failed", reason=line)
            result = "failed"
        self.reloads[result] += 1
        self.notifier.report("READY=1")

    def change_config(self, config: Any) -> None:
        """Use another config; StartError if its log cannot be opened."""
        answers = Answers(config, self.log)
        config.path = self.config.path      # its path outside the chroot
        self.log_unreloadable(config)
        self.open_log(config)
        fit_max_clients(config, self.log)
        self.server.change_answers(answers)
        self.config = config
        self.server.schedule(self.write_stats)
        gc.collect()        # urllib's openers are cycles, with certificates
        self.log.event("notice", "reloaded", config=config.path)

    def log_unreloadable(self, config: Any) -> None:
        """Log changes that a reload cannot make, and undo them."""
        for (section, name), old in self.config.raw_values.items():
            new = config.raw_values[section, name]
            if new != old and (
                    section == "daemon" or name in ("listen", "syslog_address")
                    or (section, name, new) == ("log", "to", "syslog")):
                self.log.event("warning", "not-reloaded", setting=name,
                               reason="only a restart can change it")
                config.raw_values[section, name] = old
                setattr(getattr(config, section), name,
                        getattr(getattr(self.config, section), name))

    def log_counters(self) -> None:
        server = self.server
        self.log.event(
            "notice", "counters",
            seconds=int(time.monotonic() - self.started),
            queries=sum(server.outcomes.values()), clients=server.hosts.total,
            lookups=server.lookups.threads.total, **server.outcomes)


# ---- Actions --------------------------------------------------------------

STOP_WAIT = 60.0                # seconds that --stop adds to the timeout


def load_config(args: Any, log: Log) -> Any:
    """Read the config; options override its settings."""
    return read_config(args.config, log.report, {
        row.name: getattr(args, row.name) for row in SETTINGS
        if getattr(args, row.name, None) is not None})


def check_and_start(args: Any, log: Log) -> None:
    """Print warnings and start the daemon; with --check, do not start it."""
    config = load_config(args, log)
    for warning in [*config.warnings, *find_warnings(config, args.inetd)]:
        complain(warning, "warning")
    if args.check:
        say(f"{config.path} is good\n")
        return
    close_inherited()
    Daemon(config, log).start_and_serve()


def find_warnings(config: Any, inetd: bool) -> Iterator[str]:
    """Yield warnings of what does not work in this kind of start."""
    useless = {}
    if count_passed():
        useless["listen"] = "is not used with systemd's sockets; remove it"
    if inetd:
        useless["stats"] = "is not written under inetd; remove it"
        for name in ("max_clients_per_host", "queries_per_minute"):
            useless[name] = "does nothing under inetd; set limits in inetd"
    for name, line in config.lines.items():
        if name in useless:
            where = f"{config.path}:{line}: " if line else "--"
            yield f"{where}{name}: {useless[name]}"
    if config.log.to == "stderr" and config.daemon.daemonize:
        yield ("the log will be lost: it goes to stderr, and there is none in"
               " the background; write to = syslog, or a file")
    unreadable = unreadable_config(config)
    if unreadable:
        yield unreadable


def close_inherited() -> None:
    """Close descriptors that a careless parent has left open for us.

    What this process has opened itself is not inheritable (PEP 446).
    """
    try:
        found = [int(name) for name in os.listdir("/dev/fd")]
    except OSError:             # not on this system: try the usual numbers
        found = list(range(1024))
    first = 3 + count_passed()
    for fd in found:
        with contextlib.suppress(OSError):
            if fd >= first and os.get_inheritable(fd):
                os.close(fd)


def print_reply(args: Any, log: Log) -> int:
    """Print what a client would get for a line; 1 if a backend failed."""
    import ipaddress  # not needed to serve
    config = load_config(args, log)
    client = plain_address(
        "127.0.0.1" if args.address is None else args.address)
    try:
        ipaddress.ip_address(client)
    except ValueError:
        raise ConfigError(f'--from: "{client}" is not an address; write'
                          " e.g. --from 192.0.2.7") from None
    answers = Answers(config, log)
    if os.geteuid() == 0:       # no program is run as root
        Daemon(config, log).give_up_rights(answers)
    reply = answer_line(answers, os.fsencode(args.query) + b"\n", client)
    say(reply.data.decode())
    return 1 if reply.outcome == "failed" else 0


def answer_line(answers: Answers, line: bytes, client: str) -> Reply:
    """Give the reply that FingerHandler would give to a line."""
    if not answers.allows(client):
        return FIXED_REPLIES["denied"]
    text = QueryLine(answers.limits.max_query)
    try:
        text.add(line)
        query = parse_query(bytes(text.text), lambda: answers.names)
        return answers.answer(query, client,
                              time.monotonic() + answers.limits.timeout)
    except MalformedQuery:
        return FIXED_REPLIES["malformed"]
    except LineTooLong:
        return FIXED_REPLIES["too-long"]


def control(args: Any, log: Log) -> int:
    """Act on the running daemon; give the exit status.

    A pidfile is enough: the config may have errors by now.
    """
    try:
        config, errors = load_config(args, log), ""
    except ConfigError as error:
        config, errors = error.config, str(error)
    if errors and args.reload:
        complain(errors)
    path = args.pidfile or (config.daemon.pidfile if config else "")
    if not path:
        raise ConfigError(errors or "no pidfile is configured; set pidfile in"
                                    " [daemon], or give --pidfile")
    if args.status:
        return print_status(path)
    pid, _ = find_daemon(path)
    if not pid:
        say("fingerd is not running\n")
        return 1 if args.reload else 0
    with attempt(f"signal pid {pid}"):
        os.kill(pid, signal.SIGHUP if args.reload else signal.SIGTERM)
    if args.reload and not errors:
        errors = unreadable_config(config, process_ids(pid))
        if errors:
            complain(errors)
    if args.reload:
        return 1 if errors else 0
    timeout = STOP_WAIT + (config.limits.timeout if config else 0)
    until = time.monotonic() + timeout
    while find_daemon(path)[0] == pid:
        if time.monotonic() > until:
            raise StartError(f"pid {pid} has not ended in {timeout:.0f}"
                             " seconds")
        time.sleep(0.02)
    return 0


def print_status(path: str) -> int:
    """Print whether the daemon runs; give the exit status, as LSB has it."""
    try:
        pid, number = find_daemon(path)
    except StartError as error:
        complain(str(error))
        return 4
    if pid:
        say(f"fingerd is running, pid {pid}\n")
        return 0
    if number:
        say(f"fingerd has died; it was pid {number}\n")
        return 1
    say("fingerd is not running\n")
    return 3


def serve_inetd(args: Any, log: Log) -> None:
    """Serve the one connection that inetd(8) has accepted."""
    sock = take_inetd_socket()
    try:
        config = load_config(args, log)
        close_inherited()
        os.umask(config.daemon.umask)
        answers, daemon = Answers(config, log), Daemon(config, log)
        try:
            daemon.open_log(config)
        except StartError:
            if config.log.to != "syslog":
                raise           # without syslog only the log is lost
        daemon.give_up_rights(answers)
        with FingerServer([], answers, log) as server:
            server.serve_one(sock)
    except (ConfigError, StartError) as error:
        refuse_for_inetd(sock, log, error)
        raise


def take_inetd_socket() -> socket.socket:
    """Take the connection from standard input, where inetd puts it.

    It is stdout and stderr, too; only the reply may be written to it.
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
    for fd in (0, 1, 2):
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            os.close(fd)
    open_standard_streams()
    return sock


def refuse_for_inetd(sock: socket.socket, log: Log, error: Exception) -> None:
    """Send the client an error, and syslog the reason."""
    with contextlib.suppress(OSError), sock:
        sock.settimeout(GRACE)
        sock.sendall(FIXED_REPLIES["failed"].data)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(4096):      # a close with bytes unread is a reset
            pass
    config = convert_core({}, {"to": "syslog"}, None, Notes())
    with contextlib.suppress(OSError):
        log.open(config.log)
        for line in str(error).splitlines():
            log.event("error", "not-started", reason=line)


def write_bundle(path: str) -> None:
    """Write both files as one program (a zip archive: see zipapp)."""
    import inspect
    import zipfile
    _, failure = load_backends()
    if failure:
        raise ConfigError(f"--bundle: {failure}")
    files = {"__main__.py": "import sys, fingerd\nsys.exit(fingerd.main())\n"}
    for name, module in (("fingerd.py", __name__),
                         ("fingerd_backends.py", "fingerd_backends")):
        files[name] = inspect.getsource(sys.modules[module])
    # Only now: it may be the file that we run from.
    with attempt("write the bundle"), open(path, "wb") as bundle:
        bundle.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(bundle, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in files.items():
                archive.writestr(name, text)
        if stat.S_ISREG(os.fstat(bundle.fileno()).st_mode):
            os.fchmod(bundle.fileno(), 0o755)


# ---- Command line ---------------------------------------------------------

CONFIG = "/etc/fingerd.conf"
# Options with a value: flags, attribute, the value's name in --help, help.
OPTIONS = (
    (("--config",), "config", "FILE", f"config; default {CONFIG}"),
    *((row.flags, row.name, "VALUE", row.help)
      for row in SETTINGS if row.flags),
    (("--query",), "query", "LINE", "print what a client would get"),
    (("--from",), "address", "ADDRESS", "for --query: the client's address"),
    (("--bundle",), "bundle", "FILE", "write one file with every backend"),
)
# Options without a value: flags, attribute, what it is set to, help.
SWITCHES = (
    (("-d", "--daemon"), "daemonize", "yes", "daemonize = yes"),
    (("-n", "--nodaemon"), "daemonize", "no", "daemonize = no"),
    (("--syslog",), "to", "syslog", "to = syslog"),
    (("--check",), "check", True, "check the config: status 0 good, 2 bad"),
    (("--status",), "status", True,
     "report on the daemon: status 0 runs, 1 dead, 3 does not run, 4 unknown"),
    (("--stop",), "stop", True, "stop the daemon, and wait until it ends"),
    (("--reload",), "reload", True, "have the daemon reload its config"),
    (("--inetd",), "inetd", True, "serve the connection on standard input"),
    (("--version",), "version", True, "print the version"),
    (("--help",), "help", True, "print this, and all settings"),
)


class Parser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would print an error and exit."""

    def error(self, message: str) -> NoReturn:
        text = re.sub("^argument ", "", message)
        raise ConfigError(f"{text}; see --help")


def make_parser() -> Parser:
    parser = Parser(
        usage="fingerd.py [OPTION]...", add_help=False, allow_abbrev=False,
        description="Answer finger queries (RFC 1288) from a config file.")
    for flags, name, value, text in OPTIONS:
        parser.add_argument(*flags, dest=name, metavar=value, help=text)
    for flags, name, const, text in SWITCHES:
        parser.add_argument(*flags, dest=name, action="store_const",
                            const=const, help=text)
    parser.set_defaults(config=CONFIG)
    return parser


def parse_options(argv: list[str]) -> Any:
    """Give the value of each option, None if not set; raise ConfigError."""
    with_value = {flag for flags, *_ in OPTIONS for flag in flags}
    words, joined = iter(argv), []
    for word in words:      # a value that begins with - must follow a =
        value = next(words, None) if word in with_value else None
        joined.append(word if value is None else f"{word}={value}")
    args, rest = make_parser().parse_known_args(joined)
    if rest:
        raise ConfigError(f'"{rest[0]}" is not an option; see --help')
    for name, value in vars(args).items():
        if value == []:     # argparse before 3.13 drops the value --
            setattr(args, name, "--")
    return args


def settings_text() -> str:
    """Give all settings with their defaults, section by section."""
    rows = [*SETTINGS,
            Setting("aliases", "NAME", "text", "NAMES", "names to answer for"),
            Setting("users", "NAME", "text", "TEXT", "what to answer")]
    for name, cls in load_backends()[0].items():
        rows += [Setting(name, *row) for row in cls.settings or ()]
    lines = ["settings of the config file, and their defaults:"]
    for section, group in itertools.groupby(rows, lambda row: row.section):
        lines += ["", f"[{section}]"]
        lines += [f"{f'  {row.name} = {row.default}':29} {row.help}"
                  for row in group]
    return "\n".join(lines)


def carry_out(args: Any, log: Log) -> int:
    """Do what the options say; give the exit status."""
    if args.address is not None and args.query is None:
        raise ConfigError("--from: goes with --query only")
    if args.version:
        say(f"fingerd {__version__}\n")
    elif args.help:
        say(f"{make_parser().format_help()}\n{settings_text()}\n")
    elif args.bundle is not None:
        write_bundle(args.bundle)
    elif args.status or args.reload or args.stop:
        return control(args, log)
    elif args.query is not None:
        return print_reply(args, log)
    elif args.inetd and not args.check:
        serve_inetd(args, log)
    else:
        check_and_start(args, log)
    return 0


def say(text: str) -> None:
    """Write to stdout; a closed pipe is not an error."""
    data = text.encode("utf-8", "backslashreplace")
    with attempt("print"), contextlib.suppress(BrokenPipeError):
        while data:
            data = data[os.write(1, data):]


def complain(text: str, level: str = "error") -> None:
    """Write to stderr, each line with the program's name in front."""
    head = f"<{SEVERITY[level]}>" if is_journal() else "fingerd: "
    data = to_wire(re.sub("(?m)^", head, text)).replace(b"\r\n", b"\n")
    with contextlib.suppress(OSError):
        os.write(2, data)


def open_standard_streams() -> None:
    """Open /dev/null where there is no stdin, stdout or stderr.

    Otherwise a socket could get one of these numbers, and what is printed.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)      # takes the lowest number


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; give the exit status.

    0 is done, 1 failed, 2 a bad command line or config.
    """
    open_standard_streams()
    try:
        with attempt("go on"):      # without a free descriptor, for example
            return carry_out(
                parse_options(sys.argv[1:] if argv is None else argv), Log())
    except ConfigError as error:
        complain(str(error))
        return 2
    except StartError as error:
        complain(str(error).replace("\n", "\\n"))
    except KeyboardInterrupt:       # before there is anything to end cleanly
        pass
    return 1


if __name__ == "__main__":
    sys.exit(main())
