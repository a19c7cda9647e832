"""Files as somebody else may have put them into the folder of a run: odd, damaged or hostile."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

RESULT = {"epochs": 1, "steps": 1, "best_metric": 0.5, "best_epoch": 0, "stop_reason": "epochs", "seconds": 1.0}
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
EVIL = "import pathlib\npathlib.Path('PWNED').touch()\ndef make(): ...\n"

RESULTS: dict[str, bytes] = {
    name: text.encode()
    for name, text in {
        "a list": "[1]",
        "text": '"x"',
        "a number": "1",
        "null": "null",
        "nothing": "",
        "deep": "[" * 200_000,
        "deep dicts": '{"a":' * 300 + "1" + "}" * 300,
        "best is text": json.dumps(RESULT | {"best_metric": "low"}),
        "seconds is text": json.dumps(RESULT | {"seconds": "long"}),
        "epochs is a list": json.dumps(RESULT | {"epochs": [1]}),
        "epochs is true": json.dumps(RESULT | {"epochs": True}),
        "a huge number": json.dumps(RESULT).replace("0.5", "9" * 5000),
        "a big number": json.dumps(RESULT).replace("0.5", "9" * 400),
        "too many epochs": json.dumps(RESULT | {"epochs": 10**12}),
        "no monitor": json.dumps(RESULT | {"monitor": 3}),
        "long": '{"a": "' + "x" * (17 << 20) + '"}',
    }.items()
} | {"bytes": b"\xff\xfe\x00", "nul": b"\x00" * 50}

ENVIRONMENTS = {
    "sessions are numbers": "sessions: [1, 2]",
    "a list": "[1]",
    "laughs": LAUGHS,
    "text": "x",
    "deep": "a: " + "[" * 3000,
    "started is a dict": "sessions: [{started: {a: 1}, command: [x]}]",
}
CONFIGS = {
    "laughs": LAUGHS,
    "itself": "a: &a [*a]",
    "deep": "a: " + "[" * 5000 + "]" * 5000,
    "many keys": "".join(f"k{i}: 1\n" for i in range(20_000)),
    "a tag": "problem: !!python/object/apply:os.system ['touch PWNED']",
    "a number of many digits": f"trainer: {{epochs: {'9' * 5000}}}",
    "a date": "trainer: {epochs: !!timestamp 2001-01-01}",
    "not text": "problem: \x00",
    "long": "a: " + "x" * (2 << 20),
    "keys that are no text": "1: 2\nnull: 3\ntrue: [4]",
}
TABLES = {
    "nothing": "",
    "another": "a,b\n1,2\n",
    "a long field": "step,epoch,name,value,time\n1,0," + "x" * 200_000 + ",1.0,1.0\n",
    "huge numbers": f"step,epoch,name,value,time\n{'9' * 5000},{'9' * 30},train_loss,1.0,1.0\n",
    "negative": "step,epoch,name,value,time\n1,-1,train_loss,1.0,1.0\n",
    "nul": "step,epoch,name,value,time\n1,0,\x00,1.0,1.0\n",
}


def special_files(root: Path) -> list[tuple[str, Any]]:
    """What no file is: names, and functions that put it at a path."""
    (root / "loop").symlink_to(root / "loop")
    return [
        ("a pipe", os.mkfifo),
        ("a folder", Path.mkdir),
        ("a device without end", lambda path: path.symlink_to("/dev/zero")),
        ("a terminal", lambda path: path.symlink_to("/dev/tty")),
        ("a link to nothing", lambda path: path.symlink_to("nothing")),
        ("a link to itself", lambda path: path.symlink_to(root / "loop")),
    ]


NAMES = ["\u00fcn\u00efc\u00f6de \u4e2d\u6587 \U0001f9f5", "a b 'c' \"d\" $HOME `id` ;ls", "=1+1", "-x", "x" * 200]
NAMES += ["\x1b[31mred\n", "\u202egnp"]
"""Of folders."""


def odd_folders(root: Path) -> list[Path]:
    """A folder for each odd file, whose other files are right."""
    made = []

    def folder(**files: bytes | str) -> None:
        path = root / f"run-{len(made):03d}"
        path.mkdir(parents=True)
        right: dict[str, bytes | str] = {"config.yaml": "problem: evil.py:make\ndata: evil.py:make\n", "evil.py": EVIL}
        right |= {
            "result.json": json.dumps(RESULT),
            "metrics.csv": "step,epoch,name,value,time\n1,0,train_loss,1.0,1.0\n",
        }
        for name, content in {**right, **files}.items():
            data = content.encode() if isinstance(content, str) else content
            (path / name).write_bytes(data)
        made.append(path)

    for result in RESULTS.values():
        folder(**{"result.json": result})
    for text in ENVIRONMENTS.values():
        folder(**{"environment.yaml": text})
    for text in CONFIGS.values():
        folder(**{"config.yaml": text})
    for text in TABLES.values():
        folder(**{"metrics.csv": text})
    folder(**{"result.json": json.dumps(RESULT | {"stop_reason": "\x1b[31mred\x1b[0m\x07"})})
    for _, put in special_files(root):
        for name in ("result.json", "environment.yaml", "config.yaml", "metrics.csv", "profile.json"):
            folder()
            (made[-1] / name).unlink(missing_ok=True)
            put(made[-1] / name)
    return made


def named_oddly(root: Path) -> list[Path]:
    """Right folders with odd names, and links to some."""
    made = []
    for name in NAMES:
        (root / name).mkdir(parents=True)
        (root / name / "config.yaml").write_text("problem: a")
        (root / name / "result.json").write_text(json.dumps(RESULT))
        made.append(root / name)
    for number, target in enumerate((made[0], root)):  # the second one contains itself
        (root / f"link-{number}").symlink_to(target, target_is_directory=True)
    return made


class Answer(NamedTuple):
    """What a command in a process of its own came to."""

    words: tuple[str, ...]
    status: int
    text: str
    seconds: float
    mib: float
    """That its memory grew by."""


def looks_at(folder: Path, right: Path) -> list[tuple[str, ...]]:
    """The commands that look at a folder and run nothing; "TAB" is the completion of what follows."""
    config = str(folder / "config.yaml")
    return [
        ("runs", str(folder.parent)),
        ("compare", str(folder), str(right)),
        ("compare", str(folder), str(folder), "--html", str(right.parent / "out.html")),
        ("config", "--config", config),
        *(("fit", "--config", config, flag) for flag in ("--print_config", "--help")),
        ("resume", str(folder), "--help"),
        ("sweep", config, "--help"),
        ("submit", "--config", config, "--help"),
        ("TAB", f"weft resume {folder} --"),
        ("TAB", f"weft fit --config {config} --"),
    ]


def answer(words: tuple[str, ...], function: Callable[[list[str]], int]) -> Answer:
    """What `function` (the command line) makes of these words, in a forked process, which is ended after a minute."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as out:
        child = os.fork()
        if not child:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)
            os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
            sys.stdout = sys.stderr = io.TextIOWrapper(io.FileIO(1, "w"), write_through=True)
            warnings.resetwarnings()
            before, status = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 99
            try:
                if words[0] == "TAB":
                    os.environ |= {"COMP_LINE": words[1], "COMP_POINT": str(len(words[1]))}
                    words = ("__complete",)
                status = function(list(words))
            except BaseException:  # noqa: BLE001, found in what it wrote
                traceback.print_exc()
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            print(f"\n{grown}")
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        text, _, grown = out.read().decode(errors="replace").rstrip().rpartition("\n")
    return Answer(words, status, text, time.monotonic() - began, float(grown) if status >= 0 else 0.0)


def answers_to_looks(root: Path, function: Callable[[list[str]], int]) -> tuple[int, list[Answer]]:
    """How many odd folders were made in `root`, and what the command line answers to each look at them."""
    right = root / "right"
    right.mkdir()
    (right / "config.yaml").write_text("problem: a")
    (right / "result.json").write_text(json.dumps(RESULT))
    for words in looks_at(right, right):  # what they import is then there in each process
        if words[0] != "TAB":
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                function(list(words))
    folders = [*odd_folders(root / "runs"), *named_oddly(root / "named")]
    commands = dict.fromkeys(words for folder in folders for words in looks_at(folder, right))
    return len(folders), [answer(words, function) for words in commands]


def misbehaves(found: Answer) -> bool:
    """Whether it is no answer: a traceback, a raw error, a sequence for terminals, or another status than 0 and 2."""
    is_raw = "Traceback" in found.text or "Error:" in found.text or "\x1b" in found.text
    return is_raw or found.status not in (0, 2)
