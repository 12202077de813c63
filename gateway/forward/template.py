"""Topics, subjects, keys and headers made from what is known of a device: `devices/{realm}/{device}/up`.

A device's name or identity may hold what separates levels at the backend: a device named `a/../b` or `+` could
publish into another's topic. So each kind of backend says what a value may not hold, and a message whose value does
is refused: a value is never rewritten. The texts around the placeholders are the operator's and are taken as they are.
"""

import re
from collections.abc import Callable
from typing import Final, NamedTuple

from gateway.errors import BackendRefused
from gateway.forward.message import Message

__all__ = ["Rules", "Template"]

_PLACEHOLDER: Final = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")


class Rules(NamedTuple):
    """What a kind of backend allows. `separators` are single characters that no value may hold; control characters are
    never allowed. `legal` is a pattern for the whole result, `legal_text` says it in words.
    """

    what: str
    separators: str
    bytes_max: int
    legal: str = ""
    legal_text: str = ""


class Template:
    """A text with placeholders `{realm} {device} {group} {identity} {label.NAME}`; `{{` and `}}` are braces."""

    __slots__ = ("_constant", "_legal", "_parts", "_rules")

    def __init__(self, text: str, rules: Rules) -> None:
        """Raises ValueError with what to write instead."""
        self._rules = rules
        self._legal = re.compile(rules.legal) if rules.legal else None
        self._parts = _parse(text)
        fixed = "".join(part for part in self._parts if isinstance(part, str))
        if not self._parts:
            raise ValueError(f"is empty: write a {rules.what}")
        if _CONTROL.search(fixed):
            raise ValueError("holds a control character: remove it")
        self._constant = fixed if all(isinstance(part, str) for part in self._parts) else None
        if self._constant is not None and (fault := self._fault_of(self._constant)):
            raise ValueError(fault)

    @property
    def is_constant(self) -> bool:
        """Whether it is the same for all messages."""
        return self._constant is not None

    def render(self, message: Message) -> str:
        """The text for this message. Raises BackendRefused, and the text of it names no value."""
        if self._constant is not None:
            return self._constant
        result = "".join(
            part if isinstance(part, str) else self._value(part, message) for part in self._parts
        )
        if fault := self._fault_of(result):
            raise BackendRefused(fault)
        return result

    def _value(self, part: "_Placeholder", message: Message) -> str:
        value = part.read(message)
        if not value:
            raise BackendRefused(f"{{{part.name}}} of the {self._rules.what} is empty for this device")
        if _CONTROL.search(value):
            raise BackendRefused(f"{{{part.name}}} of the {self._rules.what} holds a control character")
        for character in self._rules.separators:
            if character in value:
                raise BackendRefused(
                    f"{{{part.name}}} of the {self._rules.what} holds {character!r}, which has a meaning there"
                )
        return value

    def _fault_of(self, result: str) -> str:
        rules = self._rules
        if len(result.encode()) > rules.bytes_max:
            return f"the {rules.what} is longer than {rules.bytes_max} bytes"
        if self._legal and not self._legal.fullmatch(result):
            return f"the {rules.what} is not valid: {rules.legal_text}"
        return ""


class _Placeholder(NamedTuple):
    name: str
    read: Callable[[Message], str | None]


_FIELDS: Final[dict[str, Callable[[Message], str | None]]] = {
    "realm": lambda message: message.realm,
    "device": lambda message: message.device,
    "group": lambda message: message.group,
    "identity": lambda message: message.identity,
}


def _parse(text: str) -> list[str | _Placeholder]:
    parts: list[str | _Placeholder] = []
    at = 0
    for found in _PLACEHOLDER.finditer(text):
        parts.append(text[at : found.start()])
        at = found.end()
        token = found.group()
        if token in {"{{", "}}"}:
            parts.append(token[0])
        elif token in {"{", "}"}:
            raise ValueError(f"has a lone {token}: write {token * 2} for the character itself")
        else:
            parts.append(_placeholder(found.group(1)))
    parts.append(text[at:])
    return [part for part in parts if part]


def _placeholder(name: str) -> _Placeholder:
    kind, dot, label = name.partition(".")
    if kind == "label" and dot and label:
        return _Placeholder(name, lambda message: message.labels.get(label))
    if name not in _FIELDS:
        raise ValueError(
            f"knows no {{{name}}}: there are {{realm}} {{device}} {{group}} {{identity}} {{label.NAME}}"
        )
    return _Placeholder(name, _FIELDS[name])
