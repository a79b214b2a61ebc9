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

import argparse
import collections
import contextlib
import errno
import functools
import io
import ipaddress
import os
import re
import resource
import selectors
import signal
import socket
import socketserver
import sys
import threading
import time
import traceback
import types
from typing import Any, Callable, Iterable, Iterator, NamedTuple

__version__ = "1.0"

MAX_USERS = 8           # names in one line; each may cost a whole lookup
FINGER_PORT = 79        # RFC 1288 2.1; also where a forwarded query goes
CONFIG_FILES = ("fingerd.conf", "/etc/fingerd.conf")


def reason(error: OSError) -> str:
    """Say in lower case, and without its number, what the system said."""
    text = error.strerror or str(error) or type(error).__name__
    text = text[:1].lower() + text[1:]
    return f"{text}: {error.filename}" if error.filename else text


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


@functools.lru_cache(maxsize=1024)      # names are asked for again and again
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
    """

    waits = False
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
    classes = BACKENDS if kind in BACKENDS else load_backends()
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


LEVELS = ("debug", "info", "notice", "warning", "error")
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
    """Convert host names; their case does not count."""
    return words(text.lower())


def networks(text: str) -> tuple[Any, ...]:
    """Convert networks in CIDR notation; an address is one, too."""
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


def some_text(text: str) -> str:
    """Convert a text that must not be empty."""
    if not text:
        raise ValueError("is empty")
    return text


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
    "log": Kind(some_text, "/var/log/fingerd.log"),
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
    Setting("log", "to", "log", "stderr", "stderr, or the path of a file",
            ("-l", "--logfile")),
    Setting("log", "format", "format", "text", "text or json"),
    Setting("log", "level", "level", "info",
            "least level written: " + ", ".join(LEVELS)),
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
                 overrides: dict[str, str] | None = None) -> None:
        self.path = path
        self.report = report        # called with a backend's name and text
        self.overrides = overrides or {}        # by the name of the setting
        self.errors: list[tuple[int, str]] = []
        self.sections: dict[str, Section] = {}

    def read(self) -> Any:
        """Give a namespace of sections, each a namespace of its settings.

        It has path and backends (pairs of name and object) besides.  Raises
        ConfigError with all errors in line order, and their count.
        """
        try:
            with open(self.path, encoding="utf-8-sig") as file:
                self.parse(file)
        except OSError as error:
            raise ConfigError(f"cannot read the config: {reason(error)};"
                              " name another with --config") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{self.path} is not UTF-8; convert it, e.g."
                              " with iconv -f latin1 -t utf-8") from None
        config = types.SimpleNamespace(path=self.path)
        for name in dict.fromkeys(row.section for row in SETTINGS):
            rows = [row for row in SETTINGS if row.section == name]
            values = self.convert_section(name, rows)
            setattr(config, name, types.SimpleNamespace(**values))
        config.backends = self.make_backends(config.server.backend)
        self.raise_errors()
        return config

    def raise_errors(self) -> None:
        if not self.errors:
            return
        lines = [f"{self.path}:{line}: {message}" if line else message
                 for line, message in sorted(self.errors)]
        number = "1 error" if len(lines) == 1 else f"{len(lines)} errors"
        raise ConfigError("\n".join(
            [*lines, f"{number} in {self.path}, not started"]))

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

    def error_indented(self, line: int) -> None:
        self.error(line, "indented line outside a text value; write it"
                         " without spaces in front")

    def parse_section(self, number: int, line: str) -> Section:
        """Open a section; one that will not do is read and forgotten."""
        section = Section(number, {})
        name = line[1:-1].strip()
        if line[-1] != "]" or not name:
            self.error(number, f'"{line}" is no section; write [name]')
        elif name in self.sections:
            self.error(number, f"[{name}]: stands on line "
                       f"{self.sections[name].line} already; make them one")
        else:
            self.sections[name] = section
        return section

    def parse_entry(self, section: Section | None, start: int,
                    block: list[str], indented: int) -> None:
        """Put one setting into its section."""
        name, equals, text = block[0].partition("=")
        name = name.rstrip()
        if not equals or not name:
            self.error(start, f'"{block[0]}" is neither a section nor a'
                              " setting; write [section] or name = value")
        elif section is None:
            self.error(start, f"{name}: stands in no section; write"
                              " its [section] above it")
        elif name.lower() in section.entries:
            known = section.entries[name.lower()]
            self.error(start, f"{name}: stands on line {known.line} already;"
                              " keep one of the two")
        else:
            text = join_lines(text.lstrip(), block[1:])
            section.entries[name.lower()] = Entry(start, name, text, indented)

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
        if entry:
            if entry.indented and KINDS[row.kind].convert is not str:
                self.error_indented(entry.indented)
            else:
                value = self.convert_text(row, row.name, " = ", entry.text,
                                          entry.line, value)
        if row.flags and row.name in self.overrides:
            value = self.convert_text(row, row.flags[-1], " ",
                                      self.overrides[row.name], 0, value)
        return value

    def convert_text(self, row: Setting, name: str, equals: str, text: str,
                     line: int, default: Any) -> Any:
        kind = KINDS[row.kind]
        try:
            return kind.convert(text)
        except ValueError as error:
            self.error(line, f'{name}: "{text}" {error};'
                             f" write e.g. {name}{equals}{kind.example}")
            return default

    # From values to backends.

    def make_backends(self, names: tuple[str, ...]) -> tuple[Any, ...]:
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
            options = self.backend_options(name, cls)
            if name in names and options is not None:
                made.append((name, self.make_backend(name, cls, options)))
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
                if re.search("[ \t@]", entry.name):
                    self.error(entry.line, f"{entry.name}: nobody can ask for"
                               " it; write a name without spaces and @")
        return options if len(self.errors) == before else None

    def make_backend(self, name: str, cls: Any, options: Any) -> Any:
        """Build one backend; its ValueError begins with the setting."""
        try:
            return cls(options, functools.partial(self.report, name))
        except ValueError as error:
            section = self.sections.get(name, Section(0, {}))
            setting = str(error).partition(":")[0]
            entry = section.entries.get(setting)
            where = "" if section.line else f"{self.path}: [{name}] "
            self.error(entry.line if entry else section.line,
                       f"{where}{error}")


# ---- Log ------------------------------------------------------------------

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


class Log:
    """The log, one event a line, as key=value or JSON, to stderr or a file.

    Not logging: a line of that costs four times as much as this one, with
    the system call.  Any thread may write; a line is one system call.
    """

    def __init__(self) -> None:
        self.fd = 2
        self.level = LEVELS.index("info")
        self.json: Any = None           # the module, when lines are JSON
        self.second = 0                 # the time that stamp spells
        self.stamp = ""
        self.lost = 0                   # lines that could not be written
        self.torn = False               # does the file end within a line?

    def open(self, settings: Any) -> None:
        """Use the settings of [log]; raise OSError and change nothing."""
        fd = 2
        if settings.to != "stderr":
            fd = os.open(settings.to, os.O_WRONLY | os.O_CREAT | os.O_APPEND
                         | os.O_CLOEXEC | os.O_NOCTTY, 0o640)
        self.close()
        self.fd = fd
        self.level = LEVELS.index(settings.level)
        self.json = None
        if settings.format == "json":
            import json  # text has no use for it
            self.json = json

    def close(self) -> None:
        """Close the file; what comes later goes to stderr."""
        if self.fd != 2:
            os.close(self.fd)
        self.fd = 2

    def event(self, level: str, event: str, **fields: Any) -> None:
        """Write a line if its level is wanted, the fields in their order."""
        if LEVELS.index(level) >= self.level:
            self.write(self.format(event, fields))

    def query(self, host: str, port: int, line: bytes, reply: Reply,
              sent: int, ms: int) -> None:
        """Write the line of a connection: bytes sent, milliseconds it took."""
        if LEVELS.index("info") < self.level:
            return
        if self.json:
            self.write(self.format("query", {
                "client": host, "port": port,
                "q": line.decode("utf-8", "backslashreplace"),
                "outcome": reply.outcome, "backend": reply.backend,
                "bytes": sent, "ms": ms}))
        else:
            self.write(f"query client={host} port={port}"
                       f" q={quote(line.decode('ascii', 'surrogateescape'))}"
                       f" outcome={reply.outcome} backend={reply.backend}"
                       f" bytes={sent} ms={ms}")

    def format(self, event: str, fields: dict[str, Any]) -> str:
        if self.json:
            return str(self.json.dumps({"event": event, **fields}))
        texts = {key: str(value) for key, value in fields.items()}
        return " ".join([event, *(
            f"{key}={text if PLAIN.fullmatch(text) else quote(text)}"
            for key, text in texts.items())])

    def write(self, line: str) -> None:
        """Write a line, its time or the daemon's name in front; no raise."""
        try:
            if self.lost:
                lost = self.format("lost", {"lines": self.lost})
                os.write(self.fd, self.finish("\n" * self.torn, lost))
                self.lost, self.torn = 0, False
            data = self.finish("", line)
            if os.write(self.fd, data) < len(data):
                self.lost, self.torn = 1, True
        except OSError:
            self.lost += 1

    def finish(self, start: str, line: str) -> bytes:
        """Make the bytes of a line."""
        now = int(time.time())
        if now != self.second:
            self.second = now
            self.stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
        if self.json:
            line = f'{{"time": "{self.stamp}", {line[1:]}'
        elif self.fd == 2:
            line = "fingerd: " + line
        else:
            line = f"{self.stamp} {line}"
        return (start + line + "\n").encode("ascii")


