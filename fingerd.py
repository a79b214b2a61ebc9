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
    Settings      their table, and what their texts mean
    Config file   read and checked as a whole before anything starts
    Log           one line for each connection
    Site          policy: who is answered, and what
    Server        clients, deadlines and limits in one loop
    Process       listening sockets, signals, the order of the start
    Command line  options and exit statuses
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import errno
import fcntl
import functools
import gc
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
import sys
import textwrap
import threading
import time
import types
from typing import (
    Any,
    Callable,
    Container,
    Dict,
    Iterable,
    NamedTuple,
    NoReturn,
)

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
BACKEND_NAME = re.compile(r"[a-z]+(:[A-Za-z0-9_.-]+)?")


def load_backends() -> dict[str, Any]:
    """Import the other file's backends; give the classes of both by name.

    Raises ValueError when that file is missing, broken, or of another
    version; also in a reload, when Python itself may be out of reach.
    """
    try:
        import fingerd_backends
    except ImportError as error:
        wrong = f"cannot be imported ({error}); restart once it can"
        if error.name == "fingerd_backends":
            wrong = "is not beside fingerd.py; copy it there too"
        raise ValueError(f"needs fingerd_backends.py, which {wrong}") from None
    if fingerd_backends.__version__ != __version__:
        raise ValueError(
            f"cannot be used: fingerd.py is version {__version__}, but"
            f" fingerd_backends.py is {fingerd_backends.__version__};"
            " copy both from one release")
    return {**BACKENDS, **fingerd_backends.BACKENDS}


def find_backend(name: str, sections: tuple[str, ...] = ()) -> Any:
    """Give the class for a name such as `web` or `web:staff`, or ValueError.

    For the name of a section, give the sections that it may mean as well.
    """
    kind = name.partition(":")[0]
    classes, failure = BACKENDS, ""
    if kind not in classes:
        try:
            classes = load_backends()
        except ValueError as error:
            failure = str(error)
    if kind in classes and BACKEND_NAME.fullmatch(name):
        return classes[kind]
    form = "[{}]".format if sections else str
    guess = suggest(form(name), map(form, [*sections, *classes]))
    if failure and "did you mean" not in guess:
        raise ValueError(f"{failure}, or " + (
            "remove the section" if sections else "write backend = users"))
    raise ValueError(("no such section" if sections else "is not a backend")
                     + guess)


# ---- Settings -------------------------------------------------------------

NO_ID = 0xffffffff              # -1, which setuid(2) takes for "leave it"
FACILITIES = (                  # by their numbers: RFC 3164 4.1.1
    "kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news", "uucp",
    "cron", "authpriv", "ftp", "ntp", "audit", "alert", "clock", "local0",
    "local1", "local2", "local3", "local4", "local5", "local6", "local7")
LEVELS = ("debug", "info", "notice", "warning", "error")
INFO = LEVELS.index("info")     # the level of a query's line
MAX_SECONDS = 366 * 86400       # a year: more is a typing error
MAX_COUNT = 1_000_000_000       # of anything counted, bytes included
MIN_SIZE = 16                   # bytes: room for [truncated]
YES, NO = ("yes", "true", "on", "1"), ("no", "false", "off", "0")
NUMBERS = {                     # how they are written
    "a whole number": "[0-9]{1,12}",
    "a number of seconds": r"[0-9]{1,12}(\.[0-9]{1,12})?",
    "a size in bytes": "[0-9]{1,12}[KkMm]?",
}
UNITS = {"K": 1024, "M": 1024 ** 2}
PATH = r"[^\0-\x1f\x7f-\x9f]"   # a character of one: any but a control


class Setting(NamedTuple):
    """A row of the table that feeds parsing, checking and --help."""

    section: str
    name: str
    kind: str                   # a key of KINDS
    default: str                # as it would be written in the file
    help: str
    flags: tuple[str, ...] = ()


class User(NamedTuple):
    """A user to become; gid is None where passwd(5) does not know it."""

    name: str
    uid: int
    gid: int | None


# Converters take a text, and raise ValueError("is not ...") for a bad one,
# with "; " and what to write where a setting's default is not an example.

def number_from(low: float, high: float, what: str) -> Callable[[str], Any]:
    """Make a converter of numbers; what is a key of NUMBERS."""
    def convert(text: str) -> float:
        if not re.fullmatch(NUMBERS[what], text):
            raise ValueError(f"is not {what}")
        value = float(text.rstrip("KkMm")) * UNITS.get(text[-1].upper(), 1)
        if not low <= value <= high:
            raise ValueError(f"is not between {low} and {high}")
        return int(value) if value.is_integer() else value
    return convert


def text_matching(pattern: str, what: str) -> Callable[[str], str]:
    """Make a converter of texts that match a pattern as a whole."""
    def convert(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"is not {what}")
        return text
    return convert


def one_of(*choices: str) -> Callable[[str], str]:
    """Make a converter of these words, in any case."""
    def convert(text: str) -> str:
        if text.lower() not in choices:
            raise ValueError(f"is not one of {', '.join(choices)}")
        return text.lower()
    return convert


def list_of(convert: Callable[[str], Any],
            at_least: int = 0) -> Callable[[str], tuple[Any, ...]]:
    """Make a converter of words."""
    def convert_words(text: str) -> tuple[Any, ...]:
        words = text.split()
        if len(words) < at_least:
            raise ValueError("is empty")
        return tuple(convert(word) for word in words)
    return convert_words


def to_bool(text: str) -> bool:
    return one_of(*YES, *NO)(text) in YES


def to_mask(text: str) -> int:
    return int(text_matching("0*[0-7]{1,3}", "an octal mask")(text), 8)


def to_host(text: str) -> str:
    return text.lower().rstrip(".")


def to_address(text: str, default_port: str = "") -> tuple[str, int]:
    match = re.fullmatch(r"(\[[\w:.%-]+\]|\*|[\w.-]+)(?::([0-9]{1,5}))?", text)
    port = (match[2] or default_port) if match else ""
    if not match or not port or int(port) > 65535:
        raise ValueError("is not host:port or [v6 address]:port")
    return match[1].strip("[]"), int(port)


def to_hops(text: str) -> dict[str, int]:
    if text.lower() in NO:
        return {}
    if not text or "*" in text or text.lower() in YES:
        raise ValueError("is neither no nor a list of hosts")
    return dict(to_address(to_host(word), str(FINGER_PORT))
                for word in text.split())


def to_network(text: str) -> Any:
    """Convert a network in CIDR notation, or an address.

    A network of IPv4-mapped addresses means the IPv4 one, as such clients
    are taken for IPv4 clients.  A wider one, such as ::/0, means IPv6 only.
    """
    import ipaddress  # 2 ms, 1 MiB: only for those who name networks
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(f"is not a list of networks ({error}); write e.g."
                         " 192.0.2.0/24 2001:db8::/32") from None
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    if mapped:
        return ipaddress.ip_network(f"{mapped}/{network.prefixlen - 96}")
    return network


def to_user(text: str) -> User | None:
    if not text:
        return None
    uid = to_id(text) if text.isdecimal() else None
    try:
        entry = pwd.getpwnam(text) if uid is None else pwd.getpwuid(uid)
        return User(entry.pw_name, entry.pw_uid, entry.pw_gid)
    except (KeyError, ValueError):      # ValueError: there is a NUL in it
        if uid is not None:
            return User(text, uid, None)
    raise ValueError("is not a user of this system; create it (adduser"
                     f" --system {text}), or leave user empty for nobody")


