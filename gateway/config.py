"""`gateway.toml` and the environment, read once and checked whole: the only reader of either.

    file --TOML--> tree --+ PSKGW_A__B=...  --+ KEY_file --> validated by each part's own settings --> cross-checked

Each part of the gateway declares its settings; this module assembles them, and turns whatever is wrong into a
ConfigurationError of one line: where it stands, the full key, what is wrong, what to do.

The file is checked strictly (`workers = "2"` is refused), since TOML has types. Environment variables are texts, so
they are converted; a list or a table is written as JSON. Of the environment only names with a double underscore, or
of a whole table (`PSKGW_LISTENERS`), are read: others may belong to somebody else, as Kubernetes sets
`PSKGW_PORT` for a service named pskgw.
"""

import json
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from gateway.config_errors import KeyPath, explain, matches, show_key
from gateway.errors import ConfigurationError
from gateway.forward.route import RouteTable
from gateway.forward.settings import BackendSettings, Name, RouteSettings
from gateway.registry.settings import RegistrySettings
from gateway.server.admission.limits_settings import LimitsSettings
from gateway.server.settings import Address, ListenerSettings, NodeSettings
from gateway.server.supervision.admin_settings import AdminSettings
from gateway.telemetry.logs import LogSettings

__all__ = ["GatewaySettings", "effective", "find_config", "load"]

ENVIRONMENT_PREFIX = "PSKGW_"
FILE_NAME = "gateway.toml"
SYSTEM_FILE = Path("/etc/psk-gateway") / FILE_NAME
FILE_BYTES_MAX = 4 * 1024 * 1024
"""A configuration of thousands of routes is far smaller; a wrong file is noticed before it fills the memory."""

SECRET_KEYS: tuple[KeyPath, ...] = (
    ("registry", "url"),
    ("admin", "token"),
    ("routes", "*", "mqtt_password"),
    *(("backends", "*", key) for key in ("url", "password", "token", "secret")),
)
"""Keys that may hold a secret: each can be given as `KEY_file`, the name of a file that holds the value. `*` stands for
every table of a list, or of a table of tables.
"""

STRICT_TYPES = frozenset({"int_type", "int_from_float", "float_type", "bool_type", "string_type"})
"""What the strict look at the file reports; everything else is found again in the full look."""


