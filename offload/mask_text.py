"""Masks as text: names and numbers, which a reader checks as it would any input; nothing of it is code."""

from __future__ import annotations

import dataclasses
from typing import Any

import seqpar
from seqpar.masks import Mask

_KNOWN: dict[str, type[Mask]] = {
    kind.__name__: kind
    for kind in (
        seqpar.Causal,
        seqpar.Chunked,
        seqpar.PerHead,
        seqpar.PrefixLM,
        seqpar.SinkWindow,
        seqpar.SlidingWindow,
        seqpar.SparselySharded,
    )
}
_DEEPEST = 4


def to_text(mask: Mask) -> list[Any]:
    """The terms of a mask, each a name and its numbers, as JSON takes them. Raises ValueError for other masks."""
    terms = []
    for term in mask.terms:
        name = type(term).__name__
        if _KNOWN.get(name) is not type(term):
            raise ValueError(f"mask: got {term!r}, expected one of {', '.join(_KNOWN)}, which attention workers know")
        fields = {field.name: getattr(term, field.name) for field in dataclasses.fields(term)}  # type: ignore[arg-type]
        terms.append([name, {key: _plain(value) for key, value in fields.items()}])
    return terms


def from_text(terms: Any, depth: int = 0) -> Mask:
    """The mask that :func:`to_text` told of. Raises ValueError for anything else."""
    if not isinstance(terms, list) or not terms or depth > _DEEPEST:
        raise ValueError(f"mask: got {str(terms)[:80]}, expected a list of terms")
    masks = [_term(term, depth) for term in terms]
    mask = masks[0]
    for other in masks[1:]:
        mask = mask & other
    return mask


def _term(term: Any, depth: int) -> Mask:
    try:
        name, fields = term
        kind = _KNOWN[name]
        known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
        if not isinstance(fields, dict) or set(fields) != known:
            raise TypeError
        return kind(**{key: _value(key, value, depth) for key, value in fields.items()})
    except (KeyError, TypeError) as error:
        raise ValueError(f"mask: got {str(term)[:80]}, expected one of {', '.join(_KNOWN)} with its fields") from error


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [to_text(x) if isinstance(x, Mask) else x for x in value]
    return value


def _value(name: str, value: Any, depth: int) -> Any:
    if isinstance(value, list):
        return tuple(from_text(x, depth + 1) if name == "masks" else x for x in value)
    return value
