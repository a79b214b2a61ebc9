"""Backends of fingerd that make others wait: `finger` and `web`.

`finger` runs a program for each query, `web` fetches a page.  fingerd.py
loads this file when its config names one of them, and tells there what a
backend is (UsersBackend).  This file imports nothing of fingerd, and only
built-in exceptions leave it: ValueError "setting: what is wrong; what to
write" when a backend is made, OSError (TimeoutError is one), its reason in
one line, when a source fails.

Sections: text, programs, finger, page text, one at a time, connections,
cache, web.
"""

import atexit
import codecs
import collections
import contextlib
import encodings.aliases
import errno
import functools
import html
import http.client
import importlib
import io
import math
import os
import pwd
import re
import selectors
import shlex
import shutil
import signal
import socket
import ssl
import stat
import string
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Set

__version__ = "1.0"

READ_SIZE = 65536       # bytes asked for at once: what a Linux pipe holds
TRUNCATED = "[truncated]\n"


class Kept:
    """What a chroot would hide: kept from outside, also for a reload."""

    null: Any = None                        # a descriptor of /dev/null
    tls: Any = None                         # with the certificates loaded
    addresses: Dict[Any, List[Any]] = {}    # of hosts, by host and port


# ---- Text -------------------------------------------------------------------

def clip_text(text: str, limit: int, more: bool = False) -> str:
    """Cut text to limit bytes of UTF-8 at a line end, and say so.

    `more` says that something was left out already.
    """
    data = text.encode("utf-8", "backslashreplace")
    if len(data) <= limit and not more:
        return text
    data = data[:limit]
    data = data[:data.rfind(b"\n") + 1] or data + b"\n"
    # "ignore" drops the half of a character that the cut may have left.
    return data.decode("utf-8", "ignore") + TRUNCATED


def decode_text(data: bytes, codec: str, limit: int) -> str:
    """Decode the first limit bytes, bytes that do not fit shown as \\x9b."""
    decoder = codecs.getincrementaldecoder(codec)("backslashreplace")
    return decoder.decode(data[:limit], len(data) <= limit)


def one_line(text: object) -> str:
    """Fold a reason to one line of a length fit for a log."""
    return " ".join(str(text).split())[:500]


def seconds_left(deadline: float) -> float:
    """Tell the seconds until deadline; raise TimeoutError at its end."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


# ---- Programs ---------------------------------------------------------------

PATH = "/usr/local/bin:/usr/bin:/bin"   # fixed: not what the daemon was given
MAX_STDERR = 4096   # bytes kept of a program's complaints: some 50 lines
LINGER = 0.25       # seconds between a program's end and the end of its pipes
FIRST_TICK = 0.001  # seconds between looks for a program's end: short ones ...
LAST_TICK = 0.05    # ... for the many quick programs, then 20 looks a second
REAP_TIME = 1.0     # seconds a killed program may take to vanish
MAX_UNDEAD = 64     # killed programs, stuck in the kernel, before none is run


def open_pipe(reading, writing):
    """Open a pipe, each end to be closed with one of two ExitStacks."""
    reader, writer = os.pipe()
    writing.callback(os.close, writer)
    return reading.enter_context(open(reader, "rb", 0)), writer


class Running:
    """The runs whose programs live: the daemon must not leave them behind."""

    lock = threading.Lock()     # who is reaped has left before
    runs: Set[Any] = set()

    @classmethod
    def kill_all(cls) -> None:
        """Kill them at the end of the process."""
        with cls.lock:
            for run in cls.runs:
                run.kill()


class Run:
    """One run of a program: its process group, and what it has said.

    The process leads a session and group of its own.  It is not reaped before
    its group is killed: until then its number cannot be another's.
    """

    def __init__(self, argv: List[str], env: Dict[str, str],
                 limit: int) -> None:
        self.limit = limit          # bytes of output that are of use
        self.output = bytearray()
        self.errors = bytearray()
        self.ended = False          # by itself: its status means something
        self.timed_out = False
        # Not Popen's own pipes: before Python 3.11 it leaves some open when
        # it runs out of descriptors.
        with contextlib.ExitStack() as pipes, contextlib.ExitStack() as ends:
            stdin = Kept.null
            if stdin is None:
                stdin = ends.enter_context(open(os.devnull, "rb", 0))
            self.stdout, stdout = open_pipe(pipes, ends)
            self.stderr, stderr = open_pipe(pipes, ends)
            # As bytes, so that the daemon's locale cannot spoil a name.
            self.process = subprocess.Popen(
                [os.fsencode(argv[0])] + [arg.encode() for arg in argv[1:]],
                env={key.encode(): env[key].encode() for key in env},
                stdin=stdin, stdout=stdout, stderr=stderr, close_fds=True,
                start_new_session=True)
            self.pipes = pipes.pop_all()
        with Running.lock:
            Running.runs.add(self)

    def read(self, deadline: float) -> None:
        """Read both pipes until all is said, or too much, or too late.

        When either the program or its pipes come to their end, the other gets
        LINGER seconds: a grandchild may hold a pipe for ever, and a program
        may close its pipes and sleep.
        """
        closing, tick, quiet = deadline, FIRST_TICK, False
        with selectors.DefaultSelector() as selector:
            selector.register(self.stdout, selectors.EVENT_READ)
            selector.register(self.stderr, selectors.EVENT_READ)
            while len(self.output) <= self.limit:
                left = closing - time.monotonic()
                if left <= 0:
                    self.timed_out = not quiet and not self.ended
                    return
                ready = selector.select(min(left, tick))
                tick = FIRST_TICK if ready else min(tick * 2, LAST_TICK)
                for key, _ in ready:
                    self._take(key.fileobj, selector)
                quiet = not selector.get_map()
                self.ended = self._has_ended(quiet)
                if quiet and self.ended:
                    return
                if closing == deadline and (quiet or self.ended):
                    closing = min(deadline, time.monotonic() + LINGER)

    def _take(self, pipe, selector):
        data = os.read(pipe.fileno(), READ_SIZE)
        if not data:
            selector.unregister(pipe)
        elif pipe is self.stdout:
            self.output += data
        else:
            self.errors += data[:MAX_STDERR - len(self.errors)]

    def _has_ended(self, quiet):
        """Tell whether the program has ended, if possible without reaping."""
        if hasattr(os, "waitid"):
            options = os.WEXITED | os.WNOHANG | os.WNOWAIT
            try:
                return bool(os.waitid(os.P_PID, self.process.pid, options))
            except ChildProcessError:   # SIGCHLD is ignored: reaped already
                return True
        # macOS before Python 3.13 can only reap: not while there is a group
        # to kill.  A grandchild that holds a pipe keeps the client waiting.
        return quiet and self.process.poll() is not None

    def kill(self) -> None:
        """Kill the group, unless its number may be another's."""
        if self.process.returncode is None:
            # All may have ended, or be another user's.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def stop(self) -> bool:
        """Kill the group, close the pipes, reap; False: it does not die."""
        with Running.lock:
            Running.runs.discard(self)
            self.kill()
        self.pipes.close()
        try:
            self.process.wait(REAP_TIME)
        except subprocess.TimeoutExpired:
            return False
        return True


# ---- finger -----------------------------------------------------------------

MAX_NAME = 64       # characters: more than any login has; bounds a pattern
UNKNOWN = re.compile(r"finger: [^\n]*: no such user\.?")


def split_command(setting: str, text: str) -> List[str]:
    """Make the argument list of a command setting, its program found."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        reason = str(error).lower()
        raise ValueError(f'{setting}: "{text}" cannot be split into words'
                         f" ({reason}); close every quote") from None
    if not words:
        raise ValueError(f"{setting}: is empty; write a program and its"
                         " arguments, e.g. finger -- {user}")
    return [find_program(setting, words[0])] + words[1:]


def find_program(setting: str, name: str) -> str:
    """Find a program's path; the client never has a say in it."""
    if "{user}" in name:
        raise ValueError(f'{setting}: "{name}" lets the client name the'
                         " program; write {user} among its arguments")
    if "/" in name and not name.startswith("/"):
        raise ValueError(f'{setting}: "{name}" is neither a name nor an'
                         " absolute path; write its whole path")
    path = shutil.which(name, path=PATH)
    if path is None and "/" in name:
        raise ValueError(f'{setting}: "{name}" is not a program that may be'
                         " run; correct its path, or its mode")
    if path is None:
        raise ValueError(f'{setting}: there is no program "{name}" in {PATH};'
                         " install it, or write its path")
    return path


