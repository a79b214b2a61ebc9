#!/usr/bin/env python3
"""Tests of fingerd beside programs of other people: python3 .ci/others.py

They need root, and what .ci/run installs: finger, HAProxy, inetd, lynx, nmap,
nc, PostgreSQL, systemd, telnet, pg8000 and prometheus_client.
"""

from __future__ import annotations

import contextlib
import gc
import glob
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unittest
import warnings
from typing import Any, NamedTuple
from unittest import mock

import pg8000.dbapi
import prometheus_client.parser

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import fingerd
import fingerd_backends
from fingerd_backends import AccountsBackend, FingerBackend, SqlBackend
from test_fingerd import (
    ALL_ITEMS,
    DAY,
    FAILED,
    HANG,
    HAPPY,
    HERE,
    PROMPT,
    UNKNOWN,
    USERS,
    BackendCase,
    ServerCase,
    ask,
    config_file,
    connect,
    daemon,
    defaults,
    fingerd_command,
    free_port,
    in_threads,
    installed,
    pack_utmp,
    read_all,
    refused,
    run_python,
    wait_until,
    write_file,
)

HALF_YEAR = 365 * DAY // 2


class ClientsTest(ServerCase):
    """finger, lynx, nmap, telnet and nc, as people use them."""

    def run_client(self, *command, send=""):
        return subprocess.run(command, input=send, text=True,
                              timeout=3 * HANG, capture_output=True).stdout

    def serve_on_port_79(self):
        """Serve on the only port that finger and lynx ask; give the host."""
        host = f"127.79.{os.getpid() % 250 + 1}.1"      # parallel runs
        return self.serve(listen=f"{host}:79"), host

    def test_finger_gets_answers(self):
        server, host = self.serve_on_port_79()
        for args, answer in [
                ([f"moshez@{host}"], "Happy and well"),
                (["-l", f"moshez@{host}"], "Happy and well"),
                ([f"bob@{host}"], "No such user"),
                ([f"@{host}"], "Finger online user list denied")]:
            out = self.run_client("finger", *args)
            self.assertEqual(out.split("\n")[-2].rstrip(), answer)
        server.wait_log('q="/W moshez" outcome=answered')
        server.wait_log('q="" outcome=list-denied')

    def test_lynx_shows_answers(self):
        server, host = self.serve_on_port_79()
        for user in ("moshez", "moshez/w"):
            out = self.run_client("lynx", "-dump", f"finger://{host}/{user}")
            self.assertIn("Happy and well", out)
        server.wait_log('q="/[Ww] moshez"')

    def test_nmap_reads_the_answer_to_the_empty_query(self):
        # Its epoll engine misses an end of file that comes with the text.
        server = self.serve("[server]\nwelcome = Login Name\n" + USERS)
        host, port = map(str, server.address)
        out = self.run_client("nmap", "--nsock-engine", "poll", "-Pn", "-n",
                              "-p", port, "--script", "+finger", host)
        self.assertIn("Login Name", out)

    def test_telnet_gets_an_answer(self):
        server = self.serve()
        with subprocess.Popen(
                ["telnet", *map(str, server.address)], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                text=True) as client:
            client.stdin.write("moshez\n")
            client.stdin.flush()
            self.assertIn("Happy and well", client.stdout.read())

    def test_nc_gets_an_answer(self):
        host, port = map(str, self.serve().address)
        for send in ("moshez\r\n", "moshez\n", "moshez"):
            self.assertEqual(
                self.run_client("nc", "-N", "-w", "5", host, port, send=send),
                "Happy and well\n")


