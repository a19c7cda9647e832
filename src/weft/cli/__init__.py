"""The command line. `weft COMMAND --help` lists options, also those of your own functions once they are named.

    weft fit --config run.yaml --trainer.epochs 50 --data.nsim 5000
    weft fit --problem pde.py:make_problem --data pde.py:data_setup --optimizer AdamW --optimizer.lr 1e-3
    weft test runs/2026-03-01_12-30-05

Exit codes: 0 done, 1 an error while running, 2 bad usage or config, 3 stopped by numbers that are not finite,
130 interrupted (Ctrl-C), 143 terminated.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from weft.cli.commands import COMMANDS
from weft.cli.parsing import parse
from weft.loop.streams import lasting_streams
from weft.recipes.schema import ConfigError
from weft.types import suggest

OK, FAILED, BAD_USAGE, NOT_FINITE, INTERRUPTED = 0, 1, 2, 3, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. `argv`: the words after `weft`; None: those of this process."""
    words = list(sys.argv[1:] if argv is None else argv)
    with lasting_streams(), warnings.catch_warnings():  # `weft runs | head`
        warnings.showwarning = lambda message, *rest, **more: _say(f"warning: {message}")
        try:
            return _run(words)
        except ConfigError as error:
            if "--debug" in words:
                traceback.print_exception(error)
            _list_problems(error.problems)
            return BAD_USAGE
        except KeyboardInterrupt:
            _say("interrupted")
            return INTERRUPTED
        except SystemExit as error:  # SIGTERM arrives as one with 143
            return error.code if isinstance(error.code, int) else FAILED
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told in one line
            return _failed(error, "--debug" in words)


def _run(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        from weft.cli.help import overview

        print(overview())
        return OK
    if words[0] == "--version":
        import weft

        print(f"weft {weft.__version__}")
        return OK
    if words[0] == "__complete":
        from weft.cli.help import completions

        print("\n".join(completions(os.environ.get("COMP_LINE", ""), os.environ.get("COMP_POINT"))))
        return OK
    if words[0] not in COMMANDS:
        hint = suggest(words[0], COMMANDS) or f"; there are {', '.join(COMMANDS)}"
        raise ConfigError([f"{words[0]}: there is no such command{hint}"])
    command = COMMANDS[words[0]]
    call = parse(words[0], command, words[1:])
    if "help" in call.flags:
        from weft.cli.help import command_help

        print(command_help(call))
        return OK
    required = [p for p in command.places if not p.startswith("[")]
    if len(call.places) > len(command.places) and not "".join(command.places).endswith("..."):
        call.wrong.append(f"{call.places[len(command.places)]!r}: not expected here; an option begins with --")
    call.wrong += [f"{name}: missing" for name in required[len(call.places) :]]
    for note in call.notes:
        _say(f"note: {note}")
    return command.run(call)


def _say(text: str) -> None:
    print(f"weft: {text}", file=sys.stderr)


def _list_problems(problems: Sequence[str]) -> None:
    found = list(dict.fromkeys(problems))
    if len(found) == 1:
        _say(found[0])
        return
    _say(f"{len(found)} problems:")
    for problem in found:
        print(f"  {problem}", file=sys.stderr)


def _failed(error: Exception, debug: bool) -> int:
    """Say what went wrong and where in the user's files, and return the exit code."""
    if debug:
        traceback.print_exception(error)
    else:
        from weft.recipes.recipe import users_line

        where = users_line(error)
        text = str(error) if isinstance(error, FloatingPointError) else f"{type(error).__name__}: {error}"
        _say(f"{text}{f' ({where})' if where else ''}")
        print("  (--debug shows the whole traceback)", file=sys.stderr)
    return NOT_FINITE if isinstance(error, FloatingPointError) else FAILED