def is_inside(chroot: str, program: str) -> bool:
    """Tell whether a program is a file inside a chroot, by no way out."""
    inside = os.path.realpath(chroot)
    path = os.path.realpath(chroot + program)
    return (os.path.commonpath([inside, path]) == inside
            and os.path.isfile(path) and os.access(path, os.X_OK))


def compile_pattern(pattern: str) -> Any:
    """Compile what a whole name must match."""
    try:
        if pattern:
            return re.compile(pattern)
        reason = "it is empty"
    except (re.error, OverflowError, RecursionError) as error:
        reason = one_line(error)
    raise ValueError(f'pattern: "{pattern}" is not a regular expression for'
                     f" names ({reason}); correct it")


def refuse_user(setting: str, text: str) -> None:
    """Refuse a name where there is none to put in."""
    if "{user}" in text:
        raise ValueError(f'{setting}: "{text}" holds {{user}}, but a list is'
                         " of no user; leave it out")


class FingerBackend:
    """Answers with what a program prints, never through a shell.

    Status and output decide: output is the answer, whatever the
    status; no output and a status other than 0, or the words of Debian's
    finger, is no such user; death by a signal is a failure, because half an
    answer would look like a whole one.  A program that closes its output and
    stays is killed; what it said is the answer.  One that starts a session of
    its own is out of reach of the kill, as any daemon is.
    """

    waits = True
    settings = (
        ("command", "text", "finger -- {user}",
         "program and arguments for a query, no shell; {user} is the name"),
        ("verbose_command", "text", "finger -l -- {user}",
         "the same for /W; at its default it follows a changed command"),
        ("list_command", "text", "",
         "program and arguments for the user list; empty: there is none"),
        ("pattern", "text", "[A-Za-z0-9_][A-Za-z0-9._-]{0,63}",
         "regular expression for a whole name, of at most 64 characters"),
        ("max_output", "size", "64K",
         "bytes that are read of a program; it is killed when it says more"),
    )

    def __init__(self, options: Dict[str, Any],
                 report: Callable[[str], None]) -> None:
        atexit.unregister(Running.kill_all)     # once is enough
        atexit.register(Running.kill_all)
        default = {row[0]: row[2] for row in self.settings}
        verbose = "verbose_command"
        # Who sets a command of his own does not want /W to run finger.
        if (options[verbose] == default[verbose]
                and options["command"] != default["command"]):
            verbose = "command"
        self.command = split_command("command", options["command"])
        self.verbose_command = split_command(verbose, options[verbose])
        self.list_command = (options["list_command"] and split_command(
            "list_command", options["list_command"]))
        refuse_user("list_command", options["list_command"])
        self.pattern = compile_pattern(options["pattern"])
        self.max_output: int = options["max_output"]
        self.report = report
        self.undead: List[Run] = []     # killed, but not gone yet
        self.lock = threading.Lock()

    def enter_chroot(self, path: str) -> None:
        """Check that the programs are inside, under the same names."""
        for setting in ("command", "verbose_command", "list_command"):
            words = getattr(self, setting)
            if words and not is_inside(path, words[0]):
                raise ValueError(f'{setting}: "{words[0]}" is not inside the'
                                 f" chroot {path}; put it there, with all"
                                 " that it needs, or use no chroot")
        Kept.null = os.open(os.devnull, os.O_RDONLY)

    def lookup(self, user: str, verbose: bool, client: str,
               timeout: float) -> Optional[str]:
        """Run the command for user; None: no such user."""
        # Length first: the pattern is the operator's, the text a stranger's.
        if (len(user) > MAX_NAME or user.startswith("-")
                or not self.pattern.fullmatch(user)):
            return None
        command = self.verbose_command if verbose else self.command
        argv = [word.replace("{user}", user) for word in command]
        return self._ask(argv, user, verbose, client, timeout)

    def user_list(self, verbose: bool, client: str,
                  timeout: float) -> Optional[str]:
        """Run list_command; None: it is not set."""
        if not self.list_command:
            return None
        text = self._ask(self.list_command, "", verbose, client, timeout)
        if text is None:
            raise OSError(f"{self.list_command[0]}: gave no list")
        return text

    def _ask(self, argv, user, verbose, client, timeout):
        """Run a program and judge what it said; None: it knows no answer."""
        env = {"PATH": PATH, "LC_ALL": "C.UTF-8", "FINGER_USER": user,
               "FINGER_CLIENT": client,
               "FINGER_VERBOSE": "1" if verbose else ""}
        run = self._run(argv, env, timeout)
        text = decode_text(bytes(run.output), "utf-8", self.max_output)
        errors = decode_text(bytes(run.errors), "utf-8", MAX_STDERR).strip()
        if UNKNOWN.fullmatch(text.strip() or errors):
            return None
        if errors:
            errors = re.sub(r"\s*\n\s*", "; ", errors)
            self.report(f"{argv[0]}: on standard error: {errors}")
        if run.timed_out:
            raise TimeoutError(f"{argv[0]}: not done after {timeout:.3g}"
                               " seconds, killed")
        status = run.process.returncode
        if run.ended and status < 0:
            raise OSError(f"{argv[0]}: died of signal {-status}")
        if not text and not run.ended:
            raise OSError(f"{argv[0]}: closed its output, silent, and stayed")
        if not text and status:
            return None
        return clip_text(text, self.max_output,
                         len(run.output) > self.max_output)

    def _run(self, argv, env, timeout):
        """Run a program to its end, natural or not."""
        deadline = time.monotonic() + timeout
        self._bury()
        try:
            run = Run(argv, env, self.max_output)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OSError(f"{argv[0]}: cannot be run: {one_line(reason)}"
                          ) from None
        try:
            run.read(deadline)
        finally:
            if not run.stop():
                with self.lock:
                    self.undead.append(run)
        return run

    def _bury(self):
        """Reap earlier runs that took their time to die."""
        with self.lock:
            self.undead = [run for run in self.undead
                           if run.process.poll() is None]
            if len(self.undead) >= MAX_UNDEAD:
                raise OSError(f"{MAX_UNDEAD} killed programs have not gone;"
                              " no more are run until they have")


# ---- Page text: HTML to lines, bytes to text --------------------------------

# html.parser takes seconds for 64 KiB of "<a<a<a" or unclosed comments, and
# raises on long character references.  Here each alternative takes all that
# it has looked at, to the end of the page if need be, as browsers do: one
# pass, linear in the page.
TOKENS = re.compile(r"""
    <!--(?:-?>|.*?(?:--!?>|\Z))
  | <(?P<raw>script|style|template|svg|iframe|object)\b [^>]*(?:>|\Z)
        .*?(?:</(?P=raw)\b[^>]*(?:>|\Z)|\Z)
  | <title\b[^>]*(?:>|\Z) (?P<title>.*?) (?:</title\b[^>]*(?:>|\Z)|\Z)
  | <(?P<end>/?)(?P<tag>[a-z][a-z0-9]*)
        (?:[^>=]+|=\s*(?:"[^"]*(?:"|\Z)|'[^']*(?:'|\Z))?)* (?:>|\Z)
  | <[!?/][^>]*(?:>|\Z)
  | (?P<text>(?:[^<]+|<(?![a-z!?/]))+)
    """, re.VERBOSE | re.DOTALL | re.IGNORECASE)

PARAGRAPHS = frozenset({
    "article", "blockquote", "dl", "fieldset", "figure", "form", "h1", "h2",
    "h3", "h4", "h5", "h6", "hr", "ol", "p", "pre", "section", "table", "ul"})
LINES = frozenset({
    "address", "aside", "body", "caption", "dd", "div", "dt",
    "figcaption", "footer", "head", "header", "html", "legend", "main", "nav",
    "option", "tr"})
# Stand-ins that survive the folding of white space; a page's own go first.
KEPT_SPACE, KEPT_TAB, BULLET, NEW_LINE, NEW_PARAGRAPH = "\0\1\2\3\4"
NO_STAND_INS = dict.fromkeys(range(5))
KEEP_SPACE = {0x20: KEPT_SPACE, 0x09: KEPT_TAB}
FREE_SPACE = {0: " ", 1: "\t", 0xa0: " "}

