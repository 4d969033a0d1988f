"""Has a real Prometheus scrape three nodes that work for clients, and asks it everything that dashboards and alerts ask."""

import contextlib
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.parse
import urllib.request

import yaml

from balancer import Failure, process, require, wait_for

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Between two scrapes. A rate needs two of them.
INTERVAL_SECONDS = 1
RATE_WINDOW = "8s"
NODES = ["one", "two", "three"]
# These nodes have no certificate.
NOT_HERE = "midge_tls_certificate_expiry_timestamp_seconds"
# What lets only trouble through, at the end of a query.
FILTER = re.compile(r" (?:> 0|== 1)$")
SELECTOR = re.compile(r"\b(?:midge|process)_\w+(?:\{[^}]*\})?")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def port_in(log, pattern, running, name):
    """The port that a program says in its log it listens on."""
    def found():
        require(running.poll() is None, f"{name} has ended: {log.read_text()[-2000:]}")
        return re.search(pattern, log.read_text())

    return int(wait_for(f"{name} listens", found)[1])


def start_mongod(stack, tools, folder):
    data, log = folder / "mongod", folder / "mongod.log"
    data.mkdir()
    running = stack.enter_context(process(
        tools / "mongod", "--replSet", "midge", "--bind_ip", "127.0.0.1", "--port", "0", "--nounixsocket", "--dbpath", data,
        "--wiredTigerCacheSizeGB", "0.25", "--oplogSize", "64", stdout=log.open("w"), stderr=subprocess.STDOUT))
    port = port_in(log, r'"Waiting for connections".*"port":(\d+)', running, "mongod")
    done = subprocess.run([sys.executable, ROOT / "tests/cluster/initiate.py", f"127.0.0.1:{port}"], text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(tools / "pymongo")})
    require(done.returncode == 0, f"the replica set does not begin: {done.stdout}{done.stderr}")
    return f"mongodb://127.0.0.1:{port}/?replicaSet=midge"


def start_redis(stack, tools, folder):
    port = free_port()
    log = folder / "redis.log"
    running = stack.enter_context(process(
        tools / "redis-server", "--port", port, "--bind", "127.0.0.1", "--save", "", "--dir", folder,
        stdout=log.open("w"), stderr=subprocess.STDOUT))

    def listens():
        require(running.poll() is None, f"redis-server has ended: {log.read_text()}")
        return "Ready to accept connections" in log.read_text()

    wait_for("redis-server listens", listens)
    return f"redis://127.0.0.1:{port}"


class Node:
    def __init__(self, stack, program, name, folder, mongodb, redis):
        log = folder / f"{name}.log"
        settings = [f"node.name={name}", "store.kind=mongodb", f"store.uri={mongodb}", "store.database=monitoring",
                    "bus.kind=redis", f"bus.url={redis}", "http.bind=127.0.0.1:0", "listeners.tcp.bind=127.0.0.1:0",
                    "limits.connections_max=1000", "limits.memory_max=2 GiB", "log.format=json"]
        arguments = [part for setting in settings for part in ("--set", setting)]
        running = stack.enter_context(process(program, *arguments, cwd=folder, stderr=log.open("w")))

        def started():
            require(running.poll() is None, f"{name} has ended: {log.read_text()}")
            events = {event["event"]: event for event in events_in(log)}
            return events if "ready" in events else None

        events = wait_for(f"{name} is ready", started)
        self.http = events["http_started"]["address"]
        self.mqtt = events["listener_started"]["address"].rsplit(":", 1)[1]


def events_in(log):
    lines = log.read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


