"""Manners in a notebook, in a real Jupyter kernel: quiet, interruptible, and usable afterwards."""

from tests.helpers.notebooks import run_notebook

SETUP = """
import signal, time, torch, weft
torch.manual_seed(0)
before = signal.getsignal(signal.SIGINT)
line = weft.objective(lambda x, y: (y - x) ** 2, name="f")
problem = weft.Problem([weft.Node(torch.nn.Linear(1, 1), ["x"], ["y"])], [line])
data = weft.DictDataset({"x": torch.rand(64, 1)})
steps = []
def slow(trainer, batch, loss):
    steps.append(trainer.global_step)
    time.sleep(0.02)
trainer = weft.Trainer(epochs=400, progress=False, hooks={"on_step_end": slow})
"""
# the interrupt comes from outside, as from the stop button: a thread sends it once some epochs are over
FIT = """
import os, threading
def press_stop():
    while len(steps) < 30:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=press_stop).start()
result = trainer.fit(problem, weft.Data(data, data, batch_size=16))
"""
AFTER = """
assert result.stop_reason == "interrupted", result
assert result.steps == steps[-1] and result.steps < 1600
assert signal.getsignal(signal.SIGINT) is before
assert torch.equal(trainer.validate()["dev_loss"] * torch.ones(()), result.best_metric * torch.ones(()))
left = 400 - result.epochs
trainer.hooks.clear()
again = trainer.fit(problem, weft.Data(data, data, batch_size=16))
assert again.stop_reason == "epochs" and again.epochs == 400, again
assert len(again.history["train_loss"]) == 400 and again.best_metric <= result.best_metric
print("went on for", left, "epochs")
"""


def test_the_stop_button_ends_the_cell_after_the_step_and_fit_goes_on():
    notebook = run_notebook(SETUP, FIT, AFTER, "result")
    fit, after, shown = (notebook.cells[i].outputs for i in (1, 2, 3))
    assert fit == []  # nothing printed, no traceback
    assert "went on for" in after[0].text
    assert "<table>" in shown[0].data["text/html"] and "interrupted" in shown[0].data["text/html"]
    assert "FitResult(" in shown[0].data["text/plain"]


def test_plots_and_reprs_show_in_a_cell():
    notebook = run_notebook(
        SETUP.replace("epochs=400", "epochs=3").replace("0.02", "0.0") + "%matplotlib inline",
        "result = trainer.fit(problem, data); result.plot();",
        "problem",
        "trainer",
    )
    assert any("image/png" in output.get("data", {}) for output in notebook.cells[1].outputs)
    assert "Problem" in notebook.cells[2].outputs[0].data["text/plain"]
    assert "Trainer(epochs=3" in notebook.cells[3].outputs[0].data["text/plain"]