class ServiceManagerTest(unittest.TestCase):
    """The programs that open sockets for others."""

    def serves(self, port, command):
        """Start a program; does fingerd answer on its port?"""
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            try:
                wait_until(lambda: not refused(("127.0.0.1", port)), command)
                self.assertEqual(ask(("127.0.0.1", port), b"moshez\r\n"),
                                 HAPPY)
            finally:
                process.terminate()

    def test_serves_a_socket_of_systemd(self):
        port = free_port()
        with config_file(USERS) as path:
            self.serves(port, ["systemd-socket-activate", "-l",
                               f"127.0.0.1:{port}",
                               *fingerd_command("--config", path)])

    def test_serves_for_inetd(self):
        port = free_port()
        with config_file(USERS) as path:
            folder = os.path.dirname(path)
            command = fingerd_command("--config", path, "--inetd")
            script = write_file(folder, "run",
                                f"#!/bin/sh\nexec {shlex.join(command)}\n")
            os.chmod(script, 0o755)
            table = write_file(
                folder, "inetd.conf",
                f"127.0.0.1:{port} stream tcp nowait root {script} fingerd\n")
            self.serves(port, ["/usr/sbin/inetd", "-i", table])


class RealFingerTest(BackendCase):
    """Beside Debian's finger, in a chroot with accounts of every kind."""

    TZ = "CET-1CEST,M3.5.0,M10.5.0/3"
    PEOPLE = {      # full name and so on, and files in the home
        "u01": ("Alice Liddell", {"plan": "Multi\nline\nplan\n"}),
        "u02": ("", {"plan": "no newline"}),
        "u03": ("Bob,Room 5,5551234,5556789", {"plan": ""}),
        "u04": ("& Smith,R & D,12345,1234", {"project": "one\ntwo\n"}),
        "u05": ("*Star,,,12345678901",
                {"pgpkey": "KEY\n", "project": "p", "plan": "x\n\n"}),
        "u06": ("Name,,555", {"forward": "other@example.org\n"}),
        "u07": ("Name,,,home", {"forward": "a\nb"}),
        "u08": (",office only", {"plan": "tab\tESC \x1b[2J DEL \x7f\n"}),
        "u09": ("Name,Off,+49 30 1234,1234567890,other", {}),
        "u10": ("&&& x&", {"project": "", "pgpkey": "\n"}),
        "u11": (" lead, space ,1 2, 3 ", {}),
        "u12": ("Office,An office that has a very very long name indeed,"
                "1234567,7654321", {}),
        "u13": ("X,123456789012345678901234567890,1234567", {}),
        "z": ("*", {}), "u15": ("N,o,123456,12345678", {}),
        "u16": ("tab\there", {}), "u17": (",,,", {}),
        "u18": ("N,,5551234567", {}),
        "u19": ("N,of 21 characters here,1234567890", {}),
        "u20": ("N,of 22 characters here.,1234567890,1", {}),
        "averyveryverylongname21": ("Long Login", {}),
        **{f"r{size}": (f"N,{'o' * size},{'1' * (size % 13)},"
                        f"{'h' * (93 - size)}", {}) for size in range(1, 75)},
        **{f"s{size}": (f"N,{'o' * (size + 33)},,{'h' * (36 - size)}", {})
           for size in range(30)},
    }
    TTYS = {        # seconds idle, and mode; no minute ends while we ask
        "tty1": (3665, 0o620), "pts/0": (-100, 0o600), "tty22": (-100, 0o620),
        "pts/1": (3 * 90000 + 300, 0o621), "pts/2": (65, 0o600),
        "pts/5": (DAY + 7500, 0o420),
        "pts/3": (400 * DAY + 5, 0o620), "pts/4": (365 * DAY + 65, 0o622),
    }
    UTMP = (        # user, terminal, host, seconds ago, and kind
        ("u01", "tty1", "", DAY), ("u01", "pts/0", "host.example.org", 100),
        ("u01", "pts/1", "192.0.2.1", 300 * DAY), ("u03", "pts/2", "", 50),
        ("u03", ":0", ":0", 5000), ("u05", ":1", "", 60),
        ("u06", "pts/2", "", 60, 8), ("", "pts/2", "", 0),
        ("averyveryverylongname21", "pts/3", "long.host." * 9, 60),
        ("u07", "pts/1", "h", 200 * DAY), ("u08", "tty22", "", 5),
        ("u09", "pts/4", "x", 400 * DAY), ("z", "pts/5", "", DAY))
    LASTLOG = {     # terminal, host, seconds ago
        "u01": ("tty1", "", 50), "u02": ("pts/7", "x.org", 2 * DAY),
        "u03": ("pts/8", "later", 10), "u04": ("tty9", "", 190 * DAY),
        "u07": ("pts/4", "foo", 100 * DAY), "u08": ("x", "", 5),
        "u09": ("a", "b", 401 * DAY),
        "u10": ("pts/4", "", HALF_YEAR - 60), "u11": ("x", "", HALF_YEAR + 60)}
    MAIL = {        # bytes, and seconds ago that it was read and that it came
        "u01": (5, 100, 50), "u02": (0, 1, 1), "u03": (5, 50, 100),
        "u04": (5, 300 * DAY, 299 * DAY), "u05": (5, 77, 77)}

    def setUp(self):
        super().setUp()
        self.now = int(time.time())
        self.root = os.path.join(self.folder, "root")
        program: Any = shutil.which("finger")
        libraries = re.findall(r"/\S+", subprocess.run(
            ["ldd", program], capture_output=True, text=True).stdout)
        for path in (program, *libraries):
            os.makedirs(os.path.dirname(self.root + path), exist_ok=True)
            shutil.copy(path, self.root + path)
        for path in ("etc", "home", "var/run", "var/log", "var/mail",
                     "dev/pts"):
            os.makedirs(os.path.join(self.root, path), exist_ok=True)
        os.chmod(self.folder, 0o755)
        self.make_accounts()
        self.make_logins()

    def make_accounts(self):
        lines = ["root:x:0:0:root:/root:/bin/sh"]
        for uid, (name, (gecos, files)) in enumerate(self.PEOPLE.items(),
                                                     1000):
            home = os.path.join(self.root, "home", name)
            os.mkdir(home)
            for file, text in files.items():
                os.chown(write_file(home, "." + file, text), uid, uid)
            os.chmod(home, 0o711)
            shell = "/usr/local/bin/rc" if uid % 3 else ""
            lines.append(f"{name}:x:{uid}:1000:{gecos}:/home/{name}:{shell}")
        write_file(self.root, "etc/passwd", "\n".join(lines) + "\n")
        for name, (size, read, came) in self.MAIL.items():
            path = write_file(self.root, "var/mail/" + name, "x" * size)
            os.utime(path, (self.now - read, self.now - came))
            os.chmod(path, 0o600)

    def make_logins(self):
        write_file(self.root, "var/run/utmp", b"".join(
            pack_utmp(name, tty, host, self.now - ago, *kind)
            for name, tty, host, ago, *kind in self.UTMP))
        layout = fingerd_backends.LASTLOG
        uids = {name: 1000 + n for n, name in enumerate(self.PEOPLE)}
        with open(os.path.join(self.root, "var/log/lastlog"), "wb") as file:
            for name, (tty, host, ago) in self.LASTLOG.items():
                file.seek(uids[name] * layout.size)
                file.write(layout.pack(self.now - ago, tty.encode(),
                                       host.encode()))
        for tty, (idle, mode) in self.TTYS.items():
            path = write_file(self.root, "dev/" + tty)
            os.utime(path, (self.now - idle, self.now - idle))
            os.chmod(path, mode)

    def finger(self, *words):
        return subprocess.run(
            ["chroot", self.root, "finger", *words],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=HANG,
            env=dict(os.environ, TZ=self.TZ, LC_ALL="C")).stdout

    def answers(self, **options):
        """Give what the backend says of each, asked by nobody in there."""
        options = {**defaults(AccountsBackend), **options}
        self.enter(mock.patch.dict(os.environ, TZ=self.TZ))
        return json.loads(run_python(self, """\
            import json, os, sys
            import fingerd_backends
            root, options, nobody, *names = sys.argv[1:]
            os.chroot(root)
            os.chdir("/")
            os.setgid(int(nobody))
            os.setuid(int(nobody))
            backend = fingerd_backends.AccountsBackend(
                json.loads(options), print)
            print(json.dumps([*(backend.lookup(name, False, "::1", 10)
                                for name in names),
                              backend.user_list(True, "::1", 10)]))
            """, self.root, json.dumps(options), "65534", *self.PEOPLE))

    def test_says_the_same_byte_for_byte(self):
        def seconds(text):      # they pass while we ask
            return re.sub(rb"\d+ seconds", b"N seconds", text)
        answers = self.answers(show=ALL_ITEMS)
        people = [[name] for name in self.PEOPLE]
        for names, answer in zip([*people, []], answers):
            text = seconds(self.finger("-l", *names))
            with self.subTest(names):
                if names:       # /W changes nothing
                    self.assertEqual(seconds(self.finger(*names)), text)
                self.assertIn(b"Name: ", text)
                self.assertEqual(seconds(fingerd.to_wire(answer)),
                                 text.replace(b"\n", b"\r\n"))
        self.assertGreater(len(self.PEOPLE), 20)

    def test_is_what_the_finger_backend_expects(self):
        backend = self.make(FingerBackend)
        for verbose in (False, True):
            self.assertIsNone(self.ask(backend, "no-such-user", verbose))
            self.assertRegex(self.ask(backend, "root", verbose),
                             r"^Login: root\b")
        self.assertLessEqual({text[:6] for text in self.reports}, {"debug:"})


