"""Files as somebody else may have put them into the folder of a run: odd, damaged or hostile."""

from __future__ import annotations

import json
from pathlib import Path

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
    return made
