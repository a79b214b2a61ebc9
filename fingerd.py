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
    Answers       policy: who is answered, and what
    Forwarding    asking another finger server
    Clients       the life of a client, and what it waits for
    Server        clients, deadlines and limits in one loop
    Process       listening sockets, signals, the order of the start
    Command line  options and exit statuses
"""

from __future__ import annotations

import array
import collections
import contextlib
import errno
import fcntl
import functools
import gc
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
READ_SIZE = 4096        # bytes asked for at once
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

RAW_SHARE = 4           # bytes that may come for each byte of max_query
CONTROL = re.compile(rb"[\0-\x08\x0a-\x1f\x7f]|\xc2[\x80-\x9f]")  # not TAB

# Telnet (RFC 854): some of its bytes, and what the byte before has begun.
IAC, SB, SE, WILL, DONT = 255, 250, 240, 251, 254
TEXT, COMMAND, OPTION, SUBNEGOTIATION, SUB_COMMAND = range(5)


class MalformedQuery(ValueError):
    """The line is not a query that RFC 1288 or its clients know."""


class LineTooLong(ValueError):
    """More has come than a query line may have."""


class Query(NamedTuple):
    """One line, understood: {Q1} of RFC 1288, or {Q2} when there are hosts."""

    users: tuple[str, ...]      # {U}; none asks for the user list
    verbose: bool               # {W}
    hosts: tuple[str, ...]      # {H}, the next hop last


def is_plain(text: bytes) -> bool:
    """Is this one name of letters, digits, and - . _ between them?

    Most queries are, and need no more than this look at them.
    """
    return text.translate(None, b"-._").isalnum()


class QueryLine:
    """A line as it comes in, without telnet commands and line end.

    The text is the same however the bytes are cut into segments, and each
    byte is looked at once.
    """

    __slots__ = ("text", "limit", "taken", "telnet")

    def __init__(self, limit: int) -> None:
        self.text: bytes | bytearray = b""
        self.limit = limit      # bytes of text
        self.taken = 0          # bytes that have come
        self.telnet = TEXT

    def room(self) -> int:
        """Give the number of bytes that may come next."""
        return min(RAW_SHARE * self.limit - self.taken, READ_SIZE)

    def add(self, data: bytes) -> bool:
        """Add a segment, b"" for the end of file; is the line complete?

        Raises LineTooLong, and then the text is what fits.
        """
        text = data.rstrip(b"\r\n")
        if (self.taken or not data.endswith(b"\n") or not is_plain(text)
                or len(text) > self.limit):
            return self.add_part(data)
        self.text, self.taken = text, len(data)
        return True

    def add_part(self, data: bytes) -> bool:
        """Add to a line that comes in parts, or is not plain."""
        self.taken += len(data)
        start = len(self.text)
        self.text = text = self.text or bytearray()
        text += self.strip_telnet(data)
        end = find_line_end(text, start)
        complete = end >= 0 or not data
        if complete:
            text = bytes(text[:end] if end >= 0 else text).rstrip(b"\r")
        # A CR beyond the limit may still be of the line end.
        if (text[max(start, self.limit):].strip(b"\r")
                or not complete and self.room() <= 0):
            self.text = bytes(text[:self.limit])
            raise LineTooLong
        self.text = text
        return complete

    def strip_telnet(self, data: bytes) -> bytes | bytearray:
        """Drop telnet commands, also one that is cut in two."""
        if not self.telnet and b"\xff" not in data:
            return data
        text = bytearray()
        for byte in data:
            before, self.telnet = self.telnet, follow_telnet(self.telnet, byte)
            if self.telnet == TEXT and (
                    before == TEXT or before == COMMAND and byte == IAC):
                text.append(byte)       # IAC IAC is a byte 255
        return text


def follow_telnet(state: int, byte: int) -> int:
    """Give the state of a telnet stream after one more byte."""
    if state == TEXT:
        return COMMAND if byte == IAC else TEXT
    if state == COMMAND and byte == SB:
        return SUBNEGOTIATION
    if state == COMMAND and WILL <= byte <= DONT:
        return OPTION
    if state == SUBNEGOTIATION:
        return SUB_COMMAND if byte == IAC else SUBNEGOTIATION
    if state == SUB_COMMAND and byte != SE:
        return SUBNEGOTIATION
    return TEXT


def find_line_end(text: bytes | bytearray, start: int) -> int:
    """Find the first LF, or CR NUL as telnet sends it, from start; or -1."""
    newline = text.find(b"\n", start)
    nul = text.find(b"\r\0", max(0, start - 1))
    return min(newline, nul) if newline >= 0 <= nul else max(newline, nul)


def parse_query(line: bytes,
                own_names: Callable[[], Container[str]] = frozenset) -> Query:
    """Make a Query of a line without its end (RFC 1288 2.3).

    own_names() gives this host's, in lower case: as the last host of a chain
    they are dropped, since Emacs sends all of user@host to that host.
    Raises MalformedQuery, and nothing else.
    """
    if is_plain(line):
        return Query((line.decode(),), False, ())
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
        return parse_hosts(names, verbose, own_names())
    return Query(tuple(names), verbose, ())


def parse_hosts(names: list[str], verbose: bool,
                own_names: Container[str]) -> Query:
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

    outcome: str                # one of OUTCOMES
    data: bytes                 # for the wire: UTF-8, CRLF, nothing unsafe
    backend: str = "-"          # the name of the one that answered


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
SILENCE = Reply("silent", b"")      # the client has sent an end of file only


class Refused(Exception):
    """A client gets this reply instead of an answer."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.outcome)
        self.reply = reply


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

    enter_chroot(path), if there is one, gets ready to work where path is /,
    or says with a ValueError, as above, why that cannot be.

    limit_threads(number), if there is one, gets how many lookups may run at
    once.
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
    if not re.fullmatch(r"[a-z]+(:[A-Za-z0-9_.-]+)?", name):
        raise ValueError("is no name of a backend; write e.g. web or web:2")
    classes = BACKENDS
    if kind not in classes and "did you mean" not in did_you_mean(
            kind, classes):
        classes = load_backends()
    if kind not in classes:
        raise ValueError("is no backend" + did_you_mean(kind, classes))
    return classes[kind]