class Answered(NamedTuple):
    """A query: when it was asked, by whom, and its answer."""

    began: float
    ended: float
    client: tuple[str, int]
    reply: bytes


class FleetCase(BackendCase):
    """Starts daemons and HAProxy as the README has them."""

    def readme(self, start):
        """Give the part of the README's chapter that begins so."""
        chapter = (HERE / "README").read_text().partition(
            "\nMore than one machine\n")[2]
        part = re.search(rf"(?m)^    {re.escape(start)}\n(    .*\n)+", chapter)
        return textwrap.dedent(part[0])

    def start_daemon(self, text, host, port=0):
        program = self.enter(installed(text))
        program.serve("--listen", f"{host}:{port}")
        self.assertEqual(program.address[0], host)
        return program

    def start_haproxy(self, text, *addresses):
        """Run it in front of these addresses; give its own, and it."""
        servers = iter(addresses)
        text = re.sub(r"192\.0\.2\.1[123]:79",
                      lambda match: "{}:{}".format(*next(servers)), text)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            path = self.enter(config_file(
                text.replace("*:79", f"fd@{listener.fileno()}")))
            process = subprocess.Popen(
                ["haproxy", "-db", "-f", path], stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                pass_fds=[listener.fileno()])
            self.addCleanup(process.wait)
            self.addCleanup(process.kill)
            return listener.getsockname(), process

    def ask_from(self, host, address, query=b"moshez\r\n"):
        """Ask from an address; give an Answered, b"" if there is none."""
        began, reply, client = time.monotonic(), b"", ("", 0)
        with contextlib.suppress(OSError), connect(address, host) as sock:
            client = sock.getsockname()
            sock.sendall(query)
            reply = read_all(sock)
        return Answered(began, time.monotonic(), client, reply)

    def clients(self, *programs):
        """Give the clients in their logs, less the checks of HAProxy."""
        lines = [line for program in programs for line in program.log()
                 if " q=" in line and 'q="ping"' not in line]
        return [(host, int(port)) for host, port in re.findall(
            r"client=(\S+) port=(\d+) q=", "\n".join(lines))]


