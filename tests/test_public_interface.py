"""Public names and signatures change on purpose only.

``tests/public_interface.txt`` lists them. After an intended change, run this file as a
script with the repository in PYTHONPATH, review the difference, and mention it in
CHANGELOG.md.
"""

import importlib
import inspect
from pathlib import Path

INTERFACE = Path(__file__).with_name("public_interface.txt")
MODULES = ("", ".datasets", ".encoders", ".evaluation", ".metrics", ".plots", ".scale")


def list_interface():
    """Return a line for each public function, class, method and property."""
    lines, listed = [], []
    for suffix in MODULES:
        module = importlib.import_module(f"sklembed{suffix}")
        for name, member in public_members(module):
            if member in listed:
                continue
            listed.append(member)
            lines.append(describe(f"{module.__name__}.{name}", member))
            if inspect.isclass(member):
                lines += list_methods(f"{module.__name__}.{name}", member)
    return lines


def public_members(module):
    """Return names and objects in ``__all__``, else those that the module defines."""
    defined = []
    for name, member in vars(module).items():
        if getattr(member, "__module__", None) == module.__name__:
            defined.append(name)
    members = []
    for name in sorted(getattr(module, "__all__", defined)):
        member = getattr(module, name)
        if callable(member) and not name.startswith("_"):
            members.append((name, member))
    return members


def list_methods(place, cls):
    """Return a line for each public method and property that sklembed defines."""
    lines = []
    for name in sorted(name for name in dir(cls) if not name.startswith("_")):
        member = inspect.getattr_static(cls, name)
        if isinstance(member, property):
            lines.append(f"{place}.{name}")
            continue
        method = getattr(cls, name)
        if callable(method) and is_ours(method):
            lines.append(describe(f"{place}.{name}", method))
    return lines


def is_ours(member):
    return str(getattr(member, "__module__", None)).startswith("sklembed")


def describe(place, member):
    """Return a name with its parameters and their defaults, without types."""
    parameters = []
    for parameter in inspect.signature(member).parameters.values():
        parameters.append(parameter.replace(annotation=parameter.empty))
    return place + str(inspect.Signature(parameters))


def test_the_interface_changes_on_purpose_only():
    earlier = INTERFACE.read_text(encoding="utf-8").splitlines()
    current = list_interface()
    changes = sorted(set(current) ^ set(earlier))
    assert not changes, f"{changes}: run {Path(__file__).name} as a script and review"


if __name__ == "__main__":
    INTERFACE.write_text("\n".join(list_interface()) + "\n", encoding="utf-8")
