"""Settings of the backends: what is refused, that secrets are masked, that a missing library is said."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from gateway.config import effective, load
from gateway.errors import ConfigurationError

SECRET = "s3cret-of-sixteen-or-more"


def config(tmp_path: Path, backend: str, route: str = "") -> Path:
    path = tmp_path / "gateway.toml"
    path.write_text(
        '[[listeners]]\nname = "tls"\nbind = "127.0.0.1:0"\n'
        f'[[routes]]\nname = "r"\nframing = "lines"\nbackend = "b"\n{route}\n[backends.b]\n{backend}\n'
    )
    return path


def shown(tmp_path: Path, backend: str) -> dict[str, Any]:
    tree = effective(load(config(tmp_path, backend), {}))
    assert SECRET not in json.dumps(tree)
    found = tree["backends"]["b"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    "backend",
    [
        f'kind = "mqtt"\nurl = "mqtt://gateway:{SECRET}@localhost"\ntopic = "up/{{device}}"',
        f'kind = "mqtt"\nurl = "mqtt://localhost"\nusername = "gateway"\npassword = "{SECRET}"\ntopic = "up"',
        f'kind = "nats"\nurl = "nats://localhost"\ntoken = "{SECRET}"\nsubject = "up"',
        f'kind = "amqp"\nurl = "amqp://gateway:{SECRET}@localhost/vhost"\nrouting_key = "up"',
        f'kind = "redis"\nurl = "redis://:{SECRET}@localhost/0"\nstream = "up"',
        f'kind = "kafka"\nbrokers = ["localhost:9092"]\nusername = "gateway"\npassword = "{SECRET}"\ntopic = "up"',
        f'kind = "http"\nurl = "https://gateway:{SECRET}@localhost/x"\nsecret = "{SECRET}"',
        f'kind = "http"\nurl = "https://localhost/x"\ntoken = "{SECRET}"',
    ],
)
def test_secrets_are_masked(tmp_path: Path, backend: str) -> None:
    assert "***" in json.dumps(shown(tmp_path, backend))


@pytest.mark.parametrize("key", ["password", "url"])
def test_secrets_from_files(tmp_path: Path, key: str) -> None:
    (tmp_path / "file").write_text(
        f"{SECRET if key == 'password' else f'mqtt://gateway:{SECRET}@localhost'}\n"
    )
    rest = 'url = "mqtt://localhost"\nusername = "gateway"' if key == "password" else ""
    path = config(tmp_path, f'kind = "mqtt"\ntopic = "up"\n{rest}\n{key}_file = "file"')
    settings: Any = load(path, {}).backends["b"]
    assert SECRET in (settings.url if key == "url" else settings.password.get_secret_value())
    assert SECRET not in json.dumps(effective(load(path, {})))
    assert SECRET not in repr(settings)


MQTT = 'kind = "mqtt"\nurl = "mqtt://localhost"\n'


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        (MQTT, "backends.b.topic: is missing"),
        (MQTT + 'topic = "up/{who}"', "knows no {who}"),
        (MQTT + 'topic = "up/#"', "wildcards"),
        (MQTT + 'topic = "up"\nversion = 4', "backends.b.version: must be 5 or '3.1.1'"),
        (MQTT + 'topic = "up"\ncert_file = "x"', "no effect without TLS: write mqtts://"),
        (MQTT + 'topic = "up"\nkey_file = "x"', "key_file is given without cert_file"),
        (MQTT + 'topic = "up"\npassword = "x"', "password is given without username"),
        (
            f'kind = "mqtt"\nurl = "http://u:{SECRET}@localhost"\ntopic = "up"',
            "must begin with mqtt:// or mqtts://",
        ),
        (f'kind = "mqtt"\nurl = "mqtt://u:{SECRET}@localhost:99999"\ntopic = "up"', "is not a URL"),
        (
            f'kind = "nats"\nurl = "nats://u:{SECRET}@localhost"\ntoken = "x"\nsubject = "up"',
            "keep one of the two",
        ),
        ('kind = "nats"\nurl = "nats://localhost"\nsubject = "up..x"', "single dots"),
        ('kind = "redis"\nurl = "redis://localhost/x"\nstream = "up"', "database that is no number"),
        ('kind = "kafka"\nbrokers = ["localhost"]\ntopic = "up"', "backends.b.brokers[0]"),
        ('kind = "kafka"\nbrokers = ["h:1"]\ntopic = "a b"', "only letters, digits"),
        ('kind = "http"\nurl = "ftp://localhost"', "http://host/path or https://host/path"),
        ('kind = "http"\nurl = "http://h"\nheaders = { "X-A" = "{device}" }', "a batch has many devices"),
        (
            'kind = "http"\nurl = "http://h"\nheaders = { "Content-Type" = "x" }',
            "no name for a header of yours",
        ),
        ('kind = "http"\nurl = "http://h"\nsecret = "short"', "at least 16"),
        ('kind = "tcp"\nurl = "tcp://localhost"', "no port"),
        (f'kind = "tcp"\nurl = "tcp://u:{SECRET}@localhost:1"', "a user"),
        ('kind = "file"\npath = "-"\nrotate_bytes = 1000', "no effect on stdout"),
        ('kind = "carrier-pigeon"', "must be"),
    ],
)
def test_refused(tmp_path: Path, backend: str, said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(config(tmp_path, backend), {})
    text = str(caught.value)
    assert said in text
    assert "backends.b" in text
    assert SECRET not in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("backend", "library", "extra"),
    [
        (MQTT + 'topic = "up"', "aiomqtt", "mqtt"),
        ('kind = "nats"\nurl = "nats://h"\nsubject = "up"', "nats", "nats"),
        ('kind = "amqp"\nurl = "amqp://h"\nrouting_key = "up"', "aio_pika", "amqp"),
        ('kind = "redis"\nurl = "redis://h"\nstream = "up"', "redis", "redis"),
        ('kind = "kafka"\nbrokers = ["h:1"]\ntopic = "up"', "confluent_kafka", "kafka"),
    ],
)
def test_a_missing_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, library: str, extra: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, package=None: None if name == library else find(name, package),
    )
    with pytest.raises(ConfigurationError, match=rf"pip install 'psk-gateway\[{extra}\]'"):
        load(config(tmp_path, backend), {})


@pytest.mark.parametrize(
    "backend",
    [MQTT + 'topic = "up"\nqos = 0', 'kind = "nats"\nurl = "nats://h"\nsubject = "up"\njetstream = false'],
)
@pytest.mark.parametrize("route", ["ack = true", 'delivery = "spooled"'])
def test_what_does_not_confirm_serves_no_acknowledged_route(tmp_path: Path, backend: str, route: str) -> None:
    with pytest.raises(ConfigurationError):
        load(config(tmp_path, backend, route), {})
    load(config(tmp_path, backend, "ack = false"), {})


def test_a_batch_has_no_replies(tmp_path: Path) -> None:
    backend = 'kind = "http"\nurl = "http://h"'
    with pytest.raises(ConfigurationError, match=r"routes\.r\.reply: .*mode = \"binary\""):
        load(config(tmp_path, backend, "reply = true"), {})
    load(config(tmp_path, backend + '\nmode = "binary"', "reply = true"), {})
