"""Templates: what stands in a topic is what the operator wrote and what the registry knows, or nothing is sent."""

import pytest
from hypothesis import given, strategies as st

from gateway.errors import BackendRefused
from gateway.forward.backends.amqp import ROUTING_KEY_RULES
from gateway.forward.backends.http import HEADER_RULES
from gateway.forward.backends.kafka import TOPIC_RULES as KAFKA_RULES
from gateway.forward.backends.mqtt import TOPIC_RULES as MQTT_RULES
from gateway.forward.backends.nats import SUBJECT_RULES
from gateway.forward.backends.redis import STREAM_RULES
from gateway.forward.message import Message
from gateway.forward.template import Rules, Template


def message(
    device: str = "meter-7",
    *,
    identity: str = "id-1",
    group: str | None = "meters",
    labels: dict[str, str] | None = None,
) -> Message:
    labels = {"site": "north"} if labels is None else labels
    return Message("default", device, identity, group, "s", 1, 0.0, b"", labels)


def test_all_placeholders() -> None:
    template = Template("a/{realm}/{device}/{group}/{identity}/{label.site}/{{x}}", MQTT_RULES)
    assert template.render(message()) == "a/default/meter-7/meters/id-1/north/{x}"
    assert not template.is_constant


def test_constant() -> None:
    template = Template("a/b", MQTT_RULES)
    assert template.is_constant
    assert template.render(message()) == "a/b"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("a/{nobody}", "knows no {nobody}"),
        ("a/{label.}", "knows no"),
        ("a/{device", "lone {"),
        ("a/device}", "lone }"),
        ("a\nb", "control character"),
        ("a/+/b", "not valid"),
        ("$SYS/x", "not valid"),
        ("x" * 65_536, "longer than 65535 bytes"),
    ],
)
def test_templates_that_cannot_be(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("{", "[{]").replace("}", "[}]")):
        Template(text, MQTT_RULES)


@pytest.mark.parametrize(
    ("rules", "text", "values"),
    [
        (MQTT_RULES, "up/{device}", ["a/b", "+", "a+", "#", "x/../y", "a\r\nb", "a\x00b"]),
        (MQTT_RULES, "{device}/up", ["$SYS"]),
        (SUBJECT_RULES, "up.{device}", ["a.b", "*", ">", "a b", "a\tb", "a\r\nPUB x 1", "a\u00a0b"]),
        (ROUTING_KEY_RULES, "up.{device}", ["a.b", "#", "*", "a\nb", "x" * 253]),
        (STREAM_RULES, "up:{device}", ["a:b", "{x}", "a\nb"]),
        (KAFKA_RULES, "up.{device}", ["a.b", "a/b", "a b", "ä", "x" * 250, "a\n"]),
        (HEADER_RULES, "{device}", ["a\r\nX-Evil: 1", "a\nb", "ä", "a\x7f"]),
    ],
)
def test_what_a_value_may_not_hold(rules: Rules, text: str, values: list[str]) -> None:
    template = Template(text, rules)
    assert template.render(message("meter-7"))
    for value in values:
        with pytest.raises(BackendRefused) as caught:
            template.render(message(value))
        assert value not in str(caught.value) or len(value) == 1
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("x/{group}", message(group=None)),
        ("x/{label.site}", message(labels={})),
        ("x/{label.site}", message(labels={"site": ""})),
    ],
)
def test_what_a_device_does_not_have(text: str, sent: Message) -> None:
    with pytest.raises(BackendRefused, match="is empty for this device"):
        Template(text, MQTT_RULES).render(sent)


@given(st.text(max_size=50))
def test_a_value_keeps_its_place(value: str) -> None:
    try:
        topic = Template("a/{device}/b", MQTT_RULES).render(message(value))
    except BackendRefused:
        return
    assert topic.split("/") == ["a", value, "b"]
    assert not set(topic) & set("+#\r\n\x00")