class GatewaySettings(BaseModel):
    """The whole of gateway.toml. Parts are handed down one by one, never this tree."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    node: NodeSettings
    registry: RegistrySettings
    limits: LimitsSettings
    admin: AdminSettings
    log: LogSettings
    listeners: tuple[ListenerSettings, ...] = ()
    routes: tuple[RouteSettings, ...] = ()
    backends: dict[Name, BackendSettings] = Field(default_factory=dict)


SECTIONS = ("node", "registry", "limits", "admin", "log")
"""Tables that may be left out: all their keys have defaults."""


def find_config(option: Path | None, environ: Mapping[str, str] = os.environ) -> Path:
    """The configuration file to use: the option, $PSKGW_CONFIG, ./gateway.toml, /etc/psk-gateway/gateway.toml.

    Raises:
        ConfigurationError: none was named and none is there.

    """
    named = option or (Path(environ["PSKGW_CONFIG"]) if environ.get("PSKGW_CONFIG") else None)
    if named is not None:
        return named
    for candidate in (Path(FILE_NAME), SYSTEM_FILE):
        if candidate.exists():
            return candidate
    raise ConfigurationError(
        f"no configuration: neither ./{FILE_NAME} nor {SYSTEM_FILE} is there; name one with --config or "
        "$PSKGW_CONFIG, or make one with `gatewayctl init DIR`"
    )


def load(path: Path, environ: Mapping[str, str] = os.environ) -> GatewaySettings:
    """Read and check the configuration file and the environment.

    Raises:
        ConfigurationError: one line that says where, which key, what is wrong and what to do.

    """
    tree = _read_toml(path)
    _check_types(path, tree)
    origins = _apply_environment(tree, environ)
    base = path.absolute().parent
    _read_secret_files(path, tree, base)
    for section in SECTIONS:
        tree.setdefault(section, {})
    try:
        settings = GatewaySettings.model_validate(tree, context={"base": base})
    except ValidationError as exc:
        raise _refused(path, exc.errors(include_url=False), tree, origins) from None
    try:
        _check_together(settings)
    except ConfigurationError as exc:
        raise ConfigurationError(f"{path}: {exc}") from None
    return settings


def effective(settings: GatewaySettings) -> dict[str, Any]:
    """The tree as it is in force, defaults included, as plain values with secrets masked; what is not set is left out."""
    tree: dict[str, Any] = _masked(settings.model_dump(mode="json", exclude_none=True))
    for shown, route in zip(
        tree["routes"], RouteTable(settings.routes, settings.backends).routes, strict=True
    ):
        shown["ack"] = route.ack  # its default depends on the backend
    return tree


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _masked(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_masked(each) for each in value]
    return _mask_url(value) if isinstance(value, str) and "://" in value else value


def _mask_url(url: str) -> str:
    # Greedy up to the last @: a password that holds one unescaped is masked whole.
    url = re.sub(r"(://[^:/?#\s]*):.*@", r"\1:***@", url)
    return re.sub(r"([?&](?:password|passwd|secret|token)=)[^&#]*", r"\1***", url, flags=re.IGNORECASE)


# The file


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        raise ConfigurationError(
            f"{path} does not exist: name another file with --config, or make one with `gatewayctl init DIR`"
        ) from None
    except OSError as exc:
        raise ConfigurationError(f"{path} cannot be read: {exc.strerror}") from exc
    if len(raw) > FILE_BYTES_MAX:
        raise ConfigurationError(f"{path} has more than {FILE_BYTES_MAX} bytes: is it a configuration file?")
    try:
        return tomllib.loads(raw.decode())
    except UnicodeDecodeError as exc:
        raise ConfigurationError(f"{path} is not UTF-8 (byte {exc.start}): save it as UTF-8") from None
    except tomllib.TOMLDecodeError as exc:
        raise ConfigurationError(f"{path} is not valid TOML: {exc}") from None


def _check_types(path: Path, tree: dict[str, Any]) -> None:
    """Refuse a value of the file whose TOML type is wrong, even where it could be converted."""
    try:
        GatewaySettings.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as exc:
        wrong = [
            error
            for error in exc.errors(include_url=False)
            # A path is no value of TOML but a default, which strict validation of JSON takes for a wrong type.
            if error["type"] in STRICT_TYPES and not isinstance(error["input"], Path)
        ]
        if wrong:
            raise _refused(path, wrong, tree, {}) from None


def _read_secret_files(path: Path, tree: dict[str, Any], base: Path) -> None:
    for *parents, key in SECRET_KEYS:
        for place, table in _tables_at(tree, parents):
            file_key = f"{key}_file"
            if file_key not in table:
                continue
            where = f"{path}: {show_key((*place, file_key))}"
            if key in table:
                raise ConfigurationError(f"{where}: {key} is given too: keep one of the two")
            table[str(key)] = _read_secret(where, table.pop(file_key), base)


def _tables_at(
    node: Any, parents: Sequence[str | int], place: KeyPath = ()
) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    """The tables of the tree that `parents` names, each with where it stands."""
    if not parents:
        if isinstance(node, dict):
            yield place, node
        return
    first, *rest = parents
    if first != "*":
        children = [(first, node[first])] if isinstance(node, dict) and first in node else []
    elif isinstance(node, dict):
        children = list(node.items())
    else:
        children = list(enumerate(node)) if isinstance(node, list) else []
    for key, child in children:
        yield from _tables_at(child, rest, (*place, key))


def _read_secret(where: str, name: object, base: Path) -> str:
    if not isinstance(name, str):
        raise ConfigurationError(f"{where}: must be a text in quotes, the name of a file")
    try:
        value = (base / name).read_text("utf-8").strip()
    except OSError as exc:
        raise ConfigurationError(f"{where}: {base / name} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError:
        raise ConfigurationError(f"{where}: {base / name} is not UTF-8") from None
    if not value:
        raise ConfigurationError(f"{where}: {base / name} is empty")
    return value


# The environment


def _apply_environment(tree: dict[str, Any], environ: Mapping[str, str]) -> dict[KeyPath, str]:
    """Put the values of the environment in their places; return which variable each came from."""
    origins: dict[KeyPath, str] = {}
    for variable in sorted(environ):
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        parts = variable.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
        if len(parts) > 1 or parts[0] in GatewaySettings.model_fields:
            origins[_put(tree, parts, variable, environ[variable])] = variable
    return origins


def _put(tree: dict[str, Any], parts: list[str], variable: str, text: str) -> KeyPath:
    table: Any = tree
    path: list[str] = []
    for part in parts[:-1]:
        path.append(_key_in(table, part))
        table = table.setdefault(path[-1], {})
        if not isinstance(table, dict):
            raise ConfigurationError(
                f"environment variable {variable}: {show_key(path)} has no keys of its own: a list is set as a whole, "
                f"as JSON in {ENVIRONMENT_PREFIX}{'__'.join(path).upper()}"
            )
    key = _key_in(table, parts[-1])
    for *parents, secret in SECRET_KEYS:
        if matches(path, parents) and key in {secret, f"{secret}_file"}:
            table.pop(
                str(secret), None
            )  # of the two ways to give a secret, the environment's replaces the file's
            table.pop(f"{secret}_file", None)
    table[key] = _parse_variable(text)
    return (*path, key)


def _key_in(table: Mapping[str, Any], part: str) -> str:
    """The key that a part of a variable's name means: names of variables have no case and only underscores."""
    return next((key for key in table if re.sub(r"[-.]", "_", key.lower()) == part), part)


