# %% [markdown]
# # Part 6: one device or many, killed and resumed
#
# `multi_gpu.py` beside this file is a plain script: a network learns the portfolio of least variance for every demanded return.
# Nothing in it says where anything is computed. It is started
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

import weft

sys.path.insert(0, str(Path(__file__).parent if "__file__" in globals() else Path.cwd()))
import multi_gpu  # noqa: E402

SMALL = bool(os.environ.get("WEFT_SMALL"))
torch.set_num_threads(1)
here = Path(multi_gpu.__file__).parent

# %% [markdown]
# ## One process or two
#
# `batch_size` is per process: two processes with 50 rows each take the same steps as one with 100.

# %%
epochs = 2 if SMALL else 20


def run_script(*arguments, launcher=(sys.executable,)):
    """The script's means over the test set, by name."""
    command = [*launcher, str(here / "multi_gpu.py"), "--accelerator", "cpu", "--epochs", str(epochs), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    lines = [line.split() for line in done.stdout.splitlines()]
    return {words[0]: float(words[1]) for words in lines if len(words) == 2 and words[0].startswith("test_")}


one = run_script("--batch-size", "100")
two = run_script("--batch-size", "50", "--devices", "2", "--strategy", "ddp")
by_torchrun = one if SMALL else run_script(
    "--batch-size", "50", "--devices", "2", launcher=(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
)  # fmt: skip
apart = max(abs(other[name] - one[name]) / one["test_loss"] for other in (two, by_torchrun) for name in one)
print(f"test loss: one process {one['test_loss']:.8f}, two {two['test_loss']:.8f}, torchrun {by_torchrun['test_loss']:.8f}")
print(f"largest difference of any figure, relative to the loss: {apart:.1e}")

# %% [markdown]
# ## Killed and resumed
#
# The same training with checkpoints, in a process that is killed (SIGKILL, as a machine that fails) in the middle of an
# epoch, and started again with the same command. `resume="auto"` goes on where it was; the weights at the end are those of
# a run that nobody killed, to the last bit.

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
    while not list(Path(folder).glob("portfolio/checkpoints/step-*[1-9]*.ckpt")):  # until there is something to go on from
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
# Variances are of the order of 0.001 and returns of 0.01, so the terms get weights that bring them to one scale: a phase may
# set them by name.

# %%
torch.manual_seed(0)
problem, epochs = multi_gpu.make_problem(), 2 if SMALL else 200
trainer = weft.Trainer(
    phases=[weft.Phase(epochs=epochs, weights={"variance": 1000.0, "return": 1000.0, "invested": 10.0})],
    seed=0, progress=False,
    optimizer=lambda params: torch.optim.Adam(params, lr=5e-3),
    scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs),
)  # fmt: skip
result = trainer.fit(problem, multi_gpu.data_setup)
print(result)
r, S = multi_gpu.r.double().numpy(), multi_gpu.S.double().numpy()
demanded = np.linspace(r.min(), r.max(), 7 if SMALL else 25)
x, p = cp.Variable(len(r)), cp.Parameter()
optimal = cp.Problem(cp.Minimize(cp.quad_form(x, cp.psd_wrap(S))), [cp.sum(x) == 1, r @ x >= p])
variance = []
for value in demanded:
    p.value = value
    optimal.solve(solver=cp.CLARABEL)
    variance.append(optimal.value)
learned = trainer.predict({"p": torch.tensor(demanded[:, None], dtype=torch.float32)})["x"].double().numpy()
found = np.einsum("bi,ij,bj->b", learned, S, learned)
invested = float(np.abs(learned.sum(1) - 1).max())
missing = float((demanded - learned @ r).max())
gap = float(np.abs(found - variance).mean() / np.mean(variance))
print(f"variance differs from the optimum by {100 * gap:.1f} % on average; fully invested to {invested:.1e}")

# %%
figure, ax = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
ax.plot(100 * demanded, 100 * np.sqrt(np.abs(variance)), color="C3", linewidth=4, alpha=0.35, label="optimum (cvxpy)")
ax.plot(100 * demanded, 100 * np.sqrt(found), "k--", label="network")
ax.set(ylim=(0, None), xlabel="demanded return (%)", ylabel="risk: standard deviation (%)")
ax.legend()
plt.show()

# %%
figures = {
    "two_processes_differ_by": apart, "resumed_is_the_same": same, "variance_gap": gap, "invested_to": invested,
    "return_missing": missing,
}  # fmt: skip
