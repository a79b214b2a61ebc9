"""Backends of fingerd that take time, and so have a thread for each query.

finger runs a program, web gets a page; files, sql and accounts read a
directory, a database, and what this system says of its users.

UsersBackend in fingerd.py says what a backend is, and what it raises: only
built-in exceptions.  This file imports nothing of that one.

Sections: text and names, programs, finger, page text, connections, web,
files as an enemy wrote them, files, sql, accounts.
"""

from __future__ import annotations

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
import ipaddress
import itertools
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
import struct
import subprocess
import threading
import time
import urllib.request
from typing import Any, Callable, Iterator
from urllib.parse import quote, unquote, urljoin, urlsplit

__version__ = "1.0"


# ---- Text and names ---------------------------------------------------------

# While a codec or re is at work, no other thread runs.
PIECE = 1024        # bytes or characters for them at once
MAX_NAME = 64       # characters: more than any login has; bounds a pattern
MAX_MATCH = 0.05    # seconds for one name
MAX_CHECK = 0.5     # seconds for all names that a pattern is tried on


def make_text(data: Any, codec: str, limit: int, convert: Any = str) -> str:
    """Make text of limit bytes at most, cut at a line; bad ones as \\x9b."""
    whole, data = len(data) <= limit, data[:limit]
    decoder = codecs.getincrementaldecoder(codec)("backslashreplace")
    pieces = [decoder.decode(data[start:start + PIECE])
              for start in range(0, len(data), PIECE)]
    # Half a character at the limit is dropped, here and below.
    text = convert("".join(pieces) + decoder.decode(b"", whole))
    data = text.encode("utf-8", "backslashreplace")
    if whole and len(data) <= limit:
        return text
    data = data[:limit]
    data = data[:data.rfind(b"\n") + 1] or data + b"\n"
    return data.decode("utf-8", "ignore") + "[truncated]\n"


def seconds_left(deadline: float) -> float:
    """Give the seconds until deadline; raise TimeoutError after it."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


def refuse(*errors: Any) -> None:
    """Raise those errors that are texts as one ValueError, if any is."""
    lines = [error for error in errors if error]
    if lines:
        raise ValueError("\n".join(lines))


def check_all(*checks: Callable[[], Any]) -> list[Any]:
    """Give what the checks give, or raise all their ValueErrors as one."""
    results, errors = [], []
    for check in checks:
        try:
            results.append(check())
        except ValueError as error:
            errors.append(error)
    refuse(*map(str, errors))
    return results


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile what a whole name must match, if no name takes it long."""
    refuse(not pattern and "pattern: is empty; write e.g. [a-z]+")
    try:
        regex = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f'pattern: "{pattern}" is not a regular expression'
                         f" ({error}); correct it") from None
    name = find_slow_name(regex)
    refuse(name and f'pattern: "{pattern}" takes over {MAX_MATCH:g} seconds'
           f' for the name "{name}"; write no repeat inside another')
    return regex


def fits(regex: re.Pattern[str], name: str) -> bool:
    # Length first: the pattern is the operator's, the name a stranger's.
    return (len(name) <= MAX_NAME and not name.startswith("-")
            and regex.fullmatch(name) is not None)


@functools.lru_cache(maxsize=64)        # a reload has no time for it again
def find_slow_name(regex: re.Pattern[str]) -> str | None:
    """Find a name that takes more than MAX_MATCH seconds, by a timer."""
    def stop(*args):                    # the signal interrupts re
        raise TimeoutError

    timer, end = signal.ITIMER_VIRTUAL, time.monotonic() + MAX_CHECK
    signal.signal(signal.SIGVTALRM, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGVTALRM})
    try:
        for name in hostile_names(regex.pattern):
            signal.setitimer(timer, MAX_MATCH)
            regex.fullmatch(name)
            if time.monotonic() > end:
                break
        signal.setitimer(timer, 0)
    except TimeoutError:
        return name
    finally:
        signal.setitimer(timer, 0)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
    return None


def hostile_names(pattern: str) -> Iterator[str]:
    """Yield names made of what the pattern is, which it may nearly match."""
    runs = list(dict.fromkeys(re.findall(r"\w+|[^\w\s]", pattern)))[:12]
    units = list(dict.fromkeys(["a", "0", ".", "-", "_", *runs]))
    pairs = [*units, *map("".join, itertools.product(units, repeat=2))]
    for end, unit in itertools.product(["!", *runs], pairs):
        yield (unit * MAX_NAME)[:MAX_NAME - 1] + end[0]
    for start, unit in itertools.product(pairs, units):
        yield (start + unit * MAX_NAME)[:MAX_NAME - 1] + "!"


# ---- Programs ---------------------------------------------------------------

READ_SIZE = 65536   # bytes at once: what a Linux pipe holds
PATH = "/usr/local/bin:/usr/bin:/bin"   # fixed: not what the daemon was given
MAX_STDERR = 4096   # bytes kept of a program's complaints: some 50 lines
LINGER = 0.25       # seconds between a program's end and the end of its pipes
TICK = 0.05         # seconds between looks whether a program has ended ...
LAST_TICK = 0.001   # ... and when its pipes have: it ends at any moment
REAP_TIME = 1.0     # seconds a killed program may take to vanish

# The programs that run.  The lock is held from a start until it is known
# here; one leaves before it is reaped.
running: set[subprocess.Popen[bytes]] = set()
running_lock = threading.Lock()


def kill_all():
    """Kill what runs, and start nothing more: the daemon ends."""
    running_lock.acquire()      # and never released
    for process in running:
        kill_group(process)


