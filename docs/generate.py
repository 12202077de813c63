"""Write docs/reference from the code: `python -m docs.generate`, which `make reference` calls.

What stands there are declarations and nothing else: the command tree with the `--help` of each option, the fields of the
settings with their descriptions and bounds, the metrics as they are registered, and the tree of errors. Whatever needs
more words has a page of its own in docs/. A test holds the committed pages to what is generated.
"""

import enum
import inspect
import ssl
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Union, cast, get_args, get_origin, get_type_hints

from prometheus_client import CollectorRegistry
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typer.main import get_command

import gateway.cli
import gateway.errors
from gateway.config import SECRET_KEYS, SECTIONS, GatewaySettings
from gateway.errors import GatewayError, PeerFault
from gateway.forward.settings import BackendSettings, RouteSettings
from gateway.server.settings import Address, ListenerSettings
from gateway.telemetry.metrics import FollowerMetrics, Outcome, SupervisorMetrics, WorkerMetrics
from gateway.wire.framing import Reason

__all__ = ["pages"]

FOLDER: Final = Path(__file__).parent / "reference"
MARK: Final = "<!-- Generated from the code by `make reference`: change the code, not this page. -->\n\n"


def pages() -> dict[str, str]:
    """The pages of docs/reference by their file names."""
    bodies = {
        "commands.md": commands(),
        "configuration.md": configuration(),
        "metrics.md": metrics(),
        "errors.md": errors(),
    }
    return {name: MARK + "\n".join(lines).rstrip() + "\n" for name, lines in bodies.items()}


def table(head: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> list[str]:
    """A table of Markdown, followed by an empty line; none when it has no rows."""
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *lines, ""] if lines else []


def code(text: object) -> str:
    """As code; nothing stays nothing."""
    return f"`{text}`" if text not in (None, "") else ""


def prose(text: str | None) -> str:
    """A docstring as one paragraph."""
    return " ".join((text or "").split())


# Commands


def commands() -> Iterator[str]:
    """Every command with its arguments and options, by family."""
    yield from ["# Commands", "", prose(gateway.cli.__doc__.split("\n\n")[1].partition("Heavy")[0]), ""]
    yield from ["What goes with each, and examples: [the commands explained](../commands.md).", ""]
    # typer declares the tree as commands, not as the group that it is.
    tree: dict[str, Any] = cast("Any", get_command(gateway.cli.root_app())).commands
    for panel in dict.fromkeys(command.rich_help_panel for command in tree.values()):
        yield from [f"## {panel}", ""]
        for name, command in tree.items():
            if command.rich_help_panel == panel:
                yield from _command(name, command)


def _command(name: str, command: Any) -> Iterator[str]:
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    words = [f"{each.metavar}" if each.required else f"[{each.metavar}]" for each in arguments]
    yield from [f"### {name}", "", f"`{' '.join(['gatewayctl', name, '[OPTIONS]', *words])}`", ""]
    yield from [prose(command.help), ""]
    hints = get_type_hints(inspect.unwrap(command.callback), include_extras=True)
    rows = (_parameter(each, hints[each.name]) for each in command.params)
    yield from table(("argument, option", "values", "default", "meaning"), rows)


def _parameter(parameter: Any, annotation: Any) -> Sequence[str]:
    option = parameter.param_type_name == "option"
    names = [*parameter.opts, *parameter.secondary_opts] if option else [parameter.metavar]
    values = _values(annotation)
    if option and parameter.metavar and not values.startswith("`"):
        names = [f"{name} {parameter.metavar}" for name in names]
    bounds = _range(getattr(parameter, "min", None), getattr(parameter, "max", None))
    default = "required" if parameter.required else _default(parameter.default)
    return (" ".join(map(code, names)), bounds or values, default, _of_option(annotation, "help"))


def _of_option(annotation: Any, name: str) -> str:
    (declared,) = [each for each in get_args(annotation)[1:] if hasattr(each, "param_decls")]
    return prose(getattr(declared, name))