def to_group(text: str) -> int | None:
    if text.isdecimal():
        return to_id(text)
    try:
        return grp.getgrnam(text).gr_gid if text else None
    except (KeyError, ValueError):
        raise ValueError("is not a group of this system; create it (addgroup"
                         f" --system {text}), or leave group empty for the"
                         " user's") from None


def to_syslog(text: str) -> str | tuple[str, int]:
    return text if re.fullmatch(f"/{PATH}*", text) else to_address(text)


to_id = number_from(0, NO_ID - 1, "a whole number")
KINDS: dict[str, Callable[[str], Any]] = {
    "yes/no": to_bool,
    "seconds": number_from(0.001, MAX_SECONDS, "a number of seconds"),
    "period": number_from(0, MAX_SECONDS, "a number of seconds"),
    "count": number_from(1, MAX_COUNT, "a whole number"),
    "limit": number_from(0, MAX_COUNT, "a whole number"),
    "size": number_from(MIN_SIZE, MAX_COUNT, "a size in bytes"),
    "text": str,                # the only one that may have several lines
    "hosts": list_of(to_host),
    "networks": list_of(to_network),
    "addresses": list_of(to_address, 1),
    "next hops": to_hops,
    "backends": list_of(str, 1),
    "path": text_matching(
        f"{PATH}*", "a path; write it without control characters"),
    "directory": text_matching(
        f"(/{PATH}*)?", "an absolute path; write e.g. /var/empty"),
    "log": text_matching(f"{PATH}+", "stderr, syslog or a path"),
    "facility": one_of(*FACILITIES),
    "word": text_matching("[!-~]{1,32}", "a word of 1 to 32 ASCII characters"),
    "syslog": to_syslog,
    "user": to_user,
    "group": to_group,
    "octal": to_mask,
    "format": one_of("text", "json"),
    "level": one_of(*LEVELS),
}

# Rows are name, kind, default, help, and the options of the command line.
CORE: dict[str, tuple[tuple[str, ...], ...]] = {
    "server": (
        ("listen", "addresses", "localhost:1079",
         "addresses to answer on: host:port, [v6]:port, *:port", "--listen"),
        ("backend", "backends", "users",
         "backends to ask, in order: users, finger, web, web:NAME"),
        ("user_list", "yes/no", "no",
         "answer the empty query with a list of users?"),
        ("forward", "next hops", "no",
         "hosts that user@host may be forwarded to"),
        ("welcome", "text", "", "text for the empty query, instead of a list"),
        ("header", "text", "", "text above each answer"),
        ("footer", "text", "", "text below each answer"),
        ("hostname", "hosts", "", "names of this host; empty: the system's"),
        ("allow", "networks", "", "networks that are answered; empty: all"),
        ("deny", "networks", "", "networks that are not, even if allowed"),
    ),
    "limits": (
        ("timeout", "seconds", "10",
         "seconds for the query, for the backend, and for the reply"),
        ("max_query", "size", "512", "bytes in a query line"),
        ("max_reply", "size", "64K", "bytes in a reply"),
        ("max_clients", "count", "10000", "clients at a time"),
        ("max_clients_per_host", "count", "100",
         "clients at a time from one address or IPv6 /64"),
        ("queries_per_minute", "limit", "0",
         "queries from one address or IPv6 /64; 0: no limit"),
        ("max_threads", "count", "64", "lookups at a time; the rest queue"),
    ),
    "daemon": (
        ("daemonize", "yes/no", "no", "run in the background?"),
        ("pidfile", "path", "",
         "file for the process number, locked while it runs", "--pidfile"),
        ("user", "user", "", "user that root becomes; empty: nobody",
         "--user", "--uid"),
        ("group", "group", "", "group that root gets; empty: the user's",
         "--group", "--gid"),
        ("chroot", "directory", "", "directory that becomes /; empty: none",
         "--chroot"),
        ("rundir", "path", "",
         "directory to run in; empty: / in the background or a chroot",
         "--rundir"),
        ("umask", "octal", "027", "mask for the modes of files", "--umask"),
    ),
    "log": (
        ("to", "log", "stderr", "stderr, syslog, or the path of a file",
         "-l", "--logfile"),
        ("format", "format", "text", "text or json"),
        ("level", "level", "info", "least level: " + ", ".join(LEVELS)),
        ("facility", "facility", "daemon", "facility for syslog"),
        ("prefix", "word", "fingerd",
         "word before each line on stderr and in syslog", "--prefix"),
        ("syslog_address", "syslog", "/dev/log",
         "socket of syslog, or host:port for UDP"),
    ),
}
SETTINGS = tuple(Setting(section, name, kind, default, text, tuple(flags))
                 for section, rows in CORE.items()
                 for name, kind, default, text, *flags in rows)


# ---- Config file ----------------------------------------------------------

# Not configparser: it stops at the first error, does not know the line of a
# value, and joins a setting that is indented to the value above it.
BLOCK = re.compile(r"(?m)^(?=[^\s#])")      # starts at a line in the margin
INDENTED = re.compile(r"(?m)^[^\S\n]+\S")
UNASKED = re.compile("[\0- \x7f-\x9f@]|^/[Ww]$")    # what no query asks for


class ConfigError(Exception):
    """What is wrong with the config or the command line; an arg is a line."""

    config: Any = None          # with defaults where there are errors

    def __str__(self) -> str:
        return "\n".join(line.replace("\n", "\\n") for line in self.args)


class Notes(list):
    """Errors or warnings with their lines; line 0 is the command line."""

    def add(self, line: int, text: str) -> None:
        self.append((line, text))

    def texts(self, path: str) -> list[str]:
        return [f"{path}:{line}: {text}" if line else text
                for line, text in sorted(self)]


class Entry(NamedTuple):
    """A setting as it is in the file, or the header of a section."""

    line: int
    name: str                   # of a header with its brackets
    text: str                   # on this line
    below: str                  # indented lines, empty ones and comments


Sections = Dict[str, Dict[str, Entry]]  # by name; in lower case, "" the header


def read_config(path: str, report: Callable[..., None],
                overrides: dict[str, str] | None = None,
                old: Any = None) -> Any:
    """Read a config; raise ConfigError with all its errors.

    report(backend, text, level) is for what backends have to say, overrides
    are texts of the command line by setting, old is the config that a reload
    replaces.  The result has a namespace of settings for each section, and:
    path; raw_values, texts by section and name; lines, where a setting is,
    by name; backends, pairs of name and object; warnings, lines of text.
    """
    errors = Notes()
    sections = parse_config(read_text(path), errors)
    config = convert_core(sections, overrides or {}, old, errors)
    config.path = path
    chroot = "" if old else config.daemon.chroot
    config.backends = make_backends(config, sections, report, chroot, errors)
    config.warnings = check_others(config, sections, errors).texts(path)
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
                          " name another with --config") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: is not UTF-8; convert the file,"
                          " e.g. with iconv -f latin1 -t utf-8") from None


def suggest(word: str, choices: Iterable[str]) -> str:
    """Give the end of an error about a word that is not one of the choices."""
    import difflib  # 10 ms: only errors need it
    names = list(choices)
    for close in difflib.get_close_matches(word, names, 1):
        return f"; did you mean {close}?"
    return f"; there are {', '.join(names)}"


