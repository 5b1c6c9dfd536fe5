"""Wording of configuration problems: what was found, what is allowed, what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel


def closest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest known word, or nothing."""
    match = difflib.get_close_matches(str(name).lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else ""


def describe_error(detail: Any, model: type[BaseModel]) -> str:
    """One pydantic error as `section.key: what is wrong (value ...)`.

    Args:
        detail: an entry of `ValidationError.errors()`.
        model: what was validated, to suggest keys.
    """
    location = tuple(detail["loc"])
    key = ".".join(str(part) for part in location)
    value = detail.get("input")
    context = detail.get("ctx", {})
    kind = detail["type"]
    if kind == "extra_forbidden":
        parent = nested_model(model, location[:-1])
        known = parent.model_fields if parent else {}
        return f"{key}: unknown key (value {shown(value)}){closest(str(location[-1]), known)}"
    if kind == "missing":
        return f"{key}: must be given"
    wanted = {
        "greater_than": f"must be greater than {context.get('gt')}",
        "greater_than_equal": f"must be at least {context.get('ge')}",
        "less_than": f"must be less than {context.get('lt')}",
        "less_than_equal": f"must be at most {context.get('le')}",
        "int_type": "must be a whole number",
        "int_parsing": "must be a whole number",
        "int_from_float": "must be a whole number",
        "float_type": "must be a number",
        "float_parsing": "must be a number",
        "finite_number": "must be a finite number",
        "bool_type": "must be true or false",
        "string_type": "must be text",
        "list_type": "must be a list",
        "tuple_type": "must be a list",
        "model_type": "must be a section of key: value lines",
        "model_attributes_type": "must be a section of key: value lines",
        "dict_type": "must be a section of key: value lines",
    }.get(kind)
    if kind == "string_pattern_mismatch":
        wanted = (
            "must consist of lower-case letters, digits, _ and -, and begin with a letter or digit"
        )
    if kind == "literal_error":
        allowed = context.get("expected", "")
        words = [part.strip("' ") for part in allowed.replace(" or ", ",").split(",")]
        wanted = f"must be one of {', '.join(words)}"
        return f"{key}: {wanted} (value {shown(value)}){closest(str(value), words)}"
    return f"{key}: {wanted or detail['msg']} (value {shown(value)})"


def nested_model(model: type[BaseModel], location: tuple[Any, ...]) -> type[BaseModel] | None:
    """The model that holds the key at `location`, if there is one."""
    current: type[BaseModel] | None = model
    for part in location:
        if current is None or part not in current.model_fields:
            return None
        annotation = current.model_fields[part].annotation
        choices = [annotation, *get_args(annotation)]
        current = next(
            (c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)), None
        )
    return current


def shown(value: Any) -> str:
    """`value` as written in messages, cut when long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