class Aliases:
    """Names that stand for others, in any case: the section [aliases]."""

    settings = None             # any name may stand there, as in [users]

    def __init__(self, options: dict[str, str]) -> None:
        self.texts = {name.lower(): text for name, text in options.items()}
        self.users: dict[str, list[str]] = {}
        errors = []
        for name in self.texts:
            try:
                self.users[name] = self.follow(name, ())
            except ValueError as error:
                errors.append(f"{name}: {error}")
        if errors:
            raise ValueError("\n".join(errors))

    def follow(self, word: str, path: tuple[str, ...]) -> list[str]:
        """Give the users behind a word, which is behind those of path."""
        name = word.lower()
        if name not in self.texts and "@" not in word:
            return [word]
        if name in path or len(path) > MAX_USERS:
            raise ValueError("is a circle, or too long a chain"
                             f" ({' = '.join((*path, name))}); cut it")
        users = []
        for behind in self.texts.get(name, "").split():
            users += self.follow(behind, (*path, name))
        if not 1 <= len(users) <= MAX_USERS:
            raise ValueError(f"does not stand for 1 to {MAX_USERS} names;"
                             " write these, without @")
        return users

    def expand(self, users: tuple[str, ...]) -> list[str]:
        """Give the names that are asked for, aliases replaced."""
        return [name for user in users
                for name in self.users.get(user.lower(), (user,))]


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


def reply_size(text: str) -> int:
    """Convert bytes with room for each of the fixed replies."""
    if size(text) < 64:
        raise ValueError("is less than 64 bytes")
    return size(text)


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
    "reply size": Kind(reply_size, "64K"),
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
    Setting("limits", "max_reply", "reply size", "64K", "bytes in a reply"),
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
        config.aliases = self.make_aliases()
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

    def make_aliases(self) -> Aliases:
        """Take the section [aliases] out, which is not that of a backend."""
        options = self.backend_options("aliases", Aliases)
        section = self.sections.pop("aliases", Section(0, {}))
        try:
            return Aliases(options or {})
        except ValueError as error:
            for text in str(error).splitlines():
                entry = section.entries.get(text.partition(":")[0])
                self.error(entry.line if entry else section.line, text)
            return Aliases({})

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
        core = ["[aliases]", *(f"[{row}]" for row in dict.fromkeys(
            row.section for row in SETTINGS))]
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
    return quote(line.decode("ascii", "surrogateescape"))


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
                "q": line.decode("utf-8", "backslashreplace"),
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


# ---- Answers --------------------------------------------------------------

FRAMED = 8              # framed replies kept, for many slow readers of one


class WouldWait(Exception):
    """A backend that may block is to be asked, and no thread is at hand."""