# From lines to texts.

def parse_config(text: str, errors: Notes) -> Sections:
    """Sort settings into sections; two of the same name are read as one."""
    sections: Sections = {}
    entries: dict[str, Entry] | None = None
    start, *blocks = BLOCK.split(text)
    check_single(0, start, errors)
    number = start.count("\n") + 1
    for block in blocks:
        line, _, below = block.partition("\n")
        line = line.rstrip()
        name, equals, value = map(str.strip, line.partition("="))
        key = name.lower()
        if line[0] == "[" and line[-1] == "]":
            name, equals, value, key = line, "=", "", ""
            entries = sections.setdefault(line[1:-1].strip(), {})
            check_single(number, below, errors)
        entry = Entry(number, name, value, below)
        if not equals or not name:
            errors.add(number, f'"{line}" is neither a section nor a setting;'
                               " write [section] or name = value")
        elif entries is None:
            errors.add(number, f"{name}: outside any section; write its"
                               " [section] above it")
        elif entries.setdefault(key, entry) is not entry:
            errors.add(number, f"{name}: already on line {entries[key].line};"
                               " write it once")
        number += block.count("\n")
    return sections


def check_single(line: int, below: str, errors: Notes) -> None:
    """Note the first indented line below one that takes none."""
    match = INDENTED.search(below)
    if match:
        errors.add(line + 1 + below.count("\n", 0, match.start()),
                   "indented line outside a text value; write it without"
                   " spaces in front")


def full_text(entry: Entry) -> str:
    """Give all lines of a text, those below without their indentation."""
    if not entry.below:
        return entry.text
    lines = [line.rstrip() for line in entry.below.split("\n")
             if not line.startswith("#")]
    below = textwrap.dedent("\n".join(lines)).rstrip("\n")
    return "\n".join(filter(None, [entry.text, below]))


# From texts to values.

def convert_core(sections: Sections, overrides: dict[str, str], old: Any,
                 errors: Notes) -> Any:
    """Make a config of the sections in CORE."""
    config = types.SimpleNamespace(raw_values={}, lines={})
    for section in CORE:
        rows = [row for row in SETTINGS if row.section == section]
        if old and section == "daemon":
            # It is kept.  To look up a user may take a network, and finds
            # nobody in a chroot.
            rows = [row._replace(kind="text") for row in rows]
        entries = sections.get(section, {})
        values = convert_section(rows, entries, errors)
        for row in rows:
            text = row.default
            if row.name in entries:
                config.lines[row.name] = entries[row.name].line
                text = full_text(entries[row.name])
            if row.name in overrides:
                text = overrides[row.name]
                values[row.name] = convert_text(row, text, 0, errors)
                config.lines[row.name] = 0
            config.raw_values[section, row.name] = text
        setattr(config, section, types.SimpleNamespace(**values))
    if old:
        config.daemon = old.daemon
    return config


def convert_section(rows: list[Setting], entries: dict[str, Entry],
                    errors: Notes) -> dict[str, Any]:
    """Give the value of each row; note entries that no row is for."""
    values = {row.name: KINDS[row.kind](row.default) for row in rows}
    known = {row.name: row for row in rows}
    for key, entry in entries.items():
        if key in known:
            values[key] = convert_entry(known[key], entry, errors)
        elif key:
            errors.add(entry.line, f"{entry.name}: no such setting"
                                   + suggest(key, known))
    return values


def convert_entry(row: Setting, entry: Entry, errors: Notes) -> Any:
    if KINDS[row.kind] is str:
        return full_text(entry)
    check_single(entry.line, entry.below, errors)
    return convert_text(row, entry.text, entry.line, errors)


def convert_text(row: Setting, text: str, line: int, errors: Notes) -> Any:
    """Give the value of a text, the default if it is bad; note why."""
    try:
        return KINDS[row.kind](text)
    except ValueError as error:
        name, equals = row.name, " ="
        if not line:
            name, equals = max(row.flags, key=len), ""
        wrong = f'{name}: "{text}" {error}'
        if row.default and "; " not in str(error):
            wrong += f"; write e.g. {name}{equals} {row.default}"
        errors.add(line, wrong)
        return KINDS[row.kind](row.default)


# From values to backends.

def make_backends(config: Any, sections: Sections,
                  report: Callable[..., None], chroot: str,
                  errors: Notes) -> tuple[Any, ...]:
    """Make the backends that are named."""
    made = []
    names = config.server.backend
    line = config.lines.get("backend", 0)
    if len(set(names)) < len(names):
        errors.add(line, "backend: names one twice; name each once")
    for name in dict.fromkeys(names):
        label = "" if name in sections else f"[{name}]: "
        entries = sections.setdefault(name, {"": Entry(line, "", "", "")})
        try:
            cls = find_backend(name)
        except ValueError as error:
            errors.add(line, f'backend: "{name}" {error}')
            continue
        options = convert_options(cls, name, entries, errors)
        try:
            backend = cls(options, functools.partial(report, name))
            if chroot and hasattr(backend, "enter_chroot"):
                backend.enter_chroot(chroot)
            made.append((name, backend))
        except ValueError as error:
            place_notes(entries, [label + text for text
                                  in str(error).splitlines()], errors)
    return tuple(made)


def check_others(config: Any, sections: Sections, errors: Notes) -> Notes:
    """Check the sections of no backend that is named; give all warnings."""
    warnings = Notes()
    for name, backend in config.backends:
        place_notes(sections[name], getattr(backend, "warnings", ()), warnings)
    for name, entries in sections.items():
        if name in CORE or name in config.server.backend:
            continue
        line = entries[""].line
        try:
            cls = find_backend(name, tuple(CORE))
            convert_options(cls, name, entries, errors)
        except ValueError as error:
            errors.add(line, f"[{name}]: {error}")
        warnings.add(line, f"[{name}]: is not used; add {name} to backend, or"
                           " remove the section")
    return warnings


def convert_options(cls: Any, name: str, entries: dict[str, Entry],
                    errors: Notes) -> dict[str, Any]:
    """Give what a backend is made of: the values, or texts, of its section."""
    if cls.settings is not None:
        rows = [Setting(name, *row) for row in cls.settings]
        return convert_section(rows, entries, errors)
    users = [entry for key, entry in entries.items() if key]
    for entry in users:
        if UNASKED.search(entry.name):
            errors.add(entry.line, f"{entry.name}: no query can match this"
                                   " name; write it without spaces and @")
    return {entry.name: full_text(entry) for entry in users}


def place_notes(entries: dict[str, Entry], texts: Iterable[str],
                notes: Notes) -> None:
    """Note what a backend says, `setting: text`, on the setting's line.

    A setting with a note is passed over: the backend saw the default.
    """
    known = {(line, text.partition(":")[0]) for line, text in notes}
    for text in texts:
        setting = text.partition(":")[0]
        entry = entries.get(setting, entries[""])
        if (entry.line, setting) not in known:
            notes.add(entry.line, text)


# ---- Log ------------------------------------------------------------------

MAX_SYSLOG = 8192       # bytes of a message; rsyslog takes no more
QUOTED = re.compile(r'[^ !#-\[\]-~]')   # what an escape must stand for
PLAIN = re.compile(r'[!#-<>-\[\]-~]+')  # a value that needs no quotes