# Encodings of pages, by the names of Python's modules.  All are loaded at
# start: after chroot, or without rights to Python's directory, none can be.
# Others ("hex", "punycode", ...) are no text, or slow.
CODECS = frozenset({
    "big5", "cp1250", "cp1251", "cp1252", "cp1253", "cp1254", "cp1255",
    "cp1256", "cp1257", "cp1258", "cp437", "cp850", "cp866", "euc_jp",
    "euc_kr", "gb18030", "gb2312", "gbk", "iso2022_jp", "iso8859_10",
    "iso8859_13", "iso8859_14", "iso8859_15", "iso8859_16", "iso8859_2",
    "iso8859_3", "iso8859_4", "iso8859_5", "iso8859_6", "iso8859_7",
    "iso8859_8", "iso8859_9", "koi8_r", "koi8_u", "mac_roman", "shift_jis",
    "utf_16", "utf_16_be", "utf_16_le", "utf_8_sig"})
# What pages call ASCII or Latin 1 is Windows 1252 (WHATWG Encoding 4.2); a
# mark at the start of UTF-8 is no text.
READ_AS = {"ascii": "cp1252", "latin_1": "cp1252", "utf_8": "utf_8_sig"}
META = re.compile(rb"<meta\b[^>]{0,200}?\bcharset\s*=\s*[\"']?([\w.:-]{1,40})",
                  re.IGNORECASE)
CHARSET = re.compile(r";\s*charset\s*=\s*[\"']?([\w.:-]{1,40})",
                     re.ASCII | re.IGNORECASE)  # email.message is quadratic
META_SPAN = 1024    # bytes in which HTML must name its encoding


def html_text(page: str) -> str:
    """Turn HTML, however broken, into lines of text; the title comes first."""
    title, pre, out = "", 0, []
    for token in TOKENS.finditer(page.translate(NO_STAND_INS)):
        tag = (token["tag"] or "").lower()
        if token["text"]:
            out.append(page_words(token["text"], pre > 0))
        elif token["title"] and not title:
            title = page_words(token["title"], False).strip()
        elif tag == "li":
            out.append(NEW_LINE + ("" if token["end"] else BULLET))
        elif tag in ("td", "th"):
            out.append("" if token["end"] else "\t")
        elif tag in PARAGRAPHS:
            out.append(NEW_PARAGRAPH)
        elif tag in LINES:
            out.append(NEW_LINE)
        elif tag == "br":
            out.append("\n")
        if tag == "pre":
            pre = max(0, pre - 1) if token["end"] else pre + 1
    body = fold_lines("".join(out))
    if title and body.split("\n", 1)[0].strip().lower() != title.lower():
        body = title + "\n\n" + body
    return body.strip("\n") + "\n" if body.strip() else ""


def page_words(text, pre):
    """Resolve entities; fold white space, or in <pre> keep it."""
    # More digits than a character has: html.unescape would raise.
    text = re.sub("&#[0-9]{8,};?", "\ufffd", text)
    text = html.unescape(text).translate(NO_STAND_INS)
    if pre:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        return text.translate(KEEP_SPACE)
    return re.sub("[ \t\n\r\f]+", " ", text)


def fold_lines(text):
    """Drop white space around lines and beyond one empty line."""
    text = re.sub("\2[ \n\3\4]+(?!\2)", BULLET, text)
    text = re.sub("[ \n\3\4]+", fold_breaks, text).replace(BULLET, "* ")
    lines = [line.strip(" \t").rstrip(" \t\0\1") for line in text.split("\n")]
    text = re.sub("\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
    return text.translate(FREE_SPACE)


def fold_breaks(match):
    """Fold the breaks between two words: the strongest one counts."""
    if NEW_PARAGRAPH in match[0]:
        return "\n\n"
    if NEW_LINE in match[0]:
        return "\n"
    return "\n" * match[0].count("\n") or " "


def choose_codec(charset, page, is_html):
    """Choose how to read a page: by its header, its <meta>, or as UTF-8."""
    if not charset and is_html:
        found = META.search(page[:META_SPAN])
        charset = found[1].decode("ascii", "replace") if found else ""
        # Seen as ASCII, so it is not UTF-16 (WHATWG HTML 13.2.3.2).
        if charset.lower().startswith("utf-16"):
            charset = ""
    name = re.sub("[^a-z0-9]+", "_", (charset or "").lower())
    name = encodings.aliases.aliases.get(name, name)
    name = READ_AS.get(name, name)
    return name if name in CODECS else "utf_8_sig"


# ---- One at a time: many threads that want the same thing -------------------

class Flight:
    """One thread's work, whose result the others wait for."""

    def __init__(self, deadline):
        self.deadline = deadline
        self.done = threading.Event()
        self.result = None


class Flights:
    """Flights by key.  A flight past its deadline holds nobody up."""

    def __init__(self):
        self.lock = threading.Lock()
        self.flying = {}

    def join(self, key, deadline):
        """Return the flight for key, and whether it is the caller's to do."""
        with self.lock:
            flight = self.flying.get(key)
            if flight is not None and time.monotonic() < flight.deadline:
                return flight, False
            flight = self.flying[key] = Flight(deadline)
            return flight, True

    def land(self, key, flight, result):
        """Hand a result to those who wait, and forget the flight."""
        flight.result = result
        with self.lock:
            if self.flying.get(key) is flight:
                del self.flying[key]
        flight.done.set()


# ---- Connections: one deadline for address, connect, TLS and every byte -----

BACK_OFF = 5.0      # seconds that a failing host or page is left alone
FAIR_TIME = 1.0     # seconds: who had less and timed out has shown nothing
HURRY = 0.9         # of the most seconds that anybody has had: as little
RESOLVE_TIME = 60.0  # seconds after which a hung name service is asked again


def timed_out(error: BaseException) -> bool:
    """Tell a deadline from other failures; urllib wraps it."""
    # socket.timeout is another class before Python 3.10.
    return isinstance(getattr(error, "reason", error),
                      (TimeoutError, socket.timeout))


def fair_failure(error: BaseException, started: float) -> bool:
    """Tell whether a failure shows that the host is at fault."""
    return (not timed_out(error)
            or time.monotonic() - started >= FAIR_TIME)


def plain_reason(error: BaseException) -> str:
    """Put a failure of the network in one line for the log."""
    if isinstance(error, http.client.IncompleteRead):
        return "the answer ended early"
    if isinstance(error, urllib.error.URLError):
        error = error.reason if isinstance(error.reason, OSError) else error
    if isinstance(error, OSError):
        return one_line(error.strerror or error)
    return one_line(f"{type(error).__name__}: {error}")


class Dialler:
    """Connects to hosts; one that cannot be reached is left alone a while."""

    def __init__(self, clock):
        self.clock = clock
        self.flights = Flights()
        self.down = {}      # (host, port): (until, reason)

    def dial(self, address, timeout, source=None):
        """Connect, as socket.create_connection does, with one deadline."""
        started = time.monotonic()
        until, reason = self.down.get(address, (0.0, ""))
        if self.clock() < until:
            raise OSError(f"{reason} (not yet tried again)")
        try:
            sock = self._dial_any(address, started + timeout)
        except OSError as error:
            reason = plain_reason(error)
            if fair_failure(error, started):
                self.down[address] = (self.clock() + BACK_OFF, reason)
            raise
        self.down.pop(address, None)
        return sock

    def _dial_any(self, address, deadline):
        failure = OSError(f"{address[0]} has no address")
        found = self._resolve(address, deadline)
        for tried, (family, kind, proto, _, target) in enumerate(found):
            sock = None
            try:
                # A share for each: a dead address must not starve the next.
                share = seconds_left(deadline) / (len(found) - tried)
                sock = socket.socket(family, kind, proto)
                sock.settimeout(share)
                sock.connect(target)
                sock.settimeout(seconds_left(deadline))
                return sock
            except OSError as error:
                failure = error
                if sock is not None:
                    sock.close()
        raise failure

    def _resolve(self, address, deadline):
        """Find addresses in time: getaddrinfo itself knows no timeout."""
        host, port = address
        if address in Kept.addresses:
            return Kept.addresses[address]
        try:
            return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM,
                                      flags=socket.AI_NUMERICHOST)
        except socket.gaierror:
            pass                # a name: in a thread, one for each host
        flight, mine = self.flights.join(address,
                                         time.monotonic() + RESOLVE_TIME)
        if mine:
            thread = threading.Thread(target=self._ask, args=(address, flight),
                                      name="resolve", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:       # no thread to be had
                self.flights.land(address, flight, OSError(error))
        if not flight.done.wait(seconds_left(deadline)):
            raise TimeoutError(f"no address of {host} in time")
        if isinstance(flight.result, OSError):
            reason = plain_reason(flight.result)
            raise OSError(f"no address of {host}: {reason}")
        return flight.result

    def _ask(self, address, flight):
        """Ask the name service; land a list of addresses, or an OSError."""
        result: Any = OSError("the name service was given up")
        try:
            result = socket.getaddrinfo(address[0], address[1],
                                        type=socket.SOCK_STREAM)
        except (OSError, ValueError) as error:
            result = error if isinstance(error, OSError) else OSError(error)
        finally:
            self.flights.land(address, flight, result)


def keep_address(host, port):
    """Look a host up for the time when it cannot be."""
    Kept.addresses[host, port] = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM)


