#!/usr/bin/env python3
"""Writes the dashboards beside it: dashboards.py. With --check it only says whether they are up to date.

The JSON that Grafana reads is mostly repetition; what differs from panel to panel is here.
"""

import json
import pathlib
import sys

FOLDER = pathlib.Path(__file__).parent / "dashboards"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
# Behind every name of a metric: the nodes that were chosen above the dashboard.
NODES = '{job="$job", instance=~"$instance"}'
WIDTH = 24


def chosen(expression):
    """Writes `metric{a="b"}` as `metric{job=…, instance=…, a="b"}`: `@` marks where."""
    inner = NODES[1:-1]
    return expression.replace("@{", "{" + inner + ", ").replace("@", "{" + inner + "}")


def rate(metric, by="", selector=""):
    group = f"sum by ({by}) " if by else "sum"
    return f"{group}(rate({metric}@{selector}[$__rate_interval]))"


def quantile(metric, q, by=""):
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket@[$__rate_interval])))"


class Panel:
    def __init__(self, kind, title, description, unit, queries, width, height=7, **defaults):
        self.kind, self.title, self.description, self.unit = kind, title, description, unit
        self.queries = queries
        self.width, self.height = width, height
        self.stack = defaults.pop("stack", False)
        self.steps = defaults.pop("steps", None)
        self.transformations = defaults.pop("transformations", None)
        self.defaults = defaults

    def json(self, number, x, y):
        targets = []
        for ref, (expression, legend) in zip("ABCDEFGHIJ", self.queries):
            target = {"refId": ref, "datasource": SOURCE, "expr": chosen(expression), "legendFormat": legend}
            if self.kind == "table":
                target |= {"format": "table", "instant": True}
            elif self.kind == "stat":
                target |= {"instant": False}
            elif self.kind == "heatmap":
                target |= {"format": "heatmap"}
            targets.append(target)
        defaults = {"unit": self.unit, **self.defaults}
        steps = [{"color": "green", "value": None}]
        steps += [{"color": color, "value": value} for value, color in self.steps or []]
        if self.steps:
            defaults["thresholds"] = {"mode": "absolute", "steps": steps}
            defaults["color"] = {"mode": "thresholds"}
        if self.kind == "timeseries":
            custom = {"lineWidth": 1, "fillOpacity": 10, "showPoints": "never"}
            if self.stack:
                custom |= {"stacking": {"mode": "normal"}, "fillOpacity": 40}
            if self.steps:
                custom["thresholdsStyle"] = {"mode": "line"}
                defaults["color"] = {"mode": "palette-classic"}
            defaults["custom"] = custom
        options = {
            "timeseries": {"legend": {"displayMode": "list", "placement": "bottom"},
                           "tooltip": {"mode": "multi", "sort": "desc"}},
            "stat": {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "area", "colorMode": "value"},
            "table": {"showHeader": True},
            "heatmap": {"calculate": False, "yAxis": {"unit": self.unit}, "cellGap": 0,
                        "color": {"mode": "scheme", "scheme": "Oranges", "steps": 32}},
        }[self.kind]
        panel = {
            "id": number, "type": self.kind, "title": self.title, "description": self.description,
            "datasource": SOURCE, "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height},
            "targets": targets, "fieldConfig": {"defaults": defaults, "overrides": []}, "options": options,
        }
        if self.transformations:
            panel["transformations"] = self.transformations
        return panel


def stat(title, description, unit, expression, **options):
    return Panel("stat", title, description, unit, [(expression, "")], 3, 4, **options)


def graph(title, description, unit, *queries, width=8, **options):
    return Panel("timeseries", title, description, unit, queries, width, **options)


def heatmap(title, description, metric):
    query = f"sum by (le) (increase({metric}_bucket@[$__rate_interval]))"
    return Panel("heatmap", title, description, "s", [(query, "{{le}}")], 8, 8)


def percentiles(metric):
    return [(quantile(metric, q), f"{q * 100:g} %") for q in (0.5, 0.95, 0.99)]


CONNECTIONS = "sum by (instance) (midge_connections@)"

