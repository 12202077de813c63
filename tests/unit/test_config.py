import json
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.cli.config import to_toml
from gateway.config import GatewaySettings, effective, find_config, load
from gateway.errors import ConfigurationError
from gateway.forward.backends.file import FileSettings
from gateway.forward.backends.tcp import TcpSettings
from gateway.server.settings import Address

EXAMPLE = """\
[node]
workers = 1
data_dir = "data"
[registry]
url = "sqlite:///registry.db"
master_key_file = "master.key"
[admin]
bind = "127.0.0.1:9464"
[[listeners]]
name = "tls"
bind = "127.0.0.1:8883"
realm = "default"
profile = "compatible"
[[routes]]
name = "readings"
match = { group = "meters" }
framing = "lines"
delivery = "direct"
ack = true
content_type = "application/json"
backend = "events"
[[routes]]
name = "everything-else"
framing = "stream"
backend = "broker"
[backends.events]
kind = "file"
path = "events.jsonl"
[backends.broker]
kind = "tcp"
url = "tcp://127.0.0.1:1883"
"""
"""The whole configuration of the contract, which must run as it stands."""

Load = Callable[..., GatewaySettings]


@pytest.fixture
def load_text(tmp_path: Path) -> Load:
    """Load a text as gateway.toml, with these variables in the environment."""

    def load_text(text: str, **environ: str) -> GatewaySettings:
        path = tmp_path / "gateway.toml"
        path.write_text(text, "utf-8")
        return load(path, environ)

    return load_text


def changed(old: str, new: str) -> str:
    assert old in EXAMPLE
    return EXAMPLE.replace(old, new, 1)


def refusal(load_text: Load, text: str, **environ: str) -> str:
    """The one line that is said about a configuration, without the name of the file."""
    with pytest.raises(ConfigurationError) as caught:
        load_text(text, **environ)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("environment variable ") or "gateway.toml" in line
    return line.rsplit("gateway.toml: ", maxsplit=1)[-1]


def test_the_example_of_the_contract_loads_as_it_stands(load_text: Load, tmp_path: Path) -> None:
    settings = load_text(EXAMPLE)

    assert settings.node.workers == 1
    assert settings.node.data_dir == tmp_path / "data"
    assert settings.registry.url == f"sqlite:///{tmp_path}/registry.db"
    assert settings.registry.master_key_file == tmp_path / "master.key"
    assert settings.admin.bind == Address("127.0.0.1", 9464)
    (listener,) = settings.listeners
    assert (listener.name, listener.bind, listener.realm, listener.profile) == (
        "tls",
        Address("127.0.0.1", 8883),
        "default",
        "compatible",
    )
    readings, rest = settings.routes
    assert (readings.match.group, readings.framing, readings.ack) == ("meters", "lines", True)
    assert (rest.match.group, rest.framing, rest.content_type) == (None, "stream", "application/octet-stream")
    events, broker = settings.backends["events"], settings.backends["broker"]
    assert isinstance(events, FileSettings)
    assert events.path == str(tmp_path / "events.jsonl")
    assert isinstance(broker, TcpSettings)


def test_what_is_left_out_has_its_default(load_text: Load, tmp_path: Path) -> None:
    text = EXAMPLE[EXAMPLE.index("[[listeners]]") :]
    settings = load_text(text)

    assert settings.node.data_dir == tmp_path / "data"
    assert settings.node.drain_s == 10
    assert settings.registry.url == f"sqlite:///{tmp_path}/registry.db"
    assert settings.registry.master_key_file == tmp_path / "master.key"
    assert settings.admin.bind == Address("127.0.0.1", 9464)
    assert settings.limits.first_message_timeout_s == 60


