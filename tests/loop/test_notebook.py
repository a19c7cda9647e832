"""Manners in a notebook, in a real Jupyter kernel: quiet, interruptible, and usable afterwards."""

import pytest

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


TWO_PROCESSES = """
trainer = weft.Trainer(epochs=30, devices=2, strategy="ddp_notebook", accelerator="cpu", hooks=weft.hooks.LivePlot())
result = trainer.fit(problem, weft.Data(data, data, batch_size=16))
"""


@pytest.mark.long
def test_forked_processes_show_their_progress_in_the_cell():
    notebook = run_notebook(SETUP.replace("0.02", "0.0"), TWO_PROCESSES, "import os; 'WEFT_CELL_PIPE' in os.environ")
    outputs = notebook.cells[1].outputs
    plot, line = (output for output in outputs if output.output_type == "display_data")
    assert not [output for output in outputs if "fork" in output.get("text", "")]
    assert "epoch 30/30" in line.data["text/plain"] and "train_loss" in line.data["text/plain"]
    assert plot.data["text/html"].count('class="curve"') == 2
    assert notebook.cells[2].outputs[0].data["text/plain"] == "False"


LIVE = """
trainer = weft.Trainer(epochs=5, progress=False, hooks=weft.hooks.LivePlot(every=0.0))
result = trainer.fit(problem, weft.Data(data, data, batch_size=16))
"""


def test_a_live_plot_is_one_output_with_all_epochs():
    notebook = run_notebook(
        SETUP.replace("0.02", "0.0"), LIVE, "weft.hooks.live.page(result.history, result.best_epoch)"
    )
    (plot,) = notebook.cells[1].outputs
    html = plot.data["text/html"]
    assert html == eval(notebook.cells[2].outputs[0].data["text/plain"])
    assert html.count("<svg") == 1 and html.count('class="curve"') == 2  # train and dev; f repeats the loss


def test_a_live_plot_elsewhere_says_that_it_draws_nothing_and_a_wrong_name_is_met_with_those_there_are():
    import weft
    from tests.helpers.problems import plant_and_policy, tanh_points
    from weft.hooks.live import page

    with pytest.warns(UserWarning, match="LivePlot draws in notebooks only"):
        result = weft.Trainer(epochs=2, progress=False, hooks=weft.hooks.LivePlot()).fit(
            plant_and_policy(), tanh_points()
        )
    assert page(result.history).count("<svg") == 3 and page(result.history, names=("fit",)).count("<svg") == 2
    with pytest.raises(ValueError, match="there is no metric 'fti'; there are train_fit"):
        page(result.history, names=("fti",))