class Answers:
    """What is answered, and to whom: policy and backends of one config."""

    def __init__(self, config: Any, log: Log) -> None:
        self.config = config
        self.log = log
        self.limits = config.limits
        for _, backend in config.backends:
            if hasattr(backend, "limit_threads"):
                backend.limit_threads(config.limits.max_threads)
        server = config.server
        self.header = to_wire(server.header) if server.header else b""
        self.footer = to_wire(server.footer) if server.footer else b""
        self.names = frozenset({"localhost", *(
            server.hostname or (socket.gethostname().lower(),))})
        self.hops: dict[str, str] = {}      # addresses, for a chroot
        self.own_ports: set[int] = set()    # that we listen on
        self.guarded = bool(server.allow or server.deny)
        self.framing = bool(self.header or self.footer)
        # Of functions, not methods: a cycle would keep old configs alive.
        self.allows = functools.lru_cache(maxsize=4096)(functools.partial(
            is_allowed, server.allow, server.deny))
        self.framed = functools.lru_cache(maxsize=FRAMED)(functools.partial(
            frame, self.header, self.footer, self.limits.max_reply))

    def answer(self, query: Query, client: str,
               deadline: float | None = None) -> Reply:
        """Answer a query of this client, in time for deadline (monotonic).

        Without a deadline no backend that waits is asked: where one would
        have to be, WouldWait is raised.
        """
        if query.hosts:
            return self.forward(query, deadline)
        if query.users:
            return self.look_up(query, client, deadline)
        return self.list_users(query, client, deadline)

    def look_up(self, query, client, deadline):
        """Answer for each name in turn, an empty line between them."""
        users, aliases = query.users, self.config.aliases
        if aliases.users:
            users = aliases.expand(users)
        if len(users) == 1:
            reply = self.look_up_user(users[0], query.verbose, client,
                                      deadline)
        elif len(users) > MAX_USERS:
            return FIXED_REPLIES["malformed"]
        else:
            reply = join_replies([
                self.look_up_user(user, query.verbose, client, deadline)
                for user in users])
        if reply.outcome == "answered" and self.framing or (
                len(reply.data) > self.limits.max_reply):
            return reply._replace(data=self.framed(reply.outcome, reply.data))
        return reply

    def look_up_user(self, user, verbose, client, deadline):
        """Ask the backends in order until one knows the user, or fails."""
        for name, backend in self.config.backends:
            reply = self.ask(name, backend, backend.lookup, deadline,
                             user, verbose, client)
            if reply:
                return reply
        return FIXED_REPLIES["unknown"]

    def list_users(self, query, client, deadline):
        """Give the welcome text, or the backends' lists, one by one."""
        server = self.config.server
        if server.welcome:
            return Reply("list", self.framed("list", to_wire(server.welcome)))
        if not server.user_list:
            return FIXED_REPLIES["list-denied"]
        replies = []
        for name, backend in self.config.backends:
            if hasattr(backend, "user_list"):
                reply = self.ask(name, backend, backend.user_list, deadline,
                                 query.verbose, client)
                if reply and reply.outcome == "failed":
                    return reply
                replies += [reply] if reply else []
        if not replies:
            return FIXED_REPLIES["list-denied"]
        data = b"".join(reply.data for reply in replies)
        return Reply("list", self.framed("list", data),
                     ",".join(reply.backend for reply in replies))

    def ask(self, name, backend, method, deadline, *args):
        """Give a backend's reply, or None; log why it failed.

        Raises WouldWait if it would need a deadline.
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
            if answer is None:
                return None
            if not isinstance(answer, bytes):
                answer = to_wire(answer[:self.limits.max_reply + 1])
            return Reply("answered", answer, name)
        except OSError as error:
            self.log.event("warning", "failed", backend=name, client=args[-1],
                           reason=reason(error))
        except Exception:
            self.log.event("error", "bug", backend=name, client=args[-1],
                           traceback=format_traceback())
        return FIXED_REPLIES["failed"]._replace(backend=name)

    def forward(self, query, deadline):
        """Hand the query to its last host, if the config allows that one."""
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
            answer = fetch_finger((self.hops.get(host, host), port), line,
                                  self.limits.max_reply, deadline,
                                  self.own_ports)
        except OSError as error:
            self.log.event("warning", "failed", forward=f"{host}:{port}",
                           reason=reason(error))
            return FIXED_REPLIES["failed"]
        return Reply("forwarded",
                     truncate(to_wire(answer), self.limits.max_reply))

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


def is_allowed(allow, deny, host):
    """May this address ask?  A deny wins over any allow."""
    if not allow and not deny:
        return True
    import ipaddress  # the converter of networks has loaded it
    address = ipaddress.ip_address(host)
    if any(address in network for network in deny):
        return False
    return not allow or any(address in network for network in allow)


def frame(header, footer, limit, outcome, data):
    """Put header and footer around an answer, and cut what is too long."""
    return truncate(data if outcome == "unknown" else header + data + footer,
                    limit)


# ---- Forwarding -----------------------------------------------------------

def plain_address(host: str) -> str:
    """Give the numeric address without a scope, IPv4 also where mapped."""
    if ":" not in host:
        return host
    host = host.partition("%")[0]
    return host[7:] if host.startswith("::ffff:") and "." in host else host


def fetch_finger(address: tuple[str, int], line: str, limit: int,
                 deadline: float, own_ports: Container[int]) -> str:
    """Ask another finger server; give what it says, at most limit bytes.

    Raises OSError, TimeoutError at the deadline (monotonic seconds).
    """
    answer = b""
    try:
        sock = connect_before(deadline, *address)
    except UnicodeError:
        raise OSError("is not a host name") from None
    with sock:
        if address[1] in own_ports and is_own_end(sock):
            raise OSError("the next hop is this server itself")
        sock.sendall(line.encode() + b"\r\n")
        while len(answer) <= limit:
            sock.settimeout(seconds_left(deadline))
            data = sock.recv(65536)
            if not data:
                break
            answer += data
    return answer.decode("utf-8", "backslashreplace")


def connect_before(deadline: float, host: str, port: int) -> socket.socket:
    """Connect to the first address of a host that can be had in time."""
    failure = OSError(f"{host} has no address")
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for tried, (family, kind, protocol, _, address) in enumerate(found):
        sock = socket.socket(family, kind, protocol)
        try:    # a share for each: a dead address must not starve the next
            sock.settimeout(seconds_left(deadline) / (len(found) - tried))
            sock.connect(address)
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure


def is_own_end(sock: socket.socket) -> bool:
    """Does this connection lead back to this host?"""
    import ipaddress  # only who forwards to one of our ports needs it
    peer = plain_address(sock.getpeername()[0])
    address = ipaddress.ip_address(peer)
    return (address.is_loopback or address.is_unspecified
            or peer == plain_address(sock.getsockname()[0]))


def seconds_left(deadline: float) -> float:
    """Give the seconds to a deadline; TimeoutError if there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the next hop took too long")
    return left


# ---- Clients --------------------------------------------------------------

# How a client is served.  FingerServer has one loop for all clients; a
# thread runs only while a backend that waits works for one of them.
#
#     listener > accept_clients > process_request > FingerHandler.handle:
#
#                read the line > ask > send, log > has it closed?
#         yields     READ        ASK     WRITE      LEFT, CLOSE
#
# handle() is the whole life of a client, from top to bottom.  It is a
# generator: where it would have to wait, it yields what for.  The loop keeps
# the handler and resumes it when that has come; when its time is over, the
# loop throws a Deadline in.  A line is mostly there before its client is
# accepted, so handle() runs to LEFT at once.  That is a moment in which most
# clients close: to look once after it costs less than to watch each of them.
# A client whose address is at its limit yields LATER first: one turn of the
# loop then sees which others of that address have closed.
#
# What the loop has to know is in small classes that touch no client's socket:
# Counts (connections by address), Rates (queries by address), Waiting
# (handlers, what they wait for, and until when), Lingering (those in LEFT),
# Lookups (whose turn it is to get a thread), Door (when to accept, and how
# many in a row), and Inbox (what signals and threads leave for the loop).