def quote(text: str) -> str:
    """Put text into quotes as printable ASCII, whatever is in it."""
    return '"' + QUOTED.sub(escape, text) + '"'


def escape(match: re.Match[str]) -> str:
    """Spell one character so that it ends neither a value nor a line."""
    character = match[0]
    if character in '"\\':
        return "\\" + character
    if "\udc80" <= character <= "\udcff":       # a byte (PEP 383)
        return f"\\x{ord(character) - 0xdc00:02x}"
    return "".join(f"\\x{byte:02x}"
                   for byte in character.encode("utf-8", "surrogatepass"))


def quote_line(line: bytes) -> str:
    """Quote what a client has sent, without its end."""
    return quote(strip_line(line).decode("ascii", "surrogateescape"))


quote_short_line = functools.lru_cache(maxsize=256)(quote_line)


class Syslog:
    """A datagram socket to syslog(3), which comes back after a restart.

    Inside a chroot the path is out of reach: there only a socket that stays,
    as that of systemd-journald does, or UDP survives a restart of syslog.
    """

    def __init__(self, settings: Any) -> None:
        """Connect; raise OSError when nobody listens."""
        self.configured = settings.syslog_address
        self.address: Any = settings.syslog_address
        self.priority = FACILITIES.index(settings.facility) * 8
        self.sock = self.connect()

    def connect(self) -> socket.socket:
        if isinstance(self.address, str):
            family = socket.AF_UNIX
        else:           # a name is looked up once: later it may not work
            host, port = self.address[:2]
            found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
            family, _, _, _, self.address = found[0]
        sock = socket.socket(family, socket.SOCK_DGRAM)
        try:
            sock.connect(self.address)
        except OSError:
            sock.close()
            raise
        return sock

    def adopt(self, settings: Any) -> bool:
        """Go on by these settings, if they name the same syslog."""
        self.priority = FACILITIES.index(settings.facility) * 8
        return bool(self.configured == settings.syslog_address)

    def send(self, level: str, text: str) -> None:
        """Send a message without waiting; raise OSError if it is lost."""
        severity = {"error": 3, "warning": 4, "notice": 5, "info": 6,
                    "debug": 7}[level]
        data = f"<{self.priority + severity}>{text}".encode()[:MAX_SYSLOG]
        try:
            self.sock.send(data, DONT_WAIT)
        except BlockingIOError:         # it is there, but does not keep up
            raise
        except OSError:
            sock = self.connect()
            self.sock.close()
            self.sock = sock
            self.sock.send(data, DONT_WAIT)


class Log:
    """The log, one event a line, as key=value or JSON.

    It goes to stderr, a file, or syslog.  Any thread may write; a line is
    one system call.  Not logging: a line of that costs four times as much.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()    # a line must not go to a descriptor
        self.fd = 2                     # that is closed, and another's now
        self.syslog: Syslog | None = None
        self.level = INFO
        self.json: Any = None           # the module, when lines are JSON
        self.prefix = "fingerd"
        self.second = 0                 # the time that stamp spells
        self.stamp = ""
        self.room = writable_poll(2)
        self.lost = 0                   # lines that could not be written
        self.torn = False               # does the file end within a line?

    def open(self, settings: Any,
             owner: tuple[int, int] | None = None) -> None:
        """Use the settings of [log]; raise OSError and change nothing.

        A file that is made gets the owner (uid, gid).
        """
        syslog, fd = None, 2
        json: Any = None
        if settings.format == "json":
            import json  # text has no use for it
        if settings.to == "syslog":
            syslog = self.syslog
            if not syslog or not syslog.adopt(settings):
                syslog = Syslog(settings)
        elif settings.to != "stderr":
            fd = open_log_file(settings.to, owner)
        with self.lock:
            self.change(syslog, fd)
            self.level = LEVELS.index(settings.level)
            self.prefix = settings.prefix
            self.json = json

    def change(self, syslog: Syslog | None, fd: int) -> None:
        """Go on with these, and close what is open."""
        old_syslog, old_fd = self.syslog, self.fd
        self.syslog, self.fd = syslog, fd
        self.room = writable_poll(fd)
        with contextlib.suppress(OSError):      # it is closed all the same
            if old_syslog and old_syslog is not syslog:
                old_syslog.sock.close()
            if old_fd != 2:
                os.close(old_fd)

    def close(self) -> None:
        """Close what is open; what comes later goes to stderr."""
        with self.lock:
            self.change(None, 2)

    def event(self, level: str, event: str, **fields: Any) -> None:
        """Write a line if its level is wanted, the fields in their order."""
        if LEVELS.index(level) >= self.level:
            self.write(level, self.format(event, fields))

    def query(self, host: str, port: int, line: bytes, reply: Reply,
              sent: int, ms: int) -> None:
        """Write the line of a connection: bytes sent, milliseconds it took."""
        if self.level > INFO:
            return
        if self.json:
            self.write("info", self.format("query", {
                "client": host, "port": port,
                "q": strip_line(line).decode("utf-8", "backslashreplace"),
                "outcome": reply.outcome, "backend": reply.backend,
                "bytes": sent, "ms": ms}))
        else:
            q = quote_short_line(line) if len(line) < 99 else quote_line(line)
            self.write("info", f"query client={host} port={port}"
                       f" q={q} outcome={reply.outcome}"
                       f" backend={reply.backend} bytes={sent} ms={ms}")

    def format(self, event: str, fields: dict[str, Any]) -> str:
        if self.json:
            return str(self.json.dumps({"event": event, **fields}))
        texts = {key: str(value) for key, value in fields.items()}
        return " ".join([event, *(
            f"{key}={text if PLAIN.fullmatch(text) else quote(text)}"
            for key, text in texts.items())])

    def write(self, level: str, line: str) -> None:
        """Write a line, and what is known of lost ones before; no raise."""
        with self.lock:
            try:
                if self.lost:
                    lost = self.format("lost", {"lines": self.lost})
                    self.write_line("warning", lost, "\n" * self.torn)
                    self.lost, self.torn = 0, False
                self.write_line(level, line)
            except OSError:
                self.lost += 1

    def write_line(self, level: str, line: str, start: str = "") -> None:
        """Write a line to where it goes; OSError if that will not take it."""
        if self.syslog:
            self.syslog.send(level, f"{self.prefix}[{os.getpid()}]: {line}")
            return
        text = start + self.add_time(line)
        data = text.encode("ascii", "backslashreplace") + b"\n"
        if self.room:
            data = data[:select.PIPE_BUF - 1].rstrip(b"\n") + b"\n"
            if not self.room.poll(0):
                raise BlockingIOError
        if os.write(self.fd, data) < len(data):
            self.torn = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def add_time(self, line: str) -> str:
        """Put the time, or on stderr the prefix, in front of a line."""
        now = int(time.time())
        if now != self.second:
            self.second = now
            self.stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
        if line.startswith("{"):        # JSON; no event's name does
            return f'{{"time": "{self.stamp}", {line[1:]}'
        if self.fd == 2:
            return f"{self.prefix}: {line}"
        return f"{self.stamp} {line}"


def writable_poll(fd: int) -> Any:
    """Give a poll that tells whether a pipe or terminal has room.

    A write of at most PIPE_BUF bytes does not block then (pipe(7)).  None
    for a file, which always takes it.
    """
    try:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return None
    except OSError:
        return None
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return poll


def open_log_file(path: str, owner: tuple[int, int] | None) -> int:
    """Open a file to append to; one that is made is given to its owner."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY
    flags |= os.O_NONBLOCK      # a pipe that nobody reads must not hold us
    try:
        fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o640)
    except FileExistsError:
        return os.open(path, flags)
    if owner:
        os.fchown(fd, *owner)
    return fd


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