def kill_group(process):
    """Kill a program and its children, unless its number may be another's."""
    if process.returncode is None:
        # All may have ended, or be another user's.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def run_program(argv: list[str], env: dict[str, str]) -> Iterator[Any]:
    """Start a program in a session of its own; kill what is left of it.

    It is not reaped before its group is killed: until then its number cannot
    be another's.
    """
    # Of two pipes of its own, Popen before Python 3.11 leaves one open if it
    # cannot open the other.
    reader, writer = os.pipe()
    with open(reader, "rb", 0) as errors:
        with open(writer, "wb", 0) as stderr, running_lock:
            # Debian's finger obeys .nofinger only when stdin is a socket.
            stdin, peer = socket.socketpair()
            peer.close()
            with stdin:
                # As bytes, so that the daemon's locale cannot spoil a name.
                process: Any = subprocess.Popen(
                    [argv[0], *(word.encode() for word in argv[1:])],
                    env={key.encode(): env[key].encode() for key in env},
                    stdin=stdin.fileno(), stdout=subprocess.PIPE,
                    stderr=stderr, start_new_session=True)
            running.add(process)
        try:
            process.stderr = errors
            yield process
        finally:
            with running_lock:
                running.discard(process)
                kill_group(process)
            process.stdout.close()
            # One that is stuck in the kernel is reaped by a later Popen.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(REAP_TIME)


def read_pipes(process, limit, deadline):
    """Give output, complaints, and whether the program has ended by itself.

    After the end of the program or of its pipes, the other gets LINGER
    seconds: a grandchild may hold a pipe, a program close them and sleep.
    """
    output, errors, silent, ended = bytearray(), bytearray(), False, False
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, output)
        selector.register(process.stderr, selectors.EVENT_READ, errors)
        while len(output) <= limit and not (silent and ended):
            left = deadline - time.monotonic()
            tick = LAST_TICK if silent else TICK
            for key, _ in selector.select(max(0, min(left, tick))):
                data = os.read(key.fd, READ_SIZE)
                key.data.extend(data)
                if not data:
                    selector.unregister(key.fileobj)
            del errors[MAX_STDERR:]
            if left <= 0:
                break
            lingers = silent or ended
            silent = not selector.get_map()
            ended = has_ended(process, silent)
            if (silent or ended) and not lingers:
                deadline = min(deadline, time.monotonic() + LINGER)
    return output, errors, ended


def has_ended(process, silent):
    """Report whether a program has ended, without reaping it."""
    try:
        return bool(os.waitid(os.P_PID, process.pid,
                              os.WEXITED | os.WNOHANG | os.WNOWAIT))
    except (AttributeError, ChildProcessError):
        # macOS before Python 3.13 can only reap, and so can a system that
        # ignores SIGCHLD; then nothing can kill the group.
        return silent and process.poll() is not None


# ---- finger -----------------------------------------------------------------

# What Debian's finger says, and a fingerd, ours or another.
UNKNOWN = re.compile(r"(?:finger: [^\n]*: )?no such user\.?", re.IGNORECASE)


def split_command(setting, text):
    """Make the argument list of a command, its program found."""
    try:
        program, *words = shlex.split(text) or [""]
    except ValueError:
        raise ValueError(f'{setting}: "{text}" cannot be split into words;'
                         " close every quote") from None
    path = shutil.which(program, path=PATH)
    refuse((path is None or not os.path.isabs(path))
           and f'{setting}: "{text}" begins neither with a program in {PATH}'
           " nor with the path of one; install it, or correct its name")
    return [path, *words]


class FingerBackend:
    """Answers with what a program prints, never through a shell.

    Silence and "No such user" alone mean just that, whatever the status;
    other output is the answer.  A signal and the deadline are failures, which
    end the search: half an answer would look like a whole one.
    """

    waits = True
    settings = (
        ("command", "text", "finger -- {user}", "what runs for a query"),
        ("verbose_command", "text", "finger -l -- {user}", "the same for /W"),
        ("list_command", "text", "", "the same for the user list, if any"),
        ("pattern", "text", "[A-Za-z0-9_][A-Za-z0-9._-]{0,63}",
         "what a whole name matches"),
        ("max_output", "size", "64K", "bytes, after which it is killed"),
    )

    def __init__(self, options, report):
        atexit.unregister(kill_all)     # once is enough
        atexit.register(kill_all)
        self.report, self.max_output = report, options["max_output"]
        texts = {row[0]: options[row[0]] for row in self.settings[:3]
                 if options[row[0]] or row[0] == "command"}
        command, verbose = (row[2] for row in self.settings[:2])
        if (options["command"] != command
                and options["verbose_command"] == verbose):
            del texts["verbose_command"]    # not finger beside another program
        *commands, self.pattern = check_all(
            *(functools.partial(split_command, *row) for row in texts.items()),
            lambda: compile_pattern(options["pattern"]))
        self.commands = dict(zip(texts, commands))
        self.warnings = [
            f'{setting}: "{word}" is passed to the program as an argument,'
            " there is no shell; write a script if you need one"
            for setting, words in self.commands.items()
            for word in words if re.search("[|<>;&$`]", word)]

    def enter_chroot(self, path):
        """Check that the programs are inside, by no way out."""
        inside = os.path.join(os.path.realpath(path), "")
        refuse(*(f'{setting}: "{words[0]}" is not inside the chroot {path};'
                 " put it there, with all that it needs, or use no chroot"
                 for setting, words in self.commands.items()
                 if not os.path.realpath(path + words[0]).startswith(inside)
                 or not os.access(path + words[0], os.X_OK)))

    def lookup(self, user, verbose, client, timeout):
        """Run the command for user; None: no such user."""
        if not fits(self.pattern, user):
            return None
        command = self.commands["command"]
        if verbose:
            command = self.commands.get("verbose_command", command)
        program, *words = command
        argv = [program, *(word.replace("{user}", user) for word in words)]
        return self._ask(argv, user, verbose, client, timeout)

    def user_list(self, verbose, client, timeout):
        """Run list_command; None: it is not set."""
        argv = self.commands.get("list_command")
        if not argv:
            return None
        text = self._ask(argv, "", verbose, client, timeout)
        if text is None:
            raise OSError(f"{argv[0]}: gave no list")
        return text

    def _ask(self, argv, user, verbose, client, timeout):
        """Run a program and judge what it said; None: it knows no answer."""
        deadline = time.monotonic() + timeout
        env = {"PATH": PATH, "LC_ALL": "C.UTF-8", "FINGER_USER": user,
               "FINGER_CLIENT": client,
               "FINGER_VERBOSE": "1" if verbose else ""}
        with run_program(argv, env) as process:
            output, said, ended = read_pipes(process, self.max_output,
                                             deadline)
            late = time.monotonic() >= deadline
        text = make_text(output, "utf-8", self.max_output)
        errors = make_text(said, "utf-8", MAX_STDERR).strip()
        if errors:
            level = "debug" if UNKNOWN.fullmatch(errors) else "warning"
            lines = "; ".join(filter(None, map(str.strip, errors.split("\n"))))
            self.report(f"{argv[0]}: on standard error: {lines}", level)
        if late and not ended and len(output) <= self.max_output:
            raise TimeoutError(f"{argv[0]}: timed out, killed")
        if ended and process.returncode < 0:
            raise OSError(f"{argv[0]}: ended by signal {-process.returncode}")
        if UNKNOWN.fullmatch(text.strip() or errors):
            return None
        return text or None