def test_absolute_paths_and_stdout_stay_as_they_are(load_text: Load) -> None:
    text = changed('"events.jsonl"', '"-"').replace('"master.key"', '"/etc/keys/master.key"')
    text = text.replace("sqlite:///registry.db", "sqlite:////var/lib/registry.db")
    settings = load_text(text)

    events = settings.backends["events"]
    assert isinstance(events, FileSettings)
    assert events.path == "-"
    assert settings.registry.master_key_file == Path("/etc/keys/master.key")
    assert settings.registry.url == "sqlite:////var/lib/registry.db"


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        # unknown keys
        ("profile =", "profle =", "listeners[0].profle: unknown key, is profile meant?"),
        ("[node]", "[nodes]", "nodes: unknown key, is node meant?"),
        ("workers = 1", "x = 1", "node.x: unknown key, known here: name, workers, data_dir, drain_s"),
        ("group =", "grop =", "routes[0].match.grop: unknown key, is group meant?"),
        ("path =", "pth =", "backends.events.pth: unknown key, is path meant? (1 more wrong)"),
        ('url = "sqlite', 'url_fil = "sqlite', "registry.url_fil: unknown key, is url_file meant?"),
        # of later versions, so unknown
        ("profile = ", 'proxy_protocol_from = ["10.0.0.1/8"]\nprofile = ', "listeners[0].proxy_protocol_from[0]: '10.0.0.1/8' is no"),
        ("[admin]", '[admin]\npassword = "t"', "admin.password: unknown key"),
        ("[admin]", "max_staleness_s = -1\n[admin]", "registry.max_staleness_s: "),
        (
            '"compatible"',
            '"legacy"',
            "listeners[0].profile: must be 'modern', 'compatible' or 'constrained', not 'legacy'",
        ),
        ('"direct"', '"later"', "routes[0].delivery: must be 'direct' or 'spooled', not 'later'"),
        ('kind = "tcp"', 'kind = "carrier-pigeon"', "backends.broker.kind: must be"),
        # wrong types: TOML has types, so nothing is converted
        ("workers = 1", 'workers = "1"', "node.workers: must be a whole number, not '1'"),
        ("workers = 1", "workers = true", "node.workers: must be a whole number, not true"),
        ("workers = 1", "workers = 1.5", "node.workers: must be a whole number, not 1.5"),
        ("workers = 1", 'drain_s = "long"', "node.drain_s: must be a number, not 'long'"),
        ("workers = 1", "drain_s = 2027-01-31", "node.drain_s: must be a number"),
        ("workers = 1", "drain_s = nan", "node.drain_s: must be a finite number, not nan"),
        ("workers = 1", "name = 7", "node.name: must be a text in quotes, not 7"),
        ("ack = true", "ack = 1", "routes[0].ack: must be true or false, not 1"),
        ('bind = "127.0.0.1:8883"', "bind = 8883", "listeners[0].bind: must be a text as host:port"),
        ('match = { group = "meters" }', 'match = "meters"', "routes[0].match: must be a table, not 'meters'"),
        ("[[listeners]]", "[listeners]", "listeners: must be a list, write [[listeners]]"),
        ('[backends.events]\nkind = "file"\npath = "events.jsonl"', "[backends]\nevents = 3", "backends.events: "),
        # wrong values
        ("workers = 1", "workers = -1", "node.workers: must be at least 0, not -1"),
        ("workers = 1", "workers = 1000", "node.workers: must be at most 256, not 1000"),
        ("[admin]", "[limits]\nidle_timeout_s = 0\n[admin]", "limits.idle_timeout_s: must be more than 0, not 0"),
        ("[admin]", '[log]\nlevel = "loud"\n[admin]', "log.level: must be 'debug', 'info', 'warning' or 'error', not"),
        ('name = "tls"', 'name = ""', "listeners[0].name: must have at least 1 character, not ''"),
        ('name = "tls"', 'name = "t l"', "listeners[0].name: must begin with a letter or digit and go on with"),
        ("application/json", "json", "routes[0].content_type: must be a media type such as application/json"),
        ("sqlite:///registry.db", "oracle://u:hunter2@h/d", "registry.url: has the driver oracle: use sqlite"),
        ("tcp://127", "mqtt://u:hunter2@127", "backends.broker.url: it is not the URL of a TCP service"),
        # missing
        ('name = "tls"\n', "", "listeners[0].name: is missing, write name = ..."),
        ('backend = "broker"', "", "routes[1].backend: is missing, write backend = ..."),
        ('kind = "file"\n', "", "backends.events.kind: is missing, write kind = 'file' or 'tcp'"),
        # what does not go together
        ('"127.0.0.1:8883"', '"127.0.0.1:9464"', "listeners[0].bind: 127.0.0.1:9464 is admin.bind too, choose"),
        ('"meters" }', '"meters", listener = "tsl" }', "routes[0].match.listener: there is no listener tsl (there is: tls)"),
        ('backend = "events"', 'backend = "evnts"', "routes.readings.backend: there is no [backends.evnts]"),
        ('framing = "lines"', 'framing = "stream"', "routes.readings.backend: framing = stream does not go with"),
        ("everything-else", "readings", "routes: two routes are named readings: give one another name"),
    ],
)  # fmt: skip
def test_each_mistake_is_named_with_key_and_advice(load_text: Load, old: str, new: str, line: str) -> None:
    found = refusal(load_text, changed(old, new))
    assert found.startswith(line)
    assert "hunter2" not in found


def test_listeners_of_the_same_name_or_address_are_refused(load_text: Load) -> None:
    second = '[[listeners]]\nname = "{}"\nbind = "127.0.0.1:{}"\n[[routes]]'
    both = changed("[[routes]]", second.format("tls", 1))
    assert refusal(load_text, both) == "listeners[1].name: tls is taken, give it another name"
    both = changed("[[routes]]", second.format("tls2", 8883))
    assert refusal(load_text, both).startswith("listeners[1].bind: 127.0.0.1:8883 is listeners[0].bind too")


