"""YAML without surprises: unquoted scalars are text until it is known what they are for. Knows no settings."""

from __future__ import annotations

import re
from typing import Any, cast

import yaml

from minigpt_cli.core.errors import UserError


class Plain(str):
    """A scalar as it was written, without quotes: `2024` is text for a path, and a number for a count."""

    def value(self) -> Any:
        """What it is where it may be anything: None, a bool, an int, a float, or else the text.

        Numbers are decimal: 010 is ten, 1e3 a number, and 1:30 (90 in YAML 1.1) or 0x1F text.
        """
        text = self.strip()
        if text in _WORDS:
            return _WORDS[text]
        try:
            if _INT.fullmatch(text):
                return int(text.replace("_", ""))
            if _FLOAT.fullmatch(text):
                return float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:  # more digits than Python reads
            pass
        return str(self)


_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan")
_WORDS = {
    **{cased: value for word, value in (("true", True), ("yes", True), ("on", True), ("false", False), ("no", False),
       ("off", False), ("null", None)) for cased in (word, word.capitalize(), word.upper())},
    "": None, "~": None,
}  # fmt: skip


class _Loader(yaml.SafeLoader):
    """No aliases (they can explode), no duplicate keys, no merging of mappings, and unquoted scalars as `Plain`."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and implicit[0]:  # not in quotes, and without a tag
            return _PLAIN
        return super().resolve(kind, value, implicit)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(None, None, "aliases (*name) are not allowed", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if not isinstance(key, str) or not key:
                raise yaml.MarkedYAMLError(None, None, "a key must be a word", key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_PLAIN = "!plain"
_Loader.add_constructor(_PLAIN, lambda loader, node: Plain(loader.construct_scalar(cast(yaml.ScalarNode, node))))


class _Dumper(yaml.SafeDumper):
    """Quotes text that looks like a number to others too: PyYAML alone would leave 1e-3 as it is."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str, where: str) -> Any:
    """YAML text -> plain data, in which unquoted scalars are `Plain`. Raises UserError with the line at fault."""
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
    """Plain data -> YAML text. Text comes back as it is; read numbers, words and null with `Plain.value`."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False)