# ---- Site -----------------------------------------------------------------

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
    return str(ipaddress.ip_network((host, 64), strict=False))


class Site:
    """What is answered, and to whom: policy and backends of one config."""

    def __init__(self, config: Any, log: Log) -> None:
        self.config = config
        self.log = log
        self.backends = config.backends
        self.max_query = config.limits.max_query
        self.max_reply = config.limits.max_reply
        server = config.server
        self.header = to_wire(server.header) if server.header else b""
        self.footer = to_wire(server.footer) if server.footer else b""
        self.names = frozenset({"localhost", *(
            server.hostname or (socket.gethostname().lower(),))})
        self.guarded = bool(server.allow or server.deny)
        self.allows = functools.lru_cache(maxsize=4096)(self.find_access)

    def find_access(self, host: str) -> bool:
        """May this address ask?  A deny wins over any allow."""
        address = ipaddress.ip_address(host)
        server = self.config.server
        if any(address in network for network in server.deny):
            return False
        return not server.allow or any(address in network
                                       for network in server.allow)

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
        data = (self.frame(reply.data) if reply.outcome == "answered"
                else truncate(reply.data, self.max_reply))
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
                           traceback=traceback.format_exc())
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
        if port is None or not all(query.hosts):
            return FIXED["forward-denied"]
        if deadline is None:
            raise WouldWait
        line = ("/W " if query.verbose else "") + "@".join(
            ["".join(query.users), *others])
        try:
            answer = fetch_finger(host, port, line, self.max_reply, deadline)
        except OSError as error:
            self.log.event("warning", "failed", forward=f"{host}:{port}",
                           reason=reason(error))
            return FIXED["failed"]
        return Reply("forwarded", truncate(to_wire(answer), self.max_reply))