class Prometheus:
    """Scrapes the nodes with the rules of the project."""

    def __init__(self, stack, binary, nodes, folder):
        content = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
        interval = f"{INTERVAL_SECONDS}s"
        content["global"] = {"scrape_interval": interval, "evaluation_interval": interval, "scrape_timeout": interval}
        content["rule_files"] = [str(ROOT / "deploy/prometheus/alerts.yml")]
        content["scrape_configs"] = [{"job_name": "midge", "static_configs": [{"targets": [node.http for node in nodes]}]}]
        file, log = folder / "prometheus.yml", folder / "prometheus.log"
        file.write_text(yaml.safe_dump(content))
        running = stack.enter_context(process(
            binary, f"--config.file={file}", f"--storage.tsdb.path={folder / 'tsdb'}", "--web.listen-address=127.0.0.1:0",
            stdout=log.open("w"), stderr=subprocess.STDOUT))
        self.port = port_in(log, r'msg="Listening on" address=127\.0\.0\.1:(\d+)', running, "prometheus")

    def get(self, path, **parameters):
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}"
        data = urllib.parse.urlencode(parameters).encode() if parameters else None
        try:
            with urllib.request.urlopen(url, data, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise Failure(f"{parameters or path}: {error.read().decode()}") from error

    def query(self, expression):
        return self.get("query", query=expression)["result"]

    def value(self, expression):
        result = self.query(expression)
        return float(result[0]["value"][1]) if len(result) == 1 else None


class Load:
    """Clients that publish and subscribe across nodes until the end."""

    def __init__(self, stack, nodes):
        self.clients = 0
        self.stack = stack
        self.ending = threading.Event()
        stack.callback(self.ending.set)
        away = ["-i", "away", "-c", "-V", "mqttv311", "-q", "1", "-t", "load/#"]
        run("mosquitto_sub", nodes[2], *away, "-E")
        run("mosquitto_pub", nodes[0], "-t", "load/kept", "-r", "-q", "1", "-m", "kept")
        for number, node in enumerate(nodes):
            subscriber = ["-t", "load/#", "-q", str(number), "-i", f"subscriber-{number}"]
            self.start("mosquitto_sub", node, *subscriber, stdout=subprocess.DEVNULL)
        for qos in range(3):
            publisher = ["-t", f"load/{qos}", "-q", str(qos), "-l", "-i", f"publisher-{qos}"]
            self.publish(self.start("mosquitto_pub", nodes[0], *publisher, stdin=subprocess.PIPE, text=True))
        with socket.create_connection(("127.0.0.1", int(nodes[0].mqtt)), timeout=10) as broken:
            # PINGREQ, where only CONNECT may be.
            broken.sendall(b"\xc0\0")
            broken.recv(1)

    def add(self, nodes, number):
        """Another publisher and another subscriber, at two nodes."""
        one, other = nodes[number % len(nodes)], nodes[(number + 1) % len(nodes)]
        topic, qos = f"load/more/{number}", str(number % 3)
        self.start("mosquitto_sub", other, "-t", topic, "-q", qos, stdout=subprocess.DEVNULL)
        more = self.start("mosquitto_pub", one, "-t", topic, "-q", qos, "-l", stdin=subprocess.PIPE, text=True)
        self.publish(more)

    def start(self, program, node, *arguments, **options):
        self.clients += 1
        return self.stack.enter_context(process(program, "-h", "127.0.0.1", "-p", node.mqtt, *arguments, **options))

    def publish(self, publisher):
        def lines():
            with contextlib.suppress(BrokenPipeError, ValueError):
                while not self.ending.wait(0.02):
                    publisher.stdin.write("hello\n")
                    publisher.stdin.flush()

        threading.Thread(target=lines, daemon=True).start()


def run(program, node, *arguments):
    command = [program, "-h", "127.0.0.1", "-p", node.mqtt, *arguments]
    done = subprocess.run(command, text=True, capture_output=True, timeout=20)
    require(done.returncode == 0, f"{' '.join(command)}: {done.stderr}")


@contextlib.contextmanager
def monitored_cluster(tools, program):
    """Three nodes, their clients and a Prometheus."""
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        mongodb, redis = start_mongod(stack, tools, folder), start_redis(stack, tools, folder)
        nodes = [Node(stack, program, name, folder, mongodb, redis) for name in NODES]
        prometheus = Prometheus(stack, tools / "prometheus/usr/bin/prometheus", nodes, folder)
        yield prometheus, nodes, Load(stack, nodes)


def check(tools, program, queries):
    with monitored_cluster(tools, program) as (prometheus, nodes, load):
        def all_are_up():
            targets = prometheus.get("targets")["activeTargets"]
            return [target["health"] for target in targets] == ["up"] * len(nodes)

        wait_for("Prometheus has scraped all nodes", all_are_up)
        for expression, expected in (
            ("sum(midge_connections)", load.clients),
            ('sum(midge_node_state{state="ready"})', len(nodes)),
            ('min(midge_cluster_nodes{state="ready"})', len(nodes)),
            ('max(midge_cluster_nodes{state="ready"})', len(nodes)),
            ("min(midge_cluster_bus_connected)", 1),
            ('sum(midge_connections_rejected_total{reason="not_mqtt"})', 1),
        ):
            wait_for(f"{expression} is {expected}", lambda e=expression, v=expected: prometheus.value(e) == v)

        require(prometheus.get("metadata?metric=midge_connections_opened"), "the scrape did not use OpenMetrics")
        rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
        # What an alert looks at has to be there, whatever it says of it.
        looked_at = {selector for rule in rules for selector in SELECTOR.findall(rule["query"])}
        waiting = {FILTER.sub("", expression) for _, expression in queries} | looked_at
        waiting = {expression for expression in waiting if NOT_HERE not in expression}

        def all_are_answered():
            waiting.difference_update([expression for expression in waiting if prometheus.query(expression)])
            return not waiting

        try:
            wait_for("all queries have data", all_are_answered)
        except Failure as failure:
            raise Failure(f"{failure}; not so:\n" + "\n".join(sorted(waiting))) from failure
        # The others are at least understood.
        for _, expression in queries:
            prometheus.query(expression)

        def all_rules_are_evaluated():
            rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
            failed = [f"{rule['name']}: {rule['lastError']}" for rule in rules if rule["health"] == "err"]
            require(not failed, "\n".join(failed))
            return rules and all(rule["health"] == "ok" for rule in rules)

        wait_for("all alerts are evaluated", all_rules_are_evaluated)
