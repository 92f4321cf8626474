"""Configuration files: flat YAML, one option a line, from a path or from the packaged recipes.

Reads and writes mappings; what the options mean, and whether they exist, is option_names.py's.
"""

from collections.abc import Hashable
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError, did_you_mean

RECIPE = "recipe:"


class _Loader(yaml.SafeLoader):
    """YAML as PyYAML reads it, but a key that stands twice is an error, not the last one's win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                line = node.value[number][0].start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: {key!r} stands there twice; keep one")
        return super().construct_mapping(node, deep)


def recipes() -> list[str]:
    """Names of the packaged recipes, for `fastdpo train recipe:NAME`."""
    folder = resources.files("fastdpo") / "recipes"
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name[-5:] == ".yaml"
    )


def read_yaml(source: str | Path) -> dict[str, Any]:
    """The options in the file `source`, or in the packaged recipe `recipe:NAME`.

    Raises `ConfigError` where there is no such file, or it is no flat mapping.
    """
    name = str(source)
    if name.startswith(RECIPE):
        text = _read_recipe(name.removeprefix(RECIPE))
    else:
        text = _read_file(Path(name).expanduser())
    return _parse(text, name)


def _read_recipe(name: str) -> str:
    known = recipes()
    if name not in known:
        raise ConfigError(
            f"no recipe is called {name!r}; there are {', '.join(known)}{did_you_mean(name, known)}"
        )
    return (resources.files("fastdpo") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = did_you_mean(path.name, _names_in(path.parent))
        recipe = f"; the packaged ones are called {RECIPE}{{{','.join(recipes())}}}"
        raise ConfigError(f"no config file {str(path)!r}{near or recipe}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"config file {str(path)!r} can't be read: {reason}") from error


def _names_in(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def _parse(text: str, name: str) -> dict[str, Any]:
    try:
        values = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(
            f"config {name!r}, line {line}: {error.problem}; expected lines `option: value`"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config {name!r}, {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"config {name!r} holds no options; expected lines `option: value`")
    return values


def write_yaml(path: str | Path, values: dict[str, Any]) -> None:
    """Writes plain `values` as `read_yaml` reads them; `ConfigError` where it can't."""
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"config file {str(path)!r} can't be written: {error.strerror}; make room, or choose "
            "another output_dir"
        ) from error