def test_free_ports_do_not_clash(load_text: Load) -> None:
    text = EXAMPLE.replace("8883", "0").replace("9464", "0")
    text = text.replace("[[routes]]", '[[listeners]]\nname = "second"\nbind = "127.0.0.1:0"\n[[routes]]', 1)
    assert len(load_text(text).listeners) == 2


def test_a_configuration_without_listener_or_route_says_what_to_add(load_text: Load) -> None:
    assert refusal(load_text, "") == "listeners: there is none, add a [[listeners]] table with name and bind"
    listener = EXAMPLE[EXAMPLE.index("[[listeners]]") : EXAMPLE.index("[[routes]]")]
    assert refusal(load_text, listener).startswith("routes: there is none, add a [[routes]] table")


def test_the_file_itself_may_be_the_trouble(tmp_path: Path) -> None:
    path = tmp_path / "gateway.toml"
    with pytest.raises(
        ConfigurationError, match=r"gateway.toml does not exist: name another .*gatewayctl init DIR"
    ):
        load(path, {})
    with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
        load(tmp_path, {})
    path.write_text("[node\n")
    with pytest.raises(ConfigurationError, match=r"gateway.toml is not valid TOML: .*line 1"):
        load(path, {})
    path.write_bytes(b"name = '\xff'")
    with pytest.raises(ConfigurationError, match=r"is not UTF-8 \(byte 8\)"):
        load(path, {})
    path.write_bytes(b"#" * (5 * 1024 * 1024))
    with pytest.raises(ConfigurationError, match="more than 4194304 bytes"):
        load(path, {})


# The environment


def test_variables_override_single_values_and_are_converted(load_text: Load) -> None:
    settings = load_text(
        EXAMPLE,
        PSKGW_NODE__WORKERS="3",
        PSKGW_NODE__NAME="12",
        PSKGW_LIMITS__IDLE_TIMEOUT_S="1.5",
        PSKGW_REGISTRY__URL="postgresql://u@host/db",
        PSKGW_ADMIN__BIND="[::1]:9464",
        PSKGW_BACKENDS__EVENTS__PATH="-",
        PSKGW_BACKENDS__NEW__KIND="tcp",
        PSKGW_BACKENDS__NEW__URL="tcp://localhost:1",
    )
    assert settings.node.workers == 3
    assert settings.node.name == "12"
    assert settings.limits.idle_timeout_s == 1.5
    assert settings.registry.url.startswith("postgresql+psycopg://u@host/db")
    assert settings.admin.bind == Address("::1", 9464)
    events = settings.backends["events"]
    assert isinstance(events, FileSettings)
    assert events.path == "-"
    assert settings.backends["new"].kind == "tcp"


def test_lists_and_tables_are_json(load_text: Load) -> None:
    settings = load_text(
        EXAMPLE,
        PSKGW_LISTENERS='[{"name": "a", "bind": "127.0.0.1:0"}, {"name": "b", "bind": "127.0.0.1:0"}]',
        PSKGW_LOG='{"level": "debug"}',
    )
    assert [listener.name for listener in settings.listeners] == ["a", "b"]
    assert settings.log.level == "debug"


def test_a_backend_is_found_whatever_the_case_and_dashes_of_its_name(load_text: Load) -> None:
    text = EXAMPLE.replace('"events"', '"Event-Log"').replace("[backends.events]", "[backends.Event-Log]")
    settings = load_text(text, PSKGW_BACKENDS__EVENT_LOG__PATH="-")
    assert list(settings.backends) == ["Event-Log", "broker"]


def test_variables_of_others_are_let_be(load_text: Load) -> None:
    load_text(
        EXAMPLE, PSKGW_PORT="tcp://10.0.0.1:8883", PSKGW_KEY="00", PSKGW_CONFIG="x", NODE__WORKERS="many"
    )


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("PSKGW_NODE__WORKERS", "many", "node.workers: must be a whole number, not 'many'"),
        ("PSKGW_NODE__WORKRS", "2", "node.workrs: unknown key, is workers meant?"),
        ("PSKGW_NODES__WORKERS", "2", "nodes: unknown key, is node meant?"),
        ("PSKGW_LISTENERS", "[{", "listeners: must be a list, not '[{'"),
        (
            "PSKGW_LISTENERS__BIND",
            "x",
            "listeners has no keys of its own: a list is set as a whole, as JSON in ",
        ),
        ("PSKGW_REGISTRY__URL", "oracle://u:hunter2@h/d", "registry.url: has the driver oracle"),
    ],
)
def test_a_wrong_variable_is_named(load_text: Load, name: str, value: str, line: str) -> None:
    found = refusal(load_text, EXAMPLE, **{name: value})
    assert found.startswith(f"environment variable {name}: {line}")
    assert "hunter2" not in found