# ---- Page text: HTML to lines, bytes to text --------------------------------

# html.parser takes seconds for 64 KiB of "<a<a<a" or unclosed comments.  Here
# a token takes all that has been looked at, to the end of the page if need
# be, as browsers do: one pass, in matches of PIECE characters at most.
TOKEN = re.compile(r"""
    <!--
  | <(?P<end>/?)(?P<tag>[a-z][a-z0-9]{0,15})
  | <[!?/]
  # Its end does not cut a character reference, of at most 40 characters.
  | (?P<text>[^<]{1,900}[^<&]{0,99} | <{1,900}(?![a-z!?/]))
    """, re.VERBOSE | re.ASCII | re.IGNORECASE)
COMMENT_END = re.compile("--!?>")
TAG_STOP = re.compile(r""">|=\s*["']""")
# Elements that are left out, and what ends each.
RAW = {tag: re.compile(rf"</{tag}(?![a-z0-9])", re.ASCII | re.IGNORECASE)
       for tag in ("iframe", "object", "script", "style", "svg", "template",
                   "title")}

# What comes between two words: the strongest gap that was asked for.
GAPS = ("", " ", "\t", "\n", "\n\n")
NONE, SPACE, CELL, LINE, PARAGRAPH, BREAK = range(6)
BULLET = "* "
TAG_GAPS = {
    **dict.fromkeys(("article", "blockquote", "dl", "fieldset", "figure",
                     "form", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "ol",
                     "p", "pre", "section", "table", "ul"), PARAGRAPH),
    **dict.fromkeys(("address", "aside", "body", "caption", "dd", "div", "dt",
                     "figcaption", "footer", "head", "header", "html",
                     "legend", "li", "main", "nav", "option", "tr"), LINE),
    "td": CELL, "th": CELL, "br": BREAK}

# Encodings of pages, by the names of Python's modules, all loaded at the start
# (a chroot may hide them).  Others ("hex", "punycode") are not text, or slow.
CODECS = {name: name for name in (
    "big5", "cp437", "cp850", "cp866", "euc_jp", "euc_kr", "gb18030", "gb2312",
    "gbk", "iso2022_jp", "koi8_r", "koi8_u", "mac_roman", "shift_jis",
    "utf_16", "utf_16_be", "utf_16_le",
    *(f"cp125{part}" for part in range(9)),
    *(f"iso8859_{part}" for part in range(2, 17) if part not in (11, 12)))}
# What pages call ASCII or Latin 1 is Windows 1252 (WHATWG Encoding 4.2).
CODECS["ascii"] = CODECS["latin_1"] = "cp1252"
# email.message takes quadratic time for it.
CHARSET = re.compile(r";\s*charset\s*=\s*[\"']?([\w.:-]{1,40})",
                     re.ASCII | re.IGNORECASE)
# Whoever can read it does not read UTF-16.
META = re.compile(r"<meta\b[^>]{0,200}?\bcharset\s*=\s*[\"']?"
                  r"(?!utf-16)([\w.:-]{1,40})", re.ASCII | re.IGNORECASE)


def choose_codec(content_type, page, is_html):
    """Choose how to read a page: by its header, its <meta>, or as UTF-8."""
    found = CHARSET.search(content_type)
    if not found and is_html:           # HTML must name it in its first KiB
        found = META.search(page[:1024].decode("latin-1"))
    name = re.sub("[^a-z0-9]+", "_", found[1].lower()) if found else ""
    name = encodings.aliases.aliases.get(name, name)
    return CODECS.get(name, "utf_8_sig")


def html_text(page: str) -> str:
    """Turn HTML, however broken, into lines of text."""
    text, gap = [""], PARAGRAPH
    for wanted, word in html_pieces(page):
        if wanted == BREAK:
            gap = PARAGRAPH if gap >= LINE else LINE
        else:
            gap = max(gap, wanted)
        if word:
            if text[-1] == BULLET and word != BULLET:
                gap = NONE          # a bullet has its text on its line
            if gap >= LINE:
                text[-1] = text[-1].rstrip()
            text += [GAPS[gap], word]
            gap = NONE
    body = "".join(text).replace("\xa0", " ").strip("\n").rstrip()
    return body + "\n" if body else ""


def html_pieces(page: str) -> Iterator[tuple[int, str]]:
    """Yield the text of a page in pieces, each with the gap before it."""
    pos, pre = 0, False
    while pos < len(page):
        token: Any = TOKEN.match(page, pos)
        pos, end, tag = token.end(), token["end"], (token["tag"] or "").lower()
        if token["text"]:
            yield from split_text(token["text"], pre)
        elif token[0] == "<!--":
            # "<!-->" is a whole comment.
            pos = find_end(COMMENT_END, page, pos - len("--"))
        else:
            pos = find_tag_end(page, pos)
            if tag in RAW and not end:
                pos = find_tag_end(page, find_end(RAW[tag], page, pos))
            bullet = BULLET if tag == "li" and not end else ""
            yield TAG_GAPS.get(tag, NONE), bullet
            if tag == "pre":
                pre = not end


