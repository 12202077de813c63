from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from gateway.errors import ConfigurationError
from gateway.forward.backends.file import FileSettings
from gateway.forward.route import COMBINATIONS, RouteTable
from gateway.forward.settings import BackendSettings, RouteMatch, RouteSettings
from gateway.wire.cloudevents import PayloadKind

BACKENDS: dict[str, BackendSettings] = {
    name: TypeAdapter[BackendSettings](BackendSettings).validate_python(settings)
    for name, settings in {
        "events": {"kind": "file", "path": "-"},
        "broker": {"kind": "tcp", "url": "tcp://127.0.0.1:1883"},
    }.items()
}


def route(
    name: str = "r", framing: str = "stream", backend: str = "broker", **settings: Any
) -> RouteSettings:
    return RouteSettings.model_validate({"name": name, "framing": framing, "backend": backend, **settings})


def table(*routes: RouteSettings) -> RouteTable:
    return RouteTable(routes, BACKENDS)


def chosen(routes: RouteTable, **session: str | None) -> str | None:
    facts: dict[str, Any] = {
        "listener": "tls",
        "realm": "default",
        "group": None,
        "identity": "d1",
        "alpn": None,
    }
    found = routes.choose(**(facts | session))
    return found.name if found else None


class TestChoose:
    @pytest.mark.parametrize(
        ("match", "fits", "misses"),
        [
            ({}, {}, None),
            ({"listener": "tls"}, {"listener": "tls"}, {"listener": "tls2"}),
            ({"realm": "a"}, {"realm": "a"}, {"realm": "A"}),
            ({"group": "meters"}, {"group": "meters"}, {"group": None}),
            ({"alpn": "mqtt"}, {"alpn": "mqtt"}, {"alpn": None}),
            ({"identity": "meter-*"}, {"identity": "meter-"}, {"identity": "a-meter-1"}),
            ({"identity": "meter-?"}, {"identity": "meter-1"}, {"identity": "meter-12"}),
            ({"identity": "[ab]*"}, {"identity": "b/c\nd"}, {"identity": "c"}),
            ({"identity": "Meter"}, {"identity": "Meter"}, {"identity": "meter"}),
            ({"realm": "a", "group": "g"}, {"realm": "a", "group": "g"}, {"realm": "a", "group": "h"}),
        ],
    )
    def test_match(
        self, match: dict[str, str], fits: dict[str, str | None], misses: dict[str, str | None] | None
    ) -> None:
        routes = table(route(match=match))
        assert chosen(routes, **fits) == "r"
        if misses is not None:
            assert chosen(routes, **misses) is None

    def test_first_match_wins(self) -> None:
        routes = table(route("a", match={"group": "g"}), route("b", match={"realm": "default"}), route("c"))
        assert chosen(routes, group="g") == "a"
        assert chosen(routes, group="h") == "b"
        assert chosen(routes, realm="other") == "c"

    def test_no_routes(self) -> None:
        assert chosen(table()) is None

    def test_alpn_names(self) -> None:
        routes = table(
            route("a", match={"alpn": "mqtt"}),
            route("b"),
            route("c", match={"alpn": "x"}),
            route("d", match={"alpn": "mqtt"}),
        )
        assert routes.alpn_names == ("mqtt", "x")


class TestCheck:
    def test_defaults(self) -> None:
        lines, stream = table(
            route("a", "lines", "events", content_type="application/json"), route("b")
        ).routes
        assert lines.ack
        assert lines.payload_kind is PayloadKind.JSON
        assert lines.backend_settings is BACKENDS["events"]
        assert not lines.reply
        assert not stream.ack
        assert stream.payload_kind is PayloadKind.BINARY

    def test_every_combination_of_the_table_works(self) -> None:
        kinds: dict[str, str] = {settings.kind: name for name, settings in BACKENDS.items()}
        for row in COMBINATIONS:
            if row.backend not in kinds:
                continue
            for ack in row.ack:
                (made,) = table(
                    route("r", row.framing, kinds[row.backend], delivery=row.delivery, ack=ack)
                ).routes
                assert made.ack is ack

    @pytest.mark.parametrize(
        ("settings", "text"),
        [
            (
                {"framing": "stream", "backend": "events"},
                "routes.r.backend: framing = stream does not go with a backend of kind file, only with tcp",
            ),
            (
                {"framing": "lines", "backend": "broker"},
                "routes.r.backend: framing = lines does not go with a backend of kind tcp, only with amqp or file or http or kafka or mqtt or mqtt unconfirmed or nats or nats unconfirmed or redis",
            ),
            (
                {"framing": "stream", "ack": True},
                (
                    "routes.r.ack: framing = stream, backend = tcp, delivery = direct does not go with ack = true, "
                    "only with false"
                ),
            ),
            (
                {"framing": "lines", "backend": "events", "reply": True},
                (
                    "routes.r.reply: framing = lines, backend = file, delivery = direct does not go with reply = true, "
                    "only with false"
                ),
            ),
            (
                {"backend": "brokre"},
                "routes.r.backend: there is no [backends.brokre] (there is: broker, events)",
            ),
        ],
    )
    def test_refused(self, settings: dict[str, Any], text: str) -> None:
        with pytest.raises(ConfigurationError) as caught:
            table(route(**settings))
        assert str(caught.value) == text

    def test_a_spool_that_has_no_effect(self) -> None:
        spool = {"sync": "normal"}
        assert (
            table(route("r", "lines", "events", delivery="spooled", spool=spool)).routes[0].spool.sync
            == "normal"
        )
        with pytest.raises(
            ConfigurationError, match=r'routes\.r\.spool: it has no effect: write delivery = "spooled"'
        ):
            table(route("r", "lines", "events", spool=spool))

    def test_two_routes_of_one_name(self) -> None:
        with pytest.raises(ConfigurationError, match="two routes are named a"):
            table(route("a"), route("b"), route("a"))

    def test_no_backends(self) -> None:
        with pytest.raises(ConfigurationError, match="there is: none yet"):
            RouteTable([route()], {})


class TestSettings:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"framing": "length64"},
            {"delivery": "pigeon"},
            {"colour": "red"},
            {"match": {"relam": "a"}},
            {"match": {"realm": ""}},
            {"name": "a b"},
            {"name": ""},
            {"content_type": "json"},
            {"content_type": "text/plain\nx: y"},
            {"content_type": "text/plain; charset"},
            {"content_type": "text/" + "x" * 255},
            {"backend": ""},
        ],
    )
    def test_wrong(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            route(**wrong)

    @pytest.mark.parametrize(
        "content_type", ["text/plain", "text/plain; charset=utf-8", 'application/x.y+json;a="b c"']
    )
    def test_content_type(self, content_type: str) -> None:
        assert route(content_type=content_type).content_type == content_type

    def test_frozen(self) -> None:
        with pytest.raises(ValidationError):
            route().name = "other"  # type: ignore[misc]  # that is what must fail

    def test_every_setting_is_described(self) -> None:
        for model in (RouteSettings, RouteMatch, FileSettings):
            for name, field in model.model_fields.items():
                assert name == "kind" or field.description, f"{model.__name__}.{name}"

    def test_backends_by_kind(self) -> None:
        adapter = TypeAdapter[BackendSettings](BackendSettings)
        with pytest.raises(ValidationError, match="'file', 'tcp'"):
            adapter.validate_python({"kind": "carrier-pigeon"})
        with pytest.raises(ValidationError):
            adapter.validate_python({"kind": "file", "path": "x", "fsync": "sometimes"})