GRACE = 0.5             # seconds for a backend to come back from a timeout
LINGER = 0.05           # seconds until we look whether a client has closed
MAX_LINGERING = 256     # such clients; with more, the oldest are looked at
DISCARD = 1 << 18       # bytes read away behind a query; more is a flood
TRACKED = 65536         # addresses whose rate is known; then the oldest go
HOST_SHARE = 4          # an address gets a thread in so many
SEND = DONT_WAIT | int(getattr(socket, "MSG_MORE", 0))    # FIN in one segment


class Deadline(TimeoutError):
    """A client's time is over.  (The kernel's ETIMEDOUT is not this one.)"""


class Wait(NamedTuple):
    """What a client waits for, and the events that a selector reports."""

    name: str
    events: int = 0


READ = Wait("read", selectors.EVENT_READ)       # more of the line
ASK = Wait("ask")                               # the answer of a thread
WRITE = Wait("write", selectors.EVENT_WRITE)    # room for the reply
CLOSE = Wait("close", selectors.EVENT_READ)     # its close
LATER = Wait("later")                           # a turn of the loop
LEFT = Wait("left")                             # a moment
NOTHING = Wait("nothing")


@functools.lru_cache(maxsize=4096)
def address_key(host: str) -> str:
    """Give what counts as one address: an IPv4 address, an IPv6 /64."""
    if ":" not in host:
        return host
    return socket.inet_pton(socket.AF_INET6, host)[:8].hex()


class FingerHandler(socketserver.StreamRequestHandler):
    """One client.  receive(), send() and has_left() say whether they are done.
    """

    server: FingerServer
    query: Query
    reply = GONE
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
        self.line = QueryLine(server.answers.limits.max_query)
        self.steps = self.handle()

    def handle(self):
        """Serve the client; yield what it has to wait for."""
        try:
            try:
                self.check_access()
                if self.is_crowded():
                    yield LATER
                    if self.is_crowded():
                        raise Refused(FIXED_REPLIES["limited"])
                while not self.receive():
                    yield READ
                self.check_rate()
                self.query = parse_query(bytes(self.line.text), self.own_names)
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
        answers = self.server.answers
        if answers.guarded and not answers.allows(self.host):
            raise Refused(FIXED_REPLIES["denied"])

    def is_crowded(self):
        """Has the address more connections than it may have?"""
        return (self.server.hosts[self.key]
                > self.server.answers.limits.max_clients_per_host)

    def check_rate(self):
        """Count a query, and refuse it if the address asks too often."""
        rate = self.server.answers.limits.queries_per_minute
        if rate and self.server.rates.exceeded(self.key, rate,
                                               time.monotonic()):
            raise Refused(FIXED_REPLIES["limited"])

    def receive(self):
        """Take what has come of the line; is it complete?"""
        line = self.line
        try:
            data = self.request.recv(line.room(), DONT_WAIT)
            if not data and not line.taken:
                raise Refused(SILENCE)
            return line.add(data)
        except BlockingIOError:
            return False
        except LineTooLong:
            self.check_rate()
            raise Refused(FIXED_REPLIES["too-long"]) from None

    def own_names(self):
        """Give the names of this host, and how the client has reached it."""
        address = plain_address(self.request.getsockname()[0])
        return self.server.answers.names | {address, f"[{address}]"}

    def overdue_reply(self):
        """Give the reply to a client whose time is over."""
        if self.wait is not ASK:
            return FIXED_REPLIES["timeout" if self.line.taken else "silent"]
        state = "queued" if self.server.lookups.queues(self) else "asking"
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
        if self.sent == len(data):
            self.request.shutdown(socket.SHUT_WR)
        return self.sent == len(data)

    def log_query(self, reply):
        """Count the connection, and write its line."""
        server = self.server
        server.outcomes[reply.outcome] += 1
        if server.log.level <= INFO:
            server.log.query(self.host, self.client_address[1],
                             bytes(self.line.text), reply, self.sent,
                             int((time.monotonic() - self.started) * 1000))

    def has_left(self):
        """Read away what follows the line; has the client closed?

        A close with bytes unread would be a reset, and could take the reply
        from the client (RFC 1122 4.2.2.13).
        """
        try:
            while self.discarded <= DISCARD:
                data = self.request.recv(READ_SIZE, DONT_WAIT)
                if not data:
                    return True
                self.discarded += len(data)
        except BlockingIOError:
            # Refused clients get no time to close: they would fill the room.
            return self.reply.outcome in ("denied", "limited")
        except OSError:
            pass
        return True


class Counts(dict):
    """How many there are by key, without the keys that have none."""

    total = 0

    def add(self, key, change=1):
        self.total += change
        number = self.get(key, 0) + change
        if number:
            self[key] = number
        else:
            del self[key]


class Rates:
    """Token buckets by key: each holds a minute's queries, and fills again."""

    def __init__(self):
        self.buckets = collections.OrderedDict()

    def exceeded(self, key, rate, now):
        """Count a query; is it one too many, at so many a minute?"""
        tokens, then = self.buckets.pop(key, (rate, now))
        tokens = min(rate, tokens + (now - then) * rate / 60)
        self.buckets[key] = (tokens if tokens < 1 else tokens - 1, now)
        if len(self.buckets) > TRACKED:
            self.buckets.popitem(last=False)
        return tokens < 1


class Waiting:
    """Handlers by what they wait for, those that are due first in front."""

    def __init__(self):
        self.handlers: Any = {wait: collections.OrderedDict()
                         for wait in (LATER, READ, ASK, WRITE, CLOSE)}

    def add(self, handler, wait, deadline):
        handler.wait, handler.deadline = wait, deadline
        self.handlers[wait][handler] = None

    def remove(self, handler):
        del self.handlers[handler.wait][handler]
        handler.wait = NOTHING

    def next_deadline(self):
        deadline = math.inf
        for handlers in self.handlers.values():
            if handlers:
                deadline = min(deadline, next(iter(handlers)).deadline)
        return deadline

    def overdue(self, now):
        """Give those whose time is over, until they wait no longer."""
        for handlers in self.handlers.values():
            while handlers and next(iter(handlers)).deadline <= now:
                yield next(iter(handlers))

    def hurry(self, deadline, *waits):
        """Let those who wait for these wait to deadline at most."""
        for wait in waits:
            for handler in self.handlers[wait]:
                handler.deadline = min(handler.deadline, deadline)