def _parse_variable(text: str) -> Any:
    if text.lstrip().startswith(("[", "{")):
        try:
            return json.loads(text)
        except ValueError:
            return text  # such as [::1]:8883
    return text


# What is wrong


def _refused(
    path: Path, errors: Iterable[ErrorDetails], tree: dict[str, Any], origins: Mapping[KeyPath, str]
) -> ConfigurationError:
    """The first problem in words, and how many more there are. Unknown keys first: they are often the cause."""
    ranked = sorted(errors, key=lambda error: error["type"] != "extra_forbidden")
    key, text = explain(ranked[0], GatewaySettings, tree, SECRET_KEYS)
    variable = next((name for place, name in origins.items() if _is_one_in_the_other(place, key)), None)
    where = f"environment variable {variable}" if variable else str(path)
    more = f" ({len(ranked) - 1} more wrong)" if len(ranked) > 1 else ""
    return ConfigurationError(f"{where}: {show_key(key)}: {_mask_url(text)}{more}")


def _is_one_in_the_other(place: KeyPath, key: KeyPath) -> bool:
    length = min(len(place), len(key))
    return place[:length] == key[:length]


def _check_together(settings: GatewaySettings) -> None:
    """What no part can see alone."""
    if not settings.listeners:
        raise ConfigurationError("listeners: there is none, add a [[listeners]] table with name and bind")
    if not settings.routes:
        raise ConfigurationError(
            "routes: there is none, add a [[routes]] table with name, framing and backend"
        )
    _check_listeners(settings.listeners, settings.admin.bind)
    names = [listener.name for listener in settings.listeners]
    for index, route in enumerate(settings.routes):
        if route.match.listener is not None and route.match.listener not in names:
            raise ConfigurationError(
                f"routes[{index}].match.listener: there is no listener {route.match.listener} (there is: "
                f"{', '.join(names)})"
            )
    RouteTable(settings.routes, settings.backends)


def _check_listeners(listeners: Iterable[ListenerSettings], admin: Address) -> None:
    names: set[str] = set()
    taken = {admin: "admin.bind"}
    for index, listener in enumerate(listeners):
        if listener.name in names:
            raise ConfigurationError(
                f"listeners[{index}].name: {listener.name} is taken, give it another name"
            )
        names.add(listener.name)
        key = f"listeners[{index}].bind"
        if listener.bind.port and listener.bind in taken:
            raise ConfigurationError(
                f"{key}: {listener.bind} is {taken[listener.bind]} too, choose another port"
            )
        taken[listener.bind] = key