class FleetTest(FleetCase):
    """Several daemons behind the real HAProxy."""

    CONFIG = "[server]\nproxy_from = 127.0.0.1\n" + USERS + "ping = pong\n"

    def test_a_daemon_is_killed_under_load_and_started_again(self):
        for header in ("send-proxy", "send-proxy-v2"):
            with self.subTest(header):
                self.kill_under_load(header)

    def kill_under_load(self, header):
        one, two = [self.start_daemon(self.CONFIG, host)
                    for host in ("127.0.0.11", "127.0.0.12")]
        text = self.readme("listen finger").replace("send-proxy-v2", header)
        address, _ = self.start_haproxy(re.sub(".*three.*", "", text),
                                        one.address, two.address)
        for program in (one, two):
            program.wait_log('client=127.0.0.1 .*q="ping" outcome=answered')
        done: list[Answered] = []
        stop = threading.Event()

        def load(host):
            while not stop.is_set():
                done.append(self.ask_from(host, address))

        def wait_for_more():
            wanted = len(done) + 100
            wait_until(lambda: len(done) > wanted, "more queries")

        threads = [threading.Thread(target=load, args=(f"127.0.0.{n}",))
                   for n in range(21, 25)]
        for thread in threads:
            thread.start()
        try:
            wait_for_more()
            kill = time.monotonic()
            host, port = two.address
            two.stop(signal.SIGKILL)
            killed = time.monotonic()
            wait_for_more()
            again = self.start_daemon(self.CONFIG, host, port)
            again.wait_log('q="moshez" outcome=answered', 20)
            wait_for_more()
        finally:
            stop.set()
            for thread in threads:
                thread.join(HANG)
        self.check(done, kill, killed, one, two, again)

    def check(self, done, kill, killed, *programs):
        """Check that only queries in flight are lost, and all addresses."""
        for query in done:
            if query.reply or not (query.began < killed
                                   and query.ended > kill):
                self.assertEqual(query.reply, HAPPY, query)

        def missing():
            logged = set(self.clients(*programs))
            self.assertEqual(logged - {query.client for query in done}, set())
            return [query for query in done if query.client not in logged]
        wait_until(lambda: all(query.began < killed for query in missing()),
                   "the last queries in the log")
        self.assertLess(len(missing()), 9)  # two of each thread at most

    def test_limits_and_deny_see_the_client_and_no_health_check(self):
        text = self.CONFIG.replace("\n", "\ndeny = 127.0.0.1 127.0.0.22\n", 1)
        program = self.start_daemon(
            text + "[limits]\nqueries_per_minute = 1\n", "127.0.0.11")
        address, _ = self.start_haproxy(
            re.sub(".*(two|three).*", "", self.readme("listen finger"))
            .replace(" check ", " check inter 20 fall 99 "), program.address)
        program.wait_log('client=127.0.0.1 .*q="ping" outcome=answered', 3)
        for host, reply in (
                ("127.0.0.21", HAPPY), ("127.0.0.22", b"Access denied\r\n"),
                ("127.0.0.21", b"Too many queries, try again later\r\n")):
            self.assertEqual(self.ask_from(host, address).reply, reply)
        for line in program.log():
            if 'q="ping"' in line:
                self.assertRegex(line, "outcome=(answered|gone)")


