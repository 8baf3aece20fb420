"""Replacing an attribute of a vLLM class once."""

import functools
from collections.abc import Callable
from typing import Any

_MARK = "__attentionpack_wrapped__"


def wrap_method(owner: type, name: str, make: Callable[[Callable[..., Any]], Any]) -> None:
    """Replaces the method `owner.name` by `make(original)`, unless that was done before.

    `original` is the plain function (`self` or `cls` first), also of a class method; what `make`
    returns takes the same arguments and becomes the same kind of method.
    """
    found = getattr(owner, name)
    is_class_method = getattr(found, "__self__", None) is owner
    original = found.__func__ if is_class_method else found
    if hasattr(original, _MARK):
        return
    wrapper = functools.wraps(original)(make(original))
    setattr(wrapper, _MARK, True)
    setattr(owner, name, classmethod(wrapper) if is_class_method else wrapper)