class TimedFile(io.RawIOBase):
    """A socket's file whose reads each get what is left of the time.

    A timeout of the socket alone starts anew with each byte that drips in.
    """

    def __init__(self, sock, file, deadline):
        self.sock = sock
        self.file = file
        self.deadline = deadline

    def readable(self):
        return True

    def readinto(self, buffer):
        self.sock.settimeout(seconds_left(self.deadline))
        count = self.file.readinto(buffer)
        # For the TLS handshake that may follow a proxy's answer.
        self.sock.settimeout(seconds_left(self.deadline))
        return count

    def close(self):
        if not self.closed:
            self.file.close()
        super().close()


class TimedResponse(http.client.HTTPResponse):
    """A response that is all there by its deadline, or TimeoutError."""

    def __init__(self, deadline, sock, *args, **options):
        super().__init__(sock, *args, **options)
        self.fp = io.BufferedReader(
            TimedFile(sock, self.fp.detach(), deadline))


def open_timed(kind, dial, host, timeout, **options):
    """Make a connection of http.client whose timeout is for all of it.

    dial does what its socket.create_connection would.  The TLS handshake is
    timed as a whole by the socket.
    """
    connection = kind(host, timeout=timeout, **options)
    connection._create_connection = dial
    connection.response_class = functools.partial(
        TimedResponse, time.monotonic() + timeout)
    return connection


class HTTPHandler(urllib.request.HTTPHandler):
    """urllib's handler, with our connections."""

    def __init__(self, dial):
        super().__init__()
        self.connect = functools.partial(
            open_timed, http.client.HTTPConnection, dial)

    def http_open(self, request):
        return self.do_open(self.connect, request)


class HTTPSHandler(urllib.request.HTTPSHandler):
    """The same for https, the peer's name and certificate checked."""

    def __init__(self, dial):
        self.tls = Kept.tls or ssl.create_default_context()
        super().__init__(context=self.tls)
        self.connect = functools.partial(
            open_timed, http.client.HTTPSConnection, dial)

    def https_open(self, request):
        return self.do_open(self.connect, request, context=self.tls)


# ---- Cache ------------------------------------------------------------------

MAX_ANSWERS = 1000          # on each of two shelves: a large staff
MAX_SHELF = 8 * 1024 ** 2   # bytes on each shelf: 1000 answers of 8 KiB
ANSWER_COST = 500           # bytes of an entry beside its texts, about


class Answer(NamedTuple):
    """What a page gave: a text, None for no such user, or a failure."""

    text: Optional[str]
    until: float            # by the clock: not asked for again before
    stale_until: float      # by the clock: not given after
    failure: str = ""       # the reason, when there is no answer
    late: bool = False      # the failure was a deadline


class Shelf:
    """Answers by URL, bounded in number and bytes, the oldest out first."""

    def __init__(self):
        self.answers = collections.OrderedDict()
        self.size = 0

    def take(self, url):
        answer = self.answers.pop(url, None)
        if answer is not None:
            self.size -= self._cost(url, answer)
        return answer

    def put(self, url, answer):
        if self._cost(url, answer) > MAX_SHELF:
            return
        self.answers[url] = answer
        self.size += self._cost(url, answer)
        while self.size > MAX_SHELF or len(self.answers) > MAX_ANSWERS:
            self.take(next(iter(self.answers)))

    @staticmethod
    def _cost(url, answer):
        return sum(map(sys.getsizeof, (url, answer.text, answer.failure)),
                   ANSWER_COST)