class PostgresTest(FleetCase):
    """With a real PostgreSQL, and pg8000."""

    @classmethod
    def setUpClass(cls):
        folder = tempfile.mkdtemp(prefix="fingerd-test-")
        cls.addClassCleanup(shutil.rmtree, folder)
        shutil.chown(folder, "postgres")    # it refuses to be run by root
        cls.data = os.path.join(folder, "data")
        with socket.create_server(("127.0.0.1", 0)) as sock:
            cls.port = sock.getsockname()[1]
        cls.run_program("initdb", "-A", "trust", "-U", "tester", "--no-sync",
                        "--no-locale", "-E", "UTF8", "-D", cls.data).wait()
        cls.start()
        cls.addClassCleanup(lambda: cls.end(signal.SIGQUIT))
        people = """
            CREATE TABLE people (name text PRIMARY KEY, text text);
            INSERT INTO people VALUES ('carol', 'I am Carol.');
            """
        for database, text in (
                ("postgres", "CREATE ROLE finger LOGIN"),
                ("postgres", "CREATE DATABASE people"),
                ("people", people + "GRANT SELECT ON people TO finger;"),
                ("postgres", people + """
            CREATE VIEW known AS SELECT * FROM people
                UNION ALL SELECT 'broken', (1 / (random() * 0)::int)::text;
            """)):
            assert cls.run_sql(text, database)

    @classmethod
    def run_program(cls, name, *args):
        """Start one of PostgreSQL's programs."""
        path, = glob.glob(f"/usr/lib/postgresql/*/bin/{name}")
        return subprocess.Popen(
            ["setpriv", "--reuid=postgres", "--regid=postgres",
             "--clear-groups", path, *args], cwd="/",
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    @classmethod
    def run_sql(cls, text, database="postgres"):
        """Run a script; report whether all of it was done."""
        return not cls.run_program(
            "psql", "-h", "127.0.0.1", "-p", str(cls.port), "-U", "tester",
            "-v", "ON_ERROR_STOP=1", "-d", database, "-c", text).wait()

    @classmethod
    def start(cls):
        """Start it, once what is left of one that was killed has ended."""
        def started():
            cls.process = cls.run_program(
                "postgres", "-F", "-D", cls.data, "-k", cls.data, "-p",
                str(cls.port), "-c", "listen_addresses=127.0.0.1")
            while cls.process.poll() is None:
                if cls.run_sql("SELECT 1"):
                    return True
            return False
        wait_until(started, "PostgreSQL")

    @classmethod
    def end(cls, number):
        cls.process.send_signal(number)
        cls.process.wait(HANG)

    def setUp(self):
        super().setUp()
        self.addCleanup(gc.collect)
        # pg8000 does not close what the server has closed.
        self.enter(warnings.catch_warnings())
        warnings.simplefilter("ignore", ResourceWarning)

    def options(self, **options):
        return {"module": "pg8000.dbapi", "connect": "host=127.0.0.1"
                f" port={self.port} user=tester database=postgres",
                "query": "SELECT text FROM people WHERE name = %s", **options}

    def daemon(self, timeout=HANG, **options):
        lines = [f"{name} = {value}\n" for name, value
                 in self.options(**options).items()]
        return daemon("[server]\nbackend = users sql\n[limits]\ntimeout ="
                      f" {timeout}\n[sql]\n" + "".join(lines) + USERS)

    def test_answers_and_fails_as_every_backend(self):
        backend = self.make(SqlBackend, **self.options(
            query="SELECT text FROM known WHERE name = %s",
            list_query="SELECT name, 1 AS n FROM people"))
        for name in ("' OR ''='", "%", "%s", "Gr\xfc\xdfe", "bob"):
            self.assertIsNone(self.ask(backend, name))
        results = in_threads([
            lambda: self.ask(backend, "carol"),
            lambda: self.ask(backend, "broken"),
            lambda: self.list(backend)] * 4)
        self.assertEqual(results[::3], ["I am Carol.\n"] * 4)
        self.assertEqual(results[2::3], ["name: carol\nn: 1\n"] * 4)
        for error in results[1::3]:
            self.assertIs(type(error).__module__, "builtins")
            self.assertIn("division by zero", str(error))

    def test_leaves_nothing_behind_in_the_database(self):
        backend = self.make(SqlBackend, **self.options(
            query="INSERT INTO people VALUES (%s, 'x') RETURNING 'inserted'"))
        for _ in range(3):
            self.assertEqual(self.ask(backend, "eve"), "inserted\n")
        backend = self.make(SqlBackend, **self.options())
        self.assertIsNone(self.ask(backend, "eve"))

    def check_hang(self, server, stop, go_on):
        """Check that a query ends while its source hangs."""
        def ask_carol():
            return ask(server.address, b"carol\r\n")
        wait_until(lambda: ask_carol() == b"I am Carol.\r\n", "an answer")
        stop()
        with self.takes(1, 1 + PROMPT):
            self.assertEqual(ask_carol(), FAILED)
        self.assertEqual(ask(server.address, b"moshez\r\n"), HAPPY)
        go_on()
        wait_until(lambda: ask_carol() == b"I am Carol.\r\n", "an answer")

    def test_the_deadline_holds_while_it_hangs(self):
        with self.daemon(1) as server, contextlib.closing(
                pg8000.dbapi.connect("tester", "127.0.0.1", "postgres",
                                     self.port)) as other:
            self.check_hang(
                server, lambda: other.cursor().execute("LOCK people"),
                other.rollback)

    def test_the_deadline_holds_while_the_network_is_gone(self):
        (_, port), relay = self.start_haproxy(
            "listen postgres\n    bind *:79\n    server one 192.0.2.11:79\n",
            ("127.0.0.1", self.port))
        connect = self.options()["connect"].replace(str(self.port), str(port))
        with self.daemon(1, connect=connect) as server:
            self.check_hang(server, lambda: relay.send_signal(signal.SIGSTOP),
                            lambda: relay.send_signal(signal.SIGCONT))

    def test_the_first_query_after_it_was_killed_is_answered(self):
        known = b"I am Carol.\r\n"
        for number in (signal.SIGINT, signal.SIGKILL):
            with self.subTest(number=number), self.daemon() as server:
                replies: set[bytes] = set()
                done = threading.Event()

                def ask_carol(server=server):
                    return ask(server.address, b"carol\r\n")

                def ask_on(done=done, replies=replies, ask_carol=ask_carol):
                    while not done.is_set():
                        replies.add(ask_carol())

                def kill(done=done, number=number, ask_carol=ask_carol):
                    ask_carol()
                    self.end(number)
                    failed = ask_carol()
                    self.start()
                    answers = {ask_carol() for _ in range(20)}
                    done.set()
                    return failed, answers

                results = in_threads([kill] + [ask_on] * 4)
                self.assertEqual(results, [(FAILED, {known}), *[None] * 4])
                self.assertEqual(replies, {known, FAILED})

    def test_the_readme_chapter_works_as_it_is(self):
        text = self.readme("[server]")
        for old, new in (("192.0.2.20", f"127.0.0.1 port={self.port}"),
                         ("192.0.2.10", "127.0.0.1"),
                         ("/var/lib/prometheus/node-exporter", self.folder)):
            self.assertIn(old, text)
            text = text.replace(old, new)
        os.chmod(self.folder, 0o777)
        programs = [self.start_daemon(
            text.replace("fingerd.prom", f"{number}.prom"),
            f"127.0.0.{10 + number}") for number in (1, 2, 3)]
        address, _ = self.start_haproxy(
            self.readme("listen finger"),
            *[program.address for program in programs])
        asked = set()
        for number in range(12):
            for query, reply in ((b"carol\r\n", b"I am Carol.\r\n"),
                                 (b"nobody\r\n", UNKNOWN)):
                got = self.ask_from(f"127.0.0.{21 + number}", address, query)
                self.assertEqual(got.reply, reply)
                asked.add(got.client)
        for program in programs:
            program.wait_log('client=127.0.0.1 .*q="ping" outcome=answered')
            self.assertTrue(self.clients(program))
        wait_until(lambda: set(self.clients(*programs)) == asked, "the logs")
        answered = []
        for program, path in zip(programs, sorted(
                pathlib.Path(self.folder).glob("*.prom"))):
            self.assertEqual(program.stop(), 0)
            families = list(prometheus_client.parser
                            .text_string_to_metric_families(path.read_text()))
            self.assertEqual(
                [(family.name, family.type) for family in families], [
                    ("fingerd_queries", "counter"),
                    ("fingerd_query_seconds", "histogram"),
                    ("fingerd_clients", "gauge"),
                    ("fingerd_threads", "gauge"),
                    ("fingerd_reloads", "counter")])
            answered += [sample.value for sample in families[0].samples
                         if sample.labels == {"outcome": "answered",
                                              "backend": "sql"}]
        self.assertEqual(sum(answered), 12)


if __name__ == "__main__":
    unittest.main()
