"""The reference: a page for the names at the top and one for every namespace, made from what they say is public."""

from __future__ import annotations

import html
import inspect
import re
from types import ModuleType

import lightning_prune as lp

HEAD = """# The names at the top

`import lightning_prune as lp`: the verbs, and the names that nearly every script needs."""
BELOW = "One step down, without an import of its own:"


def public_names() -> dict[str, list[str]]:
    """Names by the namespace in which they are public; "" is the top."""
    top = [name for name in lp.__all__ if not isinstance(getattr(lp, name), ModuleType)]
    names = {"": [name for name in top if name != "__version__"]}
    for namespace in lp.__all__:
        module = getattr(lp, namespace)
        if isinstance(module, ModuleType):
            names[namespace] = list(getattr(module, "__all__", None) or defined_in(module))
    return names


def defined_in(module: ModuleType) -> list[str]:
    """Public classes and functions of a module that lists none."""
    found = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return [name for name in found if not name.startswith("_")]


def reference_pages() -> dict[str, str]:
    """Markdown by page: a table of the names with what each is, then each in full, once."""
    names = public_names()
    top = names.pop("")
    lines = [f"- [`lp.{name}`]({name}.md): {_first_line(getattr(lp, name))}" for name in names]
    table = _table({name: f"#lightning_prune.{name}" for name in top}, lp)
    pages = {"reference/index.md": "\n\n".join([HEAD, table, BELOW, "\n".join(lines), *map(_full, top)])}
    for namespace, public in names.items():
        module = getattr(lp, namespace)
        elsewhere = {name for name in public if name in top and getattr(lp, name) is getattr(module, name)}
        places = {
            n: ("index.md" if n in elsewhere else "") + f"#lightning_prune.{_path(namespace, n, elsewhere)}"
            for n in public
        }
        full = [_full(f"{namespace}.{name}") for name in public if name not in elsewhere]
        text = [f"# lp.{namespace}", _docstring(module), _table(places, module), *full]
        pages[f"reference/{namespace}.md"] = "\n\n".join(text)
    return pages


def _path(namespace: str, name: str, elsewhere: set[str]) -> str:
    return name if name in elsewhere else f"{namespace}.{name}"


def _full(path: str) -> str:
    return f"::: lightning_prune.{path}"


def _table(places: dict[str, str], module: ModuleType) -> str:
    rows = [f"| [`{name}`]({place}) | {_first_line(getattr(module, name))} |" for name, place in places.items()]
    return "\n".join(["| name | what it is |", "| --- | --- |", *rows])


def _docstring(value: object) -> str:
    return (inspect.getdoc(value) or "").partition("\n\nExample:")[0]


def _first_line(value: object) -> str:
    """The summary of a docstring, on one line and safe in a table."""
    if not (inspect.isclass(value) or inspect.isfunction(value) or inspect.ismodule(value)):
        return ""
    line = html.escape(" ".join(_docstring(value).partition("\n\n")[0].split()), quote=False)
    line = re.sub(r":math:`([^`]+)`", r"$\1$", line).replace("\\|", r"\Vert ")
    line = re.sub(r"[|*_]", lambda match: f"&#{ord(match[0])};", line) if "$" not in line else line
    return re.sub(r"`+([^`]+)`+", r"<code>\1</code>", line)