def split_text(text: str, pre: bool) -> Iterator[tuple[int, str]]:
    """Yield a text without needless space; in <pre> its lines and spaces."""
    text = html.unescape(text)
    if pre:
        *lines, text = re.split("\r\n?|\n", text)
        for line in lines:
            yield NONE, line.rstrip()
            yield BREAK, ""
        yield NONE, text
    else:
        text = re.sub("[ \t\n\r\f]+", " ", text)
        yield SPACE if text.startswith(" ") else NONE, text.strip(" ")
        yield SPACE if text.endswith(" ") else NONE, ""


def find_end(regex: re.Pattern[str], page: str, pos: int) -> int:
    """Find the end of a match, or of the page."""
    while pos < len(page):
        found = regex.search(page, pos, pos + PIECE)
        if found:
            return found.end()
        pos += PIECE - 16       # more than what ends a comment or an element
    return len(page)


def find_tag_end(page: str, pos: int) -> int:
    """Find the end of a tag; a ">" in a quoted value does not end it."""
    while True:
        pos = find_end(TAG_STOP, page, pos)
        if pos == len(page) or page[pos - 1] == ">":
            return pos
        pos = page.find(page[pos - 1], pos) + 1 or len(page)


# ---- Connections: one deadline for address, connect, TLS and every byte -----

PORTS = {"http": 80, "https": 443}
AROUND = 131072     # bytes around a body: headers, sizes of chunks, trailers

# What a chroot hides is kept from before it, for reloads too.
known_addresses: dict[Any, list[Any]] = {}      # of hosts, by name


def find_addresses(host: Any) -> list[Any]:
    """Give the addresses of a host, known from before a chroot or found."""
    return known_addresses.get(host) or [
        target[0] for *_, target in socket.getaddrinfo(
            host, None, type=socket.SOCK_STREAM)]


def plain_failure(error: Exception) -> OSError:
    """Make a failure of the network an OSError, its reason in one line."""
    cause = getattr(error, "reason", None)
    error = cause if isinstance(cause, OSError) else error      # a URLError
    text: object = f"{type(error).__name__}: {error}"
    if isinstance(error, http.client.IncompleteRead):
        text = "the answer ended early"
    elif isinstance(error, OSError):
        text = error.strerror or error
    # socket.timeout is another class before Python 3.10.
    late = isinstance(error, (TimeoutError, socket.timeout))
    return (TimeoutError if late else OSError)(
        " ".join(str(text).split())[:500])


def dial(address, timeout, source=None):
    """Connect as socket.create_connection does, with one deadline."""
    deadline = time.monotonic() + timeout
    hosts = [*find_addresses(address[0])]
    while True:
        # A share for each: a dead address must not starve the next.
        share = seconds_left(deadline) / len(hosts)
        try:
            sock = socket.create_connection((hosts.pop(0), address[1]), share)
            sock.settimeout(seconds_left(deadline))
            return sock
        except OSError:
            if not hosts:
                raise


class BoundedFile(io.RawIOBase):
    """What an origin sends, bounded in time and bytes, headers and all."""

    left = AROUND
    turn: Any = None        # a lock that is held, but not while waiting

    def __init__(self, sock, file, deadline):
        self.sock, self.file, self.deadline = sock, file, deadline

    def readable(self):
        return True

    def close(self):
        self.file.close()
        super().close()

    def readinto(self, buffer):
        if not self.left:
            raise OSError("headers, chunk sizes or trailers are too long")
        # A timeout of the socket alone starts again with each byte.
        self.sock.settimeout(seconds_left(self.deadline))
        if self.turn:
            self.turn.release()
        try:
            count = self.file.readinto(memoryview(buffer)[:self.left])
        finally:
            if self.turn:
                self.turn.acquire()
        self.left -= count
        # For the TLS handshake that may follow a proxy's answer.
        self.sock.settimeout(seconds_left(self.deadline))
        return count