def _values(annotation: Any) -> str:
    """What may be written there, where that can be told in few words."""
    inner = _bare(annotation)
    if get_origin(inner) is Literal:
        return " ".join(map(code, get_args(inner)))
    if isinstance(inner, type) and issubclass(inner, enum.Enum):
        return " ".join(code(member.value) for member in inner)
    return {int: "whole number", float: "number", bool: ""}.get(inner, "")


def _bare(annotation: Any) -> Any:
    """A type without Annotated, None, and the list around it."""
    while True:
        origin = get_origin(annotation)
        if origin is Annotated:
            annotation = get_args(annotation)[0]
        elif origin in (Union, types.UnionType) and type(None) in get_args(annotation):
            (annotation, *_) = [each for each in get_args(annotation) if each is not type(None)]
        elif origin is list:
            annotation = get_args(annotation)[0]
        else:
            return annotation


def _range(low: float | None, high: float | None, above: float | None = None) -> str:
    begin = f"above {above:,g}" if above is not None else "" if low is None else f"from {_number(low)}"
    return " ".join(filter(None, [begin, "" if high is None else f"to {_number(high)}"]))


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:g}"


def _default(value: Any) -> str:
    match value:
        case None | False | () | []:
            return ""
        case enum.Enum():
            return code(value.value)
        case float():
            return code(f"{value:.12g}")
        case _:
            return code(value)


# Configuration


def configuration() -> Iterator[str]:
    """Every table of gateway.toml with its keys."""
    yield from ["# Configuration", ""]
    yield from [
        "What the keys are for, and what goes with what: [the configuration explained](../configuration.md).",
        "",
    ]
    fields = GatewaySettings.model_fields
    for section in SECTIONS:
        yield from _section(f"[{section}]", cast("type[BaseModel]", fields[section].annotation))
    yield from _section("[[listeners]]", ListenerSettings)
    yield from _section("[[routes]]", RouteSettings)
    for model in get_args(get_args(BackendSettings)[0]):
        (kind,) = get_args(model.model_fields["kind"].annotation)
        yield from _section(f"[backends.NAME] of kind {kind}", model)


def _section(title: str, model: type[BaseModel]) -> Iterator[str]:
    yield from [f"## {title}", ""]
    yield from table(("key", "values", "default", "meaning"), _keys(model))


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[Sequence[str]]:
    for name, field in model.model_fields.items():
        inner = _bare(field.annotation)
        yield (code(prefix + name), _bounds(field, inner), _toml_default(field), _meaning(field, name))
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _keys(inner, f"{prefix}{name}.")


def _meaning(field: FieldInfo, name: str) -> str:
    meaning, file_key = prose(field.description), f"`{name}_file`"
    in_a_file = any(path[-1] == name for path in SECRET_KEYS) and _bare(field.annotation) in (str, SecretStr)
    return f"{meaning} Or {file_key}." if in_a_file and file_key not in meaning else meaning


def _bounds(field: FieldInfo, inner: Any) -> str:
    bounds = {name: value for each in field.metadata for name, value in _limits(each)}
    numbers = _range(bounds.get("ge"), bounds.get("le"), bounds.get("gt"))
    if numbers:
        return numbers
    if inner in (str, SecretStr):
        return _length(bounds.get("min_length", 0), bounds.get("max_length"))
    return _values(inner) or _kind(inner)


def _length(low: int, high: int | None) -> str:
    # That a text is not empty goes without saying.
    length = _range(low if low > 1 else None, high)
    return f"{length} characters" if length else "text"


def _limits(bound: Any) -> Iterator[tuple[str, Any]]:
    for name in ("ge", "le", "gt", "min_length", "max_length"):
        value = getattr(bound, name, None)
        if value is not None:
            yield name, value


