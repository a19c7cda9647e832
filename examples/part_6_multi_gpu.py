# %% [markdown]
# # Part 6: one device or many, killed and resumed
#
# `multi_gpu.py` beside this file is a plain script: a network learns the portfolio of least variance for every demanded
# return. # Nothing in it says where anything is computed. It is started
#
# - by keyword: `python multi_gpu.py --devices 2 --accelerator gpu` (or `--devices 2 --accelerator cpu` on any machine),
# - by torchrun or srun: `torchrun --nproc-per-node 2 multi_gpu.py --devices 2`.
#
# Here its problem is trained by one process and by two, is killed and resumed, and is compared with cvxpy's optimum.

# %%
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cvxpy as cp
import matplotlib.pyplot as plt
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent if "__file__" in globals() else Path.cwd()))
import multi_gpu  # noqa: E402

SMALL = bool(os.environ.get("WEFT_SMALL"))
torch.set_num_threads(1)
here = Path(multi_gpu.__file__).parent

# %% [markdown]
# ## One process or two
#
# `batch_size` is per process: two processes with 50 rows each take the same steps as one with 100. In float64, so that
# what is # left of a difference is a difference of the method and not of the order in which float32 adds up.

# %%
epochs = 2 if SMALL else 20


def run_script(*arguments, launcher=(sys.executable,)):
    """The script's means over the test set, by name."""
    command = [*launcher, str(here / "multi_gpu.py"), "--accelerator", "cpu", "--precision", "64-true"]
    command += ["--epochs", str(epochs), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    lines = [line.split() for line in done.stdout.splitlines()]
    return {words[0]: float(words[1]) for words in lines if len(words) == 2 and words[0].startswith("test_")}


one = run_script("--batch-size", "100")
two = run_script("--batch-size", "50", "--devices", "2", "--strategy", "ddp")
by_torchrun = (
    one
    if SMALL
    else run_script(
        "--batch-size",
        "50",
        "--devices",
        "2",
        launcher=(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
    )
)
apart = max(abs(other[name] - one[name]) / one["test_loss"] for other in (two, by_torchrun) for name in one)
print(
    f"test loss: one process {one['test_loss']:.8f}, two {two['test_loss']:.8f}, "
    f"torchrun {by_torchrun['test_loss']:.8f}"
)
print(f"largest difference of any figure, relative to the loss: {apart:.1e}")

# %% [markdown]
# ## Killed and resumed
#
# The same training with checkpoints, in a process that is killed (SIGKILL, as a machine that fails) in the middle of an
# epoch, and started again with the same command. `resume="auto"` goes on where it was; the weights at the end are those
# of # a run that nobody killed, to the last bit.

# %%
TRAIN = """
import sys, time, torch, weft
sys.path.insert(0, sys.argv[1])
import multi_gpu
slow = {"on_step_end": lambda trainer, batch, loss: time.sleep(0.01)} if sys.argv[4] == "slow" else None
torch.manual_seed(0)
problem = multi_gpu.make_problem()
weft.Trainer(
    epochs=int(sys.argv[3]), seed=0, root_dir=sys.argv[2], run_name="portfolio", progress=False, accelerator="cpu",
    checkpoint={"every_n_steps": 7}, resume="auto", hooks=slow,
).fit(problem, multi_gpu.data_setup)
torch.save(problem.state_dict(), sys.argv[2] + "/weights.pt")
"""


def start(folder, pace):
    arguments = [str(here), folder, "2" if SMALL else "5", pace]
    return subprocess.Popen([sys.executable, "-c", TRAIN, *arguments], stderr=subprocess.PIPE, text=True)


with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
    process = start(folder, "slow")
    while not list(
        Path(folder).glob("portfolio/checkpoints/step-*[1-9]*.ckpt")
    ):  # until there is something to go on from
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    saved = sorted(path.name for path in Path(folder).glob("portfolio/checkpoints/step-*.ckpt"))
    for place in (folder, other):
        process = start(place, "fast")
        error = process.communicate()[1]
        assert process.returncode == 0, error
    resumed, whole = (torch.load(f"{place}/weights.pt", weights_only=True) for place in (folder, other))
    same = all(torch.equal(resumed[name], whole[name]) for name in whole)
print(f"killed after {saved[-1]}; weights of the resumed and the uninterrupted run are the same: {same}")

# %% [markdown]
# ## Against cvxpy
#
# The variance is of the order of 0.001, the weights of the constraints are 100: a stiff problem. `make_trainer` takes
# it in two # phases, the first with weights of one scale, the second with the problem's own; its docstring says why
# both have the same # minimum, which needs weights above cvxpy's multipliers. `penalised_excess` compares the whole
# loss of the problem.

# %%
torch.manual_seed(0)
problem = multi_gpu.make_problem()
trainer = multi_gpu.make_trainer(2 if SMALL else 4000, precision="64-true", compile=not SMALL, progress=False)
result = trainer.fit(problem, multi_gpu.data_setup)
print(result)
r, S = multi_gpu.r.double().numpy(), multi_gpu.S.double().numpy()
demanded = np.linspace(r.min(), r.max(), 7 if SMALL else 25)
x, p = cp.Variable(len(r)), cp.Parameter()
optimal = cp.Problem(cp.Minimize(cp.quad_form(x, cp.psd_wrap(S))), [cp.sum(x) == 1, r @ x >= p])
variance, multipliers = [], []
for value in demanded:
    p.value = value
    optimal.solve(solver=cp.CLARABEL)
    variance.append(optimal.value)
    multipliers.append([abs(float(constraint.dual_value)) for constraint in optimal.constraints])
learned = trainer.predict({"p": torch.tensor(demanded[:, None])})["x"].double().numpy()
found = np.einsum("bi,ij,bj->b", learned, S, learned)
invested = float(np.abs(learned.sum(1) - 1).max())
missing = float((demanded - learned @ r).max())
gap = float(np.abs(found - variance).mean() / np.mean(variance))
loss = found + 100 * np.abs(learned.sum(1) - 1) + 100 * np.maximum(demanded - learned @ r, 0)
excess = float(loss.mean() / np.mean(variance) - 1)
print("largest multipliers (invested, return):", np.round(np.max(multipliers, axis=0), 4))
print(
    f"variance differs from the optimum by {100 * gap:.2f} % on average; loss above the optimum's: {100 * excess:.2f} %"
)
print(f"fully invested to {invested:.1e}, returns enough to {missing:.1e}")

# %%
figure, ax = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
ax.plot(100 * demanded, 100 * np.sqrt(np.abs(variance)), color="C3", linewidth=4, alpha=0.35, label="optimum (cvxpy)")
ax.plot(100 * demanded, 100 * np.sqrt(found), "k--", label="network")
ax.set(ylim=(0, None), xlabel="demanded return (%)", ylabel="risk: standard deviation (%)")
ax.legend()
plt.show()

# %%
figures = {
    "two_processes_differ_by": apart,
    "resumed_is_the_same": same,
    "variance_gap": gap,
    "penalised_excess": excess,
    "invested_to": invested,
    "return_missing": missing,
}
