"""Every public name says what it takes: its docstring, or one that it refers to, names every parameter."""

import inspect
import re

import pytest

import consistency_ops as co
from consistency_ops import experimental, ops

NAMESPACES = {
    "co": co,
    "co.nn": co.nn,
    "co.optim": co.optim,
    "co.analysis": co.analysis,
    "co.experimental": experimental,
    "co.ops": ops,
}
REFERENCE = re.compile(r":(?:func|class|meth):`[~.]?(?:[\w.]*\.)?(\w+)`")
USUAL = {"self", "device", "dtype"}  # every torch module has them: where its parameters are, and their type


def public_names():
    found = {"co.layers.register": co.layers.register}
    for prefix, namespace in NAMESPACES.items():
        for name in namespace.__all__:
            value = getattr(namespace, name)
            if callable(value):
                found[f"{prefix}.{name}"] = value
    return found


NAMES = public_names()


def methods_of(cls):
    """Public methods that are written here, by name; forward is described by its class."""
    return {
        name: value
        for name, value in vars(cls).items()
        if inspect.isfunction(value) and not name.startswith("_") and name not in ("forward", "extra_repr")
    }


def described(value, owner=None):
    """The docstring, that of its class, and those that they refer to."""
    texts = [inspect.getdoc(value) or "", (inspect.getdoc(owner) or "") if owner else ""]
    if inspect.isclass(value):
        texts.append(inspect.getdoc(value.forward) or "" if hasattr(value, "forward") else "")
    named = {name.rpartition(".")[2]: other for name, other in NAMES.items()}
    for name in REFERENCE.findall(" ".join(texts)):
        if name in named:
            texts.append(inspect.getdoc(named[name]) or "")
    return "\n".join(texts)


def unnamed(value, owner=None):
    text = described(value, owner)
    if inspect.isclass(value) and "__init__" not in vars(value) and "__new__" not in vars(value):
        return []  # takes nothing of its own
    parameters = inspect.signature(value).parameters
    return [name for name in parameters if name not in USUAL and not re.search(rf"\b{re.escape(name)}\b", text)]


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_named(name):
    value = NAMES[name]
    assert len(inspect.getdoc(value) or "") > 40, "a docstring"
    assert unnamed(value) == []
    if inspect.isclass(value):
        for method, function in methods_of(value).items():
            assert inspect.getdoc(function), method
            assert unnamed(function, value) == [], method


def misread(text):
    """What Sphinx would take for emphasis or for a substitution: ``*name`` and ``|x|`` outside of literals."""
    text = re.sub(r"``.*?``|:math:`.*?`|(?<!\w)\*\w[^*]*\w\*(?!\w)", "", text, flags=re.DOTALL)
    text = re.sub(r"::\n\s*\n((?:[ ]+.*\n?|\s*\n)+)", "\n", text + "\n")  # literal blocks are indented
    return re.findall(r"(?<![\w*\\])\*\w+|(?<![\w|])\|[^\s|][^|\n]*\|", text)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_taken_for_markup(name):
    value = NAMES[name]
    texts = [value, *(methods_of(value).values() if inspect.isclass(value) else ())]
    assert [found for text in texts for found in misread(inspect.getdoc(text) or "")] == []


def test_markup_would_be_noticed():
    assert misread("Shapes (N, *spatial), |x| of it, ``(N, *spatial)``, ``|x|``, the *old* value.") == [
        "*spatial",
        "|x|",
    ]


def test_a_missing_name_would_be_noticed():
    def function(first, second):
        """A function of ``first``, long enough to be one."""

    assert unnamed(function) == ["second"]