OVERVIEW = [
    ("Now", [
        stat("Nodes ready", "Nodes that take clients. Fewer than you run: see the table below.", "none",
             'sum(midge_node_state@{state="ready"}) or vector(0)'),
        stat("Connections", "Clients that are connected, at all nodes.", "short", "sum(midge_connections@)"),
        stat("Messages in", "Messages that publishers handed over, each second.", "mps",
             rate("midge_messages_received_total")),
        stat("Messages out", "Messages that were written to subscribers, each second; one for each of them.", "mps",
             rate("midge_messages_delivered_total")),
        stat("Acknowledged in", "99 % of publishers get PUBACK or PUBREC within this time. Alert: MidgePublishAckSlow.",
             "s", quantile("midge_publish_ack_duration_seconds", 0.99), steps=[(0.1, "yellow"), (0.5, "red")]),
        stat("Delivered in", "99 % of messages reach connected subscribers within this time. Alert: MidgeDeliverySlow.",
             "s", quantile("midge_delivery_duration_seconds", 0.99), steps=[(0.05, "yellow"), (0.25, "red")]),
        stat("Waiting offline", "Messages for clients that are away. Alert: MidgeOfflineQueueGrowing.", "short",
             "max(midge_cluster_offline_messages@)"),
        stat("Dropped", "Messages that had a subscriber and do not reach it, each second; the expired ones not counted. "
             "Alert: MidgeDroppingMessages.", "mps",
             rate("midge_messages_dropped_total", selector='{reason!="expired"}'), steps=[(0.001, "red")]),
    ]),
    ("Nodes", [
        Panel("table", "Nodes", "One line for each node: version, state, and what it does now.", "short", [
            ("max by (instance, node) (midge_node_info@)", ""),
            ("max by (instance, version) (midge_build_info@)", ""),
            ("max by (instance, state) (midge_node_state@ == 1)", ""),
            ("time() - max by (instance) (process_start_time_seconds@)", ""),
            (CONNECTIONS, ""),
            (rate("midge_messages_received_total", "instance"), ""),
            (rate("process_cpu_seconds_total", "instance"), ""),
            ("max by (instance) (process_resident_memory_bytes@)", ""),
        ], WIDTH, 7, transformations=[
            {"id": "joinByField", "options": {"byField": "instance", "mode": "outer"}},
            {"id": "organize", "options": {
                "excludeByName": {**{f"Time {n}": True for n in range(1, 9)}, "Value #A": True, "Value #B": True,
                                  "Value #C": True},
                "renameByName": {"Value #D": "Up for (s)", "Value #E": "Connections", "Value #F": "Messages in (1/s)",
                                 "Value #G": "Processors", "Value #H": "Memory (bytes)"}}},
        ]),
    ]),
    ("Clients", [
        graph("Connections by node", "Even heights are what a balancer with leastconn gives. Alert: MidgeUnbalanced.",
              "short", (CONNECTIONS, "{{instance}}"), stack=True),
        graph("Closed connections", "Each second, by reason. Alert: MidgeConnectionChurn.", "cps",
              (rate("midge_connections_closed_total", "reason") + " > 0", "{{reason}}"), stack=True),
        graph("Refused connections", "Each second, by reason. Wrong passwords: MidgeAuthenticationFailures.", "cps",
              (rate("midge_connections_rejected_total", "reason") + " > 0", "{{reason}}"), stack=True),
        graph("Sessions", "In the store, by state. Those that are disconnected wait for their client until they expire.",
              "short", ("max by (state) (midge_cluster_sessions@)", "{{state}}"), stack=True),
        graph("Resumed and taken over", "Sessions that went on, each second; remote: at another node than before. "
              "Alert: MidgeSessionStealing.", "ops",
              (rate("midge_sessions_resumed_total", "origin"), "resumed, {{origin}}"),
              (rate("midge_sessions_taken_over_total", "origin"), "taken over, {{origin}}")),
        graph("Subscriptions", "Of the sessions that are connected, by kind.", "short",
              ("sum by (kind) (midge_subscriptions@)", "{{kind}}")),
    ]),
    ("Messages", [
        graph("In", "Messages from publishers, each second, by QoS.", "mps",
              (rate("midge_messages_received_total", "qos"), "QoS {{qos}}"), stack=True),
        graph("Out", "Messages to subscribers, each second, by QoS.", "mps",
              (rate("midge_messages_delivered_total", "qos"), "QoS {{qos}}"), stack=True),
        graph("Bytes", "Read from and written to clients, each second, without TLS and WebSocket.", "Bps",
              (rate("midge_received_bytes_total"), "in"), (rate("midge_sent_bytes_total"), "out")),
        graph("Dropped messages", "Each second, by reason. Alert: MidgeDroppingMessages.", "mps",
              (rate("midge_messages_dropped_total", "reason") + " > 0", "{{reason}}"), stack=True),
        graph("Without subscribers", "Messages that nobody subscribed to, each second, by QoS.", "mps",
              (rate("midge_messages_unrouted_total", "qos"), "QoS {{qos}}")),
        graph("Waiting messages", "For clients that are away (in the store), and in memory for those that are connected.",
              "short", ("max(midge_cluster_offline_messages@)", "away"), ("sum(midge_queued_messages@)", "in memory"),
              ('sum(midge_inflight_messages@{direction="outbound"})', "sent, not acknowledged")),
        graph("Slow subscribers", "Connected clients that do not keep up. Alert: MidgeSlowConsumers.", "short",
              ("sum by (instance) (midge_slow_consumers@)", "{{instance}}")),
        graph("Retained messages", "In the store.", "short", ("max(midge_cluster_retained_messages@)", "retained")),
        graph("Authorisation refused", "PUBLISH and SUBSCRIBE that the rules do not allow, each second.", "ops",
              (rate("midge_authorizations_total", "action", '{result="denied"}'), "{{action}}")),
    ]),
]

