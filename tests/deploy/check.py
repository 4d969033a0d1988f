#!/usr/bin/env python3
"""Checks what is in deploy/ with the tools that will read it: check.py [NAME…]

`./test deploy` installs the tools and runs it. It needs MIDGE_TEST_PROGRAM, a midge, and MIDGE_TEST_TOOLS, the folder
of the tools; with those, nothing is asked of the network.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib

import yaml

import balancer
import monitoring as monitored

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
TOOLS = pathlib.Path(os.environ["MIDGE_TEST_TOOLS"]).resolve()
PROMTOOL = TOOLS / "prometheus/usr/bin/promtool"
# The oldest and the newest Kubernetes that the manifests are for.
KUBERNETES = ["1.28", "1.37"]
# Named in the manifests, but not by metrics of ours.
PROCESS_METRICS = re.compile(r"^(process_\w+|up|instance|job)$")


class Failure(Exception):
    pass


def require(condition, message):
    if not condition:
        raise Failure(message)


def run(*command, **options):
    """The output of a command that must succeed."""
    command = [str(part) for part in command]
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    require(done.returncode == 0, f"{' '.join(command)}\n{done.stdout}")
    return done.stdout


def python(module, *arguments):
    return run(sys.executable, "-m", module, *arguments)


def load(path):
    return yaml.safe_load(path.read_text())


# Compose


def compose():
    file = ROOT / "docker-compose.yml"
    python("check_jsonschema", "--builtin-schema", "vendor.compose-spec", file)
    # It is Debian's, with Debian's Python packages.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for profile in ("", "monitoring"):
        run("docker-compose", "-f", file, "config", "-q", env=environment | {"COMPOSE_PROFILES": profile})

    content = load(file)
    for name, service in content["services"].items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            is_ours = source.startswith("./") and not source.startswith("./deploy/compose/secrets/")
            require(not is_ours or (ROOT / source).exists(), f"{name} mounts {source}, which is not there")
        require("latest" not in service["image"], f"{name} has no fixed version")
    midge = content["services"]["midge"]
    drain = {name: midge["environment"][f"MIDGE_DRAIN__{name.upper()}"] for name in ("grace", "deadline")}
    drain_fits(drain, seconds(midge["stop_grace_period"]))


def compose_secrets():
    """The script makes what docker-compose.yml names, twice is as once, and everything fits together."""
    with tempfile.TemporaryDirectory() as folder:
        script = shutil.copy(DEPLOY / "compose/make-secrets", folder)
        run(script)
        made = pathlib.Path(folder, "secrets")
        first = contents(made)
        run(script)
        require(first == contents(made), "a second run changes secrets")
        require(made.stat().st_mode & 0o077 == 0, "others can enter the folder of the secrets")

        named = {pathlib.Path(secret["file"]).name for secret in load(ROOT / "docker-compose.yml")["secrets"].values()}
        require(named | {"users.toml"} == set(first), f"docker-compose.yml names {sorted(named)}, made are {sorted(first)}")
        require(first["mongodb_password"] in first["mongodb_uri"], "mongodb_uri has another password")
        require(first["redis_conf"].split()[1] in first["redis_url"], "redis_url has another password")
    ignored = subprocess.run(["git", "check-ignore", "-q", "deploy/compose/secrets/any"], cwd=ROOT)
    require(ignored.returncode == 0, "git does not ignore deploy/compose/secrets")


def contents(folder):
    return {file.name: file.read_text() for file in folder.rglob("*") if file.is_file()}


def drain_fits(drain, patience):
    grace, deadline = seconds(drain["grace"]), seconds(drain["deadline"])
    require(grace < deadline, f"a grace of {grace} s leaves no time to send clients away before {deadline} s")
    require(patience >= deadline + 15, f"killed after {patience} s, but a drain of {deadline} s needs 15 s more to end well")


def seconds(text):
    number, unit = re.fullmatch(r"(\d+)(s|m)", text).groups()
    return int(number) * {"s": 1, "m": 60}[unit]


def dockerfile():
    file = DEPLOY / "docker/Dockerfile"
    run(TOOLS / "deploy/bin/hadolint", file)
    sources = re.findall(r"^COPY (?!--)(.+) \S+$", file.read_text(), re.MULTILINE)
    copied = {f"!{name}" for line in sources for name in line.split()}
    sent = {line for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    require(copied == sent, f"the Dockerfile and .dockerignore differ in {sorted(copied ^ sent)}")


def yaml_style():
    files = [path for pattern in ("*.yml", "*.yaml") for path in DEPLOY.rglob(pattern)]
    python("yamllint", "--strict", "-c", ROOT / "tests/deploy/yamllint.yml", ROOT / "docker-compose.yml", *files)


# Kubernetes


def rendered():
    """What `kubectl apply -k` would send, by the folder that it is rendered from."""
    folders = [DEPLOY / "kubernetes/base", *sorted((DEPLOY / "kubernetes/overlays").iterdir())]
    return {folder: run("kubectl", "kustomize", folder) for folder in folders}


def kubernetes():
    if not shutil.which("kubectl"):
        # Debian's is too old for these files, and it is nowhere else that `./test` may ask.
        print("kubernetes: without kubectl, only the style of the files was checked")
        return
    for folder, text in rendered().items():
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            file.write(text)
            file.flush()
            for version in KUBERNETES:
                python("kubernetes_validate", "--strict", "--no-warn", "-k", version, file.name)
        try:
            manifests(list(yaml.safe_load_all(text)))
        except Failure as failure:
            raise Failure(f"{folder.name}: {failure}") from failure


def manifests(objects):
    """Things that are valid and nevertheless wrong."""
    by_kind = {}
    for item in objects:
        by_kind.setdefault(item["kind"], []).append(item)
    require("StatefulSet" not in by_kind, "a node keeps nothing: no StatefulSet")
    require("Secret" not in by_kind, "secrets are not in the repository")
    (deployment,) = by_kind["Deployment"]
    template = deployment["spec"]["template"]
    pod, labels = template["spec"], template["metadata"]["labels"]
    (container,) = pod["containers"]
    ports = {port["name"] for port in container["ports"]}

    def selects(selector, what):
        require(selector and selector.items() <= labels.items(), f"{what} selects {selector}, not the nodes")

    selects(deployment["spec"]["selector"]["matchLabels"], "Deployment")
    for service in by_kind["Service"]:
        selects(service["spec"]["selector"], f"Service {service['metadata']['name']}")
        unknown = {port["targetPort"] for port in service["spec"]["ports"]} - ports
        require(not unknown, f"Service {service['metadata']['name']} leads to ports that are not there: {unknown}")
    for budget in by_kind.get("PodDisruptionBudget", []):
        selects(budget["spec"]["selector"]["matchLabels"], "PodDisruptionBudget")
    for policy in by_kind["NetworkPolicy"]:
        selects(policy["spec"]["podSelector"]["matchLabels"], "NetworkPolicy")
        opened = {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]}
        require(opened == ports, f"the NetworkPolicy opens {sorted(opened)} of {sorted(ports)}")
        for rule in policy["spec"]["egress"]:
            for target in rule["to"]:
                other = target.get("podSelector", {}).get("matchLabels", {})
                require(other != labels, "the NetworkPolicy lets nodes talk to nodes instead of MongoDB and Redis")
    for monitor in by_kind.get("ServiceMonitor", []):
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        found = [item for item in by_kind["Service"] if wanted <= item["metadata"]["labels"].items()]
        require(len(found) == 1, f"the ServiceMonitor finds {len(found)} Services")

    (config,) = by_kind["ConfigMap"]
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == "config"]
    require(volume["configMap"]["name"] == config["metadata"]["name"], "the ConfigMap is not the one that is mounted")
    drain_fits(tomllib.loads(config["data"]["midge.toml"])["drain"], pod["terminationGracePeriodSeconds"])

    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    for path in re.findall(r'"(/etc/midge/[^"]+)"', config["data"]["midge.toml"]):
        require(any(path.startswith(f"{mount}/") for mount in mounts), f"{path} is not mounted")
    security = pod["securityContext"] | container["securityContext"]
    require(security["runAsNonRoot"] and security["readOnlyRootFilesystem"], "root, or a writable file system")
    require(security["capabilities"] == {"drop": ["ALL"]}, "capabilities")
    for probe, path in (("livenessProbe", "/livez"), ("readinessProbe", "/readyz")):
        require(container[probe]["httpGet"] == {"path": path, "port": "http"}, f"{probe} is not {path}")


# Prometheus and Grafana


def prometheus():
    folder = DEPLOY / "prometheus"
    run(PROMTOOL, "check", "config", folder / "prometheus.yml")
    run(PROMTOOL, "check", "rules", folder / "alerts.yml")
    run(PROMTOOL, "test", "rules", folder / "alerts_test.yml")


def alerts():
    """Each alert has a severity, a page that the list names, a test that fires it and one that does not."""
    names = set()
    pages = ROOT / "docs/alerts"
    index = (pages / "README.md").read_text()
    tests = [test for group in load(DEPLOY / "prometheus/alerts_test.yml")["tests"] for test in group["alert_rule_test"]]
    for group in load(DEPLOY / "prometheus/alerts.yml")["groups"]:
        for rule in group["rules"]:
            name = rule["alert"]
            names.add(name)
            severity = rule["labels"]["severity"]
            require(severity in ("critical", "warning", "info"), f"{name}: severity {severity}")
            require(rule["annotations"].get("summary"), f"{name}: no summary")
            page = f"docs/alerts/{name}.md"
            require(rule["annotations"].get("runbook_url") == page, f"{name}: runbook_url is not {page}")
            require((ROOT / page).exists(), f"{page} is missing")
            require(f"| [{name}]({name}.md) | {severity} |" in index, f"docs/alerts/README.md does not list {name}")
            outcomes = {bool(test["exp_alerts"]) for test in tests if test["alertname"] == name}
            require(outcomes == {True, False}, f"{name}: a test that fires it or one that does not is missing")
    for page in pages.glob("*.md"):
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            require((pages / link).exists(), f"{page.name}: {link} leads nowhere")
    described = {page.stem for page in pages.glob("Midge*.md")}
    require(described == names, f"pages and alerts differ: {sorted(described ^ names)}")


def dashboards():
    return {path.name: json.loads(path.read_text()) for path in sorted((DEPLOY / "grafana/dashboards").glob("*.json"))}


def queries(window="1m"):
    """All queries of the dashboards, with values for the variables."""
    for name, dashboard in dashboards().items():
        expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
        expressions += [annotation["expr"] for annotation in dashboard["annotations"]["list"]]
        for expression in expressions:
            for variable, value in (("$__rate_interval", window), ("$instance", ".*"), ("$job", "midge")):
                expression = expression.replace(variable, value)
            require("$" not in expression, f"{name}: an unknown variable in {expression}")
            yield name, expression


def grafana():
    run(sys.executable, DEPLOY / "grafana/dashboards.py", "--check")
    rules = [{"record": f"query:{number}", "expr": expression} for number, (_, expression) in enumerate(queries())]
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
        yaml.safe_dump({"groups": [{"name": "dashboards", "rules": rules}]}, file)
        file.flush()
        run(PROMTOOL, "check", "rules", "--lint=none", file.name)

    identifiers = set()
    alert_names = set(re.findall(r"alert: (\w+)", (DEPLOY / "prometheus/alerts.yml").read_text()))
    for name, dashboard in dashboards().items():
        require(dashboard["uid"] not in identifiers, f"{name}: its uid is another one's")
        identifiers.add(dashboard["uid"])
        numbers = [panel["id"] for panel in dashboard["panels"]]
        require(len(numbers) == len(set(numbers)), f"{name}: two panels have one id")
        taken = set()
        for panel in dashboard["panels"]:
            where = f"{name}, {panel['title']}"
            grid = panel["gridPos"]
            cells = {(x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])}
            require(not cells & taken and grid["x"] + grid["w"] <= 24, f"{where}: overlaps another panel")
            taken |= cells
            if panel["type"] == "row":
                continue
            require(len(panel["description"]) > 10, f"{where}: no description")
            require(panel["fieldConfig"]["defaults"].get("unit"), f"{where}: no unit")
            for source in [panel["datasource"], *(target["datasource"] for target in panel["targets"])]:
                require(source["uid"] == "${datasource}", f"{where}: a fixed data source")
            unknown = set(re.findall(r"Midge[A-Z]\w+", panel["description"])) - alert_names
            require(not unknown, f"{where}: no such alert: {unknown}")


# What the rest of the repository has to have


def metrics_exist():
    """Alerts and dashboards use only metrics that docs/metrics.md, which is made from the code, has."""
    reference = ROOT / "docs/metrics.md"
    documented = set(re.findall(r"`(midge_\w+)`", reference.read_text()))
    text = (DEPLOY / "prometheus/alerts.yml").read_text() + "".join(expression for _, expression in queries())
    used = set(re.findall(r"\bmidge_\w+", text))
    histograms = set(re.findall(r"`(midge_\w+)` \| histogram", reference.read_text()))
    documented |= {name + suffix for name in histograms for suffix in ("_bucket", "_sum", "_count")}
    require(used <= documented, f"not in docs/metrics.md: {', '.join(sorted(used - documented))}")


def keys(table, prefix=""):
    for name, value in table.items():
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def settings_exist():
    """Every setting in deploy/ is in docs/configuration.md, which a test compares with the code."""
    documented = set(re.findall(r"^\| `([\w.]+)` \|", (ROOT / "docs/configuration.md").read_text(), re.MULTILINE))
    used = {}
    for path in (DEPLOY / "kubernetes").rglob("midge.toml"):
        for key in keys(tomllib.loads(path.read_text())):
            used[key] = path.relative_to(ROOT)
    variables = list(load(ROOT / "docker-compose.yml")["services"]["midge"]["environment"])
    for variable in variables:
        used[variable.removeprefix("MIDGE_").lower().replace("__", ".")] = "docker-compose.yml"
    unknown = {key: where for key, where in used.items() if re.sub(r"^listeners\.\w+", "listeners.NAME", key) not in documented}
    require(not unknown, "not in docs/configuration.md: " + ", ".join(f"{key} ({where})" for key, where in unknown.items()))


def monitoring():
    monitored.check(TOOLS, os.environ["MIDGE_TEST_PROGRAM"], list(queries(monitored.RATE_WINDOW)))


def haproxy():
    run("haproxy", "-c", "-f", DEPLOY / "haproxy/haproxy.cfg")
    balancer.check(DEPLOY / "haproxy/haproxy.cfg", os.environ["MIDGE_TEST_PROGRAM"])


CHECKS = [
    compose, compose_secrets, dockerfile, yaml_style, kubernetes, prometheus, alerts, grafana, metrics_exist,
    settings_exist, haproxy, monitoring,
]


def main():
    chosen = [check for check in CHECKS if not sys.argv[1:] or check.__name__ in sys.argv[1:]]
    failed = 0
    for check in chosen:
        try:
            check()
        except (Failure, balancer.Failure, OSError, KeyError, ValueError) as failure:
            failed += 1
            print(f"{check.__name__}: FAILED\n{failure}")
        else:
            print(f"{check.__name__}: ok")
    print(f"deploy: {len(chosen) - failed} of {len(chosen)} checks passed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