# Secrets


def test_a_secret_can_stand_in_a_file(load_text: Load, tmp_path: Path) -> None:
    (tmp_path / "url").write_text("postgresql://u:hunter2@host/db\n")
    settings = load_text(changed('url = "sqlite:///registry.db"', 'url_file = "url"'))
    assert settings.registry.url == "postgresql+psycopg://u:hunter2@host/db"


def test_a_variable_replaces_the_file_s_way_to_give_a_secret(load_text: Load, tmp_path: Path) -> None:
    (tmp_path / "url").write_text("postgresql://u:hunter2@host/db\n")
    from_file = changed('url = "sqlite:///registry.db"', 'url_file = "url"')
    assert load_text(from_file, PSKGW_REGISTRY__URL="sqlite:///r.db").registry.url.endswith("/r.db")
    assert "hunter2" in load_text(EXAMPLE, PSKGW_REGISTRY__URL_FILE="url").registry.url


def test_a_secret_given_twice_or_not_readable_is_refused(load_text: Load, tmp_path: Path) -> None:
    twice = changed("[registry]", '[registry]\nurl_file = "url"')
    assert refusal(load_text, twice) == "registry.url_file: url is given too: keep one of the two"
    missing = changed('url = "sqlite:///registry.db"', 'url_file = "url"')
    assert refusal(load_text, missing).endswith("/url cannot be read: No such file or directory")
    (tmp_path / "url").write_text("\n")
    assert refusal(load_text, missing).endswith("/url is empty")
    number = changed('url = "sqlite:///registry.db"', "url_file = 1")
    assert refusal(load_text, number) == "registry.url_file: must be a text in quotes, the name of a file"


def test_the_effective_tree_has_defaults_and_no_secret(load_text: Load) -> None:
    tree = effective(load_text(EXAMPLE, PSKGW_REGISTRY__URL="postgresql://u:hunter2@host/db?sslmode=require"))

    assert tree["registry"]["url"] == "postgresql+psycopg://u:***@host/db?sslmode=require"
    assert tree["node"]["drain_s"] == 10
    assert tree["listeners"][0]["bind"] == "127.0.0.1:8883"
    assert [route["ack"] for route in tree["routes"]] == [True, False]
    assert "hunter2" not in json.dumps(tree)


def test_the_effective_tree_reads_as_toml(load_text: Load) -> None:
    tree = effective(load_text(changed('realm = "default"', 'realms_by_sni = { "a.example" = "a\\"b" }')))
    assert tomllib.loads(to_toml(tree)) == tree


# Where the file is


def test_the_option_comes_before_the_environment_and_that_before_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gateway.toml").touch()
    assert find_config(Path("a.toml"), {"PSKGW_CONFIG": "b.toml"}) == Path("a.toml")
    assert find_config(None, {"PSKGW_CONFIG": "b.toml"}) == Path("b.toml")
    assert find_config(None, {"PSKGW_CONFIG": ""}) == Path("gateway.toml")


def test_no_configuration_anywhere_says_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gateway.config.SYSTEM_FILE", tmp_path / "etc" / "gateway.toml")
    with pytest.raises(ConfigurationError, match=r"neither ./gateway.toml nor .*etc/gateway.toml is there"):
        find_config(None, {})
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "gateway.toml").touch()
    assert find_config(None, {}) == tmp_path / "etc" / "gateway.toml"


def test_paths_are_relative_to_the_file_and_not_to_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "gateway.toml").write_text(EXAMPLE)
    monkeypatch.chdir(tmp_path)
    settings = load(Path(os.path.relpath(tmp_path / "etc" / "gateway.toml")), {})
    assert settings.node.data_dir == tmp_path / "etc" / "data"


def test_no_setting_is_left_without_a_model_that_refuses_unknown_keys(load_text: Load) -> None:
    def models(value: Any) -> list[Any]:
        if isinstance(value, dict):
            return [model for each in value.values() for model in models(each)]
        if isinstance(value, tuple):
            return [model for each in value for model in models(each)]
        if hasattr(type(value), "model_fields"):
            return [value, *models(dict(value))]
        return []

    found = models(load_text(EXAMPLE))
    assert len(found) > 10
    for model in found:
        assert model.model_config.get("extra") == "forbid", type(model).__name__
        assert model.model_config.get("frozen"), type(model).__name__


def test_a_table_may_leave_out_the_folder_of_the_data(load_text: Load, tmp_path: Path) -> None:
    settings = load_text(EXAMPLE.replace('data_dir = "data"\n', ""))
    assert settings.node.data_dir == tmp_path / "data"
    elsewhere = load_text(EXAMPLE.replace('data_dir = "data"\n', ""), PSKGW_NODE__DATA_DIR="/var/lib/gateway")
    assert elsewhere.node.data_dir == Path("/var/lib/gateway")