def fetch_finger(host: str, port: int, line: str, limit: int,
                 deadline: float) -> str:
    """Ask another finger server; give what it says, at most limit bytes.

    Raises OSError, TimeoutError at the deadline (monotonic seconds).
    """
    def left() -> float:
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("the next hop took too long")
        return seconds

    answer = b""
    with socket.create_connection((host, port), left()) as sock:
        sock.sendall(line.encode() + b"\r\n")
        while len(answer) <= limit:
            sock.settimeout(left())
            data = sock.recv(65536)
            if not data:
                break
            answer += data
    return answer.decode("utf-8", "backslashreplace")


# ---- Server ---------------------------------------------------------------

BACKLOG = 1024          # connections the kernel holds for us: see listen(2)
ACCEPTS = 256           # in a row, before other clients get their turn
GRACE = 1.0             # seconds for a backend to come back from a timeout
PAUSE = 1.0             # seconds without accept when descriptors are out
LINGER = 0.05           # seconds until we look whether a client has closed
LINGERING = 256         # such clients; with more, the oldest is looked at
DISCARD = 1 << 18       # bytes read away behind a query; more is a flood
TRACKED = 65536         # addresses whose rate is known; then the oldest go
RECEIVE = int(socket.MSG_DONTWAIT)      # int(): an enum's | costs 2 us
SEND = RECEIVE | int(getattr(socket, "MSG_MORE", 0))    # FIN in one segment
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
        self.host = plain_address(address[0])
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
        socketserver.BaseServer.__init__(self, listeners[0].getsockname(),
                                         FingerHandler)
        self.socket = listeners[0]
        self.listeners = listeners
        self.site = site
        self.log = log
        self.started = time.monotonic()
        self.queries = 0
        self.clients: dict[str, Any] = {
            state: collections.OrderedDict() for state in STATES}
        self.hosts: dict[str, int] = {}     # clients with a state, by address
        self.rates = RateLimit()
        self.lingering: collections.deque[Client] = collections.deque()
        self.lookups = 0                    # threads
        self.answers: collections.deque[tuple[Client, Reply | None, bytes]]
        self.answers = collections.deque()  # from threads
        self.signals: collections.deque[int] = collections.deque()
        self.listening = self.full = self.starved = False
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
        while not self.done():
            now = time.monotonic()
            self.watch_listeners(now)
            for key, _ in self.selector.select(self.patience(now)):
                if isinstance(key.data, Client):
                    self.go_on(key.data)
                else:
                    key.data(key.fileobj)
            self.take_answers()
            now = time.monotonic()
            self.look_at_lingering(now)
            self.end_overdue(now)
            self.act_on_signals()
        self.ended.set()

    def done(self) -> bool:
        if self.stop_deadline is None:
            return False
        return not self.crowd() or time.monotonic() >= self.stop_deadline

    def crowd(self) -> int:
        """Count the connections."""
        return sum(map(len, self.clients.values())) + len(self.lingering)

    def patience(self, now: float) -> float | None:
        """Give the seconds until something is to be done unasked."""
        times = [next(iter(clients)).deadline
                 for clients in self.clients.values() if clients]
        if self.lingering:
            times.append(self.lingering[0].deadline)
        if self.paused_until > now:
            times.append(self.paused_until)
        return max(0, min(times) - now) if times else None

    def wake(self) -> None:
        """Make the loop look around, from any thread."""
        with contextlib.suppress(BlockingIOError):  # full: it will, anyway
            self.waker.send(b"\0")

    def take_wake(self, woken: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            woken.recv(4096)

    def act_on_signals(self) -> None:
        while self.signals:
            self.stop(signal.Signals(self.signals.popleft()).name)

    # From a listening socket to a line.

    def watch_listeners(self, now: float) -> None:
        """Leave new clients in the kernel's queue while there is no room."""
        crowd, most = self.crowd(), self.site.config.limits.max_clients
        if self.full != (crowd >= most):
            self.full = not self.full
            self.log.event("warning" if self.full else "notice",
                           "full" if self.full else "room",
                           clients=crowd, limit=most)
        wanted = not self.full and now >= self.paused_until
        if wanted == self.listening:
            return
        self.listening = wanted
        for listener in self.listeners:
            if wanted:
                self.selector.register(listener, selectors.EVENT_READ,
                                       self.accept_clients)
            else:
                self.selector.unregister(listener)

    def accept_clients(self, listener: socket.socket) -> None:
        """Accept until it would block, or others should have their turn."""
        room = self.site.config.limits.max_clients - self.crowd()
        for _ in range(min(room, ACCEPTS)):
            try:
                sock, address = listener.accept()
            except BlockingIOError:
                self.starved = False
                return
            except OSError as error:
                if self.is_starved(error):
                    return
                continue        # this one has left already: see accept(2)
            self.begin(Client(sock, address))

    def is_starved(self, error: OSError) -> bool:
        """Pause if accept failed for want of descriptors; log that once."""
        if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS,
                               errno.ENOMEM):
            return False
        if not self.starved:
            self.log.event("error", "starved", reason=reason(error),
                           clients=self.crowd())
        self.starved = True
        self.paused_until = time.monotonic() + PAUSE
        return True

    def begin(self, client: Client) -> None:
        """Refuse a client, or read its line, which mostly is there."""
        site = self.site
        if site.guarded and not site.allows(client.host):
            self.refuse(client, "denied")
        elif self.hosts and self.hosts.get(address_key(client.host), 0) >= (
                site.config.limits.max_clients_per_host):
            self.refuse(client, "limited")
        else:
            self.go_on(client)

    def go_on(self, client: Client) -> None:
        """Do what a client has waited for; a bug costs nobody but it."""
        try:
            if client.state == "sending":
                self.send(client)
            elif client.state == "closing":
                self.read_away(client)
            else:
                self.read_line(client)
        except Exception:
            self.handle_error(client, client.host)
            self.drop(client)

    def read_line(self, client: Client) -> None:
        """Take what has come; with the line end, or the file's, answer."""
        most = self.site.max_query
        try:
            data = client.sock.recv(most + 2, RECEIVE)
        except BlockingIOError:
            self.move(client, "reading")
            return
        except OSError:
            self.leave(client, "gone")
            return
        line = client.data = client.data + data if client.data else data
        end = find_line_end(line)
        if end:
            client.data = strip_telnet(line[:end.end()])
        elif not line:
            self.leave(client, "silent")
            return
        elif data and len(line) <= most + 1:
            self.move(client, "reading")
            return
        self.process_request(client, client.host)

    # From a line to a reply.

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a client at once, or queue it for a thread."""
        rate = self.site.config.limits.queries_per_minute
        if rate and self.rates.exceeded(address_key(request.host), rate,
                                        time.monotonic()):
            self.refuse(request, "limited")
            return
        try:
            self.finish_request(request, client_address)
        except Exception:
            self.handle_error(request, client_address)
            request.reply = FIXED["failed"]
            request.rest = FIXED["failed"].data
        if request.reply:
            self.send(request)
        else:
            self.move(request, "queued")
            self.start_lookups()

    def start_lookups(self) -> None:
        """Give threads to those that have queued longest."""
        queued = self.clients["queued"]
        while queued and self.lookups < self.site.config.limits.max_threads:
            client = next(iter(queued))
            client.lookup_deadline = client.deadline - GRACE
            self.move(client, "asking", client.deadline)
            self.lookups += 1
            try:
                super().process_request(client, client.host)
            except RuntimeError as error:       # no thread to be had
                self.lookups -= 1
                self.log.event("error", "starved", reason=str(error))
                self.refuse(client, "failed")

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
            if reply:
                client.reply, client.rest = reply, data
                self.send(client)
            else:
                self.refuse(client, "failed")
        self.start_lookups()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a bug, with the traceback that leads to it."""
        self.log.event("error", "bug", client=client_address,
                       traceback=traceback.format_exc())

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
        try:
            sent = client.sock.send(client.rest, SEND)
            if sent == len(client.rest):
                client.sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.leave(client, "gone")
            return
        client.rest = client.rest[sent:]
        if client.rest:
            self.move(client, "sending")
            return
        self.log_query(client, client.reply or FIXED["failed"])
        self.move(client, "")
        client.deadline = time.monotonic() + LINGER
        self.lingering.append(client)

    def log_query(self, client: Client, reply: Reply) -> None:
        """Write the one line of a connection."""
        self.queries += 1
        if self.log.level > LEVELS.index("info"):
            return
        sent = len(client.reply.data) - len(client.rest) if client.reply else 0
        line = strip_line(client.data)[:self.site.max_query]
        ms = int((time.monotonic() - client.started) * 1000)
        self.log.query(client.host, client.port, line, reply, sent, ms)

    def look_at_lingering(self, now: float) -> None:
        """See whether those that have their reply have closed.

        Most have, after a moment: that is cheaper than to be told of each.
        """
        while self.lingering and (self.lingering[0].deadline <= now
                                  or len(self.lingering) > LINGERING):
            self.read_away(self.lingering.popleft())

    def read_away(self, client: Client) -> None:
        """Read until the client closes: a close with bytes unread would be
        a reset, and could take the reply from it (RFC 1122 4.2.2.13)."""
        try:
            while client.discarded <= DISCARD:
                data = client.sock.recv(65536, RECEIVE)
                if not data:
                    break
                client.discarded += len(data)
        except BlockingIOError:
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
        self.move(client, "")
        client.sock.close()

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
        client.state = state if self.watch(client, STATES.get(state)) else ""
        if client.state:
            client.deadline = deadline or self.deadline_of(client, state)
            self.clients[state][client] = None
        if bool(old) != bool(client.state):
            self.count_host(address_key(client.host), -1 if old else 1)

    def watch(self, client: Client, events: int | None) -> bool:
        """Register a client; close one that the system has no room for."""
        try:
            if events:
                self.selector.register(client.sock, events, client)
        except OSError as error:
            self.log.event("error", "starved", reason=reason(error))
            client.sock.close()
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
                self.end_time(next(iter(clients)), state)

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

    def stop(self, reason: str) -> None:
        """Take no new clients; let serve_forever() end with the last one."""
        if self.stop_deadline is not None:
            return
        for listener in self.listeners * (1 + BACKLOG // ACCEPTS):
            self.accept_clients(listener)
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
        for clients in (*self.clients.values(), self.lingering):
            for client in clients:
                client.sock.close()
        self.selector.close()
        self.woken.close()
        self.waker.close()


# ---- Process --------------------------------------------------------------

SPARE_DESCRIPTORS = 32          # log, listeners, selector, Python's own
LOOKUP_DESCRIPTORS = 4          # a thread's socket, or pipes of its process


class StartError(Exception):
    """Why the daemon cannot start, for the terminal."""


class Listener(socket.socket):
    """A listening socket.  Its accept() is that of socket.socket, less the
    enums that are made there for each client: half the time."""

    def accept(self) -> tuple[socket.socket, Any]:
        fd, address = self._accept()    # type: ignore[attr-defined]
        family = socket.AF_INET if len(address) == 2 else socket.AF_INET6
        return socket.socket(family, socket.SOCK_STREAM, 0, fd), address


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
            listeners += listen_on(host, port)
    except StartError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def listen_on(host: str, port: int) -> list[socket.socket]:
    """Listen on all addresses of a name; on one of them at least.

    Addresses of a family that the system lacks are passed over.
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


def fit_max_clients(limits: Any, log: Log) -> None:
    """Raise the limit of descriptors, and keep max_clients within it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    spare = SPARE_DESCRIPTORS + LOOKUP_DESCRIPTORS * limits.max_threads
    most = max(1, soft - spare)
    if most < limits.max_clients:
        log.event("notice", "limits", max_clients=most, descriptors=soft,
                  configured=limits.max_clients)
        limits.max_clients = most


def watch_signals(server: FingerServer) -> None:
    """Have signals noted and the loop woken: the loop acts on them."""
    def note(number: int, frame: Any) -> None:
        server.signals.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    # A launcher may have left it ignored: then no program has a status.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.set_wakeup_fd(server.waker.fileno(), warn_on_full_buffer=False)


def serve(config: Any, log: Log) -> None:
    """Start, serve until a signal, end.  Raises StartError."""
    site = Site(config, log)
    listeners = open_listeners(config.server.listen)
    with FingerServer(listeners, site, log) as server:
        try:
            log.open(config.log)
        except OSError as error:
            raise StartError(f"cannot open the log: {reason(error)}") from None
        watch_signals(server)
        fit_max_clients(config.limits, log)
        log.event("notice", "ready", listen=",".join(
            address_text(listener.getsockname()) for listener in listeners),
            backend=",".join(name for name, backend in config.backends),
            pid=os.getpid())
        server.serve_forever()
        log.event("notice", "stopped", signal=server.stopped_by,
                  queries=server.queries,
                  seconds=int(time.monotonic() - server.started))


# ---- Command line ---------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """Leaves messages and the exit to main."""

    def error(self, message: str) -> Any:
        raise ConfigError(f"{message}; see --help")


def make_parser() -> Parser:
    """Build the parser; options that override a setting come from SETTINGS."""
    parser = Parser(
        prog="fingerd.py", add_help=False, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Answer finger queries (RFC 1288) from a config file.")
    parser.add_argument("--config", metavar="FILE",
                        help=f"the config; else {' or '.join(CONFIG_FILES)}")
    for row in SETTINGS:
        if row.flags:
            parser.add_argument(*row.flags, dest=row.name, metavar="VALUE",
                                help=f"{row.name} of [{row.section}]")
    parser.add_argument("--check", action="store_true",
                        help="check the config: status 0 if good, 2 if not")
    parser.add_argument("--query", metavar="LINE",
                        help="print what a client would get, and end")
    parser.add_argument("--from", metavar="ADDRESS", dest="client",
                        help="for --query: the client's address")
    parser.add_argument("--version", action="store_true",
                        help="print the version, and end")
    parser.add_argument("--help", action="store_true",
                        help="print this and all settings, and end")
    return parser


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
    for known in (path,) if path else CONFIG_FILES:
        if path or os.path.exists(known):
            return known
    raise ConfigError(f"there is no {' and no '.join(CONFIG_FILES)}; copy"
                      " fingerd.conf.example to one of them, or name a file"
                      " with --config")


def print_reply(config: Any, log: Log, line: str, client: str) -> int:
    """Print what this client would get for a line; 1 if a backend failed."""
    try:
        client = plain_address(client)
        ipaddress.ip_address(client)
    except ValueError:
        raise ConfigError(f'--from: "{client}" is not an address; write'
                          " e.g. --from 192.0.2.7") from None
    site = Site(config, log)
    reply = FIXED["denied"]
    if site.allows(client):
        deadline = time.monotonic() + config.limits.timeout
        reply = site.answer(os.fsencode(line), client, lambda: "localhost",
                            deadline) or FIXED["failed"]
    say(reply.data)
    return 1 if reply.outcome == "failed" else 0


def run(args: argparse.Namespace, log: Log) -> int:
    """Do what the options say; give the exit status."""
    def report(backend: str, text: str) -> None:
        log.event("warning", "backend", name=backend, text=text)

    if args.client is not None and args.query is None:
        raise ConfigError("--from: goes with --query only")
    overrides = {row.name: getattr(args, row.name) for row in SETTINGS
                 if row.flags and getattr(args, row.name) is not None}
    path = find_config(args.config)
    config = ConfigReader(path, report, overrides).read()
    if args.check:
        say(to_wire(f"{path} is good").replace(b"\r", b""))
        return 0
    if args.query is not None:
        return print_reply(config, log, args.query,
                           args.client or "127.0.0.1")
    serve(config, log)
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
    parser = make_parser()
    try:
        args = parser.parse_args(argv)
        if args.version:
            say(f"fingerd {__version__}\n".encode())
        elif args.help:
            parser.epilog = settings_text()
            say(parser.format_help().encode())
        else:
            return run(args, Log())
    except ConfigError as error:
        complain(str(error))
        return 2
    except StartError as error:
        complain(str(error))
        return 1
    except KeyboardInterrupt:       # before there is anything to end cleanly
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