class Cache:
    """Two shelves, so that a flood of names pushes out only its like.

    What was asked for once is on the first.  Texts that are asked for again
    move to the second; unknown users and failures never do.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.once, self.again = Shelf(), Shelf()

    def get(self, url):
        with self.lock:
            answer = self.again.take(url) or self.once.take(url)
            if answer is not None:
                shelf = self.once if answer.text is None else self.again
                shelf.put(url, answer)
            return answer

    def put(self, url, answer):
        with self.lock:
            shelf = self.again if self.again.take(url) else self.once
            self.once.take(url)
            shelf.put(url, answer)


# ---- web --------------------------------------------------------------------

MAX_REDIRECTS = 5   # between an old address of a page and its newest
PORTS = {"http": 80, "https": 443}
HEADERS = [("User-Agent", "fingerd/" + __version__),
           ("Accept", "text/plain, text/html;q=0.9, text/*;q=0.8")]
HTML_TYPES = ("text/html", "application/xhtml+xml")
TEXT_TYPE = re.compile(r"text/.*|application/((.*\+)?(json|xml)|yaml)")
GZIP = 31           # wbits of zlib: a gzip header and trailer
ZLIB, DEFLATE = 15, -15


def check_url(setting: str, url: str) -> str:
    """Check a URL of the config: http or https, and a host of its own."""
    if not re.fullmatch("[!-~]+", url):
        raise ValueError(f'{setting}: "{url}" holds a space or a character'
                         " beyond ASCII; write it percent-encoded")
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname if parts.port != 0 else None
    except ValueError as error:
        reason = one_line(error).lower()
        raise ValueError(f'{setting}: "{url}" is not a URL ({reason});'
                         " correct it") from None
    if "@" in parts.netloc:     # not quoted: it may be a password
        raise ValueError(f"{setting}: there is a user name or password before"
                         " the host; leave it out")
    if parts.scheme not in PORTS or not host:
        raise ValueError(f'{setting}: "{url}" is not a web address; write'
                         " https://host/path")
    if "{user}" in parts.netloc:
        raise ValueError(f'{setting}: "{url}" lets the client name the host;'
                         ' write "/" after the host')
    if climbs(url):
        raise ValueError(f'{setting}: "{url}" holds a "." or ".." segment;'
                         " write the path without")
    return url


def climbs(url: str) -> bool:
    """Tell whether some server might see a "." or ".." segment in url."""
    # Twice: servers differ in when, and how often, they decode.
    path = urllib.parse.urlsplit(url).path
    path = urllib.parse.unquote(urllib.parse.unquote(path))
    return not {".", ".."}.isdisjoint(re.split(r"[/\\;]", path))


def choose_template(url: str, prefix: str) -> str:
    """Make the one URL, with {user} in it, of the two settings."""
    if url and prefix:
        raise ValueError("prefix: url is set as well; write only one of them")
    if not url and not prefix:
        raise ValueError("url: is missing; write url = "
                         "https://example.org/~{user}")
    if prefix:
        if "{user}" in prefix:
            raise ValueError(f'prefix: "{prefix}" holds {{user}}, but the name'
                             " is appended; leave it out, or write url")
        return check_url("prefix", prefix + "{user}")
    # What is behind "#" is never sent.
    if "{user}" not in check_url("url", url).partition("#")[0]:
        raise ValueError(f'url: "{url}" has no place for the name; write'
                         " {user} in its path")
    return url


def read_pieces(response):
    """Yield a body as it comes; raise OSError if it ends before its length."""
    data = response.read(READ_SIZE)
    while data:
        yield data
        data = response.read(READ_SIZE)
    if response.length:
        raise OSError("the answer ended early")


def read_page(response, limit):
    """Read a body, unpacked, up to limit bytes and one that tells of more."""
    coding = response.headers.get("Content-Encoding", "").strip().lower()
    pieces = read_pieces(response)
    if coding in ("gzip", "x-gzip", "deflate"):
        pieces = unpack(pieces, coding, limit)
    elif coding not in ("", "identity"):
        raise OSError(f'its encoding "{coding}" was not asked for')
    page = bytearray()
    for piece in pieces:
        page += piece
        if len(page) > limit:
            break
    return bytes(page[:limit + 1])


def unpack(pieces, coding, limit):
    """Unpack gzip, of any number of members, or deflate, bit by bit.

    No piece is longer than limit + 1 bytes, whatever a bomb would become.
    """
    engine = None
    for data in pieces:
        rest = data
        while rest:
            if engine is None:
                engine = zlib.decompressobj(choose_engine(coding, rest))
            yield engine.decompress(rest, limit + 1)
            rest = engine.unconsumed_tail
            if engine.eof and coding == "deflate":
                return
            if engine.eof:
                # Between members there may be padding.
                rest, engine = engine.unused_data.lstrip(b"\0"), None
    if engine is not None:
        raise OSError(f"its {coding} data ended early")


def choose_engine(coding, data):
    """Choose the wbits of zlib; many servers say deflate and mean raw."""
    if coding != "deflate":
        return GZIP
    return ZLIB if data[0] & 15 == 8 else DEFLATE


class WebBackend:
    """Answers with a page, fetched from a fixed host and turned into text.

    A redirect may go from http to https, never back, to the same host or one
    of redirect_hosts, there to the port usual for its scheme or to the one
    the config names.  The proxies of the environment are used as everywhere
    in urllib.  404 and 410 are no such user; what is neither that nor 200 is
    a failure.  The index must be there: without it, the list has failed.
    """

    waits = True
    settings = (
        ("url", "text", "",
         "page of a user, {user} in its path: https://example.org/~{user}"),
        ("prefix", "text", "",
         "the same in short, the name is appended: https://example.org/~"),
        ("index", "text", "",
         "page that answers the user list; empty: there is none"),
        ("max_output", "size", "256K",
         "bytes that are read of a page, and sent of its text"),
        ("cache", "period", "60",
         "seconds that an answer is kept; 0: none is"),
        ("stale", "period", "3600",
         "seconds after those that it still serves, when the origin fails"),
        ("redirect_hosts", "hosts", "",
         "other hosts that a redirect may lead to"),
    )

    def __init__(self, options: Dict[str, Any], report: Callable[[str], None],
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.template = choose_template(options["url"], options["prefix"])
        self.index = options["index"] and check_url("index", options["index"])
        refuse_user("index", self.index)
        self.max_output = options["max_output"]
        self.keep = options["cache"]
        self.stale = options["stale"]
        self.redirect_hosts = frozenset(options["redirect_hosts"])
        self.report = report
        self.clock = clock
        self.cache = Cache()
        self.longest = 0.0      # seconds that anybody has had for a page
        self.flights = Flights()
        self.opener = self._make_opener(Dialler(clock).dial)
        # Later they may be out of reach; idna is for names of hosts.
        for name in CODECS | {"idna"}:
            codecs.lookup(name)

    def enter_chroot(self, path: str) -> None:
        """Look the hosts up and load all certificates, while we can."""
        for setting, url in (("prefix", self.template), ("index", self.index)):
            parts = urllib.parse.urlsplit(url)
            if not url:
                continue
            try:
                keep_address(parts.hostname, parts.port or PORTS[parts.scheme])
            except OSError as error:
                raise ValueError(f"{setting}: {parts.hostname} has no address"
                                 f" now ({plain_reason(error)}), and inside"
                                 " the chroot it cannot be looked up"
                                 ) from None
        proxies = map(urllib.parse.urlsplit,
                      urllib.request.getproxies().values())
        for host, port in [(host, port) for host in self.redirect_hosts
                           for port in PORTS.values()] + [
                           (proxy.hostname, proxy.port) for proxy in proxies]:
            with contextlib.suppress(OSError):
                keep_address(host, port)
        Kept.tls = self._load_certificates()
        self.opener = self._make_opener(Dialler(self.clock).dial)

    @staticmethod
    def _load_certificates():
        """Make a TLS context that will not look for certificates later."""
        tls = ssl.create_default_context()
        folder = ssl.get_default_verify_paths().capath
        for name in os.listdir(folder) if folder else ():
            with contextlib.suppress(OSError):      # SSLError is one
                tls.load_verify_locations(os.path.join(folder, name))
        return tls

    @staticmethod
    def _make_opener(dial):
        """Make an opener that knows http and https, and follows nothing."""
        opener = urllib.request.OpenerDirector()
        opener.addheaders = HEADERS
        for handler in (urllib.request.ProxyHandler(), HTTPHandler(dial),
                        HTTPSHandler(dial)):
            opener.add_handler(handler)
        return opener

    def lookup(self, user: str, verbose: bool, client: str,
               timeout: float) -> Optional[str]:
        """Give the text of the user's page; None: no such user."""
        name = urllib.parse.quote(user, safe="")
        url = self.template.replace("{user}", name)
        return None if climbs(url) else self._answer(url, timeout)

    def user_list(self, verbose: bool, client: str,
                  timeout: float) -> Optional[str]:
        """Give the text of the index page; None: it is not set."""
        if not self.index:
            return None
        text = self._answer(self.index, timeout)
        if text is None:
            raise OSError(f"GET {self.index}: there is no such page")
        return text

    def _answer(self, url, timeout):
        answer = self.cache.get(url)
        if answer is None or self.clock() >= answer.until:
            answer = self._renewed(url, time.monotonic() + timeout)
        if answer.failure:
            raise (TimeoutError if answer.late else OSError)(answer.failure)
        return answer.text

    def _renewed(self, url, deadline):
        """Renew an answer, or wait for one who does so already."""
        while True:
            left = deadline - time.monotonic()
            flight, mine = self.flights.join(url, deadline)
            if mine:
                self._fly(url, flight, max(left, 0))
            elif not flight.done.wait(max(left, 0)):
                raise TimeoutError(f"GET {url}: timed out")
            # Another may have had less time than there is.
            if mine or not flight.result.late or (
                    time.monotonic() >= deadline):
                return flight.result

    def _fly(self, url, flight, timeout):
        """Renew an answer for all who wait for it."""
        answer = Answer(None, 0.0, 0.0, f"GET {url}: was given up")
        try:
            # Again: the flight before may have landed since.
            known = self.cache.get(url)
            if known is None or self.clock() >= known.until:
                known = self._renew(url, known, timeout)
                if self.keep:
                    self.cache.put(url, known)
            answer = known
        finally:
            self.flights.land(url, flight, answer)

    def _renew(self, url, known, timeout):
        """Fetch a page; when that fails, fall back on what is known."""
        stale = (known is not None and not known.failure
                 and self.clock() < known.stale_until)
        self.longest = max(self.longest, timeout)
        started = time.monotonic()
        try:
            # With an answer in hand, leave time to give it.
            text = self._fetch(url, timeout / 2 if stale else timeout)
        except (OSError, http.client.HTTPException, ValueError,
                zlib.error) as error:
            reason = f"GET {url}: {plain_reason(error)}"
            again = self.clock()
            hurried = timed_out(error) and timeout < HURRY * self.longest
            if fair_failure(error, started) and (stale or not hurried):
                again += min(BACK_OFF, self.keep)
            if not stale:
                return Answer(None, again, 0.0, reason, timed_out(error))
            self.report("an old answer is given: " + reason)
            return known._replace(until=again)
        until = self.clock() + self.keep
        return Answer(text, until, until + self.stale)

    def _fetch(self, url, timeout):
        """Get a page, by redirects if need be, as text; None: not there."""
        deadline, origin = time.monotonic() + timeout, url
        for _ in range(MAX_REDIRECTS + 1):
            request = urllib.request.Request(url)
            response = self.opener.open(request, None, seconds_left(deadline))
            if response is None:
                raise OSError("the proxy for it is of an unknown kind")
            with response:
                location = response.headers.get("Location")
                if response.status not in (301, 302, 303, 307, 308):
                    return self._read(response)
                url = self._follow(origin, url, location or "")
        raise OSError(f"more than {MAX_REDIRECTS} redirects")

    def _follow(self, origin, url, location):
        """Check where a redirect leads."""
        # http.client reads headers as Latin 1.
        location = urllib.parse.quote(location, string.punctuation, "latin-1")
        target = urllib.parse.urljoin(url, location)
        first, parts = map(urllib.parse.urlsplit, (origin, target))
        hosts = self.redirect_hosts | {first.hostname}
        ports = {PORTS.get(parts.scheme), first.port}
        if (parts.scheme not in PORTS or "@" in parts.netloc
                or (url.startswith("https:") and parts.scheme != "https")
                or parts.hostname not in hosts
                or (parts.port or PORTS[parts.scheme]) not in ports):
            raise OSError(f'redirected to "{target}", which is not allowed')
        return target

    def _read(self, response):
        """Make text of a final response; None: no such page."""
        if response.status in (404, 410):
            return None
        if response.status != 200:
            raise OSError(f"{response.status} {response.reason}")
        kind = response.headers.get_content_type()
        if kind not in HTML_TYPES and not TEXT_TYPE.fullmatch(kind):
            raise OSError(f'its type "{kind}" is not text')
        page = read_page(response, self.max_output)
        named = CHARSET.search(response.headers.get("Content-Type", ""))
        codec = choose_codec(named and named[1], page, kind in HTML_TYPES)
        text = decode_text(page, codec, self.max_output)
        if kind in HTML_TYPES:
            text = html_text(text)
        return clip_text(text, self.max_output, len(page) > self.max_output)