LATENCY = [
    ("What clients see", [
        heatmap("Acknowledgement", "From reading a PUBLISH to writing PUBACK or PUBREC, the durable write included.",
                "midge_publish_ack_duration_seconds"),
        heatmap("Delivery", "From reading a PUBLISH to writing it to a connected subscriber.",
                "midge_delivery_duration_seconds"),
        heatmap("Connecting", "From CONNECT to CONNACK: password, session, take-over.",
                "midge_connect_duration_seconds"),
        graph("Acknowledgement, percentiles", "Alert above 0.5 s: MidgePublishAckSlow.", "s",
              *percentiles("midge_publish_ack_duration_seconds"), steps=[(0.5, "red")]),
        graph("Delivery by path", "99th percentile. Only the path between nodes slow: look at the bus. "
              "Alert above 0.25 s: MidgeDeliverySlow.", "s",
              (quantile("midge_delivery_duration_seconds", 0.99, "path"), "{{path}}"), steps=[(0.25, "red")]),
        graph("Connecting, percentiles", "After a restart of many clients, passwords are the longest part.", "s",
              *percentiles("midge_connect_duration_seconds")),
        graph("Subscribers, percentiles", "From writing a PUBLISH to its PUBACK or PUBCOMP: the network and the client.", "s",
              *percentiles("midge_subscriber_ack_duration_seconds")),
        graph("Taking sessions over", "99th percentile of what a client waits for whoever had its session; remote: "
              "another node.", "s",
              (quantile("midge_session_takeover_duration_seconds", 0.99, "origin"), "{{origin}}")),
    ]),
    ("Store", [
        graph("Store operations, 99th percentile", "As the node sees them, waiting in the node included.", "s",
              (quantile("midge_store_operation_duration_seconds", 0.99, "operation"), "{{operation}}")),
        graph("Store operations", "Each second.", "ops", (rate("midge_store_operations_total", "operation"), "{{operation}}")),
        graph("Store results other than ok", "Each second, by operation. Alert: MidgeStoreDown.", "ops",
              (rate("midge_store_operations_total", "operation, result", '{result!="ok"}') + " > 0",
               "{{operation}} {{result}}")),
        graph("Pending operations", "Sent to the store and not answered. A queue that grows is a store that is too slow.",
              "short", ("sum by (instance) (midge_store_pending_operations@)", "{{instance}}")),
        graph("Asked again", "Store operations that were repeated because the store was not available, each second.", "ops",
              (rate("midge_store_retries_total", "operation"), "{{operation}}")),
        graph("Store usable", "1 or 0, for each node. Alert: MidgeStoreDown.", "bool",
              ("min by (instance) (midge_store_up@)", "{{instance}}"), min=0, max=1),
    ]),
    ("Bus between nodes", [
        graph("Bus round trip", "From a node to the bus and back to it, percentiles.", "s",
              *percentiles("midge_cluster_bus_roundtrip_duration_seconds")),
        graph("Bus messages", "Each second, by kind.", "mps",
              (rate("midge_cluster_bus_messages_published_total", "kind"), "out, {{kind}}"),
              (rate("midge_cluster_bus_messages_received_total", "kind"), "in, {{kind}}")),
        graph("Lost on the bus, and repaired", "Gaps in the numbers of messages, and messages that the bus refused. "
              "Alert: MidgeBusLosingMessages.", "short",
              ("sum by (instance) (increase(midge_cluster_bus_gaps_total@[$__rate_interval]))", "gaps, {{instance}}"),
              ("sum by (reason) (increase(midge_cluster_bus_publish_failures_total@[$__rate_interval])) > 0",
               "refused, {{reason}}")),
        graph("On their way to other nodes", "Bytes that these have not taken up: at their bound, messages are held back.",
              "bytes", ("sum by (instance) (midge_cluster_bus_pending_bytes@)", "{{instance}}")),
        graph("Dropped for nodes that were behind", "Messages that are in no inbox. Alert: MidgeNodeBehind.", "short",
              ("sum by (instance, qos) (increase(midge_cluster_bus_messages_dropped_total@[$__rate_interval])) > 0",
               "{{instance}} QoS {{qos}}")),
        graph("Bus connected", "1 or 0, for each node. Alert: MidgeBusDisconnected.", "bool",
              ("min by (instance) (midge_cluster_bus_connected@)", "{{instance}}"), min=0, max=1),
        graph("Connected to the bus anew", "How often, for each node.", "short",
              ("sum by (instance) (increase(midge_cluster_bus_reconnects_total@[$__rate_interval]))", "{{instance}}")),
        graph("Members, as each node sees them", "All lines should be one. Alert: MidgeClusterViewsDisagree.", "short",
              ('max by (instance) (midge_cluster_nodes@{state="ready"})', "{{instance}}")),
    ]),
    ("Protection", [
        graph("Overload level", "0 normal, 1 new connections are paced, 2 publishers too, 3 new connections are refused. "
              "Alert: MidgeOverloaded.", "none", ("max by (instance) (midge_overload_level@)", "{{instance}}"),
              min=0, max=3),
        graph("Clients held back", "Connections that are not read right now, by cause.", "short",
              ("sum by (cause) (midge_clients_throttled@)", "{{cause}}"), stack=True),
        graph("Sent again", "Messages sent again to clients that came back, each second. "
              "Many: clients lose their connections before they acknowledge.", "mps",
              (rate("midge_messages_redelivered_total", "qos"), "QoS {{qos}}")),
        graph("Protocol errors", "Connections ended for breaking MQTT, each second, by reason code.", "cps",
              (rate("midge_protocol_errors_total", "reason_code") + " > 0", "{{reason_code}}")),
        graph("Packets in", "Each second, by type.", "pps", (rate("midge_packets_received_total", "type"), "{{type}}")),
        graph("Packets out", "Each second, by type.", "pps", (rate("midge_packets_sent_total", "type"), "{{type}}")),
    ]),
]

