# %% [markdown]
# # Part 7: profiling. Where does the time go?
#
# A problem trains several times slower than it should. `profiler="simple"` says which part and which node;
# `profiler="pytorch"` # shows what that node does; then it is mended, and measured again.

# %%
import json
import os
import tempfile

import matplotlib.pyplot as plt
import torch

import weft

SMALL = bool(os.environ.get("WEFT_SMALL"))
torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## The problem
#
# A network proposes the heights of a rope's knots; `tension` adds up its energy. Somebody wrote that as a loop over
# rows, # with an `.item()` in it: right, differentiable, and slow. (On a GPU it also waits for the device in each
# turn.)


# %%
def slow_tension(height):
    energies = []
    for row in height:
        if row.abs().max().item() > 100:  # nobody knows any more why this is here
            row = row.clamp(-100, 100)
        energies.append(((row[1:] - row[:-1]) ** 2).sum())
    return torch.stack(energies)[:, None]


def fast_tension(height):
    return height.clamp(-100, 100).diff(dim=1).square().sum(dim=1, keepdim=True)


def make_problem(tension):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.GELU(), torch.nn.Linear(64, 16))
    return weft.Problem(
        [weft.Node(net, ["ends"], ["height"], name="rope"), weft.Node(tension, ["height"], ["energy"], name="tension")],
        objectives=[
            weft.objective(lambda energy: energy, name="energy_of_the_rope"),
            weft.objective(
                lambda height, ends: (height[:, [0, -1]] - ends).square().sum(1), weight=10.0, name="ends_fit"
            ),
        ],
        name="rope",
    )


rows = 256 if SMALL else 1024
ends = weft.DictDataset({"ends": 2 * torch.rand(rows, 2) - 1})
data = weft.Data(ends, weft.DictDataset({"ends": ends.datadict["ends"][:64]}), batch_size=64)

# %% [markdown]
# ## First look: the table
#
# The parts add up to the whole. Times of nodes are those of their forward pass; what a node does in the forward pass it
# pays for again in `backward`.

# %%
epochs = 12 if SMALL else 20
before = weft.Trainer(epochs=epochs, profiler="simple", progress=False).fit(make_problem(slow_tension), data)
print(before.profile)
culprit = before.profile.slowest_node

# %% [markdown]
# ## Second look: the trace
#
# `PyTorchProfiler` records a few steps with torch's own profiler. Its ranges carry the names of parts and nodes. The
# file # opens in TensorBoard's profiler page, in chrome://tracing and in Perfetto; the numbers are also in
# `result.profile`.

# %%
with tempfile.TemporaryDirectory() as folder:
    profiler = weft.hooks.PyTorchProfiler(wait=1, warmup=1, active=2)
    traced = weft.Trainer(max_steps=4, profiler=profiler, root_dir=folder, progress=False).fit(
        make_problem(slow_tension), data
    )
    trace = json.loads(profiler.files[0].read_text())
ranges = sorted({e["name"] for e in trace["traceEvents"] if e.get("cat") == "user_annotation"})
calls = {row["name"]: row["calls"] for row in traced.profile.to_dict()["rows"]}
print("ranges:", ", ".join(ranges))
print(f"in two steps of 64 rows: {calls['aten::item']} times .item(), {calls['aten::sub']} subtractions")

# %% [markdown]
# ## Mended
#
# The same numbers, computed for all rows at once.

# %%
rows_to_check = torch.randn(5, 16, requires_grad=True)
assert torch.allclose(slow_tension(rows_to_check), fast_tension(rows_to_check))
after = weft.Trainer(epochs=epochs, profiler="simple", progress=False).fit(make_problem(fast_tension), data)
print(after.profile)
factor = (before.profile.seconds / before.steps) / (after.profile.seconds / after.steps)
same = abs(before.history["train_loss"][-1] / after.history["train_loss"][-1] - 1)
print(f"{factor:.1f} times faster; the losses differ by {same:.1e} of their value")

# %%
figure, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
for row, (name, profile) in enumerate([("mended", after.profile), ("before", before.profile)]):
    left = 0.0
    for i, (part, timed) in enumerate(profile.parts.items()):
        width = 1000 * timed.seconds / profile.steps
        ax.barh(row, width, left=left, color=f"C{i}", label=part if row else None)
        left += width
ax.set(yticks=[0, 1], yticklabels=["mended", "before"], xlabel="time per step (ms)")
ax.legend(ncol=8, fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.2), columnspacing=1.0)
plt.show()

# %%
figures = {
    "slowest_node": culprit,
    "share_of_slowest_node": before.profile.to_dict()["nodes"][culprit]["share"],
    "ranges": ranges,
    "items_in_trace": calls["aten::item"],
    "faster_by": factor,
    "loss_difference": same,
}