def _kind(inner: Any) -> str:
    if inner is bool:
        return "`true` `false`"
    if inner is Path:
        return "path"
    if inner is Address:
        return "host:port"
    if isinstance(inner, type) and issubclass(inner, BaseModel):
        return "table"
    if get_origin(inner) in (dict, Mapping):
        return "table"
    return "list" if get_origin(inner) in (tuple, list) else "text"


def _toml_default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    match field.default:
        case bool():
            return code(str(field.default).lower())
        case str() | Path() | Address():
            return code(f'"{field.default}"')
        case int() | float():
            return code(f"{field.default:.12g}")
        case _ if field.default is PydanticUndefined or field.default is None:
            return ""
        case _:
            return ""


# Metrics


def metrics() -> Iterator[str]:
    """Every metric, by the process that counts it."""
    yield from ["# Metrics", "", "What to do with them: [the metrics explained](../metrics.md).", ""]
    for title, owner in (
        ("Workers", WorkerMetrics),
        ("Follower", FollowerMetrics),
        ("Supervisor", lambda registry: SupervisorMetrics(registry, version="", python="", openssl="")),
    ):
        registry = CollectorRegistry()
        owner(registry)
        yield from [f"## {title}", ""]
        collectors = registry._collector_to_names  # noqa: SLF001 -- the library has no other list of them
        found = [each for each in collectors if hasattr(each, "_labelnames")]  # not the process's
        yield from table(("metric", "type", "labels", "meaning"), [_metric(each) for each in found])
    yield from ["## Words in labels", ""]
    yield from table(
        ("label", "values"),
        [("`outcome` of a handshake", _words(Outcome)), ("`reason` of a refused message", _words(Reason))],
    )


def _metric(metric: Any) -> Sequence[str]:
    kind = metric._type  # noqa: SLF001 -- the library has no other way to ask before there are samples
    name = metric._name + ("_total" if kind == "counter" else "")  # noqa: SLF001
    return (code(name), kind, " ".join(map(code, metric._labelnames)), prose(metric._documentation))  # noqa: SLF001


def _words(values: type[enum.Enum]) -> str:
    return " ".join(code(member.value) for member in values)


# Errors


def errors() -> Iterator[str]:
    """The tree of errors, and what is answered to a peer that breaks TLS."""
    title, tree, rest = (gateway.errors.__doc__ or "").split("\n\n")
    yield from ["# Errors", "", prose(title), "", "```text", *inspect.cleandoc(tree).splitlines(), "```", ""]
    yield from [prose(rest.partition("Foreign")[0]), ""]
    yield "A command that fails prints `error: ` and the text of the error on stderr, and ends with the exit status 1."
    yield from ["`gateway.device`, the client library, raises these classes.", ""]
    yield from table(
        ("error", "meaning"), [(code(each.__name__), prose(each.__doc__)) for each in _tree(GatewayError)]
    )
    yield from ["## What a peer did wrong", ""]
    yield from [
        "The faults of a peer that the gateway itself finds, and the TLS alert that answers each.",
        "",
    ]
    yield from table(("fault", "alert"), [(code(each.label), _alert(each.alert)) for each in PeerFault])
    yield from ["## What a device reads", ""]
    yield f"`error N REASON` on framed routes, where REASON is one of {_words(Reason)}:"
    yield "[what each asks of a device](../framings.md#what-comes-back-on-lines-length16-and-length32)."
    yield from ["", "## How a handshake may end", ""]
    yield f"{_words(Outcome)}: [what to do about each](../troubleshooting.md#what-to-do-about-an-outcome)."


def _tree(error: type[GatewayError]) -> Iterator[type[GatewayError]]:
    yield error
    for child in error.__subclasses__():
        if child.__module__ == error.__module__:
            yield from _tree(child)


def _alert(number: int | None) -> str:
    if number is None:
        return "none: the connection is closed"
    return f"{number} `{ssl.AlertDescription(number).name.removeprefix('ALERT_DESCRIPTION_').lower()}`"


def main() -> None:
    """Write the pages."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, "utf-8")


if __name__ == "__main__":
    main()
