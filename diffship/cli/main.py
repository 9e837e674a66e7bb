"""Entry point: parse, call the verb, print its result, and turn every expected error into one line and an exit code."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, NoReturn

from diffship import __version__
from diffship.cli.output import Result, error_document, print_json
from diffship.cli.progress import say
from diffship.cli.stops import Stops
from diffship.core.errors import ConfigError
from diffship.core.outcome import outcome
from diffship.core.printable import printable
from diffship.core.streams import prepare, silence
from diffship.core.strict import unknown


class Verbs(Mapping[str, Any]):
    """Name of a verb -> its module, which is imported when it is asked for: a command line needs one of them."""

    names = (
        "export",
        "compress",
        "calibrate",
        "run",
        "serve",
        "verify",
        "inspect",
        "compare",
        "bench",
        "doctor",
        "train",
    )

    def __getitem__(self, name: str) -> Any:
        if name not in self.names:
            raise KeyError(name)
        return import_module(f"diffship.cli.{name}")

    def __contains__(self, name: object) -> bool:
        """Without importing it: what goes wrong there is told as every fault of a verb is."""
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


VERBS = Verbs()
EPILOG = """examples:
  diffship export emoji --to onnx -o out/emoji
  diffship verify out/emoji
  diffship run out/emoji "red apple" --steps 25 --seed 1 -o out/pictures
  diffship doctor

exit codes: 0 ok, 1 a check failed, 2 usage, 3 unsupported here, 4 busy or out of time, 130 interrupted, 143 terminated
"""


class Parser(argparse.ArgumentParser):
    """argparse that raises ConfigError instead of printing usage and leaving."""

    def error(self, message: str) -> NoReturn:
        if message.endswith("expected one argument"):
            message += "; a value that begins with a dash is joined to it by =, such as --flag=-5"
        raise ConfigError(f"{message} ({self.prog} --help)")

    def _print_message(self, message: str, file: Any = None) -> None:
        """--help and --version, told as results are."""
        unheard = _out(lambda: print(message, end="", flush=True))
        if unheard:
            self.exit(unheard)


def make_parser(verbs: Iterable[str] = VERBS) -> tuple[Parser, dict[str, Parser]]:
    """A parser that knows `verbs`, and the parser of each."""
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="diffship",
        description="Compress, compile and prove text-to-image diffusion models.",
        epilog=EPILOG,
        formatter_class=style,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"diffship {__version__}")
    entries = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    parsers = {}
    for name in verbs:
        module = VERBS[name]
        summary = (module.__doc__ or "").splitlines()[0].partition(": ")[2]
        entry = entries.add_parser(
            name,
            help=summary.rstrip("."),
            description=summary,
            epilog=module.EXAMPLES,
            formatter_class=style,
            allow_abbrev=False,
        )
        module.add_arguments(entry)
        _add_manners(entry)
        parsers[name] = entry
    return parser, parsers


def _add_manners(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    if "--json" not in parser._option_string_actions:  # bench has one that also takes a file
        group.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    group.add_argument("--debug", action="store_true", help="show tracebacks")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line. Raises ConfigError for a word that nothing takes, with the nearest legal flag."""
    if arguments and not arguments[0].startswith("-") and arguments[0] not in VERBS:
        legal = [*VERBS, "--help", "--version"]  # for whoever asks for them as verbs
        raise ConfigError(f"{unknown('verb', arguments[0], legal)} (diffship --help)")
    parser, parsers = make_parser(arguments[:1] if arguments and arguments[0] in VERBS else VERBS)
    if arguments and arguments[0] in parsers:
        VERBS[arguments[0]].complete(parsers[arguments[0]], arguments[1:])
    words, behind = _split_at_dashes(arguments, parsers)
    options, rest = parser.parse_known_args(words)
    if options.verb is None:
        raise ConfigError(f"no verb is given; legal: {', '.join(VERBS)} (diffship --help)")
    if hasattr(options, "prompts") and not any(word.startswith("-") for word in rest):
        # argparse takes positionals in one piece; prompts may also stand behind flags
        options.prompts = [*options.prompts, *rest, *behind]
    elif rest:
        legal = [flag for action in parsers[options.verb]._actions for flag in action.option_strings]
        stray = next((word for word in rest if word.startswith("-")), None)
        problem = unknown("flag", stray.partition("=")[0], legal) if stray else f"unexpected argument {rest[0]!r}"
        if stray and hasattr(options, "prompts"):
            problem += "; prompts are given without a flag, and one that begins with a dash stands behind --"
        raise ConfigError(f"{problem} (diffship {options.verb} --help)")
    return options


def _split_at_dashes(arguments: Sequence[str], parsers: Mapping[str, Parser]) -> tuple[list[str], list[str]]:
    """What stands before `--`, and the prompts behind it, which may begin with a dash; without prompts all of it."""
    words = list(arguments)
    parser = parsers.get(words[0]) if words else None
    if "--" not in words or parser is None or "prompts" not in (action.dest for action in parser._actions):
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code of `diffship ARGUMENTS`; prints the result on stdout, everything else on stderr."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    verb = words[0] if words and words[0] in VERBS else ""
    prepare()
    as_json, debug = VERBS[verb].prints_json(words) if verb == "bench" else "--json" in words, "--debug" in words
    with Stops() as stops:
        try:
            options = parse(words)
            result: Result = VERBS[options.verb].run(options)
            return _print(result, verb, as_json)
        except BaseException as fault:
            # torch, for one, fails with an error of its own where Ctrl-C falls between two of its lines
            stopped = stops.number is not None or isinstance(fault, KeyboardInterrupt)
            if isinstance(fault, SystemExit) and not stopped:  # --help and --version
                return fault.code if isinstance(fault.code, int) else 0
            stops.settle()
            if debug and not isinstance(fault, KeyboardInterrupt):
                traceback.print_exc()
            # of a verb that was not even imported, nothing is left
            left = getattr(sys.modules.get(f"diffship.cli.{verb}"), "STOPPED", "what was not finished was not kept")
            told = ("Cancelled", f"{stops.word}; {left}", stops.code) if stopped else outcome(fault)
            return _fail(verb, *told, as_json)


def _print(result: Result, verb: str, as_json: bool) -> int:
    unheard = 0
    if as_json:
        ok = result.exit_code == 0
        unheard = _out(lambda: print_json({"schema": 1, "verb": verb, "ok": ok, **result.document}))
    elif result.text:
        unheard = _out(lambda: print(printable(result.text), flush=True))
    return result.exit_code or unheard


def _fail(verb: str, kind: str, message: str, code: int, as_json: bool) -> int:
    say(f"diffship{' ' + verb if verb else ''}: {message}")
    if as_json:
        _out(lambda: print_json(error_document(verb, kind, message, code)))
    return code


def _out(printed: Callable[[], None]) -> int:
    """0; if stdout takes no more though it is read (its disk is full), that is told, and its exit code."""
    try:
        printed()
    except OSError as fault:
        silence(sys.stdout)
        if not isinstance(fault, BrokenPipeError):  # its reader (head, less) has seen enough
            _, message, code = outcome(fault)
            say(f"diffship: stdout: {message}")
            return code
    return 0