# ---- Until the merge: two helpers that are in Text and Settings then --------

def make_text(data, codec, limit, convert=str):
    """Make text of data, bad bytes as \\x9b, and cut it at a line if long."""
    text = convert(decode_text(data, codec, limit))
    return clip_text(text, limit, len(data) > limit)


def refuse(*errors):
    """Raise those errors that are texts as one ValueError, if any is."""
    lines = [error for error in errors if error]
    if lines:
        raise ValueError("\n".join(lines))


# ---- Files as an enemy wrote them -------------------------------------------

MAX_FILE = 256 * 1024   # bytes that are read of a file: of a page, too
PLAIN_NAME = re.compile(r"\w[\w.+-]{0,63}")
# Follow no symlink, wait for no writer of a FIFO and for no lease, get no
# controlling terminal.
FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
# A directory that may be searched need not be readable, where systems know.
FOLDER_FLAGS = os.O_DIRECTORY | getattr(
    os, "O_PATH", getattr(os, "O_SEARCH", os.O_RDONLY))
# There is no such file for us.  Systems differ about symlinks and sockets.
ABSENT = {getattr(errno, name, errno.ENOENT) for name in (
    "EACCES", "EFTYPE", "EISDIR", "ELOOP", "EMLINK", "ENAMETOOLONG", "ENOENT",
    "ENOTDIR", "ENXIO", "EOPNOTSUPP")}


@contextlib.contextmanager
def open_folder(path):
    """Give the descriptor of a directory, closed at the end."""
    fd = os.open(path, FOLDER_FLAGS)
    try:
        yield fd
    finally:
        os.close(fd)


def read_file(folder, name, owner=None, limit=MAX_FILE):
    """Give the text of a regular file in a folder, None if there is none.

    With an owner, a uid, it must be that user's.
    """
    try:
        fd = os.open(name.encode(), FILE_FLAGS, dir_fd=folder)
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or owner not in (None, info.st_uid):
            return None
        data = bytearray()
        for piece in iter(functools.partial(os.read, fd, READ_SIZE), b""):
            data += piece
            if len(data) > limit:
                break
        return make_text(data, "utf-8", limit)
    finally:
        os.close(fd)


# ---- files ------------------------------------------------------------------

MAX_LISTED = 10_000     # files that a list opens: more than a reply ever holds
MAX_FIRST = 1000        # bytes that are read of each


class FilesBackend:
    """Answers with a text file of a directory, read at each query.

    A client names a file, without the .txt that may be behind its name.  What
    does not match PLAIN_NAME, as a path or a hidden file, names nothing.
    """

    waits = True
    settings = (
        ("directory", "directory", "", "where NAME or NAME.txt is a user's"),
        ("index", "path", "", "file there that is the user list, if any"),
        ("list", "yes/no", "no", "make a user list of their first lines?"),
    )

    def __init__(self, options, report):
        self.directory, self.index, self.listed = (
            options[row[0]] for row in self.settings)
        refuse(not self.directory
               and "directory: is empty; write e.g. /srv/finger",
               ("/" in self.index or self.index in (".", ".."))
               and f'index: "{self.index}" is not the name of a file in the'
               " directory; write e.g. index.txt",
               self.index and self.listed
               and "list: index answers the user list; leave one out")

    def lookup(self, user, verbose, client, timeout):
        """Give the text of a user's file; None: no such user."""
        if not self._may_be_user(user):
            return None
        with open_folder(self.directory) as folder:
            for name in dict.fromkeys((user, user.lower())):
                for file in (name, name + ".txt"):
                    text = self._read(folder, file)
                    if text is not None:
                        return text
        return None

    def user_list(self, verbose, client, timeout):
        """Give the text of the index, or of a list; None: no such setting."""
        if not self.index and not self.listed:
            return None
        with open_folder(self.directory) as folder:
            if self.listed:
                return self._list(folder, time.monotonic() + timeout)
            text = read_file(folder, self.index)
        if text is None:
            raise OSError(f"{self.index}: is not a file in {self.directory}")
        return text

    def _may_be_user(self, name):
        return (PLAIN_NAME.fullmatch(name) is not None
                and not name.lower().endswith(".txt"))

    def _read(self, folder, name, limit=MAX_FILE):
        """Give the text of a user's file; the index is not one."""
        if name.lower() == self.index.lower():
            return None
        return read_file(folder, name, limit=limit)

    def _list(self, folder, deadline):
        """Give a line for each user, with the first line of the text."""
        lines: dict = {}
        for file in sorted(os.listdir(self.directory)):
            name = file[:-len(".txt")] if file.endswith(".txt") else file
            if (name in lines or len(lines) == MAX_LISTED
                    or not self._may_be_user(name)):
                continue
            seconds_left(deadline)
            text = self._read(folder, file, limit=MAX_FIRST)
            if text is not None:
                lines[name] = text.partition("\n")[0]
        width = max(map(len, lines), default=0)
        return "".join(f"{name:{width}}  {line}\n"
                       for name, line in lines.items())


# ---- sql --------------------------------------------------------------------

MAX_ROWS = 10_000       # that are read of a result: more than a reply holds
SQLITE_STEPS = 10_000   # between looks at the clock: some 0.2 ms
# How a module wants its parameter written: its paramstyle (PEP 249).
MARKS = {"qmark": "?", "format": "%s", "pyformat": "%s", "numeric": ":1",
         "named": ":name"}
CONNECT_WORD = re.compile(r"""\s*([A-Za-z_]\w*)=
    (?: (["'])(.*?)\2 | ([^\s"']\S*)? ) (?!\S)""", re.VERBOSE | re.DOTALL)


def load_module(name):
    """Import a DB-API 2 module; give it and its mark of a parameter."""
    try:
        module = importlib.import_module(name)
        if not module.threadsafety:
            raise TypeError("threads may not use it")
        return module, MARKS[module.paramstyle]
    except (AttributeError, ImportError, KeyError, TypeError,
            ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f'module: "{name}" cannot be used ({reason}); install'
                         " a DB-API 2 module, or write sqlite3") from None


def limit_sqlite(connection, deadline):
    """Have SQLite give up at the deadline, be it waiting or working."""
    left = max(0, math.ceil(1000 * (deadline - time.monotonic())))
    connection.execute(f"PRAGMA busy_timeout = {left}")
    connection.set_progress_handler(
        lambda: time.monotonic() > deadline, SQLITE_STEPS)
    connection.text_factory = bytes     # it may be no UTF-8


def spell_rows(columns, rows):
    """Give a line for each value that is not NULL; None if there is none."""
    lines = []
    for row in rows:
        for column, value in zip(columns, row):
            if isinstance(value, (bytes, bytearray, memoryview)):
                text = make_text(bytes(value), "utf-8", MAX_FILE)
            else:
                text = str(value)
            if value is not None:
                name = f"{column}: " if len(columns) > 1 else ""
                lines.append(name + text.rstrip("\n") + "\n")
    return "".join(lines) if lines else None