class Lingering:
    """Handlers that were told LEFT: in the moment in which most close."""

    def __init__(self):
        self.handlers: Any = collections.deque()

    def add(self, handler, now):
        handler.deadline = now + LINGER
        self.handlers.append(handler)

    def next_deadline(self):
        if len(self.handlers) > MAX_LINGERING:
            return 0
        return self.handlers[0].deadline if self.handlers else math.inf

    def overdue(self, now):
        """Take out those whose moment is over; of too many, the oldest."""
        while self.handlers and self.next_deadline() <= now:
            yield self.handlers.popleft()

    def take(self, keys):
        """Take out those of some addresses."""
        taken = [handler for handler in self.handlers if handler.key in keys]
        if taken:
            self.handlers = collections.deque(
                handler for handler in self.handlers
                if handler.key not in keys)
        return taken


class Lookups:
    """Whose turn it is to get a thread, address by address.

    An address has a quarter of the places at most.  A thread that is late
    gives its place away, but there are never more of those than places.
    """

    def __init__(self):
        self.queued = collections.OrderedDict()     # handlers by address
        self.running, self.late = set(), set()
        self.threads = Counts()                     # by address

    def add(self, handler):
        handlers = self.queued.setdefault(handler.key,
                                          collections.OrderedDict())
        handlers[handler] = None

    def queues(self, handler):
        return handler in self.queued.get(handler.key, ())

    def next(self, places):
        """Give the handler whose turn it is; None if there is no place."""
        taken = len(self.running) + max(0, len(self.late) - places)
        for key, handlers in self.queued.items():
            if taken < places and (self.threads.get(key, 0)
                                   < max(1, places // HOST_SHARE)):
                return next(iter(handlers))
        return None

    def begin(self, handler):
        """Count a thread for a handler; its address is last then."""
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
        """Wait no longer for a handler's thread, or for its turn."""
        if self.queues(handler):
            self.unqueue(handler)
        elif handler in self.running:
            self.running.remove(handler)
            self.late.add(handler)

    def end(self, handler):
        """Take the place back of a thread that has ended."""
        self.running.discard(handler)
        self.late.discard(handler)
        self.threads.add(handler.key, -1)


# ---- Server ---------------------------------------------------------------

BACKLOG = 1024          # connections the kernel holds for us: see listen(2)
ACCEPTS = 256           # in a row, before other clients get their turn
MORE_ACCEPTS = 1.09     # after a turn with a client for each
PAUSE = 1.0             # seconds without accept when descriptors are out
FULL_LOG_INTERVAL = 10.0    # seconds between two lines "full"
LAST_CALL = 0.02        # seconds for connections that come as a stop does
SO_ATTACH_FILTER = 26   # Linux: socket(7)
DROP_SYN = (            # BPF on a TCP segment: nothing of those with SYN
    (0x30, 0, 0, 13), (0x45, 0, 1, 2), (6, 0, 0, 0), (6, 0, 0, 0xffff))


class Door:
    """When to accept from the listening sockets, and how many in a row."""

    def __init__(self, listeners, log):
        self.listeners = listeners
        self.log = log
        self.watched = False            # by the selector
        self.accepts = float(ACCEPTS)   # in a row
        self.full_logged = False
        self.next_full_log = -math.inf
        self.out_of_descriptors = False
        self.paused_until = 0.0
        self.closes_at = math.inf

    def is_open(self, connections, limit, now):
        """May more clients come in?  Log when that changes, now and then."""
        full = connections >= limit
        if full != self.full_logged:
            self.log_full(full, connections, limit, now)
        return not full and now >= self.paused_until

    def log_full(self, full, connections, limit, now):
        if not full:
            self.full_logged = False
            self.log.event("notice", "room", clients=connections, limit=limit)
        elif now >= self.next_full_log:
            self.full_logged = True
            self.next_full_log = now + FULL_LOG_INTERVAL
            self.log.event("warning", "full", clients=connections, limit=limit)

    def watch(self, selector, accept):
        """Have the selector call accept for new clients; None for not."""
        if self.watched == bool(accept):
            return
        self.watched = bool(accept)
        if accept:      # the first is served first, and may take the room
            self.listeners = self.listeners[1:] + self.listeners[:1]
        for listener in self.listeners:
            if accept:
                selector.register(listener, selectors.EVENT_READ, accept)
            else:
                selector.unregister(listener)

    def pause(self, error, connections, now):
        """Pause if accept failed for want of descriptors; log that once."""
        if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS,
                               errno.ENOMEM):
            return False
        if not self.out_of_descriptors:
            self.log.event("error", "starved", reason=reason(error),
                           clients=connections)
        self.out_of_descriptors = True
        self.paused_until = now + PAUSE
        return True

    def next_due(self, now):
        """Give the time at which a pause ends, or the door closes."""
        return min(self.closes_at, self.paused_until
                   if self.paused_until > now else math.inf)

    def close_soon(self, now):
        """Close once those who have begun to connect have been accepted."""
        self.closes_at = now
        with contextlib.suppress(OSError):      # no such filters here
            for listener in self.listeners:
                drop_new_connections(listener)
            self.closes_at = now + LAST_CALL

    def close(self):
        for listener in self.listeners:
            listener.close()
        self.listeners = []


def drop_new_connections(listener):
    """Have the kernel drop what would open another connection (Linux).

    A close of the listener resets those that it has not handed out.
    """
    if listener.passed:
        return              # systemd listens on, and would be cut off
    code = array.array("B", b"".join(struct.pack("HBBI", *instruction)
                                     for instruction in DROP_SYN))
    listener.setsockopt(
        socket.SOL_SOCKET, SO_ATTACH_FILTER,
        struct.pack("HP", len(DROP_SYN), code.buffer_info()[0]))


class Inbox:
    """What signals and threads leave for the loop."""

    def __init__(self):
        self.signals: Any = collections.deque()     # numbers
        self.actions: dict[int, Callable[[], None]] = {}    # else a stop
        self.replies: Any = collections.deque()     # (handler, reply)
        self.woken, self.waker = socket.socketpair()
        self.woken.setblocking(False)
        self.waker.setblocking(False)           # as set_wakeup_fd wants it

    def wake(self):
        """Wake the loop, from any thread."""
        with contextlib.suppress(OSError):      # full: it will, anyway; or
            self.waker.send(b"\0")              # closed, and nobody waits

    def drain(self, woken):
        with contextlib.suppress(BlockingIOError):
            woken.recv(READ_SIZE)

    def act(self, stop):
        """Act on the signals that have come; stop() is what most do."""
        while self.signals:
            self.actions.get(self.signals.popleft(), stop)()

    def close(self):
        self.woken.close()
        self.waker.close()


class FingerServer(socketserver.ThreadingTCPServer):
    """Serves clients in one loop; a thread is only for a backend that waits.

    fileno() and server_address are those of the first listener.
    """

    daemon_threads = True       # a hung backend does not keep us from ending

    def __init__(self, listeners: list[socket.socket], answers: Answers,
                 log: Log) -> None:
        """Take over sockets that listen already and do not block."""
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
        self.hosts = Counts()        # connections by address
        self.rates = Rates()
        self.waiting = Waiting()
        self.lingering = Lingering()
        self.lookups = Lookups()
        self.door = Door(listeners, log)
        self.inbox = Inbox()
        self.chores: dict[Callable[[], float], float] = {}  # and when each is
        self.stop_deadline: float | None = None             # due
        self.ended = threading.Event()
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.inbox.woken, selectors.EVENT_READ,
                               self.inbox.drain)

    # The loop.

    def serve_forever(self, poll_interval: float = 0) -> None:
        """Serve until stop(), and then until the clients at hand have left."""
        while not self.is_done():
            now = time.monotonic()
            self.watch_door(now)
            due = self.next_due(now)
            for key, _ in self.selector.select(poll_timeout(due - now)):
                if isinstance(key.data, FingerHandler):
                    self.resume(key.data)
                else:
                    key.data(key.fileobj)
            if self.inbox.replies:
                self.take_replies()
            if now >= due:
                self.do_what_is_due(now)
            self.inbox.act(self.stop)
        for handler in self.waiting.overdue(math.inf):
            self.resume(handler, ConnectionAbortedError())
        self.ended.set()

    def serve_one(self, sock: socket.socket) -> None:
        """Serve a connection that is open already, and no other."""
        self.stop_deadline = math.inf
        self.process_request(sock, sock.getpeername())
        self.serve_forever()

    def is_done(self):
        """Is a stop at its end?"""
        return self.stop_deadline is not None and not self.door.listeners and (
            not self.hosts.total or time.monotonic() >= self.stop_deadline)

    def next_due(self, now):
        """Give the time of the next timed action."""
        if self.stop_deadline is not None and (
                self.lingering.handlers or self.is_done()):
            return now
        return min(self.waiting.next_deadline(),
                   self.lingering.next_deadline(), self.door.next_due(now),
                   self.stop_deadline or math.inf, *self.chores.values())

    def do_what_is_due(self, now):
        """Act on deadlines.  now is a time before the last look at sockets:
        what has come since is not late."""
        self.look_at_lingering(now if self.stop_deadline is None else math.inf)
        for handler in self.lingering.take(
                {handler.key for handler in self.waiting.handlers[LATER]}):
            self.resume(handler)
        for handler in self.waiting.overdue(now):
            self.resume(handler, None if handler.wait is LATER else Deadline())
        if now >= self.door.closes_at:
            self.close_door()
        for chore, due in list(self.chores.items()):
            if now >= due:
                self.chores[chore] = now + chore()

    # From a listening socket to a handler.

    def watch_door(self, now):
        """Leave new clients in the kernel's queue while there is no room."""
        limit = self.answers.limits.max_clients
        if self.hosts.total >= limit:
            self.look_at_lingering(math.inf)        # most of them have closed
            self.door.watch(self.selector, None)    # another is first then
        is_open = self.door.is_open(self.hosts.total, limit, now)
        if is_open != self.door.watched:
            self.door.watch(self.selector,
                            self.accept_clients if is_open else None)

    def accept_clients(self, listener, most=0):
        """Accept as many as lately came at a time, if there is room."""
        room = self.answers.limits.max_clients - self.hosts.total
        for number in range(min(room, most or int(self.door.accepts))):
            try:
                request, client_address = listener.accept()
            except BlockingIOError:     # costs more than another wake-up
                self.door.accepts = max(1.0, number)
                self.door.out_of_descriptors = False
                return
            except OSError as error:
                if self.door.pause(error, self.hosts.total, time.monotonic()):
                    return
                continue        # this one has left already: see accept(2)
            self.process_request(request, client_address)
        self.door.accepts = min(self.door.accepts * MORE_ACCEPTS, ACCEPTS)

    def process_request(self, request, client_address):
        """Serve a new client as far as it goes at once."""
        handler = self.finish_request(request, client_address)
        self.hosts.add(handler.key)
        self.resume(handler)

    def finish_request(self, request, client_address):
        """Give the handler of a client; handle() has not begun."""
        return FingerHandler(request, client_address, self)

    # From one wait of a handler to the next.

    def resume(self, handler, value=None):
        """Run a handler to its next wait or its end; throw an exception in."""
        try:
            if isinstance(value, Exception):
                wait = handler.steps.throw(value)
            else:
                wait = handler.steps.send(value)
            if wait is not handler.wait:
                self.keep(handler, wait)
        except (StopIteration, OSError):
            self.close_request(handler)
        except Exception:               # a bug costs nobody but this client
            self.handle_error(handler.request, handler.host)
            self.close_request(handler)

    def keep(self, handler, wait):
        """Keep a handler until what it waits for has come."""
        if handler.wait is not NOTHING:
            self.forget(handler)
        now = time.monotonic()
        if wait is LEFT:
            self.lingering.add(handler, now)
            return
        try:
            if wait.events:
                self.selector.register(handler.request, wait.events, handler)
        except OSError as error:
            self.log.event("error", "starved", reason=reason(error))
            self.resume(handler, error)
            return
        self.waiting.add(handler, wait, self.deadline_of(wait, now))
        if wait is ASK:
            self.lookups.add(handler)
            self.start_lookups()

    def deadline_of(self, wait, now):
        """Give the end of a client's time to wait: a timeout for each wait."""
        if wait is LATER:
            return now
        if self.stop_deadline is not None and wait in (READ, CLOSE):
            return now + GRACE
        return now + self.answers.limits.timeout + GRACE * (wait is ASK)

    def forget(self, handler):
        """Keep a handler no longer."""
        if handler.wait.events:
            self.selector.unregister(handler.request)
        elif handler.wait is ASK:
            self.lookups.give_up(handler)
        self.waiting.remove(handler)

    def look_at_lingering(self, now):
        """See whether those who were answered have closed."""
        for handler in self.lingering.overdue(now):
            self.resume(handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a bug, with the traceback that leads to it."""
        self.log.event("error", "bug", client=client_address,
                       traceback=format_traceback())

    def close_request(self, request: Any) -> None:
        """End a client: every one ends here."""
        if request.wait is not NOTHING:
            self.forget(request)
        request.request.close()
        self.hosts.add(request.key, -1)

    # Threads.

    def start_lookups(self):
        """Give threads to those whose turn it is."""
        while True:
            handler = self.lookups.next(self.answers.limits.max_threads)
            if not handler:
                return
            if handler.request.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self.resume(handler, ConnectionResetError())
                continue
            try:
                super().process_request(handler, handler.client_address)
            except RuntimeError as error:       # no thread to be had
                if self.lookups.threads:
                    return                      # until one of them ends
                self.log.event("error", "starved", reason=str(error))
                self.resume(handler, FIXED_REPLIES["failed"])
            else:
                self.lookups.begin(handler)

    def process_request_thread(self, request, client_address):
        """Ask the backends for a client: all that a thread does."""
        reply = FIXED_REPLIES["failed"]
        try:
            reply = self.answers.answer(request.query, request.host,
                                        request.deadline - GRACE)
        except Exception:
            self.handle_error(request.request, request.host)
        finally:
            self.inbox.replies.append((request, reply))
            self.inbox.wake()

    def take_replies(self):
        """Go on with the clients that threads have answered."""
        while self.inbox.replies:
            handler, reply = self.inbox.replies.popleft()
            self.lookups.end(handler)
            if handler.wait is ASK:         # else its time was over
                self.resume(handler, reply)
        self.start_lookups()

    # Changes, and the end.

    def change_answers(self, answers: Answers) -> None:
        """Serve by another config from now on, connected clients included."""
        answers.hops = self.answers.hops
        answers.own_ports = self.answers.own_ports
        self.answers = answers
        self.waiting.hurry(time.monotonic() + answers.limits.timeout + GRACE,
                           READ, ASK, WRITE, CLOSE)
        self.start_lookups()            # it may allow more of them

    def stop(self) -> None:
        """Take no new clients; have serve_forever() end with the last one."""
        if self.stop_deadline is None:
            now = time.monotonic()
            self.stop_deadline = now + self.answers.limits.timeout + GRACE
            self.waiting.hurry(now + GRACE, READ, CLOSE)
            self.door.close_soon(now)

    def close_door(self):
        """Accept those who are there, and close the listening sockets."""
        for listener in self.door.listeners * (1 + BACKLOG // ACCEPTS):
            self.accept_clients(listener, ACCEPTS)
        self.door.watch(self.selector, None)
        self.door.close()
        self.door.closes_at = math.inf

    def shutdown(self) -> None:
        """Stop from another thread, and wait for the end."""
        self.inbox.signals.append(signal.SIGTERM)
        self.inbox.wake()
        self.ended.wait()

    def server_close(self) -> None:
        """Close every socket there is."""
        self.door.close()
        for handlers in (*self.waiting.handlers.values(),
                         self.lingering.handlers):
            for handler in handlers:
                handler.request.close()
        self.selector.close()
        self.inbox.close()


def poll_timeout(seconds):
    """Give a selector's timeout: None for ever, or an hour at most.

    Some systems' selectors take no more than 24 days.
    """
    return None if seconds == math.inf else max(0, min(seconds, 3600))


# ---- Process --------------------------------------------------------------

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
RELOADED = -1                        # no signal, but acted on like one
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

    passed = False          # by systemd, which listens on

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
        listener.passed = True
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
        chosen: Any = daemon.user or user("nobody")
        gid = chosen.gid if daemon.group is None else daemon.group
        if gid is None:
            gid = pwd.getpwnam("nobody").pw_gid
    except (KeyError, ValueError):
        raise StartError('there is no user "nobody"; write user = NAME and'
                         " group = NAME, or user = root") from None
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
                 reader: Callable[..., ConfigReader]) -> None:
        self.config = config
        self.log = log
        self.reader = reader            # for the config at a path, anew
        self.directory = os.getcwd()    # where relative paths start
        self.root = ""                  # the chroot that we are in
        self.ids: tuple[str, int, int] | None = None    # whom we became
        self.pidfile: Pidfile | None = None
        self.reloads = 0                # asked for and not done
        self.read: Any = None           # what the last one of them found
        self.started = time.monotonic()
        self.stopped_by = ""
        self.server: FingerServer

    def run(self) -> None:
        """Start, serve until a signal, end.  Raises StartError.

        All that can fail does so before the launching command returns, most
        of it before the fork.
        """
        os.umask(self.config.daemon.umask)
        sys.setswitchinterval(TURN)
        site = Answers(self.config, self.log)
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
        site = Answers(self.config, self.log)
        self.ids = choose_ids(self.config.daemon)
        self.open_log()
        self.give_up_rights(site)
        with FingerServer([], site, self.log) as server:
            server.serve_one(sock)

    def give_up_rights(self, site: Answers) -> None:
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
        for (section, name), text in self.config.texts.items():
            event("debug", "setting", section=section, name=name, value=text)
        if self.ids and not self.config.daemon.user:
            event("notice", "user", name=self.ids[0],
                  reason="started as root, and user is not set")
        user = {"user": self.ids[0]} if self.ids else {}
        event("notice", "ready", listen=",".join(
            address_text(listener.getsockname())
            for listener in self.server.door.listeners),
            backend=",".join(name for name, _ in self.config.backends),
            **user, pid=os.getpid())
        self.notifier.tell("READY=1", f"MAINPID={os.getpid()}")
        if self.notifier.period:
            self.server.chores[self.notifier.live] = 0.0

    def tell_end(self) -> None:
        self.log.event("notice", "stopped", signal=self.stopped_by,
                       queries=sum(self.server.outcomes.values()),
                       seconds=int(time.monotonic() - self.started))
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
            self.server.inbox.signals.append(number)

        self.server.inbox.actions = {
            signal.SIGTERM: functools.partial(self.stop, "SIGTERM"),
            signal.SIGINT: functools.partial(self.stop, "SIGINT"),
            signal.SIGHUP: self.reload, signal.SIGUSR1: self.log_counters,
            RELOADED: self.take_read}
        for number in SIGNALS:
            signal.signal(number, note)
        # A launcher may have left it ignored: then no program has a status.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.set_wakeup_fd(self.server.inbox.waker.fileno(),
                             warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def stop(self, name: str) -> None:
        self.notifier.tell("STOPPING=1")
        self.stopped_by = name
        self.server.stop()

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
                                 old=self.config).read()
            if config.log.to not in ("stderr", "syslog"):
                config.log.to = self.path(config.log.to)
            self.read = config, Answers(config, self.log)
        except Exception as error:      # whatever it is, the old one serves
            self.read = error
        self.server.inbox.signals.append(RELOADED)
        self.server.inbox.wake()

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

    def change_config(self, config: Any, site: Answers) -> None:
        """Go on by another config; raise OSError if its log cannot be had."""
        self.log.open(config.log)
        config.path = self.config.path
        self.tell_what_stays(config)
        fit_max_clients(config, self.log)
        self.server.change_answers(site)
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
                    config.texts[key] != self.config.texts[key]):
                self.log.event("warning", "not-reloaded", setting=row.name,
                               reason="only a restart can change it")
                config.texts[key] = self.config.texts[key]

    def log_counters(self) -> None:
        server = self.server
        self.log.event(
            "notice", "counters",
            seconds=int(time.monotonic() - self.started),
            queries=sum(server.outcomes.values()), clients=server.hosts.total,
            lookups=server.lookups.threads.total, **server.outcomes)


# ---- Command line ---------------------------------------------------------

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
    site = Answers(config, log)
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


def say_reply(site: Answers, line: str, client: str) -> int:
    """Print the reply itself; give the status."""
    text = QueryLine(site.limits.max_query)
    reply = FIXED_REPLIES["denied"]
    if site.allows(client):
        try:
            if not text.add(os.fsencode(line)):
                text.add(b"")
            reply = site.answer(
                parse_query(bytes(text.text), lambda: site.names), client,
                time.monotonic() + site.limits.timeout)
        except MalformedQuery:
            reply = FIXED_REPLIES["malformed"]
        except LineTooLong:
            reply = FIXED_REPLIES["too-long"]
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
        sock.sendall(FIXED_REPLIES["failed"].data)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(4096):      # a close with bytes unread is a reset
            pass
    for line in str(error).splitlines():
        syslog.syslog(syslog.LOG_ERR, UNSAFE.sub(show_unsafe, line))


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
        refuse_for_inetd(sock, error)
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
    try:
        path = find_config(args.config)
        config = reader(path).read()
    except ConfigError:
        # A config that has been broken since does not keep it running.
        if not (args.pidfile and (args.stop or args.status)):
            raise
        return control(args, args.pidfile, DEFAULT_TIMEOUT)
    if args.check:
        say(to_wire(f"{path} is good").replace(b"\r", b""))
        return 0
    if args.status or args.stop or args.reload:
        return control(args, config.daemon.pidfile, config.limits.timeout)
    if args.query is not None:
        return print_reply(config, log, args.query,
                           args.client or "127.0.0.1")
    daemon = Daemon(config, log, reader)
    if sock:
        daemon.run_inetd(sock)
    else:
        daemon.run()
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