# ---- Process --------------------------------------------------------------

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
READ = 0                        # no signal, but acted on like one
TURN = 0.0002                   # seconds the loop waits for a busy thread
PIDFILE_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
DEFAULT_TIMEOUT = 60.0          # seconds, where the config does not tell
STOP_PATIENCE = 5.0             # seconds beyond the timeout, for --stop
PIDFILE_PATIENCE = 0.3          # seconds; others hold its lock for less
SPARE_DESCRIPTORS = 32          # log, listeners, selector, Python's own
LOOKUP_DESCRIPTORS = 7          # a thread's socket, or pipes of its process


class StartError(Exception):
    """Why the daemon cannot start, for the terminal."""


class Listener(socket.socket):
    """A listening socket.  Its accept() is that of socket.socket, less the
    enums that are made there for each client: half the time."""

    def accept(self) -> tuple[Any, Any]:
        fd, address = self._accept()    # type: ignore[attr-defined]
        family = socket.AF_INET if len(address) == 2 else socket.AF_INET6
        return socket.SocketType(family, socket.SOCK_STREAM, 0, fd), address


def address_text(address: tuple[Any, ...]) -> str:
    """Spell host and port of a socket's address."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def open_listeners(addresses: Iterable[tuple[str, int]]) -> list[
        socket.socket]:
    """Open a listening socket for each address of each name, or StartError."""
    listeners: list[socket.socket] = []
    try:
        for host, port in addresses:
            listeners += listen_on(host, port, [
                listener.getsockname() for listener in listeners])
    except StartError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def listen_on(host: str, port: int,
              taken: Container[Any] = ()) -> list[socket.socket]:
    """Listen on all addresses of a name; on one of them at least.

    Addresses that we have taken are passed over, and so are those of a
    family that the system lacks.
    """
    listeners: list[socket.socket] = []
    failure: OSError | None = None
    where = address_text((host, port))
    try:
        infos = socket.getaddrinfo(None if host == "*" else host, port,
                                   type=socket.SOCK_STREAM,
                                   flags=socket.AI_PASSIVE)
        for family, _, _, _, address in dict.fromkeys(infos):
            where = address_text(address)
            if address in taken:
                continue
            try:
                listener = listen((address[0], port, *address[2:]), family)
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL,
                                       errno.EAFNOSUPPORT):
                    raise
                failure = error
                continue
            listeners.append(listener)
            port = port or listener.getsockname()[1]    # one port for all
        if failure and not listeners:
            raise failure
    except OSError as error:
        for listener in listeners:
            listener.close()
        raise StartError(f"cannot listen on {where}: {reason(error)}"
                         + listen_hint(error)) from None
    except UnicodeError:
        raise StartError(f"cannot listen on {where}: that is no name of a"
                         " host") from None
    return listeners


def listen_hint(error: OSError) -> str:
    """Say how to mend the usual failures."""
    if error.errno == errno.EACCES:
        return "; start as root, or use a port above 1023"
    if error.errno == errno.EADDRINUSE:
        return "; stop the program that is there, or use another port"
    return ""


def listen(address: tuple[Any, ...], family: int) -> socket.socket:
    """Open one listening socket that does not block."""
    listener = Listener(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def passed_listeners() -> list[socket.socket]:
    """Take the sockets that systemd has opened (sd_listen_fds(3))."""
    pid = os.environ.pop("LISTEN_PID", "")
    number = os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not re.fullmatch("[0-9]{1,4}", number):
        return []
    listeners: list[socket.socket] = []
    for fd in range(3, 3 + int(number)):
        try:
            listener = Listener(fileno=fd)
            listening = listener.getsockopt(socket.SOL_SOCKET,
                                            socket.SO_ACCEPTCONN)
        except OSError as error:
            raise StartError(f"LISTEN_FDS: descriptor {fd} is no socket:"
                             f" {reason(error)}") from None
        if not listening or listener.family not in (socket.AF_INET,
                                                    socket.AF_INET6):
            raise StartError(f"LISTEN_FDS: descriptor {fd} is no listening"
                             " TCP socket; write ListenStream=79")
        listener.set_inheritable(False)
        listener.setblocking(False)
        listeners.append(listener)
    return listeners


def fit_max_clients(config: Any, log: Log) -> None:
    """Raise the limit of descriptors, and keep clients and threads in it."""
    limits = config.limits
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    most = soft - SPARE_DESCRIPTORS
    if config.server.forward or any(
            backend.waits for _, backend in config.backends):
        threads = max(1, most // 2 // LOOKUP_DESCRIPTORS)
        if threads < limits.max_threads:
            log.event("notice", "limits", max_threads=threads,
                      descriptors=soft, configured=limits.max_threads)
            limits.max_threads = threads
        most -= LOOKUP_DESCRIPTORS * limits.max_threads
    most = max(1, most)
    if most < limits.max_clients:
        log.event("notice", "limits", max_clients=most, descriptors=soft,
                  configured=limits.max_clients)
        limits.max_clients = most


class Pidfile:
    """A file with the number of the process, locked while that lives.

    The lock (flock(2)) tells whether one runs, never the number: a file that
    a crash has left behind is not locked, and does no harm.
    """

    def __init__(self, path: str) -> None:
        """Lock the file, made if need be; StartError if another holds it."""
        self.path = path
        until = time.monotonic() + PIDFILE_PATIENCE
        try:
            while not self.lock():
                if time.monotonic() > until:
                    pid = running_pid(path) or "not known yet"
                    raise StartError(f"already running, pid {pid}"
                                     f" ({path} is locked)")
                time.sleep(0.01)
        except OSError as error:
            raise StartError("cannot lock the pidfile:"
                             f" {reason(error)}") from None

    def lock(self) -> bool:
        """Try once.  A --status may hold the lock, but only for a moment."""
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
                          | PIDFILE_FLAGS, 0o600)   # none but us may lock it
        try:
            check_pidfile(self.fd, self.path)
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # One that ends may have removed the file since it was opened.
            if os.path.samestat(os.fstat(self.fd), os.stat(self.path)):
                os.ftruncate(self.fd, 0)    # a number there is another's
                return True
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(self.fd)
        return False

    def write(self) -> None:
        """Put the number of this process in."""
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, b"%d\n" % os.getpid(), 0)

    def remove(self) -> None:
        """Empty the file, and remove it if we may; that ends the lock."""
        os.ftruncate(self.fd, 0)
        with contextlib.suppress(OSError):      # in a chroot it is another
            if os.path.samestat(os.fstat(self.fd), os.stat(self.path)):
                os.unlink(self.path)
        os.close(self.fd)


def check_pidfile(fd: int, path: str) -> str:
    """Give the number in a pidfile; StartError if it is no such file."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise StartError(f"{path} is no regular file; name another pidfile")
    text = os.pread(fd, 20, 0).strip()
    if not re.fullmatch(b"[0-9]*", text):
        raise StartError(f"{path} has other text than a process number; name"
                         " another pidfile")
    return text.decode()