class SqlBackend:
    """Answers with what a database has of a name, by any DB-API 2 module.

    Rows are lines; where there are more columns than one, so are the values,
    each with its column's name.  Nothing found is no such user.  A file is
    opened for each query: another may have been put into its place.
    """

    waits = True
    settings = (
        ("database", "path", "", "file of an SQLite database"),
        ("module", "text", "sqlite3", "DB-API 2 module for another database"),
        ("connect", "text", "", "name=value words for its connect()"),
        ("query", "text", "SELECT text FROM people WHERE name = ?",
         "what is answered; its parameter (?, %s) is the name"),
        ("list_query", "text", "", "the same for the user list, if any"),
    )

    def __init__(self, options, report):
        self.idle = []          # connections
        self.limit_threads(64)
        self.query, self.list_query = options["query"], options["list_query"]
        self.module, mark = load_module(options["module"])
        self.sqlite = options["module"] == "sqlite3"
        database, connect = options["database"], options["connect"]
        refuse(self.sqlite and not database
               and "database: is empty; write e.g. /srv/people.db",
               database and not self.sqlite
               and "database: is for module = sqlite3; write connect",
               connect and self.sqlite
               and "connect: is for other modules; write database",
               # The text is not shown: a password may be in it.
               CONNECT_WORD.sub("", connect).strip()
               and "connect: is not made of name=value words; write e.g."
               " dbname=people password='with spaces'",
               self.query.count(mark) != 1 and f"query: does not have {mark}"
               " once; write it where the name goes, and nowhere else",
               mark in self.list_query and f"list_query: has {mark}, but a"
               " list has no name; leave it out")
        self.arguments = {
            name: int(plain) if re.fullmatch("-?[0-9]+", plain)
            else quoted or plain
            for name, _, quoted, plain in CONNECT_WORD.findall(connect)}
        if self.sqlite:
            self.arguments = {
                "database": f"file:{urllib.parse.quote(database)}?mode=ro",
                "uri": True, "check_same_thread": False}

    def __del__(self):
        for connection in self.idle:
            with contextlib.suppress(Exception):
                connection.close()

    def limit_threads(self, number):
        """Have that many connections at most."""
        self.places = threading.Semaphore(number)

    def lookup(self, user, verbose, client, timeout):
        """Give what the query finds; None: nothing."""
        return self._ask(timeout, self.query, [user])

    def user_list(self, verbose, client, timeout):
        """Give what list_query finds; None: it is not set."""
        if not self.list_query:
            return None
        return self._ask(timeout, self.list_query) or ""

    def _ask(self, timeout, *query):
        """Run a query, on a new connection if the idle one is dead."""
        deadline = time.monotonic() + timeout
        if not self.places.acquire(timeout=max(0, timeout)):
            raise TimeoutError("all connections are in use: timed out")
        try:
            # Another thread may be quicker to take it.
            with contextlib.suppress(IndexError, ConnectionError):
                return self._run(self.idle.pop(), deadline, query)
            return self._run(None, deadline, query)
        finally:
            self.places.release()

    def _run(self, connection, deadline, query):
        """Run a query; a ConnectionError says that another may do better."""
        try:
            if connection is None:
                connection = self.module.connect(**self.arguments)
            if self.sqlite:
                limit_sqlite(connection, deadline)
            with contextlib.closing(connection.cursor()) as cursor:
                cursor.execute(*query)
                columns = [column[0] for column in cursor.description or ()]
                text = spell_rows(columns, cursor.fetchmany(MAX_ROWS))
            connection.rollback()
        except Exception as error:      # the module's, or what it lets through
            with contextlib.suppress(Exception):    # it may be dead, or None
                connection.close()
            late = time.monotonic() >= deadline
            reason = f"{type(error).__name__}: {error}"
            raise (TimeoutError if late else ConnectionError)(
                " ".join(reason.split())[:500]) from None
        if self.sqlite:
            connection.close()
        else:
            self.idle.append(connection)
        return text


# ---- accounts: lines as Debian's finger has them, byte for byte -------------

FILES = {"forward": (".forward", "Mail forwarded to ", ""),
         "pgpkey": (".pgpkey", "PGP key:\n", ""),
         "project": (".project", "Project:\n", ""),
         "plan": (".plan", "Plan:\n", "No Plan.\n")}
ITEMS = ("home", "shell", "office", "phone", "login", "from", "idle",
         "forward", "mail", "pgpkey", "project", "plan")
SAME_TIME = 0.02        # seconds that it takes at least to know nobody
HALF_YEAR = 365 * 86400 / 2     # seconds: an older login is shown with year
MAX_MATCHES = 8         # accounts of one real name: as names in a query
MATCH_TIME = 60         # seconds between two walks through all of passwd
# utmp(5) and lastlog(5) of glibc: their times have 32 bits, or 64.
WIDE = os.uname().machine in ("aarch64", "alpha", "ia64", "loongarch64")
UTMP = struct.Struct("=h6x32s4x32s256s8x" + ("4xI52x" if WIDE else "I40x"))
LASTLOG = struct.Struct("=I4x32s256s" if WIDE else "=I32s256s")
USER_PROCESS = 7        # the kind of record in utmp that is a login


class Login(NamedTuple):
    """Where from and when somebody logged in."""

    name: str
    tty: str
    host: str
    since: int              # 0 is never


def make_login(name, tty, host, since):
    name, tty, host = (
        field.partition(b"\0")[0].decode("utf-8", "backslashreplace")
        for field in (name, tty, host))
    return Login(name, tty, host, since)


def read_logins(path):
    """Give who is logged in, nobody where that is not kept."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except (FileNotFoundError, PermissionError):
        return []
    records = UTMP.iter_unpack(data[:len(data) // UTMP.size * UTMP.size])
    return [make_login(name, tty, host, since)
            for kind, tty, name, host, since in records
            if kind == USER_PROCESS and name[0]]


def read_last_login(path, uid):
    """Give the last login of a user, None where that is not kept."""
    try:
        with open(path, "rb") as file:
            file.seek(uid * LASTLOG.size)
            data = file.read(LASTLOG.size)
    except (FileNotFoundError, PermissionError):
        return None
    whole = len(data) == LASTLOG.size   # it ends behind the highest of them
    since, tty, host = LASTLOG.unpack(data if whole else bytes(LASTLOG.size))
    return make_login(b"", tty, host, since)


def split_gecos(entry):
    """Give full name, office, office phone and home phone of an account."""
    gecos = os.fsencode(entry.pw_gecos).decode("utf-8", "backslashreplace")
    fields = [*gecos[gecos.startswith("*"):].split(","), "", "", ""][:4]
    login = entry.pw_name[:1].upper() + entry.pw_name[1:]
    return [fields[0].replace("&", login), *fields[1:]]


def spell_phone(number):
    """Put hyphens into a number that is digits only."""
    signs = {4: "x", 5: "x", 7: "", 10: "", 11: "+"}
    if len(number) not in signs or re.search("[^0-9]", number):
        return number
    parts = number[:-10], number[-10:-7], number[-7:-4], number[-4:]
    return signs[len(number)] + "-".join(filter(None, parts))


def spell_office(office, phone, home_phone):
    """Give office and phones a line each, or one to two of them that fit."""
    texts = [office and f"Office: {office}",
             phone and f"Office Phone: {spell_phone(phone)}",
             home_phone and f"Home Phone: {spell_phone(home_phone)}"]
    if office and phone and len(office) + len(phone) <= 31:
        texts[:2] = [f"Office: {office}, {spell_phone(phone)}"]
    lines, line = "", ""
    for text in filter(None, texts):
        column = max(48, len(line) // 8 * 8 + 8)
        if line and column + len(text) <= 80:
            tabs = "\t" * max(1, 5 - len(line) // 8)
            lines, line = f"{lines}{line}{tabs}{text}\n", ""
        else:
            lines, line = lines + line + "\n" * bool(line), text
    return lines + line + "\n" * bool(line)


def spell_time(seconds, year=""):
    return time.strftime(f"%a %b %e %R {year}(%Z)", time.localtime(seconds))


def spell_place(login, items):
    """Give where a login is, or was, and came from."""
    host = f" from {login.host}" if login.host and "from" in items else ""
    return f" on {login.tty}{host}"


def spell_idle(tty, indent):
    """Report how long a terminal is idle, and whether it takes messages."""
    try:
        info = os.stat("/dev/" + tty)
    except OSError:                 # as for ":0", a display of X
        return " (messages off)"
    idle = time.gmtime(max(0, int(time.time()) - int(info.st_atime)))
    parts = [(idle.tm_yday - 1, "day"), (idle.tm_hour, "hour"),
             (idle.tm_min, "minute"), (idle.tm_sec, "second")]
    parts = parts[:2 if idle.tm_yday > 1 else 3 if idle.tm_hour else 4]
    text = "".join(f"{number} {unit}{'s' * (number > 1)} "
                   for number, unit in parts if number)
    if text:
        text = f"{indent}{text}idle"
    if info.st_mode & 0o220 != 0o220:
        text += "\n     (messages off)" if text else " (messages off)"
    return text


def spell_mail(path):
    """Report when mail came and was read, as far as a mailbox shows it."""
    size = 0
    with contextlib.suppress(OSError):
        info = os.stat(path)
        size, came, read = info.st_size, int(info.st_mtime), int(info.st_atime)
    if not size:
        return "No mail.\n"
    if came <= read:
        return f"Mail last read {spell_time(read, '%Y ')}\n"
    return (f"New mail received {spell_time(came, '%Y ')}\n"
            f"     Unread since {spell_time(read, '%Y ')}\n")


def spell_file(home, owner, name, header, absent):
    """Give the text of a user's own file, or what is said without one."""
    text = read_file(home, name, owner)
    if text is None:
        return absent
    return header + text + "\n" * (not text.endswith("\n"))


