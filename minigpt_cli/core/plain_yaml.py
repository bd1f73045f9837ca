"""YAML without surprises: plain data in and out, and what one writes the other reads."""

from __future__ import annotations

import re
from typing import Any

import yaml

from minigpt_cli.core.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML without surprises: no aliases (they can explode), no duplicate keys, and 1e-3 is a number."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(None, None, "aliases (*name) are not allowed", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.value in seen if isinstance(key_node.value, str) else True:
                problem = (
                    f"the key {key_node.value!r} stands twice"
                    if isinstance(key_node.value, str)
                    else "a key must be a word"
                )
                raise yaml.MarkedYAMLError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would otherwise read as a number."""


# YAML 1.2's floats: PyYAML alone wants a dot and a sign, and reads 1e-3 as a string. Tried after the integers.
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$"), list("-+.0123456789")
    )


def parse_yaml(text: str, where: str) -> Any:
    """YAML text -> plain data. Raises UserError with the line at fault."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: plain data only
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {str(error).splitlines()[0]}") from None
    except (ValueError, TypeError, OverflowError) as error:  # what SafeLoader's own constructors let through: !!int "x"
        raise UserError(f"{where}: not YAML: {error}") from None
    except (AttributeError, LookupError):  # the same, in words that help nobody: !!timestamp "x", !!bool "x"
        raise UserError(f"{where}: not YAML: a value does not fit its tag (!!...)") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None


def dump_yaml(document: object) -> str:
    """Plain data -> YAML text that `parse_yaml` reads back to equal data."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False)