class BoundedHandler(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """urllib's handler of http and https, what it reads bounded."""

    def do_open(self, http_class, req, **options):
        deadline = time.monotonic() + req.timeout

        def respond(sock, **options):
            response = http.client.HTTPResponse(sock, **options)
            response.fp = io.BufferedReader(BoundedFile(
                sock, response.fp.detach(), deadline), READ_SIZE)
            return response

        def connect(host, **options):
            connection = http_class(host, **options)
            connection._create_connection = dial
            connection.response_class = respond
            return connection

        return super().do_open(connect, req, **options)


# ---- web --------------------------------------------------------------------

MAX_CACHE = 64 << 20    # bytes of pages in a cache, if all are max_output long
MAX_REDIRECTS = 5       # between an old address of a page and its newest
WEB_URL = re.compile(r"https?://(?:[\w.-]+|\[[\da-fA-F:.]+\])"
                     r"(?::(?P<port>\d{1,5}))?(?:[/?][!-\"$-~]*)?", re.ASCII)
TEXT_TYPE = re.compile(r"text/.*|application/(.*\+)?(json|xml|yaml)")


def choose_template(url: str, prefix: str) -> str:
    """Make the one URL, with {user} in it, of the two settings."""
    refuse(bool(url) == bool(prefix) and "url: write either url or prefix,"
           " e.g. url = https://example.org/~{user}")
    return check_url("url" if url else "prefix", url or prefix)


def check_url(setting: str, text: str) -> str:
    """Check a URL of the config: http or https, and a host of its own."""
    url = text + "{user}" if setting == "prefix" else text
    found = WEB_URL.fullmatch(url)
    users = url.count("{user}")
    if not found or not 0 < int(found["port"] or 80) < 65536:
        text = re.sub("//.*@", "//...@", text)      # it may be a password
        wrong = "is not a web address; write https://host/path"
    elif climbs(url):
        wrong = 'has a "." or ".." segment; write the path without'
    elif users > {"index": 0, "prefix": 1}.get(setting, users):
        wrong = "has a {user} that has no place here; leave it out"
    elif not users and setting != "index":
        wrong = "has no place for the name; write {user} in its path"
    else:
        return url
    raise ValueError(f'{setting}: "{text}" {wrong}')


def climbs(url: str) -> bool:
    """Report whether some server might see a "." or ".." segment in url."""
    # Twice: servers differ in when, and how often, they decode.
    path = unquote(unquote(urlsplit(url).path))
    return not {".", ".."}.isdisjoint(re.split(r"[/\\;]", path))


class Page:
    """An answer, and the lock of the thread that fetches it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.answer: str | OSError | None = None    # None: no such user
        self.until = 0.0            # good for all who ask before
        self.stale_until = 0.0      # good until then if a new one fails


class WebBackend:
    """Answers with a page, fetched from a fixed host and turned into text.

    A redirect may go from http to https, never back, to the same host or one
    of redirect_hosts, to the port usual for its scheme or that of the config.
    The proxies of the environment are used.
    """

    waits = True
    # For one page at a time to become text: the server waits for each thread
    # that wants to run.
    turn = threading.Lock()
    tls: Any = None             # in a chroot, which hides the certificates
    settings = (
        ("url", "text", "", "page of a user: https://example.org/~{user}"),
        ("prefix", "text", "", "the same in short, the name is appended"),
        ("index", "text", "", "page that answers the user list, if any"),
        ("pattern", "text", r"\w[\w.+-]{0,63}", "what a whole name matches"),
        ("max_output", "size", "256K", "bytes that are read of a page"),
        ("cache", "period", "60", "seconds that an answer is kept"),
        ("stale", "period", "3600", "seconds more when the origin fails"),
        ("redirect_hosts", "hosts", "", "to which redirects may lead, too"),
    )

    def __init__(self, options, report):
        self.template, self.index, self.pattern = check_all(
            lambda: choose_template(options["url"], options["prefix"]),
            lambda: options["index"] and check_url("index", options["index"]),
            lambda: compile_pattern(options["pattern"]))
        self.options, self.report = options, report
        self.lock = threading.Lock()
        self.find_page = functools.lru_cache(
            max(1, MAX_CACHE // options["max_output"]))(lambda url: Page())
        self.opener = urllib.request.OpenerDirector()   # follows no redirect
        self.opener.addheaders = [
            ("User-Agent", "fingerd/" + __version__),
            ("Accept", "text/plain, text/html;q=0.9, text/*;q=0.8")]
        self.opener.add_handler(urllib.request.ProxyHandler())
        self.context = self.tls or ssl.create_default_context()
        self.opener.add_handler(BoundedHandler(context=self.context))
        # Later they may be out of reach.
        for name in {*CODECS.values(), "utf_8_sig", "idna"}:
            codecs.lookup(name)

    def enter_chroot(self, path: str) -> None:
        """Look the hosts up and load the certificates, while we can."""
        hosts = {name: urlsplit(self.options[name]).hostname
                 for name in ("url", "prefix", "index") if self.options[name]}
        proxies = [urlsplit(url if "//" in url else f"//{url}").hostname
                   for scheme, url in urllib.request.getproxies().items()
                   if scheme in PORTS]
        for host in [*hosts.values(), *proxies,
                     *self.options["redirect_hosts"]]:
            with contextlib.suppress(OSError):
                known_addresses[host] = find_addresses(host)
        refuse(*(f"{name}: no address of {host} is found, nor will be in the"
                 " chroot; write an address instead of the name"
                 for name, host in hosts.items()
                 if host not in known_addresses))
        folder = ssl.get_default_verify_paths().capath
        for name in os.listdir(folder) if folder else ():
            with contextlib.suppress(OSError):      # SSLError is one
                self.context.load_verify_locations(f"{folder}/{name}")
        WebBackend.tls = self.context

    def lookup(self, user, verbose, client, timeout):
        """Give the text of the user's page; None: no such user."""
        url = self.template.replace("{user}", quote(user, safe=""))
        if not fits(self.pattern, user) or climbs(url):
            return None
        return self._answer(url, timeout)

    def user_list(self, verbose, client, timeout):
        """Give the text of the index page; None: it is not set."""
        if not self.index:
            return None
        text = self._answer(self.index, timeout)
        if text is None:
            raise OSError(f"GET {self.index}: there is no such page")
        return text

    def _answer(self, url, timeout):
        """Give the text of a page, fetched by one thread for all that ask."""
        asked = time.monotonic()
        with self.lock:
            page = self.find_page(url)
        if not page.lock.acquire(timeout=max(timeout, 0)):
            raise TimeoutError(f"GET {url}: timed out")
        try:
            if asked >= page.until:
                self._renew(page, url, asked + timeout)
            answer = page.answer
        finally:
            page.lock.release()
        if isinstance(answer, OSError):
            raise type(answer)(f"GET {url}: {answer}")
        return answer

    def _renew(self, page, url, deadline):
        """Fetch a page; when that fails, what is known of it may do."""
        stale = time.monotonic() < page.stale_until
        if stale:       # leave time to give it
            deadline -= (deadline - time.monotonic()) / 2
        try:
            page.answer = self._fetch(url, deadline)
            page.until = time.monotonic() + self.options["cache"]
            if self.options["cache"]:
                page.stale_until = page.until + self.options["stale"]
            return
        except (OSError, http.client.HTTPException, ValueError,
                OverflowError) as error:
            failure = plain_failure(error)
        if stale:
            self.report(f"an old answer is given: GET {url}: {failure}")
        else:
            page.answer = failure
            if isinstance(failure, TimeoutError):
                return          # others may have more time
        page.until = time.monotonic()

    def _fetch(self, url, deadline):
        """Get a page, by redirects if need be, as text; None: not there."""
        origin = url
        for _ in range(MAX_REDIRECTS + 1):
            response = self.opener.open(url, None, seconds_left(deadline))
            with response:
                if response.status not in (301, 302, 303, 307, 308):
                    return self._read(response)
                location = response.headers.get("Location", "")
            url = self._follow(origin, url, location)
        raise OSError(f"more than {MAX_REDIRECTS} redirects")

    def _follow(self, origin, url, location):
        """Check where a redirect leads."""
        # http.client reads headers as Latin 1.
        location = quote(location, "!#$%&'()*+,/:;=?@[]~", "latin-1")
        target = urljoin(url, location)
        first, parts = urlsplit(origin), urlsplit(target)
        hosts = {first.hostname, *self.options["redirect_hosts"]}
        ports = {PORTS.get(parts.scheme), first.port}
        if (parts.scheme not in PORTS or "@" in parts.netloc
                or (urlsplit(url).scheme == "https" != parts.scheme)
                or parts.hostname not in hosts
                or (parts.port or PORTS[parts.scheme]) not in ports):
            raise OSError(f'redirected to "{target}", which is not allowed')
        return target

    def _read(self, response):
        """Make text of a final response; None: no such page."""
        kind = response.headers.get_content_type()
        coding = response.headers.get("Content-Encoding", "").strip().lower()
        if response.status in (404, 410):
            return None
        if response.status != 200:
            raise OSError(f"{response.status} {response.reason}")
        if not TEXT_TYPE.fullmatch(kind):
            raise OSError(f'its type "{kind}" is not text')
        if coding not in ("", "identity"):
            raise OSError(f'its encoding "{coding}" was not asked for')
        limit, is_html = self.options["max_output"], "html" in kind
        with self.turn:
            response.fp.raw.turn = self.turn
            response.fp.raw.left += limit
            body = bytearray(limit + 1)     # read() keeps a list of chunks
            del body[response.readinto(body):]
            if response.length and len(body) <= limit:
                raise http.client.IncompleteRead(bytes(body))
            codec = choose_codec(response.headers.get("Content-Type", ""),
                                 body, is_html)
            return make_text(body, codec, limit, html_text if is_html else str)


# ---- Files as an enemy wrote them -------------------------------------------

MAX_FILE = 100 * 1024   # bytes that are read of a file, in one piece
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


def read_file(folder, name, owner=None, limit=MAX_FILE):
    """Give the text of a regular file, of an owner if given; else None."""
    try:
        fd = os.open(name.encode(), FILE_FLAGS, dir_fd=folder)
        try:
            info = os.fstat(fd)
            if stat.S_ISREG(info.st_mode) and owner in (None, info.st_uid):
                return make_text(os.read(fd, limit + 1), "utf-8", limit)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno not in ABSENT:
            raise
    return None


# ---- files ------------------------------------------------------------------

MAX_LISTED = 10_000     # files that a list opens: more than a reply ever holds
FILE_NAME = re.compile(rf"(?!(?i:.*\.txt)$){PLAIN_NAME.pattern}")


class FilesBackend:
    """Answers with a text file of a directory, read at each query."""

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
               " directory; write e.g. index.txt")

    def lookup(self, user, verbose, client, timeout):
        """Give the text of a user's file; None: no such user."""
        if not FILE_NAME.fullmatch(user):
            return None
        files = [name + end for name in dict.fromkeys((user, user.lower()))
                 for end in ("", ".txt")]
        folder = os.open(self.directory, FOLDER_FLAGS)
        try:
            texts = (read_file(folder, file) for file in files
                     if file.lower() != self.index.lower())
            return next((text for text in texts if text is not None), None)
        finally:
            os.close(folder)

    def user_list(self, verbose, client, timeout):
        """Give the index, or a list of first lines; None: neither is set."""
        if not self.index and not self.listed:
            return None
        deadline = time.monotonic() + timeout
        lines: dict = {}
        folder = os.open(self.directory, FOLDER_FLAGS)
        try:
            if self.index:
                text = read_file(folder, self.index)
                if text is None:
                    raise OSError(f"{self.directory} has no file {self.index}")
                return text
            for file in sorted(os.listdir(self.directory)):
                name = file[:-len(".txt")] if file.endswith(".txt") else file
                if (FILE_NAME.fullmatch(name) and name not in lines
                        and len(lines) < MAX_LISTED):
                    seconds_left(deadline)
                    text = read_file(folder, file, limit=1000)
                    if text is not None:
                        lines[name] = text.partition("\n")[0]
        finally:
            os.close(folder)
        width = max(map(len, lines), default=0)
        return "".join(f"{name:{width}}  {line}\n"
                       for name, line in lines.items())