class AccountsBackend:
    """Answers with what this system and its users say of an account.

    A name that is unknown, a system's, or that of a user who hides gets the
    same answer, after the same time.
    """

    waits = True
    passwd = pwd
    utmp, lastlog, mail = "/var/run/utmp", "/var/log/lastlog", "/var/mail/"
    settings = (
        ("show", "text", "project plan pgpkey",
         "what is shown, some of: " + " ".join(ITEMS)),
        ("show_local", "text", "", "the same for clients in local, besides"),
        ("local", "networks", "", "networks of these clients"),
        ("uids", "text", "1000-59999", "numbers of the users to answer for"),
        ("hide_file", "path", ".nofinger", "file in a home that hides a user"),
        ("opt_in", "yes/no", "no", "hide those without a .plan?"),
        ("match_names", "yes/no", "no", "find words of full names, too?"),
    )

    def __init__(self, options, report):
        self.options = options
        self.show, self.show_local = (
            set(options[name].split()) for name in ("show", "show_local"))
        uids = options["uids"]
        numbers: Any = re.fullmatch("([0-9]{1,10})-([0-9]{1,10})", uids)
        refuse(*(f'{setting}: "{word}" cannot be shown; write some of '
                 + " ".join(ITEMS) for setting in ("show", "show_local")
                 for word in options[setting].split() if word not in ITEMS),
               self.show_local and not options["local"] and
               "show_local: is for nobody; write local = 127.0.0.0/8 ::1",
               not numbers and f'uids: "{uids}" is not a range of numbers;'
               " write e.g. 1000-59999",
               not options["hide_file"]
               and "hide_file: is empty; write e.g. .nofinger")
        self.uids = range(int(numbers[1]), int(numbers[2]) + 1)
        self.lock = threading.Lock()
        self.index_names = functools.lru_cache(maxsize=1)(self._index_names)

    def enter_chroot(self, path):
        raise ValueError("chroot: hides the accounts; leave it out, or take"
                         " accounts out of backend")

    def lookup(self, user, verbose, client, timeout):
        """Give what is shown of the accounts of a name; None: nobody's."""
        soonest = time.monotonic() + min(SAME_TIME, timeout)
        items = self._items(client)
        texts = [self._visit(entry, functools.partial(self._describe, items))
                 for entry in self._find(user)]
        text = "\n".join(filter(None, texts))
        if not text:
            time.sleep(max(0, soonest - time.monotonic()))
        return text or None

    def user_list(self, verbose, client, timeout):
        """Give a table of who is logged in, if that is shown; else None."""
        if "login" not in self._items(client):
            return None
        rows = []
        for login in read_logins(self.utmp):
            entry = self._account(login.name)
            if entry and self._visit(entry, lambda *account: account):
                since = time.strftime("%b %e %R", time.localtime(login.since))
                rows.append((entry.pw_name, split_gecos(entry)[0], since))
        if not rows:
            return "No one logged on.\n"
        # rogallo makes a menu of a table with this first line.
        rows = [("Login", "Name", "Login Time"), *sorted(rows)]
        widths = [max(map(len, column)) + 2 for column in zip(*rows)]
        return "".join(f"{login:{widths[0]}}{name:{widths[1]}}{since}\n"
                       for login, name, since in rows)

    def _items(self, client):
        """Give what is shown to a client."""
        if not self.options["local"]:
            return self.show
        import ipaddress  # loaded: there are networks
        address = ipaddress.ip_address(client)
        local = any(address in network for network in self.options["local"])
        return self.show | self.show_local if local else self.show

    def _account(self, login):
        """Give the account with this login, None for a system's."""
        with contextlib.suppress(KeyError, ValueError):
            entry = self.passwd.getpwnam(login)
            if entry.pw_uid in self.uids:
                return entry
        return None

    def _find(self, name):
        """Give the accounts of a name."""
        if not PLAIN_NAME.fullmatch(name):
            return []
        logins = [name, name.lower()]
        if self.options["match_names"]:
            with self.lock:     # who waits for it finds it done
                names = self.index_names(time.monotonic() // MATCH_TIME)
            logins += names.get(name.lower(), [])[:MAX_MATCHES]
        entries = filter(None, map(self._account, dict.fromkeys(logins)))
        return {entry.pw_name: entry for entry in entries}.values()

    def _index_names(self, minute):
        """Give the logins of those with a word in their full names."""
        names: dict = {}
        for entry in self.passwd.getpwall():
            for word in split_gecos(entry)[0].lower().split():
                if entry.pw_uid in self.uids:
                    names.setdefault(word, []).append(entry.pw_name)
        return names

    def _visit(self, entry, visit):
        """Give visit(entry, home's descriptor); None if the user is hidden."""
        try:
            with open_folder(entry.pw_dir) as home:
                with contextlib.suppress(FileNotFoundError):
                    os.stat(self.options["hide_file"], dir_fd=home,
                            follow_symlinks=False)
                    return None
                if self.options["opt_in"] and read_file(
                        home, ".plan", entry.pw_uid) is None:
                    return None
                return visit(entry, home)
        except OSError as error:
            if error.errno not in ABSENT:
                raise
            return None         # the file may be there, and be out of sight

    def _describe(self, items, entry, home):
        """Give the lines of an account."""
        name, *gecos = split_gecos(entry)
        gecos = [text if item in items else "" for text, item
                 in zip(gecos, ("office", "phone", "phone"))]
        place = "\t".join(text for item, text in (
            ("home", f"Directory: {entry.pw_dir:25}"),
            ("shell", f"Shell: {entry.pw_shell or '/bin/sh'}"))
            if item in items).rstrip(" ")
        lines = [f"Login: {entry.pw_name:15}\t\t\tName: {name}\n",
                 place + "\n" * bool(place), spell_office(*gecos)]
        if "login" in items:
            lines += self._login_lines(items, entry)
        for item in filter(items.__contains__, (
                "forward", "mail", "pgpkey", "project", "plan")):
            lines.append(
                spell_mail(self.mail + entry.pw_name) if item == "mail" else
                spell_file(home, entry.pw_uid, *FILES[item]))
        return "".join(lines)

    def _login_lines(self, items, entry):
        """Tell of the logins there are, and of a later one or the last."""
        logins = [login for login in read_logins(self.utmp)
                  if login.name == entry.pw_name[:32]]
        last = read_last_login(self.lastlog, entry.pw_uid)
        if last and logins and (
                last.since <= min(login.since for login in logins)
                or last.tty in [login.tty for login in logins]):
            last = None
        width = max([len(login.tty) for login in [*logins, last] if login],
                    default=0)
        for login in logins:
            place = spell_place(login, items)
            if "idle" in items:
                place += spell_idle(login.tty, "\n" * (" from " in place)
                                    + " " * (width - len(login.tty) + 3))
            yield f"On since {spell_time(login.since)}{place}\n"
        if last and last.since:
            old = time.time() - last.since >= HALF_YEAR
            yield (f"Last login {spell_time(last.since, '%Y ' * old)}"
                   f"{spell_place(last, items)}\n")
        elif last:
            yield "Never logged in.\n"


BACKENDS = {"accounts": AccountsBackend, "files": FilesBackend,
            "finger": FingerBackend, "sql": SqlBackend, "web": WebBackend}
