"""Runs the HAProxy configuration, with other addresses in it, in front of two nodes, and passes MQTT through it."""

import contextlib
import csv
import http.server
import io
import json
import pathlib
import re
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request

PATIENCE_SECONDS = 20


class Failure(Exception):
    pass


def require(condition, message):
    if not condition:
        raise Failure(message)


def wait_for(what, condition):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (result := condition()):
        require(time.monotonic() < deadline, f"not within {PATIENCE_SECONDS} s: {what}")
        time.sleep(0.05)
    return result


@contextlib.contextmanager
def process(*command, **options):
    started = subprocess.Popen([str(part) for part in command], **options)
    try:
        yield started
    finally:
        started.kill()
        started.wait()


class Health:
    """Answers /lbz as the test says, so that each answer can be had at will."""

    def __init__(self):
        health = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(health.status if self.path == "/lbz" else 500)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.status = 503
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class Node:
    def __init__(self, stack, program, name, folder):
        self.name = name
        self.health = Health()
        stack.callback(self.health.server.shutdown)
        log = folder / f"{name}.log"
        settings = [f"node.name={name}", "store.kind=memory", "http.bind=127.0.0.1:0", "log.format=json"]
        for listener in ("tcp", "ws"):
            settings += [f"listeners.{listener}.bind=127.0.0.1:0", f"listeners.{listener}.proxy_protocol=required",
                         f"listeners.{listener}.trusted_proxies=127.0.0.1"]
        arguments = [part for setting in settings for part in ("--set", setting)]
        node = stack.enter_context(process(program, *arguments, stderr=log.open("w")))

        def started():
            require(node.poll() is None, f"{name} has ended: {log.read_text()}")
            events = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
            if any(event["event"] == "ready" for event in events):
                return {event["listener"]: event["address"] for event in events if event["event"] == "listener_started" and "kind" in event}
            return None

        self.log = log
        self.addresses = wait_for(f"{name} is ready", started)


class HAProxy:
    def __init__(self, stack, configuration, nodes, folder):
        text = re.sub(r"(?ms)^resolvers .*?(?=^defaults)", "", configuration.read_text())
        # HAProxy inherits listening sockets, so that no port is guessed.
        sockets = {}
        for port in ("1883", "8083", "8404"):
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            sockets[port] = listening
            text, count = re.subn(rf"bind :{port}$", f"bind fd@{listening.fileno()}", text, flags=re.MULTILINE)
            require(count == 1, f"haproxy.cfg: no bind :{port}")
        for port, listener in (("1883", "tcp"), ("8083", "ws")):
            servers = "\n    ".join(f"server {node.name} {node.addresses[listener]} port {node.health.port}" for node in nodes)
            text, count = re.subn(rf"server-template midge \S+ midge:{port} .*", servers, text)
            require(count == 1, f"haproxy.cfg: no server-template for midge:{port}")
        # As many as the descriptors of any machine allow.
        text = re.sub(r"maxconn \d+", "maxconn 100", text)
        file = folder / "haproxy.cfg"
        file.write_text(text)
        log = folder / "haproxy.log"
        self.process = stack.enter_context(process(
            "haproxy", "-db", "-f", file, pass_fds=[listening.fileno() for listening in sockets.values()],
            stdout=log.open("w"), stderr=subprocess.STDOUT))
        self.ports = {port: listening.getsockname()[1] for port, listening in sockets.items()}

    def server(self, name, backend="midge_mqtt"):
        url = f"http://127.0.0.1:{self.ports['8404']}/stats;csv"
        with urllib.request.urlopen(url, timeout=5) as answer:
            rows = csv.DictReader(io.StringIO(answer.read().decode().removeprefix("# ")))
            (row,) = [row for row in rows if row["pxname"] == backend and row["svname"] == name]
        return row

    def status(self, name):
        return self.server(name)["status"]


class Client:
    """A connected MQTT 3.1.1 client."""

    def __init__(self, stack, port, client_id):
        self.socket = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS))
        name = client_id.encode()
        body = b"\0\4MQTT\4\2\0\0" + len(name).to_bytes(2) + name
        self.socket.sendall(bytes([0x10, len(body)]) + body)
        answer = self.receive(4)
        require(answer == b"\x20\2\0\0", f"{client_id} got {answer!r} for its CONNECT")

    def receive(self, size):
        received = b""
        while len(received) < size and (part := self.socket.recv(size - len(received))):
            received += part
        return received

    def ping(self):
        self.socket.sendall(b"\xc0\0")
        return self.receive(2) == b"\xd0\0"

    def wait_for_end(self):
        require(self.receive(1) == b"", "something came instead of the end of the connection")


def check(configuration, program):
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        one, two = nodes = [Node(stack, program, name, folder) for name in ("one", "two")]
        haproxy = HAProxy(stack, configuration, nodes, folder)
        mqtt = haproxy.ports["1883"]

        one.health.status = 200
        wait_for("one takes clients", lambda: haproxy.status("one") == "UP" and haproxy.status("two") == "DOWN")
        messages_pass(mqtt)
        only_mqtt_passes(mqtt)
        websockets_pass(haproxy.ports["8083"])

        stays = Client(stack, mqtt, "stays")
        two.health.status = 200
        wait_for("two takes clients", lambda: haproxy.status("two") == "UP")
        one.health.status = 404
        wait_for("one drains", lambda: haproxy.status("one") == "NOLB")
        before = int(haproxy.server("one")["stot"])
        comes = Client(stack, mqtt, "comes")
        require(stays.ping() and comes.ping(), "a client is not served while its node drains")
        require(int(haproxy.server("one")["stot"]) == before, "a node that drains got a client")

        one.health.status = 503
        stays.wait_for_end()
        require(comes.ping(), "the client of another node was disturbed")


def messages_pass(port):
    to = ["-h", "127.0.0.1", "-p", str(port), "-t", "deploy/check", "-q", "1"]
    for version in ("mqttv311", "mqttv5"):
        for command in (["mosquitto_pub", *to, "-V", version, "-r", "-m", version],
                        ["mosquitto_sub", *to, "-V", version, "-C", "1", "-W", str(PATIENCE_SECONDS)]):
            done = subprocess.run(command, text=True, capture_output=True, timeout=2 * PATIENCE_SECONDS)
            require(done.returncode == 0, f"{' '.join(command)}: {done.stderr}")
        require(done.stdout == f"{version}\n", f"{version} became {done.stdout!r}")


def only_mqtt_passes(port):
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS) as other:
        other.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            require(other.recv(1) == b"", "something that is not MQTT got an answer")


def websockets_pass(port):
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS) as web:
        web.sendall(b"GET /mqtt HTTP/1.1\r\nHost: midge\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
                    b"Sec-WebSocket-Protocol: mqtt\r\n\r\n")
        answer = web.recv(12)
        require(answer == b"HTTP/1.1 101", f"the WebSocket handshake got {answer!r}")