CAPACITY = [
    ("How much is left", [
        graph("Connections, used", "Of what a node lets in, if there is a limit. Alert above 85 %: "
              "MidgeConnectionsNearlyFull.", "percentunit",
              ("sum by (instance) (midge_connections@)"
               " / max by (instance) (midge_max_connections@ > 0)", "{{instance}}"),
              min=0, max=1, steps=[(0.85, "red")]),
        graph("File descriptors, used", "Alert above 85 %: MidgeFileDescriptorsNearlyExhausted.", "percentunit",
              ("process_open_fds@ / process_max_fds@", "{{instance}}"), min=0, max=1, steps=[(0.85, "red")]),
        graph("Memory, used", "Of the limit that the node respects. Alert above 90 %: MidgeMemoryNearLimit.", "percentunit",
              ("process_resident_memory_bytes@ / on (instance) (midge_memory_limit_bytes@ > 0)", "{{instance}}"),
              min=0, max=1, steps=[(0.9, "red")]),
    ]),
    ("What it takes", [
        graph("Processors", "How many processors each node keeps busy.", "short",
              (rate("process_cpu_seconds_total", "instance"), "{{instance}}")),
        graph("Memory", "Resident memory of each node.", "bytes",
              ("process_resident_memory_bytes@", "{{instance}}")),
        graph("Memory of each connection", "Memory of the node by its connections; the fixed part counts when there are "
              "few. Rising: clients have more subscriptions, or more waits in memory.", "bytes",
              (f"sum by (instance) (process_resident_memory_bytes@) / ({CONNECTIONS} > 0)", "{{instance}}")),
        graph("Waiting in memory", "Payloads that wait for connected clients.", "bytes",
              ("sum by (instance) (midge_queued_bytes@)", "{{instance}}"), stack=True),
        graph("Processor for each message", "Processor time by messages in and out: falls with load, rises with TLS and "
              "small batches.", "s",
              (f"({rate('process_cpu_seconds_total', 'instance')}) / "
               f"({rate('midge_messages_received_total', 'instance')} + "
               f"{rate('midge_messages_delivered_total', 'instance')} > 0)", "{{instance}}")),
        graph("Fan-out", "Sessions and share groups that a message is for: the mean, and the largest 1 %.", "none",
              (f"{rate('midge_message_fanout_sum')} / ({rate('midge_message_fanout_count')} > 0)", "mean"),
              (quantile("midge_message_fanout", 0.99), "99 %")),
    ]),
    ("How it spreads", [
        graph("Connections by node", "Alert at twice as many: MidgeUnbalanced.", "short", (CONNECTIONS, "{{instance}}")),
        graph("Messages in by node", "Each second.", "mps",
              (rate("midge_messages_received_total", "instance"), "{{instance}}")),
        graph("Messages out by node", "Each second.", "mps",
              (rate("midge_messages_delivered_total", "instance"), "{{instance}}")),
    ]),
    ("How it grows", [
        graph("Sessions in the store", "By state. Growing and disconnected: shorten session.expiry_max.", "short",
              ("max by (state) (midge_cluster_sessions@)", "{{state}}")),
        graph("Messages in the store", "That wait for clients that are away, and retained ones.", "short",
              ("max(midge_cluster_offline_messages@)", "waiting"),
              ("max(midge_cluster_retained_messages@)", "retained")),
        graph("Subscriptions", "Of the sessions that are connected.", "short",
              ("sum by (instance) (midge_subscriptions@)", "{{instance}}"), stack=True),
    ]),
    ("What falls due", [
        graph("Certificates, days left", "Alert below 14: MidgeCertificateExpiresSoon.", "d",
              ("(min by (listener) (midge_tls_certificate_expiry_timestamp_seconds@) - time()) / 86400",
               "{{listener}}")),
        graph("Versions", "Nodes by version. More than one for an hour: MidgeMixedVersions.", "short",
              ("count by (version) (midge_build_info@)", "{{version}}"), stack=True),
        graph("Settings", "Nodes by a hash of their settings. More than one: they are configured differently.", "short",
              ("count by (sha256) (midge_config_info@)", "{{sha256}}"), stack=True),
        graph("Configuration read", "1: the last reload was good; 0: the node keeps the old one. "
              "Alert: MidgeConfigReloadFailed.", "bool",
              ("min by (instance) (midge_config_last_reload_successful@)", "{{instance}}"), min=0, max=1),
    ]),
]

