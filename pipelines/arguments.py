"""A parser of a command's own options that names a misspelt one, and the nearest that there is."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from declip_shards import DeclipError
from declip_shards.errors import did_you_mean


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, whose complaints are one sentence each, as everywhere in ``declip``.

    Options are never abbreviated. The parsers of subcommands are of this class, too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print with the usage.

        Raises:
            DeclipError: always.
        """
        raise DeclipError(f"{message}; see {self.prog} --help.")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, but a misspelt option is told before those that are missing for it.

        Raises:
            DeclipError: an option that there is not, or another fault.
        """
        if args is not None:
            self._check_flags(args)
        return super().parse_known_args(args, namespace)

    def _check_flags(self, arguments: Sequence[str]) -> None:
        has_commands = self._subparsers is not None
        for argument in arguments:
            # What follows a command is its own parser's to judge.
            if argument == "--" or (has_commands and not argument.startswith("-")):
                return
            flag = argument.partition("=")[0]
            if flag.startswith("--") and flag not in self._option_string_actions:
                known = [name for name in self._option_string_actions if name.startswith("--")]
                raise DeclipError(f"there is no option {flag}.{did_you_mean(flag, known)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        near = did_you_mean(str(value), map(str, action.choices))
        if isinstance(action, argparse._SubParsersAction):
            raise DeclipError(f"{self.prog} has no command {value!r}.{near}")
        name = action.option_strings[-1] if action.option_strings else action.dest.upper()
        raise DeclipError(f"{name} is {value!r}.{near}")
