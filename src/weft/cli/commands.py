"""The subcommands. Each gets a `Call` and returns an exit code."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weft import yamlfile
from weft.cli.parsing import Call, Command
from weft.recipes.schema import ConfigError, merge
from weft.sweeps.sweep import sweep_from_file
from weft.types import suggest

OK, NOT_FINITE = 0, 3


def _checked(call: Call, needed: Sequence[str]) -> Any:
    """The config of a call, checked together with what was wrong on the command line itself.

    Where it is only to be printed, nothing that it names is imported.
    """
    from weft.recipes import recipe

    is_only_printed = call.command == "config" or "print_config" in call.flags
    return recipe.check(recipe.Source(call.config, call.wrong, []), needed, imports=not is_only_printed)


def _fit(call: Call) -> int:
    trainer = call.config.get("trainer")
    if trainer is None or (isinstance(trainer, dict) and trainer.get("root_dir") is None):
        call.config = merge(call.config, {"trainer": {"root_dir": "runs"}})  # a run by the command line has a folder
    checked = _checked(call, needed=("problem", "data"))
    if "print_config" in call.flags:
        print(yamlfile.dump(checked.config), end="")
        return OK
    made = _made(checked)
    try:
        with _refused(lambda: made.trainer.run is None or made.trainer.run.progress.epoch <= 1):
            result = made.fit()
    finally:
        _keep_weights(made.trainer)
    if made.trainer.run.is_global_zero:
        print(result)
        if result.run_dir is not None:
            here = Path.cwd()
            print(result.run_dir.relative_to(here) if result.run_dir.is_relative_to(here) else result.run_dir)
    return NOT_FINITE if result.stop_reason == "nonfinite" else OK


def _made(checked: Any) -> Any:
    from weft.recipes import recipe

    with _refused(lambda: True):
        return recipe.make(checked)


@contextmanager
def _refused(before_training: Callable[[], bool]) -> Iterator[None]:
    """Within: what weft refuses in the first epoch, or before, is a mistake in the config or on the command line."""
    from weft.checkpoint.archive import CheckpointError

    try:
        yield
    except ConfigError:
        raise
    except (TypeError, ValueError, FileNotFoundError, CheckpointError) as error:
        from weft.recipes.recipe import users_line

        if not before_training() or users_line(error):  # raised in the user's own code
            raise
        raise ConfigError([str(error)]) from error


def _keep_weights(trainer: Any) -> None:
    """The problem's weights (the best ones) in the run's folder, also after an interruption."""
    run = trainer.run
    if (
        run is not None
        and run.run_dir is not None
        and run.is_global_zero
        and run.result is not None
        and run.progress.step
    ):
        trainer.save_weights(run.run_dir / "weights.pt")


def _resume(call: Call) -> int:
    if call.places and not call.wrong:
        place = Path(call.places[0])
        checkpoints = place / "checkpoints"
        if not any(checkpoints.glob("step-*.ckpt")):
            call.wrong.append(f"{place}: has no checkpoints to resume from (train with --trainer.checkpoint true)")
        call.config = merge(call.config, {"trainer": {"resume": str(checkpoints)}})
        _refuse_foreign(call)
    return _fit(call)


def _refuse_foreign(call: Call) -> None:
    """Note as wrong that a run's folder is another user's: what its config names would be run."""
    place = Path(call.places[0])
    if "trust" in call.flags or "print_config" in call.flags or not hasattr(os, "geteuid"):
        return
    for path in (place, place / "config.yaml"):
        if path.exists() and path.stat().st_uid != os.geteuid():
            call.wrong.append(
                f"{path}: belongs to another user (number {path.stat().st_uid}), and its config names code that would "
                f"be run; look at it (weft {call.command} {place} --print_config), then add --trust"
            )
            return


def _evaluate(call: Call) -> int:
    import json

    trainer, problem, data = _for_evaluation(call)
    if trainer is None:
        return OK
    function = trainer.validate if call.command == "validate" else trainer.test
    with _refused(lambda: True):
        print(json.dumps(function(**data, problem=problem), indent=1))
    return OK


def _predict(call: Call) -> int:
    trainer, problem, data = _for_evaluation(call)
    if trainer is None:
        return OK
    data = _as_predict_data(data, call.others.get("split", "predict"))
    path = Path(
        call.others.get("output") or (Path(call.places[0]) / "predictions.npz" if call.places else "predictions.npz")
    )
    if path.suffix not in (".npz", ".pt"):
        raise ConfigError([f"--output={str(path)!r}: expected a name that ends in .npz or .pt"])
    with _refused(lambda: True):
        found = trainer.predict(**data, problem=problem)
    if path.suffix == ".pt":
        import torch

        torch.save(found, path)
    else:
        import numpy

        numpy.savez(path, **{key: tensor.numpy() for key, tensor in found.items()})
    print("\n".join(f"{key} {tuple(tensor.shape)}" for key, tensor in found.items()))
    print(path)
    return OK


def _as_predict_data(data: dict[str, Any], split: str) -> dict[str, Any]:
    """The data with `split` as what is predicted."""
    if split == "predict" or "data" not in data:
        return data
    if split not in ("train", "dev", "test"):
        hint = suggest(split, ("train", "dev", "test", "predict"))
        raise ConfigError([f"--split={split!r}: expected train, dev, test or predict{hint}"])
    setup = data["data"]

    def predicted() -> Any:
        from dataclasses import replace

        made = setup()
        return replace(made, predict=getattr(made, split))

    return {"data": predicted}


def _for_evaluation(call: Call) -> tuple[Any, Any, dict[str, Any]]:
    """Trainer, problem with its weights, and data; (None, ...) where only the config was asked for."""
    if call.places and "weights" not in call.config:
        folder = Path(call.places[0])
        kept = folder / "weights.pt"
        call.config["weights"] = {"path": str(kept.resolve() if kept.is_file() else folder.resolve())}
    if call.places:
        _refuse_foreign(call)
    if "weights" not in call.config and not call.wrong:
        call.wrong.append("weights: missing; name a run's folder, or give --weights FILE")
    checked = _checked(call, needed=("problem", "data"))
    if "print_config" in call.flags:
        print(yamlfile.dump(checked.config), end="")
        return None, None, {}
    made = _made(checked)
    return made.trainer, made.problem, made.data


def _demo(call: Call) -> int:
    if call.wrong:
        raise ConfigError(call.wrong)
    from weft import demo

    demo.main()
    return OK


def _config(call: Call) -> int:
    print(yamlfile.dump(_checked(call, needed=()).config), end="")
    return OK


def _runs(call: Call) -> int:
    if call.wrong:
        raise ConfigError(call.wrong)
    from weft.records.listing import runs

    try:
        print(runs(call.places[0] if call.places else "runs", **call.others))
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    return OK


def _compare(call: Call) -> int:
    if call.wrong:
        raise ConfigError(call.wrong)
    from weft.records.comparison import compare

    try:
        comparison = compare(*call.places)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError([str(error)]) from None
    print(comparison)
    if "html" in call.others:
        print(comparison.write(call.others["html"]))
    return OK


def _sweep(call: Call) -> int:
    if call.wrong:
        raise ConfigError(call.wrong)

    slurm = {key.removeprefix("slurm."): value for key, value in call.others.items() if key.startswith("slurm.")}
    own = {key: yamlfile.load(value) for key, value in call.others.items() if not key.startswith("slurm.")}
    own |= {"setup": own["setup"].split(";")} if "setup" in own else {}
    found = sweep_from_file(call.places[0], {**own, **({"slurm": slurm} if slurm else {})})
    print(f"job {found.job}\n{found.folder}" if hasattr(found, "job") else found)
    if hasattr(found, "dashboard"):
        print(f"in a browser (pip install optuna-dashboard): {found.dashboard}")
    return OK


def _submit(call: Call) -> int:
    from weft.slurm.submitting import submit

    if call.wrong:
        raise ConfigError(call.wrong)
    slurm = {key.removeprefix("slurm."): value for key, value in call.others.items() if key.startswith("slurm.")}
    own: dict[str, Any] = {key: value for key, value in call.others.items() if not key.startswith("slurm.")}
    own |= {key: yamlfile.load(own[key]) for key in ("grace", "dry_run") if key in own}
    own |= {"setup": own["setup"].split(";")} if "setup" in own else {}
    try:
        job = submit(call.config, slurm=slurm, **own)
    except FileExistsError as error:
        raise ConfigError([str(error)]) from None
    print(f"job {job.job}\n{job.folder}" if job.job else job.script)
    return OK


def _completion(call: Call) -> int:
    if call.wrong:
        raise ConfigError(call.wrong)
    shell = call.places[0]
    if shell not in ("bash", "zsh"):
        raise ConfigError([f"{shell}: expected bash or zsh{suggest(shell, ('bash', 'zsh'))}"])
    if shell == "zsh":
        print("autoload -U +X bashcompinit && bashcompinit")
    print("complete -o default -C 'weft __complete' weft")
    return OK


COMMANDS = {
    "fit": Command(_fit, "train what a config describes", takes_config=True),
    "resume": Command(_resume, "go on with a run from its last checkpoint", ("RUN",), takes_config=True),
    "validate": Command(_evaluate, "metrics of a run's best weights on the dev set", ("[RUN]",), takes_config=True),
    "test": Command(_evaluate, "metrics of a run's best weights on the test set", ("[RUN]",), takes_config=True),
    "predict": Command(
        _predict,
        "what a run's problem computes for its predict set",
        ("[RUN]",),
        {
            "output": "the file: .npz or .pt (default: predictions.npz in the run's folder)",
            "split": "the data predicted for: predict (default), train, dev or test",
        },
        takes_config=True,
    ),
    "demo": Command(_demo, "train the constrained Rosenbrock problem, write runs/demo"),
    "config": Command(_config, "check a config and print it in full, in weft's own words", takes_config=True),
    "runs": Command(
        _runs,
        "list runs with their best metric and the settings in which they differ",
        ("[FOLDER]",),
        {
            "where": "conditions that must all hold: 'lr<0.01, epochs=50'",
            "sort": "the column to sort by: best, started, seconds, a setting; with - before it the largest first",
        },
    ),
    "compare": Command(
        _compare,
        "what differs between runs",
        ("RUN", "RUN", "[RUN]..."),
        {"html": "also draw the curves into this file"},
    ),
    "sweep": Command(
        _sweep,
        "search settings, as a sweep.yaml says",
        ("FILE",),
        {
            "trials": "how many trials are to be completed",
            "workers": "how many run at the same time",
            "sampler": "tpe, random or grid",
            "pruner": "median, halving or none",
            "storage": "a database by URL",
            "name": "the sweep's name: its folder, and its study in the database",
            "seed": "of the sampler",
            "take_over": "true: trials of lost machines are run again",
            "on": "local (default), or slurm: the workers are jobs",
            "setup": "with slurm: lines of bash before Python starts, separated by ;",
            "grace": "with slurm: seconds before the time limit at which a trial is saved (default: 300)",
            "slurm.OPTION": "any option of sbatch: --slurm.partition gpu --slurm.time 4:00:00",
        },
        prefix="slurm.",
    ),
    "submit": Command(
        _submit,
        "run a config as a job of SLURM, which survives time limits and preemption",
        own={
            "name": "of the run's folder (default: trainer.run_name, or the time)",
            "setup": "lines of bash before Python starts, separated by ; (modules, conda)",
            "python": "what starts Python (default: this one)",
            "grace": "seconds before the time limit at which the run saves and is requeued (default: 300)",
            "dry_run": "print the batch script, and submit nothing",
            "slurm.OPTION": "any option of sbatch: --slurm.partition gpu --slurm.time 4:00:00 --slurm.gres gpu:1",
        },
        switches=("dry_run",),
        takes_config=True,
        prefix="slurm.",
    ),
    "completion": Command(_completion, 'completion for your shell: eval "$(weft completion bash)"', ("SHELL",)),
}