# ---- sql --------------------------------------------------------------------

MAX_ROWS = 10_000       # that are read of a result: more than a reply holds
# How a module wants its parameter written: its paramstyle (PEP 249).
MARKS = {"qmark": "?", "format": "%s", "pyformat": "%s", "numeric": ":1",
         "named": ":name"}
CONNECT_WORD = re.compile(r"""\s*([A-Za-z_]\w*)=
    (?: (["'])(.*?)\2 | ([^\s"']\S*)? ) (?!\S)""", re.VERBOSE | re.DOTALL)


def format_rows(columns, rows):
    """Give a line for each value that is not NULL; None if there is none."""
    lines = []
    for column, value in itertools.chain(*(zip(columns, row) for row in rows)):
        text = value
        if isinstance(value, (bytes, bytearray, memoryview)):
            text = make_text(bytes(value), "utf-8", MAX_FILE)
        if value is not None:
            name = f"{column}: " if len(columns) > 1 else ""
            lines.append(f"{name}{text}".rstrip("\n") + "\n")
    return "".join(lines) or None


class SqlBackend:
    """Answers with what a database has of a name, by any DB-API 2 module.

    Nothing found is no such user.  A file is opened for each query: another
    may have been put into its place.
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
        database, name, connect, self.query, self.list_query = (
            options[row[0]] for row in self.settings)
        try:
            self.module = importlib.import_module(name)
            if not self.module.threadsafety:
                raise TypeError("threads may not use it")
            mark = MARKS[self.module.paramstyle]
        except Exception as error:      # importing may do anything
            reason = " ".join(str(error).split())
            raise ValueError(f'module: "{name}" cannot be used ({reason});'
                             " install a DB-API 2 module, or write sqlite3"
                             ) from None
        self.sqlite = name == "sqlite3"
        refuse(self.sqlite != bool(database)
               and "database: is for module = sqlite3, which needs it; write"
               " e.g. /srv/people.db, or connect for another module",
               connect and self.sqlite
               and "connect: is for other modules; write database",
               # The text is not shown: a password may be in it.
               CONNECT_WORD.sub("", connect).strip()
               and "connect: is not made of name=value words; write e.g."
               " dbname=people password='with spaces'",
               self.query.count(mark) != 1 and f"query: does not have {mark}"
               " once; write it where the name goes, and nowhere else")
        file = {"database": f"file:{quote(database)}?mode=ro", "uri": True}
        self.arguments = file if self.sqlite else {
            name: int(plain) if re.fullmatch("-?[0-9]+", plain)
            else quoted or plain
            for name, _, quoted, plain in CONNECT_WORD.findall(connect)}

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
            if self.sqlite:     # gives up in time, be it waiting or working
                wait = max(0, deadline - time.monotonic())
                connection.execute(
                    f"PRAGMA busy_timeout = {1000 * wait + 1:.0f}")
                connection.set_progress_handler(
                    lambda: time.monotonic() > deadline, 10_000)    # 0.2 ms
                connection.text_factory = bytes     # it may be no UTF-8
            with contextlib.closing(connection.cursor()) as cursor:
                cursor.execute(*query)
                columns = [column[0] for column in cursor.description or ()]
                text = format_rows(columns, cursor.fetchmany(MAX_ROWS))
            connection.rollback()
        except Exception as error:      # the module's, or what it lets through
            with contextlib.suppress(Exception):    # it may be dead, or None
                connection.close()
            late = time.monotonic() >= deadline
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            raise (TimeoutError if late else ConnectionError)(reason) from None
        if self.sqlite:
            connection.close()
        else:
            self.idle.append(connection)
        return text


# ---- accounts: lines as Debian's finger has them, byte for byte -------------

# What comes from a user's own files, and the words before it.
FILES = {"forward": "Mail forwarded to ", "mail": "", "pgpkey": "PGP key:\n",
         "project": "Project:\n", "plan": "Plan:\n"}
ITEMS = ("home", "shell", "office", "phone", "login", "from", "idle", *FILES)
SAME_TIME = 0.02        # seconds that an unknown user takes at least
HALF_YEAR = 365 * 86400 / 2     # seconds: an older login is shown with year
MAX_MATCHES = 8         # accounts of one real name: as names in a query
MATCH_TIME = 60         # seconds between two walks through all of passwd
# utmp(5) and lastlog(5) of glibc: their times have 32 bits, or 64.
WIDE = os.uname().machine in ("aarch64", "alpha", "ia64", "loongarch64")
UTMP = struct.Struct("=h6x32s4x32s256s8x" + ("4xI52x" if WIDE else "I40x"))
LASTLOG = struct.Struct("=I4x32s256s" if WIDE else "=I32s256s")
USER_PROCESS = 7        # the kind of record in utmp that is a login

Login = collections.namedtuple("Login", "since tty host name", defaults=[""])


def read_records(path, layout, first=0, size=-1):
    """Give the records of a system's file; None if we cannot see it."""
    try:
        with open(path, "rb") as file:
            file.seek(first * layout.size)
            data = file.read(size)
    except (FileNotFoundError, PermissionError):
        return None
    return [[field if isinstance(field, int) else
             field.partition(b"\0")[0].decode("utf-8", "backslashreplace")
             for field in record] for record in layout.iter_unpack(
                 data[:len(data) // layout.size * layout.size])]


def read_logins(path):
    """Give the Logins of utmp."""
    return [Login(since, tty, host, name) for kind, tty, name, host, since
            in read_records(path, UTMP) or () if kind == USER_PROCESS and name]


def split_gecos(entry):
    """Give full name, office, office phone and home phone of an account."""
    gecos = os.fsencode(entry.pw_gecos).decode("utf-8", "backslashreplace")
    fields = [*gecos[gecos.startswith("*"):].split(","), "", "", ""][:4]
    login = entry.pw_name[:1].upper() + entry.pw_name[1:]
    return [fields[0].replace("&", login), *fields[1:]]


def format_phone(number):
    """Put hyphens into a number that is digits only."""
    signs = {4: "x", 5: "x", 7: "", 10: "", 11: "+"}
    if len(number) not in signs or re.search("[^0-9]", number):
        return number
    parts = number[:-10], number[-10:-7], number[-7:-4], number[-4:]
    return signs[len(number)] + "-".join(filter(None, parts))


def format_office(office, phone, home_phone):
    """Give a line for each, or for two of them if they fit."""
    texts = [office and f"Office: {office}",
             phone and f"Office Phone: {format_phone(phone)}",
             home_phone and f"Home Phone: {format_phone(home_phone)}"]
    if office and phone and len(office) + len(phone) <= 31:
        texts[:2] = [f"Office: {office}, {format_phone(phone)}"]
    lines: list[str] = []
    half = 0            # length of the last line, if it has room
    for text in filter(None, texts):
        if half and max(48, half // 8 * 8 + 8) + len(text) <= 80:
            lines[-1] += "\t" * max(1, 5 - half // 8) + text
            half = 0
        else:
            lines.append(text)
            half = len(text)
    return lines


def format_time(seconds, year=""):
    return time.strftime(f"%a %b %e %R {year}(%Z)", time.localtime(seconds))


def format_idle(tty, indent):
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


def format_mail(path):
    """Report when mail came and was read; nothing if we may not see it."""
    try:
        info = os.stat(path)
    except PermissionError:
        return ""
    except OSError:
        return "No mail."
    came, read = int(info.st_mtime), int(info.st_atime)
    if not info.st_size:
        return "No mail."
    if came <= read:
        return f"Mail last read {format_time(read, '%Y ')}"
    return (f"New mail received {format_time(came, '%Y ')}\n"
            f"     Unread since {format_time(read, '%Y ')}")


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
        ("show_local", "text", "", "what clients in local are shown besides"),
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
               " write e.g. 1000-59999")
        self.uids = range(int(numbers[1]), int(numbers[2]) + 1)
        self.lock = threading.Lock()
        self.index_names = functools.lru_cache(maxsize=1)(self._index_names)

    def enter_chroot(self, path):
        raise ValueError("chroot: hides the accounts; leave one of them out")

    def lookup(self, user, verbose, client, timeout):
        """Give what is shown of the accounts of a name; None: no such user."""
        soonest = time.monotonic() + min(SAME_TIME, timeout)
        items = self._items(client)
        texts = {self._show(login, items): None for login in self._find(user)}
        text = "\n".join(filter(None, texts))
        if not text:
            time.sleep(max(0, soonest - time.monotonic()))
        return text or None

    def user_list(self, verbose, client, timeout):
        """Give who is logged in, for /W with all that is shown of each."""
        items = self._items(client)
        if "login" not in items:
            return None
        deadline = time.monotonic() + timeout
        logins, texts = read_logins(self.utmp), {}
        for login in logins:
            seconds_left(deadline)
            if login.name not in texts:
                texts[login.name] = self._show(login.name,
                                               items if verbose else ())
        logins = [login for login in logins if texts[login.name]]
        if not logins:
            return "No one logged on.\n"
        if verbose:
            return "\n".join(filter(None, texts.values()))
        lines = []
        for login in logins:
            name = texts[login.name].partition("Name: ")[2].strip()
            since = time.strftime("%b %e %R", time.localtime(login.since))
            lines.append(f"{login.name:14}  {name:24}  {since}\n")
        # rogallo makes a menu of a table with this first line.
        lines = [f"{'Login':14}  {'Name':24}  Login Time\n", *sorted(lines)]
        return "".join(lines)

    def _items(self, client):
        """Give what is shown to a client."""
        local = any(ipaddress.ip_address(client) in network
                    for network in self.options["local"])
        return self.show | self.show_local if local else self.show

    def _find(self, name):
        """Give the logins that a name may mean."""
        if not PLAIN_NAME.fullmatch(name):
            return []
        logins = [name, name.lower()]
        if self.options["match_names"]:
            with self.lock:     # a thread that waits finds it done
                names = self.index_names(time.monotonic() // MATCH_TIME)
            logins += names.get(name.lower(), [])[:MAX_MATCHES]
        return dict.fromkeys(logins)

    def _index_names(self, minute):
        """Give the logins of those with a word in their full names."""
        names: dict = {}
        for entry in self.passwd.getpwall():
            for word in split_gecos(entry)[0].lower().split():
                if entry.pw_uid in self.uids:
                    names.setdefault(word, []).append(entry.pw_name)
        return names

    def _show(self, login, items):
        """Give the lines of an account; None if there is none to be seen."""
        try:
            entry = self.passwd.getpwnam(login)
        except (KeyError, ValueError):
            return None
        if entry.pw_uid not in self.uids:
            return None
        try:
            home = os.open(entry.pw_dir, FOLDER_FLAGS)
            try:
                with contextlib.suppress(FileNotFoundError):
                    os.stat(self.options["hide_file"], dir_fd=home,
                            follow_symlinks=False)
                    return None
                if self.options["opt_in"] and read_file(
                        home, ".plan", entry.pw_uid) is None:
                    return None
                lines = self._lines(entry, home, items)
                return "".join(f"{line}\n" for line in lines if line)
            finally:
                os.close(home)
        except OSError as error:
            if error.errno not in ABSENT:
                raise
            return None         # the file may be there, and be out of sight

    def _lines(self, entry, home, items):
        """Yield the lines of an account; some may be empty."""
        name, *gecos = split_gecos(entry)
        yield f"Login: {entry.pw_name:15}\t\t\tName: {name}"
        yield "\t".join(text for item, text in (
            ("home", f"Directory: {entry.pw_dir:25}"),
            ("shell", f"Shell: {entry.pw_shell or '/bin/sh'}"))
            if item in items).rstrip(" ")
        yield from format_office(*(
            text if item in items else "" for text, item
            in zip(gecos, ("office", "phone", "phone"))))
        if "login" in items:
            yield from self._login_lines(entry, items)
        for item in filter(items.__contains__, FILES):
            if item == "mail":
                yield format_mail(self.mail + entry.pw_name)
                continue
            text = read_file(home, f".{item}", entry.pw_uid)
            if text is not None:
                yield FILES[item] + text[:len(text) - text.endswith("\n")]
            elif item == "plan":
                yield "No Plan."

    def _login_lines(self, entry, items):
        """Yield a line for each login, and for the last if it was later."""
        logins = [login for login in read_logins(self.utmp)
                  if login.name == entry.pw_name[:32]]
        records = read_records(self.lastlog, LASTLOG, entry.pw_uid,
                               LASTLOG.size)
        # It ends with the highest number that has ever logged in.
        last = Login(*(records or [(0, "", "")])[0])
        ttys = [login.tty for login in logins]
        if records is not None and not (logins and (
                last.tty in ttys or last.since <= min(logins).since)):
            logins.append(last)
        width = max((len(login.tty) for login in logins), default=0)
        for login in logins:
            place, idle = f" on {login.tty}", ""
            if login.host and "from" in items:
                place += f" from {login.host}"
            if login is not last:
                if "idle" in items:
                    idle = format_idle(login.tty, "\n" * (" from " in place)
                                       + " " * (width - len(login.tty) + 3))
                yield f"On since {format_time(login.since)}{place}{idle}"
            elif last.since:
                year = "%Y " * (time.time() - last.since >= HALF_YEAR)
                yield f"Last login {format_time(last.since, year)}{place}"
            else:
                yield "Never logged in."


BACKENDS = {"accounts": AccountsBackend, "files": FilesBackend,
            "finger": FingerBackend, "sql": SqlBackend, "web": WebBackend}