DASHBOARDS = [
    ("overview", "Midge / Overview", "What the cluster does, and whether it is well.", OVERVIEW),
    ("latency", "Midge / Latency and internals", "How long things take, and where.", LATENCY),
    ("capacity", "Midge / Capacity", "How much is left, what it takes, what falls due.", CAPACITY),
]


def variable(name, label, query, **options):
    return {"name": name, "label": label, "type": "query", "datasource": SOURCE, "query": query, "refresh": 2,
            "sort": 1, **options}


def annotation(name, color, expression):
    return {"name": name, "datasource": SOURCE, "enable": True, "iconColor": color, "expr": chosen(expression),
            "titleFormat": f"{name}: {{{{instance}}}}", "step": "30s"}


def dashboard(uid, title, description, rows):
    panels, y = [], 0
    for row, contents in rows:
        panels.append({"id": len(panels) + 1, "type": "row", "title": row, "collapsed": False, "panels": [],
                       "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1}})
        y += 1
        x = height = 0
        for panel in contents:
            if x + panel.width > WIDTH:
                x, y = 0, y + height
                height = 0
            panels.append(panel.json(len(panels) + 1, x, y))
            x, height = x + panel.width, max(height, panel.height)
        y += height
    return {
        "uid": f"midge-{uid}", "title": title, "description": description, "tags": ["midge", "mqtt"],
        "schemaVersion": 39, "version": 1, "editable": True, "refresh": "30s", "timezone": "browser",
        "graphTooltip": 1, "time": {"from": "now-1h", "to": "now"},
        "links": [{"title": "Midge", "type": "dashboards", "tags": ["midge"], "asDropdown": True, "includeVars": True,
                   "keepTime": True}],
        "templating": {"list": [
            {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
            variable("job", "Job", "label_values(midge_build_info, job)"),
            variable("instance", "Node", 'label_values(midge_build_info{job="$job"}, instance)', multi=True,
                     includeAll=True, allValue=".*", current={"text": "All", "value": "$__all"}),
        ]},
        "annotations": {"list": [
            annotation("Started", "green", "changes(process_start_time_seconds@[1m]) > 0"),
            annotation("Draining", "orange", 'midge_node_state@{state="draining"} == 1'),
        ]},
        "panels": panels,
    }


def main():
    stale = []
    for uid, title, description, rows in DASHBOARDS:
        path = FOLDER / f"{uid}.json"
        text = json.dumps(dashboard(uid, title, description, rows), indent=1) + "\n"
        if sys.argv[1:] == ["--check"]:
            if not path.exists() or path.read_text() != text:
                stale.append(path.name)
        else:
            path.write_text(text)
    if stale:
        sys.exit(f"not what dashboards.py writes: {', '.join(stale)}")


if __name__ == "__main__":
    main()
