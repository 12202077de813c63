"""Validation errors in the words of somebody who edits gateway.toml."""

import difflib
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

__all__ = ["KeyPath", "explain", "matches", "show_key"]

KeyPath = tuple[str | int, ...]
"""Where a value stands: keys of tables, indices of lists."""

EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "a text in quotes",
    "list": "a list",
    "tuple": "a list",
    "dict": "a table",
    "model": "a table",
    "path": "a path in quotes",
}
"""What to write, by the first word of pydantic's error type."""

BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
"""What to say, and where pydantic keeps the number, by its error type."""

SECRET_WORDS = ("url", "password", "token", "secret", "key")
"""The value of a key with such a word in its name is not repeated in an error."""

SHOWN_CHARACTERS_MAX = 60


def show_key(path: Sequence[str | int]) -> str:
    """`listeners[0].name`, as one would say it."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            bare = part.replace("_", "").replace("-", "").isalnum() and part.isascii()
            text += ("." if text else "") + (part if bare else ascii(part))
    return text


def explain(
    error: ErrorDetails, model: type[BaseModel], tree: Mapping[str, Any], secret_keys: Iterable[KeyPath]
) -> tuple[KeyPath, str]:
    """Where in `tree` the error is, and what is wrong and what to do in one line."""
    key = _key_of(error, tree)
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return key, _unknown_key(key, known_keys(model, error["loc"][:-1], secret_keys))
    if kind == "missing":
        return key, f"is missing, write {key[-1]} = ..."
    if kind in {"union_tag_invalid", "union_tag_not_found"}:
        return _wrong_tag(key, error, model)
    return key, _wrong_value(key, kind, error, context)


def _key_of(error: ErrorDetails, tree: Mapping[str, Any]) -> KeyPath:
    """Pydantic's location without what is not in the tree: the tags of unions and its `[key]` marks."""
    node: Any = tree
    key: list[str | int] = []
    for position, part in enumerate(error["loc"]):
        is_last = position == len(error["loc"]) - 1
        if isinstance(node, Mapping) and part in node:
            node = node[str(part)]
        elif isinstance(node, Sequence) and not isinstance(node, str) and isinstance(part, int):
            node = node[part]
        elif not (is_last and error["type"] == "missing"):
            continue
        key.append(part)
    return tuple(key)


def _unknown_key(key: KeyPath, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(key[-1]), known, n=1)
    if near:
        return f"unknown key, is {near[0]} meant?"
    return f"unknown key, known here: {', '.join(known)}"


def _wrong_tag(key: KeyPath, error: ErrorDetails, model: type[BaseModel]) -> tuple[KeyPath, str]:
    annotation = _declared_at(model, error["loc"])
    kinds = [tag for member in _members(annotation) for tag in _tags(member)]
    key = (*key, "kind")
    if error["type"] == "union_tag_not_found":
        return key, f"is missing, write kind = {_or(kinds)}"
    return key, f"must be {_or(kinds)}, not {_shown(key, error['input'].get('kind'))}"


def _wrong_value(key: KeyPath, kind: str, error: ErrorDetails, context: Mapping[str, Any]) -> str:
    if kind == "value_error":
        return str(context["error"])
    if kind in {"list_type", "tuple_type"} and isinstance(error["input"], Mapping):
        return f"must be a list, write [[{show_key(key)}]]"
    shown = _shown(key, error["input"])
    return _rule(key, kind, error["msg"], context) + (f", not {shown}" if shown else "")


def _rule(key: KeyPath, kind: str, message: str, context: Mapping[str, Any]) -> str:
    """What a value must be."""
    what, _, how = kind.partition("_")
    if kind in BOUNDS:
        word, bound = BOUNDS[kind]
        rule = f"must be {word} {context[bound]:g}"
    elif kind == "literal_error":
        rule = f"must be {context['expected']}"
    elif kind == "string_pattern_mismatch" and key[-1] == "content_type":
        rule = "must be a media type such as application/json"
    elif kind == "string_pattern_mismatch":
        rule = "must begin with a letter or digit and go on with letters, digits, '_', '.' or '-'"
    elif what in EXPECTED and how in {"type", "parsing", "number", "from_float", "attributes_type"}:
        rule = f"must be {EXPECTED[what]}"
    else:  # such as "String should have at least 1 character"
        _, should, rest = message.partition(" should ")
        rule = f"must {rest}" if should else message
    return rule


def _shown(key: KeyPath, value: object) -> str:
    """The wrong value as it may be repeated, or nothing."""
    if any(word in str(key[-1]) for word in SECRET_WORDS) or not isinstance(value, str | int | float):
        return ""
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else ascii(value)
    return text if len(text) <= SHOWN_CHARACTERS_MAX else text[:SHOWN_CHARACTERS_MAX] + "..."


def _or(texts: Sequence[str]) -> str:
    return " or ".join(f"'{text}'" for text in texts)


# The declared keys


def known_keys(
    model: type[BaseModel], location: Sequence[str | int], secret_keys: Iterable[KeyPath]
) -> list[str]:
    """The keys of the table at a location of pydantic's, with the `..._file` of its secrets."""
    annotation = _declared_at(model, location)
    if not _is_model(annotation):
        return []
    files = [f"{key[-1]}_file" for key in secret_keys if matches(location, key[:-1])]
    return [
        *annotation.model_fields,
        *(name for name in files if name[: -len("_file")] in annotation.model_fields),
    ]


def matches(location: Sequence[str | int], pattern: Sequence[str | int]) -> bool:
    """Whether a location is one that the pattern means; `*` in it is any key."""
    return len(location) == len(pattern) and all(
        wanted in ("*", part) for part, wanted in zip(location, pattern, strict=True)
    )


def _declared_at(model: type[BaseModel], location: Sequence[str | int]) -> Any:
    """The type that the settings declare for a location."""
    annotation: Any = model
    for part in location:
        annotation = _bare(annotation)
        if _is_model(annotation):
            field = annotation.model_fields.get(str(part))
            annotation = field.annotation if field else None
        elif get_origin(annotation) in {tuple, list}:
            annotation = get_args(annotation)[0]
        elif get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        else:
            annotation = next((each for each in _members(annotation) if part in _tags(each)), None)
    return _bare(annotation)


def _bare(annotation: Any) -> Any:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in {Union, types.UnionType} else ()


def _tags(member: Any) -> tuple[str, ...]:
    if not _is_model(member) or "kind" not in member.model_fields:
        return ()
    kind = member.model_fields["kind"].annotation
    return get_args(kind) if get_origin(kind) is Literal else ()


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