def running_pid(path: str) -> int:
    """Give the process number of the daemon that holds a pidfile, or 0."""
    until = time.monotonic() + STOP_PATIENCE
    while True:
        try:
            fd = os.open(path, os.O_RDONLY | PIDFILE_FLAGS)
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise StartError("cannot read the pidfile:"
                             f" {reason(error)}") from None
        try:
            text = check_pidfile(fd, path)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return 0
        finally:
            os.close(fd)
        if text:
            return int(text)
        if time.monotonic() > until:
            raise StartError(f"{path} is locked, but has no number in it")
        time.sleep(0.01)        # it is just starting, or ending


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
        chosen: Any = daemon.user or to_user("nobody")
        gid = chosen.gid if daemon.group is None else daemon.group
        if gid is None:
            gid = pwd.getpwnam("nobody").pw_gid
    except (KeyError, ValueError):
        raise StartError('there is no user "nobody"; write user = NAME and'
                         " group = NAME") from None
    return chosen.name, chosen.uid, gid


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
            raise StartError("the rights of root can be had again")
    if os.getgroups() != [gid] or os.getgid() != gid:
        raise StartError("groups of root remain")
    forbid_new_privileges()


def forbid_new_privileges() -> None:
    """Take the power from set-user-id programs (Linux: prctl(2))."""
    if sys.platform == "linux":
        with contextlib.suppress(ImportError):  # some Pythons are without
            import ctypes
            ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)     # PR_SET_NO_NEW_PRIVS


def load_late_imports() -> None:
    """Load what cannot be read when it is needed: closed, or outside."""
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


def daemonize() -> int:
    """Go on in the background, in a session of its own (daemon(7)).

    Only the daemon returns, with a descriptor: a byte written to it ends the
    launching command with status 0, its close without one with status 1.
    """
    launcher, ready = os.pipe()
    if os.fork():
        os.close(ready)
        os._exit(0 if os.read(launcher, 1) else 1)
    os.close(launcher)
    os.setsid()
    if os.fork():       # who leads a session could get a terminal again
        os._exit(0)
    return ready


def release_launcher(launcher: int, null: int) -> None:
    """End the launching command with status 0; leave its terminal."""
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.write(launcher, b"\0")
    os.close(launcher)


class Notifier(contextlib.AbstractContextManager):
    """Tells systemd how it goes (sd_notify(3)); without one it is silent."""

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

    def tell(self, *lines: str) -> None:
        if self.sock:
            with contextlib.suppress(OSError):
                self.sock.send("\n".join(lines).encode(), DONT_WAIT)

    def live(self) -> float:
        """Give a sign of life; say in how many seconds the next is due."""
        self.tell("WATCHDOG=1")
        return self.period

    def __exit__(self, *exception: object) -> None:
        if self.sock:
            self.sock.close()


