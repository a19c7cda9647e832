"""A LightningModule on a GPU: the losses of Lightning's own trainer."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.bitwise import weights
from tests.helpers.lightning_tools import LIGHTNING_WARNINGS, lightning_trainer, line, loaders, weft_trainer

pytestmark = [pytest.mark.gpu, *(pytest.mark.filterwarnings(w) for w in LIGHTNING_WARNINGS)]


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_on_a_gpu_losses_follow_lightnings(precision: str) -> None:
    trained = []
    for use in (lightning_trainer, weft_trainer):
        module = line()
        trainer = use(max_epochs=3, precision=precision, accelerator="gpu", devices=1)
        trainer.fit(module, **loaders())
        trained.append(
            (
                weights(module),
                float(
                    trainer.callback_metrics["val_loss"]
                    if use is lightning_trainer
                    else trainer.run.history.values["val_loss"][-1]
                ),
            )
        )
    assert trained[0][1] == pytest.approx(trained[1][1], rel=1e-3)
    for name, weight in trained[0][0].items():
        torch.testing.assert_close(trained[1][0][name].cpu(), weight.cpu(), rtol=1e-3, atol=1e-4)
