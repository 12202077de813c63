import pytest
from pydantic import ValidationError

from gateway.server.admission.limits_settings import LimitsSettings
from gateway.server.settings import Address, ListenerSettings, NodeSettings


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("0.0.0.0:8883", "0.0.0.0", 8883),
        ("127.0.0.1:0", "127.0.0.1", 0),
        ("gateway.example:65535", "gateway.example", 65535),
        ("[::]:8883", "::", 8883),
        ("[2001:db8::1]:1", "2001:db8::1", 1),
    ],
)
def test_an_address_is_read_and_written_alike(text: str, host: str, port: int) -> None:
    address = Address.parse(text)
    assert (address.host, address.port) == (host, port)
    assert str(address) == text


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("127.0.0.1", "write host:port"),
        ("", "write host:port"),
        (":8883", r"write 0.0.0.0:8883"),
        ("[]:8883", "not an IPv6 address"),
        ("::1:8883", r"write \[::1\]:8883"),
        ("[127.0.0.1]:8883", "not an IPv6 address"),
        ("127.0.0.1:", "not a port"),
        ("127.0.0.1:65536", "0 to 65535"),
        ("127.0.0.1:-1", "not a port"),
        ("127.0.0.1:٣", "not a port"),
        ("127.0.0.1:http", "not a port"),
        ("tcp://127.0.0.1:8883", "IPv6 address stands in brackets"),
        ("host name:8883", "not a host name"),
        ("[::1:8883", "IPv6 address stands in brackets"),
    ],
)
def test_what_is_no_address_is_refused_with_advice(text: str, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        Address.parse(text)


def test_the_defaults_of_limits_are_within_their_bounds_and_fit_together() -> None:
    limits = LimitsSettings()
    assert LimitsSettings.model_validate(limits.model_dump()) == limits
    assert limits.connections_per_address <= limits.connections
    assert limits.handshake_timeout_s < limits.first_message_timeout_s < limits.idle_timeout_s


def test_every_setting_says_what_it_is_for() -> None:
    for model in (NodeSettings, LimitsSettings, ListenerSettings):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"


def test_networks_are_written_in_cidr_notation() -> None:
    values = {"name": "tls", "bind": "127.0.0.1:0"}
    listener = ListenerSettings.model_validate(values | {"proxy_protocol_from": ["10.0.0.0/8", "::1"]})
    assert listener.proxy_protocol_from == ("10.0.0.0/8", "::1/128")
    for wrong in ("10.0.0.1/8", "balancer", ""):
        with pytest.raises(ValidationError, match="write it like"):
            ListenerSettings.model_validate(values | {"proxy_protocol_from": [wrong]})


def test_server_names_are_compared_without_regard_to_case() -> None:
    listener = ListenerSettings.model_validate(
        {"name": "tls", "bind": "127.0.0.1:0", "realms_by_sni": {"Plant.Example": "plant"}}
    )
    assert listener.realms_by_sni == {"plant.example": "plant"}


@pytest.mark.parametrize("name", ["", "example.", "two words", "ä.example"])
def test_what_no_client_sends_as_server_name_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="not a server name"):
        ListenerSettings.model_validate(
            {"name": "tls", "bind": "127.0.0.1:0", "realms_by_sni": {name: "plant"}}
        )