class Daemon:
    """The process: how it starts, what signals do, how it ends."""

    def __init__(self, config: Any, log: Log,
                 reader: Callable[..., Any]) -> None:
        self.config = config
        self.log = log
        self.reader = reader            # for the config at a path, anew
        self.directory = os.getcwd()    # where relative paths start
        self.root = ""                  # the chroot that we are in
        self.ids: tuple[str, int, int] | None = None    # whom we became
        self.pidfile: Pidfile | None = None
        self.reloads = 0                # asked for and not done
        self.read: Any = None           # what the last one of them found
        self.server: FingerServer

    def run(self) -> None:
        """Start, serve until a signal, end.  Raises StartError.

        All that can fail does so before the launching command returns, most
        of it before the fork.
        """
        os.umask(self.config.daemon.umask)
        sys.setswitchinterval(TURN)
        site = Site(self.config, self.log)
        with contextlib.ExitStack() as opened:
            listeners = passed_listeners() or open_listeners(
                self.config.server.listen)
            for listener in listeners:
                opened.enter_context(listener)
            self.ids = choose_ids(self.config.daemon)
            if self.config.daemon.pidfile:
                self.pidfile = Pidfile(self.path(self.config.daemon.pidfile))
            self.open_log()
            self.notifier = opened.enter_context(Notifier())
            null = opened.enter_context(open(os.devnull, "r+b", 0))
            self.give_up_rights(site)
            # From here on a signal waits until the loop can act on it.
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            launcher = daemonize() if self.config.daemon.daemonize else None
            if self.pidfile:
                self.pidfile.write()
            self.server = opened.enter_context(
                FingerServer(listeners, site, self.log))
            self.watch_signals()
            self.tell_ready()
            if launcher is not None:
                release_launcher(launcher, null.fileno())
            self.server.serve_forever()
            self.tell_end()

    def run_inetd(self, sock: socket.socket) -> None:
        """Serve one connection, which inetd(8) has accepted."""
        os.umask(self.config.daemon.umask)
        site = Site(self.config, self.log)
        self.ids = choose_ids(self.config.daemon)
        self.open_log()
        self.give_up_rights(site)
        with FingerServer([], site, self.log) as server:
            server.serve_one(sock)

    def give_up_rights(self, site: Site) -> None:
        """Enter the chroot and the rundir, and become the user."""
        daemon = self.config.daemon
        rundir = daemon.rundir or (
            "/" if daemon.daemonize or daemon.chroot else "")
        if self.ids and self.ids[1] or daemon.chroot:
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

    def open_log(self) -> None:
        settings = self.config.log
        if settings.to not in ("stderr", "syslog"):
            settings.to = self.path(settings.to)
        elif settings.to == "stderr" and self.config.daemon.daemonize:
            complain("the log will be lost: it goes to stderr, and there is"
                     " none in the background; write to = syslog, or a file")
        try:
            self.log.open(settings, self.ids[1:] if self.ids else None)
        except OSError as error:
            where = "open the log"
            if settings.to == "syslog":
                address = settings.syslog_address
                where = "reach syslog at " + (
                    address if isinstance(address, str)
                    else address_text(address))
            raise StartError(f"cannot {where}: {reason(error)}") from None

    def tell_ready(self) -> None:
        """Write the first lines of the log, and let systemd know."""
        event = self.log.event
        fit_max_clients(self.config, self.log)
        for (section, name), text in self.config.raw_values.items():
            event("debug", "setting", section=section, name=name, value=text)
        if self.ids and not self.config.daemon.user:
            event("notice", "user", name=self.ids[0],
                  reason="started as root, and user is not set")
        user = {"user": self.ids[0]} if self.ids else {}
        event("notice", "ready", listen=",".join(
            address_text(listener.getsockname())
            for listener in self.server.listeners),
            backend=",".join(name for name, _ in self.config.backends),
            **user, pid=os.getpid())
        self.notifier.tell("READY=1", f"MAINPID={os.getpid()}")
        if self.notifier.period:
            self.server.heartbeat = self.notifier.live

    def tell_end(self) -> None:
        self.log.event("notice", "stopped", signal=self.server.stopped_by,
                       queries=sum(self.server.outcomes.values()),
                       seconds=int(time.monotonic() - self.server.started))
        if self.pidfile:
            self.pidfile.remove()
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
            signal.SIGHUP: self.reload, signal.SIGUSR1: self.log_counters,
            READ: self.take_read}
        for number in SIGNALS:
            signal.signal(number, note)
        # A launcher may have left it ignored: then no program has a status.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.set_wakeup_fd(self.server.waker.fileno(),
                             warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def stop(self, name: str) -> None:
        self.notifier.tell("STOPPING=1")
        self.server.stop(name)

    def reload(self) -> None:
        """Take up the config anew: all of it or, if it is bad, nothing.

        The log file is opened anew in both cases, and at once.  The config
        is read by a thread, for a long one takes seconds.
        """
        if self.server.stop_deadline is not None:
            return
        with contextlib.suppress(OSError):      # change_config() will tell
            self.log.open(self.config.log)
        self.notifier.tell("RELOADING=1",
                           f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        self.reloads += 1
        if self.reloads == 1:   # else one is being read, and may be old
            self.start_reading()

    def start_reading(self) -> None:
        """Have a thread read the config; without one, read it here."""
        reader = threading.Thread(target=self.read_anew, daemon=True)
        try:
            reader.start()
        except RuntimeError:
            self.read_anew()

    def read_anew(self) -> None:
        """Read the config, and let the loop know what came of it."""
        gc.collect()        # a web backend that was replaced is a cycle
        try:
            config = self.reader(self.path(self.config.path),
                                 old=self.config)
            if config.log.to not in ("stderr", "syslog"):
                config.log.to = self.path(config.log.to)
            self.read = config, Site(config, self.log)
        except Exception as error:      # whatever it is, the old one serves
            self.read = error
        self.server.signals.append(READ)
        self.server.wake()

    def take_read(self) -> None:
        """Serve by the config that has been read, or keep the old one."""
        if self.server.stop_deadline is not None:
            return
        try:
            if isinstance(self.read, Exception):
                raise self.read
            self.change_config(*self.read)
        except Exception as error:
            self.keep_config(error)
        self.read = None
        self.reloads = min(self.reloads - 1, 1)
        if self.reloads:
            self.start_reading()
        else:
            self.notifier.tell("READY=1")

    def change_config(self, config: Any, site: Site) -> None:
        """Go on by another config; raise OSError if its log cannot be had."""
        self.log.open(config.log)
        config.path = self.config.path
        self.tell_what_stays(config)
        fit_max_clients(config, self.log)
        self.server.change_site(site)
        self.config = config
        self.log.event("notice", "reloaded", config=config.path)

    def keep_config(self, error: Exception) -> None:
        """Say why the old config stays."""
        text = (reason(error) if isinstance(error, OSError)
                else str(error) or repr(error))
        for line in text.splitlines():
            self.log.event("warning", "reload-failed", reason=line)

    def tell_what_stays(self, config: Any) -> None:
        """Log what a reload would have to change, but cannot."""
        for row in SETTINGS:
            key = row.section, row.name
            if (row.section == "daemon" or row.name == "listen") and (
                    config.raw_values[key] != self.config.raw_values[key]):
                self.log.event("warning", "not-reloaded", setting=row.name,
                               reason="only a restart can change it")
                config.raw_values[key] = self.config.raw_values[key]

    def log_counters(self) -> None:
        server = self.server
        self.log.event(
            "notice", "counters",
            seconds=int(time.monotonic() - server.started),
            queries=sum(server.outcomes.values()), clients=server.crowd,
            lookups=server.lookups, **server.outcomes)


# ---- Command line ---------------------------------------------------------

# Options with a value: flags, attribute, what the value is called, help.
OPTIONS = (
    (("--config",), "config", "FILE", "config; " + " or ".join(CONFIG_FILES)),
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
    """Raises its errors, which argparse would print, as ConfigError."""

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
    return parser


def parse_options(argv: list[str]) -> Any:
    """Give what the options set, None for the others, or ConfigError."""
    args, rest = make_parser().parse_known_args(join_values(argv))
    if rest:
        raise ConfigError(f'"{rest[0]}" is not an option; see --help')
    for name, value in vars(args).items():
        if value == []:         # argparse before 3.13 drops the value --
            setattr(args, name, "--")
    return args


def join_values(argv: list[str]) -> list[str]:
    """Join options and values with =, so that a value may begin with -."""
    with_value = {flag for flags, *_ in OPTIONS for flag in flags}
    joined = []
    words = iter(argv)
    for word in words:
        value = next(words, None) if word in with_value else None
        joined.append(word if value is None else f"{word}={value}")
    return joined


def settings_text() -> str:
    """List all settings with their defaults, section by section."""
    rows = list(SETTINGS)
    with contextlib.suppress(ValueError):   # this file alone: only its own
        for name, cls in load_backends().items():
            rows += [Setting(name, *row) for row in cls.settings or ()]
    rows.append(Setting("users", "NAME", "text", "TEXT",
                        "a user, and the text about that user"))
    lines = ["settings of the config file, and their defaults:"]
    for section in dict.fromkeys(row.section for row in rows):
        lines += ["", f"[{section}]"]
        for row in rows:
            if row.section == section:
                lines += [f"  {row.name} = {row.default}".rstrip(),
                          f"        {row.help}"]
    return "\n".join(lines)


def find_config(path: str | None) -> str:
    """Give the path of the config: the one named, or one that exists."""
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
    raise ConfigError(f"neither {' nor '.join(CONFIG_FILES)} exists; copy"
                      " fingerd.conf.example to one of them, or name a file"
                      " with --config")


def print_reply(config: Any, log: Log, line: str, client: str) -> int:
    """Print what a client would get for a line; 1 if a backend failed."""
    import ipaddress  # not needed to serve
    try:
        client = plain_address(client)
        ipaddress.ip_address(client)
    except ValueError:
        raise ConfigError(f'--from: "{client}" is not an address; write'
                          " e.g. --from 192.0.2.7") from None
    site = Site(config, log)
    ids = choose_ids(config.daemon) if os.geteuid() == 0 else None
    if ids:                     # no program is run as root
        load_late_imports()
        drop_privileges(*ids)
    reply = FIXED["denied"]
    if site.allows(client):
        deadline = time.monotonic() + config.limits.timeout
        reply = site.answer(os.fsencode(line), client, lambda: "localhost",
                            deadline) or FIXED["failed"]
    say(reply.data)
    return 1 if reply.outcome == "failed" else 0


def control(args: types.SimpleNamespace, pidfile: str, timeout: float) -> int:
    """Act on the running daemon; give the exit status."""
    if not pidfile:
        raise ConfigError("there is no pidfile to know the daemon by; set"
                          " pidfile in [daemon], or give --pidfile")
    path = os.path.abspath(pidfile)
    pid = running_pid(path)
    if not pid:
        say(b"fingerd is not running\n")
        return 3 if args.status else 1 if args.reload else 0
    if args.status:
        say(f"fingerd is running, pid {pid}\n".encode())
        return 0
    try:
        os.kill(pid, signal.SIGTERM if args.stop else signal.SIGHUP)
    except OSError as error:
        raise StartError(f"cannot signal pid {pid}:"
                         f" {reason(error)}") from None
    if args.stop:
        wait_for_end(path, pid, timeout + STOP_PATIENCE)
    return 0


def wait_for_end(path: str, pid: int, patience: float) -> None:
    """Wait until nobody, or another, holds the pidfile; or StartError."""
    until = time.monotonic() + patience
    while running_pid(path) == pid:
        if time.monotonic() > until:
            raise StartError(f"pid {pid} has not ended in {patience:.0f}"
                             " seconds")
        time.sleep(0.02)


def take_inetd_socket() -> socket.socket:
    """Take the connection from standard input, where inetd puts it.

    It is stdout and stderr, too, and nothing else may be written to it.
    """
    try:
        sock = socket.socket(fileno=os.dup(0))
        if len(sock.getpeername()) < 2 or sock.type != socket.SOCK_STREAM:
            raise OSError("it is not TCP")
    except OSError as error:
        raise StartError("--inetd: standard input is no connection:"
                         f" {reason(error)}; have inetd start it") from None
    import syslog
    syslog.openlog("fingerd", syslog.LOG_PID | syslog.LOG_NDELAY,
                   syslog.LOG_DAEMON)       # for refuse_for_inetd
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            os.dup2(null, fd)
    os.close(null)
    return sock


def refuse_for_inetd(sock: socket.socket, error: Exception) -> None:
    """Tell the client that we fail, and syslog why: there is no terminal."""
    import syslog
    with contextlib.suppress(OSError), sock:
        sock.settimeout(GRACE)
        sock.sendall(FIXED["failed"].data)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(4096):      # a close with bytes unread is a reset
            pass
    for line in str(error).splitlines():
        syslog.syslog(syslog.LOG_ERR, UNSAFE.sub(show_unsafe, line))


def write_bundle(path: str) -> None:
    """Write a zipapp of both files that anybody may run.

    It holds them compiled, too, for a quicker start on the same Python.
    """
    import py_compile
    import tempfile
    import zipapp
    try:
        load_backends()
        with tempfile.TemporaryDirectory() as folder:
            for name, module in [("fingerd", __name__),
                                 ("fingerd_backends", "fingerd_backends")]:
                loader: Any = sys.modules[module].__loader__
                source = os.path.join(folder, f"{name}.py")
                with open(source, "w", encoding="utf-8") as file:
                    file.write(loader.get_source(module))
                py_compile.compile(
                    source, f"{source}c", f"{name}.py", doraise=True,
                    invalidation_mode=(
                        py_compile.PycInvalidationMode.UNCHECKED_HASH))
            with open(path, "wb") as bundle:
                zipapp.create_archive(folder, bundle, "/usr/bin/env python3",
                                      "fingerd:run", compressed=True)
                if stat.S_ISREG(os.fstat(bundle.fileno()).st_mode):
                    os.fchmod(bundle.fileno(), 0o755)
    except ValueError as error:
        raise ConfigError(f"--bundle: {error}") from None
    except OSError as error:
        raise StartError(f"cannot write the bundle: {reason(error)}"
                         ) from None


def carry_out(args: Any, log: Log) -> int:
    """Do what the options say; give the exit status."""
    if args.address is not None and args.query is None:
        raise ConfigError("--from: goes with --query only")
    if args.version:
        say(f"fingerd {__version__}\n".encode())
    elif args.help:
        say(f"{make_parser().format_help()}\n{settings_text()}\n".encode())
    elif args.bundle is not None:
        write_bundle(args.bundle)
    elif args.inetd and not args.check:
        return serve_inetd(args, log)
    else:
        return run_config(args, log)
    return 0


def serve_inetd(args: Any, log: Log) -> int:
    """Serve the connection that inetd(8) has accepted."""
    sock = take_inetd_socket()
    try:
        return run_config(args, log, sock)
    except (ConfigError, StartError) as error:
        refuse_for_inetd(sock, error)
        raise


def run_config(args: Any, log: Log, sock: socket.socket | None = None) -> int:
    """Read the config, and do what needs it; give the exit status."""
    def report(backend: str, text: str, level: str = "warning") -> None:
        log.event(level, "backend", name=backend, text=text)

    overrides = {row.name: getattr(args, row.name) for row in SETTINGS
                 if getattr(args, row.name, None) is not None}
    read = functools.partial(read_config, report=report, overrides=overrides)
    try:
        config = read(find_config(args.config))
    except ConfigError:
        # A config that has been broken since does not keep it running.
        if not (args.pidfile and (args.stop or args.status)):
            raise
        return control(args, args.pidfile, DEFAULT_TIMEOUT)
    if args.status or args.stop or args.reload:
        return control(args, config.daemon.pidfile, config.limits.timeout)
    if args.query is not None:
        client = "127.0.0.1" if args.address is None else args.address
        return print_reply(config, log, args.query, client)
    if not sock:
        for warning in config.warnings + find_useless(config, args.inetd):
            complain(warning)
    if args.check:
        say(to_wire(f"{config.path} is good").replace(b"\r\n", b"\n"))
        return 0
    close_inherited()
    daemon = Daemon(config, log, read)
    if sock:
        daemon.run_inetd(sock)
    else:
        daemon.run()
    return 0


def find_useless(config: Any, inetd: bool) -> list[str]:
    """Warn of settings that do nothing when it is started this way."""
    useless = {}
    if count_passed():
        useless["listen"] = "is not used with systemd's sockets; remove it"
    if inetd:
        for name in ("max_clients_per_host", "queries_per_minute"):
            useless[name] = "does nothing under inetd; set limits in inetd"
    warnings = Notes()
    for name, why in useless.items():
        line = config.lines.get(name)
        if line is not None:
            warnings.add(line, f"{name if line else '--' + name}: {why}")
    return warnings.texts(config.path)


def count_passed() -> int:
    """Count the sockets that systemd passes to us (sd_listen_fds(3))."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return 0
    number = os.environ.get("LISTEN_FDS", "")
    return int(number) if re.fullmatch("[0-9]{1,4}", number) else 0


def close_inherited() -> None:
    """Close descriptors that a careless parent has left open for us.

    What this process has opened itself is not inheritable (PEP 446).
    """
    try:
        found = [int(name) for name in os.listdir("/dev/fd")]
    except OSError:             # it is not there: try the usual ones
        found = list(range(1024))
    first = 3 + count_passed()
    for fd in found:
        with contextlib.suppress(OSError):
            if fd >= first and os.get_inheritable(fd):
                os.close(fd)


def say(data: bytes) -> None:
    """Write to stdout; a closed pipe is not an error."""
    try:
        while data:
            data = data[os.write(1, data):]
    except BrokenPipeError:
        pass
    except OSError as error:
        raise StartError(f"cannot print: {reason(error)}") from None


def complain(text: str) -> None:
    """Write to stderr, each line with the program's name in front."""
    for line in text.split("\n"):
        data = to_wire(f"fingerd: {line}").replace(b"\r\n", b"\n")
        with contextlib.suppress(OSError):
            os.write(2, data)


def open_standard_streams() -> None:
    """Open /dev/null where there is no stdin, stdout or stderr.

    Otherwise the first socket gets that number, and a client what is printed.
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
        args = parse_options(sys.argv[1:] if argv is None else argv)
        return carry_out(args, Log())
    except ConfigError as error:
        complain(str(error))
        return 2
    except StartError as error:
        complain(str(error).replace("\n", "\\n"))
    except OSError as error:        # as when there are no descriptors
        complain(f"cannot go on: {reason(error)}")
    except KeyboardInterrupt:       # before there is anything to end cleanly
        pass
    return 1


def run() -> None:
    """Be the program, as a script or in a zipapp."""
    sys.exit(main())


if __name__ == "__main__":
    run()
